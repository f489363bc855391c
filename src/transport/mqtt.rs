//! Messages through an MQTT broker.
//!
//! A peer has two connections to one broker: *control*, which carries its last will, and *bulk* for weights, so that
//! keepalive and ballots get through while gigabytes move. They live and die together, as a `Pair`. A task drives
//! the pairs one after another; each connection has a task of its own inside it. In that of control rumqttc's event loop
//! is polled and never interrupted (it loses packets when it is) beside the loop that feeds it; bulk is driven without it
//! (`bulk.rs`). What a broker can do is tried before the first pair ([`probe`]).

mod answers;
mod bulk;
mod pieces;
pub mod probe;
mod pulse;

use std::convert::Infallible;
use std::fmt;
use std::future::pending;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use rumqttc::mqttbytes::Error as CodecError;
use rumqttc::{
    AsyncClient, ClientError, ConnectReturnCode, ConnectionError, Event, EventLoop, LastWill, MqttOptions, Packet, QoS,
    StateError, SubAck, SubscribeFilter, SubscribeReasonCode,
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, error};

use answers::{Answers, Patience};
use bulk::Bulk;
use pieces::Joiner;
use probe::{Failed, Lack, Probe, Probed};
use pulse::{Pulse, Stopped};

use super::{Class, Found, Outgoing, Retained, Transport, TransportEvent, Will};
use crate::types::PeerId;

/// So many passes over the list of brokers are made at least, when a peer starts: an answer may be lost.
const PASSES_MIN: u32 = 3;

/// The pause between two passes over the list of brokers; it doubles with each one that fails. There is none before the
/// first.
const PAUSE_MIN: Duration = Duration::from_millis(100);

/// The longest such pause. A connection that lived this long starts again with the shortest.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// Of two peers of one name each has the broker close the connection of the other, and connects again after its pause. So many
/// connections in a row that were so short are worth a question.
const BRIEF: Duration = Duration::from_secs(2 * PAUSE_MAX.as_secs());
const BRIEF_MANY: u32 = 4;

/// How long the broker may take to acknowledge what was sent, when the transport stops. Tests wait on busy machines.
const FLUSH_MAX: Duration = Duration::from_secs(if cfg!(test) { 40 } else { 2 });

/// How long stopping may take in all.
const STOP_MAX: Duration = Duration::from_secs(if cfg!(test) { 60 } else { 3 });

/// How long one write may be stuck on the control connection, and on the bulk one, where a slow line takes its time
/// for a chunk.
const WRITE_MAX: [Duration; 2] = [Duration::from_secs(10), Duration::from_secs(60)];

/// Bulk pings are answered behind the chunks on their way. That a peer is dead shows on its control connection.
const BULK_KEEP_ALIVE_MIN: Duration = Duration::from_secs(30);

/// How often a filter is asked for. A NATS cluster that has lost a server refuses one of three, at random and after some
/// seconds, because it gave the dead server the lead of it.
const SUBSCRIBE_ATTEMPTS: usize = 8;

/// Messages that rumqttc holds ready; the rest waits, uncopied, in the queue before it.
const REQUESTS: usize = 4;

/// What may wait for the node, in bytes. More is dropped, to be asked for again.
const WAITING_BYTES_MAX: usize = 64 << 20;

/// What a waiting message costs beside its payload.
const MESSAGE_BYTES: usize = 256;

/// What a packet holds beside its topic and its payload: type, lengths and id.
const PACKET_OVERHEAD: usize = 9;

/// How a peer reaches its brokers, and what it wants to hear.
#[derive(Clone, Debug)]
pub struct MqttConfig {
    /// Where brokers are, as `host:port`, the best one first.
    ///
    /// They are tried in this order, so that peers who share the list meet at the first one that all of them reach. Only
    /// after the loss of a connection the same broker comes first, once: a hiccup is not to move anybody.
    pub brokers: Vec<String>,

    /// The federation's name: part of the connections' names at the broker.
    pub federation: String,

    /// This peer. The second transport of a peer throws the first one out.
    pub peer: PeerId,

    /// How often the control connection shows that it lives, in whole seconds from 1 on. The broker declares the peer
    /// dead after one and a half times this.
    pub keep_alive: Duration,

    /// The longest packet in either direction, in bytes: the broker's
    /// [`packet_bytes_max`](crate::broker::BrokerConfig::packet_bytes_max).
    pub packet_bytes_max: usize,

    /// What the broker publishes when this peer goes without a goodbye.
    pub will: Option<Will>,

    /// Filters for messages of the protocol. No two filters may match one topic: it would come twice.
    pub control_filters: Vec<String>,

    /// Filters for weights.
    pub bulk_filters: Vec<String>,

    /// Whether to subscribe to the control filters only after the first message is acknowledged. True for peers: the
    /// message is their hello. False for who only listens.
    pub hello_first: bool,

    /// What to try before the first connection to a broker; nothing where its limits are known.
    pub probe: Option<Probe>,
}

impl MqttConfig {
    fn control_options(&self, broker: &Broker, limits: Limits) -> MqttOptions {
        let mut options = self.named_options("", broker);
        if let Some(will) = &self.will {
            let retain = will.retain && limits.retain;
            options.set_last_will(LastWill::new(&will.topic, will.payload.to_vec(), QoS::AtLeastOnce, retain));
        }
        options
    }

    fn bulk_options(&self, broker: &Broker) -> MqttOptions {
        let mut options = self.named_options("bulk", broker);
        allow_bulk(&mut options);
        options
    }

    /// Options of a connection of this peer; all but the first have a name.
    fn named_options(&self, name: &str, broker: &Broker) -> MqttOptions {
        let dot = if name.is_empty() { "" } else { "." };
        let id = format!("rodizio-{}-{}{dot}{name}", self.federation, self.peer);
        let mut options = MqttOptions::new(id, &broker.host, broker.port);
        options.set_keep_alive(Duration::from_secs(self.keep_alive.as_secs().clamp(1, u16::MAX.into())));
        options.set_max_packet_size(self.packet_bytes_max, self.packet_bytes_max);
        options
    }
}

/// Why no broker was reached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// The list of brokers is empty.
    #[error("no broker's address is given")]
    NoAddress,
    /// An address that is none.
    #[error("broker address {0:?} is not host:port")]
    Address(String),
    /// None of the brokers answers. Says what came of each.
    #[error("no broker answers at {0}")]
    Unreachable(String),
    /// A broker answers and refuses the connection.
    #[error("the broker at {broker} refuses the connection: {reason} (code {code})")]
    Refused {
        /// Its address.
        broker: String,
        /// The return code of MQTT 3.1.1.
        code: u8,
        /// What the code means.
        reason: &'static str,
    },
    /// A broker takes the connection and refuses what this peer must hear.
    #[error("the broker at {broker} refuses to subscribe this peer to {filters}")]
    Subscription {
        /// Its address.
        broker: String,
        /// The filters, of which it refuses at least one.
        filters: String,
    },
    /// A broker cannot do what peers need, as it is set up.
    #[error("the broker at {broker} {lack}")]
    Lacks {
        /// Its address.
        broker: String,
        /// What is missing.
        lack: Lack,
    },
}

/// A transport through one MQTT broker at a time.
pub struct MqttTransport {
    reports: UnboundedReceiver<Report>,
    /// The way out, from `Connected` to `Disconnected`: as the node sees it, so that what it sends to a connection
    /// that has broken does not end up in the next one.
    orders: Option<Lanes<UnboundedSender<Order>>>,
    course: watch::Sender<Course>,
    packet_bytes_max: usize,
    /// The one task that drives the pairs. Dropping it ends everything at once.
    driver: JoinSet<()>,
}

impl MqttTransport {
    /// Connects to the first broker that answers. Goes on trying until `patience` is over, and tries each three times at
    /// least. From then on the transport connects again by itself.
    ///
    /// # Errors
    /// When no broker lets both connections in, or an address cannot be read.
    pub async fn connect(config: MqttConfig, patience: Duration) -> Result<Self, TransportError> {
        let brokers = parse_brokers(&config.brokers)?;
        let patience_ends = Instant::now() + patience;
        let mut pause = PAUSE_MIN;
        let mut probed = Probed::default();
        let mut pass = 0;
        let pair = loop {
            match Pair::connect(&config, &brokers, pass, &mut probed).await {
                Ok(pair) => break pair,
                Err(
                    error @ (TransportError::Refused { .. }
                    | TransportError::Subscription { .. }
                    | TransportError::Lacks { .. }),
                ) => return Err(error),
                Err(error) if pass + 1 >= PASSES_MIN && Instant::now() + pause > patience_ends => return Err(error),
                Err(_) => sleep(pause).await,
            }
            pause = longer(pause);
            pass += 1;
        };
        let packet_bytes_max = config.packet_bytes_max;
        let (sender, reports) = unbounded_channel();
        let mut driver = JoinSet::new();
        let (course, steering) = watch::channel(Course { brokers, moves: 0 });
        driver.spawn(drive(config, steering, pair, probed, sender));
        Ok(Self { reports, orders: None, course, packet_bytes_max, driver })
    }

    /// Takes note of what a report says and turns it into what the node sees.
    fn take(&mut self, report: Report) -> TransportEvent {
        match report {
            Report::Connected { broker, found, orders } => {
                self.orders = Some(orders);
                TransportEvent::Connected { broker, found }
            }
            Report::Disconnected { reason } => {
                self.orders = None;
                TransportEvent::Disconnected { reason }
            }
            Report::Moving { broker } => {
                self.orders = None;
                TransportEvent::Moving { broker }
            }
            Report::Message { topic, payload, .. } => TransportEvent::Message { topic, payload },
        }
    }
}

impl Transport for MqttTransport {
    async fn next(&mut self) -> TransportEvent {
        let report = self.reports.recv().await.expect("the driver only ends when the transport does");
        self.take(report)
    }

    fn send(&mut self, message: Outgoing) {
        let bytes = message.topic.len() + message.len() + PACKET_OVERHEAD;
        if bytes > self.packet_bytes_max {
            // Sent, it would break the connection, and the protocol would send it again.
            error!(topic = message.topic, bytes, max = self.packet_bytes_max, "a message is too long for the broker");
            return;
        }
        if let Some(orders) = &self.orders {
            // An error says that the connection has broken; the report of it is on its way.
            let _ = orders.of(message.class.into()).send(Order::Publish(message));
        }
    }

    fn set_brokers(&mut self, brokers: Vec<String>) {
        match parse_brokers(&brokers) {
            Ok(brokers) => self.course.send_modify(|course| course.brokers = brokers),
            Err(error) => error!(%error, "the list of brokers stays as it was"),
        }
    }

    fn move_on(&mut self) {
        self.course.send_modify(|course| course.moves += 1);
    }

    async fn stop(mut self) {
        while let Ok(report) = self.reports.try_recv() {
            self.take(report);
        }
        self.reports.close();
        let Some(orders) = self.orders.take() else { return };
        let stopping = [Lane::Control, Lane::Bulk].map(|lane| orders.of(lane).send(Order::Stop).is_ok());
        if stopping.contains(&true) && timeout(STOP_MAX, self.driver.join_next()).await.is_err() {
            debug!("the broker did not see us off in time");
        }
    }
}

/// One of a peer's two connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lane {
    Control,
    Bulk,
}

impl Lane {
    fn qos(self) -> QoS {
        match self {
            Self::Control => QoS::AtLeastOnce,
            Self::Bulk => QoS::AtMostOnce,
        }
    }
}

impl From<Class> for Lane {
    fn from(class: Class) -> Self {
        match class {
            Class::Control => Self::Control,
            Class::Bulk => Self::Bulk,
        }
    }
}

/// Something for each of the two connections.
struct Lanes<T> {
    control: T,
    bulk: T,
}

impl<T> Lanes<T> {
    fn of(&self, lane: Lane) -> &T {
        match lane {
            Lane::Control => &self.control,
            Lane::Bulk => &self.bulk,
        }
    }
}

/// From the transport to a connection.
enum Order {
    Publish(Outgoing),
    /// Finish and say goodbye.
    Stop,
}

/// What the transport wants of the driver.
struct Course {
    /// The best first.
    brokers: Vec<Broker>,
    /// How often it was asked to move on.
    moves: u64,
}

impl Course {
    /// The brokers behind the one called `here` in the list, round to those before it; without itself.
    fn others(&self, here: &str) -> Vec<Broker> {
        let at = self.brokers.iter().position(|broker| broker.to_string() == here);
        let (before, behind) = self.brokers.split_at(at.map_or(0, |at| at + 1));
        let others = behind.iter().chain(before).filter(|broker| broker.to_string() != here);
        others.cloned().collect()
    }

    /// What is tried at once when the broker called `here` is lost: itself, then the list from the top.
    fn after_loss(&self, here: &str) -> Vec<Broker> {
        let rest = self.brokers.iter().filter(|broker| broker.to_string() != here).cloned();
        parse_broker(here).into_iter().chain(rest).collect()
    }
}

/// From the driver to the transport.
enum Report {
    Connected {
        broker: String,
        found: Option<Found>,
        orders: Lanes<UnboundedSender<Order>>,
    },
    Disconnected {
        reason: String,
    },
    Moving {
        broker: String,
    },
    Message {
        topic: String,
        payload: Bytes,
        /// Its share of what may wait, given back when it is taken.
        _room: OwnedSemaphorePermit,
    },
}

/// Keeps the peer connected until the transport is stopped or dropped.
async fn drive(
    config: MqttConfig,
    mut course: watch::Receiver<Course>,
    first: Pair,
    mut probed: Probed,
    reports: UnboundedSender<Report>,
) {
    let mut pair = first;
    let mut pause = PAUSE_MIN;
    let mut brief = 0;
    loop {
        let (connected, here) = (Instant::now(), pair.broker.clone());
        let moving = AtomicBool::new(false);
        let ended = tokio::select! {
            ended = pair.run(&config, &reports) => Ok(ended),
            elsewhere = find_elsewhere(&config, &mut course, &here, &moving, &mut probed) => Err(elsewhere),
        };
        let reason = match ended {
            Ok(Ended::Goodbye) => return,
            Ok(Ended::Lost(reason)) => reason,
            Err(elsewhere) => {
                debug!(from = here, to = elsewhere.broker, "moving on");
                if reports.send(Report::Moving { broker: elsewhere.broker.clone() }).is_err() {
                    return;
                }
                pair = elsewhere;
                continue;
            }
        };
        debug!(reason, "disconnected");
        brief = if connected.elapsed() < BRIEF { brief + 1 } else { 0 };
        let reason = if brief >= BRIEF_MANY {
            format!("{reason}, again and again: is another peer called {}, too?", config.peer)
        } else {
            reason
        };
        if reports.send(Report::Disconnected { reason }).is_err() {
            return;
        }
        // Two peers of one name throw each other out: they are not to do so without a pause.
        pause = if connected.elapsed() >= PAUSE_MAX { Duration::ZERO } else { longer(pause) };
        // Under another name the next broker may be this one, which then ends the connection that there is.
        let moving = moving.load(Ordering::Relaxed);
        let mut brokers = if moving { course.borrow().others(&here) } else { course.borrow().after_loss(&here) };
        let mut pass = 0;
        pair = loop {
            sleep(pause).await;
            pause = longer(pause);
            match Pair::connect(&config, &brokers, pass, &mut probed).await {
                Ok(pair) => break pair,
                Err(error) => debug!(%error, "not connected yet"),
            }
            brokers.clone_from(&course.borrow().brokers);
            pass += 1;
        };
    }
}

/// Waits until the transport is asked to move on and another broker lets it in: the connection at the present one is
/// left only then. `moving` says whether it is at it.
async fn find_elsewhere(
    config: &MqttConfig,
    course: &mut watch::Receiver<Course>,
    here: &str,
    moving: &AtomicBool,
    probed: &mut Probed,
) -> Pair {
    let mut moves = course.borrow_and_update().moves;
    loop {
        if course.changed().await.is_err() {
            // The transport is stopping.
            pending::<Infallible>().await;
        }
        let others = {
            let course = course.borrow_and_update();
            if course.moves == moves {
                continue;
            }
            moves = course.moves;
            course.others(here)
        };
        if others.is_empty() {
            continue;
        }
        moving.store(true, Ordering::Relaxed);
        match Pair::connect(config, &others, 0, probed).await {
            Ok(pair) => return pair,
            Err(error) => debug!(%error, "nowhere to move on to"),
        }
        moving.store(false, Ordering::Relaxed);
    }
}

fn longer(pause: Duration) -> Duration {
    (2 * pause).clamp(PAUSE_MIN, PAUSE_MAX)
}

/// Two connections to one broker.
struct Pair {
    broker: String,
    /// What the broker can do, if it was tried.
    found: Option<Found>,
    control: Connection,
    bulk: Bulk,
}

impl Pair {
    /// Connects to the first of the `brokers` that lets both in: the `pass`-th attempt, which waits the longer.
    async fn connect(
        config: &MqttConfig,
        brokers: &[Broker],
        pass: u32,
        probed: &mut Probed,
    ) -> Result<Self, TransportError> {
        let mut refused = None;
        let mut unreachable = Vec::new();
        let patience = Patience::of_pass(pass, brokers.len());
        let mut answers = Answers::ask(brokers, patience.answer);
        for (index, broker) in brokers.iter().enumerate() {
            if let Err(why) = answers.of(index).await {
                unreachable.push(format!("{broker}: {why}"));
                continue;
            }
            let found = match probed.of(config, broker, patience.step).await {
                Ok(found) => found,
                Err(Failed::Unfit(error)) => {
                    refused.get_or_insert(error);
                    continue;
                }
                Err(Failed::Unreachable(why)) => {
                    unreachable.push(format!("{broker}: {why}"));
                    continue;
                }
            };
            match Self::connect_to(config, broker, patience.step, found).await {
                Ok(pair) => return Ok(pair),
                Err(Rejected::Connection(ConnectionError::ConnectionRefused(code))) => {
                    refused.get_or_insert_with(|| refusal(broker, code));
                }
                Err(Rejected::Subscription) => {
                    let (broker, filters) = (broker.to_string(), config.bulk_filters.join(", "));
                    refused.get_or_insert(TransportError::Subscription { broker, filters });
                }
                Err(Rejected::Connection(ConnectionError::NetworkTimeout)) => {
                    unreachable.push(format!("{broker}: {}", no_answer(patience.step)));
                }
                Err(Rejected::Connection(error)) => unreachable.push(format!("{broker}: {}", reason(&error))),
            }
        }
        Err(refused.unwrap_or_else(|| TransportError::Unreachable(unreachable.join("; "))))
    }

    /// Bulk comes first, so that there is no last will to fire when one of the two is not let in. Chunks can be
    /// received when this returns.
    async fn connect_to(
        config: &MqttConfig,
        broker: &Broker,
        step: Duration,
        found: Option<Found>,
    ) -> Result<Self, Rejected> {
        let limits = Limits::of(found.as_ref());
        let mut bulk = in_time(step, Bulk::open(&config.bulk_options(broker), broker, limits)).await?;
        in_time(step, bulk.subscribe(&config.bulk_filters)).await?;
        let control = in_time(step, Connection::open(config.control_options(broker, limits), limits)).await?;
        Ok(Self { broker: broker.to_string(), found, control, bulk })
    }

    /// Moves messages until one of the connections breaks or both have said goodbye.
    async fn run(self, config: &MqttConfig, reports: &UnboundedSender<Report>) -> Ended {
        let (control, control_orders) = unbounded_channel();
        let (bulk, bulk_orders) = unbounded_channel();
        let orders = Lanes { control, bulk };
        let (broker, found) = (self.broker.clone(), self.found.clone());
        if reports.send(Report::Connected { broker, found, orders }).is_err() {
            return Ended::Goodbye;
        }
        let inbox = Inbox::new(reports.clone(), config.packet_bytes_max);
        let opening = Opening { filters: config.control_filters.clone(), hello_first: config.hello_first };
        let mut tasks = JoinSet::new();
        tasks.spawn(self.control.run(control_orders, inbox.clone(), opening));
        tasks.spawn(self.bulk.run(bulk_orders, inbox));
        while let Some(ended) = tasks.join_next().await {
            let ended = ended.unwrap_or_else(|error| Ended::Lost(error.to_string()));
            if let Ended::Lost(reason) = ended {
                tasks.shutdown().await;
                return Ended::Lost(format!("{}: {reason}", self.broker));
            }
        }
        Ended::Goodbye
    }
}

/// Why a broker does not let a connection in.
enum Rejected {
    Connection(ConnectionError),
    Subscription,
}

/// One step of a handshake. A slow line takes its time for each, a frozen broker for the first one.
async fn in_time<T, E: From<ConnectionError>>(
    limit: Duration,
    step: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    timeout(limit, step).await.unwrap_or_else(|_| Err(ConnectionError::NetworkTimeout.into()))
}

impl From<ConnectionError> for Rejected {
    fn from(error: ConnectionError) -> Self {
        Self::Connection(error)
    }
}

/// How a connection ended.
enum Ended {
    Goodbye,
    Lost(String),
}

/// What a connection subscribes to once it runs.
struct Opening {
    filters: Vec<String>,
    hello_first: bool,
}

/// What the broker bears.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// The longest message, in bytes.
    message_bytes: usize,
    /// Whether it may be asked to keep messages.
    retain: bool,
}

impl Limits {
    fn of(found: Option<&Found>) -> Self {
        let message_bytes = found.map_or(usize::MAX, |found| found.message_bytes);
        Self { message_bytes, retain: found.is_none_or(|found| found.retained != Retained::Refused) }
    }
}

/// A control connection that the broker has let in.
struct Connection {
    limits: Limits,
    requests: AsyncClient,
    events: EventLoop,
}

impl Connection {
    async fn open(options: MqttOptions, limits: Limits) -> Result<Self, ConnectionError> {
        let (requests, mut events) = AsyncClient::new(options, REQUESTS);
        events.network_options.set_tcp_nodelay(true);
        events.network_options.set_connection_timeout(WRITE_MAX[Lane::Control as usize].as_secs());
        // The first event is the broker's consent.
        events.poll().await?;
        Ok(Self { limits, requests, events })
    }

    /// Moves messages until the connection ends.
    async fn run(self, orders: UnboundedReceiver<Order>, inbox: Inbox, opening: Opening) -> Ended {
        let (acked, acks) = watch::channel(Acks::default());
        let pulse = Pulse::default();
        let acknowledged = {
            let acks = acks.clone();
            move || acks.borrow().published
        };
        let Self { limits, requests, events } = self;
        let feeder = Feeder { limits, requests, acks, published: 0, pulse: &pulse };
        let feeding = async {
            // It ends with the requests' other end, which tells the reason.
            let _ = feeder.run(orders, opening).await;
            pending::<Infallible>().await
        };
        tokio::select! {
            ended = poll(events, inbox, acked, &pulse) => ended,
            stopped = pulse.stops(acknowledged) => Ended::Lost(match stopped {
                Stopped::Silent(lasted) => format!("nothing heard for {:.1} s", lasted.as_secs_f64()),
                Stopped::Deaf => "the broker takes messages and delivers none".to_owned(),
            }),
            never = feeding => match never {},
        }
    }
}

fn subscriptions(filters: &[String], lane: Lane) -> impl Iterator<Item = SubscribeFilter> {
    filters.iter().map(move |filter| SubscribeFilter::new(filter.clone(), lane.qos()))
}

fn is_consent(ack: &SubAck) -> bool {
    !ack.return_codes.contains(&SubscribeReasonCode::Failure)
}

/// Lets rumqttc work, counts the acknowledgements and collects what comes.
async fn poll(mut events: EventLoop, inbox: Inbox, acked: watch::Sender<Acks>, pulse: &Pulse) -> Ended {
    let mut saying_goodbye = false;
    let mut joiner = Joiner::new(inbox.bytes_max);
    loop {
        let event = events.poll().await;
        if let Ok(event) = &event {
            pulse.note(event);
        }
        match event {
            Ok(Event::Incoming(Packet::Publish(publish))) => {
                if let Some(message) = joiner.take(publish.payload) {
                    inbox.put(publish.topic, message);
                }
            }
            Ok(Event::Incoming(Packet::PubAck(_))) => acked.send_modify(|acks| acks.published += 1),
            Ok(Event::Incoming(Packet::SubAck(ack))) => {
                acked.send_modify(|acks| {
                    acks.answered += 1;
                    acks.consented += usize::from(is_consent(&ack));
                });
                let Acks { answered, consented, .. } = *acked.borrow();
                if answered - consented >= SUBSCRIBE_ATTEMPTS {
                    return Ended::Lost("the broker refuses a subscription".to_owned());
                }
            }
            Ok(Event::Outgoing(rumqttc::Outgoing::Disconnect)) => saying_goodbye = true,
            Ok(_) => {}
            // The broker closes the connection when it has read our goodbye; closing it ourselves could overtake it.
            Err(_) if saying_goodbye => return Ended::Goodbye,
            Err(error) => return Ended::Lost(reason(&error)),
        }
    }
}

/// What the broker has acknowledged on a connection.
#[derive(Clone, Copy, Debug, Default)]
struct Acks {
    /// Messages.
    published: u64,
    /// Requests to subscribe that it answered.
    answered: usize,
    /// Those of them that it granted.
    consented: usize,
}

/// Gives rumqttc what to send. Waits here, not in the transport, when the broker is slower than the node.
struct Feeder<'a> {
    limits: Limits,
    requests: AsyncClient,
    acks: watch::Receiver<Acks>,
    /// How many messages have been given away.
    published: u64,
    pulse: &'a Pulse,
}

impl Feeder<'_> {
    async fn run(mut self, mut orders: UnboundedReceiver<Order>, opening: Opening) -> Result<(), ClientError> {
        if opening.hello_first {
            match orders.recv().await {
                Some(Order::Publish(hello)) => self.introduce(hello, &opening.filters).await?,
                Some(Order::Stop) => return self.stop().await,
                None => return Ok(()),
            }
        } else {
            self.subscribe(&opening.filters).await?;
        }
        while let Some(order) = orders.recv().await {
            match order {
                Order::Publish(message) => self.publish(message).await?,
                Order::Stop => return self.stop().await,
            }
        }
        // The transport was dropped, and this task is about to be. No goodbye: the last will is to fire.
        Ok(())
    }

    /// Says hello, subscribes, and says hello again. A broker that keeps messages shows the first one to whoever comes
    /// later. Some keep none for filters with wildcards (RabbitMQ); there, of two peers that come together, the one
    /// that subscribed first hears the second hello of the other.
    async fn introduce(&mut self, hello: Outgoing, filters: &[String]) -> Result<(), ClientError> {
        self.publish(hello.clone()).await?;
        self.acknowledged().await;
        self.subscribe(filters).await?;
        // Hellos are for all, and now for this peer, too.
        self.pulse.hears_itself_on(&hello.topic);
        self.publish(hello).await
    }

    async fn publish(&mut self, message: Outgoing) -> Result<(), ClientError> {
        let (topic, qos) = (message.topic.clone(), Lane::Control.qos());
        let retain = message.retain && self.limits.retain;
        let pieces = pieces::cut(message.payload(), rand::random(), self.limits.message_bytes);
        // The broker would keep nothing but the last piece.
        let retain = retain && pieces.len() == 1;
        for piece in pieces {
            self.published += 1;
            self.pulse.says(&topic, self.published);
            self.requests.publish_bytes(topic.clone(), qos, retain, piece).await?;
        }
        Ok(())
    }

    /// Subscribes to one filter after the other: a broker may take its time for each and answer no ping meanwhile.
    async fn subscribe(&mut self, filters: &[String]) -> Result<(), ClientError> {
        let mut asked = 0;
        for consented in 1..=filters.len() {
            while self.acks.borrow().consented < consented {
                self.requests.subscribe(&filters[consented - 1], Lane::Control.qos()).await?;
                asked += 1;
                // An error says that the connection has ended, and this task with it.
                let _ = self.acks.wait_for(|acks| acks.answered == asked).await;
            }
        }
        Ok(())
    }

    async fn stop(mut self) -> Result<(), ClientError> {
        if timeout(FLUSH_MAX, self.acknowledged()).await.is_err() {
            debug!("the broker did not acknowledge everything in time");
        }
        self.requests.disconnect().await
    }

    /// Waits until all that was published is acknowledged.
    async fn acknowledged(&mut self) {
        let published = self.published;
        // An error says that the connection has ended, and this task with it.
        let _ = self.acks.wait_for(|acks| acks.published >= published).await;
    }
}

/// The way to the node, and how much may wait in it.
#[derive(Clone)]
struct Inbox {
    reports: UnboundedSender<Report>,
    room: Arc<Semaphore>,
    bytes_max: usize,
}

impl Inbox {
    fn new(reports: UnboundedSender<Report>, packet_bytes_max: usize) -> Self {
        let bytes_max = WAITING_BYTES_MAX.max(4 * packet_bytes_max);
        Self { reports, room: Arc::new(Semaphore::new(bytes_max)), bytes_max }
    }

    fn put(&self, topic: String, payload: Bytes) {
        let bytes = MESSAGE_BYTES + topic.len() + payload.len();
        let room = u32::try_from(bytes).ok().and_then(|bytes| self.room.clone().try_acquire_many_owned(bytes).ok());
        let Some(room) = room else {
            debug!(topic, bytes, "a message was dropped: the node lags behind");
            return;
        };
        // An error says that the transport was stopped.
        let _ = self.reports.send(Report::Message { topic, payload, _room: room });
    }
}

/// Where a broker is.
#[derive(Clone, Debug)]
struct Broker {
    host: String,
    port: u16,
}

impl fmt::Display for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

fn parse_brokers(addresses: &[String]) -> Result<Vec<Broker>, TransportError> {
    if addresses.is_empty() {
        return Err(TransportError::NoAddress);
    }
    addresses.iter().map(|address| parse_broker(address)).collect()
}

fn parse_broker(address: &str) -> Result<Broker, TransportError> {
    let parts = address.rsplit_once(':').filter(|(host, _)| !host.is_empty());
    let broker = parts.and_then(|(host, port)| Some(Broker { host: host.to_owned(), port: port.parse().ok()? }));
    broker.ok_or_else(|| TransportError::Address(address.to_owned()))
}

fn refusal(broker: &Broker, code: ConnectReturnCode) -> TransportError {
    let reason = match code {
        ConnectReturnCode::Success => "none given",
        ConnectReturnCode::RefusedProtocolVersion => "it does not speak MQTT 3.1.1",
        ConnectReturnCode::BadClientId => "it does not take the peer's name",
        ConnectReturnCode::ServiceUnavailable => "it is not available",
        ConnectReturnCode::BadUserNamePassword => "wrong user name or password",
        ConnectReturnCode::NotAuthorized => "not authorised",
    };
    TransportError::Refused { broker: broker.to_string(), code: code as u8, reason }
}

/// Pings of a connection that carries chunks may take long to be answered.
fn allow_bulk(options: &mut MqttOptions) {
    options.set_keep_alive(options.keep_alive().max(BULK_KEEP_ALIVE_MIN));
}

/// What went wrong, for people.
fn reason(error: &ConnectionError) -> String {
    match error {
        ConnectionError::Io(error)
        | ConnectionError::MqttState(StateError::Io(error))
        | ConnectionError::MqttState(StateError::Deserialization(CodecError::Io(error))) => io_reason(error),
        ConnectionError::MqttState(StateError::ConnectionAborted) => "the broker closed the connection".to_owned(),
        ConnectionError::MqttState(StateError::AwaitPingResp) => "the broker does not answer pings".to_owned(),
        ConnectionError::NetworkTimeout => "no answer".to_owned(),
        ConnectionError::FlushTimeout => "the broker does not take what is sent".to_owned(),
        other => other.to_string(),
    }
}

fn no_answer(within: Duration) -> String {
    format!("no answer within {} s", within.as_secs())
}

/// The kind of the error where there is one ("connection refused"), without the system's number for it.
fn io_reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::TimedOut
        | io::ErrorKind::HostUnreachable
        | io::ErrorKind::NetworkUnreachable
        | io::ErrorKind::NetworkDown => error.kind().to_string(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use rumqttd::protocol::v4::V4;
    use rumqttd::protocol::{ConnAck, Packet, Protocol, PubAck, PubAckReason, QoS, SubAck, SubscribeReasonCode};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpSocket, TcpStream};

    use super::super::tests::{control, goodbye, hello, mqtt_config, outgoing, settle, wait_for};
    use super::*;
    use crate::broker::{self, BrokerConfig, tests::on_own_host};

    async fn start() -> broker::Broker {
        broker::Broker::start(BrokerConfig::default()).await.unwrap()
    }

    async fn join(broker: &broker::Broker, name: &str) -> MqttTransport {
        let config = mqtt_config(broker, name, goodbye(name));
        let mut transport = MqttTransport::connect(config, Duration::ZERO).await.unwrap();
        settle(&mut transport, name).await;
        transport
    }

    /// An address where nobody listens, as long as the socket lives.
    fn deaf() -> (TcpSocket, String) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(on_own_host().listen).unwrap();
        let addr = socket.local_addr().unwrap().to_string();
        (socket, addr)
    }

    /// Skips messages until the connection is lost.
    async fn disconnected(transport: &mut MqttTransport) -> String {
        loop {
            match transport.next().await {
                TransportEvent::Disconnected { reason } => return reason,
                TransportEvent::Message { .. } => {}
                other => panic!("{other:?} instead of Disconnected"),
            }
        }
    }

    #[tokio::test]
    async fn transports_come_back_when_their_broker_does() {
        let first = broker::Broker::start(on_own_host()).await.unwrap();
        let addr = first.addr();
        let (mut a, mut b) = (join(&first, "a").await, join(&first, "b").await);
        wait_for(&mut a, "t/init/b", "hello").await;
        first.stop().await;
        for transport in [&mut a, &mut b] {
            let reason = disconnected(transport).await;
            assert!(reason.starts_with(&addr.to_string()), "{reason}");
            transport.send(control("t/control/lost", "sent without a connection"));
        }
        let second = BrokerConfig { listen: addr, ..BrokerConfig::default() };
        let second = broker::Broker::start(second).await.unwrap();
        settle(&mut a, "a").await;
        settle(&mut b, "b").await;
        b.send(control("t/control/1", "again"));
        b.send(outgoing(Class::Bulk, "t/weights/a", "chunk", &Bytes::new()));
        let mut wanted = vec!["again", "chunk"];
        while !wanted.is_empty() {
            match a.next().await {
                TransportEvent::Message { topic, payload } => {
                    assert_ne!(topic, "t/control/lost");
                    wanted.retain(|text| payload != text);
                }
                other => panic!("{other:?} instead of a message"),
            }
        }
        a.stop().await;
        second.stop().await;
    }

    #[tokio::test]
    async fn the_loss_of_one_connection_is_the_loss_of_both_and_is_told_once() {
        let broker = start().await;
        let mut a = join(&broker, "a").await;
        // A connection with the same name throws a's bulk connection out.
        let mut usurper = MqttOptions::new("rodizio-test-a.bulk", "127.0.0.1", broker.addr().port());
        usurper.set_keep_alive(Duration::from_secs(5));
        let (_requests, mut events) = AsyncClient::new(usurper, REQUESTS);
        events.poll().await.unwrap();
        disconnected(&mut a).await;
        // It is back, both ways, and throws the usurper out in turn.
        settle(&mut a, "a").await;
        a.send(outgoing(Class::Bulk, "t/weights/a", "chunk", &Bytes::new()));
        wait_for(&mut a, "t/weights/a", "chunk").await;
        while events.poll().await.is_ok() {}
    }

    #[tokio::test]
    async fn two_peers_of_one_name_are_asked_whether_they_are() {
        let broker = start().await;
        let (mut first, mut second) = (join(&broker, "a").await, join(&broker, "a").await);
        let asked = async |peer: &mut MqttTransport| {
            loop {
                if let TransportEvent::Disconnected { reason } = peer.next().await
                    && reason.ends_with("again and again: is another peer called a, too?")
                {
                    return;
                }
            }
        };
        tokio::join!(asked(&mut first), asked(&mut second));
    }

    #[tokio::test]
    async fn the_first_broker_that_answers_is_taken() {
        let (_socket, nobody) = deaf();
        let (first, second) = (start().await, start().await);
        let mut config = mqtt_config(&first, "a", None);
        config.brokers = vec![nobody, first.addr().to_string(), second.addr().to_string()];
        let mut a = MqttTransport::connect(config, Duration::ZERO).await.unwrap();
        assert_eq!(a.next().await, TransportEvent::Connected { broker: first.addr().to_string(), found: None });
        first.stop().await;
        disconnected(&mut a).await;
        assert_eq!(a.next().await, TransportEvent::Connected { broker: second.addr().to_string(), found: None });
    }

    /// Throws the bulk connection of a peer out.
    async fn usurp(broker: &broker::Broker, name: &str) {
        let id = format!("rodizio-test-{name}.bulk");
        let mut usurper = MqttOptions::new(id, "127.0.0.1", broker.addr().port());
        usurper.set_keep_alive(Duration::from_secs(5));
        let (_requests, mut events) = AsyncClient::new(usurper, REQUESTS);
        events.poll().await.unwrap();
        while events.poll().await.is_ok() {}
    }

    #[tokio::test]
    async fn a_hiccup_moves_nobody_to_a_better_broker() {
        let (socket, better) = deaf();
        let second = start().await;
        let mut config = mqtt_config(&second, "a", None);
        config.brokers.insert(0, better.clone());
        let mut a = MqttTransport::connect(config, Duration::ZERO).await.unwrap();
        settle(&mut a, "a").await;
        drop(socket);
        let better = BrokerConfig { listen: better.parse().unwrap(), ..BrokerConfig::default() };
        let _better = broker::Broker::start(better).await.unwrap();
        let (event, ()) = tokio::join!(
            async {
                disconnected(&mut a).await;
                a.next().await
            },
            usurp(&second, "a")
        );
        assert_eq!(event, TransportEvent::Connected { broker: second.addr().to_string(), found: None });
    }

    #[tokio::test]
    async fn who_is_asked_to_move_on_takes_the_next_broker_that_is_there() {
        let (_socket, nobody) = deaf();
        let (first, last) = (start().await, start().await);
        let mut a = join(&first, "a").await;
        let mut watcher = join(&first, "watcher").await;
        // Nowhere else to go.
        a.move_on();
        a.send(control("t/control/1", "still here"));
        wait_for(&mut watcher, "t/control/1", "still here").await;
        let [first_at, last_at] = [&first, &last].map(|broker| broker.addr().to_string());
        a.set_brokers(vec![first_at.clone(), nobody, last_at.clone()]);
        for there in [last_at, first_at] {
            a.move_on();
            loop {
                match a.next().await {
                    TransportEvent::Message { .. } => {}
                    event => break assert_eq!(event, TransportEvent::Moving { broker: there.clone() }),
                }
            }
            assert_eq!(a.next().await, TransportEvent::Connected { broker: there, found: None });
            a.send(hello("a"));
            wait_for(&mut a, "t/init/a", "hello").await;
        }
        wait_for(&mut watcher, "t/init/a", "goodbye").await;
    }

    #[tokio::test]
    async fn a_machine_that_does_not_even_refuse_is_passed_over() {
        // A listener whose queue is full drops what comes.
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let silent = socket.listen(1).unwrap();
        let addr = silent.local_addr().unwrap();
        let mut waiting = JoinSet::new();
        for _ in 0..8 {
            waiting.spawn(TcpStream::connect(addr));
        }
        for _ in 0..2 {
            waiting.join_next().await.unwrap().unwrap().unwrap();
        }
        let (_socket, nobody) = deaf();
        let error = failure(&[&addr.to_string(), &nobody]).await;
        let each = format!("no broker answers at {addr}: no answer within 4 s; {nobody}: connection refused");
        assert_eq!(error.to_string(), each);
        let there = start().await;
        let mut config = mqtt_config(&there, "a", None);
        config.brokers.insert(0, addr.to_string());
        let mut a = MqttTransport::connect(config, Duration::ZERO).await.unwrap();
        assert_eq!(a.next().await, TransportEvent::Connected { broker: there.addr().to_string(), found: None });
    }

    async fn failure(brokers: &[&str]) -> TransportError {
        let broker = start().await;
        let mut config = mqtt_config(&broker, "a", None);
        config.brokers = brokers.iter().map(|&address| address.to_owned()).collect();
        MqttTransport::connect(config, Duration::ZERO).await.err().expect("connected to nobody")
    }

    #[tokio::test]
    async fn a_broker_that_is_not_there_is_named() {
        let ((_one, one), (_two, two)) = (deaf(), deaf());
        let error = failure(&[&one]).await;
        assert_eq!(error.to_string(), format!("no broker answers at {one}: connection refused"));
        let error = failure(&[&one, &two]).await;
        let each = format!("no broker answers at {one}: connection refused; {two}: connection refused");
        assert_eq!(error.to_string(), each);
    }

    #[tokio::test]
    async fn an_address_that_is_none_is_named() {
        assert_eq!(failure(&[]).await, TransportError::NoAddress);
        for address in ["localhost", ":1883", "localhost:", "localhost:mqtt", "localhost:65536", ""] {
            assert_eq!(failure(&[address]).await, TransportError::Address(address.to_owned()));
        }
    }

    /// A broker by hand: answers what it is told to.
    pub(super) struct Wire {
        socket: TcpStream,
        received: BytesMut,
    }

    impl Wire {
        pub(super) async fn accept(listener: &TcpListener) -> Self {
            Self { socket: listener.accept().await.unwrap().0, received: BytesMut::new() }
        }

        pub(super) async fn receive(&mut self) -> Packet {
            loop {
                if let Ok(packet) = V4.read_mut(&mut self.received, usize::MAX) {
                    return packet;
                }
                assert_ne!(self.socket.read_buf(&mut self.received).await.unwrap(), 0);
            }
        }

        pub(super) async fn send(&mut self, packet: Packet) {
            let mut bytes = BytesMut::new();
            V4.write(packet, &mut bytes).unwrap();
            self.socket.write_all(&bytes).await.unwrap();
        }

        pub(super) async fn let_in(&mut self, code: rumqttd::protocol::ConnectReturnCode) {
            assert!(matches!(self.receive().await, Packet::Connect(..)));
            self.send(Packet::ConnAck(ConnAck { session_present: false, code }, None)).await;
        }

        pub(super) async fn confirm_subscription(&mut self) -> Vec<String> {
            let Packet::Subscribe(subscribe, _) = self.receive().await else { panic!("not SUBSCRIBE") };
            let return_codes = vec![SubscribeReasonCode::Success(QoS::AtLeastOnce); subscribe.filters.len()];
            self.send(Packet::SubAck(SubAck { pkid: subscribe.pkid, return_codes }, None)).await;
            subscribe.filters.into_iter().map(|filter| filter.path).collect()
        }
    }

    /// A transport that has just connected to a broker by hand, and that broker's ends of its two connections.
    async fn by_hand(mut config: MqttConfig) -> (MqttTransport, Lanes<Wire>) {
        use rumqttd::protocol::ConnectReturnCode::Success;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        config.brokers = vec![listener.local_addr().unwrap().to_string()];
        let serving = async {
            let mut bulk = Wire::accept(&listener).await;
            bulk.let_in(Success).await;
            assert_eq!(bulk.confirm_subscription().await, ["t/weights/a", "t/weights/all"]);
            let mut control = Wire::accept(&listener).await;
            control.let_in(Success).await;
            Lanes { control, bulk }
        };
        let (transport, wires) = tokio::join!(MqttTransport::connect(config, Duration::ZERO), serving);
        let mut transport = transport.unwrap();
        assert!(matches!(transport.next().await, TransportEvent::Connected { .. }));
        (transport, wires)
    }

    #[tokio::test]
    async fn a_broker_that_refuses_is_named_with_its_reason() {
        use rumqttd::protocol::ConnectReturnCode::NotAuthorized;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        let only = [addr.as_str()];
        let refusing = async { Wire::accept(&listener).await.let_in(NotAuthorized).await };
        let (error, ()) = tokio::join!(failure(&only), refusing);
        let expected = format!("the broker at {addr} refuses the connection: not authorised (code 5)");
        assert_eq!(error.to_string(), expected);
        assert!(matches!(error, TransportError::Refused { code: 5, .. }));
    }

    #[tokio::test]
    async fn a_broker_that_refuses_a_subscription_is_named_with_the_filters() {
        use rumqttd::protocol::ConnectReturnCode::Success;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        let refusing = async {
            let mut wire = Wire::accept(&listener).await;
            wire.let_in(Success).await;
            let Packet::Subscribe(subscribe, _) = wire.receive().await else { panic!("not SUBSCRIBE") };
            let return_codes = vec![SubscribeReasonCode::Success(QoS::AtMostOnce), SubscribeReasonCode::Failure];
            wire.send(Packet::SubAck(SubAck { pkid: subscribe.pkid, return_codes }, None)).await;
            wire
        };
        let only = [addr.as_str()];
        let (error, _wire) = tokio::join!(failure(&only), refusing);
        let expected = format!("the broker at {addr} refuses to subscribe this peer to t/weights/a, t/weights/all");
        assert_eq!(error.to_string(), expected);
    }

    #[tokio::test]
    async fn nothing_is_subscribed_to_or_said_before_the_hello_is_acknowledged_and_then_it_is_said_again() {
        let (mut transport, Lanes { control: mut wire, bulk: _bulk }) =
            by_hand(mqtt_config(&start().await, "a", None)).await;
        transport.send(hello("a"));
        transport.send(control("t/control/1", "second"));
        assert!(matches!(wire.receive().await, Packet::Publish(publish, _) if publish.topic == "t/init/a"));
        // What must not come has some time to come.
        let early = timeout(Duration::from_millis(50), wire.receive()).await;
        assert!(early.is_err(), "{early:?} before the hello was acknowledged");
        wire.send(Packet::PubAck(PubAck { pkid: 1, reason: PubAckReason::Success }, None)).await;
        assert_eq!(wire.confirm_subscription().await, ["t/init/+"]);
        assert_eq!(wire.confirm_subscription().await, ["t/control/#"]);
        // Some brokers keep nothing for those who subscribe with wildcards.
        assert!(matches!(wire.receive().await, Packet::Publish(publish, _) if publish.topic == "t/init/a"));
        assert!(matches!(wire.receive().await, Packet::Publish(publish, _) if publish.payload == "second"));
    }

    #[tokio::test]
    async fn a_broker_that_acknowledges_the_hello_and_does_not_deliver_it_is_given_up() {
        // No ping asks for an answer meanwhile.
        let keep_alive = Duration::from_secs(600);
        let config = MqttConfig { keep_alive, ..mqtt_config(&start().await, "a", None) };
        let (mut transport, Lanes { control: mut wire, bulk: _bulk }) = by_hand(config).await;
        transport.send(hello("a"));
        // Packet ids count subscriptions, too, of which there are two in between.
        for pkid in [1, 4] {
            assert!(matches!(wire.receive().await, Packet::Publish(publish, _) if publish.topic == "t/init/a"));
            wire.send(Packet::PubAck(PubAck { pkid, reason: PubAckReason::Success }, None)).await;
            if pkid == 1 {
                wire.confirm_subscription().await;
                wire.confirm_subscription().await;
            }
        }
        // From here on nothing happens.
        let reason = disconnected(&mut transport).await;
        assert!(reason.ends_with("the broker takes messages and delivers none"), "{reason}");
    }

    #[tokio::test]
    async fn who_only_listens_needs_no_hello() {
        let broker = start().await;
        let _a = join(&broker, "a").await;
        let config = MqttConfig { hello_first: false, ..mqtt_config(&broker, "watch", None) };
        let mut watch = MqttTransport::connect(config, Duration::ZERO).await.unwrap();
        assert!(matches!(watch.next().await, TransportEvent::Connected { .. }));
        wait_for(&mut watch, "t/init/a", "hello").await;
    }

    #[tokio::test]
    async fn control_messages_get_through_a_flood_of_weights() {
        const CHUNKS: usize = 64;
        let config = BrokerConfig { shelf_bytes: 256 << 20, ..BrokerConfig::default() };
        let broker = broker::Broker::start(config).await.unwrap();
        let (mut a, mut b) = (join(&broker, "a").await, join(&broker, "b").await);
        let chunk = Bytes::from(vec![1; 1 << 20]);
        for n in 0..CHUNKS {
            a.send(outgoing(Class::Bulk, "t/weights/b", &format!("{n:04}"), &chunk));
            a.send(control("t/control/count", &n.to_string()));
        }
        let (mut chunks, mut controls) = (0, 0);
        while chunks < CHUNKS || controls < CHUNKS {
            match b.next().await {
                TransportEvent::Message { topic, payload } if topic == "t/weights/b" => {
                    assert_eq!(payload[..4], *format!("{chunks:04}").as_bytes());
                    assert_eq!(payload.len(), 4 + chunk.len());
                    chunks += 1;
                }
                TransportEvent::Message { topic, payload } if topic == "t/control/count" => {
                    assert_eq!(payload, controls.to_string());
                    controls += 1;
                }
                TransportEvent::Message { .. } => {}
                other => panic!("{other:?} in the flood"),
            }
        }
    }

    #[tokio::test]
    async fn a_message_that_no_packet_can_hold_is_dropped_and_harms_nothing() {
        let broker = start().await;
        // The broker sends weights back to nobody.
        let (mut a, mut b) = (join(&broker, "a").await, join(&broker, "b").await);
        let max = BrokerConfig::default().packet_bytes_max;
        let longest = max - PACKET_OVERHEAD - "t/weights/b".len();
        a.send(outgoing(Class::Bulk, "t/weights/b", "", &Bytes::from(vec![0; longest + 1])));
        a.send(outgoing(Class::Bulk, "t/weights/b", "", &Bytes::from(vec![1; longest])));
        loop {
            let TransportEvent::Message { topic, payload } = b.next().await else { panic!("not a message") };
            if topic == "t/weights/b" {
                assert_eq!((payload.len(), payload[0]), (longest, 1));
                return;
            }
        }
    }

    #[test]
    fn what_waits_for_the_node_is_bounded() {
        let (reports, mut waiting) = unbounded_channel();
        let inbox = Inbox::new(reports, 0);
        let chunk = Bytes::from(vec![0; WAITING_BYTES_MAX / 4]);
        for _ in 0..5 {
            inbox.put("topic".to_owned(), chunk.clone());
        }
        assert_eq!(waiting.len(), 3, "the fourth one has no room beside what messages cost");
        waiting.try_recv().unwrap();
        inbox.put("topic".to_owned(), chunk);
        assert_eq!(waiting.len(), 3);
    }
}
