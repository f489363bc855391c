//! Aggregation: updates become the next global model.
//!
//! A [`Strategy`] is a [`Rule`], which makes one model of the updates, and a [`ServerOptimizer`], which makes a step from the
//! parent model to it. A new rule is one file here, one variant of [`Rule`] and its arms.
//!
//! # What a model's blob holds
//!
//! What a strategy remembers from round to round stands behind the model in the same blob, section by section ([`Section`]):
//! it is so decided, pulled, verified, kept and served with the model, and the next leader has it, whoever that is.
//!
//! # Ranges
//!
//! An aggregation goes through the updates by ranges of values, so that none is in memory as a whole: once more before if the
//! rule needs to know something of whole updates ([`Inspection`]), then once for each section ([`Aggregation::fill`]). Every
//! sum has one order, so the result has the same bits wherever it is computed, and does not depend on the ranges (which begin
//! at multiples of 512 values).

mod bulyan;
mod fedavg;
mod fednova;
mod krum;
mod mean;
mod median;
mod norm_clip;
mod optimizer;
mod scaffold;
pub mod statistics;
mod strategy;
mod survey;
mod trimmed_mean;

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::weights::{Layout, Weights};
use krum::Distances;
use optimizer::Point;
use survey::Survey;

pub use optimizer::{Method, MethodError, ServerOptimizer};
pub use scaffold::{advance_control, common_control};
pub use strategy::{Parameters, Section, Strategy, StrategyError};

/// The smallest and the largest [`Share::step_sum`] that a leader accepts: beyond them only a mistake or malice lies.
pub const STEP_SUMS: std::ops::RangeInclusive<f64> = 1e-9..=1e9;

/// How several models become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// The mean weighted by examples: McMahan et al. 2017 (arXiv 1602.05629).
    #[default]
    FedAvg,
    /// The mean of directions, normalised by local steps: Wang et al. 2020 (arXiv 2007.07481).
    FedNova,
    /// The plain mean, and control variates: Karimireddy et al. 2020 (arXiv 1910.06378).
    Scaffold,
    /// The median of each value: Yin et al. 2018 (arXiv 1803.01498).
    Median,
    /// The mean of each value without the smallest and the largest: Yin et al. 2018 (arXiv 1803.01498).
    TrimmedMean {
        /// Which share is left out at either end, 0 to below 0.5.
        trim: f64,
    },
    /// The update that is nearest to its neighbours: Blanchard et al. 2017 (NeurIPS 30).
    Krum {
        /// How many updates may be bad.
        byzantine: usize,
    },
    /// The mean of the updates that are nearest to their neighbours: Blanchard et al. 2017 (NeurIPS 30).
    MultiKrum {
        /// How many updates may be bad.
        byzantine: usize,
    },
    /// A trimmed mean of Krum's choices: El Mhamdi et al. 2018 (arXiv 1802.07927).
    Bulyan {
        /// How many updates may be bad.
        byzantine: usize,
    },
    /// The mean of differences that are shortened to a norm: Sun et al. 2019 (arXiv 1911.07963).
    NormClip {
        /// The longest norm; `None`: the median of the round's norms.
        norm: Option<f64>,
    },
}

/// What an update says of itself beside its values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// How many examples it was trained on. With 0 it counts for nothing.
    pub num_examples: u64,
    /// The learning rates of all its steps, each as often as momentum repeated the step's gradient: the difference from the
    /// parent is a mean of gradients times this. See [`STEP_SUMS`].
    pub step_sum: f64,
}

impl Share {
    /// So many examples, and one step.
    pub fn of(num_examples: u64) -> Self {
        Self { num_examples, step_sum: 1.0 }
    }
}

/// One trainer's part in an aggregate.
#[derive(Clone, Copy, Debug)]
pub struct Contribution<'a> {
    /// What the update says of itself.
    pub share: Share,
    /// The update, in [the strategy's layout](Strategy::update_layout).
    pub weights: &'a Weights,
}

/// A range of one trainer's values: what a rule works on.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// What the update says of itself.
    pub share: Share,
    /// The values of the range, after local training.
    pub values: &'a [f32],
}

/// The same range of every section of the parent's blob. Those that the strategy does not have are empty.
#[derive(Clone, Copy, Debug, Default)]
pub struct Parent<'a> {
    /// [`Section::Model`].
    pub model: &'a [f32],
    /// [`Section::Momentum`].
    pub momentum: &'a [f32],
    /// [`Section::SecondMoment`].
    pub second_moment: &'a [f32],
    /// [`Section::Control`].
    pub control: &'a [f32],
}

impl<'a> Parent<'a> {
    /// Sets the range of one section.
    pub fn set(&mut self, section: Section, values: &'a [f32]) {
        match section {
            Section::Model => self.model = values,
            Section::Momentum => self.momentum = values,
            Section::SecondMoment => self.second_moment = values,
            Section::Control => self.control = values,
        }
    }
}

/// Why contributions have no aggregate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AggregateError {
    /// There was nothing to aggregate.
    #[error("no contribution to aggregate")]
    NoContribution,
    /// A contribution is of another model.
    #[error("contribution {0} has another layout than this strategy's updates of the model")]
    LayoutsDiffer(usize),
    /// Nobody trained on any example, so there is nothing to weight by.
    #[error("the contributions have no examples")]
    NoExamples,
    /// A NaN or an infinity came out, which means that one went in.
    #[error("tensor {0:?} of the aggregate is not finite")]
    NotFinite(String),
}

impl Rule {
    /// The name in configurations and logs.
    pub fn name(self) -> &'static str {
        match self {
            Rule::FedAvg => "fedavg",
            Rule::FedNova => "fednova",
            Rule::Scaffold => "scaffold",
            Rule::Median => "median",
            Rule::TrimmedMean { .. } => "trimmed-mean",
            Rule::Krum { .. } => "krum",
            Rule::MultiKrum { .. } => "multi-krum",
            Rule::Bulyan { .. } => "bulyan",
            Rule::NormClip { .. } => "norm-clip",
        }
    }

    /// The fewest updates of which bad ones among them are kept from the model, as the rule's paper proves. With fewer it
    /// does what it can.
    ///
    /// A median, a trimmed mean and a median of norms ask for three: of two updates nobody can tell which is bad.
    pub fn updates_proven(self) -> usize {
        match self {
            Rule::Krum { byzantine } | Rule::MultiKrum { byzantine } => byzantine.saturating_mul(2).saturating_add(3),
            Rule::Bulyan { byzantine } => byzantine.saturating_mul(4).saturating_add(3),
            Rule::TrimmedMean { trim } if trim > 0.0 => 3,
            Rule::Median | Rule::NormClip { norm: None } => 3,
            _ => 1,
        }
    }

    fn reads_parent(self) -> bool {
        matches!(self, Rule::FedNova | Rule::Scaffold | Rule::NormClip { .. })
    }
}

/// How the values of the updates become one.
#[derive(Clone, Debug)]
enum Combination {
    /// The sum of updates and parent, each with its factor.
    Linear { parent: f64, factors: Vec<f64> },
    /// The median.
    Median,
    /// The mean without so many at either end.
    Trimmed(usize),
    /// Of these updates, the mean of as many as are nearest to the median.
    NearMedian { chosen: Vec<usize>, kept: usize },
}

impl Combination {
    /// A sum whose factors add up to 1 with the parent's.
    fn from_parent(factors: Vec<f64>) -> Self {
        Combination::Linear { parent: 1.0 - factors.iter().sum::<f64>(), factors }
    }

    fn mean_of(chosen: &[usize], updates: usize) -> Self {
        let factor = |update| if chosen.contains(&update) { 1.0 / chosen.len() as f64 } else { 0.0 };
        Combination::Linear { parent: 0.0, factors: (0..updates).map(factor).collect() }
    }

    fn combine(&self, parts: &[Part<'_>], parent: &[f32], model: &mut [f32]) {
        match self {
            Combination::Linear { parent: factor, factors } => {
                mean::weighted_sum(factors, parts, (*factor, parent), model);
            }
            Combination::Median => by_value(parts, model, median::median),
            Combination::Trimmed(cut) => by_value(parts, model, |sorted| trimmed_mean::trimmed_mean(sorted, *cut)),
            Combination::NearMedian { chosen, kept } => {
                let parts: Vec<_> = chosen.iter().filter_map(|update| parts.get(*update)).copied().collect();
                by_value(&parts, model, |sorted| bulyan::near_median(sorted, *kept));
            }
        }
    }
}

/// Makes each value of the sorted values of all parts.
fn by_value(parts: &[Part<'_>], model: &mut [f32], make: impl Fn(&[f32]) -> f64) {
    let mut column = vec![0.0f32; parts.len()];
    for (place, value) in model.iter_mut().enumerate() {
        for (entry, part) in column.iter_mut().zip(parts) {
            *entry = part.values[place];
        }
        column.sort_unstable_by(f32::total_cmp);
        *value = make(&column) as f32;
    }
}

/// An aggregation that begins: the look at whole updates that some rules need.
#[derive(Debug)]
pub struct Inspection {
    strategy: Strategy,
    shares: Vec<Share>,
    buffers: Vec<Range<usize>>,
    survey: Option<Survey>,
}

impl Inspection {
    /// Of updates with these shares, in [`PeerId`](crate::types::PeerId) order, of a model of `layout`.
    pub fn new(strategy: Strategy, layout: &Layout, shares: Vec<Share>) -> Result<Self, AggregateError> {
        if shares.is_empty() {
            return Err(AggregateError::NoContribution);
        }
        if shares.iter().all(|share| share.num_examples == 0) {
            return Err(AggregateError::NoExamples);
        }
        let survey = match strategy.rule {
            Rule::Krum { .. } | Rule::MultiKrum { .. } | Rule::Bulyan { .. } => Some(Survey::distances(shares.len())),
            Rule::NormClip { .. } => Some(Survey::norms(shares.len())),
            _ => None,
        };
        Ok(Self { strategy, shares, buffers: layout.buffers(), survey })
    }

    /// Whether [`look`](Self::look) must go through the whole of the updates' models before [`decide`](Self::decide).
    pub fn is_needed(&self) -> bool {
        self.survey.is_some()
    }

    /// Takes the next range of every update's model, and of the parent's.
    pub fn look(&mut self, parts: &[Part<'_>], parent: &[f32]) {
        if let Some(survey) = &mut self.survey {
            survey.look(parts, parent);
        }
    }

    /// How the updates are combined, now that all of them was seen.
    pub fn decide(self) -> Aggregation {
        let Self { strategy, shares, buffers, survey } = self;
        let (distances, norms) = match survey {
            Some(Survey::Distances(pairs)) => (Distances::new(shares.len(), pairs), Vec::new()),
            Some(Survey::Norms(norms)) => (Distances::new(0, Vec::new()), norms),
            None => (Distances::new(0, Vec::new()), Vec::new()),
        };
        let updates = shares.len();
        let combination = match strategy.rule {
            Rule::FedAvg => Combination::Linear { parent: 0.0, factors: fedavg::factors(&shares) },
            Rule::FedNova => Combination::from_parent(fednova::factors(&shares)),
            Rule::Scaffold => Combination::mean_of(&(0..updates).collect::<Vec<_>>(), updates),
            Rule::Median => Combination::Median,
            Rule::TrimmedMean { trim } => Combination::Trimmed(trimmed_mean::cut(updates, trim)),
            Rule::Krum { byzantine } => Combination::mean_of(&krum::krum(&distances, byzantine), updates),
            Rule::MultiKrum { byzantine } => Combination::mean_of(&krum::multi_krum(&distances, byzantine), updates),
            Rule::Bulyan { byzantine } => {
                let chosen = bulyan::choice(&distances, updates, byzantine);
                let kept = bulyan::kept(chosen.len(), byzantine);
                Combination::NearMedian { chosen, kept }
            }
            Rule::NormClip { norm } => Combination::from_parent(norm_clip::factors(&shares, &norms, norm)),
        };
        // A sum that leaves the range of its inputs could make a variance negative.
        let of_buffers = (strategy.rule == Rule::FedNova)
            .then(|| Combination::Linear { parent: 0.0, factors: fedavg::factors(&shares) });
        Aggregation { strategy, buffers, combination, of_buffers }
    }
}

/// An aggregation whose every value can be computed.
#[derive(Debug)]
pub struct Aggregation {
    strategy: Strategy,
    buffers: Vec<Range<usize>>,
    combination: Combination,
    /// How buffers are combined, if not as the parameters are.
    of_buffers: Option<Combination>,
}

impl Aggregation {
    /// Fills `out` with a range of one section of the new blob, which begins at value `start` of the section.
    ///
    /// `parts` are the same range of the updates: of their models, and for [`Section::Control`] of what stands behind them.
    /// Whether the result is finite is for the caller to see.
    ///
    /// # Panics
    /// If a part, or a section of the parent that the strategy has, is shorter than `out`.
    pub fn fill(&self, section: Section, start: usize, parts: &[Part<'_>], parent: &Parent<'_>, out: &mut [f32]) {
        if section == Section::Control {
            for (place, value) in out.iter_mut().enumerate() {
                let brought: f64 = parts.iter().map(|part| f64::from(part.values[place])).sum();
                *value = (f64::from(parent.control[place]) + brought) as f32;
            }
            return;
        }
        self.combination.combine(parts, parent.model, out);
        let buffers = self.buffers_within(start, out.len());
        if let Some(combination) = &self.of_buffers {
            for buffer in &buffers {
                let parts: Vec<_> =
                    parts.iter().map(|part| Part { values: &part.values[buffer.clone()], ..*part }).collect();
                combination.combine(&parts, &[], &mut out[buffer.clone()]);
            }
        }
        if !self.strategy.optimizer.is_identity() {
            self.optimize(section, parent, &buffers, out);
        }
    }

    /// Makes the optimiser's step from the parent to the aggregate in `out`. Buffers are no parameters: they are set.
    fn optimize(&self, section: Section, parent: &Parent<'_>, buffers: &[Range<usize>], out: &mut [f32]) {
        let kept: Vec<Vec<f32>> = buffers.iter().map(|buffer| out[buffer.clone()].to_vec()).collect();
        let state = |values: &[f32], place: usize| values.get(place).copied().map_or(0.0, f64::from);
        for (place, out) in out.iter_mut().enumerate() {
            let from = Point {
                value: f64::from(parent.model[place]),
                momentum: state(parent.momentum, place),
                second_moment: state(parent.second_moment, place),
            };
            let to = self.strategy.optimizer.step(from, f64::from(*out));
            *out = match section {
                Section::Momentum => to.momentum as f32,
                Section::SecondMoment => to.second_moment as f32,
                Section::Model | Section::Control => to.value as f32,
            };
        }
        for (buffer, kept) in buffers.iter().zip(kept) {
            match section {
                Section::Model => out[buffer.clone()].copy_from_slice(&kept),
                _ => out[buffer.clone()].fill(0.0),
            }
        }
    }

    /// Where buffers lie in a range of so many values that begins at `start`.
    fn buffers_within(&self, start: usize, len: usize) -> Vec<Range<usize>> {
        let inside = |buffer: &Range<usize>| {
            let clip = |at: usize| at.saturating_sub(start).min(len);
            clip(buffer.start)..clip(buffer.end)
        };
        self.buffers.iter().map(inside).filter(|range| !range.is_empty()).collect()
    }
}

impl Strategy {
    /// The blob of the next model, of what this strategy's updates brought to `parent`.
    ///
    /// `layout` is the model's own. A pure function of the arguments *in their order*: floating-point sums depend on it in the
    /// last bit. Give contributions in [`PeerId`](crate::types::PeerId) order and every peer computes the same bits.
    pub fn aggregate(
        &self,
        layout: &Arc<Layout>,
        parent: &Weights,
        contributions: &[Contribution<'_>],
    ) -> Result<Weights, AggregateError> {
        let (of_updates, of_models) = (self.update_layout(layout), self.model_layout(layout));
        let differs = |c: &Contribution<'_>| !same(c.weights.layout(), &of_updates);
        if let Some(index) = contributions.iter().position(differs) {
            return Err(AggregateError::LayoutsDiffer(index));
        }
        let len = layout.len();
        // The updates' models (0), and what stands behind them (1).
        let parts = |half: usize| {
            let range = half * len..half * len + len;
            contributions.iter().map(move |c| Part { share: c.share, values: &c.weights.values()[range.clone()] })
        };
        let shares = contributions.iter().map(|c| c.share).collect();
        let mut inspection = Inspection::new(*self, layout, shares)?;
        let mut before = Parent::default();
        for (section, values) in self.sections().zip(parent.values().chunks(len.max(1))) {
            before.set(section, values);
        }
        inspection.look(&parts(0).collect::<Vec<_>>(), before.model);
        let aggregation = inspection.decide();
        let mut model = Weights::zeros(of_models);
        for (section, out) in self.sections().zip(model.values_mut().chunks_mut(len.max(1))) {
            let half = usize::from(section == Section::Control);
            aggregation.fill(section, 0, &parts(half).collect::<Vec<_>>(), &before, out);
        }
        match model.first_non_finite() {
            Some(tensor) => Err(AggregateError::NotFinite(tensor.to_owned())),
            None => Ok(model),
        }
    }
}

fn same(left: &Arc<Layout>, right: &Arc<Layout>) -> bool {
    Arc::ptr_eq(left, right) || left == right
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::TensorSpec;

    fn weights(name: &str, values: &[f32]) -> Weights {
        let tensor = TensorSpec { name: name.into(), shape: vec![values.len()] };
        Weights::new(Arc::new(Layout { tensors: vec![tensor] }), values.to_vec()).unwrap()
    }

    fn named(name: &str) -> Strategy {
        Strategy::named(name, &Parameters::default()).unwrap()
    }

    /// The aggregate of updates of a model that was all zeros.
    fn aggregate(strategy: Strategy, parts: &[(u64, &Weights)]) -> Result<Weights, AggregateError> {
        let layout = parts.first().map_or_else(|| weights("a", &[0.0]).layout().clone(), |(_, w)| w.layout().clone());
        let parts: Vec<_> = parts.iter().map(|&(n, weights)| Contribution { share: Share::of(n), weights }).collect();
        let parent = strategy.initial(Weights::zeros(layout.clone()));
        strategy.aggregate(&layout, &parent, &parts)
    }

    /// Five updates of two values, the fourth of which is bad.
    fn five() -> Vec<Weights> {
        [[1.0, 5.0], [2.0, 4.0], [3.0, 3.0], [900.0, -900.0], [4.0, 1.0]].map(|values| weights("a", &values)).to_vec()
    }

    fn of_five(strategy: Strategy) -> Vec<f32> {
        let updates = five();
        let parts: Vec<_> = updates.iter().map(|update| (1, update)).collect();
        aggregate(strategy, &parts).unwrap().into_values()
    }

    #[test]
    fn contributions_of_two_layouts_are_refused() {
        let (a, b) = (weights("a", &[1.0]), weights("b", &[1.0]));
        let refused = aggregate(Strategy::default(), &[(1, &a), (1, &a), (1, &b)]);
        assert_eq!(refused, Err(AggregateError::LayoutsDiffer(2)));
    }

    #[test]
    fn equal_layouts_in_two_places_are_one_layout() {
        let (a, b) = (weights("a", &[1.0]), weights("a", &[3.0]));
        assert_eq!(aggregate(Strategy::default(), &[(1, &a), (1, &b)]).unwrap().values(), [2.0]);
    }

    #[test]
    fn nothing_and_no_examples_have_no_mean() {
        for name in Strategy::NAMES {
            assert_eq!(aggregate(named(name), &[]), Err(AggregateError::NoContribution), "{name}");
        }
        let refused = aggregate(Strategy::default(), &[(0, &weights("a", &[1.0]))]);
        assert_eq!(refused, Err(AggregateError::NoExamples));
    }

    #[test]
    fn a_value_that_is_not_finite_is_refused_by_its_tensor() {
        let (good, bad) = (weights("a", &[1.0, 1.0]), weights("a", &[1.0, f32::INFINITY]));
        let refused = aggregate(Strategy::default(), &[(1, &good), (1, &bad)]);
        assert_eq!(refused, Err(AggregateError::NotFinite("a".into())));
    }

    #[test]
    fn each_rule_is_its_definition() {
        assert_eq!(of_five(named("fedavg")), [182.0, -177.4]);
        assert_eq!(of_five(named("median")), [3.0, 3.0]);
        // Without the largest and the smallest of each value.
        assert_eq!(of_five(named("trimmed-mean")), [3.0, 8.0 / 3.0]);
        // Two neighbours each; in squares: (1,5): 2 + 8, (2,4): 2 + 2, (3,3): 2 + 5.
        assert_eq!(of_five(named("krum")), [2.0, 4.0]);
        assert_eq!(of_five(named("multi-krum")), [2.5, 3.25]);
        // Norms of differences: 5.1, 4.5, 4.2, 1273, 4.1. The median is 4.47.
        let shortened = |norm: f64| (20f64.sqrt() / norm.sqrt()).min(1.0);
        let factors = [26.0, 20.0, 18.0, 1_620_000.0, 17.0].map(shortened);
        let expected = |place: usize| {
            let values = five().iter().map(|update| f64::from(update.values()[place])).collect::<Vec<_>>();
            (factors.iter().zip(values).map(|(factor, value)| factor * value).sum::<f64>() / 5.0) as f32
        };
        assert_eq!(of_five(named("norm-clip")), [expected(0), expected(1)]);
    }

    #[test]
    fn bulyan_of_seven_averages_the_three_in_the_middle_of_krums_five() {
        let updates: Vec<_> = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 900.0].map(|value| weights("a", &[value])).to_vec();
        let parts: Vec<_> = updates.iter().map(|update| (1, update)).collect();
        let found = aggregate(named("bulyan"), &parts).unwrap();
        // Krum's five are within 1 to 6; whichever is missing, the middle three are consecutive or nearly so.
        assert!((2.5..=4.5).contains(&found.values()[0]), "{found:?}");
        let chosen = krum::one_after_another(&krum::tests::distances(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 900.0]), 1, 5);
        let sorted: Vec<f32> = chosen.iter().map(|i| updates[*i].values()[0]).collect();
        assert_eq!(found.values()[0], ((sorted[1] + sorted[2] + sorted[3]) / 3.0), "{chosen:?}");
    }

    #[test]
    fn one_update_is_the_model_by_every_rule() {
        let only = weights("a", &[4.0, -2.0]);
        for name in Strategy::NAMES {
            let strategy = named(name);
            if !strategy.has_state() {
                assert_eq!(aggregate(strategy, &[(3, &only)]).unwrap().values(), only.values(), "{name}");
            }
        }
    }

    #[test]
    fn robust_rules_do_not_believe_a_number_of_examples() {
        let updates = five();
        let parts = |bad: u64| -> Vec<_> {
            updates.iter().enumerate().map(|(i, update)| (if i == 3 { bad } else { 1 }, update)).collect()
        };
        for name in ["median", "trimmed-mean", "krum", "multi-krum", "bulyan"] {
            let strategy = named(name);
            assert_eq!(aggregate(strategy, &parts(1 << 60)), aggregate(strategy, &parts(1)), "{name}");
        }
    }

    #[test]
    fn fedavgm_over_three_rounds_is_its_formula() {
        let layout = weights("a", &[0.0]).layout().clone();
        let strategy = named("fedavgm");
        let mut blob = strategy.initial(Weights::new(layout.clone(), vec![1.0]).unwrap());
        let (mut x, mut v) = (1.0f64, 0.0f64);
        for aggregate in [2.0f32, 1.5, 4.0] {
            let update = weights("a", &[aggregate]);
            let parts = [Contribution { share: Share::of(1), weights: &update }];
            blob = strategy.aggregate(&layout, &blob, &parts).unwrap();
            v = 0.9 * v + (f64::from(aggregate) - x);
            x += v;
            assert!((f64::from(blob.values()[0]) - x).abs() < 1e-5, "{blob:?} {x}");
            assert!((f64::from(blob.values()[1]) - v).abs() < 1e-5, "{blob:?} {v}");
        }
    }

    #[test]
    fn buffers_are_averaged_whatever_the_optimiser() {
        let tensor = |name: &str| TensorSpec { name: name.into(), shape: vec![1] };
        let layout = Arc::new(Layout { tensors: vec![tensor("bn.weight"), tensor("bn.running_var")] });
        let of = |values: [f32; 2]| Weights::new(layout.clone(), values.to_vec()).unwrap();
        let (few, many) = (of([1.0, 0.1]), of([3.0, 0.3]));
        let share = |step_sum| Share { num_examples: 1, step_sum };
        let parts =
            [Contribution { share: share(1.0), weights: &few }, Contribution { share: share(100.0), weights: &many }];
        for name in ["fedadam", "fednova", "fedyogi"] {
            let strategy = named(name);
            let parent = strategy.initial(of([0.0, 9.0]));
            let model = strategy.aggregate(&layout, &parent, &parts).unwrap();
            assert_eq!(model.values()[1], 0.2, "{name}");
            assert_ne!(model.values()[0], 2.0, "{name}");
        }
    }

    #[test]
    fn scaffolds_control_grows_by_what_the_updates_bring() {
        let strategy = named("scaffold");
        let layout = weights("a", &[0.0]).layout().clone();
        let of_updates = strategy.update_layout(&layout);
        let update = |values: [f32; 2]| Weights::new(of_updates.clone(), values.to_vec()).unwrap();
        let (a, b) = (update([2.0, 3.0]), update([4.0, 9.0]));
        // As in the paper examples are no weight.
        let parts =
            [Contribution { share: Share::of(1), weights: &a }, Contribution { share: Share::of(99), weights: &b }];
        let parent = Weights::new(strategy.model_layout(&layout), vec![0.0, 1.0]).unwrap();
        assert_eq!(strategy.aggregate(&layout, &parent, &parts).unwrap().values(), [3.0, 13.0]);
    }
}
