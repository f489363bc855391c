//! Loopback hosts of a test's own: a port that is free there stays free until the test listens on it.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU32, Ordering};

/// A host where nobody else takes a port: it is made of this process's number, which has 22 bits. A process has four of
/// them, in turn.
pub(crate) fn own_host() -> Ipv4Addr {
    static CALLS: AtomicU32 = AtomicU32::new(0);
    if cfg!(not(target_os = "linux")) {
        // Others have one loopback address alone.
        return Ipv4Addr::LOCALHOST;
    }
    let number = std::process::id() * 4 + CALLS.fetch_add(1, Ordering::Relaxed) % 4;
    let [_, high, middle, low] = number.to_be_bytes();
    Ipv4Addr::new(127, high, middle, low)
}
