//! The leader's job: updates become the blob of the next model, without any of them in memory as a whole.

use std::ops::Range;

use super::{OnFull, Workshop, sentence};
use crate::aggregation::{AggregateError, Inspection, Parent, Part, Section, Share};
use crate::transfer::{Manifest, Reader, ranges};
use crate::types::Round;
use crate::weights::first_non_finite;

impl Workshop {
    /// Goes through all updates at once, range by range, so that neither they nor the model are in memory as a whole: once
    /// for each section of the new blob, in its order.
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
        let mut writer = self.writer(layout.clone(), self.codecs.model, self.codecs.for_model(round), on_full)?;
        let mut out = Vec::new();
        for (index, section) in self.strategy.sections().enumerate() {
            for range in ranges(self.layout.len()) {
                inputs.read(section, &range)?;
                out.resize(range.len(), 0.0);
                aggregation.fill(section, range.start, &inputs.parts(), &inputs.parent(), &mut out);
                if let Some(place) = first_non_finite(&out) {
                    let tensor = layout.tensor_of(index * self.layout.len() + range.start + place).unwrap_or_default();
                    return Err(sentence(AggregateError::NotFinite(tensor.to_owned())));
                }
                writer.write(&out, on_full)?;
            }
        }
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
