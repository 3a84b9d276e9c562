//! The provider's key: found nowhere in a cell and nowhere that the daemon writes, whatever its source.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;

use serde_json::json;

use super::{RUN_THE_PROMPT, Seen, run, world};
use crate::egress::Internet;
use crate::world::{CANARY, World, docker};

/// The agent gets the needle reversed, so that no command line holds it.
pub(crate) fn scan() -> String {
    scan_for(&[CANARY])
}

fn scan_for(secrets: &[&str]) -> String {
    let reversed: Vec<String> = secrets.iter().map(|secret| secret.chars().rev().collect()).collect();
    format!("python3 scan.py {}", reversed.join(" "))
}

#[track_caller]
pub(crate) fn nothing_inside(seen: &Seen) {
    seen.succeeded();
    assert_eq!(*seen.get("hits"), json!([]), "the key is in the cell");
    let control = seen.get("control").to_string();
    assert!(
        control.contains("environ") && control.contains("memory of"),
        "the search finds nothing: {control}"
    );
    assert!(seen.get("looked").as_u64().unwrap() > 1000, "{:?}", seen.found);
    for pid in seen.get("init_and_cli").as_array().unwrap() {
        let opened = &seen.get("opened")[pid.to_string()];
        assert!(opened.is_null(), "process {pid} could be looked into: {opened}");
    }
}

/// Every file below the world's directory but those that hold a secret on purpose, and the empty images that
/// scratch spaces are copied from.
fn files_with(secrets: &[&str], dir: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        if kind.is_dir() && entry.file_name() != "scratch-templates" {
            files_with(secrets, &path, found);
        } else if kind.is_file() && !entry.file_name().to_string_lossy().starts_with("key") {
            let bytes = std::fs::read(&path).unwrap();
            if secrets.iter().any(|s| memchr::memmem::find(&bytes, s.as_bytes()).is_some()) {
                found.push(path.display().to_string());
            }
        }
    }
}

/// The daemon neither wrote the key anywhere nor tells it.
#[track_caller]
pub(crate) fn nothing_written(world: &World, seen: &Seen) {
    none_written(world, seen, &[CANARY]);
}

/// Files, and every answer of the API and of the commands that repeat it.
#[track_caller]
fn none_written(world: &World, seen: &Seen, secrets: &[&str]) {
    let told = |text: &str| secrets.iter().any(|secret| text.contains(secret));
    let mut found = Vec::new();
    files_with(secrets, world.dir.path(), &mut found);
    assert_eq!(found, Vec::<String>::new(), "the daemon wrote a secret");
    let id = seen.job["id"].as_str().unwrap();
    let of_all = [
        "/v1/jobs",
        "/v1/info",
        "/v1/policies",
        "/v1/audit",
        "/v1/audit?kind=credential",
        "/v1/whoami",
        "/v1/cost?by=credential",
        "/v1/budgets",
        "/v1/openapi.json",
        "/metrics",
        "/openapi.json",
        "/healthz",
    ];
    let of_one = ["", "/events", "/result", "/audit", "/report"].map(|end| format!("/v1/jobs/{id}{end}"));
    for path in of_all.map(str::to_owned).into_iter().chain(of_one) {
        let answer = world.call("GET", &path, "");
        assert!(!told(&answer.body), "GET {path} tells a secret");
    }
    let commands: [&[&str]; 5] =
        [&["audit"], &["audit", id], &["cost", "--by", "credential"], &["whoami"], &["logs", id, "--raw"]];
    for command in commands {
        let (code, out, err) = world.run(command);
        assert_eq!(code, 0, "{command:?}: {err}");
        assert!(!told(&out) && !told(&err), "{command:?} tells a secret");
    }
    let journal: String = seen.events.iter().map(ToString::to_string).collect();
    assert!(!told(&journal));
}

#[track_caller]
fn nothing_outside(world: &World, seen: &Seen) {
    nothing_written(world, seen);
    let got = world.recorder.requests();
    assert!(
        !got.is_empty() && got.iter().all(|r| r.header("x-api-key") == Some(CANARY)),
        "the provider did not get the key"
    );
    assert!(got.iter().all(|r| memchr::memmem::find(&r.body, CANARY.as_bytes()).is_none()));
}

#[test]
fn the_key_is_found_nowhere_inside_a_cell_and_nowhere_outside() {
    let world = world();
    let seen = run(&world, &scan(), &json!({}));
    nothing_inside(&seen);
    nothing_outside(&world, &seen);
    world.end();
}

#[test]
fn neither_is_a_key_from_a_command_or_the_environment() {
    for (source, value) in [("api_key_command", "cat %/key"), ("api_key_env", "ZOO_KEY")] {
        let mut world = World::without_daemon(RUN_THE_PROMPT, "");
        let config = std::fs::read_to_string(world.path("config.toml")).unwrap();
        let mut lines: Vec<String> = config.lines().map(str::to_owned).collect();
        let line = lines.iter_mut().find(|l| l.starts_with("api_key_file")).unwrap();
        *line = format!("{source} = {:?}", value.replace('%', &world.dir.path().to_string_lossy()));
        std::fs::write(world.path("config.toml"), lines.join("\n")).unwrap();
        world.daemon_env.push(("ZOO_KEY".to_owned(), CANARY.to_owned()));
        world.start();
        let seen = run(&world, &scan(), &json!({}));
        nothing_inside(&seen);
        nothing_outside(&world, &seen);
        world.end();
    }
}

/// The engine keeps the configuration of a container for everyone who may ask it.
#[test]
fn the_engine_knows_neither_key_nor_token() {
    let mut world = world();
    let command = "echo $ANTHROPIC_API_KEY >token; while ! [ -e go ]; do sleep 0.05; done";
    let id = world.submit(&super::spec(&world, command, &json!({ "policy": "trusted" })));
    let (token, go) = (world.path("zoo/token"), world.path("zoo/go"));
    world.wait_for("the agent runs", |_| std::fs::metadata(&token).is_ok_and(|m| m.len() > 20));
    let filter = format!("label=hotcell.instance={}", world.instance());
    let container = docker(&["ps", "-q", "--filter", &filter]);
    let inspected = docker(&["inspect", container.trim()]);
    let token = std::fs::read_to_string(token).unwrap();
    assert!(token.starts_with("hotcell-"), "{token}");
    assert!(
        inspected.contains("/.hotcell-init")
            && !inspected.contains(CANARY)
            && !inspected.contains(token.trim())
    );
    std::fs::write(go, "").unwrap();
    world.follow(&id);
    assert_eq!(world.show(&id)["outcome"], "succeeded");
    world.end();
}

/// A provider, or a proxy before it, that repeats what it got: in a header, in an error's text, in a stream.
#[test]
fn a_provider_that_repeats_the_key_does_not_hand_it_to_the_cell() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut world = World::without_daemon(RUN_THE_PROMPT, "");
    world.set_provider(&format!("http://{address}"));
    world.start();
    let server = std::thread::spawn(move || {
        let mut count = 0;
        for stream in listener.incoming().map_while(Result::ok) {
            if !echo(stream) {
                return count;
            }
            count += 1;
        }
        count
    });
    let (events, job) = world.job(&super::spec(&world, "true", &json!({})));
    let journal: String = events.iter().map(ToString::to_string).collect();
    assert_eq!(job["outcome"], "failed", "{job}");
    assert!(journal.contains("your key"), "the provider's words did not arrive: {job}");
    assert!(!journal.contains(CANARY) && !job.to_string().contains(CANARY), "the key came back");
    TcpStream::connect(address).unwrap().write_all(b"end").unwrap();
    assert!(server.join().unwrap() > 0);
    world.end();
}

/// Answers one request with a refusal that holds the key; false for what is no request.
fn echo(mut stream: TcpStream) -> bool {
    let (mut got, mut piece) = (Vec::new(), [0; 65536]);
    let key = loop {
        let count = stream.read(&mut piece).unwrap_or(0);
        got.extend_from_slice(&piece[..count]);
        let text = String::from_utf8_lossy(&got);
        if count == 0 || text.starts_with("end") {
            return false;
        }
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let value = |name: &str| {
            head.lines().find_map(|l| l.to_lowercase().strip_prefix(name).map(|v| v.trim().to_owned()))
        };
        let length: usize = value("content-length:").and_then(|v| v.parse().ok()).unwrap_or(0);
        if body.len() >= length {
            break value("x-api-key:").unwrap_or_default();
        }
    };
    let body = json!({ "type": "error", "error": { "type": "invalid_request_error", "message": format!("your key {key} has no credit") } }).to_string();
    let answer = format!(
        "HTTP/1.1 400 Bad Request\r\nx-seen: {key}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(answer.as_bytes()).is_ok()
}

/// Credentials of each kind and source: of egress, which the agent makes the gateway add, and of providers.
#[test]
fn neither_is_a_credential_of_egress_or_of_any_other_provider() {
    const EGRESS: &str = "egress-canary-41ac0d9b77";
    const OTHERS: [&str; 6] = [
        "bearer-canary-0be2c5a116",
        "header-canary-6d20fe83a9",
        "basic-canary-97c1d4b205",
        "aws-canary-5520cbe1f4",
        "foundry-canary-a2b96c07de",
        "command-canary-38d0ef19ac",
    ];
    let internet = Internet::new();
    let files = tempfile::tempdir().unwrap();
    let file = |name: &str, secret: &str| {
        let path = files.path().join(name);
        std::fs::write(&path, secret).unwrap();
        path.display().to_string()
    };
    let aws =
        format!("{{\"Version\":1,\"AccessKeyId\":\"AKIDEXAMPLE\",\"SecretAccessKey\":\"{}\"}}", OTHERS[3]);
    let mut tables = String::new();
    let mut credential = |name: &str, kind: &str, more: &str| {
        tables.push_str(&format!("[[credential]]\nname = {name:?}\nkind = {kind:?}\n{more}\n"));
    };
    credential("git", "bearer", &format!("file = {:?}", file("git", EGRESS)));
    credential("vertex", "bearer", "env = \"ZOO_BEARER\"");
    credential("team", "header", &format!("header = \"X-Team\"\nfile = {:?}", file("team", OTHERS[1])));
    credential("basic", "basic", &format!("username = \"zoo\"\nfile = {:?}", file("basic", OTHERS[2])));
    credential("aws", "aws", &format!("file = {:?}", file("aws", &aws)));
    credential("foundry", "api_key", &format!("file = {:?}", file("foundry", OTHERS[4])));
    credential("helper", "api_key", &format!("command = \"cat {}\"", file("helper", OTHERS[5])));
    let rule = |name: &str, credential: &str| {
        format!("[[egress.host]]\nname = {name:?}\ninspect = true\ncredential = {credential:?}\n")
    };
    let rules = [
        ("inspected.example", "git"),
        ("tunnel.example", "team"),
        ("second.example", "basic"),
        ("foundry.example", "foundry"),
        ("helper.example", "helper"),
        ("vertex.example", "vertex"),
    ];
    let rules: String = rules.iter().map(|(name, credential)| rule(name, credential)).collect();
    let mut world = internet.without_daemon(RUN_THE_PROMPT, &rules, &tables, "");
    world.daemon_env.push(("ZOO_BEARER".to_owned(), OTHERS[0].to_owned()));
    world.start();
    let all: Vec<&str> = [EGRESS, CANARY].into_iter().chain(OTHERS).collect();
    // The answers are searched, too: the host repeats what it got.
    let curls = "for h in inspected tunnel second foundry helper vertex; do \
        curl -sS -i https://$h.example/pub/echo >>/tmp/answers 2>&1; done; echo \"ZOO {\\\"echoed\\\": $(wc -l </tmp/answers)}\"";
    let command = format!("{curls}; {}", scan_for(&all));
    let seen = run(&world, &command, &json!({ "policy": "reach" }));
    nothing_inside(&seen);
    assert!(seen.get("echoed").as_u64().unwrap() > 6);
    none_written(&world, &seen, &all);
    let authorized = internet.shared.authorized.lock().unwrap().concat().join("\n");
    assert!(authorized.contains(&format!("Bearer {EGRESS}")), "it was never added: {authorized}");
    let used: Vec<&str> = seen.events.iter().filter_map(|e| e["credential"].as_str()).collect();
    for name in ["git", "team", "basic", "anthropic"] {
        assert!(used.contains(&name), "{name} is named nowhere: {used:?}");
    }
    world.end();
}
