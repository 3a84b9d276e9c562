//! The agent's own commits: what is run in the cell to pack them into a bundle, and how such a bundle, which is an
//! agent's work, is taken in. Git checks every object of it (`index-pack --strict`) in a repository of ours, as the
//! submitter, beside the submitter's objects. It must never write into the submitter's repository, nor keep a bundle
//! that did not pass.

use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use super::shelf::{JobShelf, ShelfError};
use crate::change::Commits;
use crate::git::head::{Format, Repository, RepositoryError};
use crate::git::{Borrowed, Bounds, Git, GitError, Who};
use crate::job::Identity;
use crate::workspace::{WorkspaceError, as_submitter};

/// Longest wait for the submitter's file system.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(60);
/// Longest head of a bundle, in bytes, and its longest line.
const HEAD_BYTES_MAX: u64 = 1 << 20;
const HEAD_LINE_BYTES_MAX: usize = 4096;
/// Most commits of one job.
const COMMITS_MAX: u64 = 100_000;

/// Bounds of what is taken in.
#[derive(Debug, Clone, Copy)]
pub struct BundleLimits {
    /// Longest bundle, in bytes.
    pub bytes_max: u64,
    /// Longest work of git's on it.
    pub wall: Duration,
}

impl Default for BundleLimits {
    fn default() -> Self {
        Self { bytes_max: 1 << 30, wall: Duration::from_secs(120) }
    }
}

/// Why there are no commits.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// It is longer than was agreed.
    #[error("the agent's commits take more than {bytes_max} bytes: they are left out, the files are not")]
    TooLong {
        /// The limit.
        bytes_max: u64,
    },
    /// It is no bundle, or one of another kind.
    #[error("the bundle of the agent's commits is not as git makes them ({what}): they are left out")]
    Form {
        /// What is wrong.
        what: &'static str,
    },
    /// Git did not let it pass.
    #[error("the agent's commits did not pass git's checks: {0}: they are left out")]
    Check(String),
    /// There is no repository to check them against.
    #[error("{path:?} is no git repository any more: the agent's commits are left out")]
    NoRepository {
        /// The workspace.
        path: std::path::PathBuf,
    },
    /// The repository cannot be read.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// The workspace cannot be reached.
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
    /// Git cannot be run.
    #[error(transparent)]
    Git(GitError),
    /// It cannot be kept.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
    /// A file of ours.
    #[error("cannot keep the agent's commits: {0}")]
    Io(#[from] io::Error),
}

/// What to run in the cell, as the agent, when the agent has ended: writes a bundle of all commits that HEAD has
/// beyond `base` to `into`, a path in the cell, at most `bytes_max` long. Without such commits it writes nothing and
/// says so by its exit code; a bundle that became too long is removed.
pub fn bundle_command(workspace: &str, base: Option<&str>, into: &str, bytes_max: u64) -> Vec<String> {
    // POSIX counts in blocks of 512 bytes.
    let script = "ulimit -f \"$3\"; cd \"$1\" || exit 1; rm -f -- \"$2\"; \
        if [ -n \"$4\" ]; then git bundle create -q \"$2\" HEAD \"^$4\"; else git bundle create -q \"$2\" HEAD; fi; \
        code=$?; [ $code = 0 ] || rm -f -- \"$2\" \"$2.lock\"; exit $code";
    let blocks = (bytes_max / 512 + 1).to_string();
    ["/bin/sh", "-c", script, "bundle", workspace, into, &blocks, base.unwrap_or("")]
        .map(str::to_owned)
        .into()
}

/// The agent's commits, from a bundle that lies in a dead cell (opened by [`crate::workspace::open_file`]), checked
/// against the repository of the workspace `path` and kept on the shelf. None where it brings nothing new. Blocks.
///
/// # Errors
/// [`BundleError`]; nothing is kept then.
pub fn import_bundle(
    bundle: &mut (dyn Read + Send),
    shelf: &JobShelf,
    path: &Path,
    identity: &Identity,
    base: Option<&str>,
    temporary: &Path,
    limits: &BundleLimits,
) -> Result<Option<Commits>, BundleError> {
    // No name: gone with this process, whatever happens.
    let mut file = tempfile::tempfile_in(shelf.dir())?;
    let copied = io::copy(&mut bundle.take(limits.bytes_max + 1), &mut file)?;
    if copied > limits.bytes_max {
        return Err(BundleError::TooLong { bytes_max: limits.bytes_max });
    }
    let lender = Lender::find(path, identity)?;
    let git = lender.git(temporary, identity).map_err(BundleError::Git)?;
    let taken = take_in(&git, &mut file, lender.format, base, limits);
    let destroyed = git.destroy().map_err(BundleError::Git);
    let Some((tip, count)) = taken? else { return destroyed.map(|()| None) };
    destroyed?;
    file.seek(SeekFrom::Start(0))?;
    let kept = shelf.put_blob(&mut file, limits.bytes_max, 0)?;
    let (bundle, _, _) = kept.ok_or(BundleError::TooLong { bytes_max: limits.bytes_max })?;
    Ok(Some(Commits { tip, count, bundle }))
}

/// What is borrowed of the submitter's repository.
#[derive(Debug)]
pub(super) struct Lender {
    pub(super) repository: Repository,
    pub(super) format: Format,
    borrowed: Borrowed,
}

impl Lender {
    /// Looks at it as the submitter.
    pub(super) fn find(path: &Path, identity: &Identity) -> Result<Self, BundleError> {
        let (at, uid) = (path.to_owned(), identity.uid);
        as_submitter(identity, path, WAIT_MAX, move || {
            let Some(repository) = Repository::holding(&at, uid)? else {
                return Err(BundleError::NoRepository { path: at });
            };
            let borrowed = Borrowed { objects: Some(repository.objects()?), shallow: repository.shallow()? };
            Ok(Self { format: repository.format, repository, borrowed })
        })
    }

    /// A repository of ours beside it.
    pub(super) fn git(&self, temporary: &Path, identity: &Identity) -> Result<Git, GitError> {
        Git::new(temporary, &Who::Submitter(identity.clone()), self.format, &self.borrowed)
    }
}

/// Checks a bundle and puts its objects into `git`: its tip, and how many commits it brings beyond `base`.
pub(super) fn take_in(
    git: &Git,
    file: &mut (impl Read + Seek + Send),
    format: Format,
    base: Option<&str>,
    limits: &BundleLimits,
) -> Result<Option<(String, u64)>, BundleError> {
    file.seek(SeekFrom::Start(0))?;
    let mut reader = BufReader::new(file);
    let tip = head_of_bundle(&mut reader, format)?;
    let bounds = Bounds {
        wall: limits.wall,
        // What is packed unfolds; a pack that names its bases is completed from the repository.
        file_bytes_max: limits.bytes_max.saturating_mul(4),
        ..Bounds::default()
    };
    let checked = |error| match error {
        GitError::Failed { words, .. } => BundleError::Check(words),
        GitError::Late { .. } => BundleError::Check(error.to_string()),
        error => BundleError::Git(error),
    };
    let most = format!("--max-input-size={}", limits.bytes_max);
    let args = ["index-pack", "--stdin", "--fix-thin", "--strict=badFilemode=error", &most];
    let mut feed = |to: &mut dyn Write| io::copy(&mut reader, to).map(drop);
    git.run(&args, Some(&mut feed), &mut io::sink(), &bounds).map_err(checked)?;
    let mut feed = |to: &mut dyn Write| match base {
        Some(base) => writeln!(to, "{tip}\n^{base}"),
        None => writeln!(to, "{tip}"),
    };
    // All of it must be there: what the pack does not bring, the repository has.
    let most = format!("--max-count={}", COMMITS_MAX + 1);
    git.run(&["rev-list", "--objects", "--quiet", "--stdin"], Some(&mut feed), &mut io::sink(), &bounds)
        .map_err(checked)?;
    let count =
        git.text(&["rev-list", "--count", &most, "--stdin"], Some(&mut feed), &bounds).map_err(checked)?;
    match String::from_utf8_lossy(&count).trim().parse() {
        Ok(0) => Ok(None),
        Ok(count) if count <= COMMITS_MAX => Ok(Some((tip, count))),
        Ok(_) | Err(_) => Err(BundleError::Form { what: "it has too many commits" }),
    }
}

/// Reads the head of a bundle, up to where its pack begins: the object that its one reference names.
fn head_of_bundle(reader: &mut impl BufRead, format: Format) -> Result<String, BundleError> {
    let form = |what| BundleError::Form { what };
    let (mut left, mut tip, mut named) = (HEAD_BYTES_MAX, None, Format::Sha1);
    let mut next = || -> Result<String, BundleError> {
        let mut line = Vec::new();
        let most = left.min(HEAD_LINE_BYTES_MAX as u64);
        let got = reader.by_ref().take(most).read_until(b'\n', &mut line)?;
        left -= got as u64;
        if line.pop() != Some(b'\n') {
            return Err(form("its head does not end"));
        }
        Ok(String::from_utf8_lossy(&line).into_owned())
    };
    let v3 = match next()?.as_str() {
        "# v2 git bundle" => false,
        "# v3 git bundle" => true,
        _ => return Err(form("it does not begin like a bundle")),
    };
    loop {
        let line = next()?;
        match line.strip_prefix('@') {
            _ if line.is_empty() => break,
            Some("object-format=sha1") if v3 => named = Format::Sha1,
            Some("object-format=sha256") if v3 => named = Format::Sha256,
            Some(_) => return Err(form("it leaves things out")),
            // What it builds on: git finds out whether that is there.
            None if line.starts_with('-') => {}
            None => {
                let id = line.split(' ').next().unwrap_or_default();
                if !named.names(id) || tip.replace(id.to_owned()).is_some() {
                    return Err(form("it has another reference than one"));
                }
            }
        }
    }
    if named != format {
        return Err(form("its objects are named in another way than the repository's"));
    }
    tip.ok_or(form("it has no reference"))
}

#[cfg(test)]
#[path = "commits/tests.rs"]
mod tests;
