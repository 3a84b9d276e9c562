//! After a job that worked in place: what git or coding agents would obey on the host, and was not there before, is
//! set aside under another name, as the submitter. What was there before is remembered beside the job's changes, so
//! that this happens whoever sees the job's end.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use super::super::{Accepted, Settings};
use super::see;
use crate::change::Quarantined;
use crate::changes::Shelf;
use crate::job::{Identity, JobId};
use crate::workspace::{self, Guard, Guarded, WorkspaceError};

const FILE_NAME: &str = "guarded.json";
/// What was set aside: kept until the job is removed, since whoever did it may not have told it.
const DONE_NAME: &str = "quarantined.json";
const RENAME_TIME_MAX: Duration = Duration::from_secs(60);

fn file(settings: &Settings, job: &JobId) -> PathBuf {
    Shelf::new(settings.state_dir.join("changes")).of(job).dir().join(FILE_NAME)
}

fn io(doing: &'static str, path: PathBuf) -> impl FnOnce(std::io::Error) -> WorkspaceError {
    move |source| WorkspaceError::Io { doing, path, source }
}

/// Keeps what was there before the job's first cell.
pub(super) fn remember(settings: &Settings, job: &JobId, guarded: &Guarded) -> Result<(), WorkspaceError> {
    let path = file(settings, job);
    if path.exists() {
        return Ok(());
    }
    let shelf = Shelf::new(settings.state_dir.join("changes")).of(job);
    shelf.create().map_err(|e| io("keep", path.clone())(std::io::Error::other(e)))?;
    let text = serde_json::to_vec(guarded).map_err(|e| io("keep", path.clone())(std::io::Error::other(e)))?;
    let fresh = path.with_extension("new");
    let written = std::fs::write(&fresh, text).and_then(|()| std::fs::rename(&fresh, &path));
    written.map_err(io("keep", path))
}

/// What became of what an agent left.
#[derive(Debug, Default)]
pub(in crate::cell) struct Aside {
    pub(in crate::cell) quarantined: Vec<Quarantined>,
    /// Words for each, and for what could not be looked at.
    pub(in crate::cell) notes: Vec<String>,
}

/// Sets aside what the job's agent left of that kind. Its cell must be gone. What an earlier daemon has set aside is
/// given again, without words. Blocks.
pub(in crate::cell) fn set_aside(
    settings: &Settings,
    accepted: &Accepted,
    identity: &Identity,
    job: &JobId,
) -> Aside {
    let path = file(settings, job);
    let done = path.with_file_name(DONE_NAME);
    let before: Option<Vec<Quarantined>> =
        std::fs::read(&done).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let mut aside = Aside { quarantined: before.unwrap_or_default(), notes: Vec::new() };
    let Ok(text) = std::fs::read(&path) else { return aside };
    match serde_json::from_slice::<Guarded>(&text) {
        Ok(guarded) => renamed(settings, accepted, identity, job, &guarded, &mut aside),
        Err(error) => aside.notes.push(not_looked(&error)),
    }
    if !aside.quarantined.is_empty() {
        let kept = serde_json::to_vec(&aside.quarantined).map_err(std::io::Error::other);
        if let Err(error) = kept.and_then(|text| std::fs::write(&done, text)) {
            tracing::warn!(%job, %error, "what was set aside is told by the job's end only");
        }
    }
    if let Err(error) = std::fs::remove_file(&path) {
        tracing::warn!(%job, %error, "what was protected of a workspace is not forgotten");
    }
    aside
}

fn not_looked(why: &dyn std::fmt::Display) -> String {
    format!("the workspace could not be looked through for hooks and settings that the agent left: {why}")
}

fn renamed(
    settings: &Settings,
    accepted: &Accepted,
    identity: &Identity,
    job: &JobId,
    before: &Guarded,
    aside: &mut Aside,
) {
    let Some(record) = &accepted.workspace else { return };
    let guard = Guard::for_user(&settings.state_dir, identity.uid);
    let looked = workspace::reopen_as(identity, record, &guard)
        .and_then(|fd| see::everything(identity, record, &fd).map(|looked| (fd, looked)));
    let (fd, looked) = match looked {
        Ok(looked) => looked,
        Err(error) => return aside.notes.push(not_looked(&error)),
    };
    if !looked.complete {
        aside.notes.push(not_looked(&"it is too large"));
    }
    for path in before.appeared(&looked) {
        let (Ok(dir), at, own) = (fd.try_clone(), path.clone(), job.clone()) else { continue };
        let work = move || workspace::set_aside(dir.as_fd(), &at, &own);
        let shown = path.as_path().display();
        match workspace::as_submitter(identity, &record.path, RENAME_TIME_MAX, work) {
            Ok(Some(name)) => {
                aside.notes.push(format!(
                    "quarantined: {shown} appeared during the job and would be obeyed on this host; it is now {}",
                    name.as_path().display()
                ));
                let (path, moved_to) = (path.clone(), Some(name));
                aside.quarantined.push(Quarantined { path, moved_to, why: None });
            }
            Ok(None) => {}
            Err(error) => {
                aside.notes.push(format!("{shown} appeared during the job and is still there: {error}"));
                let (path, why) = (path.clone(), Some(error.to_string()));
                aside.quarantined.push(Quarantined { path, moved_to: None, why });
            }
        }
    }
}
