//! The CLI and the cell's first process against the code that they run, which has the same user.

use serde_json::{Value, json};

use super::{run, world};
use crate::world::tool_results;

/// What another process of the same user may learn of a process or do to it: nothing.
#[track_caller]
fn closed(of: &Value) {
    for (name, result) in of.as_object().unwrap() {
        let refused = match result {
            Value::String(error) => matches!(error.as_str(), "EACCES" | "EPERM"),
            Value::Number(number) => number.as_i64().unwrap() < 0,
            _ => false,
        };
        assert!(refused, "{name}: {result}");
    }
}

#[test]
fn nobody_looks_into_the_cli_or_the_first_process_and_signals_to_it_have_no_effect() {
    let world = world();
    let seen = run(&world, "python3 pry.py", &json!({}));
    seen.succeeded();
    closed(seen.get("cli"));
    closed(seen.get("init"));
    // The same acts on oneself show that they are acts at all.
    let own = seen.get("self");
    for name in ["read environ", "read maps", "list fd", "write fd/1", "write oom_score_adj"] {
        assert_eq!(own[name], "done", "{name}");
    }
    assert_eq!((seen.get("cli_exe"), seen.get("cli_write")), (&json!("EACCES"), &json!("EACCES")));
    assert_eq!((seen.get("cli_copy"), seen.get("cli_chmod")), (&json!("EXDEV"), &json!("EROFS")));
    assert_eq!(*seen.get("cli_mode"), "0o711");
    // The kernel takes signals to the first process and drops them: it is neither stopped nor dead, and the job
    // went on.
    assert_eq!((seen.get("kill KILL"), seen.get("kill STOP")), (&json!("done"), &json!("done")));
    let state = seen.get("init_state");
    assert!(["S", "R", "D"].iter().any(|alive| *state == *alive), "{state}");
    world.end();
}

#[test]
fn limits_of_the_cli_and_the_first_process_cannot_be_taken_away() {
    let world = world();
    let seen = run(&world, "python3 squeeze.py", &json!({}));
    seen.succeeded();
    for who in ["init", "cli"] {
        for what in ["NOFILE", "FSIZE", "CPU"] {
            assert_eq!(*seen.get(&format!("{who} {what}")), "EPERM", "{who} {what}");
        }
    }
    assert_eq!(*seen.get("own"), "done", "a process may still look at its own");
    world.end();
}

#[test]
fn a_forged_frame_is_the_output_of_a_tool() {
    let world = world();
    let seen = run(&world, "sh forge.sh", &json!({}));
    seen.succeeded();
    assert_eq!(*seen.get("wrote"), 0, "a descriptor of the CLI or of the first process could be opened");
    assert!(tool_results(&seen.events).contains("FORGED"));
    assert_eq!(seen.job["result"], "done", "{}", seen.job);
    assert!(seen.job["cost_usd"].as_f64().unwrap() > 0.0);
    for event in &seen.events {
        if event["type"] == "frame" && event["frame"]["type"] == "result" {
            assert_eq!(event["frame"]["result"], "done");
        }
        if event["origin"] != "agent" {
            assert!(!event.to_string().contains("FORGED") || event["type"] == "sent", "{event}");
        }
    }
    // Written as a line of an event stream, it is inside of one all the same.
    assert_eq!(seen.events.iter().filter(|e| e["type"] == "state" && e["state"] == "done").count(), 1);
    world.end();
}

#[test]
fn an_agent_that_kills_or_stops_everything_it_can_reach_ends_its_own_job_only() {
    let world = world();
    let seen = run(&world, "kill -9 -1", &json!({}));
    assert_eq!(seen.job["outcome"], "failed", "{}", seen.job);
    assert_eq!(seen.job["reason"], "agent_error", "{}", seen.job);
    let stop = "kill -STOP $(ps -o pid= -C claude); kill -STOP $(ps -o ppid= -p $$); sleep 30";
    let seen = run(&world, stop, &json!({ "limits": { "silence_s": 3 } }));
    assert_eq!(
        (&seen.job["outcome"], &seen.job["reason"]),
        (&json!("stopped"), &json!("silent")),
        "{}",
        seen.job
    );
    let seen = run(&world, "echo 'ZOO {\"after\": true}'", &json!({}));
    seen.succeeded();
    world.end();
}
