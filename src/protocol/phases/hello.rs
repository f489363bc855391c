//! Who is there: hellos, goodbyes and the compatibility check.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::protocol::lag::Lag;
use crate::protocol::message::{Body, Hello};
use crate::protocol::timer::{Timer, Timers};
use crate::protocol::{Action, Difference, Ended, Greeting, Notice, Peer, Topic};
use crate::types::{Digest, PeerId, Round};

/// From this many peers on, hellos (which everyone hears) come less often.
const HELLO_CROWD: usize = 16;

/// Hellos are at most so many times rarer.
const CROWDS_MAX: u32 = 64;

/// How many times rarer hellos are among so many peers: together they say as many a second as a few do.
fn crowd(peers: usize) -> u32 {
    u32::try_from(peers / HELLO_CROWD).unwrap_or(u32::MAX).clamp(1, CROWDS_MAX)
}

impl Peer {
    pub(in crate::protocol) fn on_connected(&mut self, now: Instant) {
        self.connected = true;
        self.open.reported = false;
        self.say_hello(now);
        self.tell_brokers();
        // What was silent while the broker was away was not silent by its own fault.
        for neighbour in self.neighbours.values_mut() {
            neighbour.heard = now;
        }
        if self.timers.is_running(Timer::Election) {
            self.watch_leader(now);
        }
        if self.timers.is_running(Timer::Resend) {
            self.timers.set(Timer::Resend, now);
        }
        if self.open.leading.is_some() {
            self.timers.set(Timer::Beat, now);
        }
        self.restart_transfers(now);
        self.await_others(now);
    }

    pub(in crate::protocol) fn say_hello(&mut self, now: Instant) {
        let head = self.head().map(|head| (head.decree.round, head.decree.digest()));
        let hello = Hello {
            incarnation: self.incarnation,
            entries: self.entries.clone(),
            layout: self.layout_digest,
            num_examples: self.num_examples,
            head,
            genesis: self.head().filter(|_| self.is_member(&self.me)).map(|head| head.genesis),
            done: self.is_done(),
            number: self.lag.start(now),
            lag_ms: self.lag.told(),
            broker: self.broker.clone(),
        };
        self.publish_retained(Topic::Init(self.me.clone()), Body::Hello(hello));
        self.hello_said = Some(now);
        self.timers.set(Timer::Hello, now + self.hello_interval());
    }

    /// Members are heard by their leader all the time; the others only by their hellos.
    fn hello_interval(&self) -> Duration {
        match self.durable.roster() {
            Some(roster) if self.is_member(&self.me) => {
                let often = if self.head().is_some() { self.config.election_timeout } else { self.heartbeat() };
                often * crowd(roster.len())
            }
            // Few come later, and a leader is to see them soon.
            Some(_) => self.heartbeat(),
            None => self.heartbeat() * crowd(self.genesis.present.len()),
        }
    }

    /// How long a peer may be silent of which only hellos are heard.
    fn hello_silence(&self) -> Duration {
        let founded = self.durable.roster().is_some();
        self.silence() * if founded { 1 } else { crowd(self.genesis.present.len()) }
    }

    /// Somebody came who may not have heard this peer: some brokers keep no hellos. One answer is for all who came of
    /// late; once there is a federation, one member answers for it.
    pub(in crate::protocol) fn answer_hello(&mut self, now: Instant) {
        if self.head().is_some() && !self.answers_for_the_federation() || !self.connected || self.stopped {
            return;
        }
        let pause = self.heartbeat() / 4 * crowd(self.neighbours.len());
        // Many hear of one peer at the same time. Each has its own moment within the pause.
        let moment = pause * u32::from(Digest::of(self.me.as_str().as_bytes()).0[0]) / 256;
        let earliest = self.hello_said.map_or(now, |said| said + pause);
        self.timers.set_earlier(Timer::Hello, earliest.max(now + moment));
    }

    pub(in crate::protocol) fn advance_hello(&mut self, now: Instant) {
        if self.timers.fired(Timer::Hello, now) && !self.stopped {
            if self.connected {
                self.say_hello(now);
            } else {
                self.timers.set(Timer::Hello, now + self.heartbeat());
            }
        }
    }

    pub(in crate::protocol) fn on_hello(&mut self, sender: PeerId, round: Round, hello: Hello, now: Instant) {
        let is_new = self.neighbours.get(&sender).is_none_or(|known| known.greeting.is_none());
        let founded = hello.genesis.is_some();
        let difference = self.difference(&hello);
        let hosts = hello.broker.is_some();
        if let Some(neighbour) = self.neighbours.get_mut(&sender) {
            let other_group = difference.is_some().then(|| hello.group());
            neighbour.greeting = Some(Greeting {
                incarnation: hello.incarnation,
                other_group,
                done: hello.done,
                lag: Lag::of_other(hello.lag_ms),
                broker: hello.broker,
            });
            neighbour.difference.clone_from(&difference);
        }
        if self.is_replaced(&sender) {
            self.replaced.insert(sender.clone());
        } else {
            self.replaced.remove(&sender);
        }
        if hosts && self.head().is_none() {
            self.tell_brokers();
        }
        self.genesis.others_seen |= difference.is_some();
        self.note_presence(&sender, now);
        match difference {
            None if is_new => self.notify(Notice::Joined(sender)),
            None => {}
            Some(difference) => return self.on_incompatible(sender, difference, is_new, founded),
        }
        if round < self.round() && self.answers_for_the_federation() {
            self.tell_head(now);
        }
    }

    /// A federation that exists is right; whoever differs stays out.
    fn on_incompatible(&mut self, peer: PeerId, difference: Difference, is_new: bool, founded: bool) {
        let outside = self.durable.roster().is_none() || !self.is_member(&self.me) && self.is_member(&peer);
        if founded && outside {
            self.notify(Notice::Refused { peer, difference });
            self.ended = Some(Ended::Refused);
            self.stop();
        } else if is_new {
            self.notify(Notice::Incompatible { peer, difference });
        }
    }

    pub(in crate::protocol) fn on_goodbye(&mut self, sender: &PeerId, now: Instant) {
        let Some(neighbour) = self.neighbours.get_mut(sender) else { return };
        let left = !neighbour.gone && neighbour.greeting.is_some();
        neighbour.gone = true;
        self.note_presence(sender, now);
        if left {
            self.notify(Notice::Left(sender.clone()));
        }
    }

    /// The first thing that keeps another peer from training with this one.
    pub(in crate::protocol) fn difference(&self, hello: &Hello) -> Option<Difference> {
        let of_layouts = || {
            let (theirs, mine) = hello.layout.zip(self.layout_digest).filter(|(theirs, mine)| theirs != mine)?;
            Some(Difference { key: "model layout".into(), theirs: theirs.short(), mine: mine.short() })
        };
        Difference::between(&hello.entries, &self.entries).or_else(of_layouts)
    }

    /// Whether a peer said hello and can train with this one.
    pub(in crate::protocol) fn is_compatible(&self, peer: &PeerId) -> bool {
        self.neighbours
            .get(peer)
            .is_some_and(|neighbour| neighbour.greeting.is_some() && neighbour.difference.is_none())
    }

    /// The compatible peers that are there, with this one.
    pub(in crate::protocol) fn present(&self, now: Instant) -> BTreeSet<PeerId> {
        let others = self.neighbours.keys().filter(|peer| self.is_here(peer, now) && self.is_compatible(peer));
        others.cloned().chain([self.me.clone()]).collect()
    }

    /// Whether a peer that is not led yet was heard of late and did not say goodbye.
    pub(in crate::protocol) fn is_here(&self, peer: &PeerId, now: Instant) -> bool {
        self.is_heard(peer, now, self.hello_silence())
    }

    /// One peer answers those who lag behind: the leader, or anybody where none is known.
    fn answers_for_the_federation(&self) -> bool {
        self.ended.is_some() || self.open.leading.is_some() || self.open.following.is_none()
    }

    /// Tells the newest decree to those who lag behind, at most once in a heartbeat.
    pub(in crate::protocol) fn tell_head(&mut self, now: Instant) {
        let Some(head) = self.durable.head.clone() else { return };
        if self.head_told.is_none_or(|at| now.saturating_duration_since(at) >= self.heartbeat() / 2) {
            self.head_told = Some(now);
            self.publish(Topic::Head, Body::Head(head));
        }
    }

    pub(in crate::protocol) fn stop(&mut self) {
        if !self.stopped {
            self.stopped = true;
            self.timers = Timers::default();
            self.actions.push(Action::Stop);
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::protocol::samples::identity;
    use crate::protocol::{Config, Event};

    fn connected(name: &str, now: Instant) -> (Peer, Vec<Bytes>) {
        let config = Config { min_peers: 1000, ..Config::default() };
        let mut peer = Peer::new(config, identity(name), None, &BTreeSet::new(), now);
        let hellos = hellos(peer.handle(Event::Connected, now));
        (peer, hellos)
    }

    fn hellos(actions: Vec<Action>) -> Vec<Bytes> {
        let hello = |action| match action {
            Action::Publish { topic: Topic::Init(_), message, .. } => Some(message),
            _ => None,
        };
        actions.into_iter().filter_map(hello).collect()
    }

    /// How many hellos `peer` says up to `end`, one tick after the other.
    fn said_until(peer: &mut Peer, end: Instant) -> usize {
        let mut said = 0;
        while let Some(at) = peer.deadline().filter(|&at| at < end) {
            said += hellos(peer.handle(Event::Tick, at)).len();
        }
        said
    }

    #[test]
    fn strangers_are_answered_soon_and_all_of_them_at_once() {
        let mut now = Instant::now();
        let (mut me, _) = connected("me", now);
        let pause = me.heartbeat() / 4;
        now += pause / 8;
        for name in 0..10 {
            for hello in connected(&format!("stranger-{name}"), now).1 {
                assert!(hellos(me.handle(Event::Message(hello), now)).is_empty(), "it answers each by itself");
            }
        }
        assert_eq!(said_until(&mut me, now + 2 * pause), 1);
    }

    #[test]
    fn who_is_known_is_not_answered_and_who_was_gone_is() {
        let now = Instant::now();
        let ((mut me, _), (other, hello)) = (connected("me", now), connected("other", now));
        let pause = me.heartbeat() / 4;
        me.handle(Event::Message(hello[0].clone()), now);
        assert_eq!(said_until(&mut me, now + 2 * pause), 1);
        let later = now + 2 * pause;
        me.handle(Event::Message(hello[0].clone()), later);
        assert_eq!(said_until(&mut me, later + pause), 0);
        me.handle(Event::Message(other.last_will().1), later + pause);
        me.handle(Event::Message(hello[0].clone()), later + pause);
        assert_eq!(said_until(&mut me, later + 2 * pause), 1);
    }
}
