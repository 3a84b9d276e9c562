//! What isolates a cell: required, qualified by a trial, chosen in the policy's order, and told. `make gvisor`,
//! which `make test` runs, adds gVisor to the engine; where it cannot be had, these tests look at the refusal.

use serde_json::{Value, json};

use crate::world::{World, docker, one_command, tool_results};

const EDIT_AND_RUN: &str = include_str!("../scripts/edit-and-run.toml");

/// A world with the policy `gvisor`: `trusted` on runsc.
fn gvisor(script: &str, fallback: &str) -> (World, tempfile::TempDir) {
    let policies = tempfile::tempdir().unwrap();
    let text = include_str!("../../policies/trusted.toml");
    let text = format!("runtime = \"runsc\"\nruntime_fallback = [{fallback}]\n{text}");
    std::fs::write(policies.path().join("gvisor.toml"), text).unwrap();
    (World::with(script, &format!("policy_dirs = [{:?}]", policies.path())), policies)
}

/// Whether the engine has gVisor; where it has not, a job under the world's policy `gvisor`, which requires it, must fail
/// and say so.
pub(crate) fn here(world: &World) -> bool {
    let there = docker(&["info", "--format", "{{json .Runtimes}}"]).contains("\"runsc\"");
    if !there {
        let (_, job) = world.job(&json!({ "prompt": "x", "policy": "gvisor" }));
        assert_eq!(
            (&job["outcome"], &job["reason"]),
            (&json!("failed"), &json!("runtime_unavailable")),
            "{job:#}"
        );
        assert!(job["message"].as_str().unwrap().contains("make gvisor"), "{job:#}");
    }
    there
}

fn cell_event(events: &[Value]) -> &Value {
    events.iter().find(|e| e["type"] == "cell").expect("an event of the cell")
}

#[test]
fn the_real_cli_works_in_place_under_gvisor_as_its_submitter() {
    let (world, _policies) = gvisor(EDIT_AND_RUN, "");
    if !here(&world) {
        return world.end();
    }
    let uid = 4242;
    let workspace = world.workspace("repo", uid);
    std::fs::write(workspace.join("greeting.txt"), "hello\n").unwrap();
    std::os::unix::fs::chown(workspace.join("greeting.txt"), Some(uid), Some(uid)).unwrap();
    let spec = json!({ "prompt": "greeting", "policy": "gvisor", "workspace": { "path": workspace, "mode": "bind" } });
    let submitted = world.curl("POST", "/v1/jobs", &spec.to_string(), &[], Some(uid)).unwrap();
    assert_eq!(submitted.status, 201, "{}", submitted.body);
    let id = submitted.json()["id"].as_str().unwrap().to_owned();
    let events = world.follow(&id);
    let job = world.show(&id);
    assert_eq!(job["outcome"], "succeeded", "{job:#}\n{}", world.log());
    assert_eq!(std::fs::read_to_string(workspace.join("greeting.txt")).unwrap(), "hello, world\n");
    let meta = std::fs::metadata(workspace.join("greeting.txt")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&meta), uid, "what it wrote belongs to the submitter");
    // What it ran on is in the journal, in the view, in the totals and in what people read.
    assert_eq!(
        (&cell_event(&events)["runtime"], &cell_event(&events)["instead"]),
        (&json!("runsc"), &Value::Null)
    );
    assert_eq!((&job["runtime"], &job["totals"]["runtime"]), (&json!("runsc"), &json!("runsc")));
    let (code, shown, err) = world.run(&["show", &id, "--socket", world.socket().to_str().unwrap()]);
    assert!(code == 0 && shown.contains("runsc (gVisor)"), "{shown}{err}");
    // The one trial is remembered by the hash of the runtime's program.
    let kept = std::fs::read_to_string(world.state_dir().join("runtimes.json")).unwrap();
    let kept: Value = serde_json::from_str(&kept).unwrap();
    assert_eq!(
        (kept[0]["runtime"].as_str(), kept[0]["sha256"].as_str().map(str::len)),
        (Some("runsc"), Some(64))
    );
    assert_eq!(world.sql("SELECT count(*) FROM cells"), "2", "the trial's and the job's");
    assert_eq!(world.sql("SELECT count(*) FROM cells WHERE gone_ms IS NULL"), "0");
    world.end();
}

#[test]
fn under_gvisor_the_kernel_is_another_one_and_a_read_only_workspace_stays_so() {
    let script = one_command(
        "cat /proc/version; cat readable; touch written; echo code $?; \
         cat /proc/$PPID/mem >/dev/null; echo mem $?; find / -name 'sk-canary*' 2>/dev/null | head -1",
    );
    let (world, _policies) = gvisor(&script, "");
    if !here(&world) {
        return world.end();
    }
    let workspace = world.workspace("repo", 0);
    std::fs::write(workspace.join("readable"), "readable text\n").unwrap();
    let spec = |mode: &str| json!({ "prompt": "x", "policy": "gvisor", "workspace": { "path": workspace, "mode": mode } });
    let (events, job) = world.job(&spec("read-only"));
    assert_eq!(job["outcome"], "succeeded", "{job:#}\n{}", world.log());
    let text = tool_results(&events);
    assert!(text.contains("4.4.0") && text.contains("readable text"), "{text}");
    assert!(text.contains("Read-only file system") && text.contains("code 1"), "{text}");
    assert!(text.contains("mem 1"), "the CLI's memory could be opened: {text}");
    assert!(!workspace.join("written").exists());
    // A copy is the cell's own to write, whoever submitted it.
    let (events, job) = world.job(&spec("copy"));
    assert_eq!(job["outcome"], "succeeded", "{job:#}\n{}", world.log());
    let text = tool_results(&events);
    assert!(text.contains("readable text") && text.contains("code 0"), "{text}");
    assert!(!workspace.join("written").exists());
    // In place it would have to be root's own files as root: refused, not loosened.
    let (_, job) = world.job(&spec("bind"));
    assert_eq!((&job["outcome"], &job["reason"]), (&json!("failed"), &json!("workspace_setup")), "{job:#}");
    assert!(job["message"].as_str().unwrap().contains("submit as another user"), "{job:#}");
    world.end();
}
