//! Private copies against the real kernel: what the cell does to them, what of it reaches the original (nothing), and
//! that nothing is left of them whatever moment the daemon dies at.

use std::time::Duration;

use hotcell::change::TreePath;
use hotcell::workspace::{
    Copied, CopyLimits, Form, Hidden, Mask, Replaced, copy, lower_of, masked, parts_of,
};

use super::*;

const LIMITS: CopyLimits =
    CopyLimits { bytes_max: 1 << 24, entries_max: 10_000, time_max: Duration::from_secs(60) };

/// The copy of `work` for the cell in `cell`, and its scratch space.
fn copied(
    bench: &Bench,
    who: &Identity,
    groups: &[u32],
    work: &Path,
    cell: &Path,
    mask: &Mask,
) -> (Copied, Scratch) {
    let (dir, record) = open_as(who, work, Access::Read, &bench.guard()).expect("opens");
    let lower = lower_of(cell, None).expect("layers");
    let ids = CellIds { cell_groups: groups, ..ids(who) };
    stage(&dir, &record, &ids, Mode::ReadOnly, &lower).expect("stages");
    let scratch = Scratch::create(cell, &bench.plan(), CELL_UID, CELL_GID).expect("scratch");
    let copied = copy(cell, None, &scratch, (&lower, None), mask, &LIMITS).expect("a copy");
    (copied, scratch)
}

/// Every path below `dir` with kind, owner, mode, content and times.
fn snapshot(dir: &Path) -> Vec<String> {
    let line =
        "find . -printf '%p %y %U:%G %m %s %T@ %l\\n' | sort; find . -type f | sort | xargs -r sha256sum";
    let output = Command::new("sh").args(["-c", line]).current_dir(dir).output().expect("sh");
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}

/// As the daemon does it: again while something else (a container that is just made has all mounts for a moment) holds
/// the scratch space.
fn swept(bench: &Bench, id: &CellId) {
    let report = sweep(&bench.cells(), &|_| false).expect("sweep");
    assert_eq!((&report.removed, &report.left), (&vec![id.clone()], &vec![]), "{report:?}");
    assert_eq!(report.detached, 0, "{report:?}");
    bench.nothing_left();
}

#[test]
fn what_a_cell_does_to_its_copy_stays_in_the_upper_directory() {
    let bench = Bench::new();
    let work = bench.workspace("work", USER, 0o2775);
    fs::create_dir(work.join("src")).expect("mkdir");
    fs::write(work.join("src/a.rs"), "old").expect("write");
    fs::write(work.join("gone"), "x").expect("write");
    for name in ["src", "src/a.rs", "gone"] {
        chown(work.join(name), Some(USER), Some(USER)).expect("chown");
    }
    // A second name outside, and something that is mounted inside.
    let outside = bench.root.path().join("outside");
    fs::hard_link(work.join("src/a.rs"), &outside).expect("link");
    let secret = bench.workspace("secret", 0, 0o755);
    fs::create_dir(work.join("mounted")).expect("mkdir");
    rustix::mount::mount_bind(&secret, work.join("mounted")).expect("bind");
    let before = snapshot(&work);
    let (id, cell) = bench.cell(1);
    let (copied, scratch) = copied(&bench, &person(USER), &[], &work, &cell, &Mask::default());
    assert_eq!((copied.parts.form, copied.notes.len()), (Form::Overlay, 0));
    assert_eq!(parts_of(&cell, None), Some(copied.parts.clone()));
    let seen = as_cell(
        &copied.path,
        "stat -c '%u:%g %a' . && cat src/a.rs && echo new >src/a.rs && rm gone && mkdir d && cat src/a.rs",
    );
    assert_eq!(stdout(&seen), format!("{CELL_UID}:{CELL_GID} 2775\noldnew"));
    assert_eq!(snapshot(&work), before, "the original is as it was");
    assert_eq!(fs::read_to_string(&outside).expect("read"), "old");
    assert_eq!(stdout(&as_cell(&copied.path, "ls mounted")), "");
    let upper = &copied.parts.dir;
    assert_eq!(fs::read_to_string(upper.join("src/a.rs")).expect("copied up"), "new\n");
    let hole = fs::symlink_metadata(upper.join("gone")).expect("a hole");
    assert_eq!((hole.rdev(), hole.mode() & 0o170_000), (0, 0o020_000));
    assert_eq!(fs::metadata(upper.join("d")).expect("d").uid(), CELL_UID);
    // What is private stays so: another user of the host has no way to the copy's layers.
    for dir in [upper.parent().expect("copy").to_owned(), cell.join("layers")] {
        assert!(!as_uid(Path::new("/"), &format!("ls {dir:?}"), USER, USER).status.success(), "{dir:?}");
    }
    // The scratch space's limits hold for the copy.
    let full = as_cell(&copied.path, "dd if=/dev/zero of=big bs=1M count=100");
    assert!(String::from_utf8_lossy(&full.stderr).contains("No space left"), "{full:?}");
    drop(scratch);
    assert_eq!(snapshot(&work), before);
    rustix::mount::unmount(work.join("mounted"), rustix::mount::UnmountFlags::empty()).expect("umount");
    swept(&bench, &id);
    assert_eq!(fs::read_to_string(work.join("src/a.rs")).expect("there"), "old");
}

#[test]
fn trees_of_many_owners_work_and_keep_their_walls() {
    let bench = Bench::new();
    let work = bench.workspace("work", USER, 0o755);
    let own = |name: &str, uid: u32, gid: u32, mode: u32| {
        chown(work.join(name), Some(uid), Some(gid)).expect("chown");
        fs::set_permissions(work.join(name), fs::Permissions::from_mode(mode)).expect("mode");
    };
    for name in ["roots", "others", "secret"] {
        fs::write(work.join(name), name).expect("write");
    }
    for name in ["team", "rootdir", "closed"] {
        fs::create_dir(work.join(name)).expect("mkdir");
    }
    fs::write(work.join("rootdir/in"), "in").expect("write");
    fs::write(work.join("team/shared"), "shared").expect("write");
    fs::write(work.join("closed/x"), "x").expect("write");
    own("roots", 0, 0, 0o644);
    own("others", 4243, 4243, 0o664);
    own("secret", 0, 0, 0o600);
    own("closed", 0, 0, 0o700);
    own("team/shared", 4243, 777, 0o664);
    own("team", 4243, 777, 0o2775);
    own("rootdir", 0, 0, 0o755);
    let before = snapshot(&work);
    let who = Identity { uid: USER, gid: USER, groups: vec![777] };
    let group = 0x6000_0009;
    let (id, cell) = bench.cell(1);
    let (copied, _scratch) = copied(&bench, &who, &[group], &work, &cell, &Mask::default());
    let can = |line: &str| as_cell(&copied.path, line).status.success();
    // As outside: what others own can be read where its mode says so, and removed from a directory of one's own.
    assert!(can("cat roots others rootdir/in") && can("rm -f roots && echo mine >roots && cat roots"));
    assert!(!can("cat secret") && !can("ls closed") && !can("rm rootdir/in") && !can("echo x >>others"));
    assert!(can("chmod 600 readme && mv readme readme2 && cp -a rootdir copyofit && rm -rf copyofit"));
    let shared = as_uid(
        &copied.path,
        "echo more >>team/shared && echo new >team/new && stat -c %g team/new",
        CELL_UID,
        group,
    );
    assert_eq!(stdout(&shared), group.to_string(), "setgid and the shared group hold");
    assert_eq!(snapshot(&work), before);
    let upper = fs::metadata(copied.parts.dir.join("team/shared")).expect("copied up");
    assert_eq!((upper.uid(), upper.gid(), upper.mode() & 0o7777), (0x7000_0000 + 4243, group, 0o664));
    swept(&bench, &id);
}

#[test]
fn what_is_hidden_is_not_there_and_what_is_replaced_reads_differently() {
    let bench = Bench::new();
    let work = bench.workspace("work", USER, 0o755);
    fs::create_dir_all(work.join("sub/keys/deep")).expect("mkdir");
    for (name, text) in [(".env", "K=1"), ("sub/keys/a", "k"), ("sub/b", "b"), ("config", "token")] {
        fs::write(work.join(name), text).expect("write");
    }
    for name in ["sub", "sub/keys", "sub/b", ".env", "config"] {
        chown(work.join(name), Some(USER), Some(USER)).expect("chown");
    }
    fs::set_permissions(work.join("sub"), fs::Permissions::from_mode(0o2750)).expect("mode");
    let path = |text: &str| TreePath::new(text).expect("path");
    let mask = Mask {
        hidden: vec![
            Hidden { path: path(".env"), is_dir: false },
            Hidden { path: path("sub/keys"), is_dir: true },
            Hidden { path: path("not/there"), is_dir: false },
        ],
        replaced: vec![Replaced { path: path("config"), content: b"masked".to_vec(), made: false }],
    };
    let before = snapshot(&work);
    let look = "ls -A . sub; cat config; cat .env sub/keys/a; stat -c '%u:%g %a' sub config";
    let expected = format!(
        ".:\nconfig\nreadme\nsub\n\nsub:\nb\nmasked{CELL_UID}:{CELL_GID} 2750\n{CELL_UID}:{CELL_GID} 644"
    );
    let (id, cell) = bench.cell(1);
    let (copied, _scratch) = copied(&bench, &person(USER), &[], &work, &cell, &mask);
    let seen = String::from_utf8_lossy(&as_cell(&copied.path, look).stdout).trim().to_owned();
    assert_eq!(seen, expected);
    // A name that is hidden can be taken; the cell's own file is not the user's.
    stdout(&as_cell(
        &copied.path,
        "echo mine >.env; mkdir sub/keys; ls -A sub/keys; echo x >>sub/b; rm -r sub/keys",
    ));
    assert_eq!(snapshot(&work), before);
    swept(&bench, &id);
    // The same where nothing can be written.
    let (id, cell) = bench.cell(2);
    let (dir, record) = open_as(&person(USER), &work, Access::Read, &bench.guard()).expect("opens");
    let lower = lower_of(&cell, None).expect("layers");
    stage(&dir, &record, &ids(&person(USER)), Mode::ReadOnly, &lower).expect("stages");
    let path = masked(&cell, None, &lower, &mask).expect("a view");
    assert_eq!(String::from_utf8_lossy(&as_cell(&path, look).stdout).trim(), expected);
    for (uid, gid) in [(CELL_UID, CELL_GID), (0, 0)] {
        let output = as_uid(&path, "echo x >new; echo x >>readme; rm -f readme", uid, gid);
        assert_eq!(
            String::from_utf8_lossy(&output.stderr).matches("Read-only file system").count(),
            3,
            "{output:?}"
        );
    }
    drop(dir);
    swept(&bench, &id);
}

#[test]
fn a_kept_copy_goes_on_where_it_was() {
    let bench = Bench::new();
    let work = bench.workspace("work", USER, 0o755);
    let (id, cell) = bench.cell(1);
    let (first, scratch) = copied(&bench, &person(USER), &[], &work, &cell, &Mask::default());
    stdout(&as_cell(&first.path, "echo one >new; rm readme"));
    drop(scratch);
    let kept = bench.state().join("kept.img");
    assert!(Scratch::keep(&cell, &kept).expect("kept"));
    swept(&bench, &id);
    let (id, cell) = bench.cell(2);
    let (dir, record) = open_as(&person(USER), &work, Access::Read, &bench.guard()).expect("opens");
    let lower = lower_of(&cell, None).expect("layers");
    stage(&dir, &record, &ids(&person(USER)), Mode::ReadOnly, &lower).expect("stages");
    let scratch = Scratch::restore(&cell, &kept, &bench.plan()).expect("restored").expect("an image");
    let again = copy(&cell, None, &scratch, (&lower, None), &Mask::default(), &LIMITS).expect("a copy");
    assert_eq!(stdout(&as_cell(&again.path, "ls; cat new; echo two >>new; cat new")), "new\none\none\ntwo");
    assert!(work.join("readme").exists() && !work.join("new").exists());
    drop((dir, scratch));
    swept(&bench, &id);
    fs::remove_file(kept).expect("removed");
}

#[test]
fn a_copy_of_every_file_stands_in_and_is_limited() {
    let bench = Bench::new();
    let work = bench.workspace("work", USER, 0o755);
    let (id, cell) = bench.cell(1);
    let (dir, record) = open_as(&person(USER), &work, Access::Read, &bench.guard()).expect("opens");
    let scratch = Scratch::create(&cell, &bench.plan(), CELL_UID, CELL_GID).expect("scratch");
    // As it is where nothing can be staged: there is no directory to lay an overlay over.
    let none = cell.join("nothing");
    let direct = std::os::fd::AsFd::as_fd(&dir);
    let tight = CopyLimits { bytes_max: 1, ..LIMITS };
    let refused = copy(&cell, None, &scratch, (&none, Some(direct)), &Mask::default(), &tight);
    assert!(matches!(refused, Err(WorkspaceError::Copy { .. })), "{refused:?}");
    fs::remove_dir_all(scratch.home().parent().expect("root").join("copy")).expect("removed");
    let copied =
        copy(&cell, None, &scratch, (&none, Some(direct)), &Mask::default(), &LIMITS).expect("a copy");
    assert_eq!(copied.parts.form, Form::Whole);
    assert!(copied.notes[0].starts_with("workspaces are copied file by file: "), "{:?}", copied.notes);
    assert_eq!(parts_of(&cell, None), Some(copied.parts.clone()));
    assert_eq!(fs::read_to_string(copied.path.join("readme")).expect("read"), "hello");
    let _ = record;
    drop((dir, scratch));
    swept(&bench, &id);
}

#[test]
fn making_a_copy_takes_no_time() {
    let bench = Bench::new();
    let work = bench.workspace("work", USER, 0o755);
    for n in 0..2000 {
        fs::write(work.join(format!("f{n}")), "x").expect("write");
    }
    let mut times = Vec::new();
    for n in 0..9 {
        let (id, cell) = bench.cell(n);
        let (dir, record) = open_as(&person(USER), &work, Access::Read, &bench.guard()).expect("opens");
        let scratch = Scratch::create(&cell, &bench.plan(), CELL_UID, CELL_GID).expect("scratch");
        let begun = std::time::Instant::now();
        let lower = lower_of(&cell, None).expect("layers");
        stage(&dir, &record, &ids(&person(USER)), Mode::ReadOnly, &lower).expect("stages");
        copy(&cell, None, &scratch, (&lower, None), &Mask::default(), &LIMITS).expect("a copy");
        times.push(begun.elapsed());
        drop((dir, scratch));
        swept(&bench, &id);
    }
    times.sort_unstable();
    eprintln!("set-up of a copy: {times:?}");
    // The fastest: what else runs on the machine is not its time.
    assert!(times[0] < Duration::from_millis(10), "{times:?}");
}
