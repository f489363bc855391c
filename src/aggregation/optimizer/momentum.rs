//! FedAvgM: momentum at the server (Hsu et al. 2019, *Measuring the Effects of Non-Identical Data Distribution for Federated
//! Visual Classification*, arXiv 1909.06335, section 3.2).

/// The next direction.
pub(super) fn momentum(before: f64, difference: f64, beta: f64) -> f64 {
    beta * before + difference
}
