//! Layers: each declares its tensors with the names, shapes and initial values of its namesake in `torch.nn`, and
//! computes with those that a [`Pass`] holds.

use burn::tensor::Tensor;

use super::tensors::{Declared, Initial, Pass};

/// `torch.nn.Linear`: `NAME.weight` `[out, in]`, `NAME.bias` `[out]`.
#[derive(Clone, Debug)]
pub(super) struct Linear {
    name: String,
    inputs: usize,
    outputs: usize,
}

impl Linear {
    pub(super) fn new(name: impl Into<String>, inputs: usize, outputs: usize) -> Self {
        Self { name: name.into(), inputs, outputs }
    }

    pub(super) fn declare(&self) -> Vec<Declared> {
        let initial = of_fan_in(self.inputs);
        let tensor = |part: &str, shape: &[usize]| Declared::new(format!("{}.{part}", self.name), shape, initial);
        vec![tensor("weight", &[self.outputs, self.inputs]), tensor("bias", &[self.outputs])]
    }

    /// `[batch, in]` to `[batch, out]`.
    pub(super) fn forward(&self, pass: &Pass<'_>, x: Tensor<2>) -> Tensor<2> {
        let weight = pass.get(&format!("{}.weight", self.name), [self.outputs, self.inputs]);
        let bias = pass.get(&format!("{}.bias", self.name), [1, self.outputs]);
        // In this order the weight's gradient comes back as the weight is laid out, [out, in].
        weight.matmul(x.transpose()).transpose() + bias
    }
}

/// PyTorch's default for weights and biases of linear and convolution layers: Kaiming-uniform with a = √5, which is
/// uniform in ±1/√fan-in.
fn of_fan_in(fan_in: usize) -> Initial {
    Initial::Uniform(1.0 / (fan_in as f32).sqrt())
}
