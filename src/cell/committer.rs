//! As whom commits are made in a job's name: what the repository says, read by us with the submitter's rights, before
//! what their own git says. It must never run git in the repository.

use std::path::Path;
use std::time::Duration;

use crate::git::head::Repository;
use crate::git::identity::{GitIdentity, submitter_identity};
use crate::job::Identity;
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
    GitIdentity::new(name.as_deref().unwrap_or(&own.name), email.as_deref().unwrap_or(&own.email), &own.name, "localhost")
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
