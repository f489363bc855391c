//! Roaming: how peers that meet at different brokers find each other.
//!
//! A peer that misses the others, though it is connected, moves on along its list of brokers after a while. One that sees
//! a quorum never moves, so a broker that returns draws nobody away from where the federation is.
//!
//! Why they meet. *Home* is the first broker of the list. A tour leads from it to each other broker that answers and
//! back. A stay away lasts two election timeouts; until the others' silence shows it may seem to last two more. The
//! stay at home doubles with each tour that found nobody, and is counted for each broker of the list: from the fourth
//! tour on it is more than three times as long as the tour itself, so that each peer is at home for more than three
//! quarters of the time.
//! - Peers with one home: the mean number at home is more than three quarters of them, so there is a time when so many
//!   are there together, whatever their phases. That is a quorum if they are one at all, and whoever sees it stays.
//! - Peers with different homes (lists in another order): each visits the home of the others, who are mostly there.
//! - Groups that swap places in step do not do so for ever: a stay at home is up to half longer by a number drawn
//!   from the peer's name and the tour, so steps part.

use std::time::{Duration, Instant};

use crate::types::{Digest, PeerId};

/// How many election timeouts a stay away from home lasts: members say hello once in one.
const AWAY_TIMEOUTS: u32 = 2;

/// The stay at home doubles up to this many times.
const DOUBLINGS_MAX: u32 = 4;

/// Not to miss the others for so many election timeouts ends the search. After a change of brokers everybody is taken
/// to be there until silence shows the contrary: that is no end.
const FOUND_TIMEOUTS: u32 = 4;

/// When a peer looks for the others at another broker. Time comes in as an argument; the node keeps the deadline.
#[derive(Debug)]
pub struct Roaming {
    peer: PeerId,
    election_timeout: Duration,
    /// The place in the list of the broker where it is, how long the list is, and since when it is there.
    place: Option<(usize, usize, Instant)>,
    /// Since when it misses the others, if it does.
    missing_since: Option<Instant>,
    /// When the search began, which goes on over changes of broker.
    began: Option<Instant>,
    /// When it last ceased to miss them.
    relieved: Option<Instant>,
    /// Whether it was asked to move on in this search.
    moved: bool,
    /// How many tours found nobody.
    tours: u32,
}

impl Roaming {
    /// Of a peer that is nowhere yet.
    pub fn new(peer: PeerId, election_timeout: Duration) -> Self {
        Self {
            peer,
            election_timeout,
            place: None,
            missing_since: None,
            began: None,
            relieved: None,
            moved: false,
            tours: 0,
        }
    }

    /// The peer is connected to the broker at `index` of a list of `len`.
    pub fn arrived(&mut self, index: usize, len: usize, now: Instant) {
        self.place = Some((index, len, now));
    }

    /// The list has changed, and with it the place of the broker where the peer is.
    pub fn list_changed(&mut self, index: usize, len: usize) {
        self.place = self.place.map(|(_, _, since)| (index, len, since));
    }

    /// The broker is lost.
    pub fn lost(&mut self) {
        self.place = None;
    }

    /// Whether the peer misses the others: too few for a quorum, or for a first roster, are in sight.
    pub fn missing(&mut self, missing: bool, now: Instant) {
        match (missing, self.missing_since) {
            (true, None) => {
                self.missing_since = Some(now);
                let found = self.election_timeout * FOUND_TIMEOUTS;
                if self.relieved.is_none_or(|at| now.saturating_duration_since(at) > found) {
                    (self.began, self.moved, self.tours) = (Some(now), false, 0);
                }
            }
            (false, Some(_)) => (self.missing_since, self.relieved) = (None, Some(now)),
            _ => {}
        }
    }

    /// Since when the peer has looked for the others, here and at the brokers before. `None` until it has moved on, and
    /// while it misses nobody.
    pub fn searching_since(&self) -> Option<Instant> {
        self.missing_since.and(self.began).filter(|_| self.moved)
    }

    /// When to move on, if ever.
    pub fn deadline(&self) -> Option<Instant> {
        let (index, len, since) = self.place?;
        let missing_since = self.missing_since?;
        (len > 1).then(|| missing_since.max(since) + self.stay(index, len))
    }

    /// Takes note that the peer is asked to move on. Where no other broker answers it stays, and asks again later.
    pub fn moves(&mut self, now: Instant) {
        self.moved = true;
        if let Some((index, _, since)) = &mut self.place {
            self.tours = self.tours.saturating_add(u32::from(*index == 0));
            *since = now;
        }
    }

    fn stay(&self, index: usize, len: usize) -> Duration {
        let away = self.election_timeout * AWAY_TIMEOUTS;
        if index > 0 {
            return away;
        }
        let others = u32::try_from(len - 1).unwrap_or(u32::MAX);
        let stay = away.saturating_mul(others).saturating_mul(1 << self.tours.min(DOUBLINGS_MAX));
        let lot = Digest::of(format!("{} {}", self.peer, self.tours).as_bytes()).shared_seed();
        stay + (stay / 2).mul_f64(lot as f64 / u64::MAX as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(2);

    /// How long peers of this test may take to find each other.
    const BOUND: Duration = Duration::from_secs(600);

    /// A peer on its way between brokers.
    struct Wanderer {
        roaming: Roaming,
        /// Its list, by the broker's number.
        list: Vec<usize>,
        at: usize,
        arrived: Instant,
    }

    impl Wanderer {
        fn start(name: &str, list: &[usize], at: usize, now: Instant) -> Self {
            let mut roaming = Roaming::new(PeerId::new(name).unwrap(), TIMEOUT);
            let place = list.iter().position(|broker| *broker == at).unwrap();
            roaming.arrived(place, list.len(), now);
            roaming.missing(true, now);
            Self { roaming, list: list.to_vec(), at, arrived: now }
        }

        fn move_on(&mut self, now: Instant) {
            self.roaming.moves(now);
            let place = self.list.iter().position(|broker| *broker == self.at).unwrap();
            let next = (place + 1) % self.list.len();
            self.at = self.list[next];
            self.arrived = now;
            self.roaming.arrived(next, self.list.len(), now);
            // At first everybody seems to be there.
            self.roaming.missing(false, now);
        }
    }

    /// Lets time pass until `quorum` peers are at one broker for long enough to hear each other; how long that took.
    fn until_together(wanderers: &mut [Wanderer], quorum: usize, start: Instant) -> Option<Duration> {
        let step = Duration::from_millis(100);
        let mut now = start;
        while now < start + BOUND {
            now += step;
            let places: Vec<usize> = wanderers.iter().map(|one| one.at).collect();
            for one in &mut *wanderers {
                let here = places.iter().filter(|place| **place == one.at).count();
                let seems_found = here >= quorum || now < one.arrived + 2 * TIMEOUT;
                one.roaming.missing(!seems_found, now);
                if one.roaming.deadline().is_some_and(|at| at <= now) {
                    one.move_on(now);
                }
            }
            let met = |place: &usize| {
                let settled = wanderers.iter().filter(|one| one.at == *place && now >= one.arrived + TIMEOUT);
                settled.count() >= quorum
            };
            if places.iter().any(met) {
                return Some(now - start);
            }
        }
        None
    }

    #[test]
    fn two_groups_of_one_list_meet() {
        for peers in 2..9 {
            for away in 1..=peers / 2 {
                let start = Instant::now();
                let mut all: Vec<_> = (0..peers)
                    .map(|n| Wanderer::start(&format!("p{n}"), &[0, 1], usize::from(n < away), start))
                    .collect();
                // Nobody may start with a quorum.
                if peers - away > peers / 2 {
                    continue;
                }
                assert!(until_together(&mut all, peers / 2 + 1, start).is_some(), "{away} of {peers} never meet");
            }
        }
    }

    #[test]
    fn groups_at_many_brokers_meet_whatever_their_phases() {
        for brokers in 2..6 {
            let list: Vec<usize> = (0..brokers).collect();
            for seed in 0..20 {
                let start = Instant::now();
                let mut all: Vec<_> =
                    (0..6).map(|n| Wanderer::start(&format!("{seed}-{n}"), &list, n % brokers, start)).collect();
                let took = until_together(&mut all, 4, start);
                assert!(took.is_some(), "seed {seed}: 6 peers at {brokers} brokers never meet");
            }
        }
    }

    #[test]
    fn groups_with_different_homes_do_not_swap_places_for_ever() {
        for seed in 0..50 {
            let start = Instant::now();
            let mut all: Vec<_> = (0..4)
                .map(|n| {
                    let list = if n < 2 { [0, 1] } else { [1, 0] };
                    Wanderer::start(&format!("{seed}-{n}"), &list, list[0], start)
                })
                .collect();
            assert!(until_together(&mut all, 3, start).is_some(), "seed {seed}: two pairs never meet");
        }
    }

    #[test]
    fn a_peer_alone_at_home_soon_looks_where_the_quorum_is_and_stays_there() {
        let start = Instant::now();
        let mut alone = Wanderer::start("a", &[0, 1], 0, start);
        let first = alone.roaming.deadline().unwrap();
        assert!(first >= start + 2 * TIMEOUT && first <= start + 3 * TIMEOUT);
        alone.move_on(first);
        assert_eq!((alone.at, alone.roaming.deadline()), (1, None));
    }

    #[test]
    fn who_knows_one_broker_or_misses_nobody_stays() {
        let start = Instant::now();
        assert_eq!(Wanderer::start("a", &[0], 0, start).roaming.deadline(), None);
        let mut content = Wanderer::start("a", &[0, 1], 1, start);
        content.roaming.missing(false, start);
        assert_eq!(content.roaming.deadline(), None);
    }

    #[test]
    fn a_search_goes_on_over_changes_of_broker_and_ends_when_the_others_were_found() {
        let start = Instant::now();
        let mut one = Wanderer::start("a", &[0, 1], 0, start);
        let moved = one.roaming.deadline().unwrap();
        one.move_on(moved);
        assert_eq!(one.roaming.searching_since(), None);
        one.roaming.missing(true, moved + 2 * TIMEOUT);
        assert_eq!(one.roaming.searching_since(), Some(start));
        one.roaming.missing(false, moved + 3 * TIMEOUT);
        one.roaming.missing(true, moved + 20 * TIMEOUT);
        assert_eq!(one.roaming.searching_since(), None, "a new search has not moved on yet");
    }
}
