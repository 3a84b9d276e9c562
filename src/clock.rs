//! Time as the daemon sees it: wall clock for people and rows, boot-time clock for deadlines. A deadline
//! is never computed from the wall clock, which can jump.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Wall clock in milliseconds since 1970 (UTC). For display and ordering of rows only.
pub fn wall_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_millis() as u64
}

/// Milliseconds since boot, counting suspend (CLOCK_BOOTTIME): never goes back, the same for all processes.
pub fn boot_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

/// RFC 3339 in UTC with milliseconds, for people and JSON.
pub fn rfc3339(wall_ms: u64) -> String {
    jiff::Timestamp::from_millisecond(wall_ms as i64)
        .map_or_else(|_| wall_ms.to_string(), |t| format!("{t:.3}"))
}
