//! Messages inside one process: a broker's semantics without a broker.

use std::collections::BTreeMap;
use std::future::pending;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::{Outgoing, Transport, TransportEvent, Will};

/// What the hub is called where a broker's address is expected.
const NAME: &str = "this process";

/// Where the members of one process meet. Clones are the same hub.
#[derive(Clone, Default)]
pub struct Hub(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    members: BTreeMap<String, Member>,
    retained: BTreeMap<String, Bytes>,
    /// How many have ever joined: it tells one from an earlier one of the same id.
    joined: u64,
}

struct Member {
    number: u64,
    filters: Vec<String>,
    will: Option<Will>,
    events: UnboundedSender<TransportEvent>,
}

impl Hub {
    /// A hub without members.
    pub fn new() -> Self {
        Self::default()
    }

    /// Joins under `id` and subscribes to `filters`, of which no two should match one topic. Who was there under this
    /// id is disconnected, and its last will does not fire.
    pub fn join(&self, id: &str, filters: Vec<String>, will: Option<Will>) -> MemoryTransport {
        let (events, receiver) = unbounded_channel();
        let mut state = self.state();
        state.joined += 1;
        let number = state.joined;
        let connected = TransportEvent::Connected { broker: NAME.to_owned(), found: None };
        let kept = state.retained.iter().filter(|(topic, _)| matches_any(&filters, topic));
        let kept = kept.map(|(topic, payload)| message(topic, payload));
        for event in [connected].into_iter().chain(kept) {
            // The receiver is at hand.
            let _ = events.send(event);
        }
        if let Some(old) = state.members.insert(id.to_owned(), Member { number, filters, will, events }) {
            let reason = "another one came with this id".to_owned();
            // An error says that it is being dropped right now.
            let _ = old.events.send(TransportEvent::Disconnected { reason });
        }
        drop(state);
        MemoryTransport { hub: self.clone(), id: id.to_owned(), number, events: receiver }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn publish(&mut self, topic: &str, payload: Bytes, retain: bool) {
        for member in self.members.values().filter(|member| matches_any(&member.filters, topic)) {
            // An error says that it is being dropped right now.
            let _ = member.events.send(message(topic, &payload));
        }
        match (retain, payload.is_empty()) {
            (false, _) => {}
            (true, true) => drop(self.retained.remove(topic)),
            (true, false) => drop(self.retained.insert(topic.to_owned(), payload)),
        }
    }

    fn is_member(&self, id: &str, number: u64) -> bool {
        self.members.get(id).is_some_and(|member| member.number == number)
    }

    /// Ends the membership, unless a later one of the same id has ended it.
    fn leave(&mut self, id: &str, number: u64) -> Option<Member> {
        if self.is_member(id, number) { self.members.remove(id) } else { None }
    }
}

fn message(topic: &str, payload: &Bytes) -> TransportEvent {
    TransportEvent::Message { topic: topic.to_owned(), payload: payload.clone() }
}

fn matches_any(filters: &[String], topic: &str) -> bool {
    filters.iter().any(|filter| matches(filter, topic))
}

/// Whether `topic` is one of those that `filter` means: `+` stands for one level, a trailing `#` for any number.
fn matches(filter: &str, topic: &str) -> bool {
    let mut levels = topic.split('/');
    for wanted in filter.split('/') {
        match (wanted, levels.next()) {
            ("#", _) => return true,
            (_, None) => return false,
            ("+", Some(_)) => {}
            (wanted, Some(level)) if wanted == level => {}
            _ => return false,
        }
    }
    levels.next().is_none()
}

/// A membership of a [`Hub`].
pub struct MemoryTransport {
    hub: Hub,
    id: String,
    number: u64,
    events: UnboundedReceiver<TransportEvent>,
}

impl Transport for MemoryTransport {
    async fn next(&mut self) -> TransportEvent {
        match self.events.recv().await {
            Some(event) => event,
            // Another one has its id; the last event said so.
            None => pending().await,
        }
    }

    fn send(&mut self, message: Outgoing) {
        let mut state = self.hub.state();
        if state.is_member(&self.id, self.number) {
            let (topic, retain) = (message.topic.clone(), message.retain);
            state.publish(&topic, message.payload(), retain);
        }
    }

    /// The hub is the only place.
    fn set_brokers(&mut self, _brokers: Vec<String>) {}

    fn move_on(&mut self) {}

    async fn stop(self) {
        self.hub.state().leave(&self.id, self.number);
    }
}

impl Drop for MemoryTransport {
    fn drop(&mut self) {
        let mut state = self.hub.state();
        if let Some(Will { topic, payload, retain }) = state.leave(&self.id, self.number).and_then(|member| member.will)
        {
            state.publish(&topic, payload, retain);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_match_as_in_mqtt() {
        for (filter, topic) in [
            ("a/b", "a/b"),
            ("a/+/c", "a/b/c"),
            ("+", "a"),
            ("a/+", "a/"),
            ("#", "a/b/c"),
            ("a/#", "a/b/c"),
            ("a/#", "a"),
            ("a/+/#", "a/b"),
        ] {
            assert!(matches(filter, topic), "{filter} does not match {topic}");
        }
        for (filter, topic) in [
            ("a", "a/b"),
            ("a/b", "a"),
            ("a/+", "a"),
            ("a/+", "a/b/c"),
            ("+/b", "a/c"),
            ("a/#", "ab"),
            ("a/+/#", "a"),
            ("b/#", "a/b"),
        ] {
            assert!(!matches(filter, topic), "{filter} matches {topic}");
        }
    }

    #[tokio::test]
    async fn the_second_one_of_an_id_takes_the_place_of_the_first_without_its_will() {
        let hub = Hub::new();
        let will = Will { topic: "wills".to_owned(), payload: Bytes::from_static(b"gone"), retain: false };
        let mut watcher = hub.join("watcher", vec!["#".to_owned()], None);
        assert!(matches!(watcher.next().await, TransportEvent::Connected { .. }));
        let mut first = hub.join("twin", vec![], Some(will.clone()));
        assert!(matches!(first.next().await, TransportEvent::Connected { .. }));
        let second = hub.join("twin", vec![], Some(will));
        assert!(matches!(first.next().await, TransportEvent::Disconnected { .. }));
        drop(first);
        assert!(watcher.events.is_empty());
        drop(second);
        assert_eq!(watcher.next().await, message("wills", &Bytes::from_static(b"gone")));
    }
}
