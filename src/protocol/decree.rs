//! What a round decides.

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::aggregation::Share;
use crate::protocol::config::Config;
use crate::protocol::roster::Roster;
use crate::transfer::Manifest;
use crate::types::{Address, Digest, Metrics, PeerId, Round, Term};

/// The most brokers that a decree names.
pub const STANDBYS_MAX: usize = 16;

/// What a round decides: at most one decree commits per round, whatever happens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decree {
    /// The round it decides.
    pub round: Round,
    /// The digest of the decree before it; of the first roster, for the genesis.
    pub parent: Digest,
    /// The leader that formed it. A later leader that finds it accepted proposes it as it stands.
    pub leader: PeerId,
    /// The term in which it was formed.
    pub term: Term,
    /// A new global model, or the end.
    pub outcome: Outcome,
    /// Whose updates the model is the aggregate of, in `PeerId` order.
    pub contributors: Vec<Contributor>,
    /// How the parent model did on the members' held-out data; `None` when nobody could say.
    pub parent_metrics: Option<Metrics>,
    /// The evaluations so far, this round's included.
    pub record: Record,
    /// Who may vote in the next round.
    pub next_roster: Roster,
    /// The brokers that members of the next roster host, by host, at most [`STANDBYS_MAX`]: where the members meet, in
    /// the order of the hosts' names, when the brokers fail that each was told of.
    pub standbys: BTreeMap<PeerId, Address>,
    /// What the inputs of the founders are like, encoded (see [`statistics`](crate::aggregation::statistics)): the same in
    /// all decrees of a federation. Every peer, also one that comes later, prepares its inputs by it.
    pub summary: Bytes,
}

/// What becomes of the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// The next global model.
    Model(Manifest),
    /// No more rounds: the parent's model is the last, named again so that latecomers can still pull it.
    Finish(Reason, Manifest),
}

/// Why a federation finishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reason {
    /// All `rounds` are done.
    Rounds,
    /// The validation accuracy reached `target_accuracy`.
    TargetAccuracy,
    /// The validation loss improved by less than `tolerance` over `patience` rounds.
    Patience,
}

impl Reason {
    /// The word for scripts.
    pub fn name(self) -> &'static str {
        match self {
            Reason::Rounds => "rounds",
            Reason::TargetAccuracy => "target_accuracy",
            Reason::Patience => "patience",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reason::Rounds => "all rounds are done",
            Reason::TargetAccuracy => "the target accuracy is reached",
            Reason::Patience => "the validation loss no longer improves",
        })
    }
}

/// One trainer's share in a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Contributor {
    /// Whose update.
    pub peer: PeerId,
    /// The update's blob.
    pub update: Digest,
    /// Its weight in the mean.
    pub num_examples: u64,
    /// How far its local steps went: see [`Share::step_sum`].
    pub step_sum: f64,
    /// How training went, on the trainer's own examples.
    pub metrics: Metrics,
}

/// What the stopping rules need to know of all rounds so far. It travels in the decrees, so that any leader, also a
/// newcomer, stops where every other would.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The validation loss to improve on, and over how many examples it was measured.
    pub reference: Option<(f64, u64)>,
    /// How many models in a row did not improve on it by more than `tolerance`.
    pub stale: u32,
}

impl Contributor {
    /// What the update says of itself.
    pub fn share(&self) -> Share {
        Share { num_examples: self.num_examples, step_sum: self.step_sum }
    }
}

impl Record {
    /// The record after another model was measured.
    ///
    /// Many small improvements are together a large one, so they leave the reference where it is. Where peers have come or
    /// gone other examples are measured, and what was lost or won says nothing of the model.
    #[must_use]
    pub fn with(self, metrics: &Metrics, tolerance: f64) -> Record {
        match self.reference {
            Some((loss, num_examples)) if num_examples == metrics.num_examples && metrics.loss >= loss - tolerance => {
                Record { reference: self.reference, stale: self.stale.saturating_add(1) }
            }
            _ => Record { reference: Some((metrics.loss, metrics.num_examples)), stale: 0 },
        }
    }
}

impl Decree {
    /// What names this decree.
    pub fn digest(&self) -> Digest {
        Digest::of(&postcard::to_stdvec(self).expect("a decree holds nothing that postcard refuses"))
    }

    /// The global model after this round.
    pub fn model(&self) -> &Manifest {
        match &self.outcome {
            Outcome::Model(manifest) | Outcome::Finish(_, manifest) => manifest,
        }
    }

    /// Whether the federation ends here, and why.
    pub fn reason(&self) -> Option<Reason> {
        match &self.outcome {
            Outcome::Model(_) => None,
            Outcome::Finish(reason, _) => Some(*reason),
        }
    }
}

#[cfg(test)]
impl Decree {
    /// A genesis of `roster`, by its first member: four values, all zero. Tests change what matters to them.
    pub(crate) fn sample(roster: &Roster) -> Self {
        let model =
            Manifest::of(&[0; 16], 1024, crate::transfer::Codec::F32).expect("its chunks are of a sound length");
        Self {
            round: Round::GENESIS,
            parent: roster.digest(),
            leader: roster.members()[0].clone(),
            term: Term(0),
            outcome: Outcome::Model(model),
            contributors: Vec::new(),
            parent_metrics: None,
            record: Record::default(),
            next_roster: roster.clone(),
            standbys: BTreeMap::new(),
            summary: Bytes::new(),
        }
    }
}

/// Which stopping rule is met in `round`, if its parent's model (of the round before) measured `metrics`.
pub(super) fn stop(config: &Config, round: Round, metrics: Option<&Metrics>, record: &Record) -> Option<Reason> {
    // Weights that no round has trained are no result, however well they do.
    let trained = round > Round(1);
    let reached = |metrics: &Metrics| config.target_accuracy.is_some_and(|target| metrics.accuracy >= target);
    if trained && metrics.is_some_and(reached) {
        Some(Reason::TargetAccuracy)
    } else if trained && config.patience > 0 && record.stale >= config.patience {
        Some(Reason::Patience)
    } else if round > Round(config.rounds) {
        Some(Reason::Rounds)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(loss: f64, accuracy: f64) -> Metrics {
        Metrics { num_examples: 10, loss, accuracy, ..Metrics::default() }
    }

    #[test]
    fn an_improvement_within_the_tolerance_is_none_but_several_together_are_one() {
        let after = |losses: &[f64]| {
            losses.iter().fold(Record::default(), |record, &loss| record.with(&metrics(loss, 0.5), 0.1))
        };
        assert_eq!(after(&[1.0, 0.95]), Record { reference: Some((1.0, 10)), stale: 1 });
        assert_eq!(after(&[1.0, 0.95, 2.0]), Record { reference: Some((1.0, 10)), stale: 2 });
        assert_eq!(after(&[1.0, 0.95, 0.91, 0.87]), Record { reference: Some((0.87, 10)), stale: 0 });
    }

    #[test]
    fn losses_over_other_examples_are_not_compared() {
        let record = Record { reference: Some((0.2, 10)), stale: 3 };
        let more = Metrics { num_examples: 15, ..metrics(0.5, 0.5) };
        assert_eq!(record.with(&more, 0.0), Record { reference: Some((0.5, 15)), stale: 0 });
    }

    #[test]
    fn the_first_stopping_rule_that_is_met_names_the_reason() {
        let config = Config { rounds: 3, target_accuracy: Some(0.9), patience: 2, ..Config::default() };
        let stale = |stale| Record { reference: Some((1.0, 10)), stale };
        let good = metrics(1.0, 0.9);
        assert_eq!(stop(&config, Round(2), Some(&metrics(1.0, 0.8)), &stale(0)), None);
        assert_eq!(stop(&config, Round(2), Some(&good), &stale(2)), Some(Reason::TargetAccuracy));
        assert_eq!(stop(&config, Round(1), Some(&good), &stale(0)), None);
        assert_eq!(stop(&config, Round(3), None, &stale(2)), Some(Reason::Patience));
        assert_eq!(stop(&config, Round(4), None, &stale(0)), Some(Reason::Rounds));
    }
}
