//! One data set shared out among peers, for runs where one machine plays all of them.

use std::fmt;

use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Gamma};

use super::dataset::by_label;
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
    /// An `alpha` that is no Dirichlet parameter.
    #[error("alpha = {0}: must be a number above 0, such as 0.3")]
    Alpha(f64),
}

impl Partition {
    /// The names of all kinds.
    pub const NAMES: &'static [&'static str] = &["iid", "dirichlet"];

    /// The kind with this name. `alpha` is used by `dirichlet` alone, and checked by
    /// [`partition`](Self::partition).
    pub fn named(name: &str, alpha: f64) -> Result<Self, UnknownName> {
        match name {
            "iid" => Ok(Self::Iid),
            "dirichlet" => Ok(Self::Dirichlet { alpha }),
            _ => Err(UnknownName::new("partition", name, Self::NAMES)),
        }
    }

    /// The name, without `alpha`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Iid => "iid",
            Self::Dirichlet { .. } => "dirichlet",
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
        let shares = shares(peers, gamma, rng);
        let (mut sum, mut start) = (0.0, 0);
        for (part, share) in parts.iter_mut().zip(shares) {
            sum += share;
            let end = ((sum * indices.len() as f64).round() as usize).clamp(start, indices.len());
            part.extend_from_slice(&indices[start..end]);
            start = end;
        }
        // Shares that add up to a little less than 1 may leave an example over.
        parts[peers - 1].extend_from_slice(&indices[start..]);
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
mod tests {
    use super::*;
    use crate::training::dataset::Dataset;
    use proptest::prelude::*;

    const DIRICHLET: Partition = Partition::Dirichlet { alpha: 0.3 };

    fn kinds() -> impl Strategy<Value = Partition> {
        let alphas =
            prop_oneof![0.01..10.0f64, Just(f64::MIN_POSITIVE), Just(1e-300), Just(1e-3), Just(1e300), Just(f64::MAX)];
        prop_oneof![Just(Partition::Iid), alphas.prop_map(|alpha| Partition::Dirichlet { alpha })]
    }

    proptest! {
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
        for name in Partition::NAMES {
            assert_eq!(Partition::named(name, 0.3).unwrap().name(), *name);
        }
        assert_eq!(Partition::named("dirichlet", 0.3), Ok(DIRICHLET));
        assert_eq!(DIRICHLET.to_string(), "dirichlet(0.3)");
        assert!(Partition::named("sorted", 0.3).unwrap_err().to_string().ends_with("use iid or dirichlet"));
    }

    #[test]
    fn a_histogram_counts_the_chosen_examples() {
        assert_eq!(histogram(&[0, 2, 2, 1], &[1, 2, 3], 4), [0, 1, 2, 0]);
    }
}
