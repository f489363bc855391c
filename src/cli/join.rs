//! `rodizio join`: one peer of a federation.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::unbounded_channel;
use tokio::sync::watch;

use crate::broker::Broker;
use crate::cli::args::{JoinArgs, OutputArgs};
use crate::cli::broker::{LISTEN, how_to_join};
use crate::cli::follow::{Audience, check_same, choose_run_dir, earlier_settings, is_derived, recall};
use crate::cli::narrator::Narrator;
use crate::cli::output::{Notice, Output};
use crate::cli::{Exit, Failure, Shell, interrupt, log, runtime};
use crate::cluster::{self, Stop, advertised_at, reachable_at, start_broker};
use crate::config::{Layers, Settings};
use crate::events::Recorder;
use crate::journal::JournalError;
use crate::node::{Hosted, Outcome};
use crate::peer::{LocalPeer, PeerError};
use crate::rundir::RunDir;

/// How long other peers may take to leave the broker of a peer that is done.
const GUESTS_MAX: Duration = Duration::from_secs(60);

/// Where peers keep their state unless the user says otherwise, each federation in a directory of its own.
const STATE: &str = ".rodizio";

/// So many unnamed peers of one federation may run in one directory.
const UNNAMED_MAX: usize = 1_000;

/// Takes part to the end.
pub fn run(args: &JoinArgs, mut layers: Layers, shell: &mut Shell) -> Result<Exit, Failure> {
    let host_broker = layers.settings()?.host_broker;
    if !host_broker {
        layers.derive("broker", LISTEN, "where `rodizio broker` listens");
    }
    let settings = layers.settings_of_join()?;
    let peer = open(&settings)?;
    if args.entries { tell_entries(args, &settings, peer, shell) } else { tell_people(args, layers, peer, shell) }
}

/// Opens the peer in its state directory. Unnamed peers that are started in one place take one directory each, and the
/// same ones when they are started again.
fn open(settings: &Settings) -> Result<LocalPeer, PeerError> {
    let at = |state_dir: PathBuf| LocalPeer::open(&Settings { state_dir: Some(state_dir), ..settings.clone() });
    let of_federation = Path::new(STATE).join(&settings.federation);
    match (&settings.state_dir, &settings.peer) {
        (Some(dir), _) => at(dir.clone()),
        (None, Some(peer)) => at(of_federation.join(peer.as_str())),
        (None, None) => {
            let mut opened = (1..=UNNAMED_MAX).map(|number| at(of_federation.join(number.to_string())));
            let is_free =
                |opened: &Result<_, PeerError>| !matches!(opened, Err(PeerError::Journal(JournalError::InUse { .. })));
            opened.find(is_free).unwrap_or_else(|| at(of_federation.join(UNNAMED_MAX.to_string())))
        }
    }
}

fn tell_people(args: &JoinArgs, mut layers: Layers, peer: LocalPeer, shell: &mut Shell) -> Result<Exit, Failure> {
    let started = Instant::now();
    let settings = layers.settings_of_join()?;
    let dir = choose_run_dir(&mut layers, &settings);
    let is_new = is_derived(&layers);
    let settings = layers.settings_of_join()?;
    if let Some(earlier) = earlier_settings(&dir)? {
        check_same(&dir, &earlier, &settings)?;
    }
    let (env, colour) = (shell.env.clone(), shell.stderr.colour);
    let OutputArgs { verbose, .. } = args.output;
    let mut output = Output::new(shell, args.output);
    log::start(verbose, &env, colour, &output.bar())?;
    let run_dir = RunDir::open(&dir)?;
    run_dir.write_config(&settings.to_toml(&layers))?;
    runtime()?.block_on(take_part(settings, peer, run_dir, is_new, started, &mut output))
}

async fn take_part(
    settings: Settings,
    peer: LocalPeer,
    run_dir: RunDir,
    is_new: bool,
    started: Instant,
    output: &mut Output<'_>,
) -> Result<Exit, Failure> {
    let (_request, stop) = interrupt::listen();
    let broker = host(&settings).await?;
    let peer = hosting(peer, &settings, broker.as_ref()).await;
    output.show(&Notice::Info { text: introduction(&peer, broker.as_ref(), &run_dir) })?;
    if peer.has_finished() {
        let text = format!(
            "this federation has finished; for another one choose another --federation, or remove {}",
            peer.state_dir().display()
        );
        output.show(&Notice::Warning { text })?;
    }
    let state_dir = peer.state_dir().to_owned();
    let state_dirs = BTreeMap::from([(peer.name().clone(), state_dir.clone())]);
    let names = BTreeSet::from([peer.name().clone()]);
    let mut narrator = Narrator::new(names, settings.rounds, Duration::ZERO, started);
    recall(&run_dir, &mut narrator)?;
    let recorder = Recorder::new(run_dir, &settings.federation, peer.layout(), settings.codecs().model, state_dirs)
        .naming(peer.lesson().class_names.clone());
    let mut audience = Audience { recorder, narrator, output };
    let (sender, mut entries) = unbounded_channel();
    let task = cluster::spawn(peer, &stop, &sender);
    let result = audience.follow(&mut entries, &stop, task).await.unwrap_or(Err(PeerError::LostTask));
    let shown = audience.conclude()?;
    if is_new && matches!(result, Err(PeerError::Transport(_))) {
        // No broker, no results.
        audience.recorder.into_run_dir().remove();
    }
    if let Some(broker) = broker {
        leave(broker, &stop, audience.output).await;
    }
    match result? {
        _ if shown => Ok(Exit::Finished),
        Outcome::Interrupted => {
            let text = format!("interrupted; run the same command again to go on (state: {})", state_dir.display());
            output.show(&Notice::Info { text })?;
            Ok(Exit::Interrupted)
        }
        outcome => Failure::of_outcome(&outcome).map_or(Ok(Exit::Finished), Err),
    }
}

/// Starts a broker for the others as well, if the settings say so.
async fn host(settings: &Settings) -> Result<Option<Broker>, Failure> {
    if !settings.host_broker {
        return Ok(None);
    }
    let listen = settings.listen.as_deref().unwrap_or(LISTEN);
    Ok(Some(start_broker(listen, settings.min_peers, settings.chunk_bytes).await?))
}

/// The peer with the broker that it hosts, if it does. A list of brokers that is given holds for the one that hosts the
/// first of them, too.
async fn hosting(peer: LocalPeer, settings: &Settings, broker: Option<&Broker>) -> LocalPeer {
    let Some(broker) = broker else { return peer };
    let advertised = match &settings.advertise {
        Some(address) => Some(address.clone()),
        None => advertised_at(broker.addr(), &settings.brokers).await,
    };
    peer.hosting(Hosted { local: reachable_at(broker.addr()).to_string(), advertised })
}

fn introduction(peer: &LocalPeer, broker: Option<&Broker>, run_dir: &RunDir) -> String {
    let mut text = format!("peer     {}, federation {}\n", peer.name(), peer.federation());
    text += &format!("broker   {}\n", peer.brokers().join(", "));
    if let Some(broker) = broker {
        text += &match peer.advertised() {
            Some(address) => {
                format!("standby  {address}: the others learn of it and meet there when their brokers fail\n")
            }
            None => format!(
                "standby  none: {} is of use on this machine only (--listen 0.0.0.0:{} or --advertise)\n",
                broker.addr(),
                broker.addr().port()
            ),
        };
    }
    text += &format!("state    {}\n", peer.state_dir().display());
    text += &format!("results  {}\n", run_dir.path().display());
    let lesson = peer.lesson();
    let held_out = lesson.num_held_out.map(|count| format!(", {count} held out")).unwrap_or_default();
    text += &format!("data     {}: {} to train on{held_out}; {}\n", lesson.data, peer.num_examples(), lesson.task);
    if let Some(broker) = broker {
        text += &how_to_join(broker.addr());
    }
    text
}

/// The broker stays while others need it.
async fn leave(broker: Broker, stop: &Stop, output: &mut Output<'_>) {
    let stay = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        // When nobody watches any more, the others still need the broker.
        let _ = output.show(&Notice::Waiting { text: "the broker stays until the others have left".into() });
        std::future::pending::<()>().await;
    };
    tokio::select! {
        _ = tokio::time::timeout(GUESTS_MAX, broker.deserted()) => {}
        () = stop.clone().requested() => {}
        () = stay => {}
    }
    broker.stop().await;
}

/// The peer of a `run --processes`: entries go to stdout, for the process that started this one.
fn tell_entries(args: &JoinArgs, settings: &Settings, peer: LocalPeer, shell: &mut Shell) -> Result<Exit, Failure> {
    let bar = indicatif::ProgressBar::hidden();
    log::start(args.output.verbose, &shell.env, shell.stderr.colour, &bar)?;
    let outcome = runtime()?.block_on(async {
        let (request, stop) = interrupt::listen();
        stop_with_stdin(request);
        let broker = host(settings).await?;
        let (sender, mut entries) = unbounded_channel();
        let peer = hosting(peer, settings, broker.as_ref()).await;
        let mut task = cluster::spawn(peer, &stop, &sender);
        drop(sender);
        while let Some(entry) = entries.recv().await {
            let out = &mut shell.stdout.out;
            writeln!(out, "{}", entry.to_line())?;
            out.flush()?;
        }
        Ok::<_, Failure>((&mut task).await.unwrap_or(Err(PeerError::LostTask))?)
    })?;
    match outcome {
        Outcome::Finished { .. } => Ok(Exit::Finished),
        Outcome::Interrupted => Ok(Exit::Interrupted),
        outcome => Failure::of_outcome(&outcome).map_or(Ok(Exit::Finished), Err),
    }
}

/// A thread, because a read from stdin cannot be given up: it ends with the process.
fn stop_with_stdin(request: watch::Sender<bool>) {
    thread::spawn(move || {
        // An error ends it like an end.
        let _ = io::stdin().lock().read_to_end(&mut Vec::new());
        request.send_replace(true);
    });
}
