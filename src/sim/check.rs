//! The invariants, checked against what all peers have persisted and sent.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use crate::aggregation::{Contribution, Rule};
use crate::journal::Blobs;
use crate::protocol::message::{Body, Envelope, Head};
use crate::protocol::{Decree, Durable, Outcome, Roster};
use crate::transfer::Codec;
use crate::types::{Digest, PeerId, Round, Term};
use crate::weights::Weights;

pub(super) const ONE_DECREE: &str = "I1 (one decree a round)";
pub(super) const QUORUM_HOLDS: &str = "I1 (a committed decree is held by a quorum)";
pub(super) const AGGREGATE: &str = "I2 (a model is the aggregate of its contributors' updates)";
pub(super) const TRAINED_ONCE: &str = "I2 (nobody trains a round twice)";
pub(super) const HEAD_FORWARD: &str = "I3 (a head never goes back)";
pub(super) const PROMISES: &str = "I4 (no promise is broken)";
pub(super) const LIVENESS: &str = "I5 (a quorum that can talk goes on)";

/// An invariant and how it was violated.
pub(super) type Broken = (&'static str, String);

/// What has been seen of all peers.
#[derive(Debug, Default)]
pub(super) struct Check {
    /// The first committed decree of each round.
    decrees: BTreeMap<Round, Decree>,
    founded: Option<Roster>,
    heads: BTreeMap<PeerId, Round>,
    ballots: BTreeMap<(PeerId, Round), BTreeMap<Term, PeerId>>,
    accepts: BTreeMap<(PeerId, Round, Term), Digest>,
    /// Every update that was trained: whose, in which round, from which model.
    updates: BTreeMap<(PeerId, Digest), (Round, Digest, Weights)>,
    /// Who has persisted an update in which round.
    trained: BTreeSet<(PeerId, Round)>,
}

/// What the check may look at of one peer, up or down.
pub(super) struct Persisted<'a> {
    pub peer: &'a PeerId,
    pub durable: &'a Durable,
    pub blobs: &'a Blobs,
}

impl Check {
    /// Whether the federation has its first roster.
    pub(super) fn is_founded(&self) -> bool {
        self.founded.is_some()
    }

    /// The newest committed decree.
    pub(super) fn newest(&self) -> Option<&Decree> {
        self.decrees.values().next_back()
    }

    pub(super) fn decrees(&self) -> impl Iterator<Item = &Decree> {
        self.decrees.values()
    }

    /// A peer has persisted something.
    pub(super) fn persisted<'a>(
        &mut self,
        peer: &PeerId,
        durable: &Durable,
        all: impl FnOnce() -> Vec<Persisted<'a>>,
    ) -> Result<(), Broken> {
        if let Some(roster) = &durable.founding.roster {
            let founded = self.founded.get_or_insert_with(|| roster.clone());
            if founded != roster {
                return Err((ONE_DECREE, format!("two first rosters: {founded:?} and {roster:?}")));
            }
        }
        if durable.open.update.is_some() {
            self.trained.insert((peer.clone(), durable.open.round));
        }
        let Some(head) = &durable.head else { return Ok(()) };
        let round = head.decree.round;
        let before = self.heads.insert(peer.clone(), round);
        if before.is_some_and(|before| before > round) {
            return Err((HEAD_FORWARD, format!("{peer} went from {before:?} to {round:?}")));
        }
        match self.decrees.get(&round) {
            Some(first) if *first != head.decree => {
                let (first, second) = (first.digest(), head.decree.digest());
                Err((ONE_DECREE, format!("{round:?} has {first:?} and, at {peer}, {second:?}")))
            }
            Some(_) => Ok(()),
            None => {
                self.committed(head, &all())?;
                self.decrees.insert(round, head.decree.clone());
                Ok(())
            }
        }
    }

    /// A decree is committed for the first time.
    fn committed(&self, head: &Head, all: &[Persisted<'_>]) -> Result<(), Broken> {
        let decree = &head.decree;
        let before = decree.round.0.checked_sub(1).and_then(|round| self.decrees.get(&Round(round)));
        let roster = before.map(|parent| &parent.next_roster).or(self.founded.as_ref());
        let Some(roster) = roster else { return Err((ONE_DECREE, format!("{:?} has no roster", decree.round))) };
        if before.is_some_and(|parent| parent.digest() != decree.parent) {
            return Err((ONE_DECREE, format!("{:?} does not continue the round before", decree.round)));
        }
        let holders = all.iter().filter(|peer| roster.contains(peer.peer) && holds(peer, decree)).count();
        if holders < roster.quorum() {
            let needed = roster.quorum();
            return Err((QUORUM_HOLDS, format!("{:?} is held by {holders}, not {needed}", decree.round)));
        }
        self.check_aggregate(decree, before)
    }

    fn check_aggregate(&self, decree: &Decree, before: Option<&Decree>) -> Result<(), Broken> {
        let Outcome::Model(manifest) = &decree.outcome else { return Ok(()) };
        let Some(parent) = before else { return Ok(()) };
        let mut contributions = Vec::new();
        for part in &decree.contributors {
            match self.updates.get(&(part.peer.clone(), part.update)) {
                Some((round, from, weights)) if *round == decree.round && *from == parent.model().digest => {
                    contributions.push(Contribution { num_examples: part.num_examples, weights });
                }
                _ => {
                    return Err((
                        AGGREGATE,
                        format!("{:?} counts an update that {} never made", decree.round, part.peer),
                    ));
                }
            }
        }
        let expected = Rule::FedAvg.aggregate(&contributions).map_err(|error| (AGGREGATE, error.to_string()))?;
        let expected = Digest::of(&Codec::F32.encode(&expected));
        if expected == manifest.digest {
            Ok(())
        } else {
            Err((AGGREGATE, format!("{:?} is another model than its contributors' updates give", decree.round)))
        }
    }

    /// A peer has trained.
    pub(super) fn trained(
        &mut self,
        peer: &PeerId,
        round: Round,
        model: Digest,
        update: Digest,
        weights: Weights,
    ) -> Result<(), Broken> {
        self.updates.insert((peer.clone(), update), (round, model, weights));
        if self.trained.contains(&(peer.clone(), round)) {
            return Err((TRAINED_ONCE, format!("{peer} trained {round:?} again")));
        }
        Ok(())
    }

    /// A peer has sent a message.
    pub(super) fn sent(&mut self, message: &Bytes) -> Result<(), Broken> {
        let Ok((envelope, _)) = Envelope::decode(message) else { return Ok(()) };
        let Envelope { sender, round, term, body, .. } = envelope;
        let broken = |what: String| Err((PROMISES, what));
        match body {
            Body::Ballot { candidate, .. } => {
                let ballots = self.ballots.entry((sender.clone(), round)).or_default();
                if let Some((last, _)) = ballots.last_key_value().filter(|(last, _)| **last > term) {
                    return broken(format!("{sender} voted in {round:?} {term:?} after {last:?}"));
                }
                let first = ballots.entry(term).or_insert_with(|| candidate.clone());
                if *first != candidate {
                    return broken(format!("{sender} voted for {first} and {candidate} in {round:?} {term:?}"));
                }
            }
            Body::Accept { decree } => {
                let ballots = self.ballots.get(&(sender.clone(), round));
                if ballots.is_some_and(|ballots| ballots.keys().any(|voted| *voted > term)) {
                    return broken(format!("{sender} accepted in {round:?} {term:?} after voting in a higher term"));
                }
                let first = *self.accepts.entry((sender.clone(), round, term)).or_insert(decree);
                if first != decree {
                    return broken(format!("{sender} accepted {first:?} and {decree:?} in {round:?} {term:?}"));
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Whether a peer holds a decree and its model, or has gone on from it.
fn holds(peer: &Persisted<'_>, decree: &Decree) -> bool {
    let head = peer.durable.head.as_ref();
    let beyond = head.is_some_and(|head| head.decree.round > decree.round);
    let committed = head.is_some_and(|head| head.decree == *decree);
    let accepted = peer.durable.open.accepted.as_ref().is_some_and(|(_, accepted)| accepted == decree);
    beyond || (committed || accepted) && peer.blobs.get(decree.model().digest).is_ok_and(|blob| blob.is_some())
}
