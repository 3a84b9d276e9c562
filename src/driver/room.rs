//! What the host has for further jobs: memory and disk space as they are now, less the reserves, less what jobs that
//! have just started will take in a moment. It reads two figures of the kernel and must never wait for anything.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::cell::Settings;
use crate::scheduler::Need;
use crate::workspace::host_free_bytes;

/// How long what was read holds.
const HOLDS: Duration = Duration::from_secs(1);
/// How long a job takes to take what it needs: until then its need is not seen in the kernel's figures.
const YOUNG: Duration = Duration::from_secs(20);
/// Jobs that are remembered as young; of more the oldest count as grown.
const YOUNG_MAX: usize = 4096;

/// The host's room.
#[derive(Debug)]
pub(super) struct Room {
    state_dir: PathBuf,
    reserve: Need,
    looked: Option<Instant>,
    young: VecDeque<(Instant, Need)>,
}

impl Room {
    pub(super) fn new(settings: &Settings) -> Self {
        let (memory_bytes, disk_bytes) = (settings.memory_reserve_bytes, settings.disk_reserve_bytes);
        let (state_dir, reserve) = (settings.state_dir.clone(), Need { memory_bytes, disk_bytes });
        Self { state_dir, reserve, looked: None, young: VecDeque::new() }
    }

    /// What there is, where nobody looked a moment ago.
    pub(super) fn look(&mut self, now: Instant) -> Option<Need> {
        if self.looked.is_some_and(|at| now < at + HOLDS) {
            return None;
        }
        self.looked = Some(now);
        // What cannot be read is no reason to start nothing.
        let memory_bytes = std::fs::read_to_string("/proc/meminfo")
            .ok()
            .and_then(|text| available_bytes(&text))
            .unwrap_or(u64::MAX);
        let disk_bytes = host_free_bytes(&self.state_dir).unwrap_or(u64::MAX);
        Some(self.left(now, Need { memory_bytes, disk_bytes }))
    }

    /// A job starts.
    pub(super) fn taken(&mut self, now: Instant, need: Need) {
        self.young.push_back((now, need));
        if self.young.len() > YOUNG_MAX {
            self.young.pop_front();
        }
    }

    fn left(&mut self, now: Instant, free: Need) -> Need {
        while self.young.front().is_some_and(|(started, _)| *started + YOUNG <= now) {
            self.young.pop_front();
        }
        self.young.iter().fold(free.without(self.reserve), |left, (_, need)| left.without(*need))
    }
}

/// Returns when it is time to look again; never where nobody waits for room.
pub(super) async fn again(somebody_waits: bool) {
    if somebody_waits {
        tokio::time::sleep(HOLDS).await;
    } else {
        std::future::pending().await
    }
}

/// `MemAvailable` of `/proc/meminfo` (proc(5)): what can be had without swapping.
fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_just_started_counts_until_the_kernel_sees_it() {
        let need = |memory_bytes, disk_bytes| Need { memory_bytes, disk_bytes };
        let (state_dir, reserve) = (PathBuf::from("/"), need(100, 10));
        let mut room = Room { state_dir, reserve, looked: None, young: VecDeque::new() };
        let start = Instant::now();
        assert_eq!(room.left(start, need(1000, 5)), need(900, 0));
        room.taken(start, need(300, 0));
        room.taken(start + YOUNG / 2, need(200, 0));
        assert_eq!(room.left(start + YOUNG / 2, need(1000, 50)), need(400, 40));
        assert_eq!(room.left(start + YOUNG, need(1000, 50)), need(700, 40));
        assert_eq!(room.left(start + 2 * YOUNG, need(1000, 50)), need(900, 40));
    }

    #[test]
    fn available_memory_is_read_as_the_kernel_tells_it() {
        let text = "MemTotal:       24585632 kB\nMemFree:         1 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(available_bytes(text), Some(2 << 20));
        assert_eq!(available_bytes("MemTotal: 1 kB\n"), None);
        let here = std::fs::read_to_string("/proc/meminfo").expect("the kernel's figures");
        assert!(available_bytes(&here).is_some_and(|bytes| bytes > 1 << 20), "{here}");
    }
}
