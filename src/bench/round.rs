//! Whole rounds of real nodes, whose trainers do next to nothing: what a round costs beside training.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::machine::{Gauge, Machine};
use super::party::PartyConfig;
use super::role::{Actor, Committed, Order, Report, Role};
use super::trainer::ConstantTrainer;
use super::usage::Usage;
use super::{BenchError, Failure, Growth, Heartbeat, RoleUsage, Setting, Site, Wire, mb_per_s, median};
use crate::events::PhaseSeconds;
use crate::journal::Journal;
use crate::node::{self, Node, Observation, Outcome, Storage, Traffic};
use crate::protocol::{Config, Notice, Policy};
use crate::transfer::{Codec, Codecs};
use crate::types::{PeerId, Round};

/// How often this machine is measured before the rounds, and again after them.
const GAUGES: usize = 3;

/// Which rounds to measure.
#[derive(Clone, Debug)]
pub struct RoundOptions {
    /// What every measurement is told.
    pub setting: Setting,
    /// How many peers take part; the first one leads every round. From 3 on: the aggregate of one trainer's update is that
    /// update, which the trainer has.
    pub peers: usize,
    /// How many rounds to measure.
    pub rounds: u64,
    /// Where peers keep their state, each in a directory of its own; nowhere: in memory alone.
    pub state_dir: Option<PathBuf>,
    /// How updates and models are written.
    pub codecs: Codecs,
}

/// What was measured: medians of all rounds, as the leader saw them.
#[derive(Clone, Debug, Serialize)]
pub struct RoundResult {
    /// `round`.
    pub bench: &'static str,
    /// The length of the model, in bytes.
    pub bytes: u64,
    /// The length of a chunk, in bytes.
    pub chunk_bytes: u32,
    /// How many peers took part.
    pub peers: usize,
    /// How many rounds were measured.
    pub rounds: u64,
    /// How updates were written.
    pub codec: Codec,
    /// How models were.
    pub model_codec: Codec,
    /// `embedded`, or the broker's address.
    pub broker: String,
    /// Whether each role had a process of its own.
    pub processes: bool,
    /// Whether peers kept their state on disk, as they do when it matters.
    pub disk: bool,
    /// What the state of one peer takes on disk, of the one of which it grew most.
    pub disk_bytes: Option<Growth>,
    /// How long each phase took.
    pub seconds: PhaseSeconds,
    /// The fastest round, in seconds.
    pub fastest: f64,
    /// The slowest round, in seconds.
    pub slowest: f64,
    /// What the leader received and the trainers received, as it was sent, over the whole round, in MB/s.
    pub mb_per_s: f64,
    /// This machine.
    pub machine: Machine,
    /// The speed as a share of others.
    pub ratio: RoundRatio,
    /// What crossed the wire in one round.
    pub wire: Wire,
    /// Heartbeats between two more processes, through the same broker, while the rounds ran.
    pub heartbeat: Heartbeat,
    /// What each role used.
    pub roles: Vec<RoleUsage>,
}

/// The speed of rounds as a share of others; 1: as fast.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct RoundRatio {
    /// Of a TCP connection's over loopback.
    pub to_tcp: f64,
    /// Of a copy's in memory.
    pub to_memory_copy: f64,
}

/// What a peer is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PeerConfig {
    /// Where it meets the others.
    site: Site,
    peer: PeerId,
    /// How many values the model has.
    values: usize,
    /// What it adds to each, as a number.
    number: u64,
    config: Config,
    codecs: Codecs,
    state_dir: Option<PathBuf>,
}

/// Takes part in a federation until that has finished, or `orders` end.
pub(super) async fn take_part(
    config: PeerConfig,
    mut orders: UnboundedReceiver<Order>,
    tell: &(dyn Fn(Report) + Sync),
) -> Result<(), Failure> {
    let PeerConfig { site, peer, values, number, config, codecs, state_dir } = config;
    let last = Round(config.rounds);
    let (storage, durable) = match &state_dir {
        Some(dir) => (Storage::Disk(Journal::open(dir, &config.federation, Some(&peer)).map_err(Failure::of)?.0), None),
        None => (Storage::Memory, None),
    };
    // Before it connects, and on another thread: the connection must not wait for it.
    let trainer =
        tokio::task::spawn_blocking(move || ConstantTrainer::new(values, number)).await.map_err(Failure::of)?;
    let topics = site.topics();
    let node = Node {
        transport: site.connect(&peer, &topics).await?,
        codecs,
        meeting: node::Meeting { brokers: vec![site.broker.clone()], hosted: None },
        trainer: Box::new(trainer),
        threads: 1,
        wait_timeout: None,
        peer,
        config,
        topics,
        storage,
        durable,
    };
    // Not from commit to commit: a quorum commits without the others, who take the model of that round in the next one.
    let (mut to_commit, mut genesis) = (Traffic::default(), Traffic::default());
    let mut observe = |observation: Observation<'_>| {
        let Observation::Notice(notice, traffic) = observation else { return };
        let so_far = to_commit.plus(traffic);
        match notice {
            Notice::ModelHeld { round: Round::GENESIS, .. } => genesis = so_far,
            Notice::ModelHeld { round, .. } if *round == last => {
                let (sent, received) = (so_far.sent - genesis.sent, so_far.received - genesis.received);
                tell(Report::Held(Traffic { sent, received }));
            }
            Notice::Committed(committed) => {
                to_commit = so_far;
                tell(Report::Committed(Committed {
                    round: committed.decree.round,
                    led: committed.led,
                    seconds: committed.seconds.into(),
                    usage: Usage::now(),
                    disk_bytes: state_dir.as_deref().map_or(0, disk_bytes),
                }));
            }
            _ => {}
        }
    };
    let stop = async { while orders.recv().await.is_some() {} };
    let outcome = node.run(stop, &mut observe).await.map_err(Failure::of)?;
    match outcome {
        Outcome::Finished { .. } | Outcome::Interrupted => Ok(()),
        Outcome::LostBroker(why) => Err(Failure::broker(why)),
        other => Err(Failure::of(format!("its run ended with {other:?}"))),
    }
}

/// What a directory's files take, in bytes. One that vanishes meanwhile takes nothing.
fn disk_bytes(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    let bytes = entries.map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => disk_bytes(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    });
    bytes.sum()
}

/// Measures rounds. `progress` hears what is being done.
///
/// # Errors
/// When there is too little memory, no broker, or a role fails.
pub async fn run(options: &RoundOptions, progress: &mut (dyn FnMut(&str) + Send)) -> Result<RoundResult, BenchError> {
    let RoundOptions { peers, rounds, .. } = *options;
    let setting = Setting { bytes: 4 * options.setting.bytes.div_ceil(4), ..options.setting.clone() };
    // A trainer has its model, and it once more while it loads or writes it. In memory a peer has the blobs of the parent,
    // its update and the next model as well, and the leader those of all updates.
    let blobs = if options.state_dir.is_some() { 2 * peers } else { 6 * peers };
    setting.check_memory(format!("{peers} peers"), blobs as u64)?;
    let mut gauge = Gauge::new(setting.bytes);
    progress("this machine");
    for _ in 0..GAUGES {
        gauge.measure().await?;
    }
    let (site, broker) = setting.meet("the broker", peers).await?;
    progress(&format!("{rounds} rounds of {peers} peers"));
    let (mut seen, mut traffic) = (vec![Vec::new(); peers], Traffic::default());
    let after = setting.patience(2 * peers * rounds as usize);
    let stuck = |_| BenchError::Stuck { what: "the rounds", after };
    let (mut broker, mut broker_usages) = (broker, Vec::new());
    let tenth = Arc::new(Notify::new());
    let pulse = Pulse::start(&setting, &site).await?;
    let mut running = start(options, &setting, &site, &tenth)?;
    loop {
        let ended = tokio::select! {
            ended = timeout(after, running.join_next()) => ended.map_err(stuck)?,
            () = tenth.notified() => {
                if let Some(broker) = &mut broker {
                    broker_usages.push(broker.tally().await?.usage);
                }
                continue;
            }
        };
        let Some(ended) = ended else { break };
        let lost = |error| BenchError::Machine(std::io::Error::other(error));
        let (index, commits, spent) = ended.map_err(lost)??;
        seen[index] = commits;
        traffic = traffic.plus(spent);
    }
    let heartbeat = pulse.end().await?;
    if let Some(mut actor) = broker {
        broker_usages.push(actor.tally().await?.usage);
        actor.end().await;
    }
    progress("this machine");
    for _ in 0..GAUGES {
        gauge.measure().await?;
    }
    result(options, &setting, &seen, traffic, &broker_usages, gauge.result(), heartbeat)
}

/// Two more at the broker, in a federation of their own: one sends heartbeats, as often as in a measurement of transfers,
/// and the other one says how long they took.
struct Pulse {
    from: Actor,
    to: Actor,
}

impl Pulse {
    async fn start(setting: &Setting, site: &Site) -> Result<Self, BenchError> {
        let site = Site { federation: format!("{}-pulse", site.federation), ..site.clone() };
        let start = |name: &str| {
            let peer = PeerId::new(name).expect("a word is a name");
            let config = PartyConfig { site: site.clone(), peer, values: 1, holds: None, several: false };
            Actor::start(&setting.stage, name, Role::Party(config))
        };
        let mut pulse = Self { from: start("pulse")?, to: start("wrist")? };
        pulse.from.report().await?;
        pulse.to.report().await?;
        pulse.from.order(Order::Beat(true));
        Ok(pulse)
    }

    async fn end(mut self) -> Result<Heartbeat, BenchError> {
        let tally = self.to.tally().await?;
        self.from.end().await;
        self.to.end().await;
        Ok(Heartbeat::of(tally.heartbeats.iter()))
    }
}

/// Starts all peers; each task collects what one tells until it ends.
#[expect(clippy::type_complexity, reason = "it is used once")]
fn start(
    options: &RoundOptions,
    setting: &Setting,
    site: &Site,
    tenth: &Arc<Notify>,
) -> Result<JoinSet<Result<(usize, Vec<Committed>, Traffic), BenchError>>, BenchError> {
    let mut running = JoinSet::new();
    for index in 0..options.peers {
        let peer = name(options, index);
        let config = Config {
            federation: site.federation.clone(),
            min_peers: options.peers,
            min_updates: options.peers - 1,
            rounds: options.rounds,
            policy: Policy::Fixed(name(options, 0)),
            chunk_bytes: setting.chunk_bytes as usize,
            ..Config::default()
        };
        let config = PeerConfig {
            site: site.clone(),
            values: setting.values(),
            number: index as u64,
            state_dir: options.state_dir.as_ref().map(|dir| dir.join(peer.as_str())),
            peer: peer.clone(),
            config,
            codecs: options.codecs,
        };
        let mut actor = Actor::start(&setting.stage, peer.as_str(), Role::Peer(Box::new(config)))?;
        let (tenth, is_tenth) = (tenth.clone(), Round(tenth_of(options.rounds)));
        running.spawn(async move {
            let (mut commits, mut spent) = (Vec::new(), Traffic::default());
            while let Some(report) = actor.next().await? {
                match report {
                    Report::Committed(committed) => {
                        if index == 0 && committed.round == is_tenth {
                            tenth.notify_one();
                        }
                        commits.push(committed);
                    }
                    Report::Held(traffic) => spent = traffic,
                    _ => {}
                }
            }
            actor.end().await;
            Ok((index, commits, spent))
        });
    }
    Ok(running)
}

/// The round after which everything has been used once.
fn tenth_of(rounds: u64) -> u64 {
    (rounds / 10).max(1)
}

fn name(options: &RoundOptions, index: usize) -> PeerId {
    let width = options.peers.to_string().len();
    PeerId::new(&format!("peer-{:0width$}", index + 1)).expect("letters, digits and a dash are a name")
}

fn result(
    options: &RoundOptions,
    setting: &Setting,
    seen: &[Vec<Committed>],
    traffic: Traffic,
    broker: &[Usage],
    machine: Machine,
    heartbeat: Heartbeat,
) -> Result<RoundResult, BenchError> {
    let RoundOptions { peers, rounds, .. } = *options;
    let is_measured = |committed: &&Committed| committed.round != Round::GENESIS && committed.round.0 <= rounds;
    let led: Vec<_> = seen.iter().flatten().filter(is_measured).filter(|committed| committed.led).collect();
    if led.is_empty() {
        let failure = Failure::of("committed no round");
        return Err(BenchError::Role { role: name(options, 0).to_string(), failure });
    }
    let phase =
        |of: fn(&PhaseSeconds) -> f64| median(&led.iter().map(|committed| of(&committed.seconds)).collect::<Vec<_>>());
    let total = phase(|seconds| seconds.total);
    let totals = || led.iter().map(|committed| committed.seconds.total);
    let (sent, received) = (traffic.sent / led.len() as u64, traffic.received / led.len() as u64);
    let speed = mb_per_s(received, total);
    Ok(RoundResult {
        bench: "round",
        bytes: setting.bytes,
        chunk_bytes: setting.chunk_bytes,
        peers,
        rounds,
        codec: options.codecs.updates,
        model_codec: options.codecs.model,
        broker: setting.broker_name(),
        processes: setting.has_processes(),
        disk: options.state_dir.is_some(),
        disk_bytes: growth(seen, options.rounds, |committed| Some(committed.disk_bytes)),
        seconds: PhaseSeconds {
            evaluate: phase(|seconds| seconds.evaluate),
            elect: phase(|seconds| seconds.elect),
            train: phase(|seconds| seconds.train),
            gather: phase(|seconds| seconds.gather),
            aggregate: phase(|seconds| seconds.aggregate),
            broadcast: phase(|seconds| seconds.broadcast),
            commit: phase(|seconds| seconds.commit),
            total,
        },
        fastest: totals().fold(f64::INFINITY, f64::min),
        slowest: totals().fold(0.0, f64::max),
        mb_per_s: speed,
        machine,
        ratio: RoundRatio {
            to_tcp: speed / machine.tcp_mb_per_s,
            to_memory_copy: speed / machine.memory_copy_mb_per_s,
        },
        wire: Wire::new(sent, received, setting.bytes),
        heartbeat,
        roles: roles(setting, seen, broker, led.len(), rounds),
    })
}

/// CPU time is counted from the commit of the genesis to that of the last round; the broker's from its start.
fn roles(setting: &Setting, seen: &[Vec<Committed>], broker: &[Usage], measured: usize, rounds: u64) -> Vec<RoleUsage> {
    let rss = |seen: &[Vec<Committed>]| growth(seen, rounds, |committed| committed.usage.rss_bytes);
    let used = |commits: &Vec<Committed>| Some((commits.first()?.usage, commits.last()?.usage));
    let used: Vec<_> = seen.iter().filter_map(used).collect();
    if !setting.has_processes() {
        let usage = RoleUsage::of("process", &used[..used.len().min(1)], measured);
        return vec![RoleUsage { rss_bytes: rss(&seen[..seen.len().min(1)]), ..usage }];
    }
    let (leader, trainers) = used.split_at(1.min(used.len()));
    let (led, trained) = seen.split_at(1.min(seen.len()));
    let mut roles = vec![
        RoleUsage { rss_bytes: rss(led), ..RoleUsage::of("leader", leader, measured) },
        RoleUsage { rss_bytes: rss(trained), ..RoleUsage::of("trainer", trainers, measured) },
    ];
    if let Some(last) = broker.last() {
        let start = Usage { cpu_seconds: Some(0.0), ..Usage::default() };
        let pair = broker.first().and_then(|first| first.rss_bytes).zip(last.rss_bytes);
        let rss_bytes = pair.map(|(tenth, end)| Growth { tenth, end });
        roles.push(RoleUsage { rss_bytes, ..RoleUsage::of("broker", &[(start, *last)], measured) });
    }
    roles
}

/// What one number was after a tenth of the rounds and after the last one, of the peer where it grew most.
fn growth(seen: &[Vec<Committed>], rounds: u64, of: impl Fn(&Committed) -> Option<u64>) -> Option<Growth> {
    let after = |commits: &[Committed], round| commits.iter().find(|commit| commit.round == Round(round)).and_then(&of);
    let both = |commits: &Vec<Committed>| {
        let (tenth, end) = (after(commits, tenth_of(rounds))?, after(commits, rounds)?);
        Some(Growth { tenth, end })
    };
    Growth::most(seen.iter().filter_map(both))
}
