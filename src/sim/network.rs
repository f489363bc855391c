//! The simulated network: a broker with retained messages, and links that delay, lose, repeat and cut.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::protocol::topic::matches;
use crate::protocol::{Topic, Topics};
use crate::sim::Scenario;
use crate::types::PeerId;

/// Which side of a cut a peer is on; the broker that keeps retained messages is on side 0.
pub(super) type Side = usize;

#[derive(Debug)]
pub(super) struct Network {
    topics: Topics,
    delay: Duration,
    jitter: Duration,
    slow: f64,
    pub loss: f64,
    pub duplication: f64,
    retained: BTreeMap<String, Bytes>,
    links: BTreeMap<PeerId, Link>,
}

#[derive(Debug)]
struct Link {
    filters: Vec<String>,
    side: Side,
    subscribed: bool,
}

impl Network {
    pub(super) fn new(scenario: &Scenario) -> Self {
        Self {
            topics: Topics::new("rodizio", "simulated"),
            delay: Duration::from_millis(scenario.delay_ms),
            jitter: Duration::from_millis(scenario.jitter_ms),
            slow: scenario.slow,
            loss: scenario.loss,
            duplication: scenario.duplication,
            retained: BTreeMap::new(),
            links: BTreeMap::new(),
        }
    }

    pub(super) fn attach(&mut self, peer: &PeerId) {
        let filters = [self.topics.control_filters(peer), self.topics.bulk_filters(peer)].concat();
        let side = self.links.get(peer).map_or(0, |link| link.side);
        self.links.insert(peer.clone(), Link { filters, side, subscribed: false });
    }

    pub(super) fn detach(&mut self, peer: &PeerId) {
        if let Some(link) = self.links.get_mut(peer) {
            link.subscribed = false;
        }
    }

    pub(super) fn cut(&mut self, peer: &PeerId, side: Side) {
        if let Some(link) = self.links.get_mut(peer) {
            link.side = side;
        }
    }

    pub(super) fn is_cut(&self, peer: &PeerId) -> bool {
        self.side(peer) != 0
    }

    fn side(&self, peer: &PeerId) -> Side {
        self.links.get(peer).map_or(0, |link| link.side)
    }

    /// From now on the peer hears what it subscribed to; returns what the broker had kept for it.
    pub(super) fn subscribe(&mut self, peer: &PeerId) -> Vec<Bytes> {
        let Some(link) = self.links.get_mut(peer).filter(|link| link.side == 0) else { return Vec::new() };
        link.subscribed = true;
        let wanted = |topic: &str| link.filters.iter().any(|filter| matches(filter, topic));
        self.retained.iter().filter(|(topic, _)| wanted(topic)).map(|(_, message)| message.clone()).collect()
    }

    /// Who gets a message, after which delays. One peer may get it more than once.
    pub(super) fn publish(
        &mut self,
        from: &PeerId,
        topic: &Topic,
        retain: bool,
        message: &Bytes,
        rng: &mut ChaCha8Rng,
    ) -> Vec<(PeerId, Duration)> {
        let side = self.side(from);
        if retain && side == 0 {
            self.retained.insert(self.topics.name(topic), message.clone());
        }
        // The broker acknowledges hellos, so they are not lost; everything else may be.
        let loss = if matches!(topic, Topic::Init(_)) { 0.0 } else { self.loss };
        let mut deliveries = Vec::new();
        let subscribers: Vec<&PeerId> = match topic.subscriber() {
            Some(peer) => vec![peer],
            None => self.links.keys().collect(),
        };
        for peer in subscribers {
            let hears = self.links.get(peer).is_some_and(|link| link.subscribed && link.side == side);
            // A broker sends a message to its sender too; only hellos matter to it.
            let own = peer == from && !matches!(topic, Topic::Init(_));
            if !hears || own || rng.random_bool(loss) {
                continue;
            }
            let copies = if rng.random_bool(self.duplication) { 2 } else { 1 };
            for _ in 0..copies {
                deliveries.push((peer.clone(), self.draw_delay(rng)));
            }
        }
        deliveries
    }

    pub(super) fn draw_delay(&self, rng: &mut ChaCha8Rng) -> Duration {
        let factor = if rng.random_bool(self.slow) { 10.0 } else { 1.0 };
        self.delay + self.jitter.mul_f64(rng.random::<f64>() * factor)
    }
}
