//! One request that is looked into: judged by method, host and path, written anew with the credential that the policy
//! gives it, sent, and its answer passed back as it is. It must never forward what was not judged, never keep a header
//! of the connection, and never show the cell a credential.

use std::sync::Arc;
use std::time::Instant;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header;
use hyper::{Request, Response, StatusCode, Uri, Version};

use super::back::{Sent, kept};
use super::door::{Body, Refused, Shared, elapsed_ms, shown};
use super::exchange::{Asked, Origin, Passage, RequestBody};
use super::{EgressRecord, cached};
use crate::gateway::credentials::Injected;
use crate::policy::egress::{CanonicalPath, Terms, is_upgraded};
use crate::policy::{Act, EgressAsk, Host, decide_egress};

/// Headers of one hop, of proxies, and those that we write ourselves.
const REQUEST_HEADERS_DROPPED: [&str; 13] = [
    "connection",
    "content-length",
    "expect",
    "forwarded",
    "host",
    "http2-settings",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// A request through an inspected tunnel: its host is the tunnel's, whatever it says.
pub(super) async fn inspected(
    shared: &Arc<Shared>,
    origin: &Arc<Origin>,
    request: Request<Incoming>,
) -> Response<Body> {
    let asked = (|| {
        if request.uri().authority().is_some() || request.uri().scheme().is_some() {
            return Err(Refused::malformed("a request within TLS names a path, not a URL"));
        }
        let mut named = request.headers().get_all(header::HOST).iter();
        let host = named.next().and_then(|host| host.to_str().ok());
        let same = host.is_some_and(|text| {
            Host::parse_with_port(text).is_ok_and(|(host, port)| host == origin.host && port == origin.port)
                || Host::parse(text).is_ok_and(|host| host == origin.host)
        });
        if !same || named.next().is_some() {
            let words = "the Host header names another host than the connection";
            return Err(Refused::new(StatusCode::MISDIRECTED_REQUEST, "egress.request", words));
        }
        let path = CanonicalPath::parse(request.uri().path()).map_err(Refused::malformed)?;
        Ok(Asked { host: origin.host.clone(), port: origin.port, path, secure: true })
    })();
    answer(shared, Some(origin), &origin.host.to_string(), origin.port, asked, request).await
}

/// A request to the proxy itself: plain HTTP, in absolute form.
pub(super) async fn plain(shared: &Arc<Shared>, request: Request<Incoming>) -> Response<Body> {
    let authority = request.uri().authority().map(|a| a.as_str().to_owned()).unwrap_or_default();
    let asked = (|| {
        if request.uri().scheme_str() != Some("http") {
            return Err(Refused::malformed(
                "this is a proxy: it takes CONNECT host:port, or a URL with http://",
            ));
        }
        let has_port = authority.rsplit(']').next().is_some_and(|rest| rest.contains(':'));
        let parsed = if has_port {
            Host::parse_with_port(&authority)
        } else {
            Host::parse(&authority).map(|host| (host, 80))
        };
        let (host, port) = parsed.map_err(|error| Refused::malformed(format!("the URL's host {error}")))?;
        let path = CanonicalPath::parse(request.uri().path()).map_err(Refused::malformed)?;
        // What the policy judges as a request over TLS leaves as one, too.
        let secure = is_upgraded(&shared.plan.layers, &host, port);
        Ok(Asked { host, port: if secure { 443 } else { port }, path, secure })
    })();
    let (host, port) = match &asked {
        Ok(asked) => (asked.host.to_string(), asked.port),
        Err(_) => (shown(&authority), 0),
    };
    answer(shared, None, &host, port, asked, request).await
}

async fn answer(
    shared: &Arc<Shared>,
    origin: Option<&Arc<Origin>>,
    host: &str,
    port: u16,
    asked: Result<Asked, Refused>,
    request: Request<Incoming>,
) -> Response<Body> {
    let began = Instant::now();
    let mut event = EgressRecord {
        host: host.to_owned(),
        port,
        method: Some(shown(request.method().as_str())),
        path: Some(
            asked.as_ref().map_or_else(|_| shown(request.uri().path()), |a| a.path.as_str().to_owned()),
        ),
        allowed: true,
        ..EgressRecord::default()
    };
    let sent = match asked {
        Ok(asked) => send(shared, origin, &asked, request, &mut event).await,
        Err(refused) => Err(refused),
    };
    match sent {
        Ok(sent) => {
            event.status = Some(sent.status.as_u16());
            event.reason = hint(sent.status, &event);
            sent.pass_back(shared, event, began)
        }
        Err(refused) => {
            let response = refused.response();
            event.duration_ms = elapsed_ms(began);
            (event.rule, event.reason, event.allowed) = (refused.rule, Some(refused.reason), refused.allowed);
            shared.record(event).await;
            response
        }
    }
}

/// What to look at where a host wants to know who asks.
fn hint(status: StatusCode, event: &EgressRecord) -> Option<String> {
    let (said, rule, host) = (status.as_u16(), &event.rule, &event.host);
    match (status, &event.credential) {
        (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, Some(name)) => {
            Some(format!("{host} answers {said}, though the rule {rule} adds the credential {name}"))
        }
        (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, None) => Some(format!(
            "{host} answers {said}, and the rule {rule} adds no credential: `credential = \"NAME\"` there would"
        )),
        _ => None,
    }
}

async fn send(
    shared: &Arc<Shared>,
    origin: Option<&Arc<Origin>>,
    asked: &Asked,
    request: Request<Incoming>,
    event: &mut EgressRecord,
) -> Result<Sent, Refused> {
    let Asked { host, port, path, secure } = asked;
    let (method, query) = (request.method().as_str(), request.uri().query());
    let act = Act::Request { method, path, query, secure: *secure };
    let terms = decide_egress(&shared.plan.layers, &EgressAsk { host, port: *port, act })?;
    terms.permit.rule().clone_into(&mut event.rule);
    if request.headers().contains_key(header::UPGRADE) {
        return Err(Refused::new(
            StatusCode::FORBIDDEN,
            "egress.request",
            "no connection changes its protocol here",
        ));
    }
    if query.is_some_and(|query| !query.bytes().all(|b| b.is_ascii_graphic())) {
        return Err(Refused::malformed("the query holds a character that no URL has"));
    }
    let meter = match origin {
        Some(origin) => Arc::clone(&origin.meter),
        None => shared.enter(&terms)?,
    };
    let before = meter.bytes();
    let credential = credential(shared, &terms).await?;
    event.credential.clone_from(&terms.credential);
    let passage = Passage { shared, origin, asked, terms: &terms, meter, before, credential };
    let sent = through(&passage, request).await;
    // What left before it failed has left.
    let (up, down) = passage.meter.bytes();
    (event.bytes_up, event.bytes_down) = (up - before.0, down - before.1);
    sent
}

/// From the package cache where it can be, else from whoever answers for the host.
async fn through(passage: &Passage<'_>, request: Request<Incoming>) -> Result<Sent, Refused> {
    let packages = passage.shared.spec.egress.packages();
    if let Some((cache, key)) = packages.zip(cached::key_of(passage, &request))
        && let Some(sent) = cached::answer(passage, cache, key, &request).await?
    {
        return Ok(sent);
    }
    let request = rewritten(request, passage.asked, passage.credential.as_ref())?;
    let response = passage.exchange(request).await?;
    let secrets = passage.credential.as_ref().map(|credential| credential.secrets.clone());
    let meter = Arc::clone(&passage.meter);
    Ok(Sent::of_host(response, meter, passage.before, secrets.unwrap_or_default()))
}

async fn credential(shared: &Shared, terms: &Terms) -> Result<Option<Injected>, Refused> {
    let Some(name) = &terms.credential else { return Ok(None) };
    let found = shared.spec.credentials.header(name, &terms.permit).await;
    let mut found =
        found.map_err(|why| Refused::failed(terms.permit.rule(), format!("the credential {name}: {why}")))?;
    found.value.set_sensitive(true);
    Ok(Some(found))
}

/// The request as the host gets it: nothing of it is copied but method, path, query, body and end-to-end headers.
fn rewritten(
    request: Request<Incoming>,
    asked: &Asked,
    credential: Option<&Injected>,
) -> Result<Request<RequestBody>, Refused> {
    let (parts, body) = request.into_parts();
    let target = asked.target(parts.uri.query());
    let uri: Uri = target.parse().map_err(|_| Refused::malformed("the path is none"))?;
    let mut headers = kept(&parts.headers, &REQUEST_HEADERS_DROPPED);
    // Last and once: it takes the place of whatever the cell wrote there.
    if let Some(credential) = credential {
        // What a host repeats is found in plain text only.
        headers.remove(header::ACCEPT_ENCODING);
        headers.insert(credential.name.clone(), credential.value.clone());
    }
    let mut rewritten = Request::new(body.boxed_unsync());
    *rewritten.method_mut() = parts.method;
    *rewritten.uri_mut() = uri;
    *rewritten.version_mut() = Version::HTTP_11;
    *rewritten.headers_mut() = headers;
    Ok(rewritten)
}
