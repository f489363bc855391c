//! FedAvg: `w = Σ n_k · w_k / Σ n_k` (McMahan et al. 2017, *Communication-Efficient Learning of Deep Networks from
//! Decentralized Data*, arXiv 1602.05629, Algorithm 1).
//!
//! FedProx (Li et al. 2020, *Federated Optimization in Heterogeneous Networks*, arXiv 1812.06127, Algorithm 2) has the same
//! aggregate: its proximal term `mu / 2 · ‖w − w_parent‖²` belongs to local training.

use super::Share;

/// Each update's share in the mean: its examples among those of all, of which there must be at least one.
pub(super) fn factors(shares: &[Share]) -> Vec<f64> {
    // As u128, because counts come from the network and their sum may not fit their type.
    let total: u128 = shares.iter().map(|share| u128::from(share.num_examples)).sum();
    shares.iter().map(|share| share.num_examples as f64 / total as f64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_are_the_weight() {
        assert_eq!(factors(&[Share::of(1), Share::of(3)]), [0.25, 0.75]);
        assert_eq!(factors(&[Share::of(0), Share::of(7)]), [0.0, 1.0]);
    }

    #[test]
    fn the_largest_counts_do_not_overflow() {
        assert_eq!(factors(&[Share::of(u64::MAX), Share::of(u64::MAX)]), [0.5, 0.5]);
    }
}
