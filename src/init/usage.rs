//! What the cell used, from its cgroup (version 1 or 2) as it is seen inside, with the kernel's figures for
//! ended children where no cgroup file can be read. It must never fail: a counter that is not there is 0.

use std::fs::File;
use std::io::Read;

use crate::sys;

/// The counters at one moment.
#[derive(Clone, Copy, Default)]
pub(crate) struct Usage {
    oom_kills: u64,
    cpu_us: Option<u64>,
    peak_memory_bytes: Option<u64>,
}

/// What was used since an earlier moment.
pub(crate) struct Used {
    /// Processes killed for memory.
    pub(crate) oom_kills: u64,
    /// CPU time.
    pub(crate) cpu_us: u64,
    /// The highest use of memory, ever.
    pub(crate) peak_memory_bytes: u64,
}

impl Usage {
    /// The counters now.
    pub(crate) fn now() -> Self {
        let cpu_v1_ns = ["/sys/fs/cgroup/cpuacct/cpuacct.usage", "/sys/fs/cgroup/cpu,cpuacct/cpuacct.usage"]
            .iter()
            .find_map(|path| number(path));
        Self {
            oom_kills: field("/sys/fs/cgroup/memory.events", "oom_kill")
                .or_else(|| field("/sys/fs/cgroup/memory/memory.oom_control", "oom_kill"))
                .unwrap_or(0),
            cpu_us: field("/sys/fs/cgroup/cpu.stat", "usage_usec").or(cpu_v1_ns.map(|ns| ns / 1000)),
            peak_memory_bytes: number("/sys/fs/cgroup/memory.peak")
                .or_else(|| number("/sys/fs/cgroup/memory/memory.max_usage_in_bytes")),
        }
    }

    /// What was used since then.
    pub(crate) fn since(&self) -> Used {
        let now = Self::now();
        let (children_cpu_us, children_memory_bytes) = sys::children_usage();
        let cpu_us = now.cpu_us.zip(self.cpu_us).map(|(now, then)| now.saturating_sub(then));
        Used {
            oom_kills: now.oom_kills.saturating_sub(self.oom_kills),
            cpu_us: cpu_us.unwrap_or(children_cpu_us),
            peak_memory_bytes: now.peak_memory_bytes.unwrap_or(children_memory_bytes),
        }
    }
}

fn read(path: &str) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(4096).read_to_string(&mut text).ok()?;
    Some(text)
}

fn number(path: &str) -> Option<u64> {
    read(path)?.trim().parse().ok()
}

fn field(path: &str, name: &str) -> Option<u64> {
    read(path)?.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}
