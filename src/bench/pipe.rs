//! The bare pipe: rumqttc to a broker to rumqttc, what transfers are measured against.
//!
//! Chunks of the same length, without headers, digests or repeats, and nothing is kept. Only what is in flight
//! is bounded, since a broker forgets what a slow subscriber does not fetch: as much as one leader has in flight, so
//! that the pipe never waits for a word that it could do without.
//!
//! The pipe that transfers resemble most is the one at QoS 0 through the embedded broker. Two more say what that owes to
//! the broker: the same at QoS 1, where chunks do not go round the router, and the same through rumqttd behind its own front.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rumqttc::{AsyncClient, Event, EventLoop, MqttOptions, Packet, Publish, QoS};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;

use super::role::{Order, Report};
use super::{Failure, Site};
use crate::transfer::GATHER_BYTES;
use crate::types::{PeerId, Round, host_and_port};

/// Messages that rumqttc holds ready.
const REQUESTS: usize = 16;

/// An end of the pipe.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PipeConfig {
    /// The broker between the ends, and the length of a chunk.
    pub site: Site,
    /// This end.
    pub peer: PeerId,
    /// How many bytes each sender sends.
    pub bytes: u64,
    /// How many ends send.
    pub senders: usize,
    /// How many receive, each everything.
    pub receivers: usize,
    /// At which QoS, 0 or 1.
    pub qos: u8,
}

impl PipeConfig {
    fn topic(&self, kind: &str, name: &str) -> String {
        let Site { prefix, federation, .. } = &self.site;
        format!("{prefix}/{federation}/{kind}/{name}")
    }

    fn chunks(&self) -> u64 {
        self.bytes.div_ceil(u64::from(self.site.chunk_bytes))
    }

    /// How many chunks one sender may have in flight.
    fn window(&self) -> u64 {
        window(self.site.chunk_bytes, self.senders)
    }

    async fn connect(&self, filter: &str) -> Result<Pipe, Failure> {
        let broker = &self.site.broker;
        let (host, port) = host_and_port(broker).ok_or_else(|| Failure::of(format!("{broker} is not HOST:PORT")))?;
        let id = format!("rodizio-{}-{}.pipe", self.site.federation, self.peer);
        let mut options = MqttOptions::new(id, host.trim_matches(['[', ']']), port);
        options.set_keep_alive(Duration::from_secs(60));
        let packet_bytes_max = self.site.packet_bytes_max();
        options.set_max_packet_size(packet_bytes_max, packet_bytes_max);
        let (requests, mut events) = AsyncClient::new(options, REQUESTS);
        events.network_options.set_tcp_nodelay(true);
        let qos = rumqttc::qos(self.qos).map_err(Failure::of)?;
        requests.subscribe(filter, qos).await.map_err(Failure::broker)?;
        while !matches!(events.poll().await.map_err(Failure::broker)?, Event::Incoming(Packet::SubAck(_))) {}
        let (sender, incoming) = unbounded_channel();
        let mut polling = JoinSet::new();
        polling.spawn(poll(events, sender));
        Ok(Pipe { requests, qos, incoming, _polling: polling })
    }
}

/// How many chunks each of so many senders may have in flight.
fn window(chunk_bytes: u32, senders: usize) -> u64 {
    (GATHER_BYTES / u64::from(chunk_bytes) / senders.max(1) as u64).max(2)
}

/// How many bytes so many senders together have in flight, at most.
pub(super) fn in_flight_bytes(chunk_bytes: u32, senders: usize) -> u64 {
    window(chunk_bytes, senders) * u64::from(chunk_bytes) * senders as u64
}

struct Pipe {
    requests: AsyncClient,
    qos: QoS,
    incoming: UnboundedReceiver<Result<Publish, Failure>>,
    /// Dropping it closes the connection.
    _polling: JoinSet<()>,
}

impl Pipe {
    async fn next(&mut self) -> Result<Publish, Failure> {
        self.incoming.recv().await.unwrap_or_else(|| Err(Failure::of("the connection has ended")))
    }

    async fn publish(&self, topic: &str, payload: Bytes) -> Result<(), Failure> {
        self.requests.publish_bytes(topic, self.qos, false, payload).await.map_err(Failure::broker)
    }
}

async fn poll(mut events: EventLoop, incoming: UnboundedSender<Result<Publish, Failure>>) {
    loop {
        let sent = match events.poll().await {
            Ok(Event::Incoming(Packet::Publish(publish))) => incoming.send(Ok(publish)),
            Ok(_) => Ok(()),
            Err(error) => {
                let _ = incoming.send(Err(Failure::broker(error)));
                return;
            }
        };
        if sent.is_err() {
            return;
        }
    }
}

/// Sends everything at each order to go, until `orders` end.
pub(super) async fn send(
    config: PipeConfig,
    mut orders: UnboundedReceiver<Order>,
    tell: &(dyn Fn(Report) + Sync),
) -> Result<(), Failure> {
    let blob = Bytes::from(vec![1u8; usize::try_from(config.bytes).map_err(Failure::of)?]);
    let mut pipe = config.connect(&config.topic("credit", config.peer.as_str())).await?;
    let topic = config.topic("pipe", config.peer.as_str());
    tell(Report::Ready(None));
    while let Some(order) = orders.recv().await {
        let Order::Go { round, .. } = order else { continue };
        let window = config.window();
        let mut credits = BTreeMap::new();
        for index in 0..config.chunks() {
            while credits.len() < config.receivers && index >= window
                || credits.values().min().is_some_and(|taken| index >= taken + window)
            {
                let credit = pipe.next().await?;
                if let Some((of, receiver, taken)) = parse_credit(&credit.payload)
                    && of == round
                {
                    credits.insert(receiver.to_owned(), taken);
                }
            }
            let start = usize::try_from(index * u64::from(config.site.chunk_bytes)).map_err(Failure::of)?;
            let end = blob.len().min(start + config.site.chunk_bytes as usize);
            pipe.publish(&topic, blob.slice(start..end)).await?;
        }
    }
    Ok(())
}

/// Receives what all senders send after each order to go, until `orders` end.
pub(super) async fn receive(
    config: PipeConfig,
    mut orders: UnboundedReceiver<Order>,
    tell: &(dyn Fn(Report) + Sync),
) -> Result<(), Failure> {
    let mut pipe = config.connect(&config.topic("pipe", "+")).await?;
    tell(Report::Ready(None));
    while let Some(order) = orders.recv().await {
        let Order::Go { round, .. } = order else { continue };
        tell(Report::Ready(None));
        let started = Instant::now();
        let mut left = config.bytes * config.senders as u64;
        // Said often enough that the sender need never stop.
        let every = (config.window() / 4).max(1);
        let mut taken: BTreeMap<String, u64> = BTreeMap::new();
        while left > 0 {
            let chunk = tokio::select! {
                chunk = pipe.next() => chunk?,
                order = orders.recv() => match order {
                    Some(_) => continue,
                    None => return Ok(()),
                },
            };
            left = left.saturating_sub(chunk.payload.len() as u64);
            let sender = chunk.topic.rsplit('/').next().unwrap_or_default();
            let taken = taken.entry(sender.to_owned()).or_default();
            *taken += 1;
            if taken.is_multiple_of(every) {
                let credit = format!("{round} {} {taken}", config.peer);
                pipe.publish(&config.topic("credit", sender), credit.into_bytes().into()).await?;
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        tell(Report::Done { pull: seconds, total: seconds });
    }
    Ok(())
}

/// The round, the receiver and how many chunks it has taken.
fn parse_credit(payload: &[u8]) -> Option<(Round, &str, u64)> {
    let mut words = std::str::from_utf8(payload).ok()?.split(' ');
    let (round, receiver, taken) = (words.next()?, words.next()?, words.next()?);
    Some((Round(round.parse().ok()?), receiver, taken.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credit_is_read_back_and_anything_else_is_none() {
        assert_eq!(parse_credit(b"3 receiver-1 16"), Some((Round(3), "receiver-1", 16)));
        for other in [&b""[..], b"3 receiver-1", b"x receiver-1 16", b"\xff"] {
            assert_eq!(parse_credit(other), None);
        }
    }
}
