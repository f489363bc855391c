//! FedYogi (Reddi et al. 2021, *Adaptive Federated Optimization*, arXiv 2003.00295, Algorithm 2): as Adam, but the second moment
//! falls no faster than it rises.

/// The next second moment; never negative where the one before is not.
pub(super) fn second_moment(before: f64, difference: f64, beta2: f64) -> f64 {
    let square = difference * difference;
    let change = (1.0 - beta2) * square;
    if before > square {
        before - change
    } else if before < square {
        before + change
    } else {
        before
    }
}
