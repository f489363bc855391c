//! Random numbers that are a function of the seed and of what they are for.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::types::Digest;

/// The generator for one purpose, which `purpose` names together with the seed.
///
/// Two purposes never share a stream, and no generator is shared: peers that live in one process would otherwise
/// change each other's numbers.
pub(super) fn generator(purpose: &str) -> ChaCha8Rng {
    ChaCha8Rng::from_seed(Digest::of(purpose.as_bytes()).0)
}
