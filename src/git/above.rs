//! The repository of a workspace that is a directory below its top. A cell sees the workspace where it lies in the
//! tree and the repository's own directory above it, and nothing else of the tree: git is told that the rest is not
//! checked out. It must never show a repository that git itself would not trust for this user, one that holds what no
//! workspace may hold, or anything of it that the submitter cannot read.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::head::{Format, Repository};
use super::index::{INDEX_BYTES_MAX, only_below, pattern_of};
use crate::change::TreePath;
use crate::job::Identity;
use crate::workspace::{self, Access, Guard, Replaced, WorkspaceError, WorkspaceRecord};

/// Most directories between a workspace and the top of its repository.
const UPWARD_MAX: usize = 64;
/// Longest file of patterns, in bytes.
const IGNORE_BYTES_MAX: u64 = 1 << 20;
/// Longest wait for the submitter's file system.
const WAIT_MAX: std::time::Duration = std::time::Duration::from_secs(30);
/// What is added to the repository's configuration as a cell sees it.
pub const SPARSE: &str = "\n# Made by hotcell: only the workspace is checked out.\n[core]\n\tsparseCheckout = true\n\tsparseCheckoutCone = false\n";

/// A variable of a cell with such a workspace: its repository lies on another file system there.
pub fn across() -> (String, String) {
    ("GIT_DISCOVERY_ACROSS_FILESYSTEM".to_owned(), "1".to_owned())
}

/// The repository above a workspace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Above {
    /// The top of its work tree, on the host.
    pub root: PathBuf,
    /// Where the workspace lies below it: `a/b`.
    pub below: String,
    /// Its own directory.
    pub record: WorkspaceRecord,
}

/// The repository above the workspace of `record`. `Ok(Err(why))` where there is one that is not shown. Blocks.
///
/// # Errors
/// [`WorkspaceError`] where file systems do not answer.
pub fn above(
    identity: &Identity,
    record: &WorkspaceRecord,
    guard: &Guard,
) -> Result<Option<Result<Above, String>>, WorkspaceError> {
    let (path, uid) = (record.path.clone(), identity.uid);
    let top = workspace::as_submitter(identity, &record.path, WAIT_MAX, move || {
        Ok::<_, WorkspaceError>(top_of(&path, uid))
    })?;
    let told = |why: &dyn std::fmt::Display| Ok(Some(Err(format!("its git repository is not shown: {why}"))));
    let root = match top {
        Ok(Some(root)) => root,
        Ok(None) => return Ok(None),
        Err(why) => return told(&why),
    };
    let below = record.path.strip_prefix(&root).ok().and_then(Path::to_str).map(str::to_owned);
    // The engine takes a colon for the end of a path, git a line break for the end of a pattern.
    let Some(below) = below.filter(|below| !below.contains([':', '\n'])) else {
        return told(&"the workspace's name has a colon or a line break");
    };
    match workspace::open_as(identity, &root, Access::Read, guard) {
        // A socket beside the workspace is not shown.
        Ok(_) | Err(WorkspaceError::SocketInside { .. }) => {}
        Err(error) => return told(&error),
    }
    let (dir, record) = match workspace::open_repository_as(identity, &root.join(".git"), guard) {
        Ok(opened) => opened,
        Err(error @ (WorkspaceError::Unresponsive { .. } | WorkspaceError::TooManyOpening { .. })) => {
            return Err(error);
        }
        Err(error) => return told(&error),
    };
    let above = Above { root, below, record };
    Ok(Some(match parts(identity, &above, dir)? {
        Ok(_) => Ok(above),
        Err(why) => Err(format!("its git repository is not shown: {why}")),
    }))
}

/// The top of the work tree that holds `path` somewhere below; with the submitter's rights.
fn top_of(path: &Path, uid: u32) -> Result<Option<PathBuf>, String> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let mut device = None;
    for dir in path.ancestors().take(UPWARD_MAX) {
        let Ok(fd) = rustix::fs::openat2(CWD, dir, flags, Mode::empty(), resolve) else { return Ok(None) };
        let Ok(stat) = rustix::fs::fstat(&fd) else { return Ok(None) };
        if *device.get_or_insert(stat.st_dev) != stat.st_dev {
            return Ok(None);
        }
        let kind = match rustix::fs::statat(&fd, ".git", AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => FileType::from_raw_mode(found.st_mode),
            Err(Errno::NOENT) if dir == path && is_bare(&fd) => return Ok(None),
            Err(Errno::NOENT) => continue,
            Err(_) => return Ok(None),
        };
        return match kind {
            _ if dir == path => Ok(None),
            _ if stat.st_uid != uid => Err(format!("{dir:?} belongs to uid {}", stat.st_uid)),
            FileType::Directory => Ok(Some(dir.to_owned())),
            _ => Err(format!(
                "{dir:?} is a worktree or a submodule, whose `.git` leads elsewhere: name that directory itself"
            )),
        };
    }
    Ok(None)
}

/// A repository without a work tree is a workspace of its own.
fn is_bare(dir: &OwnedFd) -> bool {
    ["HEAD", "objects", "refs"]
        .iter()
        .all(|name| rustix::fs::statat(dir, *name, AtFlags::SYMLINK_NOFOLLOW).is_ok())
}

/// What of the repository a cell is to see differently, from its own directory, opened as `dir`; its configuration
/// aside, which gets [`SPARSE`]. In words, why it is not to be shown. Blocks.
///
/// # Errors
/// [`WorkspaceError`] where file systems do not answer.
pub fn parts(
    identity: &Identity,
    above: &Above,
    dir: OwnedFd,
) -> Result<Result<Vec<Replaced>, String>, WorkspaceError> {
    let below = above.below.clone();
    workspace::as_submitter(identity, &above.record.path, WAIT_MAX, move || {
        let format = match dir.try_clone().map_err(|e| e.to_string()).and_then(|own| {
            Repository::of(own).map(|repository| repository.format).map_err(|error| error.to_string())
        }) {
            Ok(format) => format,
            Err(why) => return Ok(Err(why)),
        };
        Ok(replaced(&dir, &below, format))
    })
}

fn replaced(dir: &OwnedFd, below: &str, format: Format) -> Result<Vec<Replaced>, String> {
    let odd = |error: &dyn std::fmt::Display| error.to_string();
    let path = |name: &str| TreePath::new(name).map_err(|error| odd(&error));
    let pattern = pattern_of(below).into_bytes();
    let mut all = vec![Replaced { path: path("info/sparse-checkout")?, content: pattern, made: true }];
    if let Some(index) = index_of(dir)? {
        let content = only_below(&index, below.as_bytes(), format)?;
        all.push(Replaced { path: path("index")?, content, made: false });
    }
    Ok(all)
}

/// What it ignores of the workspace from above: `info/exclude`, and the `.gitignore` of each directory from the top to
/// the one that holds the workspace. What cannot be read ignores nothing. Blocks.
///
/// # Errors
/// [`WorkspaceError`] where file systems do not answer.
#[allow(clippy::type_complexity)] // two lists of contents, for one caller
pub fn ignores(
    identity: &Identity,
    above: &Above,
) -> Result<(Option<Vec<u8>>, Vec<Option<Vec<u8>>>), WorkspaceError> {
    let (root, below) = (above.root.clone(), PathBuf::from(&above.below));
    workspace::as_submitter(identity, &above.root, WAIT_MAX, move || {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let Ok(top) = rustix::fs::openat2(CWD, &root, flags, Mode::empty(), resolve) else {
            return Ok((None, Vec::new()));
        };
        let mut files: Vec<_> = below
            .ancestors()
            .skip(1)
            .map(|dir| file_below(&top, &dir.join(".gitignore"), IGNORE_BYTES_MAX).ok().flatten())
            .collect();
        files.reverse();
        let exclude = file_below(&top, Path::new(".git/info/exclude"), IGNORE_BYTES_MAX).ok().flatten();
        Ok((exclude, files))
    })
}

fn index_of(dir: &OwnedFd) -> Result<Option<Vec<u8>>, String> {
    file_below(dir, Path::new("index"), INDEX_BYTES_MAX)
        .map_err(|error| format!("its index cannot be read: {error}"))
}

/// A regular file below `dir`, without links; none where there is none.
fn file_below(dir: &OwnedFd, name: &Path, bytes_max: u64) -> std::io::Result<Option<Vec<u8>>> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match rustix::fs::openat2(dir.as_fd(), name, flags, Mode::empty(), resolve) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    if !FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode).is_file() {
        return Err(std::io::Error::other("it is no file"));
    }
    let mut bytes = Vec::new();
    std::fs::File::from(file).take(bytes_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        return Err(std::io::Error::other(format!("it has more than {bytes_max} bytes")));
    }
    Ok(Some(bytes))
}

#[cfg(test)]
#[path = "above/tests.rs"]
mod tests;
