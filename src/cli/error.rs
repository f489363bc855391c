//! How the program ends, and how it says what went wrong.

use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use anyhow::anyhow;
use console::Style;

use crate::bench::BenchError;
use crate::broker::BrokerError;
use crate::cli::Stream;
use crate::cluster::ClusterError;
use crate::config::{ConfigError, Key};
use crate::events::WITHOUT_MODEL;
use crate::journal::JournalError;
use crate::node::{NodeError, Outcome};
use crate::peer::PeerError;
use crate::protocol::{Difference, UNKNOWN, Waiting};
use crate::rundir::RunDirError;
use crate::training::{COLUMN, DataError, PartitionError, ReadError, TrainError};
use crate::transport::mqtt::TransportError;
use crate::types::PeerId;

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

impl Exit {
    /// The meaning of an exit code.
    pub fn from_code(code: i32) -> Option<Self> {
        let all = [
            Exit::Finished,
            Exit::Internal,
            Exit::Usage,
            Exit::NoBroker,
            Exit::GaveUp,
            Exit::BadData,
            Exit::Interrupted,
        ];
        all.into_iter().find(|exit| *exit as i32 == code)
    }
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

    /// The same failure, said of one peer among many.
    #[must_use]
    pub fn of(self, peer: &PeerId) -> Self {
        Self { error: self.error.context(peer.clone()), ..self }
    }

    /// Why a peer that ran to an end has no result; `None` if it has one, or was asked to stop.
    pub fn of_outcome(outcome: &Outcome) -> Option<Self> {
        Some(match outcome {
            Outcome::Finished { .. } | Outcome::Interrupted => return None,
            Outcome::Refused { peer, difference } => {
                let Difference { key, theirs, mine } = difference;
                let error =
                    anyhow!("the federation has {key} = {theirs}, this peer has {key} = {mine} (told by {peer})");
                let hint = match Key::find(key) {
                    None if classes_of(difference).is_some() => classes_of(difference).unwrap_or_default(),
                    None if key.starts_with(COLUMN) && theirs != UNKNOWN && mine != UNKNOWN => {
                        "a column has numbers or categories at all peers alike, and one without values has numbers: \
                         correct the values, or say so with --task or list those of all peers with --categories"
                            .into()
                    }
                    None if ["columns", "example shape"].contains(&key.as_str()) || key.starts_with(COLUMN) => {
                        "the data of all peers need the same columns or shape: see `Data` in `rodizio join --help`"
                            .into()
                    }
                    Some(key) => format!("--{} {theirs} takes part, another --federation trains apart", key.flag()),
                    None => "take part with the same model, or train apart with another --federation".to_owned(),
                };
                Failure::new(Exit::Usage, error).hint(hint)
            }
            Outcome::GaveUp(waiting) => {
                let hint = match waiting {
                    Waiting::OtherConfiguration { .. } => "start all peers with the same settings, best from one file",
                    Waiting::Model { .. } => {
                        "start a peer whose state directory has that model; if all are lost, choose another --federation, \
                         with --init and a model.safetensors to go on from"
                    }
                    Waiting::Updates { .. } => {
                        "the warnings say why updates are missing; --min-updates says how many are needed, \
                         --round-timeout how long a round waits for them"
                    }
                    _ if waiting.is_for_lost_state() => {
                        "start each peer with the state directory it had; if too many are lost, choose another \
                         --federation, with --init and a model.safetensors to go on from"
                    }
                    _ => "--wait-timeout sets how long to wait",
                };
                Failure::new(Exit::GaveUp, anyhow!("gave up waiting: {waiting}")).hint(hint)
            }
            Outcome::LostBroker(reason) => {
                Failure::new(Exit::NoBroker, anyhow!("the broker was lost and did not come back: {reason}"))
                    .hint("the state is kept: run the same command again when the broker is back")
            }
            Outcome::FinishedWithoutModel => Failure::new(Exit::BadData, anyhow!(WITHOUT_MODEL))
                .hint(
                    "start it again together with a peer that has it, which stays for some seconds; or take it from the run \
                     directory of that one",
                ),
        })
    }

    /// Whether the reader of the output went away, as in `rodizio config | head -1`: nothing to complain about.
    pub fn is_broken_pipe(&self) -> bool {
        self.error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
    }

    /// Writes `error: …` and `hint: …`.
    pub fn report(&self, stderr: &mut Stream) -> io::Result<()> {
        let red = stderr.style(Style::new().red().bold());
        let cyan = stderr.style(Style::new().cyan().bold());
        writeln!(stderr.out, "{} {}", red.apply_to("error:"), with_causes(&self.error))?;
        match &self.hint {
            Some(hint) => writeln!(stderr.out, "{} {hint}", cyan.apply_to("hint:")),
            None => Ok(()),
        }
    }
}

/// An error with its causes, but for those that it names itself.
fn with_causes(error: &anyhow::Error) -> String {
    error
        .chain()
        .skip(1)
        .map(ToString::to_string)
        .fold(error.to_string(), |text, cause| if text.contains(&cause) { text } else { format!("{text}: {cause}") })
}

/// How peers with other classes of pictures agree on them, if that is what differs.
fn classes_of(difference: &Difference) -> Option<String> {
    let Difference { key, theirs, mine } = difference;
    let listed = |text: &str| -> Option<Vec<String>> {
        (key == "classes" && text.contains('|')).then(|| text.split('|').map(str::to_owned).collect())
    };
    let mut all = listed(theirs)?;
    let own = listed(mine)?;
    all.extend(own.into_iter().filter(|value| !listed(theirs).unwrap_or_default().contains(value)));
    Some(format!("start all peers with the same list, like --categories 'class={}'", all.join("|")))
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        let hint = error.hint();
        Failure::new(Exit::Usage, error).hint(hint)
    }
}

/// Somebody has named a place where nothing can be written; or the system failed.
fn exit_of(error: &io::Error) -> Exit {
    match error.kind() {
        ErrorKind::PermissionDenied
        | ErrorKind::NotFound
        | ErrorKind::NotADirectory
        | ErrorKind::AlreadyExists
        | ErrorKind::ReadOnlyFilesystem => Exit::Usage,
        _ => Exit::Internal,
    }
}

impl From<JournalError> for Failure {
    fn from(error: JournalError) -> Self {
        let exit = match error {
            JournalError::Io { ref source, .. } => exit_of(source),
            JournalError::Damaged { .. } | JournalError::DamagedBlob { .. } | JournalError::OtherVersion { .. } => {
                Exit::BadData
            }
            _ => Exit::Usage,
        };
        let hint = error.hint();
        Failure::new(exit, error).hint(hint)
    }
}

impl From<PeerError> for Failure {
    fn from(error: PeerError) -> Self {
        match error {
            PeerError::Journal(error) => error.into(),
            PeerError::Node(NodeError::Journal(error)) => error.into(),
            PeerError::Node(NodeError::Unfit(error)) => error.into(),
            PeerError::Node(_) | PeerError::LostTask => Failure::new(Exit::Internal, error),
            PeerError::State(_) => Failure::new(Exit::BadData, error)
                .hint("use the version of rodizio that wrote it, or join as a new peer with an empty --state-dir"),
            PeerError::NoAccuracy { .. } => Failure::new(Exit::Usage, error)
                .hint("leave --target-accuracy out (--patience and --rounds end it), or choose classes with --task"),
            PeerError::OtherData { .. } => Failure::new(Exit::Usage, error).hint(
                "go on with the data as they were, or begin a new run with --init and the model of this one; --val-data holds out a \
                 file of its own",
            ),
            PeerError::OtherSettings { .. } => Failure::new(Exit::Usage, error).hint(
                "give it the settings and data that it had; to train anew choose another --federation, or remove the directory",
            ),
            PeerError::Transport(TransportError::Address(_) | TransportError::NoAddress) => {
                Failure::new(Exit::Usage, error).hint("--broker takes HOST:PORT")
            }
            PeerError::Transport(TransportError::Subscription { .. }) => Failure::new(Exit::NoBroker, error)
                .hint("allow the filters there; NATS before 2.10 takes no dot in --peer, --federation and --prefix"),
            PeerError::Transport(TransportError::Lacks { lack, .. }) => {
                Failure::new(Exit::NoBroker, error).hint(lack.hint())
            }
            PeerError::Transport(_) => Failure::new(Exit::NoBroker, error)
                .hint("start one with `rodizio broker`, or name another with --broker HOST:PORT"),
            PeerError::Partition(PartitionError::TooManyPeers { .. }) => {
                Failure::new(Exit::BadData, error).hint("start fewer peers (--peers)")
            }
            PeerError::Partition(_) => {
                Failure::new(Exit::BadData, error).hint("--partition and its keys say how data are shared out")
            }
            PeerError::Read(error) => error.into(),
            PeerError::Pattern { files, .. } => Failure::new(Exit::Usage, error)
                .hint(format!("name one file with --data, or one of the {files} with --part I/{files}")),
            PeerError::Data(error) => TrainError::Data(error).into(),
            PeerError::Train(error) => error.into(),
            PeerError::Init { .. } => Failure::new(Exit::BadData, error)
                .hint("--init takes a model that this program exported, of the same model, sizes and data"),
        }
    }
}

impl From<TrainError> for Failure {
    fn from(error: TrainError) -> Self {
        let hint = match &error {
            TrainError::Data(DataError::UnknownClass { .. }) => {
                "leave such examples out, or found a federation with all classes under another --federation"
            }
            TrainError::Data(DataError::OneClass { .. }) => {
                "two classes are needed: choose the label's column with --label"
            }
            TrainError::Data(DataError::OtherColumns) => "take part with the same columns as the others",
            TrainError::Data(_) => "see `Data` in `rodizio join --help`",
            TrainError::Setting(_) => return Failure::new(Exit::Usage, error),
            TrainError::Model(_) => {
                "choose with --model: linear and mlp take tables and pictures, the others pictures, char-lstm texts"
            }
            TrainError::Start { .. } => "--init takes a model of the same sizes, columns, categories and classes",
            TrainError::OtherModel { .. } => "take part with the same model: --model and its sizes",
            TrainError::Program { .. } => "--trainer takes a program and its arguments, as a shell would read them",
            TrainError::Layout(_) | TrainError::Stopped | TrainError::Failed(_) => {
                return Failure::new(Exit::BadData, error);
            }
        };
        Failure::new(Exit::BadData, error).hint(hint)
    }
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        let hint = error.hint.clone();
        Failure::new(Exit::BadData, error).hint(hint)
    }
}

impl From<ClusterError> for Failure {
    fn from(error: ClusterError) -> Self {
        match error {
            ClusterError::Read(error) => error.into(),
            ClusterError::Peer { peer, source } => Failure::from(source).of(&peer),
            ClusterError::Broker(BrokerError::InUse(_)) => Failure::new(Exit::NoBroker, error)
                .hint("another broker runs there: join it with --broker, or choose another port with --listen"),
            ClusterError::Broker(_) | ClusterError::Address { .. } => Failure::new(Exit::NoBroker, error)
                .hint("--listen takes an address of this machine and a port, like 127.0.0.1:1883"),
        }
    }
}

impl From<BenchError> for Failure {
    fn from(error: BenchError) -> Self {
        match error {
            BenchError::Memory { .. } => {
                Failure::new(Exit::Usage, error).hint("measure shorter blobs (--bytes), or fewer peers")
            }
            BenchError::Role { ref failure, .. } if failure.is_broker => Failure::new(Exit::NoBroker, error)
                .hint("--broker takes HOST:PORT; without it the embedded broker is measured"),
            BenchError::Stuck { .. } => Failure::new(Exit::GaveUp, error)
                .hint("the broker may drop messages: try shorter chunks (--chunk-bytes)"),
            BenchError::Role { .. } | BenchError::Start { .. } | BenchError::Machine(_) => {
                Failure::new(Exit::Internal, error)
            }
        }
    }
}

impl From<RunDirError> for Failure {
    fn from(error: RunDirError) -> Self {
        let exit = match &error {
            RunDirError::Io { source, .. } => exit_of(source),
            RunDirError::Export(_) => Exit::Internal,
        };
        Failure::new(exit, error)
            .hint("free some space there, or choose a directory that can be written with --run-dir")
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { exit: Exit::Internal, error, hint: None }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::new(Exit::Internal, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::tests::Captured;

    #[test]
    fn peers_whose_data_differ_are_told_what_to_do() {
        let refused = |key: &str, theirs: &str, mine: &str| {
            let difference = Difference { key: key.into(), theirs: theirs.into(), mine: mine.into() };
            let peer = PeerId::new("a").unwrap();
            Failure::of_outcome(&Outcome::Refused { peer, difference }).unwrap().hint.unwrap()
        };
        let hint = refused("classes", "cat|dog", "cat|fox");
        assert_eq!(hint, "start all peers with the same list, like --categories 'class=cat|dog|fox'");
        let hint = refused("column town", "categories", "numbers");
        assert!(hint.contains("correct the values") && hint.contains("one without values has numbers"), "{hint}");
        assert!(refused("column age", "numbers", "unknown").contains("same columns"));
    }

    #[test]
    fn a_cause_that_its_error_names_is_not_said_again() {
        let source = || io::Error::other("permission denied");
        let error = JournalError::Io { action: "create", path: "state".into(), source: source() };
        assert_eq!(with_causes(&error.into()), "cannot create state: permission denied");
        let error = anyhow::Error::from(source()).context("no results");
        assert_eq!(with_causes(&error), "no results: permission denied");
    }

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
    fn a_peer_that_is_refused_learns_the_key_and_both_values() {
        let difference = Difference { key: "batch_size".into(), theirs: "16".into(), mine: "32".into() };
        let failure = Failure::of_outcome(&Outcome::Refused { peer: PeerId::new("a").unwrap(), difference }).unwrap();
        assert_eq!(failure.exit, Exit::Usage);
        let said = failure.error.to_string();
        assert!(said.contains("batch_size = 16") && said.contains("batch_size = 32"), "{said}");
        assert!(failure.hint.unwrap().starts_with("--batch-size 16 "));
    }

    #[test]
    fn an_exit_code_is_read_back() {
        for exit in [Exit::Finished, Exit::Usage, Exit::GaveUp, Exit::Interrupted] {
            assert_eq!(Exit::from_code(exit as i32), Some(exit));
        }
        assert_eq!(Exit::from_code(77), None);
    }

    #[test]
    fn a_failure_of_one_peer_names_it() {
        let captured = Captured::default();
        let failure = Failure::new(Exit::BadData, anyhow!("its data are damaged"));
        failure.of(&PeerId::new("peer-3").unwrap()).report(&mut captured.stream(false)).unwrap();
        assert_eq!(captured.text(), "error: peer-3: its data are damaged\n");
    }

    #[test]
    fn a_state_directory_that_lies_is_bad_data_and_one_in_use_is_not() {
        let dir = std::path::PathBuf::from("state");
        assert_eq!(Failure::from(JournalError::InUse { dir: dir.clone() }).exit, Exit::Usage);
        assert_eq!(Failure::from(JournalError::Damaged { path: dir, problem: "x" }).exit, Exit::BadData);
    }
}
