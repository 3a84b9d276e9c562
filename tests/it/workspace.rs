//! The workspace hand against the real kernel: opening as another user, staging, scratch space, sweep.
//! Needs root (mounts and second uids are the subject), and leaves no mount, loop device or file.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use hotcell::job::{CellId, Identity};
use hotcell::workspace::{
    Access, CellIds, Guard, Mode, Scratch, ScratchError, ScratchPlan, Staged, StagedIds, WorkspaceError,
    WorkspaceRecord, open_as, reopen_as, stage, stage_program, sweep, unstage,
};

mod copy;
mod writable;

const USER: u32 = 4242;
const CELL_UID: u32 = 0x6000_0007;
const CELL_GID: u32 = 0x6000_0008;

/// A state directory and a place for workspaces; checks at the end that nothing is left over.
struct Bench {
    root: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests mount and change uids: run them as root");
        let root = tempfile::Builder::new().prefix("hotcell-ws-").tempdir().expect("tempdir");
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
        fs::create_dir_all(root.path().join("state/cells")).expect("mkdir");
        Self { root }
    }

    fn guard(&self) -> Guard {
        Guard { state_dir: self.state(), home: None }
    }

    fn state(&self) -> PathBuf {
        self.root.path().join("state")
    }

    fn cells(&self) -> PathBuf {
        self.state().join("cells")
    }

    /// The directory of a new cell.
    fn cell(&self, random: u64) -> (CellId, PathBuf) {
        let id = CellId::new(random);
        let dir = self.cells().join(id.as_str());
        fs::create_dir(&dir).expect("mkdir");
        (id, dir)
    }

    /// A directory of this owner with one file in it.
    fn workspace(&self, name: &str, uid: u32, mode: u32) -> PathBuf {
        let dir = self.root.path().join(name);
        fs::create_dir(&dir).expect("mkdir");
        fs::write(dir.join("readme"), "hello").expect("write");
        for path in [&dir.join("readme"), &dir] {
            chown(path, Some(uid), Some(uid)).expect("chown");
        }
        fs::set_permissions(&dir, fs::Permissions::from_mode(mode)).expect("chmod");
        dir
    }

    fn plan(&self) -> ScratchPlan {
        ScratchPlan {
            bytes_max: 64 << 20,
            inodes_max: 4096,
            host_reserve_bytes: 1 << 20,
            template_dir: self.state().join("templates"),
        }
    }

    fn nothing_left(&self) {
        assert_eq!(mounts_below(self.root.path()), Vec::<String>::new());
        assert_eq!(loops_below(self.root.path()), Vec::<PathBuf>::new());
    }
}

impl Drop for Bench {
    /// A failed test must not leave mounts on the machine either.
    fn drop(&mut self) {
        for point in mounts_below(self.root.path()) {
            let _ = Command::new("umount").args(["-l", &point]).status();
        }
    }
}

/// Mount points below `dir`, the latest first. (Other tests mount at the same time: only ours count.)
fn mounts_below(dir: &Path) -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let points = text.lines().filter_map(|l| l.split(' ').nth(4)).filter(|p| Path::new(p).starts_with(dir));
    let mut points: Vec<String> = points.map(str::to_owned).collect();
    points.reverse();
    points
}

fn loops_below(dir: &Path) -> Vec<PathBuf> {
    let devices = fs::read_dir("/sys/block").expect("sysfs").flatten();
    let files = devices.filter_map(|d| fs::read_to_string(d.path().join("loop/backing_file")).ok());
    files.map(|f| PathBuf::from(f.trim_end())).filter(|f| f.starts_with(dir)).collect()
}

fn person(uid: u32) -> Identity {
    Identity { uid, gid: uid, groups: Vec::new() }
}

fn ids(submitter: &Identity) -> CellIds<'_> {
    CellIds { submitter, cell_uid: CELL_UID, cell_gid: CELL_GID, cell_groups: &[], runtime_maps_ids: true }
}

/// Runs a shell line in `dir` as the cell.
fn as_cell(dir: &Path, line: &str) -> Output {
    as_uid(dir, line, CELL_UID, CELL_GID)
}

fn as_uid(dir: &Path, line: &str, uid: u32, gid: u32) -> Output {
    let mut shell = Command::new("sh");
    shell.args(["-c", line]).current_dir(dir).uid(uid).gid(gid).output().expect("sh runs")
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn staged(bench: &Bench, who: &Identity, path: &Path, mode: Mode, target: &Path) -> Staged {
    let need = if mode == Mode::Bind { Access::Write } else { Access::Read };
    let (dir, record) = open_as(who, path, need, &bench.guard()).expect("opens");
    stage(&dir, &record, &ids(who), mode, target).expect("stages")
}

#[test]
fn what_the_cell_writes_belongs_to_the_submitter() {
    let bench = Bench::new();
    let work = bench.workspace("work", USER, 0o755);
    fs::write(work.join("roots"), "").expect("write"); // owned by root
    let (_, cell) = bench.cell(1);
    let staged = staged(&bench, &person(USER), &work, Mode::Bind, &cell.join("ws"));
    assert_eq!(*staged.ids(), StagedIds::Private { uid: CELL_UID, gid: CELL_GID, groups: vec![] });
    let seen =
        stdout(&as_cell(staged.path(), "stat -c %u:%g . readme roots; echo new >new; mkdir d; rm roots"));
    let own = format!("{CELL_UID}:{CELL_GID}");
    assert_eq!(seen, format!("{own}\n{own}\n{}:{}", 0x7000_0000, 0x7000_0000));
    for name in ["new", "d"] {
        let meta = fs::metadata(work.join(name)).expect(name);
        assert_eq!((meta.uid(), meta.gid()), (USER, USER), "{name}");
    }
    assert!(!work.join("roots").exists(), "the owner of a directory may remove any file in it");
    staged.destroy().expect("gone");
    assert!(work.join("new").exists() && !cell.join("ws").exists());
    bench.nothing_left();
}

#[test]
fn a_cell_of_root_is_not_root_and_its_files_land_as_root() {
    let bench = Bench::new();
    let work = bench.workspace("work", 0, 0o700);
    let (_, cell) = bench.cell(1);
    let staged = staged(&bench, &person(0), &work, Mode::Bind, &cell.join("ws"));
    assert_eq!(
        stdout(&as_cell(staged.path(), "id -u; echo x >new; cat readme")),
        format!("{CELL_UID}\nhello")
    );
    assert_eq!(fs::metadata(work.join("new")).expect("new").uid(), 0);
    // A setuid file of root's is only a file on this mount.
    stdout(&as_cell(staged.path(), "cp /usr/bin/id suid && chmod 4755 suid"));
    assert_eq!(stdout(&as_uid(staged.path(), "./suid -u", CELL_UID, CELL_GID)), CELL_UID.to_string());
    staged.destroy().expect("gone");
    bench.nothing_left();
}

#[test]
fn group_rights_of_the_submitter_hold_inside() {
    let bench = Bench::new();
    let work = bench.workspace("work", USER, 0o755);
    fs::create_dir(work.join("team")).expect("mkdir");
    chown(work.join("team"), Some(1), Some(777)).expect("chown");
    fs::set_permissions(work.join("team"), fs::Permissions::from_mode(0o770)).expect("chmod");
    let who = Identity { uid: USER, gid: USER, groups: vec![777, 778] };
    let cell_groups = [0x6000_0009];
    let ids = CellIds { cell_groups: &cell_groups, ..ids(&who) };
    let (_, cell) = bench.cell(1);
    let (dir, record) = open_as(&who, &work, Access::Write, &bench.guard()).expect("opens");
    let staged = stage(&dir, &record, &ids, Mode::Bind, &cell.join("ws")).expect("stages");
    assert_eq!(staged.note(), Some("1 of your 2 groups are not usable in the cell"));
    assert!(!as_cell(staged.path(), "echo x >team/f").status.success());
    stdout(&as_uid(staged.path(), "echo x >team/f", CELL_UID, cell_groups[0]));
    let meta = fs::metadata(work.join("team/f")).expect("f");
    assert_eq!((meta.uid(), meta.gid()), (USER, 777));
    staged.destroy().expect("gone");
    bench.nothing_left();
}

#[test]
fn read_only_is_read_only_for_the_cell_and_for_root() {
    let bench = Bench::new();
    let work = bench.workspace("work", USER, 0o777);
    let (_, cell) = bench.cell(1);
    let staged = staged(&bench, &person(USER), &work, Mode::ReadOnly, &cell.join("ws"));
    let tries =
        "cat readme; echo x >new; echo x >>readme; rm -f readme; chmod 777 readme; mkdir d; touch readme";
    for (uid, gid) in [(CELL_UID, CELL_GID), (0, 0)] {
        let output = as_uid(staged.path(), tries, uid, gid);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "hello");
        assert_eq!(
            String::from_utf8_lossy(&output.stderr).matches("Read-only file system").count(),
            6,
            "{output:?}"
        );
    }
    assert_eq!(fs::read_dir(&work).expect("list").count(), 1);
    staged.destroy().expect("gone");
    bench.nothing_left();
}

#[test]
fn mounts_inside_the_workspace_do_not_come_along() {
    let bench = Bench::new();
    let work = bench.workspace("work", USER, 0o755);
    let secret = bench.workspace("secret", USER, 0o755);
    for name in ["before", "after"] {
        fs::create_dir(work.join(name)).expect("mkdir");
    }
    let bind = |name: &str| rustix::mount::mount_bind(&secret, work.join(name)).expect("bind");
    bind("before");
    let (_, cell) = bench.cell(1);
    let staged = staged(&bench, &person(USER), &work, Mode::Bind, &cell.join("ws"));
    bind("after");
    assert!(work.join("before/readme").exists() && work.join("after/readme").exists());
    assert_eq!(stdout(&as_cell(staged.path(), "ls before after | grep readme | wc -l")), "0");
    staged.destroy().expect("gone");
    for name in ["before", "after"] {
        rustix::mount::unmount(work.join(name), rustix::mount::UnmountFlags::empty()).expect("umount");
    }
    bench.nothing_left();
}

#[test]
fn mounts_stay_apart_where_the_host_shares_mounts() {
    use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount};
    let bench = Bench::new();
    let root = bench.root.path();
    let work = bench.workspace("work", USER, 0o755);
    let secret = bench.workspace("secret", USER, 0o755);
    fs::create_dir(work.join("late")).expect("mkdir");
    let (id, cell) = bench.cell(1);
    // As systemd has it for `/`: workspace and state directory on one shared mount.
    mount_bind(root, root).expect("bind");
    mount_change(root, MountPropagationFlags::SHARED).expect("shared");
    let ws = cell.join("ws");
    let staged = staged(&bench, &person(USER), &work, Mode::Bind, &ws);
    mount_bind(&secret, work.join("late")).expect("bind");
    assert_eq!(stdout(&as_cell(staged.path(), "ls late")), "");
    mount_bind(&secret, ws.join("late")).expect("bind");
    // Below the staged mount: it did not go to the workspace, and both go in a sweep.
    let report = sweep(&bench.cells(), &|_| false).expect("sweep");
    assert_eq!((report.removed, report.unmounted), (vec![id], 2));
    unmount(work.join("late"), UnmountFlags::empty()).expect("the only mount there");
    assert!(!work.join("late/readme").exists() && secret.join("readme").exists());
    unmount(root, UnmountFlags::empty()).expect("umount");
    bench.nothing_left();
}

#[test]
fn many_cells_at_once_do_not_disturb_each_other() {
    let bench = Bench::new();
    let work = bench.workspace("work", USER, 0o755);
    std::thread::scope(|scope| {
        for n in 0..8 {
            let (bench, work) = (&bench, &work);
            scope.spawn(move || {
                for round in 0..5 {
                    let (_, cell) = bench.cell(n * 10 + round);
                    let who = person(USER);
                    let (dir, record) = open_as(&who, work, Access::Write, &bench.guard()).expect("opens");
                    let cell_id = 0x6000_0000 + n as u32;
                    let ids = CellIds { cell_uid: cell_id, cell_gid: cell_id, ..ids(&who) };
                    let staged = stage(&dir, &record, &ids, Mode::Bind, &cell.join("ws")).expect("stages");
                    let scratch = Scratch::create(&cell, &bench.plan(), cell_id, cell_id).expect("scratch");
                    assert!(scratch.enforced(), "{:?}", scratch.fallback_reason());
                    let file = format!("by-{n}-{round}");
                    stdout(&as_uid(staged.path(), &format!(": >{file}"), cell_id, cell_id));
                    assert_eq!(fs::metadata(work.join(&file)).expect("meta").uid(), USER);
                    fs::write(scratch.home().join("mine"), n.to_string()).expect("write");
                    assert_eq!(fs::read_to_string(scratch.home().join("mine")).expect("read"), n.to_string());
                    scratch.destroy().expect("gone");
                    staged.destroy().expect("gone");
                    fs::remove_dir(&cell).expect("empty");
                }
            });
        }
    });
    assert_eq!(fs::read_dir(work).expect("list").count(), 41);
    bench.nothing_left();
}

#[test]
fn the_kernel_decides_what_a_submitter_may_reach() {
    let bench = Bench::new();
    let open = |uid, path: &Path, need| open_as(&person(uid), path, need, &bench.guard()).map(|_| ());
    let private = bench.workspace("private", 4243, 0o700);
    let below = private.join("below");
    fs::create_dir(&below).expect("mkdir");
    fs::set_permissions(&below, fs::Permissions::from_mode(0o777)).expect("chmod");
    for path in [&private, &below] {
        let refused = open(USER, path, Access::Read).expect_err("another's");
        assert!(
            matches!(&refused, WorkspaceError::Denied { uid: USER, path: p, .. } if p == path),
            "{refused}"
        );
        open(4243, path, Access::Write).expect("their own");
        open(0, path, Access::Write).expect("root may");
    }
    let shared = bench.workspace("shared", 4243, 0o755);
    open(USER, &shared, Access::Read).expect("readable by all");
    let refused = open(USER, &shared, Access::Write).expect_err("not writable");
    assert!(matches!(refused, WorkspaceError::Denied { need: "write", .. }), "{refused}");
    // A group alone opens the door, and the daemon's own groups do not.
    let team = bench.workspace("team", 4243, 0o750);
    chown(&team, None, Some(777)).expect("chown");
    let member = Identity { groups: vec![777], ..person(USER) };
    open_as(&member, &team, Access::Read, &bench.guard()).expect("a member may");
    open(USER, &team, Access::Read).expect_err("others may not");
    // The daemon's own threads kept their rights.
    assert!(fs::read_dir(&private).is_ok() && rustix::process::geteuid().is_root());
}

#[test]
fn each_odd_path_is_refused_with_its_own_reason() {
    let bench = Bench::new();
    let work = bench.workspace("work", USER, 0o755);
    let refuse = |path: &Path| {
        open_as(&person(USER), path, Access::Read, &bench.guard()).map(|_| ()).expect_err("refused")
    };
    symlink(&work, bench.root.path().join("link")).expect("symlink");
    fs::create_dir(work.join("sub")).expect("mkdir");
    for (given, real) in [("link", "work"), ("link/sub", "work/sub")] {
        match refuse(&bench.root.path().join(given)) {
            WorkspaceError::Symlink { component, canonical, .. } => {
                assert_eq!(component, bench.root.path().join("link"));
                assert_eq!(canonical, Some(bench.root.path().join(real)));
            }
            other => panic!("{given}: {other}"),
        }
    }
    assert!(matches!(refuse(&work.join("none")), WorkspaceError::Missing { uid: USER, .. }));
    let readme = work.join("readme");
    assert!(matches!(refuse(&readme), WorkspaceError::NotADirectory { kind: "file", .. }));
    assert!(
        matches!(refuse(&readme.join("x")), WorkspaceError::NotADirectory { path, .. } if path == readme)
    );
    rustix::fs::mknodat(rustix::fs::CWD, work.join("fifo"), rustix::fs::FileType::Fifo, 0o666.into(), 0)
        .expect("mkfifo");
    assert!(matches!(refuse(&work.join("fifo")), WorkspaceError::NotADirectory { kind: "fifo", .. }));
    assert!(matches!(refuse(&bench.state()), WorkspaceError::StateDir { .. }));
    assert!(matches!(refuse(&bench.cells()), WorkspaceError::StateDir { .. }));
    assert!(matches!(refuse(bench.root.path()), WorkspaceError::StateDir { .. }));
    assert!(matches!(refuse(Path::new("/proc")), WorkspaceError::System { .. }));
}

#[test]
fn another_name_for_home_or_state_does_not_pass() {
    let bench = Bench::new();
    let home = bench.workspace("home", USER, 0o755);
    let alias = bench.workspace("alias", USER, 0o755);
    let guard = Guard { home: Some(home.clone()), ..bench.guard() };
    let open = || open_as(&person(USER), &alias, Access::Read, &guard).map(|_| ());
    let umount = || rustix::mount::unmount(&alias, rustix::mount::UnmountFlags::empty()).expect("umount");
    rustix::mount::mount_bind(&home, &alias).expect("bind");
    let refused = open();
    umount();
    assert!(matches!(refused, Err(WorkspaceError::Home { .. })), "{refused:?}");
    rustix::mount::mount_bind(bench.state(), &alias).expect("bind");
    let refused = open();
    umount();
    assert!(matches!(refused, Err(WorkspaceError::StateDir { .. })), "{refused:?}");
    rustix::mount::mount(c"none", &alias, c"proc", rustix::mount::MountFlags::empty(), None).expect("proc");
    let refused = open();
    umount();
    assert!(matches!(refused, Err(WorkspaceError::PseudoFs { fs: "proc", .. })), "{refused:?}");
    open().expect("the plain directory is fine");
}

#[test]
fn a_socket_in_the_top_two_levels_is_refused() {
    let bench = Bench::new();
    let work = bench.workspace("work", USER, 0o755);
    fs::create_dir_all(work.join("a/b")).expect("mkdir");
    let open = || open_as(&person(USER), &work, Access::Read, &bench.guard()).map(|_| ());
    for (name, refused) in [("docker.sock", true), ("a/hotcell.sock", true), ("a/b/deep.sock", false)] {
        let path = work.join(name);
        let socket = UnixListener::bind(&path).expect("bind");
        match open() {
            Err(WorkspaceError::SocketInside { socket }) if refused => assert_eq!(socket, path),
            Ok(()) if !refused => {}
            other => panic!("{name}: {other:?}"),
        }
        drop(socket);
        fs::remove_file(&path).expect("rm");
    }
}

#[test]
fn a_directory_that_was_replaced_since_submit_is_moved() {
    let bench = Bench::new();
    let work = bench.workspace("work", USER, 0o755);
    let who = person(USER);
    let (_, record) = open_as(&who, &work, Access::Write, &bench.guard()).expect("opens");
    let text = serde_json::to_string(&record).expect("json");
    let record: WorkspaceRecord = serde_json::from_str(&text).expect("json");
    assert!(record.btime_ns.is_some());
    let dir = reopen_as(&who, &record, &bench.guard()).expect("the same");
    fs::rename(&work, bench.root.path().join("old")).expect("mv");
    let moved = |what| {
        let error = reopen_as(&who, &record, &bench.guard()).expect_err("moved");
        assert!(matches!(error, WorkspaceError::Moved { what: w, .. } if w == what), "{error}");
    };
    moved("existence");
    bench.workspace("work", USER, 0o755);
    moved("inode");
    fs::remove_dir_all(&work).expect("rm");
    symlink(bench.root.path().join("old"), &work).expect("symlink");
    moved("kind");
    // A descriptor of another directory than the recorded one is not staged.
    let (other, _) =
        open_as(&who, &bench.workspace("other", USER, 0o755), Access::Write, &bench.guard()).expect("opens");
    let (_, cell) = bench.cell(1);
    let refused = stage(&other, &record, &ids(&who), Mode::Bind, &cell.join("ws"));
    assert!(matches!(refused, Err(WorkspaceError::Moved { .. })), "{refused:?}");
    // The old one is still the recorded inode, wherever it is now.
    let staged = stage(&dir, &record, &ids(&who), Mode::Bind, &cell.join("ws")).expect("stages");
    staged.destroy().expect("gone");
    bench.nothing_left();
}

#[test]
fn swapping_the_path_never_mounts_another_directory() {
    use std::sync::atomic::{AtomicBool, Ordering};
    const ATTEMPTS: usize = 10_000;
    let bench = Bench::new();
    let own = bench.workspace("own", USER, 0o755);
    let secret = bench.workspace("secret", 0, 0o755);
    let (work, link) = (own.join("work"), own.join("link"));
    fs::create_dir(&work).expect("mkdir");
    chown(&work, Some(USER), Some(USER)).expect("chown");
    symlink(&secret, &link).expect("symlink");
    let ino = fs::metadata(&work).expect("meta").ino();
    let (_, cell) = bench.cell(1);
    let who = person(USER);
    let (_, record) = open_as(&who, &work, Access::Write, &bench.guard()).expect("opens");
    let done = AtomicBool::new(false);
    let (mut mounted, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        let swapper = scope.spawn(|| {
            // The submitter does it: this thread's rights are theirs.
            // SAFETY: raw system calls without memory; they change this thread only.
            unsafe {
                libc::syscall(libc::SYS_setfsgid, USER);
                libc::syscall(libc::SYS_setfsuid, USER);
            }
            let mut swaps = 0_u64;
            while !done.load(Ordering::Relaxed) {
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                let cwd = rustix::fs::CWD;
                rustix::fs::renameat_with(cwd, &work, cwd, &link, flags).expect("exchange");
                swaps += 1;
            }
            swaps
        });
        for attempt in 0..ATTEMPTS {
            // As at submit: whatever is opened, it is never what the link leads to.
            if let Ok((_, record)) = open_as(&who, &work, Access::Read, &bench.guard()) {
                assert_eq!(record.ino, ino);
            }
            let dir = match reopen_as(&who, &record, &bench.guard()) {
                Ok(dir) => dir,
                Err(WorkspaceError::Moved { .. } | WorkspaceError::Io { .. }) => {
                    refused += 1;
                    continue;
                }
                Err(other) => panic!("{other}"),
            };
            let mode = if attempt % 2 == 0 { Mode::Bind } else { Mode::ReadOnly };
            let staged = stage(&dir, &record, &ids(&who), mode, &cell.join("ws")).expect("stages");
            assert_eq!(fs::metadata(staged.path()).expect("meta").ino(), ino);
            staged.destroy().expect("gone");
            mounted += 1;
        }
        done.store(true, Ordering::Relaxed);
        let swaps = swapper.join().expect("swapper");
        assert!(swaps > ATTEMPTS as u64, "only {swaps} swaps");
    });
    assert!(mounted > 0 && refused > 0, "the race was not run: {mounted} mounted, {refused} refused");
    bench.nothing_left();
}

#[test]
fn staging_onto_a_mount_is_refused_and_unstaging_twice_is_fine() {
    let bench = Bench::new();
    let work = bench.workspace("work", USER, 0o755);
    let (_, cell) = bench.cell(1);
    let target = cell.join("ws");
    let staged = staged(&bench, &person(USER), &work, Mode::Bind, &target);
    let (dir, record) = open_as(&person(USER), &work, Access::Write, &bench.guard()).expect("opens");
    let again = stage(&dir, &record, &ids(&person(USER)), Mode::Bind, &target);
    assert!(matches!(again, Err(WorkspaceError::TargetBusy { .. })), "{again:?}");
    staged.destroy().expect("gone");
    unstage(&target).expect("fine");
    fs::create_dir(&target).expect("mkdir");
    fs::write(target.join("precious"), "").expect("write");
    unstage(&target).expect_err("only an empty directory is removed");
    assert!(target.join("precious").exists());
    bench.nothing_left();
}

#[test]
fn without_an_id_map_the_cell_is_the_submitter_and_never_root() {
    let bench = Bench::new();
    let (_, cell) = bench.cell(1);
    let target = cell.join("ws");
    for (name, uid) in [("users", USER), ("roots", 0)] {
        let work = bench.workspace(name, uid, 0o755);
        let who = person(uid);
        let (dir, record) = open_as(&who, &work, Access::Write, &bench.guard()).expect("opens");
        let unmapped = CellIds { runtime_maps_ids: false, ..ids(&who) };
        match stage(&dir, &record, &unmapped, Mode::Bind, &target) {
            Ok(staged) if uid == USER => {
                assert_eq!(*staged.ids(), StagedIds::Submitter { uid, gid: uid, groups: vec![] });
                assert!(staged.note().is_some_and(|n| n.contains("your own uid 4242")));
                staged.destroy().expect("gone");
            }
            Err(WorkspaceError::RootUnmapped { .. }) if uid == 0 => {}
            other => panic!("{other:?}"),
        }
    }
    bench.nothing_left();
}

#[test]
fn a_file_system_without_id_maps_falls_back() {
    let bench = Bench::new();
    let work = bench.workspace("work", USER, 0o755);
    let who = person(USER);
    let (_, cell) = bench.cell(1);
    let inner = staged(&bench, &who, &work, Mode::Bind, &cell.join("inner"));
    // The idmapped clone again, under a name that is a workspace: the kernel maps a mount only once.
    let alias = bench.workspace("alias", USER, 0o755);
    rustix::mount::mount_bind(inner.path(), &alias).expect("bind");
    let seen = person(CELL_UID);
    let (dir, record) = open_as(&seen, &alias, Access::Write, &bench.guard()).expect("opens");
    let outer = stage(&dir, &record, &ids(&seen), Mode::Bind, &cell.join("ws")).expect("stages");
    assert!(matches!(outer.ids(), StagedIds::Submitter { uid: CELL_UID, .. }), "{outer:?}");
    assert!(outer.note().is_some_and(|n| n.contains("no id-mapped mount")), "{outer:?}");
    drop(dir);
    outer.destroy().expect("gone");
    rustix::mount::unmount(&alias, rustix::mount::UnmountFlags::empty()).expect("umount");
    inner.destroy().expect("gone");
    bench.nothing_left();
}

/// Runs `work` on a thread that is `uid` in every respect: as a daemon that is not root would be.
fn as_daemon_of<T: Send>(uid: u32, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let body = || {
            // SAFETY: raw system calls, so they change this thread only, which ends with the closure.
            unsafe {
                assert_eq!(libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<u32>()), 0);
                assert_eq!(libc::syscall(libc::SYS_setresgid, uid, uid, uid), 0);
                assert_eq!(libc::syscall(libc::SYS_setresuid, uid, uid, uid), 0);
            }
            work()
        };
        scope.spawn(body).join().expect("thread")
    })
}

#[test]
fn a_daemon_that_is_not_root_serves_its_own_user_directly() {
    let bench = Bench::new();
    let work = bench.workspace("work", USER, 0o755);
    let cell = bench.workspace("cell", USER, 0o755);
    as_daemon_of(USER, || {
        let (dir, record) = open_as(&person(USER), &work, Access::Write, &bench.guard()).expect("opens");
        let staged = stage(&dir, &record, &ids(&person(USER)), Mode::Bind, &cell.join("ws")).expect("stages");
        assert!(staged.is_direct() && staged.path() == work);
        assert!(matches!(staged.ids(), StagedIds::Submitter { uid: USER, .. }));
        staged.destroy().expect("gone");
        let refused = open_as(&person(4243), &work, Access::Read, &bench.guard()).map(|_| ());
        assert!(matches!(refused, Err(WorkspaceError::CannotSwitch { uid: 4243, own_uid: USER })));
        let scratch = Scratch::create(&cell, &bench.plan(), USER, USER).expect("plain directories");
        assert!(!scratch.enforced());
        assert_eq!(scratch.fallback_reason(), Some("the daemon is not root"));
        fs::write(scratch.home().join("f"), vec![1; 100_000]).expect("write");
        let usage = scratch.usage().expect("usage");
        assert!(usage.complete && usage.inodes == 4 && usage.bytes >= 100_000, "{usage:?}");
        scratch.destroy().expect("gone");
    });
    assert!(!cell.join("scratch").exists() && work.join("readme").exists());
}

#[test]
fn scratch_ends_at_its_limit_and_the_host_does_not_pay() {
    let bench = Bench::new();
    let (_, cell) = bench.cell(1);
    let scratch = Scratch::create(&cell, &bench.plan(), CELL_UID, CELL_GID).expect("scratch");
    assert!(scratch.enforced(), "{:?}", scratch.fallback_reason());
    let again = Scratch::create(&cell, &bench.plan(), CELL_UID, CELL_GID);
    assert!(matches!(again, Err(ScratchError::Exists { .. })), "{again:?}");
    let mode =
        |p: &Path| (fs::metadata(p).expect("meta").mode() & 0o7777, fs::metadata(p).expect("meta").uid());
    assert_eq!((mode(&scratch.home()), mode(&scratch.tmp())), ((0o700, CELL_UID), (0o1777, CELL_UID)));
    let empty = scratch.usage().expect("usage");
    fs::set_permissions(&cell, fs::Permissions::from_mode(0o755)).expect("chmod");
    let full = as_cell(&scratch.tmp(), "head -c 200000000 /dev/zero >big");
    let text = String::from_utf8_lossy(&full.stderr);
    assert!(text.contains("No space left on device"), "{full:?}");
    let size: u64 = stdout(&as_cell(&scratch.tmp(), "stat -c %s big")).parse().expect("size");
    assert!((56_u64 << 20..64 << 20).contains(&size), "{size}");
    let used = scratch.usage().expect("usage");
    assert!(used.bytes - empty.bytes >= size, "{used:?}");
    let host = fs::metadata(cell.join("scratch.img")).expect("meta").blocks() * 512;
    assert!(host <= 65 << 20, "{host}");
    let many = as_cell(&scratch.tmp(), "rm big; for i in $(seq 5000); do : >f$i || break; done; ls | wc -l");
    assert!(String::from_utf8_lossy(&many.stderr).contains("No space left on device"), "{many:?}");
    let inodes = scratch.usage().expect("usage").inodes;
    assert!((4000..=4096).contains(&inodes), "{inodes}");
    assert!(!as_cell(&scratch.tmp(), "mknod d c 1 3").status.success());
    let adopted = Scratch::adopt(&cell).expect("readable").expect("there");
    assert!(adopted.enforced());
    adopted.destroy().expect("gone");
    assert_eq!(fs::read_dir(&cell).expect("list").count(), 0);
    assert!(Scratch::adopt(&cell).expect("readable").is_none());
    bench.nothing_left();
}

#[test]
fn scratch_is_not_made_when_the_host_is_nearly_full_or_the_plan_is_odd() {
    let bench = Bench::new();
    let (_, cell) = bench.cell(1);
    let plan = ScratchPlan { host_reserve_bytes: u64::MAX, ..bench.plan() };
    let refused = Scratch::create(&cell, &plan, CELL_UID, CELL_GID);
    assert!(matches!(refused, Err(ScratchError::HostFull { .. })), "{refused:?}");
    for (bytes_max, inodes_max) in [(0, 4096), (64 << 20, 0), (64 << 20, u64::MAX), (u64::MAX, 4096)] {
        let plan = ScratchPlan { bytes_max, inodes_max, ..bench.plan() };
        let refused = Scratch::create(&cell, &plan, CELL_UID, CELL_GID);
        assert!(matches!(refused, Err(ScratchError::Plan { .. })), "{refused:?}");
    }
    assert_eq!(fs::read_dir(&cell).expect("list").count(), 0);
    bench.nothing_left();
}

#[test]
fn a_scratch_that_is_still_used_is_not_called_gone() {
    let bench = Bench::new();
    let (_, cell) = bench.cell(1);
    let scratch = Scratch::create(&cell, &bench.plan(), CELL_UID, CELL_GID).expect("scratch");
    let user = fs::File::open(scratch.home()).expect("open");
    let held = scratch.destroy();
    assert!(matches!(held, Err(ScratchError::StillHeld { what: "loop device", .. })), "{held:?}");
    let report = sweep(&bench.cells(), &|_| false).expect("sweep");
    assert!(report.removed.is_empty() && report.left.len() == 1, "{report:?}");
    drop(user);
    let report = sweep(&bench.cells(), &|_| false).expect("sweep");
    assert!(report.removed.len() == 1 && report.left.is_empty(), "{report:?}");
    bench.nothing_left();
}

#[test]
fn sweep_after_a_crash_removes_cells_and_no_file_of_a_workspace() {
    let bench = Bench::new();
    let work = bench.workspace("work", USER, 0o755);
    fs::create_dir_all(work.join("src/deep")).expect("mkdir");
    fs::write(work.join("src/deep/file"), "mine").expect("write");
    let mut dead = Vec::new();
    let (kept, kept_dir) = bench.cell(99);
    fs::write(kept_dir.join("cellfile"), "").expect("write");
    for random in 1..=3 {
        let (id, cell) = bench.cell(random);
        // Dropped without destroy: what a killed daemon leaves.
        let _ = staged(&bench, &person(USER), &work, Mode::Bind, &cell.join("ws"));
        let scratch = Scratch::create(&cell, &bench.plan(), CELL_UID, CELL_GID).expect("scratch");
        fs::write(scratch.home().join("junk"), vec![7; 1 << 20]).expect("write");
        symlink(&work, scratch.home().join("to-work")).expect("symlink");
        fs::create_dir(cell.join("run")).expect("mkdir");
        let _socket = UnixListener::bind(cell.join("run/ctl.sock")).expect("bind");
        symlink(&work, cell.join("run/to-work")).expect("symlink");
        dead.push(id);
    }
    // Mounted twice on the same path, and a busy mount.
    let (twice_id, twice) = bench.cell(4);
    fs::create_dir(twice.join("ws")).expect("mkdir");
    rustix::mount::mount_bind(&work, twice.join("ws")).expect("bind");
    rustix::mount::mount_bind(&work, twice.join("ws")).expect("bind");
    let busy = fs::File::open(twice.join("ws/src")).expect("open");
    dead.push(twice_id);
    symlink(&work, bench.cells().join(CellId::new(5).as_str())).expect("symlink");
    fs::create_dir(bench.cells().join("not-a-cell")).expect("mkdir");

    let mut report = sweep(&bench.cells(), &|id| *id == kept).expect("sweep");
    report.removed.sort();
    dead.sort();
    assert_eq!(report.removed, dead, "{report:?}");
    assert_eq!((report.unmounted, report.left.len()), (7, 2), "{report:?}");
    assert!(report.detached >= 1, "{report:?}");
    drop(busy);
    assert!(kept_dir.join("cellfile").exists() && bench.cells().join("not-a-cell").exists());
    assert_eq!(fs::read_to_string(work.join("src/deep/file")).expect("still there"), "mine");
    assert_eq!(fs::read_to_string(work.join("readme")).expect("still there"), "hello");
    let again = sweep(&bench.cells(), &|id| *id == kept).expect("sweep");
    assert!(again.removed.is_empty() && again.unmounted == 0, "{again:?}");
    bench.nothing_left();
}

#[test]
fn sweep_trusts_only_a_directory_of_the_daemons_own() {
    let bench = Bench::new();
    let (_, cell) = bench.cell(1);
    let link = bench.root.path().join("link");
    symlink(bench.cells(), &link).expect("symlink");
    sweep(&link, &|_| false).expect_err("a symlink");
    sweep(Path::new("/"), &|_| false).expect_err("the root");
    sweep(Path::new("state/cells"), &|_| false).expect_err("relative");
    fs::set_permissions(bench.cells(), fs::Permissions::from_mode(0o777)).expect("chmod");
    sweep(&bench.cells(), &|_| false).expect_err("writable by others");
    assert!(cell.exists());
    let none = sweep(&bench.state().join("none"), &|_| false).expect("nothing to do");
    assert!(none.removed.is_empty() && none.left.is_empty());
}
