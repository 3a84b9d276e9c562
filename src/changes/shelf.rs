//! Where change sets lie: `<state>/changes/<job>/` with `base` (the listing of the workspace before the job),
//! `changes.json` (the change set), and `blobs/` (contents by their hash). A file appears whole or not at all, and
//! is on the disk before anybody is told of it. Must never be reachable for anybody but the daemon; contents can be
//! read through a descriptor of their directory, whoever reads.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::durable::flush_all;
use crate::change::{BlobId, ChangeSet, Commits};
use crate::git::head::Head;
use crate::job::JobId;

const BASE: &str = "base";
const ORIGIN: &str = "origin.json";
const INDEX: &str = "index";
const COMMITS: &str = "commits.json";
const CHANGES: &str = "changes.json";
const BLOBS: &str = "blobs";
/// What the name of a content begins with that is not whole yet.
const FRESH: &str = ".new-";
/// Longest stored change set, in bytes.
const CHANGES_BYTES_MAX: u64 = 512 << 20;
const COPY_BYTES: usize = 128 << 10;
/// Most contents that are open and wait for the disk together.
const BATCH_MAX: usize = 256;

/// Why something is not kept or not found.
#[derive(Debug, thiserror::Error)]
pub enum ShelfError {
    /// The file system said no.
    #[error("cannot {doing} {path:?}: {source}")]
    Io {
        /// The step.
        doing: &'static str,
        /// What on.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
    /// What is stored does not parse: the disk lies, or another version wrote it.
    #[error("{path:?} does not parse: {detail}")]
    Corrupt {
        /// Which file.
        path: PathBuf,
        /// The parser's words.
        detail: String,
    },
}

fn at<E: Into<io::Error>>(doing: &'static str, path: &Path) -> impl FnOnce(E) -> ShelfError {
    let path = path.to_owned();
    move |source| ShelfError::Io { doing, path, source: source.into() }
}

/// All change sets.
#[derive(Debug, Clone)]
pub struct Shelf {
    dir: PathBuf,
}

/// What is kept of one job.
#[derive(Debug, Clone)]
pub struct JobShelf {
    dir: PathBuf,
}

impl Shelf {
    /// The change sets below `dir`, a directory of the daemon's own.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// What is kept of `job`; nothing is made.
    pub fn of(&self, job: &JobId) -> JobShelf {
        JobShelf { dir: self.dir.join(job.as_str()) }
    }
}

impl JobShelf {
    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes the directories, where they are missing.
    ///
    /// # Errors
    /// [`ShelfError::Io`].
    pub fn create(&self) -> Result<(), ShelfError> {
        // Contents are opened by threads with other rights than ours, through a descriptor of `blobs`; the way
        // there by name is barred above it.
        for (dir, mode) in [(self.dir.as_path(), 0o700), (&self.blobs(), 0o711)] {
            DirBuilder::new().recursive(true).mode(mode).create(dir).map_err(at("make", dir))?;
            std::fs::set_permissions(dir, Permissions::from_mode(mode)).map_err(at("restrict", dir))?;
        }
        Ok(())
    }

    /// Removes contents that a dead process was just writing. Nobody may be writing one.
    ///
    /// # Errors
    /// [`ShelfError::Io`].
    pub fn tidy(&self) -> Result<(), ShelfError> {
        let dir = self.blobs();
        for entry in std::fs::read_dir(&dir).map_err(at("list", &dir))? {
            let entry = entry.map_err(at("list", &dir))?;
            if entry.file_name().as_encoded_bytes().starts_with(FRESH.as_bytes()) {
                std::fs::remove_file(entry.path()).map_err(at("remove", &entry.path()))?;
            }
        }
        Ok(())
    }

    /// Removes what a dead process was just writing beside contents: it was never renamed to what it was to be. Nobody
    /// may be writing.
    ///
    /// # Errors
    /// [`ShelfError::Io`].
    pub fn forget_unwritten(&self) -> Result<(), ShelfError> {
        let entries = match std::fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(at("list", &self.dir))?,
        };
        for entry in entries {
            let entry = entry.map_err(at("list", &self.dir))?;
            if entry.file_name().as_encoded_bytes().ends_with(b".new") {
                std::fs::remove_file(entry.path()).map_err(at("remove", &entry.path()))?;
            }
        }
        Ok(())
    }

    /// Keeps the workspace before the job: its listing in its stored form, and what was checked out. Where there is a
    /// listing, the other is there too.
    ///
    /// # Errors
    /// [`ShelfError::Io`].
    pub fn put_base(&self, listing: &[u8], origin: &Head) -> Result<(), ShelfError> {
        let json = serde_json::to_vec(origin);
        let json = json.map_err(|e| at("write", &self.dir.join(ORIGIN))(io::Error::other(e)))?;
        self.put_all(&[(ORIGIN, &json), (BASE, listing)], None)
    }

    /// The listing of the workspace before the job; none where none was kept.
    ///
    /// # Errors
    /// [`ShelfError::Io`].
    pub fn base(&self) -> Result<Option<Vec<u8>>, ShelfError> {
        self.get(BASE)
    }

    /// What was checked out when the job began; nothing where that was no git repository.
    ///
    /// # Errors
    /// [`ShelfError`].
    pub fn origin(&self) -> Result<Head, ShelfError> {
        let Some(json) = self.get(ORIGIN)? else { return Ok(Head::default()) };
        let corrupt =
            |e: serde_json::Error| ShelfError::Corrupt { path: self.dir.join(ORIGIN), detail: e.to_string() };
        serde_json::from_slice(&json).map_err(corrupt)
    }

    /// Keeps git's index of the workspace before the job, and when that was written, in nanoseconds since 1970: a help,
    /// which may be lost with the machine's power.
    ///
    /// # Errors
    /// [`ShelfError::Io`].
    pub fn put_index(&self, index: &[u8], written_ns: i64) -> Result<(), ShelfError> {
        let path = self.dir.join(INDEX);
        let fresh = path.with_extension("new");
        let mut options = OpenOptions::new();
        let written = options.write(true).create(true).truncate(true).mode(0o600).open(&fresh);
        let written = written.and_then(|mut file| {
            file.write_all(&written_ns.to_le_bytes()).and_then(|()| file.write_all(index))
        });
        written.and_then(|()| std::fs::rename(&fresh, &path)).map_err(at("write", &path))
    }

    /// What [`JobShelf::put_index`] kept.
    ///
    /// # Errors
    /// [`ShelfError::Io`].
    pub fn index(&self) -> Result<Option<(Vec<u8>, i64)>, ShelfError> {
        let kept = self.get(INDEX)?.unwrap_or_default();
        let Some((written, index)) = kept.split_first_chunk::<8>() else { return Ok(None) };
        Ok(Some((index.to_vec(), i64::from_le_bytes(*written))))
    }

    /// Forgets it: the change set is made.
    pub fn forget_index(&self) {
        let path = self.dir.join(INDEX);
        if let Err(error) = std::fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "a kept index stays until its job is removed");
        }
    }

    /// Keeps which commits an agent made, until there is a change set that says so. Their bundle must be there.
    ///
    /// # Errors
    /// [`ShelfError::Io`].
    pub fn put_commits(&self, commits: &Commits) -> Result<(), ShelfError> {
        let json = serde_json::to_vec(commits);
        self.put(COMMITS, &json.map_err(|e| at("write", &self.dir.join(COMMITS))(io::Error::other(e)))?)
    }

    /// What [`JobShelf::put_commits`] kept.
    ///
    /// # Errors
    /// [`ShelfError`].
    pub fn commits(&self) -> Result<Option<Commits>, ShelfError> {
        let Some(json) = self.get(COMMITS)? else { return Ok(None) };
        let corrupt = |e: serde_json::Error| ShelfError::Corrupt {
            path: self.dir.join(COMMITS),
            detail: e.to_string(),
        };
        serde_json::from_slice(&json).map(Some).map_err(corrupt)
    }

    /// Keeps the change set; its contents must be there, by [`Batch::keep`] or [`JobShelf::put_blob`]. Gives the SHA-256 of
    /// its stored form, in hex.
    ///
    /// # Errors
    /// [`ShelfError::Io`].
    pub fn put_changes(&self, changes: &ChangeSet) -> Result<String, ShelfError> {
        let json = serde_json::to_vec(changes);
        let json = json.map_err(|e| at("write", &self.dir.join(CHANGES))(io::Error::other(e)))?;
        // The names of contents must be on the disk before what names them.
        self.put_all(&[(CHANGES, &json)], Some(&self.blobs()))?;
        Ok(hex(Sha256::digest(&json).into()))
    }

    /// The change set and the SHA-256 of its stored form, in hex; none where there is none.
    ///
    /// # Errors
    /// [`ShelfError`].
    pub fn changes(&self) -> Result<Option<(ChangeSet, String)>, ShelfError> {
        let Some(json) = self.get(CHANGES)? else { return Ok(None) };
        let parsed = serde_json::from_slice(&json);
        let corrupt = |e: serde_json::Error| ShelfError::Corrupt {
            path: self.dir.join(CHANGES),
            detail: e.to_string(),
        };
        Ok(Some((parsed.map_err(corrupt)?, hex(Sha256::digest(&json).into()))))
    }

    /// Forgets the change set; its contents stay for the next one.
    ///
    /// # Errors
    /// [`ShelfError::Io`].
    pub fn forget_changes(&self) -> Result<(), ShelfError> {
        let path = self.dir.join(CHANGES);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at("remove", &path)(error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Keeps one content; see [`Batch::put`].
    ///
    /// # Errors
    /// [`ShelfError::Io`].
    pub fn put_blob(
        &self,
        content: &mut dyn Read,
        bytes_max: u64,
        head_bytes_max: usize,
    ) -> Result<Option<(BlobId, u64, Vec<u8>)>, ShelfError> {
        let mut batch = self.batch();
        let kept = batch.put(content, bytes_max, head_bytes_max)?;
        batch.keep()?;
        Ok(kept)
    }

    /// For many contents: they go to the disk together.
    pub fn batch(&self) -> Batch<'_> {
        Batch { shelf: self, fresh: Vec::new() }
    }

    /// A content, to be read.
    ///
    /// # Errors
    /// [`ShelfError::Io`].
    pub fn blob(&self, id: &BlobId) -> Result<File, ShelfError> {
        let path = self.blobs().join(id.as_str());
        File::open(&path).map_err(at("open", &path))
    }

    /// The directory of the contents: a thread with a user's rights opens them below it, by their names.
    ///
    /// # Errors
    /// [`ShelfError::Io`].
    pub fn blobs_dir(&self) -> Result<OwnedFd, ShelfError> {
        let path = self.blobs();
        File::open(&path).map(OwnedFd::from).map_err(at("open", &path))
    }

    /// Removes everything; fine where there is nothing.
    ///
    /// # Errors
    /// [`ShelfError::Io`].
    pub fn remove(&self) -> Result<(), ShelfError> {
        match std::fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at("remove", &self.dir)(error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn blobs(&self) -> PathBuf {
        self.dir.join(BLOBS)
    }

    pub(super) fn put(&self, name: &str, bytes: &[u8]) -> Result<(), ShelfError> {
        self.put_all(&[(name, bytes)], None)
    }

    /// Keeps these files: on the disk first, with all of `before` (a directory) that they speak of; then they get their
    /// names, one after the other.
    fn put_all(&self, files: &[(&str, &[u8])], before: Option<&Path>) -> Result<(), ShelfError> {
        let mut flush = Vec::new();
        for (name, bytes) in files {
            let fresh = self.dir.join(name).with_extension("new");
            let mut options = OpenOptions::new();
            let written = options.write(true).create(true).truncate(true).mode(0o600).open(&fresh);
            let written = written.and_then(|mut file| file.write_all(bytes).map(|()| file));
            flush.push(written.map_err(at("write", &fresh))?);
        }
        if let Some(dir) = before {
            flush.push(File::open(dir).map_err(at("open", dir))?);
        }
        flush_all(&flush).map_err(at("write in", &self.dir))?;
        for (name, _) in files {
            let path = self.dir.join(name);
            std::fs::rename(path.with_extension("new"), &path).map_err(at("write", &path))?;
        }
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(at("write", &self.dir))
    }

    pub(super) fn get(&self, name: &str) -> Result<Option<Vec<u8>>, ShelfError> {
        let path = self.dir.join(name);
        let mut bytes = Vec::new();
        match File::open(&path).and_then(|file| file.take(CHANGES_BYTES_MAX).read_to_end(&mut bytes)) {
            Ok(_) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(at("read", &path)(error)),
        }
    }
}

/// Contents that are written but have no names yet: what is not kept is gone when this is dropped.
#[derive(Debug)]
pub struct Batch<'a> {
    shelf: &'a JobShelf,
    fresh: Vec<(BlobId, NamedTempFile)>,
}

impl Batch<'_> {
    /// Takes what `content` gives, at most `bytes_max` of it: its name, its length, and its first bytes (as many as
    /// `head_bytes_max`). None where it is longer; nothing is taken then.
    ///
    /// # Errors
    /// [`ShelfError::Io`].
    pub fn put(
        &mut self,
        content: &mut dyn Read,
        bytes_max: u64,
        head_bytes_max: usize,
    ) -> Result<Option<(BlobId, u64, Vec<u8>)>, ShelfError> {
        let dir = self.shelf.blobs();
        let mut file = tempfile::Builder::new()
            .prefix(FRESH)
            .permissions(Permissions::from_mode(0o644))
            .tempfile_in(&dir)
            .map_err(at("write in", &dir))?;
        let (mut hash, mut bytes, mut head) = (Sha256::new(), 0u64, Vec::new());
        let mut buffer = vec![0; COPY_BYTES];
        loop {
            let got = match content.read(&mut buffer) {
                Ok(0) => break,
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(at("read a content for", &dir)(error)),
            };
            bytes += got as u64;
            if bytes > bytes_max {
                return Ok(None);
            }
            hash.update(&buffer[..got]);
            head.extend_from_slice(&buffer[..got.min(head_bytes_max - head.len())]);
            file.write_all(&buffer[..got]).map_err(at("write", file.path()))?;
        }
        let id = BlobId::of_digest(hash.finalize().into());
        if !self.fresh.iter().any(|(known, _)| *known == id) {
            self.fresh.push((id.clone(), file));
        }
        if self.fresh.len() >= BATCH_MAX {
            self.keep()?;
        }
        Ok(Some((id, bytes, head)))
    }

    /// Puts all of them on the disk, then gives them their names: a name on the shelf is always a whole content.
    ///
    /// # Errors
    /// [`ShelfError::Io`]; some may be kept.
    pub fn keep(&mut self) -> Result<(), ShelfError> {
        let dir = self.shelf.blobs();
        let files: Vec<&File> = self.fresh.iter().map(|(_, file)| file.as_file()).collect();
        flush_all(&files).map_err(at("write in", &dir))?;
        for (id, file) in self.fresh.drain(..) {
            let path = dir.join(id.as_str());
            file.persist(&path).map_err(|e| at("write", &path)(e.error))?;
        }
        Ok(())
    }
}

fn hex(digest: [u8; 32]) -> String {
    BlobId::of_digest(digest).as_str().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{Base, Ignored, VERSION};

    fn shelf() -> (tempfile::TempDir, JobShelf) {
        let dir = tempfile::tempdir().expect("tempdir");
        let shelf = Shelf::new(dir.path().join("changes")).of(&JobId::new(1, 1));
        shelf.create().expect("made");
        (dir, shelf)
    }

    #[test]
    fn contents_are_named_by_their_hash_and_too_long_ones_are_not_kept() {
        let (_dir, shelf) = shelf();
        let (id, bytes, head) = shelf.put_blob(&mut &b"abc"[..], 3, 2).expect("kept").expect("short enough");
        assert_eq!(id.as_str(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!((bytes, head.as_slice()), (3, &b"ab"[..]));
        let mut text = String::new();
        shelf.blob(&id).expect("there").read_to_string(&mut text).expect("read");
        assert_eq!(text, "abc");
        assert_eq!(shelf.put_blob(&mut &b"abcd"[..], 3, 2).expect("no fault"), None);
        let left = std::fs::read_dir(shelf.dir().join("blobs")).expect("list").count();
        assert_eq!(left, 1, "nothing half-made stays");
    }

    #[test]
    fn what_was_never_renamed_goes_and_nothing_else() {
        let (_dir, shelf) = shelf();
        shelf.put_base(b"listing", &Head::default()).expect("kept");
        std::fs::write(shelf.dir().join("applied.new"), b"half").expect("written");
        shelf.forget_unwritten().expect("tidied");
        assert!(!shelf.dir().join("applied.new").exists());
        assert_eq!(shelf.base().expect("read").as_deref(), Some(&b"listing"[..]));
        shelf.remove().expect("removed");
        shelf.forget_unwritten().expect("nothing there is nothing to do");
    }

    #[test]
    fn a_name_on_the_shelf_is_given_to_whole_contents_only_and_an_abandoned_batch_leaves_none() {
        let (_dir, shelf) = shelf();
        let names = || {
            let list = std::fs::read_dir(shelf.dir().join("blobs")).expect("list");
            let mut names: Vec<_> =
                list.map(|e| e.expect("entry").file_name().into_string().expect("text")).collect();
            names.sort();
            names
        };
        let mut batch = shelf.batch();
        let (first, ..) = batch.put(&mut &b"one"[..], 9, 0).expect("taken").expect("short");
        batch.put(&mut &b"one"[..], 9, 0).expect("taken").expect("short");
        let (second, ..) = batch.put(&mut &b"two"[..], 9, 0).expect("taken").expect("short");
        assert!(names().iter().all(|name| name.starts_with(FRESH)), "{:?}", names());
        drop(batch);
        assert!(names().is_empty(), "{:?}", names());
        let mut batch = shelf.batch();
        for text in ["one", "two", "one"] {
            batch.put(&mut text.as_bytes(), 9, 0).expect("taken").expect("short");
        }
        batch.keep().expect("kept");
        let mut wanted = [first.as_str().to_owned(), second.as_str().to_owned()];
        wanted.sort();
        assert_eq!(names(), wanted);
        for (id, text) in [(&first, "one"), (&second, "two")] {
            let mut there = String::new();
            shelf.blob(id).expect("there").read_to_string(&mut there).expect("read");
            assert_eq!(there, text);
        }
    }

    #[test]
    fn more_contents_than_are_open_at_once_are_all_kept() {
        let (_dir, shelf) = shelf();
        let mut batch = shelf.batch();
        let texts: Vec<String> = (0..BATCH_MAX + 10).map(|n| format!("content {n}")).collect();
        let put = |text: &String| {
            let kept = batch.put(&mut text.as_bytes(), 99, 0).expect("taken");
            assert!(batch.fresh.len() < BATCH_MAX, "too many are open");
            kept.expect("short").0
        };
        let ids: Vec<BlobId> = texts.iter().map(put).collect();
        batch.keep().expect("kept");
        for (id, text) in ids.iter().zip(&texts) {
            let mut there = String::new();
            shelf.blob(id).expect("there").read_to_string(&mut there).expect("read");
            assert_eq!(there, *text);
        }
    }

    #[test]
    fn a_change_set_comes_back_as_it_was() {
        let (_dir, shelf) = shelf();
        assert!(shelf.changes().expect("no fault").is_none() && shelf.base().expect("no fault").is_none());
        let (base, ignored) = (Base::default(), Ignored::default());
        let (entries, git_state, commits, notes) = (Vec::new(), Vec::new(), None, vec!["a".to_owned()]);
        let set = ChangeSet { version: VERSION, base, entries, git_state, ignored, commits, notes };
        let hash = shelf.put_changes(&set).expect("kept");
        assert_eq!(shelf.changes().expect("no fault"), Some((set, hash)));
        shelf.remove().expect("removed");
        shelf.remove().expect("removed twice");
        assert!(!shelf.dir().exists());
    }
}
