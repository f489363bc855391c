//! Closed sets of choices whose members have one lower-case name each: in files, on the command line, in logs.

/// A text that names no member of a set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is not a known {what}: use {}", names.join(" or "))]
pub struct UnknownName {
    /// What was to be named, such as `optimizer`: the configuration's key.
    pub what: &'static str,
    /// What was given, cut after 64 characters.
    pub given: String,
    /// The names that are valid.
    pub names: &'static [&'static str],
}

impl UnknownName {
    pub(super) fn new(what: &'static str, given: &str, names: &'static [&'static str]) -> Self {
        Self { what, given: given.chars().take(64).collect(), names }
    }
}

/// Gives an enum its names. With `#[serde(try_from = "String", into = "String")]` they are its serialised form too,
/// and a configuration file's error lists the valid ones.
macro_rules! named {
    ($set:ident, $what:literal, $($member:ident => $name:literal),+) => {
        impl $set {
            /// Every member, in the order of [`NAMES`](Self::NAMES).
            pub const ALL: &'static [Self] = &[$(Self::$member),+];
            /// Every member's name.
            pub const NAMES: &'static [&'static str] = &[$($name),+];

            /// The name in files, on the command line and in logs.
            pub fn name(self) -> &'static str {
                match self { $(Self::$member => $name),+ }
            }
        }

        impl std::str::FromStr for $set {
            type Err = $crate::training::named::UnknownName;
            fn from_str(name: &str) -> Result<Self, Self::Err> {
                match name {
                    $($name => Ok(Self::$member),)+
                    _ => Err($crate::training::named::UnknownName::new($what, name, Self::NAMES)),
                }
            }
        }

        impl TryFrom<String> for $set {
            type Error = $crate::training::named::UnknownName;
            fn try_from(name: String) -> Result<Self, Self::Error> {
                name.parse()
            }
        }

        impl From<$set> for String {
            fn from(member: $set) -> Self {
                member.name().to_owned()
            }
        }

        impl std::fmt::Display for $set {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.name())
            }
        }
    };
}
pub(super) use named;
