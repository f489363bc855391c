//! What a simulated run is made of.

use serde::Deserialize;

use crate::aggregation::{Parameters, Strategy};
use crate::transfer::{Codec, Codecs};

/// The strategy that each seed has its own of.
const ANY: &str = "any";

/// Peers, network and faults. All of it can be set in a TOML file; what is not named has its default.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Scenario {
    /// How many peers start, 1 to 10,000.
    pub peers: usize,
    /// How many of them start late, at a random moment.
    pub late: usize,
    /// How many must be there before training starts; 0: all that do not start late.
    pub min_peers: usize,
    /// How many rounds to train.
    pub rounds: u64,
    /// The shortest delay of a message, in milliseconds.
    pub delay_ms: u64,
    /// What a delay may be longer, in milliseconds: each message draws its own, so they overtake each other.
    pub jitter_ms: u64,
    /// The share of messages that take ten times the jitter longer.
    pub slow: f64,
    /// The share of messages that are lost, 0 to 1.
    pub loss: f64,
    /// The share of messages that arrive twice.
    pub duplication: f64,
    /// How many times a peer crashes and starts again from its state, at most.
    pub crashes: u64,
    /// How many times a peer loses its state and comes back as another, at most.
    pub losses_of_state: u64,
    /// How many times peers are cut off from the others, for a while, at most.
    pub cuts: u64,
    /// The share of jobs that fail, as on a full disk.
    pub job_failures: f64,
    /// When the faults end, in milliseconds.
    pub faults_ms: u64,
    /// How long the longest training takes, in milliseconds.
    pub train_ms: u64,
    /// How many values the model has.
    pub values: usize,
    /// The seed of weights and data; network and faults have the run's own.
    pub data_seed: u64,
    /// How the leader is chosen.
    pub policy: String,
    /// How updates are encoded.
    pub codec: Codec,
    /// How the global model is encoded: not as `topk`.
    pub model_codec: Codec,
    /// How updates become a model; `any`: each seed has its own.
    pub strategy: String,
    /// Which share of the members trains in a round, above 0 to 1.
    pub fraction_train: f64,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            peers: 5,
            late: 0,
            min_peers: 0,
            rounds: 4,
            delay_ms: 1,
            jitter_ms: 40,
            slow: 0.02,
            loss: 0.05,
            duplication: 0.05,
            crashes: 3,
            losses_of_state: 0,
            cuts: 2,
            job_failures: 0.0,
            faults_ms: 20_000,
            train_ms: 800,
            values: 700,
            data_seed: 0,
            policy: "random".into(),
            codec: Codec::F32,
            model_codec: Codec::F32,
            strategy: "fedavg".into(),
            fraction_train: 1.0,
        }
    }
}

/// A file that is no scenario.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ScenarioError {
    /// Not TOML of a scenario; the text names line and key.
    #[error("{0}")]
    Syntax(String),
    /// A value that cannot be.
    #[error("{key} = {value}: {allowed}")]
    Value {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        allowed: &'static str,
    },
}

impl Scenario {
    /// Reads a scenario from TOML.
    pub fn parse(text: &str) -> Result<Self, ScenarioError> {
        let scenario: Self =
            toml::from_str(text).map_err(|error| ScenarioError::Syntax(error.to_string().trim_end().into()))?;
        scenario.check()?;
        Ok(scenario)
    }

    /// Refuses values that cannot be.
    pub fn check(&self) -> Result<(), ScenarioError> {
        let value = |key, value: String, allowed| Err(ScenarioError::Value { key, value, allowed });
        if !(1..=10_000).contains(&self.peers) {
            return value("peers", self.peers.to_string(), "1 to 10000");
        }
        if self.late >= self.peers {
            return value("late", self.late.to_string(), "fewer than peers");
        }
        if self.min_peers > self.peers - self.late {
            return value("min_peers", self.min_peers.to_string(), "at most the peers that do not start late");
        }
        if self.values == 0 {
            return value("values", self.values.to_string(), "at least 1");
        }
        let shares = [
            ("loss", self.loss),
            ("duplication", self.duplication),
            ("slow", self.slow),
            ("job_failures", self.job_failures),
        ];
        for (key, share) in shares {
            if !(0.0..1.0).contains(&share) {
                return value(key, share.to_string(), "0 or more and less than 1");
            }
        }
        if self.policy.parse::<crate::protocol::Policy>().is_err() {
            return value("policy", self.policy.clone(), "random, rotate or fixed:peer-N");
        }
        if self.model_codec == Codec::TopK {
            return value("model_codec", self.model_codec.to_string(), "f32, f16, bf16 or int8");
        }
        if self.strategy != ANY && Strategy::named(&self.strategy, &Parameters::default()).is_err() {
            return value("strategy", self.strategy.clone(), "the name of a strategy, or any");
        }
        let has_state = self.strategy == ANY || self.strategy(0).has_state();
        if has_state && (self.model_codec != Codec::F32 || self.codec == Codec::TopK || self.codec == Codec::Int8) {
            let codecs = format!("{} and {}", self.codec, self.model_codec);
            return value(
                "codec",
                codecs,
                "f32, f16 or bf16, and model_codec f32, where a strategy remembers something",
            );
        }
        if !(self.fraction_train > 0.0 && self.fraction_train <= 1.0) {
            return value("fraction_train", self.fraction_train.to_string(), "above 0 to 1");
        }
        Ok(())
    }

    /// How weights are encoded. A model of the simulator is small: of its entries many are sent, and many not.
    pub(super) fn codecs(&self) -> Codecs {
        Codecs { updates: self.codec, model: self.model_codec, topk_ratio: 0.2, ..Codecs::default() }
    }

    /// The strategy of the run with this seed.
    pub(super) fn strategy(&self, seed: u64) -> Strategy {
        let any = Strategy::NAMES[seed as usize % Strategy::NAMES.len()];
        let name = if self.strategy == ANY { any } else { &self.strategy };
        // `check` has seen that it is one.
        Strategy::named(name, &Parameters::default()).unwrap_or_default()
    }

    /// How many peers must be there before training starts.
    pub fn founders(&self) -> usize {
        if self.min_peers == 0 { self.peers - self.late } else { self.min_peers }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_names_only_what_differs() {
        let scenario = Scenario::parse("peers = 7\nloss = 0.2").unwrap();
        assert_eq!(scenario, Scenario { peers: 7, loss: 0.2, ..Scenario::default() });
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        assert!(Scenario::parse("pears = 7").unwrap_err().to_string().contains("pears"));
        assert!(Scenario::parse("loss = 1.0").unwrap_err().to_string().starts_with("loss = 1"));
        assert!(Scenario::parse("policy = 'x'").is_err());
        assert!(Scenario::parse("codec = 'topk'").is_ok());
        assert!(Scenario::parse("model_codec = 'topk'").is_err());
        assert!(Scenario::parse("strategy = 'any'\ncodec = 'f16'").is_ok());
        assert!(Scenario::parse("strategy = 'fedavrg'").is_err());
        assert!(Scenario::parse("strategy = 'fedadam'\nmodel_codec = 'int8'").is_err());
        assert!(Scenario::parse("fraction_train = 0").is_err());
    }
}
