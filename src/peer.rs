//! One peer of this machine: settings become a journal, a trainer and a transport, and a node that runs them.
//!
//! `join` runs one of these, a [cluster](crate::cluster) many.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::broker::BrokerConfig;
use crate::config::{NONE, Part, Settings};
use crate::events::{Entry, Event, Witness};
use crate::journal::{Journal, JournalError};
use crate::node::{self, Hosted, Meeting, Node, NodeError, Outcome, Storage};
use crate::protocol::{self, Difference, Durable, Topics};
use crate::training::export::{self, from_safetensors};
use crate::training::external::{ExternalConfig, ExternalTrainer};
use crate::training::{
    BurnTrainer, DataError, Dataset, Examples, Partition, PartitionError, ReadError, Seen, Source, Task, Train,
    TrainError, Trainer, histogram,
};
use crate::transport::mqtt::probe::Probe;
use crate::transport::mqtt::{MqttConfig, MqttTransport, TransportError};
use crate::types::{Address, Digest, PeerId};
use crate::weights::Layout;

/// How often a connection shows that it lives. A dead one is noticed at the other end at once, or after
/// `election_timeout` by its silence; this is for the broker, which then frees its place.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// How long a broker that is not there yet is waited for before that is told: long enough for one that was started just before.
const BROKER_PATIENCE: Duration = Duration::from_secs(3);

/// How long the broker of this program is waited for, which is there, however slow a machine with very many peers is.
const OWN_BROKER_PATIENCE: Duration = Duration::from_secs(120);

/// How long a broker may keep silent when it is tried. Only one that cannot do what is asked is waited for; a cluster that
/// has just lost a server needs some seconds to agree on who takes its place.
const PROBE_PATIENCE: Duration = Duration::from_secs(10);

/// What all peers of a federation may change alike when they start again. Anything else would be another model or other
/// data: with another seed, examples that were trained on would be held out.
const MAY_CHANGE: [&str; 27] = [
    "min_peers",
    "min_updates",
    "rounds",
    "target_accuracy",
    "tolerance",
    "patience",
    "policy",
    "fraction_train",
    "leader_trains",
    "round_timeout",
    "election_timeout",
    "settle_time",
    "chunk_bytes",
    "optimizer",
    "learning_rate",
    "schedule",
    "schedule_gamma",
    "schedule_rounds",
    "warmup_rounds",
    "momentum",
    "nesterov",
    "weight_decay",
    "max_grad_norm",
    "batch_size",
    "local_epochs",
    "local_steps",
    "augment",
];

/// How long the gradient of a step may be where a number is told, unless the settings say so.
const NUMBERS_GRAD_NORM: f64 = 1.0;

/// A peer that is ready to run: its data are here, its state directory is open.
pub struct LocalPeer {
    settings: Settings,
    name: PeerId,
    state_dir: PathBuf,
    journal: Journal,
    durable: Option<Durable>,
    trainer: Box<dyn Trainer>,
    lesson: Lesson,
    hosted: Option<Hosted>,
    /// Whether its broker need not be tried.
    trusts_broker: bool,
}

/// What is to be told of a peer's data.
#[derive(Clone, Debug, Default)]
pub struct Lesson {
    /// Where they come from.
    pub data: String,
    /// What is to be learned from each example, in words.
    pub task: String,
    /// How many examples are held out to measure with, if that is known.
    pub num_held_out: Option<usize>,
    /// What each label stands for.
    pub class_names: Vec<String>,
    /// How many examples of each label there are to train on; empty where examples have no class of their own.
    pub histogram: Vec<usize>,
    /// What the peers must agree on, by key, as text.
    pub entries: BTreeMap<String, String>,
}

/// Why a peer cannot run.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// Its state directory cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Its state is not what this version writes.
    #[error("{} holds promises that this version cannot read", .0.display())]
    State(PathBuf),
    /// It was started for something else than the federation that its state is of.
    #[error("the federation of {} has {}", dir.display(), asked_for(difference))]
    OtherSettings {
        /// Its state directory.
        dir: PathBuf,
        /// Something on which peers agree: what the federation has, and what is asked for.
        difference: Difference,
    },
    /// The data that a run shares out are not those that it began with.
    #[error("the data are not those that the run of {} began with: shared out anew, examples that were trained on would be held out", dir.display())]
    OtherData {
        /// The state directory of the peer that noticed.
        dir: PathBuf,
    },
    /// An accuracy is asked for where there is none.
    #[error("target_accuracy = {target}, and its data have a number to tell, of which there is no accuracy")]
    NoAccuracy {
        /// The accuracy asked for.
        target: f64,
    },
    /// Its data cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It is not said which of many files is its own.
    #[error("{pattern} stands for {files} files, and this peer is {}", part.map_or("no part of a run".into(), |part| part.to_string()))]
    Pattern {
        /// The pattern.
        pattern: Source,
        /// How many files have such a name.
        files: usize,
        /// Which part of a run this peer is.
        part: Option<Part>,
    },
    /// Its data cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The data set cannot be split.
    #[error(transparent)]
    Partition(#[from] PartitionError),
    /// Its model and its data do not go together.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// The model that it is to start from cannot be used.
    #[error("init = {}: {why}", path.display())]
    Init {
        /// Its file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// No broker was reached.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// It failed while it ran.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// Its task panicked: a bug.
    #[error("its task ended without a result")]
    LostTask,
}

impl LocalPeer {
    /// Opens the state directory, which the settings name, and loads the data.
    ///
    /// # Panics
    /// If the settings name no state directory: the caller chooses one.
    pub fn open(settings: &Settings) -> Result<Self, PeerError> {
        Self::open_with(settings, None)
    }

    /// The same with data that were read before for all peers of one process.
    ///
    /// # Panics
    /// If the settings name no state directory: the caller chooses one.
    pub fn open_with(settings: &Settings, examples: Option<&Examples>) -> Result<Self, PeerError> {
        Self::with(settings, |name, mut seen| {
            if let Some(command) = &settings.trainer {
                let trainer = ExternalTrainer::start(external(settings, command), name.clone())?;
                let lesson =
                    Lesson { data: "its own".into(), task: format!("trained by {command}"), ..Lesson::default() };
                return Ok((Box::new(trainer) as Box<dyn Trainer>, lesson, seen));
            }
            let (train, held_out) = match examples {
                Some(examples) => own_data(settings, examples, &seen)?,
                None => own_data(settings, &read_data(settings)?, &seen)?,
            };
            seen.note(&train, &held_out);
            let mut lesson = Lesson::of(settings, &train, &held_out);
            let mut training = settings.training();
            if train.task() == Task::Numbers {
                if let Some(target) = settings.target_accuracy {
                    return Err(PeerError::NoAccuracy { target });
                }
                // Squared errors have gradients of any length: columns that go together make the steps grow without end.
                training.max_grad_norm.get_or_insert(NUMBERS_GRAD_NORM);
            }
            let mut trainer = BurnTrainer::new(training, name.clone(), train, held_out)?;
            // Any peer may be the one whose initial weights all start from: they must have the same.
            let init = settings.init.as_deref().map(|path| start_from(&mut trainer, path)).transpose()?;
            lesson.entries.insert("init".into(), init.map_or_else(|| NONE.to_owned(), |digest| digest.to_string()));
            Ok((Box::new(trainer), lesson, seen))
        })
    }

    /// A peer that trains in a way of its own. What [`Settings`] say of models, training and data is not for it, but peers
    /// must agree on it all the same.
    ///
    /// # Panics
    /// If the settings name no state directory: the caller chooses one.
    pub fn of_trainer(settings: &Settings, trainer: Box<dyn Trainer>) -> Result<Self, PeerError> {
        Self::with(settings, |_, seen| Ok((trainer, Lesson { data: "its own".into(), ..Lesson::default() }, seen)))
    }

    /// `make` gets the examples that the peer had before, and returns them with those that it has now.
    fn with(
        settings: &Settings,
        make: impl FnOnce(&PeerId, Seen) -> Result<(Box<dyn Trainer>, Lesson, Seen), PeerError>,
    ) -> Result<Self, PeerError> {
        let state_dir = settings.state_dir.clone().expect("the caller has chosen a state directory");
        let (journal, loaded) = Journal::open(&state_dir, &settings.federation, settings.peer.as_ref())?;
        let decode = |bytes: &Vec<u8>| {
            Durable::decode(bytes).ok_or_else(|| PeerError::State(state_dir.join(Journal::STATE_FILE)))
        };
        let durable = loaded.state.as_ref().map(decode).transpose()?;
        // A damaged model is for people to look at, and before anybody counts on this peer. It is read once.
        for manifest in durable.iter().flat_map(Durable::manifests) {
            journal.blobs().open(manifest.digest)?;
        }
        let name = loaded.peer;
        // Before that nothing is trained.
        let begun = durable.as_ref().filter(|durable| durable.head.is_some());
        let before = if begun.is_some() { seen_examples(&journal)? } else { Seen::default() };
        let (trainer, lesson, seen) = make(&name, before.clone())?;
        let agreed = shared(settings, &lesson).entries();
        if let Some(durable) = begun
            && let Some(before) = journal.settings()?
            && let Some(difference) = other_federation(durable, before, agreed.clone())
        {
            return Err(PeerError::OtherSettings { dir: state_dir, difference });
        }
        if seen != before {
            // Shared out anew, they would go to other peers, which do not know on what was trained.
            if settings.part.is_some() && !before.is_empty() {
                return Err(PeerError::OtherData { dir: state_dir });
            }
            journal.save_examples(&seen.encode())?;
        }
        journal.save_settings(&agreed)?;
        let (hosted, trusts_broker) = (None, false);
        Ok(Self {
            settings: settings.clone(),
            name,
            state_dir,
            journal,
            durable,
            trainer,
            lesson,
            hosted,
            trusts_broker,
        })
    }

    /// Its name.
    pub fn name(&self) -> &PeerId {
        &self.name
    }

    /// The federation that it takes part in.
    pub fn federation(&self) -> &str {
        &self.settings.federation
    }

    /// The brokers where it meets the others, the best first: those that its settings name, then the standbys that it
    /// learned of in an earlier run.
    pub fn brokers(&self) -> Vec<String> {
        self.meeting().list(self.durable.iter().flat_map(Durable::standbys))
    }

    /// The same peer, which hosts a broker: it announces it, and meets the others there if its settings name none.
    #[must_use]
    pub fn hosting(mut self, hosted: Hosted) -> Self {
        if self.settings.brokers.is_empty() {
            self.settings.brokers.push(hosted.local.clone());
        }
        self.hosted = Some(hosted);
        self
    }

    /// Where others reach the broker that it hosts, if it hosts one that they can reach.
    pub fn advertised(&self) -> Option<&Address> {
        self.hosted.as_ref().and_then(|hosted| hosted.advertised.as_ref())
    }

    fn meeting(&self) -> Meeting {
        Meeting { brokers: self.settings.brokers.clone(), hosted: self.hosted.clone() }
    }

    /// The same peer, which does not try what its broker can do: it is one of this program, started for these settings.
    #[must_use]
    pub fn trusting_its_broker(mut self) -> Self {
        self.trusts_broker = true;
        self
    }

    /// Where it keeps its state.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// Names and shapes of its model, as far as they are known before it has met the others.
    pub fn layout(&self) -> Arc<Layout> {
        self.trainer.layout()
    }

    /// Whether it goes on where an earlier run of it stopped.
    pub fn is_resumed(&self) -> bool {
        self.durable.is_some()
    }

    /// Whether its federation had finished when it stopped.
    pub fn has_finished(&self) -> bool {
        self.durable.as_ref().is_some_and(is_finished)
    }

    /// What is to be told of its data.
    pub fn lesson(&self) -> &Lesson {
        &self.lesson
    }

    /// How many examples it trains on.
    pub fn num_examples(&self) -> u64 {
        self.trainer.num_examples()
    }

    /// Takes part until the federation finishes or `stop` ends; tells what happens.
    ///
    /// A peer whose future is dropped instead goes without a goodbye: its last will speaks for it.
    pub async fn run(
        self,
        stop: impl Future<Output = ()>,
        tell: &mut (dyn FnMut(Entry) + Send),
    ) -> Result<Outcome, PeerError> {
        let (name, num_examples) = (self.name.clone(), self.num_examples());
        let version = env!("CARGO_PKG_VERSION").to_owned();
        tell(Entry::now(&name, Event::Started { pid: std::process::id(), version, num_examples }));
        let mut witness = Witness::new(name.clone());
        let ended = self.take_part(stop, &mut witness, tell).await;
        let last = match &ended {
            Ok(outcome) => witness.see_end(outcome),
            Err(error) => Some(Entry::now(&name, Event::Ended { why: error.to_string() })),
        };
        last.into_iter().for_each(tell);
        ended
    }

    async fn take_part(
        self,
        stop: impl Future<Output = ()>,
        witness: &mut Witness,
        tell: &mut (dyn FnMut(Entry) + Send),
    ) -> Result<Outcome, PeerError> {
        let mut stop = std::pin::pin!(stop);
        let meeting = self.meeting();
        let topics = Topics::new(&self.settings.prefix, &self.settings.federation);
        let config = shared(&self.settings, &self.lesson);
        let mqtt = self.mqtt_config(&topics);
        let wait_timeout = if self.trusts_broker { OWN_BROKER_PATIENCE } else { self.settings.wait_timeout };
        let mut tell_waiting = |what| tell(Entry::now(&self.name, Event::Waiting { what }));
        let connecting = connect(&mqtt, wait_timeout, &mut tell_waiting);
        let transport = tokio::select! {
            transport = connecting => transport?,
            () = &mut stop => return Ok(Outcome::Interrupted),
        };
        let node = Node {
            peer: self.name,
            config,
            codecs: self.settings.codecs(),
            topics,
            transport,
            meeting,
            storage: Storage::Disk(self.journal),
            durable: self.durable,
            trainer: self.trainer,
            threads: self.settings.threads,
            wait_timeout: Some(self.settings.wait_timeout),
        };
        let mut observe = |observation: node::Observation<'_>| {
            if let Some(entry) = witness.see(&observation) {
                tell(entry);
            }
        };
        Ok(node.run(stop, &mut observe).await?)
    }

    fn mqtt_config(&self, topics: &Topics) -> MqttConfig {
        MqttConfig {
            brokers: self.brokers(),
            federation: self.settings.federation.clone(),
            peer: self.name.clone(),
            keep_alive: KEEP_ALIVE,
            packet_bytes_max: BrokerConfig::for_chunks(self.settings.chunk_bytes).packet_bytes_max,
            will: Some(node::last_will(&self.name, topics)),
            control_filters: topics.control_filters(&self.name),
            bulk_filters: topics.bulk_filters(&self.name),
            hello_first: true,
            probe: (!self.trusts_broker).then(|| Probe {
                topic: topics.probe(&self.name),
                chunk_bytes: self.settings.chunk_bytes,
                patience: PROBE_PATIENCE,
            }),
        }
    }
}

/// Connects to a broker, and waits for one that is not there yet: machines start in any order.
async fn connect(
    config: &MqttConfig,
    wait_timeout: Duration,
    tell_waiting: &mut (dyn FnMut(Option<String>) + Send),
) -> Result<MqttTransport, TransportError> {
    let started = Instant::now();
    let mut waits = false;
    loop {
        let left = wait_timeout.saturating_sub(started.elapsed());
        match MqttTransport::connect(config.clone(), BROKER_PATIENCE.min(left)).await {
            Err(TransportError::Unreachable(why)) if started.elapsed() < wait_timeout => {
                if !waits {
                    tell_waiting(Some(format!("no broker answers at {why}; waiting for one")));
                }
                waits = true;
            }
            connected => {
                if waits {
                    tell_waiting(None);
                }
                return connected;
            }
        }
    }
}

/// What the peers agree on.
fn shared(settings: &Settings, lesson: &Lesson) -> protocol::Config {
    let mut config = settings.shared();
    config.training.extend(lesson.entries.clone());
    config
}

fn is_finished(durable: &Durable) -> bool {
    durable.head.as_ref().is_some_and(|head| head.decree.reason().is_some())
}

/// What makes the settings those of another federation than the one whose state this is.
fn other_federation(
    durable: &Durable,
    mut before: BTreeMap<String, String>,
    mut now: BTreeMap<String, String>,
) -> Option<Difference> {
    // Of one that has finished nobody is left to say what does not fit, and its result is not what is asked for.
    if !is_finished(durable) {
        for settings in [&mut before, &mut now] {
            settings.retain(|key, _| !MAY_CHANGE.contains(&key.as_str()));
        }
    }
    Difference::between(&before, &now)
}

fn asked_for(Difference { key, theirs, mine }: &Difference) -> String {
    format!("{key} = {theirs}, and now {key} = {mine} is asked for")
}

impl Lesson {
    fn of(settings: &Settings, train: &Dataset, held_out: &Dataset) -> Self {
        // How many features and classes a table makes is known only with those of all peers.
        let features = match (train.table(), settings.part) {
            (Some(table), None) => format!("{} columns", table.columns.len()),
            _ => format!("{} features", train.num_features()),
        };
        let here = if train.table().is_some() && settings.part.is_none() { " here" } else { "" };
        let task = match train.task() {
            Task::Classes(1) => format!("{features}, 1 class{here}"),
            Task::Classes(classes) => format!("{features}, {classes} classes{here}"),
            Task::Numbers => format!("{features}, a number to tell"),
            Task::Steps(classes) => format!("{} characters, the next of {classes} to tell", train.num_features()),
        };
        let all: Vec<usize> = (0..train.labels().len()).collect();
        Self {
            data: settings.data.clone(),
            task,
            num_held_out: Some(held_out.len()),
            class_names: train.class_names().to_vec(),
            histogram: if all.is_empty() { all } else { histogram(train.labels(), &all, train.num_classes()) },
            entries: train.shared_entries(),
        }
    }
}

/// What the external program of a peer needs to know.
fn external(settings: &Settings, command: &str) -> ExternalConfig {
    let state_dir = settings.state_dir.clone().expect("the caller has chosen a state directory");
    ExternalConfig {
        command: command.to_owned(),
        timeout: settings.trainer_timeout,
        dir: state_dir.join("trainer"),
        part: settings.part.map(|part| (part.index, part.of)),
        seed: settings.seed,
        local_epochs: settings.local_epochs,
        batch_size: settings.batch_size,
        learning_rate: settings.learning_rate,
    }
}

/// Reads the data set that the settings name.
pub fn read_data(settings: &Settings) -> Result<Examples, ReadError> {
    settings.source().read(settings.held_out_source().as_ref(), &settings.read_options())
}

/// The examples that a peer had in earlier runs.
fn seen_examples(journal: &Journal) -> Result<Seen, PeerError> {
    let Some(bytes) = journal.examples()? else { return Ok(Seen::default()) };
    Seen::decode(&bytes).ok_or_else(|| PeerError::State(journal.dir().join(Journal::EXAMPLES_FILE)))
}

/// The examples of this peer to train on and to measure with: the data set, or its part of it.
fn own_data(settings: &Settings, examples: &Examples, seen: &Seen) -> Result<(Dataset, Dataset), PeerError> {
    let train = match (&examples.train, settings.part) {
        (Train::Whole(all), None) => all.clone(),
        (Train::Whole(all), Some(part)) => share(all, settings.partition(), part, settings.seed)?,
        (Train::Each(sets), Some(part)) if part.of == sets.len() => sets[part.index - 1].clone(),
        (Train::Each(sets), part) => {
            return Err(PeerError::Pattern { pattern: settings.source(), files: sets.len(), part });
        }
    };
    // Of data that a run shares out, all classes are known. Other peers may have more than this one.
    if let (Some(_), Some(table), Task::Classes(1)) = (settings.part, train.table(), train.task()) {
        let (column, class) = (table.label.clone(), train.class_names().concat());
        return Err(DataError::OneClass { column, class }.into());
    }
    let Some(held_out) = &examples.held_out else {
        return Ok(train.split_as_before(settings.val_fraction, settings.seed, seen)?);
    };
    // Of what is held out for all, each measures with a part: the mean over all peers is that of the whole.
    let held_out = match settings.part.filter(|part| part.of <= held_out.len()) {
        Some(part) => share(held_out, Partition::Iid, part, settings.seed)?,
        None => held_out.clone(),
    };
    Ok((train, held_out))
}

fn share(data: &Dataset, partition: Partition, part: Part, seed: u64) -> Result<Dataset, PartitionError> {
    let parts = partition.of(data, part.of, seed)?;
    Ok(data.subset(&parts[part.index - 1]))
}

/// Gives a trainer the weights in a file; returns their digest.
fn start_from(trainer: &mut BurnTrainer, path: &Path) -> Result<Digest, PeerError> {
    let failed = |why: String| PeerError::Init { path: path.to_owned(), why };
    let bytes = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
    let (given, _) = from_safetensors(&bytes).map_err(|error| failed(error.to_string()))?;
    trainer.start_from(&given).map_err(|error| failed(error.to_string()))?;
    Ok(export::digest(&given))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::config::Layers;
    use crate::protocol::message::Head;
    use crate::protocol::{Decree, Outcome as Decided, Reason, Roster};
    use crate::training::export::to_safetensors;
    use crate::transfer::{Codec, Manifest};
    use crate::types::Incarnation;

    fn settings(state_dir: &Path) -> Settings {
        let state_dir = Some(state_dir.to_owned());
        Settings { state_dir, peer: Some(PeerId::new("a").unwrap()), ..Layers::new().settings().unwrap() }
    }

    #[test]
    fn the_parts_of_a_data_set_are_the_whole() {
        let dir = tempfile::tempdir().unwrap();
        let examples = read_data(&settings(dir.path())).unwrap();
        let of_part = |part: Option<Part>| {
            own_data(&Settings { part, ..settings(dir.path()) }, &examples, &Seen::default()).unwrap()
        };
        let parts: Vec<_> = (1..=4).map(|index| of_part(Some(Part { index, of: 4 }))).collect();
        let size = |(train, held_out): &(Dataset, Dataset)| train.len() + held_out.len();
        assert_eq!(parts.iter().map(size).sum::<usize>(), size(&of_part(None)));
        assert_ne!(parts[0], parts[1]);
    }

    #[test]
    fn each_file_of_a_pattern_is_one_peers_and_what_is_held_out_is_shared() {
        let dir = tempfile::tempdir().unwrap();
        for (name, ages) in [("a.csv", 0..10), ("b.csv", 10..30), ("test.txt", 30..40)] {
            let lines: String = ages.map(|age| format!("{age},{}\n", age % 2)).collect();
            std::fs::write(dir.path().join(name), lines).unwrap();
        }
        let data = format!("csv:{}/*.csv", dir.path().display());
        let val_data = Some(format!("csv:{}/test.txt", dir.path().display()));
        let of_part = |part: Option<Part>| {
            let settings = Settings { part, data: data.clone(), val_data: val_data.clone(), ..settings(dir.path()) };
            own_data(&settings, &read_data(&settings).unwrap(), &Seen::default())
        };
        let sizes: Vec<_> = (1..=2)
            .map(|index| of_part(Some(Part { index, of: 2 })).unwrap())
            .map(|(train, held_out)| (train.len(), held_out.len()))
            .collect();
        assert_eq!(sizes, [(10, 5), (20, 5)]);
        for (part, what) in [(None, "no part of a run"), (Some(Part { index: 1, of: 3 }), "1/3")] {
            let error = of_part(part).unwrap_err().to_string();
            assert!(error.ends_with(&format!("stands for 2 files, and this peer is {what}")), "{error}");
        }
    }

    #[test]
    fn no_accuracy_is_waited_for_where_a_number_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let lines: String = (0..40).map(|number| format!("{number},{}\n", number * 3)).collect();
        std::fs::write(dir.path().join("a.csv"), lines).unwrap();
        let data = format!("csv:{}", dir.path().join("a.csv").display());
        let open = |target_accuracy| {
            let settings = settings(&dir.path().join("state"));
            LocalPeer::open(&Settings { target_accuracy, data: data.clone(), ..settings })
        };
        let error = open(Some(0.9)).err().unwrap().to_string();
        assert!(error.starts_with("target_accuracy = 0.9"), "{error}");
        open(None).unwrap();
    }

    #[test]
    fn a_peer_tells_what_data_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let peer = LocalPeer::open(&settings(&dir.path().join("state"))).unwrap();
        assert_eq!(peer.lesson().histogram.iter().sum::<usize>() as u64, peer.num_examples());
        assert_eq!(peer.lesson().histogram.len(), 10);
        assert!(!peer.is_resumed() && !peer.has_finished());
    }

    #[test]
    fn a_peer_starts_from_a_file_that_fits_and_refuses_another() {
        let dir = tempfile::tempdir().unwrap();
        let open = |state: &str, init: Option<&Path>, hidden: usize| {
            let settings = settings(&dir.path().join(state));
            LocalPeer::open(&Settings { init: init.map(Path::to_owned), hidden: vec![hidden], ..settings })
        };
        let mut weights = open("a", None, 4).unwrap().trainer.weights();
        weights.values_mut().fill(0.5);
        let path = dir.path().join("half.safetensors");
        std::fs::write(&path, to_safetensors(&weights, &BTreeMap::new()).unwrap()).unwrap();
        let started = open("b", Some(&path), 4).unwrap();
        assert_eq!(started.trainer.weights(), weights);
        assert_ne!(started.lesson.entries["init"], open("c", None, 4).unwrap().lesson.entries["init"]);
        let error = open("d", Some(&path), 5).err().unwrap().to_string();
        assert!(error.contains("half.safetensors") && error.contains("fc1.weight [4, 64]"), "{error}");
        assert!(open("e", Some(&dir.path().join("missing")), 4).is_err());
    }

    /// Has a peer remember that a round was decided.
    fn decide(journal: &mut Journal, outcome: impl FnOnce(Manifest) -> Decided) {
        let model = Manifest::of(b"the model", 1024, Codec::F32).unwrap();
        journal.put_blob(model.digest, &Bytes::from_static(b"the model")).unwrap();
        let roster = Roster::of([(PeerId::new("a").unwrap(), Incarnation(0))].into());
        let decree = Decree { outcome: outcome(model), ..Decree::sample(&roster) };
        let (accepts, genesis) = (Vec::new(), decree.digest());
        let durable = Durable { head: Some(Head { decree, accepts, genesis }), ..Durable::default() };
        journal.save_state(&durable.encode()).unwrap();
    }

    #[test]
    fn what_was_trained_on_is_not_held_out_later_and_a_run_is_not_shared_out_anew() {
        let (joined, of_run) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let open = |dir: &Path, part, val_fraction| LocalPeer::open(&Settings { part, val_fraction, ..settings(dir) });
        let held_out = |val_fraction| {
            let peer = open(joined.path(), None, val_fraction).unwrap();
            (peer.lesson.num_held_out.unwrap(), peer)
        };
        let (few, _) = held_out(0.2);
        let (more, mut peer) = held_out(0.5);
        assert!(few < more, "nothing was trained yet");
        decide(&mut peer.journal, Decided::Model);
        drop(peer);
        assert_eq!(held_out(0.7).0, more);

        let part = |index| Some(Part { index, of: 2 });
        let mut peer = open(of_run.path(), part(1), 0.2).unwrap();
        decide(&mut peer.journal, Decided::Model);
        drop(peer);
        assert!(open(of_run.path(), part(1), 0.2).is_ok());
        assert!(matches!(open(of_run.path(), part(2), 0.2), Err(PeerError::OtherData { .. })));
    }

    #[test]
    fn a_state_directory_is_not_taken_for_one_of_another_federation() {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path());
        let open_with =
            |rounds, hidden| LocalPeer::open(&Settings { rounds, hidden: vec![hidden], ..settings.clone() });
        let open = |rounds| open_with(rounds, 8);
        let why = |opened: Result<LocalPeer, PeerError>| opened.err().unwrap().to_string();
        drop(open_with(6, 4).unwrap());
        let mut peer = open(7).unwrap();
        decide(&mut peer.journal, Decided::Model);
        drop(peer);
        let error = why(open_with(7, 4));
        assert!(error.ends_with("has hidden = 8, and now hidden = 4 is asked for"), "{error}");
        // It is for the others to say whether they go on for longer, too.
        let mut peer = open(8).unwrap();
        decide(&mut peer.journal, |model| Decided::Finish(Reason::Rounds, model));
        drop(peer);
        assert!(open(8).unwrap().has_finished());
        let error = why(open(9));
        assert!(error.ends_with("has rounds = 8, and now rounds = 9 is asked for"), "{error}");
        let agreed = settings.shared().entries();
        assert!(MAY_CHANGE.iter().all(|key| agreed.contains_key(*key)), "a key is misspelled");
    }

    #[test]
    fn promises_that_cannot_be_read_are_refused_with_their_file() {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path());
        let (mut journal, _) = Journal::open(dir.path(), &settings.federation, settings.peer.as_ref()).unwrap();
        journal.save_state(b"not promises").unwrap();
        drop(journal);
        let Err(error) = LocalPeer::open(&settings) else { panic!("it was opened") };
        assert_eq!(
            error.to_string(),
            format!("{} holds promises that this version cannot read", dir.path().join("state").display())
        );
    }
}
