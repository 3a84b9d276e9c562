//! The note of a checkout that goes on, `checkout-…` beside the change set: who makes which directory. It is on the
//! disk before that directory is, so that what a dead daemon half made is removed, or put into its place, by the next
//! one. It must never name a directory that somebody else writes into: only hidden ones with a name of chance.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::look::{Root, What, chmod, names, now, openat2};
use super::stage::empty;
use super::{APPLY_TIME_MAX, ApplyError, Step, at};
use crate::change::TreePath;
use crate::changes::note::{NotFree, Note};
use crate::changes::{JobShelf, ShelfError};
use crate::job::Identity;
use crate::workspace::as_submitter;

const PREFIX: &str = "checkout-";

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
pub(super) enum Line {
    Making(Making),
    /// In the directory, all is there; it only has to move up. Directories that are closed to their owner, and their
    /// modes: the kernel moves none of those.
    Whole(Closed),
}

/// The name of the note on the directory `name`.
pub(super) fn note_name(name: &str) -> String {
    format!("{PREFIX}{}", name.rsplit('-').next().unwrap_or_default())
}

/// A full disk has its own error.
pub(super) fn told(error: ShelfError) -> ApplyError {
    match error {
        ShelfError::Io { doing, path, source } => at(doing, &path)(source),
        error @ ShelfError::Corrupt { .. } => ApplyError::Shelf(error),
    }
}

/// What a note says.
fn read(note: &Note) -> Result<Option<(Making, Option<Closed>)>, ShelfError> {
    let mut found = None;
    for line in note.lines()? {
        match (line, &mut found) {
            (Line::Making(making), None) => found = Some((making, None)),
            (Line::Whole(closed), Some((_, whole))) => *whole = Some(closed),
            (Line::Making(_) | Line::Whole(_), _) => return Err(note.corrupt("its lines are mixed up")),
        }
    }
    Ok(found)
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
    let mut recovered = 0;
    let left = Note::left(shelf, PREFIX).map_err(|error| match error {
        NotFree::Busy => ApplyError::Busy,
        NotFree::Shelf(error) => told(error),
    })?;
    for note in left {
        if let Some((making, whole)) = read(&note)? {
            let (identity, dir, step) = (making.identity.clone(), making.dir.clone(), step.clone());
            as_submitter(&identity, &dir, APPLY_TIME_MAX, move || put_right(&making, whole.as_ref(), &step))?;
        }
        note.end().map_err(told)?;
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
