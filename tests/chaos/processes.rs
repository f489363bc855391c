//! Processes of the program under test.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rodizio::types::PeerId;

/// What stands before the program on its command line, and in its environment: where and under which clock it runs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Surroundings {
    /// A command that ends in running another one, such as `ip netns exec NAME`.
    pub(crate) wrapper: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
}

/// How a process is to end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum End {
    /// By itself, with the result of the whole federation.
    Result,
    /// By itself, with this exit code and no result.
    Code(i32),
    /// As it likes: it was killed, or serves until it is.
    Any,
}

/// A process of this test: a run, a broker, or a peer that joins.
pub(crate) struct Program {
    pub(crate) child: Child,
    /// The peer that it is, if it is one alone.
    pub(crate) peer: Option<PeerId>,
    pub(crate) end: End,
    /// Where its stdout and stderr go.
    pub(crate) stdout: PathBuf,
    pub(crate) stderr: PathBuf,
}

impl Program {
    pub(crate) fn start(dir: &Path, name: &str, args: &[String], surroundings: &Surroundings) -> Self {
        let (stdout, stderr) = (dir.join(format!("{name}.stdout")), dir.join(format!("{name}.stderr")));
        let line: Vec<_> =
            surroundings.wrapper.iter().map(String::as_str).chain([env!("CARGO_BIN_EXE_rodizio")]).collect();
        let mut command = Command::new(line[0]);
        command.args(&line[1..]).args(args).current_dir(dir).stdin(Stdio::null());
        command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        command.envs(surroundings.env.iter().map(|(name, value)| (name, value)));
        command.stdout(File::create(&stdout).unwrap()).stderr(File::create(&stderr).unwrap());
        let child = command.spawn().unwrap_or_else(|e| panic!("{line:?}: {e}"));
        Self { child, peer: None, end: End::Result, stdout, stderr }
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Holds the end of a process to what was expected of it.
    pub(crate) fn check_end(&mut self, seed: u64) {
        let code = self.child.wait().unwrap().code();
        let expected = match self.end {
            End::Result => Some(0),
            End::Code(code) => Some(code),
            End::Any => code,
        };
        assert_eq!(code, expected, "seed {seed}: {}", self.stderr.display());
    }
}
