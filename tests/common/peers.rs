//! Peers in tasks of a test, and what all of them tell.

use std::collections::BTreeMap;
use std::time::Duration;

use rodizio::cluster::Stop;
use rodizio::events::{Entry, Event, RoundCommitted};
use rodizio::node::Outcome;
use rodizio::peer::PeerError;
use rodizio::types::{PeerId, Round};
use tempfile::TempDir;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

pub(crate) type Running = JoinHandle<Result<Outcome, PeerError>>;

/// A directory, and what all peers tell.
pub(crate) struct Peers {
    pub(crate) dir: TempDir,
    pub(crate) sender: UnboundedSender<Entry>,
    receiver: UnboundedReceiver<Entry>,
    pub(crate) heard: Vec<Entry>,
    pub(crate) request: watch::Sender<bool>,
    pub(crate) stop: Stop,
    /// What is waited for comes within this, or never.
    limit: Duration,
}

impl Peers {
    pub(crate) fn new(limit: Duration) -> Self {
        let (sender, receiver) = unbounded_channel();
        let (request, stop) = Stop::new();
        Self { dir: tempfile::tempdir().unwrap(), sender, receiver, heard: Vec::new(), request, stop, limit }
    }

    /// Waits until something is told.
    pub(crate) async fn until<T>(&mut self, what: &str, mut wanted: impl FnMut(&Entry) -> Option<T>) -> T {
        let waiting = async {
            loop {
                let entry = self.receiver.recv().await.expect("the sender is here");
                let found = wanted(&entry);
                self.heard.push(entry);
                if let Some(found) = found {
                    return found;
                }
            }
        };
        match timeout(self.limit, waiting).await {
            Ok(found) => found,
            Err(_) => panic!("{what} did not come; what was told:\n{}", self.told()),
        }
    }

    /// Waits for the ends of peers.
    pub(crate) async fn ends(&mut self, running: Vec<Running>) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        for task in running {
            match timeout(self.limit, task).await {
                Ok(ended) => outcomes.push(ended.unwrap().unwrap()),
                Err(_) => {
                    self.drain();
                    panic!("a peer does not end; what was told:\n{}", self.told());
                }
            }
        }
        self.drain();
        outcomes
    }

    fn drain(&mut self) {
        while let Ok(entry) = self.receiver.try_recv() {
            self.heard.push(entry);
        }
    }

    pub(crate) fn told(&self) -> String {
        let lines = self.heard.iter().filter(|entry| !entry.event.is_passing()).map(|entry| entry.to_line() + "\n");
        lines.collect()
    }

    /// Every round's commit; the peers that told of it agree on it.
    pub(crate) fn rounds(&self) -> BTreeMap<Round, RoundCommitted> {
        let mut rounds: BTreeMap<Round, RoundCommitted> = BTreeMap::new();
        for commit in self.heard.iter().filter_map(commit) {
            let first = rounds.entry(commit.round).or_insert_with(|| commit.clone());
            assert_eq!(first.decree, commit.decree, "two decrees for round {}:\n{}", commit.round, self.told());
            assert_eq!(first.digest, commit.digest);
        }
        rounds
    }
}

pub(crate) fn commit(entry: &Entry) -> Option<&RoundCommitted> {
    if let Event::RoundCommitted(commit) = &entry.event { Some(commit) } else { None }
}

pub(crate) fn peer(name: &str) -> PeerId {
    PeerId::new(name).unwrap()
}
