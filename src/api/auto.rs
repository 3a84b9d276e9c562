//! `image = "auto"`: picks the image of a job by the files at the top of its workspace, read with the rights of its
//! submitter. What is picked must be allowed like an image that was named.

use std::os::fd::AsFd;
use std::time::Duration;

use super::wire::ErrorCode;
use super::{Api, ApiError};
use crate::cell_image::{Pick, pick};
use crate::job::Identity;
use crate::job::spec::AUTO_IMAGE;
use crate::workspace::{self, Guard, LookLimits, WorkspaceError, WorkspaceRecord};

/// The default where the daemon's own is `auto`.
const DEFAULT_IMAGE: &str = "hotcell/cell";
/// How far the top of a workspace is looked at.
const LOOK: LookLimits = LookLimits { entries_max: 20_000, time_max: Duration::from_secs(2) };
/// Longest wait for the submitter's file system.
const WAIT_MAX: Duration = Duration::from_secs(20);

/// The image for a workspace; the default one where there is none.
///
/// # Errors
/// `workspace` where it cannot be opened any more.
pub(super) async fn picked(
    api: &Api,
    identity: &Identity,
    record: Option<&WorkspaceRecord>,
) -> Result<Pick, ApiError> {
    let default = match api.defaults.image.as_str() {
        AUTO_IMAGE => DEFAULT_IMAGE.to_owned(),
        image => image.to_owned(),
    };
    let Some(record) = record.cloned() else { return Ok(pick([], &default)) };
    let (identity, state_dir) = (identity.clone(), api.parts.settings.state_dir.clone());
    let names = tokio::task::spawn_blocking(move || names(&identity, &record, &state_dir));
    let names = names.await.map_err(|e| ApiError::new(ErrorCode::Internal, e))?;
    let names = names
        .map_err(|e| ApiError::new(ErrorCode::Workspace, format!("workspace.path: {e} (image: auto)")))?;
    Ok(pick(names.iter().map(String::as_str), &default))
}

/// What lies at its top; names that are not text say nothing.
fn names(
    identity: &Identity,
    record: &WorkspaceRecord,
    state_dir: &std::path::Path,
) -> Result<Vec<String>, WorkspaceError> {
    let guard = Guard::for_user(state_dir, identity.uid);
    let dir = workspace::reopen_as(identity, record, &guard)?;
    workspace::as_submitter(identity, &record.path, WAIT_MAX, move || {
        let looked = workspace::look(dir.as_fd(), &LOOK, &|_| false);
        let names = looked.found.iter().map(|found| String::from_utf8_lossy(found.path.name()).into_owned());
        Ok(names.collect())
    })
}

/// The refusal of an image that nobody named, with how it came to be.
pub(super) fn refused(mut error: ApiError, pick: &Pick) -> ApiError {
    error.0.message = format!("{} (image = \"auto\": {})", error.0.message, pick.why);
    error
}
