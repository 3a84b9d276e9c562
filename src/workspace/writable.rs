//! Parts of a workspace that can be written while the rest cannot: opened beneath it as the submitter, and
//! staged as mounts of their own. Must never follow a symlink, leave the workspace, or give a repository's
//! `.git` away: what is written there runs on the host.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::{WorkspaceError, WorkspaceRecord, io_at, peer};
use crate::job::Identity;

/// Most parts of one workspace: each is a mount in the cell.
pub const PARTS_MAX: usize = 64;

/// One part, opened.
#[derive(Debug)]
pub(super) struct Part {
    /// Path below the workspace.
    pub(super) below: PathBuf,
    /// The file or directory (`O_PATH`).
    pub(super) fd: OwnedFd,
    /// Whether it is a directory.
    pub(super) is_dir: bool,
    /// Whether its mount is to be read-only.
    pub(super) read_only: bool,
}

/// A part that is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StagedPart {
    /// What to bind into the cell.
    pub path: PathBuf,
    /// Where, below the cell's workspace.
    pub below: PathBuf,
    /// Whether it is a directory.
    pub is_dir: bool,
    /// The engine has to make it read-only: it is to be, and there is no mount of ours that is.
    pub wants_read_only: bool,
}

/// Opens all of `paths` below `dir`, as the submitter. Blocks.
pub(super) fn open_all(
    identity: &Identity,
    record: &WorkspaceRecord,
    dir: &OwnedFd,
    paths: &[PathBuf],
) -> Result<Vec<Part>, WorkspaceError> {
    let bad = |path: &Path, why: &'static str| WorkspaceError::Writable {
        workspace: record.path.clone(),
        path: path.to_owned(),
        why,
    };
    if let Some(path) = paths.get(PARTS_MAX) {
        return Err(bad(path, "is one too many: at most 64 parts can be writable"));
    }
    for path in paths {
        let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
        if !plain || path.as_os_str().is_empty() {
            return Err(bad(path, "is not a plain path below the workspace"));
        }
        if path.components().any(|part| part.as_os_str().eq_ignore_ascii_case(".git")) {
            return Err(bad(path, "is in a .git directory: what is written there would run on the host"));
        }
    }
    let (dir, paths) = (dir.try_clone().map_err(io_at("open", &record.path))?, paths.to_vec());
    let workspace = record.path.clone();
    peer::as_peer(identity, &record.path, move || {
        paths.into_iter().map(|path| open_one(&dir, &workspace, path)).collect()
    })
}

/// The same parts of a copy at `view`, which nobody works in yet: to be bound over it, writable, where the rest of it is
/// not. `workspace` is for messages. Blocks.
///
/// # Errors
/// [`WorkspaceError::Writable`].
pub fn parts_of_copy(
    workspace: &Path,
    view: &Path,
    paths: &[PathBuf],
) -> Result<Vec<StagedPart>, WorkspaceError> {
    let dir = super::overlay::open_dir(view).map_err(io_at("open", view))?;
    let part = |below: &PathBuf| {
        let bad =
            |why| WorkspaceError::Writable { workspace: workspace.to_owned(), path: below.clone(), why };
        let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let found = rustix::fs::openat2(&dir, below, flags, Mode::empty(), resolve);
        let stat = found.and_then(rustix::fs::fstat);
        let stat = stat.map_err(|_| bad("does not exist in the copy, or goes through a symbolic link"))?;
        let is_dir = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => true,
            FileType::RegularFile => false,
            _ => return Err(bad("is neither a file nor a directory")),
        };
        Ok(StagedPart { path: view.join(below), below: below.clone(), is_dir, wants_read_only: false })
    };
    paths.iter().map(part).collect()
}

/// Runs with the submitter's credentials.
fn open_one(dir: &OwnedFd, workspace: &Path, below: PathBuf) -> Result<Part, WorkspaceError> {
    let bad = |why| WorkspaceError::Writable { workspace: workspace.to_owned(), path: below.clone(), why };
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let fd =
        rustix::fs::openat2(dir, &below, flags, Mode::empty(), resolve).map_err(|errno| match errno {
            Errno::NOENT | Errno::NOTDIR => bad("does not exist: create it, or change the policy"),
            Errno::LOOP => bad("goes through a symbolic link: name what it leads to"),
            Errno::XDEV => bad("leads out of the workspace or into another mount"),
            Errno::ACCESS | Errno::PERM => bad("cannot be reached by you: change its permissions"),
            other => io_at("open", &workspace.join(&below))(other),
        })?;
    let stat = rustix::fs::fstat(&fd).map_err(io_at("look at", &workspace.join(&below)))?;
    let is_dir = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => true,
        FileType::RegularFile => false,
        // With NO_SYMLINKS and PATH a final link is opened itself.
        FileType::Symlink => return Err(bad("is a symbolic link: name what it leads to")),
        _ => return Err(bad("is neither a file nor a directory")),
    };
    // A second name of a file could be one of `.git`, or of something that the submitter only may link to.
    if !is_dir && stat.st_nlink > 1 {
        return Err(bad("has a second name (a hard link): copy it"));
    }
    peer::may_write(fd.as_fd(), is_dir)
        .map_err(|_| bad("cannot be written by you: change its permissions"))?;
    Ok(Part { below, fd, is_dir, read_only: false })
}

/// Opens what is to be protected below `dir`, as the submitter: paths, and whether each is to be read-only. What is
/// gone or became a link meanwhile is left out. Blocks.
pub(super) fn open_guards(
    identity: &Identity,
    record: &WorkspaceRecord,
    dir: &OwnedFd,
    guards: &[(PathBuf, bool)],
) -> Result<Vec<Part>, WorkspaceError> {
    if guards.is_empty() {
        return Ok(Vec::new());
    }
    let (dir, guards) = (dir.try_clone().map_err(io_at("open", &record.path))?, guards.to_vec());
    peer::as_peer(identity, &record.path, move || {
        let open = |(below, read_only): (PathBuf, bool)| {
            let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
            let fd = rustix::fs::openat2(&dir, &below, flags, Mode::empty(), resolve).ok()?;
            let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd).ok()?.st_mode);
            let is_dir = kind == FileType::Directory;
            (is_dir || kind == FileType::RegularFile).then_some(Part { below, fd, is_dir, read_only })
        };
        Ok(guards.into_iter().filter_map(open).collect())
    })
}
