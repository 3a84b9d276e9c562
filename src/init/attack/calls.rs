//! System calls that no cell may have, and a few that it must have, each tried once. Nothing but std, so that the
//! engine's tests compile it into a PID 1 of their own. It must never make a call that could change anything outside of
//! the directory that it is given: each one fails by its arguments where nothing refuses it before.

use std::ffi::CString;

unsafe extern "C" {
    fn syscall(number: i64, ...) -> i64;
    fn fork() -> i32;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
    fn _exit(code: i32) -> !;
}

/// What the call gives, or the number of its error, negative.
pub(crate) fn call(number: i64, a: [i64; 6]) -> i64 {
    // SAFETY: each call below fails, or touches nothing but descriptors and memory that it names.
    let result = unsafe { syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]) };
    match result {
        -1 => -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)),
        ok => ok,
    }
}

/// The signal that ends a child which does `act`, or 0.
#[cfg(target_arch = "x86_64")]
fn signal_of(act: fn()) -> i32 {
    // SAFETY: the child runs `act`, which makes one system call, and leaves.
    unsafe {
        let child = fork();
        if child == 0 {
            act();
            _exit(0);
        }
        let mut status = 0;
        waitpid(child, &raw mut status, 0);
        status & 0x7f
    }
}

/// Calls by the tables of other architectures, and the signal that ends who makes them.
#[cfg(target_arch = "x86_64")]
pub(crate) fn foreign() -> Vec<(&'static str, i32)> {
    // getpid of the 32-bit table, and of the x32 one.
    let int80 = || {
        let mut number = 20_i64;
        // SAFETY: getpid, which is killed before it runs.
        unsafe { std::arch::asm!("int 0x80", inout("rax") number) };
        std::hint::black_box(number);
    };
    let x32 = || {
        call(0x4000_0000 + 39, [0; 6]);
    };
    vec![("int80", signal_of(int80)), ("x32", signal_of(x32))]
}

/// There are none.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn foreign() -> Vec<(&'static str, i32)> {
    Vec::new()
}

/// System call numbers: x86_64, aarch64.
pub(crate) fn number(x64: i64, arm64: i64) -> i64 {
    if cfg!(target_arch = "x86_64") { x64 } else { arm64 }
}

/// What each call gives, 0 or its error; `dir` can be written, and has a file `file`.
pub(crate) fn surface(dir: &str) -> Vec<(&'static str, i64)> {
    let paths =
        ["file", "s", "n", "w", "f"].map(|name| CString::new(format!("{dir}/{name}")).unwrap_or_default());
    let [path, s, n, w, f] = paths.each_ref().map(|path| path.as_ptr() as i64);
    let socket = number(41, 198);
    let probes: &[(&str, i64, [i64; 6])] = &[
        ("unix", socket, [1, 1, 0, 0, 0, 0]),
        ("inet", socket, [2, 1, 0, 0, 0, 0]),
        ("inet6_udp", socket, [10, 2, 17, 0, 0, 0]),
        ("netlink_route", socket, [16, 3, 0, 0, 0, 0]),
        ("netlink_audit", socket, [16, 3, 9, 0, 0, 0]),
        ("inet_icmp", socket, [2, 2, 1, 0, 0, 0]),
        ("packet", socket, [17, 3, 0, 0, 0, 0]),
        ("af_alg", socket, [38, 5, 0, 0, 0, 0]),
        ("vsock", socket, [40, 1, 0, 0, 0, 0]),
        ("vsock_high_bits", socket, [1 << 32 | 40, 1, 0, 0, 0, 0]),
        ("ptrace", number(101, 117), [0, 0, 0, 0, 0, 0]),
        ("process_vm_readv", number(310, 270), [1, 0, 0, 0, 0, 0]),
        ("pidfd_getfd", 438, [0, 0, 0, 0, 0, 0]),
        ("unshare_user", number(272, 97), [0x1000_0000, 0, 0, 0, 0, 0]),
        ("unshare_files", number(272, 97), [0x400, 0, 0, 0, 0, 0]),
        ("setns", number(308, 268), [0, 0, 0, 0, 0, 0]),
        ("clone_newuser", number(56, 220), [0x1000_0000 | 17, 0, 0, 0, 0, 0]),
        ("clone3", 435, [0, 0, 0, 0, 0, 0]),
        ("openat2", 437, [0, 0, 0, 0, 0, 0]),
        ("io_uring_setup", 425, [1, 0, 0, 0, 0, 0]),
        ("memfd_secret", 447, [0, 0, 0, 0, 0, 0]),
        ("userfaultfd", number(323, 282), [0, 0, 0, 0, 0, 0]),
        ("bpf", number(321, 280), [0, 0, 0, 0, 0, 0]),
        ("keyctl", number(250, 219), [0, 0, 0, 0, 0, 0]),
        ("perf_event_open", number(298, 241), [0, 0, 0, 0, 0, 0]),
        ("mount", number(165, 40), [0, 0, 0, 0, 0, 0]),
        ("vmsplice", number(278, 75), [-1, 0, 0, 0, 0, 0]),
        ("personality_read_implies_exec", number(135, 92), [0x040_0000, 0, 0, 0, 0, 0]),
        ("personality_query", number(135, 92), [0xffff_ffff, 0, 0, 0, 0, 0]),
        ("ioctl_tiocsti", number(16, 29), [0, 0x5412, 0, 0, 0, 0]),
        ("ioctl_tiocsti_high_bits", number(16, 29), [0, 1 << 32 | 0x5412, 0, 0, 0, 0]),
        ("ioctl_tioclinux", number(16, 29), [0, 0x541c, 0, 0, 0, 0]),
        ("ioctl_tiocsetd", number(16, 29), [0, 0x5423, 0, 0, 0, 0]),
        ("ioctl_tcgets", number(16, 29), [0, 0x5401, 0, 0, 0, 0]),
        ("ioctl_fionbio", number(16, 29), [-1, 0x5421, 0, 0, 0, 0]),
        ("chmod_plain", number(268, 53), [-100, path, 0o755, 0, 0, 0]),
        ("chmod_setuid", number(268, 53), [-100, path, 0o4755, 0, 0, 0]),
        ("chmod_setgid", number(268, 53), [-100, path, 0o2755, 0, 0, 0]),
        ("fchmodat2_setuid", 452, [-100, path, 0o4755, 0, 0, 0]),
        ("open_setuid", number(257, 56), [-100, s, 0o101, 0o4755, 0, 0]),
        ("open_garbage_mode", number(257, 56), [-100, path, 0, 0o6777, 0, 0]),
        ("mknod_setuid", number(259, 33), [-100, n, 0o104_755, 0, 0, 0]),
        ("mknod_whiteout", number(259, 33), [-100, w, 0o020_600, 0, 0, 0]),
        ("mknod_fifo", number(259, 33), [-100, f, 0o010_600, 0, 0, 0]),
        ("no_such_call", 1000, [0, 0, 0, 0, 0, 0]),
    ];
    let mut seen = Vec::new();
    for (name, number, args) in probes {
        let result = call(*number, *args);
        if *name == "clone_newuser" && result == 0 {
            // The child, where nothing refused it.
            // SAFETY: no arguments of ours; nothing is left to be done.
            unsafe { _exit(0) };
        }
        seen.push((*name, result.min(0)));
    }
    seen
}
