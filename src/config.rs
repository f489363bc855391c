//! The configuration of one process: defaults, then a file, then the environment, then flags.
//!
//! It is flat: a key has one name ([`KEYS`]) in all four layers. [`Layers`] keeps what each layer says, with its
//! [`Source`]; [`Settings`] is the outcome, typed and checked. Nothing here reads a file or the environment: both
//! are arguments.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use toml::de::{DeTable, DeValue};

use crate::aggregation::Rule;
use crate::types::{Address, PeerId};

mod keys;
mod shared;
mod value;

pub use keys::{Group, KEYS, Key, NONE, UsedBy, VARIABLE_PREFIX, markdown};
pub use value::{Kind, Part, Reals, Value, categories};

/// The most peers that a key takes.
const PEERS_MAX: usize = 10_000;

/// Variables that carry the prefix and are no keys: the name of the configuration file, the filter of the log, and the
/// interpreter that `bench train` finds torch with.
pub const OTHER_VARIABLES: [&str; 3] = ["RODIZIO_CONFIG", "RODIZIO_LOG", "RODIZIO_PYTHON"];

/// The outcome of all layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Name of the federation, one topic level.
    pub federation: String,
    /// How many peers must be there before training starts.
    pub min_peers: usize,
    /// How many updates a round needs once `round_timeout` has passed.
    pub min_updates: usize,
    /// How a leader is chosen: a word, or `fixed:NAME`.
    pub policy: String,
    /// How updates become the next global model.
    pub strategy: &'static str,
    /// Share of the members that trains in a round, above 0 to 1.
    pub fraction_train: f64,
    /// How strongly fedprox holds local weights to the global model's.
    pub mu: f64,
    /// The server optimizer, if it is not the strategy's own.
    pub server_optimizer: Option<&'static str>,
    /// Length of the server optimizer's step, if it is not its own.
    pub server_learning_rate: Option<f64>,
    /// Share of the last direction that the server optimizer keeps, 0 to below 1.
    pub server_momentum: f64,
    /// Share of the second moment that adam and yogi keep, 0 to below 1.
    pub server_beta2: f64,
    /// The adaptive server optimizers' tau.
    pub server_tau: f64,
    /// Share of the values that trimmed-mean leaves out at either end, 0 to below a half.
    pub trim: f64,
    /// How many updates of a round may be bad.
    pub byzantine: usize,
    /// The longest difference that norm-clip lets pass, if it is given.
    pub clip_norm: Option<f64>,
    /// Whether the leader of a round trains too.
    pub leader_trains: bool,
    /// How many rounds to train at most.
    pub rounds: u64,
    /// Stop when the validation accuracy reaches this, 0 to 1.
    pub target_accuracy: Option<f64>,
    /// Stop after this many rounds without a better validation loss; 0: never.
    pub patience: u32,
    /// Smallest drop of the validation loss that counts as better.
    pub tolerance: f64,
    /// The model.
    pub model: &'static str,
    /// Widths of the hidden layers.
    pub hidden: Vec<usize>,
    /// Channels of the convolutions, or of the stages.
    pub channels: Vec<usize>,
    /// What is normalised over.
    pub norm: &'static str,
    /// How many values stand for a token.
    pub embedding_dim: usize,
    /// How a step follows from a gradient.
    pub optimizer: &'static str,
    /// Length of a step.
    pub learning_rate: f64,
    /// How the length of a step changes over the rounds.
    pub schedule: &'static str,
    /// What the schedules step and exponential multiply by.
    pub schedule_gamma: f64,
    /// After how many rounds the schedule step multiplies.
    pub schedule_rounds: u64,
    /// Rounds over which the length of a step rises first.
    pub warmup_rounds: u64,
    /// Share of the last step that sgd keeps, 0 to below 1.
    pub momentum: f64,
    /// Whether sgd looks ahead by its momentum.
    pub nesterov: bool,
    /// How strongly weights are drawn to 0.
    pub weight_decay: f64,
    /// The longest that the gradient of a step may be.
    pub max_grad_norm: Option<f64>,
    /// Examples in a step.
    pub batch_size: usize,
    /// Passes over a peer's own data in a round.
    pub local_epochs: u32,
    /// Steps in a round, instead of passes.
    pub local_steps: Option<u64>,
    /// How images are changed before each step.
    pub augment: &'static str,
    /// How updates are encoded.
    pub codec: &'static str,
    /// How the global model is encoded.
    pub model_codec: &'static str,
    /// Share of an update that codec topk sends, above 0 and below 1.
    pub topk_ratio: f64,
    /// Seed of weights, partition and order.
    pub seed: u64,
    /// The data set: see [`Source`](crate::training::Source).
    pub data: String,
    /// Examples to evaluate on, if they stand apart.
    pub val_data: Option<String>,
    /// Share of a peer's examples held out, between 0 and 1.
    pub val_fraction: f64,
    /// The column of a table to tell, by name or by number from 1.
    pub label: Option<String>,
    /// What the label is.
    pub task: &'static str,
    /// Whether a table's first line names the columns.
    pub header: &'static str,
    /// Columns of a table to pass over.
    pub ignore_columns: Vec<String>,
    /// All values of some columns: see [`categories`].
    pub categories: Option<String>,
    /// Height and width of pictures, in pixels.
    pub image_size: Option<usize>,
    /// Channels of pictures.
    pub image_channels: &'static str,
    /// How many characters of a text are an example.
    pub window: usize,
    /// Characters of a text beyond ASCII to tell apart.
    pub characters: Option<String>,
    /// How one data set is split among peers.
    pub partition: &'static str,
    /// Skew of the dirichlet partition.
    pub alpha: f64,
    /// Classes of a peer in the pathological partition.
    pub classes_per_peer: usize,
    /// Shards of a peer in the shards partition.
    pub shards_per_peer: usize,
    /// Skew of the power-law partition.
    pub exponent: f64,
    /// Which part of the data set is this peer's, when it is split for a simulation.
    pub part: Option<Part>,
    /// How long a round waits for the slowest.
    pub round_timeout: Duration,
    /// How long a leader may be silent.
    pub election_timeout: Duration,
    /// How long nobody new may have come before training starts.
    pub settle_time: Duration,
    /// How long to wait for missing peers before giving up.
    pub wait_timeout: Duration,
    /// Brokers, `HOST:PORT`, in order of preference; may be empty.
    pub brokers: Vec<String>,
    /// Where a broker of one's own listens, `HOST:PORT`.
    pub listen: Option<String>,
    /// Whether this peer runs a broker for the others.
    pub host_broker: bool,
    /// Where others reach the broker that this peer runs.
    pub advertise: Option<Address>,
    /// Start of every topic.
    pub prefix: String,
    /// Length of one message of a transfer, in bytes.
    pub chunk_bytes: usize,
    /// How many peers `run` starts.
    pub peers: usize,
    /// Whether `run` starts every peer as a process of its own.
    pub processes: bool,
    /// Name of this peer.
    pub peer: Option<PeerId>,
    /// A program that trains in place of model and data.
    pub trainer: Option<String>,
    /// How long it may be silent.
    pub trainer_timeout: Duration,
    /// On how many threads a peer trains.
    pub threads: usize,
    /// What computes the training.
    pub backend: &'static str,
    /// A file with the weights to start from.
    pub init: Option<PathBuf>,
    /// Where a peer keeps its name and its state.
    pub state_dir: Option<PathBuf>,
    /// Where the results go.
    pub run_dir: Option<PathBuf>,
}

/// Who set a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Nobody.
    Default,
    /// The program itself, for the reason given.
    Derived(&'static str),
    /// A configuration file.
    File {
        /// Its name, as the user gave it.
        name: String,
        /// The line, from 1.
        line: usize,
    },
    /// An environment variable.
    Variable(String),
    /// A flag, with its dashes.
    Flag(String),
}

/// A configuration that cannot be used. [`ConfigError::hint`] says what to do.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    /// The file is not TOML.
    #[error("{name}, line {line}: not valid TOML: {message}")]
    Syntax {
        /// Name of the file.
        name: String,
        /// The line, from 1.
        line: usize,
        /// What the parser says.
        message: String,
    },
    /// A key that does not exist.
    #[error("unknown key {key:?} ({at})")]
    UnknownKey {
        /// The key as it was given.
        key: String,
        /// Where.
        at: Source,
        /// The nearest name that exists, spelled as it would be there.
        nearest: Option<String>,
    },
    /// A value that its key does not take.
    #[error("{key} cannot be {text:?} ({at})")]
    BadValue {
        /// The key.
        key: &'static str,
        /// The value as it was given.
        text: String,
        /// Where.
        at: Source,
        /// What the key takes, in words.
        allowed: String,
    },
    /// Two values that do not go together.
    #[error("{left} does not go with {right}")]
    Conflict {
        /// The one value: `key = value (source)`.
        left: String,
        /// The other.
        right: String,
        /// What holds between the two, and what to do.
        rule: String,
    },
}

/// What each key was set to last, and by whom.
#[derive(Debug, Clone)]
pub struct Layers {
    given: BTreeMap<&'static str, (String, Source)>,
}

impl Default for Layers {
    fn default() -> Self {
        let given = KEYS.iter().map(|key| (key.name, (key.default.to_owned(), Source::Default)));
        Self { given: given.collect() }
    }
}

impl Layers {
    /// The defaults. The other layers are added in rising order.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the TOML text of a file that is called `name`.
    pub fn file(&mut self, name: &str, text: &str) -> Result<(), ConfigError> {
        let table = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
            name: name.to_owned(),
            line: line_of(text, error.span().map_or(0, |span| span.start)),
            message: error.message().to_owned(),
        })?;
        // The parser sorts by key; the first mistake to report is the first in the file.
        let mut entries: Vec<_> = table.get_ref().iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        for (name_in_file, value) in entries {
            let at = Source::File { name: name.to_owned(), line: line_of(text, name_in_file.span().start) };
            let name_in_file = name_in_file.get_ref();
            let key = Key::find(name_in_file).ok_or_else(|| unknown(name_in_file, &at, |key| key.name.to_owned()))?;
            let text = plain_text(value.get_ref()).ok_or_else(|| bad_value(key, &text[value.span()], &at))?;
            self.set(key, &text, at)?;
        }
        Ok(())
    }

    /// Adds the variables whose names start with [`VARIABLE_PREFIX`]; others are skipped.
    pub fn environment(&mut self, variables: impl IntoIterator<Item = (String, String)>) -> Result<(), ConfigError> {
        for (name, text) in variables {
            if !name.starts_with(VARIABLE_PREFIX) || OTHER_VARIABLES.contains(&name.as_str()) {
                continue;
            }
            let key = KEYS.iter().find(|key| key.variable() == name);
            let key = key.ok_or_else(|| unknown(&name, &Source::Variable(name.clone()), Key::variable))?;
            self.set(key, &text, Source::Variable(name))?;
        }
        Ok(())
    }

    /// Adds one flag of the command line.
    pub fn flag(&mut self, key: &'static Key, text: &str) -> Result<(), ConfigError> {
        self.set(key, text, Source::Flag(format!("--{}", key.flag())))
    }

    /// Sets a key that nobody has set: a default that follows from something else, for the reason `why`.
    ///
    /// # Panics
    /// If there is no such key or it does not take `text`.
    pub fn derive(&mut self, name: &str, text: &str, why: &'static str) {
        if *self.source(name) == Source::Default {
            let key = Key::find(name).expect("the caller names a key of the table");
            self.set(key, text, Source::Derived(why)).expect("the caller gives a value that its key takes");
        }
    }

    /// Who set the key of that name.
    ///
    /// # Panics
    /// If there is no such key.
    pub fn source(&self, name: &str) -> &Source {
        &self.entry(name).1
    }

    /// The settings, checked one by one and against each other.
    pub fn settings(&self) -> Result<Settings, ConfigError> {
        let settings = Settings {
            federation: self.text("federation"),
            min_peers: self.count("min_peers"),
            min_updates: self.count("min_updates"),
            policy: self.text("policy"),
            strategy: self.choice("strategy"),
            fraction_train: self.set_real("fraction_train"),
            mu: self.set_real("mu"),
            server_optimizer: self.optional_choice("server_optimizer"),
            server_learning_rate: self.real("server_learning_rate"),
            server_momentum: self.set_real("server_momentum"),
            server_beta2: self.set_real("server_beta2"),
            server_tau: self.set_real("server_tau"),
            trim: self.set_real("trim"),
            byzantine: self.count("byzantine"),
            clip_norm: self.real("clip_norm"),
            leader_trains: self.switch("leader_trains"),
            rounds: self.count("rounds"),
            target_accuracy: self.real("target_accuracy"),
            patience: self.count("patience"),
            tolerance: self.set_real("tolerance"),
            model: self.choice("model"),
            hidden: self.counts("hidden"),
            channels: self.counts("channels"),
            norm: self.choice("norm"),
            embedding_dim: self.count("embedding_dim"),
            optimizer: self.choice("optimizer"),
            learning_rate: self.set_real("learning_rate"),
            schedule: self.choice("schedule"),
            schedule_gamma: self.set_real("schedule_gamma"),
            schedule_rounds: self.count("schedule_rounds"),
            warmup_rounds: self.count("warmup_rounds"),
            momentum: self.set_real("momentum"),
            nesterov: self.switch("nesterov"),
            weight_decay: self.set_real("weight_decay"),
            max_grad_norm: self.real("max_grad_norm"),
            batch_size: self.count("batch_size"),
            local_epochs: self.count("local_epochs"),
            local_steps: self.optional_count("local_steps"),
            augment: self.choice("augment"),
            codec: self.choice("codec"),
            model_codec: self.choice("model_codec"),
            topk_ratio: self.set_real("topk_ratio"),
            seed: self.count("seed"),
            data: self.text("data"),
            val_data: self.optional_text("val_data"),
            val_fraction: self.set_real("val_fraction"),
            label: self.optional_text("label"),
            task: self.choice("task"),
            header: self.choice("header"),
            ignore_columns: self.texts("ignore_columns"),
            categories: self.optional_text("categories"),
            image_size: self.optional_count("image_size"),
            image_channels: self.choice("image_channels"),
            window: self.count("window"),
            characters: self.optional_text("characters"),
            partition: self.choice("partition"),
            alpha: self.set_real("alpha"),
            classes_per_peer: self.count("classes_per_peer"),
            shards_per_peer: self.count("shards_per_peer"),
            exponent: self.set_real("exponent"),
            part: self.part("part"),
            round_timeout: self.duration("round_timeout"),
            election_timeout: self.duration("election_timeout"),
            settle_time: self.duration("settle_time"),
            wait_timeout: self.duration("wait_timeout"),
            brokers: self.texts("broker"),
            listen: self.optional_text("listen"),
            host_broker: self.switch("host_broker"),
            advertise: self.address("advertise"),
            prefix: self.text("prefix"),
            chunk_bytes: self.count("chunk_bytes"),
            peers: self.count("peers"),
            processes: self.switch("processes"),
            peer: self.peer("peer"),
            trainer: self.optional_text("trainer"),
            trainer_timeout: self.duration("trainer_timeout"),
            threads: self.count("threads"),
            backend: self.choice("backend"),
            init: self.path("init"),
            state_dir: self.path("state_dir"),
            run_dir: self.path("run_dir"),
        };
        self.check_together(&settings)?;
        Ok(settings)
    }

    /// How many peers `run` starts, whatever else the settings say.
    pub fn peers(&self) -> usize {
        self.count("peers")
    }

    /// Where the examples are, whatever else the settings say.
    pub fn source_of_data(&self) -> crate::training::Source {
        crate::training::Source::parse(&self.text("data")).expect("its kind takes only sources")
    }

    /// The settings of `run`, which starts all its peers itself: there must be enough of them.
    pub fn settings_of_run(&self) -> Result<Settings, ConfigError> {
        let settings = self.settings()?;
        if settings.source().is_pattern() && settings.partition != "iid" {
            let rule = "each file of a pattern is one peer's, and nothing is shared out: leave partition out, or name one file";
            return Err(self.conflict("partition", "data", rule));
        }
        if settings.peers < settings.min_peers {
            return Err(self.conflict(
                "peers",
                "min_peers",
                "peers must be at least min_peers, or training never starts",
            ));
        }
        self.check_updates(&settings)?;
        Ok(settings)
    }

    /// The settings of `join`, which trains with whoever is there, and at least `min_peers`.
    pub fn settings_of_join(&self) -> Result<Settings, ConfigError> {
        let settings = self.settings()?;
        self.check_updates(&settings)?;
        Ok(settings)
    }

    /// What is proven of a robust strategy must hold from the first round on. When peers leave later, the others are told.
    fn check_updates(&self, settings: &Settings) -> Result<(), ConfigError> {
        let shared = settings.shared();
        let (needed, updates) = (shared.strategy.rule.updates_proven(), shared.trainers(settings.min_peers));
        if updates >= needed {
            return Ok(());
        }
        // A run starts with all its peers, unless it was told of fewer.
        let key = if matches!(self.source("min_peers"), Source::Derived(_)) { "peers" } else { "min_peers" };
        let raise = match (settings.min_peers..=PEERS_MAX).find(|peers| shared.trainers(*peers) >= needed) {
            Some(enough) => format!("set {key} to {enough} or more"),
            None => format!("raise {key} or fraction_train"),
        };
        let bad = match shared.strategy.rule {
            Rule::Krum { byzantine } | Rule::MultiKrum { byzantine } | Rule::Bulyan { byzantine } => {
                format!("byzantine = {byzantine} bad ones")
            }
            _ => "a bad one".to_owned(),
        };
        let rule = format!(
            "to keep {bad} out of the model this strategy needs {needed} updates a round, and {} peers bring {updates}: \
             {raise}{}",
            settings.min_peers,
            if settings.leader_trains { "" } else { ", or leader_trains = true, which makes it one more" },
        );
        Err(self.conflict(key, "strategy", &rule))
    }

    fn check_together(&self, settings: &Settings) -> Result<(), ConfigError> {
        let updates_max = settings.min_peers - usize::from(!settings.leader_trains);
        if updates_max == 0 {
            let rule = "a single peer leads every round: set leader_trains = true so that it trains as well";
            return Err(self.conflict("min_peers", "leader_trains", rule));
        }
        if settings.min_updates > updates_max {
            let rule = format!(
                "the leader trains only with leader_trains = true, so min_updates can be at most {updates_max} here"
            );
            return Err(self.conflict("min_updates", "min_peers", &rule));
        }
        // A run writes its settings down with every key.
        let has_data = Key::find("data").is_some_and(|key| settings.data != key.default);
        if settings.trainer.is_some() && has_data {
            let rule = "a program that trains reads data of its own: name them in its command, and leave data out";
            return Err(self.conflict("trainer", "data", rule));
        }
        if settings.nesterov && settings.momentum == 0.0 {
            return Err(self.conflict(
                "nesterov",
                "momentum",
                "nesterov looks ahead by the momentum: set one, like 0.9",
            ));
        }
        if settings.round_timeout <= settings.election_timeout {
            let rule = "round_timeout must be longer than election_timeout: a round outlasts a change of leaders";
            return Err(self.conflict("round_timeout", "election_timeout", rule));
        }
        self.check_strategy(settings)
    }

    fn check_strategy(&self, settings: &Settings) -> Result<(), ConfigError> {
        let strategy = match settings.aggregation() {
            Ok(strategy) => strategy,
            Err(error) => return Err(self.conflict("server_optimizer", "strategy", &error.to_string())),
        };
        if strategy.has_state() && settings.model_codec != "f32" {
            let rule =
                "what the strategy remembers travels with the model and must stay exact: leave model_codec at f32";
            return Err(self.conflict("model_codec", "strategy", rule));
        }
        if strategy.has_control() && !["f32", "f16", "bf16"].contains(&settings.codec) {
            let rule = "scaffold sends control variates with each update, as f32, f16 or bf16";
            return Err(self.conflict("codec", "strategy", rule));
        }
        if settings.codec == "topk" && settings.norm == "batch" {
            let rule = "what topk keeps back overshoots, which makes running variances negative: set norm = group";
            return Err(self.conflict("codec", "norm", rule));
        }
        let by_sgd = settings.optimizer == "sgd";
        if matches!(strategy.rule, Rule::Scaffold | Rule::FedNova) && !by_sgd {
            let rule = "scaffold and fednova count the steps of sgd: set optimizer = sgd";
            return Err(self.conflict("optimizer", "strategy", rule));
        }
        Ok(())
    }

    fn conflict(&self, left: &str, right: &str, rule: &str) -> ConfigError {
        let named = |name: &str| {
            let (text, source) = self.entry(name);
            format!("{name} = {text} ({source})")
        };
        ConfigError::Conflict { left: named(left), right: named(right), rule: rule.to_owned() }
    }

    /// Whatever is kept has been parsed once, so that reading it again cannot fail.
    fn set(&mut self, key: &'static Key, text: &str, at: Source) -> Result<(), ConfigError> {
        let unset = key.is_optional() && text.trim() == NONE;
        if !unset && key.kind.parse(text).is_none() {
            return Err(bad_value(key, text, &at));
        }
        self.given.insert(key.name, (text.trim().to_owned(), at));
        Ok(())
    }

    fn entry(&self, name: &str) -> &(String, Source) {
        self.given.get(name).expect("the caller names a key of the table, and every key has an entry")
    }

    fn value(&self, name: &str) -> Value {
        let key = Key::find(name).expect("the caller names a key of the table");
        let (text, _) = self.entry(name);
        if key.is_optional() && text == NONE {
            return Value::Unset;
        }
        key.kind.parse(text).expect("`set` parsed it")
    }
}

/// Typed reading. A kind that does not fit the field is a mistake in the table, which every test meets.
impl Layers {
    fn count<N: TryFrom<u64>>(&self, name: &str) -> N {
        match self.value(name) {
            Value::Count(n) | Value::Size(n) => narrow(n),
            other => mistyped(name, &other),
        }
    }

    fn optional_count<N: TryFrom<u64>>(&self, name: &str) -> Option<N> {
        match self.value(name) {
            Value::Count(n) => Some(narrow(n)),
            Value::Unset => None,
            other => mistyped(name, &other),
        }
    }

    fn counts(&self, name: &str) -> Vec<usize> {
        match self.value(name) {
            Value::Counts(items) => items.into_iter().map(narrow).collect(),
            other => mistyped(name, &other),
        }
    }

    fn real(&self, name: &str) -> Option<f64> {
        match self.value(name) {
            Value::Real(x) => Some(x),
            Value::Unset => None,
            other => mistyped(name, &other),
        }
    }

    fn set_real(&self, name: &str) -> f64 {
        self.real(name).unwrap_or_else(|| mistyped(name, &Value::Unset))
    }

    fn switch(&self, name: &str) -> bool {
        match self.value(name) {
            Value::Switch(on) => on,
            other => mistyped(name, &other),
        }
    }

    fn choice(&self, name: &str) -> &'static str {
        match self.value(name) {
            Value::Choice(word) => word,
            Value::Unset => NONE,
            other => mistyped(name, &other),
        }
    }

    fn optional_choice(&self, name: &str) -> Option<&'static str> {
        match self.value(name) {
            Value::Choice(word) => Some(word),
            Value::Unset => None,
            other => mistyped(name, &other),
        }
    }

    fn duration(&self, name: &str) -> Duration {
        match self.value(name) {
            Value::Duration(span) => span,
            other => mistyped(name, &other),
        }
    }

    fn address(&self, name: &str) -> Option<Address> {
        let text = self.optional_text(name)?;
        Some(Address::new(&text).expect("its kind takes only addresses"))
    }

    fn optional_text(&self, name: &str) -> Option<String> {
        match self.value(name) {
            Value::Text(text) => Some(text),
            Value::Unset => None,
            other => mistyped(name, &other),
        }
    }

    fn text(&self, name: &str) -> String {
        self.optional_text(name).unwrap_or_else(|| mistyped(name, &Value::Unset))
    }

    fn texts(&self, name: &str) -> Vec<String> {
        match self.value(name) {
            Value::Texts(items) => items,
            Value::Unset => Vec::new(),
            other => mistyped(name, &other),
        }
    }

    fn peer(&self, name: &str) -> Option<PeerId> {
        match self.value(name) {
            Value::Peer(peer) => Some(peer),
            Value::Unset => None,
            other => mistyped(name, &other),
        }
    }

    fn part(&self, name: &str) -> Option<Part> {
        match self.value(name) {
            Value::Part(part) => Some(part),
            Value::Unset => None,
            other => mistyped(name, &other),
        }
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        match self.value(name) {
            Value::Path(path) => Some(path),
            Value::Unset => None,
            other => mistyped(name, &other),
        }
    }
}

impl Settings {
    /// Every key with its value, in the order of [`KEYS`].
    pub fn values(&self) -> Vec<(&'static Key, Value)> {
        KEYS.iter().map(|key| (key, self.value(key.name))).collect()
    }

    /// What peers must agree on about training, by key, as text: the group [`Group::Training`]. Keys of the data are not
    /// among them: they change a peer's own examples and nobody else's.
    pub fn training_entries(&self) -> BTreeMap<String, String> {
        let of_training = self.values().into_iter().filter(|(key, _)| key.group == Group::Training);
        of_training.map(|(key, value)| (key.name.to_owned(), value.to_string())).collect()
    }

    /// The settings as a commented file that loads back to the same settings. `layers` tell who set what.
    pub fn to_toml(&self, layers: &Layers) -> String {
        let mut text = String::new();
        let mut group = None;
        for (key, value) in self.values() {
            if group.replace(key.group) != Some(key.group) {
                let gap = if text.is_empty() { "" } else { "\n" };
                text += &format!("{gap}### {}\n\n", key.group.title());
            }
            let origin = match layers.source(key.name) {
                Source::Default => String::new(),
                source => format!("  # {}", source.to_string().replace(char::is_control, " ")),
            };
            text += &format!("# {}\n{} = {}{origin}\n", key.help, key.name, value.to_toml());
        }
        text
    }

    /// The settings as one flat JSON object.
    pub fn to_json(&self) -> serde_json::Value {
        self.values().into_iter().map(|(key, value)| (key.name.to_owned(), value.to_json())).collect()
    }

    fn value(&self, name: &str) -> Value {
        match name {
            "federation" => Value::Text(self.federation.clone()),
            "min_peers" => Value::Count(self.min_peers as u64),
            "min_updates" => Value::Count(self.min_updates as u64),
            "policy" => Value::Text(self.policy.clone()),
            "strategy" => Value::Choice(self.strategy),
            "fraction_train" => Value::Real(self.fraction_train),
            "mu" => Value::Real(self.mu),
            "server_optimizer" => or_unset(self.server_optimizer, Value::Choice),
            "server_learning_rate" => or_unset(self.server_learning_rate, Value::Real),
            "server_momentum" => Value::Real(self.server_momentum),
            "server_beta2" => Value::Real(self.server_beta2),
            "server_tau" => Value::Real(self.server_tau),
            "trim" => Value::Real(self.trim),
            "byzantine" => Value::Count(self.byzantine as u64),
            "clip_norm" => or_unset(self.clip_norm, Value::Real),
            "leader_trains" => Value::Switch(self.leader_trains),
            "rounds" => Value::Count(self.rounds),
            "target_accuracy" => or_unset(self.target_accuracy, Value::Real),
            "patience" => Value::Count(self.patience.into()),
            "tolerance" => Value::Real(self.tolerance),
            "model" => Value::Choice(self.model),
            "hidden" => Value::Counts(self.hidden.iter().map(|width| *width as u64).collect()),
            "channels" => Value::Counts(self.channels.iter().map(|count| *count as u64).collect()),
            "norm" => Value::Choice(self.norm),
            "embedding_dim" => Value::Count(self.embedding_dim as u64),
            "optimizer" => Value::Choice(self.optimizer),
            "learning_rate" => Value::Real(self.learning_rate),
            "schedule" => Value::Choice(self.schedule),
            "schedule_gamma" => Value::Real(self.schedule_gamma),
            "schedule_rounds" => Value::Count(self.schedule_rounds),
            "warmup_rounds" => Value::Count(self.warmup_rounds),
            "momentum" => Value::Real(self.momentum),
            "nesterov" => Value::Switch(self.nesterov),
            "weight_decay" => Value::Real(self.weight_decay),
            "max_grad_norm" => or_unset(self.max_grad_norm, Value::Real),
            "batch_size" => Value::Count(self.batch_size as u64),
            "local_epochs" => Value::Count(self.local_epochs.into()),
            "local_steps" => or_unset(self.local_steps, Value::Count),
            "augment" => or_unset(Some(self.augment).filter(|word| *word != NONE), Value::Choice),
            "codec" => Value::Choice(self.codec),
            "model_codec" => Value::Choice(self.model_codec),
            "topk_ratio" => Value::Real(self.topk_ratio),
            "seed" => Value::Count(self.seed),
            "data" => Value::Text(self.data.clone()),
            "val_data" => or_unset(self.val_data.clone(), Value::Text),
            "val_fraction" => Value::Real(self.val_fraction),
            "label" => or_unset(self.label.clone(), Value::Text),
            "task" => Value::Choice(self.task),
            "header" => Value::Choice(self.header),
            "ignore_columns" => {
                or_unset((!self.ignore_columns.is_empty()).then(|| self.ignore_columns.clone()), Value::Texts)
            }
            "categories" => or_unset(self.categories.clone(), Value::Text),
            "image_size" => or_unset(self.image_size, |size| Value::Count(size as u64)),
            "image_channels" => Value::Choice(self.image_channels),
            "window" => Value::Count(self.window as u64),
            "characters" => or_unset(self.characters.clone(), Value::Text),
            "partition" => Value::Choice(self.partition),
            "alpha" => Value::Real(self.alpha),
            "classes_per_peer" => Value::Count(self.classes_per_peer as u64),
            "shards_per_peer" => Value::Count(self.shards_per_peer as u64),
            "exponent" => Value::Real(self.exponent),
            "part" => or_unset(self.part, Value::Part),
            "round_timeout" => Value::Duration(self.round_timeout),
            "election_timeout" => Value::Duration(self.election_timeout),
            "settle_time" => Value::Duration(self.settle_time),
            "wait_timeout" => Value::Duration(self.wait_timeout),
            "broker" => or_unset((!self.brokers.is_empty()).then(|| self.brokers.clone()), Value::Texts),
            "listen" => or_unset(self.listen.clone(), Value::Text),
            "host_broker" => Value::Switch(self.host_broker),
            "advertise" => or_unset(self.advertise.as_ref().map(Address::to_string), Value::Text),
            "prefix" => Value::Text(self.prefix.clone()),
            "chunk_bytes" => Value::Size(self.chunk_bytes as u64),
            "peers" => Value::Count(self.peers as u64),
            "processes" => Value::Switch(self.processes),
            "peer" => or_unset(self.peer.clone(), Value::Peer),
            "trainer" => or_unset(self.trainer.clone(), Value::Text),
            "trainer_timeout" => Value::Duration(self.trainer_timeout),
            "threads" => Value::Count(self.threads as u64),
            "backend" => Value::Choice(self.backend),
            "init" => or_unset(self.init.clone(), Value::Path),
            "state_dir" => or_unset(self.state_dir.clone(), Value::Path),
            "run_dir" => or_unset(self.run_dir.clone(), Value::Path),
            _ => unreachable!("{name} is in the table but not in Settings: every test that prints them meets this"),
        }
    }
}

impl ConfigError {
    /// What to do about it, in a line.
    pub fn hint(&self) -> String {
        match self {
            ConfigError::Syntax { .. } => "a line reads `key = value`; text stands in quotes".into(),
            ConfigError::UnknownKey { nearest: Some(nearest), .. } => format!("did you mean {nearest}?"),
            ConfigError::UnknownKey { nearest: None, .. } => "`rodizio config` lists every key".into(),
            ConfigError::BadValue { key, allowed, .. } => format!("{key} takes {allowed}"),
            ConfigError::Conflict { rule, .. } => rule.clone(),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Default => f.write_str("default"),
            Source::Derived(why) => f.write_str(why),
            Source::File { name, line } => write!(f, "{name}, line {line}"),
            Source::Variable(name) => write!(f, "variable {name}"),
            Source::Flag(flag) => write!(f, "flag {flag}"),
        }
    }
}

/// `None` for a table or a date: no key takes one.
fn plain_text(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(n) => i64::from_str_radix(n.as_str(), n.radix()).ok().map(|n| n.to_string()),
        DeValue::Float(x) => Some(x.as_str().to_owned()),
        DeValue::Boolean(on) => Some(on.to_string()),
        DeValue::Array(items) if items.is_empty() => Some(NONE.to_owned()),
        DeValue::Array(items) => {
            let flat = |item: &DeValue<'_>| !matches!(item, DeValue::Array(_)) && !is_empty_text(item);
            let texts = items.iter().map(|item| plain_text(item.get_ref()).filter(|_| flat(item.get_ref())));
            texts.collect::<Option<Vec<_>>>().map(|texts| texts.join(","))
        }
        DeValue::Datetime(_) | DeValue::Table(_) => None,
    }
}

fn is_empty_text(value: &DeValue<'_>) -> bool {
    matches!(value, DeValue::String(text) if text.is_empty())
}

fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|b| *b == b'\n').count()
}

fn bad_value(key: &'static Key, text: &str, at: &Source) -> ConfigError {
    ConfigError::BadValue { key: key.name, text: text.to_owned(), at: at.clone(), allowed: key.allowed() }
}

/// The nearest name is the one with the fewest edits, if they are few for its length.
fn unknown(given: &str, at: &Source, spelled: fn(&Key) -> String) -> ConfigError {
    let folded = given.to_ascii_lowercase().replace('-', "_");
    let distance = |key: &Key| strsim::damerau_levenshtein(&folded, &spelled(key).to_ascii_lowercase());
    let nearest = KEYS.iter().map(|key| (distance(key), key)).min_by_key(|(edits, _)| *edits);
    let nearest = nearest.filter(|(edits, key)| *edits <= 1 + key.name.len() / 3);
    let nearest = nearest.map(|(_, key)| spelled(key));
    ConfigError::UnknownKey { key: given.to_owned(), at: at.clone(), nearest }
}

fn or_unset<T>(value: Option<T>, wrap: impl Fn(T) -> Value) -> Value {
    value.map_or(Value::Unset, wrap)
}

fn narrow<N: TryFrom<u64>>(n: u64) -> N {
    N::try_from(n).unwrap_or_else(|_| unreachable!("the table's ranges fit their fields"))
}

fn mistyped(name: &str, value: &Value) -> ! {
    unreachable!("the table's kind of {name} does not fit its field: {value:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_file(text: &str) -> Result<Settings, ConfigError> {
        let mut layers = Layers::new();
        layers.file("lab.toml", text)?;
        layers.settings()
    }

    fn with_variable(name: &str, text: &str) -> Result<Settings, ConfigError> {
        let mut layers = Layers::new();
        layers.environment([(name.to_owned(), text.to_owned())])?;
        layers.settings()
    }

    #[test]
    fn a_later_layer_wins() {
        let mut layers = Layers::new();
        layers.file("lab.toml", "rounds = 1\nbatch_size = 2\nseed = 3").unwrap();
        layers.environment([("RODIZIO_BATCH_SIZE".into(), "20".into()), ("RODIZIO_SEED".into(), "30".into())]).unwrap();
        layers.flag(Key::find("seed").unwrap(), "300").unwrap();
        let settings = layers.settings().unwrap();
        assert_eq!((settings.rounds, settings.batch_size, settings.seed, settings.patience), (1, 20, 300, 0));
        assert_eq!(layers.source("seed"), &Source::Flag("--seed".into()));
        assert_eq!(layers.source("batch_size"), &Source::Variable("RODIZIO_BATCH_SIZE".into()));
        assert_eq!(layers.source("rounds"), &Source::File { name: "lab.toml".into(), line: 1 });
    }

    #[test]
    fn every_key_can_be_set_in_every_layer() {
        for key in KEYS {
            let defaults = Layers::new().settings().unwrap();
            let sample = match key.kind {
                _ if !key.is_optional() => key.default,
                Kind::Real(_) => "0.5",
                Kind::Count { .. } => "7",
                Kind::Choice(words) => words[0],
                Kind::Path => "some/dir",
                Kind::Peer => "peer-7",
                Kind::Part => "2/5",
                Kind::Data => "csv:x.csv",
                Kind::Names => "id,name",
                Kind::Categories => "a=x|y",
                _ => "a:1883",
            };
            let file = with_file(&format!("{} = {sample:?}", key.name)).unwrap();
            let variable = with_variable(&key.variable(), sample).unwrap();
            let mut layers = Layers::new();
            layers.flag(key, sample).unwrap();
            let flag = layers.settings().unwrap();
            assert!(file == variable && variable == flag, "{}", key.name);
            assert_eq!(file != defaults, key.is_optional(), "{}", key.name);
        }
    }

    #[test]
    fn the_effective_configuration_loads_back() {
        let text = r#"
            federation = "ward"
            min_peers = 3
            min_updates = 2
            policy = "fixed:peer-2"
            target_accuracy = 0.95
            tolerance = 1e-7
            hidden = [64, 32]
            learning_rate = 3
            chunk_bytes = "1MB"
            broker = ["a:1883", "[::1]:1884"]
            listen = "0.0.0.0:0"
            round_timeout = "1h 30m"
            peer = "peer-2"
            run_dir = 'C:\runs\"x"'
            data = "csv:C:\\x.csv"
            val_data = "csv:y.csv"
            ignore_columns = ["id", "name of it"]
            categories = "a=x|y; b=1|2"
            label = 3
            image_channels = 1
            host_broker = true
            advertise = "192.168.1.20:1883"
        "#;
        let mut layers = Layers::new();
        layers.file("a\nb.toml", text).unwrap();
        let settings = layers.settings().unwrap();
        let printed = settings.to_toml(&layers);
        assert_eq!(with_file(&printed).unwrap(), settings, "{printed}");
        assert!(printed.contains("min_peers = 3  # a b.toml, line 3\n"), "{printed}");
        let defaults = Layers::new();
        let printed = defaults.settings().unwrap().to_toml(&defaults);
        assert_eq!(with_file(&printed).unwrap(), defaults.settings().unwrap(), "{printed}");
    }

    #[test]
    fn lists_may_be_arrays_or_text() {
        assert_eq!(with_file("hidden = [64, 32]").unwrap().hidden, [64, 32]);
        assert_eq!(with_file("hidden = '64, 32'").unwrap().hidden, [64, 32]);
        assert_eq!(with_file("hidden = 64").unwrap().hidden, [64]);
        assert!(with_file("hidden = []").unwrap().hidden.is_empty());
        assert!(with_file("broker = []").unwrap().brokers.is_empty());
        assert!(with_file("hidden = [[64]]").is_err() && with_file("hidden = ['']").is_err());
    }

    #[test]
    fn a_key_can_be_unset_again() {
        let mut layers = Layers::new();
        layers.file("lab.toml", "target_accuracy = 0.9").unwrap();
        layers.flag(Key::find("target_accuracy").unwrap(), NONE).unwrap();
        assert_eq!(layers.settings().unwrap().target_accuracy, None);
        assert!(with_file("rounds = 'none'").is_err());
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest() {
        for (given, nearest) in [("batchsize", "batch_size"), ("batch-size", "batch_size"), ("Rounds", "rounds")] {
            let error = with_file(&format!("\n{given} = 1")).unwrap_err();
            assert_eq!(error.to_string(), format!("unknown key {given:?} (lab.toml, line 2)"));
            assert_eq!(error.hint(), format!("did you mean {nearest}?"));
        }
        let error = with_variable("RODIZIO_LEARNINGRATE", "1").unwrap_err();
        assert_eq!(error.hint(), "did you mean RODIZIO_LEARNING_RATE?");
        assert_eq!(with_file("zebra = 1").unwrap_err().hint(), "`rodizio config` lists every key");
        assert!(with_file("[training]\nrounds = 1").is_err());
        assert!(with_variable("HOME", "/").is_ok() && with_variable("RODIZIO_CONFIG", "x").is_ok());
    }

    #[test]
    fn a_bad_value_is_refused_with_its_source_and_what_is_allowed() {
        let error = with_file("rounds = 3\nbatch_size = 0").unwrap_err();
        assert_eq!(error.to_string(), r#"batch_size cannot be "0" (lab.toml, line 2)"#);
        assert_eq!(error.hint(), "batch_size takes a whole number, 1 to 1000000");
        let error = with_variable("RODIZIO_OPTIMIZER", "rmsprop").unwrap_err();
        assert_eq!(error.to_string(), r#"optimizer cannot be "rmsprop" (variable RODIZIO_OPTIMIZER)"#);
        assert_eq!(error.hint(), "optimizer takes one of sgd, adam, adamw");
        assert!(with_file("rounds = { a = 1 }").unwrap_err().to_string().contains("{ a = 1 }"));
        assert!(with_file("target_accuracy = true").unwrap_err().hint().ends_with("from 0 to 1, or none"));
    }

    #[test]
    fn broken_toml_is_refused_with_its_line() {
        let error = with_file("rounds = 3\nseed = = 1").unwrap_err();
        assert!(error.to_string().starts_with("lab.toml, line 2: not valid TOML: "), "{error}");
        assert!(with_file("seed = 1\nseed = 2").is_err());
    }

    #[test]
    fn values_that_do_not_go_together_are_refused() {
        let error = with_file("min_peers = 3\nmin_updates = 3").unwrap_err();
        let said = "min_updates = 3 (lab.toml, line 2) does not go with min_peers = 3 (lab.toml, line 1)";
        assert_eq!(error.to_string(), said);
        assert!(error.hint().ends_with("at most 2 here"), "{}", error.hint());
        assert!(with_file("min_peers = 3\nmin_updates = 3\nleader_trains = true").is_ok());
        assert!(with_file("min_peers = 1").unwrap_err().hint().contains("leader_trains = true"));
        assert!(with_file("min_peers = 1\nleader_trains = true").is_ok());
        assert!(with_file("round_timeout = '2s'").is_err());
    }

    #[test]
    fn a_run_needs_as_many_peers_as_must_be_there() {
        let mut layers = Layers::new();
        layers.file("lab.toml", "peers = 2\nmin_peers = 3").unwrap();
        assert!(layers.settings().is_ok(), "a peer that joins does not care");
        assert!(layers.settings_of_run().unwrap_err().to_string().starts_with("peers = 2 (lab.toml, line 1)"));
    }

    #[test]
    fn keys_that_do_not_go_together_are_refused_with_what_to_do() {
        let rule = |error: ConfigError| match error {
            ConfigError::Conflict { rule, .. } => rule,
            other => panic!("{other}"),
        };
        let error = rule(with_file("trainer = 'python3 train.py'\ndata = 'csv:a.csv'").unwrap_err());
        assert!(error.contains("leave data out"), "{error}");
        assert!(with_file("trainer = 'python3 train.py'\ndata = 'digits'").is_ok(), "as a run writes it down");
    }

    #[test]
    fn a_derived_value_yields_to_one_that_was_given() {
        let mut layers = Layers::new();
        layers.file("lab.toml", "min_peers = 3").unwrap();
        layers.derive("min_peers", "5", "as many as --peers");
        layers.derive("seed", "7", "drawn");
        let settings = layers.settings().unwrap();
        assert_eq!((settings.min_peers, settings.seed), (3, 7));
    }

    #[test]
    fn what_peers_agree_on_is_text_of_one_spelling() {
        let spelled = |text| with_file(text).unwrap().training_entries();
        assert_eq!(
            spelled("hidden = '64 , 32'\nlearning_rate = 0.10"),
            spelled("hidden = [64,32]\nlearning_rate = 1e-1")
        );
        assert_ne!(spelled("batch_size = 17"), spelled(""));
    }

    #[test]
    fn a_strategy_that_its_other_keys_do_not_fit_is_refused_with_what_to_do() {
        let cases = [
            ("strategy = 'fedadam'\nserver_optimizer = 'yogi'", "choose strategy fedavg"),
            ("strategy = 'scaffold'\nserver_optimizer = 'adam'", "server_learning_rate alone is read"),
            ("strategy = 'fedavgm'\nmodel_codec = 'int8'", "leave model_codec at f32"),
            ("strategy = 'scaffold'\ncodec = 'topk'", "as f32, f16 or bf16"),
            ("strategy = 'fednova'\noptimizer = 'adam'", "set optimizer = sgd"),
            ("norm = 'batch'\ncodec = 'topk'", "set norm = group"),
        ];
        for (text, hint) in cases {
            let Err(ConfigError::Conflict { rule, .. }) = with_file(text) else { panic!("{text} is taken") };
            assert!(rule.contains(hint), "{text}: {rule}");
        }
        assert!(with_file("strategy = 'median'\nserver_optimizer = 'adam'\nmodel_codec = 'f32'").is_ok());
        assert!(with_file("strategy = 'fedprox'\nmu = 0.5").unwrap().training().mu == 0.5);
        assert!(with_file("mu = 0.5").unwrap().training().mu == 0.0);
    }

    #[test]
    fn a_run_with_too_few_peers_for_its_bad_updates_is_refused() {
        let run = |text: &str| {
            let mut layers = Layers::new();
            layers.file("lab.toml", text).unwrap();
            layers.derive("min_peers", &layers.peers().to_string(), "as many as peers");
            layers.settings_of_run()
        };
        let cases = [
            (
                "strategy = 'krum'",
                "needs 5 updates a round, and 5 peers bring 4: set peers to 6 or more, or leader_trains",
            ),
            ("strategy = 'bulyan'\npeers = 7", "needs 7 updates a round, and 7 peers bring 6: set peers to 8 or more"),
            ("strategy = 'krum'\npeers = 8\nmin_peers = 4", "and 4 peers bring 3: set min_peers to 6 or more"),
            ("strategy = 'krum'\npeers = 6\nfraction_train = 0.5", "and 6 peers bring 3: set peers to 10 or more"),
            ("strategy = 'krum'\nfraction_train = 0.0001", "raise peers or fraction_train"),
            ("strategy = 'median'\npeers = 3", "to keep a bad one out of the model this strategy needs 3 updates"),
            ("strategy = 'trimmed-mean'\npeers = 3", "set peers to 4 or more"),
            ("strategy = 'norm-clip'\npeers = 2\nleader_trains = true", "set peers to 3 or more"),
        ];
        for (text, said) in cases {
            let Err(ConfigError::Conflict { rule, .. }) = run(text) else { panic!("{text} is taken") };
            assert!(rule.contains(said), "{text}: {rule}");
        }
        for text in [
            "strategy = 'krum'\nleader_trains = true",
            "strategy = 'bulyan'\npeers = 8",
            "strategy = 'krum'\nbyzantine = 0",
            "strategy = 'median'\npeers = 4",
            "strategy = 'trimmed-mean'\npeers = 2\ntrim = 0",
            "strategy = 'norm-clip'\npeers = 2\nclip_norm = 5",
        ] {
            assert!(run(text).is_ok(), "{text}");
        }
    }

    #[test]
    fn who_joins_waits_for_as_many_peers_as_its_strategy_needs() {
        let join = |text: &str| {
            let mut layers = Layers::new();
            layers.file("lab.toml", text).unwrap();
            layers.settings_of_join()
        };
        let Err(ConfigError::Conflict { left, rule, .. }) = join("strategy = 'krum'") else { panic!("it is taken") };
        assert!(left.starts_with("min_peers = 2"), "{left}");
        assert!(rule.contains("and 2 peers bring 1: set min_peers to 6 or more"), "{rule}");
        assert!(join("strategy = 'krum'\nmin_peers = 6").is_ok());
        // The file of a run, looked at alone.
        assert!(with_file("strategy = 'krum'\npeers = 6").is_ok());
    }

    #[test]
    fn fedprox_is_not_taken_for_fedavg() {
        let entries = |text: &str| with_file(text).unwrap().shared().entries();
        assert_eq!(entries("strategy = 'fedprox'")["strategy"], "fedprox");
        assert_ne!(entries("strategy = 'fedprox'\nmu = 0.5"), entries("strategy = 'fedprox'"));
        assert_eq!(entries("strategy = 'fedavg'\nserver_optimizer = 'adam'"), entries("strategy = 'fedadam'"));
    }
}
