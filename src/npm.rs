//! Fetches one version of one package from an npm registry: names it, downloads it, checks its sha512, unpacks it.
//!
//! Never runs anything from a package (no scripts, no dependencies), never writes outside the directory it was
//! given, never keeps a download whose digest differs from the registry's, and never talks over a plain connection
//! to another machine. Private registries that need a login are not supported.

mod fetch;
mod registry;
mod unpack;

pub use fetch::{Downloaded, Npm, Resolved};
pub use registry::{DEFAULT_REGISTRY, Registry};
pub use unpack::{UnpackLimits, Unpacked, unpack};

/// Called with bytes done and, where the server says so, bytes in all.
pub type OnBytes<'a> = &'a (dyn Fn(u64, Option<u64>) + Send + Sync);

/// Why a package could not be had.
#[derive(Debug, thiserror::Error)]
pub enum NpmError {
    /// The registry's address is not one we use.
    #[error(
        "the npm registry address from {origin} is not usable: {why}; set HOTCELL_NPM_REGISTRY to an https address"
    )]
    Registry {
        /// Where the address was found (a variable or a file).
        origin: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// No root certificates on this machine.
    #[error("no root certificates found for HTTPS ({0}); install ca-certificates or set SSL_CERT_FILE")]
    Certificates(String),
    /// The registry did not answer.
    #[error(
        "cannot reach the npm registry at {host}: {why}; check the network, HTTPS_PROXY and HOTCELL_NPM_REGISTRY"
    )]
    Offline {
        /// Host asked, without user or password.
        host: String,
        /// The connection's error.
        why: String,
    },
    /// No such package, or no such version of it.
    #[error("the npm registry has no {package}@{version}")]
    NotFound {
        /// Package name.
        package: String,
        /// Version or tag asked for.
        version: String,
    },
    /// The registry answered with an error.
    #[error("the npm registry answered {status} for {what}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// Package asked for.
        what: String,
    },
    /// The registry answered with something we do not read.
    #[error("the npm registry's answer for {what} is not usable: {why}")]
    BadAnswer {
        /// Package asked for.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// Redirected to a plain connection, or too often.
    #[error("the npm registry redirects {what} to {why}; refused")]
    Redirect {
        /// Package asked for.
        what: String,
        /// Why we did not follow.
        why: &'static str,
    },
    /// Larger than allowed.
    #[error("{what} is larger than the limit of {bytes_max} bytes")]
    TooLarge {
        /// Package or file.
        what: String,
        /// The limit.
        bytes_max: u64,
    },
    /// The bytes are not the ones the registry announced.
    #[error(
        "{package}@{version} does not match its sha512: expected {expected}, got {actual}; nothing was kept"
    )]
    Integrity {
        /// Package name.
        package: String,
        /// Its version.
        version: String,
        /// `sha512-…` as announced.
        expected: String,
        /// `sha512-…` as received.
        actual: String,
    },
    /// The archive holds something we refuse to write.
    #[error("the archive is not usable: {path:?} {why}")]
    Archive {
        /// Entry, shortened.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Local file error.
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The system's error.
        source: std::io::Error,
    },
}

impl NpmError {
    fn io(doing: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| NpmError::Io { doing, source }
    }
}
