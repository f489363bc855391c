//! What strategies ask of local steps: holding weights near those that the round began with, correcting gradients, and
//! counting how far the steps went.

use super::config::{Optimizer, TrainingConfig};

/// Adds to a gradient the proximal term of FedProx, `mu · (w − w_start)` (Li et al. 2020, arXiv 1812.06127, Algorithm 2). All
/// are rows in the layout's order.
pub(super) fn hold(gradient: &mut [f32], mu: f64, weights: &[f32], start: &[f32]) {
    let mu = mu as f32;
    for ((gradient, weight), start) in gradient.iter_mut().zip(weights).zip(start) {
        *gradient += mu * (weight - start);
    }
}

/// Adds the correction of SCAFFOLD to a gradient.
pub(super) fn correct(gradient: &mut [f32], correction: &[f32]) {
    gradient.iter_mut().zip(correction).for_each(|(gradient, correction)| *gradient += correction);
}

/// How far steps went: see [`Trainer::step_sum`](super::Trainer::step_sum).
///
/// A gradient that momentum repeats moves the weights again with each later step. FedNova's `‖a‖₁` (Wang et al. 2020, arXiv
/// 2007.07481, section 4) counts so; here each step is weighted by its learning rate too.
#[derive(Debug)]
pub(super) struct StepSum {
    momentum: f64,
    nesterov: bool,
    /// How many gradients the next step is made of.
    gathered: f64,
    sum: f64,
}

impl StepSum {
    /// Of a round that begins. Adam's steps are counted as plain ones: they have no such measure.
    pub(super) fn new(config: &TrainingConfig) -> Self {
        let momentum = if config.optimizer == Optimizer::Sgd { config.momentum } else { 0.0 };
        Self { momentum, nesterov: config.nesterov && momentum > 0.0, gathered: 0.0, sum: 0.0 }
    }

    /// Another step.
    pub(super) fn step(&mut self, learning_rate: f64) {
        self.gathered = self.momentum * self.gathered + 1.0;
        let gradients = if self.nesterov { 1.0 + self.momentum * self.gathered } else { self.gathered };
        self.sum += learning_rate * gradients;
    }

    /// The sum over all steps so far.
    pub(super) fn sum(&self) -> f64 {
        self.sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(momentum: f64, nesterov: bool, steps: usize) -> f64 {
        let mut sum = StepSum::new(&TrainingConfig { momentum, nesterov, ..TrainingConfig::default() });
        (0..steps).for_each(|_| sum.step(0.5));
        sum.sum()
    }

    #[test]
    fn plain_steps_are_counted() {
        assert_eq!(sum(0.0, false, 4), 2.0);
    }

    #[test]
    fn with_momentum_it_is_fednovas_norm() {
        let (rho, tau) = (0.9f64, 7);
        let norm = (f64::from(tau) - rho * (1.0 - rho.powi(tau)) / (1.0 - rho)) / (1.0 - rho);
        assert!((sum(rho, false, tau as usize) - 0.5 * norm).abs() < 1e-12);
    }

    #[test]
    fn looking_ahead_repeats_each_gradient_once_more() {
        // Two steps: 1 + 0.5, then 1 + 0.5 · (1 + 0.5).
        assert_eq!(sum(0.5, true, 2), 0.5 * (1.5 + 1.75));
    }

    #[test]
    fn weights_are_held_to_where_they_began() {
        let mut gradient = [1.0, 1.0];
        hold(&mut gradient, 0.5, &[3.0, 0.0], &[1.0, 4.0]);
        assert_eq!(gradient, [2.0, -1.0]);
        correct(&mut gradient, &[-2.0, 0.5]);
        assert_eq!(gradient, [0.0, -0.5]);
    }
}
