//! Jobs on a part of a repository: its agent has git, sees nothing of the rest, and what comes back lands where the part
//! lies; and worktrees, whose agents' commits come back too.

use serde_json::json;

use super::*;
use crate::world::tool_results;

const TOKEN: &str = "ghp_notForTheAgent0123456789";
const FILES: &str = "mkdir -p app/src lib; echo root >root.txt; echo lib >lib/a.txt; echo main >app/src/main.txt; \
    echo old >app/old.txt; printf 'target/\\n' >.gitignore";
const WORK: &str = "pwd; git rev-parse --show-toplevel; echo S1; git status --porcelain; echo S2; git log --format=%s; \
    ls -A ..; echo L2; git config remote.origin.url; echo more >>src/main.txt; git diff --stat | cat; mkdir target; \
    echo built >target/out; echo new >new.txt; git add new.txt; git commit -qm 'in a part' && git show --name-status --format=%B HEAD; \
    echo S3; git status --porcelain; echo S4; git stash -q && git stash pop -q && echo stashed; \
    git switch -qc other && git switch -q main && echo switched; echo x >../beside || echo not-beside; git ls-tree --name-only HEAD ..";

fn part(world: &World, name: &str) -> (PathBuf, PathBuf) {
    let top = repository(world, name, FILES);
    sh(&top, &format!("git remote add origin https://ann:{TOKEN}@example.org/app.git"));
    for hook in ["post-checkout", "post-commit", "reference-transaction"] {
        sh(
            &top,
            &format!(
                "printf '#!/bin/sh\\ntouch %s 2>/dev/null || true\\n' \"$PWD/../ran\" >.git/hooks/{hook}; chmod +x .git/hooks/{hook}"
            ),
        );
    }
    (top.clone(), top.join("app"))
}

#[test]
fn a_part_of_a_repository_has_git_and_its_changes_land_where_it_lies() {
    let world = World::new(&script(&[("part", WORK)]));
    let (top, dir) = part(&world, "mono");
    let before = sh(&top, ALL);
    let (id, events, view) = job(&world, "part", &dir);
    assert_eq!(sh(&top, ALL), before, "the original is untouched, its repository too");
    let said = tool_results(&events);
    for words in [
        "/workspace/app\n/workspace\nS1\nS2\nfirst\n.git\napp\nL2\nhttps://",
        "example.org/app.git\n",
        "1 file changed, 1 insertion",
        &format!(
            "in a part\n\nHotcell-Job: {id}\n\n\nA\tapp/new.txt\nS3\n M app/src/main.txt\nS4\nstashed\nswitched\n"
        ),
        "not-beside\n",
        "../lib\n../root.txt",
    ] {
        assert!(said.contains(words), "{words:?} is not in {said}");
    }
    assert!(!said.contains(TOKEN), "{said}");

    let set = ann_json(&world, &["diff", &id, "--json"]);
    assert_eq!(paths(&set["entries"]), ["new.txt", "src/main.txt"], "{set:#}");
    assert_eq!(set["base"]["commit"], sh(&top, "git rev-parse HEAD").trim(), "{set:#}");
    assert_eq!((&set["commits"]["count"], &set["ignored"]["count"]), (&json!(1), &json!(1)), "{set:#}");
    assert_eq!(view["totals"]["changes"]["commits"], 1, "{view:#}");
    ann(&world, &["apply", &id, "--branch", "agent/part"]);
    assert_eq!(sh(&top, "git diff --name-status main agent/part"), "A\tapp/new.txt\nM\tapp/src/main.txt\n");
    assert_eq!(sh(&top, "git log --format=%s main..agent/part").lines().last(), Some("in a part"));
    sh(&top, "git fsck --strict");
    ann(&world, &["apply", &id]);
    assert_eq!(sh(&top, "git status --porcelain"), " M app/src/main.txt\n?? app/new.txt\n");
    assert!(!top.join("../ran").exists(), "a hook of the repository ran");
    world.end();
}

#[test]
fn a_part_that_is_worked_on_in_place_or_only_read_has_a_repository_that_nobody_can_write() {
    let work = "pwd; echo S1; git status --porcelain; echo S2; git log --format=%s; echo more >>src/main.txt && echo written; \
        git commit -qam no && echo committed; echo x >\"$(git rev-parse --git-dir)/hooks/post-commit\" && echo hooked; true";
    let world = World::new(&script(&[("part", work)]));
    for (mode, mount) in [("bind", "workspace"), ("read-only", "workspace"), ("bind", "same-path")] {
        let (top, dir) = part(&world, &format!("{mode}-{mount}"));
        let before = sh(&top.join(".git"), ALL);
        let mut spec = spec("part", &dir);
        (spec["workspace"]["mode"], spec["workspace"]["mount"]) = (json!(mode), json!(mount));
        let id = submit(&world, &spec);
        let said = tool_results(&world.follow(&id));
        let at = if mount == "workspace" { "/workspace/app".to_owned() } else { dir.display().to_string() };
        assert!(said.contains(&format!("{at}\nS1\nS2\nfirst\n")), "{mode} {mount}: {said}\n{}", world.log());
        assert_eq!(said.contains("written"), mode == "bind", "{said}");
        assert!(!said.contains("committed") && !said.contains("hooked"), "{said}");
        assert_eq!(sh(&top.join(".git"), ALL), before, "{mode}");
        let left = if mode == "bind" { " M app/src/main.txt\n" } else { "" };
        assert_eq!(sh(&top, "git status --porcelain"), left, "{mode}");
    }
    world.end();
}

#[test]
fn commits_in_a_worktree_come_back_too() {
    let world = World::new(&script(&[(
        "tree",
        "echo x >new.txt; git add .; git commit -qm 'in a tree' && echo committed",
    )]));
    let top = repository(&world, "main", FILES);
    let tree = world.workspace("trees", ANN).join("feature");
    sh(&top, &format!("git worktree add -q -b feature {}", tree.display()));
    let (id, events, view) = job(&world, "tree", &tree);
    assert!(tool_results(&events).contains("committed"), "{}", tool_results(&events));
    assert_eq!(view["totals"]["changes"]["commits"], 1, "{view:#}");
    ann(&world, &["apply", &id, "--branch", "agent/tree"]);
    assert_eq!(sh(&top, "git log -1 --format=%s agent/tree"), "in a tree\n");
    assert_eq!(sh(&tree, "git status --porcelain; git log -1 --format=%s"), "first\n");
    world.end();
}
