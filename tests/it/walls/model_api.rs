//! The model's API, spoken to by an agent with the job's own token: ambiguous bytes, bodies too large, answers that
//! nobody waits for, calls in parallel, and what changes a price.

use serde_json::{Value, json};

use super::sockets::own;
use super::{Seen, run};
use crate::world::World;

const SCRIPT: &str = r#"
usage = { input = 10, output = 20 }

[[reply]]
when = { prompt = "abort me" }
text = "a long answer that comes in many pieces, one after the other, so that somebody can leave between them"
chunk_chars = 16
chunk_delay_ms = 60
usage = { input = 10, output = 5 }

[[reply]]
when = { prompt = "an hour" }
text = "kept"
usage = { input = 10, output = 5, cache_write_1h = 4000 }

[[reply]]
when = { prompt = "all at once" }
latency_ms = 300
text = "much"
usage = { input = 10, output = 32000 }

[[reply]]
when = { turn = 0, tools = true }
blocks = [{ tool = "Bash", input = { command = "{{prompt}}", description = "the zoo", timeout = 120000 } }]

[default]
text = "done"
"#;

fn of<'a>(seen: &'a Seen, kind: &str) -> Vec<&'a Value> {
    seen.events.iter().filter(|event| event["type"] == kind).collect()
}

/// The largest that the daemon ever was in memory, in KiB.
fn peak_kib(world: &World) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", world.pid())).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn of_ambiguous_bytes_and_bodies_too_large_the_provider_sees_nothing() {
    let world = World::new(SCRIPT);
    let seen = run(&world, "python3 api.py ambiguous", &json!({}));
    seen.succeeded();
    let ambiguous = seen.get("ambiguous").as_object().unwrap();
    assert!(ambiguous.len() >= 60);
    for (what, status) in ambiguous {
        let status = status.as_u64().unwrap();
        assert!([0, 400, 403, 411, 413, 431, 501].contains(&status), "{what}: {status}");
    }
    assert_eq!(own(&world).len(), 0, "{:#?}", own(&world));

    let before = peak_kib(&world);
    let seen = run(&world, "python3 api.py bodies", &json!({}));
    seen.succeeded();
    for (what, got) in seen.get("bodies").as_object().unwrap() {
        let (status, sent) = (got["status"].as_u64().unwrap(), got["sent"].as_u64().unwrap());
        let expected: &[u64] = match what.split(',').next().unwrap() {
            // A daemon that stops to read resets the connection; the status may be lost with it.
            "1 GB" | "endless" => &[413, 0],
            "large head" | "many heads" => &[431, 400, 0],
            "deep" => &[400, 403],
            _ => &[413],
        };
        assert!(expected.contains(&status), "{what}: {got}");
        assert!(sent < 100 << 20, "{what}: it went on to read: {got}");
    }
    let grown = peak_kib(&world) - before;
    assert!(grown < 200 << 10, "the daemon grew by {grown} KiB");
    assert_eq!(own(&world).len(), 0, "{:#?}", own(&world));
    world.end();
}

#[test]
fn an_answer_that_nobody_waits_for_is_paid_for() {
    let world = World::new(SCRIPT);
    let seen = run(&world, "python3 api.py aborting", &json!({}));
    seen.succeeded();
    let tries = seen.get("aborting").as_array().unwrap();
    assert!(tries.iter().filter(|t| t["whole"] == false).count() >= 7, "{tries:?}");
    let (requests, charges) = (of(&seen, "request"), of(&seen, "charge"));
    assert_eq!(requests.len(), charges.len());
    let reached = own(&world).len();
    assert!(reached >= 8, "{reached}");
    // Of 16 tokens that it asked for: what the provider said it used, or all that was set aside.
    let reserved: Vec<u64> =
        requests.iter().map(|e| e["reserved_micro_usd"].as_u64().unwrap()).filter(|r| *r < 10_000).collect();
    assert_eq!(reserved.len(), reached, "{requests:#?}");
    let usage = 10 * 3 + 5 * 15;
    let paid = charges.iter().filter(|charge| {
        let charged = charge["charged_micro_usd"].as_u64().unwrap();
        charged == usage || reserved.contains(&charged)
    });
    assert_eq!(paid.count(), reached, "{charges:#?}");
    world.end();
}

#[test]
fn of_two_hundred_calls_with_money_for_one_one_reaches_the_provider() {
    let world = World::new(SCRIPT);
    let seen = run(&world, "python3 api.py flood", &json!({ "limits": { "cost_usd": 0.5 } }));
    assert_eq!(
        (&seen.job["outcome"], &seen.job["reason"]),
        (&json!("stopped"), &json!("budget")),
        "{}",
        seen.job
    );
    assert_eq!(own(&world).len(), 1);
    assert!(seen.job["cost_usd"].as_f64().unwrap() <= 0.5, "{}", seen.job);
    let charged: u64 = of(&seen, "charge").iter().map(|e| e["charged_micro_usd"].as_u64().unwrap()).sum();
    assert!(charged > 480_000 && charged <= 500_000, "{charged}");
    world.end();
}

#[test]
fn what_changes_a_price_has_one_or_is_refused() {
    let world = World::new(SCRIPT);
    let seen = run(&world, "python3 api.py prices", &json!({}));
    seen.succeeded();
    for (what, status) in seen.get("prices").as_object().unwrap() {
        assert_eq!(*status, if what == "hour" { 200 } else { 403 }, "{what}");
    }
    assert_eq!(own(&world).len(), 1, "{:#?}", own(&world));
    // 4000 tokens written for an hour are twice the price of input.
    let charge = 10 * 3 + 5 * 15 + 4000 * 6;
    let paid = of(&seen, "charge").into_iter().filter(|e| e["charged_micro_usd"] == charge).count();
    assert_eq!(paid, 1, "{:#?}", of(&seen, "charge"));
    let least = of(&seen, "request").iter().map(|e| e["reserved_micro_usd"].as_u64().unwrap()).min();
    assert!(least >= Some(charge), "less was set aside than it cost: {least:?}");
    world.end();
}

#[test]
fn of_all_the_provider_offers_two_paths_pass_and_nothing_makes_it_reach_out() {
    let world = World::new(SCRIPT);
    let seen = run(&world, "python3 api.py matrix reaching", &json!({}));
    seen.succeeded();
    let matrix = seen.get("matrix");
    assert!(matrix["tried"].as_u64() > Some(200), "{matrix}");
    assert_eq!(matrix["passed"], json!(["POST /v1/messages", "POST /v1/messages/count_tokens"]));
    assert_eq!(matrix["others"], json!([403]));
    let reaching = seen.get("reaching").as_object().unwrap();
    assert!(reaching.len() > 90);
    for (what, status) in reaching {
        let malformed = what.contains("twice") || what.contains("mcp_toolset");
        assert!(*status == 403 || malformed && *status == 400, "{what}: {status}");
    }
    // The two of the matrix, and nothing else.
    let got: Vec<String> = own(&world).into_iter().map(|r| r.target).collect();
    assert_eq!(got.len(), 2, "{got:?}");
    world.end();
}
