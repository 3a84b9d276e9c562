//! The bound on a request's input: what is known of its beginning (billed before, or counted by the provider) plus
//! the bytes of what is new. Where too much is new, the provider counts it first, which is free; where it
//! cannot, bytes are the bound. A bound must never be below what the provider will bill.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Limited};
use hyper::StatusCode;
use serde::Deserialize;
use tokio::time::timeout;

use super::body::{Bound, Known, countable};
use super::messages::Call;
use crate::pricing::Usage;

/// The provider is asked to count from this many bytes on that nobody has counted.
const COUNT_FROM_BYTES: u64 = 16 << 10;
/// Longest wait for a count.
const COUNT_WAIT: Duration = Duration::from_secs(5);
/// After a count that failed for a reason of the provider's, nobody is asked for this long.
const COUNT_REST: Duration = Duration::from_secs(60);
/// Largest answer to a count, in bytes.
const COUNT_ANSWER_BYTES_MAX: usize = 64 << 10;
/// What a count may be short of: one part in so many, and so many tokens. The provider calls it an estimate.
const COUNT_MARGIN: (u64, u64) = (32, 256);
/// Conversations' beginnings remembered for a lease, and for all.
const KNOWN_ENTRIES_MAX: (usize, usize) = (4_096, 8_192);
/// Tokens that one web search brings in, at the most, as observed; the provider promises no limit.
const WEB_SEARCH_TOKENS: u64 = 10_000;

/// What one lease has learnt.
#[derive(Debug)]
pub(super) struct Learnt(Mutex<Known>);

impl Default for Learnt {
    fn default() -> Self {
        Self(Mutex::new(Known::new(KNOWN_ENTRIES_MAX.0)))
    }
}

/// What all leases of a credential share.
#[derive(Debug)]
pub(super) struct Estimates {
    known: Mutex<Known>,
    /// One count at a time: the next one may know then.
    counting: tokio::sync::Mutex<()>,
    rest_until: Mutex<Option<Instant>>,
}

impl Default for Estimates {
    fn default() -> Self {
        Self {
            known: Mutex::new(Known::new(KNOWN_ENTRIES_MAX.1)),
            counting: tokio::sync::Mutex::default(),
            rest_until: Mutex::default(),
        }
    }
}

impl Estimates {
    fn rests(&self) -> bool {
        let until = self.rest_until.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| Instant::now() < until)
    }

    fn rest(&self) {
        let until = Instant::now().checked_add(COUNT_REST);
        *self.rest_until.lock().unwrap_or_else(PoisonError::into_inner) = until;
    }
}

/// Input tokens once `searches` web searches have brought in what they found, each answer read again for the next.
pub(super) fn with_searches(input_tokens: u64, searches: u64) -> u64 {
    let rounds = searches.saturating_add(1);
    let found = searches.saturating_mul(rounds) / 2;
    input_tokens.saturating_mul(rounds).saturating_add(found.saturating_mul(WEB_SEARCH_TOKENS))
}

/// Why there is no count.
enum Uncounted {
    /// This body cannot be counted.
    Refused,
    /// The provider does not count now.
    Unavailable,
}

#[derive(Deserialize)]
struct Count {
    input_tokens: u64,
}

impl Call {
    /// Input tokens that the request can have at the most.
    pub(super) async fn bound_input(&self) -> u64 {
        let bound = self.known_bound();
        let estimates = &self.lease.provider.estimates;
        if bound.guessed < COUNT_FROM_BYTES || estimates.rests() {
            return bound.tokens;
        }
        // Others that count before may take as long.
        timeout(COUNT_WAIT * 2, self.counted()).await.unwrap_or(bound.tokens)
    }

    async fn counted(&self) -> u64 {
        let estimates = &self.lease.provider.estimates;
        let _one = estimates.counting.lock().await;
        let bound = self.known_bound();
        if bound.guessed < COUNT_FROM_BYTES || estimates.rests() {
            return bound.tokens;
        }
        match timeout(COUNT_WAIT, self.count()).await.unwrap_or(Err(Uncounted::Unavailable)) {
            Ok(tokens) => {
                let (part, more) = COUNT_MARGIN;
                let tokens = tokens.saturating_add(tokens.div_ceil(part)).saturating_add(more);
                self.facts.shape.learn(tokens, &mut locked(&self.lease.learnt.0));
                self.facts.shape.learn_opening(tokens, &mut locked(&estimates.known));
                tokens.min(bound.tokens)
            }
            Err(Uncounted::Refused) => bound.tokens,
            Err(Uncounted::Unavailable) => {
                estimates.rest();
                bound.tokens
            }
        }
    }

    /// What follows from what is known now.
    pub(super) fn known_bound(&self) -> Bound {
        let own = locked(&self.lease.learnt.0);
        let shared = locked(&self.lease.provider.estimates.known);
        self.facts.shape.bound(&[&own, &shared])
    }

    /// Asks the provider, with the same headers and credential as the request itself will have.
    async fn count(&self) -> Result<u64, Uncounted> {
        let body = countable(&self.body).ok_or(Uncounted::Refused)?;
        let way = self.lease.provider.counting(&self.way).ok_or(Uncounted::Unavailable)?;
        let outgoing = self.outgoing(&way, body).await.map_err(|_| Uncounted::Unavailable)?;
        let answer = self.lease.provider.send(outgoing).await.map_err(|_| Uncounted::Unavailable)?;
        let status = answer.status();
        // What this body alone is to blame for must not stop the counts of others.
        let own_fault =
            matches!(status, StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE | StatusCode::FORBIDDEN);
        let body = Limited::new(answer.into_body(), COUNT_ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|_| Uncounted::Unavailable)?.to_bytes();
        match serde_json::from_slice::<Count>(&body) {
            Ok(count) if status.is_success() && count.input_tokens > 0 => Ok(count.input_tokens),
            _ if own_fault => Err(Uncounted::Refused),
            _ => {
                tracing::info!(%status, "the provider does not count tokens: bytes bound the input");
                Err(Uncounted::Unavailable)
            }
        }
    }

    /// Remembers what the request was billed for.
    pub(super) fn learn(&self, usage: &Usage) {
        let tokens = usage.input_total();
        // What a search brought in is no part of the conversation as it will be sent.
        if tokens > 0 && self.web_searches == 0 {
            self.facts.shape.learn(tokens, &mut locked(&self.lease.learnt.0));
            if self.facts.shape.is_opening() {
                self.facts.shape.learn_opening(tokens, &mut locked(&self.lease.provider.estimates.known));
            }
        }
    }
}

fn locked(known: &Mutex<Known>) -> std::sync::MutexGuard<'_, Known> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_search_reads_again_what_the_former_ones_found() {
        assert_eq!(with_searches(1_000, 0), 1_000);
        assert_eq!(with_searches(1_000, 1), 2_000 + WEB_SEARCH_TOKENS);
        assert_eq!(with_searches(1_000, 3), 4_000 + 6 * WEB_SEARCH_TOKENS);
        assert_eq!(with_searches(u64::MAX, u64::MAX), u64::MAX);
    }
}
