//! Training: every member but the leader trains from the parent model and announces its update.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::protocol::election::Electorate;
use crate::protocol::message::{Body, Update, clip, has};
use crate::protocol::phases::round::{FLUSH_AFTER, Work};
use crate::protocol::timer::Timer;
use crate::protocol::{Action, Job, Notice, Peer, Topic, Trained};
use crate::types::{Digest, PeerId, Round, Term};

impl Peer {
    pub(in crate::protocol) fn advance_member(&mut self, now: Instant) {
        if !self.is_member(&self.me) {
            return;
        }
        self.draw_trainers();
        self.advance_evaluation();
        self.advance_training(now);
        self.advance_acceptance(now);
    }

    fn advance_training(&mut self, now: Instant) {
        let Some(model) = self.parent_model().copied() else { return };
        let evaluated = matches!(self.open.evaluation, Work::Done(_));
        if !self.is_training_round() || !evaluated || self.open.training != Work::Idle {
            return;
        }
        if !self.trains() || !self.is_drawn(&self.me) {
            return;
        }
        if self.durable.open.update.as_ref().is_some_and(|update| self.transfers.holds(&update.manifest.digest)) {
            // Trained before a restart.
            self.open.training = Work::Done(());
            self.open.marks.trained = Some(now);
            self.timers.set(Timer::Flush, now);
            return self.report_update();
        }
        self.open.training = Work::Running;
        let round = self.round();
        self.notify(Notice::TrainingStarted { round });
        let (residual, control) = (self.durable.residual, self.durable.control);
        let members = self.durable.roster().map_or(0, |roster| roster.len());
        self.actions.push(Action::Start(Job::Train { round, model, residual, control, members }));
    }

    /// The leader does not train, nor does the candidate that is about to lead.
    pub(in crate::protocol) fn trains(&self) -> bool {
        let alone = self.durable.roster().is_some_and(|roster| roster.len() == 1);
        self.config.leader_trains || alone || self.leader_or_candidate() != Some(&self.me)
    }

    /// Draws the members that train in the promised term, the same for all who are in it: in term 0 the configured share of those
    /// that may, in each further term as many again. So a round whose trainers all died goes on with others.
    fn draw_trainers(&mut self) {
        let term = self.promised();
        let (Some(roster), Some(lot)) = (self.durable.roster(), self.lot()) else { return };
        if self.config.fraction_train >= 1.0 || self.open.drawn.as_ref().is_some_and(|(drawn, _)| *drawn == term) {
            return;
        }
        // The turn to lead spares the turn to train. Gone or not, it is the same member for all.
        let nobody = BTreeSet::new();
        let last_leader = self.head().map(|head| &head.decree.leader);
        let electorate = Electorate { roster, gone: &nobody, lot, last_leader };
        let leads = (!self.config.leader_trains && roster.len() > 1)
            .then(|| self.config.policy.candidate(&electorate, Term(0)));
        let place = |peer: &&PeerId| Digest::of(&[&lot.0[..], b"trains", peer.as_str().as_bytes()].concat());
        let mut order: Vec<&PeerId> = roster.members().iter().filter(|peer| Some(*peer) != leads.as_ref()).collect();
        order.sort_by_cached_key(place);
        let count = self.config.trainers(roster.len()).saturating_mul((term.0 as usize).saturating_add(1));
        // Who was to lead in term 0 leads no more when so many train.
        self.open.drawn = Some((term, order.into_iter().chain(&leads).take(count).cloned().collect()));
    }

    /// Whether a member is drawn to train in this term.
    pub(in crate::protocol) fn is_drawn(&self, peer: &PeerId) -> bool {
        self.open.drawn.as_ref().is_none_or(|(_, drawn)| drawn.contains(peer))
    }

    pub(in crate::protocol) fn on_trained(&mut self, round: Round, result: Result<Trained, String>, now: Instant) {
        if round != self.round() || self.open.training != Work::Running {
            return;
        }
        self.open.reported = false;
        match (result, self.parent()) {
            (Ok(trained), Some(parent)) if trained.metrics.is_finite() => {
                let Trained { update: manifest, keep, unsent, control, step_sum, metrics } = trained;
                self.transfers.hold(manifest, keep);
                self.open.flush = false; // it is as young as the model was
                self.timers.set(Timer::Flush, now + FLUSH_AFTER);
                let num_examples = self.num_examples;
                self.durable.open.update = Some(Update { parent, manifest, num_examples, step_sum, metrics });
                self.durable.open.unsent = unsent;
                self.durable.open.control = control;
                self.persist();
                self.open.training = Work::Done(());
                self.open.marks.trained = Some(now);
                self.notify(Notice::Trained { round, update: manifest.digest, metrics });
            }
            (result, _) => {
                let why = result.err().unwrap_or_else(|| "training gave a loss that is not finite".into());
                self.open.training = Work::Failed;
                self.open.failures += 1;
                self.open.declined = Some(clip(why.clone()));
                self.notify(Notice::Failed { what: "training", why });
            }
        }
        self.report_update();
    }

    /// Announces the update, or that none will come, to the leader; takes it for itself if it leads.
    pub(in crate::protocol) fn report_update(&mut self) {
        let update = self.durable.open.update.clone().filter(|_| self.open.training == Work::Done(()));
        if self.open.leading.is_some() {
            if let Some(update) = update {
                self.open.updates.insert(self.me.clone(), update);
            } else if self.open.declined.is_some() {
                self.open.left_out.insert(self.me.clone());
            }
            return;
        }
        let Some(leader) = self.open.following.clone() else { return };
        let body = match (update, &self.open.declined) {
            (Some(update), _) => Body::Update(update),
            (None, Some(why)) => Body::Decline { why: why.clone() },
            (None, None) => return,
        };
        self.open.reported = true;
        self.publish(Topic::Report(self.round(), leader), body);
    }

    /// Answers a leader's heartbeat: with what the leader lacks, else with a sign of life.
    pub(in crate::protocol) fn report(&mut self, leader_has: u8) {
        let before = self.actions.len();
        if leader_has & has::EVALUATION == 0 {
            self.report_evaluation();
        }
        // A leader that waits for an update that was lost with the power must learn that none comes.
        if leader_has & has::UPDATE == 0 || !self.open.reported || self.open.declined.is_some() {
            self.report_update();
        }
        if self.actions.len() == before
            && let Some(leader) = self.open.following.clone()
        {
            self.publish(Topic::Report(self.round(), leader), Body::Status);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::message::{Envelope, Head, Leading};
    use crate::protocol::samples::{id, identity, roster, says};
    use crate::protocol::{Config, Decree, Done, Durable, Event};

    #[test]
    fn a_leader_that_counts_on_an_update_which_was_lost_is_told_that_none_comes() {
        let now = Instant::now();
        let decree = Decree::sample(&roster(["a", "b"]));
        let model = *decree.model();
        let (accepts, genesis) = (["a", "b"].map(id).into(), decree.digest());
        let mut durable =
            Durable { head: Some(Head { decree, accepts, genesis }), model: Some(model), ..Durable::default() };
        durable.open.round = Round(1);
        let held = BTreeSet::from([model.digest]);
        let mut peer = Peer::new(Config::default(), identity("a"), Some(durable), &held, now);
        peer.handle(Event::Connected, now);
        let beat = || {
            // It has what `a` announced before it lost its power.
            let has = vec![has::EVALUATION | has::UPDATE; 2];
            let leading = Leading { ballots: ["a", "b"].map(id).into(), has, parent_metrics: None, upcoming: None };
            says("b", 1, 1, Body::Leader(leading))
        };
        let declines = |actions: &[Action]| {
            actions.iter().any(|action| {
                let Action::Publish { message, .. } = action else { return false };
                matches!(Envelope::decode(message), Ok((Envelope { body: Body::Decline { .. }, .. }, _)))
            })
        };
        peer.handle(beat(), now);
        peer.open.training = Work::Running;
        let failed = Done::Trained { round: Round(1), result: Err("the disk is full".into()) };
        assert!(declines(&peer.handle(Event::Done(failed), now)));
        assert!(declines(&peer.handle(beat(), now)), "what was said may have been lost");
    }
}
