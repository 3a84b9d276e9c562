//! What an agent prints: no command for a terminal, no record of somebody else, no result of its own making.

use serde_json::{Value, json};

use super::{run, world};
use crate::world::tool_results;

/// Characters that a terminal acts upon, but for line ends and tabs.
fn acts(c: char) -> bool {
    c.is_control() && !matches!(c, '\n' | '\t') || ('\u{202a}'..='\u{202e}').contains(&c)
}

#[test]
fn what_a_tool_prints_is_text_and_one_record() {
    let world = world();
    let seen = run(&world, "python3 escapes.py", &json!({}));
    seen.succeeded();
    let id = seen.job["id"].as_str().unwrap();
    let results = tool_results(&seen.events);
    assert!(results.contains("FORGED") && results.contains("]52;c;aGFja2Vk"), "{results:?}");
    let commands: [&[&str]; 6] = [
        &["logs", id],
        &["show", id],
        &["ls"],
        &["audit", id],
        &["logs", id, "--json"],
        &["show", "--json", id],
    ];
    for command in commands {
        let (code, out, err) = world.run(command);
        assert_eq!(code, 0, "{command:?}: {err}");
        let found: Vec<char> = out.chars().chain(err.chars()).filter(|c| acts(*c)).collect();
        assert!(found.is_empty(), "{command:?} prints {found:?}");
    }
    // One record stays one: in the stream, in what a command prints, in the audit.
    for event in &seen.events {
        let forged = event.to_string().contains("FORGED");
        assert!(!forged || event["origin"] == "agent" && event["type"] == "frame", "{event}");
    }
    let charges = seen.events.iter().filter(|e| e["type"] == "charge");
    assert!(charges.clone().count() >= 2 && charges.clone().all(|e| e["model"] == "claude-sonnet-4-6"));
    let (_, audit, _) = world.run(&["audit", id, "--json"]);
    let (_, plain, _) = world.run(&["audit", id]);
    let answer = world.call("GET", &format!("/v1/jobs/{id}/audit"), "").body;
    for text in [&audit, &plain, &answer] {
        assert!(!text.contains("FORGED"), "{text}");
    }
    let records: Vec<Value> = answer.lines().map(|l| serde_json::from_str(l).expect(l)).collect();
    assert_eq!(records.iter().filter(|r| r["kind"] == "tool").count(), 1, "{records:#?}");
    world.end();
}

#[test]
fn a_forged_success_does_not_save_a_job_whose_agent_dies() {
    let world = world();
    let seen = run(&world, "sh forge.sh; kill -9 -1", &json!({}));
    assert_eq!(
        (&seen.job["outcome"], &seen.job["reason"]),
        (&json!("failed"), &json!("agent_error")),
        "{}",
        seen.job
    );
    assert_ne!(seen.job["result"], "FORGED");
    assert!(seen.job["cost_usd"].as_f64().unwrap() > 0.0, "cost comes from the gateway: {}", seen.job);
    world.end();
}
