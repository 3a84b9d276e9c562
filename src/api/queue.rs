//! `GET /v1/queue`: what waits, in the order in which it would start as far as that is known, and why. Who is no admin
//! sees their own jobs; of others' they learn how many there are.

use std::sync::Arc;

use axum::Json;
use axum::extract::{ConnectInfo, State};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::daemon::PausedView;
use super::peer::Peer;
use super::submit::identity;
use super::wire::ErrorCode;
use super::{Api, ApiError};
use crate::clock;
use crate::job::{JobId, State as JobState};
use crate::store::Filter;

/// Most jobs that are shown, of those that wait for a slot and of those that wait for a moment.
const SHOWN_MAX: usize = 1000;

/// What `GET /v1/queue` answers.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct QueueView {
    /// The daemon's slots.
    pub slots: QueueSlots,
    /// Absent: jobs start.
    pub paused: Option<PausedView>,
    /// Jobs of all users that wait for a slot.
    pub waiting: u64,
    /// Jobs of all users that wait for a moment.
    pub parked: u64,
    /// The asker's, for admins everybody's, in the order in which they would start; parked ones after them, by their
    /// moments. At most 1000 of each.
    pub jobs: Vec<QueuedJob>,
}

/// The daemon's slots.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct QueueSlots {
    /// Jobs that have one.
    pub used: u64,
    /// All.
    pub total: u64,
}

/// A job that waits.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct QueuedJob {
    /// Its id.
    pub id: JobId,
    /// Its place among all that wait for a slot, from 1; none of a parked one.
    pub position: Option<u64>,
    /// Whose it is.
    pub uid: u32,
    /// Higher goes first, among one user's.
    pub priority: i8,
    /// `slots`, `user_limit`, `credential_limit`, `policy_limit`, `memory`, `disk`, `paused`, `draining`, `engine_away`; of a parked one the reason of its parking.
    pub why: String,
    /// Until when it is parked, RFC 3339.
    pub until: Option<String>,
}

/// Answers what waits.
///
/// # Errors
/// `draining` where the loop has ended, and what the store says.
pub async fn queue(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
) -> Result<Json<QueueView>, ApiError> {
    let who = identity(&peer)?;
    let uid = (!api.sees_all(&who)).then_some(who.uid);
    let gone = || ApiError::new(ErrorCode::Draining, "the daemon is going down");
    let now = api.driver.look().await.ok_or_else(gone)?;
    let slots = QueueSlots { used: now.running() as u64, total: now.slots() as u64 };
    let (waiting, parked) = (now.queued() as u64, now.parked() as u64);
    // Thousands may wait: not on the loop's thread.
    let order = tokio::task::spawn_blocking(move || now.order()).await;
    let order = order.map_err(|error| ApiError::new(ErrorCode::Internal, error))?;
    let seen = order.into_iter().zip(1..).filter(|(w, _)| uid.is_none_or(|uid| uid == w.ticket.uid));
    let mut jobs: Vec<QueuedJob> = seen
        .take(SHOWN_MAX)
        .map(|(waiting, position)| QueuedJob {
            id: waiting.job,
            position: Some(position),
            uid: waiting.ticket.uid,
            priority: waiting.ticket.priority,
            why: waiting.waits.as_str().to_owned(),
            until: None,
        })
        .collect();
    jobs.extend(parked_jobs(&api, uid).await?);
    Ok(Json(QueueView { slots, paused: api.paused().await?, waiting, parked, jobs }))
}

async fn parked_jobs(api: &Api, uid: Option<u32>) -> Result<Vec<QueuedJob>, ApiError> {
    let states = Some(vec!["parked".to_owned()]);
    let filter = Filter { states, uid, limit: SHOWN_MAX, ..Filter::default() };
    let mut found = Vec::new();
    for row in api.parts.store.jobs(filter).await?.rows {
        if let JobState::Parked { parked } = &row.state {
            let job = QueuedJob {
                id: row.id,
                position: None,
                uid: row.identity.uid,
                priority: row.priority,
                why: parked.why.as_str().to_owned(),
                until: Some(clock::rfc3339(parked.until_ms)),
            };
            found.push((parked.until_ms, job));
        }
    }
    found.sort_by_key(|(until_ms, _)| *until_ms);
    Ok(found.into_iter().map(|(_, job)| job).collect())
}
