//! Whom to vote for: the policy, a pure function of what all members know.
//!
//! Ballots agree without talk because every member computes the same candidate from the roster, the parent
//! model, the term and the peers known gone. Members whose views differ for a moment vote apart, nobody gets
//! a quorum, and the next term brings them together; members whose views differ for good agree from a term on in which
//! nobody is passed over.

mod fixed;
mod random;
mod rotate;

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::protocol::roster::Roster;
use crate::types::{Digest, PeerId, Term};

/// From this term on the policy passes over nobody.
///
/// Views of who is gone may differ for good (a last will that only some heard), and ballots would split in every term.
const NOBODY_PASSED_OVER: Term = Term(3);

/// How the leader of a round is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Policy {
    /// By the digest of the parent model: unpredictable before the round before it is decided, the same
    /// for all. The last leader comes last, so that the turn passes on.
    #[default]
    Random,
    /// The roster in order, starting after the last leader.
    Rotate,
    /// Always this peer while it is there; without it as [`Policy::Random`].
    Fixed(PeerId),
}

/// What the members of a round know when they vote.
#[derive(Clone, Copy, Debug)]
pub struct Electorate<'a> {
    /// Who may vote and be elected.
    pub roster: &'a Roster,
    /// Members known to have left or died; they are passed over while anybody else is there.
    pub gone: &'a BTreeSet<PeerId>,
    /// What the turn is drawn by: it names the round and the parent model, and nothing that may differ between two runs
    /// of one seed, such as terms, addresses of brokers or the length of chunks.
    pub lot: Digest,
    /// Who led the round before.
    pub last_leader: Option<&'a PeerId>,
}

impl Policy {
    /// The names that [`Policy::from_str`] takes.
    pub const NAMES: &'static [&'static str] = &["random", "rotate", "fixed:PEER"];

    /// Whom to vote for in `term`.
    pub fn candidate(&self, electorate: &Electorate<'_>, term: Term) -> PeerId {
        let order = match self {
            Policy::Random => random::order(electorate),
            Policy::Rotate => rotate::order(electorate),
            Policy::Fixed(peer) => fixed::order(electorate, peer),
        };
        let present: Vec<&PeerId> = order.iter().copied().filter(|peer| !electorate.gone.contains(*peer)).collect();
        let order = if present.is_empty() || term >= NOBODY_PASSED_OVER { order } else { present };
        order[term.0 as usize % order.len()].clone()
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Policy::Random => f.write_str("random"),
            Policy::Rotate => f.write_str("rotate"),
            Policy::Fixed(peer) => write!(f, "fixed:{peer}"),
        }
    }
}

/// A text that names no policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no policy: random, rotate or fixed:PEER")]
pub struct PolicyError(String);

impl FromStr for Policy {
    type Err = PolicyError;
    fn from_str(text: &str) -> Result<Self, PolicyError> {
        match text {
            "random" => Ok(Policy::Random),
            "rotate" => Ok(Policy::Rotate),
            _ => text
                .strip_prefix("fixed:")
                .and_then(|peer| PeerId::new(peer).ok())
                .map(Policy::Fixed)
                .ok_or_else(|| PolicyError(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::samples;

    fn peer(name: &str) -> PeerId {
        PeerId::new(name).unwrap()
    }

    fn roster(len: usize) -> Roster {
        samples::roster((0..len).map(|i| format!("p{i}")))
    }

    fn leaders(policy: &Policy, roster: &Roster, rounds: u64) -> Vec<PeerId> {
        let mut last: Option<PeerId> = None;
        let gone = BTreeSet::new();
        (0..rounds)
            .map(|round| {
                let lot = Digest::of(&round.to_le_bytes());
                let electorate = Electorate { roster, gone: &gone, lot, last_leader: last.as_ref() };
                let leader = policy.candidate(&electorate, Term(0));
                last = Some(leader.clone());
                leader
            })
            .collect()
    }

    #[test]
    fn random_never_elects_one_peer_twice_running_and_gives_all_a_turn() {
        let roster = roster(5);
        let leaders = leaders(&Policy::Random, &roster, 200);
        assert!(leaders.windows(2).all(|pair| pair[0] != pair[1]));
        for member in roster.members() {
            let turns = leaders.iter().filter(|leader| *leader == member).count();
            assert!((20..=60).contains(&turns), "{member} led {turns} of 200");
        }
    }

    #[test]
    fn rotate_takes_the_roster_in_order() {
        let names: Vec<String> = leaders(&Policy::Rotate, &roster(3), 5).iter().map(PeerId::to_string).collect();
        assert_eq!(names, ["p0", "p1", "p2", "p0", "p1"]);
    }

    #[test]
    fn fixed_stays_with_its_peer_until_it_is_gone() {
        let (roster, policy) = (roster(3), Policy::Fixed(peer("p1")));
        assert!(leaders(&policy, &roster, 5).iter().all(|leader| *leader == peer("p1")));
        let gone = BTreeSet::from([peer("p1")]);
        let electorate = Electorate { roster: &roster, gone: &gone, lot: Digest::of(b"x"), last_leader: None };
        assert_ne!(policy.candidate(&electorate, Term(0)), peer("p1"));
    }

    #[test]
    fn every_member_is_tried_within_as_many_terms_as_there_are_members() {
        let roster = roster(4);
        let gone = BTreeSet::new();
        let electorate = Electorate { roster: &roster, gone: &gone, lot: Digest::of(b"x"), last_leader: None };
        for policy in [Policy::Random, Policy::Rotate, Policy::Fixed(peer("p2"))] {
            let tried: BTreeSet<PeerId> = (0..4).map(|term| policy.candidate(&electorate, Term(term))).collect();
            assert_eq!(tried.len(), 4, "{policy}");
        }
    }

    #[test]
    fn when_all_are_gone_somebody_is_named_all_the_same() {
        let roster = roster(2);
        let gone = roster.members().iter().cloned().collect();
        let electorate = Electorate { roster: &roster, gone: &gone, lot: Digest::of(b"x"), last_leader: None };
        assert!(roster.contains(&Policy::Random.candidate(&electorate, Term(9))));
    }

    #[test]
    fn a_policy_survives_its_text() {
        for policy in [Policy::Random, Policy::Rotate, Policy::Fixed(peer("a.b"))] {
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
        assert!("fixed:".parse::<Policy>().is_err() && "rand".parse::<Policy>().is_err());
    }
}
