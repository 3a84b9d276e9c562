//! The way back: an answer of the provider, passed on to the cell as it comes and metered on the way. When the
//! client leaves, the answer is read on for its usage; an answer that broke off must look so to the client.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use bytes::{Bytes, BytesMut};
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Response, StatusCode};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::Limits;
use super::censor::Censor;
use super::lease::Shared;
use super::meter::Meter;
use super::secret::Secrets;

/// Answer headers that do not come back: those of the hop, and those that tell of the account or set state.
const ANSWER_HEADERS_DROPPED: &[&str] = &[
    "alt-svc",
    "anthropic-organization-id",
    "connection",
    "keep-alive",
    "location",
    "proxy-authenticate",
    "proxy-connection",
    "set-cookie",
    "set-cookie2",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "www-authenticate",
];

/// The body of every answer to a cell.
pub(super) type Body = UnsyncBoxBody<Bytes, BrokenOff>;

/// An answer that ended before its end; the client sees its connection break.
#[derive(Debug, thiserror::Error)]
#[error("the answer broke off")]
pub(super) struct BrokenOff;

pub(super) fn error_response(status: StatusCode, kind: &str, message: &str) -> Response<Body> {
    let body = serde_json::json!({ "type": "error", "error": { "type": kind, "message": message } });
    let mut response = Response::new(whole(body.to_string().into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

pub(super) fn whole(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

/// The pieces of an answer on their way to the client.
pub(super) struct Waiting {
    pub(super) pieces: mpsc::Receiver<Bytes>,
    /// Set before the sender goes if the client has got everything; else it sees the answer break off.
    pub(super) whole: Arc<AtomicBool>,
}

/// The answer as the cell gets it: all headers but those of the hop, and none that holds the credential.
pub(super) fn passed_on(
    status: StatusCode,
    headers: &HeaderMap,
    secrets: &Secrets,
    waiting: Waiting,
) -> Response<Body> {
    let pieces = stream::unfold(Some(waiting), |waiting| async move {
        let mut waiting = waiting?;
        match waiting.pieces.recv().await {
            Some(bytes) => Some((Ok(Frame::data(bytes)), Some(waiting))),
            None if waiting.whole.load(Ordering::Acquire) => None,
            None => {
                // Pending once, so that hyper writes out what it holds before it drops the connection.
                tokio::task::yield_now().await;
                Some((Err(BrokenOff), None))
            }
        }
    });
    let mut response = Response::new(BodyExt::boxed_unsync(StreamBody::new(pieces)));
    *response.status_mut() = status;
    for (name, value) in headers {
        if !ANSWER_HEADERS_DROPPED.contains(&name.as_str()) && !secrets.are_in(value.as_bytes()) {
            response.headers_mut().append(name.clone(), value.clone());
        }
    }
    if status == StatusCode::UNAUTHORIZED {
        // The CLI would try for three minutes, with a credential that is not its own.
        response.headers_mut().insert("x-should-retry", HeaderValue::from_static("false"));
    }
    response
}

/// Who ended an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// It came to its end.
    Whole,
    /// The provider broke off or fell silent.
    ByProvider,
    /// We stopped reading: the client had left, or time was up.
    ByUs,
}

/// Small pieces that are there together go to the client as one, up to this many bytes: a copy costs less than a
/// write.
const GATHERED_BYTES_MAX: usize = 8 << 10;

/// The body of an answer, of which one frame may be looked at before it is taken.
pub(super) struct Source {
    body: Incoming,
    seen: Option<Option<Result<Frame<Bytes>, hyper::Error>>>,
}

impl Source {
    pub(super) fn new(body: Incoming) -> Self {
        Self { body, seen: None }
    }

    /// The next frame. Cancel-safe.
    async fn frame(&mut self) -> Option<Result<Frame<Bytes>, hyper::Error>> {
        match self.seen.take() {
            Some(seen) => seen,
            None => self.body.frame().await,
        }
    }

    /// Takes a look at the next frame if it is there already. The task of the connection holds one frame at a time:
    /// it gets its turn to put the next one there, once. Never waits for the provider.
    pub(super) async fn look(&mut self) {
        let mut asked = false;
        std::future::poll_fn(|context| {
            if self.seen.is_some() {
                return Poll::Ready(());
            }
            let mut frame = self.body.frame();
            match std::pin::Pin::new(&mut frame).poll(context) {
                Poll::Ready(frame) => self.seen = Some(frame),
                Poll::Pending if asked => {}
                Poll::Pending => {
                    asked = true;
                    // Behind those that are ready to run, the connection's task among them.
                    context.waker().wake_by_ref();
                    return Poll::Pending;
                }
            }
            Poll::Ready(())
        })
        .await;
    }

    /// More of the answer, if it was seen and has at most so many bytes.
    fn seen_data(&mut self, bytes_max: usize) -> Option<Bytes> {
        let Some(Some(Ok(frame))) = &self.seen else { return None };
        if frame.data_ref().is_none_or(|data| data.len() > bytes_max) {
            return None;
        }
        self.seen.take().flatten()?.ok()?.into_data().ok()
    }
}

/// Carries an answer from the provider to meter and client.
pub(super) struct Pump<'a> {
    pub(super) lease: &'a Shared,
    pub(super) limits: &'a Limits,
    pub(super) pieces: mpsc::Sender<Bytes>,
    pub(super) whole: Arc<AtomicBool>,
    pub(super) censor: Censor,
}

impl Pump<'_> {
    pub(super) async fn run(mut self, mut source: Source, meter: &mut Meter) -> Ended {
        let end = tokio::time::Instant::now() + self.limits.total;
        let deadline = tokio::time::sleep_until(end);
        tokio::pin!(deadline);
        let drained_by = || end.min(tokio::time::Instant::now() + self.limits.drain);
        let mut client_here = true;
        loop {
            let frame = tokio::select! {
                biased;
                () = self.lease.cut.cancelled() => return Ended::ByUs,
                () = &mut deadline => return Ended::ByUs,
                () = self.pieces.closed(), if client_here => {
                    client_here = false;
                    deadline.as_mut().reset(drained_by());
                    continue;
                }
                frame = timeout(self.limits.idle, source.frame()) => frame,
            };
            match frame {
                Ok(Some(Ok(frame))) => {
                    let Ok(data) = frame.into_data() else { continue };
                    let data = self.gather(data, &mut source, meter).await;
                    if client_here && !data.is_empty() && !self.deliver(data).await {
                        client_here = false;
                        deadline.as_mut().reset(drained_by());
                    }
                }
                Ok(None) => {
                    let rest = self.censor.rest();
                    client_here = client_here && (rest.is_empty() || self.deliver(rest).await);
                    self.whole.store(client_here, Ordering::Release);
                    return Ended::Whole;
                }
                Ok(Some(Err(_))) | Err(_) => return Ended::ByProvider,
            }
        }
    }

    /// What may go on to the client of a piece, and of those that are there behind it.
    async fn gather(&mut self, first: Bytes, source: &mut Source, meter: &mut Meter) -> Bytes {
        meter.push(&first);
        let first = self.censor.pass(first);
        let mut all = BytesMut::new();
        loop {
            let gathered = all.len().max(first.len());
            if gathered >= GATHERED_BYTES_MAX {
                break;
            }
            source.look().await;
            let Some(data) = source.seen_data(GATHERED_BYTES_MAX - gathered) else { break };
            meter.push(&data);
            let data = self.censor.pass(data);
            if all.is_empty() {
                all.reserve(gathered + 2 * data.len());
                all.extend_from_slice(&first);
            }
            all.extend_from_slice(&data);
        }
        if all.is_empty() { first } else { all.freeze() }
    }

    /// Whether the client still takes data.
    async fn deliver(&self, data: Bytes) -> bool {
        let data = match self.pieces.try_send(data) {
            Ok(()) => return true,
            Err(mpsc::error::TrySendError::Full(data)) => data,
            Err(mpsc::error::TrySendError::Closed(_)) => return false,
        };
        tokio::select! {
            sent = self.pieces.send(data) => sent.is_ok(),
            () = tokio::time::sleep(self.limits.idle) => false,
            () = self.lease.cut.cancelled() => false,
        }
    }
}
