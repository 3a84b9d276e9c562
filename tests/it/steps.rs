//! The job's own commands around its agent, with the real CLI in real cells: setup before it, verification after it in a
//! fresh cell, and another try for the agent where that did not pass.

use serde_json::{Value, json};

use crate::world::{CANARY, World, one_command, tool_results};

/// Whoever runs the tests submits.
const OWN: u32 = 0;

/// A script whose agent runs these commands, one a turn and attempt, and says after each that it is done.
fn tries(commands: &[&str]) -> String {
    let mut script = "usage = { input = 10, output = 20 }\n".to_owned();
    for command in commands {
        let input = json!({ "command": command, "description": "the test's command" });
        let toml: toml::Value = serde_json::from_value(input).unwrap();
        script.push_str(&format!(
            "[[reply]]\ntimes = 1\nwhen = {{ tools = true }}\nblocks = [{{ tool = \"Bash\", input = {toml} }}]\n\
             [[reply]]\ntimes = 1\nwhen = {{ tools = true }}\ntext = \"done\"\n"
        ));
    }
    script + "[default]\ntext = \"{}\"\n"
}

fn steps(events: &[Value], stage: &str) -> Vec<(u64, Option<i64>)> {
    let mine = events.iter().filter(|e| e["type"] == "step" && e["stage"] == stage);
    mine.map(|e| (e["index"].as_u64().unwrap(), e["ended"]["code"].as_i64())).collect()
}

fn output(events: &[Value]) -> String {
    let pieces = events.iter().filter(|e| e["type"] == "output");
    pieces.filter_map(|e| e["text"].as_str()).collect::<Vec<_>>().join("\n")
}

fn states(events: &[Value]) -> Vec<&str> {
    events.iter().filter(|e| e["type"] == "state").filter_map(|e| e["state"].as_str()).collect()
}

fn spec(world: &World, more: Value) -> Value {
    let workspace = world.path("repo");
    if !workspace.exists() {
        world.workspace("repo", OWN);
    }
    let mut spec = json!({
        "prompt": "do it", "policy": "refactor", "workspace": { "path": workspace, "mode": "copy" },
        "limits": { "disk_mib": 64 },
    });
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    spec
}

#[test]
fn setup_runs_first_in_the_agents_cell_and_verify_last_in_a_fresh_one() {
    let world =
        World::new(&one_command("cat prepared; echo $(cat $HOME/served) | tee done.txt; ls $HOME/lib"));
    let spec = spec(
        &world,
        json!({
            "setup": { "commands": [
                "echo from-setup | tee prepared",
                "mkdir -p ~/lib && touch ~/lib/one && (while true; do date +%s%N > ~/served; sleep 0.1; done) & sleep 0.3",
            ] },
            "verify": { "commands": [
                "test -s done.txt && echo judged && cat prepared && touch thrown-away",
                ["sh", "-c", "env; cat /proc/self/environ; ls /.hotcell; test -e ~/lib/one && test -s ~/served"],
            ] },
        }),
    );
    let (events, job) = world.job(&spec);
    assert_eq!(job["outcome"], "succeeded", "{job:#}\n{}", output(&events));
    assert_eq!(states(&events), ["queued", "preparing", "running", "collecting", "verifying", "done"]);
    assert!(tool_results(&events).contains("from-setup"), "{}", tool_results(&events));
    assert!(tool_results(&events).contains("one"), "HOME is the same: {}", tool_results(&events));
    // Before the agent, and again before the judging: what tests need is there.
    let twice =
        [(0, None), (0, Some(0)), (1, None), (1, Some(0)), (0, None), (0, Some(0)), (1, None), (1, Some(0))];
    assert_eq!(steps(&events, "setup"), twice);
    assert_eq!(steps(&events, "verify"), [(0, None), (0, Some(0)), (1, None), (1, Some(0))]);
    let printed = output(&events);
    assert!(printed.contains("judged"), "{printed}");
    for forbidden in ["ANTHROPIC", "api.sock", CANARY] {
        assert!(!printed.contains(forbidden), "{forbidden} is in the judging cell: {printed}");
    }
    let (_, names, _) = world.run(&["diff", "--name-only", job["id"].as_str().unwrap()]);
    assert_eq!(names.lines().collect::<Vec<_>>(), ["done.txt", "prepared"], "what judges changes nothing");
    assert_eq!(job["totals"]["verified"], json!({ "passed": true, "repairs": 0 }));
    world.end();
}

#[test]
fn an_agent_that_did_not_pass_gets_the_output_and_another_try() {
    let world = World::new(&tries(&["echo bad | tee out.txt", "cat out.txt; echo good | tee out.txt"]));
    let verify =
        json!({ "commands": ["echo looked at $(cat out.txt); grep -q good out.txt"], "repair_attempts": 2 });
    let (events, job) = world.job(&spec(&world, json!({ "verify": verify })));
    assert_eq!(job["outcome"], "succeeded", "{job:#}\n{}", output(&events));
    assert_eq!(job["totals"]["verified"], json!({ "passed": true, "repairs": 1 }));
    assert_eq!(job["attempt"], 2);
    assert_eq!(job["totals"]["tool_calls"], 2);
    let told = events.iter().find_map(|e| e["repair"].as_str()).expect("what the agent is told");
    assert!(told.contains("looked at bad") && told.contains("grep -q good"), "{told}");
    let asked = format!("{:?}", world.recorder.requests());
    assert!(asked.contains("looked at bad") && asked.contains("do it"), "the conversation goes on");
    assert!(tool_results(&events).contains("bad\ngood"), "on its own work: {}", tool_results(&events));
    let (_, diff, _) = world.run(&["diff", job["id"].as_str().unwrap()]);
    assert!(diff.contains("+good") && !diff.contains("+bad"), "{diff}");
    let seen = states(&events);
    assert_eq!(seen.iter().filter(|s| **s == "verifying").count(), 2, "{seen:?}");
    world.end();
}

#[test]
fn what_never_passes_fails_with_its_change_set_kept() {
    let world = World::new(&tries(&["echo bad > out.txt", "echo worse > out.txt"]));
    let verify = json!({ "commands": ["true", "echo the reason >&2; exit 7"], "repair_attempts": 1 });
    let (events, job) = world.job(&spec(&world, json!({ "verify": verify })));
    assert_eq!((&job["outcome"], &job["reason"]), (&json!("failed"), &json!("verify_failed")), "{job:#}");
    assert_eq!((&job["phase"], &job["blame"]), (&json!("verify"), &json!("job")));
    let message = job["message"].as_str().unwrap();
    assert!(message.contains("command 2 of verify") && message.contains("code 7"), "{message}");
    assert!(message.contains("the reason"), "{message}");
    assert_eq!(job["totals"]["verified"], json!({ "passed": false, "repairs": 1 }));
    assert_eq!(steps(&events, "verify").len(), 8, "twice two commands");
    let (_, diff, _) = world.run(&["diff", job["id"].as_str().unwrap()]);
    assert!(diff.contains("+worse"), "{diff}");
    world.end();
}

#[test]
fn a_setup_that_fails_or_hangs_ends_the_job_before_its_agent() {
    let world = World::new(&one_command("true"));
    let failing =
        json!({ "setup": { "commands": ["echo fine", "echo no such package >&2; exit 3", "echo never"] } });
    let (events, job) = world.job(&spec(&world, failing));
    assert_eq!((&job["reason"], &job["phase"]), (&json!("setup_failed"), &json!("setup")), "{job:#}");
    let message = job["message"].as_str().unwrap();
    assert!(message.contains("command 2 of setup") && message.contains("code 3"), "{message}");
    assert!(message.contains("no such package"), "{message}");
    assert!(!output(&events).contains("never") && output(&events).contains("fine"));
    let hanging = json!({ "setup": { "commands": ["echo waiting; sleep 1000"], "timeout_s": 1 } });
    let (_, job) = world.job(&spec(&world, hanging));
    assert_eq!(job["reason"], "setup_deadline", "{job:#}");
    assert!(job["message"].as_str().unwrap().contains("waiting"), "{job:#}");
    let missing = json!({ "setup": { "commands": [["no-such-program-anywhere", "x"]] } });
    let (_, job) = world.job(&spec(&world, missing));
    assert_eq!(job["reason"], "setup_failed", "{job:#}");
    let message = job["message"].as_str().unwrap();
    assert!(message.contains("code 127") && message.contains("no-such-program-anywhere"), "{message}");
    assert!(world.recorder.requests().is_empty(), "no agent was started");
    world.end();
}

#[test]
fn a_job_can_be_cancelled_while_its_commands_run() {
    let mut world = World::new(&one_command("echo x > y"));
    for more in [
        json!({ "setup": { "commands": ["echo begun; sleep 1000"] } }),
        json!({ "verify": { "commands": ["echo begun; sleep 1000"] } }),
    ] {
        let id = world.submit(&spec(&world, more));
        world.wait_for("its command runs", |world| {
            world.call("GET", &format!("/v1/jobs/{id}/events"), "").body.contains("begun\"")
        });
        assert_eq!(world.call("POST", &format!("/v1/jobs/{id}/cancel"), "").status, 202);
        let events = world.follow(&id);
        let job = world.show(&id);
        assert_eq!((&job["outcome"], &job["reason"]), (&json!("stopped"), &json!("cancelled")), "{job:#}");
        assert_eq!(states(&events).last(), Some(&"done"));
    }
    world.end();
}

#[test]
fn a_daemon_that_is_killed_among_the_commands_begins_them_again() {
    let mut world = World::new(&tries(&["echo bad > out.txt", "echo good > out.txt"]));
    let spec = spec(
        &world,
        json!({
            "setup": { "commands": ["echo prepared; sleep 1"] },
            "verify": { "commands": ["echo judging; sleep 1; grep good out.txt"], "repair_attempts": 1 },
        }),
    );
    let id = world.submit(&spec);
    let printed = |world: &World, word: &str, count: usize| {
        let events = crate::world::events(&world.call("GET", &format!("/v1/jobs/{id}/events"), "").body);
        output(&events).lines().filter(|line| *line == word).count() >= count
    };
    world.wait_for("its setup", |world| printed(world, "prepared", 1));
    world.kill();
    world.start();
    world.wait_for("its first judging", |world| printed(world, "judging", 1));
    world.kill();
    world.start();
    world.wait_for("its second try is judged", |world| {
        world.show(&id)["state"] == "verifying" && world.show(&id)["attempt"] == 3
    });
    world.kill();
    world.start();
    world.wait_for("its end", |world| world.show(&id)["state"] == "done");
    let job = world.show(&id);
    assert_eq!(job["outcome"], "succeeded", "{job:#}\n{}", world.log());
    assert_eq!(job["totals"]["verified"], json!({ "passed": true, "repairs": 1 }));
    assert_eq!(job["totals"]["tool_calls"], 2, "no task was done twice");
    world.end();
}
