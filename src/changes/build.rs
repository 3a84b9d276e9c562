//! A change set as commits on the commit that the job began with, in a repository of ours beside the submitter's, as
//! the submitter. It must never run git in the submitter's repository, nor take commits of the agent's that touch
//! what is not to be applied.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::Path;

use super::choose::{Include, chosen};
use super::commits::{BundleError, BundleLimits, Lender, take_in};
use super::only::{BadGlob, Only};
use super::patch::import;
use super::shelf::{JobShelf, ShelfError};
use super::sparse::{self, Change, NewCommit, is_dot_git, note};
use crate::change::{ChangeSet, TreePath};
use crate::git::identity::GitIdentity;
use crate::git::{Bounds, Git, GitError};
use crate::job::{Identity, JobId};

/// Most bytes of a list of a tree's paths.
const LIST_BYTES_MAX: u64 = 4 << 30;
/// Where the new commit stands in our repository.
const NEW: &str = "refs/heads/hotcell-new";

/// What commits are to be made of.
#[derive(Debug, Clone)]
pub struct Build<'a> {
    /// Where the contents lie.
    pub shelf: &'a JobShelf,
    /// The change set.
    pub changes: &'a ChangeSet,
    /// The job.
    pub job: &'a JobId,
    /// The workspace: in a work tree of the repository.
    pub path: &'a Path,
    /// Whose repository it is.
    pub identity: &'a Identity,
    /// As whom to commit.
    pub author: &'a GitIdentity,
    /// The message of the commit, without the trailer; none: a plain one.
    pub message: Option<&'a str>,
    /// Which verdicts.
    pub include: Include,
    /// Which paths; empty: all. With any, the agent's own commits are left out.
    pub only: &'a [String],
    /// When, in seconds since 1970.
    pub now_s: i64,
    /// Where the temporary repository is made.
    pub temporary: &'a Path,
}

/// Why there are no commits.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// There is nothing to build on.
    #[error(
        "the job did not begin with a commit ({why}): use `hotcell apply` without --branch, or an export as patch"
    )]
    NoBase {
        /// Why not.
        why: &'static str,
    },
    /// The commit is not there any more.
    #[error(
        "the commit {commit} that the job began with is not in {path:?} any more: fetch it, or apply without --branch"
    )]
    BaseGone {
        /// Which.
        commit: String,
        /// The workspace.
        path: std::path::PathBuf,
    },
    /// Nothing would be in it.
    #[error("there is nothing to commit: see `hotcell diff`, and --include-flagged for what is flagged")]
    Nothing,
    /// Git does not let it pass.
    #[error("git refuses the commit: {0}: leave the file out with --only")]
    Check(String),
    /// A pattern is none.
    #[error(transparent)]
    Pattern(#[from] BadGlob),
    /// The repository, or the agent's commits.
    #[error(transparent)]
    Source(#[from] BundleError),
    /// The contents.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
    /// Git cannot be run.
    #[error(transparent)]
    Git(#[from] GitError),
}

/// Commits in a repository of ours.
#[derive(Debug)]
pub(super) struct Built {
    pub(super) base: String,
    pub(super) tip: String,
    pub(super) notes: Vec<String>,
}

/// Makes the commits in `git`.
pub(super) fn build(git: &Git, lender: &Lender, wanted: &Build<'_>) -> Result<Built, BuildError> {
    let bounds = Bounds::default();
    let base = base_of(git, wanted, &bounds)?;
    let entries = chosen(wanted.changes, wanted.include, &Only::new(wanted.only)?);
    let mut sorted = sparse::sort(&entries, false);
    let mut notes = std::mem::take(&mut sorted.notes);
    if !sorted.git.is_empty() {
        notes.push(note("changes inside of .git", sorted.git.iter().map(|change| change.path)));
    }
    let from = match agents_tip(git, lender, wanted, &base, &mut notes)? {
        Some(tip) => tip,
        None => base.clone(),
    };
    let prefix = match lender.repository.prefix.as_slice() {
        b"" => Vec::new(),
        prefix => [prefix, b"/"].concat(),
    };
    let modules = submodules(git, &from, &bounds)?;
    let inside = |path: &TreePath| {
        let full = [&prefix[..], path.as_bytes()].concat();
        modules
            .iter()
            .any(|module| full.strip_prefix(&module[..]).is_some_and(|rest| rest.first() == Some(&b'/')))
            || modules.contains(&full)
    };
    let (left, changes): (Vec<&Change<'_>>, Vec<&Change<'_>>) =
        sorted.changes.iter().partition(|change| inside(change.path));
    if !left.is_empty() {
        notes.push(note("changes inside of submodules", left.iter().map(|change| change.path)));
    }
    let message = message(wanted, from != base);
    let ident = format!("{} {} +0000", wanted.author.line(), wanted.now_s);
    let commit = NewCommit {
        name: NEW,
        from: Some(&from),
        ident: &ident,
        message: &message,
        prefix: &prefix,
        gone: changes.iter().filter(|change| change.after.is_none()).map(|change| change.path).collect(),
        there: changes.iter().filter_map(|change| Some((change.path, change.after?))).collect(),
    };
    let mut feed = |to: &mut dyn Write| sparse::write(to, wanted.shelf, std::slice::from_ref(&commit));
    import(git, &mut feed, &bounds)?;
    let tip = if same_tree(git, &from, &bounds)? { from } else { object(git, NEW, &bounds)? };
    if tip == base {
        return Err(BuildError::Nothing);
    }
    Ok(Built { base, tip, notes })
}

/// The commit to build on, which must be there.
fn base_of(git: &Git, wanted: &Build<'_>, bounds: &Bounds) -> Result<String, BuildError> {
    let Some(base) = wanted.changes.base.commit.clone() else {
        return Err(BuildError::NoBase { why: "the workspace is no git repository, or has no commit yet" });
    };
    match git.text(&["cat-file", "-e", &format!("{base}^{{commit}}")], None, bounds) {
        Ok(_) => Ok(base),
        Err(GitError::Failed { .. }) => {
            Err(BuildError::BaseGone { commit: base, path: wanted.path.to_owned() })
        }
        Err(error) => Err(error.into()),
    }
}

/// The agent's newest commit, if the agent's commits can be taken as they are.
fn agents_tip(
    git: &Git,
    lender: &Lender,
    wanted: &Build<'_>,
    base: &str,
    notes: &mut Vec<String>,
) -> Result<Option<String>, BuildError> {
    let Some(commits) = &wanted.changes.commits else { return Ok(None) };
    if !wanted.only.is_empty() {
        notes.push("the agent's own commits are not in it: --only takes parts of them".to_owned());
        return Ok(None);
    }
    let mut bundle = wanted.shelf.blob(&commits.bundle)?;
    let limits = BundleLimits::default();
    let Some((tip, _)) = take_in(git, &mut bundle, lender.format, Some(base), &limits)? else {
        return Ok(None);
    };
    // A commit cannot be taken in parts: one that touches what is not to be applied keeps all of them out.
    let prefix = &lender.repository.prefix;
    let meant = chosen(wanted.changes, wanted.include, &Only::new(&[])?);
    let meant: BTreeSet<&[u8]> = meant.iter().map(|entry| entry.path.as_bytes()).collect();
    let kept_out = wanted.changes.entries.iter().map(|entry| entry.path.as_bytes());
    let kept_out: BTreeSet<&[u8]> = kept_out.filter(|path| !meant.contains(path)).collect();
    let mut feed = |to: &mut dyn Write| writeln!(to, "{tip}\n^{base}");
    let bounds = Bounds { output_bytes_max: LIST_BYTES_MAX, ..Bounds::default() };
    let all = git.text(&["rev-list", "--stdin"], Some(&mut feed), &bounds)?;
    let mut feed = |to: &mut dyn Write| to.write_all(&all);
    let mut bad = None;
    let mut look = |path: &[u8]| {
        let below = path.strip_prefix(&prefix[..]).map(|rest| rest.strip_prefix(b"/").unwrap_or(rest));
        let outside =
            below.is_none_or(|below| kept_out.contains(below) || below.split(|b| *b == b'/').any(is_dot_git));
        if outside && bad.is_none() {
            bad = Some(String::from_utf8_lossy(path).into_owned());
        }
    };
    let args = [
        "diff-tree",
        "--stdin",
        "-m",
        "-r",
        "-z",
        "--root",
        "--no-commit-id",
        "--name-only",
        "--no-renames",
        "--ignore-submodules=none",
    ];
    git.run(&args, Some(&mut feed), &mut Names { rest: Vec::new(), each: &mut look }, &bounds)?;
    match bad {
        None => Ok(Some(tip)),
        Some(path) => {
            notes.push(format!(
                "the agent's own commits are not in it: they touch {path:?}, which is flagged, refused or outside \
                 of the workspace"
            ));
            Ok(None)
        }
    }
}

/// Paths of submodules in a commit.
fn submodules(git: &Git, commit: &str, bounds: &Bounds) -> Result<BTreeSet<Vec<u8>>, GitError> {
    let mut found = BTreeSet::new();
    let mut look = |line: &[u8]| {
        if line.starts_with(b"160000 ")
            && let Some(at) = line.iter().position(|byte| *byte == b'\t')
        {
            found.insert(line[at + 1..].to_vec());
        }
    };
    let mut names = Names { rest: Vec::new(), each: &mut look };
    let bounds = Bounds { output_bytes_max: LIST_BYTES_MAX, ..*bounds };
    git.run(&["ls-tree", "-r", "-z", "--full-tree", commit], None, &mut names, &bounds)?;
    Ok(found)
}

fn same_tree(git: &Git, from: &str, bounds: &Bounds) -> Result<bool, GitError> {
    let tree = |of: &str| object(git, &format!("{of}^{{tree}}"), bounds);
    Ok(tree(from)? == tree(NEW)?)
}

fn object(git: &Git, name: &str, bounds: &Bounds) -> Result<String, GitError> {
    let id = git.text(&["rev-parse", "--verify", "--end-of-options", name], None, bounds)?;
    Ok(String::from_utf8_lossy(&id).trim().to_owned())
}

fn message(wanted: &Build<'_>, beyond: bool) -> String {
    let plain = if beyond { "What the agent left without a commit" } else { "Work of an agent" };
    let text = wanted.message.map(str::trim).filter(|text| !text.is_empty()).unwrap_or(plain);
    format!("{}\n\n{}: {}\n", text.replace('\0', ""), crate::git::commit_hook::TRAILER, wanted.job)
}

/// Calls `each` with every part that ends in NUL.
struct Names<'a> {
    rest: Vec<u8>,
    each: &'a mut dyn FnMut(&[u8]),
}

impl Write for Names<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut parts = bytes.split(|byte| *byte == 0);
        let last = parts.next_back().unwrap_or_default();
        for part in parts {
            self.rest.extend_from_slice(part);
            (self.each)(&self.rest);
            self.rest.clear();
        }
        self.rest.extend_from_slice(last);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
