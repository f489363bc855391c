//! One TCP connection: MQTT packets to and from the router.
//!
//! The router trusts its connections: a topic that begins with a letter of two bytes, or a wake-up for a connection
//! that has gone, panics it and takes the broker down. So a connection
//! - hands on only packets that were checked here, so that the router never has a reason to close it by itself;
//! - is closed here when another one comes with its id, before that one is registered;
//! - says goodbye to the router last of all, after its own last will.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io;
use std::mem;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use rumqttd::Notification;
use rumqttd::local::{LinkError, LinkRx, LinkTx};
use rumqttd::protocol::v4::V4;
use rumqttd::protocol::{
    ConnAck, ConnectReturnCode, Disconnect, DisconnectReasonCode, Error as Malformed, LastWill, Packet, Protocol,
    Publish, QoS, valid_filter, valid_topic,
};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::shelf::{ConnectionNumber, Shelf, Taken};
use super::{BrokerConfig, Links};
use crate::buffers::Buffers;
use crate::packets::{PublishHead, Received};

/// The first byte of a CONNECT packet.
const CONNECT: u8 = 0x10;

/// The longest first packet: it holds an id, a will and nothing else.
const CONNECT_BYTES_MAX: usize = 64 << 10;

/// Different filters that there is room for, per connection: a peer's two connections use about ten.
pub(super) const FILTERS_PER_CONNECTION: usize = 16;

/// The longest id.
const ID_BYTES_MAX: usize = 256;

/// What all connections together read weights into again, in bytes: what one receiver has asked for at a time, twice, and
/// as much that is being read.
const BUFFERS_BYTES_MAX: usize = 16 << 20;

/// Payloads from this size on are written from where they lie, and those at QoS 0 go round the router; smaller ones are
/// gathered into one write.
pub(super) const COPY_BYTES_MAX: usize = 4 << 10;

/// How the id of a peer's connection for weights ends.
///
/// What it publishes is not sent back to it, although MQTT 3.1.1 would have it so (MQTT 5 lets a subscriber choose): a
/// leader that broadcasts a model to four receivers would be the fifth of them. It is so for weights, and for nothing else.
const WEIGHTS_ID_END: &str = ".bulk";

/// Small packets are gathered up to this size.
const GATHER_BYTES: usize = 64 << 10;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Closed {
    #[error("it said goodbye")]
    Goodbye,
    #[error("another connection came with its id")]
    TakenOver,
    #[error("it was closed at the other end")]
    Eof,
    #[error("nothing came from it for too long")]
    Silent,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("what it sent is not MQTT 3.1.1: {0}")]
    Malformed(#[from] Malformed),
    #[error("{0}")]
    Refused(&'static str),
    #[error("the broker stopped")]
    Stopped,
}

impl From<LinkError> for Closed {
    /// The link itself has no other reason to fail.
    fn from(_: LinkError) -> Self {
        Self::Stopped
    }
}

/// What the connections share.
pub(super) struct Front {
    links: Arc<Links>,
    seats: Seats,
    /// Every filter anybody ever subscribed to: the router keeps a log for each and never frees it.
    filters: Mutex<BTreeSet<String>>,
    filters_max: usize,
    packet_bytes_max: usize,
    connect_timeout: Duration,
    anonymous: AtomicU64,
    /// How many connections there were.
    connections: AtomicU64,
    shelf: Arc<Shelf>,
    buffers: Mutex<Buffers>,
}

impl Front {
    pub(super) fn new(config: &BrokerConfig, links: Arc<Links>, shelf: Arc<Shelf>) -> Self {
        Self {
            links,
            seats: Seats::default(),
            filters: Mutex::default(),
            filters_max: FILTERS_PER_CONNECTION * config.connections_max,
            packet_bytes_max: config.packet_bytes_max,
            connect_timeout: config.connect_timeout,
            anonymous: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            shelf,
            buffers: Mutex::new(Buffers::new(BUFFERS_BYTES_MAX)),
        }
    }

    /// Serves one connection until it ends.
    pub(super) async fn serve(&self, mut socket: TcpStream) -> Closed {
        let Err(closed) = self.converse(&mut socket).await;
        closed
    }

    async fn converse(&self, socket: &mut TcpStream) -> Result<Infallible, Closed> {
        socket.set_nodelay(true)?;
        let mut received = Received::default();
        let greeting = timeout(self.connect_timeout, self.greet(socket, &mut received)).await;
        let greeting = greeting.map_err(|_| Closed::Silent)??;

        let mut seat = self.seats.claim(&greeting.id).await;
        let (links, id) = (self.links.clone(), greeting.id.clone());
        let opened = spawn_blocking(move || links.open(&id)).await;
        let (mut to_router, from_router, ack) = opened.ok().flatten().ok_or(Closed::Stopped)?;

        let unacked = Unacked::default();
        let number = self.connections.fetch_add(1, Ordering::Relaxed);
        let reads = Reads { shelf: &self.shelf, number };
        let (reading, writing) = socket.split();
        let without = greeting.id.ends_with(WEIGHTS_ID_END).then_some(number);
        let reader = Reader { front: self, unacked: &unacked, number, without, to_router: &mut to_router };
        let writer = Writer { socket: writing, gathered: BytesMut::new(), unacked: &unacked, reads: &reads };
        let ended = tokio::select! {
            ended = reader.run(reading, received, greeting.silence) => ended,
            ended = writer.run(from_router, ack) => ended,
            () = seat.wanted() => Err(Closed::TakenOver),
        };
        let Err(closed) = ended;
        if !matches!(closed, Closed::Goodbye | Closed::TakenOver)
            && let Some(will) = greeting.will
        {
            let will = Publish::new(will.topic, will.message, will.retain);
            to_router.buffer().push_back(Packet::Publish(will, None));
        }
        let goodbye = Disconnect { reason_code: DisconnectReasonCode::NormalDisconnection };
        to_router.send(Packet::Disconnect(goodbye, None)).await?;
        Err(closed)
    }

    /// Reads the first packet and answers it when it is refused.
    async fn greet(&self, socket: &mut TcpStream, received: &mut Received) -> Result<Greeting, Closed> {
        let first = loop {
            if received.bytes.first().is_some_and(|&byte| byte != CONNECT) {
                return Err(Closed::Refused("its first packet is not CONNECT"));
            }
            match V4.read_mut(&mut received.bytes, CONNECT_BYTES_MAX.min(self.packet_bytes_max)) {
                Ok(packet) => break packet,
                Err(Malformed::InsufficientBytes(missing)) => self.read(socket, received, missing).await?,
                Err(error @ Malformed::InvalidProtocolLevel(_)) => {
                    write_ack(socket, ConnectReturnCode::RefusedProtocolVersion).await?;
                    return Err(error.into());
                }
                Err(error) => return Err(error.into()),
            }
        };
        let Packet::Connect(connect, _, will, _, _) = first else {
            return Err(Closed::Refused("its first packet is not CONNECT"));
        };
        if connect.keep_alive == 0 {
            return Err(Closed::Refused("it asks to live for ever (keepalive 0)"));
        }
        let id = match connect.client_id {
            id if id.is_empty() => format!("\0{}", self.anonymous.fetch_add(1, Ordering::Relaxed)),
            id if valid_id(&id) => id,
            _ => {
                write_ack(socket, ConnectReturnCode::ClientIdentifierNotValid).await?;
                return Err(Closed::Refused("its id is longer than 256 bytes or has one of / # + $"));
            }
        };
        let will = will.map(detached_will).transpose()?;
        // MQTT 3.1.1, 3.1.2.10: one and a half times the interval that was agreed.
        let silence = Duration::from_secs(connect.keep_alive.into()) * 3 / 2;
        Ok(Greeting { id, will, silence })
    }

    /// Reads what is there of a packet that lacks `missing` bytes at least.
    async fn read(
        &self,
        socket: &mut (impl AsyncRead + Unpin),
        received: &mut Received,
        missing: usize,
    ) -> Result<(), Closed> {
        match received.read(socket, missing, &self.buffers).await? {
            0 => Err(Closed::Eof),
            _ => Ok(()),
        }
    }

    /// Makes room for a subscription to `filter`.
    fn admit(&self, filter: &str) -> Result<(), Closed> {
        if !valid_filter(filter) || filter.starts_with('$') {
            return Err(Closed::Refused("it subscribes to a filter that is none"));
        }
        let mut filters = self.filters.lock().unwrap_or_else(PoisonError::into_inner);
        if !filters.contains(filter) {
            if filters.len() >= self.filters_max {
                return Err(Closed::Refused("no room for another filter"));
            }
            filters.insert(filter.to_owned());
        }
        Ok(())
    }
}

/// What the first packet said.
struct Greeting {
    id: String,
    will: Option<LastWill>,
    /// How long the connection may send nothing.
    silence: Duration,
}

fn valid_id(id: &str) -> bool {
    id.len() <= ID_BYTES_MAX && !id.contains(|c: char| c.is_control() || "/#+$".contains(c))
}

/// The will in memory of its own: it lives as long as the connection, the packet it came in need not.
fn detached_will(mut will: LastWill) -> Result<LastWill, Closed> {
    check_topic(&will.topic)?;
    will.topic = Bytes::copy_from_slice(&will.topic);
    will.message = Bytes::copy_from_slice(&will.message);
    Ok(will)
}

fn check_topic(topic: &[u8]) -> Result<&str, Closed> {
    match str::from_utf8(topic) {
        // The router cuts the first byte off to look for a `$`, which must not cut a letter in two.
        Ok(topic) if topic.is_char_boundary(1) && !topic.starts_with('$') && valid_topic(topic) => Ok(topic),
        _ => Err(Closed::Refused("it publishes to a topic that is none")),
    }
}

/// Who is connected, by id.
#[derive(Default)]
struct Seats(Mutex<BTreeMap<String, mpsc::Sender<()>>>);

impl Seats {
    /// Takes the seat of `id`; who has it now is asked to leave, and this waits until it has left.
    async fn claim(&self, id: &str) -> Seat<'_> {
        loop {
            let holder = {
                let mut seats = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(holder) = seats.get(id) else {
                    let (sender, wanted) = mpsc::channel(1);
                    seats.insert(id.to_owned(), sender);
                    return Seat { seats: self, id: id.to_owned(), wanted };
                };
                holder.clone()
            };
            // An error says that it was asked already, or is leaving.
            let _ = holder.try_send(());
            holder.closed().await;
        }
    }
}

/// The right to be connected under an id. Dropping it lets the next one in.
struct Seat<'a> {
    seats: &'a Seats,
    id: String,
    wanted: mpsc::Receiver<()>,
}

impl Seat<'_> {
    /// Waits until somebody else wants the seat.
    async fn wanted(&mut self) {
        self.wanted.recv().await;
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        let mut seats = self.seats.0.lock().unwrap_or_else(PoisonError::into_inner);
        seats.remove(&self.id);
    }
}

/// The QoS 1 messages sent and not yet acknowledged, in order: the router closes whoever acknowledges another one.
#[derive(Default)]
struct Unacked(Mutex<VecDeque<u16>>);

impl Unacked {
    fn sent(&self, id: u16) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push_back(id);
    }

    fn acked(&self, id: u16) -> Result<(), Closed> {
        let oldest = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        if oldest == Some(id) { Ok(()) } else { Err(Closed::Refused("it acknowledges what it was not sent")) }
    }
}

/// What a connection takes from the shelf, for as long as this lives.
struct Reads<'a> {
    shelf: &'a Shelf,
    number: ConnectionNumber,
}

impl Drop for Reads<'_> {
    fn drop(&mut self) {
        self.shelf.left(self.number);
    }
}

/// The way from the socket to the router.
struct Reader<'a> {
    front: &'a Front,
    unacked: &'a Unacked,
    number: ConnectionNumber,
    /// Who does not get the weights that come here: this connection, if it is a peer's for weights.
    without: Option<ConnectionNumber>,
    to_router: &'a mut LinkTx,
}

impl Reader<'_> {
    async fn run(
        mut self,
        mut socket: ReadHalf<'_>,
        mut received: Received,
        silence: Duration,
    ) -> Result<Infallible, Closed> {
        loop {
            let missing = self.hand_on(&mut received.bytes).await?;
            let read = self.front.read(&mut socket, &mut received, missing);
            timeout(silence, read).await.map_err(|_| Closed::Silent)??;
        }
    }

    /// Hands on the packets that `received` holds whole; returns how many bytes the next one lacks.
    async fn hand_on(&mut self, received: &mut BytesMut) -> Result<usize, Closed> {
        let mut last = None;
        let stopped_by = loop {
            let qos = publish_qos(received);
            if qos == Some(2) {
                break Closed::Refused("it publishes at QoS 2, which is not offered");
            }
            match V4.read_mut(received, self.front.packet_bytes_max) {
                Ok(packet) => match self.check(packet, qos) {
                    // All but the last are left for the router to find when the last one wakes it.
                    Ok(packet) => self.to_router.buffer().extend(last.replace(packet)),
                    Err(closed) => break closed,
                },
                Err(error) => break error.into(),
            }
        };
        if let Some(last) = last {
            self.to_router.send(last).await?;
        }
        match stopped_by {
            Closed::Malformed(Malformed::InsufficientBytes(missing)) => Ok(missing),
            closed => Err(closed),
        }
    }

    /// Lets through what does not harm the router. `qos` is that of a PUBLISH.
    fn check(&self, packet: Packet, qos: Option<u8>) -> Result<Packet, Closed> {
        match packet {
            Packet::Publish(mut publish, _) => {
                let topic = check_topic(&publish.topic)?;
                if publish.payload.len() > COPY_BYTES_MAX && qos == Some(0) && !publish.retain {
                    publish.payload = self.front.shelf.put(topic, &publish.payload, self.without);
                } else if publish.payload.len() <= COPY_BYTES_MAX || publish.retain {
                    // It may be kept for ever, the buffer it was read into must not.
                    publish.payload = Bytes::copy_from_slice(&publish.payload);
                }
                publish.topic = Bytes::copy_from_slice(&publish.topic);
                Ok(Packet::Publish(publish, None))
            }
            Packet::Subscribe(mut subscribe, _) => {
                for filter in &mut subscribe.filters {
                    self.front.admit(&filter.path)?;
                    if filter.qos == QoS::ExactlyOnce {
                        filter.qos = QoS::AtLeastOnce;
                    }
                    self.front.shelf.subscribed(self.number, &filter.path);
                }
                Ok(Packet::Subscribe(subscribe, None))
            }
            Packet::PubAck(ack, _) => {
                self.unacked.acked(ack.pkid)?;
                Ok(Packet::PubAck(ack, None))
            }
            Packet::Unsubscribe(unsubscribe, _) => {
                unsubscribe.filters.iter().for_each(|filter| self.front.shelf.unsubscribed(self.number, filter));
                Ok(Packet::Unsubscribe(unsubscribe, None))
            }
            Packet::PingReq(_) => Ok(packet),
            Packet::Disconnect(..) => Err(Closed::Goodbye),
            _ => Err(Closed::Refused("it sends what only a broker sends")),
        }
    }
}

/// The QoS of the packet that begins here, if it is a PUBLISH. rumqttd does not show that of a parsed one.
fn publish_qos(received: &[u8]) -> Option<u8> {
    received.first().filter(|byte| **byte >> 4 == 3).map(|byte| (byte & 0b0110) >> 1)
}

async fn write_ack(socket: &mut (impl AsyncWrite + Unpin), code: ConnectReturnCode) -> Result<(), Closed> {
    let mut bytes = BytesMut::new();
    V4.write(Packet::ConnAck(ConnAck { session_present: false, code }, None), &mut bytes)?;
    Ok(socket.write_all(&bytes).await?)
}

/// The way from the router to the socket.
struct Writer<'a> {
    socket: WriteHalf<'a>,
    /// Small packets that go in one write.
    gathered: BytesMut,
    unacked: &'a Unacked,
    reads: &'a Reads<'a>,
}

impl Writer<'_> {
    async fn run(mut self, mut from_router: LinkRx, ack: Notification) -> Result<Infallible, Closed> {
        let mut next = Some(ack);
        loop {
            let mut paused = false;
            loop {
                match next {
                    // The router waits for this connection to catch up.
                    Some(Notification::Unschedule) => paused = true,
                    Some(notification) => self.write(notification).await?,
                    None => {}
                }
                match ready(from_router.next()).await {
                    Some(notification) => next = notification?,
                    None => break,
                }
            }
            self.socket.write_all_buf(&mut self.gathered).await?;
            if paused {
                from_router.wake().await?;
            }
            next = from_router.next().await?;
        }
    }

    /// Writes one packet, or only gathers it when it is small.
    async fn write(&mut self, notification: Notification) -> Result<(), Closed> {
        let packet: Option<Packet> = notification.into();
        let payload = match packet {
            Some(Packet::Publish(mut publish, _)) => {
                let payload = mem::take(&mut publish.payload);
                let taken = self.reads.shelf.take(&payload, self.reads.number);
                let mut bare = BytesMut::with_capacity(publish.topic.len() + 16);
                V4.write(Packet::Publish(publish, None), &mut bare)?;
                let head = PublishHead::of(bare);
                let payload = match taken {
                    Taken::Itself => payload,
                    Taken::Payload(payload) => payload,
                    Taken::Gone if head.id().is_none() => return Ok(()),
                    // The router would wait for ever for its acknowledgement.
                    Taken::Gone => {
                        return Err(Closed::Refused("it subscribed at QoS 1 to weights and missed some"));
                    }
                };
                head.write(payload.len(), &mut self.gathered);
                head.id().into_iter().for_each(|id| self.unacked.sent(id));
                payload
            }
            Some(packet) => {
                V4.write(packet, &mut self.gathered)?;
                Bytes::new()
            }
            None => return Ok(()),
        };
        if payload.len() <= COPY_BYTES_MAX {
            self.gathered.extend_from_slice(&payload);
            if self.gathered.len() >= GATHER_BYTES {
                self.socket.write_all_buf(&mut self.gathered).await?;
            }
        } else {
            self.socket.write_all_buf(&mut (&mut self.gathered).chain(payload)).await?;
        }
        Ok(())
    }
}

/// What `future` gives without waiting, if anything.
async fn ready<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}
