//! A model as the protocol sees it: a [`Layout`] (names and shapes) and one flat row of `f32`.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::types::Digest;

/// One tensor of a layout: its name and shape. A scalar has the shape `[]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSpec {
    /// The name a PyTorch user would expect in a state dict, such as `fc1.weight`.
    pub name: String,
    /// The size of each dimension, outermost first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// How many values the tensor has.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the tensor has no value at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it is a statistic and no parameter, by the names that PyTorch gives: what is not learned by gradients must not
    /// be moved along them, since a variance below 0 is none.
    pub fn is_buffer(&self) -> bool {
        let name = self.name.rsplit('.').next().unwrap_or_default();
        matches!(name, "running_mean" | "running_var" | "num_batches_tracked")
    }
}

/// Names and shapes of every tensor of a model, in the order in which their values stand in [`Weights`].
///
/// Every parameter and every persistent buffer is part of it. Two peers can train together only
/// if their layouts have one digest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// The tensors, in order.
    pub tensors: Vec<TensorSpec>,
}

impl Layout {
    /// How many values all tensors have together.
    pub fn len(&self) -> usize {
        self.tensors.iter().map(TensorSpec::len).sum()
    }

    /// Whether there is no value at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The name of the tensor that value `index` of the flat row belongs to.
    pub fn tensor_of(&self, index: usize) -> Option<&str> {
        let mut end = 0;
        let holds = |spec: &&TensorSpec| {
            end += spec.len();
            index < end
        };
        self.tensors.iter().find(holds).map(|spec| spec.name.as_str())
    }

    /// Where the values of [buffers](TensorSpec::is_buffer) stand in the flat row.
    pub fn buffers(&self) -> Vec<Range<usize>> {
        let mut end = 0;
        let place = |spec: &TensorSpec| {
            let start = end;
            end += spec.len();
            (spec.is_buffer(), start..end)
        };
        self.tensors.iter().map(place).filter(|(is_buffer, _)| *is_buffer).map(|(_, range)| range).collect()
    }

    /// What names this layout among peers.
    pub fn digest(&self) -> Digest {
        let mut text = String::new();
        for tensor in &self.tensors {
            text.push_str(&format!("{}{:?}\n", tensor.name, tensor.shape));
        }
        Digest::of(text.as_bytes())
    }
}

/// All values of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct Weights {
    layout: Arc<Layout>,
    values: Vec<f32>,
}

/// Values that do not fit their layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the layout has {expected} values, {found} were given")]
pub struct LayoutMismatch {
    /// How many the layout has.
    pub expected: usize,
    /// How many there were.
    pub found: usize,
}

impl Weights {
    /// Takes `values`, which stand in the layout's order.
    pub fn new(layout: Arc<Layout>, values: Vec<f32>) -> Result<Self, LayoutMismatch> {
        let (expected, found) = (layout.len(), values.len());
        if expected == found { Ok(Self { layout, values }) } else { Err(LayoutMismatch { expected, found }) }
    }

    /// All zeros.
    pub fn zeros(layout: Arc<Layout>) -> Self {
        let values = vec![0.0; layout.len()];
        Self { layout, values }
    }

    /// Names and shapes.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Every value, in the layout's order.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Every value, to be changed.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// Adds the values of `other`, which must be of the same layout, each to its own.
    pub fn add(&mut self, other: &Weights) {
        self.values.iter_mut().zip(&other.values).for_each(|(value, other)| *value += other);
    }

    /// Takes away the values of `other`, which must be of the same layout, each from its own.
    pub fn subtract(&mut self, other: &Weights) {
        self.values.iter_mut().zip(&other.values).for_each(|(value, other)| *value -= other);
    }

    /// The values alone.
    pub fn into_values(self) -> Vec<f32> {
        self.values
    }

    /// Each tensor with its own values.
    pub fn tensors(&self) -> impl Iterator<Item = (&TensorSpec, &[f32])> {
        let mut rest = self.values.as_slice();
        self.layout.tensors.iter().map(move |spec| {
            let (values, tail) = rest.split_at(spec.len());
            rest = tail;
            (spec, values)
        })
    }

    /// The first tensor that holds a NaN or an infinity, if any does.
    pub fn first_non_finite(&self) -> Option<&str> {
        first_non_finite(self.values.iter().copied()).and_then(|place| self.layout.tensor_of(place))
    }
}

/// The place of the first NaN or infinity, if there is any.
pub fn first_non_finite(mut values: impl Iterator<Item = f32> + Clone) -> Option<usize> {
    // No early exit, so that many are looked at at a time.
    let finite = values.clone().fold(true, |finite, value| finite & value.is_finite());
    if finite { None } else { values.position(|value| !value.is_finite()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Arc<Layout> {
        let tensor = |name: &str, shape: &[usize]| TensorSpec { name: name.into(), shape: shape.into() };
        Arc::new(Layout { tensors: vec![tensor("a", &[2, 2]), tensor("b", &[]), tensor("c", &[3])] })
    }

    #[test]
    fn tensors_share_out_the_flat_row() {
        let weights = Weights::new(layout(), (0..8u8).map(f32::from).collect()).unwrap();
        let parts: Vec<_> = weights.tensors().map(|(spec, values)| (spec.name.as_str(), values)).collect();
        assert_eq!(parts, [("a", &[0., 1., 2., 3.][..]), ("b", &[4.]), ("c", &[5., 6., 7.])]);
    }

    #[test]
    fn a_wrong_number_of_values_is_refused() {
        assert_eq!(Weights::new(layout(), vec![0.0; 7]), Err(LayoutMismatch { expected: 8, found: 7 }));
    }

    #[test]
    fn a_value_that_is_not_finite_is_named() {
        let mut values = vec![0.0; 8];
        values[4] = f32::NAN;
        assert_eq!(Weights::new(layout(), values).unwrap().first_non_finite(), Some("b"));
    }

    #[test]
    fn every_value_belongs_to_a_tensor() {
        let weights = Weights::zeros(layout());
        let names: Vec<_> = (0..9).map(|index| weights.layout().tensor_of(index).unwrap_or("-")).collect();
        assert_eq!(names, ["a", "a", "a", "a", "b", "c", "c", "c", "-"]);
    }

    #[test]
    fn buffers_are_known_by_their_names() {
        let tensor = |name: &str| TensorSpec { name: name.into(), shape: vec![2, 2] };
        let layout = Layout { tensors: ["conv.weight", "bn1.running_mean", "running_var.weight"].map(tensor).to_vec() };
        assert_eq!((layout.buffers().len(), layout.buffers().first()), (1, Some(&(4..8))));
    }

    #[test]
    fn what_is_taken_away_can_be_added_again() {
        let weights = Weights::new(layout(), (0..8u8).map(f32::from).collect()).unwrap();
        let mut difference = weights.clone();
        difference.subtract(&Weights::new(layout(), vec![0.5; 8]).unwrap());
        assert_eq!(difference.values()[..3], [-0.5, 0.5, 1.5]);
        difference.add(&Weights::new(layout(), vec![0.5; 8]).unwrap());
        assert_eq!(difference, weights);
    }

    #[test]
    fn the_layout_digest_covers_names_and_shapes() {
        let digest = layout().digest();
        let mut other = (*layout()).clone();
        other.tensors[0].shape = vec![4];
        assert_ne!(other.digest(), digest);
        other = (*layout()).clone();
        other.tensors[0].name = "z".into();
        assert_ne!(other.digest(), digest);
    }
}
