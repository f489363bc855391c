//! Aggregation: updates become the next global model.
//!
//! A new rule is one file here, one variant of [`Rule`] and its arms.

mod fedavg;
pub mod statistics;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::weights::Weights;

/// How updates become the next global model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// The mean weighted by examples: McMahan et al. 2017, *Communication-Efficient Learning of Deep Networks
    /// from Decentralized Data* (arXiv 1602.05629).
    #[default]
    FedAvg,
}

/// One trainer's part in an aggregate.
#[derive(Clone, Copy, Debug)]
pub struct Contribution<'a> {
    /// How many examples the weights were trained on. With 0 the weights count for nothing.
    pub num_examples: u64,
    /// The weights after local training.
    pub weights: &'a Weights,
}

/// A range of one trainer's values: what a rule works on.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// As in [`Contribution`].
    pub num_examples: u64,
    /// The values of the range, after local training.
    pub values: &'a [f32],
}

/// Why contributions have no aggregate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AggregateError {
    /// There was nothing to aggregate.
    #[error("no contribution to aggregate")]
    NoContribution,
    /// A contribution is of another model than the first one.
    #[error("contribution {0} has another layout than the first one")]
    LayoutsDiffer(usize),
    /// Nobody trained on any example, so there is nothing to weight by.
    #[error("the contributions have no examples")]
    NoExamples,
    /// A NaN or an infinity came out, which means that one went in.
    #[error("tensor {0:?} of the aggregate is not finite")]
    NotFinite(String),
}

/// A text that names no [`Rule`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no aggregation rule (known: {known})", known = Rule::ALL.map(Rule::name).join(", "))]
pub struct RuleError(String);

impl Rule {
    /// Every rule, the default first.
    pub const ALL: [Rule; 1] = [Rule::FedAvg];

    /// The name in configurations and logs.
    pub fn name(self) -> &'static str {
        match self {
            Rule::FedAvg => "fedavg",
        }
    }

    /// The global model that `contributions` make.
    ///
    /// A pure function of the contributions *in their order*: floating-point sums depend on it in the last bit.
    /// Give them in [`PeerId`](crate::types::PeerId) order and every peer computes the same bits.
    pub fn aggregate<'a>(self, contributions: &[Contribution<'a>]) -> Result<Weights, AggregateError> {
        let layout = contributions.first().ok_or(AggregateError::NoContribution)?.weights.layout();
        let differs = |c: &Contribution<'a>| !Arc::ptr_eq(c.weights.layout(), layout) && c.weights.layout() != layout;
        if let Some(index) = contributions.iter().position(differs) {
            return Err(AggregateError::LayoutsDiffer(index));
        }
        let mut model = Weights::zeros(Arc::clone(layout));
        let part = |c: &Contribution<'a>| Part { num_examples: c.num_examples, values: c.weights.values() };
        self.aggregate_range(&contributions.iter().map(part).collect::<Vec<_>>(), model.values_mut())?;
        match model.first_non_finite() {
            Some(tensor) => Err(AggregateError::NotFinite(tensor.to_owned())),
            None => Ok(model),
        }
    }

    /// The same for one range of values, of which every part has as many as `model`: whoever goes through a model by
    /// ranges need not have all of every update in memory. Whether the result is finite is for the caller to see.
    ///
    /// # Panics
    /// If a part is shorter than `model`.
    pub fn aggregate_range(self, parts: &[Part<'_>], model: &mut [f32]) -> Result<(), AggregateError> {
        if parts.is_empty() {
            return Err(AggregateError::NoContribution);
        }
        if parts.iter().all(|part| part.num_examples == 0) {
            return Err(AggregateError::NoExamples);
        }
        match self {
            Rule::FedAvg => fedavg::weighted_mean(parts, model),
        }
        Ok(())
    }
}

impl FromStr for Rule {
    type Err = RuleError;
    fn from_str(name: &str) -> Result<Self, RuleError> {
        Self::ALL.into_iter().find(|rule| rule.name() == name).ok_or_else(|| RuleError(name.to_owned()))
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{Layout, TensorSpec};

    fn weights(name: &str, values: &[f32]) -> Weights {
        let tensor = TensorSpec { name: name.into(), shape: vec![values.len()] };
        Weights::new(Arc::new(Layout { tensors: vec![tensor] }), values.to_vec()).unwrap()
    }

    fn aggregate(parts: &[(u64, &Weights)]) -> Result<Weights, AggregateError> {
        let parts: Vec<_> =
            parts.iter().map(|&(num_examples, weights)| Contribution { num_examples, weights }).collect();
        Rule::FedAvg.aggregate(&parts)
    }

    #[test]
    fn a_rule_survives_its_text_and_an_unknown_one_lists_the_known() {
        for rule in Rule::ALL {
            assert_eq!(rule.to_string().parse(), Ok(rule));
            assert_eq!(serde_json::to_value(rule).unwrap(), rule.name());
        }
        let error = "fedavrg".parse::<Rule>().unwrap_err().to_string();
        assert_eq!(error, "\"fedavrg\" is no aggregation rule (known: fedavg)");
    }

    #[test]
    fn contributions_of_two_layouts_are_refused() {
        let (a, b) = (weights("a", &[1.0]), weights("b", &[1.0]));
        assert_eq!(aggregate(&[(1, &a), (1, &a), (1, &b)]), Err(AggregateError::LayoutsDiffer(2)));
    }

    #[test]
    fn equal_layouts_in_two_places_are_one_layout() {
        let (a, b) = (weights("a", &[1.0]), weights("a", &[3.0]));
        assert_eq!(aggregate(&[(1, &a), (1, &b)]).unwrap().values(), [2.0]);
    }

    #[test]
    fn nothing_and_no_examples_have_no_mean() {
        assert_eq!(aggregate(&[]), Err(AggregateError::NoContribution));
        assert_eq!(aggregate(&[(0, &weights("a", &[1.0]))]), Err(AggregateError::NoExamples));
    }

    #[test]
    fn a_value_that_is_not_finite_is_refused_by_its_tensor() {
        let (good, bad) = (weights("a", &[1.0, 1.0]), weights("a", &[1.0, f32::INFINITY]));
        assert_eq!(aggregate(&[(1, &good), (1, &bad)]), Err(AggregateError::NotFinite("a".into())));
    }
}
