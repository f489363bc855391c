//! The arithmetic of a round, one kernel at a time: what `make bench` prints as MB/s of weights.
//!
//! `cargo bench --bench kernels -- mean` runs those whose name has `mean` in it.

use std::sync::Arc;

use bytes::Bytes;
use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use rodizio::aggregation::{Contribution, Parameters, Share, Strategy};
use rodizio::transfer::{Codec, Manifest, Tuning, Verifier};
use rodizio::types::Digest;
use rodizio::weights::{Layout, TensorSpec, Weights};

/// A model that fits a cache, and one that does not: 1 MB and 64 MB of values.
const VALUES: [usize; 2] = [250_000, 16_000_000];

const CHUNK_BYTES: u32 = 512 * 1024;

const TUNING: Tuning = Tuning { seed: 0, topk_ratio: 0.01 };

fn main() {
    divan::main();
}

fn weights(values: usize, seed: usize) -> Weights {
    let layout = Layout { tensors: vec![TensorSpec { name: "w".into(), shape: vec![values] }] };
    let row = (0..values).map(|i| ((i * 7919 + seed) % 65_521) as f32 / 65_521.0 - 0.5).collect();
    Weights::new(Arc::new(layout), row).expect("as many values as the layout has")
}

fn blob(values: usize) -> Bytes {
    Codec::F32.encode(&weights(values, 0), &TUNING).expect("every codec writes finite values")
}

fn bytes(values: usize) -> BytesCount {
    BytesCount::new(values * size_of::<f32>())
}

/// The mean of four updates, as long as shown.
#[divan::bench(args = VALUES)]
fn mean_of_4(bencher: Bencher<'_, '_>, values: usize) {
    aggregate_4(bencher, "fedavg", values);
}

/// Every strategy, over four updates of 64 MB.
#[divan::bench(args = Strategy::NAMES)]
fn strategy_of_4(bencher: Bencher<'_, '_>, name: &str) {
    aggregate_4(bencher, name, 16 << 20);
}

fn aggregate_4(bencher: Bencher<'_, '_>, name: &str, values: usize) {
    let strategy = Strategy::named(name, &Parameters::default()).expect("the names are those of the strategies");
    let layout = weights(values, 0).layout().clone();
    let update = |seed| {
        let mut row = weights(values, seed).into_values();
        row.resize(strategy.update_layout(&layout).len(), 0.0);
        Weights::new(strategy.update_layout(&layout), row).expect("as many values as the layout has")
    };
    let updates: Vec<Weights> = (1..5).map(update).collect();
    let share = Share::of(100);
    let contributions: Vec<_> = updates.iter().map(|weights| Contribution { share, weights }).collect();
    let parent = strategy.initial(weights(values, 0));
    bencher.counter(bytes(4 * values)).bench_local(|| strategy.aggregate(&layout, &parent, black_box(&contributions)));
}

/// What each codec makes of 64 MB of values, and back.
#[divan::bench(args = Codec::ALL)]
fn encode(bencher: Bencher<'_, '_>, codec: Codec) {
    let weights = weights(VALUES[1], 0);
    bencher.counter(bytes(VALUES[1])).bench_local(|| codec.encode(black_box(&weights), &TUNING));
}

#[divan::bench(args = Codec::ALL)]
fn decode(bencher: Bencher<'_, '_>, codec: Codec) {
    let weights = weights(VALUES[1], 0);
    let blob = codec.encode(&weights, &TUNING).expect("every codec writes finite values");
    bencher.counter(bytes(VALUES[1])).bench_local(|| codec.decode(black_box(&blob), weights.layout()));
}

#[divan::bench(args = VALUES)]
fn hash(bencher: Bencher<'_, '_>, values: usize) {
    let blob = blob(values);
    bencher.counter(bytes(values)).bench_local(|| Digest::of(black_box(&blob)));
}

/// A blob in chunks: its digest, and whether every value is finite.
#[divan::bench(args = VALUES)]
fn verify(bencher: Bencher<'_, '_>, values: usize) {
    let blob = blob(values);
    let manifest = Manifest::of(&blob, CHUNK_BYTES, Codec::F32).expect("chunks within bounds");
    let layout = weights(values, 0).layout().clone();
    bencher.counter(bytes(values)).bench_local(|| {
        let mut verifier = Verifier::new(manifest, layout.clone(), None).expect("the blob is of this layout");
        black_box(&blob).chunks(CHUNK_BYTES as usize).for_each(|chunk| verifier.extend(chunk).expect("it is whole"));
        verifier.finish()
    });
}

/// Looks at every value.
#[divan::bench(args = VALUES)]
fn first_non_finite(bencher: Bencher<'_, '_>, values: usize) {
    let weights = weights(values, 0);
    bencher.counter(bytes(values)).bench_local(|| black_box(&weights).first_non_finite().is_some());
}
