//! The daemon in this process, with an engine that has no containers at all: it keeps a list, says what the test
//! tells it to say, and remembers what it was asked. For what a real engine does not do on demand.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hotcell::config::{self, ApiKeySource, Config, Defaults, Limits};
use hotcell::daemon::{self, Listeners};
use hotcell::driver::{How, Shutdown};
use hotcell::engine::{
    BuildSpec, CellSpec, ContainerId, Engine, EngineError, EngineInfo, Exit, Extend, Found, ImageInfo,
    Progress, Reply, RuntimeInfo, SealedBuild,
};
use hotcell::job::{CellId, InstanceId, JobId};
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::fake_agent;
use crate::world::{PATIENCE, base_dir, init_binary};

/// What goes wrong.
#[derive(Default)]
struct Script {
    create_fails: bool,
    /// Creates wait until it is false.
    create_held: bool,
    start_fails: bool,
    /// Waits fail as if the engine were away.
    wait_fails: bool,
    /// Removals fail until it is false.
    remove_fails: bool,
    /// The engine's runtimes beside its default.
    runtimes: Vec<&'static str>,
    /// Containers of this runtime do not start.
    broken_runtime: Option<&'static str>,
}

#[derive(Default)]
struct State {
    script: Script,
    containers: BTreeMap<String, (CellId, bool)>,
    calls: Vec<&'static str>,
    /// The runtime that each create asked for.
    asked: Vec<Option<String>>,
}

#[derive(Default)]
struct Scripted {
    state: Mutex<State>,
    changed: Notify,
}

impl Scripted {
    fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        let result = look(&mut self.state.lock().unwrap());
        self.changed.notify_waiters();
        result
    }

    fn script(&self, change: impl FnOnce(&mut Script)) {
        self.with(|state| change(&mut state.script));
    }

    fn count(&self, call: &str) -> usize {
        self.state.lock().unwrap().calls.iter().filter(|c| **c == call).count()
    }

    async fn until<T>(&self, mut ready: impl FnMut(&mut State) -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            let found = ready(&mut self.state.lock().unwrap());
            if let Some(found) = found {
                return found;
            }
            changed.await;
        }
    }
}

fn refused(what: &'static str) -> EngineError {
    EngineError::Refused { what, status: 500, message: "as the test says".to_owned() }
}

fn image(reference: &str) -> ImageInfo {
    let id = if reference.starts_with("sha256:") {
        reference.to_owned()
    } else {
        format!("sha256:{}", "a".repeat(64))
    };
    let labels = BTreeMap::new();
    let (os, env, volumes) = ("linux".to_owned(), Vec::new(), Vec::new());
    ImageInfo { id, arch: "x64".to_owned(), os, labels, size_bytes: 1, env, volumes, on_build: false }
}

impl Engine for Scripted {
    fn info(&self) -> Reply<'_, EngineInfo> {
        let text = str::to_owned;
        let (version, api_version, arch, os) = (text("0"), text("1.41"), text("x64"), text("linux"));
        let (default_runtime, cgroup_version) = (text("runc"), text("2"));
        let runtimes = self.with(|state| state.script.runtimes.clone());
        let info = |name: &&'static str| ((*name).to_owned(), RuntimeInfo::default());
        let runtimes = runtimes.iter().map(info).collect();
        let root_dir = "/nowhere".into();
        Box::pin(async move {
            Ok(EngineInfo {
                version,
                api_version,
                arch,
                os,
                runtimes,
                default_runtime,
                cgroup_version,
                root_dir,
                components: BTreeMap::new(),
                security: Vec::new(),
                kernel: "6.1.0".to_owned(),
            })
        })
    }
    fn image<'a>(&'a self, reference: &'a str) -> Reply<'a, Option<ImageInfo>> {
        Box::pin(async move { Ok(Some(image(reference))) })
    }
    fn pull<'a>(&'a self, reference: &'a str, _: &'a Progress) -> Reply<'a, ImageInfo> {
        Box::pin(async move { Ok(image(reference)) })
    }
    fn build<'a>(&'a self, _: &'a BuildSpec, _: &'a Progress) -> Reply<'a, ImageInfo> {
        Box::pin(async { Err(refused("build")) })
    }
    fn build_sealed<'a>(&'a self, _: SealedBuild, _: &'a Progress) -> Reply<'a, ImageInfo> {
        Box::pin(async { Err(refused("build")) })
    }
    fn loose_images<'a>(&'a self, _: &'a InstanceId) -> Reply<'a, Vec<(String, Option<JobId>)>> {
        Box::pin(async { Ok(Vec::new()) })
    }
    fn import<'a>(
        &'a self,
        _: &'a Path,
        _: &'a str,
        _: &'a [String],
        _: &'a Progress,
    ) -> Reply<'a, ImageInfo> {
        Box::pin(async { Err(refused("import")) })
    }
    fn extend<'a>(&'a self, _: &'a Extend, _: &'a Progress) -> Reply<'a, ()> {
        Box::pin(async { Err(refused("extend")) })
    }
    fn tag<'a>(&'a self, _: &'a str, _: &'a str) -> Reply<'a, ()> {
        Box::pin(async { Ok(()) })
    }
    fn remove_image<'a>(&'a self, _: &'a str) -> Reply<'a, ()> {
        Box::pin(async { Ok(()) })
    }
    fn probe_paths<'a>(
        &'a self,
        _: &'a InstanceId,
        _: &'a str,
        paths: &'a [&'a str],
    ) -> Reply<'a, Vec<bool>> {
        Box::pin(async move {
            Ok(paths.iter().map(|path| !path.contains("alpine") && !path.contains("musl")).collect())
        })
    }
    fn create<'a>(&'a self, spec: &'a CellSpec) -> Reply<'a, ContainerId> {
        Box::pin(async move {
            self.with(|state| state.calls.push("create"));
            self.until(|state| (!state.script.create_held).then_some(())).await;
            self.with(|state| {
                if state.script.create_fails {
                    return Err(refused("create a container"));
                }
                state.asked.push(spec.runtime.clone());
                let id = hotcell::engine::container_name(&spec.instance, &spec.cell);
                state.containers.insert(id.as_str().to_owned(), (spec.cell.clone(), false));
                Ok(id)
            })
        })
    }
    fn start<'a>(&'a self, container: &'a ContainerId, _: &'a [u8]) -> Reply<'a, ()> {
        Box::pin(async move {
            self.with(|state| {
                state.calls.push("start");
                if state.script.start_fails {
                    return Err(refused("start a container"));
                }
                let broken = state.script.broken_runtime.is_some();
                if broken
                    && state.asked.last().is_some_and(|asked| asked.as_deref() == state.script.broken_runtime)
                {
                    return Err(refused("start a container"));
                }
                state.containers.get_mut(container.as_str()).unwrap().1 = true;
                Ok(())
            })
        })
    }
    fn wait<'a>(&'a self, container: &'a ContainerId) -> Reply<'a, Exit> {
        Box::pin(async move {
            self.with(|state| state.calls.push("wait"));
            self.until(|state| {
                if state.script.wait_fails {
                    let (address, detail) = ("unix:///nowhere".to_owned(), "as the test says".to_owned());
                    return Some(Err(EngineError::Unavailable { address, detail }));
                }
                let (oom_killed, error, stderr_tail) = (false, None, String::new());
                match state.containers.get(container.as_str()) {
                    Some((_, true)) => None,
                    _ => Some(Ok(Exit { code: 137, oom_killed, error, stderr_tail })),
                }
            })
            .await
        })
    }
    fn kill<'a>(&'a self, container: &'a ContainerId) -> Reply<'a, bool> {
        Box::pin(async move {
            self.with(|state| {
                state.calls.push("kill");
                if let Some(entry) = state.containers.get_mut(container.as_str()) {
                    entry.1 = false;
                }
            });
            Ok(false)
        })
    }
    fn remove<'a>(&'a self, container: &'a ContainerId) -> Reply<'a, ()> {
        Box::pin(async move {
            self.with(|state| {
                state.calls.push("remove");
                if state.script.remove_fails {
                    return Err(refused("remove a container"));
                }
                state.containers.remove(container.as_str());
                Ok(())
            })
        })
    }
    fn list<'a>(&'a self, _: &'a InstanceId) -> Reply<'a, Vec<Found>> {
        Box::pin(async move {
            let found = |(id, (cell, running)): (&String, &(CellId, bool))| Found {
                container: ContainerId::new(id.clone()),
                cell: Some(cell.clone()),
                build: None,
                running: *running,
                state: String::new(),
            };
            Ok(self.with(|state| state.containers.iter().map(found).collect()))
        })
    }
    fn state_pid<'a>(&'a self, _: &'a ContainerId) -> Reply<'a, Option<u32>> {
        Box::pin(async { Ok(None) })
    }
}

/// A daemon in this process.
struct House {
    dir: tempfile::TempDir,
    engine: Arc<Scripted>,
    shutdown: Shutdown,
    daemon: Option<std::thread::JoinHandle<()>>,
}

impl House {
    fn new(slots: u32, script: Script) -> Self {
        let dir = tempfile::Builder::new().prefix("hc-").tempdir_in(base_dir()).unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::create_dir_all(dir.path().join("state/images")).unwrap();
        fake_agent::install(&dir.path().join("state"));
        std::fs::write(dir.path().join("key"), "sk-test").unwrap();
        write_policies(&dir.path().join("policies"));
        let engine = Arc::new(Scripted::default());
        engine.script(|s| *s = script);
        let shutdown = Shutdown::default();
        let config = config(dir.path(), slots);
        let (engine_of, shutdown_of) = (engine.clone(), shutdown.clone());
        let (listening, listens) = std::sync::mpsc::channel();
        let daemon = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            runtime.block_on(async move {
                let api = tokio::net::UnixListener::bind(&config.socket).unwrap();
                listening.send(()).unwrap();
                let listeners = Listeners { api, metrics: None, hangup: None, systemd: false };
                daemon::run(config, listeners, engine_of, "scripted".to_owned(), shutdown_of).await.unwrap();
            });
        });
        listens.recv().unwrap();
        Self { dir, engine, shutdown, daemon: Some(daemon) }
    }

    fn call(&self, method: &str, path: &str, body: &str) -> Value {
        let mut socket = UnixStream::connect(self.dir.path().join("s")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n"
        );
        write!(socket, "{head}content-type: application/json\r\n\r\n{body}").unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        let (_, body) =
            answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer to {path}: {answer}"));
        serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {answer}"))
    }

    fn submit(&self) -> String {
        self.submit_under("trusted")
    }

    fn submit_under(&self, policy: &str) -> String {
        let spec =
            json!({ "prompt": "x", "image": "some/image", "policy": policy, "limits": { "disk_mib": 64 } });
        self.call("POST", "/v1/jobs", &spec.to_string())["id"].as_str().unwrap().to_owned()
    }

    fn show(&self, job: &str) -> Value {
        self.call("GET", &format!("/v1/jobs/{job}"), "")
    }

    fn cancel(&self, job: &str) {
        self.call("POST", &format!("/v1/jobs/{job}/cancel"), "");
    }

    fn wait_for(&self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(Instant::now() < until, "waited in vain: {what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn done(&self, job: &str) -> Value {
        self.wait_for("the job is over", |house| house.show(job)["state"] == "done");
        self.show(job)
    }

    fn end(mut self) {
        self.shutdown.ask(How::Drain);
        self.daemon.take().unwrap().join().unwrap();
        assert!(self.engine.state.lock().unwrap().containers.is_empty(), "containers are left");
        let state = self.dir.path().join("state");
        assert_eq!(std::fs::read_dir(state.join("cells")).unwrap().count(), 0, "cells are left");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&*state.to_string_lossy()), "mounts are left");
    }
}

impl Drop for House {
    fn drop(&mut self) {
        // A failed test: what it holds back and breaks is let go, so that the daemon can clean up.
        if let Some(daemon) = self.daemon.take() {
            self.engine.script(|s| *s = Script::default());
            self.shutdown.ask(How::Now);
            let _ = daemon.join();
        }
    }
}

/// `trusted`, on runsc: `strict` takes nothing else, `lenient` takes runc as well.
fn write_policies(dir: &Path) {
    std::fs::create_dir(dir).unwrap();
    let trusted = include_str!("../../policies/trusted.toml");
    for (name, fallback) in [("strict", "[]"), ("lenient", "[\"runc\"]")] {
        let text = format!("runtime = \"runsc\"\nruntime_fallback = {fallback}\n{trusted}");
        std::fs::write(dir.join(format!("{name}.toml")), text).unwrap();
    }
}

fn config(dir: &Path, slots: u32) -> Config {
    let (queued_jobs_max, journal_bytes_max) = (100, 32 << 20);
    let limits = Limits {
        slots,
        queued_jobs_max,
        journal_bytes_max,
        cancel_grace_s: 1,
        drain_s: 30,
        disk_reserve_mib: 64,
        memory_reserve_mib: 64,
    };
    let (policy, model, image) = ("trusted".into(), "claude-sonnet-4-6".into(), "some/image".into());
    let (base_url, api_key) = ("http://127.0.0.1:9".into(), ApiKeySource::File(dir.join("key")));
    Config {
        network: Default::default(),
        notify: Vec::new(),
        cache: hotcell::gateway::packages::CacheLimits::default(),
        file: None,
        state_dir: dir.join("state"),
        socket: dir.join("s"),
        socket_mode: 0o666,
        socket_group: None,
        engine: None,
        metrics: None,
        policy_dirs: vec![dir.join("policies")],
        egress_sets: hotcell::policy::Sets::built_in(),
        prices_file: None,
        gateway: config::anthropic(base_url, api_key),
        defaults: Defaults { policy, model, image, agent: None },
        limits,
        budgets: hotcell::config::Budgets::default(),
        admin_uids: vec![0],
        access: Vec::new(),
        init_binary: init_binary(),
        log: "warn".into(),
        set_store_aside: false,
        require_doctor: None,
        retention: hotcell::retention::Limits::default(),
    }
}

fn reason(job: &Value) -> (&str, &str) {
    (job["outcome"].as_str().unwrap_or_default(), job["reason"].as_str().unwrap_or_default())
}

#[test]
fn a_cell_that_cannot_be_made_or_started_is_tried_three_times_and_then_fails_its_job_and_leaves_nothing() {
    let house = House::new(2, Script { create_fails: true, ..Script::default() });
    let first = house.submit();
    house.wait_for("its second try", |house| house.engine.count("create") == 2);
    house.engine.script(|s| (s.create_fails, s.start_fails) = (false, true));
    let second = house.submit();
    let (first, second) = (house.done(&first), house.done(&second));
    // The first one's third try was made and could not be started.
    for job in [first, second] {
        assert_eq!(reason(&job), ("failed", "container_start"), "{job}");
        assert_eq!((job["attempt"].as_u64(), job["blame"].as_str()), (Some(3), Some("host")), "{job}");
        assert!(message(&job).ends_with("(try 3 of this job)"), "{job}");
    }
    assert_eq!(house.engine.count("create"), 6);
    house.end();
}

#[test]
fn a_job_that_waits_for_its_next_try_is_cancelled_at_once() {
    let house = House::new(1, Script { create_fails: true, ..Script::default() });
    let job = house.submit();
    house.wait_for("it waits", |house| house.show(&job)["state"] == "parked");
    assert_eq!(house.show(&job)["parked"]["why"], "host_fault");
    house.cancel(&job);
    assert_eq!(reason(&house.done(&job)), ("stopped", "cancelled"));
    assert_eq!(house.engine.count("create"), 1);
    house.end();
}

#[test]
fn a_job_cancelled_while_its_cell_is_made_is_never_started() {
    let house = House::new(1, Script { create_held: true, ..Script::default() });
    let job = house.submit();
    house.wait_for("a create", |house| house.engine.count("create") == 1);
    house.cancel(&job);
    house.cancel(&job);
    house.engine.script(|s| s.create_held = false);
    assert_eq!(reason(&house.done(&job)), ("stopped", "cancelled"));
    assert_eq!(house.engine.count("start"), 0);
    house.end();
}

#[test]
fn a_slot_is_free_only_when_the_engine_has_let_go_of_the_container() {
    let house = House::new(1, Script { remove_fails: true, ..Script::default() });
    let (first, second) = (house.submit(), house.submit());
    house.wait_for("the first cell runs", |house| house.engine.count("wait") == 1);
    house.cancel(&first);
    house.wait_for("removals are tried again and again", |house| house.engine.count("remove") >= 3);
    assert_eq!(house.show(&first)["state"], "collecting", "it is not over while its container is there");
    assert_eq!(house.show(&second)["state"], "queued");
    assert_eq!(house.engine.count("create"), 1);
    house.engine.script(|s| s.remove_fails = false);
    assert_eq!(reason(&house.done(&first)), ("stopped", "cancelled"));
    house.wait_for("the second cell runs", |house| house.engine.count("wait") == 2);
    house.cancel(&second);
    house.done(&second);
    house.end();
}

#[test]
fn an_engine_that_is_away_is_no_proof_that_a_cell_has_ended() {
    let house = House::new(1, Script { wait_fails: true, ..Script::default() });
    let job = house.submit();
    house.wait_for("it is asked again", |house| house.engine.count("wait") >= 3);
    assert_eq!(house.show(&job)["state"], "preparing");
    house.cancel(&job);
    assert_eq!(reason(&house.done(&job)), ("stopped", "cancelled"));
    house.end();
}

fn message(job: &Value) -> &str {
    job["message"].as_str().unwrap_or_default()
}

#[test]
fn a_required_runtime_that_is_not_there_fails_the_job_and_a_listed_fallback_runs_it() {
    let house = House::new(1, Script::default());
    let job = house.done(&house.submit_under("strict"));
    assert_eq!(reason(&job), ("failed", "runtime_unavailable"), "{job}");
    assert_eq!(job["blame"], "host");
    for part in ["policy strict", "runsc: the engine has no runtime", "make gvisor", "runtime_fallback"] {
        assert!(message(&job).contains(part), "{part}: {job}");
    }
    assert_eq!(job["runtime"], Value::Null, "it ran on nothing");
    assert_eq!(house.engine.count("create"), 0);

    let job = house.submit_under("lenient");
    house.wait_for("a cell runs", |house| house.engine.count("wait") == 1);
    assert_eq!(house.show(&job)["runtime"], "runc");
    house.cancel(&job);
    let job = house.done(&job);
    assert_eq!((&job["runtime"], &job["totals"]["runtime"]), (&json!("runc"), &json!("runc")), "{job}");
    assert_eq!(house.engine.with(|state| state.asked.clone()), [None], "the engine's own default is runc");
    house.end();
}

#[test]
fn a_runtime_that_runs_no_cell_is_not_used_and_its_words_are_told() {
    let script = || Script { runtimes: vec!["runsc"], broken_runtime: Some("runsc"), ..Script::default() };
    let house = House::new(1, script());
    let job = house.done(&house.submit_under("strict"));
    assert_eq!(reason(&job), ("failed", "runtime_unavailable"), "{job}");
    assert!(message(&job).contains("runsc: the engine refused to start a container"), "{job}");
    let runsc = || Some("runsc".to_owned());
    assert_eq!(house.engine.with(|state| state.asked.clone()), [runsc()]);

    // The verdict is fresh: the next job does not try again, and runs on what it may run on as well.
    let job = house.submit_under("lenient");
    house.wait_for("a cell runs", |house| house.engine.count("wait") == 1);
    assert_eq!(house.show(&job)["runtime"], "runc");
    assert_eq!(house.engine.with(|state| state.asked.clone()), [runsc(), None]);
    house.cancel(&job);
    house.done(&job);
    let state = house.dir.path().join("state");
    assert!(!state.join("runtimes.json").exists(), "a failed trial is not remembered on the disk");
    house.end();
}
