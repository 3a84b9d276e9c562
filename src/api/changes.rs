//! What a job changed: `GET …/changes`, `…/diff`, `…/export`, and what becomes of it: `POST …/apply`, `…/checkout`,
//! `…/discard`. Everything that touches a person's files happens with the rights of the job's submitter, and only for
//! them: an admin may look, never apply.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{ConnectInfo, Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::jobs::{JobPath, path_text, view};
use super::peer::Peer;
use super::submit::identity;
use super::wire::{ErrorCode, JobView};
use super::{Api, ApiError};
use crate::cell::changes::{self, ChangesError};
use crate::change::decision::{
    ApplyAnswer, ApplyRequest, CheckoutAnswer, CheckoutRequest, ExportFormat, Form, Standing,
};
use crate::change::{ChangeSet, Summary};
use crate::changes::apply::ApplyError;
use crate::changes::export::ExportError;
use crate::changes::patch::RenderError;
use crate::store::Job;

/// Most patterns of one request.
const GLOBS_MAX: usize = 64;
/// Longest pattern, in bytes.
const GLOB_BYTES_MAX: usize = 1024;

/// What a job changed.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ChangesView {
    /// The job.
    pub job: String,
    /// What was decided about it.
    pub standing: Standing,
    /// The branches that were made of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub branches: Vec<String>,
    /// Its figures.
    pub summary: Summary,
    /// All of it.
    #[serde(flatten)]
    pub set: ChangeSet,
}

/// How `…/export` is asked.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportQuery {
    format: Option<ExportFormat>,
}

/// `GET /v1/jobs/{id}/changes`
pub async fn show(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    id: JobPath,
) -> Result<Json<ChangesView>, ApiError> {
    let job = api.own_job(&peer, path_text(&id)).await?;
    let kept = changes::read(&api.parts, &job).await.map_err(|e| refusal(&job, e))?;
    let summary = kept.set.summary(kept.hash);
    let (job, standing, branches) = (job.row.id.to_string(), kept.standing, kept.branches);
    Ok(Json(ChangesView { job, standing, branches, summary, set: kept.set }))
}

/// `GET /v1/jobs/{id}/diff`
pub async fn diff(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    id: JobPath,
    query: Result<Query<Vec<(String, String)>>, QueryRejection>,
) -> Result<Response, ApiError> {
    let job = api.own_job(&peer, path_text(&id)).await?;
    let Query(query) = query.map_err(|e| ApiError::new(ErrorCode::InvalidRequest, e.body_text()))?;
    let (mut form, mut only) = (Form::Patch, Vec::new());
    for (key, value) in query {
        match (key.as_str(), value.as_str()) {
            ("form", "patch") => form = Form::Patch,
            ("form", "stat") => form = Form::Stat,
            ("form", "name-only") => form = Form::NameOnly,
            ("only", _) => only.push(value),
            _ => {
                let words = format!("{key}={value}: form is patch, stat or name-only; only is a pattern");
                return Err(ApiError::new(ErrorCode::InvalidRequest, words));
            }
        }
    }
    bounded(&only)?;
    let text = changes::render(&api.parts, &job, form, only).await.map_err(|e| refusal(&job, e))?;
    Ok(bytes("text/plain; charset=utf-8", text))
}

/// `GET /v1/jobs/{id}/export`
pub async fn export(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    id: JobPath,
    query: Result<Query<ExportQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    let job = api.own_job(&peer, path_text(&id)).await?;
    let Query(query) = query.map_err(|e| ApiError::new(ErrorCode::InvalidRequest, e.body_text()))?;
    let format = query.format.unwrap_or(ExportFormat::Patch);
    let kind = match format {
        ExportFormat::Patch => "text/x-diff",
        ExportFormat::Tar => "application/x-tar",
        ExportFormat::Bundle => "application/x-git-bundle",
    };
    let made = changes::export(&api.parts, &job, format).await.map_err(|e| refusal(&job, e))?;
    Ok(bytes(kind, made))
}

/// `POST /v1/jobs/{id}/apply`
pub async fn apply(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    id: JobPath,
    request: Result<Json<ApplyRequest>, JsonRejection>,
) -> Result<Json<ApplyAnswer>, ApiError> {
    let job = api.submitters_job(&peer, path_text(&id)).await?;
    let Json(request) = request.map_err(|e| ApiError::new(ErrorCode::InvalidRequest, e.body_text()))?;
    bounded(&request.only)?;
    let answer = changes::apply(&api.parts, &job, request).await.map_err(|e| refusal(&job, e))?;
    Ok(Json(answer))
}

/// `POST /v1/jobs/{id}/checkout`
pub async fn checkout(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    id: JobPath,
    request: Result<Json<CheckoutRequest>, JsonRejection>,
) -> Result<Json<CheckoutAnswer>, ApiError> {
    let job = api.submitters_job(&peer, path_text(&id)).await?;
    let Json(request) = request.map_err(|e| ApiError::new(ErrorCode::InvalidRequest, e.body_text()))?;
    let answer = changes::checkout(&api.parts, &job, request.dir).await.map_err(|e| refusal(&job, e))?;
    Ok(Json(answer))
}

/// `POST /v1/jobs/{id}/discard`
pub async fn discard(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    id: JobPath,
) -> Result<Json<JobView>, ApiError> {
    let job = api.submitters_job(&peer, path_text(&id)).await?;
    changes::discard(&api.parts, &job).await.map_err(|e| refusal(&job, e))?;
    Ok(Json(view(&api, &job).await?))
}

impl Api {
    /// A job of the peer's own: what is done with a person's files is done by them.
    async fn submitters_job(&self, peer: &Peer, id: &str) -> Result<Job, ApiError> {
        let (who, job) = (identity(peer)?, self.own_job(peer, id).await?);
        if job.row.identity.uid == who.uid {
            return Ok(job);
        }
        let words =
            format!("{} is the job of uid {}: only they decide about it", job.row.id, job.row.identity.uid);
        Err(ApiError::new(ErrorCode::NotYours, words))
    }
}

fn bounded(globs: &[String]) -> Result<(), ApiError> {
    if globs.len() <= GLOBS_MAX && globs.iter().all(|glob| glob.len() <= GLOB_BYTES_MAX) {
        return Ok(());
    }
    let words = format!("only: at most {GLOBS_MAX} patterns of at most {GLOB_BYTES_MAX} bytes");
    Err(ApiError::new(ErrorCode::InvalidRequest, words))
}

fn bytes(kind: &'static str, bytes: Vec<u8>) -> Response {
    ([(header::CONTENT_TYPE, kind), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")], bytes).into_response()
}

/// The answer for what went wrong.
fn refusal(job: &Job, error: ChangesError) -> ApiError {
    use ApplyError as A;
    use ChangesError as C;
    let id = &job.row.id;
    let (code, hint) = match &error {
        C::NotDone => (ErrorCode::NotDone, format!("`hotcell logs -f {id}` waits for its end")),
        C::None(_) => (ErrorCode::NotFound, format!("`hotcell show {id}` says how the job ended")),
        C::NoPlace => (
            ErrorCode::InvalidRequest,
            format!(
                "`hotcell apply {id} --to DIR [--branch NAME]`, or `hotcell export {id} --format bundle`"
            ),
        ),
        C::InCopy { mib, .. } => (
            ErrorCode::Internal,
            format!(
                "put right what is named and ask again; `hotcell rm {id}` throws the copy away ({mib} MiB)"
            ),
        ),
        C::Discarded => (ErrorCode::NotFound, format!("`hotcell diff {id}` still shows it")),
        C::Workspace(_) | C::Apply(A::Workspace(_) | A::TargetMoved { .. }) => {
            (ErrorCode::Workspace, format!("`hotcell apply {id} --to DIR` names another directory"))
        }
        C::Apply(A::Conflicts(_)) => (
            ErrorCode::Conflict,
            format!("`hotcell checkout {id} DIR` writes the whole tree elsewhere, to be compared"),
        ),
        C::Apply(A::Busy | A::Interrupted { .. }) => (ErrorCode::Conflict, "try again later".to_owned()),
        C::Apply(A::Nothing { .. } | A::Glob(_) | A::Occupied { .. }) => {
            (ErrorCode::InvalidRequest, format!("`hotcell diff {id} --stat` shows what there is"))
        }
        C::Apply(A::DiskFull { .. }) => {
            (ErrorCode::DiskFull, "free some space and try again; nothing was written".to_owned())
        }
        C::Apply(A::Io { .. }) => {
            (ErrorCode::Workspace, "change the permissions, or leave the path out with --only".to_owned())
        }
        C::Render(RenderError::Pattern(_)) | C::Export(ExportError::Pattern(_)) => {
            (ErrorCode::InvalidRequest, "change the pattern".to_owned())
        }
        C::Render(RenderError::TooLong { .. }) => {
            (ErrorCode::TooLarge, format!("`hotcell export {id} --format tar`"))
        }
        C::Branch(_) | C::Export(ExportError::Commits(_)) => {
            (ErrorCode::Conflict, format!("`hotcell apply {id}` applies it to the files instead"))
        }
        C::Render(RenderError::Git(_) | RenderError::Shelf(_))
        | C::Export(ExportError::Shelf(_) | ExportError::Write(_))
        | C::Extract(_)
        | C::Corrupt(_)
        | C::Shelf(_)
        | C::Kept(_)
        | C::Died(_)
        | C::Apply(A::Stuck { .. } | A::Shelf(_)) => {
            (ErrorCode::Internal, "the daemon's log says more".to_owned())
        }
    };
    ApiError::new(code, error).hint(hint)
}
