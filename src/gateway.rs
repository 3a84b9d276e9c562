//! The gateway: the only way from a cell to the model. One unix socket a cell; behind it the provider, with a
//! credential that the cell never sees, and the ledger. It must never forward a request that was not authorised
//! and paid for beforehand, never let a credential out, and never forget to settle what it forwarded.
//!
//! The road of one request is `messages`: admit it (`admit`: credential, path, headers, [`body`], model; `provider` puts
//! it into the vendor's form first), bound its input (`estimate`), wait for its turn ([`pace`]), reserve its worst case
//! ([`ledger`]), put it into the provider's form with the credential (`provider`, [`credentials`]), forward (`upstream`),
//! pass the answer on while metering it (`relay`, [`meter`]), settle. [`lease`] holds a cell's socket and what is under
//! way for it.
//!
//! **Invariant**: Σ billed ≤ Σ charged, and what is charged for a request is within what was reserved for it, so
//! spend never passes a limit. It rests on three things: a token is at least one byte of what the provider's tokenizer
//! is given, for which [`body`] allows; what a beginning of a conversation was billed for, or counted by the provider
//! plus a margin, bounds it in later requests; and images and documents have a largest size. An answer that was not
//! read to its end, whoever cut it, is charged all the output that it was allowed. It does not cover what the provider itself adds to the input: pages of a web search (an
//! allowance is reserved for each) and results of MCP servers that a policy lets it connect to.

mod admit;
pub mod body;
mod buffers;
mod censor;
pub mod credentials;
pub mod egress;
mod estimate;
pub mod lease;
pub mod ledger;
mod messages;
pub mod meter;
pub mod pace;
pub mod packages;
pub mod post;
mod provider;
mod relay;
pub mod secret;
pub mod sigv4;
mod upstream;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use serde::Serialize;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

pub use credentials::{
    CredentialError, CredentialKind, CredentialSource, CredentialSpec, Credentials, Injected, Principal,
};
pub use egress::{Egress, EgressRecord, EgressSpec};
pub use lease::{Lease, LeaseSpec};
pub use ledger::{Ask, Grant, Ledger, LedgerError, MemoryLedger, ReservationId, StoreLedger};
pub use pace::PaceView;
pub use provider::ProviderSpec;

pub use crate::event::Refusal;
#[doc(hidden)]
pub use provider::fuzz;

use crate::agent::provider::ProviderView;
use crate::job::Identity;
use crate::money::{MicroUsd, Scope};
use crate::policy::Plan;
use crate::pricing::{Price, Prices, Usage};
use buffers::Buffers;
use pace::Class;
use pace::pacer::Pacer;
use provider::Provider;

/// Limits of the gateway; all of them count per lease, times per request.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Largest request body, in bytes.
    pub body_bytes_max: usize,
    /// Most bytes of request bodies held at a time; further requests wait.
    pub bodies_bytes_max: usize,
    /// Most connections; further ones wait in the listen queue.
    pub connections_max: usize,
    /// Most requests under way, those included whose client has left.
    pub requests_max: usize,
    /// Longest wait for a request's body.
    pub body_wait: Duration,
    /// Longest wait for other reservations to make room.
    pub budget_wait: Duration,
    /// Longest that a request is held while the provider limits requests of its kind, its own repetitions included.
    /// Below the 600 seconds after which the CLI gives an answer up.
    pub pace_wait: Duration,
    /// Longest wait for the provider's first byte.
    pub first_byte_wait: Duration,
    /// Longest silence of the provider, or of a client that does not read.
    pub idle: Duration,
    /// Longest answer.
    pub total: Duration,
    /// How long an answer is read on after its client has left, and how long [`Lease::destroy`] waits.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes_max: 32 << 20,
            bodies_bytes_max: 64 << 20,
            connections_max: 64,
            requests_max: 64,
            body_wait: Duration::from_secs(60),
            budget_wait: Duration::from_secs(600),
            pace_wait: Duration::from_secs(300),
            first_byte_wait: Duration::from_secs(600),
            idle: Duration::from_secs(300),
            total: Duration::from_secs(3600),
            drain: Duration::from_secs(60),
        }
    }
}

/// How providers are reached: what `[network]` of the configuration says.
#[derive(Debug, Clone, Default)]
pub struct Reach {
    /// A proxy before them.
    pub proxy: Option<egress::CorporateProxy>,
    /// Certificate authorities beside the machine's.
    pub extra_roots: Vec<rustls::pki_types::CertificateDer<'static>>,
}

impl Reach {
    fn roots(&self) -> Result<rustls::RootCertStore, GatewayError> {
        let native = rustls_native_certs::load_native_certs();
        let mut store = rustls::RootCertStore::empty();
        store.add_parsable_certificates(native.certs.into_iter().chain(self.extra_roots.iter().cloned()));
        if store.is_empty() {
            let why = native.errors.first().map_or_else(|| "none was found".to_owned(), ToString::to_string);
            return Err(GatewayError::Roots(std::io::Error::other(why)));
        }
        Ok(store)
    }
}

/// What the gateway cannot do.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The base URL is none that a credential may be sent to.
    #[error("provider {provider}: base_url {url:?} {why}")]
    BaseUrl {
        /// Name of the provider.
        provider: String,
        /// The URL.
        url: String,
        /// What is wrong.
        why: &'static str,
    },
    /// Something of its configuration is missing or contradicts itself.
    #[error("provider {provider}: {why}")]
    Provider {
        /// Name of the provider.
        provider: String,
        /// What is wrong.
        why: &'static str,
    },
    /// No provider of that name.
    #[error("there is no provider {0:?}: see [[provider]] in the daemon's configuration")]
    UnknownProvider(String),
    /// A credential cannot be read.
    #[error("credential {credential}: {source}")]
    Credential {
        /// Name of the credential.
        credential: String,
        /// Why.
        source: CredentialError,
    },
    /// No certificate authorities on this machine.
    #[error("cannot load the machine's certificate authorities (is ca-certificates installed?): {0}")]
    Roots(std::io::Error),
    /// The cell's socket cannot be made.
    #[error("cannot make the model socket of cell {cell}: {source}")]
    Socket {
        /// The cell.
        cell: String,
        /// Why.
        source: std::io::Error,
    },
}

/// Providers and credentials as configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayConfig {
    /// Providers, by different names.
    pub providers: Vec<ProviderSpec>,
    /// The provider of jobs that name none.
    pub default_provider: String,
    /// Credentials, by different names.
    pub credentials: Vec<CredentialSpec>,
}

/// What happened on a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum GatewayEvent {
    /// A request is reserved and goes upstream now.
    Requested {
        /// The model asked for.
        model: String,
        /// Its worst case.
        reserved: MicroUsd,
        /// The name of the credential that it goes out with.
        credential: String,
    },
    /// A request is over and settled.
    Charged {
        /// The model asked for.
        model: String,
        /// What it was billed for; all zero when it was charged its reservation or nothing.
        usage: Usage,
        /// What the ledger holds for it now.
        charged: MicroUsd,
        /// The provider's status; 502 or 504 when it gave none.
        status: u16,
        /// From the request's arrival to the last byte.
        duration_ms: u64,
        /// From forwarding to the first byte of the answer.
        ttfb_ms: u64,
    },
    /// The gateway refused a request.
    Refused {
        /// The status it answered.
        status: u16,
        /// Why.
        why: Refusal,
    },
    /// A budget is exhausted: a request had no room, or an answer was cut short for it.
    BudgetExhausted {
        /// Which one.
        scope: Scope,
        /// Settled spend in it.
        spent: MicroUsd,
        /// The limit.
        limit: MicroUsd,
        /// When it is empty again, in milliseconds since 1970; none where waiting does not help.
        resets_at_ms: Option<u64>,
    },
    /// The provider failed: it is limited, refuses the credential, or broke off.
    ProviderFault {
        /// Its status; `None` when there was no answer, or it broke off.
        status: Option<u16>,
        /// How long it asks to wait, in seconds.
        retry_after_s: Option<u64>,
    },
    /// The provider limits this job's requests for longer than they are held: the job should be parked.
    ProviderPaused {
        /// When the pause ends, in milliseconds of the wall clock.
        until_ms: u64,
    },
    /// A connection to a host, or a request to one, ended or was refused.
    Egress(EgressRecord),
}

/// What all leases share: providers, credentials, connections, prices.
#[derive(Debug)]
pub struct Gateway {
    providers: BTreeMap<String, Arc<Provider>>,
    default_provider: String,
    credentials: Credentials,
    prices: RwLock<Arc<Prices>>,
    limits: Limits,
    buffers: Buffers,
    /// Requests that cost and are under way; closed for good when the daemon detaches.
    open: TaskTracker,
}

impl Gateway {
    /// Reads the credentials that can be read now and prepares the connections; sends nothing, runs nothing.
    ///
    /// # Errors
    /// A provider or a credential that cannot be used, or no certificate authorities.
    pub async fn open(
        config: GatewayConfig,
        prices: Arc<Prices>,
        limits: Limits,
        reach: &Reach,
    ) -> Result<Arc<Self>, GatewayError> {
        let mut providers = BTreeMap::new();
        let mut pacers: BTreeMap<String, Arc<Pacer>> = BTreeMap::new();
        for spec in config.providers {
            let pacer = pacers.entry(spec.credential.clone()).or_insert_with(Pacer::new);
            let (name, provider) = (spec.name.clone(), Provider::open(spec, Arc::clone(pacer), reach)?);
            providers.insert(name, Arc::new(provider));
        }
        let default_provider = config.default_provider;
        if !providers.contains_key(&default_provider) {
            return Err(GatewayError::UnknownProvider(default_provider));
        }
        let opened = Credentials::open(config.credentials).await;
        let credentials =
            opened.map_err(|(credential, source)| GatewayError::Credential { credential, source })?;
        for provider in providers.values() {
            if !credentials.names().any(|name| name == provider.credential) {
                let source = CredentialError::Unknown(provider.credential.clone());
                return Err(GatewayError::Credential { credential: provider.credential.clone(), source });
            }
        }
        let buffers = Buffers::default();
        let (prices, open) = (RwLock::new(prices), TaskTracker::new());
        Ok(Arc::new(Self { providers, default_provider, credentials, prices, limits, buffers, open }))
    }

    /// What a job of this provider and model shares the provider's limits with: credential and class of model. Only
    /// a name, for those that wait together.
    pub fn limited_with(&self, provider: &str, model: &str) -> String {
        format!("{} {}", self.credential_of(provider), Class::of_job(model))
    }

    /// What is left of the pause that all jobs of this provider and model keep to; a job that is limited for what
    /// it asks for makes none.
    pub fn paused(&self, provider: &str, model: &str) -> Duration {
        self.provider(provider).map_or(Duration::ZERO, |p| p.pacer.paused(&Class::of_job(model)))
    }

    /// Ends a pause before its time, by the name of those that wait for it ([`Gateway::limited_with`]): somebody
    /// wants to try.
    pub fn lift_pause(&self, limited_with: &str) {
        for provider in self.providers.values() {
            let class = limited_with.strip_prefix(provider.credential.as_str());
            if let Some(class) = class.and_then(|class| class.strip_prefix(' ')) {
                provider.pacer.lift(class);
            }
        }
    }

    /// From now on no request that costs goes out: those that come wait until their connection ends with the daemon.
    pub fn close(&self) {
        self.open.close();
    }

    /// Returns when it is closed and those that were under way are settled.
    pub async fn settled(&self) {
        self.open.wait().await;
    }

    /// The right to one request that costs, until it is settled. Does not return once the gateway is closed.
    async fn entered(&self) -> TaskTrackerToken {
        let token = self.open.token();
        // In this order: who closes it waits for the token, or we see that it is closed.
        if !self.open.is_closed() {
            return token;
        }
        drop(token);
        std::future::pending().await
    }

    /// How fast the credentials are used just now: of each figure the sum, of pauses the longest.
    pub fn pace(&self) -> PaceView {
        let one_each: BTreeMap<&str, &Arc<Pacer>> =
            self.providers.values().map(|p| (p.credential.as_str(), &p.pacer)).collect();
        one_each.into_values().map(|pacer| pacer.view()).fold(PaceView::default(), PaceView::with)
    }

    /// Whether a model has a price, its own or the plan's for such models; without one no request for it is
    /// forwarded.
    pub fn knows_model(&self, provider: &str, model: &str, plan: &Plan) -> bool {
        self.provider(provider).is_ok_and(|provider| self.price(provider, model, plan).is_some())
    }

    /// The name of a provider's credential: jobs with the same one share its limits.
    pub fn credential_of(&self, provider: &str) -> String {
        self.provider(provider).map_or_else(|_| provider.to_owned(), |provider| provider.credential.clone())
    }

    /// The names of the providers.
    pub fn providers(&self) -> impl Iterator<Item = &str> {
        self.providers.keys().map(String::as_str)
    }

    /// The provider of jobs that name none.
    pub fn default_provider(&self) -> &str {
        &self.default_provider
    }

    /// Whether a user's job may use a provider.
    ///
    /// # Errors
    /// [`GatewayError::UnknownProvider`], or [`GatewayError::Credential`] where the user may not use its credential.
    pub fn may_use(&self, provider: &str, who: &Identity) -> Result<(), GatewayError> {
        let credential = self.provider(provider)?.credential.clone();
        let allowed = self.credentials.may_use(&credential, who);
        allowed.map_err(|source| GatewayError::Credential { credential, source })
    }

    /// Whether a provider has an id for a model.
    pub fn serves(&self, provider: &str, model: &str) -> bool {
        self.provider(provider).is_ok_and(|provider| provider.serves(model))
    }

    /// The name under which a provider's model is priced and judged.
    pub fn plain_model(&self, provider: &str, model: &str) -> String {
        self.provider(provider).map_or_else(|_| model.to_owned(), |provider| provider.plain(model))
    }

    /// What the CLI of a cell is told of its provider.
    ///
    /// # Errors
    /// [`GatewayError::UnknownProvider`].
    pub fn view(&self, provider: &str) -> Result<ProviderView, GatewayError> {
        self.provider(provider).map(|provider| provider.view())
    }

    /// The credentials, for what else injects them.
    pub fn credentials(&self) -> &Credentials {
        &self.credentials
    }

    fn provider(&self, name: &str) -> Result<&Arc<Provider>, GatewayError> {
        self.providers.get(name).ok_or_else(|| GatewayError::UnknownProvider(name.to_owned()))
    }

    /// From the next request on these are the prices; what is under way is charged by those it was reserved by.
    pub fn set_prices(&self, prices: Prices) {
        *self.prices.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(prices);
    }

    /// The price of a model: what the list says of `<provider>/<model>`, else of the model, else the plan's highest.
    fn price(&self, provider: &Provider, model: &str, plan: &Plan) -> Option<Price> {
        let prices = self.prices.read().unwrap_or_else(PoisonError::into_inner);
        let special = prices.of_provider(&provider.name, model).copied();
        special.or_else(|| prices.of_or(model, plan.unpriced.as_ref()))
    }

    /// Opens a cell's socket, `<run_dir>/api.sock`, in place of one that a former daemon left there.
    ///
    /// # Errors
    /// [`GatewayError::Socket`], and [`GatewayError::UnknownProvider`] where the plan names one that is gone.
    pub async fn lease(
        self: &Arc<Self>,
        spec: LeaseSpec,
        ledger: Arc<dyn Ledger>,
    ) -> Result<Lease, GatewayError> {
        let cell = spec.cell.to_string();
        let provider = Arc::clone(self.provider(&spec.plan.provider)?);
        Lease::open(Arc::clone(self), provider, spec, ledger)
            .await
            .map_err(|source| GatewayError::Socket { cell, source })
    }
}
