//! The API as anybody has it: curl on a unix socket, and nothing of ours.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::world::{Answer, World, events};

/// One user, another one, and the one who sees all.
const ANN: u32 = 4242;
const BOB: u32 = 4243;

const SCRIPT: &str = r#"
usage = { input = 10, output = 20 }

[[reply]]
when = { prompt = "hang", turn = 0, tools = true }
blocks = [{ tool = "Bash", input = { command = "sleep 500", description = "hold the slot", timeout = 600000 } }]

[[reply]]
when = { prompt = "talk", turn = 0, tools = true }
blocks = [
  { text = "0123456789abcdef", repeat = 100000 },
  { tool = "Bash", input = { command = "echo working", description = "work" } },
]
latency_ms = 300
chunk_chars = 65536

[default]
text = "done"
"#;

impl World {
    fn by(&self, uid: u32, method: &str, path: &str, body: &Value) -> Answer {
        self.with_headers(uid, method, path, body, &[])
    }

    fn with_headers(&self, uid: u32, method: &str, path: &str, body: &Value, headers: &[&str]) -> Answer {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let more: Vec<&str> = headers.iter().flat_map(|header| ["-H", header]).collect();
        self.curl(method, path, &body, &more, Some(uid))
            .unwrap_or_else(|| panic!("no answer:\n{}", self.log()))
    }

    /// A job of `uid` that holds its slot until it is cancelled.
    fn hanging(&mut self, uid: u32) -> String {
        let answer =
            self.by(uid, "POST", "/v1/jobs", &json!({ "prompt": "hang", "labels": { "kind": "hanging" } }));
        assert_eq!(answer.status, 201, "{}", answer.body);
        let id = id_of(&answer);
        self.wait_for("its tool runs", |world| world.show(&id)["totals"]["charged_micro_usd"] != 0);
        id
    }
}

fn id_of(answer: &Answer) -> String {
    answer.json()["id"].as_str().unwrap_or_else(|| panic!("no id: {}", answer.body)).to_owned()
}

/// Checks the one shape of all errors; gives message and hint.
fn error(answer: &Answer, status: u16, code: &str) -> String {
    assert_eq!(answer.status, status, "{}", answer.body);
    let body = answer.json();
    let error = &body["error"];
    assert_eq!(error["code"], code, "{body}");
    let blame = error["blame"].as_str().expect("blame");
    assert!(["job", "host", "provider"].contains(&blame), "{body}");
    let message = error["message"].as_str().filter(|m| !m.is_empty()).expect("a message");
    let extra: Vec<&String> = body.as_object().unwrap().keys().filter(|k| *k != "error").collect();
    assert!(extra.is_empty(), "{body}");
    format!("{message} {}", error["hint"].as_str().unwrap_or(""))
}

fn ids(list: &Answer) -> Vec<String> {
    assert_eq!(list.status, 200, "{}", list.body);
    let list = list.json();
    list["jobs"].as_array().expect("jobs").iter().map(|j| j["id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_key_is_one_job_even_in_a_crowd_and_after_a_crash() {
    let mut world = World::with(SCRIPT, "[limits]\nslots = 1\nqueued_jobs_max = 2\n");
    let hanging = world.hanging(ANN);
    let spec = json!({ "prompt": "wait for the slot" });
    let key = ["Idempotency-Key: k-1"];
    let submit = |world: &World, uid, spec: &Value| world.with_headers(uid, "POST", "/v1/jobs", spec, &key);

    let answers: Vec<Answer> = std::thread::scope(|scope| {
        let askers: Vec<_> = (0..10).map(|_| scope.spawn(|| submit(&world, ANN, &spec))).collect();
        askers.into_iter().map(|a| a.join().unwrap()).collect()
    });
    let id = id_of(&answers[0]);
    assert!(answers.iter().all(|a| id_of(a) == id), "ten submits made more than one job");
    assert_eq!(answers.iter().filter(|a| a.status == 201).count(), 1, "one made it");
    assert_eq!(answers.iter().filter(|a| a.status == 200).count(), 9, "nine found it");

    let conflict = submit(&world, ANN, &json!({ "prompt": "something else" }));
    assert!(error(&conflict, 409, "idempotency_conflict").contains(&id));
    // Keys are each user's own.
    let other = submit(&world, BOB, &spec);
    assert_eq!(other.status, 201);
    assert_ne!(id_of(&other), id);

    // The queue is full now. That must not hide the job that a lost answer was about.
    let full = world.by(ANN, "POST", "/v1/jobs", &spec);
    error(&full, 429, "queue_full");
    assert_eq!((submit(&world, ANN, &spec).status, id_of(&submit(&world, ANN, &spec))), (200, id.clone()));

    world.kill();
    world.start();
    let after = submit(&world, ANN, &spec);
    assert_eq!((after.status, id_of(&after)), (200, id.clone()), "a key outlives the daemon");
    error(&submit(&world, ANN, &json!({ "prompt": "something else" })), 409, "idempotency_conflict");
    for bad in ["Idempotency-Key;", &format!("Idempotency-Key: {}", "k".repeat(256))] {
        error(&world.with_headers(ANN, "POST", "/v1/jobs", &spec, &[bad]), 400, "invalid_request");
    }
    for job in [&id, &id_of(&other), &hanging] {
        world.call("POST", &format!("/v1/jobs/{job}/cancel"), "");
    }
    assert_eq!(world.sql("SELECT count(*) FROM jobs"), "3");
    world.follow(&hanging);
    world.end();
}

#[test]
fn a_job_does_not_exist_for_other_users_and_the_admin_sees_all() {
    let mut world = World::with(SCRIPT, "[limits]\nslots = 1\n");
    let hanging = world.hanging(ANN);
    let nothing = Value::Null;
    let queued = id_of(&world.by(ANN, "POST", "/v1/jobs", &json!({ "prompt": "secret plan" })));
    let bobs = id_of(&world.by(BOB, "POST", "/v1/jobs", &json!({ "prompt": "bob's" })));
    for job in [&hanging, &queued] {
        for (method, path) in [
            ("GET", format!("/v1/jobs/{job}")),
            ("GET", format!("/v1/jobs/{job}/events")),
            ("GET", format!("/v1/jobs/{job}/events?follow=1")),
            ("POST", format!("/v1/jobs/{job}/cancel")),
            ("DELETE", format!("/v1/jobs/{job}")),
        ] {
            let answer = world.by(BOB, method, &path, &nothing);
            let said = error(&answer, 404, "not_found");
            // Word for word what is said of a job that never was.
            let never = job.replace(&job[8..], "00000000");
            let of_nothing = world.by(BOB, method, &path.replace(job.as_str(), &never), &nothing);
            assert_eq!(
                said.replace(job.as_str(), ""),
                error(&of_nothing, 404, "not_found").replace(&never, "")
            );
        }
    }
    assert_eq!(ids(&world.by(BOB, "GET", "/v1/jobs", &nothing)), std::slice::from_ref(&bobs));
    assert_eq!(ids(&world.by(ANN, "GET", "/v1/jobs", &nothing)), [queued.clone(), hanging.clone()]);
    error(&world.by(BOB, "GET", "/v1/jobs?all=1", &nothing), 400, "invalid_request");
    assert_eq!(world.show(&hanging)["state"], "running", "nobody stopped it");

    let all = ids(&world.call("GET", "/v1/jobs?all=1", ""));
    assert_eq!(all, [bobs.clone(), queued.clone(), hanging.clone()]);
    assert_eq!(ids(&world.call("GET", "/v1/jobs", "")), [""; 0], "the admin's own: none");
    assert_eq!(world.show(&queued)["uid"], ANN);

    let running = world.by(ANN, "DELETE", &format!("/v1/jobs/{hanging}"), &nothing);
    assert!(error(&running, 409, "not_done").contains("cancel"));
    let cancelled = world.call("POST", &format!("/v1/jobs/{bobs}/cancel"), "");
    assert_eq!(
        (cancelled.status, &cancelled.json()["reason"]),
        (200, &json!("cancelled")),
        "a queued job ends at once"
    );
    let stopping = world.by(ANN, "POST", &format!("/v1/jobs/{hanging}/cancel"), &nothing);
    assert_eq!(stopping.status, 202, "{}", stopping.body);
    world.by(ANN, "POST", &format!("/v1/jobs/{queued}/cancel"), &nothing);
    let told = world.follow(&hanging);
    for (end, kind) in told[told.len() - 2..].iter().zip(["summary", "state"]) {
        assert_eq!(
            (&end["type"], &end["outcome"], &end["reason"]),
            (&json!(kind), &json!("stopped"), &json!("cancelled"))
        );
    }
    let again = world.by(ANN, "POST", &format!("/v1/jobs/{hanging}/cancel"), &nothing);
    assert_eq!(again.status, 200, "cancelling twice is no mistake");

    for job in [&hanging, &queued] {
        assert_eq!(world.by(ANN, "DELETE", &format!("/v1/jobs/{job}"), &nothing).status, 204);
        error(&world.by(ANN, "GET", &format!("/v1/jobs/{job}"), &nothing), 404, "not_found");
        assert!(!world.state_dir().join("jobs").join(job).exists(), "its events are left");
    }
    world.end();
}

#[test]
fn jobs_are_listed_by_every_filter_and_page_by_page() {
    let mut world = World::with(SCRIPT, "[limits]\nslots = 1\n");
    let hanging = world.hanging(0);
    let mut made = vec![hanging.clone()];
    for n in 0..7 {
        let spec = json!({
            "prompt": format!("\n  job number {n} {}\nmore", "x".repeat(100)),
            "policy": if n % 2 == 0 { "trusted" } else { "default" },
            "model": if n < 3 { "claude-haiku-4-5" } else { "claude-sonnet-4-6" },
            "labels": { "n": n.to_string(), "team": if n < 5 { "a=b & c" } else { "z" } },
        });
        made.push(world.submit(&spec));
    }
    made.reverse();
    let newest = made.clone();
    let list = |query: &str| ids(&world.call("GET", &format!("/v1/jobs{query}"), ""));
    assert_eq!(list(""), newest, "newest first");
    assert_eq!(list("?state=running"), std::slice::from_ref(&hanging));
    assert_eq!(list("?state=queued,running").len(), 8);
    assert_eq!(list("?policy=trusted").len(), 4);
    assert_eq!(list("?model=claude-haiku-4-5").len(), 3);
    assert_eq!(list("?label=team%3Da%3Db%20%26%20c").len(), 5);
    assert_eq!(list("?label=team%3Da%3Db%20%26%20c&label=n%3D4"), [newest[2].clone()]);
    assert_eq!(list("?label=n%3D6&policy=default"), [""; 0]);
    let middle = world.sql(&format!("SELECT created_ms FROM jobs WHERE id = '{}'", newest[3]));
    let (since, until) = (list(&format!("?since_ms={middle}")), list(&format!("?until_ms={middle}")));
    assert!(since.contains(&newest[3]) && !until.contains(&newest[3]));
    assert_eq!(since.len() + until.len(), 8);

    for limit in 1..=8 {
        let (mut seen, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = world.call("GET", &format!("/v1/jobs?limit={limit}{cursor}"), "");
            assert!(ids(&page).len() <= limit);
            seen.extend(ids(&page));
            match page.json()["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        assert_eq!(seen, newest, "pages of {limit}");
    }
    for (query, key) in [
        ("?state=asleep", "state"),
        ("?label=x", "label"),
        ("?since_ms=yesterday", "since_ms"),
        ("?limit=0", "limit"),
        ("?limit=1001", "limit"),
        ("?cursor=zz", "cursor"),
        ("?colour=red", "colour"),
    ] {
        let said = error(&world.call("GET", &format!("/v1/jobs{query}"), ""), 400, "invalid_request");
        assert!(said.starts_with(&format!("{key}: ")), "{said}");
    }
    let view = world.show(&newest[0]);
    assert!(view["title"].as_str().unwrap().starts_with("job number 6 xx"), "{view}");
    assert_eq!(
        (&view["state"], &view["labels"]["n"], &view["policy"]),
        (&json!("queued"), &json!("6"), &json!("trusted"))
    );
    for job in &made {
        world.call("POST", &format!("/v1/jobs/{job}/cancel"), "");
    }
    assert_eq!(list("?state=done").len() + list("?state=stopping,collecting").len(), 8);
    world.follow(&hanging);
    world.end();
}

#[test]
fn events_are_the_same_for_every_follower_whenever_it_comes() {
    let mut world = World::with(SCRIPT, "[limits]\nslots = 1\n");
    let hanging = world.hanging(0);
    // A long answer costs as input of the next request: the default policy's dollar would not do.
    let job = world.submit(&json!({ "prompt": "talk", "policy": "trusted" }));
    let path = format!("/v1/jobs/{job}/events");
    let followed = format!("{path}?follow=1");

    // Reads its head and then nothing at all until the job is over. HTTP/1.0, so that the body is not chunked.
    let mut slow = UnixStream::connect(world.socket()).unwrap();
    write!(slow, "GET {followed} HTTP/1.0\r\nhost: hotcell\r\n\r\n").unwrap();
    let sse = ["-H", "accept: text/event-stream"];
    let (early, streamed, during) = std::thread::scope(|scope| {
        let early: Vec<_> = (0..3).map(|_| scope.spawn(|| world.call("GET", &followed, "").body)).collect();
        let streamed = scope.spawn(|| world.curl("GET", &followed, "", &sse, None).unwrap().body);
        world.call("POST", &format!("/v1/jobs/{hanging}/cancel"), "");
        world.follow(&hanging);
        let during = world.call("GET", &format!("{followed}&from=3"), "").body;
        (early.into_iter().map(|f| f.join().unwrap()).collect::<Vec<_>>(), streamed.join().unwrap(), during)
    });
    assert_eq!(world.show(&job)["outcome"], "succeeded", "{}", world.show(&job));
    let whole = world.call("GET", &path, "").body;
    let all = events(&whole);
    assert_eq!((all[0]["seq"].as_u64(), &all.last().unwrap()["state"]), (Some(1), &json!("done")));
    assert!(whole.len() > 3 << 20, "enough to fill a socket's buffers many times: {}", whole.len());
    assert!(early.iter().all(|body| *body == whole), "a follower that was there before the start");
    assert_eq!(events(&during), all[2..], "a follower that came in between, from 3");
    let mut read = String::new();
    slow.read_to_string(&mut read).unwrap();
    let (head, body) = read.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.0 200") && head.contains("application/x-ndjson"), "{head}");
    assert!(body == whole, "a reader that slept has {} of {} bytes", body.len(), whole.len());

    // After the end: at once, from anywhere, as lines or as messages.
    assert_eq!(world.call("GET", &followed, "").body, whole);
    let last = all.len();
    assert_eq!(events(&world.call("GET", &format!("{path}?from={last}"), "").body), all[last - 1..]);
    for beyond in [(last as u64 + 1).to_string(), u64::MAX.to_string()] {
        let answer = world.call("GET", &format!("{path}?follow=1&from={beyond}"), "");
        assert_eq!((answer.status, answer.body.as_str()), (200, ""));
    }
    assert_eq!(messages(&streamed), all);
    let since = |id: String| {
        let header = format!("Last-Event-ID: {id}");
        let more = ["-H", "accept: text/event-stream", "-H", &header];
        messages(&world.curl("GET", &path, "", &more, None).unwrap().body)
    };
    assert_eq!(since((last - 2).to_string()), all[last - 2..]);
    assert_eq!(since(u64::MAX.to_string()), [Value::Null; 0]);
    for query in ["from=-1", "from=x", "follow=maybe", "form=1"] {
        error(&world.call("GET", &format!("{path}?{query}"), ""), 400, "invalid_request");
    }
    world.end();
}

/// Server-sent events → their data; each one's id is its number.
fn messages(body: &str) -> Vec<Value> {
    let message = |text: &str| {
        let (id, data) = text.split_once('\n').expect("two lines");
        let value: Value = serde_json::from_str(data.strip_prefix("data: ").expect("data")).expect("JSON");
        assert_eq!(id, format!("id: {}", value["seq"]));
        value
    };
    body.split("\n\n").filter(|t| !t.is_empty()).map(message).collect()
}

#[test]
fn every_error_has_one_shape_and_every_answer_its_schema() {
    let world = World::new(SCRIPT);
    error(&world.call("GET", "/v2/jobs", ""), 404, "no_route");
    error(&world.call("GET", "/v1/jobs/", ""), 404, "no_route");
    for (method, path) in [
        ("PUT", "/v1/jobs"),
        ("POST", "/v1/jobs/j0dq2v7hzzzzzzzz"),
        ("GET", "/v1/jobs/j0dq2v7hzzzzzzzz/cancel"),
        ("DELETE", "/metrics"),
    ] {
        let said = error(&world.call(method, path, ""), 405, "method_not_allowed");
        assert!(said.contains(method) && said.contains(path), "{said}");
    }
    for id in ["%ff", "%00", "..%2f..%2fetc", "j1", &"j".repeat(5000)] {
        error(&world.call("GET", &format!("/v1/jobs/{id}"), ""), 404, "not_found");
        error(&world.call("GET", &format!("/v1/jobs/{id}/events"), ""), 404, "not_found");
        error(&world.call("POST", &format!("/v1/jobs/{id}/cancel"), ""), 404, "not_found");
    }
    error(&world.call("GET", "/v1/jobs?limit=%ff", ""), 400, "invalid_request");
    error(&world.call("GET", "/v1/cost?since=%ff", ""), 400, "invalid_request");
    for body in [
        "",
        "{",
        "[]",
        "null",
        "\"x\"",
        "{\"prompt\":1}",
        "{\"prompt\":\"x\"} trailing",
        "\u{feff}{\"prompt\":\"x\"}",
    ] {
        error(&world.call("POST", "/v1/jobs", body), 400, "invalid_spec");
    }
    let large = format!("{{\"prompt\":\"{}\"}}", "x".repeat(10 << 20));
    let said = error(&world.call("POST", "/v1/jobs", &large), 413, "too_large");
    assert!(said.contains("4194304"), "the limit is said: {said}");
    let prompt = format!("{{\"prompt\":\"{}\"}}", "x".repeat(2 << 20));
    assert!(
        error(&world.call("POST", "/v1/jobs", &prompt), 400, "invalid_spec")
            .contains("prompt: has 2097152 bytes")
    );
    assert_eq!(world.sql("SELECT count(*) FROM jobs"), "0", "what is refused leaves nothing");

    let doctor = world.call("GET", "/v1/doctor", "").json();
    assert_eq!(doctor["status"], "ok", "{doctor:#}");
    let names: Vec<&str> =
        doctor["checks"].as_array().unwrap().iter().map(|check| check["name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "daemon",
            "engine",
            "versions",
            "kernel",
            "runtimes",
            "image",
            "agent",
            "workspaces",
            "disk",
            "clock",
            "keys",
            "policies"
        ],
        "{doctor:#}"
    );
    let health = world.call("GET", "/healthz", "").json();
    assert_eq!((&health["status"], &health["problems"]), (&json!("ok"), &json!([])), "{health}");
    let document = world.call("GET", "/v1/openapi.json", "").json();
    assert_eq!(document["openapi"], "3.1.0");
    references(&document, &document);
    let operations: usize =
        document["paths"].as_object().unwrap().values().map(|p| p.as_object().unwrap().len()).sum();
    assert_eq!(operations, 37, "each operation of the API is described");
    for key in ["id", "state", "cost_usd", "totals"] {
        let properties = document["components"]["schemas"]["JobView"].to_string();
        assert!(properties.contains(&format!("\"{key}\"")), "JobView has no {key}: {properties}");
    }
    let codes = document["components"]["schemas"]["ErrorCode"].to_string();
    assert!(codes.contains("method_not_allowed") && codes.contains("idempotency_conflict"), "{codes}");
    world.end();
}

/// Each `$ref` leads somewhere.
fn references(document: &Value, part: &Value) {
    match part {
        Value::Object(map) => {
            if let Some(target) = map.get("$ref").and_then(Value::as_str) {
                let pointer = target.strip_prefix('#').expect("a reference within the document");
                assert!(document.pointer(pointer).is_some(), "{target} leads nowhere");
            }
            map.values().for_each(|value| references(document, value));
        }
        Value::Array(items) => items.iter().for_each(|item| references(document, item)),
        _ => {}
    }
}

#[test]
fn metrics_are_seeded_and_move_with_the_jobs() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let world = World::with(SCRIPT, &format!("metrics = \"127.0.0.1:{port}\"\n[limits]\nslots = 3\n"));
    let tcp = |path: &str| {
        let url = format!("http://127.0.0.1:{port}{path}");
        let output = Command::new("curl").args(["-sS", "-w", "\n%{http_code}", &url]).output().expect("curl");
        let text = String::from_utf8(output.stdout).unwrap();
        let (body, status) = text.rsplit_once('\n').unwrap();
        Answer { status: status.parse().unwrap(), body: body.to_owned() }
    };
    let fresh = world.call("GET", "/metrics", "").body;
    promtool(&fresh);
    let before = series(&fresh);
    let set =
        before.iter().filter(|(_, value)| **value != 0.0).map(|(name, _)| name.split('{').next().unwrap());
    let expected =
        ["hotcell_build_info", "hotcell_engine_up", "hotcell_provider_concurrency", "hotcell_slots"];
    assert_eq!(set.collect::<Vec<_>>(), expected);
    assert!(before.len() > 150, "all series are there from the start: {}", before.len());
    assert_eq!(series(&tcp("/metrics").body), before, "TCP tells the same");
    assert_eq!(tcp("/healthz").status, 200);
    for path in ["/v1/jobs", "/v1/openapi.json", "/v1/jobs/j0dq2v7hzzzzzzzz/events"] {
        error(&tcp(path), 404, "no_route");
    }

    let (_, good) = world.job(&json!({ "prompt": "talk", "policy": "trusted" }));
    assert_eq!(good["outcome"], "succeeded", "{good}");
    let (_, bad) = world.job(&json!({ "prompt": "x", "agent": "0.0.1" }));
    assert_eq!((&bad["outcome"], &bad["reason"]), (&json!("failed"), &json!("agent_missing")), "{bad}");
    let text = world.call("GET", "/metrics", "").body;
    promtool(&text);
    let after = series(&text);
    let mut missing = before.keys().filter(|name| !after.contains_key(*name));
    assert_eq!(missing.next(), None, "a series went away");
    assert!(after.len() == before.len(), "a series appeared later");
    let at = |name: &str| *after.get(name).unwrap_or_else(|| panic!("no {name}"));
    for (name, value) in [
        ("hotcell_jobs{state=\"done\"}", 2.0),
        ("hotcell_jobs_total{outcome=\"succeeded\"}", 1.0),
        ("hotcell_jobs_total{outcome=\"failed\"}", 1.0),
        ("hotcell_failures_total{phase=\"prepare\",reason=\"agent_missing\"}", 1.0),
        ("hotcell_slots_used", 0.0),
        ("hotcell_turns_total", 2.0),
        ("hotcell_tool_calls_total{decision=\"allow\"}", 1.0),
        ("hotcell_job_duration_seconds_count", 2.0),
        ("hotcell_job_queue_seconds_count", 2.0),
        ("hotcell_job_phase_seconds_count{phase=\"boot\"}", 1.0),
        ("hotcell_job_phase_seconds_count{phase=\"collect\"}", 2.0),
        ("hotcell_gateway_refused_total{reason=\"credential\"}", 0.0),
        ("hotcell_gateway_refused_total{reason=\"budget\"}", 0.0),
        ("hotcell_orphans_reaped_total{kind=\"container\"}", 0.0),
        ("hotcell_orphans_reaped_total{kind=\"reservation\"}", 0.0),
    ] {
        assert_eq!(at(name), value, "{name}");
    }
    let cost: f64 =
        after.iter().filter(|(name, _)| name.starts_with("hotcell_cost_usd_total")).map(|(_, v)| v).sum();
    assert!((cost - good["cost_usd"].as_f64().unwrap()).abs() < 1e-9, "{cost}");
    assert!((at("hotcell_job_cost_usd_sum") - cost).abs() < 1e-9);
    let output = at("hotcell_tokens_total{model=\"claude-sonnet-4-6\",type=\"output\"}");
    assert_eq!(json!(output as u64), good["totals"]["usage"]["output"]);
    world.end();
}

fn series(text: &str) -> BTreeMap<String, f64> {
    let lines = text.lines().filter(|l| !l.starts_with('#') && !l.is_empty());
    lines
        .map(|l| l.rsplit_once(' ').unwrap())
        .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
        .collect()
}

fn promtool(text: &str) {
    let mut child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool: run `make tools`");
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && said.trim().is_empty(), "promtool: {said}");
}
