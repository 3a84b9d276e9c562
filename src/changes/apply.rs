//! Applies a change set to a directory of the submitter's, all of it or nothing: looks at every path first, writes
//! new contents into a hidden staging directory there, notes all steps in a journal beside the change set, and moves.
//! Everything in the directory is done with the submitter's rights and by descriptors. It must never follow a
//! symbolic link or leave the mount, delete what it did not look at, or leave a directory half changed: what a dead
//! process began, [`recover`] takes back or finishes.

mod accept;
mod carry;
mod checkout;
mod journal;
mod judge;
mod look;
mod merge;
mod moves;
mod plan;
mod run;
mod select;
mod stage;
#[cfg(test)]
mod tests;
mod unfinished;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::change::{ChangeSet, TreePath};
use crate::changes::{JobShelf, ShelfError};
use crate::job::Identity;
use crate::workspace::WorkspaceError;

pub use crate::changes::{BadGlob, Only};
pub use accept::{Accepted, Decision, Discarded, branched, decision, discard};
pub use carry::{materialise, materialise_plain};
pub use checkout::{CheckedOut, Checkout, checkout};
pub use journal::Pending;
pub use run::{Recovered, apply, give_up, pending, recover};
pub use unfinished::recover_checkouts;

/// Longest application; its thread goes on alone then.
const APPLY_TIME_MAX: Duration = Duration::from_secs(30 * 60);
/// Most conflicts, and most paths of others, that a message names.
const NAMED_MAX: usize = 20;

/// Called before each step; an error stops there. For tests of what happens then.
type Step = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// What the person wants.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Wish {
    /// Globs as in gitignore; only what they match. All where there is none.
    pub only: Vec<String>,
    /// What the policy flags is applied too.
    pub include_flagged: bool,
    /// Texts that were changed on both sides are merged.
    pub three_way: bool,
    /// Nothing is changed: only said what would be.
    pub check: bool,
}

/// What is applied to what.
#[derive(Debug)]
pub struct Apply<'a> {
    /// Where the contents are.
    pub shelf: &'a JobShelf,
    /// The changes.
    pub changes: &'a ChangeSet,
    /// The directory, opened by the submitter (`O_PATH` is enough).
    pub target: OwnedFd,
    /// Its path, for messages and the record.
    pub path: &'a Path,
    /// The submitter.
    pub identity: &'a Identity,
    /// What is wanted.
    pub wish: &'a Wish,
}

/// A path that is not applied, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LeftOut {
    /// Which.
    pub path: TreePath,
    /// Why, in words.
    pub why: String,
}

/// A path that is neither as the job found it nor as it left it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Conflict {
    /// Which.
    pub path: TreePath,
    /// What is in the way, in words.
    pub why: String,
}

/// What was done; with [`Wish::check`] what would be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Applied {
    /// Paths that were changed.
    pub applied: Vec<TreePath>,
    /// Paths that were as they should be.
    pub already: Vec<TreePath>,
    /// Those of `applied` where both sides' changes came together.
    pub merged: Vec<TreePath>,
    /// Paths that were not touched, by the policy or because they depend on such.
    pub left_out: Vec<LeftOut>,
    /// Directories that the change set deletes and that hold other things: they stay.
    pub kept_dirs: Vec<TreePath>,
    /// The staging directory could not be removed: nothing of it is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_behind: Option<PathBuf>,
}

/// Why nothing was applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// Paths are not as the job found them; nothing was changed.
    #[error("{} and nothing was changed; apply the rest with --only, or merge texts with --3way:{}", counted(.0), listed(.0))]
    Conflicts(Vec<Conflict>),
    /// There is nothing to apply.
    #[error("there is nothing to apply: {why}")]
    Nothing {
        /// Why not.
        why: &'static str,
    },
    /// `only` is no glob.
    #[error(transparent)]
    Glob(#[from] BadGlob),
    /// The same change set is being applied just now.
    #[error("this change set is being applied just now: wait until that is done")]
    Busy,
    /// An earlier application was interrupted and is not put right yet.
    #[error(
        "an earlier application to {path:?} was interrupted: it is put right when the daemon starts and {path:?} can be opened"
    )]
    Interrupted {
        /// What it was applied to.
        path: PathBuf,
    },
    /// The directory is not the one that an interrupted application was about.
    #[error("{path:?} is not the directory that the change set was being applied to: bring that one back")]
    TargetMoved {
        /// Which.
        path: PathBuf,
    },
    /// Something is where a checkout should be made.
    #[error("{path:?} is there and is not an empty directory: name one that is not there")]
    Occupied {
        /// Where.
        path: PathBuf,
    },
    /// The disk is full; nothing was changed.
    #[error("the disk is full: cannot {doing} {path:?}; nothing was changed: make room and try again")]
    DiskFull {
        /// The step.
        doing: &'static str,
        /// What on.
        path: PathBuf,
    },
    /// The kernel said no; nothing was changed.
    #[error("cannot {doing} {path:?}: {source}; nothing was changed")]
    Io {
        /// The step.
        doing: &'static str,
        /// What on.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
    /// It failed, and taking it back met something that somebody else had changed meanwhile.
    #[error("{cause}, and not everything could be taken back; what was there before is kept in {staging:?}:{}", lines(.what))]
    Stuck {
        /// What failed first.
        cause: String,
        /// The directory that keeps what has no place any more.
        staging: PathBuf,
        /// Path by path, in words.
        what: Vec<String>,
    },
    /// What is kept of the job cannot be read or written.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
    /// The submitter's rights cannot be taken, or the file system does not answer.
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
}

fn counted(conflicts: &[Conflict]) -> String {
    match conflicts.len() {
        1 => "1 path is in conflict".to_owned(),
        many => format!("{many} paths are in conflict"),
    }
}

fn listed(conflicts: &[Conflict]) -> String {
    lines(&conflicts.iter().map(|one| format!("{}: {}", one.path, one.why)).collect::<Vec<_>>())
}

fn lines(all: &[String]) -> String {
    let mut text: String =
        all.iter().take(NAMED_MAX).map(|one| format!("\n  {}", one.escape_debug())).collect();
    if let Some(more) = all.len().checked_sub(NAMED_MAX).filter(|more| *more > 0) {
        text.push_str(&format!("\n  and {more} more"));
    }
    text
}

/// An error of the file system; a full disk has its own.
fn at<E: Into<io::Error>>(doing: &'static str, path: &Path) -> impl FnOnce(E) -> ApplyError {
    let path = path.to_owned();
    move |error| {
        let source = error.into();
        match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => ApplyError::DiskFull { doing, path },
            _ => ApplyError::Io { doing, path, source },
        }
    }
}
