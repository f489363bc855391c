//! The invariants, checked against what all peers have persisted and sent.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::aggregation::{Contribution, Strategy};
use crate::jobs::Workshop;
use crate::journal::Blobs;
use crate::protocol::message::{Body, Envelope, Head};
use crate::protocol::{Decree, Durable, Outcome, Roster};
use crate::transfer::{Codec, Codecs};
use crate::types::{Digest, Incarnation, PeerId, Round, Term};
use crate::weights::{Layout, Weights};

pub(super) const ONE_DECREE: &str = "I1 (one decree a round)";
pub(super) const QUORUM_HOLDS: &str = "I1 (a committed decree is held by a quorum)";
pub(super) const AGGREGATE: &str = "I2 (a model is the aggregate of its contributors' updates)";
pub(super) const TRAINED_ONCE: &str = "I2 (nobody trains a round twice)";
pub(super) const HEAD_FORWARD: &str = "I3 (a head never goes back)";
pub(super) const PROMISES: &str = "I4 (no promise is broken)";
pub(super) const CONSERVED: &str = "I7 (what was learned is sent or kept, once)";
pub(super) const LIVENESS: &str = "I5 (a quorum that can talk goes on)";

/// An invariant and how it was violated.
pub(super) type Broken = (&'static str, String);

/// What has been seen of all peers.
#[derive(Debug)]
pub(super) struct Check {
    codecs: Codecs,
    strategy: Strategy,
    /// The first committed decree of each round.
    decrees: BTreeMap<Round, Decree>,
    founded: Option<Roster>,
    /// What the inputs of its members are like.
    summary: Option<Bytes>,
    heads: BTreeMap<PeerId, Round>,
    ballots: BTreeMap<(PeerId, Round), BTreeMap<Term, PeerId>>,
    accepts: BTreeMap<(PeerId, Round, Term), Digest>,
    /// Every update that was trained: whose, in which round, from which model.
    updates: BTreeMap<(PeerId, Digest), (Round, Digest, Weights)>,
    /// Who has persisted an update in which round, and has it.
    trained: BTreeMap<(PeerId, Round), Digest>,
    /// What each update's training learned, and what of it the update sends: differences from the parent model.
    differences: BTreeMap<(PeerId, Digest), (Weights, Weights)>,
    books: BTreeMap<PeerId, Books>,
}

/// What a peer has learned in all rounds, and what of it has gone into models.
#[derive(Debug, Default)]
struct Books {
    learned: Vec<f64>,
    counted: Vec<f64>,
    /// An update that no decree has decided on.
    open: Option<(Round, Digest)>,
}

/// What the check may look at of one peer, up or down.
pub(super) struct Persisted<'a> {
    pub peer: &'a PeerId,
    pub incarnation: Incarnation,
    pub durable: &'a Durable,
    pub blobs: &'a Blobs,
}

impl Check {
    pub(super) fn new(codecs: Codecs, strategy: Strategy) -> Self {
        Self {
            codecs,
            strategy,
            decrees: BTreeMap::new(),
            founded: None,
            summary: None,
            heads: BTreeMap::new(),
            ballots: BTreeMap::new(),
            accepts: BTreeMap::new(),
            updates: BTreeMap::new(),
            trained: BTreeMap::new(),
            differences: BTreeMap::new(),
            books: BTreeMap::new(),
        }
    }

    /// Whether the federation has its first roster.
    pub(super) fn is_founded(&self) -> bool {
        self.founded.is_some()
    }

    /// The newest committed decree.
    pub(super) fn newest(&self) -> Option<&Decree> {
        self.decrees.values().next_back()
    }

    pub(super) fn decrees(&self) -> impl Iterator<Item = &Decree> {
        self.decrees.values()
    }

    /// A peer has persisted something.
    pub(super) fn persisted<'a>(
        &mut self,
        peer: &PeerId,
        durable: &Durable,
        all: impl FnOnce() -> Vec<Persisted<'a>>,
    ) -> Result<(), Broken> {
        if let Some(roster) = &durable.founding.roster {
            let founded = self.founded.get_or_insert_with(|| roster.clone());
            if founded != roster {
                return Err((ONE_DECREE, format!("two first rosters: {founded:?} and {roster:?}")));
            }
            let summary = self.summary.get_or_insert_with(|| durable.founding.summary.clone());
            if *summary != durable.founding.summary {
                return Err((ONE_DECREE, format!("{peer} has another summary of the inputs than others")));
            }
        }
        if let Some(update) = &durable.open.update {
            self.trained.insert((peer.clone(), durable.open.round), update.manifest.digest);
        }
        let Some(head) = &durable.head else { return Ok(()) };
        let round = head.decree.round;
        let before = self.heads.insert(peer.clone(), round);
        if before.is_some_and(|before| before > round) {
            return Err((HEAD_FORWARD, format!("{peer} went from {before:?} to {round:?}")));
        }
        match self.decrees.get(&round) {
            Some(first) if *first != head.decree => {
                let (first, second) = (first.digest(), head.decree.digest());
                Err((ONE_DECREE, format!("{round:?} has {first:?} and, at {peer}, {second:?}")))
            }
            Some(_) => Ok(()),
            None => {
                self.committed(head, &all())?;
                self.decrees.insert(round, head.decree.clone());
                Ok(())
            }
        }
    }

    /// A decree is committed for the first time.
    fn committed(&self, head: &Head, all: &[Persisted<'_>]) -> Result<(), Broken> {
        let decree = &head.decree;
        let before = decree.round.0.checked_sub(1).and_then(|round| self.decrees.get(&Round(round)));
        let roster = before.map(|parent| &parent.next_roster).or(self.founded.as_ref());
        let Some(roster) = roster else { return Err((ONE_DECREE, format!("{:?} has no roster", decree.round))) };
        if before.is_some_and(|parent| parent.digest() != decree.parent) {
            return Err((ONE_DECREE, format!("{:?} does not continue the round before", decree.round)));
        }
        if self.summary.as_ref() != Some(&decree.summary) {
            return Err((ONE_DECREE, format!("{:?} has another summary of the inputs than the genesis", decree.round)));
        }
        let votes = |peer: &Persisted<'_>| roster.incarnation(peer.peer) == Some(peer.incarnation);
        let holders = all.iter().filter(|peer| votes(peer) && holds(peer, decree)).count();
        if holders < roster.quorum() {
            let needed = roster.quorum();
            return Err((QUORUM_HOLDS, format!("{:?} is held by {holders}, not {needed}", decree.round)));
        }
        self.check_aggregate(decree, before, all)
    }

    fn check_aggregate(&self, decree: &Decree, before: Option<&Decree>, all: &[Persisted<'_>]) -> Result<(), Broken> {
        let Outcome::Model(manifest) = &decree.outcome else { return Ok(()) };
        let Some(parent) = before else { return Ok(()) };
        let mut contributions = Vec::new();
        for part in &decree.contributors {
            match self.updates.get(&(part.peer.clone(), part.update)) {
                Some((round, from, weights)) if *round == decree.round && *from == parent.model().digest => {
                    contributions.push(Contribution { share: part.share(), weights });
                }
                _ => {
                    return Err((
                        AGGREGATE,
                        format!("{:?} counts an update that {} never made", decree.round, part.peer),
                    ));
                }
            }
        }
        let Some(first) = contributions.first() else { return Err((AGGREGATE, "nobody contributes".into())) };
        let layout = model_of(first.weights.layout());
        let parent_layout = self.strategy.model_layout(&layout);
        // Whoever is up or down: somebody holds the model that the round began with.
        let blob = all.iter().find_map(|peer| peer.blobs.get(parent.model().digest).ok().flatten());
        let from = blob.and_then(|blob| self.codecs.model.decode(&blob, &parent_layout).ok());
        let Some(from) = from else {
            return Err((AGGREGATE, format!("nobody holds the parent of {:?}", decree.round)));
        };
        let expected = self.strategy.aggregate(&layout, &from, &contributions);
        let expected = expected.map_err(|error| (AGGREGATE, error.to_string()))?;
        let tuning = self.codecs.for_model(decree.round);
        let expected = self.codecs.model.encode(&expected, &tuning).map_err(|error| (AGGREGATE, error.to_string()))?;
        let expected = Digest::of(&expected);
        if expected == manifest.digest {
            Ok(())
        } else {
            Err((AGGREGATE, format!("{:?} is another model than its contributors' updates give", decree.round)))
        }
    }

    /// A peer has trained.
    pub(super) fn trained(
        &mut self,
        peer: &PeerId,
        round: Round,
        model: Digest,
        update: Digest,
        weights: Weights,
    ) -> Result<(), Broken> {
        self.updates.insert((peer.clone(), update), (round, model, weights));
        if self.trained.contains_key(&(peer.clone(), round)) {
            return Err((TRAINED_ONCE, format!("{peer} trained {round:?} again")));
        }
        Ok(())
    }

    /// A peer has lost its state, and another one has its name. What it has promised is not forgotten here.
    pub(super) fn replaced(&mut self, peer: &PeerId) {
        self.heads.remove(peer);
        self.books.remove(peer);
    }

    /// A peer has lost these blobs with its power.
    pub(super) fn lost(&mut self, peer: &PeerId, blobs: &[Digest]) {
        self.trained.retain(|(id, _), update| id != peer || !blobs.contains(update));
    }

    /// A peer has trained with a codec that sends a part: what it learned, and what it sends.
    pub(super) fn learned(&mut self, peer: &PeerId, update: Digest, learned: Weights, sent: Weights) {
        self.differences.insert((peer.clone(), update), (learned, sent));
    }

    /// A peer that sends a part has persisted something: all that it has ever learned went into models, or is sent, or kept.
    pub(super) fn check_books(&mut self, peer: &PeerId, durable: &Durable, workshop: &Workshop) -> Result<(), Broken> {
        let books = self.books.entry(peer.clone()).or_default();
        let difference = |update: Digest| self.differences.get(&(peer.clone(), update));
        if let (Some((round, update)), Some(head)) = (books.open, &durable.head)
            && durable.open.round > round
        {
            books.open = None;
            let parts = &head.decree.contributors;
            // Who learns of a later round first may have lost a part, and must not send it twice.
            let unknown = head.decree.round > round;
            if unknown || parts.iter().any(|part| part.peer == *peer && part.update == update) {
                difference(update).iter().for_each(|(_, sent)| sum(&mut books.counted, sent));
            }
        }
        let open = durable.open.update.as_ref().map(|update| update.manifest.digest);
        if let Some(update) = open.filter(|_| books.open.is_none()) {
            books.open = Some((durable.open.round, update));
            difference(update).iter().for_each(|(learned, _)| sum(&mut books.learned, learned));
        }
        let mut found = books.counted.clone();
        let (unsent, sent) = match open {
            Some(update) => (durable.open.unsent, Some(update)),
            None => (durable.residual.unsent, durable.residual.returned),
        };
        for (part, codec) in [(unsent, Codec::F32), (sent, Codec::TopK)] {
            let Some(part) = part else { continue };
            let blob = workshop.blobs.get(part).ok().flatten();
            let weights = blob.and_then(|blob| codec.decode(&blob, &workshop.layout).ok());
            let Some(weights) = weights else { return Err((CONSERVED, format!("{peer} lacks what it kept"))) };
            sum(&mut found, &weights);
        }
        let pairs = books.learned.iter().zip(&found);
        match pairs.enumerate().find(|(_, (learned, found))| (*learned - *found).abs() > 1e-3) {
            Some((place, (learned, found))) => {
                Err((CONSERVED, format!("{peer} learned {learned} at {place}, of which {found} is sent or kept")))
            }
            None => Ok(()),
        }
    }

    /// A peer has sent a message.
    pub(super) fn sent(&mut self, message: &Bytes) -> Result<(), Broken> {
        let Ok((envelope, _)) = Envelope::decode(message) else { return Ok(()) };
        let Envelope { sender, round, term, body, .. } = envelope;
        let broken = |what: String| Err((PROMISES, what));
        match body {
            Body::Ballot { candidate, .. } => {
                let ballots = self.ballots.entry((sender.clone(), round)).or_default();
                if let Some((last, _)) = ballots.last_key_value().filter(|(last, _)| **last > term) {
                    return broken(format!("{sender} voted in {round:?} {term:?} after {last:?}"));
                }
                let first = ballots.entry(term).or_insert_with(|| candidate.clone());
                if *first != candidate {
                    return broken(format!("{sender} voted for {first} and {candidate} in {round:?} {term:?}"));
                }
            }
            Body::Accept { decree } => {
                let ballots = self.ballots.get(&(sender.clone(), round));
                if ballots.is_some_and(|ballots| ballots.keys().any(|voted| *voted > term)) {
                    return broken(format!("{sender} accepted in {round:?} {term:?} after voting in a higher term"));
                }
                let first = *self.accepts.entry((sender.clone(), round, term)).or_insert(decree);
                if first != decree {
                    return broken(format!("{sender} accepted {first:?} and {decree:?} in {round:?} {term:?}"));
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// The layout of the model in an update's: what travels with it stands behind.
fn model_of(update: &Layout) -> Arc<Layout> {
    let tensors = update.tensors.iter().filter(|tensor| !tensor.name.starts_with("control."));
    Arc::new(Layout { tensors: tensors.cloned().collect() })
}

/// Adds `weights` to the sums, which begin empty.
fn sum(sums: &mut Vec<f64>, weights: &Weights) {
    sums.resize(weights.values().len(), 0.0);
    sums.iter_mut().zip(weights.values()).for_each(|(sum, value)| *sum += f64::from(*value));
}

/// Whether a peer holds a decree and its model, or has gone on from it.
fn holds(peer: &Persisted<'_>, decree: &Decree) -> bool {
    let head = peer.durable.head.as_ref();
    let beyond = head.is_some_and(|head| head.decree.round > decree.round);
    let committed = head.is_some_and(|head| head.decree == *decree);
    let accepted = peer.durable.open.accepted.as_ref().is_some_and(|(_, accepted)| accepted == decree);
    beyond || (committed || accepted) && peer.blobs.is_durable(&decree.model().digest)
}
