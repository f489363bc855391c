//! Clocks that are wrong: nothing but the times that are shown to people may depend on what o'clock it is.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use crate::federation::{CALM, Federation, Figures, Joining, STRUCK, peers};
use crate::processes::Surroundings;
use crate::stage::{LONG_TRAINING, Stage, is_commit_of};

const HOUR: Duration = Duration::from_secs(3600);

/// A busy machine is not to make leaders seem silent. A clock that steps by hours still would.
const PATIENT: [&str; 2] = ["--election-timeout", "60s"];

/// The library that shows a program another time of day.
fn faketime() -> Option<&'static Path> {
    static FOUND: OnceLock<Option<PathBuf>> = OnceLock::new();
    let find = || {
        let folders = ["/usr/lib", "/usr/lib64"].into_iter().filter_map(|lib| std::fs::read_dir(lib).ok()).flatten();
        let folders = folders.flatten().map(|folder| folder.path()).chain(["/usr/lib".into(), "/usr/lib64".into()]);
        folders.map(|folder| folder.join("faketime/libfaketimeMT.so.1")).find(|path| path.exists())
    };
    FOUND.get_or_init(find).as_deref()
}

/// Why the wall clock cannot be stepped here.
pub(crate) fn obstacle_to_steps() -> Option<&'static str> {
    faketime().is_none().then_some("libfaketime is not installed")
}

/// Why peers cannot have monotonic clocks of their own here; asked once.
pub(crate) fn obstacle_to_time_namespaces() -> Option<&'static str> {
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    let probe = || {
        let wrapper = in_time(1).wrapper;
        Command::new(&wrapper[0]).args(&wrapper[1..]).arg("true").output().is_ok_and(|output| output.status.success())
    };
    (!PERMITTED.get_or_init(probe)).then_some("no time namespaces here")
}

/// In a namespace whose monotonic clock is ahead by so many seconds.
fn in_time(ahead: u64) -> Surroundings {
    let ahead = ahead.to_string();
    let wrapper = ["unshare", "--time", "--monotonic", &ahead, "--boottime", &ahead, "--kill-child"];
    Surroundings { wrapper: wrapper.map(str::to_owned).to_vec(), ..Surroundings::default() }
}

/// The wall clock of all processes is put forward by hours in one round, and back by more in the next.
pub(crate) fn wall_clock_steps(seed: u64) -> Figures {
    let library = faketime().expect("the caller has asked for it").to_str().expect("it was found by a path of text");
    let shown = tempfile::NamedTempFile::new().unwrap();
    let show = |ahead: &str| std::fs::write(shown.path(), ahead).unwrap();
    show("+0");
    let env = [
        ("LD_PRELOAD", library),
        ("FAKETIME_TIMESTAMP_FILE", shown.path().to_str().unwrap()),
        ("FAKETIME_NO_CACHE", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ("DONT_FAKE_MONOTONIC", "1"),
        ("NO_FAKE_STAT", "1"),
    ];
    let env = env.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let settings = [&LONG_TRAINING[..], &PATIENT].concat();
    let surroundings = Surroundings { env, ..Surroundings::default() };
    let mut federation = Federation::start_in(seed, 6, &settings, &surroundings);
    Stage::Gathering.wait(&mut federation);
    show("+5h");
    let forward = federation.until("the next round", 0, |entry| is_commit_of(&entry.event, STRUCK.next()));
    show("-26h");
    federation.conclude(&[]);
    let last = federation.entries.last().expect("much was told").time;
    assert!(forward.time > SystemTime::now() + 4 * HOUR, "seed {seed}: the clock was not put forward");
    assert!(last < SystemTime::now() - 25 * HOUR, "seed {seed}: the clock was not put back");
    let needless = federation.later_terms();
    assert!(needless.is_empty(), "seed {seed}: the time of day deposed leaders: {needless:?}");
    Figures::new()
}

/// Peers whose monotonic clocks are years apart, as on machines that were started at different times.
pub(crate) fn clocks_are_apart(seed: u64) -> Figures {
    let mut federation = Federation::new(seed, 4, &PATIENT);
    let (_, broker) = federation.broker("broker", "127.0.0.1:0", &Surroundings::default());
    for (number, peer) in (1..).zip(peers()) {
        let surroundings = in_time(number as u64 * 20_000 * HOUR.as_secs());
        let joining = Joining { brokers: vec![broker.clone()], listen: None, surroundings };
        federation.join(&peer, number, &joining);
    }
    federation.conclude(&[]);
    let needless = federation.later_terms();
    assert!(needless.is_empty(), "seed {seed}: leaders were given up that did nothing wrong: {needless:?}");
    Figures::from([(CALM, federation.calm_round())])
}
