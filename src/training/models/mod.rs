//! Models: one file each.
//!
//! A model is a list of [layers](layers): it declares its tensors ([`tensors`]) and says what a forward pass computes with
//! them. It keeps PyTorch's names and shapes, so that an exported state dict loads where a PyTorch user expects it to.

use std::ops::Range;

use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::config::TrainingConfig;
use super::dataset::Task;
use super::named::named;
use super::random::generator;
use crate::weights::Weights;

mod layers;
mod linear;
mod mlp;
mod tensors;

use linear::Linear;
use mlp::Mlp;
use tensors::Declared;
pub(super) use tensors::{Pass, floats};

/// Which model to train.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Model {
    /// Logistic (softmax) regression, or least squares where the targets are numbers.
    Linear,
    /// Fully connected layers with ReLU between them.
    #[default]
    Mlp,
}

named!(Model, "model", Linear => "linear", Mlp => "mlp");

/// Data that a model cannot learn from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("model = {model} cannot learn from these data: it needs {needs}, and an example here is {given}")]
pub struct ModelError {
    /// The model.
    pub model: Model,
    /// What it needs, as a noun.
    pub needs: &'static str,
    /// What an example of the data is.
    pub given: String,
}

fn describe(shape: &[usize], task: Task) -> String {
    let sizes: Vec<String> = shape.iter().map(usize::to_string).collect();
    let target = match task {
        Task::Classes(_) => "a class",
        Task::Numbers => "a number",
        Task::Steps(_) => "a class for each of its steps",
    };
    format!("{} values with {target}", sizes.join(" × "))
}

/// A model for data of one shape, without values.
#[derive(Clone, Debug)]
pub(super) struct Network {
    architecture: Architecture,
    declared: Vec<Declared>,
}

#[derive(Clone, Debug)]
enum Architecture {
    Linear(Linear),
    Mlp(Mlp),
}

impl Network {
    /// The model of `config` for examples of this shape.
    pub(super) fn new(config: &TrainingConfig, shape: &[usize], task: Task) -> Result<Self, ModelError> {
        let num_features = shape.iter().product();
        let needs = |needs| ModelError { model: config.model, needs, given: describe(shape, task) };
        let of_one_output = || match task {
            Task::Classes(_) | Task::Numbers => Ok(task.outputs()),
            Task::Steps(_) => Err(needs("a class or a number for each example (for texts there is char-lstm)")),
        };
        let architecture = match config.model {
            Model::Linear => Architecture::Linear(Linear::new(num_features, of_one_output()?)),
            Model::Mlp => Architecture::Mlp(Mlp::new(num_features, &config.hidden, of_one_output()?)),
        };
        let declared = match &architecture {
            Architecture::Linear(linear) => linear.declare(),
            Architecture::Mlp(mlp) => mlp.declare(),
        };
        Ok(Self { architecture, declared })
    }

    /// Initial weights: a function of model and seed alone.
    pub(super) fn initial_weights(&self, seed: u64) -> Weights {
        tensors::initial_weights(&self.declared, &mut generator(&format!("initial weights, seed {seed}")))
    }

    /// Where the values that have a gradient stand in the flat row.
    pub(super) fn trainable(&self) -> Vec<Range<usize>> {
        tensors::trainable(&self.declared)
    }

    /// Puts `values`, a row of this model's layout, on `device`.
    pub(super) fn pass(&self, values: &[f32], device: &Device) -> Pass<'_> {
        Pass::new(&self.declared, values, device)
    }

    /// Features `[batch, features]` to outputs `[batch, outputs]`, or `[batch × steps, outputs]` with a class for each
    /// step.
    pub(super) fn forward(&self, pass: &Pass<'_>, features: Tensor<2>) -> Tensor<2> {
        match &self.architecture {
            Architecture::Linear(linear) => linear.forward(pass, features),
            Architecture::Mlp(mlp) => mlp.forward(pass, features),
        }
    }
}

#[cfg(test)]
mod tests;
