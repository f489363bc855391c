//! Transfers: pulls what the open round needs, serves what is held.
//!
//! What to pull is derived from the state each time (`needed`), so nothing has to be cancelled by hand.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::protocol::message::Body;
use crate::protocol::{Action, Job, Peer, Topic};
use crate::transfer::{Assembly, ChunkSet, Grants, Inserted, Manifest, Route, Serve};
use crate::types::{Digest, PeerId};

/// How many bytes of one blob a receiver has in flight: enough to keep a link busy.
pub const WINDOW_BYTES: u32 = 2 * 1024 * 1024;

/// How many bytes of updates a leader has in flight at once: the other updates wait with their owners. What all of
/// one peer's pulls have in flight must fit half of the broker's log of its topic.
pub const GATHER_BYTES: u64 = 4 * WINDOW_BYTES as u64;

/// Chunks that came before the word of what they belong to.
const EARLY_CHUNKS_MAX: usize = 8;

/// After so many silences in a row another holder is asked.
const STALLS_MAX: u32 = 2;

/// What is held, pulled and served.
#[derive(Debug, Default)]
pub(in crate::protocol) struct Transfers {
    held: BTreeMap<Digest, Manifest>,
    pulls: BTreeMap<Digest, Pull>,
    /// Complete, and being verified.
    verifying: BTreeSet<Digest>,
    serves: BTreeMap<Digest, Serve>,
    /// Blobs that could not be verified or kept, and when to pull them again.
    retry: BTreeMap<Digest, Instant>,
    early: VecDeque<(Digest, u32, Bytes)>,
}

#[derive(Debug)]
struct Pull {
    assembly: Assembly,
    grants: Grants,
    holders: Vec<PeerId>,
    /// Which holder is asked.
    at: usize,
    moved: Instant,
}

impl Transfers {
    pub(in crate::protocol) fn new<'a>(held: impl Iterator<Item = &'a Manifest>) -> Self {
        Self { held: held.map(|manifest| (manifest.digest, *manifest)).collect(), ..Self::default() }
    }

    pub(in crate::protocol) fn holds(&self, blob: &Digest) -> bool {
        self.held.contains_key(blob)
    }

    /// Whether the blob is held and was verified as what the manifest says: the same bytes may be read in two ways.
    pub(in crate::protocol) fn holds_as(&self, manifest: &Manifest) -> bool {
        let same = |held: &Manifest| (held.codec, held.base) == (manifest.codec, manifest.base);
        self.held.get(&manifest.digest).is_some_and(same)
    }

    pub(in crate::protocol) fn hold(&mut self, manifest: Manifest) {
        self.held.insert(manifest.digest, manifest);
    }

    pub(in crate::protocol) fn retain(&mut self, keep: &BTreeSet<Digest>) {
        self.held.retain(|blob, _| keep.contains(blob));
        self.serves.retain(|blob, _| keep.contains(blob));
    }

    pub(in crate::protocol) fn deadline(&self) -> Option<Instant> {
        let grants = self.pulls.values().filter_map(|pull| pull.grants.deadline());
        grants.chain(self.retry.values().copied()).min()
    }

    /// Whether any pull got a chunk within `span`.
    pub(in crate::protocol) fn is_moving(&self, now: Instant, span: Duration) -> bool {
        self.pulls.values().any(|pull| now.saturating_duration_since(pull.moved) < span)
    }
}

impl Peer {
    /// What the open round needs and is not here, and who has it.
    fn needed(&self) -> Vec<(Manifest, Vec<PeerId>)> {
        let bound = self.open.leading.as_ref().and_then(|leading| leading.bound.as_ref());
        let bound = bound.map(|(decree, holders)| (*decree.model(), holders.clone()));
        let proposal = self.proposal_to_pull().map(|(model, leader)| (model, vec![leader]));
        let mut needed: Vec<_> = self.head_to_pull().into_iter().chain(bound).chain(proposal).collect();
        let updates = self.updates_to_pull();
        let (begun, waiting): (Vec<_>, Vec<_>) = updates.into_iter().partition(|(update, _)| {
            self.transfers.pulls.contains_key(&update.digest) || self.transfers.verifying.contains(&update.digest)
        });
        let mut room = GATHER_BYTES;
        let chosen = begun.into_iter().chain(waiting).take_while(|(update, _)| {
            let fits = room > 0;
            room = room.saturating_sub(update.bytes.min(u64::from(WINDOW_BYTES)));
            fits
        });
        needed.extend(chosen.map(|(update, owner)| (update, vec![owner])));
        let wanted = |blob: &Digest| !self.transfers.holds(blob) && !self.transfers.retry.contains_key(blob);
        needed.retain(|(manifest, _)| wanted(&manifest.digest));
        needed
    }

    pub(in crate::protocol) fn advance_transfers(&mut self, now: Instant) {
        if self.stopped {
            self.transfers.pulls.clear();
            self.transfers.retry.clear();
            return;
        }
        self.transfers.retry.retain(|_, at| *at > now);
        let needed = self.needed();
        self.transfers.pulls.retain(|blob, _| needed.iter().any(|(manifest, _)| manifest.digest == *blob));
        for (manifest, holders) in needed {
            self.pull(manifest, holders, now);
        }
        self.grant(now);
    }

    fn pull(&mut self, manifest: Manifest, holders: Vec<PeerId>, now: Instant) {
        let blob = manifest.digest;
        if self.transfers.verifying.contains(&blob) || holders.is_empty() {
            return;
        }
        if let Some(pull) = self.transfers.pulls.get_mut(&blob) {
            for holder in holders {
                if !pull.holders.contains(&holder) {
                    pull.holders.push(holder);
                }
            }
            return;
        }
        let window = (WINDOW_BYTES / manifest.chunk_bytes.max(1)).max(2);
        let grants = Grants::new(window, self.heartbeat());
        let pull = Pull { assembly: Assembly::new(manifest), grants, holders, at: 0, moved: now };
        self.transfers.pulls.insert(blob, pull);
        let early = std::mem::take(&mut self.transfers.early);
        for (of, index, chunk) in early {
            if of == blob {
                self.on_chunk(of, index, chunk, now);
            } else {
                self.transfers.early.push_back((of, index, chunk));
            }
        }
    }

    /// Sends the grants that are due.
    fn grant(&mut self, now: Instant) {
        if !self.connected {
            // Granted again on the next connection.
            for pull in self.transfers.pulls.values_mut() {
                if pull.grants.deadline().is_some_and(|at| at <= now) {
                    pull.grants.next(&pull.assembly, now);
                }
            }
            return;
        }
        let mut granted = Vec::new();
        for (blob, pull) in &mut self.transfers.pulls {
            if pull.grants.stalls() >= STALLS_MAX && pull.holders.len() > 1 {
                pull.at = (pull.at + 1) % pull.holders.len();
                pull.grants.restart(now);
            }
            if let Some(chunks) = pull.grants.next(&pull.assembly, now) {
                granted.push((pull.holders[pull.at].clone(), *blob, chunks));
            }
        }
        for (holder, blob, chunks) in granted {
            self.publish(Topic::Grant(self.round(), holder), Body::Grant { blob, chunks });
        }
    }

    pub(in crate::protocol) fn restart_transfers(&mut self, now: Instant) {
        self.transfers.serves.clear();
        for pull in self.transfers.pulls.values_mut() {
            pull.grants.restart(now);
        }
    }

    pub(in crate::protocol) fn on_chunk(&mut self, blob: Digest, index: u32, chunk: Bytes, now: Instant) {
        let Some(pull) = self.transfers.pulls.get_mut(&blob) else {
            if !self.transfers.holds(&blob) && !self.transfers.verifying.contains(&blob) {
                self.transfers.early.push_back((blob, index, chunk));
                if self.transfers.early.len() > EARLY_CHUNKS_MAX {
                    self.transfers.early.pop_front();
                }
            }
            return;
        };
        match pull.assembly.insert(index, chunk) {
            Ok(Inserted::New) => pull.moved = now,
            Ok(Inserted::Duplicate) => {}
            Err(error) => return self.bad_message(None, error.to_string()),
        }
        pull.grants.received(index, now);
        if pull.assembly.is_complete()
            && let Some(pull) = self.transfers.pulls.remove(&blob)
        {
            self.transfers.verifying.insert(blob);
            let manifest = *pull.assembly.manifest();
            self.actions.push(Action::Start(Job::Verify { manifest, chunks: pull.assembly.into_chunks() }));
        }
    }

    pub(in crate::protocol) fn on_verified(&mut self, manifest: Manifest, result: Result<(), String>, now: Instant) {
        self.transfers.verifying.remove(&manifest.digest);
        match result {
            Ok(()) => {
                self.transfers.hold(manifest);
                if self.note_model_held() {
                    self.persist();
                    self.note_done(now);
                }
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
                self.notify(crate::protocol::Notice::Failed { what: "pulling a model", why });
            }
        }
    }

    pub(in crate::protocol) fn on_grant(&mut self, sender: &PeerId, blob: Digest, chunks: &ChunkSet, now: Instant) {
        let Some(manifest) = self.transfers.held.get(&blob).copied() else { return };
        self.linger(now);
        if let Err(error) = chunks.check(manifest.chunks()) {
            return self.bad_message(Some(sender.clone()), error.to_string());
        }
        let proposed =
            self.open.leading.as_ref().and_then(|leading| leading.proposal.as_ref()).map(|decree| decree.model());
        let several = proposed.is_some_and(|model| model.digest == blob)
            && self.durable.roster().is_some_and(|roster| roster.len() > 2);
        let repeat_after = self.heartbeat();
        let serve = self.transfers.serves.entry(blob).or_insert_with(|| Serve::new(manifest.chunks(), repeat_after));
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
