//! kill -9 of the daemon at every point of a job's road: after the restart each job comes to exactly one end, its
//! stream is whole, its money adds up, and nothing is left.

use std::io::Read;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};

use crate::fake_agent::{
    containers, done, journal, limited, processes, spec, states, until_event, until_state, world,
};
use crate::world::{World, docker};

fn assert_succeeded(job: &Value) {
    assert_eq!(job["outcome"], "succeeded", "{job}");
}

/// Kills the daemon and starts it again.
fn restart(world: &mut World) {
    world.kill();
    world.start();
}

fn numbers(events: &[Value]) -> Vec<u64> {
    events.iter().filter_map(|e| e["frame"]["n"].as_u64()).collect()
}

#[test]
fn fifteen_kills_during_300_000_events_lose_and_double_no_line_and_no_answer() {
    let mut world = world("limits.slots = 2\n");
    // Lines without a pause press on the buffers; asks need each answer, exactly once.
    let printing = world.submit(&spec("print 2000 200 2000; empty 5; print 300000 60"));
    let asking = world.submit(&spec("ask 400 10000"));
    until_event(&mut world, &printing, "\"n\":0");
    until_event(&mut world, &asking, "ask-0");
    for kill in 0..15 {
        let seen = [&printing, &asking].map(|job| journal(&world, job).len());
        world.wait_for(&format!("something new after kill {kill}"), |world| {
            let over =
                |job: &String| world.sql(&format!("SELECT state FROM jobs WHERE id = '{job}'")) == "done";
            [&printing, &asking]
                .iter()
                .zip(seen)
                .all(|(job, seen)| over(job) || journal(world, job).len() > seen)
        });
        restart(&mut world);
    }
    let (events, job) = done(&mut world, &printing);
    assert_succeeded(&job);
    let expected: Vec<u64> = (0..2000).chain(0..300_000).collect();
    assert!(numbers(&events) == expected, "{} of {} lines", numbers(&events).len(), expected.len());
    let empty = events.iter().filter(|e| e["type"] == "output" && e["text"] == "").count();
    assert_eq!(empty, 5);
    assert!(
        events
            .iter()
            .any(|e| e["type"] == "note" && e["text"].as_str().unwrap().contains("took the cell over"))
    );
    assert_eq!(states(&events), ["queued", "preparing", "running", "collecting", "done"]);

    let (events, job) = done(&mut world, &asking);
    assert_succeeded(&job);
    let got: Vec<&str> = events.iter().filter_map(|e| e["frame"]["got"].as_str()).collect();
    let expected: Vec<String> = (0..400).map(|n| format!("ask-{n}")).collect();
    assert_eq!(got, expected, "each answer once and in order");
    assert_eq!(events.iter().filter(|e| e["type"] == "tool").count(), 400);
    assert_eq!(job["totals"]["tool_calls"], 400);
    world.end();
}

#[test]
fn a_job_that_had_not_its_task_yet_is_done_once_after_the_restart() {
    let mut world = world("limits.slots = 1\n");
    let slow = json!({ "prompt": "print 5 5", "policy": "trusted", "env": { "FAKE_BOOT": "1500" }, "limits": { "disk_mib": 64 } });
    let preparing = world.submit(&slow);
    let queued = world.submit(&spec("print 3 3"));
    until_state(&mut world, &preparing, "preparing");
    restart(&mut world);
    // Again, with the cell's PID 1 at work and its CLI not ready.
    world.wait_for("a second cell runs", |world| {
        let made = "container IS NOT NULL AND gone_ms IS NULL";
        world.sql(&format!("SELECT count(*) FROM cells WHERE job = '{preparing}' AND {made}")) == "1"
    });
    restart(&mut world);
    for (job, lines) in [(&preparing, 5), (&queued, 3)] {
        let (events, job) = done(&mut world, job);
        assert_succeeded(&job);
        assert_eq!(numbers(&events).len(), lines, "the task was done once");
        assert_eq!(states(&events).iter().filter(|s| **s == "running").count(), 1);
        assert_eq!(states(&events).last(), Some(&"done"));
    }
    world.end();
}

#[test]
fn who_waits_for_jobs_hears_of_their_ends_across_a_kill() {
    let mut world = world("limits.slots = 3\n");
    let failing = world.submit(&spec("sleep 3; exit 7"));
    let fine = world.submit(&spec("print 2 2; sleep 3"));
    let over = world.submit(&spec("print 1 1"));
    done(&mut world, &over);
    let waiting = |jobs: &[&str]| {
        let mut command = world.hotcell();
        command.arg("wait").args(jobs).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let (mut all, mut good) = (waiting(&[&over, &fine, &failing]), waiting(&[&over, &fine]));
    for waiting in [&mut all, &mut good] {
        let mut first = vec![0; format!("{over}  succeeded\n").len()];
        waiting.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
        assert_eq!(String::from_utf8(first).unwrap(), format!("{over}  succeeded\n"), "told at once");
    }
    for job in [&failing, &fine] {
        until_state(&mut world, job, "running");
    }
    restart(&mut world);
    let (all, good) = (all.wait_with_output().unwrap(), good.wait_with_output().unwrap());
    let said = String::from_utf8_lossy(&all.stdout);
    assert_eq!(
        said,
        format!("{fine}  succeeded\n{failing}  failed\n"),
        "{}",
        String::from_utf8_lossy(&all.stderr)
    );
    assert_eq!((all.status.code(), good.status.code()), (Some(1), Some(0)), "some of several failed");
    let (code, ids, _) = world.run(&["ls", "-q"]);
    let mut ids: Vec<&str> = ids.lines().collect();
    let mut expected = [failing.as_str(), &fine, &over];
    ids.sort_unstable();
    expected.sort_unstable();
    assert_eq!((code, ids), (0, expected.to_vec()));
    let (code, line, _) = world.run(&["wait", "--json", &failing]);
    let job: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((code, &job["id"], &job["outcome"]), (1, &json!(failing), &json!("failed")));
    assert_eq!(world.run(&["wait", "j00000000000000z"]).0, 2, "no such job");
    world.end();
}

#[test]
fn a_kill_while_a_job_is_stopped_or_collected_leaves_it_its_outcome() {
    let mut world = world("limits.slots = 3\nlimits.cancel_grace_s = 60\n");
    let stopping = world.submit(&spec("deaf; sleep 600"));
    until_event(&mut world, &stopping, "\"deaf\"");
    assert_eq!(world.call("POST", &format!("/v1/jobs/{stopping}/cancel"), "").status, 202);
    until_state(&mut world, &stopping, "stopping");
    restart(&mut world);
    let (events, job) = done(&mut world, &stopping);
    assert_eq!(
        (job["outcome"].as_str(), job["reason"].as_str()),
        (Some("stopped"), Some("cancelled")),
        "{job}"
    );
    assert_eq!(states(&events), ["queued", "preparing", "running", "stopping", "collecting", "done"]);

    // Its exit is in the journal, its end is not in the row.
    let collecting = world.submit(&spec("print 3 3"));
    until_event(&mut world, &collecting, "\"type\":\"exit\"");
    restart(&mut world);
    let (events, job) = done(&mut world, &collecting);
    assert_succeeded(&job);
    assert_eq!(job["result"], "all done");
    assert_eq!(numbers(&events), [0, 1, 2]);
    assert_eq!(states(&events), ["queued", "preparing", "running", "collecting", "done"]);

    // The result is there, the CLI still runs: the one that takes over ends it.
    let lingering = world.submit(&spec("linger"));
    until_event(&mut world, &lingering, "all done");
    restart(&mut world);
    assert_succeeded(&done(&mut world, &lingering).1);

    // A cell that ended while nobody looked, and one that was killed meanwhile.
    let ended = world.submit(&spec("print 4 4; sleep 1; exit 7"));
    let lost = world.submit(&spec("print 4 4; sleep 600"));
    let interrupted = world.submit(&spec("print 2 2; sleep 2; print 1 1 hotcell-interrupt"));
    for job in [&ended, &lost, &interrupted] {
        until_event(&mut world, job, "\"n\":1");
    }
    let cells = containers(&world).len();
    assert_eq!(cells, 3);
    let agent = processes(&world, &ended).1;
    let container = world.sql(&format!("SELECT container FROM cells WHERE job = '{lost}'"));
    world.kill();
    world.wait_for("the agent has ended", |_| !std::path::Path::new(&format!("/proc/{agent}")).exists());
    docker(&["kill", &container]);
    world.start();
    let (events, job) = done(&mut world, &ended);
    assert_eq!(
        (job["outcome"].as_str(), job["reason"].as_str()),
        (Some("failed"), Some("agent_error")),
        "{job}"
    );
    assert_eq!(numbers(&events), [0, 1, 2, 3]);
    assert!(events.iter().any(|e| e["type"] == "exit" && e["code"] == 7), "PID 1 kept its report");
    assert_eq!(done(&mut world, &lost).1["outcome"], "lost");
    let (events, job) = done(&mut world, &interrupted);
    assert_succeeded(&job);
    assert_eq!(numbers(&events), [0, 1, 0], "a task that names our interrupt is sent once");
    world.end();
}

#[test]
fn a_wall_limit_holds_while_no_daemon_is_there() {
    let mut world = world("limits.cancel_grace_s = 2\n");
    let away = world.submit(&limited("print 1 1; sleep 600", "wall_s", 2));
    until_event(&mut world, &away, "\"n\":0");
    let agent = processes(&world, &away).1;
    world.kill();
    world.wait_for("PID 1 ends the agent by itself", |_| {
        !std::path::Path::new(&format!("/proc/{agent}")).exists()
    });
    world.start();
    let (events, job) = done(&mut world, &away);
    assert_eq!(
        (job["outcome"].as_str(), job["reason"].as_str()),
        (Some("stopped"), Some("deadline")),
        "{job}"
    );
    assert_eq!(states(&events), ["queued", "preparing", "running", "stopping", "collecting", "done"]);
    // A restart gives no job more time than it had.
    let restarted = world.submit(&limited("print 1 1; sleep 600", "wall_s", 6));
    until_event(&mut world, &restarted, "\"n\":0");
    restart(&mut world);
    let (events, job) = done(&mut world, &restarted);
    assert_eq!(job["reason"], "deadline", "{job}");
    let at = |state: &str| events.iter().find(|e| e["state"] == state).unwrap()["at_ms"].as_u64().unwrap();
    let took = Duration::from_millis(at("stopping") - at("preparing"));
    assert!(took < Duration::from_millis(7500), "{took:?}");
    world.end();
}

/// The real CLI, and a model that is slow: the daemon is killed while a request is under way.
#[test]
fn the_money_of_a_request_under_way_at_a_kill_is_charged_and_the_job_goes_on() {
    let script = "usage = { input = 1000, output = 500 }\n[default]\ntext = \"done\"\nlatency_ms = 3000\n";
    let mut world = World::new(script);
    let job =
        json!({ "prompt": "say done", "policy": "trusted", "limits": { "disk_mib": 64, "cost_usd": 1.0 } });
    let id = world.submit(&job);
    until_event(&mut world, &id, "\"type\":\"request\"");
    let reserved: u64 =
        world.sql("SELECT sum(reserved_micro) FROM ledger WHERE status = 'open'").parse().unwrap();
    assert!(reserved > 0);
    restart(&mut world);
    let (events, job) = done(&mut world, &id);
    assert_succeeded(&job);
    assert_eq!(states(&events), ["queued", "preparing", "running", "collecting", "done"]);
    let charged = job["totals"]["charged_micro_usd"].as_u64().unwrap();
    // claude-sonnet-4-6: 3 and 15 USD for a million tokens in and out.
    let each = 1000 * 3 + 500 * 15;
    let billed = each
        * world.recorder.requests().iter().filter(|r| r.target.starts_with("/v1/messages")).count() as u64;
    assert!(billed <= charged, "billed {billed}, charged {charged}");
    assert!(charged <= billed + reserved, "billed {billed}, charged {charged}, in flight {reserved}");
    assert_eq!(world.sql("SELECT count(*) FROM ledger WHERE status = 'open'"), "0");
    world.end();
}

#[test]
fn one_damaged_journal_does_not_keep_the_daemon_from_starting() {
    let mut world = world("limits.slots = 1\nlimits.cancel_grace_s = 2\n");
    let running = world.submit(&spec("print 1 1; sleep 4; print 2 2"));
    until_event(&mut world, &running, "\"n\":0");
    let [damaged, whole] = [0, 1].map(|_| world.submit(&spec("print 1 1")));
    world.kill();
    let file = world.state_dir().join("jobs").join(&damaged).join("000001.ndjson");
    std::fs::write(file, "not what was here\n").unwrap();
    world.start();
    until_state(&mut world, &damaged, "done");
    let view = world.show(&damaged);
    assert_eq!(
        (view["outcome"].as_str(), view["reason"].as_str()),
        (Some("failed"), Some("internal")),
        "{view}"
    );
    for job in [&running, &whole] {
        assert_succeeded(&done(&mut world, job).1);
    }
    world.end();
}
