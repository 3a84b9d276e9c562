//! The two sockets in a cell, spoken to by an agent in the place of those that they are for.

use serde_json::{Value, json};

use super::{run, spec, world};
use crate::world::{CANARY, World};

#[test]
fn nobody_gets_anything_from_ctl_sock_without_its_key() {
    let world = world();
    let seen = run(&world, "python3 ctl.py all", &json!({}));
    seen.succeeded();
    let nothing: Vec<u64> = vec![0; seen.get("garbage").as_array().unwrap().len()];
    assert_eq!(*seen.get("garbage"), json!(nothing), "bytes came back");
    for attempt in seen.get("forge").as_array().unwrap() {
        // A challenge is all that a greeting gets: 16 bytes of header, a nonce, a proof over both nonces.
        assert_eq!(
            (&attempt["challenged"], &attempt["then"], &attempt["end"]),
            (&json!(80), &json!(0), &json!("closed")),
            "{attempt}"
        );
    }
    assert_eq!(*seen.get("other_cell"), 0);
    assert!(seen.get("opened").as_u64().unwrap() > 400, "no flood: {:?}", seen.found);
    assert!(seen.notes().iter().any(|n| n.contains("spoke out of turn")), "{:?}", seen.notes());
    assert_eq!(seen.job["result"], "done");
    world.end();
}

#[test]
fn held_connections_keep_nobody_out() {
    let world = world();
    // They are held for the rest of the job: the tool's result, the next turn and the end go past them.
    let seen = run(&world, "(node hold.js & sleep 1); sleep 1", &json!({}));
    seen.succeeded();
    assert_eq!(seen.get("held")["ctl"], 64, "{:?}", seen.found);
    assert!(seen.notes().iter().any(|n| n.contains("spoke out of turn")), "{:?}", seen.notes());
    world.end();
}

#[test]
fn an_agent_that_races_the_first_process_to_a_restarted_daemon_gets_nothing() {
    let mut world = world();
    let id = world.submit(&spec(&world, "python3 ctl.py race 60", &json!({ "policy": "trusted" })));
    let (racing, enough) = (world.path("zoo/racing"), world.path("zoo/enough"));
    world.wait_for("the agent races", |_| racing.exists());
    for _ in 0..3 {
        world.kill();
        world.start();
        world.wait_for("a stranger was noted", |w| {
            let events = w.call("GET", &format!("/v1/jobs/{id}/events"), "").body;
            let took_over = events.rfind("took the cell over");
            took_over.is_some_and(|at| events[at..].contains("spoke out of turn"))
        });
    }
    std::fs::write(enough, "").unwrap();
    let seen = super::Seen::new(world.follow(&id), world.show(&id));
    seen.succeeded();
    let race = seen.get("race");
    assert!(race["connected"].as_u64().unwrap() > 0, "{race}");
    assert_eq!(race["more"], 0, "a stranger got more than a challenge: {race}");
    assert_eq!(seen.job["result"], "done");
    world.end();
}

/// Requests for the model that the agent itself made: the CLI says who it is.
pub(super) fn own(world: &World) -> Vec<hotcell::model::Received> {
    let requests = world.recorder.requests();
    requests
        .into_iter()
        .filter(|r| r.header("user-agent").is_none_or(|a| !a.starts_with("claude-cli")))
        .collect()
}

#[test]
fn only_the_job_itself_and_only_what_is_allowed_reaches_the_model() {
    let world = world();
    let seen = run(&world, "python3 api.py refused", &json!({}));
    seen.succeeded();
    let refused = seen.get("refused").as_object().unwrap();
    assert!(refused.len() > 60);
    for (what, status) in refused {
        let malformed = ["model twice", "two lengths", "no JSON"].contains(&what.as_str());
        let transport = ["gzip", "chunked and length"].contains(&what.as_str());
        // A request that the HTTP parser itself turns down has no words.
        let expected: &[u64] = if malformed || what == "POST *" {
            &[400, 403]
        } else if transport {
            &[400, 413]
        } else {
            &[403]
        };
        assert!(expected.contains(&status.as_u64().unwrap()), "{what}: {status}");
    }
    assert_eq!(own(&world).len(), 0, "{:#?}", own(&world));
    assert!(seen.events.iter().any(|e| e["type"] == "refused"));
    world.end();
}

#[test]
fn what_passes_carries_nothing_of_the_client_but_the_request() {
    let world = world();
    let seen = run(&world, "python3 api.py passing", &json!({}));
    seen.succeeded();
    let passing = seen.get("passing").as_object().unwrap();
    assert!(passing.values().all(|status| *status == 200), "{passing:?}");
    let got = own(&world);
    assert_eq!(got.len(), passing.len());
    for request in got {
        let names: Vec<&str> = request.headers.iter().map(|(n, _)| n.as_str()).collect();
        assert_eq!(names.iter().filter(|n| **n == "x-api-key").count(), 1, "{names:?}");
        assert_eq!(request.header("x-api-key"), Some(CANARY));
        for gone in [
            "authorization",
            "cookie",
            "proxy-authorization",
            "x-forwarded-for",
            "x-evil",
            "origin",
            "referer",
        ] {
            assert!(!names.contains(&gone), "{gone} went to the provider");
        }
        let text = format!("{:?}", request.headers);
        assert!(!text.contains("hotcell-"), "the job's token went to the provider: {text}");
    }
    // The agent's own calls are paid for like the CLI's.
    let charges = seen.events.iter().filter(|e| e["type"] == "charge").count();
    assert_eq!(
        charges,
        world
            .recorder
            .requests()
            .iter()
            .filter(|r| r.target.starts_with("/v1/messages") && !r.target.contains("count"))
            .count()
    );
    world.end();
}

#[test]
fn the_budget_holds_for_the_agents_own_calls() {
    let world = World::new(&super::RUN_THE_PROMPT.replace("output = 20", "output = 8000"));
    let command = "for i in $(seq 40); do curl -s -o /dev/null -H \"x-api-key: $ANTHROPIC_API_KEY\" -H 'content-type: application/json' \
        -d '{\"model\":\"claude-sonnet-4-6\",\"max_tokens\":8000,\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}' \
        $ANTHROPIC_BASE_URL/v1/messages & done; wait";
    let seen = run(&world, command, &json!({ "limits": { "cost_usd": 1.0 } }));
    assert_eq!(
        (&seen.job["outcome"], &seen.job["reason"]),
        (&Value::from("stopped"), &Value::from("budget")),
        "{}",
        seen.job
    );
    assert!(seen.job["cost_usd"].as_f64().unwrap() <= 1.0, "{}", seen.job);
    world.end();
}
