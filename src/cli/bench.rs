//! `rodizio bench`: measures a broker and this machine.

use std::future::Future;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

use crate::bench::machine::Machine;
use crate::bench::role::{self, Stage};
use crate::bench::round::{self, RoundOptions, RoundResult};
use crate::bench::train::{self, TrainOptions, TrainResult};
use crate::bench::transfer::{self, Speed, TransferOptions, TransferResult};
use crate::bench::{BenchError, Growth, Heartbeat, RoleUsage, Setting, Wire};
use crate::cli::args::{BenchArgs, Measure, MeasureArgs, RoundArgs, TrainArgs, TransferArgs};
use crate::cli::{Exit, Failure, Shell, Stream, interrupt, log, runtime};
use crate::transfer::Codecs;

/// Runs the measurement and prints what was measured.
pub fn run(args: &BenchArgs, shell: &mut Shell) -> Result<Exit, Failure> {
    log::start(0, &shell.env, shell.stderr.colour, &indicatif::ProgressBar::hidden())?;
    match &args.measure {
        Measure::Transfer(args) => measure_transfer(args, shell),
        Measure::Round(args) => measure_round(args, shell),
        Measure::Train(args) => measure_train(args, shell),
        Measure::Role { role } => {
            runtime()?.block_on(role::play_here(role, &mut *shell.stdout.out))?;
            Ok(Exit::Finished)
        }
    }
}

fn measure_transfer(args: &TransferArgs, shell: &mut Shell) -> Result<Exit, Failure> {
    let options = TransferOptions {
        setting: setting(&args.common)?,
        senders: args.senders.into(),
        receivers: args.receivers.into(),
        repeat: args.repeat.into(),
    };
    let measured = until_interrupted(transfer::run(&options, &mut progress(&mut shell.stderr, args.common.quiet)))?;
    let Some(result) = measured else { return Ok(Exit::Interrupted) };
    print(&result, args.common.json, transfer_table, shell)
}

fn measure_round(args: &RoundArgs, shell: &mut Shell) -> Result<Exit, Failure> {
    let dir = if args.memory { None } else { Some(StateDir::new(args.dir.as_deref())?) };
    let options = RoundOptions {
        setting: setting(&args.common)?,
        peers: args.peers.into(),
        rounds: args.rounds.into(),
        state_dir: dir.as_ref().map(|dir| dir.0.clone()),
        codecs: Codecs { updates: args.codec, model: args.model_codec, ..Codecs::default() },
    };
    let measured = until_interrupted(round::run(&options, &mut progress(&mut shell.stderr, args.common.quiet)))?;
    let Some(result) = measured else { return Ok(Exit::Interrupted) };
    print(&result, args.common.json, round_table, shell)
}

fn measure_train(args: &TrainArgs, shell: &mut Shell) -> Result<Exit, Failure> {
    let python = shell.env.get(train::PYTHON).cloned().unwrap_or_else(|| "python3".into());
    let (batch_size, threads, seconds) = (args.batch_size.into(), args.threads.into(), args.seconds.into());
    let options = TrainOptions { model: args.model, batch_size, threads, seconds, python };
    let result = train::run(&options, &mut progress(&mut shell.stderr, args.quiet)).context("cannot train")?;
    print(&result, args.json, train_table, shell)
}

fn setting(args: &MeasureArgs) -> Result<Setting, Failure> {
    let stage = if args.processes {
        Stage::Processes(std::env::current_exe().context("the file of this program is not known")?)
    } else {
        Stage::Here
    };
    let (bytes, chunk_bytes, broker) = (args.bytes, args.chunk_bytes, args.broker.clone());
    Ok(Setting { bytes, chunk_bytes, broker, stage })
}

/// What a measurement is doing, a line each.
fn progress(stderr: &mut Stream, quiet: bool) -> impl FnMut(&str) + Send {
    move |text| {
        if !quiet {
            // If stderr is gone there is nobody to tell.
            let _ = writeln!(stderr.out, "measuring {text}");
        }
    }
}

/// `None`: Ctrl-C came first. What was started has ended, too, when this returns.
fn until_interrupted<T>(measuring: impl Future<Output = Result<T, BenchError>>) -> Result<Option<T>, Failure> {
    // Each process that it starts is listened to by a thread, however many they are.
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        let (_request, stop) = interrupt::listen();
        tokio::select! {
            measured = measuring => Ok(Some(measured?)),
            () = stop.requested() => Ok(None),
        }
    })
}

/// A new directory for the state of all peers, which is removed when this is dropped.
struct StateDir(PathBuf);

impl StateDir {
    fn new(parent: Option<&Path>) -> Result<Self, Failure> {
        let parent = parent.map_or_else(std::env::temp_dir, Path::to_owned);
        let dir = parent.join(format!("rodizio-bench-{}", std::process::id()));
        let created = std::fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()));
        created.map_err(|error| {
            Failure::new(Exit::Usage, error).hint("--dir names a directory for the peers' state, --memory does without")
        })?;
        Ok(Self(dir))
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        // It is among temporary files, which the system removes in time.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn print<T: Serialize>(
    result: &T,
    json: bool,
    table: impl Fn(&T) -> Vec<[String; 2]>,
    shell: &mut Shell,
) -> Result<Exit, Failure> {
    let out = &mut shell.stdout.out;
    if json {
        serde_json::to_writer_pretty(&mut *out, result).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        let rows = table(result);
        let width = rows.iter().map(|[name, _]| name.chars().count()).max().unwrap_or(0);
        for [name, value] in rows {
            writeln!(out, "{name:<width$}  {value}")?;
        }
    }
    out.flush()?;
    Ok(Exit::Finished)
}

fn transfer_table(result: &TransferResult) -> Vec<[String; 2]> {
    let TransferResult { seconds, ratio, .. } = result;
    let mut rows = vec![
        row(
            "transfer",
            format!(
                "{} from {} to {}, chunks of {} KiB, broker {}, {}",
                megabytes(result.bytes),
                counted(result.senders, "sender"),
                counted(result.receivers, "receiver"),
                result.chunk_bytes / 1024,
                result.broker,
                place(result.processes)
            ),
        ),
        row(
            "seconds",
            format!(
                "{:.3} (pull {:.3}, verify {:.3}), {:.3} to {:.3} in {} repeats",
                seconds.total, seconds.pull, seconds.verify, seconds.fastest, seconds.slowest, result.repeat
            ),
        ),
        row("speed", format!("{:.0} MB/s", result.mb_per_s)),
    ];
    let mut bare = pipe_row("bare pipe", result.pipe, ratio.to_pipe);
    bare[1] += &format!(", {} until the last chunk", percent(ratio.pull_to_pipe));
    rows.push(bare);
    let pipes = [
        ("pipe at QoS 1", result.pipe_qos1, ratio.to_pipe_qos1),
        ("pipe of rumqttd", result.pipe_rumqttd, ratio.to_pipe_rumqttd),
    ];
    rows.extend(pipes.into_iter().filter_map(|(name, pipe, ratio)| Some(pipe_row(name, pipe?, ratio?))));
    rows.extend(machine_rows(&result.machine, ratio.to_tcp, ratio.to_memory_copy));
    rows.push(wire_row(&result.wire));
    rows.push(heartbeat_row(&result.heartbeat));
    rows.extend(result.roles.iter().map(role_row));
    rows
}

fn round_table(result: &RoundResult) -> Vec<[String; 2]> {
    let RoundResult { seconds, ratio, .. } = result;
    let mut rows = vec![
        row(
            "round",
            format!(
                "{} among {}, updates {}, models {}, chunks of {} KiB, broker {}, {}, state {}",
                megabytes(result.bytes),
                counted(result.peers, "peer"),
                result.codec,
                result.model_codec,
                result.chunk_bytes / 1024,
                result.broker,
                place(result.processes),
                if result.disk { "on disk" } else { "in memory" }
            ),
        ),
        row(
            "seconds",
            format!("{:.3}, {:.3} to {:.3} in {} rounds", seconds.total, result.fastest, result.slowest, result.rounds),
        ),
        row(
            "phases",
            format!(
                "evaluate {:.3}, elect {:.3}, train {:.3}, gather {:.3}, aggregate {:.3}, broadcast {:.3}, commit {:.3}",
                seconds.evaluate,
                seconds.elect,
                seconds.train,
                seconds.gather,
                seconds.aggregate,
                seconds.broadcast,
                seconds.commit
            ),
        ),
        row("speed", format!("{:.0} MB/s", result.mb_per_s)),
    ];
    rows.extend(machine_rows(&result.machine, ratio.to_tcp, ratio.to_memory_copy));
    rows.push(wire_row(&result.wire));
    rows.push(heartbeat_row(&result.heartbeat));
    rows.extend(result.roles.iter().map(role_row));
    rows.extend(growth_rows(result));
    rows
}

/// What grew from a tenth of the rounds to the last one, if there are enough of them to tell.
fn growth_rows(result: &RoundResult) -> Vec<[String; 2]> {
    let grown = |what: &str, growth: Option<Growth>| {
        growth.map(|growth| format!("{what} {} then {}", megabytes(growth.tenth), megabytes(growth.end)))
    };
    let roles = result.roles.iter().map(|role| grown(role.role, role.rss_bytes));
    let parts: Vec<String> = roles.chain([grown("disk of one peer", result.disk_bytes)]).flatten().collect();
    if result.rounds < 10 || parts.is_empty() {
        return Vec::new();
    }
    vec![row("growth", format!("after round {} and the last one: {}", result.rounds / 10, parts.join(", ")))]
}

fn train_table(result: &TrainResult) -> Vec<[String; 2]> {
    let shape: Vec<String> = result.shape.iter().map(usize::to_string).collect();
    let (model, values, batch) = (result.model, result.values, result.batch_size);
    let mut rows =
        vec![row("model", format!("{model} of {values} values, samples of {}, batches of {batch}", shape.join(" × ")))];
    for speed in &result.backends {
        let ratio = speed.to_torch.map_or_else(String::new, |ratio| format!(", {ratio:.2} of PyTorch's"));
        rows.push(row(speed.backend.name(), format!("{:.0} samples/s{ratio}", speed.samples_per_s)));
    }
    rows.push(row(
        "PyTorch",
        match &result.torch {
            Some(torch) => format!("{:.0} samples/s on one thread (version {})", torch.samples_per_s, torch.version),
            None => format!("absent: {} can name the interpreter of a virtual environment with torch", train::PYTHON),
        },
    ));
    rows
}

fn row(name: &str, value: String) -> [String; 2] {
    [name.to_owned(), value]
}

fn pipe_row(name: &str, pipe: Speed, ratio: f64) -> [String; 2] {
    let Speed { mb_per_s, seconds } = pipe;
    row(name, format!("{mb_per_s:.0} MB/s in {seconds:.3} s: the transfer has {} of its speed", percent(ratio)))
}

fn machine_rows(machine: &Machine, to_tcp: f64, to_memory_copy: f64) -> [[String; 2]; 2] {
    let share = |speed: f64, ratio: f64| format!("{speed:.0} MB/s: {} of it", percent(ratio));
    [
        row("TCP over loopback", share(machine.tcp_mb_per_s, to_tcp)),
        row("copy in memory", share(machine.memory_copy_mb_per_s, to_memory_copy)),
    ]
}

fn wire_row(wire: &Wire) -> [String; 2] {
    row("wire", format!("{:.3} models sent, {:.3} received", wire.sent_per_model, wire.received_per_model))
}

fn heartbeat_row(heartbeat: &Heartbeat) -> [String; 2] {
    let Heartbeat { count, median_ms, p99_ms, max_ms } = heartbeat;
    let value =
        format!("median {median_ms:.1} ms, p99 {p99_ms:.1} ms, longest {max_ms:.1} ms ({count} while weights moved)");
    row("heartbeat", value)
}

fn role_row(role: &RoleUsage) -> [String; 2] {
    let unknown = || "-".to_owned();
    let cpu = role.cpu_seconds.map_or_else(unknown, |seconds| format!("{seconds:.2} s"));
    let memory = role.peak_rss_bytes.map_or_else(unknown, megabytes);
    let count = if role.count > 1 { format!(" (each of {})", role.count) } else { String::new() };
    row(role.role, format!("{cpu} of CPU time, {memory} of memory at most{count}"))
}

fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

fn megabytes(bytes: u64) -> String {
    if bytes < 10_000_000 { format!("{:.1} MB", bytes as f64 / 1e6) } else { format!("{:.0} MB", bytes as f64 / 1e6) }
}

fn place(processes: bool) -> &'static str {
    if processes { "a process each" } else { "all in one process" }
}

fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_a_dash() {
        let (cpu_seconds, rss_bytes) = (None, None);
        let role = RoleUsage { role: "broker", count: 1, cpu_seconds, peak_rss_bytes: Some(12_000_000), rss_bytes };
        assert_eq!(role_row(&role)[1], "- of CPU time, 12 MB of memory at most");
        let many = RoleUsage { role: "trainer", count: 3, cpu_seconds: Some(0.5), peak_rss_bytes: None, rss_bytes };
        assert_eq!(role_row(&many)[1], "0.50 s of CPU time, - of memory at most (each of 3)");
    }

    #[test]
    fn the_state_of_all_peers_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let state = StateDir::new(Some(parent.path())).unwrap();
        std::fs::write(state.0.join("file"), "x").unwrap();
        let dir = state.0.clone();
        drop(state);
        assert!(!dir.exists());
        let failure = StateDir::new(Some(&parent.path().join("missing"))).err().unwrap();
        assert_eq!(failure.exit, Exit::Usage);
    }
}
