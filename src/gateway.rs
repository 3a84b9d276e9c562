//! The gateway: the only way from a cell to the model. One unix socket a cell; behind it the provider, with a
//! credential that the cell never sees, and the ledger. It must never forward a request that was not authorised
//! and paid for beforehand, never let a credential out, and never forget to settle what it forwarded.
//!
//! The road of one request is `messages`: admit it (`admit`: credential, path, [`body`], model), reserve its worst
//! case ([`ledger`]), inject the credential ([`credentials`]), forward (`upstream`), pass the answer on while
//! metering it (`relay`, [`meter`]), settle. [`lease`] holds a cell's socket and what is under way for it.
//!
//! **Invariant**: Σ billed ≤ Σ charged + what the input estimate was short of; and once a limit is reached, no
//! paid request goes upstream. The estimate is bytes/3 for now, so spend can pass a limit by one request's input at most.

mod admit;
pub mod body;
mod censor;
pub mod credentials;
pub mod lease;
pub mod ledger;
mod messages;
pub mod meter;
mod relay;
mod upstream;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

pub use credentials::{AuthStyle, CredentialError, CredentialSource};
pub use lease::{Lease, LeaseSpec};
pub use ledger::{Ask, Grant, Ledger, LedgerError, MemoryLedger, ReservationId, StoreLedger};

use crate::money::{MicroUsd, Scope};
use crate::policy::Plan;
use crate::pricing::{Prices, Usage};
use credentials::Credential;
use upstream::Upstream;

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
            first_byte_wait: Duration::from_secs(600),
            idle: Duration::from_secs(300),
            total: Duration::from_secs(3600),
            drain: Duration::from_secs(60),
        }
    }
}

/// The provider as configured.
#[derive(Debug, Clone)]
pub struct Provider {
    /// Its name in the configuration.
    pub name: String,
    /// `https://…`, or `http://` to a loopback address (the scripted model); may have a path.
    pub base_url: String,
    /// Where the credential comes from.
    pub credential: CredentialSource,
    /// The header it goes into.
    pub style: AuthStyle,
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
    /// The credential cannot be read.
    #[error("provider {provider}: {source}")]
    Credential {
        /// Name of the provider.
        provider: String,
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

/// Why the gateway itself refused a request. A closed list: metric labels and decisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// No credential, another one than the lease's, or more than one.
    Credential,
    /// A method, path or query that is not on the list.
    Path,
    /// Body too large or compressed, or it did not arrive in time.
    Transport,
    /// Body is not a valid request.
    Malformed,
    /// A field, tool or content source that is not allowed.
    Content,
    /// A model that the lease does not allow.
    Model,
    /// A model without a price.
    Price,
    /// Too many requests under way.
    Busy,
    /// The cost limit leaves no room.
    Budget,
    /// The ledger does not answer.
    Ledger,
    /// The credential cannot be read.
    Provider,
}

impl Refusal {
    /// All refusals; metrics are seeded from it.
    pub const ALL: [Self; 11] = [
        Self::Credential,
        Self::Path,
        Self::Transport,
        Self::Malformed,
        Self::Content,
        Self::Model,
        Self::Price,
        Self::Busy,
        Self::Budget,
        Self::Ledger,
        Self::Provider,
    ];

    /// The name used in metrics and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Credential => "credential",
            Self::Path => "path",
            Self::Transport => "transport",
            Self::Malformed => "malformed",
            Self::Content => "content",
            Self::Model => "model",
            Self::Price => "price",
            Self::Busy => "busy",
            Self::Budget => "budget",
            Self::Ledger => "ledger",
            Self::Provider => "provider",
        }
    }
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
        /// The credential that it goes out with, by name.
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
}

/// What all leases share: provider, connections, prices.
#[derive(Debug)]
pub struct Gateway {
    /// The provider's name, and its credential's.
    name: String,
    credential: Credential,
    upstream: Upstream,
    prices: Arc<Prices>,
    limits: Limits,
}

impl Gateway {
    /// Reads the credential and prepares the connections; sends nothing.
    ///
    /// # Errors
    /// A base URL or a credential that cannot be used, or no certificate authorities.
    pub async fn open(
        provider: Provider,
        prices: Arc<Prices>,
        limits: Limits,
    ) -> Result<Arc<Self>, GatewayError> {
        let upstream = Upstream::new(&provider.name, &provider.base_url)?;
        let name = provider.name.clone();
        let credential = Credential::open(provider.credential, provider.style)
            .await
            .map_err(|source| GatewayError::Credential { provider: provider.name, source })?;
        Ok(Arc::new(Self { name, credential, upstream, prices, limits }))
    }

    /// Whether a model has a price, its own or the plan's for such models; without one no request for it is
    /// forwarded.
    pub fn knows_model(&self, model: &str, plan: &Plan) -> bool {
        self.prices.of_or(model, plan.unpriced.as_ref()).is_some()
    }

    /// Opens a cell's socket, `<run_dir>/api.sock`, in place of one that a former daemon left there.
    ///
    /// # Errors
    /// [`GatewayError::Socket`].
    pub async fn lease(
        self: &Arc<Self>,
        spec: LeaseSpec,
        ledger: Arc<dyn Ledger>,
    ) -> Result<Lease, GatewayError> {
        let cell = spec.cell.to_string();
        Lease::open(Arc::clone(self), spec, ledger)
            .await
            .map_err(|source| GatewayError::Socket { cell, source })
    }
}
