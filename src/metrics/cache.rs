//! The package cache's metrics: their names, and the figures that they are set from.

use std::sync::{Mutex, PoisonError};

use prometheus::{IntCounter, IntCounterVec, IntGauge, Registry};

use super::register::{counter, counters, gauge};

/// How the package cache stands; counts are since the daemon began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheFigures {
    /// Bytes on the disk.
    pub bytes: u64,
    /// Entries.
    pub entries: u64,
    /// Answers without a word to their host.
    pub hits: u64,
    /// Answers that their host said are still right.
    pub revalidated: u64,
    /// Answers that had to be fetched.
    pub misses: u64,
    /// Entries that went for others, or for the disk.
    pub evicted: u64,
    /// Files that were not what they should be.
    pub damaged: u64,
    /// Answers that the disk did not take.
    pub failed: u64,
}

pub(super) struct Cache {
    requests_total: IntCounterVec,
    served_bytes_total: IntCounter,
    bytes: IntGauge,
    entries: IntGauge,
    evictions_total: IntCounter,
    damaged_total: IntCounter,
    failures_total: IntCounter,
    one_at_a_time: Mutex<()>,
}

impl Cache {
    pub(super) fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        Ok(Self {
            requests_total: counters(
                registry,
                "hotcell_cache_requests_total",
                "Requests for packages that are kept, by what came of them.",
                &["result"],
            )?,
            served_bytes_total: counter(
                registry,
                "hotcell_cache_served_bytes_total",
                "Bytes that cells got from the package cache.",
            )?,
            bytes: gauge(registry, "hotcell_cache_bytes", "Bytes of the disk that the package cache takes.")?,
            entries: gauge(registry, "hotcell_cache_entries", "Answers that the package cache has.")?,
            evictions_total: counter(
                registry,
                "hotcell_cache_evictions_total",
                "Answers that the package cache let go for others, or for the disk.",
            )?,
            damaged_total: counter(
                registry,
                "hotcell_cache_damaged_total",
                "Files of the package cache that were not what they should be.",
            )?,
            failures_total: counter(
                registry,
                "hotcell_cache_failures_total",
                "Answers that could not be kept because the disk is full or failed.",
            )?,
            one_at_a_time: Mutex::new(()),
        })
    }

    pub(super) fn seed(&self) {
        for result in ["hit", "revalidated", "miss"] {
            self.requests_total.with_label_values(&[result]);
        }
    }

    pub(super) fn served(&self, bytes: u64) {
        self.served_bytes_total.inc_by(bytes);
    }

    pub(super) fn set(&self, figures: CacheFigures) {
        let _one = self.one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        let requests = |result: &str| self.requests_total.with_label_values(&[result]);
        for (counter, now) in [
            (requests("hit"), figures.hits),
            (requests("revalidated"), figures.revalidated),
            (requests("miss"), figures.misses),
            (self.evictions_total.clone(), figures.evicted),
            (self.damaged_total.clone(), figures.damaged),
            (self.failures_total.clone(), figures.failed),
        ] {
            counter.inc_by(now.saturating_sub(counter.get()));
        }
        self.bytes.set(i64::try_from(figures.bytes).unwrap_or(i64::MAX));
        self.entries.set(i64::try_from(figures.entries).unwrap_or(i64::MAX));
    }
}
