//! The note of a checkout that goes on, `checkout-…` beside the change set: who makes which directory. It is on the
//! disk before that directory is, so that what a dead daemon half made is removed, or put into its place, by the next
//! one. It must never name a directory that somebody else writes into: only hidden ones with a name of chance.

use std::ffi::{CString, OsStr};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::look::{Root, What, chmod, names, now, openat2};
use super::stage::empty;
use super::{APPLY_TIME_MAX, ApplyError, Step, at};
use crate::change::TreePath;
use crate::changes::{JobShelf, ShelfError};
use crate::job::Identity;
use crate::workspace::as_submitter;

const PREFIX: &str = "checkout-";
const NOTE_BYTES_MAX: u64 = 1 << 20;

/// Directories at the top that their owner may not write to, and their modes.
pub(super) type Closed = Vec<(TreePath, u32)>;

/// Who makes which directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Making {
    pub(super) identity: Identity,
    /// What is made.
    pub(super) dir: PathBuf,
    /// The name under which it is filled: beside it, or in it where that cannot be.
    pub(super) name: String,
}

#[derive(Debug, Serialize, Deserialize)]
enum Line {
    Making(Making),
    /// In the directory, all is there; it only has to move up. Directories that are closed to their owner, and their
    /// modes: the kernel moves none of those.
    Whole(Closed),
}

/// An open note; locked until it is dropped.
#[derive(Debug)]
pub(super) struct Note {
    file: File,
    path: PathBuf,
}

impl Note {
    pub(super) fn begin(shelf: &JobShelf, making: &Making) -> Result<Self, ApplyError> {
        let chance = making.name.rsplit('-').next().unwrap_or_default();
        let path = shelf.dir().join(format!("{PREFIX}{chance}"));
        let mut options = OpenOptions::new();
        let file =
            options.append(true).create_new(true).mode(0o600).open(&path).map_err(at("write", &path))?;
        let mut note = Self { file, path };
        let begun = match note.file.try_lock() {
            Ok(()) => note.write(&Line::Making(making.clone())).and_then(|()| sync_dir(&note.path)),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = begun {
            let error = at("write", &note.path)(error);
            note.end()?;
            return Err(error);
        }
        Ok(note)
    }

    /// From here on it is put into its place, whatever happens.
    pub(super) fn whole(&mut self, closed: &Closed) -> io::Result<()> {
        self.write(&Line::Whole(closed.clone()))
    }

    fn write(&mut self, line: &Line) -> io::Result<()> {
        let mut json = serde_json::to_vec(line).map_err(io::Error::other)?;
        json.push(b'\n');
        self.file.write_all(&json)?;
        self.file.sync_data()
    }

    /// Removes it: nothing half made is anywhere.
    pub(super) fn end(self) -> Result<(), ApplyError> {
        let removed = std::fs::remove_file(&self.path).and_then(|()| sync_dir(&self.path));
        removed.map_err(at("remove", &self.path))
    }

    /// Removes that of a thread that never began; one that hangs still holds it.
    pub(super) fn end_if_free(shelf: &JobShelf, name: &str) -> Result<(), ApplyError> {
        let chance = name.rsplit('-').next().unwrap_or_default();
        match Self::reopen(shelf.dir().join(format!("{PREFIX}{chance}"))) {
            Ok(Some(note)) => note.end(),
            Ok(None) | Err(ApplyError::Busy) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn reopen(path: PathBuf) -> Result<Option<Self>, ApplyError> {
        let file = match OpenOptions::new().read(true).append(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(at("open", &path)(error)),
        };
        match file.try_lock() {
            Ok(()) => Ok(Some(Self { file, path })),
            Err(TryLockError::WouldBlock) => Err(ApplyError::Busy),
            Err(TryLockError::Error(error)) => Err(at("lock", &path)(error)),
        }
    }

    /// What it says: none where it was being written when its daemon died, and nothing was made.
    fn read(&self) -> Result<Option<(Making, Option<Closed>)>, ApplyError> {
        let mut text = String::new();
        (&self.file).take(NOTE_BYTES_MAX).read_to_string(&mut text).map_err(at("read", &self.path))?;
        let corrupt =
            |detail: String| ApplyError::Shelf(ShelfError::Corrupt { path: self.path.clone(), detail });
        let mut found = None;
        for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            match (serde_json::from_str(line).map_err(|e| corrupt(e.to_string()))?, &mut found) {
                (Line::Making(making), None) => found = Some((making, None)),
                (Line::Whole(closed), Some((_, whole))) => *whole = Some(closed),
                (Line::Making(_) | Line::Whole(_), _) => {
                    return Err(corrupt("its lines are mixed up".to_owned()));
                }
            }
        }
        Ok(found)
    }
}

/// Removes what a dead process half checked out, or puts it into its place where it was whole. Gives how many there
/// were. Blocks.
///
/// # Errors
/// [`ApplyError::Busy`] while one goes on; others: it can be tried again.
pub fn recover_checkouts(shelf: &JobShelf) -> Result<usize, ApplyError> {
    recover_stepwise(shelf, &(std::sync::Arc::new(|| Ok(())) as Step))
}

pub(super) fn recover_stepwise(shelf: &JobShelf, step: &Step) -> Result<usize, ApplyError> {
    let listed = match std::fs::read_dir(shelf.dir()) {
        Ok(listed) => listed.collect::<io::Result<Vec<_>>>(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => Err(error),
    };
    let listed = listed.map_err(at("list", shelf.dir()))?;
    let mut recovered = 0;
    for entry in listed.iter().filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX)) {
        let Some(note) = Note::reopen(entry.path())? else { continue };
        if let Some((making, whole)) = note.read()? {
            let (identity, dir, step) = (making.identity.clone(), making.dir.clone(), step.clone());
            as_submitter(&identity, &dir, APPLY_TIME_MAX, move || put_right(&making, whole.as_ref(), &step))?;
        }
        note.end()?;
        recovered += 1;
    }
    Ok(recovered)
}

/// Runs as the submitter.
fn put_right(making: &Making, whole: Option<&Closed>, step: &Step) -> Result<(), ApplyError> {
    let beside = making.dir.parent().map(|above| (above, false));
    for (holder, inside) in beside.into_iter().chain([(making.dir.as_path(), true)]) {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = match rustix::fs::openat(CWD, holder, flags, Mode::empty()) {
            Ok(fd) => fd,
            // Not there: then it is not in it.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
            Err(errno) => return Err(at("open", holder)(errno)),
        };
        let holder = Root { fd, path: holder.to_owned() };
        let made = match holder.open(Path::new(&making.name), OFlags::RDONLY | OFlags::DIRECTORY) {
            Ok(made) => made,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
            Err(errno) => return Err(at("open", &holder.path)(errno)),
        };
        match whole.filter(|_| inside) {
            Some(closed) => move_up(&holder, &made, &making.name, closed, step)?,
            None => {
                remove(&holder, &made, &making.name).map_err(at("remove what was made in", &holder.path))?;
            }
        }
    }
    Ok(())
}

/// Removes a directory that was being filled.
pub(super) fn remove(holder: &Root, made: &OwnedFd, name: &str) -> io::Result<()> {
    empty(made, None)?;
    Ok(rustix::fs::unlinkat(&holder.fd, name, AtFlags::REMOVEDIR)?)
}

/// Which directories in `made` their owner may not write to.
pub(super) fn closed_in(made: &OwnedFd) -> io::Result<Closed> {
    let mut closed = Closed::new();
    for name in names(openat2(made, Path::new("."), OFlags::RDONLY | OFlags::DIRECTORY)?)? {
        let there = now(&openat2(made, Path::new(OsStr::from_bytes(name.to_bytes())), OFlags::PATH)?)?;
        if there.what == What::Dir && there.mode & 0o200 == 0 {
            closed.push((TreePath::new(name.to_bytes()).map_err(io::Error::other)?, there.mode));
        }
    }
    Ok(closed)
}

/// Moves everything in `made`, which is `name` in `holder`, up into `holder`, and removes it. What somebody has made
/// there meanwhile stays; nothing has moved then.
pub(super) fn move_up(
    holder: &Root,
    made: &OwnedFd,
    name: &str,
    closed: &Closed,
    step: &Step,
) -> Result<(), ApplyError> {
    let chmod_in = |dir: &OwnedFd, more: u32| {
        for (path, mode) in closed {
            match openat2(dir, path.as_path(), OFlags::PATH | OFlags::DIRECTORY) {
                Ok(fd) => chmod(&fd, mode | more)?,
                Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok::<_, io::Error>(())
    };
    chmod_in(made, 0o200).map_err(at("open what was made in", &holder.path))?;
    let again = openat2(made, Path::new("."), OFlags::RDONLY | OFlags::DIRECTORY);
    let all: Vec<CString> =
        again.map_err(io::Error::from).and_then(names).map_err(at("list", &holder.path))?;
    for (moved, one) in all.iter().enumerate() {
        let up = || {
            step()?;
            rustix::fs::renameat_with(made, one, &holder.fd, one, RenameFlags::NOREPLACE)?;
            Ok::<_, io::Error>(())
        };
        let Err(error) = up() else { continue };
        for one in &all[..moved] {
            let back = rustix::fs::renameat_with(&holder.fd, one, made, one, RenameFlags::NOREPLACE);
            back.map_err(at("take back what was made in", &holder.path))?;
        }
        return Err(match error.kind() {
            io::ErrorKind::AlreadyExists => ApplyError::Occupied { path: holder.path.clone() },
            _ => at("write in", &holder.path)(error),
        });
    }
    chmod_in(&holder.fd, 0).map_err(at("set modes in", &holder.path))?;
    // It is all there; this directory is hidden and empty.
    if let Err(error) = rustix::fs::unlinkat(&holder.fd, name, AtFlags::REMOVEDIR) {
        tracing::warn!(dir = %holder.path.display(), name, %error, "an empty directory is left");
    }
    Ok(())
}

fn sync_dir(of: &Path) -> io::Result<()> {
    File::open(of.parent().unwrap_or(of))?.sync_all()
}
