//! Gathering: the leader pulls every live trainer's update and starts the aggregation.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::protocol::message::Update;
use crate::protocol::phases::round::{Aggregate, Work};
use crate::protocol::timer::Timer;
use crate::protocol::{Action, Job, Notice, Peer};
use crate::transfer::{Keep, Manifest};
use crate::types::{PeerId, Round, Term};

/// After so many terms without an update the pause before the next no longer doubles.
const DOUBLINGS_MAX: u32 = 8;

impl Peer {
    pub(in crate::protocol) fn on_update(&mut self, sender: PeerId, round: Round, update: Update, now: Instant) {
        let fits = round == self.round() && self.is_member(&sender) && self.is_training_round();
        if !fits || Some(update.parent) != self.parent() || self.open.leading.is_none() {
            return;
        }
        if let Err(error) = update.manifest.check(&self.update_layout) {
            return self.leave_out(sender, error.to_string());
        }
        let parent_model = self.parent_model().map(|model| model.digest);
        if update.manifest.base.is_some_and(|base| Some(base) != parent_model) {
            let why = "its update is a difference from another model than the one that this round began with";
            return self.leave_out(sender, why.into());
        }
        if update.num_examples == 0 {
            return self.leave_out(sender, "it was trained on no example".into());
        }
        if self.open.updates.insert(sender, update).is_none() {
            self.open.marks.trained = Some(now);
        }
    }

    pub(in crate::protocol) fn on_decline(&mut self, sender: PeerId, round: Round, why: String) {
        let is_for_me = round == self.round() && self.is_member(&sender) && self.open.leading.is_some();
        // What was pulled before its owner lost it counts.
        if is_for_me && !self.gathered().contains(&sender) {
            self.leave_out(sender, why);
        }
    }

    /// This round goes on without a member's update.
    pub(in crate::protocol) fn leave_out(&mut self, peer: PeerId, why: String) {
        self.open.updates.remove(&peer);
        if self.open.left_out.insert(peer.clone()) {
            self.notify(Notice::LeftOut { peer, why });
        }
    }

    /// Whether a member is still waited for: it lives, as far as the leader has had time to see, and follows.
    pub(in crate::protocol) fn is_awaited(&self, peer: &PeerId, since: Instant, now: Instant) -> bool {
        self.is_there(peer, since, now)
            && !self.open.leading.as_ref().is_some_and(|leading| leading.refusals.contains(peer))
    }

    /// Whether a member lives, as far as the leader has had time to see.
    pub(in crate::protocol) fn is_there(&self, peer: &PeerId, since: Instant, now: Instant) -> bool {
        let early = now.saturating_duration_since(since) < self.silence();
        !self.is_gone(peer) && (early || self.is_live(peer, now))
    }

    /// The members whose verified update is here, in `PeerId` order.
    fn gathered(&self) -> BTreeSet<PeerId> {
        // One that was announced again, to be read in another way, was not verified in that way.
        let held = |update: &Update| self.transfers.holds_as(&update.manifest);
        self.open.updates.iter().filter(|(_, update)| held(update)).map(|(peer, _)| peer.clone()).collect()
    }

    /// Whether an update is a difference from a model that is not here.
    fn lacks_base(&self) -> bool {
        let mut bases = self.open.updates.values().filter_map(|update| update.manifest.base);
        bases.any(|base| !self.transfers.holds(&base))
    }

    /// Updates that the leader has yet to pull, and from whom: a few at a time, the first announced of each name first.
    pub(in crate::protocol) fn updates_to_pull(&self) -> Vec<(Manifest, PeerId)> {
        let gathering =
            matches!(&self.open.leading, Some(l) if matches!(l.aggregate, Aggregate::Gathering) && l.bound.is_none());
        if !gathering {
            return Vec::new();
        }
        // A difference can be verified only where the model is that it is to be added to.
        let readable = |manifest: &Manifest| manifest.base.is_none_or(|base| self.transfers.holds(&base));
        let wanted = |manifest: &Manifest| !self.transfers.holds(&manifest.digest) && readable(manifest);
        let missing = self.open.updates.iter().filter(|(_, update)| wanted(&update.manifest));
        missing.map(|(peer, update)| (update.manifest, peer.clone())).collect()
    }

    pub(in crate::protocol) fn advance_gathering(&mut self, now: Instant) {
        let Some(leading) = &self.open.leading else { return };
        if leading.bound.is_some() || !matches!(leading.aggregate, Aggregate::Gathering) || !self.is_training_round() {
            return;
        }
        let (since, late, told) = (leading.since, leading.late, leading.told);
        let gathered = self.gathered();
        let Some(roster) = self.durable.roster() else { return };
        let may_train = |peer: &PeerId| self.is_drawn(peer) && (*peer != self.me || self.trains());
        let trains = |peer: &&PeerId| may_train(peer) || self.open.updates.contains_key(*peer);
        let awaited = |peer: &&PeerId| {
            !gathered.contains(*peer) && !self.open.left_out.contains(*peer) && self.is_awaited(peer, since, now)
        };
        let missing = roster.members().iter().filter(trains).filter(awaited).count();
        let trainers = roster.members().iter().filter(trains).count();
        let count = (gathered.len(), gathered.len() + missing);
        let others = trainers + usize::from(!self.config.leader_trains) < roster.len();
        // A roster may have fewer trainers than `min_updates` asks for.
        let needed = self.config.min_updates.min(trainers).max(1);
        if told != Some(count) {
            let round = self.round();
            self.notify(Notice::Gathered { round, done: count.0, total: count.1 });
            self.with_leadership(|leading| leading.told = Some(count));
        }
        let moving = late && self.transfers.is_moving(now, self.silence());
        // Some strategies build on the parent model. Who cannot get it in time finds out that it cannot aggregate.
        let builds = !self.config.strategy.reads_parent()
            || late
            || self.parent_model().is_some_and(|model| self.transfers.holds(&model.digest));
        if gathered.len() >= needed && builds && (missing == 0 || late && !moving) {
            self.aggregate(&gathered, now);
        } else if missing == 0 && gathered.len() < needed {
            if late || others {
                // What this leader could not use or get, another may; and of the next term others may be drawn to train.
                self.make_way(now);
            } else if !self.open.left_out.is_empty() {
                self.give_up_soon((gathered.len(), needed), now);
            }
        } else if late && !moving && self.lacks_base() {
            // The updates are there, but not the model that they are to be added to.
            self.make_way(now);
        }
    }

    /// Everybody who was to train has failed. All vote again and train again, after a pause that grows from term to term:
    /// what fails at once is not to fail again and again without one.
    fn give_up_soon(&mut self, (present, needed): (usize, usize), now: Instant) {
        if self.open.leading.as_ref().is_none_or(|leading| leading.barren) {
            return;
        }
        self.with_leadership(|leading| leading.barren = true);
        let pause = self.config.election_timeout.saturating_mul(1 << self.promised().0.min(DOUBLINGS_MAX));
        let pause = pause.min(self.config.round_timeout);
        self.timers.set_earlier(Timer::Gather, now + pause);
        let seconds = pause.as_secs_f64().ceil();
        let why = format!(
            "{present} of {needed} updates came and no more will; the peers vote and train again in {seconds} s"
        );
        self.notify(Notice::Failed { what: "gathering", why });
    }

    /// Whether the round's time is over, or nobody is left to wait for, with too few updates: (in, needed).
    pub(in crate::protocol) fn lacks_updates(&self) -> Option<(usize, usize)> {
        let leading = self.open.leading.as_ref()?;
        let open = matches!(leading.aggregate, Aggregate::Gathering) && leading.bound.is_none();
        let lacks = open && self.is_training_round() && (leading.late || leading.barren);
        lacks.then(|| (self.gathered().len(), self.config.min_updates))
    }

    fn aggregate(&mut self, peers: &BTreeSet<PeerId>, now: Instant) {
        let Some(parent) = self.parent_model().copied() else { return };
        let updates = || peers.iter().filter_map(|peer| Some((peer, self.open.updates.get(peer)?)));
        let parts = updates().map(|(_, update)| (update.manifest, update.share())).collect();
        let contributors = updates().map(|(peer, update)| update.contribution_of(peer)).collect();
        let (round, term) = (self.round(), self.promised());
        self.open.marks.gathered = Some(now);
        self.with_leadership(|leading| leading.aggregate = Aggregate::Running(contributors));
        self.actions.push(Action::Start(Job::Aggregate { round, term, parent, parts }));
    }

    pub(in crate::protocol) fn on_aggregated(
        &mut self,
        round: Round,
        term: Term,
        result: Result<Manifest, String>,
        now: Instant,
    ) {
        // Elected again in a later term, a leader may have gathered other updates than the earlier job aggregates.
        let mine = round == self.round() && term == self.promised();
        let Some(leading) = self.open.leading.as_mut().filter(|_| mine) else { return };
        let Aggregate::Running(contributors) = &mut leading.aggregate else { return };
        match result {
            Ok(manifest) => {
                leading.aggregate = Aggregate::Done(manifest, std::mem::take(contributors));
                self.transfers.hold(manifest, Keep::Unflushed);
                self.open.marks.aggregated = Some(now);
                self.beat(now);
            }
            Err(why) => {
                // Somebody else may be able to: a leader that cannot lead on makes way.
                self.notify(Notice::Failed { what: "making the new model", why });
                self.make_way(now);
            }
        }
    }

    /// The genesis has no updates: its model is the leader's initial weights.
    pub(in crate::protocol) fn advance_initial_weights(&mut self) {
        let Some(leading) = &mut self.open.leading else { return };
        let genesis = self.durable.open.round == Round::GENESIS;
        if genesis && leading.bound.is_none() && matches!(leading.aggregate, Aggregate::Gathering) {
            leading.aggregate = Aggregate::Running(Vec::new());
            self.actions.push(Action::Start(Job::Initial));
        }
    }

    pub(in crate::protocol) fn on_initial(&mut self, result: Result<Manifest, String>, now: Instant) {
        self.on_aggregated(Round::GENESIS, self.promised(), result, now);
    }

    pub(in crate::protocol) fn with_leadership(
        &mut self,
        change: impl FnOnce(&mut crate::protocol::phases::round::Leadership),
    ) {
        if let Some(leading) = &mut self.open.leading {
            change(leading);
        }
    }

    /// Stops training that can no longer count.
    pub(in crate::protocol) fn cancel_training(&mut self) {
        if self.open.training == Work::Running {
            let round = self.round();
            self.actions.push(Action::CancelTraining(round));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::decree::Outcome;
    use crate::protocol::message::{Body, Head};
    use crate::protocol::samples::{self, id, identity, roster};
    use crate::protocol::{Config, Decree, Done, Durable, Event};
    use crate::transfer::Codec;
    use crate::types::Metrics;

    /// A blob of four values.
    fn blob(of: u8) -> Manifest {
        Manifest::of(&[of; 16], 1024, Codec::F32).unwrap()
    }

    /// `a` leads term 1 of round 1, and holds updates of `b` and `c`.
    fn leader(now: Instant) -> (Peer, Vec<Action>) {
        let decree = Decree::sample(&roster(["a", "b", "c"]));
        let (accepts, genesis) = (["a", "b"].map(id).into(), decree.digest());
        let parent = decree.digest();
        let mut durable = Durable { head: Some(Head { decree, accepts, genesis }), ..Durable::default() };
        durable.open.round = Round(1);
        let mut peer = Peer::new(Config::default(), identity("a"), Some(durable), &BTreeSet::new(), now);
        peer.handle(Event::Connected, now);
        for voter in ["b", "c"] {
            peer.handle(says(voter, Body::Ballot { candidate: id("a"), accepted: None }), now);
        }
        let metrics = Metrics { num_examples: 1, ..Metrics::default() };
        let mut actions = Vec::new();
        for (trainer, manifest) in [("b", blob(1)), ("c", blob(2))] {
            let update = Update { parent, manifest, num_examples: 1, step_sum: 1.0, metrics };
            peer.handle(says(trainer, Body::Update(update)), now);
            let (keep, result) = (Keep::Unflushed, Ok(()));
            actions.extend(peer.handle(Event::Done(Done::Verified { manifest, keep, result }), now));
        }
        (peer, actions)
    }

    fn says(sender: &str, body: Body) -> Event {
        samples::says(sender, 1, 1, body)
    }

    #[test]
    fn a_decree_names_the_updates_that_its_model_was_made_of_whatever_their_owners_say_meanwhile() {
        let now = Instant::now();
        let (mut peer, actions) = leader(now);
        let aggregates =
            |action: &Action| matches!(action, Action::Start(Job::Aggregate { parts, .. }) if parts.len() == 2);
        assert!(actions.iter().any(aggregates));
        peer.handle(says("b", Body::Decline { why: "its disk is full".into() }), now);
        let model = blob(3);
        peer.handle(Event::Done(Done::Aggregated { round: Round(1), term: Term(1), result: Ok(model) }), now);
        peer.handle(Event::Done(Done::Flushed { blob: model.digest, result: Ok(true) }), now);
        let proposal = peer.open.leading.and_then(|leading| leading.proposal).unwrap();
        assert_eq!(proposal.outcome, Outcome::Model(model));
        let contributors: Vec<_> = proposal.contributors.iter().map(|part| (part.peer.clone(), part.update)).collect();
        assert_eq!(contributors, [(id("b"), blob(1).digest), (id("c"), blob(2).digest)]);
    }
}
