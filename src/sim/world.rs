//! One simulated run: peers, network, virtual time and the faults that the seed draws.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::jobs::{Receiving, Workshop};
use crate::journal::Blobs;
use crate::protocol::message::Envelope;
use crate::protocol::{Action, Config, Done, Durable, Event, Identity, Job, Notice, Peer, Topic};
use crate::sim::check::{self, Broken, Check, Persisted};
use crate::sim::network::{Network, Side};
use crate::sim::trainer::ArithmeticTrainer;
use crate::sim::{Detail, Report, Scenario, Trace, Violation};
use crate::training::Trainer;
use crate::transfer::{CHUNK_BYTES_MIN, Codec, Intake, Keep, Manifest};
use crate::types::{Address, Digest, Incarnation, PeerId, Round, Term};
use crate::weights::Layout;

/// How long after the last fault the federation may take to finish, besides what its rounds may take.
const LIVENESS_BOUND: Duration = Duration::from_secs(120);

/// A peer that wants to be woken this often without time passing never sleeps again.
const WAKES_AT_ONCE_MAX: u32 = 1_000;

pub(super) struct World<'a> {
    scenario: Scenario,
    seed: u64,
    config: Config,
    rng: ChaCha8Rng,
    network: Network,
    check: Check,
    peers: BTreeMap<PeerId, SimulatedPeer>,
    /// Peers whose state is lost, and whose name another one has.
    replaced: Vec<(PeerId, SimulatedPeer)>,
    queue: BTreeMap<(Instant, u64), Happening>,
    sequence: u64,
    origin: Instant,
    now: Instant,
    wakes_at_once: u32,
    job_failures: f64,
    faults: u64,
    messages: (u64, u64),
    reelections: u64,
    /// A peer that was not done when it was last asked whether the run is over.
    straggler: Option<PeerId>,
    detail: Detail,
    trace: &'a mut Trace<'a>,
    #[cfg(test)]
    pub(super) flaws: crate::protocol::Flaws,
}

struct SimulatedPeer {
    /// The protocol, while the peer is up.
    peer: Option<Peer>,
    /// How often it was started: what belongs to an earlier start is dropped.
    start: u32,
    durable: Option<Durable>,
    blobs: Blobs,
    trainer: Mutex<Box<dyn Trainer>>,
    /// When it is woken next.
    wake: Option<Instant>,
    workshop: Workshop,
    /// Blobs that are being received; a crash forgets them.
    receiving: BTreeMap<Digest, ((Manifest, Keep), Option<Receiving>)>,
    /// Crash after so many more actions.
    crash_after: Option<usize>,
    lost_for_good: bool,
    /// How often it has lost its state and come back under its name.
    incarnation: u64,
    /// The model's layout, until the peer is told.
    prepared: Option<Arc<Layout>>,
    training: Option<(Round, Manifest)>,
    stopped: bool,
}

enum Happening {
    Start(PeerId),
    Subscribe(PeerId, u32),
    Deliver(PeerId, u32, Bytes),
    Work(PeerId, u32, Job),
    Keep(PeerId, u32, Digest, u32, Bytes),
    Wake(PeerId, u32),
    Fault(Fault),
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    Crash,
    LoseState,
    Cut,
    Heal,
    /// All faults are over.
    End,
}

impl<'a> World<'a> {
    pub(super) fn new(scenario: &Scenario, seed: u64, detail: Detail, trace: &'a mut Trace<'a>) -> Self {
        let origin = Instant::now();
        let config = Config {
            federation: "simulated".into(),
            min_peers: scenario.founders(),
            rounds: scenario.rounds,
            round_timeout: Duration::from_secs(10),
            policy: scenario.policy.parse().unwrap_or_default(),
            strategy: scenario.strategy(seed),
            fraction_train: scenario.fraction_train,
            chunk_bytes: CHUNK_BYTES_MIN as usize,
            ..Config::default()
        };
        let mut world = Self {
            network: Network::new(scenario),
            scenario: scenario.clone(),
            seed,
            config,
            rng: ChaCha8Rng::seed_from_u64(seed),
            check: Check::new(scenario.codecs(), scenario.strategy(seed)),
            peers: BTreeMap::new(),
            replaced: Vec::new(),
            queue: BTreeMap::new(),
            sequence: 0,
            origin,
            now: origin,
            wakes_at_once: 0,
            job_failures: scenario.job_failures,
            faults: 0,
            messages: (0, 0),
            reelections: 0,
            straggler: None,
            detail,
            trace,
            #[cfg(test)]
            flaws: crate::protocol::Flaws::default(),
        };
        world.plan();
        world
    }

    /// Draws when peers start and when faults strike.
    fn plan(&mut self) {
        let faults_end = Duration::from_millis(self.scenario.faults_ms.max(1));
        let digits = self.scenario.peers.to_string().len();
        for index in 1..=self.scenario.peers {
            let peer = PeerId::new(&format!("peer-{index:0digits$}")).expect("a number makes a valid name");
            let late = index > self.scenario.peers - self.scenario.late;
            let span = if late { faults_end } else { Duration::from_millis(500) };
            self.add(peer.clone());
            let at = span.mul_f64(self.rng.random());
            self.schedule(at, Happening::Start(peer));
        }
        let counts = [
            (Fault::Crash, self.scenario.crashes),
            (Fault::LoseState, self.scenario.losses_of_state),
            (Fault::Cut, self.scenario.cuts),
        ];
        for (fault, at_most) in counts {
            for _ in 0..self.rng.random_range(0..=at_most) {
                let at = faults_end.mul_f64(self.rng.random());
                self.schedule(at, Happening::Fault(fault));
            }
        }
        self.schedule(faults_end, Happening::Fault(Fault::End));
    }

    fn add(&mut self, id: PeerId) {
        let trainer = ArithmeticTrainer::new(&id, self.scenario.values, self.scenario.data_seed);
        let blobs = Blobs::memory();
        let workshop = Workshop {
            blobs: blobs.clone(),
            layout: trainer.layout(),
            peer: id.clone(),
            codecs: self.scenario.codecs(),
            strategy: self.config.strategy,
            chunk_bytes: CHUNK_BYTES_MIN,
            leftovers: Arc::default(),
        };
        let peer = SimulatedPeer {
            peer: None,
            start: 0,
            durable: None,
            blobs,
            trainer: Mutex::new(Box::new(trainer)),
            wake: None,
            workshop,
            receiving: BTreeMap::new(),
            crash_after: None,
            lost_for_good: false,
            incarnation: 0,
            prepared: None,
            training: None,
            stopped: false,
        };
        self.peers.insert(id, peer);
    }

    pub(super) fn run(mut self) -> Result<Report, Violation> {
        let rounds = u32::try_from(self.scenario.rounds).unwrap_or(u32::MAX);
        let rounds_take = self.config.round_timeout.saturating_mul(rounds.saturating_add(2));
        let bound = Duration::from_millis(self.scenario.faults_ms) + LIVENESS_BOUND + rounds_take;
        let mut quorum_lost = false;
        while !self.is_over() {
            let Some(((at, _), happening)) = self.queue.pop_first() else { break };
            self.wakes_at_once = if at > self.now { 0 } else { self.wakes_at_once };
            self.now = at;
            if self.elapsed() > bound {
                quorum_lost = self.is_quorum_lost();
                if !quorum_lost {
                    return Err(self.violation((check::LIVENESS, self.describe())));
                }
                break;
            }
            self.happen(happening).map_err(|broken| self.violation(broken))?;
        }
        Ok(self.report(quorum_lost))
    }

    fn elapsed(&self) -> Duration {
        self.now - self.origin
    }

    fn violation(&self, (invariant, what): Broken) -> Violation {
        Violation { seed: self.seed, at: self.elapsed(), invariant, what }
    }

    /// Whether every peer that still exists has the last decree and its model.
    fn is_over(&mut self) -> bool {
        let Some(last) = self.check.newest().filter(|decree| decree.reason().is_some()) else { return false };
        // Who comes when all is over finds nothing to take part in.
        let lacks = |peer: &SimulatedPeer| !(peer.lost_for_good || peer.has(last) || peer.is_stranger());
        // This is asked after every event: the peer that was lacking the last time is looked at first.
        if self.straggler.as_ref().and_then(|id| self.peers.get(id)).is_some_and(lacks) {
            return false;
        }
        self.straggler = self.peers.iter().find(|(_, peer)| lacks(peer)).map(|(id, _)| id.clone());
        self.straggler.is_none()
    }

    fn is_quorum_lost(&self) -> bool {
        let Some(newest) = self.check.newest() else { return false };
        let roster = &newest.next_roster;
        let is_left = |id: &&PeerId| {
            let member = roster.incarnation(id);
            self.peers.get(*id).is_some_and(|peer| !peer.lost_for_good && member == Some(Incarnation(peer.incarnation)))
        };
        roster.members().iter().filter(is_left).count() < roster.quorum()
    }

    fn describe(&self) -> String {
        let each = self.peers.iter().map(|(id, peer)| {
            let state = match &peer.peer {
                _ if peer.lost_for_good => "lost".to_owned(),
                None => "down".to_owned(),
                Some(up) => format!("{:?} {:?}", up.round(), up.durable().open.promised),
            };
            format!("{id}: {state}")
        });
        format!("not finished in time; {}", each.collect::<Vec<_>>().join(", "))
    }

    fn report(&self, quorum_lost: bool) -> Report {
        let newest = self.check.newest();
        let model = newest.map_or(Digest([0; 32]), |decree| decree.model().digest);
        let last = |decree: &crate::protocol::Decree| match decree.reason() {
            Some(_) => Round(decree.round.0.saturating_sub(1)),
            None => decree.round,
        };
        Report {
            rounds: newest.map_or(Round::GENESIS, last),
            model,
            leaders: self.check.decrees().map(|decree| decree.leader.clone()).collect(),
            contributors: self.check.decrees().map(|decree| decree.contributors.len()).collect(),
            reelections: self.reelections,
            faults: self.faults,
            messages: self.messages,
            elapsed: self.elapsed(),
            quorum_lost,
        }
    }

    fn schedule(&mut self, after: Duration, happening: Happening) {
        self.schedule_at(self.now + after, happening);
    }

    fn schedule_at(&mut self, at: Instant, happening: Happening) {
        self.sequence += 1;
        self.queue.insert((at, self.sequence), happening);
    }

    fn happen(&mut self, happening: Happening) -> Result<(), Broken> {
        match happening {
            Happening::Start(id) => self.start(&id),
            Happening::Subscribe(id, start) => {
                if self.is_up(&id, start) {
                    for message in self.network.subscribe(&id) {
                        let delay = self.network.draw_delay(&mut self.rng);
                        self.schedule(delay, Happening::Deliver(id.clone(), start, message));
                    }
                }
                Ok(())
            }
            Happening::Deliver(id, start, message) => {
                if !self.is_up(&id, start) {
                    return Ok(());
                }
                self.messages.1 += 1;
                if self.detail >= Detail::Messages {
                    self.trace_message(&id, &message);
                }
                self.handle(&id, Event::Message(message))
            }
            Happening::Keep(id, start, blob, index, chunk) => {
                if self.is_up(&id, start) {
                    self.keep(&id, blob, index, &chunk)
                } else {
                    Ok(())
                }
            }
            Happening::Work(id, start, job) => {
                if self.is_up(&id, start) {
                    self.work(&id, job)
                } else {
                    Ok(())
                }
            }
            Happening::Wake(id, start) => self.wake(&id, start),
            Happening::Fault(fault) => self.strike(fault),
        }
    }

    fn is_up(&self, id: &PeerId, start: u32) -> bool {
        self.peers.get(id).is_some_and(|peer| peer.peer.is_some() && peer.start == start)
    }

    /// Starts a peer with what it persisted.
    fn start(&mut self, id: &PeerId) -> Result<(), Broken> {
        let Some(simulated) = self.peers.get_mut(id).filter(|peer| peer.peer.is_none() && !peer.lost_for_good) else {
            return Ok(());
        };
        simulated.start += 1;
        simulated.stopped = false;
        simulated.wake = None;
        simulated.prepared = None;
        let held = simulated.held();
        let (layout, num_examples, summary) = {
            let trainer = simulated.trainer();
            (trainer.layout(), trainer.num_examples(), trainer.summary())
        };
        let broker = Address::new(&format!("{id}:1883")).ok();
        let (incarnation, summary) = (Incarnation(simulated.incarnation), Bytes::from(summary));
        let identity = Identity { peer: id.clone(), incarnation, layout, num_examples, broker, summary };
        let peer = Peer::new(self.config.clone(), identity, simulated.durable.clone(), &held, self.now);
        #[cfg(test)]
        let peer = {
            let mut peer = peer;
            peer.flaws = self.flaws;
            peer
        };
        simulated.peer = Some(peer);
        self.network.attach(id);
        self.connect(id)
    }

    /// The hello is out before the peer subscribes, so that of any two peers one sees the other.
    fn connect(&mut self, id: &PeerId) -> Result<(), Broken> {
        if self.network.is_cut(id) {
            return Ok(());
        }
        self.handle(id, Event::Connected)?;
        let start = self.peers[id].start;
        let round_trip = self.network.draw_delay(&mut self.rng) + self.network.draw_delay(&mut self.rng);
        self.schedule(round_trip, Happening::Subscribe(id.clone(), start));
        Ok(())
    }

    fn wake(&mut self, id: &PeerId, start: u32) -> Result<(), Broken> {
        if !self.is_up(id, start) {
            return Ok(());
        }
        if let Some(peer) = self.peers.get_mut(id) {
            peer.wake = None;
        }
        self.wakes_at_once += 1;
        if self.wakes_at_once > WAKES_AT_ONCE_MAX {
            return Err((check::LIVENESS, format!("{id} wakes again and again")));
        }
        self.handle(id, Event::Tick)
    }

    /// The same lines as in the node: take an event, match the actions, sleep until the deadline.
    fn handle(&mut self, id: &PeerId, event: Event) -> Result<(), Broken> {
        let now = self.now;
        let Some(simulated) = self.peers.get_mut(id) else { return Ok(()) };
        let Some(peer) = simulated.peer.as_mut() else { return Ok(()) };
        let actions = peer.handle(event, now);
        let (deadline, start) = (peer.deadline(), simulated.start);
        let deadline =
            deadline.map(|at| at.max(now)).filter(|at| simulated.wake.is_none_or(|wake| wake < now || *at < wake));
        simulated.wake = deadline.or(simulated.wake);
        for action in actions {
            if let Some(left) = self.peers.get_mut(id).and_then(|peer| peer.crash_after.as_mut()) {
                if *left == 0 {
                    self.crash(id);
                    return Ok(());
                }
                *left -= 1;
            }
            self.act(id, action)?;
        }
        if let Some(deadline) = deadline {
            self.schedule_at(deadline, Happening::Wake(id.clone(), start));
        }
        match self.peers.get_mut(id).and_then(|peer| peer.prepared.take()) {
            Some(layout) => self.handle(id, Event::Prepared(layout)),
            None => Ok(()),
        }
    }

    fn prepare(&mut self, id: &PeerId, summary: &[u8]) -> Result<(), Broken> {
        let Some(peer) = self.peers.get_mut(id) else { return Ok(()) };
        let prepared = {
            let mut trainer = peer.trainer();
            trainer.prepare(summary).map(|()| trainer.layout())
        };
        let layout = prepared.map_err(|why| (check::ONE_DECREE, format!("{id} cannot be prepared: {why}")))?;
        peer.workshop.layout = layout.clone();
        peer.prepared = Some(layout);
        Ok(())
    }

    fn act(&mut self, id: &PeerId, action: Action) -> Result<(), Broken> {
        match action {
            Action::Persist(durable) => {
                if let Some(peer) = self.peers.get_mut(id) {
                    peer.durable = Some(*durable);
                }
                self.check_persisted(id)
            }
            Action::Publish { topic, retain, message } => self.publish(id, &topic, retain, &message),
            Action::SendChunk { topic, header, manifest, index } => {
                let blob = self.peers[id].blobs.get(manifest.digest).ok().flatten();
                match blob.and_then(|blob| manifest.chunk(&blob, index)) {
                    Some(chunk) => self.publish(id, &topic, false, &Bytes::from([header, chunk].concat())),
                    None => Ok(()),
                }
            }
            Action::Start(job) => {
                let longest = if matches!(job, Job::Train { .. }) { self.scenario.train_ms } else { 20 };
                let span = Duration::from_millis(longest).mul_f64(self.rng.random());
                if let (Job::Train { round, model, .. }, Some(peer)) = (&job, self.peers.get_mut(id)) {
                    peer.training = Some((*round, *model));
                }
                let start = self.peers[id].start;
                self.schedule(span, Happening::Work(id.clone(), start, job));
                Ok(())
            }
            Action::Take(intake) => {
                self.take(id, intake);
                Ok(())
            }
            Action::Prepare(summary) => self.prepare(id, &summary),
            // There is one broker, whatever the peers believe.
            Action::CancelTraining(_) | Action::Brokers(_) => Ok(()),
            Action::Retain(keep) => {
                // Memory cannot fail.
                let _ = self.peers[id].blobs.retain(&keep);
                Ok(())
            }
            Action::Notify(notice) => {
                self.note(id, &notice);
                Ok(())
            }
            Action::Stop => {
                // A peer that is done stays up here: who lags behind may still ask it.
                if let Some(peer) = self.peers.get_mut(id) {
                    peer.stopped = true;
                }
                Ok(())
            }
        }
    }

    fn take(&mut self, id: &PeerId, intake: Intake) {
        let Some(peer) = self.peers.get_mut(id) else { return };
        match intake {
            Intake::Begin(manifest, keep) => {
                peer.receiving.insert(manifest.digest, ((manifest, keep), None));
            }
            Intake::Chunk { blob, index, chunk } => {
                let start = peer.start;
                let span = Duration::from_millis(10).mul_f64(self.rng.random());
                self.schedule(span, Happening::Keep(id.clone(), start, blob, index, chunk));
            }
            Intake::Abandon(blob) => _ = peer.receiving.remove(&blob),
        }
    }

    /// Puts a chunk away, unless the blob is no longer wanted.
    fn keep(&mut self, id: &PeerId, blob: Digest, index: u32, chunk: &Bytes) -> Result<(), Broken> {
        let fails = self.rng.random_bool(self.job_failures);
        let Some(peer) = self.peers.get_mut(id) else { return Ok(()) };
        let Some(((manifest, keep), mut receiving)) = peer.receiving.remove(&blob) else { return Ok(()) };
        // Memory is never full.
        let give_up = &mut |_| ControlFlow::Break(());
        let mut take = || {
            let receiving = match &mut receiving {
                Some(receiving) => receiving,
                none => none.insert(peer.workshop.receive(manifest, keep, give_up)?),
            };
            receiving.take(index, chunk, give_up)
        };
        let taken = take();
        let result = match if fails { Err("the disk is full".to_owned()) } else { taken } {
            Ok(false) => {
                peer.receiving.insert(blob, ((manifest, keep), receiving));
                return self.handle(id, Event::Done(Done::Kept { blob }));
            }
            Ok(true) => Ok(()),
            Err(why) => Err(why),
        };
        self.handle(id, Event::Done(Done::Verified { manifest, keep, result }))
    }

    fn check_persisted(&mut self, id: &PeerId) -> Result<(), Broken> {
        let (peers, replaced) = (&self.peers, &self.replaced);
        let all = || {
            let every = peers.iter().chain(replaced.iter().map(|(id, peer)| (id, peer)));
            let persisted = every.filter_map(|(id, peer)| {
                let (incarnation, blobs) = (Incarnation(peer.incarnation), &peer.blobs);
                peer.durable.as_ref().map(|durable| Persisted { peer: id, incarnation, durable, blobs })
            });
            persisted.collect()
        };
        match &peers[id].durable {
            Some(durable) => {
                self.check.persisted(id, durable, all)?;
                if self.scenario.codec == Codec::TopK {
                    self.check.check_books(id, durable, &peers[id].workshop)?;
                }
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn publish(&mut self, id: &PeerId, topic: &Topic, retain: bool, message: &Bytes) -> Result<(), Broken> {
        self.messages.0 += 1;
        self.check.sent(message)?;
        for (to, delay) in self.network.publish(id, topic, retain, message, &mut self.rng) {
            let start = self.peers[&to].start;
            self.schedule(delay, Happening::Deliver(to, start, message.clone()));
        }
        Ok(())
    }

    fn work(&mut self, id: &PeerId, job: Job) -> Result<(), Broken> {
        if self.rng.random_bool(self.job_failures) {
            return self.handle(id, Event::Done(failed(&job)));
        }
        let Some(peer) = self.peers.get_mut(id) else { return Ok(()) };
        let done = peer.workshop.perform(
            job,
            &peer.trainer,
            &mut |_, _| ControlFlow::Continue(()),
            // Memory is never full.
            &mut |_| ControlFlow::Break(()),
        );
        if let (Done::Trained { round, result: Ok(trained) }, Some((_, model))) = (&done, peer.training) {
            let update = trained.update;
            // Memory has what was just put there.
            let sent = || {
                let blob = peer.workshop.blobs.get(update.digest).ok().flatten()?;
                update.codec.decode(&blob, &peer.workshop.layout).ok()
            };
            if update.codec == Codec::TopK
                && let (Ok(base), Some(sent)) = (peer.workshop.load_model(&model), sent())
            {
                let mut learned = peer.trainer().weights();
                learned.subtract(&base);
                self.check.learned(id, update.digest, learned, sent);
            }
            if let Ok(weights) = peer.workshop.load_update(&update) {
                self.check.trained(id, *round, model.digest, update.digest, weights)?;
            }
        }
        self.handle(id, Event::Done(done))
    }

    fn strike(&mut self, fault: Fault) -> Result<(), Broken> {
        let up: Vec<PeerId> =
            self.peers.iter().filter(|(_, peer)| peer.peer.is_some()).map(|(id, _)| id.clone()).collect();
        let Some(victim) = up.choose(&mut self.rng).cloned() else { return Ok(()) };
        match fault {
            Fault::Crash => {
                if let Some(peer) = self.peers.get_mut(&victim) {
                    peer.crash_after = Some(self.rng.random_range(0..6));
                }
            }
            Fault::LoseState if self.may_lose(&victim) => self.lose_state(&victim),
            Fault::LoseState => {}
            Fault::Cut => self.cut(&up)?,
            Fault::Heal => self.heal()?,
            Fault::End => self.end_faults()?,
        }
        Ok(())
    }

    /// Losing a founder's state before there is a federation is a reason to begin anew, not one to survive.
    fn may_lose(&self, id: &PeerId) -> bool {
        let newest = self.check.newest();
        newest.is_some_and(|decree| decree.next_roster.len() > 2 || !decree.next_roster.contains(id))
    }

    fn crash(&mut self, id: &PeerId) {
        self.faults += 1;
        self.say(id, "crashes");
        self.take_down(id);
        let back = Duration::from_millis(self.rng.random_range(50..4_000));
        self.schedule(back, Happening::Start(id.clone()));
    }

    fn take_down(&mut self, id: &PeerId) {
        let Some(peer) = self.peers.get_mut(id) else { return };
        let will = peer.peer.take().map(|peer| peer.last_will());
        peer.receiving.clear();
        peer.crash_after = None;
        // The process has crashed, or the machine.
        if self.rng.random_bool(0.5) {
            self.check.lost(id, &peer.blobs.lose_power());
        }
        self.network.detach(id);
        // The broker notices most deaths at once, some never.
        if let Some((topic, message)) = will.filter(|_| self.rng.random_bool(0.7)) {
            for (to, delay) in self.network.publish(id, &topic, true, &message, &mut self.rng) {
                let start = self.peers[&to].start;
                self.schedule(delay, Happening::Deliver(to, start, message.clone()));
            }
        }
    }

    /// A machine burns down; another takes its place, under a new name or the old one.
    fn lose_state(&mut self, id: &PeerId) {
        self.faults += 1;
        self.say(id, "loses its state");
        self.take_down(id);
        let Some(lost) = self.peers.get_mut(id) else { return };
        // What it had held counts for what was decided with it.
        lost.lost_for_good = true;
        let (start, incarnation) = (lost.start, lost.incarnation + 1);
        let keeps_name = self.rng.random_bool(0.5);
        let Ok(heir) = PeerId::new(&if keeps_name { id.to_string() } else { format!("{id}.new") }) else { return };
        if keeps_name {
            self.replaced.extend(self.peers.remove_entry(id));
            self.check.replaced(id);
        }
        if !self.peers.contains_key(&heir) {
            self.add(heir.clone());
            if let Some(peer) = self.peers.get_mut(&heir).filter(|_| keeps_name) {
                (peer.start, peer.incarnation) = (start, incarnation);
            }
            let back = Duration::from_millis(self.rng.random_range(50..4_000));
            self.schedule(back, Happening::Start(heir));
        }
    }

    /// Cuts some peers off: one each before there is a roster, since one broker cannot serve two sides; later also
    /// several together, as with two brokers.
    fn cut(&mut self, up: &[PeerId]) -> Result<(), Broken> {
        self.faults += 1;
        let together = self.check.is_founded() && self.rng.random_bool(0.5);
        let count = self.rng.random_range(1..=up.len().div_ceil(2));
        let victims: Vec<PeerId> = up.choose_multiple(&mut self.rng, count).cloned().collect();
        let noticed = self.rng.random_bool(0.5);
        for (index, id) in victims.iter().enumerate() {
            let side: Side = if together { 1 } else { 2 + index };
            self.say(id, if together { "is cut off with others" } else { "is cut off" });
            if noticed && !together {
                self.network.detach(id);
                self.handle(id, Event::Disconnected)?;
            }
            self.network.cut(id, side);
        }
        let back = Duration::from_millis(self.rng.random_range(200..8_000));
        self.schedule(back, Happening::Fault(Fault::Heal));
        Ok(())
    }

    fn heal(&mut self) -> Result<(), Broken> {
        let ids: Vec<PeerId> = self.peers.keys().cloned().collect();
        for id in ids.iter().filter(|id| self.network.is_cut(id)).collect::<Vec<_>>() {
            self.say(id, "is connected again");
            self.network.cut(id, 0);
            if self.peers[id].peer.is_some() {
                self.connect(id)?;
            }
        }
        Ok(())
    }

    fn end_faults(&mut self) -> Result<(), Broken> {
        self.network.loss = 0.0;
        self.network.duplication = 0.0;
        self.job_failures = 0.0;
        for peer in self.peers.values_mut() {
            peer.crash_after = None;
        }
        let down: Vec<PeerId> =
            self.peers.iter().filter(|(_, peer)| peer.peer.is_none()).map(|(id, _)| id.clone()).collect();
        self.heal()?;
        for id in down {
            self.start(&id)?;
        }
        // Faults that are still to come are over too.
        self.queue.retain(|_, happening| !matches!(happening, Happening::Fault(_)));
        Ok(())
    }

    fn note(&mut self, id: &PeerId, notice: &Notice) {
        let every = self.detail >= Detail::Notices;
        match notice {
            Notice::Committed(committed) => {
                self.reelections += u64::from(committed.led && committed.term > Term(0));
                if committed.led || every {
                    let decree = &committed.decree;
                    let (round, term, parts) = (decree.round, committed.term, decree.contributors.len());
                    let verb = if committed.led { "commits" } else { "learns" };
                    let what = decree.reason().map_or("a model".to_owned(), |reason| format!("the end: {reason}"));
                    self.say(id, &format!("{verb} round {round} in term {term}: {what}, {parts} contributors"));
                }
            }
            _ if every => self.say(id, &format!("{notice:?}")),
            _ => {}
        }
    }

    fn say(&mut self, id: &PeerId, text: &str) {
        let at = self.elapsed();
        (self.trace)(at, id, text);
    }

    fn trace_message(&mut self, to: &PeerId, message: &Bytes) {
        if let Ok((envelope, _)) = Envelope::decode(message) {
            let Envelope { sender, round, term, body, .. } = envelope;
            self.say(to, &format!("<- {sender} {round:?} {term:?} {body:?}"));
        }
    }
}

impl SimulatedPeer {
    fn trainer(&self) -> MutexGuard<'_, Box<dyn Trainer>> {
        self.trainer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> BTreeSet<Digest> {
        let manifests = self.durable.iter().flat_map(Durable::manifests);
        let held = |manifest: &&Manifest| self.blobs.open(manifest.digest).is_ok_and(|blob| blob.is_some());
        manifests.filter(held).map(|manifest| manifest.digest).collect()
    }

    fn is_stranger(&self) -> bool {
        self.durable.as_ref().is_none_or(|durable| durable.roster().is_none())
    }

    fn has(&self, last: &crate::protocol::Decree) -> bool {
        let head = self.durable.as_ref().and_then(|durable| durable.head.as_ref());
        let holds = self.blobs.open(last.model().digest).is_ok_and(|blob| blob.is_some());
        holds && head.is_some_and(|head| head.decree == *last)
    }
}

/// The end of a job that could not be done.
fn failed(job: &Job) -> Done {
    let why = "the disk is full".to_owned();
    match job {
        Job::Initial => Done::Initial(Err(why)),
        Job::Evaluate { model } => Done::Evaluated { model: model.digest, result: Err(why) },
        Job::Train { round, .. } => Done::Trained { round: *round, result: Err(why) },
        Job::Flush { blob } => Done::Flushed { blob: *blob, result: Err(why) },
        Job::Aggregate { round, term, .. } => Done::Aggregated { round: *round, term: *term, result: Err(why) },
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;

    /// How many lines all that the peers remember, with its blobs, takes to print: nothing that they keep stands outside of it.
    fn remembered(world: &World<'_>) -> usize {
        let lines = |peer: &SimulatedPeer| format!("{:#?}", (&peer.peer, &peer.blobs, &peer.receiving)).lines().count();
        world.peers.values().map(lines).sum()
    }

    /// What is remembered when the last peer enters a round, by round.
    fn remembered_by_round(scenario: &Scenario, seed: u64) -> BTreeMap<Round, usize> {
        let mut quiet = |_: Duration, _: &PeerId, _: &str| {};
        let mut world = World::new(scenario, seed, Detail::Commits, &mut quiet);
        let mut by_round = BTreeMap::new();
        while !world.is_over() {
            let ((at, _), happening) = world.queue.pop_first().expect("a run that is not over goes on");
            world.wakes_at_once = if at > world.now { 0 } else { world.wakes_at_once };
            world.now = at;
            world.happen(happening).unwrap();
            let rounds = world.peers.values().map(|peer| peer.peer.as_ref().map(Peer::round)).min().flatten();
            if let Some(round) = rounds {
                by_round.entry(round).or_insert_with(|| remembered(&world));
            }
        }
        by_round
    }

    #[test]
    fn what_a_peer_remembers_does_not_grow_with_the_rounds() {
        let lossy = Scenario { rounds: 130, crashes: 0, cuts: 0, ..Scenario::default() };
        for codec in [Codec::F32, Codec::TopK] {
            let by_round = remembered_by_round(&Scenario { codec, ..lossy.clone() }, 1);
            // What is on its way differs from round to round.
            let median = |rounds: Range<u64>| {
                let of = by_round.range(Round(rounds.start)..Round(rounds.end));
                let mut lines: Vec<usize> = of.map(|(_, lines)| *lines).collect();
                lines.sort_unstable();
                lines[lines.len() / 2]
            };
            let (early, late) = (median(10..50), median(90..130));
            // An entry for each round in one of the peers would be 80 lines more.
            assert!(late < early + 40, "{codec}: {early} lines before round 50, {late} from 90 on");
        }
    }
}
