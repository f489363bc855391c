//! A multi-layer perceptron: fully connected layers with ReLU between them.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::activation::relu;
use burn::tensor::{Device, Tensor, TensorData};
use rand::Rng;

use crate::weights::{Layout, TensorSpec, Weights};

/// The layers on a device; [`layout`] tells their names and shapes.
#[derive(Module, Debug)]
pub(in crate::training) struct Mlp {
    layers: Vec<Linear>,
}

/// `fc1.weight` `[out, in]`, `fc1.bias` `[out]`, `fc2.weight` …: a PyTorch state dict of `torch.nn.Linear`s.
pub(super) fn layout(num_features: usize, hidden: &[usize], num_classes: usize) -> Layout {
    let widths: Vec<usize> = [&[num_features], hidden, &[num_classes]].concat();
    let layers = widths.windows(2).enumerate();
    let tensors = layers.flat_map(|(index, ends)| {
        let (inputs, outputs) = (ends[0], ends[1]);
        let tensor = |part: &str, shape: Vec<usize>| TensorSpec { name: format!("fc{}.{part}", index + 1), shape };
        [tensor("weight", vec![outputs, inputs]), tensor("bias", vec![outputs])]
    });
    Layout { tensors: tensors.collect() }
}

/// Uniform in ±1/√in for weights and biases alike: `torch.nn.Linear`'s default (Kaiming-uniform with a = √5).
pub(super) fn initial_values(layout: &Layout, rng: &mut impl Rng) -> Vec<f32> {
    let mut values = Vec::with_capacity(layout.len());
    for layer in layout.tensors.chunks_exact(2) {
        let inputs = layer[0].shape[1];
        let bound = 1.0 / (inputs as f32).sqrt();
        let len = layer[0].len() + layer[1].len();
        values.extend((0..len).map(|_| rng.random_range(-bound..=bound)));
    }
    values
}

impl Mlp {
    pub(super) fn load(weights: &Weights, device: &Device) -> Self {
        let tensors: Vec<_> = weights.tensors().collect();
        let layers = tensors.chunks_exact(2).map(|layer| {
            let [(spec, weight), (_, bias)] = [layer[0], layer[1]];
            let (outputs, inputs) = (spec.shape[0], spec.shape[1]);
            // burn multiplies by a [in, out] matrix. Transposing on the host keeps it contiguous on the device.
            let weight = TensorData::new(transposed(weight, outputs, inputs), [inputs, outputs]);
            let bias = TensorData::new(bias.to_vec(), [outputs]);
            Linear { weight: Param::from_data(weight, device), bias: Some(Param::from_data(bias, device)) }
        });
        Self { layers: layers.collect() }
    }

    pub(super) fn forward(&self, features: Tensor<2>) -> Tensor<2> {
        let (last, hidden) = self.layers.split_last().expect("a layout has at least one layer");
        let activations = hidden.iter().fold(features, |x, layer| relu(layer.forward(x)));
        last.forward(activations)
    }

    pub(super) fn values(&self) -> Vec<f32> {
        let mut values = Vec::new();
        for layer in &self.layers {
            let weight = layer.weight.val();
            let [inputs, outputs] = weight.dims();
            values.extend(transposed(&floats(weight), inputs, outputs));
            values.extend(layer.bias.as_ref().map(|bias| floats(bias.val())).into_iter().flatten());
        }
        values
    }
}

/// A row-major `[rows, columns]` matrix as a row-major `[columns, rows]` one.
fn transposed(matrix: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| matrix[row * columns + column])).collect()
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().expect("a parameter made of f32 stays f32")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::config::{Backend, TrainingConfig};
    use crate::training::models::{Model, Network, initial_weights};

    fn weights(seed: u64) -> Weights {
        let config = TrainingConfig { hidden: vec![3], seed, ..Default::default() };
        initial_weights(&config, 4, 2)
    }

    #[test]
    fn tensors_have_the_names_and_shapes_of_a_pytorch_state_dict() {
        let layout = layout(64, &[32, 16], 10);
        let tensors: Vec<_> = layout.tensors.iter().map(|t| (t.name.as_str(), t.shape.as_slice())).collect();
        let expected: [(&str, &[usize]); 6] = [
            ("fc1.weight", &[32, 64]),
            ("fc1.bias", &[32]),
            ("fc2.weight", &[16, 32]),
            ("fc2.bias", &[16]),
            ("fc3.weight", &[10, 16]),
            ("fc3.bias", &[10]),
        ];
        assert_eq!(tensors, expected);
    }

    #[test]
    fn initial_values_come_from_the_seed_and_keep_pytorchs_bound() {
        assert_eq!(weights(1), weights(1));
        assert_ne!(weights(1), weights(2));
        for (spec, values) in weights(1).tensors() {
            let inputs: f32 = if spec.name.starts_with("fc1") { 4.0 } else { 3.0 };
            assert!(values.iter().all(|v| v.abs() <= 1.0 / inputs.sqrt()), "{}: {values:?}", spec.name);
        }
    }

    #[test]
    fn a_network_gives_back_the_values_it_was_loaded_with() {
        for backend in Backend::ALL {
            let network = Network::load(Model::Mlp, &weights(1), &backend.device());
            assert_eq!(network.values(), weights(1).values(), "{backend}");
        }
    }

    #[test]
    fn a_network_computes_what_its_weights_say() {
        let layout = std::sync::Arc::new(layout(2, &[2], 1));
        let (fc1, fc2) = ([1.0, 2.0, -1.0, -3.0, 0.5, 0.25], [10.0, 100.0, 7.0]);
        let weights = Weights::new(layout, [fc1, [0.0; 6]].concat()[..6].iter().chain(&fc2).copied().collect());
        for backend in Backend::ALL {
            let device = backend.device();
            let network = Network::load(Model::Mlp, weights.as_ref().unwrap(), &device);
            let logits = network.forward(Tensor::from_data([[3.0, 1.0], [1.0, -2.0]], &device));
            // Row one: relu(3 + 2 + 0.5), relu(-3 - 3 + 0.25); row two: relu(1 - 4 + 0.5), relu(-1 + 6 + 0.25).
            assert_eq!(floats(logits), [62.0, 532.0], "{backend}");
        }
    }
}
