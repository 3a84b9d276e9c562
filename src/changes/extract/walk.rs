//! What a dead cell left: an overlay's upper directory, or a whole copy. It was made by an agent: nothing of it is
//! followed, nothing but directories is opened here, and what the kernel never writes there is refused as corrupt.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::fs::{AtFlags, Mode, OFlags, RawDir, StatxFlags};
use rustix::io::Errno;

use super::super::listing::{RESOLVE, Seen, What, look, open_dir};
use super::ExtractError;
use crate::change::{Special, TreePath};

const BUFFER_BYTES: usize = 64 << 10;

/// What was found.
#[derive(Default)]
pub(super) struct Walked {
    /// Every path that is there, sorted by bytes.
    pub(super) found: Vec<(TreePath, Seen)>,
    /// Paths of which nothing is left, with all below them.
    pub(super) gone: Vec<TreePath>,
    /// Directories that show nothing of the base.
    pub(super) opaque: Vec<TreePath>,
    /// Paths longer than Linux takes at once: they cannot be named.
    pub(super) too_long: u64,
}

/// Looks at everything below `root`.
pub(super) fn walk(
    root: &OwnedFd,
    overlay: bool,
    paths_max: usize,
    until: Instant,
) -> Result<Walked, ExtractError> {
    let mut walked = Walked::default();
    let mut dirs = vec![None];
    while let Some(path) = dirs.pop() {
        let name = path.as_ref().map_or(&b"."[..], TreePath::as_bytes);
        let dir = open_dir(root.as_fd(), name).map_err(|errno| at("open", path.as_ref(), errno))?;
        if overlay && let Some(path) = &path {
            check_marks(&dir, path)?;
            if is_opaque(&dir, path)? {
                walked.opaque.push(path.clone());
            }
        }
        enter(&dir, path.as_ref(), overlay, paths_max, &mut walked, &mut dirs)?;
        if Instant::now() > until {
            return Err(ExtractError::TooSlow);
        }
    }
    walked.found.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
    Ok(walked)
}

fn enter(
    dir: &OwnedFd,
    path: Option<&TreePath>,
    overlay: bool,
    paths_max: usize,
    walked: &mut Walked,
    dirs: &mut Vec<Option<TreePath>>,
) -> Result<(), ExtractError> {
    let mut buffer = Vec::with_capacity(BUFFER_BYTES);
    let mut names = RawDir::new(dir, buffer.spare_capacity_mut());
    while let Some(entry) = names.next() {
        let entry = entry.map_err(|errno| at("list", path, errno))?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let full = path.map_or_else(|| TreePath::new(name.to_bytes()), |above| above.join(name.to_bytes()));
        let Ok(full) = full else {
            walked.too_long += 1;
            continue;
        };
        if walked.found.len() + walked.gone.len() >= paths_max {
            return Err(ExtractError::TooMany { limit: paths_max });
        }
        let seen = look(dir.as_fd(), name).map_err(|errno| at("look at", Some(&full), errno))?;
        let Some((seen, mount)) = seen else {
            return Err(corrupt(&full, "it went away while it was looked at"));
        };
        if mount {
            return Err(corrupt(&full, "something is mounted there"));
        }
        if overlay && seen.what == What::Special(Special::Device) && is_whiteout(dir, name, &full)? {
            walked.gone.push(full);
            continue;
        }
        if seen.is_dir() {
            dirs.push(Some(full.clone()));
        }
        walked.found.push((full, seen));
    }
    Ok(())
}

/// A character device 0:0 is how an overlay says that nothing is there.
fn is_whiteout(dir: &OwnedFd, name: &std::ffi::CStr, path: &TreePath) -> Result<bool, ExtractError> {
    let stat = rustix::fs::statx(dir, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE | StatxFlags::MODE);
    let stat = stat.map_err(|errno| at("look at", Some(path), errno))?;
    let character = u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFCHR;
    Ok(character && stat.stx_rdev_major == 0 && stat.stx_rdev_minor == 0)
}

/// Opens a regular file that [`walk`] saw, and proves that it is still the same: its writers are dead.
pub(super) fn open_file(
    root: &OwnedFd,
    path: &TreePath,
    seen: &Seen,
    overlay: bool,
) -> Result<std::fs::File, ExtractError> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat2(root, path.as_bytes(), flags, Mode::empty(), RESOLVE);
    let file = file.map_err(|errno| at("open", Some(path), errno))?;
    still(&file, path, seen)?;
    if overlay {
        check_marks(&file, path)?;
    }
    Ok(file.into())
}

/// The file is what it was.
pub(super) fn still<F: AsFd>(file: F, path: &TreePath, seen: &Seen) -> Result<(), ExtractError> {
    match look(file.as_fd(), c"").map_err(|errno| at("look at", Some(path), errno))? {
        Some((now, _)) if now == *seen => Ok(()),
        Some(_) | None => Err(corrupt(path, "it changed while it was read")),
    }
}

/// What only `redirect_dir`, `metacopy` and newer forms of whiteouts make: the mounts here have none of them, and an
/// agent cannot set what begins with `trusted`. (`user.overlay.*` it can set; it means nothing to these mounts.)
fn check_marks<F: AsFd>(file: F, path: &TreePath) -> Result<(), ExtractError> {
    for mark in [c"trusted.overlay.redirect", c"trusted.overlay.metacopy", c"trusted.overlay.whiteout"] {
        if mark_of(file.as_fd(), mark, path)?.is_some() {
            return Err(corrupt(path, "it points elsewhere, as no mount of ours makes it"));
        }
    }
    Ok(())
}

fn is_opaque(dir: &OwnedFd, path: &TreePath) -> Result<bool, ExtractError> {
    match mark_of(dir.as_fd(), c"trusted.overlay.opaque", path)? {
        None => Ok(false),
        Some(value) if value == b"y" => Ok(true),
        Some(_) => Err(corrupt(path, "it is marked in a way that no mount of ours makes")),
    }
}

fn mark_of(
    file: std::os::fd::BorrowedFd<'_>,
    name: &std::ffi::CStr,
    path: &TreePath,
) -> Result<Option<Vec<u8>>, ExtractError> {
    let mut value = [0u8; 16];
    match rustix::fs::fgetxattr(file, name, &mut value[..]) {
        Ok(length) => Ok(Some(value[..length].to_vec())),
        // Longer than any mark of interest.
        Err(Errno::RANGE) => Ok(Some(Vec::new())),
        Err(Errno::NODATA | Errno::NOTSUP) => Ok(None),
        Err(errno) => Err(at("read the marks of", Some(path), errno)),
    }
}

fn corrupt(path: &TreePath, what: &'static str) -> ExtractError {
    ExtractError::Corrupt { path: path.to_string(), what }
}

fn at(doing: &'static str, path: Option<&TreePath>, errno: Errno) -> ExtractError {
    let path = path.map_or_else(|| ".".to_owned(), ToString::to_string);
    match errno {
        Errno::XDEV => ExtractError::Corrupt { path, what: "something is mounted there" },
        Errno::LOOP | Errno::NOTDIR | Errno::NOENT => {
            ExtractError::Corrupt { path, what: "it became something else while it was looked at" }
        }
        other => ExtractError::Io { doing, path, source: other.into() },
    }
}
