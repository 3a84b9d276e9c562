//! What goes on from a change set has the tree that the agent left.

use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

fn owner() -> (u32, u32) {
    (somebody().uid, somebody().gid)
}

fn check_out(
    shelf: &JobShelf,
    changes: &ChangeSet,
    original: &Path,
    dir: &Path,
) -> Result<CheckedOut, ApplyError> {
    let (fd, who) = (open(original), somebody());
    let what = Checkout { shelf, changes, original: Some(fd), original_path: original, dir, identity: &who };
    checkout(&what)
}

#[test]
fn copies_and_checkouts_are_what_the_agent_left() {
    let mut runner = TestRunner::new(Config { cases: CASES / 4, ..cases() });
    let ran = runner.run(&(edits(30), edits(20)), |(base, changes)| {
        let (dir, who) = (scratch(), somebody());
        let base = edited(Tree::new(), &base);
        let after = edited(base.clone(), &changes);
        let (shelf, target) = (shelf_in(dir.path()), dir.path().join("t"));
        let changes = difference(&base, &after, &shelf);
        write(&base, &target, &who);
        // Beside the original, which is the submitter's directory.
        let home = dir.path().join("home");
        write(&Tree::new(), &home, &who);
        let out = home.join("out");
        let done = check_out(&shelf, &changes, &target, &out).expect("checked out");
        prop_assert!(done.left_out.is_empty(), "{:?}", done.left_out);
        prop_assert_eq!(read(&out, &who), after.clone());
        prop_assert_eq!(read(&target, &who), base);
        materialise_plain(&shelf, &changes, &target, owner()).expect("written");
        prop_assert_eq!(read(&target, &who), after);
        Ok(())
    });
    ran.expect("holds");
}

#[test]
fn a_layer_over_the_original_is_what_the_agent_left() {
    assert!(rustix::process::geteuid().is_root(), "this test mounts: run it as root");
    let mut runner = TestRunner::new(Config { cases: 60, ..cases() });
    let changed = AtomicU32::new(0);
    let ran = runner.run(&(edits(30), edits(20)), |(base, changes)| {
        let (dir, who) = (scratch(), somebody());
        let base = edited(Tree::new(), &base);
        let after = edited(base.clone(), &changes);
        let (shelf, lower) = (shelf_in(dir.path()), dir.path().join("lower"));
        let changes = difference(&base, &after, &shelf);
        changed.fetch_add(changes.entries.len() as u32, Ordering::Relaxed);
        write(&base, &lower, &who);
        let [upper, work, merged] = ["upper", "work", "merged"].map(|name| dir.path().join(name));
        for made in [&upper, &work, &merged] {
            write(&Tree::new(), made, &who);
        }
        let below = open(&lower);
        let left = materialise(&shelf, &changes, &upper, Some(std::os::fd::AsFd::as_fd(&below)), owner());
        prop_assert!(left.expect("written").is_empty());
        let options = format!(
            "lowerdir={},upperdir={},workdir={},redirect_dir=off,metacopy=off,index=off,xino=off",
            lower.display(),
            upper.display(),
            work.display()
        );
        let options = std::ffi::CString::new(options).expect("text");
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("overlay", &merged, "overlay", flags, Some(options.as_c_str()))
            .expect("mounted");
        let seen = read(&merged, &who);
        rustix::mount::unmount(&merged, rustix::mount::UnmountFlags::DETACH).expect("unmounted");
        prop_assert_eq!(seen, after);
        Ok(())
    });
    ran.expect("holds");
    assert!(changed.into_inner() > 60);
}

#[test]
fn a_checkout_needs_an_empty_place_and_a_failed_one_leaves_none() {
    let (dir, who) = (scratch(), somebody());
    let (before, after) = before_and_after();
    let (shelf, target, home) = (shelf_in(dir.path()), dir.path().join("t"), dir.path().join("home"));
    let mut changes = difference(&before, &after, &shelf);
    write(&before, &target, &who);
    let place = tree(&[
        ("full", Thing::Dir { mode: 0o755 }),
        ("full/x", file("x")),
        ("empty", Thing::Dir { mode: 0o700 }),
    ]);
    write(&place, &home, &who);
    for taken in ["full", "full/x"] {
        let error = check_out(&shelf, &changes, &target, &home.join(taken)).expect_err("taken");
        assert!(matches!(error, ApplyError::Occupied { .. }), "{error}");
    }
    check_out(&shelf, &changes, &target, &home.join("empty")).expect("fits");
    assert_eq!(read(&home.join("empty"), &who), after);
    // A content that is not there any more: nothing is made.
    let lost = changes.entries.iter_mut().find_map(|entry| match &mut entry.after {
        Some(crate::change::Node::File { blob, .. }) => Some(blob),
        _ => None,
    });
    *lost.expect("a file") = Some(crate::change::BlobId::of_digest([7; 32]));
    let now = read(&home, &who);
    check_out(&shelf, &changes, &target, &home.join("failed")).expect_err("a content is missing");
    assert_eq!(read(&home, &who), now);
    // Where the submitter may not write, nothing is made either.
    let denied = check_out(&shelf, &changes, &target, &dir.path().join("roots")).expect_err("not theirs");
    assert!(matches!(denied, ApplyError::Io { .. }), "{denied}");
}
