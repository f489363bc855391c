//! What a peer tells people and journals.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Instant;

use serde::Serialize;

use crate::protocol::decree::{Decree, Reason};
use crate::protocol::roster::Roster;
use crate::types::{Digest, Metrics, PeerId, Round, Term};

/// Something that people or journals may want to know.
#[derive(Clone, Debug)]
pub enum Notice {
    /// A compatible peer is there.
    Joined(PeerId),
    /// A peer said goodbye, or its last will did.
    Left(PeerId),
    /// A peer cannot take part with this one.
    Incompatible {
        /// Which.
        peer: PeerId,
        /// Why.
        difference: Difference,
    },
    /// This peer does not fit the federation it found, and stays out.
    Refused {
        /// A member of the federation.
        peer: PeerId,
        /// Why.
        difference: Difference,
    },
    /// The retained head of a federation that finished earlier lies on the broker; it is left alone.
    EarlierFederation {
        /// Its last round.
        round: Round,
    },
    /// All is done, but these peers are away without the last model: it is kept ready for them for a while.
    Staying(Vec<PeerId>),
    /// The federation has its first roster.
    Founded(Roster),
    /// A round has begun.
    RoundStarted {
        /// Which.
        round: Round,
        /// How many members it has.
        members: usize,
        /// Whether this peer is one.
        member: bool,
    },
    /// This peer follows a leader, or is it.
    Elected {
        /// In which round.
        round: Round,
        /// In which term.
        term: Term,
        /// Whom.
        leader: PeerId,
    },
    /// A leader or candidate was given up; the members vote again.
    Deposed {
        /// In which round.
        round: Round,
        /// The term given up.
        term: Term,
        /// Whom.
        leader: PeerId,
        /// Silent, or known gone.
        gone: bool,
    },
    /// This peer measured the model of `round` on its own held-out data.
    Measured {
        /// The round that made the model.
        round: Round,
        /// Its own metrics.
        metrics: Metrics,
    },
    /// All members' metrics of the model of `round` are in.
    Evaluated {
        /// The round that made the model.
        round: Round,
        /// The model.
        model: Digest,
        /// The weighted metrics.
        metrics: Metrics,
    },
    /// Local training began.
    TrainingStarted {
        /// For which round.
        round: Round,
    },
    /// Local training ended.
    Trained {
        /// For which round.
        round: Round,
        /// The update.
        update: Digest,
        /// How it went.
        metrics: Metrics,
    },
    /// The leader's count of updates.
    Gathered {
        /// In which round.
        round: Round,
        /// How many are in.
        done: usize,
        /// How many are waited for in all.
        total: usize,
    },
    /// A member's update, or its word that none comes, leaves it out of this round.
    LeftOut {
        /// Whose.
        peer: PeerId,
        /// Why.
        why: String,
    },
    /// The round's decree is proposed (or seen proposed).
    Proposed {
        /// In which round.
        round: Round,
        /// By whom.
        leader: PeerId,
    },
    /// A decree is committed.
    Committed(Box<Committed>),
    /// A round made its model of fewer updates than its strategy needs to keep bad ones out.
    FewUpdates {
        /// Which round.
        round: Round,
        /// How many there were.
        updates: usize,
        /// How many there should have been.
        needed: usize,
    },
    /// The global model of `round` is here.
    ModelHeld {
        /// The round that made it.
        round: Round,
        /// Its blob.
        model: Digest,
    },
    /// The federation has finished.
    Finished {
        /// Why.
        reason: Reason,
        /// The last round that made a model.
        rounds: Round,
        /// The last model, which is held.
        model: Digest,
        /// Its weighted metrics.
        metrics: Option<Metrics>,
    },
    /// What the peer waits for has changed.
    Waiting(Option<Waiting>),
    /// Local work failed.
    Failed {
        /// What was tried.
        what: &'static str,
        /// Why, as a sentence.
        why: String,
    },
    /// A message could not be read; said once a sender.
    BadMessage {
        /// Whose, if that could be read.
        sender: Option<PeerId>,
        /// Why.
        why: String,
    },
}

/// A committed decree, as one peer saw it come about.
#[derive(Clone, Debug)]
pub struct Committed {
    /// The decree.
    pub decree: Decree,
    /// Its digest.
    pub digest: Digest,
    /// How many members the round had; 0 where this peer, which came in the middle of it, does not know.
    pub members: usize,
    /// Whose accepts committed it.
    pub accepts: Vec<PeerId>,
    /// The term in which this peer saw it commit.
    pub term: Term,
    /// Whether this peer led.
    pub led: bool,
    /// How long each phase took.
    pub seconds: Seconds,
    /// When the decision to commit fell: what passes until this notice is read belongs to `commit`.
    pub decided: Instant,
}

/// How long each phase of a round took for one peer, in seconds. Phases run at the same time where they can, so
/// `total` is less than their sum; a phase that the peer had no part in is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Seconds {
    /// From the start of the round until the own evaluation of the parent model.
    pub evaluate: f64,
    /// From the start of the round until a leader was known.
    pub elect: f64,
    /// From the own evaluation until the own update, or the last one announced to the leader.
    pub train: f64,
    /// From there until the leader had every update (or, for a trainer, until the proposal).
    pub gather: f64,
    /// From there until the new model was made.
    pub aggregate: f64,
    /// From there until a quorum (for a trainer: this peer) had accepted it.
    pub broadcast: f64,
    /// From there until the decree was durable and announced (for a trainer: known).
    pub commit: f64,
    /// The whole round.
    pub total: f64,
}

/// The value of a key that a peer does not have.
pub const UNKNOWN: &str = "unknown";

/// What differs between two peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The configuration key, or `model layout`.
    pub key: String,
    /// The other peer's value.
    pub theirs: String,
    /// The own value.
    pub mine: String,
}

impl Difference {
    /// The first of two configurations, in the order of their keys.
    pub fn between(theirs: &BTreeMap<String, String>, mine: &BTreeMap<String, String>) -> Option<Self> {
        let keys: BTreeSet<&String> = theirs.keys().chain(mine.keys()).collect();
        let text = |value: Option<&String>| value.cloned().unwrap_or_else(|| UNKNOWN.into());
        let other = keys.into_iter().find(|key| theirs.get(*key) != mine.get(*key))?;
        Some(Self { key: other.clone(), theirs: text(theirs.get(other)), mine: text(mine.get(other)) })
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {} there and {} here", self.key, self.theirs, self.mine)
    }
}

/// What a peer waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// More peers before the federation is founded.
    Peers {
        /// How many are there.
        present: usize,
        /// How many must be.
        needed: usize,
    },
    /// Peers with another configuration are more, or came first.
    OtherConfiguration {
        /// One of them.
        peer: PeerId,
        /// What differs.
        difference: Difference,
    },
    /// These peers must confirm the first roster, since they joined an earlier one.
    Founders(Vec<PeerId>),
    /// The next round's leader admits this peer.
    Admission,
    /// The others let go of a member that has this peer's name and another state directory.
    Namesake,
    /// So many members are gone that the others cannot decide.
    Quorum {
        /// Who is missing.
        missing: Vec<PeerId>,
        /// How many of them must come back.
        needed: usize,
        /// Those of the missing in whose place somebody is here with another state directory, without their promises.
        forgot: Vec<PeerId>,
    },
    /// Nobody sends the newest model, from which this peer is to go on.
    Model {
        /// The round that made it.
        round: Round,
        /// Who may have it.
        holders: Vec<PeerId>,
    },
    /// Too few updates are in, and the round's time is over or training failed.
    Updates {
        /// How many are in.
        present: usize,
        /// How many must be.
        needed: usize,
    },
}

impl Waiting {
    /// Whether too few are in sight, so that the others may be at another broker.
    pub fn is_for_company(&self) -> bool {
        matches!(self, Waiting::Peers { .. } | Waiting::Founders(_) | Waiting::Quorum { .. })
    }

    /// Whether a member is here with another state directory than it had.
    pub fn is_for_lost_state(&self) -> bool {
        match self {
            Waiting::Namesake => true,
            Waiting::Quorum { forgot, .. } => !forgot.is_empty(),
            _ => false,
        }
    }
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Waiting::Peers { present, needed } => {
                let missing = needed.saturating_sub(*present);
                write!(f, "{present} of {needed} peers have joined; waiting for {missing} (--min-peers {needed})")
            }
            Waiting::OtherConfiguration { peer, difference } => {
                write!(f, "peer {peer} and others have another configuration: {difference}")
            }
            Waiting::Founders(peers) => {
                write!(f, "waiting for {} to confirm the first roster", list(peers))
            }
            Waiting::Admission => f.write_str("waiting for the federation to admit this peer to its next round"),
            Waiting::Namesake => f.write_str(
                "a member of the federation has this peer's name and another state directory; waiting until the others let \
                 it go",
            ),
            Waiting::Quorum { missing, needed, forgot } => {
                let of = missing.len();
                write!(
                    f,
                    "no majority of the roster is here; waiting for {needed} of the {of} missing: {}",
                    list(missing)
                )?;
                match forgot.as_slice() {
                    [] => Ok(()),
                    forgot => write!(f, " (here with a new state directory, which does not count: {})", list(forgot)),
                }
            }
            Waiting::Model { round, holders } => {
                write!(f, "nobody sends the model of round {round}; waiting for one who has it: {}", list(holders))
            }
            Waiting::Updates { present, needed } => {
                write!(
                    f,
                    "{present} of {needed} updates are in, as the round's time is over or training failed; waiting \
                     (--min-updates {needed})"
                )
            }
        }
    }
}

fn list(peers: &[PeerId]) -> String {
    const SHOWN: usize = 8;
    let names: Vec<&str> = peers.iter().take(SHOWN).map(PeerId::as_str).collect();
    let more = peers.len().saturating_sub(SHOWN);
    let names = names.join(", ");
    if more > 0 { format!("{names} and {more} more") } else { names }
}
