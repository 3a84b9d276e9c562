//! Names and new branches, beside what git says.

use std::path::Path;

use super::*;
use crate::git::testing::Place;

fn repository(path: &Path) -> Repository {
    Repository::at(File::open(path).expect("opened").as_fd()).expect("read").expect("there")
}

#[test]
fn names_are_taken_as_git_takes_them() {
    let place = Place::new();
    let names = [
        "a",
        "a/b",
        "-a",
        "a-",
        ".a",
        "a/.b",
        "a.",
        "a.b",
        "a..b",
        "a.lock",
        "a.lock/b",
        "a//b",
        "/a",
        "a/",
        "@",
        "a@",
        "@{",
        "a@{b",
        "a b",
        "a~",
        "a^",
        "a:",
        "a?",
        "a*",
        "a[",
        "a\\b",
        "a\nb",
        "a\x7f",
        "ü",
        "HEAD",
        "",
        "{a}",
        "a/HEAD",
        "refs/heads/a",
        "\u{1}",
    ];
    for name in names {
        let output = place.try_git(&place.path(""), &["check-ref-format", "--branch", name]);
        let git = output.status.success() && !matches!(name, "HEAD" | "@");
        assert_eq!(is_branch_name(name), git, "{name:?}");
    }
}

#[test]
fn a_branch_appears_and_nothing_that_is_there_is_touched() {
    let place = Place::new();
    let (path, commit) = place.repository("r");
    place.git(&path, &["branch", "packed/one"]);
    place.git(&path, &["pack-refs", "--all"]);
    place.git(&path, &["branch", "loose/one"]);
    place.git(&path, &["branch", "gone/by"]);
    place.git(&path, &["branch", "-d", "-q", "gone/by"]);
    std::fs::create_dir_all(path.join(".git/refs/heads/empty/deep")).expect("made");
    let repo = repository(&path);
    for name in ["new", "a/b/c", "loose/two", "packed/two", "gone", "empty"] {
        create(&repo, name, &commit).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(place.git(&path, &["rev-parse", name]), commit);
    }
    for name in ["main", "packed/one", "loose/one"] {
        assert!(matches!(create(&repo, name, &commit), Err(RefError::Exists { .. })), "{name}");
    }
    for name in ["main/x", "packed", "packed/one/x", "loose", "loose/one/x"] {
        assert!(matches!(create(&repo, name, &commit), Err(RefError::Clash { .. })), "{name}");
    }
    std::fs::write(path.join(".git/refs/heads/held.lock"), "").expect("written");
    assert!(matches!(create(&repo, "held", &commit), Err(RefError::Locked { .. })));
    place.git(&path, &["worktree", "add", "-q", "--orphan", "-b", "unborn", "../tree"]);
    assert!(matches!(create(&repo, "unborn", &commit), Err(RefError::CheckedOut { .. })));
    assert!(matches!(create(&repo, "../x", &commit), Err(RefError::Name { .. })));
    let locks = place.sh(&path, "find .git/refs -name '*.lock' | sort");
    assert_eq!(locks, ".git/refs/heads/held.lock");
    std::fs::remove_file(path.join(".git/refs/heads/held.lock")).expect("removed");
    place.git(&path, &["worktree", "remove", "../tree"]);
    place.git(&path, &["fsck", "--strict"]);
}

#[test]
fn a_link_among_the_references_leads_nowhere() {
    let place = Place::new();
    let (path, commit) = place.repository("r");
    place.sh(&path, "mkdir ../outside; ln -s ../../../../outside .git/refs/heads/out; ln -s ../../../outside/x .git/refs/heads/x");
    let repo = repository(&path);
    for name in ["out/y", "x"] {
        create(&repo, name, &commit).expect_err("refused");
    }
    assert_eq!(place.sh(&path, "ls -A ../outside"), "");
}
