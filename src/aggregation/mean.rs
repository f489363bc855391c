//! Linear rules: the new model is a sum of the updates and the parent, each with a factor of its own.

use super::Part;

/// Values summed at a time: the sums (4 KiB) and one input (2 KiB) stay in the innermost cache, which made it half as
/// fast again as blocks of 2048 and more on an AMD EPYC.
const BLOCK: usize = 512;

/// Fills `sum` with `Σ factor · values` over all parts, and the parent if its factor is not 0. All are as long.
///
/// Sums run in `f64`, in the order given. Where the factors are shares (none is negative, they sum up to 1) a value never
/// leaves the range of its inputs, without clamping: each step below is monotone in the inputs, rounding included, so the
/// mean is at most what it would be if all inputs equalled the largest; and that is the largest times
/// `1 ± (k + 4) · 2⁻⁵³` for `k` parts, which rounds to the largest as an `f32` while `k < 2²⁷`. The same holds for the
/// smallest.
pub(super) fn weighted_sum(factors: &[f64], parts: &[Part<'_>], parent: (f64, &[f32]), sum: &mut [f32]) {
    let mut sums = [0.0f64; BLOCK];
    for (block, sum) in sum.chunks_mut(BLOCK).enumerate() {
        let (start, sums) = (block * BLOCK, &mut sums[..sum.len()]);
        sums.fill(0.0);
        for (factor, part) in factors.iter().zip(parts) {
            if *factor != 0.0 {
                add_scaled(sums, *factor, &part.values[start..start + sum.len()]);
            }
        }
        if parent.0 != 0.0 {
            add_scaled(sums, parent.0, &parent.1[start..start + sum.len()]);
        }
        for (value, sum) in sum.iter_mut().zip(sums) {
            *value = *sum as f32;
        }
    }
}

fn add_scaled(sums: &mut [f64], factor: f64, values: &[f32]) {
    for (sum, &value) in sums.iter_mut().zip(values) {
        *sum += factor * f64::from(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aggregation::Share;

    fn sum(parts: &[(f64, Vec<f32>)], parent: (f64, &[f32])) -> Vec<f32> {
        let mut sum = vec![f32::NAN; parts[0].1.len()];
        let (factors, parts): (Vec<f64>, Vec<Part<'_>>) =
            parts.iter().map(|(factor, values)| (*factor, Part { share: Share::of(1), values })).unzip();
        weighted_sum(&factors, &parts, parent, &mut sum);
        sum
    }

    #[test]
    fn every_part_counts_by_its_factor() {
        assert_eq!(sum(&[(0.25, vec![4.0, 0.0]), (0.75, vec![0.0, 8.0])], (0.0, &[])), [1.0, 6.0]);
        assert_eq!(sum(&[(0.5, vec![4.0]), (0.25, vec![0.0])], (0.25, &[8.0])), [4.0]);
    }

    #[test]
    fn a_row_longer_than_a_block_and_no_multiple_of_it_is_summed_whole() {
        let row = |factor: f32| (0..2 * BLOCK + 3).map(|i| factor * i as f32).collect::<Vec<_>>();
        assert_eq!(sum(&[(0.5, row(1.0)), (0.5, row(3.0))], (0.0, &[])), row(2.0));
    }

    #[test]
    fn the_largest_values_do_not_overflow() {
        let third = 1.0 / 3.0;
        assert_eq!(
            sum(&[(third, vec![f32::MAX]), (third, vec![f32::MAX]), (third, vec![f32::MAX])], (0.0, &[])),
            [f32::MAX]
        );
    }
}
