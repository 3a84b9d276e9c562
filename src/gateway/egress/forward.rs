//! One request that is looked into: judged by method, host and path, written anew with the credential that the policy
//! gives it, sent, and its answer passed back as it is. It must never forward what was not judged, never keep a header
//! of the connection, and never show the cell a credential.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Request, Response, StatusCode, Uri, Version};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::EgressRecord;
use super::door::{Body, BrokenOff, Refused, Shared, elapsed_ms, shown};
use super::route::{Stream, Way};
use super::telling::Telling;
use super::wire::{Counted, Meter};
use crate::gateway::censor::Censor;
use crate::gateway::credentials::Injected;
use crate::gateway::secret::Secrets;
use crate::policy::egress::{CanonicalPath, Terms};
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
const ANSWER_HEADERS_DROPPED: [&str; 9] = [
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

/// Where the requests of one inspected connection go.
pub(super) struct Origin {
    host: Host,
    port: u16,
    way: Way,
    meter: Arc<Meter>,
    /// The connection to the host, made with the first request and kept.
    sender: Mutex<Option<SendRequest<Incoming>>>,
}

impl Origin {
    pub(super) fn new(host: Host, port: u16, way: Way, meter: Arc<Meter>) -> Self {
        Self { host, port, way, meter, sender: Mutex::new(None) }
    }
}

/// A request as it was asked for.
struct Asked {
    host: Host,
    port: u16,
    path: CanonicalPath,
    secure: bool,
}

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
        Ok(Asked { host, port, path, secure: false })
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
        Ok(sent) => sent.pass_back(shared, event, began),
        Err(refused) => {
            let response = refused.response();
            event.duration_ms = elapsed_ms(began);
            (event.rule, event.reason, event.allowed) = (refused.rule, Some(refused.reason), refused.allowed);
            shared.record(event).await;
            response
        }
    }
}

/// An answer's head, and what is needed to pass it back.
struct Sent {
    response: Response<Incoming>,
    meter: Arc<Meter>,
    /// Bytes of the connection before this request.
    before: (u64, u64),
    secrets: Secrets,
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
    let rule = event.rule.clone();
    if request.headers().contains_key(header::UPGRADE) {
        return Err(Refused::new(
            StatusCode::FORBIDDEN,
            "egress.request",
            "no connection changes its protocol here",
        ));
    }
    let meter = match origin {
        Some(origin) => Arc::clone(&origin.meter),
        None => shared.enter(&terms)?,
    };
    let before = meter.bytes();
    let credential = credential(shared, &terms).await?;
    event.credential.clone_from(&terms.credential);
    let request = rewritten(request, asked, credential.as_ref())?;
    let limits = &shared.spec.egress.limits;
    let exchange = async {
        match origin {
            Some(origin) => {
                // One request at a time: HTTP/1.1 of the cell's side gives no more.
                let mut kept = origin.sender.lock().await;
                let usable = match kept.as_mut() {
                    Some(sender) => sender.ready().await.is_ok(),
                    None => false,
                };
                if !usable {
                    let stream = dial(shared, &origin.way, host, *port, &meter, &rule).await?;
                    let secured = secure_stream(shared, host, stream, &rule).await?;
                    *kept = Some(handshake(shared, secured, &rule).await?);
                }
                let Some(sender) = kept.as_mut() else { return Err(Refused::failed(&rule, "no connection")) };
                sender.send_request(request).await.map_err(|error| broken(&meter, &rule, &error))
            }
            None => {
                let checked = shared.spec.egress.network.check(host, *port).await;
                let way = checked.map_err(|error| Refused::route(&rule, &error))?;
                let stream = dial(shared, &way, host, *port, &meter, &rule).await?;
                let mut sender = handshake(shared, stream, &rule).await?;
                sender.send_request(request).await.map_err(|error| broken(&meter, &rule, &error))
            }
        }
    };
    let late = |_| Refused {
        status: StatusCode::GATEWAY_TIMEOUT,
        ..Refused::failed(&rule, "the host does not answer")
    };
    let exchanged = timeout(limits.first_byte_wait, exchange).await.map_err(late).flatten();
    // What left before it failed has left.
    let (up, down) = meter.bytes();
    (event.bytes_up, event.bytes_down) = (up - before.0, down - before.1);
    let response = exchanged?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return Err(Refused::failed(&rule, "the host changes its protocol without being asked"));
    }
    let secrets = credential.map(|credential| credential.secrets).unwrap_or_default();
    Ok(Sent { response, meter, before, secrets })
}

fn broken(meter: &Meter, rule: &str, error: &hyper::Error) -> Refused {
    match meter.exceeded() {
        Some(key) => Refused::limit(rule, key),
        None => Refused::failed(rule, format!("the exchange with the host broke off: {error}")),
    }
}

async fn dial(
    shared: &Shared,
    way: &Way,
    host: &Host,
    port: u16,
    meter: &Arc<Meter>,
    rule: &str,
) -> Result<Counted<Box<dyn Stream>>, Refused> {
    let dialled = shared.spec.egress.network.dial(way, host, port).await;
    Ok(Counted::new(dialled.map_err(|error| Refused::route(rule, &error))?, Arc::clone(meter)))
}

async fn secure_stream(
    shared: &Shared,
    host: &Host,
    stream: Counted<Box<dyn Stream>>,
    rule: &str,
) -> Result<impl Stream + use<>, Refused> {
    let name = match host {
        Host::Name(name) => {
            ServerName::try_from(name.clone()).map_err(|_| Refused::failed(rule, "no TLS name"))?
        }
        Host::Address(address) => ServerName::IpAddress((*address).into()),
    };
    let connector = TlsConnector::from(Arc::clone(&shared.spec.egress.tls));
    connector
        .connect(name, stream)
        .await
        .map_err(|error| Refused::failed(rule, format!("TLS with the host: {error}")))
}

async fn handshake<S: Stream>(
    shared: &Shared,
    stream: S,
    rule: &str,
) -> Result<SendRequest<Incoming>, Refused> {
    let limits = &shared.spec.egress.limits;
    let (sender, connection) = http1::Builder::new()
        .max_buf_size(limits.head_bytes_max)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| Refused::failed(rule, error.to_string()))?;
    let revoked = shared.revoked.clone();
    shared.tasks.spawn(async move {
        tokio::select! {
            ended = connection => if let Err(error) = ended {
                tracing::debug!(%error, "a connection to a host ended");
            },
            () = revoked.cancelled() => {}
        }
    });
    Ok(sender)
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
) -> Result<Request<Incoming>, Refused> {
    let (parts, body) = request.into_parts();
    let query = parts.uri.query();
    if query.is_some_and(|query| !query.bytes().all(|b| b.is_ascii_graphic())) {
        return Err(Refused::malformed("the query holds a character that no URL has"));
    }
    let target = match query {
        Some(query) => format!("{}?{query}", asked.path.as_str()),
        None => asked.path.as_str().to_owned(),
    };
    let uri: Uri = target.parse().map_err(|_| Refused::malformed("the path is none"))?;
    let mut headers = kept(&parts.headers, &REQUEST_HEADERS_DROPPED);
    let authority = asked.host.authority(asked.port, if asked.secure { 443 } else { 80 });
    let host = HeaderValue::try_from(authority).map_err(|_| Refused::malformed("the host is none"))?;
    headers.insert(header::HOST, host);
    // Last and once: it takes the place of whatever the cell wrote there.
    if let Some(credential) = credential {
        // What a host repeats is found in plain text only.
        headers.remove(header::ACCEPT_ENCODING);
        headers.insert(credential.name.clone(), credential.value.clone());
    }
    let mut rewritten = Request::new(body);
    *rewritten.method_mut() = parts.method;
    *rewritten.uri_mut() = uri;
    *rewritten.version_mut() = Version::HTTP_11;
    *rewritten.headers_mut() = headers;
    Ok(rewritten)
}

/// All headers but those of the list and those that `Connection` names.
fn kept(headers: &HeaderMap, dropped: &[&str]) -> HeaderMap {
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

impl Sent {
    /// The answer as the cell gets it; its event comes with its end.
    fn pass_back(self, shared: &Arc<Shared>, event: EgressRecord, began: Instant) -> Response<Body> {
        let (head, body) = self.response.into_parts();
        let mut headers = kept(&head.headers, &ANSWER_HEADERS_DROPPED);
        let leaking: Vec<HeaderName> = headers
            .iter()
            .filter(|(_, value)| self.secrets.are_in(value.as_bytes()))
            .map(|(name, _)| name.clone())
            .collect();
        for name in leaking {
            headers.remove(name);
        }
        let (pieces, receiver) = mpsc::channel(4);
        let complete = Arc::new(AtomicBool::new(false));
        let pump = Pump { pieces, complete: Arc::clone(&complete), censor: Censor::new(self.secrets) };
        let (task_shared, meter, before) = (Arc::clone(shared), self.meter, self.before);
        shared.tasks.spawn(async move {
            let mut telling = Telling::new(event, before, began);
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
        *response.status_mut() = head.status;
        *response.headers_mut() = headers;
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
}

impl Pump {
    /// Why it ended early; `None` where it did not.
    async fn run(mut self, mut body: Incoming, shared: &Shared) -> Option<String> {
        let limits = &shared.spec.egress.limits;
        let deadline = tokio::time::sleep(limits.total);
        tokio::pin!(deadline);
        loop {
            let frame = tokio::select! {
                frame = timeout(limits.idle, body.frame()) => frame,
                () = &mut deadline => return Some("the answer lasted too long".to_owned()),
                () = self.pieces.closed() => return Some("the cell left".to_owned()),
            };
            let data = match frame {
                Err(_) => return Some("the host fell silent".to_owned()),
                Ok(Some(Err(error))) => return Some(format!("the host broke off: {error}")),
                Ok(None) => {
                    let rest = self.censor.rest();
                    if !rest.is_empty() && self.pieces.send(rest).await.is_err() {
                        return Some("the cell left".to_owned());
                    }
                    self.complete.store(true, Ordering::Release);
                    return None;
                }
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => data,
                    Err(_) => continue,
                },
            };
            let data = self.censor.pass(data);
            if data.is_empty() {
                continue;
            }
            let sent = timeout(limits.idle, self.pieces.send(data));
            match sent.await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Some("the cell left".to_owned()),
                Err(_) => return Some("the cell does not read".to_owned()),
            }
        }
    }
}
