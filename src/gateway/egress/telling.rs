//! What is told of one connection or request: one event at its end, and before that one each minute in which bytes
//! moved, so that a daemon that is killed takes little of what was said with it. The events' bytes add up to what
//! went over the wire. It must never tell a byte twice.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::EgressRecord;
use super::door::{Shared, elapsed_ms};
use super::wire::Meter;

/// The reason of an event that is not the last.
const STILL_OPEN: &str = "still open";

/// One connection or request, as far as it was told.
#[derive(Debug)]
pub(super) struct Telling {
    event: EgressRecord,
    /// Bytes of the meter, up and down, that stand in an event or are none of this one's.
    told: (u64, u64),
    /// Bytes that came from the package cache, and those of them that were told.
    cached: (Arc<AtomicU64>, u64),
    began: Instant,
}

impl Telling {
    /// `before`: bytes of the meter that are not its own.
    pub(super) fn new(event: EgressRecord, before: (u64, u64), began: Instant) -> Self {
        Self { event, told: before, cached: (Arc::default(), 0), began }
    }

    /// Counts what comes from the package cache.
    pub(super) fn cached(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.cached.0)
    }

    /// Tells of what moved, now and then. May be dropped at any time.
    pub(super) async fn while_open(&mut self, shared: &Shared, meter: &Meter) -> Infallible {
        loop {
            tokio::time::sleep(shared.spec.egress.limits.told_every).await;
            let event = self.next(meter);
            if (event.bytes_up, event.bytes_down, event.cached_bytes) != (0, 0, 0) {
                let reason = Some(STILL_OPEN.to_owned());
                let told = (self.told.0 + event.bytes_up, self.told.1 + event.bytes_down);
                let cached = self.cached.1 + event.cached_bytes;
                shared.record(EgressRecord { reason, ..event }).await;
                // Nothing is awaited between the event's going and this.
                (self.told, self.cached.1) = (told, cached);
            }
        }
    }

    /// It is refused after all, by this rule.
    pub(super) fn refused(&mut self, rule: &str) {
        (self.event.allowed, self.event.rule, self.event.reason) = (false, rule.to_owned(), None);
    }

    /// Tells the rest.
    pub(super) async fn end(self, shared: &Shared, meter: Arc<Meter>, reason: Option<String>) {
        let event = self.next(&meter);
        // What the host answered says more than how its answer was taken.
        let event = EgressRecord { reason: event.reason.clone().or(reason), ..event };
        // The rule's place is free before its event can be read.
        drop(meter);
        shared.record(event).await;
    }

    fn next(&self, meter: &Meter) -> EgressRecord {
        let (up, down) = meter.bytes();
        EgressRecord {
            bytes_up: up - self.told.0,
            bytes_down: down - self.told.1,
            cached_bytes: self.cached.0.load(Ordering::Relaxed) - self.cached.1,
            duration_ms: elapsed_ms(self.began),
            ..self.event.clone()
        }
    }
}
