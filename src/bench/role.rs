//! The roles of a measurement, each in a process of its own or all in this one.
//!
//! A role takes [`Order`]s and gives [`Report`]s. In a process of its own it reads and writes them as lines of JSON, and
//! ends when its standard input does: when it is no longer needed, and also when this process is killed.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{sleep, timeout};

use super::party::{self, PartyConfig};
use super::pipe::{self, PipeConfig};
use super::round::{self, PeerConfig};
use super::usage::Usage;
use super::{BenchError, Failure};
use crate::broker::{Broker, BrokerConfig};
use crate::events::PhaseSeconds;
use crate::node::Traffic;
use crate::transfer::Manifest;
use crate::types::{PeerId, Round};

/// How long a role may take to end.
const END_MAX: Duration = Duration::from_secs(10);

/// How long rumqttd may take to listen, and how often it is looked whether it does.
const LISTEN_MAX: Duration = Duration::from_secs(10);
const LISTEN_PAUSE: Duration = Duration::from_millis(5);

/// What a process or a task is for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Role {
    /// The embedded broker.
    Broker(HostConfig),
    /// rumqttd behind its own front.
    Rumqttd(HostConfig),
    /// Holds or receives blobs, as peers do.
    Party(PartyConfig),
    /// Sends through the bare pipe.
    PipeSender(PipeConfig),
    /// Receives from the bare pipe.
    PipeReceiver(PipeConfig),
    /// Takes part in whole rounds.
    Peer(Box<PeerConfig>),
}

/// What a broker has to bear.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct HostConfig {
    /// The length of a chunk, in bytes.
    pub chunk_bytes: u32,
    /// How many peers it has room for.
    pub peers: usize,
    /// How many bytes of messages its router keeps for each filter.
    pub log_bytes: usize,
}

impl HostConfig {
    /// A peer has two connections, and each end of a pipe has one.
    fn connections(self) -> usize {
        2 * self.peers + 8
    }
}

/// What a role is asked to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Order {
    /// Pull these blobs of these holders; or, in the pipe, begin. The number tells one measurement from the next.
    Go {
        /// The number of the measurement, from 1 on.
        round: Round,
        /// What to pull, and of whom.
        pulls: Vec<(PeerId, Manifest)>,
    },
    /// Send heartbeats from now on, or no more.
    Beat(bool),
    /// Tell what was used.
    Tally,
}

/// What a role tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Report {
    /// The broker listens there.
    Listens(String),
    /// Connected and subscribed; holds this blob.
    Ready(Option<Manifest>),
    /// The order to go was carried out.
    Done {
        /// From the order until the last chunk, in seconds.
        pull: f64,
        /// From the order until everything was verified, in seconds.
        total: f64,
    },
    /// What was used.
    Tally(Tally),
    /// A round was committed.
    Committed(Committed),
    /// The last model is here: bytes of messages since that of the genesis was.
    Held(#[serde(with = "traffic")] Traffic),
}

/// What a role has used and seen since it started.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Tally {
    /// By its process.
    pub usage: Usage,
    /// Bytes of messages.
    pub sent: u64,
    /// Likewise.
    pub received: u64,
    /// How long each heartbeat was on its way, in seconds.
    pub heartbeats: Vec<f64>,
}

/// A committed round, as one peer saw it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Committed {
    /// Its number.
    pub round: Round,
    /// Whether this peer led.
    pub led: bool,
    /// How long each phase took.
    pub seconds: PhaseSeconds,
    /// What the process has used so far.
    pub usage: Usage,
    /// How much its state takes on disk, in bytes; nothing, if it keeps none.
    pub disk_bytes: u64,
}

mod traffic {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::node::Traffic;

    pub(super) fn serialize<S: Serializer>(traffic: &Traffic, to: S) -> Result<S::Ok, S::Error> {
        (traffic.sent, traffic.received).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Traffic, D::Error> {
        let (sent, received) = Deserialize::deserialize(from)?;
        Ok(Traffic { sent, received })
    }
}

/// A line from a role in a process of its own.
type Line = Result<Report, Failure>;

/// Plays `role` until `orders` end.
async fn play(role: Role, orders: UnboundedReceiver<Order>, reports: UnboundedSender<Line>) {
    let tell = |report| _ = reports.send(Ok(report));
    let played = match role {
        Role::Broker(config) => broker(config, orders, &tell).await,
        Role::Rumqttd(config) => rumqttd(config, orders, &tell).await,
        Role::Party(config) => party::run(config, orders, &tell).await,
        Role::PipeSender(config) => pipe::send(config, orders, &tell).await,
        Role::PipeReceiver(config) => pipe::receive(config, orders, &tell).await,
        Role::Peer(config) => round::take_part(*config, orders, &tell).await,
    };
    if let Err(failure) = played {
        // Nobody listens when the measurement is over.
        let _ = reports.send(Err(failure));
    }
}

async fn broker(
    host: HostConfig,
    mut orders: UnboundedReceiver<Order>,
    tell: &(impl Fn(Report) + Sync),
) -> Result<(), Failure> {
    let config = BrokerConfig::for_chunks(host.chunk_bytes as usize);
    let connections_max = config.connections_max.max(host.connections());
    let config = BrokerConfig { connections_max, log_bytes: host.log_bytes, ..config };
    let broker = Broker::start(config).await.map_err(Failure::broker)?;
    tell(Report::Listens(broker.addr().to_string()));
    while let Some(order) = orders.recv().await {
        if let Order::Tally = order {
            tell(Report::Tally(Tally { usage: Usage::now(), ..Tally::default() }));
        }
    }
    broker.stop().await;
    Ok(())
}

/// It cannot be told to stop, and ends with the process.
async fn rumqttd(
    host: HostConfig,
    mut orders: UnboundedReceiver<Order>,
    tell: &(impl Fn(Report) + Sync),
) -> Result<(), Failure> {
    // It would not say which port it got for port 0.
    let free = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
    let listen = free.map_err(Failure::broker)?;
    let connections = rumqttd::ConnectionSettings {
        connection_timeout_ms: 60_000,
        max_payload_size: BrokerConfig::for_chunks(host.chunk_bytes as usize).packet_bytes_max,
        max_inflight_count: 100,
        auth: None,
        external_auth: None,
        dynamic_filters: false,
    };
    let name = "rumqttd".to_owned();
    let server = rumqttd::ServerSettings { name, listen, tls: None, next_connection_delay_ms: 1, connections };
    let router = rumqttd::RouterConfig {
        max_connections: host.connections(),
        max_outgoing_packet_count: 200,
        max_segment_size: host.log_bytes / 2,
        max_segment_count: 2,
        ..rumqttd::RouterConfig::default()
    };
    let v4 = Some(HashMap::from([("v4".to_owned(), server)]));
    let mut broker = rumqttd::Broker::new(rumqttd::Config { router, v4, ..rumqttd::Config::default() });
    // Why it does not listen it tells the log.
    thread::spawn(move || broker.start().is_ok());
    let listens = async {
        while TcpStream::connect(listen).await.is_err() {
            sleep(LISTEN_PAUSE).await;
        }
    };
    timeout(LISTEN_MAX, listens).await.map_err(|_| Failure::broker(format!("does not listen on {listen}")))?;
    tell(Report::Listens(listen.to_string()));
    while orders.recv().await.is_some() {}
    Ok(())
}

/// Plays the role that `json` describes, with orders from standard input and reports to standard output.
///
/// # Errors
/// When `json` is no role, or nobody reads the reports.
pub async fn play_here(json: &str, out: &mut (dyn Write + Send)) -> io::Result<()> {
    let role: Role = serde_json::from_str(json)?;
    let (sender, orders) = unbounded_channel();
    // A thread, because a read from stdin cannot be given up: it ends with the process.
    thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            let Ok(order) = serde_json::from_str(&line) else { break };
            if sender.send(order).is_err() {
                break;
            }
        }
    });
    let (sender, mut reports) = unbounded_channel();
    tokio::spawn(play(role, orders, sender));
    while let Some(line) = reports.recv().await {
        serde_json::to_writer(&mut *out, &line)?;
        writeln!(out)?;
        out.flush()?;
    }
    Ok(())
}

/// Where roles are played.
#[derive(Clone, Debug)]
pub enum Stage {
    /// Each in a process that runs this program: `rodizio` itself.
    Processes(PathBuf),
    /// All in this process.
    Here,
}

/// A role that is being played. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Actor {
    name: String,
    orders: UnboundedSender<Order>,
    reports: UnboundedReceiver<Line>,
}

impl Actor {
    /// Starts to play a role. `name` is for people.
    pub(super) fn start(stage: &Stage, name: &str, role: Role) -> Result<Self, BenchError> {
        let (orders, to_role) = unbounded_channel();
        let (from_role, reports) = unbounded_channel();
        match stage {
            Stage::Here => _ = tokio::spawn(play(role, to_role, from_role)),
            Stage::Processes(program) => start_process(program, &role, to_role, from_role)
                .map_err(|source| BenchError::Start { role: name.to_owned(), source })?,
        }
        Ok(Self { name: name.to_owned(), orders, reports })
    }

    /// Its name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn order(&self, order: Order) {
        // One that has ended says so in its next report.
        let _ = self.orders.send(order);
    }

    /// The next report; `None` when it has ended well.
    pub(super) async fn next(&mut self) -> Result<Option<Report>, BenchError> {
        let failed = |failure| BenchError::Role { role: self.name.clone(), failure };
        self.reports.recv().await.transpose().map_err(failed)
    }

    /// The next report, before which it must not end.
    pub(super) async fn report(&mut self) -> Result<Report, BenchError> {
        let ended = Failure { why: "ended too early".to_owned(), is_broker: false };
        self.next().await?.ok_or_else(|| BenchError::Role { role: self.name.clone(), failure: ended })
    }

    /// What it has used so far.
    pub(super) async fn tally(&mut self) -> Result<Tally, BenchError> {
        self.order(Order::Tally);
        loop {
            if let Report::Tally(tally) = self.report().await? {
                return Ok(tally);
            }
        }
    }

    /// Ends it and waits for that.
    pub(super) async fn end(self) {
        let Self { orders, mut reports, .. } = self;
        drop(orders);
        // One that does not end in time ends with this process.
        let _ = timeout(END_MAX, async { while reports.recv().await.is_some() {} }).await;
    }
}

fn start_process(
    program: &PathBuf,
    role: &Role,
    mut orders: UnboundedReceiver<Order>,
    reports: UnboundedSender<Line>,
) -> io::Result<()> {
    let mut command = Command::new(program);
    command.args(["bench", "role", &serde_json::to_string(role)?]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    // Ctrl-C in a terminal is for this process, which then ends the others.
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut child = command.spawn()?;
    let (input, output) = (child.stdin.take(), child.stdout.take());
    let (Some(mut input), Some(output)) = (input, output) else { return Err(io::Error::other("it has no pipes")) };
    thread::spawn(move || {
        while let Some(order) = orders.blocking_recv() {
            let line = serde_json::to_string(&order).expect("an order is text and numbers");
            if writeln!(input, "{line}").is_err() {
                break;
            }
        }
    });
    // Not a thread of its own: when the runtime ends, it waits for this, and so for the process.
    tokio::task::spawn_blocking(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            let line = serde_json::from_str(&line).unwrap_or_else(|_| Err(Failure::of(format!("said {line:?}"))));
            if reports.send(line).is_err() {
                break;
            }
        }
        let _ = child.wait();
    });
    Ok(())
}
