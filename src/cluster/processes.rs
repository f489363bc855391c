//! A cluster whose peers are processes of their own: `rodizio join`, once a peer.
//!
//! A child writes its entries to its standard output, one a line. It stops when its standard input ends: when this
//! process wants it to, and also when this process is killed, so that none is left behind.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;

use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

use crate::cluster::{Stop, name_in, peer_settings};
use crate::config::{Settings, VARIABLE_PREFIX};
use crate::events::{Entry, Event};
use crate::rundir::CONFIG;
use crate::types::PeerId;

/// The program to run for each peer, and what it gets beside the settings.
#[derive(Clone, Debug)]
pub struct Program {
    /// Its file: `rodizio` itself.
    pub path: PathBuf,
    /// Further arguments of `join`.
    pub args: Vec<OsString>,
}

/// The running children.
#[derive(Debug)]
pub struct Processes {
    children: Vec<(PeerId, Running)>,
}

#[derive(Debug)]
struct Running {
    /// Dropping it asks the child to stop.
    input: Option<std::process::ChildStdin>,
    ended: oneshot::Receiver<io::Result<ExitStatus>>,
}

impl Processes {
    /// Starts `settings.peers` processes that read the configuration in `run_dir`, meet at `settings.brokers` and keep
    /// their state in `run_dir`.
    ///
    /// # Errors
    /// When one does not start; those that did are asked to stop.
    pub fn start(
        program: &Program,
        settings: &Settings,
        run_dir: &Path,
        entries: &UnboundedSender<Entry>,
    ) -> io::Result<Self> {
        let start = |settings: &Settings| {
            let name = name_in(settings);
            Ok((name.clone(), start(command(program, settings, run_dir).spawn()?, name, entries)))
        };
        let children = peer_settings(settings, run_dir).iter().map(start).collect::<io::Result<_>>()?;
        Ok(Self { children })
    }

    /// Waits until every child has ended; how, in the order of their names.
    pub async fn run(self, stop: &Stop) -> Vec<(PeerId, io::Result<ExitStatus>)> {
        let (mut inputs, mut ends) = (Vec::new(), Vec::new());
        for (name, running) in self.children {
            inputs.push(running.input);
            ends.push((name, running.ended));
        }
        let stopping = async {
            stop.clone().requested().await;
            inputs.clear();
            std::future::pending().await
        };
        let all = async {
            let mut ended = Vec::with_capacity(ends.len());
            for (name, end) in ends {
                let lost = || Err(io::Error::other("the thread that waits for it ended"));
                ended.push((name, end.await.unwrap_or_else(|_| lost())));
            }
            ended
        };
        tokio::select! {
            ended = all => ended,
            never = stopping => never,
        }
    }
}

/// The effective configuration is in the run directory, so neither variables nor other files are to be read again.
fn command(program: &Program, settings: &Settings, run_dir: &Path) -> Command {
    let mut command = Command::new(&program.path);
    let own = [("peer", text(&settings.peer)), ("part", text(&settings.part)), ("broker", settings.brokers.join(","))];
    command.arg("join").arg("--entries").arg("--config").arg(run_dir.join(CONFIG));
    for (key, value) in own {
        command.arg(format!("--{key}")).arg(value);
    }
    command.args(settings.state_dir.iter().flat_map(|dir| [OsString::from("--state-dir"), dir.clone().into()]));
    command.args(&program.args);
    for (name, _) in std::env::vars_os() {
        let is_key = name.to_str().is_some_and(|name| name.starts_with(VARIABLE_PREFIX) && name != "RODIZIO_LOG");
        if is_key {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Ctrl-C in a terminal is for this process, which then asks the children.
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    command
}

fn text(value: &Option<impl ToString>) -> String {
    value.as_ref().map_or_else(|| crate::config::NONE.to_owned(), ToString::to_string)
}

/// Reads what the child says, and waits for its end, in threads of their own.
fn start(mut child: Child, name: PeerId, entries: &UnboundedSender<Entry>) -> Running {
    let input = child.stdin.take();
    let output = child.stdout.take().map(|stdout| read(stdout, name.clone(), entries.clone()));
    let errors = child.stderr.take().map(|stderr| read(stderr, name, entries.clone()));
    let (sender, ended) = oneshot::channel();
    thread::spawn(move || {
        let status = child.wait();
        // Whoever learns of the end has been sent everything that the child said before.
        output.into_iter().chain(errors).for_each(|reader| drop(reader.join()));
        let _ = sender.send(status);
    });
    Running { input, ended }
}

/// Sends each line of a stream on: as the entry that it is, or as something said.
fn read(stream: impl Read + Send + 'static, name: PeerId, entries: UnboundedSender<Entry>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            let entry = Entry::from_line(&line).unwrap_or_else(|_| Entry::now(&name, Event::Said { line }));
            // Nobody listens when the program is ending.
            let _ = entries.send(entry);
        }
    })
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc::unbounded_channel;

    use super::*;
    use crate::config::Layers;

    fn settings() -> Settings {
        let brokers = vec!["127.0.0.1:1".to_owned()];
        Settings { peers: 2, brokers, ..Layers::new().settings().unwrap() }
    }

    #[test]
    fn a_child_gets_the_configuration_and_what_is_its_own() {
        let program = Program { path: "rodizio".into(), args: vec!["-v".into()] };
        let command = command(&program, &peer_settings(&settings(), Path::new("run"))[1], Path::new("run"));
        let args: Vec<_> = command.get_args().map(|arg| arg.to_str().unwrap()).collect();
        let expected = "join --entries --config run/config.toml --peer peer-2 --part 2/2 --broker 127.0.0.1:1 \
                        --state-dir run/peers/peer-2 -v";
        assert_eq!(args.join(" "), expected);
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_child_ends_when_its_input_does_and_all_that_it_said_is_heard() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("child");
        let text = "#!/bin/sh\necho '{\"time\":\"2026-05-14T15:30:12.345Z\",\"peer\":\"x\",\"event\":\"interrupted\"}'\n\
                    cat >/dev/null\necho last >&2\nexit 7\n";
        std::fs::write(&script, text).unwrap();
        let program = Program { path: "/bin/sh".into(), args: vec![] };
        let (entries, mut heard) = unbounded_channel();
        let mut command = Command::new(&program.path);
        command.arg(&script).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let name = PeerId::new("peer-1").unwrap();
        let running = start(command.spawn().unwrap(), name.clone(), &entries);
        let processes = Processes { children: vec![(name, running)] };
        let (request, stop) = Stop::new();
        let run = tokio::spawn(async move { processes.run(&stop).await });
        let first = heard.recv().await.unwrap();
        assert_eq!((first.peer.as_str(), first.event), ("x", Event::Interrupted));
        request.send(true).unwrap();
        let ended = run.await.unwrap();
        assert_eq!(ended[0].1.as_ref().unwrap().code(), Some(7));
        assert_eq!(heard.try_recv().unwrap().event, Event::Said { line: "last".into() });
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_an_error() {
        let program = Program { path: "/no/such/program".into(), args: vec![] };
        let (entries, _heard) = unbounded_channel();
        assert!(Processes::start(&program, &settings(), Path::new("run"), &entries).is_err());
    }
}
