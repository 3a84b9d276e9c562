//! One POST to where the operator's configuration says: a webhook. As to a provider: TLS, or plain http to loopback only,
//! through the corporate proxy where there is one, and never after a redirect.

use std::time::Duration;

use bytes::Bytes;
use hyper::{HeaderMap, Uri};

use super::upstream::Upstream;
use super::{GatewayError, Reach};

/// A place that takes POSTs.
#[derive(Debug)]
pub struct Poster {
    upstream: Upstream,
    path: String,
}

impl Poster {
    /// For this URL.
    ///
    /// # Errors
    /// [`GatewayError::BaseUrl`]: it is none that may be used.
    pub fn new(name: &str, url: &str, reach: &Reach) -> Result<Self, GatewayError> {
        let bad = |why| GatewayError::BaseUrl { provider: name.to_owned(), url: url.to_owned(), why };
        let uri: Uri = url.parse().map_err(|_| bad("is no URL"))?;
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Err(bad("must begin with https:// and name a host"));
        };
        let upstream = Upstream::new(name, &format!("{scheme}://{authority}"), reach)?;
        let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        Ok(Self { upstream, path })
    }

    /// Sends; the status of the answer, whose body nobody reads. `wait` bounds all of it.
    ///
    /// # Errors
    /// Why there was no answer, in words.
    pub async fn post(&self, headers: HeaderMap, body: Bytes, wait: Duration) -> Result<u16, String> {
        let uri = self.upstream.uri(&self.path).ok_or_else(|| "the URL is none".to_owned())?;
        match tokio::time::timeout(wait, self.upstream.send(uri, headers, body)).await {
            Ok(Ok(answer)) => Ok(answer.status().as_u16()),
            Ok(Err(error)) => {
                let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
                Err(format!("{error}{}", cause.unwrap_or_default()))
            }
            Err(_) => Err(format!("no answer within {} s", wait.as_secs())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_webhook_goes_over_tls_or_to_loopback() {
        let made = |url: &str| Poster::new("hook", url, &Reach::default());
        assert_eq!(made("https://hooks.example.com/a/b?c=d").unwrap().path, "/a/b?c=d");
        assert_eq!(made("http://127.0.0.1:9").unwrap().path, "/");
        for bad in
            ["http://hooks.example.com/a", "/a", "nonsense", "https://u:p@example.com/", "ftp://127.0.0.1/"]
        {
            assert!(matches!(made(bad), Err(GatewayError::BaseUrl { .. })), "{bad}");
        }
    }
}
