//! What is mounted where, and unmounting that is proven. Never unmounts by a path that goes through a
//! symlink, and never believes an unmount without looking again.

use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::UnmountFlags;

const BUSY_TRIES_MAX: u32 = 10;
const BUSY_WAIT: Duration = Duration::from_millis(20);
/// Mounts stacked on one path that are taken off before giving up.
const STACKED_MAX: u32 = 16;
const OVERLAY: &str = "overlay";

/// One line of mountinfo, as far as we need it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) id: u64,
    pub(super) point: PathBuf,
    pub(super) fs_type: String,
}

/// How an unmount ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unmounted {
    /// Nothing was mounted.
    Nothing,
    /// Gone.
    Clean,
    /// Out of our tree, but somebody still holds it: gone when they are.
    Detached,
}

/// All mounts of this process's mount namespace.
pub(super) fn all() -> io::Result<Vec<Mount>> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    Ok(text.split(|b| *b == b'\n').filter_map(parse_line).collect())
}

/// Mounts at `dir` or below it, in the order in which they can be taken off.
pub(super) fn at_or_below(dir: &Path) -> io::Result<Vec<Mount>> {
    let mut found: Vec<Mount> = all()?.into_iter().filter(|m| m.point.starts_with(dir)).collect();
    in_order(&mut found);
    Ok(found)
}

/// Overlays with all that is mounted in them first, since they hold file systems that are mounted elsewhere; then the
/// deepest and latest first.
fn in_order(mounts: &mut [Mount]) {
    let is_overlay = |m: &Mount| m.fs_type == OVERLAY;
    let overlays: Vec<PathBuf> = mounts.iter().filter(|m| is_overlay(m)).map(|m| m.point.clone()).collect();
    let holds = |m: &Mount| overlays.iter().any(|point| m.point.starts_with(point));
    mounts.sort_by_key(|m| std::cmp::Reverse((holds(m), m.point.components().count(), m.id)));
}

/// Takes off the overlays that are mounted in `dir` itself: what they hold can be taken off then.
pub(super) fn unmount_overlays(dir: &Path) -> io::Result<()> {
    let own = |m: &Mount| m.fs_type == OVERLAY && m.point.parent() == Some(dir);
    for mount in all()?.into_iter().filter(own) {
        unmount(&mount.point)?;
    }
    Ok(())
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let point = unescape(fields.nth(3)?);
    let fs_type = fields.skip_while(|f| *f != b"-").nth(1)?;
    Some(Mount { id, point, fs_type: String::from_utf8_lossy(fs_type).into_owned() })
}

/// mountinfo writes space, tab, newline and backslash as `\ooo`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] if *first == b'\\' => {
                Some((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'))
            }
            _ => None,
        };
        out.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

/// Unmounts everything that is mounted at exactly `point` (an absolute path without symlinks), and
/// proves it. Waits up to 200 ms for a busy mount, then detaches it.
pub(super) fn unmount(point: &Path) -> io::Result<Unmounted> {
    let mut ended = Unmounted::Nothing;
    for _ in 0..STACKED_MAX {
        if !all()?.iter().any(|m| m.point == point) {
            return Ok(ended);
        }
        let one = unmount_once(point)?;
        ended = if ended == Unmounted::Detached { ended } else { one };
    }
    Err(io::Error::from(Errno::BUSY))
}

fn unmount_once(point: &Path) -> io::Result<Unmounted> {
    for attempt in 0..BUSY_TRIES_MAX {
        if attempt > 0 {
            std::thread::sleep(BUSY_WAIT);
        }
        match rustix::mount::unmount(point, UnmountFlags::NOFOLLOW) {
            Ok(()) => return Ok(Unmounted::Clean),
            Err(Errno::BUSY) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    rustix::mount::unmount(point, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)?;
    Ok(Unmounted::Detached)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines_are_read_with_escapes_and_optional_fields() {
        let line = br"42 27 254:0 /tmp/a /mnt/a\040b\134c rw,relatime shared:1 master:2 - ext4 /dev/vda rw";
        let mount = parse_line(line).expect("a line");
        assert_eq!((mount.id, mount.fs_type.as_str()), (42, "ext4"));
        assert_eq!(mount.point, Path::new(r"/mnt/a b\c"));
        let plain = parse_line(b"23 27 0:22 / /sys rw - sysfs sysfs rw").expect("a line");
        assert_eq!((plain.point.as_path(), plain.fs_type.as_str()), (Path::new("/sys"), "sysfs"));
        for junk in ["", "42", "x y z", "42 27 254:0 / /mnt rw"] {
            assert_eq!(parse_line(junk.as_bytes()), None, "{junk}");
        }
    }

    #[test]
    fn what_holds_other_mounts_is_taken_off_before_them() {
        let mount =
            |id, point: &str, fs_type: &str| Mount { id, point: point.into(), fs_type: fs_type.into() };
        let mut mounts = [
            mount(9, "/c/layers/lower", "ext4"),
            mount(8, "/c/scratch", "ext4"),
            mount(2, "/c/ws", "overlay"),
            mount(1, "/c/ws/late", "tmpfs"),
        ];
        in_order(&mut mounts);
        assert_eq!(mounts.map(|m| m.id), [1, 2, 9, 8]);
    }

    #[test]
    fn escapes_that_are_none_stay() {
        assert_eq!(unescape(br"/a\04"), Path::new(r"/a\04"));
        assert_eq!(unescape(br"/a\999"), Path::new(r"/a\999"));
        assert_eq!(unescape(br"/a\011\012"), Path::new("/a\t\n"));
    }
}
