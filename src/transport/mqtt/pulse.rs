//! Whether the broker still answers, and delivers: a frozen one, or a cut line, closes nothing.
//!
//! A peer says something every few hundred milliseconds, and the broker acknowledges each message. When something was
//! said and then *nothing at all* is heard for several times as long as answers took at worst of late, the broker is
//! lost. MQTT's own pings show the same only after one to two keepalive times. How long answers take is measured, since
//! a lost packet on a slow line stalls a connection for seconds without harm.
//!
//! A peer hears its own hellos, as everybody does. When one was acknowledged and does not come, the broker has lost what
//! this peer subscribed to, while all else looks well: NATS, killed and started again, may do so. Only a new connection
//! mends it.
//!
//! Time is counted in ticks of the runtime that would hear the answer: a process that was stopped, or a machine that has
//! no time for it, does not mistake its own sleep for the broker's.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rumqttc::{Event, Outgoing, Packet};
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

/// How long an acknowledged message may take to come back. The two follow each other on one connection, so a slow line
/// or a lost packet holds up both; a busy broker has some more to deliver in between.
const DELIVERY_MAX: Duration = Duration::from_secs(10);

/// What a connection said and heard.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    /// How many packets were sent that the broker answers.
    asked: AtomicU64,
    /// How many packets came.
    heard: AtomicU64,
    /// The topic on which this peer hears itself.
    own_topic: OnceLock<String>,
    /// How many messages had been sent with the newest one on that topic.
    own_sent: AtomicU64,
    /// How many messages came on that topic.
    own_heard: AtomicU64,
}

/// Why a broker is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// Nothing at all was heard for so long.
    Silent(Duration),
    /// It acknowledges messages, and delivers none.
    Deaf,
}

impl Pulse {
    /// From now on this peer is to hear itself on this topic. It is told once.
    pub(super) fn hears_itself_on(&self, topic: &str) {
        self.own_topic.get_or_init(|| topic.to_owned());
    }

    /// A message is about to be sent: the `number`-th, from 1 on.
    pub(super) fn says(&self, topic: &str, number: u64) {
        if self.is_own(topic) {
            self.own_sent.store(number, Ordering::Relaxed);
        }
    }

    fn is_own(&self, topic: &str) -> bool {
        self.own_topic.get().is_some_and(|own| own == topic)
    }

    pub(super) fn note(&self, event: &Event) {
        match event {
            Event::Incoming(packet) => {
                if matches!(packet, Packet::Publish(publish) if self.is_own(&publish.topic)) {
                    self.own_heard.fetch_add(1, Ordering::Relaxed);
                }
                self.heard.fetch_add(1, Ordering::Relaxed)
            }
            // On the control connection every message is acknowledged.
            Event::Outgoing(Outgoing::Publish(_) | Outgoing::Subscribe(_) | Outgoing::PingReq) => {
                self.asked.fetch_add(1, Ordering::Relaxed)
            }
            Event::Outgoing(_) => return,
        };
    }

    /// Waits until the broker has been silent, or has delivered nothing, for too long. It is asked how many messages were
    /// `acknowledged` so far.
    pub(super) async fn stops(&self, acknowledged: impl Fn() -> u64) -> Stopped {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut silence, mut deafness) = (Silence::default(), Deafness::default());
        let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
        loop {
            ticks.tick().await;
            if let Some(lasted) = silence.tick(count(&self.asked), count(&self.heard)) {
                return Stopped::Silent(lasted);
            }
            // In this order: nothing is waited for that has just come.
            let own_heard = count(&self.own_heard);
            if deafness.tick(own_heard, count(&self.own_sent), acknowledged()) {
                return Stopped::Deaf;
            }
        }
    }
}

/// How long a message of this peer's own was acknowledged and has not come back, tick by tick.
#[derive(Debug, Default)]
struct Deafness {
    heard: u64,
    /// The number of the newest message when one came last: it is not waited for.
    settled: u64,
    /// The number of the message that is waited for, if one is.
    waits_for: Option<u64>,
    lasts: Duration,
}

impl Deafness {
    /// Takes note of how many messages came back, of the number of the newest one that is to, and of how many were
    /// acknowledged; whether one is waited for in vain.
    fn tick(&mut self, heard: u64, sent: u64, acknowledged: u64) -> bool {
        if heard != self.heard {
            *self = Self { heard, settled: sent, waits_for: None, lasts: Duration::ZERO };
        } else if sent > self.settled {
            let number = *self.waits_for.get_or_insert(sent);
            if acknowledged >= number {
                self.lasts += TICK;
            }
        }
        self.lasts > DELIVERY_MAX
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

    /// How long it takes to notice that nothing comes back from now on; the `acknowledged` first messages are acknowledged.
    fn undelivered(mut deafness: Deafness, heard: u64, sent: u64, acknowledged: u64) -> Option<Duration> {
        let ticks = DELIVERY_MAX.div_duration_f64(TICK) as u32;
        (0..10 * ticks).find(|_| deafness.tick(heard, sent, acknowledged)).map(|ticks| ticks * TICK)
    }

    #[test]
    fn who_does_not_hear_itself_though_the_broker_acknowledges_is_deaf() {
        let deaf = undelivered(Deafness::default(), 0, 1, 1).unwrap();
        assert!(deaf.abs_diff(DELIVERY_MAX) <= TICK, "{deaf:?}");
        // It goes on asking meanwhile.
        let mut deafness = Deafness::default();
        assert!(
            (1..).take_while(|&n| !deafness.tick(0, n, n)).count() as u32 <= DELIVERY_MAX.div_duration_f64(TICK) as u32
        );
        // It was not so at first.
        let mut deafness = Deafness::default();
        for n in 1..100 {
            assert!(!deafness.tick(n, n, n));
        }
        assert!(undelivered(deafness, 99, 100, 100).is_some());
    }

    #[test]
    fn who_has_heard_all_it_said_or_waits_for_the_acknowledgement_is_not_deaf() {
        assert_eq!(undelivered(Deafness::default(), 0, 0, 0), None);
        assert_eq!(undelivered(Deafness::default(), 0, 7, 6), None, "the silence of a broker is another matter");
        assert_eq!(undelivered(Deafness::default(), 1, 7, 9), None, "the message and its echo came between two ticks");
        let mut deafness = Deafness::default();
        // One comes back after 9 s each time.
        for n in 1..20 {
            for _ in 0..90 {
                assert!(!deafness.tick(n - 1, n, n));
            }
            assert!(!deafness.tick(n, n, n));
        }
    }

    #[test]
    fn who_says_nothing_needs_no_answer() {
        let mut silence = Silence::default();
        assert_eq!(silence.tick(1, 1), None);
        assert!((0..10_000).all(|_| silence.tick(1, 1).is_none()));
    }
}
