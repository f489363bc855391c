//! The leader's job: updates become the blob of the next model, without any of them in memory as a whole.

use std::ops::Range;
use std::sync::mpsc::sync_channel;
use std::thread;

use super::{OnFull, Workshop, sentence, with_room};
use crate::aggregation::{AggregateError, Aggregation, Inspection, Parent, Part, Section, Share};
use crate::transfer::{Manifest, Reader, ranges};
use crate::types::Round;
use crate::weights::first_non_finite;

/// How many ranges are computed ahead of the one that is written.
const AHEAD: usize = 4;

impl Workshop {
    /// Goes through all updates at once, range by range, so that neither they nor the model are in memory as a whole: once
    /// for each section of the new blob, in its order. A range is read and computed while the one before is encoded, hashed
    /// and written.
    pub(super) fn aggregate(
        &self,
        round: Round,
        parent: &Manifest,
        parts: &[(Manifest, Share)],
        on_full: OnFull<'_>,
    ) -> Result<Manifest, String> {
        let shares = parts.iter().map(|(_, share)| *share).collect();
        let inspection = Inspection::new(self.strategy, &self.layout, shares).map_err(sentence)?;
        let mut inputs = Inputs {
            values: self.layout.len(),
            updates: parts.iter().map(|part| self.update(part)).collect::<Result<_, String>>()?,
            parent: if self.strategy.reads_parent() { self.sections(parent)? } else { Vec::new() },
        };
        let aggregation = inputs.inspect(inspection)?.decide();
        let layout = self.strategy.model_layout(&self.layout);
        let draft = with_room(on_full, || self.blobs.draft_to_flush())?;
        let mut writer = self.writer(layout.clone(), (self.codecs.model, self.codecs.for_model(round)), draft);
        let (sender, computed) = sync_channel(AHEAD);
        let compute = move || {
            let sections = self.strategy.sections().enumerate();
            let all = sections.flat_map(|section| ranges(self.layout.len()).map(move |range| (section, range)));
            for ((index, section), range) in all {
                let values = inputs.compute(&aggregation, section, &range).and_then(|values| {
                    let Some(place) = first_non_finite(values.iter().copied()) else { return Ok(values) };
                    let tensor = layout.tensor_of(index * self.layout.len() + range.start + place).unwrap_or_default();
                    Err(sentence(AggregateError::NotFinite(tensor.to_owned())))
                });
                // Nobody takes it after an error.
                if sender.send(values).is_err() {
                    return;
                }
            }
        };
        thread::scope(|scope| {
            thread::Builder::new().name("aggregate".into()).spawn_scoped(scope, compute).map_err(sentence)?;
            computed.into_iter().try_for_each(|values| writer.write(&values?, on_full))
        })?;
        writer.finish(on_full)
    }

    fn update(&self, (update, share): &(Manifest, Share)) -> Result<(Reader, Share, Vec<f32>), String> {
        Ok((self.read_as(&self.strategy.update_layout(&self.layout), update)?, *share, Vec::new()))
    }

    fn sections(&self, model: &Manifest) -> Result<Vec<(Section, Reader, Vec<f32>)>, String> {
        let layout = self.strategy.model_layout(&self.layout);
        let reader = |section| Ok((section, self.read_as(&layout, model)?, Vec::new()));
        self.strategy.sections().map(reader).collect()
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
                self.read(Section::Model, &range)?;
                inspection.look(&self.parts(), self.parent().model);
            }
        }
        Ok(inspection)
    }

    /// A range of one section of the new blob.
    fn compute(
        &mut self,
        aggregation: &Aggregation,
        section: Section,
        range: &Range<usize>,
    ) -> Result<Vec<f32>, String> {
        self.read(section, range)?;
        let mut values = vec![0.0; range.len()];
        aggregation.fill(section, range.start, &self.parts(), &self.parent(), &mut values);
        Ok(values)
    }

    /// Reads a range of every update's model, or of what stands behind it, and of every section of the parent.
    fn read(&mut self, section: Section, range: &Range<usize>) -> Result<(), String> {
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
