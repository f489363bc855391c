//! Bulyan over Krum (El Mhamdi et al. 2018, *The Hidden Vulnerability of Distributed Learning in Byzantium*, arXiv 1802.07927,
//! section 4): of `n` updates with `f` bad ones, Krum chooses `n − 2f` one after another; of each value those `n − 4f` that are
//! nearest to the median of the chosen are averaged. The proof asks for `n ≥ 4f + 3`.
//!
//! With fewer updates as many as there can be are chosen, at least one, and the value (or the two) in the middle taken; what
//! is proven of the rule then no longer holds.

use super::krum::{Distances, one_after_another};
use super::median::median;
use super::trimmed_mean::mean;

/// The updates that go on to [`near_median`], in order.
pub(super) fn choice(distances: &Distances, updates: usize, byzantine: usize) -> Vec<usize> {
    one_after_another(distances, byzantine, updates.saturating_sub(2 * byzantine).max(1))
}

/// How many of so many chosen values are averaged: never fewer than stand in the middle.
pub(super) fn kept(chosen: usize, byzantine: usize) -> usize {
    let middle = if chosen.is_multiple_of(2) { 2 } else { 1 };
    chosen.saturating_sub(2 * byzantine).max(middle).min(chosen)
}

/// The mean of the `kept` of sorted values that are nearest to their median. There is at least one.
pub(super) fn near_median(sorted: &[f32], kept: usize) -> f64 {
    let middle = median(sorted);
    let mut near = sorted;
    // The nearest stand side by side; of two as far away the larger is dropped.
    while let [first, .., last] = near
        && near.len() > kept.max(1)
    {
        let first_is_farther = middle - f64::from(*first) > f64::from(*last) - middle;
        near = if first_is_farther { &near[1..] } else { &near[..near.len() - 1] };
    }
    mean(near)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aggregation::krum::tests::distances;

    #[test]
    fn the_values_nearest_to_the_median_are_averaged() {
        assert_eq!(near_median(&[-900.0, 1.0, 2.0, 4.0, 900.0], 3), 7.0 / 3.0);
        assert_eq!(near_median(&[0.0, 1.0, 2.0], 2), 0.5);
        assert_eq!(near_median(&[5.0], 1), 5.0);
    }

    #[test]
    fn of_seven_with_one_bad_five_are_chosen_and_three_averaged() {
        let distances = distances(&[1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 90.0]);
        let chosen = choice(&distances, 7, 1);
        assert_eq!((chosen.len(), chosen.contains(&6)), (5, false));
        assert_eq!(kept(chosen.len(), 1), 3);
    }

    #[test]
    fn with_fewer_updates_than_the_proof_asks_for_the_middle_is_taken() {
        assert_eq!(choice(&distances(&[1.0, 90.0, 1.3, 1.1]), 4, 1), [0, 2]);
        assert_eq!([1, 2, 3, 4].map(|chosen| kept(chosen, 1)), [1, 2, 1, 2]);
        assert_eq!(choice(&distances(&[1.0]), 1, 2), [0]);
    }
}
