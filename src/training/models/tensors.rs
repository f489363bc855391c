//! A model's tensors by name: declared once, then one flat row on the host, and a tensor each on a device.
//!
//! This is the one way between [`Weights`] and burn. A model holds no value: it asks a [`Pass`] for its tensors by name
//! while it computes, and the gradient comes back as a row in the layout's order.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use rand::Rng;
use rand_distr::StandardNormal;

use crate::weights::{Layout, TensorSpec, Weights};

/// A tensor that a model has.
#[derive(Clone, Debug)]
pub(in crate::training) struct Declared {
    spec: TensorSpec,
    initial: Initial,
}

/// What a tensor holds before training.
#[derive(Clone, Copy, Debug)]
pub(super) enum Initial {
    /// Drawn evenly from minus to plus this.
    Uniform(f32),
    /// Drawn from the standard normal distribution.
    Normal,
    /// This value everywhere.
    Constant(f32),
    /// This value everywhere, and no gradient: a running statistic that the forward pass itself updates.
    Buffer(f32),
}

impl Declared {
    pub(super) fn new(name: String, shape: &[usize], initial: Initial) -> Self {
        Self { spec: TensorSpec { name, shape: shape.to_vec() }, initial }
    }

    fn is_buffer(&self) -> bool {
        matches!(self.initial, Initial::Buffer(_))
    }

    fn draw(&self, rng: &mut impl Rng) -> Vec<f32> {
        let len = self.spec.len();
        match self.initial {
            Initial::Uniform(bound) => (0..len).map(|_| rng.random_range(-bound..=bound)).collect(),
            Initial::Normal => (0..len).map(|_| rng.sample(StandardNormal)).collect(),
            Initial::Constant(value) | Initial::Buffer(value) => vec![value; len],
        }
    }
}

/// The layout that the declared tensors make.
pub(super) fn layout(declared: &[Declared]) -> Layout {
    Layout { tensors: declared.iter().map(|tensor| tensor.spec.clone()).collect() }
}

/// Values to begin with, drawn tensor by tensor.
pub(super) fn initial_weights(declared: &[Declared], rng: &mut impl Rng) -> Weights {
    let values = declared.iter().flat_map(|tensor| tensor.draw(rng)).collect();
    Weights::new(Arc::new(layout(declared)), values).expect("each tensor draws as many values as it has")
}

/// Where the values that have a gradient stand in the flat row; buffers lie between.
pub(super) fn trainable(declared: &[Declared]) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for (range, tensor) in ranges_of(declared) {
        match ranges.last_mut() {
            _ if tensor.is_buffer() => {}
            Some(last) if last.end == range.start => last.end = range.end,
            _ => ranges.push(range),
        }
    }
    ranges
}

fn ranges_of(declared: &[Declared]) -> impl Iterator<Item = (Range<usize>, &Declared)> {
    let mut end = 0;
    declared.iter().map(move |tensor| {
        let start = end;
        end += tensor.spec.len();
        (start..end, tensor)
    })
}

/// One forward pass, and the backward pass that follows it: a model's tensors on a device.
pub(in crate::training) struct Pass<'a> {
    declared: &'a [Declared],
    tensors: BTreeMap<&'a str, Tensor<1>>,
    device: Device,
    /// New values of buffers; one forward pass updates each once.
    updates: RefCell<BTreeMap<String, Tensor<1>>>,
    is_training: bool,
}

impl<'a> Pass<'a> {
    /// Puts `values`, a row of these tensors, on `device`. On a device with autodiff this pass is one of training.
    pub(super) fn new(declared: &'a [Declared], values: &[f32], device: &Device) -> Self {
        let is_training = device.is_autodiff();
        let put = |(range, tensor): (Range<usize>, &'a Declared)| {
            let data = TensorData::new(values[range.clone()].to_vec(), [range.len()]);
            let on_device = Tensor::from_data(data, device);
            let with_gradient = is_training && !tensor.is_buffer();
            (tensor.spec.name.as_str(), if with_gradient { on_device.require_grad() } else { on_device })
        };
        let tensors = ranges_of(declared).map(put).collect();
        Self { declared, tensors, device: device.clone(), updates: RefCell::default(), is_training }
    }

    /// Where the tensors are.
    pub(super) fn device(&self) -> Device {
        self.device.clone()
    }

    /// Whether this pass is one of training: normalisation takes the batch's own statistics, and updates its buffers.
    pub(super) fn is_training(&self) -> bool {
        self.is_training
    }

    /// The tensor called `name`, which has this shape.
    pub(super) fn get<const D: usize>(&self, name: &str, shape: [usize; D]) -> Tensor<D> {
        self.tensors.get(name).expect("a layer asks for what it declared").clone().reshape(shape)
    }

    /// Replaces a buffer's values once this pass is over.
    pub(super) fn update(&self, name: &str, values: Tensor<1>) {
        self.updates.borrow_mut().insert(name.to_owned(), values);
    }

    /// Goes back from `outputs` (of this pass), whose gradient is `slope`: the gradient of every value, in the layout's
    /// order, 0 for buffers.
    pub(in crate::training) fn gradient(&self, outputs: Tensor<2>, slope: Vec<f32>) -> Vec<f32> {
        let slope = Tensor::from_data(TensorData::new(slope, outputs.dims()), &outputs.device());
        let mut gradients = (outputs * slope).sum().backward();
        let mut row = Vec::with_capacity(self.declared.iter().map(|tensor| tensor.spec.len()).sum());
        for (range, tensor) in ranges_of(self.declared) {
            let on_device = &self.tensors[tensor.spec.name.as_str()];
            let gradient = if tensor.is_buffer() { None } else { on_device.grad_remove(&mut gradients) };
            match gradient {
                Some(gradient) => row.extend_from_slice(&floats(gradient)),
                None => row.resize(range.end, 0.0),
            }
        }
        row
    }

    /// Writes what the forward pass has made of the buffers into `values`, a row of these tensors.
    pub(in crate::training) fn write_buffers(self, values: &mut [f32]) {
        let mut updates = self.updates.into_inner();
        for (range, tensor) in ranges_of(self.declared).filter(|(_, tensor)| tensor.is_buffer()) {
            if let Some(update) = updates.remove(&tensor.spec.name) {
                values[range].copy_from_slice(&floats(update));
            }
        }
    }
}

/// A tensor's values, row-major. Where nobody else holds the tensor they are not copied.
pub(in crate::training) fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().expect("what is made of f32 stays f32")
}
