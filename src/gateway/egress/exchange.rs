//! One request on its way to whoever answers for a host: over the connection of an inspected tunnel, which is kept, or
//! over one of its own. It must never send a credential in plain text off this machine, nor follow a redirect.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{self, HeaderValue};
use hyper::{Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::sync::Mutex;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::door::{Refused, Shared};
use super::route::{Line, Stream};
use super::wire::{Counted, Meter};
use crate::gateway::credentials::Injected;
use crate::policy::Host;
use crate::policy::egress::{CanonicalPath, Terms};

/// The body of every request to a host.
pub(super) type RequestBody = UnsyncBoxBody<Bytes, hyper::Error>;

/// Where the requests of one inspected connection go.
pub(super) struct Origin {
    pub(super) host: Host,
    pub(super) port: u16,
    line: Line,
    pub(super) meter: Arc<Meter>,
    /// The connection to the host, made with the first request and kept.
    sender: Mutex<Option<SendRequest<RequestBody>>>,
}

impl Origin {
    pub(super) fn new(host: Host, port: u16, line: Line, meter: Arc<Meter>) -> Self {
        Self { host, port, line, meter, sender: Mutex::new(None) }
    }
}

/// A request as it was asked for.
pub(super) struct Asked {
    pub(super) host: Host,
    pub(super) port: u16,
    pub(super) path: CanonicalPath,
    pub(super) secure: bool,
}

impl Asked {
    /// Path and query, in their one spelling.
    pub(super) fn target(&self, query: Option<&str>) -> String {
        match query {
            Some(query) => format!("{}?{query}", self.path.as_str()),
            None => self.path.as_str().to_owned(),
        }
    }

    pub(super) fn authority(&self) -> String {
        self.host.authority(self.port, if self.secure { 443 } else { 80 })
    }
}

/// A request that was allowed, with all that it needs to go on.
pub(super) struct Passage<'a> {
    pub(super) shared: &'a Arc<Shared>,
    /// The tunnel that it came through, if any.
    pub(super) origin: Option<&'a Arc<Origin>>,
    pub(super) asked: &'a Asked,
    pub(super) terms: &'a Terms,
    pub(super) meter: Arc<Meter>,
    /// Bytes of the connection before this request.
    pub(super) before: (u64, u64),
    pub(super) credential: Option<Injected>,
}

impl Passage<'_> {
    fn rule(&self) -> &str {
        self.terms.permit.rule()
    }

    /// Sends a request, whose target is a path of the host, and waits for the head of its answer.
    pub(super) async fn exchange(
        &self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, Refused> {
        let late = |_| Refused {
            status: StatusCode::GATEWAY_TIMEOUT,
            ..Refused::failed(self.rule(), "the host does not answer")
        };
        let wait = self.shared.spec.egress.limits.first_byte_wait;
        let response = timeout(wait, self.send(request)).await.map_err(late).flatten()?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Err(Refused::failed(self.rule(), "the host changes its protocol without being asked"));
        }
        Ok(response)
    }

    async fn send(&self, request: Request<RequestBody>) -> Result<Response<Incoming>, Refused> {
        let broken = |error: hyper::Error| self.broken(&error);
        let Some(origin) = self.origin else {
            let Asked { host, port, secure, .. } = self.asked;
            let found = self.shared.spec.egress.network.line(host, *port, *secure).await;
            let line = found.map_err(|error| Refused::route(self.rule(), &error))?;
            let request = self.aim(request, &line)?;
            return self.connect(&line).await?.send_request(request).await.map_err(broken);
        };
        let request = self.aim(request, &origin.line)?;
        // One request at a time: HTTP/1.1 of the cell's side gives no more.
        let mut kept = origin.sender.lock().await;
        let usable = match kept.as_mut() {
            Some(sender) => sender.ready().await.is_ok(),
            None => false,
        };
        if !usable {
            *kept = Some(self.connect(&origin.line).await?);
        }
        let Some(sender) = kept.as_mut() else { return Err(Refused::failed(self.rule(), "no connection")) };
        sender.send_request(request).await.map_err(broken)
    }

    /// Writes the target and the host of whoever answers into a request.
    fn aim(&self, mut request: Request<RequestBody>, line: &Line) -> Result<Request<RequestBody>, Refused> {
        if self.credential.is_some() && !line.trusted {
            let words = "its mirror in [network.mirrors] speaks no TLS: no credential is sent there";
            return Err(Refused::new(StatusCode::FORBIDDEN, "network.mirrors", words));
        }
        if !line.base.is_empty() {
            let target = format!("{}{}", line.base, request.uri());
            *request.uri_mut() =
                target.parse::<Uri>().map_err(|_| Refused::malformed("the path is too long"))?;
        }
        let authority = line.host.authority(line.port, if line.secure { 443 } else { 80 });
        let host = HeaderValue::try_from(authority).map_err(|_| Refused::malformed("the host is none"))?;
        request.headers_mut().insert(header::HOST, host);
        Ok(request)
    }

    async fn connect(&self, line: &Line) -> Result<SendRequest<RequestBody>, Refused> {
        let dialled = self.shared.spec.egress.network.dial(line).await;
        let stream = dialled.map_err(|error| Refused::route(self.rule(), &error))?;
        let stream = Counted::new(stream, Arc::clone(&self.meter));
        if line.secure {
            self.handshake(self.secured(&line.host, stream).await?).await
        } else {
            self.handshake(stream).await
        }
    }

    async fn secured(
        &self,
        host: &Host,
        stream: Counted<Box<dyn Stream>>,
    ) -> Result<impl Stream + use<>, Refused> {
        let name = match host {
            Host::Name(name) => {
                ServerName::try_from(name.clone()).map_err(|_| Refused::failed(self.rule(), "no TLS name"))?
            }
            Host::Address(address) => ServerName::IpAddress((*address).into()),
        };
        let connector = TlsConnector::from(Arc::clone(&self.shared.spec.egress.tls));
        let failed =
            |error: std::io::Error| Refused::failed(self.rule(), format!("TLS with the host: {error}"));
        connector.connect(name, stream).await.map_err(failed)
    }

    async fn handshake<S: Stream>(&self, stream: S) -> Result<SendRequest<RequestBody>, Refused> {
        let limits = &self.shared.spec.egress.limits;
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(limits.head_bytes_max)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| Refused::failed(self.rule(), error.to_string()))?;
        let revoked = self.shared.revoked.clone();
        self.shared.tasks.spawn(async move {
            tokio::select! {
                ended = connection => if let Err(error) = ended {
                    tracing::debug!(%error, "a connection to a host ended");
                },
                () = revoked.cancelled() => {}
            }
        });
        Ok(sender)
    }

    fn broken(&self, error: &hyper::Error) -> Refused {
        match self.meter.exceeded() {
            Some(key) => Refused::limit(self.rule(), key),
            None => Refused::failed(self.rule(), format!("the exchange with the host broke off: {error}")),
        }
    }
}
