//! Removes what dead cells left below `<state>/cells/`: mounts, loop devices, directories.
//!
//! **The dangerous one.** A staged workspace is a mount of the user's own files: removing through it
//! would delete their work. So: unmount first; look again at mountinfo; if anything is still mounted at
//! or below the cell's directory, leave the whole cell and report it; and remove by descriptors that
//! the kernel refuses to lead across a mount. Each of the two guards is enough alone.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags};

use super::mounts::{self, Unmounted};
use super::{loopdev, remove, scratch};
use crate::job::CellId;

/// Directories looked at in one sweep; the rest is for the next one.
const CELLS_MAX: usize = 10_000;

/// Something that a sweep did not remove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Left {
    /// What.
    pub path: PathBuf,
    /// Why, and what may help.
    pub why: String,
}

/// What a sweep did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SweepReport {
    /// Cells of which nothing is left.
    pub removed: Vec<CellId>,
    /// Mounts taken off.
    pub unmounted: u32,
    /// Of these, mounts that somebody still held.
    pub detached: u32,
    /// What is still there: cells that could not be removed, and things that are no cell's.
    pub left: Vec<Left>,
}

/// Removes all cells below `cells_dir` for which `keep` is false. Their processes must have ended. Safe
/// to run again, and after a crash at any point. A missing `cells_dir` is an empty one. Blocks.
///
/// # Errors
/// Only if `cells_dir` itself cannot be trusted (not a directory of the daemon's own that nobody else can
/// write, or reached through a symlink) or read. What goes wrong in one cell is in the report.
pub fn sweep(cells_dir: &Path, keep: &dyn Fn(&CellId) -> bool) -> io::Result<SweepReport> {
    let mut report = SweepReport::default();
    let Some(cells) = open_cells_dir(cells_dir)? else { return Ok(report) };
    for entry in Dir::read_from(&cells)?.take(CELLS_MAX) {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let path = cells_dir.join(name.to_string_lossy().as_ref());
        let id: Option<CellId> = name.to_str().ok().and_then(|n| n.parse().ok());
        let Some(id) = id else {
            report.left.push(Left { path, why: "not a cell's: not touched".to_owned() });
            continue;
        };
        if keep(&id) {
            continue;
        }
        match sweep_cell(cells.as_fd(), &path, name, &mut report) {
            Ok(()) => report.removed.push(id),
            Err(why) => report.left.push(Left { path, why }),
        }
    }
    Ok(report)
}

fn open_cells_dir(cells_dir: &Path) -> io::Result<Option<OwnedFd>> {
    let untrusted = |why: &str| io::Error::other(format!("{}: {why}", cells_dir.display()));
    if !cells_dir.is_absolute() || cells_dir.components().count() < 3 {
        return Err(untrusted("not a cells directory: give its absolute path"));
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // Without symlinks the path is spelled as in mountinfo, so mounts below are found by it.
    let cells = match rustix::fs::openat2(CWD, cells_dir, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS) {
        Ok(cells) => cells,
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let stat = rustix::fs::fstat(&cells)?;
    if stat.st_uid != rustix::process::geteuid().as_raw() || stat.st_mode & 0o022 != 0 {
        return Err(untrusted("others can write here: chown it to the daemon's user and chmod go-w"));
    }
    Ok(Some(cells))
}

fn sweep_cell(
    cells: BorrowedFd<'_>,
    path: &Path,
    name: &std::ffi::CStr,
    report: &mut SweepReport,
) -> Result<(), String> {
    let kind = rustix::fs::statat(cells, name, AtFlags::SYMLINK_NOFOLLOW)
        .map(|s| FileType::from_raw_mode(s.st_mode))
        .map_err(|e| format!("cannot look at it: {e}"))?;
    if kind != FileType::Directory {
        return Err("not a directory: remove it by hand".to_owned());
    }
    for mount in mounts_below(path)? {
        // Two mounts on one path: the first turn takes both off.
        match scratch::unmount_image(&mount.point) {
            Ok(Unmounted::Nothing) => {}
            Ok(ended) => {
                report.unmounted += 1;
                report.detached += u32::from(ended == Unmounted::Detached);
            }
            Err(error) => return Err(format!("{} is still mounted: {error}", mount.point.display())),
        }
    }
    if !loopdev::detached_below(path).map_err(|e| format!("cannot look for loop devices: {e}"))? {
        return Err("a loop device still uses its scratch image: end the cell's processes".to_owned());
    }
    if let Some(mount) = mounts_below(path)?.first() {
        return Err(format!("{} is still mounted: unmount it by hand", mount.point.display()));
    }
    let name = CString::from(name);
    remove::remove_at(cells, &name).map_err(|e| match e.raw_os_error() {
        Some(libc::EXDEV) => "something is mounted below: unmount it by hand".to_owned(),
        _ => format!("cannot remove it: {e}"),
    })
}

fn mounts_below(path: &Path) -> Result<Vec<mounts::Mount>, String> {
    mounts::at_or_below(path).map_err(|e| format!("cannot read mountinfo: {e}"))
}
