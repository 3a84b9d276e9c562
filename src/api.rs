//! The HTTP API on the unix socket. Who asks is told by the kernel (SO_PEERCRED); nothing in a request can
//! change it. A job is visible to its owner and to the admin uids, and to everybody else it does not exist.
//! Every error has the one shape of [`wire::ErrorBody`].

pub mod access;
pub mod attach;
pub mod audit;
mod auto;
mod build;
pub mod cache;
pub mod changes;
pub mod cost;
pub mod daemon;
pub mod doctor;
pub mod events;
pub mod gc;
pub mod jobs;
mod kept;
pub mod notices;
pub mod openapi;
pub mod peer;
pub mod queue;
pub mod report;
mod sources;
pub mod submit;
pub mod support;
pub mod whoami;
pub mod wire;

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};

use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};

use crate::cell::Parts;
use crate::config::PolicyShelf;
use crate::driver::{self, Handle, Shutdown};
use crate::job::spec::SPEC_BYTES_MAX;
use crate::policy::{Access, Defaults, Policy};
use wire::{ErrorBody, ErrorCode, ErrorInfo, Health};

/// What the handlers need.
#[derive(Debug)]
pub struct Api {
    /// The hands.
    pub parts: Arc<Parts>,
    /// The loop.
    pub driver: Handle,
    /// The policies.
    pub policies: Arc<PolicyShelf>,
    /// The policy of a job that names none.
    pub default_policy: String,
    /// Model, image and provider where neither job nor policy names one.
    pub defaults: Defaults,
    /// Who may use what, and who sees all jobs.
    pub access: Access,
    /// Jobs that run at the same time.
    pub slots: u32,
    /// How long, and how much of it, what jobs leave is kept.
    pub retention: crate::retention::Limits,
    /// Most jobs that wait.
    pub queued_jobs_max: u64,
    /// The engine's address, for people.
    pub engine_address: String,
    /// What does not work at the moment, in words.
    pub problems: RwLock<Vec<String>>,
    /// Who is told of what happens to jobs.
    pub notifiers: Vec<crate::notifier::Notifier>,
    /// How the daemon is going down, once it is.
    pub shutdown: Shutdown,
}

impl Api {
    /// The policies by name, as their files say now.
    ///
    /// # Errors
    /// When the look at them died.
    pub async fn policies(&self) -> Result<Arc<BTreeMap<String, Policy>>, ApiError> {
        let shelf = self.policies.clone();
        let now = tokio::task::spawn_blocking(move || shelf.now()).await;
        now.map_err(|error| ApiError::new(ErrorCode::Internal, error))
    }
}

/// An error answer.
#[derive(Debug)]
pub struct ApiError(pub ErrorInfo);

impl ApiError {
    /// An error with its words.
    pub fn new(code: ErrorCode, message: impl ToString) -> Self {
        Self(ErrorInfo { code, blame: code.blame(), message: message.to_string(), hint: None })
    }

    /// What to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl ToString) -> Self {
        self.0.hint = Some(hint.to_string());
        self
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, axum::Json(ErrorBody { error: self.0 })).into_response()
    }
}

impl From<crate::store::StoreError> for ApiError {
    fn from(error: crate::store::StoreError) -> Self {
        tracing::error!(%error, "the store failed a request");
        Self::new(ErrorCode::Internal, error)
    }
}

/// All routes.
pub fn router(api: Arc<Api>) -> Router {
    Router::new()
        .route("/v1/jobs", post(submit::submit).get(jobs::list))
        .route("/v1/jobs/{id}", get(jobs::show).delete(jobs::delete))
        .route("/v1/jobs/{id}/events", get(events::events))
        .route("/v1/jobs/{id}/audit", get(audit::job))
        .route("/v1/jobs/{id}/report", get(report::report))
        .route("/v1/jobs/{id}/support", get(support::support))
        .route("/v1/jobs/{id}/changes", get(changes::show))
        .route("/v1/jobs/{id}/diff", get(changes::diff))
        .route("/v1/jobs/{id}/export", get(changes::export))
        .route("/v1/jobs/{id}/apply", post(changes::apply))
        .route("/v1/jobs/{id}/checkout", post(changes::checkout))
        .route("/v1/jobs/{id}/discard", post(changes::discard))
        .route("/v1/jobs/{id}/attach", post(attach::attach))
        .route("/v1/jobs/{id}/cancel", post(jobs::cancel))
        .route("/v1/audit", get(audit::daemon))
        .route("/v1/daemon/drain", post(daemon::drain))
        .route("/v1/daemon/detach", post(daemon::detach))
        .route("/v1/daemon/pause", post(daemon::pause))
        .route("/v1/daemon/resume", post(daemon::resume))
        .route("/v1/queue", get(queue::queue))
        .route("/v1/whoami", get(whoami::whoami))
        .route("/v1/doctor", get(doctor::doctor).post(doctor::attack::attack))
        .route("/v1/jobs/{id}/unpark", post(jobs::unpark))
        .route("/v1/jobs/{id}/retry", post(jobs::retry))
        .route("/v1/cost", get(cost::cost))
        .route("/v1/budgets", get(cost::budgets))
        .route("/v1/gc", post(gc::collect))
        .route("/v1/notices", get(notices::list))
        .route("/v1/notices/test", post(notices::test))
        .route("/v1/cache", get(cache::list).delete(cache::remove))
        .route("/v1/openapi.json", get(openapi::document))
        .route("/healthz", get(health))
        .route("/metrics", get(metrics))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        // A little more than the largest spec, so that the spec's own error can name its size.
        .layer(DefaultBodyLimit::max(SPEC_BYTES_MAX + 64 * 1024))
        .layer(axum::middleware::from_fn_with_state(api.clone(), access::listed))
        .with_state(api)
}

/// Routes for a TCP address: metrics and health, nothing of anybody's jobs.
pub fn metrics_router(api: Arc<Api>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(health))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .with_state(api)
}

async fn no_route(method: axum::http::Method, uri: axum::http::Uri) -> ApiError {
    ApiError::new(ErrorCode::NoRoute, format!("there is no {method} {}", uri.path()))
        .hint("GET /v1/openapi.json lists what there is")
}

async fn no_method(method: axum::http::Method, uri: axum::http::Uri) -> ApiError {
    ApiError::new(ErrorCode::MethodNotAllowed, format!("{} does not take {method}", uri.path()))
        .hint("GET /v1/openapi.json lists what there is")
}

async fn health(State(api): State<Arc<Api>>) -> axum::Json<Health> {
    axum::Json(health_now(&api).await)
}

/// What works at the moment, and what does not.
async fn health_now(api: &Api) -> Health {
    let mut problems = api.problems.read().map(|p| p.clone()).unwrap_or_default();
    if api.policies().await.is_ok() {
        problems.extend(api.policies.problems());
    }
    if api.parts.metrics.engine_up.get() == 0 {
        problems.push(format!("the engine at {} does not answer", api.engine_address));
    }
    if api.shutdown.has_begun() {
        problems.push("the daemon is going down".to_owned());
    }
    let mut notes: Vec<String> = crate::workspace::form_here().1.into_iter().collect();
    match api.paused().await {
        Ok(paused) => notes.extend(paused.map(|paused| paused.words())),
        Err(error) => problems.push(error.0.message),
    }
    let status = if problems.is_empty() { "ok" } else { "degraded" }.to_owned();
    Health {
        status,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        instance: api.parts.store.instance().to_string(),
        engine: api.engine_address.clone(),
        problems,
        notes,
    }
}

async fn metrics(State(api): State<Arc<Api>>) -> Result<Response, ApiError> {
    driver::refresh_gauges(&api.parts).await?;
    let text = api.parts.metrics.text().map_err(|e| ApiError::new(ErrorCode::Internal, e))?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}
