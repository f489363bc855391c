//! Changed copies of images to train on: shifted by a few pixels, or mirrored.

use rand::Rng;
use serde::{Deserialize, Serialize};

use super::named::named;

/// How the images of a batch are changed before a step. Each image of each batch is drawn anew.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Augment {
    /// Not at all.
    #[default]
    None,
    /// Shifted by up to an eighth of height and width each way; what comes in from outside is 0.
    Shift,
    /// Mirrored left to right, every other one. Not for digits and letters.
    Flip,
    /// Both.
    ShiftFlip,
}

named!(Augment, "augment", None => "none", Shift => "shift", Flip => "flip", ShiftFlip => "shift-flip");

impl Augment {
    /// Changes `features`, images of this shape (`[channels, height, width]`) one after the other.
    pub(super) fn apply(self, features: &mut [f32], shape: &[usize], rng: &mut impl Rng) {
        let &[_, height, width] = shape else { return };
        let (shifts, flips) = match self {
            Self::None => return,
            Self::Shift => (true, false),
            Self::Flip => (false, true),
            Self::ShiftFlip => (true, true),
        };
        for image in features.chunks_exact_mut(shape.iter().product()) {
            if shifts {
                let mut offset = |len: usize| rng.random_range(0..=2 * reach(len)) as isize - reach(len) as isize;
                let (down, right) = (offset(height), offset(width));
                image.chunks_exact_mut(height * width).for_each(|plane| shift(plane, width, down, right));
            }
            if flips && rng.random() {
                image.chunks_exact_mut(width).for_each(<[f32]>::reverse);
            }
        }
    }
}

/// How far an image may be shifted along a side of so many pixels.
fn reach(len: usize) -> usize {
    len.div_ceil(8)
}

/// Moves one plane's pixels down and to the right, by less than its size.
fn shift(plane: &mut [f32], width: usize, down: isize, right: isize) {
    move_all(plane, down * width as isize);
    plane.chunks_exact_mut(width).for_each(|row| move_all(row, right));
}

fn move_all(values: &mut [f32], by: isize) {
    let len = values.len();
    let distance = by.unsigned_abs().min(len);
    if by >= 0 {
        values.copy_within(..len - distance, distance);
        values[..distance].fill(0.0);
    } else {
        values.copy_within(distance.., 0);
        values[len - distance..].fill(0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::random::generator;

    /// Two channels of 2 × 3 pixels.
    const IMAGE: [f32; 12] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0];

    fn drawn(augment: Augment, images: usize, purpose: &str) -> Vec<Vec<f32>> {
        let mut features = IMAGE.repeat(images);
        augment.apply(&mut features, &[2, 2, 3], &mut generator(purpose));
        features.chunks_exact(IMAGE.len()).map(<[f32]>::to_vec).collect()
    }

    #[test]
    fn pixels_move_together_and_leave_zeros_behind() {
        let mut plane = IMAGE[..6].to_vec();
        shift(&mut plane, 3, 1, -1);
        assert_eq!(plane, [0.0, 0.0, 0.0, 2.0, 3.0, 0.0]);
        shift(&mut plane, 3, -1, 1);
        assert_eq!(plane, [0.0, 2.0, 3.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn an_image_is_itself_or_its_mirror_image() {
        let mirrored = [3.0, 2.0, 1.0, 6.0, 5.0, 4.0, 30.0, 20.0, 10.0, 60.0, 50.0, 40.0];
        let images = drawn(Augment::Flip, 40, "a");
        assert!(images.iter().all(|image| *image == IMAGE || *image == mirrored));
        assert!(images.iter().any(|image| *image == IMAGE) && images.iter().any(|image| *image == mirrored));
    }

    #[test]
    fn both_channels_shift_alike_and_each_image_anew() {
        let images = drawn(Augment::Shift, 60, "a");
        for image in &images {
            assert!(image[..6].iter().zip(&image[6..]).all(|(first, second)| first * 10.0 == *second), "{image:?}");
        }
        let different: std::collections::BTreeSet<String> = images.iter().map(|image| format!("{image:?}")).collect();
        assert_eq!(different.len(), 9, "three ways down, three to the right");
    }

    #[test]
    fn what_is_drawn_follows_from_the_seed() {
        assert_eq!(drawn(Augment::ShiftFlip, 20, "a"), drawn(Augment::ShiftFlip, 20, "a"));
        assert_ne!(drawn(Augment::ShiftFlip, 20, "a"), drawn(Augment::ShiftFlip, 20, "b"));
        assert!(drawn(Augment::None, 3, "a").iter().all(|image| *image == IMAGE));
    }
}
