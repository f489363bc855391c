//! A peer of which only the transfers are left: it holds a blob, or pulls some, with what peers use for it.
//!
//! Inside a peer the protocol decides what is pulled when; here it is an order. The rest is the peer's: its transport and
//! its two connections, its messages, its pulls and what becomes of their chunks. A leader's heartbeats pass meanwhile, which is how it shows whether weights hold up control.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use super::role::{Order, Report, Tally};
use super::trainer::{initial_weights, layout};
use super::usage::Usage;
use super::{Failure, Site};
use crate::aggregation::Strategy;
use crate::buffers::Buffers;
use crate::intake::{Host, Intakes};
use crate::jobs::Workshop;
use crate::journal::{Blobs, JournalError};
use crate::node::Traffic;
use crate::protocol::message::{Body, Envelope, Hello, Leading, VERSION};
use crate::protocol::{Config, Done, Topic, Topics};
use crate::transfer::{Codecs, Keep, Manifest, Pulls, Route, Serve, Wanted};
use crate::transport::mqtt::MqttTransport;
use crate::transport::{Class, Outgoing, Transport, TransportEvent};
use crate::types::{Digest, Incarnation, PeerId, Round, Term};
use crate::weights::Weights;

/// How often a leader's heartbeat is sent: more often than a peer does it, to have many in a short time.
const HEARTBEAT: Duration = Duration::from_millis(10);

/// What a party is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PartyConfig {
    /// Where it meets the others.
    pub site: Site,
    /// Its name.
    pub peer: PeerId,
    /// How many values the weights have.
    pub values: usize,
    /// Which weights it holds, if it holds any; another number stands for other weights.
    pub holds: Option<u64>,
    /// Whether several pull what it holds.
    pub several: bool,
}

/// Hears what became of chunks; `None` of a thread that panicked.
#[derive(Clone)]
struct Ear(UnboundedSender<Option<Done>>);

impl Host for Ear {
    fn done(&self, done: Done) {
        // Nobody listens when the measurement is over.
        let _ = self.0.send(Some(done));
    }

    fn full(&mut self, _: JournalError) -> ControlFlow<()> {
        ControlFlow::Break(())
    }

    fn lost(&self) {
        let _ = self.0.send(None);
    }
}

struct Party<'a> {
    config: PartyConfig,
    topics: Topics,
    transport: MqttTransport,
    workshop: Arc<Workshop>,
    held: Option<Manifest>,
    serve: Option<Serve>,
    buffers: Buffers,
    /// The number of the measurement.
    round: Round,
    started: Instant,
    /// What is not held yet, and of whom it is to be had.
    needed: Vec<(Manifest, PeerId)>,
    pulls: Pulls,
    intakes: Intakes,
    ear: Ear,
    tasks: JoinSet<()>,
    /// Seconds until the last chunk.
    pulled: f64,
    traffic: Traffic,
    heartbeats: Vec<f64>,
    beats: bool,
    tell: &'a (dyn Fn(Report) + Sync),
}

/// Takes part until `orders` end.
pub(super) async fn run(
    config: PartyConfig,
    mut orders: UnboundedReceiver<Order>,
    tell: &(dyn Fn(Report) + Sync),
) -> Result<(), Failure> {
    let chunk_bytes = config.site.chunk_bytes;
    let blobs = Blobs::memory();
    let (layout, peer, codecs) = (layout(config.values), config.peer.clone(), Codecs::default());
    let (strategy, leftovers) = (Strategy::default(), Arc::default());
    let workshop = Workshop { blobs, layout, peer, codecs, strategy, chunk_bytes, leftovers };
    // Before it connects, and on another thread: the connection must not wait for it.
    let (values, holds, holder) = (config.values, config.holds, workshop.clone());
    let held = tokio::task::spawn_blocking(move || {
        holds.map(|number| hold(&holder, initial_weights(values, number))).transpose()
    });
    let held = held.await.map_err(Failure::of)??;
    let topics = config.site.topics();
    let transport = config.site.connect(&config.peer, &topics).await?;
    let (ear, mut heard) = unbounded_channel();
    let mut party = Party {
        topics,
        transport,
        workshop: Arc::new(workshop),
        held,
        serve: None,
        buffers: Buffers::default(),
        round: Round::GENESIS,
        started: Instant::now(),
        needed: Vec::new(),
        pulls: Pulls::default(),
        intakes: Intakes::default(),
        ear: Ear(ear),
        tasks: JoinSet::new(),
        pulled: 0.0,
        traffic: Traffic::default(),
        heartbeats: Vec::new(),
        beats: false,
        tell,
        config,
    };
    party.enter().await?;
    let mut beat = interval(HEARTBEAT);
    beat.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        let deadline = party.pulls.deadline();
        tokio::select! {
            order = orders.recv() => match order {
                Some(order) => party.obey(order),
                None => break,
            },
            event = party.transport.next() => party.received(event)?,
            Some(done) = heard.recv() => party.done(done)?,
            _ = beat.tick(), if party.beats => party.beat(),
            () = sleep_until(deadline) => party.pull(),
        }
    }
    party.transport.stop().await;
    Ok(())
}

/// Encodes and names the weights, as a job of a peer does.
fn hold(workshop: &Workshop, weights: Weights) -> Result<Manifest, Failure> {
    let (codec, tuning) = (workshop.codecs.model, workshop.codecs.for_model(Round::GENESIS));
    let blob = codec.encode(&weights, &tuning).map_err(Failure::of)?;
    drop(weights);
    let manifest = Manifest::of(&blob, workshop.chunk_bytes, codec).map_err(Failure::of)?;
    workshop.blobs.put(manifest.digest, &blob).map_err(Failure::of)?;
    Ok(manifest)
}

impl Party<'_> {
    /// Says hello and waits until it has come back: then everything is subscribed to.
    async fn enter(&mut self) -> Result<(), Failure> {
        let hello = Hello {
            incarnation: Incarnation::default(),
            entries: BTreeMap::new(),
            layout: Some(self.workshop.layout.digest()),
            num_examples: 1,
            head: None,
            genesis: None,
            done: false,
            number: 0,
            lag_ms: 0,
            broker: None,
        };
        let own = Topic::Init(self.config.peer.clone());
        loop {
            match self.transport.next().await {
                TransportEvent::Connected { found, .. } => {
                    self.config.site.accept(found.as_ref())?;
                    self.publish(&own, Body::Hello(hello.clone()));
                }
                TransportEvent::Message { topic, .. } if topic == self.topics.name(&own) => break,
                TransportEvent::Message { .. } => {}
                other => return Err(lost(&other)),
            }
        }
        (self.tell)(Report::Ready(self.held));
        Ok(())
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Go { round, pulls } => {
                (self.round, self.started, self.pulled) = (round, Instant::now(), 0.0);
                self.needed = pulls.into_iter().map(|(holder, manifest)| (manifest, holder)).collect();
                self.pull();
            }
            Order::Beat(beats) => self.beats = beats,
            Order::Tally => (self.tell)(Report::Tally(Tally {
                usage: Usage::now(),
                sent: self.traffic.sent,
                received: self.traffic.received,
                heartbeats: std::mem::take(&mut self.heartbeats),
            })),
        }
    }

    /// Begins what may be begun, has chunks put away, and asks for more.
    fn pull(&mut self) {
        let now = Instant::now();
        let wanted = |(manifest, holder)| Wanted { manifest, holders: vec![holder], keep: Keep::Unflushed };
        let chosen = self.pulls.fitting(self.needed.clone()).map(wanted).collect();
        self.pulls.want(chosen, Config::default().heartbeat(), now);
        while self.tasks.try_join_next().is_some() {}
        for intake in self.pulls.intakes() {
            self.intakes.take(intake, &self.workshop, &self.ear, &mut self.tasks);
        }
        for (holder, blob, chunks) in self.pulls.grants(now) {
            self.publish(&Topic::Grant(self.round, holder), Body::Grant { blob, chunks });
        }
    }

    fn received(&mut self, event: TransportEvent) -> Result<(), Failure> {
        let TransportEvent::Message { topic, payload } = event else { return Err(lost(&event)) };
        self.traffic.received += payload.len() as u64;
        if topic == self.topics.name(&Topic::Leader(Round::GENESIS)) {
            // One's own comes back, too.
            if !self.beats {
                self.heartbeats.extend(seconds_since(&payload));
            }
            return Ok(());
        }
        let Ok((envelope, chunk)) = Envelope::decode(&payload) else { return Ok(()) };
        match envelope.body {
            Body::Chunk { blob, index } if envelope.round == self.round => self.take(blob, index, chunk),
            Body::Grant { blob, chunks } => {
                let Some(manifest) = self.held.filter(|held| held.digest == blob) else { return Ok(()) };
                if envelope.round != self.round || self.serve.is_none() {
                    self.round = envelope.round;
                    self.serve = Some(Serve::of(&manifest, Config::default().heartbeat()));
                }
                let Some(serve) = &mut self.serve else { return Ok(()) };
                let sends = serve.granted(&envelope.sender, &chunks, Instant::now(), self.config.several);
                for (index, route) in sends {
                    self.serve_chunk(&manifest, index, route)?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn serve_chunk(&mut self, manifest: &Manifest, index: u32, route: Route) -> Result<(), Failure> {
        let Some(blob) = self.workshop.blobs.open(manifest.digest).map_err(Failure::of)? else { return Ok(()) };
        let topic = match route {
            Route::All => Topic::WeightsAll(self.round),
            Route::One(receiver) => Topic::Weights(self.round, receiver),
        };
        let header = self.envelope(Body::Chunk { blob: manifest.digest, index });
        let message = blob.behind(header, manifest.chunk_range(index), &mut self.buffers).map_err(Failure::of)?;
        self.send(&topic, Class::Bulk, message);
        Ok(())
    }

    fn take(&mut self, blob: Digest, index: u32, chunk: Bytes) -> Result<(), Failure> {
        // What was verified already may come once more.
        if !self.pulls.contains(&blob) || self.pulls.is_complete() {
            return Ok(());
        }
        self.pulls.arrived(blob, index, chunk, Instant::now()).map_err(Failure::of)?;
        if self.pulls.is_complete() {
            self.pulled = self.started.elapsed().as_secs_f64();
        }
        self.pull();
        Ok(())
    }

    fn done(&mut self, done: Option<Done>) -> Result<(), Failure> {
        match done {
            Some(Done::Kept { blob }) => self.pulls.kept(&blob),
            Some(Done::Verified { manifest, result, .. }) => {
                result.map_err(Failure::of)?;
                self.intakes.ended(&manifest.digest);
                self.pulls.ended(&manifest.digest);
                self.needed.retain(|(needed, _)| *needed != manifest);
            }
            Some(_) => {}
            None => return Err(Failure::of("a thread ended without a result")),
        }
        if !self.needed.is_empty() {
            self.pull();
        } else if self.pulls.is_empty() && self.pulled > 0.0 {
            let (pull, total) = (std::mem::take(&mut self.pulled), self.started.elapsed().as_secs_f64());
            (self.tell)(Report::Done { pull, total });
            // What is held would not be stored again.
            let held: BTreeSet<Digest> = self.held.iter().map(|held| held.digest).collect();
            self.workshop.blobs.retain(&held).map_err(Failure::of)?;
        }
        Ok(())
    }

    /// A leader's heartbeat, with the time behind it. All parties are on one machine, and so have one clock.
    fn beat(&mut self) {
        let leading = Leading { ballots: Vec::new(), has: Vec::new(), parent_metrics: None, upcoming: None };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let message = [&self.envelope(Body::Leader(leading))[..], &now.as_nanos().to_le_bytes()].concat();
        self.send(&Topic::Leader(Round::GENESIS), Class::Control, (message.into(), Bytes::new()));
    }

    fn publish(&mut self, topic: &Topic, body: Body) {
        let message = self.envelope(body);
        self.send(topic, Class::Control, (message, Bytes::new()));
    }

    fn envelope(&self, body: Body) -> Bytes {
        let (sender, round, signature) = (self.config.peer.clone(), self.round, Vec::new());
        Envelope { version: VERSION, sender, signature, round, term: Term(0), body }.encode()
    }

    fn send(&mut self, topic: &Topic, class: Class, (head, tail): (Bytes, Bytes)) {
        self.traffic.sent += (head.len() + tail.len()) as u64;
        let topic = self.topics.name(topic);
        self.transport.send(Outgoing { topic, retain: false, class, head, tail });
    }
}

/// How long a heartbeat was on its way, in seconds.
fn seconds_since(heartbeat: &[u8]) -> Option<f64> {
    let sent = u128::from_le_bytes(*heartbeat.last_chunk()?);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_nanos();
    Some(now.saturating_sub(sent) as f64 / 1e9)
}

fn lost(event: &TransportEvent) -> Failure {
    let why = match event {
        TransportEvent::Disconnected { reason } => reason.clone(),
        _ => "it left the broker".to_owned(),
    };
    Failure { why: format!("lost the broker: {why}"), is_broker: true }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
