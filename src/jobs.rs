//! Slow work: what a [`Job`] does, with a trainer and a store of blobs. The node and the simulator run the same.

use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::aggregation::{
    AggregateError, Inspection, Parent, Part, STEP_SUMS, Section, Share, Strategy, advance_control,
};
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
    pub strategy: Strategy,
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
            Job::Initial => {
                let initial = self.strategy.initial(own().weights());
                Done::Initial(self.keep_model(Round::GENESIS, &initial, on_full))
            }
            Job::Evaluate { model } => {
                Done::Evaluated { model: model.digest, result: self.evaluate(&model, own().as_mut()) }
            }
            Job::Train { round, model, residual, control } => {
                let mut on_batch = |progress| on_progress(round, progress);
                let trained = self.train(round, &model, control, own().as_mut(), &mut on_batch);
                let result = trained.and_then(|Training { weights, control, step_sum, metrics }| {
                    let (update, unsent) = self.keep_update(round, weights, &model, &residual, on_full)?;
                    let control = control.map(|control| self.keep_own(&control, on_full)).transpose()?;
                    Ok(Trained { update, unsent, control, step_sum, metrics })
                });
                Done::Trained { round, result }
            }
            Job::Verify { manifest, chunks } => {
                let result = self.verify(&manifest, chunks, on_full);
                Done::Verified { manifest, result }
            }
            Job::Aggregate { round, term, parent, members, parts } => {
                let result = self.aggregate(&parent, members, &parts);
                let result = result.and_then(|model| self.keep_model(round, &model, on_full));
                Done::Aggregated { round, term, result }
            }
        }
    }

    fn evaluate(&self, model: &Manifest, trainer: &mut dyn Trainer) -> Result<Metrics, String> {
        trainer.set_weights(&self.load_model(model)?).map_err(sentence)?;
        let metrics = trainer.evaluate().map_err(sentence)?;
        if metrics.is_finite() { Ok(metrics) } else { Err("the validation loss is not finite".into()) }
    }

    fn train(
        &self,
        round: Round,
        model: &Manifest,
        control: Option<Digest>,
        trainer: &mut dyn Trainer,
        on_batch: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Training, String> {
        let start = self.load_model(model)?;
        trainer.set_weights(&start).map_err(sentence)?;
        let controls = self.strategy.has_control().then(|| self.controls(model, control)).transpose()?;
        let correction = controls.as_ref().map(|controls| controls.correction());
        trainer.set_correction(correction).map_err(sentence)?;
        let metrics = trainer.train(round, on_batch).map_err(sentence)?;
        let weights = trainer.weights();
        let step_sum = trainer.step_sum().clamp(*STEP_SUMS.start(), *STEP_SUMS.end());
        let (weights, control) = match controls {
            Some(controls) => {
                let (weights, control) = self.with_control(controls, &start, weights, step_sum);
                (weights, Some(control))
            }
            None => (weights, None),
        };
        if let Some(tensor) = weights.first_non_finite() {
            return Err(format!("after training {tensor} holds values that are not finite; lower the learning rate"));
        }
        Ok(Training { weights, control, step_sum, metrics })
    }

    /// The common control variate, which stands in the model's blob, and the peer's own. One whose damaged file somebody has
    /// removed is gone: it begins anew.
    fn controls(&self, model: &Manifest, own: Option<Digest>) -> Result<Controls, String> {
        let common = self.section(model, Section::Control)?;
        let blob = own.map(|own| self.blobs.get(own)).transpose().map_err(sentence)?.flatten();
        let own = match blob {
            Some(blob) => Codec::F32.decode(&blob, &self.layout).map_err(sentence)?,
            None => Weights::zeros(self.layout.clone()),
        };
        Ok(Controls { common, own })
    }

    /// What an update brings where the strategy has control variates: the weights, and behind them by how much the peer's
    /// control variate changes; and that control variate. Buffers have no gradient to be controlled.
    fn with_control(&self, controls: Controls, start: &Weights, end: Weights, step_sum: f64) -> (Weights, Weights) {
        let Controls { common, own } = controls;
        let mut advanced = own.clone();
        advance_control(advanced.values_mut(), common.values(), start.values(), end.values(), step_sum);
        for buffer in self.layout.buffers() {
            advanced.values_mut()[buffer].fill(0.0);
        }
        let mut values = end.into_values();
        values.extend(advanced.values().iter().zip(own.values()).map(|(new, old)| new - old));
        let update = Weights::new(self.strategy.update_layout(&self.layout), values);
        (update.expect("the control variate is as long as the model"), advanced)
    }

    /// Every value is looked at before a blob counts as held: a NaN would spread to every peer.
    fn verify(&self, manifest: &Manifest, chunks: Vec<Bytes>, on_full: OnFull<'_>) -> Result<(), String> {
        let blob = join_verified(manifest, chunks).map_err(sentence)?;
        let layout = self.layout_of(manifest);
        let mut reader = self.reader(manifest, blob.clone())?;
        let mut values = Vec::new();
        for range in ranges(layout.len()) {
            let start = range.start;
            values.resize(range.len(), 0.0);
            reader.read(range, &mut values).map_err(sentence)?;
            if let Some(place) = values.iter().position(|value| !value.is_finite()) {
                let tensor = layout.tensor_of(start + place).unwrap_or_default();
                return Err(format!("{tensor} holds values that are not finite"));
            }
        }
        self.store(manifest.digest, &blob, on_full)
    }

    /// The blob of the next model: goes through all updates at once, range by range, so that none of them is decoded as a
    /// whole. Where something is remembered behind the model, once for each section, in the blob's order.
    fn aggregate(&self, parent: &Manifest, members: usize, parts: &[(Manifest, Share)]) -> Result<Weights, String> {
        let shares = parts.iter().map(|(_, share)| *share).collect();
        let inspection = Inspection::new(self.strategy, &self.layout, shares, members).map_err(sentence)?;
        let mut inputs = Inputs {
            values: self.layout.len(),
            updates: parts.iter().map(|part| self.update(part)).collect::<Result<_, String>>()?,
            parent: if self.strategy.reads_parent() { self.sections(parent)? } else { Vec::new() },
        };
        let aggregation = inputs.inspect(inspection)?.decide();
        let mut model = Weights::zeros(self.strategy.model_layout(&self.layout));
        for (index, section) in self.strategy.sections().enumerate() {
            let first = index * self.layout.len();
            for range in ranges(self.layout.len()) {
                inputs.read(section, range.clone())?;
                let out = &mut model.values_mut()[first + range.start..first + range.end];
                aggregation.fill(section, range.start, &inputs.parts(), &inputs.parent(), out);
            }
        }
        match model.first_non_finite() {
            Some(tensor) => Err(sentence(AggregateError::NotFinite(tensor.to_owned()))),
            None => Ok(model),
        }
    }

    fn update(&self, (update, share): &(Manifest, Share)) -> Result<(Reader, Share, Vec<f32>), String> {
        Ok((self.reader(update, self.blob(update.digest)?)?, *share, Vec::new()))
    }

    fn sections(&self, model: &Manifest) -> Result<Vec<(Section, Reader, Vec<f32>)>, String> {
        let blob = self.blob(model.digest)?;
        let reader = |section| Ok((section, self.reader(model, blob.clone())?, Vec::new()));
        self.strategy.sections().map(reader).collect()
    }

    /// An update that is held, with all that it brings.
    pub fn load_update(&self, update: &Manifest) -> Result<Weights, String> {
        self.load_values(update, 0, self.strategy.update_layout(&self.layout))
    }

    /// A model that is held, without what the strategy remembers beside it.
    pub fn load_model(&self, model: &Manifest) -> Result<Weights, String> {
        self.load_values(model, 0, self.layout.clone())
    }

    fn section(&self, model: &Manifest, section: Section) -> Result<Weights, String> {
        let index = self.strategy.sections().position(|other| other == section).unwrap_or_default();
        self.load_values(model, index * self.layout.len(), self.layout.clone())
    }

    /// As many values as `layout` has, from value `first` of a blob on.
    fn load_values(&self, manifest: &Manifest, first: usize, layout: Arc<Layout>) -> Result<Weights, String> {
        let mut reader = self.reader(manifest, self.blob(manifest.digest)?)?;
        let mut weights = Weights::zeros(layout);
        for range in ranges(weights.values().len()) {
            let (from, to) = (first + range.start, first + range.end);
            reader.read(from..to, &mut weights.values_mut()[range]).map_err(sentence)?;
        }
        Ok(weights)
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

    /// Reads a blob, and adds the model that it is a difference from, if it is one.
    fn reader(&self, manifest: &Manifest, blob: Bytes) -> Result<Reader, String> {
        let base = manifest.base.map(|base| self.base(base)).transpose()?;
        Reader::new(manifest.codec, &self.layout_of(manifest), blob, base).map_err(sentence)
    }

    fn base(&self, model: Digest) -> Result<Reader, String> {
        let blob = self.blob(model).map_err(|why| format!("the update is a difference from a model, and {why}"))?;
        let layout = self.strategy.model_layout(&self.layout);
        let base = Reader::new(self.codecs.model, &layout, blob, None).map_err(sentence)?;
        Ok(base.first(self.layout.len()))
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
        weights.subtract(&self.load_model(model)?);
        if codec == Codec::TopK {
            self.add_residual(&mut weights, residual)?;
        }
        let update = self.keep(&weights, codec, &tuning, on_full)?;
        let update = Manifest { base: Some(model.digest), ..update };
        if codec != Codec::TopK {
            return Ok((update, None));
        }
        let sent = codec.decode(&self.blob(update.digest)?, weights.layout()).map_err(sentence)?;
        weights.subtract(&sent);
        Ok((update, Some(self.keep_own(&weights, on_full)?)))
    }

    /// Keeps what the peer alone needs, as it is.
    fn keep_own(&self, weights: &Weights, on_full: OnFull<'_>) -> Result<Digest, String> {
        let tuning = self.codecs.for_update(Round::GENESIS, &self.peer);
        self.keep(weights, Codec::F32, &tuning, on_full).map(|manifest| manifest.digest)
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

/// What local training made.
struct Training {
    /// The update: the weights, and what travels with them.
    weights: Weights,
    control: Option<Weights>,
    step_sum: f64,
    metrics: Metrics,
}

/// The control variates that a training begins with.
struct Controls {
    common: Weights,
    own: Weights,
}

impl Controls {
    /// What is added to every gradient.
    fn correction(&self) -> Vec<f32> {
        self.common.values().iter().zip(self.own.values()).map(|(common, own)| common - own).collect()
    }
}

/// What an aggregation reads, and room for one range of each.
struct Inputs {
    /// How many values the model has.
    values: usize,
    updates: Vec<(Reader, Share, Vec<f32>)>,
    /// The sections of the parent's blob, each read at its own place.
    parent: Vec<(Section, Reader, Vec<f32>)>,
}

impl Inputs {
    /// The look at whole updates, if the rule needs one.
    fn inspect(&mut self, mut inspection: Inspection) -> Result<Inspection, String> {
        if inspection.is_needed() {
            for range in ranges(self.values) {
                self.read(Section::Model, range)?;
                inspection.look(&self.parts(), self.parent().model);
            }
        }
        Ok(inspection)
    }

    /// Reads a range of every update's model, or of what stands behind it, and of every section of the parent.
    fn read(&mut self, section: Section, range: Range<usize>) -> Result<(), String> {
        let place = |first: usize| first + range.start..first + range.end;
        let behind = if section == Section::Control { self.values } else { 0 };
        for (reader, _, values) in &mut self.updates {
            values.resize(range.len(), 0.0);
            reader.read(place(behind), values).map_err(sentence)?;
        }
        for (index, (_, reader, values)) in self.parent.iter_mut().enumerate() {
            values.resize(range.len(), 0.0);
            reader.read(place(index * self.values), values).map_err(sentence)?;
        }
        Ok(())
    }

    /// The range of the updates that was read last.
    fn parts(&self) -> Vec<Part<'_>> {
        self.updates.iter().map(|(_, share, values)| Part { share: *share, values }).collect()
    }

    /// The range of the parent that was read last.
    fn parent(&self) -> Parent<'_> {
        let mut parent = Parent::default();
        for (section, _, values) in &self.parent {
            parent.set(*section, values);
        }
        parent
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
            let (peer, strategy, chunk_bytes) = (PeerId::new("a").unwrap(), Strategy::default(), 1024);
            let workshop = Workshop { blobs, layout: layout(), peer, codecs, strategy, chunk_bytes };
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
            let done = self.perform(Job::Train { round: Round(round), model, residual, control: None });
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
        let (round, term, parts) = (Round(1), crate::types::Term(0), vec![(update, Share::of(1))]);
        let job = Job::Aggregate { round, term, parent: model, members: 2, parts };
        let Done::Aggregated { result: Ok(made), .. } = bench.perform(job) else { panic!("no aggregate") };
        assert_eq!(made.codec, Codec::Int8);
        let loaded = bench.workshop.load_model(&made).unwrap();
        assert_ne!(loaded, bench.workshop.load_update(&update).unwrap());
        bench.perform(Job::Evaluate { model: made });
        assert_eq!(bench.trainer.lock().unwrap().weights(), loaded);
    }
}
