//! What a broker can do, tried out before a peer relies on it.
//!
//! MQTT 3.1.1 has no way to ask, and brokers refuse in different ways: some close the connection, some acknowledge and
//! drop, some say nothing. So two short connections try it: the *ear* subscribes to a topic that only probes use, and
//! the *mouth* speaks to it and then dies. Whatever is tried is followed by a small message on the same way, so its
//! absence shows without a wait; only a broker that says nothing at all is waited for. One goes ahead, too, and is
//! waited for: where it is missing, the connection was lost, and nothing was refused.
//!
//! Each length has a mouth of its own, the longest first, down to one that passes: where a mouth was closed, nothing tells
//! how much of what it said before is still to come. Not even a message that the ear sends after it must come after it:
//! rumqttd takes all that a connection has sent when it turns to it for the first of that.
//!
//! ```text
//!  ear    retained message ─ subscribe ─ echo at QoS 1 ──── hears ──────────────────── hears ── clears the retained one
//!  mouth                                  connects with a last will, sends a chunk, breaks
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::iter;
use std::time::Duration;

use bytes::Bytes;
use rumqttc::{AsyncClient, ConnectionError, Event, LastWill, MqttOptions, Packet, Publish, QoS, SubscribeReasonCode};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::debug;

use super::{Broker, Lane, MqttConfig, SUBSCRIBE_ATTEMPTS, TransportError, WRITE_MAX, allow_bulk, refusal};
use crate::protocol::message::CHUNK_HEADER_BYTES_MAX;
use crate::transport::{Found, Retained};

/// Chunks are not cut below this, in bytes: a broker that takes no more is of no use.
pub const CHUNK_BYTES_FLOOR: usize = 16 << 10;

/// What is tried at least, in bytes, however short the chunks: the longest messages beside them are seldom longer.
const CHUNK_BYTES_TRIED: usize = 64 << 10;

/// What is tried beyond a chunk and its header: some brokers count the topic, and those of chunks are longer.
const MARGIN: usize = 256;

/// A peer's link moves so many bytes a second, or the probe gives up.
const LINK_BYTES_PER_SECOND: usize = 32 << 10;

/// How many round trips a broker may take for one answer.
const ROUND_TRIPS: u32 = 20;

/// Messages that a probe hands to rumqttc at once, at most.
const REQUESTS: usize = 4;

/// How a broker is tried before the first connection to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// A topic of this peer alone. Always the same one: rumqttd keeps a log for every filter that it ever saw.
    pub topic: String,
    /// The length of a chunk, in bytes, that the peer would like to use.
    pub chunk_bytes: usize,
    /// How long the broker may keep silent; longer where the link has long round trips.
    pub patience: Duration,
}

/// What a broker lacks that peers cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lack {
    /// It refuses or loses messages at QoS 1, or never acknowledges them.
    Qos1,
    /// It keeps a dead peer's last will to itself, or refuses connections that leave one.
    LastWill,
    /// Its limit on a message is too low: it does not take one of so many bytes.
    MessageBytes(usize),
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Qos1 => f.write_str("does not carry messages of QoS 1"),
            Self::LastWill => f.write_str("does not publish the last will of a connection that breaks"),
            Self::MessageBytes(bytes) => write!(f, "takes no message of {bytes} bytes, the least that peers need"),
        }
    }
}

/// Where each known broker limits the length of a message.
pub const MESSAGE_BYTES_SETTINGS: &str = "Mosquitto: message_size_limit; NATS: max_payload; RabbitMQ: max_message_size; \
     EMQX: mqtt.max_packet_size; HiveMQ: mqtt/packets/max-packet-size; VerneMQ: max_message_size; rodizio broker: \
     chunk_bytes";

impl Lack {
    /// What to change at the broker, by the names of its settings.
    pub fn hint(self) -> String {
        match self {
            Self::Qos1 => "allow QoS 1 there (Mosquitto: max_qos; EMQX: mqtt.max_qos_allowed; HiveMQ: \
                           mqtt/quality-of-service/max-qos) and let peers publish and subscribe below --prefix \
                           (Mosquitto: acl_file; NATS: permissions; RabbitMQ: topic permissions; EMQX: authorization; \
                           VerneMQ: vmq_acl)"
                .to_owned(),
            Self::LastWill => "let peers publish below --prefix also by their last will (Mosquitto: acl_file; NATS: \
                               permissions; RabbitMQ: topic permissions; EMQX: authorization; VerneMQ: vmq_acl)"
                .to_owned(),
            Self::MessageBytes(_) => {
                format!("raise the limit there to 2 x chunk_bytes + 64 KiB ({MESSAGE_BYTES_SETTINGS})")
            }
        }
    }
}

/// What was found, by address: each broker is tried once in the life of a transport.
#[derive(Debug, Default)]
pub(super) struct Probed(BTreeMap<String, Found>);

impl Probed {
    /// What the broker can do; `None` if the peer does not ask.
    ///
    /// `step` is how long the broker may take to let a connection in.
    pub(super) async fn of(
        &mut self,
        config: &MqttConfig,
        broker: &Broker,
        step: Duration,
    ) -> Result<Option<Found>, Failed> {
        let Some(probe) = &config.probe else { return Ok(None) };
        let address = broker.to_string();
        if let Some(found) = self.0.get(&address) {
            return Ok(Some(found.clone()));
        }
        let found = Prober { config, probe, broker, step }.run().await?;
        debug!(address, ?found, "probed");
        self.0.insert(address, found.clone());
        Ok(Some(found))
    }
}

/// Why nothing was found.
#[derive(Debug)]
pub(super) enum Failed {
    /// It cannot be used as it is.
    Unfit(TransportError),
    /// It was not reached, or lost; why, for people.
    Unreachable(String),
}

impl From<Lost> for Failed {
    fn from(lost: Lost) -> Self {
        match lost {
            Lost::Closed(error) => Self::Unreachable(super::reason(&error)),
            Lost::Silent => Self::Unreachable("no answer to what was tried".to_owned()),
        }
    }
}

/// How a wait for a broker's answer can end without it.
#[derive(Debug)]
enum Lost {
    Closed(ConnectionError),
    Silent,
}

struct Prober<'a> {
    config: &'a MqttConfig,
    probe: &'a Probe,
    broker: &'a Broker,
    /// How long the broker may take to let a connection in.
    step: Duration,
}

impl Prober<'_> {
    async fn run(&self) -> Result<Found, Failed> {
        let started = Instant::now();
        let mut ear = self.connect("probe", None).await.map_err(|error| self.not_let_in(error))?;
        // TCP's and MQTT's handshake: two round trips.
        let patience = self.probe.patience.max(started.elapsed() * ROUND_TRIPS / 2);
        let retained_refused = self.leave_retained(&mut ear, patience).await?;
        if retained_refused {
            ear = self.connect("probe", None).await.map_err(|error| self.not_let_in(error))?;
        }
        self.try_qos1(&mut ear, patience).await?;

        let wanted = self.probe.chunk_bytes.max(CHUNK_BYTES_TRIED);
        let mut lengths = lengths(wanted);
        let taken = loop {
            match lengths.next() {
                Some(chunk) if self.passes(&mut ear, chunk, patience).await? => break chunk,
                Some(_) => {}
                None => return Err(self.lacks(Lack::MessageBytes(message_bytes(CHUNK_BYTES_FLOOR)))),
            }
        };
        let retained = match retained_refused {
            true => Retained::Refused,
            false if ear.has_heard(ear.tag, Mark::Retained) => Retained::Kept,
            false => Retained::Missing,
        };
        if !retained_refused {
            self.clear(&mut ear, patience).await;
        }
        let took = started.elapsed();
        let limit = (taken < wanted).then_some(taken);
        Ok(Found { message_bytes: taken + CHUNK_HEADER_BYTES_MAX, chunk_bytes_max: limit, retained, took })
    }

    /// Publishes the message that is to be kept. Whether the broker closes the connection for it.
    async fn leave_retained(&self, ear: &mut Side, patience: Duration) -> Result<bool, Failed> {
        ear.publish(&self.probe.topic, QoS::AtLeastOnce, true, ear.tag.payload(Mark::Retained, 0));
        match ear.until(patience, |ear| ear.acks == 1).await {
            Ok(()) => Ok(false),
            // It may be QoS 1 that is refused. That shows next.
            Err(Lost::Closed(_)) => Ok(true),
            Err(Lost::Silent) => Err(self.lacks(Lack::Qos1)),
        }
    }

    async fn try_qos1(&self, ear: &mut Side, patience: Duration) -> Result<(), Failed> {
        for _ in 0..SUBSCRIBE_ATTEMPTS {
            ear.granted = None;
            let _ = ear.requests.try_subscribe(&self.probe.topic, QoS::AtLeastOnce);
            ear.until(patience, |ear| ear.granted.is_some()).await?;
            if ear.granted != Some(SubscribeReasonCode::Failure) {
                break;
            }
        }
        match ear.granted {
            Some(SubscribeReasonCode::Success(QoS::AtMostOnce)) => return Err(self.lacks(Lack::Qos1)),
            Some(SubscribeReasonCode::Failure) => {
                let (broker, filters) = (self.broker.to_string(), self.probe.topic.clone());
                return Err(Failed::Unfit(TransportError::Subscription { broker, filters }));
            }
            _ => {}
        }
        let acks = ear.acks + 1;
        ear.publish(&self.probe.topic, QoS::AtLeastOnce, false, ear.tag.payload(Mark::Echo, 0));
        let echoed = |ear: &Side| ear.acks == acks && ear.has_heard(ear.tag, Mark::Echo);
        ear.until(patience, echoed).await.map_err(|_| self.lacks(Lack::Qos1))
    }

    /// A mouth sends a chunk of this length, and dies. Whether the ear hears it.
    async fn passes(&self, ear: &mut Side, chunk: usize, patience: Duration) -> Result<bool, Failed> {
        let tag = Tag::new();
        let mut mouth = self.open_mouth(tag).await?;
        mouth.publish(&self.probe.topic, QoS::AtMostOnce, false, tag.payload(Mark::Begin, 0));
        tokio::select! {
            begun = ear.until(patience, |ear| ear.has_heard(tag, Mark::Begin)) => begun?,
            () = mouth.closed() => {
                return Err(Failed::Unreachable("the connection was lost before anything was tried".to_owned()));
            }
        }
        let payload = tag.payload(Mark::Chunk, message_bytes(chunk) + MARGIN);
        mouth.publish(&self.probe.topic, QoS::AtMostOnce, false, payload);
        mouth.publish(&self.probe.topic, QoS::AtMostOnce, false, tag.payload(Mark::End, 0));

        let patience_for_all = patience + Duration::from_secs((chunk / LINK_BYTES_PER_SECOND) as u64);
        tokio::select! {
            // Silent: a broker that drops the rest of a connection says so by its last will at the latest.
            ended = ear.until(patience_for_all, |ear| ear.has_heard(tag, Mark::End)) => match ended {
                Ok(()) | Err(Lost::Silent) => {}
                Err(lost) => return Err(lost.into()),
            },
            // A mouth that the broker closed may leave no last will (RabbitMQ). One that says no more than passes must.
            () = mouth.closed() => return Ok(false),
        }
        drop(mouth);
        ear.until(patience, |ear| ear.has_heard(tag, Mark::Will)).await.map_err(|lost| match lost {
            Lost::Silent => self.lacks(Lack::LastWill),
            lost => lost.into(),
        })?;
        Ok(ear.has_heard(tag, Mark::Chunk))
    }

    async fn open_mouth(&self, tag: Tag) -> Result<Side, Failed> {
        const NAME: &str = "probe.will";
        let will = tag.payload(Mark::Will, 0).to_vec();
        let will = LastWill::new(&self.probe.topic, will, QoS::AtLeastOnce, false);
        match self.connect(NAME, Some(will)).await {
            Ok(mouth) => Ok(mouth),
            Err(_) if self.connect(NAME, None).await.is_ok() => Err(self.lacks(Lack::LastWill)),
            Err(error) => Err(self.not_let_in(error)),
        }
    }

    /// An empty message takes the place of the one that is kept. If it does not, that one is small and does no harm.
    async fn clear(&self, ear: &mut Side, patience: Duration) {
        let acks = ear.acks + 1;
        ear.publish(&self.probe.topic, QoS::AtLeastOnce, true, Bytes::new());
        if let Err(error) = ear.until(patience, |ear| ear.acks == acks).await {
            debug!(?error, "the probe's retained message may stay");
        }
    }

    async fn connect(&self, name: &str, will: Option<LastWill>) -> Result<Side, Lost> {
        let mut options = self.config.named_options(name, self.broker);
        let packet_bytes_max = self.probe.chunk_bytes.max(CHUNK_BYTES_TRIED) + (64 << 10);
        options.set_max_packet_size(packet_bytes_max, packet_bytes_max);
        // One message as long as a chunk goes both ways. Whether the broker is silent is for the waits to say.
        allow_bulk(&mut options);
        if let Some(will) = will {
            options.set_last_will(will);
        }
        match timeout(self.step, Side::open(options)).await {
            Ok(side) => side.map_err(Lost::Closed),
            Err(_) => Err(Lost::Closed(ConnectionError::NetworkTimeout)),
        }
    }

    fn not_let_in(&self, lost: Lost) -> Failed {
        match lost {
            Lost::Closed(ConnectionError::ConnectionRefused(code)) => Failed::Unfit(refusal(self.broker, code)),
            lost => lost.into(),
        }
    }

    fn lacks(&self, lack: Lack) -> Failed {
        Failed::Unfit(TransportError::Lacks { broker: self.broker.to_string(), lack })
    }
}

/// The longest message that a chunk of this length makes.
fn message_bytes(chunk_bytes: usize) -> usize {
    chunk_bytes + CHUNK_HEADER_BYTES_MAX
}

/// A chunk's length, half of it, a quarter and so on, down to the floor.
fn lengths(chunk_bytes: usize) -> impl Iterator<Item = usize> {
    let halves = iter::successors(Some(chunk_bytes), |length| Some(length / 2));
    halves.take_while(|&length| length >= CHUNK_BYTES_FLOOR)
}

/// What a message of a probe is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Mark {
    Retained = 1,
    Echo = 2,
    Begin = 3,
    Chunk = 4,
    End = 5,
    Will = 6,
}

/// Tells a probe's messages from those of an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tag(u64);

impl Tag {
    const BYTES: usize = size_of::<u64>();

    fn new() -> Self {
        Self(rand::random())
    }

    /// A message of this tag, with zeros up to `length`.
    fn payload(self, mark: Mark, length: usize) -> Bytes {
        let mut payload = self.0.to_be_bytes().to_vec();
        payload.push(mark as u8);
        payload.resize(length.max(payload.len()), 0);
        payload.into()
    }
}

/// A message that the ear heard.
#[derive(Clone, Copy, Debug)]
struct Heard {
    of: Tag,
    mark: Mark,
}

impl Heard {
    /// Messages of an earlier probe are recognised by their tag, and what is no probe's message is not looked at.
    fn read(publish: &Publish) -> Option<Self> {
        let (tag, rest) = publish.payload.split_first_chunk::<{ Tag::BYTES }>()?;
        let all = [Mark::Retained, Mark::Echo, Mark::Begin, Mark::Chunk, Mark::End, Mark::Will];
        let mark = all.into_iter().find(|&mark| Some(&(mark as u8)) == rest.first())?;
        Some(Self { of: Tag(u64::from_be_bytes(*tag)), mark })
    }
}

/// One of the two connections. Dropping it breaks it without a goodbye.
struct Side {
    requests: AsyncClient,
    packets: UnboundedReceiver<Result<Packet, ConnectionError>>,
    /// The task that polls rumqttc, which is not to be interrupted.
    _polling: JoinSet<()>,
    tag: Tag,
    acks: usize,
    granted: Option<SubscribeReasonCode>,
    heard: Vec<Heard>,
}

impl Side {
    async fn open(options: MqttOptions) -> Result<Self, ConnectionError> {
        let (requests, mut events) = AsyncClient::new(options, REQUESTS);
        events.network_options.set_tcp_nodelay(true);
        events.network_options.set_connection_timeout(WRITE_MAX[Lane::Bulk as usize].as_secs());
        events.poll().await?;
        let (sender, packets) = unbounded_channel();
        let mut polling = JoinSet::new();
        polling.spawn(async move {
            loop {
                let packet = match events.poll().await {
                    Ok(Event::Incoming(packet)) => Ok(packet),
                    Ok(Event::Outgoing(_)) => continue,
                    Err(error) => Err(error),
                };
                let ended = packet.is_err();
                if sender.send(packet).is_err() || ended {
                    return;
                }
            }
        });
        let tag = Tag::new();
        Ok(Self { requests, packets, _polling: polling, tag, acks: 0, granted: None, heard: Vec::new() })
    }

    fn has_heard(&self, tag: Tag, mark: Mark) -> bool {
        self.heard.iter().any(|heard| heard.of == tag && heard.mark == mark)
    }

    /// Hands a message over. An error would say that the connection has ended, which the next wait tells.
    fn publish(&self, topic: &str, qos: QoS, retain: bool, payload: Bytes) {
        let _ = self.requests.try_publish(topic, qos, retain, payload);
    }

    /// Takes what comes until it is enough. `patience` is for all of it.
    async fn until(&mut self, patience: Duration, enough: impl Fn(&Self) -> bool) -> Result<(), Lost> {
        let ends = Instant::now() + patience;
        while !enough(self) {
            let packet = timeout_at(ends, self.packets.recv()).await.map_err(|_| Lost::Silent)?;
            match packet.unwrap_or(Err(ConnectionError::RequestsDone)).map_err(Lost::Closed)? {
                Packet::PubAck(_) => self.acks += 1,
                Packet::SubAck(ack) => self.granted = ack.return_codes.first().copied(),
                Packet::Publish(publish) => self.heard.extend(Heard::read(&publish)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Waits until the broker closes the connection.
    async fn closed(&mut self) {
        while let Some(Ok(_)) = self.packets.recv().await {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use bytes::BytesMut;
    use rumqttc::{ConnAck, ConnectReturnCode, PubAck, SubAck};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::mpsc::UnboundedSender;
    use tokio::time::sleep;

    use super::*;
    use crate::broker::{self, BrokerConfig};
    use crate::transport::tests::mqtt_config;

    const CHUNK: usize = 512 << 10;

    /// A busy machine is not to make a broker seem silent.
    const PATIENCE: Duration = Duration::from_secs(10);

    /// A broker with one topic, and with as many faults as a test wants.
    #[derive(Clone, Debug)]
    struct Fake {
        qos: QoS,
        acknowledges: bool,
        wills: bool,
        refuses_wills: bool,
        /// Whether it lets who leaves a last will in, and closes it at once.
        loses_mouths: bool,
        keeps: bool,
        refuses_retain: bool,
        message_bytes_max: usize,
        /// Whether who sends a longer one is closed; else it is dropped without a word.
        closes: bool,
        /// How long every packet takes.
        delay: Duration,
        /// How much later than its answer a message reaches subscribers.
        lag: Duration,
        /// How long it is waited for: short for those that are to be found silent.
        patience: Duration,
    }

    impl Default for Fake {
        fn default() -> Self {
            Self {
                qos: QoS::AtLeastOnce,
                acknowledges: true,
                wills: true,
                refuses_wills: false,
                loses_mouths: false,
                keeps: true,
                refuses_retain: false,
                message_bytes_max: usize::MAX,
                closes: true,
                delay: Duration::ZERO,
                lag: Duration::ZERO,
                patience: PATIENCE,
            }
        }
    }

    #[derive(Default)]
    struct Topic {
        subscribers: Vec<UnboundedSender<Publish>>,
        kept: Option<Publish>,
    }

    impl Topic {
        fn publish(&mut self, publish: &Publish) {
            self.subscribers.retain(|subscriber| subscriber.send(publish.clone()).is_ok());
        }
    }

    impl Fake {
        async fn serve(self, listener: TcpListener) {
            let topic = Arc::new(Mutex::new(Topic::default()));
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                tokio::spawn(self.clone().converse(socket, topic.clone()));
            }
        }

        /// `None` when the connection ends.
        async fn converse(self, mut socket: TcpStream, topic: Arc<Mutex<Topic>>) -> Option<()> {
            let mut received = BytesMut::new();
            let Packet::Connect(connect) = receive(&mut socket, &mut received).await? else { return None };
            sleep(self.delay).await;
            if self.refuses_wills && connect.last_will.is_some() {
                return None;
            }
            send(&mut socket, &Packet::ConnAck(ConnAck::new(ConnectReturnCode::Success, false))).await;
            if self.loses_mouths && connect.last_will.is_some() {
                return None;
            }
            let (to_me, mut for_me) = unbounded_channel();
            let (to_all, mut for_all) = unbounded_channel();
            let subscribed = topic.clone();
            tokio::spawn(async move {
                while let Some(publish) = for_all.recv().await {
                    sleep(self.lag).await;
                    subscribed.lock().unwrap().publish(&publish);
                }
            });
            let refused = loop {
                let packet = tokio::select! {
                    // An interrupted read keeps what it has in `received`.
                    packet = receive(&mut socket, &mut received) => packet,
                    Some(publish) = for_me.recv() => {
                        send(&mut socket, &Packet::Publish(publish)).await;
                        continue;
                    }
                };
                sleep(self.delay).await;
                let Some(packet) = packet else { break false };
                let Some(answer) = self.answer(packet, &topic, &to_me, &to_all) else { break true };
                for packet in answer {
                    send(&mut socket, &packet).await;
                }
            };
            // Like RabbitMQ, which forgets the last will of who says too much.
            if let Some(will) = connect.last_will.filter(|_| self.wills && !refused) {
                let _ = to_all.send(Publish::new(will.topic, QoS::AtMostOnce, will.message));
            }
            None
        }

        fn answer(
            &self,
            packet: Packet,
            topic: &Mutex<Topic>,
            to_me: &UnboundedSender<Publish>,
            to_all: &UnboundedSender<Publish>,
        ) -> Option<Vec<Packet>> {
            let mut topic = topic.lock().unwrap();
            match packet {
                Packet::Subscribe(subscribe) => {
                    let granted = vec![SubscribeReasonCode::Success(self.qos)];
                    topic.subscribers.push(to_me.clone());
                    topic.kept.iter().for_each(|kept| to_me.send(Publish { retain: true, ..kept.clone() }).unwrap());
                    Some(vec![Packet::SubAck(SubAck::new(subscribe.pkid, granted))])
                }
                Packet::Publish(publish) => {
                    let too_long = publish.payload.len() > self.message_bytes_max;
                    if publish.retain && self.refuses_retain || too_long && self.closes {
                        return None;
                    }
                    let plain = Publish { qos: QoS::AtMostOnce, pkid: 0, retain: false, ..publish.clone() };
                    if !too_long {
                        let _ = to_all.send(plain.clone());
                    }
                    if publish.retain && self.keeps {
                        topic.kept = Some(plain);
                    }
                    let acknowledged = self.acknowledges && publish.qos == QoS::AtLeastOnce;
                    Some(acknowledged.then(|| Packet::PubAck(PubAck::new(publish.pkid))).into_iter().collect())
                }
                _ => Some(Vec::new()),
            }
        }

        async fn probe(self) -> Result<Found, String> {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let addr = listener.local_addr().unwrap();
            let patience = self.patience;
            let serving = tokio::spawn(self.serve(listener));
            let found = probe(&addr.to_string(), patience).await;
            serving.abort();
            found.map_err(|error| error.replace(&addr.to_string(), "ADDR"))
        }
    }

    async fn receive(socket: &mut TcpStream, received: &mut BytesMut) -> Option<Packet> {
        loop {
            if let Ok(packet) = Packet::read(received, usize::MAX) {
                return Some(packet);
            }
            if socket.read_buf(received).await.ok()? == 0 {
                return None;
            }
        }
    }

    /// An error shows at the next read.
    async fn send(socket: &mut TcpStream, packet: &Packet) {
        let mut bytes = BytesMut::new();
        packet.write(&mut bytes, usize::MAX).unwrap();
        let _ = socket.write_all(&bytes).await;
    }

    async fn probe(address: &str, patience: Duration) -> Result<Found, String> {
        let broker = broker::Broker::start(BrokerConfig::default()).await.unwrap();
        let mut config = mqtt_config(&broker, "a", None);
        config.keep_alive = Duration::from_secs(1);
        config.probe = Some(Probe { topic: "t/probe/a".to_owned(), chunk_bytes: CHUNK, patience });
        let there = super::super::parse_broker(address).unwrap();
        let found = Probed::default().of(&config, &there, Duration::from_secs(5)).await;
        found.map(Option::unwrap).map_err(|failed| match failed {
            Failed::Unfit(error) => error.to_string(),
            Failed::Unreachable(why) => format!("unreachable: {why}"),
        })
    }

    #[tokio::test]
    async fn a_broker_that_can_do_everything_is_found_to_be_so() {
        let found = Fake::default().probe().await.unwrap();
        assert_eq!((found.message_bytes, found.chunk_bytes_max), (CHUNK + CHUNK_HEADER_BYTES_MAX, None));
        assert_eq!(found.retained, Retained::Kept);
    }

    #[tokio::test]
    async fn the_longest_chunk_is_found_whether_longer_ones_are_dropped_or_close_the_connection() {
        for closes in [false, true] {
            for (limit, chunk) in [(300_000, 256 << 10), (65_536, 32 << 10), (20_000, 16 << 10)] {
                let found = Fake { message_bytes_max: limit, closes, ..Fake::default() }.probe().await.unwrap();
                assert_eq!(found.chunk_bytes_max, Some(chunk), "limit {limit}, closes: {closes}");
                assert!(found.message_bytes <= limit);
            }
            let error = Fake { message_bytes_max: 10_000, closes, ..Fake::default() }.probe().await.unwrap_err();
            assert_eq!(error, "the broker at ADDR takes no message of 16640 bytes, the least that peers need");
        }
    }

    #[tokio::test]
    async fn a_broker_without_retained_messages_will_do() {
        let found = Fake { keeps: false, ..Fake::default() }.probe().await.unwrap();
        assert_eq!(found.retained, Retained::Missing);
        let found = Fake { refuses_retain: true, ..Fake::default() }.probe().await.unwrap();
        assert_eq!(found.retained, Retained::Refused);
    }

    #[tokio::test]
    async fn a_broker_without_qos_1_is_named() {
        let silent = Fake { acknowledges: false, patience: Duration::from_millis(300), ..Fake::default() };
        let less = Fake { qos: QoS::AtMostOnce, ..Fake::default() };
        for fake in [silent, less] {
            assert_eq!(fake.probe().await.unwrap_err(), "the broker at ADDR does not carry messages of QoS 1");
        }
    }

    #[tokio::test]
    async fn a_broker_without_last_wills_is_named() {
        // Only the last thing of all does not come.
        let mute = Fake { wills: false, patience: Duration::from_secs(3), ..Fake::default() };
        let strict = Fake { refuses_wills: true, ..Fake::default() };
        for fake in [mute, strict] {
            let expected = "the broker at ADDR does not publish the last will of a connection that breaks";
            assert_eq!(fake.probe().await.unwrap_err(), expected);
        }
    }

    #[tokio::test]
    async fn a_connection_that_is_lost_is_not_taken_for_a_refusal() {
        let error = Fake { loses_mouths: true, ..Fake::default() }.probe().await.unwrap_err();
        assert_eq!(error, "unreachable: the connection was lost before anything was tried");
    }

    /// A message of the ear may overtake what a mouth said before it was closed, as with rumqttd.
    #[tokio::test]
    async fn what_comes_late_of_a_closed_mouth_is_not_taken_for_refused() {
        let late = Fake { message_bytes_max: 65_536, lag: Duration::from_millis(20), ..Fake::default() };
        assert_eq!(late.probe().await.unwrap().chunk_bytes_max, Some(32 << 10));
    }

    /// Every answer takes longer than the patience for a quick link, and that to a ping longer than its interval.
    #[tokio::test]
    async fn a_slow_link_is_given_its_time() {
        let patience = Duration::from_millis(300);
        let slow = Fake { delay: Duration::from_millis(700), patience, ..Fake::default() };
        let found = slow.probe().await.unwrap();
        assert_eq!((found.chunk_bytes_max, found.retained), (None, Retained::Kept));
        assert!(found.took > Duration::from_millis(2400), "{found:?}");
    }

    #[tokio::test]
    async fn the_embedded_broker_is_tried_and_left_clean() {
        let config = BrokerConfig { packet_bytes_max: 200_000, ..BrokerConfig::default() };
        let broker = broker::Broker::start(config).await.unwrap();
        for _ in 0..2 {
            let found = probe(&broker.addr().to_string(), PATIENCE).await.unwrap();
            assert_eq!((found.chunk_bytes_max, found.retained), (Some(128 << 10), Retained::Kept));
        }
        broker.deserted().await;
    }

    #[test]
    fn lengths_go_down_to_the_floor() {
        assert_eq!(lengths(CHUNK_BYTES_TRIED).collect::<Vec<_>>(), [64 << 10, 32 << 10, 16 << 10]);
        assert_eq!(lengths(100_000).collect::<Vec<_>>(), [100_000, 50_000, 25_000]);
    }

    #[test]
    fn every_hint_names_settings() {
        assert!(Lack::Qos1.hint().contains("max_qos"));
        assert!(Lack::LastWill.hint().contains("--prefix"));
        let hint = Lack::MessageBytes(1).hint();
        for setting in ["message_size_limit", "max_payload", "max_message_size", "max_packet_size", "chunk_bytes"] {
            assert!(hint.contains(setting), "{hint}");
        }
    }
}
