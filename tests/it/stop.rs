//! Ending, holding and reloading the daemon: a detach loses nothing and stops nothing, a pause outlives a kill, the
//! queue tells its order, and what is read again is what counts.

use std::io::Read;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::fake_agent::{self, done, spec, states, until_event, until_state, world};
use crate::world::{World, docker};

fn numbers(events: &[Value]) -> Vec<u64> {
    events.iter().filter_map(|e| e["frame"]["n"].as_u64()).collect()
}

/// The daemon has ended by itself, and its cells run.
fn detached(world: &mut World, cells: usize) {
    world.ended();
    assert!(!world.socket().exists(), "the socket is left");
    let filter = format!("label=hotcell.instance={}", world.instance());
    assert_eq!(docker(&["ps", "-q", "--filter", &filter]).lines().count(), cells, "{}", world.log());
    assert_eq!(world.sql("SELECT count(*) FROM cells WHERE gone_ms IS NULL"), cells.to_string());
}

#[test]
fn the_jobs_of_a_detached_daemon_go_on_and_end_once_with_the_next_one() {
    let mut world = world("limits.slots = 3\nlimits.cancel_grace_s = 60\n");
    // One presses on the buffers, one needs answers, one ends while nobody looks.
    let printing = world.submit(&spec("print 2000 200 2000; print 30000 300"));
    let asking = world.submit(&spec("ask 2000 10000"));
    let ending = world.submit(&spec("print 4 4; sleep 1; print 2 2"));
    let waiting = world.submit(&spec("print 3 3"));
    until_event(&mut world, &printing, "\"n\":0");
    until_event(&mut world, &asking, "ask-0");
    until_event(&mut world, &ending, "\"n\":3");
    for round in 0..2 {
        let begun = Instant::now();
        world.send(Signal::QUIT);
        if round == 0 {
            detached(&mut world, 3);
            // Long enough for one of them to have nothing left to do.
            std::thread::sleep(Duration::from_millis(1500));
        } else {
            world.ended();
        }
        assert!(begun.elapsed() < Duration::from_secs(9), "at once: {:?}", begun.elapsed());
        for job in [&printing, &asking] {
            let state = world.sql(&format!("SELECT state FROM jobs WHERE id = '{job}'"));
            assert!(round == 1 || state == "running", "{job} is {state}");
        }
        world.start();
    }
    let (got, job) = done(&mut world, &printing);
    assert_eq!(job["outcome"], "succeeded", "{job}");
    let expected: Vec<u64> = (0..2000).chain(0..30_000).collect();
    assert!(numbers(&got) == expected, "{} of {} lines", numbers(&got).len(), expected.len());
    assert_eq!(states(&got), ["queued", "preparing", "running", "collecting", "done"]);
    let (got, job) = done(&mut world, &asking);
    assert_eq!(job["outcome"], "succeeded", "{job}");
    let answers: Vec<&str> = got.iter().filter_map(|e| e["frame"]["got"].as_str()).collect();
    assert_eq!(answers, (0..2000).map(|n| format!("ask-{n}")).collect::<Vec<_>>(), "each answer once");
    for (job, lines) in [(&ending, vec![0, 1, 2, 3, 0, 1]), (&waiting, vec![0, 1, 2])] {
        let (got, job) = done(&mut world, job);
        assert_eq!((&job["outcome"], numbers(&got)), (&json!("succeeded"), lines), "{job}");
        assert_eq!(states(&got), ["queued", "preparing", "running", "collecting", "done"]);
    }
    assert!(!world.log().contains("a lease was dropped"), "{}", world.log());
    world.end();
}

#[test]
fn an_answer_of_the_model_under_way_at_a_detach_is_read_to_its_end_and_paid_once() {
    let script = "usage = { input = 1000, output = 500 }\n[default]\ntext = \"done\"\nlatency_ms = 3000\n";
    let mut world = World::without_daemon(script, "");
    fake_agent::install(&world.state_dir());
    world.start();
    let job = world.submit(&spec("model hello; sleep 4; print 2 2"));
    until_event(&mut world, &job, "\"type\":\"request\"");
    assert_eq!(world.sql("SELECT count(*) FROM ledger WHERE status = 'open'"), "1");
    world.send(Signal::QUIT);
    detached(&mut world, 1);
    assert_eq!(world.sql("SELECT count(*) FROM ledger WHERE status = 'open'"), "0", "settled before the end");
    world.start();
    let (got, job) = done(&mut world, &job);
    assert_eq!((&job["outcome"], numbers(&got)), (&json!("succeeded"), vec![0, 1]), "{job}");
    let paid = world.recorder.requests().iter().filter(|r| !r.target.contains("count_tokens")).count();
    assert_eq!(paid, 1, "it was not asked again");
    // claude-sonnet-4-6: 3 and 15 USD for a million tokens in and out; its request allows 50.
    assert_eq!(job["totals"]["charged_micro_usd"], 1000 * 3 + 50 * 15);
    world.end();
}

#[test]
fn detach_out_of_a_drain_stops_nothing_and_names_the_commands_that_end() {
    let mut world = world("limits.slots = 3\nlimits.drain_s = 600\n");
    let running = world.submit(&spec("print 1 1; sleep 6; print 2 2"));
    let mut shell = world.hotcell();
    shell.args(["exec", "--", "sh", "-c", "echo here; sleep 600"]);
    let mut shell = shell.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut here = [0; 5];
    shell.stdout.as_mut().unwrap().read_exact(&mut here).unwrap();
    until_event(&mut world, &running, "\"n\":0");
    let command = world.sql(&format!("SELECT id FROM jobs WHERE id <> '{running}'"));

    let (code, out, err) = world.run(&["drain", "--json"]);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let ending: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&ending["how"], &ending["running"]), (&json!("drain"), &json!(2)), "{ending}");
    assert_eq!(ending["pid"], world.pid());
    let refused = world.call("POST", "/v1/jobs", &spec("print 1 1").to_string());
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (503, &json!("draining")));
    // Others may not.
    for path in ["drain", "detach", "pause", "resume"] {
        let answer = world.curl("POST", &format!("/v1/daemon/{path}"), "", &[], Some(54_321)).unwrap();
        assert_eq!(answer.status, 403, "{path}: {}", answer.body);
    }

    let (code, out, err) = world.run(&["detach"]);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert!(out.starts_with("detaching: 2 running, 0 waiting\n"), "{out}");
    assert!(out.contains(&format!("{command}  ends")) && !out.contains(&running), "{out}");
    detached(&mut world, 2);
    assert!(world.log().contains(&command));

    world.start();
    let (got, job) = done(&mut world, &running);
    assert_eq!((&job["outcome"], numbers(&got)), (&json!("succeeded"), vec![0, 0, 1]), "{job}");
    let (_, job) = done(&mut world, &command);
    assert_eq!((&job["outcome"], &job["reason"]), (&json!("failed"), &json!("cell_lost")), "{job}");
    let shell = shell.wait_with_output().unwrap();
    assert_ne!(shell.status.code(), Some(0), "its client is told");
    let (code, _, err) = world.run(&["drain", "--wait"]);
    assert_eq!((code, err.as_str()), (0, ""));
    world.ended();
    world.start();
    world.end();
}

#[test]
fn a_pause_outlives_a_kill_and_the_queue_tells_the_order_of_starts() {
    let mut world = world("limits.slots = 1\nadmin_uids = [0]\n");
    let running = world.submit(&spec("sleep 3"));
    until_state(&mut world, &running, "running");
    let (code, out, err) = world.run(&["pause", "--json"]);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let paused: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(paused["paused"]["uid"], 0, "{paused}");
    assert_eq!(done(&mut world, &running).1["outcome"], "succeeded", "a pause stops nothing");
    let submit = |world: &World, uid: Option<u32>, priority: i64| -> String {
        let mut spec = spec("print 1 1");
        spec["priority"] = priority.into();
        let answer = world.curl("POST", "/v1/jobs", &spec.to_string(), &[], uid).unwrap();
        assert_eq!(answer.status, 201, "{}", answer.body);
        let view = answer.json();
        assert!(view["warnings"].to_string().contains("paused"), "{view}");
        view["id"].as_str().unwrap().to_owned()
    };
    let other = Some(54_321);
    let jobs: Vec<String> = [(None, 0), (None, 5), (other, 0), (None, 5), (other, 9), (None, -3)]
        .map(|(uid, priority)| submit(&world, uid, priority))
        .into();
    world.kill();
    world.start();
    let queue =
        |world: &World, uid: Option<u32>| world.curl("GET", "/v1/queue", "", &[], uid).unwrap().json();
    let all = queue(&world, None);
    assert_eq!(all["slots"], json!({ "used": 0, "total": 1 }), "{all}");
    assert_eq!((&all["waiting"], &all["paused"]), (&json!(6), &paused["paused"]), "{all}");
    let told: Vec<&str> = all["jobs"].as_array().unwrap().iter().map(|j| j["id"].as_str().unwrap()).collect();
    assert!(all["jobs"].as_array().unwrap().iter().all(|j| j["why"] == "paused"), "{all}");
    let mine = queue(&world, other);
    let places: Vec<u64> =
        mine["jobs"].as_array().unwrap().iter().map(|j| j["position"].as_u64().unwrap()).collect();
    assert_eq!((&mine["waiting"], places), (&json!(6), vec![2, 4]), "{mine}");
    assert!(world.call("GET", "/metrics", "").body.contains("hotcell_paused 1"));
    let health = world.call("GET", "/healthz", "").json();
    assert!(health["status"] == "ok" && health["notes"].to_string().contains("paused by uid 0"), "{health}");
    assert_eq!(world.sql("SELECT count(*) FROM cells"), "1", "nothing started");

    assert_eq!(world.run(&["resume"]), (0, "jobs start\n".to_owned(), String::new()));
    for job in &jobs {
        assert_eq!(done(&mut world, job).1["outcome"], "succeeded");
    }
    let mut started = jobs.clone();
    let at = |job: &String| {
        let at = world.sql(&format!("SELECT started_ms FROM jobs WHERE id = '{job}'"));
        at.parse::<u64>().unwrap()
    };
    started.sort_by_key(at);
    assert_eq!(told, started);
    assert!(world.call("GET", "/metrics", "").body.contains("hotcell_paused 0"));
    world.end();
}

#[test]
fn a_hang_up_reads_prices_and_keys_again_and_a_broken_file_changes_nothing() {
    let script = "usage = { input = 1000, output = 500 }\n[default]\ntext = \"done\"\n";
    let mut world = World::without_daemon(script, "");
    fake_agent::install(&world.state_dir());
    let prices = world.path("prices.toml");
    let list = |output: &str| {
        format!(
            "[[model]]\nnames = [\"claude-sonnet-4-6\"]\ninput = 3.0\noutput = {output}\ncache_write_5m = 3.75\n\
             cache_write_1h = 6.0\ncache_read = 0.3\noutput_tokens_max = 64000\n"
        )
    };
    std::fs::write(&prices, list("15.0")).unwrap();
    world.daemon_env.push(("HOTCELL_PRICES_FILE".into(), prices.display().to_string()));
    world.start();
    let mut hang_ups = 0;
    let mut hang_up = |world: &mut World| {
        hang_ups += 1;
        world.send(Signal::HUP);
        world.wait_for("it has read again", |world| world.log().matches("SIGHUP: done").count() == hang_ups);
    };
    let charged = |world: &World| {
        let (_, job) = world.job(&spec("model hello"));
        assert_eq!(job["outcome"], "succeeded", "{job}");
        job["totals"]["charged_micro_usd"].as_u64().unwrap()
    };
    let problems = |world: &World| world.call("GET", "/healthz", "").json()["problems"].to_string();
    assert_eq!(charged(&world), 3000 + 50 * 15);
    std::fs::write(&prices, list("30.0")).unwrap();
    assert_eq!(charged(&world), 3000 + 50 * 15, "not before the signal");
    hang_up(&mut world);
    assert_eq!(charged(&world), 3000 + 50 * 30);

    std::fs::write(&prices, "[[model]]\nnmes = []\n").unwrap();
    std::fs::write(world.path("key"), "two\nlines").unwrap();
    hang_up(&mut world);
    let told = problems(&world);
    assert!(told.contains("prices not read") && told.contains("nmes"), "{told}");
    assert!(told.contains("credential not read") && !told.contains("lines,"), "{told}");
    assert_eq!(charged(&world), 3000 + 50 * 30, "the last good ones stay");
    let (_, doctor, _) = world.run(&["doctor"]);
    assert!(doctor.contains("prices not read"), "{doctor}");

    std::fs::write(&prices, list("45.0")).unwrap();
    std::fs::write(world.path("key"), "sk-another").unwrap();
    hang_up(&mut world);
    assert_eq!(problems(&world), "[]");
    assert_eq!(charged(&world), 3000 + 50 * 45);
    world.end();
}
