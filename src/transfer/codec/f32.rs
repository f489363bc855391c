//! Little-endian `f32`, the exact codec.
//!
//! One pass and one copy each way. Byte order is settled on whole words (`to_le`), which costs nothing on a
//! little-endian machine and makes the same code right on a big-endian one.

use bytes::Bytes;

/// Words that [`Bytes`] can own as they are.
struct Words(Vec<u32>);

impl AsRef<[u8]> for Words {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

pub(super) fn encoded_bytes(values: usize) -> u64 {
    values as u64 * size_of::<f32>() as u64
}

pub(super) fn encode(values: &[f32]) -> Bytes {
    Bytes::from_owner(Words(values.iter().map(|value| value.to_bits().to_le()).collect()))
}

/// `bytes` must be four a value; they may lie at any address.
pub(super) fn decode_into(bytes: &[u8], values: &mut [f32]) {
    bytemuck::cast_slice_mut(values).copy_from_slice(bytes);
    if cfg!(target_endian = "big") {
        for value in values {
            *value = f32::from_bits(u32::from_le(value.to_bits()));
        }
    }
}

/// The values of `bytes`, four a value, one by one, wherever they lie.
pub(in crate::transfer) fn values(bytes: &[u8]) -> impl Iterator<Item = f32> + Clone {
    bytes.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::first_non_finite;

    const VALUES: [f32; 7] = [0.0, -0.0, 1.5, f32::MIN_POSITIVE / 2.0, f32::MAX, f32::INFINITY, f32::NAN];

    #[test]
    fn words_are_little_endian() {
        assert_eq!(encode(&[1.0, -2.0])[..], [0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0]);
    }

    #[test]
    fn every_bit_survives_at_any_alignment() {
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        for shift in 0..4 {
            let mut moved = vec![0xff; shift];
            moved.extend_from_slice(&encode(&VALUES));
            let mut decoded = [0.0; VALUES.len()];
            decode_into(&moved[shift..], &mut decoded);
            assert_eq!(bits(&decoded), bits(&VALUES));
        }
    }

    #[test]
    fn what_is_not_finite_is_found_at_any_alignment() {
        for shift in 0..4 {
            let moved = [&vec![0xff; shift][..], &encode(&VALUES)].concat();
            assert_eq!(first_non_finite(values(&moved[shift..])), Some(5));
            assert_eq!(first_non_finite(values(&moved[shift..moved.len() - 8])), None);
        }
    }

    #[test]
    fn no_values_are_no_bytes() {
        assert!(encode(&[]).is_empty());
        decode_into(&[], &mut []);
    }
}
