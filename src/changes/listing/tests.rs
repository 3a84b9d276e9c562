//! Walks over real directories.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use super::*;

fn listed(root: &Path, limits: &ListLimits) -> Result<Listing, ListError> {
    list(fs::File::open(root).expect("open").as_fd(), limits)
}

fn path(text: impl Into<Vec<u8>>) -> TreePath {
    TreePath::new(text).expect("a path")
}

#[test]
fn every_kind_is_seen_as_it_is_and_paths_stand_by_their_bytes() {
    let root = tempfile::tempdir().expect("tempdir");
    let at = |name: &str| root.path().join(name);
    fs::create_dir_all(at("a/b")).expect("mkdir");
    fs::write(at("a/b/file\nü"), "content").expect("write");
    fs::write(at("a-b"), "").expect("write");
    fs::set_permissions(at("a-b"), fs::Permissions::from_mode(0o4751)).expect("chmod");
    symlink("/nowhere/\u{fc}", at("a/link")).expect("symlink");
    symlink("b", at("a/to-dir")).expect("symlink");
    rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), FileType::Fifo, Mode::RUSR, 0).expect("fifo");
    let listing = listed(root.path(), &ListLimits::default()).expect("listed");
    let paths: Vec<String> = listing.iter().map(|(path, _)| path.to_string()).collect();
    assert_eq!(paths, ["a", "a-b", "a/b", "a/b/file\nü", "a/link", "a/to-dir", "fifo"]);
    let get = |name: &str| listing.get(&path(name)).expect(name);
    assert!(get("a").is_dir() && get("a/b/file\nü").bytes == 7);
    assert_eq!((get("a-b").mode, &get("a-b").what), (0o4751, &What::File));
    assert_eq!(get("a/link").what, What::Symlink { target: Raw("/nowhere/ü".into()) });
    assert_eq!(get("fifo").what, What::Special(Special::Fifo));
    assert_eq!(listing.below(&path("a")).len(), 4);
    assert_eq!(listing.below(&path("a-b")).len(), 0);
    let again = listed(root.path(), &ListLimits::default()).expect("listed");
    assert_eq!(again.hash(), listing.hash());
    fs::write(at("a/b/file\nü"), "CONTENT").expect("write");
    assert_ne!(listed(root.path(), &ListLimits::default()).expect("listed").hash(), listing.hash());
}

#[test]
fn limits_hold() {
    let root = tempfile::tempdir().expect("tempdir");
    for i in 0..20 {
        fs::write(root.path().join(i.to_string()), "").expect("write");
    }
    let limits = |entries_max, depth_max, ms| ListLimits {
        entries_max,
        depth_max,
        time_max: Duration::from_millis(ms),
    };
    assert!(listed(root.path(), &limits(20, 1, 60_000)).is_ok());
    assert!(matches!(listed(root.path(), &limits(19, 1, 60_000)), Err(ListError::TooMany { limit: 19 })));
    fs::create_dir_all(root.path().join("d/e/f")).expect("mkdir");
    assert!(listed(root.path(), &limits(100, 3, 60_000)).is_ok());
    assert!(matches!(listed(root.path(), &limits(100, 2, 60_000)), Err(ListError::TooDeep { limit: 2, .. })));
    assert!(matches!(listed(root.path(), &limits(100, 3, 0)), Err(ListError::TooSlow { limit_ms: 0 })));
}

#[test]
fn a_tree_deeper_than_paths_reach_is_an_error_and_no_overflow() {
    let root = tempfile::tempdir().expect("tempdir");
    let mut here: OwnedFd = fs::File::open(root.path()).expect("open").into();
    for _ in 0..3000 {
        rustix::fs::mkdirat(&here, c"d", Mode::RWXU).expect("mkdir");
        here = open_dir(here.as_fd(), b"d").expect("open");
    }
    drop(here);
    let deep = ListLimits { depth_max: 100_000, ..ListLimits::default() };
    assert!(matches!(listed(root.path(), &deep), Err(ListError::TooDeep { .. })));
    assert!(matches!(
        listed(root.path(), &ListLimits::default()),
        Err(ListError::TooDeep { limit: 1024, .. })
    ));
}

#[test]
fn a_mount_is_noted_and_not_entered() {
    assert!(rustix::process::geteuid().is_root(), "this test mounts: run it as root");
    let root = tempfile::tempdir().expect("tempdir");
    let (other, point) = (root.path().join("other"), root.path().join("tree/m"));
    fs::create_dir_all(&other).expect("mkdir");
    fs::create_dir_all(&point).expect("mkdir");
    fs::write(other.join("inside"), "").expect("write");
    rustix::mount::mount_bind(&other, &point).expect("bind");
    let listing = listed(&root.path().join("tree"), &ListLimits::default());
    rustix::mount::unmount(&point, rustix::mount::UnmountFlags::DETACH).expect("umount");
    let listing = listing.expect("listed");
    assert_eq!((listing.len(), listing.mounts()), (1, &[path("m")][..]));
    assert!(listing.is_blind(&path("m/inside")) && !listing.is_blind(&path("m")));
}

#[test]
fn a_directory_that_cannot_be_read_is_noted() {
    assert!(rustix::process::geteuid().is_root(), "this test becomes another user: run it as root");
    let root = tempfile::tempdir().expect("tempdir");
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
    fs::create_dir(root.path().join("closed")).expect("mkdir");
    fs::write(root.path().join("closed/x"), "").expect("write");
    fs::set_permissions(root.path().join("closed"), fs::Permissions::from_mode(0o700)).expect("chmod");
    let dir = fs::File::open(root.path()).expect("open");
    let who = crate::job::Identity { uid: 4242, gid: 4242, groups: Vec::new() };
    let work = move || -> Result<Listing, crate::workspace::WorkspaceError> {
        Ok(list(dir.as_fd(), &ListLimits::default()).expect("listed"))
    };
    let wait = Duration::from_secs(30);
    let listing = crate::workspace::as_submitter(&who, root.path(), wait, work).expect("listed");
    assert_eq!((listing.len(), listing.unreadable()), (1, &[path("closed")][..]));
}
