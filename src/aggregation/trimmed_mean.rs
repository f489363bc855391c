//! The coordinate-wise trimmed mean (Yin et al. 2018, *Byzantine-Robust Distributed Learning: Towards Optimal Statistical
//! Rates*, arXiv 1803.01498, Algorithm 1, option II): of each value the smallest and the largest share `trim` are left out.

/// How many values are left out at either end of so many: the share rounded up, so that a share of bad ones is never let
/// in by rounding; at least one value stays.
pub(super) fn cut(updates: usize, trim: f64) -> usize {
    // A share such as 0.2 is not exact: 0.2 · 5 must stay 1.
    let cut = (trim * updates as f64 - 1e-9).ceil().max(0.0) as usize;
    cut.min(updates.saturating_sub(1) / 2)
}

/// The mean of sorted values without `cut` at either end, which leaves at least one.
pub(super) fn trimmed_mean(sorted: &[f32], cut: usize) -> f64 {
    mean(&sorted[cut..sorted.len() - cut])
}

pub(super) fn mean(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value)).sum::<f64>() / values.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_are_left_out() {
        assert_eq!(trimmed_mean(&[-900.0, 1.0, 3.0, 5.0, 900.0], 1), 3.0);
        assert_eq!(trimmed_mean(&[1.0, 3.0], 0), 2.0);
    }

    #[test]
    fn the_share_is_rounded_up_and_one_value_stays() {
        assert_eq!([4, 5, 6, 10].map(|updates| cut(updates, 0.2)), [1, 1, 2, 2]);
        assert_eq!([1, 2, 3, 4].map(|updates| cut(updates, 0.49)), [0, 0, 1, 1]);
        assert_eq!(cut(7, 0.0), 0);
    }
}
