//! How the program ends, and how it says what went wrong.

use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use console::Style;

use crate::cli::Stream;
use crate::config::ConfigError;
use crate::journal::JournalError;

/// The exit codes, on which scripts rely.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// What was asked is done.
    Finished = 0,
    /// A fault of the program or of the machine.
    Internal = 1,
    /// A wrong flag, key or value.
    Usage = 2,
    /// No broker was reached, or none could be started.
    NoBroker = 3,
    /// The peers that were waited for did not come in time.
    GaveUp = 4,
    /// Data, a model or a state directory that cannot be used.
    BadData = 5,
    /// Ctrl-C, as shells count it: 128 and the signal's number.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

/// Why a subcommand ends early: what is wrong, what to do, and the exit code.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// What is wrong, with its causes.
    pub error: anyhow::Error,
    /// What to do, in a line.
    pub hint: Option<String>,
}

impl Failure {
    /// A failure without a hint.
    pub fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self { exit, error: error.into(), hint: None }
    }

    /// The same failure with a hint.
    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// Whether the reader of the output went away, as in `rodizio config | head -1`: nothing to complain about.
    pub fn is_broken_pipe(&self) -> bool {
        self.error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
    }

    /// Writes `error: …` and `hint: …`.
    pub fn report(&self, stderr: &mut Stream) -> io::Result<()> {
        let red = stderr.style(Style::new().red().bold());
        let cyan = stderr.style(Style::new().cyan().bold());
        writeln!(stderr.out, "{} {:#}", red.apply_to("error:"), self.error)?;
        match &self.hint {
            Some(hint) => writeln!(stderr.out, "{} {hint}", cyan.apply_to("hint:")),
            None => Ok(()),
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        let hint = error.hint();
        Failure::new(Exit::Usage, error).hint(hint)
    }
}

impl From<JournalError> for Failure {
    fn from(error: JournalError) -> Self {
        let exit = match error {
            JournalError::Io { .. } => Exit::Internal,
            JournalError::Damaged { .. } | JournalError::Newer { .. } => Exit::BadData,
            _ => Exit::Usage,
        };
        let hint = error.hint();
        Failure::new(exit, error).hint(hint)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::new(Exit::Internal, error)
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;
    use crate::cli::tests::Captured;

    #[test]
    fn a_failure_is_an_error_line_with_its_causes_and_a_hint_line() {
        let captured = Captured::default();
        let failure = Failure::new(Exit::NoBroker, anyhow!("connection refused").context("no broker at lab:1883"));
        failure.hint("start one with `rodizio broker`").report(&mut captured.stream(false)).unwrap();
        let expected = "error: no broker at lab:1883: connection refused\nhint: start one with `rodizio broker`\n";
        assert_eq!(captured.text(), expected);
    }

    #[test]
    fn colour_is_for_terminals() {
        let captured = Captured::default();
        Failure::new(Exit::Usage, anyhow!("x")).report(&mut captured.stream(true)).unwrap();
        assert!(captured.text().starts_with("\u{1b}[31m"), "{:?}", captured.text());
    }

    #[test]
    fn a_state_directory_that_lies_is_bad_data_and_one_in_use_is_not() {
        let dir = std::path::PathBuf::from("state");
        assert_eq!(Failure::from(JournalError::InUse { dir: dir.clone() }).exit, Exit::Usage);
        assert_eq!(Failure::from(JournalError::Damaged { path: dir, problem: "x" }).exit, Exit::BadData);
    }
}
