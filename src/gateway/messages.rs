//! The road of one request, from top to bottom: admit → reserve → forward → pass on and meter → settle. Nothing
//! goes upstream before its reservation; from admission on the request lives in a task of its own, which
//! settles whatever becomes of the client.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::timeout;

use super::admit::{Refused, admit};
use super::body::BodyFacts;
use super::censor::Censor;
use super::lease::Shared;
use super::ledger::{Ask, Grant, LedgerError};
use super::meter::{Meter, Reading};
use super::relay::{Body, Ended, Pump, Waiting, error_response, passed_on, whole};
use super::upstream::Target;
use super::{GatewayEvent, Refusal};
use crate::money::MicroUsd;
use crate::policy::Permit;
use crate::pricing::{Price, Usage};

/// Pieces of an answer that wait for the client.
const PIECES_MAX: usize = 16;
/// The least `max_tokens` that a request is lowered to; less is not worth asking for.
const OUTPUT_TOKENS_FLOOR: u64 = 4_096;
/// How often a request that waits for room asks again, besides at each settlement of its own lease.
const ROOM_POLL: Duration = Duration::from_millis(500);
/// Tries to settle, and the time between them.
const SETTLE_TRIES: (u32, Duration) = (5, Duration::from_millis(300));
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

/// One admitted request on its road.
pub(super) struct Call {
    pub(super) lease: Arc<Shared>,
    pub(super) arrived: Instant,
    pub(super) target: Target,
    pub(super) beta: bool,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    pub(super) facts: BodyFacts,
    pub(super) price: Price,
    /// `max_tokens` as it goes upstream.
    pub(super) output_tokens_max: u64,
    /// The policy's word that this model may be asked.
    pub(super) permit: Permit,
    /// Given back when the body is upstream.
    pub(super) body_memory: Option<OwnedSemaphorePermit>,
    /// A place among the requests under way.
    pub(super) _place: OwnedSemaphorePermit,
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
        if relayed.status == 401 {
            self.lease.gateway.credential.doubt().await;
        }
        self.tell_faults(&relayed);
    }

    /// Reserves the worst case; waits while others are in the way. `Err(None)`: the client has left.
    async fn reserve(
        &mut self,
        head: &mut oneshot::Sender<Response<Body>>,
    ) -> Result<Grant, Option<Refused>> {
        let (input, cache) = (self.facts.input_tokens_estimate, self.facts.cache_write);
        let ask = Ask {
            job: self.lease.job.clone(),
            model: self.facts.model.clone(),
            credential: self.lease.gateway.name.clone(),
            provider: self.lease.gateway.name.clone(),
            want: self.price.worst_case(input, self.output_tokens_max, cache),
            floor: self.price.worst_case(input, self.output_tokens_max.min(OUTPUT_TOKENS_FLOOR), cache),
            budgets: self.lease.budgets.clone(),
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
                Err(error @ LedgerError::Exhausted { .. }) => return Err(Some(self.exhausted(&error))),
                Err(LedgerError::Busy) if Instant::now() < give_up => {}
                Err(LedgerError::Busy) => {
                    return Err(Some(Refused::new(
                        Refusal::Busy,
                        "other requests hold the rest of a budget",
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
        let (model, credential) = (ask.model, ask.credential);
        lease.event(GatewayEvent::Requested { model, reserved: grant.amount, credential });
        Ok(grant)
    }

    /// Lowers `max_tokens` to what was granted, and writes it into the body if it differs from what was asked.
    fn fit(&mut self, ask: &Ask, grant: Grant) {
        if grant.amount < ask.want {
            let (input, cache) = (self.facts.input_tokens_estimate, self.facts.cache_write);
            let paid = self.price.output_tokens_within(grant.amount, input, cache);
            // The floor was granted; rounding must not take a token of it.
            let floor = self.output_tokens_max.min(OUTPUT_TOKENS_FLOOR);
            self.output_tokens_max = paid.clamp(floor, self.output_tokens_max);
        }
        if self.facts.output_tokens_max != Some(self.output_tokens_max) {
            self.body = self.facts.with_output_tokens(&self.body, self.output_tokens_max);
        }
    }

    fn exhausted(&self, error: &LedgerError) -> Refused {
        if let LedgerError::Exhausted { scope, spent, limit, resets_at_ms } = *error {
            self.lease.event(GatewayEvent::BudgetExhausted { scope, spent, limit, resets_at_ms });
        }
        Refused::new(Refusal::Budget, error.to_string())
    }

    /// Sends the request upstream and the answer back. Returns when the answer is over, whoever ended it.
    async fn forward(&mut self, mut head: oneshot::Sender<Response<Body>>) -> Relayed {
        let gateway = Arc::clone(&self.lease.gateway);
        let limits = &gateway.limits;
        let mut headers = std::mem::take(&mut self.headers);
        let secret = gateway.credential.inject(&self.permit, &mut headers).await;
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
                let why = with_causes(&error);
                tracing::warn!(why, job = %self.lease.job, "the provider cannot be reached");
                let message = format!("hotcell: the provider cannot be reached: {why}");
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
        let censor = Censor::new(secret);
        let ended = Pump { lease: &self.lease, limits, pieces, whole, censor }.run(body, &mut meter).await;
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
        let cut_short = relayed.reading.stop_reason.as_deref() == Some("max_tokens");
        if let (true, Some(_), Some(by)) = (cut_short, spent, grant.lowered_by) {
            // Nothing else was set aside in this budget when it lowered the request.
            let (scope, spent) = (by.scope, by.charged.plus(charged));
            let (limit, resets_at_ms) = (by.limit, by.resets_at_ms);
            self.lease.event(GatewayEvent::BudgetExhausted { scope, spent, limit, resets_at_ms });
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

/// An error with what caused it; hyper's own text names only the step.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Returns `limit` after the client has left.
async fn left_for(head: &mut oneshot::Sender<Response<Body>>, limit: Duration) {
    head.closed().await;
    tokio::time::sleep(limit).await;
}
