//! Losses, with their gradients.
//!
//! They are computed on the host: the metrics need a model's outputs there anyway, which are few. The gradient goes back
//! to the device, where the backward pass begins with it.

use super::dataset::Targets;

/// The loss of a batch.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Loss {
    /// The sum over all rows of outputs.
    pub(super) sum: f64,
    /// The gradient of the mean, as the outputs are laid out.
    pub(super) slope: Vec<f32>,
}

impl Loss {
    /// Of `outputs`, row-major with a row for each target: cross-entropy in nats where the targets are classes, squared
    /// error where they are numbers.
    pub(super) fn of(outputs: &[f32], targets: &Targets) -> Self {
        match targets {
            Targets::Classes { labels, .. } | Targets::Steps { labels, .. } => cross_entropy(outputs, labels),
            Targets::Numbers(numbers) => squared_error(outputs, numbers),
        }
    }
}

fn cross_entropy(logits: &[f32], labels: &[u32]) -> Loss {
    let rows = labels.len().max(1);
    let classes = logits.len() / rows;
    let (mut sum, mut slope) = (0.0, Vec::with_capacity(logits.len()));
    let mut powers = Vec::with_capacity(classes);
    for (row, &label) in logits.chunks_exact(classes.max(1)).zip(labels) {
        let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let shifted = |logit: f32| f64::from(logit) - f64::from(highest); // so that no power overflows
        powers.clear();
        powers.extend(row.iter().map(|&logit| shifted(logit).exp()));
        let total: f64 = powers.iter().sum();
        sum += total.ln() - shifted(row[label as usize]);
        let start = slope.len();
        slope.extend(powers.iter().map(|power| (power / total / rows as f64) as f32));
        slope[start + label as usize] -= 1.0 / rows as f32;
    }
    Loss { sum, slope }
}

fn squared_error(outputs: &[f32], numbers: &[f64]) -> Loss {
    let rows = numbers.len().max(1) as f64;
    let errors = outputs.iter().zip(numbers).map(|(&output, &number)| f64::from(output) - number);
    let sum = errors.clone().map(|error| error * error).sum();
    Loss { sum, slope: errors.map(|error| (2.0 * error / rows) as f32).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classes(labels: &[u32], count: usize) -> Targets {
        Targets::Classes { labels: labels.to_vec(), names: (0..count).map(|name| name.to_string()).collect() }
    }

    #[test]
    fn cross_entropy_is_what_the_probabilities_say() {
        let loss = Loss::of(&[0.0, 0.0, 3f32.ln(), 0.0], &classes(&[1, 0], 2));
        assert!((loss.sum - (2f64.ln() + (4.0 / 3f64).ln())).abs() < 1e-7);
        let expected = [0.25, -0.25, -0.125, 0.125];
        assert!(loss.slope.iter().zip(expected).all(|(a, b): (&f32, f32)| (a - b).abs() < 1e-7), "{:?}", loss.slope);
    }

    #[test]
    fn squared_error_is_that_of_the_rows() {
        let loss = Loss::of(&[1.0, 4.0], &Targets::Numbers(vec![3.0, 3.0]));
        assert_eq!(loss, Loss { sum: 5.0, slope: vec![-2.0, 1.0] });
    }

    #[test]
    fn slopes_follow_finite_differences() {
        let outputs = [0.3, -1.2, 0.7, 2.0, 0.1, -0.4];
        for targets in [classes(&[2, 0], 3), Targets::Numbers(vec![0.5, 0.0, -1.0, 1.0, 2.0, 0.25])] {
            let rows = if matches!(targets, Targets::Numbers(_)) { 6.0 } else { 2.0 };
            let slope = Loss::of(&outputs, &targets).slope;
            for index in 0..outputs.len() {
                let at = |offset: f32| {
                    let mut moved = outputs;
                    moved[index] += offset;
                    Loss::of(&moved, &targets).sum / rows
                };
                let measured = (at(1e-3) - at(-1e-3)) / 2e-3;
                assert!((f64::from(slope[index]) - measured).abs() < 1e-3, "{index}: {} {measured}", slope[index]);
            }
        }
    }

    #[test]
    fn outputs_that_are_not_finite_have_no_finite_loss() {
        assert!(Loss::of(&[f32::MAX, -f32::MAX], &classes(&[1], 2)).sum.is_finite());
        assert!(!Loss::of(&[f32::NAN, 0.0], &classes(&[1], 2)).sum.is_finite());
        assert!(!Loss::of(&[f32::INFINITY, 0.0], &classes(&[0], 2)).sum.is_finite());
        assert!(!Loss::of(&[f32::INFINITY], &Targets::Numbers(vec![0.0])).sum.is_finite());
    }
}
