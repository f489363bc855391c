//! Optimisers: how gradients become steps, value by value as PyTorch computes them.
//!
//! They work on the flat row, after everything that changes a gradient. Rows are in `f32`, the few numbers of a step in
//! `f64`.

use std::ops::Range;

use super::config::{Optimizer, TrainingConfig};

/// Adam's decay rates of the first and second moment, and what keeps its quotient finite: the paper's, and PyTorch's.
const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPSILON: f64 = 1e-8;

/// An optimiser and its state, for one round of one peer.
#[derive(Debug)]
pub(super) struct Descent {
    optimizer: Optimizer,
    momentum: f64,
    nesterov: bool,
    weight_decay: f64,
    /// Where the values that have a gradient stand; the others are left alone.
    trainable: Vec<Range<usize>>,
    /// Sgd: the last step. Adam: the first moment.
    first: Vec<f32>,
    /// Adam: the second moment.
    second: Vec<f32>,
    steps: i32,
}

impl Descent {
    /// For rows of `len` values.
    pub(super) fn new(config: &TrainingConfig, trainable: Vec<Range<usize>>, len: usize) -> Self {
        let TrainingConfig { optimizer, momentum, nesterov, weight_decay, .. } = *config;
        let (first, second) = match optimizer {
            Optimizer::Sgd if momentum == 0.0 => (0, 0),
            Optimizer::Sgd => (len, 0),
            Optimizer::Adam | Optimizer::AdamW => (len, len),
        };
        let (first, second) = (vec![0.0; first], vec![0.0; second]);
        Self { optimizer, momentum, nesterov, weight_decay, trainable, first, second, steps: 0 }
    }

    /// Moves `values` by one step against `gradient`.
    pub(super) fn step(&mut self, learning_rate: f64, values: &mut [f32], gradient: &[f32]) {
        self.steps = self.steps.saturating_add(1);
        for range in std::mem::take(&mut self.trainable) {
            let (values, gradient) = (&mut values[range.clone()], &gradient[range.clone()]);
            match self.optimizer {
                Optimizer::Sgd => self.sgd(learning_rate, values, gradient, range.clone()),
                Optimizer::Adam => self.adam(learning_rate, values, gradient, range.clone(), self.weight_decay),
                Optimizer::AdamW => {
                    // Decay that does not pass through the moments (Loshchilov and Hutter, 2019).
                    let kept = (1.0 - learning_rate * self.weight_decay) as f32;
                    values.iter_mut().for_each(|value| *value *= kept);
                    self.adam(learning_rate, values, gradient, range.clone(), 0.0);
                }
            }
            self.trainable.push(range);
        }
    }

    fn sgd(&mut self, learning_rate: f64, values: &mut [f32], gradient: &[f32], range: Range<usize>) {
        let (rate, momentum, decay) = (learning_rate as f32, self.momentum as f32, self.weight_decay as f32);
        if self.first.is_empty() {
            let step = |(value, &slope): (&mut f32, &f32)| *value -= rate * (slope + decay * *value);
            return values.iter_mut().zip(gradient).for_each(step);
        }
        // PyTorch's form, undampened: the velocity holds gradients, not steps, so that a new rate acts at once.
        let nesterov = self.nesterov;
        for ((value, &slope), velocity) in values.iter_mut().zip(gradient).zip(&mut self.first[range]) {
            let slope = slope + decay * *value;
            *velocity = momentum * *velocity + slope;
            *value -= rate * if nesterov { slope + momentum * *velocity } else { *velocity };
        }
    }

    fn adam(&mut self, rate: f64, values: &mut [f32], gradient: &[f32], range: Range<usize>, decay: f64) {
        let (b1, b2, decay) = (BETA1 as f32, BETA2 as f32, decay as f32);
        let (rest1, rest2) = ((1.0 - BETA1) as f32, (1.0 - BETA2) as f32); // in f32 the difference would lose 3 digits
        // Both moments start at 0: each is divided by the share of the past that it has seen.
        let rate = (rate / (1.0 - BETA1.powi(self.steps))) as f32;
        let scale = (1.0 / (1.0 - BETA2.powi(self.steps)).sqrt()) as f32;
        let moments = self.first[range.clone()].iter_mut().zip(&mut self.second[range]);
        for ((value, &slope), (mean, square)) in values.iter_mut().zip(gradient).zip(moments) {
            let slope = slope + decay * *value;
            *mean = b1 * *mean + rest1 * slope;
            *square = b2 * *square + rest2 * slope * slope;
            *value -= rate * *mean / (square.sqrt() * scale + EPSILON as f32);
        }
    }
}

/// Shortens `gradient` to a Euclidean norm of `max_norm` if it is longer (Pascanu, Mikolov and Bengio, 2013).
pub(super) fn clip_norm(gradient: &mut [f32], max_norm: f64) {
    let norm = gradient.iter().map(|&slope| f64::from(slope).powi(2)).sum::<f64>().sqrt();
    if norm > max_norm {
        let factor = (max_norm / norm) as f32;
        gradient.iter_mut().for_each(|slope| *slope *= factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three steps from (1, -2) with the gradient (w0, 3 w1) of a bowl; the third value is a buffer.
    fn walked(config: &TrainingConfig) -> Vec<f32> {
        let mut values = vec![1.0, -2.0, 7.0];
        let mut descent = Descent::new(config, vec![0..2], 3);
        for _ in 0..3 {
            let gradient = [values[0], 3.0 * values[1], 5.0];
            descent.step(config.learning_rate, &mut values, &gradient);
        }
        values
    }

    fn assert_walk(config: &TrainingConfig, expected: [f32; 2]) {
        let values = walked(config);
        let near = values.iter().zip(expected).all(|(value, expected)| (value - expected).abs() < 2e-6);
        assert!(near && values[2] == 7.0, "{values:?} against {expected:?}");
    }

    #[test]
    fn steps_are_those_of_torch_optim() {
        // Measured with PyTorch 2.15: three steps of torch.optim.{SGD, Adam, AdamW} on w0²/2 + 3 w1²/2 from (1, -2).
        let sgd = TrainingConfig { learning_rate: 0.1, momentum: 0.0, ..Default::default() };
        let heavy = TrainingConfig { momentum: 0.9, weight_decay: 0.05, ..sgd.clone() };
        let nesterov = TrainingConfig { nesterov: true, ..heavy.clone() };
        let adam = TrainingConfig { optimizer: Optimizer::Adam, learning_rate: 0.1, weight_decay: 0.05, ..sgd.clone() };
        let adamw = TrainingConfig { optimizer: Optimizer::AdamW, ..adam.clone() };
        assert_walk(&sgd, WALKS[0]);
        assert_walk(&heavy, WALKS[1]);
        assert_walk(&nesterov, WALKS[2]);
        assert_walk(&adam, WALKS[3]);
        assert_walk(&adamw, WALKS[4]);
    }

    const WALKS: [[f32; 2]; 5] =
        [[0.729, -0.686], [0.4627123, 0.5858052], [0.3002506, 0.7115222], [0.7015863, -1.700623], [0.68827, -1.672348]];

    #[test]
    fn a_gradient_is_shortened_and_never_stretched() {
        let mut gradient = [3.0, 4.0];
        clip_norm(&mut gradient, 10.0);
        assert_eq!(gradient, [3.0, 4.0]);
        clip_norm(&mut gradient, 0.5);
        assert!((gradient[0] - 0.3).abs() < 1e-6 && (gradient[1] - 0.4).abs() < 1e-6);
    }
}
