//! Removes a directory tree of ours. Must never follow a symlink, never enter another mount, and never
//! unlink anything but what is below the directory it was given: every step is relative to an open
//! descriptor, and the kernel refuses to resolve across a mount (`RESOLVE_NO_XDEV`).
//!
//! What is removed may have been written by an agent: depth and number of entries are not trusted.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Deeper directories are moved up before they are emptied, so descriptors are bounded.
const DEPTH_MAX: usize = 128;
/// Directory names kept per level; the rest is found by the next look.
const NAMES_MAX: usize = 4096;
/// Directories that somebody fills while we empty them, before we give up.
const REFILLS_MAX: usize = 64;

struct Level {
    dir: OwnedFd,
    name: CString,
    pending: Vec<CString>,
}

/// Removes `name` in `parent`, whatever it is. Nothing there is fine.
///
/// # Errors
/// EXDEV if something is mounted on or below it (what was reached before that is gone), EBUSY if somebody
/// keeps filling it, or the kernel's word.
pub(super) fn remove_at(parent: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    let stat = match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return gone(rustix::fs::unlinkat(parent, name, AtFlags::empty()));
    }
    let mut levels = vec![open_level(parent, name)?];
    let mut moved_up = 0_u64;
    let mut refills = 0;
    while let Some(depth) = levels.len().checked_sub(1) {
        let level = &mut levels[depth];
        if let Some(child) = level.pending.pop() {
            if depth < DEPTH_MAX {
                match open_level(level.dir.as_fd(), &child) {
                    Ok(next) => levels.push(next),
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                    Err(error) => return Err(error),
                }
            } else {
                // The top is looked at again until it is empty, so this one's turn comes.
                moved_up += 1;
                let up = format!(".hotcell-deep-{moved_up}");
                gone(rustix::fs::renameat(&levels[depth].dir, &child, &levels[0].dir, up))?;
            }
            continue;
        }
        if empty_files(level)? {
            let Some(done) = levels.pop() else { break };
            let above = levels.last().map_or(parent, |l| l.dir.as_fd());
            match rustix::fs::unlinkat(above, &done.name, AtFlags::REMOVEDIR) {
                // Filled again since we looked; the level above (or the check below) sees it.
                Err(Errno::NOTEMPTY) if refills < REFILLS_MAX => {
                    refills += 1;
                    levels.push(done);
                }
                other => gone(other)?,
            }
        }
    }
    Ok(())
}

fn gone(result: rustix::io::Result<()>) -> io::Result<()> {
    match result {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn open_level(parent: BorrowedFd<'_>, name: &CStr) -> io::Result<Level> {
    Ok(Level { dir: open_dir(parent, name)?, name: name.to_owned(), pending: Vec::new() })
}

/// Opens a directory without leaving the mount of `parent`.
pub(super) fn open_dir(parent: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    Ok(rustix::fs::openat2(parent, name, flags, Mode::empty(), resolve)?)
}

/// Unlinks everything that is not a directory, notes the directories. True if there was nothing at all.
fn empty_files(level: &mut Level) -> io::Result<bool> {
    let mut seen = false;
    for entry in Dir::read_from(&level.dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        seen = true;
        if level.pending.len() >= NAMES_MAX {
            break;
        }
        match entry.file_type() {
            FileType::Directory => level.pending.push(name.to_owned()),
            FileType::Unknown => match rustix::fs::unlinkat(&level.dir, name, AtFlags::empty()) {
                Err(Errno::ISDIR) => level.pending.push(name.to_owned()),
                other => gone(other)?,
            },
            _ => gone(rustix::fs::unlinkat(&level.dir, name, AtFlags::empty()))?,
        }
    }
    Ok(!seen)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn remove(root: &std::path::Path, name: &CStr) -> io::Result<()> {
        remove_at(std::fs::File::open(root)?.as_fd(), name)
    }

    #[test]
    fn a_tree_goes_and_what_its_symlinks_point_to_stays() {
        let root = tempfile::tempdir().expect("tempdir");
        let precious = root.path().join("precious");
        std::fs::create_dir(&precious).expect("mkdir");
        std::fs::write(precious.join("work"), "mine").expect("write");
        let doomed = root.path().join("doomed");
        std::fs::create_dir_all(doomed.join("a/b/c")).expect("mkdir");
        std::fs::write(doomed.join("a/b/file"), "x").expect("write");
        symlink(&precious, doomed.join("a/link")).expect("symlink");
        symlink(&precious, doomed.join("link")).expect("symlink");
        symlink("..", doomed.join("a/b/up")).expect("symlink");
        remove(root.path(), c"doomed").expect("removed");
        assert!(!doomed.exists());
        assert_eq!(std::fs::read_to_string(precious.join("work")).expect("still there"), "mine");
        remove(root.path(), c"doomed").expect("again is fine");
    }

    #[test]
    fn a_symlink_is_removed_not_followed() {
        let root = tempfile::tempdir().expect("tempdir");
        std::fs::create_dir(root.path().join("precious")).expect("mkdir");
        symlink("precious", root.path().join("link")).expect("symlink");
        remove(root.path(), c"link").expect("removed");
        assert!(root.path().join("precious").exists());
    }

    #[test]
    fn a_tree_deeper_than_paths_and_descriptors_allow_goes() {
        let root = tempfile::tempdir().expect("tempdir");
        let mut here: OwnedFd = std::fs::File::open(root.path()).expect("open").into();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&here, c"d", Mode::RWXU).expect("mkdir");
            here = open_dir(here.as_fd(), c"d").expect("open");
        }
        drop(here);
        remove(root.path(), c"d").expect("removed");
        assert_eq!(std::fs::read_dir(root.path()).expect("list").count(), 0);
    }

    #[test]
    fn more_directories_than_are_kept_in_memory_go() {
        let root = tempfile::tempdir().expect("tempdir");
        let doomed = root.path().join("doomed");
        std::fs::create_dir(&doomed).expect("mkdir");
        for i in 0..NAMES_MAX + 100 {
            std::fs::create_dir(doomed.join(i.to_string())).expect("mkdir");
        }
        remove(root.path(), c"doomed").expect("removed");
        assert!(!doomed.exists());
    }

    #[test]
    fn a_mount_below_stops_the_removal_and_keeps_its_files() {
        assert!(rustix::process::geteuid().is_root(), "this test mounts: run it as root");
        let root = tempfile::tempdir().expect("tempdir");
        let (precious, doomed) = (root.path().join("precious"), root.path().join("doomed"));
        std::fs::create_dir_all(precious.join("src")).expect("mkdir");
        std::fs::write(precious.join("src/work"), "mine").expect("write");
        std::fs::create_dir_all(doomed.join("a/ws")).expect("mkdir");
        for point in [doomed.join("a/ws"), doomed.clone()] {
            rustix::mount::mount_bind(&precious, &point).expect("bind");
            let stopped = remove(root.path(), c"doomed").map_err(|e| e.raw_os_error());
            rustix::mount::unmount(&point, rustix::mount::UnmountFlags::DETACH).expect("umount");
            assert_eq!(stopped, Err(Some(libc::EXDEV)), "{point:?}");
            assert_eq!(std::fs::read_to_string(precious.join("src/work")).expect("still there"), "mine");
        }
        remove(root.path(), c"doomed").expect("removed");
    }
}
