//! `image = "build"`: what a workspace's own Dockerfile or devcontainer would do, found at submit with the rights of the
//! submitter, held against the policy, and told. Nothing is built here, and nothing fetched.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::time::Duration;

use super::wire::ErrorCode;
use super::{Api, ApiError};
use crate::cell::build::ToBuild;
use crate::change::TreePath;
use crate::change::hide::HideRules;
use crate::dockerfile::{self, DockerfileError, Recipe};
use crate::engine::LABEL_OWNER;
use crate::job::spec::Runtime;
use crate::job::{Identity, JobSpec};
use crate::policy::Plan;
use crate::workspace::{self, Guard, WorkspaceError, WorkspaceRecord};

/// Longest wait for the submitter's file system.
const WAIT_MAX: Duration = Duration::from_secs(20);

/// What is to be built for a job, and the list of what that does. `allowed` holds a spec against the policy.
///
/// # Errors
/// `invalid_spec` for what is not built here, `above_policy` for an image that the policy does not allow.
pub(super) async fn planned(
    api: &Api,
    identity: &Identity,
    (spec, plan): (&JobSpec, &Plan),
    record: Option<&WorkspaceRecord>,
    allowed: &(dyn Fn(&JobSpec) -> Result<(), ApiError> + Sync),
) -> Result<(ToBuild, Vec<String>), ApiError> {
    let invalid = |words: String| ApiError::new(ErrorCode::InvalidSpec, format!("image: {words}"));
    if !plan.runtimes.contains(&Runtime::Runc) {
        let words = "image: a build runs under runc, which this policy does not allow (`runtime`)";
        return Err(ApiError::new(ErrorCode::AbovePolicy, words));
    }
    let Some(record) = record.cloned() else {
        return Err(invalid("there is nothing to build without a workspace".to_owned()));
    };
    let (who, state_dir, hide) = (identity.clone(), api.parts.settings.state_dir.clone(), plan.hide.clone());
    let found = tokio::task::spawn_blocking(move || found(&who, &record, &state_dir, &hide));
    let recipe =
        found.await.map_err(|e| ApiError::new(ErrorCode::Internal, e))?.map_err(|error| match error {
            FindError::Workspace(e) => ApiError::new(ErrorCode::Workspace, format!("workspace.path: {e}")),
            FindError::Dockerfile(e) => invalid(e.to_string()),
        })?;
    let parsed = recipe.parsed().map_err(|e| invalid(e.to_string()))?;
    let name = recipe.dockerfile.as_deref().unwrap_or(&recipe.source);
    let mut bases = BTreeMap::new();
    for (base, line) in parsed.bases() {
        let at = |words: String| format!("{name}:{line}: {words}");
        let named = JobSpec { image: Some(base.to_owned()), ..spec.clone() };
        allowed(&named).map_err(|mut error| {
            error.0.message = at(error.0.message);
            error
        })?;
        bases.insert(
            base.to_owned(),
            base_id(api, identity, base).await?.map_err(|words| invalid(at(words)))?,
        );
    }
    let mut list = dockerfile::list(&recipe, &parsed);
    if plan.runtimes.first() != Some(&Runtime::Runc) && parsed.runs().next().is_some() {
        list.push("a build runs under runc, whatever isolates the cell".to_owned());
    }
    Ok((ToBuild { recipe, bases }, list))
}

/// The digest of an image that is built on, or why it cannot be.
async fn base_id(api: &Api, identity: &Identity, base: &str) -> Result<Result<String, String>, ApiError> {
    let info = api.parts.engine.image(base).await;
    let info = info.map_err(|e| ApiError::new(ErrorCode::EngineUnavailable, e))?;
    let Some(info) = info else {
        let words = format!(
            "the image {base} is not on this machine, and a build pulls nothing: pull it, then submit again"
        );
        return Ok(Err(words));
    };
    if info.on_build {
        return Ok(Err(format!("the image {base} has ONBUILD instructions, which are not followed here")));
    }
    let owner = info.labels.get(LABEL_OWNER);
    if owner.is_some_and(|uid| *uid != identity.uid.to_string()) {
        return Ok(Err(format!("the image {base} was built for another user")));
    }
    Ok(Ok(info.id))
}

/// Why nothing was found.
enum FindError {
    Workspace(WorkspaceError),
    Dockerfile(DockerfileError),
}

impl From<DockerfileError> for FindError {
    fn from(error: DockerfileError) -> Self {
        Self::Dockerfile(error)
    }
}

impl From<WorkspaceError> for FindError {
    fn from(error: WorkspaceError) -> Self {
        Self::Workspace(error)
    }
}

fn found(
    identity: &Identity,
    record: &WorkspaceRecord,
    state_dir: &std::path::Path,
    hide: &[String],
) -> Result<Recipe, FindError> {
    let guard = Guard::for_user(state_dir, identity.uid);
    let dir = workspace::reopen_as(identity, record, &guard)?;
    // A pattern that cannot be read was refused with the policy.
    let rules = HideRules::new(hide).unwrap_or_default();
    workspace::as_submitter(identity, &record.path, WAIT_MAX, move || {
        let hidden = |name: &str| TreePath::new(name.as_bytes()).is_ok_and(|path| rules.hides(&path, false));
        Ok(dockerfile::find_in(dir.as_fd(), &hidden)?)
    })
}
