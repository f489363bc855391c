//! The values of a blob, a range at a time: whoever goes through a model need not decode the whole of it first.

use std::ops::Range;

use bytes::Bytes;

use super::Manifest;
use super::codec::CodecError;
use crate::weights::Weights;

/// How many values are read at a time: enough to be quick, few enough to stay in a cache for several models.
pub const RANGE_VALUES: usize = 1 << 16;

/// The ranges, in order, that so many values fall into.
pub fn ranges(values: usize) -> impl Iterator<Item = Range<usize>> {
    (0..values).step_by(RANGE_VALUES).map(move |start| start..values.min(start + RANGE_VALUES))
}

/// Reads the weights of a blob by [`ranges`].
#[derive(Debug)]
pub struct Reader {
    manifest: Manifest,
    values: usize,
    blob: Bytes,
    /// All values, where the codec knows no ranges.
    whole: Option<Weights>,
}

impl Reader {
    /// Reads `blob`, which is that of `manifest`, as weights of the layout of `zeros`: those are called for, and filled,
    /// only if the codec knows no ranges.
    pub fn new(
        manifest: Manifest,
        values: usize,
        blob: Bytes,
        zeros: impl FnOnce() -> Weights,
    ) -> Result<Self, CodecError> {
        let mut whole = None;
        if manifest.codec.block().is_none() {
            let mut weights = zeros();
            manifest.codec.decode_into(&blob, weights.values_mut())?;
            whole = Some(weights);
        } else if manifest.codec.encoded_bytes(values) != blob.len() as u64 {
            let (codec, expected, found) = (manifest.codec, manifest.codec.encoded_bytes(values), blob.len() as u64);
            return Err(CodecError::Length { codec, expected, found });
        }
        Ok(Self { manifest, values, blob, whole })
    }

    /// Whether the values are differences, from those of the model that the manifest names.
    pub fn is_difference(&self) -> bool {
        self.manifest.base.is_some()
    }

    /// Fills `out` with the values of one of the [`ranges`], which is as long.
    ///
    /// # Errors
    /// If it is none of them.
    pub fn read(&self, range: Range<usize>, out: &mut [f32]) -> Result<(), CodecError> {
        let codec = self.manifest.codec;
        if let Some(whole) = &self.whole {
            out.copy_from_slice(&whole.values()[range]);
            return Ok(());
        }
        let malformed = CodecError::Malformed(codec);
        let bytes = codec.byte_range(range, self.values).ok_or_else(|| malformed.clone())?;
        let place = |at: u64| usize::try_from(at).map_err(|_| malformed.clone());
        codec.decode_into(&self.blob[place(bytes.start)?..place(bytes.end)?], out)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::transfer::{Codec, Tuning};
    use crate::weights::{Layout, TensorSpec};

    const TUNING: Tuning = Tuning { seed: 1, topk_ratio: 0.1 };

    fn layout(values: usize) -> Arc<Layout> {
        Arc::new(Layout { tensors: vec![TensorSpec { name: "a".into(), shape: vec![values] }] })
    }

    #[test]
    fn ranges_are_the_whole_in_order() {
        for values in [0, 1, RANGE_VALUES, RANGE_VALUES + 1, 3 * RANGE_VALUES] {
            let all: Vec<usize> = ranges(values).flatten().collect();
            assert!(all.into_iter().eq(0..values));
        }
    }

    #[test]
    fn what_is_read_by_ranges_is_what_is_decoded_at_once() {
        for codec in Codec::ALL {
            for values in [1, RANGE_VALUES, 2 * RANGE_VALUES + 700] {
                let layout = layout(values);
                let row = (0..values).map(|i| (i as f32 * 0.37).sin()).collect();
                let weights = Weights::new(layout.clone(), row).unwrap();
                let blob = codec.encode(&weights, &TUNING).unwrap();
                let manifest = Manifest::of(&blob, 1024, codec).unwrap();
                let whole = codec.decode(&blob, &layout).unwrap();
                let reader = Reader::new(manifest, values, blob, || Weights::zeros(layout.clone())).unwrap();
                for range in ranges(values) {
                    let mut out = vec![f32::NAN; range.len()];
                    reader.read(range.clone(), &mut out).unwrap();
                    assert_eq!(out, whole.values()[range], "{codec}");
                }
            }
        }
    }

    #[test]
    fn a_blob_of_another_length_is_refused() {
        for codec in Codec::ALL {
            let blob = Bytes::from_static(&[9; 3]);
            let manifest = Manifest::of(&blob, 1024, codec).unwrap();
            let zeros = || Weights::zeros(layout(1000));
            assert!(Reader::new(manifest, 1000, blob, zeros).is_err(), "{codec}");
        }
    }
}
