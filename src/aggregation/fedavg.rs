//! FedAvg: `w = Σ n_k · w_k / Σ n_k` (McMahan et al. 2017, arXiv 1602.05629, Algorithm 1).

use super::Contribution;

/// Values summed at a time: the sums (4 KiB) and one input (2 KiB) stay in the innermost cache, which made it half as
/// fast again as blocks of 2048 and more on an AMD EPYC.
const BLOCK: usize = 512;

/// The mean of the contributions' values, each weighted by its examples, of which there must be at least one.
///
/// Sums run in `f64`, in the order given. A value never leaves the range of its inputs, without clamping: each step
/// below is monotone in the inputs, rounding included, so the mean is at most what it would be if all inputs equalled
/// the largest; and that is the largest times `1 ± (k + 4) · 2⁻⁵³` for `k` contributions, which rounds to the largest
/// as an `f32` while `k < 2²⁷`. The same holds for the smallest.
pub(super) fn weighted_mean(contributions: &[Contribution<'_>]) -> Vec<f32> {
    let len = contributions.first().map_or(0, |c| c.weights.values().len());
    // As u128, because counts come from the network and their sum may not fit their type.
    let total: u128 = contributions.iter().map(|c| u128::from(c.num_examples)).sum();
    let parts: Vec<_> =
        contributions.iter().map(|c| (c.num_examples as f64 / total as f64, c.weights.values())).collect();

    let mut mean = Vec::with_capacity(len);
    let mut sums = [0.0f64; BLOCK];
    for start in (0..len).step_by(BLOCK) {
        let end = len.min(start + BLOCK);
        let sums = &mut sums[..end - start];
        sums.fill(0.0);
        for (share, values) in &parts {
            add_scaled(sums, *share, &values[start..end]);
        }
        mean.extend(sums.iter().map(|&sum| sum as f32));
    }
    mean
}

fn add_scaled(sums: &mut [f64], share: f64, values: &[f32]) {
    for (sum, &value) in sums.iter_mut().zip(values) {
        *sum += share * f64::from(value);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::weights::{Layout, TensorSpec, Weights};

    fn mean(parts: &[(u64, Vec<f32>)]) -> Vec<f32> {
        let tensor = TensorSpec { name: "a".into(), shape: vec![parts[0].1.len()] };
        let layout = Arc::new(Layout { tensors: vec![tensor] });
        let weights: Vec<_> =
            parts.iter().map(|(_, values)| Weights::new(Arc::clone(&layout), values.clone()).unwrap()).collect();
        let contributions: Vec<_> = parts
            .iter()
            .zip(&weights)
            .map(|(&(num_examples, _), weights)| Contribution { num_examples, weights })
            .collect();
        weighted_mean(&contributions)
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
