//! `apply --branch`: a change set as a new branch in the submitter's repository. The commits are made in a repository
//! of ours; of the submitter's, nothing is touched but `objects/pack` (a pack and its index, whole and checked) and
//! one new file below `refs/heads`, both written with the submitter's rights. It must never run git there, move a
//! branch, or touch the work tree.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

pub use super::build::{Build, BuildError};
use super::build::{Built, build};
use super::commits::{BundleError, Lender, WAIT_MAX};
use crate::git::head::Repository;
use crate::git::refs::{self, RefError};
use crate::git::{Bounds, Git, GitError};
use crate::workspace::{WorkspaceError, as_submitter};

/// A branch that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Created {
    /// Its name.
    pub branch: String,
    /// The commit it is at.
    pub commit: String,
    /// What is not in it, in sentences.
    pub notes: Vec<String>,
}

/// Why there is no branch.
#[derive(Debug, thiserror::Error)]
pub enum BranchError {
    /// The name, or what is in its way.
    #[error(transparent)]
    Ref(#[from] RefError),
    /// The commits.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The workspace cannot be reached.
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
    /// The pack cannot be written.
    #[error("cannot write the commits into the repository's objects: {0}")]
    Pack(io::Error),
}

impl From<GitError> for BranchError {
    fn from(error: GitError) -> Self {
        Self::Build(BuildError::Git(error))
    }
}

impl From<BundleError> for BranchError {
    fn from(error: BundleError) -> Self {
        Self::Build(BuildError::Source(error))
    }
}

/// Makes the branch `name`. Blocks.
///
/// # Errors
/// [`BranchError`]; there is no branch then, at most a pack that the next `git gc` removes.
pub fn create(name: &str, wanted: &Build<'_>) -> Result<Created, BranchError> {
    let lender = Lender::find(wanted.path, wanted.identity)?;
    let lender = {
        let name = name.to_owned();
        as_submitter(wanted.identity, wanted.path, WAIT_MAX, move || {
            refs::is_free(&lender.repository, &name).map(|()| lender).map_err(BranchError::Ref)
        })?
    };
    let git = lender.git(wanted.temporary, wanted.identity)?;
    let made = make(&git, lender, name, wanted);
    let destroyed = git.destroy();
    let made = made?;
    destroyed?;
    Ok(made)
}

fn make(git: &Git, lender: Lender, name: &str, wanted: &Build<'_>) -> Result<Created, BranchError> {
    let Built { base, tip, notes } = build(git, &lender, wanted)?;
    let pack = pack(git, &base, &tip)?;
    let (branch, commit) = (name.to_owned(), tip.clone());
    as_submitter(wanted.identity, wanted.path, WAIT_MAX, move || {
        place(&lender.repository, &pack).map_err(BranchError::Pack)?;
        refs::create(&lender.repository, &branch, &commit).map_err(BranchError::Ref)
    })?;
    Ok(Created { branch: name.to_owned(), commit: tip, notes })
}

/// A pack in our repository, with its index: `…/name.pack`, `…/name.idx`.
struct Pack {
    dir: PathBuf,
    name: String,
}

/// Packs what is new, and lets git check it as if it came from a stranger.
fn pack(git: &Git, base: &str, tip: &str) -> Result<Pack, BranchError> {
    let bounds = Bounds::default();
    let mut feed = |to: &mut dyn io::Write| writeln!(to, "{tip}\n^{base}");
    let args = ["pack-objects", "--revs", "--local", "--quiet", "--no-reuse-delta", "out/pack"];
    let hash = git.text(&args, Some(&mut feed), &bounds)?;
    let hash = String::from_utf8_lossy(&hash).trim().to_owned();
    if hash.is_empty() || !hash.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(BranchError::Pack(io::Error::other("git did not name the pack it made")));
    }
    let name = format!("pack-{hash}");
    let (index, file) = (format!("out/checked-{hash}.idx"), format!("out/{name}.pack"));
    let checked = git.text(&["index-pack", "--strict=badFilemode=error", "-o", &index, &file], None, &bounds);
    match checked {
        Ok(_) => Ok(Pack { dir: git.dir().join("out"), name }),
        Err(GitError::Failed { words, .. }) => Err(BuildError::Check(words).into()),
        Err(error) => Err(error.into()),
    }
}

/// Copies the pack, then its index, which makes it one of the repository's. With the submitter's rights.
fn place(repository: &Repository, pack: &Pack) -> io::Result<()> {
    let objects = open_dir(CWD, &repository.objects().map_err(io::Error::other)?)?;
    match rustix::fs::mkdirat(&objects, "pack", Mode::from_raw_mode(0o777)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno.into()),
    }
    let into = open_dir(&objects, Path::new("pack"))?;
    let from = open_dir(CWD, &pack.dir)?;
    let index = pack.name.replace("pack-", "checked-");
    for (source, name, kind) in [
        (format!("{}.pack", pack.name), format!("{}.pack", pack.name), "pack"),
        (format!("{index}.idx"), format!("{}.idx", pack.name), "idx"),
    ] {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let mut content = File::from(rustix::fs::openat2(&from, &source, flags, Mode::empty(), resolve)?);
        // A name that `git gc` takes for a leftover, should this end half-way.
        let fresh = format!("tmp_{kind}_{}_{}", std::process::id(), &pack.name);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::openat(&into, &fresh, flags, Mode::from_raw_mode(0o444))?);
        let written = io::copy(&mut content, &mut file)
            .and_then(|_| Ok(rustix::fs::fchmod(&file, Mode::from_raw_mode(0o444))?))
            .and_then(|()| file.sync_all())
            .and_then(|()| Ok(rustix::fs::renameat(&into, &fresh, &into, &name)?));
        if let Err(error) = written {
            let _ = rustix::fs::unlinkat(&into, &fresh, AtFlags::empty());
            return Err(error);
        }
    }
    Ok(rustix::fs::fsync(&into)?)
}

fn open_dir(at: impl std::os::fd::AsFd, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(at, path, flags, Mode::empty())?)
}

#[cfg(test)]
#[path = "branch/tests.rs"]
mod tests;
