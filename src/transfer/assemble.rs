//! The receiver's view of a blob: the chunks it has, in whatever order they came.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::Manifest;
use crate::types::Digest;

/// The chunks received of one blob. Memory grows with what was received, not with what was announced.
#[derive(Clone, Debug)]
pub struct Assembly {
    manifest: Manifest,
    chunks: BTreeMap<u32, Bytes>,
    bytes: u64,
}

/// What a chunk brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// It was missing.
    New,
    /// It was there already. The one that came first is kept.
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

/// Chunks that do not make the blob of their manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// There are too few or too many bytes.
    #[error("the blob has {expected} bytes, the chunks {found}")]
    Length {
        /// The blob's length.
        expected: u64,
        /// The chunks' length.
        found: u64,
    },
    /// A chunk is damaged or forged, or stands at another's place.
    #[error("the blob's digest is {expected}, the chunks' {found}")]
    Digest {
        /// The blob's digest.
        expected: Digest,
        /// The chunks' digest.
        found: Digest,
    },
}

impl Assembly {
    /// Nothing received yet of the blob of `manifest`, which was checked.
    pub fn new(manifest: Manifest) -> Self {
        Self { manifest, chunks: BTreeMap::new(), bytes: 0 }
    }

    /// What is being assembled.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Takes chunk `index`, if it can be one of this blob.
    pub fn insert(&mut self, index: u32, chunk: Bytes) -> Result<Inserted, ChunkError> {
        let chunks = self.manifest.chunks();
        if index >= chunks {
            return Err(ChunkError::Index { index, chunks });
        }
        let (expected, found) = (self.manifest.chunk_range(index).len(), chunk.len());
        if expected != found {
            return Err(ChunkError::Length { index, expected, found });
        }
        if self.has(index) {
            return Ok(Inserted::Duplicate);
        }
        self.chunks.insert(index, chunk);
        self.bytes += found as u64;
        Ok(Inserted::New)
    }

    /// Whether chunk `index` was received.
    pub fn has(&self, index: u32) -> bool {
        self.chunks.contains_key(&index)
    }

    /// Every chunk that was not received, ascending.
    pub fn missing(&self) -> impl Iterator<Item = u32> {
        (0..self.manifest.chunks()).filter(|&index| !self.has(index))
    }

    /// Whether nothing is missing.
    pub fn is_complete(&self) -> bool {
        self.chunks.len() == self.manifest.chunks() as usize
    }

    /// How many bytes of the blob were received: while it grows, the transfer is alive.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The chunks received, ascending: all of them if the assembly [is complete](Self::is_complete).
    pub fn into_chunks(self) -> Vec<Bytes> {
        self.chunks.into_values().collect()
    }
}

/// Joins `chunks`, which stand in order, to the blob of `manifest`, and checks its digest.
///
/// Slow work (it copies and hashes every byte once), so it is a function of its own, for another thread. Each chunk is
/// dropped as soon as it is copied. After an error every chunk is to be pulled again: which one was bad is unknown.
pub fn join_verified(manifest: &Manifest, chunks: Vec<Bytes>) -> Result<Bytes, VerifyError> {
    let (expected, found) = (manifest.bytes, chunks.iter().map(|chunk| chunk.len() as u64).sum());
    if expected != found {
        return Err(VerifyError::Length { expected, found });
    }
    let mut hasher = blake3::Hasher::new();
    let mut blob = Vec::with_capacity(chunks.iter().map(Bytes::len).sum());
    for chunk in chunks {
        // Hashed while the copy has it in the cache.
        blob.extend_from_slice(&chunk);
        hasher.update(&chunk);
    }
    let (expected, found) = (manifest.digest, Digest(*hasher.finalize().as_bytes()));
    if expected == found { Ok(Bytes::from(blob)) } else { Err(VerifyError::Digest { expected, found }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::Codec;

    fn blob() -> (Bytes, Manifest) {
        let blob = Bytes::from((0..2500u32).map(|i| (i / 7) as u8).collect::<Vec<_>>());
        let manifest = Manifest::of(&blob, 1024, Codec::F32).unwrap();
        (blob, manifest)
    }

    #[test]
    fn chunks_in_any_order_make_the_blob() {
        let (blob, manifest) = blob();
        let mut assembly = Assembly::new(manifest);
        for index in [2, 0, 1] {
            assert!(!assembly.is_complete());
            assert_eq!(assembly.insert(index, manifest.chunk(&blob, index).unwrap()), Ok(Inserted::New));
        }
        assert!(assembly.is_complete());
        assert_eq!(assembly.bytes(), 2500);
        assert_eq!(join_verified(&manifest, assembly.into_chunks()), Ok(blob));
    }

    #[test]
    fn what_is_missing_is_known_and_a_duplicate_changes_nothing() {
        let (blob, manifest) = blob();
        let mut assembly = Assembly::new(manifest);
        assembly.insert(1, manifest.chunk(&blob, 1).unwrap()).unwrap();
        assert_eq!(assembly.insert(1, Bytes::from(vec![9; 1024])), Ok(Inserted::Duplicate));
        assert_eq!(assembly.missing().collect::<Vec<_>>(), [0, 2]);
        assert_eq!(assembly.bytes(), 1024);
        assert_eq!(assembly.into_chunks(), [blob.slice(1024..2048)]);
    }

    #[test]
    fn a_chunk_of_another_place_or_length_is_refused() {
        let (blob, manifest) = blob();
        let mut assembly = Assembly::new(manifest);
        assert_eq!(assembly.insert(3, Bytes::new()), Err(ChunkError::Index { index: 3, chunks: 3 }));
        let error = ChunkError::Length { index: 2, expected: 452, found: 1024 };
        assert_eq!(assembly.insert(2, blob.slice(..1024)), Err(error));
        assert_eq!(assembly.missing().count(), 3);
    }

    #[test]
    fn chunks_of_another_blob_are_not_verified() {
        let (blob, manifest) = blob();
        let chunks = |order: [u32; 3]| order.map(|i| manifest.chunk(&blob, i).unwrap()).to_vec();
        let swapped = join_verified(&manifest, chunks([1, 0, 2]));
        assert!(matches!(swapped, Err(VerifyError::Digest { expected, .. }) if expected == manifest.digest));
        let short = join_verified(&manifest, chunks([0, 1, 2])[..2].to_vec());
        assert_eq!(short, Err(VerifyError::Length { expected: 2500, found: 2048 }));
    }

    #[test]
    fn an_empty_blob_is_complete_at_once() {
        let manifest = Manifest::of(&[], 1024, Codec::F32).unwrap();
        let assembly = Assembly::new(manifest);
        assert!(assembly.is_complete());
        assert_eq!(join_verified(&manifest, assembly.into_chunks()), Ok(Bytes::new()));
    }
}
