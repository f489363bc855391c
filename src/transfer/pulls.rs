//! The receiver's side: what is pulled, of whom, and what becomes of the chunks.
//!
//! ```text
//!  want ──▶ Intake::Begin ─────────────────────▶ ╮
//!  grants ──▶ ChunkSet to the holder             │ whoever puts chunks away, and verifies the blob as it grows
//!  arrived ──▶ Intake::Chunk ──────────────────▶ ╯
//!  kept ◀──── one chunk was put away ─────────── ╮
//!  ended ◀─── the blob is complete, or no good ─ ╯
//! ```
//!
//! A chunk leaves at once: only which ones have come is remembered here. What all pulls have in flight, with what has
//! come and is not put away, is bounded by [`GATHER_BYTES`] and two windows.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::{Assembly, ChunkError, ChunkSet, Grants, Inserted, Keep, Manifest, WINDOW_CHUNKS_MAX};
use crate::types::{Digest, PeerId};

/// How many bytes of one blob a receiver has in flight: enough to keep a link busy.
pub const WINDOW_BYTES: u32 = 2 * 1024 * 1024;

/// How many bytes of updates a leader has in flight at once: the other updates wait with their owners. What all pulls of
/// all peers have in flight (the leader's this and two windows, others' two windows each) should fit what a broker lets
/// wait: the embedded one's [`shelf_bytes`](crate::broker::BrokerConfig::shelf_bytes), of 16 peers.
pub const GATHER_BYTES: u64 = 4 * WINDOW_BYTES as u64;

/// How many bytes of a blob are in flight that was the only one when it was begun: on a busy machine a smaller window
/// runs dry before the next grant arrives.
const ALONE_BYTES: u32 = 2 * WINDOW_BYTES;

/// Chunks that came before the word of what they belong to.
const EARLY_CHUNKS_MAX: usize = 8;

/// After so many silences in a row another holder is asked.
const STALLS_MAX: u32 = 2;

/// A blob that is to be pulled.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Which.
    pub manifest: Manifest,
    /// Who has it, the one to ask first first.
    pub holders: Vec<PeerId>,
    /// What is to become of it.
    pub keep: Keep,
}

/// What is to be done with the chunks of a blob that is pulled.
#[derive(Clone, Debug)]
pub enum Intake {
    /// Chunks of this blob will come, which is to be kept so.
    Begin(Manifest, Keep),
    /// Put this one away. When the last one is, the blob is complete.
    Chunk {
        /// Of which blob, which was begun.
        blob: Digest,
        /// Which.
        index: u32,
        /// Its bytes, as many as the manifest says.
        chunk: Bytes,
    },
    /// The blob is no longer wanted.
    Abandon(Digest),
}

/// The blobs that are being pulled.
#[derive(Debug, Default)]
pub struct Pulls {
    pulls: BTreeMap<Digest, Pull>,
    early: VecDeque<(Digest, u32, Bytes)>,
    intakes: Vec<Intake>,
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

impl Pull {
    /// How many bytes it may have in flight or in memory from now on.
    fn weight(&self) -> u64 {
        let manifest = self.assembly.manifest();
        let chunks = u64::from(self.assembly.missing()) + self.grants.unkept() as u64;
        chunks.saturating_mul(u64::from(manifest.chunk_bytes)).min(weight(manifest))
    }
}

/// How many bytes a pull may have in flight.
fn weight(manifest: &Manifest) -> u64 {
    manifest.bytes.min(u64::from(WINDOW_BYTES))
}

/// How many chunks of a blob a receiver has in flight at most.
pub(super) fn window_chunks(chunk_bytes: u32) -> u32 {
    chunks_of(ALONE_BYTES, chunk_bytes)
}

/// So many bytes in chunks, two at least: one is on its way while the other is put away.
fn chunks_of(window_bytes: u32, chunk_bytes: u32) -> u32 {
    (window_bytes / chunk_bytes.max(1)).clamp(2, WINDOW_CHUNKS_MAX)
}

impl Pulls {
    /// Whether the blob is being pulled, or verified.
    pub fn contains(&self, blob: &Digest) -> bool {
        self.pulls.contains_key(blob)
    }

    /// Whether nothing is being pulled or verified.
    pub fn is_empty(&self) -> bool {
        self.pulls.is_empty()
    }

    /// Whether all chunks of all blobs have come.
    pub fn is_complete(&self) -> bool {
        self.pulls.values().all(|pull| pull.assembly.is_complete())
    }

    /// Those of `blobs`, in their order, that may be pulled at a time: the ones that are, and others while there is room
    /// for what they have in flight. One whose last chunks are being put away takes hardly any.
    pub fn fitting<T>(&self, blobs: Vec<(Manifest, T)>) -> impl Iterator<Item = (Manifest, T)> {
        let (begun, waiting): (Vec<_>, Vec<_>) = blobs.into_iter().partition(|(blob, _)| self.contains(&blob.digest));
        let taken: u64 = begun.iter().filter_map(|(blob, _)| self.pulls.get(&blob.digest)).map(Pull::weight).sum();
        let mut room = GATHER_BYTES.saturating_sub(taken);
        let others = waiting.into_iter().take_while(move |(blob, _)| {
            let fits = room > 0;
            room = room.saturating_sub(weight(blob));
            fits
        });
        begun.into_iter().chain(others)
    }

    /// Goes on with these blobs, which have these holders, begins those that are new, and abandons all others; but one
    /// of which all chunks are there is only a moment from being held.
    ///
    /// A link without delay has `retry` as its retry time: see [`Grants::new`].
    pub fn want(&mut self, needed: Vec<Wanted>, retry: Duration, now: Instant) {
        let intakes = &mut self.intakes;
        self.pulls.retain(|blob, pull| {
            let stays = pull.assembly.is_complete() || needed.iter().any(|wanted| wanted.manifest.digest == *blob);
            if !stays {
                intakes.push(Intake::Abandon(*blob));
            }
            stays
        });
        let window_bytes = if needed.len() == 1 { ALONE_BYTES } else { WINDOW_BYTES };
        for wanted in needed {
            self.pull(wanted, window_bytes, retry, now);
        }
    }

    fn pull(&mut self, wanted: Wanted, window_bytes: u32, retry: Duration, now: Instant) {
        let Wanted { manifest, holders, keep } = wanted;
        let blob = manifest.digest;
        if let Some(pull) = self.pulls.get_mut(&blob) {
            // Mostly they are the same in the same order, and there may be thousands.
            for (at, holder) in holders.into_iter().enumerate() {
                if pull.holders.get(at) != Some(&holder) && !pull.holders.contains(&holder) {
                    pull.holders.push(holder);
                }
            }
            return;
        }
        if holders.is_empty() {
            return;
        }
        let grants = Grants::new(chunks_of(window_bytes, manifest.chunk_bytes), retry);
        let pull = Pull { assembly: Assembly::new(manifest), grants, holders, at: 0, moved: now };
        self.pulls.insert(blob, pull);
        self.intakes.push(Intake::Begin(manifest, keep));
        for (of, index, chunk) in std::mem::take(&mut self.early) {
            // One that does not fit was not asked for: the right one will be.
            let _ = self.arrived(of, index, chunk, now);
        }
    }

    /// A chunk came, wanted or not.
    ///
    /// # Errors
    /// If it cannot be one of its blob.
    pub fn arrived(&mut self, blob: Digest, index: u32, chunk: Bytes, now: Instant) -> Result<(), ChunkError> {
        let Some(pull) = self.pulls.get_mut(&blob) else {
            self.early.push_back((blob, index, chunk));
            if self.early.len() > EARLY_CHUNKS_MAX {
                self.early.pop_front();
            }
            return Ok(());
        };
        let inserted = pull.assembly.insert(index, chunk.len())?;
        pull.grants.received(index, now);
        if inserted == Inserted::New {
            pull.moved = now;
            pull.grants.keeping();
            self.intakes.push(Intake::Chunk { blob, index, chunk });
        }
        Ok(())
    }

    /// A chunk of the blob was put away.
    pub fn kept(&mut self, blob: &Digest) {
        if let Some(pull) = self.pulls.get_mut(blob) {
            pull.grants.kept();
        }
    }

    /// The blob is there and verified, or no good: either way it is not being pulled any more.
    pub fn ended(&mut self, blob: &Digest) {
        self.pulls.remove(blob);
        self.early.retain(|(of, ..)| of != blob);
    }

    /// Abandons everything.
    pub fn clear(&mut self) {
        self.intakes.extend(self.pulls.keys().map(|blob| Intake::Abandon(*blob)));
        self.pulls.clear();
        self.early.clear();
    }

    /// The grants that are due: of whom, of which blob, which chunks.
    pub fn grants(&mut self, now: Instant) -> Vec<(PeerId, Digest, ChunkSet)> {
        let mut granted = Vec::new();
        for (blob, pull) in &mut self.pulls {
            if pull.grants.stalls() >= STALLS_MAX && pull.holders.len() > 1 {
                pull.at = (pull.at + 1) % pull.holders.len();
                pull.grants.restart(now);
            }
            if let Some(chunks) = pull.grants.next(&pull.assembly, now) {
                granted.push((pull.holders[pull.at].clone(), *blob, chunks));
            }
        }
        granted
    }

    /// What is due cannot be granted for want of a connection: it is due again on the next one.
    pub fn postpone(&mut self, now: Instant) {
        for pull in self.pulls.values_mut() {
            if pull.grants.deadline().is_some_and(|at| at <= now) {
                pull.grants.next(&pull.assembly, now);
            }
        }
    }

    /// What was on its way is lost with a connection: everything missing is due.
    pub fn restart(&mut self, now: Instant) {
        for pull in self.pulls.values_mut() {
            pull.grants.restart(now);
        }
    }

    /// When to ask for [`grants`](Self::grants) at the latest; `None` when nothing is waited for.
    pub fn deadline(&self) -> Option<Instant> {
        self.pulls.values().filter_map(|pull| pull.grants.deadline()).min()
    }

    /// Whether any blob got a chunk within `span`.
    pub fn is_moving(&self, now: Instant, span: Duration) -> bool {
        self.pulls.values().any(|pull| now.saturating_duration_since(pull.moved) < span)
    }

    /// What is to be done with chunks, in this order; it is told once.
    pub fn intakes(&mut self) -> Vec<Intake> {
        std::mem::take(&mut self.intakes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::Codec;

    const RETRY: Duration = Duration::from_millis(100);
    const CHUNK: u32 = ALONE_BYTES / 4;

    fn manifest(name: &str, chunks: u64) -> Manifest {
        let bytes = chunks * u64::from(CHUNK);
        Manifest { digest: Digest::of(name.as_bytes()), bytes, chunk_bytes: CHUNK, codec: Codec::F32, base: None }
    }

    fn wanted(manifest: Manifest, holders: &[&str]) -> Wanted {
        Wanted { manifest, holders: holders.iter().map(|name| peer(name)).collect(), keep: Keep::Durable }
    }

    fn peer(name: &str) -> PeerId {
        PeerId::new(name).unwrap()
    }

    fn chunk() -> Bytes {
        Bytes::from(vec![0; CHUNK as usize])
    }

    /// Which chunks are granted now, of all blobs.
    fn granted(pulls: &mut Pulls, now: Instant) -> Vec<u32> {
        pulls.grants(now).iter().flat_map(|(_, _, set)| set.iter().collect::<Vec<_>>()).collect()
    }

    #[test]
    fn chunks_leave_at_once_and_a_slow_disk_bounds_what_is_in_flight() {
        let (mut pulls, now, blob) = (Pulls::default(), Instant::now(), manifest("a", 100));
        pulls.want(vec![wanted(blob, &["holder"])], RETRY, now);
        assert!(matches!(pulls.intakes()[..], [Intake::Begin(begun, Keep::Durable)] if begun == blob));
        let mut asked = granted(&mut pulls, now);
        assert_eq!(asked, [0, 1, 2, 3]);
        // Nothing is put away: nothing more is asked for, however often.
        for index in asked.drain(..) {
            pulls.arrived(blob.digest, index, chunk(), now).unwrap();
            assert!(granted(&mut pulls, now).is_empty());
        }
        assert_eq!(pulls.intakes().len(), 4);
        assert_eq!(pulls.deadline(), None, "the holder is not to blame for a slow disk");
        pulls.kept(&blob.digest);
        pulls.kept(&blob.digest);
        assert_eq!(granted(&mut pulls, now), [4, 5]);
    }

    #[test]
    fn pulls_take_turns_and_one_that_is_being_put_away_makes_room() {
        let (mut pulls, now) = (Pulls::default(), Instant::now());
        let blobs: Vec<(Manifest, ())> = (0..6).map(|n| (manifest(&format!("{n}"), 8), ())).collect();
        let names = |chosen: Vec<(Manifest, ())>| -> Vec<usize> {
            let place = |(one, ()): &(Manifest, ())| blobs.iter().position(|(blob, ())| blob == one);
            chosen.iter().filter_map(place).collect()
        };
        let chosen: Vec<_> = pulls.fitting(blobs.clone()).collect();
        assert_eq!(names(chosen.clone()), [0, 1, 2, 3]);
        let needed = |chosen: &[(Manifest, ())]| chosen.iter().map(|(blob, ())| wanted(*blob, &["a"])).collect();
        pulls.want(needed(&chosen), RETRY, now);
        for index in 0..8 {
            pulls.arrived(blobs[1].0.digest, index, chunk(), now).unwrap();
        }
        assert_eq!(names(pulls.fitting(blobs.clone()).collect()), [0, 1, 2, 3], "nothing is put away yet");
        for _ in 0..7 {
            pulls.kept(&blobs[1].0.digest);
        }
        let chosen: Vec<_> = pulls.fitting(blobs.clone()).collect();
        assert_eq!(names(chosen), [0, 1, 2, 3, 4], "one chunk is left to put away");
    }

    #[test]
    fn what_is_no_longer_wanted_is_abandoned_unless_it_is_complete() {
        let (mut pulls, now) = (Pulls::default(), Instant::now());
        let (half, whole) = (manifest("half", 2), manifest("whole", 1));
        pulls.want(vec![wanted(half, &["a"]), wanted(whole, &["a"])], RETRY, now);
        pulls.arrived(half.digest, 0, chunk(), now).unwrap();
        pulls.arrived(whole.digest, 0, chunk(), now).unwrap();
        pulls.intakes();
        pulls.want(Vec::new(), RETRY, now);
        assert!(matches!(pulls.intakes()[..], [Intake::Abandon(blob)] if blob == half.digest));
        assert!(pulls.contains(&whole.digest) && !pulls.contains(&half.digest));
        pulls.ended(&whole.digest);
        assert!(pulls.is_empty());
    }

    #[test]
    fn a_chunk_that_came_before_the_word_of_its_blob_counts() {
        let (mut pulls, now, blob) = (Pulls::default(), Instant::now(), manifest("a", 3));
        pulls.arrived(blob.digest, 1, chunk(), now).unwrap();
        pulls.want(vec![wanted(blob, &["a"])], RETRY, now);
        assert!(matches!(pulls.intakes()[..], [Intake::Begin(..), Intake::Chunk { index: 1, .. }]));
        assert_eq!(granted(&mut pulls, now), [0, 2]);
    }

    #[test]
    fn a_silent_holder_is_replaced() {
        let (mut pulls, mut now, blob) = (Pulls::default(), Instant::now(), manifest("a", 3));
        pulls.want(vec![wanted(blob, &["a", "b"])], RETRY, now);
        let mut asked = Vec::new();
        for _ in 0..4 {
            asked.extend(pulls.grants(now).into_iter().map(|(holder, ..)| holder.to_string()));
            now = pulls.deadline().unwrap();
        }
        assert_eq!(asked, ["a", "a", "a", "b"]);
    }
}
