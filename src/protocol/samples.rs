//! What the tests of the phases begin with: each changes what matters to it.

use std::sync::Arc;

use bytes::Bytes;

use super::message::{Body, Envelope, Hello, VERSION};
use super::{Event, Identity, Peer, Roster};
use crate::types::{Incarnation, PeerId, Round, Term};
use crate::weights::{Layout, TensorSpec};

pub(in crate::protocol) fn id(name: &str) -> PeerId {
    PeerId::new(name).unwrap()
}

/// The roster of these peers, each the only one that ever had its name.
pub(in crate::protocol) fn roster<T: AsRef<str>>(names: impl IntoIterator<Item = T>) -> Roster {
    Roster::of(names.into_iter().map(|name| (id(name.as_ref()), Incarnation(0))).collect())
}

/// A peer of one example, whose model has four values, as that of [`Decree::sample`](super::Decree::sample).
pub(in crate::protocol) fn identity(name: &str) -> Identity {
    let layout = Arc::new(Layout { tensors: vec![TensorSpec { name: "w".into(), shape: vec![4] }] });
    Identity {
        peer: id(name),
        incarnation: Incarnation(0),
        layout,
        num_examples: 1,
        broker: None,
        summary: Bytes::new(),
    }
}

/// A hello of another peer that fits `peer`, is new, and has nothing yet.
pub(in crate::protocol) fn hello(peer: &Peer) -> Hello {
    let (entries, layout) = (peer.config.entries(), peer.layout_digest);
    let (num_examples, head, genesis, done, number, lag_ms, broker) = (1, None, None, false, 0, 0, None);
    let incarnation = Incarnation(0);
    Hello { incarnation, entries, layout, num_examples, head, genesis, done, number, lag_ms, broker }
}

/// What `sender` says of (`round`, `term`).
pub(in crate::protocol) fn says(sender: &str, round: u64, term: u32, body: Body) -> Event {
    let (sender, signature, round, term) = (id(sender), vec![], Round(round), Term(term));
    Event::Message(Envelope { version: VERSION, sender, signature, round, term, body }.encode())
}
