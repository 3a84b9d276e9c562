//! Takes one file out of a dead cell's scratch space. What lies there was made by an agent: nothing of it may
//! lead anywhere else (no link is followed, no mount crossed), hold the reader up (a FIFO, a device), or be
//! longer than was agreed.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// Its bytes, at most what was asked for.
    pub bytes: Vec<u8>,
    /// It has more.
    pub cut: bool,
}

/// Why a file was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TakeError {
    /// There is none.
    #[error("there is no such file")]
    Missing,
    /// Something else is there.
    #[error("it is a {0}, not a file")]
    NotAFile(&'static str),
    /// A symbolic link, or a path through one.
    #[error("it is, or goes through, a symbolic link")]
    Link,
    /// The kernel said no.
    #[error("it cannot be read: {0}")]
    Io(String),
}

/// Reads `below`, a plain relative path, in `root`, a directory of a scratch space. Blocks.
///
/// # Errors
/// [`TakeError`].
pub fn take_file(root: &Path, below: &Path, bytes_max: u64) -> Result<Taken, TakeError> {
    let file = open_file(root, below)?;
    let mut bytes = Vec::new();
    let read = file.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes);
    read.map_err(|error| TakeError::Io(error.to_string()))?;
    let cut = bytes.len() as u64 > bytes_max;
    bytes.truncate(usize::try_from(bytes_max).unwrap_or(usize::MAX));
    Ok(Taken { bytes, cut })
}

/// Opens `below` in `root` as [`take_file`] does, for what is too long to be held in memory. It may still grow.
///
/// # Errors
/// [`TakeError`].
pub fn open_file(root: &Path, below: &Path) -> Result<File, TakeError> {
    let io = |errno: Errno| TakeError::Io(std::io::Error::from(errno).to_string());
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, root, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::NOENT => TakeError::Missing,
        other => io(other),
    })?;
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    // First looked at, then opened: opening a FIFO for reading would let its writer go on, a device may act.
    let look = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found =
        rustix::fs::openat2(&root, below, look, Mode::empty(), resolve).map_err(|errno| match errno {
            Errno::NOENT | Errno::NOTDIR => TakeError::Missing,
            Errno::LOOP | Errno::XDEV => TakeError::Link,
            other => io(other),
        })?;
    let stat = rustix::fs::fstat(&found).map_err(io)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {}
        FileType::Symlink => return Err(TakeError::Link),
        FileType::Directory => return Err(TakeError::NotAFile("directory")),
        FileType::Fifo => return Err(TakeError::NotAFile("FIFO")),
        FileType::Socket => return Err(TakeError::NotAFile("socket")),
        FileType::CharacterDevice | FileType::BlockDevice => return Err(TakeError::NotAFile("device")),
        FileType::Unknown => return Err(TakeError::NotAFile("thing of unknown kind")),
    }
    // The same inode: by its descriptor, not by its name.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&found));
    let read = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(CWD, path, read, Mode::empty()).map_err(io)?;
    Ok(File::from(file))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn take(root: &Path, below: &str) -> Result<Taken, TakeError> {
        take_file(root, Path::new(below), 1000)
    }

    #[test]
    fn a_file_is_taken_as_it_is_and_a_longer_one_is_cut() {
        let root = tempfile::tempdir().expect("tempdir");
        std::fs::create_dir(root.path().join("out")).expect("mkdir");
        std::fs::write(root.path().join("out/report"), b"\xff\x1b[2Jtext").expect("write");
        let taken = take(root.path(), "out/report").expect("taken");
        assert_eq!((taken.bytes.as_slice(), taken.cut), (&b"\xff\x1b[2Jtext"[..], false));
        std::fs::write(root.path().join("exact"), "x".repeat(1000)).expect("write");
        assert!(take(root.path(), "exact").is_ok_and(|t| t.bytes.len() == 1000 && !t.cut));
        // A terabyte that takes no space on the disk.
        std::fs::File::create(root.path().join("huge")).and_then(|f| f.set_len(1 << 40)).expect("sparse");
        assert!(take(root.path(), "huge").is_ok_and(|t| t.bytes.len() == 1000 && t.cut));
        assert_eq!(take(root.path(), "missing"), Err(TakeError::Missing));
        assert_eq!(take(root.path(), "out/report/below"), Err(TakeError::Missing));
        assert_eq!(take(&root.path().join("gone"), "x"), Err(TakeError::Missing));
    }

    #[test]
    fn no_link_leads_anywhere_else() {
        let root = tempfile::tempdir().expect("tempdir");
        let outside = tempfile::tempdir().expect("tempdir");
        std::fs::write(outside.path().join("secret"), "the host's").expect("write");
        std::fs::write(root.path().join("own"), "own").expect("write");
        symlink(outside.path().join("secret"), root.path().join("absolute")).expect("symlink");
        symlink("own", root.path().join("relative")).expect("symlink");
        symlink(outside.path(), root.path().join("dir")).expect("symlink");
        symlink("/proc/self/fd", root.path().join("magic")).expect("symlink");
        for below in ["absolute", "relative", "dir/secret", "magic/0"] {
            assert_eq!(take(root.path(), below), Err(TakeError::Link), "{below}");
        }
        // The place itself, replaced by a link, is not followed either.
        symlink(outside.path(), root.path().join("home")).expect("symlink");
        assert!(take(&root.path().join("home"), "secret").is_err());
    }

    #[test]
    fn what_is_no_file_is_named_and_holds_nobody_up() {
        let root = tempfile::tempdir().expect("tempdir");
        std::fs::create_dir(root.path().join("dir")).expect("mkdir");
        rustix::fs::mknodat(CWD, root.path().join("fifo"), FileType::Fifo, Mode::RUSR, 0).expect("fifo");
        let _socket = std::os::unix::net::UnixListener::bind(root.path().join("socket")).expect("socket");
        for (name, kind) in [("dir", "directory"), ("fifo", "FIFO"), ("socket", "socket")] {
            assert_eq!(take(root.path(), name), Err(TakeError::NotAFile(kind)));
        }
    }
}
