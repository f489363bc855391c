//! `rodizio run`: a broker and many peers on this machine, in one command.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use tokio::sync::mpsc::unbounded_channel;

use crate::broker::Broker;
use crate::cli::args::RunArgs;
use crate::cli::follow::{Audience, check_same, choose_run_dir, earlier_settings, is_derived, recall};
use crate::cli::narrator::Narrator;
use crate::cli::output::{Notice, Output};
use crate::cli::{Exit, Failure, Shell, interrupt, log, runtime};
use crate::cluster::{Cluster, PEERS, Processes, Program, Stop, peer_settings, reachable_at, start_broker};
use crate::config::{Layers, Settings, Source};
use crate::events::Recorder;
use crate::node::Outcome;
use crate::peer::{LocalPeer, PeerError};
use crate::rundir::{CONFIG, RunDir};
use crate::types::PeerId;
use crate::weights::Layout;

/// Where the broker of a run listens unless the user says otherwise: a free port of this machine alone.
const LISTEN: &str = "127.0.0.1:0";

/// How long peers of other machines may take to leave the broker of a run that is over.
const GUESTS_MAX: Duration = Duration::from_secs(30);

/// So many peers are listed; the rest is summed up.
const LISTED_MAX: usize = 20;

/// With more labels than fit side by side only the most frequent are listed, so many of them.
const LABELS_MAX: usize = 12;
const FREQUENT: usize = 4;

/// The longest name of a label in a table, in characters.
const LABEL_CHARS_MAX: usize = 12;

/// A wait that is shorter is part of starting, and not told.
const PATIENCE: Duration = Duration::from_secs(1);

/// Runs the cluster to its end.
pub fn run(args: &RunArgs, mut layers: Layers, shell: &mut Shell) -> Result<Exit, Failure> {
    let started = Instant::now();
    let (run_dir, settings) = prepare(&mut layers)?;
    let is_new = is_derived(&layers);
    let (env, colour) = (shell.env.clone(), shell.stderr.colour);
    let mut output = Output::new(shell, args.output);
    log::start(args.output.verbose, &env, colour, &output.bar())?;
    runtime()?.block_on(cluster(args, settings, run_dir, is_new, started, &mut output))
}

/// The settings of the run that left its results in `run_dir`, as a file.
pub fn config_to_resume(run_dir: &Path) -> Result<PathBuf, Failure> {
    let refused = |why: &str| {
        Err(Failure::new(Exit::Usage, anyhow!("{} holds no run to go on with: {why}", run_dir.display()))
            .hint("name the directory of an earlier `rodizio run`, as it said after `results`"))
    };
    let config = run_dir.join(CONFIG);
    if !run_dir.is_dir() {
        return refused("it is no directory");
    }
    if !config.is_file() {
        return refused(&format!("there is no {CONFIG} in it"));
    }
    if !run_dir.join(PEERS).is_dir() {
        return refused("no peer has left its state there");
    }
    Ok(config)
}

/// Settles what the user left open, and opens the run directory.
fn prepare(layers: &mut Layers) -> Result<(RunDir, Settings), Failure> {
    one_peer_a_file(layers)?;
    layers.derive("min_peers", &layers.peers().to_string(), "as many as peers");
    let settings = layers.settings_of_run()?;
    let earlier = settings.run_dir.as_deref().map(earlier_settings).transpose()?.flatten();
    if *layers.source("federation") == Source::Default {
        match &earlier {
            Some(earlier) => layers.derive("federation", &earlier.federation, "that of the run directory"),
            // Two runs that meet at one broker are not to mix.
            None if !settings.brokers.is_empty() => {
                let name = format!("run-{:08x}", rand::random::<u32>());
                layers.derive("federation", &name, "a new one");
            }
            None => {}
        }
    }
    let settings = layers.settings_of_run()?;
    let dir = choose_run_dir(layers, &settings);
    let settings = layers.settings_of_run()?;
    if let Some(earlier) = &earlier {
        check_same(&dir, earlier, &settings)?;
    }
    let run_dir = RunDir::open(&dir)?;
    // The file of a run that goes on keeps what it says of who set what.
    let is_same = |earlier: Settings| Settings { run_dir: settings.run_dir.clone(), ..earlier } == settings;
    if !earlier.is_some_and(is_same) {
        run_dir.write_config(&settings.to_toml(layers))?;
    }
    Ok((run_dir, settings))
}

/// Where data are a pattern, each of its files makes a peer.
fn one_peer_a_file(layers: &mut Layers) -> Result<(), Failure> {
    let source = layers.source_of_data();
    if !source.is_pattern() {
        return Ok(());
    }
    let files = source.expand()?.len();
    layers.derive("peers", &files.to_string(), "one a file of data");
    if layers.peers() != files {
        let error = anyhow!("{} peers do not go with {source}, which stands for {files} files", layers.peers());
        return Err(Failure::new(Exit::Usage, error).hint("leave --peers out: each file makes a peer"));
    }
    Ok(())
}

async fn cluster(
    args: &RunArgs,
    mut settings: Settings,
    run_dir: RunDir,
    is_new: bool,
    started: Instant,
    output: &mut Output<'_>,
) -> Result<Exit, Failure> {
    let (_request, stop) = interrupt::listen();
    let broker = match broker_of(&mut settings).await {
        Ok(broker) => broker,
        Err(failure) => {
            if is_new {
                run_dir.remove();
            }
            return Err(failure);
        }
    };
    let dir = run_dir.path().to_owned();
    let cluster = match Cluster::open(&settings, &dir) {
        Ok(cluster) => cluster,
        Err(error) => {
            if is_new {
                run_dir.remove();
            }
            return Err(error.into());
        }
    };
    let cluster = if broker.is_some() { cluster.at_its_own_broker() } else { cluster };
    output.show(&Notice::Info { text: introduction(&settings, broker.as_ref(), &dir, cluster.peers()) })?;
    if cluster.peers().iter().all(LocalPeer::has_finished) {
        let text = "this run has finished, and this is its result; for another one choose a new --run-dir".into();
        output.show(&Notice::Info { text })?;
    }
    let names = cluster.peers().iter().map(|peer| peer.name().clone()).collect();
    let mut narrator = Narrator::new(names, settings.rounds, PATIENCE, started);
    recall(&run_dir, &mut narrator)?;
    let recorder = recorder(&settings, run_dir, cluster.peers());
    let mut audience = Audience { recorder, narrator, output };
    let failure = if settings.processes {
        // Their state directories are for the processes now.
        drop(cluster);
        as_processes(args, &settings, &dir, &stop, &mut audience).await?
    } else {
        as_tasks(cluster, &stop, &mut audience).await
    };
    let finished = audience.conclude()?;
    if let Some(broker) = broker {
        tokio::select! {
            _ = tokio::time::timeout(GUESTS_MAX, broker.deserted()) => {}
            () = stop.clone().requested() => {}
        }
        broker.stop().await;
    }
    match failure {
        _ if finished => Ok(Exit::Finished),
        _ if stop.is_requested() => {
            let text = format!("interrupted; to go on: rodizio run --resume {}", dir.display());
            output.show(&Notice::Info { text })?;
            Ok(Exit::Interrupted)
        }
        Some(failure) => Err(failure),
        None => Err(Failure::new(Exit::Internal, anyhow!("the peers ended without a result"))),
    }
}

/// Starts a broker where the user names none; the settings then name it.
async fn broker_of(settings: &mut Settings) -> Result<Option<Broker>, Failure> {
    if !settings.brokers.is_empty() {
        return Ok(None);
    }
    let listen = settings.listen.as_deref().unwrap_or(LISTEN);
    let broker = start_broker(listen, settings.peers, settings.chunk_bytes).await?;
    settings.brokers = vec![reachable_at(broker.addr()).to_string()];
    Ok(Some(broker))
}

fn recorder(settings: &Settings, run_dir: RunDir, peers: &[LocalPeer]) -> Recorder {
    let layout: Arc<Layout> = peers.first().map(LocalPeer::layout).unwrap_or_default();
    let state_dirs = peers.iter().map(|peer| (peer.name().clone(), peer.state_dir().to_owned()));
    let state_dirs: BTreeMap<PeerId, PathBuf> = state_dirs.collect();
    let lesson = peers.first().map(LocalPeer::lesson).cloned().unwrap_or_default();
    Recorder::new(run_dir, &settings.federation, layout, settings.codecs().model, state_dirs).naming(lesson.class_names)
}

/// Why there is no result, as far as the peers can tell.
async fn as_tasks(cluster: Cluster, stop: &Stop, audience: &mut Audience<'_, '_>) -> Option<Failure> {
    let (sender, mut entries) = unbounded_channel();
    let ended = audience.follow(&mut entries, stop, cluster.run(stop, &sender)).await;
    ended.into_iter().find_map(|(peer, result)| failure_of(result).map(|failure| failure.of(&peer)))
}

fn failure_of(result: Result<Outcome, PeerError>) -> Option<Failure> {
    match result {
        Ok(outcome) => Failure::of_outcome(&outcome),
        Err(error) => Some(error.into()),
    }
}

async fn as_processes(
    args: &RunArgs,
    settings: &Settings,
    run_dir: &Path,
    stop: &Stop,
    audience: &mut Audience<'_, '_>,
) -> Result<Option<Failure>, Failure> {
    let (sender, mut entries) = unbounded_channel();
    let path = std::env::current_exe().context("cannot find the file of this program")?;
    let verbose = (0..args.output.verbose).map(|_| "--verbose".into()).collect();
    let program = Program { path, args: verbose };
    let processes = Processes::start(&program, settings, run_dir, &sender).context("cannot start a peer")?;
    debug_assert_eq!(peer_settings(settings, run_dir).len(), settings.peers);
    let ended = audience.follow(&mut entries, stop, processes.run(stop)).await;
    Ok(ended.into_iter().find_map(|(peer, status)| failure_of_process(status).map(|failure| failure.of(&peer))))
}

/// The process has said why on its standard error, which was shown.
fn failure_of_process(status: std::io::Result<ExitStatus>) -> Option<Failure> {
    match status {
        Ok(status) if status.success() => None,
        Ok(status) => {
            let exit = status.code().and_then(Exit::from_code).unwrap_or(Exit::Internal);
            Some(Failure::new(exit, anyhow!("its process ended with {status}")))
        }
        Err(error) => Some(error.into()),
    }
}

/// What is started, and who has which data.
fn introduction(settings: &Settings, broker: Option<&Broker>, dir: &Path, peers: &[LocalPeer]) -> String {
    let kind = if settings.processes { "processes" } else { "peers in this process" };
    let (at, whose) = (settings.brokers.join(", "), if broker.is_some() { ", started here" } else { "" });
    let mut text = format!("{} {kind}, federation {}\n", peers.len(), settings.federation);
    text += &format!("broker   {at}{whose}\n");
    text += &format!("results  {}\n", dir.display());
    if let Some(peer) = peers.first() {
        let len = grouped(peer.layout().len());
        if let Some(command) = &settings.trainer {
            text += &format!("trainer  {command}, {len} parameters\n");
            return text + &labels(peers);
        }
        let hidden: Vec<_> = settings.hidden.iter().map(usize::to_string).collect();
        let hidden = if hidden.is_empty() { "no".to_owned() } else { hidden.join("-") };
        text += &format!("model    {} with {hidden} hidden, {len} parameters\n", settings.model);
        let split = match settings.source().is_pattern() {
            true => "a file for each peer".to_owned(),
            false => format!("split {}", settings.partition()),
        };
        text += &format!("data     {}, {split}; {}\n", settings.data, peer.lesson().task);
    }
    if peers.iter().any(LocalPeer::is_resumed) {
        text += "the peers go on where an earlier run stopped\n";
    }
    text + &labels(peers)
}

/// How many examples of each label each peer trains on, and all of them; with many labels only the most frequent.
fn labels(peers: &[LocalPeer]) -> String {
    let Some(first) = peers.first() else { return String::new() };
    let counted: Vec<(String, Vec<usize>)> =
        peers.iter().map(|peer| (peer.name().to_string(), peer.lesson().histogram.clone())).collect();
    let has_labels = counted.iter().any(|(_, counts)| !counts.is_empty());
    let names: Vec<String> =
        if has_labels { first.lesson().class_names.iter().map(|name| short(name)).collect() } else { vec![] };
    let row = |name: &str, train: u64, held_out: Option<usize>, counts: &[usize]| {
        let labels = if names.len() <= LABELS_MAX {
            counts.iter().map(usize::to_string).collect()
        } else {
            vec![counts.iter().filter(|&&count| count > 0).count().to_string(), most_frequent(counts, &names)]
        };
        let held_out = held_out.map(|count| count.to_string());
        [name.to_owned(), train.to_string()].into_iter().chain(held_out).chain(labels).collect::<Vec<_>>()
    };
    let label_heads =
        if names.len() <= LABELS_MAX { names.clone() } else { vec!["classes".into(), "most frequent".into()] };
    let held_out = first.lesson().num_held_out.map(|_| "held out");
    let head = ["peer", "train"].into_iter().chain(held_out).map(str::to_owned).chain(label_heads);
    let mut rows: Vec<Vec<String>> = vec![head.collect()];
    let listed = peers.iter().zip(&counted).take(LISTED_MAX);
    rows.extend(
        listed.map(|(peer, (name, counts))| row(name, peer.num_examples(), peer.lesson().num_held_out, counts)),
    );
    let mut total = vec![0; names.len()];
    counted.iter().for_each(|(_, counts)| total.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count));
    let train = peers.iter().map(LocalPeer::num_examples).sum();
    let all = row("all", train, peers.iter().map(|peer| peer.lesson().num_held_out).sum(), &total);
    let mut lines = aligned(&[rows, vec![all]].concat());
    if peers.len() > LISTED_MAX {
        lines.insert(lines.len() - 1, format!("and {} more", peers.len() - LISTED_MAX));
    }
    lines.join("\n") + "\n"
}

/// `7 120, 3 80, 9 12, …`: the labels that most examples have.
fn most_frequent(counts: &[usize], names: &[String]) -> String {
    let mut order: Vec<usize> = (0..counts.len()).filter(|&label| counts[label] > 0).collect();
    order.sort_by_key(|&label| (std::cmp::Reverse(counts[label]), label));
    let some = order.iter().take(FREQUENT).map(|&label| format!("{}: {}", names[label], counts[label]));
    let more = (order.len() > FREQUENT).then(|| "…".to_owned());
    some.chain(more).collect::<Vec<_>>().join(", ")
}

/// A name that leaves room for others in a line.
fn short(name: &str) -> String {
    if name.chars().count() <= LABEL_CHARS_MAX {
        return name.to_owned();
    }
    name.chars().take(LABEL_CHARS_MAX - 1).chain(['…']).collect()
}

/// A line a row, the first column flush left, and so a last one of text.
fn aligned(rows: &[Vec<String>]) -> Vec<String> {
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..rows[0].len()).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate();
        let padded = cells.map(|(column, (cell, width))| match cell.parse::<u64>() {
            Err(_) if column == 0 || cell.contains(": ") => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        padded.collect::<Vec<_>>().join("  ")
    };
    rows.iter().map(line).collect()
}

/// A number with commas between thousands.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Key;

    #[test]
    fn thousands_are_grouped() {
        for (number, text) in [(0, "0"), (999, "999"), (4810, "4,810"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(number), text);
        }
    }

    fn prepared(dir: &Path, flags: &[(&str, &str)]) -> Settings {
        let mut layers = Layers::new();
        layers.flag(Key::find("run_dir").unwrap(), dir.to_str().unwrap()).unwrap();
        for (key, text) in flags {
            layers.flag(Key::find(key).unwrap(), text).unwrap();
        }
        prepare(&mut layers).unwrap().1
    }

    #[test]
    fn a_run_waits_for_all_its_peers_unless_told_otherwise() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(prepared(&dir.path().join("a"), &[("peers", "4")]).min_peers, 4);
        assert_eq!(prepared(&dir.path().join("b"), &[("peers", "4"), ("min_peers", "2")]).min_peers, 2);
    }

    #[test]
    fn runs_at_a_broker_that_others_use_have_names_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let broker = [("broker", "lab:1883")];
        let first = prepared(&dir.path().join("a"), &broker).federation;
        let second = prepared(&dir.path().join("b"), &broker).federation;
        assert!(first.starts_with("run-") && first != second, "{first} {second}");
        assert_eq!(prepared(&dir.path().join("a"), &broker).federation, first, "it goes on under its name");
        assert_eq!(prepared(&dir.path().join("c"), &[]).federation, "default");
    }

    #[test]
    fn the_table_of_labels_has_a_line_a_peer_and_no_more_than_that() {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = prepared(&dir.path().join("run"), &[("peers", "22"), ("hidden", "2")]);
        settings.brokers = vec!["127.0.0.1:1".into()];
        let cluster = Cluster::open(&settings, dir.path()).unwrap();
        let text = labels(cluster.peers());
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 1 + LISTED_MAX + 2);
        let head: Vec<_> = lines[0].split_whitespace().collect();
        assert_eq!(head[..5], ["peer", "train", "held", "out", "0"], "{text}");
        assert_eq!(lines[21], "and 2 more");
        assert!(lines[..21].iter().all(|line| line.len() == lines[0].len()), "{text}");
        assert!(lines[22].starts_with("all ") && lines[22].len() == lines[0].len(), "{text}");
        let all: Vec<usize> = lines[22].split_whitespace().skip(1).map(|cell| cell.parse().unwrap()).collect();
        assert_eq!((all[0] + all[1], all[2..].iter().sum::<usize>()), (1797, all[0]));
    }

    #[test]
    fn of_many_labels_the_most_frequent_are_listed() {
        let names: Vec<String> = (0..100).map(|label| short(&format!("label number {label}"))).collect();
        let counts: Vec<usize> = (0..100).map(|label| label * 7 % 50).collect();
        assert_eq!(most_frequent(&counts, &names[..]).matches(": ").count(), FREQUENT);
        assert_eq!(most_frequent(&[0, 3, 9], &["a".into(), "b".into(), "c".into()]), "c: 9, b: 3");
        assert_eq!(names[0], "label numbe…");
    }
}
