//! Codecs: weights become the bytes of a blob and back.
//!
//! A new codec is one file here, one variant of [`Codec`] and its arms.

mod f32;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::weights::{Layout, Weights};

/// How weights are written as bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Codec {
    /// Every value as a little-endian `f32`, in the layout's order. Exact.
    #[default]
    F32,
}

/// Bytes that are not the weights of a layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The blob is too short or too long.
    #[error("weights of this layout take {expected} bytes as {codec}, the blob has {found}")]
    Length {
        /// The codec that was to decode it.
        codec: Codec,
        /// What the layout takes.
        expected: u64,
        /// What there was.
        found: u64,
    },
}

/// A text that names no [`Codec`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no codec (known: {known})", known = Codec::ALL.map(Codec::name).join(", "))]
pub struct CodecNameError(String);

impl Codec {
    /// Every codec, the default first.
    pub const ALL: [Codec; 1] = [Codec::F32];

    /// The name in configurations and logs.
    pub fn name(self) -> &'static str {
        match self {
            Codec::F32 => "f32",
        }
    }

    /// How many bytes weights of `layout` take.
    pub fn encoded_bytes(self, layout: &Layout) -> u64 {
        match self {
            Codec::F32 => f32::encoded_bytes(layout),
        }
    }

    /// `weights` as a blob.
    pub fn encode(self, weights: &Weights) -> Bytes {
        match self {
            Codec::F32 => f32::encode(weights.values()),
        }
    }

    /// The weights of `layout` that `blob` holds. Values that are not finite pass: ask
    /// [`Weights::first_non_finite`] before using what a peer sent.
    pub fn decode(self, blob: &[u8], layout: &Arc<Layout>) -> Result<Weights, CodecError> {
        let (expected, found) = (self.encoded_bytes(layout), blob.len() as u64);
        if expected != found {
            return Err(CodecError::Length { codec: self, expected, found });
        }
        let values = match self {
            Codec::F32 => f32::decode(blob),
        };
        Ok(Weights::new(Arc::clone(layout), values).expect("the length was checked"))
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

    #[test]
    fn a_codec_survives_its_text_and_an_unknown_one_lists_the_known() {
        for codec in Codec::ALL {
            assert_eq!(codec.to_string().parse(), Ok(codec));
            assert_eq!(serde_json::to_value(codec).unwrap(), codec.name());
        }
        assert_eq!("f16".parse::<Codec>().unwrap_err().to_string(), "\"f16\" is no codec (known: f32)");
    }

    #[test]
    fn a_blob_of_another_length_is_refused() {
        let layout = Arc::new(Layout { tensors: vec![TensorSpec { name: "a".into(), shape: vec![2] }] });
        for found in [0, 7, 9] {
            let error = CodecError::Length { codec: Codec::F32, expected: 8, found };
            assert_eq!(Codec::F32.decode(&vec![0; found as usize], &layout), Err(error));
        }
    }
}
