//! Listing, showing, cancelling and deleting jobs.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{ConnectInfo, Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use sha2::{Digest, Sha256};

use super::peer::Peer;
use super::submit::identity;
use super::wire::{ErrorCode, JobList, JobView};
use super::{Api, ApiError, kept};
use crate::cell::{Accepted, changes};
use crate::change::BlobId;
use crate::clock;
use crate::driver::{StopError, UnparkError};
use crate::event::Totals;
use crate::job::{Identity, JobId, JobSpec, State as JobState, StopReason};
use crate::store::{Filter, Job, StoreError};

/// Jobs of a page where none is asked for.
const PAGE_DEFAULT: usize = 100;
/// Most jobs of a page.
const PAGE_MAX: usize = 1000;
/// Longest title, in characters.
const TITLE_CHARS_MAX: usize = 80;

/// A job as its owner sees it.
///
/// # Errors
/// When the store fails or holds what this version cannot read.
pub async fn view(api: &Api, job: &Job) -> Result<JobView, ApiError> {
    let corrupt = |e: serde_json::Error| {
        ApiError::new(ErrorCode::Internal, format!("the stored job does not parse: {e}"))
    };
    let spec: JobSpec = serde_json::from_str(&job.spec_json).map_err(corrupt)?;
    let accepted: Accepted = serde_json::from_str(&job.plan_json).map_err(corrupt)?;
    let row = &job.row;
    let totals = match &row.totals {
        Some(totals) => totals.clone(),
        None => {
            let spend = api.parts.store.spend(&row.id).await?;
            Totals {
                charged_micro_usd: spend.charged,
                usage: spend.usage,
                requests: spend.requests,
                ..Totals::default()
            }
        }
    };
    let cell = api.parts.store.agent_cell_of(&row.id).await?;
    Ok(JobView {
        id: row.id.clone(),
        state: row.state.clone(),
        uid: row.identity.uid,
        title: title(&spec.task()),
        policy: row.policy.clone(),
        model: row.model.clone(),
        image: accepted.plan.image.clone(),
        workspace: accepted.workspace.map(|record| record.path.display().to_string()),
        workspace_mode: accepted.plan.workspace_mode,
        labels: row.labels.clone(),
        batch: spec.batch.as_ref().map(|batch| batch.name.clone()),
        priority: row.priority,
        attempt: row.attempt,
        runtime: cell.as_ref().and_then(|row| row.runtime),
        cell: cell.map(|row| row.cell.to_string()),
        created_at: clock::rfc3339(row.created_ms),
        started_at: row.started_ms.map(clock::rfc3339),
        ended_at: row.ended_ms.map(clock::rfc3339),
        last_seq: api.parts.feeds.last_seq(&row.id).or(row.state_seq).unwrap_or(0),
        cost_limit_usd: accepted.plan.limits.cost_micro_usd.as_usd(),
        cost_usd: totals.charged_micro_usd.as_usd(),
        report_bytes: totals.report_bytes,
        prompt_sha256: sha256(spec.task().as_bytes()),
        policy_sha256: sha256(&serde_json::to_vec(&accepted.plan).unwrap_or_default()),
        from: spec.from,
        source: accepted.source,
        totals,
        result: job.result_text.clone(),
        warnings: Vec::new(),
    })
}

fn sha256(bytes: &[u8]) -> String {
    BlobId::of_digest(Sha256::digest(bytes).into()).into()
}

fn title(prompt: &str) -> String {
    let line = prompt.lines().map(str::trim).find(|l| !l.is_empty()).unwrap_or("");
    let mut title: String = line.chars().take(TITLE_CHARS_MAX).collect();
    if title.len() < line.len() {
        title.push('…');
    }
    title
}

/// The id in a path, or why it is none: a path that is no UTF-8 names no job.
pub type JobPath = Result<Path<String>, PathRejection>;

/// The text of the path's id.
pub fn path_text(path: &JobPath) -> &str {
    path.as_ref().map_or("", |Path(id)| id)
}

impl Api {
    /// Whether somebody is an admin.
    pub(super) fn sees_all(&self, who: &Identity) -> bool {
        self.access.is_admin(who.uid)
    }

    /// A job that the peer may see. Somebody else's job is answered like one that is not there.
    ///
    /// # Errors
    /// `not_found`, and what the store says.
    pub async fn own_job(&self, peer: &Peer, id: &str) -> Result<Job, ApiError> {
        let who = identity(peer)?;
        let missing = || {
            let shown: String = id.chars().take(64).collect();
            ApiError::new(ErrorCode::NotFound, format!("there is no job {shown:?} of yours"))
                .hint("`hotcell ls` lists your jobs")
        };
        let id: JobId = id.parse().map_err(|_| missing())?;
        let Some(job) = self.parts.store.job(&id).await? else {
            let uid = if self.sees_all(&who) { None } else { Some(who.uid) };
            if !kept::is_kept(self, uid, &id).await {
                return Err(missing());
            }
            let words = format!("job {id} was removed, by `hotcell rm` or for its age");
            return Err(ApiError::new(ErrorCode::NotFound, words).hint(format!(
                "`hotcell audit {id}` shows what was decided in it, `hotcell cost` what it cost"
            )));
        };
        if job.row.identity.uid != who.uid && !self.sees_all(&who) {
            return Err(missing());
        }
        Ok(job)
    }
}

/// `GET /v1/jobs/{id}`
pub async fn show(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    id: JobPath,
) -> Result<Json<JobView>, ApiError> {
    let job = api.own_job(&peer, path_text(&id)).await?;
    Ok(Json(view(&api, &job).await?))
}

/// `GET /v1/jobs`
pub async fn list(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    query: Result<Query<Vec<(String, String)>>, QueryRejection>,
) -> Result<Json<JobList>, ApiError> {
    let Query(query) = query.map_err(|e| ApiError::new(ErrorCode::InvalidRequest, e.body_text()))?;
    let who = identity(&peer)?;
    let filter = filter(&api, &who, query)?;
    let page = api.parts.store.jobs(filter).await?;
    let mut jobs = Vec::with_capacity(page.rows.len());
    for row in &page.rows {
        // A job deleted between the two reads is left out.
        if let Some(job) = api.parts.store.job(&row.id).await? {
            jobs.push(view(&api, &job).await?);
        }
    }
    Ok(Json(JobList { jobs, next_cursor: page.next_cursor.map(|c| c.to_string()) }))
}

fn filter(api: &Api, who: &Identity, query: Vec<(String, String)>) -> Result<Filter, ApiError> {
    let bad =
        |key: &str, problem: String| ApiError::new(ErrorCode::InvalidRequest, format!("{key}: {problem}"));
    let mut filter = Filter { uid: Some(who.uid), limit: PAGE_DEFAULT, ..Filter::default() };
    for (key, value) in query {
        match key.as_str() {
            "state" => {
                let states: Vec<String> = value.split(',').map(str::to_owned).collect();
                if let Some(wrong) = states.iter().find(|s| !JobState::NAMES.contains(&s.as_str())) {
                    let known = JobState::NAMES.join(", ");
                    return Err(bad("state", format!("{wrong:?} is none of {known}")));
                }
                filter.states = Some(states);
            }
            "label" => match value.split_once('=') {
                Some((name, value)) => filter.labels.push((name.to_owned(), value.to_owned())),
                None => return Err(bad("label", "must be name=value".into())),
            },
            "policy" => filter.policy = Some(value),
            "model" => filter.model = Some(value),
            "since_ms" | "until_ms" => {
                let ms =
                    Some(value.parse().map_err(|_| bad(&key, "must be milliseconds since 1970".into()))?);
                if key == "since_ms" { filter.since_ms = ms } else { filter.until_ms = ms }
            }
            "limit" => {
                let limit = value.parse().ok().filter(|n| (1..=PAGE_MAX).contains(n));
                filter.limit = limit.ok_or_else(|| bad("limit", format!("must be from 1 to {PAGE_MAX}")))?;
            }
            "cursor" => {
                filter.cursor =
                    Some(value.parse().map_err(|_| bad("cursor", "is none that was given".into()))?)
            }
            "all" => {
                if !api.sees_all(who) {
                    return Err(bad("all", "only an admin sees the jobs of all users".into()));
                }
                filter.uid = None;
            }
            _ => return Err(bad(&key, "is no parameter of this path".into())),
        }
    }
    Ok(filter)
}

/// `POST /v1/jobs/{id}/cancel`: 202 while it is being stopped, 200 when it is over.
pub async fn cancel(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    id: JobPath,
) -> Result<Response, ApiError> {
    let job = api.own_job(&peer, path_text(&id)).await?;
    let who = identity(&peer)?;
    let id = job.row.id;
    match api.driver.stop(id.clone(), StopReason::Cancelled, format!("by uid {}", who.uid)).await {
        // A job that is over stays as it is: cancelling twice is no mistake.
        Ok(()) | Err(StopError::Over) => {}
        Err(StopError::Draining) => {
            return Err(ApiError::new(ErrorCode::Draining, "the daemon is going down"));
        }
        Err(StopError::Record(error)) => return Err(ApiError::new(ErrorCode::Internal, error)),
    }
    let job = api.own_job(&peer, id.as_str()).await?;
    let status = if job.row.state.is_done() { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok((status, Json(view(&api, &job).await?)).into_response())
}

/// `POST /v1/jobs/{id}/unpark`: lets a parked job go on before its time.
pub async fn unpark(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    id: JobPath,
) -> Result<Json<JobView>, ApiError> {
    let id = api.own_job(&peer, path_text(&id)).await?.row.id;
    api.driver.unpark(id.clone()).await.map_err(|error| match error {
        UnparkError::NotParked { state } => {
            ApiError::new(ErrorCode::NotParked, format!("{id} is {state}; only a parked job can be unparked"))
        }
        UnparkError::Draining => ApiError::new(ErrorCode::Draining, "the daemon is going down"),
        UnparkError::Record(error) => ApiError::new(ErrorCode::Internal, error),
    })?;
    let job = api.own_job(&peer, id.as_str()).await?;
    Ok(Json(view(&api, &job).await?))
}

/// `POST /v1/jobs/{id}/retry`: the task of a job that is over once more, as a new job: its workspace is opened anew, and
/// the policy counts as it is now.
pub async fn retry(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    id: JobPath,
    headers: axum::http::HeaderMap,
) -> Result<Response, ApiError> {
    let job = api.own_job(&peer, path_text(&id)).await?;
    let id = &job.row.id;
    if !job.row.state.is_done() {
        let words = format!("{id} is {}; only a job that is over can be tried again", job.row.state.name());
        return Err(
            ApiError::new(ErrorCode::NotDone, words).hint(format!("`hotcell wait {id}` waits for it"))
        );
    }
    let attached = serde_json::from_str::<JobSpec>(&job.spec_json)
        .is_ok_and(|spec| spec.command.is_some_and(|command| command.attached));
    if attached {
        let words = format!("{id} was a command with its client at the other end, which is gone");
        return Err(ApiError::new(ErrorCode::Conflict, words).hint("run it again: hotcell exec … -- COMMAND"));
    }
    super::submit::submit(State(api), ConnectInfo(peer), headers, Ok(job.spec_json.into())).await
}

/// One removal at a time: two of the same job would write its audit over each other.
static REMOVING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// `DELETE /v1/jobs/{id}`: row, journal and all; only of a job that is over. Its audit is kept.
pub async fn delete(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    id: JobPath,
) -> Result<StatusCode, ApiError> {
    let job = api.own_job(&peer, path_text(&id)).await?;
    remove(&api, job).await.map(|()| StatusCode::NO_CONTENT)
}

/// Removes a job that is over, with all that is kept of it but its audit and its costs.
///
/// # Errors
/// `not_done`, and what the disk and the store say.
pub(super) async fn remove(api: &Arc<Api>, job: Job) -> Result<(), ApiError> {
    let one_at_a_time = REMOVING.lock().await;
    if api.parts.store.job(&job.row.id).await?.is_none() {
        // Somebody else did meanwhile.
        return Ok(());
    }
    let (row, fetched) = (job.row, job.plan_json);
    let id = &row.id;
    let not_done = |state: &str| {
        let words = format!("{id} is {state}; only a job that is over can be deleted");
        ApiError::new(ErrorCode::NotDone, words).hint(format!("`hotcell cancel {id}` ends it"))
    };
    if !row.state.is_done() {
        return Err(not_done(row.state.name()));
    }
    kept::keep(api, &row).await.map_err(|error| {
        ApiError::new(ErrorCode::Internal, error).hint("nothing was deleted; free some space and try again")
    })?;
    match api.parts.store.delete(id).await {
        Ok(()) => {}
        Err(StoreError::NotDone { state }) => return Err(not_done(&state.to_string())),
        Err(error) => return Err(error.into()),
    }
    drop(one_at_a_time);
    let shelf = changes::shelf(&api.parts, id);
    let gone = tokio::task::spawn_blocking(move || shelf.remove()).await;
    if let Ok(Err(error)) = gone {
        tracing::warn!(job = %id, %error, "the change set of a deleted job is left; the sweeper goes on");
    }
    if serde_json::from_str::<Accepted>(&fetched).is_ok_and(|accepted| accepted.source.is_some()) {
        super::sources::forget(api, &row.identity, id).await;
    }
    let dir = api.parts.settings.journal_dir(id);
    match tokio::fs::remove_dir_all(&dir).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(ApiError::new(
            ErrorCode::Internal,
            format!("the job's row is deleted, its events are not: {error}"),
        )),
        _ => Ok(()),
    }
}
