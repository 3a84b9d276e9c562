//! Parking: a job that waits for a moment on the wall clock, without a cell and without a slot, and what it
//! carries over to its next attempt. Facts and arithmetic only; nothing here reads a clock.

use serde::{Deserialize, Serialize};

use crate::money::MicroUsd;

/// First pause after the provider's limit where the provider names none; doubled each time.
const BACKOFF_FIRST_MS: u64 = 60_000;
/// Longest pause after the provider's limit.
const BACKOFF_MAX_MS: u64 = 30 * 60_000;
/// Longest pause that a provider is believed, in milliseconds.
const RETRY_AFTER_MAX_MS: u64 = 24 * 3_600_000;
/// Parkings in a row for the provider's limit; the job fails after them.
pub const LIMIT_PARKINGS_MAX: u32 = 12;
/// Longest time of such a row; the job fails after it.
pub const LIMIT_PARKED_MS_MAX: u64 = 24 * 3_600_000;

/// Pauses after a fault of this machine, each longer than the one before; the job fails with the fault after them.
/// dockerd takes some 12 s to see that its containerd is dead and to start another one: that costs two tries at most.
const HOST_FAULT_PAUSES_MS: [u64; 2] = [2_000, 30_000];
/// Tries of a job that faults of this machine end, all in all.
pub const HOST_FAULT_TRIES_MAX: u32 = HOST_FAULT_PAUSES_MS.len() as u32 + 1;

/// What a job is parked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ParkReason {
    /// The provider limits the credential (429), or is overloaded (529).
    ProviderLimit,
    /// The submitter's budget of the day has no room.
    UserDayBudget,
    /// The daemon's budget of the day has no room.
    DayBudget,
    /// The daemon's budget of the month has no room.
    MonthBudget,
    /// The engine or this machine failed it; the next try may go better.
    HostFault,
}

impl ParkReason {
    /// All reasons; metrics are seeded from it.
    pub const ALL: [Self; 5] =
        [Self::ProviderLimit, Self::UserDayBudget, Self::DayBudget, Self::MonthBudget, Self::HostFault];

    /// The name used in metrics and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ProviderLimit => "provider_limit",
            Self::UserDayBudget => "user_day_budget",
            Self::DayBudget => "day_budget",
            Self::MonthBudget => "month_budget",
            Self::HostFault => "host_fault",
        }
    }
}

/// Until when and why a job is parked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Parked {
    /// When it goes on by itself, in milliseconds since 1970.
    pub until_ms: u64,
    /// Why.
    pub why: ParkReason,
}

/// When a job was parked and when it went on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// Milliseconds since 1970.
    pub from_ms: u64,
    /// Milliseconds since 1970.
    pub to_ms: u64,
}

/// What a job carries from one attempt to the next; limits hold for the sum of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Carry {
    /// Time that earlier attempts had a cell, in milliseconds.
    pub ran_ms: u64,
    /// Messages of the model.
    pub turns: u64,
    /// Tool calls judged.
    pub tool_calls: u64,
    /// Tool calls denied.
    pub tool_denials: u64,
    /// CPU time, in microseconds.
    pub cpu_us: u64,
    /// Most memory that a cell used, in bytes.
    pub peak_memory_bytes: u64,
    /// The CLIs' own figures for all that was before; none where one of them gave none.
    pub cli_micro_usd: Option<MicroUsd>,
    /// When the last attempt's work was put away, in milliseconds since 1970; none before the first parking.
    pub parked_ms: Option<u64>,
    /// Parkings in a row for the provider's limit.
    pub limit_parkings: u32,
    /// When the first of that row began, in milliseconds since 1970.
    pub limited_since_ms: Option<u64>,
    /// Tries that a fault of this machine ended.
    pub host_faults: u32,
    /// How often its agent was given another try, since what it made did not pass.
    pub repairs: u32,
    /// What the agent is told of that at the beginning of its next attempt.
    pub repair: Option<String>,
}

impl Carry {
    /// The next parking for the provider's limit, or none where there were enough. `retry_after_s` is what the
    /// provider asks for; `progressed` tells that it answered a request of this attempt, which ends the row.
    pub fn limit_parking(&self, now_ms: u64, retry_after_s: Option<u64>, progressed: bool) -> Option<Parked> {
        let (count, since) = if progressed {
            (0, now_ms)
        } else {
            (self.limit_parkings, self.limited_since_ms.unwrap_or(now_ms))
        };
        if count >= LIMIT_PARKINGS_MAX || now_ms.saturating_sub(since) >= LIMIT_PARKED_MS_MAX {
            return None;
        }
        let pause_ms = match retry_after_s {
            Some(seconds) => seconds.saturating_mul(1000).clamp(1000, RETRY_AFTER_MAX_MS),
            None => (BACKOFF_FIRST_MS << count.min(10)).min(BACKOFF_MAX_MS),
        };
        Some(Parked { until_ms: now_ms.saturating_add(pause_ms), why: ParkReason::ProviderLimit })
    }

    /// The wait before the next try after a fault of this machine, or none where there were enough.
    pub fn host_fault_parking(&self, now_ms: u64) -> Option<Parked> {
        let pause_ms = HOST_FAULT_PAUSES_MS.get(usize::try_from(self.host_faults).ok()?)?;
        Some(Parked { until_ms: now_ms.saturating_add(*pause_ms), why: ParkReason::HostFault })
    }

    /// Counts a parking that begins at `now_ms`.
    pub fn parked(&mut self, why: ParkReason, now_ms: u64, progressed: bool) {
        self.parked_ms = Some(now_ms);
        if progressed {
            (self.limit_parkings, self.limited_since_ms) = (0, None);
        }
        match why {
            ParkReason::ProviderLimit => {
                self.limit_parkings += 1;
                self.limited_since_ms.get_or_insert(now_ms);
            }
            ParkReason::HostFault => self.host_faults += 1,
            ParkReason::UserDayBudget | ParkReason::DayBudget | ParkReason::MonthBudget => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_json_and_metrics_are_the_same() {
        for why in ParkReason::ALL {
            assert_eq!(serde_json::to_value(why).ok(), Some(why.as_str().into()));
        }
    }

    #[test]
    fn a_limit_that_does_not_end_is_waited_for_longer_each_time_and_not_for_ever() {
        let (mut carry, mut now, mut pauses) = (Carry::default(), 1_000_000, Vec::new());
        while let Some(parked) = carry.limit_parking(now, None, false) {
            carry.parked(parked.why, now, false);
            pauses.push((parked.until_ms - now) / 60_000);
            now = parked.until_ms;
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30, 30, 30, 30, 30, 30]);
        assert!(carry.limit_parking(now, Some(1), false).is_none());
        let again = carry.limit_parking(now, None, true).expect("a row ends with an answer");
        carry.parked(again.why, now, true);
        assert_eq!((carry.limit_parkings, again.until_ms - now), (1, 60_000));
    }

    #[test]
    fn faults_of_the_machine_are_tried_again_later_each_time_and_three_times_in_all() {
        let (mut carry, mut tries) = (Carry::default(), 1);
        let mut pauses = Vec::new();
        while let Some(parked) = carry.host_fault_parking(1_000) {
            assert_eq!(parked.why, ParkReason::HostFault);
            carry.parked(parked.why, 1_000, true);
            pauses.push(parked.until_ms - 1_000);
            tries += 1;
        }
        assert_eq!((pauses, tries), (HOST_FAULT_PAUSES_MS.to_vec(), HOST_FAULT_TRIES_MAX));
        let old: Carry = serde_json::from_str("{\"ran_ms\":5}").expect("what an earlier version stored");
        assert_eq!(old.host_faults, 0);
    }

    #[test]
    fn what_the_provider_asks_for_counts_within_bounds() {
        let pause = |seconds| Carry::default().limit_parking(0, Some(seconds), false).map(|p| p.until_ms);
        assert_eq!(pause(0), Some(1000));
        assert_eq!(pause(77), Some(77_000));
        assert_eq!(pause(u64::MAX), Some(RETRY_AFTER_MAX_MS));
        let late = Carry { limited_since_ms: Some(5), limit_parkings: 2, ..Carry::default() };
        assert_eq!(late.limit_parking(5 + LIMIT_PARKED_MS_MAX, Some(1), false), None, "a day is enough");
    }
}
