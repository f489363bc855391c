//! What peers must agree on about their examples, as text: a peer whose differs is told which column, and both values.

use std::collections::BTreeMap;

use super::{Column, Dataset, Task};
use crate::protocol::message::{ENTRIES_MAX, TEXT_BYTES_MAX};
use crate::types::Digest;

/// So many columns are compared one by one, which leaves room for the keys of the configuration; more, all at once.
const COLUMNS_LISTED_MAX: usize = ENTRIES_MAX / 2;

/// What a value's end takes when it is cut.
const CUT_BYTES: usize = 64;

/// What stands before a column's name in the name of its entry.
pub const COLUMN: &str = "column ";

/// What stands before the value of the column to tell.
const LABEL: &str = "label: ";

/// The kind of a column of categories.
pub const CATEGORIES: &str = "categories";

/// The kind of a column of numbers, also of one without values.
const NUMBERS: &str = "numbers";

/// The entries of `data`, by name. Of a table only the kinds of its columns: their categories and classes are those that
/// all founders have together.
pub(super) fn entries(data: &Dataset) -> BTreeMap<String, String> {
    let Some(table) = data.table() else { return entries_of_features(data) };
    let label = if data.task() == Task::Numbers { NUMBERS } else { "classes" };
    let mut entries = BTreeMap::from([(named(&table.label), format!("{LABEL}{label}"))]);
    let kind = |column: &Column| if column.categories.is_some() { CATEGORIES } else { NUMBERS };
    let names: Vec<&str> = table.columns.iter().map(|column| column.name.as_str()).collect();
    if names.len() <= COLUMNS_LISTED_MAX {
        entries.extend(table.columns.iter().map(|column| (named(&column.name), kind(column).to_owned())));
        entries.insert("columns".into(), clipped(&names.join(", ")));
    } else {
        let all: Vec<String> =
            table.columns.iter().map(|column| format!("{}: {}", column.name, kind(column))).collect();
        entries.insert("columns".into(), clipped(&all.join(", ")));
    }
    entries
}

fn entries_of_features(data: &Dataset) -> BTreeMap<String, String> {
    let shape: Vec<String> = data.shape().iter().map(usize::to_string).collect();
    let label = match data.task() {
        Task::Classes(_) => clipped(&data.class_names().join("|")),
        Task::Numbers => NUMBERS.into(),
        Task::Steps(classes) => {
            let characters = data.class_names().concat();
            format!("the next of {classes} characters ({})", Digest::of(characters.as_bytes()).short())
        }
    };
    BTreeMap::from([("example shape".to_owned(), shape.join("x")), ("classes".into(), label)])
}

fn named(column: &str) -> String {
    format!("{COLUMN}{}", clipped(column))
}

/// The text, or its beginning with the digest of all of it, so that it is another text where the end differs.
fn clipped(text: &str) -> String {
    let room = TEXT_BYTES_MAX - CUT_BYTES;
    if text.len() <= room {
        return text.to_owned();
    }
    let start = &text[..text.floor_char_boundary(room - CUT_BYTES)];
    format!("{start}… ({})", Digest::of(text.as_bytes()).short())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::{Table, Targets};

    fn table(columns: usize, name: &str, categories: bool) -> Dataset {
        let categories = categories.then(|| vec!["a".to_owned()]);
        let column = |index: usize| Column { name: format!("{name}{index}"), categories: categories.clone() };
        let table = Table { columns: (0..columns).map(column).collect(), label: "sick".into() };
        let targets = Targets::Classes { labels: vec![0], names: vec!["no".to_owned(), "yes".into()].into() };
        Dataset::of_table(vec![0.0; columns], table, targets).unwrap()
    }

    #[test]
    fn the_column_that_differs_has_an_entry_of_its_own() {
        let (mine, theirs) = (entries(&table(2, "c", true)), entries(&table(2, "c", false)));
        assert_eq!((mine["column c0"].as_str(), theirs["column c0"].as_str()), ("categories", "numbers"));
        assert_eq!(mine["column sick"], "label: classes");
        assert_eq!(entries(&Dataset::digits())["example shape"], "1x8x8");
    }

    #[test]
    fn whatever_the_data_the_entries_keep_the_limits_of_the_wire() {
        for (columns, name) in [(1, "x".repeat(5000)), (1000, "b".into()), (128, "é".repeat(600))] {
            let (one, other) = (entries(&table(columns, &name, true)), entries(&table(columns, &name, false)));
            assert!(one.len() <= COLUMNS_LISTED_MAX + 4);
            assert!(one.iter().all(|(key, value)| key.len() <= TEXT_BYTES_MAX && value.len() <= TEXT_BYTES_MAX));
            assert_ne!(one, other, "{columns} columns");
        }
    }
}
