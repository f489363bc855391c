//! Slow work: what a [`Job`] does, with a trainer and a store of blobs. The node and the simulator run the same.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::aggregation::{AggregateError, Part, Rule};
use crate::journal::{Blobs, JournalError};
use crate::protocol::{Done, Job, Residual, Trained};
use crate::training::{Progress, Trainer};
use crate::transfer::{Codec, Codecs, Manifest, Reader, Tuning, join_verified, ranges};
use crate::types::{Digest, Metrics, PeerId, Round};
use crate::weights::{Layout, Weights};

/// What all jobs of one peer share.
#[derive(Clone, Debug)]
pub struct Workshop {
    /// Where blobs are kept.
    pub blobs: Blobs,
    /// The model's names and shapes.
    pub layout: Arc<Layout>,
    /// Whose it is.
    pub peer: PeerId,
    /// How weights are written.
    pub codecs: Codecs,
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
            Job::Initial => Done::Initial(self.keep_model(Round::GENESIS, &own().weights(), on_full)),
            Job::Evaluate { model } => {
                Done::Evaluated { model: model.digest, result: self.evaluate(&model, own().as_mut()) }
            }
            Job::Train { round, model, residual } => {
                let mut on_batch = |progress| on_progress(round, progress);
                let trained = self.train(round, &model, own().as_mut(), &mut on_batch);
                let result = trained.and_then(|(weights, metrics)| {
                    let (update, unsent) = self.keep_update(round, weights, &model, &residual, on_full)?;
                    Ok(Trained { update, unsent, metrics })
                });
                Done::Trained { round, result }
            }
            Job::Verify { manifest, chunks } => {
                let result = self.verify(&manifest, chunks, on_full);
                Done::Verified { manifest, result }
            }
            Job::Aggregate { round, term, parts } => {
                Done::Aggregated { round, term, result: self.aggregate(round, &parts, on_full) }
            }
        }
    }

    fn evaluate(&self, model: &Manifest, trainer: &mut dyn Trainer) -> Result<Metrics, String> {
        trainer.set_weights(&self.load(model)?).map_err(sentence)?;
        let metrics = trainer.evaluate().map_err(sentence)?;
        if metrics.is_finite() { Ok(metrics) } else { Err("the validation loss is not finite".into()) }
    }

    fn train(
        &self,
        round: Round,
        model: &Manifest,
        trainer: &mut dyn Trainer,
        on_batch: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<(Weights, Metrics), String> {
        trainer.set_weights(&self.load(model)?).map_err(sentence)?;
        let metrics = trainer.train(round, on_batch).map_err(sentence)?;
        let weights = trainer.weights();
        if let Some(tensor) = weights.first_non_finite() {
            return Err(format!("after training {tensor} holds values that are not finite; lower the learning rate"));
        }
        Ok((weights, metrics))
    }

    /// Every value is looked at before a blob counts as held: a NaN would spread to every peer.
    fn verify(&self, manifest: &Manifest, chunks: Vec<Bytes>, on_full: OnFull<'_>) -> Result<(), String> {
        let blob = join_verified(manifest, chunks).map_err(sentence)?;
        let mut reader = self.reader(manifest, blob.clone())?;
        let mut values = Vec::new();
        for range in ranges(self.layout.len()) {
            let start = range.start;
            values.resize(range.len(), 0.0);
            reader.read(range, &mut values).map_err(sentence)?;
            if let Some(place) = values.iter().position(|value| !value.is_finite()) {
                let tensor = self.layout.tensor_of(start + place).unwrap_or_default();
                return Err(format!("{tensor} holds values that are not finite"));
            }
        }
        self.store(manifest.digest, &blob, on_full)
    }

    /// Goes through all updates at once, range by range, so that none of them is decoded as a whole.
    fn aggregate(&self, round: Round, parts: &[(Manifest, u64)], on_full: OnFull<'_>) -> Result<Manifest, String> {
        let reader = |(update, num_examples): &(Manifest, u64)| {
            Ok((self.reader(update, self.blob(update.digest)?)?, *num_examples, Vec::new()))
        };
        let mut updates: Vec<(Reader, u64, Vec<f32>)> = parts.iter().map(reader).collect::<Result<_, String>>()?;
        let mut model = Weights::zeros(self.layout.clone());
        for range in ranges(self.layout.len()) {
            for (reader, _, values) in &mut updates {
                values.resize(range.len(), 0.0);
                reader.read(range.clone(), values).map_err(sentence)?;
            }
            let parts: Vec<Part<'_>> =
                updates.iter().map(|(_, num_examples, values)| Part { num_examples: *num_examples, values }).collect();
            self.rule.aggregate_range(&parts, &mut model.values_mut()[range]).map_err(sentence)?;
        }
        drop(updates);
        if let Some(tensor) = model.first_non_finite() {
            return Err(sentence(AggregateError::NotFinite(tensor.to_owned())));
        }
        self.keep_model(round, &model, on_full)
    }

    /// The weights of a blob that is held.
    pub fn load(&self, manifest: &Manifest) -> Result<Weights, String> {
        let mut reader = self.reader(manifest, self.blob(manifest.digest)?)?;
        let mut weights = Weights::zeros(self.layout.clone());
        for range in ranges(self.layout.len()) {
            reader.read(range.clone(), &mut weights.values_mut()[range]).map_err(sentence)?;
        }
        Ok(weights)
    }

    /// Reads a blob, and adds the model that it is a difference from, if it is one.
    fn reader(&self, manifest: &Manifest, blob: Bytes) -> Result<Reader, String> {
        let base = manifest.base.map(|base| self.base(base)).transpose()?;
        Reader::new(manifest.codec, &self.layout, blob, base).map_err(sentence)
    }

    fn base(&self, model: Digest) -> Result<Reader, String> {
        let blob = self.blob(model).map_err(|why| format!("the update is a difference from a model, and {why}"))?;
        Reader::new(self.codecs.model, &self.layout, blob, None).map_err(sentence)
    }

    fn blob(&self, blob: Digest) -> Result<Bytes, String> {
        self.blobs.get(blob).map_err(sentence)?.ok_or_else(|| format!("blob {} is not here", blob.short()))
    }

    /// Whatever the codec loses is lost to all alike: also the peer that made the model goes on from its blob.
    fn keep_model(&self, round: Round, model: &Weights, on_full: OnFull<'_>) -> Result<Manifest, String> {
        self.keep(model, self.codecs.model, &self.codecs.for_model(round), on_full)
    }

    /// Keeps an update, and with a codec that sends only a part of it, what it does not send.
    fn keep_update(
        &self,
        round: Round,
        mut weights: Weights,
        model: &Manifest,
        residual: &Residual,
        on_full: OnFull<'_>,
    ) -> Result<(Manifest, Option<Digest>), String> {
        let codec = self.codecs.updates;
        let tuning = self.codecs.for_update(round, &self.peer);
        if !codec.writes_difference() {
            return Ok((self.keep(&weights, codec, &tuning, on_full)?, None));
        }
        weights.subtract(&self.load(model)?);
        if codec == Codec::TopK {
            self.add_residual(&mut weights, residual)?;
        }
        let update = self.keep(&weights, codec, &tuning, on_full)?;
        let update = Manifest { base: Some(model.digest), ..update };
        if codec != Codec::TopK {
            return Ok((update, None));
        }
        let sent = codec.decode(&self.blob(update.digest)?, &self.layout).map_err(sentence)?;
        weights.subtract(&sent);
        let unsent = self.keep(&weights, Codec::F32, &tuning, on_full)?;
        Ok((update, Some(unsent.digest)))
    }

    /// A blob whose damaged file somebody has removed is gone, and with it what it held: training goes on without.
    fn add_residual(&self, weights: &mut Weights, residual: &Residual) -> Result<(), String> {
        for (part, codec) in [(residual.unsent, Codec::F32), (residual.returned, Codec::TopK)] {
            let blob = part.map(|part| self.blobs.get(part)).transpose().map_err(sentence)?.flatten();
            if let Some(blob) = blob {
                weights.add(&codec.decode(&blob, &self.layout).map_err(sentence)?);
            }
        }
        Ok(())
    }

    fn keep(&self, weights: &Weights, codec: Codec, tuning: &Tuning, on_full: OnFull<'_>) -> Result<Manifest, String> {
        let blob = codec.encode(weights, tuning).map_err(sentence)?;
        let manifest = Manifest::of(&blob, self.chunk_bytes, codec).map_err(sentence)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::Journal;
    use crate::training::{OnProgress, TrainError};
    use crate::weights::TensorSpec;

    const VALUES: usize = 200;

    /// It learns [`learned`], whatever it has.
    struct Learner(Weights);

    impl Trainer for Learner {
        fn layout(&self) -> Arc<Layout> {
            self.0.layout().clone()
        }

        fn num_examples(&self) -> u64 {
            1
        }

        fn weights(&self) -> Weights {
            self.0.clone()
        }

        fn set_weights(&mut self, weights: &Weights) -> Result<(), TrainError> {
            self.0 = weights.clone();
            Ok(())
        }

        fn train(&mut self, round: Round, _: &mut OnProgress<'_>) -> Result<Metrics, TrainError> {
            self.0.add(&learned(round));
            Ok(Metrics::default())
        }

        fn evaluate(&mut self) -> Result<Metrics, TrainError> {
            Ok(Metrics::default())
        }
    }

    fn layout() -> Arc<Layout> {
        Arc::new(Layout { tensors: vec![TensorSpec { name: "w".into(), shape: vec![VALUES] }] })
    }

    fn learned(round: Round) -> Weights {
        let step = |i: usize| (round.0 as f32 * 7.0 + i as f32).sin() * 0.01;
        Weights::new(layout(), (0..VALUES).map(step).collect()).unwrap()
    }

    /// A peer with its state directory, and a trainer.
    struct Bench {
        workshop: Workshop,
        trainer: Mutex<Box<dyn Trainer>>,
    }

    impl Bench {
        fn new(blobs: Blobs, codecs: Codecs) -> Self {
            let (peer, rule, chunk_bytes) = (PeerId::new("a").unwrap(), Rule::FedAvg, 1024);
            let workshop = Workshop { blobs, layout: layout(), peer, codecs, rule, chunk_bytes };
            Self { workshop, trainer: Mutex::new(Box::new(Learner(Weights::zeros(layout())))) }
        }

        fn perform(&self, job: Job) -> Done {
            let (mut go_on, mut give_up) = (|_, _| ControlFlow::Continue(()), |_| ControlFlow::Break(()));
            self.workshop.perform(job, &self.trainer, &mut go_on, &mut give_up)
        }

        fn initial(&self) -> Manifest {
            let Done::Initial(Ok(model)) = self.perform(Job::Initial) else { panic!("no model") };
            model
        }

        fn train(&self, round: u64, model: Manifest, residual: Residual) -> Trained {
            let done = self.perform(Job::Train { round: Round(round), model, residual });
            let Done::Trained { result: Ok(trained), .. } = done else { panic!("{done:?}") };
            trained
        }

        fn values(&self, blob: Digest, codec: Codec) -> Weights {
            codec.decode(&self.workshop.blob(blob).unwrap(), &layout()).unwrap()
        }
    }

    fn topk() -> Codecs {
        Codecs { updates: Codec::TopK, topk_ratio: 0.1, ..Codecs::default() }
    }

    fn assert_close(left: &Weights, right: &Weights) {
        let far = left.values().iter().zip(right.values()).find(|(left, right)| (*left - *right).abs() > 1e-7);
        assert_eq!(far, None);
    }

    #[test]
    fn what_was_not_sent_is_sent_later_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Journal::open(dir.path(), "ward", None).unwrap().0;
        let mut journal = open();
        let bench = Bench::new(journal.blobs(), topk());
        let model = bench.initial();
        let first = bench.train(1, model, Residual::default());
        let sent = bench.values(first.update.digest, Codec::TopK);
        assert_eq!(sent.values().iter().filter(|value| **value != 0.0).count(), VALUES / 10);
        let mut due = bench.values(first.unsent.unwrap(), Codec::F32);
        due.add(&sent);
        assert_close(&due, &learned(Round(1)));

        let decided = |returned| Residual { unsent: first.unsent, returned };
        for (residual, counted) in [(decided(None), true), (decided(Some(first.update.digest)), false)] {
            let before = bench.train(2, model, residual);
            let mut due = bench.values(before.unsent.unwrap(), Codec::F32);
            due.add(&bench.values(before.update.digest, Codec::TopK));
            let mut expected = learned(Round(2));
            expected.add(&learned(Round(1)));
            if counted {
                expected.subtract(&sent);
            }
            assert_close(&due, &expected);
        }

        let again = bench.train(2, model, decided(None));
        // A directory of blobs without promises is taken for damaged.
        journal.save_state(b"promises").unwrap();
        drop((bench, journal));
        let bench = Bench::new(open().blobs(), topk());
        assert_eq!(bench.train(2, model, decided(None)), again);
    }

    #[test]
    fn every_codec_brings_an_update_close_to_what_was_trained() {
        for updates in [Codec::F32, Codec::F16, Codec::Bf16, Codec::Int8] {
            let bench = Bench::new(Blobs::memory(), Codecs { updates, ..topk() });
            let model = bench.initial();
            let trained = bench.train(1, model, Residual::default());
            assert_eq!((trained.unsent, trained.update.base.is_some()), (None, updates.writes_difference()));
            let (found, expected) = (bench.workshop.load(&trained.update).unwrap(), learned(Round(1)));
            let far = found.values().iter().zip(expected.values()).map(|(found, value)| (found - value).abs());
            let far = far.fold(0.0, f32::max);
            assert!(far < 0.01 / 126.0, "{updates}: {far}");
        }
    }

    #[test]
    fn a_difference_is_refused_where_its_model_is_not_or_where_the_sum_is_not_finite() {
        let bench = Bench::new(Blobs::memory(), topk());
        let model = bench.initial();
        let update = bench.train(1, model, Residual::default()).update;
        let blob = bench.workshop.blob(update.digest).unwrap();
        let verify = |manifest: Manifest| {
            let chunks = (0..manifest.chunks()).filter_map(|index| manifest.chunk(&blob, index)).collect();
            let Done::Verified { result, .. } = bench.perform(Job::Verify { manifest, chunks }) else { panic!() };
            result
        };
        assert_eq!(verify(update), Ok(()));
        let base = Digest::of(b"another");
        let why = format!("the update is a difference from a model, and blob {} is not here", base.short());
        assert_eq!(verify(Manifest { base: Some(base), ..update }), Err(why));

        let huge = Weights::new(layout(), vec![f32::MAX; VALUES]).unwrap();
        let tuning = topk().for_model(Round(1));
        let huge = bench.workshop.keep(&huge, Codec::F32, &tuning, &mut |_| ControlFlow::Break(())).unwrap();
        let sum = Manifest { base: Some(huge.digest), ..huge };
        let chunks = vec![bench.workshop.blob(huge.digest).unwrap()];
        let done = bench.perform(Job::Verify { manifest: sum, chunks });
        assert!(matches!(&done, Done::Verified { result: Err(why), .. } if why.contains("not finite")), "{done:?}");
    }

    #[test]
    fn with_a_lossy_model_codec_its_maker_goes_on_from_the_blob_too() {
        let bench = Bench::new(Blobs::memory(), Codecs { model: Codec::Int8, updates: Codec::F32, ..topk() });
        let model = bench.initial();
        let update = bench.train(1, model, Residual::default()).update;
        let job = Job::Aggregate { round: Round(1), term: crate::types::Term(0), parts: vec![(update, 1)] };
        let Done::Aggregated { result: Ok(made), .. } = bench.perform(job) else { panic!("no aggregate") };
        assert_eq!(made.codec, Codec::Int8);
        let loaded = bench.workshop.load(&made).unwrap();
        assert_ne!(loaded, bench.workshop.load(&update).unwrap());
        bench.perform(Job::Evaluate { model: made });
        assert_eq!(bench.trainer.lock().unwrap().weights(), loaded);
    }
}
