//! A peer of which only the transfers are left: it holds a blob, or pulls some, with what peers use for it.
//!
//! Inside a peer the protocol decides what is pulled when; here it is an order. The rest is the peer's: its transport and
//! its two connections, its messages, its windows and how many pulls it begins at once, and its job of verifying a
//! blob. A leader's heartbeats pass meanwhile, which is how it shows whether weights hold up control.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{MissedTickBehavior, interval};

use super::role::{Order, Report, Tally};
use super::trainer::{ConstantTrainer, initial_weights, layout};
use super::usage::Usage;
use super::{Failure, Site};
use crate::aggregation::Strategy;
use crate::jobs::Workshop;
use crate::journal::Blobs;
use crate::node::Traffic;
use crate::protocol::message::{Body, Envelope, Hello, Leading, VERSION};
use crate::protocol::{Config, Done, GATHER_BYTES, Job, Topic, Topics, WINDOW_BYTES};
use crate::training::Trainer;
use crate::transfer::{Assembly, Codecs, Grants, Manifest, Route, Serve};
use crate::transport::mqtt::MqttTransport;
use crate::transport::{Class, Outgoing, Transport, TransportEvent};
use crate::types::{Digest, PeerId, Round, Term};
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

/// A pull that was begun.
struct Pull {
    holder: PeerId,
    assembly: Assembly,
    grants: Grants,
}

struct Party<'a> {
    config: PartyConfig,
    topics: Topics,
    transport: MqttTransport,
    workshop: Arc<Workshop>,
    trainer: Arc<Mutex<Box<dyn Trainer>>>,
    held: Option<Manifest>,
    serve: Option<Serve>,
    /// The number of the measurement.
    round: Round,
    started: Instant,
    waiting: VecDeque<(PeerId, Manifest)>,
    pulls: BTreeMap<Digest, Pull>,
    verifying: usize,
    /// Seconds until the last chunk.
    pulled: f64,
    jobs: UnboundedSender<Done>,
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
    let workshop = Workshop { blobs, layout, peer, codecs, strategy: Strategy::default(), chunk_bytes };
    // Before it connects, and on another thread: the connection must not wait for it.
    let (values, holds, holder) = (config.values, config.holds, workshop.clone());
    let held = tokio::task::spawn_blocking(move || {
        holds.map(|number| hold(&holder, initial_weights(values, number))).transpose()
    });
    let held = held.await.map_err(Failure::of)??;
    let topics = config.site.topics();
    let transport = config.site.connect(&config.peer, &topics).await?;
    let (jobs, mut ended) = unbounded_channel();
    let mut party = Party {
        topics,
        transport,
        workshop: Arc::new(workshop),
        // Nothing is trained here: its weights would only fill memory.
        trainer: Arc::new(Mutex::new(Box::new(ConstantTrainer::new(0, 0)))),
        held,
        serve: None,
        round: Round::GENESIS,
        started: Instant::now(),
        waiting: VecDeque::new(),
        pulls: BTreeMap::new(),
        verifying: 0,
        pulled: 0.0,
        jobs,
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
        let deadline = party.pulls.values().filter_map(|pull| pull.grants.deadline()).min();
        tokio::select! {
            order = orders.recv() => match order {
                Some(order) => party.obey(order),
                None => break,
            },
            event = party.transport.next() => party.received(event)?,
            Some(done) = ended.recv() => party.verified(done)?,
            _ = beat.tick(), if party.beats => party.beat(),
            () = sleep_until(deadline) => party.grant(),
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
            entries: BTreeMap::new(),
            layout: self.workshop.layout.digest(),
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
                    self.publish(&own, Body::Hello(hello.clone()), Bytes::new());
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
                self.waiting = pulls.into();
                self.begin();
                self.grant();
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

    /// Begins as many pulls as a leader does at once; one that is being verified still counts.
    fn begin(&mut self) {
        while let Some((_, next)) = self.waiting.front() {
            let of_one = next.bytes.min(u64::from(WINDOW_BYTES)).max(1);
            if (self.pulls.len() + self.verifying) as u64 * of_one >= GATHER_BYTES {
                break;
            }
            let Some((holder, manifest)) = self.waiting.pop_front() else { break };
            let window = (WINDOW_BYTES / manifest.chunk_bytes.max(1)).max(2);
            let grants = Grants::new(window, Config::default().heartbeat());
            self.pulls.insert(manifest.digest, Pull { holder, assembly: Assembly::new(manifest), grants });
        }
    }

    fn grant(&mut self) {
        let now = Instant::now();
        let mut granted = Vec::new();
        for (blob, pull) in &mut self.pulls {
            if let Some(chunks) = pull.grants.next(&pull.assembly, now) {
                granted.push((pull.holder.clone(), *blob, chunks));
            }
        }
        for (holder, blob, chunks) in granted {
            self.publish(&Topic::Grant(self.round, holder), Body::Grant { blob, chunks }, Bytes::new());
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
                    self.serve = Some(Serve::new(manifest.chunks(), Config::default().heartbeat()));
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
        let blob = self.workshop.blobs.get(manifest.digest).map_err(Failure::of)?;
        let Some(chunk) = blob.and_then(|blob| manifest.chunk(&blob, index)) else { return Ok(()) };
        let topic = match route {
            Route::All => Topic::WeightsAll(self.round),
            Route::One(receiver) => Topic::Weights(self.round, receiver),
        };
        self.publish(&topic, Body::Chunk { blob: manifest.digest, index }, chunk);
        Ok(())
    }

    fn take(&mut self, blob: Digest, index: u32, chunk: Bytes) -> Result<(), Failure> {
        // What was verified already may come once more.
        let Some(pull) = self.pulls.get_mut(&blob) else { return Ok(()) };
        pull.assembly.insert(index, chunk).map_err(Failure::of)?;
        pull.grants.received(index, Instant::now());
        if pull.assembly.is_complete()
            && let Some(pull) = self.pulls.remove(&blob)
        {
            self.pulled = self.started.elapsed().as_secs_f64();
            self.verify(pull.assembly);
        }
        self.grant();
        Ok(())
    }

    fn verify(&mut self, assembly: Assembly) {
        self.verifying += 1;
        let (workshop, trainer, jobs) = (self.workshop.clone(), self.trainer.clone(), self.jobs.clone());
        tokio::task::spawn_blocking(move || {
            let manifest = *assembly.manifest();
            let job = Job::Verify { manifest, chunks: assembly.into_chunks() };
            let mut on_progress = |_, _| ControlFlow::Continue(());
            let mut on_full = |_| ControlFlow::Break(());
            let done = workshop.perform(job, &trainer, &mut on_progress, &mut on_full);
            // Nobody listens when the measurement is over.
            let _ = jobs.send(done);
        });
    }

    fn verified(&mut self, done: Done) -> Result<(), Failure> {
        self.verifying -= 1;
        if let Done::Verified { result, .. } = done {
            result.map_err(Failure::of)?;
        }
        self.begin();
        self.grant();
        if self.pulls.is_empty() && self.verifying == 0 {
            let total = self.started.elapsed().as_secs_f64();
            (self.tell)(Report::Done { pull: self.pulled, total });
            // What is held would not be stored again.
            let held: BTreeSet<Digest> = self.held.iter().map(|held| held.digest).collect();
            self.workshop.blobs.retain(&held).map_err(Failure::of)?;
        }
        Ok(())
    }

    /// A leader's heartbeat, with the time behind it. All parties are on one machine, and so have one clock.
    fn beat(&mut self) {
        let leading = Leading { ballots: Vec::new(), has: Vec::new(), parent_metrics: None };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let stamp = Bytes::copy_from_slice(&now.as_nanos().to_le_bytes());
        self.publish(&Topic::Leader(Round::GENESIS), Body::Leader(leading), stamp);
    }

    fn publish(&mut self, topic: &Topic, body: Body, tail: Bytes) {
        let class = if matches!(body, Body::Chunk { .. }) { Class::Bulk } else { Class::Control };
        let (sender, round, signature) = (self.config.peer.clone(), self.round, Vec::new());
        let head = Envelope { version: VERSION, sender, signature, round, term: Term(0), body }.encode();
        self.traffic.sent += (head.len() + tail.len()) as u64;
        self.transport.send(Outgoing { topic: self.topics.name(topic), retain: false, class, head, tail });
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
