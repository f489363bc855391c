//! Brokers that die, freeze, come back or cannot be reached by all: the federation goes on, and stays one.

mod common {
    pub(crate) mod hosts;
    pub(crate) mod peers;
}

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use common::hosts::own_host;
use common::peers::{Peers, Running, commit, peer};
use rodizio::broker::{Broker, BrokerConfig};
use rodizio::cluster::{self, start_broker};
use rodizio::config::{Layers, Part, Settings};
use rodizio::events::{Entry, Event};
use rodizio::node::{Hosted, Outcome};
use rodizio::peer::{LocalPeer, PeerError};
use rodizio::types::{Address, Digest, PeerId, Round};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// What is waited for comes within this, or never.
const LIMIT: Duration = Duration::from_secs(600);

/// More rounds than any test lasts.
const ENDLESS: u64 = 1_000_000;

const CHUNK_BYTES: usize = 16 << 10;

/// What a gate does with the connections through it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Traffic {
    /// Passes everything.
    Free,
    /// Passes so many bytes a second towards the peer, on each connection.
    Slow(u64),
    /// Passes nothing and closes nothing, as a cut line or a frozen broker.
    Stuck,
    /// Closes connections, and every new one at once.
    Shut,
}

/// One peer's way to one broker, which a test can cut and slow down.
struct Gate {
    addr: SocketAddr,
    traffic: watch::Sender<Traffic>,
    _task: JoinSet<()>,
}

impl Gate {
    async fn to(broker: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (traffic, state) = watch::channel(Traffic::Free);
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (peer, _) = listener.accept().await.unwrap();
                connections.spawn(pass(peer, broker, state.clone()));
                while connections.try_join_next().is_some() {}
            }
        });
        Self { addr, traffic, _task: task }
    }

    fn set(&self, traffic: Traffic) {
        self.traffic.send_replace(traffic);
    }
}

/// Passes bytes both ways until an end closes or the gate is shut.
async fn pass(peer: TcpStream, broker: SocketAddr, mut state: watch::Receiver<Traffic>) {
    if *state.borrow() == Traffic::Shut {
        return;
    }
    let Ok(broker) = TcpStream::connect(broker).await else { return };
    let (mut from_peer, mut to_peer) = peer.into_split();
    let (mut from_broker, mut to_broker) = broker.into_split();
    let (mut down, mut up) = (state.clone(), state.clone());
    let downwards = async {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(bytes @ 1..) = from_broker.read(&mut buffer).await {
            if down.wait_for(|traffic| *traffic != Traffic::Stuck).await.is_err() {
                // The test is over.
                return;
            }
            let traffic = *down.borrow();
            if let Traffic::Slow(bytes_a_second) = traffic {
                // The pace of the line; nothing waits for this.
                sleep(Duration::from_secs_f64(bytes as f64 / bytes_a_second as f64)).await;
            }
            if to_peer.write_all(&buffer[..bytes]).await.is_err() {
                return;
            }
        }
    };
    let upwards = async {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(bytes @ 1..) = from_peer.read(&mut buffer).await {
            if up.wait_for(|traffic| *traffic != Traffic::Stuck).await.is_err() {
                return;
            }
            if to_broker.write_all(&buffer[..bytes]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = downwards => {}
        () = upwards => {}
        _ = state.wait_for(|traffic| *traffic == Traffic::Shut) => {}
    }
}

impl Peers {
    /// Starts one of `of` peers, which may host a broker.
    fn start(&self, name: &str, index: usize, settings: &Settings, hosted: Option<&Broker>) -> Running {
        let state_dir = Some(self.dir.path().join(name));
        let part = Some(Part { index, of: settings.peers });
        let settings = Settings { peer: Some(peer(name)), state_dir, part, ..settings.clone() };
        let peer = LocalPeer::open(&settings).unwrap();
        let peer = match hosted {
            Some(broker) => peer.hosting(Hosted {
                local: broker.addr().to_string(),
                advertised: Some(Address::new(&broker.addr().to_string()).unwrap()),
            }),
            None => peer,
        };
        cluster::spawn(peer, &self.stop, &self.sender)
    }

    /// Waits until each of `names` has told something.
    async fn until_all(&mut self, what: &str, names: &[&str], wanted: impl Fn(&Event) -> bool) {
        let mut missing: BTreeSet<PeerId> = names.iter().map(|name| peer(name)).collect();
        let all_told = |entry: &Entry| {
            if wanted(&entry.event) {
                missing.remove(&entry.peer);
            }
            missing.is_empty().then_some(())
        };
        self.until(what, all_told).await;
    }

    async fn until_committed(&mut self, round: u64, names: &[&str]) {
        let committed = |event: &Event| matches!(event, Event::RoundCommitted(commit) if commit.round.0 >= round);
        self.until_all(&format!("round {round}"), names, committed).await;
    }

    /// Stops all peers.
    async fn interrupt(&mut self, running: Vec<Running>) {
        self.request.send(true).unwrap();
        let outcomes = self.ends(running).await;
        assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Interrupted), "{outcomes:?}\n{}", self.told());
    }

    /// Nobody trained a round twice.
    fn check_trained_once(&self) {
        let mut seen = BTreeSet::new();
        for entry in &self.heard {
            if let Event::Trained { round, .. } = entry.event {
                assert!(seen.insert((&entry.peer, round)), "{} trained {round:?} twice:\n{}", entry.peer, self.told());
            }
        }
    }

    /// Where each peer was connected last.
    fn connected(&self) -> BTreeMap<&PeerId, &str> {
        let connected = self.heard.iter().filter_map(|entry| match &entry.event {
            Event::Connected { broker } => Some((&entry.peer, broker.as_str())),
            _ => None,
        });
        connected.collect()
    }
}

fn is_at(broker: &Broker) -> impl Fn(&Event) -> bool + use<> {
    let addr = broker.addr().to_string();
    move |event| matches!(event, Event::Connected { broker } if *broker == addr)
}

/// The last model, which all have.
fn model(outcomes: &[Outcome]) -> Digest {
    let models: BTreeSet<Digest> = outcomes
        .iter()
        .map(|outcome| match outcome {
            Outcome::Finished { model, .. } => *model,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(models.len(), 1, "{outcomes:?}");
    models.into_iter().next().unwrap()
}

async fn broker() -> Broker {
    start_broker("127.0.0.1:0", 8, CHUNK_BYTES).await.unwrap()
}

/// A broker that comes back at its port, which nobody takes meanwhile.
async fn returning_broker() -> Broker {
    start_broker(&format!("{}:0", own_host()), 8, CHUNK_BYTES).await.unwrap()
}

/// The settings of a federation of `peers` that are told of `brokers`.
fn settings(peers: usize, rounds: u64, brokers: &[SocketAddr]) -> Settings {
    Settings {
        peers,
        min_peers: peers,
        rounds,
        local_epochs: 1,
        chunk_bytes: CHUNK_BYTES,
        // A busy machine is not to make its leaders seem silent.
        election_timeout: Duration::from_secs(10),
        round_timeout: Duration::from_secs(600),
        settle_time: Duration::from_millis(20),
        // Who gives up says what is missing, and says so before the test gives up.
        wait_timeout: LIMIT / 2,
        brokers: brokers.iter().map(SocketAddr::to_string).collect(),
        ..Layers::new().settings().unwrap()
    }
}

/// For tests in which peers have to miss each other first.
fn impatient(settings: Settings) -> Settings {
    Settings { election_timeout: Duration::from_secs(1), ..settings }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_dies_while_updates_are_gathered_costs_no_training_and_no_chunk() {
    const NAMES: [&str; 4] = ["a", "b", "c", "d"];
    let mut place = Peers::new(LIMIT);
    let (first, standby) = (broker().await, broker().await);
    let mut gates = Vec::new();
    let mut running = Vec::new();
    for (name, index) in NAMES.iter().zip(1..) {
        let gate = Gate::to(first.addr()).await;
        // One update takes two seconds, so that there is time to strike when the first of three is in.
        gate.set(Traffic::Slow(300_000));
        // What comes late is not to be asked for twice.
        let election_timeout = Duration::from_secs(30);
        let settings = Settings { hidden: vec![512, 256], election_timeout, ..settings(4, 3, &[gate.addr]) };
        // Nobody types the standby: the others learn of it from its host.
        running.push(place.start(name, index, &settings, (*name == "b").then_some(&standby)));
        gates.push(gate);
    }
    let some = |entry: &Entry| match &entry.event {
        Event::Gathered { round: Round(1), done: done @ 1.., total } => Some((entry.peer.clone(), *done, *total)),
        _ => None,
    };
    let (leader, done, total) = place.until("the first update", some).await;
    assert!(done < total, "all updates came before the broker could be stopped");
    let died = std::time::Instant::now();
    for gate in &gates {
        gate.set(Traffic::Shut);
    }
    first.stop().await;
    place.until_all("the standby", &NAMES, is_at(&standby)).await;
    eprintln!("all peers are at the standby after {:?}", died.elapsed());

    let outcomes = place.ends(running).await;
    model(&outcomes);
    assert_eq!(place.rounds().len(), 3, "{}", place.told());
    place.check_trained_once();
    let told = place.heard.iter().filter(|entry| entry.peer == leader).filter_map(commit);
    let round = told.clone().find(|commit| commit.round == Round(1)).expect("the leader told of round 1");
    assert_eq!((&round.leader, round.term.0), (&leader, 0), "it led on:\n{}", place.told());
    assert_eq!(round.contributors.len(), 3);
    // It hears three updates and small messages; its own broadcast does not come back to it. What came twice would show
    // here.
    let model_bytes = 4 * (64 * 512 + 512 + 512 * 256 + 256 + 256 * 10 + 10);
    let least = 3 * model_bytes;
    eprintln!("{} bytes came in all, of at least {least}; {done} updates before", round.bytes_received);
    assert!(round.bytes_received >= least);
    assert!(round.bytes_received < least + model_bytes / 4, "chunks were sent again:\n{}", place.told());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_comes_back_draws_nobody_away_and_who_restarts_knows_the_standby() {
    const NAMES: [&str; 3] = ["a", "b", "c"];
    let mut place = Peers::new(LIMIT);
    let (first, standby) = (returning_broker().await, broker().await);
    let settings = impatient(settings(3, ENDLESS, &[first.addr()]));
    let mut running: Vec<_> = NAMES
        .iter()
        .zip(1..)
        .map(|(name, index)| place.start(name, index, &settings, (*name == "c").then_some(&standby)))
        .collect();
    place.until_committed(1, &NAMES).await;
    let addr = first.addr();
    first.stop().await;
    place.until_all("the standby", &NAMES, is_at(&standby)).await;

    // Its configuration names a broker that is gone; its state directory names the standby.
    running.remove(0).abort();
    let left = |entry: &Entry| matches!(&entry.event, Event::Left { who } if *who == peer("a")).then_some(());
    place.until("the end of a", left).await;
    let of_a = Settings {
        peer: Some(peer("a")),
        state_dir: Some(place.dir.path().join("a")),
        part: Some(Part { index: 1, of: 3 }),
        ..settings.clone()
    };
    let free = timeout(LIMIT, async {
        while let Err(PeerError::Journal(_)) = LocalPeer::open(&of_a) {
            sleep(Duration::from_millis(10)).await;
        }
    });
    free.await.expect("its state directory stays in use");
    running.push(place.start("a", 1, &settings, None));
    place.until_all("a at the standby", &["a"], is_at(&standby)).await;
    let contributes = |entry: &Entry| commit(entry).filter(|commit| commit.contributors.contains(&peer("a"))).cloned();
    let round = place.until("the update of a", contributes).await.round.0;

    let back = BrokerConfig { listen: addr, ..BrokerConfig::for_chunks(CHUNK_BYTES) };
    let back = Broker::start(back).await.unwrap();
    place.until_committed(round + 20, &NAMES).await;
    place.interrupt(running).await;
    let wanted = standby.addr().to_string();
    assert!(place.connected().values().all(|broker| *broker == wanted), "{}", place.told());
    let moved = |entry: &&Entry| matches!(entry.event, Event::Moved { .. });
    assert_eq!(place.heard.iter().filter(moved).count(), 0, "{}", place.told());
    place.rounds();
    place.check_trained_once();
    back.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_groups_on_two_brokers_decide_nothing_and_find_each_other() {
    const NAMES: [&str; 4] = ["a", "b", "c", "d"];
    let mut place = Peers::new(LIMIT);
    let (first, second) = (broker().await, broker().await);
    let mut gates = Vec::new();
    let mut running = Vec::new();
    for (name, index) in NAMES.iter().zip(1..) {
        let (to_first, to_second) = (Gate::to(first.addr()).await, Gate::to(second.addr()).await);
        let settings = impatient(settings(4, ENDLESS, &[to_first.addr, to_second.addr]));
        running.push(place.start(name, index, &settings, None));
        gates.push([to_first, to_second]);
    }
    place.until_committed(1, &NAMES).await;
    for (index, [to_first, to_second]) in gates.iter().enumerate() {
        let shut = if index < 2 { to_second } else { to_first };
        shut.set(Traffic::Shut);
    }
    // Of two who are left with the leader of their round only that one misses the others: members hear nobody else.
    let apart = |event: &Event| matches!(event, Event::Waiting { what: Some(what) } if what.contains("majority"));
    let mut alone = BTreeSet::new();
    let both_apart = |entry: &Entry| {
        if apart(&entry.event) {
            alone.insert(NAMES[..2].contains(&entry.peer.as_str()));
        }
        (alone.len() == 2).then_some(())
    };
    place.until("word from both sides that there is no majority", both_apart).await;
    let decided = place.rounds().len() as u64;
    for gate in gates.iter().flatten() {
        gate.set(Traffic::Free);
    }
    place.until_committed(decided + 3, &NAMES).await;
    let looked = |entry: &&Entry| matches!(entry.event, Event::Moved { .. });
    assert!(place.heard.iter().any(|entry| looked(&entry)), "{}", place.told());
    place.interrupt(running).await;
    place.rounds();
    place.check_trained_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn before_there_is_a_federation_peers_at_different_brokers_find_each_other() {
    let mut place = Peers::new(LIMIT);
    let (first, second) = (broker().await, broker().await);
    let mut running = Vec::new();
    for (name, index) in ["a", "b", "c"].iter().zip(1..) {
        // One of them was told the brokers in another order.
        let brokers = if *name == "c" { [second.addr(), first.addr()] } else { [first.addr(), second.addr()] };
        running.push(place.start(name, index, &impatient(settings(3, 2, &brokers)), None));
    }
    let outcomes = place.ends(running).await;
    model(&outcomes);
    assert_eq!(place.rounds().len(), 2, "{}", place.told());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_returns_alone_to_its_own_broker_joins_the_others_at_the_standby() {
    let mut place = Peers::new(LIMIT);
    let (first, standby) = (returning_broker().await, broker().await);
    let addr = first.addr();
    let of_host = impatient(settings(3, ENDLESS, &[]));
    let of_others = impatient(settings(3, ENDLESS, &[addr]));
    let host = place.start("a", 1, &of_host, Some(&first));
    let mut running = vec![place.start("b", 2, &of_others, Some(&standby)), place.start("c", 3, &of_others, None)];
    place.until_committed(1, &["a", "b", "c"]).await;
    host.abort();
    first.stop().await;
    place.until_all("the standby", &["b", "c"], is_at(&standby)).await;
    place.until_committed(place.rounds().len() as u64 + 1, &["b", "c"]).await;

    let again = BrokerConfig { listen: addr, ..BrokerConfig::for_chunks(CHUNK_BYTES) };
    let again = Broker::start(again).await.unwrap();
    running.push(place.start("a", 1, &of_host, Some(&again)));
    place.until_all("a at its own broker", &["a"], is_at(&again)).await;
    place.until_all("a at the standby", &["a"], is_at(&standby)).await;
    let contributes = |entry: &Entry| commit(entry).filter(|commit| commit.contributors.contains(&peer("a"))).cloned();
    place.until("the update of a", contributes).await;
    let back = |entry: &&Entry| entry.peer != peer("a") && matches!(entry.event, Event::Moved { .. });
    assert_eq!(place.heard.iter().filter(back).count(), 0, "{}", place.told());
    place.interrupt(running).await;
    place.rounds();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_freezes_is_left_for_the_standby() {
    const NAMES: [&str; 3] = ["a", "b", "c"];
    let mut place = Peers::new(LIMIT);
    let (first, standby) = (broker().await, broker().await);
    let mut gates = Vec::new();
    let mut running = Vec::new();
    for (name, index) in NAMES.iter().zip(1..) {
        let gate = Gate::to(first.addr()).await;
        let settings = settings(3, ENDLESS, &[gate.addr]);
        running.push(place.start(name, index, &settings, (*name == "c").then_some(&standby)));
        gates.push(gate);
    }
    place.until_committed(3, &NAMES).await;
    let froze = std::time::Instant::now();
    for gate in &gates {
        gate.set(Traffic::Stuck);
    }
    place.until_all("the standby", &NAMES, is_at(&standby)).await;
    eprintln!("all peers are at the standby after {:?}", froze.elapsed());
    let decided = place.rounds().len() as u64;
    place.until_committed(decided + 2, &NAMES).await;
    place.interrupt(running).await;
    place.rounds();
    place.check_trained_once();
}
