//! Figures of hands that count for themselves, as metrics.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::cell::Parts;
use crate::metrics::CacheFigures;

/// How the package cache stands.
pub(super) fn refresh_cache(parts: &Parts) {
    let Some(cache) = parts.egress.packages() else { return };
    let ((bytes, entries), count) = (cache.size(), &cache.counters);
    let now = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    parts.metrics.set_cache(CacheFigures {
        bytes,
        entries,
        hits: now(&count.hits),
        revalidated: now(&count.revalidated),
        misses: now(&count.misses),
        evicted: now(&count.evicted),
        damaged: now(&count.damaged),
        failed: now(&count.failed),
    });
}
