//! Training: every member but the leader trains from the parent model and announces its update.

use std::time::Instant;

use crate::protocol::message::{Body, Update, clip, has};
use crate::protocol::phases::round::Work;
use crate::protocol::{Action, Job, Notice, Peer, Topic, Trained};
use crate::types::Round;

impl Peer {
    pub(in crate::protocol) fn advance_member(&mut self, now: Instant) {
        if !self.is_member(&self.me) {
            return;
        }
        self.advance_evaluation();
        self.advance_training(now);
        self.advance_acceptance(now);
    }

    fn advance_training(&mut self, now: Instant) {
        let Some(model) = self.parent_model().copied() else { return };
        let evaluated = matches!(self.open.evaluation, Work::Done(_));
        if !self.is_training_round() || !evaluated || self.open.training != Work::Idle || !self.trains() {
            return;
        }
        if self.durable.open.update.as_ref().is_some_and(|update| self.transfers.holds(&update.manifest.digest)) {
            // Trained before a restart.
            self.open.training = Work::Done(());
            self.open.marks.trained = Some(now);
            return self.report_update();
        }
        self.open.training = Work::Running;
        let round = self.round();
        self.notify(Notice::TrainingStarted { round });
        let residual = self.durable.residual;
        self.actions.push(Action::Start(Job::Train { round, model, residual }));
    }

    /// The leader does not train, nor does the candidate that is about to lead.
    pub(in crate::protocol) fn trains(&self) -> bool {
        let alone = self.durable.roster().is_some_and(|roster| roster.len() == 1);
        self.config.leader_trains || alone || self.leader_or_candidate() != Some(&self.me)
    }

    pub(in crate::protocol) fn on_trained(&mut self, round: Round, result: Result<Trained, String>, now: Instant) {
        if round != self.round() || self.open.training != Work::Running {
            return;
        }
        match (result, self.parent()) {
            (Ok(Trained { update: manifest, unsent, metrics }), Some(parent)) if metrics.is_finite() => {
                self.transfers.hold(manifest);
                let num_examples = self.num_examples;
                self.durable.open.update = Some(Update { parent, manifest, num_examples, metrics });
                self.durable.open.unsent = unsent;
                self.persist();
                self.open.training = Work::Done(());
                self.open.marks.trained = Some(now);
                self.notify(Notice::Trained { round, update: manifest.digest, metrics });
            }
            (result, _) => {
                let why = result.err().unwrap_or_else(|| "training gave a loss that is not finite".into());
                self.open.training = Work::Failed;
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
        self.publish(Topic::Report(self.round(), leader), body);
    }

    /// Answers a leader's heartbeat: with what the leader lacks, else with a sign of life.
    pub(in crate::protocol) fn report(&mut self, leader_has: u8) {
        let before = self.actions.len();
        if leader_has & has::EVALUATION == 0 {
            self.report_evaluation();
        }
        if leader_has & has::UPDATE == 0 {
            self.report_update();
        }
        if self.actions.len() == before
            && let Some(leader) = self.open.following.clone()
        {
            self.publish(Topic::Report(self.round(), leader), Body::Status);
        }
    }
}
