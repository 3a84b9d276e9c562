//! The road of one request, from top to bottom: admit → bound its input → wait for a turn → reserve → forward →
//! pass on and meter → settle. Nothing that costs goes upstream before its reservation; from admission on the request lives in a task
//! of its own, which settles whatever becomes of the client.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Request, Response, StatusCode};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::admit::{Refused, admit};
use super::body::BodyFacts;
use super::censor::Censor;
use super::estimate::with_searches;
use super::lease::Shared;
use super::ledger::{Ask, Grant, LedgerError};
use super::meter::{Meter, Reading};
use super::pace::pacer::Turn;
use super::pace::{Class, Ending};
use super::provider::{Outgoing, Target, Way};
use super::relay::{Body, Ended, Pump, Source, Waiting, error_response, passed_on};
use super::secret::Secrets;
use super::{GatewayEvent, Refusal};
use crate::clock;
use crate::money::MicroUsd;
use crate::policy::Permit;
use crate::pricing::{Price, Usage};

/// Pieces of an answer that wait for the client; each is a buffer of the provider's connection at the most.
const PIECES_MAX: usize = 8;
/// The least `max_tokens` that a request is lowered to; less is not worth asking for.
const OUTPUT_TOKENS_FLOOR: u64 = 4_096;
/// How often a request that waits for room asks again, besides at each settlement of its own lease.
const ROOM_POLL: Duration = Duration::from_millis(500);
/// Tries to settle, and the time between them.
const SETTLE_TRIES: (u32, Duration) = (5, Duration::from_millis(300));
/// How often one request is sent while the provider says that it is limited.
const LIMITED_TRIES: u32 = 3;

/// Answers one request of a cell.
pub(super) async fn answer(lease: Arc<Shared>, request: Request<Incoming>) -> Response<Body> {
    let here = lease.provider.answered_here(request.method(), request.uri(), request.headers(), &lease.token);
    let admitted = match here {
        Some(Ok(response)) => return response,
        Some(Err(refused)) => Err(refused),
        // Boxed, here and below: what is long past must not take room for as long as an answer lasts.
        None => Box::pin(admit(&lease, request)).await,
    };
    let refused = match admitted {
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
    /// How it goes upstream.
    pub(super) way: Way,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    pub(super) facts: BodyFacts,
    pub(super) price: Price,
    /// Web searches that the provider may make for it, and the most that each tool for it may.
    pub(super) web_searches: u64,
    pub(super) searches_each: u32,
    /// The bound on its input, once it is known.
    pub(super) input_tokens_max: u64,
    /// What the provider limits it with; told by the bound.
    pub(super) class: Class,
    /// `max_tokens` as it goes upstream.
    pub(super) output_tokens_max: u64,
    /// The policy's word that this model may be asked.
    pub(super) permit: Permit,
    /// Given back when the body is upstream.
    pub(super) body_memory: Option<OwnedSemaphorePermit>,
    /// A place among the requests under way.
    pub(super) _place: OwnedSemaphorePermit,
    /// Held from its reservation to its settlement.
    pub(super) entered: Option<TaskTrackerToken>,
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
    /// Nothing went upstream.
    ours: bool,
}

/// Why a request goes no further.
enum Stop {
    /// The client has left, or the lease is cut.
    Gone,
    /// This is the answer.
    Refused(Refused),
}

type Head = oneshot::Sender<Response<Body>>;

impl Call {
    async fn run(mut self, mut head: Head) {
        let (grant, turn) = match self.target {
            // Free, and limited apart: it has nothing to wait for.
            Target::CountTokens => match self.lease.learnt.may_count() {
                Ok(()) => (None, None),
                Err(wait) => {
                    let refused = Refused::counts(seconds(wait));
                    let _ = head.send(refused.response(&self.lease));
                    return;
                }
            },
            Target::Messages => match Box::pin(self.prepare(&mut head)).await {
                Ok((grant, turn)) => (Some(grant), Some(turn)),
                Err(Stop::Gone) => return,
                Err(Stop::Refused(refused)) => {
                    let _ = head.send(refused.response(&self.lease));
                    return;
                }
            },
        };
        let relayed = self.forward(head, turn).await;
        if let Some(grant) = grant {
            self.settle(grant, &relayed).await;
        }
        // AWS says 403 of keys that have expired.
        if matches!(relayed.status, 401 | 403) && !relayed.ours {
            let lease = &self.lease;
            lease.gateway.credentials.doubt(&lease.provider.credential, &lease.identity).await;
        }
        self.tell_faults(&relayed);
    }

    /// Bound, turn, reservation. A count may be slow: it holds no turn. Who waits for money gives the turn back
    /// meanwhile: those that hold the money may wait for it.
    async fn prepare(&mut self, head: &mut Head) -> Result<(Grant, Turn), Stop> {
        let bound = tokio::select! {
            bound = self.bound_input() => bound,
            () = head.closed() => return Err(Stop::Gone),
            () = self.lease.cut.cancelled() => return Err(Stop::Gone),
        };
        self.class = Class::new(&self.facts.model, bound);
        let mut turn = Some(self.turn(head).await?);
        // While it waited, others may have learnt more.
        self.input_tokens_max = with_searches(self.known_bound().tokens.min(bound), self.web_searches);
        let grant = self.reserve(head, &mut turn).await?;
        match turn {
            Some(turn) => Ok((grant, turn)),
            None => match self.turn(head).await {
                Ok(turn) => Ok((grant, turn)),
                Err(stop) => {
                    self.release(grant).await;
                    Err(stop)
                }
            },
        }
    }

    /// Waits for a turn at the provider. A pause that lasts longer than the wait is told at once, so that the job
    /// can be parked.
    async fn turn(&self, head: &mut Head) -> Result<Turn, Stop> {
        let lease = &self.lease;
        let give_up = self.arrived + lease.gateway.limits.pace_wait;
        let tell = |paused| self.tell_pause(paused);
        let waiting = lease.provider.pacer.turn(&self.class, &lease.job, give_up, tell);
        let paused = tokio::select! {
            turn = waiting => match turn {
                Ok(turn) => return Ok(turn),
                Err(paused) => paused,
            },
            () = head.closed() => return Err(Stop::Gone),
            () = lease.cut.cancelled() => return Err(Stop::Gone),
        };
        let retry_after_s = seconds(paused);
        lease.event(GatewayEvent::ProviderFault { status: Some(429), retry_after_s: Some(retry_after_s) });
        Err(Stop::Refused(Refused::paused(retry_after_s)))
    }

    /// Says once that a pause is longer than requests are held.
    fn tell_pause(&self, paused: Duration) {
        /// The same pause, seen at another time, differs by less.
        const SAME_MS: u64 = 1_000;
        let paused_ms = u64::try_from(paused.as_millis()).unwrap_or(u64::MAX);
        let until_ms = clock::wall_ms().saturating_add(paused_ms);
        let told_ms = self.lease.pause_told_ms.fetch_max(until_ms, Ordering::Relaxed);
        if until_ms > told_ms.saturating_add(SAME_MS) {
            self.lease.event(GatewayEvent::ProviderPaused { until_ms });
        }
    }

    /// What it can cost at the most with this many output tokens.
    fn worst_case(&self, output_tokens: u64) -> MicroUsd {
        let tokens = self.price.worst_case(self.input_tokens_max, output_tokens, self.facts.cache_write);
        tokens.plus(self.searches_price(self.web_searches))
    }

    fn searches_price(&self, searches: u64) -> MicroUsd {
        MicroUsd(self.price.web_search.unwrap_or_default().0.saturating_mul(searches))
    }

    /// Reserves the worst case; waits while others are in the way.
    async fn reserve(&mut self, head: &mut Head, turn: &mut Option<Turn>) -> Result<Grant, Stop> {
        let ask = Ask {
            job: self.lease.job.clone(),
            model: self.facts.model.clone(),
            credential: self.lease.provider.credential.clone(),
            provider: self.lease.provider.name.clone(),
            want: self.worst_case(self.output_tokens_max),
            floor: self.worst_case(self.output_tokens_max.min(OUTPUT_TOKENS_FLOOR)),
            budgets: self.lease.budgets.clone(),
        };
        let give_up = Instant::now() + self.lease.gateway.limits.budget_wait;
        let lease = Arc::clone(&self.lease);
        let refused = |why, message: &str| Stop::Refused(Refused::new(why, message));
        let grant = loop {
            let settled = lease.settled.notified();
            tokio::pin!(settled);
            // Before the question, so that a settlement right after it is not missed.
            settled.as_mut().enable();
            let entered = tokio::select! {
                entered = lease.gateway.entered() => entered,
                () = head.closed() => return Err(Stop::Gone),
                () = lease.cut.cancelled() => return Err(Stop::Gone),
            };
            match lease.ledger.reserve(ask.clone()).await {
                Ok(grant) => {
                    self.entered = Some(entered);
                    break grant;
                }
                Err(error @ LedgerError::Exhausted { .. }) => {
                    return Err(Stop::Refused(self.exhausted(&error)));
                }
                Err(LedgerError::Busy) if Instant::now() < give_up => drop((turn.take(), entered)),
                Err(LedgerError::Busy) => {
                    return Err(refused(Refusal::Busy, "other requests hold the rest of a budget"));
                }
                Err(LedgerError::Store(error)) => {
                    tracing::error!(%error, job = %lease.job, "the ledger cannot reserve");
                    return Err(refused(Refusal::Ledger, "the ledger does not answer"));
                }
            }
            tokio::select! {
                () = settled => {}
                () = tokio::time::sleep(ROOM_POLL) => {}
                () = head.closed() => return Err(Stop::Gone),
                () = lease.cut.cancelled() => return Err(Stop::Gone),
            }
        };
        self.fit(&ask, grant);
        let (model, credential) = (ask.model, ask.credential);
        lease.event(GatewayEvent::Requested { model, reserved: grant.amount, credential });
        Ok(grant)
    }

    /// Lowers `max_tokens` to what was granted, and writes into the body what differs from what was asked.
    fn fit(&mut self, ask: &Ask, grant: Grant) {
        if grant.amount < ask.want {
            let (input, cache) = (self.input_tokens_max, self.facts.cache_write);
            let for_tokens = grant.amount.minus(self.searches_price(self.web_searches));
            let paid = self.price.output_tokens_within(for_tokens, input, cache);
            // The floor was granted; rounding must not take a token of it.
            let floor = self.output_tokens_max.min(OUTPUT_TOKENS_FLOOR);
            self.output_tokens_max = paid.clamp(floor, self.output_tokens_max);
        }
        self.body = self.facts.rewritten(&self.body, self.output_tokens_max, self.searches_each);
    }

    fn exhausted(&self, error: &LedgerError) -> Refused {
        if let LedgerError::Exhausted { scope, spent, limit, resets_at_ms } = *error {
            self.lease.event(GatewayEvent::BudgetExhausted { scope, spent, limit, resets_at_ms });
        }
        Refused::new(Refusal::Budget, error.to_string())
    }

    /// Sends the request upstream and the answer back. Returns when the answer is over, whoever ended it. Where the
    /// provider is limited, the request is held and sent again: nothing was billed for it.
    async fn forward(&mut self, mut head: Head, mut turn: Option<Turn>) -> Relayed {
        let give_up = self.arrived + self.lease.gateway.limits.pace_wait;
        for attempt in 1.. {
            let (answer, secrets, ttfb_ms) = match Box::pin(self.send(&mut head)).await {
                Ok(sent) => sent,
                Err((relayed, response)) => {
                    let _ = head.send(*response);
                    return relayed;
                }
            };
            let limit = limit_of(answer.status(), answer.headers());
            let paused = match (limit, turn.take()) {
                (Some(ending), Some(turn)) => turn.end(ending),
                (None, Some(turn)) => return self.relay(head, answer, secrets, ttfb_ms, Some(turn)).await,
                (_, None) => return self.relay(head, answer, secrets, ttfb_ms, None).await,
            };
            let last = attempt >= LIMITED_TRIES || head.is_closed() || Instant::now() + paused >= give_up;
            if last {
                if Instant::now() + paused >= give_up {
                    self.tell_pause(paused);
                }
                return self.relay(head, answer, secrets, ttfb_ms, None).await;
            }
            drop(answer);
            match self.turn(&mut head).await {
                Ok(again) => turn = Some(again),
                Err(stop) => {
                    if let Stop::Refused(refused) = stop {
                        let _ = head.send(refused.response(&self.lease));
                    }
                    break;
                }
            }
        }
        lost(StatusCode::TOO_MANY_REQUESTS, false, Ended::ByUs, 0)
    }

    /// The request in the provider's form, with the credential; made anew for each try, since a signature ages.
    pub(super) async fn outgoing(&self, way: &Way, body: Bytes) -> Result<Outgoing, Refused> {
        let lease = &self.lease;
        let (credentials, headers) = (&lease.gateway.credentials, self.headers.clone());
        let made = lease.provider.outgoing(way, body, headers, credentials, &self.permit, &lease.identity);
        made.await.map_err(|error| {
            let name = &lease.provider.credential;
            tracing::warn!(%error, job = %lease.job, credential = name, "a request cannot go out");
            // The words of the error name files and programs of the host: they are not for the cell.
            let message =
                format!("the credential {name} of the provider cannot be used: see the daemon's log");
            Refused::new(Refusal::Provider, message)
        })
    }

    /// Sends the request; gives the head of the answer.
    async fn send(&mut self, head: &mut Head) -> Result<Sent, (Relayed, Box<Response<Body>>)> {
        let gateway = Arc::clone(&self.lease.gateway);
        let limits = &gateway.limits;
        // A credential may take long to get. Nothing goes out any more for a client that has left meanwhile.
        let made = tokio::select! {
            biased;
            () = self.lease.cut.cancelled() => Err(Refused::new(Refusal::Busy, "the lease is closed")),
            () = head.closed() => Err(Refused::new(Refusal::Busy, "the client has left")),
            made = self.outgoing(&self.way, self.body.clone()) => made,
        };
        let outgoing = match made {
            Ok(outgoing) => outgoing,
            Err(refused) => {
                let response = refused.response(&self.lease);
                let relayed = lost(response.status(), false, Ended::ByUs, 0);
                return Err((Relayed { ours: true, ..relayed }, Box::new(response)));
            }
        };
        let secrets = outgoing.secrets.clone();
        let sent = Instant::now();
        let sending = self.lease.provider.send(outgoing);
        let answer = tokio::select! {
            biased;
            answer = timeout(limits.first_byte_wait, sending) => answer.map_err(|_| Ended::ByProvider),
            () = left_for(head, limits.drain) => Err(Ended::ByUs),
            () = self.lease.cut.cancelled() => Err(Ended::ByUs),
        };
        let ttfb_ms = millis(sent);
        match answer {
            Ok(Ok(answer)) => Ok((answer, secrets, ttfb_ms)),
            Ok(Err(error)) => {
                let why = with_causes(&error);
                tracing::warn!(why, job = %self.lease.job, "the provider cannot be reached");
                let message = format!("hotcell: the provider cannot be reached: {why}");
                let response = error_response(StatusCode::BAD_GATEWAY, "api_error", &message);
                // It may have been made, and its head lost on the way.
                let unknown = !error.is_connect();
                let relayed = lost(StatusCode::BAD_GATEWAY, unknown, Ended::ByProvider, ttfb_ms);
                Err((relayed, Box::new(response)))
            }
            Err(ended) => {
                let message = "hotcell: the provider did not answer in time";
                let response = error_response(StatusCode::GATEWAY_TIMEOUT, "timeout_error", message);
                Err((lost(StatusCode::GATEWAY_TIMEOUT, true, ended, ttfb_ms), Box::new(response)))
            }
        }
    }

    /// Passes an answer on, metering it.
    async fn relay(
        &mut self,
        head: Head,
        answer: Response<Incoming>,
        secrets: Secrets,
        ttfb_ms: u64,
        turn: Option<Turn>,
    ) -> Relayed {
        // It is upstream, and not sent again.
        (self.body, self.body_memory, self.headers) = (Bytes::new(), None, HeaderMap::new());
        let limits = &self.lease.gateway.limits;
        let (parts, body) = answer.into_parts();
        let content_type = parts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let metered = self.target == Target::Messages && parts.status.is_success();
        let mut meter =
            if metered { Meter::for_content_type(content_type.unwrap_or_default()) } else { Meter::Blind };
        let retry_after_s = retry_after_ms(&parts.headers).map(|ms| ms.div_ceil(1_000));
        let (pieces, receiver) = mpsc::channel(PIECES_MAX);
        let whole = Arc::new(AtomicBool::new(false));
        let waiting = Waiting { pieces: receiver, whole: Arc::clone(&whole) };
        let (status, mut source) = (parts.status, Source::new(body));
        let response = passed_on(status, &parts.headers, &secrets, waiting);
        // They share a buffer with the answer's body, which is used again once they are gone.
        drop(parts);
        // What is there already goes out together with the head.
        source.look().await;
        // Fails when the client has left: then the answer is only metered.
        let _ = head.send(response);
        let censor = Censor::new(secrets);
        let pump = Pump { lease: &self.lease, limits, pieces, whole, censor };
        let ended = pump.run(source, &mut meter).await;
        let reading = meter.finish();
        if let Some(turn) = turn {
            let limited = matches!(reading.error.as_deref(), Some("rate_limit_error" | "overloaded_error"));
            turn.end(match status {
                _ if limited => Ending::Limited { retry_after_ms: None },
                status if status.is_success() && ended == Ended::Whole => Ending::Served,
                _ => Ending::Other,
            });
        }
        let status = status.as_u16();
        // A gateway before the provider gave up on an answer that may have been made whole.
        let given_up = !self.facts.stream && matches!(status, 408 | 502 | 504 | 520..=524);
        let unknown = self.target == Target::Messages && (metered || given_up);
        Relayed { status, reading, unknown, ended, retry_after_s, ttfb_ms, ours: false }
    }

    /// What the request costs: what the provider said it billed; where an answer was not read to its end, its input
    /// and all the output that it could have; the whole reservation if nothing was said and the provider may have
    /// worked on it; else nothing.
    fn charge(&self, grant: Grant, relayed: &Relayed) -> (Usage, MicroUsd) {
        let reading = &relayed.reading;
        match reading.billable(self.output_tokens_max, relayed.ended == Ended::Whole) {
            // What was not said before the end may have been searched for all the same, and what was found is input
            // that no event has told yet.
            Some(mut usage) if !reading.complete && self.web_searches > 0 => {
                usage.web_searches = self.web_searches;
                (usage, self.price.cost(&usage).max(grant.amount))
            }
            Some(usage) => (usage, self.price.cost(&usage)),
            // An error instead of a first event: it did not begin.
            None if relayed.unknown && reading.error.is_none() => (Usage::default(), grant.amount),
            None => (Usage::default(), MicroUsd::ZERO),
        }
    }

    async fn settle(&self, grant: Grant, relayed: &Relayed) {
        let (usage, charged) = self.charge(grant, relayed);
        if relayed.reading.usage.is_some() {
            self.learn(&usage);
        }
        let spent = self.write_down(grant, usage, charged).await;
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

    /// Settles in the ledger; gives the job's spend, or nothing where the ledger does not answer.
    async fn write_down(&self, grant: Grant, usage: Usage, charged: MicroUsd) -> Option<MicroUsd> {
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
        spent
    }

    /// Gives a reservation back for a request that never went out.
    async fn release(&self, grant: Grant) {
        self.settle(grant, &lost(StatusCode::TOO_MANY_REQUESTS, false, Ended::ByUs, 0)).await;
    }

    fn tell_faults(&self, relayed: &Relayed) {
        if relayed.ours {
            return;
        }
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

/// The head of an answer, the secret that it must not show, and how long it took.
type Sent = (Response<Incoming>, Secrets, u64);

fn lost(status: StatusCode, unknown: bool, ended: Ended, ttfb_ms: u64) -> Relayed {
    let reading = Reading::default();
    Relayed { status: status.as_u16(), reading, unknown, ended, retry_after_s: None, ttfb_ms, ours: false }
}

/// Whether an answer says that all requests of its class are limited, not this one alone.
fn limit_of(status: StatusCode, headers: &HeaderMap) -> Option<Ending> {
    let retry_after_ms = retry_after_ms(headers);
    // A limit that waiting does not lift concerns this request alone.
    let hopeless = headers.get("x-should-retry").is_some_and(|value| value.as_bytes() == b"false");
    let limited = match status.as_u16() {
        429 | 529 => !hopeless,
        503 => retry_after_ms.is_some(),
        _ => false,
    };
    limited.then_some(Ending::Limited { retry_after_ms })
}

/// What `retry-after-ms` or `retry-after` says, the latter in seconds; a date says nothing here.
fn retry_after_ms(headers: &HeaderMap) -> Option<u64> {
    let number = |name: &str| headers.get(name)?.to_str().ok()?.trim().parse::<f64>().ok();
    let ms = number("retry-after-ms").or_else(|| Some(number("retry-after")? * 1_000.0))?;
    // Rounding and saturating are meant.
    (ms.is_finite() && ms >= 0.0).then_some(ms.ceil() as u64)
}

/// Whole seconds, at least one.
fn seconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis().div_ceil(1_000)).unwrap_or(u64::MAX).max(1)
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
async fn left_for(head: &mut Head, limit: Duration) {
    head.closed().await;
    tokio::time::sleep(limit).await;
}
