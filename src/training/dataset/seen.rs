//! Which examples a peer has trained on, and which it held out: over a restart each stays on its side.
//!
//! Which examples are held out is drawn by their places in the data. Where the data have grown since, or another share is to be
//! held out, a draw would measure the model with what it was trained on, and find it better than it is.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Dataset, Targets, Values, row};
use crate::types::Digest;

/// All examples that a peer has ever had, by what they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen(BTreeMap<u64, Times>);

/// How often one example was [trained on](TRAINED) and [held out](HELD_OUT): tables hold many that are alike.
type Times = [u32; 2];

const TRAINED: usize = 0;
const HELD_OUT: usize = 1;

impl Seen {
    /// Reads what [`encode`](Self::encode) wrote.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        postcard::from_bytes(bytes).ok()
    }

    /// The bytes to keep.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("numbers are encoded without fail")
    }

    /// Whether no example was ever seen.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The sides of a split as they were drawn, by the places of examples in `data`, with every example that was seen before on
    /// the side where it was then.
    pub(super) fn sides(&self, data: &Dataset, train: Vec<usize>, held_out: Vec<usize>) -> (Vec<usize>, Vec<usize>) {
        if self.is_empty() {
            return (train, held_out);
        }
        let names: Vec<u64> = data.names_of_examples().collect();
        let mut left = self.0.clone();
        let mut was = |index: usize, side: usize| {
            let count = left.get_mut(&names[index]).map(|times| &mut times[side]).filter(|count| **count > 0);
            count.map(|count| *count -= 1).is_some()
        };
        let mut part = |indices: Vec<usize>, side| indices.into_iter().partition(|&index| was(index, side));
        // Those that were drawn as before first: of examples that are alike, some may be on either side.
        let (stay, train): (Vec<_>, Vec<_>) = part(train, TRAINED);
        let (stay_out, held_out): (Vec<_>, Vec<_>) = part(held_out, HELD_OUT);
        let (to_hold_out, new): (Vec<_>, Vec<_>) = part(train, HELD_OUT);
        let (to_train, new_out): (Vec<_>, Vec<_>) = part(held_out, TRAINED);
        ([stay, new, to_train].concat(), [stay_out, new_out, to_hold_out].concat())
    }

    /// Notes the sides of a split.
    pub fn note(&mut self, train: &Dataset, held_out: &Dataset) {
        let mut now = BTreeMap::<u64, Times>::new();
        for (dataset, side) in [(train, TRAINED), (held_out, HELD_OUT)] {
            dataset.names_of_examples().for_each(|name| now.entry(name).or_default()[side] += 1);
        }
        for (name, times) in now {
            let seen = self.0.entry(name).or_default();
            *seen = [TRAINED, HELD_OUT].map(|side| seen[side].max(times[side]));
        }
    }
}

impl Dataset {
    /// What names each example: a digest of its values and of what is to be told of it, whatever its place and whatever
    /// other examples there are.
    fn names_of_examples(&self) -> impl Iterator<Item = u64> + '_ {
        let mut bytes = Vec::new();
        (0..self.len()).map(move |index| {
            bytes.clear();
            self.write_values(index, &mut bytes);
            self.write_targets(index, &mut bytes);
            let digest = Digest::of(&bytes).0;
            u64::from_le_bytes(digest[..8].try_into().expect("a digest has more than 8 bytes"))
        })
    }

    fn write_values(&self, index: usize, bytes: &mut Vec<u8>) {
        match &self.values {
            Values::Features(_) => self.example(index).iter().for_each(|value| bytes.extend(value.to_le_bytes())),
            Values::Table(table, values) => {
                for (value, column) in row(values, table.columns.len(), index).iter().zip(&table.columns) {
                    match &column.categories {
                        // Their numbers change with what others there are.
                        Some(names) if !value.is_nan() => bytes.extend(names[*value as usize].as_bytes()),
                        _ => bytes.extend(value.to_le_bytes()),
                    }
                    bytes.push(0);
                }
            }
        }
    }

    fn write_targets(&self, index: usize, bytes: &mut Vec<u8>) {
        match &self.targets {
            Targets::Classes { labels, names } => bytes.extend(names[labels[index] as usize].as_bytes()),
            Targets::Numbers(numbers) => bytes.extend(numbers[index].to_le_bytes()),
            Targets::Steps { labels, names } => {
                let steps = row(labels, self.num_features(), index);
                steps.iter().for_each(|&label| bytes.extend(names[label as usize].as_bytes()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::{Column, Table};

    /// A table of one column, whose `len` examples are all different but for every third, which is like the one before.
    fn examples(len: u32) -> Dataset {
        let values: Vec<f32> = (0..len).map(|index| (index - u32::from(index % 3 == 2)) as f32).collect();
        let labels = (0..len).map(|index| (index - u32::from(index % 3 == 2)) % 2).collect();
        Dataset::new(values, labels, 1, vec!["no".into(), "yes".into()]).unwrap()
    }

    fn names(dataset: &Dataset) -> Vec<u64> {
        let mut names: Vec<u64> = dataset.names_of_examples().collect();
        names.sort_unstable();
        names
    }

    /// What a peer has seen that began with 90 examples.
    fn seen() -> (Seen, Dataset) {
        let (train, held_out) = examples(90).split(0.3, 1).unwrap();
        let mut seen = Seen::default();
        seen.note(&train, &held_out);
        (seen, held_out)
    }

    #[test]
    fn the_same_data_are_split_as_before_to_the_order() {
        let (seen, held_out) = seen();
        let (train, again) = examples(90).split_as_before(0.3, 1, &seen).unwrap();
        assert_eq!((&train, &again), (&examples(90).split(0.3, 1).unwrap().0, &held_out));
        let mut noted = seen.clone();
        noted.note(&train, &again);
        assert_eq!(noted, seen);
        assert_eq!(Seen::decode(&seen.encode()), Some(seen));
    }

    #[test]
    fn what_was_trained_on_is_never_held_out_whatever_is_added_and_however_it_is_drawn() {
        let (seen, held_out) = seen();
        for (fraction, seed) in [(0.3, 1), (0.5, 1), (0.3, 2)] {
            let (train, more_held_out) = examples(120).split_as_before(fraction, seed, &seen).unwrap();
            assert_eq!(train.len() + more_held_out.len(), 120);
            let mut of_new = names(&more_held_out);
            for name in names(&held_out) {
                let at = of_new.binary_search(&name).expect("what was held out still is");
                of_new.remove(at);
            }
            assert!(!of_new.is_empty() && of_new.len() < 30, "of the new ones a part is held out");
            let old = names(&examples(90));
            assert!(of_new.iter().all(|name| old.binary_search(name).is_err()), "what was trained on is held out");
        }
    }

    #[test]
    fn an_example_is_known_again_by_its_words_when_there_are_other_words() {
        let table = |categories: &[&str]| {
            let categories = Some(categories.iter().map(|name| (*name).to_owned()).collect());
            Table { columns: vec![Column { name: "town".into(), categories }], label: "sick".into() }
        };
        let of = |value: f64, categories: &[&str], classes: &[&str], label: u32| {
            let classes = classes.iter().map(|name| (*name).to_owned()).collect();
            let targets = Targets::Classes { labels: vec![label], names: classes };
            names(&Dataset::of_table(vec![value], table(categories), targets).unwrap())
        };
        let names_of_one = of(0.0, &["Bonn"], &["yes"], 0);
        assert_eq!(names_of_one, of(1.0, &["Aachen", "Bonn"], &["no", "yes"], 1));
        assert_ne!(names_of_one, of(0.0, &["Aachen", "Bonn"], &["no", "yes"], 1));
    }
}
