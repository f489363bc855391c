//! Finishing: the last decree is known; the leader stays until the others know it too.

use std::time::Instant;

use crate::protocol::timer::Timer;
use crate::protocol::{Ended, Notice, Peer};
use crate::types::PeerId;

impl Peer {
    pub(in crate::protocol) fn begin_finish(&mut self, now: Instant) {
        let Some(head) = self.head().cloned() else { return };
        let Some(reason) = head.decree.reason() else { return };
        self.ended = Some(Ended::Finished);
        let model = self.durable.model.map(|manifest| manifest.digest);
        let (rounds, metrics) = (self.last_model_round(), head.decree.parent_metrics);
        self.notify(Notice::Finished { reason, rounds, model, metrics });
        self.timers.set(Timer::Linger, now + self.config.election_timeout);
        // For the leader this is the word that it may leave.
        if self.connected {
            self.say_hello(now);
        }
    }

    pub(in crate::protocol) fn advance_finish(&mut self, now: Instant) {
        if self.ended != Some(Ended::Finished) || self.stopped {
            return;
        }
        let Some(head) = self.head() else { return };
        let leads = head.decree.leader == self.me;
        let done = |peer: &PeerId| !self.is_live(peer, now) || *peer == self.me || self.knows_the_end(peer);
        let all_know = head.decree.next_roster.members().iter().all(done);
        if !leads || all_know || self.timers.fired(Timer::Linger, now) {
            self.stop();
        }
    }

    fn knows_the_end(&self, peer: &PeerId) -> bool {
        let round = self.head().map(|head| head.decree.round);
        let hello = self.neighbours.get(peer).and_then(|neighbour| neighbour.hello.as_ref());
        hello.is_some_and(|hello| hello.head.map(|(round, _)| round) >= round)
    }
}
