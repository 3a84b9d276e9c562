//! Names of references, and a new branch in somebody's repository, written as git writes it but without git: a lock
//! file, then a rename, nothing replaced. Runs with the rights of whoever calls (a thread with the submitter's). It
//! must never change or move a reference that is there, nor follow a link.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

use super::head::{Repository, RepositoryError, checked_out, packed_lines};

/// Longest name, in bytes, `refs/heads/` included.
const NAME_BYTES_MAX: usize = 1000;
/// Longest part of a name; `.lock` must still fit.
const PART_BYTES_MAX: usize = 250;

/// Why a branch was not made.
#[derive(Debug, thiserror::Error)]
pub enum RefError {
    /// No name that git takes.
    #[error("{name:?} is no name for a branch: see `git help check-ref-format`")]
    Name {
        /// As given.
        name: String,
    },
    /// There is one.
    #[error("there is a branch {name:?} already: choose another name, or delete it")]
    Exists {
        /// Which.
        name: String,
    },
    /// A branch of that name cannot be beside another.
    #[error("there cannot be a branch {name:?} beside the branch {other:?}: choose another name")]
    Clash {
        /// As given.
        name: String,
        /// The one that is there.
        other: String,
    },
    /// It is checked out already, without a commit.
    #[error("the branch {name:?} is checked out, without a commit on it yet: choose another name")]
    CheckedOut {
        /// Which.
        name: String,
    },
    /// A git process holds it.
    #[error(
        "the branch {name:?} is locked ({name}.lock): wait for the git that runs there, or remove the lock"
    )]
    Locked {
        /// Which.
        name: String,
    },
    /// The repository cannot be read.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// The kernel said no.
    #[error("cannot write the branch {name:?}: {source}")]
    Io {
        /// Which.
        name: String,
        /// Its word.
        source: io::Error,
    },
}

/// Whether git takes `name` for a reference (git-check-ref-format(1)).
pub fn is_ref_name(name: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty() && !part.starts_with('.') && !part.ends_with(".lock") && part.len() <= PART_BYTES_MAX
    };
    let bad = |c: char| c.is_ascii_control() || matches!(c, ' ' | '~' | '^' | ':' | '?' | '*' | '[' | '\\');
    name.len() <= NAME_BYTES_MAX
        && name.contains('/')
        && name.split('/').all(part)
        && !name.contains("..")
        && !name.contains("@{")
        && !name.ends_with('.')
        && !name.contains(bad)
}

/// Whether `name` can be a branch: what git would take after `git branch`.
pub fn is_branch_name(name: &str) -> bool {
    !name.starts_with('-') && name != "HEAD" && name != "@" && is_ref_name(&format!("refs/heads/{name}"))
}

/// Whether a branch of that name could be made now.
///
/// # Errors
/// [`RefError`]: what is in the way.
pub fn is_free(repository: &Repository, name: &str) -> Result<(), RefError> {
    if !is_branch_name(name) {
        return Err(RefError::Name { name: name.to_owned() });
    }
    let full = format!("refs/heads/{name}");
    if repository.resolve(&full)?.is_some() {
        return Err(RefError::Exists { name: name.to_owned() });
    }
    if checked_out(repository)?.contains(&full) {
        return Err(RefError::CheckedOut { name: name.to_owned() });
    }
    let clash = |other: &[u8]| {
        let other = String::from_utf8_lossy(other);
        let other = other.strip_prefix("refs/heads/").unwrap_or(&other).to_owned();
        RefError::Clash { name: name.to_owned(), other }
    };
    for (_, other) in packed_lines(&repository.packed_refs()?) {
        let below =
            |long: &[u8], short: &[u8]| long.starts_with(short) && long.get(short.len()) == Some(&b'/');
        if below(other, full.as_bytes()) || below(full.as_bytes(), other) {
            return Err(clash(other));
        }
    }
    for (at, _) in name.match_indices('/') {
        let above = format!("refs/heads/{}", &name[..at]);
        if repository.resolve(&above)?.is_some() {
            return Err(clash(above.as_bytes()));
        }
    }
    Ok(())
}

/// Makes the branch `name` at `commit`, which must be on the disk already.
///
/// # Errors
/// [`RefError`]; nothing is changed then.
pub fn create(repository: &Repository, name: &str, commit: &str) -> Result<(), RefError> {
    let random = getrandom::u64()
        .map_err(|e| RefError::Io { name: name.to_owned(), source: io::Error::other(e.to_string()) })?;
    create_marked(repository, name, commit, &format!("{random:016x}"), &|| Ok(()))
}

/// The same. `mark`, a name of chance, is in the names of what is made on the way: what a process that dies leaves,
/// [`take_back`] removes. `step` is called before each step; an error stops there.
///
/// # Errors
/// [`RefError`]; there is no branch then.
pub fn create_marked(
    repository: &Repository,
    name: &str,
    commit: &str,
    mark: &str,
    step: &dyn Fn() -> io::Result<()>,
) -> Result<(), RefError> {
    is_free(repository, name)?;
    let at = |source: io::Error| RefError::Io { name: name.to_owned(), source };
    let io = |errno: Errno| at(errno.into());
    let mut dir = below(repository.common(), "refs").map_err(io)?;
    let full = format!("heads/{name}");
    let mut parts: Vec<&str> = full.split('/').collect();
    let last = parts.pop().unwrap_or_default();
    for part in parts {
        let mode = rustix::fs::fstat(&dir).map_err(io)?.st_mode & 0o7777;
        match rustix::fs::mkdirat(&dir, part, Mode::from_raw_mode(mode)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(io(errno)),
        }
        dir = below(dir.as_fd(), part).map_err(|errno| match errno {
            Errno::NOTDIR | Errno::LOOP => RefError::Clash { name: name.to_owned(), other: part.to_owned() },
            other => io(other),
        })?;
    }
    let on_the_way = OnTheWay::of(last, mark);
    // Git takes no name with this end for a branch.
    let made = on_the_way.write(&dir, commit, step).map_err(at).and_then(|()| {
        step().map_err(at)?;
        match rustix::fs::linkat(&dir, &on_the_way.own, &dir, &on_the_way.lock, AtFlags::empty()) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Err(RefError::Locked { name: name.to_owned() }),
            Err(errno) => return Err(io(errno)),
        }
        // Under the lock, so that a git that packs references is not missed.
        is_free(repository, name)?;
        step().map_err(at)?;
        place(&dir, &on_the_way.lock, last, name)
    });
    let removed = on_the_way.remove(&dir);
    made.and_then(|()| removed.map_err(io))
}

/// Removes what a process that died left of making the branch `name` with this `mark`.
///
/// # Errors
/// [`RefError::Io`].
pub fn take_back(repository: &Repository, name: &str, mark: &str) -> Result<(), RefError> {
    let io = |errno: Errno| RefError::Io { name: name.to_owned(), source: errno.into() };
    let full = format!("refs/heads/{name}");
    let (holder, last) = full.rsplit_once('/').unwrap_or(("refs", &full));
    match below(repository.common(), holder) {
        Ok(dir) => OnTheWay::of(last, mark).remove(&dir).map_err(io),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(()),
        Err(errno) => Err(io(errno)),
    }
}

/// Files that are there while a branch is made: git's lock is another name of ours.
struct OnTheWay {
    own: String,
    lock: String,
}

impl OnTheWay {
    fn of(last: &str, mark: &str) -> Self {
        Self { own: format!("hotcell-{mark}.lock"), lock: format!("{last}.lock") }
    }

    fn write(&self, dir: &OwnedFd, commit: &str, step: &dyn Fn() -> io::Result<()>) -> io::Result<()> {
        step()?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::openat(dir, &self.own, flags, Mode::from_raw_mode(0o644))?);
        // As open to others as the directory is: repositories that a group shares stay so.
        let mode = rustix::fs::fstat(dir)?.st_mode & 0o666;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?;
        file.write_all(format!("{commit}\n").as_bytes())?;
        file.sync_all()
    }

    /// Removes our file, and the lock where it is the same.
    fn remove(&self, dir: &OwnedFd) -> rustix::io::Result<()> {
        let look = |name: &str| match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat.st_ino)),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno),
        };
        let Some(own) = look(&self.own)? else { return Ok(()) };
        if look(&self.lock)? == Some(own) {
            rustix::fs::unlinkat(dir, &self.lock, AtFlags::empty())?;
        }
        rustix::fs::unlinkat(dir, &self.own, AtFlags::empty())
    }
}

/// Gives the lock the branch's name.
fn place(dir: &OwnedFd, lock: &str, last: &str, name: &str) -> Result<(), RefError> {
    let io = |errno: Errno| RefError::Io { name: name.to_owned(), source: errno.into() };
    // Directories that deleted branches left behind.
    remove_empty(dir.as_fd(), last, 0);
    match rustix::fs::renameat_with(dir, lock, dir, last, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        Err(Errno::EXIST) if below(dir.as_fd(), last).is_ok() => {
            return Err(RefError::Clash { name: name.to_owned(), other: format!("{name}/…") });
        }
        Err(Errno::EXIST) => return Err(RefError::Exists { name: name.to_owned() }),
        Err(errno) => return Err(io(errno)),
    }
    rustix::fs::fsync(dir).map_err(io)
}

/// A directory in another, for reading, through no link.
pub(super) fn below(dir: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve)
}

/// Removes `name` and what is below it, if all of it is empty directories.
fn remove_empty(dir: BorrowedFd<'_>, name: &str, depth: usize) {
    let Ok(inner) = below(dir, name) else { return };
    if depth < 16
        && let Ok(entries) = rustix::fs::Dir::read_from(&inner)
    {
        for entry in entries.flatten().take(1000) {
            if let Ok(name) = entry.file_name().to_str()
                && !matches!(name, "." | "..")
            {
                remove_empty(inner.as_fd(), name, depth + 1);
            }
        }
    }
    let _ = rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR);
}

#[cfg(test)]
#[path = "refs/tests.rs"]
mod tests;
