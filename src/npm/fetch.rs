//! The requests: a version's manifest, and its archive with the digest checked while it streams to a file.
//!
//! Never follows a redirect to a plain connection, never waits without a limit, never leaves a file behind on error.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::header::{ACCEPT, HeaderValue, LOCATION, USER_AGENT};
use hyper::{Request, Response, StatusCode, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use serde_json::value::RawValue;
use sha2::{Digest, Sha512};
use tokio::io::AsyncWriteExt;

use super::registry::{Registry, safe_scheme};
use super::{NpmError, OnBytes};

/// One version's manifest is some kilobytes; the list of all versions of a busy package some megabytes.
const MANIFEST_BYTES_MAX: usize = 4 << 20;
const PACKUMENT_BYTES_MAX: usize = 64 << 20;
const REDIRECTS_MAX: usize = 3;
const CONNECT_DEADLINE: Duration = Duration::from_secs(15);
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);
/// Longest silence within a body.
const SILENCE_DEADLINE: Duration = Duration::from_secs(30);
const BODY_DEADLINE: Duration = Duration::from_secs(30 * 60);
const ATTEMPTS: u32 = 3;

type Body = Empty<Bytes>;

enum Http {
    Direct(Client<HttpsConnector<HttpConnector>, Body>),
    Proxied(Client<HttpsConnector<Tunnel<HttpConnector>>, Body>),
}

/// A client of one registry. Cheap to make; holds no connection open for longer than it is used.
pub struct Npm {
    http: Http,
    registry: Registry,
}

impl std::fmt::Debug for Npm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Npm").field("registry", &self.registry).finish()
    }
}

/// One version of a package, as the registry describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// Package name, with its scope.
    pub package: String,
    /// The exact version (a tag such as `latest` is resolved).
    pub version: String,
    /// Address of the archive.
    pub tarball: String,
    /// `sha512-<base64>`.
    pub integrity: String,
    /// Bytes after unpacking, where the registry says so.
    pub unpacked_bytes: Option<u64>,
}

/// A verified archive. The file goes when this value does.
#[derive(Debug)]
pub struct Downloaded {
    /// The archive (`.tgz`).
    pub file: tempfile::NamedTempFile,
    /// Its size.
    pub bytes: u64,
}

impl Npm {
    /// A client of the registry this machine is set up for; see [`Registry::from_environment`].
    /// Trusts the system's certificates (`SSL_CERT_FILE` is honoured).
    pub fn from_environment() -> Result<Self, NpmError> {
        Self::new(Registry::from_environment()?)
    }

    /// A client of `registry`.
    pub fn new(registry: Registry) -> Result<Self, NpmError> {
        let mut plain = HttpConnector::new();
        plain.enforce_http(false);
        plain.set_connect_timeout(Some(CONNECT_DEADLINE));
        let tls = HttpsConnectorBuilder::new()
            .with_provider_and_native_roots(rustls::crypto::ring::default_provider())
            .map_err(|error| NpmError::Certificates(error.to_string()))?
            .https_or_http()
            .enable_http1();
        let builder = Client::builder(TokioExecutor::new());
        let http = match registry.proxy() {
            None => Http::Direct(builder.build(tls.wrap_connector(plain))),
            Some(proxy) => {
                let mut tunnel = Tunnel::new(proxy.uri.clone(), plain);
                if let Some(userinfo) = &proxy.userinfo {
                    let value = format!("Basic {}", BASE64.encode(userinfo));
                    let value = HeaderValue::from_str(&value).map_err(|_| NpmError::Registry {
                        origin: "HTTPS_PROXY".to_owned(),
                        why: "its user or password cannot be sent",
                    })?;
                    tunnel = tunnel.with_auth(value);
                }
                Http::Proxied(builder.build(tls.wrap_connector(tunnel)))
            }
        };
        Ok(Self { http, registry })
    }

    /// Finds `package` at `version`, an exact version or a tag (`latest`).
    pub async fn resolve(&self, package: &str, version: &str) -> Result<Resolved, NpmError> {
        let not_found = || NpmError::NotFound { package: package.to_owned(), version: version.to_owned() };
        if !plausible(package, "@/._-") || !plausible(version, ".-+") {
            return Err(not_found());
        }
        let what = format!("{package}@{version}");
        let name = package.replace('/', "%2f");
        let one = self.registry.url(&format!("{name}/{version}"));
        // Registries of companies often know only the list of all versions.
        let manifest = match self.get_text(&one, &what, "application/json", MANIFEST_BYTES_MAX).await? {
            Some(text) => text,
            None => {
                let list = self.registry.url(&name);
                let accept = "application/vnd.npm.install-v1+json, application/json;q=0.8";
                let text = self.get_text(&list, &what, accept, PACKUMENT_BYTES_MAX).await?;
                let text = text.ok_or_else(not_found)?;
                pick_version(&text, version, &what)?.ok_or_else(not_found)?
            }
        };
        read_manifest(&manifest, package, &what)
    }

    /// Downloads what [`Npm::resolve`] found into a file in `dir`, at most `bytes_max` bytes, and checks its digest.
    pub async fn download(
        &self,
        resolved: &Resolved,
        bytes_max: u64,
        dir: &Path,
        on_bytes: OnBytes<'_>,
    ) -> Result<Downloaded, NpmError> {
        let what = format!("{}@{}", resolved.package, resolved.version);
        let mut attempt = 1;
        loop {
            match self.download_once(resolved, &what, bytes_max, dir, on_bytes).await {
                Err(NpmError::Offline { why, .. }) if attempt < ATTEMPTS => {
                    tracing::warn!(%what, attempt, %why, "download broke off; trying again");
                    tokio::time::sleep(Duration::from_secs(u64::from(attempt))).await;
                    attempt += 1;
                }
                result => return result,
            }
        }
    }

    async fn download_once(
        &self,
        resolved: &Resolved,
        what: &str,
        bytes_max: u64,
        dir: &Path,
        on_bytes: OnBytes<'_>,
    ) -> Result<Downloaded, NpmError> {
        let response = self.get(&resolved.tarball, what, "*/*").await?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => {
                let (package, version) = (resolved.package.clone(), resolved.version.clone());
                return Err(NpmError::NotFound { package, version });
            }
            status => return Err(NpmError::Refused { status: status.as_u16(), what: what.to_owned() }),
        }
        let announced = content_length(&response);
        let too_large = || NpmError::TooLarge { what: what.to_owned(), bytes_max };
        if announced.is_some_and(|bytes| bytes > bytes_max) {
            return Err(too_large());
        }
        let file = tempfile::Builder::new().prefix(".download-").suffix(".tgz").tempfile_in(dir);
        let file = file.map_err(NpmError::io("create the download file"))?;
        let writer = file.reopen().map_err(NpmError::io("open the download file"))?;
        let mut writer = tokio::fs::File::from_std(writer);
        let mut digest = Sha512::new();
        let mut bytes = 0_u64;
        let mut body = response.into_body();
        let until = tokio::time::Instant::now() + BODY_DEADLINE;
        while let Some(chunk) = self.next_chunk(&mut body, until).await? {
            bytes += chunk.len() as u64;
            if bytes > bytes_max {
                return Err(too_large());
            }
            digest.update(&chunk);
            writer.write_all(&chunk).await.map_err(NpmError::io("write the download file"))?;
            on_bytes(bytes, announced);
        }
        writer.flush().await.map_err(NpmError::io("write the download file"))?;
        let actual = format!("sha512-{}", BASE64.encode(digest.finalize()));
        if actual != resolved.integrity {
            return Err(NpmError::Integrity {
                package: resolved.package.clone(),
                version: resolved.version.clone(),
                expected: resolved.integrity.clone(),
                actual,
            });
        }
        Ok(Downloaded { file, bytes })
    }

    /// `None` where the registry does not know the address.
    async fn get_text(
        &self,
        url: &str,
        what: &str,
        accept: &'static str,
        bytes_max: usize,
    ) -> Result<Option<String>, NpmError> {
        let mut attempt = 1;
        loop {
            match self.get_text_once(url, what, accept, bytes_max).await {
                Err(NpmError::Offline { .. }) if attempt < ATTEMPTS => {
                    tokio::time::sleep(Duration::from_secs(u64::from(attempt))).await;
                    attempt += 1;
                }
                result => return result,
            }
        }
    }

    async fn get_text_once(
        &self,
        url: &str,
        what: &str,
        accept: &'static str,
        bytes_max: usize,
    ) -> Result<Option<String>, NpmError> {
        let response = self.get(url, what, accept).await?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => return Ok(None),
            status => return Err(NpmError::Refused { status: status.as_u16(), what: what.to_owned() }),
        }
        let mut text = Vec::new();
        let mut body = response.into_body();
        let until = tokio::time::Instant::now() + ANSWER_DEADLINE * 2;
        while let Some(chunk) = self.next_chunk(&mut body, until).await? {
            if text.len() + chunk.len() > bytes_max {
                return Err(NpmError::TooLarge {
                    what: format!("the description of {what}"),
                    bytes_max: bytes_max as u64,
                });
            }
            text.extend_from_slice(&chunk);
        }
        String::from_utf8(text).map(Some).map_err(|_| bad(what, "it is not UTF-8"))
    }

    async fn next_chunk(
        &self,
        body: &mut Incoming,
        until: tokio::time::Instant,
    ) -> Result<Option<Bytes>, NpmError> {
        let silence = until.min(tokio::time::Instant::now() + SILENCE_DEADLINE);
        loop {
            let frame = tokio::time::timeout_at(silence, body.frame()).await;
            let frame = frame.map_err(|_| self.offline("no data in time".to_owned()))?;
            match frame {
                None => return Ok(None),
                Some(Err(error)) => return Err(self.offline(chain(&error))),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    /// One GET with up to [`REDIRECTS_MAX`] redirects, each to a safe scheme.
    async fn get(&self, url: &str, what: &str, accept: &'static str) -> Result<Response<Incoming>, NpmError> {
        let mut uri: Uri = url.parse().map_err(|_| bad(what, "its address cannot be read"))?;
        for _ in 0..=REDIRECTS_MAX {
            safe_scheme(&uri).map_err(|why| NpmError::Redirect { what: what.to_owned(), why })?;
            if uri.scheme_str() == Some("http") && !self.registry.is_plain() {
                return Err(NpmError::Redirect { what: what.to_owned(), why: "it is plain http" });
            }
            let request = Request::get(uri.clone())
                .header(ACCEPT, accept)
                .header(USER_AGENT, concat!("hotcell/", env!("CARGO_PKG_VERSION")))
                .body(Empty::new())
                .map_err(|_| bad(what, "its address cannot be asked"))?;
            let answer = async {
                match &self.http {
                    Http::Direct(client) => client.request(request).await,
                    Http::Proxied(client) => client.request(request).await,
                }
            };
            let response = tokio::time::timeout(ANSWER_DEADLINE, answer)
                .await
                .map_err(|_| self.offline("no answer in time".to_owned()))?
                .map_err(|error| self.offline(chain(&error)))?;
            if response.status().is_server_error() {
                return Err(self.offline(format!("it answered {}", response.status())));
            }
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            uri = location
                .and_then(|location| next_address(&uri, location))
                .ok_or(NpmError::Redirect { what: what.to_owned(), why: "an address we cannot read" })?;
        }
        Err(NpmError::Redirect { what: what.to_owned(), why: "yet another address, more than three times" })
    }

    fn offline(&self, why: String) -> NpmError {
        NpmError::Offline { host: self.registry.host().to_owned(), why }
    }
}

/// Absolute, or absolute path on the same host.
fn next_address(from: &Uri, location: &str) -> Option<Uri> {
    if location.starts_with('/') && !location.starts_with("//") {
        return format!("{}://{}{location}", from.scheme_str()?, from.authority()?).parse().ok();
    }
    location.parse().ok()
}

fn plausible(name: &str, also: &str) -> bool {
    !name.is_empty()
        && name.len() <= 214
        && !name.contains("..")
        && !name.starts_with(['/', '.', '-'])
        && name.chars().all(|c| c.is_ascii_alphanumeric() || also.contains(c))
}

fn content_length(response: &Response<Incoming>) -> Option<u64> {
    response.headers().get("content-length")?.to_str().ok()?.parse().ok()
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text.chars().take(400).collect()
}

fn bad(what: &str, why: impl Into<String>) -> NpmError {
    NpmError::BadAnswer { what: what.to_owned(), why: why.into() }
}

/// The parts of a manifest that we read; a registry adds what it likes.
#[derive(Deserialize)]
struct Manifest {
    name: String,
    version: String,
    dist: Dist,
}

#[derive(Deserialize)]
struct Dist {
    tarball: String,
    #[serde(default)]
    integrity: String,
    #[serde(default, rename = "unpackedSize")]
    unpacked_bytes: Option<u64>,
}

#[derive(Deserialize)]
struct Packument<'a> {
    #[serde(default, rename = "dist-tags")]
    tags: BTreeMap<String, String>,
    #[serde(borrow, default)]
    versions: BTreeMap<String, &'a RawValue>,
}

fn pick_version(text: &str, version: &str, what: &str) -> Result<Option<String>, NpmError> {
    let list: Packument<'_> = serde_json::from_str(text).map_err(|error| bad(what, error.to_string()))?;
    let exact = list.tags.get(version).map_or(version, String::as_str);
    Ok(list.versions.get(exact).map(|manifest| manifest.get().to_owned()))
}

fn read_manifest(text: &str, package: &str, what: &str) -> Result<Resolved, NpmError> {
    let manifest: Manifest = serde_json::from_str(text).map_err(|error| bad(what, error.to_string()))?;
    if manifest.name != package {
        return Err(bad(what, "it describes another package"));
    }
    if !plausible(&manifest.version, ".-+") {
        return Err(bad(what, "its version is not one"));
    }
    let integrity = manifest.dist.integrity.split_whitespace().find(|part| part.starts_with("sha512-"));
    let integrity = integrity.ok_or_else(|| bad(what, "it gives no sha512"))?.to_owned();
    Ok(Resolved {
        package: manifest.name,
        version: manifest.version,
        tarball: manifest.dist.tarball,
        integrity,
        unpacked_bytes: manifest.dist.unpacked_bytes,
    })
}
