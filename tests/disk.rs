//! What is on disk: full disks, what is kept, and a whole run that goes on after everything was killed.
//!
//! A full disk is a small tmpfs. Mounting one takes privileges: where there are none, those tests say so and do nothing.

#![cfg(target_os = "linux")]

mod common {
    pub(crate) mod log;
    pub(crate) mod signals;
}

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use common::log;
use common::signals::signal;
use rodizio::events::{Entry, Event};
use rodizio::rundir::RunDir;
use rodizio::training::export::from_safetensors;
use rodizio::types::{Digest, Round};
use tempfile::TempDir;

/// What is waited for comes within this, or never.
const LIMIT: Duration = Duration::from_secs(600);

/// How often it is looked.
const POLL: Duration = Duration::from_millis(5);

/// Five processes a run: one run at a time, whatever the number of test threads.
static MACHINE: Mutex<()> = Mutex::new(());

const FILLER: &str = "filler";

/// A file system of a few megabytes, mounted as long as this lives.
struct SmallDisk {
    at: PathBuf,
}

impl SmallDisk {
    /// Nothing, and a line that says why, where mounting is not permitted.
    fn mount(at: &Path, kib: u64) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={kib}k"), "tmpfs"]).arg(at).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self { at: at.to_owned() }),
            Ok(output) => {
                eprintln!("skipped: no tmpfs can be mounted: {}", String::from_utf8_lossy(&output.stderr).trim());
                None
            }
            Err(error) => {
                eprintln!("skipped: mount cannot be run: {error}");
                None
            }
        }
    }

    /// Takes all the room there is.
    fn fill(&self) {
        let mut file = File::options().create(true).append(true).open(self.at.join(FILLER)).unwrap();
        let error = std::iter::repeat_with(|| file.write_all(&[0; 4096])).find_map(Result::err).unwrap();
        assert_eq!(error.kind(), ErrorKind::StorageFull);
    }

    /// Takes all the room but this.
    fn fill_but(&self, left: u64) {
        self.fill();
        let file = File::options().write(true).open(self.at.join(FILLER)).unwrap();
        file.set_len(file.metadata().unwrap().len() - left).unwrap();
    }

    fn make_room(&self) {
        fs::remove_file(self.at.join(FILLER)).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("--lazy").arg(&self.at).status();
        assert!(unmounted.is_ok_and(|status| status.success()) || thread::panicking(), "{} stays", self.at.display());
    }
}

/// A `rodizio run` in a directory of its own, whose results go to `run` there.
struct Run {
    dir: TempDir,
    child: Option<Child>,
    _machine: MutexGuard<'static, ()>,
}

impl Run {
    fn new() -> Self {
        let machine = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
        Self { dir: tempfile::tempdir().unwrap(), child: None, _machine: machine }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn start(&mut self, args: &[&str]) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rodizio"));
        command.arg("run").args(args).current_dir(self.dir.path()).env_clear().stdin(Stdio::null());
        command.stdout(File::create(self.path("stdout")).unwrap());
        command.stderr(File::create(self.path("stderr")).unwrap());
        self.child = Some(command.spawn().unwrap());
    }

    fn stderr(&self) -> String {
        fs::read_to_string(self.path("stderr")).unwrap()
    }

    /// What the log of events holds, up to its last whole line.
    fn entries(&self) -> Vec<Entry> {
        let text = fs::read_to_string(self.path("run/events.jsonl")).unwrap_or_default();
        log::entries(&text).0
    }

    /// Waits until this gives something.
    fn until<T>(&mut self, what: &str, mut look: impl FnMut(&Self) -> Option<T>) -> T {
        let since = Instant::now();
        loop {
            // Asked first: what it wrote before its end is then seen.
            let ended = self.child.as_mut().is_none_or(|child| child.try_wait().unwrap().is_some());
            if let Some(found) = look(self) {
                return found;
            }
            assert!(!ended, "it ended before {what}");
            assert!(since.elapsed() < LIMIT, "no {what} in {LIMIT:?}");
            thread::sleep(POLL);
        }
    }

    fn until_committed(&mut self, round: Round) {
        self.until("a commit", |run| {
            run.entries()
                .iter()
                .any(|entry| matches!(&entry.event, Event::RoundCommitted(c) if c.round == round))
                .then_some(())
        });
    }

    /// Waits for the end: exit code and stdout.
    fn end(&mut self) -> (Option<i32>, String) {
        let mut child = self.child.take().unwrap();
        let since = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if since.elapsed() > LIMIT {
                self.child = Some(child);
                panic!("it does not end");
            }
            thread::sleep(POLL);
        };
        (status.code(), fs::read_to_string(self.path("stdout")).unwrap())
    }

    /// Waits for the end of a run of so many rounds and peers, and holds it to what must be true. Returns the last model.
    fn conclude(&mut self, rounds: u64, peers: usize) -> Digest {
        let (code, stdout) = self.end();
        assert_eq!(code, Some(0));
        let result: serde_json::Value = serde_json::from_str(&stdout).unwrap();
        let mut decided: BTreeMap<Round, BTreeSet<(Digest, Digest)>> = BTreeMap::new();
        let mut ends = BTreeMap::new();
        for entry in self.entries() {
            match entry.event {
                Event::RoundCommitted(committed) => {
                    decided.entry(committed.round).or_default().insert((committed.digest, committed.decree));
                }
                Event::Finished { rounds, digest, .. } => drop(ends.insert(entry.peer, (rounds, digest))),
                _ => {}
            }
        }
        assert_eq!(decided.keys().copied().collect::<Vec<_>>(), (1..=rounds).map(Round).collect::<Vec<_>>());
        assert!(decided.values().all(|decrees| decrees.len() == 1), "two decrees for a round: {decided:?}");
        let last = decided[&Round(rounds)].first().unwrap().0;
        assert_eq!(ends.len(), peers, "{ends:?}");
        assert!(ends.values().all(|end| *end == (Round(rounds), last)), "{ends:?}");
        assert_eq!((&result["digest"], &result["rounds"]), (&last.to_string().into(), &rounds.into()));
        let (_, metadata) = from_safetensors(&fs::read(self.path("run/model.safetensors")).unwrap()).unwrap();
        assert_eq!(metadata["digest"], last.to_string());
        last
    }

    /// The peers that have paused and not gone on.
    fn paused(&self) -> BTreeSet<String> {
        let mut paused = BTreeSet::new();
        for entry in self.entries() {
            match entry.event {
                Event::Paused { .. } => drop(paused.insert(entry.peer.to_string())),
                Event::Resumed => drop(paused.remove(entry.peer.as_str())),
                _ => {}
            }
        }
        paused
    }

    /// The processes of the peers.
    fn pids(&self) -> BTreeSet<u32> {
        let pid = |entry: Entry| match entry.event {
            Event::Started { pid, .. } => Some(pid),
            _ => None,
        };
        self.entries().into_iter().filter_map(pid).collect()
    }

    /// Waits until no process holds the state directory of one of these peers: one that was killed may have a flush to end.
    fn wait_for_release(&self, peers: usize) {
        let since = Instant::now();
        for number in 1..=peers {
            let lock = File::open(self.path(&format!("run/peers/peer-{number}/lock"))).unwrap();
            while lock.try_lock().is_err() {
                assert!(since.elapsed() < LIMIT, "peer-{number} does not end");
                thread::sleep(POLL);
            }
        }
    }

    fn signal(&self, name: &str) {
        signal(name, &[self.child.as_ref().unwrap().id()]);
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // An error says that it has ended. Its peers end with it.
            let _ = child.kill();
            let _ = child.wait();
        }
        if thread::panicking() {
            eprintln!("{}", self.stderr());
        }
    }
}

/// A run whose rounds last long enough to strike between two, and whose silent peers are not waited for long.
const CALM: [&str; 6] = ["--json", "--run-dir", "run", "--election-timeout", "500ms", "--min-peers"];

const LONG_TRAINING: [&str; 2] = ["--local-epochs", "60"];

/// A peer of five cannot write: either its promises, or only the large files of its jobs.
fn one_peer_waits_for_room(left: u64, rounds: u64, more: &[&str]) {
    let is_of_it = |entry: &Entry| entry.peer.as_str() == "peer-3";
    let mut run = Run::new();
    let Some(disk) = SmallDisk::mount(&run.path("run/peers/peer-3"), 8 << 10) else { return };
    let own = ["5", "--processes", "--rounds", &rounds.to_string()];
    run.start(&[&CALM[..], &own, more].concat());
    run.until_committed(Round(1));
    run.until("a round without the peer that waits", |run| {
        let entries = run.entries();
        let paused = |entry: &Entry| matches!(&entry.event, Event::Paused { .. }) && is_of_it(entry);
        let since = entries.iter().rposition(paused).map_or(&[][..], |at| &entries[at..]);
        let committed = |entry: &Entry| matches!(&entry.event, Event::RoundCommitted(_));
        let found = since.iter().any(committed) && run.paused() == BTreeSet::from(["peer-3".to_owned()]);
        if !found {
            // Again and again: what is deleted with a commit leaves room that was not there before.
            disk.fill_but(left);
        }
        found.then_some(())
    });
    disk.make_room();
    run.until("the peer going on", |run| run.paused().is_empty().then_some(()));
    run.conclude(rounds, 5);
    let resumed = run.entries().iter().position(|entry| entry.event == Event::Resumed).unwrap();
    let takes_part = |entry: &Entry| matches!(&entry.event, Event::Trained { .. }) && is_of_it(entry);
    assert!(run.entries()[resumed..].iter().any(takes_part), "it does not train any more");
    let stderr = run.stderr();
    let told =
        "warning: the disk is full: peer-3 cannot write run/peers/peer-3; it waits, and goes on once there is room\n";
    // Mostly one: it goes on for a moment where there was room for a moment.
    let pause = Event::Paused { path: "run/peers/peer-3".to_owned(), why: "the disk is full".to_owned() };
    let pauses = run.entries().iter().filter(|entry| entry.event == pause).count();
    assert!(pauses > 0 && stderr.matches(told).count() == pauses, "{pauses} pauses: {stderr}");
    assert!(stderr.contains("peer-3 can write again, and goes on\n"), "{stderr}");
}

#[test]
fn a_peer_whose_disk_is_full_waits_while_the_others_go_on() {
    one_peer_waits_for_room(0, 16, &LONG_TRAINING);
}

#[test]
fn a_peer_whose_disk_has_room_for_promises_and_not_for_models_waits_as_well() {
    one_peer_waits_for_room(64 << 10, 40, &["--hidden", "1024", "--local-epochs", "2"]);
}

#[test]
fn a_run_whose_peers_have_a_full_disk_waits_and_loses_nothing() {
    let mut run = Run::new();
    let Some(disk) = SmallDisk::mount(&run.path("run/peers"), 8 << 10) else { return };
    run.start(&[&CALM[..], &["3", "--peers", "3", "--processes", "--rounds", "6"], &LONG_TRAINING].concat());
    run.until_committed(Round(1));
    run.until("a pause of the majority", |run| {
        disk.fill();
        // The third has nothing to promise until one of them is back.
        (run.paused().len() >= 2).then_some(())
    });
    disk.make_room();
    run.conclude(6, 3);
    assert!(run.paused().is_empty());
}

#[test]
fn a_run_that_waits_for_room_is_interrupted_at_once_and_goes_on_with_resume() {
    let mut run = Run::new();
    let Some(disk) = SmallDisk::mount(&run.path("run"), 8 << 10) else { return };
    run.start(&[&CALM[..], &["3", "--peers", "3", "--rounds", "6"], &LONG_TRAINING].concat());
    run.until_committed(Round(1));
    // The log of events is on the full disk as well: what is shown tells.
    run.until("a pause of the majority", |run| {
        disk.fill();
        let stderr = run.stderr();
        let waits = |peer: &usize| stderr.contains(&format!("the disk is full: peer-{peer} cannot write"));
        ((1..=3).filter(waits).count() >= 2).then_some(())
    });
    run.signal("INT");
    assert_eq!(run.end().0, Some(130));
    assert!(run.stderr().contains("interrupted; to go on: rodizio run --resume run\n"));
    run.start(&["--resume", "run", "--json"]);
    // Nothing needs room to start again; the first promise does.
    run.until("a pause", |run| {
        disk.fill();
        run.stderr().contains("the disk is full: ").then_some(())
    });
    disk.make_room();
    run.conclude(6, 3);
}

#[test]
fn results_wait_in_memory_for_room_and_are_whole_afterwards() {
    let mut run = Run::new();
    let Some(disk) = SmallDisk::mount(&run.path("run"), 1 << 10) else { return };
    // The peers themselves have room.
    fs::create_dir(run.path("peers")).unwrap();
    std::os::unix::fs::symlink(run.path("peers"), run.path("run/peers")).unwrap();
    run.start(&[&CALM[..], &["3", "--peers", "3", "--rounds", "12"], &LONG_TRAINING].concat());
    run.until_committed(Round(1));
    disk.fill();
    run.until("the end of training", |run| run.stderr().contains("the results wait for room").then_some(()));
    let stderr = run.stderr();
    assert_eq!(stderr.matches("its results are kept in memory until there is room").count(), 1, "{stderr}");
    let text = fs::read_to_string(run.path("run/events.jsonl")).unwrap();
    assert!(text.ends_with('\n') && !text.contains("\"finished\""), "half a line is left, or all lines: {text}");
    disk.make_room();
    run.conclude(12, 3);
    assert!(run.stderr().contains("run is written again, and nothing is missing"));
    let commits = run.entries().into_iter().filter(|entry| matches!(entry.event, Event::RoundCommitted(_))).count();
    assert_eq!(commits, 36, "every peer's line of every round is there");
}

#[test]
fn a_line_that_does_not_fit_leaves_no_part_of_itself() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(&dir.path().join("run"), 256) else { return };
    let mut run_dir = RunDir::open(&disk.at).unwrap();
    disk.fill_but(64 << 10);
    // Pages are not a multiple of it: the line that meets the end of the room is cut in its middle.
    let line = |number: usize| format!("{number:0>1000}");
    let last = (0..).find(|number| run_dir.append(&line(*number)).is_err()).unwrap();
    run_dir.append(&line(last + 1)).unwrap();
    assert!(run_dir.is_behind());
    let expected = |count: usize| (0..count).map(|number| line(number) + "\n").collect::<String>();
    let text = || fs::read_to_string(disk.at.join("events.jsonl")).unwrap();
    assert_eq!(text(), expected(last), "only whole lines");
    assert_eq!(run_dir.write_back().unwrap_err().obstacle(), Some("the disk is full"));
    assert_eq!(text(), expected(last));
    disk.make_room();
    run_dir.write_back().unwrap();
    assert!(!run_dir.is_behind());
    assert_eq!(text(), expected(last + 2));
}

#[test]
fn a_run_that_starts_on_a_full_disk_is_refused_with_what_to_do() {
    let mut run = Run::new();
    let Some(disk) = SmallDisk::mount(&run.path("small"), 256) else { return };
    disk.fill();
    run.start(&["--peers", "2", "--run-dir", "small/run"]);
    assert_eq!(run.end().0, Some(1));
    let stderr = run.stderr();
    assert!(stderr.contains("error: cannot ") && stderr.contains(" small/run"), "{stderr}");
    assert!(stderr.contains("hint: ") && stderr.contains("No space left on device"), "{stderr}");
}

#[test]
fn a_run_that_was_killed_with_all_its_processes_goes_on_with_resume() {
    let mut run = Run::new();
    run.start(&[&CALM[..], &["3", "--peers", "3", "--processes", "--rounds", "8"], &LONG_TRAINING].concat());
    run.until_committed(Round(2));
    let pids = run.pids();
    assert_eq!(pids.len(), 3);
    signal("KILL", &pids.iter().copied().chain([run.child.as_ref().unwrap().id()]).collect::<Vec<_>>());
    assert_eq!(run.end().0, None);
    run.wait_for_release(3);
    run.start(&["--resume", "run", "--rounds", "9"]);
    assert_eq!(run.end().0, Some(2));
    assert!(run.stderr().contains("rounds = 8, and now rounds = 9\nhint: set rounds = 8 "), "{}", run.stderr());
    // Also from elsewhere, and with peers that are processes as before.
    let path = run.path("run").display().to_string();
    run.start(&["--resume", &path, "--json"]);
    let last = run.conclude(8, 3);
    assert_eq!(run.pids().len(), 6);
    run.start(&["--resume", "run", "--json"]);
    assert_eq!(run.conclude(8, 3), last);
    assert!(run.stderr().contains("this run has finished, and this is its result"), "{}", run.stderr());
}

#[test]
fn what_is_no_run_cannot_be_resumed() {
    let mut run = Run::new();
    fs::create_dir(run.path("empty")).unwrap();
    fs::create_dir(run.path("joined")).unwrap();
    fs::write(run.path("joined/config.toml"), "rounds = 3\n").unwrap();
    for (name, why) in [
        ("nowhere", "it is no directory"),
        ("empty", "there is no config.toml in it"),
        ("joined", "no peer has left its state there"),
    ] {
        run.start(&["--resume", name]);
        assert_eq!(run.end().0, Some(2));
        let stderr = run.stderr();
        let expected = format!("error: {name} holds no run to go on with: {why}\nhint: ");
        assert!(stderr.starts_with(&expected), "{stderr}");
    }
}

#[test]
fn after_many_rounds_a_peer_keeps_the_last_model_and_no_more() {
    let (rounds, peers) = (30, 4);
    let mut run = Run::new();
    run.start(&["--json", "--run-dir", "run", "--peers", "4", "--rounds", "30", "--local-epochs", "1"]);
    let last = run.conclude(rounds, peers);
    let model_bytes = fs::metadata(run.path("run/model.safetensors")).unwrap().len();
    for number in 1..=peers {
        let state_dir = run.path(&format!("run/peers/peer-{number}"));
        let names = |dir: &Path| -> BTreeSet<String> {
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        };
        let files = ["blobs", "examples", "lock", "peer", "settings.json", "state"];
        assert_eq!(names(&state_dir), files.map(str::to_owned).into());
        assert!(fs::metadata(state_dir.join("state")).unwrap().len() < 4096);
        let blobs = names(&state_dir.join("blobs"));
        assert!(blobs.contains(&format!("{last}.blob")) && blobs.len() <= 2, "{blobs:?}");
        let bytes: u64 = blobs.iter().map(|name| fs::metadata(state_dir.join("blobs").join(name)).unwrap().len()).sum();
        assert!(bytes <= 2 * model_bytes, "{bytes} bytes of blobs");
    }
    let lines = run.entries().len() as u64;
    assert!(lines < 12 * rounds * peers as u64, "{lines} lines in {rounds} rounds of {peers} peers");
}

#[test]
fn a_model_that_was_damaged_is_refused_and_pulled_again_once_it_is_removed() {
    let mut run = Run::new();
    run.start(&[&CALM[..], &["3", "--peers", "3", "--rounds", "6"], &LONG_TRAINING].concat());
    run.until_committed(Round(2));
    run.signal("KILL");
    run.end();
    // What the state names is read when the peer starts: damaging all of it hits the model.
    let files = fs::read_dir(run.path("run/peers/peer-2/blobs")).unwrap().map(|entry| entry.unwrap().path());
    let blobs: Vec<PathBuf> = files.filter(|path| path.extension().is_none_or(|end| end != "tmp")).collect();
    for blob in &blobs {
        let mut bytes = fs::read(blob).unwrap();
        bytes[1000] ^= 1;
        fs::write(blob, bytes).unwrap();
    }
    run.start(&["--resume", "run"]);
    let code = run.end().0;
    let stderr = run.stderr();
    assert_eq!(code, Some(5), "{stderr}");
    assert!(stderr.contains("run/peers/peer-2/blobs/") && stderr.contains("is damaged: "), "{stderr}");
    assert!(stderr.contains("hint: check the disk; then remove that file"), "{stderr}");
    blobs.iter().for_each(|blob| fs::remove_file(blob).unwrap());
    run.start(&["--resume", "run", "--json"]);
    run.conclude(6, 3);
}
