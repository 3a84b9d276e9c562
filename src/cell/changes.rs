//! What becomes of a job's changes: taken out of its copy when its cell has ended, kept until its submitter decides,
//! and applied with the submitter's rights alone. It must never let a job be called done before its change set is on
//! the disk or its loss is told, and never touch a person's files without being asked to.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::record::{Record, RecordError};
use super::{Accepted, Parts, park};
use crate::change::decision::{ApplyAnswer, ApplyRequest, BranchMade, ExportFormat, Form, LeftOut, Standing};
use crate::change::{ChangeSet, Summary};
use crate::changes::apply::{self, Apply, ApplyError, Applied, Wish};
use crate::changes::{JobShelf, Shelf, ShelfError};
use crate::event::Body;
use crate::job::spec::WorkspaceMode;
use crate::job::{Identity, JobId};
use crate::store::Job;
use crate::workspace::{self, Access, CopyParts, Guard, WorkspaceError, WorkspaceRecord};

/// A change set as it is kept.
#[derive(Debug, Clone)]
pub struct Kept {
    /// It.
    pub set: ChangeSet,
    /// SHA-256 of its stored form, in hex.
    pub hash: String,
    /// What was decided about it.
    pub standing: Standing,
}

/// Why nothing can be shown, or nothing was done.
#[derive(Debug, thiserror::Error)]
pub enum ChangesError {
    /// The job goes on.
    #[error("the job is not done: what it changed is known at its end")]
    NotDone,
    /// There is no change set.
    #[error("there is no change set: {0}")]
    None(&'static str),
    /// It was thrown away.
    #[error("the change set was discarded")]
    Discarded,
    /// The job's row does not parse.
    #[error("the stored job does not parse: {0}")]
    Corrupt(String),
    /// The directory cannot be used.
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
    /// It cannot be applied.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// What is kept cannot be read.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
    /// The work died.
    #[error("the work on the change set ended early: {0}")]
    Died(String),
}

/// Where what is kept of a job lies.
pub fn shelf(parts: &Parts, job: &JobId) -> JobShelf {
    Shelf::new(parts.settings.changes_dir()).of(job)
}

/// The change set of a job that is done.
///
/// # Errors
/// [`ChangesError`].
pub async fn read(parts: &Parts, job: &Job) -> Result<Kept, ChangesError> {
    let shelf = shelf(parts, &job.row.id);
    let done = job.row.state.is_done();
    let found = blocking(move || Ok((shelf.changes()?, apply::decision(&shelf)?))).await?;
    let (Some((set, hash)), decision) = found else {
        return Err(if done { ChangesError::None(why_none(&accepted(job)?)) } else { ChangesError::NotDone });
    };
    let standing = match (&decision.discarded, decision.applied.is_empty()) {
        (Some(_), _) => Standing::Discarded,
        (None, false) => Standing::Applied,
        (None, true) => Standing::Open,
    };
    if done { Ok(Kept { set, hash, standing }) } else { Err(ChangesError::NotDone) }
}

fn why_none(accepted: &Accepted) -> &'static str {
    match (accepted.plan.workspace_mode, &accepted.workspace) {
        (WorkspaceMode::Copy, Some(_)) => "the job ended before it had a copy, or what it wrote could not be read",
        (WorkspaceMode::Bind, Some(_)) => "the job worked on the directory itself",
        (WorkspaceMode::ReadOnly, Some(_)) => "the job could not write to its workspace",
        (WorkspaceMode::None, _) | (_, None) => "the job had no workspace",
    }
}

fn accepted(job: &Job) -> Result<Accepted, ChangesError> {
    serde_json::from_str(&job.plan_json).map_err(|e| ChangesError::Corrupt(e.to_string()))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ChangesError> + Send + 'static,
) -> Result<T, ChangesError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(ChangesError::Died(e.to_string())))
}

/// Applies it, as its submitter and to their files.
///
/// # Errors
/// [`ChangesError`]; nothing was written then, as far as the error does not say otherwise.
pub async fn apply(parts: &Parts, job: &Job, request: ApplyRequest) -> Result<ApplyAnswer, ChangesError> {
    let kept = wanted(parts, job).await?;
    let (shelf, accepted, identity) = (shelf(parts, &job.row.id), accepted(job)?, job.row.identity.clone());
    let guard = Guard::for_user(&parts.settings.state_dir, identity.uid);
    blocking(move || {
        let ApplyRequest { to, only, include_flagged, three_way, check, branch: _ } = request;
        let (target, path) = match (to, &accepted.workspace) {
            (Some(to), _) => (workspace::open_as(&identity, &to, Access::Write, &guard)?.0, to),
            (None, Some(record)) => {
                let record = WorkspaceRecord { need: Access::Write, ..record.clone() };
                (workspace::reopen_as(&identity, &record, &guard)?, record.path)
            }
            (None, None) => return Err(ChangesError::None("the job had no workspace")),
        };
        let wish = Wish { only, include_flagged, three_way, check };
        let (shelf, changes) = (&shelf, &kept.set);
        let request = Apply { shelf, changes, target, path: &path, identity: &identity, wish: &wish };
        Ok(answer(apply::apply(&request)?, check))
    })
    .await
}

/// A change set that was not thrown away.
async fn wanted(parts: &Parts, job: &Job) -> Result<Kept, ChangesError> {
    let kept = read(parts, job).await?;
    if kept.standing == Standing::Discarded { Err(ChangesError::Discarded) } else { Ok(kept) }
}

fn answer(applied: Applied, checked: bool) -> ApplyAnswer {
    let Applied { applied, already, merged, left_out, kept_dirs, left_behind } = applied;
    let left_out = left_out.into_iter().map(|left| LeftOut { path: left.path, why: left.why }).collect();
    ApplyAnswer { checked, applied, already, merged, left_out, kept_dirs, left_behind, branch: None }
}

/// Notes that nobody wants it. What was stored goes with the job.
///
/// # Errors
/// [`ChangesError`].
pub async fn discard(parts: &Parts, job: &Job) -> Result<(), ChangesError> {
    read(parts, job).await?;
    let (shelf, uid) = (shelf(parts, &job.row.id), job.row.identity.uid);
    blocking(move || Ok(apply::discard(&shelf, uid)?)).await
}

/// Puts right what a dead daemon left half applied. What cannot be put right now stays noted and is tried again when
/// the daemon starts next.
pub async fn recover(parts: &Parts, job: &JobId) {
    let (shelf, state_dir, id) = (shelf(parts, job), parts.settings.state_dir.clone(), job.clone());
    let put_right = blocking(move || {
        let Some(pending) = apply::pending(&shelf)? else { return Ok(()) };
        let guard = Guard::for_user(&state_dir, pending.identity.uid);
        let (target, _) = workspace::open_as(&pending.identity, &pending.path, Access::Write, &guard)?;
        let became = apply::recover(&shelf, &target)?;
        tracing::warn!(job = %id, path = %pending.path.display(), ?became, "an interrupted application was put right");
        Ok(())
    });
    if let Err(error) = put_right.await {
        tracing::error!(%job, %error, "an interrupted application cannot be put right now");
    }
}

/// Takes out what a job changed in its copy, whose cell has ended and is not destroyed yet: its figures, or none where
/// there is no copy. What goes wrong is told in a note; the copy is kept then, so that nothing is lost.
///
/// # Errors
/// [`RecordError`] where the event about it cannot be journaled.
pub(super) async fn collect(parts: &Arc<Parts>, record: &mut Record) -> Result<Option<Summary>, RecordError> {
    let Some(workspace) = copied(record) else { return Ok(None) };
    let shelf = shelf(parts, &record.job);
    let cells = parts.store.live_cells().await?;
    let cell = cells.into_iter().find(|row| row.job == record.job && row.runtime.is_some());
    let found = match cell {
        Some(row) => {
            let dir = parts.settings.cells_dir().join(row.cell.as_str());
            workspace::parts_of(&dir, None)
        }
        None => None,
    };
    let taken = match found {
        Some(copy) => {
            let job = take(record, copy, workspace, shelf.clone());
            tokio::task::spawn_blocking(job).await.map_err(|e| e.to_string()).and_then(|taken| taken)
        }
        // An earlier daemon has taken it, or no cell ever had one.
        None => stored(&shelf).map(|kept| kept.map(|(set, hash)| set.summary(hash))),
    };
    match taken {
        Ok(Some(summary)) => {
            record.push(&Body::Changes { summary: summary.clone() })?;
            Ok(Some(summary))
        }
        Ok(None) => Ok(None),
        Err(why) => {
            tracing::error!(job = %record.job, why, "what a job changed cannot be taken out of its copy");
            let kept = super::park::keep_work(parts, record).await;
            let where_is_it = match kept {
                Ok(true) => format!("its copy is kept as {}", parts.settings.kept(&record.job).display()),
                Ok(false) => "its copy is lost with its cell".to_owned(),
                Err(error) => format!("its copy cannot be kept either: {error}"),
            };
            let text = format!("what the job changed cannot be taken out of its copy: {why}; {where_is_it}");
            record.push(&Body::Note { text })?;
            Ok(None)
        }
    }
}
