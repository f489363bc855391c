//! What a process has used so far, as Linux tells it; elsewhere it is not known.

use std::fs;

use serde::{Deserialize, Serialize};

/// Ticks of a second in `/proc`: what user space sees is 100 on every architecture that Rust runs on.
const TICKS_PER_SECOND: f64 = 100.0;

/// What a process has used since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Seconds of CPU time, of all its threads, in steps of 0.01.
    pub cpu_seconds: Option<f64>,
    /// The most memory that it has held at a time, in bytes.
    pub peak_rss_bytes: Option<u64>,
    /// The memory that it holds, in bytes.
    pub rss_bytes: Option<u64>,
}

impl Usage {
    /// That of this process.
    pub fn now() -> Self {
        let read = |file: &str| fs::read_to_string(format!("/proc/self/{file}")).ok();
        let status = read("status");
        Self {
            cpu_seconds: read("stat").as_deref().and_then(cpu_seconds),
            peak_rss_bytes: status.as_deref().and_then(|status| kilobytes(status, "VmHWM:")),
            rss_bytes: status.as_deref().and_then(|status| kilobytes(status, "VmRSS:")),
        }
    }
}

/// The memory that programs may still take on this machine, in bytes.
pub fn available_memory() -> Option<u64> {
    kilobytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")
}

/// Fields 14 and 15 of `/proc/PID/stat`, user and system time. The second field, the name, may hold anything.
fn cpu_seconds(stat: &str) -> Option<f64> {
    let (_, behind_name) = stat.rsplit_once(')')?;
    let mut fields = behind_name.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / TICKS_PER_SECOND)
}

fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_behind_a_name_of_any_kind() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 100 0 0 0 150 50 0 0 20 0 1 0 100 0 0";
        assert_eq!(cpu_seconds(stat), Some(2.0));
        assert_eq!(cpu_seconds("7 (a"), None);
    }

    #[test]
    fn memory_is_told_in_bytes() {
        let text = "VmPeak:\t  999 kB\nVmHWM:\t   12 kB\n";
        assert_eq!((kilobytes(text, "VmHWM:"), kilobytes(text, "VmRSS:")), (Some(12 << 10), None));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_uses_something() {
        let usage = Usage::now();
        assert!(usage.cpu_seconds.is_some() && usage.peak_rss_bytes > Some(0), "{usage:?}");
        assert!(available_memory() > Some(0));
    }
}
