//! The configuration of a daemon and the socket that a client looks for. Every setting has one key, and from
//! it come its three places: the key in the TOML file, the variable `HOTCELL_<KEY>` and the flag `--<key>`.
//! A flag wins over a variable, that over the file, that over the default. Reads the file, the environment
//! it is given and nothing else; never reads a credential, only where one is to be found.

mod access;
mod budgets;
mod cache;
mod network;
mod notify;
mod policies;
mod providers;
mod raw;
mod retention;
mod sets;
mod settings;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

pub use access::{Names, unknown_name};
pub use budgets::Budgets;
pub use network::Network;
pub use policies::{
    BrokenPolicy, PolicyFileError, PolicyListing, PolicyOrigin, PolicyShelf, PolicySource, policy_sources,
    read_policy_text,
};
pub use providers::{BUILT_IN as BUILT_IN_PROVIDER, anthropic};
pub use sets::egress_sets;
pub use settings::{SETTINGS, Setting};

use crate::gateway::GatewayConfig;
use crate::gateway::packages::CacheLimits;
use raw::Layers;

use crate::policy::Sets;
use crate::policy::access::Rule;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// TOML, an unknown key or a wrong type.
    #[error("the configuration {} is not valid: {detail}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The parser's words, with line, column and the line itself.
        detail: String,
    },
    /// A value outside its limit.
    #[error("{key}: {problem}, from {origin} (set it with {places})")]
    Value {
        /// The key, with dots for nesting.
        key: &'static str,
        /// What is wrong and what is allowed.
        problem: String,
        /// Where the value came from: flag, variable, or file and line.
        origin: String,
        /// The three places where it can be set.
        places: String,
    },
    /// A wrong value in one of several entries, which only the file can have.
    #[error("{origin}: {key}: {problem}")]
    Entry {
        /// File and line.
        origin: String,
        /// The entry and its key.
        key: String,
        /// What is wrong and what is allowed.
        problem: String,
    },
}

/// What the machine and the caller's process say: an argument, so that tests can give another one.
#[derive(Debug, Clone, Default)]
pub struct Machine {
    /// Environment variables (those that are UTF-8).
    pub vars: BTreeMap<String, String>,
    /// True for uid 0.
    pub root: bool,
    /// Processor cores; at least 1.
    pub cores: u32,
    /// The directory of the running executable.
    pub exe_dir: Option<PathBuf>,
}

impl Machine {
    /// This process on this machine.
    pub fn current() -> Self {
        let text = |(k, v): (std::ffi::OsString, std::ffi::OsString)| {
            Some((k.into_string().ok()?, v.into_string().ok()?))
        };
        Self {
            vars: std::env::vars_os().filter_map(text).collect(),
            root: rustix::process::geteuid().is_root(),
            cores: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
            exe_dir: std::env::current_exe().ok().and_then(|p| Some(p.parent()?.to_owned())),
        }
    }

    /// A variable that is set and not empty.
    pub fn var(&self, name: &str) -> Option<&str> {
        self.vars.get(name).map(String::as_str).filter(|v| !v.is_empty())
    }

    /// `$<xdg>`, or `$HOME/<below>`; only absolute paths count.
    fn xdg(&self, xdg: &str, below: &str) -> Option<PathBuf> {
        let absolute = |p: PathBuf| Some(p).filter(|p| p.is_absolute());
        self.var(xdg)
            .and_then(|dir| absolute(dir.into()))
            .or_else(|| self.var("HOME").and_then(|home| absolute(Path::new(home).join(below))))
    }

    fn config_dir(&self) -> Option<PathBuf> {
        if self.root {
            return Some("/etc/hotcell".into());
        }
        self.xdg("XDG_CONFIG_HOME", ".config").map(|dir| dir.join("hotcell"))
    }
}

/// What the command line says about the configuration.
#[derive(Debug, Clone, Default)]
pub struct Flags {
    /// `--config`.
    pub config: Option<PathBuf>,
    /// Values by the key of their [`Setting`].
    pub values: BTreeMap<&'static str, String>,
}

/// Where the provider's API key is to be found. Never the key itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ApiKeySource {
    /// A variable of the daemon's environment.
    Env(String),
    /// A file; its content without the final line feed.
    File(PathBuf),
    /// A command for `/bin/sh -c`; its output without the final line feed.
    Command(String),
}

/// What a job gets that names nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defaults {
    /// The policy's name.
    pub policy: String,
    /// The model.
    pub model: String,
    /// The image's reference.
    pub image: String,
    /// The version of the agent bundle; the active one where absent.
    pub agent: Option<String>,
}

/// Bounds of the daemon itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Jobs that run at the same time.
    pub slots: u32,
    /// Jobs that may wait; more are refused.
    pub queued_jobs_max: u32,
    /// Bytes of one job's journal; its middle is dropped above.
    pub journal_bytes_max: u64,
    /// Seconds between asking an agent to end and killing it.
    pub cancel_grace_s: u32,
    /// Seconds that running jobs get when the daemon is told to stop.
    pub drain_s: u32,
    /// MiB of the state directory's file system that jobs must leave free.
    pub disk_reserve_mib: u32,
    /// MiB of memory that must be free beside what a job needs before a further one starts.
    pub memory_reserve_mib: u32,
}

/// The configuration of a daemon, with nothing left open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The file it was read from, where there was one.
    pub file: Option<PathBuf>,
    /// Database, journals, bundles, cells.
    pub state_dir: PathBuf,
    /// The API's unix socket; at most 107 bytes.
    pub socket: PathBuf,
    /// Its permission bits.
    pub socket_mode: u32,
    /// Host group id it is given; the daemon's own where absent.
    pub socket_group: Option<u32>,
    /// The container engine, `unix:///path`; the daemon searches where absent.
    pub engine: Option<String>,
    /// Where `/metrics` is served over TCP as well.
    pub metrics: Option<SocketAddr>,
    /// Directories of policy files; a later one wins over an earlier one and over the built-in ones.
    pub policy_dirs: Vec<PathBuf>,
    /// Sets of hosts that policies may name.
    pub egress_sets: Sets,
    /// Prices instead of the built-in ones.
    pub prices_file: Option<PathBuf>,
    /// The model providers and all credentials.
    pub gateway: GatewayConfig,
    /// What a job gets that names nothing else.
    pub defaults: Defaults,
    /// The way to the internet.
    pub network: Network,
    /// How much of what package hosts answered is kept.
    pub cache: CacheLimits,
    /// How long, and how much of it, what jobs leave is kept.
    pub retention: crate::retention::Limits,
    /// Bounds.
    pub limits: Limits,
    /// Money of users and of the daemon.
    pub budgets: Budgets,
    /// Host user ids that see and cancel everybody's jobs.
    pub admin_uids: Vec<u32>,
    /// Who may use what; empty: everybody who can open the socket may use everything.
    pub access: Vec<Rule>,
    /// Who is told of what happens to jobs.
    pub notify: Vec<crate::notice::Target>,
    /// The static PID 1 of a cell.
    pub init_binary: PathBuf,
    /// Filter of the daemon's log, as `tracing` writes it.
    pub log: String,
    /// A damaged store is moved out of the way. No setting: `hotcell serve --set-store-aside`, for one start.
    pub set_store_aside: bool,
    /// The doctor must find no fault before the daemon starts, under this policy or the default one. No setting:
    /// `hotcell serve --require-doctor`, for one start.
    pub require_doctor: Option<Option<String>>,
}

impl Config {
    /// Reads the configuration.
    ///
    /// # Errors
    /// [`ConfigError`]; a value outside its limit names where it came from and all places to set it.
    pub fn load(flags: &Flags, machine: &Machine) -> Result<Self, ConfigError> {
        let (layers, raw) = Layers::read(flags, machine)?;
        let state_dir = state_dir(&layers, &raw.state_dir)?;
        let socket = socket(&layers, &raw.socket, Some(&state_dir))?;
        let config_dir = machine.config_dir();
        let socket_group = layers.checked("socket_group", &raw.socket_group, parse_group)?;
        let beside = || machine.exe_dir.as_ref().map(|dir| dir.join("hotcell-init"));
        Ok(Self {
            socket,
            // Without a group of its own the socket has the daemon's, which half the machine may be in.
            socket_mode: layers
                .checked("socket_mode", &raw.socket_mode, parse_mode)?
                .unwrap_or(if socket_group.is_some() { 0o660 } else { 0o600 }),
            socket_group,
            engine: layers.checked("engine", &raw.engine, parse_engine)?,
            metrics: layers.checked("metrics", &raw.metrics, parse_metrics)?,
            policy_dirs: layers
                .list("policy_dirs", &raw.policy_dirs, ':', absolute)?
                .unwrap_or_else(|| config_dir.iter().map(|dir| dir.join("policies")).collect()),
            egress_sets: sets::read(&layers, raw.egress_set)?,
            prices_file: layers.checked("prices_file", &raw.prices_file, absolute)?,
            gateway: providers::gateway(
                &layers,
                raw.provider,
                raw.credential,
                layers.name("defaults.provider", &raw.defaults.provider)?,
            )?,
            defaults: Defaults {
                policy: layers.name("defaults.policy", &raw.defaults.policy)?.unwrap_or("default".into()),
                model: layers
                    .name("defaults.model", &raw.defaults.model)?
                    .unwrap_or("claude-sonnet-4-6".into()),
                image: layers.name("defaults.image", &raw.defaults.image)?.unwrap_or("hotcell/cell".into()),
                agent: layers.name("defaults.agent", &raw.defaults.agent)?,
            },
            network: Network::read(&layers, &raw.network)?,
            cache: cache::limits(&layers, &raw.cache)?,
            retention: retention::limits(&layers, &raw.retention)?,
            limits: limits(&layers, &raw.limits, machine.cores)?,
            budgets: budgets::budgets(&layers, &raw.budgets)?,
            admin_uids: layers
                .list("admin_uids", &raw.admin_uids, ',', |text| {
                    text.parse().map_err(|_| format!("{text:?} is not a user id"))
                })?
                .unwrap_or_else(|| vec![0]),
            access: layers.access(&raw.access)?,
            notify: layers.notify(&raw.notify)?,
            init_binary: layers
                .checked("init_binary", &raw.init_binary, absolute)?
                .or_else(beside)
                .ok_or_else(|| layers.missing("init_binary", "the path of this executable is not known"))?,
            log: layers.checked("log", &raw.log, parse_log)?.unwrap_or_else(|| "info".into()),
            file: layers.found,
            set_store_aside: false,
            require_doctor: None,
            state_dir,
        })
    }
}

/// The socket that a client connects to: the configured one; else, for a user without a daemon of their own
/// running, the system's where it exists.
///
/// # Errors
/// [`ConfigError`] where the file cannot be read or the path cannot be a socket's.
pub fn client_socket(flags: &Flags, machine: &Machine) -> Result<PathBuf, ConfigError> {
    // A socket named outright needs no file, which might not be readable for this user.
    let bare = Layers::without_file(flags, machine);
    if bare.is_given("socket") {
        return socket(&bare, &None, None);
    }
    let (layers, raw) = Layers::read(flags, machine)?;
    let state_dir = state_dir(&layers, &raw.state_dir);
    let path = socket(&layers, &raw.socket, state_dir.as_deref().ok());
    if raw.socket.is_none() && !machine.root {
        let system = PathBuf::from(SYSTEM_SOCKET);
        match &path {
            Ok(own) if own.exists() || !system.exists() => {}
            Ok(_) | Err(_) => return Ok(system),
        }
    }
    path
}

const SYSTEM_SOCKET: &str = "/run/hotcell/hotcell.sock";

/// Longest path of a unix socket, in bytes (`sun_path` without its NUL).
const SOCKET_PATH_BYTES_MAX: usize = 107;

fn state_dir(layers: &Layers<'_>, raw: &raw::Opt<String>) -> Result<PathBuf, ConfigError> {
    if let Some(dir) = layers.checked("state_dir", raw, absolute)? {
        return Ok(dir);
    }
    if layers.machine.root {
        return Ok("/var/lib/hotcell".into());
    }
    let dir = layers.machine.xdg("XDG_STATE_HOME", ".local/state");
    dir.map(|dir| dir.join("hotcell"))
        .ok_or_else(|| layers.missing("state_dir", "neither XDG_STATE_HOME nor HOME is an absolute path"))
}

fn socket(
    layers: &Layers<'_>,
    raw: &raw::Opt<String>,
    state_dir: Option<&Path>,
) -> Result<PathBuf, ConfigError> {
    if let Some(path) = layers.checked("socket", raw, socket_path)? {
        return Ok(path);
    }
    if layers.machine.root {
        return Ok(SYSTEM_SOCKET.into());
    }
    let runtime = layers.machine.var("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|p| p.is_absolute());
    let path = runtime.as_deref().or(state_dir).map(|dir| dir.join("hotcell.sock"));
    let path = path.ok_or_else(|| layers.missing("socket", "neither XDG_RUNTIME_DIR nor HOME is set"))?;
    let text = path.to_string_lossy();
    socket_path(&text).map_err(|problem| layers.missing("socket", &problem))
}

fn limits(layers: &Layers<'_>, raw: &raw::RawLimits, cores: u32) -> Result<Limits, ConfigError> {
    let number = |key, value, range, default: u64| layers.number(key, value, range, default);
    let small = |key, value, range, default: u64| number(key, value, range, default).map(|n| n as u32);
    Ok(Limits {
        slots: small("limits.slots", &raw.slots, 1..=4096, u64::from(cores.clamp(1, 4096)))?,
        queued_jobs_max: small("limits.queued_jobs_max", &raw.queued_jobs_max, 1..=1_000_000, 10_000)?,
        journal_bytes_max: number(
            "limits.journal_bytes_max",
            &raw.journal_bytes_max,
            (1 << 20)..=(1 << 40),
            256 << 20,
        )?,
        cancel_grace_s: small("limits.cancel_grace_s", &raw.cancel_grace_s, 0..=600, 10)?,
        drain_s: small("limits.drain_s", &raw.drain_s, 0..=86_400, 60)?,
        disk_reserve_mib: small("limits.disk_reserve_mib", &raw.disk_reserve_mib, 0..=(1 << 24), 1024)?,
        memory_reserve_mib: small("limits.memory_reserve_mib", &raw.memory_reserve_mib, 0..=(1 << 24), 512)?,
    })
}

fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err(format!("{text:?} is not an absolute path")) }
}

fn socket_path(text: &str) -> Result<PathBuf, String> {
    // Clients and tests name sockets where they stand: a relative path is made absolute, not refused.
    let path = std::path::absolute(text).map_err(|e| format!("{text:?} is not a path: {e}"))?;
    let bytes = path.as_os_str().len();
    if bytes > SOCKET_PATH_BYTES_MAX {
        return Err(format!(
            "the path {} has {bytes} bytes; a unix socket's may have at most {SOCKET_PATH_BYTES_MAX}",
            path.display()
        ));
    }
    Ok(path)
}

fn parse_mode(text: &str) -> Result<u32, String> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    match u32::from_str_radix(digits, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        Ok(_) | Err(_) => Err(format!("{text:?} is not a file mode in octal, such as \"0660\"")),
    }
}

fn parse_group(text: &str) -> Result<u32, String> {
    let unknown = || format!("there is no group {text:?} on this machine; a number is an id");
    text.parse().ok().or_else(|| Names::of_machine().gid(text)).ok_or_else(unknown)
}

fn parse_engine(text: &str) -> Result<String, String> {
    let path = text.strip_prefix("unix://").unwrap_or(text);
    if path.starts_with('/') {
        return Ok(format!("unix://{path}"));
    }
    Err(format!("{text:?} is not the address of a unix socket, such as unix:///var/run/docker.sock"))
}

fn parse_metrics(text: &str) -> Result<SocketAddr, String> {
    let port_only = text.strip_prefix(':').unwrap_or(text);
    if let Ok(port) = port_only.parse::<u16>() {
        return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
    }
    text.parse()
        .map_err(|_| format!("{text:?} is neither a port (of 127.0.0.1) nor an address such as 0.0.0.0:9100"))
}

fn parse_base_url(text: &str) -> Result<String, String> {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let rest = rest.ok_or_else(|| format!("{text:?} begins with neither https:// nor http://"))?;
    let host = rest.split('/').next().unwrap_or("");
    // The text of a URL that holds a password must not be repeated.
    if host.contains('@') {
        return Err(
            "the URL holds a user name; a credential belongs into api_key_env, _file or _command".into()
        );
    }
    if host.is_empty() || rest.contains(|c: char| c.is_whitespace() || c.is_control() || "?#".contains(c)) {
        return Err(format!("{text:?} is not the base of a URL, such as https://api.anthropic.com"));
    }
    Ok(text.trim_end_matches('/').to_owned())
}

fn parse_log(text: &str) -> Result<String, String> {
    match tracing_subscriber::EnvFilter::try_new(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(e) => Err(format!("{text:?} is not a log filter such as \"info,hotcell=debug\": {e}")),
    }
}

#[cfg(test)]
mod tests;
