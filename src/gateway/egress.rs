//! The way out of a cell to anything but its model: an HTTP and CONNECT proxy on `egress.sock`, for what the job's
//! policy names and for nothing else. It must never dial an address that was not checked, never pass a byte
//! uncounted or a request unjudged, never follow a redirect, and never let a credential into a cell.
//!
//! One connection's road: [`door`](self) reads CONNECT or an absolute-form request → the policy decides
//! ([`crate::policy::decide_egress`]) → [`route`] resolves once and checks every address ([`address`]) → TLS passes
//! through when its ClientHello names the same host ([`hello`]), or is taken apart with the cell's own authority
//! ([`ca`]) and each request in it is judged and written anew (`forward`), answered from the package cache (`cached`) or
//! sent to the host or what stands in for it (`exchange`, [`mirror`]), and its answer passed back (`back`). What
//! happened becomes an event (`telling`), and counts over the whole life of the job ([`Tally`]).

pub mod address;
mod back;
pub mod ca;
mod cached;
mod door;
mod exchange;
mod forward;
pub mod hello;
pub mod mirror;
mod names;
pub mod route;
mod tally;
mod telling;
mod tunnel;
mod wire;

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::Serialize;

pub use ca::{CaError, CellCa};
pub(super) use door::Door;
pub use mirror::Mirror;
pub use names::SystemResolver;
pub use route::{CorporateProxy, Dial, Network, Resolve, RouteError};
pub use tally::{Tally, Used};

use super::Gateway;
use super::credentials::Injected;
use super::packages::PackageCache;
use crate::job::{Identity, JobId};
use crate::policy::Permit;

/// Name of the socket in the cell's run directory.
pub const SOCKET: &str = "egress.sock";

/// Limits of the way out, for one cell, whatever its policy says.
#[derive(Debug, Clone)]
pub struct EgressLimits {
    /// Most connections of one cell; further ones wait in the listen queue.
    pub connections_max: usize,
    /// Longest head of a request, in bytes.
    pub head_bytes_max: usize,
    /// Longest wait for a request's head, and for a ClientHello.
    pub head_wait: Duration,
    /// Longest wait for the first byte of an answer.
    pub first_byte_wait: Duration,
    /// Longest silence.
    pub idle: Duration,
    /// Longest connection.
    pub total: Duration,
    /// How often something is told of a connection that stays open.
    pub told_every: Duration,
}

impl Default for EgressLimits {
    fn default() -> Self {
        Self {
            connections_max: 128,
            head_bytes_max: 64 << 10,
            head_wait: Duration::from_secs(30),
            first_byte_wait: Duration::from_secs(300),
            idle: Duration::from_secs(300),
            total: Duration::from_secs(4 * 3600),
            told_every: Duration::from_secs(60),
        }
    }
}

/// Where credentials for hosts come from.
pub trait Credentials: Send + Sync {
    /// The credential of this name, against a permit of the policy; why there is none, in words without it.
    fn header<'a>(&'a self, name: &'a str, permit: &'a Permit) -> route::Later<'a, Result<Injected, String>>;

    /// The user for whom alone the credential of this name is read; none where it is the same for all.
    fn whose(&self, name: &str) -> Option<u32>;
}

/// The daemon's credentials, for one user.
#[derive(Debug)]
pub struct UserCredentials {
    /// Holds them.
    pub gateway: Arc<Gateway>,
    /// Whose job it is: credential commands run as them.
    pub who: Identity,
}

impl Credentials for UserCredentials {
    fn header<'a>(&'a self, name: &'a str, permit: &'a Permit) -> route::Later<'a, Result<Injected, String>> {
        Box::pin(async move {
            self.gateway.credentials().header(name, permit, &self.who).await.map_err(|error| {
                tracing::warn!(%error, credential = name, uid = self.who.uid, "a credential for a host cannot be used");
                // The words of the error name files and programs of the host: they are not for the cell.
                "it cannot be used: see the daemon's log".to_owned()
            })
        })
    }

    fn whose(&self, name: &str) -> Option<u32> {
        self.gateway.credentials().is_per_user(name).then_some(self.who.uid)
    }
}

/// What the ways out of all cells share.
pub struct Egress {
    network: Network,
    limits: EgressLimits,
    tls: Arc<rustls::ClientConfig>,
    roots: String,
    extra_roots: String,
    packages: Option<Arc<PackageCache>>,
}

impl fmt::Debug for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Egress").field("network", &self.network).finish_non_exhaustive()
    }
}

/// Certificate authorities that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EgressError {
    /// The file of `[network] ca_file` holds no certificates.
    #[error("network.ca_file: {0}")]
    CaFile(String),
    /// TLS cannot be set up.
    #[error("cannot set up TLS for the way out: {0}")]
    Tls(#[from] rustls::Error),
}

impl Egress {
    /// Reads the machine's certificate authorities. `ca_file` is the text of further ones, in PEM. Blocks.
    ///
    /// # Errors
    /// [`EgressError`] when `ca_file` holds no certificate.
    pub fn new(network: Network, limits: EgressLimits, ca_file: Option<&str>) -> Result<Self, EgressError> {
        let native = rustls_native_certs::load_native_certs();
        if native.certs.is_empty() {
            tracing::warn!("no certificate authorities on this machine: inspected hosts cannot be reached");
        }
        let extra = ca_file.map(further_roots).transpose()?.unwrap_or_default();
        let mut store = rustls::RootCertStore::empty();
        store.add_parsable_certificates(native.certs.iter().cloned());
        for certificate in &extra {
            store.add(certificate.clone()).map_err(|e| EgressError::CaFile(e.to_string()))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(store)
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        let (roots, extra_roots) = (pem(&native.certs), pem(&extra));
        Ok(Self { network, limits, tls: Arc::new(tls), roots, extra_roots, packages: None })
    }

    /// The same with a package cache.
    #[must_use]
    pub fn with_packages(self, packages: Arc<PackageCache>) -> Self {
        Self { packages: Some(packages), ..self }
    }

    /// What is kept of package hosts, where anything is.
    pub fn packages(&self) -> Option<&Arc<PackageCache>> {
        self.packages.as_ref()
    }

    /// Whether a corporate proxy's authorities, or others, were named.
    pub fn has_extra_roots(&self) -> bool {
        !self.extra_roots.is_empty()
    }

    /// What a cell trusts, in PEM: all authorities, and those alone that its tools do not know by themselves.
    pub fn bundle(&self, ca: Option<&CellCa>) -> Bundle {
        let more = format!("{}{}", ca.map_or("", CellCa::certificate_pem), self.extra_roots);
        Bundle { all: format!("{}{more}", self.roots), more }
    }
}

/// Certificate authorities for a cell, in PEM.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// The machine's, the cell's own, and those of `[network] ca_file`.
    pub all: String,
    /// The last two.
    pub more: String,
}

/// The certificates of a PEM file.
///
/// # Errors
/// [`EgressError::CaFile`] when there is none, or one that is broken.
pub fn further_roots(text: &str) -> Result<Vec<CertificateDer<'static>>, EgressError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(EgressError::CaFile("holds no certificate in PEM".into())),
        Err(error) => Err(EgressError::CaFile(format!("is no PEM: {error}"))),
    }
}

fn pem(certificates: &[CertificateDer<'_>]) -> String {
    use base64::Engine as _;
    let mut text = String::new();
    for certificate in certificates {
        let body = base64::engine::general_purpose::STANDARD.encode(certificate);
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        for line in body.as_bytes().chunks(64) {
            text.push_str(&String::from_utf8_lossy(line));
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

/// What a cell's lease needs for the way out.
#[derive(Clone)]
pub struct EgressSpec {
    /// What all cells share.
    pub egress: Arc<Egress>,
    /// The job, for what it may fill of the package cache.
    pub job: JobId,
    /// The cell's authority; without one no inspected host is reached.
    pub ca: Option<Arc<CellCa>>,
    /// The credentials that this job's submitter may use.
    pub credentials: Arc<dyn Credentials>,
    /// What the job has used so far, in this cell and in those before.
    pub tally: Arc<Tally>,
}

impl fmt::Debug for EgressSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EgressSpec")
            .field("egress", &self.egress)
            .field("ca", &self.ca)
            .field("tally", &self.tally)
            .finish_non_exhaustive()
    }
}

/// One connection or request of a cell, at its end or refusal; of one that stays open, what went over it since it was
/// told of last.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct EgressRecord {
    /// The host as decided; what was asked for, cut and cleaned, where that is no host.
    pub host: String,
    /// The port; 0 where none could be read.
    pub port: u16,
    /// The method, where the request was looked into.
    pub method: Option<String>,
    /// The path without its query, where the request was looked into.
    pub path: Option<String>,
    /// Whether it was allowed. What is allowed can fail even so, and then has a `reason`.
    pub allowed: bool,
    /// The rule that decided.
    pub rule: String,
    /// Why it was refused, failed or ended early; what to look at where the host wants to know who asks.
    pub reason: Option<String>,
    /// The credential that was added, by name.
    pub credential: Option<String>,
    /// The status of the host's answer, where the request was looked into.
    pub status: Option<u16>,
    /// Bytes that left the cell, as they went over the wire.
    pub bytes_up: u64,
    /// Bytes that came to it.
    pub bytes_down: u64,
    /// Bytes of a body that came from the package cache and over no network.
    pub cached_bytes: u64,
    /// How long it took.
    pub duration_ms: u64,
}
