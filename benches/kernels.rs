//! The arithmetic of a round, one kernel at a time: what `make bench` prints as MB/s of weights.
//!
//! `cargo bench --bench kernels -- mean` runs those whose name has `mean` in it, and `-- --quick` all of them in short.

use std::cell::LazyCell;
use std::fmt::Display;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use rodizio::aggregation::{Contribution, Parameters, Share, Strategy};
use rodizio::transfer::{Codec, Manifest, Tuning, Verifier};
use rodizio::types::Digest;
use rodizio::weights::{Layout, TensorSpec, Weights};

/// A model that fits a cache, and one that does not: 1 MB and 64 MB of values.
const VALUES: [usize; 2] = [250_000, 16_000_000];

const CHUNK_BYTES: u32 = 512 * 1024;

const TUNING: Tuning = Tuning { seed: 0, topk_ratio: 0.01 };

type Group<'a> = BenchmarkGroup<'a, WallTime>;

fn main() {
    // Long enough for ten runs of all kernels but the slowest.
    let (warm_up, measurement) = (Duration::from_millis(500), Duration::from_secs(2));
    let criterion = Criterion::default().sample_size(10).warm_up_time(warm_up).measurement_time(measurement);
    let mut criterion = criterion.without_plots().configure_from_args();
    for kernel in [mean_of_4, strategy_of_4, encode, decode, hash, verify, first_non_finite] {
        kernel(&mut criterion);
    }
    criterion.final_summary();
}

/// The mean of four updates, as long as shown.
fn mean_of_4(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("mean_of_4");
    VALUES.into_iter().for_each(|values| add_aggregate_of_4(&mut group, values, "fedavg", values));
}

/// Every strategy, over four updates of 64 MB.
fn strategy_of_4(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("strategy_of_4");
    Strategy::NAMES.iter().for_each(|name| add_aggregate_of_4(&mut group, name, name, 16 << 20));
}

fn add_aggregate_of_4(group: &mut Group<'_>, parameter: impl Display, name: &str, values: usize) {
    let strategy = Strategy::named(name, &Parameters::default()).expect("the names are those of the strategies");
    let input = || {
        let model = weights(values, 0);
        let layout = strategy.update_layout(model.layout());
        let update = |seed| {
            let mut row = weights(values, seed).into_values();
            row.resize(layout.len(), 0.0);
            Weights::new(layout.clone(), row).expect("as many values as the layout has")
        };
        let updates: Vec<Weights> = (1..5).map(update).collect();
        (model.layout().clone(), strategy.initial(model), updates)
    };
    add(group, parameter, 4 * values, input, |(layout, parent, updates)| {
        let share = Share::of(100);
        let contributions: Vec<_> = updates.iter().map(|weights| Contribution { share, weights }).collect();
        strategy.aggregate(layout, parent, &contributions)
    });
}

/// What each codec makes of 64 MB of values, and back.
fn encode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("encode");
    for codec in Codec::ALL {
        add(&mut group, codec, VALUES[1], || weights(VALUES[1], 0), |weights| codec.encode(weights, &TUNING));
    }
}

fn decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode");
    for codec in Codec::ALL {
        let input = || (blob(codec, VALUES[1]), layout(VALUES[1]));
        add(&mut group, codec, VALUES[1], input, |(blob, layout)| codec.decode(blob, layout));
    }
}

fn hash(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("hash");
    for values in VALUES {
        add(&mut group, values, values, || blob(Codec::F32, values), |blob| Digest::of(blob));
    }
}

/// A blob in chunks: its digest, and whether every value is finite.
fn verify(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("verify");
    for values in VALUES {
        let input = || {
            let blob = blob(Codec::F32, values);
            (Manifest::of(&blob, CHUNK_BYTES, Codec::F32).expect("chunks within bounds"), layout(values), blob)
        };
        add(&mut group, values, values, input, |(manifest, layout, blob)| {
            let verifier = Verifier::new(*manifest, layout.clone(), None);
            let mut verifier = verifier.expect("the blob is of this layout");
            blob.chunks(CHUNK_BYTES as usize).for_each(|chunk| verifier.extend(chunk).expect("it is whole"));
            verifier.finish()
        });
    }
}

/// Looks at every value.
fn first_non_finite(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("first_non_finite");
    for values in VALUES {
        add(&mut group, values, values, || weights(values, 0), |weights| weights.first_non_finite().is_some());
    }
}

/// Adds a kernel, with the speed of so many values. Its input is made when it is run, and not in its time.
fn add<I, O>(
    group: &mut Group<'_>,
    parameter: impl Display,
    values: usize,
    input: impl FnOnce() -> I,
    kernel: impl Fn(&I) -> O,
) {
    let input = LazyCell::new(input);
    let bytes = Throughput::BytesDecimal((values * size_of::<f32>()) as u64);
    group.throughput(bytes).bench_function(BenchmarkId::from_parameter(parameter), |bencher| {
        let input = &*input;
        // What comes out may be long: it is dropped at once, and not in the kernel's time.
        bencher.iter_batched(|| black_box(input), &kernel, BatchSize::PerIteration);
    });
}

fn layout(values: usize) -> Arc<Layout> {
    Arc::new(Layout { tensors: vec![TensorSpec { name: "w".into(), shape: vec![values] }] })
}

fn weights(values: usize, seed: usize) -> Weights {
    let row = (0..values).map(|i| ((i * 7919 + seed) % 65_521) as f32 / 65_521.0 - 0.5).collect();
    Weights::new(layout(values), row).expect("as many values as the layout has")
}

fn blob(codec: Codec, values: usize) -> Bytes {
    codec.encode(&weights(values, 0), &TUNING).expect("every codec writes finite values")
}
