//! Measurements of a broker and a machine: what `rodizio bench` runs.
//!
//! - [`transfer`](transfer::run): one blob from its holder to receivers (as in a broadcast), or one blob of each of many
//!   holders to one receiver (as in a gather), with the code that peers use ([`party`]), and bare
//!   pipes ([`pipe`]) in turn with it.
//! - [`round`](round::run): whole rounds of real nodes, whose trainers do next to nothing ([`trainer`]).
//!
//! - [`train`](train::run): how fast each backend trains a model, beside PyTorch.
//!
//! The first two measure the machine in the same run ([`machine`]), because ratios travel better than speeds. Each measure is
//! taken several times, those that are compared in turn, so that noise hits both; medians are reported.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::broker::BrokerConfig;
use crate::protocol::Topics;
use crate::transport::Found;
use crate::transport::mqtt::probe::Probe;
use crate::transport::mqtt::{MqttConfig, MqttTransport};
use crate::types::PeerId;

pub mod machine;
pub mod party;
pub mod pipe;
pub mod role;
pub mod round;
pub mod train;
pub mod trainer;
pub mod transfer;
pub mod usage;

use role::{Actor, HostConfig, Report, Role, Stage};
use usage::Usage;

/// The first level of every topic.
const PREFIX: &str = "rodizio";

/// How long a broker that is not there yet is waited for.
const BROKER_PATIENCE: Duration = Duration::from_secs(3);

/// How long a broker may keep silent when it is tried.
const PROBE_PATIENCE: Duration = Duration::from_secs(10);

/// The shortest time that a measurement is waited for, and the speed below which it is given up, in bytes a second.
const PATIENCE_MIN: Duration = Duration::from_secs(60);
const SPEED_MIN: u64 = 1_000_000;

/// Why there is no measurement.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// It would take more memory than there is.
    #[error("{what} take about {} MB of memory, this machine has {} MB to spare", .needed / 1_000_000, .available / 1_000_000)]
    Memory {
        /// What would take it.
        what: String,
        /// How much that is, in bytes.
        needed: u64,
        /// How much there is, in bytes.
        available: u64,
    },
    /// A process does not start.
    #[error("the process of {role} does not start: {source}")]
    Start {
        /// Its role.
        role: String,
        /// Why.
        source: io::Error,
    },
    /// A role could not be played.
    #[error("{role}: {failure}")]
    Role {
        /// Which.
        role: String,
        /// Why.
        failure: Failure,
    },
    /// A measurement does not come to an end.
    #[error("{what} did not end within {} s", .after.as_secs())]
    Stuck {
        /// Which measurement.
        what: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// The machine could not be measured.
    #[error("this machine cannot be measured: {0}")]
    Machine(#[from] io::Error),
}

/// Why a role could not be played, as a sentence that can leave its process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Why.
    pub why: String,
    /// Whether the broker is at fault.
    pub is_broker: bool,
}

impl Failure {
    fn of(why: impl fmt::Display) -> Self {
        Self { why: why.to_string(), is_broker: false }
    }

    fn broker(why: impl fmt::Display) -> Self {
        Self { why: why.to_string(), is_broker: true }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

/// Where the roles of a measurement meet.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Site {
    /// The broker, `HOST:PORT`.
    pub broker: String,
    /// Whether it is the embedded one, which need not be tried.
    pub is_embedded: bool,
    /// The first level of every topic.
    pub prefix: String,
    /// The second level: no two measurements at a broker share it.
    pub federation: String,
    /// The length of a chunk, in bytes.
    pub chunk_bytes: u32,
}

impl Site {
    fn packet_bytes_max(&self) -> usize {
        BrokerConfig::for_chunks(self.chunk_bytes as usize).packet_bytes_max
    }

    fn topics(&self) -> Topics {
        Topics::new(&self.prefix, &self.federation)
    }

    /// The transport of a peer, as [`peer`](crate::peer) sets it up. It has no last will: nothing is to stay behind.
    async fn connect(&self, peer: &PeerId, topics: &Topics) -> Result<MqttTransport, Failure> {
        let config = MqttConfig {
            brokers: vec![self.broker.clone()],
            federation: self.federation.clone(),
            peer: peer.clone(),
            keep_alive: Duration::from_secs(5),
            packet_bytes_max: self.packet_bytes_max(),
            will: None,
            control_filters: topics.control_filters(peer),
            bulk_filters: topics.bulk_filters(peer),
            hello_first: true,
            probe: (!self.is_embedded).then(|| Probe {
                topic: topics.probe(peer),
                chunk_bytes: self.chunk_bytes as usize,
                patience: PROBE_PATIENCE,
            }),
        };
        MqttTransport::connect(config, BROKER_PATIENCE).await.map_err(Failure::broker)
    }

    /// Refuses a broker that cannot pass the chunks.
    fn accept(&self, found: Option<&Found>) -> Result<(), Failure> {
        let limit = found.and_then(|found| found.chunk_bytes_max).filter(|limit| *limit < self.chunk_bytes as usize);
        match limit {
            Some(limit) => {
                let why = format!("{} passes chunks of up to {limit} bytes: give --chunk-bytes {limit}", self.broker);
                Err(Failure::broker(why))
            }
            None => Ok(()),
        }
    }
}

/// What every measurement is told.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The length of a blob, in bytes; rounded up to whole values of 4 bytes.
    pub bytes: u64,
    /// The length of a chunk, in bytes.
    pub chunk_bytes: u32,
    /// The broker, `HOST:PORT`; without one, the embedded one.
    pub broker: Option<String>,
    /// Where the roles are played.
    pub stage: Stage,
}

impl Setting {
    fn values(&self) -> usize {
        usize::try_from(self.bytes.div_ceil(4)).unwrap_or(usize::MAX)
    }

    /// Starts the embedded broker, if it is to be used, and says where to meet.
    async fn meet(&self, name: &str, peers: usize) -> Result<(Site, Option<Actor>), BenchError> {
        if let Some(broker) = &self.broker {
            return Ok((self.site(broker.clone()), None));
        }
        let log_bytes = BrokerConfig::default().log_bytes;
        let config = HostConfig { chunk_bytes: self.chunk_bytes, peers, log_bytes };
        let (site, actor) = self.host(name, Role::Broker(config)).await?;
        Ok((site, Some(actor)))
    }

    /// Starts a broker and says where to meet.
    async fn host(&self, name: &str, role: Role) -> Result<(Site, Actor), BenchError> {
        let mut actor = Actor::start(&self.stage, name, role)?;
        match actor.report().await? {
            Report::Listens(addr) => Ok((self.site(addr), actor)),
            other => {
                let failure = Failure::of(format!("said {other:?} instead of where it listens"));
                Err(BenchError::Role { role: name.to_owned(), failure })
            }
        }
    }

    fn site(&self, broker: String) -> Site {
        static MEASUREMENTS: AtomicU64 = AtomicU64::new(0);
        let number = MEASUREMENTS.fetch_add(1, Ordering::Relaxed);
        Site {
            broker,
            is_embedded: self.broker.is_none(),
            prefix: PREFIX.to_owned(),
            federation: format!("bench-{}-{number}", std::process::id()),
            chunk_bytes: self.chunk_bytes,
        }
    }

    fn broker_name(&self) -> String {
        self.broker.clone().unwrap_or_else(|| "embedded".to_owned())
    }

    fn has_processes(&self) -> bool {
        matches!(self.stage, Stage::Processes(_))
    }

    /// Refuses what needs more memory than there is, where that is known.
    fn check_memory(&self, what: String, blobs: u64) -> Result<(), BenchError> {
        let needed = self.bytes.saturating_mul(blobs);
        match usage::available_memory() {
            Some(available) if needed > available => Err(BenchError::Memory { what, needed, available }),
            _ => Ok(()),
        }
    }

    /// How long so many blobs may take.
    fn patience(&self, blobs: usize) -> Duration {
        PATIENCE_MIN + Duration::from_secs(self.bytes.saturating_mul(blobs as u64) / SPEED_MIN)
    }
}

/// What the processes of one role used.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RoleUsage {
    /// The role: `leader`, `trainer`, `holder`, `receiver`, `broker`; `process` if all were in one.
    pub role: &'static str,
    /// How many had it. The figures are of one: of the middle one for CPU, of the largest for memory.
    pub count: usize,
    /// Seconds of CPU time for one measurement.
    pub cpu_seconds: Option<f64>,
    /// The most memory that one has held, in bytes.
    pub peak_rss_bytes: Option<u64>,
    /// The memory that the one held in which it grew most.
    pub rss_bytes: Option<Growth>,
}

/// What there was after a tenth of the rounds, when everything has been used once, and after the last one, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Growth {
    /// After a tenth of the rounds.
    pub tenth: u64,
    /// After the last one.
    pub end: u64,
}

impl Growth {
    /// The one that has grown most; `None` if there is none.
    fn most(all: impl Iterator<Item = Growth>) -> Option<Growth> {
        all.max_by_key(|growth| growth.end as i128 - growth.tenth as i128)
    }
}

impl RoleUsage {
    /// Of processes that used this, before and after so many measurements.
    fn of(role: &'static str, used: &[(Usage, Usage)], measurements: usize) -> Self {
        let cpu: Option<Vec<f64>> =
            used.iter().map(|(before, after)| Some(after.cpu_seconds? - before.cpu_seconds?)).collect();
        let cpu_seconds = cpu.filter(|cpu| !cpu.is_empty()).map(|cpu| median(&cpu) / measurements.max(1) as f64);
        let peak_rss_bytes = used.iter().map(|(_, after)| after.peak_rss_bytes).max().flatten();
        Self { role, count: used.len(), cpu_seconds, peak_rss_bytes, rss_bytes: None }
    }
}

/// Bytes of messages of one measurement, of all peers together, without MQTT's own headers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Wire {
    /// Published, in bytes.
    pub sent_bytes: u64,
    /// Received, in bytes.
    pub received_bytes: u64,
    /// What was published as a multiple of the model.
    pub sent_per_model: f64,
    /// What was received as a multiple of the model.
    pub received_per_model: f64,
}

impl Wire {
    fn new(sent_bytes: u64, received_bytes: u64, model_bytes: u64) -> Self {
        let per_model = |bytes: u64| bytes as f64 / model_bytes.max(1) as f64;
        let (sent_per_model, received_per_model) = (per_model(sent_bytes), per_model(received_bytes));
        Self { sent_bytes, received_bytes, sent_per_model, received_per_model }
    }
}

/// How long heartbeats were on their way, from one process to another, in milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Heartbeat {
    /// How many arrived.
    pub count: usize,
    /// The median.
    pub median_ms: f64,
    /// The 99th percentile.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
}

impl Heartbeat {
    /// Of heartbeats that were so many seconds on their way.
    fn of<'a>(seconds: impl Iterator<Item = &'a f64>) -> Self {
        let waits: Vec<f64> = seconds.map(|wait| wait * 1e3).collect();
        Self {
            count: waits.len(),
            median_ms: median(&waits),
            p99_ms: percentile(&waits, 0.99),
            max_ms: waits.iter().copied().fold(0.0, f64::max),
        }
    }
}

/// The middle of `samples`; the mean of both middle ones if their number is even, and 0 if there are none.
fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        len if len % 2 == 1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

/// The smallest of `samples` that at least this share of them does not exceed (nearest rank); 0 if there are none.
fn percentile(samples: &[f64], share: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

fn mb_per_s(bytes: u64, seconds: f64) -> f64 {
    // No clock is so fine that something takes no time.
    bytes as f64 / 1e6 / seconds.max(1e-9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_in_whatever_order() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }

    #[test]
    fn what_grew_most_is_told() {
        let growth = |tenth, end| Growth { tenth, end };
        assert_eq!(Growth::most([growth(9, 9), growth(5, 7), growth(9, 1)].into_iter()), Some(growth(5, 7)));
        assert_eq!(Growth::most([].into_iter()), None);
    }

    #[test]
    fn a_percentile_is_one_of_the_samples() {
        let samples: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&samples, 0.99), 99.0);
        assert_eq!((percentile(&[7.0], 0.99), percentile(&[], 0.99)), (7.0, 0.0));
    }

    #[test]
    fn a_role_is_told_by_its_middle_process_and_its_largest() {
        let usage = |cpu, rss| Usage { cpu_seconds: Some(cpu), peak_rss_bytes: Some(rss), rss_bytes: None };
        let used = [(usage(0.0, 0), usage(2.0, 5)), (usage(1.0, 0), usage(5.0, 9)), (usage(0.0, 0), usage(100.0, 7))];
        let role = RoleUsage::of("trainer", &used, 2);
        assert_eq!((role.count, role.cpu_seconds, role.peak_rss_bytes), (3, Some(2.0), Some(9)));
        let unknown = RoleUsage::of("trainer", &[(Usage::default(), Usage::default())], 2);
        assert_eq!((unknown.cpu_seconds, unknown.peak_rss_bytes), (None, None));
    }

    #[test]
    fn what_memory_cannot_hold_is_refused() {
        let setting = Setting { bytes: 1 << 50, chunk_bytes: 1 << 19, broker: None, stage: Stage::Here };
        if usage::available_memory().is_some() {
            let refused = setting.check_memory("two blobs".into(), 2).unwrap_err().to_string();
            assert!(refused.starts_with("two blobs take about 2251799813 MB of memory"), "{refused}");
        }
        assert!(Setting { bytes: 4, ..setting }.check_memory("two blobs".into(), 2).is_ok());
    }
}
