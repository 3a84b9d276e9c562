//! The power goes while a change set is applied: all or nothing is there when it is back.

use super::*;
use crate::changes::testing::Disk;

#[test]
fn a_power_cut_at_any_step_leaves_all_or_nothing() {
    let (disk, count) = (Disk::new(), scratch());
    let (before, after) = before_and_after();
    let all = steps(count.path());
    let (mut old, mut new) = (0, 0);
    for cut_at in 0..=all {
        let here = disk.path().join(cut_at.to_string());
        std::fs::create_dir(&here).expect("made");
        let (shelf, target) = (shelf_in(&here), here.join("t"));
        let changes = difference(&before, &after, &shelf);
        shelf.put_changes(&changes).expect("kept");
        write(&before, &target, &somebody());
        disk.flush();
        let (off, count) = (disk.off(), AtomicU32::new(0));
        let step: Step = Arc::new(move || {
            if count.fetch_add(1, Ordering::Relaxed) == cut_at {
                off.now();
            }
            Ok(())
        });
        let (identity, wish) = (&somebody(), &Wish::default());
        let apply =
            Apply { shelf: &shelf, changes: &changes, target: open(&target), path: &target, identity, wish };
        let applied = stepwise(&apply, step);
        drop(apply);
        disk.cut_power();
        let became = recover(&shelf, &open(&target)).expect("put right");
        let there = read(&target, &somebody());
        if applied.is_ok() || matches!(became, Recovered::Finished(_)) {
            new += 1;
            assert_eq!(there, after, "step {cut_at}");
            assert_eq!(decision(&shelf).expect("read").applied.len(), 1);
        } else {
            old += 1;
            assert_eq!(there, before, "step {cut_at}: {became:?}");
            assert!(decision(&shelf).expect("read").applied.is_empty());
        }
        nothing_left(&target, &shelf);
        assert_eq!(shelf.changes().expect("read").expect("there").0, changes);
    }
    assert!(old > 20 && new >= 1, "{old} {new}");
}

#[test]
fn more_files_and_directories_than_are_flushed_at_once_outlive_a_power_cut() {
    let disk = Disk::new();
    let mut after = Tree::new();
    for dir in 0..150 {
        after.insert(path(&format!("d{dir:03}")), Thing::Dir { mode: 0o755 });
        for name in 0..3 {
            after.insert(path(&format!("d{dir:03}/f{name}")), file(&format!("{dir} {name}\n").repeat(50)));
        }
    }
    // Half of it is there and goes away, with whole directories.
    let before: Tree = after
        .iter()
        .filter(|(path, _)| path.as_bytes() >= &b"d076"[..])
        .map(|(p, t)| (p.clone(), t.clone()))
        .collect();
    for (from, to) in [(&before, &after), (&after, &before)] {
        let here = disk.path().join(from.len().to_string());
        std::fs::create_dir(&here).expect("made");
        let (shelf, target) = (shelf_in(&here), here.join("t"));
        let changes = difference(from, to, &shelf);
        write(from, &target, &somebody());
        disk.flush();
        try_apply(&shelf, &changes, &target, &Wish::default()).expect("applied");
        disk.cut_power();
        assert_eq!(&read(&target, &somebody()), to);
        assert_eq!(decision(&shelf).expect("read").applied.len(), 1);
        nothing_left(&target, &shelf);
    }
}
