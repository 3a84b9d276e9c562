//! `GET /v1/jobs/{id}/audit` and `GET /v1/audit`: the decisions in the journals as NDJSON, of one job or of all
//! that the peer may see, over or still running. A projection while it is read: nothing is stored for it as long as
//! the job is there (of removed jobs `kept` has it), and a slow reader holds one chunk of one journal per
//! running job in memory, and nobody back.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body as HttpBody, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{ConnectInfo, Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, BoxStream, SelectAll, StreamExt};

use super::events::{Follower, flag};
use super::jobs::{JobPath, path_text};
use super::kept::Kept;
use super::peer::Peer;
use super::submit::identity;
use super::wire::ErrorCode;
use super::{Api, ApiError};
use crate::audit::{self, Filter, Kind};
use crate::clock;
use crate::job::JobId;
use crate::journal::JournalError;
use crate::store::{AuditFilter, AuditJob};

/// How often a follower of all jobs looks for jobs that have begun or ended.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How far back such a look goes: a job's row says that it ended a little before or after the last look, by a
/// clock that may have been set meanwhile.
const LOOK_BACK_MS: u64 = 60_000;
/// Most jobs that one request can say it has read a part of.
const AFTER_MAX: usize = 1000;

/// What was asked for.
#[derive(Debug, Default)]
struct Asked {
    filter: Filter,
    follow: bool,
    /// Number of the last event that the reader has, by job.
    after: HashMap<JobId, u64>,
}

/// `GET /v1/jobs/{id}/audit`
///
/// # Errors
/// `not_found` for somebody else's job, `invalid_request`.
pub async fn job(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    id: JobPath,
    query: Result<Query<Vec<(String, String)>>, QueryRejection>,
) -> Result<Response, ApiError> {
    let mut after = 0;
    let asked = asked(query, |key, value| match key {
        "after_seq" => {
            after = value.parse().map_err(|_| "must be the number of an event".to_owned())?;
            Ok(true)
        }
        _ => Ok(false),
    })?;
    let row = match api.own_job(&peer, path_text(&id)).await {
        Ok(job) => job.row,
        Err(error) if error.0.code == ErrorCode::NotFound => {
            let kept = removed(&api, &peer, path_text(&id), after, asked.filter).await?;
            return kept.ok_or(error);
        }
        Err(error) => return Err(error),
    };
    let job = Projected::new(&api, row.id, row.identity.uid, after, asked.filter, asked.follow);
    Ok(ndjson(job.stream()))
}

/// The audit of a job that was removed, where it was the peer's.
async fn removed(
    api: &Arc<Api>,
    peer: &Peer,
    id: &str,
    after: u64,
    filter: Filter,
) -> Result<Option<Response>, ApiError> {
    let who = identity(peer)?;
    let uid = if api.sees_all(&who) { None } else { Some(who.uid) };
    let Ok(id) = id.parse() else { return Ok(None) };
    let kept = Kept::of_job(api, uid, &id, after, filter).await;
    Ok(kept.map(|kept| {
        let rest = |mut kept: Kept| async move { kept.next(|_| 0).await.map(|chunk| (chunk, kept)) };
        ndjson(stream::unfold(kept, rest).boxed())
    }))
}

/// `GET /v1/audit`: of all jobs for an admin, of their own for everybody else.
///
/// # Errors
/// `invalid_request`, and what the store says.
pub async fn daemon(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    query: Result<Query<Vec<(String, String)>>, QueryRejection>,
) -> Result<Response, ApiError> {
    let who = identity(&peer)?;
    let mut after = HashMap::new();
    let mut asked = asked(query, |key, value| match key {
        "after" => {
            let wrong = || "must be JOB:SEQ".to_owned();
            let (job, seq) = value.split_once(':').ok_or_else(wrong)?;
            after.insert(job.parse().map_err(|_| wrong())?, seq.parse().map_err(|_| wrong())?);
            if after.len() > AFTER_MAX { Err(format!("at most {AFTER_MAX} jobs")) } else { Ok(true) }
        }
        _ => Ok(false),
    })?;
    asked.after = after;
    let uid = if api.sees_all(&who) { None } else { Some(who.uid) };
    // Before anything is read, so that nothing which ends meanwhile is missed.
    let (_, floor) = api.parts.store.audit_news(uid, u64::MAX, 0).await?;
    let mut tick = tokio::time::interval(LOOK_AGAIN);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let all = All {
        kept: Some(Kept::new(api.clone(), uid, asked.filter.clone())),
        api,
        uid,
        asked,
        page: VecDeque::new(),
        reached: Some(0),
        current: None,
        floor,
        looked_ms: clock::wall_ms(),
        seen: BTreeSet::new(),
        live: SelectAll::new(),
        tick,
    };
    Ok(ndjson(
        stream::unfold(all, |mut all| async move { all.next().await.map(|chunk| (chunk, all)) }).boxed(),
    ))
}

fn ndjson(chunks: BoxStream<'static, Bytes>) -> Response {
    let headers = [(header::CONTENT_TYPE, "application/x-ndjson"), (header::CACHE_CONTROL, "no-store")];
    let body = chunks.map(Ok::<Bytes, std::convert::Infallible>);
    (headers, HttpBody::from_stream(body)).into_response()
}

/// Reads the parameters that both paths have, and gives the others to `more`.
fn asked(
    query: Result<Query<Vec<(String, String)>>, QueryRejection>,
    mut more: impl FnMut(&str, &str) -> Result<bool, String>,
) -> Result<Asked, ApiError> {
    let bad = |words: String| ApiError::new(ErrorCode::InvalidRequest, words);
    let Query(query) = query.map_err(|e| bad(e.body_text()))?;
    let mut asked = Asked::default();
    for (key, value) in &query {
        match key.as_str() {
            "follow" => asked.follow = flag(key, Some(value))?,
            "denied" => asked.filter.denied = flag(key, Some(value))?,
            "kind" => {
                for word in value.split(',') {
                    let kind: Kind = word.parse().map_err(|e| bad(format!("kind: {e}")))?;
                    if !asked.filter.kinds.contains(&kind) {
                        asked.filter.kinds.push(kind);
                    }
                }
            }
            "since_ms" => {
                let wrong = |_| bad("since_ms: must be milliseconds since 1970".to_owned());
                asked.filter.since_ms = value.parse().map_err(wrong)?;
            }
            key => {
                if !more(key, value).map_err(|problem| bad(format!("{key}: {problem}")))? {
                    return Err(bad(format!("{key}: is no parameter of this path")));
                }
            }
        }
    }
    Ok(asked)
}

/// The records of one job.
pub(super) struct Projected {
    follower: Follower,
    job: JobId,
    uid: u32,
    filter: Filter,
}

impl Projected {
    pub(super) fn new(
        api: &Arc<Api>,
        job: JobId,
        uid: u32,
        after: u64,
        filter: Filter,
        follow: bool,
    ) -> Self {
        let follower = Follower::new(api.clone(), job.clone(), after.saturating_add(1), follow);
        Self { follower, job, uid, filter }
    }

    /// The next records as lines; none when there are no more.
    async fn next(&mut self) -> Option<Bytes> {
        let next = self.try_next().await;
        next.inspect_err(|error| tracing::warn!(job = %self.job, %error, "a job's audit ends early")).ok()?
    }

    /// The same.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub(super) async fn try_next(&mut self) -> Result<Option<Bytes>, JournalError> {
        while let Some(chunk) = self.follower.next().await? {
            let lines = self.project(&chunk);
            if !lines.is_empty() {
                return Ok(Some(lines.into()));
            }
        }
        Ok(None)
    }

    fn project(&self, chunk: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        for line in chunk.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            match audit::project(&self.job, self.uid, line) {
                Ok(Some(record)) if self.filter.keeps(&record) => {
                    if serde_json::to_writer(&mut out, &record).is_ok() {
                        out.push(b'\n');
                    }
                }
                Ok(Some(_) | None) => {}
                Err(error) => tracing::error!(job = %self.job, %error, "a line of a journal is no event"),
            }
        }
        out
    }

    fn stream(self) -> BoxStream<'static, Bytes> {
        stream::unfold(self, |mut job| async move { job.next().await.map(|chunk| (chunk, job)) }).boxed()
    }
}

/// The records of all jobs: first those of jobs that are over, in the order of their submits; then those that were
/// removed (after the others, so that one removed meanwhile is told twice rather than never); then, for a follower,
/// those of jobs at work, as they come.
struct All {
    kept: Option<Kept>,
    api: Arc<Api>,
    uid: Option<u32>,
    asked: Asked,
    page: VecDeque<AuditJob>,
    /// Number of the last job of the last page; none when there are no more.
    reached: Option<u64>,
    current: Option<Projected>,
    /// No job below this number can begin or end any more.
    floor: u64,
    looked_ms: u64,
    /// Numbers of jobs from the floor on that were told or are being told.
    seen: BTreeSet<u64>,
    live: SelectAll<BoxStream<'static, Bytes>>,
    tick: tokio::time::Interval,
}

impl All {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(job) = &mut self.current {
                if let Some(chunk) = job.next().await {
                    return Some(chunk);
                }
                self.current = None;
            }
            let Some(row) = self.following().await else { break };
            if row.n >= self.floor {
                self.seen.insert(row.n);
            }
            self.current = Some(self.open(row, false));
        }
        if let Some(kept) = &mut self.kept {
            let after = &self.asked.after;
            if let Some(chunk) = kept.next(|job| after.get(job).copied().unwrap_or(0)).await {
                return Some(chunk);
            }
            self.kept = None;
        }
        if self.asked.follow { self.news().await } else { None }
    }

    fn open(&self, row: AuditJob, follow: bool) -> Projected {
        let after = self.asked.after.get(&row.id).copied().unwrap_or(0);
        Projected::new(&self.api, row.id, row.uid, after, self.asked.filter.clone(), follow)
    }

    /// The next job of those that were there when the reader came.
    async fn following(&mut self) -> Option<AuditJob> {
        if self.page.is_empty() {
            let filter =
                AuditFilter { uid: self.uid, since_ms: self.asked.filter.since_ms, over: self.asked.follow };
            let page = self.api.parts.store.audit_page(filter, self.reached?).await;
            let page = page.inspect_err(|error| tracing::warn!(%error, "an audit ends early")).ok()?;
            self.reached = page.last().map(|row| row.n);
            self.page = page.into();
        }
        self.page.pop_front()
    }

    /// Records of jobs at work, and of those that end between two looks.
    async fn news(&mut self) -> Option<Bytes> {
        let stopping = self.api.shutdown.clone();
        loop {
            tokio::select! {
                Some(chunk) = self.live.next(), if !self.live.is_empty() => return Some(chunk),
                _ = self.tick.tick() => self.look().await?,
                _ = stopping.begun(), if self.live.is_empty() => return None,
            }
        }
    }

    async fn look(&mut self) -> Option<()> {
        let since = self.looked_ms.saturating_sub(LOOK_BACK_MS);
        let now = clock::wall_ms();
        let found = self.api.parts.store.audit_news(self.uid, self.floor, since).await;
        let found = found.inspect_err(|error| tracing::warn!(%error, "an audit ends early"));
        let (rows, floor) = found.ok()?;
        for row in rows {
            if self.seen.insert(row.n) {
                let job = self.open(row, true);
                self.live.push(job.stream());
            }
        }
        // All below the new floor were over before the rows were read: they have been told.
        self.seen = self.seen.split_off(&floor);
        (self.floor, self.looked_ms) = (floor, now);
        Some(())
    }
}
