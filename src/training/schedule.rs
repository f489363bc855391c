//! How the learning rate changes from round to round.
//!
//! It changes between rounds and not within one, so that all peers train a round at one rate, whatever they have of data.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use super::config::TrainingConfig;
use super::named::named;
use crate::types::Round;

/// How the learning rate changes over the rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Schedule {
    /// Not at all.
    #[default]
    Constant,
    /// Multiplied by `schedule_gamma` after every `schedule_rounds` rounds.
    Step,
    /// Multiplied by `schedule_gamma` after every round.
    Exponential,
    /// Down half a cosine wave that would reach 0 after the last of `rounds` (Loshchilov and Hutter, 2017).
    Cosine,
}

named!(
    Schedule, "schedule",
    Constant => "constant",
    Step => "step",
    Exponential => "exponential",
    Cosine => "cosine"
);

impl TrainingConfig {
    /// The learning rate of a round. Before the schedule begins it rises linearly over `warmup_rounds`.
    pub(super) fn learning_rate_in(&self, round: Round) -> f64 {
        let done = round.0.saturating_sub(1); // rounds count from 1
        if done < self.warmup_rounds {
            return self.learning_rate * (done + 1) as f64 / (self.warmup_rounds + 1) as f64;
        }
        let done = done - self.warmup_rounds;
        let factor = match self.schedule {
            Schedule::Constant => 1.0,
            Schedule::Step => self.schedule_gamma.powf((done / self.schedule_rounds.max(1)) as f64),
            Schedule::Exponential => self.schedule_gamma.powf(done as f64),
            Schedule::Cosine => {
                let total = self.rounds.saturating_sub(self.warmup_rounds).max(1);
                (1.0 + (PI * done.min(total) as f64 / total as f64).cos()) / 2.0
            }
        };
        self.learning_rate * factor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates<const N: usize>(config: &TrainingConfig) -> [f64; N] {
        std::array::from_fn(|index| config.learning_rate_in(Round(index as u64 + 1)))
    }

    fn assert_near(rates: &[f64], expected: &[f64]) {
        let near = rates.iter().zip(expected).all(|(rate, expected)| (rate - expected).abs() < 1e-12);
        assert!(near, "{rates:?} against {expected:?}");
    }

    #[test]
    fn each_schedule_falls_as_it_says() {
        let base = TrainingConfig { learning_rate: 0.8, schedule_gamma: 0.5, schedule_rounds: 2, ..Default::default() };
        let of = |schedule| TrainingConfig { schedule, rounds: 4, ..base.clone() };
        assert_near(&rates::<3>(&of(Schedule::Constant)), &[0.8, 0.8, 0.8]);
        assert_near(&rates::<5>(&of(Schedule::Step)), &[0.8, 0.8, 0.4, 0.4, 0.2]);
        assert_near(&rates::<3>(&of(Schedule::Exponential)), &[0.8, 0.4, 0.2]);
        let half = 0.8 * 0.5;
        let quarter = 0.8 * (1.0 + 0.5f64.sqrt()) / 2.0;
        assert_near(&rates::<4>(&of(Schedule::Cosine)), &[0.8, quarter, half, 0.8 - quarter]);
        assert!(rates::<9>(&of(Schedule::Cosine)).iter().all(|rate| (0.0..=0.8).contains(rate)));
    }

    #[test]
    fn a_warmup_comes_before_the_schedule() {
        let config = TrainingConfig {
            learning_rate: 0.6,
            schedule: Schedule::Exponential,
            schedule_gamma: 0.5,
            warmup_rounds: 2,
            ..Default::default()
        };
        assert_near(&rates::<5>(&config), &[0.2, 0.4, 0.6, 0.3, 0.15]);
    }
}
