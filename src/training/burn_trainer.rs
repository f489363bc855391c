//! The trainer that computes with burn.

use std::ops::ControlFlow;
use std::sync::Arc;

use burn::nn::loss::CrossEntropyLossConfig;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{AdamConfig, GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{Device, Int, Tensor, TensorData};
use rand::seq::SliceRandom;

use super::config::{Backend, Optimizer, TrainingConfig};
use super::dataset::{Dataset, Task};
use super::models::{Network, initial_weights, into_weights};
use super::random::generator;
use super::{OnProgress, Progress, TrainError, Trainer};
use crate::aggregation::statistics::Summary;
use crate::types::{Metrics, PeerId, Round};
use crate::weights::{Layout, Weights};

/// Examples measured at once: large enough to keep the processor busy, small enough for its caches.
const EVALUATION_BATCH: usize = 512;

/// Trains a [`Model`](super::Model) on a [`Dataset`] by gradient descent on the cross-entropy.
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
    layout: Arc<Layout>,
    weights: Weights,
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
        if !matches!(train.task(), Task::Classes(_)) {
            return Err(TrainError::Failed(format!("{} cannot learn numbers or texts", config.model)));
        }
        let weights = initial_weights(&config, train.num_features(), train.num_classes());
        Ok(Self { layout: weights.layout().clone(), weights, config, peer, train, held_out })
    }

    /// The examples this peer trains on.
    pub fn train_data(&self) -> &Dataset {
        &self.train
    }

    /// The examples this peer measures with.
    pub fn held_out_data(&self) -> &Dataset {
        &self.held_out
    }

    fn network(&self, device: &Device) -> Network {
        Network::load(self.config.model, &self.weights, device)
    }

    fn diverged(&self, round: Round, what: &str) -> TrainError {
        let learning_rate = self.config.learning_rate;
        TrainError::Failed(format!("{what} is not finite in round {round}: lower learning_rate (now {learning_rate})"))
    }

    /// Trains `network` for one round; returns it with the metrics of its last pass over the data.
    fn descend(
        &self,
        mut network: Network,
        round: Round,
        device: &Device,
        on_progress: &mut OnProgress<'_>,
    ) -> Result<(Network, Metrics), TrainError> {
        let TrainingConfig { batch_size, local_epochs, seed, learning_rate, .. } = self.config;
        let mut rng = generator(&format!("batches, seed {seed}, peer {}, round {round}", self.peer));
        let mut order: Vec<usize> = (0..self.train.len()).collect();
        let mut optimizer = self.config.optimizer(); // anew each round, see the type's documentation
        let total = u64::from(local_epochs) * order.len().div_ceil(batch_size) as u64;
        let mut progress = Progress { done: 0, total };
        let mut tally = Tally::default();
        for _ in 0..local_epochs {
            tally = Tally::default();
            order.shuffle(&mut rng);
            for batch in order.chunks(batch_size) {
                let batch = self.train.subset(batch);
                let logits = network.forward(features(&batch, device));
                if !tally.add(&floats(logits.clone().inner()), batch.labels()) {
                    return Err(self.diverged(round, "the loss"));
                }
                let loss = CrossEntropyLossConfig::new().init(device).forward(logits, labels(&batch, device));
                let gradients = GradientsParams::from_grads(loss.backward(), &network);
                network = optimizer.step(learning_rate, network, gradients);
                progress.done += 1;
                if on_progress(progress) == ControlFlow::Break(()) {
                    return Err(TrainError::Stopped);
                }
            }
        }
        Ok((network, tally.metrics()))
    }
}

impl Trainer for BurnTrainer {
    fn layout(&self) -> Arc<Layout> {
        self.layout.clone()
    }

    fn num_examples(&self) -> u64 {
        self.train.len() as u64
    }

    fn summary(&self) -> Vec<u8> {
        self.train.summary().map(|summary| summary.encode()).unwrap_or_default()
    }

    fn prepare(&mut self, summary: &[u8]) {
        if let Some(summary) = Summary::decode(summary) {
            self.train = self.train.standardised(&summary);
            self.held_out = self.held_out.standardised(&summary);
        }
    }

    fn weights(&self) -> Weights {
        self.weights.clone()
    }

    fn set_weights(&mut self, weights: &Weights) -> Result<(), TrainError> {
        check_layout(&self.layout, weights.layout())?;
        self.weights = weights.clone();
        Ok(())
    }

    fn train(&mut self, round: Round, on_progress: &mut OnProgress<'_>) -> Result<Metrics, TrainError> {
        self.prepare(&self.summary()); // a table that nobody else has a part of
        let device = self.config.backend.device().autodiff();
        let (network, metrics) = self.descend(self.network(&device), round, &device, on_progress)?;
        let weights = into_weights(self.layout.clone(), network.values());
        if let Some(tensor) = weights.first_non_finite() {
            return Err(self.diverged(round, tensor)); // the last step was the one too far
        }
        self.weights = weights;
        Ok(metrics)
    }

    fn evaluate(&mut self) -> Result<Metrics, TrainError> {
        self.prepare(&self.summary()); // likewise
        let device = self.config.backend.device();
        let network = self.network(&device);
        let mut tally = Tally::default();
        let order: Vec<usize> = (0..self.held_out.len()).collect();
        for batch in order.chunks(EVALUATION_BATCH) {
            let batch = self.held_out.subset(batch);
            let logits = network.forward(features(&batch, &device));
            if !tally.add(&floats(logits), batch.labels()) {
                let text = "the loss on held-out examples is not finite: lower learning_rate";
                return Err(TrainError::Failed(text.into()));
            }
        }
        Ok(tally.metrics())
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

impl TrainingConfig {
    fn optimizer(&self) -> ModuleOptimizer {
        match self.optimizer {
            Optimizer::Sgd => {
                // burn dampens by 0.1 unless told otherwise; PyTorch does not dampen.
                let momentum = MomentumConfig::new().with_momentum(self.momentum).with_dampening(0.0);
                SgdConfig::new().with_momentum((self.momentum > 0.0).then_some(momentum)).init()
            }
            Optimizer::Adam => AdamConfig::new().with_epsilon(1e-8).init(),
        }
    }
}

/// Metrics of the examples seen so far.
#[derive(Default)]
struct Tally {
    num_examples: u64,
    loss: f64,
    correct: u64,
}

impl Tally {
    /// Adds a batch; returns whether its loss is finite.
    fn add(&mut self, logits: &[f32], labels: &[u32]) -> bool {
        for (row, &label) in logits.chunks_exact(logits.len() / labels.len()).zip(labels) {
            let (best, highest) = row.iter().copied().enumerate().fold((0, f32::NEG_INFINITY), higher);
            let shifted = |logit: f32| f64::from(logit) - f64::from(highest);
            let sum: f64 = row.iter().map(|&logit| shifted(logit).exp()).sum();
            self.loss += sum.ln() - shifted(row[label as usize]);
            self.correct += u64::from(best == label as usize);
            self.num_examples += 1;
        }
        self.loss.is_finite()
    }

    fn metrics(&self) -> Metrics {
        let examples = self.num_examples.max(1) as f64; // nothing seen: zeros, which weigh nothing in a mean
        Metrics {
            num_examples: self.num_examples,
            loss: self.loss / examples,
            accuracy: self.correct as f64 / examples,
        }
    }
}

fn higher(best: (usize, f32), next: (usize, f32)) -> (usize, f32) {
    if next.1 > best.1 { next } else { best }
}

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

fn features(batch: &Dataset, device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(batch.features().to_vec(), [batch.len(), batch.num_features()]), device)
}

fn labels(batch: &Dataset, device: &Device) -> Tensor<1, Int> {
    let labels: Vec<i32> = batch.labels().iter().map(|&label| label as i32).collect();
    Tensor::from_data(TensorData::new(labels, [batch.len()]), device)
}

fn floats(logits: Tensor<2>) -> Vec<f32> {
    logits.into_data().try_into_vec().expect("f32 weights and features give f32 logits")
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::thread;

    use super::*;
    use crate::training::Partition;

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

    #[test]
    fn a_tally_is_the_cross_entropy_and_the_share_of_hits() {
        let mut tally = Tally::default();
        assert!(tally.add(&[0.0, 0.0, 3f32.ln(), 0.0], &[1, 0]));
        let metrics = tally.metrics();
        assert_eq!((metrics.num_examples, metrics.accuracy), (2, 0.5));
        assert!((metrics.loss - (2f64.ln() + (4.0 / 3f64).ln()) / 2.0).abs() < 1e-7);
        assert!(Tally::default().add(&[f32::MAX, -f32::MAX], &[1]));
        assert!(!Tally::default().add(&[f32::NAN, 0.0], &[1]));
        assert!(!Tally::default().add(&[f32::INFINITY, 0.0], &[0]));
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
