//! What becomes of a job's changes: taken out of its copy when its cell has ended, kept until its submitter decides,
//! and applied with the submitter's rights alone. It must never let a job be called done before its change set is on
//! the disk or its loss is told, and never touch a person's files without being asked to.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::record::{Record, RecordError};
use super::{Accepted, Parts};
use crate::change::decision::{ApplyAnswer, ApplyRequest, ExportFormat, Form, Standing};
use crate::change::{ChangeSet, Summary};
use crate::changes::{self, JobShelf, Shelf, ShelfError};
use crate::clock;
use crate::event::Body;
use crate::job::{Identity, JobId};
use crate::store::Job;
use crate::workspace::{self, Access, Guard, WorkspaceError, WorkspaceRecord};

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
    None(String),
    /// What was asked for makes no sense.
    #[error("{key}: {problem}")]
    Asked {
        /// Which key of the request.
        key: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// Something is not what it was when the job began.
    #[error("nothing was written: {count} of the paths {what}: {list}")]
    Conflict {
        /// How many.
        count: usize,
        /// What is in the way, in words.
        what: String,
        /// The first of them.
        list: String,
    },
    /// The directory cannot be used.
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
    /// There is no space.
    #[error("there is no space left: {0}")]
    DiskFull(String),
    /// Another request works on the same change set.
    #[error("the change set is being applied already")]
    Busy,
    /// A fault of the host.
    #[error("{0}")]
    Fault(String),
}

impl From<ShelfError> for ChangesError {
    fn from(error: ShelfError) -> Self {
        Self::Fault(error.to_string())
    }
}

/// Where what is kept of a job lies.
pub fn shelf(parts: &Parts, job: &JobId) -> JobShelf {
    Shelf::new(parts.settings.changes_dir()).of(job)
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
