//! The road of a job, from submit to clean-up.

use serde_json::json;

use crate::world::{World, docker, tool_results};

const EDIT_AND_RUN: &str = include_str!("../scripts/edit-and-run.toml");

#[test]
fn a_job_edits_a_file_in_place_as_its_submitter() {
    let world = World::new(EDIT_AND_RUN);
    let uid = 4242;
    let workspace = world.workspace("repo", uid);
    std::fs::write(workspace.join("greeting.txt"), "hello\n").unwrap();
    std::os::unix::fs::chown(workspace.join("greeting.txt"), Some(uid), Some(uid)).unwrap();
    let spec = json!({ "prompt": "improve the greeting", "policy": "trusted", "workspace": { "path": workspace, "mode": "bind" } });
    let submitted = world.curl("POST", "/v1/jobs", &spec.to_string(), &[], Some(uid)).unwrap();
    assert_eq!(submitted.status, 201, "{}", submitted.body);
    let id = submitted.json()["id"].as_str().unwrap().to_owned();
    let events = world.follow(&id);
    let job = world.show(&id);
    assert_eq!(job["outcome"], "succeeded", "{job}");
    assert_eq!(job["uid"], uid);
    assert_eq!(std::fs::read_to_string(workspace.join("greeting.txt")).unwrap(), "hello, world\n");
    let owner =
        std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(workspace.join("greeting.txt")).unwrap());
    assert_eq!(owner, uid, "what the agent wrote belongs to the submitter");
    assert!(tool_results(&events).contains("hello"));

    // The money: what the ledger charged is what the events say, and the CLI agrees.
    let charged: u64 = events
        .iter()
        .filter(|e| e["type"] == "charge")
        .map(|e| e["charged_micro_usd"].as_u64().unwrap())
        .sum();
    assert!(charged > 0);
    assert_eq!(job["totals"]["charged_micro_usd"], charged);
    assert_eq!(job["totals"]["cli_micro_usd"], charged, "the CLI's own figure");
    assert_eq!(job["totals"]["turns"], 4);
    assert_eq!(job["totals"]["tool_calls"], 4);

    // Each state once, in order, and every tool call judged before its result.
    let states: Vec<&str> =
        events.iter().filter(|e| e["type"] == "state").map(|e| e["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["queued", "preparing", "running", "collecting", "done"]);
    world.end();
}

#[test]
fn a_version_is_chosen_only_after_it_passed_the_protocol_self_test() {
    let world = World::without_daemon(EDIT_AND_RUN, "");
    let version = hotcell::agent_bundle::PINNED_VERSION;
    let (code, out, err) = world.run(&["agent", "test", version, "--json"]);
    assert_eq!(code, 0, "{err}");
    let bundle: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(bundle["state"]["state"], "qualified", "{bundle}");
    assert!(bundle["state"]["report"]["checks"].as_array().unwrap().len() >= 9, "{bundle}");
    let left: Vec<_> =
        std::fs::read_dir(world.state_dir()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert!(left.iter().all(|n| !n.to_string_lossy().starts_with("selftest-")), "{left:?}");
    let (code, _, err) = world.run(&["agent", "use", "9.9.9"]);
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("9.9.9") && err.contains("hotcell agent install"), "{err}");
}

#[test]
fn the_cli_is_bound_into_an_image_that_does_not_have_it() {
    let world = World::new(EDIT_AND_RUN);
    // The base of our own image: node and tools, but no CLI and no mount points of a cell.
    let list =
        docker(&["images", "--filter", "label=hotcell.image=base", "--format", "{{.Repository}}:{{.Tag}}"]);
    let image = list.lines().next().expect("the base that `make image` leaves");
    let workspace = world.workspace("repo", 4242);
    std::fs::write(workspace.join("greeting.txt"), "hello\n").unwrap();
    let (events, job) = world.job(&json!({
        "prompt": "greeting", "policy": "trusted", "image": image,
        "workspace": { "path": workspace, "mode": "read-only" },
    }));
    assert_eq!(job["outcome"], "succeeded", "{job}");
    assert_eq!(job["image"], image);
    assert!(tool_results(&events).contains("hello"), "the agent reads the workspace");
    assert_eq!(
        std::fs::read_to_string(workspace.join("greeting.txt")).unwrap(),
        "hello\n",
        "and changes nothing"
    );
    world.end();
}
