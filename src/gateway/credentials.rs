//! The provider's credential: read from the environment, a file or a command, held in memory, put into one
//! header. It must never be printed, logged, or handed to anything but an upstream request.

use std::fmt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use hyper::HeaderMap;
use hyper::header::{AUTHORIZATION, HeaderName, HeaderValue};
use tokio::io::AsyncReadExt;
use tokio::sync::Mutex;

use crate::policy::Permit;

/// A file or command is read again when what it gave is older than this.
const FRESH: Duration = Duration::from_secs(300);
/// After a failed re-reading the old value serves this much longer before the next try.
const RETRY: Duration = Duration::from_secs(15);
/// Longest run of a command.
const COMMAND_WAIT: Duration = Duration::from_secs(30);
/// Longest credential, in bytes.
const BYTES_MAX: u64 = 16 << 10;

/// Where a credential comes from.
#[derive(Clone, PartialEq, Eq)]
pub enum CredentialSource {
    /// An environment variable of the daemon, read once.
    Env(String),
    /// A file, read again every five minutes.
    File(PathBuf),
    /// Program and arguments (no shell); its standard output, read again every five minutes.
    Command(Vec<String>),
}

impl fmt::Debug for CredentialSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Env(name) => f.debug_tuple("Env").field(name).finish(),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            // Not the arguments: people put secrets there.
            Self::Command(argv) => f.debug_tuple("Command").field(&argv.first()).finish_non_exhaustive(),
        }
    }
}

/// The header a credential goes into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthStyle {
    /// `x-api-key: …`
    ApiKey,
    /// `authorization: Bearer …`
    Bearer,
}

/// Why there is no credential. Messages name the source, never the value.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// The variable is unset or empty.
    #[error("the environment variable {0} is not set: set it, or use api_key_file or api_key_command")]
    Env(String),
    /// The file cannot be read.
    #[error("cannot read the API key file {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The command cannot be run.
    #[error("cannot run the API key command {program:?}: {source}")]
    Command {
        /// The program.
        program: String,
        /// Why.
        source: std::io::Error,
    },
    /// The command ended with an error or did not end in time.
    #[error("the API key command {program:?} {how}")]
    CommandFailed {
        /// The program.
        program: String,
        /// How it ended.
        how: String,
    },
    /// Empty, too long, or not one line of visible characters.
    #[error("{0} does not hold an API key: expected one line of visible characters")]
    Unusable(String),
}

/// A credential that is kept fresh.
pub(super) struct Credential {
    source: CredentialSource,
    style: AuthStyle,
    current: Mutex<Current>,
}

struct Current {
    header: HeaderValue,
    secret: Secret,
    read_at: Instant,
    fresh_until: Instant,
}

/// A secret text; prints as nothing.
#[derive(Clone)]
pub(super) struct Secret(String);

impl Secret {
    pub(super) fn new(text: String) -> Self {
        Self(text)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// Whether `bytes` contain it.
    pub(super) fn is_in(&self, bytes: &[u8]) -> bool {
        bytes.windows(self.0.len().max(1)).any(|window| window == self.bytes())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential").field("source", &self.source).field("style", &self.style).finish()
    }
}

impl Credential {
    pub(super) async fn open(source: CredentialSource, style: AuthStyle) -> Result<Self, CredentialError> {
        let current = Mutex::new(Current::read(&source, style).await?);
        Ok(Self { source, style, current })
    }

    /// Puts the credential into `headers`, last and once, and gives it for comparison with the answer. Only
    /// against a permit of the policy, for this very request.
    pub(super) async fn inject(&self, _permit: &Permit, headers: &mut HeaderMap) -> Secret {
        let mut current = self.current.lock().await;
        if Instant::now() >= current.fresh_until {
            match Current::read(&self.source, self.style).await {
                Ok(fresh) => *current = fresh,
                Err(error) => {
                    tracing::warn!(%error, "cannot read the API key again: going on with the old one");
                    current.fresh_until = Instant::now() + RETRY;
                }
            }
        }
        let name = match self.style {
            AuthStyle::ApiKey => HeaderName::from_static("x-api-key"),
            AuthStyle::Bearer => AUTHORIZATION,
        };
        headers.insert(name, current.header.clone());
        current.secret.clone()
    }
}

impl Credential {
    /// The provider refused it (401): it is read again at the next request, unless it was read just now.
    pub(super) async fn doubt(&self) {
        let mut current = self.current.lock().await;
        if !matches!(self.source, CredentialSource::Env(_)) {
            current.fresh_until = current.fresh_until.min(current.read_at + RETRY);
        }
    }
}

impl Current {
    async fn read(source: &CredentialSource, style: AuthStyle) -> Result<Self, CredentialError> {
        let (text, whence) = match source {
            CredentialSource::Env(name) => {
                let value = std::env::var(name).ok().filter(|value| !value.trim().is_empty());
                (value.ok_or_else(|| CredentialError::Env(name.clone()))?, format!("the variable {name}"))
            }
            CredentialSource::File(path) => {
                let failed = |source| CredentialError::File { path: path.clone(), source };
                let file = tokio::fs::File::open(path).await.map_err(failed)?;
                let mut text = String::new();
                file.take(BYTES_MAX + 1).read_to_string(&mut text).await.map_err(failed)?;
                (text, format!("the file {}", path.display()))
            }
            CredentialSource::Command(argv) => {
                (run(argv).await?, "the output of the API key command".to_owned())
            }
        };
        let key = text.trim();
        let visible = key.bytes().all(|byte| byte.is_ascii_graphic());
        if key.is_empty() || !visible || key.len() as u64 > BYTES_MAX {
            return Err(CredentialError::Unusable(whence));
        }
        let value = match style {
            AuthStyle::ApiKey => HeaderValue::from_str(key),
            AuthStyle::Bearer => HeaderValue::from_str(&format!("Bearer {key}")),
        };
        let mut header = value.map_err(|_| CredentialError::Unusable(whence))?;
        header.set_sensitive(true);
        let lasting = matches!(source, CredentialSource::Env(_));
        let fresh = if lasting { Duration::from_secs(10 * 365 * 86_400) } else { FRESH };
        let read_at = Instant::now();
        Ok(Self { header, secret: Secret::new(key.to_owned()), read_at, fresh_until: read_at + fresh })
    }
}

async fn run(argv: &[String]) -> Result<String, CredentialError> {
    let program = argv.first().cloned().unwrap_or_default();
    let failed = |source| CredentialError::Command { program: program.clone(), source };
    let ended = |how: String| CredentialError::CommandFailed { program: program.clone(), how };
    let mut child = tokio::process::Command::new(&program)
        .args(argv.get(1..).unwrap_or_default())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let mut text = String::new();
    let read = async {
        if let Some(stdout) = child.stdout.take() {
            stdout.take(BYTES_MAX + 1).read_to_string(&mut text).await?;
        }
        child.wait().await
    };
    let status = tokio::time::timeout(COMMAND_WAIT, read)
        .await
        .map_err(|_| ended(format!("did not end within {} s", COMMAND_WAIT.as_secs())))?
        .map_err(failed)?;
    if status.success() { Ok(text) } else { Err(ended(format!("failed ({status})"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permit() -> Permit {
        let plan = super::super::tests::plan(vec!["*".into()]);
        crate::policy::decide(&plan, crate::policy::Ask::Model { name: "m" }).unwrap()
    }

    async fn header(source: CredentialSource, style: AuthStyle) -> Result<HeaderMap, CredentialError> {
        let mut headers = HeaderMap::new();
        Credential::open(source, style).await?.inject(&permit(), &mut headers).await;
        Ok(headers)
    }

    #[tokio::test]
    async fn it_is_read_from_file_and_command_and_never_printed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, "canary-1\n").unwrap();
        let from_file = CredentialSource::File(path);
        let headers = header(from_file.clone(), AuthStyle::ApiKey).await.unwrap();
        assert_eq!(headers["x-api-key"], "canary-1");
        let credential = Credential::open(from_file, AuthStyle::ApiKey).await.unwrap();
        assert!(!format!("{credential:?} {headers:?}").contains("canary"));
        credential.doubt().await;
        let command = CredentialSource::Command(vec!["echo".into(), "canary-2".into()]);
        assert!(!format!("{command:?}").contains("canary"));
        assert_eq!(header(command, AuthStyle::Bearer).await.unwrap()["authorization"], "Bearer canary-2");
    }

    #[tokio::test]
    async fn what_is_no_credential_is_an_error_that_names_the_source() {
        let of = |source| async { header(source, AuthStyle::ApiKey).await.unwrap_err().to_string() };
        assert!(
            of(CredentialSource::Env("HOTCELL_NO_SUCH_KEY".into())).await.contains("HOTCELL_NO_SUCH_KEY")
        );
        assert!(of(CredentialSource::File("/nonexistent/key".into())).await.contains("/nonexistent/key"));
        assert!(of(CredentialSource::Command(vec!["false".into()])).await.contains("failed"));
        assert!(
            of(CredentialSource::Command(vec!["printf".into(), "a\nb".into()])).await.contains("API key")
        );
        assert!(of(CredentialSource::Command(Vec::new())).await.contains("cannot run"));
    }
}
