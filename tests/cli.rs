//! The program from outside: what it prints where, and how it exits.

use std::path::Path;
use std::process::{Command, Output};

use rodizio::config::KEYS;

const SUBCOMMANDS: [&str; 5] = ["run", "broker", "join", "sim", "config"];

/// Runs the program with these arguments and variables, and no others.
fn rodizio(args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rodizio"));
    command.args(args).env_clear().envs(env.iter().copied());
    command.output().expect("cargo built the program before this test")
}

fn stdout(output: &Output) -> &str {
    str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    str::from_utf8(&output.stderr).unwrap()
}

/// What `rodizio` prints for a command that must succeed.
fn printed(args: &[&str], env: &[(&str, &str)]) -> String {
    let output = rodizio(args, env);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
    assert_eq!(stderr(&output), "", "{args:?}");
    stdout(&output).to_owned()
}

/// Error and hint of a command that must be refused as a mistake of usage or configuration.
fn refused(args: &[&str], env: &[(&str, &str)]) -> String {
    let output = rodizio(args, env);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
    assert_eq!(stdout(&output), "", "{args:?}");
    let text = stderr(&output).to_owned();
    let lines: Vec<_> = text.lines().collect();
    assert!(matches!(lines[..], [error, hint] if error.starts_with("error: ") && hint.starts_with("hint: ")), "{text}");
    assert!(lines.iter().all(|line| !line.ends_with('.')), "a final period: {text}");
    text
}

fn write(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn the_main_help_lists_the_subcommands_and_the_exit_codes() {
    let help = printed(&["--help"], &[]);
    for subcommand in SUBCOMMANDS {
        assert!(help.contains(&format!("\n  {subcommand} ")), "{subcommand} is missing:\n{help}");
    }
    for part in ["Exit codes: 0 finished", "RODIZIO_BATCH_SIZE", "Examples:"] {
        assert!(help.contains(part), "{part} is missing:\n{help}");
    }
}

#[test]
fn the_help_of_a_subcommand_mentions_what_it_takes() {
    let expected: [(&str, &[&str]); 5] = [
        (
            "run",
            &["--peers", "--processes", "--broker", "--json", "-q, --quiet", "-v, --verbose", "--run-dir", "Examples:"],
        ),
        ("broker", &["--listen", "--config", "--chunk-bytes", "Examples:"]),
        ("join", &["--broker", "--peer", "--host-broker", "--state-dir", "--run-dir", "--json", "Examples:"]),
        ("sim", &["--seed ", "--seeds", "--scenario", "--peers", "--verbose", "Examples:"]),
        ("config", &["--check", "--json", "--config", "Examples:"]),
    ];
    for (subcommand, flags) in expected {
        let help = printed(&[subcommand, "--help"], &[]);
        for flag in flags {
            assert!(help.contains(flag), "{subcommand} --help lacks {flag}:\n{help}");
        }
    }
}

#[test]
fn every_key_is_in_the_help_with_its_default() {
    let help = printed(&["config", "--help"], &[]);
    for key in KEYS {
        assert!(help.contains(&format!("--{}", key.flag())), "--{} is missing", key.flag());
    }
    assert!(help.contains("[default: 512KiB]") && help.contains("(sgd, adam)"));
}

#[test]
fn the_version_is_that_of_the_package() {
    assert_eq!(printed(&["--version"], &[]), concat!("rodizio ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn without_a_subcommand_the_help_is_an_error() {
    let output = rodizio(&[], &[]);
    assert_eq!((output.status.code(), stdout(&output)), (Some(2), ""));
    assert!(stderr(&output).contains("Usage: rodizio"));
}

#[test]
fn wrong_flags_are_refused_with_what_to_do() {
    assert!(refused(&["run", "--batchsize", "3"], &[]).contains("'--batch-size'"));
    assert!(refused(&["joni"], &[]).contains("'join'"));
    assert!(refused(&["sim", "--seeds", "0"], &[]).contains("--seeds"));
    assert!(refused(&["run", "-q", "-v"], &[]).contains("hint: see `rodizio run --help`"));
}

#[test]
fn an_unknown_key_is_refused_with_the_nearest_wherever_it_stands() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "lab.toml", "rounds = 3\nbatchsize = 3\n");
    let text = refused(&["config", "--config", &file], &[]);
    assert_eq!(text, format!("error: unknown key \"batchsize\" ({file}, line 2)\nhint: did you mean batch_size?\n"));
    let text = refused(&["config"], &[("RODIZIO_BATCHSIZE", "3")]);
    assert!(text.ends_with("hint: did you mean RODIZIO_BATCH_SIZE?\n"), "{text}");
}

#[test]
fn a_bad_value_is_refused_with_its_source_and_what_is_allowed() {
    let text = refused(&["run", "--batch-size", "0"], &[]);
    let expected = "error: batch_size cannot be \"0\" (flag --batch-size)\n\
                    hint: batch_size takes a whole number, 1 to 1000000\n";
    assert_eq!(text, expected);
    let text = refused(&["join"], &[("RODIZIO_ELECTION_TIMEOUT", "10ms")]);
    assert!(text.contains("(variable RODIZIO_ELECTION_TIMEOUT)") && text.contains("from 50ms to 10m"), "{text}");
}

#[test]
fn a_flag_wins_over_a_variable_over_a_file_over_the_default() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "lab.toml", "rounds = 1\nseed = 1\npatience = 1\n");
    let env = [("RODIZIO_CONFIG", file.as_str()), ("RODIZIO_SEED", "2"), ("RODIZIO_PATIENCE", "2")];
    let text = printed(&["config", "--json", "--patience", "3"], &env);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let values = ["rounds", "seed", "patience", "batch_size"].map(|key| json[key].as_u64().unwrap());
    assert_eq!(values, [1, 2, 3, 16]);
    let other = write(dir.path(), "other.toml", "rounds = 9\n");
    assert!(
        printed(&["config", "--config", &other], &env).contains("rounds = 9 "),
        "--config wins over RODIZIO_CONFIG"
    );
}

#[test]
fn the_printed_configuration_loads_back_to_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--hidden", "64,32", "--broker", "lab:1883,spare:1884", "--policy", "fixed:a", "--chunk-bytes", "1MB"];
    let args = [&["config"], &flags[..]].concat();
    let file = write(dir.path(), "lab.toml", &printed(&args, &[]));
    let json = |args: &[&str]| printed(args, &[]);
    assert_eq!(json(&[&args[..], &["--json"]].concat()), json(&["config", "--json", "--config", &file]));
    assert_eq!(printed(&["config", "--check", &file], &[]), format!("{file}: ok\n"));
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let text = refused(&["run", "--config", "no/such/file.toml"], &[]);
    assert!(text.starts_with("error: cannot read no/such/file.toml: "), "{text}");
}

#[test]
fn nothing_is_coloured_in_a_pipe() {
    let mut commands: Vec<Vec<&str>> = SUBCOMMANDS.iter().map(|subcommand| vec![*subcommand, "--help"]).collect();
    commands.extend([vec!["--help"], vec!["config"], vec!["run", "--nope"], vec!["run", "--rounds", "x"], vec![]]);
    for args in commands {
        let output = rodizio(&args, &[("TERM", "xterm-256color"), ("COLORTERM", "truecolor")]);
        assert!(!output.stdout.contains(&0x1b) && !output.stderr.contains(&0x1b), "{args:?}");
    }
}
