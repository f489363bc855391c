//! Finishing: the last decree is known. A peer stays until it holds the last model; the leader, until the others do too.

use std::time::Instant;

use crate::protocol::timer::Timer;
use crate::protocol::{Ended, Notice, Peer};
use crate::types::PeerId;

/// How many election timeouts a peer stays for others, or for a last model that nobody serves.
const LINGER_TIMEOUTS: u32 = 2;

impl Peer {
    pub(in crate::protocol) fn begin_finish(&mut self, now: Instant) {
        self.ended = Some(Ended::Finished);
        self.timers.set(Timer::Linger, now + LINGER_TIMEOUTS * self.config.election_timeout);
        self.note_done(now);
    }

    /// Whether this peer has all that the federation leaves.
    pub(in crate::protocol) fn is_done(&self) -> bool {
        let holds_model = self.head().is_some_and(|head| self.transfers.holds(&head.decree.model().digest));
        self.ended == Some(Ended::Finished) && holds_model
    }

    /// Tells people, and the leader, once all is here.
    pub(in crate::protocol) fn note_done(&mut self, now: Instant) {
        if !self.is_done() {
            return;
        }
        let Some((reason, metrics, model)) = self.head().and_then(|head| {
            let decree = &head.decree;
            decree.reason().map(|reason| (reason, decree.parent_metrics, decree.model().digest))
        }) else {
            return;
        };
        let rounds = self.last_model_round();
        self.notify(Notice::Finished { reason, rounds, model, metrics });
        if self.connected {
            self.say_hello(now);
        }
    }

    pub(in crate::protocol) fn advance_finish(&mut self, now: Instant) {
        if self.ended != Some(Ended::Finished) || self.stopped {
            return;
        }
        if self.transfers.is_moving(now, self.silence()) {
            self.timers.set(Timer::Linger, now + LINGER_TIMEOUTS * self.config.election_timeout);
        }
        let given_up = self.timers.fired(Timer::Linger, now);
        if given_up || self.is_done() && !self.is_needed(now) {
            self.stop();
        }
    }

    /// Whether the last leader still has live members to serve.
    fn is_needed(&self, now: Instant) -> bool {
        let Some(head) = self.head().filter(|head| head.decree.leader == self.me) else { return false };
        let done = |peer: &PeerId| {
            let greeting = self.neighbours.get(peer).and_then(|neighbour| neighbour.greeting.as_ref());
            *peer == self.me || !self.is_live(peer, now) || greeting.is_some_and(|greeting| greeting.done)
        };
        !head.decree.next_roster.members().iter().all(done)
    }
}
