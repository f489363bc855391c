//! One byte a value: blocks with a scale each, and stochastic rounding.
//!
//! A block is its scale (the largest magnitude / 127, a little-endian `f32`) and one signed byte for each of at most
//! [`BLOCK`] values. A value between two steps becomes the upper one as often as it is near to it, so that it is right in
//! the mean: E[decode(encode(v))] = v (QSGD, Alistarh et al. 2017, arXiv 1610.02132). The lots are a hash of seed and
//! position: the same arguments give the same bytes.

use bytes::Bytes;

/// Values that share a scale: 0.8 % of the bytes are scales.
pub(super) const BLOCK: usize = 512;

const SCALE_BYTES: usize = size_of::<f32>();

/// Steps from zero to the largest magnitude.
const STEPS: f32 = 127.0;

/// Added to a small number, it leaves the nearest integer in the lowest bits of the sum.
const ROUND: f32 = 12_582_912.0;

/// After so many values, which lie at a block's border, follow this many bytes: see [`super::Codec::byte_range`].
pub(super) fn encoded_bytes(values: usize) -> u64 {
    values as u64 + values.div_ceil(BLOCK) as u64 * SCALE_BYTES as u64
}

/// `values` begin with the block of this number. The error is the index of a value that is not finite, or too large for a
/// scale.
pub(super) fn encode(values: &[f32], first: usize, seed: u64) -> Result<Bytes, usize> {
    let mut bytes = vec![0; values.len() + values.len().div_ceil(BLOCK) * SCALE_BYTES];
    let blocks = bytes.chunks_mut(SCALE_BYTES + BLOCK).zip(values.chunks(BLOCK));
    for (index, (bytes, values)) in blocks.enumerate() {
        let (head, steps) = bytes.split_at_mut(SCALE_BYTES);
        let scale = scale(values);
        if !(scale * STEPS).is_finite() {
            let bad = values.iter().position(|value| !value.is_finite());
            let largest = || values.iter().position(|value| !(value.abs() / STEPS * STEPS).is_finite());
            return Err(index * BLOCK + bad.or_else(largest).unwrap_or_default());
        }
        head.copy_from_slice(&scale.to_le_bytes());
        // Values whose scale underflows are nothing.
        if scale > 0.0 {
            round_block(values, scale, mixed(seed ^ mixed((first + index) as u64)) as u32, steps);
        }
    }
    Ok(bytes.into())
}

/// The largest magnitude / 127; not finite if any value is not. Bits of magnitudes are ordered as they are, NaN last.
fn scale(values: &[f32]) -> f32 {
    let largest = values.iter().fold(0, |largest, value| (value.to_bits() as i32 & i32::MAX).max(largest));
    f32::from_bits(largest as u32) / STEPS
}

/// Only what baseline processors do on several values at once: neither `floor` nor a checked cast is.
fn round_block(values: &[f32], scale: f32, key: u32, steps: &mut [u8]) {
    for (index, (value, step)) in values.iter().zip(steps).enumerate() {
        let exact = (value / scale).clamp(-STEPS, STEPS);
        let sum = exact + ROUND;
        let beyond = exact - (sum - ROUND);
        let lot = (hash(key.wrapping_add(index as u32)) >> 8) as f32 * (1.0 / (1 << 24) as f32);
        let up = i32::from(lot < beyond) - i32::from(lot < -beyond);
        *step = (sum.to_bits() as i32 + up) as u8;
    }
}

/// `bytes` must be those of this many values, from the start of a block on.
pub(super) fn decode_into(bytes: &[u8], values: &mut [f32]) {
    for (bytes, values) in bytes.chunks(SCALE_BYTES + BLOCK).zip(values.chunks_mut(BLOCK)) {
        let Some((scale, steps)) = bytes.split_first_chunk() else { return };
        let scale = f32::from_le_bytes(*scale);
        for (value, step) in values.iter_mut().zip(steps) {
            *value = f32::from(*step as i8) * scale;
        }
    }
}

/// The finalizer of SplitMix64 (Steele et al. 2014): block keys that have nothing to do with each other.
fn mixed(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

/// A 32-bit mix with little bias (Wellons, `lowbias32`).
fn hash(word: u32) -> u32 {
    let word = (word ^ word >> 16).wrapping_mul(0x7feb_352d);
    let word = (word ^ word >> 15).wrapping_mul(0x846c_a68b);
    word ^ word >> 16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(values: &[f32], seed: u64) -> Vec<f32> {
        let mut decoded = vec![f32::NAN; values.len()];
        decode_into(&encode(values, 0, seed).unwrap(), &mut decoded);
        decoded
    }

    #[test]
    fn whole_steps_are_exact() {
        let values: Vec<f32> = (-127..=127).map(|step| step as f32 * 0.5).collect();
        assert_eq!(decoded(&values, 1), values);
        assert_eq!(encode(&[0.0; 3], 0, 1).unwrap()[..], [0; 7]);
    }

    #[test]
    fn one_seed_gives_one_blob_and_another_another() {
        let values: Vec<f32> = (0..2000).map(|i| (i as f32).sin()).collect();
        assert_eq!(encode(&values, 0, 5), encode(&values, 0, 5));
        assert_ne!(encode(&values, 0, 5), encode(&values, 0, 6));
    }

    #[test]
    fn what_has_no_scale_is_refused() {
        let mut values = vec![1.0; 1200];
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            values[700] = bad;
            assert_eq!(encode(&values, 0, 1), Err(700), "{bad}");
        }
    }

    #[test]
    fn the_smallest_and_the_largest_values_stay_finite() {
        for value in [f32::from_bits(1), f32::MIN_POSITIVE, f32::MAX / 2.0] {
            let decoded = decoded(&[value, -value], 3);
            assert!((decoded[0] - value).abs() <= value && decoded[1].is_finite(), "{value:e} became {decoded:?}");
        }
    }
}
