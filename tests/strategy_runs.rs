//! Each strategy by its name, as `rodizio run` runs it: real peers at the embedded broker, a small model, few rounds.

mod common {
    pub(crate) mod peers;
}

use std::sync::Arc;
use std::time::Duration;

use common::peers::{Peers, Running, commit, peer};
use rodizio::aggregation::Section;
use rodizio::broker::Broker;
use rodizio::cluster::{self, Cluster, reachable_at, start_broker};
use rodizio::config::{Key, Kind, Layers, Part, Settings};
use rodizio::events::{Entry, Event};
use rodizio::journal::Journal;
use rodizio::node::Outcome;
use rodizio::peer::LocalPeer;
use rodizio::protocol::Durable;
use rodizio::transfer::Codec;
use rodizio::types::{Digest, Round};
use rodizio::weights::Layout;
use tokio::time::timeout;

/// What is waited for comes within this, or never.
const LIMIT: Duration = Duration::from_secs(600);

/// Strategy, server optimizer, and peers: as many as the strategy asks for.
const RUNS: &[(&str, &str, usize)] = &[
    ("fedavg", "none", 4),
    ("fedprox", "none", 4),
    ("fedavgm", "none", 4),
    ("fedadagrad", "none", 4),
    ("fedadam", "none", 4),
    ("fedyogi", "none", 4),
    ("scaffold", "none", 4),
    ("fednova", "none", 4),
    ("median", "none", 4),
    ("trimmed-mean", "none", 4),
    ("krum", "none", 6),
    ("multi-krum", "none", 6),
    ("bulyan", "none", 8),
    ("norm-clip", "none", 4),
    ("fedavg", "momentum", 4),
    ("fedprox", "adam", 4),
    ("fednova", "adagrad", 4),
    ("median", "momentum", 4),
    ("trimmed-mean", "adagrad", 4),
    ("multi-krum", "adam", 6),
    ("norm-clip", "yogi", 4),
];

async fn broker() -> Broker {
    start_broker("127.0.0.1:0", 8, 64 << 10).await.unwrap()
}

/// What `rodizio run` makes of these flags.
fn settings(broker: &Broker, flags: &[(&str, &str)]) -> Settings {
    let own = [
        ("broker", reachable_at(broker.addr()).to_string()),
        ("policy", "rotate".into()),
        ("hidden", "16".into()),
        ("local_epochs", "1".into()),
        ("seed", "1".into()),
        // A busy machine is not to make leaders seem silent.
        ("election_timeout", "30s".into()),
        ("settle_time", "20ms".into()),
        ("wait_timeout", "5m".into()),
    ];
    let mut layers = Layers::new();
    let own = own.iter().map(|(key, text)| (*key, text.as_str()));
    for (key, text) in own.chain(flags.iter().copied()) {
        layers.flag(Key::find(key).unwrap(), text).unwrap();
    }
    layers.derive("min_peers", &layers.peers().to_string(), "as many as peers");
    layers.settings_of_run().unwrap()
}

/// Runs a federation to its end: the digest of the last model, which all peers have.
async fn run(peers: &mut Peers, settings: &Settings) -> Digest {
    let cluster = Cluster::open(settings, peers.dir.path()).unwrap().at_its_own_broker();
    let ended = timeout(LIMIT, cluster.run(&peers.stop, &peers.sender)).await;
    peers.ends(Vec::new()).await; // takes what was told
    let ended = ended.unwrap_or_else(|_| panic!("the federation does not end:\n{}", peers.told()));
    let digest = |outcome: &Outcome| match outcome {
        Outcome::Finished { model, .. } => *model,
        other => panic!("{other:?}\n{}", peers.told()),
    };
    let digests: Vec<Digest> = ended.iter().map(|(_, outcome)| digest(outcome.as_ref().unwrap())).collect();
    assert_eq!(digests, vec![digests[0]; settings.peers], "{}", peers.told());
    digests[0]
}

/// The loss of the model of a round, over all peers.
fn loss(peers: &Peers, of: u64) -> f64 {
    let loss = |entry: &Entry| match entry.event {
        Event::Evaluated { round, val_loss, .. } if round.0 == of => Some(val_loss),
        _ => None,
    };
    peers.heard.iter().find_map(loss).unwrap_or_else(|| panic!("nobody measured round {of}:\n{}", peers.told()))
}

/// Starts a peer with the part of the data of its place in `NAMES`.
fn start(peers: &Peers, settings: &Settings, name: &str) -> (Running, Arc<Layout>) {
    let index = 1 + NAMES.iter().position(|known| *known == name).unwrap();
    let (part, state_dir) = (Some(Part { index, of: NAMES.len() }), Some(peers.dir.path().join(name)));
    let opened = LocalPeer::open(&Settings { peer: Some(peer(name)), part, state_dir, ..settings.clone() }).unwrap();
    let layout = opened.layout();
    (cluster::spawn(opened, &peers.stop, &peers.sender), layout)
}

/// The peers that are started one by one.
const NAMES: [&str; 4] = ["a", "b", "c", "late"];

/// What a peer that is down has in its state directory.
struct Kept {
    round: Round,
    /// Of the section of the newest model's blob that is asked for.
    remembered: Vec<f32>,
    /// The peer's own control variate, if it has one.
    control: Option<Vec<f32>>,
}

impl Kept {
    /// `None` of a peer that was stopped before it had pulled its head's model: it takes a majority to decide one.
    fn read(peers: &Peers, settings: &Settings, name: &str, layout: &Arc<Layout>, section: Section) -> Option<Self> {
        let (journal, durable) = open(peers, settings, name);
        let head = durable.head.expect("it has a head").decree;
        let strategy = settings.aggregation().unwrap();
        let blob = journal.blob(head.model().digest).unwrap()?;
        let values = Codec::F32.decode(&blob, &strategy.model_layout(layout)).unwrap().into_values();
        let place = strategy.sections().position(|there| there == section).unwrap();
        let remembered = values[place * layout.len()..(place + 1) * layout.len()].to_vec();
        let control = durable.control.map(|control| journal.blob(control).unwrap().expect("its own blob is here"));
        let control = control.map(|blob| Codec::F32.decode(&blob, layout).unwrap().into_values());
        Some(Self { round: head.round, remembered, control })
    }
}

fn open(peers: &Peers, settings: &Settings, name: &str) -> (Journal, Durable) {
    let (journal, loaded) = Journal::open(&peers.dir.path().join(name), &settings.federation, None).unwrap();
    (journal, Durable::decode(&loaded.state.unwrap()).unwrap())
}

/// The newest round that one of the peers has kept.
fn newest(peers: &Peers, settings: &Settings) -> u64 {
    let head = |name: &&str| open(peers, settings, name).1.head.expect("it has a head").decree.round.0;
    NAMES.iter().map(head).max().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_strategy_remembers_comes_to_who_joins_late_and_leads() {
    let broker = broker().await;
    for (strategy, section) in [("fedadam", Section::SecondMoment), ("scaffold", Section::Control)] {
        let mut peers = Peers::new(LIMIT);
        let flags = [
            ("federation", strategy),
            ("strategy", strategy),
            ("peers", "3"),
            ("policy", "fixed:late"),
            ("rounds", "1000000"),
            // Peers that stopped at different rounds find out by silence who cannot lead. Whoever else leads, late's turn comes.
            ("election_timeout", "2s"),
        ];
        let endless = settings(&broker, &flags);
        let (mut running, layouts): (Vec<_>, Vec<_>) =
            NAMES[..3].iter().map(|name| start(&peers, &endless, name)).unzip();
        peers.until("round 3", |entry| commit(entry).filter(|commit| commit.round.0 >= 3).map(|_| ())).await;
        peers.request.send(true).unwrap();
        peers.ends(running).await;
        let kept = NAMES[..3].iter().filter_map(|name| Kept::read(&peers, &endless, name, &layouts[0], section));
        let before = kept.max_by_key(|kept| kept.round).unwrap();

        peers.request.send(false).unwrap();
        running = NAMES.iter().map(|name| start(&peers, &endless, name).0).collect();
        let leads = |entry: &Entry| commit(entry).filter(|commit| commit.leader == peer("late")).map(|_| ());
        peers.until("a round that the newcomer led", leads).await;
        peers.request.send(true).unwrap();
        peers.ends(running).await;

        // To an end that all reach, and with a turn to train for the newcomer, which may have led ever since it came: it
        // has said goodbye, and the others may begin without it.
        peers.request.send(false).unwrap();
        let rounds = newest(&peers, &endless) + 20;
        let finite = Settings { rounds, policy: "rotate".into(), ..endless };
        running = NAMES.iter().rev().map(|name| start(&peers, &finite, name).0).collect();
        for outcome in peers.ends(running).await {
            assert!(matches!(outcome, Outcome::Finished { .. }), "{strategy}: {outcome:?}");
        }
        peers.rounds();
        let kept = |name: &&str| Kept::read(&peers, &finite, name, &layouts[0], section);
        let after: Vec<Kept> = NAMES.iter().map(|name| kept(name).expect("it has finished")).collect();
        assert!(after.iter().all(|kept| kept.remembered == after[0].remembered), "{strategy}:\n{}", peers.told());
        let pairs = before.remembered.iter().zip(&after[0].remembered);
        if strategy == "fedadam" {
            // No round takes more than a hundredth of it; who led without it would have begun anew.
            let least = 0.99f32.powi((rounds - before.round.0) as i32) * 0.999;
            let lost = pairs.clone().filter(|(before, after)| **after < **before * least).count();
            assert_eq!(lost, 0, "of {}", before.remembered.len());
        } else {
            for (place, sum) in after[0].remembered.iter().enumerate() {
                let own = after.iter().map(|kept| kept.control.as_ref().expect("all have trained")[place]);
                let own: f32 = own.sum();
                assert!((own - sum).abs() < 1e-3, "value {place}: {sum}, not {own}");
            }
            assert!(pairs.clone().any(|(before, _)| before.abs() > 1e-2));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_of_too_few_updates_for_its_strategy_is_told_by_all_and_the_next_one_comes() {
    let broker = broker().await;
    let mut peers = Peers::new(LIMIT);
    // The one that is lost may lead: its silence is not to last as long as elsewhere here.
    let flags = [("strategy", "median"), ("peers", "4"), ("rounds", "1000000"), ("election_timeout", "2s")];
    let endless = settings(&broker, &flags);
    let mut running: Vec<Running> = NAMES.iter().map(|name| start(&peers, &endless, name).0).collect();
    peers.until("round 2", |entry| commit(entry).filter(|commit| commit.round.0 >= 2).map(|_| ())).await;
    assert!(!peers.heard.iter().any(|entry| matches!(entry.event, Event::FewUpdates { .. })), "{}", peers.told());
    running.pop().unwrap().abort();
    for name in &NAMES[..3] {
        let few = |entry: &Entry| match entry.event {
            Event::FewUpdates { round, updates: 2, needed: 3 } if entry.peer == peer(name) => Some(round),
            _ => None,
        };
        let told = peers.heard.iter().find_map(few);
        let round = if let Some(round) = told { round } else { peers.until("word of few updates", few).await };
        peers.until("the next round", |entry| commit(entry).filter(|commit| commit.round > round).map(|_| ())).await;
    }
    peers.request.send(true).unwrap();
    peers.ends(running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_strategy_and_server_optimizer_learns_under_leaders_that_change_and_all_end_with_one_model() {
    let broker = broker().await;
    for (strategy, optimizer, count) in RUNS {
        let mut peers = Peers::new(LIMIT);
        let (name, count) = (format!("{strategy}-{optimizer}"), count.to_string());
        let flags = [
            ("federation", name.as_str()),
            ("strategy", strategy),
            ("server_optimizer", optimizer),
            ("peers", &count),
            ("rounds", "3"),
        ];
        let digest = run(&mut peers, &settings(&broker, &flags)).await;
        let rounds = peers.rounds();
        assert_eq!(rounds.len(), 3, "{name}:\n{}", peers.told());
        assert_eq!(rounds.last_key_value().unwrap().1.digest, digest, "{name}");
        let leaders: Vec<_> = rounds.values().map(|commit| &commit.leader).collect();
        assert!(leaders.windows(2).all(|pair| pair[0] != pair[1]), "{name}: {leaders:?}");
        let (before, after) = (loss(&peers, 0), loss(&peers, 3));
        println!("{name}: loss {before:.3}, then {after:.3}");
        assert!(after < before, "{name}: {before}, then {after}");
        let few = peers.heard.iter().filter(|entry| matches!(entry.event, Event::FewUpdates { .. }));
        assert_eq!(few.count(), 0, "{name}:\n{}", peers.told());
    }
}

#[test]
fn every_strategy_and_server_optimizer_is_run() {
    let words = |key: &str| match Key::find(key).unwrap().kind {
        Kind::Choice(words) => words,
        _ => panic!("{key} takes no words"),
    };
    for strategy in words("strategy") {
        assert!(RUNS.iter().any(|(name, ..)| name == strategy), "{strategy}");
    }
    for optimizer in words("server_optimizer") {
        assert!(RUNS.iter().any(|(_, name, _)| name == optimizer), "{optimizer}");
    }
}
