//! `hotcell-init attack NONCE DISK_MIB MEMORY_MIB PARTS`: what `hotcell doctor` runs in a cell in the place of an
//! agent. It tries what a cell must not be able to do and prints what came of it, one JSON object a line; the judgement
//! is the daemon's. It needs nothing of the image and has no right that any other program in the cell has not.
//! It must never judge, print a value that looks like a secret, or dial an address outside of the cell.

mod calls;
mod secrets;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use crate::sys;

/// The word that asks for it, in the place of a boot message.
pub(crate) const WORD: &str = "attack";
/// Longest wait for an answer on a socket of the cell.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Longest flood of the disk.
const FLOOD_MAX: Duration = Duration::from_secs(30);
/// The parts that end by a limit.
const FLOODS: [&str; 3] = ["processes", "memory", "disk"];
/// Time for a line to reach the daemon.
const ARRIVE: Duration = Duration::from_secs(1);
/// How long what was taken without an end stays there.
const LOOKED_AT: Duration = Duration::from_secs(10);
/// Most processes that are started where nothing stops it.
const FORKS_MAX: u32 = 4096;
/// Most entries of /dev that are told.
const DEVICES_MAX: usize = 64;
/// Longest value of a finding, in characters.
const SEEN_CHARS_MAX: usize = 400;
const MIB: u64 = 1 << 20;

/// Files that are opened for writing, and nothing is written to them.
const WRITES: [&str; 14] = [
    "/attack",
    "/etc/attack",
    "/usr/bin/attack",
    "/etc/passwd",
    "/etc/hosts",
    "/.hotcell/attack",
    "/.hotcell-init",
    "/proc/sys/kernel/core_pattern",
    "/proc/sysrq-trigger",
    "/proc/1/oom_score_adj",
    "/sys/attack",
    "/sys/fs/cgroup/cgroup.procs",
    "/sys/fs/cgroup/attack",
    "/dev/attack",
];
/// What tells of the kernel, the host and its devices.
const HIDDEN: [&str; 14] = [
    "/proc/cmdline",
    "/proc/config.gz",
    "/proc/diskstats",
    "/proc/iomem",
    "/proc/kallsyms",
    "/proc/kcore",
    "/proc/keys",
    "/proc/modules",
    "/proc/partitions",
    "/sys/block",
    "/sys/firmware",
    "/sys/fs/bpf",
    "/sys/kernel/debug",
    "/sys/kernel/security",
];
/// Where engines and daemons listen on a host.
const SOCKETS: [&str; 7] = [
    "/var/run/docker.sock",
    "/run/docker.sock",
    "/run/podman/podman.sock",
    "/run/containerd/containerd.sock",
    "/run/hotcell/hotcell.sock",
    "/run/hotcell/engine.sock",
    "/proc/1/root/run/docker.sock",
];
/// What PID 1 keeps to itself: its variables once held the key of the control socket's ends.
const OF_PID_1: [&str; 5] = ["environ", "mem", "maps", "fd", "root"];
/// Questions to the proxy that no policy's answer can be: yes. `doctor.invalid` is a name that cannot exist (RFC 6761).
const ASKED: [(&str, &str); 4] = [
    ("metadata", "CONNECT 169.254.169.254:80 HTTP/1.1\r\nHost: 169.254.169.254:80\r\n\r\n"),
    (
        "metadata_http",
        "GET http://169.254.169.254/latest/meta-data/ HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n",
    ),
    ("loopback", "CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: 127.0.0.1:22\r\n\r\n"),
    ("name", "CONNECT doctor.invalid:443 HTTP/1.1\r\nHost: doctor.invalid:443\r\n\r\n"),
];
/// Where init answers as the proxy.
const PROXY_PORT: u16 = 3128;

/// Prints findings.
struct Told {
    nonce: String,
    count: u32,
}

impl Told {
    fn tell(&mut self, name: &str, seen: &str) {
        self.count += 1;
        let seen: String = seen.chars().take(SEEN_CHARS_MAX).collect();
        let line =
            format!("{{\"nonce\":{},\"name\":{},\"seen\":{}}}\n", json(&self.nonce), json(name), json(&seen));
        // Nobody reads it: then there is no finding, and that is seen.
        let _ = io::stdout().write_all(line.as_bytes());
    }

    fn outcome<T>(&mut self, name: &str, result: io::Result<T>) {
        let seen = words(result.map(|_| "done".to_owned()));
        self.tell(name, &seen);
    }
}

/// A JSON string, in ASCII.
fn json(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => {
                out.push('\\');
                out.push(c);
            }
            ' '..='~' => out.push(c),
            _ => {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
        }
    }
    out.push('"');
    out
}

/// What was seen, or the error's number.
fn words(result: io::Result<String>) -> String {
    match result {
        Ok(seen) => seen,
        Err(error) => match error.raw_os_error() {
            Some(number) => format!("errno {number}"),
            None => format!("error {:?}", error.kind()),
        },
    }
}

/// Tries everything. `args` are those behind [`WORD`].
pub(crate) fn run(args: &[String]) -> ExitCode {
    let [nonce, disk_mib, memory_mib, parts] = args else {
        sys::complain("attack: wrong arguments");
        return ExitCode::from(64);
    };
    let mut told = Told { nonce: nonce.clone(), count: 0 };
    let number = |text: &str| text.parse::<u64>().unwrap_or(0);
    let (disk_mib, memory_mib) = (number(disk_mib), number(memory_mib));
    for part in parts.split(',') {
        if FLOODS.contains(&part) {
            told.tell(&format!("flood.{part}.begun"), "done");
            if parts == part {
                // It ends the whole cell, and what was said is to arrive before.
                std::thread::sleep(ARRIVE);
            }
        }
        match part {
            "look" => look(&mut told, args),
            "calls" => calls_of_the_kernel(&mut told),
            "processes" => flood_processes(&mut told),
            "memory" => flood_memory(&mut told, args),
            "disk" => flood_disk(&mut told, disk_mib),
            "eat" => eat(memory_mib),
            _ => sys::complain("attack: an unknown part"),
        }
    }
    ExitCode::SUCCESS
}

/// All but the floods.
fn look(told: &mut Told, args: &[String]) {
    who_am_i(told);
    files(told);
    processes(told);
    network(told);
    secrets::search(told);
    results(told);
    by_a_child(args, "calls");
    told.tell("looked", &told.count.to_string());
}

/// This program again, for one part of it.
fn again(args: &[String], part: &str) -> io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(WORD).args(&args[..3]).arg(part).stdin(Stdio::null());
    Ok(command)
}

/// In a process of its own: a call that is not refused may change whoever made it.
fn by_a_child(args: &[String], part: &str) {
    let ended = again(args, part).and_then(|mut command| command.status());
    if let Err(error) = ended {
        sys::complain(&format!("attack {part}: {error}"));
    }
}

fn calls_of_the_kernel(told: &mut Told) {
    let dir = "/tmp/attack-calls";
    let made = fs::create_dir_all(dir).and_then(|()| File::create(format!("{dir}/file")));
    if let Err(error) = made {
        sys::complain(&format!("attack: {dir}: {error}"));
        return;
    }
    for (name, result) in calls::surface(dir) {
        let seen = if result < 0 { format!("errno {}", -result) } else { "done".to_owned() };
        told.tell(&format!("call.{name}"), &seen);
    }
    for (name, signal) in calls::foreign() {
        told.tell(&format!("call.{name}"), &format!("signal {signal}"));
    }
    let _ = fs::remove_dir_all(dir);
}

fn who_am_i(told: &mut Told) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    for line in status.lines() {
        if let Some((name, value)) = line.split_once(':')
            && [
                "CapInh",
                "CapPrm",
                "CapEff",
                "CapBnd",
                "CapAmb",
                "NoNewPrivs",
                "Seccomp",
                "Uid",
                "Gid",
                "Groups",
            ]
            .contains(&name)
        {
            told.tell(&format!("status.{name}"), &value.split_whitespace().collect::<Vec<_>>().join(" "));
        }
    }
    // PR_GET_NO_NEW_PRIVS: not every kernel tells it in the file.
    let fixed = calls::call(calls::number(157, 167), [39, 0, 0, 0, 0, 0]);
    told.tell("no_new_privs", &fixed.to_string());
    told.tell("kernel", &words(sys::kernel_release()));
    let setuid = calls::call(calls::number(105, 146), [0; 6]);
    told.tell("setuid", &if setuid < 0 { format!("errno {}", -setuid) } else { "done".to_owned() });
}

fn files(told: &mut Told) {
    for path in WRITES {
        let there = fs::symlink_metadata(path).is_ok();
        let opened = OpenOptions::new().append(true).create(true).open(path);
        if opened.is_ok() && !there {
            let _ = fs::remove_file(path);
        }
        told.outcome(&format!("write.{path}"), opened);
    }
    told.outcome("mkdir./sys/fs/cgroup/attack", fs::create_dir("/sys/fs/cgroup/attack"));
    for path in HIDDEN {
        told.tell(&format!("hidden.{path}"), &words(content(path)));
    }
    let mut devices = BTreeSet::new();
    find_devices(Path::new("/dev"), 0, &mut devices);
    told.tell("devices", &devices.into_iter().take(DEVICES_MAX).collect::<Vec<_>>().join(" "));
}

/// `empty`, or how much there is; never what.
fn content(path: &str) -> io::Result<String> {
    let count = if fs::metadata(path)?.is_dir() {
        fs::read_dir(path)?.count()
    } else {
        let mut start = [0; 256];
        File::open(path)?.read(&mut start)?
    };
    Ok(if count == 0 { "empty".to_owned() } else { format!("{count} there") })
}

fn find_devices(dir: &Path, depth: u32, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && depth < 3 => find_devices(&entry.path(), depth + 1, found),
            Ok(kind) if kind.is_char_device() || kind.is_block_device() => {
                found.insert(entry.path().display().to_string());
            }
            _ => {}
        }
    }
}

fn processes(told: &mut Told) {
    for path in SOCKETS {
        told.outcome(&format!("socket.{path}"), UnixStream::connect(path));
    }
    for name in OF_PID_1 {
        let path = format!("/proc/1/{name}");
        let opened = match name {
            "fd" | "root" => fs::read_dir(&path).map(|_| ()),
            _ => File::open(&path).map(|_| ()),
        };
        told.outcome(&format!("pid1.{name}"), opened);
    }
    // PTRACE_ATTACH.
    let attached = calls::call(calls::number(101, 117), [16, 1, 0, 0, 0, 0]);
    told.tell("pid1.ptrace", &if attached < 0 { format!("errno {}", -attached) } else { "done".to_owned() });
}

fn network(told: &mut Told) {
    let lines = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let devices = lines("/proc/net/dev");
    let devices: Vec<&str> =
        devices.lines().skip(2).filter_map(|l| l.split(':').next()).map(str::trim).collect();
    told.tell("net.devices", &devices.join(" "));
    let four = lines("/proc/net/route")
        .lines()
        .skip(1)
        .filter(|l| !l.trim().is_empty() && !l.starts_with("lo"))
        .count();
    let six = lines("/proc/net/ipv6_route").lines().filter(|l| !l.trim_end().ends_with("lo")).count();
    told.tell("net.routes", &(four + six).to_string());
    let resolv = lines("/etc/resolv.conf");
    let servers: Vec<&str> =
        resolv.lines().filter_map(|l| l.strip_prefix("nameserver")).map(str::trim).collect();
    told.tell("dns.servers", &servers.join(" "));
    told.tell("dns.answer", &words(ask_for_a_name()));
    for (name, request) in ASKED {
        told.tell(&format!("proxy.{name}"), &words(ask_the_proxy(request)));
    }
}

/// Asks whoever may listen on the cell's own loopback; nobody else is ever asked.
fn ask_for_a_name() -> io::Result<String> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    socket.connect("127.0.0.1:53")?;
    socket.send(b"\0\x07\x01\0\0\x01\0\0\0\0\0\0\x06doctor\x07invalid\0\0\x01\0\x01")?;
    let count = socket.recv(&mut [0; 512])?;
    Ok(format!("{count} bytes"))
}

/// The status that the proxy answers with.
fn ask_the_proxy(request: &str) -> io::Result<String> {
    let address = SocketAddr::from(([127, 0, 0, 1], PROXY_PORT));
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_MAX)?;
    stream.set_read_timeout(Some(ANSWER_MAX))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    let mut piece = [0; 256];
    while !answer.contains(&b'\n') {
        match stream.read(&mut piece)? {
            0 => break,
            count => answer.extend_from_slice(&piece[..count]),
        }
    }
    let text = String::from_utf8_lossy(&answer);
    Ok(match text.split_whitespace().nth(1) {
        Some(status) => format!("status {status}"),
        None => "no answer".to_owned(),
    })
}

/// Tries to have something said that PID 1 did not say.
fn results(told: &mut Told) {
    let forged = format!("{{\"nonce\":{},\"name\":\"forged\",\"seen\":\"written\"}}\n", json(&told.nonce));
    for fd in [1, 2] {
        let written = OpenOptions::new().write(true).open(format!("/proc/1/fd/{fd}"));
        told.outcome(
            &format!("result.fd{fd}"),
            written.and_then(|mut file| file.write_all(forged.as_bytes())),
        );
    }
    let spoken = UnixStream::connect("/.hotcell/ctl.sock").and_then(|mut socket| {
        socket.set_write_timeout(Some(ANSWER_MAX))?;
        socket.write_all(forged.as_bytes())
    });
    // Whether it can be opened is no matter: that nobody believes it is.
    told.tell("result.spoken", &words(spoken.map(|()| "done".to_owned())));
}

/// Starts processes until it may no more.
fn flood_processes(told: &mut Told) {
    let mut children = Vec::new();
    let mut end = "no end".to_owned();
    while (children.len() as u32) < FORKS_MAX {
        match sys::fork_waiting() {
            Ok(pid) => children.push(pid),
            Err(error) => {
                end = words(Err(error));
                break;
            }
        }
    }
    for pid in &children {
        sys::kill(*pid, libc::SIGKILL);
    }
    while !matches!(sys::reap(), sys::Reaped::None) {
        std::thread::sleep(Duration::from_millis(1));
    }
    told.tell("flood.processes", &format!("{end} after {}", children.len()));
}

/// A child takes memory until it is killed for it.
fn flood_memory(told: &mut Told, args: &[String]) {
    let seen = (|| {
        let mut child = again(args, "eat")?.stdout(Stdio::piped()).spawn()?;
        let mut eaten = 0;
        if let Some(mut out) = child.stdout.take() {
            let mut piece = [0; 4096];
            while let Ok(count @ 1..) = out.read(&mut piece) {
                eaten += count;
            }
        }
        let status = child.wait()?;
        let end = status.signal().map_or_else(|| "no end".to_owned(), |signal| format!("signal {signal}"));
        Ok(format!("{end} after {eaten}"))
    })();
    told.tell("flood.memory", &words(seen));
}

/// Takes memory, and prints a byte for each MiB.
fn eat(memory_mib: u64) {
    // First in line, before anything else in the cell.
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
    let mut eaten = Vec::new();
    for _ in 0..memory_mib.saturating_mul(2).saturating_add(64) {
        eaten.push(vec![1_u8; MIB as usize]);
        if io::stdout().write_all(b".").and_then(|()| io::stdout().flush()).is_err() {
            return;
        }
    }
    std::hint::black_box(&eaten);
}

/// Writes until there is no room.
fn flood_disk(told: &mut Told, disk_mib: u64) {
    let path = "/tmp/attack-flood";
    let (begun, piece) = (Instant::now(), vec![1_u8; MIB as usize]);
    let mut written = 0;
    let end = File::create(path).and_then(|mut file| {
        while written < disk_mib.saturating_mul(2).saturating_add(64) {
            if begun.elapsed() > FLOOD_MAX {
                return Ok("late".to_owned());
            }
            file.write_all(&piece)?;
            written += 1;
        }
        // Where no file system is the limit, a daemon looks at what was taken, and ends the cell for it.
        std::thread::sleep(LOOKED_AT);
        Ok("no end".to_owned())
    });
    let end = words(end);
    let _ = fs::remove_file(path);
    told.tell("flood.disk", &format!("{end} after {written}"));
}
