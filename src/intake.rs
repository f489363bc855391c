//! What becomes of chunks as they come: written, verified and kept on blocking threads, those of one blob in their order.
//!
//! No thread waits for chunks. Each works off what there is of one blob, so that a hundred peers of one process need no
//! more threads than have something to do.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::{JoinError, JoinSet, spawn_blocking};

use crate::jobs::{Receiving, Workshop};
use crate::journal::JournalError;
use crate::protocol::Done;
use crate::transfer::{Intake, Keep, Manifest};
use crate::types::Digest;

/// The most chunks that a thread takes at a time.
const BATCH: usize = 16;

/// Who hears of what became of chunks, from any thread.
pub trait Host: Clone + Send + 'static {
    /// A chunk was put away, or a blob is complete or no good.
    fn done(&self, done: Done);

    /// The disk has no room: returns when it is time to try again, or to give up.
    fn full(&mut self, error: JournalError) -> ControlFlow<()>;

    /// A thread panicked: a bug.
    fn lost(&self);
}

/// The blobs that are coming in.
#[derive(Debug, Default)]
pub struct Intakes(BTreeMap<Digest, UnboundedSender<(u32, Bytes)>>);

impl Intakes {
    /// Does what is to be done with a chunk, and returns at once. Each blob has a task of its own in `tasks`, which ends
    /// when the blob does, when it is abandoned, or when `self` is dropped.
    pub fn take(&mut self, intake: Intake, workshop: &Arc<Workshop>, host: &impl Host, tasks: &mut JoinSet<()>) {
        match intake {
            Intake::Begin(manifest, keep) => {
                let (sender, chunks) = unbounded_channel();
                self.0.insert(manifest.digest, sender);
                tasks.spawn(receive(workshop.clone(), (manifest, keep), chunks, host.clone()));
            }
            Intake::Chunk { blob, index, chunk } => {
                // One that is found to be no good while chunks are still coming takes no more.
                let _ = self.0.get(&blob).map(|chunks| chunks.send((index, chunk)));
            }
            Intake::Abandon(blob) => _ = self.0.remove(&blob),
        }
    }

    /// A blob is complete, or no good.
    pub fn ended(&mut self, blob: &Digest) {
        // One that was begun anew meanwhile goes on.
        if self.0.get(blob).is_some_and(UnboundedSender::is_closed) {
            self.0.remove(blob);
        }
    }

    /// Abandons all.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

async fn receive(
    workshop: Arc<Workshop>,
    (manifest, keep): (Manifest, Keep),
    mut chunks: UnboundedReceiver<(u32, Bytes)>,
    host: impl Host,
) {
    let mut receiving = None;
    loop {
        let mut batch = Vec::new();
        if chunks.recv_many(&mut batch, BATCH).await == 0 {
            return;
        }
        let (workshop, mut own) = (workshop.clone(), host.clone());
        let work = move || {
            let result = put_away(&mut receiving, &workshop, (manifest, keep), batch, &mut own);
            (receiving, result)
        };
        let result: Result<(Option<Receiving>, Result<bool, String>), JoinError> = spawn_blocking(work).await;
        let result = match result {
            Ok((more, Ok(false))) => {
                receiving = more;
                continue;
            }
            Ok((_, Ok(true))) => Ok(()),
            Ok((_, Err(why))) => Err(why),
            Err(_) => return host.lost(),
        };
        // Before the word of it: what comes now is of another attempt.
        drop(chunks);
        return host.done(Done::Verified { manifest, keep, result });
    }
}

/// Whether the blob is complete.
fn put_away(
    receiving: &mut Option<Receiving>,
    workshop: &Workshop,
    (manifest, keep): (Manifest, Keep),
    batch: Vec<(u32, Bytes)>,
    host: &mut impl Host,
) -> Result<bool, String> {
    let blob = manifest.digest;
    for (index, chunk) in batch {
        let told = host.clone();
        let mut on_full = |error| host.full(error);
        if receiving.is_none() {
            *receiving = Some(workshop.receive(manifest, keep, &mut on_full)?);
        }
        let complete = receiving.as_mut().map(|receiving| receiving.take(index, &chunk, &mut on_full));
        if complete.transpose()? == Some(true) {
            return Ok(true);
        }
        drop(chunk);
        told.done(Done::Kept { blob });
    }
    Ok(false)
}
