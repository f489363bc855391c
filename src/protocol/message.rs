//! What crosses the wire, and the limits on it.
//!
//! Every message is `postcard(Envelope)`; only a chunk's bytes follow theirs. Decoding is total: whatever arrives,
//! the result is an envelope within the limits or a [`MessageError`].

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::aggregation::statistics::SUMMARY_BYTES_MAX;
use crate::aggregation::{STEP_SUMS, Share};
use crate::protocol::decree::{Contributor, Decree, STANDBYS_MAX};
use crate::protocol::roster::{ROSTER_MAX, Roster};
use crate::transfer::{CHUNK_BYTES_MAX, ChunkSet, Manifest};
use crate::types::{Address, Digest, Incarnation, Metrics, PeerId, Round, Term};

/// The protocol's version: the first number of every message. Whatever the version, the sender's name follows it.
pub const VERSION: u16 = 6;

/// The longest message without a chunk, in bytes: a decree of a full roster fits.
pub const CONTROL_BYTES_MAX: usize = 4 * 1024 * 1024;

/// The longest header of a chunk, in bytes.
pub const CHUNK_HEADER_BYTES_MAX: usize = 256;

/// The most keys of a shared configuration.
pub const ENTRIES_MAX: usize = 256;

/// The longest text that a peer shows of another's, in bytes.
pub const TEXT_BYTES_MAX: usize = 1024;

/// One message: who says what of which (round, term).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Envelope {
    /// [`VERSION`].
    pub version: u16,
    /// Who says it.
    pub sender: PeerId,
    /// Reserved for a signature over the rest; empty in this version.
    pub signature: Vec<u8>,
    /// The round it belongs to.
    pub round: Round,
    /// The term it belongs to.
    pub term: Term,
    /// What is said.
    pub body: Body,
}

/// What is said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Body {
    /// I am here (on `init`).
    Hello(Hello),
    /// I leave; also the last will (on `init`).
    Goodbye,
    /// Genesis: join this first roster (on `leader/0`). The term counts the candidate's calls.
    Call {
        /// The roster called for.
        roster: Roster,
        /// Candidates that joined, and so gave up their own calls up to this one: who joined those is free.
        released: Vec<(PeerId, Term)>,
    },
    /// Genesis: I join (on `election/0/<candidate>`).
    Join {
        /// The sender's own last call, which it gives up.
        gave_up: Term,
        /// What the sender's inputs are like, encoded: see [`statistics`](crate::aggregation::statistics).
        summary: Bytes,
    },
    /// Genesis: I cannot join, since I joined this call of another candidate (on `election/0/<candidate>`).
    Bound {
        /// Whose call.
        candidate: PeerId,
        /// Which of its calls.
        call: Term,
    },
    /// Genesis: this is the first roster (on `leader/0`).
    Founded {
        /// The roster.
        roster: Roster,
        /// What the inputs of all its members are like, encoded.
        summary: Bytes,
    },
    /// My vote in (round, term) for `candidate` (on `election/<round>/<candidate>`).
    Ballot {
        /// Whom it is for.
        candidate: PeerId,
        /// What I accepted in this round, and in which term.
        accepted: Option<(Term, Decree)>,
    },
    /// How the parent model does on my held-out data (on `election/<round>/<candidate>`).
    Evaluation(Metrics),
    /// I lead (on `leader/<round>`); repeated as the leader's heartbeat.
    Leader(Leading),
    /// What this round shall decide (on `leader/<round>`).
    Proposal(Decree),
    /// My update is ready to be pulled (on `report/<leader>`).
    Update(Update),
    /// Nothing new, but I am alive (on `report/<leader>`).
    Status,
    /// No update will come from me this round (on `report/<leader>`).
    Decline {
        /// Why, as a sentence.
        why: String,
    },
    /// I hold this decree and its model, for good (on `report/<leader>`).
    Accept {
        /// The decree.
        decree: Digest,
    },
    /// I promised a higher term (on `report/<leader>`).
    Refuse {
        /// The term promised.
        promised: Term,
    },
    /// Send me these chunks (on `grant/<holder>`).
    Grant {
        /// Of which blob.
        blob: Digest,
        /// Which of its chunks.
        chunks: ChunkSet,
    },
    /// A chunk, whose bytes follow the envelope (on `weights/…`).
    Chunk {
        /// Of which blob.
        blob: Digest,
        /// Which chunk.
        index: u32,
    },
    /// The newest decree I know to be committed (on `head`).
    Head(Head),
}

/// What peers tell each other when they meet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// Which one of its name the peer is.
    pub incarnation: Incarnation,
    /// The shared configuration, by key, as text: a peer whose differs is told which key.
    pub entries: BTreeMap<String, String>,
    /// The layout of the model, once the peer knows it: what all founders' inputs are like may decide it.
    pub layout: Option<Digest>,
    /// How many training examples the peer has.
    pub num_examples: u64,
    /// The peer's newest decree: its round and digest.
    pub head: Option<(Round, Digest)>,
    /// The federation it belongs to: the digest of the genesis decree.
    pub genesis: Option<Digest>,
    /// It has the last decree and the last model: nobody need stay for it.
    pub done: bool,
    /// How many the peer has said before this one, since it started: it knows it again when the broker sends it back.
    pub number: u32,
    /// How long a message took of late, at most, to the broker and back on the peer's line, in milliseconds.
    pub lag_ms: u32,
    /// Where others reach the broker that the peer hosts, if it hosts one.
    pub broker: Option<Address>,
}

impl Hello {
    /// Names the peer's configuration and layout: peers of one group can train together.
    pub fn group(&self) -> Digest {
        let entries = self.entries.iter().map(|(key, value)| format!("{key}={value}\n")).collect::<String>();
        Digest::of(format!("{entries}{:?}", self.layout).as_bytes())
    }
}

/// What a leader tells in each heartbeat.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Leading {
    /// Whose ballots elected it, so that anyone can recount.
    pub ballots: Vec<PeerId>,
    /// What the leader has of each member, in roster order (see [`has`]): a member sends again what is lacking.
    pub has: Vec<u8>,
    /// The parent model's metrics, once every live member reported.
    pub parent_metrics: Option<Metrics>,
    /// The new model, once it is made. While the leader makes it durable, to propose it then, members pull it.
    pub upcoming: Option<Manifest>,
}

/// Bits of [`Leading::has`].
pub mod has {
    /// The member's evaluation.
    pub const EVALUATION: u8 = 1;
    /// The member's update manifest, or its word that none will come.
    pub const UPDATE: u8 = 2;
}

/// A trainer's update, ready to be pulled.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Update {
    /// The digest of the decree whose model it was trained from.
    pub parent: Digest,
    /// The blob.
    pub manifest: Manifest,
    /// How many examples it was trained on.
    pub num_examples: u64,
    /// How far the local steps went: see [`Share::step_sum`](crate::aggregation::Share::step_sum).
    pub step_sum: f64,
    /// How training went.
    pub metrics: Metrics,
}

impl Update {
    /// What it says of itself.
    pub fn share(&self) -> Share {
        Share { num_examples: self.num_examples, step_sum: self.step_sum }
    }

    /// What a decree says of it.
    pub fn contribution_of(&self, peer: &PeerId) -> Contributor {
        let Self { manifest, num_examples, step_sum, metrics, .. } = *self;
        Contributor { peer: peer.clone(), update: manifest.digest, num_examples, step_sum, metrics }
    }
}

/// A committed decree and who holds it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Head {
    /// The decree.
    pub decree: Decree,
    /// The members whose accepts committed it: holders of its model.
    pub accepts: Vec<PeerId>,
    /// The federation: the digest of the genesis decree.
    pub genesis: Digest,
}

/// Bytes that are no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Another version of the protocol.
    #[error("it speaks version {version} of the protocol, this peer {VERSION}: run the same rodizio everywhere")]
    Version {
        /// Which.
        version: u16,
        /// Whose message it is, if that can be read.
        sender: Option<PeerId>,
    },
    /// Not the encoding of an envelope.
    #[error("it is not a message of this protocol")]
    Malformed,
    /// Longer than any message may be.
    #[error("it has {0} bytes, more than a message may have")]
    TooLong(usize),
    /// A part is beyond its limit.
    #[error("{0} is beyond its limit")]
    Limit(&'static str),
}

impl Envelope {
    /// The bytes of the message; a chunk's own bytes are to follow.
    pub fn encode(&self) -> Bytes {
        postcard::to_stdvec(self).expect("an envelope holds nothing that postcard refuses").into()
    }

    /// Reads a message; the second part is a chunk's bytes, a slice of `message`, and else empty.
    pub fn decode(message: &Bytes) -> Result<(Envelope, Bytes), MessageError> {
        if message.len() > CHUNK_BYTES_MAX as usize + CHUNK_HEADER_BYTES_MAX {
            return Err(MessageError::TooLong(message.len()));
        }
        // The version first: what follows the sender may look like anything in another.
        let (version, rest) = postcard::take_from_bytes::<u16>(message).map_err(|_| MessageError::Malformed)?;
        if version != VERSION {
            let sender = postcard::take_from_bytes(rest).ok().map(|(sender, _)| sender);
            return Err(MessageError::Version { version, sender });
        }
        // A chunk's bytes lie behind its header and are not looked at; nothing else may be longer than control is.
        let head = &message[..message.len().min(CONTROL_BYTES_MAX)];
        let (envelope, rest) = postcard::take_from_bytes::<Envelope>(head).map_err(|_| MessageError::Malformed)?;
        let tail = message.slice(head.len() - rest.len()..);
        let is_chunk = matches!(envelope.body, Body::Chunk { .. });
        if !is_chunk && !tail.is_empty() {
            return Err(MessageError::Malformed);
        }
        envelope.check()?;
        Ok((envelope, tail))
    }

    fn check(&self) -> Result<(), MessageError> {
        let limit = |within: bool, what| if within { Ok(()) } else { Err(MessageError::Limit(what)) };
        limit(self.signature.is_empty(), "the signature")?;
        limit(self.round <= Round::MAX, "the round")?;
        match &self.body {
            Body::Hello(hello) => {
                limit(hello.entries.len() <= ENTRIES_MAX, "the number of configuration keys")?;
                let short = |text: &String| text.len() <= TEXT_BYTES_MAX;
                limit(hello.entries.iter().all(|(key, value)| short(key) && short(value)), "a configuration value")
            }
            Body::Join { summary, .. } | Body::Founded { summary, .. } => {
                limit(summary.len() <= SUMMARY_BYTES_MAX, "the summary of the inputs")
            }
            Body::Call { released, .. } => limit(released.len() <= ROSTER_MAX, "the list of calls given up"),
            Body::Ballot { accepted: Some((_, decree)), .. } | Body::Proposal(decree) => check_decree(decree),
            Body::Evaluation(metrics) => limit(metrics.is_finite(), "a metric"),
            Body::Update(update) => {
                limit(STEP_SUMS.contains(&update.step_sum), "the sum of local steps")?;
                limit(update.metrics.is_finite(), "a metric")
            }
            Body::Leader(leading) => {
                let short = leading.ballots.len() <= ROSTER_MAX && leading.has.len() <= ROSTER_MAX;
                limit(short, "the list of ballots")?;
                limit(leading.parent_metrics.is_none_or(|metrics| metrics.is_finite()), "a metric")
            }
            Body::Decline { why } => limit(why.len() <= TEXT_BYTES_MAX, "the reason"),
            Body::Head(head) => {
                limit(head.accepts.len() <= ROSTER_MAX, "the list of accepts")?;
                check_decree(&head.decree)
            }
            _ => Ok(()),
        }
    }
}

fn check_decree(decree: &Decree) -> Result<(), MessageError> {
    if decree.round > Round::MAX {
        return Err(MessageError::Limit("the round"));
    }
    if decree.contributors.len() > ROSTER_MAX {
        return Err(MessageError::Limit("the list of contributors"));
    }
    if decree.summary.len() > SUMMARY_BYTES_MAX {
        return Err(MessageError::Limit("the summary of the inputs"));
    }
    if decree.standbys.len() > STANDBYS_MAX {
        return Err(MessageError::Limit("the number of standby brokers"));
    }
    let measured = decree.parent_metrics.iter().chain(decree.contributors.iter().map(|part| &part.metrics));
    if !decree.contributors.iter().all(|part| STEP_SUMS.contains(&part.step_sum)) {
        return Err(MessageError::Limit("the sum of local steps"));
    }
    if !measured.into_iter().all(Metrics::is_finite)
        || decree.record.reference.is_some_and(|(loss, _)| !loss.is_finite())
    {
        return Err(MessageError::Limit("a metric"));
    }
    Ok(())
}

/// Cuts a text for the wire at [`TEXT_BYTES_MAX`].
pub(super) fn clip(mut text: String) -> String {
    let end = text.floor_char_boundary(TEXT_BYTES_MAX.min(text.len()));
    text.truncate(end);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envelope(body: Body) -> Envelope {
        let sender = PeerId::new("a").unwrap();
        Envelope { version: VERSION, sender, signature: vec![], round: Round(1), term: Term(2), body }
    }

    #[test]
    fn a_chunk_is_a_slice_of_its_message() {
        let header = envelope(Body::Chunk { blob: Digest::of(b"x"), index: 3 });
        let message = Bytes::from([&header.encode()[..], b"weights"].concat());
        let (decoded, tail) = Envelope::decode(&message).unwrap();
        assert_eq!((decoded, &tail[..]), (header, &b"weights"[..]));
        assert_eq!(tail.as_ptr(), message[message.len() - 7..].as_ptr());
    }

    #[test]
    fn bytes_behind_any_other_message_are_refused() {
        let message = Bytes::from([&envelope(Body::Goodbye).encode()[..], b"!"].concat());
        assert_eq!(Envelope::decode(&message), Err(MessageError::Malformed));
    }

    #[test]
    fn another_version_is_named_and_so_is_who_speaks_it() {
        let message = Envelope { version: 9, ..envelope(Body::Goodbye) }.encode();
        let sender = PeerId::new("a").ok();
        assert_eq!(Envelope::decode(&message), Err(MessageError::Version { version: 9, sender }));
        assert_eq!(Envelope::decode(&message.slice(..1)), Err(MessageError::Version { version: 9, sender: None }));
    }

    #[test]
    fn what_is_beyond_a_limit_is_named() {
        let bad = Metrics { num_examples: 1, loss: f64::NAN, ..Metrics::default() };
        let message = envelope(Body::Evaluation(bad)).encode();
        assert_eq!(Envelope::decode(&message), Err(MessageError::Limit("a metric")));
    }

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        assert_eq!(clip("é".repeat(TEXT_BYTES_MAX)).len(), TEXT_BYTES_MAX);
        assert_eq!(clip("short".into()), "short");
    }
}
