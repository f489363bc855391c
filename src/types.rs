//! The words that every floor uses: who ([`PeerId`], [`Incarnation`]), when ([`Round`], [`Term`]), what ([`Digest`]),
//! how well ([`Metrics`]) and where ([`Address`]).

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// What a [name](is_name) is, in words.
pub const NAME_RULE: &str = "1 to 64 of A-Z a-z 0-9 - _ . with no dot first";

/// Whether a text can be one level of a topic and the name of a directory: [`NAME_RULE`]. A dot first would hide the directory,
/// or make it another one.
pub fn is_name(text: &str) -> bool {
    (1..=PEER_ID_BYTES_MAX).contains(&text.len())
        && !text.starts_with('.')
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

/// The longest [`PeerId`], in bytes: it is one level of every topic.
pub const PEER_ID_BYTES_MAX: usize = 64;

/// A peer's name: one level of an MQTT topic, stable over restarts (it is kept in the state directory).
///
/// A [name](is_name); the word `all` is taken by the topic for every receiver.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PeerId(Arc<str>);

/// A text that cannot be a [`PeerId`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("peer id {0:?} is not {NAME_RULE} (and not the reserved word \"all\")")]
pub struct PeerIdError(String);

impl PeerId {
    /// Checks `name` and takes it as an id.
    pub fn new(name: &str) -> Result<Self, PeerIdError> {
        if is_name(name) && name != "all" {
            Ok(Self(name.into()))
        } else {
            Err(PeerIdError(name.chars().take(2 * PEER_ID_BYTES_MAX).collect()))
        }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Which one of all that ever had a peer's name: a random number, drawn when its state directory was made and kept in it.
///
/// A peer whose state directory is lost has forgotten its promises. Under its old name it is another one, which is no
/// member before a decree admits it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Incarnation(pub u64);

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl TryFrom<String> for PeerId {
    type Error = PeerIdError;
    fn try_from(name: String) -> Result<Self, PeerIdError> {
        Self::new(&name)
    }
}

impl FromStr for PeerId {
    type Err = PeerIdError;
    fn from_str(name: &str) -> Result<Self, PeerIdError> {
        Self::new(name)
    }
}

impl From<PeerId> for String {
    fn from(id: PeerId) -> Self {
        id.0.as_ref().to_owned()
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where others reach a broker: `HOST:PORT`, an IPv6 host in brackets; a definite host, and not port 0.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Address(Arc<str>);

/// A text that cannot be an [`Address`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not HOST:PORT where others can reach a broker")]
pub struct AddressError(String);

/// The longest [`Address`], in bytes: a name of the domain name system, a colon and a port.
pub const ADDRESS_BYTES_MAX: usize = 253 + 1 + 5;

impl Address {
    /// Checks `text` and takes it as an address.
    pub fn new(text: &str) -> Result<Self, AddressError> {
        let definite = |(host, port): (&str, u16)| port > 0 && !["0.0.0.0", "[::]"].contains(&host);
        let valid = text.len() <= ADDRESS_BYTES_MAX && host_and_port(text).is_some_and(definite);
        if valid { Ok(Self(text.into())) } else { Err(AddressError(text.chars().take(ADDRESS_BYTES_MAX).collect())) }
    }

    /// The address as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Address {
    type Error = AddressError;
    fn try_from(text: String) -> Result<Self, AddressError> {
        Self::new(&text)
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.0.as_ref().to_owned()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The parts of `HOST:PORT`. An IPv6 host is in brackets, so the last colon is always the port's.
pub fn host_and_port(text: &str) -> Option<(&str, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let inside = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let good = match inside {
        Some(ip) => ip.parse::<core::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)),
    };
    Some((host, port.parse().ok().filter(|_| good)?))
}

/// One turn of evaluate, elect, train, gather, aggregate, commit; counted from 1. Round 0 is the genesis.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Round(pub u64);

impl Round {
    /// The round whose decree holds the initial weights.
    pub const GENESIS: Round = Round(0);

    /// The last one that a message may speak of: there is always a next.
    pub const MAX: Round = Round(u64::MAX / 2);

    /// The round after this one.
    #[must_use]
    pub fn next(self) -> Round {
        Round(self.0 + 1)
    }
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{}", self.0)
    }
}

/// One leadership attempt inside a round, counted from 0: the ballot number of single-decree Paxos.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Term(pub u32);

impl Term {
    /// The term after this one.
    #[must_use]
    pub fn next(self) -> Term {
        Term(self.0.saturating_add(1))
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "t{}", self.0)
    }
}

/// A blake3 hash (32 bytes): the name of a blob, a decree, a layout or a configuration.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The first 8 hexadecimal digits, for people.
    pub fn short(&self) -> String {
        self.to_string()[..8].to_owned()
    }

    /// 64 bits that all peers who know this digest share: the seed of agreed choices.
    pub fn shared_seed(&self) -> u64 {
        let (first, _) = self.0.split_first_chunk::<8>().expect("a digest has 32 bytes");
        u64::from_le_bytes(*first)
    }
}

/// A text that is not 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a digest is 64 hexadecimal digits")]
pub struct DigestError;

impl FromStr for Digest {
    type Err = DigestError;
    fn from_str(text: &str) -> Result<Self, DigestError> {
        let hash = blake3::Hash::from_hex(text).map_err(|_| DigestError)?;
        Ok(Self(*hash.as_bytes()))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.short())
    }
}

/// What a model tells of its examples, and so which metrics mean anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measured {
    /// A class of each example: loss and accuracy, macro F1, and with two classes the AUC.
    #[default]
    Classes,
    /// A number of each example: the loss is the mean squared error.
    Numbers,
    /// A class of each step of each example, such as the next character: loss and accuracy are means over steps.
    Steps,
}

/// How well a model does on some examples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// What was measured.
    pub measured: Measured,
    /// How many examples the means are taken over.
    pub num_examples: u64,
    /// Mean loss: cross-entropy in nats, or squared error.
    pub loss: f64,
    /// Share of labels that were predicted, 0 to 1; 0 where the targets are numbers.
    pub accuracy: f64,
    /// Mean F1 of all classes, 0 to 1.
    pub macro_f1: Option<f64>,
    /// With two classes, both of them there: the area under the receiver operating characteristic, 0 to 1.
    pub auc: Option<f64>,
}

impl Metrics {
    /// The mean of several peers' metrics, each weighted by its `num_examples`. Macro F1 and AUC, which are not means over
    /// examples, are those of the whole only as nearly as the peers' examples are alike.
    ///
    /// `None` when there is no example at all. Sums run in the order given: a caller that wants the same
    /// bits on every machine gives the same order.
    pub fn weighted_mean<'a>(parts: impl IntoIterator<Item = &'a Metrics>) -> Option<Metrics> {
        let (mut measured, mut num_examples) = (Measured::default(), 0u64);
        let [mut loss, mut accuracy, mut macro_f1, mut auc] = [Mean::default(); 4];
        for part in parts.into_iter().filter(|part| part.num_examples > 0) {
            measured = part.measured;
            num_examples = num_examples.saturating_add(part.num_examples);
            let weight = part.num_examples as f64;
            loss.add(Some(part.loss), weight);
            accuracy.add(Some(part.accuracy), weight);
            macro_f1.add(part.macro_f1, weight);
            auc.add(part.auc, weight);
        }
        let (loss, accuracy) = (loss.value()?, accuracy.value()?);
        Some(Metrics { measured, num_examples, loss, accuracy, macro_f1: macro_f1.value(), auc: auc.value() })
    }

    /// Whether all values are finite: what a peer reports may be anything.
    pub fn is_finite(&self) -> bool {
        [Some(self.loss), Some(self.accuracy), self.macro_f1, self.auc].into_iter().flatten().all(f64::is_finite)
    }

    /// The accuracy, where the targets are classes.
    pub fn known_accuracy(&self) -> Option<f64> {
        (self.measured != Measured::Numbers).then_some(self.accuracy)
    }

    /// The root of the mean squared error, in the unit of the targets, where those are numbers.
    pub fn rmse(&self) -> Option<f64> {
        (self.measured == Measured::Numbers).then(|| self.loss.max(0.0).sqrt())
    }

    /// Between how many classes the model is torn at each step, in the mean, where it tells classes of steps.
    pub fn perplexity(&self) -> Option<f64> {
        (self.measured == Measured::Steps).then(|| self.loss.exp())
    }
}

/// A weighted mean of what some have.
#[derive(Clone, Copy, Default)]
struct Mean {
    sum: f64,
    weight: f64,
}

impl Mean {
    fn add(&mut self, value: Option<f64>, weight: f64) {
        if let Some(value) = value {
            self.sum += value * weight;
            self.weight += weight;
        }
    }

    fn value(self) -> Option<f64> {
        (self.weight > 0.0).then(|| self.sum / self.weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_id_is_one_topic_level() {
        for good in ["a", "peer-1", "ward_3.lab", &"x".repeat(64)] {
            assert_eq!(PeerId::new(good).unwrap().as_str(), good);
        }
        for bad in ["", "all", ".", "..", ".a", "a/b", "a+b", "#", "$x", "é", "a b", &"x".repeat(65)] {
            assert!(PeerId::new(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn an_address_is_where_others_reach_a_broker() {
        for good in ["ward-3:1883", "192.168.1.20:1", "[2001:db8::1]:1883", &format!("{}:65535", "x".repeat(253))] {
            assert_eq!(Address::new(good).unwrap().as_str(), good);
        }
        let long = format!("{}:65535", "x".repeat(254));
        for bad in ["", "a", "a:0", ":1", "0.0.0.0:1", "[::]:1", "::1:1", "a b:1", "a:65536", "mqtt://a:1", &long] {
            assert!(Address::new(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn a_digest_survives_its_text() {
        let digest = Digest::of(b"rodizio");
        assert_eq!(digest.to_string().parse::<Digest>(), Ok(digest));
        assert_eq!("12".parse::<Digest>(), Err(DigestError));
    }

    #[test]
    fn metrics_are_weighted_by_examples() {
        let small = Metrics { num_examples: 1, loss: 4.0, accuracy: 0.0, macro_f1: Some(0.2), ..Metrics::default() };
        let large = Metrics { num_examples: 3, loss: 0.0, accuracy: 1.0, macro_f1: Some(1.0), ..small };
        let none = Metrics::default();
        let mean = Metrics::weighted_mean([&small, &none, &large]).unwrap();
        assert_eq!(mean, Metrics { num_examples: 4, loss: 1.0, accuracy: 0.75, macro_f1: Some(0.8), ..none });
        let one_sided = Metrics { auc: Some(0.5), ..small };
        assert_eq!(Metrics::weighted_mean([&one_sided, &large]).unwrap().auc, Some(0.5));
        assert_eq!(Metrics::weighted_mean([]), None);
    }
}
