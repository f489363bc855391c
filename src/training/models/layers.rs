//! Layers: each declares its tensors with the names, shapes and initial values of its namesake in `torch.nn`, and
//! computes with those that a [`Pass`] holds.

use burn::tensor::activation::{sigmoid, tanh};
use burn::tensor::module::{batch_norm, batch_norm_train, conv2d};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Int, Tensor};

use super::tensors::{Declared, Initial, Pass};
use crate::training::config::Norm as NormKind;

/// What keeps a quotient finite where all values are the same: PyTorch's default.
const NORM_EPSILON: f64 = 1e-5;

/// The share of a batch's statistics in the running ones: PyTorch's default `momentum`.
const NORM_MOMENTUM: f64 = 0.1;

/// The most groups of channels that are normalised each by itself.
const GROUPS_MAX: usize = 8;

/// `torch.nn.Linear`: `NAME.weight` `[out, in]`, `NAME.bias` `[out]`.
#[derive(Clone, Debug)]
pub(super) struct Linear {
    name: String,
    inputs: usize,
    outputs: usize,
}

impl Linear {
    pub(super) fn new(name: impl Into<String>, inputs: usize, outputs: usize) -> Self {
        Self { name: name.into(), inputs, outputs }
    }

    pub(super) fn declare(&self) -> Vec<Declared> {
        let initial = of_fan_in(self.inputs);
        let tensor = |part: &str, shape: &[usize]| Declared::new(format!("{}.{part}", self.name), shape, initial);
        vec![tensor("weight", &[self.outputs, self.inputs]), tensor("bias", &[self.outputs])]
    }

    /// `[batch, in]` to `[batch, out]`.
    pub(super) fn forward(&self, pass: &Pass<'_>, x: Tensor<2>) -> Tensor<2> {
        let weight = pass.get(&format!("{}.weight", self.name), [self.outputs, self.inputs]);
        let bias = pass.get(&format!("{}.bias", self.name), [1, self.outputs]);
        // In this order the weight's gradient comes back as the weight is laid out, [out, in].
        weight.matmul(x.transpose()).transpose() + bias
    }
}

/// `torch.nn.Conv2d` with a square kernel: `NAME.weight` `[out, in, kernel, kernel]`, and `NAME.bias` `[out]` if it has
/// one. The input is padded by half the kernel: with a stride of 1 the image keeps its size.
#[derive(Clone, Debug)]
pub(super) struct Conv {
    name: String,
    inputs: usize,
    outputs: usize,
    kernel: usize,
    stride: usize,
    has_bias: bool,
}

impl Conv {
    pub(super) fn new(name: impl Into<String>, inputs: usize, outputs: usize, kernel: usize) -> Self {
        Self { name: name.into(), inputs, outputs, kernel, stride: 1, has_bias: true }
    }

    pub(super) fn stride(self, stride: usize) -> Self {
        Self { stride, ..self }
    }

    /// Without a bias, which a normalisation that follows would take away again.
    pub(super) fn unbiased(self) -> Self {
        Self { has_bias: false, ..self }
    }

    pub(super) fn declare(&self) -> Vec<Declared> {
        let initial = of_fan_in(self.inputs * self.kernel * self.kernel);
        let tensor = |part: &str, shape: &[usize]| Declared::new(format!("{}.{part}", self.name), shape, initial);
        let bias = self.has_bias.then(|| tensor("bias", &[self.outputs]));
        let weight = tensor("weight", &[self.outputs, self.inputs, self.kernel, self.kernel]);
        std::iter::once(weight).chain(bias).collect()
    }

    /// `[batch, in, height, width]` to `[batch, out, height / stride, width / stride]`, rounded up.
    pub(super) fn forward(&self, pass: &Pass<'_>, x: Tensor<4>) -> Tensor<4> {
        let bias = self.has_bias.then(|| pass.get(&format!("{}.bias", self.name), [self.outputs]));
        let options = ConvOptions::new([self.stride; 2], [self.kernel / 2; 2], [1; 2], 1);
        conv2d(x, self.weight(pass), bias, options)
    }

    /// The convolution, then `torch.nn.MaxPool2d(2)`, with the batch innermost and a stride of 1: `[in, height, width,
    /// batch]` to `[out, height / 2, width / 2, batch]`, rounded down. A `constant` needs no gradient.
    ///
    /// burn's `conv2d` and `max_pool2d` reorder what they get and go through it value by value. In this order they are one
    /// matrix product and the larger of two halves, both of long runs, and so are their gradients.
    pub(super) fn forward_and_halve(&self, pass: &Pass<'_>, x: Tensor<4>, constant: bool) -> Tensor<4> {
        let [_, height, width, batch] = x.dims();
        let rows = self.kernel * self.kernel * self.inputs;
        let weight = self.weight(pass).permute([0, 2, 3, 1]).reshape([self.outputs, rows]);
        let product = weight.matmul(surroundings(x, self.kernel, constant));
        let halved = halve(product.reshape([self.outputs, height, width, batch]));
        if !self.has_bias {
            return halved;
        }
        // The largest of some values does not become another one if the same is added to all: a quarter of the work.
        halved + pass.get(&format!("{}.bias", self.name), [self.outputs, 1, 1, 1])
    }

    fn weight(&self, pass: &Pass<'_>) -> Tensor<4> {
        pass.get(&format!("{}.weight", self.name), [self.outputs, self.inputs, self.kernel, self.kernel])
    }
}

/// Of each pixel of `[channels, height, width, batch]`, with zeros around the image: `[kernel × kernel × channels, height ×
/// width × batch]`, a row for each place in the kernel and each channel.
fn surroundings(x: Tensor<4>, kernel: usize, constant: bool) -> Tensor<2> {
    let [channels, height, width, batch] = x.dims();
    let padded = pad(x, kernel / 2);
    let shape = [kernel * kernel * channels, height * width * batch];
    if constant {
        let windows: Tensor<6> = padded.unfold::<5, _>(1, kernel, 1).unfold(2, kernel, 1);
        return windows.permute([4, 5, 0, 1, 2, 3]).reshape(shape);
    }
    // The same, but the gradient of such windows would be gathered value by value.
    let shifted = |place: usize| {
        let (row, column) = (place / kernel, place % kernel);
        padded.clone().slice([0..channels, row..row + height, column..column + width, 0..batch])
    };
    Tensor::cat((0..kernel * kernel).map(shifted).collect(), 0).reshape(shape)
}

/// `[channels, height, width, batch]` with so many zeros on all sides of the image.
fn pad(x: Tensor<4>, by: usize) -> Tensor<4> {
    let [channels, height, width, batch] = x.dims();
    let zeros = Tensor::zeros([channels, height + 2 * by, width + 2 * by, batch], &x.device());
    zeros.slice_assign([0..channels, by..by + height, by..by + width, 0..batch], x)
}

/// `[channels, height, width, batch]` to half the height and width, rounded down: the largest of each 2 × 2 values. Of equal
/// ones the first gets the gradient, as in PyTorch.
fn halve(x: Tensor<4>) -> Tensor<4> {
    let [channels, height, width, batch] = x.dims();
    let (height, width) = (height / 2, width / 2);
    let x = if x.dims() == [channels, 2 * height, 2 * width, batch] {
        x
    } else {
        x.slice([0..channels, 0..2 * height, 0..2 * width, 0..batch])
    };
    let larger = |pairs: Tensor<3>| pairs.clone().narrow(1, 0, 1).max_pair(pairs.narrow(1, 1, 1));
    let rows = larger(x.reshape([channels * height, 2, 2 * width * batch]));
    larger(rows.reshape([channels * height * width, 2, batch])).reshape([channels, height, width, batch])
}

/// `torch.nn.BatchNorm2d`: `NAME.weight`, `NAME.bias`, and the buffers `NAME.running_mean` and `NAME.running_var`; or
/// `torch.nn.GroupNorm`, which has weight and bias alone, and measures each example by itself. All are `[channels]`.
#[derive(Clone, Debug)]
pub(super) struct Norm {
    name: String,
    channels: usize,
    kind: NormKind,
}

impl Norm {
    pub(super) fn new(name: impl Into<String>, channels: usize, kind: NormKind) -> Self {
        Self { name: name.into(), channels, kind }
    }

    pub(super) fn declare(&self) -> Vec<Declared> {
        let tensor = |part: &str, initial| Declared::new(format!("{}.{part}", self.name), &[self.channels], initial);
        let mut declared = vec![tensor("weight", Initial::Constant(1.0)), tensor("bias", Initial::Constant(0.0))];
        if self.kind == NormKind::Batch {
            declared.push(tensor("running_mean", Initial::Buffer(0.0)));
            declared.push(tensor("running_var", Initial::Buffer(1.0)));
        }
        declared
    }

    /// How many groups of channels there are: at most 8, and two channels in each if there are as many.
    pub(super) fn groups(channels: usize) -> usize {
        let divides = |groups: &usize| channels.is_multiple_of(*groups);
        (1..=(channels / 2).clamp(1, GROUPS_MAX)).rev().find(divides).unwrap_or(1)
    }

    /// `[batch, channels, height, width]` to the same shape.
    pub(super) fn forward(&self, pass: &Pass<'_>, x: Tensor<4>) -> Tensor<4> {
        match self.kind {
            NormKind::Group => self.over_groups(pass, x),
            NormKind::Batch if pass.is_training() => self.over_the_batch(pass, x),
            NormKind::Batch => {
                let [weight, bias] = ["weight", "bias"].map(|part| self.tensor(pass, part));
                let [mean, variance] = ["running_mean", "running_var"].map(|part| self.tensor(pass, part));
                batch_norm(x, weight, bias, mean, variance, NORM_EPSILON)
            }
        }
    }

    fn tensor(&self, pass: &Pass<'_>, part: &str) -> Tensor<1> {
        pass.get(&format!("{}.{part}", self.name), [self.channels])
    }

    fn over_the_batch(&self, pass: &Pass<'_>, x: Tensor<4>) -> Tensor<4> {
        let [batch, _, height, width] = x.dims();
        let count = (batch * height * width) as f64;
        let normalised = batch_norm_train(x, self.tensor(pass, "weight"), self.tensor(pass, "bias"), NORM_EPSILON);
        // The running variance is the unbiased one, as in PyTorch.
        let unbiased = normalised.variance.inner() * (count / (count - 1.0).max(1.0));
        for (part, seen) in [("running_mean", normalised.mean.inner()), ("running_var", unbiased)] {
            let running = self.tensor(pass, part).inner() * (1.0 - NORM_MOMENTUM) + seen * NORM_MOMENTUM;
            pass.update(&format!("{}.{part}", self.name), running);
        }
        normalised.output
    }

    /// The same as over a batch of one whose channels are the groups of all examples.
    fn over_groups(&self, pass: &Pass<'_>, x: Tensor<4>) -> Tensor<4> {
        let [batch, channels, height, width] = x.dims();
        let groups = Self::groups(channels);
        let all = batch * groups;
        let device = x.device();
        let of_groups = x.reshape([1, all, channels / groups, height * width]);
        let (ones, zeros) = (Tensor::ones([all], &device), Tensor::zeros([all], &device));
        let normalised = batch_norm_train(of_groups, ones, zeros, NORM_EPSILON).output;
        let [weight, bias] = ["weight", "bias"].map(|part| self.tensor(pass, part).reshape([1, channels, 1, 1]));
        normalised.reshape([batch, channels, height, width]) * weight + bias
    }
}

/// `torch.nn.Embedding`: `NAME.weight` `[vocabulary, dim]`.
#[derive(Clone, Debug)]
pub(super) struct Embedding {
    name: String,
    vocabulary: usize,
    dim: usize,
}

impl Embedding {
    pub(super) fn new(name: impl Into<String>, vocabulary: usize, dim: usize) -> Self {
        Self { name: name.into(), vocabulary, dim }
    }

    pub(super) fn declare(&self) -> Vec<Declared> {
        vec![Declared::new(format!("{}.weight", self.name), &[self.vocabulary, self.dim], Initial::Normal)]
    }

    /// The vectors of the whole vocabulary: `[vocabulary, dim]`.
    pub(super) fn table(&self, pass: &Pass<'_>) -> Tensor<2> {
        pass.get(&format!("{}.weight", self.name), [self.vocabulary, self.dim])
    }
}

/// One layer of `torch.nn.LSTM`: `NAME.weight_ih_lN` `[4 hidden, in]`, `NAME.weight_hh_lN` `[4 hidden, hidden]`,
/// `NAME.bias_ih_lN` and `NAME.bias_hh_lN` `[4 hidden]`, whose rows are those of the gates input, forget, cell and output.
#[derive(Clone, Debug)]
pub(super) struct Lstm {
    name: String,
    layer: usize,
    inputs: usize,
    hidden: usize,
}

/// What an LSTM's cell carries from step to step: both `[batch, hidden]`.
pub(super) struct LstmState {
    hidden: Tensor<2>,
    cell: Tensor<2>,
}

/// An LSTM's matrices of one pass, transposed, one for each gate: `[in, hidden]`, `[hidden, hidden]`, `[1, hidden]`.
pub(super) struct LstmGates {
    inputs: [Tensor<2>; 4],
    hidden: [Tensor<2>; 4],
    bias: [Tensor<2>; 4],
}

impl Lstm {
    pub(super) fn new(name: impl Into<String>, layer: usize, inputs: usize, hidden: usize) -> Self {
        Self { name: name.into(), layer, inputs, hidden }
    }

    pub(super) fn declare(&self) -> Vec<Declared> {
        let rows = 4 * self.hidden;
        let initial = of_fan_in(self.hidden); // PyTorch's bound for all four
        let tensor = |part: &str, shape: &[usize]| Declared::new(self.tensor_name(part), shape, initial);
        vec![
            tensor("weight_ih", &[rows, self.inputs]),
            tensor("weight_hh", &[rows, self.hidden]),
            tensor("bias_ih", &[rows]),
            tensor("bias_hh", &[rows]),
        ]
    }

    fn tensor_name(&self, part: &str) -> String {
        format!("{}.{part}_l{}", self.name, self.layer)
    }

    /// The state before the first step.
    pub(super) fn start(&self, batch: usize, pass: &Pass<'_>) -> LstmState {
        let zeros = || Tensor::zeros([batch, self.hidden], &pass.device());
        LstmState { hidden: zeros(), cell: zeros() }
    }

    /// The gates' matrices. They are cut apart once, and not the gates at every step: what goes back through a cut is as
    /// large as what was cut.
    pub(super) fn gates(&self, pass: &Pass<'_>) -> LstmGates {
        let hidden = self.hidden;
        let matrix = |part: &str, width: usize| {
            let all: Tensor<2> = pass.get(&self.tensor_name(part), [4 * hidden, width]);
            [0, 1, 2, 3].map(|gate| all.clone().narrow(0, gate * hidden, hidden).transpose())
        };
        let [ih, hh] = ["bias_ih", "bias_hh"].map(|part| matrix(part, 1));
        let mut both = ih.into_iter().zip(hh).map(|(ih, hh)| ih + hh);
        let bias = [0; 4].map(|_| both.next().expect("there are four gates"));
        LstmGates { inputs: matrix("weight_ih", self.inputs), hidden: matrix("weight_hh", hidden), bias }
    }
}

impl LstmGates {
    /// What inputs `[rows, in]` add to each gate: `[rows, hidden]` each.
    pub(super) fn of_inputs(&self, inputs: &Tensor<2>) -> [Tensor<2>; 4] {
        [0, 1, 2, 3].map(|gate| inputs.clone().matmul(self.inputs[gate].clone()) + self.bias[gate].clone())
    }

    /// One step: `inputs` is what [`of_inputs`](Self::of_inputs) says of this step's inputs. The state's first part is the
    /// output.
    pub(super) fn step(&self, inputs: [Tensor<2>; 4], state: &LstmState) -> LstmState {
        let mut gate = 0;
        let [input, forget, cell, output] = inputs.map(|inputs| {
            gate += 1;
            inputs + state.hidden.clone().matmul(self.hidden[gate - 1].clone())
        });
        let cell = sigmoid(forget) * state.cell.clone() + sigmoid(input) * tanh(cell);
        LstmState { hidden: sigmoid(output) * tanh(cell.clone()), cell }
    }
}

impl LstmState {
    pub(super) fn output(&self) -> Tensor<2> {
        self.hidden.clone()
    }
}

/// The rows of each gate's table that `tokens` `[batch]` name.
pub(super) fn rows_of(tables: &[Tensor<2>; 4], tokens: &Tensor<1, Int>) -> [Tensor<2>; 4] {
    [0, 1, 2, 3].map(|gate| tables[gate].clone().select(0, tokens.clone()))
}

/// PyTorch's default for weights and biases of linear and convolution layers: Kaiming-uniform with a = √5, which is
/// uniform in ±1/√fan-in.
fn of_fan_in(fan_in: usize) -> Initial {
    Initial::Uniform(1.0 / (fan_in as f32).sqrt())
}
