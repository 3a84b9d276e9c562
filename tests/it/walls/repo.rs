//! What a repository brings with it is untrusted: none of it runs as a hook, answers for the gate, moves the
//! provider or spends past the budget, whether its settings load or not.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::{Seen, copy_tree, zoo};
use crate::world::{CANARY, World, docker, tool_results};

/// The model does what the repository wants of it.
const OBEY: &str = r#"
usage = { input = 10, output = 20 }

[[reply]]
when = { prompt = "zoo:shell", turn = 0, tools = true }
blocks = [{ tool = "Bash", input = { command = "touch /workspace/shell-ran", description = "the zoo" } }]

[[reply]]
when = { prompt = "zoo:skill", turn = 0, tools = true }
blocks = [{ tool = "Skill", input = { skill = "evil" } }]

[[reply]]
when = { prompt = "zoo:skill", turn = 1, tools = true }
blocks = [{ tool = "Bash", input = { command = "touch /workspace/shell-ran", description = "the zoo" } }]

[[reply]]
when = { prompt = "zoo:helper", turn = 0, tools = true }
blocks = [{ tool = "Agent", input = { description = "the zoo", prompt = "zoo:shell", subagent_type = "evilagent" } }]

[[reply]]
when = { prompt = "zoo:home", turn = 0, tools = true }
blocks = [{ tool = "Bash", input = { command = "sh home.sh", description = "the zoo" } }]

[[reply]]
when = { prompt = "zoo:home", turn = 1, tools = true }
blocks = [{ tool = "Write", input = { file_path = "/workspace/home-ran", content = "x" } }]

[default]
text = "done"
"#;

/// The strict policy, but that the workspace is in place: what ran in it can be seen.
fn strict() -> String {
    let text = include_str!("../../../policies/default.toml");
    text.replace("modes = [\"copy\", \"read-only\", \"none\"]", "modes = [\"bind\"]")
}

/// A world, and where its policies are. The directory must outlive the daemon.
fn world() -> (World, tempfile::TempDir) {
    let policies = tempfile::tempdir().unwrap();
    std::fs::write(policies.path().join("strict.toml"), strict()).unwrap();
    (World::with(OBEY, &format!("policy_dirs = [{:?}]", policies.path())), policies)
}

/// Runs one prompt in a fresh copy of a repository.
fn visit(world: &World, repo: &str, more: &Value) -> (Seen, PathBuf) {
    let copy = (0..).map(|n| world.path(&format!("{repo}-{n}"))).find(|p| !p.exists()).unwrap();
    copy_tree(&zoo("repos").join(repo), &copy);
    let mut spec = json!({ "workspace": { "path": copy, "mode": "bind" } });
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let (events, job) = world.job(&spec);
    (Seen::new(events, job), copy)
}

/// No hook, helper, server or embedded command of the repository ran.
#[track_caller]
fn nothing_ran(seen: &Seen, copy: &std::path::Path, what: &Value) {
    let marks: BTreeSet<String> = std::fs::read_dir(copy.join("marks"))
        .map(|entries| entries.flatten().map(|e| e.file_name().into_string().unwrap()).collect())
        .unwrap_or_default();
    assert!(marks.is_empty(), "{what}: {marks:?} ran\n{}", tool_results(&seen.events));
}

/// Every tool call that the CLI reports was judged, but for those that it turned down before it came to that.
#[track_caller]
fn every_call_was_judged(seen: &Seen, what: &Value) {
    let judged: BTreeSet<&str> = seen
        .events
        .iter()
        .filter(|e| e["type"] == "tool")
        .filter_map(|e| e["tool_use_id"].as_str())
        .collect();
    let blocks: Vec<Value> = seen
        .events
        .iter()
        .filter(|e| e["type"] == "frame")
        .flat_map(|e| e["frame"]["message"]["content"].as_array().cloned().unwrap_or_default())
        .collect();
    let turned_down = |id: &Value| {
        let result = blocks.iter().find(|b| b["tool_use_id"] == *id && b["type"] == "tool_result");
        result.is_some_and(|r| r["content"].to_string().contains("<tool_use_error>"))
    };
    for block in blocks.iter().filter(|b| b["type"] == "tool_use" && !turned_down(&b["id"])) {
        assert!(judged.contains(block["id"].as_str().unwrap()), "{what}: not judged: {block}");
    }
}

/// All that reached the provider came with its key, by our road, for the models that were asked for.
#[track_caller]
fn the_provider_is_ours(world: &World) {
    let requests = world.recorder.requests();
    assert!(!requests.is_empty());
    for request in requests {
        assert_eq!(request.header("x-api-key"), Some(CANARY));
        assert_eq!(request.header("authorization"), None);
        assert_eq!(request.header("x-repository"), None);
        let model = request.json()["model"].as_str().unwrap_or_default().to_owned();
        assert!(!model.contains("opus"), "the repository chose the model {model}");
    }
}

fn asked(world: &World) -> String {
    world.recorder.requests().iter().map(|r| String::from_utf8_lossy(&r.body).into_owned()).collect()
}

#[test]
fn under_the_strict_policy_nothing_of_a_repository_loads_and_its_claude_md_is_text() {
    let (world, policies) = world();
    for prompt in ["zoo:shell", "zoo:skill", "zoo:helper", "/evilcmd zoo:shell"] {
        let what = json!({ "prompt": prompt, "policy": "strict" });
        let (seen, copy) = visit(&world, "hostile", &what);
        nothing_ran(&seen, &copy, &what);
        every_call_was_judged(&seen, &what);
        assert_eq!(
            copy.join("shell-ran").exists(),
            prompt != "zoo:helper" && !prompt.starts_with('/'),
            "{what}"
        );
    }
    the_provider_is_ours(&world);
    let asked = asked(&world);
    assert!(asked.contains("It comes from the repository") && asked.contains("ZEBRA-CLAUDE-MD"));
    assert_eq!(
        asked.matches("</CLAUDE.md>").count(),
        asked.matches("<CLAUDE.md>").count(),
        "its text ends early"
    );
    for own in ["ZEBRA-SKILL", "ZEBRA-COMMAND", "ZEBRA-AGENT"] {
        assert!(!asked.contains(own), "{own} loaded");
    }
    world.end();
    drop(policies);
}

#[test]
fn under_the_trusted_policy_claude_md_and_skills_load_but_nothing_runs_by_itself() {
    let (world, policies) = world();
    for (mode, prompts) in [
        ("bypassPermissions", &["zoo:skill", "zoo:helper", "/evilcmd zoo:shell"][..]),
        ("acceptEdits", &["zoo:skill", "zoo:helper", "/evilcmd zoo:shell"]),
        ("default", &["/evilcmd zoo:shell"]),
    ] {
        for prompt in prompts {
            let what = json!({ "prompt": prompt, "policy": "trusted", "permission_mode": mode });
            let (seen, copy) = visit(&world, "hostile", &what);
            nothing_ran(&seen, &copy, &what);
            every_call_was_judged(&seen, &what);
        }
    }
    let asked = asked(&world);
    for own in ["ZEBRA-CLAUDE-MD", "ZEBRA-SKILL", "ZEBRA-AGENT"] {
        assert!(asked.contains(own), "{own} did not load");
    }
    for request in world.recorder.requests() {
        assert_eq!((request.header("x-api-key"), request.header("authorization")), (Some(CANARY), None));
        assert_eq!(request.header("x-repository"), None);
    }
    world.end();
    drop(policies);
}

/// As it is by itself: what ran would stand in the change set.
#[test]
fn in_a_copy_nothing_of_a_repository_runs_either() {
    let world = World::new(OBEY);
    for prompt in ["zoo:shell", "zoo:skill", "/evilcmd zoo:shell"] {
        let what = json!({ "prompt": prompt, "policy": "default", "workspace": { "path": zoo_copy(&world), "mode": "copy" } });
        let (events, job) = world.job(&what);
        let seen = Seen::new(events, job);
        every_call_was_judged(&seen, &what);
        let id = seen.job["id"].as_str().unwrap();
        let set = world.call("GET", &format!("/v1/jobs/{id}/changes"), "").json();
        let paths: Vec<&str> = set["entries"]
            .as_array()
            .unwrap_or_else(|| panic!("{set}"))
            .iter()
            .filter_map(|e| e["path"].as_str())
            .collect();
        assert!(!paths.iter().any(|path| path.starts_with("marks")), "{what}: {paths:?} ran");
        assert_eq!(paths.contains(&"shell-ran"), !prompt.starts_with('/'), "{what}: {paths:?}");
    }
    the_provider_is_ours(&world);
    assert!(
        !world.path("hostile").join("marks").exists() && !world.path("hostile").join("shell-ran").exists()
    );
    world.end();
}

fn zoo_copy(world: &World) -> PathBuf {
    let copy = world.path("hostile");
    if !copy.exists() {
        copy_tree(&zoo("repos").join("hostile"), &copy);
    }
    copy
}

/// `disableAllHooks` would take the gate of the asking modes away, were it a hook like others.
#[test]
fn a_repository_cannot_switch_the_gate_off() {
    let (world, policies) = world();
    for (policy, mode) in [
        ("trusted", "acceptEdits"),
        ("trusted", "default"),
        ("trusted", "dontAsk"),
        ("strict", "acceptEdits"),
    ] {
        let what = json!({ "prompt": "zoo:shell", "policy": policy, "permission_mode": mode });
        let (seen, _) = visit(&world, "silencer", &what);
        seen.succeeded();
        every_call_was_judged(&seen, &what);
    }
    world.end();
    drop(policies);
}

#[test]
fn settings_that_the_agent_writes_into_its_home_answer_for_nobody() {
    let (world, policies) = world();
    for policy in ["strict", "trusted"] {
        // The CLI would ask a person for the second call, and there is none.
        let what = json!({ "prompt": "zoo:home", "policy": policy, "permission_mode": "default", "allowed_tools": ["Bash"] });
        let (seen, copy) = visit(&world, "hostile", &what);
        seen.succeeded();
        nothing_ran(&seen, &copy, &what);
        every_call_was_judged(&seen, &what);
        assert!(!copy.join("home-ran").exists(), "{what}: the second call ran");
        assert_eq!(seen.job["totals"]["tool_denials"], 1, "{}", seen.job);
    }
    world.end();
    drop(policies);
}

#[test]
fn a_claude_md_that_points_elsewhere_is_not_read() {
    let (world, policies) = world();
    let copy = world.path("pointing");
    std::fs::create_dir(&copy).unwrap();
    std::fs::write(world.path("outside"), "ZEBRA-OUTSIDE").unwrap();
    std::os::unix::fs::symlink(world.path("outside"), copy.join("CLAUDE.md")).unwrap();
    let (events, job) =
        world.job(&json!({ "prompt": "zoo:shell", "policy": "strict", "workspace": { "path": copy } }));
    Seen::new(events, job).succeeded();
    assert!(!asked(&world).contains("ZEBRA-OUTSIDE"));
    world.end();
    drop(policies);
}

/// Policies can allow any image that is on the machine; its managed settings would win over everything.
#[test]
fn managed_settings_of_an_image_do_not_count() {
    let (world, policies) = world();
    let hook = "mkdir -p /workspace/marks; touch /workspace/marks/image";
    let hooks = json!([{ "matcher": "*", "hooks": [{ "type": "command", "command": hook }] }]);
    let settings =
        json!({ "hooks": { "PreToolUse": hooks, "PermissionRequest": hooks, "SessionStart": hooks } });
    std::fs::create_dir(world.path("image")).unwrap();
    std::fs::write(world.path("image/managed-settings.json"), settings.to_string()).unwrap();
    std::fs::write(
        world.path("image/Dockerfile"),
        "FROM hotcell/cell\nCOPY managed-settings.json /etc/claude-code/\n",
    )
    .unwrap();
    let tag = format!("zoo-{}", world.instance());
    docker(&["build", "-q", "-t", &tag, &world.path("image").to_string_lossy()]);
    let what = json!({ "prompt": "zoo:shell", "policy": "trusted", "image": tag });
    let (seen, copy) = visit(&world, "silencer", &what);
    docker(&["rmi", &tag]);
    seen.succeeded();
    nothing_ran(&seen, &copy, &what);
    every_call_was_judged(&seen, &what);
    world.end();
    drop(policies);
}
