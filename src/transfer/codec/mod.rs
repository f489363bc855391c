//! Codecs: weights become the bytes of a blob and back.
//!
//! | codec | bytes a value | error of a value | for | encode, decode (ns a value) |
//! |---|---|---|---|---|
//! | `f32` | 4 | none | updates, models | 2.3, 0.4 |
//! | `f16` | 2 | 2⁻¹¹ of itself (or 2⁻²⁵); none beyond 65504 | updates, models | 1.6, 0.4 |
//! | `bf16` | 2 | 2⁻⁸ of itself | updates, models | 1.3, 0.3 |
//! | `int8` | 1.008 | below 1/127 of the largest in its block; right in the mean | updates, models | 1.3, 0.2 |
//! | `topk` | about 3.3 × `topk_ratio` | what is not sent is kept, and sent another time | updates | 3.5, 0.1 |
//!
//! The times are of 26 million values on one core of an AMD EPYC, most of them of memory that is used for the first time. A
//! difference takes 0.3 ns more, and naming a blob 0.2 ns a byte.
//!
//! Updates go through a lossy codec as differences from their parent model ([`Codec::writes_difference`]): errors are
//! then relative to what was learned in the round, not to the weights. Models are written as they are, so that a newcomer
//! can read one alone.
//!
//! All codecs but `topk` are rows of blocks, so that a range of values can be decoded from its own bytes
//! ([`Codec::byte_range`]). A new codec is one file here, one variant of [`Codec`] and its arms.

mod bf16;
mod f16;
pub(super) mod f32;
mod int8;
pub(super) mod topk;

use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::types::{Digest, PeerId, Round};
use crate::weights::{Layout, Weights};

/// How weights are written as bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Codec {
    /// Every value as a little-endian `f32`, in the layout's order. Exact.
    #[default]
    F32,
    /// Every value as an IEEE half. Values beyond its range are refused.
    F16,
    /// Every value as the upper half of its `f32`, rounded.
    Bf16,
    /// Every value as one byte, with a scale a block and stochastic rounding.
    Int8,
    /// The entries of largest magnitude; the others are zero.
    TopK,
}

/// What lossy codecs need to know beside the values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tuning {
    /// What decides in which direction [`Codec::Int8`] rounds.
    pub seed: u64,
    /// The share of values that [`Codec::TopK`] sends, above 0 and at most 1.
    pub topk_ratio: f64,
}

/// Which codecs a federation uses. Every peer must use the same.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Codecs {
    /// For updates.
    pub updates: Codec,
    /// For the global model: any but [`Codec::TopK`].
    pub model: Codec,
    /// See [`Tuning`].
    pub topk_ratio: f64,
    /// The run's seed.
    pub seed: u64,
}

/// Weights that a codec cannot write.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{tensor} holds {value}, which {codec} cannot write; lower the learning rate, or choose another codec")]
pub struct EncodeError {
    /// The codec.
    pub codec: Codec,
    /// The tensor.
    pub tensor: String,
    /// The first such value in it.
    pub value: f32,
}

/// Bytes that are not the weights of a layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The blob is too short or too long.
    #[error("{}, the blob has {found}", codec.takes(*expected))]
    Length {
        /// The codec that was to decode it.
        codec: Codec,
        /// What the layout takes.
        expected: u64,
        /// What there was.
        found: u64,
    },
    /// The blob has a length that may be, and contradicts itself.
    #[error("the blob is no {0} of this layout: it is cut short, too long, or names a place behind the last")]
    Malformed(Codec),
}

/// A text that names no [`Codec`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no codec (known: {known})", known = Codec::ALL.map(Codec::name).join(", "))]
pub struct CodecNameError(String);

impl Codec {
    /// Every codec, the default first.
    pub const ALL: [Codec; 5] = [Codec::F32, Codec::F16, Codec::Bf16, Codec::Int8, Codec::TopK];

    /// The name in configurations and logs.
    pub fn name(self) -> &'static str {
        match self {
            Codec::F32 => "f32",
            Codec::F16 => "f16",
            Codec::Bf16 => "bf16",
            Codec::Int8 => "int8",
            Codec::TopK => "topk",
        }
    }

    /// Whether an update is written as the difference from its parent model: whenever something would be lost.
    pub fn writes_difference(self) -> bool {
        self != Codec::F32
    }

    /// How many values stand in a block: ranges that are decoded alone begin at a block's border. `None`: only the
    /// whole blob can be decoded.
    pub fn block(self) -> Option<usize> {
        match self {
            Codec::F32 | Codec::F16 | Codec::Bf16 => Some(1),
            Codec::Int8 => Some(int8::BLOCK),
            Codec::TopK => None,
        }
    }

    /// How many bytes so many values take; at most, if the codec has no [blocks](Self::block).
    pub fn encoded_bytes(self, values: usize) -> u64 {
        match self {
            Codec::F32 => f32::encoded_bytes(values),
            Codec::F16 => f16::encoded_bytes(values),
            Codec::Bf16 => bf16::encoded_bytes(values),
            Codec::Int8 => int8::encoded_bytes(values),
            Codec::TopK => topk::bytes_max(values),
        }
    }

    /// Whether a blob of so many values may have so many bytes.
    pub fn may_have(self, values: usize, bytes: u64) -> bool {
        let encoded = self.encoded_bytes(values);
        if self.block().is_some() { bytes == encoded } else { bytes <= encoded }
    }

    /// `expected` bytes, in a sentence.
    pub(super) fn takes(self, expected: u64) -> String {
        let at_most = if self.block().is_some() { "" } else { "at most " };
        format!("weights of this layout take {at_most}{expected} bytes as {self}")
    }

    /// Where in a blob the bytes of `values` stand, which begin and end at a border of blocks, or end with the last
    /// value: what [`decode_into`](Self::decode_into) takes. `None` if the range is no such or the codec has no blocks.
    pub fn byte_range(self, values: Range<usize>, of: usize) -> Option<Range<u64>> {
        let block = self.block()?;
        let is_border = |at: usize| at.is_multiple_of(block) || at == of;
        let fits = values.start <= values.end && values.end <= of && is_border(values.start) && is_border(values.end);
        fits.then(|| self.encoded_bytes(values.start)..self.encoded_bytes(values.end))
    }

    /// `weights` as a blob. A pure function of its arguments.
    ///
    /// An error if they hold a value that the codec cannot come near to, or (but for `f32`) one that is not finite.
    pub fn encode(self, weights: &Weights, tuning: &Tuning) -> Result<Bytes, EncodeError> {
        self.encode_range(weights.values(), 0, weights.layout(), tuning)
    }

    /// The bytes of a range of the weights of `layout`, `values`, which begin with value number `start`, at a border of
    /// [blocks](Self::block). The bytes of all ranges in a row are the blob; a codec without blocks has but one range.
    pub fn encode_range(
        self,
        values: &[f32],
        start: usize,
        layout: &Layout,
        tuning: &Tuning,
    ) -> Result<Bytes, EncodeError> {
        let encoded = match self {
            Codec::F32 => Ok(f32::encode(values)),
            Codec::F16 => f16::encode(values),
            Codec::Bf16 => bf16::encode(values),
            Codec::Int8 => int8::encode(values, start / int8::BLOCK, tuning.seed),
            Codec::TopK => topk::encode(values, topk::entries(values.len(), tuning.topk_ratio)),
        };
        encoded.map_err(|index| EncodeError {
            codec: self,
            tensor: layout.tensor_of(start + index).unwrap_or_default().to_owned(),
            value: values.get(index).copied().unwrap_or_default(),
        })
    }

    /// `values` as they stand in memory, if that is how they stand in a blob: they need not be encoded.
    pub fn bytes_of(self, values: &[f32]) -> Option<&[u8]> {
        self.writes_memory().then(|| bytemuck::cast_slice(values))
    }

    /// The same, to be read into: then they are decoded.
    pub(super) fn bytes_of_mut(self, values: &mut [f32]) -> Option<&mut [u8]> {
        self.writes_memory().then(|| bytemuck::cast_slice_mut(values))
    }

    fn writes_memory(self) -> bool {
        self == Codec::F32 && cfg!(target_endian = "little")
    }

    /// The weights of `layout` that `blob` holds. Values that are not finite pass: ask
    /// [`Weights::first_non_finite`] before using what a peer sent. Allocates what the layout takes, whatever the blob.
    pub fn decode(self, blob: &[u8], layout: &Arc<Layout>) -> Result<Weights, CodecError> {
        let mut weights = Weights::zeros(Arc::clone(layout));
        self.decode_into(blob, weights.values_mut())?;
        Ok(weights)
    }

    /// Refuses a length in bytes that so many values cannot have.
    pub fn check_length(self, values: usize, found: u64) -> Result<(), CodecError> {
        if self.may_have(values, found) {
            return Ok(());
        }
        Err(CodecError::Length { codec: self, expected: self.encoded_bytes(values), found })
    }

    /// Fills `values` with what `bytes` hold, which stand in the blob at the values' [`byte_range`](Self::byte_range), or
    /// are the whole blob.
    pub fn decode_into(self, bytes: &[u8], values: &mut [f32]) -> Result<(), CodecError> {
        self.check_length(values.len(), bytes.len() as u64)?;
        match self {
            Codec::F32 => f32::decode_into(bytes, values),
            Codec::F16 => f16::decode_into(bytes, values),
            Codec::Bf16 => bf16::decode_into(bytes, values),
            Codec::Int8 => int8::decode_into(bytes, values),
            Codec::TopK => topk::decode_into(bytes, values).ok_or(CodecError::Malformed(self))?,
        }
        Ok(())
    }
}

impl Codecs {
    /// For the update of `peer` in `round`. Each peer rounds by its own lots, so that errors cancel out in the mean.
    pub fn for_update(&self, round: Round, peer: &PeerId) -> Tuning {
        self.tuning(&format!("{} {round} update {peer}", self.seed))
    }

    /// For the model of `round`: the same whoever leads, so that a later leader of the round makes the same blob.
    pub fn for_model(&self, round: Round) -> Tuning {
        self.tuning(&format!("{} {round} model", self.seed))
    }

    fn tuning(&self, lot: &str) -> Tuning {
        Tuning { seed: Digest::of(lot.as_bytes()).shared_seed(), topk_ratio: self.topk_ratio }
    }
}

impl Default for Codecs {
    fn default() -> Self {
        Self { updates: Codec::default(), model: Codec::default(), topk_ratio: 0.01, seed: 42 }
    }
}

impl FromStr for Codec {
    type Err = CodecNameError;
    fn from_str(name: &str) -> Result<Self, CodecNameError> {
        Self::ALL.into_iter().find(|codec| codec.name() == name).ok_or_else(|| CodecNameError(name.to_owned()))
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::TensorSpec;

    const TUNING: Tuning = Tuning { seed: 1, topk_ratio: 0.5 };

    fn layout() -> Arc<Layout> {
        let tensor = |name: &str, values| TensorSpec { name: name.into(), shape: vec![values] };
        Arc::new(Layout { tensors: vec![tensor("a", 2), tensor("b", 1000)] })
    }

    #[test]
    fn a_codec_survives_its_text_and_an_unknown_one_lists_the_known() {
        for codec in Codec::ALL {
            assert_eq!(codec.to_string().parse(), Ok(codec));
            assert_eq!(serde_json::to_value(codec).unwrap(), codec.name());
        }
        let error = "f64".parse::<Codec>().unwrap_err().to_string();
        assert_eq!(error, "\"f64\" is no codec (known: f32, f16, bf16, int8, topk)");
    }

    #[test]
    fn a_blob_of_another_length_is_refused() {
        let values = layout().len();
        for codec in Codec::ALL {
            let expected = codec.encoded_bytes(values);
            let found = expected + 1;
            let error = CodecError::Length { codec, expected, found };
            assert_eq!(codec.decode(&vec![0; found as usize], &layout()), Err(error));
        }
        let short = Codec::Int8.decode(&[0; 1009], &layout()).unwrap_err().to_string();
        assert_eq!(short, "weights of this layout take 1010 bytes as int8, the blob has 1009");
        assert_eq!(Codec::TopK.decode(&[0; 7], &layout()), Err(CodecError::Malformed(Codec::TopK)));
    }

    #[test]
    fn what_a_codec_cannot_write_is_named_with_its_tensor() {
        let mut weights = Weights::zeros(layout());
        weights.values_mut()[700] = 70_000.0;
        let error = Codec::F16.encode(&weights, &TUNING).unwrap_err().to_string();
        assert_eq!(error, "b holds 70000, which f16 cannot write; lower the learning rate, or choose another codec");
        weights.values_mut()[1] = f32::NAN;
        for codec in Codec::ALL.into_iter().filter(|codec| codec.writes_difference()) {
            let error = codec.encode(&weights, &TUNING).unwrap_err();
            assert_eq!((error.codec, error.tensor.as_str()), (codec, "a"));
        }
    }

    #[test]
    fn half_and_a_quarter_of_the_bytes_within_2_percent() {
        let values = 1_000_003;
        for (codec, share) in [(Codec::F16, 0.5), (Codec::Bf16, 0.5), (Codec::Int8, 0.25)] {
            let found = codec.encoded_bytes(values) as f64 / Codec::F32.encoded_bytes(values) as f64;
            assert!((found / share - 1.0).abs() < 0.02, "{codec}: {found}");
        }
    }

    #[test]
    fn lots_differ_by_peer_and_round_and_a_models_do_not_by_leader() {
        let codecs = Codecs::default();
        let of = |round, peer: &str| codecs.for_update(Round(round), &PeerId::new(peer).unwrap()).seed;
        assert_eq!(of(1, "a"), of(1, "a"));
        assert_ne!(of(1, "a"), of(1, "b"));
        assert_ne!(of(1, "a"), of(2, "a"));
        assert_ne!(codecs.for_model(Round(1)).seed, Codecs { seed: 7, ..codecs }.for_model(Round(1)).seed);
    }

    #[test]
    fn the_bytes_of_all_ranges_in_a_row_are_the_blob() {
        let values = 3 * 512 + 7;
        let layout = Arc::new(Layout { tensors: vec![TensorSpec { name: "a".into(), shape: vec![values] }] });
        let row: Vec<f32> = (0..values).map(|i| (i as f32 * 0.37).sin()).collect();
        let weights = Weights::new(layout.clone(), row).unwrap();
        for codec in Codec::ALL.into_iter().filter(|codec| codec.block().is_some()) {
            let part = |start: usize| {
                let values = &weights.values()[start..values.min(start + 1024)];
                codec.encode_range(values, start, &layout, &TUNING).unwrap()
            };
            assert_eq!([part(0), part(1024)].concat(), codec.encode(&weights, &TUNING).unwrap(), "{codec}");
        }
        let bad = [0.0, f32::NAN];
        let error = Codec::Int8.encode_range(&bad, 1024, &layout, &TUNING).unwrap_err();
        assert_eq!(error.tensor, "a");
    }

    #[test]
    fn ranges_begin_and_end_at_borders() {
        assert_eq!(Codec::Int8.byte_range(512..1002, 1002), Some(516..1010));
        assert_eq!(Codec::Int8.byte_range(512..1000, 1002), None);
        assert_eq!(Codec::Int8.byte_range(1..512, 1002), None);
        assert_eq!(Codec::F16.byte_range(3..5, 10), Some(6..10));
        assert_eq!(Codec::F16.byte_range(3..11, 10), None);
        assert_eq!(Codec::TopK.byte_range(0..10, 10), None);
    }
}
