//! What lies in a workspace, by names and kinds only: what has to be hidden, protected or named is found in it. It runs
//! with the rights of whoever calls it, never follows a link and never enters another mount.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags};

use crate::change::TreePath;

/// Directories below each other that are looked into.
const DEPTH_MAX: usize = 200;

/// What is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A directory.
    Dir,
    /// A regular file.
    File,
    /// A symbolic link.
    Link,
    /// Something else.
    Special,
}

/// One path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Where, below the workspace.
    pub path: TreePath,
    /// What it is.
    pub kind: Kind,
}

/// How far is looked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LookLimits {
    /// Paths.
    pub entries_max: usize,
    /// How long it may take.
    pub time_max: Duration,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Looked {
    /// A directory always before what is below it.
    pub found: Vec<Found>,
    /// False where a limit ended the look.
    pub complete: bool,
}

impl Looked {
    /// Paths, and whether each is a directory.
    pub fn entries(&self) -> impl Iterator<Item = (&TreePath, bool)> {
        self.found.iter().map(|found| (&found.path, found.kind == Kind::Dir))
    }
}

/// Looks at everything below `dir` except in the directories that `enter` refuses. What cannot be listed is passed
/// over: a cell has no more rights than its submitter. Blocks.
pub fn look(dir: BorrowedFd<'_>, limits: &LookLimits, enter: &dyn Fn(&TreePath) -> bool) -> Looked {
    let mut walk = Walk { limits, enter, end: Instant::now() + limits.time_max, out: Looked::default() };
    let whole = open(dir, c".").is_none_or(|top| walk.directory(&top, None, 0));
    Looked { complete: whole, ..walk.out }
}

struct Walk<'a> {
    limits: &'a LookLimits,
    enter: &'a dyn Fn(&TreePath) -> bool,
    end: Instant,
    out: Looked,
}

impl Walk<'_> {
    /// False where a limit was met.
    fn directory(&mut self, dir: &OwnedFd, path: Option<&TreePath>, depth: usize) -> bool {
        let Ok(entries) = Dir::read_from(dir) else { return true };
        let mut below = Vec::new();
        for entry in entries.flatten() {
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            if self.out.found.len() >= self.limits.entries_max || Instant::now() >= self.end {
                return false;
            }
            let here = match path {
                Some(path) => path.join(name.to_bytes()),
                None => TreePath::new(name.to_bytes()),
            };
            let Ok(here) = here else { continue };
            let kind = match entry.file_type() {
                FileType::Unknown => match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(stat) => kind_of(FileType::from_raw_mode(stat.st_mode)),
                    Err(_) => continue,
                },
                known => kind_of(known),
            };
            if kind == Kind::Dir && (self.enter)(&here) {
                below.push((here.clone(), name.to_owned()));
            }
            self.out.found.push(Found { path: here, kind });
        }
        if depth >= DEPTH_MAX {
            return below.is_empty();
        }
        below.into_iter().all(|(path, name)| match open(dir.as_fd(), &name) {
            Some(next) => self.directory(&next, Some(&path), depth + 1),
            None => true,
        })
    }
}

fn kind_of(kind: FileType) -> Kind {
    match kind {
        FileType::Directory => Kind::Dir,
        FileType::RegularFile => Kind::File,
        FileType::Symlink => Kind::Link,
        FileType::Fifo
        | FileType::Socket
        | FileType::CharacterDevice
        | FileType::BlockDevice
        | FileType::Unknown => Kind::Special,
    }
}

fn open(dir: BorrowedFd<'_>, name: &std::ffi::CStr) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve).ok()
}
