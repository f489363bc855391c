//! IEEE half precision, little-endian: 11 significant bits between 6e-5 and 65504, half of the bytes.
//!
//! The `half` crate converts whole slices with F16C where the processor has it. Its slices need aligned halves, so a
//! block of them passes through the innermost cache; byte order is settled on the way.

use bytes::Bytes;
use half::f16;
use half::slice::HalfFloatSliceExt;

const BYTES: usize = size_of::<u16>();

/// Halves converted at a time: 2 KiB.
const BLOCK: usize = 1024;

/// The bits that are all set in an infinity or a NaN, and in nothing else.
const EXPONENT: u16 = 0x7c00;

pub(super) fn encoded_bytes(values: usize) -> u64 {
    values as u64 * BYTES as u64
}

/// The error is the index of a value that no half comes near: beyond 65504, or not finite.
pub(super) fn encode(values: &[f32]) -> Result<Bytes, usize> {
    let mut bytes = vec![0; values.len() * BYTES];
    let mut halves = [f16::ZERO; BLOCK];
    for (index, (values, bytes)) in values.chunks(BLOCK).zip(bytes.chunks_mut(BLOCK * BYTES)).enumerate() {
        let halves = &mut halves[..values.len()];
        halves.convert_from_f32_slice(values);
        // No early exit, so that it is done many at a time.
        if halves.iter().fold(false, |bad, half| bad | (half.to_bits() & EXPONENT == EXPONENT)) {
            let bad = halves.iter().position(|half| !half.is_finite()).unwrap_or_default();
            return Err(index * BLOCK + bad);
        }
        for (bytes, half) in bytes.as_chunks_mut().0.iter_mut().zip(&*halves) {
            *bytes = half.to_bits().to_le_bytes();
        }
    }
    Ok(bytes.into())
}

/// `bytes` must be two a value; they may lie at any address.
pub(super) fn decode_into(bytes: &[u8], values: &mut [f32]) {
    let mut halves = [f16::ZERO; BLOCK];
    for (values, bytes) in values.chunks_mut(BLOCK).zip(bytes.chunks(BLOCK * BYTES)) {
        let halves = &mut halves[..values.len()];
        for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks().0) {
            *half = f16::from_bits(u16::from_le_bytes(*bytes));
        }
        halves.convert_to_f32_slice(values);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_little_endian() {
        assert_eq!(encode(&[1.0, -2.0]).unwrap()[..], [0, 0x3c, 0, 0xc0]);
    }

    #[test]
    fn what_rounds_to_infinity_is_refused_and_what_does_not_is_the_largest() {
        let mut values = vec![1.0; 3000];
        values[2500] = 65519.9;
        let mut decoded = vec![0.0; 3000];
        decode_into(&encode(&values).unwrap(), &mut decoded);
        assert_eq!(decoded[2500], 65504.0);
        for bad in [65520.0, -1e9, f32::INFINITY, f32::NAN] {
            values[2500] = bad;
            assert_eq!(encode(&values), Err(2500), "{bad}");
        }
    }
}
