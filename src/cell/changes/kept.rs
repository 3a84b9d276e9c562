//! The changes of a job that ends while it has no cell: taken out of what was kept of its last one. It must leave no
//! mount and no loop device, and never touch what is kept: that is removed when the job is over.

use std::path::Path;
use std::sync::Arc;

use super::{ChangesError, Found, Parts, Record, RecordError, Summary, blocking, has_copy, origin, shelf, take, tell};
use crate::cell::rooms::inodes_max;
use crate::job::CellId;
use crate::workspace::{self, Scratch, ScratchPlan};

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
    let (accepted, identity) = (record.accepted.clone(), record.identity.clone());
    let (settings, shelf) = (parts.settings.clone(), shelf(parts, &record.job));
    let taken = blocking(move || {
        let disk = accepted.plan.limits.disk_bytes;
        let plan = ScratchPlan {
            bytes_max: disk,
            inodes_max: inodes_max(disk),
            // It is there already: nothing more is taken.
            host_reserve_bytes: 0,
            template_dir: settings.state_dir.join("scratch-templates"),
        };
        mounted(&settings.reading_dir(), &image, &plan, |dir| {
            let Some(copy) = workspace::parts_of(dir, None) else { return Ok(None) };
            // Its agent's commits would need a cell: what they hold is in the files.
            let found = Found { copy, base: origin(&shelf), commits: Ok(None) };
            take(&accepted, &identity, found, &shelf, &settings.state_dir).map(Some)
        })
    });
    match taken.await {
        Ok(Some(summary)) => tell(record, summary).map(Some),
        Ok(None) => Ok(None),
        Err(why) => {
            tracing::error!(job = %record.job, %why, "what a parked job changed cannot be taken out of its copy");
            let text = format!("what the job changed cannot be taken out of its copy, and is lost: {why}");
            record.push(&crate::event::Body::Note { text })?;
            Ok(None)
        }
    }
}

/// Does `work` while what is kept is mounted in a directory of its own below `reading`. What a dead daemon left there
/// the next one removes when it starts.
fn mounted<T>(
    reading: &Path,
    image: &Path,
    plan: &ScratchPlan,
    work: impl FnOnce(&Path) -> Result<Option<T>, ChangesError>,
) -> Result<Option<T>, ChangesError> {
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
    let done = match Scratch::restore(&dir, image, plan) {
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
