//! FedAdam (Reddi et al. 2021, *Adaptive Federated Optimization*, arXiv 2003.00295, Algorithm 2).

/// The next second moment: a moving mean of squares.
pub(super) fn second_moment(before: f64, difference: f64, beta2: f64) -> f64 {
    beta2 * before + (1.0 - beta2) * difference * difference
}
