//! Models: one file each.
//!
//! A model says what its [`Layout`] is, draws initial values, and turns values into a burn module and back. It keeps
//! PyTorch's names and shapes, so that an exported state dict loads where a PyTorch user expects it to.

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::config::TrainingConfig;
use super::named::named;
use super::random::generator;
use crate::weights::{Layout, Weights};

mod mlp;

use mlp::Mlp;

/// Which model to train.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Model {
    /// Fully connected layers with ReLU between them.
    #[default]
    Mlp,
}

named!(Model, "model", Mlp => "mlp");

/// A model's values on a device, ready to compute.
#[derive(Module, Debug)]
pub(super) enum Network {
    /// See [`Model::Mlp`].
    Mlp(Mlp),
}

impl Network {
    /// Puts `weights`, which have this model's layout, on `device`.
    pub(super) fn load(model: Model, weights: &Weights, device: &Device) -> Self {
        match model {
            Model::Mlp => Self::Mlp(Mlp::load(weights, device)),
        }
    }

    /// Features `[batch, features]` to logits `[batch, classes]`.
    pub(super) fn forward(&self, features: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Mlp(mlp) => mlp.forward(features),
        }
    }

    /// Takes the values back off the device, in the layout's order.
    pub(super) fn values(&self) -> Vec<f32> {
        match self {
            Self::Mlp(mlp) => mlp.values(),
        }
    }
}

/// Initial weights for data of this shape: a function of the configuration alone.
pub(super) fn initial_weights(config: &TrainingConfig, num_features: usize, num_classes: usize) -> Weights {
    let mut rng = generator(&format!("initial weights, seed {}", config.seed));
    let (layout, values) = match config.model {
        Model::Mlp => {
            let layout = mlp::layout(num_features, &config.hidden, num_classes);
            let values = mlp::initial_values(&layout, &mut rng);
            (layout, values)
        }
    };
    into_weights(Arc::new(layout), values)
}

/// Values that came from a network of this very layout.
pub(super) fn into_weights(layout: Arc<Layout>, values: Vec<f32>) -> Weights {
    Weights::new(layout, values).expect("a model yields as many values as its own layout has")
}
