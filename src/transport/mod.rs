//! How a node's messages travel: publish and subscribe, through a broker ([`mqtt`]) or inside one process
//! ([`memory`]).
//!
//! What every transport promises, and all that it promises:
//! - `Connected` comes first, and again after each `Disconnected`. The node answers it with its hello, retained. Of
//!   any two peers one then sees the other: through a broker, what other peers say is subscribed to only when the
//!   hello is out, and the hello is repeated then, for brokers that keep nothing for filters with wildcards.
//! - Messages may be lost, and after a reconnect those on their way are: the protocol sends everything again.
//! - A transport that is dropped, or whose process dies, leaves its last will behind; one that is stopped does not.

pub mod memory;
pub mod mqtt;

use std::future::Future;
use std::time::Duration;

use bytes::{Bytes, BytesMut};

/// Something that happened to a transport.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TransportEvent {
    /// Messages pass from now on. The first one to send is the hello.
    Connected {
        /// The broker's address, for people.
        broker: String,
        /// What the broker can do, where it was tried.
        found: Option<Found>,
    },
    /// Nothing passes until the next [`Connected`](Self::Connected). What was on its way may be lost.
    Disconnected {
        /// Why, for people.
        reason: String,
    },
    /// As [`Disconnected`](Self::Disconnected), but wanted: the peer has left its broker for this one.
    Moving {
        /// The new broker's address.
        broker: String,
    },
    /// A message to one of the filters.
    Message {
        /// The topic it was published to.
        topic: String,
        /// The message: an encoded envelope, and a chunk behind it.
        payload: Bytes,
    },
}

/// What a broker can do, as far as it was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// A message of so many bytes passes. The transport sends longer ones in pieces.
    pub message_bytes: usize,
    /// The longest chunk that passes whole, in bytes, where that is shorter than what was wanted.
    pub chunk_bytes_max: Option<usize>,
    /// What it does with retained messages.
    pub retained: Retained,
    /// How long it took to find out.
    pub took: Duration,
}

/// What a broker does with retained messages. Peers find each other without; it only takes longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retained {
    /// It keeps them for later subscribers to their topic.
    Kept,
    /// It passes them on and keeps none.
    Missing,
    /// It closes the connection that publishes one: they are sent as others are.
    Refused,
}

impl Retained {
    /// The word for it in events.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kept => "kept",
            Self::Missing => "missing",
            Self::Refused => "refused",
        }
    }
}

/// What a message is to the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A small message of the protocol. It is sent at least once (QoS 1) and never waits for bulk.
    Control,
    /// A chunk of weights. It is sent at most once (QoS 0): receivers ask again for what is missing.
    Bulk,
}

/// A message to publish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// The topic, without wildcards.
    pub topic: String,
    /// Whether the broker keeps it for later subscribers. An empty message with this clears the one kept.
    pub retain: bool,
    /// How it is sent.
    pub class: Class,
    /// The encoded envelope.
    pub head: Bytes,
    /// What follows it, often nothing: a slice of a blob, which stays shared until the message is written.
    pub tail: Bytes,
}

impl Outgoing {
    /// The bytes of the message.
    fn payload(self) -> Bytes {
        if self.tail.is_empty() {
            return self.head;
        }
        let mut payload = BytesMut::with_capacity(self.len());
        payload.extend_from_slice(&self.head);
        payload.extend_from_slice(&self.tail);
        payload.freeze()
    }

    fn len(&self) -> usize {
        self.head.len() + self.tail.len()
    }
}

/// What is published for a peer that went without saying goodbye.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Will {
    /// The topic, without wildcards.
    pub topic: String,
    /// The message.
    pub payload: Bytes,
    /// Whether the broker keeps it for later subscribers.
    pub retain: bool,
}

/// A way for messages to and from the other peers. Dropping it lets the last will fire.
pub trait Transport: Send {
    /// Waits for the next event. Nothing is lost when the wait is given up (it may stand in a `select!`).
    fn next(&mut self) -> impl Future<Output = TransportEvent> + Send;

    /// Queues a message and returns at once. Without a connection the message is dropped.
    ///
    /// What waits here is bounded by the receivers: they grant the chunks that may be sent.
    fn send(&mut self, message: Outgoing);

    /// Replaces the list of brokers, the best first. A connection that there is stays.
    fn set_brokers(&mut self, brokers: Vec<String>);

    /// Leaves this broker for the next one of the list that answers; the last will speaks for it here. Where no other
    /// answers nothing happens.
    fn move_on(&mut self);

    /// Sends what is queued, says goodbye, so that the last will does not fire, and ends. Takes a few seconds at most.
    fn stop(self) -> impl Future<Output = ()> + Send;
}

#[cfg(test)]
mod tests {
    use super::memory::{Hub, MemoryTransport};
    use super::mqtt::{MqttConfig, MqttTransport};
    use super::*;
    use crate::broker::{Broker, BrokerConfig};
    use crate::types::PeerId;

    pub(super) fn mqtt_config(broker: &Broker, name: &str, will: Option<Will>) -> MqttConfig {
        MqttConfig {
            brokers: vec![broker.addr().to_string()],
            federation: "test".to_owned(),
            peer: PeerId::new(name).unwrap(),
            keep_alive: Duration::from_secs(5),
            packet_bytes_max: BrokerConfig::default().packet_bytes_max,
            will,
            control_filters: vec!["t/init/+".to_owned(), "t/control/#".to_owned()],
            bulk_filters: vec![format!("t/weights/{name}"), "t/weights/all".to_owned()],
            hello_first: true,
            probe: None,
        }
    }

    pub(super) fn outgoing(class: Class, topic: &str, head: &str, tail: &Bytes) -> Outgoing {
        let head = Bytes::copy_from_slice(head.as_bytes());
        Outgoing { topic: topic.to_owned(), retain: false, class, head, tail: tail.clone() }
    }

    pub(super) fn control(topic: &str, text: &str) -> Outgoing {
        outgoing(Class::Control, topic, text, &Bytes::new())
    }

    pub(super) fn hello(name: &str) -> Outgoing {
        Outgoing { retain: true, ..control(&format!("t/init/{name}"), "hello") }
    }

    pub(super) fn goodbye(name: &str) -> Option<Will> {
        let payload = Bytes::from_static(b"goodbye");
        Some(Will { topic: format!("t/init/{name}"), payload, retain: true })
    }

    /// Waits for `Connected`, says hello, and waits until the hello has come back.
    pub(super) async fn settle(transport: &mut impl Transport, name: &str) {
        let event = transport.next().await;
        assert!(matches!(event, TransportEvent::Connected { .. }), "{event:?} before Connected");
        transport.send(hello(name));
        wait_for(transport, &format!("t/init/{name}"), "hello").await;
    }

    /// Waits for one message and returns the others that come before it.
    pub(super) async fn wait_for(transport: &mut impl Transport, topic: &str, text: &str) -> Vec<(String, Bytes)> {
        let mut others = Vec::new();
        loop {
            match transport.next().await {
                TransportEvent::Message { topic: found, payload } if found == topic && payload == text => {
                    return others;
                }
                TransportEvent::Message { topic, payload } => others.push((topic, payload)),
                other => panic!("{other:?} while waiting for {text} on {topic}"),
            }
        }
    }

    /// Either transport, so that one test is about both.
    enum Any {
        Mqtt(MqttTransport),
        Memory(MemoryTransport),
    }

    impl Transport for Any {
        async fn next(&mut self) -> TransportEvent {
            match self {
                Any::Mqtt(transport) => transport.next().await,
                Any::Memory(transport) => transport.next().await,
            }
        }

        fn send(&mut self, message: Outgoing) {
            match self {
                Any::Mqtt(transport) => transport.send(message),
                Any::Memory(transport) => transport.send(message),
            }
        }

        fn set_brokers(&mut self, brokers: Vec<String>) {
            match self {
                Any::Mqtt(transport) => transport.set_brokers(brokers),
                Any::Memory(transport) => transport.set_brokers(brokers),
            }
        }

        fn move_on(&mut self) {
            match self {
                Any::Mqtt(transport) => transport.move_on(),
                Any::Memory(transport) => transport.move_on(),
            }
        }

        async fn stop(self) {
            match self {
                Any::Mqtt(transport) => transport.stop().await,
                Any::Memory(transport) => transport.stop().await,
            }
        }
    }

    /// Where the peers of a test meet.
    enum Place {
        Broker(Broker),
        Hub(Hub),
    }

    impl Place {
        /// A new peer that has said hello.
        async fn join(&self, name: &str) -> Any {
            let mut joined = match self {
                Place::Broker(broker) => {
                    let config = mqtt_config(broker, name, goodbye(name));
                    Any::Mqtt(MqttTransport::connect(config, Duration::ZERO).await.unwrap())
                }
                Place::Hub(hub) => {
                    let own = format!("t/weights/{name}");
                    let filters = ["t/init/+", "t/control/#", &own, "t/weights/all"].map(str::to_owned);
                    Any::Memory(hub.join(name, filters.to_vec(), goodbye(name)))
                }
            };
            settle(&mut joined, name).await;
            joined
        }
    }

    /// Runs a test through a broker and through a hub.
    async fn everywhere(test: impl AsyncFn(Place)) {
        test(Place::Hub(Hub::new())).await;
        test(Place::Broker(Broker::start(BrokerConfig::default()).await.unwrap())).await;
    }

    #[tokio::test]
    async fn peers_see_the_hellos_of_earlier_and_of_later_ones() {
        everywhere(async |place| {
            let mut early = place.join("early").await;
            let mut late = match &place {
                Place::Broker(broker) => {
                    let config = mqtt_config(broker, "late", None);
                    Any::Mqtt(MqttTransport::connect(config, Duration::ZERO).await.unwrap())
                }
                Place::Hub(hub) => Any::Memory(hub.join("late", vec!["t/init/+".to_owned()], None)),
            };
            assert!(matches!(late.next().await, TransportEvent::Connected { .. }));
            late.send(hello("late"));
            wait_for(&mut early, "t/init/late", "hello").await;
            wait_for(&mut late, "t/init/early", "hello").await;
        })
        .await;
    }

    #[tokio::test]
    async fn messages_of_both_classes_arrive_whole() {
        everywhere(async |place| {
            let (mut a, mut b) = (place.join("a").await, place.join("b").await);
            let chunk: Bytes = (0..1 << 20).map(|n: u32| (n % 251) as u8).collect::<Vec<u8>>().into();
            a.send(outgoing(Class::Bulk, "t/weights/b", "head", &chunk));
            a.send(control("t/control/1", "ballot"));
            let mut found = Vec::new();
            while found.len() < 2 {
                match b.next().await {
                    TransportEvent::Message { topic, .. } if topic.starts_with("t/init/") => {}
                    TransportEvent::Message { topic, payload } => found.push((topic, payload)),
                    other => panic!("{other:?} instead of a message"),
                }
            }
            found.sort();
            assert_eq!(found[0], ("t/control/1".to_owned(), Bytes::from_static(b"ballot")));
            assert_eq!(found[1].0, "t/weights/b");
            assert_eq!(found[1].1[..4], b"head"[..]);
            assert_eq!(found[1].1[4..], chunk);
            b.send(outgoing(Class::Bulk, "t/weights/all", "to everybody", &Bytes::new()));
            wait_for(&mut a, "t/weights/all", "to everybody").await;
            wait_for(&mut b, "t/weights/all", "to everybody").await;
        })
        .await;
    }

    #[tokio::test]
    async fn the_last_will_of_a_dropped_transport_fires_and_is_kept() {
        everywhere(async |place| {
            let mut watcher = place.join("watcher").await;
            drop(place.join("a").await);
            wait_for(&mut watcher, "t/init/a", "goodbye").await;
            let mut late = place.join("late").await;
            late.send(control("t/control/1", "marker"));
            wait_for(&mut late, "t/control/1", "marker").await;
            drop(late);
            wait_for(&mut watcher, "t/init/late", "goodbye").await;
        })
        .await;
    }

    #[tokio::test]
    async fn a_stopped_transport_has_sent_everything_and_leaves_no_last_will() {
        everywhere(async |place| {
            let (mut a, mut b) = (place.join("a").await, place.join("b").await);
            wait_for(&mut a, "t/init/b", "hello").await;
            let chunk = Bytes::from(vec![7; 100_000]);
            for n in 0..300 {
                b.send(control("t/control/count", &n.to_string()));
            }
            for _ in 0..50 {
                b.send(outgoing(Class::Bulk, "t/weights/a", "", &chunk));
            }
            b.stop().await;
            let mut other = place.join("other").await;
            other.send(control("t/control/end", ""));
            other.send(outgoing(Class::Bulk, "t/weights/a", "end", &Bytes::new()));
            let (mut counted, mut chunks, mut ends) = (0, 0, 0);
            while ends < 2 {
                let TransportEvent::Message { topic, payload } = a.next().await else { panic!("not a message") };
                match topic.as_str() {
                    "t/control/count" => {
                        assert_eq!(payload, counted.to_string());
                        counted += 1;
                    }
                    "t/weights/a" if payload == "end" => ends += 1,
                    "t/weights/a" => chunks += 1,
                    "t/control/end" => ends += 1,
                    topic => assert_ne!((topic, &payload[..]), ("t/init/b", &b"goodbye"[..])),
                }
            }
            assert_eq!((counted, chunks), (300, 50));
        })
        .await;
    }

    #[tokio::test]
    async fn an_empty_retained_message_clears_the_one_that_is_kept() {
        everywhere(async |place| {
            let mut a = place.join("a").await;
            a.send(Outgoing { retain: true, ..control("t/init/ghost", "boo") });
            wait_for(&mut a, "t/init/ghost", "boo").await;
            a.send(Outgoing { retain: true, ..control("t/init/ghost", "") });
            wait_for(&mut a, "t/init/ghost", "").await;
            let mut late = place.join("late").await;
            late.send(control("t/control/1", "marker"));
            let others = wait_for(&mut late, "t/control/1", "marker").await;
            assert!(others.iter().all(|(topic, _)| topic != "t/init/ghost"), "{others:?}");
        })
        .await;
    }
}
