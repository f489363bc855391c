//! The upper half of an `f32`, rounded, little-endian: 8 significant bits in the range of `f32`, half of the bytes.

use bytes::Bytes;

const BYTES: usize = size_of::<u16>();

/// The bits that are all set in an infinity or a NaN, and in nothing else.
const EXPONENT: u32 = 0x7f80_0000;

pub(super) fn encoded_bytes(values: usize) -> u64 {
    values as u64 * BYTES as u64
}

/// The bits of the nearest `bf16` of a finite value, in the upper half: an infinity from 3.396e38 on. The crate `half`
/// does the same with branches, one value at a time.
pub(super) fn rounded(value: f32) -> u32 {
    let bits = value.to_bits();
    bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000
}

/// The error is the index of a value that rounds to an infinity, or is not finite.
pub(super) fn encode(values: &[f32]) -> Result<Bytes, usize> {
    let mut bytes = vec![0; values.len() * BYTES];
    let mut bad = false;
    for (bytes, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
        let bits = rounded(*value);
        // A NaN may round to a number, so both are looked at.
        bad |= bits & EXPONENT == EXPONENT || value.to_bits() & EXPONENT == EXPONENT;
        *bytes = ((bits >> 16) as u16).to_le_bytes();
    }
    let is_bad = |value: &f32| !value.is_finite() || !f32::from_bits(rounded(*value)).is_finite();
    match bad.then(|| values.iter().position(is_bad)).flatten() {
        Some(index) => Err(index),
        None => Ok(bytes.into()),
    }
}

/// `bytes` must be two a value; they may lie at any address.
pub(super) fn decode_into(bytes: &[u8], values: &mut [f32]) {
    for (value, bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
        *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_round_as_in_the_half_crate() {
        let odd = 0x9e37_79b9u32;
        for value in (0..100_000u32).map(|i| f32::from_bits(i.wrapping_mul(odd))).filter(|value| value.is_finite()) {
            let expected = half::bf16::from_f32(value).to_bits();
            assert_eq!((rounded(value) >> 16) as u16, expected, "{value:e}");
        }
    }

    #[test]
    fn what_rounds_to_infinity_or_is_none_is_refused() {
        let largest = f32::from_bits(0x7f7f_7fff);
        assert_eq!(encode(&[1.0, largest]).unwrap()[..], [0x80, 0x3f, 0x7f, 0x7f]);
        for bad in [largest.next_up(), f32::MAX, f32::INFINITY, f32::NAN, f32::from_bits(0x7fff_ffff)] {
            assert_eq!(encode(&[1.0, bad]), Err(1), "{bad}");
        }
    }
}
