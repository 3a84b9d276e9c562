//! Audits of jobs that were removed: `<state>/audit/<yyyy-mm>/<uid>.<job>.ndjson`, one file a job, its records as
//! they were told while it was there. Written, and on the disk, before the job's row and journal go; never changed
//! afterwards. A month that nobody needs any more is deleted by hand.
//!
//! *Invariant*: a job is in the store or its audit is here; after a crash between the two it is in both, and the
//! store counts.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::body::Bytes;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use super::Api;
use super::audit::Projected;
use crate::audit::{Filter, Record};
use crate::clock;
use crate::job::JobId;
use crate::journal::JournalError;
use crate::store::JobRow;

/// Most bytes of records that are handed on at a time, but for one longer record.
const CHUNK_BYTES_MAX: usize = 64 * 1024;
/// Longest line that is read; a record's event was shorter.
const LINE_BYTES_MAX: u64 = 64 << 20;

/// Where they are, below the state directory.
fn folder(api: &Api) -> PathBuf {
    api.parts.settings.state_dir.join("audit")
}

/// Why an audit could not be kept.
#[derive(Debug, thiserror::Error)]
pub(super) enum KeepError {
    /// The journal cannot be read.
    #[error("the job's events cannot be read, so its audit cannot be kept: {0}")]
    Journal(#[from] JournalError),
    /// The file cannot be written.
    #[error("the job's audit cannot be kept: {0}")]
    Write(#[from] io::Error),
}

/// Keeps the audit of a job that is over; writing it again gives the same file.
///
/// # Errors
/// [`KeepError`]: the job must not be removed then.
pub(super) async fn keep(api: &Arc<Api>, row: &JobRow) -> Result<(), KeepError> {
    let mut records = Projected::new(api, row.id.clone(), row.identity.uid, 0, Filter::default(), false);
    let month = month_of(row.ended_ms.unwrap_or(row.created_ms));
    let folder = folder(api);
    let dir = folder.join(month);
    // Nobody else reads what users had done.
    tokio::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).await?;
    let name = format!("{}.{}.ndjson", row.identity.uid, row.id);
    let part = dir.join(format!(".{name}.part"));
    let mut file = tokio::fs::File::create(&part).await?;
    while let Some(lines) = records.try_next().await? {
        file.write_all(&lines).await?;
    }
    file.flush().await?;
    file.sync_all().await?;
    tokio::fs::rename(&part, dir.join(name)).await?;
    for dir in [dir.as_path(), folder.as_path(), api.parts.settings.state_dir.as_path()] {
        tokio::fs::File::open(dir).await?.sync_all().await?;
    }
    Ok(())
}

/// Whether the audit of a removed job is here, of that user or of anybody.
pub(super) async fn is_kept(api: &Api, uid: Option<u32>, job: &JobId) -> bool {
    let (dir, job) = (folder(api), job.clone());
    let look = move || {
        months(&dir).into_iter().any(|month| match uid {
            Some(uid) => month.join(format!("{uid}.{job}.ndjson")).exists(),
            None => files(&month).iter().any(|file| file.job == job),
        })
    };
    tokio::task::spawn_blocking(look).await.unwrap_or(false)
}

/// `2026-01`, in UTC.
fn month_of(wall_ms: u64) -> String {
    clock::rfc3339(wall_ms).chars().take(7).collect()
}

/// A file of these.
#[derive(Debug, Clone, PartialEq, Eq)]
struct File {
    uid: u32,
    job: JobId,
    path: PathBuf,
}

/// Reads the files in their months' order, of one user or of all.
pub(super) struct Kept {
    api: Arc<Api>,
    uid: Option<u32>,
    filter: Filter,
    months: Option<VecDeque<PathBuf>>,
    files: VecDeque<File>,
    open: Option<(BufReader<tokio::fs::File>, u64)>,
}

impl Kept {
    /// A reader of what `filter` keeps.
    pub(super) fn new(api: Arc<Api>, uid: Option<u32>, filter: Filter) -> Self {
        Self { api, uid, filter, months: None, files: VecDeque::new(), open: None }
    }

    /// A reader of one job's, from the event after `after` on; none where that job's audit is not here.
    pub(super) async fn of_job(
        api: &Arc<Api>,
        uid: Option<u32>,
        job: &JobId,
        after: u64,
        filter: Filter,
    ) -> Option<Self> {
        let (dir, wanted) = (folder(api), job.clone());
        let found = tokio::task::spawn_blocking(move || {
            let mut all = months(&dir).into_iter().flat_map(|month| files(&month));
            all.find(|file| file.job == wanted && uid.is_none_or(|uid| uid == file.uid))
        });
        let file = tokio::fs::File::open(found.await.ok()??.path).await.ok()?;
        let mut kept = Self::new(api.clone(), uid, filter);
        (kept.months, kept.open) = (Some(VecDeque::new()), Some((BufReader::new(file), after)));
        Some(kept)
    }

    /// The next records as lines; none when there are no more. `after` says which of a job's the reader has.
    pub(super) async fn next(&mut self, after: impl Fn(&JobId) -> u64) -> Option<Bytes> {
        loop {
            if let Some((file, known)) = &mut self.open {
                match lines(file, *known, &self.filter).await {
                    Ok(lines) if !lines.is_empty() => return Some(lines.into()),
                    Ok(_) => {}
                    Err(error) => tracing::warn!(%error, "a kept audit ends early"),
                }
                self.open = None;
            }
            let file = self.following().await?;
            match tokio::fs::File::open(&file.path).await {
                Ok(open) => self.open = Some((BufReader::new(open), after(&file.job))),
                Err(error) => tracing::warn!(path = %file.path.display(), %error, "a kept audit is not told"),
            }
        }
    }

    async fn following(&mut self) -> Option<File> {
        loop {
            if let Some(file) = self.files.pop_front() {
                // Still in the store: the removal was not finished, and its journal was told.
                let there = self.api.parts.store.job(&file.job).await;
                let there = there.inspect_err(|error| tracing::warn!(%error, "an audit ends early")).ok()?;
                if there.is_none() && self.uid.is_none_or(|uid| uid == file.uid) {
                    return Some(file);
                }
                continue;
            }
            let dir = folder(&self.api);
            let months = match self.months.take() {
                Some(months) => months,
                None => tokio::task::spawn_blocking(move || months(&dir)).await.ok()?,
            };
            let month = self.months.insert(months).pop_front()?;
            self.files = tokio::task::spawn_blocking(move || files(&month)).await.ok()?;
        }
    }
}

/// The next records that are wanted, as lines; none at the end.
async fn lines(
    file: &mut BufReader<tokio::fs::File>,
    known: u64,
    filter: &Filter,
) -> Result<Vec<u8>, io::Error> {
    let (mut out, mut line) = (Vec::new(), Vec::new());
    while out.len() < CHUNK_BYTES_MAX {
        line.clear();
        let mut bounded = tokio::io::AsyncReadExt::take(&mut *file, LINE_BYTES_MAX);
        if bounded.read_until(b'\n', &mut line).await? == 0 {
            break;
        }
        let record: Record = serde_json::from_slice(&line)?;
        if record.seq > known && filter.keeps(&record) {
            out.extend_from_slice(&line);
        }
    }
    Ok(out)
}

/// The months that are there, the oldest first.
fn months(dir: &Path) -> VecDeque<PathBuf> {
    let mut months: Vec<PathBuf> = entries(dir).collect();
    months.sort();
    months.into()
}

/// The files of a month. What is being written begins with a dot and is none.
fn files(month: &Path) -> VecDeque<File> {
    let file = |path: PathBuf| {
        let (uid, job) = path.file_name()?.to_str()?.strip_suffix(".ndjson")?.split_once('.')?;
        Some(File { uid: uid.parse().ok()?, job: job.parse().ok()?, path: path.clone() })
    };
    let mut files: Vec<File> = entries(month).filter_map(file).collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files.into()
}

/// What a directory holds; nothing where it is not there.
fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = std::fs::read_dir(dir).inspect_err(|error| {
        if error.kind() != io::ErrorKind::NotFound {
            tracing::warn!(dir = %dir.display(), %error, "kept audits cannot be listed");
        }
    });
    entries.into_iter().flatten().flatten().map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_by_month_user_and_job_and_half_written_ones_are_not() {
        let dir = tempfile::tempdir().expect("dir");
        for (month, name) in [
            ("2026-02", "7.j0dq2v7hk0x3m9ra.ndjson"),
            ("2026-01", "0.j0dq2v7hk0x3m9rb.ndjson"),
            ("2026-01", ".7.j0dq2v7hk0x3m9rc.ndjson.part"),
            ("2026-01", "x.j0dq2v7hk0x3m9rd.ndjson"),
            ("2026-01", "7.j1.ndjson"),
        ] {
            std::fs::create_dir_all(dir.path().join(month)).expect("month");
            std::fs::write(dir.path().join(month).join(name), "").expect("file");
        }
        let found: Vec<(u32, String)> = months(dir.path())
            .iter()
            .flat_map(|month| files(month))
            .map(|file| (file.uid, file.job.to_string()))
            .collect();
        assert_eq!(found, [(0, "j0dq2v7hk0x3m9rb".to_owned()), (7, "j0dq2v7hk0x3m9ra".to_owned())]);
        assert!(months(&dir.path().join("absent")).is_empty());
        assert_eq!(month_of(1_767_323_050_000), "2026-01");
    }

    #[tokio::test]
    async fn what_the_reader_has_or_does_not_want_is_left_out() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("a.ndjson");
        let line = |seq: u64, at_ms: u64| {
            let record = serde_json::json!({
                "at_ms": at_ms, "job": "j0dq2v7hk0x3m9ra", "uid": 7, "seq": seq, "origin": "gateway",
                "kind": "refused", "status": 403, "why": "model",
            });
            format!("{record}\n")
        };
        std::fs::write(&path, line(1, 10) + &line(2, 20) + &line(3, 30)).expect("file");
        let read = async |known, filter: Filter| {
            let mut file = BufReader::new(tokio::fs::File::open(&path).await.expect("open"));
            let lines = lines(&mut file, known, &filter).await.expect("lines");
            String::from_utf8(lines).expect("UTF-8")
        };
        assert_eq!(read(1, Filter::default()).await, line(2, 20) + &line(3, 30));
        assert_eq!(read(0, Filter { since_ms: 25, ..Filter::default() }).await, line(3, 30));
        assert_eq!(read(3, Filter::default()).await, "");
    }
}
