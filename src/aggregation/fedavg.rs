//! FedAvg: `w = Σ n_k · w_k / Σ n_k` (McMahan et al. 2017, arXiv 1602.05629, Algorithm 1).

use super::Part;

/// Values summed at a time: the sums (4 KiB) and one input (2 KiB) stay in the innermost cache, which made it half as
/// fast again as blocks of 2048 and more on an AMD EPYC.
const BLOCK: usize = 512;

/// Fills `mean` with the mean of the parts' values, each weighted by its examples, of which there must be at least one.
/// All are as long.
///
/// Sums run in `f64`, in the order given. A value never leaves the range of its inputs, without clamping: each step
/// below is monotone in the inputs, rounding included, so the mean is at most what it would be if all inputs equalled
/// the largest; and that is the largest times `1 ± (k + 4) · 2⁻⁵³` for `k` parts, which rounds to the largest
/// as an `f32` while `k < 2²⁷`. The same holds for the smallest.
pub(super) fn weighted_mean(parts: &[Part<'_>], mean: &mut [f32]) {
    // As u128, because counts come from the network and their sum may not fit their type.
    let total: u128 = parts.iter().map(|part| u128::from(part.num_examples)).sum();
    let parts: Vec<_> = parts.iter().map(|part| (part.num_examples as f64 / total as f64, part.values)).collect();

    let mut sums = [0.0f64; BLOCK];
    for (block, mean) in mean.chunks_mut(BLOCK).enumerate() {
        let (start, sums) = (block * BLOCK, &mut sums[..mean.len()]);
        sums.fill(0.0);
        for (share, values) in &parts {
            add_scaled(sums, *share, &values[start..start + mean.len()]);
        }
        for (mean, sum) in mean.iter_mut().zip(sums) {
            *mean = *sum as f32;
        }
    }
}

fn add_scaled(sums: &mut [f64], share: f64, values: &[f32]) {
    for (sum, &value) in sums.iter_mut().zip(values) {
        *sum += share * f64::from(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mean(parts: &[(u64, Vec<f32>)]) -> Vec<f32> {
        let mut mean = vec![f32::NAN; parts[0].1.len()];
        let parts: Vec<_> =
            parts.iter().map(|(num_examples, values)| Part { num_examples: *num_examples, values }).collect();
        weighted_mean(&parts, &mut mean);
        mean
    }

    #[test]
    fn examples_are_the_weight() {
        assert_eq!(mean(&[(1, vec![4.0, 0.0]), (3, vec![0.0, 8.0])]), [1.0, 6.0]);
        assert_eq!(mean(&[(0, vec![4.0]), (7, vec![5.0])]), [5.0]);
    }

    #[test]
    fn a_row_longer_than_a_block_and_no_multiple_of_it_is_summed_whole() {
        let row = |factor: f32| (0..2 * BLOCK + 3).map(|i| factor * i as f32).collect::<Vec<_>>();
        assert_eq!(mean(&[(1, row(1.0)), (1, row(3.0))]), row(2.0));
    }

    #[test]
    fn the_largest_counts_and_values_do_not_overflow() {
        let parts = [(u64::MAX, vec![f32::MAX]), (u64::MAX, vec![f32::MAX]), (u64::MAX, vec![f32::MAX])];
        assert_eq!(mean(&parts), [f32::MAX]);
    }
}
