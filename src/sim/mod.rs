//! The simulator: a whole federation in virtual time, with faults drawn from a seed.
//!
//! Every peer is the real [`Peer`](crate::protocol::Peer) with the real jobs on tiny weights; the network carries encoded
//! bytes. After every step `check.rs` compares what all peers have persisted and sent with the protocol's invariants.
//! A run is a function of (scenario, seed): what fails once fails again.
//!
//! First comes a *safety* phase, in which anything may happen; then all faults end, and in the *liveness* phase the
//! federation must finish within a bound.

mod check;
mod network;
mod scenario;
mod trainer;
mod world;

use std::time::Duration;

use crate::types::{Digest, PeerId, Round};

pub use scenario::{Scenario, ScenarioError};

/// What a simulated run came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The last round that made a model.
    pub rounds: Round,
    /// The last model.
    pub model: Digest,
    /// Who led each committed round, from the genesis on.
    pub leaders: Vec<PeerId>,
    /// How many updates each round's model was made of.
    pub contributors: Vec<usize>,
    /// How many terms above 0 were needed, over all committed rounds.
    pub reelections: u64,
    /// How many crashes, cuts and restarts there were.
    pub faults: u64,
    /// How many messages were sent, and how many of their copies arrived.
    pub messages: (u64, u64),
    /// How much virtual time passed.
    pub elapsed: Duration,
    /// Too many peers lost their state for a quorum to come together again: that the rest waits is right.
    pub quorum_lost: bool,
}

/// An invariant that did not hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("seed {seed}, {at:?}: {invariant} is violated: {what}")]
pub struct Violation {
    /// The seed that replays it.
    pub seed: u64,
    /// When, in virtual time.
    pub at: Duration,
    /// Which invariant.
    pub invariant: &'static str,
    /// How.
    pub what: String,
}

/// What a trace shows: the virtual time, the peer and a line of text.
pub type Trace<'a> = dyn FnMut(Duration, &PeerId, &str) + 'a;

/// How much a trace shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Detail {
    /// Faults and commits.
    #[default]
    Commits,
    /// Every notice.
    Notices,
    /// Every message that arrives.
    Messages,
}

/// Runs a scenario by seed; the first violation ends it.
pub fn run(scenario: &Scenario, seed: u64, detail: Detail, trace: &mut Trace<'_>) -> Result<Report, Violation> {
    world::World::new(scenario, seed, detail, trace).run()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Flaws;
    use crate::transfer::Codec;

    /// The first violation among some seeds, with the protocol's rules as `flaws` has them.
    fn first_violation(flaws: Flaws, seeds: u64) -> Option<Violation> {
        let scenario = Scenario { crashes: 6, cuts: 4, loss: 0.1, codec: Codec::TopK, ..Scenario::default() };
        first_violation_of(&scenario, flaws, seeds)
    }

    fn first_violation_of(scenario: &Scenario, flaws: Flaws, seeds: u64) -> Option<Violation> {
        (0..seeds).find_map(|seed| {
            let mut quiet = |_: Duration, _: &PeerId, _: &str| {};
            let mut world = world::World::new(scenario, seed, Detail::Commits, &mut quiet);
            world.flaws = flaws;
            world.run().err()
        })
    }

    #[test]
    fn without_the_quorum_rule_two_decrees_commit() {
        let violation = first_violation(Flaws { commit_alone: true, ..Flaws::default() }, 300);
        assert!(violation.is_some_and(|v| v.invariant.starts_with("I1")), "the simulation noticed nothing");
    }

    #[test]
    fn without_proposing_the_accepted_decree_again_two_decrees_commit() {
        let violation = first_violation(Flaws { forget_accepted: true, ..Flaws::default() }, 3000);
        assert!(violation.is_some_and(|v| v.invariant.starts_with("I1")), "the simulation noticed nothing");
    }

    #[test]
    fn without_taking_back_what_did_not_count_something_learned_is_lost() {
        let violation = first_violation(Flaws { forget_returned: true, ..Flaws::default() }, 300);
        assert!(violation.is_some_and(|v| v.invariant.starts_with("I7")), "the simulation noticed nothing");
    }

    #[test]
    fn a_peer_that_lost_its_state_and_kept_its_name_breaks_no_promise_as_it_is_no_member() {
        let scenario = Scenario { crashes: 2, losses_of_state: 4, loss: 0.1, ..Scenario::default() };
        assert_eq!(first_violation_of(&scenario, Flaws::default(), 200), None);
        let violation = first_violation_of(&scenario, Flaws { trust_names: true, ..Flaws::default() }, 200);
        let found = violation.expect("the simulation noticed nothing").invariant;
        assert!(found.starts_with("I1") || found.starts_with("I2") || found.starts_with("I4"), "{found}");
    }

    #[test]
    fn with_all_rules_the_same_seeds_pass() {
        assert_eq!(first_violation(Flaws::default(), 100), None);
    }
}
