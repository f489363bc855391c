//! The program under faults, with real processes: no single failure stops a run.
//!
//! Each scenario starts `rodizio run --processes`, follows its log of events until the moment to strike, and kills,
//! stops or starts one of its processes. Then the run must end as if nothing had happened: see [`Federation::conclude`].
//!
//! `cargo test` runs most scenarios once. `make chaos` runs each one `TRIALS` times, with other seeds and so with other
//! leaders, and prints how long recovery took.

#![cfg(unix)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rodizio::events::{Entry, Event, RoundCommitted};
use rodizio::journal::{Journal, JournalError};
use rodizio::types::{Digest, PeerId, Round};
use tempfile::TempDir;

/// What is waited for comes within this, or never.
const LIMIT: Duration = Duration::from_secs(60);

/// How often the log of events is read.
const POLL: Duration = Duration::from_millis(2);

/// A failure strikes in this round: the federation is under way, and goes on after it.
const STRUCK: Round = Round(2);

const PEERS: usize = 4;

/// Scenarios measure time and need the machine: one at a time, whatever the number of test threads.
static MACHINE: Mutex<()> = Mutex::new(());

/// A process of this test: the run itself, or a peer that joins it.
struct Program {
    child: Child,
    /// Where its stdout and stderr go.
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Program {
    fn start(dir: &Path, name: &str, args: &[String]) -> Self {
        let (stdout, stderr) = (dir.join(format!("{name}.stdout")), dir.join(format!("{name}.stderr")));
        let mut command = Command::new(env!("CARGO_BIN_EXE_rodizio"));
        command.args(args).current_dir(dir).env_clear().stdin(Stdio::null());
        command.stdout(File::create(&stdout).unwrap()).stderr(File::create(&stderr).unwrap());
        Self { child: command.spawn().unwrap(), stdout, stderr }
    }

    fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }
}

/// A log of events, read as it grows.
struct Log {
    path: PathBuf,
    read: u64,
}

impl Log {
    /// The entries that were added since the last call. The last line counts once its end is there.
    fn news(&mut self) -> Vec<Entry> {
        let Ok(mut file) = File::open(&self.path) else { return Vec::new() };
        let mut text = String::new();
        file.seek(SeekFrom::Start(self.read)).unwrap();
        file.read_to_string(&mut text).unwrap();
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        self.read += whole as u64;
        text[..whole].lines().map(|line| Entry::from_line(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
    }
}

/// A run under test, with the peers that join it from outside.
struct Federation {
    dir: TempDir,
    seed: u64,
    rounds: u64,
    args: Vec<String>,
    run: Program,
    joined: Vec<Program>,
    logs: Vec<Log>,
    entries: Vec<Entry>,
    /// The running process of each peer.
    pids: BTreeMap<PeerId, u32>,
    _machine: MutexGuard<'static, ()>,
}

impl Federation {
    fn start(seed: u64, rounds: u64, more: &[&str]) -> Self {
        // A scenario that failed has left nothing behind that the next could trip over.
        let machine = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = tempfile::tempdir().unwrap();
        let own = [
            ("peers", PEERS.to_string()),
            ("rounds", rounds.to_string()),
            ("seed", seed.to_string()),
            ("run-dir", "run".into()),
        ];
        let mut args: Vec<String> = vec!["run".into(), "--processes".into(), "--json".into()];
        args.extend(own.into_iter().flat_map(|(key, value)| [format!("--{key}"), value]));
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        let run = Program::start(dir.path(), "run", &args);
        let logs = vec![Log { path: dir.path().join("run/events.jsonl"), read: 0 }];
        let (joined, entries, pids) = (Vec::new(), Vec::new(), BTreeMap::new());
        Self { dir, seed, rounds, args, run, joined, logs, entries, pids, _machine: machine }
    }

    /// Starts the same run again, in the directory of the one that died. Returns when.
    fn restart(&mut self) -> SystemTime {
        let now = SystemTime::now();
        self.run = Program::start(self.dir.path(), "run-again", &self.args);
        now
    }

    /// Starts `rodizio join` for a peer with this part of the data and this state directory.
    fn join(&mut self, peer: &PeerId, part: usize, state_dir: &Path) {
        let broker = self.entries.iter().rev().find_map(|entry| match &entry.event {
            Event::Connected { broker } => Some(broker.clone()),
            _ => None,
        });
        let own = [
            ("config", "run/config.toml".into()),
            ("broker", broker.expect("peers are connected before anyone strikes")),
            ("peer", peer.to_string()),
            ("part", format!("{part}/{PEERS}")),
            ("state-dir", state_dir.to_str().unwrap().into()),
            ("run-dir", format!("run-of-{peer}")),
        ];
        let args: Vec<String> = own.into_iter().flat_map(|(key, value)| [format!("--{key}"), value]).collect();
        let args = [vec!["join".to_owned(), "--json".to_owned()], args].concat();
        self.joined.push(Program::start(self.dir.path(), &format!("join-{peer}"), &args));
        self.logs.push(Log { path: self.dir.path().join(format!("run-of-{peer}/events.jsonl")), read: 0 });
    }

    fn hear(&mut self) {
        for entry in self.logs.iter_mut().flat_map(Log::news) {
            if let Event::Started { pid, .. } = entry.event {
                self.pids.insert(entry.peer.clone(), pid);
            }
            self.entries.push(entry);
        }
    }

    /// How many entries were heard so far.
    fn mark(&self) -> usize {
        self.entries.len()
    }

    /// The first entry after `mark` that is `wanted`, waited for.
    fn until(&mut self, what: &str, mark: usize, wanted: impl Fn(&Entry) -> bool) -> Entry {
        let since = Instant::now();
        loop {
            // Whether it has ended is asked first: what it wrote before its end is then heard.
            let ended = self.run.has_ended();
            self.hear();
            if let Some(found) = self.entries[mark..].iter().find(|entry| wanted(entry)) {
                return found.clone();
            }
            assert!(!ended, "seed {}: the run ended before {what}", self.seed);
            assert!(since.elapsed() < LIMIT, "seed {}: no {what} in {LIMIT:?}", self.seed);
            thread::sleep(POLL);
        }
    }

    /// The leader of the struck round, of its highest term so far.
    fn leader(&self) -> PeerId {
        let elected = self.entries.iter().filter_map(|entry| match &entry.event {
            Event::Elected { round: STRUCK, term, leader } => Some((*term, leader.clone())),
            _ => None,
        });
        elected.max().expect("a leader was elected before anyone strikes").1
    }

    fn pid(&self, peer: &PeerId) -> u32 {
        *self.pids.get(peer).unwrap_or_else(|| panic!("{peer} has no process"))
    }

    /// Returns when.
    fn kill(&mut self, peer: &PeerId) -> SystemTime {
        let now = SystemTime::now();
        signal("KILL", &[self.pid(peer)]);
        self.pids.remove(peer);
        now
    }

    /// Kills every process of the run at once, and waits until they are dead.
    fn kill_all(&mut self) {
        let children: Vec<u32> = std::mem::take(&mut self.pids).into_values().collect();
        signal("KILL", &[&[self.run.child.id()], &children[..]].concat());
        self.run.child.wait().unwrap();
        let since = Instant::now();
        while self.peers().iter().any(|peer| self.is_in_use(peer)) {
            assert!(since.elapsed() < LIMIT, "seed {}: a peer survives SIGKILL", self.seed);
            thread::sleep(POLL);
        }
    }

    /// Whether a process holds the state directory of this peer.
    fn is_in_use(&self, peer: &PeerId) -> bool {
        matches!(Journal::open(&self.state_dir(peer), "default", Some(peer)), Err(JournalError::InUse { .. }))
    }

    fn state_dir(&self, peer: &PeerId) -> PathBuf {
        self.dir.path().join("run/peers").join(peer.as_str())
    }

    fn peers(&self) -> Vec<PeerId> {
        (1..=PEERS).map(|number| PeerId::new(&format!("peer-{number}")).unwrap()).collect()
    }

    fn committed(&self) -> impl Iterator<Item = (&Entry, &RoundCommitted)> {
        self.entries.iter().filter_map(|entry| match &entry.event {
            Event::RoundCommitted(committed) => Some((entry, &**committed)),
            _ => None,
        })
    }

    /// Waits for the end, and holds it to what must be true whatever happened. `lost` are gone for good.
    fn conclude(&mut self, lost: &[&PeerId]) {
        let seed = self.seed;
        let since = Instant::now();
        while !self.run.has_ended() || self.joined.iter_mut().any(|peer| !peer.has_ended()) {
            assert!(since.elapsed() < LIMIT, "seed {seed}: it does not end");
            thread::sleep(POLL);
        }
        self.hear();
        for program in std::iter::once(&mut self.run).chain(&mut self.joined) {
            assert_eq!(program.child.wait().unwrap().code(), Some(0), "seed {seed}: {}", program.stderr.display());
        }
        let last = self.check_rounds();
        self.check_ends(last, lost);
        self.check_trained_once();
    }

    /// Every round was committed, each with one decree and one model. Returns the last.
    fn check_rounds(&self) -> Digest {
        let seed = self.seed;
        let mut decided: BTreeMap<Round, BTreeSet<(Digest, Digest)>> = BTreeMap::new();
        let mut heads: BTreeMap<&PeerId, Round> = BTreeMap::new();
        for (entry, committed) in self.committed() {
            decided.entry(committed.round).or_default().insert((committed.digest, committed.decree));
            let before = heads.insert(&entry.peer, committed.round);
            assert!(before < Some(committed.round), "seed {seed}: the head of {} goes back", entry.peer);
        }
        let rounds: Vec<Round> = decided.keys().copied().collect();
        assert_eq!(rounds, (1..=self.rounds).map(Round).collect::<Vec<_>>(), "seed {seed}");
        for (round, decrees) in &decided {
            assert_eq!(decrees.len(), 1, "seed {seed}: round {round} was decided more than once: {decrees:?}");
        }
        decided[&Round(self.rounds)].first().expect("a committed round has a digest").0
    }

    /// Whoever was not lost has finished with the last model, and so says the run.
    fn check_ends(&self, last: Digest, lost: &[&PeerId]) {
        let seed = self.seed;
        let ends: BTreeMap<&PeerId, (Round, Digest)> = self
            .entries
            .iter()
            .filter_map(|entry| match &entry.event {
                Event::Finished { rounds, digest, .. } => Some((&entry.peer, (*rounds, *digest))),
                _ => None,
            })
            .collect();
        for (peer, end) in &ends {
            assert_eq!(*end, (Round(self.rounds), last), "seed {seed}: {peer}");
        }
        for peer in self.entries.iter().map(|entry| &entry.peer).filter(|peer| !lost.contains(peer)) {
            assert!(ends.contains_key(peer), "seed {seed}: {peer} has not finished");
        }
        for program in std::iter::once(&self.run).chain(&self.joined) {
            let text = std::fs::read_to_string(&program.stdout).unwrap();
            let result: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(result["digest"], last.to_string(), "seed {seed}");
            assert_eq!(result["rounds"], self.rounds, "seed {seed}");
        }
    }

    /// An update is durable before it is told of: not even a peer that was killed trains twice.
    fn check_trained_once(&self) {
        let mut trained = BTreeSet::new();
        for entry in &self.entries {
            if let Event::Trained { round, .. } = entry.event {
                assert!(
                    trained.insert((&entry.peer, round)),
                    "seed {}: {} trained twice in round {round}",
                    self.seed,
                    entry.peer
                );
            }
        }
    }

    /// Whether `peer` led a round after `round`, or its update is in the round's model.
    fn took_part_after(&self, peer: &PeerId, round: Round) -> bool {
        let later = self.committed().filter(|(_, committed)| committed.round > round);
        later.into_iter().any(|(_, committed)| committed.leader == *peer || committed.contributors.contains(peer))
    }

    /// How long a round takes that nothing disturbs: the one before the struck one.
    fn calm_round(&self) -> Duration {
        let first = self.committed().find(|(_, committed)| committed.round < STRUCK);
        Duration::from_secs_f64(first.expect("it was committed").1.seconds.total)
    }

    /// When the struck round went on after `leader` failed: the next leader's election, and the commit. Nothing if the
    /// round had been decided before.
    fn recovery(&self, leader: &PeerId, failed: SystemTime) -> BTreeMap<&'static str, Duration> {
        let after = |entry: Option<&Entry>| entry.and_then(|entry| entry.time.duration_since(failed).ok());
        let elected = self.entries.iter().find(|entry| {
            matches!(&entry.event, Event::Elected { round: STRUCK, leader: next, .. } if next != leader)
                && entry.time >= failed
        });
        let committed = self.committed().find(|(_, committed)| committed.round == STRUCK);
        let Some(elected) = after(elected) else { return BTreeMap::new() };
        let committed = after(committed.map(|(entry, _)| entry)).map(|committed| (COMMITTED, committed));
        [(ELECTED, elected), (CALM, self.calm_round())].into_iter().chain(committed).collect()
    }
}

impl Drop for Federation {
    /// Kills what still runs. A failure keeps its files, which are the evidence.
    fn drop(&mut self) {
        if !self.run.has_ended() {
            // A peer that is stopped does not see that its parent ends.
            let pids: Vec<u32> = self.pids.values().copied().collect();
            let killed = Command::new("kill").arg("-KILL").args(pids.iter().map(u32::to_string)).output();
            drop(killed);
        }
        for program in std::iter::once(&mut self.run).chain(&mut self.joined) {
            // An error says that it has ended.
            let _ = program.child.kill();
            let _ = program.child.wait();
        }
        if thread::panicking() {
            self.dir.disable_cleanup(true);
            eprintln!("seed {}: the files are in {}", self.seed, self.dir.path().display());
            eprintln!("{}", std::fs::read_to_string(&self.run.stderr).unwrap_or_default());
        }
    }
}

/// Sends a signal to processes that run.
fn signal(name: &str, pids: &[u32]) {
    let sent = Command::new("kill").arg(format!("-{name}")).args(pids.iter().map(u32::to_string)).status().unwrap();
    assert!(sent.success(), "no process {pids:?}");
}

/// What is measured, by name.
type Figures = BTreeMap<&'static str, Duration>;

const ELECTED: &str = "next elected";
const COMMITTED: &str = "round committed";
const CALM: &str = "(a calm round)";
const BACK: &str = "member by its own word";

/// Training that lasts long enough to strike in its middle.
const LONG_TRAINING: [&str; 2] = ["--local-epochs", "200"];

/// When its leader dies, in the struck round.
#[derive(Clone, Copy)]
enum Stage {
    Electing,
    Gathering,
    Broadcasting,
}

impl Stage {
    fn begins_with(self, event: &Event) -> bool {
        match self {
            Stage::Electing => matches!(event, Event::Elected { round: STRUCK, .. }),
            Stage::Gathering => matches!(event, Event::Trained { round: STRUCK, .. }),
            Stage::Broadcasting => matches!(event, Event::Proposed { round: STRUCK, .. }),
        }
    }

    fn settings(self) -> &'static [&'static str] {
        match self {
            Stage::Electing | Stage::Gathering => &LONG_TRAINING,
            // A model that takes a while to send, in many chunks.
            Stage::Broadcasting => &["--local-epochs", "2", "--hidden", "8192", "--chunk-bytes", "16KiB"],
        }
    }
}

fn leader_dies(stage: Stage, seed: u64) -> Figures {
    let mut federation = Federation::start(seed, 4, stage.settings());
    // On a busy machine a trainer may be done before a quorum of ballots is in.
    federation.until("a leader", 0, |entry| Stage::Electing.begins_with(&entry.event));
    federation.until("the stage", 0, |entry| stage.begins_with(&entry.event));
    let leader = federation.leader();
    let killed = federation.kill(&leader);
    federation.conclude(&[&leader]);
    federation.recovery(&leader, killed)
}

fn leader_dies_while_electing(seed: u64) -> Figures {
    leader_dies(Stage::Electing, seed)
}

fn leader_dies_while_gathering(seed: u64) -> Figures {
    leader_dies(Stage::Gathering, seed)
}

fn leader_dies_while_broadcasting(seed: u64) -> Figures {
    leader_dies(Stage::Broadcasting, seed)
}

fn trainer_dies_while_training(seed: u64) -> Figures {
    let mut federation = Federation::start(seed, 4, &LONG_TRAINING);
    federation.until("a leader", 0, |entry| Stage::Electing.begins_with(&entry.event));
    let leader = federation.leader();
    // Training begins as soon as the parent model is measured.
    let measured = |entry: &Entry| matches!(&entry.event, Event::Measured { round, .. } if round.next() == STRUCK);
    let trainer = federation.until("a trainer", 0, |entry| entry.peer != leader && measured(entry)).peer;
    federation.kill(&trainer);
    federation.conclude(&[&trainer]);
    assert!(!federation.took_part_after(&trainer, STRUCK), "seed {seed}: the dead are not waited for");
    Figures::new()
}

fn trainer_dies_after_its_update(seed: u64) -> Figures {
    let mut federation = Federation::start(seed, 4, &LONG_TRAINING);
    let trainer = federation.until("an update", 0, |entry| Stage::Gathering.begins_with(&entry.event)).peer;
    federation.kill(&trainer);
    federation.conclude(&[&trainer]);
    assert!(!federation.took_part_after(&trainer, STRUCK), "seed {seed}: the dead are not waited for");
    Figures::new()
}

fn leader_freezes(seed: u64) -> Figures {
    let settings = [&LONG_TRAINING[..], &["--election-timeout", "500ms"]].concat();
    let mut federation = Federation::start(seed, 6, &settings);
    federation.until("a leader", 0, |entry| Stage::Electing.begins_with(&entry.event));
    let leader = federation.leader();
    let frozen = SystemTime::now();
    signal("STOP", &[federation.pid(&leader)]);
    federation.until(
        "the next leader",
        0,
        |entry| matches!(&entry.event, Event::Elected { round: STRUCK, leader: next, .. } if *next != leader),
    );
    signal("CONT", &[federation.pid(&leader)]);
    federation.conclude(&[]);
    assert!(federation.took_part_after(&leader, STRUCK), "seed {seed}: {leader} stays out");
    federation.recovery(&leader, frozen)
}

fn leader_sleeps_through_a_round(seed: u64) -> Figures {
    let settings = [&LONG_TRAINING[..], &["--election-timeout", "500ms"]].concat();
    let mut federation = Federation::start(seed, 7, &settings);
    federation.until("a leader", 0, |entry| Stage::Electing.begins_with(&entry.event));
    let leader = federation.leader();
    let frozen = SystemTime::now();
    signal("STOP", &[federation.pid(&leader)]);
    federation.until(
        "the round's end",
        0,
        |entry| matches!(&entry.event, Event::RoundCommitted(committed) if committed.round == STRUCK),
    );
    signal("CONT", &[federation.pid(&leader)]);
    federation.conclude(&[]);
    assert!(federation.took_part_after(&leader, STRUCK.next()), "seed {seed}: {leader} stays out");
    federation.recovery(&leader, frozen)
}

fn everything_dies(seed: u64) -> Figures {
    let mut federation = Federation::start(seed, 4, &LONG_TRAINING);
    federation.until("an update", 0, |entry| Stage::Gathering.begins_with(&entry.event));
    federation.kill_all();
    federation.hear();
    let mark = federation.mark();
    let restarted = federation.restart();
    let next = federation.until("the next commit", mark, |entry| matches!(&entry.event, Event::RoundCommitted(_)));
    federation.conclude(&[]);
    let taken = next.time.duration_since(restarted).unwrap_or_default();
    Figures::from([(COMMITTED, taken), (CALM, federation.calm_round())])
}

fn killed_peer_comes_back(seed: u64) -> Figures {
    let mut federation = Federation::start(seed, 8, &LONG_TRAINING);
    let peer = federation.until("an update", 0, |entry| Stage::Gathering.begins_with(&entry.event)).peer;
    let mark = federation.mark();
    federation.kill(&peer);
    federation.until("its last will", mark, |entry| matches!(&entry.event, Event::Left { who } if *who == peer));
    let number = 1 + federation.peers().iter().position(|other| *other == peer).unwrap();
    let (mark, state_dir, restarted) = (federation.mark(), federation.state_dir(&peer), SystemTime::now());
    federation.join(&peer, number, &state_dir);
    let member = federation.until("it among the members", mark, |entry| {
        entry.peer == peer && matches!(entry.event, Event::RoundStarted { member: true, .. })
    });
    federation.conclude(&[]);
    assert!(federation.took_part_after(&peer, STRUCK), "seed {seed}: {peer} stays out");
    Figures::from([(BACK, member.time.duration_since(restarted).unwrap_or_default()), (CALM, federation.calm_round())])
}

fn newcomer_joins_in_the_middle_of_a_round(seed: u64) -> Figures {
    let mut federation = Federation::start(seed, 8, &LONG_TRAINING);
    federation.until("an update", 0, |entry| Stage::Gathering.begins_with(&entry.event));
    let (late, state_dir) = (PeerId::new("late").unwrap(), federation.dir.path().join("late"));
    let joins = SystemTime::now();
    federation.join(&late, 1, &state_dir);
    let member = federation.until("it among the members", 0, |entry| {
        entry.peer == late && matches!(entry.event, Event::RoundStarted { member: true, .. })
    });
    federation.conclude(&[]);
    assert!(federation.took_part_after(&late, STRUCK), "seed {seed}: it stays out");
    Figures::from([(BACK, member.time.duration_since(joins).unwrap_or_default()), (CALM, federation.calm_round())])
}

fn peer_leaves_with_ctrl_c(seed: u64) -> Figures {
    let mut federation = Federation::start(seed, 4, &LONG_TRAINING);
    let peer = federation.until("an update", 0, |entry| Stage::Gathering.begins_with(&entry.event)).peer;
    signal("INT", &[federation.pid(&peer)]);
    federation.until("its goodbye", 0, |entry| matches!(&entry.event, Event::Left { who } if *who == peer));
    federation.pids.remove(&peer);
    federation.conclude(&[&peer]);
    let said = |entry: &Entry| entry.peer == peer && entry.event == Event::Interrupted;
    assert!(federation.entries.iter().any(said), "seed {seed}: {peer} does not say that it was interrupted");
    Figures::new()
}

/// Every scenario, as a function of the seed, and what happens in it.
/// A scenario by seed.
type Scenario = fn(u64) -> Figures;

const SCENARIOS: [(&str, Scenario); 11] = [
    ("leader killed while electing", leader_dies_while_electing),
    ("leader killed while gathering", leader_dies_while_gathering),
    ("leader killed while broadcasting", leader_dies_while_broadcasting),
    ("leader frozen, 500 ms election timeout", leader_freezes),
    ("leader frozen for a whole round", leader_sleeps_through_a_round),
    ("trainer killed while training", trainer_dies_while_training),
    ("trainer killed after its update", trainer_dies_after_its_update),
    ("everything killed, and started again", everything_dies),
    ("peer killed, and started again", killed_peer_comes_back),
    ("newcomer in the middle of a round", newcomer_joins_in_the_middle_of_a_round),
    ("peer leaves with Ctrl-C", peer_leaves_with_ctrl_c),
];

#[test]
#[ignore = "`make chaos` runs it"]
fn a_leader_that_is_killed_while_electing_is_replaced() {
    leader_dies_while_electing(1);
}

#[test]
fn a_leader_that_is_killed_while_gathering_is_replaced() {
    leader_dies_while_gathering(2);
}

#[test]
fn a_leader_that_is_killed_while_broadcasting_is_replaced() {
    leader_dies_while_broadcasting(3);
}

#[test]
#[ignore = "`make chaos` runs it"]
fn a_trainer_that_is_killed_while_training_is_not_waited_for() {
    trainer_dies_while_training(4);
}

#[test]
fn a_trainer_that_is_killed_after_its_update_is_not_waited_for() {
    trainer_dies_after_its_update(5);
}

#[test]
fn a_leader_that_freezes_is_fenced_out_and_takes_part_again() {
    leader_freezes(6);
}

#[test]
#[ignore = "`make chaos` runs it"]
fn a_leader_that_sleeps_through_its_round_learns_the_decree_and_takes_part_again() {
    leader_sleeps_through_a_round(7);
}

#[test]
fn a_run_that_is_killed_whole_goes_on_when_it_is_started_again() {
    everything_dies(8);
}

#[test]
fn a_peer_that_is_killed_comes_back_with_its_state_directory() {
    killed_peer_comes_back(9);
}

#[test]
#[ignore = "`make chaos` runs it"]
fn a_peer_that_joins_in_the_middle_of_a_round_takes_part_later() {
    newcomer_joins_in_the_middle_of_a_round(10);
}

#[test]
fn a_peer_that_leaves_with_ctrl_c_is_not_waited_for() {
    peer_leaves_with_ctrl_c(11);
}

#[test]
#[ignore = "takes minutes: `make chaos` runs every scenario many times and prints the medians"]
fn every_scenario_holds_for_many_seeds() {
    let trials: u64 = std::env::var("TRIALS").map_or(10, |text| text.parse().expect("TRIALS is a number"));
    println!("{:<40} {:<20} {:>7} {:>9} {:>9}", "scenario", "until", "trials", "median", "longest");
    for (number, (name, scenario)) in (1..).zip(SCENARIOS) {
        let mut measured: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
        for trial in 0..trials {
            for (what, took) in scenario(1000 * number + trial) {
                measured.entry(what).or_default().push(took);
            }
        }
        if measured.is_empty() {
            println!("{name:<40} {:<20} {trials:>7}", "(it ends well)");
        }
        for (what, took) in &mut measured {
            took.sort_unstable();
            let (median, longest) = (took[took.len() / 2].as_millis(), took[took.len() - 1].as_millis());
            println!("{name:<40} {what:<20} {:>7} {median:>6} ms {longest:>6} ms", took.len());
        }
    }
}
