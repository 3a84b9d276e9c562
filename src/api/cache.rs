//! `GET` and `DELETE /v1/cache`: what is kept of package hosts. Admins see each entry and remove them; everybody else sees
//! how much there is of the policies that they may use, and no URL of anybody's.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{ConnectInfo, Query, State};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::peer::Peer;
use super::submit::identity;
use super::wire::ErrorCode;
use super::{Api, ApiError};
use crate::clock;
use crate::gateway::packages::{Choice, Listed, PackageCache};

/// What `GET /v1/cache` answers.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct CacheView {
    /// How much there is of each policy that the asker may use.
    pub policies: Vec<PolicyCache>,
    /// All of it; for admins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whole: Option<WholeCache>,
    /// Each entry, those first that were used last; for admins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub entries: Vec<CacheEntry>,
    /// Whether there are more entries than are listed.
    pub truncated: bool,
}

/// What is kept for jobs under one policy.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct PolicyCache {
    /// The policy.
    pub policy: String,
    /// Answers.
    pub entries: u64,
    /// Bytes of their bodies; one that several answers share counts for each.
    pub bytes: u64,
}

/// The cache as a whole; counts are since the daemon began.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct WholeCache {
    /// Bytes of the disk that it takes.
    pub bytes: u64,
    /// Bytes that it may take.
    pub bytes_max: u64,
    /// Answers without a word to their host.
    pub hits: u64,
    /// Answers that their host said are still right.
    pub revalidated: u64,
    /// Answers that had to be fetched.
    pub misses: u64,
    /// Entries that went for others, or for the disk.
    pub evicted: u64,
}

/// One answer that is kept.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct CacheEntry {
    /// The policy of the jobs that may get it.
    pub policy: String,
    /// What it answers.
    pub url: String,
    /// The credential that it was asked for with, by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential: Option<String>,
    /// The `Accept` that it answers.
    pub accept: String,
    /// Length of its body.
    pub bytes: u64,
    /// When its host last answered for it, RFC 3339.
    pub fetched_at: String,
    /// When it was used last, RFC 3339.
    pub used_at: String,
}

/// What `DELETE /v1/cache` answers.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct CacheRemoved {
    /// Entries that are gone.
    pub removed: u64,
    /// Bytes of their bodies.
    pub bytes: u64,
}

/// Which entries are meant.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    policy: Option<String>,
    prefix: Option<String>,
    all: Option<String>,
}

/// `GET /v1/cache`
///
/// # Errors
/// A query that is none.
pub async fn list(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    query: Result<Query<Asked>, QueryRejection>,
) -> Result<Json<CacheView>, ApiError> {
    let Query(asked) = query.map_err(|e| ApiError::new(ErrorCode::InvalidRequest, e.body_text()))?;
    let who = identity(&peer)?;
    let (admin, grant) = (api.access.is_admin(who.uid), api.access.grant(&who));
    let may = |policy: &str| admin || grant.as_ref().is_some_and(|grant| grant.has_policy(policy));
    let mut view = CacheView { policies: Vec::new(), whole: None, entries: Vec::new(), truncated: false };
    let Some(cache) = api.parts.egress.packages() else { return Ok(Json(view)) };
    let wanted = |policy: &str| asked.policy.as_deref().is_none_or(|asked| asked == policy);
    view.policies = cache
        .policies()
        .into_iter()
        .filter(|(policy, _)| may(policy) && wanted(policy))
        .map(|(policy, sum)| PolicyCache { policy, entries: sum.entries, bytes: sum.bytes })
        .collect();
    if admin {
        view.whole = Some(whole(cache));
        let (cache, choice) = (Arc::clone(cache), Choice { policy: asked.policy, prefix: asked.prefix });
        let listed = tokio::task::spawn_blocking(move || cache.list(&choice)).await;
        let (listed, truncated) = listed.map_err(|e| ApiError::new(ErrorCode::Internal, e))?;
        (view.entries, view.truncated) = (listed.into_iter().map(entry).collect(), truncated);
    }
    Ok(Json(view))
}

/// `DELETE /v1/cache`
///
/// # Errors
/// Who asks is no admin, or did not say which entries.
pub async fn remove(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    query: Result<Query<Asked>, QueryRejection>,
) -> Result<Json<CacheRemoved>, ApiError> {
    let Query(asked) = query.map_err(|e| ApiError::new(ErrorCode::InvalidRequest, e.body_text()))?;
    let who = identity(&peer)?;
    if !api.access.is_admin(who.uid) {
        return Err(ApiError::new(ErrorCode::AboveAccess, "only admins remove entries of the package cache")
            .hint("whoever runs the daemon can, or can name you in admin_uids"));
    }
    let all = asked.all.as_deref() == Some("1");
    if all == (asked.policy.is_some() || asked.prefix.is_some()) {
        let words = "name a policy, the beginning of a URL, or all=1, and not all=1 beside another";
        return Err(ApiError::new(ErrorCode::InvalidRequest, words));
    }
    let Some(cache) = api.parts.egress.packages().cloned() else {
        return Ok(Json(CacheRemoved { removed: 0, bytes: 0 }));
    };
    let choice = Choice { policy: asked.policy, prefix: asked.prefix };
    let removed = tokio::task::spawn_blocking(move || cache.remove_chosen(&choice)).await;
    let removed = removed.map_err(|e| ApiError::new(ErrorCode::Internal, e))?;
    tracing::info!(uid = who.uid, entries = removed.entries, "entries of the package cache were removed");
    Ok(Json(CacheRemoved { removed: removed.entries, bytes: removed.bytes }))
}

fn whole(cache: &PackageCache) -> WholeCache {
    let count = &cache.counters;
    WholeCache {
        bytes: cache.size().0,
        bytes_max: cache.limits().bytes_max,
        hits: count.hits.load(Ordering::Relaxed),
        revalidated: count.revalidated.load(Ordering::Relaxed),
        misses: count.misses.load(Ordering::Relaxed),
        evicted: count.evicted.load(Ordering::Relaxed),
    }
}

fn entry(listed: Listed) -> CacheEntry {
    let Listed { key, bytes, at_ms, used_ms } = listed;
    CacheEntry {
        policy: key.policy,
        url: key.url,
        credential: key.credential.map(|used| used.name),
        accept: key.accept,
        bytes,
        fetched_at: clock::rfc3339(at_ms),
        used_at: clock::rfc3339(used_ms),
    }
}
