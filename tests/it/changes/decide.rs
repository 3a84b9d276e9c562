//! What a person decides about a change set, and who may: conflicts, merges, branches, archives, checkouts, discarding.

use serde_json::json;

use super::*;

const EDIT: &str = "sed -i 's/^one$/ONE/' text.txt; echo agent >other.txt; printf '\\000A' >binary; echo new >new.txt; chmod +x tool; true";
const COMMIT: &str = "echo work >work.txt; git add -A; git commit -qm 'the agent works' && git log -1 --format='by %an <%ae>%n%B'; \
    echo loose >loose.txt; mkdir -p .git/hooks; printf '#!/bin/sh\\ntouch /var/tmp/never\\n' >.git/hooks/post-checkout";
const FILES: &str = "printf 'one\\n2\\n3\\n4\\n5\\n6\\n7\\nlast\\n' >text.txt; echo o >other.txt; printf '\\000o' >binary; echo t >tool; echo u >untouched.txt";

#[test]
fn what_the_person_changed_meanwhile_is_a_conflict_or_merged_and_never_the_agents() {
    let wait = format!("while [ ! -e /tmp/go ]; do sleep 0.05; done; {EDIT}");
    let world = World::new(&script(&[("edit-after", &wait), ("edit", EDIT)]));
    let dir = repository(&world, "repo", FILES);
    let (id, ..) = job(&world, "edit", &dir);
    // Another file than the agent's, and one of the agent's.
    sh(
        &dir,
        "echo mine >untouched.txt; echo also >mine.txt; sed -i 's/^last$/LAST/' text.txt; echo other >>other.txt",
    );
    let before = sh(&dir, ALL);
    let (code, out, err) = run_as(&world, ANN, &["apply", &id, "--include-flagged"]);
    assert_eq!(code, 1, "{out}{err}");
    for words in ["2 paths are in conflict", "text.txt", "other.txt", "nothing was changed", "--3way"] {
        assert!(err.contains(words), "{words}: {err}");
    }
    assert!(!err.contains("untouched") && !err.contains("mine.txt") && !err.contains("binary"), "{err}");
    let (code, out, _) = run_as(&world, ANN, &["apply", &id, "--check", "--json"]);
    assert_eq!(code, 1, "{out}");
    let error: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(error["error"]["code"], "conflict", "{error}");
    // A text that both changed in the same place cannot be merged: nothing is.
    let (code, _, err) = run_as(&world, ANN, &["apply", &id, "--3way"]);
    assert!(code == 1 && err.contains("other.txt") && !err.contains("text.txt:"), "{err}");
    assert_eq!(sh(&dir, ALL), before);
    let merged =
        ann_json(&world, &["apply", &id, "--3way", "--only", "text.txt", "--only", "new.txt", "--json"]);
    assert_eq!(
        (paths(&merged["merged"]), paths(&merged["applied"]).len()),
        (vec!["text.txt"], 2),
        "{merged}"
    );
    assert_eq!(sh(&dir, "cat text.txt"), "ONE\n2\n3\n4\n5\n6\n7\nLAST\n");
    sh(&dir, "echo o >other.txt");
    ann(&world, &["apply", &id, "--3way", "--include-flagged"]);
    assert_eq!(sh(&dir, "cat other.txt untouched.txt mine.txt; test -x tool"), "agent\nmine\nalso\n");
    let again = ann_json(
        &world,
        &["apply", &id, "--include-flagged", "--only", "other.txt", "--only", "binary", "--json"],
    );
    assert_eq!(
        (paths(&again["applied"]).len(), paths(&again["already"])),
        (0, vec!["binary", "other.txt"]),
        "{again}"
    );
    let said = ann(&world, &["apply", &id, "--include-flagged", "--only", "other.txt"]);
    assert!(said.contains("already applied"), "{said}");

    // Edited while the agent works, in the original: the agent is not blamed for it.
    let dir = repository(&world, "busy", FILES);
    // What was written in the same moment as git's index is not vouched for by that.
    sh(&dir, "touch -d '1 hour ago' text.txt; git add text.txt");
    let id = submit(&world, &spec("edit-after", &dir));
    wait_for_copy(&world, &id);
    sh(&dir, "echo mine >untouched.txt; echo mine >mine.txt; sed -i 's/^last$/LAST/' text.txt");
    let cell = world.sql(&format!("SELECT cell FROM cells WHERE job = '{id}'"));
    std::fs::write(world.state_dir().join("cells").join(cell).join("scratch/tmp/go"), "").unwrap();
    world.follow(&id);
    let set = ann_json(&world, &["diff", &id, "--json"]);
    let named = paths(&set["entries"]);
    assert!(!named.iter().any(|path| matches!(*path, "untouched.txt" | "mine.txt")), "{set:#}");
    assert_eq!(entry(&set, "new.txt")["before"], Value::Null);
    // What both changed, and git tracked: what it was is known, so that it can be merged, where that is asked for.
    let text = entry(&set, "text.txt");
    assert!(text["base_changed"] == true && text["before"]["blob"].is_string(), "{text}");
    let (code, _, err) = run_as(&world, ANN, &["apply", &id, "--only", "text.txt"]);
    assert!(code == 1 && err.contains("changed while the job ran"), "{err}");
    ann(&world, &["apply", &id, "--3way", "--only", "text.txt"]);
    assert_eq!(sh(&dir, "cat text.txt"), "ONE\n2\n3\n4\n5\n6\n7\nLAST\n");
    world.end();
}

/// Until the job's agent is at work.
fn wait_for_copy(world: &World, id: &str) {
    let answer = world.call("GET", &format!("/v1/jobs/{id}"), "");
    let until = std::time::Instant::now() + crate::world::PATIENCE;
    assert_eq!(answer.status, 200);
    while !crate::fake_agent::journal(world, id).contains("\"tool_use\"") {
        assert!(std::time::Instant::now() < until, "the agent does not begin: {}", world.log());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn a_branch_holds_the_change_and_the_persons_files_stay() {
    let world = World::new(&script(&[("commit", COMMIT), ("edit", EDIT)]));
    let dir = repository(&world, "repo", FILES);
    sh(
        &dir,
        "for h in post-checkout post-commit reference-transaction pre-commit; do printf '#!/bin/sh\\ntouch %s || true\\n' \"$PWD/../repo/ran\" >.git/hooks/$h; chmod +x .git/hooks/$h; done",
    );
    let work_tree = "find . -path ./.git/objects -prune -o -path ./.git/refs -prune -o -path ./.git -o -printf '%p %y %m %s %T@\\n' | LC_ALL=C sort";
    let (id, ..) = job(&world, "edit", &dir);
    let before = sh(&dir, work_tree);
    let out = ann(&world, &["apply", &id, "--branch", "agent/edit", "--include-flagged"]);
    assert!(out.contains("branch agent/edit is at"), "{out}");
    let set = ann_json(&world, &["diff", &id, "--json"]);
    assert_eq!((&set["standing"], &set["branches"]), (&json!("applied"), &json!(["agent/edit"])));
    let checked = ann_json(&world, &["apply", &id, "--check", "--json"]);
    assert_eq!(checked["notes"], json!(["the branch agent/edit was made of it before"]), "{checked}");
    assert_eq!(sh(&dir, work_tree), before, "the work tree, the index and HEAD are as they were");
    assert_eq!(sh(&dir, "git symbolic-ref HEAD").trim(), "refs/heads/main");
    let log = sh(&dir, "git log -1 --format='%an <%ae> | %P%n%B' agent/edit");
    assert!(log.starts_with(&format!("Ann <ann@example.org> | {}", sh(&dir, "git rev-parse main"))), "{log}");
    assert!(log.contains(&format!(": {id}")), "a trailer names the job: {log}");
    let names = sh(&dir, "git diff --name-status main agent/edit");
    assert_eq!(names, "M\tbinary\nA\tnew.txt\nM\tother.txt\nM\ttext.txt\nM\ttool\n");
    assert_eq!(
        sh(
            &dir,
            "git show agent/edit:other.txt; git fsck --strict 2>&1 >/dev/null | grep -v dangling || true"
        ),
        "agent\n"
    );
    let (code, _, err) = run_as(&world, ANN, &["apply", &id, "--branch", "agent/edit"]);
    assert!(code == 1 && err.contains("agent/edit"), "{err}");
    let (code, _, err) = run_as(&world, ANN, &["apply", &id, "--branch", "../x"]);
    assert!(code != 0 && err.contains("../x"), "{err}");

    // The agent's own commits, and what it did not commit. They were packed in a cell that was not the agent's.
    let (id, events, _) = job(&world, "commit", &dir);
    let said = crate::world::tool_results(&events);
    assert!(said.contains("by Ann <ann@example.org>") && said.contains(&id), "identity and trailer: {said}");
    let shown: serde_json::Value = serde_json::from_str(&ann(&world, &["show", &id, "--json"])).unwrap();
    let cell = events.iter().find(|event| event["type"] == "cell").unwrap();
    assert_eq!((&shown["cell"], &shown["runtime"]), (&cell["cell"], &cell["runtime"]));
    assert_eq!(shown["totals"]["runtime"], cell["runtime"]);
    ann(&world, &["apply", &id, "--branch", "agent/commit"]);
    let log = sh(&dir, "git log --format=%s main..agent/commit");
    assert!(sh(&dir, "git show agent/commit:work.txt agent/commit:loose.txt") == "work\nloose\n", "{log}");
    assert!(!dir.join("ran").exists() && !Path::new("/var/tmp/never").exists(), "a hook ran");
    world.end();
}

#[test]
fn a_change_set_goes_into_files_and_directories_until_it_is_thrown_away() {
    let mut world = World::new(&script(&[("edit", EDIT)]));
    let dir = repository(&world, "repo", FILES);
    let (id, ..) = job(&world, "edit", &dir);
    let files = world.workspace("files", ANN);
    let file = |name: &str| files.join(name).display().to_string();
    ann(&world, &["export", &id, "--format", "tar", "-o", &file("job.tar")]);
    sh(&files, "mkdir tar && tar -xf job.tar -C tar");
    assert_eq!(sh(&files, "cat tar/other.txt tar/new.txt"), "agent\nnew\n");
    ann(&world, &["export", &id, "--format", "bundle", "-o", &file("job.bundle")]);
    let name = sh(
        &dir,
        &format!("git bundle verify -q {0} && git bundle list-heads {0} | cut -d' ' -f2", file("job.bundle")),
    );
    sh(
        &dir,
        &format!("git fetch -q {} {}:refs/heads/fetched", file("job.bundle"), name.lines().next().unwrap()),
    );
    assert_eq!(sh(&dir, "git show fetched:other.txt"), "agent\n");

    let to = file("as-left");
    let out = ann(&world, &["checkout", &id, &to]);
    assert!(out.contains("of the job's written"), "{out}");
    assert_eq!(sh(&files, "cd as-left && cat other.txt untouched.txt && find . ! -uid 4242"), "agent\nu\n");
    let (code, _, err) = run_as(&world, ANN, &["checkout", &id, &to]);
    assert!(code == 2 && err.contains("as-left"), "{err}");
    for target in ["/root/x", "/etc/hotcell-test"] {
        let (code, _, err) = run_as(&world, ANN, &["checkout", &id, target]);
        assert!(code != 0 && !Path::new(target).exists(), "{target}: {err}");
    }

    // Others: nobody else sees it; who administers may look, and decides nothing.
    for args in [
        &["diff", &id][..],
        &["apply", &id],
        &["export", &id],
        &["discard", &id],
        &["checkout", &id, "/var/tmp/hc-x"],
    ] {
        let (code, out, err) = run_as(&world, BOB, args);
        assert!(code == 2 && out.is_empty() && err.contains(&id[..8]), "{args:?}: {out}{err}");
    }
    for path in ["changes", "diff", "export"] {
        let answer = world.curl("GET", &format!("/v1/jobs/{id}/{path}"), "", &[], Some(BOB)).unwrap();
        assert_eq!(answer.status, 404, "{path}: {}", answer.body);
    }
    let before = sh(&dir, ALL);
    let (code, out, _) = world.run(&["diff", &id]);
    assert!(code == 0 && out.contains("other.txt"), "{out}");
    for args in [&["apply", &id][..], &["discard", &id], &["checkout", &id, "/var/tmp/hc-x"]] {
        let (code, _, err) = world.run(args);
        assert!(code == 2 && err.contains("only they decide"), "{args:?}: {err}");
    }
    assert_eq!(sh(&dir, ALL), before);

    ann(&world, &["discard", &id]);
    assert_eq!(ann_json(&world, &["diff", &id, "--json"])["standing"], "discarded");
    let (code, _, err) = run_as(&world, ANN, &["apply", &id]);
    assert!(code == 2 && err.contains("discarded"), "{err}");
    let shelf = world.state_dir().join("changes").join(&id);
    assert!(shelf.is_dir());
    ann(&world, &["rm", &id]);
    assert!(!shelf.exists(), "what was kept of a deleted job");
    let (code, _, err) = run_as(&world, ANN, &["diff", &id]);
    assert!(code == 2 && err.contains(&id[..8]), "{err}");
    // What a dead daemon did not come to: a change set whose job is gone.
    std::fs::create_dir(&shelf).unwrap();
    std::fs::write(shelf.join("base"), "x").unwrap();
    world.kill();
    world.start();
    assert!(!shelf.exists(), "an orphan");
    let jobless =
        json!({ "prompt": "none", "policy": "trusted", "workspace": { "path": dir, "mode": "read-only" } });
    let id = submit(&world, &jobless);
    world.follow(&id);
    let (code, _, err) = run_as(&world, ANN, &["diff", &id]);
    assert!(code == 2 && err.contains("could not write to its workspace"), "{err}");
    world.end();
}
