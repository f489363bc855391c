//! What a peer has persisted before it sends anything that depends on it.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::protocol::decree::Decree;
use crate::protocol::message::{Head, Update};
use crate::protocol::roster::Roster;
use crate::transfer::{Keep, Manifest};
use crate::types::{Address, Digest, PeerId, Round, Term};

/// The version of the encoding: its first number. An encoding without one begins with 0 or 1.
const VERSION: u16 = 5;

/// A peer's promises: with them a restarted peer goes on as if it had only been slow.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Durable {
    /// The newest committed decree.
    pub head: Option<Head>,
    /// The newest global model that is held: what a finished federation leaves.
    pub model: Option<Manifest>,
    /// How the first roster came, or comes, about.
    pub founding: Founding,
    /// The round after `head`.
    pub open: Open,
    /// What the peer has learned and not sent, as far as the rounds before the open one are concerned.
    pub residual: Residual,
    /// A blob as `f32`: the peer's control variate after its newest update that counted, where the strategy has such.
    pub control: Option<Digest>,
}

/// What a peer has learned and, with a codec that sends a part of it, not sent: the sum of both parts.
///
/// Nothing is lost and nothing counts twice: what a round sends or keeps changes this only when the round is decided.
/// The next training adds it to what it learns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Residual {
    /// A blob as `f32`: what the newest decided update left over.
    pub unsent: Option<Digest>,
    /// The blob of that update, if no model was made of it.
    pub returned: Option<Digest>,
}

/// A peer's part in founding a federation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Founding {
    /// The number of the peer's own last call.
    pub last_call: Term,
    /// The call that the peer joined: the candidate and the number of its call.
    pub joined: Option<(PeerId, Term)>,
    /// The first roster, once founded.
    pub roster: Option<Roster>,
    /// What the inputs of the first roster's members are like, encoded.
    pub summary: Bytes,
}

/// A peer's promises in the round after its head.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Open {
    /// The round.
    pub round: Round,
    /// Messages of lower terms are refused.
    pub promised: Term,
    /// For whom the peer voted in each term.
    pub ballots: BTreeMap<Term, PeerId>,
    /// The decree it accepted last, and in which term.
    pub accepted: Option<(Term, Decree)>,
    /// Its own update: nobody trains a round twice.
    pub update: Option<Update>,
    /// A blob as `f32`: what of its residual and its training the update does not send.
    pub unsent: Option<Digest>,
    /// A blob as `f32`: the peer's control variate if the update counts.
    pub control: Option<Digest>,
}

impl Durable {
    /// The digest of the newest decree; of the first roster before the genesis decree.
    pub fn parent(&self) -> Option<Digest> {
        match &self.head {
            Some(head) => Some(head.decree.digest()),
            None => self.founding.roster.as_ref().map(Roster::digest),
        }
    }

    /// Who may vote in the open round, if that is known.
    pub fn roster(&self) -> Option<&Roster> {
        match &self.head {
            Some(head) => Some(&head.decree.next_roster),
            None => self.founding.roster.as_ref(),
        }
    }

    /// What the founders' inputs are like, once they have founded the federation.
    pub fn summary(&self) -> Option<&Bytes> {
        match &self.head {
            Some(head) => Some(&head.decree.summary),
            None => self.founding.roster.as_ref().map(|_| &self.founding.summary),
        }
    }

    /// The brokers that members host, in the order that the newest decree fixes.
    pub fn standbys(&self) -> impl Iterator<Item = &Address> {
        self.head.iter().flat_map(|head| head.decree.standbys.values())
    }

    /// The blobs that these promises name.
    pub fn manifests(&self) -> impl Iterator<Item = &Manifest> {
        self.kept().map(|(manifest, _)| manifest)
    }

    /// The same, each as well as it is kept for sure.
    pub(super) fn kept(&self) -> impl Iterator<Item = (&Manifest, Keep)> {
        let accepted = self.open.accepted.as_ref().map(|(_, decree)| decree.model());
        let update = self.open.update.as_ref().map(|update| &update.manifest);
        // The model of the head may be here without having been flushed, or as an update alone.
        let head = self.head.as_ref().map(|head| head.decree.model());
        let durable = self.model.iter().chain(accepted).map(|manifest| (manifest, Keep::Durable));
        durable.chain(update.into_iter().chain(head).map(|manifest| (manifest, Keep::Unflushed)))
    }

    /// An update that was announced before it was flushed may be lost with the power: it is made again. What was left over of
    /// one that is durable with it stays to be settled, if somebody has removed its damaged file.
    pub(super) fn forget_lost_update(&mut self, held: &BTreeSet<Digest>) {
        let goes_alone = self.open.unsent.is_none() && self.open.control.is_none();
        self.open.update.take_if(|update| goes_alone && !held.contains(&update.manifest.digest));
    }

    /// The names of all blobs that are to be kept.
    pub fn blobs(&self) -> impl Iterator<Item = Digest> {
        let own = [self.residual.unsent, self.residual.returned, self.open.unsent, self.control, self.open.control];
        self.manifests().map(|manifest| manifest.digest).chain(own.into_iter().flatten())
    }

    /// Settles what becomes of the open round's update, now that `decree` is the newest: what was left over goes into the
    /// residual, and if the update is not among the contributors what it sent does too; if it is, the control variate that
    /// the update brought the change of is the peer's own.
    pub(super) fn settle(&mut self, me: &PeerId, decree: &Decree) {
        let Some(update) = &self.open.update else { return };
        let sent = update.manifest.digest;
        let counted = decree.contributors.iter().any(|part| part.peer == *me && part.update == sent);
        // Who learns of a later round first does not know. What was sent may be in the model: it must not count twice.
        let counted = counted || decree.round > self.open.round;
        if let Some(unsent) = self.open.unsent {
            self.residual = Residual { unsent: Some(unsent), returned: (!counted).then_some(sent) };
        }
        if counted {
            self.control = self.open.control.or(self.control);
        }
    }

    /// The bytes to store.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(&(VERSION, self)).expect("promises hold nothing that postcard refuses")
    }

    /// Reads what [`encode`](Self::encode) wrote; `None` if it did not.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        match postcard::take_from_bytes(bytes) {
            Ok(((VERSION, durable), [])) => Some(durable),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Contributor;
    use crate::protocol::samples::roster;
    use crate::transfer::Codec;
    use crate::types::Metrics;

    fn peer(name: &str) -> PeerId {
        PeerId::new(name).unwrap()
    }

    fn manifest(blob: &[u8]) -> Manifest {
        Manifest::of(blob, 1024, Codec::F32).unwrap()
    }

    /// A peer that has sent an update in round 3.
    fn durable() -> Durable {
        let (parent, metrics) = (Digest::of(b"parent"), Metrics::default());
        let update = Update { parent, manifest: manifest(b"update"), num_examples: 1, step_sum: 1.0, metrics };
        let open =
            Open { round: Round(3), update: Some(update), unsent: Some(Digest::of(b"unsent")), ..Open::default() };
        let residual = Residual { unsent: Some(Digest::of(b"earlier")), returned: Some(Digest::of(b"in vain")) };
        Durable { open, residual, ..Durable::default() }
    }

    fn decree(round: u64, contributor: &str, update: &[u8]) -> Decree {
        let (update, metrics) = (Digest::of(update), Metrics::default());
        Decree {
            round: Round(round),
            parent: Digest::of(b"parent"),
            contributors: vec![Contributor {
                peer: peer(contributor),
                update,
                num_examples: 1,
                step_sum: 1.0,
                metrics,
            }],
            ..Decree::sample(&roster(["me"]))
        }
    }

    #[test]
    fn what_was_sent_returns_only_if_no_model_was_made_of_it() {
        let (sent, unsent) = (Some(Digest::of(b"update")), Some(Digest::of(b"unsent")));
        let cases = [
            ("counted", decree(3, "me", b"update"), None),
            ("of another", decree(3, "another", b"update"), sent),
            ("another update", decree(3, "me", b"other"), sent),
            ("unknown", decree(4, "another", b"other"), None),
        ];
        for (case, decree, returned) in cases {
            let mut durable = durable();
            durable.settle(&peer("me"), &decree);
            assert_eq!(durable.residual, Residual { unsent, returned }, "{case}");
        }
    }

    #[test]
    fn a_control_variate_is_taken_over_only_with_the_update_that_brought_its_change() {
        let (old, new) = (Some(Digest::of(b"old")), Some(Digest::of(b"new")));
        let cases = [
            (decree(3, "me", b"update"), new),
            (decree(3, "another", b"update"), old),
            (decree(4, "another", b"other"), new),
        ];
        for (decree, expected) in cases {
            let mut durable = durable();
            (durable.control, durable.open.control) = (old, new);
            assert!(durable.blobs().any(|blob| Some(blob) == old) && durable.blobs().any(|blob| Some(blob) == new));
            durable.settle(&peer("me"), &decree);
            assert_eq!(durable.control, expected);
        }
        let mut without = durable();
        without.control = old;
        without.settle(&peer("me"), &decree(3, "me", b"update"));
        assert_eq!(without.control, old);
    }

    #[test]
    fn a_round_without_an_update_changes_nothing() {
        let mut without = durable();
        without.open.update = None;
        without.settle(&peer("me"), &decree(3, "another", b"update"));
        assert_eq!(without.residual, durable().residual);
    }

    #[test]
    fn every_part_of_the_residual_is_kept_and_survives_its_bytes() {
        let durable = durable();
        let kept: Vec<Digest> = durable.blobs().collect();
        for blob in ["update", "earlier", "in vain", "unsent"] {
            assert!(kept.contains(&Digest::of(blob.as_bytes())), "{blob} is deleted");
        }
        assert_eq!(Durable::decode(&durable.encode()), Some(durable));
    }
}
