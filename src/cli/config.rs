//! `rodizio config`: the effective configuration, or whether a file is right.

use std::path::Path;

use crate::cli::args::ConfigArgs;
use crate::cli::error::{Exit, Failure};
use crate::cli::{Shell, read_file};
use crate::config::Layers;

/// Prints the effective configuration to stdout, or checks a file.
pub fn run(args: &ConfigArgs, layers: &Layers, shell: &mut Shell) -> Result<Exit, Failure> {
    if let Some(path) = &args.check {
        return check(path, shell);
    }
    let settings = layers.settings()?;
    let out = &mut shell.stdout.out;
    if args.json {
        writeln!(out, "{:#}", settings.to_json())?;
    } else {
        write!(out, "{}", settings.to_toml(layers))?;
    }
    out.flush()?;
    Ok(Exit::Finished)
}

fn check(path: &Path, shell: &mut Shell) -> Result<Exit, Failure> {
    let mut layers = Layers::new();
    layers.file(&path.display().to_string(), &read_file(path)?)?;
    layers.settings()?;
    writeln!(shell.stdout.out, "{}: ok", path.display())?;
    Ok(Exit::Finished)
}
