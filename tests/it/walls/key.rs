//! The provider's key: found nowhere in a cell and nowhere that the daemon writes, whatever its source.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;

use serde_json::json;

use super::{RUN_THE_PROMPT, Seen, run, world};
use crate::world::{CANARY, World, docker};

/// The agent gets the needle reversed, so that no command line holds it.
pub(crate) fn scan() -> String {
    format!("python3 scan.py {}", CANARY.chars().rev().collect::<String>())
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

/// Every file below the world's directory but those that hold the key on purpose, and the empty images that
/// scratch spaces are copied from.
fn files_with_key(dir: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        if kind.is_dir() && entry.file_name() != "scratch-templates" {
            files_with_key(&path, found);
        } else if kind.is_file() && entry.file_name() != "key" {
            let bytes = std::fs::read(&path).unwrap();
            if memchr::memmem::find(&bytes, CANARY.as_bytes()).is_some() {
                found.push(path.display().to_string());
            }
        }
    }
}

/// The daemon neither wrote the key anywhere nor tells it.
#[track_caller]
pub(crate) fn nothing_written(world: &World, seen: &Seen) {
    let mut found = Vec::new();
    files_with_key(world.dir.path(), &mut found);
    assert_eq!(found, Vec::<String>::new(), "the daemon wrote the key");
    let id = seen.job["id"].as_str().unwrap();
    let paths =
        ["/v1/jobs", "/v1/info", "/v1/policies", "/metrics", "/openapi.json", "/healthz"].map(str::to_owned);
    for path in paths.into_iter().chain(["", "/events", "/result"].map(|end| format!("/v1/jobs/{id}{end}"))) {
        let answer = world.call("GET", &path, "");
        assert!(!answer.body.contains(CANARY), "GET {path} tells the key");
    }
    let journal: String = seen.events.iter().map(ToString::to_string).collect();
    assert!(!journal.contains(CANARY));
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
