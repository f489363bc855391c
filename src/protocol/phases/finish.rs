//! Finishing: the last decree is known. A peer stays until it holds the last model; the leader, until the others do too,
//! and for a while for those that it lost sight of: who was cut off at the end is to find somebody with the model. So is who comes
//! back later: a peer that is started again when all is over stays for a while, too.

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

/// How long a peer stays that was started again when all was over, unless somebody comes who lacks the last model.
const RETURN_MAX: Duration = Duration::from_secs(4);

impl Peer {
    pub(in crate::protocol) fn begin_finish(&mut self, now: Instant) {
        self.ended = Some(Ended::Finished);
        self.linger(now);
        self.stay(ABSENCE_TIMEOUTS, ABSENCE_MAX, now);
        self.note_done(now);
    }

    /// Who was started again when all was over waits a while for others to come.
    pub(in crate::protocol) fn await_others(&mut self, now: Instant) {
        if self.came_back && !self.stopped {
            self.stay(LINGER_TIMEOUTS, RETURN_MAX, now);
        }
    }

    fn stay(&mut self, election_timeouts: u32, max: Duration, now: Instant) {
        self.timers.set(Timer::Stay, now + (election_timeouts * self.config.election_timeout).min(max));
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
        let waits = self.timers.is_running(Timer::Stay);
        let stays = waits && !away.is_empty();
        let helps = lingers && !present.is_empty();
        let serves_as_leader = is_last_leader && (stays || helps);
        let serves_again = self.came_back && !self.all_are_done() && (waits || helps);
        if !serves_as_leader && !serves_again {
            self.stop();
        } else if stays && !std::mem::replace(&mut self.stays, true) {
            self.notify(Notice::Staying(away));
        }
    }

    /// Whether every other member has said that it holds the last model.
    fn all_are_done(&self) -> bool {
        let members = self.durable.roster().map(|roster| roster.members()).unwrap_or_default();
        let greeting = |peer: &PeerId| self.neighbours.get(peer).and_then(|neighbour| neighbour.greeting.as_ref());
        members.iter().all(|peer| *peer == self.me || greeting(peer).is_some_and(|greeting| greeting.done))
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::protocol::decree::{Outcome, Reason};
    use crate::protocol::message::{Body, Head, Hello};
    use crate::protocol::samples::{hello, id, identity, roster, says};
    use crate::protocol::{Action, Config, Decree, Durable, Event};
    use crate::types::{Digest, Round};

    #[test]
    fn who_is_started_when_all_is_over_stays_a_while_for_those_who_lack_the_model() {
        let now = Instant::now();
        let roster = roster(["a", "b"]);
        let model = *Decree::sample(&roster).model();
        let decree =
            Decree { round: Round(4), outcome: Outcome::Finish(Reason::Rounds, model), ..Decree::sample(&roster) };
        let (accepts, genesis) = (["a", "b"].map(id).into(), Digest::of(b"genesis"));
        let durable =
            Durable { head: Some(Head { decree, accepts, genesis }), model: Some(model), ..Durable::default() };
        let started = || {
            let held = BTreeSet::from([model.digest]);
            Peer::new(Config::default(), identity("a"), Some(durable.clone()), &held, now)
        };
        let stops = |actions: Vec<Action>| actions.iter().any(|action| matches!(action, Action::Stop));
        let says_hello = |peer: &Peer, done| says("b", 5, 0, Body::Hello(Hello { done, ..hello(peer) }));
        let mut peer = started();
        assert!(!stops(peer.handle(Event::Connected, now)));
        let alone = now + LINGER_TIMEOUTS * peer.config.election_timeout;
        assert!(!stops(peer.handle(says_hello(&peer, false), alone - Duration::from_millis(1))));
        assert!(!stops(peer.handle(Event::Tick, alone)), "somebody is there who lacks it");
        assert!(stops(peer.handle(Event::Tick, alone + 2 * LINGER_TIMEOUTS * peer.config.election_timeout)));
        let mut peer = started();
        peer.handle(Event::Connected, now);
        assert!(stops(peer.handle(Event::Tick, alone)), "nobody has come");
        let mut peer = started();
        peer.handle(Event::Connected, now);
        assert!(stops(peer.handle(says_hello(&peer, true), now)), "everybody has it");
    }
}
