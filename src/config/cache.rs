//! `[cache]`: how much of what package hosts answered is kept for later jobs.

use serde::Deserialize;

use super::ConfigError;
use super::raw::{Layers, Opt};
use crate::gateway::packages::CacheLimits;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawCache {
    bytes_max: Opt<u64>,
    entry_bytes_max: Opt<u64>,
    free_bytes_min: Opt<u64>,
}

const BYTES_MOST: u64 = 1 << 50;

pub(super) fn limits(layers: &Layers<'_>, raw: &RawCache) -> Result<CacheLimits, ConfigError> {
    let usual = CacheLimits::default();
    let number = |key, value, default| layers.number(key, value, 0..=BYTES_MOST, default);
    Ok(CacheLimits {
        bytes_max: number("cache.bytes_max", &raw.bytes_max, usual.bytes_max)?,
        entry_bytes_max: number("cache.entry_bytes_max", &raw.entry_bytes_max, usual.entry_bytes_max)?,
        free_bytes_min: number("cache.free_bytes_min", &raw.free_bytes_min, usual.free_bytes_min)?,
    })
}
