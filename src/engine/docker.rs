//! The Docker Engine API (1.41 and newer, Podman's compatible socket as far as it goes) behind `Engine`. The
//! only file that names bollard. It must never retry what could happen twice, never start a container that
//! was not made from `config`, and never report a container as gone before the engine has denied knowing it.
//!
//! Traps that shaped it: `/wait?condition=next-exit` can miss an exit, so `wait` asks for `not-running`
//! after the start, and the kernel is asked as well (`processes`), since an engine whose containerd died says `running`
//! of what is dead; a removal answers before it has happened, or with "already in progress" or "busy", so it
//! is repeated until inspect says 404; engines serialise creates and removes, so each has a limit of its own.

mod extend;
mod images;
mod sealed;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

// The submodule says `client`, so that this file stays the only one to name the library.
use bollard as client;
use client::container::LogOutput;
use client::errors::Error as ApiError;
use client::models::{ContainerCreateBody, ContainerInspectResponse};
use client::query_parameters as query;
use futures_util::StreamExt;
use serde_json::Value;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use self::images::IMAGE_MS_MAX;
use super::{
    BOOT_BYTES_MAX, BuildSpec, CellSpec, ContainerId, Engine, EngineError, EngineInfo, Exit, Extend, Found,
    ImageInfo, LABEL_BUILD, LABEL_CELL, LABEL_INSTANCE, Progress, Reply, RuntimeInfo, SealedBuild, address,
    config, container_name, normalise_arch, processes, tail,
};
use crate::failpoint;
use crate::job::{InstanceId, JobId};

/// Questions: info, inspect, list, tag.
const ASK_MS_MAX: u64 = 15_000;
/// Creating a container; engines under load take seconds.
const CREATE_MS_MAX: u64 = 60_000;
/// Starting one, its runtime included.
const START_MS_MAX: u64 = 60_000;
/// From the start until the engine has taken the boot bytes.
const BOOT_MS_MAX: u64 = 10_000;
/// From then until it says that it has passed them on, which it may not say at all.
const CLOSE_MS_MAX: u64 = 250;
/// SIGKILL; an engine whose containerd hangs took 12 s.
const KILL_MS_MAX: u64 = 20_000;
/// From a SIGKILL past the engine until all processes have ended.
const END_MS_MAX: u64 = 5_000;
/// From the end of a container's first process until the engine knows how it ended.
const TOLD_MS_MAX: u64 = 5_000;
/// From the removal of a container until its first process is seen to have ended.
const ENDED_MS_MAX: u64 = 100;
/// Removing a container, all tries together.
const REMOVE_MS_MAX: u64 = 30_000;
/// Pauses between tries of a removal, in milliseconds: doubled from the first to the second.
const REMOVE_PAUSE_MS: (u64, u64) = (20, 1_000);
/// One long poll of `wait`; then the state is read afresh, so that a lost event costs no more than this.
const WAIT_POLL_MS_MAX: u64 = 300_000;
/// Reading what a dead PID 1 left on its standard error.
const TAIL_MS_MAX: u64 = 1_000;
/// Creates at one time.
const CREATES_MAX: usize = 4;
/// Removals at one time: parallel ones push creates over 10 s.
const REMOVES_MAX: usize = 2;

/// A connection to a Docker-compatible engine. Requests connect anew, so it outlives restarts of the engine.
pub struct Docker {
    api: client::Docker,
    address: String,
    creates: Semaphore,
    removes: Semaphore,
    /// Readers of standard error, by container: ended and taken by `wait`, or aborted by `remove`.
    tails: Mutex<HashMap<ContainerId, JoinHandle<String>>>,
    /// First processes of containers that are waited for.
    firsts: Mutex<HashMap<ContainerId, First>>,
    /// The kernel has shown a container's processes here: what it does not show any more has ended.
    sees: AtomicBool,
}

/// The first process of a container.
#[derive(Clone)]
struct First {
    pid: u32,
    /// Readable once it has ended.
    ended: Arc<AsyncFd<OwnedFd>>,
}

impl Docker {
    /// Connects to the engine at `address` (`unix:///path`) and agrees on an API version.
    ///
    /// # Errors
    /// `UnsupportedAddress`, `Unavailable`, `Timeout`.
    pub async fn connect(address: &str) -> Result<Self, EngineError> {
        let path = address::socket_path(address)?;
        // The client's own limit covers response headers alone; each call here has a tighter one.
        let limit_s = IMAGE_MS_MAX / 1_000;
        let api = client::Docker::connect_with_unix(path, limit_s, client::API_DEFAULT_VERSION)
            .map_err(|e| translate(address, "connect", e))?;
        let api = timeout(Duration::from_millis(ASK_MS_MAX), api.negotiate_version())
            .await
            .map_err(|_| EngineError::Timeout { what: "connect", after_ms: ASK_MS_MAX })?
            .map_err(|e| translate(address, "connect", e))?;
        Ok(Self {
            api,
            address: address.to_owned(),
            creates: Semaphore::new(CREATES_MAX),
            removes: Semaphore::new(REMOVES_MAX),
            tails: Mutex::new(HashMap::new()),
            firsts: Mutex::new(HashMap::new()),
            sees: AtomicBool::new(false),
        })
    }

    /// Where it is connected to.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// One call, with its limit and its errors in our words.
    async fn call<T>(
        &self,
        what: &'static str,
        ms_max: u64,
        call: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, EngineError> {
        failpoint::pass("engine: before a call");
        let answer = timeout(Duration::from_millis(ms_max), call).await;
        failpoint::pass("engine: after a call");
        match answer {
            Ok(result) => result.map_err(|e| translate(&self.address, what, e)),
            Err(_) => Err(EngineError::Timeout { what, after_ms: ms_max }),
        }
    }

    async fn inspect(&self, container: &ContainerId) -> Result<ContainerInspectResponse, EngineError> {
        let call = self.api.inspect_container(container.as_str(), None::<query::InspectContainerOptions>);
        self.call("inspect a container", ASK_MS_MAX, call).await
    }

    async fn ask_info(&self) -> Result<EngineInfo, EngineError> {
        let info = self.call("describe itself", ASK_MS_MAX, self.api.info()).await?;
        let version = self.call("tell its version", ASK_MS_MAX, self.api.version()).await?;
        let runtime = |(name, runtime): (String, client::models::Runtime)| {
            let path = runtime.path.unwrap_or_default().into();
            (name, RuntimeInfo { path, args: runtime.runtime_args.unwrap_or_default() })
        };
        let runtimes = info.runtimes.unwrap_or_default().into_iter().map(runtime).collect();
        let components = version.components.unwrap_or_default().into_iter();
        let told = |component: client::models::SystemVersionComponents| {
            // A distribution puts the whole version of its package in the place of the commit.
            let package = component.details.and_then(|mut details| details.remove("GitCommit"));
            let package = package.filter(|text| text.starts_with(&component.version));
            (component.name, package.unwrap_or(component.version))
        };
        Ok(EngineInfo {
            version: version.version.or(info.server_version).unwrap_or_default(),
            api_version: version.api_version.unwrap_or_default(),
            arch: normalise_arch(&info.architecture.unwrap_or_default()),
            os: info.os_type.unwrap_or_default(),
            runtimes,
            default_runtime: info.default_runtime.unwrap_or_default(),
            cgroup_version: info.cgroup_version.map(|v| v.to_string()).unwrap_or_default(),
            root_dir: info.docker_root_dir.unwrap_or_default().into(),
            components: components.map(told).collect(),
            security: info.security_options.unwrap_or_default(),
            kernel: version.kernel_version.or(info.kernel_version).unwrap_or_default(),
        })
    }

    async fn create_cell(&self, spec: &CellSpec) -> Result<ContainerId, EngineError> {
        let asked = config::container_config(spec)?;
        let body = parse_body(asked.clone())?;
        let name = container_name(&spec.instance, &spec.cell);
        let options = query::CreateContainerOptionsBuilder::new().name(name.as_str()).build();
        let _permit = self.creates.acquire().await.map_err(closed)?;
        let call = self.api.create_container(Some(options), body);
        match self.call("create a container", CREATE_MS_MAX, call).await {
            Ok(made) => {
                for warning in &made.warnings {
                    tracing::warn!(container = %name, %warning, "the engine warned about a cell");
                }
                let id = ContainerId::new(made.id);
                let applied = match self.inspect(&id).await {
                    Ok(found) => check_applied(&asked, &found),
                    Err(e) => Err(e),
                };
                if let Err(e) = applied {
                    self.remove_container(&id).await?;
                    return Err(e);
                }
                Ok(id)
            }
            Err(EngineError::NotFound { .. }) => {
                Err(EngineError::ImageMissing { image: spec.image_id.clone() })
            }
            Err(EngineError::Conflict { what, message }) => {
                let found = self.inspect(&name).await?;
                if !is_same_cell(&found, spec) {
                    return Err(EngineError::Conflict { what, message });
                }
                check_applied(&asked, &found)?;
                Ok(found.id.map_or(name, ContainerId::new))
            }
            Err(e) => Err(e),
        }
    }

    async fn start_cell(&self, container: &ContainerId, boot: &[u8]) -> Result<(), EngineError> {
        if boot.len() > BOOT_BYTES_MAX {
            let reason = format!("{} boot bytes are more than {BOOT_BYTES_MAX}", boot.len());
            return Err(EngineError::BadSpec { reason });
        }
        let options = query::AttachContainerOptionsBuilder::new().stream(true).stdin(true).build();
        let call = self.api.attach_container(container.as_str(), Some(options));
        let mut stdin = self.call("attach to a container", ASK_MS_MAX, call).await?;
        self.watch_stderr(container).await?;
        let call = self.api.start_container(container.as_str(), None::<query::StartContainerOptions>);
        if let Err(e) = self.call("start a container", START_MS_MAX, call).await {
            self.drop_tail(container);
            return Err(match e {
                EngineError::Refused { message, .. } => EngineError::StartFailed { message },
                // Runtimes say 404 for a program that is not in the image.
                EngineError::NotFound { message, .. } if !message.contains("No such container") => {
                    EngineError::StartFailed { message }
                }
                e => e,
            });
        }
        let deliver = async {
            stdin.input.write_all(boot).await?;
            stdin.input.shutdown().await
        };
        match timeout(Duration::from_millis(BOOT_MS_MAX), deliver).await {
            Ok(Ok(())) => {
                // The engine closes the connection once it has passed everything on; but where its handler of the
                // attach was slower than the start, only when the container ends (one start in fifty, measured
                // under load on 20.10). What it has not read by then is in its socket: closing ours loses nothing.
                let closed = async { while stdin.output.next().await.is_some() {} };
                let _ = timeout(Duration::from_millis(CLOSE_MS_MAX), closed).await;
                Ok(())
            }
            Ok(Err(e)) => {
                // PID 1 ended before it read them; the runtime may have said why.
                let tail = self.take_tail(container).await;
                let message =
                    tail::exec_failure(&tail).unwrap_or_else(|| format!("PID 1 took no boot bytes: {e}"));
                Err(EngineError::StartFailed { message })
            }
            Err(_) => Err(EngineError::Timeout { what: "deliver the boot bytes", after_ms: BOOT_MS_MAX }),
        }
    }

    /// Keeps the end of PID 1's standard error: it is the only place where a runtime says that `execve` failed.
    async fn watch_stderr(&self, container: &ContainerId) -> Result<(), EngineError> {
        let options = query::AttachContainerOptionsBuilder::new().stream(true).stderr(true).build();
        let call = self.api.attach_container(container.as_str(), Some(options));
        let attached = self.call("attach to a container", ASK_MS_MAX, call).await?;
        let input = attached.input;
        let output = attached.output.take_while(|frame| std::future::ready(frame.is_ok()));
        let chunks = Box::pin(output.map(|frame| frame.map(LogOutput::into_bytes).unwrap_or_default()));
        let task = tokio::spawn(async move {
            let text = tail::collect(chunks).await;
            drop(input);
            text
        });
        if let Some(old) = self.tails().insert(container.clone(), task) {
            old.abort();
        }
        Ok(())
    }

    fn tails(&self) -> std::sync::MutexGuard<'_, HashMap<ContainerId, JoinHandle<String>>> {
        self.tails.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn drop_tail(&self, container: &ContainerId) {
        if let Some(task) = self.tails().remove(container) {
            task.abort();
        }
    }

    async fn take_tail(&self, container: &ContainerId) -> String {
        let Some(mut task) = self.tails().remove(container) else { return String::new() };
        match timeout(Duration::from_millis(TAIL_MS_MAX), &mut task).await {
            Ok(text) => text.unwrap_or_default(),
            Err(_) => {
                task.abort();
                String::new()
            }
        }
    }

    fn firsts(&self) -> std::sync::MutexGuard<'_, HashMap<ContainerId, First>> {
        self.firsts.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The first process of a container that runs, to wait for; none where the kernel does not show it here.
    async fn first_process(&self, container: &ContainerId) -> Option<First> {
        if let Some(known) = self.firsts().get(container) {
            return Some(known.clone());
        }
        let (told, id) = (self.told_pid(container).await, container.as_str().to_owned());
        let look = move || match told {
            Ok(pid) => processes::hold(pid?, &id),
            Err(_) => processes::hold_first(&id),
        };
        let held = tokio::task::spawn_blocking(look).await.ok()??;
        // SAFETY: an `OwnedFd` is open, and the same file, until it is dropped.
        let ended = unsafe { AsyncFd::register_with_interest(held.fd, Interest::READABLE) };
        let ended = Arc::new(ended.ok()?);
        let first = First { pid: held.pid, ended };
        self.sees.store(true, Ordering::Relaxed);
        self.firsts().insert(container.clone(), first.clone());
        Some(first)
    }

    /// The end as the engine tells it; where it does not, as the kernel shows it.
    async fn wait_for_exit(&self, container: &ContainerId) -> Result<Exit, EngineError> {
        let first = self.first_process(container).await;
        let shown = async {
            match &first {
                Some(first) => drop(first.ended.readable().await),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = shown => {}
            told = self.told_exit(container) => return told,
        }
        match timeout(Duration::from_millis(TOLD_MS_MAX), self.told_exit(container)).await {
            Ok(told @ (Ok(_) | Err(EngineError::NotFound { .. }))) => Ok(told?),
            Ok(Err(_)) | Err(_) => {
                let error =
                    Some("; its processes are gone and the engine does not say how they ended".to_owned());
                let stderr_tail = self.take_tail(container).await;
                Ok(Exit { code: 128 + i64::from(libc::SIGKILL), oom_killed: false, error, stderr_tail })
            }
        }
    }

    async fn told_exit(&self, container: &ContainerId) -> Result<Exit, EngineError> {
        loop {
            let options = query::WaitContainerOptionsBuilder::new().condition("not-running").build();
            let mut replies = Box::pin(self.api.wait_container(container.as_str(), Some(options)));
            match timeout(Duration::from_millis(WAIT_POLL_MS_MAX), replies.next()).await {
                // The state below tells all; the client reports exit codes other than 0 as errors.
                Ok(Some(Ok(_)) | Some(Err(ApiError::DockerContainerWaitError { .. })) | None) | Err(_) => {}
                Ok(Some(Err(e))) => return Err(translate(&self.address, "wait for a container", e)),
            }
            let state = self.inspect(container).await?.state.unwrap_or_default();
            let status = state.status.map(|s| s.to_string()).unwrap_or_default();
            if status == "created" || status == "configured" {
                let detail = "asked to wait for a container that was not started".to_owned();
                return Err(EngineError::Protocol { what: "wait for a container", detail });
            }
            if state.running == Some(true) || state.paused == Some(true) {
                // The poll timed out, or its answer came before the end: look again, but never spin.
                tokio::time::sleep(Duration::from_millis(REMOVE_PAUSE_MS.0)).await;
                continue;
            }
            let stderr_tail = self.take_tail(container).await;
            let said = state.error.filter(|error| !error.is_empty());
            return Ok(Exit {
                code: state.exit_code.unwrap_or(-1),
                oom_killed: state.oom_killed.unwrap_or(false),
                error: said.or_else(|| tail::exec_failure(&stderr_tail)),
                stderr_tail,
            });
        }
    }

    /// By the engine, and then by the kernel, which is believed: an engine may say that it killed what runs, or fail
    /// to kill what is dead.
    async fn kill_container(&self, container: &ContainerId) -> Result<bool, EngineError> {
        let told = self.told_to_kill(container).await;
        if !self.sees.load(Ordering::Relaxed) || !processes::is_id(container.as_str()) {
            return told.map(|()| false);
        }
        self.end_processes(container).await.map(|()| true)
    }

    async fn end_processes(&self, container: &ContainerId) -> Result<(), EngineError> {
        let id = container.as_str().to_owned();
        let end = move || processes::end(&id, Duration::from_millis(END_MS_MAX));
        match tokio::task::spawn_blocking(end).await {
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => {
                Err(EngineError::Timeout { what: "end the processes of a container", after_ms: END_MS_MAX })
            }
        }
    }

    async fn told_to_kill(&self, container: &ContainerId) -> Result<(), EngineError> {
        let options = query::KillContainerOptionsBuilder::new().signal("SIGKILL").build();
        let call = self.api.kill_container(container.as_str(), Some(options));
        match self.call("kill a container", KILL_MS_MAX, call).await {
            Ok(()) | Err(EngineError::NotFound { .. }) | Err(EngineError::Conflict { .. }) => Ok(()),
            Err(EngineError::Refused { message, .. }) if message.contains("is not running") => Ok(()),
            Err(e) => Err(e),
        }
    }

    async fn remove_container(&self, container: &ContainerId) -> Result<(), EngineError> {
        self.drop_tail(container);
        self.forget_container(container).await?;
        let first = self.firsts().remove(container);
        let ended = async {
            if let Some(first) = &first {
                drop(first.ended.readable().await);
            }
        };
        // An engine that has forgotten a container may have forgotten its processes, too.
        if timeout(Duration::from_millis(ENDED_MS_MAX), ended).await.is_err() {
            self.end_processes(container).await?;
        }
        Ok(())
    }

    async fn forget_container(&self, container: &ContainerId) -> Result<(), EngineError> {
        let _permit = self.removes.acquire().await.map_err(closed)?;
        let started = Instant::now();
        let mut pause_ms = REMOVE_PAUSE_MS.0;
        loop {
            let left_ms = REMOVE_MS_MAX.saturating_sub(started.elapsed().as_millis() as u64);
            let options = query::RemoveContainerOptionsBuilder::new().force(true).v(true).build();
            let call = self.api.remove_container(container.as_str(), Some(options));
            let message = match self.call("remove a container", left_ms.max(1), call).await {
                Ok(()) => "removed, but still known".to_owned(),
                Err(EngineError::NotFound { .. }) => return Ok(()),
                Err(EngineError::Conflict { message, .. } | EngineError::Refused { message, .. }) => message,
                Err(EngineError::Timeout { .. }) => "no answer".to_owned(),
                Err(e) => return Err(e),
            };
            match self.inspect(container).await {
                Err(EngineError::NotFound { .. }) => return Ok(()),
                Err(e @ EngineError::Unavailable { .. }) => return Err(e),
                _ => {}
            }
            let after_ms = started.elapsed().as_millis() as u64;
            if after_ms + pause_ms >= REMOVE_MS_MAX {
                return Err(EngineError::StillThere { container: container.to_string(), after_ms, message });
            }
            tokio::time::sleep(Duration::from_millis(pause_ms)).await;
            pause_ms = (pause_ms * 2).min(REMOVE_PAUSE_MS.1);
        }
    }

    async fn list_containers(&self, instance: &InstanceId) -> Result<Vec<Found>, EngineError> {
        let filters = HashMap::from([("label", vec![format!("{LABEL_INSTANCE}={instance}")])]);
        let options = query::ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
        let call = self.api.list_containers(Some(options));
        let rows = self.call("list containers", ASK_MS_MAX, call).await?;
        let found = rows.into_iter().filter_map(|row| {
            let state = row.state.map(|state| state.to_string()).unwrap_or_default();
            let mut labels = row.labels.unwrap_or_default();
            let (cell, build) = (labels.remove(LABEL_CELL), labels.remove(LABEL_BUILD));
            Some(Found {
                container: ContainerId::new(row.id?),
                build: build.filter(|_| cell.is_none()).and_then(|text| text.parse().ok()),
                cell: cell.and_then(|text| text.parse().ok()),
                running: matches!(state.as_str(), "running" | "paused" | "restarting"),
                state,
            })
        });
        Ok(found.collect())
    }

    /// Of a container that is waited for, without asking the engine, as long as it is alive.
    async fn pid_of(&self, container: &ContainerId) -> Result<Option<u32>, EngineError> {
        let known = self.firsts().get(container).map(|first| first.pid);
        match known.and_then(|pid| processes::hold(pid, container.as_str())) {
            Some(held) => Ok(Some(held.pid)),
            None => self.told_pid(container).await,
        }
    }

    async fn told_pid(&self, container: &ContainerId) -> Result<Option<u32>, EngineError> {
        let state = self.inspect(container).await?.state.unwrap_or_default();
        Ok(state.pid.and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0))
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        for (_, task) in self.tails().drain() {
            task.abort();
        }
    }
}

#[rustfmt::skip] // one line each
impl Engine for Docker {
    fn info(&self) -> Reply<'_, EngineInfo> { Box::pin(self.ask_info()) }
    fn image<'a>(&'a self, reference: &'a str) -> Reply<'a, Option<ImageInfo>> { Box::pin(self.find_image(reference)) }
    fn pull<'a>(&'a self, reference: &'a str, progress: &'a Progress) -> Reply<'a, ImageInfo> { Box::pin(self.pull_image(reference, progress)) }
    fn build<'a>(&'a self, spec: &'a BuildSpec, progress: &'a Progress) -> Reply<'a, ImageInfo> { Box::pin(self.build_image(spec, progress)) }
    fn build_sealed<'a>(&'a self, build: SealedBuild, progress: &'a Progress) -> Reply<'a, ImageInfo> { Box::pin(self.build_apart(build, progress)) }
    fn loose_images<'a>(&'a self, instance: &'a InstanceId) -> Reply<'a, Vec<(String, Option<JobId>)>> { Box::pin(self.list_loose(instance)) }
    fn import<'a>(&'a self, rootfs_tar: &'a Path, tag: &'a str, changes: &'a [String], progress: &'a Progress) -> Reply<'a, ImageInfo> {
        Box::pin(self.import_image(rootfs_tar, tag, changes, progress))
    }
    fn extend<'a>(&'a self, spec: &'a Extend, progress: &'a Progress) -> Reply<'a, ()> { Box::pin(self.extend_image(spec, progress)) }
    fn tag<'a>(&'a self, image: &'a str, reference: &'a str) -> Reply<'a, ()> { Box::pin(self.tag_image(image, reference)) }
    fn remove_image<'a>(&'a self, reference: &'a str) -> Reply<'a, ()> { Box::pin(self.forget_image(reference)) }
    fn probe_paths<'a>(&'a self, instance: &'a InstanceId, image_id: &'a str, paths: &'a [&'a str]) -> Reply<'a, Vec<bool>> {
        Box::pin(self.probe(instance, image_id, paths))
    }
    fn create<'a>(&'a self, spec: &'a CellSpec) -> Reply<'a, ContainerId> { Box::pin(self.create_cell(spec)) }
    fn start<'a>(&'a self, container: &'a ContainerId, boot: &'a [u8]) -> Reply<'a, ()> { Box::pin(self.start_cell(container, boot)) }
    fn wait<'a>(&'a self, container: &'a ContainerId) -> Reply<'a, Exit> { Box::pin(self.wait_for_exit(container)) }
    fn kill<'a>(&'a self, container: &'a ContainerId) -> Reply<'a, bool> { Box::pin(self.kill_container(container)) }
    fn remove<'a>(&'a self, container: &'a ContainerId) -> Reply<'a, ()> { Box::pin(self.remove_container(container)) }
    fn list<'a>(&'a self, instance: &'a InstanceId) -> Reply<'a, Vec<Found>> { Box::pin(self.list_containers(instance)) }
    fn state_pid<'a>(&'a self, container: &'a ContainerId) -> Reply<'a, Option<u32>> { Box::pin(self.pid_of(container)) }
}

fn parse_body(body: Value) -> Result<ContainerCreateBody, EngineError> {
    serde_json::from_value(body)
        .map_err(|e| EngineError::Protocol { what: "create a container", detail: e.to_string() })
}

fn check_applied(asked: &Value, found: &ContainerInspectResponse) -> Result<(), EngineError> {
    let unreadable =
        |e: serde_json::Error| EngineError::Protocol { what: "inspect a container", detail: e.to_string() };
    let got = serde_json::to_value(&found.host_config).map_err(unreadable)?;
    config::check_applied(&asked["HostConfig"], &got)
}

fn is_same_cell(found: &ContainerInspectResponse, spec: &CellSpec) -> bool {
    let labels = found.config.as_ref().and_then(|config| config.labels.as_ref());
    let is = |name: &str, value: &str| labels.and_then(|l| l.get(name)).is_some_and(|v| v == value);
    is(LABEL_INSTANCE, spec.instance.as_str()) && is(LABEL_CELL, spec.cell.as_str())
}

fn closed(_: tokio::sync::AcquireError) -> EngineError {
    EngineError::Protocol { what: "wait for a turn", detail: "the engine's client was closed".to_owned() }
}

fn translate(address: &str, what: &'static str, error: ApiError) -> EngineError {
    let unavailable = |detail: String| EngineError::Unavailable { address: address.to_owned(), detail };
    match error {
        ApiError::DockerResponseServerError { status_code, message } => match status_code {
            404 => EngineError::NotFound { what, message },
            409 => EngineError::Conflict { what, message },
            status => EngineError::Refused { what, status, message },
        },
        ApiError::DockerStreamError { error } => EngineError::Refused { what, status: 200, message: error },
        ApiError::RequestTimeoutError => EngineError::Timeout { what, after_ms: IMAGE_MS_MAX },
        ApiError::SocketNotFoundError(path) => unavailable(format!("no socket at {path}")),
        ApiError::IOError { err } => unavailable(err.to_string()),
        ApiError::HyperResponseError { err } => unavailable(with_causes(&err)),
        ApiError::HyperLegacyError { err } => unavailable(with_causes(&err)),
        other => EngineError::Protocol { what, detail: other.to_string() },
    }
}

/// An error with what caused it: the outer one alone says "client error (Connect)".
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_client_library_sends_the_whole_configuration() {
        let asked = config::container_config(&config::tests::spec()).unwrap();
        let sent = serde_json::to_value(parse_body(asked.clone()).unwrap()).unwrap();
        assert_eq!(sent, asked);
    }

    #[test]
    fn errors_become_what_a_caller_branches_on() {
        let answer =
            |status_code| ApiError::DockerResponseServerError { status_code, message: "m".to_owned() };
        let told = |status_code| translate("unix:///x", "ask", answer(status_code));
        assert!(matches!(told(404), EngineError::NotFound { .. }));
        assert!(matches!(told(409), EngineError::Conflict { .. }));
        assert!(matches!(told(500), EngineError::Refused { status: 500, .. }));
        let gone = ApiError::SocketNotFoundError("/x".to_owned());
        assert!(matches!(translate("unix:///x", "ask", gone), EngineError::Unavailable { .. }));
    }
}
