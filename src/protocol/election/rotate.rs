//! The turn goes round the roster.

use crate::protocol::election::Electorate;
use crate::types::PeerId;

/// The members in order, starting after the last leader (or where it would stand, if it has left).
pub(super) fn order<'a>(electorate: &Electorate<'a>) -> Vec<&'a PeerId> {
    let mut order: Vec<&PeerId> = electorate.roster.members().iter().collect();
    let passed = |last: &PeerId| order.iter().filter(|peer| **peer <= last).count();
    let start = electorate.last_leader.map_or(0, passed) % order.len();
    order.rotate_left(start);
    order
}
