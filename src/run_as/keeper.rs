//! Between fork and exec of a user's program: a keeper, which lives as long as anything of the program does, and then
//! the change to the user. The keeper is a fork of the daemon that never becomes anything else: it makes system
//! calls, waits and kills, with no memory taken and no lock. It must never end by itself while something of the
//! program is left, nor outlive the daemon's end of its lifeline by more than the killing takes.
//!
//! ```text
//! daemon ── keeper (root, child subreaper) ── PID 1 of a namespace ── program, as the user
//! ```
//! Never a namespace of mounts: it would hold a copy of every cell's, and with it their loop devices, for as long as the
//! program runs. So `/proc` is the host's there, where the program has another number than it knows.
//!
//! Where the daemon may make no pid namespace, the program is the keeper's own child; all that leaves its parents
//! comes to the keeper, which kills until it has no child. Either way the keeper's exit is the proof that nothing
//! is left. It exits with the program's code; a keeper that was killed proves nothing.

use std::io;
use std::os::fd::RawFd;

use rustix::process::{Gid, Resource, Rlimit, Signal, Uid};

/// Most processes of the user's at a time while a program of theirs runs in a root daemon's care: their bombs
/// must not use up the daemon's own share.
const PROCESSES_MAX: u64 = 4096;
/// Descriptors that the program may open, if the daemon may open as many: what login shells give.
pub(super) const DESCRIPTORS_MAX: u64 = 1024;
/// How early the kernel takes the program when memory runs out, beside the daemon.
const OOM_SCORE: &[u8] = b"500";
/// How often the keeper looks whether all is gone, about once a millisecond.
const SWEEPS_MAX: u32 = 10_000;
/// `KEYCTL_JOIN_SESSION_KEYRING`.
const JOIN_SESSION_KEYRING: libc::c_long = 1;

/// What the program becomes, made before the fork.
#[derive(Debug)]
pub(super) struct Keeper {
    /// The end of the lifeline that hears when the daemon lets go, or dies,
    pub(super) hears: RawFd,
    /// and the daemon's.
    pub(super) speaks: RawFd,
    /// The user, where the daemon has to become them.
    pub(super) user: Option<User>,
    /// Try a pid namespace first.
    pub(super) namespace: bool,
    /// Longest file that the program may write.
    pub(super) file_bytes_max: Option<u64>,
}

/// Ids and groups.
#[derive(Debug)]
pub(super) struct User {
    pub(super) uid: Uid,
    pub(super) gid: Gid,
    pub(super) groups: Vec<Gid>,
}

impl Keeper {
    /// Runs in the forked child. Returns in the program's process alone, which has become the user.
    ///
    /// # Safety
    /// Only between fork and exec, where this thread is the only one of its process.
    pub(super) unsafe fn enter(&self) -> io::Result<()> {
        // A descriptor that somebody forgot to mark must not reach a user's program. Checked: on the same call the
        // keeper depends below.
        close_from(3, libc::CLOSE_RANGE_CLOEXEC)?;
        // The daemon's handlers mean nothing here.
        mask_signals(true)?;
        // SAFETY: no handler is set, only the default one.
        unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        // SAFETY: it moves only children that are yet to come.
        let namespace = self.namespace
            && unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWPID) }.is_ok();
        // SAFETY: one thread, system calls only on both sides.
        match unsafe { fork() }? {
            0 => {}
            child => keep(child, self.hears),
        }
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        if namespace {
            // SAFETY: as above.
            match unsafe { fork() }? {
                0 => {}
                child => reap(child),
            }
        }
        self.become_user()
    }

    fn become_user(&self) -> io::Result<()> {
        // Or the lifeline would not end with the daemon while this one is still to be started.
        // SAFETY: a descriptor that nobody in this process uses.
        unsafe { libc::close(self.speaks) };
        // No terminal of the daemon's, no group of its.
        rustix::process::setsid()?;
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        lower(Resource::Core, 0)?;
        lower(Resource::Nofile, DESCRIPTORS_MAX)?;
        if let Some(bytes) = self.file_bytes_max {
            lower(Resource::Fsize, bytes)?;
        }
        // What is not there cannot be lent: a kernel without keyrings, a file system without this file.
        // SAFETY: a system call without memory.
        unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, 0) };
        write_file(c"/proc/self/oom_score_adj", OOM_SCORE);
        if let Some(user) = &self.user {
            lower(Resource::Nproc, PROCESSES_MAX)?;
            // For this one thread, which is all there is. Groups first: they need the right that the uid's change
            // takes away.
            rustix::thread::set_thread_groups(&user.groups)?;
            rustix::thread::set_thread_res_gid(user.gid, user.gid, user.gid)?;
            rustix::thread::set_thread_res_uid(user.uid, user.uid, user.uid)?;
        }
        rustix::thread::set_no_new_privs(true)?;
        // The change of ids took it away.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        mask_signals(false)
    }
}

/// The keeper's life: until the program has ended or the daemon lets go; then it kills what is left.
fn keep(child: libc::pid_t, hears: RawFd) -> ! {
    // Nothing of the program's may be held open here, nor the daemon's lock, nor its end of the lifeline.
    // SAFETY: system calls on descriptors of this process, which nobody else uses.
    let pidfd = unsafe {
        libc::prctl(libc::PR_SET_NAME, c"hotcell-keeper".as_ptr());
        libc::dup2(hears, 0);
        let _ = close_from(1, 0);
        libc::syscall(libc::SYS_pidfd_open, child, 0) as libc::c_int
    };
    let waits = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut waiting = [waits(0), waits(pidfd)];
    if pidfd >= 0 {
        // SAFETY: an array of two that lives here. No signal interrupts it: all are blocked.
        unsafe { libc::poll(waiting.as_mut_ptr(), 2, -1) };
    }
    let mut code = None;
    for _ in 0..SWEEPS_MAX {
        loop {
            let mut status = 0;
            // SAFETY: the status is written here.
            match unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) } {
                0 => break,
                -1 => exit(code.unwrap_or(255)),
                pid if pid == child => code = Some(code_of(status)),
                _ => {}
            }
        }
        kill_children(code.is_none().then_some(child));
        // SAFETY: no descriptors; it only waits.
        unsafe { libc::poll(std::ptr::null_mut(), 0, 1) };
    }
    // Something does not die, in the kernel's hands. An exit would say that it had.
    // SAFETY: ends this process; that cannot be blocked.
    unsafe {
        libc::kill(libc::getpid(), libc::SIGKILL);
        libc::_exit(255)
    }
}

/// SIGKILL to `first` and to each child that the kernel lists. None of them can be somebody else by then: a
/// child's number is taken until this process has waited for it.
fn kill_children(first: Option<libc::pid_t>) {
    let mut list = [0u8; 4096];
    // SAFETY: the path ends with a nul, the buffer is as long as said, the descriptor is closed here.
    let length = unsafe {
        if let Some(pid) = first {
            libc::kill(pid, libc::SIGKILL);
        }
        let file = libc::open(c"/proc/thread-self/children".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
        let length = libc::read(file, list.as_mut_ptr().cast(), list.len());
        libc::close(file);
        length
    };
    let listed = list.get(..usize::try_from(length).unwrap_or(0)).unwrap_or_default();
    for_each_number(listed, |pid| {
        // SAFETY: a system call without memory.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    });
}

/// The numbers of a list, each ended by a space; one that was cut off at the end is none.
fn for_each_number(list: &[u8], mut each: impl FnMut(libc::pid_t)) {
    let mut number: libc::pid_t = 0;
    for byte in list {
        match byte {
            b'0'..=b'9' => {
                number = number.saturating_mul(10).saturating_add(libc::pid_t::from(byte - b'0'));
            }
            _ => {
                if number > 1 {
                    each(number);
                }
                number = 0;
            }
        }
    }
}

/// PID 1 of the program's namespace: waits for all, ends with the program; the kernel takes the rest along.
fn reap(child: libc::pid_t) -> ! {
    let _ = close_from(0, 0);
    loop {
        let mut status = 0;
        // SAFETY: the status is written here.
        match unsafe { libc::waitpid(-1, &raw mut status, 0) } {
            -1 => exit(255),
            pid if pid == child => exit(code_of(status)),
            _ => {}
        }
    }
}

fn code_of(status: libc::c_int) -> libc::c_int {
    if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 128 + libc::WTERMSIG(status) }
}

fn exit(code: libc::c_int) -> ! {
    // SAFETY: ends this process without running anything of the daemon's.
    unsafe { libc::_exit(code) }
}

unsafe fn fork() -> io::Result<libc::pid_t> {
    // SAFETY: the caller's.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(pid),
    }
}

fn close_from(first: u32, flags: u32) -> io::Result<()> {
    // SAFETY: a system call without memory, on descriptors of a process that nobody shares.
    match unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Blocks all signals, or none.
fn mask_signals(blocked: bool) -> io::Result<()> {
    // SAFETY: the set is made here, and read here.
    let masked = unsafe {
        let mut set = std::mem::zeroed();
        if blocked {
            libc::sigfillset(&raw mut set)
        } else {
            libc::sigemptyset(&raw mut set)
        };
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut())
    };
    if masked == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Lowers both bounds of a resource to `most`; what is lower stays.
fn lower(resource: Resource, most: u64) -> io::Result<()> {
    let now = rustix::process::getrlimit(resource);
    let least = |limit: Option<u64>| Some(limit.map_or(most, |limit| limit.min(most)));
    let limit = Rlimit { current: least(now.current), maximum: least(now.maximum) };
    rustix::process::setrlimit(resource, limit).map_err(io::Error::from)
}

fn write_file(path: &std::ffi::CStr, bytes: &[u8]) {
    // SAFETY: the path ends with a nul, the bytes are as many as said, the descriptor is closed here.
    unsafe {
        let file = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if file >= 0 {
            libc::write(file, bytes.as_ptr().cast(), bytes.len());
            libc::close(file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_was_cut_off_is_none() {
        let numbers = |list: &[u8]| {
            let mut found = Vec::new();
            for_each_number(list, |number| found.push(number));
            found
        };
        assert_eq!(numbers(b"12 345 6789 "), [12, 345, 6789]);
        assert_eq!(numbers(b"12 345 67"), [12, 345]);
        assert_eq!(numbers(b"0 1 "), Vec::<i32>::new());
        assert_eq!(numbers(b""), Vec::<i32>::new());
    }
}
