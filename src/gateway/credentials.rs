//! Credentials by name: read from the environment, a file or a command, held in memory, read again when they age
//! or expire. They must never be printed, logged or kept in the store, and are handed out only against a
//! [`Permit`] of the policy, to a user who may use them, for one upstream request.
//!
//! A command runs as the user whose job needs it, never as the daemon, and what it gave serves that user only.

mod value;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use hyper::header::{AUTHORIZATION, HeaderName, HeaderValue};
use tokio::io::AsyncReadExt;

pub use value::Unusable;
use value::{BYTES_MAX, Parsed, Value};

use super::secret::{Secret, Secrets};
use super::sigv4::Keys;
use crate::clock;
use crate::job::Identity;
use crate::policy::Permit;
use crate::run_as::{self, Bounds, RunError};

/// A file or command is read again when what it gave is older than this, unless the configuration says another
/// time.
pub const REFRESH: Duration = Duration::from_secs(300);
/// After a failed re-reading the old value serves this much longer before the next try.
const RETRY: Duration = Duration::from_secs(15);
/// A credential is renewed this long before it expires.
const MARGIN: Duration = Duration::from_secs(60);
/// Longest run of a command.
const COMMAND_WAIT: Duration = Duration::from_secs(30);
/// Users for whom what a command gave is kept; above that all of it is forgotten.
const USERS_KEPT_MAX: usize = 1_000;
/// The variable whose value is an AWS access key's id; the secret and the token stand beside it.
const AWS_ID_VARIABLE: &str = "AWS_ACCESS_KEY_ID";

/// Where a credential comes from.
#[derive(Clone, PartialEq, Eq)]
pub enum CredentialSource {
    /// An environment variable of the daemon, read once.
    Env(String),
    /// A file, read by the daemon.
    File(PathBuf),
    /// Program and arguments (no shell), run as the user whose job needs it; its standard output.
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

/// How a credential goes into a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CredentialKind {
    /// `x-api-key: …`
    ApiKey,
    /// `authorization: Bearer …`
    Bearer,
    /// Keys of AWS, which sign a request and do not go along with it.
    Aws,
    /// `authorization: Basic …` of this user name and the credential as password, as git servers want it.
    Basic {
        /// The user name.
        username: String,
    },
    /// A header of its own.
    Header {
        /// The header, in lower case.
        name: String,
        /// What stands before the credential in it, e.g. `token ` (with its space).
        prefix: String,
    },
}

impl CredentialKind {
    /// The word in the configuration.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::ApiKey => "api_key",
            Self::Bearer => "bearer",
            Self::Aws => "aws",
            Self::Basic { .. } => "basic",
            Self::Header { .. } => "header",
        }
    }
}

/// A user or a group, as the configuration names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Principal {
    /// By number.
    Id(u32),
    /// By name; looked up in the machine's user and group files.
    Name(String),
}

/// A credential as configured. Never holds the value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CredentialSpec {
    /// Its name: what policies, events and the audit say.
    pub name: String,
    /// How it goes into a request.
    pub kind: CredentialKind,
    /// Where it comes from.
    pub source: CredentialSource,
    /// How old what a file or command gave may become.
    pub refresh: Duration,
    /// Users who may use it. Where users and groups are both empty, everybody may.
    pub users: Vec<Principal>,
    /// Groups whose members may use it.
    pub groups: Vec<Principal>,
    /// Whether the daemon must not start without it.
    pub required: bool,
}

/// Why there is no credential. Messages name the source, never the value.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// No such name.
    #[error("there is no credential {0:?}: see [[credential]] in the daemon's configuration")]
    Unknown(String),
    /// The user is not listed.
    #[error(
        "the user {uid} may not use the credential {name}: its users and groups are in the daemon's configuration"
    )]
    NotAllowed {
        /// The credential.
        name: String,
        /// The user.
        uid: u32,
    },
    /// A user or group that the machine does not have.
    #[error("credential {name}: the machine has no {what} {principal:?}")]
    Principal {
        /// The credential.
        name: String,
        /// User or group.
        what: &'static str,
        /// As configured.
        principal: String,
    },
    /// The variable is unset or empty.
    #[error("the environment variable {0} is not set: set it, or name a file or a command")]
    Env(String),
    /// The file cannot be read.
    #[error("cannot read the API key file {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The command cannot be run, or took too long.
    #[error("the credential command: {0}")]
    Run(#[from] RunError),
    /// The command failed.
    #[error("the credential command {program:?} failed (exit code {code})")]
    CommandFailed {
        /// The program.
        program: String,
        /// Its exit code.
        code: i32,
    },
    /// What the source gave cannot be used.
    #[error("{whence} {why}")]
    Unusable {
        /// The source, in words.
        whence: String,
        /// What is wrong.
        why: Unusable,
    },
    /// Keys that sign requests cannot stand in a header.
    #[error("the credential {0} is a pair of AWS keys and fits into no header")]
    NoHeader(String),
}

/// A header with a credential in it, and the secret texts that an answer must not repeat.
#[derive(Debug, Clone)]
pub struct Injected {
    /// Its name.
    pub name: HeaderName,
    /// Its value, marked as sensitive.
    pub value: HeaderValue,
    /// What to look for in the answer.
    pub secrets: Secrets,
}

/// What a request to a provider goes out with.
#[derive(Debug, Clone)]
pub(super) enum Attachment {
    /// A header.
    Header(Injected),
    /// Keys to sign with.
    Sign(Keys),
}

/// How one credential stands, without its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// Its name.
    pub name: String,
    /// Whether the daemon must not start without it.
    pub required: bool,
    /// Where it comes from, in words.
    pub source: String,
    /// Why it cannot be had, where that can be known without running anything.
    pub problem: Option<String>,
}

/// All credentials of the daemon.
pub struct Credentials(BTreeMap<String, Named>);

struct Named {
    spec: CredentialSpec,
    users: Vec<u32>,
    groups: Vec<u32>,
    /// By user for commands, under `None` for what is the same for all. The inner lock is held while it is read:
    /// whoever else needs it waits for that one reading.
    kept: Mutex<HashMap<Option<u32>, Arc<Slot>>>,
}

type Slot = tokio::sync::Mutex<Option<Current>>;

struct Current {
    value: Value,
    /// Made of it with the first request.
    attachment: Option<Attachment>,
    read_at: Instant,
    fresh_until: Instant,
    expires_ms: Option<u64>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.values().map(|named| &named.spec)).finish()
    }
}

impl Credentials {
    /// Looks up users and groups, and reads what the environment and files hold. No command is run.
    ///
    /// # Errors
    /// [`CredentialError`] for the first one that cannot be used; one that is not required may be absent.
    pub async fn open(specs: Vec<CredentialSpec>) -> Result<Self, (String, CredentialError)> {
        let mut all = BTreeMap::new();
        for spec in specs {
            let name = spec.name.clone();
            let named = Named::open(spec).await.map_err(|error| (name.clone(), error))?;
            all.insert(name, named);
        }
        Ok(Self(all))
    }

    /// The names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Whether a user may use a credential.
    ///
    /// # Errors
    /// [`CredentialError::Unknown`] and [`CredentialError::NotAllowed`].
    pub fn may_use(&self, name: &str, who: &Identity) -> Result<(), CredentialError> {
        self.named(name).and_then(|named| named.allows(who))
    }

    /// Whether each user has another value of it.
    pub fn is_per_user(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|named| matches!(named.spec.source, CredentialSource::Command(_)))
    }

    /// The header that carries a credential. Only against a permit of the policy for this very request.
    ///
    /// # Errors
    /// [`CredentialError`]; the message may be shown to the user, not to an agent.
    pub async fn header(
        &self,
        name: &str,
        permit: &Permit,
        who: &Identity,
    ) -> Result<Injected, CredentialError> {
        match self.attachment(name, permit, who).await? {
            Attachment::Header(injected) => Ok(injected),
            Attachment::Sign(_) => Err(CredentialError::NoHeader(name.to_owned())),
        }
    }

    pub(super) async fn attachment(
        &self,
        name: &str,
        _permit: &Permit,
        who: &Identity,
    ) -> Result<Attachment, CredentialError> {
        let named = self.named(name)?;
        named.allows(who)?;
        named.current(who).await
    }

    /// A request that went out with it was refused for it: it is read again at the next one, unless it was read
    /// just now.
    pub async fn doubt(&self, name: &str, who: &Identity) {
        let Some(named) = self.0.get(name) else { return };
        if matches!(named.spec.source, CredentialSource::Env(_)) {
            return;
        }
        if let Some(current) = named.slot(who).lock().await.as_mut() {
            current.fresh_until = current.fresh_until.min(current.read_at + RETRY);
        }
    }

    /// Reads files again now, and what commands give at its next use; the environment cannot change. What cannot be
    /// read stays as it was; gives why, in words without values.
    pub async fn reload(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for named in self.0.values() {
            wrong.extend(named.reload().await.err().map(|error| error.to_string()));
        }
        wrong
    }

    /// How each stands now: the environment and files are read and forgotten, of a command only its program is looked
    /// for.
    pub async fn standing(&self) -> Vec<Standing> {
        let mut all = Vec::new();
        for named in self.0.values() {
            all.push(named.standing().await);
        }
        all
    }

    /// The secret texts of all that is held now, to be looked for in what goes out to people, and never for anything
    /// else. One that is being read by a command is waited for.
    pub async fn held(&self) -> Vec<Secret> {
        let mut held = Vec::new();
        for named in self.0.values() {
            let slots: Vec<Arc<Slot>> =
                named.kept.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
            for slot in slots {
                if let Some(current) = slot.lock().await.as_ref() {
                    held.extend(current.value.secrets().cloned());
                }
            }
        }
        held
    }

    fn named(&self, name: &str) -> Result<&Named, CredentialError> {
        self.0.get(name).ok_or_else(|| CredentialError::Unknown(name.to_owned()))
    }
}

impl Named {
    async fn open(spec: CredentialSpec) -> Result<Self, CredentialError> {
        let find = |what: &'static str, file: &'static str, list: &[Principal]| {
            let ids: Result<Vec<u32>, CredentialError> = list
                .iter()
                .map(|principal| match principal {
                    Principal::Id(id) => Ok(*id),
                    Principal::Name(text) => id_of(file, text).ok_or_else(|| CredentialError::Principal {
                        name: spec.name.clone(),
                        what,
                        principal: text.clone(),
                    }),
                })
                .collect();
            ids
        };
        let users = find("user", "/etc/passwd", &spec.users)?;
        let groups = find("group", "/etc/group", &spec.groups)?;
        let named = Self { spec, users, groups, kept: Mutex::default() };
        if !matches!(named.spec.source, CredentialSource::Command(_)) {
            let nobody = Identity { uid: 0, gid: 0, groups: Vec::new() };
            match named.read(&nobody).await {
                Ok(current) => *named.slot(&nobody).lock().await = Some(current),
                Err(error) if named.spec.required => return Err(error),
                // It is not there, and nothing needs it yet; what is there and wrong is always told.
                Err(CredentialError::Env(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(named)
    }

    async fn reload(&self) -> Result<(), CredentialError> {
        match &self.spec.source {
            CredentialSource::Env(_) => {}
            CredentialSource::File(_) => {
                let nobody = Identity { uid: 0, gid: 0, groups: Vec::new() };
                let slot = self.slot(&nobody);
                let mut slot = slot.lock().await;
                *slot = Some(self.read(&nobody).await?);
            }
            CredentialSource::Command(_) => {
                let slots: Vec<Arc<Slot>> =
                    self.kept.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
                for slot in slots {
                    if let Some(current) = slot.lock().await.as_mut() {
                        current.fresh_until = Instant::now();
                    }
                }
            }
        }
        Ok(())
    }

    async fn standing(&self) -> Standing {
        let nobody = Identity { uid: 0, gid: 0, groups: Vec::new() };
        let (source, problem) = match &self.spec.source {
            CredentialSource::Env(name) => (format!("the variable {name}"), self.read(&nobody).await.err()),
            CredentialSource::File(_) => ("a file".to_owned(), self.read(&nobody).await.err()),
            CredentialSource::Command(argv) => {
                let path = PathBuf::from(argv.first().map(String::as_str).unwrap_or_default());
                // One without a path is found by the user who runs it.
                let there = match path.is_absolute() {
                    true => tokio::fs::metadata(&path).await.map(drop),
                    false => Ok(()),
                };
                let missing = there.err().map(|source| RunError::Start { program: path, source }.into());
                ("a command, run for each user when a job needs it".to_owned(), missing)
            }
        };
        let problem = problem.map(|error| error.to_string());
        Standing { name: self.spec.name.clone(), required: self.spec.required, source, problem }
    }

    fn allows(&self, who: &Identity) -> Result<(), CredentialError> {
        let open = self.spec.users.is_empty() && self.spec.groups.is_empty();
        let member = |group: &u32| *group == who.gid || who.groups.contains(group);
        if open || self.users.contains(&who.uid) || self.groups.iter().any(member) {
            return Ok(());
        }
        Err(CredentialError::NotAllowed { name: self.spec.name.clone(), uid: who.uid })
    }

    fn slot(&self, who: &Identity) -> Arc<Slot> {
        let own = matches!(self.spec.source, CredentialSource::Command(_)).then_some(who.uid);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= USERS_KEPT_MAX && !kept.contains_key(&own) {
            kept.clear();
        }
        Arc::clone(kept.entry(own).or_default())
    }

    /// What it is now, read again where it is due. One that cannot be read again serves on until it expires.
    async fn current(&self, who: &Identity) -> Result<Attachment, CredentialError> {
        let slot = self.slot(who);
        let mut slot = slot.lock().await;
        let due = slot.as_ref().is_none_or(|current| Instant::now() >= current.fresh_until);
        if due {
            match (self.read(who).await, slot.as_mut()) {
                (Ok(fresh), _) => *slot = Some(fresh),
                (Err(error), Some(old)) if old.expires_ms.is_none_or(|at| at > clock::wall_ms()) => {
                    tracing::warn!(%error, credential = self.spec.name, "a credential cannot be read again: going on with the old one");
                    old.fresh_until = Instant::now() + RETRY;
                }
                (Err(error), _) => {
                    tracing::warn!(%error, credential = self.spec.name, uid = who.uid, "a credential cannot be read");
                    *slot = None;
                    return Err(error);
                }
            }
        }
        let Some(current) = slot.as_mut() else {
            return Err(CredentialError::Unknown(self.spec.name.clone()));
        };
        if let Some(made) = &current.attachment {
            return Ok(made.clone());
        }
        let made = match &current.value {
            Value::Aws(keys) => Attachment::Sign(keys.clone()),
            Value::Text(secret) => Attachment::Header(header_of(&self.spec.kind, secret)?),
        };
        Ok(current.attachment.insert(made).clone())
    }

    async fn read(&self, who: &Identity) -> Result<Current, CredentialError> {
        let (text, whence) = match &self.spec.source {
            CredentialSource::Env(name) => (self.variable(name)?, format!("the variable {name}")),
            CredentialSource::File(path) => {
                let failed = |source| CredentialError::File { path: path.clone(), source };
                let file = tokio::fs::File::open(path).await.map_err(failed)?;
                let mut text = String::new();
                file.take(BYTES_MAX as u64 + 1).read_to_string(&mut text).await.map_err(failed)?;
                (text, format!("the file {}", path.display()))
            }
            CredentialSource::Command(argv) => {
                let words = format!("the output of the command of the credential {}", self.spec.name);
                (run(argv, who).await?, words)
            }
        };
        let now_ms = clock::wall_ms();
        let Parsed { value, expires_ms } = value::parse(&self.spec.kind, &text, now_ms)
            .map_err(|why| CredentialError::Unusable { whence, why })?;
        let read_at = Instant::now();
        let lasting = matches!(self.spec.source, CredentialSource::Env(_));
        let mut fresh = if lasting { Duration::from_secs(10 * 365 * 86_400) } else { self.spec.refresh };
        if let Some(at) = expires_ms.filter(|_| !lasting) {
            // A short-lived one is renewed at half its life, never less than a second on.
            let left = Duration::from_millis(at.saturating_sub(now_ms));
            fresh = fresh.min(left.saturating_sub(MARGIN).max(left / 2)).max(Duration::from_secs(1));
        }
        Ok(Current { value, attachment: None, read_at, fresh_until: read_at + fresh, expires_ms })
    }

    fn variable(&self, name: &str) -> Result<String, CredentialError> {
        let given = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        let missing = |name: &str| CredentialError::Env(name.to_owned());
        let value = given(name).ok_or_else(|| missing(name))?;
        if self.spec.kind != CredentialKind::Aws || name != AWS_ID_VARIABLE {
            return Ok(value);
        }
        let secret = given("AWS_SECRET_ACCESS_KEY").ok_or_else(|| missing("AWS_SECRET_ACCESS_KEY"))?;
        let token = given("AWS_SESSION_TOKEN").map(|token| format!("\naws_session_token={token}"));
        Ok(format!("aws_access_key_id={value}\naws_secret_access_key={secret}{}", token.unwrap_or_default()))
    }
}

fn header_of(kind: &CredentialKind, secret: &Secret) -> Result<Injected, CredentialError> {
    let text = secret.expose();
    let mut coded = None;
    let (name, value) = match kind {
        CredentialKind::ApiKey => (HeaderName::from_static("x-api-key"), text.to_owned()),
        CredentialKind::Bearer => (AUTHORIZATION, format!("Bearer {text}")),
        CredentialKind::Basic { username } => {
            let both = base64::engine::general_purpose::STANDARD.encode(format!("{username}:{text}"));
            coded = Some(Secret::new(both.clone()));
            (AUTHORIZATION, format!("Basic {both}"))
        }
        CredentialKind::Header { name, prefix } => {
            let unusable = |_| CredentialError::NoHeader(name.clone());
            (HeaderName::try_from(name.as_str()).map_err(unusable)?, format!("{prefix}{text}"))
        }
        CredentialKind::Aws => return Err(CredentialError::NoHeader("aws".to_owned())),
    };
    let mut value =
        HeaderValue::from_str(&value).map_err(|_| CredentialError::NoHeader(kind.as_str().to_owned()))?;
    value.set_sensitive(true);
    Ok(Injected { name, value, secrets: Secrets::of(std::iter::once(secret).chain(&coded)) })
}

async fn run(argv: &[String], who: &Identity) -> Result<String, CredentialError> {
    let program = argv.first().cloned().unwrap_or_default();
    let argv: Vec<PathBuf> = argv.iter().map(PathBuf::from).collect();
    let bounds = Bounds { wall: COMMAND_WAIT, output_bytes_max: BYTES_MAX };
    let output = run_as::run(&argv, who, b"", bounds).await?;
    // Its standard error is not repeated: it may hold what it should not.
    if output.code != 0 {
        return Err(CredentialError::CommandFailed { program, code: output.code });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The number of a user or group, from the machine's file.
fn id_of(file: &str, wanted: &str) -> Option<u32> {
    let text = std::fs::read_to_string(file).ok()?;
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(wanted)).then(|| fields.nth(1)?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests;
