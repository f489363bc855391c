//! One table of deadlines: nothing is scheduled, so nothing can go stale.

use std::collections::BTreeMap;
use std::time::Instant;

/// What a peer waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    /// Say hello again.
    Hello,
    /// Genesis: nobody new has come for the settle time.
    Settle,
    /// Genesis: repeat a call, or the roster that it founded.
    Call,
    /// Send again what nobody has answered.
    Resend,
    /// The leader, or the candidate, was silent for too long.
    Election,
    /// The leader's next heartbeat.
    Beat,
    /// The round has waited long enough for stragglers.
    Gather,
    /// The newest model, or the own update, is worth a flush.
    Flush,
    /// The end of lingering after the last round.
    Linger,
    /// The end of staying for peers that were away after the last round.
    Stay,
}

/// When each timer is due.
#[derive(Clone, Debug, Default)]
pub(super) struct Timers(BTreeMap<Timer, Instant>);

impl Timers {
    pub(super) fn set(&mut self, timer: Timer, at: Instant) {
        self.0.insert(timer, at);
    }

    /// Sets a timer unless it is running.
    pub(super) fn start(&mut self, timer: Timer, at: Instant) {
        self.0.entry(timer).or_insert(at);
    }

    /// Sets a timer, or makes it due earlier.
    pub(super) fn set_earlier(&mut self, timer: Timer, at: Instant) {
        let due = self.0.entry(timer).or_insert(at);
        *due = at.min(*due);
    }

    pub(super) fn clear(&mut self, timer: Timer) {
        self.0.remove(&timer);
    }

    pub(super) fn is_running(&self, timer: Timer) -> bool {
        self.0.contains_key(&timer)
    }

    /// Whether a timer was due; it then stops.
    pub(super) fn fired(&mut self, timer: Timer, now: Instant) -> bool {
        let due = self.0.get(&timer).is_some_and(|&at| at <= now);
        if due {
            self.0.remove(&timer);
        }
        due
    }

    pub(super) fn next(&self) -> Option<Instant> {
        self.0.values().min().copied()
    }
}
