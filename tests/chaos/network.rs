//! Networks of their own: each peer in a network namespace, on a link that delays, loses and can be cut.
//!
//! ```text
//!   site's namespace  │           wires' namespace            │  hub's namespace
//!   peer  eth0 ──veth─┼─ left ═ tap ─ relay ─ tap ═ right ─veth─┼─ port ── bridge  broker
//! ```
//!
//! Every frame passes the relay, a thread of this process, which does to it what `tc netem` would do: real TCP runs over
//! links that really lose. It is not netem, because the kernels of small virtual machines have none. Nobody learns of a
//! cut: no connection is reset, no interface goes down.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::processes::Surroundings;

/// Where the broker of the hub listens. The network is its own, so the port is free.
pub(crate) const HUB: &str = "10.77.0.254:1883";

/// How often the relay looks for frames.
const LOOK: Duration = Duration::from_millis(1);

/// The longest frame, with the header that the kernel puts before it.
const FRAME_BYTES_MAX: usize = 10 + (1 << 16);

/// `O_NONBLOCK` of Linux.
const NONBLOCKING: i32 = 0o4000;

/// How the names of namespaces begin; the number of the process follows.
const PREFIX: &str = "rodizio-chaos-";

/// Networks of this process so far.
static NETWORKS: AtomicU32 = AtomicU32::new(0);

/// What a link does to frames, in either direction.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Weather {
    pub(crate) delay: Duration,
    /// Each frame is late by up to so much more or less, whatever the others are.
    pub(crate) jitter: Duration,
    /// How many frames of a hundred are lost.
    pub(crate) loss_percent: u32,
}

/// Namespaces and the links between them, gone when this is dropped.
pub(crate) struct Network {
    hub: String,
    /// It has no addresses: otherwise it would answer instead of passing on.
    wires: String,
    sites: Vec<String>,
    cuts: Vec<Arc<AtomicBool>>,
    stop: Arc<AtomicBool>,
    relay: Option<JoinHandle<()>>,
}

/// Why there can be no network here; asked once.
pub(crate) fn obstacle() -> Option<&'static str> {
    static OBSTACLE: OnceLock<Option<String>> = OnceLock::new();
    let probe = || {
        sweep();
        Network::open(1, Weather::default(), 0).err().map(|e| format!("no network namespaces here: {e}"))
    };
    OBSTACLE.get_or_init(probe).as_deref()
}

impl Network {
    /// A hub and so many sites around it.
    pub(crate) fn new(sites: usize, weather: Weather, seed: u64) -> Self {
        Self::open(sites, weather, seed).unwrap_or_else(|e| panic!("{e}"))
    }

    fn open(count: usize, weather: Weather, seed: u64) -> Result<Self, String> {
        let number = NETWORKS.fetch_add(1, Ordering::Relaxed);
        let name = |what: &str| format!("{PREFIX}{}-{number}-{what}", std::process::id());
        // A tap's file is named by the number of its interface: one that no other process takes.
        let first_tap = (std::process::id() << 8) + (number << 4) % 256;
        let (hub, wires, stop) = (name("hub"), name("wires"), Arc::new(AtomicBool::new(false)));
        let (sites, cuts) = (Vec::new(), Vec::new());
        let mut network = Self { hub: hub.clone(), wires, sites, cuts, stop: stop.clone(), relay: None };
        ip(&format!("netns add {hub}"))?;
        ip(&format!("netns add {}", network.wires))?;
        ip(&format!("-n {hub} link set lo up"))?;
        ip(&format!("-n {hub} link add bridge type bridge"))?;
        ip(&format!("-n {hub} addr add 10.77.0.254/24 dev bridge"))?;
        ip(&format!("-n {hub} link set bridge up"))?;
        let mut ways = Vec::new();
        for site in 0..count {
            network.sites.push(name(&format!("site{site}")));
            let taps = network.link(site, first_tap + 2 * site as u32)?;
            let [left, right] = taps.map(Arc::new);
            let cut = Arc::new(AtomicBool::new(false));
            network.cuts.push(cut.clone());
            ways.push(Way::new(left.clone(), right.clone(), cut.clone()));
            ways.push(Way::new(right, left, cut));
        }
        let rng = ChaCha8Rng::seed_from_u64(seed);
        network.relay = Some(thread::spawn(move || relay(&mut ways, weather, rng, &stop)));
        Ok(network)
    }

    /// Makes a site and the two halves of its link; returns the taps between them.
    fn link(&self, site: usize, tap: u32) -> Result<[File; 2], String> {
        let (hub, wires, name) = (&self.hub, &self.wires, &self.sites[site]);
        ip(&format!("netns add {name}"))?;
        ip(&format!("-n {name} link set lo up"))?;
        ip(&format!("-n {wires} link add left{site} type veth peer name eth0 netns {name}"))?;
        ip(&format!("-n {wires} link add right{site} type veth peer name port{site} netns {hub}"))?;
        ip(&format!("-n {hub} link set port{site} master bridge"))?;
        for (side, tap) in [("left", tap), ("right", tap + 1)] {
            let lower = format!("{side}{site}");
            ip(&format!("-n {wires} link add link {lower} name t{lower} index {tap} type macvtap mode passthru"))?;
            ip(&format!("-n {wires} link set {lower} up"))?;
            ip(&format!("-n {wires} link set t{lower} txqueuelen 5000 up"))?;
        }
        ip(&format!("-n {hub} link set port{site} up"))?;
        ip(&format!("-n {name} addr add {}/24 dev eth0", address(site)))?;
        ip(&format!("-n {name} link set eth0 up"))?;
        let open = |tap: u32| {
            let path = format!("/dev/tap{tap}");
            let opened = OpenOptions::new().read(true).write(true).custom_flags(NONBLOCKING).open(&path);
            opened.map_err(|e| format!("{path}: {e}"))
        };
        Ok([open(tap)?, open(tap + 1)?])
    }

    /// Runs a program at a site.
    pub(crate) fn at(&self, site: usize) -> Surroundings {
        within(&self.sites[site])
    }

    /// Runs a program at the hub, which has no slow link.
    pub(crate) fn at_hub(&self) -> Surroundings {
        within(&self.hub)
    }

    /// From now on nothing passes the link of this site, not even what is on its way.
    pub(crate) fn cut(&self, site: usize) {
        self.cuts[site].store(true, Ordering::Relaxed);
    }

    /// The link of this site works again.
    pub(crate) fn mend(&self, site: usize) {
        self.cuts[site].store(false, Ordering::Relaxed);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(relay) = self.relay.take() {
            // It has nothing to tell.
            let _ = relay.join();
        }
        // The interfaces go with their namespaces. One that was not made has nothing to remove.
        for name in self.sites.iter().chain([&self.wires, &self.hub]) {
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

/// Removes the namespaces of test processes that were killed before they could.
fn sweep() {
    let folder = std::fs::read_dir("/var/run/netns").into_iter().flatten().flatten();
    for name in folder.filter_map(|entry| entry.file_name().into_string().ok()) {
        let process = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            // Another test process may have been quicker.
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

/// The address of a site.
pub(crate) fn address(site: usize) -> String {
    format!("10.77.0.{}", site + 1)
}

fn within(namespace: &str) -> Surroundings {
    let wrapper = ["ip", "netns", "exec", namespace].map(str::to_owned).to_vec();
    Surroundings { wrapper, ..Surroundings::default() }
}

fn ip(line: &str) -> Result<(), String> {
    let output = Command::new("ip").args(line.split(' ')).output().map_err(|e| format!("ip: {e}"))?;
    let said = || format!("ip {line}: {}", String::from_utf8_lossy(&output.stderr).trim());
    if output.status.success() { Ok(()) } else { Err(said()) }
}

/// One direction of a link.
struct Way {
    from: Arc<File>,
    to: Arc<File>,
    cut: Arc<AtomicBool>,
    /// Frames on their way, with when they arrive. The number keeps frames of one instant in order.
    frames: BinaryHeap<Reverse<(Instant, u64, Vec<u8>)>>,
    taken: u64,
}

impl Way {
    fn new(from: Arc<File>, to: Arc<File>, cut: Arc<AtomicBool>) -> Self {
        Self { from, to, cut, frames: BinaryHeap::new(), taken: 0 }
    }

    /// Takes the frames that have come.
    fn take(&mut self, buffer: &mut [u8], weather: Weather, rng: &mut ChaCha8Rng) {
        loop {
            let len = match (&*self.from).read(buffer) {
                Ok(len) => len,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                // There is none, or the interface is being removed.
                Err(_) => return,
            };
            let lost = rng.random_ratio(weather.loss_percent, 100);
            let late = 2 * weather.jitter.mul_f64(rng.random());
            if !lost && !self.cut.load(Ordering::Relaxed) {
                let due = Instant::now() + weather.delay + late - weather.jitter;
                self.frames.push(Reverse((due, self.taken, buffer[..len].to_vec())));
                self.taken += 1;
            }
        }
    }

    /// Passes on the frames whose time has come.
    fn deliver(&mut self) {
        if self.cut.load(Ordering::Relaxed) {
            self.frames.clear();
        }
        let now = Instant::now();
        while self.frames.peek().is_some_and(|Reverse((due, ..))| *due <= now) {
            if let Some(Reverse((_, _, frame))) = self.frames.pop() {
                // A frame that the other side does not take is lost, as on any network.
                let _ = (&*self.to).write(&frame);
            }
        }
    }
}

fn relay(ways: &mut [Way], weather: Weather, mut rng: ChaCha8Rng, stop: &AtomicBool) {
    let mut buffer = vec![0; FRAME_BYTES_MAX];
    while !stop.load(Ordering::Relaxed) {
        for way in &mut *ways {
            way.take(&mut buffer, weather, &mut rng);
            way.deliver();
        }
        thread::sleep(LOOK);
    }
}
