//! Runs as PID 1 of a cell in the engine's tests, compiled by them, static and with nothing but std: does what
//! its first argument says and writes what it saw to /out/report, one `name=value` a line.

use std::arch::asm;
use std::io::{Read, Write};

unsafe extern "C" {
    fn syscall(number: i64, ...) -> i64;
    fn fork() -> i32;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
}

fn call(number: i64, a: [i64; 6]) -> i64 {
    // SAFETY: each call below fails, or touches nothing but descriptors and memory that it names.
    let result = unsafe { syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]) };
    match result {
        -1 => -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)),
        ok => ok,
    }
}

/// The signal that ends a child which does `act`, or 0.
fn signal_of(act: fn()) -> i32 {
    // SAFETY: the child runs `act`, which makes one system call, and leaves.
    unsafe {
        let child = fork();
        if child == 0 {
            act();
            std::process::exit(0);
        }
        let mut status = 0;
        waitpid(child, &mut status, 0);
        status & 0x7f
    }
}

#[cfg(target_arch = "x86_64")]
fn foreign_calls() -> Vec<(&'static str, i32)> {
    // getpid of the 32-bit table, and of the x32 one.
    let int80 = || {
        let mut number = 20_i64;
        // SAFETY: getpid, which is killed before it runs.
        unsafe { asm!("int 0x80", inout("rax") number) };
        std::hint::black_box(number);
    };
    let x32 = || {
        call(0x4000_0000 + 39, [0; 6]);
    };
    vec![("int80", signal_of(int80)), ("x32", signal_of(x32))]
}

#[cfg(not(target_arch = "x86_64"))]
fn foreign_calls() -> Vec<(&'static str, i32)> {
    Vec::new()
}

/// System call numbers: x86_64, aarch64.
fn number(x64: i64, arm64: i64) -> i64 {
    if cfg!(target_arch = "x86_64") { x64 } else { arm64 }
}

fn kernel_surface(report: &mut String) {
    let path = c"/out/file".as_ptr() as i64;
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
        ("open_setuid", number(257, 56), [-100, c"/out/s".as_ptr() as i64, 0o101, 0o4755, 0, 0]),
        ("open_garbage_mode", number(257, 56), [-100, path, 0, 0o6777, 0, 0]),
        ("mknod_setuid", number(259, 33), [-100, c"/out/n".as_ptr() as i64, 0o104_755, 0, 0, 0]),
        ("mknod_whiteout", number(259, 33), [-100, c"/out/w".as_ptr() as i64, 0o020_600, 0, 0, 0]),
        ("mknod_fifo", number(259, 33), [-100, c"/out/f".as_ptr() as i64, 0o010_600, 0, 0, 0]),
        ("no_such_call", 1000, [0, 0, 0, 0, 0, 0]),
    ];
    for (name, number, args) in probes {
        report.push_str(&format!("{name}={}\n", call(*number, *args).min(0)));
    }
    for (name, signal) in foreign_calls() {
        report.push_str(&format!("{name}=signal {signal}\n"));
    }
}

fn surroundings(report: &mut String) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    for line in status.lines() {
        if let Some((
            name @ ("Seccomp" | "NoNewPrivs" | "CapEff" | "CapBnd" | "CapPrm" | "Uid" | "Gid" | "Groups"),
            value,
        )) = line.split_once(':')
        {
            report.push_str(&format!("{name}={}\n", value.split_whitespace().collect::<Vec<_>>().join(",")));
        }
    }
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_else(|e| format!("error {e}"));
    let devices = read("/proc/net/dev")
        .lines()
        .skip(2)
        .map(|l| l.split(':').next().unwrap_or("").trim().to_owned())
        .collect::<Vec<_>>();
    report.push_str(&format!("net_devices={}\n", devices.join(",")));
    report.push_str(&format!(
        "resolv_conf={}\n",
        read("/etc/resolv.conf")
            .lines()
            .filter(|l| l.starts_with("nameserver"))
            .collect::<Vec<_>>()
            .join(",")
    ));
    report.push_str(&format!("proc_cmdline={}\n", read("/proc/cmdline")));
    report.push_str(&format!("hostname={}\n", read("/proc/sys/kernel/hostname").trim()));
    report.push_str(&format!("oom_score_adj={}\n", read("/proc/self/oom_score_adj").trim()));
    for (name, path) in
        [("write_root", "/tmp-file"), ("write_sys", "/sys/x"), ("write_etc_hosts", "/etc/hosts")]
    {
        let open = std::fs::OpenOptions::new().append(true).create(true).open(path);
        report.push_str(&format!("{name}={}\n", open.err().and_then(|e| e.raw_os_error()).unwrap_or(0)));
    }
    for line in read("/proc/self/limits").lines() {
        for (name, title) in
            [("core", "Max core file size"), ("nofile", "Max open files"), ("memlock", "Max locked memory")]
        {
            if let Some(rest) = line.strip_prefix(title) {
                let values: Vec<&str> = rest.split_whitespace().take(2).collect();
                report.push_str(&format!("limit_{name}={}\n", values.join("/")));
            }
        }
    }
}

fn main() {
    let mut boot = Vec::new();
    std::io::stdin().read_to_end(&mut boot).expect("boot bytes");
    let mut report = format!(
        "pid={}\nboot_bytes={}\nboot={}\n",
        std::process::id(),
        boot.len(),
        String::from_utf8_lossy(&boot[..boot.len().min(64)])
    );
    let what = std::env::args().nth(1).unwrap_or_default();
    match what.as_str() {
        "probe" => {
            std::fs::write("/out/file", "x").expect("a file");
            surroundings(&mut report);
            kernel_surface(&mut report);
        }
        "sleep" => {}
        "exit" => report.push_str("leaving\n"),
        "eat" => {}
        other => report.push_str(&format!("unknown={other}\n")),
    }
    // Several cells may share the directory: each has a name of its own until it is done.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock");
    let part = format!("/out/report.{}", now.as_nanos());
    std::fs::write(&part, &report).expect("the report");
    std::fs::rename(&part, "/out/report").expect("the report");
    eprintln!("last words");
    std::io::stderr().flush().expect("stderr");
    match what.as_str() {
        "exit" => std::process::exit(7),
        "sleep" => loop {
            std::thread::sleep(std::time::Duration::from_secs(3600));
        },
        "eat" => {
            let mut all = Vec::new();
            loop {
                all.push(vec![1_u8; 1 << 20]);
            }
        }
        _ => {}
    }
}
