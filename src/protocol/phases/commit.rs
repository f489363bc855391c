//! Committing: a quorum holds the decree and its model, so the round is decided.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::protocol::message::{Body, Head};
use crate::protocol::timer::Timer;
use crate::protocol::{Action, Committed, Notice, Peer, Topic};
use crate::transfer::Manifest;
use crate::types::{PeerId, Round};

impl Peer {
    pub(in crate::protocol) fn advance_commit(&mut self, now: Instant) {
        let (Some(leading), Some(roster)) = (&self.open.leading, self.durable.roster()) else { return };
        let Some(decree) = &leading.proposal else { return };
        let decided = roster.is_quorum(&leading.accepts);
        #[cfg(test)]
        let decided = decided || self.flaws.commit_alone;
        if !decided {
            return;
        }
        let genesis = self.head().map_or_else(|| decree.digest(), |head| head.genesis);
        let head = Head { decree: decree.clone(), accepts: leading.accepts.iter().cloned().collect(), genesis };
        self.open.marks.accepted = Some(now);
        self.commit(head, true, now);
    }

    pub(in crate::protocol) fn on_head(&mut self, head: Head, now: Instant) {
        let newer = self.head().is_none_or(|known| known.decree.round < head.decree.round);
        if !newer || self.ended.is_some() {
            return;
        }
        match self.head() {
            // A federation of this name that finished before this peer's began.
            None if self.durable.founding.roster.is_none() && head.decree.reason().is_some() => {
                return self.tell_earlier_federation(head.decree.round);
            }
            Some(known) if known.genesis != head.genesis => {
                return self.bad_message(None, "it is of another federation with the same name".into());
            }
            _ => {}
        }
        let next = head.decree.round == self.round() && self.durable.roster().is_some();
        if next && !self.durable.roster().is_some_and(|roster| roster.is_quorum(&head.accepts)) && !self.lax() {
            return self.bad_message(None, "it calls a decree committed without a quorum of accepts".into());
        }
        self.commit(head, false, now);
    }

    /// Whether tests have switched off the quorum, so that heads without one go round.
    fn lax(&self) -> bool {
        #[cfg(test)]
        return self.flaws.commit_alone;
        #[cfg(not(test))]
        false
    }

    fn tell_earlier_federation(&mut self, round: Round) {
        if self.earlier_federation != Some(round) {
            self.earlier_federation = Some(round);
            self.notify(Notice::EarlierFederation { round });
        }
    }

    fn commit(&mut self, head: Head, led: bool, now: Instant) {
        self.cancel_training();
        let head_is_genesis = head.decree.round == Round::GENESIS;
        if let Some(metrics) = head.decree.parent_metrics.filter(|_| head.decree.round == self.round()) {
            self.tell_parent_metrics(metrics);
        }
        let committed = Committed {
            decree: head.decree.clone(),
            digest: head.decree.digest(),
            members: self.durable.roster().map_or(0, |roster| roster.len()),
            accepts: head.accepts.clone(),
            term: self.promised(),
            led,
            seconds: self.open.marks.seconds(now),
            decided: now,
        };
        self.durable.head = Some(head.clone());
        self.durable.founding = crate::protocol::durable::Founding::default();
        self.note_model_held();
        self.durable.settle(&self.me, &head.decree);
        #[cfg(test)]
        if self.flaws.forget_returned {
            self.durable.residual.returned = None;
        }
        self.durable.open = Default::default();
        self.durable.open.round = head.decree.round.next();
        self.persist();
        if led {
            self.publish_retained(Topic::Head, Body::Head(head));
        }
        self.notify(Notice::Committed(Box::new(committed)));
        self.tell_few_updates();
        if head_is_genesis {
            // From now on hellos say that there is a federation, so that who does not fit learns it.
            self.timers.set(Timer::Hello, now);
        }
        self.forget_old_blobs();
        self.tell_brokers();
        self.enter_round(now);
    }

    /// Members may have died or declined since the settings were checked: the round goes on, and every peer is told.
    fn tell_few_updates(&mut self) {
        let Some(decree) = self.head().map(|head| &head.decree) else { return };
        let (round, updates) = (decree.round, decree.contributors.len());
        let needed = self.config.strategy.rule.updates_proven();
        if round != Round::GENESIS && decree.reason().is_none() && updates < needed {
            self.notify(Notice::FewUpdates { round, updates, needed });
        }
    }

    /// The head's model is told of once it is held; once it is durable, it is the one that a restart or the end falls back on.
    /// `true`: it is now.
    pub(in crate::protocol) fn note_model_held(&mut self) -> bool {
        let Some(head) = &self.durable.head else { return false };
        let model = *head.decree.model();
        if self.durable.model == Some(model) || !self.transfers.holds(&model.digest) {
            return false;
        }
        if self.model_told != Some(model.digest) {
            self.model_told = Some(model.digest);
            let round = self.last_model_round();
            self.notify(Notice::ModelHeld { round, model: model.digest });
        }
        let durable = self.transfers.is_durable(&model.digest);
        if durable {
            self.durable.model = Some(model);
        }
        durable
    }

    fn forget_old_blobs(&mut self) {
        let keep: BTreeSet<_> = self.durable.blobs().collect();
        self.transfers.retain(&keep);
        self.actions.push(Action::Retain(keep));
    }

    /// The newest model, if this peer is to have it.
    pub(in crate::protocol) fn head_model(&self) -> Option<&Manifest> {
        self.parent_model().filter(|_| self.is_member(&self.me) || self.ended.is_some())
    }

    /// Who may have the newest model: those who accepted it, its leader first, and then all other members. They pull it, too,
    /// and may be the only ones left that have it.
    pub(in crate::protocol) fn head_holders(&self) -> Vec<PeerId> {
        let Some(head) = self.head() else { return Vec::new() };
        let accepted: BTreeSet<&PeerId> = head.accepts.iter().collect();
        let leader = head.accepts.iter().filter(|peer| **peer == head.decree.leader);
        let others = head.accepts.iter().filter(|peer| **peer != head.decree.leader);
        let members = head.decree.next_roster.members().iter().filter(|peer| !accepted.contains(peer));
        leader.chain(others).chain(members).filter(|peer| **peer != self.me).cloned().collect()
    }

    /// The last round that made a model.
    pub(in crate::protocol) fn last_model_round(&self) -> Round {
        self.head().map_or(Round::GENESIS, |head| match head.decree.reason() {
            Some(_) => Round(head.decree.round.0.saturating_sub(1)),
            None => head.decree.round,
        })
    }
}
