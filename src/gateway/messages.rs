//! The road of one request, from top to bottom: admit (authorise, path, body, model) → reserve → forward →
//! pass on and meter → settle. Nothing goes upstream before its reservation; after the first byte upstream
//! the request lives in a task of its own, which settles whatever becomes of the client.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Body as _, Frame, Incoming};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Uri};
use subtle::ConstantTimeEq;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::timeout;

use super::body::{BodyError, BodyFacts};
use super::credentials::Secret;
use super::lease::{BODY_UNIT, Shared};
use super::ledger::{Ask, Grant, LedgerError};
use super::meter::{Meter, Reading};
use super::upstream::Target;
use super::{GatewayEvent, Limits, Refusal};
use crate::money::MicroUsd;
use crate::pricing::{Price, Usage};

/// The least `max_tokens` that a request is lowered to; less is not worth asking for.
const OUTPUT_TOKENS_FLOOR: u64 = 4_096;
/// Pieces of an answer that wait for the client.
const PIECES_MAX: usize = 16;
/// How often a request that waits for room asks again, besides at each settlement of its own lease.
const ROOM_POLL: Duration = Duration::from_millis(500);
/// Tries to settle, and the time between them.
const SETTLE_TRIES: (u32, Duration) = (5, Duration::from_millis(300));
/// Request headers that go upstream, besides those that begin with one of [`REQUEST_PREFIXES`].
const REQUEST_HEADERS: [HeaderName; 2] = [header::ACCEPT, header::USER_AGENT];
/// What the API and its clients call their own.
const REQUEST_PREFIXES: [&str; 4] = ["anthropic-", "x-stainless-", "x-claude-", "x-app"];
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

pub(super) type Body = UnsyncBoxBody<Bytes, BrokenOff>;

/// An answer that ended before its end; the client sees its connection break.
#[derive(Debug, thiserror::Error)]
#[error("the answer broke off")]
pub(super) struct BrokenOff;

/// Answers one request of a cell.
pub(super) async fn answer(lease: Arc<Shared>, request: Request<Incoming>) -> Response<Body> {
    if request.method() == Method::HEAD && request.uri().path() == "/" {
        // The CLI's warm-up. It tells nothing, so it needs no token.
        return Response::new(whole(Bytes::new()));
    }
    let refused = match admit(&lease, request).await {
        Ok(call) => {
            let (head, answer) = oneshot::channel();
            lease.tasks.spawn(call.run(head));
            match answer.await {
                Ok(response) => return response,
                Err(_) => {
                    return error_response(
                        StatusCode::BAD_GATEWAY,
                        "api_error",
                        "hotcell: the request failed",
                    );
                }
            }
        }
        Err(refused) => refused,
    };
    let mut response = refused.response(&lease);
    // The body may not have been read.
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// A refusal with its words.
struct Refused {
    why: Refusal,
    message: String,
}

impl Refused {
    fn new(why: Refusal, message: impl Into<String>) -> Self {
        Self { why, message: message.into() }
    }

    /// Statuses that the CLI does not retry (403, 400, 413), where trying again gives the same.
    fn status(&self) -> (StatusCode, &'static str) {
        match self.why {
            Refusal::Transport => (StatusCode::PAYLOAD_TOO_LARGE, "request_too_large"),
            Refusal::Malformed => (StatusCode::BAD_REQUEST, "invalid_request_error"),
            Refusal::Busy => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error"),
            Refusal::Ledger | Refusal::Provider => (StatusCode::SERVICE_UNAVAILABLE, "api_error"),
            Refusal::Credential
            | Refusal::Path
            | Refusal::Content
            | Refusal::Model
            | Refusal::Price
            | Refusal::Budget => (StatusCode::FORBIDDEN, "permission_error"),
        }
    }

    fn response(self, lease: &Shared) -> Response<Body> {
        let (status, kind) = self.status();
        lease.event(GatewayEvent::Refused { status: status.as_u16(), why: self.why });
        let mut response = error_response(status, kind, &format!("hotcell: {}", self.message));
        if self.why == Refusal::Busy {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

fn error_response(status: StatusCode, kind: &str, message: &str) -> Response<Body> {
    let body = serde_json::json!({ "type": "error", "error": { "type": kind, "message": message } });
    let mut response = Response::new(whole(body.to_string().into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn whole(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

/// One admitted request on its road.
struct Call {
    lease: Arc<Shared>,
    arrived: Instant,
    target: Target,
    beta: bool,
    headers: HeaderMap,
    body: Bytes,
    facts: BodyFacts,
    price: Price,
    /// `max_tokens` as it goes upstream.
    output_tokens_max: u64,
    /// Whether the cost limit lowered it.
    clamped: bool,
    /// Given back when the body is upstream.
    body_memory: Option<OwnedSemaphorePermit>,
    _place: OwnedSemaphorePermit,
}

/// What came of forwarding.
struct Relayed {
    status: u16,
    reading: Reading,
    /// The provider may have worked on it although no answer came.
    unknown: bool,
    ended: Ended,
    retry_after_s: Option<u64>,
    ttfb_ms: u64,
}

/// Everything that is decided before money is involved.
async fn admit(lease: &Arc<Shared>, request: Request<Incoming>) -> Result<Call, Refused> {
    let arrived = Instant::now();
    let limits = &lease.gateway.limits;
    authorise(request.headers(), &lease.token)?;
    let (target, beta) = route(request.method(), request.uri())?;
    let busy = |_| Refused::new(Refusal::Busy, "too many requests at a time");
    let place = Arc::clone(&lease.requests).try_acquire_owned().map_err(busy)?;
    let headers = forwarded(request.headers());
    let late = |_| Refused::new(Refusal::Transport, "the request body did not arrive in time");
    let read = timeout(limits.body_wait, read_body(lease, request));
    let (body, body_memory) = read.await.map_err(late)??;
    let facts = BodyFacts::read(&body).map_err(|error| {
        let malformed = matches!(error, BodyError::Malformed(_));
        Refused::new(if malformed { Refusal::Malformed } else { Refusal::Content }, error.to_string())
    })?;
    if !lease.models.allows(&facts.model) {
        let message = format!("this job may not use the model {}", shown(&facts.model));
        return Err(Refused::new(Refusal::Model, message));
    }
    let price = *lease.gateway.prices.of(&facts.model).ok_or_else(|| {
        let message = format!("the model {} has no price: add it to prices.toml", shown(&facts.model));
        Refused::new(Refusal::Price, message)
    })?;
    let output_tokens_max = match (target, facts.output_tokens_max) {
        (Target::CountTokens, asked) => asked.unwrap_or(0),
        (Target::Messages, None | Some(0)) => {
            return Err(Refused::new(Refusal::Malformed, "max_tokens: a number above 0 is required"));
        }
        (Target::Messages, Some(asked)) => asked.min(lease.output_tokens_max.unwrap_or(u64::MAX).max(1)),
    };
    Ok(Call {
        lease: Arc::clone(lease),
        arrived,
        target,
        beta,
        headers,
        body,
        facts,
        price,
        output_tokens_max,
        clamped: false,
        body_memory: Some(body_memory),
        _place: place,
    })
}

fn shown(text: &str) -> String {
    format!("{:?}", text.chars().take(80).collect::<String>())
}

/// Exactly one credential, and it is the lease's. Another one would be somebody's key on its way out.
fn authorise(headers: &HeaderMap, token: &Secret) -> Result<(), Refused> {
    let refused = || Refused::new(Refusal::Credential, "this is not the credential of this job");
    let keys = headers.get_all("x-api-key").iter().map(HeaderValue::as_bytes);
    let bearers = headers.get_all(header::AUTHORIZATION).iter().map(|value| {
        let value = value.as_bytes();
        match value.split_at_checked(7) {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case(b"bearer ") => token,
            _ => b"",
        }
    });
    let mut offered = keys.chain(bearers);
    match (offered.next(), offered.next()) {
        (Some(one), None) if bool::from(one.ct_eq(token.bytes())) => Ok(()),
        _ => Err(refused()),
    }
}

/// Method, path and query, compared as they are: nothing is decoded, so nothing can mean something else later.
fn route(method: &Method, uri: &Uri) -> Result<(Target, bool), Refused> {
    let refused =
        || Refused::new(Refusal::Path, "only POST /v1/messages and /v1/messages/count_tokens are served");
    if method != Method::POST || uri.scheme().is_some() || uri.authority().is_some() {
        return Err(refused());
    }
    let target = match uri.path() {
        "/v1/messages" => Target::Messages,
        "/v1/messages/count_tokens" => Target::CountTokens,
        _ => return Err(refused()),
    };
    match uri.query() {
        None => Ok((target, false)),
        Some("beta=true") => Ok((target, true)),
        Some(_) => Err(refused()),
    }
}

/// The headers that go upstream. `accept-encoding` does not: a compressed answer could not be metered.
fn forwarded(headers: &HeaderMap) -> HeaderMap {
    let mut out = HeaderMap::with_capacity(headers.len() + 4);
    for (name, value) in headers {
        let known = REQUEST_HEADERS.contains(name)
            || REQUEST_PREFIXES.iter().any(|prefix| name.as_str().starts_with(prefix));
        if known {
            out.append(name.clone(), value.clone());
        }
    }
    out.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    out
}

/// Reads the body, within the lease's share of memory.
async fn read_body(
    lease: &Shared,
    request: Request<Incoming>,
) -> Result<(Bytes, OwnedSemaphorePermit), Refused> {
    let bytes_max = lease.gateway.limits.body_bytes_max;
    let too_large =
        || Refused::new(Refusal::Transport, format!("the request body has more than {bytes_max} bytes"));
    let coding = request.headers().get(header::CONTENT_ENCODING);
    if coding.is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity")) {
        return Err(Refused::new(Refusal::Transport, "compressed request bodies are not accepted"));
    }
    let mut body = request.into_body();
    let declared = body.size_hint().exact().map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
    if declared.is_some_and(|bytes| bytes > bytes_max) {
        return Err(too_large());
    }
    let units = declared.unwrap_or(bytes_max).div_ceil(BODY_UNIT).max(1);
    let closed = |_| Refused::new(Refusal::Busy, "the lease is closed");
    let memory = Arc::clone(&lease.bodies)
        .acquire_many_owned(u32::try_from(units).unwrap_or(u32::MAX))
        .await
        .map_err(closed)?;
    let mut bytes = BytesMut::with_capacity(declared.unwrap_or(0));
    while let Some(frame) = body.frame().await {
        let broken = |_| Refused::new(Refusal::Transport, "the request body broke off");
        let Ok(data) = frame.map_err(broken)?.into_data() else { continue };
        if bytes.len() + data.len() > bytes_max {
            return Err(too_large());
        }
        bytes.extend_from_slice(&data);
    }
    Ok((bytes.freeze(), memory))
}

impl Call {
    async fn run(mut self, mut head: oneshot::Sender<Response<Body>>) {
        let grant = match self.target {
            Target::CountTokens => None,
            Target::Messages => match self.reserve(&mut head).await {
                Ok(grant) => Some(grant),
                Err(None) => return,
                Err(Some(refused)) => {
                    let _ = head.send(refused.response(&self.lease));
                    return;
                }
            },
        };
        let relayed = self.forward(head).await;
        if let Some(grant) = grant {
            self.settle(grant, &relayed).await;
        }
        self.tell_faults(&relayed);
    }

    /// Reserves the worst case; waits while others are in the way. `Err(None)`: the client has left.
    async fn reserve(
        &mut self,
        head: &mut oneshot::Sender<Response<Body>>,
    ) -> Result<Grant, Option<Refused>> {
        let input = self.facts.input_tokens_estimate;
        let ask = Ask {
            job: self.lease.job.clone(),
            model: self.facts.model.clone(),
            want: self.price.worst_case(input, self.output_tokens_max),
            floor: self.price.worst_case(input, self.output_tokens_max.min(OUTPUT_TOKENS_FLOOR)),
            limit: self.lease.cost_limit,
        };
        let give_up = Instant::now() + self.lease.gateway.limits.budget_wait;
        let lease = Arc::clone(&self.lease);
        let grant = loop {
            let settled = lease.settled.notified();
            tokio::pin!(settled);
            // Before the question, so that a settlement right after it is not missed.
            settled.as_mut().enable();
            match lease.ledger.reserve(ask.clone()).await {
                Ok(grant) => break grant,
                Err(LedgerError::Exhausted { spent }) => return Err(Some(self.exhausted(spent))),
                Err(LedgerError::Busy) if Instant::now() < give_up => {}
                Err(LedgerError::Busy) => {
                    return Err(Some(Refused::new(
                        Refusal::Busy,
                        "other requests hold the rest of the cost limit",
                    )));
                }
                Err(LedgerError::Store(error)) => {
                    tracing::error!(%error, job = %lease.job, "the ledger cannot reserve");
                    return Err(Some(Refused::new(Refusal::Ledger, "the ledger does not answer")));
                }
            }
            tokio::select! {
                () = settled => {}
                () = tokio::time::sleep(ROOM_POLL) => {}
                () = head.closed() => return Err(None),
                () = lease.cut.cancelled() => return Err(None),
            }
        };
        self.fit(&ask, grant);
        lease.event(GatewayEvent::Requested { model: ask.model, reserved: grant.amount });
        Ok(grant)
    }

    /// Lowers `max_tokens` to what was granted, and writes it into the body if it differs from what was asked.
    fn fit(&mut self, ask: &Ask, grant: Grant) {
        if grant.amount < ask.want {
            let paid = self.price.output_tokens_within(grant.amount, self.facts.input_tokens_estimate);
            // The floor was granted; rounding must not take a token of it.
            let floor = self.output_tokens_max.min(OUTPUT_TOKENS_FLOOR);
            self.output_tokens_max = paid.clamp(floor, self.output_tokens_max);
            self.clamped = true;
        }
        if self.facts.output_tokens_max != Some(self.output_tokens_max) {
            self.body = self.facts.with_output_tokens(&self.body, self.output_tokens_max);
        }
    }

    fn exhausted(&self, spent: MicroUsd) -> Refused {
        let limit = self.lease.cost_limit.unwrap_or_default();
        self.lease.event(GatewayEvent::BudgetExhausted { spent, limit });
        let (limit, spent) = (dollars(limit), dollars(spent));
        let message = format!(
            "cost limit of {limit} USD reached ({spent} USD spent, the next request needs more than is left)"
        );
        Refused::new(Refusal::Budget, message)
    }

    /// Sends the request upstream and the answer back. Returns when the answer is over, whoever ended it.
    async fn forward(&mut self, mut head: oneshot::Sender<Response<Body>>) -> Relayed {
        let gateway = Arc::clone(&self.lease.gateway);
        let limits = &gateway.limits;
        let mut headers = std::mem::take(&mut self.headers);
        let secret = gateway.credential.inject(&mut headers).await;
        let sent = Instant::now();
        let sending = gateway.upstream.send(self.target, self.beta, headers, std::mem::take(&mut self.body));
        let answer = tokio::select! {
            answer = timeout(limits.first_byte_wait, sending) => answer.map_err(|_| Ended::ByProvider),
            () = left_for(&mut head, limits.drain) => Err(Ended::ByUs),
            () = self.lease.cut.cancelled() => Err(Ended::ByUs),
        };
        self.body_memory = None;
        let ttfb_ms = millis(sent);
        let lost = |status: StatusCode, unknown, ended| Relayed {
            status: status.as_u16(),
            reading: Reading::default(),
            unknown,
            ended,
            retry_after_s: None,
            ttfb_ms,
        };
        let answer = match answer {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => {
                tracing::warn!(%error, job = %self.lease.job, "the provider cannot be reached");
                let message = format!("hotcell: the provider cannot be reached: {error}");
                let _ = head.send(error_response(StatusCode::BAD_GATEWAY, "api_error", &message));
                // A stream's head comes before its tokens; a whole message may have been made and lost.
                let unknown = !error.is_connect() && !self.facts.stream;
                return lost(StatusCode::BAD_GATEWAY, unknown, Ended::ByProvider);
            }
            Err(ended) => {
                let message = "hotcell: the provider did not answer in time";
                let _ = head.send(error_response(StatusCode::GATEWAY_TIMEOUT, "timeout_error", message));
                return lost(StatusCode::GATEWAY_TIMEOUT, true, ended);
            }
        };
        let (parts, body) = answer.into_parts();
        let content_type = parts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let metered = self.target == Target::Messages && parts.status.is_success();
        let mut meter =
            if metered { Meter::for_content_type(content_type.unwrap_or_default()) } else { Meter::Blind };
        let retry_after = parts.headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
        let retry_after_s = retry_after.and_then(|text| text.trim().parse().ok());
        let (pieces, receiver) = mpsc::channel(PIECES_MAX);
        let whole = Arc::new(AtomicBool::new(false));
        let waiting = Waiting { pieces: receiver, whole: Arc::clone(&whole) };
        // Fails when the client has left: then the answer is only metered.
        let _ = head.send(passed_on(parts.status, &parts.headers, &secret, waiting));
        let ended = Pump { lease: &self.lease, limits, pieces, whole }.run(body, &mut meter).await;
        let status = parts.status.as_u16();
        Relayed { status, reading: meter.finish(), unknown: metered, ended, retry_after_s, ttfb_ms }
    }

    /// What the request costs: what the provider said it billed; else the whole reservation if the provider
    /// may have worked on it; else nothing.
    fn charge(&self, grant: Grant, relayed: &Relayed) -> (Usage, MicroUsd) {
        let reading = &relayed.reading;
        match reading.billable(self.output_tokens_max) {
            Some(usage) => (usage, self.price.cost(&usage)),
            // An error instead of a first event: it did not begin.
            None if relayed.unknown && reading.error.is_none() => (Usage::default(), grant.amount),
            None => (Usage::default(), MicroUsd::ZERO),
        }
    }

    async fn settle(&self, grant: Grant, relayed: &Relayed) {
        let (usage, charged) = self.charge(grant, relayed);
        let (tries, pause) = SETTLE_TRIES;
        let mut spent = None;
        for attempt in 1..=tries {
            match self.lease.ledger.settle(grant.id, usage, charged).await {
                Ok(sum) => {
                    spent = Some(sum);
                    break;
                }
                Err(error) => {
                    tracing::error!(%error, attempt, job = %self.lease.job, "the ledger cannot settle");
                    tokio::time::sleep(pause).await;
                }
            }
        }
        self.lease.settled.notify_waiters();
        self.lease.event(GatewayEvent::Charged {
            model: self.facts.model.clone(),
            usage,
            // Not settled: the reservation stays in the books.
            charged: if spent.is_some() { charged } else { grant.amount },
            status: relayed.status,
            duration_ms: millis(self.arrived),
            ttfb_ms: relayed.ttfb_ms,
        });
        let cut_short = self.clamped && relayed.reading.stop_reason.as_deref() == Some("max_tokens");
        if let (true, Some(spent), Some(limit)) = (cut_short, spent, self.lease.cost_limit) {
            self.lease.event(GatewayEvent::BudgetExhausted { spent, limit });
        }
    }

    fn tell_faults(&self, relayed: &Relayed) {
        let event_status = relayed.reading.error.as_deref().map(|kind| match kind {
            "rate_limit_error" => 429,
            "overloaded_error" => 529,
            "authentication_error" => 401,
            "permission_error" => 403,
            _ => 500,
        });
        let status = match relayed.status {
            401 | 403 | 429 | 500.. if relayed.ended == Ended::Whole => Some(relayed.status),
            _ if event_status.is_some() => event_status,
            _ if relayed.ended == Ended::ByProvider => None,
            _ => return,
        };
        let retry_after_s = relayed.retry_after_s;
        self.lease.event(GatewayEvent::ProviderFault { status, retry_after_s });
    }
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Dollars with two decimals, or as many as there are.
fn dollars(amount: MicroUsd) -> String {
    let text = amount.to_string();
    let cut = text.trim_end_matches('0').len().max(text.len().saturating_sub(4));
    text[..cut].to_owned()
}

/// Returns `limit` after the client has left.
async fn left_for(head: &mut oneshot::Sender<Response<Body>>, limit: Duration) {
    head.closed().await;
    tokio::time::sleep(limit).await;
}

/// The pieces of an answer on their way to the client.
struct Waiting {
    pieces: mpsc::Receiver<Bytes>,
    /// Set before the sender goes if the client has got everything; else it sees the answer break off.
    whole: Arc<AtomicBool>,
}

/// The answer as the cell gets it: all headers but those of the hop, and none that holds the credential.
fn passed_on(status: StatusCode, headers: &HeaderMap, secret: &Secret, waiting: Waiting) -> Response<Body> {
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
        if !ANSWER_HEADERS_DROPPED.contains(&name.as_str()) && !secret.is_in(value.as_bytes()) {
            response.headers_mut().append(name.clone(), value.clone());
        }
    }
    response
}

/// Who ended an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// It came to its end.
    Whole,
    /// The provider broke off or fell silent.
    ByProvider,
    /// We stopped reading: the client had left, or time was up.
    ByUs,
}

/// Carries an answer from the provider to meter and client.
struct Pump<'a> {
    lease: &'a Shared,
    limits: &'a Limits,
    pieces: mpsc::Sender<Bytes>,
    whole: Arc<AtomicBool>,
}

impl Pump<'_> {
    async fn run(self, mut body: Incoming, meter: &mut Meter) -> Ended {
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
                frame = timeout(self.limits.idle, body.frame()) => frame,
            };
            match frame {
                Ok(Some(Ok(frame))) => {
                    let Ok(data) = frame.into_data() else { continue };
                    meter.push(&data);
                    if client_here && !self.deliver(data).await {
                        client_here = false;
                        deadline.as_mut().reset(drained_by());
                    }
                }
                Ok(None) => {
                    self.whole.store(client_here, Ordering::Release);
                    return Ended::Whole;
                }
                Ok(Some(Err(_))) | Err(_) => return Ended::ByProvider,
            }
        }
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
