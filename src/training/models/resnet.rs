//! A small residual network (He et al., *Deep Residual Learning for Image Recognition*, 2016), with torchvision's names.

use burn::tensor::Tensor;
use burn::tensor::activation::relu;

use super::layers::{Conv, Linear, Norm};
use super::tensors::{Declared, Pass};
use crate::training::config::Norm as NormKind;

/// Blocks a stage, as in torchvision's smallest.
const BLOCKS: usize = 2;

/// A 3 × 3 convolution (`conv1`, `bn1`), then stages of two blocks each (`layer1.0.conv1`, `layer1.0.bn1`, …), the mean
/// over the image, and `fc`. The first block of all stages but the first halves the image.
#[derive(Clone, Debug)]
pub(in crate::training) struct Resnet {
    image: [usize; 3],
    conv: Conv,
    norm: Norm,
    blocks: Vec<Block>,
    fc: Linear,
    channels: usize,
}

impl Resnet {
    /// For images `[channels, height, width]`, with a stage for each of `widths`, which are numbers of channels. Without
    /// any, `None`.
    pub(super) fn new(image: [usize; 3], widths: &[usize], norm: NormKind, outputs: usize) -> Option<Self> {
        let (&first, &last) = (widths.first()?, widths.last()?);
        let mut inputs = first;
        let mut blocks = Vec::new();
        for (stage, &width) in widths.iter().enumerate() {
            for block in 0..BLOCKS {
                let stride = if stage > 0 && block == 0 { 2 } else { 1 };
                blocks.push(Block::new(&format!("layer{}.{block}", stage + 1), inputs, width, stride, norm));
                inputs = width;
            }
        }
        Some(Self {
            image,
            conv: Conv::new("conv1", image[0], first, 3).unbiased(),
            norm: Norm::new("bn1", first, norm),
            blocks,
            fc: Linear::new("fc", last, outputs),
            channels: last,
        })
    }

    pub(super) fn declare(&self) -> Vec<Declared> {
        let blocks = self.blocks.iter().flat_map(Block::declare);
        let stem = self.conv.declare().into_iter().chain(self.norm.declare());
        stem.chain(blocks).chain(self.fc.declare()).collect()
    }

    /// `[batch, features]` to `[batch, outputs]`.
    pub(super) fn forward(&self, pass: &Pass<'_>, x: Tensor<2>) -> Tensor<2> {
        let ([batch, _], [channels, height, width]) = (x.dims(), self.image);
        let images = x.reshape([batch, channels, height, width]);
        let stem = relu(self.norm.forward(pass, self.conv.forward(pass, images)));
        let x = self.blocks.iter().fold(stem, |x, block| block.forward(pass, x));
        let [_, _, height, width] = x.dims();
        let means = x.reshape([batch, self.channels, height * width]).mean_dim(2);
        self.fc.forward(pass, means.reshape([batch, self.channels]))
    }
}

/// Two 3 × 3 convolutions beside a way that changes nothing, or that only fits the shape (`downsample.0`,
/// `downsample.1`).
#[derive(Clone, Debug)]
struct Block {
    convolutions: [(Conv, Norm); 2],
    downsample: Option<(Conv, Norm)>,
}

impl Block {
    fn new(name: &str, inputs: usize, outputs: usize, stride: usize, norm: NormKind) -> Self {
        let part = |conv: &str, bn: &str, inputs, kernel, stride| {
            let conv = Conv::new(format!("{name}.{conv}"), inputs, outputs, kernel).stride(stride).unbiased();
            (conv, Norm::new(format!("{name}.{bn}"), outputs, norm))
        };
        let fits = stride == 1 && inputs == outputs;
        Self {
            convolutions: [part("conv1", "bn1", inputs, 3, stride), part("conv2", "bn2", outputs, 3, 1)],
            downsample: (!fits).then(|| part("downsample.0", "downsample.1", inputs, 1, stride)),
        }
    }

    fn declare(&self) -> Vec<Declared> {
        let parts = self.convolutions.iter().chain(&self.downsample);
        parts.flat_map(|(conv, norm)| conv.declare().into_iter().chain(norm.declare())).collect()
    }

    fn forward(&self, pass: &Pass<'_>, x: Tensor<4>) -> Tensor<4> {
        let through = |(conv, norm): &(Conv, Norm), x| norm.forward(pass, conv.forward(pass, x));
        let [first, second] = &self.convolutions;
        let beside = self.downsample.as_ref().map_or_else(|| x.clone(), |part| through(part, x.clone()));
        relu(through(second, relu(through(first, x))) + beside)
    }
}
