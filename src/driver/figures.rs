//! Figures that are looked up when somebody reads the metrics: of the queue, of money, of hands that count for themselves.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::cell::Parts;
use crate::clock;
use crate::metrics::CacheFigures;
use crate::money::{self, Budget, Scope};
use crate::store::{Payer, StoreError};

/// Keeps the gauges of the queue true: called when somebody reads the metrics.
///
/// # Errors
/// [`StoreError`].
pub async fn refresh_gauges(parts: &Parts) -> Result<(), StoreError> {
    let pace = parts.gateway.pace();
    parts.metrics.provider_concurrency.set(i64::from(pace.limit));
    parts.metrics.provider_paused_s.set(pace.paused.as_secs_f64());
    let counts: Vec<(String, u64)> =
        parts.store.counts_by_state().await?.into_iter().map(|(name, n)| (name.to_owned(), n)).collect();
    parts.metrics.set_jobs(&counts);
    let oldest = parts.store.oldest_queued_ms().await?;
    let age = oldest.map_or(0.0, |ms| clock::wall_ms().saturating_sub(ms) as f64 / 1000.0);
    parts.metrics.queue_age_s.set(age);
    let left = parts.store.cells_left().await?;
    parts.metrics.cells_left.set(i64::try_from(left).unwrap_or(i64::MAX));
    refresh_cache(parts);
    refresh_money(parts).await
}

/// Sums of cost, and how the budgets of the daemon stand.
async fn refresh_money(parts: &Parts) -> Result<(), StoreError> {
    let totals = parts.store.cost_totals().await?;
    let costs: Vec<_> = totals.into_iter().map(|cost| (cost.model, cost.usage, cost.charged)).collect();
    parts.metrics.set_costs(&costs);
    let (caps, calendar, now) = (parts.settings.caps, &parts.settings.calendar, clock::wall_ms());
    let (spent, reserved) = parts.store.dearest_user_day(calendar.clone(), now).await?;
    parts.metrics.set_budget(Scope::UserDay, caps.user_day, spent, reserved);
    let limits = [(Scope::Day, caps.day), (Scope::Month, caps.month)];
    let budgets = limits.map(|(scope, limit)| Budget { scope, limit: limit.unwrap_or(money::MAX) }).to_vec();
    let payer = Payer { uid: 0, job: None, batch: None };
    let standings = parts.store.budget_standing(payer, budgets, calendar.clone(), now).await?;
    for ((scope, limit), standing) in limits.into_iter().zip(standings) {
        parts.metrics.set_budget(scope, limit, standing.charged, standing.reserved);
    }
    Ok(())
}

/// How the package cache stands.
fn refresh_cache(parts: &Parts) {
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
