//! The coordinate-wise median (Yin et al. 2018, *Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates*,
//! arXiv 1803.01498, Algorithm 1, option I). Examples are no weight: who lies about its update may lie about their number.

/// The median of sorted values, of which there is at least one; of an even number the mean of the two in the middle.
pub(super) fn median(sorted: &[f32]) -> f64 {
    let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
    (f64::from(low) + f64::from(high)) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_value_in_the_middle() {
        assert_eq!(median(&[7.0]), 7.0);
        assert_eq!(median(&[1.0, 2.0, 900.0]), 2.0);
        assert_eq!(median(&[-900.0, 1.0, 2.0, 900.0]), 1.5);
        assert_eq!(median(&[f32::MAX, f32::MAX]), f64::from(f32::MAX));
    }
}
