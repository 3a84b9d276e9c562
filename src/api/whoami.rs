//! `GET /v1/whoami`: who the kernel says asks, and what they may do. Answers those who are not listed too, and
//! tells nobody anything of others.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::{ConnectInfo, State};

use super::peer::Peer;
use super::submit::identity;
use super::wire::{ErrorCode, GroupView, PolicyView, SlotsView, WhoAmI};
use super::{Api, ApiError, cost};
use crate::config::Names;
use crate::policy::{Grant, Policy};

/// Answers who asks.
///
/// # Errors
/// When the kernel would not tell, or the store fails.
pub async fn whoami(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
) -> Result<Json<WhoAmI>, ApiError> {
    let who = identity(&peer)?;
    // Read now: people and groups come and go while the daemon runs.
    let names = tokio::task::spawn_blocking(Names::of_machine);
    let names = names.await.map_err(|e| ApiError::new(ErrorCode::Internal, e))?;
    let grant = api.access.grant(&who);
    let (used, queued) = jobs_of(&api, who.uid).await?;
    let listed = grant.is_some();
    let max = grant.as_ref().map_or(0, |g| g.slots.unwrap_or(api.slots).min(api.slots));
    let groups = std::iter::once(who.gid).chain(who.groups.iter().copied());
    let group = |gid| GroupView { gid, name: names.group(gid).map(str::to_owned) };
    let now = api.policies().await?;
    let (policies, default_policy) = grant.as_ref().map(|g| policies(&api, &now, g)).unwrap_or_default();
    let budgets = match &grant {
        Some(grant) => cost::own_budgets(&api, &who, grant).await?,
        None => Vec::new(),
    };
    Ok(Json(WhoAmI {
        uid: who.uid,
        user: names.user(who.uid).map(str::to_owned),
        groups: groups.map(group).collect(),
        admin: api.access.is_admin(who.uid),
        listed,
        policies,
        default_policy,
        slots: SlotsView { used, queued, max },
        budgets,
        providers: grant.as_ref().map(|g| g.providers.clone()).unwrap_or_default(),
        images: grant.as_ref().map(|g| g.images.clone()).unwrap_or_default(),
        access: grant.map(|g| g.entries).unwrap_or_default(),
    }))
}

/// Policies that may be named, and the one of a job that names none.
fn policies(api: &Api, now: &BTreeMap<String, Policy>, grant: &Grant) -> (Vec<PolicyView>, Option<String>) {
    let mine = now.values().filter(|policy| grant.has_policy(&policy.name));
    let views = mine.map(|policy| PolicyView {
        name: policy.name.clone(),
        description: policy.description.clone(),
        cost_usd: policy.limits.cost_usd,
    });
    let default = grant.default_policy.as_ref().unwrap_or(&api.default_policy);
    (views.collect(), Some(default.clone()).filter(|name| grant.has_policy(name)))
}

/// This user's jobs that have a slot, and those that wait.
async fn jobs_of(api: &Api, uid: u32) -> Result<(u64, u64), ApiError> {
    let counts = api.parts.store.open_counts(uid).await?;
    let waits = |state: &str| matches!(state, "queued" | "parked");
    let sum = |waiting: bool| counts.iter().filter(|(s, _)| waits(s) == waiting).map(|(_, n)| n).sum();
    Ok((sum(false), sum(true)))
}
