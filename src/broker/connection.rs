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

use bytes::{Buf, BufMut, Bytes, BytesMut};
use rumqttd::Notification;
use rumqttd::local::{LinkError, LinkRx, LinkTx};
use rumqttd::protocol::v4::{self, V4};
use rumqttd::protocol::{
    ConnAck, ConnectReturnCode, Disconnect, DisconnectReasonCode, Error as Malformed, LastWill, Packet, Protocol,
    Publish, QoS, matches, valid_filter, valid_topic,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::{BrokerConfig, Links};

/// The first byte of a CONNECT packet.
const CONNECT: u8 = 0x10;

/// The longest first packet: it holds an id, a will and nothing else.
const CONNECT_BYTES_MAX: usize = 64 << 10;

/// Different filters that there is room for, per connection: a peer's two connections use about ten.
pub(super) const FILTERS_PER_CONNECTION: usize = 16;

/// The longest id.
const ID_BYTES_MAX: usize = 256;

/// Room made for a read when no length is known yet.
const READ_BYTES: usize = 8 << 10;

/// Payloads from this size on are written from where they lie; smaller ones are gathered into one write.
const COPY_BYTES_MAX: usize = 4 << 10;

/// How the id of a peer's connection for weights ends.
const WEIGHTS_ID_END: &str = ".bulk";

/// How many bytes of one connection's publishes are known to be on their way back to it. Of more the oldest do come back.
const ECHO_BYTES_MAX: usize = 16 << 20;

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
}

impl Front {
    pub(super) fn new(config: &BrokerConfig, links: Arc<Links>) -> Self {
        Self {
            links,
            seats: Seats::default(),
            filters: Mutex::default(),
            filters_max: FILTERS_PER_CONNECTION * config.connections_max,
            packet_bytes_max: config.packet_bytes_max,
            connect_timeout: config.connect_timeout,
            anonymous: AtomicU64::new(0),
        }
    }

    /// Serves one connection until it ends.
    pub(super) async fn serve(&self, mut socket: TcpStream) -> Closed {
        let Err(closed) = self.converse(&mut socket).await;
        closed
    }

    async fn converse(&self, socket: &mut TcpStream) -> Result<Infallible, Closed> {
        socket.set_nodelay(true)?;
        let mut received = BytesMut::new();
        let greeting = timeout(self.connect_timeout, self.greet(socket, &mut received)).await;
        let greeting = greeting.map_err(|_| Closed::Silent)??;

        let mut seat = self.seats.claim(&greeting.id).await;
        let (links, id) = (self.links.clone(), greeting.id.clone());
        let opened = spawn_blocking(move || links.open(&id)).await;
        let (mut to_router, from_router, ack) = opened.ok().flatten().ok_or(Closed::Stopped)?;

        let (unacked, echoes) = (Unacked::default(), Echoes::of(&greeting.id));
        let (reading, writing) = socket.split();
        let reader = Reader { front: self, unacked: &unacked, echoes: &echoes, to_router: &mut to_router };
        let ended = tokio::select! {
            ended = reader.run(reading, received, greeting.silence) => ended,
            ended = write(writing, from_router, ack, &unacked, &echoes) => ended,
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
    async fn greet(&self, socket: &mut TcpStream, received: &mut BytesMut) -> Result<Greeting, Closed> {
        let first = loop {
            if received.first().is_some_and(|&byte| byte != CONNECT) {
                return Err(Closed::Refused("its first packet is not CONNECT"));
            }
            match V4.read_mut(received, CONNECT_BYTES_MAX.min(self.packet_bytes_max)) {
                Ok(packet) => break packet,
                Err(Malformed::InsufficientBytes(missing)) => read_some(socket, received, missing).await?,
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

fn check_topic(topic: &[u8]) -> Result<(), Closed> {
    match str::from_utf8(topic) {
        // The router cuts the first byte off to look for a `$`, which must not cut a letter in two.
        Ok(topic) if topic.is_char_boundary(1) && !topic.starts_with('$') && valid_topic(topic) => Ok(()),
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

/// The weights that a connection has published to a filter of its own: they are not sent back to it.
///
/// MQTT 3.1.1 would have it so (MQTT 5 lets a subscriber choose). A leader that broadcasts a model to four receivers
/// would be the fifth of them. It is so for the connections of peers that carry weights, and for nobody else.
struct Echoes {
    applies: bool,
    filters: Mutex<Vec<String>>,
    /// In their order. The router passes a payload on as it is, so that the place in memory tells which it is; and has
    /// it in its log for as long as it is here.
    published: Mutex<VecDeque<Bytes>>,
}

impl Echoes {
    /// For the connection with this id.
    fn of(id: &str) -> Self {
        Self { applies: id.ends_with(WEIGHTS_ID_END), filters: Mutex::default(), published: Mutex::default() }
    }

    /// What is sent at QoS 1 has to be acknowledged, and so to be sent.
    fn subscribed(&self, filter: &str, qos: QoS) {
        if self.applies && qos == QoS::AtMostOnce {
            let mut filters = self.filters.lock().unwrap_or_else(PoisonError::into_inner);
            if !filters.iter().any(|known| known == filter) {
                filters.push(filter.to_owned());
            }
        }
    }

    fn unsubscribed(&self, filter: &str) {
        self.filters.lock().unwrap_or_else(PoisonError::into_inner).retain(|known| known != filter);
    }

    fn published(&self, publish: &Publish) {
        if !self.applies || publish.payload.len() <= COPY_BYTES_MAX {
            return;
        }
        let Ok(topic) = str::from_utf8(&publish.topic) else { return };
        if self.filters.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|filter| matches(topic, filter)) {
            let mut published = self.published.lock().unwrap_or_else(PoisonError::into_inner);
            published.push_back(publish.payload.clone());
            while published.iter().map(Bytes::len).sum::<usize>() > ECHO_BYTES_MAX {
                published.pop_front();
            }
        }
    }

    /// Whether this is one of them, which is then forgotten, with those that the router has lost before it.
    fn is_echo(&self, payload: &Bytes) -> bool {
        if !self.applies {
            return false;
        }
        let mut published = self.published.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |own: &Bytes| own.as_ptr() == payload.as_ptr() && own.len() == payload.len();
        let place = published.iter().position(same);
        place.is_some_and(|place| published.drain(..=place).next().is_some())
    }
}

/// The way from the socket to the router.
struct Reader<'a> {
    front: &'a Front,
    unacked: &'a Unacked,
    echoes: &'a Echoes,
    to_router: &'a mut LinkTx,
}

impl Reader<'_> {
    async fn run(
        mut self,
        mut socket: ReadHalf<'_>,
        mut received: BytesMut,
        silence: Duration,
    ) -> Result<Infallible, Closed> {
        loop {
            let missing = self.hand_on(&mut received).await?;
            let read = read_some(&mut socket, &mut received, missing);
            timeout(silence, read).await.map_err(|_| Closed::Silent)??;
        }
    }

    /// Hands on the packets that `received` holds whole; returns how many bytes the next one lacks.
    async fn hand_on(&mut self, received: &mut BytesMut) -> Result<usize, Closed> {
        let mut last = None;
        let stopped_by = loop {
            if is_exactly_once(received) {
                break Closed::Refused("it publishes at QoS 2, which is not offered");
            }
            match V4.read_mut(received, self.front.packet_bytes_max) {
                Ok(packet) => match self.check(packet) {
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

    /// Lets through what does not harm the router.
    fn check(&self, packet: Packet) -> Result<Packet, Closed> {
        match packet {
            Packet::Publish(mut publish, _) => {
                check_topic(&publish.topic)?;
                if publish.retain {
                    // It may be kept for ever, the buffer it was read into must not.
                    publish.topic = Bytes::copy_from_slice(&publish.topic);
                    publish.payload = Bytes::copy_from_slice(&publish.payload);
                } else {
                    self.echoes.published(&publish);
                }
                Ok(Packet::Publish(publish, None))
            }
            Packet::Subscribe(mut subscribe, _) => {
                for filter in &mut subscribe.filters {
                    self.front.admit(&filter.path)?;
                    self.echoes.subscribed(&filter.path, filter.qos);
                    if filter.qos == QoS::ExactlyOnce {
                        filter.qos = QoS::AtLeastOnce;
                    }
                }
                Ok(Packet::Subscribe(subscribe, None))
            }
            Packet::PubAck(ack, _) => {
                self.unacked.acked(ack.pkid)?;
                Ok(Packet::PubAck(ack, None))
            }
            Packet::Unsubscribe(unsubscribe, _) => {
                unsubscribe.filters.iter().for_each(|filter| self.echoes.unsubscribed(filter));
                Ok(Packet::Unsubscribe(unsubscribe, None))
            }
            Packet::PingReq(_) => Ok(packet),
            Packet::Disconnect(..) => Err(Closed::Goodbye),
            _ => Err(Closed::Refused("it sends what only a broker sends")),
        }
    }
}

/// Whether the packet that begins here is a PUBLISH at QoS 2. rumqttd does not show the QoS of a parsed one.
fn is_exactly_once(received: &[u8]) -> bool {
    received.first().is_some_and(|byte| byte & 0b1111_0110 == 0b0011_0100)
}

/// Reads what is there, with room for at least `missing` bytes.
async fn read_some(
    socket: &mut (impl AsyncReadExt + Unpin),
    received: &mut BytesMut,
    missing: usize,
) -> Result<(), Closed> {
    if received.capacity() - received.len() < missing {
        // With a long packet's length known the buffer ends where it ends, and the next one gets its own.
        received.reserve(missing.max(READ_BYTES));
    }
    match socket.read_buf(received).await? {
        0 => Err(Closed::Eof),
        _ => Ok(()),
    }
}

async fn write_ack(socket: &mut (impl AsyncWriteExt + Unpin), code: ConnectReturnCode) -> Result<(), Closed> {
    let mut bytes = BytesMut::new();
    V4.write(Packet::ConnAck(ConnAck { session_present: false, code }, None), &mut bytes)?;
    Ok(socket.write_all(&bytes).await?)
}

/// The way from the router to the socket.
async fn write(
    mut socket: WriteHalf<'_>,
    mut from_router: LinkRx,
    ack: Notification,
    unacked: &Unacked,
    echoes: &Echoes,
) -> Result<Infallible, Closed> {
    let mut gathered = BytesMut::new();
    let mut next = Some(ack);
    loop {
        let mut paused = false;
        loop {
            match next {
                // The router waits for this connection to catch up.
                Some(Notification::Unschedule) => paused = true,
                Some(notification) => write_one(&mut socket, notification, &mut gathered, unacked, echoes).await?,
                None => {}
            }
            match ready(from_router.next()).await {
                Some(notification) => next = notification?,
                None => break,
            }
        }
        socket.write_all_buf(&mut gathered).await?;
        if paused {
            from_router.wake().await?;
        }
        next = from_router.next().await?;
    }
}

/// Writes one packet, or only gathers it when it is small.
async fn write_one(
    socket: &mut WriteHalf<'_>,
    notification: Notification,
    gathered: &mut BytesMut,
    unacked: &Unacked,
    echoes: &Echoes,
) -> Result<(), Closed> {
    let packet: Option<Packet> = notification.into();
    let payload = match packet {
        Some(Packet::Publish(publish, _)) if echoes.is_echo(&publish.payload) => return Ok(()),
        Some(Packet::Publish(publish, _)) => encode_publish(publish, gathered, unacked)?,
        Some(packet) => {
            V4.write(packet, gathered)?;
            Bytes::new()
        }
        None => return Ok(()),
    };
    if payload.len() <= COPY_BYTES_MAX {
        gathered.extend_from_slice(&payload);
        if gathered.len() >= GATHER_BYTES {
            socket.write_all_buf(gathered).await?;
        }
    } else {
        socket.write_all_buf(&mut gathered.chain(payload)).await?;
    }
    Ok(())
}

/// Writes all of a PUBLISH but its payload, which is returned.
fn encode_publish(mut publish: Publish, bytes: &mut BytesMut, unacked: &Unacked) -> Result<Bytes, Closed> {
    let payload = mem::take(&mut publish.payload);
    let mut bare = BytesMut::with_capacity(publish.topic.len() + 16);
    V4.write(Packet::Publish(publish, None), &mut bare)?;
    let (length_bytes, _) = v4::length(bare[1..].iter())?;
    let header = &bare[1 + length_bytes..];
    if bare[0] & 0b0110 != 0 {
        // Above QoS 0 the header ends with the packet's id.
        unacked.sent((&header[header.len() - 2..]).get_u16());
    }
    bytes.put_u8(bare[0]);
    v4::write_remaining_length(bytes, header.len() + payload.len())?;
    bytes.extend_from_slice(header);
    Ok(payload)
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
