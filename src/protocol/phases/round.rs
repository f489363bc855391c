//! What a peer knows of the open round and would not miss after a restart.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::protocol::decree::Decree;
use crate::protocol::message::{Head, Update};
use crate::protocol::timer::Timer;
use crate::protocol::{Action, Contributor, Notice, Peer, Seconds};
use crate::transfer::Manifest;
use crate::types::{Digest, Metrics, PeerId, Round, Term};

/// How long the newest model, where no quorum needs it, and the own update are not flushed: most rounds are over by then, and
/// nobody needs them any more. A loss of power costs no more than pulling or training again what is younger.
pub(in crate::protocol) const FLUSH_AFTER: Duration = Duration::from_secs(5);

/// The open round, apart from what is persisted of it.
#[derive(Debug)]
pub(in crate::protocol) struct OpenRound {
    pub marks: Marks,
    /// The highest term that any member was heard to speak of.
    pub seen_term: Term,
    /// Ballots for this peer, by term, each with what its voter had accepted.
    pub ballots: BTreeMap<Term, BTreeMap<PeerId, Option<(Term, Decree)>>>,
    /// The leader of the promised term, once it has proclaimed itself.
    pub following: Option<PeerId>,
    /// That leader was heard to speak of a higher term, so that it leads no more.
    pub leader_made_way: bool,
    /// This peer's leadership of the promised term.
    pub leading: Option<Leadership>,
    /// The proposal of the promised term, until it is accepted.
    pub proposal: Option<Decree>,
    /// The model that the leader of the promised term proposes, or is about to.
    pub upcoming: Option<(PeerId, Manifest)>,
    /// Its leader has proposed it again when its model was here: a quorum lacks acceptances.
    pub asked_again: bool,
    pub evaluation: Work<Metrics>,
    /// Local training; its result is `durable.open.update`.
    pub training: Work<()>,
    /// The newest model and the own update have waited long enough to be flushed.
    pub flush: bool,
    /// Why no update will come from this peer.
    pub declined: Option<String>,
    /// The leader was told so, or of the update, through this connection. What it knows may be of before a restart.
    pub reported: bool,
    /// How often its training failed in this round.
    pub failures: u32,
    /// Members' evaluations of the parent model, sent to this peer as candidate or leader.
    pub evaluations: BTreeMap<PeerId, Metrics>,
    /// Members' updates announced to this peer as leader.
    pub updates: BTreeMap<PeerId, Update>,
    /// Who is drawn to train in which term, if not everybody is.
    pub drawn: Option<(Term, BTreeSet<PeerId>)>,
    /// Members whose update will not come or is unusable.
    pub left_out: BTreeSet<PeerId>,
}

/// Slow local work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::protocol) enum Work<T> {
    Idle,
    Running,
    Done(T),
    Failed,
}

/// A leader's state in its term.
#[derive(Debug)]
pub(in crate::protocol) struct Leadership {
    pub since: Instant,
    pub ballots: BTreeSet<PeerId>,
    /// A decree that members had accepted in an earlier term, and those who hold its model: it must be proposed.
    pub bound: Option<(Decree, Vec<PeerId>)>,
    pub parent_metrics: Option<Metrics>,
    pub aggregate: Aggregate,
    pub proposal: Option<Decree>,
    pub accepts: BTreeSet<PeerId>,
    pub refusals: BTreeSet<PeerId>,
    /// The round has waited long enough for stragglers.
    pub late: bool,
    /// Too few updates are in, and nobody is left who could send one.
    pub barren: bool,
    /// How many updates were last told of.
    pub told: Option<(usize, usize)>,
}

impl Leadership {
    /// The model that it proposes, or will when it is durable.
    pub(in crate::protocol) fn model(&self) -> Option<&Manifest> {
        match (&self.proposal, &self.aggregate) {
            (Some(decree), _) => Some(decree.model()),
            (None, Aggregate::Done(manifest, _)) => Some(manifest),
            (None, Aggregate::Gathering | Aggregate::Running(_)) => None,
        }
    }
}

/// How far a leader's new model is.
#[derive(Debug)]
pub(in crate::protocol) enum Aggregate {
    Gathering,
    /// The job runs on these updates. What their owners say meanwhile changes nothing.
    Running(Vec<Contributor>),
    Done(Manifest, Vec<Contributor>),
}

/// When the stages of a round were reached.
#[derive(Clone, Copy, Debug)]
pub(in crate::protocol) struct Marks {
    pub entered: Instant,
    pub elected: Option<Instant>,
    pub evaluated: Option<Instant>,
    pub trained: Option<Instant>,
    pub gathered: Option<Instant>,
    pub aggregated: Option<Instant>,
    pub accepted: Option<Instant>,
}

impl Marks {
    /// The time each phase took, if the round ends `now`.
    pub(in crate::protocol) fn seconds(&self, now: Instant) -> Seconds {
        let since =
            |from: Instant, to: Option<Instant>| to.map_or(0.0, |to| to.saturating_duration_since(from).as_secs_f64());
        let evaluated = self.evaluated.unwrap_or(self.entered);
        let trained = self.trained.unwrap_or(evaluated);
        let gathered = self.gathered.unwrap_or(trained);
        let aggregated = self.aggregated.unwrap_or(gathered);
        Seconds {
            evaluate: since(self.entered, self.evaluated),
            elect: since(self.entered, self.elected),
            train: since(evaluated, self.trained),
            gather: since(trained, self.gathered),
            aggregate: since(gathered, self.aggregated),
            broadcast: since(aggregated, self.accepted),
            commit: self.accepted.map_or(0.0, |accepted| since(accepted, Some(now))),
            total: since(self.entered, Some(now)),
        }
    }
}

impl OpenRound {
    pub(in crate::protocol) fn new(now: Instant) -> Self {
        let (elected, evaluated, trained, gathered, aggregated, accepted) = (None, None, None, None, None, None);
        Self {
            marks: Marks { entered: now, elected, evaluated, trained, gathered, aggregated, accepted },
            seen_term: Term(0),
            ballots: BTreeMap::new(),
            following: None,
            leader_made_way: false,
            leading: None,
            proposal: None,
            upcoming: None,
            asked_again: false,
            evaluation: Work::Idle,
            training: Work::Idle,
            flush: false,
            declined: None,
            reported: false,
            failures: 0,
            evaluations: BTreeMap::new(),
            updates: BTreeMap::new(),
            drawn: None,
            left_out: BTreeSet::new(),
        }
    }
}

impl Peer {
    /// Opens the round after the head, which must be known (or, for the genesis, the first roster).
    pub(in crate::protocol) fn enter_round(&mut self, now: Instant) {
        let round = self.durable.head.as_ref().map_or(Round::GENESIS, |head| head.decree.round.next());
        if self.durable.open.round != round {
            self.durable.open = crate::protocol::durable::Open { round, ..Default::default() };
        }
        self.open = OpenRound::new(now);
        self.replaced = self.neighbours.keys().filter(|peer| self.is_replaced(peer)).cloned().collect();
        self.clear_round_timers();
        // What is still waited for in this round is told anew, and what is not is over.
        if self.last_waiting.take().is_some() {
            self.notify(Notice::Waiting(None));
        }
        self.timers.set(Timer::Flush, now + FLUSH_AFTER);
        self.prepare();
        if self.durable.head.as_ref().is_some_and(|head| head.decree.reason().is_some()) {
            return self.begin_finish(now);
        }
        let member = self.is_member(&self.me);
        let members = self.durable.roster().map_or(0, |roster| roster.len());
        self.notify(Notice::RoundStarted { round, members, member });
        if member {
            let term = self.durable.open.promised;
            self.cast_ballot(term, None, now);
        }
    }

    /// Has the trainer prepared once it is known how: for all that this process computes.
    fn prepare(&mut self) {
        let summary = self.durable.summary().filter(|summary| !summary.is_empty() && !self.prepared);
        if let Some(summary) = summary.cloned() {
            self.prepared = true;
            self.actions.push(Action::Prepare(summary));
        }
    }

    fn clear_round_timers(&mut self) {
        let of_round =
            [Timer::Settle, Timer::Call, Timer::Resend, Timer::Election, Timer::Beat, Timer::Gather, Timer::Flush];
        of_round.into_iter().for_each(|timer| self.timers.clear(timer));
    }

    /// The newest committed decree with who holds its model.
    pub(in crate::protocol) fn head(&self) -> Option<&Head> {
        self.durable.head.as_ref()
    }

    /// The parent model of the open round, if there is one.
    pub(in crate::protocol) fn parent_model(&self) -> Option<&Manifest> {
        self.head().map(|head| head.decree.model())
    }

    /// The digest that decrees of the open round have as parent.
    pub(in crate::protocol) fn parent(&self) -> Option<Digest> {
        self.durable.parent()
    }

    /// What decides whose turn it is: the round and its parent model, or the first roster.
    pub(in crate::protocol) fn lot(&self) -> Option<Digest> {
        let parent = match self.head() {
            Some(head) => head.decree.model().digest,
            None => self.durable.roster()?.names_digest(),
        };
        Some(Digest::of(&[&parent.0[..], &self.round().0.to_le_bytes()].concat()))
    }

    /// Whether this round trains a model; the one after the last only evaluates.
    pub(in crate::protocol) fn is_training_round(&self) -> bool {
        let round = self.round();
        round > Round::GENESIS && round <= Round(self.config.rounds)
    }
}
