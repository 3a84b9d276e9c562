//! What goes on from a change set has the tree that the agent left.

use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

fn owner() -> (u32, u32) {
    (somebody().uid, somebody().gid)
}

pub(super) fn check_out(
    shelf: &JobShelf,
    changes: &ChangeSet,
    original: &Path,
    dir: &Path,
    step: Step,
) -> Result<CheckedOut, ApplyError> {
    let (fd, who) = (open(original), somebody());
    let what = Checkout { shelf, changes, original: Some(fd), original_path: original, dir, identity: &who };
    super::super::checkout::stepwise(&what, step)
}

fn no_step() -> Step {
    Arc::new(|| Ok(()))
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
        let done = check_out(&shelf, &changes, &target, &out, no_step()).expect("checked out");
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
        let error = check_out(&shelf, &changes, &target, &home.join(taken), no_step()).expect_err("taken");
        assert!(matches!(error, ApplyError::Occupied { .. }), "{error}");
    }
    check_out(&shelf, &changes, &target, &home.join("empty"), no_step()).expect("fits");
    assert_eq!(read(&home.join("empty"), &who), after);
    // A content that is not there any more: nothing is made.
    let lost = changes.entries.iter_mut().find_map(|entry| match &mut entry.after {
        Some(crate::change::Node::File { blob, .. }) => Some(blob),
        _ => None,
    });
    *lost.expect("a file") = Some(crate::change::BlobId::of_digest([7; 32]));
    let now = read(&home, &who);
    check_out(&shelf, &changes, &target, &home.join("failed"), no_step()).expect_err("a content is missing");
    assert_eq!(read(&home, &who), now);
    // Where the submitter may not write, nothing is made either.
    let denied =
        check_out(&shelf, &changes, &target, &dir.path().join("roots"), no_step()).expect_err("not theirs");
    assert!(matches!(denied, ApplyError::Io { .. }), "{denied}");
}

/// Where a checkout goes: in a directory of the submitter's, where it is filled under another name; or in an empty one of
/// theirs below one that is not.
fn places(dir: &Path) {
    let who = somebody();
    write(&Tree::new(), &dir.join("open"), &who);
    std::fs::create_dir(dir.join("closed")).expect("made");
    write(&Tree::new(), &dir.join("closed/out"), &who);
}

#[test]
fn a_checkout_that_is_killed_at_any_step_leaves_nothing_or_all_and_can_be_made_again() {
    let dir = scratch();
    let (before, after) = before_and_after();
    for (what, place) in [("checkout", "open/out"), ("checkout-in", "closed/out")] {
        let (mut none, mut all) = (0, 0);
        for die_at in 0.. {
            let here = dir.path().join(format!("{what}-{die_at}"));
            std::fs::create_dir(&here).expect("made");
            let (shelf, target, place) = (shelf_in(&here), here.join("t"), here.join(place));
            let changes = difference(&before, &after, &shelf);
            shelf.put_changes(&changes).expect("kept");
            write(&before, &target, &somebody());
            places(&here);
            let found =
                || (place.exists().then(|| read(&place, &somebody())), names(place.parent().unwrap()));
            let was = found();
            let died = dies(what, die_at, &here);
            assert_eq!(recover_checkouts(&shelf).expect("put right"), usize::from(died), "{what} {die_at}");
            let is = found();
            let left = names(shelf.dir()).into_iter().filter(|name| name.starts_with("checkout")).count();
            assert_eq!((left, read(&target, &somebody())), (0, before.clone()), "{what} {die_at}");
            match is.0 == Some(after.clone()) {
                true => all += 1,
                false => {
                    assert_eq!(is, was, "{what} {die_at}");
                    none += 1;
                    check_out(&shelf, &changes, &target, &place, no_step()).expect("again");
                }
            }
            assert_eq!(
                (read(&place, &somebody()), names(place.parent().unwrap())),
                (after.clone(), vec!["out".to_owned()])
            );
            if !died {
                break;
            }
        }
        assert!(none > 10 && all > 0, "{what}: {none} {all}");
    }
}

fn names(dir: &Path) -> Vec<String> {
    let listed = std::fs::read_dir(dir).expect("listed");
    listed.map(|entry| entry.expect("listed").file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn a_failure_at_any_step_of_a_checkout_leaves_nothing() {
    let dir = scratch();
    let (before, after) = before_and_after();
    let (shelf, target) = (shelf_in(dir.path()), dir.path().join("t"));
    let changes = difference(&before, &after, &shelf);
    write(&before, &target, &somebody());
    places(dir.path());
    for place in ["open/out", "closed/out"].map(|place| dir.path().join(place)) {
        let mut failed = 0;
        for fail_at in 0.. {
            let count = AtomicU32::new(0);
            let step: Step = Arc::new(move || {
                let full = count.fetch_add(1, Ordering::Relaxed) == fail_at;
                if full { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(()) }
            });
            let was = (place.exists(), names(place.parent().unwrap()));
            match check_out(&shelf, &changes, &target, &place, step) {
                Ok(_) => break,
                Err(error) => assert!(matches!(error, ApplyError::DiskFull { .. }), "{error}"),
            }
            failed += 1;
            assert_eq!((place.exists(), names(place.parent().unwrap())), was, "{fail_at}");
            assert!(!place.exists() || names(&place).is_empty(), "{fail_at}");
            assert!(names(shelf.dir()).iter().all(|name| !name.starts_with("checkout")));
        }
        assert_eq!(read(&place, &somebody()), after);
        assert!(failed > 10, "{failed}");
    }
}
