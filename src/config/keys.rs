//! The table of keys: the one place that knows a key's name, kind, default, meaning and readers.

use crate::aggregation::Strategy;
use crate::config::value::{Kind, Reals};

/// The text that leaves an optional key unset.
pub const NONE: &str = "none";

/// The prefix of every environment variable that sets a key.
pub const VARIABLE_PREFIX: &str = "RODIZIO_";

/// One key of the configuration. It is the same in a file, in the environment and on the command line.
#[derive(Debug, Clone, PartialEq)]
pub struct Key {
    /// Its name, in `snake_case`.
    pub name: &'static str,
    /// What values it takes.
    pub kind: Kind,
    /// Its value when nobody sets it; [`NONE`] marks an optional key.
    pub default: &'static str,
    /// What it means and how to choose it, in one line.
    pub help: &'static str,
    /// Under which heading it is listed.
    pub group: Group,
    /// Which subcommands read it.
    pub used_by: UsedBy,
}

/// The headings under which keys are listed, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// What the peers agree on about rounds and leaders.
    Federation,
    /// How updates become a model. The peers must agree on every key of this group.
    Strategy,
    /// When training is over.
    Stopping,
    /// Model, optimizer and seed. The peers must agree on every key of this group.
    Training,
    /// What a peer trains on.
    Data,
    /// How long to wait for what.
    Waiting,
    /// Brokers and messages.
    Network,
    /// This machine: names, directories, processors.
    Machine,
}

/// Which subcommands read a key; the others do not offer its flag, and ignore it in a file or the environment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UsedBy {
    /// `run` and `join`.
    Peers,
    /// `run`, `join` and `broker`.
    Everyone,
    /// `run` alone.
    Run,
    /// `join` alone.
    Join,
}

impl Group {
    /// Every group, in the order of the listing.
    pub const ALL: [Group; 8] = [
        Group::Federation,
        Group::Strategy,
        Group::Stopping,
        Group::Training,
        Group::Data,
        Group::Waiting,
        Group::Network,
        Group::Machine,
    ];

    /// The heading.
    pub fn title(self) -> &'static str {
        match self {
            Group::Federation => "Federation",
            Group::Strategy => "Strategy",
            Group::Stopping => "Stopping",
            Group::Training => "Training",
            Group::Data => "Data",
            Group::Waiting => "Waiting",
            Group::Network => "Network",
            Group::Machine => "This machine",
        }
    }
}

impl Key {
    /// The key of that name, in `snake_case`.
    pub fn find(name: &str) -> Option<&'static Key> {
        KEYS.iter().find(|key| key.name == name)
    }

    /// Its flag without the dashes: `batch-size`.
    pub fn flag(&self) -> String {
        self.name.replace('_', "-")
    }

    /// Its environment variable: `RODIZIO_BATCH_SIZE`.
    pub fn variable(&self) -> String {
        format!("{VARIABLE_PREFIX}{}", self.name.to_ascii_uppercase())
    }

    /// Whether it may be left unset, by saying [`NONE`].
    pub fn is_optional(&self) -> bool {
        self.default == NONE
    }

    /// Which values it takes, in words.
    pub fn allowed(&self) -> String {
        let allowed = self.kind.to_string();
        if self.is_optional() { format!("{allowed}, or {NONE}") } else { allowed }
    }
}

/// The table of every key as Markdown, for the README.
pub fn markdown() -> String {
    let mut text = String::from("| key | default | meaning |\n|---|---|---|\n");
    for key in KEYS {
        text += &format!("| `{}` | `{}` | {} |\n", key.name, key.default, key.help.replace('|', "\\|"));
    }
    text
}

/// Longer than any run; it keeps sums of durations far from overflow.
const DAYS_30_MS: u64 = 30 * 24 * 3600 * 1000;

/// TOML integers are signed.
const COUNT_MAX: u64 = i64::MAX as u64;

const fn key(
    group: Group,
    used_by: UsedBy,
    name: &'static str,
    kind: Kind,
    default: &'static str,
    help: &'static str,
) -> Key {
    Key { name, kind, default, help, group, used_by }
}

const fn count(min: u64, max: u64) -> Kind {
    Kind::Count { min, max }
}

const fn duration(min_ms: u64, max_ms: u64) -> Kind {
    Kind::Duration { min_ms, max_ms }
}

const MODELS: &[&str] = &["linear", "mlp", "cnn", "fedavg-cnn", "resnet-small", "char-lstm"];

/// Every key, by group.
#[rustfmt::skip]
pub static KEYS: &[Key] = &[
    key(Group::Federation, UsedBy::Peers, "federation", Kind::Level, "default",
        "Name of the federation: peers of the same name train one model together"),
    key(Group::Federation, UsedBy::Peers, "min_peers", count(1, 10_000), "2",
        "How many peers must be there before training starts"),
    key(Group::Federation, UsedBy::Peers, "min_updates", count(1, 10_000), "1",
        "How many updates a round needs once round_timeout has passed"),
    key(Group::Federation, UsedBy::Peers, "policy", Kind::Policy(&["random", "rotate", "fixed"]), "random",
        "How a leader is chosen; fixed:NAME always prefers that peer"),
    key(Group::Federation, UsedBy::Peers, "leader_trains", Kind::Switch, "false",
        "Whether the leader of a round trains too"),

    key(Group::Strategy, UsedBy::Peers, "strategy", Kind::Choice(Strategy::NAMES), "fedavg",
        "How updates become the next global model; see Strategies"),
    key(Group::Strategy, UsedBy::Peers, "fraction_train", Kind::Real(Reals::PositiveShare), "1",
        "Share of the members that trains in a round, drawn anew each time; the others evaluate and vote"),
    key(Group::Strategy, UsedBy::Peers, "mu", Kind::Real(Reals::Positive), "0.01",
        "Strategy fedprox: how strongly local weights are held to the global model's"),
    key(Group::Strategy, UsedBy::Peers, "server_optimizer", Kind::Choice(&["momentum", "adagrad", "adam", "yogi"]), NONE,
        "The optimizer that steps from the global model to what the strategy makes of the updates; none: the strategy's own"),
    key(Group::Strategy, UsedBy::Peers, "server_learning_rate", Kind::Real(Reals::Positive), NONE,
        "Length of the server optimizer's step; none: 1, of adagrad 0.3, of adam and yogi 0.03"),
    key(Group::Strategy, UsedBy::Peers, "server_momentum", Kind::Real(Reals::ShareBelowOne), "0.9",
        "Share of the last direction that a server optimizer keeps"),
    key(Group::Strategy, UsedBy::Peers, "server_beta2", Kind::Real(Reals::ShareBelowOne), "0.99",
        "Share of the second moment that server optimizers adam and yogi keep"),
    key(Group::Strategy, UsedBy::Peers, "server_tau", Kind::Real(Reals::Positive), "0.001",
        "Changes below this are small to server optimizers adagrad, adam and yogi"),
    key(Group::Strategy, UsedBy::Peers, "trim", Kind::Real(Reals::BelowHalf), "0.2",
        "Strategy trimmed-mean: share of the values left out at either end, rounded up"),
    key(Group::Strategy, UsedBy::Peers, "byzantine", count(0, 10_000), "1",
        "Strategies krum, multi-krum and bulyan: how many updates of a round may be bad"),
    key(Group::Strategy, UsedBy::Peers, "clip_norm", Kind::Real(Reals::Positive), NONE,
        "Strategy norm-clip: the longest difference from the global model; none: the median of the round's"),

    key(Group::Stopping, UsedBy::Peers, "rounds", count(1, COUNT_MAX), "20",
        "How many rounds to train at most"),
    key(Group::Stopping, UsedBy::Peers, "target_accuracy", Kind::Real(Reals::Share), NONE,
        "Stop when the validation accuracy of the global model reaches this"),
    key(Group::Stopping, UsedBy::Peers, "patience", count(0, 1_000_000), "0",
        "Stop after this many rounds without a better validation loss; 0: never"),
    key(Group::Stopping, UsedBy::Peers, "tolerance", Kind::Real(Reals::NotNegative), "0",
        "Smallest drop of the validation loss that patience counts as better"),

    key(Group::Training, UsedBy::Peers, "model", Kind::Choice(MODELS), "mlp",
        "The model: linear or mlp for all but texts, cnn, fedavg-cnn or resnet-small for images, char-lstm for texts"),
    key(Group::Training, UsedBy::Peers, "hidden", Kind::Counts { max: 65_536, len_max: 16 }, "64",
        "Widths of the hidden layers of mlp, cnn and char-lstm, first to last"),
    key(Group::Training, UsedBy::Peers, "channels", Kind::Counts { max: 4096, len_max: 8 }, "8,16",
        "Channels of the convolutions of cnn, or of the stages of resnet-small, first to last"),
    key(Group::Training, UsedBy::Peers, "norm", Kind::Choice(&["group", "batch"]), "group",
        "What resnet-small normalises over: groups of an example's channels, or the batch (its statistics are averaged)"),
    key(Group::Training, UsedBy::Peers, "embedding_dim", count(1, 4096), "32",
        "How many values stand for a token in char-lstm"),
    key(Group::Training, UsedBy::Peers, "optimizer", Kind::Choice(&["sgd", "adam", "adamw"]), "sgd",
        "How a step follows from a gradient"),
    key(Group::Training, UsedBy::Peers, "learning_rate", Kind::Real(Reals::Positive), "0.1",
        "Length of a step"),
    key(Group::Training, UsedBy::Peers, "schedule", Kind::Choice(&["constant", "step", "exponential", "cosine"]), "constant",
        "How the length of a step changes from round to round; cosine ends at 0 after rounds"),
    key(Group::Training, UsedBy::Peers, "schedule_gamma", Kind::Real(Reals::Between), "0.5",
        "What the schedules step and exponential multiply the length of a step by"),
    key(Group::Training, UsedBy::Peers, "schedule_rounds", count(1, 1_000_000), "10",
        "After how many rounds each the schedule step multiplies"),
    key(Group::Training, UsedBy::Peers, "warmup_rounds", count(0, 1_000_000), "0",
        "Rounds over which the length of a step rises before the schedule begins"),
    key(Group::Training, UsedBy::Peers, "momentum", Kind::Real(Reals::ShareBelowOne), "0.9",
        "Share of the last step that sgd keeps in the next"),
    key(Group::Training, UsedBy::Peers, "nesterov", Kind::Switch, "false",
        "Whether sgd looks ahead by its momentum"),
    key(Group::Training, UsedBy::Peers, "weight_decay", Kind::Real(Reals::NotNegative), "0",
        "How strongly weights are drawn to 0: in the gradient (sgd, adam) or beside it (adamw)"),
    key(Group::Training, UsedBy::Peers, "max_grad_norm", Kind::Real(Reals::Positive), NONE,
        "The longest that the gradient of a step may be, a longer one is shortened; none: any, and 1 where a number is told"),
    key(Group::Training, UsedBy::Peers, "batch_size", count(1, 1_000_000), "16",
        "Examples in a step"),
    key(Group::Training, UsedBy::Peers, "local_epochs", count(1, 10_000), "5",
        "Passes over a peer's own data in a round"),
    key(Group::Training, UsedBy::Peers, "local_steps", count(1, 1_000_000_000), NONE,
        "Steps in a round whatever a peer has of data, instead of local_epochs"),
    key(Group::Training, UsedBy::Peers, "augment", Kind::Choice(&["shift", "flip", "shift-flip"]), NONE,
        "How images are changed before each step: shifted by up to an eighth of their size, mirrored left to right"),
    key(Group::Training, UsedBy::Peers, "codec", Kind::Choice(&["f32", "f16", "bf16", "int8", "topk"]), "f32",
        "How updates are encoded: all but f32 lose something and send fewer bytes; topk sends a part and keeps the rest"),
    key(Group::Training, UsedBy::Peers, "model_codec", Kind::Choice(&["f32", "f16", "bf16", "int8"]), "f32",
        "How the global model is encoded; not topk, since who comes later has nothing to add a difference to"),
    key(Group::Training, UsedBy::Peers, "topk_ratio", Kind::Real(Reals::Between), "0.01",
        "Share of an update's values that codec topk sends"),
    key(Group::Training, UsedBy::Peers, "seed", count(0, COUNT_MAX), "42",
        "Seed of the initial weights, the partition, the order of examples and what int8 rounds by"),

    key(Group::Data, UsedBy::Peers, "data", Kind::Data, "digits",
        "The data set: digits, idx:DIR, csv:FILE, images:DIR or text:FILE; csv:DIR/*.csv: a file for each peer of a run"),
    key(Group::Data, UsedBy::Peers, "val_data", Kind::Data, NONE,
        "Examples to evaluate on, of the same kind as data; none: val_fraction of data, or what data itself keeps apart"),
    key(Group::Data, UsedBy::Peers, "val_fraction", Kind::Real(Reals::Between), "0.2",
        "Share of a peer's examples held out to evaluate on"),
    key(Group::Data, UsedBy::Peers, "label", Kind::Text, NONE,
        "Column of a CSV file to tell, by name or by number from 1; none: the last"),
    key(Group::Data, UsedBy::Peers, "task", Kind::Choice(&["auto", "classes", "regression"]), "auto",
        "What the label of a CSV file is; auto: a number if it has more than 20 different numeric values, else a class"),
    key(Group::Data, UsedBy::Peers, "header", Kind::Choice(&["auto", "yes", "no"]), "auto",
        "Whether the first line of a CSV file names the columns"),
    key(Group::Data, UsedBy::Peers, "ignore_columns", Kind::Names, NONE,
        "Columns of a CSV file to pass over, such as a patient's number, by name or by number from 1"),
    key(Group::Data, UsedBy::Peers, "categories", Kind::Categories, NONE,
        "All values that columns or classes may have, also such as this peer lacks: 'sex=f|m;blood=A|B|AB|0'"),
    key(Group::Data, UsedBy::Peers, "image_size", count(1, 4096), NONE,
        "Height and width to which pictures are resized; none: as they are, all of one size"),
    key(Group::Data, UsedBy::Peers, "image_channels", Kind::Choice(&["1", "3"]), "3",
        "How pictures are read: 1 as grey, 3 in colour"),
    key(Group::Data, UsedBy::Peers, "window", count(1, 65_536), "64",
        "How many characters of a text are an example"),
    key(Group::Data, UsedBy::Peers, "characters", Kind::Text, NONE,
        "Characters of a text beyond ASCII to tell apart; all others count as one"),
    key(Group::Data, UsedBy::Peers, "partition",
        Kind::Choice(&["iid", "dirichlet", "pathological", "shards", "power-law"]), "iid",
        "How one data set is split among peers: evenly, skewed by label (dirichlet, pathological, shards), or in uneven sizes"),
    key(Group::Data, UsedBy::Peers, "alpha", Kind::Real(Reals::Positive), "0.5",
        "Skew of the dirichlet partition: 0.1 is strong, 100 almost none"),
    key(Group::Data, UsedBy::Peers, "classes_per_peer", count(1, 65_536), "2",
        "How many classes a peer has in the pathological partition"),
    key(Group::Data, UsedBy::Peers, "shards_per_peer", count(1, 65_536), "2",
        "How many shards of examples sorted by label a peer has in the shards partition"),
    key(Group::Data, UsedBy::Peers, "exponent", Kind::Real(Reals::NotNegative), "1",
        "Skew of the power-law partition: the k-th peer's share goes with k to the power of -exponent"),
    key(Group::Data, UsedBy::Join, "part", Kind::Part, NONE,
        "This peer's part I/N of a data set that is split for a simulation; none: all of it"),

    key(Group::Waiting, UsedBy::Peers, "round_timeout", duration(100, DAYS_30_MS), "5m",
        "How long a round waits for the slowest before min_updates is enough"),
    key(Group::Waiting, UsedBy::Peers, "election_timeout", duration(50, 600_000), "2s",
        "How long a leader may be silent before the others choose the next"),
    key(Group::Waiting, UsedBy::Peers, "settle_time", duration(0, 600_000), "300ms",
        "How long nobody new may have come before training starts"),
    key(Group::Waiting, UsedBy::Peers, "wait_timeout", duration(100, DAYS_30_MS), "10m",
        "How long to wait before giving up for missing peers (exit code 4), or at the start for a broker (3)"),

    key(Group::Network, UsedBy::Peers, "broker", Kind::Addresses { len_max: 64 }, NONE,
        "Brokers to connect to, HOST:PORT, the best first; none: run: its own, join: 127.0.0.1:1883"),
    key(Group::Network, UsedBy::Everyone, "listen", Kind::Address, NONE,
        "Where a broker of one's own listens, HOST:PORT (port 0: a free one); none: run: 127.0.0.1:0, else 127.0.0.1:1883"),
    key(Group::Network, UsedBy::Join, "host_broker", Kind::Switch, "false",
        "Whether this peer runs a broker for the others"),
    key(Group::Network, UsedBy::Join, "advertise", Kind::Reachable, NONE,
        "Where other machines reach the broker of host_broker, HOST:PORT; none: derived from listen"),
    key(Group::Network, UsedBy::Peers, "prefix", Kind::Levels { len_max: 8 }, "rodizio",
        "Start of every topic"),
    key(Group::Network, UsedBy::Everyone, "chunk_bytes", Kind::Size { min: 1 << 10, max: 16 << 20 }, "512KiB",
        "Length of one message of a transfer; 256KiB to 1MiB is fastest"),

    key(Group::Machine, UsedBy::Run, "peers", count(1, 1_000), "5",
        "How many peers to start"),
    key(Group::Machine, UsedBy::Run, "processes", Kind::Switch, "false",
        "Whether every peer is a process of its own, not a thread"),
    key(Group::Machine, UsedBy::Join, "peer", Kind::Peer, NONE,
        "Name of this peer; none: the one kept in state_dir, or a new one"),
    key(Group::Machine, UsedBy::Peers, "trainer", Kind::Text, NONE,
        "A program that trains in place of model and data, asked over JSON lines: see configs/trainer_numpy.py"),
    key(Group::Machine, UsedBy::Peers, "trainer_timeout", duration(100, DAYS_30_MS), "10m",
        "How long that program may be silent before it costs its peer the round's update"),
    key(Group::Machine, UsedBy::Peers, "threads", count(1, 1024), "1",
        "Threads that a peer trains on; the peers of one process take turns at the machine's cores. The result is the same"),
    key(Group::Machine, UsedBy::Peers, "backend", Kind::Choice(&["flex", "ndarray"]), "flex",
        "What computes the training"),
    key(Group::Machine, UsedBy::Peers, "init", Kind::Path, NONE,
        "Safetensors file of a model to start from, the same for all peers; none: weights drawn by seed"),
    key(Group::Machine, UsedBy::Join, "state_dir", Kind::Path, NONE,
        "Where a peer keeps its name and its state; none: under .rodizio/FEDERATION"),
    key(Group::Machine, UsedBy::Peers, "run_dir", Kind::Path, NONE,
        "Where the results go; none: runs/FEDERATION-TIME"),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_default_is_a_value_of_its_key() {
        for key in KEYS.iter().filter(|key| !key.is_optional()) {
            assert!(key.kind.parse(key.default).is_some(), "{} = {}", key.name, key.default);
        }
    }

    #[test]
    fn names_are_unique_and_groups_are_contiguous() {
        let names: BTreeSet<_> = KEYS.iter().map(|key| key.name).collect();
        assert_eq!(names.len(), KEYS.len());
        assert!(KEYS.is_sorted_by_key(|key| key.group));
        assert!(Group::ALL.iter().all(|group| KEYS.iter().any(|key| key.group == *group)));
    }

    #[test]
    fn the_markdown_table_has_a_line_a_key() {
        let table = markdown();
        assert_eq!(table.lines().count(), KEYS.len() + 2);
        assert!(table.contains("| `chunk_bytes` | `512KiB` | "));
    }
}
