//! A trainer that costs as little as a trainer can: what is left of a round is the work of rodizio itself.

use std::sync::Arc;

use crate::training::{OnProgress, TrainError, Trainer};
use crate::types::{Metrics, Round};
use crate::weights::{Layout, LayoutMismatch, TensorSpec, Weights};

/// One tensor, to every value of which a round of training adds the same.
#[derive(Clone, Debug)]
pub struct ConstantTrainer {
    weights: Weights,
    step: f32,
}

impl ConstantTrainer {
    /// For so many values. Trainers with different numbers begin with different values and add different constants.
    pub fn new(values: usize, number: u64) -> Self {
        Self { weights: initial_weights(values, number), step: step(number) }
    }

    fn metrics() -> Metrics {
        Metrics { num_examples: 1, ..Metrics::default() }
    }
}

/// One tensor of so many values.
pub fn layout(values: usize) -> Arc<Layout> {
    Arc::new(Layout { tensors: vec![TensorSpec { name: "w".into(), shape: vec![values] }] })
}

/// What the trainer with this number begins with.
pub fn initial_weights(values: usize, number: u64) -> Weights {
    let first = step(number);
    let row = (0..values).map(|i| first + (i % 65_521) as f32 / 65_521.0).collect();
    Weights::new(layout(values), row).expect("as many values as the layout has")
}

/// Squares, whose mean is none of them: a model that is somebody's update would be there without being sent or written.
fn step(number: u64) -> f32 {
    1.0 + (number * number) as f32
}

impl Trainer for ConstantTrainer {
    fn layout(&self) -> Arc<Layout> {
        self.weights.layout().clone()
    }

    fn num_examples(&self) -> u64 {
        1
    }

    fn weights(&self) -> Weights {
        self.weights.clone()
    }

    fn set_weights(&mut self, weights: &Weights) -> Result<(), TrainError> {
        self.swap_weights(&mut weights.clone())
    }

    fn take_weights(&mut self, weights: &mut Weights) {
        std::mem::swap(&mut self.weights, weights);
    }

    fn swap_weights(&mut self, weights: &mut Weights) -> Result<(), TrainError> {
        let (expected, found) = (self.weights.values().len(), weights.values().len());
        if expected != found {
            return Err(LayoutMismatch { expected, found }.into());
        }
        std::mem::swap(&mut self.weights, weights);
        Ok(())
    }

    fn train(&mut self, _: Round, _: &mut OnProgress<'_>) -> Result<Metrics, TrainError> {
        self.weights.values_mut().iter_mut().for_each(|value| *value += self.step);
        Ok(Self::metrics())
    }

    fn evaluate(&mut self) -> Result<Metrics, TrainError> {
        Ok(Self::metrics())
    }
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use super::*;

    #[test]
    fn the_mean_of_several_trainers_is_none_of_their_updates() {
        for trainers in 2..=32u16 {
            let steps: Vec<f32> = (1..=trainers).map(|number| step(number.into())).collect();
            let mean = steps.iter().sum::<f32>() / f32::from(trainers);
            assert!(steps.iter().all(|step| (step - mean).abs() > 0.01), "{trainers}");
        }
    }

    #[test]
    fn a_round_adds_the_constant_to_every_value() {
        let mut trainer = ConstantTrainer::new(3, 1);
        let before = trainer.weights();
        trainer.train(Round(1), &mut |_| ControlFlow::Continue(())).unwrap();
        let after = trainer.weights();
        assert_eq!(after.layout(), before.layout());
        assert!(before.values().iter().zip(after.values()).all(|(before, after)| before + 2.0 == *after));
        assert_ne!(ConstantTrainer::new(3, 0).weights(), before);
    }
}
