//! A trainer that is another program, in any language. `configs/trainer_numpy.py` is one.
//!
//! The program is started once and then asked, one JSON object a line on its standard input; it answers each with one
//! on its standard output. Weights go through safetensors files of `F32` tensors, whose paths the questions name:
//!
//! | question | answer |
//! |---|---|
//! | `{"task":"start", "peer", "part", "seed", "model"}`: load the data (`part` is `[index, of]`, counted from 1, when one machine plays all peers, else `null`) and write the initial weights to the file `model`, the same at every peer of one `seed` | `{"num_examples"}`: how many are there to train on |
//! | `{"task":"evaluate", "model"}`: measure these weights on held-out examples | `{"num_examples", "loss", "accuracy"}` |
//! | `{"task":"train", "round", "seed", "model", "update", "local_epochs", "batch_size", "learning_rate"}`: train from `model` and write the result to `update` | `{"loss", "accuracy"}` |
//!
//! While it works it may print `{"done", "total"}` as often as it likes: that shows progress and that it lives. Any answer
//! may be `{"error": "why"}` instead. What it writes to its standard error is logged.
//!
//! A program that crashes, keeps silent for too long or answers nonsense costs its peer the update of the round, and is
//! started again for the next question.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{OnProgress, Progress, TrainError, Trainer, check_layout, export};
use crate::types::{Metrics, PeerId, Round};
use crate::weights::{Layout, Weights};

/// The longest line that a program may print.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// How often whoever waits for the program looks whether training was stopped.
const LOOK_AROUND: Duration = Duration::from_millis(100);

/// How long a program may take to end by itself once its input is closed.
const FAREWELL_MAX: Duration = Duration::from_secs(2);

/// What an external program needs to know.
#[derive(Clone, Debug)]
pub struct ExternalConfig {
    /// The program and its arguments, split as a shell would. No shell runs it.
    pub command: String,
    /// How long it may be silent, neither answering nor telling of progress.
    pub timeout: Duration,
    /// Where weights are put for it.
    pub dir: PathBuf,
    /// Which part of the data is this peer's, counted from 1, of how many, when one machine plays all peers.
    pub part: Option<(usize, usize)>,
    /// What everything random is to be drawn from.
    pub seed: u64,
    /// Passes over the data in a round.
    pub local_epochs: u32,
    /// Examples a step.
    pub batch_size: usize,
    /// The length of a step.
    pub learning_rate: f64,
}

/// Trains by asking another program.
#[derive(Debug)]
pub struct ExternalTrainer {
    config: ExternalConfig,
    peer: PeerId,
    program: Option<Program>,
    layout: Arc<Layout>,
    weights: Weights,
    num_examples: u64,
}

#[derive(Serialize)]
#[serde(tag = "task", rename_all = "lowercase")]
enum Question<'a> {
    Start {
        peer: &'a PeerId,
        part: Option<(usize, usize)>,
        seed: u64,
        model: &'a Path,
    },
    Evaluate {
        model: &'a Path,
    },
    Train {
        round: Round,
        seed: u64,
        model: &'a Path,
        update: &'a Path,
        local_epochs: u32,
        batch_size: usize,
        learning_rate: f64,
    },
}

/// Everything a program may say; what is missing is asked for by whoever needs it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Answer {
    error: Option<String>,
    done: Option<u64>,
    total: Option<u64>,
    num_examples: Option<u64>,
    loss: Option<f64>,
    accuracy: Option<f64>,
}

impl Answer {
    fn metrics(&self, num_examples: u64) -> Result<Metrics, TrainError> {
        let loss = self.loss.ok_or_else(|| failed("answered without \"loss\""))?;
        let num_examples = self.num_examples.unwrap_or(num_examples);
        let accuracy = self.accuracy.unwrap_or_default();
        Ok(Metrics { num_examples, loss, accuracy, ..Metrics::default() })
    }
}

fn failed(what: impl std::fmt::Display) -> TrainError {
    TrainError::Failed(format!("the trainer program {what}"))
}

impl ExternalTrainer {
    /// Starts the program and has it load its data and make the initial weights.
    pub fn start(config: ExternalConfig, peer: PeerId) -> Result<Self, TrainError> {
        fs::create_dir_all(&config.dir)
            .map_err(|error| TrainError::Failed(format!("cannot make {}: {error}", config.dir.display())))?;
        let (program, num_examples, weights) = Self::launch(&config, &peer)?;
        Ok(Self { layout: weights.layout().clone(), weights, config, peer, program: Some(program), num_examples })
    }

    fn launch(config: &ExternalConfig, peer: &PeerId) -> Result<(Program, u64, Weights), TrainError> {
        let mut program = Program::spawn(&config.command)?;
        let model = config.dir.join("initial.safetensors");
        let question = Question::Start { peer, part: config.part, seed: config.seed, model: &model };
        let answer = program.ask(&question, config.timeout, &mut |_| ControlFlow::Continue(()))?;
        let num_examples = answer.num_examples.ok_or_else(|| failed("answered \"start\" without \"num_examples\""))?;
        if num_examples == 0 {
            return Err(failed("has no example to train on"));
        }
        Ok((program, num_examples, take_file(&model)?))
    }

    /// Asks, starting the program again if it has ended. One that fails is ended: what it would say next is unknown.
    fn ask(&mut self, question: &Question<'_>, on_progress: &mut OnProgress<'_>) -> Result<Answer, TrainError> {
        let mut program = match self.program.take() {
            Some(program) => program,
            None => Self::launch(&self.config, &self.peer)?.0,
        };
        let answer = program.ask(question, self.config.timeout, on_progress)?;
        self.program = Some(program);
        Ok(answer)
    }

    fn give_weights(&self) -> Result<PathBuf, TrainError> {
        let path = self.config.dir.join("model.safetensors");
        let bytes = export::to_safetensors(&self.weights, &BTreeMap::new())
            .map_err(|error| TrainError::Failed(error.to_string()))?;
        fs::write(&path, bytes).map_err(|error| cannot("write", &path, &error))?;
        Ok(path)
    }
}

fn cannot(what: &str, path: &Path, error: &io::Error) -> TrainError {
    TrainError::Failed(format!("cannot {what} {}: {error}", path.display()))
}

/// Reads weights that the program wrote, and removes their file: an old one is not to be taken for a new one.
fn take_file(path: &Path) -> Result<Weights, TrainError> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(failed(format_args!("answered, but wrote no {}", path.display())));
        }
        read => read.map_err(|error| cannot("read", path, &error))?,
    };
    fs::remove_file(path).map_err(|error| cannot("remove", path, &error))?;
    let (weights, _) = export::from_safetensors(&bytes)
        .map_err(|error| failed(format_args!("wrote a file that cannot be used: {}: {error}", path.display())))?;
    Ok(weights)
}

impl Trainer for ExternalTrainer {
    fn layout(&self) -> Arc<Layout> {
        self.layout.clone()
    }

    fn num_examples(&self) -> u64 {
        self.num_examples
    }

    fn weights(&self) -> Weights {
        self.weights.clone()
    }

    fn set_weights(&mut self, weights: &Weights) -> Result<(), TrainError> {
        self.swap_weights(&mut weights.clone())
    }

    fn take_weights(&mut self, weights: &mut Weights) {
        std::mem::swap(&mut self.weights, weights);
    }

    fn swap_weights(&mut self, weights: &mut Weights) -> Result<(), TrainError> {
        check_layout(&self.layout, weights.layout())?;
        std::mem::swap(&mut self.weights, weights);
        Ok(())
    }

    fn train(&mut self, round: Round, on_progress: &mut OnProgress<'_>) -> Result<Metrics, TrainError> {
        let model = self.give_weights()?;
        let update = self.config.dir.join("update.safetensors");
        let ExternalConfig { seed, local_epochs, batch_size, learning_rate, .. } = self.config;
        let (model, update) = (model.as_path(), update.as_path());
        let answer = self.ask(
            &Question::Train { round, seed, model, update, local_epochs, batch_size, learning_rate },
            on_progress,
        )?;
        let weights = take_file(update)?;
        check_layout(&self.layout, weights.layout())?;
        if let Some(tensor) = weights.first_non_finite() {
            return Err(failed(format_args!("returned values of {tensor} that are not finite")));
        }
        let metrics = answer.metrics(self.num_examples)?;
        self.weights = weights;
        Ok(metrics)
    }

    fn evaluate(&mut self) -> Result<Metrics, TrainError> {
        let model = self.give_weights()?;
        let answer = self.ask(&Question::Evaluate { model: &model }, &mut |_| ControlFlow::Continue(()))?;
        answer.metrics(0)
    }
}

/// A program that runs. Dropping it ends it.
#[derive(Debug)]
struct Program {
    child: Child,
    /// Closed to tell the program to end.
    questions: Option<ChildStdin>,
    answers: Receiver<io::Result<String>>,
    last_words: Arc<Mutex<String>>,
    /// Nothing comes of it; it is cut when the program has said its last words.
    hushed: Receiver<()>,
    progress: Progress,
}

impl Program {
    fn spawn(command: &str) -> Result<Self, TrainError> {
        let words = shlex::split(command).filter(|words| !words.is_empty());
        let cannot = |program: &str, why: String| TrainError::Program { program: program.to_owned(), why };
        let words =
            words.ok_or_else(|| cannot(command, "it is no command: a quote is open, or nothing is in it".into()))?;
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| cannot(&words[0], error.to_string()))?;
        let (questions, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let last_words = Arc::new(Mutex::new(String::new()));
        let (sender, answers) = mpsc::channel();
        let (speaks, hushed) = mpsc::channel();
        // Both end with the program.
        if let Some(stdout) = stdout {
            thread::spawn(move || read_lines(stdout, |line| sender.send(line).is_ok()));
        }
        if let Some(stderr) = stderr {
            let (last_words, pid) = (last_words.clone(), child.id());
            thread::spawn(move || {
                let _speaks: mpsc::Sender<()> = speaks;
                read_lines(stderr, |line| {
                    let Ok(line) = line else { return false };
                    tracing::info!(pid, "trainer program: {line}");
                    if !line.trim().is_empty() {
                        *last_words.lock().unwrap_or_else(PoisonError::into_inner) = line;
                    }
                    true
                });
            });
        }
        let progress = Progress { done: 0, total: 1 };
        Ok(Self { child, questions, answers, last_words, hushed, progress })
    }

    fn ask(
        &mut self,
        question: &Question<'_>,
        patience: Duration,
        on_progress: &mut OnProgress<'_>,
    ) -> Result<Answer, TrainError> {
        let line = serde_json::to_string(question).map_err(|error| TrainError::Failed(error.to_string()))? + "\n";
        let questions = self.questions.as_mut().expect("it is closed only when the program is dropped");
        if questions.write_all(line.as_bytes()).and_then(|()| questions.flush()).is_err() {
            return Err(self.crashed());
        }
        self.progress = Progress { done: 0, total: 1 };
        let mut heard = Instant::now();
        loop {
            match self.answers.recv_timeout(LOOK_AROUND) {
                Ok(Ok(line)) => {
                    let answer = read_answer(&line)?;
                    let Some(done) = answer.done else { return Ok(answer) };
                    heard = Instant::now();
                    self.progress = Progress { done, total: answer.total.unwrap_or(done).max(1) };
                }
                Ok(Err(error)) => return Err(failed(format_args!("cannot be read: {error}"))),
                Err(RecvTimeoutError::Timeout) if heard.elapsed() >= patience => {
                    let patience = humantime::format_duration(patience);
                    let hint = "raise trainer_timeout, or have it print {\"done\": 1, \"total\": 10} as it goes";
                    return Err(failed(format_args!("said nothing for {patience}: {hint}")));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(self.crashed()),
            }
            if on_progress(self.progress).is_break() {
                return Err(TrainError::Stopped);
            }
        }
    }

    /// It closed its output or its input: it has ended, or is about to.
    fn crashed(&mut self) -> TrainError {
        // What it says last tells why. Not for ever: a program that it started may hold on to its standard error.
        let _ = self.hushed.recv_timeout(FAREWELL_MAX);
        let _ = self.child.kill();
        let status = match self.child.wait() {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        let last_words = self.last_words.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let why = if last_words.is_empty() { String::new() } else { format!(": {last_words}") };
        failed(format_args!("ended without an answer ({status}){why}"))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.questions = None;
        // Its output ends when it does.
        let ends = Instant::now() + FAREWELL_MAX;
        while let Some(left) = ends.checked_duration_since(Instant::now()) {
            if let Err(RecvTimeoutError::Disconnected) = self.answers.recv_timeout(left) {
                break;
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_answer(line: &str) -> Result<Answer, TrainError> {
    let answer: Answer = serde_json::from_str(line).map_err(|error| {
        let start: String = line.chars().take(80).collect();
        let hint = "its standard output is for answers, one JSON object a line; NaN is no number in JSON";
        failed(format_args!("answered {start:?}, which cannot be read ({error}): {hint}"))
    })?;
    match answer.error {
        Some(why) => Err(failed(format_args!("says: {why}"))),
        None => Ok(answer),
    }
}

/// Hands on every line until there are no more or nobody wants them.
fn read_lines(from: impl Read, mut take: impl FnMut(io::Result<String>) -> bool) {
    let mut from = BufReader::new(from);
    loop {
        let mut line = Vec::new();
        let line = match from.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
            Ok(0) => return,
            Ok(_) => Ok(String::from_utf8_lossy(&line).trim_end().to_owned()),
            Err(error) => Err(error),
        };
        let ended = line.is_err();
        if !take(line) || ended {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It learns `w += 1` a round, and misbehaves in round 2 as its argument says.
    const PROGRAM: &str = r#"
import json, os, struct, sys, time
fault = sys.argv[1]
def write(path, values, name="w"):
    head = json.dumps({name: {"dtype": "F32", "shape": [len(values)], "data_offsets": [0, 4 * len(values)]}}).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head + struct.pack("<%df" % len(values), *values))
def read(path):
    data = open(path, "rb").read()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    return list(struct.unpack("<%df" % ((len(data) - start) // 4), data[start:]))
for line in sys.stdin:
    ask = json.loads(line)
    task, answer = ask["task"], {"loss": 0.5, "accuracy": 0.25}
    if task == "start":
        if fault == "no start": sys.exit("no data here")
        write(ask["model"], [0.0, 10.0])
        answer = {"num_examples": 3}
    elif task == "evaluate":
        answer = {"num_examples": 7, "loss": read(ask["model"])[0]}
    else:
        values = [w + 1 for w in read(ask["model"])]
        bad = ask["round"] == 2
        if bad and fault == "crash":
            print("out of memory", file=sys.stderr, flush=True)
            os._exit(3)
        if bad and fault == "hang":
            sys.stdin.read()
        if bad and fault == "shape": values = [1.0]
        if bad and fault == "nan": values = [float("nan"), 1.0]
        print(json.dumps({"done": 1, "total": 2}), flush=True)
        if not (bad and fault == "no file"): write(ask["update"], values)
        if bad and fault == "nonsense": answer = "done!"
        if bad and fault == "nan loss": answer["loss"] = float("nan")
        if bad and fault == "says": answer = {"error": "the disk is full"}
    print(json.dumps(answer), flush=True)
"#;

    /// How long a program may be silent that does not hang, however busy the machine is.
    const PATIENCE: Duration = Duration::from_secs(60);

    fn has_python() -> bool {
        let found = Command::new("python3").arg("--version").output().is_ok();
        if !found {
            eprintln!("skipped: there is no python3");
        }
        found
    }

    fn start(dir: &Path, fault: &str) -> Result<ExternalTrainer, TrainError> {
        let script = dir.join("program.py");
        fs::write(&script, PROGRAM).unwrap();
        let config = ExternalConfig {
            command: format!("python3 '{}' '{fault}'", script.display()),
            timeout: PATIENCE,
            dir: dir.join("weights"),
            part: Some((1, 2)),
            seed: 42,
            local_epochs: 5,
            batch_size: 16,
            learning_rate: 0.1,
        };
        ExternalTrainer::start(config, PeerId::new("a").unwrap())
    }

    fn go_on(_: Progress) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    #[test]
    fn a_program_trains_and_evaluates() {
        if !has_python() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut trainer = start(dir.path(), "none").unwrap();
        assert_eq!((trainer.num_examples(), trainer.weights().values()), (3, &[0.0, 10.0][..]));
        let mut seen = Vec::new();
        let metrics = trainer
            .train(Round(1), &mut |progress| {
                seen.push(progress);
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!((metrics.num_examples, metrics.loss, metrics.accuracy), (3, 0.5, 0.25));
        assert_eq!(seen.last(), Some(&Progress { done: 1, total: 2 }));
        assert_eq!(trainer.weights().values(), [1.0, 11.0]);
        let metrics = trainer.evaluate().unwrap();
        assert_eq!((metrics.num_examples, metrics.loss), (7, 1.0));
    }

    #[test]
    fn a_fault_costs_one_round_and_says_what_it_was() {
        if !has_python() {
            return;
        }
        let faults = [
            ("crash", "ended without an answer (exit status: 3): out of memory"),
            ("hang", "said nothing for 1s: raise trainer_timeout"),
            ("shape", "it has w [1] where this one has w [2]"),
            ("nan", "returned values of w that are not finite"),
            ("no file", "answered, but wrote no "),
            ("nonsense", "answered \"\\\"done!\\\"\", which cannot be read"),
            ("nan loss", "NaN is no number in JSON"),
            ("says", "says: the disk is full"),
        ];
        for (fault, expected) in faults {
            let dir = tempfile::tempdir().unwrap();
            let mut trainer = start(dir.path(), fault).unwrap();
            trainer.train(Round(1), &mut go_on).unwrap();
            if fault == "hang" {
                trainer.config.timeout = Duration::from_secs(1);
            }
            let error = trainer.train(Round(2), &mut go_on).unwrap_err().to_string();
            trainer.config.timeout = PATIENCE;
            assert!(error.contains(expected), "{fault}: {error}");
            assert_eq!(trainer.weights().values(), [1.0, 11.0], "{fault}");
            trainer.train(Round(3), &mut go_on).unwrap();
            assert_eq!(trainer.weights().values(), [2.0, 12.0], "{fault}");
        }
    }

    #[test]
    fn training_that_is_stopped_does_not_wait_for_the_program() {
        if !has_python() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut trainer = start(dir.path(), "none").unwrap();
        let stopped = trainer.train(Round(1), &mut |_| ControlFlow::Break(()));
        assert!(matches!(stopped, Err(TrainError::Stopped)));
        trainer.train(Round(2), &mut go_on).unwrap();
    }

    #[test]
    fn what_cannot_be_started_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let config = |command: &str| ExternalConfig {
            command: command.into(),
            timeout: Duration::from_secs(60),
            dir: dir.path().to_owned(),
            part: None,
            seed: 1,
            local_epochs: 1,
            batch_size: 1,
            learning_rate: 0.1,
        };
        let refused =
            |command| ExternalTrainer::start(config(command), PeerId::new("a").unwrap()).unwrap_err().to_string();
        assert!(refused("no-such-program --x").contains("cannot start the trainer program \"no-such-program\""));
        assert!(refused("'open").starts_with("cannot start the trainer program \"'open\": it is no command"));
        assert!(refused("").starts_with("cannot start the trainer program \"\": it is no command"));
        if has_python() {
            let error = start(dir.path(), "no start").unwrap_err().to_string();
            assert_eq!(error, "the trainer program ended without an answer (exit status: 1): no data here");
        }
    }
}
