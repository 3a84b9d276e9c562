//! Loop devices: attach an image file, find and free what is attached. Never touches a device whose
//! backing file is not below the directory that the caller names.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags};

// linux/loop.h
const LOOP_CLR_FD: libc::c_ulong = 0x4c01;
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const BLOCK_BYTES: u32 = 4096;

/// Others take free devices at the same time; each try takes another one.
const TAKE_TRIES_MAX: u32 = 64;
const DETACH_WAIT_MAX: Duration = Duration::from_secs(1);
const DETACH_POLL: Duration = Duration::from_millis(2);
const DEVICES_MAX: usize = 65_536;

#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

/// An attached device. It detaches by itself when the last user (this handle, then the mount) is gone.
pub(super) struct LoopDevice {
    pub(super) path: PathBuf,
    /// Held until the file system is mounted.
    pub(super) _hold: OwnedFd,
}

/// Attaches `image`, opened for reading and writing, to a free device with automatic detach.
pub(super) fn attach(image: BorrowedFd<'_>) -> io::Result<LoopDevice> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let control = rustix::fs::openat(CWD, "/dev/loop-control", flags, Mode::empty())?;
    for _ in 0..TAKE_TRIES_MAX {
        // SAFETY: an ioctl without an argument on an open descriptor.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = rustix::fs::openat(CWD, &path, flags, Mode::empty())?;
        match configure(&device, image) {
            Ok(()) => return Ok(LoopDevice { path, _hold: device }),
            // Somebody was faster.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

fn configure(device: &OwnedFd, image: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: plain integers and arrays: all zeroes is a valid value.
    let mut config: LoopConfig = unsafe { std::mem::zeroed() };
    config.fd = image.as_raw_fd() as u32;
    config.block_size = BLOCK_BYTES;
    // Not direct I/O: measured, it gains nothing here and makes fsync slower.
    config.info.flags = LO_FLAGS_AUTOCLEAR;
    // SAFETY: both descriptors are open, `config` is live and laid out as struct loop_config.
    let rc = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as _, &raw const config) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Devices whose backing file is at or below `dir`, deleted files included.
pub(super) fn backed_below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let Ok(devices) = std::fs::read_dir("/sys/block") else { return Ok(found) };
    for entry in devices.take(DEVICES_MAX) {
        let name = entry?.file_name();
        if !name.as_bytes().starts_with(b"loop") {
            continue;
        }
        let file = Path::new("/sys/block").join(&name).join("loop/backing_file");
        // No such file: nothing attached.
        let Ok(mut backing) = std::fs::read(file) else { continue };
        if backing.last() == Some(&b'\n') {
            backing.pop();
        }
        if Path::new(&OsString::from_vec(backing)).starts_with(dir) {
            found.push(Path::new("/dev").join(name));
        }
    }
    Ok(found)
}

/// Waits until no device is backed by a file below `dir`; frees those that nobody mounts. True when all
/// are gone.
pub(super) fn detached_below(dir: &Path) -> io::Result<bool> {
    let end = Instant::now() + DETACH_WAIT_MAX;
    let mut asked = false;
    loop {
        let left = backed_below(dir)?;
        if left.is_empty() {
            return Ok(true);
        }
        if Instant::now() >= end {
            return Ok(false);
        }
        std::thread::sleep(DETACH_POLL);
        if !asked {
            asked = true;
            left.iter().for_each(|device| clear(device));
        }
    }
}

/// Asks for a detach; for a device in use that means: when its last user is gone. The caller looks again.
fn clear(device: &Path) {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    if let Ok(fd) = rustix::fs::openat(CWD, device, flags, Mode::empty()) {
        // SAFETY: an ioctl without an argument on an open descriptor.
        unsafe { libc::ioctl(fd.as_raw_fd(), LOOP_CLR_FD as _, 0) };
    }
}
