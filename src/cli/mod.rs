//! The command line: a shell around the floors below, which takes its surroundings as arguments.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::error::ErrorKind;
use console::Style;

use crate::config::{Key, Layers};

pub mod args;
pub mod bench;
pub mod broker;
pub mod config;
pub mod error;
pub mod follow;
pub mod interrupt;
pub mod join;
pub mod log;
pub mod narrator;
pub mod output;
pub mod run;
pub mod sim;

use args::{Command, Invocation};
pub use error::{Exit, Failure};

/// Threads for jobs, at most. They take turns on the cores; each keeps some megabytes of its own ready, which a hundred
/// peers with a hundred threads would pay for without being faster. A job that waits for room on a disk holds one.
const JOB_THREADS: usize = 16;

/// The surroundings of the program.
#[derive(Debug)]
pub struct Shell {
    /// The command line, the program's name first.
    pub args: Vec<OsString>,
    /// The environment.
    pub env: BTreeMap<String, String>,
    /// Where results go.
    pub stdout: Stream,
    /// Where progress, logs and errors go.
    pub stderr: Stream,
}

/// An output of the program.
pub struct Stream {
    /// Where the text goes.
    pub out: Box<dyn Write + Send>,
    /// Whether a person watches: lines may be redrawn.
    pub is_terminal: bool,
    /// Whether colour is welcome.
    pub colour: bool,
}

impl Shell {
    /// The surroundings of this process.
    pub fn of_process() -> Self {
        let text = |os: OsString| os.to_string_lossy().into_owned();
        let env: BTreeMap<_, _> = std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect();
        let stdout = Stream::new(Box::new(io::stdout()), io::stdout().is_terminal(), &env);
        let stderr = Stream::new(Box::new(io::stderr()), io::stderr().is_terminal(), &env);
        Self { args: std::env::args_os().collect(), env, stdout, stderr }
    }
}

impl Stream {
    /// A stream whose colour follows from <https://no-color.org> and from what the terminal can do.
    pub fn new(out: Box<dyn Write + Send>, is_terminal: bool, env: &BTreeMap<String, String>) -> Self {
        let no_color = env.get("NO_COLOR").is_some_and(|value| !value.is_empty());
        let is_dumb = env.get("TERM").is_some_and(|term| term == "dumb");
        let is_terminal = is_terminal && !is_dumb;
        Self { out, is_terminal, colour: is_terminal && !no_color }
    }

    /// The style, or none where colour is not welcome.
    pub fn style(&self, style: Style) -> Style {
        if self.colour { style.force_styling(true) } else { Style::new().force_styling(false) }
    }
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("is_terminal", &self.is_terminal).field("colour", &self.colour).finish()
    }
}

/// The whole program.
pub fn main(shell: &mut Shell) -> Exit {
    match invoke(shell) {
        Ok(exit) => exit,
        Err(failure) if failure.is_broken_pipe() => Exit::Finished,
        Err(failure) => {
            // If stderr is gone there is nobody to tell; the exit code still says it.
            let _ = failure.report(&mut shell.stderr);
            failure.exit
        }
    }
}

fn invoke(shell: &mut Shell) -> Result<Exit, Failure> {
    match args::parse(shell.args.clone()) {
        Ok(invocation) => dispatch(invocation, shell),
        Err(error) => explain(&error, shell),
    }
}

fn dispatch(invocation: Invocation, shell: &mut Shell) -> Result<Exit, Failure> {
    let layers = layers(&invocation, &shell.env)?;
    match invocation.command {
        Command::Run(args) => run::run(&args, layers, shell),
        Command::Broker(args) => broker::run(&args, &layers, shell),
        Command::Join(args) => join::run(&args, layers, shell),
        Command::Config(args) => config::run(&args, &layers, shell),
        Command::Bench(args) => bench::run(&args, shell),
        Command::Sim(args) => sim::run(&args, shell),
    }
}

/// Defaults, file, environment, flags. A file that is only to be checked stands alone, and simulations have no keys.
fn layers(invocation: &Invocation, env: &BTreeMap<String, String>) -> Result<Layers, Failure> {
    let mut layers = Layers::new();
    let alone = matches!(&invocation.command, Command::Config(args) if args.check.is_some());
    let Some(file) = invocation.command.file().filter(|_| !alone) else { return Ok(layers) };
    let resumed = invocation.command.resumed();
    let path = match resumed {
        Some(dir) => Some(run::config_to_resume(dir)?),
        None => file.config.clone().or_else(|| env.get("RODIZIO_CONFIG").map(PathBuf::from)),
    };
    if let Some(path) = path {
        layers.file(&path.display().to_string(), &read_file(&path)?)?;
    }
    layers.environment(env.clone())?;
    for (key, text) in &invocation.flags {
        layers.flag(key, text)?;
    }
    if let (Some(dir), Some(key)) = (resumed, Key::find("run_dir")) {
        // The file may name it as seen from another directory.
        layers.flag(key, &dir.display().to_string())?;
    }
    Ok(layers)
}

/// What the tasks of a subcommand run on. Training has threads of its own beside it.
fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    Ok(tokio::runtime::Builder::new_multi_thread().max_blocking_threads(JOB_THREADS).enable_all().build()?)
}

fn read_file(path: &Path) -> Result<String, Failure> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
    text.map_err(|error| Failure::new(Exit::Usage, error).hint("`rodizio config > FILE` writes a file to start from"))
}

/// Help and version go to stdout; anything else is a failure in the program's own form.
fn explain(error: &clap::Error, shell: &mut Shell) -> Result<Exit, Failure> {
    let text = error.render();
    let printed = |colour: bool| if colour { text.ansi().to_string() } else { text.to_string() };
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let text = printed(shell.stdout.colour);
            write!(shell.stdout.out, "{text}")?;
            shell.stdout.out.flush()?;
            Ok(Exit::Finished)
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let text = printed(shell.stderr.colour);
            write!(shell.stderr.out, "{text}")?;
            Ok(Exit::Usage)
        }
        _ => Err(usage_failure(&text.to_string(), &shell.args)),
    }
}

/// Clap's text is `error: …` over some lines, a blank line, then `tip: …` and the usage.
fn usage_failure(text: &str, args: &[OsString]) -> Failure {
    let message: Vec<_> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    let message = message.join(" ");
    let message = message.strip_prefix("error: ").unwrap_or(&message).to_owned();
    let tip = text.lines().find_map(|line| line.trim().strip_prefix("tip: ")).map(str::to_owned);
    let subcommands = args::command();
    let named = args.iter().skip(1).find_map(|arg| subcommands.find_subcommand(arg));
    let of = named.map(|subcommand| format!("{} ", subcommand.get_name())).unwrap_or_default();
    let hint = tip.unwrap_or_else(|| format!("see `rodizio {of}--help`"));
    Failure::new(Exit::Usage, anyhow::anyhow!(message)).hint(hint)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A writer whose text can be read by the test that owns it.
    #[derive(Debug, Clone, Default)]
    pub(crate) struct Captured(Arc<Mutex<Vec<u8>>>);

    impl Captured {
        pub(crate) fn stream(&self, terminal: bool) -> Stream {
            Stream::new(Box::new(self.clone()), terminal, &BTreeMap::new())
        }

        pub(crate) fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Runs the program; returns its exit, stdout and stderr.
    fn program(line: &str, env: &[(&str, &str)], terminal: bool) -> (Exit, String, String) {
        let (stdout, stderr) = (Captured::default(), Captured::default());
        let env: BTreeMap<_, _> = env.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        let mut shell = Shell {
            args: line.split(' ').map(OsString::from).collect(),
            stdout: Stream::new(Box::new(stdout.clone()), terminal, &env),
            stderr: Stream::new(Box::new(stderr.clone()), terminal, &env),
            env,
        };
        let exit = main(&mut shell);
        (exit, stdout.text(), stderr.text())
    }

    #[test]
    fn help_and_version_are_results() {
        for line in ["rodizio --help", "rodizio run --help", "rodizio --version"] {
            let (exit, stdout, stderr) = program(line, &[], false);
            assert_eq!((exit, stderr.as_str()), (Exit::Finished, ""));
            assert!(stdout.contains("rodizio"));
        }
    }

    #[test]
    fn colour_needs_a_terminal_and_no_objection() {
        let has_colour = |env: &[(&str, &str)], terminal| program("rodizio --nope", env, terminal).2.contains('\u{1b}');
        assert!(has_colour(&[], true));
        assert!(has_colour(&[("NO_COLOR", "")], true), "an empty NO_COLOR means nothing");
        assert!(!has_colour(&[("NO_COLOR", "1")], true));
        assert!(!has_colour(&[("TERM", "dumb")], true));
        assert!(!has_colour(&[], false));
    }

    #[test]
    fn a_wrong_flag_has_a_hint_of_one_line() {
        let (exit, _, stderr) = program("rodizio run --batchsize 3", &[], false);
        assert_eq!(exit, Exit::Usage);
        let lines: Vec<_> = stderr.lines().collect();
        assert_eq!(lines[0], "error: unexpected argument '--batchsize' found");
        assert!(lines[1].starts_with("hint: ") && lines[1].contains("'--batch-size'"), "{stderr}");
        assert_eq!(lines.len(), 2);
        let (_, _, stderr) = program("rodizio join --rounds", &[], false);
        assert!(stderr.ends_with("hint: see `rodizio join --help`\n"), "{stderr}");
    }

    #[test]
    fn a_reader_that_leaves_is_no_failure() {
        struct Gone;
        impl Write for Gone {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let stderr = Captured::default();
        let mut shell = Shell {
            args: vec!["rodizio".into(), "config".into()],
            env: BTreeMap::new(),
            stdout: Stream::new(Box::new(Gone), false, &BTreeMap::new()),
            stderr: stderr.stream(false),
        };
        assert_eq!((main(&mut shell), stderr.text().as_str()), (Exit::Finished, ""));
    }

    #[test]
    fn a_file_to_check_stands_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lab.toml");
        let check = format!("rodizio config --check {}", path.display());
        std::fs::write(&path, "rounds = 3").unwrap();
        let (exit, stdout, _) = program(&check, &[("RODIZIO_ROUNDS", "x")], false);
        assert_eq!((exit, stdout), (Exit::Finished, format!("{}: ok\n", path.display())));
        std::fs::write(&path, "rouns = 3").unwrap();
        let (exit, stdout, stderr) = program(&check, &[], false);
        assert_eq!((exit, stdout.as_str()), (Exit::Usage, ""));
        assert!(stderr.ends_with("hint: did you mean rounds?\n"), "{stderr}");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(program(&check, &[], false).0, Exit::Usage);
    }
}
