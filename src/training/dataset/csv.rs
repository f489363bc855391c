//! Tables of comma-separated values (RFC 4180; also separated by semicolons or tabs, and gzipped).

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use csv::{ReaderBuilder, StringRecord, Trim};
use flate2::read::MultiGzDecoder;

use super::source::{ReadError, ReadOptions};
use super::table::{Column, Table, classes};
use super::{Dataset, Targets};
use crate::aggregation::statistics::{COLUMNS_MAX, SUMMARY_BYTES_MAX};

/// Texts that stand for no value.
const MISSING: [&str; 10] = ["", "?", "NA", "N/A", "n/a", "#N/A", "NULL", "null", "NaN", "nan"];

/// How a gzipped file begins.
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// The longest table that a gzipped file may hold, in bytes.
const UNPACKED_BYTES_MAX: u64 = 8 << 30;

/// A column with more different texts is no set of categories but names, dates or mistakes.
const CATEGORIES_MAX: usize = 100;

/// A numeric label with more different values is a number to tell, and no class.
const CLASSES_MAX: usize = 20;

/// Reads tables of the same columns, of which there is one at least. What values a column has, and which classes there
/// are, is what all together have.
pub(super) fn read(paths: &[&Path], options: &ReadOptions) -> Result<Vec<Dataset>, ReadError> {
    let (first, others) = paths.split_first().expect("the caller names a file");
    let mut rows = Rows::read(first, options)?;
    let mut ends = vec![rows.lines.len()];
    for path in others {
        rows.append(Rows::read(path, options)?)?;
        ends.push(rows.lines.len());
    }
    let all = rows.dataset(options)?;
    if others.is_empty() {
        return Ok(vec![all]);
    }
    let starts = [0].into_iter().chain(ends.iter().copied());
    Ok(starts.zip(&ends).map(|(start, &end)| all.subset(&(start..end).collect::<Vec<_>>())).collect())
}

/// The lines of a table.
struct Rows {
    /// What the columns are called.
    names: Vec<String>,
    /// Whether they are called so in the file.
    named: bool,
    /// What the first line calls the classes 0, 1, …, where it is one of scikit-learn's.
    class_names: Option<Vec<String>>,
    lines: Vec<Line>,
}

struct Line {
    path: Arc<PathBuf>,
    number: u64,
    cells: StringRecord,
}

impl Line {
    fn place(&self, column: &str) -> String {
        format!("{}, line {}, column {column:?}", self.path.display(), self.number)
    }
}

impl Rows {
    fn read(path: &Path, options: &ReadOptions) -> Result<Self, ReadError> {
        let mut lines = lines(path)?;
        let empty = || ReadError::new(path.display(), "there are no examples in it", "each line is an example");
        let class_names = scikit_class_names(&lines);
        if class_names.is_some() {
            lines.remove(0);
        }
        let width = lines.first().ok_or_else(empty)?.cells.len();
        if let Some(line) = lines.iter().find(|line| line.cells.len() != width) {
            let place = format!("{}, line {}", path.display(), line.number);
            let what = format!("it has {} values, line {} has {width}", line.cells.len(), lines[0].number);
            return Err(ReadError::new(
                place,
                what,
                "each line needs as many values as the first; quote values that hold a comma",
            ));
        }
        let named = class_names.is_none() && options.header.unwrap_or_else(|| is_header(&lines));
        let names = if named {
            let cells = lines.remove(0).cells;
            let name = |(at, cell): (usize, &str)| if cell.is_empty() { by_number(at) } else { cell.to_owned() };
            cells.iter().enumerate().map(name).collect()
        } else {
            (0..width).map(by_number).collect::<Vec<_>>()
        };
        if let Some(name) = names.iter().enumerate().find(|(index, name)| names[..*index].contains(name)) {
            let what = format!("two columns are called {:?}", name.1);
            let hint = "give each column a name of its own; or --header no, if the first line names none";
            return Err(ReadError::new(path.display(), what, hint));
        }
        if lines.is_empty() {
            return Err(empty());
        }
        Ok(Self { names, named, class_names, lines })
    }

    /// Adds the lines of a table of the same columns, whatever their order there.
    fn append(&mut self, mut other: Rows) -> Result<(), ReadError> {
        let place = |name: &String| other.names.iter().position(|own| own == name);
        let order: Option<Vec<usize>> = self.names.iter().map(place).collect();
        let Some(order) = order.filter(|order| order.len() == other.names.len()) else {
            let what = format!(
                "its columns are {}, those of {} are {}",
                other.names.join(", "),
                self.lines[0].path.display(),
                self.names.join(", ")
            );
            let hint = "all files, also that of --val-data, need the same columns; --header says whether the first lines \
                        name them";
            return Err(ReadError::new(other.lines[0].path.display(), what, hint));
        };
        for line in &mut other.lines {
            line.cells = order.iter().map(|&at| &line.cells[at]).collect();
        }
        self.lines.extend(other.lines);
        Ok(())
    }

    fn dataset(&self, options: &ReadOptions) -> Result<Dataset, ReadError> {
        let label = match &options.label {
            Some(label) => self.column(label, "label")?,
            None => self.names.len() - 1,
        };
        let ignored = options.ignored.iter().map(|name| self.column(name, "ignore-columns"));
        let ignored: BTreeSet<usize> = ignored.collect::<Result<_, _>>()?;
        if let Some(name) = options.categories.keys().find(|name| !self.names.contains(name)) {
            return Err(self.no_column(name, "categories"));
        }
        let mut features: Vec<usize> =
            (0..self.names.len()).filter(|at| *at != label && !ignored.contains(at)).collect();
        if self.named {
            // Another peer's file may have them in another order.
            features.sort_by_key(|&at| &self.names[at]);
        }
        if features.is_empty() {
            let hint = "a table needs a column beside the label and those that are ignored";
            return Err(ReadError::new(self.lines[0].path.display(), "no column is left to learn from", hint));
        }
        features.iter().chain([&label]).try_for_each(|&at| self.check_breaks(at))?;
        let columns = features.iter().map(|&at| self.describe(at, options)).collect::<Result<Vec<_>, _>>()?;
        let table = Table { columns, label: self.names[label].clone() };
        let path = self.lines[0].path.display();
        if table.num_features() >= COLUMNS_MAX {
            let what = format!("its columns make {} features, more than {COLUMNS_MAX}", table.num_features());
            return Err(ReadError::new(path, what, "leave some out with --ignore-columns"));
        }
        let targets = self.targets(label, options)?;
        let mut values = Vec::with_capacity(self.lines.len() * table.columns.len());
        for line in &self.lines {
            for (&at, column) in features.iter().zip(&table.columns) {
                self.encode(line, at, column, &mut values)?;
            }
        }
        let data = Dataset::of_table(values, table, targets)
            .map_err(|error| ReadError::new(&path, error.to_string(), "look for numbers beyond all reason"))?;
        if data.summary().is_some_and(|summary| summary.encode().len() > SUMMARY_BYTES_MAX) {
            let what = format!("the names of its categories and classes take more than {SUMMARY_BYTES_MAX} bytes");
            return Err(ReadError::new(&path, what, "shorten them, or leave columns out with --ignore-columns"));
        }
        Ok(data)
    }

    /// The column that a user names, by name or by number.
    fn column(&self, name: &str, key: &str) -> Result<usize, ReadError> {
        let by_number = || name.parse::<usize>().ok().filter(|number| (1..=self.names.len()).contains(number));
        let found = self.names.iter().position(|own| own == name).or_else(|| by_number().map(|number| number - 1));
        found.ok_or_else(|| self.no_column(name, key))
    }

    fn no_column(&self, name: &str, key: &str) -> ReadError {
        let nearest = self.names.iter().min_by_key(|own| strsim::damerau_levenshtein(own, name));
        let hint = match nearest.filter(|_| self.named) {
            Some(nearest) => {
                format!("--{key} takes a column's name, as {nearest:?}, or its number, 1 to {}", self.names.len())
            }
            None => format!(
                "--{key} takes a column's number, 1 to {}; --header yes if the first line names them",
                self.names.len()
            ),
        };
        ReadError::new(self.lines[0].path.display(), format!("there is no column {name:?}"), hint)
    }

    /// Numbers that are too large or have commas would become categories or classes, and nobody would see it.
    fn check_spelling(&self, at: usize) -> Result<(), ReadError> {
        let name = &self.names[at];
        let Some((line, text)) = self.no_number(at) else { return Ok(()) };
        let all = |are: fn(&str) -> bool| self.cells(at).all(|(_, cell)| number(cell).is_some() || are(cell));
        let listed = format!("or list all values with --categories '{name}=A|B'");
        let (what, hint) = if all(|cell| cell.parse::<f64>().is_ok()) {
            (
                "numbers are from -3.4e38 to 3.4e38".to_owned(),
                "correct it, or leave the cell empty if there is none".to_owned(),
            )
        } else if all(has_thousands) {
            let hint =
                format!("leave out such commas, as in {}, and write points for decimal ones", text.replace(',', ""));
            ("its comma seems to separate thousands".to_owned(), hint)
        } else if all(|cell| number(&cell.replacen(',', ".", 1)).is_some()) {
            let what = format!("numbers have a point, as in {:?}", text.replacen(',', ".", 1));
            (what, "write points for commas".to_owned())
        } else {
            return Ok(());
        };
        Err(self.mistake(line, at, format!("{text:?} is no number: {what}"), format!("{hint}, {listed}")))
    }

    fn no_number(&self, at: usize) -> Option<(&Line, &str)> {
        self.cells(at).find(|(_, cell)| number(cell).is_none())
    }

    /// A value that is wrong, unless it is a name.
    fn mistake(&self, line: &Line, at: usize, what: String, hint: impl Into<String>) -> ReadError {
        let hint = hint.into();
        let is_first = !self.named && line.number == 1;
        let hint = if is_first { format!("{hint}; or --header yes, if the line names the columns") } else { hint };
        ReadError::new(line.place(&self.names[at]), what, hint)
    }

    /// The different values of a column, as categories and classes are called.
    fn texts(&self, at: usize) -> BTreeSet<&str> {
        self.cells(at).map(|(_, cell)| plain(cell)).collect()
    }

    fn cells(&self, at: usize) -> impl Iterator<Item = (&Line, &str)> {
        self.lines.iter().map(move |line| (line, &line.cells[at])).filter(|(_, cell)| !is_missing(cell))
    }

    /// Two stray quotes make one value of all lines between them; what categories and classes are called is told to others.
    fn check_breaks(&self, at: usize) -> Result<(), ReadError> {
        let broken = |(line, cell): (_, &str)| Some((line, cell.split_once(['\n', '\r'])?.0.to_owned()));
        let Some((line, first)) = self.cells(at).find_map(broken) else { return Ok(()) };
        let what = format!("the value that begins with {first:?} holds a line break");
        let hint =
            "a stray quote joins lines: remove it, or the line break, or leave the column out with --ignore-columns";
        Err(ReadError::new(line.place(&self.names[at]), what, hint))
    }

    /// Numbers, unless a value is none; then categories, in the order of their texts.
    fn describe(&self, at: usize, options: &ReadOptions) -> Result<Column, ReadError> {
        let name = self.names[at].clone();
        if let Some(categories) = options.categories.get(&name) {
            return Ok(Column { name, categories: Some(sorted(categories)) });
        }
        let Some((line, text)) = self.no_number(at) else {
            return Ok(Column { name, categories: None });
        };
        self.check_spelling(at)?;
        let categories = self.texts(at);
        let numbers = categories.iter().filter(|text| number(text).is_some()).count();
        if numbers > CLASSES_MAX {
            let what = format!("{text:?} is no number, and {numbers} different values of this column are");
            let hint = format!(
                "correct the value, leave the cell empty if there is none, or list all values with --categories '{name}=A|B'"
            );
            return Err(self.mistake(line, at, what, hint));
        }
        if categories.len() > CATEGORIES_MAX {
            let what = format!(
                "{text:?} is no number, and {} different values are too many for categories (at most {CATEGORIES_MAX})",
                categories.len()
            );
            let hint = format!("correct the value, or leave the column out with --ignore-columns {name:?}");
            return Err(self.mistake(line, at, what, hint));
        }
        Ok(Column { name, categories: Some(categories.into_iter().map(str::to_owned).collect()) })
    }

    fn encode(&self, line: &Line, at: usize, column: &Column, values: &mut Vec<f64>) -> Result<(), ReadError> {
        let cell = &line.cells[at];
        values.push(match &column.categories {
            _ if is_missing(cell) => f64::NAN,
            None => number(cell).expect("a column with any other value is one of categories"),
            Some(categories) => {
                let category = categories.iter().position(|category| category == plain(cell));
                category.ok_or_else(|| not_listed(line, &column.name, cell, categories))? as f64
            }
        });
        Ok(())
    }

    fn targets(&self, at: usize, options: &ReadOptions) -> Result<Targets, ReadError> {
        let name = &self.names[at];
        if let Some(line) = self.lines.iter().find(|line| is_missing(&line.cells[at])) {
            let what = format!("the label is missing ({:?})", &line.cells[at]);
            return Err(ReadError::new(
                line.place(name),
                what,
                "remove the line, or choose the label's column with --label",
            ));
        }
        let listed = options.categories.get(name);
        if listed.is_none() && options.regression != Some(false) {
            self.check_spelling(at)?;
        }
        let (no_number, distinct) = (self.no_number(at), self.texts(at));
        let many_numbers = no_number.is_none() && listed.is_none() && distinct.len() > CLASSES_MAX;
        match (options.regression.unwrap_or(many_numbers), no_number) {
            (true, Some((line, text))) => {
                let what = format!("{text:?} is no number, as task regression needs");
                Err(self.mistake(line, at, what, "correct it, or use --task classes"))
            }
            (true, None) => Ok(Targets::Numbers(self.cells(at).filter_map(|(_, cell)| number(cell)).collect())),
            (false, _) => self.classes(at, &distinct, options),
        }
    }

    fn classes(&self, at: usize, distinct: &BTreeSet<&str>, options: &ReadOptions) -> Result<Targets, ReadError> {
        let name = &self.names[at];
        let listed = options.categories.get(name);
        // What the file's first line calls the classes 0, 1, …
        let called = self
            .class_names
            .as_ref()
            .filter(|names| listed.is_none() && distinct.iter().all(|text| index_of(text, names).is_some()));
        let class_of = |cell: &str| {
            called.and_then(|names| Some(names[index_of(cell, names)?].clone())).unwrap_or_else(|| cell.to_owned())
        };
        let texts = match listed.or(called) {
            Some(names) => classes(sorted(names)),
            None => classes(distinct.iter().map(|text| (*text).to_owned())),
        };
        if texts.len() > self.lines.len() / 2 && texts.len() > CLASSES_MAX && options.categories.is_empty() {
            let what = format!("column {name:?}: {} different labels for {} examples", texts.len(), self.lines.len());
            return Err(ReadError::new(self.lines[0].path.display(), what, "choose the label's column with --label"));
        }
        let label = |line: &Line| {
            let class = class_of(plain(&line.cells[at]));
            let label = texts.iter().position(|text| *text == class);
            Ok(label.ok_or_else(|| not_listed(line, name, &class, &texts))? as u32)
        };
        let labels = self.lines.iter().map(label).collect::<Result<_, ReadError>>()?;
        Ok(Targets::Classes { labels, names: texts.into() })
    }
}

/// The index, if it is one, that scikit-learn's tables write in the place of one of these names.
fn index_of(text: &str, names: &[String]) -> Option<usize> {
    text.parse().ok().filter(|index| *index < names.len())
}

/// What a column without a name is called.
fn by_number(at: usize) -> String {
    format!("column {}", at + 1)
}

fn sorted(texts: &[String]) -> Vec<String> {
    texts.iter().map(|text| plain(text).to_owned()).collect::<BTreeSet<_>>().into_iter().collect()
}

fn not_listed(line: &Line, column: &str, cell: &str, listed: &[String]) -> ReadError {
    let what = format!("{cell:?} is not among the values listed: {}", listed.join("|"));
    ReadError::new(line.place(column), what, format!("correct it, or list it in --categories '{column}=…'"))
}

fn is_missing(cell: &str) -> bool {
    MISSING.contains(&cell)
}

/// A cell as a number that a feature can be.
fn number(cell: &str) -> Option<f64> {
    cell.parse().ok().filter(|number: &f64| (*number as f32).is_finite())
}

/// Whether a number has commas between its thousands: three digits stand behind each.
fn has_thousands(cell: &str) -> bool {
    let whole = cell.split_once('.').map_or(cell, |(whole, _)| whole);
    let mut groups = whole.trim_start_matches(['-', '+']).split(',');
    let first = groups.next().unwrap_or_default();
    let rest = groups.all(|group| group.len() == 3 && group.bytes().all(|byte| byte.is_ascii_digit()));
    rest && (1..=3).contains(&first.len()) && !first.starts_with('0') && number(&cell.replace(',', "")).is_some()
}

/// A whole number without the point and zero that one peer's program writes and another's does not: `1` for `1.0`. What may
/// be a code, such as `007`, `1e5` or `250.00`, is left as it stands.
fn plain(text: &str) -> &str {
    let Some(number) = text.strip_suffix(".0") else { return text };
    let whole = number.strip_prefix('-').unwrap_or(number);
    let is_whole = !whole.is_empty() && whole.bytes().all(|byte| byte.is_ascii_digit());
    match whole {
        // Zero has no sign.
        "0" => whole,
        _ if is_whole && !whole.starts_with('0') => number,
        _ => text,
    }
}

/// Every line that is not empty.
fn lines(path: &Path) -> Result<Vec<Line>, ReadError> {
    let bytes = read_bytes(path).map_err(|error| ReadError::io(path, &error))?;
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    let separator = separator(bytes);
    let mut reader =
        ReaderBuilder::new().has_headers(false).flexible(true).trim(Trim::All).delimiter(separator).from_reader(bytes);
    let shared = Arc::new(path.to_owned());
    let mut lines = Vec::new();
    let (mut number, mut counted) = (1, 0);
    for record in reader.records() {
        let cells = record.map_err(|error| failed(path, bytes, &error))?;
        let start = start(bytes, cells.position());
        number += line_ends(&bytes[counted..start]);
        counted = start;
        lines.push(Line { path: shared.clone(), number, cells });
    }
    if let Some(at) = open_quote(bytes, separator) {
        let place = format!("{}, line {}", path.display(), 1 + line_ends(&bytes[..at]));
        let hint = "remove the quote or close it; one inside a quoted value is written twice";
        return Err(ReadError::new(place, "a quoted value begins there and never ends", hint));
    }
    Ok(lines)
}

/// Where the quoted value begins that the file ends inside of, if it does: the reader takes all lines behind a stray quote
/// for one value, and says nothing. As there, only a quote that a value begins with opens it.
fn open_quote(bytes: &[u8], separator: u8) -> Option<usize> {
    let (mut begin, mut inside, mut may_open) = (0, false, true);
    for (at, &byte) in bytes.iter().enumerate() {
        if byte == b'"' && (inside || may_open) {
            // Right behind one that closes, it is one of a pair, which stands for a quote.
            let is_second = !inside && bytes[..at].ends_with(b"\"");
            begin = if inside || is_second { begin } else { at };
            (inside, may_open) = (!inside, true);
        } else {
            may_open = byte == separator || matches!(byte, b'\r' | b'\n');
        }
    }
    inside.then_some(begin)
}

/// Where a record begins. The reader takes empty lines, and the second half of a line's end in Windows' files, for its
/// beginning, and its own number of the line is that of those.
fn start(bytes: &[u8], position: Option<&csv::Position>) -> usize {
    let before = position.map_or(0, |position| position.byte() as usize).min(bytes.len());
    before + bytes[before..].iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count()
}

/// How many lines end in these bytes, in whichever of the three ways.
fn line_ends(bytes: &[u8]) -> u64 {
    let ends = |at: usize| bytes[at] == b'\n' || bytes[at] == b'\r' && bytes.get(at + 1) != Some(&b'\n');
    (0..bytes.len()).filter(|&at| ends(at)).count() as u64
}

/// All bytes of a file, unpacked if it is gzipped, whatever its name.
fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let bytes = fs::read(path)?;
    if !bytes.starts_with(&GZIP) {
        return Ok(bytes);
    }
    let mut unpacked = Vec::new();
    MultiGzDecoder::new(&bytes[..]).take(UNPACKED_BYTES_MAX + 1).read_to_end(&mut unpacked)?;
    if unpacked.len() as u64 > UNPACKED_BYTES_MAX {
        return Err(io::Error::other(format!("unpacked it has more than {UNPACKED_BYTES_MAX} bytes")));
    }
    Ok(unpacked)
}

fn failed(path: &Path, bytes: &[u8], error: &csv::Error) -> ReadError {
    match error.kind() {
        csv::ErrorKind::Io(error) => ReadError::io(path, error),
        csv::ErrorKind::Utf8 { pos, err } => {
            let line = 1 + line_ends(&bytes[..start(bytes, pos.as_ref())]);
            let place = format!("{}, line {line}", path.display());
            let what = format!("value {} is not UTF-8", err.field() + 1);
            ReadError::new(place, what, "convert the file to UTF-8, as with iconv")
        }
        _ => ReadError::new(path.display(), error.to_string(), "correct the file"),
    }
}

/// What separates the values of the first line: the most frequent of the usual characters that stand outside of quotes.
fn separator(bytes: &[u8]) -> u8 {
    let line = bytes.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let outside = || line.split(|&byte| byte == b'"').step_by(2).flatten();
    let count = |separator: u8| outside().filter(|&&byte| byte == separator).count();
    [b'\t', b';', b','].into_iter().max_by_key(|&separator| count(separator)).expect("there are three")
}

/// The first line of scikit-learn's own tables tells the numbers of examples and of features, and what the classes 0, 1, …
/// are called.
fn scikit_class_names(lines: &[Line]) -> Option<Vec<String>> {
    let (first, second) = (&lines.first()?.cells, &lines.get(1)?.cells);
    let is_count = |at: usize, count: usize| first.get(at).and_then(|cell| cell.parse().ok()) == Some(count);
    let is_one = is_count(0, lines.len() - 1) && is_count(1, second.len() - 1) && first.len() >= 4;
    is_one.then(|| first.iter().skip(2).map(|name| plain(name).to_owned()).collect())
}

/// Whether the first line names the columns: a text of it stands over a column of numbers; or all its cells are texts, none
/// of which comes again below. The cell over the numbers that pandas gives to lines may be empty.
fn is_header(lines: &[Line]) -> bool {
    let Some((first, rest)) = lines.split_first().filter(|(_, rest)| !rest.is_empty()) else { return false };
    let below = |at: usize| rest.iter().map(move |line| &line.cells[at]).filter(|cell| !is_missing(cell));
    let of_numbers = |at: usize| below(at).next().is_some() && below(at).all(|cell| number(cell).is_some());
    let comes_again = |at: usize| below(at).any(|cell| *cell == first.cells[at]);
    let is_text = |at: &usize| !is_missing(&first.cells[*at]) && number(&first.cells[*at]).is_none();
    let (texts, others): (Vec<usize>, Vec<usize>) = (0..first.cells.len()).partition(is_text);
    let all_name = others.is_empty() || others == [0] && first.cells[0].is_empty() && of_numbers(0);
    texts.iter().any(|&at| of_numbers(at)) || all_name && !texts.iter().any(|&at| comes_again(at))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use proptest::prelude::*;

    use super::*;
    use crate::aggregation::statistics::{Summary, merge};
    use crate::training::{DataError, Task};

    fn options() -> ReadOptions {
        ReadOptions::default()
    }

    fn read_text(text: impl AsRef<[u8]>, options: &ReadOptions) -> Result<Dataset, ReadError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("my.csv");
        fs::write(&path, text).unwrap();
        Ok(read(&[&path], options)?.remove(0))
    }

    fn refused(text: impl AsRef<[u8]>, options: &ReadOptions) -> String {
        let error = read_text(text, options).unwrap_err();
        let file = error.place.find("my.csv").expect("the file is named");
        format!("{}: {} ({})", &error.place[file..], error.what, error.hint)
    }

    /// The table as its only owner learns from it.
    fn ready(data: &Dataset) -> Dataset {
        data.standardised(&data.summary().unwrap()).unwrap()
    }

    const PEOPLE: &str = "age,town,sick\n30,Lund,no\n40,?,yes\n,Oslo,no\n50,Lund,yes\n";

    fn columns(data: &Dataset) -> Vec<(&str, Option<Vec<&str>>)> {
        let columns = data.table().unwrap().columns.iter();
        columns
            .map(|c| (c.name.as_str(), c.categories.as_ref().map(|all| all.iter().map(String::as_str).collect())))
            .collect()
    }

    #[test]
    fn numbers_categories_and_missing_values_are_found_out() {
        let data = read_text(PEOPLE, &options()).unwrap();
        assert_eq!(columns(&data), [("age", None), ("town", Some(vec!["Lund", "Oslo"]))]);
        assert_eq!((data.labels(), data.class_names()), (&[0, 1, 0, 1][..], &["no".to_owned(), "yes".into()][..]));
        let summary = data.summary().unwrap();
        assert_eq!(data.table().unwrap().feature_names(&summary), ["age", "town=Lund", "town=Oslo"]);
        let ready = data.standardised(&summary).unwrap();
        assert_eq!(ready.example(0)[1..], [1.0, 0.0]);
        assert_eq!(ready.example(2), [0.0, 0.0, 1.0], "the mean, and the category that it has");
        assert_eq!(ready.example(1)[1..], [1.0, 0.0], "the most frequent category");
        let ages: f32 = (0..4).map(|index| ready.example(index)[0].powi(2)).sum();
        assert!((ages - 3.0).abs() < 1e-5, "three values with a variance of 1");
        assert!(ready.features().iter().all(|value| value.is_finite()));
    }

    proptest! {
        #![proptest_config(crate::training::partition::tests::cases())]
        /// Whatever a file holds and whatever columns are named, it is read or refused.
        #[test]
        fn no_file_makes_the_reader_panic(
            bytes in prop_oneof![
                "[a-c0-2,;?\"\n\t .-]{0,200}".prop_map(String::into_bytes),
                "(([0-9]|a|b|[?]|NA),([0-9]{1,3}|),(x|y|z|1e400)\n){0,30}".prop_map(String::into_bytes),
                prop::collection::vec(any::<u8>(), 0..200),
            ],
            label in prop::option::of("[a-c1-4]"),
            ignored in prop::collection::vec("[a-c1-4]", 0..2),
            header: Option<bool>,
            regression: Option<bool>,
        ) {
            let options = ReadOptions { label, ignored, header, regression, ..options() };
            match read_text(bytes, &options) {
                Ok(data) => {
                    let summary = data.summary().unwrap();
                    match data.standardised(&summary) {
                        Ok(ready) => {
                            prop_assert!(!ready.is_empty() && ready.features().iter().all(|value| value.is_finite()));
                        }
                        Err(error) => prop_assert!(matches!(error, DataError::OneClass { .. }), "{}", error),
                    }
                }
                Err(error) => prop_assert!(error.place.contains("my.csv") && !error.hint.is_empty()),
            }
        }
    }

    #[test]
    fn a_header_is_told_from_a_line_of_values() {
        assert_eq!(read_text("1,2,a\n3,4,b\n", &options()).unwrap().len(), 2);
        assert_eq!(read_text("x,y,z\n3,4,b\n1,2,a\n", &options()).unwrap().len(), 2);
        assert_eq!(read_text("red,big,a\nblue,big,b\n", &options()).unwrap().len(), 2, "big comes again");
        let forced = ReadOptions { header: Some(true), ..options() };
        assert_eq!(read_text("red,big,a\nblue,big,b\nred,big,c\n", &forced).unwrap().len(), 2);
        let with_mark = "\u{feff}x;y;z\r\n3;4;b\r\n\r\n1;2;a\r\n";
        assert_eq!(columns(&read_text(with_mark, &options()).unwrap())[0].0, "x");
        for text in
            ["0,1,label\n1.5,2.5,1\n1.5,?,0\n", ",age,label\n0,1.5,yes\n1,2.5,no\n", ",age,label\n0,a,yes\n1,b,no\n"]
        {
            let data = read_text(text, &options()).unwrap();
            assert_eq!((data.len(), data.table().unwrap().label.as_str()), (2, "label"), "{text:?}");
        }
        assert_eq!(columns(&read_text(",age,sick\n0,1,1\n", &options()).unwrap())[1].0, "column 1");
        for text in [",2,a\n3,4,b\n", ",red,big\n3,blue,big\n", "?,red,a\n3,blue,b\n"] {
            assert_eq!(read_text(text, &options()).unwrap().len(), 2, "{text:?}");
        }
        let many: String = (0..40).map(|age| format!("{age},{}\n", age % 2)).collect();
        let unnamed = ReadOptions { header: Some(false), ..options() };
        assert!(refused(format!("age,sick\n{many}"), &unnamed).contains("; or --header yes, if the line names"));
        assert!(refused(format!("age,1\n{many}x,1\n"), &options()).contains("; or --header yes, if the line names"));
        assert!(!refused(format!("0,1\nx,1\n{many}"), &options()).contains("--header"));
        let scikit = "3,2,bad,good\n1,2,0\n1,3,1\n4,4,1\n";
        let data = read_text(scikit, &options()).unwrap();
        assert_eq!((data.len(), data.class_names()), (3, &["bad".to_owned(), "good".into()][..]));
    }

    #[test]
    fn the_label_is_any_column_and_others_can_be_ignored() {
        let by_name = ReadOptions { label: Some("town".into()), ignored: vec!["1".into()], ..options() };
        let text = "id,town,size\na,Lund,1\nb,Oslo,2\n";
        let data = read_text(text, &by_name).unwrap();
        assert_eq!((columns(&data), data.labels()), (vec![("size", None)], &[0, 1][..]));
        let by_number = ReadOptions { label: Some("2".into()), ..by_name };
        assert_eq!(read_text(text, &by_number), Ok(data));
        let wrong = refused(text, &ReadOptions { label: Some("twon".into()), ..options() });
        assert_eq!(
            wrong,
            "my.csv: there is no column \"twon\" (--label takes a column's name, as \"town\", or its number, 1 to 3)"
        );
        let all = ReadOptions { ignored: vec!["id".into(), "town".into()], ..options() };
        assert!(refused(text, &all).contains("no column is left"));
    }

    #[test]
    fn one_text_among_many_numbers_is_a_mistake_and_no_category() {
        let table = |text: &str| {
            let lines: String = (20..60).map(|age| format!("{age},{}\n", age % 2)).collect();
            format!("age,sick\n{lines}{text},1\n")
        };
        let error = read_text(table("61 y"), &options()).unwrap_err();
        assert_eq!(error.what, "\"61 y\" is no number, and 40 different values of this column are");
        assert!(error.hint.contains("leave the cell empty"));
        for missing in ["", "N/A", "NULL"] {
            assert_eq!(columns(&read_text(table(missing), &options()).unwrap()), [("age", None)]);
        }
        let stages: String =
            ["1", "2", "3", "X"].iter().cycle().take(40).map(|stage| format!("{stage},0\n{stage},1\n")).collect();
        let stages = read_text(format!("stage,sick\n{stages}"), &options()).unwrap();
        assert_eq!(columns(&stages), [("stage", Some(vec!["1", "2", "3", "X"]))]);
    }

    #[test]
    fn a_label_of_many_numbers_is_a_number_to_tell() {
        let many: String = (0..30).map(|i| format!("{i},{}\n", i * 2)).collect();
        let data = read_text(&many, &options()).unwrap();
        assert_eq!((data.task(), data.len()), (Task::Numbers, 30));
        let Targets::Numbers(numbers) = ready(&data).targets().clone() else { panic!() };
        assert!(
            numbers.iter().sum::<f64>().abs() < 1e-4
                && (numbers.iter().map(|x| x * x).sum::<f64>() - 30.0).abs() < 1e-3
        );
        let few: String = (0..30).map(|i| format!("{i},{}\n", 9 + i % 3)).collect();
        assert_eq!(read_text(&few, &options()).unwrap().class_names(), ["9", "10", "11"]);
        let regression = ReadOptions { regression: Some(true), ..options() };
        assert_eq!(read_text(&few, &regression).unwrap().task(), Task::Numbers);
        assert!(refused(PEOPLE, &regression).starts_with("my.csv, line 2, column \"sick\": \"no\" is no number"));
    }

    #[test]
    fn numbers_with_commas_are_no_classes() {
        let mut task = options();
        let label = "age;hba1c\n1;5,4\n2;6\n3;5,9\n";
        let error = refused(label, &task);
        assert!(
            error.starts_with("my.csv, line 2, column \"hba1c\": \"5,4\" is no number: numbers have a point"),
            "{error}"
        );
        task.regression = Some(false);
        assert_eq!(read_text(label, &task).unwrap().class_names(), ["5,4", "5,9", "6"], "as was said");
        let error = refused("pay;sick\n900;1\n1,000;0\n2,345,678.5;0\n", &options());
        let expected = "my.csv, line 3, column \"pay\": \"1,000\" is no number: its comma seems to separate thousands (leave out such commas, as in 1000,";
        assert!(error.starts_with(expected), "{error}");
        for decimal in ["0,123", "1234,567", "12,34", "1,5e2"] {
            let error = refused(format!("pay;sick\n1,234;1\n{decimal};0\n"), &options());
            assert!(error.contains("numbers have a point, as in \"1.234\""), "{error}");
        }
    }

    #[test]
    fn numbers_beyond_all_reason_are_no_categories() {
        for text in ["1e39", "-1e400", "inf", "NAN"] {
            let expected = |column: &str| {
                format!(
                    "my.csv, line 3, column {column:?}: {text:?} is no number: numbers are from -3.4e38 to 3.4e38 (correct it,"
                )
            };
            let error = refused(format!("age,sick\n1,0\n{text},1\n"), &options());
            assert!(error.starts_with(&expected("age")), "{error}");
            let error = refused(format!("age,sick\n1,0\n2,{text}\n"), &options());
            assert!(error.starts_with(&expected("sick")), "{error}");
        }
        let codes = read_text("code,sick\n1e39,0\n2,1\nA7,0\n", &options()).unwrap();
        assert_eq!(columns(&codes), [("code", Some(vec!["1e39", "2", "A7"]))]);
    }

    #[test]
    fn categories_that_are_listed_are_known_and_no_others_pass() {
        let mut listed = options();
        listed.categories.insert("town".into(), ["Rome", "Oslo", "Lund"].map(String::from).into());
        listed.categories.insert("sick".into(), ["yes", "no"].map(String::from).into());
        let data = read_text(PEOPLE, &listed).unwrap();
        assert_eq!((&ready(&data).example(0)[1..], data.labels()), (&[1.0, 0.0, 0.0][..], &[0, 1, 0, 1][..]));
        assert_eq!(columns(&data)[1].1, Some(vec!["Lund", "Oslo", "Rome"]));
        listed.categories.insert("town".into(), vec!["Lund".into()]);
        let error = refused(PEOPLE, &listed);
        assert!(
            error.starts_with("my.csv, line 4, column \"town\": \"Oslo\" is not among the values listed: Lund"),
            "{error}"
        );
        listed.categories.insert("city".into(), Vec::new());
        assert!(refused(PEOPLE, &listed).contains("no column \"city\""));
    }

    #[test]
    fn a_whole_number_is_the_same_category_or_class_however_it_is_written() {
        let written = ["1.0", "-2.0", "-0.0", "0.0", "10.0", "12345678901234567890.0"];
        assert_eq!(written.map(plain), ["1", "-2", "0", "0", "10", "12345678901234567890"]);
        for code in [
            "1", "-1", "007", "07.0", "1.", ".0", "-.0", "1e5", "1.0e5", "250.10", "250.00", "1.0.0", "+1.0", "A1.0",
            "v.0", "",
        ] {
            assert_eq!(plain(code), code);
        }
        let whole = read_text("stage,sick\n1,0\n2,1\nX,0\n", &options()).unwrap();
        let mut listed = options();
        let floats = "stage,sick\n1.0,0.0\n2.0,1.0\nX,0\n";
        assert_eq!(read_text(floats, &listed), Ok(whole.clone()));
        listed.categories.insert("stage".into(), ["1.0", "2", "X"].map(String::from).into());
        listed.categories.insert("sick".into(), ["0", "1.0"].map(String::from).into());
        assert_eq!(read_text(floats, &listed), Ok(whole));
    }

    #[test]
    fn files_are_told_apart_by_what_is_in_them() {
        let plain = read_text(PEOPLE, &options()).unwrap();
        let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
        packed.write_all(PEOPLE.as_bytes()).unwrap();
        let packed = packed.finish().unwrap();
        let unpacked = read_text(&packed, &options()).unwrap();
        assert_eq!((unpacked.labels(), unpacked.summary()), (plain.labels(), plain.summary()));
        assert!(refused(&packed[..packed.len() / 2], &options()).contains("damaged or cut off"));
        let quoted = "\"a,b,c\";\"d\"\"e\"\r\n1;x\r\n\"2\";\"y;z\"\r\n";
        let data = read_text(quoted, &options()).unwrap();
        assert_eq!((columns(&data)[0].0, data.class_names().concat()), ("a,b,c", "xy;z".into()));
        let last = ReadOptions { label: Some("sick".into()), ..options() };
        let turned = read_text("sick,town,age\nno,Lund,30\nyes,?,40\nno,Oslo,\nyes,Lund,50\n", &last).unwrap();
        assert_eq!((turned.shared_entries(), turned.summary()), (plain.shared_entries(), plain.summary()));
    }

    /// What all the tables together are like.
    fn merged(tables: &[&Dataset]) -> Summary {
        let summaries: Vec<Vec<u8>> = tables.iter().map(|table| table.summary().unwrap().encode()).collect();
        Summary::decode(&merge(summaries.iter().map(Vec::as_slice))).unwrap()
    }

    #[test]
    fn tables_that_nobody_has_together_get_the_features_and_classes_of_all() {
        let one = read_text("age,town,sick\n30,Lund,no\n40,Oslo,no\n50,Lund,no\n", &options()).unwrap();
        let other = read_text("age,town,sick\n20,Rome,yes\n?,?,maybe\n", &options()).unwrap();
        assert_eq!(one.shared_entries(), other.shared_entries());
        let all = merged(&[&other, &one]);
        assert_eq!(all, merged(&[&one, &other]));
        let (one, other) = (one.standardised(&all).unwrap(), other.standardised(&all).unwrap());
        assert_eq!((one.class_names(), one.labels()), (other.class_names(), &[1, 1, 1][..]));
        assert_eq!((other.class_names().concat().as_str(), other.labels()), ("maybenoyes", &[2, 0][..]));
        assert_eq!((&one.example(0)[1..], &one.example(1)[1..]), (&[1.0, 0.0, 0.0][..], &[0.0, 1.0, 0.0][..]));
        assert_eq!(other.example(0)[1..], [0.0, 0.0, 1.0]);
        assert_eq!(other.example(1), [0.0, 1.0, 0.0, 0.0], "the mean, and the most frequent town of all");

        // Who comes later has none of the known towns, and no class that is not known.
        let late = read_text("age,town,sick\n30,Bath,no\n31,Lund,yes\n", &options()).unwrap();
        assert_eq!(late.standardised(&all).unwrap().example(0)[1..], [0.0; 3]);
        let stranger = read_text("age,town,sick\n30,Lund,no\n30,Lund,dead\n", &options()).unwrap();
        let error = stranger.standardised(&all).unwrap_err().to_string();
        assert_eq!(
            error,
            r#"an example is of class "dead" of column "sick", and the federation tells apart only ["maybe", "no", "yes"]"#
        );
        let other_columns = read_text("age,sick\n30,no\n31,yes\n", &options()).unwrap();
        assert_eq!(other_columns.standardised(&all), Err(DataError::OtherColumns));
        let healthy = read_text("age,sick\n30,no\n31,no\n", &options()).unwrap();
        let error = healthy.standardised(&healthy.summary().unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "column \"sick\": every example of every peer is of class \"no\"");
    }

    #[test]
    fn large_numbers_that_differ_little_stay_apart() {
        let times: String = (0..10).map(|second| format!("{},{}\n", 1_700_000_000 + second, second % 2)).collect();
        let data = ready(&read_text(format!("time,odd\n{times}"), &options()).unwrap());
        let step = data.example(1)[0] - data.example(0)[0];
        assert!((step - 0.348_155_3).abs() < 1e-5, "{step}: the seconds' standard deviation is 2.872");
    }

    #[test]
    fn a_file_that_cannot_be_used_is_refused_with_line_column_and_value() {
        assert!(refused("", &options()).contains("no examples"));
        assert!(refused("a,b\n", &ReadOptions { header: Some(true), ..options() }).contains("no examples"));
        assert_eq!(
            refused("a,b\n1,x\n2\n", &options()),
            "my.csv, line 3: it has 1 values, line 1 has 2 (each line needs as many values as the first; quote values that hold a comma)"
        );
        let texts =
            [("a,b\r\n1,x\r\n2\r\n", 3), ("\u{feff}a,b\n\n2\n", 3), ("a,b\r\r2\r", 3), ("a,b\n\"1\n\",x\r\n2", 4)];
        for (text, line) in texts {
            let expected = format!("my.csv, line {line}: it has 1 values, line 1 has 2");
            let found = refused(text, &options());
            assert!(found.starts_with(&expected), "{text:?}: {found}");
        }
        assert!(
            refused("a,b\n1,x\n2,?\n", &options())
                .starts_with("my.csv, line 3, column \"b\": the label is missing (\"?\")")
        );
        assert!(
            refused("a;b\n7;x\n1,5;y\n", &options())
                .starts_with("my.csv, line 3, column \"a\": \"1,5\" is no number: numbers have a point, as in \"1.5\"")
        );
        assert!(refused("a,a,b\n1,2,x\n", &options()).contains("two columns are called \"a\""));
        assert!(refused(b"a,b\n1,x\n\xff,y\n", &options()).starts_with("my.csv, line 3: value 1 is not UTF-8"));
        let names: String = (0..200)
            .map(|i| format!("{},{},{}\n", if i == 0 { "1O".into() } else { i.to_string() }, i, i % 2))
            .collect();
        let error = refused(format!("dose,b,c\n{names}"), &options());
        assert!(error.starts_with("my.csv, line 2, column \"dose\": \"1O\" is no number"), "{error}");
        let missing = read(&[Path::new("/no/such/my.csv")], &options()).unwrap_err();
        assert!(missing.to_string().starts_with("/no/such/my.csv: No such file"));
    }

    #[test]
    fn a_stray_quote_swallows_no_lines() {
        let hint = "(remove the quote or close it; one inside a quoted value is written twice)";
        let rest = "2,no\n".repeat(9);
        for (text, line) in [("a,b\n1,yes\n1,\"no\n", 3), ("a,b\r\n\"1\",\"no\"\"\r\n", 2), ("a,b\n\"\n1\",\"", 3)] {
            let expected = format!("my.csv, line {line}: a quoted value begins there and never ends {hint}");
            assert_eq!(refused(format!("{text}{rest}"), &options()), expected, "{text:?}");
        }
        let notes = "age,note,sick\n1,x,no\n2,\"y,no\n3,x,yes\n4,y\",no\n5,x,yes\n";
        let expected = "my.csv, line 3, column \"note\": the value that begins with \"y,no\" holds a line break (a stray quote joins";
        assert!(refused(notes, &options()).starts_with(expected));
        assert!(refused("age,sick\n1,\"no\n2,yes\"\n3,no\n", &options()).contains("column \"sick\": the value"));
        let ignored = ReadOptions { ignored: vec!["note".into()], ..options() };
        assert_eq!(read_text(notes, &ignored).unwrap().len(), 3);
    }

    proptest! {
        #[test]
        fn a_file_ends_inside_quotes_where_its_reader_says_so(text in "[a\",\r\n]{0,30}") {
            // Then what comes behind it is no line of its own.
            let more = format!("{text}\nend\n");
            let records = ReaderBuilder::new().has_headers(false).flexible(true).from_reader(more.as_bytes()).into_records();
            let apart = records.last().unwrap().unwrap() == vec!["end"];
            prop_assert_eq!(open_quote(text.as_bytes(), b',').is_none(), apart);
        }
    }

    #[test]
    fn files_that_are_read_together_share_columns_and_classes() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            fs::write(dir.path().join(name), text).unwrap();
            dir.path().join(name)
        };
        let train = write("train.csv", PEOPLE);
        let test = write("test.csv", "age,town,sick\n20,Rome,no\n");
        let [train_data, held_out] = read(&[&train, &test], &options()).unwrap().try_into().unwrap();
        let held_out_ready = held_out.standardised(&train_data.summary().unwrap()).unwrap();
        assert_eq!((train_data.len(), &held_out_ready.example(0)[1..]), (4, &[0.0, 0.0, 1.0][..]));
        assert_eq!(held_out.class_names(), train_data.class_names());
        let turned = write("turned.csv", "sick,town,age\nno,Rome,20\n");
        assert_eq!(read(&[&train, &turned], &options()).unwrap()[1], held_out, "columns go by their names");
        let other = write("other.csv", "age,city,sick\n20,Rome,no\n");
        assert!(
            read(&[&train, &other], &options()).unwrap_err().to_string().contains("its columns are age, city, sick")
        );
    }
}
