//! The rows of the ledger: who pays, running sums, charges. Every function works inside the caller's
//! transaction; none of them decides anything.

use rusqlite::{Connection, OptionalExtension, params};

use super::{Batch, ReservationId, Spend};
use crate::job::JobId;
use crate::money::{Budget, Calendar, Day, MicroUsd, Scope, Standing};
use crate::pricing::Usage;
use crate::store::StoreError;
use crate::store::jobs::NewJob;
use crate::store::row::{Int, int, maybe_int, parsed, text};

/// The columns that [`sums`] reads, in its order.
macro_rules! sum_columns {
    () => {
        "charged_micro, requests, input, output, cache_read, cache_write_5m, cache_write_1h, web_searches"
    };
}
pub(super) const SUM_COLUMNS: &str = sum_columns!();

/// Notes who pays for a new job, and its batch.
///
/// # Errors
/// [`StoreError::BatchBudget`] where the batch's first job named another figure.
pub(in crate::store) fn put_payer(db: &Connection, job: &NewJob) -> Result<(), StoreError> {
    let uid = job.identity.uid;
    if let Some(Batch { name, limit }) = &job.batch {
        let sql = "INSERT INTO batches (uid, name, limit_micro) VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING";
        db.prepare_cached(sql)?.execute(params![uid, name, limit.map(|limit| Int(limit.0))])?;
        let sql = "SELECT limit_micro FROM batches WHERE uid = ?1 AND name = ?2";
        let first = db.prepare_cached(sql)?.query_row(params![uid, name], |row| maybe_int(row, 0))?;
        let first = first.map(MicroUsd);
        if limit.is_some() && *limit != first {
            return Err(StoreError::BatchBudget { name: name.clone(), first });
        }
    }
    let sql = "INSERT INTO payers (job, uid, policy, batch, labels_json) VALUES (?1, ?2, ?3, ?4, ?5)";
    let batch = job.batch.as_ref().map(|batch| &batch.name);
    let labels = text(&job.labels)?;
    db.prepare_cached(sql)?.execute(params![job.id.as_str(), uid, job.policy, batch, labels])?;
    Ok(())
}

/// Forgets the sums of a job that is removed, and its payer where it never paid.
pub(in crate::store) fn forget_payer(db: &Connection, job: &JobId) -> Result<(), StoreError> {
    let sql = "DELETE FROM budget_sums WHERE scope = 'job' AND key = ?1";
    db.prepare_cached(sql)?.execute([job.as_str()])?;
    let sql =
        "DELETE FROM payers WHERE job = ?1 AND NOT EXISTS (SELECT 1 FROM charges WHERE payer = payers.n)";
    db.prepare_cached(sql)?.execute([job.as_str()])?;
    Ok(())
}

/// What names the sums that a request counts in.
pub(super) struct Keys {
    pub(super) job: Option<JobId>,
    pub(super) uid: u32,
    pub(super) batch: Option<String>,
    pub(super) day: Day,
}

impl Keys {
    /// The keys of a job's request on a day.
    pub(super) fn of_job(db: &Connection, job: &JobId, day: Day) -> Result<Self, StoreError> {
        let sql = "SELECT uid, batch FROM payers WHERE job = ?1";
        let found = db.prepare_cached(sql)?.query_row([job.as_str()], |row| {
            Ok(Self { job: Some(job.clone()), uid: row.get(0)?, batch: row.get(1)?, day })
        });
        found.optional()?.ok_or_else(|| StoreError::NoSuchJob { job: job.clone() })
    }

    fn key(&self, scope: Scope) -> Option<String> {
        match scope {
            Scope::Job => self.job.as_ref().map(|job| job.as_str().to_owned()),
            Scope::Batch => self.batch.as_ref().map(|name| format!("{}/{name}", self.uid)),
            Scope::UserDay => Some(format!("{}/{}", self.day, self.uid)),
            Scope::Day => Some(self.day.to_string()),
            Scope::Month => Some(self.day.month()),
        }
    }

    /// All of them, in the order of [`Scope::ALL`].
    fn all(&self) -> [Option<String>; 5] {
        Scope::ALL.map(|scope| self.key(scope))
    }

    /// How the budgets stand that have a key here.
    pub(super) fn standings(
        &self,
        db: &Connection,
        budgets: &[Budget],
        calendar: &Calendar,
    ) -> Result<Vec<Standing>, StoreError> {
        let mut standings = Vec::with_capacity(budgets.len());
        for Budget { scope, limit } in budgets {
            let Some(key) = self.key(*scope) else { continue };
            let (charged, reserved) = sum(db, *scope, &key)?;
            let resets_at_ms = match scope {
                Scope::Job | Scope::Batch => None,
                Scope::UserDay | Scope::Day => Some(calendar.day_ends_ms(self.day)),
                Scope::Month => Some(calendar.month_ends_ms(self.day)),
            };
            standings.push(Standing { scope: *scope, limit: *limit, charged, reserved, resets_at_ms });
        }
        Ok(standings)
    }
}

/// What is charged and set aside in one scope.
pub(super) fn sum(db: &Connection, scope: Scope, key: &str) -> Result<(MicroUsd, MicroUsd), StoreError> {
    let sql = "SELECT charged_micro, reserved_micro FROM budget_sums WHERE scope = ?1 AND key = ?2";
    let found = db
        .prepare_cached(sql)?
        .query_row([scope.as_str(), key], |row| Ok((MicroUsd(int(row, 0)?), MicroUsd(int(row, 1)?))));
    Ok(found.optional()?.unwrap_or_default())
}

/// Adds a reservation to all its sums, whether a budget limits them or not: a limit may come later.
pub(super) fn reserve_sums(db: &Connection, keys: &Keys, amount: MicroUsd) -> Result<(), StoreError> {
    // One statement for all: what a statement costs besides its rows is most of it.
    let sql = "INSERT INTO budget_sums (scope, key, charged_micro, reserved_micro) \
               SELECT column1, column2, 0, ?6 FROM \
               (VALUES ('job', ?1), ('batch', ?2), ('user_day', ?3), ('day', ?4), ('month', ?5)) \
               WHERE column2 IS NOT NULL \
               ON CONFLICT DO UPDATE SET reserved_micro = reserved_micro + excluded.reserved_micro";
    let [job, batch, user_day, day, month] = keys.all();
    db.prepare_cached(sql)?.execute(params![job, batch, user_day, day, month, Int(amount.0)])?;
    Ok(())
}

/// The latest day that money was set aside on.
pub(super) fn latest_day(db: &Connection) -> Result<Option<Day>, StoreError> {
    let sql = "SELECT value FROM meta WHERE key = 'budget_day'";
    Ok(db.prepare_cached(sql)?.query_row([], |row| parsed(row, 0)).optional()?)
}

/// Remembers `day` as the latest, unless a later one is.
pub(super) fn put_day(db: &Connection, day: Day) -> Result<(), StoreError> {
    let sql = "INSERT INTO meta (key, value) VALUES ('budget_day', ?1) \
               ON CONFLICT DO UPDATE SET value = excluded.value WHERE excluded.value > value";
    db.prepare_cached(sql)?.execute([day.to_string()])?;
    Ok(())
}

/// What an open reservation becomes.
pub(super) struct Charge {
    pub(super) id: ReservationId,
    pub(super) job: JobId,
    pub(super) reserved: MicroUsd,
    pub(super) usage: Usage,
    /// The whole reservation, until somebody knows better.
    pub(super) charged: MicroUsd,
    model: String,
    day: Day,
    credential: String,
    provider: String,
    created_ms: u64,
}

/// The open reservations, with a condition behind it.
macro_rules! open_where {
    ($condition:literal) => {
        concat!(
            "SELECT id, job, model, reserved_micro, day, credential, provider, created_ms FROM ledger \
             WHERE status = 'open' AND ",
            $condition
        )
    };
}

impl Charge {
    /// The open reservation with this number.
    pub(super) fn open(db: &Connection, id: ReservationId) -> Result<Option<Self>, StoreError> {
        Ok(db.prepare_cached(open_where!("id = ?1"))?.query_row([id.get()], Self::read).optional()?)
    }

    fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<Self> {
        let reserved = MicroUsd(int(row, 3)?);
        Ok(Self {
            id: ReservationId(row.get(0)?),
            job: parsed(row, 1)?,
            model: row.get(2)?,
            reserved,
            usage: Usage::default(),
            charged: reserved,
            day: parsed(row, 4)?,
            credential: row.get(5)?,
            provider: row.get(6)?,
            created_ms: int(row, 7)?,
        })
    }
}

/// See [`crate::store::Store::release_open`].
pub(in crate::store) fn charge_open(db: &Connection, job: &JobId, now_ms: u64) -> Result<u64, StoreError> {
    let mut statement = db.prepare_cached(open_where!("job = ?1"))?;
    let open = statement.query_map([job.as_str()], Charge::read)?;
    let open = open.collect::<Result<Vec<_>, _>>()?;
    for charge in &open {
        put_charge(db, charge, now_ms)?;
    }
    Ok(open.len() as u64)
}

/// What a job was charged.
pub(super) fn charged(db: &Connection, job: &JobId) -> Result<Spend, StoreError> {
    let sql = concat!("SELECT ", sum_columns!(), " FROM job_costs WHERE job = ?1");
    Ok(db.prepare_cached(sql)?.query_row([job.as_str()], sums).optional()?.unwrap_or_default())
}

/// A row that begins with [`SUM_COLUMNS`].
pub(super) fn sums(row: &rusqlite::Row<'_>) -> rusqlite::Result<Spend> {
    let usage = Usage {
        input: int(row, 2)?,
        output: int(row, 3)?,
        cache_read: int(row, 4)?,
        cache_write_5m: int(row, 5)?,
        cache_write_1h: int(row, 6)?,
        web_searches: int(row, 7)?,
    };
    let (charged, requests) = (MicroUsd(int(row, 0)?), int(row, 1)?);
    Ok(Spend { charged, reserved_open: MicroUsd::ZERO, requests, usage })
}

/// Settles a reservation: its row, all sums, and the charge that stays.
pub(super) fn put_charge(db: &Connection, charge: &Charge, now_ms: u64) -> Result<(), StoreError> {
    let sql = "UPDATE ledger SET status = 'settled', charged_micro = ?2, usage_json = ?3, settled_ms = ?4 \
               WHERE id = ?1";
    db.prepare_cached(sql)?.execute(params![
        charge.id.get(),
        Int(charge.charged.0),
        text(&charge.usage)?,
        Int(now_ms)
    ])?;
    let keys = Keys::of_job(db, &charge.job, charge.day)?;
    let sql = "UPDATE budget_sums SET charged_micro = charged_micro + ?3, reserved_micro = reserved_micro - ?4 \
               WHERE scope = ?1 AND key = ?2";
    let mut statement = db.prepare_cached(sql)?;
    for (scope, key) in Scope::ALL.into_iter().zip(keys.all()) {
        let (charged, reserved) = (Int(charge.charged.0), Int(charge.reserved.0));
        if let Some(key) = key {
            statement.execute(params![scope.as_str(), key, charged, reserved])?;
        }
    }
    add_costs(db, charge)?;
    let usage = &charge.usage;
    let sql = "INSERT INTO charges (payer, at_ms, day, model, credential, provider, charged_micro, input, output, \
               cache_read, cache_write_5m, cache_write_1h, web_searches) \
               VALUES ((SELECT n FROM payers WHERE job = ?1), ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)";
    db.prepare_cached(sql)?.execute(params![
        charge.job.as_str(),
        Int(charge.created_ms),
        charge.day.to_string(),
        charge.model,
        charge.credential,
        charge.provider,
        Int(charge.charged.0),
        Int(usage.input),
        Int(usage.output),
        Int(usage.cache_read),
        Int(usage.cache_write_5m),
        Int(usage.cache_write_1h),
        Int(usage.web_searches),
    ])?;
    Ok(())
}

/// Adds a charge to the sums of a table, under a key.
macro_rules! add_costs {
    ($table:literal, $key:literal) => {
        concat!(
            "INSERT INTO ",
            $table,
            " (",
            $key,
            ", ",
            sum_columns!(),
            ") VALUES (?1, ?2, 1, ?3, ?4, ?5, ?6, ?7, ?8) \
             ON CONFLICT (",
            $key,
            ") DO UPDATE SET \
             charged_micro = charged_micro + excluded.charged_micro, requests = requests + 1, \
             input = input + excluded.input, output = output + excluded.output, \
             cache_read = cache_read + excluded.cache_read, \
             cache_write_5m = cache_write_5m + excluded.cache_write_5m, \
             cache_write_1h = cache_write_1h + excluded.cache_write_1h, \
             web_searches = web_searches + excluded.web_searches"
        )
    };
}

fn add_costs(db: &Connection, charge: &Charge) -> Result<(), StoreError> {
    for (sql, value) in [
        (add_costs!("job_costs", "job"), charge.job.as_str()),
        (add_costs!("model_costs", "model"), &charge.model),
    ] {
        let usage = &charge.usage;
        db.prepare_cached(sql)?.execute(params![
            value,
            Int(charge.charged.0),
            Int(usage.input),
            Int(usage.output),
            Int(usage.cache_read),
            Int(usage.cache_write_5m),
            Int(usage.cache_write_1h),
            Int(usage.web_searches),
        ])?;
    }
    Ok(())
}
