//! Strategies on real data: federations of trainers and jobs without messages, so that a round is what it computes.

use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex};

use rodizio::aggregation::{Contribution, Parameters, Share, Strategy};
use rodizio::jobs::Workshop;
use rodizio::journal::Blobs;
use rodizio::protocol::{Done, Job, Residual, Trained};
use rodizio::training::{
    BurnTrainer, Dataset, Model, OnProgress, Partition, ReadOptions, Schedule, Source, Train, TrainError, Trainer,
    TrainingConfig,
};
use rodizio::transfer::{Codec, Codecs, Keep, Manifest};
use rodizio::types::{Digest, Metrics, PeerId, Round, Term};
use rodizio::weights::{Layout, TensorSpec, Weights};

fn named(name: &str) -> Strategy {
    Strategy::named(name, &Parameters::default()).unwrap()
}

/// A trainer that means harm: what it learned, reversed and ten times as long.
struct Flipped {
    trainer: BurnTrainer,
    start: Weights,
}

impl Trainer for Flipped {
    fn layout(&self) -> Arc<Layout> {
        self.trainer.layout()
    }

    fn num_examples(&self) -> u64 {
        self.trainer.num_examples()
    }

    fn weights(&self) -> Weights {
        let mut weights = self.start.clone();
        let trained = self.trainer.weights();
        for ((value, trained), start) in weights.values_mut().iter_mut().zip(trained.values()).zip(self.start.values())
        {
            *value = start - 10.0 * (trained - start);
        }
        weights
    }

    fn set_weights(&mut self, weights: &Weights) -> Result<(), TrainError> {
        self.start = weights.clone();
        self.trainer.set_weights(weights)
    }

    fn train(&mut self, round: Round, on_progress: &mut OnProgress<'_>) -> Result<Metrics, TrainError> {
        self.trainer.train(round, on_progress)
    }

    fn step_sum(&self) -> f64 {
        self.trainer.step_sum()
    }

    fn set_correction(&mut self, correction: Option<Vec<f32>>) -> Result<(), TrainError> {
        self.trainer.set_correction(correction)
    }

    fn evaluate(&mut self) -> Result<Metrics, TrainError> {
        self.trainer.evaluate()
    }
}

/// A peer, with its own blobs as on a machine of its own.
struct Member {
    workshop: Workshop,
    trainer: Mutex<Box<dyn Trainer>>,
    control: Option<Digest>,
}

/// Peers that take turns to lead. Who leads does not train.
struct Federation {
    members: Vec<Member>,
    model: Manifest,
    round: Round,
    /// What was trained in the last round, and the model that it led to.
    updates: Vec<(Share, Weights)>,
}

impl Member {
    fn new(index: usize, strategy: Strategy, codecs: Codecs, trainer: Box<dyn Trainer>) -> Self {
        let layout = trainer.layout();
        let (peer, blobs, chunk_bytes) = (peer(index), Blobs::memory(), 1 << 20);
        let leftovers = Arc::default();
        let workshop = Workshop { blobs, layout, peer, codecs, strategy, chunk_bytes, leftovers };
        Self { workshop, trainer: Mutex::new(trainer), control: None }
    }

    fn perform(&self, job: Job) -> Done {
        let (mut go_on, mut give_up) = (|_, _| ControlFlow::Continue(()), |_| ControlFlow::Break(()));
        self.workshop.perform(job, &self.trainer, &mut go_on, &mut give_up)
    }

    /// Pulls a blob from another, and verifies it.
    fn pull(&self, from: &Member, manifest: Manifest) {
        let blob = from.workshop.blobs.get(manifest.digest).unwrap().unwrap();
        let mut give_up = |_| ControlFlow::Break(());
        let mut receiving = self.workshop.receive(manifest, Keep::Unflushed, &mut give_up).unwrap();
        let taken = (0..manifest.chunks())
            .map(|index| receiving.take(index, &manifest.chunk(&blob, index).unwrap(), &mut give_up).unwrap());
        assert_eq!(taken.last(), Some(true));
    }

    /// `None`: the model is ruined, and its loss not finite.
    fn evaluate(&self, model: Manifest) -> Option<Metrics> {
        let Done::Evaluated { result, .. } = self.perform(Job::Evaluate { model }) else { unreachable!() };
        result.ok()
    }
}

impl Federation {
    fn new(strategy: Strategy, codecs: Codecs, trainers: Vec<Box<dyn Trainer>>) -> Self {
        let trainers = trainers.into_iter().enumerate();
        let members: Vec<Member> =
            trainers.map(|(index, trainer)| Member::new(index, strategy, codecs, trainer)).collect();
        let Done::Initial(model) = members[0].perform(Job::Initial) else { unreachable!() };
        let model = model.unwrap();
        members[1..].iter().for_each(|member| member.pull(&members[0], model));
        Self { members, model, round: Round(0), updates: Vec::new() }
    }

    /// Somebody comes later, with the model and nothing else.
    fn join(&mut self, trainer: Box<dyn Trainer>) {
        let Workshop { strategy, codecs, .. } = &self.members[0].workshop;
        let newcomer = Member::new(self.members.len(), *strategy, *codecs, trainer);
        newcomer.pull(&self.members[0], self.model);
        self.members.push(newcomer);
    }

    /// Each round another leads; all then hold the model, and no blob of an earlier round.
    fn round(&mut self) {
        self.round = self.round.next();
        let leader = self.round.0 as usize % self.members.len();
        let (round, model, parent) = (self.round, self.model, self.model);
        let mut trained: Vec<(usize, Trained)> = Vec::new();
        for (index, member) in self.members.iter().enumerate().filter(|(index, _)| *index != leader) {
            let (residual, control, members) = (Residual::default(), member.control, self.members.len());
            let done = member.perform(Job::Train { round, model, residual, control, members });
            let Done::Trained { result, .. } = done else { unreachable!() };
            // Who cannot train from a model that is ruined declines.
            trained.extend(result.ok().map(|trained| (index, trained)));
        }
        if trained.is_empty() {
            return;
        }
        let leads = &self.members[leader];
        trained.iter().for_each(|(index, trained)| leads.pull(&self.members[*index], trained.update));
        let share = |(index, trained): &(usize, Trained)| {
            let num_examples = self.members[*index].trainer.lock().unwrap().num_examples();
            (trained.update, Share { num_examples, step_sum: trained.step_sum })
        };
        let parts: Vec<_> = trained.iter().map(share).collect();
        self.updates =
            parts.iter().map(|(update, share)| (*share, leads.workshop.load_update(update).unwrap())).collect();
        let done = leads.perform(Job::Aggregate { round, term: Term(0), parent, parts });
        let Done::Aggregated { result, .. } = done else { unreachable!() };
        self.model = result.unwrap();
        let others = self.members.iter().enumerate().filter(|(index, _)| *index != leader);
        others.for_each(|(_, member)| member.pull(leads, self.model));
        for (index, trained) in trained {
            self.members[index].control = trained.control;
        }
        for member in &self.members {
            let keep = member.control.into_iter().chain([self.model.digest]).collect();
            member.workshop.blobs.retain(&keep).unwrap();
        }
    }

    /// The accuracy that those of `who` measure; 0 of a ruined model.
    fn accuracy(&self, who: Range<usize>) -> f64 {
        let metrics: Option<Vec<Metrics>> =
            self.members[who].iter().map(|member| member.evaluate(self.model)).collect();
        metrics.map_or(0.0, |metrics| Metrics::weighted_mean(&metrics).unwrap().accuracy)
    }

    /// All that stands in the global model's blob.
    fn blob(&self) -> Weights {
        let workshop = &self.members[0].workshop;
        let blob = workshop.blobs.get(self.model.digest).unwrap().unwrap();
        Codec::F32.decode(&blob, &workshop.strategy.model_layout(&workshop.layout)).unwrap()
    }

    fn own_control(&self, index: usize) -> Vec<f32> {
        let member = &self.members[index];
        let Some(control) = member.control else { return vec![0.0; member.workshop.layout.len()] };
        let blob = member.workshop.blobs.get(control).unwrap().unwrap();
        Codec::F32.decode(&blob, &member.workshop.layout).unwrap().into_values()
    }
}

fn peer(index: usize) -> PeerId {
    PeerId::new(&format!("peer-{index}")).unwrap()
}

/// Trainers on parts of the digits, a fifth of each held out; the first `bad` mean harm.
fn trainers(config: &TrainingConfig, peers: usize, partition: Partition, bad: usize) -> Vec<Box<dyn Trainer>> {
    trainers_on(&Dataset::digits(), config, peers, partition, bad)
}

fn trainers_on(
    data: &Dataset,
    config: &TrainingConfig,
    peers: usize,
    partition: Partition,
    bad: usize,
) -> Vec<Box<dyn Trainer>> {
    let parts = partition.of(data, peers, config.seed).unwrap();
    let trainer = |(index, part): (usize, &Vec<usize>)| -> Box<dyn Trainer> {
        let (train, held_out) = data.subset(part).split(0.2, config.seed).unwrap();
        let trainer = BurnTrainer::new(config.clone(), peer(index), train, held_out).unwrap();
        if index < bad { Box::new(Flipped { start: trainer.weights(), trainer }) } else { Box::new(trainer) }
    };
    parts.iter().enumerate().map(trainer).collect()
}

/// A peer whose loss is a bowl, `Σ curvature · (w − centre)² / 2`: the gradient is exact, and the minimum of several bowls too.
struct Bowl {
    curvature: Vec<f32>,
    centre: Vec<f32>,
    steps: u64,
    weights: Weights,
    correction: Vec<f32>,
}

/// The length of its steps.
const RATE: f32 = 0.05;

impl Bowl {
    fn new(curvature: &[f32], centre: &[f32], steps: u64) -> Self {
        let tensor = TensorSpec { name: "w".into(), shape: vec![curvature.len()] };
        Self {
            curvature: curvature.to_vec(),
            centre: centre.to_vec(),
            steps,
            weights: Weights::zeros(Arc::new(Layout { tensors: vec![tensor] })),
            correction: vec![0.0; curvature.len()],
        }
    }
}

impl Trainer for Bowl {
    fn num_examples(&self) -> u64 {
        1
    }

    fn weights(&self) -> Weights {
        self.weights.clone()
    }

    fn set_weights(&mut self, weights: &Weights) -> Result<(), TrainError> {
        self.weights = weights.clone();
        Ok(())
    }

    fn train(&mut self, _: Round, _: &mut OnProgress<'_>) -> Result<Metrics, TrainError> {
        for _ in 0..self.steps {
            let shape = self.curvature.iter().zip(&self.centre).zip(&self.correction);
            for (value, ((curvature, centre), correction)) in self.weights.values_mut().iter_mut().zip(shape) {
                *value -= RATE * (curvature * (*value - centre) + correction);
            }
        }
        Ok(Metrics { num_examples: 1, ..Metrics::default() })
    }

    fn step_sum(&self) -> f64 {
        f64::from(RATE) * self.steps as f64
    }

    fn set_correction(&mut self, correction: Option<Vec<f32>>) -> Result<(), TrainError> {
        self.correction = correction.unwrap_or_else(|| vec![0.0; self.centre.len()]);
        Ok(())
    }

    fn evaluate(&mut self) -> Result<Metrics, TrainError> {
        Ok(Metrics::default())
    }
}

/// Four peers that want different things, two values each, and make different numbers of steps.
const BOWLS: [([f32; 2], [f32; 2], u64); 4] = [
    ([1.0, 0.5], [4.0, -2.0], 10),
    ([0.2, 2.0], [-6.0, 1.0], 5),
    ([2.0, 1.0], [1.0, 3.0], 20),
    ([0.5, 0.5], [-2.0, 8.0], 1),
];

fn bowls() -> Vec<Box<dyn Trainer>> {
    let bowl = |(curvature, centre, steps): &([f32; 2], [f32; 2], u64)| -> Box<dyn Trainer> {
        Box::new(Bowl::new(curvature, centre, *steps))
    };
    BOWLS.iter().map(bowl).collect()
}

/// Where the mean of all bowls is lowest.
fn lowest(place: usize) -> f64 {
    let sum = |of: fn(f32, f32) -> f32| BOWLS.iter().map(|(a, b, _)| f64::from(of(a[place], b[place]))).sum::<f64>();
    sum(|curvature, centre| curvature * centre) / sum(|curvature, _| curvature)
}

/// How far a model is from there.
fn from_lowest(federation: &Federation) -> f64 {
    let away = |place: usize| (f64::from(federation.blob().values()[place]) - lowest(place)).abs();
    away(0).max(away(1))
}

/// Algorithm 1 of the paper (option II, global step 1) in `f64`, line by line, for one value of each bowl.
struct ByThePaper {
    place: usize,
    model: f64,
    common: f64,
    own: [f64; 4],
}

impl ByThePaper {
    fn round(&mut self, leader: usize) {
        let (mut models, mut changes) = (Vec::new(), Vec::new());
        for (index, (curvature, centre, steps)) in BOWLS.iter().enumerate().filter(|(index, _)| *index != leader) {
            let (curvature, centre) = (f64::from(curvature[self.place]), f64::from(centre[self.place]));
            let (rate, mut y) = (f64::from(RATE), self.model);
            for _ in 0..*steps {
                y -= rate * (curvature * (y - centre) - self.own[index] + self.common);
            }
            let new = self.own[index] - self.common + (self.model - y) / (*steps as f64 * rate);
            changes.push(new - self.own[index]);
            models.push(y);
            self.own[index] = new;
        }
        self.model += models.iter().map(|y| y - self.model).sum::<f64>() / models.len() as f64;
        self.common += changes.iter().sum::<f64>() / BOWLS.len() as f64;
    }
}

fn quick() -> TrainingConfig {
    TrainingConfig { hidden: vec![16], local_epochs: 1, ..TrainingConfig::default() }
}

#[test]
fn leaders_that_change_every_round_compute_what_one_would_alone() {
    for name in Strategy::NAMES {
        let strategy = named(name);
        let config = TrainingConfig { mu: if *name == "fedprox" { 0.1 } else { 0.0 }, ..quick() };
        let mut federation = Federation::new(strategy, Codecs::default(), trainers(&config, 4, Partition::Iid, 0));
        let layout = federation.members[0].workshop.layout.clone();
        let mut central = strategy.initial(trainers(&config, 1, Partition::Iid, 0)[0].weights());
        for _ in 0..3 {
            federation.round();
            let contributions: Vec<_> =
                federation.updates.iter().map(|(share, weights)| Contribution { share: *share, weights }).collect();
            central = strategy.aggregate(&layout, &central, &contributions).unwrap();
            assert_eq!(federation.blob(), central, "{name} in round {}", federation.round);
        }
    }
}

#[test]
fn every_strategy_learns() {
    for name in Strategy::NAMES {
        let config = TrainingConfig { mu: if *name == "fedprox" { 0.1 } else { 0.0 }, ..TrainingConfig::default() };
        let mut federation = Federation::new(named(name), Codecs::default(), trainers(&config, 5, Partition::Iid, 0));
        for _ in 0..4 {
            federation.round();
        }
        let accuracy = federation.accuracy(0..5);
        println!("{name}: {accuracy:.3}");
        assert!(accuracy > 0.85, "{name}: {accuracy}");
    }
}

#[test]
fn one_of_five_that_sends_its_update_reversed_ruins_the_mean_and_no_robust_rule() {
    let config = TrainingConfig { local_epochs: 2, ..TrainingConfig::default() };
    let accuracy = |name: &str, bad: usize| {
        let mut federation = Federation::new(named(name), Codecs::default(), trainers(&config, 5, Partition::Iid, bad));
        for _ in 0..5 {
            federation.round();
        }
        // Those who mean harm may say what they like.
        federation.accuracy(bad..5)
    };
    let clean = accuracy("fedavg", 0);
    println!("clean {clean:.3}");
    let ruined = accuracy("fedavg", 1);
    println!("fedavg {ruined:.3}");
    assert!(ruined < clean - 0.3, "{ruined}, without the bad one {clean}");
    for name in ["median", "trimmed-mean", "krum", "multi-krum", "bulyan", "norm-clip"] {
        let robust = accuracy(name, 1);
        println!("{name} {robust:.3}");
        assert!(robust > clean - 0.03, "{name}: {robust}, without the bad one {clean}");
    }
}

#[test]
fn scaffold_finds_the_minimum_of_all_peers_by_its_papers_algorithm_where_fedavg_does_not() {
    let mut scaffold = Federation::new(named("scaffold"), Codecs::default(), bowls());
    let mut fedavg = Federation::new(named("fedavg"), Codecs::default(), bowls());
    let mut paper = [0, 1].map(|place| ByThePaper { place, model: 0.0, common: 0.0, own: [0.0; 4] });
    for round in 0..400 {
        scaffold.round();
        fedavg.round();
        paper.iter_mut().for_each(|paper| paper.round(scaffold.round.0 as usize % 4));
        let blob = scaffold.blob();
        for paper in &paper {
            let [model, sum] = [paper.place, 2 + paper.place].map(|place| f64::from(blob.values()[place]));
            let far = (model - paper.model).abs().max((sum / 4.0 - paper.common).abs());
            let expected = (paper.model, paper.common);
            assert!(far < 1e-3, "round {round}, value {}: {model} {}, not {expected:?}", paper.place, sum / 4.0);
        }
    }
    println!("away from the minimum: scaffold {:.6}, fedavg {:.3}", from_lowest(&scaffold), from_lowest(&fedavg));
    assert!(from_lowest(&scaffold) < 1e-3, "{}", from_lowest(&scaffold));
    assert!(from_lowest(&fedavg) > 0.2, "{}", from_lowest(&fedavg));
}

#[test]
fn scaffold_finds_the_minimum_of_all_peers_also_when_one_of_them_comes_later() {
    let mut trainers = bowls();
    let late = trainers.pop().unwrap();
    let mut federation = Federation::new(named("scaffold"), Codecs::default(), trainers);
    (0..20).for_each(|_| federation.round());
    let before = from_lowest(&federation);
    federation.join(late);
    (0..400).for_each(|_| federation.round());
    let after = from_lowest(&federation);
    assert!(before > 0.1 && after < 1e-3, "{before}, then {after}");
}

#[test]
fn scaffold_finds_the_minimum_of_all_data_with_every_kind_of_sgd() {
    // Each of three peers has the digits of a few labels alone, as many as the others, and nothing is left to chance.
    let data = Dataset::digits().subset(&(0..600).collect::<Vec<_>>());
    let parts = Partition::Shards { shards_per_peer: 1 }.of(&data, 3, 1).unwrap();
    let regression = TrainingConfig {
        model: Model::Linear,
        batch_size: data.len(),
        local_steps: Some(10),
        learning_rate: 0.03,
        momentum: 0.0,
        weight_decay: 0.3,
        ..TrainingConfig::default()
    };
    let trainer = |config: &TrainingConfig, part: &[usize], index: usize| {
        BurnTrainer::new(config.clone(), peer(index), data.subset(part), data.subset(&[])).unwrap()
    };
    let long = TrainingConfig { local_steps: Some(1500), ..regression.clone() };
    let mut pooled = trainer(&long, &parts.concat(), 0);
    pooled.train(Round(1), &mut |_| ControlFlow::Continue(())).unwrap();
    let lowest = pooled.weights();

    let far = |name: &str, config: &TrainingConfig| {
        let boxed = |(index, part): (usize, &Vec<usize>)| Box::new(trainer(config, part, index)) as Box<dyn Trainer>;
        let trainers = parts.iter().enumerate().map(boxed).collect();
        let mut federation = Federation::new(named(name), Codecs::default(), trainers);
        (0..120).for_each(|_| federation.round());
        let squares = federation.blob().values().iter().zip(lowest.values()).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
        (squares / lowest.values().iter().map(|value| value.powi(2)).sum::<f32>()).sqrt()
    };
    let heavy = TrainingConfig { momentum: 0.9, learning_rate: 0.006, ..regression.clone() };
    let kinds = [
        ("plain", regression.clone()),
        ("momentum", heavy.clone()),
        ("nesterov", TrainingConfig { nesterov: true, ..heavy }),
        ("schedule", TrainingConfig { schedule: Schedule::Exponential, schedule_gamma: 0.99, ..regression }),
    ];
    for (kind, config) in kinds {
        let (scaffold, fedavg) = (far("scaffold", &config), far("fedavg", &config));
        println!("{kind}: away from the minimum, as a share of it: scaffold {scaffold:.5}, fedavg {fedavg:.5}");
        assert!(scaffold < 0.01 && fedavg > 10.0 * scaffold, "{kind}: scaffold {scaffold}, fedavg {fedavg}");
    }
}

#[test]
fn scaffolds_control_is_the_sum_of_all_members_own() {
    let config = TrainingConfig { momentum: 0.0, ..quick() };
    let partition = Partition::Dirichlet { alpha: 0.3 };
    let mut federation = Federation::new(named("scaffold"), Codecs::default(), trainers(&config, 3, partition, 0));
    for _ in 0..5 {
        federation.round();
        let values = federation.members[0].workshop.layout.len();
        let common = federation.blob().into_values().split_off(values);
        let own: Vec<Vec<f32>> = (0..3).map(|index| federation.own_control(index)).collect();
        let far = (0..values)
            .map(|place| (own.iter().map(|own| own[place]).sum::<f32>() - common[place]).abs())
            .fold(0.0, f32::max);
        assert!(far < 3e-5, "round {}: {far}", federation.round);
    }
    assert!(federation.own_control(0).iter().any(|value| value.abs() > 1e-3));
}

#[test]
fn scaffold_sends_half_values_too() {
    for updates in [Codec::F16, Codec::Bf16] {
        let codecs = Codecs { updates, ..Codecs::default() };
        let mut federation = Federation::new(named("scaffold"), codecs, trainers(&quick(), 3, Partition::Iid, 0));
        let before = federation.accuracy(0..3);
        for _ in 0..3 {
            federation.round();
        }
        let after = federation.accuracy(0..3);
        assert!(after > before + 0.3, "{updates}: {before}, then {after}");
    }
}

/// The figures of the README: five peers, ten rounds of one local epoch, on images that the variable `DATA` names.
///
/// `DATA=idx:DIR cargo test --release --test strategies figures -- --ignored --nocapture`; `ONLY=krum`, say, measures only the
/// rows in which this text stands, and `ROUNDS=20` makes twice as many.
#[test]
#[ignore = "takes minutes and a data set"]
fn figures() {
    let source = std::env::var("DATA").expect("DATA names the data, as --data does");
    let source = Source::parse(&source).expect("DATA is written as --data is");
    let Train::Whole(data) = source.read(None, &ReadOptions::default()).unwrap().train else { panic!("one set") };
    let cnn = TrainingConfig {
        model: Model::Cnn,
        learning_rate: 0.05,
        momentum: 0.9,
        batch_size: 32,
        local_epochs: 1,
        ..TrainingConfig::default()
    };
    let only = std::env::var("ONLY").unwrap_or_default();
    let rounds = std::env::var("ROUNDS").map_or(10, |text| text.parse().expect("ROUNDS is a whole number"));
    let run = |what: &str, name: &str, partition: Partition, bad: usize| {
        if !format!("| {what} | {name} |").contains(&only) {
            return;
        }
        let config = TrainingConfig { mu: if name == "fedprox" { 0.01 } else { 0.0 }, ..cnn.clone() };
        let started = std::time::Instant::now();
        let trainers = trainers_on(&data, &config, 5, partition, bad);
        let mut federation = Federation::new(named(name), Codecs::default(), trainers);
        (0..rounds).for_each(|_| federation.round());
        let accuracy = federation.accuracy(bad..5);
        println!("| {what} | {name} | {rounds} | {accuracy:.4} | {:.1} |", started.elapsed().as_secs_f64());
    };
    println!("| data | strategy | rounds | accuracy | seconds |");
    for (what, partition) in [("iid", Partition::Iid), ("dirichlet 0.3", Partition::Dirichlet { alpha: 0.3 })] {
        for name in ["fedavg", "fedprox", "fedadam", "scaffold"] {
            run(what, name, partition, 0);
        }
    }
    for name in ["fedavg", "median", "trimmed-mean", "krum", "multi-krum", "bulyan", "norm-clip"] {
        run("iid, one of five reversed ×10", name, Partition::Iid, 1);
    }
}
