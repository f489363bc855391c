//! What a peer keeps on disk: its name, its promises and the blobs it has said that it holds.
//!
//! ```text
//! <state directory>/
//!   lock               held while a process uses the directory
//!   peer               the peer's name and its federation, as text
//!   state              the newest state: header, checksum, payload
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
//! rounds.
//!
//! A blob that no promise rests on is not flushed: the updates that a leader has pulled and, for as long as others need not wait
//! for it, the own update. It is whole after a crash of the process; one that is damaged after a loss of power is deleted, and
//! pulled or made again. Files of an interrupted write are deleted at the next opening.
//!
//! # A disk without room
//!
//! A write that fails leaves the file of before and no temporary file. [`JournalError::obstacle`] tells the failures
//! that pass when somebody makes room from those that need a person: after an input/output error, or when the
//! directory has vanished (another process may hold the one that comes back), nothing here is to be relied on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use bytes::Bytes;
use tracing::warn;

use crate::buffers::Buffers;
use crate::transfer::{Keep, Source};
use crate::types::{Digest, PeerId};

/// The version of the files that this code writes.
const VERSION: u32 = 1;

/// How a state file starts.
const STATE_MAGIC: &[u8; 8] = b"RDZSTATE";

/// Magic, version, length of the payload, digest of the payload.
const STATE_HEADER_BYTES: usize = 8 + 4 + 8 + 32;

/// Random bytes in a generated name: two of a million peers share one with a chance of 1 in 37 million.
const GENERATED_NAME_BYTES: usize = 8;

const LOCK: &str = "lock";
const IDENTITY: &str = "peer";
const STATE: &str = "state";
const BLOBS: &str = "blobs";
const BLOB_END: &str = ".blob";
const UNFLUSHED_END: &str = ".unflushed";

/// What stands for a blob's name while it is being written.
const DRAFT: &str = "draft.blob";

/// After so many bytes a file that is being written is flushed, in the background.
const FLUSH_BYTES: usize = 8 << 20;

/// How the last line of an identity file starts.
const CHECKSUM: &str = "checksum ";

/// The state directory of one peer, held by this process until the journal and every [`Blobs`] of it are dropped.
#[derive(Debug)]
pub struct Journal {
    disk: Arc<Disk>,
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

/// Blobs by digest, on disk or in memory alone. A clone is another handle of the same blobs, for another thread.
///
/// On disk, memory holds none of a blob: it is written and read by ranges, and what it takes in memory is the system's
/// to give and to take back.
#[derive(Debug, Clone)]
pub struct Blobs {
    disk: Option<Arc<Disk>>,
    /// Those that are known to be whole: put by this process, or verified by it.
    known: Arc<Mutex<BTreeMap<Digest, Known>>>,
    /// Held while a file that was flushed gets its name.
    naming: Arc<Mutex<()>>,
    /// Without a disk: the memory of blobs that were dropped last, for what is written next.
    spare: Arc<Mutex<Buffers>>,
}

/// A blob that is there, whole. It stays readable when it is dropped from its [`Blobs`].
#[derive(Debug, Clone)]
pub struct Blob(Arc<Content>);

#[derive(Debug)]
struct Known {
    blob: Blob,
    keep: Keep,
}

#[derive(Debug)]
enum Content {
    File { file: Arc<File>, path: PathBuf, bytes: u64 },
    Memory(Parts),
}

/// A blob that is being written, at any place and in any order. Dropped before it is [finished](Self::finish), it leaves
/// nothing behind.
#[derive(Debug)]
pub struct Draft {
    blobs: Blobs,
    keep: Keep,
    /// Where what was written ends.
    bytes: u64,
    content: DraftContent,
}

#[derive(Debug)]
enum DraftContent {
    /// The file has its temporary name until it is finished.
    File {
        file: Arc<File>,
        temporary: Temporary,
        /// Of one that is to be durable.
        flusher: Option<Flusher>,
    },
    Memory(Parts),
}

/// Parts of a blob by where they begin. None reaches into another.
#[derive(Debug, Default)]
struct Parts(BTreeMap<u64, Bytes>);

/// A temporary file, which is removed when this is dropped.
#[derive(Debug)]
struct Temporary(PathBuf);

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
    /// A newer version wrote a file.
    #[error("{} has format {found}; this version reads up to format {VERSION}", path.display())]
    Newer {
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
            JournalError::Damaged { .. } => {
                "check the disk; then restore the directory from a copy, or join as a new peer with an empty --state-dir"
            }
            JournalError::DamagedBlob { .. } => {
                "check the disk; then remove that file: the peer pulls the model again, or makes its own update again"
            }
            JournalError::Newer { .. } => "use the version of rodizio that wrote it, or a newer one",
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
        let disk = Arc::new(Disk { dir: dir.to_owned(), next_temporary: AtomicU64::new(0), _lock: lock(dir)? });
        disk.remove_temporaries(dir)?;
        let peer = disk.identity(federation, name)?;
        let blobs_dir = disk.blobs_dir();
        create_dir(&blobs_dir)?;
        disk.remove_temporaries(&blobs_dir)?;
        let state = disk.state()?;
        let blobs =
            Blobs { disk: Some(disk.clone()), known: Arc::default(), naming: Arc::default(), spare: Arc::default() };
        Ok((Journal { disk, blobs }, Loaded { peer, state }))
    }

    /// Replaces the saved state. When this returns `Ok`, the state survives a loss of power.
    ///
    /// After an error the state on disk may be the old or the new one: whoever cannot save must not send what
    /// depends on it. It may save again if there is an [obstacle](JournalError::obstacle) that passes, and stops else.
    pub fn save_state(&mut self, bytes: &[u8]) -> Result<(), JournalError> {
        let header = state_header(bytes);
        self.disk.replace(&self.disk.dir, STATE, &[&header, bytes])
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

/// Reads a blob of the state directory `dir`, which another process or task may be using: `None` when it is not, or no
/// longer, there.
pub fn read_blob(dir: &Path, digest: Digest) -> Result<Option<Bytes>, JournalError> {
    let path = dir.join(BLOBS).join(blob_name(digest, Keep::Durable));
    let Some(bytes) = read_if_there(&path)? else { return Ok(None) };
    if Digest::of(&bytes) != digest {
        return Err(JournalError::DamagedBlob { path });
    }
    Ok(Some(bytes.into()))
}

impl Blobs {
    /// Blobs in memory alone, for tests and simulation.
    pub fn memory() -> Self {
        Self { disk: None, known: Arc::default(), naming: Arc::default(), spare: Arc::default() }
    }

    /// Begins a blob.
    pub fn draft(&self, keep: Keep) -> Result<Draft, JournalError> {
        let content = match &self.disk {
            None => DraftContent::Memory(Parts::default()),
            Some(disk) => {
                // It has no digest yet: that is known when all is written.
                let temporary = Temporary(disk.blobs_dir().join(disk.temporary_name(DRAFT)));
                let file = File::options().create_new(true).read(true).write(true).open(&temporary.0);
                let file = Arc::new(file.map_err(io_error("create", &temporary.0))?);
                let flusher = (keep == Keep::Durable).then(Flusher::default);
                DraftContent::File { file, temporary, flusher }
            }
        };
        Ok(Draft { blobs: self.clone(), keep, bytes: 0, content })
    }

    /// Keeps `bytes`, whose digest the caller has verified. When this returns `Ok`, they survive a loss of power.
    /// Putting a blob twice does nothing.
    pub fn put(&self, digest: Digest, bytes: &Bytes) -> Result<(), JournalError> {
        debug_assert_eq!(Digest::of(bytes), digest, "a blob is named by its digest");
        let mut draft = self.draft(Keep::Durable)?;
        draft.write(0, bytes)?;
        draft.finish(digest)
    }

    /// The blob of that digest, if there is one, whole. What this process has not put is read once, and verified.
    pub fn open(&self, digest: Digest) -> Result<Option<Blob>, JournalError> {
        if let Some(known) = self.known().get(&digest) {
            return Ok(Some(known.blob.clone()));
        }
        let Some(disk) = &self.disk else { return Ok(None) };
        for keep in [Keep::Durable, Keep::Unflushed] {
            let path = disk.blob_path(digest, keep);
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(source) => return Err(JournalError::Io { action: "read", path, source }),
            };
            let mut hasher = blake3::Hasher::new();
            hasher.update_reader(&file).map_err(io_error("read", &path))?;
            let whole = Digest(*hasher.finalize().as_bytes()) == digest;
            if whole {
                let blob = Blob(Arc::new(Content::File { bytes: hasher.count(), file: Arc::new(file), path }));
                self.known().insert(digest, Known { blob: blob.clone(), keep });
                return Ok(Some(blob));
            }
            match keep {
                Keep::Durable => return Err(JournalError::DamagedBlob { path }),
                // The power was lost, as it may be.
                Keep::Unflushed => {
                    warn!(path = %path.display(), "deleted what a loss of power has damaged; it is pulled or made again");
                    remove(&path)?;
                }
            }
        }
        Ok(None)
    }

    /// Makes a blob durable: when this returns `true`, it survives a loss of power. `false`: it is not here.
    pub fn flush(&self, digest: Digest) -> Result<bool, JournalError> {
        let blob = match self.known().get(&digest) {
            None => return Ok(false),
            Some(Known { keep: Keep::Durable, .. }) => return Ok(true),
            Some(known) => known.blob.clone(),
        };
        let (Content::File { file, path, .. }, Some(disk)) = (&*blob.0, &self.disk) else {
            return Ok(self.known().get_mut(&digest).map(|known| known.keep = Keep::Durable).is_some());
        };
        file.sync_all().map_err(io_error("write", path))?;
        let _naming = self.naming.lock().expect("nothing panics while it holds the lock");
        match self.known().get(&digest) {
            None => return Ok(false),
            Some(Known { keep: Keep::Durable, .. }) => return Ok(true),
            Some(_) => {}
        }
        let named = disk.blob_path(digest, Keep::Durable);
        match fs::rename(path, &named) {
            // It is being dropped.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            renamed => renamed.map_err(io_error("write", &named))?,
        }
        flush_dir(&disk.blobs_dir())?;
        let blob = Blob(Arc::new(Content::File { file: file.clone(), path: named, bytes: blob.bytes() }));
        // Last, so that whoever finds it here may rely on the disk too.
        self.known().insert(digest, Known { blob, keep: Keep::Durable });
        Ok(true)
    }

    /// Whether a blob is here and would survive a loss of power.
    pub fn is_durable(&self, digest: &Digest) -> bool {
        matches!(self.known().get(digest), Some(Known { keep: Keep::Durable, .. }))
    }

    /// Drops what would not survive a loss of power, and tells what that was: for those who simulate one.
    pub fn lose_power(&self) -> Vec<Digest> {
        self.known().extract_if(.., |_, known| known.keep == Keep::Unflushed).map(|(digest, _)| digest).collect()
    }

    /// All bytes of the blob of that digest, if there is one. For blobs that are small, and for tests.
    pub fn get(&self, digest: Digest) -> Result<Option<Bytes>, JournalError> {
        self.open(digest)?.map(|blob| blob.read_all()).transpose()
    }

    /// Drops every blob that is not in `keep`, from memory and from disk. A blob that another thread is putting must be in
    /// `keep` already, or it may be dropped.
    pub fn retain(&self, keep: &BTreeSet<Digest>) -> Result<(), JournalError> {
        let dropped: Vec<(Digest, Known)> = self.known().extract_if(.., |digest, _| !keep.contains(digest)).collect();
        let Some(disk) = &self.disk else {
            let parts = dropped.into_iter().filter_map(|(_, known)| known.blob.into_parts()).flat_map(|parts| parts.0);
            let mut spare = Buffers::new(usize::MAX);
            // Of parts that came in one buffer, one can have it.
            for (_, part) in parts {
                part.try_into_mut().into_iter().for_each(|part| drop(spare.lend(part)));
            }
            *self.spare() = spare;
            return Ok(());
        };
        for (name, path) in list(&disk.blobs_dir())? {
            let digest = name.strip_suffix(BLOB_END).or(name.strip_suffix(UNFLUSHED_END));
            let digest = digest.and_then(|hex| hex.parse().ok());
            if digest.is_some_and(|digest: Digest| !keep.contains(&digest)) {
                remove(&path)?;
            }
        }
        Ok(())
    }

    fn spare(&self) -> MutexGuard<'_, Buffers> {
        self.spare.lock().expect("nothing panics while it holds the lock")
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<Digest, Known>> {
        self.known.lock().expect("nothing panics while it holds the lock")
    }
}

impl Blob {
    /// How long it is, in bytes.
    pub fn bytes(&self) -> u64 {
        match &*self.0 {
            Content::File { bytes, .. } => *bytes,
            Content::Memory(parts) => parts.bytes(),
        }
    }

    /// Fills `out` with the bytes from `start` on, all of which must be there.
    pub fn read(&self, start: u64, out: &mut [u8]) -> Result<(), JournalError> {
        match &*self.0 {
            Content::File { file, path, .. } => read_exact_at(file, start, out).map_err(io_error("read", path)),
            Content::Memory(parts) => parts.read(start, out).map_err(io_error("read", Path::new("a blob in memory"))),
        }
    }

    /// A message, in two parts: `header`, and behind it the bytes of `range`, all of which must be there. What lies in memory
    /// is not copied, and what lies on disk is read behind the header, in one of `buffers`: no copy has to join them.
    pub fn behind(
        &self,
        header: Bytes,
        range: Range<usize>,
        buffers: &mut Buffers,
    ) -> Result<(Bytes, Bytes), JournalError> {
        if let Content::Memory(parts) = &*self.0
            && let Some(part) = parts.slice(&range)
        {
            return Ok((header, part));
        }
        let mut message = buffers.take(header.len() + range.len());
        let (head, tail) = message.split_at_mut(header.len());
        head.copy_from_slice(&header);
        self.read(range.start as u64, tail)?;
        Ok((buffers.lend(message), Bytes::new()))
    }

    /// Its memory, if it lies in memory and nobody else reads it.
    fn into_parts(self) -> Option<Parts> {
        match Arc::into_inner(self.0)? {
            Content::Memory(parts) => Some(parts),
            Content::File { .. } => None,
        }
    }

    fn read_all(&self) -> Result<Bytes, JournalError> {
        if let Content::Memory(parts) = &*self.0
            && let Some(bytes) = parts.single()
        {
            return Ok(bytes);
        }
        let mut bytes = vec![0; usize::try_from(self.bytes()).unwrap_or(usize::MAX)];
        self.read(0, &mut bytes)?;
        Ok(bytes.into())
    }
}

impl Source for Blob {
    fn bytes(&self) -> u64 {
        self.bytes()
    }

    fn read_at(&self, start: u64, out: &mut [u8]) -> Result<(), String> {
        self.read(start, out).map_err(|error| error.to_string())
    }
}

impl Draft {
    /// Writes bytes from `start` on. After an error the same may be written again.
    pub fn write(&mut self, start: u64, bytes: &Bytes) -> Result<(), JournalError> {
        self.bytes = self.bytes.max(start + bytes.len() as u64);
        match &mut self.content {
            DraftContent::File { file, temporary, flusher } => {
                let written = write_all_at(file, start, bytes);
                let flushed = written.and_then(|()| flusher.as_mut().map_or(Ok(()), |f| f.wrote(file, bytes.len())));
                flushed.map_err(io_error("write", &temporary.0))
            }
            DraftContent::Memory(parts) => {
                let spare = self.blobs.spare().spare(bytes.len());
                let part = spare.map_or_else(
                    || bytes.clone(),
                    |mut part| {
                        part.copy_from_slice(bytes);
                        part.freeze()
                    },
                );
                parts.0.insert(start, part);
                Ok(())
            }
        }
    }

    /// Fills `out` with the bytes from `start` on, which were written.
    pub fn read(&self, start: u64, out: &mut [u8]) -> Result<(), JournalError> {
        match &self.content {
            DraftContent::File { file, temporary, .. } => {
                read_exact_at(file, start, out).map_err(io_error("read", &temporary.0))
            }
            DraftContent::Memory(parts) => {
                parts.read(start, out).map_err(io_error("read", Path::new("a blob in memory")))
            }
        }
    }

    /// Makes what was written the blob `digest`, which the caller has verified. When this returns `Ok`, it is kept as it was
    /// to be kept. After an error it may be tried again. To finish the same blob twice does nothing.
    pub fn finish(&mut self, digest: Digest) -> Result<(), JournalError> {
        if !self.blobs.known().contains_key(&digest) {
            let content = match (&mut self.content, &self.blobs.disk) {
                (DraftContent::File { file, temporary, flusher }, Some(disk)) => {
                    let path = disk.blob_path(digest, Keep::Unflushed);
                    let flushed = flusher.as_mut().map_or(Ok(()), Flusher::wait);
                    flushed.and_then(|()| fs::rename(&temporary.0, &path)).map_err(io_error("write", &path))?;
                    Content::File { file: file.clone(), path, bytes: self.bytes }
                }
                (DraftContent::Memory(parts), _) => Content::Memory(std::mem::take(parts)),
                (DraftContent::File { .. }, None) => return Ok(()),
            };
            let known = Known { blob: Blob(Arc::new(content)), keep: Keep::Unflushed };
            self.blobs.known().insert(digest, known);
        }
        match self.keep {
            Keep::Durable => self.blobs.flush(digest).map(drop),
            Keep::Unflushed => Ok(()),
        }
    }
}

/// Has a file that is being written flushed in the background, so that little is left to be flushed after the last byte.
#[derive(Debug, Default)]
struct Flusher {
    /// What was written since the flush began that began last, in bytes.
    unflushed: usize,
    running: Option<JoinHandle<io::Result<()>>>,
}

impl Flusher {
    /// So many bytes more are in the file.
    fn wrote(&mut self, file: &Arc<File>, bytes: usize) -> io::Result<()> {
        self.unflushed += bytes;
        if self.unflushed < FLUSH_BYTES || self.running.as_ref().is_some_and(|running| !running.is_finished()) {
            return Ok(());
        }
        self.wait()?;
        self.unflushed = 0;
        let file = file.clone();
        // Without another thread there is more to flush at the end.
        self.running = thread::Builder::new().name("flush".into()).spawn(move || file.sync_data()).ok();
        Ok(())
    }

    /// Waits for what runs. An error is told once, and not again by the flush at the end.
    fn wait(&mut self) -> io::Result<()> {
        let ended = self.running.take().map(JoinHandle::join);
        ended.map_or(Ok(()), |ended| ended.unwrap_or_else(|_| Err(io::Error::other("the flush panicked"))))
    }
}

impl Parts {
    fn bytes(&self) -> u64 {
        self.0.last_key_value().map_or(0, |(start, part)| start + part.len() as u64)
    }

    /// The whole, if it was written at once.
    fn single(&self) -> Option<Bytes> {
        if self.0.is_empty() {
            return Some(Bytes::new());
        }
        self.0.first_key_value().filter(|(start, _)| self.0.len() == 1 && **start == 0).map(|(_, part)| part.clone())
    }

    /// The bytes of `range`, if they lie in one part.
    fn slice(&self, range: &Range<usize>) -> Option<Bytes> {
        let (begin, part) = self.0.range(..=range.start as u64).next_back()?;
        let skipped = range.start - usize::try_from(*begin).ok()?;
        let length = range.len();
        (length <= part.len().checked_sub(skipped)?).then(|| part.slice(skipped..skipped + length))
    }

    fn read(&self, start: u64, out: &mut [u8]) -> io::Result<()> {
        let first = self.0.range(..=start).next_back().map_or(start, |(first, _)| *first);
        let (mut at, mut filled) = (start, 0);
        for (begin, part) in self.0.range(first..) {
            if filled == out.len() {
                break;
            }
            let skipped = at.checked_sub(*begin).and_then(|skipped| usize::try_from(skipped).ok());
            let Some(rest) = skipped.and_then(|skipped| part.get(skipped..)) else { break };
            let length = rest.len().min(out.len() - filled);
            out[filled..filled + length].copy_from_slice(&rest[..length]);
            filled += length;
            at += length as u64;
        }
        if filled == out.len() { Ok(()) } else { Err(ErrorKind::UnexpectedEof.into()) }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // It is gone under this name when the draft is finished. One that cannot be removed is at the next opening.
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, start: u64, out: &mut [u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, start)
}

#[cfg(unix)]
fn write_all_at(file: &File, start: u64, bytes: &[u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, start)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut start: u64, mut out: &mut [u8]) -> io::Result<()> {
    while !out.is_empty() {
        let length = std::os::windows::fs::FileExt::seek_read(file, out, start)?;
        if length == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        out = &mut out[length..];
        start += length as u64;
    }
    Ok(())
}

#[cfg(windows)]
fn write_all_at(file: &File, mut start: u64, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let length = std::os::windows::fs::FileExt::seek_write(file, bytes, start)?;
        bytes = &bytes[length..];
        start += length as u64;
    }
    Ok(())
}

/// The directory while this process holds it.
#[derive(Debug)]
struct Disk {
    dir: PathBuf,
    /// Two threads that put the same blob need a temporary file each.
    next_temporary: AtomicU64,
    _lock: File,
}

impl Disk {
    fn blobs_dir(&self) -> PathBuf {
        self.dir.join(BLOBS)
    }

    fn blob_path(&self, digest: Digest, keep: Keep) -> PathBuf {
        self.blobs_dir().join(blob_name(digest, keep))
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
            return Err(JournalError::Io { action: "write", path, source });
        }
        flush_dir(dir)
    }

    fn identity(&self, federation: &str, name: Option<&PeerId>) -> Result<PeerId, JournalError> {
        let path = self.dir.join(IDENTITY);
        let Some(bytes) = read_if_there(&path)? else { return self.create_identity(federation, name) };
        let (found_federation, found) = parse_identity(&path, &bytes)?;
        if found_federation != federation {
            let wanted = federation.to_owned();
            return Err(JournalError::OtherFederation { dir: self.dir.clone(), found: found_federation, wanted });
        }
        match name {
            Some(wanted) if *wanted != found => {
                Err(JournalError::OtherPeer { dir: self.dir.clone(), found, wanted: wanted.clone() })
            }
            _ => Ok(found),
        }
    }

    fn create_identity(&self, federation: &str, name: Option<&PeerId>) -> Result<PeerId, JournalError> {
        let peer = name.cloned().unwrap_or_else(generated_name);
        let text = identity_text(federation, &peer);
        self.replace(&self.dir, IDENTITY, &[text.as_bytes()])?;
        // The directory's own entry must survive as well, or the promises in it would be forgotten with it.
        match self.dir.parent() {
            Some(parent) if parent != Path::new("") => flush_dir(parent)?,
            _ => flush_dir(Path::new("."))?,
        }
        Ok(peer)
    }

    fn state(&self) -> Result<Option<Vec<u8>>, JournalError> {
        let path = self.dir.join(STATE);
        if let Some(bytes) = read_if_there(&path)? {
            return parse_state(&path, bytes).map(Some);
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
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(JournalError::InUse { dir: dir.to_owned() }),
        Err(TryLockError::Error(source)) => Err(JournalError::Io { action: "lock", path, source }),
    }
}

fn identity_text(federation: &str, peer: &PeerId) -> String {
    let text = format!("rodizio peer {VERSION}\nfederation {federation}\npeer {peer}\n");
    let checksum = Digest::of(text.as_bytes());
    format!("{text}{CHECKSUM}{checksum}\n")
}

fn parse_identity(path: &Path, bytes: &[u8]) -> Result<(String, PeerId), JournalError> {
    let damaged = |problem| JournalError::Damaged { path: path.to_owned(), problem };
    let text = str::from_utf8(bytes).map_err(|_| damaged("it is not text"))?;
    let whole = text.strip_suffix('\n').ok_or_else(|| damaged("its last line is cut short"))?;
    let (first, rest) = whole.split_once('\n').unwrap_or((whole, ""));
    let version = first.strip_prefix("rodizio peer ").and_then(|version| version.parse().ok());
    match version {
        Some(VERSION) => {}
        Some(found) if found > VERSION => return Err(JournalError::Newer { path: path.to_owned(), found }),
        _ => return Err(damaged("its first line is not that of an identity file")),
    }
    let fields = rest.strip_prefix("federation ").and_then(|rest| rest.split_once("\npeer "));
    let fields = fields.and_then(|(federation, rest)| Some((federation, rest.split_once('\n')?.0)));
    let (federation, peer) = fields.ok_or_else(|| damaged("it lacks the federation or the peer"))?;
    let peer = PeerId::new(peer).map_err(|_| damaged("its peer is not a peer id"))?;
    if text != identity_text(federation, &peer) {
        return Err(damaged("its checksum does not match its content"));
    }
    Ok((federation.to_owned(), peer))
}

fn generated_name() -> PeerId {
    let name: String = rand::random::<[u8; GENERATED_NAME_BYTES]>().iter().map(|b| format!("{b:02x}")).collect();
    PeerId::new(&name).expect("hexadecimal digits are a peer id")
}

fn state_header(payload: &[u8]) -> [u8; STATE_HEADER_BYTES] {
    let mut header = [0; STATE_HEADER_BYTES];
    header[..8].copy_from_slice(STATE_MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..20].copy_from_slice(&(payload.len() as u64).to_le_bytes());
    header[20..].copy_from_slice(&Digest::of(payload).0);
    header
}

fn parse_state(path: &Path, mut bytes: Vec<u8>) -> Result<Vec<u8>, JournalError> {
    let damaged = |problem| JournalError::Damaged { path: path.to_owned(), problem };
    if bytes.len() < STATE_HEADER_BYTES {
        return Err(damaged("it is cut short"));
    }
    let payload = bytes.split_off(STATE_HEADER_BYTES);
    if &bytes[..8] != STATE_MAGIC {
        return Err(damaged("it does not start like a state file"));
    }
    let found = u32::from_le_bytes(bytes[8..12].try_into().expect("the range has 4 bytes"));
    if found > VERSION {
        return Err(JournalError::Newer { path: path.to_owned(), found });
    }
    if bytes != state_header(&payload) {
        return Err(damaged("its checksum or its length does not match its content"));
    }
    Ok(payload)
}

fn blob_name(digest: Digest, keep: Keep) -> String {
    let end = match keep {
        Keep::Durable => BLOB_END,
        Keep::Unflushed => UNFLUSHED_END,
    };
    format!("{digest}{end}")
}

/// How [`Disk::replace`] names the file beside that of `name`.
fn temporary_name(name: &str, number: u64) -> String {
    format!("{name}.{number}.tmp")
}

/// Whether [`Disk::replace`] made the file: nobody else's is to be deleted.
fn is_temporary(name: &str) -> bool {
    let parts = name.strip_suffix(".tmp").and_then(|name| name.rsplit_once('.'));
    parts.is_some_and(|(name, number)| {
        number.parse::<u64>().is_ok() && (name == IDENTITY || name == STATE || name.ends_with(BLOB_END))
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

fn remove(path: &Path) -> Result<(), JournalError> {
    fs::remove_file(path).map_err(io_error("remove", path))
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
    use bytes::BytesMut;

    use super::*;

    fn open(dir: &Path) -> Result<(Journal, Loaded), JournalError> {
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
        let (_, first) = open(&dir).unwrap();
        assert_eq!((first.peer.as_str().len(), &first.state), (16, &None));
        assert_eq!(open(&dir).unwrap().1, first);
        let (_, other) = open(&parent.path().join("c")).unwrap();
        assert_ne!(first.peer, other.peer);
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
            assert!(matches!(refused, JournalError::Damaged { .. } | JournalError::Newer { .. }), "byte {at}");
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
                matches!(refused, JournalError::Damaged { .. } | JournalError::Newer { .. }),
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
    fn files_of_a_newer_version_are_refused_as_such() {
        let dir = saved(b"promise");
        let path = dir.path().join(STATE);
        let mut bytes = fs::read(&path).unwrap();
        bytes[8..12].copy_from_slice(&(VERSION + 1).to_le_bytes());
        fs::write(&path, bytes).unwrap();
        assert!(matches!(open(dir.path()), Err(JournalError::Newer { found: 2, .. })));
        let path = dir.path().join(IDENTITY);
        fs::write(&path, "rodizio peer 2\nsomething else\n").unwrap();
        assert!(matches!(open(dir.path()), Err(JournalError::Newer { found: 2, .. })));
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
        let next = [&state_header(b"after")[..], b"after"].concat();
        let dir = saved(b"before");
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
        for (path, bytes) in instants(dir.path(), IDENTITY, identity_text("ward", &name).as_bytes()) {
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
    fn a_blob_survives_the_process_and_is_verified_when_read() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = Bytes::from(vec![3; 10_000]);
        let digest = Digest::of(&bytes);
        let (mut journal, _) = open(dir.path()).unwrap();
        assert_eq!(journal.blob(digest).unwrap(), None);
        journal.put_blob(digest, &bytes).unwrap();
        journal.put_blob(digest, &bytes).unwrap();
        journal.save_state(b"promise").unwrap();
        drop(journal);
        let (journal, _) = open(dir.path()).unwrap();
        assert_eq!(journal.blob(digest).unwrap(), Some(bytes.clone()));
        drop(journal);
        let path = dir.path().join(BLOBS).join(blob_name(digest, Keep::Durable));
        fs::write(&path, &bytes[1..]).unwrap();
        let (journal, _) = open(dir.path()).unwrap();
        let damaged = journal.blob(digest).unwrap_err();
        assert!(matches!(&damaged, JournalError::DamagedBlob { path: found } if *found == path), "{damaged}");
        assert!(damaged.hint().contains("remove that file"));
        journal.put_blob(digest, &bytes).unwrap();
        assert_eq!(fs::read(&path).unwrap(), bytes, "putting a blob again mends its file");
    }

    #[test]
    fn a_blob_is_written_and_read_by_ranges_in_any_order() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = open(dir.path()).unwrap();
        let bytes: Bytes = (0..2_500u32).map(|i| (i / 7) as u8).collect::<Vec<_>>().into();
        let digest = Digest::of(&bytes);
        for blobs in [journal.blobs(), Blobs::memory()] {
            let mut draft = blobs.draft(Keep::Durable).unwrap();
            for range in [2_048..2_500, 0..1_024, 1_024..2_048] {
                draft.write(range.start as u64, &bytes.slice(range)).unwrap();
            }
            let mut found = vec![0; 700];
            draft.read(900, &mut found).unwrap();
            assert_eq!(found, bytes[900..1_600]);
            assert!(blobs.open(digest).unwrap().is_none());
            draft.finish(digest).unwrap();
            drop(draft);
            let blob = blobs.open(digest).unwrap().unwrap();
            assert_eq!(blob.bytes(), 2_500);
            blob.read(1_800, &mut found).unwrap();
            assert_eq!(found, bytes[1_800..2_500]);
            assert!(blob.read(1_801, &mut found).is_err(), "it ends there");
            assert_eq!(blobs.get(digest).unwrap().unwrap(), bytes);
        }
    }

    #[test]
    fn a_draft_that_is_not_finished_leaves_nothing_behind_nor_does_a_crash() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = open(dir.path()).unwrap();
        let count = || fs::read_dir(dir.path().join(BLOBS)).unwrap().count();
        let draft = || {
            let mut draft = journal.blobs().draft(Keep::Durable).unwrap();
            draft.write(3, &Bytes::from_static(b"part")).unwrap();
            draft
        };
        let dropped = draft();
        assert_eq!(count(), 1);
        drop(dropped);
        assert_eq!(count(), 0);
        std::mem::forget((draft(), draft()));
        assert_eq!(count(), 2);
        // The process has died: nobody holds the directory any more.
        let disk = &journal.disk;
        disk._lock.unlock().unwrap();
        assert!(open(dir.path()).is_ok());
        assert_eq!(count(), 0);
    }

    #[test]
    fn a_blob_that_was_not_flushed_survives_the_process_and_is_dropped_if_it_does_not_survive_the_power() {
        let bytes = Bytes::from_static(b"an update");
        let digest = Digest::of(&bytes);
        let unflushed = |dir: &Path| {
            let (journal, _) = open(dir).unwrap();
            let mut draft = journal.blobs().draft(Keep::Unflushed).unwrap();
            draft.write(0, &bytes).unwrap();
            draft.finish(digest).unwrap();
            dir.join(BLOBS).join(blob_name(digest, Keep::Unflushed))
        };
        let dir = tempfile::tempdir().unwrap();
        let path = unflushed(dir.path());
        let (journal, _) = open(dir.path()).unwrap();
        assert_eq!(journal.blob(digest).unwrap().as_ref(), Some(&bytes));
        assert!(!journal.blobs().is_durable(&digest));
        journal.retain_blobs(&BTreeSet::new()).unwrap();
        assert!(!path.exists());
        drop(journal);

        // The length is on disk, and what was written is not.
        fs::write(unflushed(dir.path()), [0; 9]).unwrap();
        let (journal, _) = open(dir.path()).unwrap();
        assert_eq!(journal.blob(digest).unwrap(), None);
        assert!(!path.exists());
    }

    #[test]
    fn a_blob_is_flushed_once_and_one_that_is_gone_is_not() {
        let bytes = Bytes::from_static(b"an update");
        let digest = Digest::of(&bytes);
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = open(dir.path()).unwrap();
        for blobs in [journal.blobs(), Blobs::memory()] {
            let put = |keep: Keep| {
                let mut draft = blobs.draft(keep).unwrap();
                draft.write(0, &bytes).unwrap();
                draft.finish(digest).unwrap();
            };
            assert!(!blobs.flush(digest).unwrap());
            put(Keep::Unflushed);
            assert!(!blobs.is_durable(&digest));
            let before = blobs.open(digest).unwrap().unwrap();
            for _ in 0..2 {
                assert!(blobs.flush(digest).unwrap());
                assert!(blobs.is_durable(&digest));
            }
            assert_eq!(before.read_all().unwrap(), bytes);
            put(Keep::Unflushed);
            assert!(blobs.is_durable(&digest), "it stays what it was");
            blobs.retain(&BTreeSet::new()).unwrap();
            put(Keep::Unflushed);
            put(Keep::Durable);
            assert!(blobs.is_durable(&digest), "it was made again, to be kept");
            assert!(blobs.lose_power().is_empty());
        }
        drop(journal);
        assert_eq!(read_blob(dir.path(), digest).unwrap(), Some(bytes));
    }

    #[test]
    fn a_long_blob_is_flushed_while_it_is_written() {
        let bytes = Bytes::from((0..2 * FLUSH_BYTES + 1).map(|i| (i % 251) as u8).collect::<Vec<_>>());
        let digest = Digest::of(&bytes);
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = open(dir.path()).unwrap();
        let mut draft = journal.blobs().draft(Keep::Durable).unwrap();
        for start in (0..bytes.len()).step_by(FLUSH_BYTES / 4) {
            let end = bytes.len().min(start + FLUSH_BYTES / 4);
            draft.write(start as u64, &bytes.slice(start..end)).unwrap();
        }
        let DraftContent::File { flusher: Some(flusher), .. } = &draft.content else { panic!("it is no file") };
        assert!(flusher.running.is_some());
        draft.finish(digest).unwrap();
        drop((draft, journal));
        assert_eq!(read_blob(dir.path(), digest).unwrap(), Some(bytes));
    }

    #[test]
    fn a_blob_that_is_no_longer_kept_can_be_read_by_who_has_it_open() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = open(dir.path()).unwrap();
        let bytes = Bytes::from_static(b"weights");
        let digest = Digest::of(&bytes);
        for blobs in [journal.blobs(), Blobs::memory()] {
            blobs.put(digest, &bytes).unwrap();
            let blob = blobs.open(digest).unwrap().unwrap();
            blobs.retain(&BTreeSet::new()).unwrap();
            assert!(blobs.open(digest).unwrap().is_none());
            let mut found = vec![0; bytes.len()];
            blob.read(0, &mut found).unwrap();
            assert_eq!(found, bytes);
        }
    }

    #[test]
    fn a_message_is_a_part_of_a_blob_behind_a_header_and_copied_only_where_it_must_be() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = open(dir.path()).unwrap();
        let bytes = Bytes::from_static(b"weights of a model");
        let digest = Digest::of(&bytes);
        for blobs in [journal.blobs(), Blobs::memory()] {
            let mut draft = blobs.draft(Keep::Durable).unwrap();
            draft.write(0, &bytes.slice(..8)).unwrap();
            draft.write(8, &bytes.slice(8..)).unwrap();
            draft.finish(digest).unwrap();
            let blob = blobs.open(digest).unwrap().unwrap();
            let mut buffers = Buffers::default();
            for range in [0..7, 11..18, 4..10, 0..18, 8..8] {
                let header = Bytes::from_static(b"head:");
                let (head, tail) = blob.behind(header, range.clone(), &mut buffers).unwrap();
                assert_eq!([head, tail].concat(), [b"head:", &bytes[range]].concat());
            }
            assert!(blob.behind(Bytes::new(), 11..19, &mut buffers).is_err());
        }
        let blobs = Blobs::memory();
        blobs.put(digest, &bytes).unwrap();
        let blob = blobs.open(digest).unwrap().unwrap();
        let (_, tail) = blob.behind(Bytes::new(), 11..18, &mut Buffers::default()).unwrap();
        assert_eq!(tail.as_ptr(), bytes[11..].as_ptr());
    }

    #[test]
    fn without_a_disk_the_memory_of_a_dropped_blob_is_used_again_unless_somebody_reads_it() {
        let blobs = Blobs::memory();
        let write = |bytes: &'static [u8]| {
            let mut draft = blobs.draft(Keep::Durable).unwrap();
            // As a chunk comes: memory that can be written to.
            draft.write(0, &BytesMut::from(bytes).freeze()).unwrap();
            draft.finish(Digest::of(bytes)).unwrap();
            blobs.open(Digest::of(bytes)).unwrap().unwrap()
        };
        let place = |blob: &Blob| blob.read_all().unwrap().as_ptr();
        let (first, second) = (write(b"first"), write(b"second"));
        let place_of_second = place(&second);
        drop(second);
        blobs.retain(&BTreeSet::new()).unwrap();
        let third = write(b"third");
        assert_eq!((place(&third), third.read_all().unwrap()), (place_of_second, Bytes::from_static(b"third")));
        assert_eq!(first.read_all().unwrap(), &b"first"[..]);
    }

    #[test]
    fn only_blobs_worth_keeping_are_retained() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = open(dir.path()).unwrap();
        for blobs in [journal.blobs(), Blobs::memory()] {
            let digests = [b"a", b"b", b"c"].map(|text| {
                let bytes = Bytes::from_static(text);
                blobs.put(Digest::of(&bytes), &bytes).unwrap();
                Digest::of(&bytes)
            });
            blobs.retain(&BTreeSet::from([digests[1]])).unwrap();
            let kept = digests.map(|digest| blobs.get(digest).unwrap().is_some());
            assert_eq!(kept, [false, true, false]);
        }
        assert_eq!(fs::read_dir(dir.path().join(BLOBS)).unwrap().count(), 1);
    }

    #[test]
    fn many_threads_put_and_read_the_same_blobs() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = open(dir.path()).unwrap();
        let contents: Vec<_> = (0..8u8).map(|n| Bytes::from(vec![n; 1000])).collect();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let (blobs, contents) = (journal.blobs(), &contents);
                scope.spawn(move || {
                    for bytes in contents {
                        blobs.put(Digest::of(bytes), bytes).unwrap();
                        assert_eq!(blobs.get(Digest::of(bytes)).unwrap().as_ref(), Some(bytes));
                    }
                });
            }
        });
        let names = list(&dir.path().join(BLOBS)).unwrap();
        assert_eq!(names.len(), contents.len());
        assert!(names.iter().all(|(name, _)| !is_temporary(name)));
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
