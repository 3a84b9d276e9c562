//! The socket of one cell's way out: accepts, reads the head of what comes, and decides whether anything is dialled
//! for it. It must never answer CONNECT with 200 before the policy has allowed the host and its addresses were
//! checked; once revoked it keeps no connection.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::route::{Line, RouteError};
use super::wire::{Account, Meter};
use super::{EgressRecord, EgressSpec, forward, tunnel};
use crate::job::CellId;
use crate::policy::egress::Terms;
use crate::policy::{Act, Denial, EgressAsk, Host, Plan, decide_egress};

/// Events that wait to be read; of more, refusals are dropped and the rest waits.
const EVENTS_MAX: usize = 256;
/// How long connections may take to end once they were told to.
const CLOSE_WAIT: Duration = Duration::from_secs(10);
/// Longest text of the cell's own that goes into an event.
const SHOWN_CHARS_MAX: usize = 253;

/// The body of every answer to a cell.
pub(super) type Body = UnsyncBoxBody<Bytes, BrokenOff>;

/// An answer that ended before its end; the cell sees its connection break.
#[derive(Debug, thiserror::Error)]
#[error("the answer broke off")]
pub(super) struct BrokenOff;

/// The open way out of one cell. It ends with [`Door::destroy`].
#[derive(Debug)]
pub(in crate::gateway) struct Door {
    shared: Arc<Shared>,
    acceptor: JoinHandle<()>,
    events: mpsc::Receiver<EgressRecord>,
}

/// What the connections of a cell share.
pub(super) struct Shared {
    pub(super) spec: EgressSpec,
    pub(super) plan: Arc<Plan>,
    pub(super) cell: CellId,
    pub(super) revoked: CancellationToken,
    pub(super) tasks: TaskTracker,
    accounts: Mutex<HashMap<String, Arc<Account>>>,
    events: mpsc::Sender<EgressRecord>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("cell", &self.cell).finish_non_exhaustive()
    }
}

impl Door {
    pub(in crate::gateway) fn open(
        listener: UnixListener,
        spec: EgressSpec,
        plan: Arc<Plan>,
        cell: CellId,
    ) -> Self {
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let (revoked, tasks, accounts) = (CancellationToken::new(), TaskTracker::new(), Mutex::default());
        let shared = Arc::new(Shared { spec, plan, cell, revoked, tasks, accounts, events: sender });
        let acceptor = tokio::spawn(accept(Arc::clone(&shared), listener));
        Self { shared, acceptor, events }
    }

    #[cfg(test)]
    pub(super) fn plan(&self) -> Arc<Plan> {
        Arc::clone(&self.shared.plan)
    }

    /// The next event. Cancel-safe.
    pub(in crate::gateway) async fn next_event(&mut self) -> EgressRecord {
        match self.events.recv().await {
            Some(event) => event,
            // Not while `shared` lives, which holds a sender.
            None => std::future::pending().await,
        }
    }

    /// Closes all connections, at once.
    pub(in crate::gateway) fn revoke(&self) {
        self.shared.revoked.cancel();
    }

    /// Revokes, waits for the connections to end, and gives the events that nobody read yet.
    pub(in crate::gateway) async fn destroy(mut self) -> Vec<EgressRecord> {
        self.revoke();
        if let Err(error) = (&mut self.acceptor).await {
            tracing::error!(%error, cell = %self.shared.cell, "the egress socket's task ended badly");
        }
        self.shared.tasks.close();
        if tokio::time::timeout(CLOSE_WAIT, self.shared.tasks.wait()).await.is_err() {
            tracing::error!(cell = %self.shared.cell, open = self.shared.tasks.len(), "connections do not end");
        } else {
            self.shared.settle().await;
        }
        std::iter::from_fn(|| self.events.try_recv().ok()).collect()
    }
}

impl Shared {
    /// Hands an event over. A cell that floods us with requests that are refused at once loses some of their events;
    /// one that floods us with others waits.
    pub(super) async fn record(&self, event: EgressRecord) {
        if !event.allowed && (event.bytes_up, event.bytes_down) == (0, 0) {
            if self.events.capacity() >= EVENTS_MAX / 2 {
                let _ = self.events.try_send(event);
            }
            return;
        }
        tokio::select! {
            biased;
            place = self.events.reserve() => if let Ok(place) = place { place.send(event) },
            () = self.revoked.cancelled() => {
                tracing::warn!(cell = %self.cell, "an egress event is dropped: nobody reads them");
            }
        }
    }

    pub(super) fn account(&self, terms: &Terms) -> Arc<Account> {
        let mut accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        let made = || Arc::new(Account::new(&terms.account, &self.spec.tally));
        Arc::clone(accounts.entry(terms.account.clone()).or_insert_with(made))
    }

    /// Notes the exact sums, once no connection is left.
    async fn settle(self: &Arc<Self>) {
        let shared = Arc::clone(self);
        let settled = tokio::task::spawn_blocking(move || {
            let accounts = shared.accounts.lock().unwrap_or_else(PoisonError::into_inner);
            let sums = accounts.iter().map(|(name, account)| (name.clone(), account.used()));
            shared.spec.tally.settle(sums)
        });
        // What is noted stays, which is a little more.
        if let Ok(Err(error)) = settled.await {
            tracing::warn!(%error, cell = %self.cell, "cannot note what was used of the way out");
        }
    }

    /// A place under the rule's limits.
    pub(super) fn enter(&self, terms: &Terms) -> Result<Arc<Meter>, Refused> {
        let place =
            self.account(terms).enter(terms).map_err(|key| Refused::limit(terms.permit.rule(), key))?;
        Ok(Meter::new(place, terms))
    }
}

/// Why something does not go on, and what the cell is told.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) status: StatusCode,
    pub(super) rule: String,
    pub(super) reason: String,
    /// The policy allowed it; it failed.
    pub(super) allowed: bool,
}

impl Refused {
    pub(super) fn new(status: StatusCode, rule: &str, reason: impl Into<String>) -> Self {
        Self { status, rule: rule.to_owned(), reason: reason.into(), allowed: false }
    }

    pub(super) fn malformed(reason: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "egress.request", reason)
    }

    pub(super) fn limit(rule: &str, key: &str) -> Self {
        let status =
            if key == "connections_max" { StatusCode::TOO_MANY_REQUESTS } else { StatusCode::FORBIDDEN };
        Self::new(status, &format!("{rule}.{key}"), format!("{key} is reached (rule {rule})"))
    }

    pub(super) fn failed(rule: &str, reason: impl Into<String>) -> Self {
        Self { allowed: true, ..Self::new(StatusCode::BAD_GATEWAY, rule, reason) }
    }

    pub(super) fn route(rule: &str, error: &RouteError) -> Self {
        match error {
            RouteError::Address { .. } => {
                Self::new(StatusCode::FORBIDDEN, "egress.addresses", error.to_string())
            }
            RouteError::Unknown(_) | RouteError::Silent(_) | RouteError::Proxy { .. } => {
                Self::failed(rule, error.to_string())
            }
        }
    }

    pub(super) fn response(&self) -> Response<Body> {
        let mut response = Response::new(whole(format!("hotcell: {}\n", self.reason).into()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        // Whatever else stands in this connection is not read.
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        // What the CLI's own tools look for to tell a refusal from a server's answer.
        if self.status == StatusCode::FORBIDDEN {
            let name = HeaderName::from_static("x-proxy-error");
            headers.insert(name, HeaderValue::from_static("blocked-by-allowlist"));
        }
        // Clients show the head of a refused CONNECT, not its body.
        if let Ok(reason) = HeaderValue::from_str(&self.reason) {
            headers.insert(HeaderName::from_static("x-hotcell-reason"), reason);
        }
        response
    }
}

impl From<Denial> for Refused {
    fn from(denial: Denial) -> Self {
        Self::new(StatusCode::FORBIDDEN, &denial.rule, denial.reason)
    }
}

pub(super) fn whole(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

/// Text of a cell's own, as it may stand in an event.
pub(super) fn shown(text: &str) -> String {
    let clean = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().take(SHOWN_CHARS_MAX).map(clean).collect()
}

pub(super) fn elapsed_ms(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX)
}

async fn accept(shared: Arc<Shared>, listener: UnixListener) {
    let mut connections = JoinSet::new();
    let most = shared.spec.egress.limits.connections_max;
    loop {
        // Tunnels are counted with the connections they came from.
        let full = connections.len() + shared.tasks.len() >= most;
        tokio::select! {
            () = shared.revoked.cancelled() => break,
            Some(_) = connections.join_next() => {}
            // A tunnel that ends wakes nobody here.
            () = tokio::time::sleep(Duration::from_millis(50)), if full => {}
            accepted = listener.accept(), if !full => match accepted {
                Ok((stream, _)) => { connections.spawn(connection(Arc::clone(&shared), stream)); }
                Err(error) => {
                    tracing::warn!(%error, cell = %shared.cell, "cannot accept an egress connection");
                    // Out of descriptors, most likely: give others the time to close some.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
        }
    }
    connections.shutdown().await;
}

async fn connection(shared: Arc<Shared>, stream: UnixStream) {
    let limits = &shared.spec.egress.limits;
    let service = service_fn(|request| {
        let shared = Arc::clone(&shared);
        async move {
            let answer = match *request.method() {
                Method::CONNECT => connect(&shared, request).await,
                _ => forward::plain(&shared, request).await,
            };
            Ok::<_, Infallible>(answer)
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_wait)
        .max_buf_size(limits.head_bytes_max)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    if let Err(error) = served.await {
        tracing::debug!(%error, cell = %shared.cell, "an egress connection ended");
    }
}

/// A connection through which TLS is to go, as far as it is decided.
pub(super) struct Admitted {
    pub(super) host: Host,
    pub(super) port: u16,
    pub(super) terms: Terms,
    pub(super) line: Line,
    pub(super) meter: Arc<Meter>,
    pub(super) began: Instant,
}

async fn connect(shared: &Arc<Shared>, request: Request<Incoming>) -> Response<Body> {
    let began = Instant::now();
    let asked = request.uri().authority().map(|authority| authority.as_str().to_owned()).unwrap_or_default();
    let parsed = target(&asked, &request);
    let (host, port) = match &parsed {
        Ok((host, port)) => (host.to_string(), *port),
        Err(_) => (shown(&asked), 0),
    };
    let opened = match parsed {
        Ok((host, port)) => open(shared, host, port, request, began).await,
        Err(refused) => Err(refused),
    };
    match opened {
        Ok(()) => Response::new(whole(Bytes::new())),
        Err(refused) => {
            let duration_ms = elapsed_ms(began);
            let response = refused.response();
            let Refused { rule, reason, allowed, .. } = refused;
            let reason = Some(reason);
            let event =
                EgressRecord { host, port, allowed, rule, reason, duration_ms, ..EgressRecord::default() };
            shared.record(event).await;
            response
        }
    }
}

/// The one host and port of a CONNECT.
fn target(asked: &str, request: &Request<Incoming>) -> Result<(Host, u16), Refused> {
    let with_body = [header::CONTENT_LENGTH, header::TRANSFER_ENCODING];
    if with_body.iter().any(|name| request.headers().contains_key(name)) {
        return Err(Refused::malformed("a CONNECT has no body"));
    }
    let target = Host::parse_with_port(asked)
        .map_err(|error| Refused::malformed(format!("the target of CONNECT {error}: expected host:port")))?;
    let mut named = request.headers().get_all(header::HOST).iter();
    if let Some(host) = named.next() {
        let same = host.to_str().ok().is_some_and(|text| {
            Host::parse_with_port(text).is_ok_and(|host| host == target)
                || Host::parse(text).is_ok_and(|host| host == target.0)
        });
        if !same || named.next().is_some() {
            return Err(Refused::malformed("the Host header names another host than CONNECT"));
        }
    }
    Ok(target)
}

async fn open(
    shared: &Arc<Shared>,
    host: Host,
    port: u16,
    mut request: Request<Incoming>,
    began: Instant,
) -> Result<(), Refused> {
    let terms = decide_egress(&shared.plan.layers, &EgressAsk { host: &host, port, act: Act::Connect })?;
    let meter = shared.enter(&terms)?;
    let egress = &shared.spec.egress;
    let rule = terms.permit.rule().to_owned();
    let inspect = terms.inspect;
    if !inspect && egress.network.mirror(&host).is_some() {
        let words = format!(
            "{host} has a mirror in [network.mirrors], to which TLS cannot be passed through: the rule {rule} needs \
             inspect = true"
        );
        return Err(Refused::new(StatusCode::FORBIDDEN, "network.mirrors", words));
    }
    let line = egress.network.line(&host, port, true).await.map_err(|error| Refused::route(&rule, &error))?;
    let admitted = Admitted { host, port, terms, line, meter, began };
    if inspect {
        let tls = match &shared.spec.ca {
            Some(ca) => {
                ca.server(&admitted.host).map_err(|error| Refused::failed(&rule, error.to_string()))?
            }
            None => return Err(Refused::failed(&rule, "this cell has no certificate authority")),
        };
        let upgrade = hyper::upgrade::on(&mut request);
        shared.tasks.spawn(tunnel::inspect(Arc::clone(shared), upgrade, admitted, tls));
    } else {
        let dialled = egress.network.dial(&admitted.line).await;
        let stream = dialled.map_err(|error| Refused::route(&rule, &error))?;
        let upgrade = hyper::upgrade::on(&mut request);
        shared.tasks.spawn(tunnel::pass(Arc::clone(shared), upgrade, admitted, stream));
    }
    Ok(())
}
