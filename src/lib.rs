//! Federated learning without a server: the peers take turns to aggregate.

pub mod broker;
pub mod transport;
pub mod types;
pub mod weights;
