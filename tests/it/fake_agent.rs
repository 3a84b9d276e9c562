//! Installs the made-up CLI (`fake_agent/agent.rs`) as the only agent of a test's state directory. What it does is
//! told by each job's task.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use hotcell::agent_bundle::{Bundle, PINNED_VERSION, Platform, Qualification};
use serde_json::{Value, json};

use crate::world::World;

/// A world with the made-up agent; `more` are lines for the top of its configuration.
pub(crate) fn world(more: &str) -> World {
    let mut world = World::without_daemon("[default]\ntext = \"never asked\"\n", more);
    install(&world.state_dir());
    world.start();
    world
}

/// A job with this task (see `agent.rs`), on a small disk.
pub(crate) fn spec(task: &str) -> Value {
    json!({ "prompt": task, "policy": "trusted", "limits": { "disk_mib": 64, "memory_mib": 256 } })
}

/// The same with one more limit.
pub(crate) fn limited(task: &str, limit: &str, value: u64) -> Value {
    let mut spec = spec(task);
    spec["limits"][limit] = value.into();
    spec
}

/// Waits for the job's state.
pub(crate) fn until_state(world: &mut World, job: &str, state: &str) {
    let query = format!("SELECT state FROM jobs WHERE id = '{job}'");
    world.wait_for(&format!("{job} is {state}"), |world| {
        let now = world.sql(&query);
        assert!(now == state || now != "done", "it is over before: {}\n{}", world.show(job), world.log());
        now == state
    });
}

/// Waits until some event of the job holds `text`.
pub(crate) fn until_event(world: &mut World, job: &str, text: &str) {
    world.wait_for(&format!("{job} says {text}"), |world| journal(world, job).contains(text));
}

/// What is in the journal's files now, read beside the daemon.
pub(crate) fn journal(world: &World, job: &str) -> String {
    let Ok(entries) = fs::read_dir(world.state_dir().join("jobs").join(job)) else { return String::new() };
    let mut files: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
    files.sort();
    // A segment may be dropped while we look.
    files.iter().map(|f| String::from_utf8_lossy(&fs::read(f).unwrap_or_default()).into_owned()).collect()
}

/// Waits for the job's end: its events and its view.
pub(crate) fn done(world: &mut World, job: &str) -> (Vec<Value>, Value) {
    until_state(world, job, "done");
    // The row is there a moment before its last event: a follower waits for the writer.
    let answer = world.call("GET", &format!("/v1/jobs/{job}/events?follow=1"), "");
    // What was cut out of the middle is told by an event that has the last number of the hole.
    let whole = answer.body.lines().all(|line| !line.contains("\"type\":\"truncated\""));
    let loose = |line: &str| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
    let events =
        if whole { crate::world::events(&answer.body) } else { answer.body.lines().map(loose).collect() };
    (events, world.show(job))
}

/// The job's states in order of their events.
pub(crate) fn states(events: &[Value]) -> Vec<&str> {
    events.iter().filter(|e| e["type"] == "state").map(|e| e["state"].as_str().unwrap()).collect()
}

/// Host process ids of PID 1 and of the agent in a job's cell.
pub(crate) fn processes(world: &World, job: &str) -> (u32, u32) {
    let container =
        world.sql(&format!("SELECT container FROM cells WHERE job = '{job}' ORDER BY rowid DESC"));
    let init: u32 = world.docker(&["inspect", "-f", "{{.State.Pid}}", &container]).trim().parse().unwrap();
    let children = fs::read_to_string(format!("/proc/{init}/task/{init}/children")).unwrap();
    (init, children.split_whitespace().next().unwrap().parse().unwrap())
}

/// SIGKILL to a process.
pub(crate) fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

/// Names of this world's containers.
pub(crate) fn containers(world: &World) -> Vec<String> {
    let filter = format!("label=hotcell.instance={}", world.instance());
    world
        .docker(&["ps", "-a", "--filter", &filter, "--format", "{{.Names}}"])
        .lines()
        .map(str::to_owned)
        .collect()
}

/// Puts the made-up agent into `state` in place of the machine's own bundles. Before the daemon starts.
pub(crate) fn install(state: &Path) {
    let agents = state.join("agents");
    if agents.is_symlink() {
        fs::remove_file(&agents).unwrap();
    }
    let platform = Platform::of_host().unwrap();
    let dir = agents.join(format!("{PINNED_VERSION}-{platform}"));
    fs::DirBuilder::new().recursive(true).mode(0o711).create(&dir).unwrap();
    let claude = dir.join("claude");
    fs::copy(binary(), &claude).unwrap();
    fs::set_permissions(&claude, fs::Permissions::from_mode(0o711)).unwrap();
    let bundle = Bundle {
        version: PINNED_VERSION.parse().unwrap(),
        platform,
        sha256: "0".repeat(64),
        size_bytes: fs::metadata(&claude).unwrap().len(),
        package: platform.package().to_owned(),
        integrity: "sha512-made-up".to_owned(),
        installed_at_ms: 0,
        state: Qualification::Installed,
    };
    fs::write(dir.join("bundle.json"), serde_json::to_vec(&bundle).unwrap()).unwrap();
}

/// Compiled once a test run; kept for the next one while its source is the same.
fn binary() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/fake_agent/agent.rs");
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake-agent");
        let newer = |a: &Path, b: &Path| {
            let time = |p: &Path| fs::metadata(p).and_then(|m| m.modified()).ok();
            time(a).is_some_and(|a| time(b).is_some_and(|b| a > b))
        };
        if !newer(&out, &source) {
            let fresh = out.with_extension(std::process::id().to_string());
            let mut rustc = Command::new("rustc");
            rustc
                .args(["--edition=2024", "-O", "-Ctarget-feature=+crt-static", "-o"])
                .arg(&fresh)
                .arg(&source);
            let built = rustc.output().expect("rustc");
            assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
            fs::rename(&fresh, &out).unwrap();
        }
        out
    })
}
