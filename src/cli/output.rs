//! What a person sees of a federation: a line a round, progress while it lasts, and the result.
//!
//! The result goes to stdout, everything else to stderr. On a terminal rounds are rows of a table and progress is
//! redrawn in place; elsewhere every line says what its numbers are, and progress is left out.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use console::{Alignment, Style, pad_str};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::cli::args::OutputArgs;
use crate::cli::{Shell, Stream};
use crate::events::Scores;
use crate::protocol::Reason;
use crate::types::{Digest, PeerId, Round, Term};

/// Something worth telling.
#[derive(Debug, Clone, PartialEq)]
pub enum Notice {
    /// What the program waits for, as a sentence.
    Waiting {
        /// The sentence.
        text: String,
    },
    /// How far a step of the round has come.
    Phase {
        /// What is done.
        text: String,
        /// How much of it, in any unit.
        done: u64,
        /// How much there is; 0 if that is not known.
        total: u64,
    },
    /// A round was committed.
    Round(RoundLine),
    /// Something that is good to know, over one or more lines.
    Info {
        /// The text.
        text: String,
    },
    /// Something that the user should know, as a sentence.
    Warning {
        /// The sentence.
        text: String,
    },
    /// Training is over.
    Finished(Box<Summary>),
}

/// How good a model is on all held-out examples, as far as it is known and fits the task.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Quality {
    /// Accuracy, 0 to 1.
    pub accuracy: Option<f64>,
    /// Mean loss.
    pub loss: Option<f64>,
    /// What else there is.
    pub scores: Scores,
}

impl Quality {
    /// What models are compared by first.
    fn main(&self) -> (&'static str, Option<f64>) {
        match self.scores.val_rmse {
            Some(rmse) => ("rmse", Some(rmse)),
            None => ("accuracy", self.accuracy),
        }
    }

    /// What there is beside that and the loss, each with its name and a short one.
    fn others(&self) -> impl Iterator<Item = (&'static str, &'static str, f64)> {
        let Scores { val_auc, val_macro_f1, val_perplexity, .. } = self.scores;
        let all = [("AUC", "AUC", val_auc), ("macro F1", "F1", val_macro_f1), ("perplexity", "perpl.", val_perplexity)];
        all.into_iter().filter_map(|(name, short, value)| Some((name, short, value?)))
    }
}

/// A committed round.
#[derive(Debug, Clone, PartialEq)]
pub struct RoundLine {
    /// Its number.
    pub round: Round,
    /// How many rounds there are at most.
    pub rounds: u64,
    /// The term of the leader that committed it.
    pub term: Term,
    /// That leader.
    pub leader: PeerId,
    /// How good its model is.
    pub quality: Quality,
    /// How many updates are in the model.
    pub contributors: usize,
    /// How many peers were in the roster.
    pub members: usize,
    /// How long it took.
    pub seconds: f64,
    /// How many bytes the peers of this command sent.
    pub bytes: u64,
}

/// The result.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Why training is over, as a word.
    pub reason: String,
    /// How many rounds made a model.
    pub rounds: u64,
    /// How good the last model is.
    pub quality: Quality,
    /// The last model's blob.
    pub digest: Digest,
    /// The last model's file.
    pub model: PathBuf,
    /// Who led each round, from the first; `None` for a round that was not seen.
    pub leaders: Vec<Option<PeerId>>,
    /// How long it all took.
    pub seconds: f64,
    /// How many bytes the peers of this command sent.
    pub bytes_sent: u64,
    /// Where the results are.
    pub run_dir: PathBuf,
}

/// Writes notices for people, or the result for programs.
#[derive(Debug)]
pub struct Output<'a> {
    shell: &'a mut Shell,
    args: OutputArgs,
    bar: ProgressBar,
    drawing: Drawing,
    /// The names of the two columns that depend on the task, once the header is printed.
    header: Option<[&'static str; 2]>,
    last_waiting: String,
}

/// What the bar shows now; changing its style redraws it, so that is done only when it changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Drawing {
    Nothing,
    Spinner,
    Bar,
}

impl<'a> Output<'a> {
    /// Output to the shell's streams; progress is drawn if stderr is a terminal.
    pub fn new(shell: &'a mut Shell, args: OutputArgs) -> Self {
        let draws = shell.stderr.is_terminal && !args.quiet;
        let target = if draws { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self::drawing_on(shell, args, target)
    }

    fn drawing_on(shell: &'a mut Shell, args: OutputArgs, target: ProgressDrawTarget) -> Self {
        let bar = ProgressBar::with_draw_target(None, target);
        // Until there is something to show, what is drawn again after another line is nothing.
        bar.set_style(ProgressStyle::with_template("").expect("an empty template parses"));
        Self { shell, args, bar, drawing: Drawing::Nothing, header: None, last_waiting: String::new() }
    }

    /// The line that is redrawn in place. Whoever else writes to stderr does so inside its `suspend`.
    pub fn bar(&self) -> ProgressBar {
        self.bar.clone()
    }

    /// Shows one notice.
    pub fn show(&mut self, notice: &Notice) -> io::Result<()> {
        match notice {
            Notice::Waiting { text } => self.waiting(&printable(text)),
            Notice::Phase { text, done, total } => self.phase(&printable(text), *done, *total),
            Notice::Round(line) => self.round(line),
            Notice::Info { text } => self.info(text),
            Notice::Warning { text } => self.warning(&printable(text)),
            Notice::Finished(summary) => self.finished(summary),
        }
    }

    /// Said once where lines stay, drawn where they do not.
    fn waiting(&mut self, text: &str) -> io::Result<()> {
        if self.shell.stderr.is_terminal {
            self.spin(text);
        } else if !self.args.quiet && self.last_waiting != text {
            writeln!(self.shell.stderr.out, "{text}")?;
        }
        self.last_waiting = text.to_owned();
        Ok(())
    }

    fn phase(&mut self, text: &str, done: u64, total: u64) -> io::Result<()> {
        if total == 0 {
            self.spin(text);
            return Ok(());
        }
        self.draw_as(Drawing::Bar, "{spinner} {msg} {bar:24} {percent:>3} %");
        self.bar.set_length(total);
        self.bar.set_position(done.min(total));
        self.bar.set_message(text.to_owned());
        Ok(())
    }

    fn round(&mut self, line: &RoundLine) -> io::Result<()> {
        self.last_waiting.clear();
        if self.args.quiet {
            return Ok(());
        }
        if !self.shell.stderr.is_terminal {
            return self.print(&plain_round(line));
        }
        let names = [line.quality.main().0, line.quality.others().next().map_or("", |(_, short, _)| short)];
        // The first rounds may be told before it is known what else there is.
        if self.header.replace(names) != Some(names) {
            let dim = self.shell.stderr.style(Style::new().dim());
            self.print(&dim.apply_to(header(names)).to_string())?;
        }
        self.print(&row(line, &self.shell.stderr))
    }

    fn info(&mut self, text: &str) -> io::Result<()> {
        if self.args.quiet {
            return Ok(());
        }
        text.lines().try_for_each(|line| self.print(&printable(line)))
    }

    fn warning(&mut self, text: &str) -> io::Result<()> {
        let yellow = self.shell.stderr.style(Style::new().yellow().bold());
        self.print(&format!("{} {text}", yellow.apply_to("warning:")))
    }

    fn finished(&mut self, summary: &Summary) -> io::Result<()> {
        self.bar.finish_and_clear();
        let out = &mut self.shell.stdout.out;
        if self.args.json {
            writeln!(out, "{:#}", summary_json(summary))?;
        } else {
            write!(out, "{}", summary_text(summary))?;
        }
        out.flush()
    }

    fn spin(&mut self, text: &str) {
        self.draw_as(Drawing::Spinner, "{spinner} {wide_msg}");
        self.bar.set_message(text.to_owned());
    }

    fn draw_as(&mut self, drawing: Drawing, template: &str) {
        if self.drawing == drawing || self.bar.is_hidden() {
            return;
        }
        let style = ProgressStyle::with_template(template).expect("the templates are constants that parse");
        self.bar.set_style(style);
        // Ticking by itself shows that the program lives even while nothing is told.
        self.bar.enable_steady_tick(Duration::from_millis(120));
        self.drawing = drawing;
    }

    /// Writes a line that stays, above the line that is redrawn.
    fn print(&mut self, line: &str) -> io::Result<()> {
        let stderr = &mut self.shell.stderr;
        if self.drawing == Drawing::Nothing {
            return writeln!(stderr.out, "{line}");
        }
        self.bar.suspend(|| writeln!(stderr.out, "{line}"))
    }
}

impl Drop for Output<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Names, widths and sides of the table's columns.
const COLUMNS: [(&str, usize, Alignment); 8] = [
    ("round", 7, Alignment::Right),
    ("leader", 12, Alignment::Left),
    ("", 8, Alignment::Right),
    ("loss", 7, Alignment::Right),
    ("", 7, Alignment::Right),
    ("updates", 7, Alignment::Right),
    ("time", 10, Alignment::Right),
    ("bytes", 8, Alignment::Right),
];

/// The line above the rows; `of_task` names the columns that have no name of their own.
fn header(of_task: [&str; 2]) -> String {
    let mut of_task = of_task.into_iter();
    let mut named = |name: &'static str| if name.is_empty() { of_task.next().unwrap_or_default() } else { name };
    table_line(&COLUMNS.map(|(name, _, _)| named(name).to_owned()))
}

fn row(line: &RoundLine, stream: &Stream) -> String {
    // Most rounds are led by the first who was elected.
    let term = if line.term > Term(0) { format!(", term {}", line.term) } else { String::new() };
    let leader = stream.style(Style::new().cyan()).apply_to(format!("{}{term}", line.leader)).to_string();
    let main = stream.style(Style::new().bold()).apply_to(decimals(line.quality.main().1)).to_string();
    table_line(&[
        format!("{}/{}", line.round, line.rounds),
        leader,
        main,
        decimals(line.quality.loss),
        line.quality.others().next().map_or_else(String::new, |(.., value)| decimals(Some(value))),
        match line.members {
            0 => line.contributors.to_string(),
            members => format!("{}/{members}", line.contributors),
        },
        human_seconds(line.seconds),
        human_bytes(line.bytes),
    ])
}

/// A cell that is too long loses its end, so that the columns stay.
fn table_line(cells: &[String; 8]) -> String {
    let padded = cells.iter().zip(COLUMNS).map(|(cell, (_, width, side))| pad_str(cell, width, side, Some("…")));
    padded.collect::<Vec<_>>().join("  ")
}

fn plain_round(line: &RoundLine) -> String {
    let (name, main) = line.quality.main();
    let other = line.quality.others().next();
    let other = other.map_or_else(String::new, |(name, _, value)| format!(", {name} {}", decimals(Some(value))));
    format!(
        "round {}/{}: term {}, leader {}, {name} {}, loss {}{other}, {}, {}, {}",
        line.round,
        line.rounds,
        line.term,
        line.leader,
        decimals(main),
        decimals(line.quality.loss),
        updates(line),
        human_seconds(line.seconds),
        human_bytes(line.bytes),
    )
}

/// Who joins in a round does not know how many members it has.
fn updates(line: &RoundLine) -> String {
    let plural = if line.contributors == 1 { "" } else { "s" };
    match line.members {
        0 => format!("{} update{plural}", line.contributors),
        members => format!("{} update{plural} of {members} peers", line.contributors),
    }
}

fn summary_text(summary: &Summary) -> String {
    let plural = if summary.rounds == 1 { "" } else { "s" };
    let mut text = format!(
        "finished after {} round{plural} in {}: {}\n",
        summary.rounds,
        human_seconds(summary.seconds),
        reason_sentence(&summary.reason)
    );
    let (name, main) = summary.quality.main();
    let mut lines = vec![(name, main), ("loss", summary.quality.loss)];
    lines.extend(summary.quality.others().map(|(name, _, value)| (name, Some(value))));
    for (name, value) in lines {
        text += &format!("  {name:<9} {}\n", decimals(value));
    }
    text += &format!("  leaders   {}\n", turns(&summary.leaders));
    text += &format!("  sent      {}\n", human_bytes(summary.bytes_sent));
    text += &format!("  digest    {}\n", summary.digest);
    text += &format!("  model     {}\n", summary.model.display());
    text
}

/// Who led how often: `peer-1 7, peer-2 6`.
fn turns(leaders: &[Option<PeerId>]) -> String {
    let mut turns: BTreeMap<&PeerId, usize> = BTreeMap::new();
    for leader in leaders.iter().flatten() {
        *turns.entry(leader).or_default() += 1;
    }
    let turns: Vec<_> = turns.iter().map(|(leader, turns)| format!("{leader} {turns}")).collect();
    if turns.is_empty() { "-".to_owned() } else { turns.join(", ") }
}

fn summary_json(summary: &Summary) -> serde_json::Value {
    let mut json = serde_json::json!({
        "reason": summary.reason,
        "rounds": summary.rounds,
        "val_accuracy": summary.quality.accuracy,
        "val_loss": summary.quality.loss,
        "digest": summary.digest.to_string(),
        "model": summary.model,
        "leaders": summary.leaders,
        "seconds": summary.seconds,
        "bytes_sent": summary.bytes_sent,
        "run_dir": summary.run_dir,
    });
    let Scores { val_macro_f1, val_auc, val_rmse, val_perplexity } = summary.quality.scores;
    let scores = [
        ("val_macro_f1", val_macro_f1),
        ("val_auc", val_auc),
        ("val_rmse", val_rmse),
        ("val_perplexity", val_perplexity),
    ];
    for (key, value) in scores {
        if let Some(value) = value {
            json[key] = value.into();
        }
    }
    json
}

fn decimals(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"))
}

/// Text may come from another peer: it must not move the cursor.
fn printable(text: &str) -> String {
    text.replace(char::is_control, " ")
}

/// A reason of `events.jsonl` for people. It may come from another process, so any word is taken.
fn reason_sentence(word: &str) -> String {
    let known =
        [Reason::Rounds, Reason::TargetAccuracy, Reason::Patience].into_iter().find(|reason| reason.name() == word);
    known.map_or_else(|| printable(word), |reason| reason.to_string())
}

/// Bytes with a decimal unit: `1.2 MB`.
pub fn human_bytes(bytes: u64) -> String {
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1000.0;
    let mut units = ["kB", "MB", "GB", "TB", "PB", "EB"].iter();
    let mut unit = units.next().expect("the list is not empty");
    // 999.95 would be printed as 1000.0.
    while value >= 999.95 {
        value /= 1000.0;
        unit = units.next().expect("2^64 bytes are 18 EB");
    }
    format!("{value:.1} {unit}")
}

/// A span of time in at most two units: `84 ms`, `2.1 s`, `3 min 05 s`, `1 h 02 min`.
pub fn human_seconds(seconds: f64) -> String {
    // Rounded first, so that 59.96 s is one minute and not 60.0 s.
    let tenths = (seconds * 10.0).round() as u64;
    if seconds < 0.0995 {
        return format!("{:.0} ms", seconds * 1000.0);
    }
    match tenths / 10 {
        0..60 => format!("{}.{} s", tenths / 10, tenths % 10),
        whole @ 60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        whole => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use console::{measure_text_width, strip_ansi_codes};
    use indicatif::TermLike;

    use super::*;
    use crate::cli::tests::Captured;

    fn line(round: u64, leader: &str) -> RoundLine {
        RoundLine {
            round: Round(round),
            rounds: 20,
            term: Term(0),
            leader: PeerId::new(leader).unwrap(),
            quality: quality(Some(0.91234), Some(0.3)),
            contributors: 4,
            members: 5,
            seconds: 1.26,
            bytes: 1_234_567,
        }
    }

    fn quality(accuracy: Option<f64>, loss: Option<f64>) -> Quality {
        Quality { accuracy, loss, scores: Scores::default() }
    }

    fn summary() -> Box<Summary> {
        let leader = |name| Some(PeerId::new(name).unwrap());
        Box::new(Summary {
            reason: "target_accuracy".into(),
            rounds: 12,
            quality: quality(Some(0.9512), None),
            digest: Digest::of(b"model"),
            model: "runs/first/model.safetensors".into(),
            leaders: vec![None, leader("peer-2"), leader("peer-1"), leader("peer-2")],
            seconds: 75.0,
            bytes_sent: 2_000_000,
            run_dir: "runs/first".into(),
        })
    }

    fn waiting() -> Notice {
        Notice::Waiting { text: "2 of 3 peers have joined; waiting for 1 (--min-peers 3)".into() }
    }

    /// Shows the notices; returns stdout and stderr. On a terminal the progress is drawn into stderr too.
    fn shown(notices: &[Notice], args: OutputArgs, terminal: bool) -> (String, String) {
        let (stdout, stderr) = (Captured::default(), Captured::default());
        let mut shell = Shell {
            args: Vec::new(),
            env: BTreeMap::new(),
            stdout: stdout.stream(terminal),
            stderr: stderr.stream(terminal),
        };
        let target = match terminal {
            true => ProgressDrawTarget::term_like(Box::new(stderr.clone())),
            false => ProgressDrawTarget::hidden(),
        };
        let mut output = Output::drawing_on(&mut shell, args, target);
        notices.iter().for_each(|notice| output.show(notice).unwrap());
        drop(output);
        (stdout.text(), stderr.text())
    }

    /// A terminal of 80 columns that keeps what is written and marks a cleared line.
    impl TermLike for Captured {
        fn width(&self) -> u16 {
            80
        }
        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn write_line(&self, text: &str) -> io::Result<()> {
            io::Write::write_all(&mut self.clone(), format!("{text}\n").as_bytes())
        }
        fn write_str(&self, text: &str) -> io::Result<()> {
            io::Write::write_all(&mut self.clone(), text.as_bytes())
        }
        fn clear_line(&self) -> io::Result<()> {
            self.write_str("<clear>")
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn elsewhere_than_on_a_terminal_a_round_is_a_line_that_explains_itself() {
        let (stdout, stderr) = shown(&[Notice::Round(line(3, "peer-2"))], OutputArgs::default(), false);
        assert_eq!(stdout, "");
        let expected =
            "round 3/20: term 0, leader peer-2, accuracy 0.9123, loss 0.3000, 4 updates of 5 peers, 1.3 s, 1.2 MB\n";
        assert_eq!(stderr, expected);
        let late = RoundLine { contributors: 1, members: 0, ..line(3, "peer-2") };
        assert_eq!(updates(&late), "1 update");
        assert_eq!(updates(&RoundLine { members: 2, ..late }), "1 update of 2 peers");
    }

    #[test]
    fn on_a_terminal_rounds_are_rows_of_one_table_of_80_columns() {
        let rows = [
            header(["accuracy", "AUC"]),
            row(&line(1, "p"), &Captured::default().stream(true)),
            row(&line(20, &"x".repeat(64)), &Captured::default().stream(true)),
            row(&RoundLine { quality: Quality::default(), ..line(7, "peer-2") }, &Captured::default().stream(false)),
        ];
        let widths = rows.each_ref().map(|row| measure_text_width(row));
        assert_eq!(widths, [80; 4]);
        let expected = "   1/20  p               0.9123   0.3000               4/5       1.3 s    1.2 MB";
        assert_eq!(strip_ansi_codes(&rows[1]), expected);
        assert!(rows[1].contains('\u{1b}') && !rows[3].contains('\u{1b}'));
        assert!(rows[2].contains("xxx…"));
        let rounds = [Notice::Round(line(1, "a")), Notice::Round(line(2, "b"))];
        let (_, stderr) = shown(&rounds, OutputArgs::default(), true);
        assert_eq!(stderr.matches("accuracy").count(), 1, "the header is printed once: {stderr}");
    }

    #[test]
    fn what_a_model_is_measured_by_fits_its_task() {
        let told = |scores: Scores| {
            let line = RoundLine { quality: Quality { scores, ..quality(Some(0.5), Some(0.25)) }, ..line(1, "p") };
            let notices = [Notice::Round(line.clone())];
            let summary = Summary { quality: line.quality, ..*summary() };
            let (_, plain) = shown(&notices, OutputArgs::default(), false);
            let (_, table) = shown(&notices, OutputArgs::default(), true);
            let header = strip_ansi_codes(table.lines().next().unwrap()).into_owned();
            let header = header.split_whitespace().collect::<Vec<_>>();
            (plain, header[2..5].join(" "), summary_text(&summary), summary_json(&summary))
        };
        let (plain, header, ..) = told(Scores { val_rmse: Some(0.5), ..Scores::default() });
        assert!(plain.contains("leader p, rmse 0.5000, loss 0.2500, 4 updates"), "{plain}");
        assert!(header.starts_with("rmse loss"), "{header}");
        let two_classes = Scores { val_auc: Some(0.75), val_macro_f1: Some(0.4), ..Scores::default() };
        let (plain, header, text, json) = told(two_classes);
        assert!(plain.contains("accuracy 0.5000, loss 0.2500, AUC 0.7500, 4 updates"), "{plain}");
        assert_eq!(header, "accuracy loss AUC");
        assert!(text.contains("  loss      0.2500\n  AUC       0.7500\n  macro F1  0.4000\n"), "{text}");
        assert_eq!((&json["val_auc"], json.get("val_rmse")), (&0.75.into(), None));
        let (plain, header, ..) = told(Scores { val_perplexity: Some(8.0), ..Scores::default() });
        assert!(plain.contains("loss 0.2500, perplexity 8.0000"), "{plain}");
        assert_eq!(header, "accuracy loss perpl.");
    }

    #[test]
    fn progress_is_drawn_in_place_and_cleared_before_a_line_that_stays() {
        let phase = Notice::Phase { text: "training".into(), done: 5, total: 10 };
        let notices = [waiting(), phase, Notice::Round(line(1, "a")), Notice::Finished(summary())];
        let (stdout, stderr) = shown(&notices, OutputArgs::default(), true);
        let at = |what: &str| stderr.find(what).unwrap_or_else(|| panic!("no {what:?} in {stderr:?}"));
        assert!(at("2 of 3 peers") < at("training") && at("training") < at("1/20"));
        assert!(stderr[at("training")..at("1/20")].contains("<clear>"), "{stderr:?}");
        assert!(stderr.contains("50 %"), "{stderr:?}");
        assert!(stdout.starts_with("finished after 12 rounds"));
    }

    #[test]
    fn nothing_is_drawn_before_there_is_something_to_show() {
        let info = |text: &str| Notice::Info { text: text.into() };
        let (_, stderr) = shown(&[info("one\ntwo"), info("three")], OutputArgs::default(), true);
        assert_eq!(stderr.replace("<clear>", "").trim_end(), "one\ntwo\nthree");
    }

    #[test]
    fn elsewhere_waiting_is_said_once_and_phases_are_left_out() {
        let phase = |done| Notice::Phase { text: "training".into(), done, total: 10 };
        let (_, stderr) = shown(&[waiting(), phase(1), waiting(), phase(2)], OutputArgs::default(), false);
        assert_eq!(stderr, "2 of 3 peers have joined; waiting for 1 (--min-peers 3)\n");
    }

    #[test]
    fn the_result_is_all_that_stdout_gets() {
        let notices = [waiting(), Notice::Round(line(1, "a")), Notice::Finished(summary())];
        let (stdout, _) = shown(&notices, OutputArgs::default(), false);
        let expected = format!(
            "finished after 12 rounds in 1 min 15 s: the target accuracy is reached\n  accuracy  0.9512\n  loss      -\n  \
             leaders   peer-1 1, peer-2 2\n  sent      2.0 MB\n  digest    {}\n  \
             model     runs/first/model.safetensors\n",
            Digest::of(b"model")
        );
        assert_eq!(stdout, expected);
        let (stdout, _) = shown(&notices, OutputArgs { json: true, ..OutputArgs::default() }, false);
        let parsed: serde_json::Value = serde_json::from_str(&stdout).unwrap();
        assert_eq!((&parsed["rounds"], &parsed["val_loss"]), (&12.into(), &serde_json::Value::Null));
        assert_eq!(parsed["digest"], Digest::of(b"model").to_string());
        assert_eq!(parsed["leaders"], serde_json::json!([null, "peer-2", "peer-1", "peer-2"]));
    }

    #[test]
    fn quiet_leaves_the_result_and_warnings() {
        let warning = Notice::Warning { text: "peer-3 left".into() };
        let info = Notice::Info { text: "5 peers".into() };
        let notices = [waiting(), info, warning, Notice::Round(line(1, "a")), Notice::Finished(summary())];
        let (stdout, stderr) = shown(&notices, OutputArgs { quiet: true, ..OutputArgs::default() }, false);
        assert_eq!(stderr, "warning: peer-3 left\n");
        assert!(stdout.starts_with("finished"));
    }

    #[test]
    fn text_from_elsewhere_cannot_move_the_cursor() {
        let notices = [Notice::Warning { text: "a\u{1b}[2Jb\nc".into() }];
        assert_eq!(shown(&notices, OutputArgs::default(), false).1, "warning: a [2Jb c\n");
    }

    #[test]
    fn numbers_are_for_people() {
        let bytes = [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB")];
        for (given, expected) in bytes.into_iter().chain([(1_234_567, "1.2 MB"), (u64::MAX, "18.4 EB")]) {
            assert_eq!(human_bytes(given), expected);
        }
        let seconds = [(0.0, "0 ms"), (0.0841, "84 ms"), (0.0996, "0.1 s"), (2.14, "2.1 s"), (59.96, "1 min 00 s")];
        for (given, expected) in seconds.into_iter().chain([(185.0, "3 min 05 s"), (3725.0, "1 h 02 min")]) {
            assert_eq!(human_seconds(given), expected);
        }
    }
}
