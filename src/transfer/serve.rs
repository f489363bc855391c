//! The holder's side: where each granted chunk goes.
//!
//! When several receivers pull one blob, the first grant of a chunk publishes it to everyone. A receiver that grants
//! it later is lagging or has lost it, and is served alone: the others do not wait for it and do not get it twice.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::pulls::window_chunks;
use super::{ChunkSet, Manifest, WINDOW_CHUNKS_MAX};
use crate::types::PeerId;

/// How many receivers of one blob are remembered. Any beyond are served just as surely, with some duplicates.
pub const RECEIVERS_MAX: usize = 256;

/// To whom a chunk is published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// To every receiver, once.
    All,
    /// To this receiver only.
    One(PeerId),
}

/// What a holder has sent of one blob. Drop it and start anew when the broker was lost with all it held.
#[derive(Clone, Debug)]
pub struct Serve {
    /// By chunk: when it was published to everyone.
    published: Vec<Option<Instant>>,
    /// How many chunks an honest receiver grants at a time, at most.
    window: u32,
    repeat_after: Duration,
    receivers: BTreeMap<PeerId, Bitmap>,
}

impl Serve {
    /// Nothing sent yet of the blob of `manifest`, which is the holder's own: see [`Serve::new`].
    pub fn of(manifest: &Manifest, repeat_after: Duration) -> Self {
        Self { window: window_chunks(manifest.chunk_bytes), ..Self::new(manifest.chunks(), repeat_after) }
    }

    /// Nothing sent yet of a blob of `chunks` chunks, of whatever length.
    ///
    /// For `repeat_after` a chunk published to everyone is on its way to whoever asks for the first time. A receiver's
    /// first retry time fits: one that still lacks it then asks again.
    pub fn new(chunks: u32, repeat_after: Duration) -> Self {
        let published = vec![None; chunks as usize];
        Self { published, window: WINDOW_CHUNKS_MAX, repeat_after, receivers: BTreeMap::new() }
    }

    /// Receiver `from` grants `set`: which chunks to send now, and to whom.
    ///
    /// `several`: whether several receivers of this blob are expected. Indices past the blob's end, and any beyond
    /// what an honest receiver grants at a time, are ignored: a grant is short, and what it asks for is read into memory.
    pub fn granted(&mut self, from: &PeerId, set: &ChunkSet, now: Instant, several: bool) -> Vec<(u32, Route)> {
        let chunks = self.published.len();
        let known = self.receivers.contains_key(from) || self.receivers.len() < RECEIVERS_MAX;
        let mut asked = known.then(|| self.receivers.entry(from.clone()).or_insert_with(|| Bitmap::new(chunks)));

        let mut sends = Vec::new();
        for index in set.iter().take_while(|&i| (i as usize) < chunks).take(self.window as usize) {
            let first_ask = asked.as_mut().is_some_and(|asked| asked.insert(index));
            let published = &mut self.published[index as usize];
            match *published {
                None if several => {
                    *published = Some(now);
                    sends.push((index, Route::All));
                }
                // It is on its way to this receiver too. If not, the receiver asks a second time and is served alone.
                Some(at) if several && first_ask && now.saturating_duration_since(at) < self.repeat_after => {}
                _ => sends.push((index, Route::One(from.clone()))),
            }
        }
        sends
    }
}

/// One bit a chunk.
#[derive(Clone, Debug)]
struct Bitmap(Vec<u64>);

impl Bitmap {
    fn new(bits: usize) -> Self {
        Self(vec![0; bits.div_ceil(64)])
    }

    /// Sets a bit; returns whether it was clear.
    fn insert(&mut self, index: u32) -> bool {
        let (word, bit) = (&mut self.0[index as usize / 64], 1 << (index % 64));
        let clear = *word & bit == 0;
        *word |= bit;
        clear
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::Codec;
    use crate::types::Digest;

    const REPEAT_AFTER: Duration = Duration::from_millis(100);

    fn peer(name: &str) -> PeerId {
        PeerId::new(name).unwrap()
    }

    fn set(indices: &[u32]) -> ChunkSet {
        ChunkSet::new(indices.iter().copied()).unwrap()
    }

    #[test]
    fn one_grant_gets_no_more_than_an_honest_receiver_asks_for_at_a_time() {
        let manifest =
            Manifest { digest: Digest::of(b""), bytes: 1 << 40, chunk_bytes: 1 << 20, codec: Codec::F32, base: None };
        let all = ChunkSet::new(0..4096).unwrap();
        let sends = Serve::of(&manifest, REPEAT_AFTER).granted(&peer("a"), &all, Instant::now(), false);
        assert_eq!(sends.len(), 4, "chunks of a megabyte");
    }

    #[test]
    fn the_first_grant_publishes_to_all_and_the_others_first_is_answered_by_it() {
        let (mut serve, now) = (Serve::new(4, REPEAT_AFTER), Instant::now());
        assert_eq!(serve.granted(&peer("a"), &set(&[0, 1]), now, true), [(0, Route::All), (1, Route::All)]);
        let soon = now + REPEAT_AFTER / 2;
        assert_eq!(serve.granted(&peer("b"), &set(&[0, 1, 2]), soon, true), [(2, Route::All)]);
    }

    #[test]
    fn who_asks_twice_is_served_alone() {
        let (mut serve, now) = (Serve::new(4, REPEAT_AFTER), Instant::now());
        for name in ["a", "b"] {
            serve.granted(&peer(name), &set(&[0]), now, true);
        }
        for name in ["b", "a", "a"] {
            assert_eq!(serve.granted(&peer(name), &set(&[0]), now, true), [(0, Route::One(peer(name)))]);
        }
    }

    #[test]
    fn who_asks_late_is_served_alone() {
        let (mut serve, now) = (Serve::new(4, REPEAT_AFTER), Instant::now());
        serve.granted(&peer("a"), &set(&[0]), now, true);
        let late = now + REPEAT_AFTER;
        assert_eq!(serve.granted(&peer("b"), &set(&[0]), late, true), [(0, Route::One(peer("b")))]);
    }

    #[test]
    fn a_single_receiver_is_served_alone() {
        let (mut serve, now) = (Serve::new(4, REPEAT_AFTER), Instant::now());
        for _ in 0..2 {
            assert_eq!(serve.granted(&peer("a"), &set(&[3]), now, false), [(3, Route::One(peer("a")))]);
        }
    }

    #[test]
    fn a_grant_beyond_the_blob_or_any_window_is_cut() {
        let (mut serve, now) = (Serve::new(4, REPEAT_AFTER), Instant::now());
        assert_eq!(serve.granted(&peer("a"), &set(&[3, 4, u32::MAX - 1]), now, true), [(3, Route::All)]);
        let mut serve = Serve::new(2 * WINDOW_CHUNKS_MAX, REPEAT_AFTER);
        let everything = ChunkSet::new(0..2 * WINDOW_CHUNKS_MAX).unwrap();
        assert_eq!(serve.granted(&peer("a"), &everything, now, true).len(), WINDOW_CHUNKS_MAX as usize);
    }

    #[test]
    fn receivers_beyond_the_limit_are_served_without_being_remembered() {
        let (mut serve, now) = (Serve::new(2, REPEAT_AFTER), Instant::now());
        for i in 0..RECEIVERS_MAX + 10 {
            serve.granted(&peer(&format!("p{i}")), &set(&[0]), now, true);
        }
        assert_eq!(serve.receivers.len(), RECEIVERS_MAX);
        let last = peer("last");
        assert_eq!(serve.granted(&last, &set(&[0, 1]), now, true), [(0, Route::One(last.clone())), (1, Route::All)]);
    }
}
