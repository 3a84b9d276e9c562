//! Who may ask at all. With `[[access]]` entries, every request of somebody who is not listed is refused, but
//! for the few that tell nothing of anybody's jobs; a new route is closed until it is named here.

use std::sync::Arc;

use axum::extract::{ConnectInfo, Request, State};
use axum::middleware::Next;
use axum::response::Response;

use super::peer::Peer;
use super::submit::identity;
use super::wire::ErrorCode;
use super::{Api, ApiError};
use crate::job::Identity;
use crate::policy::{AccessError, Grant};

/// Open to everybody who can open the socket: health, figures of the daemon as a whole, the API's description,
/// and the answer to "what may I do?"; and what asks itself who may (the user whom the daemon runs as need not be listed).
const OPEN: [&str; 8] = [
    "/healthz",
    "/metrics",
    "/v1/openapi.json",
    "/v1/whoami",
    "/v1/daemon/drain",
    "/v1/daemon/detach",
    "/v1/daemon/pause",
    "/v1/daemon/resume",
];

impl From<AccessError> for ApiError {
    fn from(error: AccessError) -> Self {
        Self::new(ErrorCode::AboveAccess, error).hint("`hotcell whoami` shows what you may use")
    }
}

impl Api {
    /// What the peer may use.
    ///
    /// # Errors
    /// `not_listed`.
    pub fn granted(&self, who: &Identity) -> Result<Grant, ApiError> {
        self.access.grant(who).ok_or_else(|| {
            self.parts.metrics.not_listed();
            let words = format!(
                "user {} is not listed: the daemon's [[access]] names neither this user nor a group of theirs",
                who.uid
            );
            ApiError::new(ErrorCode::NotListed, words)
                .hint("whoever runs the daemon can add you; a new group counts after your next login")
        })
    }
}

/// Lets a request through where its peer is listed.
///
/// # Errors
/// `not_listed`.
pub async fn listed(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if !OPEN.contains(&request.uri().path()) {
        api.granted(&identity(&peer)?)?;
    }
    Ok(next.run(request).await)
}
