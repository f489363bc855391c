//! The receiver's view of a blob: which chunks it has, in whatever order they came.

use std::collections::BTreeSet;

use super::Manifest;

/// Which chunks of one blob have come. Memory grows with the gaps in what was received, not with what was announced.
#[derive(Clone, Debug)]
pub struct Assembly {
    manifest: Manifest,
    /// All chunks before this one have come.
    next: u32,
    /// Those behind the first gap.
    beyond: BTreeSet<u32>,
}

/// What a chunk brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// It was missing.
    New,
    /// It was there already. The one that came first counts.
    Duplicate,
}

/// A chunk that is none of this blob's. The assembly is as before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// There is no such chunk.
    #[error("chunk {index} of a blob of {chunks} chunks")]
    Index {
        /// The index given.
        index: u32,
        /// How many chunks the blob has.
        chunks: u32,
    },
    /// The chunk is too short or too long.
    #[error("chunk {index} has {expected} bytes, {found} came")]
    Length {
        /// The index given.
        index: u32,
        /// The length by the manifest.
        expected: usize,
        /// The length that came.
        found: usize,
    },
}

impl Assembly {
    /// Nothing received yet of the blob of `manifest`, which was checked.
    pub fn new(manifest: Manifest) -> Self {
        Self { manifest, next: 0, beyond: BTreeSet::new() }
    }

    /// What is being assembled.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Notes that chunk `index`, of so many bytes, has come, if it can be one of this blob.
    pub fn insert(&mut self, index: u32, bytes: usize) -> Result<Inserted, ChunkError> {
        let chunks = self.manifest.chunks();
        if index >= chunks {
            return Err(ChunkError::Index { index, chunks });
        }
        let (expected, found) = (self.manifest.chunk_range(index).len(), bytes);
        if expected != found {
            return Err(ChunkError::Length { index, expected, found });
        }
        if self.has(index) {
            return Ok(Inserted::Duplicate);
        }
        self.beyond.insert(index);
        while self.beyond.remove(&self.next) {
            self.next += 1;
        }
        Ok(Inserted::New)
    }

    /// Whether chunk `index` has come.
    pub fn has(&self, index: u32) -> bool {
        index < self.next || self.beyond.contains(&index)
    }

    /// How many chunks have come before the first gap.
    pub fn prefix(&self) -> u32 {
        self.next
    }

    /// How many chunks have not come.
    pub fn missing(&self) -> u32 {
        self.manifest.chunks() - self.next - self.beyond.len() as u32
    }

    /// Whether nothing is missing.
    pub fn is_complete(&self) -> bool {
        self.next == self.manifest.chunks()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::Codec;
    use crate::types::Digest;

    fn manifest(bytes: u64) -> Manifest {
        Manifest { digest: Digest::of(b""), bytes, chunk_bytes: 1024, codec: Codec::F32, base: None }
    }

    #[test]
    fn a_blob_is_complete_with_its_chunks_in_any_order() {
        let mut assembly = Assembly::new(manifest(2500));
        for (index, bytes, missing, prefix) in [(2, 452, 2, 0), (0, 1024, 1, 1), (1, 1024, 0, 3)] {
            assert!(!assembly.is_complete());
            assert_eq!(assembly.insert(index, bytes), Ok(Inserted::New));
            assert_eq!((assembly.missing(), assembly.prefix()), (missing, prefix));
        }
        assert!(assembly.is_complete() && (0..3).all(|index| assembly.has(index)) && !assembly.has(3));
    }

    #[test]
    fn a_duplicate_changes_nothing() {
        let mut assembly = Assembly::new(manifest(2500));
        assembly.insert(1, 1024).unwrap();
        assert_eq!(assembly.insert(1, 1024), Ok(Inserted::Duplicate));
        assert_eq!(assembly.missing(), 2);
        assembly.insert(0, 1024).unwrap();
        assert_eq!(assembly.insert(0, 1024), Ok(Inserted::Duplicate));
        assert_eq!(assembly.missing(), 1);
    }

    #[test]
    fn a_chunk_of_another_place_or_length_is_refused() {
        let mut assembly = Assembly::new(manifest(2500));
        assert_eq!(assembly.insert(3, 0), Err(ChunkError::Index { index: 3, chunks: 3 }));
        let error = ChunkError::Length { index: 2, expected: 452, found: 1024 };
        assert_eq!(assembly.insert(2, 1024), Err(error));
        assert_eq!(assembly.missing(), 3);
    }

    #[test]
    fn an_empty_blob_is_complete_at_once() {
        assert!(Assembly::new(manifest(0)).is_complete());
    }
}
