//! The bare CLI: the same binary, run outside any cell as an ordinary user with a HOME of its own, against a scripted
//! model on loopback. What a tool call comes to there is what hotcell is compared with.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use hotcell::model::{Recorder, Script, serve};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Who runs it: somebody who is not root.
const UID: u32 = 4242;

/// What the agent read about each call, by the call's id: whether it is an error, and the text.
pub(super) type Results = BTreeMap<String, (bool, String)>;

/// The CLI that cells run.
fn binary() -> PathBuf {
    let state = std::env::var_os("HOTCELL_STATE_DIR")
        .map_or_else(|| PathBuf::from("/var/lib/hotcell"), PathBuf::from);
    let agents = std::fs::read_dir(state.join("agents")).expect("run `make image`").flatten();
    let wanted = |path: &PathBuf| {
        path.join("claude").exists() && path.to_string_lossy().contains(hotcell::agent_bundle::PINNED_VERSION)
    };
    agents.map(|entry| entry.path()).find(wanted).expect("the pinned CLI: run `make image`").join("claude")
}

/// A run: `workspace` is its directory, and `script` speaks of `/workspace` and `/home/agent`.
pub(super) fn run(workspace: &Path, script: &str, flags: &[String]) -> Results {
    let home = workspace.with_extension("home");
    std::fs::create_dir(&home).unwrap();
    std::fs::set_permissions(&home, std::fs::Permissions::from_mode(0o755)).unwrap();
    own(&home);
    own(workspace);
    let (here, own_home) = (workspace.display().to_string(), home.display().to_string());
    let script = script.replace("/workspace", &here).replace("/home/agent", &own_home);
    let script = Arc::new(Script::parse(&script, "test").expect("the test's script"));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let stop = CancellationToken::new();
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("loopback");
    let base_url = format!("http://{}", listener.local_addr().unwrap());
    runtime.spawn(serve(listener, script, Arc::new(Recorder::off()), stop.clone()));
    let mut command = Command::new(binary());
    command
        .args(["-p", super::table::PROMPT, "--output-format=stream-json", "--verbose"])
        .args(["--model=claude-sonnet-4-6", "--setting-sources=project"])
        .args(flags)
        .current_dir(workspace)
        .env_clear()
        .envs([("PATH", "/usr/local/bin:/usr/bin:/bin"), ("LANG", "C.UTF-8"), ("ANTHROPIC_API_KEY", "x")])
        .envs([("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1"), ("DISABLE_AUTOUPDATER", "1")])
        .env("HOME", &home)
        .env("ANTHROPIC_BASE_URL", base_url)
        .stdin(Stdio::null())
        .uid(UID)
        .gid(UID);
    let output = command.output().expect("the CLI");
    stop.cancel();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let frames = String::from_utf8(output.stdout).unwrap();
    let frames = frames.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let mut results = results(frames);
    for (_, text) in results.values_mut() {
        *text = text.replace(&here, "/workspace").replace(&own_home, "/home/agent");
    }
    results
}

/// The results of tool calls in a conversation; the first of each call.
pub(super) fn results(frames: impl Iterator<Item = Value>) -> Results {
    let mut results = Results::new();
    for frame in frames.filter(|frame| frame["type"] == "user") {
        for block in frame["message"]["content"].as_array().into_iter().flatten() {
            if let Some(id) = block["tool_use_id"].as_str() {
                let text = match &block["content"] {
                    Value::String(text) => text.clone(),
                    other => other.to_string(),
                };
                results.entry(id.to_owned()).or_insert((block["is_error"] == true, text));
            }
        }
    }
    results
}

/// Gives a tree to the user who runs the CLI.
fn own(path: &Path) {
    std::os::unix::fs::lchown(path, Some(UID), Some(UID)).unwrap();
    if path.is_dir() {
        for entry in std::fs::read_dir(path).unwrap().flatten() {
            own(&entry.path());
        }
    }
}
