//! Slow work: what a [`Job`] does, with a trainer and a store of blobs. The node and the simulator run the same.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::aggregation::{Contribution, Rule};
use crate::journal::{Blobs, JournalError};
use crate::protocol::{Done, Job};
use crate::training::{Progress, Trainer};
use crate::transfer::{Codec, Manifest, join_verified};
use crate::types::{Digest, Metrics, Round};
use crate::weights::{Layout, Weights};

/// What all jobs of one peer share.
#[derive(Clone, Debug)]
pub struct Workshop {
    /// Where blobs are kept.
    pub blobs: Blobs,
    /// The model's names and shapes.
    pub layout: Arc<Layout>,
    /// How weights are written.
    pub codec: Codec,
    /// How updates become a model.
    pub rule: Rule,
    /// The length of a chunk, in bytes.
    pub chunk_bytes: u32,
}

impl Workshop {
    /// Does a job. Those that need the trainer have it to themselves; `on_progress` hears of training, batch by batch.
    ///
    /// While the disk has no room for what the job made, `on_full` is called: it returns when it is time to try again, or
    /// to give up.
    pub fn perform(
        &self,
        job: Job,
        trainer: &Mutex<Box<dyn Trainer>>,
        on_progress: &mut dyn FnMut(Round, Progress) -> ControlFlow<()>,
        on_full: OnFull<'_>,
    ) -> Done {
        // A job that panicked is a bug and ends the node; what it left of the trainer is not used again.
        let own = || trainer.lock().unwrap_or_else(PoisonError::into_inner);
        match job {
            Job::Initial => Done::Initial(self.keep(&own().weights(), on_full)),
            Job::Evaluate { model } => Done::Evaluated { model, result: self.evaluate(model, own().as_mut()) },
            Job::Train { round, model } => {
                let mut on_batch = |progress| on_progress(round, progress);
                Done::Trained { round, result: self.train(round, model, own().as_mut(), &mut on_batch, on_full) }
            }
            Job::Verify { manifest, chunks } => {
                let result = self.verify(&manifest, chunks, on_full);
                Done::Verified { manifest, result }
            }
            Job::Aggregate { round, term, parts } => {
                Done::Aggregated { round, term, result: self.aggregate(&parts, on_full) }
            }
        }
    }

    fn evaluate(&self, model: Digest, trainer: &mut dyn Trainer) -> Result<Metrics, String> {
        trainer.set_weights(&self.load(model)?).map_err(sentence)?;
        let metrics = trainer.evaluate().map_err(sentence)?;
        if metrics.is_finite() { Ok(metrics) } else { Err("the validation loss is not finite".into()) }
    }

    fn train(
        &self,
        round: Round,
        model: Digest,
        trainer: &mut dyn Trainer,
        on_batch: &mut dyn FnMut(Progress) -> ControlFlow<()>,
        on_full: OnFull<'_>,
    ) -> Result<(Manifest, Metrics), String> {
        trainer.set_weights(&self.load(model)?).map_err(sentence)?;
        let metrics = trainer.train(round, on_batch).map_err(sentence)?;
        let weights = trainer.weights();
        if let Some(tensor) = weights.first_non_finite() {
            return Err(format!("after training {tensor} holds values that are not finite; lower the learning rate"));
        }
        Ok((self.keep(&weights, on_full)?, metrics))
    }

    /// Every value is looked at before a blob counts as held: a NaN would spread to every peer.
    fn verify(&self, manifest: &Manifest, chunks: Vec<Bytes>, on_full: OnFull<'_>) -> Result<(), String> {
        let blob = join_verified(manifest, chunks).map_err(sentence)?;
        let weights = manifest.codec.decode(&blob, &self.layout).map_err(sentence)?;
        if let Some(tensor) = weights.first_non_finite() {
            return Err(format!("{tensor} holds values that are not finite"));
        }
        self.store(manifest.digest, &blob, on_full)
    }

    fn aggregate(&self, parts: &[(Digest, u64)], on_full: OnFull<'_>) -> Result<Manifest, String> {
        let updates: Vec<(Weights, u64)> = parts
            .iter()
            .map(|(update, num_examples)| Ok((self.load(*update)?, *num_examples)))
            .collect::<Result<_, String>>()?;
        let contributions: Vec<Contribution<'_>> = updates
            .iter()
            .map(|(weights, num_examples)| Contribution { num_examples: *num_examples, weights })
            .collect();
        self.keep(&self.rule.aggregate(&contributions).map_err(sentence)?, on_full)
    }

    /// The weights of a blob that is held.
    pub fn load(&self, blob: Digest) -> Result<Weights, String> {
        let bytes =
            self.blobs.get(blob).map_err(sentence)?.ok_or_else(|| format!("blob {} is not here", blob.short()))?;
        self.codec.decode(&bytes, &self.layout).map_err(sentence)
    }

    fn keep(&self, weights: &Weights, on_full: OnFull<'_>) -> Result<Manifest, String> {
        let blob = self.codec.encode(weights);
        let manifest = Manifest::of(&blob, self.chunk_bytes, self.codec).map_err(sentence)?;
        self.store(manifest.digest, &blob, on_full)?;
        Ok(manifest)
    }

    /// What was trained for minutes is not given up because the disk is full for a while.
    fn store(&self, digest: Digest, blob: &Bytes, on_full: OnFull<'_>) -> Result<(), String> {
        loop {
            match self.blobs.put(digest, blob) {
                Err(error) if error.obstacle().is_some() => {
                    let why = sentence(&error);
                    if on_full(error).is_break() {
                        return Err(why);
                    }
                }
                put => return put.map_err(sentence),
            }
        }
    }
}

/// What a job does while the disk has no room: see [`Workshop::perform`].
type OnFull<'a> = &'a mut dyn FnMut(JournalError) -> ControlFlow<()>;

fn sentence(error: impl std::fmt::Display) -> String {
    error.to_string()
}
