//! A log of events that may still grow.

use rodizio::events::Entry;

/// The entries of a log's text, and its length up to the end of the last one: a line counts once its end is there.
pub(crate) fn entries(text: &str) -> (Vec<Entry>, usize) {
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    let entry = |line| Entry::from_line(line).unwrap_or_else(|e| panic!("{e}: {line}"));
    (text[..whole].lines().map(entry).collect(), whole)
}
