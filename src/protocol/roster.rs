//! The peers entitled to vote in a round.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::types::{Digest, Incarnation, PeerId};

/// The most peers a roster may have: what a message may make a peer allocate.
pub const ROSTER_MAX: usize = 10_000;

/// The members of one round, in `PeerId` order, each once; never empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<(PeerId, Incarnation)>", into = "Vec<(PeerId, Incarnation)>")]
pub struct Roster {
    members: Vec<PeerId>,
    /// Which one of that name each member is, in the same order.
    incarnations: Vec<Incarnation>,
}

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
    pub fn of(peers: BTreeMap<PeerId, Incarnation>) -> Self {
        assert!(!peers.is_empty(), "a roster has at least one member");
        let (members, incarnations) = peers.into_iter().unzip();
        Self { members, incarnations }
    }

    /// The members, in order.
    pub fn members(&self) -> &[PeerId] {
        &self.members
    }

    /// How many members there are.
    #[expect(clippy::len_without_is_empty, reason = "a roster is never empty")]
    pub fn len(&self) -> usize {
        self.members.len()
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
        self.members.binary_search(peer).ok()
    }

    /// Which one of its name the member `peer` is; `None` for who is no member.
    pub fn incarnation(&self, peer: &PeerId) -> Option<Incarnation> {
        self.position(peer).map(|place| self.incarnations[place])
    }

    /// Whether `peers` are distinct members and enough to decide.
    pub fn is_quorum<'a>(&self, peers: impl IntoIterator<Item = &'a PeerId>) -> bool {
        let distinct: BTreeSet<&PeerId> = peers.into_iter().collect();
        distinct.len() >= self.quorum() && distinct.iter().all(|peer| self.contains(peer))
    }

    /// What names this roster.
    pub fn digest(&self) -> Digest {
        let members = self.members.iter().zip(&self.incarnations);
        let lines: Vec<String> = members.map(|(peer, incarnation)| format!("{peer} {incarnation}")).collect();
        Digest::of(lines.join("\n").as_bytes())
    }

    /// What names its members, whichever of their names they are: the same where a federation is founded again alike.
    pub fn names_digest(&self) -> Digest {
        let names: Vec<&str> = self.members.iter().map(PeerId::as_str).collect();
        Digest::of(names.join("\n").as_bytes())
    }
}

impl TryFrom<Vec<(PeerId, Incarnation)>> for Roster {
    type Error = RosterError;
    fn try_from(peers: Vec<(PeerId, Incarnation)>) -> Result<Self, RosterError> {
        if peers.is_empty() {
            return Err(RosterError::Empty);
        }
        if peers.len() > ROSTER_MAX {
            return Err(RosterError::TooLong);
        }
        if peers.windows(2).any(|pair| pair[0].0 >= pair[1].0) {
            return Err(RosterError::Unordered);
        }
        let (members, incarnations) = peers.into_iter().unzip();
        Ok(Self { members, incarnations })
    }
}

impl From<Roster> for Vec<(PeerId, Incarnation)> {
    fn from(roster: Roster) -> Self {
        roster.members.into_iter().zip(roster.incarnations).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peers(names: &[&str]) -> Vec<PeerId> {
        names.iter().map(|name| PeerId::new(name).unwrap()).collect()
    }

    fn roster(names: &[&str]) -> Result<Roster, RosterError> {
        Roster::try_from(peers(names).into_iter().zip((0..).map(Incarnation)).collect::<Vec<_>>())
    }

    #[test]
    fn any_two_quorums_share_a_member() {
        for len in 1..20 {
            let names: Vec<String> = (0..len).map(|i| format!("p{i:02}")).collect();
            let roster = roster(&names.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
            assert!(2 * roster.quorum() > roster.len() && roster.quorum() <= roster.len());
        }
    }

    #[test]
    fn a_roster_is_ordered_and_not_empty() {
        assert_eq!(roster(&[]), Err(RosterError::Empty));
        assert_eq!(roster(&["b", "a"]), Err(RosterError::Unordered));
        assert_eq!(roster(&["a", "a"]), Err(RosterError::Unordered));
        assert!(roster(&["a", "b"]).is_ok());
    }

    #[test]
    fn a_quorum_counts_members_once() {
        let roster = roster(&["a", "b", "c"]).unwrap();
        assert!(roster.is_quorum(&peers(&["a", "c"])));
        assert!(!roster.is_quorum(&peers(&["a", "a"])));
        assert!(!roster.is_quorum(&peers(&["a", "x"])));
    }
}
