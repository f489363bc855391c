//! The connection for weights.
//!
//! Weights are nearly all that a peer moves, and rumqttc copies each message on its way out and reads each into new
//! memory. Here it encodes and parses the packets and does nothing else: messages are written from where they lie, and
//! read into memory that is used again.

use std::convert::Infallible;
use std::future::pending;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use rumqttc::mqttbytes::Error as CodecError;
use rumqttc::{Connect, ConnectReturnCode, ConnectionError, MqttOptions, Packet, Publish, QoS, StateError, Subscribe};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::WriteHalf;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};

use super::pieces::{self, Joiner};
use super::{Broker, Ended, Inbox, Lane, Limits, Order, Rejected, WRITE_MAX, is_consent, reason, subscriptions};
use crate::buffers::Buffers;
use crate::packets::{PublishHead, Received};
use crate::transport::Outgoing;

/// The id of the one request that wants one.
const SUBSCRIBE_ID: u16 = 1;

/// A connection for weights that the broker has let in.
pub(super) struct Bulk {
    socket: TcpStream,
    reader: Reader,
    keep_alive: Duration,
    limits: Limits,
}

impl Bulk {
    pub(super) async fn open(options: &MqttOptions, broker: &Broker, limits: Limits) -> Result<Self, ConnectionError> {
        let socket = TcpStream::connect(broker.to_string()).await?;
        socket.set_nodelay(true)?;
        let (reader, keep_alive) = (Reader::new(options.max_packet_size()), options.keep_alive());
        let mut bulk = Self { socket, reader, keep_alive, limits };
        let mut connect = Connect::new(options.client_id());
        connect.keep_alive = u16::try_from(keep_alive.as_secs()).unwrap_or(u16::MAX);
        write_packet(&mut bulk.socket, &Packet::Connect(connect)).await?;
        match bulk.reader.next(&mut bulk.socket).await? {
            Packet::ConnAck(ack) if ack.code == ConnectReturnCode::Success => Ok(bulk),
            Packet::ConnAck(ack) => Err(ConnectionError::ConnectionRefused(ack.code)),
            other => Err(ConnectionError::NotConnAck(other)),
        }
    }

    /// Subscribes, and waits until that is done.
    pub(super) async fn subscribe(&mut self, filters: &[String]) -> Result<(), Rejected> {
        if filters.is_empty() {
            return Ok(());
        }
        let mut subscribe = Subscribe::new_many(subscriptions(filters, Lane::Bulk));
        subscribe.pkid = SUBSCRIBE_ID;
        write_packet(&mut self.socket, &Packet::Subscribe(subscribe)).await?;
        loop {
            match self.reader.next(&mut self.socket).await? {
                Packet::SubAck(ack) if is_consent(&ack) => return Ok(()),
                Packet::SubAck(_) => return Err(Rejected::Subscription),
                _ => {}
            }
        }
    }

    /// Moves messages until the connection ends.
    pub(super) async fn run(mut self, orders: UnboundedReceiver<Order>, inbox: Inbox) -> Ended {
        let (mut reading, writing) = self.socket.split();
        let (keep_alive, limits, awaits_answer) = (self.keep_alive, self.limits, &AtomicBool::new(false));
        let mut writer = Writer { socket: writing, keep_alive, limits, awaits_answer, has_said_goodbye: false };
        let Err(error) = tokio::select! {
            ended = self.reader.run(&mut reading, &inbox, awaits_answer) => ended,
            ended = writer.run(orders) => ended,
        };
        // The broker closes the connection when it has read our goodbye; closing it ourselves could overtake it.
        if writer.has_said_goodbye { Ended::Goodbye } else { Ended::Lost(reason(&error)) }
    }
}

/// The way from the socket.
struct Reader {
    received: Received,
    buffers: Mutex<Buffers>,
    packet_bytes_max: usize,
}

impl Reader {
    fn new(packet_bytes_max: usize) -> Self {
        Self { received: Received::default(), buffers: Mutex::default(), packet_bytes_max }
    }

    async fn run(
        &mut self,
        socket: &mut (impl AsyncRead + Unpin),
        inbox: &Inbox,
        awaits_answer: &AtomicBool,
    ) -> Result<Infallible, ConnectionError> {
        let mut joiner = Joiner::new(inbox.bytes_max);
        loop {
            match self.next(socket).await? {
                // Nothing else was subscribed to.
                Packet::Publish(publish) if publish.qos == QoS::AtMostOnce => {
                    if let Some(message) = joiner.take(publish.payload) {
                        inbox.put(publish.topic, message);
                    }
                }
                Packet::PingResp => awaits_answer.store(false, Ordering::Relaxed),
                _ => return Err(StateError::WrongPacket.into()),
            }
        }
    }

    async fn next(&mut self, socket: &mut (impl AsyncRead + Unpin)) -> Result<Packet, ConnectionError> {
        loop {
            let missing = match Packet::read(&mut self.received.bytes, self.packet_bytes_max) {
                Ok(packet) => return Ok(packet),
                Err(CodecError::InsufficientBytes(missing)) => missing,
                Err(error) => return Err(StateError::Deserialization(error).into()),
            };
            if self.received.read(socket, missing, &self.buffers).await? == 0 {
                return Err(StateError::ConnectionAborted.into());
            }
        }
    }
}

/// The way to the socket. What the broker does not take yet waits before it, uncopied.
struct Writer<'a> {
    socket: WriteHalf<'a>,
    keep_alive: Duration,
    limits: Limits,
    /// Whether a ping was not answered yet.
    awaits_answer: &'a AtomicBool,
    has_said_goodbye: bool,
}

impl Writer<'_> {
    async fn run(&mut self, mut orders: UnboundedReceiver<Order>) -> Result<Infallible, ConnectionError> {
        let mut pings = interval_at(Instant::now() + self.keep_alive, self.keep_alive);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                order = orders.recv() => match order {
                    Some(Order::Publish(message)) => self.publish(message).await?,
                    Some(Order::Stop) => {
                        write_packet(&mut self.socket, &Packet::Disconnect).await?;
                        self.has_said_goodbye = true;
                        return pending().await;
                    }
                    // The transport was dropped, and this task is about to be.
                    None => return pending().await,
                },
                _ = pings.tick() => {
                    if self.awaits_answer.swap(true, Ordering::Relaxed) {
                        return Err(StateError::AwaitPingResp.into());
                    }
                    write_packet(&mut self.socket, &Packet::PingReq).await?;
                }
            }
        }
    }

    async fn publish(&mut self, message: Outgoing) -> Result<(), ConnectionError> {
        if message.len() <= self.limits.message_bytes {
            let retain = message.retain && self.limits.retain;
            return self.write(message.topic, retain, message.head.chain(message.tail)).await;
        }
        let topic = message.topic.clone();
        for piece in pieces::cut(message.payload(), rand::random(), self.limits.message_bytes) {
            // The broker would keep nothing but the last one.
            self.write(topic.clone(), false, piece).await?;
        }
        Ok(())
    }

    async fn write(&mut self, topic: String, retain: bool, payload: impl Buf) -> Result<(), ConnectionError> {
        let publish = Publish { retain, ..Publish::new(topic, QoS::AtMostOnce, []) };
        let bare = encoded(&Packet::Publish(publish)).map_err(StateError::Deserialization)?;
        let mut head = BytesMut::new();
        PublishHead::of(bare).write(payload.remaining(), &mut head);
        write(&mut self.socket, head.chain(payload)).await
    }
}

async fn write_packet(socket: &mut (impl AsyncWrite + Unpin), packet: &Packet) -> Result<(), ConnectionError> {
    write(socket, encoded(packet).map_err(StateError::Deserialization)?).await
}

fn encoded(packet: &Packet) -> Result<BytesMut, CodecError> {
    let mut bytes = BytesMut::new();
    packet.write(&mut bytes, usize::MAX)?;
    Ok(bytes)
}

async fn write(socket: &mut (impl AsyncWrite + Unpin), mut bytes: impl Buf) -> Result<(), ConnectionError> {
    match timeout(WRITE_MAX[Lane::Bulk as usize], socket.write_all_buf(&mut bytes)).await {
        Ok(written) => Ok(written?),
        Err(_) => Err(ConnectionError::FlushTimeout),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use bytes::Bytes;
    use rumqttd::protocol::{ConnectReturnCode as Answer, Packet as Received, PingResp};
    use tokio::io::duplex;
    use tokio::net::TcpListener;
    use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
    use tokio::task::JoinHandle;

    use super::super::tests::Wire;
    use super::super::{Report, parse_broker};
    use super::*;
    use crate::transport::Class;

    const NO_LIMITS: Limits = Limits { message_bytes: usize::MAX, retain: true };

    /// A connection that runs, and the broker's end of it.
    struct Running {
        orders: UnboundedSender<Order>,
        reports: UnboundedReceiver<Report>,
        running: JoinHandle<Ended>,
        wire: Wire,
    }

    impl Running {
        async fn start(keep_alive: Duration, limits: Limits) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let broker = parse_broker(&listener.local_addr().unwrap().to_string()).unwrap();
            let mut options = MqttOptions::new("a.bulk", &broker.host, broker.port);
            options.set_keep_alive(keep_alive).set_max_packet_size(1 << 20, 1 << 20);
            let serving = async {
                let mut wire = Wire::accept(&listener).await;
                wire.let_in(Answer::Success).await;
                wire
            };
            let (bulk, wire) = tokio::join!(Bulk::open(&options, &broker, limits), serving);
            let ((orders, receiver), (sender, reports)) = (unbounded_channel(), unbounded_channel());
            let running = tokio::spawn(bulk.unwrap().run(receiver, Inbox::new(sender, 0)));
            Self { orders, reports, running, wire }
        }

        fn publish(&self, head: Bytes, tail: Bytes) {
            let message = Outgoing { topic: "t".to_owned(), retain: false, class: Class::Bulk, head, tail };
            assert!(self.orders.send(Order::Publish(message)).is_ok());
        }

        /// The payload of the next packet at the broker.
        async fn published(&mut self) -> Bytes {
            match self.wire.receive().await {
                Received::Publish(publish, None) if publish.topic == "t" => publish.payload,
                other => panic!("{other:?} instead of a message"),
            }
        }

        /// Why the connection was lost.
        async fn lost(self) -> String {
            match self.running.await.unwrap() {
                Ended::Lost(reason) => reason,
                Ended::Goodbye => panic!("nobody said goodbye"),
            }
        }
    }

    fn some(length: usize) -> Bytes {
        (0..length).map(|n| (n % 251) as u8 + 1).collect::<Vec<_>>().into()
    }

    #[tokio::test]
    async fn messages_are_written_byte_for_byte_whatever_their_parts() {
        let mut running = Running::start(Duration::from_secs(60), NO_LIMITS).await;
        let lengths = [(0, 0), (1, 0), (0, 1), (100, 24), (100, 25), (60, 512 << 10), (900_000, 0)];
        for (head, tail) in lengths {
            running.publish(some(head), some(tail));
        }
        for (head, tail) in lengths {
            assert_eq!(running.published().await, [some(head), some(tail)].concat());
        }
    }

    #[tokio::test]
    async fn a_message_that_is_too_long_for_the_broker_goes_in_pieces() {
        let limits = Limits { message_bytes: 1000, ..NO_LIMITS };
        let mut running = Running::start(Duration::from_secs(60), limits).await;
        running.publish(some(100), some(2500));
        running.publish(some(100), some(900));
        let mut joiner = Joiner::new(1 << 20);
        let mut joined = Vec::new();
        while joined.len() < 2 {
            let payload = running.published().await;
            assert!(payload.len() <= 1000);
            joined.extend(joiner.take(payload));
        }
        assert_eq!(joined, [[some(100), some(2500)].concat(), [some(100), some(900)].concat()]);
    }

    #[tokio::test]
    async fn messages_come_byte_for_byte_also_in_the_smallest_reads() {
        let (mut sender, mut socket) = duplex(1);
        let payloads = [0, 1, 20_000, 3, 30_000, 10_000].map(some);
        let sending = async {
            for payload in &payloads {
                let publish = Publish::from_bytes("t/weights/a", QoS::AtMostOnce, payload.clone());
                write_packet(&mut sender, &Packet::Publish(publish)).await.unwrap();
            }
        };
        let mut reader = Reader::new(40_000);
        let receiving = async {
            for payload in &payloads {
                let packet = reader.next(&mut socket).await.unwrap();
                let Packet::Publish(publish) = packet else { panic!("{packet:?} instead of a message") };
                assert_eq!((publish.topic.as_str(), &publish.payload), ("t/weights/a", payload));
            }
        };
        tokio::join!(sending, receiving);
        drop(sender);
        let ended = reader.next(&mut socket).await.unwrap_err();
        assert_eq!(reason(&ended), "the broker closed the connection");
    }

    #[tokio::test]
    async fn a_broker_that_answers_one_ping_and_not_the_next_is_given_up() {
        let mut running = Running::start(Duration::from_secs(1), NO_LIMITS).await;
        assert!(matches!(running.wire.receive().await, Received::PingReq(_)));
        running.wire.send(Received::PingResp(PingResp)).await;
        assert!(matches!(running.wire.receive().await, Received::PingReq(_)));
        assert_eq!(running.lost().await, "the broker does not answer pings");
    }

    /// A part of a message that tells when it is dropped.
    struct Counted {
        bytes: Arc<Vec<u8>>,
        dropped: Arc<AtomicUsize>,
    }

    impl AsRef<[u8]> for Counted {
        fn as_ref(&self) -> &[u8] {
            &self.bytes
        }
    }

    impl Drop for Counted {
        fn drop(&mut self) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn what_a_broker_does_not_take_waits_uncopied_and_comes_when_it_does() {
        // More than the system takes in its stead.
        const COUNT: usize = 200;
        let mut running = Running::start(Duration::from_secs(60), NO_LIMITS).await;
        let (bytes, dropped) = (Arc::new(vec![7; 1_000_000]), Arc::new(AtomicUsize::new(0)));
        for n in 0..COUNT {
            let tail = Counted { bytes: bytes.clone(), dropped: dropped.clone() };
            running.publish(Bytes::from(n.to_be_bytes().to_vec()), Bytes::from_owner(tail));
        }
        // What comes is taken meanwhile.
        let publish = rumqttd::protocol::Publish::new("t/weights/a", "still here", false);
        running.wire.send(Received::Publish(publish, None)).await;
        assert!(
            matches!(running.reports.recv().await, Some(Report::Message { payload, .. }) if payload == "still here")
        );
        assert!(dropped.load(Ordering::Relaxed) < COUNT);
        for n in 0..COUNT {
            let payload = running.published().await;
            assert_eq!((&payload[..8], payload.len()), (&n.to_be_bytes()[..], 8 + bytes.len()));
        }
        assert!(running.orders.send(Order::Stop).is_ok());
        assert!(matches!(running.wire.receive().await, Received::Disconnect(..)));
        assert_eq!(dropped.load(Ordering::Relaxed), COUNT);
    }

    #[tokio::test]
    async fn a_goodbye_follows_all_messages_and_the_broker_closes_the_connection() {
        let mut running = Running::start(Duration::from_secs(60), NO_LIMITS).await;
        running.publish(some(100), some(100_000));
        assert!(running.orders.send(Order::Stop).is_ok());
        assert_eq!(running.published().await.len(), 100_100);
        assert!(matches!(running.wire.receive().await, Received::Disconnect(..)));
        assert!(!running.running.is_finished());
        drop(running.wire);
        assert!(matches!(running.running.await.unwrap(), Ended::Goodbye));
    }

    #[tokio::test]
    async fn a_connection_that_the_broker_closes_is_lost() {
        let Running { orders: _orders, reports: _reports, running, wire } =
            Running::start(Duration::from_secs(60), NO_LIMITS).await;
        drop(wire);
        assert!(matches!(running.await.unwrap(), Ended::Lost(why) if why == "the broker closed the connection"));
    }
}
