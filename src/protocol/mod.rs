//! The protocol of a federation: pure decisions, from (event, now) to actions.
//!
//! ```text
//!        hello            genesis                     one round: one decree, by single-decree Paxos
//!  ┌──────────────┐   ┌─────────────┐   ┌──────────────────────────────────────────────────────────────┐
//!  │ who is there?│──▶│ first roster│──▶│ evaluate ─▶ train ─▶ update ╲                                │
//!  │ same config? │   │  (all join) │   │ elect (ballots → leader) ────▶ gather ─▶ aggregate ─▶ propose│
//!  └──────────────┘   └─────────────┘   │                 members: pull, verify, persist ─▶ accept     │
//!                                       │ commit (a quorum accepted) ─▶ head ─▶ the next round         │
//!                                       └──────────────────────────────────────────────────────────────┘
//! ```
//!
//! [`Peer::handle`] takes what happened and when, and returns what to do, in order: an [`Action::Persist`] stands
//! before every message that depends on it. There is no clock, no IO and no randomness here. Events only record facts;
//! `advance` then does whatever the facts and the time allow, so it does not matter in which order they came.

pub mod config;
pub mod decree;
pub mod durable;
pub mod election;
mod lag;
pub mod message;
mod notice;
mod phases;
pub mod roaming;
pub mod roster;
#[cfg(test)]
mod samples;
mod timer;
pub mod topic;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::aggregation::Share;
use crate::transfer::{Intake, Keep, Manifest};
use crate::types::{Address, Digest, Incarnation, Metrics, PeerId, Round, Term};
use crate::weights::Layout;

pub use config::Config;
pub use decree::{Contributor, Decree, Outcome, Reason};
pub use durable::{Durable, Residual};
pub use election::Policy;
pub use notice::{Committed, Difference, Notice, Seconds, UNKNOWN, Waiting};
pub use roaming::Roaming;
pub use roster::Roster;
pub use topic::{Topic, Topics};

use lag::Lag;
use message::{Body, Envelope, MessageError, VERSION};
use phases::genesis::Genesis;
use phases::round::OpenRound;
use phases::transfer::Transfers;
use timer::{Timer, Timers};

/// The most other peers that a peer remembers: names come from the network.
const NEIGHBOURS_MAX: usize = 2 * roster::ROSTER_MAX;

/// So many times the lag of both lines a peer may be silent beyond the timeouts.
const LAGS: u32 = 2;

/// What happened to a peer.
#[derive(Clone, Debug)]
pub enum Event {
    /// Time has passed: [`Peer::deadline`] is due.
    Tick,
    /// The broker is reached; nothing was said yet on this connection.
    Connected,
    /// The broker is lost.
    Disconnected,
    /// A message came.
    Message(Bytes),
    /// Slow work ended.
    Done(Done),
    /// The trainer is prepared ([`Action::Prepare`]): these are the names and shapes of the model. It comes before
    /// anything else does.
    Prepared(Arc<Layout>),
}

/// What a peer wants done, in this order.
#[derive(Clone, Debug)]
pub enum Action {
    /// Make this durable before anything that follows.
    Persist(Box<Durable>),
    /// Send a message.
    Publish {
        /// Where to.
        topic: Topic,
        /// Whether the broker keeps it for newcomers.
        retain: bool,
        /// The message.
        message: Bytes,
    },
    /// Send one chunk of a blob that the peer holds.
    SendChunk {
        /// Where to.
        topic: Topic,
        /// The encoded envelope; the chunk's bytes follow it.
        header: Bytes,
        /// The blob.
        manifest: Manifest,
        /// Which chunk.
        index: u32,
    },
    /// Put chunks away; [`Done::Kept`] and [`Done::Verified`] come back.
    Take(Intake),
    /// Do slow work; its end comes back as [`Event::Done`].
    Start(Job),
    /// Prepare the trainer by what all founders' inputs are like, before any job; [`Event::Prepared`] comes back.
    Prepare(Bytes),
    /// Training for this round is no longer wanted.
    CancelTraining(Round),
    /// Every other blob may be deleted.
    Retain(BTreeSet<Digest>),
    /// These brokers, in this order, are there beside those that the peer was started with.
    Brokers(Vec<Address>),
    /// Tell people and journals.
    Notify(Notice),
    /// The peer is done: say goodbye and leave.
    Stop,
}

/// Slow work. What it makes is durable before its [`Done`] is reported.
#[derive(Clone, Debug)]
pub enum Job {
    /// Encode the initial weights.
    Initial,
    /// Measure a model on held-out data.
    Evaluate {
        /// The model's blob.
        model: Manifest,
    },
    /// Train one round from a model.
    Train {
        /// The round.
        round: Round,
        /// The parent model's blob.
        model: Manifest,
        /// What was learned before and not sent.
        residual: Residual,
        /// A blob as `f32`: the peer's own control variate, if it has one.
        control: Option<Digest>,
        /// How many members the round has.
        members: usize,
    },
    /// Have a blob that is held survive a loss of power.
    Flush {
        /// The blob.
        blob: Digest,
    },
    /// Aggregate updates, in this order.
    Aggregate {
        /// The round.
        round: Round,
        /// The leader's term: each aggregates the updates that it gathered.
        term: Term,
        /// The parent model's blob.
        parent: Manifest,
        /// Each update's blob and what it says of itself.
        parts: Vec<(Manifest, Share)>,
    },
}

/// The end of a [`Job`]; errors are sentences.
#[derive(Clone, Debug)]
pub enum Done {
    /// The initial weights' blob, which is durable.
    Initial(Result<Manifest, String>),
    /// A model's metrics.
    Evaluated {
        /// The model's blob.
        model: Digest,
        /// Its metrics.
        result: Result<Metrics, String>,
    },
    /// An update's blob, and how training went.
    Trained {
        /// The round.
        round: Round,
        /// The update.
        result: Result<Trained, String>,
    },
    /// A chunk of a blob was put away.
    Kept {
        /// The blob.
        blob: Digest,
    },
    /// A pulled blob is complete and kept; or it is not what it should be, maybe before its last chunk.
    Verified {
        /// The blob.
        manifest: Manifest,
        /// How it is kept.
        keep: Keep,
        /// If it is not: why.
        result: Result<(), String>,
    },
    /// A blob was flushed.
    Flushed {
        /// The blob.
        blob: Digest,
        /// Whether it is still there.
        result: Result<bool, String>,
    },
    /// The aggregate's blob, which is not flushed yet.
    Aggregated {
        /// The round.
        round: Round,
        /// The leader's term.
        term: Term,
        /// The new model.
        result: Result<Manifest, String>,
    },
}

/// What a training made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trained {
    /// The update.
    pub update: Manifest,
    /// How it is kept, with the two that follow.
    pub keep: Keep,
    /// A blob as `f32` of what the update does not send, if its codec sends a part.
    pub unsent: Option<Digest>,
    /// A blob as `f32`: the peer's control variate if the update counts, where the strategy has such.
    pub control: Option<Digest>,
    /// See [`Share::step_sum`].
    pub step_sum: f64,
    /// How training went.
    pub metrics: Metrics,
}

/// What only this peer knows when it starts.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Its name.
    pub peer: PeerId,
    /// Which one of that name it is.
    pub incarnation: Incarnation,
    /// Names and shapes of its model; with a summary, as far as they are known before those of all founders are merged.
    pub layout: Arc<Layout>,
    /// How many training examples it has.
    pub num_examples: u64,
    /// Where others reach the broker that it hosts, if it hosts one.
    pub broker: Option<Address>,
    /// What its inputs are like, encoded, at most [`SUMMARY_BYTES_MAX`](crate::aggregation::statistics::SUMMARY_BYTES_MAX)
    /// bytes: the protocol does not look into it.
    pub summary: Bytes,
}

/// Another peer, as far as it was heard.
#[derive(Clone, Debug)]
struct Neighbour {
    /// What it said of itself; its settings are compared once and not kept: a thousand peers have a thousand of them.
    greeting: Option<Greeting>,
    /// What keeps it from training with this peer, by its hello.
    difference: Option<Difference>,
    heard: Instant,
    /// Said goodbye, or its last will did.
    gone: bool,
}

/// What is kept of a peer's newest hello.
#[derive(Clone, Debug)]
struct Greeting {
    /// Which one of its name it is.
    incarnation: Incarnation,
    /// Names its configuration and layout, if they are not this peer's.
    other_group: Option<Digest>,
    /// It has the last decree and the last model.
    done: bool,
    /// How long a message takes it to the broker and back.
    lag: Duration,
    /// Where others reach the broker that it hosts, if it hosts one.
    broker: Option<Address>,
}

/// How a peer's part ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// The federation finished.
    Finished,
    /// It does not fit the federation.
    Refused,
}

/// Rules that tests switch off to see that the simulator notices.
#[cfg(test)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Flaws {
    /// A leader commits when it alone accepted.
    pub(crate) commit_alone: bool,
    /// A leader ignores decrees that members accepted in earlier terms.
    pub(crate) forget_accepted: bool,
    /// A peer whose update did not count does not keep what it sent.
    pub(crate) forget_returned: bool,
    /// Who has a member's name is the member.
    pub(crate) trust_names: bool,
}

/// One peer's protocol state.
///
/// Contract: call [`handle`](Self::handle) with every event and with [`Event::Tick`] when
/// [`deadline`](Self::deadline) has come, with a `now` that never goes back; carry out the actions in order, also if
/// the peer is stopped in between. No input from the network makes it panic.
#[derive(Debug)]
pub struct Peer {
    me: PeerId,
    incarnation: Incarnation,
    config: Config,
    /// What a model's blob holds, and an update's.
    model_layout: Arc<Layout>,
    update_layout: Arc<Layout>,
    /// Names the layout, once it is known for certain.
    layout_digest: Option<Digest>,
    entries: BTreeMap<String, String>,
    num_examples: u64,
    /// Where others reach the broker that this peer hosts.
    broker: Option<Address>,
    /// What its inputs are like.
    summary: Bytes,
    /// The node knows what all founders' inputs are like.
    prepared: bool,
    /// The standby brokers that the node was told of last.
    brokers_told: Vec<Address>,
    durable: Durable,
    neighbours: BTreeMap<PeerId, Neighbour>,
    /// Members that have lost their state, and with it their promises: who is here by their names are newcomers.
    replaced: BTreeSet<PeerId>,
    genesis: Genesis,
    open: OpenRound,
    transfers: Transfers,
    timers: Timers,
    connected: bool,
    lag: Lag,
    ended: Option<Ended>,
    /// Looked who is away once all was done.
    stays: bool,
    /// It was started when all was over: for those who lack the last model, or to have it once more.
    came_back: bool,
    stopped: bool,
    last_waiting: Option<Waiting>,
    waiting_checked: Option<Instant>,
    head_told: Option<Instant>,
    hello_said: Option<Instant>,
    /// The model whose metrics were told last, and the round that made it.
    metrics_told: Option<(Round, Digest)>,
    /// The newest model that was told to be held.
    model_told: Option<Digest>,
    /// The finished federation of this name whose retained head was told of.
    earlier_federation: Option<Round>,
    bad_senders: BTreeSet<Option<PeerId>>,
    actions: Vec<Action>,
    #[cfg(test)]
    pub(crate) flaws: Flaws,
}

impl Peer {
    /// A peer that starts, or starts again with what it had persisted and the blobs that were `held`.
    pub fn new(
        config: Config,
        identity: Identity,
        durable: Option<Durable>,
        held: &BTreeSet<Digest>,
        now: Instant,
    ) -> Self {
        let mut durable = durable.unwrap_or_default();
        durable.forget_lost_update(held);
        let here = |(manifest, _): &(&Manifest, Keep)| held.contains(&manifest.digest);
        let transfers = Transfers::new(durable.kept().filter(here));
        let mut peer = Self {
            entries: config.entries(),
            model_layout: config.strategy.model_layout(&identity.layout),
            update_layout: config.strategy.update_layout(&identity.layout),
            config,
            me: identity.peer,
            incarnation: identity.incarnation,
            layout_digest: identity.summary.is_empty().then(|| identity.layout.digest()),
            num_examples: identity.num_examples,
            broker: identity.broker,
            summary: identity.summary,
            prepared: false,
            brokers_told: Vec::new(),
            durable,
            neighbours: BTreeMap::new(),
            replaced: BTreeSet::new(),
            genesis: Genesis::default(),
            open: OpenRound::new(now),
            transfers,
            timers: Timers::default(),
            connected: false,
            lag: Lag::default(),
            ended: None,
            stays: false,
            came_back: false,
            stopped: false,
            last_waiting: None,
            waiting_checked: None,
            head_told: None,
            hello_said: None,
            metrics_told: None,
            model_told: None,
            earlier_federation: None,
            bad_senders: BTreeSet::new(),
            actions: Vec::new(),
            #[cfg(test)]
            flaws: Flaws::default(),
        };
        if peer.durable.roster().is_some() {
            peer.enter_round(now);
            // Nothing is said before the hello; ballots are sent again once there is a connection.
            peer.actions.retain(|action| !matches!(action, Action::Publish { .. }));
        }
        peer.came_back = peer.ended == Some(Ended::Finished);
        peer
    }

    /// Takes what happened at `now`; returns what to do, in order.
    pub fn handle(&mut self, event: Event, now: Instant) -> Vec<Action> {
        if self.ended == Some(Ended::Refused) {
            // It has no part in this federation, whatever it hears.
            return Vec::new();
        }
        match event {
            Event::Tick => self.look_around(now),
            Event::Connected => {
                self.on_connected(now);
                self.look_around(now);
            }
            Event::Disconnected => {
                self.connected = false;
                self.lag.give_up();
            }
            Event::Message(message) => self.on_message(&message, now),
            Event::Done(done) => self.on_done(done, now),
            Event::Prepared(layout) => self.know_layout(&layout),
        }
        self.advance(now);
        std::mem::take(&mut self.actions)
    }

    /// When [`Event::Tick`] is due, if ever.
    pub fn deadline(&self) -> Option<Instant> {
        self.timers.next().into_iter().chain(self.transfers.deadline()).min()
    }

    /// The peer's name.
    pub fn id(&self) -> &PeerId {
        &self.me
    }

    /// The round that is open: the one after the newest committed decree.
    pub fn round(&self) -> Round {
        self.durable.open.round
    }

    /// What the peer has persisted.
    pub fn durable(&self) -> &Durable {
        &self.durable
    }

    /// The message that the broker shall send when this peer dies.
    pub fn last_will(&self) -> (Topic, Bytes) {
        (Topic::Init(self.me.clone()), self.envelope(Body::Goodbye).encode())
    }

    fn know_layout(&mut self, layout: &Arc<Layout>) {
        self.model_layout = self.config.strategy.model_layout(layout);
        self.update_layout = self.config.strategy.update_layout(layout);
        self.layout_digest = Some(layout.digest());
    }

    /// Does what the facts and the time allow; after a commit also in the next round.
    fn advance(&mut self, now: Instant) {
        loop {
            let round = self.round();
            if self.ended.is_none() {
                self.advance_genesis(now);
                self.advance_election(now);
                self.advance_member(now);
                self.advance_leader(now);
            }
            if self.round() == round {
                break;
            }
        }
        self.advance_finish(now);
        self.advance_transfers(now);
        self.advance_hello(now);
        self.advance_waiting(now);
    }

    fn on_message(&mut self, message: &Bytes, now: Instant) {
        let (envelope, tail) = match Envelope::decode(message) {
            Ok(decoded) => decoded,
            Err(error) => return self.unreadable(&error),
        };
        if let Body::Hello(hello) = &envelope.body
            && envelope.sender == self.me
            && hello.incarnation == self.incarnation
        {
            self.lag.end(hello.number, now);
        }
        let known = self.neighbours.contains_key(&envelope.sender);
        if envelope.sender == self.me || !known && self.neighbours.len() >= NEIGHBOURS_MAX {
            return;
        }
        self.hear(&envelope, now);
        let Envelope { sender, round, term, body, .. } = envelope;
        match body {
            Body::Hello(hello) => self.on_hello(sender, round, hello, now),
            Body::Goodbye => self.on_goodbye(&sender, now),
            Body::Call { roster, released } => self.on_call(&sender, term, &roster, &released, now),
            Body::Join { gave_up, summary } => self.on_join(sender, term, gave_up, summary),
            Body::Bound { candidate, call } => self.on_bound(sender, term, candidate, call),
            Body::Founded { roster, summary } => self.on_founded(roster, summary, now),
            Body::Ballot { candidate, accepted } => self.on_ballot(sender, round, term, &candidate, accepted, now),
            Body::Evaluation(metrics) => self.on_evaluation(sender, round, metrics),
            Body::Leader(leading) => self.on_leader(&sender, round, term, &leading, now),
            Body::Proposal(decree) => self.on_proposal(sender, round, term, decree, now),
            Body::Update(update) => self.on_update(sender, round, update, now),
            Body::Status => {}
            Body::Decline { why } => self.on_decline(sender, round, why),
            Body::Accept { decree } => self.on_accept(sender, round, term, decree),
            Body::Refuse { promised } => self.on_refuse(sender, round, term, promised),
            Body::Grant { blob, chunks } => self.on_grant(&sender, blob, &chunks, now),
            Body::Chunk { blob, index } => self.on_chunk(blob, index, tail, now),
            Body::Head(head) => self.on_head(head, now),
        }
    }

    fn on_done(&mut self, done: Done, now: Instant) {
        match done {
            Done::Initial(result) => self.on_initial(result, now),
            Done::Evaluated { model, result } => self.on_evaluated(model, result, now),
            Done::Trained { round, result } => self.on_trained(round, result, now),
            Done::Kept { blob } => self.transfers.kept(&blob),
            Done::Verified { manifest, keep, result } => self.on_verified(manifest, keep, result, now),
            Done::Flushed { blob, result } => self.on_flushed(blob, result, now),
            Done::Aggregated { round, term, result } => self.on_aggregated(round, term, result, now),
        }
    }

    /// Notes that a peer lives, and of which term it speaks.
    fn hear(&mut self, envelope: &Envelope, now: Instant) {
        let heard = Neighbour { greeting: None, difference: None, heard: now, gone: false };
        let neighbour = self.neighbours.entry(envelope.sender.clone()).or_insert(heard);
        neighbour.heard = now;
        let known = neighbour.greeting.as_ref().filter(|_| !neighbour.gone).map(|greeting| greeting.incarnation);
        // Who comes back says hello first, on the topic of its last will. Anything else may have been overtaken by the will.
        if let Body::Hello(hello) = &envelope.body {
            neighbour.gone = false;
            if known != Some(hello.incarnation) {
                self.answer_hello(now);
                self.linger(now);
                if self.candidate() == Some(&envelope.sender) {
                    // It was not there to hear the vote, and listens only once it has said hello.
                    self.timers.set_earlier(Timer::Resend, now + self.heartbeat() / 4);
                }
            }
        }
        // The term of a message about the first roster is the number of a call.
        let counts_calls = matches!(envelope.body, Body::Call { .. } | Body::Join { .. } | Body::Bound { .. });
        if !counts_calls && envelope.round == self.round() && self.is_member(&envelope.sender) {
            self.open.seen_term = self.open.seen_term.max(envelope.term);
            let leads = self.open.following.as_ref() == Some(&envelope.sender);
            self.open.leader_made_way |= leads && envelope.term > self.promised();
        }
    }

    fn unreadable(&mut self, error: &MessageError) {
        let sender = if let MessageError::Version { sender, .. } = error { sender.clone() } else { None };
        if sender.as_ref() == Some(&self.me) {
            // Left on the broker by this peer, before it was given another version.
            return;
        }
        // What anybody writes as a name must not take ever more memory.
        let sender = sender.filter(|_| self.bad_senders.len() < NEIGHBOURS_MAX);
        self.bad_message(sender, error.to_string());
    }

    fn bad_message(&mut self, sender: Option<PeerId>, why: String) {
        if self.bad_senders.insert(sender.clone()) {
            self.notify(Notice::BadMessage { sender, why });
        }
    }

    fn envelope(&self, body: Body) -> Envelope {
        let (round, term) = (self.round(), self.durable.open.promised);
        Envelope { version: VERSION, sender: self.me.clone(), signature: Vec::new(), round, term, body }
    }

    /// Sends a message of the open round and the promised term.
    fn publish(&mut self, topic: Topic, body: Body) {
        self.publish_in(self.promised(), topic, body);
    }

    fn publish_in(&mut self, term: Term, topic: Topic, body: Body) {
        let message = Envelope { term, ..self.envelope(body) }.encode();
        self.actions.push(Action::Publish { topic, retain: false, message });
    }

    fn publish_retained(&mut self, topic: Topic, body: Body) {
        let message = self.envelope(body).encode();
        self.actions.push(Action::Publish { topic, retain: true, message });
    }

    /// Of several states at once, the last has all the promises of the others: it alone is written, before all that depends
    /// on any of them. Short rounds spend half of their time on such writes.
    fn persist(&mut self) {
        let durable = Box::new(self.durable.clone());
        let earlier = self.actions.iter_mut().find_map(|action| match action {
            Action::Persist(earlier) => Some(earlier),
            _ => None,
        });
        match earlier {
            Some(earlier) => *earlier = durable,
            None => self.actions.push(Action::Persist(durable)),
        }
    }

    fn notify(&mut self, notice: Notice) {
        self.actions.push(Action::Notify(notice));
    }

    fn heartbeat(&self) -> Duration {
        self.config.heartbeat()
    }

    /// How long a peer may be silent before nobody waits for it.
    fn silence(&self) -> Duration {
        2 * self.config.election_timeout
    }

    /// What slow lines, this peer's own and the other's, add to the time for which the other may be silent. A message
    /// takes half of each lag; one that has to be sent again takes longer, and the next one waits behind it.
    fn slack(&self, other: &PeerId) -> Duration {
        let greeting = self.neighbours.get(other).and_then(|neighbour| neighbour.greeting.as_ref());
        LAGS * (self.lag.longest() + greeting.map_or(Duration::ZERO, |greeting| greeting.lag))
    }

    fn is_member(&self, peer: &PeerId) -> bool {
        self.durable.roster().is_some_and(|roster| self.is_in(roster, peer))
    }

    /// Whether a peer is a member by `roster`. This one is not if it only has the name of one.
    fn is_in(&self, roster: &Roster, peer: &PeerId) -> bool {
        #[cfg(test)]
        if self.flaws.trust_names {
            return roster.contains(peer);
        }
        roster.incarnation(peer).is_some_and(|member| *peer != self.me || member == self.incarnation)
    }

    /// Which one of its name a peer is, by its hello.
    fn incarnation_of(&self, peer: &PeerId) -> Option<Incarnation> {
        if *peer == self.me {
            return Some(self.incarnation);
        }
        self.neighbours.get(peer)?.greeting.as_ref().map(|greeting| greeting.incarnation)
    }

    /// Whether `peer` was heard of late and did not say goodbye.
    fn is_live(&self, peer: &PeerId, now: Instant) -> bool {
        self.is_heard(peer, now, self.silence())
    }

    fn is_heard(&self, peer: &PeerId, now: Instant, silence: Duration) -> bool {
        let silence = silence + self.slack(peer);
        let heard = |n: &Neighbour| !self.is_away(peer, n) && now.saturating_duration_since(n.heard) < silence;
        *peer == self.me || self.neighbours.get(peer).is_some_and(heard)
    }

    /// Whether a peer has said goodbye, or its last will came, and it was not heard of since.
    fn is_gone(&self, peer: &PeerId) -> bool {
        self.neighbours.get(peer).is_some_and(|neighbour| self.is_away(peer, neighbour))
    }

    /// The same of a neighbour. A member that lost its state is gone for good.
    fn is_away(&self, peer: &PeerId, neighbour: &Neighbour) -> bool {
        neighbour.gone || self.replaced.contains(peer)
    }

    /// Whether a member has lost its state: somebody else says hello by its name.
    fn is_replaced(&self, peer: &PeerId) -> bool {
        #[cfg(test)]
        if self.flaws.trust_names {
            return false;
        }
        let member = self.durable.roster().and_then(|roster| roster.incarnation(peer));
        member.zip(self.incarnation_of(peer)).is_some_and(|(member, heard)| member != heard)
    }

    fn gone(&self) -> BTreeSet<PeerId> {
        self.neighbours
            .iter()
            .filter(|(peer, neighbour)| self.is_away(peer, neighbour))
            .map(|(peer, _)| peer.clone())
            .collect()
    }

    /// The term of this round's messages that a leader sends.
    fn promised(&self) -> Term {
        self.durable.open.promised
    }
}
