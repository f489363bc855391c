//! The protocol under random faults: thousands of federations in virtual time, each replayable by its seed.

use std::time::Duration;

use rodizio::sim::{self, Detail, Report, Scenario};
use rodizio::transfer::Codec;
use rodizio::types::{PeerId, Round};

/// More with `SEEDS=… cargo test --test simulation` (`make sim SEEDS=…`).
fn seeds(default: u64) -> u64 {
    std::env::var("SEEDS").ok().and_then(|count| count.parse().ok()).unwrap_or(default)
}

fn run(scenario: &Scenario, seed: u64) -> Result<Report, sim::Violation> {
    sim::run(scenario, seed, Detail::Commits, &mut |_: Duration, _: &PeerId, _: &str| {})
}

/// Runs a scenario by many seeds on all cores; names the first that fails and how to replay it.
fn sweep(name: &str, scenario: &Scenario, count: u64) -> Vec<Report> {
    let threads = std::thread::available_parallelism().map_or(2, usize::from) as u64;
    let results: Vec<_> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                scope.spawn(move || {
                    (worker..count).step_by(threads as usize).map(|seed| run(scenario, seed)).collect::<Vec<_>>()
                })
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a worker only panics with its test")).collect()
    });
    let reports = results.into_iter().map(|result| match result {
        Ok(report) => report,
        Err(violation) => {
            panic!("{violation}\nreplay: rodizio sim --scenario configs/sim/{name}.toml --seed {} -v", violation.seed)
        }
    });
    reports.collect()
}

fn scenario(name: &str) -> Scenario {
    let path = format!("{}/configs/sim/{name}.toml", env!("CARGO_MANIFEST_DIR"));
    Scenario::parse(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn whatever_happens_at_most_one_decree_commits_and_the_run_finishes() {
    let reports = sweep("storm", &scenario("storm"), seeds(1200));
    let faults: u64 = reports.iter().map(|report| report.faults).sum();
    let reelections: u64 = reports.iter().map(|report| report.reelections).sum();
    assert!(
        faults > reports.len() as u64 && reelections > reports.len() as u64 / 10,
        "{faults} faults, {reelections} re-elections"
    );
}

#[test]
fn a_lossy_network_only_costs_time() {
    for report in sweep("lossy", &scenario("lossy"), seeds(400)) {
        assert_eq!(report.rounds, Round(4));
    }
}

#[test]
fn a_slow_network_alone_deposes_nobody() {
    for report in sweep("slow", &scenario("slow"), seeds(100)) {
        assert_eq!(report.reelections, 0);
    }
}

#[test]
fn peers_that_come_late_or_lose_their_state_are_admitted() {
    let reports = sweep("churn", &scenario("churn"), seeds(400));
    assert!(reports.iter().filter(|report| report.quorum_lost).count() < reports.len() / 4);
}

#[test]
fn what_a_peer_learned_and_did_not_send_is_never_lost_and_never_sent_twice() {
    let topk = Scenario { codec: Codec::TopK, ..scenario("storm") };
    sweep("storm", &topk, seeds(400));
    sweep("churn", &Scenario { codec: Codec::TopK, model_codec: Codec::Int8, ..scenario("churn") }, seeds(100));
}

#[test]
fn with_lossy_codecs_all_peers_have_the_same_model_whoever_leads() {
    for codec in [Codec::F16, Codec::Bf16, Codec::Int8] {
        sweep("storm", &Scenario { codec, model_codec: codec, ..scenario("storm") }, seeds(100));
    }
}

#[test]
fn whatever_the_strategy_every_model_is_its_aggregate_whoever_leads() {
    // Each seed has its own strategy. What a strategy remembers is passed on by leaders that die and by newcomers.
    sweep("strategies", &scenario("strategies"), seeds(420));
    sweep("strategies", &Scenario { codec: Codec::Bf16, ..scenario("strategies") }, seeds(140));
}

#[test]
fn a_part_of_the_members_trains_and_rounds_go_on_when_it_dies() {
    let calm = Scenario { fraction_train: 0.5, ..scenario("calm") };
    for report in sweep("calm", &calm, seeds(20)) {
        assert_eq!((report.rounds, report.reelections), (Round(calm.rounds), 0));
    }
    for fraction_train in [0.01, 0.5] {
        sweep("storm", &Scenario { fraction_train, ..scenario("storm") }, seeds(200));
        sweep("strategies", &Scenario { fraction_train, ..scenario("strategies") }, seeds(140));
    }
}

#[test]
fn two_peers_are_enough_and_both_are_needed() {
    sweep("pair", &scenario("pair"), seeds(200));
}

#[test]
fn the_order_of_arrival_does_not_change_the_model() {
    let scenario = scenario("calm");
    let reports = sweep("calm", &scenario, seeds(50));
    let first = &reports[0];
    assert_eq!((first.rounds, first.reelections), (Round(scenario.rounds), 0));
    for report in &reports {
        assert_eq!((report.model, &report.leaders), (first.model, &first.leaders));
    }
    assert!(first.leaders.windows(2).all(|pair| pair[0] != pair[1]), "the turn passes on");
}

#[test]
fn what_a_peer_sends_does_not_grow_with_their_number() {
    let each = [10, 40, 160].map(|peers| {
        let report = run(&Scenario { peers, ..scenario("calm") }, 1).unwrap();
        report.messages.0 as usize / peers
    });
    assert!(each.iter().all(|sent| *sent <= each[0] * 5 / 4), "messages sent, by peer: {each:?}");
}

#[test]
fn a_seed_replays_exactly() {
    let scenario = scenario("storm");
    let trace = |seed| {
        let mut lines = Vec::new();
        sim::run(&scenario, seed, Detail::Messages, &mut |at, peer, text| lines.push(format!("{at:?} {peer} {text}")))
            .unwrap();
        lines
    };
    assert_eq!(trace(7), trace(7));
    assert_ne!(trace(7), trace(8));
}
