//! What is in a directory of the submitter's, looked at with the submitter's rights. Never follows a symbolic link,
//! never leaves the mount it began in, never opens what is no regular file or directory for reading.

use std::ffi::CString;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::change::{BlobId, Raw, Special, TreePath};

const COPY_BYTES: usize = 128 << 10;
/// Where a path may lead: nowhere but below the directory, by no link, into no other mount.
pub(super) const BELOW: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// A directory, and how people call it.
#[derive(Debug)]
pub(super) struct Root {
    pub(super) fd: OwnedFd,
    pub(super) path: PathBuf,
}

/// What tells whether a node is the one that was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Print {
    pub(super) ino: u64,
    pub(super) bytes: u64,
    pub(super) mtime_ns: i128,
    pub(super) dir: bool,
}

/// What kind of thing is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum What {
    File,
    Link(Raw),
    Dir,
    Special(Special),
}

/// What is at a path.
#[derive(Debug, Clone)]
pub(super) struct Now {
    pub(super) what: What,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// It has other names (hard links).
    pub(super) shared: bool,
    pub(super) print: Print,
}

impl Print {
    pub(super) fn of(stat: &rustix::fs::Stat) -> Self {
        let nanoseconds = i128::from(stat.st_mtime) * 1_000_000_000 + i128::from(stat.st_mtime_nsec);
        let dir = FileType::from_raw_mode(stat.st_mode).is_dir();
        Self { ino: stat.st_ino, bytes: stat.st_size as u64, mtime_ns: nanoseconds, dir }
    }

    /// Whether it is the same node with nothing written to it since. A directory's own times and length change with
    /// what is taken out of it.
    pub(super) fn same(&self, other: &Self) -> bool {
        if self.dir { other.dir && self.ino == other.ino } else { self == other }
    }
}

impl Root {
    /// Opens what is at `path`, below this directory only.
    pub(super) fn open(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        openat2(&self.fd, path, flags)
    }

    /// The directory that holds `path`, and its name there.
    pub(super) fn parent(&self, path: &TreePath) -> rustix::io::Result<(OwnedFd, CString)> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let holder = path.parent();
        let dir = self.open(holder.as_ref().map_or(Path::new("."), TreePath::as_path), flags)?;
        Ok((dir, CString::new(path.name()).map_err(|_| Errno::INVAL)?))
    }

    /// What is at `path`; none: nothing, or a file is where its directory would be.
    pub(super) fn look(&self, path: &TreePath) -> rustix::io::Result<Option<Now>> {
        match self.open(path.as_path(), OFlags::PATH) {
            Ok(fd) => now(&fd).map(Some),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// The names in the directory `path`.
    pub(super) fn list(&self, path: &Path) -> io::Result<Vec<CString>> {
        names(self.open(path, OFlags::RDONLY | OFlags::DIRECTORY)?)
    }

    /// The regular file `path`, to be read, if it still is the one of `print`.
    pub(super) fn read(&self, path: &TreePath, print: &Print) -> io::Result<std::fs::File> {
        let changed = || io::Error::other("it changes while it is read");
        // Looked at before it is opened: opening a FIFO would let its writer go on, a device may act.
        let found = self.open(path.as_path(), OFlags::PATH)?;
        if !Print::of(&rustix::fs::fstat(&found)?).same(print) {
            return Err(changed());
        }
        let file = std::fs::File::from(self.open(path.as_path(), OFlags::RDONLY | OFlags::NONBLOCK)?);
        if Print::of(&rustix::fs::fstat(&file)?).same(print) { Ok(file) } else { Err(changed()) }
    }

    /// The name of the content of the regular file `path`.
    pub(super) fn content(&self, path: &TreePath, print: &Print) -> io::Result<BlobId> {
        let (mut file, mut hash) = (self.read(path, print)?, Sha256::new());
        let mut buffer = vec![0; COPY_BYTES];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(BlobId::of_digest(hash.finalize().into())),
                Ok(got) => hash.update(&buffer[..got]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Opens `path` below `dir`.
pub(super) fn openat2(dir: &OwnedFd, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    loop {
        match rustix::fs::openat2(dir, path, flags, Mode::empty(), BELOW) {
            // Somebody renames above it: the kernel could not be sure, and asks to try again.
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
}

/// The names in a directory.
pub(super) fn names(dir: OwnedFd) -> io::Result<Vec<CString>> {
    let mut found = Vec::new();
    for entry in Dir::new(dir)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            found.push(entry.file_name().to_owned());
        }
    }
    Ok(found)
}

/// What an `O_PATH` descriptor names.
pub(super) fn now(fd: &OwnedFd) -> rustix::io::Result<Now> {
    let stat = rustix::fs::fstat(fd)?;
    let what = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => What::File,
        FileType::Directory => What::Dir,
        FileType::Symlink => What::Link(Raw(rustix::fs::readlinkat(fd, "", Vec::new())?.into_bytes())),
        FileType::Fifo => What::Special(Special::Fifo),
        FileType::Socket => What::Special(Special::Socket),
        FileType::CharacterDevice | FileType::BlockDevice | FileType::Unknown => {
            What::Special(Special::Device)
        }
    };
    let (mode, print) = (stat.st_mode & 0o7777, Print::of(&stat));
    Ok(Now { what, mode, uid: stat.st_uid, gid: stat.st_gid, shared: stat.st_nlink > 1, print })
}

/// Changes the mode of the node that `fd` names, whatever its path is now.
pub(super) fn chmod(fd: &OwnedFd, mode: u32) -> io::Result<()> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    Ok(rustix::fs::chmod(path, Mode::from_raw_mode(mode))?)
}
