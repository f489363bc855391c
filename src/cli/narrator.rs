//! From entries, which every peer of this command tells, to what a person is shown once.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::cli::output::{Notice, Quality, RoundLine, Summary};
use crate::config::Value;
use crate::events::{Entry, Event, RoundCommitted};
use crate::rundir::MODEL;
use crate::training::{CATEGORIES, COLUMN};
use crate::transport::mqtt::probe::MESSAGE_BYTES_SETTINGS;
use crate::types::{Digest, PeerId, Round};

/// Follows the peers of one command and tells of them.
#[derive(Debug)]
pub struct Narrator {
    /// Whose entries come.
    peers: BTreeSet<PeerId>,
    /// How many rounds there are at most.
    rounds: u64,
    /// How long a wait lasts before it is worth telling.
    patience: Duration,
    started: Instant,
    /// The round that was begun last.
    round: Round,
    /// Rounds that are committed and not told.
    pending: BTreeMap<Round, Pending>,
    told_up_to: Round,
    leaders: BTreeMap<Round, PeerId>,
    bytes_sent: u64,
    finished: Option<Finished>,
    /// What each peer waits for.
    waiting: BTreeMap<PeerId, String>,
    waiting_since: Option<Instant>,
    waiting_told: Option<String>,
    /// Batches done and to do, of each peer in the round that was begun last.
    training: BTreeMap<PeerId, (u64, u64)>,
    /// Warnings of this round: several peers tell of one thing.
    warned: BTreeSet<String>,
    /// Whether the broker is lost.
    lost: bool,
    /// Whether the peers were asked to stop: that they leave is no news.
    stopping: bool,
}

/// What is known of a round that is not told yet.
#[derive(Debug, Default)]
struct Pending {
    /// What each peer told of its commit.
    commits: BTreeMap<PeerId, RoundCommitted>,
    /// How good its model is.
    quality: Option<Quality>,
}

#[derive(Debug)]
struct Finished {
    reason: String,
    rounds: Round,
    quality: Quality,
    digest: Digest,
}

impl Narrator {
    /// A narrator of these peers of a federation that trains at most so many rounds. A wait is told when it has
    /// lasted for `patience`.
    pub fn new(peers: BTreeSet<PeerId>, rounds: u64, patience: Duration, started: Instant) -> Self {
        Self {
            peers,
            rounds,
            patience,
            started,
            round: Round::GENESIS,
            pending: BTreeMap::new(),
            told_up_to: Round::GENESIS,
            leaders: BTreeMap::new(),
            bytes_sent: 0,
            finished: None,
            waiting: BTreeMap::new(),
            waiting_since: None,
            waiting_told: None,
            training: BTreeMap::new(),
            warned: BTreeSet::new(),
            lost: false,
            stopping: false,
        }
    }

    /// Takes note of what earlier runs of these peers told: who led.
    pub fn recall(&mut self, entry: &Entry) {
        if let Event::RoundCommitted(committed) = &entry.event {
            self.leaders.insert(committed.round, committed.leader.clone());
        }
    }

    /// Takes note that the peers were asked to stop.
    pub fn stopping(&mut self) -> Notice {
        self.stopping = true;
        Notice::Info { text: "stopping, and keeping the state; Ctrl-C again ends at once".to_owned() }
    }

    /// What there is to tell of an entry.
    pub fn hear(&mut self, entry: &Entry) -> Vec<Notice> {
        let peer = &entry.peer;
        match &entry.event {
            Event::RoundStarted { round, .. } => self.round_started(*round).into_iter().collect(),
            Event::Elected { round, leader, .. } => self.phase(*round, &format!("{leader} leads")),
            Event::Training { round, done, total } => self.training(peer, *round, *done, *total).into_iter().collect(),
            Event::Gathered { round, done, total } => self.gathered(*round, *done, *total).into_iter().collect(),
            Event::Proposed { round, leader } => self.phase(*round, &format!("the peers take over what {leader} made")),
            Event::RoundCommitted(committed) => self.committed(peer, committed),
            Event::Evaluated { round, val_loss, val_accuracy, scores, .. } => {
                // Where numbers are told there is no accuracy.
                let accuracy = Some(*val_accuracy).filter(|_| scores.val_rmse.is_none());
                self.evaluated(*round, Quality { accuracy, loss: Some(*val_loss), scores: *scores })
            }
            Event::Finished { .. } => self.finish(&entry.event),
            Event::Waiting { what } => {
                self.note_waiting(peer, what.as_deref());
                Vec::new()
            }
            Event::Initialized { bytes_sent, .. } => {
                self.bytes_sent += bytes_sent;
                Vec::new()
            }
            Event::Said { line } => vec![Notice::Info { text: format!("{peer}: {line}") }],
            Event::Moved { broker } => vec![Notice::Info { text: format!("looking for the others at {broker}") }],
            Event::Paused { path, why } => {
                let text = format!("{why}: {peer} cannot write {path}; it waits, and goes on once there is room");
                vec![Notice::Warning { text }]
            }
            Event::Resumed => vec![Notice::Info { text: format!("{peer} can write again, and goes on") }],
            Event::Connected { broker } => self.connected(broker).into_iter().collect(),
            event => self.warning(peer, event).into_iter().collect(),
        }
    }

    /// What there is to tell because time has passed: of a wait that lasts.
    pub fn tick(&mut self, now: Instant) -> Option<Notice> {
        let text = self.waiting.values().next()?.clone();
        let lasts = self.waiting_since.is_some_and(|since| now.duration_since(since) >= self.patience);
        if !lasts || self.finished.is_some() || self.waiting_told.as_ref() == Some(&text) {
            return None;
        }
        self.waiting_told = Some(text.clone());
        Some(Notice::Waiting { text })
    }

    /// What there is to tell when no more entries come: rounds whose metrics nobody told.
    pub fn flush(&mut self) -> Vec<Notice> {
        let rounds: Vec<Round> = self.pending.keys().copied().collect();
        rounds.into_iter().filter_map(|round| self.tell_round(round)).collect()
    }

    /// The result, if the federation has finished.
    pub fn summary(&self, run_dir: &Path) -> Option<Summary> {
        let Finished { reason, rounds, quality, digest } = self.finished.as_ref()?;
        Some(Summary {
            reason: reason.clone(),
            rounds: rounds.0,
            quality: *quality,
            digest: *digest,
            model: run_dir.join(MODEL),
            leaders: (1..=rounds.0).map(|round| self.leaders.get(&Round(round)).cloned()).collect(),
            seconds: self.started.elapsed().as_secs_f64(),
            bytes_sent: self.bytes_sent,
            run_dir: run_dir.to_owned(),
        })
    }

    fn round_started(&mut self, round: Round) -> Option<Notice> {
        if round <= self.round {
            return None;
        }
        self.round = round;
        self.training.clear();
        self.warned.clear();
        self.phase(round, "evaluating, electing a leader").pop()
    }

    /// What the newest round is at; what a peer that lags behind tells is left out.
    fn phase(&self, round: Round, what: &str) -> Vec<Notice> {
        if round != self.round || round == Round::GENESIS {
            return Vec::new();
        }
        let text = match round.0 > self.rounds {
            true => "the peers evaluate the last model".to_owned(),
            false => format!("round {round}: {what}"),
        };
        vec![Notice::Phase { text, done: 0, total: 0 }]
    }

    fn training(&mut self, peer: &PeerId, round: Round, done: u64, total: u64) -> Option<Notice> {
        if round != self.round {
            return None;
        }
        self.training.insert(peer.clone(), (done, total));
        let (done, total) = self.training.values().fold((0, 0), |(d, t), (done, total)| (d + done, t + total));
        Some(Notice::Phase { text: format!("round {round}: training"), done, total })
    }

    fn gathered(&self, round: Round, done: usize, total: usize) -> Option<Notice> {
        let text = format!("round {round}: {done} of {total} updates gathered");
        (round == self.round && done > 0).then_some(Notice::Phase { text, done: done as u64, total: total as u64 })
    }

    fn committed(&mut self, peer: &PeerId, committed: &RoundCommitted) -> Vec<Notice> {
        self.bytes_sent += committed.bytes_sent;
        self.leaders.insert(committed.round, committed.leader.clone());
        if committed.round > self.told_up_to {
            let pending = self.pending.entry(committed.round).or_default();
            pending.commits.insert(peer.clone(), committed.clone());
        }
        self.tell_what_is_complete()
    }

    fn evaluated(&mut self, round: Round, quality: Quality) -> Vec<Notice> {
        let Some(pending) = self.pending.get_mut(&round) else { return Vec::new() };
        pending.quality = Some(quality);
        // Who has not told of an earlier round by now will hardly do so.
        let earlier: Vec<Round> = self.pending.range(..round).map(|(round, _)| *round).collect();
        let mut notices: Vec<_> = earlier.into_iter().filter_map(|round| self.tell_round(round)).collect();
        notices.extend(self.tell_what_is_complete());
        notices
    }

    /// Tells of rounds whose metrics are known and of which every peer has told that is still there.
    fn tell_what_is_complete(&mut self) -> Vec<Notice> {
        let is_complete = |pending: &Pending| {
            let next = pending.commits.values().next().map(|committed| committed.next_roster.as_slice());
            let mut awaited = next.unwrap_or_default().iter().filter(|peer| self.peers.contains(*peer));
            pending.quality.is_some() && awaited.all(|peer| pending.commits.contains_key(peer))
        };
        let complete: Vec<Round> =
            self.pending.iter().filter(|(_, pending)| is_complete(pending)).map(|(round, _)| *round).collect();
        complete.into_iter().filter_map(|round| self.tell_round(round)).collect()
    }

    fn tell_round(&mut self, round: Round) -> Option<Notice> {
        let Pending { commits, quality } = self.pending.remove(&round)?;
        self.told_up_to = self.told_up_to.max(round);
        // The leader saw every phase; where it is not among these peers, or died, anybody's view will do.
        let of_leader = commits.iter().find(|(peer, committed)| **peer == committed.leader);
        let (_, committed) = of_leader.or(commits.iter().next())?;
        Some(Notice::Round(RoundLine {
            round,
            rounds: self.rounds,
            term: committed.term,
            leader: committed.leader.clone(),
            quality: quality.unwrap_or_default(),
            contributors: committed.contributors.len(),
            members: committed.members,
            seconds: committed.seconds.total,
            bytes: commits.values().map(|committed| committed.bytes_sent).sum(),
        }))
    }

    fn finish(&mut self, event: &Event) -> Vec<Notice> {
        let Event::Finished { reason, rounds, val_loss, val_accuracy, scores, digest, bytes_sent, .. } = event else {
            return Vec::new();
        };
        self.bytes_sent += bytes_sent;
        self.finished.get_or_insert_with(|| Finished {
            reason: reason.clone(),
            rounds: *rounds,
            quality: Quality { accuracy: *val_accuracy, loss: *val_loss, scores: *scores },
            digest: *digest,
        });
        Vec::new()
    }

    fn note_waiting(&mut self, peer: &PeerId, what: Option<&str>) {
        match what {
            Some(what) => drop(self.waiting.insert(peer.clone(), what.to_owned())),
            None => drop(self.waiting.remove(peer)),
        }
        if self.waiting.is_empty() {
            self.waiting_since = None;
            self.waiting_told = None;
        } else {
            self.waiting_since.get_or_insert_with(Instant::now);
        }
    }

    fn connected(&mut self, broker: &str) -> Option<Notice> {
        let back = std::mem::take(&mut self.lost);
        back.then(|| Notice::Info { text: format!("connected again, to {broker}") })
    }

    fn warning(&mut self, peer: &PeerId, event: &Event) -> Option<Notice> {
        let text = match event {
            _ if self.stopping => return None,
            Event::Disconnected { reason } if self.finished.is_none() => {
                self.lost = true;
                format!("the broker is lost ({reason}); connecting again")
            }
            Event::Probed { broker, message_bytes, chunk_bytes, chunk_bytes_set, .. }
                if chunk_bytes < chunk_bytes_set =>
            {
                let [now, set] = [chunk_bytes, chunk_bytes_set].map(|bytes| Value::Size(u64::from(*bytes)));
                format!(
                    "the broker at {broker} takes messages of up to about {message_bytes} bytes: chunks are {now} \
                     instead of {set}; for longer ones raise its limit ({MESSAGE_BYTES_SETTINGS})"
                )
            }
            Event::Left { who } if self.finished.is_none() => format!("{who} left"),
            Event::Deposed { round, term, leader, gone } => {
                let why = if *gone { "is gone" } else { "was silent for too long" };
                format!("round {round}: {leader}, who was to lead in term {term}, {why}; the peers vote again")
            }
            Event::LeftOut { who, why } => format!("round {}: without the update of {who}: {why}", self.round),
            // Peers that lag behind tell of what others have told.
            Event::FewUpdates { round, updates, needed } if *round >= self.round => format!(
                "round {round}: the strategy needs {needed} updates to keep bad ones out of the model, and got {updates}"
            ),
            Event::Incompatible { who, key, theirs, mine } => {
                let text = format!("{who} cannot take part: its {key} is {theirs}, here it is {mine}");
                let is_kind = key.starts_with(COLUMN) && [theirs, mine].iter().any(|kind| *kind == CATEGORIES);
                let of_none = "a column without values has numbers, unless --categories lists some";
                if is_kind { format!("{text} ({of_none})") } else { text }
            }
            Event::EarlierFederation { round } => {
                format!("the broker still keeps the end of an earlier federation of this name (round {round})")
            }
            Event::Staying { r#for } => {
                let names: Vec<&str> = r#for.iter().map(PeerId::as_str).collect();
                format!("all is done; {peer} keeps the last model ready for {} a little longer", names.join(", "))
            }
            Event::Failed { what, why } => format!("{peer}: {what} failed: {why}"),
            Event::BadMessage { who, why } => {
                let who = who.as_ref().map_or("somebody", PeerId::as_str);
                format!("a message of {who} could not be read: {why}")
            }
            // Of a single peer the command tells itself, as its error.
            Event::Ended { why } if self.peers.len() > 1 => format!("{peer} ended: {why}"),
            _ => return None,
        };
        self.warned.insert(text.clone()).then_some(Notice::Warning { text })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{PhaseSeconds, Scores};
    use crate::types::Term;

    fn peer(name: &str) -> PeerId {
        PeerId::new(name).unwrap()
    }

    fn narrator(peers: &[&str]) -> Narrator {
        let peers = peers.iter().map(|name| peer(name)).collect();
        Narrator::new(peers, 20, Duration::from_secs(1), Instant::now())
    }

    fn committed(round: u64, leader: &str, next_roster: &[&str]) -> Event {
        Event::RoundCommitted(Box::new(RoundCommitted {
            round: Round(round),
            term: Term(0),
            leader: peer(leader),
            digest: Digest::of(b"model"),
            decree: Digest::of(b"decree"),
            contributors: vec![peer("b")],
            num_examples: 10,
            members: 2,
            next_roster: next_roster.iter().map(|name| peer(name)).collect(),
            val_loss: None,
            val_accuracy: None,
            bytes_sent: 100,
            bytes_received: 7,
            seconds: PhaseSeconds { total: if leader == "a" { 1.0 } else { 2.0 }, ..Default::default() },
        }))
    }

    fn evaluated(round: u64) -> Event {
        let digest = Digest::of(b"model");
        let (round, scores) = (Round(round), Scores::default());
        Event::Evaluated { round, digest, val_loss: 0.5, val_accuracy: 0.75, num_examples: 4, scores }
    }

    /// The rounds that are told when `who` tells `event`.
    fn rounds(narrator: &mut Narrator, who: &str, event: Event) -> Vec<RoundLine> {
        let notices = narrator.hear(&Entry::now(&peer(who), event));
        let line = |notice| if let Notice::Round(line) = notice { Some(line) } else { None };
        notices.into_iter().filter_map(line).collect()
    }

    #[test]
    fn a_peer_that_waits_for_room_says_where_and_why_each_time() {
        let mut narrator = narrator(&["a", "b"]);
        for _ in 0..2 {
            let paused = Event::Paused { path: "run/peers/a".into(), why: "the disk is full".into() };
            let text = "the disk is full: a cannot write run/peers/a; it waits, and goes on once there is room".into();
            assert_eq!(narrator.hear(&Entry::now(&peer("a"), paused)), [Notice::Warning { text }]);
            let text = "a can write again, and goes on".into();
            assert_eq!(narrator.hear(&Entry::now(&peer("a"), Event::Resumed)), [Notice::Info { text }]);
        }
    }

    #[test]
    fn a_round_is_told_once_with_its_own_metrics_and_everybodys_bytes() {
        let mut narrator = narrator(&["a", "b"]);
        assert!(rounds(&mut narrator, "a", committed(1, "a", &["a", "b"])).is_empty());
        assert!(rounds(&mut narrator, "a", evaluated(1)).is_empty(), "b has not told of its bytes");
        let told = rounds(&mut narrator, "b", committed(1, "a", &["a", "b"]));
        assert_eq!(told.len(), 1);
        assert_eq!((told[0].quality.accuracy, told[0].bytes, told[0].seconds), (Some(0.75), 200, 1.0));
        assert!(rounds(&mut narrator, "b", evaluated(1)).is_empty());
    }

    #[test]
    fn a_peer_that_died_holds_no_round_back() {
        let mut narrator = narrator(&["a", "b"]);
        assert!(rounds(&mut narrator, "a", committed(1, "b", &["a"])).is_empty());
        assert_eq!(rounds(&mut narrator, "a", evaluated(1)).len(), 1);
        rounds(&mut narrator, "a", committed(2, "a", &["a", "b"]));
        assert!(rounds(&mut narrator, "a", evaluated(2)).is_empty());
        rounds(&mut narrator, "a", committed(3, "a", &["a"]));
        let told = rounds(&mut narrator, "a", evaluated(3));
        assert_eq!(told.iter().map(|line| line.round.0).collect::<Vec<_>>(), [2, 3]);
    }

    #[test]
    fn one_peer_of_many_tells_of_itself_alone() {
        let mut narrator = narrator(&["c"]);
        rounds(&mut narrator, "c", committed(4, "a", &["a", "b", "c"]));
        assert_eq!(rounds(&mut narrator, "c", evaluated(4))[0].bytes, 100);
    }

    #[test]
    fn what_is_left_is_told_at_the_end_without_metrics() {
        let mut narrator = narrator(&["a", "b"]);
        rounds(&mut narrator, "a", committed(1, "a", &["a", "b"]));
        assert!(matches!(&narrator.flush()[..], [Notice::Round(line)] if line.quality.accuracy.is_none()));
        assert!(narrator.flush().is_empty());
        assert_eq!(narrator.summary(Path::new("run")), None);
    }

    #[test]
    fn the_summary_names_the_leader_of_each_round_that_was_seen() {
        let mut narrator = narrator(&["a"]);
        rounds(&mut narrator, "a", committed(2, "b", &["a"]));
        let (reason, model, digest) = ("rounds".to_owned(), MODEL.to_owned(), Digest::of(b"x"));
        let (val_loss, val_accuracy, rounds) = (None, Some(0.9), Round(2));
        let event = Event::Finished {
            reason,
            rounds,
            val_loss,
            val_accuracy,
            scores: Scores::default(),
            model,
            digest,
            bytes_sent: 11,
            bytes_received: 0,
        };
        narrator.hear(&Entry::now(&peer("a"), event));
        let summary = narrator.summary(Path::new("run")).unwrap();
        assert_eq!(summary.leaders, [None, Some(peer("b"))]);
        assert_eq!((summary.quality.accuracy, summary.bytes_sent), (Some(0.9), 111));
        assert_eq!(summary.model, Path::new("run").join(MODEL));
    }

    #[test]
    fn who_led_before_a_restart_is_recalled() {
        let mut narrator = narrator(&["a"]);
        narrator.recall(&Entry::now(&peer("a"), committed(1, "b", &["a"])));
        assert_eq!(narrator.leaders[&Round(1)], peer("b"));
        assert!(narrator.flush().is_empty() && narrator.bytes_sent == 0);
    }

    #[test]
    fn peers_that_were_asked_to_stop_leave_unnoticed() {
        let mut narrator = narrator(&["a", "b"]);
        let left = Entry::now(&peer("a"), Event::Left { who: peer("b") });
        assert_eq!(narrator.hear(&left), [Notice::Warning { text: "b left".into() }]);
        narrator.stopping();
        narrator.warned.clear();
        assert!(narrator.hear(&left).is_empty());
    }

    #[test]
    fn a_column_without_values_is_told_how_to_be_one_of_categories() {
        let mut narrator = narrator(&["a"]);
        let mut warning = |key: &str, theirs: &str, mine: &str| {
            let [key, theirs, mine] = [key, theirs, mine].map(str::to_owned);
            let told =
                narrator.hear(&Entry::now(&peer("a"), Event::Incompatible { who: peer("b"), key, theirs, mine }));
            let [Notice::Warning { text }] = &told[..] else { panic!("{told:?}") };
            text.clone()
        };
        let text = warning("column town", "categories", "numbers");
        let expected =
            "b cannot take part: its column town is categories, here it is numbers (a column without values has";
        assert!(text.starts_with(expected), "{text}");
        assert!(warning("column sick", "label: classes", "label: numbers").ends_with("here it is label: numbers"));
    }

    #[test]
    fn what_several_peers_see_is_a_warning_once() {
        let mut narrator = narrator(&["a", "b", "c"]);
        let event = Event::Deposed { round: Round(1), term: Term(0), leader: peer("c"), gone: true };
        let told: Vec<_> =
            ["a", "b"].iter().flat_map(|name| narrator.hear(&Entry::now(&peer(name), event.clone()))).collect();
        let [Notice::Warning { text }] = &told[..] else { panic!("{told:?}") };
        assert!(text.contains("c, who was to lead in term 0, is gone"), "{text}");
        let started = Event::RoundStarted { round: Round(2), members: 3, member: true };
        narrator.hear(&Entry::now(&peer("a"), started));
        assert_eq!(narrator.hear(&Entry::now(&peer("a"), event)).len(), 1, "a new round has its own warnings");
    }

    #[test]
    fn too_few_updates_are_told_once_a_round_also_when_some_peers_lag_behind() {
        let mut narrator = narrator(&["a", "b"]);
        let few = |round| Event::FewUpdates { round: Round(round), updates: 2, needed: 5 };
        let text = "round 1: the strategy needs 5 updates to keep bad ones out of the model, and got 2".into();
        assert_eq!(narrator.hear(&Entry::now(&peer("a"), few(1))), [Notice::Warning { text }]);
        narrator.hear(&Entry::now(&peer("a"), Event::RoundStarted { round: Round(2), members: 2, member: true }));
        assert!(narrator.hear(&Entry::now(&peer("b"), few(1))).is_empty());
        assert_eq!(narrator.hear(&Entry::now(&peer("b"), few(2))).len(), 1);
    }

    #[test]
    fn a_wait_is_told_when_it_lasts() {
        let mut narrator = narrator(&["a", "b"]);
        let waiting = |what: Option<&str>| Event::Waiting { what: what.map(str::to_owned) };
        narrator.hear(&Entry::now(&peer("b"), waiting(Some("for c"))));
        let now = Instant::now();
        assert_eq!(narrator.tick(now), None);
        let later = now + Duration::from_secs(2);
        assert_eq!(narrator.tick(later), Some(Notice::Waiting { text: "for c".into() }));
        assert_eq!(narrator.tick(later), None);
        narrator.hear(&Entry::now(&peer("b"), waiting(None)));
        assert_eq!(narrator.tick(later), None);
    }

    #[test]
    fn progress_sums_up_the_peers() {
        let mut narrator = narrator(&["a", "b"]);
        let started = Event::RoundStarted { round: Round(1), members: 2, member: true };
        narrator.hear(&Entry::now(&peer("a"), started));
        let training = |done| Event::Training { round: Round(1), done, total: 10 };
        narrator.hear(&Entry::now(&peer("a"), training(4)));
        let told = narrator.hear(&Entry::now(&peer("b"), training(6)));
        assert_eq!(told, [Notice::Phase { text: "round 1: training".into(), done: 10, total: 20 }]);
        assert!(
            narrator.hear(&Entry::now(&peer("b"), Event::Training { round: Round(0), done: 1, total: 1 })).is_empty()
        );
    }
}
