//! Genesis: how the first roster comes about.
//!
//! The lowest peer that is there is the candidate. It *calls* everyone it sees; whoever sees nobody else *joins*; with
//! everyone's join at one call it *founds* the roster, and round 0 is a round like the others, whose leader
//! proposes the initial weights.
//!
//! A join binds to the candidate until that candidate gives up: by a later call, or by joining another
//! candidate's call itself, who then tells those who were bound (`released`). Only a candidate counts its joins,
//! so it cannot be wrong about what it gives up. Two rosters that share a member are so never both founded; and two that
//! share none cannot be, since of any two peers one sees the other. A candidate that dies for good
//! between its call and the founding blocks those who joined it; they say for whom they wait.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use bytes::Bytes;

use crate::aggregation::statistics;
use crate::protocol::message::Body;
use crate::protocol::roster::{ROSTER_MAX, Roster};
use crate::protocol::timer::Timer;
use crate::protocol::{Notice, Peer, Topic};
use crate::types::{Digest, PeerId, Round, Term};

/// A candidate's call under way; a restart begins a new one.
#[derive(Debug, Default)]
pub(in crate::protocol) struct Genesis {
    /// Who was there when the settle time began.
    pub present: BTreeSet<PeerId>,
    /// Whether any peer with another configuration was ever seen.
    pub others_seen: bool,
    /// Somebody has come or gone since.
    changed: bool,
    settled: bool,
    /// The roster called for, if this peer is the candidate.
    calling: Option<Roster>,
    /// Who joined it, and what the inputs of each are like.
    joined: BTreeMap<PeerId, Bytes>,
    /// Members that cannot join, and to which call of which other candidate they are bound.
    bound: BTreeMap<PeerId, (PeerId, Term)>,
    /// Candidates that joined this peer's call, and so gave up all of theirs up to this one.
    gave_up: BTreeMap<PeerId, Term>,
}

impl Peer {
    pub(in crate::protocol) fn advance_genesis(&mut self, now: Instant) {
        if self.head().is_some() {
            return;
        }
        if self.durable.founding.roster.is_some() {
            return self.repeat_founded(now);
        }
        self.settle(now);
        if !self.connected {
            self.timers.clear(Timer::Call);
            return;
        }
        let candidate = self.genesis.present.first() == Some(&self.me);
        let enough = self.genesis.present.len() >= self.config.min_peers && self.genesis.present.len() <= ROSTER_MAX;
        if !(candidate && enough && self.genesis.settled && self.leads_in_number(now)) {
            self.genesis.calling = None;
            self.timers.clear(Timer::Call);
            return;
        }
        let incarnation = |peer: &PeerId| Some((peer.clone(), self.incarnation_of(peer)?));
        let roster = Roster::of(self.genesis.present.iter().filter_map(incarnation).collect());
        if self.genesis.calling.as_ref() != Some(&roster) {
            self.call(roster);
            self.timers.clear(Timer::Call);
        }
        self.settle_joins(now);
        if self.durable.founding.roster.is_none() && self.repeat_due(now) {
            self.publish_call();
        }
    }

    /// Looks again who is there: time alone may have made somebody silent.
    pub(in crate::protocol) fn look_around(&mut self, now: Instant) {
        if self.durable.roster().is_none() {
            let present = self.present(now);
            self.genesis.changed |= present != self.genesis.present;
            self.genesis.present = present;
        }
    }

    /// A peer has said hello or goodbye.
    pub(in crate::protocol) fn note_presence(&mut self, peer: &PeerId, now: Instant) {
        let is_here = self.is_here(peer, now) && self.is_compatible(peer);
        let changed =
            if is_here { self.genesis.present.insert(peer.clone()) } else { self.genesis.present.remove(peer) };
        self.genesis.changed |= changed;
    }

    /// Starts the settle time again whenever somebody has come or gone.
    fn settle(&mut self, now: Instant) {
        if std::mem::take(&mut self.genesis.changed) {
            self.genesis.settled = false;
            self.timers.set(Timer::Settle, now + self.config.settle_time);
        }
        if self.timers.fired(Timer::Settle, now) {
            self.genesis.settled = true;
        }
    }

    fn repeat_due(&mut self, now: Instant) -> bool {
        let due = !self.timers.is_running(Timer::Call) || self.timers.fired(Timer::Call, now);
        if due {
            self.timers.set(Timer::Call, now + self.heartbeat());
        }
        due
    }

    /// Of peers with different configurations the larger group founds the federation, then the one with the first name.
    pub(in crate::protocol) fn other_group(&self, now: Instant) -> Option<PeerId> {
        if !self.genesis.others_seen {
            return None;
        }
        let mut others: BTreeMap<Digest, BTreeSet<&PeerId>> = BTreeMap::new();
        for (peer, neighbour) in &self.neighbours {
            let group = neighbour.greeting.as_ref().and_then(|greeting| greeting.other_group);
            if let Some(group) = group.filter(|_| self.is_here(peer, now)) {
                others.entry(group).or_default().insert(peer);
            }
        }
        let mine = &self.genesis.present;
        let larger = |group: &&BTreeSet<&PeerId>| {
            group.len() > mine.len() || group.len() == mine.len() && group.first().copied() < mine.first()
        };
        others.values().find(larger).and_then(|group| group.first().map(|peer| (*peer).clone()))
    }

    fn leads_in_number(&self, now: Instant) -> bool {
        self.other_group(now).is_none()
    }

    fn call(&mut self, roster: Roster) {
        self.genesis.joined.clear();
        self.durable.founding.last_call = self.durable.founding.last_call.next();
        self.genesis.calling = Some(roster);
        self.join_own_call();
        self.persist();
    }

    /// The candidate joins its own call, unless it is bound to another's.
    fn join_own_call(&mut self) {
        if self.bound_to_other().is_none() {
            self.durable.founding.joined = Some((self.me.clone(), self.durable.founding.last_call));
            self.genesis.joined.insert(self.me.clone(), self.summary.clone());
        }
    }

    /// The call of another candidate that this peer is bound to.
    fn bound_to_other(&self) -> Option<&(PeerId, Term)> {
        self.durable.founding.joined.as_ref().filter(|(candidate, _)| *candidate != self.me)
    }

    fn publish_call(&mut self) {
        let Some(roster) = self.genesis.calling.clone() else { return };
        let released = self.genesis.gave_up.iter().map(|(peer, call)| (peer.clone(), *call)).collect();
        self.publish_in(
            self.durable.founding.last_call,
            Topic::Leader(Round::GENESIS),
            Body::Call { roster, released },
        );
    }

    pub(in crate::protocol) fn on_call(
        &mut self,
        sender: &PeerId,
        call: Term,
        roster: &Roster,
        released: &[(PeerId, Term)],
        now: Instant,
    ) {
        if self.head().is_some() {
            return self.tell_head(now);
        }
        if let Some(founded) = self.durable.founding.roster.clone() {
            // To the caller alone: all members may answer.
            return self.publish(Topic::Election(Round::GENESIS, sender.clone()), self.founded(founded));
        }
        let sees_others = self.genesis.present.iter().any(|peer| !roster.contains(peer));
        if !self.is_in(roster, &self.me) || !roster.contains(sender) || sees_others || !self.is_compatible(sender) {
            return;
        }
        let topic = Topic::Election(Round::GENESIS, sender.clone());
        let free_of = |(candidate, joined): &(PeerId, Term)| {
            *candidate == self.me
                || candidate == sender && *joined <= call
                || released.iter().any(|(peer, given_up)| peer == candidate && joined <= given_up)
        };
        match &self.durable.founding.joined {
            Some(bound) if !free_of(bound) => {
                let (candidate, joined) = bound.clone();
                if candidate != *sender {
                    self.publish_in(call, topic, Body::Bound { candidate, call: joined });
                }
            }
            _ => {
                self.durable.founding.joined = Some((sender.clone(), call));
                self.genesis.calling = None;
                self.persist();
                let gave_up = self.durable.founding.last_call;
                let summary = self.summary.clone();
                self.publish_in(call, topic, Body::Join { gave_up, summary });
            }
        }
    }

    pub(in crate::protocol) fn on_join(&mut self, sender: PeerId, call: Term, gave_up: Term, summary: Bytes) {
        let called = self.genesis.calling.as_ref().is_some_and(|roster| roster.contains(&sender));
        if called && call == self.durable.founding.last_call {
            self.genesis.bound.remove(&sender);
            self.genesis.gave_up.insert(sender.clone(), gave_up);
            self.genesis.joined.insert(sender, summary);
        }
    }

    pub(in crate::protocol) fn on_bound(&mut self, sender: PeerId, call: Term, candidate: PeerId, to: Term) {
        if self.genesis.calling.is_some() && call == self.durable.founding.last_call {
            self.genesis.bound.insert(sender, (candidate, to));
        }
    }

    /// Frees those who are bound to a call that its candidate gave up, and founds the roster once all joined.
    fn settle_joins(&mut self, now: Instant) {
        let given_up = |genesis: &Genesis, (candidate, call): &(PeerId, Term)| {
            genesis.gave_up.get(candidate).is_some_and(|up_to| call <= up_to)
        };
        if self.bound_to_other().is_some_and(|bound| given_up(&self.genesis, bound)) {
            self.durable.founding.joined = None;
            self.join_own_call();
            self.persist();
        }
        let freed: Vec<PeerId> = self
            .genesis
            .bound
            .iter()
            .filter(|(_, to)| given_up(&self.genesis, to))
            .map(|(peer, _)| peer.clone())
            .collect();
        for peer in &freed {
            self.genesis.bound.remove(peer);
        }
        if !freed.is_empty() {
            // They join when they hear the call again, which now names the candidate that gave up.
            self.timers.clear(Timer::Call);
        }
        let Some(roster) = self.genesis.calling.clone() else { return };
        if roster.members().iter().all(|peer| self.genesis.joined.contains_key(peer)) {
            self.found(roster, now);
        }
    }

    /// Candidates that must say what became of their calls before a roster can be founded.
    pub(in crate::protocol) fn awaited_founders(&self) -> Vec<PeerId> {
        let own = self.bound_to_other().map(|(candidate, _)| candidate);
        let awaited: BTreeSet<&PeerId> =
            self.genesis.bound.values().map(|(candidate, _)| candidate).chain(own).collect();
        awaited.into_iter().cloned().collect()
    }

    fn found(&mut self, roster: Roster, now: Instant) {
        // The members' in the order of their names: whoever founds the roster gets the same bits.
        let summaries = roster.members().iter().filter_map(|peer| self.genesis.joined.get(peer));
        let summary = Bytes::from(statistics::merge(summaries.map(Bytes::as_ref)));
        self.enter_founded(roster, summary, true, now);
    }

    /// The word that the first roster is founded, from a peer that knows.
    fn founded(&self, roster: Roster) -> Body {
        Body::Founded { roster, summary: self.durable.founding.summary.clone() }
    }

    pub(in crate::protocol) fn on_founded(&mut self, roster: Roster, summary: Bytes, now: Instant) {
        self.enter_founded(roster, summary, false, now);
    }

    fn enter_founded(&mut self, roster: Roster, summary: Bytes, by_me: bool, now: Instant) {
        if self.head().is_some() || self.durable.founding.roster.is_some() || !self.is_in(&roster, &self.me) {
            return;
        }
        self.durable.founding.roster = Some(roster.clone());
        self.durable.founding.summary = summary;
        self.genesis.calling = None;
        // Before anybody hears of it: a founder that forgot its roster could found another.
        self.persist();
        if by_me {
            self.publish(Topic::Leader(Round::GENESIS), self.founded(roster.clone()));
        }
        self.notify(Notice::Founded(roster));
        self.enter_round(now);
    }

    /// Members that missed it hear of the first roster from one of the others until round 0 is decided. Should that one
    /// have missed it too, it calls, and is answered.
    fn repeat_founded(&mut self, now: Instant) {
        self.timers.start(Timer::Call, now + self.heartbeat());
        if self.timers.fired(Timer::Call, now) && self.connected {
            self.timers.set(Timer::Call, now + self.heartbeat());
            let Some(roster) = self.durable.founding.roster.clone() else { return };
            if roster.members().iter().find(|peer| !self.is_gone(peer)) == Some(&self.me) {
                self.publish(Topic::Leader(Round::GENESIS), self.founded(roster));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::protocol::message::Envelope;
    use crate::protocol::samples::{hello, identity, says};
    use crate::protocol::{Action, Config, Event};

    #[test]
    fn a_founder_remembers_the_first_roster_before_anybody_hears_of_it() {
        let mut now = Instant::now();
        let mut peer = Peer::new(Config::default(), identity("a"), None, &BTreeSet::new(), now);
        peer.handle(Event::Connected, now);
        while peer.genesis.calling.is_none() {
            peer.handle(says("b", 0, 0, Body::Hello(hello(&peer))), now);
            now += Duration::from_millis(100);
            peer.handle(Event::Tick, now);
        }
        let (call, summary) = (peer.durable.founding.last_call, Bytes::new());
        let actions = peer.handle(says("b", 0, call.0, Body::Join { gave_up: Term(0), summary }), now);
        let remembers = |action: &Action| matches!(action, Action::Persist(kept) if kept.founding.roster.is_some());
        let tells = |action: &Action| {
            let Action::Publish { message, .. } = action else { return false };
            matches!(Envelope::decode(message), Ok((Envelope { body: Body::Founded { .. }, .. }, _)))
        };
        let (remembered, told) = (actions.iter().position(remembers), actions.iter().position(tells));
        assert!(remembered.is_some() && told.is_some() && remembered < told, "{actions:?}");
    }
}
