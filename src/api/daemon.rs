//! `POST /v1/daemon/…`: ends the daemon or holds its starts. Only for the user the daemon runs as and for admins; what
//! is done about a job is the loop's. A pause is stored before it is told.

use std::sync::Arc;

use axum::Json;
use axum::extract::{ConnectInfo, State};
use axum::http::StatusCode;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::peer::Peer;
use super::submit::identity;
use super::wire::ErrorCode;
use super::{Api, ApiError};
use crate::clock;
use crate::driver::{How, PauseError, attended};
use crate::job::{Identity, JobId};
use crate::store::Paused;

/// What `POST /v1/daemon/drain` and `/detach` answer.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct EndingView {
    /// How the daemon is ending: more urgent than asked where it was ending so before.
    pub how: How,
    /// Its process: gone when it has ended.
    pub pid: u32,
    /// Jobs that have a slot.
    pub running: u64,
    /// Jobs that wait, for the next daemon.
    pub queued: u64,
    /// Jobs that a detach ends: commands whose clients take part in them.
    pub lost: Vec<JobId>,
}

/// What `POST /v1/daemon/pause` and `/resume` answer, and what others tell of a pause.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct PauseView {
    /// Absent: jobs start.
    pub paused: Option<PausedView>,
}

/// A pause.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct PausedView {
    /// RFC 3339, UTC.
    pub since: String,
    /// Host user id of who said so.
    pub uid: u32,
}

impl PausedView {
    /// In words.
    pub fn words(&self) -> String {
        format!("paused by uid {} at {}: nothing starts until `hotcell resume`", self.uid, self.since)
    }
}

impl From<Paused> for PausedView {
    fn from(paused: Paused) -> Self {
        Self { since: clock::rfc3339(paused.since_ms), uid: paused.uid }
    }
}

impl Api {
    /// The pause, where there is one.
    ///
    /// # Errors
    /// What the store says.
    pub(super) async fn paused(&self) -> Result<Option<PausedView>, ApiError> {
        Ok(self.parts.store.paused().await?.map(Into::into))
    }

    /// Who may end and hold the daemon: an admin, or whom it runs as.
    fn commander(&self, peer: &Peer) -> Result<Identity, ApiError> {
        let who = identity(peer)?;
        if self.access.is_admin(who.uid) || who.uid == rustix::process::geteuid().as_raw() {
            return Ok(who);
        }
        self.granted(&who)?;
        let words = format!("user {} may neither end nor hold the daemon", who.uid);
        Err(ApiError::new(ErrorCode::AboveAccess, words)
            .hint("the user whom the daemon runs as can, and those whom it names in admin_uids"))
    }

    async fn end(&self, peer: &Peer, how: How) -> Result<(StatusCode, Json<EndingView>), ApiError> {
        let who = self.commander(peer)?;
        let counts = self.parts.store.counts_by_state().await?;
        let waits = |name: &str| matches!(name, "queued" | "parked");
        let sum = |waiting| {
            counts.iter().filter(|(n, _)| **n != "done" && waits(n) == waiting).map(|(_, n)| n).sum()
        };
        let (running, queued) = (sum(false), sum(true));
        let lost = match how {
            How::Detach | How::Leave => attended(&self.parts).await?,
            How::Drain | How::Now => Vec::new(),
        };
        tracing::info!(uid = who.uid, ?how, "the daemon is asked to end");
        self.shutdown.ask(how);
        let how = self.shutdown.how().unwrap_or(how);
        let pid = std::process::id();
        Ok((StatusCode::ACCEPTED, Json(EndingView { how, pid, running, queued, lost })))
    }

    async fn hold(&self, peer: &Peer, hold: bool) -> Result<Json<PauseView>, ApiError> {
        let who = self.commander(peer)?;
        let paused = hold.then(|| Paused { since_ms: clock::wall_ms(), uid: who.uid });
        self.driver.pause(paused).await.map_err(|error| match error {
            PauseError::Draining => ApiError::new(ErrorCode::Draining, error),
            PauseError::Store(error) => error.into(),
        })?;
        tracing::info!(uid = who.uid, hold, "starts are held or let go");
        Ok(Json(PauseView { paused: self.paused().await? }))
    }
}

/// `POST /v1/daemon/drain`: no new jobs; running ones may end, within the drain limit.
///
/// # Errors
/// `above_access`.
pub async fn drain(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
) -> Result<(StatusCode, Json<EndingView>), ApiError> {
    api.end(&peer, How::Drain).await
}

/// `POST /v1/daemon/detach`: the daemon ends, its cells go on.
///
/// # Errors
/// `above_access`.
pub async fn detach(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
) -> Result<(StatusCode, Json<EndingView>), ApiError> {
    api.end(&peer, How::Detach).await
}

/// `POST /v1/daemon/pause`: nothing starts, over a restart too.
///
/// # Errors
/// `above_access`, `draining`.
pub async fn pause(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
) -> Result<Json<PauseView>, ApiError> {
    api.hold(&peer, true).await
}

/// `POST /v1/daemon/resume`: what waits starts again.
///
/// # Errors
/// `above_access`, `draining`.
pub async fn resume(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
) -> Result<Json<PauseView>, ApiError> {
    api.hold(&peer, false).await
}
