//! Peers die, leave, come and come back, one or all.

use std::time::SystemTime;

use rodizio::events::Event;
use rodizio::types::PeerId;

use crate::federation::{CALM, COMMITTED, Federation, Figures, PART, peers};
use crate::processes::End;
use crate::signals::signal;
use crate::stage::{LONG_TRAINING, Stage, has_part_in};

pub(crate) fn trainer_dies(stage: Stage, seed: u64) -> Figures {
    let mut federation = Federation::start(seed, 4, stage.settings());
    let (_, trainer) = stage.wait(&mut federation);
    let killed = federation.kill(&trainer);
    federation.conclude(&[&trainer]);
    assert!(!federation.took_part(&trainer), "seed {seed}: the dead are not waited for");
    federation.recovery(None, killed)
}

pub(crate) fn all_die(seed: u64) -> Figures {
    let mut federation = Federation::start(seed, 4, &LONG_TRAINING);
    Stage::Gathering.wait(&mut federation);
    federation.kill_all();
    federation.hear();
    let mark = federation.mark();
    let restarted = federation.restart();
    let next = federation.until("the next commit", mark, |entry| matches!(&entry.event, Event::RoundCommitted(_)));
    federation.conclude(&[]);
    let taken = next.time.duration_since(restarted).unwrap_or_default();
    Figures::from([(COMMITTED, taken), (CALM, federation.calm_round())])
}

pub(crate) fn killed_one_comes_back(seed: u64) -> Figures {
    let mut federation = Federation::start(seed, 8, &LONG_TRAINING);
    let (_, peer) = Stage::Gathering.wait(&mut federation);
    let mark = federation.mark();
    federation.kill(&peer);
    federation.until("its last will", mark, |entry| matches!(&entry.event, Event::Left { who } if *who == peer));
    comes_back(federation, &peer)
}

pub(crate) fn one_leaves(seed: u64) -> Figures {
    let mut federation = Federation::start(seed, 4, &LONG_TRAINING);
    let (_, peer) = Stage::Gathering.wait(&mut federation);
    let left = say_goodbye(&mut federation, &peer);
    federation.conclude(&[&peer]);
    federation.recovery(None, left)
}

pub(crate) fn leader_leaves(seed: u64) -> Figures {
    let mut federation = Federation::start(seed, 4, &LONG_TRAINING);
    let (leader, _) = Stage::Gathering.wait(&mut federation);
    let left = say_goodbye(&mut federation, &leader);
    federation.conclude(&[&leader]);
    federation.recovery(Some(&leader), left)
}

pub(crate) fn one_leaves_and_comes_back(seed: u64) -> Figures {
    let mut federation = Federation::start(seed, 8, &LONG_TRAINING);
    let (_, peer) = Stage::Gathering.wait(&mut federation);
    say_goodbye(&mut federation, &peer);
    comes_back(federation, &peer)
}

/// Ctrl-C. Waits until the others know of it; returns when it was sent.
fn say_goodbye(federation: &mut Federation, peer: &PeerId) -> SystemTime {
    let (mark, now) = (federation.mark(), SystemTime::now());
    signal("INT", &[federation.pid(peer)]);
    federation.until("its goodbye", mark, |entry| matches!(&entry.event, Event::Left { who } if who == peer));
    federation.until("its last word", mark, |entry| entry.peer == *peer && entry.event == Event::Interrupted);
    federation.expect_end(peer, End::Code(130));
    now
}

/// The peer is started again with its state directory.
fn comes_back(federation: Federation, peer: &PeerId) -> Figures {
    federation.wait_for_release(peer);
    let number = 1 + peers().iter().position(|other| other == peer).unwrap();
    let (mark, joining) = (federation.mark(), federation.meeting_at());
    gets_a_part(federation, mark, peer, |federation| federation.join(peer, number, &joining))
}

pub(crate) fn newcomer_joins_in_the_middle_of_a_round(seed: u64) -> Figures {
    let mut federation = Federation::start(seed, 8, &LONG_TRAINING);
    Stage::Gathering.wait(&mut federation);
    let (mark, joining, late) = (federation.mark(), federation.meeting_at(), PeerId::new("late").unwrap());
    gets_a_part(federation, mark, &late, |federation| federation.join(&late, 1, &joining))
}

fn gets_a_part(mut federation: Federation, mark: usize, peer: &PeerId, join: impl Fn(&mut Federation)) -> Figures {
    let joins = SystemTime::now();
    join(&mut federation);
    let part = federation.until("its part in a round", mark, |entry| has_part_in(&entry.event, peer));
    federation.conclude(&[]);
    Figures::from([(PART, part.time.duration_since(joins).unwrap_or_default()), (CALM, federation.calm_round())])
}
