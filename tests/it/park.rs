//! Parking: a job that would fail for the provider's limit waits without a cell and goes on where it was, through
//! restarts of the daemon at every point; what it waits with is gone when it ends.

use serde_json::{Value, json};

use crate::fake_agent::{self, containers, done, spec, states, until_event, until_state};
use crate::world::{World, tool_results};

/// `x-should-retry: false`: a limit that the gateway does not hold a request for, so that the job fails of it.
const SCRIPT: &str = r#"
usage = { input = 10, output = 20 }

[[reply]]
when = { prompt = "limited-twice" }
times = 2
fault = { status = 429, type = "rate_limit_error", message = "slow down", headers = { retry-after = "2", x-should-retry = "false" } }

[[reply]]
when = { prompt = "overloaded-once" }
times = 1
fault = { status = 529, type = "overloaded_error", message = "too many", headers = { retry-after = "1", x-should-retry = "false" } }

[[reply]]
when = { prompt = "limited-long" }
times = 1
fault = { status = 429, type = "rate_limit_error", message = "slow down", headers = { retry-after = "600" } }

[[reply]]
when = { prompt = "limited-alone" }
times = 1
fault = { status = 429, type = "rate_limit_error", message = "not for this account", headers = { retry-after = "600", x-should-retry = "false" } }

[default]
text = "done"
"#;

const TWICE: [&str; 15] = [
    "queued",
    "preparing",
    "running",
    "parking",
    "parked",
    "queued",
    "preparing",
    "running",
    "parking",
    "parked",
    "queued",
    "preparing",
    "running",
    "collecting",
    "done",
];
const ONCE: [&str; 10] = [
    "queued",
    "preparing",
    "running",
    "parking",
    "parked",
    "queued",
    "preparing",
    "running",
    "collecting",
    "done",
];

/// A world with the made-up agent.
fn world(more: &str) -> World {
    let mut world = World::without_daemon(SCRIPT, more);
    fake_agent::install(&world.state_dir());
    world.start();
    world
}

fn restart(world: &mut World) {
    world.kill();
    world.start();
}

/// What the agent found in its HOME.
fn kept(events: &[Value]) -> Vec<&str> {
    events.iter().filter_map(|e| e["frame"]["kept"].as_str()).collect()
}

/// What the agent was told when its conversation was taken up again.
fn resumed(events: &[Value]) -> Vec<&str> {
    events.iter().filter_map(|e| e["frame"]["with"].as_str()).collect()
}

fn image(world: &World, job: &str) -> bool {
    world.state_dir().join("kept").join(format!("{job}.img")).exists()
}

/// Changes the row of a job while no daemon is there, as if one had died in that state.
fn put_state(world: &World, job: &str, state: &Value) {
    let db = rusqlite::Connection::open(world.state_dir().join(hotcell::store::FILE_NAME)).unwrap();
    let name = state["state"].as_str().unwrap();
    let sql = "UPDATE jobs SET state = ?2, state_json = ?3 WHERE id = ?1";
    assert_eq!(db.execute(sql, (job, name, state.to_string())).unwrap(), 1);
}

/// A job that is parked for ten minutes.
fn parked_for_long(world: &mut World, task: &str) -> String {
    let job = world.submit(&spec(task));
    until_state(world, &job, "parked");
    job
}

#[test]
fn a_job_that_the_provider_limits_waits_and_goes_on_where_it_was() {
    let mut world = world("");
    // Less than it waits: the wall limit is for its cells.
    let mut limited = spec("keep first; model limited-twice; keep second; kept");
    limited["limits"]["wall_s"] = json!(4);
    let job = world.submit(&limited);
    let (events, view) = done(&mut world, &job);
    assert_eq!(view["outcome"], "succeeded", "{view}");
    assert_eq!(states(&events), TWICE);
    assert_eq!(kept(&events), ["first second"], "what it wrote to HOME in its first cell, written once");
    assert_eq!((view["attempt"].as_u64(), resumed(&events).len()), (Some(3), 2));
    assert!(resumed(&events)[0].contains("was paused from 20"), "{:?}", resumed(&events));
    let uids = world.sql(&format!("SELECT count(DISTINCT cell_uid) FROM cells WHERE job = '{job}'"));
    assert_eq!(uids, "1", "its files belong to it in each cell");
    let parked = events.iter().find(|e| e["state"] == "parked").unwrap();
    assert_eq!(parked["parked"]["why"], "provider_limit");
    let pause = parked["parked"]["until_ms"].as_u64().unwrap() - parked["at_ms"].as_u64().unwrap();
    assert!(pause <= 2000, "what the provider asks for: {pause}");
    // Overload is the same.
    let job = world.submit(&spec("model overloaded-once; kept"));
    let (events, view) = done(&mut world, &job);
    assert_eq!((states(&events), &view["outcome"]), (ONCE.to_vec(), &json!("succeeded")));
    world.end();
}

#[test]
fn a_parked_job_holds_nothing_and_others_of_its_credential_wait_with_it() {
    let mut world = world("limits.slots = 1\n");
    let job = parked_for_long(&mut world, "keep a; model limited-long");
    assert_eq!(containers(&world), Vec::<String>::new());
    assert_eq!(world.sql("SELECT count(*) FROM cells WHERE gone_ms IS NULL"), "0");
    assert_eq!(world.sql("SELECT count(*) FROM ledger WHERE status = 'open'"), "0");
    assert!(image(&world, &job), "its work is put away");
    let other = world.submit(&spec("print 1 1"));
    until_state(&mut world, &other, "parked");
    assert_eq!(world.sql(&format!("SELECT count(*) FROM cells WHERE job = '{other}'")), "0");
    let (a, b) = (world.show(&job), world.show(&other));
    assert_eq!(a["parked"], b["parked"], "they wait together");
    let list = world.call("GET", "/v1/jobs?state=parked", "").json();
    assert_eq!(list["jobs"].as_array().unwrap().len(), 2, "{list}");
    let metrics = world.call("GET", "/metrics", "").body;
    for line in [
        "hotcell_jobs{state=\"parked\"} 2",
        "hotcell_parked_total{why=\"provider_limit\"} 2",
        "hotcell_slots_used 0",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    let (code, out, _) = world.run(&["show", &job]);
    assert_eq!(code, 0);
    assert!(out.contains("parked until 20") && out.contains("the provider limits"), "{out}");
    let not_parked = world.call("POST", &format!("/v1/jobs/{job}/cancel"), "");
    assert_eq!(not_parked.status, 200, "it has no cell: it is over at once");
    let answer = world.call("POST", &format!("/v1/jobs/{job}/unpark"), "");
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (409, &json!("not_parked")));
    assert!(!image(&world, &job), "what was kept goes with the job");
    let (events, view) = done(&mut world, &job);
    assert_eq!((&view["outcome"], &view["reason"]), (&json!("stopped"), &json!("cancelled")));
    assert_eq!(states(&events), ["queued", "preparing", "running", "parking", "parked", "done"]);
    assert_eq!(view["totals"]["requests"], 1, "{view}");
    // Nobody has to wait for the moment.
    let (code, out, err) = world.run(&["unpark", &other]);
    assert_eq!(code, 0, "{out}{err}");
    let (events, view) = done(&mut world, &other);
    assert_eq!(view["outcome"], "succeeded", "{view}");
    assert_eq!(states(&events), ["queued", "parked", "queued", "preparing", "running", "collecting", "done"]);
    world.end();
}

#[test]
fn a_job_that_is_limited_for_what_it_asks_waits_alone() {
    let mut world = world("");
    let job = parked_for_long(&mut world, "model limited-alone");
    let other = world.submit(&spec("model anything"));
    let (events, view) = done(&mut world, &other);
    assert_eq!(view["outcome"], "succeeded", "{view}");
    assert!(!states(&events).contains(&"parked"), "{events:?}");
    assert_eq!(world.show(&job)["state"], "parked");
    assert_eq!(world.call("POST", &format!("/v1/jobs/{job}/cancel"), "").status, 200);
    done(&mut world, &job);
    world.end();
}

#[test]
fn a_parked_job_outlives_its_daemon() {
    let mut world = world("");
    let slow = json!({ "prompt": "keep a; model limited-long; keep b; kept", "policy": "trusted",
        "env": { "FAKE_BOOT": "1500" }, "limits": { "disk_mib": 64 } });
    let job = world.submit(&slow);
    until_state(&mut world, &job, "parked");
    let before = world.show(&job)["parked"].clone();
    restart(&mut world);
    assert_eq!((&world.show(&job)["state"], &world.show(&job)["parked"]), (&json!("parked"), &before));
    // The others of its credential still wait with it.
    let other = world.submit(&spec("print 1 1"));
    until_state(&mut world, &other, "parked");
    // The row is there a moment before its slot is free; without one it is over at once.
    world.wait_for("its slot is free", |world| {
        world.call("GET", "/metrics", "").body.contains("hotcell_slots_used 0")
    });
    assert_eq!(world.call("POST", &format!("/v1/jobs/{other}/cancel"), "").status, 200);
    assert_eq!(world.call("POST", &format!("/v1/jobs/{job}/unpark"), "").status, 200);
    // Killed while the next cell boots: what was kept is there for the one after it.
    world.wait_for("a second cell runs", |world| {
        let made = "container IS NOT NULL AND gone_ms IS NULL";
        world.sql(&format!("SELECT count(*) FROM cells WHERE job = '{job}' AND {made}")) == "1"
    });
    until_state(&mut world, &job, "preparing");
    // Kept work of a job that is over is nobody's.
    std::fs::write(world.state_dir().join("kept").join(format!("{other}.img")), "").unwrap();
    restart(&mut world);
    let (events, view) = done(&mut world, &job);
    assert_eq!(view["outcome"], "succeeded", "{view}");
    assert_eq!(kept(&events), ["a b"]);
    assert_eq!(view["attempt"], 3);
    assert_eq!(world.sql(&format!("SELECT count(*) FROM cells WHERE job = '{job}'")), "3");
    world.end();
}

#[test]
fn a_daemon_that_dies_while_it_parks_a_job_leaves_it_its_work() {
    let mut world = world("");
    let in_a_second = || {
        let until_ms = hotcell::clock::wall_ms() + 1000;
        json!({ "state": "parking", "parked": { "until_ms": until_ms, "why": "day_budget" } })
    };
    // With its cell alive.
    let job = world.submit(&spec("keep a; print 1 1; sleep 2; kept"));
    until_event(&mut world, &job, "\"n\":0");
    world.kill();
    put_state(&world, &job, &in_a_second());
    world.start();
    let (events, view) = done(&mut world, &job);
    assert_eq!((&view["outcome"], kept(&events)), (&json!("succeeded"), vec!["a"]), "{view}");
    assert_eq!(states(&events), ONCE);
    assert_eq!(resumed(&events).len(), 1);
    // With the cell gone, and the work put away.
    let job = parked_for_long(&mut world, "keep a; model limited-long; kept");
    world.kill();
    put_state(&world, &job, &in_a_second());
    world.start();
    until_event(&mut world, &job, "day_budget");
    let (events, view) = done(&mut world, &job);
    assert_eq!((&view["outcome"], kept(&events)), (&json!("succeeded"), vec!["a"]), "{view}");
    // With the task over: it is not parked for nothing.
    let job = world.submit(&spec("print 1 1"));
    until_event(&mut world, &job, "\"type\":\"exit\"");
    world.kill();
    if world.sql(&format!("SELECT state FROM jobs WHERE id = '{job}'")) != "done" {
        put_state(&world, &job, &in_a_second());
    }
    world.start();
    let (events, view) = done(&mut world, &job);
    assert_eq!(view["outcome"], "succeeded", "{view}");
    assert!(!states(&events).contains(&"parked"));
    world.end();
}

#[test]
fn a_job_whose_work_is_lost_is_given_its_task_again_and_says_so() {
    let mut world = world("");
    let job = parked_for_long(&mut world, "keep a; model limited-long; kept");
    std::fs::remove_file(world.state_dir().join("kept").join(format!("{job}.img"))).unwrap();
    assert_eq!(world.call("POST", &format!("/v1/jobs/{job}/unpark"), "").status, 200);
    let (events, view) = done(&mut world, &job);
    assert_eq!((&view["outcome"], kept(&events)), (&json!("succeeded"), vec!["a"]), "{view}");
    assert!(resumed(&events).is_empty());
    let says = |e: &Value| e["type"] == "note" && e["text"].as_str().unwrap().contains("given again");
    assert!(events.iter().any(says), "{events:#?}");
    world.end();
}

#[test]
fn an_exhausted_budget_of_the_day_parks_work_until_its_reset() {
    let script = "[default]\ntext = \"done\"\nusage = { input = 10, output = 50 }\n";
    let mut world =
        World::without_daemon(script, "budgets.day_usd = \"0.008\"\nbudgets.time_zone = \"UTC\"\n");
    fake_agent::install(&world.state_dir());
    world.start();
    let job = world.submit(&spec(&format!("keep a; {}keep b; kept", "model more; ".repeat(12))));
    until_state(&mut world, &job, "parked");
    let view = world.show(&job);
    let day_ms = 24 * 3_600_000;
    let until_ms = view["parked"]["until_ms"].as_u64().unwrap();
    assert_eq!((&view["parked"]["why"], until_ms % day_ms), (&json!("day_budget"), 0), "midnight in UTC");
    assert!(until_ms - hotcell::clock::wall_ms() <= day_ms);
    assert_eq!(containers(&world), Vec::<String>::new());
    // Nobody else begins either, and asking again changes nothing.
    let charged: u64 = world.sql("SELECT sum(charged_micro) FROM ledger").parse().unwrap();
    assert!((780..=8000).contains(&charged), "{charged}");
    let spent = format!("{:.6}", charged as f64 / 1e6);
    world.kill();
    let file = world.path("config.toml");
    let config = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, config.replace("0.008", &spent)).unwrap();
    world.start();
    let other = world.submit(&spec("model three"));
    until_state(&mut world, &other, "parked");
    assert_eq!(world.show(&other)["parked"], view["parked"]);
    assert_eq!(world.call("POST", &format!("/v1/jobs/{job}/unpark"), "").status, 200);
    until_state(&mut world, &job, "parked");
    assert_eq!(world.sql("SELECT count(*) FROM cells"), "1", "no cell is made for a job that cannot ask");
    // With room it goes on where it was.
    world.kill();
    std::fs::write(&file, config.replace("0.008", "1")).unwrap();
    world.start();
    for job in [&job, &other] {
        assert_eq!(world.call("POST", &format!("/v1/jobs/{job}/unpark"), "").status, 200);
    }
    let (events, view) = done(&mut world, &job);
    assert_eq!((&view["outcome"], kept(&events)), (&json!("succeeded"), vec!["a b"]), "{view}");
    assert_eq!(view["totals"]["charged_micro_usd"], 12 * 780, "{view}");
    let (_, view) = done(&mut world, &other);
    assert_eq!(view["outcome"], "succeeded", "{view}");
    world.end();
}

#[test]
fn a_limit_that_does_not_end_fails_the_job_after_enough_parkings() {
    let script = "[default]\nfault = { status = 529, type = \"overloaded_error\", message = \"no\" }\n";
    let mut busy = World::without_daemon(script, "");
    fake_agent::install(&busy.state_dir());
    busy.start();
    let job = parked_for_long(&mut busy, "model anything");
    let parked = busy.show(&job)["parked"]["until_ms"].as_u64().unwrap();
    let pause = parked.saturating_sub(hotcell::clock::wall_ms());
    assert!((40_000..=60_000).contains(&pause), "a minute where the provider names no time: {pause}");
    busy.kill();
    let db = rusqlite::Connection::open(busy.state_dir().join(hotcell::store::FILE_NAME)).unwrap();
    let sql = "UPDATE jobs SET carry_json = json_set(carry_json, '$.limit_parkings', ?1)";
    assert_eq!(db.execute(sql, [hotcell::job::park::LIMIT_PARKINGS_MAX]).unwrap(), 1);
    drop(db);
    busy.start();
    assert_eq!(busy.call("POST", &format!("/v1/jobs/{job}/unpark"), "").status, 200);
    let (_, view) = done(&mut busy, &job);
    let end = (&view["outcome"], &view["reason"], &view["blame"]);
    assert_eq!(end, (&json!("failed"), &json!("provider_limit"), &json!("provider")), "{view}");
    busy.end();
}

#[test]
fn the_real_cli_goes_on_with_its_conversation_when_its_cell_was_taken_away() {
    let script = r#"
usage = { input = 10, output = 20 }

[[reply]]
when = { last = "The job was paused", tools = true }
times = 1
blocks = [{ tool = "Bash", input = { command = "cat ~/note /workspace/kept", description = "read" } }]

[[reply]]
when = { prompt = "remember", turn = 0, tools = true }
blocks = [{ tool = "Bash", input = { command = "echo of the first cell > ~/note; echo in the copy > /workspace/kept; echo written", description = "write" } }]

[[reply]]
when = { prompt = "remember", turn = 1, tools = true }
times = 1
blocks = [{ tool = "Bash", input = { command = "sleep 600", description = "wait", timeout = 600000 } }]

[default]
text = "done"
"#;
    let mut world = World::new(script);
    let repo = world.workspace("repo", 0);
    let job = world
        .submit(&json!({ "prompt": "remember this", "policy": "trusted", "workspace": { "path": repo } }));
    fake_agent::until_event(&mut world, &job, "sleep 600");
    // Judged, and begun: its transcript is written by then.
    world.wait_for("the command runs", |world| {
        let container =
            world.sql(&format!("SELECT container FROM cells WHERE job = '{job}' AND gone_ms IS NULL"));
        crate::world::docker(&["top", &container]).contains("sleep 600")
    });
    let container = world.sql(&format!("SELECT container FROM cells WHERE job = '{job}'"));
    crate::world::docker(&["kill", &container]);
    let (events, view) = done(&mut world, &job);
    assert_eq!(
        (view["outcome"].as_str(), view["attempt"].as_u64()),
        (Some("succeeded"), Some(2)),
        "{view}\n{}",
        world.log()
    );
    assert_eq!(states(&events), ONCE, "{view}");
    let said =
        |text: &str| events.iter().any(|e| e["type"] == "note" && e["text"].as_str().unwrap().contains(text));
    assert!(said("try 1 of 3 was ended by this machine"), "{events:#?}");
    let seen = tool_results(&events);
    assert!(seen.contains("of the first cell") && seen.contains("in the copy"), "{seen}");
    assert_eq!(seen.matches("written").count(), 1, "nothing was done twice");
    let charged: u64 = events.iter().filter_map(|e| e["charged_micro_usd"].as_u64()).sum();
    assert_eq!(view["totals"]["charged_micro_usd"], charged, "{view}");
    assert!(view["totals"]["changes"].is_object(), "{view}");
    world.end();
}

#[test]
fn the_real_cli_goes_on_with_its_conversation_in_another_cell() {
    let script = r#"
usage = { input = 10, output = 20 }

[[reply]]
when = { last = "The job was paused", tools = true }
times = 1
blocks = [{ tool = "Bash", input = { command = "cat ~/note /workspace/kept; ls /workspace", description = "read" } }]

[[reply]]
when = { prompt = "remember", turn = 0, tools = true }
blocks = [
    { text = "I write it down." },
    { tool = "Bash", input = { command = "echo of the first cell > ~/note; echo in the copy > /workspace/kept; rm /workspace/gone; echo written", description = "write" } },
]

[[reply]]
when = { prompt = "remember", turn = 1, tools = true }
times = 1
fault = { status = 429, type = "rate_limit_error", message = "slow down", headers = { retry-after = "1", x-should-retry = "false" } }

[default]
text = "done"
"#;
    let mut world = World::without_daemon(script, "");
    world.set_agents(&[crate::provider::IMPATIENT]);
    world.start();
    // Works on a copy, which is kept with the conversation.
    let repo = world.workspace("repo", 0);
    for name in ["gone", "stays"] {
        std::fs::write(repo.join(name), "original").unwrap();
    }
    let at = repo.to_str().unwrap();
    let (code, out, err) =
        world.run(&["run", "--agent", crate::provider::IMPATIENT.0, "-w", at, "remember this"]);
    let job = world.sql("SELECT id FROM jobs");
    let (events, view) = done(&mut world, &job);
    assert_eq!(code, 0, "{out}{err}\n{view}");
    assert!(out.contains("parked until 20"), "{out}");
    assert_eq!(states(&events), ONCE, "{view}");
    let seen = tool_results(&events);
    assert!(seen.contains("of the first cell") && seen.contains("in the copy"), "{seen}");
    assert!(seen.contains("stays") && !seen.contains("gone"), "{seen}");
    assert!(repo.join("gone").exists() && !repo.join("kept").exists(), "the original is as it was");
    // The model is asked with all that was said before, and then with the word that the pause is over.
    let asked = world.recorder.requests();
    let again =
        asked.iter().map(|r| r.json()).find(|r| r["messages"].to_string().contains("was paused from"));
    let again = again.expect("a request after the pause");
    for said in ["remember this", "I write it down.", "written", "Go on where you were."] {
        assert!(again["messages"].to_string().contains(said), "{said}: {again:#}");
    }
    assert_eq!(again["messages"].to_string().matches("remember this").count(), 1);
    // Sums of both attempts.
    let totals = &view["totals"];
    assert_eq!(totals["tool_calls"], 2, "{view}");
    let charged: u64 = events.iter().filter_map(|e| e["charged_micro_usd"].as_u64()).sum();
    assert_eq!(totals["charged_micro_usd"], charged, "{view}");
    assert_eq!(totals["cli_micro_usd"], charged, "the CLI's own figure: {view}");
    world.end();
}
