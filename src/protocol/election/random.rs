//! The turn falls by the round and the parent model.

use crate::protocol::election::Electorate;
use crate::types::{Digest, PeerId};

/// The members by the hash of (lot, name); the last leader comes last.
pub(super) fn order<'a>(electorate: &Electorate<'a>) -> Vec<&'a PeerId> {
    let mut order: Vec<&PeerId> = electorate.roster.members().iter().collect();
    order.sort_by_cached_key(|peer| {
        let lot = Digest::of(&[&electorate.lot.0[..], peer.as_str().as_bytes()].concat());
        (Some(*peer) == electorate.last_leader, lot)
    });
    order
}
