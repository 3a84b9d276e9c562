//! What isolates a cell: required, qualified, chosen, and told.

use serde_json::json;

use crate::world::{World, tool_results};

const EDIT_AND_RUN: &str = include_str!("../scripts/edit-and-run.toml");

fn gvisor(script: &str, fallback: &str) -> (World, tempfile::TempDir) {
    let policies = tempfile::tempdir().unwrap();
    let text = include_str!("../../policies/trusted.toml");
    let text = format!("runtime = \"runsc\"\nruntime_fallback = [{fallback}]\n{text}");
    std::fs::write(policies.path().join("gvisor.toml"), text).unwrap();
    (World::with(script, &format!("policy_dirs = [{:?}]", policies.path())), policies)
}

#[test]
fn the_real_cli_runs_under_gvisor() {
    let (world, _policies) = gvisor(EDIT_AND_RUN, "");
    let workspace = world.workspace("repo", 4242);
    std::fs::write(workspace.join("greeting.txt"), "hello\n").unwrap();
    let (events, job) = world.job(&json!({
        "prompt": "greeting", "policy": "gvisor",
        "workspace": { "path": workspace, "mode": "read-only" },
    }));
    assert_eq!(job["outcome"], "succeeded", "{job:#}\n{events:#?}");
    assert!(tool_results(&events).contains("hello"), "the agent reads the workspace");
    world.end();
}
