//! Proposing and accepting: the leader forms a decree; a member that holds its model makes both durable and accepts.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::protocol::decree::{self, Decree, Outcome};
use crate::protocol::message::{Body, Update};
use crate::protocol::phases::round::{Aggregate, Work};
use crate::protocol::timer::Timer;
use crate::protocol::{Contributor, Notice, Peer, Roster, Topic};
use crate::transfer::Manifest;
use crate::types::{Digest, PeerId, Round, Term};

impl Peer {
    pub(in crate::protocol) fn advance_leader(&mut self, now: Instant) {
        self.step_down_if_left_behind(now);
        if self.open.leading.is_none() {
            return;
        }
        if self.timers.fired(Timer::Beat, now) {
            self.beat(now);
        }
        if self.timers.fired(Timer::Gather, now) {
            self.with_leadership(|leading| leading.late = true);
        }
        self.take_own_update();
        self.advance_initial_weights();
        self.advance_parent_metrics(now);
        self.advance_gathering(now);
        self.advance_proposal(now);
        self.advance_commit(now);
    }

    /// A member that trained before it was elected brings its own update.
    fn take_own_update(&mut self) {
        if self.open.training == Work::Done(()) && !self.open.updates.contains_key(&self.me) {
            self.report_update();
        }
    }

    fn advance_proposal(&mut self, now: Instant) {
        let Some(leading) = self.open.leading.as_ref().filter(|leading| leading.proposal.is_none()) else { return };
        if let Some((decree, _)) = &leading.bound {
            let durable = self.transfers.is_durable(&decree.model().digest);
            if durable {
                self.propose(decree.clone(), now);
            }
            return;
        }
        if let Some(outcome) = self.finish_outcome() {
            let model = self.parent_model().map(|model| model.digest);
            if model.is_some_and(|model| self.transfers.holds(&model) && !self.transfers.is_durable(&model)) {
                // It is being flushed.
                return;
            }
            let decree = self.form_decree(outcome, &[], now);
            return self.propose(decree, now);
        }
        if let Aggregate::Done(manifest, peers) = &leading.aggregate {
            let decree = self.form_decree(Outcome::Model(*manifest), &peers.clone(), now);
            self.propose(decree, now);
        }
    }

    /// The end, once the evaluations that are in say so; after the last round also when nobody could evaluate.
    fn finish_outcome(&self) -> Option<Outcome> {
        let leading = self.open.leading.as_ref()?;
        let late = leading.late;
        let model = *self.parent_model()?;
        // Without metrics only the last round can end, and only after waiting for them.
        let may_end = leading.parent_metrics.is_some() || late && !self.is_training_round();
        if self.round() == Round::GENESIS || !may_end {
            return None;
        }
        let metrics = leading.parent_metrics;
        let record = self.record(metrics.as_ref());
        decree::stop(&self.config, self.round(), metrics.as_ref(), &record).map(|reason| Outcome::Finish(reason, model))
    }

    fn record(&self, metrics: Option<&crate::types::Metrics>) -> decree::Record {
        let before = self.head().map(|head| head.decree.record).unwrap_or_default();
        metrics.map_or(before, |metrics| before.with(metrics, self.parent_round(), self.config.tolerance))
    }

    fn form_decree(&self, outcome: Outcome, peers: &[PeerId], now: Instant) -> Decree {
        let contributors = peers.iter().filter_map(|peer| {
            let update = self.open.updates.get(peer)?;
            let Update { manifest, num_examples, step_sum, metrics, .. } = *update;
            Some(Contributor { peer: peer.clone(), update: manifest.digest, num_examples, step_sum, metrics })
        });
        let leading = self.open.leading.as_ref();
        let parent_metrics = leading.and_then(|leading| leading.parent_metrics).or_else(|| self.reported_metrics());
        let next_roster = self.next_roster(now);
        Decree {
            round: self.round(),
            parent: self.parent().unwrap_or(Digest([0; 32])),
            leader: self.me.clone(),
            term: self.promised(),
            outcome,
            contributors: contributors.collect(),
            parent_metrics,
            record: self.record(parent_metrics.as_ref()),
            standbys: self.next_standbys(&next_roster),
            next_roster,
            summary: self.durable.summary().cloned().unwrap_or_default(),
        }
    }

    /// The members that live, and the newcomers: only as many as leave the members that live a quorum, so that
    /// newcomers who vanish at once cannot stop the federation.
    fn next_roster(&self, now: Instant) -> Roster {
        let since = self.open.leading.as_ref().map_or(now, |leading| leading.since);
        let members = self.durable.roster().map(|roster| roster.members()).unwrap_or_default();
        let live: BTreeSet<PeerId> = members.iter().filter(|peer| self.is_there(peer, since, now)).cloned().collect();
        let room = live.len().saturating_sub(1).max(1);
        let newcomers: Vec<PeerId> = self.present(now).into_iter().filter(|peer| !members.contains(peer)).collect();
        Roster::of(&live.into_iter().chain(newcomers.into_iter().take(room)).chain([self.me.clone()]).collect())
    }

    fn propose(&mut self, decree: Decree, now: Instant) {
        let term = self.promised();
        self.durable.open.accepted = Some((term, decree.clone()));
        self.persist();
        let me = self.me.clone();
        self.with_leadership(|leading| {
            leading.accepts.insert(me);
            leading.proposal = Some(decree);
        });
        self.open.marks.aggregated.get_or_insert(now);
        let (round, leader) = (self.round(), self.me.clone());
        self.notify(Notice::Proposed { round, leader });
        self.beat(now);
    }

    pub(in crate::protocol) fn on_proposal(
        &mut self,
        sender: PeerId,
        round: Round,
        term: Term,
        decree: Decree,
        now: Instant,
    ) {
        if !self.accepts_leader(&sender, round, term, now) {
            return;
        }
        if let Err(why) = self.check_decree(&decree) {
            return self.bad_message(Some(sender), why);
        }
        self.follow(&sender, term, now);
        if self.has_accepted(term, &decree) {
            return self.report_acceptance();
        }
        if self.open.proposal.as_ref().map(|(_, seen)| seen) != Some(&decree) {
            self.open.marks.gathered.get_or_insert(now);
            self.open.marks.aggregated = Some(now);
            self.notify(Notice::Proposed { round, leader: sender.clone() });
            self.open.proposal = Some((sender, decree));
        }
    }

    /// A decree must continue this peer's head, by members of the roster, with a model of its layout.
    fn check_decree(&self, decree: &Decree) -> Result<(), String> {
        if decree.round != self.round() || Some(decree.parent) != self.parent() {
            return Err("its proposal does not continue the newest decree here".into());
        }
        if let Some(stranger) = decree.contributors.iter().find(|part| !self.is_member(&part.peer)) {
            return Err(format!("its proposal counts an update of {}, who is no member", stranger.peer));
        }
        if let Some(stranger) = decree.standbys.keys().find(|host| !decree.next_roster.contains(host)) {
            return Err(format!("its proposal names a broker of {stranger}, who is not in the next roster"));
        }
        if Some(&decree.summary) != self.durable.summary() {
            return Err("its proposal has another summary of the inputs than the newest decree here".into());
        }
        if decree.model().base.is_some() {
            return Err("its proposal's model is a difference, which a newcomer could not read".into());
        }
        decree.model().check(&self.model_layout).map_err(|error| error.to_string())
    }

    fn has_accepted(&self, term: Term, decree: &Decree) -> bool {
        self.durable.open.accepted.as_ref().is_some_and(|(at, accepted)| *at == term && accepted == decree)
    }

    /// The model of the proposal, while that is not accepted, and who serves it.
    pub(in crate::protocol) fn proposal_to_pull(&self) -> Option<(Manifest, PeerId)> {
        let (leader, decree) = self.open.proposal.as_ref()?;
        Some((*decree.model(), leader.clone()))
    }

    pub(in crate::protocol) fn advance_acceptance(&mut self, now: Instant) {
        let Some((_, decree)) = &self.open.proposal else { return };
        if !self.transfers.is_durable(&decree.model().digest) {
            return;
        }
        let decree = decree.clone();
        self.open.proposal = None;
        self.durable.open.accepted = Some((self.promised(), decree));
        self.persist();
        self.open.marks.accepted = Some(now);
        self.report_acceptance();
    }

    fn report_acceptance(&mut self) {
        let (Some((_, decree)), Some(leader)) = (&self.durable.open.accepted, self.open.following.clone()) else {
            return;
        };
        let decree = decree.digest();
        self.publish(Topic::Report(self.round(), leader), Body::Accept { decree });
    }

    pub(in crate::protocol) fn on_accept(&mut self, sender: PeerId, round: Round, term: Term, decree: Digest) {
        if round != self.round() || term != self.promised() || !self.is_member(&sender) {
            return;
        }
        let proposed = self.open.leading.as_ref().and_then(|leading| leading.proposal.as_ref()).map(Decree::digest);
        if proposed == Some(decree) {
            self.with_leadership(|leading| {
                leading.accepts.insert(sender);
            });
        }
    }
}
