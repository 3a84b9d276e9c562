//! Repositories that git made, and others.

use super::*;
use crate::git::testing::Place;

fn head(path: &Path) -> Option<Head> {
    head_of(File::open(path).expect("opened").as_fd())
}

fn at(path: &Path) -> Result<Option<Repository>, RepositoryError> {
    Repository::at(File::open(path).expect("opened").as_fd())
}

fn some(commit: &str, branch: Option<&str>) -> Option<Head> {
    Some(Head { commit: Some(commit.to_owned()), branch: branch.map(str::to_owned) })
}

#[test]
fn head_is_read_loose_packed_detached_unborn_and_by_sha256() {
    let place = Place::new();
    let (repo, commit) = place.repository("r");
    assert_eq!(head(&repo), some(&commit, Some("main")));
    place.git(&repo, &["checkout", "-q", "-b", "a/b"]);
    place.git(&repo, &["pack-refs", "--all"]);
    assert_eq!(head(&repo), some(&commit, Some("a/b")));
    place.git(&repo, &["checkout", "-q", "--detach"]);
    assert_eq!(head(&repo), some(&commit, None));
    place.git(&repo, &["checkout", "-q", "--orphan", "fresh"]);
    assert_eq!(head(&repo), Some(Head { commit: None, branch: Some("fresh".to_owned()) }));
    place.git(&repo, &["symbolic-ref", "refs/heads/alias", "refs/heads/main"]);
    place.git(&repo, &["symbolic-ref", "HEAD", "refs/heads/alias"]);
    assert_eq!(head(&repo), some(&commit, Some("alias")));

    let (long, commit) = place.repository_with("long", &["--object-format=sha256"]);
    assert_eq!(commit.len(), 64);
    assert_eq!(head(&long), some(&commit, Some("main")));
    assert_eq!(head(&repo.join("dir")), None, "above is not looked at");
}

#[test]
fn work_trees_and_submodules_lead_to_their_repository() {
    let place = Place::new();
    let (repo, commit) = place.repository("r");
    place.git(&repo, &["worktree", "add", "-q", "-b", "side", "../tree"]);
    let tree = place.path("tree");
    assert_eq!(head(&tree), some(&commit, Some("side")));
    let found = at(&tree).expect("read").expect("there");
    assert_eq!(found.objects().expect("found"), repo.join(".git/objects"));
    assert!(checked_out(&found).expect("read").contains(&"refs/heads/main".to_owned()));

    let (outer, _) = place.repository("outer");
    place.git(&outer, &["submodule", "--quiet", "add", repo.to_str().expect("text"), "sub"]);
    assert_eq!(head(&outer.join("sub")), some(&commit, Some("main")));
}

#[test]
fn upwards_only_ones_own_repository_is_found() {
    let place = Place::new();
    let (repo, commit) = place.repository("r");
    let found = Repository::holding(&repo.join("dir"), place.who.uid).expect("read").expect("there");
    assert_eq!((found.prefix.as_slice(), found.head().expect("read").commit), (&b"dir"[..], Some(commit)));
    let found = Repository::holding(&repo, place.who.uid + 1).expect("read").expect("named itself");
    assert!(found.prefix.is_empty());
    let foreign = Repository::holding(&repo.join("dir"), place.who.uid + 1);
    assert!(matches!(foreign, Err(RepositoryError::Foreign { .. })), "{foreign:?}");
    assert!(Repository::holding(&place.path(""), place.who.uid).is_ok_and(|r| r.is_none()));
}

#[test]
fn other_forms_are_named_and_broken_ones_are_no_repository() {
    let place = Place::new();
    let (repo, _) = place.repository("r");
    for (config, word) in [
        ("[core]\nrepositoryformatversion = 1\n[extensions]\nrefStorage = reftable\n", "reftable"),
        ("[core]\nrepositoryformatversion = 2\n", "version"),
        ("[extensions]\nnewThing = true\n", "newthing"),
        ("[extensions]\nobjectFormat = sha3\n", "sha3"),
        ("[core\n", "parse"),
    ] {
        std::fs::write(repo.join(".git/config"), config).expect("written");
        let error = at(&repo).expect_err("refused").to_string();
        assert!(error.contains(word), "{error}");
        assert_eq!(head(&repo), None);
    }
    let dir = place.path("odd");
    place.sh(&place.path(""), "mkdir odd");
    for script in [
        "ln -s ../r/.git .git",
        "rm .git; mkfifo .git",
        "rm .git; echo gitdir: /nowhere > .git",
        "echo gibberish > .git",
        "rm .git; mkdir -p .git/objects; ln -s /etc/passwd .git/HEAD",
        "rm .git/HEAD; mkfifo .git/HEAD",
        "rm .git/HEAD; echo 'ref: ../../../etc/passwd' > .git/HEAD",
        "echo 'ref: refs/heads/x' > .git/HEAD; mkdir -p .git/refs/heads; echo 'ref: refs/heads/x' > .git/refs/heads/x",
        "rm .git/refs/heads/x; mkfifo .git/refs/heads/x",
        "rm .git/refs/heads/x; head -c 100000 /dev/zero > .git/refs/heads/x",
    ] {
        place.sh(place.path("").as_path(), &format!("cd {dir:?}; {script}"));
        assert_eq!(head(&dir), None, "{script}");
    }
}
