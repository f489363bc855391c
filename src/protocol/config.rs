//! What every peer of a federation must share. A peer whose configuration differs stays out.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::aggregation::Strategy;
use crate::protocol::election::Policy;
use crate::types::Digest;

/// The shared configuration of a federation.
///
/// Peers compare it field by field when they meet; [`Config::entries`] is what they compare.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// The federation's name: the first topic level after the prefix, so two federations share a broker
    /// without noticing each other. One topic level: 1 to 64 of `A–Z a–z 0–9 - _ .`.
    pub federation: String,

    /// How many peers must be connected before training starts.
    ///
    /// It decides only when the federation is founded; later peers may come and go. More than half of the
    /// peers that will ever come is a safe choice.
    pub min_peers: usize,

    /// How many updates the leader needs once [`round_timeout`](Self::round_timeout) has passed.
    ///
    /// Before that it waits for every live trainer. Higher: no round is decided by a few; lower: the run
    /// goes on when many are slow. At most `min_peers - 1` is sensible, since the leader does not train.
    pub min_updates: usize,

    /// How many rounds to train at most.
    pub rounds: u64,

    /// Stop when the global model's validation accuracy (all peers, weighted) reaches this, 0 to 1.
    pub target_accuracy: Option<f64>,

    /// The smallest drop of the validation loss that counts as an improvement, in one round or in several together. See
    /// [`patience`](Self::patience).
    pub tolerance: f64,

    /// Stop when the validation loss has not improved by more than `tolerance` for this many rounds. 0: never.
    pub patience: u32,

    /// How a leader is chosen.
    pub policy: Policy,

    /// How updates become the next global model.
    pub strategy: Strategy,

    /// Which share of the members that may train does so in a round, above 0 to 1; at least one member does.
    ///
    /// Lower: less traffic and computing a round, and more rounds. Who trains is drawn by the round and its parent model, the
    /// same for all; the others evaluate, vote and accept. When a leader fails, more train: so many again in each term.
    pub fraction_train: f64,

    /// Whether the leader trains too. It costs a round the leader's training time when aggregation has to wait
    /// for it, and brings the leader's data into every round.
    pub leader_trains: bool,

    /// How long a round waits for stragglers before it goes on with `min_updates`.
    ///
    /// Longer than the slowest peer's training. A transfer that still moves bytes is waited for all the same.
    pub round_timeout: Duration,

    /// How long a leader may be silent before the members vote for the next one.
    ///
    /// A leader is heard from four times in this span. On slow lines it is longer by twice the lag of both peers' lines,
    /// as they measure it themselves. A death that the broker notices (a closed connection) is acted on at once, whatever
    /// this says.
    pub election_timeout: Duration,

    /// How long nobody new may have come before the federation is founded.
    pub settle_time: Duration,

    /// The length of a chunk, in bytes: one MQTT message of a transfer. 256 KiB to 1 MiB is fastest.
    pub chunk_bytes: usize,

    /// Settings of the training that must agree (model, sizes, optimiser …), by key, as text. The protocol only
    /// compares them.
    pub training: BTreeMap<String, String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            federation: "default".into(),
            min_peers: 2,
            min_updates: 1,
            rounds: 20,
            target_accuracy: None,
            tolerance: 0.0,
            patience: 0,
            policy: Policy::default(),
            strategy: Strategy::default(),
            fraction_train: 1.0,
            leader_trains: false,
            round_timeout: Duration::from_secs(300),
            election_timeout: Duration::from_secs(2),
            settle_time: Duration::from_millis(300),
            chunk_bytes: 512 * 1024,
            training: BTreeMap::new(),
        }
    }
}

impl Config {
    /// Every field as (key, value) text, in the order of the keys: what peers compare, and name when it differs.
    pub fn entries(&self) -> BTreeMap<String, String> {
        let millis = |d: Duration| format!("{}ms", d.as_millis());
        let own = [
            ("min_peers", self.min_peers.to_string()),
            ("min_updates", self.min_updates.to_string()),
            ("rounds", self.rounds.to_string()),
            ("target_accuracy", self.target_accuracy.map_or_else(|| "none".into(), |a| a.to_string())),
            ("tolerance", self.tolerance.to_string()),
            ("patience", self.patience.to_string()),
            ("policy", self.policy.to_string()),
            ("fraction_train", self.fraction_train.to_string()),
            ("leader_trains", self.leader_trains.to_string()),
            ("round_timeout", millis(self.round_timeout)),
            ("election_timeout", millis(self.election_timeout)),
            ("settle_time", millis(self.settle_time)),
            ("chunk_bytes", self.chunk_bytes.to_string()),
        ];
        let own = own.into_iter().map(|(key, value)| (key.to_owned(), value));
        own.chain(self.strategy.entries()).chain(self.training.clone()).collect()
    }

    /// How many of so many members train in a round, unless its leader fails: the drawn share of those that may.
    pub fn trainers(&self, members: usize) -> usize {
        let may_train = members - usize::from(!self.leader_trains && members > 1);
        if self.fraction_train >= 1.0 {
            return may_train;
        }
        ((self.fraction_train * may_train as f64).round() as usize).max(1)
    }

    /// What names this configuration among peers.
    pub fn digest(&self) -> Digest {
        let text: String = self.entries().iter().map(|(key, value)| format!("{key}={value}\n")).collect();
        Digest::of(text.as_bytes())
    }

    /// How often a leader is heard from, and how often anything unanswered is sent again.
    pub fn heartbeat(&self) -> Duration {
        self.election_timeout / 4
    }
}
