//! One blob from its holder to receivers, or one of each of many holders to one receiver.

use std::iter;

use serde::Serialize;
use tokio::time::timeout;

use super::machine::{Gauge, Machine};
use super::party::PartyConfig;
use super::pipe::{PipeConfig, in_flight_bytes};
use super::role::{Actor, HostConfig, Order, Report, Role, Tally};
use super::usage::Usage;
use super::{BenchError, Failure, Heartbeat, RoleUsage, Setting, Site, Wire, mb_per_s, median};
use crate::transfer::Manifest;
use crate::types::{PeerId, Round};

/// Which transfers to measure.
#[derive(Clone, Debug)]
pub struct TransferOptions {
    /// What every measurement is told.
    pub setting: Setting,
    /// How many hold a blob each. With several there is one receiver.
    pub senders: usize,
    /// How many receive the blob. With several there is one sender.
    pub receivers: usize,
    /// How often to measure.
    pub repeat: usize,
}

/// What was measured: medians of all repeats.
#[derive(Clone, Debug, Serialize)]
pub struct TransferResult {
    /// `transfer`.
    pub bench: &'static str,
    /// The length of one blob, in bytes.
    pub bytes: u64,
    /// The length of a chunk, in bytes.
    pub chunk_bytes: u32,
    /// How many held a blob.
    pub senders: usize,
    /// How many received.
    pub receivers: usize,
    /// How often it was measured.
    pub repeat: usize,
    /// `embedded`, or the broker's address.
    pub broker: String,
    /// Whether each role had a process of its own.
    pub processes: bool,
    /// How long it took.
    pub seconds: TransferSeconds,
    /// What all receivers got together, in MB/s, verified.
    pub mb_per_s: f64,
    /// The bare pipe, which verifies nothing.
    pub pipe: Speed,
    /// The same at QoS 1; only beside the embedded broker.
    pub pipe_qos1: Option<Speed>,
    /// The same through rumqttd behind its own front; only beside the embedded broker.
    pub pipe_rumqttd: Option<Speed>,
    /// This machine.
    pub machine: Machine,
    /// The speed as a share of others.
    pub ratio: TransferRatio,
    /// What crossed the wire in one transfer.
    pub wire: Wire,
    /// A leader's heartbeats while the transfers ran.
    pub heartbeat: Heartbeat,
    /// What each role used.
    pub roles: Vec<RoleUsage>,
}

/// Seconds of a transfer.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct TransferSeconds {
    /// From the order until the last receiver has verified the last blob.
    pub total: f64,
    /// Of that, until the last receiver had its last chunk.
    pub pull: f64,
    /// Of that, what came after the last chunk: joining, hashing, decoding.
    pub verify: f64,
    /// The fastest repeat.
    pub fastest: f64,
    /// The slowest repeat.
    pub slowest: f64,
}

/// Seconds, and the speed that they stand for.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Speed {
    /// From the order until the last byte was received.
    pub seconds: f64,
    /// What all receivers got together, in MB/s.
    pub mb_per_s: f64,
}

/// The speed of transfers as a share of others; 1: as fast.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct TransferRatio {
    /// Of the bare pipe's, until everything was verified.
    pub to_pipe: f64,
    /// Of the bare pipe's, until the last chunk.
    pub pull_to_pipe: f64,
    /// Of that of the pipe at QoS 1, until everything was verified.
    pub to_pipe_qos1: Option<f64>,
    /// Of that of the pipe through rumqttd, until everything was verified.
    pub to_pipe_rumqttd: Option<f64>,
    /// Of a TCP connection's over loopback.
    pub to_tcp: f64,
    /// Of a copy's in memory.
    pub to_memory_copy: f64,
}

/// Measures transfers. `progress` hears what is being done.
///
/// # Errors
/// When there is too little memory, no broker, or a role fails.
pub async fn run(
    options: &TransferOptions,
    progress: &mut (dyn FnMut(&str) + Send),
) -> Result<TransferResult, BenchError> {
    let TransferOptions { senders, receivers, repeat, .. } = *options;
    let setting = Setting { bytes: 4 * options.setting.bytes.div_ceil(4), ..options.setting.clone() };
    // A sender has its blob once, and once more for each pipe; a receiver has all blobs.
    let blobs = 4 * senders + receivers * senders;
    setting.check_memory(format!("{senders} senders and {receivers} receivers"), blobs as u64)?;
    let options = TransferOptions { setting, ..options.clone() };
    let peers = senders + receivers;
    let (site, broker) = options.setting.meet("the broker", peers).await?;
    let mut ours = Ours::start(&options, &site).await?;
    let mut pipes = Pipes::start(&options).await?;
    let mut gauge = Gauge::new(options.setting.bytes);
    let mut brokers: Vec<Actor> = broker.into_iter().collect();

    let before = tallies(ours.senders.iter_mut().chain(&mut ours.receivers).chain(&mut brokers)).await?;
    let (mut totals, mut pulls, mut own_cpu) = (Vec::new(), Vec::new(), 0.0);
    for number in 1..=repeat as u64 {
        progress(&format!("transfer {number} of {repeat}"));
        let cpu = Usage::now().cpu_seconds;
        let (pull, total) = ours.go(&options, Round(number)).await?;
        own_cpu += Usage::now().cpu_seconds.zip(cpu).map_or(0.0, |(after, before)| after - before);
        totals.push(total);
        pulls.push(pull);
        pipes.go(&options, Round(number)).await?;
        gauge.measure().await?;
    }
    let after = tallies(ours.senders.iter_mut().chain(&mut ours.receivers).chain(&mut brokers)).await?;

    let roles = if options.setting.has_processes() {
        roles(&options, &before, &after)
    } else {
        let cpu = |seconds| Usage { cpu_seconds: Usage::now().cpu_seconds.map(|_| seconds), ..Usage::now() };
        vec![RoleUsage::of("process", &[(cpu(0.0), cpu(own_cpu))], repeat)]
    };
    let [pipe, pipe_qos1, pipe_rumqttd] = pipes.end().await;
    for actor in ours.senders.into_iter().chain(ours.receivers).chain(brokers) {
        actor.end().await;
    }
    let samples = Samples { totals, pulls, pipe, pipe_qos1, pipe_rumqttd };
    Ok(result(&options, &samples, gauge.result(), roles, &before, &after))
}

/// Seconds of each repeat; none of what was not measured.
struct Samples {
    totals: Vec<f64>,
    pulls: Vec<f64>,
    pipe: Vec<f64>,
    pipe_qos1: Vec<f64>,
    pipe_rumqttd: Vec<f64>,
}

fn result(
    options: &TransferOptions,
    samples: &Samples,
    machine: Machine,
    roles: Vec<RoleUsage>,
    before: &[Tally],
    after: &[Tally],
) -> TransferResult {
    let TransferOptions { senders, receivers, repeat, ref setting } = *options;
    let delivered = setting.bytes * (senders * receivers) as u64;
    let (total, pull, pipe) = (median(&samples.totals), median(&samples.pulls), median(&samples.pipe));
    let other = |samples: &[f64]| (!samples.is_empty()).then(|| median(samples));
    let (pipe_qos1, pipe_rumqttd) = (other(&samples.pipe_qos1), other(&samples.pipe_rumqttd));
    let pipe_speed = |seconds| Speed { seconds, mb_per_s: mb_per_s(delivered, seconds) };
    let of_all = |bytes: fn(&Tally) -> u64| {
        let spent = before.iter().zip(after).map(|(before, after)| bytes(after) - bytes(before)).sum::<u64>();
        spent / repeat.max(1) as u64
    };
    let speed = mb_per_s(delivered, total);
    TransferResult {
        bench: "transfer",
        bytes: setting.bytes,
        chunk_bytes: setting.chunk_bytes,
        senders,
        receivers,
        repeat,
        broker: setting.broker_name(),
        processes: setting.has_processes(),
        seconds: TransferSeconds {
            total,
            pull,
            verify: (total - pull).max(0.0),
            fastest: samples.totals.iter().copied().fold(f64::INFINITY, f64::min),
            slowest: samples.totals.iter().copied().fold(0.0, f64::max),
        },
        mb_per_s: speed,
        pipe: pipe_speed(pipe),
        pipe_qos1: pipe_qos1.map(pipe_speed),
        pipe_rumqttd: pipe_rumqttd.map(pipe_speed),
        machine,
        ratio: TransferRatio {
            to_pipe: pipe / total,
            pull_to_pipe: pipe / pull,
            to_pipe_qos1: pipe_qos1.map(|pipe| pipe / total),
            to_pipe_rumqttd: pipe_rumqttd.map(|pipe| pipe / total),
            to_tcp: speed / machine.tcp_mb_per_s,
            to_memory_copy: speed / machine.memory_copy_mb_per_s,
        },
        wire: Wire::new(of_all(|tally| tally.sent), of_all(|tally| tally.received), setting.bytes),
        heartbeat: Heartbeat::of(after.iter().flat_map(|tally| &tally.heartbeats)),
        roles,
    }
}

async fn tallies(actors: impl Iterator<Item = &mut Actor>) -> Result<Vec<Tally>, BenchError> {
    let mut tallies = Vec::new();
    for actor in actors {
        tallies.push(actor.tally().await?);
    }
    Ok(tallies)
}

/// The tallies are of senders, receivers and the broker, in this order.
fn roles(options: &TransferOptions, before: &[Tally], after: &[Tally]) -> Vec<RoleUsage> {
    let used: Vec<_> = before.iter().zip(after).map(|(before, after)| (before.usage, after.usage)).collect();
    let (senders, rest) = used.split_at(options.senders);
    let (receivers, broker) = rest.split_at(options.receivers);
    let parts = [("sender", senders), ("receiver", receivers), ("broker", broker)];
    let parts = parts.into_iter().filter(|(_, used)| !used.is_empty());
    parts.map(|(role, used)| RoleUsage::of(role, used, options.repeat)).collect()
}

fn numbered(kind: &str, index: usize) -> PeerId {
    PeerId::new(&format!("{kind}-{}", index + 1)).expect("letters, digits and a dash are a name")
}

/// Transfers as peers do them.
struct Ours {
    senders: Vec<Actor>,
    receivers: Vec<Actor>,
    held: Vec<(PeerId, Manifest)>,
}

impl Ours {
    async fn start(options: &TransferOptions, site: &Site) -> Result<Self, BenchError> {
        let TransferOptions { senders, receivers, ref setting, .. } = *options;
        let start = |kind: &str, index: usize, holds: Option<u64>| {
            let peer = numbered(kind, index);
            let (site, values, several) = (site.clone(), setting.values(), receivers > 1);
            let name = peer.to_string();
            Actor::start(&setting.stage, &name, Role::Party(PartyConfig { site, peer, values, holds, several }))
        };
        let mut senders: Vec<Actor> =
            (0..senders).map(|index| start("sender", index, Some(index as u64))).collect::<Result<_, _>>()?;
        let mut receivers: Vec<Actor> =
            (0..receivers).map(|index| start("receiver", index, None)).collect::<Result<_, _>>()?;
        let mut held = Vec::new();
        for (index, sender) in senders.iter_mut().enumerate() {
            if let Report::Ready(Some(manifest)) = sender.report().await? {
                held.push((numbered("sender", index), manifest));
            }
        }
        for receiver in &mut receivers {
            receiver.report().await?;
        }
        Ok(Self { senders, receivers, held })
    }

    /// One transfer: seconds until the last receiver had its last chunk, and until it had verified everything.
    async fn go(&mut self, options: &TransferOptions, round: Round) -> Result<(f64, f64), BenchError> {
        // The one that has to do with everybody is the leader.
        let leader = if options.receivers > 1 { &self.senders[0] } else { &self.receivers[0] };
        leader.order(Order::Beat(true));
        for receiver in &self.receivers {
            receiver.order(Order::Go { round, pulls: self.held.clone() });
        }
        let ended = ended(options, "a transfer", &mut self.receivers).await;
        let leader = if options.receivers > 1 { &self.senders[0] } else { &self.receivers[0] };
        leader.order(Order::Beat(false));
        ended
    }
}

/// What transfers are measured against.
struct Pipes {
    bare: Pipe,
    /// The same at QoS 1, and through rumqttd; only beside the embedded broker.
    others: Option<[Pipe; 2]>,
    brokers: Vec<Actor>,
}

impl Pipes {
    async fn start(options: &TransferOptions) -> Result<Self, BenchError> {
        let TransferOptions { senders, receivers, ref setting, .. } = *options;
        let (chunk_bytes, peers) = (setting.chunk_bytes, senders + receivers);
        if setting.broker.is_some() {
            let (site, _) = setting.meet("the pipe's broker", peers).await?;
            return Ok(Self { bare: Pipe::start(options, site, 0).await?, others: None, brokers: Vec::new() });
        }
        // Nothing is sent twice, so nothing may be lost: twice what is in flight stays when half of this is forgotten.
        let log_bytes = 4 * usize::try_from(in_flight_bytes(chunk_bytes, senders)).unwrap_or(usize::MAX / 4);
        let config = HostConfig { chunk_bytes, peers: 2 * peers, log_bytes };
        let (site, embedded) = setting.host("the pipe's broker", Role::Broker(config)).await?;
        let qos1 = Site { federation: format!("{}-qos1", site.federation), ..site.clone() };
        let (other, rumqttd) = setting.host("the pipe's rumqttd", Role::Rumqttd(config)).await?;
        let others = [Pipe::start(options, qos1, 1).await?, Pipe::start(options, other, 0).await?];
        let brokers = vec![embedded, rumqttd];
        Ok(Self { bare: Pipe::start(options, site, 0).await?, others: Some(others), brokers })
    }

    async fn go(&mut self, options: &TransferOptions, round: Round) -> Result<(), BenchError> {
        for pipe in iter::once(&mut self.bare).chain(self.others.iter_mut().flatten()) {
            pipe.go(options, round).await?;
        }
        Ok(())
    }

    /// Ends everything. Seconds of each repeat: of the bare pipe, at QoS 1, and through rumqttd.
    async fn end(self) -> [Vec<f64>; 3] {
        let mut samples = [Vec::new(), Vec::new(), Vec::new()];
        for (pipe, samples) in iter::once(self.bare).chain(self.others.into_iter().flatten()).zip(&mut samples) {
            *samples = pipe.seconds;
            for actor in pipe.senders.into_iter().chain(pipe.receivers) {
                actor.end().await;
            }
        }
        for actor in self.brokers {
            actor.end().await;
        }
        samples
    }
}

/// A bare pipe.
struct Pipe {
    senders: Vec<Actor>,
    receivers: Vec<Actor>,
    /// What each repeat took.
    seconds: Vec<f64>,
}

impl Pipe {
    async fn start(options: &TransferOptions, site: Site, qos: u8) -> Result<Self, BenchError> {
        let TransferOptions { senders, receivers, ref setting, .. } = *options;
        let start = |kind: &str, index: usize, role: fn(PipeConfig) -> Role| {
            let (site, peer) = (site.clone(), numbered(kind, index));
            let name = format!("the pipe's {peer}");
            let role = role(PipeConfig { site, peer, bytes: setting.bytes, senders, receivers, qos });
            Actor::start(&setting.stage, &name, role)
        };
        let mut pipe = Self {
            senders: (0..senders).map(|i| start("sender", i, Role::PipeSender)).collect::<Result<_, _>>()?,
            receivers: (0..receivers).map(|i| start("receiver", i, Role::PipeReceiver)).collect::<Result<_, _>>()?,
            seconds: Vec::new(),
        };
        for actor in pipe.senders.iter_mut().chain(&mut pipe.receivers) {
            actor.report().await?;
        }
        Ok(pipe)
    }

    async fn go(&mut self, options: &TransferOptions, round: Round) -> Result<(), BenchError> {
        for receiver in &mut self.receivers {
            receiver.order(Order::Go { round, pulls: Vec::new() });
            receiver.report().await?;
        }
        for sender in &self.senders {
            sender.order(Order::Go { round, pulls: Vec::new() });
        }
        let (seconds, _) = ended(options, "the bare pipe", &mut self.receivers).await?;
        self.seconds.push(seconds);
        Ok(())
    }
}

/// Waits until every receiver is done; the longest times.
async fn ended(
    options: &TransferOptions,
    what: &'static str,
    receivers: &mut [Actor],
) -> Result<(f64, f64), BenchError> {
    let after = options.setting.patience(options.senders * options.receivers);
    let all = async {
        let mut longest = (0.0f64, 0.0f64);
        for receiver in receivers {
            match receiver.report().await? {
                Report::Done { pull, total } => longest = (longest.0.max(pull), longest.1.max(total)),
                other => {
                    let failure = Failure::of(format!("said {other:?} instead of having received"));
                    return Err(BenchError::Role { role: receiver.name().to_owned(), failure });
                }
            }
        }
        Ok(longest)
    };
    timeout(after, all).await.map_err(|_| BenchError::Stuck { what, after })?
}
