//! Admission: everything that is decided about a request before money is involved. What comes from the cell is
//! compared as it is, never decoded; what is not known to be harmless is refused, with nothing sent upstream.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};
use hyper::header::{self, HeaderMap};
use hyper::{Request, Response, StatusCode};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::body::{BodyError, BodyFacts};
use super::lease::{BODY_UNIT, Shared};
use super::messages::Call;
use super::pace::Class;
use super::provider::{Provider, Target};
use super::relay::{Body, error_response};
use super::{GatewayEvent, Refusal};
use crate::policy::requests::{Part, web_search_uses_max};
use crate::policy::{Ask, Plan, decide};

/// Largest body that is looked through on the spot.
const BODY_BYTES_INLINE: usize = 512 << 10;
/// Pieces of a body that are copied together at once.
const PIECES_MAX: usize = 16;
/// Headers that mean something to the provider: see [`inspect`].
const VENDOR_PREFIX: &str = "anthropic-";
/// The version of the API that is understood here.
const API_VERSION: &str = "2023-06-01";
/// Most beta features that one request names.
const BETAS_MAX: usize = 64;

/// A refusal with its words.
pub(super) struct Refused {
    why: Refusal,
    message: String,
    retry_after_s: Option<u64>,
}

impl Refused {
    pub(super) fn new(why: Refusal, message: impl Into<String>) -> Self {
        let retry_after_s = (why == Refusal::Busy).then_some(1);
        Self { why, message: message.into(), retry_after_s }
    }

    /// The provider limits requests of this kind for so long.
    pub(super) fn paused(retry_after_s: u64) -> Self {
        let message = format!("the model provider limits this credential for {retry_after_s} s more");
        Self { why: Refusal::Paused, message, retry_after_s: Some(retry_after_s) }
    }

    /// The cell has counted tokens too often of late.
    pub(super) fn counts(retry_after_s: u64) -> Self {
        let message = "tokens are counted too often: the limit of the provider is for all jobs";
        Self { why: Refusal::Busy, message: message.to_owned(), retry_after_s: Some(retry_after_s) }
    }

    /// Statuses that the CLI does not retry (403, 400, 413), where trying again gives the same.
    fn status(&self) -> (StatusCode, &'static str) {
        match self.why {
            Refusal::Transport => (StatusCode::PAYLOAD_TOO_LARGE, "request_too_large"),
            Refusal::Malformed => (StatusCode::BAD_REQUEST, "invalid_request_error"),
            Refusal::Busy | Refusal::Paused => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error"),
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
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
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
    // Betas of the body are in the headers now.
    inspect(&lease.plan, &headers)?;
    let facts = read_facts(lease, &body).await?;
    for wanted in &facts.wanted {
        decide(&lease.plan, Ask::Request { part: wanted.part() })
            .map_err(|denial| Refused::new(Refusal::Content, denial.reason))?;
    }
    let searches_each = web_search_uses_max(&lease.plan.layers).unwrap_or(0);
    let permit = decide(&lease.plan, Ask::Model { name: &facts.model })
        .map_err(|denial| Refused::new(Refusal::Model, denial.reason))?;
    let price = lease.gateway.price(provider, &facts.model, &lease.plan).ok_or_else(|| {
        let message = format!(
            "the model {} has no price: add it to prices.toml, or name [models] unpriced in the policy",
            shown(&facts.model)
        );
        Refused::new(Refusal::Price, message)
    })?;
    let web_searches = facts.web_searches_max(searches_each);
    if web_searches > 0 && price.web_search.is_none() {
        let message = "a web search has no price: add web_search_per_use to prices.toml";
        return Err(Refused::new(Refusal::Price, message));
    }
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
        web_searches,
        searches_each,
        input_tokens_max: 0,
        class: Class::new(&facts.model, 0),
        facts,
        price,
        output_tokens_max,
        permit,
        body_memory: Some(body_memory),
        _place: place,
        entered: None,
    })
}

/// A usual body takes less than 0.1 ms to look through; one of many megabytes must not hold up other cells.
async fn read_facts(lease: &Shared, body: &Bytes) -> Result<BodyFacts, Refused> {
    let known = lease.recall.known();
    let read = if body.len() <= BODY_BYTES_INLINE {
        BodyFacts::read_knowing(body, &known)
    } else {
        let body = body.clone();
        let reading = tokio::task::spawn_blocking(move || BodyFacts::read_knowing(&body, &known));
        reading.await.unwrap_or_else(|_| Err(BodyError::Malformed("cannot be read".to_owned())))
    };
    let (facts, fresh) = read.map_err(|error| {
        let malformed = matches!(error, BodyError::Malformed(_));
        Refused::new(if malformed { Refusal::Malformed } else { Refusal::Content }, error.to_string())
    })?;
    lease.recall.keep(fresh, lease.provider.estimates.fragments());
    Ok(facts)
}

fn shown(text: &str) -> String {
    format!("{:?}", text.chars().take(80).collect::<String>())
}

/// The headers that mean something to the provider: its own version, the CLI's flag for browsers, and beta
/// features, each with the policy's word. They can make it fetch, store and bill just as the body can.
pub(super) fn inspect(plan: &Plan, headers: &HeaderMap) -> Result<(), Refused> {
    let refused = |message: String| Refused::new(Refusal::Content, message);
    let mut betas = 0;
    for (name, value) in headers.iter().filter(|(name, _)| name.as_str().starts_with(VENDOR_PREFIX)) {
        let text = value.to_str().map_err(|_| refused(format!("the header {name} is no visible text")))?;
        match name.as_str() {
            "anthropic-beta" => {
                for beta in text.split(',').map(str::trim).filter(|beta| !beta.is_empty()) {
                    betas += 1;
                    if betas > BETAS_MAX {
                        return Err(refused(format!("more than {BETAS_MAX} beta features")));
                    }
                    decide(plan, Ask::Request { part: Part::Beta(beta) })
                        .map_err(|denial| refused(denial.reason))?;
                }
            }
            "anthropic-version" if text == API_VERSION => {}
            "anthropic-dangerous-direct-browser-access" if text == "true" => {}
            _ => {
                return Err(refused(format!("the header {name}: {} is not allowed here", shown(text))));
            }
        }
    }
    if headers.get_all("anthropic-version").iter().count() > 1 {
        return Err(refused("the header anthropic-version stands twice".to_owned()));
    }
    Ok(())
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
    let mut bytes = lease.gateway.buffers.take(declared.unwrap_or(0));
    // Kept until they are copied together: given back one by one, the connection's buffer would grow with each, and
    // stay as large for as long as the answer lasts.
    let mut pieces: Vec<Bytes> = Vec::with_capacity(PIECES_MAX);
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        let broken = |_| Refused::new(Refusal::Transport, "the request body broke off");
        let Ok(data) = frame.map_err(broken)?.into_data() else { continue };
        length += data.len();
        if length > bytes_max {
            return Err(too_large());
        }
        pieces.push(data);
        if pieces.len() == PIECES_MAX {
            pieces.drain(..).for_each(|piece| bytes.extend(&piece));
        }
    }
    pieces.iter().for_each(|piece| bytes.extend(piece));
    Ok((bytes.freeze(), memory))
}
