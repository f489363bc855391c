//! The log: what the floors below tell through `tracing`, to stderr, above the line that is redrawn.

use std::collections::BTreeMap;
use std::io::{self, Write};

use indicatif::ProgressBar;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::cli::{Exit, Failure};

/// The variable that filters the log, in the syntax of `tracing_subscriber::EnvFilter`.
pub const VARIABLE: &str = "RODIZIO_LOG";

/// What is logged with no, one and two `-v`. The libraries that carry messages are noisy: they are heard at the last.
const FILTERS: [&str; 3] = ["rodizio=warn", "rodizio=debug", "info,rodizio=trace,rumqttc=debug,rumqttd=debug"];

/// Starts the log of this process. `bar` is the line that is redrawn, if there is one.
///
/// # Errors
/// When the variable is no filter.
pub fn start(verbose: u8, env: &BTreeMap<String, String>, colour: bool, bar: &ProgressBar) -> Result<(), Failure> {
    let filter = filter(verbose, env)?;
    let lines = AboveBar(bar.clone());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colour).with_writer(lines);
    // An error says that this process has a log already.
    let _ = log.try_init();
    Ok(())
}

fn filter(verbose: u8, env: &BTreeMap<String, String>) -> Result<EnvFilter, Failure> {
    let of_flag = FILTERS[usize::from(verbose).min(FILTERS.len() - 1)];
    let given = env.get(VARIABLE).filter(|text| !text.is_empty());
    EnvFilter::try_new(given.map_or(of_flag, String::as_str)).map_err(|error| {
        let error = anyhow::Error::new(error).context(format!("{VARIABLE} is not a filter"));
        Failure::new(Exit::Usage, error).hint(format!("a filter reads like {VARIABLE}=rodizio=debug"))
    })
}

#[derive(Clone)]
struct AboveBar(ProgressBar);

impl<'a> MakeWriter<'a> for AboveBar {
    type Writer = Self;
    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Write for AboveBar {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.suspend(|| io::stderr().write_all(bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_wins_over_the_flag_and_must_be_a_filter() {
        let env = |text: &str| BTreeMap::from([(VARIABLE.to_owned(), text.to_owned())]);
        let shown = |verbose, env: &BTreeMap<String, String>| filter(verbose, env).unwrap().to_string();
        assert_eq!(shown(0, &env("")), "rodizio=warn");
        assert_eq!(shown(1, &env("rumqttd=error")), "rumqttd=error");
        assert!(shown(9, &BTreeMap::new()).contains("rumqttd=debug"));
        let failure = filter(0, &env("rodizio=loud")).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.error.to_string().contains(VARIABLE));
    }
}
