//! The embedded MQTT broker: rumqttd's router behind a TCP front of our own.
//!
//! rumqttd's own front can neither say which port it got for port 0 nor stop. This one listens before
//! [`Broker::start`] returns, ends every task and the router's thread in [`Broker::stop`], and keeps away from the
//! router whatever would harm it (see `connection.rs`). Weights go round the router, so that they are freed as soon as they
//! are delivered (see `shelf.rs`). It speaks MQTT 3.1.1 over TCP, QoS 0 and 1, without passwords. Nothing is printed; what
//! happens is told through `tracing`.
//!
//! # Beside Mosquitto
//!
//! Behind its own front rumqttd copies each payload into the buffer that it writes from, reads and writes a connection in
//! turn in one task, and takes new memory for every message, since its logs hold the old one. Here payloads are written
//! from where they were read to, reading and writing go on side by side, and what was delivered is used again. Of the rest
//! nine tenths are the connections' tasks, most of that in the kernel, and one tenth the router's thread. With the same clients (100 MB 1 → 1,
//! chunks of 512 KiB, a busy machine) Mosquitto 2.0.11 took 0.18 s of CPU time for 100 MB and this broker less than 0.07 s:
//! Mosquitto copies payloads as well, and its allocator takes each one's pages from the system and gives them back.

mod connection;
mod shelf;

use std::any::Any;
use std::io;
use std::mem;
use std::net::{Ipv4Addr, SocketAddr};
use std::panic;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use rumqttd::local::{LinkBuilder, LinkRx, LinkTx};
use rumqttd::{Notification, Router, RouterConfig};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tracing::{debug, warn};

use connection::Front;
use shelf::Shelf;

/// Segments of a filter's log: rumqttd forgets the oldest one whole, so more of them forget less at a time. But each may take
/// 240 KB, however few messages it holds.
const LOG_SEGMENTS: usize = 4;

/// rumqttd takes no shorter ones.
const SEGMENT_BYTES_MIN: usize = 1024;

/// What one receiver has asked for and not got yet, at most, in bytes: see [`GATHER_BYTES`](crate::transfer::GATHER_BYTES).
const ASKED_BYTES: usize = 16 << 20;

/// What a chunk on the shelf counts in the log, in bytes: its ticket and its topic.
const TICKET_LOG_BYTES: usize = 128;

/// Messages that the router hands to one connection at a time, and the retained messages that a wildcard
/// subscription at QoS 0 gets (QoS 1: always at most 100).
const BATCH: u64 = 200;

/// How long to leave the listener alone when the system has no room for another connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Where the broker listens and what it bears.
#[derive(Clone, Debug)]
pub struct BrokerConfig {
    /// The address to listen on. Port 0 takes a free one; [`Broker::addr`] tells which.
    pub listen: SocketAddr,

    /// The longest packet taken from anybody, in bytes. It has to hold a chunk and its header: see
    /// [`for_chunks`](Self::for_chunks). A connection that announces a longer one is closed.
    pub packet_bytes_max: usize,

    /// How many connections may be open at once. A peer has two. Further ones are closed at once.
    pub connections_max: usize,

    /// How many bytes of messages are kept per subscription filter, for subscribers that lag behind: topics and payloads,
    /// and of messages that are counted by [`shelf_bytes`](Self::shelf_bytes) only tickets. One that lags further *loses
    /// messages silently*, at every QoS, but for the newest four, however long they are.
    ///
    /// Every filter that is in use keeps so many sooner or later, and a short message takes several times what it counts: the
    /// broker grows until all logs are full. So the default is small, and large federations do lose messages: of 100 peers
    /// that say 4 KiB each to one in the same few milliseconds, of 1,000 that vote at once. Peers repeat what was
    /// not answered, and a founding of 100 peers with summaries of 4 or 48 KiB took no longer than with 16 MiB. What a
    /// leader tells a roster of 1,000 is long, but replaces what it told before. Who publishes in bulk at QoS 1, as no peer
    /// does, needs more: four times what is on its way.
    pub log_bytes: usize,

    /// How many bytes of weights (messages at QoS 0 of more than 4 KiB) may wait for subscribers, of all filters together.
    /// They are freed when the last subscriber has taken them. Of more, the oldest are dropped, so what all receivers
    /// together have asked for should stay below this.
    pub shelf_bytes: usize,

    /// How long a connection may take to introduce itself.
    pub connect_timeout: Duration,
}

impl Default for BrokerConfig {
    /// A free port of this machine alone, packets of up to 4 MiB.
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            packet_bytes_max: 4 << 20,
            connections_max: 256,
            log_bytes: 64 << 10,
            shelf_bytes: 80 << 20,
            connect_timeout: Duration::from_secs(5),
        }
    }
}

impl BrokerConfig {
    /// The default with limits that suit chunks of `chunk_bytes`: at least twice a chunk for a packet (however short
    /// chunks are, what a leader tells thousands is long), at least 64 chunks that may wait, and a log of all chunks that one
    /// receiver has asked for.
    pub fn for_chunks(chunk_bytes: usize) -> Self {
        let default = Self::default();
        let shelf_bytes = default.shelf_bytes.max(64 * chunk_bytes);
        // Short chunks are no weights to the shelf.
        let logged = TICKET_LOG_BYTES + if chunk_bytes > connection::COPY_BYTES_MAX { 0 } else { chunk_bytes };
        let log_bytes = default.log_bytes.max(ASKED_BYTES / chunk_bytes.max(1) * logged);
        let packet_bytes_max = default.packet_bytes_max.max(2 * chunk_bytes + (64 << 10));
        Self { packet_bytes_max, shelf_bytes, log_bytes, ..default }
    }
}

/// Why the broker does not run.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// Somebody listens there already.
    #[error("cannot listen on {0}: address already in use")]
    InUse(SocketAddr),
    /// The system reserves this address or port.
    #[error("cannot listen on {0}: permission denied")]
    Permission(SocketAddr),
    /// Anything else.
    #[error("cannot listen on {addr}: {source}")]
    Other {
        /// The address that was asked for.
        addr: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// A running broker. Dropping it stops it too, only without waiting for the end.
pub struct Broker {
    addr: SocketAddr,
    /// Dropping this ends the front.
    stop: oneshot::Sender<()>,
    /// How many connections are open.
    open: watch::Receiver<usize>,
    front: JoinHandle<()>,
    router: RouterThread,
    shelf: Arc<Shelf>,
}

impl Broker {
    /// Starts a broker that listens when this returns.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub async fn start(config: BrokerConfig) -> Result<Self, BrokerError> {
        let listen = config.listen;
        let failed = |error| listen_error(listen, error);
        let listener = TcpListener::bind(listen).await.map_err(failed)?;
        let addr = listener.local_addr().map_err(failed)?;
        let router = RouterThread::spawn(&config);
        let shelf = Arc::new(Shelf::new(config.shelf_bytes.max(config.packet_bytes_max)));
        let front = Arc::new(Front::new(&config, router.links.clone(), shelf.clone()));
        let (stop, stopped) = oneshot::channel();
        let (count, open) = watch::channel(0);
        let front = tokio::spawn(accept(listener, front, config.connections_max, count, stopped));
        debug!(%addr, "the broker listens");
        Ok(Self { addr, stop, open, front, router, shelf })
    }

    /// The address it listens on, with the real port.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// How many bytes of weights wait for subscribers to take them: at most [`BrokerConfig::shelf_bytes`].
    pub fn waiting_bytes(&self) -> usize {
        self.shelf.bytes()
    }

    /// Waits until no connection is open.
    pub async fn deserted(&self) {
        // An error says that the front has ended, and every connection with it.
        let _ = self.open.clone().wait_for(|open| *open == 0).await;
    }

    /// Closes the listener and every connection and ends the router. The port is free when this returns, and another
    /// broker may start in this process.
    ///
    /// No last will fires: nobody is left to hear it.
    pub async fn stop(self) {
        drop(self.stop);
        if let Err(error) = self.front.await {
            warn!(%error, "the broker's front did not end well");
        }
        self.router.end().await;
    }
}

fn listen_error(addr: SocketAddr, source: io::Error) -> BrokerError {
    match source.kind() {
        io::ErrorKind::AddrInUse => BrokerError::InUse(addr),
        io::ErrorKind::PermissionDenied => BrokerError::Permission(addr),
        _ => BrokerError::Other { addr, source },
    }
}

/// Takes connections until `stopped`, then ends them all.
async fn accept(
    listener: TcpListener,
    front: Arc<Front>,
    connections_max: usize,
    count: watch::Sender<usize>,
    mut stopped: oneshot::Receiver<()>,
) {
    let mut connections = JoinSet::new();
    loop {
        count.send_replace(connections.len());
        tokio::select! {
            _ = &mut stopped => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((socket, from)) if connections.len() < connections_max => {
                    let front = front.clone();
                    connections.spawn(async move {
                        let closed = front.serve(socket).await;
                        debug!(%from, %closed, "a connection ended");
                    });
                }
                Ok((_, from)) => warn!(%from, connections_max, "no room for another connection"),
                Err(error) => {
                    warn!(%error, "cannot take a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
    drop(listener);
    connections.shutdown().await;
}

/// What the router makes of a new connection: the ways to it and from it, and its CONNACK.
type Opened = (LinkTx, LinkRx, Notification);

/// A closure, because the channel to the router has a type that rumqttd does not export.
type Open = dyn Fn(&str) -> Option<Opened> + Send + Sync;

/// How connections are registered with the router.
struct Links {
    open: Box<Open>,
    /// Held while a link opens: one that asks behind the request to end would wait for ever.
    ended: Mutex<bool>,
}

impl Links {
    /// Registers a connection under `id`, unless the router has ended. Blocks until the router answers.
    fn open(&self, id: &str) -> Option<Opened> {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if *ended { None } else { (self.open)(id) }
    }
}

/// The id of the broker's own link. No connection can have it: control characters are refused there.
const OWN_LINK: &str = "\0";

/// Nobody can subscribe to topics that begin with `$`.
const END_TOPIC: &str = "$end";

/// The thread that runs rumqttd's router. Dropping this ends it.
struct RouterThread {
    name: String,
    links: Arc<Links>,
    to_router: LinkTx,
    from_router: LinkRx,
}

impl RouterThread {
    fn spawn(config: &BrokerConfig) -> Self {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let id = STARTED.fetch_add(1, Ordering::Relaxed);
        let router_config = RouterConfig {
            // One more for the link below.
            max_connections: config.connections_max + 1,
            max_outgoing_packet_count: BATCH,
            max_segment_size: (config.log_bytes / LOG_SEGMENTS).max(SEGMENT_BYTES_MIN),
            max_segment_count: LOG_SEGMENTS,
            ..RouterConfig::default()
        };
        let events = Router::new(id, router_config).spawn();
        let open = Box::new(move |id: &str| LinkBuilder::new(id, events.clone()).build().ok());
        let links = Arc::new(Links { open, ended: Mutex::new(false) });
        let (to_router, from_router, _) = links.open(OWN_LINK).expect("a new router has room for its first link");
        Self { name: format!("router-{id}"), links, to_router, from_router }
    }

    /// Ends the thread and waits until it has let go of everything.
    async fn end(mut self) {
        self.ask_to_end();
        while self.from_router.next().await.is_ok() {}
    }

    fn ask_to_end(&mut self) {
        let mut ended = self.links.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if !mem::replace(&mut *ended, true) {
            let end = Bytes::from_owner(EndRouter { thread: self.name.clone() });
            // An error says that the router has ended by itself.
            let _ = self.to_router.publish(END_TOPIC, end);
        }
    }
}

impl Drop for RouterThread {
    fn drop(&mut self) {
        self.ask_to_end();
    }
}

/// A payload that ends the router's thread when the router drops it.
///
/// rumqttd's router cannot be told to stop: it holds a sender of its own queue and so waits on it for ever, with all
/// its logs. But it does drop, on its own thread and holding no lock, each message that nobody has subscribed to.
/// Unwinding from there takes the thread down in order, without the message that a panic would print.
struct EndRouter {
    thread: String,
}

impl AsRef<[u8]> for EndRouter {
    fn as_ref(&self) -> &[u8] {
        &[]
    }
}

impl Drop for EndRouter {
    fn drop(&mut self) {
        let here = thread::current();
        // Elsewhere it is dropped when the router has ended already.
        if here.name() == Some(self.thread.as_str()) && !thread::panicking() {
            let ended: Box<dyn Any + Send> = Box::new("the router was asked to end");
            panic::resume_unwind(ended);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use bytes::{BufMut, BytesMut};
    use rumqttd::protocol::v4::V4;
    use rumqttd::protocol::{
        Connect, ConnectReturnCode, Disconnect, DisconnectReasonCode, Filter, LastWill, Packet, PingReq, Protocol,
        PubAck, PubAckReason, Publish, QoS, RetainForwardRule, Subscribe,
    };
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    /// MQTT by hand: what a well-behaved library would not send can be sent, too.
    struct Wire {
        socket: TcpStream,
        received: BytesMut,
    }

    impl Wire {
        async fn open(broker: &Broker) -> Self {
            Self { socket: TcpStream::connect(broker.addr()).await.unwrap(), received: BytesMut::new() }
        }

        /// Connects under `id` and expects to be let in.
        async fn connect(broker: &Broker, id: &str, will: Option<&str>) -> Self {
            let mut wire = Self::open(broker).await;
            assert_eq!(wire.introduce(id, 60, will).await, Some(ConnectReturnCode::Success));
            wire
        }

        async fn introduce(&mut self, id: &str, keep_alive: u16, will: Option<&str>) -> Option<ConnectReturnCode> {
            let connect = Connect { keep_alive, client_id: id.to_owned(), clean_session: true };
            let will = will.map(|text| LastWill {
                topic: Bytes::from_static(b"wills"),
                message: Bytes::copy_from_slice(text.as_bytes()),
                qos: QoS::AtLeastOnce,
                retain: false,
            });
            self.send(Packet::Connect(connect, None, will, None, None)).await;
            match self.receive().await? {
                Packet::ConnAck(ack, _) => Some(ack.code),
                other => panic!("{other:?} instead of CONNACK"),
            }
        }

        async fn send(&mut self, packet: Packet) {
            let mut bytes = BytesMut::new();
            V4.write(packet, &mut bytes).unwrap();
            self.socket.write_all(&bytes).await.unwrap();
        }

        async fn publish(&mut self, topic: &str, payload: &[u8], retain: bool) {
            let publish = Publish::new(topic.to_owned().into_bytes(), payload.to_vec(), retain);
            self.send(Packet::Publish(publish, None)).await;
        }

        async fn subscribe(&mut self, filter: &str, qos: QoS) {
            let filter = Filter {
                path: filter.to_owned(),
                qos,
                nolocal: false,
                preserve_retain: false,
                retain_forward_rule: RetainForwardRule::OnEverySubscribe,
            };
            self.send(Packet::Subscribe(Subscribe { pkid: 1, filters: vec![filter] }, None)).await;
            assert!(matches!(self.receive().await, Some(Packet::SubAck(..))));
        }

        /// The next packet; `None` when the broker closed the connection.
        async fn receive(&mut self) -> Option<Packet> {
            loop {
                if let Ok(packet) = V4.read_mut(&mut self.received, usize::MAX) {
                    return Some(packet);
                }
                match self.socket.read_buf(&mut self.received).await {
                    Ok(0) | Err(_) => return None,
                    Ok(_) => {}
                }
            }
        }

        async fn payload(&mut self) -> Bytes {
            match self.receive().await {
                Some(Packet::Publish(publish, _)) => publish.payload,
                other => panic!("{other:?} instead of a message"),
            }
        }

        async fn disconnect(mut self) {
            let reason_code = DisconnectReasonCode::NormalDisconnection;
            self.send(Packet::Disconnect(Disconnect { reason_code }, None)).await;
            assert_eq!(self.receive().await, None);
        }
    }

    async fn broker() -> Broker {
        Broker::start(BrokerConfig::default()).await.unwrap()
    }

    /// For a broker whose port is to stay free once it has left it: nobody else takes one of a loopback host that is made
    /// of this process's number.
    pub(crate) fn on_own_host() -> BrokerConfig {
        let [_, high, middle, low] = std::process::id().to_be_bytes();
        // Not every system has more loopback hosts than one.
        let host = if cfg!(target_os = "linux") { [127, high, middle, low] } else { [127, 0, 0, 1] };
        BrokerConfig { listen: (host, 0).into(), ..BrokerConfig::default() }
    }

    /// The broker still serves others.
    async fn assert_well(broker: &Broker) {
        let mut both = Wire::connect(broker, "well", None).await;
        both.subscribe("well/#", QoS::AtMostOnce).await;
        both.publish("well/x", b"well", false).await;
        assert_eq!(both.payload().await, "well");
        both.disconnect().await;
    }

    #[tokio::test]
    async fn weights_are_not_sent_back_to_the_peer_that_published_them_and_everything_else_is() {
        let broker = broker().await;
        let (long, short) = (vec![7; 1 << 20], vec![8; 100]);
        for (id, echoed) in [("rodizio-demo-a.bulk", false), ("anybody", true)] {
            let mut holder = Wire::connect(&broker, id, None).await;
            let mut receiver = Wire::connect(&broker, "rodizio-demo-b.bulk", None).await;
            for wire in [&mut holder, &mut receiver] {
                wire.subscribe("weights/+/all", QoS::AtMostOnce).await;
            }
            // More than are remembered at a time.
            for _ in 0..40 {
                holder.publish("weights/7/all", &long, false).await;
                assert_eq!(receiver.payload().await, long);
                if echoed {
                    assert_eq!(holder.payload().await, long);
                }
            }
            holder.publish("weights/7/b", &long, false).await;
            holder.publish("weights/7/all", &short, false).await;
            receiver.publish("weights/7/all", &long, false).await;
            assert_eq!(holder.payload().await, short, "only long ones are weights");
            assert_eq!(holder.payload().await, long, "it is another's");
            holder.disconnect().await;
        }
    }

    /// Fifty times what may wait passes by a connection that reads nothing.
    #[tokio::test]
    async fn a_subscriber_that_stalls_neither_grows_the_broker_nor_holds_up_the_others() {
        const CHUNK: usize = 1 << 20;
        const COUNT: u32 = 100;
        let config = BrokerConfig { shelf_bytes: 2 * CHUNK, ..BrokerConfig::default() };
        let (most, broker) = (config.shelf_bytes.max(config.packet_bytes_max), Broker::start(config).await.unwrap());
        let mut holder = Wire::connect(&broker, "rodizio-demo-a.bulk", None).await;
        let mut stalled = Wire::connect(&broker, "rodizio-demo-b.bulk", None).await;
        let mut receiver = Wire::connect(&broker, "rodizio-demo-c.bulk", None).await;
        for wire in [&mut holder, &mut stalled, &mut receiver] {
            wire.subscribe("weights/+/all", QoS::AtMostOnce).await;
        }
        let chunk = |n: u32| [&n.to_be_bytes()[..], &vec![0; CHUNK - 4]].concat();
        for n in 0..COUNT {
            holder.publish("weights/1/all", &chunk(n), false).await;
            assert_eq!(receiver.payload().await, chunk(n));
            let waiting = broker.waiting_bytes();
            assert!(waiting <= most, "{waiting} bytes wait after chunk {n}");
        }
        let waiting = broker.waiting_bytes();
        assert!(waiting >= CHUNK, "the one that stalls has taken all: {waiting} bytes wait");

        // What it gets when it goes on is whole and in order, some is missing, and it takes part as before.
        let mut found = Vec::new();
        while found.last() != Some(&(COUNT - 1)) {
            let payload = stalled.payload().await;
            assert_eq!(payload.len(), CHUNK);
            found.push(u32::from_be_bytes(payload[..4].try_into().unwrap()));
        }
        assert!(found.is_sorted() && found.len() < COUNT as usize, "{found:?}");
        holder.publish("weights/2/all", &chunk(COUNT), false).await;
        for wire in [&mut stalled, &mut receiver] {
            assert_eq!(wire.payload().await, chunk(COUNT));
        }
        assert_eq!(broker.waiting_bytes(), 0);
    }

    #[tokio::test]
    async fn what_waits_for_a_connection_goes_with_it() {
        let broker = broker().await;
        let mut holder = Wire::connect(&broker, "holder", None).await;
        let mut stalled = Wire::connect(&broker, "stalled", None).await;
        stalled.subscribe("weights", QoS::AtMostOnce).await;
        // More than the buffers of its socket hold.
        for _ in 0..40 {
            holder.publish("weights", &vec![1; 1 << 20], false).await;
        }
        holder.send(Packet::PingReq(PingReq)).await;
        assert!(matches!(holder.receive().await, Some(Packet::PingResp(_))));
        assert!(broker.waiting_bytes() > 0);
        drop((holder, stalled));
        broker.deserted().await;
        assert_eq!(broker.waiting_bytes(), 0);
    }

    #[tokio::test]
    async fn weights_go_round_the_router_also_for_a_subscriber_at_qos_1() {
        let broker = broker().await;
        let (mut once, mut surely) =
            (Wire::connect(&broker, "once", None).await, Wire::connect(&broker, "surely", None).await);
        once.subscribe("weights", QoS::AtMostOnce).await;
        surely.subscribe("weights", QoS::AtLeastOnce).await;
        // More than the router would keep for it.
        for n in 0..100 {
            once.publish("weights", &[n; 10_000], false).await;
        }
        for n in 0..100 {
            assert_eq!(surely.payload().await, [n; 10_000][..]);
            surely.send(acknowledge(u16::from(n) + 1)).await;
            assert_eq!(once.payload().await, [n; 10_000][..]);
        }
        assert_eq!(broker.waiting_bytes(), 0);
    }

    #[tokio::test]
    async fn port_0_becomes_a_real_port_and_two_brokers_run_at_once() {
        let (one, two) = (broker().await, broker().await);
        assert_ne!(one.addr().port(), 0);
        assert_ne!(one.addr(), two.addr());
        let mut listener = Wire::connect(&one, "listener", None).await;
        listener.subscribe("topic", QoS::AtMostOnce).await;
        Wire::connect(&two, "other", None).await.publish("topic", b"of two", false).await;
        assert_well(&two).await;
        Wire::connect(&one, "other", None).await.publish("topic", b"of one", false).await;
        assert_eq!(listener.payload().await, "of one");
    }

    #[tokio::test]
    async fn a_broker_is_deserted_when_the_last_connection_has_ended() {
        let broker = broker().await;
        broker.deserted().await;
        let (one, other) = (Wire::connect(&broker, "one", None).await, Wire::connect(&broker, "other", None).await);
        let mut deserted = std::pin::pin!(broker.deserted());
        one.disconnect().await;
        assert!(
            std::future::poll_fn(|context| std::task::Poll::Ready(deserted.as_mut().poll(context).is_pending())).await
        );
        drop(other);
        deserted.await;
    }

    #[tokio::test]
    async fn a_stopped_broker_closes_its_connections_and_leaves_its_port() {
        let first = Broker::start(on_own_host()).await.unwrap();
        let addr = first.addr();
        let mut wire = Wire::connect(&first, "a", None).await;
        wire.publish("kept", b"kept", true).await;
        first.stop().await;
        assert_eq!(wire.receive().await, None);

        let second = Broker::start(BrokerConfig { listen: addr, ..BrokerConfig::default() }).await.unwrap();
        assert_eq!(second.addr(), addr);
        let mut wire = Wire::connect(&second, "a", None).await;
        wire.subscribe("kept", QoS::AtMostOnce).await;
        wire.publish("kept", b"new", false).await;
        assert_eq!(wire.payload().await, "new", "nothing is left of the first broker");
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn no_thread_outlives_its_broker() {
        fn threads_named(name: &str) -> usize {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap();
            let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
            names.filter(|found| found.trim_end() == name).count()
        }
        // A thread gives itself its name once it runs, and ends some time after it was told to.
        async fn become_so_many(name: &str, count: usize) {
            let looking = async {
                while threads_named(name) != count {
                    tokio::task::yield_now().await;
                }
            };
            let limit = Duration::from_secs(60);
            tokio::time::timeout(limit, looking).await.unwrap_or_else(|_| panic!("{count} threads {name}"));
        }
        let stopped = broker().await;
        let name = stopped.router.name.clone();
        become_so_many(&name, 1).await;
        stopped.stop().await;
        become_so_many(&name, 0).await;

        let dropped = broker().await;
        let name = dropped.router.name.clone();
        become_so_many(&name, 1).await;
        drop(dropped);
        become_so_many(&name, 0).await;
    }

    #[tokio::test]
    async fn an_address_in_use_is_named() {
        let first = broker().await;
        let addr = first.addr();
        let second = Broker::start(BrokerConfig { listen: addr, ..BrokerConfig::default() }).await;
        let error = second.err().expect("two listeners on one port");
        assert!(matches!(error, BrokerError::InUse(_)));
        assert_eq!(error.to_string(), format!("cannot listen on {addr}: address already in use"));
        assert_well(&first).await;
    }

    #[tokio::test]
    async fn a_retained_message_waits_for_later_subscribers_until_it_is_cleared() {
        let broker = broker().await;
        let mut writer = Wire::connect(&broker, "writer", None).await;
        writer.publish("init/a", b"hello", true).await;
        let mut early = Wire::connect(&broker, "early", None).await;
        early.subscribe("init/+", QoS::AtLeastOnce).await;
        assert_eq!(early.payload().await, "hello");
        writer.publish("init/a", b"", true).await;
        assert_eq!(early.payload().await, "");
        let mut late = Wire::connect(&broker, "late", None).await;
        late.subscribe("init/+", QoS::AtLeastOnce).await;
        writer.publish("init/b", b"new", false).await;
        assert_eq!(late.payload().await, "new");
    }

    #[tokio::test]
    async fn a_last_will_fires_when_a_connection_breaks_and_not_after_a_goodbye() {
        let broker = broker().await;
        let mut watcher = Wire::connect(&broker, "watcher", None).await;
        watcher.subscribe("wills", QoS::AtLeastOnce).await;

        drop(Wire::connect(&broker, "fin", Some("closed")).await);
        assert_eq!(watcher.payload().await, "closed");
        watcher.send(acknowledge(1)).await;

        let reset = Wire::connect(&broker, "rst", Some("reset")).await;
        reset.socket.set_zero_linger().unwrap();
        drop(reset);
        assert_eq!(watcher.payload().await, "reset");
        watcher.send(acknowledge(2)).await;

        let mut silent = Wire::open(&broker).await;
        silent.introduce("silent", 1, Some("silent")).await.unwrap();
        assert_eq!(watcher.payload().await, "silent");
        assert_eq!(silent.receive().await, None);
        watcher.send(acknowledge(3)).await;

        // Its will would have come before the broker closed it.
        Wire::connect(&broker, "polite", Some("polite")).await.disconnect().await;
        watcher.publish("wills", b"nothing else", false).await;
        assert_eq!(watcher.payload().await, "nothing else");
    }

    fn acknowledge(pkid: u16) -> Packet {
        Packet::PubAck(PubAck { pkid, reason: PubAckReason::Success }, None)
    }

    #[tokio::test]
    async fn the_second_connection_of_an_id_throws_the_first_one_out_without_its_will() {
        let broker = broker().await;
        let mut watcher = Wire::connect(&broker, "watcher", None).await;
        watcher.subscribe("wills", QoS::AtMostOnce).await;
        let mut wires = vec![Wire::connect(&broker, "twin", Some("will 0")).await];
        for n in 1..20 {
            wires.push(Wire::connect(&broker, "twin", Some(&format!("will {n}"))).await);
            assert_eq!(wires[n - 1].receive().await, None);
        }
        let last = wires.last_mut().unwrap();
        last.publish("wills", b"alive", false).await;
        assert_eq!(watcher.payload().await, "alive");
        drop(wires);
        assert_eq!(watcher.payload().await, "will 19");
    }

    #[tokio::test]
    async fn who_says_nothing_is_closed() {
        let config = BrokerConfig { connect_timeout: Duration::from_millis(50), ..BrokerConfig::default() };
        let broker = Broker::start(config).await.unwrap();
        assert_eq!(Wire::open(&broker).await.receive().await, None);
    }

    #[tokio::test]
    async fn keepalive_0_and_ids_that_the_router_cannot_bear_are_refused() {
        let broker = broker().await;
        assert_eq!(Wire::open(&broker).await.introduce("immortal", 0, None).await, None);
        for id in ["a/b", "a#", "+", "$a", "\0", &"x".repeat(257)] {
            let code = Wire::open(&broker).await.introduce(id, 60, None).await;
            assert_eq!(code, Some(ConnectReturnCode::ClientIdentifierNotValid), "{id:?}");
        }
        for id in ["rodizio-lab-ward_3.lab", "a:b.bulk", "", ""] {
            let code = Wire::open(&broker).await.introduce(id, 60, None).await;
            assert_eq!(code, Some(ConnectReturnCode::Success), "{id:?}");
        }
    }

    #[tokio::test]
    async fn another_version_of_mqtt_is_told_so() {
        let broker = broker().await;
        let mut wire = Wire::open(&broker).await;
        wire.socket.write_all(b"\x10\x0d\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x00").await.unwrap();
        let Some(Packet::ConnAck(ack, _)) = wire.receive().await else { panic!("no CONNACK") };
        assert_eq!(ack.code, ConnectReturnCode::RefusedProtocolVersion);
    }

    #[tokio::test]
    async fn what_is_not_mqtt_ends_its_own_connection_only() {
        let config = BrokerConfig { packet_bytes_max: 1000, ..BrokerConfig::default() };
        let broker = Broker::start(config).await.unwrap();
        let first: [&[u8]; 5] =
            [b"GET / HTTP/1.1\r\n\r\n", &[0xff; 64], &[0x10, 0xff, 0xff, 0xff, 0x7f], &[0x10, 0], &[0xc0, 0]];
        for garbage in first {
            let mut wire = Wire::open(&broker).await;
            wire.socket.write_all(garbage).await.unwrap();
            assert_eq!(wire.receive().await, None, "{garbage:x?} was taken");
        }
        let mut too_long = BytesMut::from(&[0x30, 0xe9, 0x07][..]);
        too_long.put_bytes(0, 1001);
        let later: [(&str, &[u8]); 12] = [
            ("a packet longer than packet_bytes_max", &too_long),
            ("a packet of no type", &[0xf0, 0]),
            ("a second CONNECT", b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01a"),
            ("a topic that begins with a letter of two bytes", b"\x30\x05\x00\x03\xc3\xa9x"),
            ("a topic that is not UTF-8", b"\x30\x04\x00\x02\xff\xff"),
            ("an empty topic", b"\x30\x02\x00\x00"),
            ("a topic with a wildcard", b"\x30\x05\x00\x03a/#"),
            ("a topic of the broker's own", b"\x30\x06\x00\x04$end"),
            ("a message at QoS 2", b"\x34\x05\x00\x01a\x00\x01"),
            ("an acknowledgement of nothing", &[0x40, 2, 0, 1]),
            ("a filter that is none", b"\x82\x08\x00\x01\x00\x03#/a\x00"),
            ("a shared filter", b"\x82\x0e\x00\x01\x00\x09$share/a/\x00"),
        ];
        for (what, bytes) in later {
            let mut wire = Wire::connect(&broker, "rogue", None).await;
            wire.socket.write_all(bytes).await.unwrap();
            assert_eq!(wire.receive().await, None, "{what} was taken");
        }
        assert_well(&broker).await;
    }

    #[tokio::test]
    async fn filters_are_counted_because_each_costs_memory() {
        let config = BrokerConfig { connections_max: 1, ..BrokerConfig::default() };
        let broker = Broker::start(config).await.unwrap();
        let mut wire = Wire::connect(&broker, "a", None).await;
        for n in 0..connection::FILTERS_PER_CONNECTION {
            wire.subscribe(&format!("topic/{n}"), QoS::AtMostOnce).await;
        }
        wire.subscribe("topic/0", QoS::AtMostOnce).await;
        let one_more = b"\x82\x06\x00\x01\x00\x01x\x00";
        wire.socket.write_all(one_more).await.unwrap();
        assert_eq!(wire.receive().await, None);
    }

    #[tokio::test]
    async fn one_connection_too_many_is_closed_until_there_is_room() {
        let config = BrokerConfig { connections_max: 2, ..BrokerConfig::default() };
        let broker = Broker::start(config).await.unwrap();
        let first = Wire::connect(&broker, "first", None).await;
        let _second = Wire::connect(&broker, "second", None).await;
        assert_eq!(Wire::open(&broker).await.receive().await, None);
        first.disconnect().await;
        // The end of the first one and the beginning of the next are not in order.
        loop {
            let mut third = Wire::open(&broker).await;
            let connect = Connect { keep_alive: 60, client_id: "third".to_owned(), clean_session: true };
            let mut bytes = BytesMut::new();
            V4.write(Packet::Connect(connect, None, None, None, None), &mut bytes).unwrap();
            if third.socket.write_all(&bytes).await.is_ok() && third.receive().await.is_some() {
                break;
            }
        }
    }

    /// The router pauses a connection that does not keep up, at 200 messages; each time it has to be woken.
    #[tokio::test]
    async fn a_reader_that_lags_gets_every_message_in_order() {
        const COUNT: u32 = 20_000;
        let config = BrokerConfig { log_bytes: 16 << 20, ..BrokerConfig::default() };
        let broker = Broker::start(config).await.unwrap();
        let mut reader = Wire::connect(&broker, "reader", None).await;
        reader.subscribe("count", QoS::AtMostOnce).await;
        let mut writer = Wire::connect(&broker, "writer", None).await;
        for n in 0..COUNT {
            writer.publish("count", &[&n.to_be_bytes()[..], &[0; 500]].concat(), false).await;
        }
        // All of them are in the log before the first is read.
        writer.send(Packet::PingReq(PingReq)).await;
        assert!(matches!(writer.receive().await, Some(Packet::PingResp(_))));
        for n in 0..COUNT {
            assert_eq!(reader.payload().await[..4], n.to_be_bytes());
        }
    }

    #[tokio::test]
    async fn a_long_message_passes_whole() {
        let broker = broker().await;
        let mut wire = Wire::connect(&broker, "a", None).await;
        wire.subscribe("long", QoS::AtLeastOnce).await;
        for (id, length) in [(1, 1 << 20), (2, COPIED), (3, COPIED + 1), (4, 0), (5, 3 << 20)] {
            let payload: Vec<u8> = (0..length).map(|n: usize| (n % 251) as u8).collect();
            wire.publish("long", &payload, false).await;
            assert_eq!(wire.payload().await, payload);
            wire.send(acknowledge(id)).await;
        }
    }

    /// The longest payload that is copied on its way out.
    const COPIED: usize = 4 << 10;
}
