//! Training: what a node asks of a model and its data.

use std::ops::ControlFlow;
use std::sync::Arc;

use crate::types::{Metrics, Round};
use crate::weights::{Layout, LayoutMismatch, Weights};

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
    /// Weights of another model.
    #[error(transparent)]
    Layout(#[from] LayoutMismatch),
    /// The progress callback asked to stop.
    #[error("training was stopped")]
    Stopped,
    /// Anything else, as a sentence.
    #[error("{0}")]
    Failed(String),
}

/// One peer's model and data: all that a node needs of training.
///
/// A trainer starts with its initial weights; the peer that founds a federation sends its own to all.
pub trait Trainer: Send {
    /// Names and shapes of the weights.
    fn layout(&self) -> Arc<Layout>;

    /// How many training examples this peer has: its weight in the mean.
    fn num_examples(&self) -> u64;

    /// The current weights.
    fn weights(&self) -> Weights;

    /// Replaces the current weights.
    fn set_weights(&mut self, weights: &Weights) -> Result<(), TrainError>;

    /// Trains the current weights on local data for one round; returns the metrics over the training examples.
    ///
    /// The result is a function of weights, data, seed and `round` alone: a round trained again gives the same bits.
    fn train(&mut self, round: Round, on_progress: &mut OnProgress<'_>) -> Result<Metrics, TrainError>;

    /// Measures the current weights on held-out data.
    fn evaluate(&mut self) -> Result<Metrics, TrainError>;
}
