//! The ledger: the worst cost of a request is set aside before it is forwarded, its true cost is charged
//! after. *Invariant*: for a job with a limit, what is charged plus what is set aside never passes the
//! limit, as long as no request costs more than was set aside for it. Nothing is ever charged less than it
//! cost: a reservation whose request nobody followed to its end is charged in full.

use std::fmt;

use rusqlite::{Connection, OptionalExtension, params};

use super::row::{Int, int, text};
use super::writer::Durability;
use super::{Store, StoreError};
use crate::job::{CellId, JobId};
use crate::money::{self, MicroUsd, NoRoom};
use crate::pricing::Usage;

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

impl Store {
    /// Sets money aside for one request of a job, as [`money::grant`] decides: `want`, or at least `floor`.
    /// Returns how much it was.
    ///
    /// # Errors
    /// [`StoreError::OverBudget`] and [`StoreError::BudgetBusy`] with the sums at that moment; nothing is set
    /// aside then.
    #[allow(clippy::too_many_arguments)]
    pub async fn reserve(
        &self,
        job: &JobId,
        cell: &CellId,
        model: &str,
        want: MicroUsd,
        floor: MicroUsd,
        limit: Option<MicroUsd>,
        now_ms: u64,
    ) -> Result<(ReservationId, MicroUsd), StoreError> {
        let (job, cell, model) = (job.clone(), cell.clone(), model.to_owned());
        self.write(Durability::Soon, move |db| {
            let (settled, reserved) = (charged(db, &job)?.charged, reserved_open(db, &job)?);
            let amount = money::grant(limit, settled, reserved, want, floor).map_err(|why| match why {
                NoRoom::Exhausted => {
                    StoreError::OverBudget { settled, reserved, limit: limit.unwrap_or_default() }
                }
                NoRoom::Busy => StoreError::BudgetBusy { settled, reserved },
            })?;
            let sql = "INSERT INTO ledger (job, cell, model, status, reserved_micro, created_ms) \
                       VALUES (?1, ?2, ?3, 'open', ?4, ?5)";
            db.prepare_cached(sql)?.execute(params![
                job.as_str(),
                cell.as_str(),
                model,
                Int(amount.min(money::MAX).0),
                Int(now_ms)
            ])?;
            Ok((ReservationId(db.last_insert_rowid()), amount))
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
        self.write(Durability::Soon, move |db| {
            let sql = "SELECT job, model, reserved_micro FROM ledger WHERE id = ?1 AND status = 'open'";
            let open = db.prepare_cached(sql)?.query_row([id.0], |row| {
                Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?, MicroUsd(int(row, 2)?)))
            });
            let (job, model, reserved) = open.optional()?.ok_or(StoreError::NotReserved(id))?;
            let owner: JobId = job.parse().map_err(|_| StoreError::NotReserved(id))?;
            let charge = Charge { id, job, model, usage, charged: charged.min(money::MAX) };
            put_charge(db, &charge, now_ms)?;
            Ok(Settled { spent: self::charged(db, &owner)?.charged, above: charged.minus(reserved) })
        })
        .await
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
            let spend = Spend { reserved_open: reserved_open(&both, &job)?, ..spend };
            both.finish()?;
            Ok(spend)
        })
        .await
    }

    /// What each model has cost, by name, deleted jobs included.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn cost_totals(&self) -> Result<Vec<ModelCost>, StoreError> {
        self.read(|db| {
            let sql = "SELECT charged_micro, requests, input, output, cache_read, cache_write_5m, \
                       cache_write_1h, model FROM model_costs ORDER BY model";
            let mut statement = db.prepare_cached(sql)?;
            let rows = statement.query_map([], |row| {
                let Spend { charged, requests, usage, .. } = sums(row)?;
                Ok(ModelCost { model: row.get(7)?, charged, requests, usage })
            })?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }
}

/// See [`Store::release_open`].
pub(super) fn charge_open(db: &Connection, job: &JobId, now_ms: u64) -> Result<u64, StoreError> {
    let sql = "SELECT id, model, reserved_micro FROM ledger WHERE job = ?1 AND status = 'open'";
    let mut statement = db.prepare_cached(sql)?;
    let open = statement.query_map([job.as_str()], |row| {
        Ok(Charge {
            id: ReservationId(row.get(0)?),
            job: job.as_str().to_owned(),
            model: row.get(1)?,
            usage: Usage::default(),
            charged: MicroUsd(int(row, 2)?),
        })
    })?;
    let open = open.collect::<Result<Vec<_>, _>>()?;
    for charge in &open {
        put_charge(db, charge, now_ms)?;
    }
    Ok(open.len() as u64)
}

struct Charge {
    id: ReservationId,
    job: String,
    model: String,
    usage: Usage,
    charged: MicroUsd,
}

fn charged(db: &Connection, job: &JobId) -> Result<Spend, StoreError> {
    let sql = "SELECT charged_micro, requests, input, output, cache_read, cache_write_5m, cache_write_1h \
               FROM job_costs WHERE job = ?1";
    Ok(db.prepare_cached(sql)?.query_row([job.as_str()], sums).optional()?.unwrap_or_default())
}

fn reserved_open(db: &Connection, job: &JobId) -> Result<MicroUsd, StoreError> {
    let sql = "SELECT coalesce(sum(reserved_micro), 0) FROM ledger WHERE job = ?1 AND status = 'open'";
    Ok(MicroUsd(db.prepare_cached(sql)?.query_row([job.as_str()], |row| int(row, 0))?))
}

fn sums(row: &rusqlite::Row<'_>) -> rusqlite::Result<Spend> {
    let usage = Usage {
        input: int(row, 2)?,
        output: int(row, 3)?,
        cache_read: int(row, 4)?,
        cache_write_5m: int(row, 5)?,
        cache_write_1h: int(row, 6)?,
    };
    let (charged, requests) = (MicroUsd(int(row, 0)?), int(row, 1)?);
    Ok(Spend { charged, reserved_open: MicroUsd::ZERO, requests, usage })
}

fn put_charge(db: &Connection, charge: &Charge, now_ms: u64) -> Result<(), StoreError> {
    let sql = "UPDATE ledger SET status = 'settled', charged_micro = ?2, usage_json = ?3, settled_ms = ?4 \
               WHERE id = ?1";
    db.prepare_cached(sql)?.execute(params![
        charge.id.0,
        Int(charge.charged.0),
        text(&charge.usage)?,
        Int(now_ms)
    ])?;
    for (table, key, value) in [("job_costs", "job", &charge.job), ("model_costs", "model", &charge.model)] {
        let sql = format!(
            "INSERT INTO {table} ({key}, charged_micro, requests, input, output, cache_read, cache_write_5m, \
             cache_write_1h) VALUES (?1, ?2, 1, ?3, ?4, ?5, ?6, ?7) ON CONFLICT ({key}) DO UPDATE SET \
             charged_micro = charged_micro + excluded.charged_micro, requests = requests + 1, \
             input = input + excluded.input, output = output + excluded.output, \
             cache_read = cache_read + excluded.cache_read, \
             cache_write_5m = cache_write_5m + excluded.cache_write_5m, \
             cache_write_1h = cache_write_1h + excluded.cache_write_1h"
        );
        let usage = &charge.usage;
        db.prepare_cached(&sql)?.execute(params![
            value,
            Int(charge.charged.0),
            Int(usage.input),
            Int(usage.output),
            Int(usage.cache_read),
            Int(usage.cache_write_5m),
            Int(usage.cache_write_1h),
        ])?;
    }
    Ok(())
}
