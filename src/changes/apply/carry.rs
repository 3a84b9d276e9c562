//! Writes what a job changed into a tree of another's making, whatever is there: the upper directory of an overlay
//! (a job that goes on from another's result), or a plain copy. Every step is by descriptor below the tree: a symbolic
//! link in it leads nowhere. It must never write into a tree that a person works in: nothing is looked at first.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, XattrFlags};
use rustix::io::Errno;

use super::LeftOut;
use super::judge::open_blob;
use super::look::{Now, Root, What, chmod, now, openat2};
use super::stage::empty;
use crate::change::{ChangeSet, Entry, Node, TreePath};
use crate::changes::{JobShelf, ShelfError};

const OPAQUE: &str = "trusted.overlay.opaque";
/// Mode of a directory that nobody said one for.
const DIR_MODE: u32 = 0o755;

/// Writes a change set, what lies in `.git` directories included, into the empty upper directory `upper` of an
/// overlay: whiteouts for what is gone, opaque directories in the place of something else. Parents get the modes that
/// they have in `lower`; all belongs to `owner` (uid, gid). Needs root. Gives what cannot be carried on.
///
/// # Errors
/// [`ShelfError::Io`]; what was written so far is there.
pub fn materialise(
    shelf: &JobShelf,
    changes: &ChangeSet,
    upper: &Path,
    lower: Option<BorrowedFd<'_>>,
    owner: (u32, u32),
) -> Result<Vec<LeftOut>, ShelfError> {
    carried(shelf, changes, upper, owner, Kind::Layer(lower))
}

/// The same into a plain copy of the tree that the job began with.
///
/// # Errors
/// [`ShelfError::Io`]; what was written so far is there.
pub fn materialise_plain(
    shelf: &JobShelf,
    changes: &ChangeSet,
    tree: &Path,
    owner: (u32, u32),
) -> Result<Vec<LeftOut>, ShelfError> {
    carried(shelf, changes, tree, owner, Kind::Tree)
}

fn carried(
    shelf: &JobShelf,
    changes: &ChangeSet,
    tree: &Path,
    owner: (u32, u32),
    kind: Kind<'_>,
) -> Result<Vec<LeftOut>, ShelfError> {
    let failed = |error: io::Error| ShelfError::Io { doing: "open", path: tree.to_owned(), source: error };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(CWD, tree, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
    let (root, blobs) = (Root { fd, path: tree.to_owned() }, shelf.blobs_dir()?);
    let mut all: BTreeMap<TreePath, Entry> = BTreeMap::new();
    for entry in changes.git_state.iter().chain(&changes.entries) {
        let known = all.get(&entry.path).is_some_and(|there| !lost(there));
        if !known || !lost(entry) {
            all.insert(entry.path.clone(), entry.clone());
        }
    }
    let mut carrier = Carrier::new(&root, &blobs, kind);
    carrier.owner = Some(owner);
    let done = carrier.carry(&all).and_then(|()| carrier.finish());
    done.map_err(|(path, source)| ShelfError::Io { doing: "write", path, source })?;
    Ok(carrier.left_out)
}

/// Whether its content was not kept.
fn lost(entry: &Entry) -> bool {
    matches!(entry.after, Some(Node::File { blob: None, .. }))
}

/// Into what.
pub(super) enum Kind<'a> {
    Layer(Option<BorrowedFd<'a>>),
    Tree,
}

pub(super) struct Carrier<'a> {
    root: &'a Root,
    blobs: &'a OwnedFd,
    kind: Kind<'a>,
    pub(super) owner: Option<(u32, u32)>,
    /// Paths that something must not be made below.
    pub(super) closed: BTreeSet<TreePath>,
    /// Modes that directories get in the end: until then they can be written.
    pub(super) modes: BTreeMap<TreePath, u32>,
    pub(super) left_out: Vec<LeftOut>,
}

type Failed = (std::path::PathBuf, io::Error);

impl<'a> Carrier<'a> {
    pub(super) fn new(root: &'a Root, blobs: &'a OwnedFd, kind: Kind<'a>) -> Self {
        let (closed, modes, left_out) = (BTreeSet::new(), BTreeMap::new(), Vec::new());
        Self { root, blobs, kind, owner: None, closed, modes, left_out }
    }

    /// Writes all of them.
    pub(super) fn carry(&mut self, entries: &BTreeMap<TreePath, Entry>) -> Result<(), Failed> {
        let failed = |path: &TreePath| {
            let path = self.root.path.join(path.as_path());
            move |error: io::Error| (path, error)
        };
        let tree = matches!(self.kind, Kind::Tree);
        for (path, _) in entries.iter().rev().filter(|(_, entry)| tree && entry.after.is_none()) {
            self.remove(path).map_err(failed(path))?;
        }
        for (path, entry) in entries {
            let done = match &entry.after {
                None if tree => Ok(()),
                None => self.whiteout(path, entries),
                Some(after) => self.put(path, after, matches!(entry.before, Some(Node::Dir { .. }))),
            };
            match done {
                // Something that the job did not know is in the way.
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENOTDIR | libc::EXDEV)) =>
                {
                    self.leave(path, "what is above it is no directory, or on another mount");
                }
                done => done.map_err(|error| (self.root.path.join(path.as_path()), error))?,
            }
        }
        Ok(())
    }

    /// Gives directories their modes.
    pub(super) fn finish(&mut self) -> Result<(), Failed> {
        for (path, mode) in std::mem::take(&mut self.modes).iter().rev() {
            let set = match self.root.open(path.as_path(), OFlags::PATH | OFlags::DIRECTORY) {
                Ok(dir) => chmod(&dir, *mode),
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(()),
                Err(errno) => Err(errno.into()),
            };
            set.map_err(|error| (self.root.path.join(path.as_path()), error))?;
        }
        Ok(())
    }

    /// Leaves `path` out, and what lies below it.
    fn leave(&mut self, path: &TreePath, why: &str) {
        self.closed.insert(path.clone());
        self.left_out.push(LeftOut { path: path.clone(), why: why.to_owned() });
    }

    /// Takes away what is there; a directory only if nothing else is in it.
    fn remove(&mut self, path: &TreePath) -> io::Result<()> {
        let there = match self.root.look(path) {
            Ok(Some(there)) => there,
            Ok(None) | Err(Errno::LOOP | Errno::XDEV) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        let (dir, name) = self.root.parent(path)?;
        let flags = if there.what == What::Dir { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        match rustix::fs::unlinkat(&dir, &name, flags) {
            Err(Errno::NOTEMPTY) => Ok(()),
            other => Ok(other?),
        }
    }

    fn whiteout(&mut self, path: &TreePath, entries: &BTreeMap<TreePath, Entry>) -> io::Result<()> {
        let above = path.parent().and_then(|above| entries.get(&above));
        // What is above it is gone already, or something else.
        if above.is_some_and(|entry| !matches!(entry.after, Some(Node::Dir { .. }))) {
            return Ok(());
        }
        self.parents(path)?;
        let (dir, name) = self.root.parent(path)?;
        Ok(rustix::fs::mknodat(&dir, &name, FileType::CharacterDevice, Mode::empty(), 0)?)
    }

    fn put(&mut self, path: &TreePath, after: &Node, was_dir: bool) -> io::Result<()> {
        let below_closed = self.closed.iter().any(|closed| path.is_at_or_below(closed));
        let why = match after {
            Node::Special { .. } => Some("a device, FIFO or socket is not carried on"),
            Node::File { blob: None, .. } => Some("its content was not kept"),
            Node::File { .. } | Node::Symlink { .. } | Node::Dir { .. } => {
                below_closed.then_some("what it lies in is left out")
            }
        };
        if let Some(why) = why {
            self.leave(path, why);
            return Ok(());
        }
        self.parents(path)?;
        let stays = self.clear_for(path, after)?;
        let (dir, name) = self.root.parent(path)?;
        match after {
            Node::Dir { mode } => {
                if !stays {
                    rustix::fs::mkdirat(&dir, &name, Mode::RWXU)?;
                }
                let made = openat2(
                    &dir,
                    Path::new(OsStr::from_bytes(name.to_bytes())),
                    OFlags::RDONLY | OFlags::DIRECTORY,
                )?;
                if matches!(self.kind, Kind::Layer(_)) && !was_dir {
                    rustix::fs::fsetxattr(&made, OPAQUE, b"y", XattrFlags::empty())?;
                }
                self.modes.insert(path.clone(), *mode);
            }
            Node::Symlink { target } => rustix::fs::symlinkat(target.as_path(), &dir, &name)?,
            Node::File { mode, blob: Some(id), .. } => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(&dir, &name, flags, Mode::RUSR | Mode::WUSR)?;
                let mut file = std::fs::File::from(fd);
                io::copy(&mut open_blob(self.blobs, id)?, &mut file)?;
                rustix::fs::fchmod(&file, Mode::from_raw_mode(*mode & 0o777))?;
            }
            Node::File { blob: None, .. } | Node::Special { .. } => {}
        }
        self.give(&dir, &name)
    }

    /// Makes room; true where a directory is there already and shall be one.
    fn clear_for(&mut self, path: &TreePath, after: &Node) -> io::Result<bool> {
        let Some(there) = self.root.look(path)? else { return Ok(false) };
        let (dir, name) = self.root.parent(path)?;
        if there.what != What::Dir {
            rustix::fs::unlinkat(&dir, &name, AtFlags::empty())?;
            return Ok(false);
        }
        if matches!(after, Node::Dir { .. }) {
            return Ok(true);
        }
        empty(&self.root.open(path.as_path(), OFlags::RDONLY | OFlags::DIRECTORY)?, None)?;
        rustix::fs::unlinkat(&dir, &name, AtFlags::REMOVEDIR)?;
        self.modes.retain(|known, _| !known.is_at_or_below(path));
        Ok(false)
    }

    /// Makes the directories above `path`, where they are missing.
    fn parents(&mut self, path: &TreePath) -> io::Result<()> {
        let mut missing = Vec::new();
        let mut above = path.parent();
        while let Some(at) = above {
            if self.root.look(&at)?.is_some() {
                break;
            }
            above = at.parent();
            missing.push(at);
        }
        for at in missing.into_iter().rev() {
            let (dir, name) = self.root.parent(&at)?;
            rustix::fs::mkdirat(&dir, &name, Mode::RWXU)?;
            self.give(&dir, &name)?;
            let mode = self.lower(&at).map_or(DIR_MODE, |now| now.mode);
            self.modes.entry(at).or_insert(mode);
        }
        Ok(())
    }

    /// The directory as the layer below has it.
    fn lower(&self, path: &TreePath) -> Option<Now> {
        let Kind::Layer(Some(lower)) = self.kind else { return None };
        let fd = openat2(&lower.try_clone_to_owned().ok()?, path.as_path(), OFlags::PATH | OFlags::DIRECTORY)
            .ok()?;
        now(&fd).ok()
    }

    fn give(&self, dir: &OwnedFd, name: &std::ffi::CStr) -> io::Result<()> {
        let Some((uid, gid)) = self.owner else { return Ok(()) };
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        Ok(rustix::fs::chownat(dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?)
    }
}
