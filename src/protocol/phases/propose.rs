//! Proposing and accepting: the leader forms a decree; a member that holds its model makes both durable and accepts.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::protocol::decree::{self, Decree, Outcome};
use crate::protocol::message::Body;
use crate::protocol::phases::round::{Aggregate, Work};
use crate::protocol::timer::Timer;
use crate::protocol::{Contributor, Notice, Peer, Roster, Topic};
use crate::transfer::Manifest;
use crate::types::{Digest, Incarnation, PeerId, Round, Term};

impl Peer {
    pub(in crate::protocol) fn advance_leader(&mut self, now: Instant) {
        self.step_down_if_left_behind(now);
        if self.open.leading.is_none() {
            return;
        }
        if self.timers.fired(Timer::Beat, now) {
            self.beat(now);
        }
        if self.timers.fired(Timer::Gather, now) {
            self.with_leadership(|leading| leading.late = true);
        }
        self.take_own_update();
        self.advance_initial_weights();
        self.advance_parent_metrics(now);
        self.advance_gathering(now);
        self.advance_proposal(now);
        self.advance_commit(now);
    }

    /// A member that trained before it was elected brings its own update.
    fn take_own_update(&mut self) {
        if self.open.training == Work::Done(()) && !self.open.updates.contains_key(&self.me) {
            self.report_update();
        }
    }

    fn advance_proposal(&mut self, now: Instant) {
        let Some(leading) = self.open.leading.as_ref().filter(|leading| leading.proposal.is_none()) else { return };
        if let Some((decree, _)) = &leading.bound {
            let model = decree.model().digest;
            if self.transfers.is_durable(&model) {
                self.propose(decree.clone(), now);
            } else if leading.late && !self.transfers.holds(&model) && !self.transfers.is_moving(now, self.silence()) {
                // Those who had the model are gone. Of the next term's voters one may have it, or none has accepted it.
                self.make_way(now);
            }
            return;
        }
        if let Some(outcome) = self.finish_outcome() {
            let model = self.parent_model().map(|model| model.digest);
            if model.is_some_and(|model| self.transfers.holds(&model) && !self.transfers.is_durable(&model)) {
                // The decree is to rest on it.
                self.open.flush = true;
                return;
            }
            let decree = self.form_decree(outcome, Vec::new(), now);
            return self.propose(decree, now);
        }
        if let Aggregate::Done(manifest, contributors) = &leading.aggregate
            && self.transfers.is_durable(&manifest.digest)
        {
            let decree = self.form_decree(Outcome::Model(*manifest), contributors.clone(), now);
            self.propose(decree, now);
        }
    }

    /// The end, once the evaluations that are in say so; after the last round also when nobody could evaluate.
    fn finish_outcome(&self) -> Option<Outcome> {
        let leading = self.open.leading.as_ref()?;
        let late = leading.late;
        let model = *self.parent_model()?;
        // Without metrics only the last round can end, and only after waiting for them.
        let may_end = leading.parent_metrics.is_some() || late && !self.is_training_round();
        if self.round() == Round::GENESIS || !may_end {
            return None;
        }
        let metrics = leading.parent_metrics;
        let record = self.record(metrics.as_ref());
        decree::stop(&self.config, self.round(), metrics.as_ref(), &record).map(|reason| Outcome::Finish(reason, model))
    }

    fn record(&self, metrics: Option<&crate::types::Metrics>) -> decree::Record {
        let before = self.head().map(|head| head.decree.record).unwrap_or_default();
        metrics.map_or(before, |metrics| before.with(metrics, self.config.tolerance))
    }

    fn form_decree(&self, outcome: Outcome, contributors: Vec<Contributor>, now: Instant) -> Decree {
        let leading = self.open.leading.as_ref();
        let parent_metrics = leading.and_then(|leading| leading.parent_metrics).or_else(|| self.reported_metrics());
        let next_roster = self.next_roster(now);
        Decree {
            round: self.round(),
            parent: self.parent().unwrap_or(Digest([0; 32])),
            leader: self.me.clone(),
            term: self.promised(),
            outcome,
            contributors,
            parent_metrics,
            record: self.record(parent_metrics.as_ref()),
            standbys: self.next_standbys(&next_roster),
            next_roster,
            summary: self.durable.summary().cloned().unwrap_or_default(),
        }
    }

    /// The members that live, and the newcomers: only as many as leave the members that live a quorum, so that
    /// newcomers who vanish at once cannot stop the federation.
    fn next_roster(&self, now: Instant) -> Roster {
        let since = self.open.leading.as_ref().map_or(now, |leading| leading.since);
        let member = |peer: &PeerId| self.durable.roster().and_then(|roster| roster.incarnation(peer));
        let members = self.durable.roster().map(|roster| roster.members()).unwrap_or_default();
        let live = members.iter().filter(|peer| self.is_there(peer, since, now));
        let live: BTreeMap<PeerId, Incarnation> = live
            .filter_map(|peer| Some((peer.clone(), member(peer)?)))
            .chain([(self.me.clone(), self.incarnation)])
            .collect();
        let room = live.len().saturating_sub(1).max(1);
        let newcomers = self.present(now).into_iter().filter(|peer| member(peer).is_none());
        let newcomers = newcomers.filter_map(|peer| self.incarnation_of(&peer).map(|incarnation| (peer, incarnation)));
        Roster::of(newcomers.take(room).chain(live).collect())
    }

    fn propose(&mut self, decree: Decree, now: Instant) {
        let term = self.promised();
        self.durable.open.accepted = Some((term, decree.clone()));
        self.persist();
        let me = self.me.clone();
        self.with_leadership(|leading| {
            leading.accepts.insert(me);
            leading.proposal = Some(decree);
        });
        self.open.marks.aggregated.get_or_insert(now);
        let (round, leader) = (self.round(), self.me.clone());
        self.notify(Notice::Proposed { round, leader });
        self.beat(now);
    }

    pub(in crate::protocol) fn on_proposal(
        &mut self,
        sender: PeerId,
        round: Round,
        term: Term,
        decree: Decree,
        now: Instant,
    ) {
        if !self.accepts_leader(&sender, round, term, now) {
            return;
        }
        if let Err(why) = self.check_decree(&decree) {
            return self.bad_message(Some(sender), why);
        }
        self.follow(&sender, term, now);
        if self.has_accepted(term, &decree) {
            return self.report_acceptance();
        }
        if self.open.proposal.as_ref() != Some(&decree) {
            self.know_upcoming(&sender, *decree.model(), now);
            self.notify(Notice::Proposed { round, leader: sender });
            self.open.proposal = Some(decree);
        } else if self.transfers.holds(&decree.model().digest) {
            self.open.asked_again = true;
        }
    }

    /// A decree must continue this peer's head, by members of the roster, with a model of its layout.
    fn check_decree(&self, decree: &Decree) -> Result<(), String> {
        if decree.round != self.round() || Some(decree.parent) != self.parent() {
            return Err("its proposal does not continue the newest decree here".into());
        }
        if let Some(stranger) = decree.contributors.iter().find(|part| !self.is_member(&part.peer)) {
            return Err(format!("its proposal counts an update of {}, who is no member", stranger.peer));
        }
        if let Some(stranger) = decree.standbys.keys().find(|host| !decree.next_roster.contains(host)) {
            return Err(format!("its proposal names a broker of {stranger}, who is not in the next roster"));
        }
        if Some(&decree.summary) != self.durable.summary() {
            return Err("its proposal has another summary of the inputs than the newest decree here".into());
        }
        self.check_model(decree.model())
    }

    fn check_model(&self, model: &Manifest) -> Result<(), String> {
        if model.base.is_some() {
            return Err("its new model is a difference, which a newcomer could not read".into());
        }
        model.check(&self.model_layout).map_err(|error| error.to_string())
    }

    fn has_accepted(&self, term: Term, decree: &Decree) -> bool {
        self.durable.open.accepted.as_ref().is_some_and(|(at, accepted)| *at == term && accepted == decree)
    }

    /// A leader tells of the model that it proposes, or will when it is durable.
    pub(in crate::protocol) fn on_upcoming(&mut self, leader: &PeerId, model: Manifest, now: Instant) {
        match self.check_model(&model) {
            Ok(()) => self.know_upcoming(leader, model, now),
            Err(why) => self.bad_message(Some(leader.clone()), why),
        }
    }

    fn know_upcoming(&mut self, leader: &PeerId, model: Manifest, now: Instant) {
        let upcoming = Some((leader.clone(), model));
        if self.open.upcoming != upcoming {
            self.open.upcoming = upcoming;
            self.open.marks.gathered.get_or_insert(now);
            self.open.marks.aggregated = Some(now);
        }
    }

    /// Whether a leader needs this member's acceptance: all members that seem to be there are asked in their order, and the
    /// others when a quorum has not accepted by the leader's next heartbeat. Until then they need not flush the model: where
    /// members share a disk, it writes for the quorum alone.
    pub(in crate::protocol) fn is_needed_by(&self, leader: &PeerId) -> bool {
        let Some(roster) = self.durable.roster() else { return false };
        let mut others =
            roster.members().iter().filter(|peer| *peer != leader && !self.is_gone(peer)).take(roster.quorum() - 1);
        self.open.asked_again || others.any(|peer| *peer == self.me)
    }

    pub(in crate::protocol) fn advance_acceptance(&mut self, now: Instant) {
        let Some(decree) = &self.open.proposal else { return };
        if !self.transfers.is_durable(&decree.model().digest) {
            return;
        }
        let decree = decree.clone();
        self.open.proposal = None;
        self.durable.open.accepted = Some((self.promised(), decree));
        self.persist();
        self.open.marks.accepted = Some(now);
        self.report_acceptance();
    }

    fn report_acceptance(&mut self) {
        let (Some((_, decree)), Some(leader)) = (&self.durable.open.accepted, self.open.following.clone()) else {
            return;
        };
        let decree = decree.digest();
        self.publish(Topic::Report(self.round(), leader), Body::Accept { decree });
    }

    pub(in crate::protocol) fn on_accept(&mut self, sender: PeerId, round: Round, term: Term, decree: Digest) {
        if round != self.round() || term != self.promised() || !self.is_member(&sender) {
            return;
        }
        let proposed = self.open.leading.as_ref().and_then(|leading| leading.proposal.as_ref()).map(Decree::digest);
        if proposed == Some(decree) {
            self.with_leadership(|leading| {
                leading.accepts.insert(sender);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use super::*;
    use crate::protocol::message::{Envelope, Head, Leading};
    use crate::protocol::samples::{self, id, identity};
    use crate::protocol::{Action, Config, Done, Durable, Event, Job};
    use crate::transfer::{Intake, Keep};

    fn roster() -> Roster {
        samples::roster(["a", "b", "c", "d"])
    }

    /// What `b` proposes as the genesis.
    fn decree() -> Decree {
        Decree { leader: id("b"), ..Decree::sample(&roster()) }
    }

    fn says(sender: &str, body: Body) -> Event {
        samples::says(sender, 0, 0, body)
    }

    /// What `b` says as the leader.
    fn leading(upcoming: Option<Manifest>) -> Event {
        let ballots = ["a", "b", "c"].map(id).into();
        says("b", Body::Leader(Leading { ballots, has: Vec::new(), parent_metrics: None, upcoming }))
    }

    /// A member that has said hello.
    fn member(name: &str, now: Instant) -> Peer {
        let mut durable = Durable::default();
        durable.founding.roster = Some(roster());
        let mut peer = Peer::new(Config::default(), identity(name), Some(durable), &BTreeSet::new(), now);
        peer.handle(Event::Connected, now);
        peer
    }

    /// A member that follows `b`.
    fn follower(name: &str, now: Instant) -> Peer {
        let mut peer = member(name, now);
        peer.handle(leading(None), now);
        peer
    }

    /// `b`, for whom all have voted.
    fn leader(now: Instant) -> Peer {
        let mut peer = member("b", now);
        for voter in ["a", "c", "d"] {
            peer.handle(says(voter, Body::Ballot { candidate: id("b"), accepted: None }), now);
        }
        peer
    }

    /// How the proposed model is to be kept that is pulled now.
    fn keep(actions: &[Action]) -> Option<Keep> {
        actions.iter().find_map(|action| match action {
            Action::Take(Intake::Begin(_, keep)) => Some(*keep),
            _ => None,
        })
    }

    /// The model of the proposal is here.
    fn arrived(keep: Keep) -> Event {
        Event::Done(Done::Verified { manifest: *decree().model(), keep, result: Ok(()) })
    }

    fn flushes(actions: &[Action]) -> bool {
        actions.iter().any(|action| matches!(action, Action::Start(Job::Flush { .. })))
    }

    /// Whether a message that is published is such a one.
    fn publishes(actions: &[Action], wanted: impl Fn(&Body) -> bool) -> bool {
        let is_wanted = |message| Envelope::decode(message).is_ok_and(|(envelope, _)| wanted(&envelope.body));
        actions.iter().any(|action| matches!(action, Action::Publish { message, .. } if is_wanted(message)))
    }

    fn accepts(actions: &[Action]) -> bool {
        publishes(actions, |body| matches!(body, Body::Accept { .. }))
    }

    #[test]
    fn a_leader_tells_of_its_model_when_it_is_made_and_proposes_it_when_it_is_durable() {
        let now = Instant::now();
        let mut peer = leader(now);
        let model = *decree().model();
        let proposes = |actions: &[Action]| publishes(actions, |body| matches!(body, Body::Proposal(_)));
        let actions = peer.handle(Event::Done(Done::Initial(Ok(model))), now);
        let tells = |body: &Body| matches!(body, Body::Leader(Leading { upcoming, .. }) if *upcoming == Some(model));
        assert!(publishes(&actions, tells) && flushes(&actions) && !proposes(&actions));
        let flushed = Done::Flushed { blob: model.digest, result: Ok(true) };
        assert!(proposes(&peer.handle(Event::Done(flushed), now)));
    }

    #[test]
    fn a_model_whose_flush_failed_is_made_again_and_not_proposed_before() {
        let now = Instant::now();
        let mut peer = leader(now);
        let model = *decree().model();
        let initial = |actions: &[Action]| actions.iter().any(|action| matches!(action, Action::Start(Job::Initial)));
        assert!(flushes(&peer.handle(Event::Done(Done::Initial(Ok(model))), now)));
        let blob = model.digest;
        let failed = Done::Flushed { blob, result: Err("input/output error".into()) };
        assert!(!flushes(&peer.handle(Event::Done(failed), now)), "not at once");
        let later = now + peer.config.election_timeout;
        assert!(flushes(&peer.handle(Event::Tick, later)));
        let actions = peer.handle(Event::Done(Done::Flushed { blob, result: Ok(false) }), later);
        assert!(initial(&actions) && !publishes(&actions, |body| matches!(body, Body::Proposal(_))));
    }

    #[test]
    fn a_leader_that_cannot_get_the_model_it_is_bound_to_makes_way_when_it_has_waited_long_enough() {
        let now = Instant::now();
        let mut peer = member("c", now);
        let accepted = Some((Term(0), decree()));
        for (voter, accepted) in [("a", accepted), ("d", None)] {
            peer.handle(says(voter, Body::Ballot { candidate: id("c"), accepted }), now);
        }
        let holders = |peer: &Peer| {
            peer.open.leading.as_ref().and_then(|leading| leading.bound.as_ref()).map(|(_, holders)| holders.clone())
        };
        assert_eq!(holders(&peer), Some(vec![id("a"), id("b")]), "a voter that accepted it, and who formed it");
        let late = now + peer.config.round_timeout;
        peer.handle(Event::Tick, late - Duration::from_millis(1));
        assert!(peer.open.leading.is_some());
        peer.handle(Event::Tick, late);
        // Of the next term's voters one may have it, or none has accepted it.
        assert!(peer.open.leading.is_none() && peer.promised() > Term(0));
    }

    #[test]
    fn the_newest_model_may_be_had_of_members_that_were_not_needed_for_it() {
        let now = Instant::now();
        let mut peer = follower("a", now);
        let next_roster = samples::roster(["a", "b", "c", "d", "e"]);
        let decree = Decree { next_roster, ..decree() };
        let genesis = decree.digest();
        let head = Head { decree, accepts: ["b", "c", "d"].map(id).into(), genesis };
        peer.handle(says("b", Body::Head(head)), now);
        assert_eq!(peer.head_holders(), ["b", "c", "d", "e"].map(id));
    }

    #[test]
    fn a_member_pulls_a_model_before_it_is_proposed_and_accepts_it_then_at_once() {
        let now = Instant::now();
        let mut peer = follower("a", now);
        let actions = peer.handle(leading(Some(*decree().model())), now);
        assert_eq!(keep(&actions), Some(Keep::Durable));
        assert!(!accepts(&peer.handle(arrived(Keep::Durable), now)), "nothing is proposed yet");
        let actions = peer.handle(says("b", Body::Proposal(decree())), now);
        assert!(accepts(&actions) && keep(&actions).is_none());
    }

    #[test]
    fn as_many_flush_a_model_while_it_comes_as_a_quorum_needs_of_those_that_are_there() {
        let now = Instant::now();
        for (name, gone, expected) in [
            ("a", None, Keep::Durable),
            ("c", None, Keep::Durable),
            ("d", None, Keep::Unflushed),
            ("d", Some("a"), Keep::Durable),
        ] {
            let mut peer = follower(name, now);
            if let Some(gone) = gone {
                peer.handle(says(gone, Body::Status), now);
                peer.handle(says(gone, Body::Goodbye), now);
            }
            let actions = peer.handle(says("b", Body::Proposal(decree())), now);
            assert_eq!(keep(&actions), Some(expected), "{name}, without {gone:?}");
        }
    }

    #[test]
    fn a_member_that_no_quorum_needs_flushes_the_model_when_the_leader_asks_again_and_accepts_then() {
        let now = Instant::now();
        let mut peer = follower("d", now);
        peer.handle(says("b", Body::Proposal(decree())), now);
        // The leader's heartbeat, before the model is here.
        peer.handle(says("b", Body::Proposal(decree())), now);
        let actions = peer.handle(arrived(Keep::Unflushed), now);
        assert!(!flushes(&actions) && !accepts(&actions));
        let actions = peer.handle(says("b", Body::Proposal(decree())), now);
        assert!(flushes(&actions) && !accepts(&actions));
        let blob = decree().model().digest;
        let actions = peer.handle(Event::Done(Done::Flushed { blob, result: Ok(true) }), now);
        assert!(accepts(&actions));
    }

    #[test]
    fn a_member_that_no_quorum_needed_works_with_the_model_and_flushes_it_later() {
        let now = Instant::now();
        let mut peer = follower("d", now);
        peer.handle(says("b", Body::Proposal(decree())), now);
        peer.handle(arrived(Keep::Unflushed), now);
        let genesis = decree().digest();
        let head = Head { decree: decree(), accepts: ["a", "b", "c"].map(id).into(), genesis };
        let actions = peer.handle(says("b", Body::Head(head)), now);
        let writes = actions.iter().filter(|action| matches!(action, Action::Persist(_)));
        assert_eq!(writes.count(), 1, "the commit and the vote in the next round are one write");
        assert!(actions.iter().any(|action| matches!(action, Action::Start(Job::Evaluate { .. }))));
        assert!(actions.iter().any(|action| matches!(action, Action::Notify(Notice::ModelHeld { .. }))));
        assert!(!flushes(&actions));
        assert_eq!(peer.durable.model, None, "a restart must not rely on it");
        assert!(flushes(&peer.handle(Event::Tick, now + Duration::from_secs(5))));
        let (blob, result) = (decree().model().digest, Ok(true));
        let actions = peer.handle(Event::Done(Done::Flushed { blob, result }), now + Duration::from_secs(5));
        assert_eq!(peer.durable.model, Some(*decree().model()));
        assert!(actions.iter().any(|action| matches!(action, Action::Persist(_))));
        assert!(!actions.iter().any(|action| matches!(action, Action::Notify(Notice::ModelHeld { .. }))), "told twice");
    }
}
