//! When in a round to strike, as far as it shows from outside.

use std::collections::BTreeMap;

use rodizio::events::{Entry, Event};
use rodizio::types::{Digest, PeerId, Round};

use crate::federation::{Federation, PEERS, STRUCK, leader};

/// Training that lasts long enough to strike in its middle: about a second, in the dev profile too, which is slower.
pub(crate) const LONG_TRAINING: [&str; 2] = ["--local-epochs", if cfg!(debug_assertions) { "80" } else { "200" }];

/// A model that takes a while to send, in many chunks.
const WIDE_MODEL: [&str; 6] = ["--local-epochs", "2", "--hidden", "8192", "--chunk-bytes", "16KiB"];

/// A stage of the struck round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Stage {
    /// A first member knows the leader.
    Electing,
    /// A trainer trains.
    Training,
    /// A first update is made.
    Gathering,
    /// A first update is made, and takes long to send.
    Uploading,
    /// The leader has all updates.
    Aggregating,
    /// The leader has proposed, and the model takes long to send.
    Broadcasting,
    /// A first peer knows that the round is decided.
    Committing,
}

impl Stage {
    pub(crate) fn settings(self) -> &'static [&'static str] {
        match self {
            Stage::Electing | Stage::Training | Stage::Gathering => &LONG_TRAINING,
            Stage::Uploading | Stage::Aggregating | Stage::Broadcasting | Stage::Committing => &WIDE_MODEL,
        }
    }

    fn begins_with(self, event: &Event) -> bool {
        match self {
            Stage::Electing => matches!(event, Event::Elected { round: STRUCK, .. }),
            // It begins as soon as the parent model is measured.
            Stage::Training => matches!(event, Event::Measured { round, .. } if round.next() == STRUCK),
            Stage::Gathering | Stage::Uploading => matches!(event, Event::Trained { round: STRUCK, .. }),
            Stage::Broadcasting => matches!(event, Event::Proposed { round: STRUCK, .. }),
            Stage::Committing => matches!(event, Event::RoundCommitted(committed) if committed.round == STRUCK),
            Stage::Aggregating => false,
        }
    }

    /// Waits until the struck round is in this stage. Returns its leader, and the trainer that got there first.
    pub(crate) fn wait(self, federation: &mut Federation) -> (PeerId, PeerId) {
        // On a busy machine a trainer may be done before a quorum of ballots is in.
        let leader = federation.until_all("a leader", leader);
        if self == Stage::Aggregating {
            let held = federation.blobs(&leader);
            let all_held = |updates: &BTreeMap<PeerId, Digest>| updates.values().all(|update| held.has(*update));
            federation.until_all("all updates at the leader", |entries| all_updates(entries, &leader).filter(all_held));
        }
        let begins =
            |entry: &Entry| entry.peer != leader && (self.begins_with(&entry.event) || self == Stage::Aggregating);
        let trainer = federation.until(&format!("{self:?}"), 0, begins).peer;
        (leader, trainer)
    }
}

/// What the trainers of the struck round made, once all have.
fn all_updates(entries: &[Entry], leader: &PeerId) -> Option<BTreeMap<PeerId, Digest>> {
    let trained = entries.iter().filter_map(|entry| match entry.event {
        Event::Trained { round: STRUCK, update, .. } if entry.peer != *leader => Some((entry.peer.clone(), update)),
        _ => None,
    });
    let updates: BTreeMap<_, _> = trained.collect();
    (updates.len() == PEERS - 1).then_some(updates)
}

/// Whether this tells of a later round than the struck one that `peer` led, or that has its update in its model.
pub(crate) fn has_part_in(event: &Event, peer: &PeerId) -> bool {
    let Event::RoundCommitted(committed) = event else { return false };
    committed.round > STRUCK && (committed.leader == *peer || committed.contributors.contains(peer))
}

/// Whether this tells of the commit of a round.
pub(crate) fn is_commit_of(event: &Event, wanted: Round) -> bool {
    matches!(event, Event::RoundCommitted(committed) if committed.round == wanted)
}
