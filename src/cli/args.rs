//! The command line: subcommands by hand, and a flag for every key of the configuration.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::{KEYS, Key, Kind, UsedBy, Value};
use crate::training::{Model, UnknownName};
use crate::transfer::codec::CodecNameError;
use crate::transfer::{CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, Codec};

/// What the user asked for.
#[derive(Debug)]
pub struct Invocation {
    /// The subcommand with its own arguments.
    pub command: Command,
    /// The keys that were given as flags.
    pub flags: Vec<(&'static Key, String)>,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train on this machine: a broker and N peers in one command
    Run(RunArgs),
    /// Run a broker for other machines to meet at
    Broker(BrokerArgs),
    /// Take part in a federation as one peer
    Join(JoinArgs),
    /// Measure a broker and this machine
    Bench(BenchArgs),
    /// Replay the protocol with faults, by seed
    Sim(SimArgs),
    /// Print the effective configuration, or check a file
    Config(ConfigArgs),
}

/// Arguments of `run`.
#[derive(Debug, Args)]
#[command(after_help = RUN_EXAMPLES)]
pub struct RunArgs {
    /// Go on with the run that left its results in this directory, with its settings
    #[arg(long, value_name = "RUN_DIR", conflicts_with_all = ["config", "run_dir"])]
    pub resume: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)] // a doc comment would become the help text of the group
    pub file: FileArgs,
    #[command(flatten)]
    #[allow(missing_docs)] // likewise
    pub output: OutputArgs,
}

/// Arguments of `broker`.
#[derive(Debug, Args)]
#[command(after_help = BROKER_EXAMPLES)]
pub struct BrokerArgs {
    #[command(flatten)]
    #[allow(missing_docs)] // a doc comment would become the help text of the group
    pub file: FileArgs,
    /// Print nothing but errors
    #[arg(long, short, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Log more; twice: everything
    #[arg(long, short, action = ArgAction::Count)]
    pub verbose: u8,
}

/// Arguments of `join`.
#[derive(Debug, Args)]
#[command(after_help = JOIN_EXAMPLES)]
pub struct JoinArgs {
    /// Write every entry to stdout, one a line, and stop when stdin ends: for `run --processes`
    #[arg(long, hide = true, conflicts_with = "json")]
    pub entries: bool,
    #[command(flatten)]
    #[allow(missing_docs)] // a doc comment would become the help text of the group
    pub file: FileArgs,
    #[command(flatten)]
    #[allow(missing_docs)] // likewise
    pub output: OutputArgs,
}

/// Arguments of `sim`.
#[derive(Debug, Args)]
#[command(after_help = SIM_EXAMPLES)]
pub struct SimArgs {
    /// The first seed to replay
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// How many seeds to replay, one after the other
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub seeds: u64,
    /// Read peers, delays and faults from this file
    #[arg(long, value_name = "FILE")]
    pub scenario: Option<PathBuf>,
    /// How many peers take part, whatever the scenario says
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub peers: Option<u16>,
    /// Print every event; twice: every message
    #[arg(long, short, action = ArgAction::Count)]
    pub verbose: u8,
}

/// Arguments of `bench`.
#[derive(Debug, Args)]
#[command(after_help = BENCH_EXAMPLES)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub measure: Measure,
}

/// The measurements of `bench`.
#[derive(Debug, Subcommand)]
pub enum Measure {
    /// One blob through the broker, as in the broadcast or the gather of a round
    Transfer(TransferArgs),
    /// Whole rounds without training: what rodizio itself costs
    Round(RoundArgs),
    /// Training: how many samples a second each backend trains, and PyTorch beside them
    Train(TrainArgs),
    /// Play a role in a measurement, with orders from stdin: for `bench` itself
    #[command(hide = true)]
    Role {
        /// The role, as JSON
        role: String,
    },
}

/// Arguments of `bench transfer`.
#[derive(Debug, Args)]
pub struct TransferArgs {
    #[command(flatten)]
    #[allow(missing_docs)] // a doc comment would become the help text of the group
    pub common: MeasureArgs,
    /// How many receive the blob, all at a time: a broadcast
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=200))]
    pub receivers: u16,
    /// How many send a blob of their own, all to one receiver: a gather
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=200))]
    #[arg(conflicts_with = "receivers")]
    pub senders: u16,
    /// How often to measure; medians are reported
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub repeat: u16,
}

/// Arguments of `bench round`.
#[derive(Debug, Args)]
pub struct RoundArgs {
    #[command(flatten)]
    #[allow(missing_docs)] // likewise
    pub common: MeasureArgs,
    /// How many peers take part, 3 or more: with two the new model is the one update, and need not travel
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(3..=200))]
    pub peers: u16,
    /// How many rounds to measure; medians are reported
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub rounds: u16,
    /// How updates are encoded
    #[arg(long, value_name = "CODEC", default_value_t, value_parser = codec)]
    pub codec: Codec,
    /// How the new model is encoded: any codec but topk
    #[arg(long, value_name = "CODEC", default_value_t, value_parser = model_codec)]
    pub model_codec: Codec,
    /// Keep the state in memory and leave the disk out
    #[arg(long, conflicts_with = "dir")]
    pub memory: bool,
    /// Keep the state in a new directory in this one, and remove it afterwards [default: the one for temporary files]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// Arguments of `bench train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// The model
    #[arg(long, default_value = "mlp", value_parser = model)]
    pub model: Model,
    /// Samples in a step
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub batch_size: u16,
    /// Threads to train on; PyTorch gets one
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: u16,
    /// How long to measure each, in seconds
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=600))]
    pub seconds: u16,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    /// Print nothing but the result
    #[arg(long, short)]
    pub quiet: bool,
}

fn codec(name: &str) -> Result<Codec, String> {
    name.parse().map_err(|unknown: CodecNameError| unknown.to_string())
}

fn model_codec(name: &str) -> Result<Codec, String> {
    match codec(name)? {
        Codec::TopK => Err("topk is for updates: a model must be readable alone".to_owned()),
        codec => Ok(codec),
    }
}

fn model(name: &str) -> Result<Model, String> {
    name.parse().map_err(|unknown: UnknownName| unknown.to_string())
}

/// What all measurements are told.
#[derive(Debug, Args)]
pub struct MeasureArgs {
    /// The length of a blob, like 100MB, 1GB or 512KiB
    #[arg(long, value_name = "SIZE", default_value = "100MB", value_parser = blob_bytes)]
    pub bytes: u64,
    /// The length of a chunk
    #[arg(long, value_name = "SIZE", default_value = "512KiB", value_parser = chunk_bytes)]
    pub chunk_bytes: u32,
    /// The broker to measure [default: the embedded one]
    #[arg(long, value_name = "HOST:PORT", value_parser = broker_address)]
    pub broker: Option<String>,
    /// A process for each peer and for the embedded broker; false: all in one [default: true]
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true")]
    #[arg(value_name = "BOOL", action = ArgAction::Set, hide_default_value = true)]
    pub processes: bool,
    /// Print the result as one JSON document
    #[arg(long)]
    pub json: bool,
    /// Print no progress
    #[arg(long, short)]
    pub quiet: bool,
}

/// The longest blob that a measurement takes, in bytes.
const BLOB_BYTES_MAX: u64 = 1 << 40;

fn blob_bytes(text: &str) -> Result<u64, String> {
    size(text, 1, BLOB_BYTES_MAX)
}

fn chunk_bytes(text: &str) -> Result<u32, String> {
    let bytes = size(text, CHUNK_BYTES_MIN.into(), CHUNK_BYTES_MAX.into())?;
    u32::try_from(bytes).map_err(|error| error.to_string())
}

fn size(text: &str, min: u64, max: u64) -> Result<u64, String> {
    let kind = Kind::Size { min, max };
    match kind.parse(text) {
        Some(Value::Size(bytes)) => Ok(bytes),
        _ => Err(format!("it takes {kind}")),
    }
}

fn broker_address(text: &str) -> Result<String, String> {
    let kind = Kind::Address;
    kind.parse(text).map(|value| value.to_string()).ok_or_else(|| format!("it takes {kind}"))
}

/// Arguments of `config`.
#[derive(Debug, Args)]
#[command(after_help = CONFIG_EXAMPLES)]
pub struct ConfigArgs {
    #[command(flatten)]
    #[allow(missing_docs)] // a doc comment would become the help text of the group
    pub file: FileArgs,
    /// Only check this file, without the environment
    #[arg(long, value_name = "FILE", conflicts_with_all = ["config", "json"])]
    pub check: Option<PathBuf>,
    /// Print one JSON object instead of TOML
    #[arg(long)]
    pub json: bool,
}

/// Where the file layer of the configuration comes from.
#[derive(Debug, Args)]
pub struct FileArgs {
    /// Read keys from this TOML file [also: RODIZIO_CONFIG]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// What a training subcommand prints.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct OutputArgs {
    /// Print the result as one JSON document on stdout
    #[arg(long)]
    pub json: bool,
    /// Print the result, warnings and errors, and no progress
    #[arg(long, short, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Log more; twice: everything
    #[arg(long, short, action = ArgAction::Count)]
    pub verbose: u8,
}

/// Federated learning without a server: the peers take turns to aggregate
#[derive(Debug, Parser)]
#[command(name = "rodizio", version, after_help = EXAMPLES, max_term_width = 110)]
#[command(subcommand_required = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Parses the command line; the first argument is the program's name.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Invocation, clap::Error> {
    let matches = command().try_get_matches_from(args)?;
    let flags = matches.subcommand().map(|(_, matches)| given_keys(matches)).unwrap_or_default();
    let Cli { command } = Cli::from_arg_matches(&matches)?;
    Ok(Invocation { command, flags })
}

/// The whole command line, for parsing and for help.
pub fn command() -> clap::Command {
    Cli::command().mut_subcommands(|subcommand| {
        let name = subcommand.get_name().to_owned();
        subcommand.args(KEYS.iter().filter(|key| is_offered(key, &name)).map(flag))
    })
}

impl Command {
    /// The directory of the run that is to go on, if one was named.
    pub fn resumed(&self) -> Option<&Path> {
        match self {
            Command::Run(args) => args.resume.as_deref(),
            _ => None,
        }
    }

    /// The configuration file that was named, if the subcommand reads the configuration.
    pub fn file(&self) -> Option<&FileArgs> {
        match self {
            Command::Run(args) => Some(&args.file),
            Command::Broker(args) => Some(&args.file),
            Command::Join(args) => Some(&args.file),
            Command::Config(args) => Some(&args.file),
            Command::Sim(_) | Command::Bench(_) => None,
        }
    }
}

fn is_offered(key: &Key, subcommand: &str) -> bool {
    match subcommand {
        "run" => key.used_by != UsedBy::Join,
        "join" => key.used_by != UsedBy::Run,
        "broker" => key.used_by == UsedBy::Everyone,
        "config" => true,
        _ => false,
    }
}

/// Values are taken as text: the configuration checks them all in one way, wherever they come from.
fn flag(key: &'static Key) -> Arg {
    let flag = Arg::new(key.name).long(key.flag()).value_name(key.kind.placeholder()).help_heading(key.group.title());
    let words = match key.kind {
        Kind::Choice(words) | Kind::Policy(words) if words.len() > 1 => format!(" ({})", words.join(", ")),
        _ => String::new(),
    };
    let flag = flag.help(format!("{}{words} [default: {}]", key.help, key.default));
    match key.kind {
        Kind::Switch => flag.num_args(0..=1).require_equals(true).default_missing_value("true"),
        // `--seed -1` is a wrong value, not an unknown flag.
        _ => flag.allow_negative_numbers(true),
    }
}

fn given_keys(matches: &ArgMatches) -> Vec<(&'static Key, String)> {
    let given = |key: &Key| matches.try_get_one::<String>(key.name).ok().flatten().cloned();
    KEYS.iter().filter_map(|key| Some((key, given(key)?))).collect()
}

const EXAMPLES: &str = "\
Every flag of a subcommand that stands under a heading is a key. It can be set in a file as well
(batch_size = 16), or by a variable (RODIZIO_BATCH_SIZE=16). A flag wins over a variable, a variable
over the file. `rodizio config` prints every key with its meaning.

Exit codes: 0 finished, 1 internal error, 2 usage or configuration, 3 no broker, 4 gave up waiting,
5 bad data or model, 130 interrupted.

Examples:
  rodizio run                           five peers and a broker on this machine
  rodizio broker --listen 0.0.0.0:1883  a broker for other machines
  rodizio join --broker lab:1883        one peer of a federation";

const RUN_EXAMPLES: &str = "\
Examples:
  rodizio run
      Five peers train on the built-in digits, 20 rounds
  rodizio run --peers 10 --partition dirichlet --alpha 0.1
      Ten peers whose labels are strongly skewed
  rodizio run --data csv:wards/*.csv --label diagnosis
      A peer for each file of a table
  rodizio run --target-accuracy 0.95 --patience 5 --json
      Stop when good enough or when nothing improves; the result as JSON
  rodizio run --processes --run-dir runs/first --config configs/lab.toml
      A process for each peer; keys from a file, results in runs/first
  rodizio run --resume runs/first
      Go on with that run, whatever ended it, from the last committed round";

const BROKER_EXAMPLES: &str = "\
Examples:
  rodizio broker --listen 0.0.0.0:1883  reachable from other machines
  rodizio broker                        reachable from this machine alone";

const JOIN_EXAMPLES: &str = "\
Examples:
  rodizio join --broker lab:1883 --federation ward --peer clinic-3
      Take part as clinic-3
  rodizio join --host-broker --listen 0.0.0.0:1883 --min-peers 3
      Run a broker for the others as well; training starts with three peers
  rodizio join --broker lab:1883 --data csv:my.csv --label diagnosis
      Take part with a table of one's own
  rodizio join --part 2/5
      One of five peers that share out the data set, with the broker of this machine
  rodizio join --broker lab:1883,spare:1883
      Go to spare when lab cannot be reached
  rodizio join --broker lab:1883 --host-broker --listen 0.0.0.0:1883
      Carry a standby: when lab cannot be reached, all go there
  rodizio join --broker lab:1883 --state-dir /var/lib/rodizio
      Run again with the same state directory, the peer goes on where it stopped";

const BENCH_EXAMPLES: &str = "\
Examples:
  rodizio bench transfer                            100 MB to one receiver, through the embedded broker
  rodizio bench transfer --receivers 16             broadcast it to 16
  rodizio bench transfer --senders 16 --json        gather 16 of them; the result as JSON
  rodizio bench transfer --broker lab:1883          how fast is that broker?
  rodizio bench round --bytes 10MB --peers 8        whole rounds without training";

const SIM_EXAMPLES: &str = "\
Examples:
  rodizio sim --seeds 1000                        a thousand schedules
  rodizio sim --seed 42 -v                        one of them, event by event
  rodizio sim --scenario configs/sim/lossy.toml   faults from a file";

const CONFIG_EXAMPLES: &str = "\
Examples:
  rodizio config > lab.toml            a file to start from
  rodizio config --check lab.toml      is it right?
  rodizio config --config lab.toml     what follows from it, and who set what";

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Invocation, clap::Error> {
        parse(line.split(' ').map(OsString::from))
    }

    #[test]
    fn the_definition_of_the_command_line_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn keys_given_as_flags_come_out_as_text() {
        let invocation = parsed("rodizio run --processes --batch-size 16 --leader-trains --seed -1").unwrap();
        let flags: Vec<_> = invocation.flags.iter().map(|(key, text)| (key.name, text.as_str())).collect();
        assert_eq!(flags, [("leader_trains", "true"), ("batch_size", "16"), ("seed", "-1"), ("processes", "true")]);
        let invocation = parsed("rodizio run --resume runs/first -v").unwrap();
        assert!(matches!(invocation.command, Command::Run(RunArgs { resume: Some(_), .. })));
        let invocation = parsed("rodizio join --host-broker=false").unwrap();
        assert_eq!(invocation.flags[0].1, "false");
    }

    #[test]
    fn every_key_is_a_flag_of_some_subcommand_and_of_config() {
        for key in KEYS {
            assert!(is_offered(key, "config"));
            assert!(["run", "join"].iter().any(|name| is_offered(key, name)), "{}", key.name);
        }
    }

    #[test]
    fn a_flag_that_a_subcommand_does_not_read_is_refused() {
        for line in ["run --peer a", "run --host-broker", "join --peers 3", "broker --rounds 3", "sim --rounds 3"] {
            assert!(parsed(&format!("rodizio {line}")).is_err(), "{line}");
        }
    }

    #[test]
    fn contradictions_and_absurd_counts_are_refused() {
        for line in [
            "run -q -v",
            "run --resume a --run-dir b",
            "run --resume a --config b",
            "sim --seeds 0",
            "sim --peers 0",
            "config --check a --json",
            "bench",
            "bench transfer --bytes 0",
            "bench transfer --bytes many",
            "bench transfer --receivers 2 --senders 2",
            "bench transfer --broker lab",
            "bench transfer --chunk-bytes 1GB",
            "bench round --peers 2",
            "bench round --rounds 3 --memory --dir x",
            "bench round --seed 3",
        ] {
            assert!(parsed(&format!("rodizio {line}")).is_err(), "{line}");
        }
    }
}
