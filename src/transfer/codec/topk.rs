//! The entries of largest magnitude, and nothing for the others: for differences, whose sender keeps what it did not send.
//!
//! A blob is the number of entries (a little-endian `u64`), their values (little-endian `bf16`) and their places,
//! ascending, each as a LEB128 of the number of places skipped since the one before. Half the bytes of an `f32` cost
//! nothing here: what rounding takes from a value is not sent either, and stays with the sender
//! (Stich et al. 2018, arXiv 1809.07599).

use std::ops::Range;

use bytes::Bytes;

use super::bf16;

const COUNT_BYTES: usize = size_of::<u64>();
const VALUE_BYTES: usize = size_of::<u16>();

/// Bits of a magnitude that are not looked at first: half of all bits.
const LOWER_BITS: u32 = 16;

/// The bits of the largest finite `bf16`.
const LARGEST: u16 = 0x7f7f;

/// How many bytes a blob of so many values has at most: all of them as entries, and seven bits of places in a byte.
pub(super) fn bytes_max(values: usize) -> u64 {
    let values = values as u64;
    COUNT_BYTES as u64 + values * (VALUE_BYTES as u64 + 1) + values / 64
}

/// How many entries are sent of so many values: the share `ratio`, rounded, and at least one if there is any.
pub(super) fn entries(values: usize, ratio: f64) -> usize {
    ((values as f64 * ratio).round() as usize).clamp(1, values.max(1)).min(values)
}

/// The `count` entries of largest magnitude; of equal ones the first. The error is the index of a value that is not
/// finite.
pub(super) fn encode(values: &[f32], count: usize) -> Result<Bytes, usize> {
    if let Some(index) = values.iter().position(|value| !value.is_finite()) {
        return Err(index);
    }
    let count = count.min(values.len());
    let mut bytes = Vec::with_capacity(COUNT_BYTES + count * (VALUE_BYTES + 2));
    bytes.extend((count as u64).to_le_bytes());
    let places = largest(values, count);
    for &place in &places {
        bytes.extend(saturated(values[place]).to_le_bytes());
    }
    let mut next = 0;
    for &place in &places {
        put_leb128(&mut bytes, (place - next) as u64);
        next = place + 1;
    }
    Ok(bytes.into())
}

/// The nearest finite `bf16`: what it falls short of the value is sent another time.
fn saturated(value: f32) -> u16 {
    let bits = (bf16::rounded(value) >> 16) as u16;
    if bits & 0x7fff > LARGEST { bits & 0x8000 | LARGEST } else { bits }
}

/// The places of the `count` largest magnitudes, ascending.
fn largest(values: &[f32], count: usize) -> Vec<usize> {
    if count == 0 {
        return Vec::new();
    }
    let least = least_of(values, count);
    let above = values.iter().filter(|value| magnitude(value) > least).count();
    let mut equals = count - above;
    let chosen = values.iter().enumerate().filter(|(_, value)| {
        let bits = magnitude(value);
        let equal = bits == least && equals > 0;
        equals -= usize::from(equal);
        bits > least || equal
    });
    chosen.map(|(place, _)| place).collect()
}

/// Bits of a magnitude, which are ordered as magnitudes are.
fn magnitude(value: &f32) -> u32 {
    value.to_bits() & i32::MAX as u32
}

/// The magnitude of which `count` values, at least one, have as much or more, and fewer have more.
///
/// Counted by their upper bits first, then by the lower ones of those that share them with the one that is sought: two looks
/// at every value, and no room for copies, whatever the values are.
fn least_of(values: &[f32], count: usize) -> u32 {
    let magnitudes = || values.iter().map(magnitude);
    let (upper, left) = nth_largest(magnitudes().map(|bits| bits >> LOWER_BITS), count);
    let sharing = magnitudes().filter(|bits| bits >> LOWER_BITS == upper);
    let (lower, _) = nth_largest(sharing.map(|bits| bits & ((1 << LOWER_BITS) - 1)), left);
    upper << LOWER_BITS | lower
}

/// The number, of 16 bits, that comes `count`th when the largest comes first, and how many from its first like on that is.
fn nth_largest(numbers: impl Iterator<Item = u32>, count: usize) -> (u32, usize) {
    let mut counts = vec![0; 1 << LOWER_BITS];
    numbers.for_each(|number| counts[number as usize] += 1);
    let (mut number, mut left) = (counts.len() - 1, count);
    while counts[number] < left {
        left -= counts[number];
        number -= 1;
    }
    (number as u32, left)
}

/// Fills `values` with what `bytes` hold, and zeros; `None` if they are no blob of so many values.
pub(super) fn decode_into(bytes: &[u8], values: &mut [f32]) -> Option<()> {
    Entries::new(bytes, values.len())?.read(0..values.len(), values);
    Some(())
}

/// The entries of a blob, which are read a range of values at a time: the zeros between them take no memory.
#[derive(Debug)]
pub(in crate::transfer) struct Entries<B> {
    blob: B,
    count: usize,
    next: Next,
}

/// Where the next entry is.
#[derive(Clone, Copy, Debug)]
struct Next {
    /// Its number.
    index: usize,
    /// The first place that may be its own.
    from: usize,
    /// Where in the blob it says how many places it skips.
    at: usize,
}

impl Next {
    fn first(count: usize) -> Self {
        Self { index: 0, from: 0, at: COUNT_BYTES + count * VALUE_BYTES }
    }
}

impl<B: AsRef<[u8]>> Entries<B> {
    /// `None` if `blob` is none of so many values.
    pub(in crate::transfer) fn new(blob: B, values: usize) -> Option<Self> {
        let (count, rest) = blob.as_ref().split_first_chunk()?;
        let count = usize::try_from(u64::from_le_bytes(*count)).ok().filter(|count| *count <= values)?;
        rest.get(..count * VALUE_BYTES)?;
        let mut entries = Self { blob, count, next: Next::first(count) };
        while entries.next.index < count {
            let (place, next) = entries.place()?;
            if place >= values {
                return None;
            }
            entries.next = next;
        }
        let is_whole = entries.next.at == entries.blob.as_ref().len();
        entries.next = Next::first(count);
        is_whole.then_some(entries)
    }

    /// Fills `out` with the values of `range`, which is as long. Quick for ranges in their order; one that lies before the last
    /// is looked for from the first entry on.
    pub(in crate::transfer) fn read(&mut self, range: Range<usize>, out: &mut [f32]) {
        out.fill(0.0);
        if range.start < self.next.from {
            self.next = Next::first(self.count);
        }
        while self.next.index < self.count {
            let Some((place, next)) = self.place().filter(|(place, _)| *place < range.end) else { break };
            if let Some(value) = place.checked_sub(range.start).and_then(|place| out.get_mut(place)) {
                *value = self.value(self.next.index);
            }
            self.next = next;
        }
    }

    /// The place of the next entry, and where the one after it is. `None` if the blob ends there, or lies.
    fn place(&self) -> Option<(usize, Next)> {
        let Next { index, from, at } = self.next;
        let blob = self.blob.as_ref();
        let mut rest = blob.get(at..)?;
        let skipped = usize::try_from(take_leb128(&mut rest)?).ok()?;
        let place = from.checked_add(skipped)?;
        Some((place, Next { index: index + 1, from: place.checked_add(1)?, at: blob.len() - rest.len() }))
    }

    fn value(&self, index: usize) -> f32 {
        let values = &self.blob.as_ref()[COUNT_BYTES..];
        let value = values.as_chunks().0.get(index).copied().unwrap_or_default();
        f32::from_bits(u32::from(u16::from_le_bytes(value)) << 16)
    }
}

fn put_leb128(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take_leb128(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..u64::BITS).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let part = u64::from(byte & 0x7f);
        // The last byte has room for one bit more.
        number |= (part << shift >> shift == part).then_some(part << shift)?;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(values: &[f32], count: usize) -> Vec<f32> {
        let mut decoded = vec![f32::NAN; values.len()];
        decode_into(&encode(values, count).unwrap(), &mut decoded).unwrap();
        decoded
    }

    #[test]
    fn the_largest_are_sent_and_of_equal_ones_the_first() {
        assert_eq!(decoded(&[1.0, -4.0, 2.0, -2.0, 2.0, 0.0], 3), [0.0, -4.0, 2.0, -2.0, 0.0, 0.0]);
        assert_eq!(decoded(&[1.0, 2.0], 5), [1.0, 2.0]);
        assert_eq!(decoded(&[0.0, 0.0], 1), [0.0, 0.0]);
    }

    #[test]
    fn magnitudes_that_differ_in_their_last_bits_alone_are_told_apart() {
        let values: Vec<f32> = (0..1000).map(|i| f32::from_bits(1f32.to_bits() + i * 7 % 1000)).collect();
        for count in [1, 2, 500, 999, 1000] {
            let least = least_of(&values, count);
            assert_eq!(values.iter().filter(|value| magnitude(value) >= least).count(), count);
        }
    }

    #[test]
    fn a_share_is_at_least_one_entry() {
        assert_eq!([entries(0, 0.5), entries(1, 0.01), entries(250, 0.01), entries(3, 0.99)], [0, 1, 3, 3]);
    }

    #[test]
    fn what_is_beyond_the_range_is_sent_as_the_largest() {
        let largest = f32::from_bits(u32::from(LARGEST) << 16);
        assert_eq!(decoded(&[f32::MAX, f32::MIN], 2), [largest, -largest]);
        assert_eq!(encode(&[0.0, f32::NAN], 1), Err(1));
    }

    #[test]
    fn far_places_take_more_bytes_and_come_back() {
        let mut values = vec![0.0; 70_000];
        for (place, value) in [(0, 1.0), (127, 2.0), (256, 3.0), (69_999, 4.0)] {
            values[place] = value;
        }
        assert_eq!(decoded(&values, 4), values);
        assert_eq!(encode(&values, 4).unwrap().len(), 8 + 4 * 2 + 1 + 1 + 2 + 3);
    }

    #[test]
    fn ranges_in_any_order_are_what_is_decoded_at_once() {
        let values: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.7).sin()).collect();
        let (blob, whole) = (encode(&values, 90).unwrap(), decoded(&values, 90));
        let mut entries = Entries::new(blob, values.len()).unwrap();
        for range in [0..300, 300..301, 301..1000, 10..20, 990..1000, 0..1000, 0..0, 500..1000] {
            let mut out = vec![f32::NAN; range.len()];
            entries.read(range.clone(), &mut out);
            assert_eq!(out, whole[range.clone()], "{range:?}");
        }
    }

    #[test]
    fn a_blob_that_lies_is_none() {
        let blob = |count: u64, rest: &[u8]| [&count.to_le_bytes(), rest].concat();
        let mut row = [0.0; 2];
        let one = [0x80, 0x3f];
        assert_eq!(decode_into(&blob(1, &[&one[..], &[1]].concat()), &mut row), Some(()));
        assert_eq!(row, [0.0, 1.0]);
        let overlong = [0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x02];
        let lies = [
            vec![],
            blob(u64::MAX, &[]),
            blob(3, &[0; 9]),
            blob(1, &one),
            blob(1, &[&one[..], &[2]].concat()),
            blob(1, &[&one[..], &[0x81]].concat()),
            blob(1, &[&one[..], &[0, 0]].concat()),
            blob(1, &[&one[..], &overlong].concat()),
            blob(2, &[one, one, [1, 0]].concat()),
        ];
        for lie in lies {
            assert_eq!(decode_into(&lie, &mut row), None, "{lie:?}");
        }
    }
}
