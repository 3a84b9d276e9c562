//! The report of a job: the one file that its policy keeps. Taken out of the cell's scratch space while that still
//! exists, kept beside the journal, served to the owner. Its content is the agent's: bytes, and nothing more.

use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use super::Parts;
use super::record::{Record, RecordError};
use crate::event::Body;
use crate::job::JobId;
use crate::policy::output::{Output, Place};
use crate::workspace::{self, Scratch, TakeError, Taken};

/// Its name in the job's directory.
pub const FILE_NAME: &str = "report";

/// What was kept, or why nothing was.
enum Kept {
    /// Its length in bytes, and what it was cut to.
    Yes { bytes: u64, cut: bool },
    /// In words.
    No(String),
}

/// Takes the report of a job whose cell has ended, where its policy wants one: its length in bytes, or none.
/// Whatever the agent left there, the job goes on to its end.
///
/// # Errors
/// [`RecordError`] where the note about it cannot be journaled.
pub(super) async fn collect(parts: &Arc<Parts>, record: &mut Record) -> Result<Option<u64>, RecordError> {
    let output = record.accepted.plan.output.clone();
    let Some(report) = output.report.clone() else { return Ok(None) };
    let cells = parts.store.live_cells().await?;
    let Some(cell) = cells.into_iter().find(|row| row.job == record.job && row.runtime.is_some()) else {
        // An earlier daemon has taken it, or no cell ever ran.
        return Ok(length(parts, &record.job).await);
    };
    let cell_dir = parts.settings.cells_dir().join(cell.cell.as_str());
    let job_dir = parts.settings.journal_dir(&record.job);
    let kept = tokio::task::spawn_blocking(move || keep(&cell_dir, &job_dir, &output)).await;
    let kept = kept.unwrap_or_else(|error| Kept::No(error.to_string()));
    let (length, note) = match kept {
        Kept::Yes { bytes, cut: false } => (Some(bytes), None),
        Kept::Yes { bytes, cut: true } => (Some(bytes), Some(format!("was cut to {bytes} bytes"))),
        Kept::No(why) => (None, Some(format!("is not kept: {why}"))),
    };
    if let Some(note) = note {
        record.push(&Body::Note { text: format!("the report {} {note}", report.display()) })?;
    }
    Ok(length)
}

fn keep(cell_dir: &Path, job_dir: &Path, output: &Output) -> Kept {
    let scratch = match Scratch::adopt(cell_dir) {
        Ok(Some(scratch)) => scratch,
        Ok(None) => return Kept::No("the cell has no scratch space".to_owned()),
        Err(error) => return Kept::No(error.to_string()),
    };
    let root = match output.report_place() {
        Some((Place::Home, _)) => scratch.home(),
        Some((Place::Tmp, _)) => scratch.tmp(),
        None => return Kept::No("it lies in no place of the cell's own".to_owned()),
    };
    let below = output.report_place().map(|(_, below)| below).unwrap_or(Path::new(""));
    let file = job_dir.join(FILE_NAME);
    match workspace::take_file(&root, below, output.report_bytes_max) {
        Ok(Taken { bytes, cut }) => match store(&file, &bytes) {
            Ok(()) => Kept::Yes { bytes: bytes.len() as u64, cut },
            Err(error) => Kept::No(format!("it cannot be stored: {error}")),
        },
        Err(error) => {
            // One of an earlier attempt is not this one's.
            let _ = std::fs::remove_file(&file);
            Kept::No(match error {
                TakeError::Missing => "the agent wrote none".to_owned(),
                other => other.to_string(),
            })
        }
    }
}

/// On the disk before the job is done, and whole or not at all.
fn store(file: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    let fresh = file.with_extension("new");
    let mut options = std::fs::OpenOptions::new();
    let mut out = options.write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    out.write_all(bytes).and_then(|()| out.sync_all())?;
    std::fs::rename(&fresh, file)
}

async fn length(parts: &Parts, job: &JobId) -> Option<u64> {
    let file = parts.settings.journal_dir(job).join(FILE_NAME);
    tokio::fs::metadata(file).await.ok().map(|meta| meta.len())
}

/// The report of a job; none where none was kept.
///
/// # Errors
/// Those of reading the file.
pub async fn read(parts: &Parts, job: &JobId) -> std::io::Result<Option<Vec<u8>>> {
    match tokio::fs::read(parts.settings.journal_dir(job).join(FILE_NAME)).await {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
