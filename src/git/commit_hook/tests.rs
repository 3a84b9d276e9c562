//! The hooks and variables of a cell, with real git.

use std::path::Path;

use super::*;
use crate::git::testing::Place;

/// A place with the hooks in it, and git run as a cell would.
fn cell_git(place: &Place, dir: &Path, args: &[&str]) -> std::process::Output {
    let hooks = place.path("hotcell-hooks");
    let who = GitIdentity::new("Ann Lee", "ann@example.com", "ann", "box");
    let variables = cell_environment(&who, hooks.to_str().expect("text"));
    place.command("git", dir).envs(variables).args(args).output().expect("git runs")
}

fn place() -> (Place, JobId) {
    let (place, job) = (Place::new(), JobId::new(1, 1));
    place.sh(&place.path(""), "mkdir hotcell-hooks");
    for (name, mode, text) in hook_files(&job) {
        let path = place.path("hotcell-hooks").join(name);
        std::fs::write(&path, text).expect("written");
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode)).expect("mode");
    }
    (place, job)
}

#[test]
fn commits_name_the_submitter_and_the_job_once() {
    let (place, job) = place();
    let (repo, _) = place.repository("r");
    place.git(&repo, &["config", "commit.gpgSign", "true"]);
    place.sh(&repo, "echo more >> a.txt");
    assert!(
        cell_git(&place, &repo, &["commit", "-qam", "second\n\nSigned-off-by: x <x@y>"]).status.success()
    );
    let trailer = format!("{TRAILER}: {job}");
    let count = |repo: &Path| place.git(repo, &["log", "-1", "--format=%B"]).matches(&trailer).count();
    assert_eq!(count(&repo), 1);
    assert_eq!(place.git(&repo, &["log", "-1", "--format=%an %ae %cn"]), "Ann Lee ann@example.com Ann Lee");
    assert!(cell_git(&place, &repo, &["commit", "-q", "--amend", "--no-edit"]).status.success());
    assert_eq!(count(&repo), 1, "amended");
    assert!(
        cell_git(&place, &repo, &["commit", "-q", "--allow-empty", "--no-verify", "-m", "x"])
            .status
            .success()
    );
    assert_eq!(count(&repo), 1, "without verification");
    assert!(!cell_git(&place, &repo, &["commit", "-q", "--allow-empty", "-m", ""]).status.success(), "empty");
}

#[test]
fn a_repositorys_own_hooks_still_run_wherever_they_lie() {
    let (place, _) = place();
    let (repo, _) = place.repository("r");
    place.sh(
        &repo,
        "printf '#!/bin/sh\\necho ran >> ../ran\\n' > .git/hooks/pre-commit; chmod +x .git/hooks/pre-commit",
    );
    place.sh(
        &repo,
        "printf '#!/bin/sh\\ngrep -q fine \"$1\"\\n' > .git/hooks/commit-msg; chmod +x .git/hooks/commit-msg",
    );
    assert!(!cell_git(&place, &repo, &["commit", "-q", "--allow-empty", "-m", "bad"]).status.success());
    assert!(cell_git(&place, &repo, &["commit", "-q", "--allow-empty", "-m", "fine"]).status.success());
    assert_eq!(place.sh(&place.path(""), "cat ran"), "ran\nran");
    place.sh(&repo, "mkdir .husky; printf '#!/bin/sh\\necho husky >> ../ran\\n' > .husky/pre-commit; chmod +x .husky/pre-commit");
    place.git(&repo, &["config", "core.hooksPath", ".husky"]);
    assert!(cell_git(&place, &repo, &["commit", "-q", "--allow-empty", "-m", "bad too"]).status.success());
    assert_eq!(place.sh(&place.path(""), "cat ran"), "ran\nran\nhusky");
}
