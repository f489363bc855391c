//! Weights on their way through the broker.
//!
//! The router keeps each message in a log for every filter that it matches, until newer ones push it out: that is memory for
//! each filter that ever carried weights, written once, read once, and cold when it is used again. So weights go round it.
//! They lie here, and the router passes *tickets* in their place: few bytes, which come out at every connection that is to
//! have the message, in order. The weights are freed when the last of those connections has taken them.
//!
//! What lies here is bounded. Of more, the oldest is dropped, which is what a connection has left lying that does not
//! keep up; its receiver asks for it again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use rumqttd::protocol::matches;
use tracing::debug;

/// Half of it says that this is a ticket of this broker, half of it which.
const TICKET_BYTES: usize = 16;

/// Tells one connection from all others that there ever were.
pub(super) type ConnectionNumber = u64;

/// The weights that wait for connections to take them.
#[derive(Debug)]
pub(super) struct Shelf {
    /// How tickets begin. Nobody outside knows it, since no ticket leaves the broker.
    mark: [u8; 8],
    bytes_max: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What each connection has subscribed to.
    filters: BTreeMap<ConnectionNumber, BTreeSet<String>>,
    /// By their number, the oldest first.
    payloads: BTreeMap<u64, Waiting>,
    /// The number of the next payload.
    next: u64,
    /// What all payloads have together.
    bytes: usize,
}

/// A payload that was not taken by all.
#[derive(Debug)]
struct Waiting {
    payload: Bytes,
    /// Who has not taken it; who has overlapping filters, once for each.
    by: Vec<ConnectionNumber>,
}

/// What stands behind the payload of a message from the router.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// It is no ticket: the message itself.
    Itself,
    /// It is a ticket of this.
    Payload(Bytes),
    /// It is a ticket of what was dropped, or is not for this connection.
    Gone,
}

impl Shelf {
    /// Empty, for so many bytes.
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { mark: rand::random(), bytes_max, state: Mutex::default() }
    }

    /// A connection subscribes. To be noted before the router knows: what it passes on must be here.
    pub(super) fn subscribed(&self, connection: ConnectionNumber, filter: &str) {
        self.state().filters.entry(connection).or_default().insert(filter.to_owned());
    }

    pub(super) fn unsubscribed(&self, connection: ConnectionNumber, filter: &str) {
        if let Some(filters) = self.state().filters.get_mut(&connection) {
            filters.remove(filter);
        }
    }

    /// A connection has ended: nothing waits for it.
    pub(super) fn left(&self, connection: ConnectionNumber) {
        let mut state = self.state();
        state.filters.remove(&connection);
        let mut freed = 0;
        state.payloads.retain(|_, waiting| {
            waiting.by.retain(|by| *by != connection);
            freed += if waiting.by.is_empty() { waiting.payload.len() } else { 0 };
            !waiting.by.is_empty()
        });
        state.bytes -= freed;
    }

    /// Puts a payload here for all connections that subscribe to `topic`, but for `without`. Returns the ticket for the
    /// router. Nobody is promised more, whatever QoS it subscribed at: it was published at QoS 0.
    pub(super) fn put(&self, topic: &str, payload: &Bytes, without: Option<ConnectionNumber>) -> Bytes {
        let mut state = self.state();
        let others = state.filters.iter().filter(|(connection, _)| without != Some(**connection));
        let by: Vec<_> = others
            .flat_map(|(connection, filters)| {
                filters.iter().filter(|filter| matches(topic, filter)).map(|_| *connection)
            })
            .collect();
        let number = state.next;
        state.next += 1;
        if !by.is_empty() {
            state.bytes += payload.len();
            state.payloads.insert(number, Waiting { payload: payload.clone(), by });
        }
        while state.bytes > self.bytes_max
            && let Some((_, oldest)) = state.payloads.pop_first()
        {
            debug!(topic, bytes = oldest.payload.len(), waiting = ?oldest.by, "dropped what was not taken");
            state.bytes -= oldest.payload.len();
        }
        [self.mark, number.to_be_bytes()].concat().into()
    }

    /// What a connection is to have in place of `payload`, which the router gave it.
    pub(super) fn take(&self, payload: &[u8], connection: ConnectionNumber) -> Taken {
        let Some((mark, number)) = payload.split_first_chunk() else { return Taken::Itself };
        if payload.len() != TICKET_BYTES || *mark != self.mark {
            return Taken::Itself;
        }
        let Ok(number) = number.try_into().map(u64::from_be_bytes) else { return Taken::Itself };
        let mut state = self.state();
        let Some(waiting) = state.payloads.get_mut(&number) else { return Taken::Gone };
        let Some(place) = waiting.by.iter().position(|by| *by == connection) else { return Taken::Gone };
        waiting.by.swap_remove(place);
        let payload = waiting.payload.clone();
        if waiting.by.is_empty() {
            state.bytes -= payload.len();
            state.payloads.remove(&number);
        }
        Taken::Payload(payload)
    }

    /// What lies here, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.state().bytes
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEN: Bytes = Bytes::from_static(&[7; 10]);

    fn shelf(bytes_max: usize, subscribers: &[(ConnectionNumber, &str)]) -> Shelf {
        let shelf = Shelf::new(bytes_max);
        subscribers.iter().for_each(|(connection, filter)| shelf.subscribed(*connection, filter));
        shelf
    }

    #[test]
    fn a_payload_lies_here_until_the_last_one_has_taken_it() {
        let shelf = shelf(100, &[(1, "weights/+"), (2, "weights/a"), (3, "other")]);
        let ticket = shelf.put("weights/a", &TEN, None);
        assert_eq!((ticket.len(), shelf.bytes()), (TICKET_BYTES, 10));
        assert_eq!(shelf.take(&ticket, 3), Taken::Gone, "it is not for this one");
        assert_eq!(shelf.take(&ticket, 1), Taken::Payload(TEN));
        assert_eq!((shelf.take(&ticket, 1), shelf.bytes()), (Taken::Gone, 10));
        assert_eq!(shelf.take(&ticket, 2), Taken::Payload(TEN));
        assert_eq!(shelf.bytes(), 0);
    }

    #[test]
    fn what_nobody_waits_for_is_not_kept() {
        let shelf = shelf(100, &[(1, "weights/a"), (2, "weights/a")]);
        shelf.put("weights/b", &TEN, None);
        shelf.unsubscribed(2, "weights/a");
        shelf.put("weights/a", &TEN, Some(1));
        assert_eq!(shelf.bytes(), 0);
        shelf.put("weights/a", &TEN, None);
        shelf.left(1);
        assert_eq!(shelf.bytes(), 0);
        shelf.put("weights/a", &TEN, None);
        assert_eq!(shelf.bytes(), 0);
    }

    #[test]
    fn filters_that_overlap_each_get_one() {
        let shelf = shelf(100, &[(1, "weights/+"), (1, "weights/#")]);
        let ticket = shelf.put("weights/a", &TEN, None);
        assert_eq!(shelf.take(&ticket, 1), Taken::Payload(TEN));
        assert_eq!((shelf.take(&ticket, 1), shelf.bytes()), (Taken::Payload(TEN), 0));
    }

    #[test]
    fn of_too_much_the_oldest_is_dropped() {
        let shelf = shelf(35, &[(1, "weights/all"), (2, "weights/all")]);
        let tickets: Vec<_> = (0..5).map(|_| shelf.put("weights/all", &TEN, None)).collect();
        assert_eq!(shelf.bytes(), 30);
        for (index, ticket) in tickets.iter().enumerate() {
            let expected = if index < 2 { Taken::Gone } else { Taken::Payload(TEN) };
            assert_eq!(shelf.take(ticket, 2), expected, "{index}");
        }
        assert_eq!(shelf.bytes(), 30, "the other one has taken nothing");
    }

    #[test]
    fn messages_of_others_are_no_tickets() {
        let shelf = shelf(100, &[(1, "weights/a")]);
        let ticket = shelf.put("weights/a", &TEN, None);
        let longer = [&ticket[..], b"x"].concat();
        for other in [&b""[..], &[0; TICKET_BYTES], &ticket[1..], &longer] {
            assert_eq!(shelf.take(other, 1), Taken::Itself);
        }
    }
}
