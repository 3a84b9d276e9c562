//! The bound on a request's input: what is known of its beginning (billed before, or counted by the provider) plus
//! what is new, by its bytes ([`super::body::Shape`]). Where too much is new, the provider counts it first, which is
//! free; where it cannot, bytes are the bound. A bound must never be below what the provider will bill.
//!
//! Counting must not become a way for one cell to hold up others: each lease may count so often and no more, one
//! count at a time; it waits for a count of another lease only where that is of the same beginning, and for a limited
//! time; a count that fails lets only its own lease rest.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Limited};
use serde::Deserialize;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::body::{Bound, Interned, Known, countable};
use super::messages::Call;
use crate::pricing::Usage;

/// The provider is asked to count from this many bytes on that nobody has counted.
const COUNT_FROM_BYTES: u64 = 16 << 10;
/// Longest wait for a count.
const COUNT_WAIT: Duration = Duration::from_secs(5);
/// After a count that failed, its lease does not ask again for this long.
const COUNT_REST: Duration = Duration::from_secs(60);
/// Counts under way for one provider.
const COUNTS_MAX: usize = 16;
/// Counts that a lease may have made at once, its cell's own among them.
const LEASE_COUNTS: u32 = 32;
/// Then one more each time this has passed.
const LEASE_COUNT_EVERY: Duration = Duration::from_secs(2);
/// Largest answer to a count, in bytes.
const COUNT_ANSWER_BYTES_MAX: usize = 64 << 10;
/// What a count may be short of: one part in so many, and so many tokens. The provider calls it an estimate.
const COUNT_MARGIN: (u64, u64) = (32, 256);
/// Conversations' beginnings remembered for a lease, and for all.
const KNOWN_ENTRIES_MAX: (usize, usize) = (4_096, 8_192);
/// Tokens that one web search brings in, at the most, as observed; the provider promises no limit.
const WEB_SEARCH_TOKENS: u64 = 10_000;

/// What one lease has learnt, and how often it may have tokens counted.
#[derive(Debug)]
pub(super) struct Learnt {
    known: Mutex<Known>,
    /// One count at a time: the next one may know then.
    counting: tokio::sync::Mutex<()>,
    counts: Mutex<Counts>,
}

impl Default for Learnt {
    fn default() -> Self {
        Self {
            known: Mutex::new(Known::new(KNOWN_ENTRIES_MAX.0)),
            counting: tokio::sync::Mutex::default(),
            counts: Mutex::new(Counts { left: LEASE_COUNTS, filled: Instant::now(), rest_until: None }),
        }
    }
}

impl Learnt {
    /// Takes the right to one count, or says how long to wait for it.
    pub(super) fn may_count(&self) -> Result<(), Duration> {
        locked(&self.counts).take(Instant::now())
    }

    fn rests(&self) -> bool {
        locked(&self.counts).rest_until.is_some_and(|until| Instant::now() < until)
    }

    fn rest(&self) {
        locked(&self.counts).rest_until = Instant::now().checked_add(COUNT_REST);
    }
}

/// How often a lease may count.
#[derive(Debug)]
struct Counts {
    left: u32,
    /// When `left` was right.
    filled: Instant,
    /// After a failure.
    rest_until: Option<Instant>,
}

impl Counts {
    fn take(&mut self, now: Instant) -> Result<(), Duration> {
        let every = LEASE_COUNT_EVERY.as_millis().max(1);
        let more = now.saturating_duration_since(self.filled).as_millis() / every;
        let more = u32::try_from(more).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(more);
        self.filled += LEASE_COUNT_EVERY.saturating_mul(more);
        if self.left >= LEASE_COUNTS {
            (self.left, self.filled) = (LEASE_COUNTS, now);
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => Err(LEASE_COUNT_EVERY.saturating_sub(now.saturating_duration_since(self.filled))),
        }
    }
}

/// What all leases of a provider share.
#[derive(Debug)]
pub(super) struct Estimates {
    known: Mutex<Known>,
    /// Parts of bodies that several leases sent.
    fragments: Interned,
    /// Counts under way, by what they tell of; closed at their end.
    flights: Mutex<HashMap<u64, Arc<Semaphore>>>,
    slots: Semaphore,
}

impl Default for Estimates {
    fn default() -> Self {
        Self {
            known: Mutex::new(Known::new(KNOWN_ENTRIES_MAX.1)),
            fragments: Interned::default(),
            flights: Mutex::default(),
            slots: Semaphore::new(COUNTS_MAX),
        }
    }
}

impl Estimates {
    /// Parts of bodies that leases share.
    pub(super) fn fragments(&self) -> &Interned {
        &self.fragments
    }

    /// The count of this that is under way, or the right to be it.
    fn board(&self, key: u64) -> Result<Flight<'_>, Arc<Semaphore>> {
        let mut flights = locked(&self.flights);
        match flights.get(&key) {
            Some(other) => Err(Arc::clone(other)),
            None => {
                flights.insert(key, Arc::new(Semaphore::new(0)));
                Ok(Flight { estimates: self, key })
            }
        }
    }
}

/// A count under way; others that wait for it go on when it is dropped.
struct Flight<'a> {
    estimates: &'a Estimates,
    key: u64,
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        if let Some(waiting) = locked(&self.estimates.flights).remove(&self.key) {
            waiting.close();
        }
    }
}

/// Input tokens once `searches` web searches have brought in what they found, each answer read again for the next.
pub(super) fn with_searches(input_tokens: u64, searches: u64) -> u64 {
    let rounds = searches.saturating_add(1);
    let found = searches.saturating_mul(rounds) / 2;
    input_tokens.saturating_mul(rounds).saturating_add(found.saturating_mul(WEB_SEARCH_TOKENS))
}

/// The provider gave no count.
struct Uncounted;

#[derive(Deserialize)]
struct Count {
    input_tokens: u64,
}

impl Call {
    /// Input tokens that the request can have at the most.
    pub(super) async fn bound_input(&self) -> u64 {
        if let Some(tokens) = self.enough() {
            return tokens;
        }
        // Others that count before may take as long.
        match timeout(COUNT_WAIT * 2, self.counted()).await {
            Ok(tokens) => tokens,
            Err(_) => self.known_bound().tokens,
        }
    }

    /// The bound as far as it is known, where that is enough or nothing better is to be had.
    fn enough(&self) -> Option<u64> {
        let bound = self.known_bound();
        (bound.guessed < COUNT_FROM_BYTES || self.lease.learnt.rests()).then_some(bound.tokens)
    }

    async fn counted(&self) -> u64 {
        let (own, shared) = (&self.lease.learnt, &self.lease.provider.estimates);
        let _one = own.counting.lock().await;
        if let Some(tokens) = self.enough() {
            return tokens;
        }
        let flight = match self.facts.shape.counted_with(COUNT_FROM_BYTES).map(|key| shared.board(key)) {
            Some(Ok(flight)) => Some(flight),
            Some(Err(other)) => {
                // Never a permit: it is closed at the end of that count.
                let _ = timeout(COUNT_WAIT, other.acquire()).await;
                if let Some(tokens) = self.enough() {
                    return tokens;
                }
                None
            }
            None => None,
        };
        let slot = shared.slots.acquire().await;
        let tokens = self.known_bound().tokens;
        if slot.is_err() || own.may_count().is_err() {
            return tokens;
        }
        let counted = timeout(COUNT_WAIT, self.count()).await.unwrap_or(Err(Uncounted));
        let tokens = match counted {
            Ok(counted) => {
                let (part, more) = COUNT_MARGIN;
                let counted = counted.saturating_add(counted.div_ceil(part)).saturating_add(more);
                self.facts.shape.learn(counted, &mut locked(&own.known));
                self.facts.shape.learn_opening(counted, &mut locked(&shared.known));
                counted.min(tokens)
            }
            Err(Uncounted) => {
                own.rest();
                tokens
            }
        };
        drop(flight);
        tokens
    }

    /// What follows from what is known now.
    pub(super) fn known_bound(&self) -> Bound {
        let own = locked(&self.lease.learnt.known);
        let shared = locked(&self.lease.provider.estimates.known);
        self.facts.shape.bound(&[&own, &shared])
    }

    /// Asks the provider, with the same headers and credential as the request itself will have.
    async fn count(&self) -> Result<u64, Uncounted> {
        let body = countable(&self.body).ok_or(Uncounted)?;
        let way = self.lease.provider.counting(&self.way).ok_or(Uncounted)?;
        let outgoing = self.outgoing(&way, body).await.map_err(|_| Uncounted)?;
        let answer = self.lease.provider.send(outgoing).await.map_err(|_| Uncounted)?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), COUNT_ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|_| Uncounted)?.to_bytes();
        match serde_json::from_slice::<Count>(&body) {
            Ok(count) if status.is_success() && count.input_tokens > 0 => Ok(count.input_tokens),
            _ => {
                let job = &self.lease.job;
                tracing::info!(%status, %job, "the provider does not count tokens: bytes bound the input");
                Err(Uncounted)
            }
        }
    }

    /// Remembers what the request was billed for.
    pub(super) fn learn(&self, usage: &Usage) {
        let tokens = usage.input_total();
        // What a search brought in is no part of the conversation as it will be sent.
        if tokens > 0 && self.web_searches == 0 {
            self.facts.shape.learn(tokens, &mut locked(&self.lease.learnt.known));
            if self.facts.shape.is_opening() {
                self.facts.shape.learn_opening(tokens, &mut locked(&self.lease.provider.estimates.known));
            }
        }
    }
}

fn locked<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_counts_so_often_at_once_and_then_one_at_a_time() {
        let begun = Instant::now();
        let mut counts = Counts { left: LEASE_COUNTS, filled: begun, rest_until: None };
        for _ in 0..LEASE_COUNTS {
            assert_eq!(counts.take(begun), Ok(()));
        }
        let part = LEASE_COUNT_EVERY / 4;
        assert_eq!(counts.take(begun + part), Err(part * 3), "it is told how long");
        assert_eq!(counts.take(begun + LEASE_COUNT_EVERY), Ok(()));
        assert!(counts.take(begun + LEASE_COUNT_EVERY).is_err());
        let late = begun + Duration::from_secs(86_400);
        let taken = (0..1_000).filter(|_| counts.take(late).is_ok()).count();
        assert_eq!(taken, LEASE_COUNTS as usize, "what was not used does not pile up");
    }

    #[test]
    fn who_waits_for_a_count_of_another_goes_on_when_that_ends_however_it_ends() {
        let estimates = Estimates::default();
        let Ok(flight) = estimates.board(1) else { panic!("nobody counts") };
        let waiting = estimates.board(1).err().expect("somebody does");
        assert!(estimates.board(2).is_ok(), "of something else");
        assert!(!waiting.is_closed());
        drop(flight);
        assert!(waiting.is_closed() && estimates.board(1).is_ok());
    }

    #[test]
    fn each_search_reads_again_what_the_former_ones_found() {
        assert_eq!(with_searches(1_000, 0), 1_000);
        assert_eq!(with_searches(1_000, 1), 2_000 + WEB_SEARCH_TOKENS);
        assert_eq!(with_searches(1_000, 3), 4_000 + 6 * WEB_SEARCH_TOKENS);
        assert_eq!(with_searches(u64::MAX, u64::MAX), u64::MAX);
    }
}
