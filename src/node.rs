//! The node: one peer's protocol, driven by a real clock, a transport and blocking threads.
//!
//! What there is to do is done in its order. Where the disk has no room for a promise, or for what a job made, the node
//! pauses: see `Driver::pause`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::ops::ControlFlow;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::buffers::Buffers;
use crate::intake::{Host, Intakes};
use crate::jobs::Workshop;
use crate::journal::{self, Blobs, Journal, JournalError};
use crate::protocol::message::{Body, Envelope, VERSION};
use crate::protocol::{
    Action, Config, Difference, Done, Durable, Event, Identity, Job, Notice, Peer, Reason, Roaming, Topic, Topics,
    Waiting,
};
use crate::training::cores::Cores;
use crate::training::{Names, Progress, TrainError, Trainer};
use crate::transfer::{Codecs, Manifest};
use crate::transport::{Class, Found, Outgoing, Transport, TransportEvent, Will};
use crate::types::{Address, Digest, Metrics, PeerId, Round, Term};
use crate::weights::Layout;

/// How often a paused node tries whether the disk has room.
const ROOM_PERIOD: Duration = Duration::from_secs(1);

/// Where a node keeps its promises.
#[derive(Debug)]
pub enum Storage {
    /// In a state directory: a restart goes on.
    Disk(Journal),
    /// Nowhere: a restart would be another peer.
    Memory,
}

/// What a node is made of.
pub struct Node<T> {
    /// The peer's name.
    pub peer: PeerId,
    /// The configuration shared with all peers.
    pub config: Config,
    /// How weights are written.
    pub codecs: Codecs,
    /// The federation's topics.
    pub topics: Topics,
    /// The way to the others.
    pub transport: T,
    /// Where promises are kept.
    pub storage: Storage,
    /// What was stored before, if anything.
    pub durable: Option<Durable>,
    /// Model and data.
    pub trainer: Box<dyn Trainer>,
    /// On how many threads it trains.
    pub threads: usize,
    /// Where it meets the others.
    pub meeting: Meeting,
    /// Give up after waiting this long for others, or for a broker that was lost.
    pub wait_timeout: Option<Duration>,
}

/// The brokers where a node may meet the others.
#[derive(Clone, Debug, Default)]
pub struct Meeting {
    /// Those that it was told of, `HOST:PORT`, the best first.
    pub brokers: Vec<String>,
    /// The broker that its own process hosts.
    pub hosted: Option<Hosted>,
}

/// A broker of one's own.
#[derive(Clone, Debug)]
pub struct Hosted {
    /// Where this machine reaches it, `HOST:PORT`.
    pub local: String,
    /// Where the others do, if they can.
    pub advertised: Option<Address>,
}

impl Meeting {
    /// All brokers to try, the best first: those that it was told of, then the `standbys` that members host, each once.
    pub fn list<'a>(&self, standbys: impl IntoIterator<Item = &'a Address>) -> Vec<String> {
        let mut list = self.brokers.clone();
        for standby in standbys {
            // The way to a broker of one's own does not lead over the network.
            let own = self.hosted.as_ref().filter(|hosted| hosted.advertised.as_ref() == Some(standby));
            let broker = own.map_or_else(|| standby.to_string(), |hosted| hosted.local.clone());
            if !list.contains(&broker) {
                list.push(broker);
            }
        }
        list
    }
}

/// What a node tells whoever watches it.
#[derive(Debug)]
pub enum Observation<'a> {
    /// Something of the protocol, with the bytes that passed since the last commit.
    Notice(&'a Notice, Traffic),
    /// It is known what all founders' inputs are like, and the trainer is prepared.
    Prepared {
        /// The encoded summary of all inputs.
        summary: &'a [u8],
        /// Names and shapes of the model.
        layout: &'a Layout,
        /// What its inputs and outputs are called.
        names: Names,
    },
    /// Local training goes on.
    Training(Round, Progress),
    /// A broker was tried. Told once for what was found at its address.
    Probed {
        /// Its address.
        broker: &'a str,
        /// What it can do.
        found: &'a Found,
        /// The length of a chunk that this peer uses there, in bytes, and the one that is set.
        chunk_bytes: [u32; 2],
    },
    /// The broker was reached.
    Connected(&'a str),
    /// The broker was lost.
    Disconnected(&'a str),
    /// The others are missed here; the peer looks for them at this broker.
    Moving(&'a str),
    /// The disk of this directory takes nothing, for this reason: the node waits, and says nothing to the others.
    Paused(&'a Path, &'static str),
    /// It takes what was to be written, and the node goes on.
    Resumed,
}

/// Bytes of messages, as published and as received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Sent, in bytes.
    pub sent: u64,
    /// Received, in bytes.
    pub received: u64,
}

impl Traffic {
    /// Both together.
    #[must_use]
    pub fn plus(self, other: Traffic) -> Traffic {
        Traffic { sent: self.sent + other.sent, received: self.received + other.received }
    }
}

/// How a node's run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// The federation finished.
    Finished {
        /// Why.
        reason: Reason,
        /// How many rounds made a model.
        rounds: Round,
        /// The last model.
        model: Digest,
        /// Its metrics over all peers.
        metrics: Option<Metrics>,
    },
    /// The federation finished, but nobody was left to serve its last model.
    FinishedWithoutModel,
    /// The peer does not fit the federation.
    Refused {
        /// A member.
        peer: PeerId,
        /// What differs.
        difference: Difference,
    },
    /// Waited too long.
    GaveUp(Waiting),
    /// The broker was lost and did not come back in time; says why.
    LostBroker(String),
    /// Asked to stop; the state is kept.
    Interrupted,
}

/// Why a node cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The state directory failed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The peer's examples do not fit the federation's.
    #[error(transparent)]
    Unfit(#[from] TrainError),
    /// A thread of this node panicked: a bug.
    #[error("a job ended without a result")]
    LostJob,
}

/// The running parts of a node.
struct Driver<'a, T> {
    transport: T,
    topics: Topics,
    storage: Storage,
    blobs: Blobs,
    workshop: Arc<Workshop>,
    /// The length of a chunk where the broker takes it, in bytes.
    chunk_bytes: u32,
    /// What was found at each broker, as far as that was told.
    found: BTreeMap<String, Found>,
    trainer: Arc<Mutex<Box<dyn Trainer>>>,
    /// On how many threads it works.
    threads: usize,
    /// The blobs that are being received.
    intakes: Intakes,
    /// Chunks to be sent, for the task that reads them.
    serving: mpsc::UnboundedSender<Served>,
    jobs: mpsc::UnboundedSender<JobEvent>,
    /// The jobs that run.
    running: JoinSet<()>,
    /// What is still to be done, in its order.
    todo: VecDeque<Action>,
    /// The model's layout, as long as the peer is not told that it is known.
    prepared: Option<Arc<Layout>>,
    /// Why the first of that, or a job, cannot be written.
    obstacle: Option<&'static str>,
    /// How many jobs wait for room on the disk.
    blocked: Arc<AtomicUsize>,
    /// A word to each of them lets it try again; without one it gives up.
    retries: Vec<oneshot::Sender<()>>,
    /// Training of rounds up to this one is no longer wanted.
    cancelled: Arc<AtomicU64>,
    traffic: Traffic,
    waiting: Option<(Waiting, Instant)>,
    roaming: Roaming,
    meeting: Meeting,
    /// The whole list of brokers, with the standbys that are known.
    brokers: Vec<String>,
    /// Where the peer is, or was last.
    broker: String,
    /// Why there is no broker, and since when.
    lost: Option<(String, Instant)>,
    outcome: Option<Outcome>,
    stopping: bool,
    observe: &'a mut (dyn FnMut(Observation<'_>) + Send),
}

/// A chunk to be sent.
struct Served {
    topic: String,
    header: bytes::Bytes,
    manifest: Manifest,
    index: u32,
}

enum JobEvent {
    Progress(Round, Progress),
    /// A chunk was read and is to be sent.
    Send(Outgoing),
    /// The disk has no room for what the job made. It waits for a word.
    Full(JournalError, oneshot::Sender<()>),
    Done(Result<Done, NodeError>),
}

/// What the broker publishes for a peer that dies: a goodbye.
pub fn last_will(peer: &PeerId, topics: &Topics) -> Will {
    let signature = Vec::new();
    let (sender, round, term) = (peer.clone(), Round::GENESIS, Term(0));
    let goodbye = Envelope { version: VERSION, sender, signature, round, term, body: Body::Goodbye };
    Will { topic: topics.name(&Topic::Init(peer.clone())), payload: goodbye.encode(), retain: true }
}

impl<T: Transport> Node<T> {
    /// Takes part until the federation finishes, `shutdown` ends or nothing more can be done.
    ///
    /// On every way out but a failure of this machine the peer says goodbye, so that the others need not wait for its
    /// silence.
    pub async fn run(
        self,
        shutdown: impl Future<Output = ()>,
        observe: &mut (dyn FnMut(Observation<'_>) + Send),
    ) -> Result<Outcome, NodeError> {
        let (blobs, incarnation) = match &self.storage {
            Storage::Disk(journal) => (journal.blobs(), journal.incarnation()),
            Storage::Memory => (Blobs::memory(), journal::new_incarnation()),
        };
        let layout = self.trainer.layout();
        let identity = Identity {
            peer: self.peer.clone(),
            incarnation,
            layout: layout.clone(),
            num_examples: self.trainer.num_examples(),
            broker: self.meeting.hosted.as_ref().and_then(|hosted| hosted.advertised.clone()),
            summary: self.trainer.summary().into(),
        };
        let peer = self.peer.clone();
        let roaming = Roaming::new(self.peer, self.config.election_timeout);
        let held = held_blobs(self.durable.as_ref(), &blobs)?;
        let chunk_bytes = u32::try_from(self.config.chunk_bytes).unwrap_or(u32::MAX);
        let (codecs, strategy) = (self.codecs, self.config.strategy);
        let leftovers = Arc::default();
        let workshop = Workshop { blobs: blobs.clone(), layout, peer, codecs, strategy, chunk_bytes, leftovers };
        let mut peer = Peer::new(self.config, identity, self.durable, &held, Instant::now());
        let (jobs, mut ended) = mpsc::unbounded_channel();
        let (serving, served) = mpsc::unbounded_channel();
        let mut running = JoinSet::new();
        running.spawn(serve(blobs.clone(), served, jobs.clone()));
        let mut driver = Driver {
            transport: self.transport,
            topics: self.topics,
            storage: self.storage,
            blobs,
            workshop: Arc::new(workshop),
            chunk_bytes,
            found: BTreeMap::new(),
            trainer: Arc::new(Mutex::new(self.trainer)),
            threads: self.threads,
            intakes: Intakes::default(),
            serving,
            jobs,
            running,
            todo: VecDeque::new(),
            prepared: None,
            obstacle: None,
            blocked: Arc::default(),
            retries: Vec::new(),
            cancelled: Arc::default(),
            traffic: Traffic::default(),
            waiting: None,
            roaming,
            brokers: self.meeting.brokers.clone(),
            meeting: self.meeting,
            broker: String::new(),
            lost: None,
            outcome: None,
            stopping: false,
            observe,
        };
        let outcome = match driver.drive(&mut peer, &mut ended, shutdown, self.wait_timeout).await {
            Err(error) if !matches!(error, NodeError::Unfit(_)) => {
                // Nobody waits any more for what is being trained.
                driver.cancelled.store(u64::MAX, Ordering::Relaxed);
                return Err(error);
            }
            outcome => outcome,
        };
        // Jobs that wait for room hear no word any more, and give up.
        drop(ended);
        driver.leave(&peer).await;
        outcome
    }
}

/// The blobs that the stored promises rest on and that are really there.
fn held_blobs(durable: Option<&Durable>, blobs: &Blobs) -> Result<BTreeSet<Digest>, NodeError> {
    let mut held = BTreeSet::new();
    for manifest in durable.into_iter().flat_map(Durable::manifests) {
        if blobs.open(manifest.digest)?.is_some() {
            held.insert(manifest.digest);
        }
    }
    Ok(held)
}

impl<T: Transport> Driver<'_, T> {
    async fn drive(
        &mut self,
        peer: &mut Peer,
        ended: &mut mpsc::UnboundedReceiver<JobEvent>,
        shutdown: impl Future<Output = ()>,
        wait_timeout: Option<Duration>,
    ) -> Result<Outcome, NodeError> {
        let mut shutdown = std::pin::pin!(shutdown);
        // What a pause leaves to be handled before anything new.
        let mut left = VecDeque::new();
        loop {
            let give_up = self.waiting_since().zip(wait_timeout).map(|(since, timeout)| since + timeout);
            let prepared = self.prepared.take().map(Event::Prepared);
            let event = match prepared.or_else(|| left.pop_front()) {
                Some(event) => Some(event),
                None => tokio::select! {
                    () = &mut shutdown => return Ok(Outcome::Interrupted),
                    event = self.transport.next() => self.received(event),
                    job = ended.recv() => self.heard(job)?,
                    () = sleep_until(peer.deadline()) => Some(Event::Tick),
                    () = sleep_until(self.roaming.deadline()) => {
                        self.roaming.moves(Instant::now());
                        self.transport.move_on();
                        None
                    }
                    () = sleep_until(give_up) => match (self.lost.take(), self.waiting.take()) {
                        (Some((reason, _)), _) => return Ok(Outcome::LostBroker(reason)),
                        (None, Some((waiting, _))) => return Ok(Outcome::GaveUp(waiting)),
                        (None, None) => None,
                    },
                },
            };
            if let Some(event) = event {
                self.todo.extend(peer.handle(event, Instant::now()));
                self.work_off()?;
            }
            if self.obstacle.is_some() && self.pause(ended, shutdown.as_mut(), &mut left).await?.is_break() {
                return Ok(Outcome::Interrupted);
            }
            if self.stopping {
                return Ok(self.outcome.take().unwrap_or(Outcome::FinishedWithoutModel));
            }
        }
    }

    /// Since when nothing can be done but wait: for the broker, or else for others.
    fn waiting_since(&self) -> Option<Instant> {
        let lost = self.lost.as_ref().map(|(_, since)| *since);
        lost.or(self.waiting.as_ref().map(|(_, since)| *since))
    }

    /// Where in the list the present broker stands, and how long the list is.
    fn place(&self) -> (usize, usize) {
        let index = self.brokers.iter().position(|broker| *broker == self.broker);
        (index.unwrap_or(self.brokers.len()), self.brokers.len())
    }

    fn received(&mut self, event: TransportEvent) -> Option<Event> {
        Some(match event {
            TransportEvent::Connected { broker, found } => {
                self.lost = None;
                self.adapt(&broker, found);
                (self.observe)(Observation::Connected(&broker));
                self.broker = broker;
                let (index, len) = self.place();
                self.roaming.arrived(index, len, Instant::now());
                Event::Connected
            }
            TransportEvent::Disconnected { reason } => {
                (self.observe)(Observation::Disconnected(&reason));
                self.lost.get_or_insert((reason, Instant::now()));
                self.roaming.lost();
                Event::Disconnected
            }
            TransportEvent::Moving { broker } => {
                (self.observe)(Observation::Moving(&broker));
                self.roaming.lost();
                Event::Disconnected
            }
            // Retained topics are cleared with an empty message.
            TransportEvent::Message { payload, .. } if payload.is_empty() => return None,
            TransportEvent::Message { payload, .. } => {
                self.traffic.received += payload.len() as u64;
                Event::Message(payload)
            }
        })
    }

    /// Makes chunks of the length that the broker takes, from the next blob on.
    fn adapt(&mut self, broker: &str, found: Option<Found>) {
        let limit = found.as_ref().and_then(|found| found.chunk_bytes_max).and_then(|limit| u32::try_from(limit).ok());
        let chunk_bytes = limit.map_or(self.chunk_bytes, |limit| limit.min(self.chunk_bytes));
        if self.workshop.chunk_bytes != chunk_bytes {
            self.workshop = Arc::new(Workshop { chunk_bytes, ..Workshop::clone(&self.workshop) });
        }
        let Some(found) = found.filter(|found| self.found.get(broker) != Some(found)) else { return };
        let chunk_bytes = [chunk_bytes, self.chunk_bytes];
        (self.observe)(Observation::Probed { broker, found: &found, chunk_bytes });
        self.found.insert(broker.to_owned(), found);
    }

    fn heard(&mut self, job: Option<JobEvent>) -> Result<Option<Event>, NodeError> {
        match job {
            Some(JobEvent::Done(done)) => {
                let done = done?;
                if let Done::Verified { manifest, .. } = &done {
                    self.intakes.ended(&manifest.digest);
                }
                return Ok(Some(Event::Done(done)));
            }
            Some(JobEvent::Send(message)) => self.send(message),
            Some(JobEvent::Progress(round, progress)) => (self.observe)(Observation::Training(round, progress)),
            Some(JobEvent::Full(error, retry)) => {
                self.obstacle = error.obstacle();
                self.retries.push(retry);
            }
            None => {}
        }
        Ok(None)
    }

    /// Waits until the disk has room for what is to be written, and writes it. `Break`: asked to stop.
    ///
    /// Nothing that depends on an unwritten promise is sent, so nothing is: the others find this peer silent and go on
    /// without it. To the peer that is a broker that was lost for a while: messages are dropped, and afterwards it hears
    /// of a new connection, which has it say hello, ask again for what it lacks and give everybody time anew.
    async fn pause(
        &mut self,
        ended: &mut mpsc::UnboundedReceiver<JobEvent>,
        mut shutdown: Pin<&mut impl Future<Output = ()>>,
        left: &mut VecDeque<Event>,
    ) -> Result<ControlFlow<()>, NodeError> {
        if let (Storage::Disk(journal), Some(why)) = (&self.storage, self.obstacle) {
            (self.observe)(Observation::Paused(journal.dir(), why));
        }
        let mut period = interval(ROOM_PERIOD);
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        period.reset();
        let mut done = Vec::new();
        while self.obstacle.is_some() || self.blocked.load(Ordering::SeqCst) > 0 {
            tokio::select! {
                () = &mut shutdown => return Ok(ControlFlow::Break(())),
                event = self.transport.next() => {
                    if let Some(Event::Disconnected) = self.received(event) {
                        // What was to be sent on that connection is lost with it.
                        self.todo.retain(|a| !matches!(a, Action::Publish { .. } | Action::SendChunk { .. }));
                    }
                }
                job = ended.recv() => done.extend(self.heard(job)?),
                _ = period.tick() => {
                    self.obstacle = None;
                    self.work_off()?;
                    // One that has given up does not hear it.
                    self.retries.drain(..).for_each(|retry| _ = retry.send(()));
                }
            }
        }
        (self.observe)(Observation::Resumed);
        self.waiting.iter_mut().for_each(|(_, since)| *since = Instant::now());
        left.push_back(if self.lost.is_some() { Event::Disconnected } else { Event::Connected });
        left.extend(done);
        Ok(ControlFlow::Continue(()))
    }

    /// Does what is to be done, up to the first that the disk has no room for.
    fn work_off(&mut self) -> Result<(), NodeError> {
        while let Some(action) = self.todo.pop_front() {
            if let Err(error) = self.write(&action) {
                self.obstacle = error.obstacle();
                self.todo.push_front(action);
                return if self.obstacle.is_some() { Ok(()) } else { Err(error.into()) };
            }
            self.act(action)?;
        }
        Ok(())
    }

    /// The part of an action that changes what is on disk. Doing it again does no harm.
    fn write(&mut self, action: &Action) -> Result<(), JournalError> {
        match (action, &mut self.storage) {
            (Action::Persist(durable), Storage::Disk(journal)) => journal.save_state(&durable.encode()),
            (Action::Retain(keep), _) => self.blobs.retain(keep),
            _ => Ok(()),
        }
    }

    fn act(&mut self, action: Action) -> Result<(), NodeError> {
        match action {
            // Written by now.
            Action::Persist(_) | Action::Retain(_) => {}
            Action::Publish { topic, retain, message } => {
                let topic = self.topics.name(&topic);
                self.send(Outgoing { topic, retain, class: Class::Control, head: message, tail: bytes::Bytes::new() });
            }
            Action::SendChunk { topic, header, manifest, index } => {
                let topic = self.topics.name(&topic);
                // The task ends after this.
                let _ = self.serving.send(Served { topic, header, manifest, index });
            }
            Action::Take(intake) => {
                while self.running.try_join_next().is_some() {}
                let host = Reporter::new(&self.jobs, &self.blocked);
                self.intakes.take(intake, &self.workshop, &host, &mut self.running);
            }
            Action::Start(job) => self.start(job),
            Action::Prepare(summary) => self.prepare(&summary)?,
            Action::CancelTraining(round) => {
                self.cancelled.fetch_max(round.0, Ordering::Relaxed);
            }
            Action::Brokers(standbys) => {
                self.brokers = self.meeting.list(&standbys);
                self.transport.set_brokers(self.brokers.clone());
                let (index, len) = self.place();
                self.roaming.list_changed(index, len);
            }
            Action::Notify(notice) => self.notify(notice),
            Action::Stop => self.stopping = true,
        }
        Ok(())
    }

    fn prepare(&mut self, summary: &[u8]) -> Result<(), NodeError> {
        // No job runs yet, and a job that panicked ends the node.
        let mut trainer = self.trainer.lock().unwrap_or_else(PoisonError::into_inner);
        trainer.prepare(summary)?;
        let (layout, names) = (trainer.layout(), trainer.names());
        drop(trainer);
        (self.observe)(Observation::Prepared { summary, layout: &layout, names });
        self.workshop = Arc::new(Workshop { layout: layout.clone(), ..Workshop::clone(&self.workshop) });
        self.prepared = Some(layout);
        Ok(())
    }

    fn send(&mut self, message: Outgoing) {
        self.traffic.sent += (message.head.len() + message.tail.len()) as u64;
        self.transport.send(message);
    }

    fn start(&mut self, job: Job) {
        while self.running.try_join_next().is_some() {}
        let (workshop, trainer, jobs) = (self.workshop.clone(), self.trainer.clone(), self.jobs.clone());
        let (cancelled, mut reporter) = (self.cancelled.clone(), Reporter::new(&self.jobs, &self.blocked));
        let threads = self.threads;
        self.running.spawn(async move {
            let learns = matches!(job, Job::Train { .. } | Job::Evaluate { .. });
            let cores = if learns { Some(Cores::take(threads).await) } else { None };
            if cancelled.load(Ordering::Relaxed) == u64::MAX {
                // The node leaves, and nobody waits for the result.
                return;
            }
            let report = jobs.clone();
            let work = move || {
                let mut on_progress = |round: Round, progress| {
                    let _ = report.send(JobEvent::Progress(round, progress));
                    if cancelled.load(Ordering::Relaxed) >= round.0 {
                        ControlFlow::Break(())
                    } else {
                        ControlFlow::Continue(())
                    }
                };
                workshop.perform(job, &trainer, &mut on_progress, &mut |error| reporter.full(error))
            };
            let work = move || match cores {
                Some(cores) => cores.run(work),
                None => work(),
            };
            let done = tokio::task::spawn_blocking(work).await.map_err(|_| NodeError::LostJob);
            // Nobody listens once the node has ended.
            let _ = jobs.send(JobEvent::Done(done));
        });
    }

    fn notify(&mut self, mut notice: Notice) {
        match &mut notice {
            Notice::Waiting(waiting) => {
                let now = Instant::now();
                self.roaming.missing(waiting.as_ref().is_some_and(Waiting::is_for_company), now);
                // To be at another broker, and to wait there, is no news of the others.
                let since = self.roaming.searching_since().unwrap_or(now);
                self.waiting = waiting.clone().map(|waiting| (waiting, since));
            }
            Notice::Finished { reason, rounds, model, metrics } => {
                let (reason, rounds, model, metrics) = (*reason, *rounds, *model, *metrics);
                self.outcome = Some(Outcome::Finished { reason, rounds, model, metrics });
            }
            Notice::Refused { peer, difference } => {
                self.outcome = Some(Outcome::Refused { peer: peer.clone(), difference: difference.clone() });
            }
            // The decree is durable and announced only now.
            Notice::Committed(committed) => {
                let spent = committed.decided.elapsed().as_secs_f64();
                committed.seconds.commit += spent;
                committed.seconds.total += spent;
            }
            _ => {}
        }
        (self.observe)(Observation::Notice(&notice, self.traffic));
        if matches!(notice, Notice::Committed(_)) {
            self.traffic = Traffic::default();
        }
    }

    /// Says goodbye and waits for what runs, so that nobody uses the state directory any more.
    async fn leave(mut self, peer: &Peer) {
        self.cancelled.store(u64::MAX, Ordering::Relaxed);
        self.retries.clear();
        self.intakes.clear();
        self.serving = mpsc::unbounded_channel().0;
        let (topic, message) = peer.last_will();
        let topic = self.topics.name(&topic);
        let tail = bytes::Bytes::new();
        self.send(Outgoing { topic, retain: true, class: Class::Control, head: message, tail });
        self.transport.stop().await;
        while self.running.join_next().await.is_some() {}
    }
}

/// Reads the chunks that are to be sent, in their order, until no more will come.
async fn serve(blobs: Blobs, mut chunks: mpsc::UnboundedReceiver<Served>, jobs: mpsc::UnboundedSender<JobEvent>) {
    let mut buffers = Buffers::default();
    loop {
        let mut batch = Vec::new();
        if chunks.recv_many(&mut batch, usize::MAX).await == 0 {
            return;
        }
        let (blobs, report) = (blobs.clone(), jobs.clone());
        let read = move || -> Result<Buffers, NodeError> {
            for Served { topic, header, manifest, index } in batch {
                // One that was dropped meanwhile is of a round that is over.
                let Some(blob) = blobs.open(manifest.digest)? else { continue };
                let (head, tail) = blob.behind(header, manifest.chunk_range(index), &mut buffers)?;
                let _ = report.send(JobEvent::Send(Outgoing { topic, retain: false, class: Class::Bulk, head, tail }));
            }
            Ok(buffers)
        };
        match tokio::task::spawn_blocking(read).await.unwrap_or(Err(NodeError::LostJob)) {
            Ok(used) => buffers = used,
            Err(error) => {
                let _ = jobs.send(JobEvent::Done(Err(error)));
                return;
            }
        }
    }
}

/// The way of work on other threads to its node.
struct Reporter {
    jobs: mpsc::UnboundedSender<JobEvent>,
    blocked: Arc<AtomicUsize>,
    /// Whether it counts among the blocked.
    is_blocked: bool,
}

impl Reporter {
    fn new(jobs: &mpsc::UnboundedSender<JobEvent>, blocked: &Arc<AtomicUsize>) -> Self {
        Self { jobs: jobs.clone(), blocked: blocked.clone(), is_blocked: false }
    }
}

impl Host for Reporter {
    fn done(&self, done: Done) {
        // Nobody listens once the node has ended.
        let _ = self.jobs.send(JobEvent::Done(Ok(done)));
    }

    fn full(&mut self, error: JournalError) -> ControlFlow<()> {
        if !std::mem::replace(&mut self.is_blocked, true) {
            self.blocked.fetch_add(1, Ordering::SeqCst);
        }
        let (retry, word) = oneshot::channel();
        // When nobody listens any more, the word's sender is dropped with the report.
        let _ = self.jobs.send(JobEvent::Full(error, retry));
        if word.blocking_recv().is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    fn lost(&self) {
        let _ = self.jobs.send(JobEvent::Done(Err(NodeError::LostJob)));
    }
}

impl Clone for Reporter {
    fn clone(&self) -> Self {
        Self::new(&self.jobs, &self.blocked)
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        if self.is_blocked {
            self.blocked.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standbys_stand_behind_what_one_was_told_and_ones_own_is_reached_without_the_network() {
        let address = |text| Address::new(text).unwrap();
        let hosted = Some(Hosted { local: "127.0.0.1:2".into(), advertised: Some(address("ward:2")) });
        let meeting = Meeting { brokers: vec!["lab:1".into()], hosted };
        let list = meeting.list(&[address("lab:1"), address("ward:2"), address("lab:3")]);
        assert_eq!(list, ["lab:1", "127.0.0.1:2", "lab:3"]);
    }
}
