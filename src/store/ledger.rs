//! The ledger: the worst cost of a request is set aside before it is forwarded, its true cost is charged
//! after. *Invariant*: under every budget that a request was reserved with, what is charged plus what is set
//! aside never passes the limit, as long as no request costs more than was set aside for it. Nothing is ever
//! charged less than it cost: a reservation whose request nobody followed to its end is charged in full.
//!
//! A reservation belongs to the day on which it was made, and so does its charge. Running sums for each job,
//! batch, user's day, day and month are moved in the same transaction: a decision reads one row for each
//! budget, however much was spent before. What was charged stays when its job is removed ([`report`]).

mod books;
pub mod report;

#[cfg(test)]
pub(in crate::store) mod tests;

use std::fmt;

use rusqlite::{Connection, OptionalExtension, params};

use super::row::{Int, int};
use super::writer::Durability;
use super::{Store, StoreError};
use crate::job::{CellId, JobId};
use crate::money::{self, Budget, Calendar, MicroUsd, NoRoom, Scope, Standing};
use crate::pricing::Usage;

use books::{Charge, Keys, charged, latest_day, put_charge, put_day, reserve_sums, sums};
pub(super) use books::{charge_open, forget_payer, put_payer};

/// A reservation in the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReservationId(i64);

impl ReservationId {
    /// A reservation by its number.
    pub fn new(number: i64) -> Self {
        Self(number)
    }

    /// Its number.
    pub fn get(self) -> i64 {
        self.0
    }
}

impl fmt::Display for ReservationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What is to be set aside for one request.
#[derive(Debug, Clone)]
pub struct NewReservation {
    /// The job that pays.
    pub job: JobId,
    /// The cell that asks.
    pub cell: CellId,
    /// The model.
    pub model: String,
    /// The credential it goes out with, by name.
    pub credential: String,
    /// The provider, by name.
    pub provider: String,
    /// The worst case as requested.
    pub want: MicroUsd,
    /// The least that is worth it; at most `want`.
    pub floor: MicroUsd,
    /// The budgets it must fit under.
    pub budgets: Vec<Budget>,
    /// Says which day it is.
    pub calendar: Calendar,
    /// Wall clock, milliseconds since 1970.
    pub now_ms: u64,
}

/// What was set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserved {
    /// Its name.
    pub id: ReservationId,
    /// How much.
    pub amount: MicroUsd,
    /// The budget that left less than was wanted, where one did.
    pub lowered_by: Option<Standing>,
}

/// What a settlement did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settled {
    /// Charged to the job in all.
    pub spent: MicroUsd,
    /// By how much this charge is above its reservation.
    pub above: MicroUsd,
}

/// What a job has cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Spend {
    /// Charged.
    pub charged: MicroUsd,
    /// Set aside for requests that are under way.
    pub reserved_open: MicroUsd,
    /// Requests that were settled.
    pub requests: u64,
    /// Tokens as billed.
    pub usage: Usage,
}

/// What a model has cost since the store was made; never goes down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelCost {
    /// The model.
    pub model: String,
    /// Charged.
    pub charged: MicroUsd,
    /// Requests that were settled.
    pub requests: u64,
    /// Tokens as billed.
    pub usage: Usage,
}

/// A batch: jobs of one user that share a budget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Its name among the user's batches.
    pub name: String,
    /// Its budget; none: no limit of its own.
    pub limit: Option<MicroUsd>,
}

/// Whose budgets are asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payer {
    /// The user.
    pub uid: u32,
    /// The job, where one is meant; without it a budget of a job stands at zero.
    pub job: Option<JobId>,
    /// The batch by name, where one is meant.
    pub batch: Option<String>,
}

impl Store {
    /// Sets money aside for one request of a job, as [`money::grant`] decides over all its budgets.
    ///
    /// # Errors
    /// [`StoreError::OverBudget`] and [`StoreError::BudgetBusy`] with the budget that is in the way, as it stood;
    /// nothing is set aside then. [`StoreError::NoSuchJob`].
    pub async fn reserve(&self, ask: NewReservation) -> Result<Reserved, StoreError> {
        self.write(Durability::Soon, move |db| {
            let latest = latest_day(db)?;
            let day = ask.calendar.day(ask.now_ms, latest);
            let keys = Keys::of_job(db, &ask.job, day)?;
            let standings = keys.standings(db, &ask.budgets, &ask.calendar)?;
            let granted = money::grant(&standings, ask.want, ask.floor).map_err(|why| match why {
                NoRoom::Exhausted(standing) => StoreError::OverBudget(standing),
                NoRoom::Busy(standing) => StoreError::BudgetBusy(standing),
            })?;
            let amount = granted.amount.min(money::MAX);
            if latest != Some(day) {
                put_day(db, day)?;
            }
            reserve_sums(db, &keys, amount)?;
            let sql = "INSERT INTO ledger (job, cell, model, status, reserved_micro, created_ms, day, credential, \
                       provider) VALUES (?1, ?2, ?3, 'open', ?4, ?5, ?6, ?7, ?8)";
            db.prepare_cached(sql)?.execute(params![
                ask.job.as_str(),
                ask.cell.as_str(),
                ask.model,
                Int(amount.0),
                Int(ask.now_ms),
                day.to_string(),
                ask.credential,
                ask.provider,
            ])?;
            let id = ReservationId(db.last_insert_rowid());
            Ok(Reserved { id, amount, lowered_by: granted.lowered_by })
        })
        .await
    }

    /// Charges what a request cost and frees the rest of its reservation. Returns what
    /// is charged to the job now, and by how much this charge is above what was set aside: zero, unless the
    /// worst-case estimate was wrong.
    ///
    /// # Errors
    /// [`StoreError::NotReserved`] where it was settled before.
    pub async fn settle(
        &self,
        id: ReservationId,
        usage: Usage,
        charged: MicroUsd,
        now_ms: u64,
    ) -> Result<Settled, StoreError> {
        self.write(Durability::Soon, move |db| settled(db, id, usage, charged, now_ms)).await
    }

    /// The same where nobody waits for it: it is done with the next request, 2 ms later at the latest.
    ///
    /// # Errors
    /// As [`Store::settle`].
    pub async fn settle_soon(
        &self,
        id: ReservationId,
        usage: Usage,
        charged: MicroUsd,
        now_ms: u64,
    ) -> Result<Settled, StoreError> {
        self.write_late(move |db| settled(db, id, usage, charged, now_ms)).await
    }

    /// Charges in full what a job still has set aside: for requests that a dead daemon forwarded and nobody
    /// followed to their end. Returns how many there were.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn release_open(&self, job: &JobId, now_ms: u64) -> Result<u64, StoreError> {
        let job = job.clone();
        self.write(Durability::Now, move |db| charge_open(db, &job, now_ms)).await
    }

    /// What a job has cost so far.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn spend(&self, job: &JobId) -> Result<Spend, StoreError> {
        let job = job.clone();
        self.read(move |db| {
            // One snapshot: a settlement between the two sums must not be missed or counted twice.
            let both = db.unchecked_transaction()?;
            let spend = charged(&both, &job)?;
            let (_, reserved_open) = books::sum(&both, Scope::Job, job.as_str())?;
            both.finish()?;
            Ok(Spend { reserved_open, ..spend })
        })
        .await
    }

    /// How budgets stand at a moment, in the order given. A budget of a batch that nobody named, or of a job that
    /// nobody named, is left out.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn budget_standing(
        &self,
        payer: Payer,
        budgets: Vec<Budget>,
        calendar: Calendar,
        now_ms: u64,
    ) -> Result<Vec<Standing>, StoreError> {
        self.read(move |db| {
            let all = db.unchecked_transaction()?;
            let day = calendar.day(now_ms, latest_day(&all)?);
            let keys = Keys { job: payer.job, uid: payer.uid, batch: payer.batch, day };
            let standings = keys.standings(&all, &budgets, &calendar)?;
            all.finish()?;
            Ok(standings)
        })
        .await
    }

    /// The batch that a job belongs to, with its budget as its first job set it.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn batch_of(&self, job: &JobId) -> Result<Option<Batch>, StoreError> {
        let job = job.clone();
        self.read(move |db| {
            let sql = "SELECT batches.name, limit_micro FROM payers JOIN batches \
                       ON batches.uid = payers.uid AND batches.name = payers.batch WHERE payers.job = ?1";
            let found = db.prepare_cached(sql)?.query_row([job.as_str()], |row| {
                let limit = super::row::maybe_int(row, 1)?;
                Ok(Batch { name: row.get(0)?, limit: limit.map(MicroUsd) })
            });
            Ok(found.optional()?)
        })
        .await
    }

    /// The most that any user has spent on the day of `now_ms`, and set aside.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn dearest_user_day(
        &self,
        calendar: Calendar,
        now_ms: u64,
    ) -> Result<(MicroUsd, MicroUsd), StoreError> {
        self.read(move |db| {
            let day = calendar.day(now_ms, latest_day(db)?);
            // Keys are day/uid, and '0' follows '/'.
            let sql = "SELECT charged_micro, reserved_micro FROM budget_sums WHERE scope = 'user_day' \
                       AND key > ?1 || '/' AND key < ?1 || '0' ORDER BY charged_micro + reserved_micro DESC LIMIT 1";
            let found = db.prepare_cached(sql)?.query_row([day.to_string()], |row| {
                Ok((MicroUsd(int(row, 0)?), MicroUsd(int(row, 1)?)))
            });
            Ok(found.optional()?.unwrap_or_default())
        })
        .await
    }

    /// What each model has cost, by name, deleted jobs included.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn cost_totals(&self) -> Result<Vec<ModelCost>, StoreError> {
        self.read(|db| {
            let sql = format!("SELECT {}, model FROM model_costs ORDER BY model", books::SUM_COLUMNS);
            let mut statement = db.prepare_cached(&sql)?;
            let rows = statement.query_map([], |row| {
                let Spend { charged, requests, usage, .. } = sums(row)?;
                Ok(ModelCost { model: row.get(8)?, charged, requests, usage })
            })?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }
}

fn settled(
    db: &Connection,
    id: ReservationId,
    usage: Usage,
    charged: MicroUsd,
    now_ms: u64,
) -> Result<Settled, StoreError> {
    let mut charge = Charge::open(db, id)?.ok_or(StoreError::NotReserved(id))?;
    (charge.usage, charge.charged) = (usage, charged.min(money::MAX));
    put_charge(db, &charge, now_ms)?;
    let spent = self::charged(db, &charge.job)?.charged;
    Ok(Settled { spent, above: charged.minus(charge.reserved) })
}
