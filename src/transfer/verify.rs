//! Verifies a blob while it comes: whoever has its beginning need not wait for its end.

use std::ops::Range;
use std::sync::Arc;

use super::codec::topk::Entries;
use super::codec::{CodecError, f32};
use super::{Codec, Manifest, RANGE_VALUES, ReadError, Reader, ranges};
use crate::types::Digest;
use crate::weights::{Layout, first_non_finite};

/// What is known of a blob whose bytes come in their order: its digest so far, and that every value is finite.
#[derive(Debug)]
pub struct Verifier {
    manifest: Manifest,
    layout: Arc<Layout>,
    hasher: blake3::Hasher,
    bytes: u64,
    /// How many values were looked at: a NaN would spread to every peer.
    checked: usize,
    /// Bytes of the next range that have come, until it is whole; of a codec without blocks, all.
    pending: Vec<u8>,
    values: Vec<f32>,
    /// What the values are added to, if they are a difference.
    base: Option<(Reader, Vec<f32>)>,
}

/// Bytes that are not the blob of their manifest, or not to be used.
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
    /// A tensor holds a NaN or an infinity.
    #[error("{0} holds values that are not finite")]
    NotFinite(String),
    /// The bytes are no weights of the layout.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// What the blob is a difference from cannot be read.
    #[error(transparent)]
    Base(ReadError),
}

impl Verifier {
    /// Nothing has come yet of the blob of `manifest`, which should be weights of `layout`: as they stand, or
    /// added to those of `base`.
    pub fn new(manifest: Manifest, layout: Arc<Layout>, base: Option<Reader>) -> Result<Self, VerifyError> {
        manifest.codec.check_length(layout.len(), manifest.bytes)?;
        let base = base.map(|base| (base, Vec::new()));
        let (hasher, pending, values) = (blake3::Hasher::new(), Vec::new(), Vec::new());
        Ok(Self { manifest, layout, hasher, bytes: 0, checked: 0, pending, values, base })
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// As soon as it is known that the blob is not to be used.
    pub fn extend(&mut self, bytes: &[u8]) -> Result<(), VerifyError> {
        self.bytes += bytes.len() as u64;
        if self.bytes > self.manifest.bytes {
            return Err(VerifyError::Length { expected: self.manifest.bytes, found: self.bytes });
        }
        // A part at a time, so that it is hashed and looked at while a cache has it.
        let mut rest = bytes;
        while !rest.is_empty() {
            let wanted = self.next_range_bytes() - self.pending.len();
            let (part, behind) = rest.split_at(wanted.min(rest.len()));
            self.hasher.update(part);
            if part.len() < wanted || !self.pending.is_empty() {
                self.pending.extend_from_slice(part);
            }
            if part.len() == wanted {
                let pending = std::mem::take(&mut self.pending);
                self.check(if pending.is_empty() { part } else { &pending })?;
                self.pending = pending;
                self.pending.clear();
            }
            rest = behind;
        }
        Ok(())
    }

    /// All bytes have come.
    pub fn finish(&self) -> Result<(), VerifyError> {
        let (expected, found) = (self.manifest.bytes, self.bytes);
        if expected != found {
            return Err(VerifyError::Length { expected, found });
        }
        let (expected, found) = (self.manifest.digest, Digest(*self.hasher.finalize().as_bytes()));
        if expected == found { Ok(()) } else { Err(VerifyError::Digest { expected, found }) }
    }

    /// How many bytes can be decoded next: those of one of the [`ranges`](super::ranges), or the whole blob.
    fn next_range_bytes(&self) -> usize {
        let (values, codec) = (self.layout.len(), self.manifest.codec);
        let range = self.checked..values.min(self.checked + RANGE_VALUES);
        let bytes = codec.byte_range(range, values).map_or(self.manifest.bytes, |place| place.end - place.start);
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }

    fn check(&mut self, bytes: &[u8]) -> Result<(), VerifyError> {
        let (all, codec) = (self.layout.len(), self.manifest.codec);
        if codec.block().is_some() {
            let range = self.checked..all.min(self.checked + RANGE_VALUES);
            // As they stand, they need not be decoded.
            if codec == Codec::F32 && self.base.is_none() {
                return self.looked_at(&range, first_non_finite(f32::values(bytes)));
            }
            self.values.resize(range.len(), 0.0);
            codec.decode_into(bytes, &mut self.values)?;
            return self.check_values(range);
        }
        let mut entries = Entries::new(bytes, all).ok_or(CodecError::Malformed(codec))?;
        for range in ranges(all) {
            self.values.resize(range.len(), 0.0);
            entries.read(range.clone(), &mut self.values);
            self.check_values(range)?;
        }
        Ok(())
    }

    /// Looks at the values of a range, as they were decoded.
    fn check_values(&mut self, range: Range<usize>) -> Result<(), VerifyError> {
        if let Some((base, room)) = &mut self.base {
            base.combine(range.clone(), room, &mut self.values, |value, base| *value += base)
                .map_err(VerifyError::Base)?;
        }
        self.looked_at(&range, first_non_finite(self.values.iter().copied()))
    }

    /// All values of a range were looked at, and the one at this place in it is not finite.
    fn looked_at(&mut self, range: &Range<usize>, non_finite: Option<usize>) -> Result<(), VerifyError> {
        if let Some(place) = non_finite {
            let tensor = self.layout.tensor_of(range.start + place).unwrap_or_default();
            return Err(VerifyError::NotFinite(tensor.to_owned()));
        }
        self.checked = range.end;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::transfer::Tuning;
    use crate::weights::{TensorSpec, Weights};

    const TUNING: Tuning = Tuning { seed: 1, topk_ratio: 0.1 };

    fn layout(values: usize) -> Arc<Layout> {
        Arc::new(Layout { tensors: vec![TensorSpec { name: "a".into(), shape: vec![values] }] })
    }

    fn blob(codec: Codec, values: Vec<f32>) -> (Bytes, Manifest) {
        let weights = Weights::new(layout(values.len()), values).unwrap();
        let blob = codec.encode(&weights, &TUNING).unwrap();
        let manifest = Manifest::of(&blob, 1024, codec).unwrap();
        (blob, manifest)
    }

    fn row(values: usize) -> Vec<f32> {
        (0..values).map(|i| (i as f32 * 0.37).sin()).collect()
    }

    fn verify(manifest: Manifest, values: usize, base: Option<Reader>, bytes: &[u8]) -> Result<(), VerifyError> {
        let mut verifier = Verifier::new(manifest, layout(values), base)?;
        bytes.chunks(100_001).try_for_each(|part| verifier.extend(part))?;
        verifier.finish()
    }

    #[test]
    fn a_blob_in_parts_of_any_length_is_verified() {
        for codec in Codec::ALL {
            for values in [1, RANGE_VALUES, 2 * RANGE_VALUES + 700] {
                let (blob, manifest) = blob(codec, row(values));
                for length in [7_777, 1 << 19, usize::MAX] {
                    let mut verifier = Verifier::new(manifest, layout(values), None).unwrap();
                    blob.chunks(length).for_each(|part| verifier.extend(part).unwrap());
                    assert_eq!(verifier.checked, values, "{codec}");
                    assert_eq!(verifier.finish(), Ok(()));
                }
            }
        }
    }

    #[test]
    fn a_byte_changed_left_out_or_added_is_noticed() {
        let values = RANGE_VALUES + 10;
        let (blob, manifest) = blob(Codec::F32, row(values));
        let mut changed = blob.to_vec();
        changed[5] ^= 1;
        let found = verify(manifest, values, None, &changed);
        assert!(matches!(found, Err(VerifyError::Digest { expected, .. }) if expected == manifest.digest), "{found:?}");
        let expected = manifest.bytes;
        let found = expected - 1;
        let short = verify(manifest, values, None, &blob[..found as usize]);
        assert_eq!(short, Err(VerifyError::Length { expected, found }));
        let found = expected + 1;
        let long = verify(manifest, values, None, &[&blob[..], &[0]].concat());
        assert_eq!(long, Err(VerifyError::Length { expected, found }));
    }

    #[test]
    fn a_value_that_is_not_finite_is_found_before_the_last_byte_came() {
        let mut values = row(3 * RANGE_VALUES);
        values[RANGE_VALUES + 3] = f32::NAN;
        let (blob, manifest) = blob(Codec::F32, values);
        let mut verifier = Verifier::new(manifest, layout(3 * RANGE_VALUES), None).unwrap();
        let found = verifier.extend(&blob[..blob.len() - 4]);
        assert_eq!(found, Err(VerifyError::NotFinite("a".into())));
    }

    #[test]
    fn a_difference_is_looked_at_as_what_it_makes() {
        let values = 2 * RANGE_VALUES + 9;
        let (huge, _) = blob(Codec::F32, vec![f32::MAX; values]);
        for codec in [Codec::F32, Codec::TopK] {
            let base = || Some(Reader::new(Codec::F32, &layout(values), huge.clone(), None).unwrap());
            let (small, manifest) = blob(codec, vec![0.0; values]);
            assert_eq!(verify(manifest, values, base(), &small), Ok(()));
            let (large, manifest) = blob(codec, vec![f32::MAX / 2.0; values]);
            assert_eq!(verify(manifest, values, base(), &large), Err(VerifyError::NotFinite("a".into())), "{codec}");
        }
    }

    #[test]
    fn a_blob_of_another_length_than_the_layout_takes_is_refused() {
        let (_, manifest) = blob(Codec::F32, row(10));
        assert!(matches!(Verifier::new(manifest, layout(11), None), Err(VerifyError::Codec(_))));
    }
}
