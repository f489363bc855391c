//! Blobs by digest: on disk, or in memory alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use bytes::Bytes;
use tracing::warn;

use super::{BLOBS, Disk, JournalError, flush_dir, io_error, list, read_if_there, remove};
use crate::buffers::Buffers;
use crate::transfer::{Keep, Source};
use crate::types::Digest;

/// How the name of a blob's file ends.
pub(super) const BLOB_END: &str = ".blob";
const UNFLUSHED_END: &str = ".unflushed";

/// What stands for a blob's name while it has none.
const DRAFT: &str = "draft.blob";

/// After so many bytes a file that is being written is flushed, in the background.
const FLUSH_BYTES: usize = 8 << 20;

/// The same for a file that need not be flushed: most are shorter. Of gigabytes the system writes most before they are dropped,
/// and all at once when it does; whoever keeps a promise meanwhile waits for seconds.
const EASE_BYTES: usize = 128 << 20;

/// So many bytes of a file are given back at a time. Shorter files are not worth a thread.
const GIVE_BACK_BYTES: u64 = 16 << 20;

/// Blobs by digest, on disk or in memory alone. A clone is another handle of the same blobs, for another thread.
///
/// On disk, memory holds none of a blob: it is written and read by ranges, and what it takes in memory is the system's
/// to give and to take back.
#[derive(Debug, Clone)]
pub struct Blobs {
    disk: Option<Arc<Disk>>,
    /// Those that are known to be whole: put by this process, or verified by it.
    known: Arc<Mutex<BTreeMap<Digest, Known>>>,
    /// Held while a file gets the name of a blob: of two that are the same blob, one has it.
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
    /// Held while it is flushed. The flush that began while it was written.
    flushing: Arc<Mutex<Option<Flushing>>>,
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
        flusher: Flusher,
    },
    Memory(Parts),
}

/// Parts of a blob by where they begin. None reaches into another.
#[derive(Debug, Default)]
struct Parts(BTreeMap<u64, Bytes>);

/// A temporary file, which is removed when this is dropped.
#[derive(Debug)]
struct Temporary(PathBuf);

/// The file of a durable blob that was dropped: the next is written over it. That is quicker than into a new file, which has
/// the system look for room on disk, give memory, and write down both before the flush ends.
#[derive(Debug)]
pub(super) struct SpareFile {
    file: Temporary,
    /// Makes the renaming durable. Before that nothing is written: after a loss of power it could be under the old name.
    renaming: JoinHandle<Result<(), JournalError>>,
}

/// Reads a blob of the state directory `dir`, which another process or task may be using: `None` when it is not, or no
/// longer, there.
pub fn read_blob(dir: &Path, digest: Digest) -> Result<Option<Bytes>, JournalError> {
    // It gets its other name when it is flushed.
    for keep in [Keep::Unflushed, Keep::Durable] {
        let path = dir.join(BLOBS).join(blob_name(digest, keep));
        let Some(bytes) = read_if_there(&path)? else { continue };
        if Digest::of(&bytes) == digest {
            return Ok(Some(bytes.into()));
        }
        if keep == Keep::Durable {
            refuse_damaged(path)?;
        }
    }
    Ok(None)
}

/// Refuses a blob whose content is not what its name says, unless it was dropped meanwhile: then it may be written over.
fn refuse_damaged(path: PathBuf) -> Result<(), JournalError> {
    if path.exists() { Err(JournalError::DamagedBlob { path }) } else { Ok(()) }
}

impl Blobs {
    /// Blobs in memory alone, for tests and simulation.
    pub fn memory() -> Self {
        Self { disk: None, known: Arc::default(), naming: Arc::default(), spare: Arc::default() }
    }

    pub(super) fn on(disk: Arc<Disk>) -> Self {
        Self { disk: Some(disk), ..Self::memory() }
    }

    /// Begins a blob.
    pub fn draft(&self, keep: Keep) -> Result<Draft, JournalError> {
        self.draft_for(keep, keep)
    }

    /// Begins a blob that is [flushed](Self::flush) as soon as it is finished: most of it is by then.
    pub fn draft_to_flush(&self) -> Result<Draft, JournalError> {
        self.draft_for(Keep::Unflushed, Keep::Durable)
    }

    /// `keep` is how it is kept when it is finished, `soon` how it will be.
    fn draft_for(&self, keep: Keep, soon: Keep) -> Result<Draft, JournalError> {
        let content = match &self.disk {
            None => DraftContent::Memory(Parts::default()),
            Some(disk) => {
                let durable = soon == Keep::Durable;
                let spare = if durable { disk.spare().take() } else { None };
                let (file, temporary) = match spare.and_then(SpareFile::open) {
                    Some(opened) => opened,
                    None => disk.create_draft()?,
                };
                DraftContent::File { file: Arc::new(file), temporary, flusher: Flusher::new(soon) }
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
                self.known().insert(digest, Known { blob: blob.clone(), keep, flushing: Arc::default() });
                return Ok(Some(blob));
            }
            match keep {
                Keep::Durable => refuse_damaged(path)?,
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
    ///
    /// A blob that cannot be flushed is dropped: the system tells of what it has lost once, and takes it for written from then on.
    pub fn flush(&self, digest: Digest) -> Result<bool, JournalError> {
        let Some((blob, flushing)) =
            self.known().get(&digest).map(|known| (known.blob.clone(), known.flushing.clone()))
        else {
            return Ok(false);
        };
        let mut flushing = flushing.lock().expect("nothing panics while it holds the lock");
        if self.is_durable(&digest) {
            return Ok(true);
        }
        let (Content::File { file, path, .. }, Some(disk)) = (&*blob.0, &self.disk) else {
            return Ok(self.known().get_mut(&digest).map(|known| known.keep = Keep::Durable).is_some());
        };
        let flushed = end(flushing.take()).and_then(|()| file.sync_data());
        let _naming = self.naming();
        if !self.known().get(&digest).is_some_and(|known| known.blob.is(&blob)) {
            return Ok(false);
        }
        if let Err(error) = flushed {
            self.known().remove(&digest);
            remove(path)?;
            return Err(io_error("write", path)(error));
        }
        let named = disk.blob_path(digest, Keep::Durable);
        match fs::rename(path, &named) {
            // It is being dropped.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            renamed => renamed.map_err(io_error("write", &named))?,
        }
        flush_dir(&disk.blobs_dir())?;
        let blob = Blob(Arc::new(Content::File { file: file.clone(), path: named.clone(), bytes: blob.bytes() }));
        // Last, so that whoever finds it here may rely on the disk too.
        if let Some(known) = self.known().get_mut(&digest) {
            *known = Known { blob, keep: Keep::Durable, flushing: Arc::default() };
            return Ok(true);
        }
        remove(&named).map(|()| false)
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
        let with_keep = |(_, Known { blob, keep, .. }): (Digest, Known)| Some((blob.into_file()?, keep));
        let mut files: Vec<_> = dropped.into_iter().filter_map(with_keep).collect();
        if let Some(at) = files.iter().rposition(|(_, keep)| *keep == Keep::Durable) {
            let ((_, path), _) = files.swap_remove(at);
            disk.set_aside(&path);
        }
        for (name, path) in list(&disk.blobs_dir())? {
            let digest = name.strip_suffix(BLOB_END).or(name.strip_suffix(UNFLUSHED_END));
            let digest = digest.and_then(|hex| hex.parse().ok());
            if digest.is_some_and(|digest: Digest| !keep.contains(&digest)) {
                remove(&path)?;
            }
        }
        give_back(files.into_iter().map(|((file, _), _)| file));
        Ok(())
    }

    fn naming(&self) -> MutexGuard<'_, ()> {
        self.naming.lock().expect("nothing panics while it holds the lock")
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

    /// Whether both are one file, or lie in the same memory.
    fn is(&self, other: &Blob) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Its memory, if it lies in memory and nobody else reads it.
    fn into_parts(self) -> Option<Parts> {
        match Arc::into_inner(self.0)? {
            Content::Memory(parts) => Some(parts),
            Content::File { .. } => None,
        }
    }

    /// Its file and where that is, if it has one and nobody else reads or writes it.
    fn into_file(self) -> Option<(File, PathBuf)> {
        match Arc::into_inner(self.0)? {
            Content::File { file, path, .. } => Arc::into_inner(file).map(|file| (file, path)),
            Content::Memory(_) => None,
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
    /// Writes bytes from `start` on. After an error the same may be written again, unless what was lost is more than that: then all
    /// further writing fails.
    pub fn write(&mut self, start: u64, bytes: &[u8]) -> Result<(), JournalError> {
        self.bytes = self.bytes.max(start + bytes.len() as u64);
        match &mut self.content {
            DraftContent::File { file, temporary, flusher } => {
                let written = write_all_at(file, start, bytes);
                let flushed = written.and_then(|()| flusher.wrote(file, bytes.len()));
                flushed.map_err(|error| {
                    // It may be room that is lacking.
                    self.blobs.disk.iter().for_each(|disk| drop(disk.spare().take()));
                    io_error("write", &temporary.0)(error)
                })
            }
            DraftContent::Memory(parts) => {
                let spare = self.blobs.spare().spare(bytes.len());
                let part = spare.map_or_else(
                    || Bytes::copy_from_slice(bytes),
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
        self.name(digest)?;
        if self.keep == Keep::Unflushed || self.blobs.flush(digest)? {
            return Ok(());
        }
        let dropped = io::Error::new(ErrorKind::NotFound, "it was dropped at once");
        Err(io_error("keep", Path::new(&blob_name(digest, self.keep)))(dropped))
    }

    fn name(&mut self, digest: Digest) -> Result<(), JournalError> {
        let _naming = self.blobs.naming();
        if self.blobs.known().contains_key(&digest) {
            return Ok(());
        }
        let (content, flushing) = match (&mut self.content, &self.blobs.disk) {
            (DraftContent::File { file, temporary, flusher }, Some(disk)) => {
                let path = disk.blob_path(digest, Keep::Unflushed);
                let write = || {
                    flusher.check()?;
                    // It may be written over a longer one.
                    if file.metadata()?.len() != self.bytes {
                        file.set_len(self.bytes)?;
                    }
                    fs::rename(&temporary.0, &path)
                };
                write().map_err(io_error("write", &path))?;
                (Content::File { file: file.clone(), path, bytes: self.bytes }, flusher.running.take())
            }
            (DraftContent::Memory(parts), _) => (Content::Memory(std::mem::take(parts)), None),
            (DraftContent::File { .. }, None) => return Ok(()),
        };
        let flushing = Arc::new(Mutex::new(flushing));
        let known = Known { blob: Blob(Arc::new(content)), keep: Keep::Unflushed, flushing };
        self.blobs.known().insert(digest, known);
        Ok(())
    }
}

/// Has a file that is being written flushed in the background, so that little is left to be flushed after the last byte.
#[derive(Debug)]
struct Flusher {
    /// It begins after so many bytes.
    step: usize,
    /// What was written since the flush began that began last, in bytes.
    unflushed: usize,
    running: Option<Flushing>,
    /// A flush has failed: the file may lack some of what was written.
    has_failed: bool,
}

/// A flush that runs, on a thread of its own.
type Flushing = JoinHandle<io::Result<()>>;

impl Flusher {
    fn new(keep: Keep) -> Self {
        let step = match keep {
            Keep::Durable => FLUSH_BYTES,
            Keep::Unflushed => EASE_BYTES,
        };
        Self { step, unflushed: 0, running: None, has_failed: false }
    }

    /// So many bytes more are in the file.
    fn wrote(&mut self, file: &Arc<File>, bytes: usize) -> io::Result<()> {
        self.check()?;
        self.unflushed += bytes;
        if self.unflushed < self.step || self.running.as_ref().is_some_and(|running| !running.is_finished()) {
            return Ok(());
        }
        end(self.running.take()).inspect_err(|_| self.has_failed = true)?;
        self.unflushed = 0;
        let file = file.clone();
        // Without another thread there is more to flush at the end.
        self.running = thread::Builder::new().name("flush".into()).spawn(move || file.sync_data()).ok();
        Ok(())
    }

    /// Refuses to go on with a file of which a part is lost.
    fn check(&self) -> io::Result<()> {
        if self.has_failed { Err(io::Error::other("a part of it was lost when it was flushed")) } else { Ok(()) }
    }
}

/// Waits for a flush that runs. Its error is told here alone, not again by the flush at the end.
fn end(flushing: Option<Flushing>) -> io::Result<()> {
    let ended = flushing.map(JoinHandle::join);
    ended.map_or(Ok(()), |ended| ended.unwrap_or_else(|_| Err(io::Error::other("the flush panicked"))))
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

impl SpareFile {
    /// The file, if it can be written over.
    fn open(self) -> Option<(File, Temporary)> {
        self.renaming.join().ok()?.ok()?;
        let file = File::options().read(true).write(true).open(&self.file.0).ok()?;
        Some((file, self.file))
    }
}

impl Disk {
    fn blob_path(&self, digest: Digest, keep: Keep) -> PathBuf {
        self.blobs_dir().join(blob_name(digest, keep))
    }

    /// A name for what has no digest: that is known when all is written.
    fn draft_path(&self) -> PathBuf {
        self.blobs_dir().join(self.temporary_name(DRAFT))
    }

    fn create_draft(&self) -> Result<(File, Temporary), JournalError> {
        let temporary = Temporary(self.draft_path());
        let file = File::options().create_new(true).read(true).write(true).open(&temporary.0);
        Ok((file.map_err(io_error("create", &temporary.0))?, temporary))
    }

    pub(super) fn spare(&self) -> MutexGuard<'_, Option<SpareFile>> {
        self.spare.lock().expect("nothing panics while it holds the lock")
    }

    /// Sets a file aside that is no blob any more, to be written over. One that cannot be is left there, to be deleted.
    fn set_aside(&self, path: &Path) {
        let file = self.draft_path();
        if fs::rename(path, &file).is_err() {
            return;
        }
        let file = Temporary(file);
        let dir = self.blobs_dir();
        let renaming = thread::Builder::new().name("flush".into()).spawn(move || flush_dir(&dir));
        *self.spare() = renaming.ok().map(|renaming| SpareFile { file, renaming });
    }
}

/// Gives back, on another thread, the room of files that have no name any more. A part at a time: what a file system does at
/// once for a gigabyte keeps all others from writing meanwhile, promises too.
fn give_back(files: impl Iterator<Item = File>) {
    let with_bytes = |file: File| file.metadata().map(|found| (found.len(), file));
    let long: Vec<_> = files.flat_map(with_bytes).filter(|(bytes, _)| *bytes > GIVE_BACK_BYTES).collect();
    if long.is_empty() {
        return;
    }
    let work = move || {
        for (mut bytes, file) in long {
            while bytes > 0 {
                bytes = bytes.saturating_sub(GIVE_BACK_BYTES);
                if file.set_len(bytes).is_err() {
                    // What is left is given back when the file is closed.
                    break;
                }
            }
        }
    };
    // Without another thread all are closed here.
    let _ = thread::Builder::new().name("give-back".into()).spawn(work);
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

pub(super) fn blob_name(digest: Digest, keep: Keep) -> String {
    let end = match keep {
        Keep::Durable => BLOB_END,
        Keep::Unflushed => UNFLUSHED_END,
    };
    format!("{digest}{end}")
}

#[cfg(test)]
mod tests {
    use super::super::tests::open;
    use super::super::{Journal, is_temporary};
    use super::*;

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
            draft.write(3, b"part").unwrap();
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
        assert_eq!(read_blob(dir.path(), digest).unwrap().as_ref(), Some(&bytes));
        assert!(!journal.blobs().is_durable(&digest));
        journal.retain_blobs(&BTreeSet::new()).unwrap();
        assert!(!path.exists());
        drop(journal);

        // The length is on disk, and what was written is not.
        fs::write(unflushed(dir.path()), [0; 9]).unwrap();
        assert_eq!(read_blob(dir.path(), digest).unwrap(), None);
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
        let mut eased = journal.blobs().draft(Keep::Unflushed).unwrap();
        for draft in [&mut draft, &mut eased] {
            for start in (0..bytes.len()).step_by(FLUSH_BYTES / 4) {
                let end = bytes.len().min(start + FLUSH_BYTES / 4);
                draft.write(start as u64, &bytes[start..end]).unwrap();
            }
        }
        let is_flushed = |draft: &Draft| match &draft.content {
            DraftContent::File { flusher, .. } => flusher.running.is_some(),
            DraftContent::Memory(_) => panic!("it is no file"),
        };
        assert!(is_flushed(&draft));
        assert!(!is_flushed(&eased), "so short it will be gone before the system writes it");
        // As if it were a long one.
        let DraftContent::File { flusher, .. } = &mut eased.content else { panic!("it is no file") };
        flusher.unflushed = EASE_BYTES - 1;
        eased.write(0, &bytes[..1]).unwrap();
        assert!(is_flushed(&eased));
        draft.finish(digest).unwrap();
        drop((draft, journal));
        assert_eq!(read_blob(dir.path(), digest).unwrap(), Some(bytes));
    }

    #[test]
    fn a_blob_that_is_soon_flushed_is_there_before_and_its_flush_has_begun() {
        let bytes = Bytes::from(vec![7; FLUSH_BYTES]);
        let digest = Digest::of(&bytes);
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = open(dir.path()).unwrap();
        let blobs = journal.blobs();
        let mut draft = blobs.draft_to_flush().unwrap();
        draft.write(0, &bytes).unwrap();
        draft.finish(digest).unwrap();
        assert!(!blobs.is_durable(&digest));
        assert_eq!(blobs.get(digest).unwrap().as_ref(), Some(&bytes));
        assert!(blobs.known()[&digest].flushing.lock().unwrap().is_some());
        assert!(blobs.flush(digest).unwrap() && blobs.is_durable(&digest));
        drop(journal);
        assert_eq!(read_blob(dir.path(), digest).unwrap(), Some(bytes));
    }

    #[test]
    fn the_room_of_long_blobs_that_are_dropped_is_given_back_whoever_else_has_the_files_open() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = open(dir.path()).unwrap();
        let files = [(b"update", Keep::Unflushed), (b"stayed", Keep::Durable), (b"newest", Keep::Durable)];
        let files = files.map(|(end, keep)| {
            let mut draft = journal.blobs().draft(keep).unwrap();
            draft.write(2 * GIVE_BACK_BYTES, end).unwrap();
            draft.finish(Digest::of(end)).unwrap();
            File::open(dir.path().join(BLOBS).join(blob_name(Digest::of(end), keep))).unwrap()
        });
        let given_back = || files.iter().filter(|file| file.metadata().unwrap().len() == 0).count();
        journal.blobs().retain(&BTreeSet::new()).unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        // One model is set aside, to be written over.
        while given_back() < 2 {
            assert!(std::time::Instant::now() < deadline);
            thread::yield_now();
        }
        assert_eq!((files[0].metadata().unwrap().len(), given_back()), (0, 2));
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
        assert_eq!(tail.as_ptr(), blob.read_all().unwrap()[11..].as_ptr());
    }

    #[test]
    fn without_a_disk_the_memory_of_a_dropped_blob_is_used_again_unless_somebody_reads_it() {
        let blobs = Blobs::memory();
        let write = |bytes: &'static [u8]| {
            let mut draft = blobs.draft(Keep::Durable).unwrap();
            draft.write(0, bytes).unwrap();
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
        let names = list(&dir.path().join(BLOBS)).unwrap();
        assert_eq!(names.iter().filter(|(name, _)| !is_temporary(name)).count(), 1);
    }

    /// The one file among the blobs.
    fn only_file(dir: &Path) -> PathBuf {
        match &list(&dir.join(BLOBS)).unwrap()[..] {
            [(_, path)] => path.clone(),
            others => panic!("{others:?} instead of one file"),
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_durable_blob_is_written_over_the_one_that_was_dropped_last_whatever_their_lengths() {
        use std::os::unix::fs::MetadataExt;

        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = open(dir.path()).unwrap();
        let mut files = BTreeSet::new();
        for length in [1_000_usize, 1_000, 10, 2_500, 0, 700] {
            let bytes = Bytes::from(vec![length.to_le_bytes()[0]; length]);
            let digest = Digest::of(&bytes);
            journal.put_blob(digest, &bytes).unwrap();
            assert_eq!(fs::read(only_file(dir.path())).unwrap(), bytes);
            assert_eq!(journal.blob(digest).unwrap(), Some(bytes));
            files.insert(fs::metadata(only_file(dir.path())).unwrap().ino());
            journal.retain_blobs(&BTreeSet::new()).unwrap();
            assert!(is_temporary(only_file(dir.path()).file_name().unwrap().to_str().unwrap()));
            // It is not for what may never be written to the disk.
            drop(journal.blobs().draft(Keep::Unflushed).unwrap());
        }
        assert_eq!(files.len(), 1);
        drop(journal);
        assert_eq!(list(&dir.path().join(BLOBS)).unwrap(), []);
    }

    #[test]
    fn a_blob_that_somebody_reads_is_not_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = open(dir.path()).unwrap();
        let bytes = Bytes::from_static(b"weights");
        journal.put_blob(Digest::of(&bytes), &bytes).unwrap();
        let blob = journal.blobs().open(Digest::of(&bytes)).unwrap().unwrap();
        journal.retain_blobs(&BTreeSet::new()).unwrap();
        let next = Bytes::from_static(b"other weights");
        journal.put_blob(Digest::of(&next), &next).unwrap();
        assert_eq!(blob.read_all().unwrap(), bytes);
        assert_eq!(fs::read(only_file(dir.path())).unwrap(), next);
    }

    #[test]
    fn the_room_of_a_dropped_blob_is_given_back_when_room_is_lacking_and_after_a_crash() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = open(dir.path()).unwrap();
        let bytes = Bytes::from_static(b"weights");
        let drop_one = |journal: &Journal| {
            journal.put_blob(Digest::of(&bytes), &bytes).unwrap();
            journal.retain_blobs(&BTreeSet::new()).unwrap();
            assert!(only_file(dir.path()).exists());
        };
        drop_one(&journal);
        // No file can take this name.
        fs::create_dir_all(dir.path().join("state/in the way")).unwrap();
        assert!(journal.save_state(b"promise").is_err());
        assert_eq!(list(&dir.path().join(BLOBS)).unwrap(), []);
        fs::remove_dir_all(dir.path().join("state")).unwrap();

        drop_one(&journal);
        std::mem::forget(journal.blobs().disk.as_ref().unwrap().spare().take());
        drop(journal);
        assert!(only_file(dir.path()).exists());
        assert!(open(dir.path()).is_ok());
        assert_eq!(list(&dir.path().join(BLOBS)).unwrap(), []);
    }

    /// A file that takes what is written and cannot be flushed.
    #[cfg(unix)]
    fn unflushable() -> (io::PipeReader, Arc<File>) {
        let (reader, writer) = io::pipe().unwrap();
        (reader, Arc::new(File::from(std::os::fd::OwnedFd::from(writer))))
    }

    #[cfg(unix)]
    #[test]
    fn a_blob_that_could_not_be_flushed_is_dropped_and_not_believed_the_second_time() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = open(dir.path()).unwrap();
        let blobs = journal.blobs();
        let bytes = Bytes::from_static(b"a model");
        let digest = Digest::of(&bytes);
        let put = |keep| {
            let mut draft = blobs.draft(keep).unwrap();
            draft.write(0, &bytes).unwrap();
            draft.finish(digest)
        };
        put(Keep::Unflushed).unwrap();
        let (_reader, file) = unflushable();
        let content = Content::File { file, path: only_file(dir.path()), bytes: bytes.len() as u64 };
        let lost = Known { blob: Blob(Arc::new(content)), keep: Keep::Unflushed, flushing: Arc::default() };
        blobs.known().insert(digest, lost);
        blobs.flush(digest).unwrap_err();
        assert_eq!(list(&dir.path().join(BLOBS)).unwrap(), []);
        assert!(!blobs.flush(digest).unwrap());
        // It is made or pulled again, and that is no longer taken for the lost one.
        put(Keep::Durable).unwrap();
        assert!(blobs.is_durable(&digest));
        assert_eq!(fs::read(only_file(dir.path())).unwrap(), bytes);
    }

    #[cfg(unix)]
    #[test]
    fn a_draft_of_which_a_part_was_lost_is_not_finished() {
        let (_reader, file) = unflushable();
        let mut flusher = Flusher::new(Keep::Durable);
        let mut writes = || flusher.wrote(&file, FLUSH_BYTES);
        writes().unwrap();
        let lost = loop {
            if let Err(lost) = writes() {
                break lost;
            }
            thread::yield_now();
        };
        assert_eq!(lost.kind(), ErrorKind::InvalidInput);
        writes().unwrap_err();

        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = open(dir.path()).unwrap();
        let mut draft = journal.blobs().draft(Keep::Unflushed).unwrap();
        let DraftContent::File { flusher: of_draft, .. } = &mut draft.content else { panic!("it has no file") };
        *of_draft = flusher;
        let why = draft.finish(Digest::of(b"")).unwrap_err().to_string();
        assert!(why.contains("lost"), "{why}");
    }

    #[test]
    fn what_is_dropped_before_it_is_durable_is_not_called_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = open(dir.path()).unwrap();
        for blobs in [journal.blobs(), Blobs::memory()] {
            let mut draft = blobs.draft(Keep::Durable).unwrap();
            draft.write(0, b"a model").unwrap();
            let digest = Digest::of(b"a model");
            draft.name(digest).unwrap();
            blobs.retain(&BTreeSet::new()).unwrap();
            assert!(!blobs.flush(digest).unwrap() && blobs.open(digest).unwrap().is_none());
        }
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
}
