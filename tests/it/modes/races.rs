//! The race for a tool call that waits for a policy's hook: the repository's settings, its skill and what the agent
//! wrote into HOME all say yes at once, and the hook is slow, is killed, hangs, babbles, or loses its daemon. In every
//! mode the call runs only after a decision, and none of these is one.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::walls::{copy_tree, zoo};
use crate::world::{World, tool_results};

const MODES: [&str; 5] = ["bypassPermissions", "default", "acceptEdits", "plan", "dontAsk"];

/// What happens to the hook of a call, in the order of the calls, and a part of what the agent reads.
const FATES: [(&str, &str); 6] = [
    ("slow", "the hook says no"),
    ("killed", "it ended with code 137"),
    ("hangs", "did not end within 2 s"),
    ("babbles", "its output is no JSON object"),
    ("restarted", "the hook says no"),
    ("away", "the hook says no"),
];

/// The agent loads the skill, writes into its HOME, makes one call for each fate, one that the hook has nothing
/// against, and an edit that no rule speaks of.
fn script() -> String {
    let bash = |command: &str| {
        format!("{{ tool = \"Bash\", input = {{ command = \"{command}\", description = \"the race\" }} }}")
    };
    let mut blocks =
        vec!["{ tool = \"Skill\", input = { skill = \"evil\" } }".to_owned(), bash("sh home.sh")];
    blocks.extend(FATES.iter().map(|(fate, _)| bash(&format!("touch {fate}"))));
    blocks.push(bash("touch agreed"));
    let edit = "old_string = \"#\", new_string = \"# edited\"";
    for (tool, more) in [("Read", ""), ("Edit", edit)] {
        let comma = if more.is_empty() { "" } else { ", " };
        blocks.push(format!(
            "{{ tool = \"{tool}\", input = {{ file_path = \"/workspace/home.sh\"{comma}{more} }} }}"
        ));
    }
    let mut script = "usage = { input = 10, output = 20 }\n".to_owned();
    for (turn, block) in blocks.iter().enumerate() {
        script += &format!("[[reply]]\nwhen = {{ turn = {turn}, tools = true }}\nblocks = [{block}]\n");
    }
    script + "[default]\ntext = \"done\"\n"
}

/// The hook: it is told its fate as its argument, and the job's mode on its standard input. `restarted` and `away` are
/// asked twice: the first time they wait for the test, and would say yes if they outlived their daemon.
fn hook(seen: &Path) -> String {
    let deny = r#"{"hookSpecificOutput":{"hookEventName":"PreToolUse","permissionDecision":"deny","permissionDecisionReason":"the hook says no"}}"#;
    format!(
        r#"#!/bin/sh
mode=$(sed 's/.*"permission_mode":"\([a-zA-Z]*\)".*/\1/')
log={seen}/$1-$mode
echo asked >> "$log"
case $1 in
  slow) sleep 3; echo '{deny}' ;;
  killed) touch "$log-runs"; HOOK="$log" exec sleep 600 ;;
  hangs) exec sleep 600 ;;
  babbles) echo yes ;;
  agreed) ;;
  *)
    if [ "$(wc -l < "$log")" -gt 1 ]; then sleep 1; echo '{deny}'; exit; fi
    for i in $(seq 900); do [ -e {seen}/$1-go ] && break; sleep 0.1; done
    sleep 3; touch "$log-said" ;;
esac
"#,
        seen = seen.display()
    )
}

fn rules(hook: &Path) -> String {
    let fates = FATES.iter().map(|(fate, _)| *fate).chain(["agreed"]);
    fates
        .map(|fate| {
            let timeout_s = if fate == "hangs" { 2 } else { 120 };
            format!(
                "[[rule]]\nname = \"{fate}\"\ntool = \"Bash\"\ncommand = \"touch {fate}\"\naction = \"hook\"\nrun = [{hook:?}, \"{fate}\"]\ntimeout_s = {timeout_s}\n"
            )
        })
        .collect()
}

/// The process that has `HOOK=<log>` in its environment. It runs in a namespace where its own number is another one.
fn process_of(log: &Path) -> Option<rustix::process::Pid> {
    let mark = format!("HOOK={}", log.display());
    let has = |pid: &i32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
    };
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let mut pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.find(has).and_then(rustix::process::Pid::from_raw)
}

/// Whether a hook of this fate runs.
fn runs(hook: &Path, fate: &str) -> bool {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let mut commands = entries.map(|entry| std::fs::read(entry.path().join("cmdline")).unwrap_or_default());
    let called = |command: Vec<u8>| {
        let mut words = command.split(|byte| *byte == 0);
        words.any(|word| word == hook.as_os_str().as_encoded_bytes())
            && words.any(|word| word == fate.as_bytes())
    };
    commands.any(called)
}

fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

#[test]
fn a_call_that_waits_for_a_hook_runs_in_no_mode_before_the_hook_has_said_yes() {
    let policies = tempfile::tempdir().unwrap();
    let more = format!("limits.slots = {}\npolicy_dirs = [{:?}]", MODES.len(), policies.path());
    let mut world = World::without_daemon(&script(), &more);
    // Hooks run as whoever submits, here root.
    let seen = world.workspace("seen", 0);
    let program = world.path("hook");
    std::fs::write(&program, hook(&seen)).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let text = format!("{}\n{}", include_str!("../../../policies/trusted.toml"), rules(&program));
    std::fs::write(policies.path().join("ruled.toml"), text).unwrap();
    world.start();

    let jobs = MODES.map(|mode| {
        let dir = world.path(mode);
        copy_tree(&zoo("repos/hostile"), &dir);
        let spec = json!({ "prompt": "race", "policy": "ruled", "permission_mode": mode,
            "allowed_tools": ["Bash", "Skill"], "workspace": { "path": dir, "mode": "bind" } });
        (mode, world.submit(&spec), dir)
    });
    let undecided = |fate: &str| {
        for (mode, _, dir) in &jobs {
            assert!(!dir.join(fate).exists(), "{mode}: touch {fate} ran before it was decided");
        }
    };
    let all = |name: &str| MODES.map(|mode| seen.join(name.replace("MODE", mode)));

    // kill -9 of each hook.
    let begun = all("killed-MODE-runs");
    world.wait_for("every mode's second hook runs", |_| begun.iter().all(|path| path.exists()));
    undecided("killed");
    for log in all("killed-MODE") {
        world.wait_for("the hook is found", |_| process_of(&log).is_some());
        let pid = process_of(&log).expect("the hook's process");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }

    // kill -9 of the daemon while the hooks run, and at once another daemon.
    let asked = all("restarted-MODE");
    world.wait_for("the hooks are asked", |_| asked.iter().all(|path| lines(path) == 1));
    world.kill();
    undecided("restarted");
    world.start();
    world.wait_for("they are asked again", |_| asked.iter().all(|path| lines(path) == 2));
    undecided("restarted");
    std::fs::write(seen.join("restarted-go"), "").unwrap();

    // The daemon stays away: its hooks go with it, and have said nothing.
    let (asked, said) = (all("away-MODE"), all("away-MODE-said"));
    world.wait_for("the hooks are asked", |_| asked.iter().all(|path| lines(path) == 1));
    world.kill();
    world.wait_for("the hooks are gone", |_| !runs(&program, "away"));
    std::fs::write(seen.join("away-go"), "").unwrap();
    assert!(said.iter().all(|path| !path.exists()), "a hook outlived its daemon");
    undecided("away");
    world.start();

    for (mode, id, dir) in &jobs {
        let events = world.follow(id);
        let job = world.show(id);
        assert_eq!(job["outcome"], "succeeded", "{mode}: {job}");
        check(mode, &events, dir);
    }
    assert!(FATES.iter().all(|(fate, _)| !runs(&program, fate)), "a hook is left");
    drop(policies);
    world.end();
}

/// Each call was decided once, as its hook's fate says, and ran or not accordingly.
fn check(mode: &str, events: &[Value], dir: &Path) {
    let results = tool_results(events);
    for (fate, words) in FATES {
        assert!(!dir.join(fate).exists(), "{mode}: touch {fate} ran");
        assert!(results.contains(words), "{mode}: {fate}: {words:?} is not in {results}");
        let decided: Vec<&Value> =
            events.iter().filter(|e| e["type"] == "tool" && e["rule"] == fate).collect();
        assert_eq!(decided.len(), 1, "{mode}: {fate}: decided once: {decided:?}");
        assert_eq!(decided[0]["decision"], "deny", "{mode}: {fate}");
    }
    assert!(dir.join("agreed").exists(), "{mode}: what the hook has nothing against runs: {results}");
    let by_itself = matches!(mode, "bypassPermissions" | "acceptEdits");
    let edited = std::fs::read_to_string(dir.join("home.sh")).unwrap().contains("# edited");
    assert_eq!(edited, by_itself, "{mode}: the mode decides, not HOME: {results}");
    let marks: Vec<_> = std::fs::read_dir(dir.join("marks")).into_iter().flatten().flatten().collect();
    assert!(marks.is_empty(), "{mode}: {marks:?} ran");
}
