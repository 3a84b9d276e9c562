//! What the gateway asks of a ledger, and one in memory for tests and rehearsals. A ledger must decide in one
//! step: two reservations that do not both fit are never both granted.

use std::collections::HashMap;
use std::error::Error;
use std::sync::{Mutex, PoisonError};

use futures_util::future::BoxFuture;

use crate::clock;
use crate::job::{CellId, JobId};
use crate::money::{MicroUsd, NoRoom, grant};
use crate::pricing::Usage;
use crate::store::{Store, StoreError};

/// Names a reservation until it is settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReservationId(pub i64);

/// What is to be reserved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// The job that pays.
    pub job: JobId,
    /// The model.
    pub model: String,
    /// The worst case as requested.
    pub want: MicroUsd,
    /// The worst case of the smallest answer that is worth asking for; at most `want`.
    pub floor: MicroUsd,
    /// The job's cost limit.
    pub limit: Option<MicroUsd>,
}

/// A reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// Its name.
    pub id: ReservationId,
    /// Between `floor` and `want`.
    pub amount: MicroUsd,
}

/// Why nothing was reserved or settled.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// Settled spend leaves less than `floor`, whatever becomes of other reservations.
    #[error("the cost limit is reached ({spent} USD spent)")]
    Exhausted {
        /// Settled spend of the job.
        spent: MicroUsd,
    },
    /// There will be room when other reservations are settled for less: ask again.
    #[error("other requests have reserved the rest of the cost limit")]
    Busy,
    /// The ledger's store failed.
    #[error("the ledger cannot be reached: {0}")]
    Store(#[source] Box<dyn Error + Send + Sync>),
}

/// Where reservations and charges are kept. Implemented over the store; the decision is [`grant`].
pub trait Ledger: Send + Sync {
    /// Reserves `want`, or less when only that is left and no other reservation is open.
    fn reserve(&self, ask: Ask) -> BoxFuture<'_, Result<Grant, LedgerError>>;

    /// Replaces a reservation by what was charged, and gives the job's settled spend. Settling twice is
    /// the same as once.
    fn settle(
        &self,
        id: ReservationId,
        usage: Usage,
        charged: MicroUsd,
    ) -> BoxFuture<'_, Result<MicroUsd, LedgerError>>;
}

fn decide(ask: &Ask, spent: MicroUsd, reserved: MicroUsd) -> Result<MicroUsd, LedgerError> {
    grant(ask.limit, spent, reserved, ask.want, ask.floor).map_err(|why| match why {
        NoRoom::Exhausted => LedgerError::Exhausted { spent },
        NoRoom::Busy => LedgerError::Busy,
    })
}

/// The ledger of one cell, in the store.
#[derive(Debug, Clone)]
pub struct StoreLedger {
    /// Where it is kept.
    pub store: Store,
    /// The cell that asks.
    pub cell: CellId,
}

impl Ledger for StoreLedger {
    fn reserve(&self, ask: Ask) -> BoxFuture<'_, Result<Grant, LedgerError>> {
        Box::pin(async move {
            let Ask { job, model, want, floor, limit } = ask;
            let now = clock::wall_ms();
            match self.store.reserve(&job, &self.cell, &model, want, floor, limit, now).await {
                Ok((id, amount)) => Ok(Grant { id: ReservationId(id.get()), amount }),
                Err(StoreError::OverBudget { settled, .. }) => Err(LedgerError::Exhausted { spent: settled }),
                Err(StoreError::BudgetBusy { .. }) => Err(LedgerError::Busy),
                Err(error) => Err(LedgerError::Store(Box::new(error))),
            }
        })
    }

    fn settle(
        &self,
        id: ReservationId,
        usage: Usage,
        charged: MicroUsd,
    ) -> BoxFuture<'_, Result<MicroUsd, LedgerError>> {
        Box::pin(async move {
            let id = crate::store::ReservationId::new(id.0);
            match self.store.settle(id, usage, charged, clock::wall_ms()).await {
                Ok(settled) => {
                    if settled.above > MicroUsd::ZERO {
                        tracing::warn!(cell = %self.cell, above = %settled.above, "a charge is above its reservation");
                    }
                    Ok(settled.spent)
                }
                Err(error) => Err(LedgerError::Store(Box::new(error))),
            }
        })
    }
}

/// A ledger in memory.
#[derive(Debug, Default)]
pub struct MemoryLedger(Mutex<Books>);

#[derive(Debug, Default)]
struct Books {
    next: i64,
    open: HashMap<ReservationId, (JobId, MicroUsd)>,
    settled: HashMap<JobId, MicroUsd>,
}

impl Books {
    fn reserved(&self, job: &JobId) -> MicroUsd {
        let own = self.open.values().filter(|(of, _)| of == job);
        own.fold(MicroUsd::ZERO, |sum, (_, amount)| sum.plus(*amount))
    }

    fn settled(&self, job: &JobId) -> MicroUsd {
        self.settled.get(job).copied().unwrap_or_default()
    }
}

impl MemoryLedger {
    /// Settled spend and open reservations of a job.
    pub fn standing(&self, job: &JobId) -> (MicroUsd, MicroUsd) {
        let books = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (books.settled(job), books.reserved(job))
    }
}

impl Ledger for MemoryLedger {
    fn reserve(&self, ask: Ask) -> BoxFuture<'_, Result<Grant, LedgerError>> {
        let mut books = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let decided = decide(&ask, books.settled(&ask.job), books.reserved(&ask.job));
        let granted = decided.map(|amount| {
            books.next += 1;
            let id = ReservationId(books.next);
            books.open.insert(id, (ask.job, amount));
            Grant { id, amount }
        });
        Box::pin(std::future::ready(granted))
    }

    fn settle(
        &self,
        id: ReservationId,
        _: Usage,
        charged: MicroUsd,
    ) -> BoxFuture<'_, Result<MicroUsd, LedgerError>> {
        let mut books = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let spent = books.open.remove(&id).map_or(MicroUsd::ZERO, |(job, _)| {
            let spent = books.settled(&job).plus(charged);
            books.settled.insert(job, spent);
            spent
        });
        Box::pin(std::future::ready(Ok(spent)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_grant_never_passes_the_limit(
            settled in 0u64..1000, reserved in 0u64..1000, want in 0u64..1000, part in 0u64..1000, limit in 0u64..1500
        ) {
            let floor = MicroUsd(part.min(want));
            let ask = Ask { job: JobId::new(0, 0), model: String::new(), want: MicroUsd(want), floor, limit: Some(MicroUsd(limit)) };
            match decide(&ask, MicroUsd(settled), MicroUsd(reserved)) {
                Ok(amount) => {
                    prop_assert!(amount >= floor && amount <= ask.want);
                    prop_assert!(settled + reserved + amount.0 <= limit);
                }
                Err(LedgerError::Busy) => prop_assert!(reserved > 0 && settled + floor.0 <= limit),
                Err(_) => prop_assert!(settled + floor.0 > limit),
            }
        }
    }
}
