//! Runs as PID 1 of a cell in the engine's tests, compiled by them, static and with nothing but std: does what
//! its first argument says and writes what it saw to /out/report, one `name=value` a line.

#[path = "../../../src/init/attack/calls.rs"]
mod calls;

use std::io::{Read, Write};

fn kernel_surface(report: &mut String) {
    for (name, result) in calls::surface("/out") {
        report.push_str(&format!("{name}={result}\n"));
    }
    for (name, signal) in calls::foreign() {
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
