//! The values of a blob, a range at a time: whoever goes through a model need not decode the whole of it first.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::Codec;
use super::codec::CodecError;
use crate::weights::{Layout, Weights};

/// How many values are read at a time: enough to be quick, few enough to stay in a cache for several models.
pub const RANGE_VALUES: usize = 1 << 16;

/// The ranges, in order, that so many values fall into.
pub fn ranges(values: usize) -> impl Iterator<Item = Range<usize>> {
    (0..values).step_by(RANGE_VALUES).map(move |start| start..values.min(start + RANGE_VALUES))
}

/// Reads the weights of a blob by [`ranges`].
#[derive(Clone, Debug)]
pub struct Reader {
    codec: Codec,
    values: usize,
    /// To how many of them, from the first on, differences are added where this is a base.
    visible: usize,
    blob: Bytes,
    /// All values, where the codec knows no ranges.
    whole: Option<Weights>,
    /// What the blob's values are added to, if they are a difference, and room for a range of it.
    base: Option<(Box<Reader>, Vec<f32>)>,
}

impl Reader {
    /// Reads `blob`, which `codec` wrote, as weights of `layout`: as they stand, or added to those of `base`.
    pub fn new(codec: Codec, layout: &Arc<Layout>, blob: Bytes, base: Option<Reader>) -> Result<Self, CodecError> {
        let values = layout.len();
        codec.check_length(values, blob.len() as u64)?;
        let whole = codec.block().is_none().then(|| codec.decode(&blob, layout)).transpose()?;
        Ok(Self { codec, values, visible: values, blob, whole, base: base.map(|base| (Box::new(base), Vec::new())) })
    }

    /// The same, but as a base only its first values are added to: what lies behind them is none of an update's.
    #[must_use]
    pub fn first(mut self, values: usize) -> Self {
        self.visible = values.min(self.values);
        self
    }

    /// Fills `out` with the values of one of the [`ranges`], which is as long; with those of any other range if a block of the
    /// codec is one value.
    ///
    /// # Errors
    /// If the range does not begin and end at a border of blocks.
    pub fn read(&mut self, range: Range<usize>, out: &mut [f32]) -> Result<(), CodecError> {
        match &self.whole {
            Some(whole) => out.copy_from_slice(&whole.values()[range.clone()]),
            None => self.decode(range.clone(), out)?,
        }
        if let Some((base, values)) = &mut self.base {
            // Where an update is longer than the model that it is a difference from, the rest stands as it is.
            let end = range.end.min(base.visible);
            if range.start >= end {
                return Ok(());
            }
            values.resize(end - range.start, 0.0);
            base.read(range.start..end, values)?;
            for (value, base) in out.iter_mut().zip(values) {
                *value += *base;
            }
        }
        Ok(())
    }

    fn decode(&self, range: Range<usize>, out: &mut [f32]) -> Result<(), CodecError> {
        let malformed = || CodecError::Malformed(self.codec);
        let bytes = self.codec.byte_range(range, self.values).ok_or_else(malformed)?;
        let place = |at: u64| usize::try_from(at).map_err(|_| malformed());
        self.codec.decode_into(&self.blob[place(bytes.start)?..place(bytes.end)?], out)
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
                let whole = codec.decode(&blob, &layout).unwrap();
                let mut reader = Reader::new(codec, &layout, blob, None).unwrap();
                for range in ranges(values) {
                    let mut out = vec![f32::NAN; range.len()];
                    reader.read(range.clone(), &mut out).unwrap();
                    assert_eq!(out, whole.values()[range], "{codec}");
                }
            }
        }
    }

    #[test]
    fn a_difference_is_added_to_its_base() {
        let (layout, row) =
            (layout(RANGE_VALUES + 9), |step: f32| (0..RANGE_VALUES + 9).map(|i| i as f32 * step).collect());
        let blob = |step| Codec::F32.encode(&Weights::new(layout.clone(), row(step)).unwrap(), &TUNING).unwrap();
        let base = Reader::new(Codec::F32, &layout, blob(2.0), None).unwrap();
        let mut reader = Reader::new(Codec::F32, &layout, blob(0.5), Some(base)).unwrap();
        let expected: Vec<f32> = row(2.5);
        for range in ranges(layout.len()) {
            let mut out = vec![f32::NAN; range.len()];
            reader.read(range.clone(), &mut out).unwrap();
            assert_eq!(out, expected[range]);
        }
    }

    #[test]
    fn a_blob_of_another_length_is_refused() {
        for codec in Codec::ALL {
            let blob = Bytes::from_static(&[9; 3]);
            assert!(Reader::new(codec, &layout(1000), blob, None).is_err(), "{codec}");
        }
    }
}
