//! Values of keys: from text, which every layer gives, and back to text, TOML and JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::training::Source;
use crate::types::{Address, NAME_RULE, PeerId, host_and_port, is_name};

/// One of the equal claims to a data set that is split among peers: the `index`-th of `of`, counted from 1. Its text is
/// `index/of`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Which, from 1 to `of`.
    pub index: usize,
    /// Among how many.
    pub of: usize,
}

/// What values a key takes. Its `Display` says so in words.
#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    /// A whole number in a range, both ends allowed.
    Count {
        /// The smallest.
        min: u64,
        /// The largest.
        max: u64,
    },
    /// A finite number.
    Real(Reals),
    /// `true` or `false`.
    Switch,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// One of these words, the last of which takes a peer: `fixed:NAME`.
    Policy(&'static [&'static str]),
    /// A list of positive whole numbers, which may be empty.
    Counts {
        /// The largest number.
        max: u64,
        /// The longest list.
        len_max: usize,
    },
    /// A span of time.
    Duration {
        /// The shortest, in milliseconds.
        min_ms: u64,
        /// The longest, in milliseconds.
        max_ms: u64,
    },
    /// A number of bytes.
    Size {
        /// The fewest.
        min: u64,
        /// The most.
        max: u64,
    },
    /// A data set, as [`Source::parse`] takes it.
    Data,
    /// Any text that is not empty.
    Text,
    /// Texts separated by commas.
    Names,
    /// The values of columns, as [`categories`] takes them.
    Categories,
    /// One level of a topic.
    Level,
    /// Levels of a topic, separated by `/`.
    Levels {
        /// The most levels.
        len_max: usize,
    },
    /// `HOST:PORT` to listen on.
    Address,
    /// An [`Address`].
    Reachable,
    /// A list of `HOST:PORT`, not empty; port 0 is refused.
    Addresses {
        /// The longest list.
        len_max: usize,
    },
    /// A [`PeerId`].
    Peer,
    /// A [`Part`].
    Part,
    /// A path.
    Path,
}

/// Sets of finite numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reals {
    /// Above 0.
    Positive,
    /// 0 or above.
    NotNegative,
    /// 0 to 1, both allowed.
    Share,
    /// 0 to 1, 1 not allowed.
    ShareBelowOne,
    /// 0 to 1, neither allowed.
    Between,
    /// 0 to 1, 0 not allowed.
    PositiveShare,
    /// 0 to a half, which is not allowed.
    BelowHalf,
}

/// The value of a key.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Of an optional key that is not set.
    Unset,
    /// Of [`Kind::Count`].
    Count(u64),
    /// Of [`Kind::Real`].
    Real(f64),
    /// Of [`Kind::Switch`].
    Switch(bool),
    /// Of [`Kind::Choice`].
    Choice(&'static str),
    /// Of [`Kind::Counts`].
    Counts(Vec<u64>),
    /// Of [`Kind::Duration`].
    Duration(Duration),
    /// Of [`Kind::Size`], in bytes.
    Size(u64),
    /// Of [`Kind::Policy`], [`Kind::Level`], [`Kind::Levels`], [`Kind::Address`] and
    /// [`Kind::Reachable`].
    Text(String),
    /// Of [`Kind::Addresses`].
    Texts(Vec<String>),
    /// Of [`Kind::Peer`].
    Peer(PeerId),
    /// Of [`Kind::Part`].
    Part(Part),
    /// Of [`Kind::Path`].
    Path(PathBuf),
}

impl Kind {
    /// The value that `text` stands for, if it is one of this kind.
    pub fn parse(&self, text: &str) -> Option<Value> {
        let text = text.trim();
        match *self {
            Kind::Count { min, max } => whole(text, min, max).map(Value::Count),
            Kind::Real(reals) => text.parse().ok().filter(|x| reals.contains(*x)).map(Value::Real),
            Kind::Switch => text.parse().ok().map(Value::Switch),
            Kind::Choice(words) => words.iter().find(|word| **word == text).map(|word| Value::Choice(word)),
            Kind::Policy(words) => is_policy(words, text).then(|| Value::Text(text.into())),
            Kind::Counts { max, len_max } => counts(text, max, len_max).map(Value::Counts),
            Kind::Duration { min_ms, max_ms } => span(text, min_ms, max_ms).map(Value::Duration),
            Kind::Size { min, max } => size(text).filter(|n| (min..=max).contains(n)).map(Value::Size),
            Kind::Data => Source::parse(text).map(|source| Value::Text(source.to_string())),
            Kind::Text => (!text.is_empty()).then(|| Value::Text(text.into())),
            Kind::Names => {
                let names: Vec<String> = text.split(',').map(|name| name.trim().to_owned()).collect();
                names.iter().all(|name| !name.is_empty()).then_some(Value::Texts(names))
            }
            Kind::Categories => categories(text).map(|_| Value::Text(text.into())),
            Kind::Level => is_name(text).then(|| Value::Text(text.into())),
            Kind::Levels { len_max } => {
                let good = text.split('/').count() <= len_max && text.split('/').all(is_name);
                good.then(|| Value::Text(text.into()))
            }
            Kind::Address => host_and_port(text).map(|_| Value::Text(text.into())),
            Kind::Reachable => Address::new(text).ok().map(|_| Value::Text(text.into())),
            Kind::Addresses { len_max } => addresses(text, len_max).map(Value::Texts),
            Kind::Peer => PeerId::new(text).ok().map(Value::Peer),
            Kind::Part => part(text).map(Value::Part),
            Kind::Path => (!text.is_empty()).then(|| Value::Path(text.into())),
        }
    }

    /// The placeholder of a value in a help text.
    pub fn placeholder(&self) -> &'static str {
        match self {
            Kind::Count { .. } => "N",
            Kind::Counts { .. } => "N,N",
            Kind::Real(_) => "X",
            Kind::Switch => "BOOL",
            Kind::Choice(_) => "WORD",
            Kind::Policy(_) => "POLICY",
            Kind::Duration { .. } => "TIME",
            Kind::Size { .. } => "SIZE",
            Kind::Data => "DATA",
            Kind::Text => "TEXT",
            Kind::Names => "NAME,NAME",
            Kind::Categories => "COLUMN=A|B",
            Kind::Level | Kind::Peer => "NAME",
            Kind::Levels { .. } => "TOPIC",
            Kind::Address | Kind::Reachable | Kind::Addresses { .. } => "HOST:PORT",
            Kind::Part => "I/N",
            Kind::Path => "DIR",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Kind::Count { min, max } if max == i64::MAX as u64 => write!(f, "a whole number, {min} or more"),
            Kind::Count { min, max } => write!(f, "a whole number, {min} to {max}"),
            Kind::Real(reals) => f.write_str(reals.words()),
            Kind::Switch => f.write_str("true or false"),
            Kind::Choice([only]) => write!(f, "only {only} so far"),
            Kind::Choice(words) => write!(f, "one of {}", words.join(", ")),
            Kind::Policy(words) => write!(f, "one of {}:NAME (NAME: a peer)", words.join(", ")),
            Kind::Counts { max, len_max } => {
                write!(f, "up to {len_max} whole numbers from 1 to {max}, separated by commas, or none")
            }
            Kind::Duration { min_ms, max_ms } => {
                write!(f, "a time from {} to {}, like 500ms, 30s or 5m", time_text(min_ms), time_text(max_ms))
            }
            Kind::Size { min, max } => {
                write!(f, "a size from {} to {}, like 256KiB, 1MB or 65536", size_text(min), size_text(max))
            }
            Kind::Data => f.write_str(Source::SCHEMES),
            Kind::Text => f.write_str("a text that is not empty"),
            Kind::Names => f.write_str("names separated by commas"),
            Kind::Categories => {
                f.write_str("columns with their values, like 'sex=f|m; blood=A|B|AB|0', at least two of each")
            }
            Kind::Level => f.write_str(NAME_RULE),
            Kind::Levels { len_max } => write!(f, "up to {len_max} parts separated by /, each {NAME_RULE}"),
            Kind::Address => f.write_str("HOST:PORT, like 0.0.0.0:1883 or [::]:1883"),
            Kind::Reachable => f.write_str("HOST:PORT as others reach it, like 192.168.1.20:1883"),
            Kind::Addresses { len_max } => {
                write!(f, "up to {len_max} of HOST:PORT, separated by commas, like 192.168.1.20:1883")
            }
            Kind::Peer => write!(f, "{NAME_RULE} (the words all and none are taken)"),
            Kind::Part => write!(f, "I/N, like 2/5: 1 to N, N up to {PARTS_MAX}"),
            Kind::Path => f.write_str("a path"),
        }
    }
}

impl Reals {
    /// Whether `x` is finite and in the set.
    pub fn contains(self, x: f64) -> bool {
        x.is_finite()
            && match self {
                Reals::Positive => x > 0.0,
                Reals::NotNegative => x >= 0.0,
                Reals::Share => (0.0..=1.0).contains(&x),
                Reals::ShareBelowOne => (0.0..1.0).contains(&x),
                Reals::Between => x > 0.0 && x < 1.0,
                Reals::PositiveShare => x > 0.0 && x <= 1.0,
                Reals::BelowHalf => (0.0..0.5).contains(&x),
            }
    }

    fn words(self) -> &'static str {
        match self {
            Reals::Positive => "a number above 0",
            Reals::NotNegative => "a number, 0 or above",
            Reals::Share => "a number from 0 to 1",
            Reals::ShareBelowOne => "a number from 0 to below 1",
            Reals::Between => "a number between 0 and 1",
            Reals::PositiveShare => "a number above 0, at most 1",
            Reals::BelowHalf => "a number from 0 to below 0.5",
        }
    }
}

impl Value {
    /// The value as TOML.
    pub fn to_toml(&self) -> String {
        match self {
            Value::Count(_) | Value::Real(_) | Value::Switch(_) => self.to_string(),
            Value::Counts(items) => format!("[{}]", join(items, ", ")),
            Value::Texts(items) => {
                let quoted: Vec<_> = items.iter().map(|item| quote(item)).collect();
                format!("[{}]", quoted.join(", "))
            }
            _ => quote(&self.to_string()),
        }
    }

    /// The value as JSON; unset is `null`, times and sizes are text.
    pub fn to_json(&self) -> serde_json::Value {
        match self {
            Value::Unset => serde_json::Value::Null,
            Value::Count(n) => (*n).into(),
            Value::Real(x) => (*x).into(),
            Value::Switch(on) => (*on).into(),
            Value::Counts(items) => items.clone().into(),
            Value::Texts(items) => items.clone().into(),
            _ => self.to_string().into(),
        }
    }
}

/// The text that [`Kind::parse`] takes.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Unset => f.write_str(crate::config::NONE),
            Value::Count(n) => n.fmt(f),
            Value::Real(x) => x.fmt(f),
            Value::Switch(on) => on.fmt(f),
            Value::Choice(word) => f.write_str(word),
            Value::Counts(items) if items.is_empty() => f.write_str(crate::config::NONE),
            Value::Counts(items) => f.write_str(&join(items, ",")),
            Value::Duration(span) => humantime::format_duration(*span).fmt(f),
            Value::Size(bytes) => f.write_str(&size_text(*bytes)),
            Value::Text(text) => f.write_str(text),
            Value::Texts(items) => f.write_str(&items.join(",")),
            Value::Peer(peer) => peer.fmt(f),
            Value::Part(part) => part.fmt(f),
            Value::Path(path) => path.display().fmt(f),
        }
    }
}

/// All values of each column that `text` lists: columns are separated by `;`, values by `|`, both apart by `=`.
pub fn categories(text: &str) -> Option<BTreeMap<String, Vec<String>>> {
    let mut all = BTreeMap::new();
    for column in text.split(';').map(str::trim).filter(|column| !column.is_empty()) {
        let (name, values) = column.split_once('=')?;
        let values: Vec<String> = values.split('|').map(|value| value.trim().to_owned()).collect();
        let unique: BTreeSet<&String> = values.iter().collect();
        let good = unique.len() == values.len() && values.len() >= 2 && !values.iter().any(String::is_empty);
        if !good || all.insert(name.trim().to_owned(), values).is_some() {
            return None;
        }
    }
    (!all.is_empty()).then_some(all)
}

fn whole(text: &str, min: u64, max: u64) -> Option<u64> {
    text.parse().ok().filter(|n| (min..=max).contains(n))
}

/// More parts than any data set at hand has examples to give.
const PARTS_MAX: usize = 10_000;

fn part(text: &str) -> Option<Part> {
    let (index, of) = text.split_once('/')?;
    let (index, of) = (index.trim().parse().ok()?, of.trim().parse().ok()?);
    (1 <= index && index <= of && of <= PARTS_MAX).then_some(Part { index, of })
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.of)
    }
}

fn counts(text: &str, max: u64, len_max: usize) -> Option<Vec<u64>> {
    if text.is_empty() || text == crate::config::NONE {
        return Some(Vec::new());
    }
    let items: Vec<_> = text.split(',').map(|item| whole(item.trim(), 1, max)).collect::<Option<_>>()?;
    (items.len() <= len_max).then_some(items)
}

/// Whole milliseconds only: that is what peers compare.
fn span(text: &str, min_ms: u64, max_ms: u64) -> Option<Duration> {
    let span = humantime::parse_duration(text).ok()?;
    let in_range = (Duration::from_millis(min_ms)..=Duration::from_millis(max_ms)).contains(&span);
    (in_range && span.subsec_nanos().is_multiple_of(1_000_000)).then_some(span)
}

fn size(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

fn size_text(bytes: u64) -> String {
    match bytes {
        0 => "0".into(),
        n if n.is_multiple_of(1 << 20) => format!("{}MiB", n >> 20),
        n if n.is_multiple_of(1 << 10) => format!("{}KiB", n >> 10),
        n => n.to_string(),
    }
}

fn time_text(millis: u64) -> String {
    humantime::format_duration(Duration::from_millis(millis)).to_string()
}

fn is_policy(words: &[&str], text: &str) -> bool {
    let Some((takes_peer, plain)) = words.split_last() else { return false };
    let named = text.split_once(':').is_some_and(|(word, peer)| word == *takes_peer && PeerId::new(peer).is_ok());
    named || plain.contains(&text)
}

fn addresses(text: &str, len_max: usize) -> Option<Vec<String>> {
    let items: Vec<_> = text.split(',').map(str::trim).collect();
    let good = items.len() <= len_max && items.iter().all(|item| host_and_port(item).is_some_and(|(_, port)| port > 0));
    good.then(|| items.into_iter().map(str::to_owned).collect())
}

fn join(items: &[u64], separator: &str) -> String {
    items.iter().map(u64::to_string).collect::<Vec<_>>().join(separator)
}

fn quote(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn takes(kind: &Kind, good: &[&str], bad: &[&str]) {
        for text in good {
            let value = kind.parse(text).unwrap_or_else(|| panic!("{kind:?} refused {text:?}"));
            assert_eq!(kind.parse(&value.to_string()), Some(value), "{text:?} does not survive its text");
        }
        for text in bad {
            assert_eq!(kind.parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn each_kind_takes_its_values_and_refuses_others() {
        takes(&Kind::Count { min: 1, max: 9 }, &["1", "9", " 3 "], &["0", "10", "-1", "1.5", "", "x"]);
        takes(&Kind::Real(Reals::Share), &["0", "1", "0.95", "1e-3"], &["1.01", "-0.1", "NaN", "inf", ""]);
        takes(&Kind::Real(Reals::Between), &["0.2"], &["0", "1"]);
        takes(&Kind::Real(Reals::PositiveShare), &["0.2", "1"], &["0", "1.1"]);
        takes(&Kind::Real(Reals::BelowHalf), &["0", "0.49"], &["0.5", "-0.1"]);
        takes(&Kind::Real(Reals::ShareBelowOne), &["0", "0.9"], &["1"]);
        takes(&Kind::Real(Reals::Positive), &["1e-7", "3"], &["0", "-1", "inf"]);
        takes(&Kind::Switch, &["true", "false"], &["yes", "1", ""]);
        takes(&Kind::Choice(&["sgd", "adam"]), &["sgd", "adam"], &["SGD", "rmsprop", ""]);
        takes(&Kind::Counts { max: 99, len_max: 2 }, &["64", "64, 32", "none"], &["0", "64,", "1,2,3", "100"]);
        takes(
            &Kind::Duration { min_ms: 50, max_ms: 60_000 },
            &["50ms", "1m", "1s 500ms"],
            &["49ms", "2m", "5", "50500us"],
        );
        takes(&Kind::Level, &["a", "ward-3.lab_x"], &["", "a/b", "a b", "#", "+", "é"]);
        takes(&Kind::Levels { len_max: 2 }, &["a", "a/b"], &["", "a//b", "/a", "a/b/c", "$SYS/#"]);
        takes(&Kind::Peer, &["peer-1"], &["all", "", "a/b"]);
        takes(&Kind::Part, &["1/1", "2/5", "5 / 5"], &["0/5", "6/5", "1", "1/", "/1", "1/10001", "-1/2"]);
        takes(&Kind::Path, &["a b/c"], &[""]);
        takes(&Kind::Data, &["digits", "csv:a b.csv", "idx:x"], &["", "csv:", "digit", "a.csv"]);
        takes(&Kind::Names, &["a", "id, name of it"], &["", "a,", ",a"]);
        takes(&Kind::Categories, &["a=x|y", "a = x | y; b=1|2|3;"], &["", "a", "a=x", "a=x|x", "a=x|", "a=x|y;a=x|y"]);
    }

    #[test]
    fn a_policy_that_names_a_peer_needs_its_name() {
        let kind = Kind::Policy(&["random", "rotate", "fixed"]);
        takes(&kind, &["random", "rotate", "fixed:peer-1"], &["fixed", "fixed:", "fixed:a/b", "random:x", "fastest"]);
    }

    #[test]
    fn sizes_know_both_units() {
        for (text, bytes) in [
            ("65536", 65536),
            ("512KiB", 512 << 10),
            ("1 MB", 1_000_000),
            ("2mib", 2 << 20),
            ("1GB", 1_000_000_000),
            ("1GiB", 1 << 30),
        ] {
            assert_eq!(size(text), Some(bytes), "{text}");
        }
        takes(&Kind::Size { min: 1024, max: 16 << 20 }, &["1024", "1KiB", "16MiB", "1500"], &["1023", "17MiB", "1GiB"]);
        assert_eq!(size("99999999999999999999MiB"), None);
        assert_eq!(size("18446744073709551615MiB"), None);
    }

    #[test]
    fn addresses_need_a_host_and_a_port() {
        let one = Kind::Address;
        takes(
            &one,
            &["a:1883", "127.0.0.1:0", "[::1]:1883"],
            &["a", ":1883", "a:", "a:70000", "::1:1883", "mqtt://a:1"],
        );
        takes(&Kind::Reachable, &["a:1883", "[::1]:1883"], &["a:0", "0.0.0.0:1883", "a"]);
        let list = Kind::Addresses { len_max: 2 };
        takes(&list, &["a:1", "a:1, b:2"], &["", "a:0", "a:1,", "a:1,b:2,c:3"]);
    }

    #[test]
    fn text_is_quoted_for_toml() {
        let path = Value::Path(r#"C:\runs\"x""#.into()).to_toml();
        let parsed: toml::Table = format!("a = {path}").parse().unwrap();
        assert_eq!(parsed["a"].as_str(), Some(r#"C:\runs\"x""#));
    }
}
