//! The holder's view of a blob: its manifest, and its chunks as slices.

use bytes::Bytes;

use super::{Codec, Manifest, ManifestError};
use crate::types::Digest;

impl Manifest {
    /// The manifest of `blob`, which `codec` wrote, in chunks of `chunk_bytes`.
    ///
    /// An error if no receiver would believe it: the chunk length is out of bounds, or too short for so long a blob.
    pub fn of(blob: &[u8], chunk_bytes: u32, codec: Codec) -> Result<Self, ManifestError> {
        Self::named(Digest::of(blob), blob.len() as u64, chunk_bytes, codec)
    }

    /// The same of a blob whose digest and length are known.
    pub fn named(digest: Digest, bytes: u64, chunk_bytes: u32, codec: Codec) -> Result<Self, ManifestError> {
        let manifest = Self { digest, bytes, chunk_bytes, codec, base: None };
        manifest.check_chunks()?;
        Ok(manifest)
    }

    /// Chunk `index` of `blob`, which shares the blob's memory; `None` past the last.
    ///
    /// # Panics
    /// If `blob` is shorter than this manifest says: it is another blob.
    pub fn chunk(&self, blob: &Bytes, index: u32) -> Option<Bytes> {
        (index < self.chunks()).then(|| blob.slice(self.chunk_range(index)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_a_slice_of_the_blob() {
        let blob = Bytes::from((0..2500u32).map(|i| i as u8).collect::<Vec<_>>());
        let manifest = Manifest::of(&blob, 1024, Codec::F32).unwrap();
        assert_eq!(manifest.digest, Digest::of(&blob));
        let chunk = manifest.chunk(&blob, 2).unwrap();
        assert_eq!(chunk, blob[2048..]);
        assert_eq!(chunk.as_ptr(), blob[2048..].as_ptr(), "the chunk was copied");
        assert_eq!(manifest.chunk(&blob, 3), None);
    }

    #[test]
    fn an_empty_blob_has_no_chunk() {
        let manifest = Manifest::of(&[], 1024, Codec::F32).unwrap();
        assert_eq!((manifest.chunks(), manifest.chunk(&Bytes::new(), 0)), (0, None));
    }

    #[test]
    fn a_chunk_length_out_of_bounds_is_refused() {
        assert_eq!(Manifest::of(&[0; 4], 0, Codec::F32), Err(ManifestError::ChunkBytes(0)));
    }
}
