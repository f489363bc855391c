//! The values of a blob, a range at a time: whoever goes through a model need not decode the whole of it first.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::Codec;
use super::codec::CodecError;
use super::codec::topk::Entries;
use crate::weights::Layout;

/// How many values are read at a time: enough to be quick, few enough to stay in a cache for several models.
///
/// They are 64 KiB. Of longer pieces the allocator keeps 4 MiB ready for every thread that has ever used one, so that memory would
/// grow for as long as new threads come to help.
pub const RANGE_VALUES: usize = 1 << 14;

/// The ranges, in order, that so many values fall into.
pub fn ranges(values: usize) -> impl Iterator<Item = Range<usize>> {
    (0..values).step_by(RANGE_VALUES).map(move |start| start..values.min(start + RANGE_VALUES))
}

/// Bytes that can be read from any place on: a blob in memory, or on disk.
pub trait Source: fmt::Debug + Send + Sync {
    /// How many there are.
    fn bytes(&self) -> u64;

    /// Fills `out` with the bytes from `start` on, all of which must be there.
    ///
    /// # Errors
    /// A sentence that says why they cannot be read.
    fn read_at(&self, start: u64, out: &mut [u8]) -> Result<(), String>;
}

impl Source for Bytes {
    fn bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, start: u64, out: &mut [u8]) -> Result<(), String> {
        let start = usize::try_from(start).unwrap_or(usize::MAX);
        let end = start.saturating_add(out.len());
        out.copy_from_slice(self.get(start..end).ok_or("it ends too early")?);
        Ok(())
    }
}

/// Why values cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The bytes are not the weights of the layout.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// There are no bytes to be had.
    #[error("{0}")]
    Source(String),
}

/// Reads the weights of a blob by [`ranges`].
#[derive(Debug)]
pub struct Reader {
    codec: Codec,
    values: usize,
    /// How many of them are read, from the first on; those behind are 0.
    visible: usize,
    source: Box<dyn Source>,
    /// The bytes of a range.
    bytes: Vec<u8>,
    /// The whole blob, where the codec knows no ranges.
    entries: Option<Entries<Vec<u8>>>,
    /// What the blob's values are added to, if they are a difference, and room for a range of it.
    base: Option<(Box<Reader>, Vec<f32>)>,
}

impl Reader {
    /// Reads `source`, which `codec` wrote, as weights of `layout`: as they stand, or added to those of `base`.
    pub fn new(
        codec: Codec,
        layout: &Arc<Layout>,
        source: impl Source + 'static,
        base: Option<Reader>,
    ) -> Result<Self, ReadError> {
        let values = layout.len();
        codec.check_length(values, source.bytes())?;
        let mut entries = None;
        if codec.block().is_none() {
            let mut blob = vec![0; usize::try_from(source.bytes()).unwrap_or(usize::MAX)];
            source.read_at(0, &mut blob).map_err(ReadError::Source)?;
            entries = Some(Entries::new(blob, values).ok_or(CodecError::Malformed(codec))?);
        }
        let base = base.map(|base| (Box::new(base), Vec::new()));
        Ok(Self { codec, values, visible: values, source: Box::new(source), bytes: Vec::new(), entries, base })
    }

    /// The same, with 0 for all but the first values: what stands behind them in the blob is not for the reader.
    #[must_use]
    pub fn first(mut self, values: usize) -> Self {
        self.visible = values.min(self.values);
        self
    }

    /// Fills `out` with the values of one of the [`ranges`], which is as long; with those of any other range where each value of
    /// the codec stands for itself.
    ///
    /// # Errors
    /// If the range does not begin and end at a border of the codec's blocks, or the source fails.
    pub fn read(&mut self, range: Range<usize>, out: &mut [f32]) -> Result<(), ReadError> {
        let seen = range.start.min(self.visible)..range.end.min(self.visible);
        let (shown, hidden) = out.split_at_mut(seen.len());
        hidden.fill(0.0);
        match &mut self.entries {
            Some(entries) => entries.read(seen, shown),
            None => self.decode(seen, shown)?,
        }
        match &mut self.base {
            Some((base, values)) => base.combine(range, values, out, |value, base| *value += base),
            None => Ok(()),
        }
    }

    /// Changes each value of `out` by what [`read`](Self::read) fills `room` with.
    pub fn combine(
        &mut self,
        range: Range<usize>,
        room: &mut Vec<f32>,
        out: &mut [f32],
        change: impl Fn(&mut f32, f32),
    ) -> Result<(), ReadError> {
        room.resize(range.len(), 0.0);
        self.read(range, room)?;
        out.iter_mut().zip(room).for_each(|(value, read)| change(value, *read));
        Ok(())
    }

    fn decode(&mut self, range: Range<usize>, out: &mut [f32]) -> Result<(), ReadError> {
        let place = self.codec.byte_range(range, self.values).ok_or(CodecError::Malformed(self.codec))?;
        if let Some(bytes) = self.codec.bytes_of_mut(out) {
            self.source.read_at(place.start, bytes).map_err(ReadError::Source)?;
            return Ok(());
        }
        self.bytes.resize(usize::try_from(place.end - place.start).unwrap_or(usize::MAX), 0);
        self.source.read_at(place.start, &mut self.bytes).map_err(ReadError::Source)?;
        Ok(self.codec.decode_into(&self.bytes, out)?)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::transfer::{Codec, Tuning};
    use crate::weights::{Layout, TensorSpec, Weights};

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
    fn an_update_that_is_longer_than_its_base_is_added_to_the_first_values_alone() {
        let (update, model) = (layout(3 * 500), layout(2 * 500));
        let blob = |layout: &Arc<Layout>, value| {
            let weights = Weights::new(layout.clone(), vec![value; layout.len()]).unwrap();
            Codec::F32.encode(&weights, &TUNING).unwrap()
        };
        let base = Reader::new(Codec::F32, &model, blob(&model, 2.0), None).unwrap().first(500);
        let mut reader = Reader::new(Codec::F32, &update, blob(&update, 0.5), Some(base)).unwrap();
        let mut out = vec![f32::NAN; 1500];
        reader.read(0..1500, &mut out).unwrap();
        assert!(out[..500].iter().all(|value| *value == 2.5) && out[500..].iter().all(|value| *value == 0.5));
        reader.read(400..600, &mut out[..200]).unwrap();
        assert_eq!((out[99], out[100]), (2.5, 0.5));
    }

    #[test]
    fn a_blob_of_another_length_is_refused() {
        for codec in Codec::ALL {
            let blob = Bytes::from_static(&[9; 3]);
            assert!(Reader::new(codec, &layout(1000), blob, None).is_err(), "{codec}");
        }
    }
}
