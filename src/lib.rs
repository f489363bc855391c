//! Federated learning without a server: the peers take turns to aggregate.

pub mod aggregation;
pub mod protocol;
pub mod training;
pub mod transfer;
pub mod types;
pub mod weights;
