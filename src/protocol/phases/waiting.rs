//! Saying what the peer waits for, whenever that changes.

use std::time::Instant;

use crate::protocol::{Notice, Peer, Waiting};
use crate::types::PeerId;

/// A peer whose training failed so often in one round waits for updates, whether it leads or not.
const FAILURES_TOLD: u32 = 2;

impl Peer {
    pub(in crate::protocol) fn advance_waiting(&mut self, now: Instant) {
        // In a round this looks at every member; the leader's heartbeats come often enough to look again.
        let recent = |at: Instant| now.saturating_duration_since(at) < self.heartbeat() / 4;
        if self.durable.roster().is_some() && self.last_waiting.is_none() && self.waiting_checked.is_some_and(recent) {
            return;
        }
        self.waiting_checked = Some(now);
        let waiting = self.waiting(now);
        if waiting != self.last_waiting {
            self.last_waiting.clone_from(&waiting);
            self.notify(Notice::Waiting(waiting));
        }
    }

    fn waiting(&self, now: Instant) -> Option<Waiting> {
        if self.ended.is_some() || !self.connected {
            return None;
        }
        let Some(roster) = self.durable.roster() else { return self.waiting_for_genesis(now) };
        if !self.is_member(&self.me) {
            // Who hears no member is at the wrong broker, or there is no quorum to admit it.
            let astray = !roster.members().iter().any(|peer| self.is_live(peer, now));
            let missing = || self.lacks_quorum(roster.members().to_vec(), roster.quorum());
            let admission = if roster.contains(&self.me) { Waiting::Namesake } else { Waiting::Admission };
            return Some(if astray { missing() } else { admission });
        }
        let missing: Vec<PeerId> =
            roster.members().iter().filter(|peer| !self.may_be_there(peer, now)).cloned().collect();
        let present = roster.len() - missing.len();
        let needed = roster.quorum().saturating_sub(present);
        if needed > 0 {
            return Some(self.lacks_quorum(missing, needed));
        }
        if self.head_model().is_some_and(|model| !self.transfers.holds(&model.digest))
            && now.saturating_duration_since(self.open.marks.entered) >= self.silence()
            && !self.transfers.is_moving(now, self.silence())
        {
            return Some(Waiting::Model { round: self.last_model_round(), holders: self.head_holders() });
        }
        self.lacks_updates().or(self.fails_again()).map(|(present, needed)| Waiting::Updates { present, needed })
    }

    fn lacks_quorum(&self, missing: Vec<PeerId>, needed: usize) -> Waiting {
        let is_here = |peer: &&PeerId| self.neighbours.get(*peer).is_some_and(|neighbour| !neighbour.gone);
        let forgot = missing.iter().filter(|peer| self.replaced.contains(*peer)).filter(is_here).cloned().collect();
        Waiting::Quorum { missing, needed, forgot }
    }

    /// Whether this peer's training failed in one term after the other, so that it takes part in a round without updates:
    /// none of its own is in, and so many are needed.
    fn fails_again(&self) -> Option<(usize, usize)> {
        let fails = self.open.failures >= FAILURES_TOLD && self.durable.open.update.is_none();
        fails.then_some((0, self.config.min_updates))
    }

    /// A member that was never heard since this peer started may be there; one that fell silent is not.
    fn may_be_there(&self, peer: &PeerId, now: Instant) -> bool {
        let early = now.saturating_duration_since(self.open.marks.entered) < self.silence();
        let leads = self.open.leading.is_some();
        self.is_live(peer, now)
            || self.neighbours.get(peer).map_or(early, |neighbour| {
                !self.is_away(peer, neighbour) && (early || !leads && self.open.following.is_some())
            })
    }

    fn waiting_for_genesis(&self, now: Instant) -> Option<Waiting> {
        if let Some(peer) = self.other_group(now) {
            let difference = self.neighbours.get(&peer)?.difference.clone()?;
            return Some(Waiting::OtherConfiguration { peer, difference });
        }
        let (present, needed) = (self.genesis.present.len(), self.config.min_peers);
        if present < needed {
            return Some(Waiting::Peers { present, needed });
        }
        let founders = self.awaited_founders();
        let absent: Vec<PeerId> = founders.into_iter().filter(|peer| !self.is_live(peer, now)).collect();
        (!absent.is_empty()).then_some(Waiting::Founders(absent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::message::{Body, Head, Hello};
    use crate::protocol::samples::{hello, id, identity, roster, says};
    use crate::protocol::{Action, Config, Decree, Durable, Event, Identity, Roster};
    use crate::types::{Digest, Incarnation, Round};
    use std::collections::BTreeSet;

    /// The decree of a round, of whose next round these are members.
    fn head(round: u64, members: &[&str]) -> Head {
        let next_roster = roster(members);
        let decree = Decree { round: Round(round), leader: id("b"), ..Decree::sample(&next_roster) };
        Head { decree, accepts: vec![id("b"), id("c")], genesis: Digest::of(b"genesis") }
    }

    fn told(actions: &[Action]) -> Vec<Option<Waiting>> {
        let told = |action: &Action| match action {
            Action::Notify(Notice::Waiting(waiting)) => Some(waiting.clone()),
            _ => None,
        };
        actions.iter().filter_map(told).collect()
    }

    #[test]
    fn who_is_admitted_waits_no_more_and_says_so_but_for_a_model_that_nobody_sends() {
        let mut now = Instant::now();
        let durable = Durable { head: Some(head(4, &["b", "c"])), ..Durable::default() };
        let mut peer = Peer::new(Config::default(), identity("a"), Some(durable), &BTreeSet::new(), now);
        peer.handle(Event::Connected, now);
        let actions = peer.handle(says("b", 5, 0, Body::Status), now);
        assert_eq!(told(&actions), [Some(Waiting::Admission)]);
        let actions = peer.handle(says("b", 5, 0, Body::Head(head(5, &["a", "b", "c"]))), now);
        assert_eq!(told(&actions), [None]);
        let silence = peer.silence();
        let mut waits = Vec::new();
        while waits.is_empty() && now < peer.open.marks.entered + 3 * silence {
            now += silence / 8;
            for event in [says("b", 6, 0, Body::Status), says("c", 6, 0, Body::Status), Event::Tick] {
                waits.extend(told(&peer.handle(event, now)));
            }
        }
        assert_eq!(waits, [Some(Waiting::Model { round: Round(5), holders: vec![id("b"), id("c")] })]);
    }

    #[test]
    fn who_lost_its_state_waits_for_the_member_of_its_name_to_be_let_go_and_promises_nothing() {
        let mut now = Instant::now();
        let newcomer = Identity { incarnation: Incarnation(7), ..identity("a") };
        let mut peer = Peer::new(Config::default(), newcomer, None, &BTreeSet::new(), now);
        peer.handle(Event::Connected, now);
        let mut hears = |head: Head| {
            let mut actions = peer.handle(says("b", head.decree.round.0 + 1, 0, Body::Head(head)), now);
            now += peer.heartbeat();
            actions.extend(peer.handle(Event::Tick, now));
            (told(&actions).pop(), peer.durable.open.ballots.len())
        };
        assert_eq!(hears(head(4, &["a", "b", "c"])), (Some(Some(Waiting::Namesake)), 0));
        assert_eq!(hears(head(5, &["b", "c"])), (Some(Some(Waiting::Admission)), 0));
        let mut admitted = head(6, &["a", "b", "c"]);
        admitted.decree.next_roster = Roster::of(
            [("a", 7), ("b", 0), ("c", 0)].map(|(name, incarnation)| (id(name), Incarnation(incarnation))).into(),
        );
        assert_eq!(hears(admitted), (Some(None), 1));
    }

    #[test]
    fn a_member_that_lost_its_state_is_gone_and_it_is_said_that_somebody_else_is_here() {
        let now = Instant::now();
        let durable = Durable { head: Some(head(4, &["a", "b"])), ..Durable::default() };
        let mut peer = Peer::new(Config::default(), identity("a"), Some(durable), &BTreeSet::new(), now);
        peer.handle(Event::Connected, now);
        let hello = Hello { incarnation: Incarnation(7), ..hello(&peer) };
        peer.handle(says("b", 0, 0, Body::Hello(hello)), now);
        assert!(peer.is_gone(&id("b")));
        let actions = peer.handle(Event::Tick, now + peer.heartbeat());
        let waits = Waiting::Quorum { missing: vec![id("b")], needed: 1, forgot: vec![id("b")] };
        assert_eq!(told(&actions), [Some(waits.clone())]);
        assert!(waits.to_string().ends_with("(here with a new state directory, which does not count: b)"), "{waits}");
    }
}
