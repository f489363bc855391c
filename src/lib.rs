//! Federated learning without a server: the peers take turns to aggregate.

pub mod training;
pub mod types;
pub mod weights;
