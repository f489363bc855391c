//! How well outputs fit their targets, gathered batch by batch.

use super::dataset::{Targets, Task};
use super::loss::Loss;
use crate::types::{Measured, Metrics};

/// Metrics of the examples seen so far.
#[derive(Debug)]
pub(super) struct Tally {
    task: Task,
    num_examples: u64,
    rows: u64,
    loss: f64,
    correct: u64,
    /// Of each class: how often it was there, predicted, and both. Empty where the targets are not classes.
    classes: Vec<Counts>,
    /// With two classes: how much higher the second's logit is than the first's, and whether the second is right.
    scores: Vec<(f32, bool)>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    there: u64,
    predicted: u64,
    both: u64,
}

impl Tally {
    pub(super) fn new(task: Task) -> Self {
        let classes = if let Task::Classes(classes) = task { vec![Counts::default(); classes] } else { Vec::new() };
        Self { task, num_examples: 0, rows: 0, loss: 0.0, correct: 0, classes, scores: Vec::new() }
    }

    /// Adds a batch of so many examples, and `loss`, which is its loss.
    pub(super) fn add(&mut self, num_examples: usize, outputs: &[f32], targets: &Targets, loss: &Loss) {
        self.num_examples += num_examples as u64;
        self.loss += loss.sum;
        match targets {
            Targets::Classes { labels, .. } | Targets::Steps { labels, .. } => {
                self.rows += labels.len() as u64;
                let classes = (outputs.len() / labels.len().max(1)).max(1);
                outputs.chunks_exact(classes).zip(labels).for_each(|(row, &label)| self.add_row(row, label as usize));
            }
            Targets::Numbers(numbers) => self.rows += numbers.len() as u64,
        }
    }

    fn add_row(&mut self, row: &[f32], label: usize) {
        let higher = |best: (usize, f32), next: (usize, f32)| if next.1 > best.1 { next } else { best };
        let (predicted, _) = row.iter().copied().enumerate().fold((0, f32::NEG_INFINITY), higher);
        self.correct += u64::from(predicted == label);
        if !self.classes.is_empty() {
            self.classes[label].there += 1;
            self.classes[predicted].predicted += 1;
            self.classes[label].both += u64::from(predicted == label);
            if let [first, second] = row {
                self.scores.push((second - first, label == 1));
            }
        }
    }

    pub(super) fn metrics(self) -> Metrics {
        let rows = self.rows.max(1) as f64; // nothing seen: zeros, which weigh nothing in a mean
        let (measured, accuracy) = match self.task {
            Task::Classes(_) => (Measured::Classes, self.correct as f64 / rows),
            Task::Steps(_) => (Measured::Steps, self.correct as f64 / rows),
            Task::Numbers => (Measured::Numbers, 0.0),
        };
        let (num_examples, loss) = (self.num_examples, self.loss / rows);
        let macro_f1 = macro_f1(&self.classes);
        Metrics { measured, num_examples, loss, accuracy, macro_f1, auc: auc(self.scores) }
    }
}

/// The mean over all classes that were there or predicted of F1 = 2 both / (there + predicted): as scikit-learn's
/// `f1_score(average="macro")`. `None` without any.
fn macro_f1(classes: &[Counts]) -> Option<f64> {
    let seen = classes.iter().filter(|class| class.there + class.predicted > 0);
    let f1 = seen.map(|class| 2.0 * class.both as f64 / (class.there + class.predicted) as f64);
    let (count, sum) = f1.fold((0u32, 0.0), |(count, sum), f1| (count + 1, sum + f1));
    (count > 0).then(|| sum / f64::from(count))
}

/// The area under the receiver operating characteristic: the chance that an example of the second class scores higher
/// than one of the first, ties counting half (Mann and Whitney, 1947). `None` unless both are there.
fn auc(mut scores: Vec<(f32, bool)>) -> Option<f64> {
    scores.sort_by(|a, b| a.0.total_cmp(&b.0));
    let positives = scores.iter().filter(|(_, is_second)| *is_second).count() as f64;
    let negatives = scores.len() as f64 - positives;
    if positives == 0.0 || negatives == 0.0 {
        return None;
    }
    let (mut below, mut pairs) = (0.0, 0.0);
    for tied in scores.chunk_by(|a, b| a.0 == b.0) {
        let second = tied.iter().filter(|(_, is_second)| *is_second).count() as f64;
        let first = tied.len() as f64 - second;
        pairs += second * (below + first / 2.0);
        below += first;
    }
    Some(pairs / (positives * negatives))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tallied(task: Task, outputs: &[f32], targets: &Targets, num_examples: usize) -> Metrics {
        let mut tally = Tally::new(task);
        tally.add(num_examples, outputs, targets, &Loss::of(outputs, targets));
        tally.metrics()
    }

    fn names(count: usize) -> std::sync::Arc<[String]> {
        (0..count).map(|name| name.to_string()).collect()
    }

    #[test]
    fn accuracy_is_the_share_of_hits_and_the_loss_a_mean() {
        let targets = Targets::Classes { labels: vec![1, 0], names: names(2) };
        let metrics = tallied(Task::Classes(2), &[0.0, 0.0, 3f32.ln(), 0.0], &targets, 2);
        assert_eq!((metrics.num_examples, metrics.accuracy, metrics.measured), (2, 0.5, Measured::Classes));
        assert!((metrics.loss - (2f64.ln() + (4.0 / 3f64).ln()) / 2.0).abs() < 1e-7);
    }

    #[test]
    fn macro_f1_is_that_of_scikit_learn() {
        // f1_score([0, 0, 1, 1, 2], [0, 1, 1, 1, 0], average="macro"): (0.5 + 0.8 + 0) / 3. A class never seen counts not.
        let targets = Targets::Classes { labels: vec![0, 0, 1, 1, 2], names: names(4) };
        let one_hot = |class: usize| (0..4).map(move |index| f32::from(u8::from(index == class)));
        let outputs: Vec<f32> = [0, 1, 1, 1, 0].into_iter().flat_map(one_hot).collect();
        let f1 = tallied(Task::Classes(4), &outputs, &targets, 5).macro_f1.unwrap();
        assert!((f1 - 1.3 / 3.0).abs() < 1e-12, "{f1}");
    }

    #[test]
    fn auc_counts_pairs_and_ties_half() {
        let targets = |labels: &[u32]| Targets::Classes { labels: labels.to_vec(), names: names(2) };
        let of = |scores: &[f32], labels: &[u32]| {
            let outputs: Vec<f32> = scores.iter().flat_map(|&score| [0.0, score]).collect();
            tallied(Task::Classes(2), &outputs, &targets(labels), labels.len()).auc
        };
        // roc_auc_score([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) = 0.75
        assert_eq!(of(&[0.1, 0.4, 0.35, 0.8], &[0, 0, 1, 1]), Some(0.75));
        assert_eq!(of(&[0.5, 0.5], &[0, 1]), Some(0.5));
        assert_eq!(of(&[0.5, 0.1], &[1, 1]), None);
    }

    #[test]
    fn numbers_have_a_squared_error_and_steps_a_loss_per_step() {
        let metrics = tallied(Task::Numbers, &[1.0, 4.0], &Targets::Numbers(vec![3.0, 3.0]), 2);
        assert_eq!((metrics.loss, metrics.rmse(), metrics.macro_f1), (2.5, Some(2.5f64.sqrt()), None));
        let targets = Targets::Steps { labels: vec![0, 1, 1, 0], names: names(2) };
        let metrics = tallied(Task::Steps(2), &[0.0; 8], &targets, 2);
        assert_eq!((metrics.num_examples, metrics.accuracy, metrics.macro_f1), (2, 0.5, None));
        assert!((metrics.perplexity().unwrap() - 2.0).abs() < 1e-12);
    }

    #[test]
    fn nothing_seen_weighs_nothing() {
        assert_eq!(Tally::new(Task::Classes(3)).metrics(), Metrics::default());
    }
}
