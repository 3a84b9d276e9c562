//! The road of a change: made in a copy, shown, applied, exported; and what is recorded of its job.

use serde_json::json;

use super::*;
use crate::world::tool_results;

/// The agent's edits, with its own tools and with git, and at last what it left.
fn edits() -> String {
    let last = format!(
        "git mv lib/old.txt lib/new.txt && rm gone.txt && chmod 755 run.sh && chmod 600 mode.txt && \
         ln -s greeting.txt link && printf '\\000\\001\\377' >blob.bin && mkdir -p empty/dir && \
         printf 'x' >'odd name\n\u{e9}' && rm -r tree && echo file >tree && echo AGENT-LEFT && {{ {TREE}; }} && echo AGENT-END"
    );
    format!(
        "usage = {{ input = 10, output = 20 }}\n\
         [[reply]]\nwhen = {{ prompt = \"road\", turn = 0, tools = true }}\n\
         blocks = [{{ tool = \"Read\", input = {{ file_path = \"/workspace/greeting.txt\" }} }}]\n\
         [[reply]]\nwhen = {{ prompt = \"road\", turn = 1, tools = true }}\n\
         blocks = [{{ tool = \"Edit\", input = {{ file_path = \"/workspace/greeting.txt\", old_string = \"hello\", new_string = \"hello, world\" }} }},\n\
         {{ tool = \"Write\", input = {{ file_path = \"/workspace/made.md\", content = \"# made\\n\" }} }}]\n\
         [[reply]]\nwhen = {{ prompt = \"road\", turn = 2, tools = true }}\nblocks = [{}]\n\
         [[reply]]\nwhen = {{ prompt = \"at-once\", turn = 0, tools = true }}\nblocks = [{}]\n\
         [default]\ntext = \"done\"\n",
        bash(&last),
        bash("echo more >>greeting.txt; echo new >new.txt")
    )
}

const FILES: &str = "printf 'one\\nhello\\nthree\\n' >greeting.txt; mkdir lib tree; printf 'a long enough text\\nto be found again\\n' >lib/old.txt; \
    echo gone >gone.txt; echo '#!/bin/sh' >run.sh; echo m >mode.txt; echo t >tree/leaf; echo u >untouched";

#[test]
fn what_an_agent_did_to_a_copy_is_shown_and_applied_as_it_left_it() {
    let world = World::new(&edits());
    let dir = repository(&world, "repo", FILES);
    let before = sh(&dir, ALL);
    sh(dir.parent().unwrap(), "true");
    let clone = world.workspace("clone", ANN);
    sh(&clone, &format!("umask 022; git clone -q {} .", dir.display()));
    let (id, events, view) = job(&world, "road", &dir);
    assert_eq!(sh(&dir, ALL), before, "the original is untouched");
    let metrics = world.call("GET", "/metrics", "").body;
    for step in ["snapshot", "set_up", "extraction", "removal"] {
        let once = format!("hotcell_workspace_copy_seconds_count{{step=\"{step}\"}} 1\n");
        assert!(metrics.contains(&once), "{once}: {metrics}");
    }
    let said = tool_results(&events);
    let left = said.split("AGENT-LEFT\n").nth(1).and_then(|rest| rest.split("\nAGENT-END").next());
    let left = left.unwrap_or_else(|| panic!("the agent's tree: {said}"));

    // Shown.
    let names = ann(&world, &["diff", &id, "--name-only"]);
    for name in ["greeting.txt", "made.md", "lib/new.txt", "gone.txt", "link", "blob.bin", "tree/leaf"] {
        assert!(names.lines().any(|line| line == name), "{name}: {names}");
    }
    assert!(!names.contains("untouched"), "{names}");
    let stat = ann(&world, &["diff", &id, "--stat"]);
    for words in ["lib/{old.txt => new.txt}", "greeting.txt", "Bin 0 -> 3 bytes", "run.sh  executable"] {
        assert!(stat.contains(words), "{words}: {stat}");
    }
    let patch = ann(&world, &["diff", &id]);
    assert_eq!(patch, ann(&world, &["diff", &id, "--patch"]));
    for words in ["rename from lib/old.txt", "+hello, world", "GIT binary patch", "deleted file mode 100644"]
    {
        assert!(patch.contains(words), "{words}: {patch}");
    }
    let only = ann(&world, &["diff", &id, "--only", "*.md"]);
    assert!(only.contains("made.md") && !only.contains("greeting"), "{only}");
    let set = ann_json(&world, &["diff", &id, "--json"]);
    assert_eq!(
        (&set["standing"], &set["summary"]["hash"]),
        (&json!("open"), &view["totals"]["changes"]["hash"])
    );
    assert_eq!(entry(&set, "mode.txt")["after"]["mode"], 0o600);
    assert_eq!(entry(&set, "link")["after"]["target"], "greeting.txt");
    assert_eq!(entry(&set, "empty/dir")["after"]["kind"], "dir");

    // Applied: what needs no word, then the rest.
    let checked = ann_json(&world, &["apply", &id, "--check", "--json"]);
    assert_eq!((&checked["checked"], paths(&checked["left_out"])), (&json!(true), vec!["run.sh"]));
    assert_eq!(sh(&dir, ALL), before, "a check writes nothing");
    let applied = ann_json(&world, &["apply", &id, "--json"]);
    assert_eq!(applied["applied"], checked["applied"], "{applied}");
    let text = ann(&world, &["apply", &id, "--include-flagged"]);
    assert!(text.contains("1 change applied"), "{text}");
    assert_eq!(sh(&dir, TREE).trim(), left.trim());
    let owners = sh(&dir, "find . ! -uid 4242 -o ! -gid 4242");
    assert_eq!(owners, "", "what was applied belongs to the person");
    assert_eq!(ann_json(&world, &["diff", &id, "--json"])["standing"], "applied");
    assert_eq!(sh(&dir, "git log --oneline | wc -l").trim(), "1");

    // The patch is one that git takes.
    let file = clone.parent().unwrap().join("clone/.git/job.patch");
    std::fs::write(&file, ann(&world, &["export", &id])).unwrap();
    sh(&clone, "umask 022; git apply .git/job.patch");
    assert_eq!(sh(&clone, TRACKED), sh(&dir, TRACKED));
    record(&world, &id, &dir);
    at_once(&world);
    world.end();
}

/// All that a later reader needs.
fn record(world: &World, id: &str, dir: &Path) {
    let job = ann_json(world, &["show", id, "--json"]);
    let job = job.get("job").unwrap_or(&job);
    let (totals, ran) = (&job["totals"], &job["totals"]["ran"]);
    assert!(ran["image"].as_str().is_some_and(|image| image.starts_with("sha256:")), "{job:#}");
    assert!(
        ran["agent"].as_str().is_some_and(|v| v.contains(hotcell::agent_bundle::PINNED_VERSION)),
        "{job:#}"
    );
    assert_eq!((&job["runtime"], &job["outcome"]), (&json!("runc"), &json!("succeeded")));
    for hash in
        [&job["prompt_sha256"], &job["policy_sha256"], &totals["changes"]["hash"], &totals["changes"]["base"]]
    {
        assert!(hash.as_str().is_some_and(|hash| hash.len() == 64), "{hash}: {job:#}");
    }
    assert_eq!(totals["changes"]["base_commit"], sh(dir, "git rev-parse HEAD").trim());
    assert_eq!((&totals["tool_calls"], &totals["tool_denials"]), (&json!(4), &json!(0)));
    assert_eq!(totals["charged_micro_usd"], totals["cli_micro_usd"]);
    assert!(totals["charged_micro_usd"].as_u64().unwrap() > 0 && ran["egress_denied"].is_u64());
    for phase in ["queued", "preparing", "running", "collecting"] {
        assert!(ran["phases_ms"][phase].is_u64(), "{phase}: {job:#}");
    }
}

/// `hotcell run --apply`, as a script uses it.
fn at_once(world: &World) {
    let dir = repository(world, "scripted", "echo hello >greeting.txt");
    let path = dir.display().to_string();
    let args = ["run", "at-once", "-w", &path, "--mode", "copy", "-p", "trusted", "--apply"];
    let out = ann(world, &args);
    assert!(out.contains("greeting.txt | 1 +") && out.contains("2 changes applied"), "{out}");
    assert_eq!(sh(&dir, "cat greeting.txt new.txt"), "hello\nmore\nnew\n");
}
