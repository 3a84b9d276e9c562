//! What the gateway asks of a ledger, and one in memory for tests and rehearsals. A ledger must decide in one
//! step: two reservations that do not both fit are never both granted.

use std::collections::HashMap;
use std::error::Error;
use std::sync::{Mutex, PoisonError};

use futures_util::future::BoxFuture;

use crate::clock;
use crate::job::{CellId, JobId};
use crate::money::{Budget, Calendar, MicroUsd, NoRoom, Scope, Standing, grant};
use crate::pricing::Usage;
use crate::store::{NewReservation, Store, StoreError};

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
    /// The credential it goes out with, by name.
    pub credential: String,
    /// The provider, by name.
    pub provider: String,
    /// The worst case as requested.
    pub want: MicroUsd,
    /// The worst case of the smallest answer that is worth asking for; at most `want`.
    pub floor: MicroUsd,
    /// The budgets it must fit under, the job's cost limit among them.
    pub budgets: Vec<Budget>,
}

/// A reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// Its name.
    pub id: ReservationId,
    /// Between `floor` and `want`.
    pub amount: MicroUsd,
    /// The budget that left less than `want`, where one did.
    pub lowered_by: Option<Standing>,
}

/// Why nothing was reserved or settled.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// Settled spend leaves less than `floor` under one budget, whatever becomes of other reservations.
    #[error(
        "{}",
        Standing { scope: *scope, limit: *limit, charged: *spent, reserved: MicroUsd::ZERO, resets_at_ms: *resets_at_ms }
            .words()
    )]
    Exhausted {
        /// Which budget: the innermost one.
        scope: Scope,
        /// Settled spend in it.
        spent: MicroUsd,
        /// How much it is.
        limit: MicroUsd,
        /// When it is empty again, in milliseconds since 1970; none where waiting does not help.
        resets_at_ms: Option<u64>,
    },
    /// There will be room when other reservations are settled for less: ask again.
    #[error("other requests have reserved the rest of a budget")]
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

fn exhausted(standing: Standing) -> LedgerError {
    let Standing { scope, limit, charged: spent, resets_at_ms, .. } = standing;
    LedgerError::Exhausted { scope, spent, limit, resets_at_ms }
}

/// The ledger of one cell, in the store.
#[derive(Debug, Clone)]
pub struct StoreLedger {
    /// Where it is kept.
    pub store: Store,
    /// The cell that asks.
    pub cell: CellId,
    /// Which day a reservation belongs to.
    pub calendar: Calendar,
}

impl Ledger for StoreLedger {
    fn reserve(&self, ask: Ask) -> BoxFuture<'_, Result<Grant, LedgerError>> {
        Box::pin(async move {
            let reservation = NewReservation {
                job: ask.job,
                cell: self.cell.clone(),
                model: ask.model,
                credential: ask.credential,
                provider: ask.provider,
                want: ask.want,
                floor: ask.floor,
                budgets: ask.budgets,
                calendar: self.calendar.clone(),
                now_ms: clock::wall_ms(),
            };
            match self.store.reserve(reservation).await {
                Ok(reserved) => Ok(Grant {
                    id: ReservationId(reserved.id.get()),
                    amount: reserved.amount,
                    lowered_by: reserved.lowered_by,
                }),
                Err(StoreError::OverBudget(standing)) => Err(exhausted(standing)),
                Err(StoreError::BudgetBusy(_)) => Err(LedgerError::Busy),
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
            match self.store.settle_soon(id, usage, charged, clock::wall_ms()).await {
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

/// A ledger in memory. Its only sums are those of jobs: every budget counts as the job's own.
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
        let (charged, reserved) = (books.settled(&ask.job), books.reserved(&ask.job));
        let standing = |budget: &Budget| Standing {
            scope: budget.scope,
            limit: budget.limit,
            charged,
            reserved,
            resets_at_ms: None,
        };
        let standings: Vec<Standing> = ask.budgets.iter().map(standing).collect();
        let decided = grant(&standings, ask.want, ask.floor).map_err(|why| match why {
            NoRoom::Exhausted(standing) => exhausted(standing),
            NoRoom::Busy(_) => LedgerError::Busy,
        });
        let granted = decided.map(|granted| {
            books.next += 1;
            let id = ReservationId(books.next);
            books.open.insert(id, (ask.job, granted.amount));
            Grant { id, amount: granted.amount, lowered_by: granted.lowered_by }
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
mod tests;
