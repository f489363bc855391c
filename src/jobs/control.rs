//! A trainer's part in SCAFFOLD: its own control variate, which corrects its gradients, and what its update brings of it.

use super::{Workshop, load};
use crate::aggregation::{Section, advance_control, common_control};
use crate::transfer::{Codec, Manifest};
use crate::types::Digest;
use crate::weights::Weights;

/// Where a training begins, and the control variates then.
pub(super) struct Drift {
    start: Weights,
    common: Weights,
    own: Weights,
}

impl Drift {
    /// What is added to every gradient.
    pub(super) fn correction(&self) -> Vec<f32> {
        self.common.values().iter().zip(self.own.values()).map(|(common, own)| common - own).collect()
    }
}

impl Workshop {
    /// Reads the common control variate of so many members, whose sum stands in the model's blob, and the peer's own. One whose
    /// damaged file somebody has removed is gone: it begins anew.
    pub(super) fn drift(
        &self,
        model: &Manifest,
        own: Option<Digest>,
        members: usize,
        start: Weights,
    ) -> Result<Drift, String> {
        let index = self.strategy.sections().position(|section| section == Section::Control).unwrap_or_default();
        let blob = self.read_as(&self.strategy.model_layout(&self.layout), model)?;
        let mut common = load(blob, index * self.layout.len(), self.layout.clone())?;
        common_control(common.values_mut(), members);
        let own = match self.read_own(own, Codec::F32)? {
            Some(reader) => load(reader, 0, self.layout.clone())?,
            None => Weights::zeros(self.layout.clone()),
        };
        Ok(Drift { start, common, own })
    }

    /// What the update brings: the weights, and behind them by how much the peer's control variate changes; and the new control
    /// variate. Buffers have no gradient to be controlled.
    pub(super) fn with_control(&self, drift: Drift, end: Weights, step_sum: f64) -> (Weights, Option<Weights>) {
        let Drift { start, common, own } = drift;
        let mut advanced = own.clone();
        advance_control(advanced.values_mut(), common.values(), start.values(), end.values(), step_sum);
        for buffer in self.layout.buffers() {
            advanced.values_mut()[buffer].fill(0.0);
        }
        let mut values = end.into_values();
        values.extend(advanced.values().iter().zip(own.values()).map(|(new, old)| new - old));
        let update = Weights::new(self.strategy.update_layout(&self.layout), values);
        (update.expect("the control variate is as long as the model"), Some(advanced))
    }
}
