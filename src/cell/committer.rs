//! As whom commits are made in a job's name: what the repository says, read by us with the submitter's rights, before
//! what their own git says. It must never run git in the repository.

use std::path::Path;
use std::time::Duration;

use super::record::Record;
use crate::agent::options;
use crate::git::commit_hook;
use crate::git::head::Repository;
use crate::git::identity::{GitIdentity, submitter_identity};
use crate::job::Identity;
use crate::job::spec::WorkspaceMode;
use crate::workspace::{WorkspaceError, as_submitter};

/// Longest look at the repository.
const TIME_MAX: Duration = Duration::from_secs(20);

/// The identity of commits that are made for `who` in the workspace at `path`, where there is one.
pub(super) async fn committer(who: &Identity, path: Option<&Path>) -> GitIdentity {
    let (name, email) = match path {
        Some(path) => configured(who, path).await,
        None => (None, None),
    };
    let own = submitter_identity(who).await;
    GitIdentity::new(
        name.as_deref().unwrap_or(&own.name),
        email.as_deref().unwrap_or(&own.email),
        &own.name,
        "localhost",
    )
}

/// Whose commits are made in the cell, where there is something to commit to: found out beside the rest, since it
/// runs git as the submitter.
pub(super) fn commit_environment(record: &Record) -> impl Future<Output = Vec<(String, String)>> + use<> {
    let identity = record.identity.clone();
    let path = record.accepted.workspace.as_ref().map(|workspace| workspace.path.clone());
    let wanted = match record.accepted.plan.workspace_mode {
        WorkspaceMode::Copy | WorkspaceMode::Bind => true,
        WorkspaceMode::ReadOnly | WorkspaceMode::None => false,
    };
    async move {
        if !wanted {
            return Vec::new();
        }
        commit_hook::cell_environment(&committer(&identity, path.as_deref()).await, options::GIT_HOOKS)
    }
}

async fn configured(who: &Identity, path: &Path) -> (Option<String>, Option<String>) {
    let (who, path) = (who.clone(), path.to_owned());
    let looked = tokio::task::spawn_blocking(move || {
        let (at, uid) = (path.clone(), who.uid);
        as_submitter::<_, WorkspaceError>(&who, &path, TIME_MAX, move || {
            let found = Repository::holding(&at, uid).ok().flatten();
            Ok(found.map(|repository| repository.committer()).unwrap_or_default())
        })
    });
    looked.await.ok().and_then(Result::ok).unwrap_or_default()
}
