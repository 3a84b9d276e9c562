//! The daemon's composition root: configuration → parts → run → drain. The caller owns socket, engine and
//! stop ([`run`]); [`serve`] is the caller for `hotcell serve`.

mod aside;
mod reload;
mod systemd;

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, UnixListener, UnixSocket};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::agent_bundle::Bundles;
use crate::api::{self, Api, peer::PeerListener};
use crate::cell::park::{Admission, Budgets, Pauses};
use crate::cell::record::Feeds;
use crate::cell::runtime::Tried;
use crate::cell::{Parts, Settings};
use crate::config::{Config, PolicyShelf, unknown_name};
use crate::daemon_log::{self, DaemonLog};
use crate::driver::{Driver, How, Shutdown};
use crate::engine::docker::Docker;
use crate::engine::{Engine, find_address};
use crate::gateway::egress::{CorporateProxy, EgressLimits, Network, further_roots};
use crate::gateway::packages::{CacheLimits, PackageCache};
use crate::gateway::{self, Egress, Gateway, Reach};
use crate::job::State;
use crate::journal;
use crate::metrics::Metrics;
use crate::money::Calendar;
use crate::notifier::Notifier;
use crate::policy::{Access, Defaults};
use crate::pricing::Prices;
use crate::selftest;
use crate::source;
use crate::store::Filter;
use crate::sweeper;

/// Longest wait for `initialize`: a cold disk reads 245 MB first.
const BOOT_MAX: Duration = Duration::from_secs(60);
/// How long a job's end may wait for answers of the model that nobody reads any more: they are read on to be
/// billed for what they really cost, and what is not seen by then is charged in full.
const DRAIN_MAX: Duration = Duration::from_secs(10);
/// Time for open connections to end after the jobs have.
const CLOSE_MAX: Duration = Duration::from_secs(5);

/// What the daemon's end may take beside the drain and the grace of agents.
const ENDING_SLACK: Duration = Duration::from_secs(60);

/// Connections that the kernel holds until they are accepted.
const LISTEN_BACKLOG: u32 = 1024;

/// What the caller of [`run`] listens on.
#[derive(Debug)]
pub struct Listeners {
    /// The API.
    pub api: UnixListener,
    /// Metrics over TCP, where asked for.
    pub metrics: Option<TcpListener>,
    /// SIGHUP, where it is watched: files are read again.
    pub hangup: Option<Signal>,
    /// Whether systemd is told how the daemon is (where it asked for that).
    pub systemd: bool,
}

/// `hotcell serve`: owns socket, signals and runtime.
///
/// # Errors
/// Whatever keeps the daemon from starting, in words for the person who started it.
pub fn serve(config: Config) -> anyhow::Result<()> {
    let log = start_log(&config.log, &make_state_dir(&config.state_dir)?)?;
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let ended = runtime.block_on(async move {
        let shutdown = Shutdown::default();
        watch_signals(shutdown.clone())?;
        let hangup = signal(SignalKind::hangup()).context("cannot watch SIGHUP")?;
        let address = find_address(config.engine.as_deref())?;
        let engine: Arc<dyn Engine> = Arc::new(Docker::connect(&address).await?);
        if let Some(policy) = &config.require_doctor {
            selftest::doctor(&config, policy.as_deref(), Arc::clone(&engine), &address, &shutdown).await?;
        }
        let handed_over = systemd::handed_over()?;
        let own_socket = handed_over.is_none().then(|| config.socket.clone());
        let listeners = Listeners {
            api: match handed_over {
                Some(listener) => listener,
                None => listen(&config.socket, config.socket_mode, config.socket_group)?,
            },
            metrics: match config.metrics {
                Some(at) => {
                    Some(TcpListener::bind(at).await.with_context(|| format!("cannot listen on {at}"))?)
                }
                None => None,
            },
            hangup: Some(hangup),
            systemd: true,
        };
        let ended = run(config, listeners, engine, address, shutdown).await;
        // One that was handed over stays systemd's.
        match own_socket.map_or(Ok(()), std::fs::remove_file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, "cannot remove the socket");
            }
            _ => {}
        }
        ended
    });
    // What a detach left on a blocking thread is put right by the next daemon.
    runtime.shutdown_timeout(CLOSE_MAX);
    if let Some(log) = log {
        log.flush();
    }
    ended
}

/// Runs a daemon until `shutdown`.
///
/// # Errors
/// Whatever keeps it from starting; once it serves, it ends well.
pub async fn run(
    config: Config,
    mut listeners: Listeners,
    engine: Arc<dyn Engine>,
    engine_address: String,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let (parts, policies, notifiers) = build(&config, engine).await?;
    // Before anything happens to a job.
    let targets = notifiers.iter().map(|one| one.target().name.clone()).collect();
    let dropped = parts.store.set_notifies(targets).await?;
    if dropped > 0 {
        tracing::warn!(
            dropped,
            "notices for targets that the configuration does not name any more are dropped"
        );
    }
    let slots = usize::try_from(config.limits.slots).unwrap_or(1);
    let (mut driver, handle) =
        Driver::new(parts.clone(), slots, Duration::from_secs(config.limits.drain_s.into()));
    parts.metrics.engine_up.set(1);
    let access = Access { rules: config.access.clone(), admin_uids: config.admin_uids.clone() };
    slot_limits(&parts, &access, &mut driver).await?;
    // Only now: the store's lock says that no other daemon is at it.
    sweeper::put_right(&parts.settings)
        .await
        .context("cannot put right what an earlier daemon was writing")?;
    driver.recover().await.context("cannot take up what an earlier daemon left")?;
    sweeper::once(&parts).await.context("cannot clean up what an earlier daemon left")?;

    // Ends after the driver: clients can follow their jobs to the end.
    let close = CancellationToken::new();
    let api = Arc::new(Api {
        parts: parts.clone(),
        driver: handle,
        policies,
        default_policy: config.defaults.policy.clone(),
        defaults: Defaults {
            model: config.defaults.model.clone(),
            image: config.defaults.image.clone(),
            provider: config.gateway.default_provider.clone(),
        },
        access,
        slots: config.limits.slots,
        retention: config.retention,
        queued_jobs_max: config.limits.queued_jobs_max.into(),
        engine_address,
        problems: RwLock::new(problems(&parts)),
        notifiers,
        shutdown: shutdown.clone(),
    });
    let (reloading, closing) = (api.clone(), close.clone());
    let (hangup, prices_file) = (listeners.hangup.take(), config.prices_file.clone());
    let systemd = listeners.systemd;
    let mut tasks = spawn_faces(&api, listeners, &close);
    tasks.spawn(async move {
        reload::run(reloading, hangup, prices_file, closing).await;
        "reload"
    });
    let (swept, told, closing) = (parts.clone(), api.driver.clone(), close.clone());
    tasks.spawn(async move {
        sweeper::run(swept, told, closing).await;
        "sweeper"
    });
    let (kept, closing) = (api.clone(), close.clone());
    tasks.spawn(async move {
        api::gc::run(kept, closing).await;
        "retention"
    });
    let (telling, closing) = (api.clone(), close.clone());
    tasks.spawn(async move {
        api::notices::run(telling, closing).await;
        "notices"
    });
    let ending = shutdown.clone();
    tasks.spawn(async move {
        driver.run(ending).await;
        "driver"
    });
    if systemd {
        let (api, ending, closing) = (api.clone(), shutdown.clone(), close.clone());
        let (drain_s, grace_s) = (config.limits.drain_s, config.limits.cancel_grace_s);
        let ending_max = Duration::from_secs(u64::from(drain_s) + u64::from(grace_s)) + ENDING_SLACK;
        tasks.spawn(async move {
            systemd::run(api, ending, ending_max, closing).await;
            "systemd"
        });
    }
    tracing::info!(socket = %config.socket.display(), slots, "hotcell serves");
    let failed = until_one_ends(tasks, &shutdown, &close).await;
    drop(api);
    // Whoever still has a clone is told that it is closed.
    let store = parts.store.clone();
    drop(parts);
    store.close().await?;
    match failed {
        Some(words) => bail!(words),
        None => Ok(()),
    }
}

/// Names of the daemon's tasks, which they give when they end.
type Tasks = JoinSet<&'static str>;

/// Serves the API, and metrics over TCP where asked for, until `close`.
fn spawn_faces(api: &Arc<Api>, listeners: Listeners, close: &CancellationToken) -> Tasks {
    let mut tasks = Tasks::new();
    let router = api::router(api.clone()).into_make_service_with_connect_info::<api::peer::Peer>();
    let closing = close.clone();
    tasks.spawn(async move {
        let served = axum::serve(PeerListener::new(listeners.api), router)
            .with_graceful_shutdown(closing.cancelled_owned());
        if let Err(error) = served.await {
            tracing::error!(%error, "the API ended");
        }
        "api"
    });
    if let Some(listener) = listeners.metrics {
        let (router, closing) = (api::metrics_router(api.clone()), close.clone());
        tasks.spawn(async move {
            let served = axum::serve(listener, router).with_graceful_shutdown(closing.cancelled_owned());
            if let Err(error) = served.await {
                tracing::error!(%error, "the metrics listener ended");
            }
            "metrics"
        });
    }
    tasks
}

/// The first task that ends is the driver after a drain; any other one, or a panic, ends the daemon, in words.
async fn until_one_ends(mut tasks: Tasks, shutdown: &Shutdown, close: &CancellationToken) -> Option<String> {
    let failed = match tasks.join_next().await {
        Some(Ok("driver")) if shutdown.has_begun() => None,
        Some(Ok(name)) => Some(format!("the {name} task ended by itself")),
        Some(Err(error)) => Some(format!("a task of the daemon died: {error}")),
        None => None,
    };
    shutdown.ask(How::Drain);
    close.cancel();
    let limit = if failed.is_some() { BOOT_MAX } else { CLOSE_MAX };
    let finish = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(limit, finish).await.is_err() {
        tasks.shutdown().await;
    }
    failed
}

/// Tells the loop how many jobs each user with open ones may run: as their entries say now, for the identity
/// that submitted them.
async fn slot_limits(parts: &Parts, access: &Access, driver: &mut Driver) -> anyhow::Result<()> {
    if access.rules.is_empty() {
        return Ok(());
    }
    let open = State::NAMES.iter().filter(|name| **name != "done").map(|name| (*name).to_owned()).collect();
    let mut filter = Filter { states: Some(open), ..Filter::default() };
    let mut told = BTreeSet::new();
    loop {
        let page = parts.store.jobs(filter.clone()).await?;
        // Newest first: the identity of the last submit counts, as it does while the daemon runs.
        for row in page.rows.iter().filter(|row| told.insert(row.identity.uid)) {
            // A user taken off the list keeps what was accepted, one job at a time.
            let slots = access.grant(&row.identity).map_or(Some(1), |grant| grant.slots);
            driver.limit(row.identity.uid, slots.and_then(|n| usize::try_from(n).ok()));
        }
        match page.next_cursor {
            Some(cursor) => filter.cursor = Some(cursor),
            None => return Ok(()),
        }
    }
}

async fn build(
    config: &Config,
    engine: Arc<dyn Engine>,
) -> anyhow::Result<(Arc<Parts>, Arc<PolicyShelf>, Vec<Notifier>)> {
    let state_dir = make_state_dir(&config.state_dir)?;
    check_init(&config.init_binary)?;
    let shelf = Arc::new(PolicyShelf::open(&config.policy_dirs, &config.egress_sets)?);
    let policies = shelf.now();
    if !policies.contains_key(&config.defaults.policy) {
        let known = policies.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        bail!("defaults.policy: there is no policy {:?} (there are: {known})", config.defaults.policy);
    }
    if let Some(problem) = unknown_name(&config.access, &policies.keys().map(String::as_str).collect()) {
        bail!(problem);
    }
    let prices = Arc::new(prices(config.prices_file.as_deref())?);
    let bundles = Bundles::new(&state_dir);
    let agent = match &config.defaults.agent {
        Some(version) => version.clone(),
        None => bundles.active()?.to_string(),
    };
    let models: Vec<String> = prices.names().map(str::to_owned).collect();
    let metrics = Arc::new(Metrics::new(&agent, &models)?);
    let settings = Settings {
        state_dir: state_dir.clone(),
        init_binary: config.init_binary.canonicalize().context("init_binary")?,
        boot_max: BOOT_MAX,
        cancel_grace: Duration::from_secs(config.limits.cancel_grace_s.into()),
        journal: journal_limits(config.limits.journal_bytes_max),
        disk_reserve_bytes: u64::from(config.limits.disk_reserve_mib) << 20,
        memory_reserve_bytes: u64::from(config.limits.memory_reserve_mib) << 20,
        agent: config.defaults.agent.clone(),
        caps: config.budgets.caps,
        calendar: Calendar::new(config.budgets.time_zone.as_deref())?,
    };
    let store = aside::open_store(&settings, config.set_store_aside).await?;
    let packages = packages(&state_dir, config.cache).await;
    let (egress, reach) = way_out(config, packages)?;
    let notifiers = config.notify.iter().map(|target| Notifier::new(target.clone(), &reach));
    let notifiers = notifiers.collect::<Result<Vec<_>, _>>()?;
    let limits = gateway::Limits { drain: DRAIN_MAX, ..gateway::Limits::default() };
    let gateway = Gateway::open(config.gateway.clone(), prices, limits, &reach).await?;
    let runtimes = Tried::load(&settings.state_dir);
    let source_limits = source::Limits {
        reserve_bytes: settings.disk_reserve_bytes,
        mirror_age_max: config.retention.mirror_age,
        mirrors_bytes_max: config.retention.mirrors_bytes_max,
        ..source::Limits::default()
    };
    let sources = Arc::new(source::Sources::new(settings.sources_dir(), source_limits));
    let (feeds, pauses) = (Feeds::default(), Arc::new(Pauses::default()));
    let (caps, calendar) = (settings.caps, settings.calendar.clone());
    let budgets = Arc::new(Budgets { store: store.clone(), caps, calendar });
    let admission: Vec<Arc<dyn Admission>> = vec![pauses.clone(), budgets];
    let parts = Parts {
        settings,
        store,
        engine,
        gateway,
        egress,
        metrics,
        bundles,
        feeds,
        runtimes,
        attached: Default::default(),
        space: Arc::default(),
        sources,
        admission,
        pauses,
    };
    Ok((Arc::new(parts), shelf, notifiers))
}

/// How hosts and providers are reached from here.
fn way_out(config: &Config, packages: Option<Arc<PackageCache>>) -> anyhow::Result<(Arc<Egress>, Reach)> {
    let network = &config.network;
    let ca_text = match &network.ca_file {
        Some(path) => Some(
            std::fs::read_to_string(path)
                .with_context(|| format!("network.ca_file: cannot read {}", path.display()))?,
        ),
        None => None,
    };
    let proxy = network.proxy.clone().map(|(host, port)| {
        tracing::warn!(
            "network.proxy {host}:{port}: names are decided here; which addresses they have is looked up and \
             checked by the proxy, not by hotcell"
        );
        CorporateProxy { host, port, except: network.no_proxy.clone() }
    });
    let extra_roots = ca_text.as_deref().map(further_roots).transpose()?.unwrap_or_default();
    let by = Network { proxy: proxy.clone(), mirrors: network.mirrors.clone(), ..Network::default() };
    let mut egress = Egress::new(by, EgressLimits::default(), ca_text.as_deref())?;
    if let Some(packages) = packages {
        egress = egress.with_packages(packages);
    }
    Ok((Arc::new(egress), Reach { proxy, extra_roots }))
}

/// What is kept of package hosts; none where the disk does not give it, without which jobs run all the same.
async fn packages(state_dir: &Path, limits: CacheLimits) -> Option<Arc<PackageCache>> {
    let dir = state_dir.join("packages");
    let opened = tokio::task::spawn_blocking(move || PackageCache::open(&dir, limits)).await;
    match opened.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
        Ok(cache) => Some(cache),
        Err(error) => {
            tracing::error!(%error, "the package cache cannot be opened: jobs fetch everything anew");
            None
        }
    }
}

/// A journal has at least four segments: smaller ones where the whole is small, or it would be larger than asked.
fn journal_limits(journal_bytes_max: u64) -> journal::Limits {
    let usual = journal::Limits::default();
    let segment_bytes_max = usual.segment_bytes_max.min(journal_bytes_max / 4);
    journal::Limits { journal_bytes_max, segment_bytes_max }
}

fn prices(file: Option<&Path>) -> anyhow::Result<Prices> {
    match file {
        None => Ok(Prices::built_in()?),
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("prices_file: cannot read {}", path.display()))?;
            Ok(Prices::parse(&text, &path.display().to_string())?)
        }
    }
}

/// The state directory, canonical, of our own and closed to everybody else: it holds tokens and keys of cells.
///
/// # Errors
/// When it cannot be made or is somebody else's.
pub fn make_state_dir(path: &Path) -> anyhow::Result<PathBuf> {
    let shown = path.display();
    if !path.exists() {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .with_context(|| format!("state_dir: cannot create {shown}"))?;
    }
    let path = path.canonicalize().with_context(|| format!("state_dir: cannot resolve {shown}"))?;
    let meta = std::fs::metadata(&path).with_context(|| format!("state_dir: cannot read {shown}"))?;
    if !meta.is_dir() {
        bail!("state_dir: {shown} is not a directory");
    }
    // Others may pass through (cells' mounts lie below), but neither list nor write.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o711))
        .with_context(|| format!("state_dir: {shown} is not ours"))?;
    for name in ["jobs", "cells", "images", "agents", "audit"] {
        let dir = path.join(name);
        if !dir.exists() {
            let mode = if matches!(name, "jobs" | "audit") { 0o700 } else { 0o711 };
            std::fs::DirBuilder::new()
                .mode(mode)
                .create(&dir)
                .with_context(|| format!("cannot create {}", dir.display()))?;
        }
    }
    Ok(path)
}

/// A PID 1 that needs a loader would not run in another image.
fn check_init(path: &Path) -> anyhow::Result<()> {
    let shown = path.display();
    let bytes = std::fs::read(path).with_context(|| {
        format!("init_binary: cannot read {shown}; `make build` puts hotcell-init beside hotcell")
    })?;
    if !bytes.starts_with(b"\x7fELF") {
        bail!("init_binary: {shown} is no program of this system");
    }
    if bytes.windows(7).any(|w| w == b"/ld-lin" || w == b"/ld-mus") {
        bail!("init_binary: {shown} is linked dynamically; build it with `make init`");
    }
    Ok(())
}

fn problems(parts: &Parts) -> Vec<String> {
    match parts.bundles.ls() {
        Ok(bundles) if bundles.is_empty() => {
            vec!["no agent is installed: run `hotcell image build`".to_owned()]
        }
        Ok(_) => Vec::new(),
        Err(error) => vec![error.to_string()],
    }
}

/// Takes the socket's path over from a daemon that died; a live one is left alone.
fn listen(path: &Path, mode: u32, group: Option<u32>) -> anyhow::Result<UnixListener> {
    let shown = path.display();
    if let Some(dir) = path.parent().filter(|d| !d.exists()) {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(dir)
            .with_context(|| format!("socket: cannot create {}", dir.display()))?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => bail!("socket: {shown} is there and is not a socket"),
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            bail!(
                "socket: a daemon already serves on {shown}; stop it first, or choose another --socket and --state-dir"
            )
        }
        Ok(_) => std::fs::remove_file(path).with_context(|| format!("socket: cannot replace {shown}"))?,
        Err(_) => {}
    }
    let fresh = path.with_extension("new");
    let _ = std::fs::remove_file(&fresh);
    let failed = || format!("socket: cannot listen on {shown}");
    let socket = UnixSocket::new_stream().with_context(failed)?;
    socket.bind(&fresh).with_context(failed)?;
    // Nobody can connect before `listen`, and by then group and mode are there.
    if let Some(group) = group {
        std::os::unix::fs::chown(&fresh, None, Some(group)).with_context(|| {
            let _ = std::fs::remove_file(&fresh);
            format!(
                "socket_group: cannot give {shown} to group {group}; only root, or a member of it, can do that"
            )
        })?;
    }
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(mode))?;
    let listener = socket.listen(LISTEN_BACKLOG).with_context(failed)?;
    std::fs::rename(&fresh, path).with_context(failed)?;
    Ok(listener)
}

/// A model's answer under way is two descriptors: the usual limit of 1,024 would end at 500 answers.
fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// SIGTERM or SIGINT drains, SIGQUIT detaches; a second one hurries.
fn watch_signals(shutdown: Shutdown) -> anyhow::Result<()> {
    let mut term = signal(SignalKind::terminate()).context("cannot watch SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("cannot watch SIGINT")?;
    let mut quit = signal(SignalKind::quit()).context("cannot watch SIGQUIT")?;
    // Lives as long as the process: there is nothing to wait for at its end.
    drop(tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = term.recv() => shutdown.terminate(),
                _ = int.recv() => shutdown.terminate(),
                _ = quit.recv() => shutdown.quit(),
            }
        }
    }));
    Ok(())
}

/// Logs to standard error in words and to the state directory as JSON, the latter as long as it can.
fn start_log(filter: &str, state_dir: &Path) -> anyhow::Result<Option<Arc<DaemonLog>>> {
    use tracing_subscriber::fmt::layer;
    use tracing_subscriber::layer::SubscriberExt;
    use tracing_subscriber::util::SubscriberInitExt;
    let filter = tracing_subscriber::EnvFilter::try_new(filter).context("log")?;
    let (file, problem) = match DaemonLog::open(&daemon_log::dir(state_dir)) {
        Ok(file) => (Some(file), None),
        Err(error) => (None, Some(error)),
    };
    let log = tracing_subscriber::registry()
        .with(filter)
        .with(layer().with_writer(io::stderr).with_ansi(false))
        .with(file.clone().map(|file| layer().json().with_writer(file)));
    // A second daemon in one process (a test) keeps the first one's log.
    let _ = log.try_init();
    if let Some(error) = problem {
        tracing::error!(%error, "the log is kept on standard error only");
    }
    Ok(file)
}
