//! Signals to processes, by a shell: each has this command, and not every machine has a program of that name.

use std::process::Command;

/// Sends the signal `name` to all of them.
pub(crate) fn signal(name: &str, pids: &[u32]) {
    assert!(kill(name, pids).status().unwrap().success(), "no process {pids:?}");
}

/// The command that sends it.
pub(crate) fn kill(name: &str, pids: &[u32]) -> Command {
    let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("kill -{name} {}", pids.join(" ")));
    command
}
