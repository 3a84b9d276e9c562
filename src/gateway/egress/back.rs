//! An answer on its way to a cell: its head without what belongs to the connection or repeats a credential, its body
//! piece by piece, from the host or from the package cache; and on the way what is to be kept goes into the cache. It
//! must never show the cell a credential, nor keep a body that did not come whole.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Body as _, Frame, Incoming};
use hyper::header::{self, HeaderMap, HeaderName};
use hyper::{Response, StatusCode};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::EgressRecord;
use super::door::{Body, BrokenOff, Shared};
use super::telling::Telling;
use super::wire::Meter;
use crate::gateway::censor::Censor;
use crate::gateway::packages::{Fill, Head, Kept, Key};
use crate::gateway::secret::Secrets;

const HEADERS_DROPPED: [&str; 9] = [
    "alt-svc",
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// All headers but those of the list and those that `Connection` names.
pub(super) fn kept(headers: &HeaderMap, dropped: &[&str]) -> HeaderMap {
    let named: Vec<String> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|name| name.trim().to_ascii_lowercase())
        .collect();
    let mut kept = HeaderMap::new();
    for (name, value) in headers {
        if !dropped.contains(&name.as_str()) && !named.iter().any(|n| n == name.as_str()) {
            kept.append(name.clone(), value.clone());
        }
    }
    kept
}

/// The headers of an answer that a cell may see.
pub(super) fn shown(headers: &HeaderMap, secrets: &Secrets) -> HeaderMap {
    let mut headers = kept(headers, &HEADERS_DROPPED);
    let repeating = headers.iter().filter(|(_, value)| secrets.are_in(value.as_bytes()));
    let repeating: Vec<HeaderName> = repeating.map(|(name, _)| name.clone()).collect();
    for name in repeating {
        headers.remove(name);
    }
    headers
}

/// Where a body comes from.
pub(super) enum Source {
    /// The host.
    Host(Incoming),
    /// The package cache.
    Kept(Kept),
    /// There is none.
    Nothing,
}

/// What is to be kept of an answer.
pub(super) struct Keeping {
    pub(super) fill: Fill,
    pub(super) key: Key,
    pub(super) head: Head,
}

/// An answer's head, and what is needed to pass it back.
pub(super) struct Sent {
    pub(super) status: StatusCode,
    /// As the cell may see them.
    pub(super) headers: HeaderMap,
    pub(super) body: Source,
    pub(super) keeping: Option<Keeping>,
    pub(super) meter: Arc<Meter>,
    /// Bytes of the connection before this request.
    pub(super) before: (u64, u64),
    pub(super) secrets: Secrets,
}

impl Sent {
    /// A host's answer as it is.
    pub(super) fn of_host(
        response: Response<Incoming>,
        meter: Arc<Meter>,
        before: (u64, u64),
        secrets: Secrets,
    ) -> Self {
        let (head, body) = response.into_parts();
        let (status, headers) = (head.status, shown(&head.headers, &secrets));
        Self { status, headers, body: Source::Host(body), keeping: None, meter, before, secrets }
    }

    /// The answer as the cell gets it; its event comes with its end.
    pub(super) fn pass_back(
        self,
        shared: &Arc<Shared>,
        event: EgressRecord,
        began: Instant,
    ) -> Response<Body> {
        let (pieces, receiver) = mpsc::channel(4);
        let complete = Arc::new(AtomicBool::new(false));
        let mut telling = Telling::new(event, self.before, began);
        let pump = Pump {
            pieces,
            complete: Arc::clone(&complete),
            censor: Censor::new(self.secrets),
            keeping: self.keeping,
            cached: telling.cached(),
        };
        let (task_shared, meter, body) = (Arc::clone(shared), self.meter, self.body);
        shared.tasks.spawn(async move {
            let reason = tokio::select! {
                reason = pump.run(body, &task_shared) => reason,
                () = task_shared.revoked.cancelled() => Some("the job was stopped".to_owned()),
                never = telling.while_open(&task_shared, &meter) => match never {},
            };
            let reason = match (reason, meter.exceeded()) {
                (Some(_), Some(key)) => Some(format!("{key} is reached")),
                (reason, _) => reason,
            };
            telling.end(&task_shared, meter, reason).await;
        });
        let mut response = Response::new(streamed(receiver, complete));
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        response
    }
}

fn streamed(receiver: mpsc::Receiver<Bytes>, complete: Arc<AtomicBool>) -> Body {
    let pieces = stream::unfold(Some(receiver), move |receiver| {
        let complete = Arc::clone(&complete);
        async move {
            let mut receiver = receiver?;
            match receiver.recv().await {
                Some(bytes) => Some((Ok(Frame::data(bytes)), Some(receiver))),
                None if complete.load(Ordering::Acquire) => None,
                None => {
                    // Pending once, so that hyper writes out what it holds before it drops the connection.
                    tokio::task::yield_now().await;
                    Some((Err(BrokenOff), None))
                }
            }
        }
    });
    BodyExt::boxed_unsync(StreamBody::new(pieces))
}

/// Carries an answer's body to the cell.
struct Pump {
    pieces: mpsc::Sender<Bytes>,
    complete: Arc<AtomicBool>,
    censor: Censor,
    keeping: Option<Keeping>,
    cached: Arc<AtomicU64>,
}

impl Pump {
    /// Why it ended early; `None` where it did not.
    async fn run(mut self, mut body: Source, shared: &Shared) -> Option<String> {
        let limits = &shared.spec.egress.limits;
        let deadline = tokio::time::sleep(limits.total);
        tokio::pin!(deadline);
        loop {
            let next = tokio::select! {
                next = timeout(limits.idle, next(&mut body, &mut self.censor, &self.cached)) => next,
                () = &mut deadline => return Some("the answer lasted too long".to_owned()),
                () = self.pieces.closed() => return Some("the cell left".to_owned()),
            };
            let (data, last) = match next {
                Err(_) => return Some("the host fell silent".to_owned()),
                Ok(Err(reason)) => return Some(reason),
                Ok(Ok(next)) => next,
            };
            if let Some(keeping) = &mut self.keeping {
                keeping.fill.write(&data).await;
            }
            if last && let Some(Keeping { fill, key, head }) = self.keeping.take() {
                // Before the cell has its last piece: what one job has got, the next one finds.
                fill.keep(key, head).await;
            }
            if !data.is_empty() {
                match timeout(limits.idle, self.pieces.send(data)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => return Some("the cell left".to_owned()),
                    Err(_) => return Some("the cell does not read".to_owned()),
                }
            }
            if last {
                self.complete.store(true, Ordering::Release);
                return None;
            }
        }
    }
}

/// The next piece, and whether it is the last one. Cancel-safe where it is cancelled for good.
async fn next(body: &mut Source, censor: &mut Censor, cached: &AtomicU64) -> Result<(Bytes, bool), String> {
    match body {
        Source::Nothing => Ok((Bytes::new(), true)),
        Source::Kept(kept) => match kept.next().await {
            Ok(Some(data)) => {
                cached.fetch_add(data.len() as u64, Ordering::Relaxed);
                Ok((data, kept.is_over()))
            }
            Ok(None) => Ok((Bytes::new(), true)),
            Err(error) => {
                tracing::warn!(%error, "a body of the package cache cannot be read");
                Err("the package cache cannot be read".to_owned())
            }
        },
        Source::Host(body) => match body.frame().await {
            None => Ok((censor.rest(), true)),
            Some(Err(error)) => Err(format!("the host broke off: {error}")),
            Some(Ok(frame)) => {
                let data = frame.into_data().map(|data| censor.pass(data)).unwrap_or_default();
                if !body.is_end_stream() {
                    return Ok((data, false));
                }
                let rest = censor.rest();
                let whole = if rest.is_empty() { data } else { [data, rest].concat().into() };
                Ok((whole, true))
            }
        },
    }
}
