//! The changes of a job that has no cell: taken out of what was kept of its last one, when it ends while it is parked,
//! or when somebody asks for what could not be taken out at its end. It must leave no mount and no loop device, and
//! never lose what is kept before its change set is on the disk.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::collect::{Found, has_copy, origin, take, tell};
use super::{ChangesError, IMAGE, blocking, shelf};
use crate::cell::record::{Record, RecordError};
use crate::cell::rooms::inodes_max;
use crate::cell::{Accepted, Parts, Settings, bundle};
use crate::change::Summary;
use crate::changes::JobShelf;
use crate::event::Body;
use crate::job::{CellId, Identity};
use crate::store::Job;
use crate::workspace::{self, Scratch, ScratchPlan};

/// One at a time: a file system is not mounted twice.
static READING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Takes out what a parked job changed in its copy: its figures, or none where it never had one.
///
/// # Errors
/// [`RecordError`] where the event about it cannot be journaled.
pub(in crate::cell) async fn collect_kept(
    parts: &Arc<Parts>,
    record: &mut Record,
) -> Result<Option<Summary>, RecordError> {
    let image = parts.settings.kept(&record.job);
    if !has_copy(record) || !image.is_file() {
        return Ok(None);
    }
    let shelf = shelf(parts, &record.job);
    let (settings, accepted, at) = (parts.settings.clone(), record.accepted.clone(), image.clone());
    let written = blocking(move || mounted(&settings, &accepted, &at, |dir| Ok(Some(has_written_git(dir)))));
    let base = origin(&shelf);
    let commits = match written.await {
        Ok(Some(true)) => {
            let commits = bundle::commits_kept(parts, record, &shelf, &image, base.commit.as_deref()).await;
            // Its cell has the image mounted.
            super::super::destroy(parts, &record.job).await;
            commits
        }
        Ok(Some(false) | None) => Ok(None),
        Err(error) => Err(format!("the agent's commits were not looked for: {error}")),
    };
    let kept = commits.clone();
    let (settings, accepted, identity) =
        (parts.settings.clone(), record.accepted.clone(), record.identity.clone());
    let (own, at) = (shelf.clone(), image.clone());
    let taken = blocking(move || {
        mounted(&settings, &accepted, &at, |dir| {
            let Some(copy) = workspace::parts_of(dir, None) else { return Ok(None) };
            let found = Found { copy, base, commits };
            take(&accepted, &identity, found, &own, &settings.state_dir).map(Some)
        })
    });
    match taken.await {
        Ok(summary) => {
            shelf.forget_index();
            summary.map(|summary| tell(record, summary)).transpose()
        }
        Err(why) => {
            tracing::error!(job = %record.job, %why, "what a parked job changed cannot be taken out of its copy");
            let kept = put_image_away(image, shelf, kept).await;
            let text = format!("what the job changed cannot be taken out of its copy: {why}; {kept}");
            record.push(&Body::Note { text })?;
            Ok(None)
        }
    }
}

/// Whether anything was written to a repository in the copy of the cell in `dir`.
fn has_written_git(dir: &Path) -> bool {
    let own = workspace::parts_of(dir, None);
    let own = own.is_some_and(|copy| copy.dir.join(".git").symlink_metadata().is_ok());
    own || crate::cell::work::has_repository_copy(dir)
}

/// Keeps the file system with a copy beside what else is kept of the job, for as long as that: what became of it, in
/// words.
pub(super) async fn put_image_away(
    from: PathBuf,
    shelf: JobShelf,
    commits: Result<Option<crate::change::Commits>, String>,
) -> String {
    let to = shelf.dir().join(IMAGE);
    let moved = blocking(move || {
        shelf.create()?;
        std::fs::rename(&from, &to).map_err(|e| ChangesError::Kept(e.to_string()))?;
        if let Ok(Some(commits)) = commits
            && let Err(error) = shelf.put_commits(&commits)
        {
            tracing::warn!(%error, "an agent's commits are not remembered beside its copy");
        }
        Ok(taken_bytes(&to))
    });
    match moved.await {
        Ok(bytes) => format!(
            "its copy is kept and takes {} MiB of the disk: `hotcell diff` and `hotcell apply` try again, `hotcell rm` removes it",
            bytes.div_ceil(1 << 20)
        ),
        Err(error) => format!("its copy cannot be kept either: {error}"),
    }
}

fn taken_bytes(path: &Path) -> u64 {
    std::fs::symlink_metadata(path).map_or(0, |meta| meta.blocks().saturating_mul(512))
}

/// Takes out what could not be taken out when the job ended, if its copy was kept then; the copy goes. False where
/// there is none.
///
/// # Errors
/// [`ChangesError::InCopy`] where it still cannot be; the copy stays then.
pub(super) async fn retry(parts: &Parts, job: &Job, accepted: Accepted) -> Result<bool, ChangesError> {
    let shelf = shelf(parts, &job.row.id);
    let image = shelf.dir().join(IMAGE);
    if !image.is_file() {
        return Ok(false);
    }
    let _alone = READING.lock().await;
    let (settings, identity) = (parts.settings.clone(), job.row.identity.clone());
    let taken = blocking(move || taken_again(&settings, &accepted, &identity, &shelf, &image)).await?;
    if let Some(summary) = taken {
        tracing::info!(job = %job.row.id, "what a job changed was taken out of its kept copy");
        if let Err(error) = parts.store.found_changes(&job.row.id, summary).await {
            tracing::warn!(job = %job.row.id, %error, "the figures of a change set are not in its job's totals");
        }
    }
    Ok(true)
}

/// None where somebody else has just done it.
fn taken_again(
    settings: &Settings,
    accepted: &Accepted,
    identity: &Identity,
    shelf: &JobShelf,
    image: &Path,
) -> Result<Option<Summary>, ChangesError> {
    let still = |why: ChangesError| {
        let mib = taken_bytes(image).div_ceil(1 << 20);
        ChangesError::InCopy { why: why.to_string(), mib }
    };
    if !image.is_file() {
        return Ok(None);
    }
    let there = shelf.changes().map_err(|why| still(why.into()))?;
    let summary = match there {
        // Its image was to be removed.
        Some((set, hash)) => set.summary(hash),
        None => {
            let commits = shelf.commits().map_err(|why| still(why.into()))?;
            let taken = mounted(settings, accepted, image, |dir| {
                let Some(copy) = workspace::parts_of(dir, None) else {
                    return Err(ChangesError::Kept("there is no copy of a workspace in it".to_owned()));
                };
                let found = Found { copy, base: origin(shelf), commits: Ok(commits) };
                take(accepted, identity, found, shelf, &settings.state_dir).map(Some)
            });
            let unmountable = || ChangesError::Kept("this host cannot mount it".to_owned());
            taken.map_err(still)?.ok_or_else(|| still(unmountable()))?
        }
    };
    shelf.forget_index();
    if let Err(error) = workspace::remove_kept(image) {
        tracing::warn!(path = %image.display(), %error, "a copy that was read is left until its job is removed");
    }
    Ok(Some(summary))
}

/// Does `work` while what is kept is mounted in a directory of its own. What a dead daemon left there the next one
/// removes when it starts.
fn mounted<T>(
    settings: &Settings,
    accepted: &Accepted,
    image: &Path,
    work: impl FnOnce(&Path) -> Result<Option<T>, ChangesError>,
) -> Result<Option<T>, ChangesError> {
    let disk = accepted.plan.limits.disk_bytes;
    let plan = ScratchPlan {
        bytes_max: disk,
        inodes_max: inodes_max(disk),
        // It is there already: nothing more is taken.
        host_reserve_bytes: 0,
        template_dir: settings.state_dir.join("scratch-templates"),
    };
    let reading = &settings.reading_dir();
    let broken = |e: std::io::Error| ChangesError::Kept(e.to_string());
    let random = getrandom::u64().map_err(|e| ChangesError::Kept(e.to_string()))?;
    let cell = CellId::new(random);
    let dir = reading.join(cell.as_str());
    for dir in [reading, &dir] {
        match std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(dir) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(broken(error)),
            Ok(()) | Err(_) => {}
        }
    }
    let done = match Scratch::restore(&dir, image, &plan) {
        Ok(Some(_)) => work(&dir),
        Ok(None) => Ok(None),
        Err(error) => Err(ChangesError::Kept(error.to_string())),
    };
    // The scratch space goes with it.
    match workspace::sweep(reading, &|other| *other != cell) {
        Ok(report) => {
            for left in report.left {
                tracing::warn!(path = %left.path.display(), why = left.why, "left until the daemon starts next");
            }
        }
        Err(error) => tracing::warn!(%error, "what was mounted is left until the daemon starts next"),
    }
    done
}
