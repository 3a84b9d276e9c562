//! The repository above a workspace, found and refused, with real repositories.

use super::super::testing::Place;
use super::*;

fn found(place: &Place, path: &Path) -> Option<Result<Above, String>> {
    let guard = Guard { state_dir: "/nonexistent".into(), home: None };
    let (_, record) = workspace::open_as(&place.who, path, Access::Read, &guard).expect("opened");
    above(&place.who, &record, &guard).expect("answered")
}

#[test]
fn a_directory_below_the_top_has_its_repository_and_its_own_part_of_it() {
    let place = Place::new();
    let (top, _) = place.repository("app");
    let above = found(&place, &top.join("dir")).expect("one").expect("shown");
    assert_eq!((above.root.as_path(), above.below.as_str()), (top.as_path(), "dir"));
    let dir = std::fs::File::open(top.join(".git")).expect("open").into();
    let replaced = parts(&place.who, &above, dir).expect("answered").expect("shown");
    let names: Vec<_> = replaced.iter().map(|r| (r.path.to_string(), r.made)).collect();
    assert_eq!(names, [("info/sparse-checkout".to_owned(), true), ("index".to_owned(), false)]);
    assert_eq!(replaced[0].content, b"/dir/\n");
    // The top itself, another repository in it, and what is in none.
    assert_eq!(found(&place, &top), None);
    place.sh(&top, "git init -q dir/nested; mkdir ../plain");
    assert_eq!(found(&place, &top.join("dir/nested")), None);
    assert_eq!(found(&place, &place.path("plain")), None);
}

#[test]
fn a_repository_that_is_not_shown_is_named_with_the_reason() {
    let place = Place::new();
    let (top, _) = place.repository("app");
    place.sh(&top, "git worktree add -q ../tree; mkdir 'dir/a:b'; git update-index --split-index");
    let why = |path: &Path| found(&place, path).expect("one").expect_err("not shown");
    assert!(why(&place.path("tree/dir")).contains("worktree"));
    assert!(why(&top.join("dir/a:b")).contains("colon"));
    assert!(why(&top.join("dir")).contains("--no-split-index"));
    place.git(&top, &["update-index", "--no-split-index"]);
    place.sh(&top, "ln -s dir/b.txt x; mv .git real; ln -s real .git");
    assert!(why(&top.join("dir")).contains("leads elsewhere"));
    place.sh(&top, "rm .git; mv real .git");
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&top, Some(9), None).expect("given away");
        assert!(why(&top.join("dir")).contains("belongs to uid 9"));
        std::os::unix::fs::chown(&top, Some(place.who.uid), None).expect("given back");
    }
    let guard = Guard { state_dir: "/nonexistent".into(), home: Some(top.clone()) };
    let (_, record) = workspace::open_as(&place.who, &top.join("dir"), Access::Read, &guard).expect("opened");
    let home = above(&place.who, &record, &guard).expect("answered").expect("one").expect_err("a home");
    assert!(home.contains("home"), "{home}");
}
