//! What codecs save and cost in real runs: `make codecs` prints the table that the README shows.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

/// Codecs of updates and of models, and the share that `topk` sends.
const CODECS: [(&str, &str, &str); 9] = [
    ("f32", "f32", ""),
    ("f16", "f32", ""),
    ("f16", "f16", ""),
    ("bf16", "bf16", ""),
    ("int8", "f32", ""),
    ("int8", "int8", ""),
    ("topk", "f32", "0.01"),
    ("topk", "int8", "0.01"),
    ("topk", "int8", "0.05"),
];

const ROUNDS: u64 = 10;

/// What is trained, and by which arguments.
struct Task {
    name: &'static str,
    args: Vec<String>,
}

fn tasks() -> Vec<Task> {
    let mut tasks = vec![Task { name: "digits, `mlp`", args: Vec::new() }];
    let mnist = std::env::var_os("MNIST").filter(|dir| !dir.is_empty()).map(PathBuf::from);
    match mnist.filter(|dir| dir.is_dir()) {
        Some(dir) => {
            let data = format!("idx:{}", dir.display());
            let args = ["--data", &data, "--model", "cnn", "--local-epochs", "1", "--learning-rate", "0.02"];
            tasks.push(Task { name: "MNIST, `cnn`", args: args.map(str::to_owned).to_vec() });
        }
        None => eprintln!("without a CNN: MNIST names no directory of its images"),
    }
    tasks
}

/// Bytes a round, accuracy after the last one and seconds of one run.
fn run(task: &Task, (codec, model_codec, ratio): (&str, &str, &str), seed: u64) -> [f64; 3] {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_rodizio"));
    command.args(["run", "--json", "--quiet", "--peers", "5", "--codec", codec, "--model-codec", model_codec]);
    command
        .args(["--rounds", &ROUNDS.to_string(), "--seed", &seed.to_string(), "--run-dir"])
        .arg(dir.path().join("run"));
    command.args(&task.args);
    if !ratio.is_empty() {
        command.args(["--topk-ratio", ratio]);
    }
    let output = command.output().expect("cargo built the program before this test");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}, {codec} and {model_codec}: {stderr}", task.name);
    let summary: Value = serde_json::from_slice(&output.stdout).expect("one JSON document");
    assert_eq!(summary["rounds"].as_u64(), Some(ROUNDS), "{summary}");
    ["bytes_sent", "val_accuracy", "seconds"].map(|key| summary[key].as_f64().expect(key))
}

fn mean(runs: &[[f64; 3]], index: usize) -> f64 {
    runs.iter().map(|run| run[index]).sum::<f64>() / runs.len() as f64
}

/// `CODEC=int8` runs the rows of one codec of updates, `SEEDS=5` takes means, `MNIST=DIR` adds a CNN.
#[test]
#[ignore = "it takes minutes and prints a table: make codecs"]
fn every_codec_trains_and_the_table_says_what_it_costs() {
    let chosen = std::env::var("CODEC").unwrap_or_default();
    let seeds: u64 = std::env::var("SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(1);
    println!("| what | `codec` | `model_codec` | bytes a round | accuracy after {ROUNDS} rounds | seconds |");
    println!("|---|---|---|---|---|---|");
    for task in tasks() {
        for codecs in CODECS.into_iter().filter(|codecs| chosen.is_empty() || codecs.0 == chosen) {
            let runs: Vec<_> = (42..42 + seeds.max(1)).map(|seed| run(&task, codecs, seed)).collect();
            let [bytes, accuracy, seconds] = [0, 1, 2].map(|index| mean(&runs, index));
            let (codec, model_codec, ratio) = codecs;
            let share = if ratio.is_empty() { "" } else { ", " };
            println!(
                "| {} | `{codec}`{share}{ratio} | `{model_codec}` | {:.1} kB | {accuracy:.3} | {seconds:.1} |",
                task.name,
                bytes / 1000.0 / ROUNDS as f64
            );
            // One class in ten is right by chance.
            assert!(accuracy > 0.5, "{}, {codec} and {model_codec}: {accuracy}", task.name);
        }
    }
}
