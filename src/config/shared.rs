//! Settings in the terms of the floors below: what the peers share, what a trainer needs, which data a peer has.

use std::collections::BTreeMap;

use crate::aggregation::{Parameters, Strategy, StrategyError};
use crate::config::{Settings, categories};
use crate::protocol::{Config, Policy};
use crate::training::{Backend, Model, Optimizer, Partition, PartitionOptions, ReadOptions, Source, TrainingConfig};
use crate::transfer::Codecs;

/// Each word below was read by a key whose kind lists the words that its type takes; a test goes through them all.
const CHECKED: &str = "the key takes only words that its type knows";

impl Settings {
    /// What every peer of the federation must share.
    pub fn shared(&self) -> Config {
        Config {
            federation: self.federation.clone(),
            min_peers: self.min_peers,
            min_updates: self.min_updates,
            rounds: self.rounds,
            target_accuracy: self.target_accuracy,
            tolerance: self.tolerance,
            patience: self.patience,
            policy: self.policy.parse::<Policy>().expect(CHECKED),
            strategy: self.aggregation().expect(CHECKED),
            fraction_train: self.fraction_train,
            leader_trains: self.leader_trains,
            round_timeout: self.round_timeout,
            election_timeout: self.election_timeout,
            settle_time: self.settle_time,
            chunk_bytes: self.chunk_bytes,
            training: self.entries_of_training(),
        }
    }

    /// The settings of training that peers compare: those of its group, and what strategy fedprox adds to it.
    fn entries_of_training(&self) -> BTreeMap<String, String> {
        let mut entries = self.training_entries();
        entries.insert("mu".into(), self.training().mu.to_string());
        if self.strategy == "fedprox" {
            // It aggregates as fedavg does, so that the rule alone would not tell the two apart.
            entries.insert("strategy".into(), self.strategy.into());
        }
        entries
    }

    /// How updates become a model. An error: the server optimiser does not go with the strategy, which `Layers::settings`
    /// refuses.
    pub fn aggregation(&self) -> Result<Strategy, StrategyError> {
        let parameters = Parameters {
            trim: self.trim,
            byzantine: self.byzantine,
            clip_norm: self.clip_norm,
            server_optimizer: self.server_optimizer.map(|method| method.parse().expect(CHECKED)),
            server_learning_rate: self.server_learning_rate,
            server_momentum: self.server_momentum,
            server_beta2: self.server_beta2,
            server_tau: self.server_tau,
        };
        Strategy::named(self.strategy, &parameters)
    }

    /// What a trainer needs.
    pub fn training(&self) -> TrainingConfig {
        TrainingConfig {
            model: self.model.parse::<Model>().expect(CHECKED),
            hidden: self.hidden.clone(),
            channels: self.channels.clone(),
            norm: self.norm.parse().expect(CHECKED),
            embedding_dim: self.embedding_dim,
            optimizer: self.optimizer.parse::<Optimizer>().expect(CHECKED),
            learning_rate: self.learning_rate,
            schedule: self.schedule.parse().expect(CHECKED),
            schedule_gamma: self.schedule_gamma,
            schedule_rounds: self.schedule_rounds,
            warmup_rounds: self.warmup_rounds,
            rounds: self.rounds,
            momentum: self.momentum,
            nesterov: self.nesterov,
            weight_decay: self.weight_decay,
            max_grad_norm: self.max_grad_norm,
            batch_size: self.batch_size,
            local_epochs: self.local_epochs,
            local_steps: self.local_steps,
            augment: self.augment.parse().expect(CHECKED),
            seed: self.seed,
            mu: if self.strategy == "fedprox" { self.mu } else { 0.0 },
            backend: self.backend.parse::<Backend>().expect(CHECKED),
        }
    }

    /// How weights are written as bytes.
    pub fn codecs(&self) -> Codecs {
        Codecs {
            updates: self.codec.parse().expect(CHECKED),
            model: self.model_codec.parse().expect(CHECKED),
            topk_ratio: self.topk_ratio,
            seed: self.seed,
        }
    }

    /// How the data set is shared out among the parts.
    pub fn partition(&self) -> Partition {
        let options = PartitionOptions {
            alpha: self.alpha,
            classes_per_peer: self.classes_per_peer,
            shards_per_peer: self.shards_per_peer,
            exponent: self.exponent,
        };
        Partition::named(self.partition, &options).expect(CHECKED)
    }

    /// Where the examples are.
    pub fn source(&self) -> Source {
        Source::parse(&self.data).expect(CHECKED)
    }

    /// Where those to evaluate on are, if they stand apart.
    pub fn held_out_source(&self) -> Option<Source> {
        self.val_data.as_deref().map(|data| Source::parse(data).expect(CHECKED))
    }

    /// How the examples are to be read.
    pub fn read_options(&self) -> ReadOptions {
        let choice = |word: &str, yes: &str| (word != "auto").then_some(word == yes);
        ReadOptions {
            label: self.label.clone(),
            header: choice(self.header, "yes"),
            regression: choice(self.task, "regression"),
            ignored: self.ignore_columns.clone(),
            categories: self.categories.as_deref().map(|text| categories(text).expect(CHECKED)).unwrap_or_default(),
            image_size: self.image_size,
            channels: self.image_channels.parse().expect(CHECKED),
            window: self.window,
            characters: self.characters.clone().unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Group, KEYS, Kind, Layers};

    fn defaults() -> Settings {
        Layers::new().settings().unwrap()
    }

    #[test]
    fn the_defaults_of_the_table_are_those_of_the_floors_below() {
        let training = defaults().entries_of_training();
        assert_eq!(defaults().shared(), Config { training, ..Config::default() });
        assert_eq!(defaults().training(), TrainingConfig::default());
        assert_eq!(defaults().codecs(), Codecs::default());
        assert_eq!(defaults().partition(), Partition::default());
        assert_eq!((defaults().source(), defaults().held_out_source()), (Source::Digits, None));
        assert_eq!(defaults().read_options(), ReadOptions::default());
    }

    fn word_of(choice: Option<bool>, [yes, no]: [&str; 2]) -> String {
        choice.map_or("auto", |choice| if choice { yes } else { no }).to_owned()
    }

    #[test]
    fn every_word_of_a_key_is_known_to_its_type() {
        for key in KEYS {
            let words = match key.kind {
                Kind::Choice(words) => words.to_vec(),
                Kind::Policy(_) => vec!["random", "rotate", "fixed:peer-1"],
                _ => continue,
            };
            for word in words {
                let mut layers = Layers::new();
                layers.flag(key, word).unwrap();
                let settings = layers.settings().unwrap();
                let (shared, training) = (settings.shared(), settings.training());
                let taken = [
                    ("policy", shared.policy.to_string()),
                    ("strategy", settings.strategy.to_owned()),
                    ("server_optimizer", shared.strategy.optimizer.method.to_string()),
                    ("model", training.model.to_string()),
                    ("optimizer", training.optimizer.to_string()),
                    ("norm", training.norm.to_string()),
                    ("schedule", training.schedule.to_string()),
                    ("augment", training.augment.to_string()),
                    ("backend", training.backend.to_string()),
                    ("codec", settings.codecs().updates.to_string()),
                    ("model_codec", settings.codecs().model.to_string()),
                    ("partition", settings.partition().name().to_owned()),
                    ("image_channels", settings.read_options().channels.to_string()),
                    ("header", word_of(settings.read_options().header, ["yes", "no"])),
                    ("task", word_of(settings.read_options().regression, ["regression", "classes"])),
                ];
                let taken = taken.iter().find(|(name, _)| *name == key.name);
                assert_eq!(taken.map(|(_, text)| text.as_str()), Some(word), "{}", key.name);
            }
        }
    }

    #[test]
    fn peers_agree_on_what_training_asks_for_and_on_the_codecs() {
        let settings = defaults();
        let mut expected = settings.training_entries();
        let codecs = [("codec", "f32"), ("model_codec", "f32"), ("topk_ratio", "0.01")];
        expected.extend(codecs.map(|(key, value)| (key.to_owned(), value.to_owned())));
        // Without fedprox it is 0, whatever its key says.
        expected.insert("mu".into(), "0".into());
        assert_eq!(settings.shared().training, expected);
        let shared = settings.shared().entries();
        for key in KEYS.iter().filter(|key| matches!(key.group, Group::Strategy | Group::Stopping | Group::Training)) {
            assert!(shared.contains_key(key.name), "{} is not compared", key.name);
        }
        for key in KEYS.iter().filter(|key| matches!(key.group, Group::Data | Group::Network | Group::Machine)) {
            assert_eq!(shared.contains_key(key.name), key.name == "chunk_bytes", "{}", key.name);
        }
    }
}
