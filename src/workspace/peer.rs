//! Opens a directory as the person who submitted the job: on a thread of its own whose file-system
//! credentials are that person's, so that the kernel itself decides what they may reach.
//! Must never switch credentials through libc's wrappers (they change every thread of the process),
//! and never look at the path again after it is opened, except to explain a refusal.
//!
//! Side effect, known and harmless for a root daemon: a credential switch makes the process
//! non-dumpable for others (prctl(2), PR_SET_DUMPABLE), so that only root can look into it.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{Access, Guard, WorkspaceError, io_at, rules};
use crate::change::TreePath;
use crate::job::Identity;

/// How long a file system may take to answer before the job is refused.
const OPEN_TIME_MAX: Duration = Duration::from_secs(20);
/// Threads that may hang on dead file systems at the same time.
const PEER_THREADS_MAX: usize = 32;
/// Entries looked at in search of sockets; what lies behind them is not looked at.
const SOCKET_SCAN_ENTRIES_MAX: usize = 200_000;
/// Directories between a workspace and the root.
const DEPTH_MAX: usize = 2048;

static PEER_THREADS: AtomicUsize = AtomicUsize::new(0);

/// What a workspace was at submit: kept in the job's row and compared before it is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkspaceRecord {
    /// Absolute, without symlinks, `.` and `..`.
    pub path: PathBuf,
    /// The submitter (not the owner of the directory).
    pub uid: u32,
    /// The submitter's primary group.
    pub gid: u32,
    /// What was checked, and is checked again.
    pub need: Access,
    /// Device number of the file system, as statx(2) gives it: major, minor.
    pub dev: (u32, u32),
    /// Inode number.
    pub ino: u64,
    /// Birth time in nanoseconds since 1970, where the file system keeps one.
    pub btime_ns: Option<i64>,
    /// Mount the path went through. For people; not compared (a remount is not another directory).
    pub mount_id: Option<u64>,
}

/// Opens `path` as `identity` and checks that this person may use it as a workspace. Blocks, for at
/// most 20 s. The descriptor is `O_PATH`: it names the directory and allows nothing else.
///
/// # Errors
/// One variant per reason, see [`WorkspaceError`].
pub fn open_as(
    identity: &Identity,
    path: &Path,
    need: Access,
    guard: &Guard,
) -> Result<(OwnedFd, WorkspaceRecord), WorkspaceError> {
    open_any(identity, path, need, guard, false)
}

/// The same of a repository's own directory, which is no workspace but is shown beside one.
///
/// # Errors
/// As [`open_as`].
pub fn open_repository_as(
    identity: &Identity,
    path: &Path,
    guard: &Guard,
) -> Result<(OwnedFd, WorkspaceRecord), WorkspaceError> {
    open_any(identity, path, Access::Read, guard, true)
}

fn open_any(
    identity: &Identity,
    path: &Path,
    need: Access,
    guard: &Guard,
    repository: bool,
) -> Result<(OwnedFd, WorkspaceRecord), WorkspaceError> {
    let path = rules::tidy(path, guard)?;
    if !repository && rules::in_git(&path) {
        return Err(WorkspaceError::GitDir { path });
    }
    let (who, home, at) = (identity.clone(), guard.home.clone(), path.clone());
    let open = move || open_here(&who, &at, need, home.as_deref(), repository);
    let (dir, record) = as_peer(identity, &path, open)?;
    outside_of_state(dir.as_fd(), &path, guard)?;
    Ok((dir, record))
}

/// Opens the directory of `record` again, as the same person, and makes sure that it is the same one.
///
/// # Errors
/// [`WorkspaceError::Moved`] where it is not; otherwise as [`open_as`].
pub fn reopen_as(
    identity: &Identity,
    record: &WorkspaceRecord,
    guard: &Guard,
) -> Result<OwnedFd, WorkspaceError> {
    reopened(record, open_as(identity, &record.path, record.need, guard))
}

/// The same of what [`open_repository_as`] opened.
///
/// # Errors
/// As [`reopen_as`].
pub fn reopen_repository_as(
    identity: &Identity,
    record: &WorkspaceRecord,
    guard: &Guard,
) -> Result<OwnedFd, WorkspaceError> {
    reopened(record, open_repository_as(identity, &record.path, guard))
}

fn reopened(
    record: &WorkspaceRecord,
    opened: Result<(OwnedFd, WorkspaceRecord), WorkspaceError>,
) -> Result<OwnedFd, WorkspaceError> {
    let moved = |what| Err(WorkspaceError::Moved { path: record.path.clone(), what });
    let (dir, now) = match opened {
        Ok(opened) => opened,
        Err(WorkspaceError::Missing { .. }) => return moved("existence"),
        Err(WorkspaceError::Symlink { .. } | WorkspaceError::NotADirectory { .. }) => return moved("kind"),
        Err(error) => return Err(error),
    };
    match difference(record, &now) {
        Some(what) => moved(what),
        None => Ok(dir),
    }
}

/// The text of the regular file `name` in `dir`, read as `identity`; `None` where there is none that this
/// person can read, or it is longer than `bytes_max`, or no UTF-8. Never follows a symlink. Blocks.
///
/// # Errors
/// [`WorkspaceError::Unresponsive`], [`WorkspaceError::TooManyOpening`], [`WorkspaceError::CannotSwitch`].
pub fn read_text(
    identity: &Identity,
    record: &WorkspaceRecord,
    dir: &OwnedFd,
    name: &'static str,
    bytes_max: u64,
) -> Result<Option<String>, WorkspaceError> {
    let dir = dir.try_clone().map_err(io_at("open", &record.path))?;
    as_peer(identity, &record.path, move || Ok(text_of(&dir, name, bytes_max)))
}

/// The same of several files below `dir`, by paths.
///
/// # Errors
/// As [`read_text`].
pub fn read_texts(
    identity: &Identity,
    record: &WorkspaceRecord,
    dir: &OwnedFd,
    paths: Vec<TreePath>,
    bytes_max: u64,
) -> Result<Vec<(TreePath, Option<String>)>, WorkspaceError> {
    if paths.is_empty() {
        return Ok(Vec::new());
    }
    let dir = dir.try_clone().map_err(io_at("open", &record.path))?;
    as_peer(identity, &record.path, move || {
        let read = |path: TreePath| {
            let text = text_of(&dir, path.as_path(), bytes_max);
            (path, text)
        };
        Ok(paths.into_iter().map(read).collect())
    })
}

/// Runs with the rights of whoever calls it.
pub(super) fn text_of<P: rustix::path::Arg>(dir: &OwnedFd, name: P, bytes_max: u64) -> Option<String> {
    use std::io::Read;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    // NONBLOCK: a FIFO of that name must not hold the thread.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve).ok()?;
    let stat = rustix::fs::fstat(&file).ok()?;
    let regular = FileType::from_raw_mode(stat.st_mode).is_file();
    if !regular || stat.st_size as u64 > bytes_max {
        return None;
    }
    let mut text = String::new();
    std::fs::File::from(file).take(bytes_max).read_to_string(&mut text).ok()?;
    Some(text)
}

fn difference(then: &WorkspaceRecord, now: &WorkspaceRecord) -> Option<&'static str> {
    let checks = [
        (then.uid == now.uid, "submitter"),
        (then.dev == now.dev, "device"),
        (then.ino == now.ino, "inode"),
        (then.btime_ns == now.btime_ns, "birth time"),
    ];
    checks.iter().find(|(same, _)| !same).map(|(_, what)| *what)
}

/// Checks by descriptor that `dir` still is the directory of `record`.
pub(super) fn same_directory(dir: BorrowedFd<'_>, record: &WorkspaceRecord) -> Result<(), WorkspaceError> {
    let identity = Identity { uid: record.uid, gid: record.gid, groups: Vec::new() };
    let now = describe(dir, &identity, &record.path, record.need)?;
    match difference(record, &now) {
        Some(what) => Err(WorkspaceError::Moved { path: record.path.clone(), what }),
        None => Ok(()),
    }
}

/// Runs `work` on a fresh thread with the file-system credentials of `identity`, for `OPEN_TIME_MAX` at most.
pub(super) fn as_peer<T: Send + 'static>(
    identity: &Identity,
    path: &Path,
    work: impl FnOnce() -> Result<T, WorkspaceError> + Send + 'static,
) -> Result<T, WorkspaceError> {
    as_submitter(identity, path, OPEN_TIME_MAX, work)
}

/// Runs `work` on a fresh thread that has the file-system credentials of `identity` and nothing of the daemon's:
/// the kernel itself decides what it may reach. `path` is for messages. Blocks, for `wait_max` at most: the
/// thread goes on alone then, and what it holds (locks, descriptors) is free when it ends.
///
/// # Errors
/// What `work` says; [`WorkspaceError::Unresponsive`], [`WorkspaceError::TooManyOpening`],
/// [`WorkspaceError::CannotSwitch`], [`WorkspaceError::Io`] as the caller's error.
pub fn as_submitter<T, E>(
    identity: &Identity,
    path: &Path,
    wait_max: Duration,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, E>
where
    T: Send + 'static,
    E: From<WorkspaceError> + Send + 'static,
{
    let place = Place::take()?;
    let (send, receive) = mpsc::sync_channel(1);
    let who = identity.clone();
    let at = path.to_owned();
    let body = move || {
        let _place = place;
        let answer = become_peer(&who, &at).map_err(E::from).and_then(|()| work());
        // The receiver is gone only when it gave up waiting.
        let _ = send.send(answer);
    };
    let thread = std::thread::Builder::new().name("hotcell-peer".to_owned()).spawn(body);
    let thread = thread.map_err(io_at("start a thread for", path))?;
    match receive.recv_timeout(wait_max) {
        Ok(answer) => {
            let _ = thread.join();
            answer
        }
        // The thread hangs in the kernel and cannot be joined; PEER_THREADS_MAX bounds how many do.
        Err(mpsc::RecvTimeoutError::Timeout) => Err(E::from(WorkspaceError::Unresponsive {
            path: path.to_owned(),
            waited_ms: u64::try_from(wait_max.as_millis()).unwrap_or(u64::MAX),
        })),
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            Err(E::from(io_at("open", path)(io::Error::other("the thread that opens it ended early"))))
        }
    }
}

/// One of the `PEER_THREADS_MAX` places, given back when the thread ends.
struct Place;

impl Place {
    fn take() -> Result<Self, WorkspaceError> {
        let more = |n| (n < PEER_THREADS_MAX).then_some(n + 1);
        match PEER_THREADS.fetch_update(Ordering::AcqRel, Ordering::Acquire, more) {
            Ok(_) => Ok(Self),
            Err(_) => Err(WorkspaceError::TooManyOpening { limit: PEER_THREADS_MAX }),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        PEER_THREADS.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(not(target_pointer_width = "64"))]
compile_error!("the raw set*id calls below take 16-bit ids on 32-bit targets");

/// Gives **this thread** the file-system uid, gid and groups of `identity`. There is no way back: the
/// thread must end afterwards.
fn become_peer(identity: &Identity, path: &Path) -> Result<(), WorkspaceError> {
    // SAFETY: no arguments, cannot fail.
    let own_uid = unsafe { libc::geteuid() };
    if own_uid != 0 {
        let same = own_uid == identity.uid;
        return if same { Ok(()) } else { Err(WorkspaceError::CannotSwitch { uid: identity.uid, own_uid }) };
    }
    let failed = |doing| io_at(doing, path)(io::Error::last_os_error());
    // SAFETY: raw system calls, so they change this thread only; the group list is a live slice and its
    // length is passed with it; -1 to setfs[ug]id changes nothing and returns the present value.
    unsafe {
        if libc::syscall(libc::SYS_setgroups, identity.groups.len(), identity.groups.as_ptr()) != 0 {
            return Err(failed("take the submitter's groups for"));
        }
        libc::syscall(libc::SYS_setfsgid, identity.gid);
        libc::syscall(libc::SYS_setfsuid, identity.uid);
        let gid = libc::syscall(libc::SYS_setfsgid, -1_i64) as u32;
        let uid = libc::syscall(libc::SYS_setfsuid, -1_i64) as u32;
        if (uid, gid) != (identity.uid, identity.gid) {
            return Err(WorkspaceError::CannotSwitch { uid: identity.uid, own_uid });
        }
    }
    // The switch from 0 has dropped CAP_DAC_* already. Dropping all of them also holds where the daemon
    // is started with unusual securebits. Root as the submitter keeps what root has.
    if identity.uid != 0 && !drop_capabilities() {
        return Err(failed("drop capabilities for"));
    }
    Ok(())
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Clears the effective capabilities of this thread.
fn drop_capabilities() -> bool {
    const VERSION_3: u32 = 0x2008_0522;
    let mut header = CapHeader { version: VERSION_3, pid: 0 };
    let mut data = [CapData { effective: 0, permitted: 0, inheritable: 0 }; 2];
    // SAFETY: header and the two data words are live and laid out as capget(2) wants for version 3.
    if unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) } != 0 {
        return false;
    }
    for word in &mut data {
        word.effective = 0;
    }
    // SAFETY: as above; pid 0 is the calling thread.
    unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) == 0 }
}

/// The part of `open_as` that runs with the submitter's credentials.
fn open_here(
    identity: &Identity,
    path: &Path,
    need: Access,
    home: Option<&Path>,
    repository: bool,
) -> Result<(OwnedFd, WorkspaceRecord), WorkspaceError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let dir = rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve)
        .map_err(|errno| refusal(errno, identity.uid, path, need))?;
    let fs = rustix::fs::fstatfs(&dir).map_err(io_at("look at the file system of", path))?;
    if let Some(fs) = rules::pseudo_fs(fs.f_type as u64) {
        return Err(WorkspaceError::PseudoFs { path: path.to_owned(), fs });
    }
    may_use(dir.as_fd(), identity.uid, path, need)?;
    if !repository && is_git_dir(dir.as_fd()) {
        return Err(WorkspaceError::GitDir { path: path.to_owned() });
    }
    let record = describe(dir.as_fd(), identity, path, need)?;
    if let Some(home) = home {
        not_home(&record, home)?;
    }
    if let Some(below) = socket_below(dir.as_fd(), path)? {
        return Err(WorkspaceError::SocketInside { socket: path.join(below) });
    }
    Ok((dir, record))
}

/// Whether git would take the directory itself for a repository, as a bare one is.
fn is_git_dir(dir: BorrowedFd<'_>) -> bool {
    let is = |name, kind| {
        let found = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW);
        found.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == kind)
    };
    is(c"HEAD", FileType::RegularFile)
        && is(c"objects", FileType::Directory)
        && is(c"refs", FileType::Directory)
}

/// Asks the kernel whether this thread's credentials may write `fd` (and enter it, for a directory).
///
/// # Errors
/// The kernel's word.
pub fn may_write(fd: BorrowedFd<'_>, is_dir: bool) -> io::Result<()> {
    access(fd, libc::R_OK | libc::W_OK | if is_dir { libc::X_OK } else { 0 })
}

/// Asks the kernel for *this thread's* file-system ids.
fn access(fd: BorrowedFd<'_>, mode: libc::c_int) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let flags = libc::AT_EACCESS | libc::AT_EMPTY_PATH;
    // SAFETY: the descriptor is open and the name is an empty C string. Raw because AT_EACCESS must ask
    // the kernel for *this thread's* file-system ids; libc may compare process ids instead.
    let rc = unsafe { libc::syscall(libc::SYS_faccessat2, fd.as_raw_fd(), c"".as_ptr(), mode, flags) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Asks the kernel whether this thread's credentials may use `dir`.
fn may_use(dir: BorrowedFd<'_>, uid: u32, path: &Path, need: Access) -> Result<(), WorkspaceError> {
    let mode = libc::R_OK | libc::X_OK | if need == Access::Write { libc::W_OK } else { 0 };
    let Err(error) = access(dir, mode) else { return Ok(()) };
    let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
    Err(refusal(errno, uid, path, need))
}

/// Turns the kernel's word about `path` into one that says what to do.
fn refusal(errno: Errno, uid: u32, path: &Path, need: Access) -> WorkspaceError {
    let path = path.to_owned();
    match errno {
        Errno::NOENT => WorkspaceError::Missing { path, uid },
        Errno::ACCESS | Errno::PERM => {
            let other = if need == Access::Write { "read-only mode" } else { "another directory" };
            WorkspaceError::Denied { path, uid, need: need.verb(), other }
        }
        Errno::ROFS => WorkspaceError::ReadOnlyFs { path },
        // O_NOFOLLOW|O_DIRECTORY on a symlink is ENOTDIR, a symlink on the way is ELOOP.
        Errno::LOOP | Errno::NOTDIR => explain_component(errno, path),
        other => io_at("open", &path)(other),
    }
}

/// Finds the component that is a symlink or no directory. Only to explain: nothing is decided here.
fn explain_component(errno: Errno, path: PathBuf) -> WorkspaceError {
    let mut component = PathBuf::new();
    for part in path.components() {
        component.push(part);
        let Ok(stat) = rustix::fs::statat(CWD, &component, AtFlags::SYMLINK_NOFOLLOW) else { break };
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => continue,
            FileType::Symlink => {
                let canonical = std::fs::canonicalize(&path).ok();
                return WorkspaceError::Symlink { path, component, canonical };
            }
            FileType::RegularFile => "file",
            FileType::Socket => "socket",
            FileType::Fifo => "fifo",
            FileType::CharacterDevice | FileType::BlockDevice => "device",
            FileType::Unknown => "thing of unknown kind",
        };
        return WorkspaceError::NotADirectory { path: component, kind };
    }
    io_at("open", &path)(errno)
}

fn describe(
    dir: BorrowedFd<'_>,
    identity: &Identity,
    path: &Path,
    need: Access,
) -> Result<WorkspaceRecord, WorkspaceError> {
    let want = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
    let stat = rustix::fs::statx(dir, c"", AtFlags::EMPTY_PATH, want).map_err(io_at("look at", path))?;
    let has = |flag: StatxFlags| stat.stx_mask & flag.bits() != 0;
    let btime = (stat.stx_btime.tv_sec, i64::from(stat.stx_btime.tv_nsec));
    let btime_ns = btime.0.checked_mul(1_000_000_000).and_then(|s| s.checked_add(btime.1));
    Ok(WorkspaceRecord {
        path: path.to_owned(),
        uid: identity.uid,
        gid: identity.gid,
        need,
        dev: (stat.stx_dev_major, stat.stx_dev_minor),
        ino: stat.stx_ino,
        btime_ns: btime_ns.filter(|_| has(StatxFlags::BTIME)),
        mount_id: has(StatxFlags::MNT_ID).then_some(stat.stx_mnt_id),
    })
}

/// The home may be reached by another path (a bind mount): compared by inode as well.
fn not_home(record: &WorkspaceRecord, home: &Path) -> Result<(), WorkspaceError> {
    let Ok(stat) = rustix::fs::stat(home) else { return Ok(()) };
    let dev = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    if (dev, stat.st_ino) == (record.dev, record.ino) {
        return Err(WorkspaceError::Home { path: record.path.clone(), home: home.to_owned() });
    }
    Ok(())
}

/// The first socket among the entries of `dir` and of its directories. Directories that the submitter
/// cannot list are passed over: the cell, which has no more rights, cannot reach into them either.
fn socket_below(dir: BorrowedFd<'_>, path: &Path) -> Result<Option<PathBuf>, WorkspaceError> {
    let mut entries_left = SOCKET_SCAN_ENTRIES_MAX;
    let mut directories = Vec::new();
    let top = list_dir(dir, c".").map_err(io_at("list", path))?;
    if let Some(found) = socket_in(top, &mut entries_left, Some(&mut directories)) {
        return Ok(Some(found));
    }
    for name in directories {
        let Ok(entries) = list_dir(dir, name.as_c_str()) else { continue };
        if let Some(found) = socket_in(entries, &mut entries_left, None) {
            return Ok(Some(Path::new(OsStr::from_bytes(name.to_bytes())).join(found)));
        }
    }
    Ok(None)
}

fn list_dir<P: rustix::path::Arg>(dir: BorrowedFd<'_>, name: P) -> rustix::io::Result<Dir> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    // No other mounts: they are not part of what is staged.
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    Dir::new(rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve)?)
}

fn socket_in(
    entries: Dir,
    entries_left: &mut usize,
    mut directories: Option<&mut Vec<CString>>,
) -> Option<PathBuf> {
    for entry in entries.flatten() {
        *entries_left = entries_left.checked_sub(1)?;
        let name = entry.file_name();
        match entry.file_type() {
            FileType::Socket => return Some(PathBuf::from(OsStr::from_bytes(name.to_bytes()))),
            FileType::Directory if name != c"." && name != c".." => {
                if let Some(list) = directories.as_deref_mut() {
                    list.push(name.to_owned());
                }
            }
            _ => {}
        }
    }
    None
}

/// Walks up from the opened directory, as the daemon: by inode, so that another name for the state
/// directory (a bind mount) does not pass.
fn outside_of_state(dir: BorrowedFd<'_>, path: &Path, guard: &Guard) -> Result<(), WorkspaceError> {
    let id = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).map(|s| (s.st_dev, s.st_ino));
    let inside = || WorkspaceError::StateDir { path: path.to_owned(), state_dir: guard.state_dir.clone() };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(state) = rustix::fs::openat(CWD, &guard.state_dir, flags, Mode::empty()) else { return Ok(()) };
    let state_id = id(state.as_fd()).map_err(io_at("look at", &guard.state_dir))?;
    let own_id = id(dir).map_err(io_at("look at", path))?;
    if ancestors(dir, path)?.contains(&state_id) || ancestors(state.as_fd(), path)?.contains(&own_id) {
        return Err(inside());
    }
    Ok(())
}

/// Device and inode of `dir` and of every directory above it.
fn ancestors(dir: BorrowedFd<'_>, path: &Path) -> Result<Vec<(u64, u64)>, WorkspaceError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut here = rustix::io::fcntl_dupfd_cloexec(dir, 0).map_err(io_at("look above", path))?;
    let mut seen = Vec::new();
    for _ in 0..DEPTH_MAX {
        let stat = rustix::fs::fstat(&here).map_err(io_at("look above", path))?;
        let id = (stat.st_dev, stat.st_ino);
        if seen.last() == Some(&id) {
            break; // the root is its own parent
        }
        seen.push(id);
        // A daemon that is not root may not be able to look above; what it cannot open is not its state.
        let Ok(up) = rustix::fs::openat(&here, c"..", flags, Mode::empty()) else { break };
        here = up;
    }
    Ok(seen)
}
