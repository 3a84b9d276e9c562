//! The system calls that std does not wrap, one small function each. This is the only file of hotcell-init
//! with `unsafe` outside of the spawn hook, the forwarder's epoll and `attack::calls`. It must never keep state.

use std::ffi::CString;
use std::io::{self, Write};
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Says something on stderr for whoever looks at the engine's log; nobody reading it is no error.
pub(crate) fn complain(what: &str) {
    let _ = writeln!(io::stderr(), "hotcell-init: {what}");
}

/// Milliseconds since boot, sleep of the machine included.
pub(crate) fn now_ms() -> u64 {
    // SAFETY: `timespec` is plain data, and the kernel writes one through a valid pointer.
    let time = unsafe {
        let mut time: libc::timespec = mem::zeroed();
        libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut time);
        time
    };
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}

/// Fills an array with random bytes of the kernel.
pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0u8; N];
    // SAFETY: the pointer and length describe `bytes`. Up to 256 bytes come whole once the pool is seeded.
    let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    if count == N as isize { Ok(bytes) } else { Err(io::Error::last_os_error()) }
}

/// Blocks every signal that can be blocked, in this thread and those it starts later.
pub(crate) fn block_signals() {
    // SAFETY: `set` is initialised by sigfillset before use.
    unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigfillset(&mut set);
        libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
    }
}

/// Gives the child signals as a program expects them: none ignored (whoever started init may have ignored
/// some, and exec keeps that), none blocked. Async-signal-safe: it runs in the child between fork and exec.
pub(crate) fn default_signals() {
    // SAFETY: as above; a number that cannot be set is refused and nothing more.
    unsafe {
        for number in 1..=31 {
            libc::signal(number, libc::SIG_DFL);
        }
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
    }
}

/// A descriptor that becomes readable when a child ends.
pub(crate) fn child_signal() -> io::Result<OwnedFd> {
    // SAFETY: `set` is initialised by sigemptyset; the returned descriptor is ours alone.
    unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        let fd = check(libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Makes this process unreadable for others of its uid (memory, environment, descriptors), forbids it and
/// its children new privileges, and makes it the parent of orphans where it is not PID 1.
pub(crate) fn harden() {
    // SAFETY: these prctl calls take integers only. Where one is refused, the engine's settings hold.
    unsafe {
        libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0);
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
        libc::umask(0o022);
    }
}

/// Closes every descriptor above 2.
pub(crate) fn close_inherited() {
    // SAFETY: called first thing in main, when nothing in this process owns a descriptor above 2.
    unsafe {
        if libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) < 0 {
            for fd in 3..1024 {
                libc::close(fd);
            }
        }
    }
}

/// Opens a session of its own. Async-signal-safe.
pub(crate) fn new_session() -> io::Result<()> {
    // SAFETY: no arguments.
    check(unsafe { libc::setsid() }).map(|_| ())
}

/// Makes the terminal that is descriptor 0 the controlling one of this session. Async-signal-safe.
pub(crate) fn control_stdin() -> io::Result<()> {
    // SAFETY: integers only.
    check(unsafe { libc::ioctl(0, libc::TIOCSCTTY as _, 0) }).map(|_| ())
}

/// Lets the other end of a terminal be opened; its number below /dev/pts.
pub(crate) fn unlock_terminal(ours: &impl AsRawFd) -> io::Result<libc::c_uint> {
    let (unlocked, mut number): (libc::c_int, libc::c_uint) = (0, 0);
    // SAFETY: the first call reads an int, the second writes an unsigned one, both through valid pointers.
    unsafe {
        check(libc::ioctl(ours.as_raw_fd(), libc::TIOCSPTLCK as _, &raw const unlocked))?;
        check(libc::ioctl(ours.as_raw_fd(), libc::TIOCGPTN as _, &raw mut number))?;
    }
    Ok(number)
}

/// Sets the size of a terminal; where that is refused it keeps the one it has.
pub(crate) fn set_terminal_size(terminal: &impl AsRawFd, rows: u16, cols: u16) {
    let size = libc::winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the call reads a winsize through a valid pointer.
    unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ as _, &raw const size) };
}

/// Lets a terminal's own line editing take a character of several bytes for one.
pub(crate) fn terminal_takes_utf8(terminal: &impl AsRawFd) {
    if let Some(mut settings) = terminal_settings(terminal) {
        settings.c_iflag |= libc::IUTF8;
        // SAFETY: the call reads a termios through a valid pointer.
        unsafe { libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, &raw const settings) };
    }
}

/// The character that ends the input of a terminal.
pub(crate) fn end_of_file_character(terminal: &impl AsRawFd) -> Option<u8> {
    terminal_settings(terminal)?.c_cc.get(libc::VEOF).copied()
}

fn terminal_settings(terminal: &impl AsRawFd) -> Option<libc::termios> {
    // SAFETY: `termios` is plain data that the call fills through a valid pointer.
    unsafe {
        let mut settings: libc::termios = mem::zeroed();
        check(libc::tcgetattr(terminal.as_raw_fd(), &raw mut settings)).ok().map(|_| settings)
    }
}

/// The process group in a terminal's foreground.
pub(crate) fn foreground_group(terminal: &impl AsRawFd) -> Option<libc::pid_t> {
    let mut group: libc::pid_t = 0;
    // SAFETY: the call writes a pid through a valid pointer.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGPGRP as _, &raw mut group) }).ok()?;
    Some(group)
}

/// Bytes that can be read from a pipe or socket now; 0 where the system does not say.
pub(crate) fn unread_bytes(source: &impl AsRawFd) -> u64 {
    let mut count: libc::c_int = 0;
    // SAFETY: the call writes an int through a valid pointer.
    let result = unsafe { libc::ioctl(source.as_raw_fd(), libc::FIONREAD as _, &raw mut count) };
    if result < 0 { 0 } else { u64::try_from(count).unwrap_or(0) }
}

/// Ends a socket after the bytes that are in it; false where it is none.
pub(crate) fn shutdown_read(socket: &impl AsRawFd) -> bool {
    // SAFETY: integers only.
    unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RD) == 0 }
}

/// Waits for one of `fds`, at most `timeout_ms`.
pub(crate) fn poll(fds: &mut [libc::pollfd], timeout_ms: u64) {
    let timeout = timeout_ms.min(60_000) as libc::c_int;
    // SAFETY: pointer and length describe the slice. An error (EINTR) leaves `revents` 0: nothing is ready.
    if unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) } < 0 {
        fds.iter_mut().for_each(|fd| fd.revents = 0);
    }
}

/// One entry for [`poll`].
pub(crate) fn interest(fd: RawFd, events: libc::c_short) -> libc::pollfd {
    libc::pollfd { fd, events, revents: 0 }
}

/// The outcome of one look for ended children.
pub(crate) enum Reaped {
    /// This child ended with this wait status.
    Child(libc::pid_t, libc::c_int),
    /// There are children, none has ended.
    Running,
    /// There are no children.
    None,
}

/// Takes one ended child, without waiting.
pub(crate) fn reap() -> Reaped {
    let mut status = 0;
    loop {
        // SAFETY: `status` is a valid place for the wait status.
        let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
        match pid {
            0 => return Reaped::Running,
            pid if pid > 0 => return Reaped::Child(pid, status),
            _ if io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) => {}
            _ => return Reaped::None,
        }
    }
}

/// Sends a signal to one process, or to a group where `pid` is negative. -1 is refused: see [`kill_cell`].
pub(crate) fn kill(pid: libc::pid_t, signal: libc::c_int) {
    if pid != -1 && pid != 0 {
        // SAFETY: integers only.
        unsafe { libc::kill(pid, signal) };
    }
}

/// The release of the kernel that answers.
pub(crate) fn kernel_release() -> io::Result<String> {
    // SAFETY: `utsname` is plain data that the call fills through a valid pointer, with a NUL at the end of each text.
    unsafe {
        let mut name: libc::utsname = mem::zeroed();
        check(libc::uname(&raw mut name))?;
        Ok(std::ffi::CStr::from_ptr(name.release.as_ptr()).to_string_lossy().into_owned())
    }
}

/// A child that does nothing until it is killed. For a process with one thread.
pub(crate) fn fork_waiting() -> io::Result<libc::pid_t> {
    // SAFETY: the child makes no call but those that wait and leave.
    unsafe {
        let pid = check(libc::fork())?;
        if pid == 0 {
            libc::alarm(120);
            libc::pause();
            libc::_exit(0);
        }
        Ok(pid)
    }
}

/// Whether this process is PID 1 of its namespace.
pub(crate) fn is_pid_1() -> bool {
    std::process::id() == 1
}

/// Kills every process of the pid namespace but this one, if this process is its PID 1; else returns false
/// and kills nothing, since -1 would then mean every process of the machine.
pub(crate) fn kill_cell() -> bool {
    if !is_pid_1() {
        return false;
    }
    // SAFETY: integers only.
    unsafe { libc::kill(-1, libc::SIGKILL) };
    true
}

/// CPU time of ended children in microseconds, and the largest one's memory in bytes.
pub(crate) fn children_usage() -> (u64, u64) {
    // SAFETY: `rusage` is plain data that the kernel fills.
    let usage = unsafe {
        let mut usage: libc::rusage = mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage);
        usage
    };
    let us = |time: libc::timeval| time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64;
    (us(usage.ru_utime) + us(usage.ru_stime), usage.ru_maxrss as u64 * 1024)
}

/// A unix stream socket connected to `path`, non-blocking from then on. A listener whose queue is full is
/// waited for `wait_ms` (0: not at all).
pub(crate) fn connect_unix(path: &Path, wait_ms: u32) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let path = path.as_bytes_with_nul();
    // SAFETY: `address` is plain data, and the copy stays within `sun_path` by the check before it. The
    // descriptor is owned from the moment it exists.
    unsafe {
        let mut address: libc::sockaddr_un = mem::zeroed();
        address.sun_family = libc::AF_UNIX as libc::sa_family_t;
        if path.len() > address.sun_path.len() {
            return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
        }
        for (slot, byte) in address.sun_path.iter_mut().zip(path) {
            *slot = *byte as libc::c_char;
        }
        let blocking = if wait_ms == 0 { libc::SOCK_NONBLOCK } else { 0 };
        let socket = libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | blocking, 0);
        let socket = OwnedFd::from_raw_fd(check(socket)?);
        if wait_ms > 0 {
            let wait = libc::timeval { tv_sec: 0, tv_usec: (wait_ms.min(900) * 1000) as libc::suseconds_t };
            let len = mem::size_of::<libc::timeval>() as libc::socklen_t;
            let wait = (&raw const wait).cast();
            check(libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_SNDTIMEO, wait, len))?;
        }
        let len = mem::size_of::<libc::sockaddr_un>() as libc::socklen_t;
        check(libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len))?;
        set_nonblocking(&socket)?;
        Ok(socket)
    }
}

/// Makes reads and writes of this descriptor return at once.
pub(crate) fn set_nonblocking(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: fcntl with integers on a descriptor that is open.
    unsafe {
        let flags = check(libc::fcntl(fd.as_raw_fd(), libc::F_GETFL))?;
        check(libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)).map(|_| ())
    }
}

/// The descriptor 0 of this process, as a borrowed one.
pub(crate) fn stdin() -> BorrowedFd<'static> {
    // SAFETY: descriptor 0 is never closed, only replaced.
    unsafe { BorrowedFd::borrow_raw(0) }
}

/// Puts `fd` in the place of descriptor 0, which ends the use of the boot pipe.
pub(crate) fn replace_stdin(fd: &OwnedFd) {
    // SAFETY: both are open; std does not own descriptor 0.
    unsafe { libc::dup2(fd.as_raw_fd(), 0) };
}
