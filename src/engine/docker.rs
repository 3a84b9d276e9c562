//! The Docker Engine API (1.41 and newer, Podman's compatible socket as far as it goes) behind `Engine`. The
//! only file that names bollard. It must never retry what could happen twice, never start a container that
//! was not made from `config`, and never report a container as gone before the engine has denied knowing it.
//!
//! Traps that shaped it: `/wait?condition=next-exit` can miss an exit, so `wait` asks for `not-running`
//! after the start; a removal answers before it has happened, or with "already in progress" or "busy", so it
//! is repeated until inspect says 404; engines serialise creates and removes, so each has a limit of its own.

use std::collections::HashMap;
use std::path::Path;
use std::pin::Pin;
use std::sync::Mutex;
use std::time::Duration;

use bollard::container::LogOutput;
use bollard::errors::Error as ApiError;
use bollard::models::{
    BuildInfo, ContainerCreateBody, ContainerInspectResponse, CreateImageInfo, ImageInspect,
};
use bollard::query_parameters as query;
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::{
    BOOT_BYTES_MAX, BuildContext, BuildSpec, CellSpec, ContainerId, Engine, EngineError, EngineInfo, Exit,
    Found, ImageInfo, LABEL_CELL, LABEL_INSTANCE, Progress, Reply, address, config, container_name,
    normalise_arch, tail,
};
use crate::job::InstanceId;

/// Questions: info, inspect, list, tag.
const ASK_MS_MAX: u64 = 15_000;
/// Creating a container; engines under load take seconds.
const CREATE_MS_MAX: u64 = 60_000;
/// Starting one, its runtime included.
const START_MS_MAX: u64 = 60_000;
/// From the start until the engine has passed the boot bytes on.
const BOOT_MS_MAX: u64 = 10_000;
/// SIGKILL; an engine whose containerd hangs took 12 s.
const KILL_MS_MAX: u64 = 20_000;
/// Removing a container, all tries together.
const REMOVE_MS_MAX: u64 = 30_000;
/// Pauses between tries of a removal, in milliseconds: doubled from the first to the second.
const REMOVE_PAUSE_MS: (u64, u64) = (20, 1_000);
/// One long poll of `wait`; then the state is read afresh, so that a lost event costs no more than this.
const WAIT_POLL_MS_MAX: u64 = 300_000;
/// An image removal may delete gigabytes.
const IMAGE_REMOVE_MS_MAX: u64 = 120_000;
/// Pull, build or import of one image.
const IMAGE_MS_MAX: u64 = 45 * 60_000;
/// Reading what a dead PID 1 left on its standard error.
const TAIL_MS_MAX: u64 = 1_000;
/// Creates at one time.
const CREATES_MAX: usize = 4;
/// Removals at one time: parallel ones push creates over 10 s.
const REMOVES_MAX: usize = 2;
/// Symlinks followed by `probe_paths`.
const LINKS_MAX: usize = 8;
/// One line of progress, in characters.
const PROGRESS_CHARS_MAX: usize = 2_000;

/// A connection to a Docker-compatible engine. Requests connect anew, so it outlives restarts of the engine.
pub struct Docker {
    api: bollard::Docker,
    address: String,
    creates: Semaphore,
    removes: Semaphore,
    /// Readers of standard error, by container: ended and taken by `wait`, or aborted by `remove`.
    tails: Mutex<HashMap<ContainerId, JoinHandle<String>>>,
}

impl Docker {
    /// Connects to the engine at `address` (`unix:///path`) and agrees on an API version.
    ///
    /// # Errors
    /// `UnsupportedAddress`, `Unavailable`, `Timeout`.
    pub async fn connect(address: &str) -> Result<Self, EngineError> {
        let path = address::socket_path(address)?;
        // bollard's own limit covers response headers alone; each call here has a tighter one.
        let limit_s = IMAGE_MS_MAX / 1_000;
        let api = bollard::Docker::connect_with_unix(path, limit_s, bollard::API_DEFAULT_VERSION)
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
        match timeout(Duration::from_millis(ms_max), call).await {
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
        let mut runtimes: Vec<String> = info.runtimes.unwrap_or_default().into_keys().collect();
        runtimes.sort();
        Ok(EngineInfo {
            version: version.version.or(info.server_version).unwrap_or_default(),
            api_version: version.api_version.unwrap_or_default(),
            arch: normalise_arch(&info.architecture.unwrap_or_default()),
            os: info.os_type.unwrap_or_default(),
            runtimes,
            default_runtime: info.default_runtime.unwrap_or_default(),
            cgroup_version: info.cgroup_version.map(|v| v.to_string()).unwrap_or_default(),
            root_dir: info.docker_root_dir.unwrap_or_default().into(),
        })
    }

    async fn find_image(&self, reference: &str) -> Result<Option<ImageInfo>, EngineError> {
        check_reference(reference)?;
        match self.call("inspect an image", ASK_MS_MAX, self.api.inspect_image(reference)).await {
            Ok(found) => image_info(found).map(Some),
            Err(EngineError::NotFound { .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    async fn made_image(&self, reference: &str) -> Result<ImageInfo, EngineError> {
        let missing = || EngineError::ImageMissing { image: reference.to_owned() };
        self.find_image(reference).await?.ok_or_else(missing)
    }

    /// Follows a pull, build or import to its end.
    async fn follow<T: Step>(
        &self,
        what: String,
        mut steps: impl Stream<Item = Result<T, ApiError>> + Unpin,
        progress: &Progress,
    ) -> Result<(), EngineError> {
        let deadline = Instant::now() + Duration::from_millis(IMAGE_MS_MAX);
        loop {
            let Ok(step) = tokio::time::timeout_at(deadline, steps.next()).await else {
                return Err(EngineError::Timeout { what: "make the image", after_ms: IMAGE_MS_MAX });
            };
            let step = match step {
                None => return Ok(()),
                Some(Ok(step)) => step,
                Some(Err(ApiError::DockerStreamError { error: message })) => {
                    return Err(EngineError::ImageFailed { what, message });
                }
                Some(Err(e)) => return Err(translate(&self.address, "make the image", e)),
            };
            if let Some(message) = step.failure() {
                return Err(EngineError::ImageFailed { what, message });
            }
            for line in step.text().lines().filter(|line| !line.trim().is_empty()) {
                // Full or closed: whoever watches is not to slow this down.
                let _ = progress.try_send(line.chars().take(PROGRESS_CHARS_MAX).collect());
            }
        }
    }

    async fn pull_image(&self, reference: &str, progress: &Progress) -> Result<ImageInfo, EngineError> {
        check_reference(reference)?;
        // Without a tag the engine would fetch every tag there is.
        let reference = with_tag(reference);
        let options = query::CreateImageOptionsBuilder::new().from_image(&reference).build();
        let steps = self.api.create_image(Some(options), None, None);
        self.follow(format!("pull {reference}"), steps, progress).await?;
        self.made_image(&reference).await
    }

    async fn build_image(&self, spec: &BuildSpec, progress: &Progress) -> Result<ImageInfo, EngineError> {
        check_reference(&spec.tag)?;
        let body = match &spec.context {
            BuildContext::Bytes(bytes) => bollard::body_full(bytes.clone()),
            BuildContext::File(path) => file_body(path).await?,
        };
        let labels: HashMap<String, String> = spec.labels.clone().into_iter().collect();
        let args: HashMap<String, String> = spec.build_args.clone().into_iter().collect();
        let options = query::BuildImageOptionsBuilder::new()
            .dockerfile(&spec.dockerfile)
            .t(&spec.tag)
            .labels(&labels)
            .buildargs(&args)
            .rm(true)
            .forcerm(true)
            .build();
        let steps = self.api.build_image(options, None, Some(body));
        self.follow(format!("build {}", spec.tag), Box::pin(steps), progress).await?;
        self.made_image(&spec.tag).await
    }

    async fn import_image(
        &self,
        rootfs_tar: &Path,
        tag: &str,
        changes: &[String],
        progress: &Progress,
    ) -> Result<ImageInfo, EngineError> {
        check_reference(tag)?;
        let body = file_body(rootfs_tar).await?;
        let (repo, label) = split_tag(tag);
        let options = query::CreateImageOptionsBuilder::new()
            .from_src("-")
            .repo(repo)
            .tag(label)
            .changes(changes.to_vec())
            .build();
        let steps = self.api.create_image(Some(options), Some(body), None);
        self.follow(format!("import {tag}"), steps, progress).await?;
        self.made_image(tag).await
    }

    async fn tag_image(&self, image: &str, reference: &str) -> Result<(), EngineError> {
        check_reference(image)?;
        check_reference(reference)?;
        let (repo, tag) = split_tag(reference);
        let options = query::TagImageOptionsBuilder::new().repo(repo).tag(tag).build();
        self.call("tag an image", ASK_MS_MAX, self.api.tag_image(image, Some(options))).await
    }

    async fn forget_image(&self, reference: &str) -> Result<(), EngineError> {
        check_reference(reference)?;
        let options = query::RemoveImageOptionsBuilder::new().build();
        let call = self.api.remove_image(reference, Some(options), None);
        match self.call("remove an image", IMAGE_REMOVE_MS_MAX, call).await {
            Ok(_) | Err(EngineError::NotFound { .. }) => Ok(()),
            Err(e) => Err(e),
        }
    }

    async fn probe(
        &self,
        instance: &InstanceId,
        image_id: &str,
        paths: &[&str],
    ) -> Result<Vec<bool>, EngineError> {
        config::check_image_id(image_id)?;
        let body = parse_body(json!({
            "Image": image_id,
            "Entrypoint": ["/.hotcell-never-started"],
            "Labels": { LABEL_INSTANCE: instance.as_str() },
            "HostConfig": { "NetworkMode": "none", "ReadonlyRootfs": true, "CapDrop": ["ALL"] },
        }))?;
        let helper = {
            let _permit = self.creates.acquire().await.map_err(closed)?;
            let call = self.api.create_container(None, body);
            match self.call("create a container", CREATE_MS_MAX, call).await {
                Ok(made) => ContainerId::new(made.id),
                Err(EngineError::NotFound { .. }) => {
                    return Err(EngineError::ImageMissing { image: image_id.to_owned() });
                }
                Err(e) => return Err(e),
            }
        };
        let mut found = Vec::with_capacity(paths.len());
        let mut failure = None;
        for path in paths {
            match self.path_exists(&helper, path).await {
                Ok(exists) => found.push(exists),
                Err(e) => {
                    failure = Some(e);
                    break;
                }
            }
        }
        self.remove_container(&helper).await?;
        failure.map_or(Ok(found), Err)
    }

    async fn path_exists(&self, container: &ContainerId, path: &str) -> Result<bool, EngineError> {
        let mut path = path.to_owned();
        for _ in 0..LINKS_MAX {
            let options = query::ContainerArchiveInfoOptionsBuilder::new().path(&path).build();
            let call = self.api.get_container_archive_info(container.as_str(), Some(options));
            match self.call("look for a path", ASK_MS_MAX, call).await {
                Ok(stat) if stat.link_target.is_empty() || stat.link_target == path => return Ok(true),
                Ok(stat) => path = stat.link_target,
                Err(EngineError::NotFound { .. }) => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        Ok(false)
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
        // The engine closes the connection once it has passed everything on: only then is it certain that
        // PID 1 can read its boot bytes and the end after them.
        let deliver = async {
            stdin.input.write_all(boot).await?;
            stdin.input.shutdown().await?;
            while stdin.output.next().await.is_some() {}
            Ok::<(), std::io::Error>(())
        };
        match timeout(Duration::from_millis(BOOT_MS_MAX), deliver).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(EngineError::StartFailed { message: format!("boot bytes not delivered: {e}") }),
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

    async fn wait_for_exit(&self, container: &ContainerId) -> Result<Exit, EngineError> {
        loop {
            let options = query::WaitContainerOptionsBuilder::new().condition("not-running").build();
            let mut replies = Box::pin(self.api.wait_container(container.as_str(), Some(options)));
            match timeout(Duration::from_millis(WAIT_POLL_MS_MAX), replies.next()).await {
                // The state below tells all; bollard reports exit codes other than 0 as errors.
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

    async fn kill_container(&self, container: &ContainerId) -> Result<(), EngineError> {
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
            let label = row.labels.unwrap_or_default().remove(LABEL_CELL);
            Some(Found {
                container: ContainerId::new(row.id?),
                cell: label.and_then(|text| text.parse().ok()),
                running: matches!(state.as_str(), "running" | "paused" | "restarting"),
                state,
            })
        });
        Ok(found.collect())
    }

    async fn pid_of(&self, container: &ContainerId) -> Result<Option<u32>, EngineError> {
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
    fn import<'a>(&'a self, rootfs_tar: &'a Path, tag: &'a str, changes: &'a [String], progress: &'a Progress) -> Reply<'a, ImageInfo> {
        Box::pin(self.import_image(rootfs_tar, tag, changes, progress))
    }
    fn tag<'a>(&'a self, image: &'a str, reference: &'a str) -> Reply<'a, ()> { Box::pin(self.tag_image(image, reference)) }
    fn remove_image<'a>(&'a self, reference: &'a str) -> Reply<'a, ()> { Box::pin(self.forget_image(reference)) }
    fn probe_paths<'a>(&'a self, instance: &'a InstanceId, image_id: &'a str, paths: &'a [&'a str]) -> Reply<'a, Vec<bool>> {
        Box::pin(self.probe(instance, image_id, paths))
    }
    fn create<'a>(&'a self, spec: &'a CellSpec) -> Reply<'a, ContainerId> { Box::pin(self.create_cell(spec)) }
    fn start<'a>(&'a self, container: &'a ContainerId, boot: &'a [u8]) -> Reply<'a, ()> { Box::pin(self.start_cell(container, boot)) }
    fn wait<'a>(&'a self, container: &'a ContainerId) -> Reply<'a, Exit> { Box::pin(self.wait_for_exit(container)) }
    fn kill<'a>(&'a self, container: &'a ContainerId) -> Reply<'a, ()> { Box::pin(self.kill_container(container)) }
    fn remove<'a>(&'a self, container: &'a ContainerId) -> Reply<'a, ()> { Box::pin(self.remove_container(container)) }
    fn list<'a>(&'a self, instance: &'a InstanceId) -> Reply<'a, Vec<Found>> { Box::pin(self.list_containers(instance)) }
    fn state_pid<'a>(&'a self, container: &'a ContainerId) -> Reply<'a, Option<u32>> { Box::pin(self.pid_of(container)) }
}

/// One step of a pull, build or import, as the engine reports it.
trait Step {
    fn failure(&self) -> Option<String>;
    fn text(&self) -> String;
}

impl Step for CreateImageInfo {
    fn failure(&self) -> Option<String> {
        self.error_detail.as_ref().map(|detail| detail.message.clone().unwrap_or_default())
    }
    fn text(&self) -> String {
        let part = |text: &Option<String>| text.clone().unwrap_or_default();
        // Byte counts of a layer come many times a second and say little.
        let counting = self.progress_detail.as_ref().is_some_and(|p| p.current.is_some());
        if counting {
            String::new()
        } else {
            format!("{} {}", part(&self.id), part(&self.status)).trim().to_owned()
        }
    }
}

impl Step for BuildInfo {
    fn failure(&self) -> Option<String> {
        self.error_detail.as_ref().map(|detail| detail.message.clone().unwrap_or_default())
    }
    fn text(&self) -> String {
        let status = self.status.clone().filter(|_| self.progress_detail.is_none());
        self.stream.clone().or(status).unwrap_or_default()
    }
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

fn image_info(found: ImageInspect) -> Result<ImageInfo, EngineError> {
    let incomplete = || EngineError::Protocol { what: "inspect an image", detail: "it has no id".to_owned() };
    let config = found.config.unwrap_or_default();
    let path_env =
        config.env.unwrap_or_default().iter().find_map(|v| v.strip_prefix("PATH=").map(str::to_owned));
    Ok(ImageInfo {
        id: found.id.ok_or_else(incomplete)?,
        arch: normalise_arch(&found.architecture.unwrap_or_default()),
        os: found.os.unwrap_or_default(),
        labels: config.labels.unwrap_or_default().into_iter().collect(),
        path_env,
        volumes: config.volumes.unwrap_or_default(),
    })
}

/// The request body of bollard, which gives it no public name.
type Body = http_body_util::Either<http_body_util::Full<Bytes>, http_body_util::StreamBody<Frames>>;
type Frames = Pin<Box<dyn Stream<Item = Result<hyper::body::Frame<Bytes>, std::io::Error>> + Send>>;

/// A file as a request body, read as it is sent.
async fn file_body(path: &Path) -> Result<Body, EngineError> {
    let unreadable = |e: std::io::Error| EngineError::File { path: path.to_owned(), detail: e.to_string() };
    let file = tokio::fs::File::open(path).await.map_err(unreadable)?;
    Ok(bollard::body_try_stream(tokio_util::io::ReaderStream::with_capacity(file, 256 * 1024)))
}

/// References go into request paths: only what a reference may hold.
fn check_reference(reference: &str) -> Result<(), EngineError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'/' | b':' | b'@');
    let bad = reference.is_empty()
        || reference.len() > 512
        || !reference.bytes().all(plain)
        || reference.contains("..");
    if bad || reference.starts_with(['/', '-', '.']) {
        let shown: String = reference.chars().take(80).collect();
        return Err(EngineError::BadSpec { reason: format!("{shown:?} is no image reference") });
    }
    Ok(())
}

/// Name and tag; no tag for a digest, `latest` where there is none.
fn split_tag(reference: &str) -> (&str, &str) {
    match reference.rsplit_once(':') {
        _ if reference.contains('@') => (reference, ""),
        Some((name, tag)) if !tag.contains('/') => (name, tag),
        _ => (reference, "latest"),
    }
}

fn with_tag(reference: &str) -> String {
    match split_tag(reference) {
        (name, "") => name.to_owned(),
        (name, tag) => format!("{name}:{tag}"),
    }
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
