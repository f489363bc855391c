//! The trainer that computes with burn.

use std::ops::ControlFlow;
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use tracing::warn;

use super::config::{Backend, TrainingConfig};
use super::dataset::{DataError, Dataset};
use super::drift::{self, StepSum};
use super::export::arranged;
use super::loss::Loss;
use super::metrics::Tally;
use super::models::{Network, floats};
use super::optimizer::{Descent, clip_norm};
use super::random::generator;
use super::{Names, OnProgress, Progress, TrainError, Trainer, check_layout};
use crate::aggregation::statistics::Summary;
use crate::types::{Metrics, PeerId, Round};
use crate::weights::{Layout, LayoutMismatch, Weights};

/// Examples measured at once: large enough to keep the processor busy, small enough for its caches.
const EVALUATION_BATCH: usize = 512;

/// Trains a [`Model`](super::Model) on a [`Dataset`] by gradient descent on the cross-entropy, or on the squared error
/// where the targets are numbers.
///
/// The optimiser's state starts anew each round: momentum gathered on the way to this peer's own weights says
/// little about the global model that replaced them, and a round trained again must give the same bits.
///
/// The metrics of a round are those of its last pass over the data, each example's taken just before the step that it
/// is part of: they cost nothing, and lag a little behind what the trained weights would reach.
///
/// Nothing random is shared with other trainers of the process, so any number of them may train at once. Each
/// computes on the thread that calls it and starts no other.
#[derive(Debug)]
pub struct BurnTrainer {
    config: TrainingConfig,
    peer: PeerId,
    train: Dataset,
    held_out: Dataset,
    network: Network,
    weights: Weights,
    /// A model that was trained before, which is not fitted yet: the categories of all peers decide the model's shape.
    start: Option<Weights>,
    /// What inputs and outputs are called.
    names: Names,
    /// What is added to every gradient, if anything is.
    correction: Option<Vec<f32>>,
    /// How far the last round's steps went.
    step_sum: f64,
}

impl BurnTrainer {
    /// A trainer with initial weights drawn by `config.seed`: the same at every peer.
    ///
    /// `peer` makes the order of this peer's batches its own. `held_out` may be empty; `train` may not.
    pub fn new(config: TrainingConfig, peer: PeerId, train: Dataset, held_out: Dataset) -> Result<Self, TrainError> {
        config.check()?;
        if train.is_empty() {
            return Err(TrainError::Failed(format!("{peer} has no example to train on")));
        }
        if (train.shape(), train.task()) != (held_out.shape(), held_out.task()) {
            let text = "the training and the held-out examples differ in their features or classes";
            return Err(TrainError::Failed(text.into()));
        }
        let network = Network::new(&config, train.shape(), train.task())?;
        let weights = network.initial_weights(config.seed);
        let (start, correction) = (None, None);
        let names = Names { features: Vec::new(), classes: train.class_names().to_vec() };
        Ok(Self { config, peer, train, held_out, network, weights, start, names, correction, step_sum: 1.0 })
    }

    /// The examples this peer trains on.
    pub fn train_data(&self) -> &Dataset {
        &self.train
    }

    /// The examples this peer measures with.
    pub fn held_out_data(&self) -> &Dataset {
        &self.held_out
    }

    /// Starts from `given` instead of drawn weights: a model that was trained before, whose tensors may stand in any order.
    /// Where the data are a table, whether it fits is known only once the trainer is [prepared](Trainer::prepare).
    pub fn start_from(&mut self, given: &Weights) -> Result<(), TrainError> {
        if let Some(tensor) = given.first_non_finite() {
            return Err(TrainError::Failed(format!("{tensor} holds a value that is not finite")));
        }
        if self.train.table().is_some() {
            self.start = Some(given.clone());
            return Ok(());
        }
        let fitted = arranged(given, self.weights.layout());
        self.weights = fitted.map_err(|[here, given]| TrainError::OtherModel { here, given })?;
        Ok(())
    }

    /// A table becomes features and classes, and only now is known what shape the model has.
    fn standardise(&mut self, summary: &Summary) -> Result<(), TrainError> {
        let Some(table) = self.train.table() else { return Ok(()) };
        let features = table.feature_names(summary);
        let (train, held_out) = (self.train.standardised(summary)?, self.held_out.standardised(summary)?);
        if (train.shape(), train.task()) != (self.train.shape(), self.train.task()) {
            self.network = Network::new(&self.config, train.shape(), train.task())?;
            self.weights = self.network.initial_weights(self.config.seed);
        }
        if let Some(start) = self.start.take() {
            let fitted = arranged(&start, self.weights.layout());
            self.weights = fitted.map_err(|[here, given]| TrainError::Start { here, given })?;
        }
        for (column, value) in self.train.outliers(summary) {
            let peer = &self.peer;
            let text = "a value is more than 20 standard deviations from the mean of all peers: is it right?";
            warn!(%peer, column, value, "{text}");
        }
        self.names = Names { features, classes: train.class_names().to_vec() };
        (self.train, self.held_out) = (train, held_out);
        Ok(())
    }

    /// Has a table standardised that nobody else has a part of.
    fn standardise_alone(&mut self) -> Result<(), TrainError> {
        self.train.summary().map_or(Ok(()), |summary| self.standardise(&summary))
    }

    fn diverged(&self, round: Round, what: &str) -> TrainError {
        let learning_rate = self.config.learning_rate;
        TrainError::Failed(format!("{what} is not finite in round {round}: lower learning_rate (now {learning_rate})"))
    }

    /// Trains for one round; returns the weights, with the metrics of the last pass over the data and how far the steps went.
    fn descend(&self, round: Round, on_progress: &mut OnProgress<'_>) -> Result<(Weights, Metrics, f64), TrainError> {
        let TrainingConfig { max_grad_norm, augment, .. } = self.config;
        let learning_rate = self.config.learning_rate_in(round);
        let device = self.config.backend.device().autodiff();
        let mut batches = Batches::new(self.train.len(), self.config.batch_size, self.rng("batches", round));
        let mut changes = self.rng("augmentation", round);
        let mut weights = self.weights.clone();
        let len = weights.values().len();
        let mut descent = Descent::new(&self.config, self.network.trainable(), len); // anew, see the type's documentation
        let epoch = batches.in_an_epoch() as u64;
        let total = self.config.local_steps.unwrap_or(u64::from(self.config.local_epochs) * epoch);
        let mut tally = Tally::new(self.train.task());
        let mut step_sum = StepSum::new(&self.config);
        for done in 0..total {
            let batch = batches.next();
            let (mut features, targets) = self.train.subset(batch).into_parts();
            augment.apply(&mut features, self.train.shape(), &mut changes);
            let pass = self.network.pass(weights.values(), &device);
            let outputs = self.network.forward(&pass, on_device(features, batch.len(), &device));
            let on_host = floats(outputs.clone().inner());
            let loss = Loss::of(&on_host, &targets);
            if !loss.sum.is_finite() {
                return Err(self.diverged(round, "the loss"));
            }
            if total - done <= epoch {
                tally.add(batch.len(), &on_host, &targets, &loss);
            }
            // The one place where anything but the loss can change a gradient: it is a row in the layout's order, 0 for
            // buffers.
            let mut gradient = pass.gradient(outputs, loss.slope);
            if let Some(max_norm) = max_grad_norm {
                clip_norm(&mut gradient, max_norm);
            }
            if self.config.mu > 0.0 {
                drift::hold(&mut gradient, self.config.mu, weights.values(), self.weights.values());
            }
            if let Some(correction) = &self.correction {
                drift::correct(&mut gradient, correction);
            }
            step_sum.step(learning_rate);
            descent.step(learning_rate, weights.values_mut(), &gradient);
            pass.write_buffers(weights.values_mut());
            if on_progress(Progress { done: done + 1, total }) == ControlFlow::Break(()) {
                return Err(TrainError::Stopped);
            }
        }
        Ok((weights, tally.metrics(), step_sum.sum()))
    }

    fn rng(&self, purpose: &str, round: Round) -> ChaCha8Rng {
        generator(&format!("{purpose}, seed {}, peer {}, round {round}", self.config.seed, self.peer))
    }
}

impl Trainer for BurnTrainer {
    fn layout(&self) -> Arc<Layout> {
        self.weights.layout().clone()
    }

    fn num_examples(&self) -> u64 {
        self.train.len() as u64
    }

    fn summary(&self) -> Vec<u8> {
        self.train.summary().map(|summary| summary.encode()).unwrap_or_default()
    }

    fn prepare(&mut self, summary: &[u8]) -> Result<(), TrainError> {
        let summary = Summary::decode(summary).ok_or(DataError::OtherColumns)?;
        self.standardise(&summary)
    }

    fn names(&self) -> Names {
        self.names.clone()
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
        check_layout(self.weights.layout(), weights.layout())?;
        std::mem::swap(&mut self.weights, weights);
        Ok(())
    }

    fn train(&mut self, round: Round, on_progress: &mut OnProgress<'_>) -> Result<Metrics, TrainError> {
        self.standardise_alone()?;
        let (weights, metrics, step_sum) = self.descend(round, on_progress)?;
        if let Some(tensor) = weights.first_non_finite() {
            return Err(self.diverged(round, tensor)); // the last step was the one too far
        }
        (self.weights, self.step_sum) = (weights, step_sum);
        Ok(metrics)
    }

    fn step_sum(&self) -> f64 {
        self.step_sum
    }

    fn set_correction(&mut self, correction: Option<Vec<f32>>) -> Result<(), TrainError> {
        let (values, expected) = (correction.as_ref().map(Vec::len), self.weights.values().len());
        if let Some(found) = values.filter(|found| *found != expected) {
            return Err(LayoutMismatch { expected, found }.into());
        }
        self.correction = correction;
        Ok(())
    }

    fn evaluate(&mut self) -> Result<Metrics, TrainError> {
        self.standardise_alone()?;
        let device = self.config.backend.device();
        let pass = self.network.pass(self.weights.values(), &device);
        let mut tally = Tally::new(self.held_out.task());
        let order: Vec<usize> = (0..self.held_out.len()).collect();
        for batch in order.chunks(EVALUATION_BATCH) {
            let (features, targets) = self.held_out.subset(batch).into_parts();
            let outputs = floats(self.network.forward(&pass, on_device(features, batch.len(), &device)));
            let loss = Loss::of(&outputs, &targets);
            if !loss.sum.is_finite() {
                let text = "the loss on held-out examples is not finite: lower learning_rate";
                return Err(TrainError::Failed(text.into()));
            }
            tally.add(batch.len(), &outputs, &targets, &loss);
        }
        Ok(tally.metrics())
    }
}

/// The examples of each batch: all of them once, then all again in a new order.
struct Batches {
    order: Vec<usize>,
    size: usize,
    next: usize,
    rng: ChaCha8Rng,
}

impl Batches {
    fn new(examples: usize, size: usize, rng: ChaCha8Rng) -> Self {
        Self { order: (0..examples).collect(), size, next: 0, rng }
    }

    fn in_an_epoch(&self) -> usize {
        self.order.len().div_ceil(self.size)
    }

    fn next(&mut self) -> &[usize] {
        if self.next == 0 {
            self.order.shuffle(&mut self.rng);
        }
        let (start, end) = (self.next, (self.next + self.size).min(self.order.len()));
        self.next = if end == self.order.len() { 0 } else { end };
        &self.order[start..end]
    }
}

impl Backend {
    /// Where tensors live and are computed, without gradients.
    #[allow(deprecated)] // burn prefers flex, as our default does; ndarray is here to compare with
    pub(super) fn device(self) -> Device {
        match self {
            Self::Flex => Device::flex(),
            Self::Ndarray => Device::ndarray(),
        }
    }
}

fn on_device(features: Vec<f32>, examples: usize, device: &Device) -> Tensor<2> {
    let num_features = features.len() / examples;
    Tensor::from_data(TensorData::new(features, [examples, num_features]), device)
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::thread;

    use super::*;
    use crate::aggregation::statistics;
    use crate::training::{Column, Optimizer, Partition, Table, Targets};

    fn config(backend: Backend) -> TrainingConfig {
        TrainingConfig { backend, ..Default::default() }
    }

    fn trainer_of(config: TrainingConfig, peer: &str, train: Dataset, held_out: Dataset) -> BurnTrainer {
        BurnTrainer::new(config, PeerId::new(peer).unwrap(), train, held_out).unwrap()
    }

    /// A trainer with all digits, a fifth of them held out.
    fn central(config: TrainingConfig, peer: &str) -> BurnTrainer {
        let (train, held_out) = Dataset::digits().split(0.2, config.seed).unwrap();
        trainer_of(config, peer, train, held_out)
    }

    /// A trainer whose 30 examples are one batch, measured on the data it trains on.
    fn whole_batch(config: &TrainingConfig) -> BurnTrainer {
        let data = Dataset::digits().subset(&(0..30).collect::<Vec<_>>());
        let config = TrainingConfig { hidden: vec![5], batch_size: 30, ..config.clone() };
        trainer_of(config, "a", data.clone(), data)
    }

    fn go_on(_: Progress) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn trained(mut trainer: BurnTrainer, rounds: std::ops::RangeInclusive<u64>) -> Vec<u32> {
        for round in rounds {
            trainer.train(Round(round), &mut go_on).unwrap();
        }
        bits(&trainer)
    }

    fn bits(trainer: &BurnTrainer) -> Vec<u32> {
        trainer.weights().values().iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn the_data_of_all_peers_decide_whether_a_model_to_start_from_fits() {
        let targets = |labels| Targets::Classes { labels, names: vec!["no".to_owned(), "yes".into()].into() };
        let table = |towns: &[&str]| {
            let categories = Some(towns.iter().map(|town| (*town).to_owned()).collect());
            let columns = vec![Column { name: "town".into(), categories }];
            Dataset::of_table(vec![0.0, 1.0], Table { columns, label: "sick".into() }, targets(vec![0, 1])).unwrap()
        };
        let trainer = |towns: &[&str]| {
            let config = TrainingConfig { hidden: vec![3], ..Default::default() };
            trainer_of(config, "a", table(towns), table(towns))
        };
        let (mut mine, others) = (trainer(&["Lund", "Oslo"]), trainer(&["Bath", "Oslo"]));
        let all = statistics::merge([&mine.summary()[..], &others.summary()]);
        let mut fits = mine.weights();
        mine.prepare(&all).unwrap();
        assert_eq!((mine.layout().tensors[0].shape.as_slice(), mine.names().features.len()), (&[3, 3][..], 3));
        mine.train(Round(1), &mut go_on).unwrap();
        mine.prepare(&all).unwrap();
        assert_ne!(mine.weights(), trainer(&["Bath", "Lund", "Oslo"]).weights(), "prepared again, it forgets nothing");

        let mut late = trainer(&["Lund", "Oslo"]);
        late.start_from(&mine.weights()).unwrap();
        late.prepare(&all).unwrap();
        assert_eq!(late.weights(), mine.weights());
        let mut other = trainer(&["Lund", "Oslo"]);
        fits.values_mut().fill(0.5);
        other.start_from(&fits).unwrap();
        let error = other.prepare(&all).unwrap_err().to_string();
        assert!(error.contains("has fc1.weight [3, 2] where fc1.weight [3, 3] is needed"), "{error}");
        other = trainer(&["Lund", "Oslo"]);
        other.start_from(&fits).unwrap();
        other.evaluate().unwrap();
        assert_eq!(other.weights(), fits, "alone it fits");
    }

    #[test]
    fn five_rounds_alone_on_all_digits_reach_95_percent_on_every_backend() {
        for &backend in Backend::ALL {
            let mut trainer = central(config(backend), "a");
            let before = trainer.evaluate().unwrap();
            let first = trainer.train(Round(1), &mut go_on).unwrap();
            let second = trainer.train(Round(2), &mut go_on).unwrap();
            for round in 3..=5 {
                trainer.train(Round(round), &mut go_on).unwrap();
            }
            let after = trainer.evaluate().unwrap();
            assert!(before.accuracy < 0.3, "{backend}: {before:?}");
            assert!(first.num_examples == 1438 && second.loss < first.loss, "{backend}: {first:?}, then {second:?}");
            assert!(after.accuracy > 0.95 && after.loss < before.loss / 4.0, "{backend}: {after:?}");
        }
    }

    #[test]
    fn a_step_follows_the_gradient_measured_by_finite_differences() {
        let plain = TrainingConfig { momentum: 0.0, learning_rate: 1.0, local_epochs: 1, ..Default::default() };
        for &backend in Backend::ALL {
            let mut trainer = whole_batch(&TrainingConfig { backend, ..plain.clone() });
            let start = trainer.weights();
            trainer.train(Round(1), &mut go_on).unwrap();
            let step = trainer.weights();
            for index in (0..start.values().len()).step_by(7) {
                let mut loss_at = |offset: f32| {
                    let mut values = start.values().to_vec();
                    values[index] += offset;
                    trainer.set_weights(&Weights::new(start.layout().clone(), values).unwrap()).unwrap();
                    trainer.evaluate().unwrap().loss
                };
                let slope = (loss_at(1e-3) - loss_at(-1e-3)) / 2e-3;
                let taken = f64::from(start.values()[index] - step.values()[index]);
                assert!((taken - slope).abs() < 5e-5, "{backend}, value {index}: {taken} against {slope}");
            }
        }
    }

    #[test]
    fn momentum_is_not_dampened_as_in_pytorch() {
        let plain = TrainingConfig { momentum: 0.0, local_epochs: 1, ..Default::default() };
        let mut one_step = whole_batch(&plain);
        let mut points = vec![one_step.weights()];
        for round in 1..=2 {
            one_step.train(Round(round), &mut go_on).unwrap();
            points.push(one_step.weights());
        }
        let mut two_steps = whole_batch(&TrainingConfig { momentum: 0.5, local_epochs: 2, ..plain });
        two_steps.train(Round(1), &mut go_on).unwrap();
        for (index, &value) in two_steps.weights().values().iter().enumerate() {
            let [start, first, second] = [0, 1, 2].map(|point: usize| points[point].values()[index]);
            let expected = second + 0.5 * (first - start);
            assert!((value - expected).abs() < 1e-5, "value {index}: {value} against {expected}");
        }
    }

    #[test]
    fn adam_learns_too() {
        let adam = TrainingConfig { optimizer: Optimizer::Adam, learning_rate: 0.005, ..Default::default() };
        let mut trainer = central(adam, "a");
        trainer.train(Round(1), &mut go_on).unwrap();
        assert!(trainer.evaluate().unwrap().accuracy > 0.9);
    }

    #[test]
    fn a_round_is_the_same_bits_while_other_peers_train_beside_it() {
        for &backend in Backend::ALL {
            let alone = trained(central(config(backend), "a"), 1..=2);
            let start = Barrier::new(3);
            let beside = thread::scope(|scope| {
                let runs = ["a", "a", "b"].map(|peer| {
                    let start = &start;
                    scope.spawn(move || {
                        start.wait();
                        trained(central(config(backend), peer), 1..=2)
                    })
                });
                runs.map(|run| run.join().unwrap())
            });
            assert_eq!(beside[0], alone, "{backend}");
            assert_eq!(beside[1], alone, "{backend}");
            assert_ne!(beside[2], alone, "{backend}");
        }
    }

    #[test]
    fn a_round_depends_on_its_number_the_seed_and_the_peer() {
        let base = trained(two_batches("a", 1), 1..=1);
        assert_eq!(trained(two_batches("a", 1), 1..=1), base);
        assert_ne!(trained(two_batches("a", 1), 2..=2), base);
        assert_ne!(trained(two_batches("b", 1), 1..=1), base);
        assert_ne!(trained(two_batches("a", 2), 1..=1), base);
    }

    /// Thirty examples in two batches, so that their order matters.
    fn two_batches(peer: &str, seed: u64) -> BurnTrainer {
        let data = Dataset::digits().subset(&(0..30).collect::<Vec<_>>());
        let config = TrainingConfig { hidden: vec![5], batch_size: 15, seed, ..Default::default() };
        trainer_of(config, peer, data.clone(), data)
    }

    #[test]
    fn nothing_but_the_weights_passes_from_round_to_round() {
        let mut trainer = central(TrainingConfig { local_epochs: 1, ..Default::default() }, "a");
        trainer.train(Round(1), &mut go_on).unwrap();
        let mut other = central(TrainingConfig { local_epochs: 1, ..Default::default() }, "a");
        other.set_weights(&trainer.weights()).unwrap();
        trainer.evaluate().unwrap();
        assert_eq!(trained(trainer, 2..=2), trained(other, 2..=2));
    }

    #[test]
    fn initial_weights_are_the_same_at_every_peer() {
        assert_eq!(bits(&two_batches("a", 1)), bits(&two_batches("b", 1)));
        assert_ne!(bits(&two_batches("a", 1)), bits(&two_batches("a", 2)));
    }

    #[test]
    fn weights_of_another_model_are_refused_by_the_first_tensor_that_differs() {
        let mut trainer = whole_batch(&config(Backend::Flex));
        let wider = central(config(Backend::Flex), "a").weights();
        let error = trainer.set_weights(&wider).unwrap_err().to_string();
        let expected =
            "the weights are of another model: it has fc1.weight [64, 64] where this one has fc1.weight [5, 64]";
        assert_eq!(error, expected);
        let mut renamed = (*trainer.layout()).clone();
        renamed.tensors.swap(2, 3);
        let renamed = Weights::new(Arc::new(renamed), trainer.weights().into_values()).unwrap();
        assert!(matches!(trainer.set_weights(&renamed), Err(TrainError::OtherModel { .. })));
    }

    #[test]
    fn progress_counts_every_batch() {
        let mut trainer = two_batches("a", 1);
        let mut seen = Vec::new();
        trainer
            .train(Round(1), &mut |progress| {
                seen.push((progress.done, progress.total));
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(seen, (1..=10).map(|done| (done, 10)).collect::<Vec<_>>());
    }

    #[test]
    fn a_correction_is_added_to_every_gradient_and_weights_are_held_to_their_start() {
        let plain = TrainingConfig { momentum: 0.0, local_epochs: 1, learning_rate: 0.5, ..Default::default() };
        let mut without = whole_batch(&plain);
        without.train(Round(1), &mut go_on).unwrap();
        assert_eq!(without.step_sum(), 0.5);
        let mut with = whole_batch(&plain);
        let values = with.weights().values().len();
        with.set_correction(Some(vec![0.25; values])).unwrap();
        with.train(Round(1), &mut go_on).unwrap();
        let pairs = without.weights().into_values().into_iter().zip(with.weights().into_values());
        assert!(pairs.into_iter().all(|(without, with)| (without - with - 0.125).abs() < 1e-5));
        assert!(with.set_correction(Some(vec![0.0; values + 1])).is_err());

        let moved = |mu| {
            let mut trainer = whole_batch(&TrainingConfig { mu, local_epochs: 20, ..plain.clone() });
            let start = trainer.weights();
            trainer.train(Round(1), &mut go_on).unwrap();
            let end = trainer.weights();
            start.values().iter().zip(end.values()).map(|(start, end)| f64::from(start - end).powi(2)).sum::<f64>()
        };
        assert!(moved(1.0) < 0.5 * moved(0.0), "{} {}", moved(1.0), moved(0.0));
    }

    #[test]
    fn a_round_that_is_stopped_leaves_the_weights_alone() {
        let mut trainer = two_batches("a", 1);
        let before = bits(&trainer);
        let stop_at_three = &mut |progress: Progress| {
            if progress.done < 3 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        };
        assert!(matches!(trainer.train(Round(1), stop_at_three), Err(TrainError::Stopped)));
        assert_eq!(bits(&trainer), before);
    }

    #[test]
    fn a_round_that_diverges_says_to_lower_the_learning_rate_and_leaves_the_weights_alone() {
        // A loss that is not finite in the second epoch; weights that are not after the last step.
        for (learning_rate, local_epochs, what) in [(1e30, 5, "the loss"), (1e300, 1, "fc1.weight")] {
            let mut trainer = whole_batch(&TrainingConfig { learning_rate, local_epochs, ..Default::default() });
            let before = bits(&trainer);
            let error = trainer.train(Round(4), &mut go_on).unwrap_err().to_string();
            let expected = format!("{what} is not finite in round 4: lower learning_rate (now {learning_rate})");
            assert_eq!(error, expected);
            assert_eq!(bits(&trainer), before);
        }
    }

    #[test]
    fn weights_that_overflow_on_held_out_data_are_an_error() {
        let mut trainer = whole_batch(&config(Backend::Flex));
        let huge = vec![f32::MAX; trainer.layout().len()];
        trainer.set_weights(&Weights::new(trainer.layout(), huge).unwrap()).unwrap();
        assert!(trainer.evaluate().unwrap_err().to_string().contains("not finite"));
    }

    #[test]
    fn what_cannot_be_trained_is_refused() {
        let digits = Dataset::digits();
        let (none, peer) = (digits.subset(&[]), PeerId::new("a").unwrap());
        let refused = |config, train: &Dataset, held_out: &Dataset| {
            BurnTrainer::new(config, peer.clone(), train.clone(), held_out.clone()).unwrap_err().to_string()
        };
        assert_eq!(refused(config(Backend::Flex), &none, &digits), "a has no example to train on");
        let zero = TrainingConfig { batch_size: 0, ..Default::default() };
        assert_eq!(refused(zero, &digits, &digits), "batch_size = 0: must be at least 1");
        let other = Dataset::new(vec![0.0], vec![0], 1, vec!["a".into()]).unwrap();
        assert!(refused(config(Backend::Flex), &digits, &other).contains("differ"));
        let mut unmeasured = trainer_of(config(Backend::Flex), "a", digits, none);
        assert_eq!(unmeasured.evaluate().unwrap(), Metrics::default());
    }

    #[test]
    fn metrics_do_not_depend_on_how_examples_are_batched() {
        let digits = Dataset::digits();
        let whole = trainer_of(config(Backend::Flex), "a", digits.clone(), digits.clone()).evaluate().unwrap();
        let indices: Vec<usize> = (0..digits.len()).collect();
        let parts = indices.chunks(100).map(|part| {
            trainer_of(config(Backend::Flex), "a", digits.clone(), digits.subset(part)).evaluate().unwrap()
        });
        let mean = Metrics::weighted_mean(&parts.collect::<Vec<_>>()).unwrap();
        assert_eq!(whole.num_examples, 1797);
        assert!((whole.loss - mean.loss).abs() < 1e-6 && (whole.accuracy - mean.accuracy).abs() < 1e-9);
    }

    /// Federated averaging over the digits; one peer a round, in turn, does not train. The last round's accuracy.
    fn federated(partition: Partition, peers: usize, rounds: u64, seed: u64) -> f64 {
        let digits = Dataset::digits();
        let parts = partition.partition(digits.labels(), digits.num_classes(), peers, seed).unwrap();
        let trainer = |(index, part): (usize, &Vec<usize>)| {
            let (train, held_out) = digits.subset(part).split(0.2, seed).unwrap();
            trainer_of(TrainingConfig { seed, ..Default::default() }, &format!("peer-{index}"), train, held_out)
        };
        let mut trainers: Vec<BurnTrainer> = parts.iter().enumerate().map(trainer).collect();
        for round in 1..=rounds {
            let leader = round as usize % peers;
            let mut sum = vec![0.0; trainers[0].weights().values().len()];
            let mut num_examples = 0.0;
            for trainer in trainers.iter_mut().enumerate().filter(|(index, _)| *index != leader).map(|(_, t)| t) {
                trainer.train(Round(round), &mut go_on).unwrap();
                let weight = trainer.num_examples() as f64;
                num_examples += weight;
                let weights = trainer.weights();
                sum.iter_mut().zip(weights.values()).for_each(|(sum, &value)| *sum += weight * f64::from(value));
            }
            let mean = sum.iter().map(|value| (value / num_examples) as f32).collect();
            let global = Weights::new(trainers[0].layout(), mean).unwrap();
            trainers.iter_mut().for_each(|trainer| trainer.set_weights(&global).unwrap());
        }
        let metrics: Vec<Metrics> = trainers.iter_mut().map(|trainer| trainer.evaluate().unwrap()).collect();
        Metrics::weighted_mean(&metrics).unwrap().accuracy
    }

    #[test]
    fn the_defaults_reach_95_percent_in_ten_rounds_of_federated_averaging() {
        for seed in [1, 42] {
            let accuracy = federated(Partition::Iid, 5, 10, seed);
            assert!(accuracy >= 0.95, "seed {seed}: {accuracy}");
        }
    }

    #[test]
    fn the_defaults_reach_93_percent_on_skewed_data_in_forty_rounds() {
        let accuracy = federated(Partition::Dirichlet { alpha: 0.3 }, 5, 40, 42);
        assert!(accuracy >= 0.93, "seed 42: {accuracy}");
    }
}
