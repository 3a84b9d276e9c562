//! Looks from time to time whether the engine answers, which the loop is told, and for what no job owns: containers of this instance without an open cell row, and
//! cells' directories, mounts and loop devices without one, and for kept work of jobs that are over. A cell whose row is open is never touched here;
//! one whose removal failed before is tried again, soon and as soon as the engine is back. What goes because it is old or too much is `api::gc`'s, which keeps
//! jobs' audits first.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::cell::{self, Parts, Settings};
use crate::driver::Handle;
use crate::git;
use crate::job::{CellId, JobId, State};
use crate::metrics::Orphan;
use crate::workspace;

/// Time between two sweeps while nothing is left over.
const EVERY: Duration = Duration::from_secs(60);
/// Time between two looks at the engine.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// The same while it does not answer.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Sweeps until `shutdown`, and tells the loop whether the engine answers.
pub async fn run(parts: Arc<Parts>, driver: Handle, shutdown: CancellationToken) {
    let mut was_up = true;
    let mut sweep = tokio::time::interval(EVERY);
    let mut look = tokio::time::interval(LOOK_EVERY);
    sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // The first sweep is the start's own.
    sweep.tick().await;
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = look.tick() => {
                let up = is_up(&parts, was_up).await;
                if up != was_up {
                    driver.engine(up).await;
                }
                let back = up && !was_up;
                was_up = up;
                if !up {
                    look.reset_after(LOOK_AGAIN);
                } else if back || parts.store.cells_left().await.is_ok_and(|left| left > 0) {
                    sweep_once(&parts).await;
                }
            }
            _ = sweep.tick() => {
                // A failure would be a panic of a call that cannot panic.
                let _ = tokio::task::spawn_blocking(release_memory).await;
                sweep_once(&parts).await;
            }
        }
    }
}

async fn is_up(parts: &Parts, was_up: bool) -> bool {
    let asked = parts.engine.info().await;
    let up = asked.is_ok();
    parts.metrics.engine_up.set(i64::from(up));
    match asked {
        Ok(_) if !was_up => tracing::info!("the engine answers again: jobs start"),
        Err(error) if was_up => tracing::warn!(%error, "no job starts until the engine answers"),
        Ok(_) | Err(_) => {}
    }
    up
}

async fn sweep_once(parts: &Arc<Parts>) {
    if let Err(error) = once(parts).await {
        tracing::warn!(%error, "the sweep could not be finished; the next one goes on");
    }
}

/// Gives freed memory back to the system: the allocator keeps the buffers of many jobs at once (measured:
/// some 15 MiB after 50) for good otherwise.
fn release_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointer, and may be called at any time from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Why a sweep could not be finished.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    /// The store.
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] crate::engine::EngineError),
    /// The directory of cells.
    #[error("the directory of cells cannot be swept: {0}")]
    Directory(#[from] std::io::Error),
}

/// The first thing of all, before anybody can ask for anything: what a dead daemon left half done of
/// change sets (applied, checked out, made a branch) is put right, and what it had mounted to read it is taken down.
///
/// # Errors
/// [`SweepError`].
pub async fn put_right(settings: &Settings) -> Result<(), SweepError> {
    let (dir, reading) = (settings.changes_dir(), settings.reading_dir());
    let listed = tokio::task::spawn_blocking(move || names::<JobId>(&dir, "")).await;
    for job in listed.unwrap_or_else(|e| Err(std::io::Error::other(e)))? {
        cell::changes::recover(settings, &job).await;
    }
    match tokio::task::spawn_blocking(|| git::sweep(&git::temporary())).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::warn!(%error, "repositories of a dead daemon's are left"),
        Err(error) => tracing::error!(%error, "repositories of a dead daemon's are left"),
    }
    let swept = tokio::task::spawn_blocking(move || workspace::sweep(&reading, &|_| false)).await;
    for left in swept.unwrap_or_else(|e| Err(std::io::Error::other(e)))?.left {
        tracing::warn!(path = %left.path.display(), why = left.why, "something of a parked job is left mounted");
    }
    Ok(())
}

/// One sweep: cells of jobs that are over first, then containers, then directories.
///
/// # Errors
/// [`SweepError`]; what was removed until then stays removed.
pub async fn once(parts: &Arc<Parts>) -> Result<(), SweepError> {
    // Containers and directories are listed before the rows are read: a cell made in between has a row by then,
    // or is not on the lists.
    let found = parts.engine.list(parts.store.instance()).await?;
    let dir = parts.settings.cells_dir();
    let listed = tokio::task::spawn_blocking(move || names::<CellId>(&dir, "")).await;
    let listed = listed.unwrap_or_else(|e| Err(std::io::Error::other(e)))?;
    for row in parts.store.live_cells().await? {
        let job = parts.store.job(&row.job).await?;
        // One try: the next sweep is the next one.
        if job.is_none_or(|job| job.row.state.is_done())
            && let Err(left) = cell::destroy_once(parts, &row.job).await
        {
            tracing::warn!(job = %row.job, %left, "something of a cell is left");
        }
    }
    let open: HashSet<CellId> = parts.store.live_cells().await?.into_iter().map(|row| row.cell).collect();
    for orphan in found.iter().filter(|f| f.cell.as_ref().is_some_and(|cell| !open.contains(cell))) {
        if let Err(error) = parts.engine.remove(&orphan.container).await {
            tracing::warn!(container = %orphan.container, %error, "a container that no job owns is left");
            continue;
        }
        parts.metrics.reaped(Orphan::Container, 1);
        tracing::info!(container = %orphan.container, "removed a container that no job owns");
    }
    builds(parts, &found).await?;
    let dir = parts.settings.cells_dir();
    let report = tokio::task::spawn_blocking(move || {
        workspace::sweep(&dir, &|cell| open.contains(cell) || !listed.contains(cell))
    })
    .await;
    let report = report.unwrap_or_else(|e| Err(std::io::Error::other(e)))?;
    parts.metrics.reaped(Orphan::Directory, report.removed.len() as u64);
    for left in report.left {
        tracing::warn!(path = %left.path.display(), why = left.why, "something is left in the directory of cells");
    }
    kept(parts).await?;
    changes(parts).await?;
    if let Some(cache) = parts.egress.packages().cloned()
        && let Err(error) = tokio::task::spawn_blocking(move || cache.tend()).await
    {
        tracing::error!(%error, "the package cache was not looked after");
    }
    sources(parts).await
}

/// What the engine made for builds that nobody follows any more: the job of a build that goes on is being prepared.
async fn builds(parts: &Arc<Parts>, found: &[crate::engine::Found]) -> Result<(), SweepError> {
    let loose = parts.engine.loose_images(parts.store.instance()).await?;
    let containers =
        found.iter().filter_map(|found| Some((found.build.clone()?, Some(&found.container), None)));
    let images = loose.iter().filter_map(|(id, job)| Some((job.clone()?, None, Some(id))));
    for (job, container, image) in containers.chain(images).collect::<Vec<_>>() {
        let row = parts.store.job(&job).await?;
        if row.is_some_and(|job| matches!(job.row.state, State::Preparing)) {
            continue;
        }
        let removed = match (container, image) {
            (Some(container), _) => parts.engine.remove(container).await,
            (None, Some(image)) => parts.engine.remove_image(image).await,
            (None, None) => Ok(()),
        };
        if let Err(error) = removed {
            tracing::warn!(%job, %error, "something of a build is left");
        }
    }
    Ok(())
}

/// What was fetched for a job goes with its row.
async fn sources(parts: &Arc<Parts>) -> Result<(), SweepError> {
    let listed = match parts.sources.jobs().await {
        Ok(listed) => listed,
        Err(error) => {
            tracing::warn!(%error, "what was fetched for jobs cannot be listed");
            return Ok(());
        }
    };
    for (who, job) in listed {
        if parts.store.job(&job).await?.is_some() {
            continue;
        }
        match parts.sources.remove(&who, &job).await {
            Ok(()) => parts.metrics.reaped(Orphan::Directory, 1),
            Err(error) => tracing::warn!(%job, %error, "what was fetched for a job that is gone is left"),
        }
    }
    Ok(())
}

/// What is kept of a job goes with it; here what a dead daemon did not come to.
async fn kept(parts: &Arc<Parts>) -> Result<(), SweepError> {
    let dir = parts.settings.kept_dir();
    let listed = tokio::task::spawn_blocking(move || names::<JobId>(&dir, ".img")).await;
    for job in listed.unwrap_or_else(|e| Err(std::io::Error::other(e)))? {
        if parts.store.job(&job).await?.is_some_and(|job| !job.row.state.is_done()) {
            continue;
        }
        let file = parts.settings.kept(&job);
        match tokio::task::spawn_blocking(move || workspace::remove_kept(&file)).await {
            Ok(Ok(())) => parts.metrics.reaped(Orphan::Directory, 1),
            Ok(Err(error)) => tracing::warn!(%job, %error, "kept work of a job that is over is left"),
            Err(error) => tracing::error!(%job, %error, "kept work of a job that is over is left"),
        }
    }
    Ok(())
}

/// What a job changed goes with its row; here what a dead daemon did not come to.
async fn changes(parts: &Arc<Parts>) -> Result<(), SweepError> {
    let dir = parts.settings.changes_dir();
    let listed = tokio::task::spawn_blocking(move || names::<JobId>(&dir, "")).await;
    for job in listed.unwrap_or_else(|e| Err(std::io::Error::other(e)))? {
        if parts.store.job(&job).await?.is_some() {
            continue;
        }
        let shelf = cell::changes::shelf(parts, &job);
        match tokio::task::spawn_blocking(move || shelf.remove()).await {
            Ok(Ok(())) => parts.metrics.reaped(Orphan::Directory, 1),
            Ok(Err(error)) => tracing::warn!(%job, %error, "the change set of a deleted job is left"),
            Err(error) => tracing::error!(%job, %error, "the change set of a deleted job is left"),
        }
    }
    Ok(())
}

/// The ids that have an entry in a directory, under their name with `suffix`.
fn names<T: std::str::FromStr + Eq + std::hash::Hash>(
    dir: &std::path::Path,
    suffix: &str,
) -> std::io::Result<HashSet<T>> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(HashSet::new()),
        entries => entries?,
    };
    let mut found = HashSet::new();
    for entry in entries {
        let name = entry?.file_name();
        found.extend(name.to_str().and_then(|name| name.strip_suffix(suffix)?.parse::<T>().ok()));
    }
    Ok(found)
}
