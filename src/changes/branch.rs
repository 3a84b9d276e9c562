//! `apply --branch`: a change set as a new branch in the submitter's repository. The commits are made in a repository
//! of ours; of the submitter's, nothing is touched but `objects/pack` (a pack and its index, whole and checked) and
//! one new file below `refs/heads`, both written with the submitter's rights. It must never run git there, move a
//! branch, touch the work tree, or leave a lock behind.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

pub use super::build::{Build, BuildError};
use super::build::{Built, build};
use super::commits::{BundleError, Lender, WAIT_MAX};
use super::note::{NotFree, Note, chance};
use super::{JobShelf, ShelfError};
use crate::git::head::Repository;
use crate::git::refs::{self, RefError};
use crate::git::{Bounds, Git, GitError};
use crate::job::Identity;
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
    /// What is noted beside the change set meanwhile.
    #[error(transparent)]
    Note(#[from] ShelfError),
    /// An earlier one is still at it.
    #[error("this change set is being made a branch just now: wait until that is done")]
    Busy,
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
    stepwise(name, wanted, Arc::new(|| Ok(())))
}

/// Called before each step in the repository; an error stops there. For tests of what happens then.
type Step = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

fn stepwise(name: &str, wanted: &Build<'_>, step: Step) -> Result<Created, BranchError> {
    let lender = Lender::find(wanted.path, wanted.identity)?;
    let lender = {
        let name = name.to_owned();
        as_submitter(wanted.identity, wanted.path, WAIT_MAX, move || {
            refs::is_free(&lender.repository, &name).map(|()| lender).map_err(BranchError::Ref)
        })?
    };
    let git = lender.git(wanted.temporary, wanted.identity)?;
    let made = make(&git, lender, name, wanted, step);
    let destroyed = git.destroy();
    let made = made?;
    destroyed?;
    Ok(made)
}

fn make(
    git: &Git,
    lender: Lender,
    name: &str,
    wanted: &Build<'_>,
    step: Step,
) -> Result<Created, BranchError> {
    let Built { base, tip, notes } = build(git, &lender, wanted)?;
    let pack = pack(git, &base, &tip)?;
    let (branch, commit) = (name.to_owned(), tip.clone());
    let making = Making {
        identity: wanted.identity.clone(),
        path: wanted.path.to_owned(),
        branch: name.to_owned(),
        pack: pack.name.clone(),
        mark: chance().map_err(BranchError::Pack)?,
    };
    let note_name = format!("{PREFIX}{}", making.mark);
    let note = Note::begin(wanted.shelf, &note_name, &making)?;
    let placed = as_submitter::<_, BranchError>(wanted.identity, wanted.path, WAIT_MAX, move || {
        let placed = place(&lender.repository, &pack, &making.mark, &step).map_err(BranchError::Pack);
        let made = placed.and_then(|()| {
            let (repository, mark) = (&lender.repository, &making.mark);
            refs::create_marked(repository, &branch, &commit, mark, &*step).map_err(BranchError::Ref)
        });
        Ok((note, made))
    });
    match placed {
        Ok((note, made)) => {
            note.end()?;
            made?;
        }
        Err(error) => {
            Note::end_if_free(wanted.shelf, &note_name)?;
            return Err(error);
        }
    }
    Ok(Created { branch: name.to_owned(), commit: tip, notes })
}

const PREFIX: &str = "branch-";

/// A branch that is being made: what its note says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Making {
    identity: Identity,
    /// The work tree, or the repository.
    path: PathBuf,
    branch: String,
    pack: String,
    /// In the names of what is there only meanwhile.
    mark: String,
}

/// Removes what a dead process left of branches that it was making of this change set: locks and unfinished packs. The
/// branch is there, whole, or not. Gives how many there were. Blocks.
///
/// # Errors
/// [`BranchError::Busy`] while one goes on; others: it can be tried again.
pub fn recover(shelf: &JobShelf) -> Result<usize, BranchError> {
    let left = Note::left(shelf, PREFIX).map_err(|error| match error {
        NotFree::Busy => BranchError::Busy,
        NotFree::Shelf(error) => BranchError::Note(error),
    })?;
    let recovered = left.len();
    for note in left {
        for making in note.lines::<Making>()? {
            let lender = Lender::find(&making.path, &making.identity)?;
            let (identity, path) = (making.identity.clone(), making.path.clone());
            as_submitter(&identity, &path, WAIT_MAX, move || {
                unplace(&lender.repository, &making).map_err(BranchError::Pack)?;
                refs::take_back(&lender.repository, &making.branch, &making.mark).map_err(BranchError::Ref)
            })?;
        }
        note.end()?;
    }
    Ok(recovered)
}

/// Removes the files of a pack that is not one of the repository's yet. With the submitter's rights.
fn unplace(repository: &Repository, making: &Making) -> io::Result<()> {
    let objects = open_dir(CWD, &repository.objects().map_err(io::Error::other)?)?;
    let into = match open_dir(&objects, Path::new("pack")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        into => into?,
    };
    let mut names = vec![unfinished("pack", &making.mark), unfinished("idx", &making.mark)];
    let index = format!("{}.idx", making.pack);
    if let Err(Errno::NOENT) = rustix::fs::statat(&into, &index, AtFlags::SYMLINK_NOFOLLOW) {
        names.push(format!("{}.pack", making.pack));
    }
    for name in names {
        match rustix::fs::unlinkat(&into, &name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// A name that `git gc` takes for a leftover, too.
fn unfinished(kind: &str, mark: &str) -> String {
    format!("tmp_{kind}_{mark}")
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
fn place(repository: &Repository, pack: &Pack, mark: &str, step: &Step) -> io::Result<()> {
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
        step()?;
        let fresh = unfinished(kind, mark);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::openat(&into, &fresh, flags, Mode::from_raw_mode(0o444))?);
        let written = io::copy(&mut content, &mut file)
            .and_then(|_| Ok(rustix::fs::fchmod(&file, Mode::from_raw_mode(0o444))?))
            .and_then(|()| file.sync_all())
            .and_then(|()| step())
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
