//! Convolutional networks with pooling: after LeNet (LeCun et al., 1998), and that of the paper on federated averaging.
//!
//! Where a step's time goes on `flex`, as `perf` samples it with 32 images of 28 × 28 pixels: in `fedavg-cnn` the
//! matrix products take nearly half, in `cnn` a fifth. Most of the rest moves values: it writes each pixel's
//! surroundings, and adds up their gradient, a pass over the image for each of the kernel's places; the masks of the
//! pooling take a fifth in `cnn`. PyTorch's library never writes the surroundings, it gathers them as its product asks
//! for them. A convolution of that kind in burn, with both gradients, would mend it. Wider registers would not: the
//! products of `fedavg-cnn` run no faster with burn's feature `x86-v4`.

use burn::tensor::Tensor;
use burn::tensor::activation::relu;

use super::layers::Conv;
use super::mlp::Mlp;
use super::tensors::{Declared, Pass};

/// Images that go through the convolutions together: with more of them, the matrices that convolutions make leave the
/// processor's caches.
const IMAGES: usize = 32;

/// Convolutions, each followed by ReLU and a pooling that halves the image, then fully connected layers: `conv1.weight`
/// `[out, in, k, k]`, `conv1.bias` `[out]`, `conv2.weight` …, `fc1.weight` …
#[derive(Clone, Debug)]
pub(in crate::training) struct Cnn {
    image: [usize; 3],
    convolutions: Vec<Conv>,
    classifier: Mlp,
}

impl Cnn {
    /// For images `[channels, height, width]`, with convolutions of `kernel` × `kernel` that yield so many channels.
    /// `None` if the images are too small to be halved so often.
    pub(super) fn new(
        image: [usize; 3],
        kernel: usize,
        channels: &[usize],
        hidden: &[usize],
        outputs: usize,
    ) -> Option<Self> {
        let [mut inputs, mut height, mut width] = image;
        let mut convolutions = Vec::new();
        for (index, &channels) in channels.iter().enumerate() {
            convolutions.push(Conv::new(format!("conv{}", index + 1), inputs, channels, kernel));
            (inputs, height, width) = (channels, height / 2, width / 2);
        }
        let features = inputs * height * width;
        (features > 0).then(|| Self { image, convolutions, classifier: Mlp::new(features, hidden, outputs) })
    }

    /// Two 5 × 5 convolutions with 32 and 64 channels and a layer of 512: 1,663,370 values for 28 × 28 pixels in 10
    /// classes (McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*, 2017).
    pub(super) fn of_fedavg(image: [usize; 3], outputs: usize) -> Option<Self> {
        Self::new(image, 5, &[32, 64], &[512], outputs)
    }

    pub(super) fn declare(&self) -> Vec<Declared> {
        self.convolutions.iter().flat_map(Conv::declare).chain(self.classifier.declare()).collect()
    }

    /// `[batch, features]` to `[batch, outputs]`.
    pub(super) fn forward(&self, pass: &Pass<'_>, x: Tensor<2>) -> Tensor<2> {
        let features = x.split(IMAGES, 0).into_iter().map(|x| self.features(pass, x)).collect();
        self.classifier.forward(pass, Tensor::cat(features, 1).transpose())
    }

    /// `[batch, channels × height × width]` to `[features, batch]`.
    fn features(&self, pass: &Pass<'_>, x: Tensor<2>) -> Tensor<2> {
        let ([batch, _], [channels, height, width]) = (x.dims(), self.image);
        let images = x.transpose().reshape([channels, height, width, batch]);
        // Where the pooling finds the largest value, ReLU may as well come after it, at a quarter of the values.
        let halved = |x, (index, layer): (usize, &Conv)| {
            let constant = index == 0 || !pass.is_training();
            relu(layer.forward_and_halve(pass, x, constant))
        };
        self.convolutions.iter().enumerate().fold(images, halved).flatten(0, 2)
    }
}
