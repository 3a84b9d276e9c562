//! Time as the daemon sees it: wall clock for people and rows, boot-time clock for deadlines. A deadline
//! is never computed from the wall clock, which can jump, and ages are told by it only where [`Clocks`] says so.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Difference of the two clocks' progress that is a jump: more than any drift, less than what retention counts in.
const JUMP_MS: u64 = 6 * 3_600_000;
/// Time without a jump after which ages are told by the wall clock again.
const EVEN_MS: u64 = 24 * 3_600_000;

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

/// The clocks at the last look, kept in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clocks {
    /// The wall clock, in milliseconds since 1970.
    pub wall_ms: u64,
    /// Milliseconds since the machine was started.
    pub boot_ms: u64,
    /// How long the wall clock has gone as fast as time does, in milliseconds.
    pub even_ms: u64,
}

impl Clocks {
    /// The clocks now, where `last` is what they were. One that was never looked at is believed. Of the time during which
    /// the machine was off nothing is known: after more than a few hours of it, that looks like a jump.
    pub fn look(last: Option<Self>, wall_ms: u64, boot_ms: u64) -> Self {
        let Some(last) = last else { return Self { wall_ms, boot_ms, even_ms: EVEN_MS } };
        // After a restart of the machine at least the time since then has passed.
        let passed = boot_ms.checked_sub(last.boot_ms).unwrap_or(boot_ms);
        let jumped = wall_ms.abs_diff(last.wall_ms.saturating_add(passed)) > JUMP_MS;
        let even_ms = if jumped { 0 } else { last.even_ms.saturating_add(passed).min(EVEN_MS) };
        Self { wall_ms, boot_ms, even_ms }
    }

    /// Whether something may be removed because it is old.
    pub fn tell_ages(&self) -> bool {
        self.even_ms >= EVEN_MS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_jump_the_clock_tells_ages_again_when_it_has_gone_evenly_for_a_day() {
        const HOUR: u64 = 3_600_000;
        const YEAR: u64 = 365 * 24 * HOUR;
        let at = |wall, boot| move |last: Clocks| Clocks::look(Some(last), wall, boot);
        let first = Clocks::look(None, 50 * YEAR, HOUR);
        assert!(first.tell_ages(), "nothing is known of an earlier time");
        assert!(at(50 * YEAR + HOUR, 2 * HOUR)(first).tell_ages());
        assert!(at(50 * YEAR + 99 * HOUR, 100 * HOUR)(first).tell_ages(), "a daemon that was away");
        for wall in [51 * YEAR, 49 * YEAR] {
            let mut now = at(wall, 2 * HOUR)(first);
            assert!(!now.tell_ages());
            for hour in 1..24 {
                now = at(wall + hour * HOUR, (2 + hour) * HOUR)(now);
                assert!(!now.tell_ages(), "{hour}");
            }
            assert!(at(wall + 24 * HOUR, 26 * HOUR)(now).tell_ages());
            assert!(!at(wall + YEAR, 26 * HOUR)(now).tell_ages(), "another jump");
            assert!(!at(50 * YEAR, 26 * HOUR)(now).tell_ages(), "and one back");
        }
        // A restart of the machine: an hour is no jump, a weekend may be one.
        assert!(at(50 * YEAR + HOUR, HOUR / 2)(first).tell_ages());
        assert!(!at(50 * YEAR + 60 * HOUR, HOUR / 2)(first).tell_ages());
    }
}
