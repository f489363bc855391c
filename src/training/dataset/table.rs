//! What the columns of a table are, and how they become features once it is known what they are like at all peers.

use crate::aggregation::statistics::{Column as Statistics, Moments, Summary};

/// The columns of a table whose values are as they were read: numbers not standardised, missing ones not imputed.
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
    /// All values that it may have, each of which is a feature of 0 or 1; `None`: numbers, one feature.
    pub categories: Option<Vec<String>>,
}

impl Column {
    /// How many features it has.
    pub fn width(&self) -> usize {
        self.categories.as_ref().map_or(1, Vec::len)
    }
}

impl Table {
    /// How many features the columns have together.
    pub fn num_features(&self) -> usize {
        self.columns.iter().map(Column::width).sum()
    }

    /// What each feature is called: the column, and the category where it is one.
    pub fn feature_names(&self) -> Vec<String> {
        let names = self.columns.iter().flat_map(|column| match &column.categories {
            None => vec![column.name.clone()],
            Some(categories) => categories.iter().map(|category| format!("{}={category}", column.name)).collect(),
        });
        names.collect()
    }

    /// What the features are like, `features` row-major with NaN where a value is missing; then the numbers to tell.
    pub(super) fn summary(&self, features: &[f32], numbers: Option<&[f32]>) -> Summary {
        let width = self.num_features();
        let moments = |at: usize| {
            let mut moments = Moments::default();
            let values = features.iter().skip(at).step_by(width.max(1)).filter(|value| !value.is_nan());
            values.for_each(|&value| moments.add(f64::from(value)));
            moments
        };
        let mut columns = Vec::with_capacity(width + 1);
        for column in &self.columns {
            for _ in 0..column.width() {
                let moments = moments(columns.len());
                let is_number = column.categories.is_none();
                columns.push(if is_number { Statistics::Number(moments) } else { Statistics::Indicator(moments) });
            }
        }
        if let Some(numbers) = numbers {
            let mut moments = Moments::default();
            numbers.iter().for_each(|&number| moments.add(f64::from(number)));
            columns.push(Statistics::Target(moments));
        }
        Summary { columns }
    }

    /// Standardises one example: `(x - mean) / std`. What is missing becomes the mean, or the most frequent category.
    pub(super) fn standardise(&self, example: &mut [f32], summary: &Summary) {
        let mut at = 0;
        for column in &self.columns {
            let own = at..at + column.width();
            at = own.end;
            if column.categories.is_none() {
                let value = example[own.start];
                example[own.start] = if value.is_nan() { 0.0 } else { scaled(value, &summary.columns[own.start]) };
            } else if example[own.clone()].iter().any(|value| value.is_nan()) {
                let frequency = |index: usize| summary.columns[index].moments().mean;
                let first = own.start;
                let most =
                    own.clone().fold(first, |best, next| if frequency(next) > frequency(best) { next } else { best });
                example[own].fill(0.0);
                example[most] = 1.0;
            }
        }
    }
}

/// A number less its mean, in standard deviations.
pub(super) fn scaled(value: f32, column: &Statistics) -> f32 {
    let (mean, std) = column.scale();
    // Far outliers end somewhere finite: one of them is not to make a whole peer's training fail.
    ((f64::from(value) - mean) / std).clamp(-1e6, 1e6) as f32
}
