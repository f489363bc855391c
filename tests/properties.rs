//! Properties of the arithmetic floors: aggregation, codecs and transfer.
//!
//! Transfers run in virtual time: the network below is a queue of arrivals, and the clock jumps to the next one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use rodizio::aggregation::{Contribution, Share, Strategy as Aggregation};
use rodizio::transfer::{
    Assembly, CHUNK_BYTES_MIN, ChunkSet, Codec, GATHER_BYTES, Grants, Inserted, Intake, Keep, Manifest, Pulls, Route,
    Serve, Tuning, Verifier, WINDOW_BYTES, Wanted,
};
use rodizio::types::{Digest, PeerId};
use rodizio::weights::{Layout, TensorSpec, Weights};

/// `cases` cases, the same ones on every run.
fn cases(cases: u32) -> ProptestConfig {
    let rng_seed = RngSeed::Fixed(0x0d12_1021_0000_0001);
    ProptestConfig { cases, rng_seed, failure_persistence: None, ..ProptestConfig::default() }
}

// Aggregation

fn finite() -> impl Strategy<Value = f32> {
    use proptest::num::f32::{NEGATIVE, NORMAL, POSITIVE, SUBNORMAL, ZERO};
    POSITIVE | NEGATIVE | NORMAL | SUBNORMAL | ZERO
}

/// Values that are far apart, or neighbours of one value: the mean of neighbours is where rounding could step out.
fn column(parts: usize) -> impl Strategy<Value = Vec<f32>> {
    let neighbours = (finite(), prop::collection::vec(any::<bool>(), parts)).prop_map(|(value, ups)| {
        let up = if value == f32::MAX { value } else { value.next_up() };
        ups.into_iter().map(|is_up| if is_up { up } else { value }).collect()
    });
    prop_oneof![prop::collection::vec(finite(), parts), neighbours]
}

fn num_examples() -> impl Strategy<Value = u64> {
    prop_oneof![1..100u64, 1..=u64::MAX]
}

/// Updates of one model: examples and values of each.
fn updates() -> impl Strategy<Value = Vec<(u64, Weights)>> {
    (1..8usize).prop_flat_map(|parts| {
        let columns = prop::collection::vec(column(parts), 1..40);
        (prop::collection::vec(num_examples(), parts), columns).prop_map(|(counts, columns)| {
            let layout = Arc::new(layout(columns.len()));
            let row = |part: usize| columns.iter().map(|column| column[part]).collect();
            let weights = |part| Weights::new(Arc::clone(&layout), row(part)).unwrap();
            counts.into_iter().enumerate().map(|(part, count)| (count, weights(part))).collect()
        })
    })
}

fn layout(values: usize) -> Layout {
    Layout { tensors: vec![TensorSpec { name: "w".into(), shape: vec![values] }] }
}

fn fedavg<'a>(updates: impl IntoIterator<Item = &'a (u64, Weights)>) -> Vec<f32> {
    let contributions: Vec<_> = updates
        .into_iter()
        .map(|(num_examples, weights)| Contribution { share: Share::of(*num_examples), weights })
        .collect();
    let layout = contributions[0].weights.layout();
    let parent = Weights::zeros(layout.clone());
    Aggregation::default().aggregate(layout, &parent, &contributions).unwrap().into_values()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The largest magnitude of each value over all updates: what rounding errors are relative to.
fn magnitudes(updates: &[(u64, Weights)]) -> Vec<f64> {
    let magnitude = |i: usize| updates.iter().map(|(_, w)| f64::from(w.values()[i].abs())).fold(0.0, f64::max);
    (0..updates[0].1.values().len()).map(magnitude).collect()
}

/// Asserts that two rows agree to the last bit or so of an `f32` of the inputs' magnitude.
fn assert_close(left: &[f32], right: &[f32], magnitudes: &[f64]) {
    assert_eq!(left.len(), right.len());
    for ((&left, &right), &magnitude) in left.iter().zip(right).zip(magnitudes) {
        let tolerance = magnitude * f64::from(f32::EPSILON) + f64::from(f32::from_bits(1));
        assert!((f64::from(left) - f64::from(right)).abs() <= tolerance, "{left:e} and {right:e} of {magnitude:e}");
    }
}

proptest! {
    #![proptest_config(cases(1024))]

    #[test]
    fn a_mean_lies_between_its_inputs(updates in updates()) {
        for (i, mean) in fedavg(&updates).into_iter().enumerate() {
            let inputs = || updates.iter().map(|(_, weights)| weights.values()[i]);
            let (min, max) = (inputs().fold(f32::INFINITY, f32::min), inputs().fold(f32::NEG_INFINITY, f32::max));
            prop_assert!((min..=max).contains(&mean), "{mean:e} is not in {min:e}..={max:e}");
        }
    }

    #[test]
    fn a_mean_is_weighted_by_examples(updates in updates()) {
        let total: f64 = updates.iter().map(|(count, _)| *count as f64).sum();
        let expected: Vec<f32> = (0..updates[0].1.values().len())
            .map(|i| updates.iter().map(|(n, w)| *n as f64 * f64::from(w.values()[i])).sum::<f64>() / total)
            .map(|mean| mean as f32)
            .collect();
        assert_close(&fedavg(&updates), &expected, &magnitudes(&updates));
    }

    #[test]
    fn an_update_shared_by_two_peers_counts_once(updates in updates(), part in any::<prop::sample::Index>()) {
        let mut halves = updates.clone();
        let (count, weights) = &mut halves[part.index(updates.len())];
        let (first, weights) = (*count / 2, weights.clone());
        *count -= first;
        halves.push((first, weights));
        assert_close(&fedavg(&halves), &fedavg(&updates), &magnitudes(&updates));
    }

    #[test]
    fn the_order_of_arrival_does_not_matter(
        (updates, arrived) in updates().prop_flat_map(|updates| {
            let arrived = (0..updates.len()).collect::<Vec<_>>();
            (Just(updates), Just(arrived).prop_shuffle())
        })
    ) {
        let mean = fedavg(&updates);
        assert_close(&fedavg(arrived.iter().map(|&part| &updates[part])), &mean, &magnitudes(&updates));
        let by_id: BTreeMap<_, _> = arrived.iter().map(|&part| (part, &updates[part])).collect();
        prop_assert_eq!(bits(&fedavg(by_id.into_values())), bits(&mean));
    }
}

// Codecs and wire forms

const TUNING: Tuning = Tuning { seed: 0x51_2f, topk_ratio: 0.05 };

/// A row that every codec can write: of a few blocks, of any magnitude up to `largest`, with zeros.
fn row(largest: f32) -> impl Strategy<Value = Vec<f32>> {
    let value = prop_oneof![
        6 => -1.0f32..1.0,
        3 => -largest..largest,
        2 => finite().prop_map(move |value| value % largest),
        1 => Just(0.0)
    ];
    prop::collection::vec(value, 0..2000)
}

fn weights(values: &[f32]) -> Weights {
    Weights::new(Arc::new(layout(values.len())), values.to_vec()).unwrap()
}

fn through(codec: Codec, values: &[f32], tuning: &Tuning) -> Vec<f32> {
    let weights = weights(values);
    let blob = codec.encode(&weights, tuning).unwrap();
    codec.decode(&blob, weights.layout()).unwrap().into_values()
}

/// How far from `value` a codec may take it, in a block whose largest magnitude is `largest`.
fn error_bound(codec: Codec, value: f32, largest: f32) -> f64 {
    let (value, largest) = (f64::from(value.abs()), f64::from(largest));
    match codec {
        Codec::F32 => 0.0,
        Codec::F16 => value * 2f64.powi(-11) + 2f64.powi(-25),
        // What is below the smallest normal number has fewer bits.
        Codec::Bf16 => value * 2f64.powi(-8) + 2f64.powi(-134),
        // One step, and the rounding of the scale and of its multiples.
        Codec::Int8 => largest / 127.0 * 1.0001 + 2f64.powi(-142),
        Codec::TopK => largest,
    }
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn every_codec_stays_within_its_error_bound(values in row(65_000.0)) {
        for codec in Codec::ALL {
            let block = codec.block().unwrap_or(values.len().max(1)).max(512);
            let decoded = through(codec, &values, &TUNING);
            prop_assert_eq!(decoded.len(), values.len());
            for (values, decoded) in values.chunks(block).zip(decoded.chunks(block)) {
                let largest = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
                for (&value, &decoded) in values.iter().zip(decoded) {
                    let error = (f64::from(value) - f64::from(decoded)).abs();
                    let bound = error_bound(codec, value, largest);
                    prop_assert!(error <= bound, "{codec}: {value:e} became {decoded:e}, {bound:e} allowed");
                }
            }
        }
    }

    #[test]
    fn a_blob_has_the_length_that_its_codec_says(values in row(1.0)) {
        for codec in Codec::ALL {
            let blob = codec.encode(&weights(&values), &TUNING).unwrap();
            prop_assert!(codec.may_have(values.len(), blob.len() as u64), "{codec}: {}", blob.len());
            prop_assert_eq!(&blob, &codec.encode(&weights(&values), &TUNING).unwrap());
        }
    }

    #[test]
    fn a_range_decodes_to_its_part_of_the_whole(values in row(60_000.0), cuts in any::<[prop::sample::Index; 2]>()) {
        for (codec, block) in Codec::ALL.into_iter().filter_map(|codec| Some((codec, codec.block()?))) {
            let len = values.len();
            let mut cuts = cuts.map(|cut| (cut.index(len + 1).next_multiple_of(block)).min(len));
            cuts.sort_unstable();
            let blob = codec.encode(&weights(&values), &TUNING).unwrap();
            let bytes = codec.byte_range(cuts[0]..cuts[1], len).unwrap();
            let mut part = vec![f32::NAN; cuts[1] - cuts[0]];
            codec.decode_into(&blob[bytes.start as usize..bytes.end as usize], &mut part).unwrap();
            let whole = codec.decode(&blob, weights(&values).layout()).unwrap();
            prop_assert_eq!(bits(&part), bits(&whole.values()[cuts[0]..cuts[1]]), "{}", codec);
        }
    }

    #[test]
    fn any_bytes_are_weights_or_an_error(
        bytes in prop::collection::vec(any::<u8>(), 0..3000), values in 0..700usize, entries in 0..40u64,
    ) {
        let sparse = [&entries.to_le_bytes(), &bytes[..]].concat();
        for codec in Codec::ALL {
            let layout = Arc::new(layout(values));
            let length = usize::try_from(codec.encoded_bytes(values)).unwrap().min(bytes.len());
            for blob in [&bytes[..], &bytes[..length], &sparse] {
                if let Ok(weights) = codec.decode(blob, &layout) {
                    prop_assert_eq!(weights.values().len(), values);
                }
            }
        }
    }

    #[test]
    fn a_sparse_blob_that_lost_a_bit_is_harmless(
        values in row(10.0), at in any::<prop::sample::Index>(), bit in 0..8u8,
    ) {
        let weights = weights(&values);
        let mut blob = Codec::TopK.encode(&weights, &TUNING).unwrap().to_vec();
        let at = at.index(blob.len());
        blob[at] ^= 1 << bit;
        if let Ok(decoded) = Codec::TopK.decode(&blob, weights.layout()) {
            prop_assert_eq!(decoded.values().len(), values.len());
        }
    }

    #[test]
    fn what_is_sent_is_the_largest(values in row(1000.0), topk_ratio in 0.001..0.999f64) {
        let sent = through(Codec::TopK, &values, &Tuning { topk_ratio, ..TUNING });
        let pairs = || values.iter().zip(&sent).map(|(value, sent)| (value.abs(), *sent != 0.0));
        let least = pairs().filter(|(_, sent)| *sent).map(|(value, _)| value).fold(f32::INFINITY, f32::min);
        let most = pairs().filter(|(_, sent)| !*sent).map(|(value, _)| value).fold(0.0, f32::max);
        prop_assert!(most <= least, "{most:e} was kept and {least:e} sent");
        let count = pairs().filter(|(_, sent)| *sent).count() as f64;
        prop_assert!(count <= (values.len() as f64 * topk_ratio).round().max(1.0));
    }

    #[test]
    fn what_is_sent_and_what_is_kept_make_up_what_was_learned(
        rounds in (1..300usize).prop_flat_map(|len| prop::collection::vec(prop::collection::vec(-1.0f32..1.0, len), 1..12)),
    ) {
        let len = rounds[0].len();
        let (mut learned, mut sent, mut unsent) = (vec![0.0f64; len], vec![0.0f64; len], vec![0.0f32; len]);
        for delta in &rounds {
            let due: Vec<f32> = delta.iter().zip(&unsent).map(|(delta, unsent)| delta + unsent).collect();
            let blob = through(Codec::TopK, &due, &TUNING);
            unsent = due.iter().zip(&blob).map(|(due, blob)| due - blob).collect();
            sent.iter_mut().zip(&blob).for_each(|(sum, blob)| *sum += f64::from(*blob));
            learned.iter_mut().zip(delta).for_each(|(sum, delta)| *sum += f64::from(*delta));
        }
        for ((learned, sent), unsent) in learned.iter().zip(&sent).zip(&unsent) {
            let found = sent + f64::from(*unsent);
            // A sum of a dozen values below 12 is right to as many halves of its last bit.
            prop_assert!((learned - found).abs() < 12.0 * 12.0 * f64::from(f32::EPSILON), "{learned} became {found}");
        }
    }
}

#[test]
fn stochastic_rounding_is_right_in_the_mean() {
    let seeds = 20_000u32;
    // Steps of 0.01; values at all places between two of them, and the largest.
    let values: Vec<f32> = (0..200).map(|i| (i as f32 - 100.0) * 0.0023).chain([1.27]).collect();
    let mut sums = vec![0.0f64; values.len()];
    for seed in 0..seeds {
        let decoded = through(Codec::Int8, &values, &Tuning { seed: u64::from(seed), ..TUNING });
        sums.iter_mut().zip(decoded).for_each(|(sum, value)| *sum += f64::from(value));
    }
    // The deviation of one lot is at most half a step: six deviations of the mean, which one of 10^9 exceeds.
    let tolerance = 6.0 * 0.005 / f64::from(seeds).sqrt();
    for (value, sum) in values.iter().zip(sums) {
        let mean = sum / f64::from(seeds);
        assert!((mean - f64::from(*value)).abs() < tolerance, "{value} became {mean} in the mean");
    }
}

#[test]
fn a_percent_of_the_entries_takes_less_than_3_percent_of_the_bytes() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let values: Vec<f32> = (0..200_000).map(|_| rng.random_range(-1.0..1.0f32).powi(3)).collect();
    let blob = Codec::TopK.encode(&weights(&values), &Tuning { topk_ratio: 0.01, ..TUNING }).unwrap();
    let share = blob.len() as f64 / Codec::F32.encoded_bytes(values.len()) as f64;
    assert!(share < 0.03, "{share}");
}

proptest! {
    #![proptest_config(cases(1024))]

    #[test]
    fn the_f32_codec_keeps_every_bit(words in prop::collection::vec(any::<u32>(), 0..200)) {
        let layout = Arc::new(layout(words.len()));
        let weights = Weights::new(Arc::clone(&layout), words.iter().copied().map(f32::from_bits).collect()).unwrap();
        let blob = Codec::F32.encode(&weights, &TUNING).unwrap();
        prop_assert_eq!(blob.len() as u64, Codec::F32.encoded_bytes(layout.len()));
        let decoded = Codec::F32.decode(&blob, &layout).unwrap();
        prop_assert_eq!(bits(decoded.values()), words);
    }

    #[test]
    fn a_manifest_from_the_wire_is_harmless(bytes in prop::collection::vec(any::<u8>(), 32..90)) {
        let Ok(manifest) = postcard::from_bytes::<Manifest>(&bytes) else { return Ok(()) };
        let accepted = manifest.check(&layout(1000)).is_ok();
        let is_whole = manifest.codec != Codec::TopK || manifest.base.is_some();
        prop_assert_eq!(accepted, manifest.codec.may_have(1000, manifest.bytes) && is_whole
            && manifest.chunk_bytes >= CHUNK_BYTES_MIN && manifest.chunk_bytes <= 64 << 20);
        let mut assembly = Assembly::new(manifest);
        for index in [0, 1, u32::MAX] {
            let range = manifest.chunk_range(index);
            prop_assert!(range.start <= range.end && range.end as u64 <= manifest.bytes);
            let whole = assembly.insert(index, 3);
            prop_assert_eq!(whole.is_ok(), index < manifest.chunks() && range.len() == 3);
        }
    }

    #[test]
    fn a_manifest_survives_the_wire_and_no_part_of_it_does(
        digest in any::<[u8; 32]>(), bytes in any::<u64>(), chunk_bytes in any::<u32>(),
        codec in prop::sample::select(Codec::ALL.to_vec()), base in any::<Option<[u8; 32]>>(),
    ) {
        let manifest = Manifest { digest: Digest(digest), bytes, chunk_bytes, codec, base: base.map(Digest) };
        let wire = postcard::to_stdvec(&manifest).unwrap();
        prop_assert_eq!(postcard::from_bytes(&wire), Ok(manifest));
        for len in 0..wire.len() {
            prop_assert!(postcard::from_bytes::<Manifest>(&wire[..len]).is_err());
        }
    }

    #[test]
    fn a_chunk_set_survives_the_wire_and_no_part_of_it_does(indices in prop::collection::btree_set(0..500u32, 0..80)) {
        let set = ChunkSet::new(indices.iter().copied()).unwrap();
        prop_assert!(set.iter().eq(indices.iter().copied()));
        prop_assert_eq!(set.len() as usize, indices.len());
        let wire = postcard::to_stdvec(&set).unwrap();
        prop_assert_eq!(postcard::from_bytes(&wire), Ok(set));
        for len in 0..wire.len() {
            prop_assert!(postcard::from_bytes::<ChunkSet>(&wire[..len]).is_err());
        }
    }

    #[test]
    fn a_chunk_set_from_the_wire_is_ascending_or_refused(
        wire in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..200),
            prop::collection::vec((0..30u32, 0..5u32), 0..5).prop_map(|ranges| postcard::to_stdvec(&ranges).unwrap()),
            prop::collection::vec(any::<(u32, u32)>(), 0..3).prop_map(|ranges| postcard::to_stdvec(&ranges).unwrap()),
        ],
        chunks in 1..100u32,
    ) {
        let Ok(set) = postcard::from_bytes::<ChunkSet>(&wire) else { return Ok(()) };
        let indices: Vec<_> = set.iter().take(1000).collect();
        prop_assert!(indices.is_sorted_by(|a, b| a < b));
        prop_assert_eq!(set.is_empty(), indices.is_empty());
        prop_assert_eq!(indices.len() as u32, set.len().min(1000));
        if set.check(chunks).is_ok() {
            prop_assert!(set.len() <= chunks && indices.iter().all(|&index| index < chunks));
        }
        let sends = Serve::new(chunks, RETRY).granted(&peer(0), &set, Instant::now(), true);
        prop_assert!(sends.iter().all(|(index, _)| *index < chunks));
    }
}

// Transfer

const RETRY: Duration = Duration::from_millis(100);
const VIRTUAL_TIME_MAX: Duration = Duration::from_secs(600);

fn peer(number: usize) -> PeerId {
    PeerId::new(&format!("peer-{number}")).unwrap()
}

fn random_blob(bytes: usize, seed: u64) -> Bytes {
    let mut blob = vec![0; bytes];
    ChaCha8Rng::seed_from_u64(seed).fill(&mut blob[..]);
    Bytes::from(blob)
}

/// What happens to a message between holder and receiver, in either direction.
#[derive(Clone, Debug)]
struct Link {
    /// One way, least and most: unequal delays reorder.
    delay_ms: (u64, u64),
    /// The share of messages that is lost, and that arrives twice.
    loss: f64,
    duplication: f64,
    /// The share of chunks published to all that is lost besides.
    deafness: f64,
    /// How long a chunk occupies the link.
    chunk_time: Duration,
    /// How many chunks the broker keeps for this receiver: what comes on top is lost.
    room: usize,
}

impl Link {
    /// A link that keeps order and loses nothing.
    fn clean(delay_ms: u64) -> Self {
        let chunk_time = Duration::ZERO;
        let room = usize::MAX;
        Self { delay_ms: (delay_ms, delay_ms), loss: 0.0, duplication: 0.0, deafness: 0.0, chunk_time, room }
    }
}

fn any_link() -> impl Strategy<Value = Link> {
    (1..20u64, 0..25u64, 0.0..0.4, 0.0..0.2).prop_map(|(least, more, loss, duplication)| Link {
        delay_ms: (least, least + more),
        loss,
        duplication,
        ..Link::clean(0)
    })
}

/// One holder and its receivers.
struct Transfer {
    blob: Bytes,
    manifest: Manifest,
    serve: Serve,
    receivers: Vec<Receiver>,
    window: u32,
    /// The chance that a receiver restarts when something arrives.
    restarts: f64,
    rng: ChaCha8Rng,
    start: Instant,
    now: Instant,
    /// By time of arrival, then by time of sending.
    arrivals: BTreeMap<(Instant, u64), Arrival>,
    sent: u64,
    log: Log,
}

struct Receiver {
    link: Link,
    link_free: Instant,
    assembly: Assembly,
    chunks: BTreeMap<u32, Bytes>,
    grants: Grants,
    /// Chunks between holder and this receiver.
    in_flight: usize,
    finished: Option<Duration>,
}

enum Arrival {
    Grant { from: usize, set: Vec<u8> },
    Chunk { to: usize, index: u32, chunk: Bytes },
}

/// What can be asserted of a transfer that is over.
#[derive(Default)]
struct Log {
    to_all: Vec<u32>,
    to_one: Vec<(usize, u32)>,
    /// How many chunks arrived that were there already.
    duplicates: usize,
    /// The most chunks that were between holder and receiver, by receiver.
    in_flight_max: Vec<usize>,
}

impl Transfer {
    fn new(chunks: usize, window: u32, links: &[Link], seed: u64) -> Self {
        // The last chunk is a short one.
        let blob = random_blob((CHUNK_BYTES_MIN as usize * chunks).saturating_sub(seed as usize % 1000), seed);
        let manifest = Manifest::of(&blob, CHUNK_BYTES_MIN, Codec::F32).unwrap();
        let start = Instant::now();
        let receiver = |link: &Link| Receiver {
            link: link.clone(),
            link_free: start,
            assembly: Assembly::new(manifest),
            chunks: BTreeMap::new(),
            grants: Grants::new(window, RETRY),
            in_flight: 0,
            finished: None,
        };
        Self {
            receivers: links.iter().map(receiver).collect(),
            serve: Serve::of(&manifest, RETRY),
            blob,
            manifest,
            window,
            restarts: 0.0,
            rng: ChaCha8Rng::seed_from_u64(seed),
            start,
            now: start,
            arrivals: BTreeMap::new(),
            sent: 0,
            log: Log { in_flight_max: vec![0; links.len()], ..Log::default() },
        }
    }

    /// Runs until every receiver has the blob, verified; fails if that takes too long.
    fn run(mut self) -> (Vec<Duration>, Log) {
        loop {
            for number in 0..self.receivers.len() {
                self.grant(number);
            }
            if self.receivers.iter().all(|receiver| receiver.finished.is_some()) {
                break;
            }
            self.step();
        }
        let finished = self.receivers.iter().map(|receiver| receiver.finished.unwrap()).collect();
        for receiver in self.receivers {
            let joined = receiver.chunks.into_values().collect::<Vec<_>>().concat();
            assert!(joined == self.blob, "the chunks are not the blob");
        }
        (finished, self.log)
    }

    fn grant(&mut self, number: usize) {
        let receiver = &mut self.receivers[number];
        let set = receiver.grants.next(&receiver.assembly, self.now);
        assert!(receiver.grants.outstanding() <= self.window as usize, "more is outstanding than the window");
        if receiver.assembly.is_complete() {
            assert_eq!((set, receiver.grants.deadline()), (None, None), "a complete blob is waited for");
            receiver.finished.get_or_insert(self.now - self.start);
            return;
        }
        let deadline = receiver.grants.deadline().expect("a deadline while something is missing");
        assert!(deadline > self.now, "a deadline in the past would be polled for ever");
        if let Some(set) = set {
            assert!(set.iter().all(|index| !receiver.assembly.has(index)), "a chunk was granted that is there");
            let set = postcard::to_stdvec(&set).unwrap();
            self.send(number, Duration::ZERO, |from| Arrival::Grant { from, set: set.clone() });
        }
    }

    /// Jumps to the next arrival or deadline.
    fn step(&mut self) {
        let deadline = self.receivers.iter().filter_map(|receiver| receiver.grants.deadline()).min();
        let arrival = self.arrivals.first_key_value().map(|((at, _), _)| *at);
        self.now = deadline.into_iter().chain(arrival).min().expect("something is due while a blob is incomplete");
        assert!(self.now - self.start < VIRTUAL_TIME_MAX, "the transfer does not finish");
        if arrival != Some(self.now) {
            return;
        }
        match self.arrivals.pop_first().expect("an arrival is due").1 {
            Arrival::Grant { from, set } => self.serve(from, &set),
            Arrival::Chunk { to, index, chunk } => self.receive(to, index, chunk),
        }
    }

    fn serve(&mut self, from: usize, set: &[u8]) {
        let set: ChunkSet = postcard::from_bytes(set).unwrap();
        set.check(self.manifest.chunks()).unwrap();
        let several = self.receivers.len() > 1;
        for (index, route) in self.serve.granted(&peer(from), &set, self.now, several) {
            let chunk = self.manifest.chunk(&self.blob, index).unwrap();
            if let Route::One(receiver) = route {
                assert_eq!(receiver, peer(from));
                self.log.to_one.push((from, index));
                self.send_chunk(from, index, &chunk);
            } else {
                self.log.to_all.push(index);
                for to in 0..self.receivers.len() {
                    if self.receivers[to].in_flight < self.receivers[to].link.room
                        && !self.rng.random_bool(self.receivers[to].link.deafness)
                    {
                        self.send_chunk(to, index, &chunk);
                    }
                }
            }
        }
    }

    fn receive(&mut self, to: usize, index: u32, chunk: Bytes) {
        let restart = self.rng.random_bool(self.restarts);
        let receiver = &mut self.receivers[to];
        receiver.in_flight -= 1;
        let had = receiver.assembly.has(index);
        let inserted = receiver.assembly.insert(index, chunk.len()).unwrap();
        assert_eq!(inserted == Inserted::Duplicate, had);
        if inserted == Inserted::New {
            receiver.chunks.insert(index, chunk);
        }
        self.log.duplicates += usize::from(had);
        receiver.grants.received(index, self.now);
        if restart {
            receiver.grants.restart(self.now);
        }
    }

    fn send_chunk(&mut self, to: usize, index: u32, chunk: &Bytes) {
        let copies = self.send(to, self.receivers[to].link.chunk_time, |to| {
            let chunk = chunk.clone();
            Arrival::Chunk { to, index, chunk }
        });
        let receiver = &mut self.receivers[to];
        receiver.in_flight += copies;
        self.log.in_flight_max[to] = self.log.in_flight_max[to].max(receiver.in_flight);
    }

    /// Sends over receiver `number`'s link; returns how many copies will arrive.
    fn send(&mut self, number: usize, occupies: Duration, arrival: impl Fn(usize) -> Arrival) -> usize {
        let Receiver { link, link_free, .. } = &mut self.receivers[number];
        *link_free = self.now.max(*link_free) + occupies;
        let sent = if occupies.is_zero() { self.now } else { *link_free };
        let lost = self.rng.random_bool(link.loss);
        let copies = if lost { 0 } else { 1 + usize::from(self.rng.random_bool(link.duplication)) };
        for _ in 0..copies {
            let delay = self.rng.random_range(link.delay_ms.0..=link.delay_ms.1);
            self.sent += 1;
            self.arrivals.insert((sent + Duration::from_millis(delay), self.sent), arrival(number));
        }
        copies
    }
}

proptest! {
    #![proptest_config(cases(512))]

    #[test]
    fn every_receiver_gets_the_blob_whatever_is_lost_reordered_or_repeated(
        chunks in 0..40usize,
        window in 1..12u32,
        links in prop::collection::vec(any_link(), 1..5),
        restarts in prop_oneof![Just(0.0), 0.0..0.05],
        seed in any::<u64>(),
    ) {
        let mut transfer = Transfer::new(chunks, window, &links, seed);
        transfer.restarts = restarts;
        let (_, log) = transfer.run();
        let published: BTreeSet<_> = log.to_all.iter().collect();
        prop_assert_eq!(published.len(), log.to_all.len(), "a chunk was published to all twice");
        if links.len() == 1 {
            prop_assert!(log.to_all.is_empty());
        }
    }

    #[test]
    fn on_clean_links_each_chunk_is_published_once_to_all(
        chunks in 0..40usize,
        window in 1..12u32,
        delays in prop::collection::vec(1..20u64, 2..6),
        seed in any::<u64>(),
    ) {
        let links: Vec<_> = delays.iter().copied().map(Link::clean).collect();
        let transfer = Transfer::new(chunks, window, &links, seed);
        let expected: Vec<_> = (0..transfer.manifest.chunks()).collect();
        let (_, log) = transfer.run();
        prop_assert_eq!(log.to_all, expected);
        prop_assert_eq!(log.to_one, []);
        // The quickest sets the pace: what is under way to it, whoever granted it, has not reached that one either.
        let quickest = (0..links.len()).min_by_key(|&to| delays[to]).unwrap();
        prop_assert!(log.in_flight_max[quickest] <= window as usize * links.len());
    }

    #[test]
    fn on_a_link_that_keeps_order_nothing_is_sent_beyond_the_window_or_twice_for_nothing(
        chunks in 0..60usize,
        window in 1..12u32,
        loss in 0.0..0.3,
        delay_ms in 1..20u64,
        seed in any::<u64>(),
    ) {
        let link = Link { loss, ..Link::clean(delay_ms) };
        let transfer = Transfer::new(chunks, window, &[link], seed);
        let (_, log) = transfer.run();
        prop_assert!(log.in_flight_max[0] <= window as usize);
        prop_assert_eq!(log.duplicates, 0, "a chunk was granted again that was not lost");
    }

    #[test]
    fn a_slow_link_is_not_filled_with_repeats(
        chunks in 1..40usize,
        window in 1..8u32,
        retries_a_chunk in 2..12u32,
        seed in any::<u64>(),
    ) {
        let link = Link { chunk_time: retries_a_chunk * RETRY, ..Link::clean(5) };
        let transfer = Transfer::new(chunks, window, &[link], seed);
        let chunks = transfer.manifest.chunks() as usize;
        let (_, log) = transfer.run();
        // Until the first chunk tells the pace, each doubling of the retry time repeats the window.
        let repeats = (retries_a_chunk + 2).ilog2() as usize * window as usize;
        prop_assert!(log.to_one.len() <= chunks + repeats, "{} sends of {chunks} chunks", log.to_one.len());
    }

    #[test]
    fn a_receiver_that_misses_what_all_get_is_served_alone_and_does_not_hold_up_the_rest(
        chunks in 1..40usize,
        window in 1..12u32,
        delays in prop::collection::vec(1..20u64, 2..5),
        seed in any::<u64>(),
    ) {
        let mut links: Vec<_> = delays.into_iter().map(Link::clean).collect();
        let (alone, _) = Transfer::new(chunks, window, &links, seed).run();
        links.push(Link { deafness: 1.0, ..Link::clean(20) });
        let (finished, log) = Transfer::new(chunks, window, &links, seed).run();
        let deaf = links.len() - 1;
        for (with, without) in finished.iter().zip(&alone) {
            prop_assert!(with <= without, "{with:?} with the deaf receiver, {without:?} without it");
        }
        prop_assert!(log.to_one.iter().all(|(to, _)| *to == deaf));
        let served: BTreeSet<_> = log.to_one.iter().map(|(_, index)| index).collect();
        prop_assert_eq!(served.len(), chunks.min(log.to_all.len()));
        prop_assert_eq!(served.len(), log.to_one.len(), "a chunk was sent to it twice");
    }

    #[test]
    fn a_throttled_receiver_gets_every_chunk_through_a_broker_that_keeps_few_and_slows_nobody(
        chunks in 10..60usize,
        window in 2..8u32,
        delays in prop::collection::vec(1..20u64, 2..5),
        times_slower in 2..20u32,
        seed in any::<u64>(),
    ) {
        let mut links: Vec<_> = delays.into_iter().map(Link::clean).collect();
        let (alone, _) = Transfer::new(chunks, window, &links, seed).run();
        let room = 2 * window as usize;
        let chunk_time = times_slower * Duration::from_millis(20);
        links.push(Link { chunk_time, room, ..Link::clean(20) });
        // Each run ends when every receiver has every chunk.
        let (finished, log) = Transfer::new(chunks, window, &links, seed).run();
        let slow = links.len() - 1;
        for (with, without) in finished.iter().zip(&alone) {
            prop_assert!(with <= without, "{with:?} with the throttled receiver, {without:?} without it");
        }
        prop_assert!(log.to_one.iter().all(|(to, _)| *to == slow), "somebody else had to ask twice");
    }

    #[test]
    fn whoever_stalls_is_sent_what_it_granted_and_no_more_while_the_others_go_on(
        chunks in 20..200u32,
        window in 1..8u32,
    ) {
        let (mut serve, now) = (Serve::new(chunks, RETRY), Instant::now());
        let of = |range: std::ops::Range<u32>| ChunkSet::new(range).unwrap();
        let mut sends = serve.granted(&peer(0), &of(0..window), now, false);
        prop_assert_eq!(sends.len(), window as usize);
        for at in 0..chunks {
            sends.extend(serve.granted(&peer(1), &of(at..at + 1), now, false));
        }
        let to = |number| sends.iter().filter(|(_, route)| *route == Route::One(peer(number))).count();
        prop_assert_eq!((to(0), to(1)), (window as usize, chunks as usize));
    }

    #[test]
    fn what_all_pulls_have_in_flight_or_in_memory_is_bounded_however_slow_the_disk(
        lengths in prop::collection::vec(1..20u64, 1..20),
        chunk_kib in prop::sample::select(vec![256u32, 512, 1024]),
        slowness in 0.05..0.95f64,
        seed in any::<u64>(),
    ) {
        let chunk_bytes = chunk_kib << 10;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let blob = |(number, chunks): (usize, &u64)| {
            let bytes = chunks * u64::from(chunk_bytes);
            let digest = Digest::of(&number.to_le_bytes());
            (Manifest { digest, bytes, chunk_bytes, codec: Codec::F32, base: None }, peer(number))
        };
        let mut needed: Vec<_> = lengths.iter().enumerate().map(blob).collect();
        let (mut pulls, now) = (Pulls::default(), Instant::now());
        let chunk = Bytes::from(vec![0; chunk_bytes as usize]);
        let (mut in_flight, mut unkept, mut left) = (Vec::new(), Vec::new(), BTreeMap::new());
        while !needed.is_empty() {
            let wanted = |(manifest, holder)| Wanted { manifest, holders: vec![holder], keep: Keep::Durable };
            let chosen = pulls.fitting(needed.clone()).map(wanted).collect();
            pulls.want(chosen, RETRY, now);
            for (_, blob, set) in pulls.grants(now) {
                in_flight.extend(set.iter().map(|index| (blob, index)));
            }
            for intake in pulls.intakes() {
                match intake {
                    Intake::Begin(manifest, _) => _ = left.insert(manifest.digest, manifest.chunks()),
                    Intake::Chunk { blob, .. } => unkept.push(blob),
                    Intake::Abandon(blob) => prop_assert!(false, "{blob} was abandoned"),
                }
            }
            let bytes = (in_flight.len() + unkept.len()) as u64 * u64::from(chunk_bytes);
            prop_assert!(bytes <= GATHER_BYTES + 2 * u64::from(WINDOW_BYTES), "{bytes} bytes of {} blobs", left.len());
            if !in_flight.is_empty() && (unkept.is_empty() || rng.random_bool(slowness)) {
                // Each holder keeps order.
                let (holder, _) = in_flight[rng.random_range(0..in_flight.len())];
                let first = in_flight.iter().position(|(blob, _)| *blob == holder).unwrap();
                let (blob, index) = in_flight.remove(first);
                pulls.arrived(blob, index, chunk.clone(), now).unwrap();
            } else {
                prop_assert!(!unkept.is_empty(), "nothing is on its way, and {} blobs are wanted", needed.len());
                let blob = unkept.remove(0);
                pulls.kept(&blob);
                let left = left.get_mut(&blob).expect("it was begun");
                *left -= 1;
                if *left == 0 {
                    pulls.ended(&blob);
                    needed.retain(|(manifest, _)| manifest.digest != blob);
                }
            }
        }
        prop_assert!(pulls.is_empty() && in_flight.is_empty());
    }

    #[test]
    fn split_and_assemble_are_inverses_in_any_order(
        (bytes, order) in (0..30_000usize).prop_flat_map(|bytes| {
            let chunks = bytes.div_ceil(CHUNK_BYTES_MIN as usize) as u32;
            let twice: Vec<u32> = (0..chunks).chain(0..chunks).collect();
            (Just(bytes), Just(twice).prop_shuffle())
        }),
        seed in any::<u64>(),
    ) {
        let blob = random_blob(bytes, seed);
        let manifest = Manifest::of(&blob, CHUNK_BYTES_MIN, Codec::F32).unwrap();
        let mut assembly = Assembly::new(manifest);
        let mut missing: BTreeSet<_> = (0..manifest.chunks()).collect();
        let mut chunks = BTreeMap::new();
        for index in order {
            let chunk = manifest.chunk(&blob, index).unwrap();
            let inserted = assembly.insert(index, chunk.len());
            let expected = if missing.remove(&index) { Inserted::New } else { Inserted::Duplicate };
            prop_assert_eq!(inserted, Ok(expected));
            chunks.insert(index, chunk);
            prop_assert!((0..manifest.chunks()).all(|index| assembly.has(index) != missing.contains(&index)));
            prop_assert_eq!(assembly.missing() as usize, missing.len());
            prop_assert_eq!(assembly.prefix(), missing.first().copied().unwrap_or(manifest.chunks()));
            prop_assert_eq!(assembly.is_complete(), missing.is_empty());
        }
        prop_assert_eq!(chunks.into_values().collect::<Vec<_>>().concat(), blob);
    }

    #[test]
    fn a_damaged_chunk_is_noticed(values in 1..3_000usize, at in any::<prop::sample::Index>(), seed in any::<u64>()) {
        let layout = Arc::new(layout(values));
        let row = (0..values).map(|i| (i as f32 + seed as f32).sin()).collect();
        let blob = Codec::F32.encode(&Weights::new(layout.clone(), row).unwrap(), &TUNING).unwrap();
        let manifest = Manifest::of(&blob, CHUNK_BYTES_MIN, Codec::F32).unwrap();
        let verify = |bytes: &[u8]| {
            let mut verifier = Verifier::new(manifest, layout.clone(), None)?;
            bytes.chunks(CHUNK_BYTES_MIN as usize).try_for_each(|chunk| verifier.extend(chunk))?;
            verifier.finish()
        };
        prop_assert_eq!(verify(&blob), Ok(()));
        let mut damaged = blob.to_vec();
        damaged[at.index(blob.len())] ^= 1;
        prop_assert!(verify(&damaged).is_err());
    }
}

proptest! {
    #![proptest_config(cases(1024))]

    #[test]
    fn whoever_asks_twice_is_answered_and_nothing_is_published_to_all_twice(
        asks in prop::collection::vec((0..4usize, prop::collection::btree_set(0..10u32, 1..6), 0..150u64), 1..60),
        several in any::<bool>(),
    ) {
        let (mut serve, mut now) = (Serve::new(10, RETRY), Instant::now());
        let (mut to_all, mut asked) = (BTreeSet::new(), BTreeSet::new());
        for (from, indices, later_ms) in asks {
            now += Duration::from_millis(later_ms);
            let set = ChunkSet::new(indices.iter().copied()).unwrap();
            let sends: BTreeMap<_, _> = serve.granted(&peer(from), &set, now, several).into_iter().collect();
            for index in indices {
                match sends.get(&index) {
                    Some(Route::All) => prop_assert!(several && to_all.insert(index)),
                    Some(Route::One(to)) => prop_assert_eq!(to, &peer(from)),
                    None => prop_assert!(!asked.contains(&(from, index)) && to_all.contains(&index)),
                }
                asked.insert((from, index));
            }
        }
    }
}
