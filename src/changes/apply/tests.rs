//! Properties of applying: the tree that the agent left, or the tree that was there, whatever happens.

mod carried;
mod hostile;
mod power;

use std::os::fd::OwnedFd;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::run::{recover_stepwise, stepwise};
use super::*;

use crate::changes::trees::{
    Thing, Tree, difference, edited, edits, read, scratch, shelf_in, somebody, write,
};

const CASES: u32 = 1000;

fn open(path: &Path) -> OwnedFd {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open(path, flags, rustix::fs::Mode::empty()).expect("opened")
}

fn try_apply(shelf: &JobShelf, changes: &ChangeSet, path: &Path, wish: &Wish) -> Result<Applied, ApplyError> {
    apply(&Apply { shelf, changes, target: open(path), path, identity: &somebody(), wish })
}

fn path(text: &str) -> TreePath {
    TreePath::new(text).expect("a path")
}

fn file(text: &str) -> Thing {
    Thing::File { mode: 0o644, content: text.into() }
}

fn tree(things: &[(&str, Thing)]) -> Tree {
    things.iter().map(|(at, thing)| (path(at), thing.clone())).collect()
}

fn cases() -> Config {
    let cases = std::env::var("HOTCELL_APPLY_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(CASES);
    Config { cases, failure_persistence: None, ..Config::default() }
}

#[test]
fn a_fresh_clone_becomes_what_the_agent_left() {
    let mut runner = TestRunner::new(cases());
    let ran = runner.run(&(edits(30), edits(20)), |(base, changes)| {
        let (dir, who) = (scratch(), somebody());
        let base = edited(Tree::new(), &base);
        let after = edited(base.clone(), &changes);
        let (shelf, target) = (shelf_in(dir.path()), dir.path().join("t"));
        let changes = difference(&base, &after, &shelf);
        write(&base, &target, &who);
        match try_apply(&shelf, &changes, &target, &Wish::default()) {
            Ok(applied) => {
                prop_assert_eq!(applied.applied.len(), changes.entries.len());
                prop_assert!(applied.left_out.is_empty() && applied.kept_dirs.is_empty());
            }
            Err(ApplyError::Nothing { .. }) if changes.entries.is_empty() => {}
            Err(error) => prop_assert!(false, "{error}"),
        }
        prop_assert_eq!(read(&target, &who), after.clone());
        // Once more: all is as it should be.
        if !changes.entries.is_empty() {
            let again = try_apply(&shelf, &changes, &target, &Wish::default()).expect("again");
            prop_assert_eq!((again.applied.len(), again.already.len()), (0, changes.entries.len()));
            prop_assert_eq!(decision(&shelf).expect("kept").applied.len(), 1);
        }
        Ok(())
    });
    ran.expect("holds");
}

#[test]
fn what_the_user_did_meanwhile_stays_or_nothing_is_applied() {
    let mut runner = TestRunner::new(Config { cases: CASES / 2, ..cases() });
    let (applied_some, refused_some) = (AtomicU32::new(0), AtomicU32::new(0));
    let ran = runner.run(&(edits(25), edits(10), edits(5)), |(base, changes, own)| {
        let (dir, who) = (scratch(), somebody());
        let base = edited(Tree::new(), &base);
        let after = edited(base.clone(), &changes);
        let theirs = edited(base.clone(), &own);
        let (shelf, target) = (shelf_in(dir.path()), dir.path().join("t"));
        let changes = difference(&base, &after, &shelf);
        write(&theirs, &target, &who);
        match try_apply(&shelf, &changes, &target, &Wish::default()) {
            Ok(applied) => {
                applied_some.fetch_add(1, Ordering::Relaxed);
                let result = read(&target, &who);
                let changed: Vec<&TreePath> = applied.applied.iter().chain(&applied.already).collect();
                for path in &changed {
                    let (is, should) = (result.get(path), after.get(path));
                    prop_assert_eq!(is.map(plain), should.map(plain), "{}", path);
                }
                for (path, thing) in theirs.iter().filter(|(path, _)| !changed.contains(path)) {
                    prop_assert_eq!(result.get(path), Some(thing), "{}", path);
                }
            }
            Err(ApplyError::Conflicts(conflicts)) => {
                refused_some.fetch_add(1, Ordering::Relaxed);
                prop_assert!(!conflicts.is_empty());
                prop_assert_eq!(read(&target, &who), theirs);
            }
            Err(ApplyError::Nothing { .. }) => {}
            Err(error) => prop_assert!(false, "{error}"),
        }
        Ok(())
    });
    ran.expect("holds");
    assert!(applied_some.into_inner() > 20 && refused_some.into_inner() > 20, "both happen");
}

/// A thing without the bits of its mode that a user may have changed beside it.
fn plain(thing: &Thing) -> Thing {
    match thing.clone() {
        Thing::File { mode, content } => Thing::File { mode: mode & 0o100, content },
        Thing::Dir { .. } => Thing::Dir { mode: 0 },
        link @ Thing::Link(_) => link,
    }
}

/// Two trees with every kind of change between them.
fn before_and_after() -> (Tree, Tree) {
    let before = tree(&[
        ("edit", file("old\n")),
        ("mode", file("same\n")),
        ("gone", file("x")),
        ("dir", Thing::Dir { mode: 0o755 }),
        ("dir/below", file("y")),
        ("closed", Thing::Dir { mode: 0o555 }),
        ("closed/in", file("z")),
        ("file-to-dir", file("f")),
        ("dir-to-file", Thing::Dir { mode: 0o755 }),
        ("dir-to-file/in", file("g")),
        ("link", Thing::Link(b"edit".to_vec())),
    ]);
    let after = tree(&[
        ("edit", file("new\n")),
        ("mode", Thing::File { mode: 0o755, content: b"same\n".to_vec() }),
        ("closed", Thing::Dir { mode: 0o555 }),
        ("closed/in", file("zz")),
        ("closed/more", file("more")),
        ("file-to-dir", Thing::Dir { mode: 0o555 }),
        ("file-to-dir/in", file("f")),
        ("dir-to-file", file("g")),
        ("link", Thing::Link(b"elsewhere".to_vec())),
        ("new", Thing::Dir { mode: 0o750 }),
        ("new/deep", Thing::Dir { mode: 0o500 }),
        ("new/deep/file", Thing::File { mode: 0o400, content: vec![0, 1, 2] }),
    ]);
    (before, after)
}

fn nothing_left(target: &Path, shelf: &JobShelf) {
    let hidden = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.expect("listed").file_name().to_string_lossy().starts_with(".hotcell")
    };
    assert!(!std::fs::read_dir(target).expect("listed").any(hidden), "a staging directory is left");
    assert!(!shelf.dir().join("apply").exists(), "a journal is left");
}

/// Steps of applying `before_and_after`, counted.
fn steps(dir: &Path) -> u32 {
    let (before, after) = before_and_after();
    let (shelf, target) = (shelf_in(&dir.join("count")), dir.join("counted"));
    let changes = difference(&before, &after, &shelf);
    write(&before, &target, &somebody());
    let count = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&count);
    let step: Step = Arc::new(move || {
        counter.fetch_add(1, Ordering::Relaxed);
        Ok(())
    });
    let (identity, wish) = (&somebody(), &Wish::default());
    let target_fd = open(&target);
    let apply = Apply { shelf: &shelf, changes: &changes, target: target_fd, path: &target, identity, wish };
    stepwise(&apply, step).expect("applied");
    assert_eq!(read(&target, &somebody()), after);
    nothing_left(&target, &shelf);
    count.load(Ordering::Relaxed)
}

#[test]
fn a_failure_at_any_step_leaves_the_tree_as_it_was() {
    let dir = scratch();
    let (before, after) = before_and_after();
    let all = steps(dir.path());
    assert!(all > 20, "{all} steps");
    // The last one is after the end: only the clean-up is left to fail.
    for fail_at in 0..all - 1 {
        let (shelf, target) =
            (shelf_in(&dir.path().join(fail_at.to_string())), dir.path().join(format!("t{fail_at}")));
        let changes = difference(&before, &after, &shelf);
        write(&before, &target, &somebody());
        let count = AtomicU32::new(0);
        let step: Step = Arc::new(move || {
            let full = count.fetch_add(1, Ordering::Relaxed) == fail_at;
            if full { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(()) }
        });
        let (identity, wish) = (&somebody(), &Wish::default());
        let apply =
            Apply { shelf: &shelf, changes: &changes, target: open(&target), path: &target, identity, wish };
        let error = stepwise(&apply, step).expect_err("it fails");
        assert!(matches!(error, ApplyError::DiskFull { .. }), "{error}");
        assert_eq!(read(&target, &somebody()), before, "step {fail_at}");
        nothing_left(&target, &shelf);
        assert!(decision(&shelf).expect("read").applied.is_empty());
    }
}

const DIE: &str = "HOTCELL_TEST_APPLY_DIES";

/// Not a test of its own: what the next one runs in processes that die.
#[test]
fn child_that_dies_while_it_applies() {
    let Ok(order) = std::env::var(DIE) else { return };
    let mut order = order.splitn(3, ':');
    let mut next = || order.next().expect("what:step:dir");
    let (what, die_at, dir) = (next(), next().parse::<u32>().expect("a number"), next());
    let (dir, count) = (Path::new(dir), AtomicU32::new(0));
    let (shelf, target) = (shelf_in(dir), dir.join("t"));
    let (changes, _) = shelf.changes().expect("read").expect("there");
    let step: Step = Arc::new(move || {
        if count.fetch_add(1, Ordering::Relaxed) == die_at {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        }
        Ok(())
    });
    if what.starts_with("checkout") {
        let place = dir.join(if what == "checkout-in" { "closed/out" } else { "open/out" });
        carried::check_out(&shelf, &changes, &target, &place, step).expect("dies before");
        return;
    }
    if what == "recover" {
        recover_stepwise(&shelf, &open(&target), step).expect("dies before");
        return;
    }
    let (identity, wish) = (&somebody(), &Wish::default());
    let apply =
        Apply { shelf: &shelf, changes: &changes, target: open(&target), path: &target, identity, wish };
    stepwise(&apply, step).expect("dies before");
}

/// Whether a process that applies, or recovers, in `dir` is killed at that step.
fn dies(what: &str, die_at: u32, dir: &Path) -> bool {
    let child = std::process::Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "changes::apply::tests::child_that_dies_while_it_applies"])
        .env(DIE, format!("{what}:{die_at}:{}", dir.display()))
        .output()
        .expect("ran");
    let signal = std::os::unix::process::ExitStatusExt::signal(&child.status);
    assert!(child.status.success() || signal == Some(libc::SIGKILL), "{child:?}");
    signal.is_some()
}

#[test]
fn a_process_killed_while_it_takes_back_leaves_that_to_the_next() {
    let dir = scratch();
    let (before, after) = before_and_after();
    let all = steps(dir.path());
    let mut killed = 0;
    for die_at in 0.. {
        let here = dir.path().join(die_at.to_string());
        std::fs::create_dir(&here).expect("made");
        let (shelf, target) = (shelf_in(&here), here.join("t"));
        shelf.put_changes(&difference(&before, &after, &shelf)).expect("kept");
        write(&before, &target, &somebody());
        // All moved, and not yet done.
        assert!(dies("apply", all - 2, &here));
        let died = dies("recover", die_at, &here);
        let word = recover(&shelf, &open(&target)).expect("put right");
        assert_eq!(word, if died { Recovered::RolledBack } else { Recovered::Nothing });
        assert_eq!(read(&target, &somebody()), before, "step {die_at}");
        nothing_left(&target, &shelf);
        killed += u32::from(died);
        if !died {
            break;
        }
    }
    assert!(killed > 10, "{killed}");
}

#[test]
fn a_process_killed_at_any_step_leaves_all_or_nothing() {
    let dir = scratch();
    let (before, after) = before_and_after();
    let all = steps(dir.path());
    let (mut old, mut new) = (0, 0);
    for die_at in 0..all {
        let here = dir.path().join(die_at.to_string());
        std::fs::create_dir(&here).expect("made");
        let (shelf, target) = (shelf_in(&here), here.join("t"));
        shelf.put_changes(&difference(&before, &after, &shelf)).expect("kept");
        write(&before, &target, &somebody());
        assert!(dies("apply", die_at, &here));
        let (changes, _) = shelf.changes().expect("read").expect("there");
        let waits = try_apply(&shelf, &changes, &target, &Wish::default());
        assert!(matches!(waits, Err(ApplyError::Interrupted { .. })), "{waits:?}");
        assert_eq!(pending(&shelf).expect("read").expect("there").identity, somebody());
        let elsewhere = recover(&shelf, &open(dir.path()));
        assert!(matches!(elsewhere, Err(ApplyError::TargetMoved { .. })));
        match recover(&shelf, &open(&target)).expect("put right") {
            Recovered::RolledBack => {
                old += 1;
                assert_eq!(read(&target, &somebody()), before, "step {die_at}");
                assert!(decision(&shelf).expect("read").applied.is_empty());
            }
            Recovered::Finished(accepted) => {
                new += 1;
                assert_eq!(read(&target, &somebody()), after, "step {die_at}");
                assert_eq!(decision(&shelf).expect("read").applied, [*accepted]);
            }
            Recovered::Nothing => panic!("something was left at step {die_at}"),
        }
        nothing_left(&target, &shelf);
        assert_eq!(recover(&shelf, &open(&target)).expect("nothing"), Recovered::Nothing);
        // And it can be applied now.
        try_apply(&shelf, &changes, &target, &Wish::default()).expect("applied");
        assert_eq!(read(&target, &somebody()), after);
    }
    assert!(old > 20 && new == 1, "{old} {new}");
}
