//! The IDX format of MNIST (Y. LeCun, C. Cortes and C. Burges) and its kin: bytes of any shape behind a small header.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;

use super::source::ReadError;
use super::{Dataset, Targets};

/// Files that MNIST's are named after, with what they are for: those of `t10k` are held out if both are there.
const PARTS: [&str; 2] = ["train", "t10k"];

/// The most bytes of one file, unpacked.
const BYTES_MAX: usize = 1 << 30;

/// The type of the values: bytes.
const UNSIGNED_BYTE: u8 = 8;

const DAMAGED: &str = "the file is damaged or no IDX file: fetch it again";

/// As many classes as digits; data with more say so by their labels.
const CLASSES_MIN: usize = 10;

/// Reads the pairs of files in `dir`: `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, the same with `t10k`, or
/// both; gzipped, if they end in `.gz`. Pixels are scaled to 0..1. The second data set is held out, if both pairs are there.
pub(super) fn read(dir: &Path) -> Result<(Dataset, Option<Dataset>), ReadError> {
    let pairs = PARTS.map(|part| find(dir, part, "images").zip(find(dir, part, "labels")));
    let pairs: Vec<(PathBuf, PathBuf)> = pairs.into_iter().flatten().collect();
    if pairs.is_empty() {
        let what =
            "there is no pair of files like train-images-idx3-ubyte and train-labels-idx1-ubyte (or t10k-…, or …gz)";
        return Err(ReadError::new(dir.display(), what, "--data idx:DIR names a directory with the files of MNIST"));
    }
    let raw = pairs.iter().map(|(images, labels)| Pair::read(images, labels)).collect::<Result<Vec<_>, _>>()?;
    let highest = raw.iter().flat_map(|pair| &pair.labels).max().copied().unwrap_or(0);
    let names: Vec<String> = (0..CLASSES_MIN.max(usize::from(highest) + 1)).map(|class| class.to_string()).collect();
    let mut parts = raw.into_iter().zip(&pairs).map(|(pair, (images, _))| pair.into_dataset(images, &names));
    let train = parts.next().expect("there is a pair")?;
    let held_out = parts.next().transpose()?;
    if let Some(other) = held_out.as_ref().filter(|other| other.shape() != train.shape()) {
        let what = format!("its pictures have shape {:?}, those to train on {:?}", other.shape(), train.shape());
        return Err(ReadError::new(pairs[1].0.display(), what, "both pairs of files must be of one data set"));
    }
    Ok((train, held_out))
}

fn find(dir: &Path, part: &str, what: &str) -> Option<PathBuf> {
    let dims = if what == "images" { 3 } else { 1 };
    let names = ["-", "."].map(|dot| format!("{part}-{what}{dot}idx{dims}-ubyte"));
    let paths = names.iter().flat_map(|name| [dir.join(name), dir.join(format!("{name}.gz"))]);
    paths.into_iter().find(|path| path.is_file())
}

struct Pair {
    shape: Vec<usize>,
    pixels: Vec<u8>,
    labels: Vec<u8>,
}

impl Pair {
    fn read(images: &Path, labels: &Path) -> Result<Self, ReadError> {
        let (dims, pixels) = read_file(images)?;
        let (label_dims, of_labels) = read_file(labels)?;
        let shape = match dims.as_slice() {
            [_, features] => vec![*features],
            [_, height, width] => vec![1, *height, *width],
            [_, channels, height, width] => vec![*channels, *height, *width],
            _ => {
                let what = format!("it has {} dimensions; pictures have 3", dims.len());
                return Err(ReadError::new(images.display(), what, DAMAGED));
            }
        };
        if label_dims != dims[..1] {
            let what = format!("its shape is {label_dims:?}, but there are {} pictures", dims[0]);
            return Err(ReadError::new(labels.display(), what, "both files of a pair must be of one data set"));
        }
        if pixels.is_empty() {
            return Err(ReadError::new(images.display(), "it holds no picture", DAMAGED));
        }
        Ok(Self { shape, pixels, labels: of_labels })
    }

    fn into_dataset(self, path: &Path, names: &[String]) -> Result<Dataset, ReadError> {
        let features = self.pixels.iter().map(|&pixel| f32::from(pixel) / 255.0).collect();
        let labels = self.labels.into_iter().map(u32::from).collect();
        let dataset = Dataset::of(features, &self.shape, Targets::Classes { labels, names: names.into() });
        dataset.map_err(|error| ReadError::new(path.display(), error.to_string(), DAMAGED))
    }
}

/// The dimensions and the bytes of a file.
fn read_file(path: &Path) -> Result<(Vec<usize>, Vec<u8>), ReadError> {
    let io = |error| ReadError::io(path, &error);
    let file = std::io::BufReader::new(File::open(path).map_err(io)?);
    if path.extension().is_some_and(|extension| extension == "gz") {
        parse(path, MultiGzDecoder::new(file))
    } else {
        parse(path, file)
    }
}

fn parse(path: &Path, mut file: impl Read) -> Result<(Vec<usize>, Vec<u8>), ReadError> {
    let io = |error| ReadError::io(path, &error);
    let bad = |what: String| Err(ReadError::new(path.display(), what, DAMAGED));
    let mut magic = [0; 4];
    file.read_exact(&mut magic).map_err(io)?;
    let [0, 0, kind, dims_len @ 1..=4] = magic else {
        return bad(format!("it begins with {magic:?}, which is not the beginning of an IDX file"));
    };
    if kind != UNSIGNED_BYTE {
        return bad(format!("its values are of type {kind:#04x}; only bytes (0x08) can be read"));
    }
    let mut dims = Vec::new();
    for _ in 0..dims_len {
        let mut dim = [0; 4];
        file.read_exact(&mut dim).map_err(io)?;
        dims.push(u32::from_be_bytes(dim) as usize);
    }
    let len = dims.iter().try_fold(1, |len: usize, &dim| len.checked_mul(dim)).filter(|&len| len <= BYTES_MAX);
    let Some(len) = len else { return bad(format!("its shape is {dims:?}, more than {BYTES_MAX} bytes")) };
    // What the header promises is not allocated before it is there.
    let mut bytes = Vec::new();
    file.by_ref().take(len as u64).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() < len {
        return bad(format!("its shape is {dims:?}, but it ends after {} of {len} bytes", bytes.len()));
    }
    if file.read(&mut [0]).map_err(io)? > 0 {
        return bad(format!("there is something behind the {len} bytes of its shape {dims:?}"));
    }
    Ok((dims, bytes))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use proptest::prelude::*;

    use super::*;

    fn idx(dims: &[u32], bytes: &[u8]) -> Vec<u8> {
        let dims: Vec<u8> = dims.iter().flat_map(|dim| dim.to_be_bytes()).collect();
        [&[0, 0, 8, (dims.len() / 4) as u8], &dims[..], bytes].concat()
    }

    fn gzipped(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn dir(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, bytes)| fs::write(dir.path().join(name), bytes).unwrap());
        dir
    }

    fn pictures(count: u8) -> (Vec<u8>, Vec<u8>) {
        let pixels: Vec<u8> = (0..count * 6).collect();
        (idx(&[count.into(), 2, 3], &pixels), idx(&[count.into()], &(0..count).collect::<Vec<_>>()))
    }

    #[test]
    fn a_pair_is_read_gzipped_or_not() {
        let (images, labels) = pictures(3);
        let plain = dir(&[("t10k-images-idx3-ubyte", images.clone()), ("t10k-labels-idx1-ubyte", labels.clone())]);
        let packed =
            dir(&[("train-images-idx3-ubyte.gz", gzipped(&images)), ("train-labels-idx1-ubyte.gz", gzipped(&labels))]);
        let (data, held_out) = read(plain.path()).unwrap();
        assert_eq!((data.clone(), held_out), read(packed.path()).unwrap());
        assert_eq!((data.shape(), data.labels()), (&[1, 2, 3][..], &[0, 1, 2][..]));
        assert_eq!((data.example(1)[0], data.num_classes()), (6.0 / 255.0, 10));
    }

    #[test]
    fn the_t10k_files_are_held_out_if_both_pairs_are_there() {
        let ((images, labels), (fewer, few)) = (pictures(12), pictures(3));
        let dir = dir(&[
            ("train-images-idx3-ubyte", images),
            ("train-labels-idx1-ubyte", labels),
            ("t10k-images.idx3-ubyte", fewer),
            ("t10k-labels.idx1-ubyte", few),
        ]);
        let (train, held_out) = read(dir.path()).unwrap();
        let held_out = held_out.unwrap();
        assert_eq!((train.len(), held_out.len()), (12, 3));
        assert_eq!((train.num_classes(), held_out.num_classes()), (12, 12));
    }

    proptest! {
        #![proptest_config(crate::training::partition::tests::cases())]
        /// A file with any byte changed is read or refused.
        #[test]
        fn no_file_makes_the_reader_panic(at in 0usize..34, byte: u8, packed: bool) {
            let (mut images, labels) = pictures(3);
            images[at] = byte;
            if packed {
                images = gzipped(&images);
                let at = at % images.len();
                images[at] ^= byte;
            }
            let name = if packed { "train-images-idx3-ubyte.gz" } else { "train-images-idx3-ubyte" };
            let dir = dir(&[(name, images), ("train-labels-idx1-ubyte", labels)]);
            if let Err(error) = read(dir.path()) {
                prop_assert!(error.place.contains("-ubyte"), "{}", error);
            }
        }
    }

    #[test]
    fn damaged_files_are_refused_by_name() {
        let (images, labels) = pictures(3);
        let refused = |images: Vec<u8>, labels: Vec<u8>, gz: &str, word: &str| {
            let names = [format!("train-images-idx3-ubyte{gz}"), format!("train-labels-idx1-ubyte{gz}")];
            let dir = dir(&[(&names[0], images), (&names[1], labels)]);
            let error = read(dir.path()).unwrap_err();
            assert!(error.to_string().contains(word) && error.place.contains("-ubyte"), "{error} ({word})");
        };
        let huge = idx(&[u32::MAX, u32::MAX, u32::MAX], &[]);
        refused(huge, labels.clone(), "", "more than");
        refused(idx(&[1 << 29, 1, 1], &[]), labels.clone(), "", "it ends after 0 of");
        refused(idx(&[0, 2, 3], &[]), idx(&[0], &[]), "", "no picture");
        refused(idx(&[3, 0, 3], &[]), labels.clone(), "", "no picture");
        refused(images.clone(), idx(&[2], &[0, 1]), "", "there are 3 pictures");
        refused(images.clone(), [labels.clone(), vec![0]].concat(), "", "something behind");
        refused(images.clone(), b"PK\x03\x04".to_vec(), "", "not the beginning");
        refused(labels.clone(), labels.clone(), "", "dimensions");
        for len in 0..images.len() {
            refused(images[..len].to_vec(), labels.clone(), "", "");
        }
        let packed = gzipped(&images);
        for len in 0..packed.len() {
            refused(packed[..len].to_vec(), gzipped(&labels), ".gz", "");
        }
        assert!(read(tempfile::tempdir().unwrap().path()).unwrap_err().to_string().contains("no pair of files"));
    }
}
