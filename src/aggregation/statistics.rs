//! What the peers' inputs are like, all together, though none of them shares an example.
//!
//! Each peer summarises its own columns; summaries merge by the pairwise formula of T. Chan, G. Golub and R. LeVeque
//! (*Updating Formulae and a Pairwise Algorithm for Computing Sample Variances*, 1979), which keeps its precision where
//! sums of squares lose it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The longest summary, in bytes.
pub const SUMMARY_BYTES_MAX: usize = 64 * 1024;

/// The most columns of a summary: as many as fit with the longest numbers.
pub const COLUMNS_MAX: usize = SUMMARY_BYTES_MAX / 32;

/// How many examples have each of the values that a column has. Values are in the order of their texts, so that it does
/// not depend on who names one first.
pub type Counts = BTreeMap<String, u64>;

/// Count, mean and sum of squared differences from the mean of the values that a column has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Moments {
    /// How many values there are.
    pub count: u64,
    /// Their mean.
    pub mean: f64,
    /// The sum of the squares of their differences from the mean.
    pub squares: f64,
}

/// One column of a table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Column {
    /// Numbers, which are to be standardised.
    Number(Moments),
    /// Categories, each of which is to become an input of 0 or 1.
    Categories(Counts),
    /// Numbers that are to be told, which are to be standardised as well.
    Target(Moments),
    /// Classes that are to be told.
    Classes(Counts),
}

/// What a table is like, column by column: those that examples are told by, then the one that is to be told.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The columns, in their order.
    pub columns: Vec<Column>,
}

impl Moments {
    /// Takes one more value.
    pub fn add(&mut self, value: f64) {
        self.merge(&Self { count: 1, mean: value, squares: 0.0 });
    }

    /// Takes all values of another.
    pub fn merge(&mut self, other: &Self) {
        let count = self.count.saturating_add(other.count);
        if other.count == 0 {
            return;
        }
        let (share, apart) = (other.count as f64 / count as f64, other.mean - self.mean);
        self.mean += apart * share;
        self.squares += other.squares + apart * apart * share * self.count as f64;
        self.count = count;
    }

    /// The standard deviation, as of a whole population; 1 where there is none to divide by.
    pub fn std(&self) -> f64 {
        let std = (self.squares / self.count.max(1) as f64).sqrt();
        if std.is_finite() && std > 0.0 { std } else { 1.0 }
    }

    /// What is subtracted from a value, and by what it is divided then.
    pub fn scale(&self) -> (f64, f64) {
        (self.mean, self.std())
    }

    fn is_sound(&self) -> bool {
        self.mean.is_finite() && self.squares.is_finite() && self.squares >= 0.0
    }
}

impl Column {
    /// Takes what another peer's column of the same kind has. `false`: it is of another kind.
    fn merge(&mut self, other: &Column) -> bool {
        match (self, other) {
            (Column::Number(own), Column::Number(other)) | (Column::Target(own), Column::Target(other)) => {
                own.merge(other);
            }
            (Column::Categories(own), Column::Categories(other)) | (Column::Classes(own), Column::Classes(other)) => {
                for (value, count) in other {
                    let own = own.entry(value.clone()).or_default();
                    *own = own.saturating_add(*count);
                }
            }
            _ => return false,
        }
        true
    }

    fn is_sound(&self) -> bool {
        match self {
            Column::Number(moments) | Column::Target(moments) => moments.is_sound(),
            Column::Categories(_) | Column::Classes(_) => true,
        }
    }
}

impl Summary {
    /// The bytes that peers send; none for no columns.
    pub fn encode(&self) -> Vec<u8> {
        if self.columns.is_empty() {
            return Vec::new();
        }
        postcard::to_stdvec(self).expect("a summary holds nothing that postcard refuses")
    }

    /// Reads what a peer sent, if it is a summary of finite numbers.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.is_empty() {
            return Some(Self::default());
        }
        let (summary, rest) = postcard::take_from_bytes::<Self>(bytes).ok()?;
        let sound = summary.columns.iter().all(Column::is_sound);
        (rest.is_empty() && bytes.len() <= SUMMARY_BYTES_MAX && sound).then_some(summary)
    }

    fn merge(&mut self, other: &Summary) {
        let mut merged = self.clone();
        let alike = merged.columns.len() == other.columns.len()
            && merged.columns.iter_mut().zip(&other.columns).all(|(own, other)| own.merge(other));
        if alike && merged.columns.iter().all(Column::is_sound) && merged.encode().len() <= SUMMARY_BYTES_MAX {
            *self = merged;
        }
    }
}

/// The summary of all peers, from the encoded ones of each, in `PeerId` order: the same bits in whatever order they came.
///
/// What is no summary, or one of other columns than the first, is left out: peers have compared their columns before, so
/// that it can only be meant to do harm. Left out is also one whose values would make the whole longer than
/// [`SUMMARY_BYTES_MAX`]; its peer finds out, and says so.
pub fn merge<'a>(summaries: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut all = summaries.into_iter().filter_map(Summary::decode).filter(|summary| !summary.columns.is_empty());
    let mut merged = all.next().unwrap_or_default();
    all.for_each(|summary| merged.merge(&summary));
    merged.encode()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(values: &[f64]) -> Moments {
        let mut moments = Moments::default();
        values.iter().for_each(|&value| moments.add(value));
        moments
    }

    fn summary(values: &[f64]) -> Vec<u8> {
        Summary { columns: vec![Column::Number(moments(values)), Column::Classes(counts(&["a"]))] }.encode()
    }

    fn counts(values: &[&str]) -> Counts {
        let mut counts = Counts::new();
        values.iter().for_each(|value| *counts.entry((*value).to_owned()).or_default() += 1);
        counts
    }

    #[test]
    fn merged_summaries_are_those_of_all_values() {
        // Far from zero, where a sum of squares has no digits left for the variance.
        let values: Vec<f64> = (0..100).map(|i| 1.7e9 + f64::from(i * 37 % 100) / 100.0).collect();
        let parts = [summary(&values[..3]), summary(&values[3..90]), summary(&[]), summary(&values[90..])];
        let merged = Summary::decode(&merge(parts.iter().map(Vec::as_slice))).unwrap();
        assert_eq!(merged.columns[1], Column::Classes(counts(&["a"; 4])));
        let Column::Number(merged) = merged.columns[0] else { panic!("no numbers") };
        let variance = values.iter().map(|v| (v - 1.7e9 - 0.495).powi(2)).sum::<f64>() / 100.0;
        assert_eq!(merged.count, 100);
        assert!(
            (merged.mean - 1.7e9 - 0.495).abs() < 1e-6 && (merged.std() - variance.sqrt()).abs() < 1e-6,
            "{merged:?}"
        );
        assert_eq!((moments(&[]).std(), moments(&[5.0, 5.0]).std()), (1.0, 1.0));
    }

    #[test]
    fn merged_values_are_those_of_all_peers_whoever_comes_first() {
        let of = |values: &[&str]| Summary { columns: vec![Column::Categories(counts(values))] }.encode();
        let parts = [of(&["b", "b"]), of(&["c", "a", "b"]), of(&[])];
        let merged = merge(parts.iter().map(Vec::as_slice));
        assert_eq!(merged, of(&["a", "b", "b", "b", "c"]));
        assert_eq!(merge(parts.iter().rev().map(Vec::as_slice)), merged);
        let long: Vec<String> = (0..4000).map(|index| format!("{index:09}")).collect();
        let long = of(&long.iter().map(String::as_str).collect::<Vec<_>>());
        let other = of(&[&"x".repeat(SUMMARY_BYTES_MAX / 2)]);
        assert!(merge([&long[..], &other]) == long, "both would be longer than a message may be");
        let short = of(&["a"]);
        assert!(merge([&long[..], &short]).len() > long.len());
    }

    #[test]
    fn what_does_not_fit_the_others_is_left_out() {
        let good = [summary(&[1.0, 2.0]), summary(&[3.0])];
        let expected = merge(good.iter().map(Vec::as_slice));
        let nan = Summary { columns: vec![Column::Number(Moments { count: 1, mean: f64::NAN, squares: 0.0 })] };
        let huge = Moments { count: 1, mean: f64::MAX, squares: f64::MAX };
        let huge = Summary { columns: vec![Column::Number(huge), Column::Target(huge)] };
        let mixed = Summary { columns: vec![Column::Categories(counts(&["a"])); 2] };
        for bad in [nan.encode(), huge.encode(), mixed.encode(), b"nothing".to_vec(), Vec::new()] {
            let all = [&good[0][..], &bad, &good[1]];
            assert_eq!(merge(all), expected);
        }
        assert!(merge([&b""[..], b""]).is_empty());
    }

    #[test]
    fn the_most_columns_fit() {
        let moments = Moments { count: u64::MAX, mean: 0.1, squares: 0.1 };
        let bytes = Summary { columns: vec![Column::Number(moments); COLUMNS_MAX] }.encode();
        assert!(bytes.len() <= SUMMARY_BYTES_MAX && Summary::decode(&bytes).is_some());
    }
}
