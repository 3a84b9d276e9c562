//! `[retention]`: how long, and how much of it, what jobs leave is kept.

use std::time::Duration;

use serde::Deserialize;

use super::ConfigError;
use super::raw::{Layers, Opt};
use crate::retention::Limits;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawRetention {
    days: Opt<u64>,
    undecided_days: Opt<u64>,
    jobs: Opt<u64>,
    bytes: Opt<u64>,
    mirror_days: Opt<u64>,
    mirror_bytes: Opt<u64>,
    image_days: Opt<u64>,
    agent_days: Opt<u64>,
}

/// A hundred years: for ever.
const DAYS_MOST: u64 = 36_500;
const JOBS_MOST: u64 = 100_000_000;
const BYTES_MOST: u64 = 1 << 50;
const DAY_S: u64 = 86_400;

pub(super) fn limits(layers: &Layers<'_>, raw: &RawRetention) -> Result<Limits, ConfigError> {
    let usual = Limits::default();
    let days = |key, value, default: Duration| {
        let days = layers.number(key, value, 1..=DAYS_MOST, default.as_secs() / DAY_S)?;
        Ok::<_, ConfigError>(Duration::from_secs(days * DAY_S))
    };
    let age = days("retention.days", &raw.days, usual.age)?;
    Ok(Limits {
        age,
        // Work that nobody has decided on is never kept for less than the rest.
        undecided_age: days("retention.undecided_days", &raw.undecided_days, usual.undecided_age)?.max(age),
        jobs_max: layers.number("retention.jobs", &raw.jobs, 0..=JOBS_MOST, usual.jobs_max)?,
        bytes_max: layers.number("retention.bytes", &raw.bytes, 0..=BYTES_MOST, usual.bytes_max)?,
        mirror_age: days("retention.mirror_days", &raw.mirror_days, usual.mirror_age)?,
        mirrors_bytes_max: layers.number(
            "retention.mirror_bytes",
            &raw.mirror_bytes,
            0..=BYTES_MOST,
            usual.mirrors_bytes_max,
        )?,
        image_age: days("retention.image_days", &raw.image_days, usual.image_age)?,
        agent_age: days("retention.agent_days", &raw.agent_days, usual.agent_age)?,
    })
}
