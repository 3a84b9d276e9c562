//! The command line against a real daemon, as the person before it sees it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::world::{PATIENCE, World};

const SCRIPT: &str = r#"
usage = { input = 100, output = 20 }

[[reply]]
when = { prompt = "wait", turn = 0, tools = true }
blocks = [
  { text = "I will wait." },
  { tool = "Bash", input = { command = "while [ ! -e go ]; do sleep 0.1; done", description = "wait", timeout = 300000 } },
]

[[reply]]
when = { prompt = "greet", turn = 0, tools = true }
blocks = [
  { text = "I will look." },
  { tool = "Bash", input = { command = "echo hello; false", description = "greet" } },
]

[[reply]]
when = { prompt = "dress", turn = 0, tools = true }
blocks = [
  { text = "start \u001B]52;c;aGFja2Vk\u0007 mid \u001B[2J\u001B[H \u009B31m c1 \u202Eflip end" },
  { tool = "Bash", input = { command = "printf '\u001B]0;owned\u0007\\033[2Jred' >&2; exit 3", description = "x" } },
]

[[reply]]
when = { prompt = "dress" }
text = "bye \u001B[2J\u001B]8;;http://evil\u0007link\u001B]8;;\u0007\u009D0;t\u009C ."

[default]
text = "all done"
"#;

/// A `hotcell` command that runs on.
fn start(world: &World, args: &[&str]) -> Child {
    let mut command = world.hotcell();
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("hotcell")
}

/// Waits for its end, which must come.
fn finish(mut child: Child) -> (i32, String, String) {
    let until = std::time::Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        assert!(std::time::Instant::now() < until, "the command does not end");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect()
}

/// No character that a terminal acts upon.
#[track_caller]
fn harmless(text: &str) {
    let bad = text
        .chars()
        .find(|c| (c.is_control() && !"\n\t".contains(*c)) || ('\u{202a}'..='\u{202e}').contains(c));
    assert_eq!(bad, None, "{}", text.escape_debug());
}

#[test]
fn a_run_is_told_in_plain_lines_and_as_json() {
    let world = World::new(SCRIPT);
    let dir = world.workspace("work", 0);
    let path = dir.to_str().unwrap();
    let args = [
        "run",
        "greet",
        "-w",
        path,
        "-p",
        "trusted",
        "-l",
        "team=blue",
        "--cost",
        "0.50",
        "--max-turns",
        "9",
    ];
    let (code, stdout, stderr) = world.run(&args);
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    harmless(&stdout);
    let lines: Vec<&str> = stdout.lines().collect();
    let id = lines[0].split_whitespace().next().unwrap().to_owned();
    assert!(
        lines[0].contains("trusted · claude-sonnet-4-6") && lines[0].contains(&format!("{path} (copy)")),
        "{stdout}"
    );
    for line in
        ["· queued", "· running", "I will look.", "● Bash  echo hello; false", "all done", "✓ succeeded"]
    {
        assert!(lines.contains(&line), "no {line:?} in:\n{stdout}");
    }
    assert!(stdout.contains("2 turns · 1 tool call · $0.0012 of $0.50"), "{stdout}");

    let (code, stdout, stderr) = world.run(&["run", "greet", "--json", "-l", "team=red"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    let mut told = json_lines(&stdout);
    let job = told.pop().unwrap()["job"].clone();
    assert_eq!(
        (&job["outcome"], &job["labels"]["team"], &job["result"]),
        (&json!("succeeded"), &json!("red"), &json!("all done"))
    );
    let numbers: Vec<u64> = told.iter().map(|e| e["seq"].as_u64().unwrap()).collect();
    assert_eq!(
        numbers,
        (1..=job["last_seq"].as_u64().unwrap()).collect::<Vec<_>>(),
        "all events, once, in order"
    );

    // The same job afterwards.
    let second = job["id"].as_str().unwrap();
    let (code, stdout, _) = world.run(&["logs", second, "--json"]);
    assert_eq!((code, json_lines(&stdout)), (0, told.clone()));
    let (_, stdout, _) = world.run(&["logs", second, "--json", "--from", "5"]);
    assert_eq!(json_lines(&stdout), told[4..]);
    let (code, stdout, _) = world.run(&["logs", "-f", &id]);
    assert!(
        code == 0 && stdout.contains("● Bash  echo hello; false") && stdout.contains("✓ succeeded"),
        "{stdout}"
    );
    let (_, stdout, _) = world.run(&["show", second, "--json"]);
    assert_eq!(json_lines(&stdout), std::slice::from_ref(&job));
    let (code, stdout, _) = world.run(&["show", &id]);
    assert!(code == 0 && stdout.contains(path) && stdout.contains("succeeded"), "{stdout}");
    let (_, stdout, _) = world.run(&["ls", "--json"]);
    let listed = json_lines(&stdout)[0]["jobs"].clone();
    assert_eq!((&listed[0], &listed[1]["id"]), (&job, &json!(id)));
    for (args, expected) in [
        (&["ls", "--json", "-l", "team=blue"][..], 1),
        (&["ls", "--json", "-s", "done"], 2),
        (&["ls", "--json", "-s", "running"], 0),
        (&["ls", "--json", "-p", "trusted"], 1),
        (&["ls", "--json", "-n", "1"], 1),
    ] {
        let (code, stdout, _) = world.run(args);
        assert_eq!(
            (code, json_lines(&stdout)[0]["jobs"].as_array().unwrap().len()),
            (0, expected),
            "{args:?}"
        );
    }
    let (code, stdout, _) = world.run(&["ls"]);
    assert!(code == 0 && stdout.contains(&id) && stdout.contains(second), "{stdout}");

    let (code, stdout, _) = world.run(&["rm", "--json", &id, second]);
    assert_eq!(
        (code, json_lines(&stdout)),
        (0, vec![json!({ "removed": id }), json!({ "removed": second })]),
        "{}",
        world.log()
    );
    let (code, _, stderr) = world.run(&["show", &id]);
    assert!(code == 2 && stderr.contains(&format!("`hotcell audit {id}`")), "{code} {stderr}");
    let (code, stdout, _) = world.run(&["show", "--json", &id]);
    assert_eq!((code, &json_lines(&stdout)[0]["error"]["code"]), (2, &json!("not_found")));
    let (code, _, stderr) = world.run(&["cancel", "nonsense"]);
    assert!(code == 2 && stderr.contains("nonsense"), "{stderr}");
    world.end();
}

#[test]
fn a_client_can_leave_come_back_cancel_and_die() {
    let mut world = World::with(SCRIPT, "[limits]\nslots = 4\n");
    let dirs: Vec<_> = ["a", "b", "c"].iter().map(|name| world.workspace(name, 0)).collect();
    let at = |n: usize| dirs[n].to_str().unwrap();
    // In place: the test tells the agents to go on by a file.
    let base = ["run", "wait", "-p", "trusted", "--mode", "bind", "-w"];
    let with = |more: &[&'static str], dir: usize| -> Vec<String> {
        base.iter().copied().chain([at(dir)]).chain(more.iter().copied()).map(str::to_owned).collect()
    };
    let spawn =
        |world: &World, args: Vec<String>| start(world, &args.iter().map(String::as_str).collect::<Vec<_>>());

    // Detached: the id alone; another process follows, a third one cancels.
    let (code, stdout, stderr) = finish(spawn(&world, with(&["--detach"], 0)));
    assert_eq!((code, stderr.as_str()), (0, ""));
    let detached = stdout.trim_end().to_owned();
    assert!(!detached.contains(char::is_whitespace), "{stdout}");
    let follower = start(&world, &["logs", "-f", &detached]);
    let cut = &detached[..12];
    let busy = |world: &mut World, id: &str| {
        world.wait_for("its tool runs", |world| world.show(id)["totals"]["charged_micro_usd"] != 0);
    };
    busy(&mut world, &detached);

    // Ctrl-C in one client, kill -9 of another.
    let mut polite = spawn(&world, with(&[], 1));
    let mut killed = spawn(&world, with(&["--json"], 2));
    let id_of = |child: &mut Child, json: bool| {
        let mut line = String::new();
        let mut reader = BufReader::new(child.stdout.take().unwrap());
        reader.read_line(&mut line).unwrap();
        let id = if json { String::new() } else { line.split_whitespace().next().unwrap().to_owned() };
        (id, reader)
    };
    let (polite_id, mut polite_out) = id_of(&mut polite, false);
    let (_, reader) = id_of(&mut killed, true);
    busy(&mut world, &polite_id);
    let listed = world.call("GET", "/v1/jobs", "").json()["jobs"].clone();
    let orphan = listed.as_array().unwrap().iter().find(|j| j["workspace"] == at(2)).expect("the third job");
    let orphan = orphan["id"].as_str().unwrap().to_owned();
    busy(&mut world, &orphan);
    kill_process(Pid::from_child(&killed), Signal::KILL).unwrap();
    killed.wait().unwrap();
    drop(reader);
    kill_process(Pid::from_child(&polite), Signal::INT).unwrap();
    let (code, _, stderr) = finish(polite);
    let mut stdout = String::new();
    std::io::Read::read_to_string(&mut polite_out, &mut stdout).unwrap();
    assert_eq!(code, 130, "{stdout}\n{stderr}");
    assert!(
        stderr.contains("cancelling the job") && stdout.contains("■ stopped: cancelled"),
        "{stdout}\n{stderr}"
    );
    assert_eq!(
        (&world.show(&polite_id)["outcome"], &world.show(&polite_id)["reason"]),
        (&json!("stopped"), &json!("cancelled"))
    );

    let (code, stdout, _) = world.run(&["cancel", cut]);
    assert!(code == 0 && stdout.starts_with(&detached), "an id may be shortened: {stdout}");
    let (code, stdout, _) = finish(follower);
    assert!(
        code == 130 && stdout.contains("I will wait.") && stdout.contains("■ stopped: cancelled"),
        "{code} {stdout}"
    );
    let (code, stdout, _) = world.run(&["cancel", &detached, "--json"]);
    assert_eq!(
        (code, &json_lines(&stdout)[0]["reason"]),
        (0, &json!("cancelled")),
        "cancelling twice is no mistake"
    );

    // The job of the killed client never noticed. Ctrl-C of a follower leaves it alone as well.
    let mut second = start(&world, &["logs", "-f", &orphan]);
    let (_, rest) = id_of(&mut second, true);
    kill_process(Pid::from_child(&second), Signal::INT).unwrap();
    assert_eq!(second.wait().unwrap().code(), Some(130));
    drop(rest);
    assert_eq!(world.show(&orphan)["state"], "running");
    let third = start(&world, &["logs", "-f", &orphan]);
    std::fs::write(dirs[2].join("go"), "").unwrap();
    let (code, stdout, _) = finish(third);
    assert!(code == 0 && stdout.contains("✓ succeeded"), "{code} {stdout}");
    // A closed pipe is a reader that has seen enough.
    let mut piped = start(&world, &["logs", &orphan, "--json"]);
    drop(piped.stdout.take());
    assert_eq!(finish(piped).0, 0);
    let (code, _, stderr) = world.run(&["rm", "--json", &orphan, &polite_id, &detached]);
    assert_eq!(code, 0, "{stderr}");

    // Without a daemon: said at once, and what to do.
    world.nothing_left();
    world.terminate();
    for args in [&["run", "x"][..], &["ls"], &["health"], &["cancel", &orphan]] {
        let (code, _, stderr) = world.run(args);
        assert_eq!(code, 4, "{args:?}: {stderr}");
        assert!(
            stderr.contains(world.socket().to_str().unwrap()) && stderr.contains("hotcell serve"),
            "{stderr}"
        );
    }
    world.start();
    world.end();
}

#[test]
fn what_needs_no_daemon_works_without_one() {
    let world = World::without_daemon(SCRIPT, "");
    for shell in ["bash", "zsh", "fish"] {
        let (code, stdout, stderr) = world.run(&["completions", shell]);
        assert!(code == 0 && stderr.is_empty() && stdout.len() > 2000, "{shell}: {code} {}", stdout.len());
        for word in ["hotcell", "permission-mode", "completions", "detach"] {
            assert!(stdout.contains(word), "{shell} does not know {word}");
        }
    }
    assert_eq!(world.run(&["completions", "tcsh"]).0, 2);
    let (code, stdout, _) = world.run(&["agent", "ls"]);
    // Tested or not: that depends on who used this machine's agents before.
    assert!(code == 0 && stdout.contains("* 2.1.197 x64-gnu"), "{stdout}");
    let (code, stdout, _) = world.run(&["agent", "ls", "--json"]);
    let bundles: Value = serde_json::from_str(&stdout).expect("JSON");
    assert!(code == 0 && bundles.as_array().unwrap().iter().any(|b| b["version"] == "2.1.197"), "{stdout}");
    let (code, stdout, _) = world.run(&["policy", "ls"]);
    assert!(code == 0 && stdout.contains("default") && stdout.contains("trusted"), "{stdout}");
    let (code, stdout, _) = world.run(&["version"]);
    assert!(code == 0 && stdout.contains(env!("CARGO_PKG_VERSION")), "{stdout}");

    let (code, stdout, _) = world.run(&["schema"]);
    let schema: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!(code, 0);
    let example = json!({
        "prompt": "x", "workspace": { "path": "/srv/repo", "mode": "read-only" }, "policy": "default",
        "model": "claude-sonnet-4-6", "permission_mode": "plan", "tools": ["Read"], "disallowed_tools": [],
        "limits": { "cost_usd": 0.5, "max_turns": 3, "wall_s": 60, "memory_mib": 512 }, "env": { "CI": "1" },
        "labels": { "team": "blue" }, "priority": 3, "effort": "low",
    });
    fits(&schema, &schema, &example).unwrap();
    for (key, wrong) in [
        ("prompt", json!(1)),
        ("promt", json!("x")),
        ("limits", json!({ "cost": 1 })),
        ("permission_mode", json!("auto")),
        ("workspace", json!({ "mode": "bind" })),
        ("tools", json!("Read")),
    ] {
        let mut spec = example.clone();
        spec[key] = wrong;
        assert!(fits(&schema, &schema, &spec).is_err(), "the schema takes {spec}");
    }
    assert!(fits(&schema, &schema, &json!({})).is_err(), "a prompt is required");
    let help = world.run(&["--help"]).1;
    for word in ["run", "logs", "130", "stopped by a limit"] {
        assert!(help.contains(word), "{help}");
    }
    for args in
        [&["run"][..], &["frobnicate"], &["run", "x", "--cost", "much"], &["ls", "-s", "asleep"], &["logs"]]
    {
        let (code, stdout, stderr) = world.run(args);
        assert!(code == 2 && stdout.is_empty() && !stderr.is_empty(), "{args:?}: {code} {stdout} {stderr}");
    }
}

/// The part of JSON Schema that the job spec's schema is written in.
fn fits(root: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    if let Some(target) = schema["$ref"].as_str() {
        let part =
            root.pointer(target.strip_prefix('#').unwrap()).ok_or(format!("{target} leads nowhere"))?;
        return fits(root, part, value);
    }
    for key in ["anyOf", "oneOf"] {
        if let Some(all) = schema[key].as_array()
            && !all.iter().any(|one| fits(root, one, value).is_ok())
        {
            return Err(format!("{value} fits none of {all:?}"));
        }
    }
    let bad = |what: &str| Err(format!("{value}: {what} {schema}"));
    if schema.get("const").is_some_and(|wanted| wanted != value) {
        return bad("is not");
    }
    if schema["enum"].as_array().is_some_and(|all| !all.contains(value)) {
        return bad("is none of");
    }
    let is = |kind: &str| match kind {
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        other => panic!("no such type: {other}"),
    };
    let right = match &schema["type"] {
        Value::String(kind) => is(kind),
        Value::Array(kinds) => kinds.iter().any(|kind| is(kind.as_str().unwrap())),
        _ => true,
    };
    if !right {
        return bad("is of another type than");
    }
    for item in value.as_array().into_iter().flatten() {
        fits(root, &schema["items"], item)?;
    }
    if let Some(fields) = value.as_object() {
        for required in schema["required"].as_array().into_iter().flatten() {
            if !fields.contains_key(required.as_str().unwrap()) {
                return bad("lacks a key of");
            }
        }
        for (key, field) in fields {
            match (schema["properties"].get(key), &schema["additionalProperties"]) {
                (Some(part), _) => fits(root, part, field)?,
                (None, Value::Bool(false)) => return bad(&format!("has {key}, unknown to")),
                (None, part) => fits(root, part, field)?,
            }
        }
    }
    Ok(())
}

#[test]
fn nothing_that_an_agent_prints_reaches_the_terminal_as_a_command() {
    let mut world = World::without_daemon(SCRIPT, "");
    let loud = "#!/bin/sh\nprintf 'plain \\033]52;c;aGFja2Vk\\007\\033[2J\\302\\233tail\\n' >&2\nprintf 'out\\033[2J\\n'\nexit 7\n";
    world.set_agents(&[("9.0.1", Some(loud))]);
    world.start();
    let prompt = "dress up \u{1b}[2J\u{9b}2J now";
    let (code, stdout, stderr) = world.run(&["run", prompt]);
    assert_eq!(code, 0, "{stdout}\n{stderr}");
    harmless(&stdout);
    harmless(&stderr);
    for kept in ["start ", " c1 ", "<U+202E>flip end", "● Bash", "bye ", "link"] {
        assert!(stdout.contains(kept), "{kept:?} is gone: {stdout}");
    }
    assert!(
        !stdout.contains("aGFja2Vk") && !stdout.contains("evil"),
        "a whole sequence disappears: {stdout}"
    );
    let id = stdout.split_whitespace().next().unwrap().to_owned();
    let (_, raw, _) = world.run(&["logs", &id, "--raw"]);
    assert!(raw.contains("\u{1b}]52;c;aGFja2Vk\u{7}") && raw.contains("\u{1b}[2J"), "--raw lets it through");
    for args in [
        &["logs", id.as_str()][..],
        &["show", &id],
        &["ls"],
        &["logs", &id, "--json"],
        &["show", "--json", &id],
        &["ls", "--json"],
    ] {
        let (code, stdout, _) = world.run(args);
        assert_eq!(code, 0);
        harmless(&stdout);
    }
    // JSON says the same to a program, escaped.
    let (_, stdout, _) = world.run(&["show", "--json", &id]);
    assert!(json_lines(&stdout)[0]["result"].as_str().unwrap().contains("\u{1b}[2J"));
    // What the CLI itself writes, and the message of a failure that repeats it.
    let (code, stdout, stderr) = world.run(&["run", "x", "--agent", "9.0.1"]);
    assert_eq!(code, 1);
    harmless(&stdout);
    harmless(&stderr);
    assert!(stdout.contains("stderr| plain ") && stdout.contains("stdout| out"), "{stdout}");
    let (code, stdout, _) = world.run(&["run", "x", "--agent", "9.0.1", "--json"]);
    assert_eq!(code, 1);
    harmless(&stdout);
    json_lines(&stdout);
    world.end();
}
