//! Peers on networks of their own: links that delay and lose, and links that are cut.

use std::thread;
use std::time::{Duration, SystemTime};

use rodizio::types::PeerId;

use crate::federation::{CALM, COMMITTED, Federation, Figures, Joining, PART, PEERS, STRUCK, peers};
use crate::network::{HUB, Network, Weather};
use crate::stage::{LONG_TRAINING, Stage, has_part_in, is_commit_of};

/// 100 ms ± 50 ms each way, and 5 % of all frames lost.
const BAD: Weather = Weather { delay: Duration::from_millis(100), jitter: Duration::from_millis(50), loss_percent: 5 };

/// 300 ms each way, and 5 % of all frames lost.
const SLOW: Weather = Weather { delay: Duration::from_millis(300), jitter: Duration::ZERO, loss_percent: 5 };

/// Whose links are cut.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cut {
    Trainer,
    Leader,
    /// The leader and a trainer: neither side has a majority.
    Half,
}

/// A broker at the hub, and a peer at each site.
fn gather(seed: u64, rounds: u64, settings: &[&str], weather: Weather) -> Federation {
    let mut federation = Federation::new(seed, rounds, settings);
    let network = Network::new(PEERS, weather, seed);
    let (_, broker) = federation.broker("broker", HUB, &network.at_hub());
    for (site, peer) in peers().iter().enumerate() {
        let joining = Joining { brokers: vec![broker.clone()], listen: None, surroundings: network.at(site) };
        federation.join(peer, site + 1, &joining);
    }
    federation.network = Some(network);
    federation
}

/// A run of so many rounds, in which no leader is given up: all that happens is that messages are late.
fn runs_in(weather: Weather, seed: u64, rounds: u64) -> Figures {
    let mut federation = gather(seed, rounds, &["--local-epochs", "5"], weather);
    federation.conclude(&[]);
    let needless = federation.later_terms();
    assert!(needless.is_empty(), "seed {seed}: leaders were given up that did nothing wrong: {needless:?}");
    Figures::from([(CALM, federation.calm_round())])
}

pub(crate) fn bad_links(seed: u64) -> Figures {
    runs_in(BAD, seed, 10)
}

pub(crate) fn slow_links(seed: u64) -> Figures {
    runs_in(SLOW, seed, 10)
}

/// Links that are cut for 20 s, with the default settings.
pub(crate) fn cut(who: Cut, seed: u64) -> Figures {
    // Rounds of two seconds or so: the run is to last longer than the cut.
    cut_for(Duration::from_secs(20), who, seed, 30, &["--local-epochs", "400"])
}

/// Links that are cut for 4 s, with an election timeout that is shorter to match.
pub(crate) fn cut_shortly(who: Cut, seed: u64) -> Figures {
    cut_for(Duration::from_secs(4), who, seed, 30, &[&LONG_TRAINING[..], &["--election-timeout", "500ms"]].concat())
}

fn cut_for(length: Duration, who: Cut, seed: u64, rounds: u64, settings: &[&str]) -> Figures {
    let mut federation = gather(seed, rounds, settings, Weather::default());
    let (leader, trainer) = Stage::Electing.wait(&mut federation);
    let cut: Vec<&PeerId> = match who {
        Cut::Trainer => vec![&trainer],
        Cut::Leader => vec![&leader],
        Cut::Half => vec![&leader, &trainer],
    };
    let sites = |cut: &[&PeerId]| -> Vec<usize> {
        (0..PEERS).zip(peers()).filter(|(_, peer)| cut.contains(&peer)).map(|(site, _)| site).collect()
    };
    let started = SystemTime::now();
    for site in sites(&cut) {
        federation.network.as_ref().unwrap().cut(site);
    }
    thread::sleep(length);
    federation.hear();
    let (mark, mended) = (federation.mark(), SystemTime::now());
    for site in sites(&cut) {
        federation.network.as_ref().unwrap().mend(site);
    }
    if let Cut::Half = who {
        let struck = federation.committed().any(|(entry, committed)| committed.round == STRUCK && entry.time > started);
        assert!(!struck, "seed {seed}: half of the peers decided a round");
        let next = federation.until("the next commit", mark, |entry| is_commit_of(&entry.event, STRUCK));
        federation.conclude(&[]);
        return Figures::from([(COMMITTED, next.time.duration_since(mended).unwrap_or_default())]);
    }
    let back = federation.until("its part in a round", mark, |entry| has_part_in(&entry.event, cut[0]));
    federation.conclude(&[]);
    let part = (PART, back.time.duration_since(mended).unwrap_or_default());
    let leader = matches!(who, Cut::Leader).then_some(&leader);
    federation.recovery(leader, started).into_iter().chain([part]).collect()
}
