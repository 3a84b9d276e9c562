//! A job that goes on with what another left: all of it is there for its agent, what is flagged and what is refused too;
//! nothing of that is any nearer to the person's files.

use serde_json::json;

use super::*;
use crate::world::tool_results;

const FIRST: &str = "echo one >>text.txt; rm gone.txt; mv old.txt new.txt; echo '#!/bin/sh' >tool.sh; chmod +x tool.sh; \
    ln -s /etc/hostname out; echo 'export X=1' >.envrc; mkfifo pipe; mkdir -p .github/workflows; echo 'on: push' >.github/workflows/ci.yml; \
    printf '#!/bin/sh\\n' >.git/hooks/post-checkout; chmod +x .git/hooks/post-checkout; git config core.fsmonitor /workspace/tool.sh; true";
const LOOK: &str = "echo LEFT-BEGIN; tail -1 text.txt; ls; test -x tool.sh && readlink out; cat .envrc .github/workflows/ci.yml; \
    ls .git/hooks/post-checkout; test -e pipe || echo no-pipe; test -e .env || echo no-env; echo two >>text.txt; rm tool.sh; echo more >>.envrc; echo 2 >second.txt; echo LEFT-END";
const FILES: &str =
    "echo zero >text.txt; echo g >gone.txt; echo o >old.txt; echo u >untouched.txt; echo SECRET=1 >.env";

#[test]
fn a_job_goes_on_with_what_another_left_and_its_flagged_and_refused_changes_stay_so() {
    let world =
        World::new(&script(&[("first", FIRST), ("then", LOOK), ("third", "cat text.txt second.txt; true")]));
    let dir = repository(&world, "repo", FILES);
    let before = sh(&dir, ALL);
    let (first, ..) = job(&world, "first", &dir);
    let set = ann_json(&world, &["diff", &first, "--json"]);
    for (path, verdict) in [
        ("tool.sh", "flagged"),
        (".envrc", "flagged"),
        ("out", "refused"),
        ("pipe", "refused"),
        (".git/config", "refused"),
    ] {
        assert_eq!(entry(&set, path)["verdict"], verdict, "{path}: {set:#}");
    }

    let path = dir.display().to_string();
    let out = ann(&world, &["run", "then", "-p", "trusted", "-w", &path, "--mode", "copy", "--from", &first]);
    assert!(out.contains("second.txt"), "{out}");
    let id = world.sql("SELECT id FROM jobs ORDER BY rowid DESC LIMIT 1");
    let said = tool_results(&world.follow(&id));
    let left = said
        .split("LEFT-BEGIN")
        .nth(1)
        .and_then(|rest| rest.split("LEFT-END").next())
        .unwrap_or_else(|| panic!("{said}"));
    for words in [
        "one",
        "new.txt",
        "/etc/hostname",
        "export X=1",
        "on: push",
        ".git/hooks/post-checkout",
        "no-pipe",
        "no-env",
    ] {
        assert!(left.contains(words), "{words}: {left}");
    }
    assert!(!left.contains("gone.txt") && !left.contains("old.txt"), "{left}");
    assert_eq!(sh(&dir, ALL), before, "nothing of either is applied");

    // Its change set is against the original: what both did, with the same verdicts.
    let set = ann_json(&world, &["diff", &id, "--json"]);
    let entries = paths(&set["entries"]);
    for path in ["text.txt", "gone.txt", "old.txt", "new.txt", "second.txt"] {
        assert_eq!(entry(&set, path)["verdict"], "plain", "{path}: {set:#}");
    }
    for (path, verdict) in [
        (".envrc", "flagged"),
        ("out", "refused"),
        (".git/config", "refused"),
        (".git/hooks/post-checkout", "refused"),
    ] {
        assert_eq!(entry(&set, path)["verdict"], verdict, "{path}: {set:#}");
    }
    assert!(
        !entries.contains(&"tool.sh") && !entries.contains(&"pipe") && !entries.contains(&".env"),
        "{entries:?}"
    );
    let applied = ann_json(&world, &["apply", &id, "--json"]);
    let left_out = paths(&applied["left_out"]);
    assert!([".envrc", "out", ".git/config"].iter().all(|path| left_out.contains(path)), "{applied:#}");
    assert_eq!(
        sh(&dir, "cat text.txt second.txt new.txt .env; ls"),
        "zero\none\ntwo\n2\no\nSECRET=1\nnew.txt\nsecond.txt\ntext.txt\nuntouched.txt\n"
    );

    // What it began with is there as long as it is asked for; another's is nobody's to go on with.
    let other = json!({ "prompt": "third", "policy": "trusted", "from": id });
    let answer = world.curl("POST", "/v1/jobs", &other.to_string(), &[], Some(BOB)).unwrap();
    assert!(answer.status >= 400 && answer.body.contains(&id[..8]), "{}", answer.body);
    world.end();
}
