//! Targets that are not as they should be: changed meanwhile, full, barred, another's.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::*;
use crate::change::{Entry, Flag, Node, Verdict};

fn conflicts(result: Result<Applied, ApplyError>) -> Vec<(String, String)> {
    match result {
        Err(ApplyError::Conflicts(all)) => {
            all.into_iter().map(|one| (one.path.to_string(), one.why)).collect()
        }
        other => panic!("no conflict: {other:?}"),
    }
}

/// A target with `base` in it, and the change to `after`.
fn set_up(base: &Tree, after: &Tree) -> (tempfile::TempDir, JobShelf, ChangeSet, std::path::PathBuf) {
    let dir = scratch();
    let (shelf, target) = (shelf_in(dir.path()), dir.path().join("t"));
    let changes = difference(base, after, &shelf);
    write(base, &target, &somebody());
    (dir, shelf, changes, target)
}

fn entry<'a>(changes: &'a mut ChangeSet, at: &str) -> &'a mut Entry {
    changes.entries.iter_mut().find(|entry| entry.path == path(at)).expect("an entry")
}

#[test]
fn every_conflict_is_named_and_nothing_is_changed() {
    let (before, after) = before_and_after();
    let (_dir, shelf, changes, target) = set_up(&before, &after);
    std::fs::write(target.join("edit"), "mine\n").expect("written");
    std::fs::write(target.join("dir-to-file/mine"), "mine").expect("written");
    std::fs::create_dir(target.join("new")).expect("made");
    std::fs::write(target.join("new/deep"), "mine").expect("written");
    let now = target.join("closed");
    std::fs::set_permissions(&now, std::fs::Permissions::from_mode(0o755)).expect("set");
    std::fs::remove_file(now.join("in")).expect("removed");
    let there = || {
        let count = |dir: &Path| std::fs::read_dir(dir).expect("listed").count();
        (count(&target), std::fs::read(target.join("edit")).expect("read"))
    };
    let was = there();
    let named = conflicts(try_apply(&shelf, &changes, &target, &Wish::default()));
    let paths: Vec<&str> = named.iter().map(|(path, _)| path.as_str()).collect();
    for path in ["closed/in", "dir-to-file", "edit", "new/deep"] {
        assert!(paths.contains(&path), "{path} is not among {named:?}");
    }
    assert_eq!(there(), was);
    let check = Wish { check: true, only: vec!["gone".to_owned(), "dir".to_owned()], ..Wish::default() };
    assert_eq!(try_apply(&shelf, &changes, &target, &check).expect("fits").applied.len(), 3);
    assert_eq!(there(), was);
    let some = Wish { check: false, ..check };
    assert_eq!(try_apply(&shelf, &changes, &target, &some).expect("applied").applied.len(), 3);
    assert!(!target.join("gone").exists() && !target.join("dir").exists() && target.join("edit").exists());
}

#[test]
fn what_is_left_out_takes_along_what_depends_on_it() {
    let (before, after) = before_and_after();
    let (_dir, shelf, mut changes, target) = set_up(&before, &after);
    entry(&mut changes, "new").verdict = Verdict::Refused;
    entry(&mut changes, "dir-to-file/in").verdict = Verdict::Flagged;
    entry(&mut changes, "dir/below").verdict = Verdict::Flagged;
    entry(&mut changes, "file-to-dir").verdict = Verdict::Flagged;
    entry(&mut changes, "file-to-dir").flags = vec![Flag::Package];
    let applied = try_apply(&shelf, &changes, &target, &Wish::default()).expect("applied");
    let left: Vec<String> = applied.left_out.iter().map(|one| one.path.to_string()).collect();
    let all = [
        "dir-to-file",
        "dir-to-file/in",
        "dir/below",
        "file-to-dir",
        "file-to-dir/in",
        "new",
        "new/deep",
        "new/deep/file",
    ];
    assert_eq!(left, all);
    assert_eq!(applied.kept_dirs, [path("dir")]);
    let now = read(&target, &somebody());
    for at in ["dir", "dir/below", "dir-to-file", "dir-to-file/in", "file-to-dir"] {
        assert_eq!(now.get(&path(at)), before.get(&path(at)), "{at}");
    }
    // With a word the flagged ones come too; the refused one never.
    let wish = Wish { include_flagged: true, ..Wish::default() };
    let applied = try_apply(&shelf, &changes, &target, &wish).expect("applied");
    assert_eq!(applied.left_out.len(), 3);
    let rest: Tree = after.into_iter().filter(|(at, _)| !at.is_at_or_below(&path("new"))).collect();
    assert_eq!(read(&target, &somebody()), rest);
    assert_eq!(decision(&shelf).expect("read").applied.len(), 2);
    discard(&shelf, 7).expect("marked");
    assert_eq!(decision(&shelf).expect("read").discarded.map(|one| one.uid), Some(7));
}

#[test]
fn directories_that_hold_other_things_stay() {
    let base =
        tree(&[("d", Thing::Dir { mode: 0o755 }), ("d/e", Thing::Dir { mode: 0o755 }), ("d/e/f", file("x"))]);
    let (_dir, shelf, changes, target) = set_up(&base, &Tree::new());
    std::fs::write(target.join("d/e/.env"), "SECRET=1").expect("written");
    let applied = try_apply(&shelf, &changes, &target, &Wish::default()).expect("applied");
    assert_eq!((applied.kept_dirs.len(), applied.applied.len()), (2, 1));
    assert!(target.join("d/e/.env").exists() && !target.join("d/e/f").exists());
}

#[test]
fn texts_are_merged_where_that_is_asked_for() {
    let (base, after) = (tree(&[("t", file("1\n2\n3\n4\n5\n"))]), tree(&[("t", file("1\n2\n3\n4\nfive\n"))]));
    let (_dir, shelf, mut changes, target) = set_up(&base, &after);
    std::fs::write(target.join("t"), "one\n2\n3\n4\n5\n").expect("written");
    assert_eq!(conflicts(try_apply(&shelf, &changes, &target, &Wish::default())).len(), 1);
    let wish = Wish { three_way: true, ..Wish::default() };
    let applied = try_apply(&shelf, &changes, &target, &wish).expect("merged");
    assert_eq!(applied.merged, [path("t")]);
    assert_eq!(std::fs::read_to_string(target.join("t")).expect("read"), "one\n2\n3\n4\nfive\n");
    assert_eq!(try_apply(&shelf, &changes, &target, &wish).expect("again").already, [path("t")]);
    std::fs::write(target.join("t"), "1\n2\n3\n4\nFIVE\n").expect("written");
    let named = conflicts(try_apply(&shelf, &changes, &target, &wish));
    assert!(named[0].1.contains("same lines"), "{named:?}");
    // What the original was is not known: never without a word.
    entry(&mut changes, "t").base_changed = true;
    std::fs::write(target.join("t"), "1\n2\n3\n4\n5\n").expect("written");
    assert_eq!(conflicts(try_apply(&shelf, &changes, &target, &Wish::default())).len(), 1);
    assert_eq!(try_apply(&shelf, &changes, &target, &wish).expect("merged").merged.len(), 1);
}

#[test]
fn other_names_of_a_file_keep_what_they_have() {
    let base = tree(&[("a", file("old")), ("m", file("same"))]);
    let after = tree(&[("a", file("new")), ("m", Thing::File { mode: 0o755, content: b"same".to_vec() })]);
    let (dir, shelf, changes, target) = set_up(&base, &after);
    for name in ["a", "m"] {
        std::fs::hard_link(target.join(name), dir.path().join(format!("other-{name}"))).expect("linked");
    }
    try_apply(&shelf, &changes, &target, &Wish::default()).expect("applied");
    assert_eq!(read(&target, &somebody()), after);
    assert_eq!(std::fs::read_to_string(dir.path().join("other-a")).expect("read"), "old");
    assert_eq!(std::fs::metadata(dir.path().join("other-m")).expect("there").mode() & 0o777, 0o644);
}

#[test]
fn what_belongs_to_others_is_named() {
    assert!(rustix::process::geteuid().is_root(), "this test gives files away: run it as root");
    let (before, after) = before_and_after();
    let (dir, shelf, changes, target) = set_up(&before, &after);
    chown(target.join("dir"), Some(0), Some(0)).expect("given away");
    chown(target.join("mode"), Some(0), Some(0)).expect("given away");
    chown(target.join("edit"), Some(0), Some(0)).expect("given away");
    std::fs::set_permissions(target.join("edit"), std::fs::Permissions::from_mode(0o600)).expect("set");
    let named = conflicts(try_apply(&shelf, &changes, &target, &Wish::default()));
    let paths: Vec<&str> = named.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(paths, ["dir", "dir/below", "edit", "mode"], "{named:?}");
    assert!(target.join("dir/below").exists() && target.join("gone").exists());
    // A directory that the submitter cannot write in at all.
    chown(&target, Some(0), Some(0)).expect("given away");
    let named = conflicts(try_apply(
        &shelf,
        &changes,
        &target,
        &Wish { only: vec!["gone".into()], ..Wish::default() },
    ));
    assert!(named[0].1.contains("may not write"), "{named:?}");
    drop(dir);
}

#[test]
fn a_full_disk_is_named_and_leaves_the_tree_as_it_was() {
    assert!(rustix::process::geteuid().is_root(), "this test mounts: run it as root");
    let base = tree(&[("big", file("old")), ("gone", file("x"))]);
    let big = Thing::File { mode: 0o644, content: vec![7; 300_000] };
    let after = tree(&[("big", big.clone()), ("more", big)]);
    let (dir, shelf, changes, _) = set_up(&base, &after);
    let small = dir.path().join("small");
    std::fs::create_dir(&small).expect("made");
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("none", &small, "tmpfs", flags, Some(c"size=400k,mode=0755")).expect("mounted");
    let target = small.join("t");
    write(&base, &target, &somebody());
    let result = try_apply(&shelf, &changes, &target, &Wish::default());
    let (is, left) = (read(&target, &somebody()), std::fs::read_dir(&target).expect("listed").count());
    rustix::mount::unmount(&small, rustix::mount::UnmountFlags::DETACH).expect("unmounted");
    assert!(matches!(result, Err(ApplyError::DiskFull { .. })), "{result:?}");
    assert_eq!((is, left), (base, 2));
    assert!(!shelf.dir().join("apply").exists());
}

#[test]
fn links_that_are_swapped_in_lead_nowhere() {
    let base = tree(&[("d", Thing::Dir { mode: 0o755 }), ("d/f", file("old")), ("d/g", file("g"))]);
    let after = tree(&[("d", Thing::Dir { mode: 0o755 }), ("d/f", file("new")), ("d/n", file("n"))]);
    let (dir, shelf, changes, target) = set_up(&base, &after);
    let outside = dir.path().join("outside");
    let precious = tree(&[("f", file("old")), ("g", file("g"))]);
    write(&precious, &outside, &somebody());
    symlink(&outside, target.join("swap")).expect("linked");
    let stop = Arc::new(AtomicBool::new(false));
    let (halt, at) = (Arc::clone(&stop), open(&target));
    let swapper = std::thread::spawn(move || {
        let mut swaps = 0_u64;
        while !halt.load(Ordering::Relaxed) {
            let _ = rustix::fs::renameat_with(&at, "d", &at, "swap", rustix::fs::RenameFlags::EXCHANGE);
            swaps += 1;
        }
        swaps
    });
    let (mut applied, mut refused) = (0, 0);
    while applied + refused < 300 {
        match try_apply(&shelf, &changes, &target, &Wish::default()) {
            Ok(_) => applied += 1,
            Err(ApplyError::Conflicts(_) | ApplyError::Io { .. }) => refused += 1,
            Err(ApplyError::Stuck { .. }) => break,
            Err(error) => panic!("{error}"),
        }
    }
    stop.store(true, Ordering::Relaxed);
    assert!(swapper.join().expect("joined") > 100);
    assert_eq!(read(&outside, &somebody()), precious, "nothing outside was touched");
    assert!(refused > 0);
}

#[test]
fn what_a_user_writes_between_two_steps_is_never_lost() {
    let (before, after) = before_and_after();
    let dir = scratch();
    let all = steps(dir.path());
    let (mut kept, mut done) = (0, 0);
    for at in 0..all {
        for victim in ["edit", "gone", "new", "dir/mine"] {
            let here = dir.path().join(format!("{at}-{}", victim.replace('/', "-")));
            std::fs::create_dir(&here).expect("made");
            let (shelf, target) = (shelf_in(&here), here.join("t"));
            let changes = difference(&before, &after, &shelf);
            write(&before, &target, &somebody());
            let (count, at_target) = (AtomicU32::new(0), target.join(victim));
            let wrote = Arc::new(AtomicBool::new(false));
            let told = Arc::clone(&wrote);
            let step: Step = Arc::new(move || {
                if count.fetch_add(1, Ordering::Relaxed) == at && !at_target.is_dir() {
                    let written = std::fs::write(&at_target, "written by the user meanwhile");
                    told.store(written.is_ok(), Ordering::Relaxed);
                }
                Ok(())
            });
            let (identity, wish) = (&somebody(), &Wish::default());
            let apply = Apply {
                shelf: &shelf,
                changes: &changes,
                target: open(&target),
                path: &target,
                identity,
                wish,
            };
            let result = stepwise(&apply, step);
            let mine = b"written by the user meanwhile".to_vec();
            let now = read(&target, &somebody());
            if wrote.load(Ordering::Relaxed) {
                let found = now
                    .values()
                    .any(|thing| matches!(thing, Thing::File { content, .. } if *content == mine));
                assert!(found, "{victim} at step {at}: {result:?}");
                kept += 1;
            }
            match result {
                Ok(_) => done += 1,
                Err(ApplyError::Conflicts(_)) => {
                    let same = |at: &TreePath| *at != path(victim);
                    let others: Tree = now.into_iter().filter(|(at, _)| same(at)).collect();
                    assert_eq!(
                        others,
                        before.clone().into_iter().filter(|(at, _)| same(at)).collect(),
                        "{victim} {at}"
                    );
                }
                Err(ApplyError::Stuck { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
    assert!(kept > 50 && done > 10, "{kept} {done}");
}

#[test]
fn setuid_files_and_specials_are_never_made() {
    let (before, after) = (Tree::new(), tree(&[("s", file("x")), ("t", file("y"))]));
    let (_dir, shelf, mut changes, target) = set_up(&before, &after);
    if let Some(Node::File { mode, .. }) = &mut entry(&mut changes, "s").after {
        *mode = 0o4755;
    }
    let wish = Wish { include_flagged: true, ..Wish::default() };
    let applied = try_apply(&shelf, &changes, &target, &wish).expect("applied");
    assert_eq!((applied.applied, applied.left_out.len()), (vec![path("t")], 1));
    assert!(!target.join("s").exists());
}

#[test]
fn a_change_set_is_applied_by_one_at_a_time() {
    let (before, after) = before_and_after();
    let (_dir, shelf, changes, target) = set_up(&before, &after);
    let (started, wait) = std::sync::mpsc::sync_channel::<()>(0);
    let (go_on, released) = std::sync::mpsc::sync_channel::<()>(0);
    let (released, count) = (std::sync::Mutex::new(released), AtomicU32::new(0));
    let step: Step = Arc::new(move || {
        // In the middle of the moves.
        if count.fetch_add(1, Ordering::Relaxed) == 15 {
            started.send(()).expect("heard");
            released.lock().expect("whole").recv().expect("told");
        }
        Ok(())
    });
    std::thread::scope(|scope| {
        let first = scope.spawn(|| {
            let (identity, wish) = (&somebody(), &Wish::default());
            let target_fd = open(&target);
            let what =
                Apply { shelf: &shelf, changes: &changes, target: target_fd, path: &target, identity, wish };
            stepwise(&what, step)
        });
        wait.recv().expect("begun");
        let second = try_apply(&shelf, &changes, &target, &Wish::default());
        assert!(matches!(second, Err(ApplyError::Busy)), "{second:?}");
        assert!(matches!(recover(&shelf, &open(&target)), Err(ApplyError::Busy)));
        assert!(matches!(give_up(&shelf), Err(ApplyError::Busy)));
        go_on.send(()).expect("heard");
        first.join().expect("joined").expect("applied");
    });
    assert_eq!(read(&target, &somebody()), after);
    nothing_left(&target, &shelf);
}
