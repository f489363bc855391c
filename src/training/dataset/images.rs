//! Pictures (PNG or JPEG), one folder a class.

use std::path::{Path, PathBuf};

use image::imageops::FilterType;
use image::{DynamicImage, ImageReader, Limits};

use super::source::{ReadError, ReadOptions, sorted_names};
use super::{Dataset, Targets};

/// The widest and the highest picture, in pixels.
const SIDE_MAX: u32 = 16_384;

/// What a picture may take while it is read, in bytes.
const PICTURE_BYTES_MAX: u64 = 512 << 20;

/// The key under which the classes are listed in the options' categories.
const CLASS: &str = "class";

/// Reads the pictures in the folders of `dir`, in the order of their names: `[channels, height, width]`, scaled to 0..1.
pub(super) fn read(dir: &Path, options: &ReadOptions) -> Result<Dataset, ReadError> {
    let mut folders = Vec::new();
    for name in sorted_names(dir)? {
        if !name.starts_with('.') && dir.join(&name).is_dir() {
            folders.push(name);
        }
    }
    let names = options.categories.get(CLASS).unwrap_or(&folders);
    if let Some(stranger) = folders.iter().find(|folder| !names.contains(folder)) {
        let what = format!("the class {stranger:?} is not among those listed: {}", names.join("|"));
        return Err(ReadError::new(
            dir.join(stranger).display(),
            what,
            "list it in --categories, or move the folder away",
        ));
    }
    if names.len() < 2 {
        let what = format!("two classes are needed, a folder each, and this has {}", names.len());
        let hint = "name the directory that holds a folder of pictures for each class, \
                    or list all classes with --categories 'class=cat|dog'";
        return Err(ReadError::new(dir.display(), what, hint));
    }
    let (mut features, mut labels, mut shape) = (Vec::new(), Vec::new(), None);
    for folder in &folders {
        let label = names.iter().position(|name| name == folder).expect("all folders are listed");
        for path in pictures(&dir.join(folder))? {
            let (height, width) = read_picture(&path, options, &mut features)?;
            let (first, first_path) = shape.get_or_insert(([options.channels, height, width], path.clone()));
            if [options.channels, height, width] != *first {
                let what = format!("it is {width}×{height}, but {} is {}×{}", first_path.display(), first[2], first[1]);
                return Err(ReadError::new(path.display(), what, "set --image-size so that all pictures get one size"));
            }
            labels.push(label as u32);
        }
    }
    let Some((shape, _)) = shape else {
        let hint = "each folder holds pictures that end in .png, .jpg or .jpeg";
        return Err(ReadError::new(dir.display(), "there is no picture in its folders", hint));
    };
    Dataset::of(features, &shape, Targets::Classes { labels, names: names.clone().into() })
        .map_err(|error| ReadError::new(dir.display(), error.to_string(), "look for damaged pictures"))
}

fn pictures(folder: &Path) -> Result<Vec<PathBuf>, ReadError> {
    let is_picture = |path: &PathBuf| {
        let extension = path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
        extension.is_some_and(|extension| ["png", "jpg", "jpeg"].contains(&extension.as_str()))
    };
    let names = sorted_names(folder)?.into_iter().filter(|name| !name.starts_with('.'));
    Ok(names.map(|name| folder.join(name)).filter(is_picture).collect())
}

/// Adds the pixels of a picture; returns its height and width.
fn read_picture(path: &Path, options: &ReadOptions, features: &mut Vec<f32>) -> Result<(usize, usize), ReadError> {
    let mut reader = ImageReader::open(path)
        .and_then(ImageReader::with_guessed_format)
        .map_err(|error| ReadError::io(path, &error))?;
    let mut limits = Limits::default();
    (limits.max_image_width, limits.max_image_height) = (Some(SIDE_MAX), Some(SIDE_MAX));
    limits.max_alloc = Some(PICTURE_BYTES_MAX);
    reader.limits(limits);
    let damaged = |error: image::ImageError| {
        ReadError::new(path.display(), error.to_string(), "the picture is damaged or too large: remove or replace it")
    };
    let mut picture = reader.decode().map_err(damaged)?;
    if let Some(size) = options.image_size {
        // Triangle averages what becomes one pixel, so that thin lines do not vanish.
        picture = picture.resize_exact(size as u32, size as u32, FilterType::Triangle);
    }
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    match options.channels {
        1 if is_deep(&picture) => add(&picture.into_luma16(), 1, u16::MAX, features),
        1 => add(&picture.into_luma8(), 1, u8::MAX, features),
        _ if is_deep(&picture) => add(&picture.into_rgb16(), 3, u16::MAX, features),
        _ => add(&picture.into_rgb8(), 3, u8::MAX, features),
    }
    Ok((height, width))
}

/// Whether it has 16 bits a channel. They are kept: a scanner of 12 bits writes into the lowest of them.
fn is_deep(picture: &DynamicImage) -> bool {
    use DynamicImage::{ImageLuma16, ImageLumaA16, ImageRgb16, ImageRgba16};
    matches!(picture, ImageLuma16(_) | ImageLumaA16(_) | ImageRgb16(_) | ImageRgba16(_))
}

/// Adds pixels, whose channels stand side by side, one channel after the other.
fn add<T: Copy + Into<f32>>(pixels: &[T], channels: usize, max: T, features: &mut Vec<f32>) {
    for channel in 0..channels {
        features.extend(pixels.iter().skip(channel).step_by(channels).map(|&value| value.into() / max.into()));
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use image::{ImageBuffer, Luma, RgbImage};

    use super::*;

    fn options() -> ReadOptions {
        ReadOptions::default()
    }

    fn save(dir: &Path, name: &str, width: u32, height: u32, colour: [u8; 3]) {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        RgbImage::from_pixel(width, height, image::Rgb(colour)).save(path).unwrap();
    }

    #[test]
    fn folders_are_classes_and_channels_come_first() {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), "dog/1.png", 3, 2, [255, 0, 51]);
        save(dir.path(), "cat/2.JPG", 3, 2, [0, 0, 0]);
        fs::write(dir.path().join("cat/notes.txt"), "no picture").unwrap();
        let data = read(dir.path(), &options()).unwrap();
        assert_eq!(
            (data.shape(), data.class_names(), data.labels()),
            (&[3, 2, 3][..], &["cat".into(), "dog".into()][..], &[0, 1][..])
        );
        assert_eq!(data.example(1), [[1.0; 6], [0.0; 6], [0.2; 6]].concat());
        let grey = read(dir.path(), &ReadOptions { channels: 1, image_size: Some(4), ..options() }).unwrap();
        assert_eq!((grey.shape(), grey.len()), (&[1, 4, 4][..], 2));
        assert!(grey.example(1).iter().all(|&value| value > 0.1 && value < 0.5));
    }

    #[test]
    fn sixteen_bits_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), "cat/1.png", 1, 1, [255; 3]);
        save(dir.path(), "dog/1.png", 1, 1, [0; 3]);
        let dim = ImageBuffer::from_pixel(1, 1, Luma([1000_u16]));
        dim.save(dir.path().join("dog/1.png")).unwrap();
        for channels in [1, 3] {
            let data = read(dir.path(), &ReadOptions { channels, ..options() }).unwrap();
            assert_eq!((data.example(0), data.example(1)), (&[1.0; 3][..channels], &[1000.0 / 65535.0; 3][..channels]));
        }
    }

    #[test]
    fn a_peer_that_lacks_a_class_lists_all() {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), "dog/1.png", 2, 2, [9; 3]);
        assert!(read(dir.path(), &options()).unwrap_err().hint.contains("--categories"));
        let mut listed = options();
        listed.categories.insert(CLASS.into(), vec!["cat".into(), "dog".into()]);
        assert_eq!(read(dir.path(), &listed).unwrap().labels(), [1]);
        save(dir.path(), "fox/1.png", 2, 2, [9; 3]);
        let error = read(dir.path(), &listed).unwrap_err().to_string();
        assert!(error.ends_with("the class \"fox\" is not among those listed: cat|dog"), "{error}");
    }

    #[test]
    fn pictures_that_cannot_be_used_are_named() {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), "a/1.png", 2, 2, [1; 3]);
        save(dir.path(), "b/1.png", 2, 3, [1; 3]);
        let error = read(dir.path(), &options()).unwrap_err();
        assert!(
            error.to_string().contains("b/1.png: it is 2×3, but ") && error.hint.contains("--image-size"),
            "{error}"
        );
        let whole = fs::read(dir.path().join("a/1.png")).unwrap();
        for len in 0..whole.len() - 12 {
            fs::write(dir.path().join("b/1.png"), &whole[..len]).unwrap();
            let error = read(dir.path(), &options()).unwrap_err();
            assert!(error.place.ends_with("b/1.png"), "{len} bytes: {error}");
        }
        fs::remove_file(dir.path().join("a/1.png")).unwrap();
        fs::remove_file(dir.path().join("b/1.png")).unwrap();
        assert!(read(dir.path(), &options()).unwrap_err().to_string().contains("no picture"));
    }
}
