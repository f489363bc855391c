//! How long a message takes to the broker and back: what a peer's own hello took, which the broker sends to it as well.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// So many measurements count. Few packets are lost even on a bad line, so a delay that one had is to be remembered.
const REMEMBERED: usize = 8;

/// Longer is no lag but a line that is broken.
const LAG_MAX: Duration = Duration::from_secs(5);

/// The lag of this peer's line, by its last hellos.
#[derive(Debug, Default)]
pub(super) struct Lag {
    /// How many hellos were said.
    count: u32,
    /// When those were said that have not come back: no more than `REMEMBERED`.
    said: BTreeMap<u32, Instant>,
    measured: VecDeque<Duration>,
}

impl Lag {
    /// A hello leaves, with this number.
    pub(super) fn start(&mut self, now: Instant) -> u32 {
        let number = self.count;
        self.count = self.count.wrapping_add(1);
        self.said.insert(number, now);
        if self.said.len() > REMEMBERED {
            self.said.pop_first();
        }
        number
    }

    /// The hello of this number has come back; any copy after the first says nothing.
    pub(super) fn end(&mut self, number: u32, now: Instant) {
        let Some(said) = self.said.remove(&number) else { return };
        self.measured.push_back(now.saturating_duration_since(said).min(LAG_MAX));
        if self.measured.len() > REMEMBERED {
            self.measured.pop_front();
        }
    }

    /// What is on its way will not come back: the broker is lost.
    pub(super) fn give_up(&mut self) {
        self.said.clear();
    }

    /// The longest that was measured of late.
    pub(super) fn longest(&self) -> Duration {
        self.measured.iter().max().copied().unwrap_or_default()
    }

    /// The same as a peer tells it of itself, in milliseconds.
    pub(super) fn told(&self) -> u32 {
        u32::try_from(self.longest().as_millis()).unwrap_or(u32::MAX)
    }

    /// What another peer told of its own.
    pub(super) fn of_other(told: u32) -> Duration {
        Duration::from_millis(told.into()).min(LAG_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn the_longest_of_the_last_hellos_counts() {
        let (mut lag, start) = (Lag::default(), Instant::now());
        assert_eq!(lag.longest(), Duration::ZERO);
        for (said, back) in [(0, 20), (100, 900), (1000, 1030)] {
            let number = lag.start(at(start, said));
            lag.end(number, at(start, back));
        }
        assert_eq!(lag.told(), 800);
        for n in 0..8 {
            let number = lag.start(at(start, 2000 + 100 * n));
            lag.end(number, at(start, 2010 + 100 * n));
        }
        assert_eq!(lag.told(), 10, "the slow one is forgotten");
    }

    #[test]
    fn each_hello_is_measured_once_and_by_itself() {
        let (mut lag, start) = (Lag::default(), Instant::now());
        let (first, second) = (lag.start(start), lag.start(at(start, 500)));
        lag.end(first, at(start, 700));
        lag.end(first, at(start, 9000));
        assert_eq!(lag.told(), 700);
        lag.end(second, at(start, 1300));
        assert_eq!(lag.told(), 800);
    }

    #[test]
    fn a_hello_that_is_lost_with_its_broker_measures_nothing_and_a_broken_line_no_more_than_a_slow_one() {
        let (mut lag, start) = (Lag::default(), Instant::now());
        let number = lag.start(start);
        lag.give_up();
        lag.end(number, at(start, 100));
        assert_eq!(lag.longest(), Duration::ZERO);
        let number = lag.start(start);
        lag.end(number, at(start, 60_000));
        assert_eq!(lag.longest(), LAG_MAX);
        assert_eq!(Lag::of_other(u32::MAX), LAG_MAX);
    }
}
