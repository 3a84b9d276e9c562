//! Takes out what a job changed in its copy, when its cell has ended. It must never let a copy be destroyed before its
//! change set is on the disk or its loss is told.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::super::record::{Record, RecordError};
use super::super::{Accepted, Parts, bundle, park};
use super::{ChangesError, blocking, kept, shelf};
use crate::change::{Commits, HideRules, Summary};
use crate::changes::export;
use crate::changes::{self, Bases, ExtractLimits, Extraction, JobShelf, Listing, Outer, Tree};
use crate::event::Body;
use crate::git::above::{self, Above};
use crate::git::head::Head;
use crate::job::Identity;
use crate::job::spec::WorkspaceMode;
use crate::metrics::CopyStep;
use crate::workspace::{self, CopyParts, Guard, WorkspaceError};

/// Files above so many bytes that are no text are told apart.
const LARGE_BYTES: u64 = 1 << 20;

/// Takes out what a job changed in its copy, whose cell has ended and is not destroyed yet: its figures, or none where
/// there is no copy. What goes wrong is told in a note; the copy is kept then, so that nothing is lost. `again`: an
/// earlier daemon was at it already; what it has finished is not done anew, since its copy may be half removed.
///
/// # Errors
/// [`RecordError`] where the event about it cannot be journaled.
pub(in crate::cell) async fn collect(
    parts: &Arc<Parts>,
    record: &mut Record,
    again: bool,
) -> Result<Option<Summary>, RecordError> {
    if !has_copy(record) {
        return Ok(None);
    }
    let shelf = shelf(parts, &record.job);
    let cells = parts.store.live_cells().await?;
    let cell = cells.into_iter().find(|row| row.job == record.job && row.runtime.is_some());
    if let Some(row) = &cell {
        // Nobody writes while it is read.
        park::container_gone(parts, row).await;
    }
    let dir = cell.map(|row| parts.settings.cells_dir().join(row.cell.as_str()));
    let copy = dir.as_ref().and_then(|dir| Some((dir, workspace::parts_of(dir, None)?)));
    let before = match again {
        true => taken_before(&shelf).await,
        false => Ok(None),
    };
    let mut known = Ok(None);
    let taken = match (before, copy) {
        (Ok(Some(summary)), _) => Ok(Some(summary)),
        (Err(error), _) => Err(error),
        (Ok(None), Some((dir, copy))) => {
            take_out(parts, record, dir, copy, &shelf, &mut known).await.map(Some)
        }
        // No cell ever had one.
        (Ok(None), None) => Ok(None),
    };
    match taken {
        Ok(summary) => {
            shelf.forget_index();
            summary.map(|summary| tell(record, summary)).transpose()
        }
        Err(why) => {
            tracing::error!(job = %record.job, %why, "what a job changed cannot be taken out of its copy");
            let kept = put_away(parts, record, known).await;
            let text = format!("what the job changed cannot be taken out of its copy: {why}; {kept}");
            record.push(&Body::Note { text })?;
            Ok(None)
        }
    }
}

/// The same of a copy whose cell, in `dir`, is not destroyed yet. `known`: the agent's commits, whatever becomes of the
/// rest.
async fn take_out(
    parts: &Arc<Parts>,
    record: &mut Record,
    dir: &Path,
    copy: CopyParts,
    shelf: &JobShelf,
    known: &mut Result<Option<Commits>, String>,
) -> Result<Summary, ChangesError> {
    let seen = match copy.form {
        workspace::Form::Overlay => workspace::view_of(dir, None),
        workspace::Form::Whole => copy.dir.clone(),
    };
    let base = origin(shelf);
    let commits = bundle::commits(parts, record, shelf, (dir, &seen), base.commit.as_deref()).await;
    known.clone_from(&commits);
    // Nobody looks through it any more. Where the agent looked at many files that takes a while, and it is waited for
    // beside the rest.
    let view = dir.to_owned();
    let unmounting = tokio::task::spawn_blocking(move || workspace::unmount_views(&view));
    let (accepted, identity, shelf) = (record.accepted.clone(), record.identity.clone(), shelf.clone());
    let state_dir = parts.settings.state_dir.clone();
    let found = Found { copy, base, commits };
    let begun = Instant::now();
    let taken = blocking(move || take(&accepted, &identity, found, &shelf, &state_dir)).await;
    parts.metrics.copy_step(CopyStep::Extraction, begun.elapsed());
    if let Err(error) = unmounting.await.unwrap_or_else(|e| Err(std::io::Error::other(e))) {
        tracing::warn!(job = %record.job, %error, "the view of a copy is left to the sweep");
    }
    taken
}

async fn taken_before(shelf: &JobShelf) -> Result<Option<Summary>, ChangesError> {
    let shelf = shelf.clone();
    blocking(move || Ok(shelf.changes()?.map(|(set, hash)| set.summary(hash)))).await
}

/// Keeps the copy itself: what became of it, in words.
async fn put_away(parts: &Arc<Parts>, record: &Record, commits: Result<Option<Commits>, String>) -> String {
    match park::keep_work(parts, record).await {
        Ok(true) => {
            let (from, shelf) = (parts.settings.kept(&record.job), shelf(parts, &record.job));
            kept::put_image_away(from, shelf, commits).await
        }
        Ok(false) => "its copy is lost with its cell".to_owned(),
        Err(error) => format!("its copy cannot be kept either: {error}"),
    }
}

/// Whether what the job changes is taken out of a copy.
pub(super) fn has_copy(record: &Record) -> bool {
    record.accepted.plan.workspace_mode == WorkspaceMode::Copy && record.accepted.workspace.is_some()
}

pub(super) fn tell(record: &mut Record, summary: Summary) -> Result<Summary, RecordError> {
    record.push(&Body::Changes { summary: Box::new(summary.clone()) })?;
    Ok(summary)
}

/// What is known of a copy before it is taken.
pub(super) struct Found {
    pub(super) copy: CopyParts,
    pub(super) base: Head,
    pub(super) commits: Result<Option<Commits>, String>,
}

/// What was checked out when the job began.
pub(super) fn origin(shelf: &JobShelf) -> Head {
    shelf.origin().unwrap_or_else(|error| {
        tracing::warn!(%error, "what was checked out when a job began cannot be read");
        Head::default()
    })
}

/// What the repository above a workspace says of it now.
fn outer_of(identity: &Identity, above: &Above) -> Result<Outer, WorkspaceError> {
    let (exclude, files) = above::ignores(identity, above)?;
    Ok(Outer { below: above.below.clone(), exclude, files })
}

/// Takes it. Blocks.
pub(super) fn take(
    accepted: &Accepted,
    identity: &Identity,
    Found { copy, base, commits }: Found,
    shelf: &JobShelf,
    state_dir: &Path,
) -> Result<Summary, ChangesError> {
    let record = accepted.workspace.as_ref().ok_or(ChangesError::None("the job had no workspace"))?;
    let listing =
        shelf.base()?.ok_or(ChangesError::None("there is no listing of the workspace before the job"))?;
    let listing = Listing::decode(&listing).map_err(|e| ChangesError::Corrupt(e.to_string()))?;
    shelf.tidy()?;
    let guard = Guard::for_user(state_dir, identity.uid);
    // Moved or gone meanwhile: what it was is not known any more, what the job made of it is.
    let original = workspace::reopen_as(identity, record, &guard).ok();
    let hide = HideRules::new(&accepted.plan.hide).map_err(|e| ChangesError::Corrupt(e.to_string()))?;
    let limits = ExtractLimits { large_bytes: LARGE_BYTES, ..ExtractLimits::default() };
    let tree = match copy.form {
        workspace::Form::Overlay => Tree::Upper { upper: &copy.dir },
        workspace::Form::Whole => Tree::Whole { tree: &copy.dir },
    };
    let index = shelf.index()?;
    let temporary = export::temporary();
    let bases = index.as_ref().map(|(index, written_ns)| Bases {
        index,
        written_ns: *written_ns,
        path: &record.path,
        temporary,
    });
    let outer = accepted.above.as_ref().map(|above| outer_of(identity, above)).transpose()?;
    let mut set = changes::extract(&Extraction {
        tree,
        original: original.as_ref().map(AsFd::as_fd),
        listing: &listing,
        shelf,
        hide: &hide,
        changes: &accepted.plan.changes,
        keep_ignored: accepted.keep_ignored,
        bases: bases.as_ref(),
        outer: outer.as_ref(),
        identity,
        limits: &limits,
    })?;
    (set.base.commit, set.base.branch) = (base.commit, base.branch);
    match commits {
        Ok(commits) => set.commits = commits,
        Err(why) => set.notes.push(why),
    }
    let hash = shelf.put_changes(&set)?;
    Ok(set.summary(hash))
}
