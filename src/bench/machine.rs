//! What this machine can do at best: bytes through TCP over loopback, and a copy in memory.

use std::hint::black_box;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use serde::Serialize;

use super::{mb_per_s, median};

/// The length of one write and of the buffer that is read into, in bytes: the default chunk.
const BLOCK_BYTES: usize = 512 * 1024;

/// The speed of this machine, in MB/s.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Machine {
    /// Through one TCP connection over loopback, from one thread to another.
    pub tcp_mb_per_s: f64,
    /// Copied from one place in memory to another, which has its pages already.
    pub memory_copy_mb_per_s: f64,
}

/// Measures of this machine, one at a time, so that they can stand between others.
#[derive(Debug)]
pub(super) struct Gauge {
    bytes: u64,
    tcp: Vec<f64>,
    copies: Vec<f64>,
}

impl Gauge {
    /// For so many bytes each time.
    pub(super) fn new(bytes: u64) -> Self {
        Self { bytes, tcp: Vec::new(), copies: Vec::new() }
    }

    /// Measures both once more.
    pub(super) async fn measure(&mut self) -> io::Result<()> {
        let bytes = self.bytes;
        let measures = move || io::Result::Ok((tcp(bytes)?, memory_copy(bytes)));
        let (tcp, copy) = tokio::task::spawn_blocking(measures).await.map_err(io::Error::other)??;
        self.tcp.push(tcp);
        self.copies.push(copy);
        Ok(())
    }

    /// The medians.
    pub(super) fn result(&self) -> Machine {
        let speed = |seconds: &[f64]| mb_per_s(self.bytes, median(seconds));
        Machine { tcp_mb_per_s: speed(&self.tcp), memory_copy_mb_per_s: speed(&self.copies) }
    }
}

/// Seconds from the first write until the last byte is read.
fn tcp(bytes: u64) -> io::Result<f64> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut sender = TcpStream::connect(listener.local_addr()?)?;
    let (mut receiver, _) = listener.accept()?;
    sender.set_nodelay(true)?;
    let mut received = vec![0; BLOCK_BYTES];
    let block = vec![1; BLOCK_BYTES];
    let started = Instant::now();
    let writing = thread::spawn(move || {
        let mut left = bytes;
        while left > 0 {
            let length = left.min(BLOCK_BYTES as u64);
            sender.write_all(&block[..length as usize])?;
            left -= length;
        }
        io::Result::Ok(())
    });
    let mut left = bytes;
    while left > 0 {
        match receiver.read(&mut received)? {
            0 => break,
            length => left = left.saturating_sub(length as u64),
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    writing.join().map_err(|_| io::Error::other("the thread that writes ended without a result"))??;
    Ok(seconds)
}

/// Seconds to copy so many bytes.
fn memory_copy(bytes: u64) -> f64 {
    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    // Written, so that neither is a page of zeros that the system has not given yet.
    let (source, mut copy) = (vec![1u8; bytes], vec![2u8; bytes]);
    let started = Instant::now();
    black_box(&mut copy).copy_from_slice(black_box(&source));
    black_box(&copy);
    started.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn both_speeds_are_measured() {
        let mut gauge = Gauge::new(3 * BLOCK_BYTES as u64 + 1);
        gauge.measure().await.unwrap();
        let Machine { tcp_mb_per_s, memory_copy_mb_per_s } = gauge.result();
        assert!(tcp_mb_per_s > 0.0 && memory_copy_mb_per_s > 0.0);
    }
}
