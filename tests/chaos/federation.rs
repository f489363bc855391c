//! A federation under test: its processes, what they tell, and what must be true at its end whatever happened.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use crate::log;
use rodizio::events::{Entry, Event, RoundCommitted};
use rodizio::journal::{Journal, JournalError};
use rodizio::protocol::Durable;
use rodizio::types::{Digest, PeerId, Round, Term};
use tempfile::TempDir;

use crate::network::Network;
use crate::processes::{End, Program, Surroundings};
use crate::signals::{kill, signal};
use crate::stage::has_part_in;

/// What is waited for comes within this, or never.
const LIMIT: Duration = Duration::from_secs(600);

/// How often the log of events is read.
const POLL: Duration = Duration::from_millis(2);

/// A failure strikes in this round: the federation is under way, and goes on after it.
pub(crate) const STRUCK: Round = Round(2);

pub(crate) const PEERS: usize = 4;

/// What is measured, by name.
pub(crate) type Figures = BTreeMap<&'static str, Duration>;

pub(crate) const ELECTED: &str = "next leader elected";
pub(crate) const COMMITTED: &str = "round committed";
pub(crate) const CALM: &str = "(a calm round takes)";
pub(crate) const STANDBY: &str = "all peers on the standby";
pub(crate) const PART: &str = "it has a part in a round";

/// Scenarios measure time and need the machine: one at a time, whatever the number of test threads.
static MACHINE: Mutex<()> = Mutex::new(());

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
        let (entries, whole) = log::entries(&text);
        self.read += whole as u64;
        entries
    }
}

/// How a peer joins, beside what all peers share.
#[derive(Clone, Debug, Default)]
pub(crate) struct Joining {
    /// Brokers, the best first.
    pub(crate) brokers: Vec<String>,
    /// Where it carries a broker of its own.
    pub(crate) listen: Option<String>,
    pub(crate) surroundings: Surroundings,
}

/// The processes of one federation, and all that their peers told so far.
pub(crate) struct Federation {
    dir: TempDir,
    pub(crate) seed: u64,
    rounds: u64,
    /// Flags that every peer gets.
    shared: Vec<String>,
    programs: Vec<Program>,
    logs: Vec<Log>,
    pub(crate) entries: Vec<Entry>,
    /// The running process of each peer.
    pids: BTreeMap<PeerId, u32>,
    /// Dropped after the processes that use it have ended.
    pub(crate) network: Option<Network>,
    _machine: MutexGuard<'static, ()>,
}

/// Where a peer keeps its blobs.
pub(crate) struct BlobFiles(PathBuf);

impl BlobFiles {
    /// Whether this one is there, be it flushed or not.
    pub(crate) fn has(&self, blob: Digest) -> bool {
        self.has_durable(blob) || self.0.join(format!("{blob}.unflushed")).exists()
    }

    /// Whether this one is there, and would survive a loss of power.
    fn has_durable(&self, blob: Digest) -> bool {
        self.0.join(format!("{blob}.blob")).exists()
    }
}

impl Federation {
    /// A federation without any process yet.
    pub(crate) fn new(seed: u64, rounds: u64, settings: &[&str]) -> Self {
        // A scenario that failed has left nothing behind that the next could trip over.
        let machine = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = tempfile::tempdir().unwrap();
        let own = [("rounds", rounds), ("seed", seed), ("min-peers", PEERS as u64)];
        let mut shared: Vec<String> = vec!["--json".into()];
        shared.extend(own.into_iter().flat_map(|(key, value)| [format!("--{key}"), value.to_string()]));
        shared.extend(settings.iter().map(|arg| (*arg).to_owned()));
        let (programs, logs, entries, pids) = (Vec::new(), Vec::new(), Vec::new(), BTreeMap::new());
        Self { dir, seed, rounds, shared, programs, logs, entries, pids, network: None, _machine: machine }
    }

    /// A federation that one command started: `rodizio run --processes`.
    pub(crate) fn start(seed: u64, rounds: u64, settings: &[&str]) -> Self {
        Self::start_in(seed, rounds, settings, &Surroundings::default())
    }

    /// The same, in other surroundings.
    pub(crate) fn start_in(seed: u64, rounds: u64, settings: &[&str], surroundings: &Surroundings) -> Self {
        let mut federation = Self::new(seed, rounds, settings);
        federation.run("run", surroundings);
        federation.logs.push(Log { path: federation.dir.path().join("run/events.jsonl"), read: 0 });
        federation
    }

    fn run(&mut self, name: &str, surroundings: &Surroundings) {
        let own = ["run", "--processes", "--peers", &PEERS.to_string(), "--run-dir", "run"].map(str::to_owned);
        let args = [&own[..], &self.shared].concat();
        self.programs.push(Program::start(self.dir.path(), name, &args, surroundings));
    }

    /// Starts the same run again, in the directory of the one that died. Returns when.
    pub(crate) fn restart(&mut self) -> SystemTime {
        let now = SystemTime::now();
        self.run("run-again", &Surroundings::default());
        now
    }

    /// Starts `rodizio broker`. Returns it with its address.
    pub(crate) fn broker(&mut self, name: &str, listen: &str, surroundings: &Surroundings) -> (u32, String) {
        let args = ["broker", "--listen", listen].map(str::to_owned);
        let mut broker = Program::start(self.dir.path(), name, &args, surroundings);
        broker.end = End::Any;
        let (pid, stdout) = (broker.child.id(), broker.stdout.clone());
        self.programs.push(broker);
        let since = Instant::now();
        loop {
            let text = std::fs::read_to_string(&stdout).unwrap();
            if let Some(addr) = text.strip_suffix('\n').and_then(|line| line.strip_prefix("broker listens on ")) {
                return (pid, addr.to_owned());
            }
            assert!(since.elapsed() < LIMIT, "seed {}: no broker in {LIMIT:?}", self.seed);
            thread::sleep(POLL);
        }
    }

    /// Starts `rodizio join` for a peer with this part of the data: for the first time, or again.
    pub(crate) fn join(&mut self, peer: &PeerId, part: usize, joining: &Joining) {
        let own = [
            ("broker", joining.brokers.join(",")),
            ("peer", peer.to_string()),
            ("part", format!("{part}/{PEERS}")),
            ("state-dir", self.state_dir(peer).to_str().unwrap().into()),
            ("run-dir", format!("run-of-{peer}")),
        ];
        let mut args = [vec!["join".to_owned()], self.shared.clone()].concat();
        args.extend(own.into_iter().flat_map(|(key, value)| [format!("--{key}"), value]));
        args.extend(joining.listen.iter().flat_map(|listen| ["--host-broker", "--listen", listen]).map(str::to_owned));
        let name = format!("join-{}-{peer}", self.programs.len());
        let program = Program::start(self.dir.path(), &name, &args, &joining.surroundings);
        self.programs.push(Program { peer: Some(peer.clone()), ..program });
        let path = self.dir.path().join(format!("run-of-{peer}/events.jsonl"));
        if self.logs.iter().all(|log| log.path != path) {
            self.logs.push(Log { path, read: 0 });
        }
    }

    /// Where the peers are connected, as far as they have told.
    pub(crate) fn meeting_at(&self) -> Joining {
        let broker = self.entries.iter().rev().find_map(|entry| match &entry.event {
            Event::Connected { broker } => Some(broker.clone()),
            _ => None,
        });
        let brokers = vec![broker.expect("peers are connected before anyone strikes")];
        Joining { brokers, ..Joining::default() }
    }

    pub(crate) fn hear(&mut self) {
        for entry in self.logs.iter_mut().flat_map(Log::news) {
            if let Event::Started { pid, .. } = entry.event {
                self.pids.insert(entry.peer.clone(), pid);
            }
            self.entries.push(entry);
        }
    }

    /// How many entries were heard so far.
    pub(crate) fn mark(&self) -> usize {
        self.entries.len()
    }

    /// The first entry after `mark` that is `wanted`, waited for.
    pub(crate) fn until(&mut self, what: &str, mark: usize, wanted: impl Fn(&Entry) -> bool) -> Entry {
        self.until_all(what, |entries| entries.iter().skip(mark).find(|entry| wanted(entry)).cloned())
    }

    /// Waits until the entries heard so far say what is `wanted`.
    pub(crate) fn until_all<T>(&mut self, what: &str, wanted: impl Fn(&[Entry]) -> Option<T>) -> T {
        let since = Instant::now();
        loop {
            // Whether they have ended is asked first: what they wrote before their end is then heard.
            let ended = self.programs.iter_mut().all(Program::has_ended);
            self.hear();
            if let Some(found) = wanted(&self.entries) {
                return found;
            }
            assert!(!ended, "seed {}: the federation ended before {what}", self.seed);
            assert!(since.elapsed() < LIMIT, "seed {}: no {what} in {LIMIT:?}", self.seed);
            thread::sleep(POLL);
        }
    }

    pub(crate) fn pid(&self, peer: &PeerId) -> u32 {
        *self.pids.get(peer).unwrap_or_else(|| panic!("{peer} has no process"))
    }

    /// The process of `peer` has ended, or is about to, in this way.
    pub(crate) fn expect_end(&mut self, peer: &PeerId, end: End) {
        self.pids.remove(peer);
        if let Some(program) = self.programs.iter_mut().rev().find(|program| program.peer.as_ref() == Some(peer)) {
            program.end = end;
        }
    }

    /// Kills a peer. Returns when.
    pub(crate) fn kill(&mut self, peer: &PeerId) -> SystemTime {
        let now = SystemTime::now();
        signal("KILL", &[self.pid(peer)]);
        self.expect_end(peer, End::Any);
        now
    }

    /// Kills every process of the run at once, and waits until they are dead.
    pub(crate) fn kill_all(&mut self) {
        let children: Vec<u32> = std::mem::take(&mut self.pids).into_values().collect();
        let run = &mut self.programs[0];
        // The children first: they end by themselves when the run does, and are then no processes to send a signal to.
        signal("KILL", &[&children[..], &[run.child.id()]].concat());
        run.end = End::Any;
        run.child.wait().unwrap();
        for peer in peers() {
            self.wait_for_release(&peer);
        }
    }

    /// Waits until no process holds the state directory of `peer` any more.
    pub(crate) fn wait_for_release(&self, peer: &PeerId) {
        let since = Instant::now();
        let is_in_use = || matches!(self.journal(peer), Err(JournalError::InUse { .. }));
        while is_in_use() {
            assert!(since.elapsed() < LIMIT, "seed {}: the process of {peer} does not end", self.seed);
            thread::sleep(POLL);
        }
    }

    fn journal(&self, peer: &PeerId) -> Result<Durable, JournalError> {
        let (_, loaded) = Journal::open(&self.state_dir(peer), "default", Some(peer))?;
        let state = loaded.state.unwrap_or_else(|| panic!("seed {}: {peer} has kept nothing", self.seed));
        Ok(Durable::decode(&state).unwrap_or_else(|| panic!("seed {}: the promises of {peer}", self.seed)))
    }

    /// The blobs in the state directory of `peer`.
    pub(crate) fn blobs(&self, peer: &PeerId) -> BlobFiles {
        BlobFiles(self.state_dir(peer).join("blobs"))
    }

    fn state_dir(&self, peer: &PeerId) -> PathBuf {
        self.dir.path().join("run/peers").join(peer.as_str())
    }

    pub(crate) fn committed(&self) -> impl Iterator<Item = (&Entry, &RoundCommitted)> {
        self.entries.iter().filter_map(|entry| match &entry.event {
            Event::RoundCommitted(committed) => Some((entry, &**committed)),
            _ => None,
        })
    }

    /// Waits for the end, and holds it to what must be true whatever happened. `lost` are gone for good.
    pub(crate) fn conclude(&mut self, lost: &[&PeerId]) {
        let seed = self.seed;
        let since = Instant::now();
        while self.programs.iter_mut().any(|program| program.end != End::Any && !program.has_ended()) {
            assert!(since.elapsed() < LIMIT, "seed {seed}: it does not end");
            thread::sleep(POLL);
        }
        self.hear();
        for program in self.programs.iter_mut().filter(|program| program.end != End::Any) {
            program.check_end(seed);
        }
        let decided = self.check_rounds();
        self.check_ends(&decided, lost);
        self.check_journals(&decided, lost);
        self.check_trained_once();
    }

    /// Every round was committed, each with one model and one decree, which are returned.
    fn check_rounds(&self) -> BTreeMap<Round, (Digest, Digest)> {
        let seed = self.seed;
        let mut decided: BTreeMap<Round, (Digest, Digest)> = BTreeMap::new();
        let mut heads: BTreeMap<&PeerId, Round> = BTreeMap::new();
        for (entry, committed) in self.committed() {
            let (round, decree) = (committed.round, (committed.digest, committed.decree));
            assert_eq!(*decided.entry(round).or_insert(decree), decree, "seed {seed}: round {round} was decided twice");
            let before = heads.insert(&entry.peer, round);
            assert!(before < Some(round), "seed {seed}: the head of {} goes back", entry.peer);
        }
        assert!(decided.keys().copied().eq((1..=self.rounds).map(Round)), "seed {seed}: {:?}", decided.keys());
        decided
    }

    /// Whoever was not lost has finished with the last model, and so say the programs.
    fn check_ends(&self, decided: &BTreeMap<Round, (Digest, Digest)>, lost: &[&PeerId]) {
        let seed = self.seed;
        let (last, _) = decided[&Round(self.rounds)];
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
        for program in self.programs.iter().filter(|program| program.end == End::Result) {
            let text = std::fs::read_to_string(&program.stdout).unwrap();
            let result: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(result["digest"], last.to_string(), "seed {seed}");
            assert_eq!(result["rounds"], self.rounds, "seed {seed}");
        }
    }

    /// What peers have on disk: the finish, the same for all, with the last model; of those that were lost, a decree of
    /// the same history.
    fn check_journals(&self, decided: &BTreeMap<Round, (Digest, Digest)>, lost: &[&PeerId]) {
        let seed = self.seed;
        let (last, _) = decided[&Round(self.rounds)];
        let told: BTreeSet<&PeerId> = self.entries.iter().map(|entry| &entry.peer).collect();
        let mut finishes = BTreeSet::new();
        for peer in told {
            let durable = self.journal(peer).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            let decree = durable.head.map(|head| head.decree);
            let kept = decree.as_ref().and_then(|decree| Some((decree.digest(), decided.get(&decree.round)?.1)));
            if let Some((kept, told)) = kept {
                assert_eq!(kept, told, "seed {seed}: the journal of {peer}");
            }
            if !lost.contains(&peer) {
                let decree = decree.unwrap_or_else(|| panic!("seed {seed}: {peer} has no head"));
                assert!(decree.reason().is_some(), "seed {seed}: {peer} has kept round {} as its last", decree.round);
                assert_eq!(decree.model().digest, last, "seed {seed}: the journal of {peer}");
                assert!(self.blobs(peer).has_durable(last), "seed {seed}: {peer} has not kept the last model");
                finishes.insert(decree.digest());
            }
        }
        assert_eq!(finishes.len(), 1, "seed {seed}: the finish was decided more than once");
    }

    /// An update survives its owner's process before it is told of: not even a peer that was killed trains twice.
    fn check_trained_once(&self) {
        let mut trained = BTreeSet::new();
        for entry in &self.entries {
            if let Event::Trained { round, .. } = entry.event {
                let first = trained.insert((&entry.peer, round));
                assert!(first, "seed {}: {} trained twice in round {round}", self.seed, entry.peer);
            }
        }
    }

    /// Whether `peer` had a part in a round after the struck one.
    pub(crate) fn took_part(&self, peer: &PeerId) -> bool {
        self.entries.iter().any(|entry| has_part_in(&entry.event, peer))
    }

    /// Rounds that took more than one leader, with the terms it took.
    pub(crate) fn later_terms(&self) -> BTreeMap<Round, Term> {
        let elected = self.entries.iter().filter_map(|entry| match entry.event {
            Event::Elected { round, term, .. } if term > Term(0) => Some((round, term)),
            _ => None,
        });
        elected.collect()
    }

    /// How long a round takes that nothing disturbs: the one before the struck one.
    pub(crate) fn calm_round(&self) -> Duration {
        let first = self.committed().find(|(_, committed)| committed.round < STRUCK);
        Duration::from_secs_f64(first.expect("it was committed").1.seconds.total)
    }

    /// When the struck round went on after `failed`: the election of a leader other than `leader`, if it was the leader
    /// that failed, and the commit. Nothing if the round had been decided before.
    pub(crate) fn recovery(&self, leader: Option<&PeerId>, failed: SystemTime) -> Figures {
        let after = |entry: &Entry| entry.time.duration_since(failed).ok();
        let is_next =
            |event: &Event| matches!(event, Event::Elected { round: STRUCK, leader: next, .. } if Some(next) != leader);
        let elected = self.entries.iter().find(|entry| is_next(&entry.event) && entry.time >= failed).and_then(after);
        let first_commit = self.committed().find(|(_, committed)| committed.round == STRUCK);
        let committed = first_commit.and_then(|(entry, _)| after(entry));
        let elected = elected.filter(|_| leader.is_some()).map(|elected| (ELECTED, elected));
        let committed = committed.map(|committed| (COMMITTED, committed));
        let calm = committed.map(|_| (CALM, self.calm_round()));
        elected.into_iter().chain(committed).chain(calm).collect()
    }

    /// How long it took until all but the `lost` were connected to this broker.
    pub(crate) fn moved_to(&self, broker: &str, lost: &[&PeerId], failed: SystemTime) -> Duration {
        let mut moved: BTreeMap<&PeerId, SystemTime> = BTreeMap::new();
        for entry in self.entries.iter().filter(|entry| entry.time >= failed) {
            if matches!(&entry.event, Event::Connected { broker: at } if at == broker) {
                moved.entry(&entry.peer).or_insert(entry.time);
            }
        }
        assert_eq!(moved.len() + lost.len(), PEERS, "seed {}: {moved:?}", self.seed);
        let last = moved.into_values().max().expect("somebody is left");
        last.duration_since(failed).unwrap_or_default()
    }
}

impl Drop for Federation {
    /// Kills what still runs. A failure keeps its files, which are the evidence.
    fn drop(&mut self) {
        let is_running_run =
            |program: &mut Program| program.peer.is_none() && program.end != End::Any && !program.has_ended();
        if self.programs.iter_mut().any(is_running_run) {
            // A peer that is stopped does not see that its parent ends.
            let pids: Vec<u32> = self.pids.values().copied().collect();
            drop(kill("KILL", &pids).output());
        }
        for program in &mut self.programs {
            // An error says that it has ended.
            let _ = program.child.kill();
            let _ = program.child.wait();
        }
        if thread::panicking() {
            self.dir.disable_cleanup(true);
            eprintln!("seed {}: the files are in {}", self.seed, self.dir.path().display());
            for program in &self.programs {
                eprintln!("{}", std::fs::read_to_string(&program.stderr).unwrap_or_default());
            }
        }
    }
}

/// The names that `rodizio run` gives its peers.
pub(crate) fn peers() -> Vec<PeerId> {
    (1..=PEERS).map(|number| PeerId::new(&format!("peer-{number}")).unwrap()).collect()
}

/// The leader of the struck round, of its highest term so far.
pub(crate) fn leader(entries: &[Entry]) -> Option<PeerId> {
    let elected = entries.iter().filter_map(|entry| match &entry.event {
        Event::Elected { round: STRUCK, term, leader } => Some((*term, leader)),
        _ => None,
    });
    elected.max().map(|(_, leader)| leader.clone())
}
