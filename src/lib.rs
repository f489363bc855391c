//! Federated learning without a server: the peers take turns to aggregate.

pub mod cli;
pub mod config;
pub mod journal;
pub mod types;
pub mod weights;
