//! Transfers: pulls what the open round needs, serves what is held.
//!
//! What to pull is derived from the state each time (`needed`), so nothing has to be cancelled by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::protocol::message::Body;
use crate::protocol::phases::round::{Aggregate, Work};
use crate::protocol::timer::Timer;
use crate::protocol::{Action, Job, Notice, Peer, Topic};
use crate::transfer::{ChunkSet, Keep, Manifest, Pulls, Route, Serve, Wanted};
use crate::types::{Digest, PeerId};

/// What is held, pulled and served.
#[derive(Debug, Default)]
pub(in crate::protocol) struct Transfers {
    held: BTreeMap<Digest, (Manifest, Keep)>,
    pulls: Pulls,
    serves: BTreeMap<Digest, Serve>,
    /// Blobs that are being flushed.
    flushing: BTreeSet<Digest>,
    /// Blobs that could not be verified, kept or flushed, and when to try it again.
    retry: BTreeMap<Digest, Instant>,
}

impl Transfers {
    pub(in crate::protocol) fn new<'a>(held: impl Iterator<Item = (&'a Manifest, Keep)>) -> Self {
        let mut transfers = Self::default();
        held.for_each(|(manifest, keep)| transfers.hold(*manifest, keep));
        transfers
    }

    pub(in crate::protocol) fn holds(&self, blob: &Digest) -> bool {
        self.held.contains_key(blob)
    }

    /// Whether the blob is held and a promise may rest on it.
    pub(in crate::protocol) fn is_durable(&self, blob: &Digest) -> bool {
        matches!(self.held.get(blob), Some((_, Keep::Durable)))
    }

    /// Whether the blob is held and was verified as what the manifest says: the same bytes may be read in two ways.
    pub(in crate::protocol) fn holds_as(&self, manifest: &Manifest) -> bool {
        let same = |(held, _): &(Manifest, Keep)| (held.codec, held.base) == (manifest.codec, manifest.base);
        self.held.get(&manifest.digest).is_some_and(same)
    }

    pub(in crate::protocol) fn hold(&mut self, manifest: Manifest, keep: Keep) {
        let keep = if self.is_durable(&manifest.digest) { Keep::Durable } else { keep };
        self.held.insert(manifest.digest, (manifest, keep));
    }

    pub(in crate::protocol) fn retain(&mut self, keep: &BTreeSet<Digest>) {
        self.held.retain(|blob, _| keep.contains(blob));
        self.serves.retain(|blob, _| keep.contains(blob));
    }

    pub(in crate::protocol) fn deadline(&self) -> Option<Instant> {
        self.pulls.deadline().into_iter().chain(self.retry.values().copied()).min()
    }

    /// Whether any pull got a chunk within `span`.
    pub(in crate::protocol) fn is_moving(&self, now: Instant, span: Duration) -> bool {
        self.pulls.is_moving(now, span)
    }

    pub(in crate::protocol) fn kept(&mut self, blob: &Digest) {
        self.pulls.kept(blob);
    }
}

impl Peer {
    /// The newest model and the one that is or will be proposed, who has them, and how they are to be kept by now.
    fn models_to_keep(&self) -> Vec<Wanted> {
        let keep = |needed| if needed { Keep::Durable } else { Keep::Unflushed };
        // A quorum has it for good: what is worked with here may be lost, until it has been the newest for a while.
        let stays = self.open.flush || self.ended.is_some() || !self.is_training_round();
        let head = self.head_model().map(|model| {
            // All members are gone through, with every event: only while one of them is to send it.
            let holders = if self.transfers.holds(&model.digest) { Vec::new() } else { self.head_holders() };
            (*model, holders, keep(stays))
        });
        let bound = self.open.leading.as_ref().and_then(|leading| leading.bound.as_ref());
        let bound = bound.map(|(decree, holders)| (*decree.model(), holders.clone(), Keep::Durable));
        // Where this peer leads, it made the model itself.
        let made = self.open.leading.as_ref().and_then(|leading| leading.model());
        let made = made.map(|model| (*model, Vec::new(), Keep::Durable));
        let upcoming = self.open.upcoming.as_ref();
        let upcoming = upcoming.map(|(leader, model)| (*model, vec![leader.clone()], keep(self.is_needed_by(leader))));
        let models = head.into_iter().chain(bound).chain(made).chain(upcoming);
        models.map(|(manifest, holders, keep)| Wanted { manifest, holders, keep }).collect()
    }

    /// What the open round needs and is not here.
    fn needed(&self) -> Vec<Wanted> {
        let updates = self.transfers.pulls.fitting(self.updates_to_pull());
        // A leader that is gone needs them no more; who leads next pulls them of their owners.
        let updates = updates.map(|(manifest, owner)| Wanted { manifest, holders: vec![owner], keep: Keep::Unflushed });
        let mut needed = self.models_to_keep();
        needed.extend(updates);
        let missing = |blob: &Digest| !self.transfers.holds(blob) && !self.transfers.retry.contains_key(blob);
        needed.retain(|wanted| missing(&wanted.manifest.digest));
        needed
    }

    /// Has flushed what is held and is to survive a loss of power from now on.
    fn advance_flushes(&mut self, now: Instant) {
        self.open.flush |= self.timers.fired(Timer::Flush, now);
        let models = self.models_to_keep().into_iter().filter(|wanted| wanted.keep == Keep::Durable);
        let models = models.map(|wanted| wanted.manifest.digest);
        let update = self.durable.open.update.iter().filter(|_| self.open.flush);
        let update = update.map(|update| update.manifest.digest);
        for blob in models.chain(update).collect::<BTreeSet<_>>() {
            let transient = matches!(self.transfers.held.get(&blob), Some((_, Keep::Unflushed)));
            if transient && !self.transfers.retry.contains_key(&blob) && self.transfers.flushing.insert(blob) {
                self.actions.push(Action::Start(Job::Flush { blob }));
            }
        }
    }

    pub(in crate::protocol) fn on_flushed(&mut self, blob: Digest, result: Result<bool, String>, now: Instant) {
        self.transfers.flushing.remove(&blob);
        match result {
            Ok(true) => {
                self.transfers.held.get_mut(&blob).into_iter().for_each(|(_, keep)| *keep = Keep::Durable);
                self.note_kept(now);
            }
            Ok(false) => self.make_again(&blob),
            Err(why) => {
                self.transfers.retry.insert(blob, now + self.config.election_timeout);
                self.notify(Notice::Failed { what: "keeping a blob", why });
            }
        }
    }

    /// A blob was dropped: it was no longer needed, or the disk has lost it. What is needed after all is pulled again where
    /// others have it, and else made again.
    fn make_again(&mut self, blob: &Digest) {
        self.transfers.held.remove(blob);
        if let Some(leading) = &mut self.open.leading
            && matches!(&leading.aggregate, Aggregate::Done(model, _) if model.digest == *blob)
            && leading.proposal.is_none()
        {
            leading.aggregate = Aggregate::Gathering;
        }
        let is_own = self.durable.open.update.as_ref().is_some_and(|update| update.manifest.digest == *blob);
        if is_own && self.open.training == Work::Done(()) {
            self.open.training = Work::Idle;
        }
    }

    /// What is kept may be the newest model.
    fn note_kept(&mut self, now: Instant) {
        if self.note_model_held() {
            self.persist();
            self.note_done(now);
        }
    }

    pub(in crate::protocol) fn advance_transfers(&mut self, now: Instant) {
        if self.stopped {
            self.transfers.pulls.clear();
            self.transfers.retry.clear();
        } else {
            self.transfers.retry.retain(|_, at| *at > now);
            let (needed, retry) = (self.needed(), self.heartbeat());
            self.transfers.pulls.want(needed, retry, now);
            self.advance_flushes(now);
        }
        let intakes = self.transfers.pulls.intakes();
        self.actions.extend(intakes.into_iter().map(Action::Take));
        if !self.connected {
            return self.transfers.pulls.postpone(now);
        }
        for (holder, blob, chunks) in self.transfers.pulls.grants(now) {
            self.publish(Topic::Grant(self.round(), holder), Body::Grant { blob, chunks });
        }
    }

    pub(in crate::protocol) fn restart_transfers(&mut self, now: Instant) {
        self.transfers.serves.clear();
        self.transfers.pulls.restart(now);
    }

    pub(in crate::protocol) fn on_chunk(&mut self, blob: Digest, index: u32, chunk: Bytes, now: Instant) {
        if self.transfers.holds(&blob) {
            return;
        }
        if let Err(error) = self.transfers.pulls.arrived(blob, index, chunk, now) {
            self.bad_message(None, error.to_string());
        }
    }

    pub(in crate::protocol) fn on_verified(
        &mut self,
        manifest: Manifest,
        keep: Keep,
        result: Result<(), String>,
        now: Instant,
    ) {
        self.transfers.pulls.ended(&manifest.digest);
        match result {
            Ok(()) => {
                self.transfers.hold(manifest, keep);
                self.note_kept(now);
            }
            Err(why) => self.on_unusable(manifest.digest, why, now),
        }
    }

    /// A blob that is not what it should be: an update is left out, a model is pulled again.
    fn on_unusable(&mut self, blob: Digest, why: String, now: Instant) {
        let owner =
            self.open.updates.iter().find(|(_, update)| update.manifest.digest == blob).map(|(peer, _)| peer.clone());
        match owner {
            Some(peer) => self.leave_out(peer, why),
            None => {
                self.transfers.retry.insert(blob, now + self.config.election_timeout);
                self.notify(Notice::Failed { what: "pulling a model", why });
            }
        }
    }

    pub(in crate::protocol) fn on_grant(&mut self, sender: &PeerId, blob: Digest, chunks: &ChunkSet, now: Instant) {
        let Some((manifest, _)) = self.transfers.held.get(&blob).copied() else { return };
        self.linger(now);
        if let Err(error) = chunks.check(manifest.chunks()) {
            return self.bad_message(Some(sender.clone()), error.to_string());
        }
        let upcoming = self.open.leading.as_ref().and_then(|leading| leading.model());
        let several = upcoming.is_some_and(|model| model.digest == blob)
            && self.durable.roster().is_some_and(|roster| roster.len() > 2);
        let repeat_after = self.heartbeat();
        let serve = self.transfers.serves.entry(blob).or_insert_with(|| Serve::of(&manifest, repeat_after));
        let round = self.durable.open.round;
        for (index, route) in serve.granted(sender, chunks, now, several) {
            let topic = match route {
                Route::All => Topic::WeightsAll(round),
                Route::One(receiver) => Topic::Weights(round, receiver),
            };
            let header = self.envelope(Body::Chunk { blob, index }).encode();
            self.actions.push(Action::SendChunk { topic, header, manifest, index });
        }
    }
}
