//! What the columns of a table are, and how they become features once it is known what they are like at all peers.

use std::collections::BTreeMap;

use super::{DataError, Targets};
use crate::aggregation::statistics::{Column as Statistics, Counts, Moments, Summary};

/// Where standardised numbers end. One that is so far off is a mistake or alone: it is not to be the whole loss, nor to make
/// a peer's training fail.
const SCALED_MAX: f64 = 100.0;

/// A value to train on that is so many standard deviations from the mean is worth a warning.
const SCALED_USUAL: f64 = 20.0;

/// The columns of a table whose values are as they were read: numbers not standardised, missing ones not imputed,
/// categories not features yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// The columns that examples are told by.
    pub columns: Vec<Column>,
    /// The name of the column to tell.
    pub label: String,
}

/// A column of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name; `column 3` where a table has none.
    pub name: String,
    /// The values that are known of here, each of which becomes a feature of 0 or 1; `None`: numbers, one feature.
    pub categories: Option<Vec<String>>,
}

/// How one column becomes features.
enum Encoding {
    Number {
        mean: f64,
        std: f64,
    },
    /// Of the values known here, which of the features each is, if it is one; how many features there are; and which of
    /// them stands for a missing value.
    Categories {
        places: Vec<Option<usize>>,
        width: usize,
        usual: Option<usize>,
    },
}

impl Column {
    /// How many features it has, as far as is known here.
    pub fn width(&self) -> usize {
        self.categories.as_ref().map_or(1, Vec::len)
    }

    fn encoding(&self, statistics: &Statistics) -> Option<Encoding> {
        Some(match (&self.categories, statistics) {
            (None, Statistics::Number(moments)) => {
                let (mean, std) = moments.scale();
                Encoding::Number { mean, std }
            }
            (Some(own), Statistics::Categories(all)) => {
                let place = |value: &String| all.keys().position(|known| known == value);
                // The first of those that are equally frequent.
                let usual = all.values().enumerate().rev().max_by_key(|(_, count)| **count).map(|(place, _)| place);
                Encoding::Categories { places: own.iter().map(place).collect(), width: all.len(), usual }
            }
            _ => return None,
        })
    }
}

impl Table {
    /// How many features the columns have together, as far as is known here.
    pub fn num_features(&self) -> usize {
        self.columns.iter().map(Column::width).sum()
    }

    /// What each feature is called once categories are those of all peers: the column, and the category where it is one.
    pub fn feature_names(&self, summary: &Summary) -> Vec<String> {
        let of_column = |(column, statistics): (&Column, &Statistics)| match statistics {
            Statistics::Categories(all) => all.keys().map(|value| format!("{}={value}", column.name)).collect(),
            _ => vec![column.name.clone()],
        };
        self.columns.iter().zip(&summary.columns).flat_map(of_column).collect()
    }

    /// What the table is like: `values` row-major `[examples, columns]`, as those of
    /// [`Dataset::of_table`](super::Dataset::of_table).
    pub(super) fn summary(&self, values: &[f64], targets: &Targets) -> Summary {
        let known = |at: usize| values.iter().skip(at).step_by(self.columns.len()).filter(|value| !value.is_nan());
        let describe = |(at, column): (usize, &Column)| match &column.categories {
            None => Statistics::Number(moments(known(at))),
            Some(names) => Statistics::Categories(counts(names, known(at).map(|&value| value as usize))),
        };
        let mut columns: Vec<Statistics> = self.columns.iter().enumerate().map(describe).collect();
        columns.push(match targets {
            Targets::Numbers(numbers) => Statistics::Target(moments(numbers)),
            Targets::Classes { labels, names } | Targets::Steps { labels, names } => {
                Statistics::Classes(counts(names, labels.iter().map(|&label| label as usize)))
            }
        });
        Summary { columns }
    }

    /// The features of all examples, `[examples, features]` with how many features those are, and what is to be told:
    /// numbers as `(x - mean) / std`, cut at 100, a missing one as the mean; categories as 0 and 1, a missing one as the most
    /// frequent one, one that the summary does not know as zeros.
    pub(super) fn standardise(
        &self,
        values: &[f64],
        targets: &Targets,
        summary: &Summary,
    ) -> Result<(Vec<f32>, usize, Targets), DataError> {
        let (label, columns) = summary.columns.split_last().ok_or(DataError::OtherColumns)?;
        if columns.len() != self.columns.len() {
            return Err(DataError::OtherColumns);
        }
        let encodings = self.columns.iter().zip(columns).map(|(column, statistics)| column.encoding(statistics));
        let encodings = encodings.collect::<Option<Vec<_>>>().ok_or(DataError::OtherColumns)?;
        let width = encodings.iter().map(Encoding::width).sum();
        let mut features = Vec::with_capacity(values.len() / self.columns.len().max(1) * width);
        for example in values.chunks_exact(self.columns.len()) {
            example.iter().zip(&encodings).for_each(|(&value, encoding)| encoding.encode(value, &mut features));
        }
        Ok((features, width, self.to_tell(targets, label)?))
    }

    /// The first value of each column of numbers, also of those to tell, that is far from the mean of all peers.
    pub(super) fn outliers<'a>(&'a self, values: &[f64], targets: &Targets, summary: &Summary) -> Vec<(&'a str, f64)> {
        let numbers: &[f64] = if let Targets::Numbers(numbers) = targets { numbers } else { &[] };
        let of_column = |(at, (column, statistics)): (usize, (&'a Column, &Statistics))| {
            let values = values.iter().skip(at).step_by(self.columns.len());
            Some((column.name.as_str(), first_far(values, statistics)?))
        };
        let of_label = |statistics: &Statistics| Some((self.label.as_str(), first_far(numbers, statistics)?));
        let columns = self.columns.iter().zip(&summary.columns).enumerate().filter_map(of_column);
        columns.chain(summary.columns.last().and_then(of_label)).collect()
    }

    fn to_tell(&self, targets: &Targets, label: &Statistics) -> Result<Targets, DataError> {
        match (targets, label) {
            (Targets::Numbers(numbers), Statistics::Target(moments)) => {
                let (mean, std) = moments.scale();
                Ok(Targets::Numbers(numbers.iter().map(|&number| scaled(number, mean, std).into()).collect()))
            }
            (Targets::Classes { labels, names: own }, Statistics::Classes(all)) => {
                let names = classes(all.keys().cloned());
                if names.len() < 2 {
                    let (column, class) = (self.label.clone(), names.concat());
                    return Err(DataError::OneClass { column, class });
                }
                let places: BTreeMap<&String, u32> = names.iter().zip(0..).collect();
                let place = |label: &u32| {
                    let class = &own[*label as usize];
                    places.get(class).copied().ok_or_else(|| DataError::UnknownClass {
                        column: self.label.clone(),
                        class: class.clone(),
                        known: names.clone(),
                    })
                };
                let labels = labels.iter().map(place).collect::<Result<_, _>>()?;
                Ok(Targets::Classes { labels, names: names.into() })
            }
            _ => Err(DataError::OtherColumns),
        }
    }
}

impl Encoding {
    fn width(&self) -> usize {
        match self {
            Self::Number { .. } => 1,
            Self::Categories { width, .. } => *width,
        }
    }

    fn encode(&self, value: f64, features: &mut Vec<f32>) {
        match self {
            Self::Number { .. } if value.is_nan() => features.push(0.0),
            Self::Number { mean, std } => features.push(scaled(value, *mean, *std)),
            Self::Categories { places, width, usual } => {
                let place = if value.is_nan() { *usual } else { places.get(value as usize).copied().flatten() };
                features.extend((0..*width).map(|at| if Some(at) == place { 1.0 } else { 0.0 }));
            }
        }
    }
}

fn first_far<'a>(values: impl IntoIterator<Item = &'a f64>, statistics: &Statistics) -> Option<f64> {
    let (Statistics::Number(moments) | Statistics::Target(moments)) = statistics else { return None };
    let (mean, std) = moments.scale();
    values.into_iter().copied().find(|value| (value - mean).abs() > SCALED_USUAL * std)
}

fn moments<'a>(values: impl IntoIterator<Item = &'a f64>) -> Moments {
    let mut moments = Moments::default();
    values.into_iter().for_each(|&value| moments.add(value));
    moments
}

/// Counts values that are given as indices into their names. Those that no example has are known all the same.
fn counts(names: &[String], values: impl Iterator<Item = usize>) -> Counts {
    let mut counts = vec![0; names.len()];
    values.for_each(|value| counts[value] += 1);
    names.iter().cloned().zip(counts).collect()
}

/// Classes in their order: 10 comes after 9 where all are numbers, else all are in the order of their letters.
pub(super) fn classes(names: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut names: Vec<String> = names.into_iter().collect();
    names.sort();
    names.dedup();
    if let Some(mut numbers) = names.iter().map(|name| name.parse().ok()).collect::<Option<Vec<f64>>>() {
        let mut numbered: Vec<(f64, String)> = numbers.drain(..).zip(names).collect();
        numbered.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        return numbered.into_iter().map(|(_, name)| name).collect();
    }
    names
}

/// A number less its mean, in standard deviations.
fn scaled(value: f64, mean: f64, std: f64) -> f32 {
    ((value - mean) / std).clamp(-SCALED_MAX, SCALED_MAX) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_is_far_off_is_told_and_cut() {
        let columns = ["age", "dose"].map(|name| Column { name: name.into(), categories: None }).into();
        let table = Table { columns, label: "pay".into() };
        let mut values: Vec<f64> = (0..2000).map(|at| f64::from(at % 5)).collect();
        let mut pay = vec![0.0; 1000];
        let targets = Targets::Numbers(pay.clone());
        let summary = table.summary(&values, &targets);
        assert!(table.outliers(&values, &targets, &summary).is_empty());
        (values[1], values[5], pay[7]) = (f64::NAN, -1e30, 50.0);
        let targets = Targets::Numbers(pay);
        assert_eq!(table.outliers(&values, &targets, &summary), [("dose", -1e30), ("pay", 50.0)]);
        let (features, _, targets) = table.standardise(&values, &targets, &summary).unwrap();
        assert_eq!((features[1], features[5]), (0.0, -100.0));
        assert!(matches!(targets, Targets::Numbers(pay) if pay[7] == 50.0));
    }

    #[test]
    fn classes_are_in_the_order_of_their_numbers_or_else_of_their_letters() {
        let sorted = |names: &[&str]| classes(names.iter().map(|name| (*name).to_owned()));
        assert_eq!(sorted(&["10", "9", "-1", "9"]), ["-1", "9", "10"]);
        assert_eq!(sorted(&["10", "9", "1a"]), ["10", "1a", "9"]);
    }
}
