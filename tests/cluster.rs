//! Federations over the embedded broker: real peers, real messages, small rounds.

mod common {
    pub(crate) mod peers;
}

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::peers::{Peers, Running, commit, peer};
use rodizio::broker::Broker;
use rodizio::cluster::{self, Cluster, Stop, reachable_at, start_broker};
use rodizio::config::{Layers, Part, Settings};
use rodizio::events::{Entry, Event, Recorder, RoundCommitted};
use rodizio::journal::Journal;
use rodizio::node::{NodeError, Outcome};
use rodizio::peer::{LocalPeer, PeerError};
use rodizio::protocol::{Durable, Reason};
use rodizio::rundir::{BEST, EVENTS, MODEL, RunDir};
use rodizio::training::{OnProgress, TrainError, Trainer};
use rodizio::types::{Digest, Metrics, PeerId, Round};
use rodizio::weights::{Layout, TensorSpec, Weights};
use safetensors::SafeTensors;
use tokio::sync::mpsc::unbounded_channel;
use tokio::time::timeout;

/// What is waited for comes within this, or never.
const LIMIT: Duration = Duration::from_secs(600);

/// More rounds than any test lasts.
const ENDLESS: u64 = 1_000_000;

/// A broker, and the peers that meet there.
struct Place {
    broker: Broker,
    peers: Peers,
}

impl Deref for Place {
    type Target = Peers;

    fn deref(&self) -> &Peers {
        &self.peers
    }
}

impl DerefMut for Place {
    fn deref_mut(&mut self) -> &mut Peers {
        &mut self.peers
    }
}

impl Place {
    async fn new() -> Self {
        Self { broker: start_broker("127.0.0.1:0", 8, 512 << 10).await.unwrap(), peers: Peers::new(LIMIT) }
    }

    /// The settings of a federation of `peers` here. A busy machine is not to make its leaders seem silent.
    fn settings(&self, peers: usize, rounds: u64) -> Settings {
        Settings {
            peers,
            min_peers: peers,
            rounds,
            election_timeout: Duration::from_secs(30),
            round_timeout: Duration::from_secs(600),
            settle_time: Duration::from_millis(20),
            // Who gives up says what is missing, and says so before the test gives up.
            wait_timeout: LIMIT / 2,
            brokers: vec![reachable_at(self.broker.addr()).to_string()],
            ..Layers::new().settings().unwrap()
        }
    }

    /// Starts one peer.
    fn start(&self, name: &str, part: Part, settings: &Settings) -> Running {
        let state_dir = Some(self.dir.path().join(name));
        let peer = Some(peer(name));
        let peer = LocalPeer::open(&Settings { peer, state_dir, part: Some(part), ..settings.clone() }).unwrap();
        cluster::spawn(peer, &self.stop, &self.sender)
    }

    /// Starts peers `a`, `b` … that share out the data set.
    fn start_all(&self, settings: &Settings) -> Vec<Running> {
        let of = settings.peers;
        (1..=of).map(|index| self.start(["a", "b", "c", "d"][index - 1], Part { index, of }, settings)).collect()
    }

    async fn until_committed(&mut self, round: u64) -> RoundCommitted {
        let committed = |entry: &Entry| commit(entry).filter(|commit| commit.round.0 >= round).cloned();
        self.until(&format!("round {round}"), committed).await
    }
}

/// The last model's digest and accuracy, on which all must agree, and why they finished.
fn result(outcomes: &[Outcome]) -> (Digest, f64, Reason) {
    let results: Vec<_> = outcomes
        .iter()
        .map(|outcome| match outcome {
            Outcome::Finished { reason, model, metrics: Some(metrics), .. } => (*model, metrics.accuracy, *reason),
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(results.iter().all(|result| *result == results[0]), "{results:?}");
    results[0]
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_train_the_digits_to_95_percent_and_take_turns_to_lead() {
    let mut place = Place::new().await;
    let settings = Settings { target_accuracy: Some(0.95), ..place.settings(4, 20) };
    let running = place.start_all(&settings);
    let outcomes = place.ends(running).await;
    let (model, accuracy, reason) = result(&outcomes);
    assert!(accuracy >= 0.95 && reason == Reason::TargetAccuracy, "{accuracy} {reason:?}");

    let rounds = place.rounds();
    let numbers: Vec<u64> = rounds.keys().map(|round| round.0).collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
    assert_eq!(rounds.last_key_value().unwrap().1.digest, model);
    let members: BTreeSet<PeerId> = ["a", "b", "c", "d"].map(peer).into();
    for commit in rounds.values() {
        let mut contributors = members.clone();
        assert!(contributors.remove(&commit.leader));
        assert_eq!(commit.contributors, contributors.into_iter().collect::<Vec<_>>(), "all but the leader train");
        assert!(commit.bytes_sent > 0 && commit.bytes_received > 0 && commit.seconds.total > 0.0);
    }
    let leaders: Vec<_> = rounds.values().map(|commit| &commit.leader).collect();
    assert!(leaders.windows(2).all(|pair| pair[0] != pair[1]), "{leaders:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_seed_gives_one_model_to_the_bit() {
    let mut digests = Vec::new();
    for seed in [7, 7, 8] {
        let mut place = Place::new().await;
        let running = place.start_all(&Settings { seed, ..place.settings(3, 3) });
        let outcomes = place.ends(running).await;
        digests.push(result(&outcomes).0);
    }
    assert_eq!(digests[0], digests[1]);
    assert_ne!(digests[0], digests[2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_codec_all_peers_have_one_model_that_has_learned_and_one_seed_gives_one() {
    for (codec, model_codec, rounds) in
        [("f16", "f16", 4), ("bf16", "bf16", 4), ("int8", "int8", 4), ("topk", "f32", 12), ("topk", "int8", 12)]
    {
        let mut digests = Vec::new();
        for _ in 0..2 {
            let mut place = Place::new().await;
            let topk_ratio = 0.05;
            let running = place.start_all(&Settings { codec, model_codec, topk_ratio, ..place.settings(3, rounds) });
            let outcomes = place.ends(running).await;
            let (digest, accuracy, _) = result(&outcomes);
            assert!(accuracy >= 0.93, "{codec}, {model_codec}: {accuracy}\n{}", place.told());
            assert_eq!(place.rounds().len() as u64, rounds);
            digests.push(digest);
        }
        assert_eq!(digests[0], digests[1], "{codec}, {model_codec}");
    }
}

/// What a peer that is down has learned and not sent, as its state directory has it.
fn unsent(dir: &Path) -> Vec<f32> {
    let (journal, loaded) = Journal::open(dir, "default", None).unwrap();
    let durable = Durable::decode(&loaded.state.unwrap()).unwrap();
    let blob = journal.blob(durable.residual.unsent.expect("it has sent a part")).unwrap();
    let blob = blob.expect("what was not sent is kept");
    blob.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_sends_a_part_keeps_the_rest_over_a_restart() {
    let mut place = Place::new().await;
    let settings = Settings { codec: "topk", topk_ratio: 0.05, local_epochs: 20, ..place.settings(3, 12) };
    let running = place.start_all(&settings);
    place.until_committed(3).await;
    place.request.send(true).unwrap();
    place.ends(running).await;
    let stopped_after = place.rounds().len() as u64;
    assert!((3..12).contains(&stopped_after), "it was stopped too late to tell");
    for name in ["a", "b", "c"] {
        let values = unsent(&place.dir.path().join(name));
        let kept = values.iter().filter(|value| **value != 0.0).count();
        assert!(kept * 2 > values.len(), "{name} kept {kept} of {}", values.len());
    }

    place.request.send(false).unwrap();
    let running = place.start_all(&settings);
    let outcomes = place.ends(running).await;
    let (_, accuracy, _) = result(&outcomes);
    assert!(accuracy >= 0.93, "{accuracy}");
    assert_eq!(place.rounds().len(), 12, "{}", place.told());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_comes_later_contributes() {
    let mut place = Place::new().await;
    let settings = place.settings(2, ENDLESS);
    let mut running: Vec<_> =
        ["a", "b"].iter().zip(1..).map(|(name, index)| place.start(name, Part { index, of: 3 }, &settings)).collect();
    let before = place.until_committed(2).await;
    assert!(!before.next_roster.contains(&peer("late")));
    running.push(place.start("late", Part { index: 3, of: 3 }, &settings));
    let contributes = |entry: &Entry| commit(entry).is_some_and(|commit| commit.contributors.contains(&peer("late")));
    place.until("the newcomer's update", |entry| contributes(entry).then_some(())).await;
    let leads = |entry: &Entry| commit(entry).is_some_and(|commit| commit.leader == peer("late"));
    place.until("the newcomer's turn to lead", |entry| leads(entry).then_some(())).await;
    place.request.send(true).unwrap();
    assert!(place.ends(running).await.iter().all(|outcome| *outcome == Outcome::Interrupted));
    place.rounds();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_dies_in_its_round_costs_nothing_but_time() {
    let mut place = Place::new().await;
    // Training outlasts the time that the death takes by far.
    let settings = Settings { local_epochs: 100, ..place.settings(4, 3) };
    let names = ["a", "b", "c", "d"].map(peer);
    let mut running: BTreeMap<PeerId, Running> = names.into_iter().zip(place.start_all(&settings)).collect();
    let leads = |entry: &Entry| match &entry.event {
        Event::Elected { round: Round(2), leader, .. } if *leader == entry.peer => Some(leader.clone()),
        _ => None,
    };
    let leader = place.until("the leader of round 2", leads).await;
    running.remove(&leader).unwrap().abort();

    let outcomes = place.ends(running.into_values().collect()).await;
    result(&outcomes);
    let rounds = place.rounds();
    assert_eq!(rounds.len(), 3, "{}", place.told());
    let second = &rounds[&Round(2)];
    assert_ne!(second.leader, leader, "{}", place.told());
    assert!(second.term.0 > 0);
    let survivors = place.heard.iter().filter(
        |entry| matches!(&entry.event, Event::Deposed { round: Round(2), leader: of, gone: true, .. } if *of == leader),
    );
    assert!(survivors.count() >= 2, "its last will is heard:\n{}", place.told());
    // Who had trained did not train again: each survivor trained once for round 2.
    let trained = place.heard.iter().filter(|entry| matches!(entry.event, Event::Trained { round: Round(2), .. }));
    let mut trained: Vec<_> = trained.map(|entry| &entry.peer).collect();
    let count = trained.len();
    trained.dedup();
    assert_eq!(trained.len(), count, "{}", place.told());
    for contributor in &second.contributors {
        assert_ne!(*contributor, leader);
    }
    assert!(second.contributors.len() >= 2, "{:?}", second.contributors);
}

/// Learns nothing, and fails as often as is left.
struct Failing {
    weights: Weights,
    left: u32,
}

impl Failing {
    fn new(left: u32) -> Self {
        let layout = Layout { tensors: vec![TensorSpec { name: "w".into(), shape: vec![4] }] };
        Self { weights: Weights::zeros(Arc::new(layout)), left }
    }
}

impl Trainer for Failing {
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
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Err(TrainError::Failed("out of memory".into()))
            }
            None => self.evaluate(),
        }
    }

    fn evaluate(&mut self) -> Result<Metrics, TrainError> {
        Ok(Metrics { num_examples: 1, loss: 1.0, ..Metrics::default() })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_in_which_all_trainers_fail_is_tried_again_long_before_its_time_is_over() {
    let mut place = Place::new().await;
    // Longer than this test may last.
    let round_timeout = LIMIT * 10;
    let settings = Settings { election_timeout: Duration::from_secs(5), round_timeout, ..place.settings(3, 2) };
    let start = |name: &str| {
        let settings =
            Settings { peer: Some(peer(name)), state_dir: Some(place.dir.path().join(name)), ..settings.clone() };
        let peer = LocalPeer::of_trainer(&settings, Box::new(Failing::new(1))).unwrap();
        cluster::spawn(peer, &place.stop, &place.sender)
    };
    let running = ["a", "b", "c"].map(start);
    let outcomes = place.ends(running.into()).await;
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Outcome::Finished { .. })), "{outcomes:?}");
    let gave_up = |event: &Event| matches!(event, Event::Failed { what, .. } if what == "gathering");
    assert!(place.heard.iter().any(|entry| gave_up(&entry.event)), "{}", place.told());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_with_another_configuration_is_refused_with_the_key() {
    let mut place = Place::new().await;
    // Members say what they are as often as a leader may be silent.
    let settings = Settings { election_timeout: Duration::from_secs(1), ..place.settings(2, ENDLESS) };
    let running = place.start_all(&settings);
    place.until_committed(1).await;
    let other = Settings { batch_size: 8, ..settings };
    let refused = place.start("other", Part { index: 1, of: 2 }, &other);
    let outcomes = place.ends(vec![refused]).await;
    let Outcome::Refused { difference, .. } = &outcomes[0] else { panic!("{outcomes:?}") };
    assert_eq!(
        (difference.key.as_str(), difference.theirs.as_str(), difference.mine.as_str()),
        ("batch_size", "16", "8")
    );
    let told = |entry: &Entry| matches!(&entry.event, Event::Incompatible { who, key, .. } if *who == peer("other") && key == "batch_size");
    if !place.heard.iter().any(told) {
        place.until("the members' word of it", |entry| told(entry).then_some(())).await;
    }
    place.request.send(true).unwrap();
    place.ends(running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_federation_that_was_stopped_goes_on_and_one_that_finished_stays_finished() {
    let mut place = Place::new().await;
    let settings = Settings { local_epochs: 20, ..place.settings(3, 6) };
    let running = place.start_all(&settings);
    place.until_committed(2).await;
    place.request.send(true).unwrap();
    let outcomes = place.ends(running).await;
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Interrupted), "{outcomes:?}");
    let stopped_after = place.rounds().len() as u64;
    assert!(stopped_after < 6, "it was stopped too late to tell");

    place.request.send(false).unwrap();
    let running = place.start_all(&settings);
    let first = place.until_committed(1).await.round.0;
    assert!(first > 1 && first <= stopped_after + 1, "went on with round {first} after {stopped_after}");
    let outcomes = place.ends(running).await;
    let (model, ..) = result(&outcomes);
    assert_eq!(place.rounds().len(), 6, "{}", place.told());

    let again = place.start("b", Part { index: 2, of: 3 }, &settings);
    let outcomes = place.ends(vec![again]).await;
    assert_eq!(result(&outcomes).0, model);
}

/// Runs a cluster and records it, as `rodizio run` does.
async fn recorded(settings: &Settings, dir: &Path) -> Vec<(PeerId, Outcome)> {
    let cluster = Cluster::open(settings, dir).unwrap();
    let state_dirs: BTreeMap<PeerId, PathBuf> =
        cluster.peers().iter().map(|peer| (peer.name().clone(), peer.state_dir().to_owned())).collect();
    let layout = cluster.peers()[0].layout();
    let run_dir = RunDir::open(dir).unwrap();
    let mut recorder = Recorder::new(run_dir, &settings.federation, layout, settings.codecs().model, state_dirs);
    let (sender, mut receiver) = unbounded_channel();
    let (_request, stop) = Stop::new();
    let recording = async {
        while let Some(entry) = receiver.recv().await {
            assert_eq!(recorder.record(&entry), None);
        }
        assert_eq!(recorder.close(), None);
    };
    let run = async {
        let ended = cluster.run(&stop, &sender).await;
        drop(sender);
        ended
    };
    let (ended, ()) = timeout(LIMIT, async { tokio::join!(run, recording) }).await.expect("the cluster does not end");
    ended.into_iter().map(|(peer, result)| (peer, result.unwrap())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_run_directory_has_every_event_and_a_model_as_pytorch_names_it() {
    let place = Place::new().await;
    let dir = place.dir.path().join("run");
    let ended = recorded(&place.settings(3, 4), &dir).await;
    let names: Vec<&str> = ended.iter().map(|(peer, _)| peer.as_str()).collect();
    assert_eq!(names, ["peer-1", "peer-2", "peer-3"]);
    let outcomes: Vec<Outcome> = ended.into_iter().map(|(_, outcome)| outcome).collect();
    let (digest, ..) = result(&outcomes);

    let text = std::fs::read_to_string(dir.join(EVENTS)).unwrap();
    let entries: Vec<Entry> = text.lines().map(|line| Entry::from_line(line).unwrap()).collect();
    let is_of = |wanted: fn(&Event) -> bool| entries.iter().filter(|entry| wanted(&entry.event)).count();
    assert_eq!(is_of(|event| matches!(event, Event::Started { .. })), 3);
    assert_eq!(is_of(|event| matches!(event, Event::Founded { roster } if roster.len() == 3)), 3);
    assert_eq!(is_of(|event| matches!(event, Event::RoundCommitted(_))), 3 * 4);
    assert_eq!(is_of(|event| matches!(event, Event::Finished { reason, .. } if reason == "rounds")), 3);

    let losses: BTreeMap<Round, f64> = entries
        .iter()
        .filter_map(|entry| match &entry.event {
            Event::Evaluated { round, val_loss, .. } if round.0 > 0 => Some((*round, *val_loss)),
            _ => None,
        })
        .collect();
    assert_eq!(losses.len(), 4, "every model was evaluated:\n{text}");
    let best = losses.iter().min_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
    for (file, round) in [(MODEL, Round(4)), (BEST, *best)] {
        let bytes = std::fs::read(dir.join(file)).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().unwrap();
        assert_eq!(metadata["round"], round.to_string(), "{file}");
        assert_eq!(metadata["val_loss"], losses[&round].to_string(), "{file}");
        let model = SafeTensors::deserialize(&bytes).unwrap();
        let shape = |name| model.tensor(name).unwrap().shape().to_vec();
        assert_eq!(model.len(), 4);
        // nn.Linear(64, 64) and nn.Linear(64, 10) hold their weights as [out, in].
        assert_eq!((shape("fc1.weight"), shape("fc1.bias")), (vec![64, 64], vec![64]));
        assert_eq!((shape("fc2.weight"), shape("fc2.bias")), (vec![10, 64], vec![10]));
        if file == MODEL {
            assert_eq!(metadata["digest"], digest.to_string());
        }
    }
}

/// A table of patients: ages around `age`, some missing, in one of two towns.
fn patients(age: f64, count: usize, towns: [&str; 2]) -> (String, Vec<f64>) {
    let (mut text, mut ages) = ("age,town,sick\n".to_owned(), Vec::new());
    for index in 0..count {
        let own = age + (index * 7 % 20) as f64;
        let sick = if own > 50.0 { "yes" } else { "no" };
        let shown = if index % 9 == 8 { "?".to_owned() } else { own.to_string() };
        if shown != "?" {
            ages.push(own);
        }
        text += &format!("{shown},{},{sick}\n", towns[index % 2]);
    }
    (text, ages)
}

/// The settings of a peer whose table is `name`, written into the directory, and what the ages in it are.
fn with_table(place: &Place, settings: &Settings, name: &str, age: f64, towns: [&str; 2]) -> (Settings, Vec<f64>) {
    let (text, ages) = patients(age, 40, towns);
    let path = |name: &str| format!("csv:{}", place.dir.path().join(name).display());
    std::fs::write(place.dir.path().join(name), text).unwrap();
    std::fs::write(place.dir.path().join("test.csv"), patients(45.0, 10, ["Lund", "Oslo"]).0).unwrap();
    // All lines of a table are to train on, so that a test knows them.
    (Settings { data: path(name), val_data: Some(path("test.csv")), part: None, ..settings.clone() }, ages)
}

fn start_alone(place: &Place, name: &str, settings: &Settings) -> Running {
    let state_dir = Some(place.dir.path().join(format!("state-{name}")));
    let peer = LocalPeer::open(&Settings { peer: Some(peer(name)), state_dir, ..settings.clone() }).unwrap();
    cluster::spawn(peer, &place.stop, &place.sender)
}

/// How a peer standardises its inputs.
fn standardised(entry: &Entry, of: &str) -> Option<(Vec<f64>, Vec<f64>)> {
    match &entry.event {
        Event::Standardised { mean, std, .. } if entry.peer.as_str() == of => Some((mean.clone(), std.clone())),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_that_nobody_shares_are_standardised_as_if_they_were_one() {
    let mut place = Place::new().await;
    let base = Settings { hidden: vec![4], ..place.settings(2, ENDLESS) };
    let (young, mut ages) = with_table(&place, &base, "young.csv", 20.0, ["Lund", "Oslo"]);
    let (old, of_old) = with_table(&place, &base, "old.csv", 60.0, ["Oslo", "Lund"]);
    ages.extend(of_old);
    let (mean, count) = (ages.iter().sum::<f64>() / ages.len() as f64, ages.len() as f64);
    let std = (ages.iter().map(|age| (age - mean).powi(2)).sum::<f64>() / count).sqrt();

    let mut running = vec![start_alone(&place, "a", &young), start_alone(&place, "b", &old)];
    let told = place.until("how a standardises", |entry| standardised(entry, "a")).await;
    assert!((told.0[0] - mean).abs() < 1e-9 && (told.1[0] - std).abs() < 1e-9, "{told:?}, not {mean} and {std}");
    assert_eq!((&told.0[1..], &told.1[1..]), (&[0.0, 0.0][..], &[1.0, 1.0][..]), "towns are 0 or 1");
    place.until_committed(1).await;
    assert_eq!(place.heard.iter().find_map(|entry| standardised(entry, "b")), Some(told.clone()));

    // Who comes later learns of it, though its own ages are others.
    let (late, _) = with_table(&place, &base, "late.csv", 200.0, ["Lund", "Oslo"]);
    running.push(start_alone(&place, "c", &late));
    assert_eq!(place.until("how c standardises", |entry| standardised(entry, "c")).await, told);
    let contributes = |entry: &Entry| commit(entry).filter(|commit| commit.contributors.contains(&peer("c"))).cloned();
    place.until("an update of c", contributes).await;

    // Who has no towns but numbers is told so.
    let (stranger, _) = with_table(&place, &base, "stranger.csv", 50.0, ["1", "2"]);
    let stranger = Settings { val_data: None, ..stranger };
    let stranger = start_alone(&place, "d", &stranger);
    let outcomes = place.ends(vec![stranger]).await;
    let Outcome::Refused { difference, .. } = &outcomes[0] else { panic!("{outcomes:?}") };
    let said = (difference.key.as_str(), difference.theirs.as_str(), difference.mine.as_str());
    assert_eq!(said, ("column town", "categories", "numbers"));
    place.request.send(true).unwrap();
    place.ends(running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn founders_train_a_model_for_the_categories_and_classes_that_they_have_together() {
    let mut place = Place::new().await;
    let base = Settings { hidden: vec![4], min_updates: 1, ..place.settings(2, ENDLESS) };
    let dir = place.dir.path().to_owned();
    let table = |name: &str, lines: String| {
        std::fs::write(dir.join(name), format!("age,town,sick\n{lines}")).unwrap();
        let data = format!("csv:{}", dir.join(name).display());
        Settings { data, part: None, val_fraction: 0.2, ..base.clone() }
    };
    let of = |town: &str, sick: &str| (0..40).map(|age| format!("{age},{town},{sick}\n")).collect::<String>();
    // One has a single class, and the other lacks it.
    let healthy = table("healthy.csv", of("Oslo", "no"));
    let ill = table("ill.csv", of("Bath", "yes") + &of("?", "maybe"));
    let mut running = vec![start_alone(&place, "a", &healthy), start_alone(&place, "b", &ill)];
    let told = |entry: &Entry| match &entry.event {
        Event::Standardised { features, classes, tensors, .. } if entry.peer.as_str() == "a" => {
            Some((features.clone(), classes.clone(), tensors[0].clone()))
        }
        _ => None,
    };
    let (features, classes, first) = place.until("what all have", told).await;
    assert_eq!((features.join(" "), classes.join(" ")), ("age town=Bath town=Oslo".into(), "maybe no yes".into()));
    assert_eq!(first, ("fc1.weight".to_owned(), vec![4, 3]));
    place.until_committed(2).await;

    // Who comes later has a town that nobody knows, which counts as none.
    running.push(start_alone(&place, "c", &table("late.csv", of("Rome", "yes"))));
    let contributes = |entry: &Entry| commit(entry).filter(|commit| commit.contributors.contains(&peer("c"))).cloned();
    place.until("an update of c", contributes).await;

    // A class that nobody knows cannot be told by this model.
    let stranger = start_alone(&place, "d", &table("stranger.csv", of("Oslo", "yes") + &of("Oslo", "dead")));
    let ended = timeout(LIMIT, stranger).await.expect("the stranger does not end").unwrap();
    let Err(PeerError::Node(NodeError::Unfit(error))) = ended else { panic!("{ended:?}") };
    assert!(
        error.to_string().contains("\"dead\"") && error.to_string().contains("[\"maybe\", \"no\", \"yes\"]"),
        "{error}"
    );
    place.request.send(true).unwrap();
    place.ends(running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_of_tables_carries_how_its_inputs_are_standardised() {
    let place = Place::new().await;
    let base = Settings { hidden: vec![4], target_accuracy: None, ..place.settings(2, 3) };
    std::fs::create_dir(place.dir.path().join("tables")).unwrap();
    let (settings, mut ages) = with_table(&place, &base, "tables/young.csv", 20.0, ["Lund", "Oslo"]);
    ages.extend(with_table(&place, &base, "tables/old.csv", 60.0, ["Lund", "Rome"]).1);
    let data = format!("csv:{}/*.csv", place.dir.path().join("tables").display());
    let dir = place.dir.path().join("run");
    let ended = recorded(&Settings { data, ..settings }, &dir).await;
    assert!(ended.iter().all(|(_, outcome)| matches!(outcome, Outcome::Finished { .. })), "{ended:?}");
    let bytes = std::fs::read(dir.join(MODEL)).unwrap();
    let model = SafeTensors::deserialize(&bytes).unwrap();
    let mean = model.tensor("input.mean").unwrap();
    // An age, and one of the three towns that the two tables have together.
    assert_eq!((mean.shape(), model.tensor("fc1.weight").unwrap().shape()), (&[4][..], &[4, 4][..]));
    let pooled = (ages.iter().sum::<f64>() / ages.len() as f64) as f32;
    assert_eq!(mean.data()[..4], pooled.to_le_bytes());
    assert_eq!(model.tensor("input.std").unwrap().shape(), [4]);
}
