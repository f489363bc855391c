//! Labelled examples in memory, and where they come from: one file a format.

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::seq::SliceRandom;

use super::random::generator;
use crate::aggregation::statistics::Summary;

mod csv;
mod digits;
mod idx;
mod images;
mod schema;
mod seen;
mod source;
mod table;
mod text;

pub use schema::{CATEGORIES, COLUMN};
pub use seen::Seen;
pub use source::{Examples, ReadError, ReadOptions, Source, Train};
pub use table::{Column, Table};

/// Examples, and what is to be told of each.
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    values: Values,
    shape: Arc<[usize]>, // this and the names are shared by all subsets, of which every batch is one
    targets: Targets,
}

/// What examples are told by.
#[derive(Clone, Debug, PartialEq)]
enum Values {
    /// What a model learns from, row-major `[len, shape…]`.
    Features(Vec<f32>),
    /// A table that is not standardised yet, row-major `[len, columns]`.
    Table(Arc<Table>, Vec<f64>),
}

/// What a model is to tell of each example.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// A class of each example.
    Classes {
        /// Which: indices into `names`, one an example.
        labels: Vec<u32>,
        /// What each class is called.
        names: Arc<[String]>,
    },
    /// A number of each example.
    Numbers(Vec<f64>),
    /// A class of each of the steps of an example, such as the next character at each place of a text.
    Steps {
        /// Which: indices into `names`, row-major `[len, steps]`.
        labels: Vec<u32>,
        /// What each class is called: the vocabulary.
        names: Arc<[String]>,
    },
}

/// What a model for a data set has to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// One of so many classes for each example.
    Classes(usize),
    /// A number for each example.
    Numbers,
    /// One of so many classes for each step of each example.
    Steps(usize),
}

impl Task {
    /// How many values a model yields: for each step of [`Steps`](Self::Steps), else for each example.
    pub fn outputs(self) -> usize {
        match self {
            Self::Classes(classes) | Self::Steps(classes) => classes,
            Self::Numbers => 1,
        }
    }
}

/// Why data cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DataError {
    /// The number of values is not examples × features.
    #[error("{values} values do not make {examples} examples of {num_features} features")]
    Shape {
        /// How many values there were.
        values: usize,
        /// How many examples there were, by their targets.
        examples: usize,
        /// How many values an example should have.
        num_features: usize,
    },
    /// A label that names no class.
    #[error("example {example} has label {label}, but there are {num_classes} classes")]
    Label {
        /// Which example, counted from 0.
        example: usize,
        /// Its label.
        label: u32,
        /// How many classes there are.
        num_classes: usize,
    },
    /// A NaN or an infinity.
    #[error("example {example} holds a value that is not finite")]
    NotFinite {
        /// Which example, counted from 0.
        example: usize,
    },
    /// A category that its column does not list.
    #[error("example {example} has category {category} of a column that lists {listed}")]
    Category {
        /// Which example, counted from 0.
        example: usize,
        /// Its category.
        category: f64,
        /// How many there are.
        listed: usize,
    },
    /// A table whose columns, or what is to be told, are of other kinds than what all tables together are like.
    #[error("the columns of the table are not those that the federation was founded with")]
    OtherColumns,
    /// A class that nobody had when the federation was founded: its model cannot tell it.
    #[error("an example is of class {class:?} of column {column:?}, and the federation tells apart only {known:?}")]
    UnknownClass {
        /// The column.
        column: String,
        /// The class.
        class: String,
        /// All that are known.
        known: Vec<String>,
    },
    /// There is nothing to tell apart.
    #[error("column {column:?}: every example of every peer is of class {class:?}")]
    OneClass {
        /// The column.
        column: String,
        /// The class.
        class: String,
    },
    /// A share of held-out examples outside 0 to 1.
    #[error("a share of {0} cannot be held out: use 0 to below 1, such as 0.2")]
    Fraction(f64),
}

impl Dataset {
    /// Takes row-major `features` (`[labels.len(), num_features]`) and the label of each row, an index into
    /// `class_names`.
    pub fn new(
        features: Vec<f32>,
        labels: Vec<u32>,
        num_features: usize,
        class_names: Vec<String>,
    ) -> Result<Self, DataError> {
        Self::of(features, &[num_features], Targets::Classes { labels, names: class_names.into() })
    }

    /// Takes row-major `features` (`[len, shape…]`) and what is to be told of each example. `shape` is that of one
    /// example: `[features]`, `[channels, height, width]` of an image, or `[steps]` of a text, whose features are
    /// token numbers.
    pub fn of(features: Vec<f32>, shape: &[usize], targets: Targets) -> Result<Self, DataError> {
        let num_features = check_counts(features.len(), shape, &targets)?;
        if let Some(at) = features.iter().position(|value| !value.is_finite()) {
            return Err(DataError::NotFinite { example: at / num_features });
        }
        Ok(Self { values: Values::Features(features), shape: shape.into(), targets })
    }

    /// Takes the values of a table as they were read, row-major `[len, table.columns.len()]`, NaN where one is missing: a
    /// number as it stands, a category as its index into those of its column. They are to be
    /// [`standardised`](Self::standardised) before a model can learn from them.
    pub fn of_table(values: Vec<f64>, table: Table, targets: Targets) -> Result<Self, DataError> {
        let columns = check_counts(values.len(), &[table.columns.len()], &targets)?;
        for (at, value) in values.iter().enumerate().filter(|(_, value)| !value.is_nan()) {
            let example = at / columns;
            match &table.columns[at % columns].categories {
                None if value.is_infinite() => return Err(DataError::NotFinite { example }),
                Some(all) if value.fract() != 0.0 || !(0.0..all.len() as f64).contains(value) => {
                    return Err(DataError::Category { example, category: *value, listed: all.len() });
                }
                _ => {}
            }
        }
        let shape = Arc::new([table.num_features()]);
        Ok(Self { values: Values::Table(Arc::new(table), values), shape, targets })
    }

    /// 1,797 handwritten digits of 8×8 pixels, scaled to 0..1, as images of one channel: the test part of UCI's *Optical
    /// Recognition of Handwritten Digits* (E. Alpaydin and C. Kaynak, 1998, CC BY 4.0). It is compiled into the binary.
    pub fn digits() -> Self {
        digits::digits()
    }

    /// How many examples there are.
    pub fn len(&self) -> usize {
        self.targets.count() / self.targets.per_example(self.num_features())
    }

    /// Whether there is no example.
    pub fn is_empty(&self) -> bool {
        self.targets.count() == 0
    }

    /// The shape of one example; of a table that is not standardised yet, as far as its categories are known here.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How many values an example has: the product of its shape.
    pub fn num_features(&self) -> usize {
        self.shape.iter().product()
    }

    /// What is to be told of each example.
    pub fn targets(&self) -> &Targets {
        &self.targets
    }

    /// What a model for these data has to tell.
    pub fn task(&self) -> Task {
        match &self.targets {
            Targets::Classes { names, .. } => Task::Classes(names.len()),
            Targets::Numbers(_) => Task::Numbers,
            Targets::Steps { names, .. } => Task::Steps(names.len()),
        }
    }

    /// How many classes a label may name; 0 where the targets are numbers.
    pub fn num_classes(&self) -> usize {
        self.class_names().len()
    }

    /// What each label stands for; empty where the targets are numbers.
    pub fn class_names(&self) -> &[String] {
        match &self.targets {
            Targets::Classes { names, .. } | Targets::Steps { names, .. } => names,
            Targets::Numbers(_) => &[],
        }
    }

    /// Every value, row-major: `[len, num_features]`; none of a table that is not standardised yet.
    pub fn features(&self) -> &[f32] {
        match &self.values {
            Values::Features(features) => features,
            Values::Table(..) => &[],
        }
    }

    /// Every value and every target, without their shape.
    pub(super) fn into_parts(self) -> (Vec<f32>, Targets) {
        match self.values {
            Values::Features(features) => (features, self.targets),
            Values::Table(..) => (Vec::new(), self.targets),
        }
    }

    /// The class of every example; empty where an example has none of its own.
    pub fn labels(&self) -> &[u32] {
        match &self.targets {
            Targets::Classes { labels, .. } => labels,
            Targets::Numbers(_) | Targets::Steps { .. } => &[],
        }
    }

    /// The values of one example.
    ///
    /// # Panics
    ///
    /// If there is no such example, or it is of a table that is not standardised yet.
    pub fn example(&self, index: usize) -> &[f32] {
        row(self.features(), self.num_features(), index)
    }

    /// The examples at `indices`, in that order.
    ///
    /// # Panics
    ///
    /// If an index is not below [`len`](Self::len).
    #[must_use]
    pub fn subset(&self, indices: &[usize]) -> Self {
        let values = match &self.values {
            Values::Features(features) => Values::Features(rows(features, self.num_features(), indices)),
            Values::Table(table, values) => Values::Table(table.clone(), rows(values, table.columns.len(), indices)),
        };
        let targets = self.targets.subset(indices, self.num_features());
        Self { values, shape: self.shape.clone(), targets }
    }

    /// The columns of a table whose values are not standardised yet.
    pub fn table(&self) -> Option<&Table> {
        match &self.values {
            Values::Features(_) => None,
            Values::Table(table, _) => Some(table),
        }
    }

    /// What peers must agree on about their examples, by name, as text: shape and classes, or the kinds of the columns of a
    /// table that is not standardised yet.
    pub fn shared_entries(&self) -> BTreeMap<String, String> {
        schema::entries(self)
    }

    /// What a table that is not standardised yet is like: all that a peer tells the others of its examples.
    pub fn summary(&self) -> Option<Summary> {
        match &self.values {
            Values::Features(_) => None,
            Values::Table(table, values) => Some(table.summary(values, &self.targets)),
        }
    }

    /// The examples of a table as a model learns from them, if `summary` is what all peers' tables together are like: each
    /// number, also one to tell, less the mean and in standard deviations, of which 100 are the most; a feature of 0 or 1 for each category of any
    /// peer; and the classes of all peers. A missing number is the mean, a missing category the most frequent one, a
    /// category that nobody had is none of them. Other examples are left as they are.
    ///
    /// # Errors
    /// If the summary is of other columns, or knows one class only, or an example is of a class that it does not know.
    pub fn standardised(&self, summary: &Summary) -> Result<Self, DataError> {
        let Values::Table(table, values) = &self.values else { return Ok(self.clone()) };
        let (features, width, targets) = table.standardise(values, &self.targets, summary)?;
        Self::of(features, &[width], targets)
    }

    /// Of a table that is not standardised yet, the columns with a number more than 20 standard deviations from the mean of
    /// all peers, as `summary` has it, and the first such number of each.
    pub fn outliers(&self, summary: &Summary) -> Vec<(&str, f64)> {
        match &self.values {
            Values::Features(_) => Vec::new(),
            Values::Table(table, values) => table.outliers(values, &self.targets, summary),
        }
    }

    /// Splits into examples to train on and examples held out to measure with, drawn by `seed`.
    ///
    /// The share held out is `val_fraction`, and the same of every label as nearly as whole examples allow; examples
    /// without a class of their own are drawn alike. At least one example is left to train on if there is any; at least
    /// one is held out if there are two and `val_fraction` is above 0.
    pub fn split(&self, val_fraction: f64, seed: u64) -> Result<(Self, Self), DataError> {
        self.split_as_before(val_fraction, seed, &Seen::default())
    }

    /// The same, but that examples which were seen before stay on the side where they were.
    pub fn split_as_before(&self, val_fraction: f64, seed: u64, seen: &Seen) -> Result<(Self, Self), DataError> {
        if !(0.0..1.0).contains(&val_fraction) {
            return Err(DataError::Fraction(val_fraction));
        }
        let mut rng = generator(&format!("held-out examples, seed {seed}"));
        let mut groups = match &self.targets {
            Targets::Classes { labels, names } => by_label(labels, names.len()),
            Targets::Numbers(_) | Targets::Steps { .. } => vec![(0..self.len()).collect()],
        };
        let quotas = quotas(&groups.iter().map(Vec::len).collect::<Vec<_>>(), val_fraction);
        let (mut train, mut held_out) = (Vec::new(), Vec::new());
        for (indices, quota) in groups.iter_mut().zip(quotas) {
            indices.shuffle(&mut rng);
            held_out.extend_from_slice(&indices[..quota]);
            train.extend_from_slice(&indices[quota..]);
        }
        let (train, held_out) = seen.sides(self, train, held_out);
        Ok((self.subset(&train), self.subset(&held_out)))
    }
}

impl Targets {
    /// How many labels or numbers an example of so many features has.
    fn per_example(&self, num_features: usize) -> usize {
        match self {
            Self::Classes { .. } | Self::Numbers(_) => 1,
            Self::Steps { .. } => num_features,
        }
    }

    fn count(&self) -> usize {
        match self {
            Self::Classes { labels, .. } | Self::Steps { labels, .. } => labels.len(),
            Self::Numbers(numbers) => numbers.len(),
        }
    }

    fn check(&self, per_example: usize) -> Result<(), DataError> {
        match self {
            Self::Classes { labels, names } | Self::Steps { labels, names } => {
                let num_classes = names.len();
                match labels.iter().position(|&label| label as usize >= num_classes) {
                    Some(at) => Err(DataError::Label { example: at / per_example, label: labels[at], num_classes }),
                    None => Ok(()),
                }
            }
            Self::Numbers(numbers) => match numbers.iter().position(|number| !number.is_finite()) {
                Some(example) => Err(DataError::NotFinite { example }),
                None => Ok(()),
            },
        }
    }

    fn subset(&self, indices: &[usize], num_features: usize) -> Self {
        match self {
            Self::Classes { labels, names } => {
                let labels = indices.iter().map(|&index| labels[index]).collect();
                Self::Classes { labels, names: names.clone() }
            }
            Self::Numbers(numbers) => Self::Numbers(indices.iter().map(|&index| numbers[index]).collect()),
            Self::Steps { labels, names } => {
                let labels = indices.iter().flat_map(|&index| row(labels, num_features, index)).copied().collect();
                Self::Steps { labels, names: names.clone() }
            }
        }
    }
}

/// Whether there are as many values and targets as examples of this shape have; returns how many values one has.
fn check_counts(values: usize, shape: &[usize], targets: &Targets) -> Result<usize, DataError> {
    let num_features = shape.iter().try_fold(1, |product: usize, &len| product.checked_mul(len)).unwrap_or(0);
    let per_example = targets.per_example(num_features);
    let examples = targets.count() / per_example.max(1);
    let whole = targets.count().is_multiple_of(per_example.max(1));
    if num_features == 0 || !whole || examples.checked_mul(num_features) != Some(values) {
        return Err(DataError::Shape { values, examples, num_features });
    }
    targets.check(per_example)?;
    Ok(num_features)
}

/// Rows of a row-major matrix, in the order of `indices`.
fn rows<T: Copy>(matrix: &[T], width: usize, indices: &[usize]) -> Vec<T> {
    let mut rows = Vec::with_capacity(indices.len() * width);
    indices.iter().for_each(|&index| rows.extend_from_slice(row(matrix, width, index)));
    rows
}

/// Row `index` of a row-major matrix.
fn row<T>(matrix: &[T], width: usize, index: usize) -> &[T] {
    &matrix[index * width..][..width]
}

/// The indices of each label's examples.
pub(super) fn by_label(labels: &[u32], num_classes: usize) -> Vec<Vec<usize>> {
    let mut groups = vec![Vec::new(); num_classes];
    for (index, &label) in labels.iter().enumerate() {
        groups[label as usize].push(index);
    }
    groups
}

/// How many of each group to hold out: `fraction` of it, rounded so that the total is right as well (the method of
/// largest remainders).
fn quotas(groups: &[usize], fraction: f64) -> Vec<usize> {
    let examples: usize = groups.iter().sum();
    let at_least = usize::from(fraction > 0.0).min(examples.saturating_sub(1));
    let total = (examples as f64 * fraction).round() as usize;
    let total = total.clamp(at_least, examples.saturating_sub(1));
    // Below 1 though the fraction is, the product of the two may round up to the whole group.
    let whole = |size: usize| ((size as f64 * fraction) as usize).min(size.saturating_sub(1));
    let mut quotas: Vec<usize> = groups.iter().map(|&size| whole(size)).collect();
    let remainder = |group: usize| groups[group] as f64 * fraction - quotas[group] as f64;
    let mut order: Vec<usize> = (0..groups.len()).filter(|&group| groups[group] > 0).collect();
    order.sort_by(|&a, &b| remainder(b).total_cmp(&remainder(a)).then(a.cmp(&b)));
    let missing = total - quotas.iter().sum::<usize>();
    for group in order.into_iter().take(missing) {
        quotas[group] += 1;
    }
    quotas
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn examples(labels: &[u32]) -> Dataset {
        let features = (0..labels.len()).map(|index| index as f32).collect();
        Dataset::new(features, labels.to_vec(), 1, vec!["a".into(), "b".into(), "c".into()]).unwrap()
    }

    fn count(data: &Dataset, label: u32) -> usize {
        data.labels().iter().filter(|&&l| l == label).count()
    }

    #[test]
    fn the_digits_are_all_there() {
        let digits = Dataset::digits();
        assert_eq!((digits.len(), digits.shape(), digits.task()), (1797, &[1, 8, 8][..], Task::Classes(10)));
        let counts: Vec<usize> = (0..10).map(|label| count(&digits, label)).collect();
        assert_eq!(counts, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
        assert!(digits.features().iter().all(|value| (0.0..=1.0).contains(value)));
        assert_eq!(&digits.example(0)[..6], [0.0, 0.0, 5.0 / 16.0, 13.0 / 16.0, 9.0 / 16.0, 1.0 / 16.0]);
    }

    #[test]
    fn data_that_does_not_fit_together_is_refused() {
        let names = || vec!["a".to_owned(), "b".to_owned()];
        let shape = Dataset::new(vec![0.0; 5], vec![0, 1], 2, names()).unwrap_err();
        assert_eq!(shape, DataError::Shape { values: 5, examples: 2, num_features: 2 });
        let label = Dataset::new(vec![0.0; 4], vec![0, 2], 2, names()).unwrap_err();
        assert_eq!(label, DataError::Label { example: 1, label: 2, num_classes: 2 });
        let value = Dataset::new(vec![0.0, 0.0, 0.0, f32::NAN], vec![0, 1], 2, names()).unwrap_err();
        assert_eq!(value, DataError::NotFinite { example: 1 });
    }

    #[test]
    fn a_subset_keeps_each_label_with_its_example() {
        let subset = examples(&[0, 1, 2, 1]).subset(&[3, 0, 2]);
        assert_eq!(subset.features(), [3.0, 0.0, 2.0]);
        assert_eq!(subset.labels(), [1, 0, 2]);
    }

    #[test]
    fn a_subset_keeps_the_number_and_the_steps_of_its_examples() {
        let numbers = Dataset::of(vec![0.0, 1.0, 2.0], &[1], Targets::Numbers(vec![10.0, 11.0, 12.0])).unwrap();
        assert_eq!(numbers.subset(&[2, 0]).targets(), &Targets::Numbers(vec![12.0, 10.0]));
        let names: Arc<[String]> = vec!["a".to_owned(), "b".to_owned()].into();
        let steps = |labels| Targets::Steps { labels, names: names.clone() };
        let text = Dataset::of(vec![0.0, 1.0, 1.0, 0.0], &[2], steps(vec![1, 1, 0, 0])).unwrap();
        assert_eq!((text.len(), text.task(), text.labels()), (2, Task::Steps(2), &[][..]));
        assert_eq!(text.subset(&[1]).targets(), &steps(vec![0, 0]));
        assert_eq!(text.split(0.5, 1).unwrap().0.len(), 1);
        assert!(matches!(Dataset::of(vec![0.0; 4], &[2], steps(vec![0; 3])), Err(DataError::Shape { .. })));
        assert!(matches!(Dataset::of(vec![0.0; 4], &[2, 0], steps(vec![0; 4])), Err(DataError::Shape { .. })));
    }

    #[test]
    fn every_digit_is_held_out_in_the_same_share() {
        let digits = Dataset::digits();
        let (train, held_out) = digits.split(0.2, 7).unwrap();
        assert_eq!((train.len(), held_out.len()), (1438, 359));
        for label in 0..10 {
            let share = count(&held_out, label) as f64 / count(&digits, label) as f64;
            assert!((share - 0.2).abs() < 0.01, "{label}: {share}");
        }
    }

    #[test]
    fn a_split_is_drawn_by_its_seed() {
        let digits = Dataset::digits();
        assert_eq!(digits.split(0.2, 7), digits.split(0.2, 7));
        assert_ne!(digits.split(0.2, 7), digits.split(0.2, 8));
    }

    #[test]
    fn a_share_that_leaves_nothing_to_train_on_is_refused() {
        for fraction in [1.0, -0.1, f64::NAN, f64::INFINITY] {
            assert!(examples(&[0, 1]).split(fraction, 1).is_err(), "{fraction}");
        }
        assert_eq!(examples(&[]).split(0.5, 1).unwrap(), (examples(&[]), examples(&[])));
    }

    proptest! {
        #![proptest_config(crate::training::partition::tests::cases())]
        #[test]
        fn a_split_covers_the_data_once_and_leaves_something_to_train_on(
            labels in prop::collection::vec(0u32..3, 1..60),
            fraction in prop_oneof![0.0..1.0, Just(0.0), Just(1.0f64.next_down())],
            seed: u64,
        ) {
            let (train, held_out) = examples(&labels).split(fraction, seed).unwrap();
            prop_assert!(!train.is_empty());
            prop_assert_eq!(held_out.is_empty(), labels.len() < 2 || fraction == 0.0);
            let expected = labels.len() as f64 * fraction;
            prop_assert!((held_out.len() as f64 - expected).abs() <= 1.0);
            let mut seen: Vec<f32> = [train.features(), held_out.features()].concat();
            seen.sort_by(f32::total_cmp);
            prop_assert_eq!(seen, (0..labels.len()).map(|index| index as f32).collect::<Vec<_>>());
        }
    }
}
