//! The policies that are shipped: each one's promise, tried by an agent that does what it must not, in real cells. What
//! `hotcell policy explain` says is what the job's events say.

use std::path::Path;

use serde_json::{Value, json};

use crate::world::{World, tool_results};

const UID: u32 = 4242;

/// An agent that reads, writes, edits, runs, publishes and reaches out, whatever it may.
const EVERYTHING: &str = r#"
usage = { input = 10, output = 20 }

[[reply]]
when = { turn = 0, tools = true }
blocks = [
  { tool = "Read", input = { file_path = "/workspace/notes.txt" } },
  { tool = "Read", input = { file_path = "/workspace/deploy.pem" } },
  { tool = "Write", input = { file_path = "/workspace/new.txt", content = "new" } },
  { tool = "Write", input = { file_path = "/workspace/.envrc", content = "evil" } },
  { tool = "Write", input = { file_path = "/home/agent/report.md", content = "all is well" } },
  { tool = "Bash", input = { command = "touch ran", description = "the test's" } },
  { tool = "Bash", input = { command = "true && git push origin main && touch pushed", description = "the test's" } },
  { tool = "Bash", input = { command = "curl -sSf -m 5 http://192.0.2.1/ && touch reached", description = "the test's" } },
  { tool = "WebFetch", input = { url = "http://192.0.2.1/", prompt = "what is there" } },
]

[default]
text = "done"
"#;

struct Promise {
    policy: &'static str,
    /// Files that are in the workspace afterwards, besides those it began with.
    left: &'static [&'static str],
    /// Texts that the agent reads.
    reads: &'static [&'static str],
    /// Texts that it must not read.
    never: &'static [&'static str],
}

const PROMISES: [Promise; 5] = [
    Promise { policy: "default", left: &[], reads: &["the notes"], never: &[] },
    Promise { policy: "untrusted", left: &[], reads: &["the notes"], never: &[] },
    Promise {
        policy: "review",
        left: &[],
        reads: &["the notes", "key files are not part of a review"],
        never: &["the key"],
    },
    Promise {
        policy: "refactor",
        left: &["new.txt", "ran"],
        reads: &["the notes", "publishing is done by a person", "takes effect on the host by itself"],
        never: &[],
    },
    Promise { policy: "trusted", left: &[".envrc", "new.txt", "ran"], reads: &["the notes"], never: &[] },
];

#[test]
fn each_shipped_policy_keeps_its_promise_and_explains_it() {
    let world = World::new(EVERYTHING);
    for promise in PROMISES {
        let name = promise.policy;
        let dir = world.workspace(name, UID);
        for (file, text) in [("notes.txt", "the notes"), ("deploy.pem", "the key")] {
            std::fs::write(dir.join(file), text).unwrap();
            std::os::unix::fs::chown(dir.join(file), Some(UID), Some(UID)).unwrap();
        }
        let mut spec = json!({ "prompt": "x", "policy": name, "workspace": { "path": dir } });
        if !promise.left.is_empty() {
            // In place: what the policy lets happen can be seen.
            spec["workspace"]["mode"] = "bind".into();
        }
        let answer = world.curl("POST", "/v1/jobs", &spec.to_string(), &[], Some(UID)).unwrap();
        assert_eq!(answer.status, 201, "{name}: {}", answer.body);
        let id = answer.json()["id"].as_str().unwrap().to_owned();
        let events = world.follow(&id);
        let job = world.show(&id);
        assert_eq!(job["outcome"], "succeeded", "{name}: {job}");
        assert_eq!(left(&dir), promise.left, "{name}: {}", tool_results(&events));
        let results = tool_results(&events);
        for text in promise.reads {
            assert!(results.contains(text), "{name}: {text:?} is missing: {results}");
        }
        for text in promise.never {
            assert!(!results.contains(text), "{name}: {text:?} was read: {results}");
        }
        explained(&world, name, &events);
        listed(&world, name, &events);
    }
    world.end();
}

/// What the CLI lists is what is known of it, and what the policy names is listed: or it would name nothing.
fn listed(world: &World, name: &str, events: &[Value]) {
    let init = events.iter().find(|e| e["frame"]["subtype"] == "init").unwrap();
    let tools: Vec<&str> =
        init["frame"]["tools"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let known = hotcell::agent::tools::BUILT_IN_TOOLS;
    assert!(tools.iter().all(|tool| known.contains(tool)), "{name}: {tools:?}");
    let (_, out, _) = world.run(&["policy", "show", name, "--json"]);
    let policy: Value = serde_json::from_str(&out).unwrap();
    let allow = policy["policy"]["tools"]["allow"].as_array().unwrap();
    for tool in allow.iter().filter_map(Value::as_str).filter(|tool| !tool.ends_with('*')) {
        assert!(tools.contains(&tool), "{name} allows {tool}, which the CLI does not list: {tools:?}");
    }
}

/// What the agent left in the workspace.
fn left(dir: &Path) -> Vec<String> {
    let names =
        std::fs::read_dir(dir).unwrap().flatten().map(|e| e.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|n| n != "notes.txt" && n != "deploy.pem").collect();
    names.sort();
    names
}

/// Asks `explain` for every call that was judged.
fn explained(world: &World, policy: &str, events: &[Value]) {
    let inputs: std::collections::BTreeMap<&str, &Value> = events
        .iter()
        .filter(|e| e["frame"]["request"]["subtype"] == "can_use_tool")
        .filter_map(|e| Some((e["frame"]["request_id"].as_str()?, &e["frame"]["request"]["input"])))
        .collect();
    let judged: Vec<&Value> = events.iter().filter(|e| e["type"] == "tool").collect();
    assert!(!judged.is_empty(), "{policy}: nothing was judged");
    for event in judged {
        let input = inputs[event["request_id"].as_str().unwrap()].to_string();
        let tool = event["tool"].as_str().unwrap();
        let args = ["policy", "explain", "--policy", policy, "--tool", tool, "--input", &input, "--json"];
        let (code, out, err) = world.run(&args);
        let answer: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out} {err}"));
        assert_eq!(answer["allowed"], event["decision"] == "allow", "{policy} {tool} {input}: {answer}");
        assert_eq!(answer["rule"], event["rule"], "{policy} {tool} {input}");
        assert_eq!(code, i32::from(event["decision"] != "allow"));
    }
}

#[test]
fn a_narrowing_of_the_users_own_holds_in_the_cell_and_cannot_widen() {
    let world = World::new(EVERYTHING);
    let dir = world.workspace("repo", UID);
    std::fs::write(dir.join("notes.txt"), "the notes").unwrap();
    let narrow = "[tools]\ndeny = ['Bash']\n[[rule]]\ntool = 'Write'\npath = '/workspace/**'\naction = 'deny'\nreason = 'not here'\n";
    let spec = json!({ "prompt": "x", "policy": "trusted", "narrow": narrow, "workspace": { "path": dir, "mode": "bind" } });
    let (events, job) = world.job(&spec);
    assert_eq!(job["outcome"], "succeeded", "{job}");
    assert_eq!(left(&dir), Vec::<String>::new());
    assert!(tool_results(&events).contains("not here"), "{}", tool_results(&events));
    let wide = "[tools]\nallow = ['*']\n[[rule]]\ntool = 'Write'\naction = 'allow'\n";
    let dir = world.workspace("other", UID);
    std::fs::write(dir.join("notes.txt"), "the notes").unwrap();
    let spec = json!({ "prompt": "x", "policy": "review", "narrow": wide, "workspace": { "path": dir } });
    let (_, job) = world.job(&spec);
    assert_eq!(job["outcome"], "succeeded", "{job}");
    assert_eq!(
        left(&dir),
        Vec::<String>::new(),
        "an `allow` of the user's does not lift the policy's `deny`"
    );
    for (text, words) in [
        ("[limits]\ncost = 1", "unknown field"),
        ("[[rule]]\naction = 'deny'", "narrow:1: rule[0].reason"),
        ("[models]\nallow = ['x']\nunpriced = { input = 1.0, output = 1.0 }", "narrow:3: models.unpriced"),
    ] {
        let answer = world.call("POST", "/v1/jobs", &json!({ "prompt": "x", "narrow": text }).to_string());
        assert_eq!(answer.status, 400, "{}", answer.body);
        assert!(answer.body.contains(words), "{words}: {}", answer.body);
    }
    world.end();
}

#[test]
fn a_malformed_policy_is_told_by_file_line_and_key_and_a_dead_rule_is_a_warning() {
    let world = World::without_daemon(EVERYTHING, "");
    let trusted = include_str!("../../policies/trusted.toml");
    let check = |name: &str, text: &str| {
        let path = world.path(name);
        std::fs::write(&path, text).unwrap();
        world.run(&["policy", "check", path.to_str().unwrap()])
    };
    for (change, words) in [
        (("max_turns = 1000", "max_turns = 0"), "limits.max_turns: is 0"),
        (("max_turns = 1000", "max_turn = 1000"), "unknown field `max_turn`"),
        (("\"bypassPermissions\", ", "\"auto\", "), "unknown variant `auto`"),
        (("[env]\nallow = [\"*\"]", "[env]\nallow = [\"A*B\"]"), "env.allow[0]: \"A*B\""),
        (("description = ", "description_ = "), "description_"),
        (
            ("disk_mib = 32768", "disk_mib = 32768\n[[rule]]\naction = \"deny\"\n"),
            "rule[0].reason: is missing",
        ),
        (("disk_mib = 32768", "disk_mib = 32768\n[[rule]]\naction = \"maybe\"\n"), "maybe"),
    ] {
        let text = trusted.replace(change.0, change.1);
        let (code, out, err) = check("bad.toml", &text);
        assert_eq!(code, 2, "{words}: {out} {err}");
        assert!(err.contains(words) && err.matches("bad.toml").count() == 1, "{words}: {err}");
        let place = err.split_once("bad.toml:").unwrap().1.split_once(": ").unwrap().0;
        assert!(place.parse::<usize>().is_ok_and(|line| line > 0), "{words}: {err}");
        // The same in fields.
        let path = world.path("bad.toml");
        let (code, out, _) = world.run(&["policy", "check", "--json", path.to_str().unwrap()]);
        let found: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}"));
        let (one, all) = (&found[0], found.as_array().unwrap().len());
        assert_eq!((code, all, &one["severity"]), (2, 1, &json!("error")), "{found}");
        assert_eq!((&one["file"], one["line"].to_string()), (&json!(path), place.to_owned()), "{found}");
        assert!(one["column"].is_u64() && one["key"].is_string(), "{found}");
        assert!(err.contains(one["reason"].as_str().unwrap()), "{found} {err}");
    }
    assert_eq!(check("good.toml", trusted).0, 0);
    let dead = format!(
        "{trusted}\n[[rule]]\ntool = \"Read\"\ncommand = \"x\"\naction = \"deny\"\nreason = \"no\"\n"
    );
    let (code, out, err) = check("dead.toml", &dead);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("warning: ") && out.contains(": rule[0]: can never fit"), "{out}");
    let path = world.path("dead.toml");
    let (code, out, _) = world.run(&["policy", "check", "--json", path.to_str().unwrap()]);
    let found: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (code, &found[0]["severity"], &found[0]["key"]),
        (0, &json!("warning"), &json!("rule[0]")),
        "{found}"
    );
    let good = world.path("good.toml");
    let (code, out, _) = world.run(&["policy", "check", "--json", good.to_str().unwrap()]);
    assert_eq!((code, out.trim()), (0, "[]"));
    let (code, out, _) = world.run(&["policy", "explain", "--policy", "trusted", "--cost", "21"]);
    assert_eq!(code, 1, "{out}");
    assert!(out.contains("denied by limits.cost_usd"), "{out}");
    let (code, out, _) =
        world.run(&["policy", "explain", "--policy", "untrusted", "--model", "claude-opus-4-8"]);
    assert_eq!(code, 1, "{out}");
}

#[test]
fn a_policy_that_is_edited_counts_from_the_next_submit_and_a_broken_one_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("mine.toml");
    let world = World::with(EVERYTHING, &format!("policy_dirs = [{:?}]", dir.path()));
    let trusted = include_str!("../../policies/trusted.toml");
    let write = |usd: &str| {
        std::fs::write(&file, trusted.replace("cost_usd = 20.0", &format!("cost_usd = {usd}"))).unwrap();
    };
    let refused = || {
        let spec = json!({ "prompt": "x", "policy": "mine", "limits": { "cost_usd": 99 } });
        let answer = world.call("POST", "/v1/jobs", &spec.to_string());
        assert!(matches!(answer.status, 400 | 403), "{}", answer.body);
        answer.json()["error"]["message"].as_str().unwrap().to_owned()
    };
    let whoami = || world.call("GET", "/v1/whoami", "").json()["policies"].to_string().contains("\"mine\"");
    assert!(refused().contains("there is no policy \"mine\"") && !whoami());
    write("3.0");
    assert!(refused().contains("(at most 3)") && whoami());
    write("12.5");
    assert!(refused().contains("(at most 12.5)"));
    assert_eq!(world.run(&["policy", "ls"]).0, 0);

    std::fs::write(&file, "descripton = 'x'").unwrap();
    assert!(refused().contains("(at most 12.5)"), "the last good one stays");
    let (code, out, err) = world.run(&["policy", "ls"]);
    assert!(code == 2 && out.contains("trusted") && err.contains("mine.toml:1: descripton: "), "{out} {err}");
    let health = world.call("GET", "/healthz", "").json();
    assert!(health["problems"][0].as_str().unwrap().contains("mine.toml:1: "), "{health}");
    let (code, _, err) = world.run(&["policy", "show", "mine"]);
    assert!(code == 2 && err.contains("mine.toml:1: descripton: "), "{err}");
    assert_eq!(world.run(&["policy", "show", "trusted"]).0, 0);

    write("7.0");
    assert!(refused().contains("(at most 7)"));
    assert_eq!(world.call("GET", "/healthz", "").json()["problems"], json!([]));
    std::fs::remove_file(&file).unwrap();
    assert!(refused().contains("there is no policy"));
    world.end();
}
