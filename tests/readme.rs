//! The README says what is true: its table of keys is the program's, its commands are commands, its events are events.

use std::ffi::OsString;
use std::process::Command;

use rodizio::cli::args;
use rodizio::config;

fn readme() -> String {
    std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap()
}

/// What stands between `<!-- name -->` and `<!-- /name -->`.
fn part<'a>(readme: &'a str, name: &str) -> &'a str {
    let (_, rest) = readme.split_once(&format!("<!-- {name} -->\n")).unwrap_or_else(|| panic!("no part {name}"));
    rest.split_once(&format!("<!-- /{name} -->")).unwrap_or_else(|| panic!("{name} has no end")).0
}

/// The `$ rodizio …` lines, each as its words.
fn commands(readme: &str) -> Vec<Vec<String>> {
    let lines = readme.lines().filter_map(|line| line.strip_prefix("$ ")).filter(|line| line.starts_with("rodizio "));
    lines.map(|line| shlex::split(line).unwrap_or_else(|| panic!("{line}: its quotes do not match"))).collect()
}

#[test]
fn the_table_of_keys_is_that_of_the_program() {
    let (readme, table) = (readme(), config::markdown());
    assert_eq!(part(&readme, "keys"), table, "put this between the marks:\n{table}");
}

#[test]
fn every_command_is_one() {
    let readme = readme();
    let commands = commands(&readme);
    assert!(commands.len() >= 3, "the README shows no commands");
    for command in commands {
        let words = command.iter().map(OsString::from);
        args::parse(words).unwrap_or_else(|error| panic!("{}: {error}", command.join(" ")));
    }
}

#[test]
fn the_simulation_in_the_readme_runs() {
    let readme = readme();
    let simulations: Vec<_> = commands(&readme).into_iter().filter(|words| words[1] == "sim").collect();
    assert!(!simulations.is_empty());
    for words in simulations {
        let mut program = Command::new(env!("CARGO_BIN_EXE_rodizio"));
        let output = program.args(&words[1..]).current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn every_event_of_a_run_is_described() {
    let readme = readme();
    let described = part(&readme, "events");
    let events = include_str!("../src/events.rs");
    let (_, rest) = events.split_once("pub enum Event {").unwrap();
    let variants = rest.split_once("\n}").unwrap().0;
    let documented = variants.split("\n    /// ").skip(1).filter(|text| !text.contains("not written down"));
    let mut names = 0;
    for text in documented {
        // The variant's own line has four spaces; its fields have eight.
        let Some(line) = text.lines().find(|line| line.starts_with("    ") && line.as_bytes()[4].is_ascii_uppercase())
        else {
            continue;
        };
        let camel: String = line.trim().chars().take_while(|c| c.is_alphanumeric()).collect();
        let mut name = String::new();
        for letter in camel.chars() {
            if letter.is_uppercase() && !name.is_empty() {
                name.push('_');
            }
            name.extend(letter.to_lowercase());
        }
        assert!(described.contains(&format!("`{name}`")), "the README does not describe the event {name}");
        names += 1;
    }
    assert!(names >= 15, "only {names} events were found in the source");
}
