//! Notes beside a change set of what goes on in a person's directory: on the disk before anything is made there, and
//! gone after it, so that the next daemon knows what a dead one left. Lines of JSON; one that is not whole was never
//! written. A note is locked as long as its work goes on. It must never be removed before that work is whole or undone.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{JobShelf, ShelfError};

const NOTE_BYTES_MAX: u64 = 4 << 20;

/// An open note; locked until it is dropped.
#[derive(Debug)]
pub(super) struct Note {
    file: File,
    path: PathBuf,
}

/// Why a note that is there cannot be taken up.
#[derive(Debug)]
pub(super) enum NotFree {
    /// Its work goes on.
    Busy,
    /// It cannot be read.
    Shelf(ShelfError),
}

impl From<ShelfError> for NotFree {
    fn from(error: ShelfError) -> Self {
        Self::Shelf(error)
    }
}

fn at(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ShelfError {
    let path = path.to_owned();
    move |source| ShelfError::Io { doing, path, source }
}

/// A name of chance, in hex.
pub(super) fn chance() -> io::Result<String> {
    let random = getrandom::u64().map_err(|error| io::Error::other(error.to_string()))?;
    Ok(format!("{random:016x}"))
}

impl Note {
    /// Begins the note `name`; there must be none.
    pub(super) fn begin(shelf: &JobShelf, name: &str, first: &impl Serialize) -> Result<Self, ShelfError> {
        let path = shelf.dir().join(name);
        let mut options = OpenOptions::new();
        let file =
            options.append(true).create_new(true).mode(0o600).open(&path).map_err(at("write", &path))?;
        let mut note = Self { file, path };
        let begun = match note.file.try_lock() {
            Ok(()) => note.add(first).and_then(|()| sync_dir(&note.path)),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = begun {
            let error = at("write", &note.path)(error);
            note.end()?;
            return Err(error);
        }
        Ok(note)
    }

    /// One more line; it is on the disk then.
    pub(super) fn add(&mut self, line: &impl Serialize) -> io::Result<()> {
        let mut json = serde_json::to_vec(line).map_err(io::Error::other)?;
        json.push(b'\n');
        self.file.write_all(&json)?;
        self.file.sync_data()
    }

    /// Removes it.
    pub(super) fn end(self) -> Result<(), ShelfError> {
        let removed = std::fs::remove_file(&self.path).and_then(|()| sync_dir(&self.path));
        removed.map_err(at("remove", &self.path))
    }

    /// Removes that of a thread that never began; one that hangs still holds it.
    pub(super) fn end_if_free(shelf: &JobShelf, name: &str) -> Result<(), ShelfError> {
        match Self::reopen(shelf.dir().join(name)) {
            Ok(Some(note)) => note.end(),
            Ok(None) | Err(NotFree::Busy) => Ok(()),
            Err(NotFree::Shelf(error)) => Err(error),
        }
    }

    /// All whose names begin with `prefix`.
    pub(super) fn left(shelf: &JobShelf, prefix: &str) -> Result<Vec<Self>, NotFree> {
        let listed = match std::fs::read_dir(shelf.dir()) {
            Ok(listed) => listed.collect::<io::Result<Vec<_>>>(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => Err(error),
        };
        let listed = listed.map_err(at("list", shelf.dir()))?;
        let of_these = listed.iter().filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
        of_these.filter_map(|entry| Self::reopen(entry.path()).transpose()).collect()
    }

    fn reopen(path: PathBuf) -> Result<Option<Self>, NotFree> {
        let file = match OpenOptions::new().read(true).append(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(at("open", &path)(error).into()),
        };
        match file.try_lock() {
            Ok(()) => Ok(Some(Self { file, path })),
            Err(TryLockError::WouldBlock) => Err(NotFree::Busy),
            Err(TryLockError::Error(error)) => Err(at("lock", &path)(error).into()),
        }
    }

    /// Its lines; none where it was being written when its daemon died, and nothing was made yet.
    pub(super) fn lines<T: DeserializeOwned>(&self) -> Result<Vec<T>, ShelfError> {
        let mut text = String::new();
        (&self.file).take(NOTE_BYTES_MAX).read_to_string(&mut text).map_err(at("read", &self.path))?;
        let whole = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
        whole.map(|line| serde_json::from_str(line).map_err(|e| self.corrupt(&e.to_string()))).collect()
    }

    pub(super) fn corrupt(&self, detail: &str) -> ShelfError {
        ShelfError::Corrupt { path: self.path.clone(), detail: detail.to_owned() }
    }
}

fn sync_dir(of: &Path) -> io::Result<()> {
    File::open(of.parent().unwrap_or(of))?.sync_all()
}
