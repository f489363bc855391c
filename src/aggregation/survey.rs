//! A first look at the whole updates, range by range: distances between them, or norms of what they learned.

use super::Part;

/// Values that are looked at together. Sums within a block and over blocks have a fixed order, so that the result does not
/// depend on the ranges, which begin at a border of blocks.
const BLOCK: usize = 512;

/// Sums that the processor adds at once: as many as fill its vector registers.
const LANES: usize = 8;

/// What a rule needs to know of whole updates.
#[derive(Clone, Debug)]
pub(super) enum Survey {
    /// The squared distance between the updates of each pair (i, j) with i < j, in order.
    Distances(Vec<f64>),
    /// The squared norm of each update's difference from the parent.
    Norms(Vec<f64>),
}

impl Survey {
    pub(super) fn distances(updates: usize) -> Self {
        Self::Distances(vec![0.0; updates * updates.saturating_sub(1) / 2])
    }

    pub(super) fn norms(updates: usize) -> Self {
        Self::Norms(vec![0.0; updates])
    }

    /// Takes the next range of all updates and of the parent.
    pub(super) fn look(&mut self, parts: &[Part<'_>], parent: &[f32]) {
        match self {
            Self::Distances(pairs) => {
                let all = (0..parts.len()).flat_map(|i| (i + 1..parts.len()).map(move |j| (i, j)));
                for (sum, (i, j)) in pairs.iter_mut().zip(all) {
                    add_squares(sum, parts[i].values, parts[j].values);
                }
            }
            Self::Norms(norms) => {
                for (sum, part) in norms.iter_mut().zip(parts) {
                    add_squares(sum, part.values, parent);
                }
            }
        }
    }
}

/// Adds `Σ (a − b)²`, block by block.
fn add_squares(sum: &mut f64, a: &[f32], b: &[f32]) {
    for (a, b) in a.chunks(BLOCK).zip(b.chunks(BLOCK)) {
        let mut lanes = [0.0f64; LANES];
        for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
            for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
                let difference = f64::from(*a) - f64::from(*b);
                *lane += difference * difference;
            }
        }
        *sum += lanes.iter().sum::<f64>();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aggregation::Share;

    fn row(len: usize, step: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * step).sin()).collect()
    }

    #[test]
    fn a_survey_by_ranges_has_the_bits_of_one_at_once() {
        let (len, cut) = (4 * BLOCK + 77, 3 * BLOCK);
        let rows = [row(len, 0.3), row(len, 0.5), row(len, 0.7)];
        let (parent, share) = (row(len, 0.9), Share::of(1));
        let parts = |range: std::ops::Range<usize>| {
            rows.iter().map(|row| Part { share, values: &row[range.clone()] }).collect::<Vec<_>>()
        };
        for survey in [Survey::distances(3), Survey::norms(3)] {
            let (mut whole, mut ranges) = (survey.clone(), survey);
            whole.look(&parts(0..len), &parent);
            ranges.look(&parts(0..cut), &parent[..cut]);
            ranges.look(&parts(cut..len), &parent[cut..]);
            let (Survey::Distances(whole) | Survey::Norms(whole)) = whole;
            let (Survey::Distances(ranges) | Survey::Norms(ranges)) = ranges;
            assert_eq!(whole, ranges);
        }
    }

    #[test]
    fn distances_and_norms_are_sums_of_squares() {
        let rows = [vec![1.0, 2.0], vec![4.0, 6.0], vec![1.0, 2.0]];
        let parts: Vec<_> = rows.iter().map(|values| Part { share: Share::of(1), values }).collect();
        let (mut distances, mut norms) = (Survey::distances(3), Survey::norms(3));
        distances.look(&parts, &[0.0, 0.0]);
        norms.look(&parts, &[1.0, 0.0]);
        assert!(matches!(distances, Survey::Distances(pairs) if pairs == [25.0, 0.0, 25.0]));
        assert!(matches!(norms, Survey::Norms(norms) if norms == [4.0, 45.0, 4.0]));
    }
}
