//! The same federation through brokers of others, from Debian's packages. Each test starts its broker on a free port of
//! this machine, with the example in `configs/`, and with some settings changed to see that peers notice. Where the
//! program is not installed, the test says so and passes.

mod common {
    pub(crate) mod hosts;
    pub(crate) mod log;
    pub(crate) mod signals;
}

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::hosts::own_host;
use common::log;
use common::signals::signal;
use rodizio::broker::{Broker, BrokerConfig};
use rodizio::events::{Entry, Event, RoundCommitted};
use rodizio::types::{Digest, PeerId, Round};
use serde_json::Value;
use tempfile::TempDir;

/// What is waited for comes within this, or never. RabbitMQ takes 12 s to start on an idle machine.
const LIMIT: Duration = Duration::from_secs(600);

/// How long to wait before looking again.
const PAUSE: Duration = Duration::from_millis(10);

/// How often a broker is started: another program may take a port that was free a moment ago.
const ATTEMPTS: usize = 5;

/// A busy machine is not to make a leader seem silent: another one would make another model.
const PATIENT: [&str; 2] = ["--election-timeout", "20s"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Mosquitto,
    Nats,
    RabbitMq,
}

impl Kind {
    /// Debian's package, and the program in it.
    fn package(self) -> &'static str {
        match self {
            Self::Mosquitto => "mosquitto",
            Self::Nats => "nats-server",
            Self::RabbitMq => "rabbitmq-server",
        }
    }

    fn program(self) -> Option<PathBuf> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders: Vec<PathBuf> = match self {
            // What Debian puts in /usr/sbin changes to another user and to the directories of the service.
            Self::RabbitMq => vec!["/usr/lib/rabbitmq/bin".into()],
            _ => std::env::split_paths(&path).chain(["/usr/sbin".into()]).collect(),
        };
        folders.iter().map(|folder| folder.join(self.package())).find(|program| program.is_file())
    }

    /// The example in `configs/`, with an address of this machine alone and with a directory of the test.
    fn config(self, dir: &Path, address: SocketAddr) -> String {
        let listen = address.to_string();
        match self {
            Self::Mosquitto => {
                let listener = format!("listener {} {}", address.port(), address.ip());
                example("mosquitto.conf", &[("listener 1883 0.0.0.0", &listener)])
            }
            Self::Nats => {
                let dir = dir.to_str().unwrap();
                // Port -1 is a free one.
                example(
                    "nats.conf",
                    &[("0.0.0.0:1883", &listen), ("127.0.0.1:4222", "127.0.0.1:-1"), ("/var/lib/nats", dir)],
                )
            }
            Self::RabbitMq => example("rabbitmq.conf", &[("0.0.0.0:1883", &listen)]),
        }
    }

    /// Starts the broker, and what it needs before it.
    fn spawn(self, program: &Path, dir: &Path, config: &Path) -> Vec<Child> {
        let mut command = Command::new(program);
        let mut children = Vec::new();
        match self {
            Self::Mosquitto | Self::Nats => {
                command.arg("-c").arg(config);
            }
            Self::RabbitMq => children.push(prepare_rabbitmq(&mut command, dir, config)),
        }
        children.push(spawn(&mut command, dir, "broker.log"));
        children
    }
}

/// An example from `configs/` with other text in some places.
fn example(name: &str, replacements: &[(&str, &str)]) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs").join(name);
    replaced(fs::read_to_string(path).unwrap(), replacements)
}

/// All places are looked for before any is replaced: a free port may begin like one of the example's.
fn replaced(mut text: String, replacements: &[(&str, &str)]) -> String {
    let place = |(from, to): &(&str, &str)| {
        let found: Vec<usize> = text.match_indices(from).map(|(at, _)| at).collect();
        assert_eq!(found.len(), 1, "{from} in:\n{text}");
        (found[0]..found[0] + from.len(), to.to_string())
    };
    let mut places: Vec<_> = replacements.iter().map(place).collect();
    // From the end: what is replaced does not move what comes before it.
    places.sort_by_key(|(range, _)| std::cmp::Reverse(range.start));
    places.into_iter().for_each(|(range, to)| text.replace_range(range, &to));
    text
}

#[test]
fn a_free_port_that_begins_like_a_port_of_the_example_is_left_alone() {
    let replacements = [("host:1883", "host:42221"), ("host:4222", "host:-1")];
    assert_eq!(replaced("a host:1883\nb host:4222\n".to_string(), &replacements), "a host:42221\nb host:-1\n");
}

/// Starts the name service of Erlang, which would outlive the broker if that started it, and puts everything that has
/// a fixed place elsewhere.
fn prepare_rabbitmq(command: &mut Command, dir: &Path, config: &Path) -> Child {
    let plugins = dir.join("plugins");
    fs::write(&plugins, "[rabbitmq_mqtt].").unwrap();
    fs::write(dir.join("env"), "").unwrap();
    let names = free_address(Ipv4Addr::LOCALHOST).port().to_string();
    let paths = [
        ("HOME", dir),
        ("RABBITMQ_CONFIG_FILE", config),
        ("RABBITMQ_CONF_ENV_FILE", &dir.join("env")),
        ("RABBITMQ_ENABLED_PLUGINS_FILE", &plugins),
        ("RABBITMQ_MNESIA_BASE", dir),
        ("RABBITMQ_LOG_BASE", dir),
    ];
    command.envs(paths);
    command.env("RABBITMQ_NODENAME", "rodizio@localhost").env("RABBITMQ_LOGS", "-");
    let dist = free_address(Ipv4Addr::LOCALHOST).port().to_string();
    command.env("RABBITMQ_DIST_PORT", dist).env("ERL_EPMD_PORT", &names);
    command.env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "-kernel inet_dist_use_interface {127,0,0,1}");
    // The script then becomes the broker instead of starting it: its process is the one to end.
    command.env("RUNNING_UNDER_SYSTEMD", "true");
    let child = spawn(Command::new("epmd").args(["-address", "127.0.0.1", "-port", &names]), dir, "epmd.log");
    let address = format!("127.0.0.1:{names}");
    wait_until(|| TcpStream::connect(&address).ok(), || "Erlang's name service does not start".to_owned());
    child
}

fn free_address(host: Ipv4Addr) -> SocketAddr {
    TcpListener::bind((host, 0)).unwrap().local_addr().unwrap()
}

fn spawn(command: &mut Command, dir: &Path, log: &str) -> Child {
    let log = File::options().create(true).append(true).open(dir.join(log)).unwrap();
    let errors = log.try_clone().unwrap();
    command.current_dir(dir).stdin(Stdio::null()).stdout(log).stderr(errors).spawn().unwrap()
}

/// Looks again and again until there is something.
fn wait_until<T>(mut look: impl FnMut() -> Option<T>, missing: impl Fn() -> String) -> T {
    let ends = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < ends, "{}", missing());
        thread::sleep(PAUSE);
    }
}

/// A broker that accepts connections. It ends with the test.
struct Outside {
    kind: Kind,
    program: PathBuf,
    dir: TempDir,
    /// On a host of the test's own: RabbitMQ begins to listen ten seconds after it was started.
    address: SocketAddr,
    /// The text of its configuration.
    config: String,
    children: Vec<Child>,
}

impl Outside {
    /// Starts it with the example; `None` where it is not installed.
    fn start(kind: Kind) -> Option<Self> {
        Self::start_with(kind, &[])
    }

    /// Starts it with other text in some places of the example.
    fn start_with(kind: Kind, replacements: &[(&str, &str)]) -> Option<Self> {
        let Some(program) = kind.program() else {
            let package = kind.package();
            // Not by a macro, whose output is shown only when a test fails.
            let text = format!("skipped: {package} is not installed (apt-get install {package})\n");
            std::io::stderr().write_all(text.as_bytes()).unwrap();
            return None;
        };
        for _ in 0..ATTEMPTS {
            let (dir, address) = (tempfile::tempdir().unwrap(), free_address(own_host()));
            let config = replaced(kind.config(dir.path(), address), replacements);
            let mut broker = Self { kind, program: program.clone(), dir, address, config, children: Vec::new() };
            if broker.launch() {
                return Some(broker);
            }
            eprintln!("{kind:?} ended:\n{}", broker.log());
        }
        panic!("{kind:?} does not start");
    }

    /// Starts the processes; whether they stay and accept connections.
    fn launch(&mut self) -> bool {
        self.kill();
        let config = self.dir.path().join("broker.conf");
        fs::write(&config, &self.config).unwrap();
        self.children = self.kind.spawn(&self.program, self.dir.path(), &config);
        let (address, log) = (self.address, self.dir.path().join("broker.log"));
        let children = &mut self.children;
        let answers = || {
            if children.iter_mut().any(|child| child.try_wait().unwrap().is_some()) {
                return Some(false);
            }
            TcpStream::connect(address).is_ok().then_some(true)
        };
        wait_until(answers, || fs::read_to_string(&log).unwrap())
    }

    fn address(&self) -> String {
        self.address.to_string()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("broker.log")).unwrap()
    }

    fn kill(&mut self) {
        for mut child in self.children.drain(..).rev() {
            // An error says that it has ended.
            let _ = child.kill();
            child.wait().unwrap();
        }
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        self.kill();
    }
}

/// `rodizio run` with four peers. It is killed when the test ends first.
struct Run {
    dir: PathBuf,
    child: Child,
}

impl Run {
    /// Starts it at a broker, or with its own.
    fn start(dir: &Path, name: &str, broker: Option<&str>, more: &[&str]) -> Self {
        let dir = dir.join(name);
        fs::create_dir(&dir).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_rodizio"));
        command.env_clear().args(["run", "--json", "--peers", "4", "--run-dir", "run"]).args(more);
        command.args(broker.iter().flat_map(|broker| ["--broker", broker]));
        command.current_dir(&dir).stdin(Stdio::null());
        let file = |name: &str| File::create(dir.join(name)).unwrap();
        let child = command.stdout(file("stdout")).stderr(file("stderr")).spawn().unwrap();
        Self { dir, child }
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.dir.join(name)).unwrap_or_default()
    }

    /// What the peers have told so far.
    fn entries(&self) -> Vec<Entry> {
        log::entries(&self.text("run/events.jsonl")).0
    }

    fn until<T>(&self, what: &str, wanted: impl Fn(&[Entry]) -> Option<T>) -> T {
        let missing = || format!("{what} did not come:\n{}\n{}", self.text("run/events.jsonl"), self.text("stderr"));
        wait_until(|| wanted(&self.entries()), missing)
    }

    fn wait(&mut self) -> ExitStatus {
        let (child, stderr) = (&mut self.child, self.dir.join("stderr"));
        let missing = || format!("the run does not end:\n{}", fs::read_to_string(&stderr).unwrap_or_default());
        wait_until(|| child.try_wait().unwrap(), missing)
    }

    /// Waits until it ends for want of a fit broker, and returns what it says of that.
    fn fail(mut self) -> String {
        let status = self.wait();
        assert_eq!(status.code(), Some(3), "{}", self.text("stderr"));
        self.text("stderr")
    }

    /// Waits for its success, and returns the result and what the peers told.
    fn end(mut self) -> (Value, Vec<Entry>) {
        let status = self.wait();
        assert!(status.success(), "{status}: {}", self.text("stderr"));
        (serde_json::from_str(&self.text("stdout")).unwrap(), self.entries())
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // An error says that it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn commits(entries: &[Entry]) -> impl Iterator<Item = &RoundCommitted> {
    entries.iter().filter_map(|entry| match &entry.event {
        Event::RoundCommitted(commit) => Some(&**commit),
        _ => None,
    })
}

/// Every round's commit, on which all who tell of it agree; and how many of them there are in all.
fn rounds(entries: &[Entry]) -> (Vec<RoundCommitted>, usize) {
    let mut rounds: BTreeMap<Round, RoundCommitted> = BTreeMap::new();
    for commit in commits(entries) {
        let first = rounds.entry(commit.round).or_insert_with(|| commit.clone());
        assert_eq!((first.decree, first.digest), (commit.decree, commit.digest), "round {}", commit.round);
    }
    let numbers: Vec<u64> = rounds.keys().map(|round| round.0).collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
    (rounds.into_values().collect(), commits(entries).count())
}

/// Everything that is asked of a broker.
fn carries_a_federation(kind: Kind) {
    let Some(mut broker) = Outside::start(kind) else { return };
    let dir = tempfile::tempdir().unwrap();
    let address = broker.address();
    peers_reach_the_target_by_small_chunks(dir.path(), &address);
    peers_make_the_same_model_as_at_the_embedded_broker(dir.path(), &address);
    a_leader_that_is_killed_is_replaced_at_its_last_will(dir.path(), &address);
    a_broker_that_is_killed_and_comes_back_is_found_again(dir.path(), &mut broker);
}

fn peers_reach_the_target_by_small_chunks(dir: &Path, broker: &str) {
    let args = ["--chunk-bytes", "4KiB", "--target-accuracy", "0.95", "--rounds", "20"];
    let (result, entries) = Run::start(dir, "small", Some(broker), &[&args[..], &PATIENT].concat()).end();
    assert_eq!(result["reason"], "target_accuracy");
    assert!(result["val_accuracy"].as_f64().unwrap() >= 0.95);
    let (rounds, told) = rounds(&entries);
    assert_eq!(told, 4 * rounds.len(), "every peer holds every round");
    assert_eq!(result["digest"], rounds.last().unwrap().digest.to_string());
    assert!(rounds.windows(2).all(|pair| pair[0].leader != pair[1].leader), "{:?}", result["leaders"]);
    let finished = entries.iter().filter(|entry| matches!(entry.event, Event::Finished { .. }));
    assert_eq!(finished.count(), 4);
}

/// What every peer found out about its brokers: the length of its chunks there.
fn probed(entries: &[Entry]) -> Vec<(PeerId, String, u32)> {
    let found = entries.iter().filter_map(|entry| match &entry.event {
        Event::Probed { broker, chunk_bytes, seconds, .. } => {
            eprintln!("{} tried {broker} in {seconds:.3} s", entry.peer);
            Some((entry.peer.clone(), broker.clone(), *chunk_bytes))
        }
        _ => None,
    });
    found.collect()
}

/// Default chunks, several a model: weights move as they do in earnest.
fn peers_make_the_same_model_as_at_the_embedded_broker(dir: &Path, broker: &str) {
    let args = ["--hidden", "512,512", "--rounds", "3", "--local-epochs", "1"];
    let digests = |name: &str, broker: Option<&str>| -> Vec<Digest> {
        let (result, entries) = Run::start(dir, name, broker, &[&args[..], &PATIENT].concat()).end();
        assert_eq!(result["reason"], "rounds");
        let chunks: Vec<u32> = probed(&entries).into_iter().map(|(.., chunk_bytes)| chunk_bytes).collect();
        let asked = if broker.is_some() { 4 } else { 0 };
        assert_eq!(chunks, vec![512 << 10; asked], "the example takes whole chunks, and each peer asks once");
        assert!(result["bytes_sent"].as_u64().unwrap() > 3 * 4 * 300_000 * 4);
        let (rounds, told) = rounds(&entries);
        assert_eq!((rounds.len(), told), (3, 12));
        assert!(rounds.iter().all(|round| round.contributors.len() == 3), "an update was left out");
        assert!(rounds.windows(2).all(|pair| pair[0].leader != pair[1].leader), "{:?}", result["leaders"]);
        rounds.iter().map(|round| round.digest).collect()
    };
    assert_eq!(digests("large", Some(broker)), digests("embedded", None));
}

/// Training outlasts the time that the death takes by far, and silence alone deposes nobody here.
fn a_leader_that_is_killed_is_replaced_at_its_last_will(dir: &Path, broker: &str) {
    let args = ["--processes", "--local-epochs", "100", "--rounds", "3"];
    let run = Run::start(dir, "killed", Some(broker), &[&args[..], &PATIENT].concat());
    let leader: PeerId = run.until("the leader of round 2", |entries| {
        entries.iter().find_map(|entry| match &entry.event {
            Event::Elected { round: Round(2), leader, .. } if *leader == entry.peer => Some(leader.clone()),
            _ => None,
        })
    });
    let entries = run.entries();
    let of_leader = entries.iter().filter(|entry| entry.peer == leader);
    let mut pids =
        of_leader.filter_map(|entry| if let Event::Started { pid, .. } = entry.event { Some(pid) } else { None });
    let pid = pids.next_back().expect("whoever leads has started");
    signal("KILL", &[pid]);

    let (_, entries) = run.end();
    let (rounds, _) = rounds(&entries);
    assert_eq!(rounds.len(), 3);
    assert_ne!(rounds[1].leader, leader);
    assert!(rounds[1].term.0 > 0 && !rounds[1].contributors.contains(&leader));
    let told = entries.iter().filter(
        |entry| matches!(&entry.event, Event::Deposed { round: Round(2), leader: of, gone: true, .. } if *of == leader),
    );
    let told: BTreeSet<_> = told.map(|entry| &entry.peer).collect();
    assert!(told.len() >= 2, "its last will is heard by {told:?}");
}

fn a_broker_that_is_killed_and_comes_back_is_found_again(dir: &Path, broker: &mut Outside) {
    // However late the broker is killed, the run is not over.
    let run = Run::start(dir, "again", Some(&broker.address()), &["--local-epochs", "50", "--rounds", "100000"]);
    run.until("the first round", |entries| commits(entries).next().map(drop));
    broker.kill();
    let lost = |entries: &[Entry]| entries.iter().any(|entry| matches!(entry.event, Event::Disconnected { .. }));
    run.until("the loss of the broker", |entries| lost(entries).then_some(()));
    assert!((0..ATTEMPTS).any(|_| broker.launch()), "{}", broker.log());
    goes_on(run);
}

/// Waits until each peer has committed rounds that nobody had, ends the run, and returns what the peers told: with a broker that
/// was lost, some are away for long, and a run with a last round might end without them.
fn goes_on(mut run: Run) -> Vec<Entry> {
    let before = commits(&run.entries()).map(|commit| commit.round).max();
    let newest = |entries: &[Entry], peer: &str| {
        let own = entries.iter().filter(|entry| entry.peer.as_str() == peer);
        own.filter_map(|entry| commits(std::slice::from_ref(entry)).next()).map(|commit| commit.round).max()
    };
    let all = |entries: &[Entry]| (1..=4).all(|number| newest(entries, &format!("peer-{number}")) > before);
    run.until("a new round at each peer", |entries| all(entries).then_some(()));
    signal("INT", &[run.child.id()]);
    assert_eq!(run.wait().code(), Some(130), "{}", run.text("stderr"));
    let entries = run.entries();
    rounds(&entries);
    entries
}

#[test]
fn mosquitto_carries_a_federation() {
    carries_a_federation(Kind::Mosquitto);
}

#[test]
fn nats_carries_a_federation() {
    carries_a_federation(Kind::Nats);
}

#[test]
fn rabbitmq_carries_a_federation() {
    carries_a_federation(Kind::RabbitMq);
}

/// Peers notice a low limit, send shorter chunks, tell people so once, and make the same model.
fn carries_shorter_chunks(dir: &Path, address: &str, possible: &[u32]) {
    let args = ["--hidden", "512,512", "--rounds", "2", "--local-epochs", "1"];
    let args = [&args[..], &PATIENT].concat();
    let run = Run::start(dir, "short", Some(address), &args);
    let stderr = run.dir.join("stderr");
    let (result, entries) = run.end();
    let chunks: Vec<u32> = probed(&entries).into_iter().map(|(.., chunk_bytes)| chunk_bytes).collect();
    assert!(possible.contains(&chunks[0]) && chunks == [chunks[0]; 4], "{chunks:?}");
    let told = fs::read_to_string(stderr).unwrap();
    let sentence = format!("chunks are {}KiB instead of 512KiB", chunks[0] >> 10);
    assert_eq!(told.matches(&sentence).count(), usize::from(chunks[0] < 512 << 10), "{told}");
    let (whole, _) = Run::start(dir, "whole", None, &args).end();
    assert_eq!(result["digest"], whole["digest"]);
}

#[test]
fn shorter_chunks_pass_a_mosquitto_with_a_low_limit() {
    let low = [("message_size_limit 1114112", "message_size_limit 100000")];
    let Some(broker) = Outside::start_with(Kind::Mosquitto, &low) else { return };
    carries_shorter_chunks(tempfile::tempdir().unwrap().path(), &broker.address(), &[64 << 10]);
}

/// NATS 2.9 does not hold MQTT to its limit. Whether it does is found out, not assumed.
#[test]
fn chunks_pass_a_nats_with_a_low_limit() {
    let low = [("max_payload: 1114112", "max_payload: 65536")];
    let Some(broker) = Outside::start_with(Kind::Nats, &low) else { return };
    carries_shorter_chunks(tempfile::tempdir().unwrap().path(), &broker.address(), &[32 << 10, 512 << 10]);
}

#[test]
fn shorter_chunks_pass_a_rabbitmq_with_a_low_limit() {
    let low = [("max_message_size = 1114112", "max_message_size = 100000")];
    let Some(broker) = Outside::start_with(Kind::RabbitMq, &low) else { return };
    carries_shorter_chunks(tempfile::tempdir().unwrap().path(), &broker.address(), &[64 << 10]);
}

/// The embedded broker of another federation, whose chunks are shorter.
#[test]
fn shorter_chunks_pass_an_embedded_broker_with_a_low_limit() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let config = BrokerConfig { packet_bytes_max: 192 << 10, ..BrokerConfig::default() };
    let broker = runtime.block_on(Broker::start(config)).unwrap();
    carries_shorter_chunks(tempfile::tempdir().unwrap().path(), &broker.addr().to_string(), &[128 << 10]);
    runtime.block_on(broker.stop());
}

#[test]
fn a_run_whose_model_was_made_with_long_chunks_goes_on_where_only_short_ones_pass() {
    let low = [("message_size_limit 1114112", "message_size_limit 100000")];
    let Some(broker) = Outside::start(Kind::Mosquitto) else { return };
    let Some(narrow) = Outside::start_with(Kind::Mosquitto, &low) else { return };
    let dir = tempfile::tempdir().unwrap();
    let args = ["--hidden", "512,512", "--rounds", "6", "--local-epochs", "4", "--federation", "moves"];
    let brokers = format!("{},{}", broker.address(), narrow.address());
    let run = Run::start(dir.path(), "moves", Some(&brokers), &[&args[..], &PATIENT].concat());
    // Updates are announced, and not all of them pulled.
    run.until("the first update of round 2", |entries| {
        let mut trained = entries.iter().filter(|entry| matches!(entry.event, Event::Trained { round: Round(2), .. }));
        trained.next().map(drop)
    });
    drop(broker);
    let (_, entries) = run.end();
    let (rounds, _) = rounds(&entries);
    assert_eq!(rounds.len(), 6);
    let chunks: BTreeSet<u32> = probed(&entries).into_iter().map(|(.., chunk_bytes)| chunk_bytes).collect();
    assert_eq!(chunks, BTreeSet::from([512 << 10, 64 << 10]));
    nobody_trains_a_round_twice(&entries);
}

fn nobody_trains_a_round_twice(entries: &[Entry]) {
    let mut trained = BTreeSet::new();
    for entry in entries {
        if let Event::Trained { round, .. } = &entry.event {
            assert!(trained.insert((&entry.peer, *round)), "{} trained round {round} twice", entry.peer);
        }
    }
}

#[test]
fn a_broker_that_cannot_do_what_peers_need_is_refused_with_the_setting_to_change() {
    let lacks = [
        ("message_size_limit 1114112", "message_size_limit 10000", "takes no message of", "message_size_limit"),
        ("max_inflight_bytes 0", "max_inflight_bytes 0\nmax_qos 0", "does not carry messages of QoS 1", "max_qos"),
    ];
    let dir = tempfile::tempdir().unwrap();
    for (index, (from, to, sentence, setting)) in lacks.into_iter().enumerate() {
        let Some(broker) = Outside::start_with(Kind::Mosquitto, &[(from, to)]) else { return };
        let address = broker.address();
        let said = Run::start(dir.path(), &format!("lacks-{index}"), Some(&address), &[]).fail();
        assert!(said.contains(&format!("the broker at {address} {sentence}")), "{said}");
        let hint = said.lines().find(|line| line.starts_with("hint:")).unwrap();
        assert!(hint.contains(setting), "{said}");
    }
}

/// Three servers that are one broker.
struct NatsCluster(Vec<Outside>);

impl NatsCluster {
    /// Starts them and waits until each lets peers in; `None` where NATS is not installed.
    fn start() -> Option<Self> {
        let program = match Kind::Nats.program() {
            Some(program) => program,
            // It says that it is not installed.
            None => return Outside::start(Kind::Nats).map(|_| Self(Vec::new())),
        };
        'attempts: for _ in 0..ATTEMPTS {
            let host = own_host();
            let probes = [(); 3].map(|()| TcpListener::bind((host, 0)).unwrap());
            let routes = probes.map(|probe| probe.local_addr().unwrap());
            let mut cluster = Self(Vec::new());
            for index in 0..routes.len() {
                let (dir, address) = (tempfile::tempdir().unwrap(), free_address(own_host()));
                let route = |index: usize| routes[index].to_string();
                let config = example(
                    "nats-cluster.conf",
                    &[
                        ("server_name: $NATS_NAME", &format!("server_name: nats-{}", index + 1)),
                        ("\"/var/lib/nats\"", &format!("{:?}", dir.path())),
                        ("0.0.0.0:6222", &route(index)),
                        ("//nats-1:6222", &format!("//{}", route(0))),
                        ("//nats-2:6222", &format!("//{}", route(1))),
                        ("//nats-3:6222", &format!("//{}", route(2))),
                        ("0.0.0.0:1883", &address.to_string()),
                        ("127.0.0.1:4222", "127.0.0.1:-1"),
                    ],
                );
                let (kind, program, children) = (Kind::Nats, program.clone(), Vec::new());
                let mut server = Outside { kind, program, dir, address, config, children };
                if !server.launch() {
                    eprintln!("{}", server.log());
                    continue 'attempts;
                }
                cluster.0.push(server);
            }
            for server in &cluster.0 {
                wait_until(|| lets_in(&server.address()).then_some(()), || server.log());
            }
            return Some(cluster);
        }
        panic!("the cluster does not start");
    }

    fn addresses(&self) -> String {
        self.0.iter().map(Outside::address).collect::<Vec<_>>().join(",")
    }
}

/// Whether MQTT works at a server: it does once the cluster has agreed on who leads it.
fn lets_in(address: &str) -> bool {
    const CONNECT: &[u8] = b"\x10\x10\x00\x04MQTT\x04\x02\x00\x3c\x00\x04look";
    let mut answer = [0; 4];
    let Ok(mut socket) = TcpStream::connect(address) else { return false };
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket.write_all(CONNECT).is_ok() && socket.read_exact(&mut answer).is_ok() && answer == [0x20, 2, 0, 0]
}

/// Subscriptions at the other two servers take some seconds then: nobody is to seem silent meanwhile.
const VERY_PATIENT: [&str; 2] = ["--election-timeout", "60s"];

/// One server is killed while peers train: the one that all of them use, or one of the others.
fn a_nats_cluster_survives_the_death_of_server(index: usize) {
    let Some(mut cluster) = NatsCluster::start() else { return };
    let dir = tempfile::tempdir().unwrap();
    let args = ["--hidden", "512,512", "--rounds", "100000", "--local-epochs", "2"];
    let args = [&args[..], &VERY_PATIENT].concat();
    let run = Run::start(dir.path(), "cluster", Some(&cluster.addresses()), &args);
    run.until("the first round", |entries| commits(entries).next().map(drop));
    cluster.0[index].kill();
    nobody_trains_a_round_twice(&goes_on(run));
}

#[test]
fn a_nats_cluster_survives_the_death_of_the_server_that_peers_use() {
    a_nats_cluster_survives_the_death_of_server(0);
}

#[test]
fn a_nats_cluster_survives_the_death_of_a_server_that_no_peer_uses() {
    a_nats_cluster_survives_the_death_of_server(2);
}
