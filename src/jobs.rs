//! Slow work: what a [`Job`] does, with a trainer and a store of blobs. The node and the simulator run the same.

mod aggregate;
mod control;

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::aggregation::{STEP_SUMS, Strategy};
use crate::journal::{Blob, Blobs, Draft, JournalError};
use crate::protocol::{Done, Job, Residual, Trained};
use crate::training::{Progress, Trainer};
use crate::transfer::{Assembly, Codec, Codecs, Inserted, Keep, Manifest, Reader, Tuning, Verifier, ranges};
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
    pub strategy: Strategy,
    /// The length of a chunk, in bytes.
    pub chunk_bytes: u32,
    /// What one job leaves for the next.
    pub leftovers: Arc<Mutex<Leftovers>>,
}

/// What need not be done again in every job.
#[derive(Debug, Default)]
pub struct Leftovers {
    /// The model that the trainer has, as long as nothing has changed it: it need not be read again.
    loaded: Option<Manifest>,
    /// Room for a model: new memory would have to be given by the system and filled with zeros.
    room: Option<Weights>,
}

/// A blob that is being received: its chunks are written at their places as they come, and verified from the first one
/// on, so that little is left to do after the last.
///
/// Dropped before it is complete, it leaves nothing behind.
#[derive(Debug)]
pub struct Receiving {
    manifest: Manifest,
    /// Which chunks are written.
    written: Assembly,
    /// How many chunks from the first on were verified.
    verified: u32,
    verifier: Verifier,
    draft: Draft,
}

/// A blob that is being made: weights are written range by range, and named when the last one is.
#[derive(Debug)]
pub struct Writer {
    layout: Arc<Layout>,
    codec: Codec,
    tuning: Tuning,
    chunk_bytes: u32,
    draft: Draft,
    hasher: blake3::Hasher,
    values: usize,
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
            Job::Initial => {
                let initial = self.strategy.initial(own().weights());
                Done::Initial(self.keep_model(Round::GENESIS, &initial, on_full))
            }
            Job::Evaluate { model } => {
                Done::Evaluated { model: model.digest, result: self.evaluate(&model, own().as_mut()) }
            }
            Job::Train { round, model, residual, control, members } => {
                let mut on_batch = |progress| on_progress(round, progress);
                let trained = self.train(round, &model, (control, members), own().as_mut(), &mut on_batch);
                let result = trained.and_then(|Training { mut weights, control, step_sum, metrics }| {
                    let keep = self.keep_of_update();
                    let (update, unsent) = self.keep_update(round, &mut weights, &model, &residual, on_full)?;
                    self.leave_room(weights);
                    let control = control.map(|control| self.keep_own(&control, on_full)).transpose()?;
                    Ok(Trained { update, keep, unsent, control, step_sum, metrics })
                });
                Done::Trained { round, result }
            }
            Job::Flush { blob } => Done::Flushed { blob, result: with_room(on_full, || self.blobs.flush(blob)) },
            Job::Aggregate { round, term, parent, parts } => {
                let result = self.aggregate(round, &parent, &parts, on_full);
                Done::Aggregated { round, term, result }
            }
        }
    }

    fn evaluate(&self, model: &Manifest, trainer: &mut dyn Trainer) -> Result<Metrics, String> {
        self.load_into(trainer, model)?;
        let metrics = trainer.evaluate().map_err(sentence)?;
        if metrics.is_finite() { Ok(metrics) } else { Err("the validation loss is not finite".into()) }
    }

    fn train(
        &self,
        round: Round,
        model: &Manifest,
        (control, members): (Option<Digest>, usize),
        trainer: &mut dyn Trainer,
        on_batch: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Training, String> {
        self.load_into(trainer, model)?;
        self.leftovers().loaded = None;
        let drift =
            self.strategy.has_control().then(|| self.drift(model, control, members, trainer.weights())).transpose()?;
        trainer.set_correction(drift.as_ref().map(control::Drift::correction)).map_err(sentence)?;
        let metrics = trainer.train(round, on_batch).map_err(sentence)?;
        let step_sum = trainer.step_sum().clamp(*STEP_SUMS.start(), *STEP_SUMS.end());
        let mut weights = self.room();
        trainer.take_weights(&mut weights);
        let (weights, control) = match drift {
            Some(drift) => self.with_control(drift, weights, step_sum),
            None => (weights, None),
        };
        if let Some(tensor) = weights.first_non_finite() {
            return Err(format!("after training {tensor} holds values that are not finite; lower the learning rate"));
        }
        Ok(Training { weights, control, step_sum, metrics })
    }

    /// Gives the trainer a model, unless it is the one that it has: a model is evaluated, and then trained on.
    fn load_into(&self, trainer: &mut dyn Trainer, model: &Manifest) -> Result<(), String> {
        // Whoever has the trainer to himself has this, too.
        if self.leftovers().loaded == Some(*model) {
            return Ok(());
        }
        self.leftovers().loaded = None;
        let mut weights = self.room();
        let reader = self.read_as(&self.strategy.model_layout(&self.layout), model)?;
        fill(&mut weights, reader, 0)?;
        trainer.swap_weights(&mut weights).map_err(sentence)?;
        self.leave_room(weights);
        self.leftovers().loaded = Some(*model);
        Ok(())
    }

    fn leftovers(&self) -> MutexGuard<'_, Leftovers> {
        self.leftovers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Weights of the model's layout, whatever their values.
    fn room(&self) -> Weights {
        let room = self.leftovers().room.take().filter(|room| *room.layout() == self.layout);
        room.unwrap_or_else(|| Weights::zeros(self.layout.clone()))
    }

    fn leave_room(&self, weights: Weights) {
        self.leftovers().room = Some(weights);
    }

    /// An update that is held, with all that it brings.
    pub fn load_update(&self, update: &Manifest) -> Result<Weights, String> {
        let layout = self.strategy.update_layout(&self.layout);
        load(self.read_as(&layout, update)?, 0, layout)
    }

    /// A model that is held, without what the strategy remembers beside it.
    pub fn load_model(&self, model: &Manifest) -> Result<Weights, String> {
        load(self.read_as(&self.strategy.model_layout(&self.layout), model)?, 0, self.layout.clone())
    }

    /// What a blob holds. Only updates are differences; and of updates and models that are none, each has its own length, or
    /// they differ in names alone.
    fn layout_of(&self, manifest: &Manifest) -> Arc<Layout> {
        let of_models = self.strategy.model_layout(&self.layout);
        if manifest.base.is_none() && manifest.codec.may_have(of_models.len(), manifest.bytes) {
            of_models
        } else {
            self.strategy.update_layout(&self.layout)
        }
    }

    /// Reads a blob of `layout` that is held by ranges, and adds the model that it is a difference from, if it is one.
    fn read_as(&self, layout: &Arc<Layout>, manifest: &Manifest) -> Result<Reader, String> {
        let base = self.base(manifest)?;
        Reader::new(manifest.codec, layout, self.open(manifest.digest)?, base).map_err(sentence)
    }

    /// How the own update is kept at first. Where something is kept that fits no other update, all of it must be durable
    /// before anybody hears of the update; else whoever loses the update makes it again.
    fn keep_of_update(&self) -> Keep {
        let goes_alone = self.codecs.updates != Codec::TopK && !self.strategy.has_control();
        if goes_alone { Keep::Unflushed } else { Keep::Durable }
    }

    /// Writes weights of `layout` by ranges, which become a blob. While the disk has no room, `on_full` is called.
    fn writer(&self, layout: Arc<Layout>, (codec, tuning): (Codec, Tuning), draft: Draft) -> Writer {
        Writer { layout, codec, tuning, chunk_bytes: self.chunk_bytes, draft, hasher: blake3::Hasher::new(), values: 0 }
    }

    /// Begins to receive a blob.
    pub fn receive(&self, manifest: Manifest, keep: Keep, on_full: OnFull<'_>) -> Result<Receiving, String> {
        let base = self.base(&manifest)?;
        let verifier = Verifier::new(manifest, self.layout_of(&manifest), base).map_err(sentence)?;
        let draft = with_room(on_full, || self.blobs.draft(keep))?;
        Ok(Receiving { manifest, written: Assembly::new(manifest), verified: 0, verifier, draft })
    }

    fn base(&self, manifest: &Manifest) -> Result<Option<Reader>, String> {
        let Some(model) = manifest.base else { return Ok(None) };
        let blob = self.open(model).map_err(|why| format!("the update is a difference from a model, and {why}"))?;
        let layout = self.strategy.model_layout(&self.layout);
        let base = Reader::new(self.codecs.model, &layout, blob, None).map_err(sentence)?;
        Ok(Some(base.first(self.layout.len())))
    }

    fn open(&self, blob: Digest) -> Result<Blob, String> {
        self.blobs.open(blob).map_err(sentence)?.ok_or_else(|| format!("blob {} is not here", blob.short()))
    }

    /// Whatever the codec loses is lost to all alike: also the peer that made the model goes on from its blob.
    fn keep_model(&self, round: Round, model: &Weights, on_full: OnFull<'_>) -> Result<Manifest, String> {
        self.keep(model, (self.codecs.model, self.codecs.for_model(round)), Keep::Durable, on_full)
    }

    /// Keeps an update, and with a codec that sends only a part of it, what it does not send.
    fn keep_update(
        &self,
        round: Round,
        weights: &mut Weights,
        model: &Manifest,
        residual: &Residual,
        on_full: OnFull<'_>,
    ) -> Result<(Manifest, Option<Digest>), String> {
        let codec = self.codecs.updates;
        let (how, keep) = ((codec, self.codecs.for_update(round, &self.peer)), self.keep_of_update());
        if !codec.writes_difference() {
            return Ok((self.keep(weights, how, keep, on_full)?, None));
        }
        let parent = self.read_as(&self.strategy.model_layout(&self.layout), model)?;
        self.combine(weights, parent, |value, parent| *value -= parent)?;
        if codec == Codec::TopK {
            self.add_residual(weights, residual)?;
        }
        let update = self.keep(weights, how, keep, on_full)?;
        if codec != Codec::TopK {
            return Ok((Manifest { base: Some(model.digest), ..update }, None));
        }
        self.combine(weights, self.read_as(&self.layout, &update)?, |value, sent| *value -= sent)?;
        let unsent = self.keep_own(weights, on_full)?;
        Ok((Manifest { base: Some(model.digest), ..update }, Some(unsent)))
    }

    /// Keeps what the peer alone needs, as it is.
    fn keep_own(&self, weights: &Weights, on_full: OnFull<'_>) -> Result<Digest, String> {
        let how = (Codec::F32, self.codecs.for_update(Round::GENESIS, &self.peer));
        self.keep(weights, how, Keep::Durable, on_full).map(|manifest| manifest.digest)
    }

    /// A blob whose damaged file somebody has removed is gone, and with it what it held: training goes on without.
    fn add_residual(&self, weights: &mut Weights, residual: &Residual) -> Result<(), String> {
        for (part, codec) in [(residual.unsent, Codec::F32), (residual.returned, Codec::TopK)] {
            if let Some(reader) = self.read_own(part, codec)? {
                self.combine(weights, reader, |value, own| *value += own)?;
            }
        }
        Ok(())
    }

    /// Reads what the peer has kept for itself, if it has, and it is still here.
    fn read_own(&self, blob: Option<Digest>, codec: Codec) -> Result<Option<Reader>, String> {
        let blob = blob.map(|blob| self.blobs.open(blob)).transpose().map_err(sentence)?.flatten();
        blob.map(|blob| Reader::new(codec, &self.layout, blob, None)).transpose().map_err(sentence)
    }

    /// Changes each of a model's weights by the value that stands in its place in a blob, range by range. What travels behind
    /// the model stays.
    fn combine(&self, weights: &mut Weights, mut reader: Reader, change: impl Fn(&mut f32, f32)) -> Result<(), String> {
        let mut room = Vec::new();
        for range in ranges(self.layout.len()) {
            reader.combine(range.clone(), &mut room, &mut weights.values_mut()[range], &change).map_err(sentence)?;
        }
        Ok(())
    }

    fn keep(
        &self,
        weights: &Weights,
        how: (Codec, Tuning),
        keep: Keep,
        on_full: OnFull<'_>,
    ) -> Result<Manifest, String> {
        let draft = with_room(on_full, || self.blobs.draft(keep))?;
        let mut writer = self.writer(weights.layout().clone(), how, draft);
        if how.0.block().is_none() {
            writer.write(weights.values(), on_full)?;
        } else {
            for range in ranges(weights.values().len()) {
                writer.write(&weights.values()[range], on_full)?;
            }
        }
        writer.finish(on_full)
    }
}

/// What local training made.
struct Training {
    /// The update: the weights, and what travels with them.
    weights: Weights,
    control: Option<Weights>,
    step_sum: f64,
    metrics: Metrics,
}

impl Receiving {
    /// Takes a chunk. `true`: it was the last one; the blob is what its manifest says, and kept.
    ///
    /// # Errors
    /// As soon as it is known that the blob is not to be used. While the disk has no room, `on_full` is called.
    pub fn take(&mut self, index: u32, chunk: &Bytes, on_full: OnFull<'_>) -> Result<bool, String> {
        if self.written.insert(index, chunk.len()).map_err(sentence)? == Inserted::Duplicate {
            return Ok(false);
        }
        let start = |index: u32| self.manifest.chunk_range(index).start as u64;
        with_room(on_full, || self.draft.write(start(index), chunk))?;
        if index == self.verified {
            self.verifier.extend(chunk).map_err(sentence)?;
            self.verified += 1;
        }
        // What came before its turn is read again when that has come.
        while self.verified < self.written.prefix() {
            let mut chunk = vec![0; self.manifest.chunk_range(self.verified).len()];
            self.draft.read(start(self.verified), &mut chunk).map_err(sentence)?;
            self.verifier.extend(&chunk).map_err(sentence)?;
            self.verified += 1;
        }
        if !self.written.is_complete() {
            return Ok(false);
        }
        self.verifier.finish().map_err(sentence)?;
        with_room(on_full, || self.draft.finish(self.manifest.digest))?;
        Ok(true)
    }
}

impl Writer {
    /// Writes the next of the [`ranges`]; with a codec without [blocks](Codec::block) all values at once.
    ///
    /// # Errors
    /// When the codec cannot write a value. While the disk has no room, `on_full` is called.
    pub fn write(&mut self, values: &[f32], on_full: OnFull<'_>) -> Result<(), String> {
        let encoded;
        let bytes = match self.codec.bytes_of(values) {
            Some(bytes) => bytes,
            None => {
                encoded = self.codec.encode_range(values, self.values, &self.layout, &self.tuning).map_err(sentence)?;
                &encoded
            }
        };
        let start = self.hasher.count();
        self.hasher.update(bytes);
        self.values += values.len();
        with_room(on_full, || self.draft.write(start, bytes))
    }

    /// Names the blob, and keeps it as it is to be kept.
    pub fn finish(mut self, on_full: OnFull<'_>) -> Result<Manifest, String> {
        let digest = Digest(*self.hasher.finalize().as_bytes());
        let manifest = Manifest::named(digest, self.hasher.count(), self.chunk_bytes, self.codec).map_err(sentence)?;
        with_room(on_full, || self.draft.finish(digest))?;
        Ok(manifest)
    }
}

/// As many values as `layout` has, from value `first` of a blob on.
fn load(reader: Reader, first: usize, layout: Arc<Layout>) -> Result<Weights, String> {
    let mut weights = Weights::zeros(layout);
    fill(&mut weights, reader, first)?;
    Ok(weights)
}

/// Replaces all values by those from value `first` of a blob on.
fn fill(weights: &mut Weights, mut reader: Reader, first: usize) -> Result<(), String> {
    for range in ranges(weights.values().len()) {
        reader.read(first + range.start..first + range.end, &mut weights.values_mut()[range]).map_err(sentence)?;
    }
    Ok(())
}

/// What was trained for minutes is not given up because the disk is full for a while.
fn with_room<T>(on_full: OnFull<'_>, mut write: impl FnMut() -> Result<T, JournalError>) -> Result<T, String> {
    loop {
        match write() {
            Err(error) if error.obstacle().is_some() => {
                let why = sentence(&error);
                if on_full(error).is_break() {
                    return Err(why);
                }
            }
            written => return written.map_err(sentence),
        }
    }
}

/// What a job does while the disk has no room: see [`Workshop::perform`].
pub type OnFull<'a> = &'a mut dyn FnMut(JournalError) -> ControlFlow<()>;

fn sentence(error: impl std::fmt::Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aggregation::Share;
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
            let (peer, strategy, chunk_bytes) = (PeerId::new("a").unwrap(), Strategy::default(), 1024);
            let leftovers = Arc::default();
            let workshop = Workshop { blobs, layout: layout(), peer, codecs, strategy, chunk_bytes, leftovers };
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
            let done = self.perform(Job::Train { round: Round(round), model, residual, control: None, members: 2 });
            let Done::Trained { result: Ok(trained), .. } = done else { panic!("{done:?}") };
            trained
        }

        fn bytes(&self, blob: Digest) -> Bytes {
            self.workshop.blobs.get(blob).unwrap().unwrap()
        }

        /// Receives the blob's bytes, which may be others than it says.
        fn receive(&self, manifest: Manifest, bytes: &Bytes) -> Result<(), String> {
            let mut give_up = |_| ControlFlow::Break(());
            let mut receiving = self.workshop.receive(manifest, Keep::Durable, &mut give_up)?;
            for index in 0..manifest.chunks() {
                let chunk = manifest.chunk(bytes, index).unwrap();
                let complete = receiving.take(index, &chunk, &mut give_up)?;
                assert_eq!(complete, index + 1 == manifest.chunks());
            }
            Ok(())
        }

        fn values(&self, blob: Digest, codec: Codec) -> Weights {
            codec.decode(&self.bytes(blob), &layout()).unwrap()
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
            let (found, expected) = (bench.workshop.load_update(&trained.update).unwrap(), learned(Round(1)));
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
        let blob = bench.bytes(update.digest);
        let verify = |manifest: Manifest| bench.receive(manifest, &blob);
        assert_eq!(verify(update), Ok(()));
        let base = Digest::of(b"another");
        let why = format!("the update is a difference from a model, and blob {} is not here", base.short());
        assert_eq!(verify(Manifest { base: Some(base), ..update }), Err(why));

        let huge = Weights::new(layout(), vec![f32::MAX; VALUES]).unwrap();
        let tuning = topk().for_model(Round(1));
        let huge =
            bench.workshop.keep(&huge, (Codec::F32, tuning), Keep::Durable, &mut |_| ControlFlow::Break(())).unwrap();
        let sum = Manifest { base: Some(huge.digest), ..huge };
        let found = bench.receive(sum, &bench.bytes(huge.digest));
        assert_eq!(found, Err("w holds values that are not finite".into()));
    }

    #[test]
    fn chunks_in_any_order_and_twice_make_a_durable_blob_and_bad_ones_leave_nothing() {
        let from = Bench::new(Blobs::memory(), Codecs::default());
        // Six chunks.
        let layout = Arc::new(Layout { tensors: vec![TensorSpec { name: "w".into(), shape: vec![1_400] }] });
        let weights = Weights::new(layout.clone(), (0..1_400u16).map(f32::from).collect()).unwrap();
        let maker = Workshop { layout, ..from.workshop };
        let model = maker.keep_model(Round(1), &weights, &mut |_| ControlFlow::Break(())).unwrap();
        let blob = maker.blobs.get(model.digest).unwrap().unwrap();

        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path(), "ward", None).unwrap();
        for blobs in [journal.blobs(), Blobs::memory()] {
            let workshop = Workshop { blobs, ..maker.clone() };
            let receive = |changed: Option<u32>| {
                let mut receiving = workshop.receive(model, Keep::Durable, &mut |_| ControlFlow::Break(()))?;
                let mut complete = Vec::new();
                for index in [3, 1, 1, 0, 5, 2, 2, 4] {
                    let mut chunk = model.chunk(&blob, index).unwrap().to_vec();
                    chunk[1] ^= u8::from(changed == Some(index));
                    complete.push(receiving.take(index, &chunk.into(), &mut |_| ControlFlow::Break(()))?);
                }
                assert_eq!(complete, [false, false, false, false, false, false, false, true]);
                Ok::<_, String>(())
            };
            let files = || std::fs::read_dir(dir.path().join("blobs")).unwrap().count();
            let before = files();
            let why = receive(Some(1)).unwrap_err();
            assert!(why.starts_with("the blob's digest is"), "{why}");
            assert!(workshop.blobs.open(model.digest).unwrap().is_none());
            assert_eq!(files(), before);
            receive(None).unwrap();
            assert_eq!(workshop.load_model(&model).unwrap(), weights);
            workshop.blobs.retain(&std::collections::BTreeSet::new()).unwrap();
        }
    }

    #[test]
    fn a_model_is_loaded_once_to_be_evaluated_and_trained_on() {
        let bench = Bench::new(Blobs::memory(), Codecs::default());
        let model = bench.initial();
        let evaluate = |model| {
            let Done::Evaluated { result, .. } = bench.perform(Job::Evaluate { model }) else { panic!() };
            result
        };
        evaluate(model).unwrap();
        // It has gone from the disk, and the trainer has it.
        bench.workshop.blobs.retain(&std::collections::BTreeSet::new()).unwrap();
        evaluate(model).unwrap();
        let update = bench.train(1, model, Residual::default()).update;
        assert_eq!(bench.values(update.digest, Codec::F32), learned(Round(1)));
        // Training has changed what the trainer has.
        assert!(evaluate(model).is_err());
        evaluate(update).unwrap();
        assert_eq!(bench.trainer.lock().unwrap().weights(), learned(Round(1)));
    }

    #[test]
    fn with_a_lossy_model_codec_its_maker_goes_on_from_the_blob_too() {
        let bench = Bench::new(Blobs::memory(), Codecs { model: Codec::Int8, updates: Codec::F32, ..topk() });
        let model = bench.initial();
        let update = bench.train(1, model, Residual::default()).update;
        let (round, term, parts) = (Round(1), crate::types::Term(0), vec![(update, Share::of(1))]);
        let job = Job::Aggregate { round, term, parent: model, parts };
        let Done::Aggregated { result: Ok(made), .. } = bench.perform(job) else { panic!("no aggregate") };
        assert_eq!(made.codec, Codec::Int8);
        let loaded = bench.workshop.load_model(&made).unwrap();
        assert_ne!(loaded, bench.workshop.load_update(&update).unwrap());
        bench.perform(Job::Evaluate { model: made });
        assert_eq!(bench.trainer.lock().unwrap().weights(), loaded);
    }
}
