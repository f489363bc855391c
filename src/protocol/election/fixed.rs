//! The turn stays with one peer.

use crate::protocol::election::{Electorate, random};
use crate::types::PeerId;

/// `first`, then the others as the random policy has them.
pub(super) fn order<'a>(electorate: &Electorate<'a>, first: &PeerId) -> Vec<&'a PeerId> {
    let mut order = random::order(electorate);
    order.sort_by_key(|peer| *peer != first);
    order
}
