//! The peers entitled to vote in a round.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::types::{Digest, PeerId};

/// The most peers a roster may have: what a message may make a peer allocate.
pub const ROSTER_MAX: usize = 10_000;

/// The members of one round, in `PeerId` order, each once; never empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<PeerId>")]
pub struct Roster(Vec<PeerId>);

/// A list of peers that cannot be a roster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RosterError {
    /// No quorum can come from nobody.
    #[error("a roster has at least one member")]
    Empty,
    /// Not in strictly rising order.
    #[error("a roster names every member once, in order")]
    Unordered,
    /// More than [`ROSTER_MAX`].
    #[error("a roster has at most {ROSTER_MAX} members")]
    TooLong,
}

impl Roster {
    /// The roster of these peers. Panics when there are none: the caller always counts itself.
    pub fn of(peers: &BTreeSet<PeerId>) -> Self {
        assert!(!peers.is_empty(), "a roster has at least one member");
        Self(peers.iter().cloned().collect())
    }

    /// The members, in order.
    pub fn members(&self) -> &[PeerId] {
        &self.0
    }

    /// How many members there are.
    #[expect(clippy::len_without_is_empty, reason = "a roster is never empty")]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// How many members decide: a majority. Any two quorums share a member.
    pub fn quorum(&self) -> usize {
        self.len() / 2 + 1
    }

    /// Whether `peer` may vote.
    pub fn contains(&self, peer: &PeerId) -> bool {
        self.position(peer).is_some()
    }

    /// The place of `peer` in the order.
    pub fn position(&self, peer: &PeerId) -> Option<usize> {
        self.0.binary_search(peer).ok()
    }

    /// Whether `peers` are distinct members and enough to decide.
    pub fn is_quorum<'a>(&self, peers: impl IntoIterator<Item = &'a PeerId>) -> bool {
        let distinct: BTreeSet<&PeerId> = peers.into_iter().collect();
        distinct.len() >= self.quorum() && distinct.iter().all(|peer| self.contains(peer))
    }

    /// What names this roster.
    pub fn digest(&self) -> Digest {
        let names: Vec<&str> = self.0.iter().map(PeerId::as_str).collect();
        Digest::of(names.join("\n").as_bytes())
    }
}

impl TryFrom<Vec<PeerId>> for Roster {
    type Error = RosterError;
    fn try_from(peers: Vec<PeerId>) -> Result<Self, RosterError> {
        if peers.is_empty() {
            return Err(RosterError::Empty);
        }
        if peers.len() > ROSTER_MAX {
            return Err(RosterError::TooLong);
        }
        if peers.windows(2).any(|pair| pair[0] >= pair[1]) {
            return Err(RosterError::Unordered);
        }
        Ok(Self(peers))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peers(names: &[&str]) -> Vec<PeerId> {
        names.iter().map(|name| PeerId::new(name).unwrap()).collect()
    }

    #[test]
    fn any_two_quorums_share_a_member() {
        for len in 1..20 {
            let roster = Roster((0..len).map(|i| PeerId::new(&format!("p{i:02}")).unwrap()).collect());
            assert!(2 * roster.quorum() > roster.len() && roster.quorum() <= roster.len());
        }
    }

    #[test]
    fn a_roster_is_ordered_and_not_empty() {
        assert_eq!(Roster::try_from(vec![]), Err(RosterError::Empty));
        assert_eq!(Roster::try_from(peers(&["b", "a"])), Err(RosterError::Unordered));
        assert_eq!(Roster::try_from(peers(&["a", "a"])), Err(RosterError::Unordered));
        assert!(Roster::try_from(peers(&["a", "b"])).is_ok());
    }

    #[test]
    fn a_quorum_counts_members_once() {
        let roster = Roster::try_from(peers(&["a", "b", "c"])).unwrap();
        assert!(roster.is_quorum(&peers(&["a", "c"])));
        assert!(!roster.is_quorum(&peers(&["a", "a"])));
        assert!(!roster.is_quorum(&peers(&["a", "x"])));
    }
}
