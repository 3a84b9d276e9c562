//! The journal of one application, `apply` beside the change set: first who applies into what, then (before anything
//! moves) all steps, then that they were taken. A line that is not whole was never written. Must be on the disk
//! before what it tells is done.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::moves::Op;
use super::{Accepted, ApplyError, at};
use crate::changes::{JobShelf, ShelfError};
use crate::job::Identity;

const NAME: &str = "apply";
/// Longest journal that is read, in bytes.
const JOURNAL_BYTES_MAX: u64 = 1 << 30;

/// Who applies into what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// The submitter: whoever opens the directory again has to be this one.
    pub identity: Identity,
    /// The directory.
    pub path: PathBuf,
    /// Its device.
    pub dev: u64,
    /// Its inode.
    pub ino: u64,
    /// The staging directory in it.
    pub(super) staging: String,
}

/// The steps that are taken next.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Steps {
    pub(super) ops: Vec<Op>,
    /// What is in the staging directory and older is ours.
    pub(super) staged_until_ns: i128,
    pub(super) accepted: Accepted,
}

#[derive(Debug, Serialize, Deserialize)]
enum Line {
    Begin(Pending),
    Steps(Box<Steps>),
    Done,
}

/// What a journal says.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) pending: Pending,
    pub(super) steps: Option<Steps>,
    pub(super) done: bool,
}

/// An open journal; locked until it is dropped.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    path: PathBuf,
}

impl Journal {
    /// Begins one; there must be none.
    pub(super) fn begin(shelf: &JobShelf, pending: &Pending) -> Result<Self, ApplyError> {
        let path = shelf.dir().join(NAME);
        let mut options = OpenOptions::new();
        let made = options.append(true).create_new(true).mode(0o600).open(&path);
        let file = match made {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(taken(shelf, &path)),
            Err(error) => return Err(at("write", &path)(error)),
        };
        let mut journal = Self { file, path };
        journal.lock()?;
        let written = journal.write(&Line::Begin(pending.clone())).and_then(|()| sync_dir(shelf.dir()));
        if let Err(error) = written {
            let error = at("write", &journal.path)(error);
            journal.end(shelf)?;
            return Err(error);
        }
        Ok(journal)
    }

    /// Makes sure that there is none.
    pub(super) fn none(shelf: &JobShelf) -> Result<(), ApplyError> {
        let path = shelf.dir().join(NAME);
        if path.exists() { Err(taken(shelf, &path)) } else { Ok(()) }
    }

    /// Opens the one that is there, alone.
    pub(super) fn reopen(shelf: &JobShelf) -> Result<Option<Self>, ApplyError> {
        let path = shelf.dir().join(NAME);
        match OpenOptions::new().append(true).read(true).open(&path) {
            Ok(file) => {
                let journal = Self { file, path };
                journal.lock()?;
                Ok(Some(journal))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(at("open", &path)(error)),
        }
    }

    fn lock(&self) -> Result<(), ApplyError> {
        match self.file.try_lock() {
            Ok(()) => Ok(()),
            Err(TryLockError::WouldBlock) => Err(ApplyError::Busy),
            Err(TryLockError::Error(error)) => Err(at("lock", &self.path)(error)),
        }
    }

    pub(super) fn steps(&mut self, steps: Steps) -> io::Result<()> {
        self.write(&Line::Steps(Box::new(steps)))
    }

    pub(super) fn done(&mut self) -> io::Result<()> {
        self.write(&Line::Done)
    }

    fn write(&mut self, line: &Line) -> io::Result<()> {
        let mut json = serde_json::to_vec(line).map_err(io::Error::other)?;
        json.push(b'\n');
        self.file.write_all(&json)?;
        self.file.sync_data()
    }

    /// Removes it: nothing of it is pending any more.
    pub(super) fn end(self, shelf: &JobShelf) -> Result<(), ApplyError> {
        std::fs::remove_file(&self.path)
            .and_then(|()| sync_dir(shelf.dir()))
            .map_err(at("remove", &self.path))
    }
}

/// What the journal says; none where there is none, or it never began.
pub(super) fn read(shelf: &JobShelf) -> Result<Option<Told>, ApplyError> {
    let path = shelf.dir().join(NAME);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(at("read", &path)(error)),
    };
    let mut told = None::<Told>;
    let mut lines = BufReader::new(file.take(JOURNAL_BYTES_MAX));
    loop {
        let mut line = Vec::new();
        lines.read_until(b'\n', &mut line).map_err(at("read", &path))?;
        // The end, or a line that was being written when the power went.
        let Some(json) = line.strip_suffix(b"\n") else { return Ok(told) };
        match (serde_json::from_slice::<Line>(json), &mut told) {
            (Ok(Line::Begin(pending)), None) => told = Some(Told { pending, steps: None, done: false }),
            (Ok(Line::Steps(steps)), Some(told)) => told.steps = Some(*steps),
            (Ok(Line::Done), Some(told)) => told.done = true,
            (Ok(Line::Begin(_) | Line::Steps(_) | Line::Done), _) => {
                return Err(corrupt(&path, "its lines are mixed up"));
            }
            (Err(error), _) => return Err(corrupt(&path, &error.to_string())),
        }
    }
}

fn corrupt(path: &Path, detail: &str) -> ApplyError {
    ApplyError::Shelf(ShelfError::Corrupt { path: path.to_owned(), detail: detail.to_owned() })
}

/// Why there is a journal already.
fn taken(shelf: &JobShelf, path: &Path) -> ApplyError {
    let locked = File::open(path).map(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)));
    if locked.unwrap_or(false) {
        return ApplyError::Busy;
    }
    match read(shelf) {
        Ok(Some(told)) => ApplyError::Interrupted { path: told.pending.path },
        // It goes away just now.
        Ok(None) => ApplyError::Busy,
        Err(error) => error,
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
