//! Electing a leader: one ballot a term, for whom the policy names.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::protocol::decree::Decree;
use crate::protocol::election::Electorate;
use crate::protocol::message::{Body, Leading, has};
use crate::protocol::phases::round::{Aggregate, Leadership, Work};
use crate::protocol::timer::Timer;
use crate::protocol::{Notice, Peer, Topic};
use crate::types::{PeerId, Round, Term};

/// After this many failed terms the patience with a candidate no longer doubles.
const DOUBLINGS_MAX: u32 = 3;

/// Ballots of so many terms are kept: the lowest are past.
const BALLOT_TERMS_MAX: usize = 32;

impl Peer {
    /// Votes in `term`: as it voted before, else for `candidate`, else for whom the policy names.
    pub(in crate::protocol) fn cast_ballot(&mut self, term: Term, candidate: Option<&PeerId>, now: Instant) {
        let Some(lot) = self.lot() else { return };
        if !self.durable.open.ballots.contains_key(&term) {
            let gone = self.gone();
            let Some(roster) = self.durable.roster() else { return };
            let last_leader = self.head().map(|head| &head.decree.leader);
            let electorate = Electorate { roster, gone: &gone, lot, last_leader };
            let named = candidate.cloned().unwrap_or_else(|| self.config.policy.candidate(&electorate, term));
            self.durable.open.ballots.insert(term, named);
            self.durable.open.promised = term;
            self.persist();
        }
        self.forget_leader();
        self.send_ballot(now);
        self.watch_leader(now);
    }

    /// A new term begins without a leader.
    fn forget_leader(&mut self) {
        self.open.following = None;
        self.open.leader_made_way = false;
        self.open.reported = false;
        self.open.leading = None;
        self.open.proposal = None;
        self.open.upcoming = None;
        self.open.left_out.clear();
        if self.open.training == Work::Failed {
            // What failed may work now, and the next leader needs it as the last one did.
            (self.open.training, self.open.declined) = (Work::Idle, None);
        }
        self.timers.clear(Timer::Beat);
        self.timers.clear(Timer::Gather);
    }

    fn send_ballot(&mut self, now: Instant) {
        self.timers.set(Timer::Resend, now + self.heartbeat());
        let Some(candidate) = self.candidate().cloned() else { return };
        if candidate != self.me {
            let accepted = self.durable.open.accepted.clone();
            let topic = Topic::Election(self.round(), candidate.clone());
            self.publish(topic, Body::Ballot { candidate, accepted });
        }
    }

    /// Whom this peer voted for in the promised term.
    pub(in crate::protocol) fn candidate(&self) -> Option<&PeerId> {
        self.durable.open.ballots.get(&self.promised())
    }

    /// The leader of the promised term, or else the candidate.
    pub(in crate::protocol) fn leader_or_candidate(&self) -> Option<&PeerId> {
        if self.open.leading.is_some() { Some(&self.me) } else { self.open.following.as_ref().or(self.candidate()) }
    }

    /// Starts the time for which the leader may be silent.
    pub(in crate::protocol) fn watch_leader(&mut self, now: Instant) {
        let doubled = 1 << self.promised().0.min(DOUBLINGS_MAX);
        let slack = self.leader_or_candidate().map_or(Duration::ZERO, |leader| self.slack(leader));
        let patience = self.config.election_timeout + slack;
        self.timers.set(Timer::Election, now + patience * if self.open.following.is_some() { 1 } else { doubled });
    }

    pub(in crate::protocol) fn advance_election(&mut self, now: Instant) {
        if !self.is_member(&self.me) {
            return;
        }
        self.depose(now);
        if self.open.following.is_none() || self.open.leader_made_way {
            if self.open.leading.is_none() && self.open.seen_term > self.promised() {
                self.cast_ballot(self.open.seen_term, None, now);
            }
            self.try_to_lead(now);
        }
        if self.timers.fired(Timer::Resend, now) && self.open.following.is_none() && self.open.leading.is_none() {
            self.send_ballot(now);
        }
    }

    /// Gives up a leader or candidate that was silent too long or is gone, and votes in the next term. Nobody that is gone
    /// gets the vote, so while all others are, this ends at a vote for itself.
    fn depose(&mut self, now: Instant) {
        let Some(leader) = self.leader_or_candidate().filter(|leader| **leader != self.me).cloned() else {
            if self.open.leading.is_none() && self.timers.fired(Timer::Election, now) {
                self.vote_again(self.me.clone(), false, now);
            }
            return;
        };
        let gone = self.is_gone(&leader);
        if !self.connected {
            // Who cannot hear cannot judge: the time starts again with the next connection.
            if self.timers.fired(Timer::Election, now) {
                self.watch_leader(now);
            }
        } else if gone || self.timers.fired(Timer::Election, now) {
            self.vote_again(leader, gone, now);
        }
    }

    /// Gives up the promised term and votes in a higher one: the highest that anybody speaks of, so that all meet there.
    pub(in crate::protocol) fn make_way(&mut self, now: Instant) {
        let (led, term) = (self.open.leading.is_some(), self.promised().next().max(self.open.seen_term));
        self.cast_ballot(term, None, now);
        if led && self.connected {
            // Its followers need not take it for silent.
            self.say_hello(now);
        }
    }

    fn vote_again(&mut self, leader: PeerId, gone: bool, now: Instant) {
        let (round, term) = (self.round(), self.promised());
        if leader != self.me {
            self.notify(Notice::Deposed { round, term, leader, gone });
        }
        self.make_way(now);
        if self.open.following.is_none() && term > Term(0) {
            // Members in different terms find each other by the highest that any of them speaks of.
            self.say_hello(now);
        }
    }

    pub(in crate::protocol) fn on_ballot(
        &mut self,
        sender: PeerId,
        round: Round,
        term: Term,
        candidate: &PeerId,
        accepted: Option<(Term, Decree)>,
        now: Instant,
    ) {
        if round < self.round() {
            return self.tell_head(now);
        }
        if round != self.round() || *candidate != self.me || !self.is_member(&sender) {
            return;
        }
        if term < self.promised() {
            let promised = self.promised();
            return self.publish(Topic::Report(round, sender), Body::Refuse { promised });
        }
        self.open.ballots.entry(term).or_default().insert(sender, accepted);
        if self.open.ballots.len() > BALLOT_TERMS_MAX {
            self.open.ballots.pop_first();
        }
    }

    /// Proclaims itself where a quorum voted for this peer.
    fn try_to_lead(&mut self, now: Instant) {
        let Some(quorum) = self.durable.roster().map(|roster| roster.quorum()) else { return };
        let promised = self.promised();
        // The highest term in which the others' ballots, with its own, are enough.
        let higher =
            self.open.ballots.iter().rev().find(|(term, votes)| **term > promised && votes.len() + 1 >= quorum);
        if let Some((&term, _)) = higher {
            let me = self.me.clone();
            self.cast_ballot(term, Some(&me), now);
        }
        if self.open.leading.is_some() {
            return;
        }
        let term = self.promised();
        let mut ballots: BTreeSet<PeerId> =
            self.open.ballots.get(&term).map(|votes| votes.keys().cloned().collect()).unwrap_or_default();
        if self.candidate() == Some(&self.me) {
            ballots.insert(self.me.clone());
        }
        if ballots.len() >= quorum {
            self.lead(term, ballots, now);
        }
    }

    fn lead(&mut self, term: Term, ballots: BTreeSet<PeerId>, now: Instant) {
        self.open.leading = Some(Leadership {
            since: now,
            ballots,
            bound: self.accepted_by_voters(term),
            parent_metrics: None,
            aggregate: Aggregate::Gathering,
            proposal: None,
            accepts: BTreeSet::new(),
            refusals: BTreeSet::new(),
            late: false,
            barren: false,
            told: None,
        });
        self.open.following = None;
        self.open.proposal = None;
        self.open.upcoming = None;
        self.open.marks.elected = Some(now);
        self.timers.clear(Timer::Election);
        self.timers.clear(Timer::Resend);
        self.timers.set(Timer::Beat, now);
        self.timers.set(Timer::Gather, now + self.config.round_timeout);
        let (round, leader) = (self.round(), self.me.clone());
        self.notify(Notice::Elected { round, term, leader });
    }

    /// The decree that some voter accepted in the highest term, with those who hold its model. If a decree committed
    /// in an earlier term, it is this one: its quorum and the ballots' share a member.
    fn accepted_by_voters(&self, term: Term) -> Option<(Decree, Vec<PeerId>)> {
        #[cfg(test)]
        if self.flaws.forget_accepted {
            return None;
        }
        let own = self.durable.open.accepted.as_ref().map(|(at, decree)| (*at, decree, &self.me));
        let votes = self.open.ballots.get(&term).into_iter().flatten();
        let reported = votes.filter_map(|(voter, accepted)| accepted.as_ref().map(|(at, decree)| (*at, decree, voter)));
        let all: Vec<_> = reported.chain(own).collect();
        let (_, decree, _) = all.iter().max_by_key(|(at, ..)| *at)?;
        let digest = decree.digest();
        let voters = all.iter().filter(|(_, other, _)| other.digest() == digest).map(|(_, _, voter)| *voter);
        // Who formed it has its model as well, though it may not have voted.
        let holders: BTreeSet<&PeerId> = voters.chain([&decree.leader]).filter(|holder| **holder != self.me).collect();
        Some(((*decree).clone(), holders.into_iter().cloned().collect()))
    }

    /// The leader's heartbeat.
    pub(in crate::protocol) fn beat(&mut self, now: Instant) {
        let (Some(leading), Some(roster)) = (&self.open.leading, self.durable.roster()) else { return };
        let flags = |peer: &PeerId| {
            let evaluation = if self.open.evaluations.contains_key(peer) { has::EVALUATION } else { 0 };
            let update = self.open.updates.contains_key(peer) || self.open.left_out.contains(peer);
            evaluation | if update { has::UPDATE } else { 0 }
        };
        let body = Body::Leader(Leading {
            ballots: leading.ballots.iter().cloned().collect(),
            has: roster.members().iter().map(flags).collect(),
            parent_metrics: leading.parent_metrics,
            upcoming: leading.model().copied(),
        });
        let proposal = leading.proposal.clone();
        self.publish(Topic::Leader(self.round()), body);
        if let Some(decree) = proposal {
            self.publish(Topic::Leader(self.round()), Body::Proposal(decree));
        }
        self.timers.set(Timer::Beat, now + self.heartbeat());
    }

    pub(in crate::protocol) fn on_leader(
        &mut self,
        sender: &PeerId,
        round: Round,
        term: Term,
        leading: &Leading,
        now: Instant,
    ) {
        if !self.accepts_leader(sender, round, term, now) {
            return;
        }
        let elected = self.durable.roster().is_some_and(|roster| roster.is_quorum(&leading.ballots));
        if !elected {
            let why = "it claims to lead without a quorum of ballots".to_owned();
            return self.bad_message(Some(sender.clone()), why);
        }
        self.follow(sender, term, now);
        if let Some(metrics) = leading.parent_metrics {
            self.tell_parent_metrics(metrics);
        }
        if let Some(model) = leading.upcoming {
            self.on_upcoming(sender, model, now);
        }
        let place = self.durable.roster().and_then(|roster| roster.position(&self.me));
        let has = place.and_then(|place| leading.has.get(place)).copied().unwrap_or(0);
        self.report(has);
    }

    /// Whether a leader's message is of this round and no lower term than promised; else says what is.
    pub(in crate::protocol) fn accepts_leader(
        &mut self,
        sender: &PeerId,
        round: Round,
        term: Term,
        now: Instant,
    ) -> bool {
        if round < self.round() && self.head().is_some() {
            self.tell_head(now);
            return false;
        }
        if round != self.round() || !self.is_member(sender) || !self.is_member(&self.me) || self.ended.is_some() {
            return false;
        }
        if term < self.promised() {
            let promised = self.promised();
            self.publish(Topic::Report(round, sender.clone()), Body::Refuse { promised });
            return false;
        }
        // Two leaders of one term would need two quorums of ballots.
        !(term == self.promised() && self.open.leading.is_some())
    }

    /// Follows the leader of `term`, which is no lower than promised: that promises it.
    pub(in crate::protocol) fn follow(&mut self, leader: &PeerId, term: Term, now: Instant) {
        if term > self.promised() {
            self.durable.open.promised = term;
            self.persist();
            self.forget_leader();
        }
        if self.open.following.as_ref() != Some(leader) {
            self.open.following = Some(leader.clone());
            self.open.marks.elected.get_or_insert(now);
            let round = self.round();
            self.notify(Notice::Elected { round, term, leader: leader.clone() });
        }
        self.timers.clear(Timer::Resend);
        self.watch_leader(now);
    }

    pub(in crate::protocol) fn on_refuse(&mut self, sender: PeerId, round: Round, term: Term, promised: Term) {
        if round != self.round() || !self.is_member(&sender) {
            return;
        }
        self.open.seen_term = self.open.seen_term.max(promised).max(term);
        let mine = self.promised();
        if let Some(leading) = self.open.leading.as_mut().filter(|_| promised > mine) {
            leading.refusals.insert(sender);
        }
    }

    /// A leader whom a quorum could follow, were it not for those it lost to a higher term, steps down and joins them.
    pub(in crate::protocol) fn step_down_if_left_behind(&mut self, now: Instant) {
        let (Some(leading), Some(roster)) = (&self.open.leading, self.durable.roster()) else { return };
        let there = roster.members().iter().filter(|peer| self.is_there(peer, leading.since, now));
        let (lost, willing): (Vec<_>, Vec<_>) = there.partition(|peer| leading.refusals.contains(*peer));
        let quorum = roster.quorum();
        if willing.len() < quorum && willing.len() + lost.len() >= quorum {
            self.make_way(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::samples::{hello, id, identity, roster, says};
    use crate::protocol::{Action, Config, Durable, Event};

    #[test]
    fn a_candidate_that_comes_later_gets_the_vote_soon() {
        let mut now = Instant::now();
        let mut durable = Durable::default();
        durable.founding.roster = Some(roster(["a", "b", "c"]));
        durable.open.ballots.insert(Term(0), id("b"));
        let mut peer = Peer::new(Config::default(), identity("a"), Some(durable), &BTreeSet::new(), now);
        let votes = |actions: Vec<Action>| {
            let is_vote = |action: &&Action| matches!(action, Action::Publish { topic: Topic::Election(..), .. });
            actions.iter().filter(is_vote).count()
        };
        assert_eq!(votes(peer.handle(Event::Connected, now)), 1);
        now += peer.heartbeat() / 10;
        peer.handle(says("b", 0, 0, Body::Hello(hello(&peer))), now);
        now += peer.heartbeat() / 4;
        assert_eq!(votes(peer.handle(Event::Tick, now)), 1, "it was not there");
        peer.handle(says("b", 0, 0, Body::Hello(hello(&peer))), now);
        now += peer.heartbeat() / 4;
        assert_eq!(votes(peer.handle(Event::Tick, now)), 0, "it is there");
    }

    #[test]
    fn followers_go_with_a_leader_that_makes_way_and_not_with_others() {
        let now = Instant::now();
        let mut durable = Durable::default();
        durable.founding.roster = Some(roster(["a", "b", "c"]));
        let mut peer = Peer::new(Config::default(), identity("a"), Some(durable), &BTreeSet::new(), now);
        peer.handle(Event::Connected, now);
        let leading =
            Leading { ballots: vec![id("b"), id("c")], has: Vec::new(), parent_metrics: None, upcoming: None };
        peer.handle(says("b", 0, 1, Body::Leader(leading)), now);
        assert_eq!((peer.promised(), peer.open.following.clone()), (Term(1), Some(id("b"))));

        let hello = Body::Hello(hello(&peer));
        peer.handle(says("c", 0, 3, hello.clone()), now);
        assert_eq!(peer.promised(), Term(1), "its leader leads on, whatever others think");
        peer.handle(says("b", 0, 1, hello.clone()), now);
        assert_eq!(peer.promised(), Term(1), "it says hello, and leads on");
        peer.handle(says("b", 0, 2, hello), now);
        assert_eq!((peer.promised(), &peer.open.following), (Term(3), &None), "where all meet");
    }
}
