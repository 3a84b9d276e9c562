//! A workspace of which only some parts can be written, on the real kernel.

use super::*;

/// A workspace with `src/`, `docs/`, `.git/hooks/` and REPORT.md, all the user's.
fn repository(bench: &Bench) -> PathBuf {
    let work = bench.workspace("work", USER, 0o755);
    for dir in ["src", "src/deep", "docs", ".git", ".git/hooks"] {
        fs::create_dir(work.join(dir)).expect("mkdir");
        chown(work.join(dir), Some(USER), Some(USER)).expect("chown");
    }
    fs::write(work.join("REPORT.md"), "empty").expect("write");
    chown(work.join("REPORT.md"), Some(USER), Some(USER)).expect("chown");
    work
}

fn paths(names: &[&str]) -> Vec<PathBuf> {
    names.iter().map(PathBuf::from).collect()
}

fn try_stage(bench: &Bench, work: &Path, names: &[&str], target: &Path) -> Result<Staged, WorkspaceError> {
    let who = person(USER);
    let (dir, record) = open_as(&who, work, Access::Write, &bench.guard()).expect("opens");
    stage(&dir, &record, &ids(&who), Mode::Partly(&paths(names)), target)
}

#[test]
fn the_listed_parts_can_be_written_and_nothing_else() {
    let bench = Bench::new();
    let work = repository(&bench);
    let (_, cell) = bench.cell(1);
    let target = cell.join("ws");
    let staged = try_stage(&bench, &work, &["src", "REPORT.md"], &target).expect("staged");
    let below: Vec<&Path> = staged.parts().iter().map(|part| part.below.as_path()).collect();
    assert_eq!(below, [Path::new("src"), Path::new("REPORT.md")]);
    assert!(!staged.wants_read_only(), "the mount itself is read-only");

    let line =
        "echo x >new; echo x >readme; mkdir docs/x; echo x >.git/hooks/post-commit; echo x >src/sneaky";
    let refused = as_cell(&target, line);
    let errors = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(errors.matches("Read-only file system").count(), 5, "{errors}");

    let [src, report] = staged.parts() else { panic!("two parts") };
    let written = as_cell(&src.path, "echo made >file && mkdir deep/more && rm -r deep && stat -c %u .");
    assert_eq!(stdout(&written).trim(), CELL_UID.to_string(), "the parts are id-mapped as well");
    fs::write(&report.path, "written through the mount").expect("the file is writable");
    assert_eq!(fs::read_to_string(work.join("REPORT.md")).expect("read"), "written through the mount");
    assert_eq!(fs::read_to_string(work.join("src/file")).expect("read"), "made\n");
    assert_eq!(fs::metadata(work.join("src/file")).expect("stat").uid(), USER);
    assert!(!work.join("src/deep").exists());
    // Nobody on the host meets a mount point in their own directory.
    fs::rename(work.join("src"), work.join("moved")).expect("the user's own directory can be renamed");
    staged.destroy().expect("gone");
    assert_eq!(fs::read_dir(&cell).expect("list").count(), 0, "no mount point is left");
    bench.nothing_left();
}

#[test]
fn each_path_that_cannot_be_writable_is_named_with_its_reason() {
    let bench = Bench::new();
    let work = repository(&bench);
    let outside = bench.workspace("outside", USER, 0o755);
    symlink(&outside, work.join("link")).expect("symlink");
    symlink("src", work.join("inner")).expect("symlink");
    fs::write(work.join("src/roots"), "").expect("write");
    fs::hard_link(work.join("readme"), work.join("src/second")).expect("link");
    let _socket = UnixListener::bind(work.join("src/deep/socket")).expect("socket");
    let (_, cell) = bench.cell(1);
    for (path, why) in [
        ("missing", "does not exist"),
        ("readme/below", "does not exist"),
        ("../outside", "is not a plain path"),
        ("/etc", "is not a plain path"),
        ("", "is not a plain path"),
        (".", "is not a plain path"),
        ("link", "symbolic link"),
        ("link/readme", "symbolic link"),
        ("inner", "symbolic link"),
        (".git/hooks", ".git"),
        ("src/.GIT", ".git"),
        ("src/deep/socket", "neither a file nor a directory"),
        ("src/second", "second name"),
        ("src/roots", "cannot be written by you"),
    ] {
        let error = try_stage(&bench, &work, &["src", path], &cell.join("ws")).expect_err(path);
        assert!(
            matches!(&error, WorkspaceError::Writable { path: named, .. } if named == Path::new(path)),
            "{error:?}"
        );
        assert!(error.to_string().contains(why), "{path}: {error}");
        assert_eq!(mounts_below(bench.root.path()), Vec::<String>::new(), "{path}: nothing is mounted");
    }
    bench.nothing_left();
}

#[test]
fn a_mount_inside_the_workspace_is_no_part_of_it() {
    let bench = Bench::new();
    let work = repository(&bench);
    let outside = bench.workspace("outside", USER, 0o755);
    rustix::mount::mount_bind(&outside, work.join("docs")).expect("bind");
    let (_, cell) = bench.cell(1);
    let error = try_stage(&bench, &work, &["docs"], &cell.join("ws")).map(|_| ());
    rustix::mount::unmount(work.join("docs"), rustix::mount::UnmountFlags::DETACH).expect("umount");
    assert!(error.expect_err("refused").to_string().contains("another mount"));
    bench.nothing_left();
}

#[test]
fn a_sweep_after_a_crash_takes_the_parts_down_and_leaves_the_files() {
    let bench = Bench::new();
    let work = repository(&bench);
    let (_, cell) = bench.cell(7);
    let staged = try_stage(&bench, &work, &["src", "REPORT.md"], &cell.join("ws")).expect("staged");
    // The daemon dies here.
    std::mem::forget(staged);
    assert_eq!(mounts_below(&cell).len(), 3);
    let report = sweep(&bench.cells(), &|_| false).expect("swept");
    assert_eq!((report.removed.len(), report.unmounted, report.left), (1, 3, Vec::new()));
    assert_eq!(fs::read_to_string(work.join("REPORT.md")).expect("still there"), "empty");
    assert!(work.join("src/deep").is_dir() && !cell.exists());
    bench.nothing_left();
}

#[test]
fn a_program_is_readable_for_its_new_owner_and_stays_what_it_is_outside() {
    let bench = Bench::new();
    let program = bench.state().join("claude");
    fs::write(&program, "#!/bin/sh\n").expect("write");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o711)).expect("chmod");
    let (_, cell) = bench.cell(1);
    let target = cell.join("claude");
    stage_program(&program, (CELL_UID, CELL_GID), &target).expect("staged");
    for dir in [bench.state(), bench.cells(), cell.clone()] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o711)).expect("chmod");
    }
    let read = |path: &Path, uid| as_uid(bench.root.path(), &format!("cat {}", path.display()), uid, uid);
    assert!(read(&target, CELL_UID).status.success(), "its owner reads it");
    assert!(!read(&target, USER).status.success(), "nobody else does");
    assert!(!read(&program, CELL_UID).status.success(), "nor is the program itself readable");
    assert!(fs::write(&target, "x").is_err(), "not even root can write there");
    let report = sweep(&bench.cells(), &|_| false).expect("swept");
    assert_eq!((report.removed.len(), report.left), (1, Vec::new()));
    assert_eq!(fs::read_to_string(&program).expect("still there"), "#!/bin/sh\n");
    bench.nothing_left();
}
