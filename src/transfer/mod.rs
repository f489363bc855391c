//! Transfer: a blob goes from one holder to many receivers, in chunks that the receivers ask for.
//!
//! ```text
//!    holder                                                     receiver
//!  Codec::encode → Manifest::of ───── manifest ─────▶ Manifest::check → Pulls::want
//!  Serve::granted ◀──────────────── ChunkSet ──────── Pulls::grants (Assembly, Grants)
//!        └──────────────────────────── chunk ───────▶ Pulls::arrived → Intake::Chunk
//!                                                     Verifier, then Reader
//! ```
//!
//! Receivers pull: what is in flight is bounded by what they granted, so nobody overruns a broker, and a
//! missing chunk is simply granted again. That one mechanism is loss repair, reconnect, change of holder and resume.
//! Everything here is pure: time comes in as an argument, nothing is sent.

mod assemble;
mod chunk_set;
pub mod codec;
mod grants;
mod pulls;
mod reader;
mod serve;
mod split;
mod verify;

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::types::Digest;
use crate::weights::Layout;

pub use assemble::{Assembly, ChunkError, Inserted};
pub use chunk_set::{ChunkSet, ChunkSetError, RANGES_MAX};
pub use codec::{Codec, Codecs, EncodeError, Tuning};
pub use grants::{Grants, RETRY_FACTOR_MAX, WINDOW_CHUNKS_MAX};
pub use pulls::{GATHER_BYTES, Intake, Pulls, WINDOW_BYTES, Wanted};
pub use reader::{RANGE_VALUES, ReadError, Reader, Source, ranges};
pub use serve::{RECEIVERS_MAX, Route, Serve};
pub use verify::{Verifier, VerifyError};

/// The shortest chunk length: below it headers outweigh what they carry.
pub const CHUNK_BYTES_MIN: u32 = 1024;

/// The longest chunk length: the longest message that RabbitMQ was seen to pass; NATS passes less.
pub const CHUNK_BYTES_MAX: u32 = 64 * 1024 * 1024;

/// The most chunks a blob may have: it bounds what a receiver and a holder remember about one.
pub const CHUNKS_MAX: u32 = 1 << 20;

/// How well a blob is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// It survives a loss of power: a promise may rest on it.
    Durable,
    /// It survives the process. After a loss of power it may be gone: whoever needs it pulls or makes it again.
    Unflushed,
}

/// What a holder announces of a blob, and all that a receiver needs to pull and verify it.
///
/// One that came from the network is not to be used before [`check`](Self::check); no method panics or
/// allocates by its numbers all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The digest of the whole blob, which is its name.
    pub digest: Digest,
    /// The blob's length.
    pub bytes: u64,
    /// The length of every chunk but the last, which may be shorter.
    pub chunk_bytes: u32,
    /// How the weights were written.
    pub codec: Codec,
    /// The blob of the model to which the weights are to be added, if they are a difference.
    pub base: Option<Digest>,
}

/// A manifest that cannot be true or is not worth believing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// The blob cannot hold the weights of this layout.
    #[error("{}, the manifest says {found}", codec.takes(*expected))]
    Bytes {
        /// The manifest's codec.
        codec: Codec,
        /// What the layout takes, or takes at most.
        expected: u64,
        /// What the manifest says.
        found: u64,
    },
    /// The weights can only be a difference.
    #[error("weights as {0} are a difference, and the manifest names no model to add them to")]
    NoBase(Codec),
    /// The chunk length is out of bounds.
    #[error("a chunk has {CHUNK_BYTES_MIN} to {CHUNK_BYTES_MAX} bytes, not {0}")]
    ChunkBytes(u32),
    /// The blob falls into too many chunks.
    #[error("{bytes} bytes in chunks of {chunk_bytes} are more than {CHUNKS_MAX} chunks")]
    Chunks {
        /// The blob's length.
        bytes: u64,
        /// The chunk length.
        chunk_bytes: u32,
    },
}

impl Manifest {
    /// How many chunks the blob falls into; none if it is empty.
    pub fn chunks(&self) -> u32 {
        let chunks = self.bytes.div_ceil(u64::from(self.chunk_bytes.max(1)));
        u32::try_from(chunks).unwrap_or(u32::MAX)
    }

    /// Where chunk `index` lies in the blob; an empty range at its end for an index past the last.
    pub fn chunk_range(&self, index: u32) -> Range<usize> {
        let offset = |index: u64| {
            let bytes = index.saturating_mul(u64::from(self.chunk_bytes)).min(self.bytes);
            usize::try_from(bytes).unwrap_or(usize::MAX)
        };
        offset(u64::from(index))..offset(u64::from(index) + 1)
    }

    /// Refuses a manifest that is not of weights of `layout`, or whose chunks are out of bounds.
    ///
    /// After it, everything sized by the manifest is bounded by the layout, which the receiver knows itself.
    pub fn check(&self, layout: &Layout) -> Result<(), ManifestError> {
        let (codec, values, found) = (self.codec, layout.len(), self.bytes);
        if !codec.may_have(values, found) {
            return Err(ManifestError::Bytes { codec, expected: codec.encoded_bytes(values), found });
        }
        if codec == Codec::TopK && self.base.is_none() {
            return Err(ManifestError::NoBase(codec));
        }
        self.check_chunks()
    }

    fn check_chunks(&self) -> Result<(), ManifestError> {
        let Self { bytes, chunk_bytes, .. } = *self;
        if !(CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&chunk_bytes) {
            return Err(ManifestError::ChunkBytes(chunk_bytes));
        }
        if self.chunks() > CHUNKS_MAX {
            return Err(ManifestError::Chunks { bytes, chunk_bytes });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::TensorSpec;

    fn manifest(bytes: u64, chunk_bytes: u32) -> Manifest {
        Manifest { digest: Digest::of(b""), bytes, chunk_bytes, codec: Codec::F32, base: None }
    }

    fn layout(values: usize) -> Layout {
        Layout { tensors: vec![TensorSpec { name: "a".into(), shape: vec![values] }] }
    }

    #[test]
    fn chunks_tile_the_blob() {
        let manifest = manifest(2500, 1024);
        assert_eq!(manifest.chunks(), 3);
        let ranges: Vec<_> = (0..4).map(|i| manifest.chunk_range(i)).collect();
        assert_eq!(ranges, [0..1024, 1024..2048, 2048..2500, 2500..2500]);
    }

    #[test]
    fn the_layout_fixes_the_length() {
        assert_eq!(manifest(4000, 1024).check(&layout(1000)), Ok(()));
        let error = ManifestError::Bytes { codec: Codec::F32, expected: 4000, found: u64::MAX };
        assert_eq!(manifest(u64::MAX, 1024).check(&layout(1000)), Err(error));
    }

    #[test]
    fn a_difference_without_a_base_is_refused_and_no_blob_is_longer_than_its_codec_allows() {
        let sparse = Manifest { codec: Codec::TopK, ..manifest(3000, 1024) };
        assert_eq!(sparse.check(&layout(1000)), Err(ManifestError::NoBase(Codec::TopK)));
        let sparse = Manifest { base: Some(Digest::of(b"parent")), ..sparse };
        assert_eq!(sparse.check(&layout(1000)), Ok(()));
        let error = Manifest { bytes: 4000, ..sparse }.check(&layout(1000)).unwrap_err().to_string();
        assert_eq!(error, "weights of this layout take at most 3023 bytes as topk, the manifest says 4000");
    }

    #[test]
    fn absurd_chunk_lengths_are_refused() {
        for chunk_bytes in [0, CHUNK_BYTES_MIN - 1, CHUNK_BYTES_MAX + 1, u32::MAX] {
            let error = ManifestError::ChunkBytes(chunk_bytes);
            assert_eq!(manifest(4000, chunk_bytes).check(&layout(1000)), Err(error));
        }
    }

    #[test]
    fn too_many_chunks_are_refused() {
        let most = u64::from(CHUNKS_MAX) * 1024;
        assert_eq!(manifest(most, 1024).check(&layout(most as usize / 4)), Ok(()));
        let bytes = most + 4;
        let error = ManifestError::Chunks { bytes, chunk_bytes: 1024 };
        assert_eq!(manifest(bytes, 1024).check(&layout(bytes as usize / 4)), Err(error));
    }

    #[test]
    fn a_manifest_that_was_not_checked_is_harmless() {
        for manifest in [manifest(u64::MAX, 0), manifest(u64::MAX, 1), manifest(0, 0), manifest(7, u32::MAX)] {
            for index in [0, 1, manifest.chunks(), u32::MAX] {
                let range = manifest.chunk_range(index);
                assert!(range.start <= range.end && range.end as u64 <= manifest.bytes, "{range:?} of {manifest:?}");
            }
        }
    }
}
