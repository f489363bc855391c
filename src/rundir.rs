//! The run directory: what a run leaves for people and scripts.
//!
//! ```text
//! <run directory>/
//!   config.toml         the effective configuration
//!   events.jsonl        what happened, one JSON object a line
//!   model.safetensors   the last global model that is known here
//!   best.safetensors    the one with the lowest validation loss so far, of those measured on as many examples as the last
//! ```
//!
//! Models are written beside their file and renamed, so whoever reads one reads a whole one. The log grows by a few lines
//! a round and peer; the models are two files, whatever the number of rounds.
//!
//! A run does not end because this directory cannot take its results: what a full disk refuses is held in memory, in its
//! order, until [`RunDir::write_back`] succeeds. Of models only the newest of each file is held.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use crate::journal::obstacle;
use crate::training::export::{ExportError, from_safetensors, to_safetensors};
use crate::types::{Digest, Metrics, Round};
use crate::weights::{Layout, TensorSpec, Weights};

/// The name of the effective configuration.
pub const CONFIG: &str = "config.toml";

/// The name of the log of events.
pub const EVENTS: &str = "events.jsonl";

/// The name of the last model.
pub const MODEL: &str = "model.safetensors";

/// The name of the best model.
pub const BEST: &str = "best.safetensors";

/// The metadata's keys of the validation loss, by which the best model is known, and of how many examples it is over.
const VAL_LOSS: &str = "val_loss";
const VAL_EXAMPLES: &str = "val_examples";

/// An open run directory.
#[derive(Debug)]
pub struct RunDir {
    dir: PathBuf,
    events: File,
    /// Where the log's last whole line ends, if half a line behind it could not be cut off yet.
    cut_at: Option<u64>,
    /// Lines, each with its end, that are not in the log yet.
    lines: String,
    /// Models that are not in their files yet.
    models: BTreeMap<&'static str, Bytes>,
    /// The validation loss of the best model, and over how many examples.
    best: Option<(f64, u64)>,
}

/// A global model and what is known of it.
#[derive(Debug)]
pub struct NamedModel<'a> {
    /// Its weights.
    pub weights: &'a Weights,
    /// The federation that made it.
    pub federation: &'a str,
    /// The round that made it.
    pub round: Round,
    /// The digest of its blob.
    pub digest: Digest,
    /// Its metrics over all peers, if they are known.
    pub metrics: Option<Metrics>,
    /// What is known of its inputs.
    pub inputs: &'a Inputs,
}

/// What whoever uses a model needs to know of its inputs and outputs.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// What the features are called, if they have names.
    pub features: Vec<String>,
    /// What the classes are called.
    pub classes: Vec<String>,
    /// How they are standardised, if they are.
    pub scales: Option<Scales>,
}

/// What is subtracted from inputs, and what they are divided by then.
#[derive(Clone, Debug)]
pub struct Scales {
    /// The mean of each feature.
    pub mean: Vec<f64>,
    /// The standard deviation of each feature.
    pub std: Vec<f64>,
    /// Mean and standard deviation of the numbers to tell, if numbers are to be told.
    pub target: Option<[f64; 2]>,
}

impl Inputs {
    /// The weights with what is subtracted from an input (`input.mean`) and what it is then divided by (`input.std`),
    /// `[features]` each, and with the like of the numbers to tell (`target.mean` and `target.std`, `[1]`).
    fn beside(&self, weights: &Weights) -> Weights {
        let Some(scales) = &self.scales else { return weights.clone() };
        let (mut layout, mut values) = (Layout::clone(weights.layout()), weights.values().to_vec());
        for (name, numbers) in scales.named() {
            layout.tensors.push(TensorSpec { name: name.into(), shape: vec![numbers.len()] });
            values.extend(numbers.iter().map(|&number| number as f32));
        }
        Weights::new(Arc::new(layout), values).expect("each tensor comes with its values")
    }
}

impl Scales {
    /// The numbers under the names that they have in a file.
    fn named(&self) -> Vec<(&'static str, Vec<f64>)> {
        let targets =
            self.target.iter().flat_map(|&[mean, std]| [("target.mean", vec![mean]), ("target.std", vec![std])]);
        let inputs = [("input.mean", self.mean.clone()), ("input.std", self.std.clone())];
        inputs.into_iter().chain(targets).collect()
    }
}

/// Why the run directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// The file system said no.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The model does not fit into a file.
    #[error(transparent)]
    Export(#[from] ExportError),
}

impl RunDirError {
    /// What keeps the disk from taking what is to be written, if that may pass: see [`obstacle`].
    pub fn obstacle(&self) -> Option<&'static str> {
        match self {
            RunDirError::Io { source, .. } => obstacle(source),
            RunDirError::Export(_) => None,
        }
    }
}

impl RunDir {
    /// Opens `dir`, or creates it. What an earlier run left there is added to.
    pub fn open(dir: &Path) -> Result<Self, RunDirError> {
        fs::create_dir_all(dir).map_err(failed("create", dir))?;
        let path = dir.join(EVENTS);
        let events = open_events(&path).map_err(failed("open", &path))?;
        let (lines, models) = (String::new(), BTreeMap::new());
        Ok(Self { dir: dir.to_owned(), events, cut_at: None, lines, models, best: best_loss(dir) })
    }

    /// Removes the directory of a run that did not begin: its configuration, its log, and itself if nothing else is there.
    pub fn remove(self) {
        // What stays behind harms nobody.
        let _ = [CONFIG, EVENTS].map(|name| fs::remove_file(self.dir.join(name)));
        let _ = fs::remove_dir(&self.dir);
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Where the last model is, or will be.
    pub fn model(&self) -> PathBuf {
        self.dir.join(MODEL)
    }

    /// The configuration that an earlier run left in `dir`, if one did.
    pub fn earlier_config(dir: &Path) -> Result<Option<String>, RunDirError> {
        let path = dir.join(CONFIG);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(source) => Err(RunDirError::Io { action: "read", path, source }),
        }
    }

    /// The lines that the log of events holds so far. What is no text in them was damaged, and is none of an event.
    pub fn earlier_events(&self) -> Result<impl Iterator<Item = Result<String, RunDirError>>, RunDirError> {
        let path = self.dir.join(EVENTS);
        let file = File::open(&path).map_err(failed("read", &path))?;
        let lines = BufReader::new(file).split(b'\n');
        Ok(lines.map(move |line| {
            line.map(|line| String::from_utf8_lossy(&line).into_owned()).map_err(failed("read", &path))
        }))
    }

    /// Keeps the effective configuration.
    pub fn write_config(&self, text: &str) -> Result<(), RunDirError> {
        self.replace(CONFIG, text.as_bytes())
    }

    /// Adds a line to the log of events. `line` has no line break.
    ///
    /// # Errors
    /// When it cannot be written. On a full disk it is held: it comes with the next [`Self::write_back`] that succeeds.
    pub fn append(&mut self, line: &str) -> Result<(), RunDirError> {
        let others_wait = !self.lines.is_empty();
        self.lines.push_str(line);
        self.lines.push('\n');
        if others_wait { Ok(()) } else { self.write_lines() }
    }

    /// Keeps a model as the last, and as the best if it is.
    ///
    /// # Errors
    /// When it cannot be written. On a full disk it is held, unless a newer one takes its place.
    pub fn save(&mut self, model: &NamedModel<'_>) -> Result<(), RunDirError> {
        let bytes = Bytes::from(to_safetensors(&model.inputs.beside(model.weights), &metadata(model))?);
        self.models.insert(MODEL, bytes.clone());
        // Where peers have come or gone other examples are measured: easier ones are no merit of a model.
        if let Some(Metrics { loss, num_examples, .. }) = model.metrics
            && self.best.is_none_or(|(best, over)| over != num_examples || loss < best)
        {
            self.models.insert(BEST, bytes);
            self.best = Some((loss, num_examples));
        }
        self.write_models()
    }

    /// Whether something is held that could not be written.
    pub fn is_behind(&self) -> bool {
        !self.lines.is_empty() || !self.models.is_empty()
    }

    /// Tries again to write what is held.
    pub fn write_back(&mut self) -> Result<(), RunDirError> {
        self.write_lines()?;
        self.write_models()
    }

    /// What will never be written is not held.
    fn write_lines(&mut self) -> Result<(), RunDirError> {
        let written = self.add_to_log().map_err(failed("write to", &self.dir.join(EVENTS)));
        if written.as_ref().err().is_none_or(|error| error.obstacle().is_none()) {
            self.lines.clear();
        }
        written
    }

    /// One write, so that a reader sees whole lines and a crash leaves them. A write that failed leaves none of its bytes.
    fn add_to_log(&mut self) -> std::io::Result<()> {
        if let Some(end) = self.cut_at {
            self.events.set_len(end)?;
            self.cut_at = None;
        }
        let end = self.events.metadata()?.len();
        self.events.write_all(self.lines.as_bytes()).inspect_err(|_| {
            self.cut_at = self.events.set_len(end).is_err().then_some(end);
        })
    }

    fn write_models(&mut self) -> Result<(), RunDirError> {
        while let Some((name, bytes)) = self.models.pop_first() {
            if let Err(error) = self.replace(name, &bytes) {
                match error.obstacle() {
                    Some(_) => drop(self.models.insert(name, bytes)),
                    None => self.models.clear(),
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), RunDirError> {
        let path = self.dir.join(name);
        // One name for all processes: what one leaves that is killed here is written over by the next.
        let temporary = self.dir.join(format!(".{name}.tmp"));
        let written = fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, &path));
        written.map_err(|source| {
            // Half a file is not to take the room that is lacking; the reason for the failure matters more.
            let _ = fs::remove_file(&temporary);
            RunDirError::Io { action: "write", path, source }
        })
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> RunDirError {
    let path = path.to_owned();
    move |source| RunDirError::Io { action, path, source }
}

/// A line that a crash cut short stays one line of its own.
fn open_events(path: &Path) -> std::io::Result<File> {
    let mut events = File::options().create(true).read(true).append(true).open(path)?;
    let mut last = [b'\n'];
    if events.metadata()?.len() > 0 {
        events.seek(SeekFrom::End(-1))?;
        events.read_exact(&mut last)?;
    }
    if last != *b"\n" {
        events.write_all(b"\n")?;
    }
    Ok(events)
}

/// A file that cannot be read is no best model: the next one takes its place.
fn best_loss(dir: &Path) -> Option<(f64, u64)> {
    let bytes = fs::read(dir.join(BEST)).ok()?;
    let (_, metadata) = from_safetensors(&bytes).ok()?;
    Some((metadata.get(VAL_LOSS)?.parse().ok()?, metadata.get(VAL_EXAMPLES)?.parse().ok()?))
}

fn metadata(model: &NamedModel<'_>) -> BTreeMap<String, String> {
    let known = [
        ("rodizio", env!("CARGO_PKG_VERSION").to_owned()),
        ("federation", model.federation.to_owned()),
        ("round", model.round.to_string()),
        ("digest", model.digest.to_string()),
    ];
    let measured = model.metrics.iter().flat_map(|metrics| {
        [
            (VAL_LOSS, metrics.loss.to_string()),
            ("val_accuracy", metrics.accuracy.to_string()),
            (VAL_EXAMPLES, metrics.num_examples.to_string()),
        ]
    });
    let names = [("features", &model.inputs.features), ("classes", &model.inputs.classes)];
    let named = names.into_iter().filter(|(_, names)| !names.is_empty());
    let named = named.map(|(key, names)| (key, serde_json::Value::from(names.clone()).to_string()));
    // The tensors of these names are rounded to F32, of which seconds since 1970 are 128 apart.
    let scales = model.inputs.scales.iter().flat_map(Scales::named);
    let scales = scales.map(|(key, numbers)| (key, serde_json::Value::from(numbers).to_string()));
    known.into_iter().chain(named).chain(scales).chain(measured).map(|(key, value)| (key.to_owned(), value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(value: f32) -> Weights {
        let tensor = TensorSpec { name: "fc1.weight".into(), shape: vec![2] };
        Weights::new(Arc::new(Layout { tensors: vec![tensor] }), vec![value; 2]).unwrap()
    }

    fn save(run_dir: &mut RunDir, round: u64, loss: Option<f64>) {
        save_measured(run_dir, round, loss.map(|loss| (loss, 4)));
    }

    fn save_measured(run_dir: &mut RunDir, round: u64, measured: Option<(f64, u64)>) {
        let metrics =
            measured.map(|(loss, num_examples)| Metrics { num_examples, loss, accuracy: 0.5, ..Metrics::default() });
        let digest = Digest::of(&round.to_le_bytes());
        let weights = weights(round as f32);
        run_dir
            .save(&NamedModel {
                weights: &weights,
                federation: "ward",
                round: Round(round),
                digest,
                metrics,
                inputs: &Inputs::default(),
            })
            .unwrap();
    }

    fn round_of(dir: &Path, name: &str) -> String {
        let (weights, metadata) = from_safetensors(&fs::read(dir.join(name)).unwrap()).unwrap();
        assert_eq!(weights.values()[0].to_string(), metadata["round"]);
        metadata["round"].clone()
    }

    #[test]
    fn the_last_and_the_best_model_are_kept_over_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let mut run_dir = RunDir::open(dir.path()).unwrap();
        save(&mut run_dir, 1, Some(0.5));
        save(&mut run_dir, 2, Some(0.3));
        save(&mut run_dir, 3, Some(0.4));
        assert_eq!((round_of(dir.path(), MODEL), round_of(dir.path(), BEST)), ("3".into(), "2".into()));
        let mut run_dir = RunDir::open(dir.path()).unwrap();
        save(&mut run_dir, 4, Some(0.35));
        save(&mut run_dir, 5, None);
        assert_eq!((round_of(dir.path(), MODEL), round_of(dir.path(), BEST)), ("5".into(), "2".into()));
        save(&mut run_dir, 6, Some(0.2));
        assert_eq!(round_of(dir.path(), BEST), "6");
        let names = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(names, 3, "a temporary file is left over");
    }

    #[test]
    fn the_best_model_is_not_one_that_was_measured_on_fewer_examples() {
        let dir = tempfile::tempdir().unwrap();
        let best = |round, loss, num_examples| {
            save_measured(&mut RunDir::open(dir.path()).unwrap(), round, Some((loss, num_examples)));
            round_of(dir.path(), BEST)
        };
        assert_eq!([best(1, 0.2, 8), best(2, 0.5, 12), best(3, 0.6, 12), best(4, 0.4, 12)], ["1", "2", "2", "4"]);
    }

    #[test]
    fn a_model_says_where_it_comes_from() {
        let dir = tempfile::tempdir().unwrap();
        save(&mut RunDir::open(dir.path()).unwrap(), 7, Some(0.25));
        let (_, metadata) = from_safetensors(&fs::read(dir.path().join(MODEL)).unwrap()).unwrap();
        let expected = [("federation", "ward"), ("round", "7"), ("val_loss", "0.25"), ("val_accuracy", "0.5")];
        for (key, value) in expected {
            assert_eq!(metadata[key], value);
        }
        assert_eq!(metadata["digest"].len(), 64);
        assert_eq!(metadata["rodizio"], env!("CARGO_PKG_VERSION"));
    }

    #[test]
    fn a_model_says_how_inputs_are_standardised_to_the_last_digit() {
        let dir = tempfile::tempdir().unwrap();
        let mut run_dir = RunDir::open(dir.path()).unwrap();
        let scales = Scales { mean: vec![1_700_000_012.345, 0.1], std: vec![2.5, 1.0], target: Some([7.0, 0.3]) };
        let inputs = Inputs { scales: Some(scales), ..Inputs::default() };
        let weights = Weights::new(Arc::new(Layout::default()), Vec::new()).unwrap();
        let (round, digest) = (Round(1), Digest::of(b"weights"));
        let model = NamedModel { weights: &weights, federation: "ward", round, digest, metrics: None, inputs: &inputs };
        run_dir.save(&model).unwrap();
        let (weights, metadata) = from_safetensors(&fs::read(dir.path().join(MODEL)).unwrap()).unwrap();
        let exact = ["input.mean", "input.std", "target.mean", "target.std"].map(|key| metadata[key].as_str());
        assert_eq!(exact, ["[1700000012.345,0.1]", "[2.5,1.0]", "[7.0]", "[0.3]"]);
        let rounded = [1_700_000_012.345, 0.1, 2.5, 1.0, 7.0, 0.3].map(|number: f64| number as f32);
        assert_eq!(weights.values(), rounded);
    }

    #[test]
    fn events_are_added_below_those_of_before_each_on_its_line() {
        let dir = tempfile::tempdir().unwrap();
        RunDir::open(dir.path()).unwrap().append("one").unwrap();
        let path = dir.path().join(EVENTS);
        fs::write(&path, "one\ncut sho").unwrap();
        let mut run_dir = RunDir::open(dir.path()).unwrap();
        run_dir.append("two").unwrap();
        let lines: Vec<String> = run_dir.earlier_events().unwrap().map(Result::unwrap).collect();
        assert_eq!(lines, ["one", "cut sho", "two"]);
    }

    /// A disk that is full: whatever is written to this file is refused.
    #[cfg(target_os = "linux")]
    #[test]
    fn what_a_full_disk_refuses_is_held_in_its_order() {
        let dir = tempfile::tempdir().unwrap();
        let mut run_dir = RunDir::open(dir.path()).unwrap();
        run_dir.append("one").unwrap();
        let full = File::options().append(true).open("/dev/full").unwrap();
        let log = std::mem::replace(&mut run_dir.events, full);
        assert_eq!(run_dir.append("two").unwrap_err().obstacle(), Some("the disk is full"));
        run_dir.append("three").unwrap();
        // That file, unlike one on a full disk, cannot be cut either.
        run_dir.cut_at = None;
        assert_eq!(run_dir.write_back().unwrap_err().obstacle(), Some("the disk is full"));
        (run_dir.events, run_dir.cut_at) = (log, None);
        run_dir.write_back().unwrap();
        assert!(!run_dir.is_behind());
        assert_eq!(fs::read_to_string(dir.path().join(EVENTS)).unwrap(), "one\ntwo\nthree\n");
    }

    #[test]
    fn the_directory_of_a_run_that_did_not_begin_is_removed_and_no_other() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("run");
        let open = || {
            let mut run_dir = RunDir::open(&path).unwrap();
            run_dir.write_config("rounds = 3").unwrap();
            run_dir.append("started").unwrap();
            run_dir
        };
        open().remove();
        assert!(!path.exists());
        let mut run_dir = open();
        save(&mut run_dir, 1, Some(0.5));
        run_dir.remove();
        assert!(path.join(MODEL).is_file());
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = RunDir::open(&file.join("run")).unwrap_err().to_string();
        assert!(error.starts_with("cannot create ") && error.contains("file/run"), "{error}");
        assert_eq!(RunDir::earlier_config(dir.path()).unwrap(), None);
    }
}
