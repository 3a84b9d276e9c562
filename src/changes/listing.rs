//! What is in a workspace before its job: kinds, modes, sizes and times of every path, no contents. The walk goes by
//! descriptors below one directory: it must never follow a link, cross a mount, open anything but directories, or go
//! on without limit.

mod stored;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, ResolveFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;

use crate::change::{BlobId, Node, Raw, Special, TreePath};

pub use stored::StoredError;

const BUFFER_BYTES: usize = 64 << 10;
/// Entries between two looks at the clock.
const CLOCK_EVERY: usize = 512;

/// How far a walk goes.
#[derive(Debug, Clone)]
pub struct ListLimits {
    /// Most paths.
    pub entries_max: usize,
    /// Deepest path, in parts.
    pub depth_max: usize,
    /// Longest time.
    pub time_max: Duration,
}

impl Default for ListLimits {
    fn default() -> Self {
        Self { entries_max: 2_000_000, depth_max: 1024, time_max: Duration::from_secs(120) }
    }
}

/// Why a tree was not listed.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// More paths than agreed.
    #[error("it has more than {limit} entries: name a smaller directory, or raise the limit")]
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// Deeper than agreed.
    #[error("{path:?} lies deeper than {limit} directories")]
    TooDeep {
        /// The beginning of the path.
        path: String,
        /// The limit, in parts.
        limit: usize,
    },
    /// Longer than agreed.
    #[error("it could not be listed within {limit_ms} ms")]
    TooSlow {
        /// The limit.
        limit_ms: u64,
    },
    /// The kernel said no at the top.
    #[error("it cannot be listed: {0}")]
    Io(#[from] std::io::Error),
}

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link.
    Symlink {
        /// Where it points.
        target: Raw,
    },
    /// Anything else.
    Special(Special),
}

/// One path as it was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Its kind.
    pub what: What,
    /// The twelve permission bits.
    pub mode: u32,
    /// Length in bytes; 0 for what is no file.
    pub bytes: u64,
    /// Last change of the content, in nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Last change of content or metadata, which nobody can set, in nanoseconds since 1970.
    pub ctime_ns: i64,
    /// The inode's number.
    pub ino: u64,
}

impl Seen {
    /// As a change set names it.
    pub fn node(&self, blob: Option<BlobId>) -> Node {
        match &self.what {
            What::File => Node::File { mode: self.mode, bytes: self.bytes, blob },
            What::Dir => Node::Dir { mode: self.mode },
            What::Symlink { target } => Node::Symlink { target: target.clone() },
            What::Special(what) => Node::Special { what: *what },
        }
    }

    /// Whether `now`, seen later at the same path, is still the same: for a file nobody wrote it, for the rest kind,
    /// mode and target.
    pub fn still(&self, now: &Self) -> bool {
        match (&self.what, &now.what) {
            (What::File, What::File) => self == now,
            (What::Dir, What::Dir) => self.mode == now.mode,
            (was, is) => was == is,
        }
    }

    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        matches!(self.what, What::Dir)
    }
}

/// A listed tree, by the bytes of its paths. Its top is not in it.
#[derive(Debug, Clone, Default)]
pub struct Listing {
    entries: Vec<(TreePath, Seen)>,
    /// Directories whose content could not be seen.
    unreadable: Vec<TreePath>,
    /// Where something else is mounted; what lies below was not looked at.
    mounts: Vec<TreePath>,
    digest: OnceLock<[u8; 32]>,
}

impl Listing {
    /// What is at `path`.
    pub fn get(&self, path: &TreePath) -> Option<&Seen> {
        let at = self.entries.binary_search_by(|(other, _)| other.cmp(path)).ok()?;
        Some(&self.entries[at].1)
    }

    /// All paths, sorted by their bytes.
    pub fn iter(&self) -> impl Iterator<Item = (&TreePath, &Seen)> {
        self.entries.iter().map(|(path, seen)| (path, seen))
    }

    /// What lies below `path`, without itself.
    pub fn below(&self, path: &TreePath) -> &[(TreePath, Seen)] {
        let top = [path.as_bytes(), b"/"].concat();
        let from = self.entries.partition_point(|(other, _)| other.as_bytes() < &top[..]);
        let rest = &self.entries[from..];
        &rest[..rest.partition_point(|(other, _)| other.as_bytes().starts_with(&top))]
    }

    /// Paths.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Nothing at all.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Directories whose content could not be seen.
    pub fn unreadable(&self) -> &[TreePath] {
        &self.unreadable
    }

    /// Where something else is mounted.
    pub fn mounts(&self) -> &[TreePath] {
        &self.mounts
    }

    /// Whether `path` lies where the listing could not look.
    pub fn is_blind(&self, path: &TreePath) -> bool {
        self.unreadable.iter().chain(&self.mounts).any(|top| path.is_at_or_below(top) && path != top)
    }
}

/// Lists what is below `dir`, with the rights of the calling thread. A directory that cannot be opened is noted; what
/// goes away meanwhile is left out.
///
/// # Errors
/// [`ListError`].
pub fn list(dir: BorrowedFd<'_>, limits: &ListLimits) -> Result<Listing, ListError> {
    let mut walk = Walk { limits, until: Instant::now() + limits.time_max, listing: Listing::default() };
    let top = open_dir(dir, b".").map_err(std::io::Error::from)?;
    let mut dirs: Vec<TreePath> = Vec::new();
    walk.enter(&top, None, &mut dirs)?;
    while let Some(path) = dirs.pop() {
        match open_dir(dir, path.as_bytes()) {
            Ok(inner) => walk.enter(&inner, Some(&path), &mut dirs)?,
            Err(Errno::XDEV) => walk.listing.mounts.push(path),
            Err(Errno::ACCESS | Errno::PERM) => walk.listing.unreadable.push(path),
            // Gone, or something else by now.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
            Err(other) => return Err(std::io::Error::from(other).into()),
        }
    }
    let mut listing = walk.listing;
    listing.entries.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
    listing.unreadable.sort_unstable();
    listing.mounts.sort_unstable();
    Ok(listing)
}

struct Walk<'a> {
    limits: &'a ListLimits,
    until: Instant,
    listing: Listing,
}

impl Walk<'_> {
    fn enter(
        &mut self,
        dir: &OwnedFd,
        path: Option<&TreePath>,
        dirs: &mut Vec<TreePath>,
    ) -> Result<(), ListError> {
        let mut buffer = Vec::with_capacity(BUFFER_BYTES);
        let mut names = RawDir::new(dir, buffer.spare_capacity_mut());
        let first = self.listing.entries.len();
        while let Some(entry) = names.next() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(Errno::ACCESS | Errno::PERM | Errno::IO | Errno::NOENT) => {
                    self.listing.unreadable.extend(path.cloned());
                    return Ok(());
                }
                Err(other) => return Err(std::io::Error::from(other).into()),
            };
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let full = match path {
                Some(above) => above.join(name.to_bytes()),
                None => TreePath::new(name.to_bytes()),
            };
            let too_deep = |_| ListError::TooDeep { path: shown(path), limit: self.limits.depth_max };
            let full = full.map_err(too_deep)?;
            if self.listing.entries.len().is_multiple_of(CLOCK_EVERY) && Instant::now() > self.until {
                let limit_ms = u64::try_from(self.limits.time_max.as_millis()).unwrap_or(u64::MAX);
                return Err(ListError::TooSlow { limit_ms });
            }
            let Some((seen, mount)) = look(dir.as_fd(), name).map_err(std::io::Error::from)? else {
                continue;
            };
            if self.listing.entries.len() >= self.limits.entries_max {
                return Err(ListError::TooMany { limit: self.limits.entries_max });
            }
            if mount {
                self.listing.mounts.push(full.clone());
            } else if seen.is_dir() {
                dirs.push(full.clone());
            }
            self.listing.entries.push((full, seen));
        }
        let depth = path.map_or(0, |path| path.parts().count()) + 1;
        if self.listing.entries.len() > first && depth > self.limits.depth_max {
            return Err(ListError::TooDeep { path: shown(path), limit: self.limits.depth_max });
        }
        Ok(())
    }
}

fn shown(path: Option<&TreePath>) -> String {
    path.map(|path| path.to_string().chars().take(80).collect()).unwrap_or_default()
}

/// Never through a link, never onto another mount.
pub(super) const RESOLVE: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// Opens a directory below `root`.
pub(super) fn open_dir(root: BorrowedFd<'_>, path: &[u8]) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat2(root, path, flags, Mode::empty(), RESOLVE)
}

/// What `name` is in `dir` and whether something is mounted there; none where it is gone. An empty name is `dir`.
pub(super) fn look(dir: BorrowedFd<'_>, name: &std::ffi::CStr) -> rustix::io::Result<Option<(Seen, bool)>> {
    let want = StatxFlags::TYPE
        | StatxFlags::MODE
        | StatxFlags::SIZE
        | StatxFlags::INO
        | StatxFlags::MTIME
        | StatxFlags::CTIME;
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::EMPTY_PATH;
    let stat = match rustix::fs::statx(dir, name, flags, want) {
        Ok(stat) => stat,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        Err(other) => return Err(other),
    };
    let kind = FileType::from_raw_mode(stat.stx_mode.into());
    let what = match kind {
        FileType::RegularFile => What::File,
        FileType::Directory => What::Dir,
        FileType::Symlink => match rustix::fs::readlinkat(dir, name, Vec::new()) {
            Ok(target) => What::Symlink { target: Raw(target.into_bytes()) },
            // Another thing by now.
            Err(Errno::NOENT | Errno::INVAL) => return Ok(None),
            Err(other) => return Err(other),
        },
        FileType::Fifo => What::Special(Special::Fifo),
        FileType::Socket => What::Special(Special::Socket),
        FileType::CharacterDevice | FileType::BlockDevice | FileType::Unknown => {
            What::Special(Special::Device)
        }
    };
    let ns = |at: rustix::fs::StatxTimestamp| {
        at.tv_sec.saturating_mul(1_000_000_000).saturating_add(at.tv_nsec.into())
    };
    let seen = Seen {
        bytes: if what == What::File { stat.stx_size } else { 0 },
        what,
        mode: u32::from(stat.stx_mode) & 0o7777,
        mtime_ns: ns(stat.stx_mtime),
        ctime_ns: ns(stat.stx_ctime),
        ino: stat.stx_ino,
    };
    Ok(Some((seen, stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))))
}

#[cfg(test)]
mod tests;
