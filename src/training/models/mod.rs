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

mod char_lstm;
mod cnn;
mod layers;
mod linear;
mod mlp;
mod resnet;
mod tensors;

use char_lstm::CharLstm;
use cnn::Cnn;
use linear::Linear;
use mlp::Mlp;
use resnet::Resnet;
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
    /// 3 × 3 convolutions with pooling, then fully connected layers, for images.
    Cnn,
    /// The convolutional network of McMahan et al. (2017), for images.
    FedavgCnn,
    /// A residual network of 4 convolutions a stage, for images.
    ResnetSmall,
    /// A long short-term memory that tells the next token of a text.
    CharLstm,
}

named!(
    Model, "model",
    Linear => "linear",
    Mlp => "mlp",
    Cnn => "cnn",
    FedavgCnn => "fedavg-cnn",
    ResnetSmall => "resnet-small",
    CharLstm => "char-lstm"
);

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
    Cnn(Cnn),
    Resnet(Resnet),
    CharLstm(CharLstm),
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
        let image =
            || <[usize; 3]>::try_from(shape).map_err(|_| needs("images, as from the data sets idx: and images:"));
        let (channels, hidden) = (&config.channels, &config.hidden);
        let architecture = match config.model {
            Model::Linear => Architecture::Linear(Linear::new(num_features, of_one_output()?)),
            Model::Mlp => Architecture::Mlp(Mlp::new(num_features, hidden, of_one_output()?)),
            Model::Cnn => {
                let cnn = Cnn::new(image()?, 3, channels, hidden, of_one_output()?);
                let needed = "images with 2 pixels to halve for each of its channels";
                Architecture::Cnn(cnn.ok_or_else(|| needs(needed))?)
            }
            Model::FedavgCnn => {
                let cnn = Cnn::of_fedavg(image()?, of_one_output()?);
                Architecture::Cnn(cnn.ok_or_else(|| needs("images of at least 4 × 4 pixels"))?)
            }
            Model::ResnetSmall => {
                let resnet = Resnet::new(image()?, channels, config.norm, of_one_output()?);
                Architecture::Resnet(resnet.ok_or_else(|| needs("a number of channels for each stage"))?)
            }
            Model::CharLstm => {
                let (&width, layers) = (hidden.first().unwrap_or(&0), hidden.len());
                match task {
                    Task::Steps(_) if width == 0 || hidden.iter().any(|&other| other != width) => {
                        return Err(needs("one or more hidden layers of the same width"));
                    }
                    Task::Steps(tokens) => {
                        Architecture::CharLstm(CharLstm::new(tokens, config.embedding_dim, width, layers))
                    }
                    Task::Classes(_) | Task::Numbers => return Err(needs("texts, as from the data set text:")),
                }
            }
        };
        let declared = match &architecture {
            Architecture::Linear(linear) => linear.declare(),
            Architecture::Mlp(mlp) => mlp.declare(),
            Architecture::Cnn(cnn) => cnn.declare(),
            Architecture::Resnet(resnet) => resnet.declare(),
            Architecture::CharLstm(lstm) => lstm.declare(),
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
            Architecture::Cnn(cnn) => cnn.forward(pass, features),
            Architecture::Resnet(resnet) => resnet.forward(pass, features),
            Architecture::CharLstm(lstm) => lstm.forward(pass, features),
        }
    }
}

#[cfg(test)]
mod tests;
