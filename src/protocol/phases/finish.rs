//! Finishing: the last decree is known. A peer stays until it holds the last model; the leader, until the others do too,
//! and for a while for those that it lost sight of: who was cut off at the end is to find somebody with the model.

use std::time::{Duration, Instant};

use crate::protocol::timer::Timer;
use crate::protocol::{Ended, Neighbour, Notice, Peer};
use crate::types::PeerId;

/// How many election timeouts a peer stays for others, or for a last model that nobody serves.
const LINGER_TIMEOUTS: u32 = 2;

/// How long the last leader stays for those who are away: long enough for a connection that broke at the end.
const ABSENCE_MAX: Duration = Duration::from_secs(10);

/// The same, in election timeouts.
const ABSENCE_TIMEOUTS: u32 = 4;

impl Peer {
    pub(in crate::protocol) fn begin_finish(&mut self, now: Instant) {
        self.ended = Some(Ended::Finished);
        self.linger(now);
        let absence = (ABSENCE_TIMEOUTS * self.config.election_timeout).min(ABSENCE_MAX);
        self.timers.set(Timer::Stay, now + absence);
        self.note_done(now);
    }

    /// Whether this peer has all that the federation leaves.
    pub(in crate::protocol) fn is_done(&self) -> bool {
        let keeps_model = self.head().is_some_and(|head| self.transfers.is_durable(&head.decree.model().digest));
        self.ended == Some(Ended::Finished) && keeps_model
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

    /// Starts the time anew for which a peer stays.
    pub(in crate::protocol) fn linger(&mut self, now: Instant) {
        if self.ended == Some(Ended::Finished) && !self.stopped {
            self.timers.set(Timer::Linger, now + LINGER_TIMEOUTS * self.config.election_timeout);
        }
    }

    pub(in crate::protocol) fn advance_finish(&mut self, now: Instant) {
        if self.ended != Some(Ended::Finished) || self.stopped {
            return;
        }
        if self.transfers.is_moving(now, self.silence()) {
            self.linger(now);
        }
        self.timers.fired(Timer::Linger, now);
        self.timers.fired(Timer::Stay, now);
        let lingers = self.timers.is_running(Timer::Linger);
        if !self.is_done() {
            if !lingers {
                self.stop();
            }
            return;
        }
        let is_last_leader = self.head().is_some_and(|head| head.decree.leader == self.me);
        let (present, away): (Vec<PeerId>, Vec<PeerId>) =
            self.lacking().into_iter().partition(|peer| self.is_live(peer, now));
        let stays = self.timers.is_running(Timer::Stay) && !away.is_empty();
        if !is_last_leader || !(stays || lingers && !present.is_empty()) {
            self.stop();
        } else if stays && !std::mem::replace(&mut self.stays, true) {
            self.notify(Notice::Staying(away));
        }
    }

    /// Peers of this federation that have not said that they hold the last model.
    fn lacking(&self) -> Vec<PeerId> {
        let lacks = |peer: &PeerId, neighbour: &Neighbour| match &neighbour.greeting {
            Some(greeting) => neighbour.difference.is_none() && !greeting.done,
            None => self.is_member(peer),
        };
        self.neighbours
            .iter()
            .filter(|(peer, neighbour)| lacks(peer, neighbour))
            .map(|(peer, _)| peer.clone())
            .collect()
    }
}
