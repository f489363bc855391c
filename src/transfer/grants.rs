//! The receiver's window: which chunks to ask for, and when to ask again.
//!
//! Two signs say that a chunk is lost. *Overtaken*: a chunk of a later grant arrived first (one holder answers in
//! order, mostly), which is known within one round trip. *Silence*: nothing of what was granted came for a while,
//! which also covers a lost grant, a lost tail and a dead holder. Both adapt to the link, as TCP's do (RFC 6298 for
//! the retry time, RFC 4653 for the tolerance to reordering): what was asked for twice arrives twice, and a slow link
//! must not be filled with repeats.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::{Assembly, ChunkSet, RANGES_MAX};

/// The largest window: a grant of it fits a [`ChunkSet`] whatever its gaps.
pub const WINDOW_CHUNKS_MAX: u32 = RANGES_MAX as u32;

/// The longest time between two repeats, as a multiple of the first.
pub const RETRY_FACTOR_MAX: u32 = 32;

/// What a receiver has granted of one blob and not received.
///
/// The caller asks [`next`](Self::next) for a grant whenever something happened: after a chunk, at the
/// [`deadline`](Self::deadline), after a [`restart`](Self::restart).
#[derive(Clone, Debug)]
pub struct Grants {
    window: usize,
    /// The retry time of a link without delay; never undercut.
    retry: Duration,
    /// The retry time that this link asks for, learned from the silences between its chunks.
    pace: Duration,
    /// Expiries since a granted chunk arrived: each doubles the wait.
    expiries: u32,
    /// Expiries since any chunk arrived.
    stalls: u32,
    outstanding: BTreeMap<u32, Outstanding>,
    /// How many chunks have arrived and are not put away.
    unkept: usize,
    /// Granted before and given up: first in the next grant.
    lost: BTreeSet<u32>,
    /// From here on no chunk was granted.
    fresh: u32,
    /// The number of the next grant.
    batch: u64,
    /// How many chunks of later grants may overtake one that is not lost.
    reordering: u32,
    /// Given up because overtaken. One that arrives all the same, or twice, was given up too early.
    overtaken: BTreeSet<u32>,
    /// When the present silence began; `None` when nothing is waited for.
    silent_since: Option<Instant>,
    deadline: Option<Instant>,
}

/// A chunk that was granted and has not arrived.
#[derive(Clone, Copy, Debug)]
struct Outstanding {
    batch: u64,
    /// How many chunks of later grants arrived before it.
    overtakers: u32,
}

impl Grants {
    /// Nothing granted yet.
    ///
    /// `window_chunks` (1 to [`WINDOW_CHUNKS_MAX`], else the nearer of the two) bounds what is outstanding: 1 to 2 MiB
    /// of chunks keep a fast link busy. `retry` is how long nothing may come before everything outstanding is granted
    /// again: above the round trip, including the queue at the holder. It doubles while nothing arrives, up to
    /// [`RETRY_FACTOR_MAX`] times itself.
    pub fn new(window_chunks: u32, retry: Duration) -> Self {
        Self {
            window: window_chunks.clamp(1, WINDOW_CHUNKS_MAX) as usize,
            retry,
            pace: retry,
            expiries: 0,
            stalls: 0,
            outstanding: BTreeMap::new(),
            unkept: 0,
            lost: BTreeSet::new(),
            fresh: 0,
            batch: 0,
            reordering: 0,
            overtaken: BTreeSet::new(),
            silent_since: None,
            deadline: None,
        }
    }

    /// Which chunks to grant now; `None` when enough is outstanding or nothing is missing.
    ///
    /// Refills the window when at most half of it is outstanding, so a grant is worth its message.
    pub fn next(&mut self, assembly: &Assembly, now: Instant) -> Option<ChunkSet> {
        self.outstanding.retain(|&index, _| !assembly.has(index));
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            self.expire();
        }
        if self.outstanding.len() + self.unkept > self.window / 2 {
            return None;
        }
        let granted = self.fill_window(assembly);
        if self.outstanding.is_empty() {
            (self.silent_since, self.deadline) = (None, None);
        }
        if granted.is_empty() {
            return None;
        }
        self.silent_since.get_or_insert(now);
        self.deadline = Some(now + self.wait());
        Some(ChunkSet::new(granted).expect("the window has no more chunks than a set may have ranges"))
    }

    /// Chunk `index` of this blob arrived, wanted or not, new or not.
    pub fn received(&mut self, index: u32, now: Instant) {
        self.stalls = 0;
        if index >= self.fresh {
            // Somebody else's grant brought it: the holder lives, but that says nothing about what was granted here.
            return;
        }
        self.learn_pace(now);
        self.lost.remove(&index);
        match self.outstanding.remove(&index) {
            Some(arrived) => self.give_up_overtaken(arrived.batch),
            None if self.overtaken.remove(&index) => self.tolerate_reordering(),
            None => {}
        }
        let waiting = !self.outstanding.is_empty();
        self.silent_since = waiting.then_some(now);
        self.deadline = waiting.then(|| now + self.wait());
    }

    /// A chunk that arrived is about to be put away. Until it [is](Self::kept), it has a place in the window: a disk
    /// that is slower than the line slows the holder, and fills no memory.
    pub fn keeping(&mut self) {
        self.unkept += 1;
    }

    /// A chunk was put away.
    pub fn kept(&mut self) {
        self.unkept = self.unkept.saturating_sub(1);
    }

    /// How many chunks have arrived and are not put away.
    pub fn unkept(&self) -> usize {
        self.unkept
    }

    /// When to call [`next`](Self::next) at the latest; `None` when nothing is waited for.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// How many times in a row everything outstanding was given up without a chunk in between.
    ///
    /// The sign to try another holder. The first chunk of a slow link may take several, so a caller that has
    /// no other holder goes on.
    pub fn stalls(&self) -> u32 {
        self.stalls
    }

    /// How many chunks are granted and neither received nor given up.
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// Forgets what was granted, after a reconnect or for another holder: everything missing may be granted at once.
    pub fn restart(&mut self, now: Instant) {
        self.outstanding.clear();
        self.lost.clear();
        self.overtaken.clear();
        self.fresh = 0;
        self.expiries = 0;
        self.stalls = 0;
        self.silent_since = None;
        self.deadline = Some(now);
    }

    fn expire(&mut self) {
        if self.outstanding.is_empty() {
            return;
        }
        self.lost.extend(std::mem::take(&mut self.outstanding).into_keys());
        self.expiries = self.expiries.saturating_add(1);
        self.stalls = self.stalls.saturating_add(1);
    }

    /// Takes chunks into the window while it has room: lost ones first, then in order. Returns them ascending.
    fn fill_window(&mut self, assembly: &Assembly) -> BTreeSet<u32> {
        let mut granted = BTreeSet::new();
        let grant = Outstanding { batch: self.batch, overtakers: 0 };
        while self.outstanding.len() + self.unkept < self.window {
            let Some(index) = self.take_missing(assembly) else { break };
            self.outstanding.insert(index, grant);
            granted.insert(index);
        }
        self.batch += 1;
        granted
    }

    fn take_missing(&mut self, assembly: &Assembly) -> Option<u32> {
        while let Some(index) = self.lost.pop_first() {
            if !assembly.has(index) {
                return Some(index);
            }
        }
        while self.fresh < assembly.manifest().chunks() {
            let index = self.fresh;
            self.fresh += 1;
            if !assembly.has(index) {
                return Some(index);
            }
        }
        None
    }

    /// A chunk of grant `batch` arrived: those of earlier grants were overtaken once more.
    fn give_up_overtaken(&mut self, batch: u64) {
        let reordering = self.reordering;
        let given_up = self.outstanding.extract_if(.., |_, chunk| {
            chunk.overtakers += u32::from(chunk.batch < batch);
            chunk.overtakers > reordering
        });
        for (index, _) in given_up {
            self.lost.insert(index);
            self.overtaken.insert(index);
        }
    }

    fn tolerate_reordering(&mut self) {
        self.reordering = (2 * self.reordering + 1).min(self.window as u32);
    }

    /// Twice the silence that a chunk ended is how long the next one may take; a pace of the past fades by half.
    fn learn_pace(&mut self, now: Instant) {
        self.expiries = 0;
        let silence = self.silent_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        self.pace = (self.pace / 2).max(silence.saturating_mul(2)).clamp(self.retry, self.wait_max());
    }

    fn wait(&self) -> Duration {
        let doublings = 1 << self.expiries.min(RETRY_FACTOR_MAX.ilog2());
        self.pace.saturating_mul(doublings).min(self.wait_max())
    }

    fn wait_max(&self) -> Duration {
        self.retry.saturating_mul(RETRY_FACTOR_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::{Codec, Manifest};

    const RETRY: Duration = Duration::from_millis(100);

    /// A receiver of a blob of `chunks` chunks, at `now`.
    struct Receiver {
        assembly: Assembly,
        grants: Grants,
        now: Instant,
    }

    impl Receiver {
        fn new(chunks: usize, window: u32) -> Self {
            let manifest = Manifest::of(&vec![0; 1024 * chunks], 1024, Codec::F32).unwrap();
            let (assembly, grants) = (Assembly::new(manifest), Grants::new(window, RETRY));
            Self { assembly, grants, now: Instant::now() }
        }

        fn next(&mut self) -> Vec<u32> {
            let set = self.grants.next(&self.assembly, self.now);
            set.map_or_else(Vec::new, |set| set.iter().collect())
        }

        fn receive(&mut self, indices: &[u32]) {
            for &index in indices {
                self.assembly.insert(index, 1024).unwrap();
                self.grants.received(index, self.now);
            }
        }

        /// Waits for the deadline; returns how long that took.
        fn wait(&mut self) -> Duration {
            let deadline = self.grants.deadline().expect("something is waited for");
            let waited = deadline - self.now;
            self.now = deadline;
            waited
        }
    }

    #[test]
    fn the_window_is_refilled_when_half_of_it_arrived() {
        let mut receiver = Receiver::new(9, 4);
        assert_eq!(receiver.next(), [0, 1, 2, 3]);
        receiver.receive(&[0]);
        assert!(receiver.next().is_empty());
        receiver.receive(&[1]);
        assert_eq!(receiver.next(), [4, 5]);
        assert_eq!(receiver.grants.outstanding(), 4);
        receiver.receive(&[2, 3, 4, 5]);
        assert_eq!(receiver.next(), [6, 7, 8]);
        receiver.receive(&[6, 7, 8]);
        assert!(receiver.next().is_empty());
        assert_eq!(receiver.grants.deadline(), None);
    }

    #[test]
    fn a_window_of_one_chunk_works() {
        let mut receiver = Receiver::new(2, 0);
        assert_eq!(receiver.next(), [0]);
        receiver.receive(&[0]);
        assert_eq!(receiver.next(), [1]);
    }

    #[test]
    fn a_chunk_that_a_later_grant_overtook_is_granted_again() {
        let mut receiver = Receiver::new(20, 4);
        receiver.next();
        receiver.receive(&[0, 2]);
        assert_eq!(receiver.next(), [4, 5]);
        receiver.receive(&[3]);
        assert!(receiver.next().is_empty(), "the same grant overtook nothing");
        receiver.receive(&[4]);
        assert_eq!(receiver.next(), [1, 6, 7]);
    }

    #[test]
    fn reordering_is_learned() {
        let mut receiver = Receiver::new(100, 4);
        receiver.next();
        receiver.receive(&[0, 2]);
        receiver.next();
        receiver.receive(&[4]);
        assert_eq!(receiver.next(), [1, 3, 6], "1 and 3 were overtaken");
        receiver.receive(&[1, 1]);
        assert_eq!(receiver.grants.reordering, 1, "1 came twice: it was given up too early");
        receiver.receive(&[3]);
        assert_eq!(receiver.next(), [5, 7, 8], "5 had been overtaken by 1");
        receiver.receive(&[7]);
        assert_eq!(receiver.grants.outstanding(), 3, "6 may be overtaken once");
        receiver.receive(&[8]);
        assert_eq!(receiver.next(), [6, 9, 10]);
    }

    #[test]
    fn silence_grants_everything_again_after_twice_the_time_each_time() {
        let mut receiver = Receiver::new(9, 2);
        assert_eq!(receiver.next(), [0, 1]);
        let waits: Vec<_> = (0..8)
            .map(|stalls| {
                assert_eq!(receiver.grants.stalls(), stalls);
                let waited = receiver.wait();
                assert_eq!(receiver.next(), [0, 1]);
                waited.as_millis() / RETRY.as_millis()
            })
            .collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 32, 32]);
        receiver.receive(&[1]);
        assert_eq!(receiver.grants.stalls(), 0);
    }

    #[test]
    fn the_retry_time_goes_back_once_chunks_come_quickly() {
        let mut receiver = Receiver::new(100, 8);
        receiver.next();
        for _ in 0..3 {
            receiver.wait();
            receiver.next();
        }
        receiver.receive(&[0]);
        let wait = |receiver: &Receiver| receiver.grants.deadline().unwrap() - receiver.now;
        assert_eq!(wait(&receiver), 14 * RETRY, "twice the silence of 1 + 2 + 4");
        receiver.receive(&[1, 2, 3, 4]);
        assert_eq!(wait(&receiver), RETRY);
    }

    #[test]
    fn a_slow_link_is_given_its_time() {
        let mut receiver = Receiver::new(100, 2);
        receiver.next();
        receiver.now += 10 * RETRY;
        receiver.receive(&[0]);
        receiver.next();
        for index in 1..50 {
            receiver.now += 10 * RETRY;
            assert!(receiver.grants.deadline().unwrap() > receiver.now, "chunk {index} was given up");
            receiver.receive(&[index]);
            receiver.next();
        }
    }

    #[test]
    fn what_is_not_put_away_has_a_place_in_the_window() {
        let mut receiver = Receiver::new(12, 4);
        assert_eq!(receiver.next(), [0, 1, 2, 3]);
        receiver.receive(&[0, 1, 2, 3]);
        (0..4).for_each(|_| receiver.grants.keeping());
        assert!(receiver.next().is_empty());
        receiver.grants.kept();
        assert!(receiver.next().is_empty(), "half of the window is still taken");
        receiver.grants.kept();
        assert_eq!(receiver.next(), [4, 5]);
        (0..2).for_each(|_| receiver.grants.kept());
        assert_eq!(receiver.next(), [6, 7]);
    }

    #[test]
    fn what_others_granted_is_not_granted_and_does_not_hide_a_loss() {
        let mut receiver = Receiver::new(6, 2);
        assert_eq!(receiver.next(), [0, 1]);
        let deadline = receiver.grants.deadline();
        receiver.now += RETRY / 2;
        receiver.receive(&[2, 3]);
        assert_eq!(receiver.grants.deadline(), deadline);
        receiver.receive(&[0, 1]);
        assert_eq!(receiver.next(), [4, 5]);
    }

    #[test]
    fn others_chunks_show_that_the_holder_lives() {
        let mut receiver = Receiver::new(6, 2);
        receiver.next();
        receiver.wait();
        receiver.next();
        assert_eq!(receiver.grants.stalls(), 1);
        receiver.receive(&[5]);
        assert_eq!(receiver.grants.stalls(), 0);
        assert_eq!(receiver.wait(), 2 * RETRY, "nothing granted here came, so the wait stays doubled");
    }

    #[test]
    fn a_restart_grants_what_is_missing_at_once() {
        let mut receiver = Receiver::new(6, 4);
        receiver.next();
        receiver.receive(&[1]);
        receiver.grants.restart(receiver.now);
        assert_eq!(receiver.wait(), Duration::ZERO);
        assert_eq!(receiver.next(), [0, 2, 3, 4]);
        assert_eq!(receiver.grants.stalls(), 0);
    }

    #[test]
    fn a_restart_of_a_complete_blob_waits_for_nothing() {
        let mut receiver = Receiver::new(2, 4);
        receiver.next();
        receiver.receive(&[0, 1]);
        receiver.grants.restart(receiver.now);
        assert!(receiver.next().is_empty());
        assert_eq!(receiver.grants.deadline(), None);
    }
}
