//! Evaluating: every member measures the parent model on its own held-out data and reports.

use std::time::Instant;

use crate::protocol::message::Body;
use crate::protocol::phases::round::Work;
use crate::protocol::{Action, Job, Notice, Peer, Topic};
use crate::types::{Digest, Metrics, PeerId, Round};

impl Peer {
    pub(in crate::protocol) fn advance_evaluation(&mut self) {
        let Some(model) = self.parent_model().copied() else { return };
        if self.open.evaluation == Work::Idle && self.transfers.holds(&model.digest) {
            self.open.evaluation = Work::Running;
            self.actions.push(Action::Start(Job::Evaluate { model }));
        }
    }

    pub(in crate::protocol) fn on_evaluated(&mut self, model: Digest, result: Result<Metrics, String>, now: Instant) {
        if self.parent_model().map(|manifest| manifest.digest) != Some(model) || self.open.evaluation != Work::Running {
            return;
        }
        self.open.marks.evaluated = Some(now);
        match result {
            Ok(metrics) => {
                self.open.evaluation = Work::Done(metrics);
                self.open.evaluations.insert(self.me.clone(), metrics);
                let round = self.parent_round();
                self.notify(Notice::Measured { round, metrics });
                self.report_evaluation();
            }
            Err(why) => {
                // Over no example it weighs nothing, and nobody waits for it.
                self.open.evaluation = Work::Done(Metrics::default());
                self.open.evaluations.insert(self.me.clone(), Metrics::default());
                self.notify(Notice::Failed { what: "evaluating the global model", why });
                self.report_evaluation();
            }
        }
    }

    /// The round that made the parent model.
    pub(in crate::protocol) fn parent_round(&self) -> Round {
        self.head().map_or(Round::GENESIS, |head| head.decree.round)
    }

    pub(in crate::protocol) fn report_evaluation(&mut self) {
        let Work::Done(metrics) = self.open.evaluation else { return };
        if let Some(leader) = self.leader_or_candidate().filter(|leader| **leader != self.me).cloned() {
            self.publish(Topic::Election(self.round(), leader), Body::Evaluation(metrics));
        }
    }

    pub(in crate::protocol) fn on_evaluation(&mut self, sender: PeerId, round: Round, metrics: Metrics) {
        if round == self.round() && self.is_member(&sender) {
            self.open.evaluations.insert(sender, metrics);
        }
    }

    /// What the evaluations that are in say of the parent model, summed in `PeerId` order.
    pub(in crate::protocol) fn reported_metrics(&self) -> Option<Metrics> {
        Metrics::weighted_mean(self.open.evaluations.values())
    }

    /// The leader sums up once every live member has reported, and tells all.
    pub(in crate::protocol) fn advance_parent_metrics(&mut self, now: Instant) {
        let Some(leading) = self.open.leading.as_ref().filter(|leading| leading.parent_metrics.is_none()) else {
            return;
        };
        let since = leading.since;
        let Some(roster) = self.durable.roster() else { return };
        let reported = |peer: &PeerId| self.open.evaluations.contains_key(peer) || !self.is_awaited(peer, since, now);
        let own = matches!(self.open.evaluation, Work::Done(_));
        if self.parent_model().is_none() || !own || !roster.members().iter().all(reported) {
            return;
        }
        let Some(metrics) = self.reported_metrics() else {
            // Nobody could say how good the model is: the last round need not wait any longer.
            let ends = !self.is_training_round();
            return self.with_leadership(|leading| leading.late |= ends);
        };
        if let Some(leading) = &mut self.open.leading {
            leading.parent_metrics = Some(metrics);
        }
        self.tell_parent_metrics(metrics);
        self.beat(now);
    }

    pub(in crate::protocol) fn tell_parent_metrics(&mut self, metrics: Metrics) {
        let round = self.parent_round();
        let Some(model) = self.parent_model().map(|manifest| manifest.digest) else { return };
        if self.metrics_told != Some((round, model)) {
            self.metrics_told = Some((round, model));
            self.notify(Notice::Evaluated { round, model, metrics });
        }
    }
}
