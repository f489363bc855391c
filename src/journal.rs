//! What a peer keeps on disk: its name, its promises and the blobs it has said that it holds.
//!
//! ```text
//! <state directory>/
//!   lock               held while a process uses the directory
//!   peer               the peer's name, which one of that name it is, and its federation, as text
//!   state              the newest state: header, checksum, payload; of this directory's peer alone
//!   settings.json      what the peers of its federation agree on, by key
//!   examples           which examples it trained on and held out, like the state
//!   blobs/<digest>.blob
//!   blobs/<digest>.unflushed
//! ```
//!
//! A file appears under any other name only when it is whole: it is written beside it, flushed, renamed, and the directory is
//! flushed. So a crash at any instant leaves the file of before or the file of after, and a file that is neither was
//! damaged by something else. Such a file is refused and never replaced: a peer that forgot its promises could vote
//! twice.
//!
//! # What is kept
//!
//! The one state (it holds promises of the open round alone, and does not grow), and the blobs that it names: the newest
//! model, the model that was accepted last, the own update, and with the codec `topk` what no update has sent. With each
//! commit every blob is deleted that the state does not name any more, so that a few are left, whatever the number of
//! rounds. One file of a model is kept under a temporary name, for the next model to be written over it.
//!
//! A blob that no promise of this peer rests on is not flushed: the updates that a leader has pulled, and for some seconds the own
//! update and a model that a quorum has without this peer; until that is flushed, the model of before is kept as well. Such a
//! blob is whole after a crash of the process; one that is damaged after a loss of power is deleted, and pulled or made again.
//! Files of an interrupted write are deleted at the next opening.
//!
//! # A disk without room
//!
//! A write that fails leaves the file of before and no temporary file. [`JournalError::obstacle`] tells the failures
//! that pass when somebody makes room from those that need a person: after an input/output error, or when the
//! directory has vanished (another process may hold the one that comes back), nothing here is to be relied on.

mod blobs;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;

use self::blobs::{BLOB_END, SpareFile};
pub use self::blobs::{Blob, Blobs, Draft, read_blob};
use crate::types::{Digest, Incarnation, PeerId};

/// The version of the files that this code writes.
const VERSION: u32 = 2;

/// How a state file starts.
const STATE_MAGIC: &[u8; 8] = b"RDZSTATE";

/// Magic, version, incarnation, length of the payload, digest of the payload.
const STATE_HEADER_BYTES: usize = 8 + 4 + 8 + 8 + 32;

/// Random bytes in a generated name: two of a million peers share one with a chance of 1 in 37 million.
const GENERATED_NAME_BYTES: usize = 8;

/// How long a directory may be held by somebody else: a program that is being started has for a moment all that its parent had
/// open, and who was killed may not have ended yet.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// How often it is tried: there is no waiting for a lock with a limit.
const LOCK_POLL: Duration = Duration::from_millis(5);

const LOCK: &str = "lock";
const IDENTITY: &str = "peer";
const STATE: &str = "state";
const SETTINGS: &str = "settings.json";
const EXAMPLES: &str = "examples";
const BLOBS: &str = "blobs";

/// How the first line of an identity file starts; its version follows.
const IDENTITY_START: &str = "rodizio peer ";

/// How the last line of an identity file starts.
const CHECKSUM: &str = "checksum ";

/// The state directory of one peer, held by this process until the journal and every [`Blobs`] of it are dropped.
#[derive(Debug)]
pub struct Journal {
    disk: Arc<Disk>,
    incarnation: Incarnation,
    blobs: Blobs,
}

/// What a state directory held when it was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// The peer's name.
    pub peer: PeerId,
    /// The bytes saved last, if any ever were.
    pub state: Option<Vec<u8>>,
}

/// Why the state directory cannot be used. [`JournalError::hint`] says what to do.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system said no. What was on disk before is still there.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another process holds it.
    #[error("state directory {} is in use by another process", dir.display())]
    InUse {
        /// The directory.
        dir: PathBuf,
    },
    /// It has files and no identity.
    #[error("{} is neither empty nor a state directory: it holds {found:?}", dir.display())]
    Foreign {
        /// The directory.
        dir: PathBuf,
        /// The name of a file in it.
        found: String,
    },
    /// It belongs to another federation.
    #[error("state directory {} belongs to federation {found:?}, not {wanted:?}", dir.display())]
    OtherFederation {
        /// The directory.
        dir: PathBuf,
        /// The federation it belongs to.
        found: String,
        /// The one asked for.
        wanted: String,
    },
    /// It belongs to another peer.
    #[error("state directory {} belongs to peer {found:?}, not {wanted:?}", dir.display())]
    OtherPeer {
        /// The directory.
        dir: PathBuf,
        /// The peer it belongs to.
        found: PeerId,
        /// The one asked for.
        wanted: PeerId,
    },
    /// A file is cut short or changed.
    #[error("{} is damaged: {problem}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A blob is cut short or changed. Unlike promises it can be had again.
    #[error("{} is damaged: its content does not have the digest of its name", path.display())]
    DamagedBlob {
        /// Its file.
        path: PathBuf,
    },
    /// Another version wrote a file.
    #[error("{} has format {found}; this version of rodizio reads format {VERSION}", path.display())]
    OtherVersion {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
}

impl JournalError {
    /// What to do about it, in a line.
    pub fn hint(&self) -> &'static str {
        match self {
            JournalError::Io { .. } => "check the permissions and the free space of the state directory",
            JournalError::InUse { .. } => "stop the other process, or give this peer its own --state-dir",
            JournalError::Foreign { .. } => "choose an empty or new directory with --state-dir",
            JournalError::OtherFederation { .. } => "give each federation its own --state-dir",
            JournalError::OtherPeer { .. } => "leave --peer out, or choose another --state-dir",
            // No word of a copy: an older one has forgotten promises, and nobody could tell.
            JournalError::Damaged { .. } => "check the disk; then join as a new peer, with an empty --state-dir",
            JournalError::DamagedBlob { .. } => {
                "check the disk; then remove that file: the peer pulls the model again, or makes its own update again"
            }
            JournalError::OtherVersion { .. } => {
                "use the version of rodizio that wrote it, or join as a new peer with an empty --state-dir"
            }
        }
    }

    /// What keeps the disk from taking a write that it may take later: see [`obstacle`].
    pub fn obstacle(&self) -> Option<&'static str> {
        match self {
            JournalError::Io { source, .. } => obstacle(source),
            _ => None,
        }
    }
}

/// What keeps a disk from taking a write that it may take later, once somebody has made room.
pub fn obstacle(error: &io::Error) -> Option<&'static str> {
    match error.kind() {
        ErrorKind::StorageFull => Some("the disk is full"),
        ErrorKind::QuotaExceeded => Some("the disk quota is used up"),
        ErrorKind::ReadOnlyFilesystem => Some("the disk is mounted read-only"),
        _ => None,
    }
}

impl Journal {
    /// The name of the state file in the state directory.
    pub const STATE_FILE: &str = STATE;

    /// The name of the file that says which examples the peer trained on and held out.
    pub const EXAMPLES_FILE: &str = EXAMPLES;

    /// Opens the state directory `dir`, or creates it for a peer of `federation` called `name` (without one: a random
    /// name).
    ///
    /// Refuses a directory that another process holds, that belongs to another federation or peer, that holds
    /// something else, or whose files are damaged or missing. Left-over temporary files are removed.
    ///
    /// # Panics
    /// If `federation` holds a line break: the configuration excludes it.
    pub fn open(dir: &Path, federation: &str, name: Option<&PeerId>) -> Result<(Journal, Loaded), JournalError> {
        assert!(!federation.contains(['\n', '\r']), "a federation's name is one line");
        create_dir(dir)?;
        // Before anything is changed in it.
        refuse_foreign(dir)?;
        let disk = Arc::new(Disk {
            dir: dir.to_owned(),
            next_temporary: AtomicU64::new(0),
            spare: Mutex::default(),
            _lock: lock(dir)?,
        });
        disk.remove_temporaries(dir)?;
        let (peer, incarnation) = disk.identity(federation, name)?;
        let blobs_dir = disk.blobs_dir();
        create_dir(&blobs_dir)?;
        disk.remove_temporaries(&blobs_dir)?;
        let state = disk.state(incarnation)?;
        Ok((Journal { blobs: Blobs::on(disk.clone()), disk, incarnation }, Loaded { peer, state }))
    }

    /// Replaces the saved state. When this returns `Ok`, the state survives a loss of power.
    ///
    /// After an error the state on disk may be the old or the new one: whoever cannot save must not send what
    /// depends on it. It may save again if there is an [obstacle](JournalError::obstacle) that passes, and stops else.
    pub fn save_state(&mut self, bytes: &[u8]) -> Result<(), JournalError> {
        self.save(STATE, bytes)
    }

    fn save(&self, name: &str, bytes: &[u8]) -> Result<(), JournalError> {
        self.disk.replace(&self.disk.dir, name, &[&state_header(self.incarnation, bytes), bytes])
    }

    /// What was [saved](Self::save_examples) last of the examples that the peer trained on and held out, if anything was.
    pub fn examples(&self) -> Result<Option<Vec<u8>>, JournalError> {
        let path = self.disk.dir.join(EXAMPLES);
        read_if_there(&path)?.map(|bytes| parse_state(&path, self.incarnation, bytes)).transpose()
    }

    /// Notes which examples the peer trains on and holds out, in place of what was noted before.
    pub fn save_examples(&self, bytes: &[u8]) -> Result<(), JournalError> {
        self.save(EXAMPLES, bytes)
    }

    /// What was [saved](Self::save_settings) last of what the peers agree on, if anything was. No promise rests on it.
    pub fn settings(&self) -> Result<Option<BTreeMap<String, String>>, JournalError> {
        let path = self.disk.dir.join(SETTINGS);
        let parse = |bytes: Vec<u8>| {
            let problem = "it does not hold settings; it may be removed";
            serde_json::from_slice(&bytes).map_err(|_| JournalError::Damaged { path: path.clone(), problem })
        };
        read_if_there(&path)?.map(parse).transpose()
    }

    /// Notes what the peers agree on, in place of what was noted before.
    pub fn save_settings(&self, settings: &BTreeMap<String, String>) -> Result<(), JournalError> {
        let text = serde_json::to_string_pretty(settings).expect("a map of texts is JSON") + "\n";
        if read_if_there(&self.disk.dir.join(SETTINGS))?.as_deref() == Some(text.as_bytes()) {
            return Ok(());
        }
        self.disk.replace(&self.disk.dir, SETTINGS, &[text.as_bytes()])
    }

    /// Which one of its name the directory's peer is.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// The state directory.
    pub fn dir(&self) -> &Path {
        &self.disk.dir
    }

    /// A handle of the blobs, for any thread.
    pub fn blobs(&self) -> Blobs {
        self.blobs.clone()
    }

    /// [`Blobs::put`].
    pub fn put_blob(&self, digest: Digest, bytes: &Bytes) -> Result<(), JournalError> {
        self.blobs.put(digest, bytes)
    }

    /// [`Blobs::get`].
    pub fn blob(&self, digest: Digest) -> Result<Option<Bytes>, JournalError> {
        self.blobs.get(digest)
    }

    /// [`Blobs::retain`].
    pub fn retain_blobs(&self, keep: &BTreeSet<Digest>) -> Result<(), JournalError> {
        self.blobs.retain(keep)
    }
}

/// The directory while this process holds it.
#[derive(Debug)]
struct Disk {
    dir: PathBuf,
    /// Two threads that put the same blob need a temporary file each.
    next_temporary: AtomicU64,
    /// What the next model is written over.
    spare: Mutex<Option<SpareFile>>,
    _lock: File,
}

impl Disk {
    fn blobs_dir(&self) -> PathBuf {
        self.dir.join(BLOBS)
    }

    fn temporary_name(&self, name: &str) -> String {
        temporary_name(name, self.next_temporary.fetch_add(1, Ordering::Relaxed))
    }

    /// Writes a whole file under its final name, or not at all.
    fn replace(&self, dir: &Path, name: &str, parts: &[&[u8]]) -> Result<(), JournalError> {
        let temporary = dir.join(self.temporary_name(name));
        let path = dir.join(name);
        let written = write_flushed(&temporary, parts).and_then(|()| fs::rename(&temporary, &path));
        if let Err(source) = written {
            // Half a file is not to take the room that is lacking. The reason for the failure matters more than one that
            // cannot be removed: the next opening does it.
            let _ = fs::remove_file(&temporary);
            self.spare().take();
            return Err(JournalError::Io { action: "write", path, source });
        }
        flush_dir(dir)
    }

    fn identity(&self, federation: &str, name: Option<&PeerId>) -> Result<(PeerId, Incarnation), JournalError> {
        let path = self.dir.join(IDENTITY);
        let Some(bytes) = read_if_there(&path)? else { return self.create_identity(federation, name) };
        let (found_federation, found, incarnation) = parse_identity(&path, &bytes)?;
        if found_federation != federation {
            let wanted = federation.to_owned();
            return Err(JournalError::OtherFederation { dir: self.dir.clone(), found: found_federation, wanted });
        }
        match name {
            Some(wanted) if *wanted != found => {
                Err(JournalError::OtherPeer { dir: self.dir.clone(), found, wanted: wanted.clone() })
            }
            _ => Ok((found, incarnation)),
        }
    }

    fn create_identity(&self, federation: &str, name: Option<&PeerId>) -> Result<(PeerId, Incarnation), JournalError> {
        let (peer, incarnation) = (name.cloned().unwrap_or_else(generated_name), new_incarnation());
        let text = identity_text(federation, &peer, incarnation);
        self.replace(&self.dir, IDENTITY, &[text.as_bytes()])?;
        // The directory's own entry must survive as well, or the promises in it would be forgotten with it.
        match self.dir.parent() {
            Some(parent) if parent != Path::new("") => flush_dir(parent)?,
            _ => flush_dir(Path::new("."))?,
        }
        Ok((peer, incarnation))
    }

    fn state(&self, incarnation: Incarnation) -> Result<Option<Vec<u8>>, JournalError> {
        let path = self.dir.join(STATE);
        if let Some(bytes) = read_if_there(&path)? {
            return parse_state(&path, incarnation, bytes).map(Some);
        }
        // A peer makes promises before it has anything to keep: who has blobs has had a state.
        if list(&self.blobs_dir())?.iter().any(|(name, _)| name.ends_with(BLOB_END)) {
            return Err(JournalError::Damaged { path, problem: "it is missing, and there are blobs that it named" });
        }
        Ok(None)
    }

    fn remove_temporaries(&self, dir: &Path) -> Result<(), JournalError> {
        for (name, path) in list(dir)? {
            if is_temporary(&name) {
                remove(&path)?;
            }
        }
        Ok(())
    }
}

/// The identity is the first file of a new directory, so one with other files and without it is not ours.
fn refuse_foreign(dir: &Path) -> Result<(), JournalError> {
    let found = list(dir)?.into_iter().find(|(name, _)| name != LOCK && !is_temporary(name));
    match found {
        // Looked for after the others: a process that starts here at the same time makes it before them.
        Some((found, _)) if !dir.join(IDENTITY).exists() => Err(JournalError::Foreign { dir: dir.to_owned(), found }),
        _ => Ok(()),
    }
}

fn lock(dir: &Path) -> Result<File, JournalError> {
    let path = dir.join(LOCK);
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(io_error("open", &path))?;
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < until => thread::sleep(LOCK_POLL),
            Err(TryLockError::WouldBlock) => return Err(JournalError::InUse { dir: dir.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(JournalError::Io { action: "lock", path, source }),
        }
    }
}

fn identity_text(federation: &str, peer: &PeerId, incarnation: Incarnation) -> String {
    let text = format!("{IDENTITY_START}{VERSION}\nfederation {federation}\npeer {peer}\nincarnation {incarnation}\n");
    let checksum = Digest::of(text.as_bytes());
    format!("{text}{CHECKSUM}{checksum}\n")
}

fn parse_identity(path: &Path, bytes: &[u8]) -> Result<(String, PeerId, Incarnation), JournalError> {
    let damaged = |problem| JournalError::Damaged { path: path.to_owned(), problem };
    let text = str::from_utf8(bytes).map_err(|_| damaged("it is not text"))?;
    let whole = text.strip_suffix('\n').ok_or_else(|| damaged("its last line is cut short"))?;
    let (first, rest) = whole.split_once('\n').unwrap_or((whole, ""));
    match first.strip_prefix(IDENTITY_START).and_then(|version| version.parse().ok()) {
        Some(VERSION) => {}
        Some(found) => return Err(JournalError::OtherVersion { path: path.to_owned(), found }),
        None => return Err(damaged("its first line is not that of an identity file")),
    }
    let mut lines = rest.lines();
    let mut field = |key: &str| lines.next()?.strip_prefix(key);
    let fields = (field("federation "), field("peer "), field("incarnation "));
    let (Some(federation), Some(peer), Some(incarnation)) = fields else {
        return Err(damaged("it lacks the federation, the peer or its incarnation"));
    };
    let peer = PeerId::new(peer).map_err(|_| damaged("its peer is not a peer id"))?;
    let incarnation = u64::from_str_radix(incarnation, 16).map_err(|_| damaged("its incarnation is not a number"))?;
    let incarnation = Incarnation(incarnation);
    if text != identity_text(federation, &peer, incarnation) {
        return Err(damaged("its checksum does not match its content"));
    }
    Ok((federation.to_owned(), peer, incarnation))
}

/// A number that no other state directory has, but for a chance of 1 in 2^64.
pub fn new_incarnation() -> Incarnation {
    Incarnation(rand::random())
}

fn generated_name() -> PeerId {
    let name: String = rand::random::<[u8; GENERATED_NAME_BYTES]>().iter().map(|b| format!("{b:02x}")).collect();
    PeerId::new(&name).expect("hexadecimal digits are a peer id")
}

fn state_header(incarnation: Incarnation, payload: &[u8]) -> [u8; STATE_HEADER_BYTES] {
    let mut header = [0; STATE_HEADER_BYTES];
    header[..8].copy_from_slice(STATE_MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..20].copy_from_slice(&incarnation.0.to_le_bytes());
    header[20..28].copy_from_slice(&(payload.len() as u64).to_le_bytes());
    header[28..].copy_from_slice(&Digest::of(payload).0);
    header
}

fn parse_state(path: &Path, incarnation: Incarnation, mut bytes: Vec<u8>) -> Result<Vec<u8>, JournalError> {
    let damaged = |problem| JournalError::Damaged { path: path.to_owned(), problem };
    if bytes.len() < STATE_HEADER_BYTES {
        return Err(damaged("it is cut short"));
    }
    let payload = bytes.split_off(STATE_HEADER_BYTES);
    if &bytes[..8] != STATE_MAGIC {
        return Err(damaged("it does not start like a state file"));
    }
    let found = u32::from_le_bytes(bytes[8..12].try_into().expect("the range has 4 bytes"));
    if found != VERSION {
        return Err(JournalError::OtherVersion { path: path.to_owned(), found });
    }
    if bytes[12..20] != incarnation.0.to_le_bytes() {
        return Err(damaged("it is that of another state directory"));
    }
    if bytes != state_header(incarnation, &payload) {
        return Err(damaged("its checksum or its length does not match its content"));
    }
    Ok(payload)
}

/// How [`Disk::replace`] names the file beside that of `name`.
fn temporary_name(name: &str, number: u64) -> String {
    format!("{name}.{number}.tmp")
}

/// Whether [`Disk::replace`] made the file: nobody else's is to be deleted.
fn is_temporary(name: &str) -> bool {
    let parts = name.strip_suffix(".tmp").and_then(|name| name.rsplit_once('.'));
    parts.is_some_and(|(name, number)| {
        number.parse::<u64>().is_ok()
            && ([IDENTITY, STATE, SETTINGS, EXAMPLES].contains(&name) || name.ends_with(BLOB_END))
    })
}

/// Temporary files are skipped by nobody: whoever lists decides. Names that are not text are none of ours.
fn list(dir: &Path) -> Result<Vec<(String, PathBuf)>, JournalError> {
    let read = || {
        let entries = fs::read_dir(dir)?.collect::<Result<Vec<_>, _>>()?;
        Ok(entries.into_iter().map(|e| (e.file_name().to_string_lossy().into_owned(), e.path())).collect())
    };
    read().map_err(io_error("list", dir))
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, JournalError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(JournalError::Io { action: "read", path: path.to_owned(), source }),
    }
}

fn write_flushed(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let mut file = File::create(path)?;
    parts.iter().try_for_each(|part| file.write_all(part))?;
    file.sync_all()
}

fn create_dir(dir: &Path) -> Result<(), JournalError> {
    fs::create_dir_all(dir).map_err(io_error("create", dir))
}

/// Removes a file, unless somebody else did: one that is being flushed has two names in turn.
fn remove(path: &Path) -> Result<(), JournalError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(io_error("remove", path)),
    }
}

/// Makes a rename in `dir` durable. Other systems than Unix do not open directories as files; NTFS journals renames.
fn flush_dir(dir: &Path) -> Result<(), JournalError> {
    if cfg!(unix) { File::open(dir).and_then(|file| file.sync_all()).map_err(io_error("flush", dir)) } else { Ok(()) }
}

fn io_error(action: &'static str, path: &Path) -> impl Fn(io::Error) -> JournalError {
    move |source| JournalError::Io { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::blobs::blob_name;
    use super::*;
    use crate::transfer::Keep;

    pub(super) fn open(dir: &Path) -> Result<(Journal, Loaded), JournalError> {
        Journal::open(dir, "ward", None)
    }

    /// A directory whose state is `state`, not held by anyone.
    fn saved(state: &[u8]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = open(dir.path()).unwrap();
        journal.save_state(state).unwrap();
        dir
    }

    fn is_damaged(result: &Result<(Journal, Loaded), JournalError>, file: &Path) -> bool {
        matches!(result, Err(JournalError::Damaged { path, .. }) if path == file)
    }

    #[test]
    fn a_new_directory_gets_a_name_that_stays() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("a/b");
        let names = |dir: &Path| {
            let (journal, loaded) = open(dir).unwrap();
            assert_eq!(loaded.state, None);
            (loaded.peer, journal.incarnation())
        };
        let first = names(&dir);
        assert_eq!(first.0.as_str().len(), 16);
        assert_eq!(names(&dir), first);
        let other = names(&parent.path().join("c"));
        assert!(first.0 != other.0 && first.1 != other.1);
    }

    #[test]
    fn a_given_name_is_kept_and_another_refused() {
        let dir = tempfile::tempdir().unwrap();
        let names = [PeerId::new("ward-1").unwrap(), PeerId::new("ward-2").unwrap()];
        drop(Journal::open(dir.path(), "ward", Some(&names[0])).unwrap());
        assert_eq!(open(dir.path()).unwrap().1.peer, names[0]);
        assert!(Journal::open(dir.path(), "ward", Some(&names[0])).is_ok());
        let refused = Journal::open(dir.path(), "ward", Some(&names[1]));
        assert!(matches!(refused, Err(JournalError::OtherPeer { .. })));
    }

    #[test]
    fn a_directory_of_another_federation_is_refused_and_left_alone() {
        let dir = saved(b"promise");
        let refused = Journal::open(dir.path(), "clinic", None).unwrap_err();
        assert!(matches!(&refused, JournalError::OtherFederation { found, .. } if found == "ward"));
        assert_eq!(open(dir.path()).unwrap().1.state.unwrap(), b"promise");
    }

    #[test]
    fn a_directory_is_held_until_its_last_handle_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = open(dir.path()).unwrap();
        assert!(matches!(open(dir.path()), Err(JournalError::InUse { .. })));
        let blobs = journal.blobs();
        drop(journal);
        assert!(matches!(open(dir.path()), Err(JournalError::InUse { .. })));
        drop(blobs);
        assert!(open(dir.path()).is_ok());
    }

    #[test]
    fn a_directory_with_something_else_in_it_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("thesis.tex"), "").unwrap();
        let refused = open(dir.path()).unwrap_err();
        assert!(matches!(&refused, JournalError::Foreign { found, .. } if found == "thesis.tex"), "{refused}");
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("thesis.1.tmp"), "").unwrap();
        assert!(matches!(open(dir.path()), Err(JournalError::Foreign { .. })));
        let names: Vec<_> = list(dir.path()).unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["thesis.1.tmp"], "nothing is deleted there or added");
        let dir = saved(b"promise");
        fs::remove_file(dir.path().join(IDENTITY)).unwrap();
        assert!(matches!(open(dir.path()), Err(JournalError::Foreign { .. })));
    }

    #[test]
    fn the_state_saved_last_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = open(dir.path()).unwrap();
        for state in [&b"first"[..], b"", &[7; 100_000]] {
            journal.save_state(state).unwrap();
            drop(journal);
            let (again, loaded) = open(dir.path()).unwrap();
            assert_eq!(loaded.state.as_deref(), Some(state));
            journal = again;
        }
    }

    #[test]
    fn a_state_of_another_directory_is_refused() {
        let (dir, other) = (saved(b"promise"), saved(b"promise"));
        let path = dir.path().join(STATE);
        fs::copy(other.path().join(STATE), &path).unwrap();
        assert!(is_damaged(&open(dir.path()), &path));
    }

    #[test]
    fn a_state_file_cut_anywhere_is_refused_and_kept() {
        let dir = saved(b"a promise that must not be forgotten");
        let path = dir.path().join(STATE);
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(is_damaged(&open(dir.path()), &path), "{length} bytes were taken");
            assert_eq!(fs::read(&path).unwrap(), &whole[..length], "a refused file was changed");
        }
        fs::write(&path, &whole).unwrap();
        assert!(open(dir.path()).is_ok());
    }

    #[test]
    fn a_state_file_with_any_byte_changed_or_added_is_refused() {
        let dir = saved(b"promise");
        let path = dir.path().join(STATE);
        let whole = fs::read(&path).unwrap();
        for (at, bit) in bits(&whole) {
            let mut changed = whole.clone();
            changed[at] ^= bit;
            fs::write(&path, changed).unwrap();
            let refused = open(dir.path()).unwrap_err();
            assert!(matches!(refused, JournalError::Damaged { .. } | JournalError::OtherVersion { .. }), "byte {at}");
            assert!(refused.to_string().contains(&path.display().to_string()) && !refused.hint().is_empty());
        }
        fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
        assert!(is_damaged(&open(dir.path()), &path));
    }

    /// Every bit of every byte: which byte, and what to flip in it.
    fn bits(bytes: &[u8]) -> impl Iterator<Item = (usize, u8)> {
        (0..bytes.len()).flat_map(|at| (0..8).map(move |bit| (at, 1 << bit)))
    }

    #[test]
    fn an_identity_with_any_bit_changed_is_refused() {
        let dir = saved(b"promise");
        let path = dir.path().join(IDENTITY);
        let whole = fs::read(&path).unwrap();
        for (at, bit) in bits(&whole) {
            let mut changed = whole.clone();
            changed[at] ^= bit;
            fs::write(&path, &changed).unwrap();
            let refused = open(dir.path()).unwrap_err();
            assert!(
                matches!(refused, JournalError::Damaged { .. } | JournalError::OtherVersion { .. }),
                "byte {at}: {refused}"
            );
            assert!(refused.to_string().contains(&path.display().to_string()) && !refused.hint().is_empty());
            assert_eq!(fs::read(&path).unwrap(), changed, "a refused file was changed");
        }
    }

    #[test]
    fn a_blob_cut_anywhere_or_with_any_bit_changed_is_refused() {
        let dir = saved(b"promise");
        let bytes = Bytes::from_static(b"some weights");
        let digest = Digest::of(&bytes);
        open(dir.path()).unwrap().0.put_blob(digest, &bytes).unwrap();
        let path = dir.path().join(BLOBS).join(blob_name(digest, Keep::Durable));
        let cut = (0..bytes.len()).map(|length| bytes[..length].to_vec());
        let changed = bits(&bytes).map(|(at, bit)| {
            let mut changed = bytes.to_vec();
            changed[at] ^= bit;
            changed
        });
        for damaged in cut.chain(changed) {
            fs::write(&path, &damaged).unwrap();
            let refused = open(dir.path()).unwrap().0.blob(digest).unwrap_err();
            assert!(matches!(&refused, JournalError::DamagedBlob { path: found } if *found == path), "{refused}");
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(open(dir.path()).unwrap().0.blob(digest).unwrap(), None, "one that is not there is pulled again");
    }

    #[test]
    fn a_state_that_has_vanished_is_not_taken_for_a_new_peer() {
        let dir = saved(b"promise");
        let bytes = Bytes::from_static(b"weights");
        open(dir.path()).unwrap().0.put_blob(Digest::of(&bytes), &bytes).unwrap();
        let path = dir.path().join(STATE);
        fs::remove_file(&path).unwrap();
        assert!(is_damaged(&open(dir.path()), &path));
    }

    #[test]
    fn an_identity_cut_anywhere_is_refused() {
        let dir = saved(b"promise");
        let path = dir.path().join(IDENTITY);
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(is_damaged(&open(dir.path()), &path), "{length} bytes were taken");
        }
    }

    #[test]
    fn files_of_another_version_are_refused_as_such() {
        let dir = saved(b"promise");
        let path = dir.path().join(STATE);
        let mut bytes = fs::read(&path).unwrap();
        bytes[8..12].copy_from_slice(&(VERSION + 1).to_le_bytes());
        fs::write(&path, bytes).unwrap();
        assert!(matches!(open(dir.path()), Err(JournalError::OtherVersion { found: 3, .. })));
        let path = dir.path().join(IDENTITY);
        for found in [1, 3] {
            fs::write(&path, format!("rodizio peer {found}\nsomething else\n")).unwrap();
            assert!(matches!(open(dir.path()), Err(JournalError::OtherVersion { found: at, .. }) if at == found));
        }
    }

    #[test]
    fn what_a_crash_leaves_behind_is_ignored_and_removed() {
        let dir = saved(b"promise");
        let left =
            [dir.path().join("state.3.tmp"), dir.path().join("peer.0.tmp"), dir.path().join("blobs/aa.blob.1.tmp")];
        for path in &left {
            fs::write(path, b"half").unwrap();
        }
        let (_journal, loaded) = open(dir.path()).unwrap();
        assert_eq!(loaded.state.unwrap(), b"promise");
        assert!(left.iter().all(|path| !path.exists()));
    }

    /// What a crash can leave of a write of `name`: a part of the temporary file, then all of it, then the file itself.
    fn instants(dir: &Path, name: &str, new: &[u8]) -> Vec<(PathBuf, Vec<u8>)> {
        let temporary = dir.join(temporary_name(name, 7));
        let parts = (0..=new.len()).map(|length| (temporary.clone(), new[..length].to_vec()));
        parts.chain([(dir.join(name), new.to_vec())]).collect()
    }

    #[test]
    fn a_crash_at_any_instant_of_a_write_leaves_the_state_of_before_or_of_after() {
        let dir = saved(b"before");
        let incarnation = open(dir.path()).unwrap().0.incarnation();
        let next = [&state_header(incarnation, b"after")[..], b"after"].concat();
        for (path, bytes) in instants(dir.path(), STATE, &next) {
            let renamed = path.ends_with(STATE);
            fs::write(&path, bytes).unwrap();
            let (_, loaded) = open(dir.path()).unwrap();
            assert_eq!(loaded.state.as_deref(), Some(if renamed { &b"after"[..] } else { b"before" }));
            assert!(list(dir.path()).unwrap().iter().all(|(name, _)| !is_temporary(name)));
        }
    }

    #[test]
    fn a_crash_at_any_instant_of_the_first_write_or_of_a_blob_leaves_a_usable_directory() {
        let name = PeerId::new("ward-1").unwrap();
        let dir = tempfile::tempdir().unwrap();
        for (path, bytes) in instants(dir.path(), IDENTITY, identity_text("ward", &name, new_incarnation()).as_bytes())
        {
            let given = path.ends_with(IDENTITY);
            fs::write(&path, bytes).unwrap();
            let (_, loaded) = open(dir.path()).unwrap();
            assert_eq!(loaded.peer == name, given);
            fs::remove_file(dir.path().join(IDENTITY)).unwrap();
            fs::remove_dir(dir.path().join(BLOBS)).unwrap();
        }
        let dir = saved(b"promise");
        let blob = Bytes::from_static(b"weights");
        for (path, bytes) in instants(&dir.path().join(BLOBS), &blob_name(Digest::of(&blob), Keep::Durable), &blob) {
            let renamed = !path.to_string_lossy().ends_with(".tmp");
            fs::write(&path, bytes).unwrap();
            let (journal, _) = open(dir.path()).unwrap();
            assert_eq!(journal.blob(Digest::of(&blob)).unwrap(), renamed.then(|| blob.clone()));
        }
    }

    #[test]
    fn only_what_passes_by_itself_or_with_room_is_waited_for() {
        let waits = [ErrorKind::StorageFull, ErrorKind::QuotaExceeded, ErrorKind::ReadOnlyFilesystem];
        assert!(waits.iter().all(|kind| obstacle(&(*kind).into()).is_some()));
        let ends = [ErrorKind::PermissionDenied, ErrorKind::NotFound, ErrorKind::Other];
        assert!(ends.iter().all(|kind| obstacle(&(*kind).into()).is_none()));
    }

    #[test]
    fn a_crash_before_the_first_identity_leaves_a_usable_directory() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(LOCK), "").unwrap();
        fs::write(dir.path().join("peer.0.tmp"), "rodizio pe").unwrap();
        assert!(open(dir.path()).is_ok());
    }

    #[test]
    fn an_error_names_the_file_and_has_a_hint() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "").unwrap();
        let error = open(&path).unwrap_err();
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        assert!(!error.hint().is_empty());
    }
}
