//! How fast each backend trains a model, and PyTorch beside them where it is installed.

use std::process::Command;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::training::cores::Cores;
use crate::training::{Backend, BurnTrainer, Dataset, Model, Targets, TrainError, Trainer, TrainingConfig};
use crate::types::{PeerId, Round};

/// The variable that names the interpreter of a virtual environment with torch.
pub const PYTHON: &str = "RODIZIO_PYTHON";

/// What PyTorch runs: the same models, measured in the same way.
const TORCH_MODELS: &str = include_str!("torch_models.py");

/// Steps between two looks at the clock.
const STEPS: u64 = 5;

/// What to measure.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// The model; its sizes are the defaults, but for an `mlp` with one hidden layer of 256 and a `char-lstm` of 128.
    pub model: Model,
    /// Examples in a step.
    pub batch_size: usize,
    /// On how many threads; PyTorch has one.
    pub threads: usize,
    /// How long each is measured, in seconds; a first step is always finished.
    pub seconds: f64,
    /// The interpreter that may have torch.
    pub python: String,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct TrainResult {
    /// The model.
    pub model: Model,
    /// How many values it has.
    pub values: usize,
    /// Examples in a step.
    pub batch_size: usize,
    /// The shape of an example.
    pub shape: Vec<usize>,
    /// Of each backend.
    pub backends: Vec<BackendSpeed>,
    /// Of PyTorch, on one thread; none if the interpreter has no torch.
    pub torch: Option<TorchSpeed>,
}

/// How fast a backend is.
#[derive(Clone, Debug, Serialize)]
pub struct BackendSpeed {
    /// Which.
    pub backend: Backend,
    /// Examples a second.
    pub samples_per_s: f64,
    /// That speed by PyTorch's.
    pub to_torch: Option<f64>,
}

/// How fast PyTorch is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TorchSpeed {
    /// Examples a second.
    pub samples_per_s: f64,
    /// Its version.
    pub version: String,
}

/// Measures each backend and then PyTorch, on examples of 28 × 28 pixels in 10 classes, or on texts of 64 out of 80
/// tokens.
pub fn run(options: &TrainOptions, progress: &mut dyn FnMut(&str)) -> Result<TrainResult, TrainError> {
    let (shape, outputs) = match options.model {
        Model::CharLstm => (vec![64], 80),
        _ => (vec![1, 28, 28], 10),
    };
    let hidden = match options.model {
        Model::Mlp => vec![256],
        Model::CharLstm => vec![128],
        _ => TrainingConfig::default().hidden,
    };
    let config = TrainingConfig {
        model: options.model,
        hidden,
        batch_size: options.batch_size,
        learning_rate: 0.01,
        local_steps: Some(STEPS),
        ..TrainingConfig::default()
    };
    let data = synthetic(&shape, outputs, options);
    let (mut backends, mut values) = (Vec::new(), 0);
    for &backend in Backend::ALL {
        progress(&format!("{} on {backend}", options.model));
        let config = TrainingConfig { backend, ..config.clone() };
        let peer = PeerId::new("bench").expect("a word is a name");
        let mut trainer = BurnTrainer::new(config, peer, data.clone(), data.subset(&[]))?;
        values = trainer.layout().len();
        let samples_per_s = Cores::at_once(options.threads).run(|| speed(&mut trainer, options))?;
        backends.push(BackendSpeed { backend, samples_per_s, to_torch: None });
    }
    progress(&format!("{} with PyTorch, if {} has it", options.model, options.python));
    let torch = torch_speed(options, &config, &shape, outputs, data.len());
    for of_backend in &mut backends {
        of_backend.to_torch = torch.as_ref().map(|torch| of_backend.samples_per_s / torch.samples_per_s);
    }
    Ok(TrainResult { model: options.model, values, batch_size: options.batch_size, shape, backends, torch })
}

/// Enough examples for some batches. What they hold is of no matter to the speed.
fn synthetic(shape: &[usize], outputs: usize, options: &TrainOptions) -> Dataset {
    let examples = 8 * options.batch_size;
    let num_features: usize = shape.iter().product();
    let scattered = |index: usize| index.wrapping_mul(7919) % 1009;
    let names = (0..outputs).map(|name| name.to_string()).collect();
    let labels = |count: usize| (0..count).map(|index| (scattered(index) % outputs) as u32).collect();
    let values = 0..examples * num_features;
    let (features, targets) = if options.model == Model::CharLstm {
        let tokens = values.map(|index| (scattered(index) % outputs) as f32).collect();
        (tokens, Targets::Steps { labels: labels(examples * num_features), names })
    } else {
        let pixels = values.map(|index| scattered(index) as f32 / 1009.0).collect();
        (pixels, Targets::Classes { labels: labels(examples), names })
    };
    Dataset::of(features, shape, targets).expect("labels are below the number of names, and all examples whole")
}

fn speed(trainer: &mut BurnTrainer, options: &TrainOptions) -> Result<f64, TrainError> {
    let go_on = &mut |_| std::ops::ControlFlow::Continue(());
    trainer.train(Round(1), go_on)?;
    let (started, mut rounds) = (Instant::now(), 0);
    while rounds == 0 || started.elapsed().as_secs_f64() < options.seconds {
        rounds += 1;
        trainer.train(Round(1 + rounds), go_on)?;
    }
    Ok((rounds * STEPS) as f64 * options.batch_size as f64 / started.elapsed().as_secs_f64())
}

fn torch_speed(
    options: &TrainOptions,
    config: &TrainingConfig,
    shape: &[usize],
    outputs: usize,
    examples: usize,
) -> Option<TorchSpeed> {
    let spec = json!({
        "model": config.model, "shape": shape, "outputs": outputs, "hidden": config.hidden, "channels": config.channels,
        "norm": config.norm, "embedding_dim": config.embedding_dim, "batch_size": config.batch_size,
        "learning_rate": config.learning_rate, "momentum": config.momentum, "seconds": options.seconds,
        "examples": examples,
    });
    let mut command = Command::new(&options.python);
    command.args(["-c", TORCH_MODELS, "speed", &spec.to_string()]);
    let output = command.env("OMP_NUM_THREADS", "1").output().ok()?;
    serde_json::from_slice(&output.stdout).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_backend_is_measured_and_a_missing_pytorch_is_none() {
        let python = "no-such-python".into();
        let options = TrainOptions { model: Model::Linear, batch_size: 2, threads: 1, seconds: 0.0, python };
        let result = run(&options, &mut |_| {}).unwrap();
        assert_eq!(result.backends.len(), Backend::ALL.len());
        assert!(result.backends.iter().all(|speed| speed.samples_per_s > 0.0 && speed.to_torch.is_none()));
        assert_eq!((result.values, result.torch.is_none()), (7850, true));
    }
}
