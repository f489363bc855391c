//! The data set that is compiled into the binary.

use std::io::Read;

use flate2::read::GzDecoder;

use super::{Dataset, Targets};

static DIGITS: &[u8] = include_bytes!("../data/digits.csv.gz");
const PIXELS: usize = 64;
const PIXEL_MAX: f32 = 16.0;

pub(super) fn digits() -> Dataset {
    let mut text = String::new();
    GzDecoder::new(DIGITS).read_to_string(&mut text).expect("the data compiled in is gzipped text");
    let (mut features, mut labels) = (Vec::new(), Vec::new());
    for line in text.lines() {
        let mut numbers = line.split(',').map(|n| n.parse::<u8>().expect("the data compiled in is numbers"));
        features.extend(numbers.by_ref().take(PIXELS).map(|pixel| f32::from(pixel) / PIXEL_MAX));
        labels.extend(numbers.map(u32::from));
    }
    let names: Vec<String> = (0..10).map(|digit| digit.to_string()).collect();
    let targets = Targets::Classes { labels, names: names.into() };
    Dataset::of(features, &[1, 8, 8], targets).expect("the data compiled in is whole")
}
