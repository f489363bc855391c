//! What comes from the network: every message survives its bytes, and no bytes at all make a peer panic.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use rodizio::protocol::decree::Record;
use rodizio::protocol::message::{Body, Envelope, Head, Hello, Leading, Update, VERSION};
use rodizio::protocol::{
    Action, Config, Contributor, Decree, Durable, Event, Identity, Notice, Outcome, Peer, Reason, Roster,
};
use rodizio::transfer::{ChunkSet, Codec, Manifest};
use rodizio::types::{Address, Digest, Incarnation, Metrics, PeerId, Round, Term};
use rodizio::weights::{Layout, TensorSpec};

/// `cases` cases, the same ones on every run.
fn cases(cases: u32) -> ProptestConfig {
    let rng_seed = RngSeed::Fixed(0x0d12_1021_0000_0002);
    ProptestConfig { cases, rng_seed, failure_persistence: None, ..ProptestConfig::default() }
}

fn peer() -> impl Strategy<Value = PeerId> {
    "[a-d]".prop_map(|name| PeerId::new(&name).unwrap())
}

fn incarnation() -> impl Strategy<Value = Incarnation> {
    (0..3u64).prop_map(Incarnation)
}

fn roster() -> impl Strategy<Value = Roster> {
    prop::collection::btree_map(peer(), incarnation(), 1..5).prop_map(Roster::of)
}

fn digest() -> impl Strategy<Value = Digest> {
    (0..4u8).prop_map(|lot| Digest::of(&[lot]))
}

fn metrics() -> impl Strategy<Value = Metrics> {
    (0..1000u64, 0.0..10.0f64, 0.0..1.0f64).prop_map(|(num_examples, loss, accuracy)| Metrics {
        num_examples,
        loss,
        accuracy,
        macro_f1: (num_examples > 500).then_some(accuracy),
        ..Metrics::default()
    })
}

fn identity(peer: PeerId) -> Identity {
    let (incarnation, layout, summary) = (Incarnation(0), layout(), Bytes::new());
    Identity { peer, incarnation, layout, num_examples: 7, broker: None, summary }
}

/// Of the peer's own layout, so that it is taken for true, or of anything.
fn manifest() -> impl Strategy<Value = Manifest> {
    let bytes = prop_oneof![3 => Just(4000u64), 1 => any::<u64>()];
    let chunk_bytes = prop_oneof![3 => Just(1024u32), 1 => any::<u32>()];
    let codec = prop_oneof![3 => Just(Codec::F32), 1 => prop::sample::select(Codec::ALL.to_vec())];
    (digest(), bytes, chunk_bytes, codec, prop::option::weighted(0.2, digest()))
        .prop_map(|(digest, bytes, chunk_bytes, codec, base)| Manifest { digest, bytes, chunk_bytes, codec, base })
}

fn address() -> impl Strategy<Value = Address> {
    "[a-z]{1,9}:[1-9][0-9]{0,3}".prop_map(|text| Address::new(&text).unwrap())
}

fn round() -> impl Strategy<Value = Round> {
    prop_oneof![4 => (0..4u64).prop_map(Round), 1 => (0..=Round::MAX.0).prop_map(Round)]
}

fn term() -> impl Strategy<Value = Term> {
    prop_oneof![4 => (0..4u32).prop_map(Term), 1 => any::<u32>().prop_map(Term)]
}

fn step_sum() -> impl Strategy<Value = f64> {
    prop_oneof![Just(1.0), 1e-9..=1e9f64]
}

fn decree() -> impl Strategy<Value = Decree> {
    let reason = prop_oneof![Just(Reason::Rounds), Just(Reason::TargetAccuracy), Just(Reason::Patience)];
    let outcome = (manifest(), prop::option::of(reason)).prop_map(|(model, reason)| match reason {
        None => Outcome::Model(model),
        Some(reason) => Outcome::Finish(reason, model),
    });
    let contributor = (peer(), digest(), any::<u64>(), step_sum(), metrics()).prop_map(
        |(peer, update, num_examples, step_sum, metrics)| Contributor { peer, update, num_examples, step_sum, metrics },
    );
    let record = (prop::option::of((0.0..9.0f64, any::<u64>())), any::<u32>())
        .prop_map(|(reference, stale)| Record { reference, stale });
    let contributors = prop::collection::vec(contributor, 0..4);
    let standbys = prop::collection::btree_map(peer(), address(), 0..3);
    let who = (round(), digest(), peer(), term());
    (who, outcome, contributors, prop::option::of(metrics()), record, roster(), standbys).prop_map(
        |((round, parent, leader, term), outcome, contributors, parent_metrics, record, next_roster, standbys)| {
            let summary = Bytes::from_static(b"inputs");
            Decree {
                round,
                parent,
                leader,
                term,
                outcome,
                contributors,
                parent_metrics,
                record,
                next_roster,
                standbys,
                summary,
            }
        },
    )
}

fn hello() -> impl Strategy<Value = Hello> {
    let entries =
        prop_oneof![Just(Config::default().entries()), prop::collection::btree_map("[a-z]{1,8}", "[ -~]{0,20}", 0..4),];
    let head = prop::option::of((round(), digest()));
    let own = (incarnation(), any::<[u32; 2]>(), prop::option::of(address()));
    (
        entries,
        prop::option::of(Just(layout().digest())),
        any::<u64>(),
        head,
        prop::option::of(digest()),
        any::<bool>(),
        own,
    )
        .prop_map(|(entries, layout, num_examples, head, genesis, done, own)| {
            let (incarnation, [number, lag_ms], broker) = own;
            Hello { incarnation, entries, layout, num_examples, head, genesis, done, number, lag_ms, broker }
        })
}

fn chunks() -> impl Strategy<Value = ChunkSet> {
    prop::collection::btree_set(0..20u32, 0..20).prop_map(|set| ChunkSet::new(set).unwrap())
}

fn summary() -> impl Strategy<Value = Bytes> {
    prop::collection::vec(any::<u8>(), 0..40).prop_map(Bytes::from)
}

fn body() -> impl Strategy<Value = Body> {
    let leading = (
        prop::collection::vec(peer(), 0..5),
        prop::collection::vec(any::<u8>(), 0..5),
        prop::option::of(metrics()),
        prop::option::of(manifest()),
    )
        .prop_map(|(ballots, has, parent_metrics, upcoming)| {
            Body::Leader(Leading { ballots, has, parent_metrics, upcoming })
        });
    let update = (digest(), manifest(), any::<u64>(), step_sum(), metrics()).prop_map(
        |(parent, manifest, num_examples, step_sum, metrics)| {
            Body::Update(Update { parent, manifest, num_examples, step_sum, metrics })
        },
    );
    prop_oneof![
        hello().prop_map(Body::Hello),
        Just(Body::Goodbye),
        (roster(), prop::collection::vec((peer(), term()), 0..3))
            .prop_map(|(roster, released)| Body::Call { roster, released }),
        (term(), summary()).prop_map(|(gave_up, summary)| Body::Join { gave_up, summary }),
        (peer(), term()).prop_map(|(candidate, call)| Body::Bound { candidate, call }),
        (roster(), summary()).prop_map(|(roster, summary)| Body::Founded { roster, summary }),
        (peer(), prop::option::of((term(), decree())))
            .prop_map(|(candidate, accepted)| Body::Ballot { candidate, accepted }),
        metrics().prop_map(Body::Evaluation),
        leading,
        decree().prop_map(Body::Proposal),
        update,
        Just(Body::Status),
        "[ -~]{0,40}".prop_map(|why| Body::Decline { why }),
        digest().prop_map(|decree| Body::Accept { decree }),
        term().prop_map(|promised| Body::Refuse { promised }),
        (digest(), chunks()).prop_map(|(blob, chunks)| Body::Grant { blob, chunks }),
        (digest(), any::<u32>()).prop_map(|(blob, index)| Body::Chunk { blob, index }),
        (decree(), prop::collection::vec(peer(), 0..5), digest())
            .prop_map(|(decree, accepts, genesis)| Body::Head(Head { decree, accepts, genesis })),
    ]
}

fn envelope() -> impl Strategy<Value = Envelope> {
    (peer(), round(), term(), body()).prop_map(|(sender, round, term, body)| Envelope {
        version: VERSION,
        sender,
        signature: vec![],
        round,
        term,
        body,
    })
}

fn layout() -> Arc<Layout> {
    Arc::new(Layout { tensors: vec![TensorSpec { name: "w".into(), shape: vec![1000] }] })
}

proptest! {
    #![proptest_config(cases(512))]

    #[test]
    fn every_message_survives_its_bytes(envelope in envelope(), tail in prop::collection::vec(any::<u8>(), 0..64)) {
        let tail = if matches!(envelope.body, Body::Chunk { .. }) { tail } else { vec![] };
        let message = Bytes::from([&envelope.encode()[..], &tail].concat());
        let (decoded, rest) = Envelope::decode(&message).unwrap();
        prop_assert_eq!(decoded, envelope);
        prop_assert_eq!(&rest[..], &tail[..]);
    }

    #[test]
    fn a_message_that_was_cut_short_is_refused(envelope in envelope(), share in 0.0..1.0f64) {
        let message = envelope.encode();
        let cut = (message.len() as f64 * share) as usize;
        prop_assert!(Envelope::decode(&message.slice(..cut)).is_err());
    }

    #[test]
    fn arbitrary_bytes_are_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        let bytes = Bytes::from(bytes);
        let _ = Envelope::decode(&bytes);
        let _ = Durable::decode(&bytes);
    }

    #[test]
    fn bytes_that_were_changed_on_the_way_do_not_panic(
        envelope in envelope(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = envelope.encode().to_vec();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let _ = Envelope::decode(&Bytes::from(bytes));
    }
}

#[test]
fn a_hello_with_an_address_that_is_none_is_refused() {
    let good = hello_with_broker("127.0.0.1:1883");
    assert!(Envelope::decode(&good).is_ok());
    let at = good.windows(14).position(|part| part == b"127.0.0.1:1883").unwrap();
    for bad in [&b"0.0.0.0:0001883"[..14], b"127.0.0.1:0000", b"127.0.0.1 1883", b"http://x:18834"] {
        let mut bytes = good.to_vec();
        bytes[at..at + 14].copy_from_slice(bad);
        assert!(Envelope::decode(&Bytes::from(bytes)).is_err(), "{:?} was taken", str::from_utf8(bad));
    }
}

#[test]
fn a_round_after_which_there_is_none_is_refused() {
    let roster = Roster::of(BTreeMap::from([(PeerId::new("a").unwrap(), Incarnation(0))]));
    let decree = |round| Decree {
        round,
        parent: Digest::of(b"parent"),
        leader: PeerId::new("a").unwrap(),
        term: Term(0),
        outcome: Outcome::Finish(
            Reason::Rounds,
            Manifest { digest: Digest::of(b""), bytes: 4000, chunk_bytes: 1024, codec: Codec::F32, base: None },
        ),
        contributors: Vec::new(),
        parent_metrics: None,
        record: Record { reference: None, stale: 0 },
        next_roster: roster.clone(),
        standbys: BTreeMap::new(),
        summary: Bytes::new(),
    };
    let is_taken = |round, of_head| {
        let head = Head { decree: decree(of_head), accepts: Vec::new(), genesis: Digest::of(b"genesis") };
        let (sender, signature, body) = (PeerId::new("a").unwrap(), vec![], Body::Head(head));
        Envelope::decode(&Envelope { version: VERSION, sender, signature, round, term: Term(0), body }.encode()).is_ok()
    };
    let beyond = Round(u64::MAX);
    assert!(is_taken(Round::MAX, Round::MAX) && !is_taken(beyond, Round(1)) && !is_taken(Round(1), beyond));
}

#[test]
fn of_another_version_it_is_told_who_speaks_it_and_of_names_without_number_not_all() {
    let (start, id) = (Instant::now(), |name: &str| PeerId::new(name).unwrap());
    let identity = identity(id("a"));
    let mut peer = Peer::new(Config::default(), identity, None, &BTreeSet::new(), start);
    let mut told = |sender: &str| {
        let (version, sender, signature) = (VERSION + 1, id(sender), vec![]);
        let (round, term, body) = (Round(0), Term(0), Body::Goodbye);
        let message = Envelope { version, sender, signature, round, term, body }.encode();
        let actions = peer.handle(Event::Message(message), start).into_iter();
        let told = actions.filter_map(|action| match action {
            Action::Notify(Notice::BadMessage { sender, why }) => Some((sender, why)),
            _ => None,
        });
        told.collect::<Vec<_>>()
    };
    let [(Some(who), why)] = &told("b")[..] else { panic!("it is not told who") };
    assert!(*who == id("b") && why.contains("version"), "{who}: {why}");
    assert_eq!(told("b"), []);
    // What this peer said before it was given another version.
    assert_eq!(told("a"), []);
    let all: Vec<_> = (0..20_100).flat_map(|number| told(&format!("n{number}"))).collect();
    assert!(all.len() < 20_100 && all.last().is_some_and(|(sender, _)| sender.is_none()), "{} were told", all.len());
}

proptest! {
    #![proptest_config(cases(256))]

    /// Whatever others say, in whatever order, a peer goes on, and its deadlines do not stand still.
    #[test]
    fn no_conversation_makes_a_peer_panic(messages in prop::collection::vec((envelope(), 0..3000u64), 1..60)) {
        let (me, start) = (PeerId::new("a").unwrap(), Instant::now());
        let identity = identity(me);
        let mut peer = Peer::new(Config::default(), identity, None, &BTreeSet::new(), start);
        let mut now = start;
        peer.handle(Event::Connected, now);
        for (envelope, wait_ms) in messages {
            let next = now + Duration::from_millis(wait_ms);
            while let Some(deadline) = peer.deadline().filter(|deadline| *deadline <= next) {
                now = now.max(deadline);
                peer.handle(Event::Tick, now);
                prop_assert!(peer.deadline().is_none_or(|later| later > now), "a deadline stands still");
            }
            now = next;
            let tail = if matches!(envelope.body, Body::Chunk { .. }) { &[1, 2, 3][..] } else { &[] };
            peer.handle(Event::Message(Bytes::from([&envelope.encode()[..], tail].concat())), now);
        }
        let durable = peer.durable();
        let decoded = Durable::decode(&durable.encode());
        prop_assert_eq!(decoded.as_ref(), Some(durable));
    }
}

fn hello_with_broker(broker: &str) -> Bytes {
    let broker = Some(Address::new(broker).unwrap());
    let (entries, layout) = (BTreeMap::new(), Some(layout().digest()));
    let (num_examples, head, genesis, done, number, lag_ms) = (1, None, None, false, 0, 0);
    let hello = Hello {
        incarnation: Incarnation(1),
        entries,
        layout,
        num_examples,
        head,
        genesis,
        done,
        number,
        lag_ms,
        broker,
    };
    let (sender, signature) = (PeerId::new("a").unwrap(), vec![]);
    Envelope { version: VERSION, sender, signature, round: Round(0), term: Term(0), body: Body::Hello(hello) }.encode()
}

#[test]
fn a_length_that_no_message_has_allocates_nothing() {
    // A hello whose map claims 2^60 entries: the header of a real one, then the count.
    let real = Envelope {
        version: VERSION,
        sender: PeerId::new("a").unwrap(),
        signature: vec![],
        round: Round(0),
        term: Term(0),
        body: Body::Hello(Hello {
            incarnation: Incarnation(1),
            entries: BTreeMap::new(),
            layout: Some(Digest::of(b"")),
            num_examples: 0,
            head: None,
            genesis: None,
            done: false,
            number: 0,
            lag_ms: 0,
            broker: None,
        }),
    };
    // version, name length, name, signature length, round, term, variant, incarnation; then the count of entries.
    let mut bytes = real.encode()[..8].to_vec();
    bytes.extend([0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x0f]);
    assert!(Envelope::decode(&Bytes::from(bytes)).is_err());
}
