//! The permission modes against a tool that the policy allows and one that it denies.

use serde_json::json;

use crate::world::World;

/// One call of each.
const BOTH: &str = r#"
usage = { input = 10, output = 20 }

[[reply]]
when = { turn = 0, tools = true }
blocks = [
  { tool = "Bash", input = { command = "touch shell-ran", description = "the zoo" } },
  { tool = "Write", input = { file_path = "/workspace/write-ran", content = "x" } },
  { tool = "Read", input = { file_path = "/workspace/readable" } },
]

[default]
text = "done"
"#;

/// Per mode: does a shell command that writes run by itself, and with `allowed_tools: ["Bash"]`?
const TABLE: [(&str, bool, bool); 5] = [
    ("bypassPermissions", true, true),
    ("default", false, true),
    // Simple file commands within the workspace are edits.
    ("acceptEdits", true, true),
    ("plan", false, true),
    ("dontAsk", false, true),
];

#[test]
fn each_mode_keeps_its_meaning_below_the_policy() {
    let policies = tempfile::tempdir().unwrap();
    // A beginning with '*' is the daemon's to judge; an exact name is taken out of the CLI's tools as well.
    let policy =
        include_str!("../../../policies/trusted.toml").replace("\"WebSearch\"]", "\"WebSearch\", \"Writ*\"]");
    std::fs::write(policies.path().join("zoo.toml"), policy).unwrap();
    let world = World::with(BOTH, &format!("policy_dirs = [{:?}]", policies.path()));
    let mut seen = Vec::new();
    for (mode, _, _) in TABLE {
        let mut ran = Vec::new();
        for allowed in [vec![], vec!["Bash"]] {
            let dir = world.workspace(&format!("{mode}-{}", allowed.len()), 0);
            std::fs::write(dir.join("readable"), "readable text").unwrap();
            let spec = json!({ "prompt": "x", "policy": "zoo", "permission_mode": mode, "allowed_tools": allowed, "workspace": { "path": dir } });
            let (events, job) = world.job(&spec);
            assert_eq!(job["outcome"], "succeeded", "{mode}: {job}");
            assert!(!dir.join("write-ran").exists(), "{mode}: a tool that the policy denies ran");
            let denied = |e: &&serde_json::Value| {
                e["type"] == "tool" && e["tool"] == "Write" && e["decision"] == "deny"
            };
            let rule =
                events.iter().find(denied).unwrap_or_else(|| panic!("{mode}: Write was not judged"))["rule"]
                    .clone();
            assert_eq!(rule, "tools.deny Writ*", "{mode}");
            assert!(
                crate::world::tool_results(&events).contains("readable text"),
                "{mode}: Read did not run"
            );
            ran.push(dir.join("shell-ran").exists());
        }
        seen.push((mode, ran[0], ran[1]));
    }
    assert_eq!(seen, TABLE);
    world.end();
}

#[test]
fn auto_is_refused_by_name() {
    let world = World::new(BOTH);
    let answer =
        world.call("POST", "/v1/jobs", &json!({ "prompt": "x", "permission_mode": "auto" }).to_string());
    assert_eq!(answer.status, 400, "{}", answer.body);
    assert!(
        answer.body.contains("auto")
            && answer.body.contains("permission_mode") | answer.body.contains("variant"),
        "{}",
        answer.body
    );
    assert!(answer.body.contains("bypassPermissions"), "what there is instead: {}", answer.body);
    world.end();
}
