//! Faults of the model provider, through the real CLI in a real cell: how the job ends, whose fault that is,
//! what a script is told, and that every cent is accounted for.

use serde_json::{Value, json};

use crate::bad_input::{failed, run};
use crate::world::World;

/// The real CLI of the image, told to give up after one retry: by itself it tries for three minutes.
pub(crate) const IMPATIENT: (&str, Option<&str>) =
    ("9.0.1", Some("#!/bin/sh\nexport CLAUDE_CODE_MAX_RETRIES=1\nexec /usr/local/bin/claude \"$@\"\n"));

const SCRIPT: &str = r#"
usage = { input = 1000, output = 200 }

[[reply]]
when = { prompt = "bad-key", tools = true }
fault = { status = 401, type = "authentication_error", message = "invalid x-api-key", headers = { x-should-retry = "false" } }

[[reply]]
when = { prompt = "forbidden", tools = true }
fault = { status = 403, type = "permission_error", message = "not for you" }

[[reply]]
when = { prompt = "rejected", tools = true }
fault = { status = 400, type = "invalid_request_error", message = "what is this" }

[[reply]]
when = { prompt = "unheard", tools = true }
fault = { status = 404, type = "not_found_error", message = "no such model" }

[[reply]]
when = { prompt = "limited-once", tools = true }
times = 1
fault = { status = 429, type = "rate_limit_error", message = "slow down", headers = { retry-after = "1" } }

[[reply]]
when = { prompt = "limited-for-ever", tools = true }
fault = { status = 429, type = "rate_limit_error", message = "slow down", headers = { retry-after = "1" } }

[[reply]]
when = { prompt = "broken-once", tools = true }
times = 1
fault = { status = 500, message = "oh no" }

[[reply]]
when = { prompt = "broken-for-ever", tools = true }
fault = { status = 500, message = "oh no" }

[[reply]]
when = { prompt = "overloaded", tools = true }
fault = { status = 529, type = "overloaded_error", message = "too many of you" }

[[reply]]
when = { prompt = "cut-once", tools = true }
times = 1
text = "half an answ"
fault = { cut_after_events = 3 }

[[reply]]
when = { prompt = "cut-for-ever", tools = true }
text = "half an answ"
fault = { cut_after_events = 3 }

[[reply]]
when = { prompt = "error-event", tools = true }
times = 1
text = "half an answ"
fault = { error_after_events = 3, type = "overloaded_error", message = "in the middle" }

[[reply]]
when = { prompt = "garbled-once", tools = true }
times = 1
text = "half an answ"
fault = { malformed_after_events = 2 }

[[reply]]
when = { prompt = "late", tools = true }
text = "too late"
latency_ms = 9000

[[reply]]
when = { prompt = "spend", tools = true }
blocks = [{ tool = "Bash", input = { command = "echo more", description = "spend" } }]
usage = { input = 10, output = 7000 }

[default]
text = "done"
"#;

/// Charged events = ledger = the job's cost, and nothing is set aside any more. In micro-USD.
#[track_caller]
fn accounted(world: &World, events: &[Value], job: &Value) -> u64 {
    let id = job["id"].as_str().unwrap();
    let charges = events.iter().filter(|e| e["type"] == "charge");
    let told: u64 = charges.map(|e| e["charged_micro_usd"].as_u64().unwrap()).sum();
    let ledger = world.sql(&format!("SELECT coalesce(sum(charged_micro), 0) FROM ledger WHERE job = '{id}'"));
    assert_eq!(ledger, told.to_string(), "ledger and events: {job}");
    assert_eq!(job["totals"]["charged_micro_usd"], told, "{job}");
    assert!((job["cost_usd"].as_f64().unwrap() - told as f64 / 1e6).abs() < 1e-9, "{job}");
    let open = world.sql(&format!("SELECT count(*) FROM ledger WHERE job = '{id}' AND status = 'open'"));
    assert_eq!(open, "0", "something is still set aside: {job}");
    let requests = events.iter().filter(|e| e["type"] == "request").count();
    let settled = events.iter().filter(|e| e["type"] == "charge").count();
    assert_eq!(requests, settled, "each request is charged or let go once: {job}");
    told
}

/// One case: what is asked, and how it must end.
struct Case {
    prompt: &'static str,
    impatient: bool,
    limits: Value,
    exit: i32,
    end: End,
}

enum End {
    Succeeds,
    Fails { reason: &'static str, blame: &'static str, words: &'static str },
    Stops { reason: &'static str },
}

fn case(prompt: &'static str, exit: i32, end: End) -> Case {
    Case { prompt, impatient: false, limits: json!({}), exit, end }
}

fn fails(prompt: &'static str, reason: &'static str, blame: &'static str, words: &'static str) -> Case {
    case(prompt, 1, End::Fails { reason, blame, words })
}

fn stops(prompt: &'static str, reason: &'static str, limits: Value) -> Case {
    Case { limits, ..case(prompt, 3, End::Stops { reason }) }
}

fn check(world: &World, case: &Case) -> (Vec<Value>, Value) {
    let mut spec = json!({ "prompt": case.prompt, "limits": case.limits });
    if case.impatient {
        spec["agent"] = json!(IMPATIENT.0);
    }
    let (code, events, job) = run(world, &spec);
    match &case.end {
        End::Succeeds => assert_eq!(job["outcome"], "succeeded", "{}: {job}", case.prompt),
        End::Fails { reason, blame, words } => {
            let message = failed(&job, "run", reason, blame);
            assert!(message.contains(words), "{}: {message}", case.prompt);
        }
        End::Stops { reason } => {
            assert_eq!(
                (&job["outcome"], &job["reason"]),
                (&json!("stopped"), &json!(reason)),
                "{}: {job}",
                case.prompt
            );
        }
    }
    assert_eq!(code, case.exit, "{}: {job}", case.prompt);
    accounted(world, &events, &job);
    (events, job)
}

#[test]
fn a_fault_of_the_provider_ends_a_job_in_its_own_words_or_not_at_all() {
    let mut world = World::without_daemon(SCRIPT, "[limits]\nslots = 3\n");
    world.set_agents(&[IMPATIENT]);
    world.start();
    let impatient = |case: Case| Case { impatient: true, ..case };
    let succeeds = |prompt| case(prompt, 0, End::Succeeds);
    let cases = [
        stops("late", "silent", json!({ "silence_s": 5 })),
        stops("limited-for-ever", "deadline", json!({ "wall_s": 8 })),
        fails("bad-key", "provider_auth", "provider", "Invalid API key"),
        fails("forbidden", "provider_auth", "provider", "not for you"),
        fails("rejected", "provider_rejected", "job", "what is this"),
        fails("unheard", "provider_rejected", "job", ""),
        impatient(fails("broken-for-ever", "provider_error", "provider", "")),
        impatient(fails("cut-for-ever", "provider_error", "provider", "")),
        succeeds("limited-once"),
        succeeds("broken-once"),
        succeeds("cut-once"),
        succeeds("error-event"),
        succeeds("garbled-once"),
    ];
    std::thread::scope(|scope| {
        let running: Vec<_> =
            cases.iter().map(|case| (case.prompt, scope.spawn(|| check(&world, case)))).collect();
        let failed: Vec<&str> =
            running.into_iter().filter_map(|(name, r)| r.join().is_err().then_some(name)).collect();
        assert!(failed.is_empty(), "{failed:?}");
    });
    let metrics = world.call("GET", "/metrics", "").body;
    for line in [
        "hotcell_failures_total{phase=\"run\",reason=\"provider_auth\"} 2",
        // What is limited is parked and goes on: the tests of parking have that.
        "hotcell_failures_total{phase=\"run\",reason=\"provider_limit\"} 0",
        "hotcell_failures_total{phase=\"run\",reason=\"provider_error\"} 2",
        "hotcell_failures_total{phase=\"run\",reason=\"provider_rejected\"} 2",
        "hotcell_stops_total{reason=\"silent\"} 1",
        "hotcell_stops_total{reason=\"deadline\"} 1",
        "hotcell_jobs_total{outcome=\"succeeded\"} 5",
    ] {
        assert!(metrics.contains(&format!("\n{line}\n")), "no {line}");
    }
    // For people: the provider's own words, whose fault, what to do.
    let (code, stdout, _) = world.run(&["run", "bad-key"]);
    assert_eq!(code, 1);
    for words in [
        "failed in run (provider_auth)",
        "Invalid API key",
        "fault: the model provider",
        "providers and credentials in the configuration",
    ] {
        assert!(stdout.contains(words), "{stdout}");
    }

    // Nobody at all answers at the provider's address.
    world.nothing_left();
    world.terminate();
    world.set_provider("http://127.0.0.1:9");
    world.start();
    let (_, job) = check(&world, &impatient(fails("x", "provider_error", "provider", "cannot be reached")));
    assert_eq!((&job["cost_usd"], &job["totals"]["usage"]["output"]), (&json!(0.0), &json!(0)));
    world.end();
}

#[test]
fn a_cost_limit_ends_the_job_before_it_is_passed_and_says_so() {
    let world = World::new(SCRIPT);
    let limit = 0.6;
    let (events, job) = check(&world, &stops("spend", "budget", json!({ "cost_usd": limit })));
    let spent = job["cost_usd"].as_f64().unwrap();
    assert!(spent > 0.0 && spent <= limit, "{spent}");
    assert!(job["totals"]["turns"].as_u64().unwrap() >= 2, "it spent on several replies: {job}");
    let stop = events.iter().find(|e| e["type"] == "stop").expect("a stop");
    assert!(stop["detail"].as_str().unwrap().contains("0.6"), "{stop}");
    assert_eq!((&stop["reason"], &stop["origin"]), (&json!("budget"), &json!("daemon")));
    // The last reply had less room than the CLI asked for, and its end was the budget's.
    let room = |r: &hotcell::model::Received| r.json()["max_tokens"].as_u64();
    let least = world.recorder.requests().iter().filter_map(room).min().unwrap();
    assert!((4_096..32_000).contains(&least), "{least}");
    // Each request had its worst case set aside before it was sent, and that never passed the limit.
    let (mut charged, mut most) = (0, 0);
    for event in &events {
        match event["type"].as_str() {
            Some("request") => most = most.max(charged + event["reserved_micro_usd"].as_u64().unwrap()),
            Some("charge") => charged += event["charged_micro_usd"].as_u64().unwrap(),
            _ => {}
        }
    }
    assert!(most as f64 / 1e6 <= limit, "{most}");

    // No room for even one request: nothing is spent, and nothing reaches the provider.
    let before = world.recorder.total();
    let (_, job) = check(&world, &stops("spend", "budget", json!({ "cost_usd": 0.001 })));
    assert_eq!((&job["cost_usd"], &job["totals"]["requests"]), (&json!(0.0), &json!(0)));
    assert_eq!(world.recorder.total(), before, "a request went out without money");
    let (code, stdout, _) = world.run(&["run", "spend", "--cost", "0.001"]);
    assert_eq!(code, 3);
    for words in ["! the cost limit of", "stopped: its cost limit", "--cost", "$0.0010"] {
        assert!(stdout.contains(words), "{stdout}");
    }
    let (code, _, said) = world.run(&["run", "x", "--cost", "1.5"]);
    assert!(code == 2 && said.contains("limits.cost_usd"), "{said}");
    world.end();
}
