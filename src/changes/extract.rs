//! Makes a change set: what a dead cell left (an overlay's upper directory, or a whole copy) against the listing of
//! the workspace before the job, with the contents on the shelf. No program is run, no link followed; the original is
//! read with its user's rights only, and only what is proven to be what the listing saw counts as the base.

mod bases;
mod contents;
mod original;
mod sorting;
mod walk;

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags};

use super::ignore::Outer;
use super::listing::{Listing, Seen};
use super::shelf::{JobShelf, ShelfError};
use crate::change::{Base, ChangeSet, HideRules, Ignored, TreePath, VERSION};
use crate::job::Identity;
use crate::policy::changes::Changes;

pub use bases::Bases;

/// Paths whose originals are looked at at once.
const STAT_BATCH: usize = 512;
/// Most names in one note.
const NAMES_MAX: usize = 10;

/// What a cell left.
#[derive(Debug, Clone, Copy)]
pub enum Tree<'a> {
    /// The upper directory of an overlay mounted with `redirect_dir=off,metacopy=off`, unmounted by now.
    Upper {
        /// The directory.
        upper: &'a Path,
    },
    /// A copy of the workspace without its hidden paths. Every file of it that is as long as it was is compared by its
    /// content: an agent can give a file that it wrote its old times again, and the time that nobody can set
    /// (`ctime`) is in the listing that of the original, not of its copy.
    Whole {
        /// The directory.
        tree: &'a Path,
    },
}

/// How much is taken.
#[derive(Debug, Clone)]
pub struct ExtractLimits {
    /// Most changed paths, ignored ones counted.
    pub entries_max: usize,
    /// Longest content; a longer one is named and refused.
    pub blob_bytes_max: u64,
    /// Bytes of all contents.
    pub blobs_bytes_max: u64,
    /// Binaries above this are flagged.
    pub large_bytes: u64,
    /// Ignored paths that are listed.
    pub ignored_listed_max: usize,
    /// Longest time.
    pub time_max: Duration,
}

impl Default for ExtractLimits {
    fn default() -> Self {
        Self {
            entries_max: 1_000_000,
            blob_bytes_max: 256 << 20,
            blobs_bytes_max: 4 << 30,
            large_bytes: 1 << 20,
            ignored_listed_max: 1000,
            time_max: Duration::from_secs(600),
        }
    }
}

/// What a change set is made of.
#[derive(Debug, Clone, Copy)]
pub struct Extraction<'a> {
    /// What the cell left; nobody writes there any more.
    pub tree: Tree<'a>,
    /// The user's directory; none where there is none any more.
    pub original: Option<BorrowedFd<'a>>,
    /// The original before the job.
    pub listing: &'a Listing,
    /// Where contents go. Its directories must be there.
    pub shelf: &'a JobShelf,
    /// What the cell did not see.
    pub hide: &'a HideRules,
    /// The policy's word on kinds of change.
    pub changes: &'a Changes,
    /// Ignored paths are entries like any other.
    pub keep_ignored: bool,
    /// Where contents can be had that the original has not any more.
    pub bases: Option<&'a Bases<'a>>,
    /// What its repository says of it from above, where it is a part of one's work tree.
    pub outer: Option<&'a Outer>,
    /// Whose rights the original is read with.
    pub identity: &'a Identity,
    /// How much is taken.
    pub limits: &'a ExtractLimits,
}

/// Why there is no change set.
#[derive(Debug, thiserror::Error)]
pub enum ExtractError {
    /// More changed paths than agreed.
    #[error(
        "more than {limit} paths changed: nothing was taken; raise the limit, or export the job's directory"
    )]
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// It took longer than agreed.
    #[error("the change set was not made in time: nothing was taken")]
    TooSlow,
    /// What lies there cannot have been left by a cell.
    #[error("what the job left cannot be trusted at {path:?}: {what}")]
    Corrupt {
        /// Where.
        path: String,
        /// What is wrong.
        what: &'static str,
    },
    /// The kernel said no.
    #[error("cannot {doing} {path:?} of what the job left: {source}")]
    Io {
        /// The step.
        doing: &'static str,
        /// What on.
        path: String,
        /// The kernel's word.
        source: std::io::Error,
    },
    /// Contents could not be kept.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
}

/// One path that may have changed.
#[derive(Debug, Clone)]
struct Candidate {
    path: TreePath,
    before: Option<Seen>,
    after: Option<Seen>,
}

/// Makes the change set; nothing but contents is written to the shelf. `base.commit`, `base.branch` and `commits` are
/// the caller's to fill. Blocks.
///
/// # Errors
/// [`ExtractError`].
pub fn extract(from: &Extraction<'_>) -> Result<ChangeSet, ExtractError> {
    let until = Instant::now() + from.limits.time_max;
    let (path, overlay) = match from.tree {
        Tree::Upper { upper } => (upper, true),
        Tree::Whole { tree } => (tree, false),
    };
    let io = |doing| {
        move |source: std::io::Error| ExtractError::Io { doing, path: path.display().to_string(), source }
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(|e| io("open")(e.into()))?;
    let paths_max =
        if overlay { from.limits.entries_max } else { from.limits.entries_max + from.listing.len() };
    let walked = walk::walk(&root, overlay, paths_max, until)?;
    let mut notes = Vec::new();
    if walked.too_long > 0 {
        notes.push(format!("{} paths are longer than 4095 bytes: they are left out", walked.too_long));
    }
    let candidates = sorting::candidates(from, &walked);
    if candidates.len() > from.limits.entries_max {
        return Err(ExtractError::TooMany { limit: from.limits.entries_max });
    }
    let original =
        original::Original::start(from.original, from.identity, until).map_err(io("read the original of"))?;
    let mut contents = contents::Contents::new(from, &root, overlay, original, until);
    let read = sorting::sort(from, candidates, &walked, &mut contents).and_then(|sorted| {
        let entries = contents.entries(&sorted.entries)?;
        let git_state = contents.entries(&sorted.git_state)?;
        contents.keep()?;
        Ok((git_state, entries, sorted))
    });
    notes.extend(contents.notes());
    contents.close();
    let (mut git_state, mut entries, sorted) = read?;
    sorting::finish(from, &walked, &mut entries, &mut git_state);
    notes.extend(sorting::notes(from.listing, &entries));
    let base = Base {
        snapshot: from.listing.hash(),
        entries: from.listing.len() as u64,
        commit: None,
        branch: None,
    };
    let ignored = Ignored { kept: from.keep_ignored, ..sorted.ignored };
    Ok(ChangeSet { version: VERSION, base, entries, git_state, ignored, commits: None, notes })
}

/// `names`, as many as are shown, and how many more there are.
fn some_of(names: &[String]) -> String {
    let shown = names.iter().take(NAMES_MAX).map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(NAMES_MAX) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests;
