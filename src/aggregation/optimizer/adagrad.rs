//! FedAdagrad (Reddi et al. 2021, *Adaptive Federated Optimization*, arXiv 2003.00295, Algorithm 2).

/// The next second moment: the sum of all squares so far.
pub(super) fn second_moment(before: f64, difference: f64) -> f64 {
    before + difference * difference
}
