//! `GET /v1/jobs/{id}/report`: the file that a job's policy keeps, to its owner. The bytes are the agent's: they
//! are given out as such and never looked into.

use std::sync::Arc;

use axum::extract::{ConnectInfo, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::jobs::{JobPath, path_text};
use super::peer::Peer;
use super::wire::ErrorCode;
use super::{Api, ApiError};
use crate::cell::{Accepted, report};

/// Answers with the report.
pub async fn report(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    id: JobPath,
) -> Result<Response, ApiError> {
    let job = api.own_job(&peer, path_text(&id)).await?;
    let id = &job.row.id;
    let accepted: Accepted = serde_json::from_str(&job.plan_json)
        .map_err(|e| ApiError::new(ErrorCode::Internal, format!("the stored job does not parse: {e}")))?;
    let none = |why: String| ApiError::new(ErrorCode::NotFound, format!("{id} has no report: {why}"));
    let Some(path) = accepted.plan.output.report else {
        return Err(none(format!("its policy {} asks for none", job.row.policy))
            .hint("`report = \"/home/agent/report.md\"` in the policy's [output] keeps that file"));
    };
    if !job.row.state.is_done() {
        return Err(
            none("it is taken when the job ends".to_owned()).hint(format!("`hotcell logs -f {id}` waits"))
        );
    }
    match report::read(&api.parts, id).await {
        Ok(Some(bytes)) => {
            let kind = (header::CONTENT_TYPE, "application/octet-stream");
            Ok(([kind, (header::X_CONTENT_TYPE_OPTIONS, "nosniff")], bytes).into_response())
        }
        Ok(None) => Err(none(format!("no file was left at {}", path.display()))
            .hint(format!("`hotcell logs {id}` ends with a note on it"))),
        Err(error) => Err(ApiError::new(ErrorCode::Internal, format!("the report cannot be read: {error}"))),
    }
}
