//! The steps by which a directory is changed, each a rename or a change of mode, and their undoing. A step verifies
//! by inode that it moved what was looked at, and takes itself back where it did not; what was done is seen from the
//! inodes that are there, so that steps can be undone by another process. Nothing old is deleted here, ever.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::look::{Print, Root, chmod, names, now, openat2};
use crate::change::TreePath;

/// One step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Op {
    /// Another mode for what is there.
    Chmod { path: TreePath, from: u32, to: u32, ino: Option<u64> },
    /// What is there moves into the staging directory.
    Out { path: TreePath, slot: u32, old: Print, mode: u32 },
    /// A new node comes where nothing is.
    In { path: TreePath, slot: u32, new_ino: u64 },
    /// A new node takes the place of what is there, which moves into the staging directory.
    Swap { path: TreePath, slot: u32, old: Print, mode: u32, new_ino: u64 },
}

/// Why a step was not taken.
#[derive(Debug)]
pub(super) enum NoMove {
    /// Somebody changed the path since it was looked at.
    Raced(&'static str),
    /// The kernel said no.
    Io(&'static str, io::Error),
}

const RACED: &str = "it was changed while the change set was applied: look at it and try again";

fn failed<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> NoMove {
    move |error| NoMove::Io(doing, error.into())
}

/// The name of a new node in the staging directory, and of an old one after an exchange.
pub(super) fn slot_name(slot: u32) -> String {
    format!("n{slot}")
}

/// The name of an old node in the staging directory.
fn old_name(slot: u32) -> String {
    format!("o{slot}")
}

impl Op {
    pub(super) fn path(&self) -> &TreePath {
        match self {
            Self::Chmod { path, .. }
            | Self::Out { path, .. }
            | Self::In { path, .. }
            | Self::Swap { path, .. } => path,
        }
    }

    /// Takes the step.
    pub(super) fn take(&self, root: &Root, staging: &OwnedFd) -> Result<(), NoMove> {
        match self {
            Self::Chmod { path, from, to, ino } => {
                let fd = root.open(path.as_path(), OFlags::PATH).map_err(failed("change the mode of"))?;
                let there = now(&fd).map_err(failed("look at"))?;
                if there.mode != *from || ino.is_some_and(|ino| ino != there.print.ino) {
                    return Err(NoMove::Raced(RACED));
                }
                chmod(&fd, *to).map_err(failed("change the mode of"))
            }
            Self::Out { path, slot, old, .. } => out(root, staging, path, &old_name(*slot), old),
            Self::In { path, slot, .. } => into(root, staging, path, *slot),
            Self::Swap { path, slot, old, .. } => swap(root, staging, path, *slot, old),
        }
    }

    /// Undoes the step, where it was taken. In words, why what was there is not back.
    pub(super) fn undo(&self, root: &Root, staging: &OwnedFd) -> Result<(), String> {
        match self {
            Self::Chmod { path, from, to, ino } => {
                // What is not there any more has no mode to be put right.
                let Ok(fd) = root.open(path.as_path(), OFlags::PATH) else { return Ok(()) };
                let same =
                    now(&fd).is_ok_and(|now| now.mode == *to && ino.is_none_or(|ino| ino == now.print.ino));
                if same {
                    chmod(&fd, *from).map_err(|error| format!("its mode was {from:o}: {error}"))
                } else {
                    Ok(())
                }
            }
            Self::Out { path, slot, old, mode } => {
                let name = old_name(*slot);
                if inode(staging, &name).is_some() {
                    return back(root, staging, &name, path);
                }
                // Removed where it stood: see `out`.
                let gone = old.dir && root.look(path).is_ok_and(|now| now.is_none());
                if gone { made_again(root, path, *mode) } else { Ok(()) }
            }
            Self::In { path, slot, new_ino } => {
                if inode(staging, &slot_name(*slot)).is_none() && there(root, path) == Some(*new_ino) {
                    return away(root, staging, path, *slot);
                }
                Ok(())
            }
            Self::Swap { path, slot, old, mode, new_ino } => {
                undo_swap(root, staging, (path, *slot), (old, *mode), *new_ino)
            }
        }
    }
}

fn out(root: &Root, staging: &OwnedFd, path: &TreePath, to: &str, old: &Print) -> Result<(), NoMove> {
    let (dir, name) = root.parent(path).map_err(failed("open the directory of"))?;
    match rustix::fs::renameat(&dir, &name, staging, to) {
        Ok(()) => {}
        Err(Errno::NOENT) => return Err(NoMove::Raced(RACED)),
        // A directory of an overlay's lower layer cannot be moved; an empty one can be made again.
        Err(Errno::XDEV) if old.dir => {
            return match rustix::fs::unlinkat(&dir, &name, AtFlags::REMOVEDIR) {
                Err(Errno::NOTEMPTY | Errno::NOENT | Errno::NOTDIR) => Err(NoMove::Raced(RACED)),
                other => other.map_err(failed("remove")),
            };
        }
        Err(errno) => return Err(failed("move away")(errno)),
    }
    if as_looked_at(staging, to, old) {
        return Ok(());
    }
    let _ = back(root, staging, to, path);
    Err(NoMove::Raced(RACED))
}

fn into(root: &Root, staging: &OwnedFd, path: &TreePath, slot: u32) -> Result<(), NoMove> {
    let (dir, name) = root.parent(path).map_err(failed("open the directory of"))?;
    rename_new(staging, &slot_name(slot), &dir, &name).map_err(|errno| match errno {
        Errno::EXIST | Errno::NOENT => NoMove::Raced(RACED),
        errno => failed("write")(errno),
    })
}

fn swap(root: &Root, staging: &OwnedFd, path: &TreePath, slot: u32, old: &Print) -> Result<(), NoMove> {
    let (dir, name) = root.parent(path).map_err(failed("open the directory of"))?;
    let new = slot_name(slot);
    match rustix::fs::renameat_with(staging, &new, &dir, &name, RenameFlags::EXCHANGE) {
        Ok(()) => {
            if as_looked_at(staging, &new, old) {
                return Ok(());
            }
            let _ = rustix::fs::renameat_with(staging, &new, &dir, &name, RenameFlags::EXCHANGE);
            Err(NoMove::Raced(RACED))
        }
        // A file system that cannot exchange, or not this: one after the other.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::XDEV) => {
            out(root, staging, path, &old_name(slot), old)?;
            into(root, staging, path, slot)
        }
        Err(Errno::NOENT) => Err(NoMove::Raced(RACED)),
        Err(errno) => Err(failed("replace")(errno)),
    }
}

fn undo_swap(
    root: &Root,
    staging: &OwnedFd,
    (path, slot): (&TreePath, u32),
    (old, mode): (&Print, u32),
    new_ino: u64,
) -> Result<(), String> {
    let new = slot_name(slot);
    if inode(staging, &new).is_some_and(|ino| ino != new_ino) {
        // Exchanged, perhaps with what somebody else had put there. What was put there may be gone, or be another's by now.
        return match there(root, path) {
            Some(ino) if ino == new_ino => {
                let (dir, name) = root.parent(path).map_err(|e| e.to_string())?;
                rustix::fs::renameat_with(staging, &new, &dir, &name, RenameFlags::EXCHANGE)
                    .map_err(|e| e.to_string())
            }
            _ => back(root, staging, &new, path),
        };
    }
    if inode(staging, &new).is_none() && there(root, path) == Some(new_ino) {
        away(root, staging, path, slot)?;
    }
    Op::Out { path: path.clone(), slot, old: *old, mode }.undo(root, staging)
}

/// Whether what was moved is what was looked at; a directory must be empty.
fn as_looked_at(staging: &OwnedFd, name: &str, old: &Print) -> bool {
    let Ok(stat) = rustix::fs::statat(staging, name, AtFlags::SYMLINK_NOFOLLOW) else { return false };
    if !Print::of(&stat).same(old) {
        return false;
    }
    let empty = || {
        let dir = openat2(staging, Path::new(name), OFlags::RDONLY | OFlags::DIRECTORY)?;
        names(dir).map(|names| names.is_empty())
    };
    !old.dir || empty().unwrap_or(false)
}

/// Moves an old node back to where it was.
fn back(root: &Root, staging: &OwnedFd, name: &str, path: &TreePath) -> Result<(), String> {
    let (dir, to) = root.parent(path).map_err(|errno| format!("its directory cannot be opened: {errno}"))?;
    rename_new(staging, name, &dir, &to).map_err(|errno| match errno {
        Errno::EXIST => format!("something else is there now; it is kept as {name}"),
        errno => format!("{errno}; it is kept as {name}"),
    })
}

/// Moves a new node back into the staging directory.
fn away(root: &Root, staging: &OwnedFd, path: &TreePath, slot: u32) -> Result<(), String> {
    let (dir, name) = root.parent(path).map_err(|errno| errno.to_string())?;
    rustix::fs::renameat(&dir, &name, staging, slot_name(slot)).map_err(|errno| errno.to_string())
}

fn made_again(root: &Root, path: &TreePath, mode: u32) -> Result<(), String> {
    let (dir, name) = root.parent(path).map_err(|errno| errno.to_string())?;
    rustix::fs::mkdirat(&dir, &name, Mode::RWXU).map_err(|errno| errno.to_string())?;
    let fd = root.open(path.as_path(), OFlags::PATH).map_err(|errno| errno.to_string())?;
    chmod(&fd, mode).map_err(|error| error.to_string())
}

fn inode(dir: &OwnedFd, name: &str) -> Option<u64> {
    rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).ok().map(|stat| stat.st_ino)
}

fn there(root: &Root, path: &TreePath) -> Option<u64> {
    root.look(path).ok().flatten().map(|now| now.print.ino)
}

/// Renames to where nothing is.
fn rename_new(from: &OwnedFd, name: &str, dir: &OwnedFd, to: &std::ffi::CStr) -> rustix::io::Result<()> {
    match rustix::fs::renameat_with(from, name, dir, to, RenameFlags::NOREPLACE) {
        // A file system that does not know it.
        Err(Errno::INVAL | Errno::NOSYS) => match rustix::fs::statat(dir, to, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Err(Errno::EXIST),
            Err(Errno::NOENT) => rustix::fs::renameat(from, name, dir, to),
            Err(errno) => Err(errno),
        },
        other => other,
    }
}
