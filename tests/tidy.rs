//! Reads the source and holds it to the floors of `src/lib.rs`: imports only point down; below floor 3 there is
//! no clock, no randomness, no IO, no thread and no hash map.

use std::fs;
use std::path::{Path, PathBuf};

/// Every module at the top of `src` and its floor.
const FLOORS: &[(&str, u32)] = &[
    ("types", 0),
    ("weights", 0),
    ("aggregation", 1),
    ("transfer", 1),
    ("protocol", 2),
    ("training", 3),
    ("transport", 3),
    ("broker", 3),
    ("journal", 3),
    ("packets", 3),
    ("buffers", 3),
    ("jobs", 4),
    ("intake", 4),
    ("node", 4),
    ("sim", 4),
    ("peer", 5),
    ("cluster", 5),
    ("bench", 5),
    ("events", 5),
    ("rundir", 5),
    ("config", 5),
    ("cli", 5),
];

/// What only floors 3 and up may use, and what it is.
const EFFECTS: &[(&str, &str)] = &[
    ("Instant::now", "a clock"),
    ("SystemTime", "a clock"),
    (".elapsed()", "a clock"),
    ("HashMap", "a map without order"),
    ("HashSet", "a set without order"),
    ("std::fs", "IO"),
    ("std::net", "IO"),
    ("std::io", "IO"),
    ("std::env", "IO"),
    ("println!", "IO"),
    ("std::thread", "a thread"),
    ("tokio::", "a thread"),
    ("Mutex", "a thread"),
    ("rand::", "randomness"),
    ("rand_chacha::", "randomness"),
];

/// Crates that one module wraps for all others; `bench` measures that module against the bare crate.
const WRAPPED: &[(&str, &[&str])] =
    &[("burn::", &["training"]), ("rumqttd::", &["broker", "bench"]), ("rumqttc::", &["transport", "bench"])];

fn floor(module: &str) -> Option<u32> {
    FLOORS.iter().find(|(name, _)| *name == module).map(|(_, floor)| *floor)
}

/// The code of a file: without comments and without its tests, which stand last.
fn code(source: &str) -> impl Iterator<Item = (usize, &str)> {
    let end = source.find("#[cfg(test)]\nmod tests").or_else(|| source.find("#[cfg(test)]\npub(crate) mod tests"));
    let code = &source[..end.unwrap_or(source.len())];
    code.lines().enumerate().map(|(at, line)| (at + 1, line.split("//").next().unwrap_or("")))
}

/// What is wrong with a file of `module`.
fn findings(module: &str, source: &str) -> Vec<String> {
    let Some(own) = floor(module) else { return vec![format!("{module} has no floor: add it to tests/tidy.rs")] };
    let mut findings = Vec::new();
    for (at, line) in code(source) {
        for (place, _) in line.match_indices("crate::") {
            let path = &line[place + "crate::".len()..];
            let named: String = path.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if floor(&named).is_some_and(|other| other > own) {
                findings.push(format!("line {at}: {module} (floor {own}) looks up to {named}"));
            }
        }
        if own < 3 {
            for (text, what) in EFFECTS.iter().filter(|(text, _)| line.contains(text)) {
                findings.push(format!("line {at}: {module} (floor {own}) uses {what}: {text}"));
            }
        }
        for (text, homes) in WRAPPED.iter().filter(|(text, homes)| line.contains(text) && !homes.contains(&module)) {
            findings.push(format!("line {at}: {text} belongs to {}", homes.join(", ")));
        }
    }
    findings
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|end| end == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn imports_point_down_and_effects_stay_up() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 40, "the source was not found");
    let mut wrong = Vec::new();
    for file in files {
        let inside = file.strip_prefix(&root).unwrap();
        let module = inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        if !["lib", "main"].contains(&module) {
            let source = fs::read_to_string(&file).unwrap();
            wrong.extend(
                findings(module, &source).into_iter().map(|finding| format!("{}: {finding}", inside.display())),
            );
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn an_upward_import_is_found() {
    let found = findings("transfer", "use crate::protocol::Round;\n");
    assert_eq!(found, ["line 1: transfer (floor 1) looks up to protocol"]);
    assert_eq!(findings("protocol", "let x = crate::node::run();").len(), 1);
    assert!(findings("node", "use crate::protocol::Peer;").is_empty());
}

#[test]
fn a_clock_below_floor_3_is_found() {
    assert_eq!(findings("protocol", "let now = Instant::now();").len(), 1);
    assert!(findings("node", "let now = Instant::now();").is_empty());
}

#[test]
fn a_hash_map_below_floor_3_is_found() {
    let source = "use std::collections::HashMap;";
    assert_eq!(findings("aggregation", source), ["line 1: aggregation (floor 1) uses a map without order: HashMap"]);
    assert!(findings("broker", source).is_empty());
}

#[test]
fn a_crate_outside_its_module_is_found() {
    assert_eq!(findings("node", "use burn::tensor::Tensor;"), ["line 1: burn:: belongs to training"]);
}

#[test]
fn comments_and_tests_are_not_code() {
    assert!(findings("types", "// HashMap\n#[cfg(test)]\nmod tests { use std::fs; }").is_empty());
}

#[test]
fn a_new_module_must_be_given_a_floor() {
    assert_eq!(findings("gossip", "").len(), 1);
}
