//! A trainer whose model is arithmetic: small, exact and different for every peer.

use std::sync::Arc;

use crate::aggregation::statistics::{Column, Moments, Summary};
use crate::training::{OnProgress, TrainError, Trainer};
use crate::types::{Digest, Metrics, PeerId, Round};
use crate::weights::{Layout, LayoutMismatch, TensorSpec, Weights};

/// Weights that move halfway to the peer's own target each round, and against a correction if there is one.
///
/// Each peer's inputs have one of a few categories, and there is a weight for each that the founders have.
#[derive(Clone, Debug)]
pub(super) struct ArithmeticTrainer {
    weights: Weights,
    correction: Option<Vec<f32>>,
    target: f32,
    num_examples: u64,
    category: String,
    /// How many weights there are beside those of categories.
    values: usize,
    seed: u64,
}

impl ArithmeticTrainer {
    pub(super) fn new(peer: &PeerId, values: usize, seed: u64) -> Self {
        let lot = Digest::of(peer.as_str().as_bytes()).shared_seed();
        Self {
            weights: initial(values + 1, seed),
            correction: None,
            target: (lot % 1000) as f32 / 1000.0,
            num_examples: 1 + lot % 50,
            category: (lot % 5).to_string(),
            values,
            seed,
        }
    }

    fn set(&mut self, values: Vec<f32>) -> Result<(), LayoutMismatch> {
        self.weights = Weights::new(self.weights.layout().clone(), values)?;
        Ok(())
    }
}

/// So many weights, the same at every peer.
fn initial(values: usize, seed: u64) -> Weights {
    let layout = Arc::new(Layout { tensors: vec![TensorSpec { name: "w".into(), shape: vec![values] }] });
    let initial = (0..values).map(|i| (seed as f32 + i as f32).sin() * 10.0).collect();
    Weights::new(layout, initial).expect("as many values as the layout has")
}

impl Trainer for ArithmeticTrainer {
    fn layout(&self) -> Arc<Layout> {
        self.weights.layout().clone()
    }

    fn num_examples(&self) -> u64 {
        self.num_examples
    }

    fn summary(&self) -> Vec<u8> {
        let moments = Moments { count: self.num_examples, mean: self.target.into(), squares: 0.0 };
        let categories = Column::Categories([(self.category.clone(), self.num_examples)].into());
        Summary { columns: vec![Column::Number(moments), categories] }.encode()
    }

    fn prepare(&mut self, summary: &[u8]) -> Result<(), TrainError> {
        let columns = Summary::decode(summary).map(|summary| summary.columns).unwrap_or_default();
        let Some(Column::Categories(all)) = columns.get(1) else {
            return Err(TrainError::Failed("the summary is not of these inputs".into()));
        };
        let weights = initial(self.values + all.len(), self.seed);
        // After a restart it may have weights of that layout already.
        if weights.layout() != self.weights.layout() {
            self.weights = weights;
        }
        Ok(())
    }

    fn weights(&self) -> Weights {
        self.weights.clone()
    }

    fn set_weights(&mut self, weights: &Weights) -> Result<(), TrainError> {
        Ok(self.set(weights.values().to_vec())?)
    }

    fn train(&mut self, round: Round, _: &mut OnProgress<'_>) -> Result<Metrics, TrainError> {
        let step = 1.0 / (1.0 + round.0 as f32);
        let mut values: Vec<f32> =
            self.weights.values().iter().map(|w| w + (self.target - w) * 0.5 + step * 0.01).collect();
        for (value, correction) in values.iter_mut().zip(self.correction.iter().flatten()) {
            *value -= self.step_sum() as f32 * correction;
        }
        self.set(values)?;
        self.evaluate()
    }

    fn step_sum(&self) -> f64 {
        // Another for every peer, so that who counts them by the wrong name is found out.
        0.25 + self.num_examples as f64 / 100.0
    }

    fn set_correction(&mut self, correction: Option<Vec<f32>>) -> Result<(), TrainError> {
        self.correction = correction;
        Ok(())
    }

    fn evaluate(&mut self) -> Result<Metrics, TrainError> {
        let values = self.weights.values();
        let loss = values.iter().map(|w| f64::from((w - self.target).abs())).sum::<f64>() / values.len() as f64;
        let accuracy = 1.0 / (1.0 + loss);
        Ok(Metrics { num_examples: self.num_examples, loss, accuracy, ..Metrics::default() })
    }
}
