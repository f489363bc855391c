//! The phases, one file each, in the order in which a round goes through them.

mod commit;
mod elect;
mod evaluate;
mod finish;
mod gather;
pub(super) mod genesis;
mod hello;
mod propose;
pub(super) mod round;
mod standbys;
mod train;
pub(super) mod transfer;
mod waiting;
