//! `GET /v1/jobs/{id}/events`: a job's events from any number on, as NDJSON or as SSE, to the end of what
//! there is or to the end of the job. A slow reader holds back nobody: it reads the journal's files at its
//! own speed, and only one chunk of it is in memory.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body as HttpBody, Bytes};
use axum::extract::{ConnectInfo, Query, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Deserialize;

use super::jobs::{JobPath, path_text};
use super::peer::Peer;
use super::wire::ErrorCode;
use super::{Api, ApiError};
use crate::job::JobId;
use crate::journal::{JournalError, Reader};

/// Bytes read and sent at a time.
const CHUNK_BYTES_MAX: usize = 256 * 1024;

/// Longest wait for news of a job that nobody writes to, before its row is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// The query of the path.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventsQuery {
    /// First number wanted; 1 where absent.
    from: Option<u64>,
    /// `1`: wait for new events until the job is over.
    follow: Option<String>,
}

/// Sends a job's events.
pub async fn events(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    id: JobPath,
    query: Result<Query<EventsQuery>, axum::extract::rejection::QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let Query(query) = query.map_err(|e| ApiError::new(ErrorCode::InvalidRequest, e.body_text()))?;
    let follow = flag("follow", query.follow.as_deref())?;
    let job = api.own_job(&peer, path_text(&id)).await?.row.id;
    let accepts = |kind: &str| {
        headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).is_some_and(|v| v.contains(kind))
    };
    let sse = accepts("text/event-stream");
    // A client that reconnects by SSE's own rule names the last number it has.
    let last_id =
        headers.get("last-event-id").and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<u64>().ok());
    let from = query.from.or(last_id.map(|n| n.saturating_add(1))).unwrap_or(1).max(1);
    let follower = Follower::new(api, job, from, follow);
    let body = stream::unfold(follower, move |mut follower| async move {
        match follower.next().await {
            Ok(Some(chunk)) => {
                let chunk = if sse { as_sse(&chunk) } else { chunk };
                Some((Ok::<Bytes, JournalError>(chunk), follower))
            }
            Ok(None) => None,
            Err(error) => {
                tracing::warn!(%error, "a reader's stream of events ends early");
                Some((Err(error), follower.ended()))
            }
        }
    });
    let kind = if sse { "text/event-stream" } else { "application/x-ndjson" };
    let headers = [(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "no-store")];
    Ok((headers, HttpBody::from_stream(body)).into_response())
}

/// A parameter that is on or off.
///
/// # Errors
/// `invalid_request`.
pub(super) fn flag(key: &str, value: Option<&str>) -> Result<bool, ApiError> {
    match value {
        None | Some("0" | "false") => Ok(false),
        Some("1" | "true" | "") => Ok(true),
        Some(other) => {
            let words = format!("{key}: {other:?} is neither 0 nor 1");
            Err(ApiError::new(ErrorCode::InvalidRequest, words))
        }
    }
}

/// Reads on through the times in which nobody writes: before a job has its slot, and while a record changes
/// hands.
pub(super) struct Follower {
    api: Arc<Api>,
    job: JobId,
    follow: bool,
    reader: Reader,
    feed: tokio::sync::watch::Receiver<Option<crate::journal::Feed>>,
    over: bool,
}

impl Follower {
    pub(super) fn new(api: Arc<Api>, job: JobId, from: u64, follow: bool) -> Self {
        let mut feed = api.parts.feeds.follow(&job);
        let live = feed.borrow_and_update().clone().filter(|_| follow);
        let reader = Reader::open(api.parts.settings.journal_dir(&job), from, live);
        Self { api, job, follow, reader, feed, over: false }
    }

    pub(super) fn ended(mut self) -> Self {
        self.over = true;
        self
    }

    fn live(&mut self) -> Option<crate::journal::Feed> {
        self.feed.borrow_and_update().clone().filter(|feed| !feed.closed())
    }

    /// The next whole lines; none when there are no more.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, JournalError> {
        while !self.over {
            if let Some(chunk) = self.reader.next_chunk(CHUNK_BYTES_MAX).await? {
                return Ok(Some(chunk));
            }
            if !self.follow {
                return Ok(None);
            }
            // The order matters: what is done was written before the row said so, and the reader is opened
            // again after the row was read, so it sees all of it.
            let done = match self.api.parts.store.job(&self.job).await {
                Ok(Some(job)) => job.row.state.is_done(),
                Ok(None) => return Ok(None),
                Err(error) => {
                    tracing::warn!(%error, "cannot look whether a followed job is over");
                    return Ok(None);
                }
            };
            // A closed feed is a writer that has gone and is about to be taken off: nothing comes from it.
            let live = self.live();
            if live.is_none() && !done {
                let stopping = self.api.shutdown.clone();
                tokio::select! {
                    changed = self.feed.changed() => if changed.is_err() {
                        self.feed = self.api.parts.feeds.follow(&self.job);
                    },
                    _ = stopping.begun() => return Ok(None),
                    () = tokio::time::sleep(LOOK_AGAIN) => {}
                }
            }
            let live = self.live();
            self.over = done && live.is_none();
            let dir = self.api.parts.settings.journal_dir(&self.job);
            self.reader = Reader::open(dir, self.reader.next_seq(), live);
            if self.over {
                return self.reader.next_chunk(CHUNK_BYTES_MAX).await;
            }
        }
        self.reader.next_chunk(CHUNK_BYTES_MAX).await
    }
}

/// NDJSON lines as SSE messages, with the number as id.
fn as_sse(lines: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity(lines.len() + lines.len() / 8);
    for line in lines.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        // Every line begins with `{"seq":N,`: the journal writes them so.
        let digits = line.strip_prefix(b"{\"seq\":").unwrap_or(b"");
        let seq: Vec<u8> = digits.iter().copied().take_while(u8::is_ascii_digit).collect();
        out.extend_from_slice(b"id: ");
        out.extend_from_slice(&seq);
        out.extend_from_slice(b"\ndata: ");
        out.extend_from_slice(line);
        out.extend_from_slice(b"\n\n");
    }
    Bytes::from(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_sse_message_has_the_number_as_its_id() {
        let sse = as_sse(b"{\"seq\":7,\"x\":1}\n{\"seq\":8}\n");
        assert_eq!(sse, "id: 7\ndata: {\"seq\":7,\"x\":1}\n\nid: 8\ndata: {\"seq\":8}\n\n");
    }
}
