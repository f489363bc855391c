//! A text, character by character: at each place the next character is to be told.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use super::source::{ReadError, ReadOptions};
use super::{Dataset, Targets};

/// Printable ASCII. With the line break and one class for all other characters the vocabulary is the same at every peer,
/// whatever its own text holds.
const ASCII: std::ops::RangeInclusive<char> = ' '..='~';

/// What stands in the vocabulary for all characters that are not in it.
const OTHER: &str = "other";

/// The longest text, in bytes.
const BYTES_MAX: u64 = 1 << 30;

/// Reads a text and cuts it into windows, one behind the other: features are the numbers of the characters, targets those
/// of the characters that follow.
pub(super) fn read(path: &Path, options: &ReadOptions) -> Result<Dataset, ReadError> {
    let io = |error| ReadError::io(path, &error);
    let len = fs::metadata(path).map_err(io)?.len();
    if len > BYTES_MAX {
        let what = format!("it has {len} bytes, more than {BYTES_MAX}");
        return Err(ReadError::new(path.display(), what, "use a part of the text"));
    }
    let text = String::from_utf8(fs::read(path).map_err(io)?).map_err(|error| {
        let what = format!("byte {} is not UTF-8", error.utf8_error().valid_up_to());
        ReadError::new(path.display(), what, "convert the text to UTF-8, as with iconv")
    })?;
    let vocabulary = vocabulary(&options.characters);
    let known: std::collections::BTreeMap<char, u32> = vocabulary.iter().copied().zip(0..).collect();
    let tokens: Vec<u32> = text
        .trim_start_matches('\u{feff}')
        .chars()
        .filter(|&character| character != '\r')
        .map(|character| known.get(&character).copied().unwrap_or(vocabulary.len() as u32))
        .collect();
    let window = options.window;
    let examples = tokens.len().saturating_sub(1) / window;
    if examples < 2 {
        let what = format!("its {} characters do not make two examples of {window}", tokens.len());
        return Err(ReadError::new(path.display(), what, "use a longer text, or a smaller --window"));
    }
    let features = tokens[..examples * window].iter().map(|&token| token as f32).collect();
    let labels = tokens[1..=examples * window].to_vec();
    let names: Arc<[String]> = vocabulary.iter().map(char::to_string).chain([OTHER.to_owned()]).collect();
    Dataset::of(features, &[window], Targets::Steps { labels, names })
        .map_err(|error| ReadError::new(path.display(), error.to_string(), "report it as a bug"))
}

fn vocabulary(characters: &str) -> Vec<char> {
    let mut all: Vec<char> = ASCII.chain(['\n']).collect();
    for character in characters.chars() {
        if !all.contains(&character) {
            all.push(character);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::Task;

    fn read_text(bytes: &[u8], options: &ReadOptions) -> Result<Dataset, ReadError> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.txt"), bytes).unwrap();
        read(&dir.path().join("a.txt"), options)
    }

    #[test]
    fn each_character_is_to_be_followed_by_the_next() {
        let options = ReadOptions { window: 3, characters: "é".into(), ..ReadOptions::default() };
        let data = read_text("ab\r\né cδ!".as_bytes(), &options).unwrap();
        assert_eq!((data.shape(), data.len(), data.task()), (&[3][..], 2, Task::Steps(98)));
        let token = |character: char| (u32::from(character) - 32) as f32;
        assert_eq!(data.features(), [token('a'), token('b'), 95.0, 96.0, token(' '), token('c')]);
        let Targets::Steps { labels, names } = data.targets() else { panic!("no steps") };
        assert_eq!(labels, &[66, 95, 96, 0, 67, 97]);
        assert_eq!((names[95].as_str(), names[97].as_str()), ("\n", OTHER));
    }

    #[test]
    fn a_text_that_cannot_be_used_says_why() {
        let options = ReadOptions::default();
        assert!(
            read_text(b"short", &options)
                .unwrap_err()
                .to_string()
                .ends_with("5 characters do not make two examples of 64")
        );
        assert!(read_text(b"", &options).is_err());
        assert!(read_text(b"ab\xff", &options).unwrap_err().to_string().ends_with("byte 2 is not UTF-8"));
    }
}
