//! Events: what peers tell, in the form in which it is written down, sent to another process and shown.
//!
//! An [`Entry`] is one line of `events.jsonl`. A [`Witness`] makes entries of what a node observes; a [`Recorder`]
//! writes them into a run directory and keeps the models that they speak of.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use crate::aggregation::statistics::{Column, Summary};
use crate::journal::read_blob;
use crate::node::{Observation, Outcome, Traffic};
use crate::protocol::{Committed, Notice, Seconds};
use crate::rundir::{Inputs, MODEL, NamedModel, RunDir, RunDirError, Scales};
use crate::training::{Names, Progress};
use crate::transfer::Codec;
use crate::types::{Digest, Metrics, PeerId, Round, Term};
use crate::weights::{Layout, TensorSpec};

/// What one peer tells at one time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// When, to the millisecond.
    #[serde(with = "rfc3339")]
    pub time: SystemTime,
    /// Who tells it.
    pub peer: PeerId,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// What happened. Its name is the field `event` of a line; its own fields follow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The peer's process or task runs.
    Started {
        /// The process.
        pid: u32,
        /// The program's version.
        version: String,
        /// How many examples the peer trains on.
        num_examples: u64,
    },
    /// The broker was reached.
    Connected {
        /// Its address.
        broker: String,
    },
    /// What a broker can do, tried before the first connection to it.
    Probed {
        /// Its address.
        broker: String,
        /// A message of so many bytes passes.
        message_bytes: u64,
        /// The length of this peer's chunks there, in bytes.
        chunk_bytes: u32,
        /// The length that is set, in bytes: they are shorter where the broker's limit asks for it.
        chunk_bytes_set: u32,
        /// What it does with retained messages: `kept`, `missing` or `refused`.
        retained: String,
        /// How long it took to find out.
        seconds: f64,
    },
    /// The broker was lost.
    Disconnected {
        /// Why.
        reason: String,
    },
    /// The others are missed at this broker; the peer looks for them at another one.
    Moved {
        /// Its address.
        broker: String,
    },
    /// A compatible peer is there.
    Joined {
        /// Which.
        who: PeerId,
    },
    /// A peer said goodbye, or its last will did.
    Left {
        /// Which.
        who: PeerId,
    },
    /// A peer cannot take part with this one.
    Incompatible {
        /// Which.
        who: PeerId,
        /// The configuration key that differs.
        key: String,
        /// Its value there.
        theirs: String,
        /// Its value here.
        mine: String,
    },
    /// This peer does not fit the federation, and stays out.
    Refused {
        /// A member of the federation.
        who: PeerId,
        /// The configuration key that differs.
        key: String,
        /// Its value there.
        theirs: String,
        /// Its value here.
        mine: String,
    },
    /// The broker still keeps the last decree of a federation that finished earlier.
    EarlierFederation {
        /// Its last round.
        round: Round,
    },
    /// All is done, and the last leader keeps the last model ready for those who are away.
    Staying {
        /// For whom.
        r#for: Vec<PeerId>,
    },
    /// The federation has its first roster.
    Founded {
        /// The peers.
        roster: Vec<PeerId>,
    },
    /// It is known what the inputs of all founders are like: from each number its mean is subtracted, and the rest is
    /// divided by its standard deviation. Features that are categories have 0 and 1.
    Standardised {
        /// What each feature is called: its column, and the category where it is one.
        #[serde(default)]
        features: Vec<String>,
        /// What the classes are called, if classes are to be told.
        #[serde(default)]
        classes: Vec<String>,
        /// The tensors of the model: names and shapes.
        #[serde(default)]
        tensors: Vec<(String, Vec<usize>)>,
        /// The mean of each feature.
        mean: Vec<f64>,
        /// The standard deviation of each feature.
        std: Vec<f64>,
        /// Mean and standard deviation of the numbers to tell, if numbers are to be told.
        target: Option<[f64; 2]>,
    },
    /// The genesis is committed: the federation has its initial weights.
    Initialized {
        /// Who proposed them.
        leader: PeerId,
        /// Their blob.
        #[serde(with = "text")]
        digest: Digest,
        /// Bytes of messages that this peer sent so far.
        bytes_sent: u64,
        /// Bytes of messages that this peer received so far.
        bytes_received: u64,
    },
    /// A round has begun.
    RoundStarted {
        /// Which.
        round: Round,
        /// How many members it has.
        members: usize,
        /// Whether this peer is one.
        member: bool,
    },
    /// This peer follows a leader, or is it.
    Elected {
        /// In which round.
        round: Round,
        /// In which term.
        term: Term,
        /// Whom.
        leader: PeerId,
    },
    /// A leader or candidate was given up.
    Deposed {
        /// In which round.
        round: Round,
        /// The term given up.
        term: Term,
        /// Whom.
        leader: PeerId,
        /// Whether it left or died; else it was silent for too long.
        gone: bool,
    },
    /// This peer measured a global model on its own held-out data.
    Measured {
        /// The round that made the model.
        round: Round,
        /// Mean loss.
        val_loss: f64,
        /// Share of examples predicted right.
        val_accuracy: f64,
        /// How many held-out examples this peer has.
        num_examples: u64,
    },
    /// The metrics of a global model over all peers are known.
    Evaluated {
        /// The round that made the model.
        round: Round,
        /// The model's blob.
        #[serde(with = "text")]
        digest: Digest,
        /// Mean loss.
        val_loss: f64,
        /// Share of examples predicted right.
        val_accuracy: f64,
        /// How many examples were held out in all.
        num_examples: u64,
        /// What else there is for the task.
        #[serde(flatten)]
        scores: Scores,
    },
    /// Local training goes on. Shown, and not written down.
    Training {
        /// For which round.
        round: Round,
        /// Batches done.
        done: u64,
        /// Batches of the whole round.
        total: u64,
    },
    /// Local training ended.
    Trained {
        /// For which round.
        round: Round,
        /// The update's blob.
        #[serde(with = "text")]
        update: Digest,
        /// Mean loss on the peer's own training examples.
        loss: f64,
        /// Share of them predicted right.
        accuracy: f64,
        /// How many there are.
        num_examples: u64,
    },
    /// The leader's count of updates. Shown, and not written down.
    Gathered {
        /// In which round.
        round: Round,
        /// How many are in.
        done: usize,
        /// How many are waited for in all.
        total: usize,
    },
    /// A member's update is not in this round's model.
    LeftOut {
        /// Whose.
        who: PeerId,
        /// Why.
        why: String,
    },
    /// The round's decree is proposed.
    Proposed {
        /// In which round.
        round: Round,
        /// By whom.
        leader: PeerId,
    },
    /// A round made a new global model.
    RoundCommitted(Box<RoundCommitted>),
    /// A round made its model of fewer updates than its strategy needs to keep bad ones out.
    FewUpdates {
        /// Which round.
        round: Round,
        /// How many there were.
        updates: usize,
        /// How many there should have been.
        needed: usize,
    },
    /// A global model is here.
    ModelHeld {
        /// The round that made it.
        round: Round,
        /// Its blob.
        #[serde(with = "text")]
        digest: Digest,
    },
    /// The federation has finished.
    Finished {
        /// Why, as a word.
        reason: String,
        /// How many rounds made a model.
        rounds: Round,
        /// Mean loss of the last model over all peers.
        val_loss: Option<f64>,
        /// Share of examples that the last model predicts right, over all peers.
        val_accuracy: Option<f64>,
        /// What else there is for the task.
        #[serde(flatten)]
        scores: Scores,
        /// The last model's file in the run directory.
        model: String,
        /// The last model's blob.
        #[serde(with = "text")]
        digest: Digest,
        /// Bytes of messages that this peer sent since its last `round_committed`.
        bytes_sent: u64,
        /// Bytes of messages that this peer received since then.
        bytes_received: u64,
    },
    /// What the peer waits for has changed.
    Waiting {
        /// What for, as a sentence; nothing when it goes on.
        what: Option<String>,
    },
    /// Local work failed.
    Failed {
        /// What was tried.
        what: String,
        /// Why.
        why: String,
    },
    /// A message could not be read; told once a sender.
    BadMessage {
        /// Whose, if that could be read.
        who: Option<PeerId>,
        /// Why.
        why: String,
    },
    /// The disk of the state directory takes nothing: the peer waits, and says nothing to the others.
    Paused {
        /// The state directory.
        path: String,
        /// What is the matter with the disk.
        why: String,
    },
    /// The peer could write what it had to, and goes on.
    Resumed,
    /// The peer was asked to stop; its state is kept.
    Interrupted,
    /// The peer gave up waiting, lost its broker for good, or failed.
    Ended {
        /// Why, as a sentence.
        why: String,
    },
    /// A line of log from another process. Shown, and not written down.
    Said {
        /// The line.
        line: String,
    },
}

/// A round that made a new global model, as one peer saw it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoundCommitted {
    /// The round.
    pub round: Round,
    /// The term in which its decree was formed.
    pub term: Term,
    /// The leader that formed it.
    pub leader: PeerId,
    /// The new global model's blob.
    #[serde(with = "text")]
    pub digest: Digest,
    /// The decree.
    #[serde(with = "text")]
    pub decree: Digest,
    /// Whose updates the model is the aggregate of.
    pub contributors: Vec<PeerId>,
    /// On how many examples they trained.
    pub num_examples: u64,
    /// How many members the round had; 0 where this peer, which came in the middle of it, does not know.
    pub members: usize,
    /// The members of the next round.
    pub next_roster: Vec<PeerId>,
    /// Mean loss, over all peers, of the model that the round *started* from. The new one's comes with `evaluated`, in
    /// the next round.
    pub val_loss: Option<f64>,
    /// Share of examples that that model predicts right.
    pub val_accuracy: Option<f64>,
    /// Bytes of messages that this peer sent since the round before.
    pub bytes_sent: u64,
    /// Bytes of messages that this peer received since then.
    pub bytes_received: u64,
    /// How long each phase took for this peer.
    pub seconds: PhaseSeconds,
}

/// Metrics that only some tasks have: see [`Metrics`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Scores {
    /// Mean F1 of all classes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub val_macro_f1: Option<f64>,
    /// Area under the receiver operating characteristic, with two classes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub val_auc: Option<f64>,
    /// Root of the mean squared error, of numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub val_rmse: Option<f64>,
    /// Perplexity, of texts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub val_perplexity: Option<f64>,
}

impl From<Metrics> for Scores {
    fn from(metrics: Metrics) -> Self {
        let (val_macro_f1, val_auc) = (metrics.macro_f1, metrics.auc);
        Self { val_macro_f1, val_auc, val_rmse: metrics.rmse(), val_perplexity: metrics.perplexity() }
    }
}

/// How long each phase of a round took for one peer, in seconds: see [`Seconds`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of `Seconds`")]
pub struct PhaseSeconds {
    pub evaluate: f64,
    pub elect: f64,
    pub train: f64,
    pub gather: f64,
    pub aggregate: f64,
    pub broadcast: f64,
    pub commit: f64,
    pub total: f64,
}

impl From<Seconds> for PhaseSeconds {
    fn from(seconds: Seconds) -> Self {
        let Seconds { evaluate, elect, train, gather, aggregate, broadcast, commit, total } = seconds;
        Self { evaluate, elect, train, gather, aggregate, broadcast, commit, total }
    }
}

impl Entry {
    /// What `peer` tells now.
    pub fn now(peer: &PeerId, event: Event) -> Self {
        Self { time: SystemTime::now(), peer: peer.clone(), event }
    }

    /// The line of `events.jsonl`, without its end.
    pub fn to_line(&self) -> String {
        serde_json::to_string(self).expect("an entry holds only text and numbers")
    }

    /// Reads a line of `events.jsonl`.
    pub fn from_line(line: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(line)
    }
}

impl Event {
    /// Whether it is of interest only while it happens.
    pub fn is_passing(&self) -> bool {
        matches!(self, Event::Training { .. } | Event::Gathered { .. } | Event::Said { .. })
    }
}

fn standardised(summary: &[u8], layout: &Layout, names: &Names) -> Option<Event> {
    let (mut scales, mut target) = (Vec::new(), None);
    for column in Summary::decode(summary)?.columns {
        match column {
            Column::Number(moments) => scales.push(moments.scale()),
            Column::Categories(all) => scales.extend(all.iter().map(|_| (0.0, 1.0))),
            Column::Target(moments) => target = Some(moments.scale().into()),
            Column::Classes(_) => {}
        }
    }
    let (mean, std) = scales.into_iter().unzip();
    let tensors = layout.tensors.iter().map(|tensor| (tensor.name.clone(), tensor.shape.clone())).collect();
    Some(Event::Standardised {
        features: names.features.clone(),
        classes: names.classes.clone(),
        tensors,
        mean,
        std,
        target,
    })
}

/// How often a peer tells how far its training is.
const PROGRESS_PERIOD: Duration = Duration::from_millis(100);

/// Makes entries of what one node observes.
#[derive(Debug)]
pub struct Witness {
    peer: PeerId,
    /// Traffic up to commits that were told without it.
    carried: Traffic,
    progress_told: Option<Instant>,
}

impl Witness {
    /// A witness of the node that drives `peer`.
    pub fn new(peer: PeerId) -> Self {
        Self { peer, carried: Traffic::default(), progress_told: None }
    }

    /// What there is to tell of an observation, if anything.
    pub fn see(&mut self, observation: &Observation<'_>) -> Option<Entry> {
        let event = match observation {
            Observation::Notice(notice, traffic) => self.notice(notice, *traffic)?,
            Observation::Prepared { summary, layout, names } => standardised(summary, layout, names)?,
            Observation::Training(round, progress) => self.progress(*round, *progress)?,
            Observation::Connected(broker) => Event::Connected { broker: (*broker).to_owned() },
            Observation::Probed { broker, found, chunk_bytes: [chunk_bytes, chunk_bytes_set] } => Event::Probed {
                broker: (*broker).to_owned(),
                message_bytes: found.message_bytes as u64,
                chunk_bytes: *chunk_bytes,
                chunk_bytes_set: *chunk_bytes_set,
                retained: found.retained.name().to_owned(),
                seconds: found.took.as_secs_f64(),
            },
            Observation::Disconnected(reason) => Event::Disconnected { reason: (*reason).to_owned() },
            Observation::Moving(broker) => Event::Moved { broker: (*broker).to_owned() },
            Observation::Paused(dir, why) => Event::Paused { path: dir.display().to_string(), why: (*why).to_owned() },
            Observation::Resumed => Event::Resumed,
        };
        Some(Entry::now(&self.peer, event))
    }

    /// What there is to tell of the end of the node's run that its notices have not told.
    pub fn see_end(&self, outcome: &Outcome) -> Option<Entry> {
        let event = match outcome {
            Outcome::Finished { .. } | Outcome::Refused { .. } => return None,
            Outcome::Interrupted => Event::Interrupted,
            Outcome::FinishedWithoutModel => Event::Ended { why: WITHOUT_MODEL.to_owned() },
            Outcome::GaveUp(waiting) => Event::Ended { why: format!("gave up: {waiting}") },
            Outcome::LostBroker(reason) => Event::Ended { why: format!("gave up: the broker was lost: {reason}") },
        };
        Some(Entry::now(&self.peer, event))
    }

    fn progress(&mut self, round: Round, progress: Progress) -> Option<Event> {
        let Progress { done, total } = progress;
        let now = Instant::now();
        let due = self.progress_told.is_none_or(|told| now.duration_since(told) >= PROGRESS_PERIOD);
        if !due && done < total {
            return None;
        }
        self.progress_told = Some(now);
        Some(Event::Training { round, done, total })
    }

    fn notice(&mut self, notice: &Notice, traffic: Traffic) -> Option<Event> {
        Some(match notice.clone() {
            Notice::Joined(who) => Event::Joined { who },
            Notice::Left(who) => Event::Left { who },
            Notice::Incompatible { peer: who, difference } => {
                Event::Incompatible { who, key: difference.key, theirs: difference.theirs, mine: difference.mine }
            }
            Notice::Refused { peer: who, difference } => {
                Event::Refused { who, key: difference.key, theirs: difference.theirs, mine: difference.mine }
            }
            Notice::EarlierFederation { round } => Event::EarlierFederation { round },
            Notice::Staying(absent) => Event::Staying { r#for: absent },
            Notice::Founded(roster) => Event::Founded { roster: roster.members().to_vec() },
            Notice::RoundStarted { round, members, member } => Event::RoundStarted { round, members, member },
            Notice::Elected { round, term, leader } => Event::Elected { round, term, leader },
            Notice::Deposed { round, term, leader, gone } => Event::Deposed { round, term, leader, gone },
            Notice::Measured { round, metrics: Metrics { num_examples, loss, accuracy, .. } } => {
                Event::Measured { round, val_loss: loss, val_accuracy: accuracy, num_examples }
            }
            Notice::Evaluated { round, model, metrics } => {
                let Metrics { num_examples, loss: val_loss, accuracy: val_accuracy, .. } = metrics;
                Event::Evaluated { round, digest: model, val_loss, val_accuracy, num_examples, scores: metrics.into() }
            }
            // The first batch follows at once, and tells how many there are.
            Notice::TrainingStarted { .. } => return None,
            Notice::Trained { round, update, metrics: Metrics { num_examples, loss, accuracy, .. } } => {
                Event::Trained { round, update, loss, accuracy, num_examples }
            }
            Notice::Gathered { round, done, total } => Event::Gathered { round, done, total },
            Notice::LeftOut { peer: who, why } => Event::LeftOut { who, why },
            Notice::Proposed { round, leader } => Event::Proposed { round, leader },
            Notice::Committed(committed) => return self.committed(&committed, traffic),
            Notice::FewUpdates { round, updates, needed } => Event::FewUpdates { round, updates, needed },
            Notice::ModelHeld { round, model } => Event::ModelHeld { round, digest: model },
            Notice::Finished { reason, rounds, model, metrics } => {
                let (bytes_sent, bytes_received) = self.traffic(traffic);
                Event::Finished {
                    reason: reason.name().to_owned(),
                    rounds,
                    val_loss: metrics.map(|metrics| metrics.loss),
                    val_accuracy: metrics.and_then(|metrics| metrics.known_accuracy()),
                    scores: metrics.map(Scores::from).unwrap_or_default(),
                    model: MODEL.to_owned(),
                    digest: model,
                    bytes_sent,
                    bytes_received,
                }
            }
            Notice::Waiting(waiting) => Event::Waiting { what: waiting.map(|waiting| waiting.to_string()) },
            Notice::Failed { what, why } => Event::Failed { what: what.to_owned(), why },
            Notice::BadMessage { sender: who, why } => Event::BadMessage { who, why },
        })
    }

    /// The decree that ends the federation makes no model; `finished` tells of it, and of its traffic.
    fn committed(&mut self, committed: &Committed, traffic: Traffic) -> Option<Event> {
        let decree = &committed.decree;
        let (leader, digest) = (decree.leader.clone(), decree.model().digest);
        if decree.reason().is_some() {
            self.carried = self.carried.plus(traffic);
            return None;
        }
        let (bytes_sent, bytes_received) = self.traffic(traffic);
        if decree.round == Round::GENESIS {
            return Some(Event::Initialized { leader, digest, bytes_sent, bytes_received });
        }
        Some(Event::RoundCommitted(Box::new(RoundCommitted {
            round: decree.round,
            term: decree.term,
            leader,
            digest,
            decree: committed.digest,
            contributors: decree.contributors.iter().map(|contributor| contributor.peer.clone()).collect(),
            num_examples: decree.contributors.iter().fold(0, |sum, part| sum.saturating_add(part.num_examples)),
            members: committed.members,
            next_roster: decree.next_roster.members().to_vec(),
            val_loss: decree.parent_metrics.map(|metrics| metrics.loss),
            val_accuracy: decree.parent_metrics.and_then(|metrics| metrics.known_accuracy()),
            bytes_sent,
            bytes_received,
            seconds: committed.seconds.into(),
        })))
    }

    /// All traffic that was not told yet, sent and received.
    fn traffic(&mut self, last: Traffic) -> (u64, u64) {
        let Traffic { sent, received } = std::mem::take(&mut self.carried).plus(last);
        (sent, received)
    }
}

/// Why a peer of a finished federation ends empty-handed.
pub const WITHOUT_MODEL: &str = "the federation finished, but nobody was left to serve its last model";

/// How often it is tried to write what a full disk has refused.
const RETRY_PERIOD: Duration = Duration::from_secs(1);

/// Writes entries into a run directory, and keeps the models that they speak of.
///
/// Models are read from the state directories of the peers that tell of them. A peer keeps a model for a whole round
/// after its metrics are known, and every peer tells of them: there is time to read it.
#[derive(Debug)]
pub struct Recorder {
    run_dir: RunDir,
    federation: String,
    layout: Arc<Layout>,
    codec: Codec,
    /// Where each peer keeps its blobs.
    state_dirs: BTreeMap<PeerId, PathBuf>,
    /// What models are told of their inputs.
    inputs: Inputs,
    /// The newest model that is known, and who holds it.
    held: Option<(Round, Digest, PeerId)>,
    /// The round of the model that was saved last.
    saved: Round,
    /// The run directory failed, and that was told.
    failed: bool,
    /// When it was last tried to write what a full disk has refused.
    tried: Instant,
}

impl Recorder {
    /// A recorder for the peers of `federation` that keep their state in `state_dirs`.
    pub fn new(
        run_dir: RunDir,
        federation: &str,
        layout: Arc<Layout>,
        codec: Codec,
        state_dirs: BTreeMap<PeerId, PathBuf>,
    ) -> Self {
        let federation = federation.to_owned();
        let (saved, tried, inputs) = (Round::GENESIS, Instant::now(), Inputs::default());
        Self { run_dir, federation, layout, codec, state_dirs, inputs, held: None, saved, failed: false, tried }
    }

    /// The same recorder, which writes into each model what its classes are called, unless peers tell it.
    #[must_use]
    pub fn naming(mut self, classes: Vec<String>) -> Self {
        self.inputs.classes = classes;
        self
    }

    /// The run directory.
    pub fn run_dir(&self) -> &RunDir {
        &self.run_dir
    }

    /// Writes an entry down. Returns what the user should know: the first time that the run directory fails.
    pub fn record(&mut self, entry: &Entry) -> Option<String> {
        let written = self.write(entry);
        self.first_failure(written)
    }

    /// Keeps the newest model, if its metrics have not come: at the end of a run.
    pub fn close(&mut self) -> Option<String> {
        let (round, digest, peer) = self.held.clone()?;
        let saved = self.save(round, digest, &peer, None);
        self.first_failure(saved)
    }

    /// Whether something could not be written yet, because the disk is full.
    pub fn is_behind(&self) -> bool {
        self.run_dir.is_behind()
    }

    /// Writes what the disk has refused, if it is time to try again. Returns what the user should know: that it is
    /// written, or why it never will be.
    pub fn catch_up(&mut self) -> Option<String> {
        if !self.is_behind() || self.tried.elapsed() < RETRY_PERIOD {
            return None;
        }
        self.tried = Instant::now();
        match self.run_dir.write_back() {
            Ok(()) => {
                self.failed = false;
                Some(format!("{} is written again, and nothing is missing", self.run_dir.path().display()))
            }
            Err(error) if error.obstacle().is_some() => None,
            Err(error) => Some(format!("{error}; its results may be lost")),
        }
    }

    /// Takes the run directory away again.
    pub fn into_run_dir(self) -> RunDir {
        self.run_dir
    }

    fn write(&mut self, entry: &Entry) -> Result<(), RunDirError> {
        let logged = if entry.event.is_passing() { Ok(()) } else { self.run_dir.append(&entry.to_line()) };
        // A model may be saved even where its line was not written.
        logged.and(self.save_what_is_told(entry))
    }

    fn save_what_is_told(&mut self, entry: &Entry) -> Result<(), RunDirError> {
        match &entry.event {
            Event::Standardised { features, classes, tensors, mean, std, target } => {
                let scales = Some(Scales { mean: mean.clone(), std: std.clone(), target: *target });
                self.inputs = Inputs { features: features.clone(), classes: classes.clone(), scales };
                let tensor =
                    |(name, shape): &(String, Vec<usize>)| TensorSpec { name: name.clone(), shape: shape.clone() };
                self.layout = Arc::new(Layout { tensors: tensors.iter().map(tensor).collect() });
                Ok(())
            }
            Event::ModelHeld { round, digest } if self.held.as_ref().is_none_or(|(held, ..)| held < round) => {
                self.held = Some((*round, *digest, entry.peer.clone()));
                Ok(())
            }
            Event::Evaluated { round, digest, val_loss, val_accuracy, num_examples, .. } => {
                let metrics = Metrics {
                    num_examples: *num_examples,
                    loss: *val_loss,
                    accuracy: *val_accuracy,
                    ..Metrics::default()
                };
                self.save(*round, *digest, &entry.peer, Some(metrics))
            }
            Event::Finished { rounds, digest, .. } => self.save(*rounds, *digest, &entry.peer, None),
            _ => Ok(()),
        }
    }

    /// Saves a model unless it, or a later one, was saved. One that is not there any more is left to the next who tells.
    fn save(
        &mut self,
        round: Round,
        digest: Digest,
        peer: &PeerId,
        metrics: Option<Metrics>,
    ) -> Result<(), RunDirError> {
        let Some(state_dir) = self.state_dirs.get(peer).filter(|_| round > self.saved) else { return Ok(()) };
        let blob = match read_blob(state_dir, digest) {
            Ok(blob) => blob,
            Err(error) => {
                tracing::debug!(%error, "a model to save cannot be read");
                None
            }
        };
        // What a strategy remembers stands behind the model, and is none of it.
        let of_model = |blob: &[u8]| {
            let bytes = self.codec.encoded_bytes(self.layout.len());
            blob.get(..usize::try_from(bytes).ok()?).and_then(|bytes| self.codec.decode(bytes, &self.layout).ok())
        };
        let Some(weights) = blob.and_then(|blob| of_model(&blob)) else { return Ok(()) };
        let (federation, inputs) = (&self.federation, &self.inputs);
        let saved = self.run_dir.save(&NamedModel { weights: &weights, federation, round, digest, metrics, inputs });
        // One that the disk has no room for counts: it is held until there is.
        if saved.as_ref().err().is_none_or(|error| error.obstacle().is_some()) {
            self.saved = round;
        }
        saved
    }

    fn first_failure(&mut self, result: Result<(), RunDirError>) -> Option<String> {
        let error = result.err()?;
        let is_first = !std::mem::replace(&mut self.failed, true);
        is_first.then(|| match error.obstacle() {
            Some(_) => format!("{error}; training goes on, its results are kept in memory until there is room"),
            None => format!("{error}; training goes on, its results may be lost"),
        })
    }
}

/// Times as text: `2026-05-14T15:30:12.345Z`.
mod rfc3339 {
    use std::time::SystemTime;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_rfc3339_millis(*time))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SystemTime, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_rfc3339(&text).map_err(D::Error::custom)
    }
}

/// Digests as hexadecimal text.
mod text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::types::Digest;

    pub(super) fn serialize<S: Serializer>(digest: &Digest, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(digest)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::Journal;
    use crate::protocol::{Reason, Waiting};
    use crate::rundir::{BEST, EVENTS};
    use crate::training::export::from_safetensors;
    use crate::transfer::Codecs;
    use crate::weights::{TensorSpec, Weights};

    fn peer(name: &str) -> PeerId {
        PeerId::new(name).unwrap()
    }

    fn committed() -> RoundCommitted {
        RoundCommitted {
            round: Round(3),
            term: Term(1),
            leader: peer("b"),
            digest: Digest::of(b"model"),
            decree: Digest::of(b"decree"),
            contributors: vec![peer("a"), peer("c")],
            num_examples: 20,
            members: 3,
            next_roster: vec![peer("a"), peer("b"), peer("c")],
            val_loss: Some(0.5),
            val_accuracy: None,
            bytes_sent: 10,
            bytes_received: 20,
            seconds: PhaseSeconds { train: 0.25, ..PhaseSeconds::default() },
        }
    }

    #[test]
    fn an_entry_survives_its_line() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_778_772_612_345);
        let digest = Digest::of(b"x");
        let scores = Scores { val_auc: Some(0.9), ..Scores::default() };
        let events = [
            Event::RoundCommitted(Box::new(committed())),
            Event::Evaluated { round: Round(2), digest, val_loss: 0.5, val_accuracy: 0.75, num_examples: 8, scores },
            Event::Deposed { round: Round(2), term: Term(4), leader: peer("b"), gone: true },
            Event::Waiting { what: None },
            Event::BadMessage { who: None, why: "a \"quoted\"\nline".into() },
            Event::Founded { roster: vec![peer("a")] },
            Event::Standardised {
                features: vec!["age".into(), "town=Lund".into()],
                classes: vec!["no".into(), "yes".into()],
                tensors: vec![("fc1.weight".into(), vec![4, 2])],
                mean: vec![0.1, -3.0],
                std: vec![1.0, 1e-9],
                target: Some([0.0, 2.0]),
            },
            Event::Interrupted,
        ];
        for event in events {
            let entry = Entry { time, peer: peer("a"), event };
            let line = entry.to_line();
            assert!(!line.contains('\n'));
            assert_eq!(Entry::from_line(&line).unwrap(), entry, "{line}");
        }
    }

    #[test]
    fn a_line_has_the_fields_that_scripts_read() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_778_772_612_345);
        let entry = Entry { time, peer: peer("a"), event: Event::RoundCommitted(Box::new(committed())) };
        let line: serde_json::Value = serde_json::from_str(&entry.to_line()).unwrap();
        assert_eq!(line["event"], "round_committed");
        assert_eq!(line["time"], "2026-05-14T15:30:12.345Z");
        assert_eq!((&line["peer"], &line["round"], &line["term"]), (&"a".into(), &3.into(), &1.into()));
        assert_eq!(line["digest"], Digest::of(b"model").to_string());
        assert_eq!(line["contributors"], serde_json::json!(["a", "c"]));
        assert_eq!((&line["val_loss"], &line["val_accuracy"]), (&0.5.into(), &serde_json::Value::Null));
        let seconds: Vec<&String> = line["seconds"].as_object().unwrap().keys().collect();
        let expected = ["aggregate", "broadcast", "commit", "elect", "evaluate", "gather", "total", "train"];
        assert_eq!(seconds, expected);
    }

    #[test]
    fn progress_is_told_at_its_end_and_not_at_every_batch() {
        let mut witness = Witness::new(peer("a"));
        let mut told = Vec::new();
        for done in 1..=1000 {
            let observation = Observation::Training(Round(1), Progress { done, total: 1000 });
            told.extend(witness.see(&observation).map(|entry| entry.event));
        }
        assert!(told.len() < 500, "{} of 1000 batches were told", told.len());
        assert_eq!(told.first(), Some(&Event::Training { round: Round(1), done: 1, total: 1000 }));
        assert_eq!(told.last(), Some(&Event::Training { round: Round(1), done: 1000, total: 1000 }));
    }

    #[test]
    fn how_a_run_ended_is_told_once() {
        let witness = Witness::new(peer("a"));
        let told = |outcome: Outcome| witness.see_end(&outcome).map(|entry| entry.event);
        assert_eq!(told(Outcome::Interrupted), Some(Event::Interrupted));
        let waiting = Waiting::Peers { present: 1, needed: 3 };
        assert!(matches!(told(Outcome::GaveUp(waiting)), Some(Event::Ended { why }) if why.contains("--min-peers 3")));
        let (reason, rounds, model) = (Reason::Rounds, Round(2), Digest::of(b"x"));
        assert_eq!(told(Outcome::Finished { reason, rounds, model, metrics: None }), None);
    }

    /// A peer with a model in its state directory, and a recorder of what it tells.
    struct Fixture {
        dir: tempfile::TempDir,
        journal: Journal,
        recorder: Recorder,
        layout: Arc<Layout>,
    }

    impl Fixture {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let state_dir = dir.path().join("a");
            let (journal, _) = Journal::open(&state_dir, "ward", Some(&peer("a"))).unwrap();
            let tensor = TensorSpec { name: "fc1.bias".into(), shape: vec![1] };
            let layout = Arc::new(Layout { tensors: vec![tensor] });
            let run_dir = RunDir::open(&dir.path().join("run")).unwrap();
            let state_dirs = BTreeMap::from([(peer("a"), state_dir)]);
            let recorder = Recorder::new(run_dir, "ward", layout.clone(), Codec::F32, state_dirs);
            Self { dir, journal, recorder, layout }
        }

        fn hold(&self, value: f32) -> Digest {
            let weights = Weights::new(self.layout.clone(), vec![value]).unwrap();
            let blob = Codec::F32.encode(&weights, &Codecs::default().for_model(Round(1))).unwrap();
            let digest = Digest::of(&blob);
            self.journal.put_blob(digest, &blob).unwrap();
            digest
        }

        fn tell(&mut self, event: Event) {
            assert_eq!(self.recorder.record(&Entry::now(&peer("a"), event)), None);
        }

        fn evaluated(&mut self, round: u64, digest: Digest, val_loss: f64) {
            let (round, scores) = (Round(round), Scores::default());
            self.tell(Event::Evaluated { round, digest, val_loss, val_accuracy: 0.5, num_examples: 1, scores });
        }

        fn model(&self, name: &str) -> Option<f32> {
            let bytes = std::fs::read(self.recorder.run_dir().path().join(name)).ok()?;
            Some(from_safetensors(&bytes).unwrap().0.values()[0])
        }
    }

    #[test]
    fn models_are_kept_when_their_metrics_are_known_and_the_last_one_in_any_case() {
        let mut fixture = Fixture::new();
        let (initial, first, second) = (fixture.hold(0.0), fixture.hold(1.0), fixture.hold(2.0));
        fixture.evaluated(0, initial, 9.0);
        assert_eq!(fixture.model(MODEL), None, "initial weights are no result");
        fixture.evaluated(1, first, 0.5);
        fixture.evaluated(2, Digest::of(b"not here"), 0.1);
        assert_eq!((fixture.model(MODEL), fixture.model(BEST)), (Some(1.0), Some(1.0)));
        fixture.tell(Event::ModelHeld { round: Round(2), digest: second });
        fixture.tell(Event::ModelHeld { round: Round(1), digest: first });
        assert_eq!(fixture.model(MODEL), Some(1.0));
        assert_eq!(fixture.recorder.close(), None);
        assert_eq!((fixture.model(MODEL), fixture.model(BEST)), (Some(2.0), Some(1.0)));
    }

    #[test]
    fn what_passes_is_not_written_down() {
        let mut fixture = Fixture::new();
        fixture.tell(Event::Training { round: Round(1), done: 1, total: 2 });
        fixture.tell(Event::Interrupted);
        let text = std::fs::read_to_string(fixture.dir.path().join("run").join(EVENTS)).unwrap();
        assert_eq!(text.lines().count(), 1);
        assert_eq!(Entry::from_line(text.trim()).unwrap().event, Event::Interrupted);
    }

    #[test]
    fn a_run_directory_that_fails_is_told_once_and_ends_nothing() {
        let mut fixture = Fixture::new();
        let first = fixture.hold(1.0);
        std::fs::remove_dir_all(fixture.dir.path().join("run")).unwrap();
        let event = Event::Evaluated {
            round: Round(1),
            digest: first,
            val_loss: 1.0,
            val_accuracy: 0.5,
            num_examples: 1,
            scores: Scores::default(),
        };
        let entry = Entry::now(&peer("a"), event);
        let warning = fixture.recorder.record(&entry).unwrap();
        assert!(warning.contains("training goes on"), "{warning}");
        assert_eq!(fixture.recorder.record(&entry), None);
    }
}
