//! A multi-layer perceptron: fully connected layers with ReLU between them. Without a hidden layer it is a linear model.

use burn::tensor::Tensor;
use burn::tensor::activation::relu;

use super::layers::Linear;
use super::tensors::{Declared, Pass};

/// `fc1.weight` `[out, in]`, `fc1.bias` `[out]`, `fc2.weight` …
#[derive(Clone, Debug)]
pub(in crate::training) struct Mlp {
    layers: Vec<Linear>,
}

impl Mlp {
    pub(super) fn new(num_features: usize, hidden: &[usize], outputs: usize) -> Self {
        let widths: Vec<usize> = [&[num_features], hidden, &[outputs]].concat();
        let layers = widths.windows(2).enumerate();
        Self { layers: layers.map(|(index, ends)| Linear::new(format!("fc{}", index + 1), ends[0], ends[1])).collect() }
    }

    pub(super) fn declare(&self) -> Vec<Declared> {
        self.layers.iter().flat_map(Linear::declare).collect()
    }

    /// `[batch, features]` to `[batch, outputs]`.
    pub(super) fn forward(&self, pass: &Pass<'_>, x: Tensor<2>) -> Tensor<2> {
        let (last, hidden) = self.layers.split_last().expect("there is at least one layer");
        let activations = hidden.iter().fold(x, |x, layer| relu(layer.forward(pass, x)));
        last.forward(pass, activations)
    }
}
