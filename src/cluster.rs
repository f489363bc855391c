//! A cluster: a broker and many peers on this machine, as tasks of this process or as processes of their own.
//!
//! Its peers are what [`join`](crate::peer) runs, each with its part of the data set; nothing tells them that they share
//! a machine.

mod processes;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use tokio::net::UdpSocket;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch;

use crate::broker::{Broker, BrokerConfig, BrokerError};
use crate::config::{Part, Settings};
use crate::events::Entry;
use crate::node::Outcome;
use crate::peer::{LocalPeer, PeerError, read_data};
use crate::training::{ReadError, Trainer};
use crate::types::{Address, PeerId};

pub use processes::{Processes, Program};

/// Where a run directory keeps the state of its peers.
pub const PEERS: &str = "peers";

/// Connections beside those of a cluster's own peers: for peers of other machines, and observers.
const GUEST_CONNECTIONS: usize = 64;

/// An address of the network for documentation (RFC 5737): the way to it is the way to anywhere.
const ELSEWHERE: &str = "192.0.2.1:9";

/// The peers of a cluster, ready to run.
pub struct Cluster {
    peers: Vec<LocalPeer>,
}

/// Why there is no cluster.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// A name that is no address.
    #[error("cannot listen on {listen}: {source}")]
    Address {
        /// What was given.
        listen: String,
        /// Why it is none.
        source: io::Error,
    },
    /// The data cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The broker does not start.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// A peer cannot run.
    #[error("{peer}: {source}")]
    Peer {
        /// Which.
        peer: PeerId,
        /// Why.
        source: PeerError,
    },
}

/// A request to stop, which many may wait for.
#[derive(Clone, Debug)]
pub struct Stop(watch::Receiver<bool>);

impl Stop {
    /// A request, and the way to make it. Dropping the sender makes none.
    pub fn new() -> (watch::Sender<bool>, Self) {
        let (sender, receiver) = watch::channel(false);
        (sender, Self(receiver))
    }

    /// Waits until it is made.
    pub async fn requested(mut self) {
        if self.0.wait_for(|requested| *requested).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Whether it was made.
    pub fn is_requested(&self) -> bool {
        *self.0.borrow()
    }
}

impl Cluster {
    /// Opens `settings.peers` peers that will meet at `settings.brokers` and keep their state in `run_dir`.
    pub fn open(settings: &Settings, run_dir: &Path) -> Result<Self, ClusterError> {
        // Read once, though each peer takes a part of its own.
        let examples = if settings.trainer.is_none() { Some(read_data(settings)?) } else { None };
        let open = |settings: &Settings| {
            LocalPeer::open_with(settings, examples.as_ref())
                .map_err(|source| ClusterError::Peer { peer: name_in(settings), source })
        };
        let states = run_dir.join(PEERS);
        let are_new = !states.exists();
        let opened: Result<Vec<_>, _> = peer_settings(settings, run_dir).iter().map(open).collect();
        if opened.is_err() && are_new {
            // Peers that never began have nothing to keep. What stays behind harms nobody.
            let _ = std::fs::remove_dir_all(&states);
        }
        Ok(Self { peers: opened? })
    }

    /// The same with peers that train in a way of their own: `make` is given each peer's settings, which tell its part.
    pub fn of_trainers(
        settings: &Settings,
        run_dir: &Path,
        mut make: impl FnMut(&Settings) -> Result<Box<dyn Trainer>, PeerError>,
    ) -> Result<Self, ClusterError> {
        let open = |settings: &Settings| {
            let peer = make(settings).and_then(|trainer| LocalPeer::of_trainer(settings, trainer));
            peer.map_err(|source| ClusterError::Peer { peer: name_in(settings), source })
        };
        let peers = peer_settings(settings, run_dir).iter().map(open).collect::<Result<_, _>>()?;
        Ok(Self { peers })
    }

    /// The same cluster at a broker that [`start_broker`] started for it, which need not be tried.
    #[must_use]
    pub fn at_its_own_broker(self) -> Self {
        Self { peers: self.peers.into_iter().map(LocalPeer::trusting_its_broker).collect() }
    }

    /// The peers, in the order of their names.
    pub fn peers(&self) -> &[LocalPeer] {
        &self.peers
    }

    /// Runs every peer in a task of its own until all have ended; how, in the order of their names.
    ///
    /// One that fails does not end the others: they notice, and go on without it.
    pub async fn run(self, stop: &Stop, entries: &UnboundedSender<Entry>) -> Vec<(PeerId, Result<Outcome, PeerError>)> {
        let started: Vec<_> =
            self.peers.into_iter().map(|peer| (peer.name().clone(), spawn(peer, stop, entries))).collect();
        let mut ended = Vec::with_capacity(started.len());
        for (name, task) in started {
            ended.push((name, task.await.unwrap_or(Err(PeerError::LostTask))));
        }
        ended
    }
}

/// Runs a peer in a task of its own, which sends what it tells to `entries`. A task that is aborted is a peer that dies.
pub fn spawn(
    peer: LocalPeer,
    stop: &Stop,
    entries: &UnboundedSender<Entry>,
) -> tokio::task::JoinHandle<Result<Outcome, PeerError>> {
    let (stop, entries) = (stop.clone(), entries.clone());
    tokio::spawn(async move {
        let mut tell = |entry: Entry| {
            tracing::debug!(target: "rodizio::events", "{}", entry.to_line());
            // Nobody listens when the program is ending.
            let _ = entries.send(entry);
        };
        peer.run(stop.requested(), &mut tell).await
    })
}

/// Starts a broker at `listen`, `HOST:PORT`, with room for so many peers.
pub async fn start_broker(listen: &str, peers: usize, chunk_bytes: usize) -> Result<Broker, ClusterError> {
    let address = |source| ClusterError::Address { listen: listen.to_owned(), source };
    let mut found = tokio::net::lookup_host(listen).await.map_err(address)?;
    let listen = found.next().ok_or_else(|| address(io::Error::other("the name has no address")))?;
    let config = BrokerConfig::for_chunks(chunk_bytes);
    let connections_max = config.connections_max.max(2 * peers + GUEST_CONNECTIONS);
    Ok(Broker::start(BrokerConfig { listen, connections_max, ..config }).await?)
}

/// Where this machine reaches a broker that listens on `addr`, which may mean all its addresses.
pub fn reachable_at(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => SocketAddr::from(([127, 0, 0, 1], v4.port())),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, v6.port())),
        addr => addr,
    }
}

/// Where other peers reach a broker of this machine that listens on `listen`, as far as that can be derived. `brokers` are
/// those where this peer meets the others; none: at this broker.
///
/// A definite address is taken as it stands. One that means all of this machine's is replaced by the one from which the
/// first of `brokers` is reached; if that is on this machine, by the one from which the rest of the network is; if there
/// is no network, all peers are here. A loopback address would lead each peer to its own machine: it is told only where
/// the first of `brokers` is on this machine too.
pub async fn advertised_at(listen: SocketAddr, brokers: &[String]) -> Option<Address> {
    let towards = match brokers.first() {
        Some(broker) => local_ip_towards(broker, listen).await,
        None => None,
    };
    let all_here = brokers.is_empty() || towards.is_some_and(|ip| ip.is_loopback());
    let ip = match (listen.ip(), towards) {
        (ip, _) if !ip.is_unspecified() => ip,
        (_, Some(ip)) if !ip.is_loopback() => ip,
        _ => local_ip_towards(ELSEWHERE, listen).await.unwrap_or(reachable_at(listen).ip()),
    };
    let address = Address::new(&SocketAddr::new(ip, listen.port()).to_string()).ok();
    address.filter(|_| all_here || !ip.is_loopback())
}

/// The address of this machine from which packets to `broker` leave, of those that `listen` covers. None is sent.
async fn local_ip_towards(broker: &str, listen: SocketAddr) -> Option<IpAddr> {
    let to = tokio::net::lookup_host(broker).await.ok()?.find(|to| to.is_ipv4() || listen.is_ipv6())?;
    let any = if to.is_ipv4() { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await.ok()?;
    socket.connect(to).await.ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_unspecified())
}

/// The settings of each peer of a cluster: its name, its part of the data set and its state directory.
pub fn peer_settings(settings: &Settings, run_dir: &Path) -> Vec<Settings> {
    let of = settings.peers;
    let width = of.to_string().len();
    let one = |index: usize| {
        let name = PeerId::new(&format!("peer-{index:0width$}")).expect("letters, digits and a dash are a name");
        let state_dir = Some(state_dir(run_dir, &name));
        Settings { part: Some(Part { index, of }), peer: Some(name), state_dir, ..settings.clone() }
    };
    (1..=of).map(one).collect()
}

fn state_dir(run_dir: &Path, peer: &PeerId) -> PathBuf {
    run_dir.join(PEERS).join(peer.as_str())
}

fn name_in(settings: &Settings) -> PeerId {
    settings.peer.clone().expect("a peer of a cluster is named")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Layers;

    fn settings(peers: usize) -> Settings {
        Settings { peers, ..Layers::new().settings().unwrap() }
    }

    #[test]
    fn names_are_in_the_order_of_their_numbers() {
        let names = |peers| -> Vec<String> {
            peer_settings(&settings(peers), Path::new("run")).iter().map(|one| name_in(one).to_string()).collect()
        };
        assert_eq!(names(2), ["peer-1", "peer-2"]);
        assert_eq!(names(10)[..2], ["peer-01", "peer-02"]);
        assert!(names(100).is_sorted());
    }

    #[test]
    fn every_peer_has_its_own_part_and_directory() {
        let peers = peer_settings(&settings(3), Path::new("run"));
        let parts: Vec<_> = peers.iter().map(|one| one.part.unwrap().to_string()).collect();
        assert_eq!(parts, ["1/3", "2/3", "3/3"]);
        assert_eq!(peers[2].state_dir.as_deref(), Some(Path::new("run/peers/peer-3")));
    }

    #[test]
    fn a_broker_on_all_addresses_is_reached_on_this_machine() {
        for (listens, reached) in
            [("0.0.0.0:1883", "127.0.0.1:1883"), ("[::]:1883", "[::1]:1883"), ("192.168.1.20:1", "192.168.1.20:1")]
        {
            assert_eq!(reachable_at(listens.parse().unwrap()).to_string(), reached);
        }
    }

    #[tokio::test]
    async fn a_broker_is_announced_where_it_is_of_use() {
        let at = async |listen: &str, brokers: &[&str]| {
            let brokers: Vec<String> = brokers.iter().map(|broker| (*broker).to_owned()).collect();
            advertised_at(listen.parse().unwrap(), &brokers).await.map(|address| address.to_string())
        };
        assert_eq!(at("192.168.1.20:7", &[]).await.as_deref(), Some("192.168.1.20:7"));
        assert_eq!(at("127.0.0.1:7", &[]).await.as_deref(), Some("127.0.0.1:7"));
        assert_eq!(at("127.0.0.1:7", &["127.0.0.1:1"]).await.as_deref(), Some("127.0.0.1:7"));
        assert_eq!(at("127.0.0.1:7", &["192.0.2.1:1"]).await, None, "others would look for it on their machines");
        // Which addresses this machine has is its own affair, but there is one.
        assert!(at("0.0.0.0:7", &["127.0.0.1:1"]).await.is_some_and(|address| address.ends_with(":7")));
    }

    #[tokio::test]
    async fn a_broker_listens_where_a_name_points() {
        let broker = start_broker("localhost:0", 2, 1 << 16).await.unwrap();
        assert!(broker.addr().ip().is_loopback() && broker.addr().port() > 0);
        let taken = start_broker(&broker.addr().to_string(), 2, 1 << 16).await;
        assert!(matches!(taken, Err(ClusterError::Broker(BrokerError::InUse(addr))) if addr == broker.addr()));
        broker.stop().await;
    }
}
