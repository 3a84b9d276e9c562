//! Images that were built: which one a job has, which are reused, how many are kept. An image is reused only for the
//! user whose it is; a job keeps the image it began with, whatever becomes of its workspace.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::super::Parts;
use super::super::prepare::{PrepareError, failed};
use super::super::record::Record;
use super::{LABEL_RECIPE, engine_says};
use crate::clock;
use crate::engine::{EngineError, LABEL_OWNER};
use crate::job::{FailReason, JobId};

/// Most images that are kept, of all users.
const KEPT_MAX: usize = 20;
/// Looks for what a failed build has left, and the pause between them.
const LOOKS_MAX: u32 = 20;
const LOOK_PAUSE: Duration = Duration::from_millis(500);
/// The image of a job, beside its journal.
const OF_JOB: &str = "build.json";

/// An image that was built for a job.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: String,
    /// Whose it is.
    pub uid: u32,
    /// The file that says how it is built.
    pub source: String,
    /// When it was built, in milliseconds since 1970.
    pub built_at_ms: u64,
}

/// Those of a state directory, as far as they can be read. Blocks.
pub fn kept(state_dir: &Path) -> Vec<Kept> {
    let mut all: Vec<Kept> = std::fs::read_dir(dir_below(state_dir))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| read(&entry.path()))
        .collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

/// Those that no job has used for longer than `age`. Blocks.
pub fn unused(state_dir: &Path, now: SystemTime, age: Duration) -> Vec<Kept> {
    let used = |kept: &Kept| {
        let file = std::fs::metadata(file_of(&dir_below(state_dir), &kept.name)).ok()?;
        now.duration_since(file.modified().ok()?).ok()
    };
    kept(state_dir).into_iter().filter(|kept| used(kept).is_some_and(|unused| unused > age)).collect()
}

/// Ids of the images that jobs have, by the directories of their journals. Blocks.
pub fn images_of(journals: &[PathBuf]) -> Vec<String> {
    journals.iter().filter_map(|dir| Some(read(&dir.join(OF_JOB))?.id)).collect()
}

/// Forgets one that is gone. Blocks.
///
/// # Errors
/// Of the file system.
pub fn forget(state_dir: &Path, name: &str) -> std::io::Result<()> {
    match std::fs::remove_file(file_of(&dir_below(state_dir), name)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// The image that an earlier cell of the job had.
pub(in crate::cell) async fn image_of_job(
    parts: &Parts,
    record: &Record,
) -> Result<Option<String>, PrepareError> {
    let path = parts.settings.journal_dir(&record.job).join(OF_JOB);
    let read = tokio::task::spawn_blocking(move || read(&path)).await;
    Ok(read.map_err(|e| failed(FailReason::Internal, e))?.map(|kept| kept.id))
}

/// An image of this user's that was built from the same.
pub(super) async fn known(
    parts: &Parts,
    record: &Record,
    name: &str,
    key: &str,
) -> Result<Option<String>, PrepareError> {
    let info = parts.engine.image(name).await.map_err(|e| engine_says(&e))?;
    let owner = record.identity.uid.to_string();
    let is = |info: &crate::engine::ImageInfo, label: &str, value: &str| {
        info.labels.get(label).is_some_and(|text| text == value)
    };
    let info = info.filter(|info| is(info, LABEL_OWNER, &owner) && is(info, LABEL_RECIPE, key));
    Ok(info.map(|info| info.id))
}

/// Remembers it as the job's, and as one that was used now; the one that was not used for longest goes.
pub(super) async fn keep(
    parts: &Arc<Parts>,
    record: &Record,
    name: &str,
    id: &str,
) -> Result<(), PrepareError> {
    let source = record.accepted.build.as_ref().map(|build| build.recipe.source.clone()).unwrap_or_default();
    let built_at_ms = clock::wall_ms();
    let uid = record.identity.uid;
    let mut kept = Kept { name: name.to_owned(), id: id.to_owned(), uid, source, built_at_ms };
    let of_job = parts.settings.journal_dir(&record.job).join(OF_JOB);
    let dir = dir_below(&parts.settings.state_dir);
    let write = tokio::task::spawn_blocking(move || {
        std::fs::create_dir_all(&dir)?;
        let file = file_of(&dir, &kept.name);
        if let Some(before) = read(&file).filter(|before| before.id == kept.id) {
            kept.built_at_ms = before.built_at_ms;
        }
        write(&of_job, &kept)?;
        // Its time of change is when it was used last.
        write(&file, &kept)?;
        oldest(&dir)
    });
    let old = write.await.map_err(|e| failed(FailReason::Internal, e))?;
    let old = old.map_err(|e| failed(FailReason::Internal, format!("cannot remember an image: {e}")))?;
    for (path, kept) in old {
        match parts.engine.remove_image(&kept.name).await {
            Ok(()) => drop(std::fs::remove_file(path)),
            // In use: the next time.
            Err(error) => {
                tracing::info!(image = kept.name, %error, "an image that was built is kept for now")
            }
        }
    }
    Ok(())
}

/// Removes what a build has left beside its image: the container of a line that was broken off, layers, stages that
/// nobody needs. What cannot be removed now is the sweep's. `failed`: the engine may not be done with it yet, and may
/// begin one more line before it sees that nobody follows.
pub(super) async fn sweep_up(parts: &Parts, job: &JobId, failed: bool) {
    let mut quiet = 0;
    for _ in 0..LOOKS_MAX {
        quiet = if removed(parts, job).await == 0 { quiet + 1 } else { 0 };
        if !failed || quiet == 2 {
            return;
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    }
}

/// How much was found.
async fn removed(parts: &Parts, job: &JobId) -> usize {
    let instance = parts.store.instance();
    let of = |of: &Option<JobId>| of.as_ref() == Some(job);
    let left = |error: EngineError| tracing::warn!(%job, %error, "what a build left is left to the sweep");
    let mut count = 0;
    match parts.engine.list(instance).await {
        Ok(found) => {
            for found in found.into_iter().filter(|found| of(&found.build)) {
                count += 1;
                parts.engine.remove(&found.container).await.unwrap_or_else(left);
            }
        }
        Err(error) => left(error),
    }
    match parts.engine.loose_images(instance).await {
        Ok(loose) => {
            for (id, _) in loose.into_iter().filter(|(_, job)| of(job)) {
                count += 1;
                parts.engine.remove_image(&id).await.unwrap_or_else(left);
            }
        }
        Err(error) => left(error),
    }
    count
}

fn dir_below(state_dir: &Path) -> PathBuf {
    state_dir.join("builds")
}

fn file_of(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{}.json", name.rsplit([':', '/']).next().unwrap_or_default()))
}

fn read(path: &Path) -> Option<Kept> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

fn write(path: &Path, kept: &Kept) -> std::io::Result<()> {
    use std::io::Write;
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(&serde_json::to_vec(kept)?)?;
    file.persist(path)?;
    Ok(())
}

/// Those over the limit, by when they were used last.
fn oldest(dir: &Path) -> std::io::Result<Vec<(PathBuf, Kept)>> {
    let mut all: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|end| end == "json") {
            all.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    all.sort();
    let over = all.len().saturating_sub(KEPT_MAX);
    let mut old = Vec::new();
    for (_, path) in all.into_iter().take(over) {
        match read(&path) {
            Some(kept) => old.push((path, kept)),
            None => std::fs::remove_file(path)?,
        }
    }
    Ok(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_that_were_not_used_for_long_are_told_and_those_of_jobs_by_their_ids() {
        let state = tempfile::tempdir().expect("dir");
        let dir = dir_below(state.path());
        std::fs::create_dir(&dir).expect("dir");
        let of = |name: &str| Kept {
            name: format!("hotcell/build:{name}"),
            id: format!("sha256:{name}"),
            uid: 7,
            source: "Dockerfile".to_owned(),
            built_at_ms: 0,
        };
        write(&file_of(&dir, &of("one").name), &of("one")).expect("written");
        let age = Duration::from_secs(1000);
        let later = |seconds| SystemTime::now() + Duration::from_secs(seconds);
        assert!(unused(state.path(), later(900), age).is_empty(), "its file says when it was used last");
        let old = unused(state.path(), later(1100), age);
        assert_eq!(old.iter().map(|kept| kept.name.as_str()).collect::<Vec<_>>(), ["hotcell/build:one"]);
        let journal = state.path().join("journal");
        std::fs::create_dir(&journal).expect("dir");
        assert!(images_of(std::slice::from_ref(&journal)).is_empty());
        write(&journal.join(OF_JOB), &of("one")).expect("written");
        assert_eq!(images_of(&[journal]), ["sha256:one"]);
    }
}
