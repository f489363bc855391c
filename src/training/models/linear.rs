//! A linear model: logistic (softmax) regression where classes are told, least squares where numbers are.

use burn::tensor::Tensor;

use super::layers;
use super::tensors::{Declared, Pass};

/// `linear.weight` `[outputs, features]`, `linear.bias` `[outputs]`.
#[derive(Clone, Debug)]
pub(in crate::training) struct Linear {
    layer: layers::Linear,
}

impl Linear {
    pub(super) fn new(num_features: usize, outputs: usize) -> Self {
        Self { layer: layers::Linear::new("linear", num_features, outputs) }
    }

    pub(super) fn declare(&self) -> Vec<Declared> {
        self.layer.declare()
    }

    /// `[batch, features]` to `[batch, outputs]`.
    pub(super) fn forward(&self, pass: &Pass<'_>, x: Tensor<2>) -> Tensor<2> {
        self.layer.forward(pass, x)
    }
}
