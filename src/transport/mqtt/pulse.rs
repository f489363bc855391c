//! Whether the broker still answers: a frozen one, or a cut line, closes nothing.
//!
//! A peer says something every few hundred milliseconds, and the broker acknowledges each message. When something was
//! said and then *nothing at all* is heard for several times as long as answers took at worst of late, the broker is
//! lost. MQTT's own pings show the same only after one to two keepalive times. How long answers take is measured, since
//! a lost packet on a slow line stalls a connection for seconds without harm.
//!
//! Time is counted in ticks of the runtime that would hear the answer: a process that was stopped, or a machine that has
//! no time for it, does not mistake its own sleep for the broker's.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rumqttc::{Event, Outgoing};
use tokio::time::{MissedTickBehavior, interval};

/// How often it is looked.
const TICK: Duration = Duration::from_millis(100);

/// Silence may last so many times the slowest answer of late: a packet lost twice in a row takes six round trips.
const SLOWEST_FACTOR: u32 = 5;

/// What silence is borne on the fastest line: others' work may keep a broker from answering for a while.
const SILENCE_MIN: Duration = Duration::from_millis(2500);

/// What silence is borne on the slowest.
const SILENCE_MAX: Duration = Duration::from_secs(8);

/// How slow answers are taken to be before one was heard.
const SLOWEST_AT_FIRST: Duration = Duration::from_secs(1);

/// In so many ticks of faster answers the memory of the slowest one fades to about a third: 30 s.
const FADE_TICKS: u32 = 300;

/// What a connection said and heard.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    /// How many packets were sent that the broker answers.
    asked: AtomicU64,
    /// How many packets came.
    heard: AtomicU64,
}

impl Pulse {
    pub(super) fn note(&self, event: &Event) {
        match event {
            Event::Incoming(_) => self.heard.fetch_add(1, Ordering::Relaxed),
            // On the control connection every message is acknowledged.
            Event::Outgoing(Outgoing::Publish(_) | Outgoing::Subscribe(_) | Outgoing::PingReq) => {
                self.asked.fetch_add(1, Ordering::Relaxed)
            }
            Event::Outgoing(_) => return,
        };
    }

    /// Waits until the broker has been silent for too long; for how long that was.
    pub(super) async fn stops(&self) -> Duration {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut silence = Silence::default();
        loop {
            ticks.tick().await;
            let (asked, heard) = (self.asked.load(Ordering::Relaxed), self.heard.load(Ordering::Relaxed));
            if let Some(lasted) = silence.tick(asked, heard) {
                return lasted;
            }
        }
    }
}

/// How long nothing was heard, tick by tick.
#[derive(Debug)]
struct Silence {
    asked: u64,
    heard: u64,
    lasts: Duration,
    /// Ticks since something was heard.
    ticks: u32,
    /// The slowest answer of late.
    slowest: Duration,
}

impl Default for Silence {
    fn default() -> Self {
        Self { asked: 0, heard: 0, lasts: Duration::ZERO, ticks: 0, slowest: SLOWEST_AT_FIRST }
    }
}

impl Silence {
    /// Takes note of how many packets were sent and heard so far; how long the silence has lasted if that is too long.
    fn tick(&mut self, asked: u64, heard: u64) -> Option<Duration> {
        self.ticks = self.ticks.saturating_add(1);
        if heard != self.heard {
            // It fades only with what is heard: patience is not to run out faster while it is needed.
            let faded = self.slowest * self.ticks.min(FADE_TICKS) / FADE_TICKS;
            self.slowest = (self.slowest - faded).max(self.lasts);
            (self.asked, self.heard, self.lasts, self.ticks) = (asked, heard, Duration::ZERO, 0);
        } else if asked != self.asked {
            self.lasts += TICK;
        }
        let bearable = (SLOWEST_FACTOR * self.slowest).clamp(SILENCE_MIN, SILENCE_MAX);
        (self.lasts > bearable).then_some(self.lasts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How long a broker that stops answering goes unnoticed, after `answers` answers that each took `ticks`.
    fn unnoticed(answers: u64, ticks: u32) -> Duration {
        let mut silence = Silence::default();
        for n in 1..=answers {
            for _ in 0..ticks {
                assert_eq!(silence.tick(n, n - 1), None, "answers that take {ticks} ticks were not waited for");
            }
            assert_eq!(silence.tick(n, n), None);
        }
        (0..).find_map(|_| silence.tick(answers + 1, answers)).unwrap()
    }

    #[test]
    fn a_frozen_broker_is_noticed_sooner_the_faster_it_answered() {
        let near = |found: Duration, wanted: Duration| found.abs_diff(wanted) <= 2 * TICK;
        assert!(near(unnoticed(0, 0), SLOWEST_FACTOR * SLOWEST_AT_FIRST));
        assert!(near(unnoticed(600, 1), SILENCE_MIN));
        // 300 ms each way.
        assert!(near(unnoticed(100, 6), SLOWEST_FACTOR * 6 * TICK));
        assert!(near(unnoticed(20, 18), SILENCE_MAX));
    }

    #[test]
    fn a_line_that_loses_packets_twice_in_a_row_is_not_given_up() {
        let mut silence = Silence::default();
        for n in 1..2_000 {
            // Every tenth answer takes 1.8 s, every hundredth 3.6 s.
            let ticks = if n % 100 == 0 {
                36
            } else if n % 10 == 0 {
                18
            } else {
                6
            };
            for _ in 0..ticks {
                assert_eq!(silence.tick(n, n - 1), None, "answer {n}");
            }
            assert_eq!(silence.tick(n, n), None);
        }
    }

    #[test]
    fn who_says_nothing_needs_no_answer() {
        let mut silence = Silence::default();
        assert_eq!(silence.tick(1, 1), None);
        assert!((0..10_000).all(|_| silence.tick(1, 1).is_none()));
    }
}
