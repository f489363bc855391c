//! Krum and multi-Krum (Blanchard et al. 2017, *Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent*, NeurIPS
//! 30): of `n` updates with `f` bad ones, the one whose `n − f − 2` nearest others are nearest in sum of squares; multi-Krum
//! averages the `n − f` best by that measure. The proof asks for `n ≥ 2f + 3`.
//!
//! With fewer updates the same measure is taken with at least one neighbour, so that one bad update among three or more is
//! still the farthest; what is proven of it then no longer holds.

/// The squared distances between all pairs of updates.
#[derive(Clone, Debug)]
pub(super) struct Distances {
    updates: usize,
    /// Of each pair (i, j) with i < j, in order.
    pairs: Vec<f64>,
}

impl Distances {
    pub(super) fn new(updates: usize, pairs: Vec<f64>) -> Self {
        Self { updates, pairs }
    }

    fn between(&self, i: usize, j: usize) -> f64 {
        let (low, high) = (i.min(j), i.max(j));
        // The pairs before row `low`, then those within it.
        let before = low * self.updates - low * (low + 1) / 2;
        self.pairs[before + high - low - 1]
    }

    /// Krum's measure of each of `among`, in their order.
    fn scores(&self, among: &[usize], byzantine: usize) -> Vec<f64> {
        let neighbours = among.len().saturating_sub(byzantine + 2).max(1);
        let score = |&one: &usize| {
            let others = among.iter().filter(|other| **other != one);
            let mut distances: Vec<f64> = others.map(|&other| self.between(one, other)).collect();
            distances.sort_by(f64::total_cmp);
            distances.iter().take(neighbours).sum()
        };
        among.iter().map(score).collect()
    }
}

/// The updates, best first; of equals the first in order is the better one.
fn ranking(distances: &Distances, byzantine: usize) -> Vec<usize> {
    let all: Vec<usize> = (0..distances.updates).collect();
    let scores = distances.scores(&all, byzantine);
    let mut ranking = all;
    ranking.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
    ranking
}

/// Krum's choice.
pub(super) fn krum(distances: &Distances, byzantine: usize) -> Vec<usize> {
    ranking(distances, byzantine).into_iter().take(1).collect()
}

/// Multi-Krum's choice, in order.
pub(super) fn multi_krum(distances: &Distances, byzantine: usize) -> Vec<usize> {
    let count = distances.updates.saturating_sub(byzantine).max(1);
    let mut chosen: Vec<usize> = ranking(distances, byzantine).into_iter().take(count).collect();
    chosen.sort_unstable();
    chosen
}

/// `count` updates, each Krum's choice among those that are left, in order: the first step of [`bulyan`](super::bulyan).
pub(super) fn one_after_another(distances: &Distances, byzantine: usize, count: usize) -> Vec<usize> {
    let mut left: Vec<usize> = (0..distances.updates).collect();
    let mut chosen = Vec::new();
    while chosen.len() < count && !left.is_empty() {
        let scores = distances.scores(&left, byzantine);
        // Of equals `min_by` takes the first.
        let best = (0..left.len()).min_by(|a, b| scores[*a].total_cmp(&scores[*b])).unwrap_or_default();
        chosen.push(left.remove(best));
    }
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Of points on a line.
    pub(in crate::aggregation) fn distances(points: &[f64]) -> Distances {
        let pairs = (0..points.len()).flat_map(|i| (i + 1..points.len()).map(move |j| (i, j)));
        Distances::new(points.len(), pairs.map(|(i, j)| (points[i] - points[j]).powi(2)).collect())
    }

    #[test]
    fn a_pair_is_found_from_either_side() {
        let distances = distances(&[0.0, 1.0, 5.0, 12.0]);
        for (i, j, expected) in [(0, 1, 1.0), (1, 2, 16.0), (3, 2, 49.0), (3, 0, 144.0), (2, 0, 25.0)] {
            assert_eq!(distances.between(i, j), expected, "{i} {j}");
        }
    }

    #[test]
    fn krum_chooses_the_one_among_the_good() {
        // With f = 1 each of five has two neighbours: 2.0 is 1.0 and 1.1 away from them.
        assert_eq!(krum(&distances(&[1.0, 2.0, 3.1, 90.0, 4.6]), 1), [1]);
        assert_eq!(multi_krum(&distances(&[1.0, 2.0, 3.1, 90.0, 4.6]), 1), [0, 1, 2, 4]);
    }

    #[test]
    fn of_equals_the_first_is_chosen() {
        assert_eq!(krum(&distances(&[5.0, 5.0, 5.0, 5.0, 5.0]), 1), [0]);
    }

    #[test]
    fn with_fewer_updates_than_the_proof_asks_for_the_farthest_is_still_left_out() {
        assert_eq!(krum(&distances(&[90.0, 2.0, 2.5]), 1), [1]);
        assert_eq!(multi_krum(&distances(&[90.0, 2.0, 2.5]), 1), [1, 2]);
        for points in [&[1.0][..], &[1.0, 2.0]] {
            assert_eq!(krum(&distances(points), 3), [0]);
            assert_eq!(multi_krum(&distances(points), 3), [0]);
        }
        assert_eq!(krum(&distances(&[]), 1), [0; 0]);
    }

    #[test]
    fn one_after_another_measures_anew_among_those_that_are_left() {
        assert_eq!(one_after_another(&distances(&[1.0, 2.0, 3.1, 90.0, 4.6, 5.0, 6.0]), 1, 5), [0, 1, 2, 4, 5]);
        assert_eq!(one_after_another(&distances(&[1.0, 2.0]), 1, 9), [0, 1]);
    }
}
