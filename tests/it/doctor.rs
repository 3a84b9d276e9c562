//! The doctor's attacks on real cells: what holds under the policies, what is found where something is not as it should
//! be, who may ask, and a daemon that does not start without it.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::world::{World, docker};

const NO_MODEL: &str = "";
const TRUSTED: &str = include_str!("../../policies/trusted.toml");

/// The containers of the daemon that a start with `--require-doctor` asks, while there is one.
fn of_the_doctor(world: &World) -> Option<(String, String)> {
    let file = world.state_dir().join("doctor").join(hotcell::store::FILE_NAME);
    let db = rusqlite::Connection::open_with_flags(file, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY).ok()?;
    let query = "SELECT value FROM meta WHERE key = 'instance'";
    let instance: String = db.query_row(query, [], |row| row.get(0)).ok()?;
    let containers = docker(&["ps", "-aq", "--filter", &format!("label=hotcell.instance={instance}")]);
    Some((instance, containers.trim().to_owned()))
}

/// The rows of an answer's attack, by name.
fn promises(doctor: &Value) -> BTreeMap<String, Value> {
    let rows =
        doctor["checks"].as_array().expect("checks").iter().filter(|check| check["promise"].is_string());
    rows.map(|check| (check["name"].as_str().expect("a name").to_owned(), check.clone())).collect()
}

fn attacked(world: &World, policy: &str) -> (i32, Value) {
    let (code, out, err) = world.run(&["doctor", "--policy", policy, "--json"]);
    (code, serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}\n{}", world.log())))
}

/// All promises, each proven.
#[track_caller]
fn all_hold(doctor: &Value, world: &World) {
    let rows = promises(doctor);
    let names: Vec<&str> = rows.keys().map(String::as_str).collect();
    let expected = [
        "calls",
        "devices",
        "disk",
        "egress",
        "hidden",
        "memory",
        "metadata",
        "network",
        "pid1",
        "processes",
        "result",
        "rights",
        "secrets",
        "sockets",
        "writes",
    ];
    assert_eq!(names, expected, "{doctor:#}\n{}", world.log());
    assert!(rows.values().all(|row| row["verdict"] != "fail"), "{doctor:#}\n{}", world.log());
}

/// A world with the policy `other`: `trusted`, changed.
fn with_policy(change: impl Fn(&str) -> String, more: &str) -> (World, tempfile::TempDir) {
    let policies = tempfile::tempdir().unwrap();
    std::fs::write(policies.path().join("other.toml"), change(TRUSTED)).unwrap();
    let more = format!("policy_dirs = [{:?}]\n{more}", policies.path());
    (World::without_daemon(NO_MODEL, &more), policies)
}

#[test]
fn a_cell_of_the_shipped_policies_keeps_every_promise_under_attack() {
    let world = World::new(NO_MODEL);
    for policy in ["default", "trusted"] {
        let (code, doctor) = attacked(&world, policy);
        all_hold(&doctor, &world);
        assert_eq!((code, &doctor["status"]), (0, &json!("ok")), "{doctor:#}");
        assert_eq!(
            (&doctor["attack"]["policy"], &doctor["attack"]["runtime"]),
            (&json!(policy), &json!("runc"))
        );
        let job = world.show(doctor["attack"]["jobs"][0].as_str().unwrap());
        assert_eq!((&job["outcome"], &job["cost_usd"]), (&json!("succeeded"), &json!(0.0)), "{job:#}");
    }
    // For people.
    let (code, out, err) = world.run(&["doctor", "--attack"]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("ok    network    a cell has no network"), "{out}");
    world.end();
}

/// `untrusted` is under gVisor where it is there; what requires it says nothing of promises where it is not.
#[test]
fn a_cell_under_gvisor_keeps_every_promise_or_there_is_none() {
    let gvisor = |text: &str| format!("runtime = \"runsc\"\nruntime_fallback = []\n{text}");
    let (mut world, _policies) = with_policy(gvisor, "");
    world.start();
    let there = docker(&["info", "--format", "{{json .Runtimes}}"]).contains("\"runsc\"");
    let (code, doctor) = attacked(&world, "untrusted");
    all_hold(&doctor, &world);
    let runtime = if there { "runsc" } else { "runc" };
    assert_eq!((code, &doctor["attack"]["runtime"]), (0, &json!(runtime)), "{doctor:#}");
    if !there {
        let (code, doctor) = attacked(&world, "other");
        assert_eq!((code, &doctor["status"]), (4, &json!("degraded")), "{doctor:#}");
        assert!(promises(&doctor).is_empty(), "{doctor:#}");
        let row =
            doctor["checks"].as_array().unwrap().iter().find(|check| check["name"] == "attack").unwrap();
        assert!(row["verdict"] == "fail" && row["words"].as_str().unwrap().contains("make gvisor"), "{row}");
    }
    world.end();
}

#[test]
fn what_a_policy_opens_is_said_and_nothing_else_is_let_through() {
    let open = |text: &str| format!("{text}\n[[egress.host]]\nname = \"open.example\"\n");
    let (mut world, _policies) = with_policy(open, "");
    world.start();
    let (code, doctor) = attacked(&world, "other");
    all_hold(&doctor, &world);
    let row = &promises(&doctor)["egress"];
    assert_eq!((code, &row["verdict"]), (0, &json!("note")), "{row}");
    let words = row["words"].as_str().unwrap();
    assert!(words.contains("doctor.invalid: status 403") && words.contains("open.example"), "{words}");
    world.end();
}

#[test]
fn who_may_not_use_a_policy_may_not_try_its_walls() {
    let access = "admin_uids = [0]\n[[access]]\nusers = [4242]\npolicies = [\"default\"]\nproviders = [\"*\"]\nimages = [\"*\"]\n";
    let world = World::with(NO_MODEL, access);
    let ask = |policy: &str, uid: u32| {
        let body = json!({ "policy": policy }).to_string();
        world.curl("POST", "/v1/doctor", &body, &["--max-time", "200"], Some(uid)).expect("an answer")
    };
    let (above, stranger) = (ask("trusted", 4242), ask("default", 4243));
    assert_eq!((above.status, &above.json()["error"]["code"]), (403, &json!("above_access")));
    assert_eq!((stranger.status, &stranger.json()["error"]["code"]), (403, &json!("not_listed")));
    assert_eq!(ask("nobody", 0).status, 400);
    let unknown = world.curl("POST", "/v1/doctor", "{\"polcy\":\"x\"}", &[], Some(0)).unwrap();
    assert_eq!((unknown.status, &unknown.json()["error"]["code"]), (400, &json!("invalid_request")));
    let own = ask("default", 4242);
    assert_eq!(own.status, 200, "{}", own.body);
    all_hold(&own.json(), &world);
    assert_eq!(world.show(own.json()["attack"]["jobs"][0].as_str().unwrap())["uid"], 4242);
    world.end();
}

/// An image with a key in it: the one wall that an operator can break without touching hotcell.
struct Leaky(String);

impl Leaky {
    fn make() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("leaked");
        std::fs::write(&key, format!("key = {}{}\n", "sk-", "leak3d-".repeat(6))).unwrap();
        let name = format!("hotcell/cell-leaky-{}", std::process::id());
        let container = docker(&["create", "--network", "none", "hotcell/cell"]);
        docker(&["cp", key.to_str().unwrap(), &format!("{}:/etc/leaked", container.trim())]);
        docker(&["commit", container.trim(), &name]);
        docker(&["rm", container.trim()]);
        Self(name)
    }
}

impl Drop for Leaky {
    fn drop(&mut self) {
        docker(&["rmi", &self.0]);
    }
}

#[test]
fn a_broken_promise_is_found_named_and_keeps_a_daemon_from_starting() {
    let image = Leaky::make();
    let leaky = |text: &str| {
        let images = format!("[images]\nallow = [\"*\"]\ndefault = {:?}", image.0);
        let (before, rest) = text.split_once("[images]").expect("a section");
        let after = rest.find("\n[").map_or("", |at| &rest[at..]);
        format!("{before}{images}\n{after}")
    };
    let (mut world, _policies) = with_policy(leaky, "");
    world.start();
    let (code, doctor) = attacked(&world, "other");
    assert_eq!((code, &doctor["status"]), (1, &json!("broken")), "{doctor:#}\n{}", world.log());
    let broken: Vec<String> =
        promises(&doctor).into_iter().filter(|(_, row)| row["verdict"] == "fail").map(|(n, _)| n).collect();
    assert_eq!(broken, ["secrets"], "{doctor:#}");
    let row = promises(&doctor).remove("secrets").unwrap();
    assert!(row["words"].as_str().unwrap().contains("secrets.files: /etc/leaked"), "{row}");
    assert!(!doctor.to_string().contains("leak3d"), "where it is is said, not what it is");
    world.terminate();

    let (code, _, err) = world.run(&["serve", "--require-doctor=other"]);
    assert!(
        code == 1 && err.contains("a cell under the policy other does not keep its promises: secrets"),
        "{code}: {err}"
    );
    let (code, _, err) =
        world.run(&["serve", "--require-doctor", "--defaults-image", "hotcell/cell-of-nobody"]);
    assert!(
        code != 0 && err.contains("--require-doctor") && err.contains("hotcell/cell-of-nobody"),
        "{code}: {err}"
    );
    assert!(!world.state_dir().join("doctor").exists(), "what the doctor needed is left");
    world.start();
    world.end();
}

#[test]
fn a_daemon_that_requires_the_doctor_starts_where_all_promises_hold() {
    let mut world = World::without_daemon(NO_MODEL, "");
    world.daemon_args = vec!["--require-doctor".to_owned()];
    // What a killed one left there.
    std::fs::create_dir_all(world.state_dir().join("doctor/agents/old")).unwrap();
    std::fs::write(world.state_dir().join("doctor/s"), "").unwrap();
    world.start();
    assert!(world.log().contains("the doctor finds no fault"), "{}", world.log());
    assert!(!world.state_dir().join("doctor").exists());
    assert_eq!(world.sql("SELECT count(*) FROM jobs"), "0", "the attack is none of this daemon's jobs");
    world.end();
}

#[test]
fn what_a_daemon_leaves_that_is_killed_while_the_doctor_is_at_work_is_removed_by_the_next() {
    let mut world = World::without_daemon(NO_MODEL, "");
    world.daemon_args = vec!["--require-doctor".to_owned()];
    world.launch();
    let mut left = String::new();
    world.wait_for("the doctor's cell, or the daemon", |world| {
        left = of_the_doctor(world)
            .filter(|(_, all)| !all.is_empty())
            .map(|(instance, _)| instance)
            .unwrap_or_default();
        !left.is_empty() || world.try_call("GET", "/healthz", "").is_some_and(|a| a.status == 200)
    });
    assert_ne!(left, "", "the doctor was never seen at work");
    world.kill();
    world.start();
    let filter = format!("label=hotcell.instance={left}");
    assert_eq!(docker(&["ps", "-aq", "--filter", &filter]).trim(), "", "its cell is left");
    assert!(!world.state_dir().join("doctor").exists());
    world.end();
}
