//! The program under faults, with real processes: no single failure stops a run.
//!
//! Each scenario starts a federation (`rodizio run --processes`, or `rodizio join` for each peer), follows its logs of
//! events until the moment to strike, and kills, stops or starts one of its processes, or cuts one of its links. Then
//! the run must end as if nothing had happened: see [`Federation::conclude`](federation::Federation::conclude).
//!
//! `cargo test` runs a short selection, each scenario once. `make chaos` runs each one `TRIALS` times, with other seeds
//! and so with other leaders, and prints how long recovery took. `FAULT=leader` selects scenarios by a part of their
//! names. What this machine does not permit (namespaces, time namespaces, libfaketime) is skipped, with the reason.

#![cfg(target_os = "linux")]

mod brokers;
mod clocks;
mod federation;
#[path = "../common/hosts.rs"]
mod hosts;
mod leaders;
mod links;
#[path = "../common/log.rs"]
mod log;
mod network;
mod peers;
mod processes;
#[path = "../common/signals.rs"]
mod signals;
mod stage;

use std::collections::BTreeMap;
use std::time::Duration;

use brokers::Role;
use federation::Figures;
use links::Cut;
use stage::Stage;

/// What a scenario needs that not every machine has.
#[derive(Clone, Copy)]
enum Needs {
    Nothing,
    Networks,
    FakeTime,
    TimeNamespaces,
}

impl Needs {
    /// Why it is not to be had here.
    fn obstacle(self) -> Option<&'static str> {
        match self {
            Needs::Nothing => None,
            Needs::Networks => network::obstacle(),
            Needs::FakeTime => clocks::obstacle_to_steps(),
            Needs::TimeNamespaces => clocks::obstacle_to_time_namespaces(),
        }
    }
}

/// A scenario by seed.
type Scenario = fn(u64) -> Figures;

/// Every scenario: what happens in it, what it needs, and how it goes.
const SCENARIOS: &[(&str, Needs, Scenario)] = &[
    ("leader killed while electing", Needs::Nothing, |seed| leaders::dies(Stage::Electing, seed)),
    ("leader killed while gathering", Needs::Nothing, |seed| leaders::dies(Stage::Gathering, seed)),
    ("leader killed while aggregating", Needs::Nothing, |seed| leaders::dies(Stage::Aggregating, seed)),
    ("leader killed while broadcasting", Needs::Nothing, |seed| leaders::dies(Stage::Broadcasting, seed)),
    ("leader killed while committing", Needs::Nothing, |seed| leaders::dies(Stage::Committing, seed)),
    ("leader frozen until deposed", Needs::Nothing, leaders::freezes_with_defaults),
    ("leader frozen, election_timeout 500 ms", Needs::Nothing, leaders::freezes),
    ("leader frozen for a whole round", Needs::Nothing, leaders::sleeps_through_a_round),
    ("leader leaves with Ctrl-C", Needs::Nothing, peers::leader_leaves),
    ("trainer killed while training", Needs::Nothing, |seed| peers::trainer_dies(Stage::Training, seed)),
    ("trainer killed while uploading", Needs::Nothing, |seed| peers::trainer_dies(Stage::Uploading, seed)),
    ("trainer killed after its update", Needs::Nothing, |seed| peers::trainer_dies(Stage::Gathering, seed)),
    ("everything killed, and started again", Needs::Nothing, peers::all_die),
    ("peer killed, and started again", Needs::Nothing, peers::killed_one_comes_back),
    ("peer leaves with Ctrl-C", Needs::Nothing, peers::one_leaves),
    ("peer leaves with Ctrl-C, and comes back", Needs::Nothing, peers::one_leaves_and_comes_back),
    ("newcomer in the middle of a round", Needs::Nothing, peers::newcomer_joins_in_the_middle_of_a_round),
    ("broker killed", Needs::Nothing, brokers::broker_dies),
    ("broker frozen", Needs::Nothing, brokers::broker_freezes),
    ("broker's host killed while electing", Needs::Nothing, |seed| {
        brokers::host_dies(Stage::Electing, Role::Trainer, seed)
    }),
    ("broker's host killed while gathering", Needs::Nothing, |seed| {
        brokers::host_dies(Stage::Gathering, Role::Trainer, seed)
    }),
    ("broker's host killed while uploading", Needs::Nothing, |seed| {
        brokers::host_dies(Stage::Uploading, Role::Trainer, seed)
    }),
    ("broker's host killed while aggregating", Needs::Nothing, |seed| {
        brokers::host_dies(Stage::Aggregating, Role::Trainer, seed)
    }),
    ("broker's host killed while broadcasting", Needs::Nothing, |seed| {
        brokers::host_dies(Stage::Broadcasting, Role::Trainer, seed)
    }),
    ("broker's host killed while committing", Needs::Nothing, |seed| {
        brokers::host_dies(Stage::Committing, Role::Trainer, seed)
    }),
    ("broker's host, the leader, killed while electing", Needs::Nothing, |seed| {
        brokers::host_dies(Stage::Electing, Role::Leader, seed)
    }),
    ("broker's host, the leader, killed while gathering", Needs::Nothing, |seed| {
        brokers::host_dies(Stage::Gathering, Role::Leader, seed)
    }),
    ("broker's host, the leader, killed while broadcasting", Needs::Nothing, |seed| {
        brokers::host_dies(Stage::Broadcasting, Role::Leader, seed)
    }),
    ("links of 100 ms ± 50 ms, 5 % lost", Needs::Networks, links::bad_links),
    ("links of 300 ms, 5 % lost", Needs::Networks, links::slow_links),
    ("trainer cut off for 4 s, election_timeout 500 ms", Needs::Networks, |seed| {
        links::cut_shortly(Cut::Trainer, seed)
    }),
    ("leader cut off for 4 s, election_timeout 500 ms", Needs::Networks, |seed| links::cut_shortly(Cut::Leader, seed)),
    ("trainer cut off for 20 s", Needs::Networks, |seed| links::cut(Cut::Trainer, seed)),
    ("leader cut off for 20 s", Needs::Networks, |seed| links::cut(Cut::Leader, seed)),
    ("half of the peers cut off for 20 s", Needs::Networks, |seed| links::cut(Cut::Half, seed)),
    ("wall clock put forward and back by hours", Needs::FakeTime, clocks::wall_clock_steps),
    ("monotonic clocks that are years apart", Needs::TimeNamespaces, clocks::clocks_are_apart),
];

/// Runs a scenario once, or says why not.
fn once(name: &str, seed: u64) {
    let (_, needs, scenario) = SCENARIOS.iter().find(|(known, ..)| *known == name).expect("it is in the list");
    match needs.obstacle() {
        Some(obstacle) => eprintln!("skipped: {name}: {obstacle}"),
        None => drop(scenario(seed)),
    }
}

#[test]
fn a_leader_that_is_killed_while_gathering_is_replaced() {
    once("leader killed while gathering", 2);
}

#[test]
fn a_leader_that_is_killed_while_broadcasting_is_replaced() {
    once("leader killed while broadcasting", 3);
}

#[test]
fn a_trainer_that_is_killed_while_uploading_is_not_waited_for() {
    once("trainer killed while uploading", 5);
}

#[test]
fn a_leader_that_freezes_is_fenced_out_and_takes_part_again() {
    once("leader frozen, election_timeout 500 ms", 6);
}

#[test]
fn a_run_that_is_killed_whole_goes_on_when_it_is_started_again() {
    once("everything killed, and started again", 8);
}

#[test]
fn a_peer_that_is_killed_comes_back_with_its_state_directory() {
    once("peer killed, and started again", 9);
}

#[test]
fn a_peer_that_leaves_with_ctrl_c_is_not_waited_for() {
    once("peer leaves with Ctrl-C", 11);
}

#[test]
fn a_broker_that_dies_with_the_leader_is_replaced_by_the_standby() {
    once("broker's host, the leader, killed while gathering", 12);
}

#[test]
fn a_leader_that_is_cut_off_is_replaced_and_takes_part_again() {
    once("leader cut off for 4 s, election_timeout 500 ms", 13);
}

#[test]
fn a_wall_clock_that_steps_is_not_noticed() {
    once("wall clock put forward and back by hours", 14);
}

#[test]
#[ignore = "takes long: `make chaos` runs every scenario many times and prints the medians"]
fn every_scenario_holds_for_many_seeds() {
    let trials: u64 = std::env::var("TRIALS").map_or(10, |text| text.parse().expect("TRIALS is a number"));
    let fault = std::env::var("FAULT").unwrap_or_default();
    println!("| fault | until | trials | median | longest |\n|---|---|---|---|---|");
    for (number, (name, needs, scenario)) in (1..).zip(SCENARIOS).filter(|(_, (name, ..))| name.contains(&fault)) {
        match needs.obstacle() {
            Some(obstacle) => println!("| {name} | skipped: {obstacle} | | | |"),
            None => tell(name, trials, measure(*scenario, (0..trials).map(|trial| 1000 * number + trial))),
        }
    }
}

fn measure(scenario: Scenario, seeds: impl Iterator<Item = u64>) -> BTreeMap<&'static str, Vec<Duration>> {
    let mut measured: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    for (what, took) in seeds.flat_map(scenario) {
        measured.entry(what).or_default().push(took);
    }
    measured
}

/// Prints rows that can stand in the README.
fn tell(name: &str, trials: u64, mut measured: BTreeMap<&str, Vec<Duration>>) {
    if measured.is_empty() {
        println!("| {name} | its end, as if nothing had happened | {trials} | | |");
    }
    for (what, took) in &mut measured {
        took.sort_unstable();
        let seconds = |took: Duration| format!("{:.2} s", took.as_secs_f64());
        let (median, longest) = (seconds(took[took.len() / 2]), seconds(took[took.len() - 1]));
        println!("| {name} | {what} | {} | {median} | {longest} |", took.len());
    }
}
