//! Copies a workspace file by file, where no overlay can be had: by reflink where the file system shares blocks, else
//! the bytes. It must never follow a link, leave the workspace or enter another mount in it, copy what is hidden, or
//! go on beyond its limits. Modes, times and links are kept; hard links become files of their own.

use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid,
};
use rustix::io::Errno;

use super::mask::Mask;
use super::{WorkspaceError, io_at, overlay, remove};

/// Directories below each other.
const DEPTH_MAX: usize = 200;
/// Bytes copied before the clock is looked at.
const STEP_BYTES: u64 = 32 << 20;

/// What a copy may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyLimits {
    /// Bytes of all files together.
    pub bytes_max: u64,
    /// Files, directories and links.
    pub entries_max: u64,
    /// How long it may take.
    pub time_max: Duration,
}

/// What was copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Done {
    bytes: u64,
    entries: u64,
    reflinked: u64,
    left_out: u64,
    unreadable: u64,
}

impl Done {
    /// What the user should know.
    pub(super) fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.reflinked > 0 {
            notes.push(format!("{} files share their blocks with the original", self.reflinked));
        }
        if self.left_out > 0 {
            notes.push(format!("{} devices of the workspace are not in the copy", self.left_out));
        }
        if self.unreadable > 0 {
            notes.push(format!("{} files that you cannot read are empty in the copy", self.unreadable));
        }
        notes
    }
}

/// Copies the directory `from`, whose name for messages is `source`, to `target`, which is made. Blocks.
pub(super) fn copy_tree(
    from: BorrowedFd<'_>,
    source: &Path,
    target: &Path,
    mask: &Mask,
    limits: &CopyLimits,
) -> Result<Done, WorkspaceError> {
    rustix::fs::mkdir(target, Mode::RWXU).map_err(io_at("make", target))?;
    let to = overlay::open_dir(target).map_err(io_at("open", target))?;
    let mut copy = Copy {
        hidden: mask.hidden.iter().map(|hidden| hidden.path.as_bytes()).collect(),
        replaced: mask.replaced.iter().map(|r| (r.path.as_bytes(), r.content.as_slice())).collect(),
        limits,
        end: Instant::now() + limits.time_max,
        owners: rustix::process::geteuid().is_root(),
        reflinks: true,
        done: Done::default(),
        path: Vec::new(),
    };
    let copied = copy.directory(from, to.as_fd(), 0).and_then(|()| copy.made(to.as_fd(), mask));
    copied.map_err(|stop| match stop {
        Stop::Limit(why) => WorkspaceError::Copy { path: source.to_owned(), why },
        Stop::Io(doing, error) => {
            let below = Path::new(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(&copy.path));
            io_at(doing, &source.join(below))(error)
        }
    })?;
    Ok(copy.done)
}

enum Stop {
    Limit(String),
    Io(&'static str, io::Error),
}

fn failed<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Stop {
    move |error| Stop::Io(doing, error.into())
}

struct Copy<'a> {
    hidden: HashSet<&'a [u8]>,
    replaced: HashMap<&'a [u8], &'a [u8]>,
    limits: &'a CopyLimits,
    end: Instant,
    owners: bool,
    reflinks: bool,
    done: Done,
    /// Where we are, below the workspace.
    path: Vec<u8>,
}

impl Copy<'_> {
    fn directory(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: usize) -> Result<(), Stop> {
        if depth > DEPTH_MAX {
            return Err(Stop::Limit(format!("has directories deeper than {DEPTH_MAX}")));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let own = rustix::fs::openat(to, c".", flags, Mode::empty()).map_err(failed("open the copy of"))?;
        let stat = rustix::fs::fstat(from).map_err(failed("look at"))?;
        match rustix::fs::openat(from, c".", flags, Mode::empty()) {
            Ok(listed) => {
                for name in names(&listed).map_err(failed("list"))? {
                    let length = self.path.len();
                    if length > 0 {
                        self.path.push(b'/');
                    }
                    self.path.extend_from_slice(name.to_bytes());
                    self.entry(listed.as_fd(), own.as_fd(), &name, depth)?;
                    self.path.truncate(length);
                }
            }
            // Nobody in the cell could look into it either.
            Err(Errno::ACCESS | Errno::PERM) => self.done.unreadable += 1,
            Err(errno) => return Err(failed("open")(errno)),
        }
        self.look_like(own.as_fd(), &stat).map_err(failed("give owner and mode to the copy of"))
    }

    fn entry(
        &mut self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        name: &CStr,
        depth: usize,
    ) -> Result<(), Stop> {
        if self.hidden.contains(self.path.as_slice()) {
            return Ok(());
        }
        let stat = match rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            // Its user is at work.
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(failed("look at")(errno)),
        };
        self.count(&stat)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                rustix::fs::mkdirat(to, name, Mode::RWXU).map_err(failed("make the copy of"))?;
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let open = |at| rustix::fs::openat2(at, name, flags, Mode::empty(), resolve());
                match open(from) {
                    Ok(below) => {
                        let copy = open(to).map_err(failed("open the copy of"))?;
                        self.directory(below.as_fd(), copy.as_fd(), depth + 1)
                    }
                    // Something is mounted there: not part of the workspace. Or it has just gone.
                    Err(Errno::XDEV | Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(()),
                    Err(errno) => Err(failed("open")(errno)),
                }
            }
            FileType::RegularFile => self.file(from, to, name, &stat),
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(from, name, Vec::new()).map_err(failed("read"))?;
                rustix::fs::symlinkat(&target, to, name).map_err(failed("make the copy of"))?;
                self.name_looks_like(to, name, &stat)
            }
            kind @ (FileType::Fifo | FileType::Socket) => {
                let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
                rustix::fs::mknodat(to, name, kind, mode, 0).map_err(failed("make the copy of"))?;
                self.name_looks_like(to, name, &stat)
            }
            FileType::CharacterDevice | FileType::BlockDevice | FileType::Unknown => {
                self.done.left_out += 1;
                Ok(())
            }
        }
    }

    fn count(&mut self, stat: &Stat) -> Result<(), Stop> {
        self.done.entries += 1;
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            self.done.bytes += stat.st_size.unsigned_abs();
        }
        let CopyLimits { bytes_max, entries_max, .. } = *self.limits;
        if self.done.bytes > bytes_max {
            return Err(Stop::Limit(format!("holds more than the {bytes_max} bytes that its copy may have")));
        }
        if self.done.entries > entries_max {
            return Err(Stop::Limit(format!(
                "holds more than the {entries_max} files that its copy may have"
            )));
        }
        self.in_time()
    }

    fn in_time(&self) -> Result<(), Stop> {
        if Instant::now() < self.end {
            return Ok(());
        }
        Err(Stop::Limit(format!("cannot be copied within {} s", self.limits.time_max.as_secs())))
    }

    fn file(
        &mut self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        name: &CStr,
        stat: &Stat,
    ) -> Result<(), Stop> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let out = rustix::fs::openat(to, name, flags, Mode::RUSR | Mode::WUSR);
        let mut out = File::from(out.map_err(failed("make the copy of"))?);
        if let Some(content) = self.replaced.get(self.path.as_slice()) {
            out.write_all(content).map_err(failed("write the copy of"))?;
            return self.look_like(out.as_fd(), stat).map_err(failed("give owner and mode to the copy of"));
        }
        // NONBLOCK: should it have become a FIFO meanwhile.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        match rustix::fs::openat2(from, name, flags, Mode::empty(), resolve()) {
            Ok(source) => self.content(File::from(source), &mut out)?,
            Err(Errno::ACCESS | Errno::PERM) => {
                // As long as the original, so that it does not look changed.
                out.set_len(stat.st_size.unsigned_abs()).map_err(failed("write the copy of"))?;
                self.done.unreadable += 1;
            }
            Err(Errno::NOENT | Errno::LOOP | Errno::XDEV) => {}
            Err(errno) => return Err(failed("open")(errno)),
        }
        self.look_like(out.as_fd(), stat).map_err(failed("give owner and mode to the copy of"))
    }

    /// Files of ours that the workspace has not, where it has their directories.
    fn made(&mut self, to: BorrowedFd<'_>, mask: &Mask) -> Result<(), Stop> {
        for replaced in mask.replaced.iter().filter(|replaced| replaced.made) {
            self.path = replaced.path.as_bytes().to_vec();
            let up = replaced.path.parent();
            let up = up.as_ref().map_or(Path::new("."), |up| up.as_path());
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let dir = match rustix::fs::openat2(to, up, flags, Mode::empty(), resolve()) {
                Ok(dir) => dir,
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(errno) => return Err(failed("open the copy of")(errno)),
            };
            let mut stat = rustix::fs::fstat(&dir).map_err(failed("look at"))?;
            stat.st_mode = FileType::RegularFile.as_raw_mode() | super::mask::MADE_MODE;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = match rustix::fs::openat(&dir, replaced.path.name(), flags, Mode::RUSR | Mode::WUSR) {
                Ok(file) => file,
                // There was one: it was replaced.
                Err(Errno::EXIST) => continue,
                Err(errno) => return Err(failed("make the copy of")(errno)),
            };
            let mut file = File::from(file);
            file.write_all(&replaced.content).map_err(failed("write the copy of"))?;
            self.look_like(file.as_fd(), &stat).map_err(failed("give owner and mode to the copy of"))?;
            rustix::fs::futimens(&dir, &times(&stat)).map_err(failed("give times to the copy of"))?;
        }
        Ok(())
    }

    fn content(&mut self, source: File, out: &mut File) -> Result<(), Stop> {
        if self.reflinks {
            match rustix::fs::ioctl_ficlone(&*out, &source) {
                Ok(()) => {
                    self.done.reflinked += 1;
                    return Ok(());
                }
                // Not on this file system, or between these two: not asked again.
                Err(_) => self.reflinks = false,
            }
        }
        let mut left = self.limits.bytes_max;
        loop {
            let step = STEP_BYTES.min(left.saturating_add(1));
            let copied = io::copy(&mut (&source).take(step), out).map_err(failed("copy"))?;
            if copied == 0 {
                return Ok(());
            }
            left = left.checked_sub(copied).ok_or_else(|| Stop::Limit("grows while it is copied".into()))?;
            self.in_time()?;
        }
    }

    fn look_like(&self, copy: BorrowedFd<'_>, stat: &Stat) -> io::Result<()> {
        if self.owners {
            return overlay::look_like(copy, stat);
        }
        rustix::fs::fchmod(copy, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
        Ok(rustix::fs::futimens(copy, &times(stat))?)
    }

    /// The same of what cannot be opened.
    fn name_looks_like(&self, to: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> Result<(), Stop> {
        let nofollow = AtFlags::SYMLINK_NOFOLLOW;
        if self.owners {
            let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
            rustix::fs::chownat(to, name, Some(uid), Some(gid), nofollow)
                .map_err(failed("give the owner to the copy of"))?;
        }
        rustix::fs::utimensat(to, name, &times(stat), nofollow).map_err(failed("give times to the copy of"))
    }
}

fn times(stat: &Stat) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: stat.st_atime, tv_nsec: stat.st_atime_nsec as _ },
        last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ },
    }
}

fn names(dir: &OwnedFd) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

fn resolve() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV
}

/// Removes `name` in `dir`, a directory of the daemon's own. Nothing there is fine. Blocks.
pub(super) fn remove_below(dir: &Path, name: &str) -> Result<(), WorkspaceError> {
    let at = dir.join(name);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let parent = rustix::fs::openat(CWD, dir, flags, Mode::empty()).map_err(io_at("open", dir))?;
    let name = CString::new(name).map_err(|e| io_at("remove", &at)(io::Error::other(e)))?;
    remove::remove_at(parent.as_fd(), &name).map_err(io_at("remove", &at))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::path::PathBuf;

    use super::*;
    use crate::change::TreePath;
    use crate::workspace::mask::{Hidden, Replaced};

    const LIMITS: CopyLimits =
        CopyLimits { bytes_max: 1 << 20, entries_max: 100, time_max: Duration::from_secs(60) };

    fn tree() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("directory");
        let from = dir.path().join("from");
        std::fs::create_dir_all(from.join("src/deep")).expect("made");
        std::fs::write(from.join("src/a.rs"), "fn a() {}").expect("written");
        std::fs::set_permissions(from.join("src/a.rs"), std::fs::Permissions::from_mode(0o751))
            .expect("mode");
        std::fs::write(from.join(".env"), "SECRET=1").expect("written");
        std::fs::create_dir(from.join("keys")).expect("made");
        std::fs::write(from.join("keys/k"), "SECRET").expect("written");
        symlink("/etc/passwd", from.join("link")).expect("link");
        std::fs::set_permissions(from.join("src/deep"), std::fs::Permissions::from_mode(0o2555))
            .expect("mode");
        (dir, from)
    }

    fn path(text: &str) -> TreePath {
        TreePath::new(text).expect("path")
    }

    #[test]
    fn a_copy_has_modes_times_and_links_and_nothing_that_is_hidden() {
        let (dir, from) = tree();
        let mask = Mask {
            hidden: vec![
                Hidden { path: path(".env"), is_dir: false },
                Hidden { path: path("keys"), is_dir: true },
            ],
            replaced: vec![
                Replaced { path: path("src/a.rs"), content: b"masked".to_vec(), made: false },
                Replaced { path: path("src/deep/new"), content: b"made".to_vec(), made: true },
                Replaced { path: path("nowhere/new"), content: b"made".to_vec(), made: true },
                Replaced { path: path("src/none"), content: b"none".to_vec(), made: false },
            ],
        };
        let to = dir.path().join("to");
        let dir_fd = overlay::open_dir(&from).expect("open");
        copy_tree(dir_fd.as_fd(), &from, &to, &mask, &LIMITS).map(|_| ()).expect("copied");
        let meta = |at: &Path, name: &str| std::fs::symlink_metadata(at.join(name)).expect("there");
        for name in ["src", "src/a.rs", "src/deep", "link", ""] {
            let (a, b) = (meta(&from, name), meta(&to, name));
            let of = |m: &std::fs::Metadata| (m.mode(), m.uid(), m.gid(), m.mtime(), m.mtime_nsec());
            assert_eq!(of(&a), of(&b), "{name}");
        }
        assert_eq!(std::fs::read_to_string(to.join("src/a.rs")).expect("read"), "masked");
        assert_eq!(std::fs::read_to_string(to.join("src/deep/new")).expect("read"), "made");
        assert!(!to.join("nowhere").exists() && !to.join("src/none").exists());
        assert_eq!(std::fs::read_link(to.join("link")).expect("link"), Path::new("/etc/passwd"));
        assert!(!to.join(".env").exists() && !to.join("keys").exists());
        assert_eq!(std::fs::read_to_string(from.join("src/a.rs")).expect("read"), "fn a() {}");
    }

    #[test]
    fn a_copy_stops_at_its_limits_and_says_which() {
        let (dir, from) = tree();
        let mask = Mask::default();
        for (n, limits, words) in [
            (0, CopyLimits { bytes_max: 10, ..LIMITS }, "10 bytes"),
            (1, CopyLimits { entries_max: 3, ..LIMITS }, "3 files"),
            (2, CopyLimits { time_max: Duration::ZERO, ..LIMITS }, "within 0 s"),
        ] {
            let (to, fd) = (dir.path().join(n.to_string()), overlay::open_dir(&from).expect("open"));
            let error = copy_tree(fd.as_fd(), &from, &to, &mask, &limits);
            let error = error.map(|_| ()).expect_err("a limit").to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
