//! Admission: everything that is decided about a request before money is involved. What comes from the cell is
//! compared as it is, never decoded; what is not known to be harmless is refused, with nothing sent upstream.

use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};
use hyper::header::{self, HeaderValue};
use hyper::{Request, Response, StatusCode};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::body::{BodyError, BodyFacts};
use super::lease::{BODY_UNIT, Shared};
use super::messages::Call;
use super::provider::{Provider, Target};
use super::relay::{Body, error_response};
use super::{GatewayEvent, Refusal};
use crate::policy::{Ask, decide};

/// Largest body that is looked through on the spot.
const BODY_BYTES_INLINE: usize = 512 << 10;
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
            Refusal::Ledger => (StatusCode::SERVICE_UNAVAILABLE, "api_error"),
            // A credential that cannot be read now is not there in a second either.
            Refusal::Provider
            | Refusal::Credential
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
    let provider = &lease.provider;
    provider.authorise(request.headers(), &lease.token)?;
    let route = provider.route(request.method(), request.uri())?;
    let target = route.target;
    let busy = |_| Refused::new(Refusal::Busy, "too many requests at a time");
    let place = Arc::clone(&lease.requests).try_acquire_owned().map_err(busy)?;
    let mut headers = Provider::forwarded(request.headers());
    let late = |_| Refused::new(Refusal::Transport, "the request body did not arrive in time");
    let read = timeout(limits.body_wait, read_body(lease, request));
    let (body, body_memory) = read.await.map_err(late)??;
    // From here on it is a request of the vendor's own API, whatever the provider's form of it is.
    let (body, way) = provider.inbound(route, &mut headers, body).await?;
    let facts = read_facts(&body).await?;
    let permit = decide(&lease.plan, Ask::Model { name: &facts.model })
        .map_err(|denial| Refused::new(Refusal::Model, denial.reason))?;
    let price = lease.gateway.price(provider, &facts.model).ok_or_else(|| {
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
        way,
        headers,
        body,
        facts,
        price,
        output_tokens_max,
        permit,
        clamped: false,
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
