//! The image files of scratch spaces: an empty ext4 of each size, formatted once; copies of it; and the check of one
//! that was kept. Must never wait for a program of e2fsprogs without limit.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::scratch::{Failure, ScratchPlan, io_at};

const E2FS_TIME_MAX: Duration = Duration::from_secs(30);
const E2FS_POLL: Duration = Duration::from_millis(1);

/// The formatted template of this size, made if it is missing.
pub(super) fn template(plan: &ScratchPlan) -> Result<PathBuf, Failure> {
    let dir = &plan.template_dir;
    let path = dir.join(format!("ext4-1-{}-{}.img", plan.bytes_max, plan.inodes_max));
    if path.exists() {
        return Ok(path);
    }
    let broken = |doing, at: &Path, e: io::Error| Failure::Broken(io_at(doing, at)(e));
    std::fs::create_dir_all(dir).map_err(|e| broken("make", dir, e))?;
    let Some(mkfs) = program("mkfs.ext4") else {
        return Err(Failure::Unsupported("no mkfs.ext4 (package e2fsprogs)".to_owned()));
    };
    let file = tempfile::NamedTempFile::new_in(dir).map_err(|e| broken("make a file in", dir, e))?;
    file.as_file().set_len(plan.bytes_max).map_err(|e| broken("size", file.path(), e))?;
    format_image(&mkfs, file.path(), plan.inodes_max)?;
    file.as_file().sync_all().map_err(|e| broken("write", file.path(), e))?;
    // Two daemons of one state directory do not exist; if they did, both files are the same.
    file.persist(&path).map_err(|e| broken("keep", &path, e.error))?;
    Ok(path)
}

fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/sbin", "/usr/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(usual).map(|d| d.join(name)).find(|p| p.is_file())
}

fn format_image(mkfs: &Path, image: &Path, inodes: u64) -> Result<(), Failure> {
    let mut command = Command::new(mkfs);
    command
        .args(["-q", "-F", "-b", "4096", "-I", "256", "-m", "0", "-N", &inodes.to_string()])
        // No journal: a kept scratch is checked instead. Few superblock copies: fewer extents to copy.
        .args(["-O", "^has_journal,^resize_inode,sparse_super2"])
        .args(["-E", "lazy_itable_init=1,nodiscard,num_backup_sb=0"])
        .arg(image);
    let status = run(&mut command).map_err(|e| Failure::Broken(io_at("format", image)(e)))?;
    if status.success() {
        return Ok(());
    }
    // An old e2fsprogs does not know the options: fall back rather than refuse every job.
    Err(Failure::Unsupported(format!("mkfs.ext4 failed ({status})")))
}

/// Checks a kept image, and repairs what needs no decision: its host may have gone down while it was mounted.
pub(super) fn check_image(image: &Path) -> Result<(), Failure> {
    let Some(fsck) = program("e2fsck") else {
        return Err(Failure::Unsupported("no e2fsck (package e2fsprogs)".to_owned()));
    };
    let checked = run(Command::new(fsck).arg("-p").arg(image));
    let status = checked.map_err(|e| Failure::Broken(io_at("check", image)(e)))?;
    // 1: errors were repaired.
    match status.code() {
        Some(0 | 1) => Ok(()),
        _ => Err(Failure::Unsupported(format!("its file system is damaged ({status})"))),
    }
}

/// Runs a program of e2fsprogs, within its time limit.
fn run(command: &mut Command) -> io::Result<std::process::ExitStatus> {
    let command = command.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn()?;
    let end = Instant::now() + E2FS_TIME_MAX;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= end {
            child.kill()?;
            child.wait()?;
            return Err(io::Error::from(io::ErrorKind::TimedOut));
        }
        std::thread::sleep(E2FS_POLL);
    }
}

/// Copies the data extents of `from` (tens of kilobytes) into a new file of `bytes` bytes.
pub(super) fn copy_sparse(from: &Path, to: &Path, bytes: u64) -> io::Result<OwnedFd> {
    let source = rustix::fs::openat(CWD, from, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let image = rustix::fs::openat(CWD, to, flags, Mode::RUSR | Mode::WUSR)?;
    rustix::fs::ftruncate(&image, bytes)?;
    let mut buffer = vec![0_u8; 64 * 1024];
    let mut at = 0;
    loop {
        let start = match rustix::fs::seek(&source, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(image),
            Err(errno) => return Err(errno.into()),
        };
        let end = rustix::fs::seek(&source, SeekFrom::Hole(start))?;
        at = start;
        while at < end {
            let want = buffer.len().min((end - at) as usize);
            let got = rustix::io::pread(&source, &mut buffer[..want], at)?;
            if got == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
            write_all_at(&image, &buffer[..got], at)?;
            at += got as u64;
        }
    }
}

fn write_all_at(file: &OwnedFd, mut bytes: &[u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let n = rustix::io::pwrite(file, bytes, at)?;
        if n == 0 {
            return Err(io::Error::from(io::ErrorKind::WriteZero));
        }
        bytes = &bytes[n..];
        at += n as u64;
    }
    Ok(())
}
