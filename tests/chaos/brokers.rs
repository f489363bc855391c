//! The broker dies or sleeps, alone or with the peer that carries it. All peers know a standby.

use std::net::TcpListener;
use std::time::SystemTime;

use rodizio::events::Event;
use rodizio::types::PeerId;

use crate::federation::{Federation, Figures, Joining, PEERS, STANDBY, peers};
use crate::hosts::own_host;
use crate::processes::Surroundings;
use crate::signals::signal;
use crate::stage::{LONG_TRAINING, Stage};

/// What the peer that carries the broker is in the struck round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Role {
    Leader,
    Trainer,
}

/// The host of the first broker is killed; the second peer carries the standby.
pub(crate) fn host_dies(stage: Stage, role: Role, seed: u64) -> Figures {
    let policy = match role {
        Role::Leader => "fixed:peer-1",
        Role::Trainer => "fixed:peer-3",
    };
    let settings = [stage.settings(), &["--policy", policy]].concat();
    let mut federation = Federation::new(seed, 4, &settings);
    let brokers = free_addresses();
    gather(&mut federation, &brokers, &brokers);
    let host = peers().remove(0);
    stage.wait(&mut federation);
    let killed = federation.kill(&host);
    federation.conclude(&[&host]);
    let leader = (role == Role::Leader).then_some(&host);
    let moved = (STANDBY, federation.moved_to(&brokers[1], &[&host], killed));
    federation.recovery(leader, killed).into_iter().chain([moved]).collect()
}

/// The first of two brokers that are processes of their own is killed.
pub(crate) fn broker_dies(seed: u64) -> Figures {
    broker_fails(seed, "KILL", |_| ())
}

/// The first of two brokers stands still, with its connections open, until the peers have gone to the other.
pub(crate) fn broker_freezes(seed: u64) -> Figures {
    broker_fails(seed, "STOP", |pid| signal("CONT", &[pid]))
}

fn broker_fails(seed: u64, how: &str, then: impl Fn(u32)) -> Figures {
    let mut federation = Federation::new(seed, 6, &LONG_TRAINING);
    let nowhere = Surroundings::default();
    let (pid, first) = federation.broker("broker-1", "127.0.0.1:0", &nowhere);
    let (_, second) = federation.broker("broker-2", "127.0.0.1:0", &nowhere);
    gather(&mut federation, &[first, second.clone()], &[]);
    Stage::Gathering.wait(&mut federation);
    let (mark, failed) = (federation.mark(), SystemTime::now());
    signal(how, &[pid]);
    federation.until_all("all on the standby", |entries| {
        let there = entries.iter().skip(mark);
        let there = there.filter(|entry| matches!(&entry.event, Event::Connected { broker } if *broker == second));
        (there.count() >= PEERS).then_some(())
    });
    then(pid);
    federation.conclude(&[]);
    let moved = (STANDBY, federation.moved_to(&second, &[], failed));
    federation.recovery(None, failed).into_iter().chain([moved]).collect()
}

/// Starts all peers. The first ones carry a broker each. They meet at the first broker: it is there before the others
/// look for it.
fn gather(federation: &mut Federation, brokers: &[String], carried: &[String]) {
    for (number, peer) in (1..).zip(peers()) {
        let listen = carried.get(number - 1).cloned();
        let joining = Joining { brokers: brokers.to_vec(), listen, ..Joining::default() };
        federation.join(&peer, number, &joining);
        if number == 1 {
            federation.until("the first peer", 0, |entry| is_at(&peer, &entry.peer, &entry.event));
        }
    }
}

fn is_at(peer: &PeerId, who: &PeerId, event: &Event) -> bool {
    peer == who && matches!(event, Event::Connected { .. })
}

/// Addresses that are free, and stay so: nobody else takes a port of this host.
fn free_addresses() -> [String; 2] {
    let host = own_host();
    let probes = [(); 2].map(|()| TcpListener::bind((host, 0)).unwrap());
    probes.map(|probe| probe.local_addr().unwrap().to_string())
}
