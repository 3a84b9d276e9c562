//! Repositories that jobs name instead of a directory: fetched before the job's row exists, as its submitter. What is
//! refused leaves nothing behind.

use super::wire::ErrorCode;
use super::{Api, ApiError};
use crate::job::spec::WorkspaceMode;
use crate::job::{Identity, JobId, JobSpec};
use crate::policy::Plan;
use crate::source::{Kept, SourceError};

/// Fetches what the spec names; its path is in the spec then.
///
/// # Errors
/// `workspace`, with the key that is at fault; `queue_full` where too many are fetched at once.
pub(super) async fn fetch<'a>(
    api: &'a Api,
    identity: &Identity,
    spec: &mut JobSpec,
    plan: &Plan,
    job: &JobId,
) -> Result<Option<Kept<'a>>, ApiError> {
    let Some(workspace) = spec.workspace.as_mut() else { return Ok(None) };
    let Some(git) = workspace.git.as_ref().filter(|_| plan.workspace_mode != WorkspaceMode::None) else {
        return Ok(None);
    };
    let kept = tokio::select! {
        kept = api.parts.sources.fetch(identity, git, job) => kept.map_err(refusal)?,
        _ = api.shutdown.begun() => {
            // What was begun is swept when the daemon starts next.
            return Err(ApiError::new(ErrorCode::Draining, "the daemon is going down and takes no new jobs"));
        }
    };
    workspace.path = Some(kept.fetched.tree.clone());
    Ok(Some(kept))
}

/// Removes what was fetched for a job that did not come to be, or is deleted. What stays is the sweeper's.
pub(super) async fn forget(api: &Api, identity: &Identity, job: &JobId) {
    if let Err(error) = api.parts.sources.remove(identity, job).await {
        tracing::warn!(%job, %error, "what was fetched for a job is left; the sweeper goes on");
    }
}

fn refusal(error: SourceError) -> ApiError {
    let code = match &error {
        SourceError::Busy { .. } => ErrorCode::QueueFull,
        SourceError::NoGit
        | SourceError::Late { .. }
        | SourceError::NoHost { .. }
        | SourceError::Unreachable { .. }
        | SourceError::Credentials { .. }
        | SourceError::HostKey { .. }
        | SourceError::NotThere { .. }
        | SourceError::Owner { .. }
        | SourceError::Empty { .. }
        | SourceError::UnknownRef { .. }
        | SourceError::Ambiguous { .. }
        | SourceError::NotACommit { .. }
        | SourceError::TooLarge { .. }
        | SourceError::Damaged { .. }
        | SourceError::Lfs { .. }
        | SourceError::Git { .. }
        | SourceError::Place { .. }
        | SourceError::Run(_)
        | SourceError::Workspace(_) => ErrorCode::Workspace,
    };
    let key = error.key();
    ApiError::new(code, format!("workspace.git.{key}: {error}"))
}
