//! Lays directories over each other (overlayfs), by descriptor: no path is resolved twice, and none is parsed out of
//! an option's text. Must never let a setuid bit or a device in such a mount mean anything, and never follow what an
//! upper directory says about renamed directories.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

/// What lies over what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layers {
    /// Directories that are only read, the topmost first.
    pub(super) lower: Vec<PathBuf>,
    /// Where what is written goes, and an empty directory beside it that the kernel needs. Without it nothing can be
    /// written.
    pub(super) upper: Option<(PathBuf, PathBuf)>,
}

/// Which step of making an overlay the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("no overlay: cannot {doing}: {source}")]
pub(super) struct OverlayError {
    doing: &'static str,
    source: io::Error,
}

fn step<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> OverlayError {
    move |source| OverlayError { doing, source: source.into() }
}

/// Whether this process can make overlays at all. A module that is not loaded yet is loaded by the question.
pub(super) fn supported() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("the daemon is not root".to_owned());
    }
    match rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC) {
        Ok(_) => Ok(()),
        Err(errno) => Err(format!("this kernel makes no overlay ({errno})")),
    }
}

/// Mounts `layers`, detached. `volatile`: nothing of the upper directory is written to the disk before it is read by
/// somebody or kept, so taking it down costs no time.
pub(super) fn mount(layers: &Layers) -> Result<OwnedFd, OverlayError> {
    let fs = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC);
    let fs = fs.map_err(step("open the file system"))?;
    let mut open = Vec::new();
    let mut by_fd = |path: &Path| -> Result<String, OverlayError> {
        let fd = open_dir(path).map_err(step("open a layer"))?;
        // Short, whatever the path is, and exactly the directory that was opened.
        let name = format!("/proc/self/fd/{}", fd.as_raw_fd());
        open.push(fd);
        Ok(name)
    };
    let lower: Result<Vec<String>, OverlayError> = layers.lower.iter().map(|dir| by_fd(dir)).collect();
    let upper = layers.upper.as_ref().map(|(upper, work)| Ok((by_fd(upper)?, by_fd(work)?))).transpose()?;
    let set = |key: &str, value: &str| {
        rustix::mount::fsconfig_set_string(fs.as_fd(), key, value).map_err(step("set an option"))
    };
    set("source", "hotcell")?;
    set("lowerdir", &lower?.join(":"))?;
    if let Some((upper, work)) = &upper {
        set("upperdir", upper)?;
        set("workdir", work)?;
        rustix::mount::fsconfig_set_flag(fs.as_fd(), "volatile").map_err(step("set an option"))?;
    }
    for (key, value) in [("redirect_dir", "off"), ("metacopy", "off"), ("index", "off"), ("xino", "off")] {
        set(key, value)?;
    }
    rustix::mount::fsconfig_create(fs.as_fd()).map_err(step("make it"))?;
    let mut flags = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    if layers.upper.is_none() {
        flags |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    rustix::mount::fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags).map_err(step("mount it"))
}

pub(super) fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)?)
}

/// Gives `dir` the owner and mode that `like` has, and its times: what lies on top in an overlay is what is seen.
pub(super) fn look_like(dir: BorrowedFd<'_>, like: &rustix::fs::Stat) -> io::Result<()> {
    use rustix::fs::{Gid, Timespec, Timestamps, Uid};
    let (uid, gid) = (Uid::from_raw(like.st_uid), Gid::from_raw(like.st_gid));
    rustix::fs::fchown(dir, Some(uid), Some(gid))?;
    // After the owner: a change of it takes setgid away.
    rustix::fs::fchmod(dir, Mode::from_raw_mode(like.st_mode & 0o7777))?;
    let at = |sec: i64, nsec: u64| Timespec { tv_sec: sec, tv_nsec: nsec as _ };
    let times = Timestamps {
        last_access: at(like.st_atime, like.st_atime_nsec),
        last_modification: at(like.st_mtime, like.st_mtime_nsec),
    };
    Ok(rustix::fs::futimens(dir, &times)?)
}
