//! What `run` and `join` have in common: a run directory, and the loop that writes down and shows what peers tell.

use std::collections::BTreeMap;
use std::future::Future;
use std::io::ErrorKind;
use std::mem;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::anyhow;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::cli::narrator::Narrator;
use crate::cli::output::{Notice, Output};
use crate::cli::{Exit, Failure};
use crate::cluster::Stop;
use crate::config::{Group, Key, Layers, Settings, Source};
use crate::events::{Entry, Recorder};
use crate::rundir::{CONFIG, RunDir};

/// How often it is looked whether something lasts.
const TICK: Duration = Duration::from_millis(200);

/// Whether a key that peers do not compare changes what a run with this directory would give.
fn is_own(key: &Key) -> bool {
    key.group == Group::Data || key.name == "peers"
}

/// Where the results go: where the user says, or into a new directory.
pub fn choose_run_dir(layers: &mut Layers, settings: &Settings) -> PathBuf {
    settings.run_dir.clone().unwrap_or_else(|| {
        let run_dir = new_run_dir(Path::new("runs"), &settings.federation, SystemTime::now());
        layers.derive("run_dir", &run_dir.display().to_string(), "a new one");
        run_dir
    })
}

/// Whether the run directory is a new one that [`choose_run_dir`] chose.
pub fn is_derived(layers: &Layers) -> bool {
    matches!(layers.source("run_dir"), Source::Derived(_))
}

/// `runs/FEDERATION-TIME`, with a number behind it if it is there already. It is created at once: another peer that
/// starts in the same second finds it taken.
fn new_run_dir(runs: &Path, federation: &str, now: SystemTime) -> PathBuf {
    let time = humantime::format_rfc3339_seconds(now).to_string();
    let time: String =
        time.chars().filter_map(|c| if c == 'T' { Some('-') } else { c.is_ascii_digit().then_some(c) }).collect();
    let path = |suffix: &str| runs.join(format!("{federation}-{time}{suffix}"));
    let numbered = (2..).map(|number| path(&format!("-{number}")));
    let mut candidates = std::iter::once(path("")).chain(numbered);
    // Any other failure than a name that is taken comes again, with its reason, when the directory is opened.
    let _ = std::fs::create_dir_all(runs);
    let is_mine =
        |path: &PathBuf| !matches!(std::fs::create_dir(path), Err(error) if error.kind() == ErrorKind::AlreadyExists);
    candidates.find(is_mine).expect("there are more numbers than directories")
}

/// The settings of the run that left its results in `run_dir` earlier, if one did.
pub fn earlier_settings(run_dir: &Path) -> Result<Option<Settings>, Failure> {
    let Some(text) = RunDir::earlier_config(run_dir)? else { return Ok(None) };
    let mut layers = Layers::new();
    layers.file(&run_dir.join(CONFIG).display().to_string(), &text)?;
    Ok(Some(layers.settings()?))
}

/// Refuses to go on, in a run directory, with another configuration than the one of before.
pub fn check_same(run_dir: &Path, earlier: &Settings, settings: &Settings) -> Result<(), Failure> {
    let compared = |settings: &Settings| {
        let mut entries: BTreeMap<String, String> = settings.shared().entries();
        entries.insert("federation".into(), settings.federation.clone());
        let own = settings.values().into_iter().filter(|(key, _)| is_own(key));
        entries.extend(own.map(|(key, value)| (key.name.to_owned(), value.to_string())));
        entries
    };
    let (before, now) = (compared(earlier), compared(settings));
    let Some((key, before)) = before.iter().find(|(key, value)| now.get(*key) != Some(*value)) else { return Ok(()) };
    let now = now.get(key).map_or("unknown", String::as_str);
    let error = anyhow!("{} holds a run with {key} = {before}, and now {key} = {now}", run_dir.display());
    let hint = format!("set {key} = {before} to go on with that run, or start another one with a new --run-dir");
    Err(Failure::new(Exit::Usage, error).hint(hint))
}

/// Tells the narrator what earlier runs left in the log of events. What cannot be read is left out.
pub fn recall(run_dir: &RunDir, narrator: &mut Narrator) -> Result<(), Failure> {
    for line in run_dir.earlier_events()? {
        if let Ok(entry) = Entry::from_line(&line?) {
            narrator.recall(&entry);
        }
    }
    Ok(())
}

/// Everything that hears of entries.
pub struct Audience<'a, 'shell> {
    /// Writes them down.
    pub recorder: Recorder,
    /// Makes notices of them.
    pub narrator: Narrator,
    /// Shows those.
    pub output: &'a mut Output<'shell>,
}

impl Audience<'_, '_> {
    /// Hears entries until `ended`, and all that came before it.
    pub async fn follow<T>(
        &mut self,
        entries: &mut UnboundedReceiver<Entry>,
        stop: &Stop,
        ended: impl Future<Output = T>,
    ) -> T {
        let mut ended = std::pin::pin!(ended);
        let mut stopping = std::pin::pin!(stop.clone().requested());
        let mut is_stopping = false;
        let mut tick = tokio::time::interval(TICK);
        let result = loop {
            tokio::select! {
                biased;
                // Before the entries, some of which come of it: peers that leave then are no news.
                () = &mut stopping, if !is_stopping => self.stopping(&mut is_stopping),
                Some(entry) = entries.recv() => {
                    // The request may have come after it was looked for, and this entry of it.
                    if stop.is_requested() {
                        self.stopping(&mut is_stopping);
                    }
                    self.hear(&entry);
                }
                result = &mut ended => break result,
                _ = tick.tick() => {
                    self.catch_up();
                    if let Some(notice) = self.narrator.tick(Instant::now()) {
                        self.show(&notice);
                    }
                }
            }
        };
        while let Ok(entry) = entries.try_recv() {
            self.hear(&entry);
        }
        self.narrator.flush().iter().for_each(|notice| self.show(notice));
        if let Some(text) = self.recorder.close() {
            self.show(&Notice::Warning { text });
        }
        self.write_back(stop).await;
        result
    }

    /// The peers were asked to stop: that is told once.
    fn stopping(&mut self, is_told: &mut bool) {
        if !mem::replace(is_told, true) {
            let notice = self.narrator.stopping();
            self.show(&notice);
        }
    }

    /// The results are what it was all for: waits until a full disk takes them, or the user has enough.
    async fn write_back(&mut self, stop: &Stop) {
        if !self.recorder.is_behind() {
            return;
        }
        let dir = self.recorder.run_dir().path().display().to_string();
        let text = format!("the results wait for room on the disk of {dir}; Ctrl-C ends without them");
        self.show(&Notice::Warning { text });
        while self.recorder.is_behind() && !stop.is_requested() {
            tokio::select! {
                () = stop.clone().requested() => {}
                () = tokio::time::sleep(TICK) => self.catch_up(),
            }
        }
        if self.recorder.is_behind() {
            let text =
                format!("{dir} lacks the last results; the peers keep the last model: make room and start again");
            self.show(&Notice::Warning { text });
        }
    }

    fn catch_up(&mut self) {
        if let Some(text) = self.recorder.catch_up() {
            self.show(&Notice::Warning { text });
        }
    }

    /// Shows the result, if there is one.
    pub fn conclude(&mut self) -> Result<bool, Failure> {
        let Some(summary) = self.narrator.summary(self.recorder.run_dir().path()) else { return Ok(false) };
        self.output.show(&Notice::Finished(Box::new(summary)))?;
        Ok(true)
    }

    fn hear(&mut self, entry: &Entry) {
        if let Some(text) = self.recorder.record(entry) {
            self.show(&Notice::Warning { text });
        }
        self.narrator.hear(entry).iter().for_each(|notice| self.show(notice));
    }

    fn show(&mut self, notice: &Notice) {
        // When nobody watches any more, training goes on.
        let _ = self.output.show(notice);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_run_directory_is_named_by_federation_and_time() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_778_772_612);
        let dir = tempfile::tempdir().unwrap();
        let runs = dir.path().join("runs");
        assert_eq!(new_run_dir(&runs, "ward", now), runs.join("ward-20260514-153012"));
        assert_eq!(new_run_dir(&runs, "ward", now), runs.join("ward-20260514-153012-2"), "the first is taken");
    }

    #[test]
    fn a_run_goes_on_with_the_configuration_it_began_with() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(earlier_settings(dir.path()).unwrap(), None);
        let layers = Layers::new();
        let settings = layers.settings().unwrap();
        RunDir::open(dir.path()).unwrap().write_config(&settings.to_toml(&layers)).unwrap();
        let earlier = earlier_settings(dir.path()).unwrap().unwrap();
        check_same(dir.path(), &earlier, &settings).unwrap();
        for (key, text) in [("rounds", "7"), ("batch_size", "3"), ("alpha", "9"), ("federation", "other")] {
            let mut layers = Layers::new();
            layers.flag(Key::find(key).unwrap(), text).unwrap();
            let failure = check_same(dir.path(), &earlier, &layers.settings().unwrap()).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(failure.error.to_string().ends_with(&format!("and now {key} = {text}")), "{}", failure.error);
        }
        let mut layers = Layers::new();
        layers.flag(Key::find("broker").unwrap(), "elsewhere:1883").unwrap();
        check_same(dir.path(), &earlier, &layers.settings().unwrap()).unwrap();
    }
}
