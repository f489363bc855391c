//! One data set shared out among peers, for runs where one machine plays all of them.

use std::fmt;

use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Gamma};

use super::dataset::{Dataset, Task, by_label};
use super::named::UnknownName;
use super::random::generator;

/// What a peer gets at least, if there are enough examples: one to train on, one to hold out.
pub const EXAMPLES_MIN: usize = 2;

/// How a data set is shared out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Partition {
    /// At random and evenly: every peer's data look alike (independent and identically distributed).
    #[default]
    Iid,
    /// Unevenly by label: for each label, the peers' shares are drawn from a symmetric Dirichlet distribution
    /// (Hsu, Qi and Brown, 2019, arXiv:1909.06335; per label as in Yurochkin et al., 2019, arXiv:1905.12022).
    Dirichlet {
        /// How even: 100 is close to [`Iid`](Self::Iid), 1 is skewed, 0.1 gives most peers only a few labels.
        alpha: f64,
    },
    /// So many labels a peer and no others, each label's examples shared out evenly among the peers that have it.
    Pathological {
        /// How many labels.
        classes_per_peer: usize,
    },
    /// Examples sorted by label and cut into equal shards, which are dealt out (McMahan et al., 2017, arXiv:1602.05629):
    /// most peers have about as many labels as shards.
    Shards {
        /// How many shards.
        shards_per_peer: usize,
    },
    /// At random, but unevenly: the k-th peer has a share that goes with k to the power of -`exponent`.
    PowerLaw {
        /// How uneven: 0 is even, 1 gives the first of ten peers ten times what the last one has.
        exponent: f64,
    },
}

/// The numbers that the kinds of partition take; each kind uses its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PartitionOptions {
    /// Of [`Partition::Dirichlet`].
    pub alpha: f64,
    /// Of [`Partition::Pathological`].
    pub classes_per_peer: usize,
    /// Of [`Partition::Shards`].
    pub shards_per_peer: usize,
    /// Of [`Partition::PowerLaw`].
    pub exponent: f64,
}

/// Why a data set cannot be shared out.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PartitionError {
    /// Nobody to share with.
    #[error("there is no peer to give the examples to")]
    NoPeers,
    /// Some peer would have nothing.
    #[error("{examples} examples cannot be shared out among {peers} peers: use at most {examples} peers")]
    TooManyPeers {
        /// How many peers there are.
        peers: usize,
        /// How many examples there are.
        examples: usize,
    },
    /// Fewer places for labels than labels.
    #[error(
        "{peers} peers of {classes_per_peer} classes each cannot hold {num_classes} classes: \
         raise classes_per_peer to {}", num_classes.div_ceil(*peers)
    )]
    Classes {
        /// How many peers there are.
        peers: usize,
        /// How many labels each has.
        classes_per_peer: usize,
        /// How many labels there are.
        num_classes: usize,
    },
    /// Examples without a class of their own, shared out by class.
    #[error("partition = {0}: the examples have no class each: use iid or power-law")]
    NoClasses(Partition),
    /// An `exponent` that is none.
    #[error("exponent = {0}: must be a number, 0 or above, such as 1.5")]
    Exponent(f64),
    /// An `alpha` that is no Dirichlet parameter.
    #[error("alpha = {0}: must be a number above 0, such as 0.3")]
    Alpha(f64),
}

impl Partition {
    /// The names of all kinds.
    pub const NAMES: &'static [&'static str] = &["iid", "dirichlet", "pathological", "shards", "power-law"];

    /// The kind with this name. Its number is checked by [`partition`](Self::partition).
    pub fn named(name: &str, options: &PartitionOptions) -> Result<Self, UnknownName> {
        let PartitionOptions { alpha, classes_per_peer, shards_per_peer, exponent } = *options;
        match name {
            "iid" => Ok(Self::Iid),
            "dirichlet" => Ok(Self::Dirichlet { alpha }),
            "pathological" => Ok(Self::Pathological { classes_per_peer }),
            "shards" => Ok(Self::Shards { shards_per_peer }),
            "power-law" => Ok(Self::PowerLaw { exponent }),
            _ => Err(UnknownName::new("partition", name, Self::NAMES)),
        }
    }

    /// The name, without its number.
    pub fn name(self) -> &'static str {
        match self {
            Self::Iid => "iid",
            Self::Dirichlet { .. } => "dirichlet",
            Self::Pathological { .. } => "pathological",
            Self::Shards { .. } => "shards",
            Self::PowerLaw { .. } => "power-law",
        }
    }

    /// The indices of each peer's examples of `data`: see [`partition`](Self::partition). Examples without a class of
    /// their own cannot be shared out by class.
    pub fn of(self, data: &Dataset, peers: usize, seed: u64) -> Result<Vec<Vec<usize>>, PartitionError> {
        match data.task() {
            Task::Classes(num_classes) => self.partition(data.labels(), num_classes, peers, seed),
            Task::Numbers | Task::Steps(_) => match self {
                Self::Iid | Self::PowerLaw { .. } => self.partition(&vec![0; data.len()], 1, peers, seed),
                _ => Err(PartitionError::NoClasses(self)),
            },
        }
    }

    /// The indices of each peer's examples, in random order.
    ///
    /// Every example goes to exactly one peer, and every peer gets at least [`EXAMPLES_MIN`] (1 where there are
    /// not enough). The result is a function of the arguments.
    ///
    /// # Panics
    ///
    /// If a label is not below `num_classes`.
    pub fn partition(
        self,
        labels: &[u32],
        num_classes: usize,
        peers: usize,
        seed: u64,
    ) -> Result<Vec<Vec<usize>>, PartitionError> {
        let examples = labels.len();
        if peers == 0 {
            return Err(PartitionError::NoPeers);
        }
        if peers > examples {
            return Err(PartitionError::TooManyPeers { peers, examples });
        }
        let mut rng = generator(&format!("partition, seed {seed}"));
        let mut parts = match self {
            Self::Iid => even(examples, peers, &mut rng),
            Self::Dirichlet { alpha } => skewed(labels, num_classes, peers, &gamma(alpha)?, &mut rng),
            Self::Pathological { classes_per_peer } => {
                few_classes(labels, num_classes, peers, classes_per_peer, &mut rng)?
            }
            Self::Shards { shards_per_peer } => shards(labels, num_classes, peers, shards_per_peer.max(1), &mut rng),
            Self::PowerLaw { exponent } => power_law(examples, peers, exponent, &mut rng)?,
        };
        for part in &mut parts {
            part.shuffle(&mut rng);
        }
        level(&mut parts, EXAMPLES_MIN.min(examples / peers));
        Ok(parts)
    }
}

impl fmt::Display for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Iid => f.pad(self.name()),
            Self::Dirichlet { alpha } => f.pad(&format!("dirichlet({alpha})")),
            Self::Pathological { classes_per_peer: number } | Self::Shards { shards_per_peer: number } => {
                f.pad(&format!("{}({number})", self.name()))
            }
            Self::PowerLaw { exponent } => f.pad(&format!("power-law({exponent})")),
        }
    }
}

/// How many of the examples at `indices` have each label.
///
/// # Panics
///
/// If an index is not below `labels.len()` or a label not below `num_classes`.
pub fn histogram(labels: &[u32], indices: &[usize], num_classes: usize) -> Vec<usize> {
    let mut counts = vec![0; num_classes];
    for &index in indices {
        counts[labels[index] as usize] += 1;
    }
    counts
}

/// Cuts a row into pieces that grow with `weights`, none of which is left out.
fn cut(row: &[usize], weights: &[f64]) -> Vec<Vec<usize>> {
    let total: f64 = weights.iter().sum();
    let (mut sum, mut start) = (0.0, 0);
    let last = weights.len() - 1;
    let pieces = weights.iter().enumerate().map(|(index, weight)| {
        sum += weight;
        let end = ((sum / total * row.len() as f64).round() as usize).clamp(start, row.len());
        // Shares that add up to a little less than 1 may leave an example over.
        let end = if index == last { row.len() } else { end };
        row[std::mem::replace(&mut start, end)..end].to_vec()
    });
    pieces.collect()
}

/// Labels in random order go round the peers, so that each label is at as many of them as any other, or at one more.
fn few_classes(
    labels: &[u32],
    num_classes: usize,
    peers: usize,
    classes_per_peer: usize,
    rng: &mut ChaCha8Rng,
) -> Result<Vec<Vec<usize>>, PartitionError> {
    let groups: Vec<Vec<usize>> = by_label(labels, num_classes).into_iter().filter(|group| !group.is_empty()).collect();
    let num_classes = groups.len();
    let each = classes_per_peer.min(num_classes);
    if peers.saturating_mul(each) < num_classes {
        return Err(PartitionError::Classes { peers, classes_per_peer, num_classes });
    }
    let mut order: Vec<usize> = (0..num_classes).collect();
    order.shuffle(rng);
    let mut parts = vec![Vec::new(); peers];
    for (place, &class) in order.iter().enumerate() {
        let mut group = groups[class].clone();
        group.shuffle(rng);
        let places = (0..peers * each).filter(|at| at % num_classes == place);
        let holders: Vec<usize> = places.map(|at| at / each).collect();
        for (holder, piece) in holders.iter().zip(cut(&group, &vec![1.0; holders.len()])) {
            parts[*holder].extend(piece);
        }
    }
    Ok(parts)
}

fn shards(
    labels: &[u32],
    num_classes: usize,
    peers: usize,
    shards_per_peer: usize,
    rng: &mut ChaCha8Rng,
) -> Vec<Vec<usize>> {
    let mut sorted = Vec::with_capacity(labels.len());
    for mut group in by_label(labels, num_classes) {
        group.shuffle(rng);
        sorted.extend(group);
    }
    // No more shards than examples: further ones would be empty.
    let each = shards_per_peer.min(labels.len().div_ceil(peers));
    let mut shards = cut(&sorted, &vec![1.0; peers * each]);
    shards.shuffle(rng);
    shards.chunks(each).map(<[Vec<usize>]>::concat).collect()
}

fn power_law(
    examples: usize,
    peers: usize,
    exponent: f64,
    rng: &mut ChaCha8Rng,
) -> Result<Vec<Vec<usize>>, PartitionError> {
    if !(exponent.is_finite() && exponent >= 0.0) {
        return Err(PartitionError::Exponent(exponent));
    }
    let mut order: Vec<usize> = (0..examples).collect();
    order.shuffle(rng);
    let weights: Vec<f64> = (1..=peers).map(|peer| (peer as f64).powf(-exponent)).collect();
    Ok(cut(&order, &weights))
}

fn even(examples: usize, peers: usize, rng: &mut ChaCha8Rng) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..examples).collect();
    order.shuffle(rng);
    let end = |peer: usize| (peer * (examples / peers)) + peer.min(examples % peers);
    (0..peers).map(|peer| order[end(peer)..end(peer + 1)].to_vec()).collect()
}

fn skewed(
    labels: &[u32],
    num_classes: usize,
    peers: usize,
    gamma: &Gamma<f64>,
    rng: &mut ChaCha8Rng,
) -> Vec<Vec<usize>> {
    let mut parts = vec![Vec::new(); peers];
    for mut indices in by_label(labels, num_classes) {
        indices.shuffle(rng);
        let pieces = cut(&indices, &shares(peers, gamma, rng));
        parts.iter_mut().zip(pieces).for_each(|(part, piece)| part.extend(piece));
    }
    parts
}

/// Gamma variates, which make a Dirichlet variate when divided by their sum.
fn gamma(alpha: f64) -> Result<Gamma<f64>, PartitionError> {
    if !(alpha.is_finite() && alpha > 0.0) {
        return Err(PartitionError::Alpha(alpha));
    }
    // Shares are even to nine digits from here on, and the sum of larger variates could overflow.
    let alpha = alpha.min(1e18);
    Gamma::new(alpha, 1.0).map_err(|_| PartitionError::Alpha(alpha))
}

fn shares(peers: usize, gamma: &Gamma<f64>, rng: &mut ChaCha8Rng) -> Vec<f64> {
    let mut shares: Vec<f64> = (0..peers).map(|_| gamma.sample(rng)).collect();
    let sum: f64 = shares.iter().sum();
    if sum < f64::MIN_POSITIVE {
        // All variates of a tiny alpha may vanish. Its limit gives everything to one peer.
        shares.fill(0.0);
        shares[rng.random_range(0..peers)] = 1.0;
        return shares;
    }
    shares.iter().map(|share| share / sum).collect()
}

/// Moves examples from the largest part to the smallest until none has fewer than `least`.
///
/// Drawing again instead might never end. Each move takes one off what is missing, and while something is, the
/// largest part has more than `least`: there are `least` × peers examples or more.
fn level(parts: &mut [Vec<usize>], least: usize) {
    while let Some(smallest) = (0..parts.len()).min_by_key(|&peer| parts[peer].len()) {
        if parts[smallest].len() >= least {
            return;
        }
        let largest = (0..parts.len()).max_by_key(|&peer| parts[peer].len()).expect("there is a smallest part");
        let example = parts[largest].pop().expect("the largest part holds more than `least`");
        parts[smallest].push(example);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    /// The same cases on every run, also for the readers of data sets.
    pub(crate) fn cases() -> ProptestConfig {
        let rng_seed = RngSeed::Fixed(0x0d12_1021_0000_0003);
        ProptestConfig { rng_seed, failure_persistence: None, ..ProptestConfig::default() }
    }

    const DIRICHLET: Partition = Partition::Dirichlet { alpha: 0.3 };

    fn kinds() -> impl Strategy<Value = Partition> {
        let alphas =
            prop_oneof![0.01..10.0f64, Just(f64::MIN_POSITIVE), Just(1e-300), Just(1e-3), Just(1e300), Just(f64::MAX)];
        prop_oneof![
            Just(Partition::Iid),
            alphas.prop_map(|alpha| Partition::Dirichlet { alpha }),
            (4usize..6).prop_map(|classes_per_peer| Partition::Pathological { classes_per_peer }),
            (1usize..9).prop_map(|shards_per_peer| Partition::Shards { shards_per_peer }),
            (0.0..50.0f64).prop_map(|exponent| Partition::PowerLaw { exponent }),
        ]
    }

    proptest! {
        #![proptest_config(cases())]

        #[test]
        fn every_example_goes_to_one_peer_and_no_peer_is_left_out(
            kind in kinds(),
            labels in prop::collection::vec(0u32..4, 1..200),
            peers in 1usize..40,
            seed: u64,
        ) {
            let parts = kind.partition(&labels, 4, peers, seed);
            if peers > labels.len() {
                prop_assert_eq!(parts, Err(PartitionError::TooManyPeers { peers, examples: labels.len() }));
                return Ok(());
            }
            let parts = parts.unwrap();
            let least = if labels.len() >= 2 * peers { 2 } else { 1 };
            prop_assert_eq!(parts.len(), peers);
            prop_assert!(parts.iter().all(|part| part.len() >= least));
            let mut all = parts.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..labels.len()).collect::<Vec<_>>());
        }

        #[test]
        fn a_partition_is_drawn_by_its_seed(kind in kinds(), seed: u64) {
            let labels: Vec<u32> = (0..200).map(|index| index % 4).collect();
            let parts = kind.partition(&labels, 4, 5, seed);
            prop_assert_eq!(&parts, &kind.partition(&labels, 4, 5, seed));
            prop_assert_ne!(&parts, &kind.partition(&labels, 4, 5, seed.wrapping_add(1)));
        }
    }

    #[test]
    fn even_parts_differ_by_one_example_at_most() {
        let digits = Dataset::digits();
        let parts = Partition::Iid.partition(digits.labels(), 10, 5, 1).unwrap();
        let sizes: Vec<usize> = parts.iter().map(Vec::len).collect();
        assert_eq!(sizes, [360, 360, 359, 359, 359]);
        for part in &parts {
            assert!(histogram(digits.labels(), part, 10).iter().all(|&count| count > 15));
        }
    }

    #[test]
    fn a_small_alpha_skews_more_than_a_large_one() {
        let digits = Dataset::digits();
        let rarest = |alpha| {
            let parts = Partition::Dirichlet { alpha }.partition(digits.labels(), 10, 5, 1).unwrap();
            let rare = parts.iter().map(|part| histogram(digits.labels(), part, 10).into_iter().min().unwrap());
            rare.sum::<usize>()
        };
        assert!(rarest(0.1) < rarest(1.0));
        assert!(rarest(1.0) < rarest(100.0));
    }

    /// How many labels each of five peers has of the digits, and how many examples.
    fn spread(partition: Partition) -> (Vec<usize>, Vec<usize>) {
        let digits = Dataset::digits();
        let parts = partition.of(&digits, 5, 1).unwrap();
        let labels =
            |part: &Vec<usize>| histogram(digits.labels(), part, 10).iter().filter(|&&count| count > 0).count();
        (parts.iter().map(labels).collect(), parts.iter().map(Vec::len).collect())
    }

    #[test]
    fn a_pathological_partition_gives_each_peer_a_few_labels() {
        let (labels, sizes) = spread(Partition::Pathological { classes_per_peer: 2 });
        assert_eq!(labels, [2; 5]);
        assert!(sizes.iter().all(|&size| size > 340));
        assert_eq!(spread(Partition::Pathological { classes_per_peer: 3 }).0, [3; 5]);
        let error = Partition::Pathological { classes_per_peer: 1 }.of(&Dataset::digits(), 5, 1).unwrap_err();
        assert!(error.to_string().ends_with("raise classes_per_peer to 2"), "{error}");
    }

    #[test]
    fn shards_are_of_few_labels_and_equal_size() {
        let (labels, sizes) = spread(Partition::Shards { shards_per_peer: 2 });
        assert!(labels.iter().all(|&labels| labels <= 4), "{labels:?}");
        assert!(sizes.iter().all(|&size| (358..=361).contains(&size)), "{sizes:?}");
    }

    #[test]
    fn a_power_law_skews_sizes_and_not_labels() {
        let (labels, sizes) = spread(Partition::PowerLaw { exponent: 1.0 });
        assert_eq!(labels, [10; 5]);
        assert_eq!(sizes, [787, 394, 262, 197, 157]);
        assert!(Partition::PowerLaw { exponent: -1.0 }.of(&Dataset::digits(), 5, 1).is_err());
    }

    #[test]
    fn numbers_are_not_shared_out_by_class() {
        let data = Dataset::of(vec![0.0; 10], &[1], crate::training::Targets::Numbers(vec![0.0; 10])).unwrap();
        assert_eq!(Partition::Iid.of(&data, 2, 1).unwrap().concat().len(), 10);
        assert_eq!(DIRICHLET.of(&data, 2, 1), Err(PartitionError::NoClasses(DIRICHLET)));
    }

    #[test]
    fn an_alpha_that_is_no_parameter_is_refused() {
        for alpha in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let error = Partition::Dirichlet { alpha }.partition(&[0, 1], 2, 2, 1).unwrap_err();
            assert!(matches!(error, PartitionError::Alpha(_)), "{alpha}");
        }
        assert_eq!(DIRICHLET.partition(&[0, 1], 2, 0, 1), Err(PartitionError::NoPeers));
    }

    #[test]
    fn a_kind_has_a_name() {
        let options = PartitionOptions { alpha: 0.3, classes_per_peer: 2, shards_per_peer: 3, exponent: 1.5 };
        for name in Partition::NAMES {
            assert_eq!(Partition::named(name, &options).unwrap().name(), *name);
        }
        assert_eq!(Partition::named("dirichlet", &options), Ok(DIRICHLET));
        let texts: Vec<_> =
            Partition::NAMES.iter().map(|n| Partition::named(n, &options).unwrap().to_string()).collect();
        assert_eq!(texts, ["iid", "dirichlet(0.3)", "pathological(2)", "shards(3)", "power-law(1.5)"]);
        assert!(Partition::named("sorted", &options).unwrap_err().to_string().contains("use iid or dirichlet or "));
    }

    #[test]
    fn a_histogram_counts_the_chosen_examples() {
        assert_eq!(histogram(&[0, 2, 2, 1], &[1, 2, 3], 4), [0, 1, 2, 0]);
    }
}
