//! Federated learning without a server: the peers take turns to aggregate.

pub mod aggregation;
pub mod broker;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod events;
pub mod jobs;
pub mod journal;
pub mod node;
pub mod peer;
pub mod protocol;
pub mod rundir;
pub mod sim;
pub mod training;
pub mod transfer;
pub mod transport;
pub mod types;
pub mod weights;
