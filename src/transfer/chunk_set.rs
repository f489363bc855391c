//! Which chunks: the body of a grant.

use std::fmt;

use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// The most ranges a [`ChunkSet`] may have.
pub const RANGES_MAX: usize = 4096;

/// A set of chunk indices, as ranges `(start, length)` that ascend and do not touch: one set has one form.
///
/// Decoding refuses any other form, and stops reading at [`RANGES_MAX`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct ChunkSet {
    ranges: Vec<(u32, u32)>,
}

/// Ranges that are no [`ChunkSet`], or not one of the blob in question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChunkSetError {
    /// More than [`RANGES_MAX`] ranges.
    #[error("a set of chunks has at most {RANGES_MAX} ranges")]
    TooManyRanges,
    /// A range is empty, runs past the last index there is, or does not lie beyond the one before it.
    #[error("range ({0}, {1}) is empty, too long or out of order")]
    Range(u32, u32),
    /// The blob has fewer chunks.
    #[error("the set ends at chunk {end}, the blob has {chunks}")]
    PastTheEnd {
        /// One more than the last index of the set.
        end: u32,
        /// How many chunks the blob has.
        chunks: u32,
    },
}

impl ChunkSet {
    /// The set of `indices`, which must ascend.
    pub fn new(indices: impl IntoIterator<Item = u32>) -> Result<Self, ChunkSetError> {
        let mut set = Self::default();
        for index in indices {
            match set.ranges.last_mut() {
                Some((start, len)) if *start + *len == index && index != u32::MAX => *len += 1,
                _ => set.push(index, 1)?,
            }
        }
        Ok(set)
    }

    /// Refuses a set that is not of a blob of `chunks` chunks. After it, [`len`](Self::len) is at most `chunks`.
    pub fn check(&self, chunks: u32) -> Result<(), ChunkSetError> {
        let end = self.end();
        if end <= chunks { Ok(()) } else { Err(ChunkSetError::PastTheEnd { end, chunks }) }
    }

    /// Every index, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        self.ranges.iter().flat_map(|&(start, len)| start..start + len)
    }

    /// How many indices the set has.
    pub fn len(&self) -> u32 {
        self.ranges.iter().map(|&(_, len)| len).sum()
    }

    /// Whether the set has no index.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    fn end(&self) -> u32 {
        self.ranges.last().map_or(0, |&(start, len)| start + len)
    }

    /// Adds a range beyond all others. It keeps `start + len` within `u32`, on which the rest relies.
    fn push(&mut self, start: u32, len: u32) -> Result<(), ChunkSetError> {
        if self.ranges.len() == RANGES_MAX {
            return Err(ChunkSetError::TooManyRanges);
        }
        let beyond = self.ranges.is_empty() || start > self.end();
        if len == 0 || start.checked_add(len).is_none() || !beyond {
            return Err(ChunkSetError::Range(start, len));
        }
        self.ranges.push((start, len));
        Ok(())
    }
}

impl<'de> Deserialize<'de> for ChunkSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(RangesVisitor)
    }
}

/// Checks each range as it is read, so that a lie about their number allocates nothing.
struct RangesVisitor;

impl<'de> Visitor<'de> for RangesVisitor {
    type Value = ChunkSet;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at most {RANGES_MAX} ascending ranges of chunks")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut ranges: A) -> Result<ChunkSet, A::Error> {
        let mut set = ChunkSet::default();
        while let Some((start, len)) = ranges.next_element()? {
            set.push(start, len).map_err(A::Error::custom)?;
        }
        Ok(set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(ranges: &[(u32, u32)]) -> Result<ChunkSet, postcard::Error> {
        postcard::from_bytes(&postcard::to_stdvec(ranges).unwrap())
    }

    #[test]
    fn neighbours_become_one_range() {
        let set = ChunkSet::new([0, 1, 2, 5, 7, 8]).unwrap();
        assert_eq!(set.ranges, [(0, 3), (5, 1), (7, 2)]);
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 1, 2, 5, 7, 8]);
        assert_eq!((set.len(), set.is_empty()), (6, false));
    }

    #[test]
    fn indices_that_do_not_ascend_are_refused() {
        assert_eq!(ChunkSet::new([1, 1]), Err(ChunkSetError::Range(1, 1)));
        assert_eq!(ChunkSet::new([2, 1]), Err(ChunkSetError::Range(1, 1)));
        assert_eq!(ChunkSet::new([u32::MAX - 1, u32::MAX]), Err(ChunkSetError::Range(u32::MAX, 1)));
    }

    #[test]
    fn only_the_one_form_is_decoded() {
        assert_eq!(decode(&[(0, 3), (5, 1)]), Ok(ChunkSet::new([0, 1, 2, 5]).unwrap()));
        for bad in [&[(3, 0)][..], &[(1, u32::MAX)], &[(5, 1), (0, 1)], &[(0, 2), (1, 1)], &[(0, 2), (2, 1)]] {
            assert!(decode(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn the_number_of_ranges_is_limited() {
        let ranges = |count: u32| (0..count).map(|i| (2 * i, 1)).collect::<Vec<_>>();
        assert!(decode(&ranges(RANGES_MAX as u32)).is_ok());
        assert!(decode(&ranges(RANGES_MAX as u32 + 1)).is_err());
        let apart = (0..=RANGES_MAX as u32).map(|i| 2 * i);
        assert_eq!(ChunkSet::new(apart), Err(ChunkSetError::TooManyRanges));
    }

    #[test]
    fn a_set_beyond_the_blob_is_refused() {
        let set = ChunkSet::new([0, 9]).unwrap();
        assert_eq!(set.check(10), Ok(()));
        assert_eq!(set.check(9), Err(ChunkSetError::PastTheEnd { end: 10, chunks: 9 }));
        assert_eq!(ChunkSet::default().check(0), Ok(()));
    }
}
