//! Training: what a node asks of a model and its data.
//!
//! [`Trainer`] is the whole of it. [`BurnTrainer`] is the implementation at hand: a [`Model`] in burn, trained on a
//! [`Dataset`] as a [`TrainingConfig`] says. [`Partition`] shares one data set out among the peers of one machine;
//! [`export`] writes and reads safetensors files. burn appears in this floor alone.

use std::ops::ControlFlow;
use std::sync::Arc;

use crate::types::{Metrics, Round};
use crate::weights::{Layout, LayoutMismatch, Weights};

mod augment;
mod burn_trainer;
mod config;
pub mod cores;
mod dataset;
mod drift;
pub mod export;
pub mod external;
mod loss;
mod metrics;
mod models;
pub mod modules;
mod named;
mod optimizer;
mod partition;
mod random;
mod schedule;

pub use augment::Augment;
pub use burn_trainer::BurnTrainer;
pub use config::{Backend, Norm, Optimizer, SettingError, TrainingConfig};
pub use dataset::{
    CATEGORIES, COLUMN, Column, DataError, Dataset, Examples, ReadError, ReadOptions, Seen, Source, Table, Targets,
    Task, Train,
};
pub use models::{Model, ModelError};
pub use named::UnknownName;
pub use partition::{EXAMPLES_MIN, Partition, PartitionError, PartitionOptions, histogram};
pub use schedule::Schedule;

/// How far local training has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Batches done in this round.
    pub done: u64,
    /// Batches of the whole round.
    pub total: u64,
}

/// Called after every batch; `Break` asks the trainer to stop early (the round is over without it).
pub type OnProgress<'a> = dyn FnMut(Progress) -> ControlFlow<()> + 'a;

/// Why a trainer could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Values that do not fit their own layout.
    #[error(transparent)]
    Layout(#[from] LayoutMismatch),
    /// Weights of another model.
    #[error("the weights are of another model: it has {given} where this one has {here}")]
    OtherModel {
        /// The first tensor that differs, as this trainer's model has it.
        here: String,
        /// What the weights have in its place.
        given: String,
    },
    /// A model to start from that does not fit the data of all peers.
    #[error("the model to start from (init) does not fit the data: it has {given} where {here} is needed")]
    Start {
        /// The first tensor that differs, as the data ask for it.
        here: String,
        /// What the model has in its place.
        given: String,
    },
    /// A setting that makes no sense.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// A model that cannot learn from the data.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Examples that the model cannot learn from.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A program that is to train and cannot be started.
    #[error("cannot start the trainer program {program:?}: {why}")]
    Program {
        /// As it is named.
        program: String,
        /// Why not.
        why: String,
    },
    /// The progress callback asked to stop.
    #[error("training was stopped")]
    Stopped,
    /// Anything else, as a sentence.
    #[error("{0}")]
    Failed(String),
}

/// What a model's inputs and outputs are called; empty where they have no names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// The features.
    pub features: Vec<String>,
    /// The classes.
    pub classes: Vec<String>,
}

/// One peer's model and data: all that a node needs of training.
///
/// A trainer starts with its initial weights; the peer that founds a federation sends its own to all.
pub trait Trainer: Send {
    /// Names and shapes of the weights. Worth saying in another way where [`weights`](Self::weights) copies much. Where
    /// there is a [`summary`](Self::summary), they are what is believed until the trainer is [prepared](Self::prepare).
    fn layout(&self) -> Arc<Layout> {
        self.weights().layout().clone()
    }

    /// How many training examples this peer has: its weight in the mean.
    fn num_examples(&self) -> u64;

    /// What this peer's inputs are like, for all peers to know what all inputs are like: an encoded
    /// [`Summary`](crate::aggregation::statistics::Summary), or nothing where inputs are used as they are.
    fn summary(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes the summary of all founders' inputs, which may decide the [`layout`](Self::layout): the same at every peer. It
    /// comes before anything is computed, and again after a restart; not at all where it is empty.
    ///
    /// # Errors
    /// If this peer's own examples do not fit it, as those of one that came later may not: it cannot take part.
    fn prepare(&mut self, _summary: &[u8]) -> Result<(), TrainError> {
        Ok(())
    }

    /// What inputs and outputs are called, if they have names; asked once the trainer is prepared.
    fn names(&self) -> Names {
        Names::default()
    }

    /// The current weights.
    fn weights(&self) -> Weights;

    /// Replaces the current weights; refuses those of another layout.
    fn set_weights(&mut self, weights: &Weights) -> Result<(), TrainError>;

    /// Makes `weights`, which are of this layout, the current weights, after training. A trainer that can do so without new
    /// memory should, or without a copy: its own may be anything then, until they are set again.
    fn take_weights(&mut self, weights: &mut Weights) {
        *weights = self.weights();
    }

    /// As [`set_weights`](Self::set_weights), where `weights` may be anything afterwards: those that the trainer had, so that
    /// nothing is copied.
    fn swap_weights(&mut self, weights: &mut Weights) -> Result<(), TrainError> {
        self.set_weights(weights)
    }

    /// Trains the current weights on local data for one round; returns the metrics over the training examples.
    ///
    /// The result is a function of weights, data, seed and `round` alone: a round trained again gives the same bits.
    /// After an error the weights are what they were before.
    fn train(&mut self, round: Round, on_progress: &mut OnProgress<'_>) -> Result<Metrics, TrainError>;

    /// The learning rates of all steps of the last [`train`](Self::train), each as often as momentum repeated its step's
    /// gradient: the weights moved by a mean of gradients times this. Strategies `fednova` and `scaffold` ask for it.
    ///
    /// A trainer that does not count its steps says 1, as if every peer made as many.
    fn step_sum(&self) -> f64 {
        1.0
    }

    /// What is added to every gradient from now on: one value for each of the weights', whose order they have, or nothing.
    /// Strategy `scaffold` corrects the drift of peers by it.
    ///
    /// # Errors
    /// If the trainer cannot do so, which is the default, or the values are not as many as its weights.
    fn set_correction(&mut self, correction: Option<Vec<f32>>) -> Result<(), TrainError> {
        match correction {
            None => Ok(()),
            Some(_) => Err(TrainError::Failed(
                "strategy scaffold corrects gradients, and this trainer has none: choose another strategy".into(),
            )),
        }
    }

    /// Measures the current weights on held-out data. Without any, all metrics are 0.
    fn evaluate(&mut self) -> Result<Metrics, TrainError>;
}

/// What every trainer refuses: weights of another layout, told by the first tensor that differs.
fn check_layout(here: &Layout, given: &Layout) -> Result<(), TrainError> {
    if here == given {
        return Ok(());
    }
    let differ = |&index: &usize| here.tensors.get(index) != given.tensors.get(index);
    let first = (0..here.tensors.len().max(given.tensors.len())).find(differ).unwrap_or(0);
    let describe = |layout: &Layout| match layout.tensors.get(first) {
        Some(tensor) => format!("{} {:?}", tensor.name, tensor.shape),
        None => "no further tensor".into(),
    };
    Err(TrainError::OtherModel { here: describe(here), given: describe(given) })
}
