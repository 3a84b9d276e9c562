//! The staging directory: hidden, at the top of the directory that is changed, for the submitter only. New nodes are
//! written there whole before anything moves; old ones wait there until all is done. It must never be left behind
//! without a word, and what somebody wrote to a new node must not be thrown away with it.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags};
use rustix::io::Errno;

use super::Step;
use super::judge::{Content, New, open_blob};
use super::look::{Print, Root, chmod, names, openat2};
use super::moves::{Op, slot_name};
use super::plan::Fresh;
use crate::change::TreePath;
use crate::changes::durable::flush_all;

/// How its name begins.
const PREFIX: &str = ".hotcell-apply-";
/// Most new nodes that are open and wait for the disk together.
const BATCH_MAX: usize = 256;
/// Written last; its time tells what was written later.
const MARK: &str = "mark";

/// An open staging directory.
#[derive(Debug)]
pub(super) struct Staging {
    pub(super) fd: OwnedFd,
    pub(super) name: String,
}

/// Why staging stopped.
#[derive(Debug)]
pub(super) struct NotStaged {
    pub(super) doing: &'static str,
    /// What on; none: the staging directory itself.
    pub(super) below: Option<PathBuf>,
    pub(super) source: io::Error,
}

fn at<E: Into<io::Error>>(doing: &'static str, below: &Path) -> impl FnOnce(E) -> NotStaged {
    let below = (!below.as_os_str().is_empty()).then(|| below.to_owned());
    move |error| NotStaged { doing, below, source: error.into() }
}

/// A name for one; nobody else's has it.
pub(super) fn fresh_name() -> io::Result<String> {
    let random = getrandom::u64().map_err(|error| io::Error::other(error.to_string()))?;
    Ok(format!("{PREFIX}{random:016x}"))
}

impl Staging {
    pub(super) fn make(root: &Root, name: &str) -> Result<Self, NotStaged> {
        let none = Path::new("");
        rustix::fs::mkdirat(&root.fd, name, Mode::RWXU).map_err(at("make a directory in", none))?;
        let made = Self::open(root, name).and_then(|made| {
            // The mask of the process, and the group bit of the directory above, aside.
            rustix::fs::fchmod(&made.fd, Mode::RWXU)?;
            Ok(made)
        });
        made.map_err(|error| {
            let _ = rustix::fs::unlinkat(&root.fd, name, AtFlags::REMOVEDIR);
            at("make a directory in", none)(error)
        })
    }

    pub(super) fn open(root: &Root, name: &str) -> io::Result<Self> {
        let fd = root.open(Path::new(name), OFlags::RDONLY | OFlags::DIRECTORY)?;
        Ok(Self { fd, name: name.to_owned() })
    }

    /// Writes all new nodes, whole, to the disk; fills their inodes into `ops`. Gives the time up to which all that
    /// is here is ours.
    pub(super) fn fill(
        &self,
        fresh: &[Fresh],
        ops: &mut [Op],
        blobs: &OwnedFd,
        step: &Step,
    ) -> Result<i128, NotStaged> {
        let mut written: Vec<OwnedFd> = Vec::new();
        for node in fresh {
            step().map_err(at("write", Path::new("")))?;
            written.extend(self.write(node, blobs)?);
            self.flush(&mut written, BATCH_MAX)?;
        }
        for node in fresh.iter().rev() {
            if let New::Dir { mode } = node.new {
                let path = place(node);
                let flags = OFlags::RDONLY | OFlags::DIRECTORY;
                let fd = openat2(&self.fd, &path, flags).map_err(at("open", &path))?;
                regroup(&fd, node.group);
                chmod(&fd, mode).map_err(at("set the mode of", &path))?;
                written.push(fd);
                self.flush(&mut written, BATCH_MAX)?;
            }
        }
        self.flush(&mut written, 0)?;
        for op in ops {
            if let Op::In { slot, new_ino, .. } | Op::Swap { slot, new_ino, .. } = op {
                let name = slot_name(*slot);
                let stat = rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW);
                *new_ino = stat.map_err(at("look at", Path::new("")))?.st_ino;
            }
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mark =
            rustix::fs::openat(&self.fd, MARK, flags, Mode::RUSR).map_err(at("write", Path::new("")))?;
        rustix::fs::fsync(&self.fd).map_err(at("flush", Path::new("")))?;
        let stat = rustix::fs::fstat(&mark).map_err(at("look at", Path::new("")))?;
        Ok(Print::of(&stat).mtime_ns)
    }

    /// Puts what was written on the disk, where it is more than `most`.
    fn flush(&self, written: &mut Vec<OwnedFd>, most: usize) -> Result<(), NotStaged> {
        if written.len() > most {
            flush_all(written).map_err(at("flush", Path::new("")))?;
            written.clear();
        }
        Ok(())
    }

    /// A file is given back, to be flushed.
    fn write(&self, node: &Fresh, blobs: &OwnedFd) -> Result<Option<OwnedFd>, NotStaged> {
        let path = place(node);
        let holder = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let dir = openat2(&self.fd, holder, OFlags::PATH | OFlags::DIRECTORY).map_err(at("open", holder))?;
        let name = path.file_name().unwrap_or_default();
        match &node.new {
            New::Dir { .. } => {
                rustix::fs::mkdirat(&dir, name, Mode::RWXU).map_err(at("write", &path)).map(|()| None)
            }
            New::Link(target) => {
                rustix::fs::symlinkat(target.as_path(), &dir, name).map_err(at("write", &path))?;
                if let Some(gid) = node.group {
                    let group = Some(Gid::from_raw(gid));
                    let _ = rustix::fs::chownat(&dir, name, None, group, AtFlags::SYMLINK_NOFOLLOW);
                }
                Ok(None)
            }
            New::File { content, mode } => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(&dir, name, flags, Mode::RUSR | Mode::WUSR);
                let mut file = std::fs::File::from(fd.map_err(at("write", &path))?);
                copy(content, blobs, &mut file).map_err(at("write", &path))?;
                if let Some(gid) = node.group {
                    let _ = rustix::fs::fchown(&file, None, Some(Gid::from_raw(gid)));
                }
                let mode = Mode::from_raw_mode(*mode & 0o777);
                rustix::fs::fchmod(&file, mode).map_err(at("set the mode of", &path))?;
                Ok(Some(file.into()))
            }
        }
    }

    /// Removes it with all that is in it, but for files written after `spare_after_ns`: their paths in it come back,
    /// and it stays for them.
    pub(super) fn remove(self, root: &Root, spare_after_ns: Option<i128>) -> io::Result<Vec<PathBuf>> {
        let spared = empty(&self.fd, spare_after_ns)?;
        if spared.is_empty() {
            rustix::fs::unlinkat(&root.fd, &self.name, AtFlags::REMOVEDIR)?;
        }
        Ok(spared)
    }
}

/// The group of a directory that hands it down, where the submitter may give it away.
fn regroup(fd: &OwnedFd, group: Option<u32>) {
    if let Some(gid) = group {
        let _ = rustix::fs::chownat(fd, "", None, Some(Gid::from_raw(gid)), AtFlags::EMPTY_PATH);
    }
}

fn place(node: &Fresh) -> PathBuf {
    let top = PathBuf::from(slot_name(node.slot));
    node.below.as_ref().map_or(top.clone(), |below: &TreePath| top.join(below.as_path()))
}

fn copy(content: &Content, blobs: &OwnedFd, file: &mut std::fs::File) -> io::Result<()> {
    match content {
        Content::Text(text) => file.write_all(text),
        Content::Blob { id, bytes } => {
            let copied = io::copy(&mut open_blob(blobs, id)?, file)?;
            if copied == *bytes {
                return Ok(());
            }
            Err(io::Error::other(format!("the kept content {id} has {copied} bytes, not {bytes}")))
        }
    }
}

/// Empties a directory of the submitter's, whatever modes are in it. Keeps no descriptors, so depth is no matter.
pub(super) fn empty(dir: &OwnedFd, spare_after_ns: Option<i128>) -> io::Result<Vec<PathBuf>> {
    let (mut dirs, mut next, mut spared) = (vec![PathBuf::from(".")], 0, Vec::new());
    while let Some(path) = dirs.get(next).cloned() {
        next += 1;
        if next > 1 {
            chmod(&openat2(dir, &path, OFlags::PATH)?, 0o700)?;
        }
        let here = openat2(dir, &path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        for name in names(openat2(dir, &path, OFlags::RDONLY | OFlags::DIRECTORY)?)? {
            let stat = rustix::fs::statat(&here, &name, AtFlags::SYMLINK_NOFOLLOW)?;
            let below = path.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
            let kind = FileType::from_raw_mode(stat.st_mode);
            let later = spare_after_ns.is_some_and(|until| Print::of(&stat).mtime_ns > until);
            if kind.is_dir() {
                dirs.push(below);
            } else if kind.is_file() && later {
                spared.push(below);
            } else {
                rustix::fs::unlinkat(&here, &name, AtFlags::empty())?;
            }
        }
    }
    for path in dirs.iter().skip(1).rev() {
        let holder = openat2(dir, path.parent().unwrap_or(Path::new(".")), OFlags::PATH)?;
        match rustix::fs::unlinkat(&holder, path.file_name().unwrap_or_default(), AtFlags::REMOVEDIR) {
            Err(Errno::NOTEMPTY) if !spared.is_empty() => {}
            other => other?,
        }
    }
    Ok(spared)
}
