//! `[[access]]`: several users on one daemon, each with what the operator's file gives them and no more. Users
//! are told apart by the kernel; what they send cannot change it.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use serde_json::{Value, json};

use crate::fake_agent;
use crate::world::{Answer, World};

/// Listed for the strict policy, one job at a time.
const ANN: u32 = 4242;
/// Listed by group, with a default policy, one provider and the usual images.
const BOB: u32 = 4243;
/// Listed nowhere.
const EVE: u32 = 4299;

const ENTRIES: &str = r#"
[limits]
slots = 3

[[access]]
users = [4242]
policies = ["def*"]
slots = 1
user_day_usd = 5.0

[[access]]
groups = ["4243"]
policies = ["trusted"]
providers = ["anthropic"]
images = ["hotcell/cell*"]
default_policy = "trusted"
"#;

fn by(world: &World, uid: u32, method: &str, path: &str, body: &Value) -> Answer {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    world
        .curl(method, path, &body, &[], Some(uid))
        .unwrap_or_else(|| panic!("no answer to {method} {path}:\n{}", world.log()))
}

/// Checks a refusal; gives its words.
fn refused(answer: &Answer, status: u16, code: &str) -> String {
    assert_eq!(answer.status, status, "{}", answer.body);
    let body = answer.json();
    assert_eq!(body["error"]["code"], code, "{body}");
    assert!(body["error"]["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "{body}");
    body["error"]["message"].as_str().unwrap().to_owned()
}

fn id(answer: &Answer) -> String {
    assert_eq!(answer.status, 201, "{}", answer.body);
    answer.json()["id"].as_str().unwrap().to_owned()
}

#[test]
fn who_is_not_listed_is_refused_on_every_route_that_acts_or_shows() {
    let world = fake_agent::world(ENTRIES);
    let document = by(&world, EVE, "GET", "/v1/openapi.json", &Value::Null).json();
    let open = ["/healthz", "/metrics", "/v1/openapi.json", "/v1/whoami"];
    let (mut closed, body) = (0, json!({ "prompt": "x" }));
    for (path, operations) in document["paths"].as_object().unwrap() {
        for method in operations.as_object().unwrap().keys().map(|m| m.to_uppercase()) {
            let path = path.replace("{id}", "j0dq2v7hzzzzzzzz");
            let body = if method == "POST" { &body } else { &Value::Null };
            let answer = by(&world, EVE, &method, &path, body);
            if open.contains(&path.as_str()) {
                assert_eq!(answer.status, 200, "{method} {path}: {}", answer.body);
                continue;
            }
            let said = refused(&answer, 403, "not_listed");
            assert!(said.contains("4299") && said.contains("[[access]]"), "{said}");
            closed += 1;
        }
    }
    assert!(closed >= 8, "{closed}");
    for path in [
        "/v1/jobs?all=1",
        "/v1/audit?follow=1",
        "/v1/nothing",
        "/",
        "//healthz",
        "/v1/whoami/",
        "/healthz%2f",
    ] {
        refused(&by(&world, EVE, "GET", path, &Value::Null), 403, "not_listed");
    }
    assert_eq!(world.sql("SELECT count(*) FROM jobs"), "0");
    let me = by(&world, EVE, "GET", "/v1/whoami", &Value::Null).json();
    assert_eq!(
        (&me["uid"], &me["listed"], &me["policies"]),
        (&json!(EVE), &json!(false), &json!([])),
        "{me}"
    );
    assert_eq!(me["slots"]["max"], 0);
    let metrics = world.call("GET", "/metrics", "").body;
    let counted = metrics.lines().find_map(|l| l.strip_prefix("hotcell_access_refused_total ")).unwrap();
    assert!(counted.parse::<u64>().unwrap() >= closed, "{counted}");
    // An admin is bound by no entry.
    assert_eq!(world.call("GET", "/v1/jobs?all=1", "").status, 200);
    world.end();
}

#[test]
fn nobody_names_a_policy_a_provider_or_an_image_that_no_entry_gives_them() {
    let mut world = fake_agent::world(ENTRIES);
    let submit = |uid, spec: Value| by(&world, uid, "POST", "/v1/jobs", &spec);
    let said = refused(&submit(ANN, json!({ "prompt": "x", "policy": "trusted" })), 403, "above_access");
    let line = 1 + std::fs::read_to_string(world.path("config.toml"))
        .unwrap()
        .lines()
        .position(|l| l == "[[access]]")
        .unwrap();
    assert!(
        said.starts_with("policy: \"trusted\" is not among what you may use (def*), by [[access]] 1 ("),
        "{said}"
    );
    assert!(said.ends_with(&format!("config.toml, line {line})")), "{said}");
    // What is not theirs is not told apart from what is not there.
    let never = refused(&submit(ANN, json!({ "prompt": "x", "policy": "tristed" })), 403, "above_access");
    assert_eq!(never.replace("tristed", "trusted"), said);
    let unknown = submit(ANN, json!({ "prompt": "x", "policy": "defunct" }));
    let unknown = refused(&unknown, 400, "unknown_policy");
    assert!(unknown.contains("default") && !unknown.contains("trusted"), "{unknown}");
    let said = refused(&submit(BOB, json!({ "prompt": "x", "provider": "bedrock" })), 403, "above_access");
    assert!(said.starts_with("provider: \"bedrock\"") && said.contains("[[access]] 2"), "{said}");
    let said = refused(&submit(BOB, json!({ "prompt": "x", "image": "debian:12" })), 403, "above_access");
    assert!(said.starts_with("image: \"debian:12\"") && said.contains("hotcell/cell*"), "{said}");
    refused(&submit(BOB, json!({ "prompt": "x", "policy": "default" })), 403, "above_access");
    assert_eq!(world.sql("SELECT count(*) FROM jobs"), "0", "what is refused leaves nothing");

    // Without a policy named, the entry's.
    let job = id(&submit(BOB, json!({ "prompt": "ask 1", "limits": { "disk_mib": 64, "memory_mib": 256 } })));
    let (_, job) = fake_agent::done(&mut world, &job);
    assert_eq!((&job["policy"], &job["outcome"]), (&json!("trusted"), &json!("succeeded")), "{job}");
    let me = by(&world, BOB, "GET", "/v1/whoami", &Value::Null).json();
    let names: Vec<&Value> = me["policies"].as_array().unwrap().iter().map(|p| &p["name"]).collect();
    assert_eq!(
        (names.as_slice(), &me["default_policy"]),
        ([&json!("trusted")].as_slice(), &json!("trusted"))
    );
    assert_eq!((&me["providers"], &me["images"]), (&json!(["anthropic"]), &json!(["hotcell/cell*"])));
    assert!(me["access"][0].as_str().unwrap().starts_with("[[access]] 2 ("), "{me}");
    let (code, out, err) = world.run(&["whoami"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.starts_with("root  uid 0  admin\n") && out.contains("trusted, $20.00 a job: "), "{out}");
    world.end();
}

#[test]
fn a_users_slots_hold_beside_free_ones_and_after_the_daemon_was_killed() {
    let mut world = fake_agent::world(ENTRIES);
    let mut spec = fake_agent::spec("sleep 300");
    spec["policy"] = json!("default");
    let ann: Vec<String> = (0..3).map(|_| id(&by(&world, ANN, "POST", "/v1/jobs", &spec))).collect();
    let bob = id(&by(&world, BOB, "POST", "/v1/jobs", &fake_agent::spec("sleep 300")));
    fake_agent::until_state(&mut world, &ann[0], "running");
    fake_agent::until_state(&mut world, &bob, "running");
    let queued = |world: &World| {
        world.sql(&format!("SELECT count(*) FROM jobs WHERE uid = {ANN} AND state = 'queued'"))
    };
    assert_eq!(queued(&world), "2", "two of three slots are used, and hers is one");
    let me = by(&world, ANN, "GET", "/v1/whoami", &Value::Null).json();
    assert_eq!(me["slots"], json!({ "used": 1, "queued": 2, "max": 1 }));
    assert_eq!(
        (&me["budgets"][0]["scope"], &me["budgets"][0]["limit_usd"]),
        (&json!("user_day"), &json!(5.0))
    );
    world.kill();
    world.start();
    fake_agent::until_state(&mut world, &ann[0], "running");
    assert_eq!(queued(&world), "2", "the next daemon keeps to it");
    let cancel = |world: &World, uid, job: &str| {
        by(world, uid, "POST", &format!("/v1/jobs/{job}/cancel"), &Value::Null);
    };
    cancel(&world, ANN, &ann[0]);
    fake_agent::until_state(&mut world, &ann[1], "running");
    assert_eq!(queued(&world), "1", "one goes, one comes");
    cancel(&world, ANN, &ann[2]);
    cancel(&world, ANN, &ann[1]);
    cancel(&world, BOB, &bob);
    for job in ann.iter().chain([&bob]) {
        fake_agent::done(&mut world, job);
    }
    world.end();
}

#[test]
fn the_sockets_group_may_connect_and_nobody_else() {
    let mut world = World::without_daemon("[default]\ntext = \"x\"\n", "");
    let set = |key: &str, value: &str| (format!("HOTCELL_SOCKET_{key}"), value.to_owned());
    world.daemon_env = vec![set("GROUP", &BOB.to_string()), set("MODE", "0660")];
    world.start();
    let socket = std::fs::metadata(world.socket()).unwrap();
    assert_eq!((socket.gid(), socket.uid(), socket.permissions().mode() & 0o777), (BOB, 0, 0o660));
    let health = |world: &World, uid| world.curl("GET", "/healthz", "", &[], Some(uid)).map(|a| a.status);
    assert_eq!((health(&world, BOB), health(&world, ANN)), (Some(200), None));
    assert!(!world.path("s.new").exists());
    world.end();
}

#[test]
fn entries_that_cannot_be_meant_keep_the_daemon_from_starting() {
    for (entries, code, wanted) in [
        (
            "[[access]]\nusers = [\"nobody-of-that-name\"]\npolicies = [\"*\"]",
            2,
            "[[access]] 1 users: there is no user \"nobody-of-that-name\"",
        ),
        ("[[access]]\nusers = [1]\npolicies = [\"unheard-of\"]", 1, "there is no policy \"unheard-of\""),
        ("[[access]]\nusers = [1]\npolicies = [\"*\"]\nceiling = 1", 2, "unknown field `ceiling`"),
        ("socket_group = \"no-such-group\"", 2, "there is no group \"no-such-group\""),
    ] {
        let world = World::without_daemon("[default]\ntext = \"x\"\n", entries);
        let (ended, _, said) = world.run(&["serve"]);
        assert_eq!(ended, code, "{said}");
        assert!(said.contains(wanted) && said.contains("config.toml"), "{said}");
    }
}
