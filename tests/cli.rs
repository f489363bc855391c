//! The program from outside: what it prints where, and how it exits.

mod common {
    pub(crate) mod hosts;
    pub(crate) mod signals;
}

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use common::hosts::own_host;
use common::signals::signal;
use rodizio::config::KEYS;
use tokio::net::TcpSocket;

const SUBCOMMANDS: [&str; 6] = ["run", "broker", "join", "bench", "sim", "config"];

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
    let expected: [(&str, &[&str]); 6] = [
        (
            "run",
            &[
                "--peers",
                "--processes",
                "--resume",
                "--broker",
                "--json",
                "-q, --quiet",
                "-v, --verbose",
                "--run-dir",
                "Examples:",
            ],
        ),
        ("broker", &["--listen", "--config", "--chunk-bytes", "Examples:"]),
        ("join", &["--broker", "--peer", "--host-broker", "--state-dir", "--run-dir", "--json", "Examples:"]),
        ("bench", &["transfer", "round", "Examples:"]),
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

/// What is waited for comes within this, or never.
const LIMIT: Duration = Duration::from_secs(600);

/// A running program, started in `dir`. It is killed when the test ends first.
struct Program {
    child: Child,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
    said: Vec<String>,
}

impl Program {
    fn start(dir: &Path, args: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rodizio"));
        command.args(args).current_dir(dir).env_clear().stdin(Stdio::null());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (stdout, stderr) = (lines(child.stdout.take().unwrap()), lines(child.stderr.take().unwrap()));
        Self { child, stdout, stderr, said: Vec::new() }
    }

    /// Waits for a line on stderr that has `part`.
    fn until_said(&mut self, part: &str) {
        while !self.said.last().is_some_and(|line| line.contains(part)) {
            match self.stderr.recv_timeout(LIMIT) {
                Ok(line) => self.said.push(line),
                Err(_) => panic!("no {part:?} in:\n{}", self.said.join("\n")),
            }
        }
    }

    fn signal(&self, name: &str) {
        signal(name, &[self.child.id()]);
    }

    /// Waits for the end; returns the exit code, stdout and stderr.
    fn end(mut self) -> (Option<i32>, String, String) {
        let mut stdout = Vec::new();
        // It keeps its stdout open as long as it runs.
        loop {
            match self.stdout.recv_timeout(LIMIT) {
                Ok(line) => stdout.push(line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("it does not end; it said:\n{}", self.said.join("\n")),
            }
        }
        let status = self.child.wait().unwrap();
        self.said.extend(self.stderr.iter());
        (status.code(), stdout.join("\n"), self.said.join("\n"))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // An error says that it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines(stream: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            // The test may be over.
            let _ = sender.send(line);
        }
    });
    receiver
}

/// A broker that was started by the program, and its address.
fn broker(dir: &Path) -> (Program, String) {
    let program = Program::start(dir, &["broker", "--listen", "127.0.0.1:0"]);
    let line = program.stdout.recv_timeout(LIMIT).unwrap();
    let addr = line.strip_prefix("broker listens on ").unwrap_or_else(|| panic!("{line}")).to_owned();
    (program, addr)
}

/// The result that `--json` prints, which has to be all of stdout.
fn result(stdout: &str) -> serde_json::Value {
    serde_json::from_str(stdout).unwrap_or_else(|error| panic!("{error}: {stdout}"))
}

#[test]
fn a_run_prints_its_rounds_and_one_json_document_without_colour() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["run", "--json", "--peers", "3", "--rounds", "3", "--run-dir", "first"];
    let (code, stdout, stderr) = Program::start(dir.path(), &args).end();
    assert_eq!(code, Some(0), "{stderr}");
    assert!(!stdout.contains('\u{1b}') && !stderr.contains('\u{1b}') && !stderr.contains('\r'), "{stderr}");
    for part in ["3 peers in this process", "4,810 parameters", "peer-3 ", "round 1/3: ", "round 3/3: "] {
        assert!(stderr.contains(part), "{part} is missing:\n{stderr}");
    }
    let result = result(&stdout);
    assert_eq!((&result["reason"], &result["rounds"]), (&"rounds".into(), &3.into()));
    assert!(result["val_accuracy"].as_f64().unwrap() > 0.8 && result["val_loss"].as_f64().unwrap() > 0.0);
    assert!(result["seconds"].as_f64().unwrap() > 0.0 && result["bytes_sent"].as_u64().unwrap() > 3 * 2 * 4 * 4810);
    assert_eq!(result["digest"].as_str().unwrap().len(), 64);
    let leaders = result["leaders"].as_array().unwrap();
    assert!(leaders.len() == 3 && leaders.iter().all(|leader| leader.as_str().unwrap().starts_with("peer-")));
    assert_eq!((&result["run_dir"], &result["model"]), (&"first".into(), &"first/model.safetensors".into()));
    for file in ["config.toml", "events.jsonl", "model.safetensors", "best.safetensors"] {
        assert!(dir.path().join("first").join(file).is_file(), "{file}");
    }
    let config = dir.path().join("first/config.toml");
    assert!(printed(&["config", "--config", config.to_str().unwrap()], &[]).contains("min_peers = 3 "));
}

/// The path of the first interpreter that has numpy.
fn python_with_numpy() -> Option<String> {
    let path = |python: &str| {
        let output = Command::new(python).args(["-c", "import numpy, sys; print(sys.executable)"]).output().ok()?;
        output.status.success().then(|| stdout(&output).trim().to_owned())
    };
    ["python3", "/usr/bin/python3"].into_iter().find_map(path)
}

/// The command of the trainer that is shipped as an example, if it can be run here.
fn numpy_trainer() -> Option<String> {
    let here = env!("CARGO_MANIFEST_DIR");
    let python = python_with_numpy();
    if python.is_none() {
        eprintln!("skipped: there is no python3 with numpy");
    }
    Some(format!("{} '{here}/configs/trainer_numpy.py' '{here}/src/training/data/digits.csv.gz'", python?))
}

#[test]
fn a_program_in_python_is_the_trainer_of_every_peer() {
    let Some(command) = numpy_trainer() else { return };
    let dir = tempfile::tempdir().unwrap();
    let run = |more: &[&str]| {
        let args =
            ["run", "--peers", "3", "--rounds", "4", "--json", "--trainer", &command, "--election-timeout", "20s"];
        let (code, out, err) = Program::start(dir.path(), &[&args, more].concat()).end();
        assert_eq!(code, Some(0), "{err}");
        assert!(err.contains("configs/trainer_numpy.py") && err.contains("650 parameters"), "{err}");
        let result = result(&out);
        assert!(result["val_accuracy"].as_f64().is_some_and(|accuracy| accuracy > 0.85), "{out}");
        result["digest"].clone()
    };
    assert_eq!(run(&["--run-dir", "tasks"]), run(&["--run-dir", "processes", "--processes"]));
}

#[test]
fn peers_that_join_train_by_programs_of_their_own() {
    let Some(command) = numpy_trainer() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (_broker, addr) = broker(dir.path());
    let join = |part: &str| {
        let args = ["join", "--broker", &addr, "--min-peers", "2", "--rounds", "2", "--part", part, "--json"];
        Program::start(dir.path(), &[&args[..], &["--trainer", &command, "--election-timeout", "20s"]].concat())
    };
    let running = ["1/2", "2/2"].map(join);
    let digests = running.map(|program| {
        let (code, out, err) = program.end();
        assert_eq!(code, Some(0), "{err}");
        result(&out)["digest"].clone()
    });
    assert_eq!(digests[0], digests[1]);
}

#[test]
fn a_trainer_that_does_not_start_and_data_that_do_not_fit_are_told_with_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    let healthy = format!("csv:{}", write(dir.path(), "healthy.csv", "age,sick\n30,no\n40,no\n50,no\n60,no\n"));
    let both = format!("csv:{}", write(dir.path(), "both.csv", "age,sick\n30,no\n40,yes\n50,no\n60,yes\n"));
    let pattern = format!("csv:{}/*.csv", dir.path().display());
    let cases: [(&[&str], &str, i32); 5] = [
        (&["--trainer", "no-such-program --x"], "cannot start the trainer program \"no-such-program\"", 5),
        (&["--model", "char-lstm", "--hidden", "8"], "model = char-lstm cannot learn from these data", 5),
        (&["--data", &healthy, "--peers", "2"], "every example of every peer is of class \"no\"", 5),
        (&["--data", &both, "--peers", "9"], "cannot be shared out", 5),
        (&["--data", &pattern, "--partition", "dirichlet"], "partition = dirichlet", 2),
    ];
    for (more, error, exit) in cases {
        let (code, out, err) = Program::start(dir.path(), &[&["run"], more].concat()).end();
        let lines: Vec<_> = err.lines().collect();
        assert_eq!((code, out.as_str()), (Some(exit), ""), "{more:?}: {err}");
        assert!(matches!(&lines[..], [first, hint] if first.contains(error) && hint.starts_with("hint: ")), "{err}");
    }
    let left: Vec<_> = std::fs::read_dir(dir.path().join("runs")).into_iter().flatten().collect();
    assert!(left.is_empty(), "a run that did not begin leaves nothing: {left:?}");
}

#[test]
fn peers_as_processes_on_two_threads_give_the_same_model_as_peers_as_tasks_on_one() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["run", "--json", "--peers", "3", "--rounds", "3", "--local-epochs", "2", "--election-timeout", "20s"];
    let digest = |more: &[&str]| {
        let (code, stdout, stderr) = Program::start(dir.path(), &[&args, more].concat()).end();
        assert_eq!(code, Some(0), "{stderr}");
        let result = result(&stdout);
        let events = dir.path().join(result["run_dir"].as_str().unwrap()).join("events.jsonl");
        let text = std::fs::read_to_string(events).unwrap();
        let parsed = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let pids: BTreeSet<u64> = parsed.filter_map(|entry| entry["pid"].as_u64()).collect();
        (result["digest"].as_str().unwrap().to_owned(), pids.len(), text.matches("\"round_committed\"").count())
    };
    for model in ["mlp", "cnn"] {
        let tasks = digest(&["--model", model, "--run-dir", &format!("{model}-tasks")]);
        let processes =
            digest(&["--model", model, "--run-dir", &format!("{model}-processes"), "--processes", "--threads", "2"]);
        assert_eq!((tasks.1, tasks.2), (1, 9), "{model}");
        assert_eq!((processes.1, processes.2), (3, 9), "{model}");
        assert_eq!(tasks.0, processes.0, "{model}");
    }
}

#[test]
fn ctrl_c_ends_a_run_with_its_state_kept_and_the_next_one_goes_on() {
    for kind in [&[][..], &["--processes"]] {
        let dir = tempfile::tempdir().unwrap();
        // On a busy machine a leader is not to seem silent, which would be worth a warning.
        let args = ["run", "--peers", "3", "--rounds", "100000", "--run-dir", "first", "--election-timeout", "60s"];
        let args = [&args[..], kind].concat();
        let mut program = Program::start(dir.path(), &args);
        program.until_said("round 2/100000: ");
        program.signal("INT");
        let (code, stdout, stderr) = program.end();
        assert_eq!((code, stdout.as_str()), (Some(130), ""), "{stderr}");
        assert!(stderr.contains("interrupted; to go on: ") && !stderr.contains("warning: "), "{stderr}");
        for peer in ["peer-1", "peer-2", "peer-3"] {
            assert!(dir.path().join("first/peers").join(peer).join("state").is_file());
        }
        assert!(dir.path().join("first/model.safetensors").is_file());
        let mut program = Program::start(dir.path(), &args);
        program.until_said(": term ");
        assert!(!program.said.last().unwrap().starts_with("round 1/"), "{:?}", program.said);
        program.signal("INT");
        assert_eq!(program.end().0, Some(130));
    }
}

#[test]
fn a_second_ctrl_c_is_no_other_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut program = Program::start(dir.path(), &["run", "--peers", "2", "--rounds", "100000"]);
    program.until_said("round 1/100000: ");
    program.signal("INT");
    program.signal("INT");
    assert_eq!(program.end().0, Some(130));
}

#[test]
fn a_run_directory_goes_on_with_its_own_configuration_only() {
    let dir = tempfile::tempdir().unwrap();
    let run = |rounds: &str| {
        let args = ["run", "--peers", "2", "--run-dir", "first", "--rounds", rounds, "--json"];
        Program::start(dir.path(), &args).end()
    };
    let (code, first, _) = run("2");
    assert_eq!(code, Some(0));
    let (code, _, stderr) = run("3");
    assert_eq!(code, Some(2));
    assert!(stderr.contains("rounds = 2, and now rounds = 3\nhint: set rounds = 2"), "{stderr}");
    let (code, second, _) = run("2");
    assert_eq!(code, Some(0), "a run that has finished is told again");
    for key in ["digest", "leaders", "val_accuracy"] {
        assert_eq!(result(&first)[key], result(&second)[key]);
    }
}

#[test]
fn three_peers_join_a_broker_and_finish() {
    let dir = tempfile::tempdir().unwrap();
    let (program, addr) = broker(dir.path());
    let join = |part: &str| {
        let args = ["join", "--broker", &addr, "--min-peers", "3", "--rounds", "3", "--part", part, "--json"];
        Program::start(dir.path(), &args)
    };
    let mut peers = vec![join("1/3")];
    peers[0].until_said("1 of 3 peers have joined; waiting for 2 (--min-peers 3)");
    peers.extend([join("2/3"), join("3/3")]);
    let ends: Vec<_> = peers.into_iter().map(Program::end).collect();
    assert!(ends.iter().all(|(code, ..)| *code == Some(0)), "{ends:?}");
    let digests: BTreeSet<String> = ends.iter().map(|(_, stdout, _)| result(stdout)["digest"].to_string()).collect();
    assert_eq!(digests.len(), 1);
    let runs = std::fs::read_dir(dir.path().join("runs")).unwrap().count();
    assert_eq!(runs, 3, "each has results of its own");
    program.signal("INT");
    assert_eq!(program.end().0, Some(0), "Ctrl-C is how a broker ends");
}

#[test]
fn a_peer_may_host_the_broker_and_stays_until_the_others_have_left() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["join", "--host-broker", "--listen", "127.0.0.1:0", "--rounds", "2", "--part", "1/2", "--peer", "host"];
    let mut host = Program::start(dir.path(), &args);
    host.until_said("peers of this machine: rodizio join --broker ");
    let addr = host.said.last().unwrap().rsplit(' ').next().unwrap().to_owned();
    let guest = Program::start(dir.path(), &["join", "--broker", &addr, "--rounds", "2", "--part", "2/2"]);
    let ((host, ..), (guest, _, stderr)) = (host.end(), guest.end());
    assert_eq!((host, guest), (Some(0), Some(0)), "{stderr}");
    assert!(!stderr.contains("lost"), "{stderr}");
    assert!(dir.path().join(".rodizio/default/host/peer").is_file());
}

#[test]
fn a_port_that_is_taken_is_exit_code_3() {
    let dir = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    for args in [&["broker"][..], &["run", "--peers", "2"], &["join", "--host-broker"]] {
        let (code, stdout, stderr) = Program::start(dir.path(), &[args, &["--listen", &addr]].concat()).end();
        assert_eq!((code, stdout.as_str()), (Some(3), ""), "{stderr}");
        assert!(
            stderr.contains(&format!("error: cannot listen on {addr}: address already in use\nhint: ")),
            "{stderr}"
        );
    }
}

#[test]
fn a_peer_that_is_started_before_its_broker_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    // Nobody listens there any more, and nobody else takes a port of this host.
    let addr = TcpListener::bind((own_host(), 0)).unwrap().local_addr().unwrap().to_string();
    let args = ["join", "--min-peers", "2", "--rounds", "1"];
    let mut early = Program::start(dir.path(), &[&args[..], &["--peer", "early", "--broker", &addr]].concat());
    early.until_said("; waiting for one");
    let late =
        Program::start(dir.path(), &[&args[..], &["--peer", "late", "--host-broker", "--listen", &addr]].concat());
    let ((early, _, stderr), (late, ..)) = (early.end(), late.end());
    assert_eq!((early, late), (Some(0), Some(0)), "{stderr}");
}

#[test]
fn a_broker_that_does_not_answer_is_exit_code_3() {
    let dir = tempfile::tempdir().unwrap();
    // The port is taken, and nobody listens.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let addr = socket.local_addr().unwrap().to_string();
    let join = ["join", "--broker", &addr, "--wait-timeout", "10s"];
    let (code, stdout, stderr) = Program::start(dir.path(), &join).end();
    assert_eq!((code, stdout.as_str()), (Some(3), ""), "{stderr}");
    assert!(stderr.contains("; waiting for one\n"), "{stderr}");
    assert!(stderr.contains(&format!("error: no broker answers at {addr}")), "{stderr}");
    assert!(stderr.contains("hint: start one with `rodizio broker`"), "{stderr}");
    assert_eq!(std::fs::read_dir(dir.path().join("runs")).unwrap().count(), 0, "nothing happened, and nothing is left");
}

#[test]
fn waiting_too_long_is_exit_code_4() {
    let dir = tempfile::tempdir().unwrap();
    let (_program, addr) = broker(dir.path());
    let args = ["join", "--broker", &addr, "--wait-timeout", "300ms"];
    let (code, stdout, stderr) = Program::start(dir.path(), &args).end();
    assert_eq!((code, stdout.as_str()), (Some(4), ""), "{stderr}");
    assert!(stderr.contains("error: gave up waiting: 1 of 2 peers have joined"), "{stderr}");
}

#[test]
fn a_state_that_is_damaged_is_exit_code_5() {
    let dir = tempfile::tempdir().unwrap();
    let run = || Program::start(dir.path(), &["run", "--peers", "2", "--rounds", "1", "--run-dir", "first"]).end();
    assert_eq!(run().0, Some(0));
    let state = dir.path().join("first/peers/peer-2/state");
    let mut bytes = std::fs::read(&state).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&state, bytes).unwrap();
    let (code, _, stderr) = run();
    assert_eq!(code, Some(5), "{stderr}");
    assert!(stderr.contains("error: peer-2: first/peers/peer-2/state is damaged"), "{stderr}");
}

#[test]
fn a_wrong_log_filter_is_a_mistake_of_usage() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_rodizio"));
    command.arg("broker").current_dir(dir.path()).env_clear().env("RODIZIO_LOG", "rodizio=loud");
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).starts_with("error: RODIZIO_LOG is not a filter"), "{}", stderr(&output));
}
