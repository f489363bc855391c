//! What holds of every model.

use std::ops::ControlFlow;
use std::sync::{Arc, Barrier};
use std::thread;

use burn::tensor::{Distribution, TensorData};
use rand::Rng;

use super::*;
use crate::training::config::{Backend, Norm};
use crate::training::cores::Cores;
use crate::training::dataset::{Dataset, Targets};
use crate::training::export::to_safetensors;
use crate::training::loss::Loss;
use crate::training::{BurnTrainer, Trainer};
use crate::types::{PeerId, Round};
use crate::weights::{Layout, TensorSpec};

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

/// A small configuration of each model, with the shape of an example and the task that it is for.
fn small(model: Model, norm: Norm) -> (TrainingConfig, Vec<usize>, Task) {
    let base = TrainingConfig { model, norm, hidden: vec![5], channels: vec![4, 6], ..Default::default() };
    match model {
        Model::Linear => (base, vec![7], Task::Numbers),
        Model::Mlp => (base, vec![7], Task::Classes(3)),
        Model::Cnn | Model::ResnetSmall => (base, vec![2, 6, 5], Task::Classes(3)),
        Model::FedavgCnn => (base, vec![1, 4, 4], Task::Classes(3)),
        Model::CharLstm => (TrainingConfig { hidden: vec![5, 5], embedding_dim: 3, ..base }, vec![4], Task::Steps(6)),
    }
}

/// Every model, and `resnet-small` with either normalisation.
fn all_small() -> Vec<(TrainingConfig, Vec<usize>, Task)> {
    let of_group = Model::ALL.iter().map(|&model| small(model, Norm::Group));
    of_group.chain([small(Model::ResnetSmall, Norm::Batch)]).collect()
}

/// So many examples for the task, drawn by the purpose: features and targets.
fn examples(shape: &[usize], task: Task, count: usize) -> (Vec<f32>, Targets) {
    let mut rng = generator("examples of a test");
    let num_features: usize = shape.iter().product();
    let names = |count: usize| (0..count).map(|name| name.to_string()).collect();
    let mut below =
        |end: usize, len: usize| -> Vec<u32> { (0..len).map(|_| rng.random_range(0..end as u32)).collect() };
    match task {
        Task::Steps(tokens) => {
            let features = below(tokens, count * num_features).into_iter().map(|token| token as f32).collect();
            (features, Targets::Steps { labels: below(tokens, count * num_features), names: names(tokens) })
        }
        Task::Classes(classes) => {
            let labels = below(classes, count);
            let features = (0..count * num_features).map(|_| rng.random_range(-1.0..1.0)).collect();
            (features, Targets::Classes { labels, names: names(classes) })
        }
        Task::Numbers => {
            let mut reals = |len: usize| (0..len).map(|_| rng.random_range(-1.0..1.0)).collect::<Vec<f32>>();
            let features = reals(count * num_features);
            (features, Targets::Numbers(reals(count).into_iter().map(f64::from).collect()))
        }
    }
}

fn on_device(features: &[f32], count: usize, device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(features.to_vec(), [count, features.len() / count]), device)
}

/// Outputs and gradient of one pass of training.
fn trained_once(network: &Network, values: &[f32], features: &[f32], targets: &Targets, count: usize) -> [Vec<f32>; 2] {
    let device = Backend::Flex.device().autodiff();
    let pass = network.pass(values, &device);
    let outputs = network.forward(&pass, on_device(features, count, &device));
    let on_host = floats(outputs.clone().inner());
    let slope = Loss::of(&on_host, targets).slope;
    [on_host, pass.gradient(outputs, slope)]
}

#[test]
fn every_models_gradient_follows_finite_differences() {
    for (config, shape, task) in all_small() {
        let network = network(&config, &shape, task);
        let weights = network.initial_weights(5);
        let (features, targets) = examples(&shape, task, 6);
        let [outputs, gradient] = trained_once(&network, weights.values(), &features, &targets, 6);
        let rows = outputs.len() / task.outputs();
        let mut start = 0;
        for tensor in &weights.layout().tensors {
            let (mut missed, mut whole) = (0.0, 0.0);
            for index in (start..start + tensor.len()).step_by(tensor.len().div_ceil(6)) {
                let loss_at = |offset: f32| {
                    let mut values = weights.values().to_vec();
                    values[index] += offset;
                    let [outputs, _] = trained_once(&network, &values, &features, &targets, 6);
                    Loss::of(&outputs, &targets).sum / rows as f64
                };
                let slope = (loss_at(1e-3) - loss_at(-1e-3)) / 2e-3;
                missed += (slope - f64::from(gradient[index])).powi(2);
                whole += slope.powi(2);
            }
            let name = format!("{}, {}", config.model, tensor.name);
            // A kink of ReLU or of a pooling may lie between the two points; a wrong gradient is further off.
            assert!(missed.sqrt() <= 0.2 * whole.sqrt() + 2e-4, "{name}: {} of {}", missed.sqrt(), whole.sqrt());
            let is_buffer = tensor.name.contains("running");
            assert_eq!(gradient[start..start + tensor.len()].iter().all(|&slope| slope == 0.0), is_buffer, "{name}");
            start += tensor.len();
        }
    }
}

#[test]
fn both_backends_compute_the_same() {
    for (config, shape, task) in all_small() {
        let network = network(&config, &shape, task);
        let weights = network.initial_weights(3);
        let (features, _) = examples(&shape, task, 3);
        let [flex, ndarray] = [Backend::Flex, Backend::Ndarray].map(|backend| {
            let device = backend.device();
            floats(network.forward(&network.pass(weights.values(), &device), on_device(&features, 3, &device)))
        });
        assert_eq!(flex.len(), ndarray.len());
        let near = flex.iter().zip(&ndarray).all(|(a, b)| (a - b).abs() < 1e-5);
        assert!(near, "{}: {flex:?} against {ndarray:?}", config.model);
    }
}

#[test]
fn a_cnn_says_the_same_of_an_image_in_whatever_batch() {
    let (config, shape, task) = small(Model::Cnn, Norm::Group);
    let network = network(&config, &shape, task);
    let weights = network.initial_weights(3);
    let (features, _) = examples(&shape, task, 70); // more than go through the convolutions together
    let device = Backend::Flex.device();
    let outputs = |features: &[f32], count: usize| {
        floats(network.forward(&network.pass(weights.values(), &device), on_device(features, count, &device)))
    };
    let together = outputs(&features, 70);
    let alone = features.chunks(features.len() / 70).flat_map(|image| outputs(image, 1));
    assert!(together.iter().zip(alone).all(|(together, alone)| (together - alone).abs() < 1e-5));
}

/// The bits of the weights after a round of a few steps and of the loss on all examples; `between` is called after every
/// step.
fn trained(mut trainer: BurnTrainer, between: &mut dyn FnMut()) -> Vec<u32> {
    let mut on_progress = |_| {
        between();
        ControlFlow::Continue(())
    };
    trainer.train(Round(1), &mut on_progress).unwrap();
    let loss = trainer.evaluate().unwrap().loss;
    trainer.weights().values().iter().map(|value| value.to_bits()).chain([(loss as f32).to_bits()]).collect()
}

/// Some steps of a small configuration of each model, for the peer that is named.
fn trainers() -> impl Iterator<Item = (String, impl Fn(&str) -> BurnTrainer + Sync)> {
    all_small().into_iter().map(|(config, shape, task)| {
        let (features, targets) = examples(&shape, task, 12);
        let data = Dataset::of(features, &shape, targets).unwrap();
        let name = format!("{}, {}", config.model, config.norm);
        let config = TrainingConfig { batch_size: 5, local_steps: Some(4), learning_rate: 0.05, ..config };
        let trainer = move |peer: &str| {
            BurnTrainer::new(config.clone(), PeerId::new(peer).unwrap(), data.clone(), data.clone()).unwrap()
        };
        (name, trainer)
    })
}

#[test]
fn every_models_round_is_the_same_bits_on_however_many_threads_a_peer_trains() {
    for (model, trainer) in trainers() {
        let on = |threads| Cores::at_once(threads).run(|| trained(trainer("a"), &mut || {}));
        let one = on(1);
        for threads in [2, 4] {
            assert_eq!(on(threads), one, "{model} on {threads} threads");
        }
    }
}

/// Small ones are not worth a second thread: here products, sums and copies are shared out.
#[test]
fn a_large_models_round_is_the_same_bits_on_however_many_threads_a_peer_trains() {
    let shape = [1, 28, 28];
    let (features, targets) = examples(&shape, Task::Classes(10), 32);
    let data = Dataset::of(features, &shape, targets).unwrap();
    for (model, hidden) in [(Model::FedavgCnn, vec![]), (Model::Mlp, vec![700, 500])] {
        let config = TrainingConfig { model, hidden, batch_size: 32, local_steps: Some(2), ..Default::default() };
        let on = |threads| {
            let config = config.clone();
            let trainer = BurnTrainer::new(config, PeerId::new("a").unwrap(), data.clone(), data.clone()).unwrap();
            Cores::at_once(threads).run(|| trained(trainer, &mut || {}))
        };
        let one = on(1);
        for threads in [2, 3] {
            assert!(on(threads) == one, "{model} on {threads} threads");
        }
    }
}

#[test]
fn every_models_round_is_the_same_bits_beside_however_many_other_peers() {
    for (model, trainer) in trainers() {
        let alone = ["a", "b"].map(|peer| trained(trainer(peer), &mut || {}));
        assert_ne!(alone[0], alone[1], "{model}");
        for threads in [2, 4] {
            let start = Barrier::new(threads);
            let beside: Vec<_> = thread::scope(|scope| {
                let run = |index: usize| {
                    let (start, trainer) = (&start, &trainer);
                    scope.spawn(move || {
                        start.wait();
                        trained(trainer(["a", "b"][index % 2]), &mut || {})
                    })
                };
                let runs: Vec<_> = (0..threads).map(run).collect();
                runs.into_iter().map(|run| run.join().unwrap()).collect()
            });
            for (index, bits) in beside.iter().enumerate() {
                assert_eq!(*bits, alone[index % 2], "{model} on {threads} threads");
            }
        }
    }
}

#[test]
fn peers_of_one_process_are_not_coupled_by_the_randomness_that_burn_shares() {
    for (model, trainer) in trainers() {
        let alone = ["a", "b"].map(|peer| trained(trainer(peer), &mut || {}));
        let mut inner = Vec::new();
        let outer = trained(trainer("a"), &mut || {
            let device = Backend::Flex.device();
            device.seed(inner.len() as u64);
            let drawn: Tensor<1> = Tensor::random([3], Distribution::Default, &device);
            assert_eq!(floats(drawn).len(), 3);
            inner.push(trained(trainer("b"), &mut || {})); // a whole round between two steps of the other
        });
        assert_eq!(outer, alone[0], "{model}");
        assert!(inner.len() == 4 && inner.iter().all(|bits| *bits == alone[1]), "{model}");
    }
}

#[test]
fn a_cnn_has_the_names_and_shapes_of_a_pytorch_state_dict() {
    let (config, shape, task) = small(Model::Cnn, Norm::Group);
    expect_tensors(
        &network(&config, &shape, task),
        &[
            ("conv1.weight", &[4, 2, 3, 3]),
            ("conv1.bias", &[4]),
            ("conv2.weight", &[6, 4, 3, 3]),
            ("conv2.bias", &[6]),
            ("fc1.weight", &[5, 6]), // 6 × 5 pixels, halved twice, are 1 × 1
            ("fc1.bias", &[5]),
            ("fc2.weight", &[3, 5]),
            ("fc2.bias", &[3]),
        ],
    );
}

#[test]
fn the_cnn_of_federated_averaging_has_as_many_values_as_in_the_paper() {
    let config = TrainingConfig { model: Model::FedavgCnn, ..Default::default() };
    let network = network(&config, &[1, 28, 28], Task::Classes(10));
    assert_eq!(layout(&network).len(), 1_663_370);
    assert_eq!(layout(&network).tensors[0].shape, [32, 1, 5, 5]);
}

#[test]
fn a_resnet_has_torchvisions_names_and_the_buffers_of_its_norm() {
    let (config, shape, task) = small(Model::ResnetSmall, Norm::Batch);
    let of_batch = network(&config, &shape, task);
    let tensors = names_and_shapes(&of_batch);
    let shape_of = |name: &str| tensors.iter().find(|(other, _)| other == name).map(|(_, shape)| shape.as_slice());
    assert_eq!(shape_of("conv1.weight"), Some(&[4, 2, 3, 3][..]));
    assert_eq!(shape_of("layer1.0.downsample.0.weight"), None, "nothing changes there");
    assert_eq!(shape_of("layer2.0.downsample.0.weight"), Some(&[6, 4, 1, 1][..]));
    assert_eq!(shape_of("layer2.0.downsample.1.running_var"), Some(&[6][..]));
    assert_eq!(shape_of("layer2.1.bn2.bias"), Some(&[6][..]));
    assert_eq!(shape_of("fc.weight"), Some(&[3, 6][..]));
    let (config, ..) = small(Model::ResnetSmall, Norm::Group);
    let of_group = network(&config, &shape, task);
    let kept: Vec<_> = tensors.into_iter().filter(|(name, _)| !name.contains("running")).collect();
    assert_eq!(names_and_shapes(&of_group), kept);
    assert_eq!(of_group.trainable(), [0..layout(&of_group).len()], "one range without buffers");
    let trained: usize = of_batch.trainable().iter().map(ExactSizeIterator::len).sum();
    assert_eq!(trained, layout(&of_group).len());
}

#[test]
fn a_char_lstm_has_the_names_and_shapes_of_a_pytorch_state_dict() {
    let (config, shape, task) = small(Model::CharLstm, Norm::Group);
    expect_tensors(
        &network(&config, &shape, task),
        &[
            ("embedding.weight", &[6, 3]),
            ("lstm.weight_ih_l0", &[20, 3]),
            ("lstm.weight_hh_l0", &[20, 5]),
            ("lstm.bias_ih_l0", &[20]),
            ("lstm.bias_hh_l0", &[20]),
            ("lstm.weight_ih_l1", &[20, 5]),
            ("lstm.weight_hh_l1", &[20, 5]),
            ("lstm.bias_ih_l1", &[20]),
            ("lstm.bias_hh_l1", &[20]),
            ("fc.weight", &[6, 5]),
            ("fc.bias", &[6]),
        ],
    );
}

#[test]
fn groups_divide_the_channels() {
    assert_eq!([1, 2, 6, 8, 16, 64, 7].map(layers::Norm::groups), [1, 1, 3, 4, 8, 8, 1]);
}

#[test]
fn running_statistics_move_a_tenth_of_the_way_to_the_batchs_own() {
    let (config, shape, task) = small(Model::ResnetSmall, Norm::Batch);
    let network = network(&config, &shape, task);
    let weights = network.initial_weights(3);
    let (features, _) = examples(&shape, task, 4);
    let device = Backend::Flex.device().autodiff();
    let pass = network.pass(weights.values(), &device);
    network.forward(&pass, on_device(&features, 4, &device));
    let mut after = weights.clone();
    pass.write_buffers(after.values_mut());
    // What bn1 sees is what conv1 yields.
    let plain = Backend::Flex.device();
    let pass = network.pass(weights.values(), &plain);
    let images = on_device(&features, 4, &plain).reshape([4, shape[0], shape[1], shape[2]]);
    let seen = layers::Conv::new("conv1", 2, 4, 3).unbiased().forward(&pass, images);
    let channel: Vec<f32> = floats(seen.narrow(1, 1, 1));
    let mean = channel.iter().sum::<f32>() / channel.len() as f32;
    let variance = channel.iter().map(|value| (value - mean).powi(2)).sum::<f32>() / (channel.len() - 1) as f32;
    for (spec, values) in after.tensors() {
        match spec.name.as_str() {
            "bn1.running_mean" => assert!((values[1] - 0.1 * mean).abs() < 1e-6, "{values:?} {mean}"),
            "bn1.running_var" => assert!((values[1] - (0.9 + 0.1 * variance)).abs() < 1e-6, "{values:?} {variance}"),
            _ => {}
        }
    }
    let moved = weights.tensors().zip(after.tensors()).filter(|((_, before), (_, after))| before != after);
    assert!(moved.map(|((spec, _), _)| &spec.name).all(|name| name.contains("running")), "buffers alone");
    // Measuring takes the running statistics, and leaves them alone.
    let pass = network.pass(after.values(), &plain);
    network.forward(&pass, on_device(&features, 4, &plain));
    let mut measured = after.clone();
    pass.write_buffers(measured.values_mut());
    assert_eq!(measured, after);
}

#[test]
fn data_that_a_model_cannot_learn_from_are_refused_with_what_it_needs() {
    let refused =
        |config: &TrainingConfig, shape: &[usize], task| Network::new(config, shape, task).unwrap_err().to_string();
    let of = |model| TrainingConfig { model, ..Default::default() };
    assert_eq!(
        refused(&of(Model::Cnn), &[13], Task::Classes(2)),
        "model = cnn cannot learn from these data: it needs images, as from the data sets idx: and images:, and an \
         example here is 13 values with a class"
    );
    let small = refused(&of(Model::FedavgCnn), &[1, 3, 28], Task::Classes(10));
    assert!(small.contains("at least 4 × 4 pixels, and an example here is 1 × 3 × 28 values"), "{small}");
    assert!(refused(&of(Model::CharLstm), &[1, 8, 8], Task::Classes(10)).contains("needs texts"));
    assert!(refused(&of(Model::Mlp), &[32], Task::Steps(60)).contains("there is char-lstm"));
    let uneven = TrainingConfig { hidden: vec![8, 9], ..of(Model::CharLstm) };
    assert!(refused(&uneven, &[32], Task::Steps(60)).contains("of the same width"));
    let deep = TrainingConfig { channels: vec![4; 4], ..of(Model::Cnn) };
    assert!(refused(&deep, &[1, 8, 8], Task::Classes(10)).contains("2 pixels to halve"));
}

/// The interpreter of a virtual environment with torch and safetensors, if there is one: that in `RODIZIO_PYTHON`, else
/// `python3`.
fn python_with_torch() -> Option<String> {
    let python = std::env::var("RODIZIO_PYTHON").unwrap_or_else(|_| "python3".into());
    let mut command = std::process::Command::new(&python);
    let found = command.args(["-c", "import torch, safetensors"]).output().is_ok_and(|output| output.status.success());
    found.then_some(python)
}

#[test]
fn every_exported_model_is_the_same_in_pytorch() {
    let Some(python) = python_with_torch() else {
        println!("skipped: no python with torch and safetensors (RODIZIO_PYTHON names one)");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    for (config, shape, task) in all_small() {
        let network = network(&config, &shape, task);
        let mut weights = network.initial_weights(3);
        // Running statistics that differ from those of a new model.
        let trainable = network.trainable();
        for (index, value) in weights.values_mut().iter_mut().enumerate() {
            if !trainable.iter().any(|range| range.contains(&index)) {
                *value += 0.01 * (index % 7) as f32;
            }
        }
        let (features, targets) = examples(&shape, task, 4);
        let plain = Backend::Flex.device();
        let outputs = network.forward(&network.pass(weights.values(), &plain), on_device(&features, 4, &plain));
        let width = task.outputs();
        let [in_training, gradient] = trained_once(&network, weights.values(), &features, &targets, 4);
        let slope = Loss::of(&in_training, &targets).slope;
        let rows = in_training.len() / width;
        let spec = |name: &str, shape: &[usize]| TensorSpec { name: name.into(), shape: shape.to_vec() };
        let mut tensors = weights.layout().tensors.clone();
        tensors.extend([
            spec("features", &[4, features.len() / 4]),
            spec("outputs", &[rows, width]),
            spec("outputs_train", &[rows, width]),
            spec("slope", &[rows, width]),
        ]);
        let values = [gradient, features, floats(outputs), in_training, slope].concat();
        let expected = Weights::new(Arc::new(Layout { tensors }), values).unwrap();
        let of_rodizio = [("rodizio".to_owned(), config.model.to_string())].into();
        let spec = serde_json::json!({
            "model": config.model, "shape": shape, "outputs": width, "hidden": config.hidden,
            "channels": config.channels, "norm": config.norm, "embedding_dim": config.embedding_dim,
        });
        let path = dir.path().join(format!("{}-{}", config.model, config.norm));
        std::fs::write(path.with_extension("json"), spec.to_string()).unwrap();
        std::fs::write(path.with_extension("safetensors"), to_safetensors(&weights, &of_rodizio).unwrap()).unwrap();
        std::fs::write(path.with_extension("expected"), to_safetensors(&expected, &of_rodizio).unwrap()).unwrap();
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/src/bench/torch_models.py");
    let output = std::process::Command::new(python).arg(script).arg("check").arg(dir.path()).output().unwrap();
    let (said, failed) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    assert!(output.status.success() && said.lines().count() == all_small().len(), "{said}{failed}");
}
