//! Which paths can never be a workspace: rules on the text of a path and on the kind of file system.
//! Never asks the file system about anything but the directories named in `Guard`.

use std::ffi::CStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use super::WorkspaceError;

/// Directories that are never a workspace besides the system's own.
#[derive(Debug, Clone)]
pub struct Guard {
    /// The daemon's state directory, canonical.
    pub state_dir: PathBuf,
    /// The submitter's home, if it has one.
    pub home: Option<PathBuf>,
}

impl Guard {
    /// The guard for a submitter, with the home that the user database names. Blocks (name service).
    pub fn for_user(state_dir: &Path, uid: u32) -> Self {
        Self { state_dir: state_dir.to_owned(), home: home_of(uid) }
    }
}

/// Trees of which no directory may be handed out.
const TREES: &[&str] = &[
    "/proc",
    "/sys",
    "/dev",
    "/run",
    "/etc",
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/boot",
    "/efi",
    "/lost+found",
    "/snap",
    "/nix/store",
    "/var/run",
    "/var/lock",
    "/var/lib/docker",
    "/var/lib/containerd",
    "/var/lib/containers",
    "/var/lib/kubelet",
    "/var/lib/systemd",
    "/var/lib/dpkg",
    "/var/log",
    "/var/spool",
    "/var/cache",
];

/// Directories that hold other people's things: not themselves, but directories below are fine.
const PARENTS: &[&str] = &[
    "/",
    "/home",
    "/root",
    "/var",
    "/var/lib",
    "/var/tmp",
    "/tmp",
    "/mnt",
    "/media",
    "/opt",
    "/srv",
    "/nix",
    "/run/media",
];

/// Removable disks are mounted here by desktops: `/run/media/<user>/<disk>`.
const REMOVABLE: &str = "/run/media";

/// Kernel file systems by their magic number (statfs(2)).
const PSEUDO_FS: &[(u64, &str)] = &[
    (0x9fa0, "proc"),
    (0x6265_6572, "sysfs"),
    (0x0027_e0eb, "cgroup"),
    (0x6367_7270, "cgroup2"),
    (0x1cd1, "devpts"),
    (0x6462_6720, "debugfs"),
    (0x7472_6163, "tracefs"),
    (0x7363_6673, "securityfs"),
    (0xcafe_4a11, "bpf"),
    (0x6165_676c, "pstore"),
    (0xde5e_81e4, "efivarfs"),
    (0x6265_6570, "configfs"),
    (0x1980_0202, "mqueue"),
    (0x9584_58f6, "hugetlbfs"),
    (0x6e73_6673, "nsfs"),
    (0x4249_4e4d, "binfmt_misc"),
    (0xf97c_ff8c, "selinux"),
    (0x0187, "autofs"),
    (0x6759_6969, "rpc_pipefs"),
];

const PATH_BYTES_MAX: usize = 4095;

/// Whether a path is, or is in, a repository's own directory.
pub(super) fn in_git(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str().eq_ignore_ascii_case(".git"))
}

/// The path without doubled slashes, `.` and a trailing slash; refuses what no file system need be asked for.
pub(super) fn tidy(path: &Path, guard: &Guard) -> Result<PathBuf, WorkspaceError> {
    let given = || path.to_owned();
    let text_ok = path.to_str().is_some_and(|t| t.len() <= PATH_BYTES_MAX && !t.contains('\0'));
    if !path.is_absolute() || !text_ok {
        return Err(WorkspaceError::NotAbsolute { path: given() });
    }
    if path.components().any(|c| c == Component::ParentDir) {
        return Err(WorkspaceError::NotCanonical { path: given() });
    }
    let path: PathBuf = path.components().collect();
    if let Some(tree) = system_tree(&path) {
        return Err(WorkspaceError::System { path, tree });
    }
    if path.starts_with(&guard.state_dir) || guard.state_dir.starts_with(&path) {
        return Err(WorkspaceError::StateDir { path, state_dir: guard.state_dir.clone() });
    }
    match &guard.home {
        Some(home) if home.starts_with(&path) => Err(WorkspaceError::Home { path, home: home.clone() }),
        _ => Ok(path),
    }
}

fn system_tree(path: &Path) -> Option<&'static str> {
    if let Some(hit) = PARENTS.iter().find(|p| path == Path::new(p)) {
        return Some(hit);
    }
    let on_removable_disk = path.strip_prefix(REMOVABLE).is_ok_and(|rest| rest.components().count() >= 2);
    if on_removable_disk {
        return None;
    }
    TREES.iter().find(|t| path.starts_with(t)).copied()
}

/// The name of the kernel file system with this magic number, if it is one.
pub(super) fn pseudo_fs(magic: u64) -> Option<&'static str> {
    PSEUDO_FS.iter().find(|(m, _)| *m == magic & 0xffff_ffff).map(|(_, name)| *name)
}

fn home_of(uid: u32) -> Option<PathBuf> {
    let mut buffer = vec![0_u8; 16 * 1024];
    // SAFETY: an all-zero passwd is a valid value (null pointers); it is filled below before it is read.
    let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
    let mut found: *mut libc::passwd = std::ptr::null_mut();
    // SAFETY: all pointers are to live locals, and the length is the buffer's own.
    let rc = unsafe {
        libc::getpwuid_r(uid, &raw mut entry, buffer.as_mut_ptr().cast(), buffer.len(), &raw mut found)
    };
    if rc != 0 || found.is_null() || entry.pw_dir.is_null() {
        return None;
    }
    // SAFETY: on success pw_dir is a NUL-terminated string inside `buffer`, which is still alive.
    let dir = unsafe { CStr::from_ptr(entry.pw_dir) };
    let home = PathBuf::from(std::ffi::OsString::from_vec(dir.to_bytes().to_vec()));
    // Service accounts have `/` or `/nonexistent`: no home to protect, and `/` is refused anyway.
    (home.is_absolute() && home.as_os_str().as_bytes() != b"/").then_some(home)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard() -> Guard {
        Guard { state_dir: "/var/lib/hotcell".into(), home: Some("/home/ann".into()) }
    }

    #[test]
    fn ordinary_project_paths_pass_and_are_tidied() {
        for (given, tidied) in [
            ("/home/ann/src/app", "/home/ann/src/app"),
            ("/home/ann//src/./app/", "/home/ann/src/app"),
            ("/tmp/x", "/tmp/x"),
            ("/run/media/ann/disk/app", "/run/media/ann/disk/app"),
            ("/usrlocal/app", "/usrlocal/app"),
            ("/home/anna", "/home/anna"),
        ] {
            assert_eq!(tidy(Path::new(given), &guard()).expect(given), Path::new(tidied));
        }
    }

    #[test]
    fn system_directories_and_parents_of_everything_are_refused() {
        for path in [
            "/",
            "//",
            "/etc",
            "/etc/nginx",
            "/usr/src/app",
            "/proc/self/cwd",
            "/run/user/1000",
            "/run/media",
            "/run/media/ann",
            "/var",
            "/var/lib",
            "/var/lib/docker/overlay2",
            "/home",
            "/tmp/",
            "/dev/shm/x",
        ] {
            let refused = tidy(Path::new(path), &guard());
            assert!(matches!(refused, Err(WorkspaceError::System { .. })), "{path}: {refused:?}");
        }
    }

    #[test]
    fn home_state_and_odd_paths_each_have_their_own_refusal() {
        let refuse = |p: &str| tidy(Path::new(p), &guard()).expect_err(p);
        assert!(matches!(refuse("/home/ann"), WorkspaceError::Home { .. }));
        assert!(matches!(refuse("/home/ann/"), WorkspaceError::Home { .. }));
        assert!(matches!(refuse("/var/lib/hotcell"), WorkspaceError::StateDir { .. }));
        assert!(matches!(refuse("/var/lib/hotcell/cells/x"), WorkspaceError::StateDir { .. }));
        assert!(matches!(refuse("src/app"), WorkspaceError::NotAbsolute { .. }));
        assert!(matches!(refuse(""), WorkspaceError::NotAbsolute { .. }));
        assert!(matches!(refuse(&format!("/{}", "a".repeat(5000))), WorkspaceError::NotAbsolute { .. }));
        assert!(matches!(refuse("/home/ann/../bob"), WorkspaceError::NotCanonical { .. }));
        let git = |path: &str| in_git(Path::new(path));
        assert!(git("/home/ann/app/.git") && git("/home/ann/app/.GIT/modules/x") && !git("/home/ann/app"));
    }

    #[test]
    fn kernel_file_systems_are_known_and_disks_are_not() {
        assert_eq!(pseudo_fs(0x9fa0), Some("proc"));
        assert_eq!(pseudo_fs(0x6367_7270), Some("cgroup2"));
        assert_eq!(pseudo_fs(0xef53), None); // ext4
        assert_eq!(pseudo_fs(0x9123_683e), None); // btrfs
        assert_eq!(pseudo_fs(0x0102_1994), None); // tmpfs
    }
}
