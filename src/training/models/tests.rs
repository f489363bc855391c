//! What holds of every model.

use std::sync::Arc;

use super::*;
use crate::training::config::Backend;
use crate::weights::Layout;

fn network(config: &TrainingConfig, shape: &[usize], task: Task) -> Network {
    Network::new(config, shape, task).unwrap()
}

fn mlp(hidden: &[usize], num_features: usize, classes: usize) -> Network {
    let config = TrainingConfig { hidden: hidden.to_vec(), ..Default::default() };
    network(&config, &[num_features], Task::Classes(classes))
}

fn layout(network: &Network) -> Arc<Layout> {
    network.initial_weights(1).layout().clone()
}

fn names_and_shapes(network: &Network) -> Vec<(String, Vec<usize>)> {
    layout(network).tensors.iter().map(|tensor| (tensor.name.clone(), tensor.shape.clone())).collect()
}

fn expect_tensors(network: &Network, expected: &[(&str, &[usize])]) {
    let expected: Vec<_> = expected.iter().map(|(name, shape)| ((*name).to_owned(), shape.to_vec())).collect();
    assert_eq!(names_and_shapes(network), expected);
}

#[test]
fn an_mlp_has_the_names_and_shapes_of_a_pytorch_state_dict() {
    expect_tensors(
        &mlp(&[32, 16], 64, 10),
        &[
            ("fc1.weight", &[32, 64]),
            ("fc1.bias", &[32]),
            ("fc2.weight", &[16, 32]),
            ("fc2.bias", &[16]),
            ("fc3.weight", &[10, 16]),
            ("fc3.bias", &[10]),
        ],
    );
}

#[test]
fn initial_values_come_from_the_seed_and_keep_pytorchs_bound() {
    let network = mlp(&[3], 4, 2);
    assert_eq!(network.initial_weights(1), network.initial_weights(1));
    assert_ne!(network.initial_weights(1), network.initial_weights(2));
    for (spec, values) in network.initial_weights(1).tensors() {
        let inputs: f32 = if spec.name.starts_with("fc1") { 4.0 } else { 3.0 };
        assert!(values.iter().all(|v| v.abs() <= 1.0 / inputs.sqrt()), "{}: {values:?}", spec.name);
    }
}

#[test]
fn an_mlp_computes_what_its_weights_say() {
    let network = mlp(&[2], 2, 1);
    let values = [1.0, 2.0, -1.0, -3.0, 0.5, 0.25, 10.0, 100.0, 7.0];
    for backend in Backend::ALL {
        let device = backend.device();
        let features = Tensor::from_data([[3.0, 1.0], [1.0, -2.0]], &device);
        let outputs = network.forward(&network.pass(&values, &device), features);
        // Row one: relu(3 + 2 + 0.5), relu(-3 - 3 + 0.25); row two: relu(1 - 4 + 0.5), relu(-1 + 6 + 0.25).
        assert_eq!(floats(outputs), [62.0, 532.0], "{backend}");
    }
}
