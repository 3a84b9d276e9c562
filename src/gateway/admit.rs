//! Admission: everything that is decided about a request before money is involved. What comes from the cell is
//! compared as it is, never decoded; what is not known to be harmless is refused, with nothing sent upstream.

use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Uri};
use subtle::ConstantTimeEq;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::body::{BodyError, BodyFacts};
use super::credentials::Secret;
use super::lease::{BODY_UNIT, Shared};
use super::messages::Call;
use super::relay::{Body, error_response};
use super::upstream::Target;
use super::{GatewayEvent, Refusal};
use crate::policy::{Ask, decide};

/// Largest body that is looked through on the spot.
const BODY_BYTES_INLINE: usize = 512 << 10;
/// Request headers that go upstream, besides those that begin with one of [`REQUEST_PREFIXES`].
const REQUEST_HEADERS: [HeaderName; 2] = [header::ACCEPT, header::USER_AGENT];
/// What the API and its clients call their own.
const REQUEST_PREFIXES: [&str; 4] = ["anthropic-", "x-stainless-", "x-claude-", "x-app"];
/// A refusal with its words.
pub(super) struct Refused {
    why: Refusal,
    message: String,
}

impl Refused {
    pub(super) fn new(why: Refusal, message: impl Into<String>) -> Self {
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

    pub(super) fn response(self, lease: &Shared) -> Response<Body> {
        let (status, kind) = self.status();
        lease.event(GatewayEvent::Refused { status: status.as_u16(), why: self.why });
        let mut response = error_response(status, kind, &format!("hotcell: {}", self.message));
        if self.why == Refusal::Busy {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

/// Everything that is decided before money is involved.
pub(super) async fn admit(lease: &Arc<Shared>, request: Request<Incoming>) -> Result<Call, Refused> {
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
    let facts = read_facts(&body).await?;
    let permit = decide(&lease.plan, Ask::Model { name: &facts.model })
        .map_err(|denial| Refused::new(Refusal::Model, denial.reason))?;
    let price = lease.gateway.prices.of_or(&facts.model, lease.plan.unpriced.as_ref()).ok_or_else(|| {
        let message = format!(
            "the model {} has no price: add it to prices.toml, or name [models] unpriced in the policy",
            shown(&facts.model)
        );
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
        permit,
        body_memory: Some(body_memory),
        _place: place,
    })
}

/// A usual body takes 0.1 ms to look through; one of many megabytes must not hold up other cells.
async fn read_facts(body: &Bytes) -> Result<BodyFacts, Refused> {
    let facts = if body.len() <= BODY_BYTES_INLINE {
        BodyFacts::read(body)
    } else {
        let body = body.clone();
        let reading = tokio::task::spawn_blocking(move || BodyFacts::read(&body));
        reading.await.unwrap_or_else(|_| Err(BodyError::Malformed("cannot be read".to_owned())))
    };
    facts.map_err(|error| {
        let malformed = matches!(error, BodyError::Malformed(_));
        Refused::new(if malformed { Refusal::Malformed } else { Refusal::Content }, error.to_string())
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
        (Some(one), None) if !one.is_empty() && bool::from(one.ct_eq(token.bytes())) => Ok(()),
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
