//! Where examples come from: `SCHEME:PATH`, and what is said of a source that cannot be used.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Dataset, csv, idx, images, text};

/// A data set, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The digits that are compiled into the binary.
    Digits,
    /// A directory with files named as those of MNIST.
    Idx(PathBuf),
    /// A table, one example a line.
    Csv(PathBuf),
    /// A directory with a folder of pictures for each class.
    Images(PathBuf),
    /// A text, whose next character is to be told.
    Text(PathBuf),
}

/// What is to be known of a source beside its name. Each option is for some sources; others pass it over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadOptions {
    /// Of a table, the column to tell: its name, or its number from 1; `None`: the last.
    pub label: Option<String>,
    /// Whether a table's first line names the columns; `None`: to be found out.
    pub header: Option<bool>,
    /// Whether a table's label is a number to tell, and no class; `None`: to be found out.
    pub regression: Option<bool>,
    /// Columns of a table that are passed over: their names, or their numbers from 1.
    pub ignored: Vec<String>,
    /// All values that a column may have, by its name; the classes of pictures as `class`, in their order, so that a peer
    /// that lacks some of them agrees with the others.
    pub categories: BTreeMap<String, Vec<String>>,
    /// Pictures are resized to a square of so many pixels; `None`: all have one size.
    pub image_size: Option<usize>,
    /// 1: pictures are read as grey, 3: as red, green and blue.
    pub channels: usize,
    /// How many characters of a text are an example.
    pub window: usize,
    /// Characters beyond ASCII that are known in a text; all others count as one.
    pub characters: String,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self {
            label: None,
            header: None,
            regression: None,
            ignored: Vec::new(),
            categories: BTreeMap::new(),
            image_size: None,
            channels: 3,
            window: 64,
            characters: String::new(),
        }
    }
}

/// The examples of a source.
#[derive(Clone, Debug, PartialEq)]
pub struct Examples {
    /// Those to train on; unless some are kept apart, those to measure with are to be held out of them.
    pub train: Train,
    /// Those that are kept apart to measure with.
    pub held_out: Option<Dataset>,
}

/// Examples to train on, and to whom they belong.
#[derive(Clone, Debug, PartialEq)]
pub enum Train {
    /// One peer's, or to be shared out.
    Whole(Dataset),
    /// Each one peer's: what a pattern stands for, in the order of the names.
    Each(Vec<Dataset>),
}

/// Why a source cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {what}")]
pub struct ReadError {
    /// The file, with the line and the column where there are such.
    pub place: String,
    /// What is wrong there, with the value.
    pub what: String,
    /// What to do.
    pub hint: String,
}

impl ReadError {
    pub(super) fn new(place: impl fmt::Display, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { place: place.to_string(), what: what.into(), hint: hint.into() }
    }

    pub(super) fn io(path: &Path, error: &io::Error) -> Self {
        let hint = match error.kind() {
            io::ErrorKind::NotFound => {
                "--data names a file or directory of this machine; look for a mistake in the path"
            }
            io::ErrorKind::IsADirectory => "name a file of it, or all with a pattern: --data csv:DIR/*.csv",
            io::ErrorKind::NotADirectory => {
                "--data csv:FILE and text:FILE take a file, images:DIR and idx:DIR a directory"
            }
            io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => {
                "the file is damaged or cut off: fetch it again"
            }
            _ => "see that the file is there and may be read",
        };
        Self::new(path.display(), error.to_string(), hint)
    }
}

impl Source {
    /// What [`parse`](Self::parse) takes, in words.
    pub const SCHEMES: &'static str = "digits, idx:DIR, csv:FILE, images:DIR or text:FILE";

    /// The source that `text` names: `digits`, or a scheme and a path.
    pub fn parse(text: &str) -> Option<Self> {
        if text == "digits" {
            return Some(Self::Digits);
        }
        let (scheme, path) = text.split_once(':')?;
        if path.is_empty() {
            return None;
        }
        Self::Digits.with_scheme(scheme, path.into())
    }

    fn with_scheme(&self, scheme: &str, path: PathBuf) -> Option<Self> {
        Some(match scheme {
            "idx" => Self::Idx(path),
            "csv" => Self::Csv(path),
            "images" => Self::Images(path),
            "text" => Self::Text(path),
            _ => return None,
        })
    }

    fn scheme(&self) -> &'static str {
        match self {
            Self::Digits => "digits",
            Self::Idx(_) => "idx",
            Self::Csv(_) => "csv",
            Self::Images(_) => "images",
            Self::Text(_) => "text",
        }
    }

    fn path(&self) -> Option<&Path> {
        match self {
            Self::Digits => None,
            Self::Idx(path) | Self::Csv(path) | Self::Images(path) | Self::Text(path) => Some(path),
        }
    }

    /// Whether the last part of the path is a pattern with `*` or `?`, which stands for many sources.
    pub fn is_pattern(&self) -> bool {
        let name = self.path().and_then(Path::file_name).map(|name| name.to_string_lossy());
        // A file of exactly that name is meant as it stands.
        name.is_some_and(|name| name.contains(['*', '?'])) && self.path().is_some_and(|path| !path.exists())
    }

    /// The sources that a pattern stands for, in the order of their names; a source that is no pattern is itself.
    pub fn expand(&self) -> Result<Vec<Source>, ReadError> {
        let (true, Some(path)) = (self.is_pattern(), self.path()) else { return Ok(vec![self.clone()]) };
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let pattern = path.file_name().unwrap_or_default().to_string_lossy();
        let names = sorted_names(dir)?.into_iter().filter(|name| !name.starts_with('.') && matches(&pattern, name));
        // The path as the user began it: `*.csv` gives `a.csv`, not `./a.csv`.
        let found = names.filter_map(|name| self.with_scheme(self.scheme(), path.with_file_name(name)));
        let found: Vec<Source> = found.collect();
        if found.is_empty() {
            let hint = "--data csv:DIR/*.csv gives each peer one of the files in DIR";
            return Err(ReadError::new(path.display(), "no file has a name of this pattern", hint));
        }
        Ok(found)
    }

    /// Reads the examples, and those to measure with from a second source of the same kind. Tables that are read together
    /// have the same columns and classes, whatever values some of them lack.
    pub fn read(&self, held_out: Option<&Source>, options: &ReadOptions) -> Result<Examples, ReadError> {
        if let Some(other) = held_out.filter(|other| other.scheme() != self.scheme()) {
            let what = format!("it is held out from {self}, which is of another kind");
            return Err(ReadError::new(other, what, "name a source of the same kind as --data with --val-data"));
        }
        let sources = self.expand()?;
        let all: Vec<&Source> = sources.iter().chain(held_out).collect();
        let mut own = None;
        let mut sets = if let Self::Csv(_) = self {
            csv::read(&all.iter().filter_map(|source| source.path()).collect::<Vec<_>>(), options)?
        } else {
            let mut sets = Vec::with_capacity(all.len());
            for source in &all {
                let (set, apart) = source.read_alone(options)?;
                own = apart;
                sets.push(set);
            }
            check_alike(&all, &sets)?;
            sets
        };
        // What a source keeps apart by itself counts where there is one source and nothing else is named.
        let held_out = if held_out.is_some() { sets.pop() } else { own.filter(|_| !self.is_pattern()) };
        let train = if self.is_pattern() { Train::Each(sets) } else { Train::Whole(sets.remove(0)) };
        Ok(Examples { train, held_out })
    }

    fn read_alone(&self, options: &ReadOptions) -> Result<(Dataset, Option<Dataset>), ReadError> {
        let all = match self {
            Self::Digits => Dataset::digits(),
            Self::Idx(dir) => return idx::read(dir),
            Self::Csv(path) => csv::read(&[path], options)?.remove(0),
            Self::Images(dir) => images::read(dir, options)?,
            Self::Text(path) => text::read(path, options)?,
        };
        Ok((all, None))
    }
}

/// What [`Source::parse`] takes.
impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.path() {
            Some(path) => write!(f, "{}:{}", self.scheme(), path.display()),
            None => f.write_str(self.scheme()),
        }
    }
}

fn check_alike(sources: &[&Source], sets: &[Dataset]) -> Result<(), ReadError> {
    let kind = |set: &Dataset| (set.shape().to_vec(), set.task(), set.class_names().to_vec());
    let first = kind(&sets[0]);
    let Some(other) = sets.iter().position(|set| kind(set) != first) else { return Ok(()) };
    let what = format!("its examples differ in shape or classes from those of {}", sources[0]);
    let hint = "all that is read together, also by --val-data, must be of one data set";
    Err(ReadError::new(sources[other], what, hint))
}

/// The names in a directory, in their order. One that is not UTF-8 is an error: it could not be told to other peers.
pub(super) fn sorted_names(dir: &Path) -> Result<Vec<String>, ReadError> {
    let failed = |error: io::Error| ReadError::io(dir, &error);
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let utf8 = |name: std::ffi::OsString| {
            ReadError::new(dir.join(name).display(), "the name is not UTF-8", "give it another name")
        };
        names.push(name.into_string().map_err(utf8)?);
    }
    names.sort();
    Ok(names)
}

/// Whether `name` is of a pattern in which `*` stands for anything and `?` for one character.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    // reached[j]: the pattern so far matches the first j characters.
    let mut reached = vec![false; name.len() + 1];
    reached[0] = true;
    for part in pattern {
        let mut next = vec![false; name.len() + 1];
        for j in 0..=name.len() {
            next[j] = match part {
                '*' => reached[j] || j > 0 && next[j - 1],
                _ => j > 0 && reached[j - 1] && (part == '?' || part == name[j - 1]),
            };
        }
        reached = next;
    }
    reached[name.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_a_scheme_and_a_path() {
        for text in ["digits", "idx:a/b", "csv:C:\\x.csv", "images:x", "text:x", "csv:data/*.csv"] {
            assert_eq!(Source::parse(text).unwrap().to_string(), text);
        }
        for text in ["", "digit", "csv", "csv:", "parquet:x", "a.csv"] {
            assert_eq!(Source::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_pattern_stands_for_the_files_of_its_names_in_order() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.csv", "a.csv", "a.txt", ".c.csv", "ab.csv"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let expand = |name: &str| {
            let found = Source::Csv(dir.path().join(name)).expand()?;
            Ok::<_, ReadError>(
                found.iter().map(|s| s.path().unwrap().file_name().unwrap().to_owned()).collect::<Vec<_>>(),
            )
        };
        assert_eq!(expand("*.csv").unwrap(), ["a.csv", "ab.csv", "b.csv"]);
        assert_eq!(expand("?.csv").unwrap(), ["a.csv", "b.csv"]);
        assert_eq!(expand("a*").unwrap(), ["a.csv", "a.txt", "ab.csv"]);
        assert_eq!(expand("none.csv").unwrap(), ["none.csv"]);
        assert!(expand("*.parquet").unwrap_err().to_string().ends_with("no file has a name of this pattern"));
    }

    #[test]
    fn what_is_held_out_is_of_the_same_kind() {
        let error = Source::Digits.read(Some(&Source::Text("x".into())), &ReadOptions::default()).unwrap_err();
        assert_eq!(error.to_string(), "text:x: it is held out from digits, which is of another kind");
        let both = Source::Digits.read(Some(&Source::Digits), &ReadOptions::default()).unwrap();
        assert_eq!(both.held_out.map(Train::Whole), Some(both.train));
    }
}
