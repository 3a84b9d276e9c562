//! What a repository says of itself, read without git: where its parts lie, what its HEAD and branches name, how its
//! objects are named. With the caller's rights; bounded; of files nothing but regular ones is opened, and no symbolic
//! link inside of a repository is followed. Must never run a program, nor trust what it reads beyond its form.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::config;
use super::refs::is_ref_name;

/// Longest file that holds one reference or one path, in bytes.
const SMALL_BYTES_MAX: u64 = 8192;
/// Longest `packed-refs`, in bytes.
const PACKED_BYTES_MAX: u64 = 128 << 20;
/// Most references that lead to references.
const SYMBOLIC_MAX: usize = 5;
/// Most directories between a workspace and the top of its repository.
const UPWARD_MAX: usize = 64;
/// Extensions of a repository's form that change nothing here, in lower case.
const EXTENSIONS: [&str; 7] = [
    "noop",
    "noop-v1",
    "preciousobjects",
    "partialclone",
    "worktreeconfig",
    "compatobjectformat",
    "relativeworktrees",
];

/// What is checked out.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Head {
    /// The commit; none on a branch without one.
    pub commit: Option<String>,
    /// The branch, without `refs/heads/`; none where a commit is checked out.
    pub branch: Option<String>,
}

/// How objects are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// 40 hex digits.
    Sha1,
    /// 64 hex digits.
    Sha256,
}

impl Format {
    /// Whether `text` names an object.
    pub fn names(self, text: &str) -> bool {
        let digits = match self {
            Self::Sha1 => 40,
            Self::Sha256 => 64,
        };
        text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    }

    /// As git calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
        }
    }
}

/// Why a repository is not used.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// It has a form that is not known here.
    #[error("the git repository uses {what}, which hotcell does not read: use the files, not the commits")]
    Unsupported {
        /// What.
        what: String,
    },
    /// It is not as git makes them.
    #[error("the git repository is broken: {what}")]
    Broken {
        /// In which way.
        what: String,
    },
    /// It belongs to somebody else.
    #[error("the git repository {path:?} belongs to uid {owner}: use a directory of your own")]
    Foreign {
        /// The directory that holds `.git`.
        path: PathBuf,
        /// Whose.
        owner: u32,
    },
    /// The kernel said no.
    #[error("cannot {doing} of the git repository: {source}")]
    Io {
        /// The step.
        doing: &'static str,
        /// Its word.
        source: io::Error,
    },
}

fn broken(what: impl Into<String>) -> RepositoryError {
    RepositoryError::Broken { what: what.into() }
}

fn unsupported(what: impl Into<String>) -> RepositoryError {
    RepositoryError::Unsupported { what: what.into() }
}

/// What is checked out in `dir`, with the caller's rights; none where there is no repository, or none that can be
/// read ([`Repository::at`] says why). A repository above `dir` is not looked for.
pub fn head_of(dir: BorrowedFd<'_>) -> Option<Head> {
    Repository::at(dir).ok().flatten()?.head().ok()
}

/// A repository, by descriptors.
#[derive(Debug)]
pub struct Repository {
    /// What belongs to this work tree: HEAD.
    git: OwnedFd,
    /// What all its work trees share: objects, branches. The same as `git` where there is one.
    common: OwnedFd,
    /// How its objects are named.
    pub format: Format,
    /// Where the directory that was asked about lies in the work tree: empty at its top, else `a/b`.
    pub prefix: Vec<u8>,
}

impl Repository {
    /// The repository whose work tree has its top at `dir`; none where there is no `.git`.
    ///
    /// # Errors
    /// [`RepositoryError`].
    pub fn at(dir: BorrowedFd<'_>) -> Result<Option<Self>, RepositoryError> {
        git_dir(dir)?.map(Self::of).transpose()
    }

    /// The repository whose own directory (`.git`, or `worktrees/<name>` in one) this is.
    ///
    /// # Errors
    /// [`RepositoryError`].
    pub fn of(git: OwnedFd) -> Result<Self, RepositoryError> {
        let common = match small(git.as_fd(), "commondir")? {
            Some(path) => directory(git.as_fd(), path.as_bytes(), "open the shared part")?,
            None => git.try_clone().map_err(|source| RepositoryError::Io { doing: "open", source })?,
        };
        if !regular(git.as_fd(), "HEAD")? || !is_dir(common.as_fd(), "objects") {
            return Err(broken("it has no HEAD or no objects"));
        }
        let format = format_of(common.as_fd())?;
        Ok(Self { git, common, format, prefix: Vec::new() })
    }

    /// The repository that holds `path`, an absolute path without symbolic links: there, or above it on the same
    /// file system, where it must belong to `uid`.
    ///
    /// # Errors
    /// [`RepositoryError`].
    pub fn holding(path: &Path, uid: u32) -> Result<Option<Self>, RepositoryError> {
        let io = |errno: Errno| RepositoryError::Io { doing: "open the directory", source: errno.into() };
        let mut device = None;
        for above in path.ancestors().take(UPWARD_MAX) {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
            let dir = rustix::fs::openat2(CWD, above, flags, Mode::empty(), resolve).map_err(io)?;
            let stat = rustix::fs::fstat(&dir).map_err(io)?;
            if *device.get_or_insert(stat.st_dev) != stat.st_dev {
                return Ok(None);
            }
            let Some(mut found) = Self::at(dir.as_fd())? else { continue };
            if above != path && stat.st_uid != uid {
                return Err(RepositoryError::Foreign { path: above.to_owned(), owner: stat.st_uid });
            }
            let below = path.strip_prefix(above).unwrap_or(Path::new(""));
            found.prefix = below.as_os_str().as_bytes().to_vec();
            return Ok(Some(found));
        }
        Ok(None)
    }

    /// Who commits here by its own configuration: name and address. What it includes from elsewhere is not read.
    pub fn committer(&self) -> (Option<String>, Option<String>) {
        let text = file_of(self.common.as_fd(), "config", config::CONFIG_BYTES_MAX)
            .ok()
            .flatten()
            .unwrap_or_default();
        let all = config::read(&String::from_utf8_lossy(&text)).unwrap_or_default();
        let last = |key: &str| {
            let of = |v: &&config::Variable| v.section == "user" && v.subsection.is_none() && v.key == key;
            all.iter().rev().find(of).and_then(|v| v.value.clone())
        };
        (last("name"), last("email"))
    }

    /// Its index, and when that was written, in nanoseconds since 1970; none where there is none.
    ///
    /// # Errors
    /// [`RepositoryError`].
    pub fn index(&self, bytes_max: u64) -> Result<Option<(Vec<u8>, i64)>, RepositoryError> {
        let Some((found, _)) = look(self.git.as_fd(), "index")? else { return Ok(None) };
        let stat = rustix::fs::fstat(&found)
            .map_err(|errno| RepositoryError::Io { doing: "look at the index", source: errno.into() })?;
        let bytes = file_of(self.git.as_fd(), "index", bytes_max)?;
        Ok(bytes.map(|bytes| (bytes, stat.st_mtime * 1_000_000_000 + stat.st_mtime_nsec as i64)))
    }

    /// What is checked out.
    ///
    /// # Errors
    /// [`RepositoryError`].
    pub fn head(&self) -> Result<Head, RepositoryError> {
        let text = small(self.git.as_fd(), "HEAD")?.ok_or_else(|| broken("it has no HEAD"))?;
        let Some(name) = symbolic(&text) else {
            let commit = self.object(&text, "HEAD")?;
            return Ok(Head { commit: Some(commit), branch: None });
        };
        let branch = name.strip_prefix("refs/heads/").map(str::to_owned);
        Ok(Head { commit: self.resolve(name)?, branch })
    }

    /// What a reference (`refs/…`) names; none where there is none.
    ///
    /// # Errors
    /// [`RepositoryError`].
    pub fn resolve(&self, name: &str) -> Result<Option<String>, RepositoryError> {
        let mut name = name.to_owned();
        for _ in 0..SYMBOLIC_MAX {
            if !is_ref_name(&name) {
                return Err(broken(format!("{name:?} is no name of a reference")));
            }
            let own = ["refs/bisect/", "refs/worktree/", "refs/rewritten/"];
            let dir = if own.iter().any(|own| name.starts_with(own)) { &self.git } else { &self.common };
            let Some(text) = small(dir.as_fd(), &name)? else { return self.packed(&name) };
            match symbolic(&text) {
                Some(next) => name = next.to_owned(),
                None => return self.object(&text, &name).map(Some),
            }
        }
        Err(broken("its references lead in circles"))
    }

    /// What `packed-refs` says of a reference.
    fn packed(&self, wanted: &str) -> Result<Option<String>, RepositoryError> {
        let text = self.packed_refs()?;
        let line = packed_lines(&text).find(|(_, name)| *name == wanted.as_bytes());
        line.map(|(id, _)| self.object(&String::from_utf8_lossy(id), wanted)).transpose()
    }

    /// All of `packed-refs`; empty where there is none.
    pub(super) fn packed_refs(&self) -> Result<Vec<u8>, RepositoryError> {
        Ok(file_of(self.common.as_fd(), "packed-refs", PACKED_BYTES_MAX)?.unwrap_or_default())
    }

    /// What all work trees share, by descriptor.
    pub(super) fn common(&self) -> BorrowedFd<'_> {
        self.common.as_fd()
    }

    /// Where its objects lie, by name: for a process with the rights of whoever calls this.
    ///
    /// # Errors
    /// [`RepositoryError::Io`].
    pub fn objects(&self) -> Result<PathBuf, RepositoryError> {
        let objects = directory(self.common.as_fd(), b"objects", "open the objects")?;
        let link = format!("/proc/self/fd/{}", objects.as_raw_fd());
        std::fs::read_link(link).map_err(|source| RepositoryError::Io { doing: "find the objects", source })
    }

    /// The commits at which its history was cut off, where it was.
    ///
    /// # Errors
    /// [`RepositoryError`].
    pub fn shallow(&self) -> Result<Option<Vec<u8>>, RepositoryError> {
        let Some(text) = file_of(self.common.as_fd(), "shallow", PACKED_BYTES_MAX)? else { return Ok(None) };
        let line = |line: &[u8]| std::str::from_utf8(line).is_ok_and(|id| self.format.names(id));
        let fine = text.split(|b| *b == b'\n').filter(|l| !l.is_empty()).all(line);
        if fine { Ok(Some(text)) } else { Err(broken("its `shallow` holds more than names of commits")) }
    }

    fn object(&self, text: &str, of: &str) -> Result<String, RepositoryError> {
        let id = text.trim_end();
        if self.format.names(id) { Ok(id.to_owned()) } else { Err(broken(format!("{of} names no object"))) }
    }
}

/// The lines of a `packed-refs`: object and name.
pub(super) fn packed_lines(text: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    text.split(|b| *b == b'\n').filter_map(|line| {
        let at = line.iter().position(|b| *b == b' ')?;
        (!matches!(line[0], b'#' | b'^')).then(|| (&line[..at], &line[at + 1..]))
    })
}

/// The branches that are checked out in any work tree, in full (`refs/heads/…`).
pub(super) fn checked_out(repository: &Repository) -> Result<Vec<String>, RepositoryError> {
    let mut names = Vec::new();
    let mut look = |dir: BorrowedFd<'_>| {
        if let Ok(Some(text)) = small(dir, "HEAD") {
            names.extend(symbolic(&text).map(str::to_owned));
        }
    };
    look(repository.git.as_fd());
    look(repository.common.as_fd());
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(trees) = rustix::fs::openat(&repository.common, "worktrees", flags, Mode::empty()) else {
        return Ok(names);
    };
    let io = |errno: Errno| RepositoryError::Io { doing: "list the work trees", source: errno.into() };
    for entry in rustix::fs::Dir::read_from(&trees).map_err(io)?.take(10_000) {
        let entry = entry.map_err(io)?;
        if !entry.file_name().to_bytes().starts_with(b".")
            && let Ok(tree) = rustix::fs::openat(&trees, entry.file_name(), flags, Mode::empty())
        {
            look(tree.as_fd());
        }
    }
    Ok(names)
}

fn symbolic(text: &str) -> Option<&str> {
    text.strip_prefix("ref:").map(str::trim)
}

/// The directory that `.git` in `dir` is, or names.
fn git_dir(dir: BorrowedFd<'_>) -> Result<Option<OwnedFd>, RepositoryError> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = match rustix::fs::openat(dir, ".git", flags, Mode::empty()) {
        Ok(found) => found,
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(RepositoryError::Io { doing: "open `.git`", source: errno.into() }),
    };
    let stat = rustix::fs::fstat(&found)
        .map_err(|errno| RepositoryError::Io { doing: "look at `.git`", source: errno.into() })?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => directory(dir, b".git", "open `.git`").map(Some),
        FileType::RegularFile => {
            let text = small(dir, ".git")?.unwrap_or_default();
            let path = text.strip_prefix("gitdir: ").ok_or_else(|| broken("`.git` names no directory"))?;
            directory(dir, path.as_bytes(), "open what `.git` names").map(Some)
        }
        FileType::Symlink => Err(unsupported("a symbolic link as `.git`")),
        _ => Err(broken("`.git` is neither directory nor file")),
    }
}

/// A directory by a path that may lead anywhere: what is in it is judged, not where it is.
fn directory(at: BorrowedFd<'_>, path: &[u8], doing: &'static str) -> Result<OwnedFd, RepositoryError> {
    let end = path.iter().rposition(|b| !matches!(b, b'\n' | b'\r')).map_or(0, |at| at + 1);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(at, OsStr::from_bytes(&path[..end]), flags, Mode::empty())
        .map_err(|errno| RepositoryError::Io { doing, source: errno.into() })
}

/// Without symbolic links from `dir` on; opened for nothing but to look at.
fn look(dir: BorrowedFd<'_>, name: &str) -> Result<Option<(OwnedFd, FileType)>, RepositoryError> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let io = |errno: Errno| RepositoryError::Io { doing: "look at a file", source: errno.into() };
    match rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve) {
        Ok(found) => {
            let stat = rustix::fs::fstat(&found).map_err(io)?;
            Ok(Some((found, FileType::from_raw_mode(stat.st_mode))))
        }
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(Errno::LOOP) => Err(unsupported(format!("a symbolic link on the way to {name}"))),
        Err(errno) => Err(io(errno)),
    }
}

fn regular(dir: BorrowedFd<'_>, name: &str) -> Result<bool, RepositoryError> {
    Ok(look(dir, name)?.is_some_and(|(_, kind)| kind == FileType::RegularFile))
}

fn is_dir(dir: BorrowedFd<'_>, name: &str) -> bool {
    directory(dir, name.as_bytes(), "open a directory").is_ok()
}

/// A whole file; none where there is none, or a directory.
fn file_of(dir: BorrowedFd<'_>, name: &str, bytes_max: u64) -> Result<Option<Vec<u8>>, RepositoryError> {
    let found = match look(dir, name)? {
        Some((found, FileType::RegularFile)) => found,
        None | Some((_, FileType::Directory)) => return Ok(None),
        Some((_, FileType::Symlink)) => return Err(unsupported(format!("a symbolic link as {name}"))),
        Some(_) => return Err(broken(format!("{name} is no file"))),
    };
    let io = |source: io::Error| RepositoryError::Io { doing: "read a file", source };
    let path = format!("/proc/self/fd/{}", found.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(|errno| io(errno.into()))?;
    let mut bytes = Vec::new();
    File::from(file).take(bytes_max + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > bytes_max {
        return Err(broken(format!("{name} has more than {bytes_max} bytes")));
    }
    Ok(Some(bytes))
}

fn small(dir: BorrowedFd<'_>, name: &str) -> Result<Option<String>, RepositoryError> {
    let Some(bytes) = file_of(dir, name, SMALL_BYTES_MAX)? else { return Ok(None) };
    let text =
        String::from_utf8(bytes).map_err(|_| unsupported(format!("a name that is no UTF-8 in {name}")))?;
    Ok(Some(text))
}

fn format_of(common: BorrowedFd<'_>) -> Result<Format, RepositoryError> {
    let text = file_of(common, "config", config::CONFIG_BYTES_MAX)?.unwrap_or_default();
    let all = config::read(&String::from_utf8_lossy(&text));
    let all = all.ok_or_else(|| broken("its config does not parse"))?;
    let mut format = Format::Sha1;
    for variable in all.iter().filter(|v| v.subsection.is_none()) {
        let value = variable.value.as_deref().unwrap_or("");
        match (variable.section.as_str(), variable.key.as_str()) {
            ("core", "repositoryformatversion") if !matches!(value, "0" | "1") => {
                return Err(unsupported(format!("version {value:?} of the repository's form")));
            }
            ("extensions", "objectformat") => match value {
                "sha1" => format = Format::Sha1,
                "sha256" => format = Format::Sha256,
                other => return Err(unsupported(format!("objects named by {other:?}"))),
            },
            ("extensions", "refstorage") if value != "files" => {
                return Err(unsupported(format!("the reference storage {value:?}")));
            }
            ("extensions", "refstorage") => {}
            ("extensions", other) if !EXTENSIONS.contains(&other) => {
                return Err(unsupported(format!("the extension {other:?}")));
            }
            _ => {}
        }
    }
    Ok(format)
}

#[cfg(test)]
#[path = "head/tests.rs"]
mod tests;
