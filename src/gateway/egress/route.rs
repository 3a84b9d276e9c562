//! From a host that the policy allowed to a connection: resolve once, check every address, dial one of those that
//! were checked. Behind a corporate proxy the name is handed to that proxy, and which addresses it may have is for
//! the proxy to say. A host that has a mirror is not looked up at all: the mirror's address is the administrator's word
//! and is not checked. It must never look a name up a second time, nor dial what was neither checked nor named.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tower_service::Service;

use super::address::{own_addresses, refused};
use super::mirror::Mirror;
use super::names::SystemResolver;
use crate::policy::Host;

/// Longest look-up of a name.
const RESOLVE_WAIT: Duration = Duration::from_secs(10);
/// Longest wait for one connection.
const DIAL_WAIT: Duration = Duration::from_secs(10);
/// Most addresses of a name that are tried.
const ADDRESSES_TRIED_MAX: usize = 4;
/// Longest answer of a corporate proxy to CONNECT, in bytes.
const PROXY_HEAD_BYTES_MAX: usize = 8 << 10;

/// What a hand returns later.
pub type Later<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A connection to a host.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

/// Names → addresses.
pub trait Resolve: Send + Sync {
    /// All addresses of a name.
    fn resolve<'a>(&'a self, name: &'a str) -> Later<'a, io::Result<Vec<IpAddr>>>;
}

/// Addresses → connections.
pub trait Dial: Send + Sync {
    /// Connects to exactly this address.
    fn dial(&self, to: SocketAddr) -> Later<'_, io::Result<Box<dyn Stream>>>;
}

/// TCP.
#[derive(Debug, Clone, Copy)]
pub struct TcpDialer;

impl Dial for TcpDialer {
    fn dial(&self, to: SocketAddr) -> Later<'_, io::Result<Box<dyn Stream>>> {
        Box::pin(async move {
            let stream = TcpStream::connect(to).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }
}

/// A proxy that stands between this machine and the internet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorporateProxy {
    /// Its host; not checked, since the administrator named it.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Hosts that are reached without it: names, `.suffix`es, addresses.
    pub except: Vec<String>,
}

impl CorporateProxy {
    fn is_for(&self, host: &str) -> bool {
        let inner = host.trim_start_matches('[').trim_end_matches(']');
        let local = inner.parse::<IpAddr>().is_ok_and(|address| address.is_loopback()) || host == "localhost";
        let excepted = self.except.iter().any(|entry| match entry.strip_prefix('.') {
            Some(bare) => host == bare || host.ends_with(entry.as_str()),
            None => entry == host || entry == inner || entry == "*",
        });
        !local && !excepted
    }
}

/// How hosts are reached from here.
#[derive(Clone)]
pub struct Network {
    /// Names.
    pub resolver: Arc<dyn Resolve>,
    /// Connections.
    pub dialer: Arc<dyn Dial>,
    /// Where there is one, names go to it.
    pub proxy: Option<CorporateProxy>,
    /// What stands in for hosts, by their names.
    pub mirrors: BTreeMap<String, Mirror>,
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Network");
        shown.field("proxy", &self.proxy).field("mirrors", &self.mirrors).finish_non_exhaustive()
    }
}

impl Default for Network {
    fn default() -> Self {
        let resolver = Arc::new(SystemResolver::default());
        Self { resolver, dialer: Arc::new(TcpDialer), proxy: None, mirrors: BTreeMap::new() }
    }
}

/// Why a host cannot be reached. The words name no address: a cell must not learn the inside of a network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// An address that no cell may reach.
    #[error("{host} has {class}, which no cell may reach")]
    Address {
        /// The host.
        host: String,
        /// What kind of address.
        class: &'static str,
    },
    /// No address.
    #[error("{0} cannot be resolved")]
    Unknown(String),
    /// Nobody answers there.
    #[error("{0} does not answer")]
    Silent(String),
    /// The corporate proxy says no.
    #[error("the proxy of [network] does not connect to {host} (it says {status})")]
    Proxy {
        /// The host.
        host: String,
        /// Its status; 0 where it gave none.
        status: u16,
    },
}

/// A way that was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Way {
    /// To one of these addresses.
    Addresses(Vec<SocketAddr>),
    /// Through the corporate proxy, by name.
    Proxy,
}

/// Whoever answers for a host, and the way there: the host itself, or its mirror.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Line {
    way: Way,
    /// Who is dialled.
    pub(super) host: Host,
    /// On which port.
    pub(super) port: u16,
    /// Whether they speak TLS.
    pub(super) secure: bool,
    /// What stands before each path.
    pub(super) base: String,
    /// Whether they may be sent a credential: they speak TLS, or are on this machine.
    pub(super) trusted: bool,
    /// What they are called in words for a cell.
    shown: String,
}

impl Network {
    /// What stands in for a host.
    pub(super) fn mirror(&self, host: &Host) -> Option<&Mirror> {
        // Most machines have none.
        if self.mirrors.is_empty() { None } else { self.mirrors.get(&host.to_string()) }
    }

    /// The one look-up of a host, and the check of everything it gave; of a mirror's, the look-up alone.
    pub(super) async fn line(&self, host: &Host, port: u16, secure: bool) -> Result<Line, RouteError> {
        let Some(mirror) = self.mirror(host) else {
            let (way, shown) = (self.check(host, port).await?, host.to_string());
            let (host, base) = (host.clone(), String::new());
            return Ok(Line { way, host, port, secure, base, trusted: secure, shown });
        };
        let shown = format!("the mirror of {host}");
        let way = if self.goes_by_proxy(&mirror.host) {
            Way::Proxy
        } else {
            Way::Addresses(self.look_up(&mirror.host, mirror.port, &shown).await?.1)
        };
        let Mirror { secure, host, port, base } = mirror.clone();
        Ok(Line { way, host, port, secure, base, trusted: secure || mirror.is_local(), shown })
    }

    fn goes_by_proxy(&self, host: &Host) -> bool {
        self.proxy.as_ref().is_some_and(|proxy| proxy.is_for(&host.to_string()))
    }

    async fn check(&self, host: &Host, port: u16) -> Result<Way, RouteError> {
        let shown = host.to_string();
        if self.goes_by_proxy(host) {
            return match host {
                // An address needs no look-up, so that its check is ours even here.
                Host::Address(address) => judge(&shown, &[*address]).map(|()| Way::Proxy),
                Host::Name(_) => Ok(Way::Proxy),
            };
        }
        let (all, tried) = self.look_up(host, port, &shown).await?;
        judge(&shown, &all)?;
        Ok(Way::Addresses(tried))
    }

    /// All addresses, and those that are tried.
    async fn look_up(
        &self,
        host: &Host,
        port: u16,
        shown: &str,
    ) -> Result<(Vec<IpAddr>, Vec<SocketAddr>), RouteError> {
        let all = match host {
            Host::Address(address) => vec![*address],
            Host::Name(name) => match timeout(RESOLVE_WAIT, self.resolver.resolve(name)).await {
                Ok(Ok(found)) if !found.is_empty() => found,
                Ok(Ok(_) | Err(_)) | Err(_) => return Err(RouteError::Unknown(shown.to_owned())),
            },
        };
        let tried = all.iter().take(ADDRESSES_TRIED_MAX).map(|address| SocketAddr::new(*address, port));
        let tried = tried.collect();
        Ok((all, tried))
    }

    /// Connects to whoever answers.
    pub(super) async fn dial(&self, line: &Line) -> Result<Box<dyn Stream>, RouteError> {
        let silent = || RouteError::Silent(line.shown.clone());
        match (&line.way, &self.proxy) {
            (Way::Addresses(addresses), _) => {
                for address in addresses {
                    if let Ok(Ok(stream)) = timeout(DIAL_WAIT, self.dialer.dial(*address)).await {
                        return Ok(stream);
                    }
                }
                Err(silent())
            }
            (Way::Proxy, Some(proxy)) => {
                let named = line.host.to_string();
                let dialled = timeout(DIAL_WAIT, TcpStream::connect((proxy.host.as_str(), proxy.port))).await;
                let stream = dialled.map_err(|_| silent())?.map_err(|_| silent())?;
                let connected =
                    timeout(DIAL_WAIT, ask_proxy(stream, &named, line.port)).await.map_err(|_| silent())?;
                let refused = |status| RouteError::Proxy { host: line.shown.clone(), status };
                Ok(Box::new(connected.map_err(refused)?))
            }
            (Way::Proxy, None) => Err(silent()),
        }
    }
}

/// Any refused address refuses the name.
fn judge(host: &str, addresses: &[IpAddr]) -> Result<(), RouteError> {
    let refuse = |class| RouteError::Address { host: host.to_owned(), class };
    let own = own_addresses().map_err(|error| {
        tracing::error!(%error, "cannot read this host's addresses: nothing may be dialled");
        refuse("an address that cannot be checked")
    })?;
    match addresses.iter().find_map(|address| refused(*address, &own)) {
        Some(class) => Err(refuse(class)),
        None => Ok(()),
    }
}

/// CONNECT over an open connection to a proxy; the status where that is no success.
async fn ask_proxy(mut stream: TcpStream, host: &str, port: u16) -> Result<TcpStream, u16> {
    let _ = stream.set_nodelay(true);
    let ask = format!("CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n");
    stream.write_all(ask.as_bytes()).await.map_err(|_| 0u16)?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        // Byte by byte: what comes after the head belongs to the host.
        let byte = stream.read_u8().await.map_err(|_| 0u16)?;
        head.push(byte);
        if head.len() > PROXY_HEAD_BYTES_MAX {
            return Err(0);
        }
    }
    let status =
        head.get(9..12).and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok()).unwrap_or(0);
    if head.starts_with(b"HTTP/1.") && (200..300).contains(&status) { Ok(stream) } else { Err(status) }
}

/// TCP to the model's provider: directly, or through the corporate proxy.
#[derive(Debug, Clone)]
pub(in crate::gateway) struct ProviderConnector {
    tcp: HttpConnector,
    proxy: Option<CorporateProxy>,
}

impl ProviderConnector {
    pub(in crate::gateway) fn new(tcp: HttpConnector, proxy: Option<CorporateProxy>) -> Self {
        Self { tcp, proxy }
    }
}

impl Service<Uri> for ProviderConnector {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.tcp.poll_ready(context).map_err(io::Error::other)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let host = uri.host().unwrap_or_default().to_owned();
        let Some(proxy) = self.proxy.clone().filter(|proxy| proxy.is_for(&host)) else {
            let connecting = self.tcp.call(uri);
            return Box::pin(async move { connecting.await.map_err(io::Error::other) });
        };
        let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("http") { 80 } else { 443 });
        Box::pin(async move {
            let connect = async {
                let stream = TcpStream::connect((proxy.host.as_str(), proxy.port)).await?;
                let refused = |status| io::Error::other(format!("the proxy of [network] answers {status}"));
                ask_proxy(stream, &host, port).await.map_err(refused)
            };
            let late = |_| io::Error::from(io::ErrorKind::TimedOut);
            Ok(TokioIo::new(timeout(DIAL_WAIT, connect).await.map_err(late)??))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_and_exceptions_are_reached_without_the_proxy() {
        let except = ["in.example", ".corp.example", "9.9.9.9"].map(str::to_owned).to_vec();
        let proxy = CorporateProxy { host: "p".into(), port: 1, except };
        for host in
            ["127.0.0.1", "[::1]", "localhost", "in.example", "corp.example", "a.corp.example", "9.9.9.9"]
        {
            assert!(!proxy.is_for(host), "{host}");
        }
        for host in ["x.in.example", "example", "9.9.9.8", "notcorp.example"] {
            assert!(proxy.is_for(host), "{host}");
        }
    }
}
