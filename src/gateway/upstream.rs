//! The way to the provider: pooled connections, TLS with the machine's certificate authorities, no redirects.
//! A credential must never go over plain HTTP but to a loopback address.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::{HeaderMap, Method, Request, Response, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::{Client, Error, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioTimer};

use super::egress::route::ProviderConnector;
use super::{GatewayError, Reach};

use crate::failpoint;

/// Longest wait for a TCP connection.
const CONNECT_WAIT: Duration = Duration::from_secs(10);
/// An idle connection is kept this long: shorter than providers do, so that we close first.
const POOL_IDLE: Duration = Duration::from_secs(50);
/// A connection's buffer. It grows to this with answers that come in large pieces, and stays while it is open.
const BUFFER_BYTES_MAX: usize = 32 << 10;

#[derive(Debug)]
pub(super) struct Upstream {
    client: Client<HttpsConnector<ProviderConnector>, Full<Bytes>>,
    base_url: String,
}

impl Upstream {
    pub(super) fn new(provider: &str, base_url: &str, reach: &Reach) -> Result<Self, GatewayError> {
        let bad =
            |why| GatewayError::BaseUrl { provider: provider.to_owned(), url: base_url.to_owned(), why };
        let base: Uri = base_url.parse().map_err(|_| bad("is no URL"))?;
        let host = base.host().unwrap_or_default();
        if base.authority().is_none_or(|authority| authority.as_str().contains('@')) {
            return Err(bad("must name a host, without a user"));
        }
        if base.query().is_some() {
            return Err(bad("must not have a query"));
        }
        let secure = match base.scheme_str() {
            Some("https") => true,
            Some("http") if is_loopback(host) => false,
            Some("http") => {
                return Err(bad("must be https: a credential goes over plain http to loopback only"));
            }
            _ => return Err(bad("must begin with https://")),
        };
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_connect_timeout(Some(CONNECT_WAIT));
        let tls =
            rustls::ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
                .with_safe_default_protocol_versions()
                .map_err(|_| bad("cannot be used: no TLS version in common"))?;
        let roots = if secure { reach.roots()? } else { rustls::RootCertStore::empty() };
        let tls = tls.with_root_certificates(roots);
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls.with_no_client_auth())
            .https_or_http()
            .enable_http1()
            .wrap_connector(ProviderConnector::new(http, reach.proxy.clone()));
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(POOL_IDLE)
            .http1_max_buf_size(BUFFER_BYTES_MAX)
            .build(connector);
        Ok(Self { client, base_url: base_url.trim_end_matches('/').to_owned() })
    }

    /// The URI of a path and query below the base URL.
    pub(super) fn uri(&self, path: &str) -> Option<Uri> {
        format!("{}{path}", self.base_url).parse().ok()
    }

    /// Sends a POST; returns at the answer's head. Never follows a redirect.
    pub(super) async fn send(
        &self,
        uri: Uri,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Response<Incoming>, Error> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri;
        *request.headers_mut() = headers;
        failpoint::pass("gateway: before a request");
        let answer = self.client.request(request).await;
        failpoint::pass("gateway: after a request");
        answer
    }
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || address.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credential_goes_over_plain_http_to_loopback_only() {
        for good in ["http://127.0.0.1:1", "http://localhost/p/", "http://[::1]:9", "https://api.example.com"]
        {
            assert!(Upstream::new("p", good, &Reach::default()).is_ok(), "{good}");
        }
        for bad in [
            "http://example.com",
            "http://127.0.0.1.example.com",
            "ftp://a",
            "/x",
            "",
            "https://u:p@h",
            "https://h?a=b",
        ] {
            assert!(
                matches!(Upstream::new("p", bad, &Reach::default()), Err(GatewayError::BaseUrl { .. })),
                "{bad}"
            );
        }
        let upstream = Upstream::new("p", "https://h/prefix/", &Reach::default()).unwrap();
        let uri = upstream.uri("/v1/messages?beta=true").unwrap();
        assert_eq!(uri.to_string(), "https://h/prefix/v1/messages?beta=true");
    }
}
