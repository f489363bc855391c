//! Norm clipping: the difference from the parent is shortened to a norm, then averaged by examples (Sun et al. 2019, *Can You
//! Really Backdoor Federated Learning?*, arXiv 1911.07963, section 4).
//!
//! The paper fixes the norm by hand. Without one the *median* of the round's norms is taken, which no minority can choose:
//! it falls as training converges, and needs no tuning. Without the paper's noise.

use super::{Share, fedavg};

/// Each update's factor, from the squared norms of the differences; the parent's is what they lack to 1.
pub(super) fn factors(shares: &[Share], squared_norms: &[f64], clip_norm: Option<f64>) -> Vec<f64> {
    let norms: Vec<f64> = squared_norms.iter().map(|norm| norm.sqrt()).collect();
    let limit = clip_norm.unwrap_or_else(|| lower_median(&norms));
    let shortened = |norm: f64| if norm > limit { limit / norm } else { 1.0 };
    fedavg::factors(shares).into_iter().zip(norms).map(|(share, norm)| share * shortened(norm)).collect()
}

/// Of an even number the lower of the two in the middle: half of them bad would not raise it.
fn lower_median(norms: &[f64]) -> f64 {
    let mut sorted = norms.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len().saturating_sub(1) / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_differences_are_shortened_and_short_ones_are_not() {
        let shares = [Share::of(1), Share::of(1)];
        assert_eq!(factors(&shares, &[4.0, 100.0], Some(5.0)), [0.5, 0.25]);
        assert_eq!(factors(&shares, &[4.0, 100.0], None), [0.5, 0.1]);
        assert_eq!(factors(&shares, &[0.0, 0.0], None), [0.5, 0.5]);
    }

    #[test]
    fn the_median_is_one_of_the_norms() {
        assert_eq!(lower_median(&[9.0, 1.0, 5.0]), 5.0);
        assert_eq!(lower_median(&[9.0, 1.0]), 1.0);
    }
}
