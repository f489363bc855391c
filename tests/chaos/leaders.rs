//! The leader dies or sleeps.

use std::time::SystemTime;

use rodizio::events::Event;

use crate::federation::{Federation, Figures, STRUCK};
use crate::signals::signal;
use crate::stage::{LONG_TRAINING, Stage, is_commit_of};

pub(crate) fn dies(stage: Stage, seed: u64) -> Figures {
    let mut federation = Federation::start(seed, 4, stage.settings());
    let (leader, _) = stage.wait(&mut federation);
    let killed = federation.kill(&leader);
    federation.conclude(&[&leader]);
    federation.recovery(Some(&leader), killed)
}

pub(crate) fn freezes(seed: u64) -> Figures {
    let settings = [&LONG_TRAINING[..], &["--election-timeout", "500ms"]].concat();
    sleeps(
        seed,
        &settings,
        |event, leader| matches!(event, Event::Elected { round: STRUCK, leader: next, .. } if next.as_str() != leader),
    )
}

pub(crate) fn freezes_with_defaults(seed: u64) -> Figures {
    sleeps(
        seed,
        &LONG_TRAINING,
        |event, leader| matches!(event, Event::Elected { round: STRUCK, leader: next, .. } if next.as_str() != leader),
    )
}

pub(crate) fn sleeps_through_a_round(seed: u64) -> Figures {
    let settings = [&LONG_TRAINING[..], &["--election-timeout", "500ms"]].concat();
    sleeps(seed, &settings, |event, _| is_commit_of(event, STRUCK))
}

/// The leader is stopped until something happens that ends its sleep. What it says then is of the past.
fn sleeps(seed: u64, settings: &[&str], wakes: impl Fn(&Event, &str) -> bool) -> Figures {
    let mut federation = Federation::start(seed, 8, settings);
    let (leader, _) = Stage::Electing.wait(&mut federation);
    let frozen = SystemTime::now();
    signal("STOP", &[federation.pid(&leader)]);
    federation.until("the end of its sleep", 0, |entry| wakes(&entry.event, leader.as_str()));
    signal("CONT", &[federation.pid(&leader)]);
    federation.conclude(&[]);
    assert!(federation.took_part(&leader), "seed {seed}: {leader} stays out");
    federation.recovery(Some(&leader), frozen)
}
