//! Rows of jobs: submit, look up, list, move, delete. Every move is [`State::next`] under a compare-and-set;
//! nothing here writes a state that the machine did not give.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use rusqlite::types::{ToSql, Type};
use rusqlite::{Connection, OptionalExtension, Row, params, params_from_iter};

use super::ledger::{Batch, charge_open, forget_payer, put_payer};
use super::row::{Int, int, json, maybe_int, parsed, text};
use super::writer::Durability;
use super::{Store, StoreError};
use crate::event::Totals;
use crate::job::{Carry, Identity, Input, JobId, Outcome, State, StopReason};
use crate::policy::output::RESULT_BYTES_CEILING;

/// Most rows of one [`Page`].
pub const PAGE_ROWS_MAX: usize = 1000;
/// Longest result text kept, in bytes: what a policy can allow, and its mark where it was cut.
pub const RESULT_BYTES_MAX: usize = RESULT_BYTES_CEILING as usize + 128;

/// A job to be stored. Its limits (sizes of spec, labels, key) are the caller's to check.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// A fresh id; not used when the idempotency key names an older job.
    pub id: JobId,
    /// Who submits it.
    pub identity: Identity,
    /// Higher goes first.
    pub priority: i8,
    /// The spec as submitted.
    pub spec_json: String,
    /// The effective spec (policy and defaults applied), opaque to the store.
    pub plan_json: String,
    /// Name of the policy.
    pub policy: String,
    /// The model asked for.
    pub model: String,
    /// Labels for filters.
    pub labels: BTreeMap<String, String>,
    /// The batch it belongs to; the first job of a batch decides its budget.
    pub batch: Option<Batch>,
    /// The idempotency key and the digest of the body it came with.
    pub idem: Option<(String, [u8; 32])>,
    /// Wall clock, milliseconds since 1970.
    pub created_ms: u64,
}

/// What a submit did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Submitted {
    /// A new job, on the disk.
    New(JobId),
    /// The job that the same user submitted before with the same key and body.
    Existing(JobId),
}

/// A job without its large texts.
#[derive(Debug, Clone, PartialEq)]
pub struct JobRow {
    /// Its id.
    pub id: JobId,
    /// Who submitted it.
    pub identity: Identity,
    /// Where it stands.
    pub state: State,
    /// Number of the event that told of `state`; none where the mover did not know it yet.
    pub state_seq: Option<u64>,
    /// Which try this is, from 1.
    pub attempt: u32,
    /// Higher goes first.
    pub priority: i8,
    /// Name of the policy.
    pub policy: String,
    /// The model asked for.
    pub model: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Submitted, wall clock in milliseconds.
    pub created_ms: u64,
    /// Admitted for the first time.
    pub started_ms: Option<u64>,
    /// Over.
    pub ended_ms: Option<u64>,
    /// Totals, once it is over.
    pub totals: Option<Totals>,
}

/// A job with all its texts.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// The rest.
    pub row: JobRow,
    /// The spec as submitted.
    pub spec_json: String,
    /// The effective spec.
    pub plan_json: String,
    /// The agent's final answer, at most [`RESULT_BYTES_MAX`] bytes.
    pub result_text: Option<String>,
    /// What earlier attempts left it.
    pub carry: Carry,
}

/// Where a page ended: give it to the next call. Stays good when rows come and go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor(u64);

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Cursor {
    type Err = std::num::ParseIntError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // SQLite's numbers end at i64::MAX.
        text.parse::<i64>().map(|n| Self(n.max(0).unsigned_abs()))
    }
}

/// Which jobs to list; all conditions hold together.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Only this user's.
    pub uid: Option<u32>,
    /// Only in one of these states, by [`State::name`].
    pub states: Option<Vec<String>>,
    /// Only with all of these labels.
    pub labels: Vec<(String, String)>,
    /// Only under this policy.
    pub policy: Option<String>,
    /// Only with this model.
    pub model: Option<String>,
    /// Only submitted at this time or later.
    pub since_ms: Option<u64>,
    /// Only submitted before this time.
    pub until_ms: Option<u64>,
    /// Most rows; above [`PAGE_ROWS_MAX`] and zero mean that.
    pub limit: usize,
    /// Where the last page ended.
    pub cursor: Option<Cursor>,
}

/// Some jobs, newest first.
#[derive(Debug, Clone)]
pub struct Page {
    /// The rows.
    pub rows: Vec<JobRow>,
    /// For the next page; none on the last one.
    pub next_cursor: Option<Cursor>,
}

const ROW_COLUMNS: &str = "id, uid, gid, groups_json, state_json, state_seq, attempt, priority, policy, model, \
     labels_json, created_ms, started_ms, ended_ms, totals_json";

impl Store {
    /// Stores a job as `Queued`; on the disk before it returns.
    ///
    /// # Errors
    /// [`StoreError::IdempotencyConflict`], [`StoreError::BatchBudget`], [`StoreError::Full`],
    /// [`StoreError::Sqlite`] (an id used twice).
    pub async fn submit(&self, job: NewJob) -> Result<Submitted, StoreError> {
        self.write(Durability::Now, move |db| submit(db, &job)).await
    }

    /// The job that a user submitted before with this key and body.
    ///
    /// # Errors
    /// [`StoreError::IdempotencyConflict`] where the key came with another body; those of SQLite.
    pub async fn submitted_before(
        &self,
        uid: u32,
        key: String,
        hash: [u8; 32],
    ) -> Result<Option<JobId>, StoreError> {
        self.read(move |db| submitted_before(db, uid, &key, &hash)).await
    }

    /// One job with its texts.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn job(&self, id: &JobId) -> Result<Option<Job>, StoreError> {
        let id = id.clone();
        self.read(move |db| {
            let sql = format!(
                "SELECT {ROW_COLUMNS}, spec_json, plan_json, result_text, carry_json FROM jobs WHERE id = ?1"
            );
            let row = db.prepare_cached(&sql)?.query_row([id.as_str()], |row| {
                Ok(Job {
                    row: job_row(row)?,
                    spec_json: row.get(15)?,
                    plan_json: row.get(16)?,
                    result_text: row.get(17)?,
                    carry: match row.get_ref(18)?.data_type() {
                        Type::Null => Carry::default(),
                        _ => json(row, 18)?,
                    },
                })
            });
            Ok(row.optional()?)
        })
        .await
    }

    /// Jobs newest first, a page at a time.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn jobs(&self, filter: Filter) -> Result<Page, StoreError> {
        self.read(move |db| list(db, &filter)).await
    }

    /// Moves a job from `expected` by `input`; returns the new state. `seq` is the number of the event that
    /// tells of it, where the caller knows it. A move to `Done` is on the disk before it returns.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] where the job is in another state by now, [`StoreError::Illegal`],
    /// [`StoreError::NoSuchJob`]. Nothing changed then.
    pub async fn transition(
        &self,
        job: &JobId,
        expected: &State,
        input: &Input,
        seq: Option<u64>,
        now_ms: u64,
    ) -> Result<State, StoreError> {
        let (job, expected, input) = (job.clone(), expected.clone(), input.clone());
        let durability = match input {
            Input::Finish(_) | Input::Stop(_) | Input::Park(_) => Durability::Now,
            Input::Admit
            | Input::Requeue
            | Input::Booted
            | Input::Shelved
            | Input::Unpark
            | Input::CellEnded
            | Input::Verify
            | Input::Repair => Durability::Soon,
        };
        self.write(durability, move |db| {
            let actual = state_of(db, &job)?;
            if actual != expected {
                return Err(StoreError::Conflict { actual: Box::new(actual) });
            }
            let next = actual.next(&input)?;
            put_state(db, &job, &next, seq, &input, now_ms)?;
            Ok(next)
        })
        .await
    }

    /// Moves a job whose cell is gone by `input`, with what its next attempt takes over; on the disk before it returns.
    /// `seq` and `now_ms` as in [`Store::transition`].
    ///
    /// # Errors
    /// Those of [`Store::transition`].
    pub async fn carry_over(
        &self,
        job: &JobId,
        expected: &State,
        input: &Input,
        carry: Carry,
        (seq, now_ms): (u64, u64),
    ) -> Result<State, StoreError> {
        let (job, expected, input) = (job.clone(), expected.clone(), input.clone());
        self.write(Durability::Now, move |db| {
            let actual = state_of(db, &job)?;
            if actual != expected {
                return Err(StoreError::Conflict { actual: Box::new(actual) });
            }
            let next = actual.next(&input)?;
            put_state(db, &job, &next, Some(seq), &input, now_ms)?;
            db.prepare_cached("UPDATE jobs SET carry_json = ?2 WHERE id = ?1")?
                .execute(params![job.as_str(), text(&carry)?])?;
            Ok(next)
        })
        .await
    }

    /// Stops a job from whatever state it is in; returns the state before and after. A job that was stopped
    /// before keeps its first reason. On the disk before it returns.
    ///
    /// # Errors
    /// [`StoreError::Illegal`] where the job is over, [`StoreError::NoSuchJob`].
    pub async fn stop(
        &self,
        job: &JobId,
        reason: StopReason,
        now_ms: u64,
    ) -> Result<(State, State), StoreError> {
        let job = job.clone();
        self.write(Durability::Now, move |db| {
            let before = state_of(db, &job)?;
            let input = Input::Stop(reason);
            let after = before.next(&input)?;
            if after != before {
                put_state(db, &job, &after, None, &input, now_ms)?;
            }
            Ok((before, after))
        })
        .await
    }

    /// Notes the event that told of `state`, for a move whose event came after it.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] where the job is in another state by now, [`StoreError::NoSuchJob`].
    pub async fn set_state_seq(&self, job: &JobId, state: &State, seq: u64) -> Result<(), StoreError> {
        let (job, state) = (job.clone(), state.clone());
        self.write(Durability::Soon, move |db| {
            let actual = state_of(db, &job)?;
            if actual != state {
                return Err(StoreError::Conflict { actual: Box::new(actual) });
            }
            db.prepare_cached("UPDATE jobs SET state_seq = ?2 WHERE id = ?1")?
                .execute(params![job.as_str(), Int(seq)])?;
            Ok(())
        })
        .await
    }

    /// Ends a job with its totals and its answer; on the disk before it returns.
    ///
    /// # Errors
    /// Those of [`Store::transition`].
    #[allow(clippy::too_many_arguments)]
    pub async fn finish(
        &self,
        job: &JobId,
        expected: &State,
        outcome: Outcome,
        totals: Totals,
        result_text: Option<String>,
        seq: Option<u64>,
        now_ms: u64,
    ) -> Result<State, StoreError> {
        let (job, expected) = (job.clone(), expected.clone());
        self.write(Durability::Now, move |db| {
            let actual = state_of(db, &job)?;
            if actual != expected {
                return Err(StoreError::Conflict { actual: Box::new(actual) });
            }
            let input = Input::Finish(outcome);
            let next = actual.next(&input)?;
            put_state(db, &job, &next, seq, &input, now_ms)?;
            let result = result_text.map(bounded);
            db.prepare_cached("UPDATE jobs SET totals_json = ?2, result_text = ?3 WHERE id = ?1")?
                .execute(params![job.as_str(), text(&totals)?, result])?;
            Ok(next)
        })
        .await
    }

    /// Deletes a job that is over, with its cells and its ledger rows. What was charged stays in the sums and in
    /// the report; what was still set aside is charged in full.
    ///
    /// # Errors
    /// [`StoreError::NotDone`], [`StoreError::CellsLeft`], [`StoreError::NoSuchJob`].
    pub async fn delete(&self, job: &JobId) -> Result<(), StoreError> {
        let job = job.clone();
        self.write(Durability::Soon, move |db| {
            let state = state_of(db, &job)?;
            if !state.is_done() {
                return Err(StoreError::NotDone { state: state.name().to_owned() });
            }
            let sql = "SELECT count(*) FROM cells WHERE job = ?1 AND gone_ms IS NULL";
            let cells: i64 = db.prepare_cached(sql)?.query_row([job.as_str()], |row| row.get(0))?;
            if cells > 0 {
                return Err(StoreError::CellsLeft);
            }
            charge_open(db, &job, 0)?;
            forget_payer(db, &job)?;
            db.prepare_cached("DELETE FROM jobs WHERE id = ?1")?.execute([job.as_str()])?;
            Ok(())
        })
        .await
    }

    /// Number of jobs in each state, by name; every name is there.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn counts_by_state(&self) -> Result<BTreeMap<&'static str, u64>, StoreError> {
        self.read(|db| {
            let mut statement = db.prepare_cached("SELECT count(*) FROM jobs WHERE state = ?1")?;
            let mut counts = BTreeMap::new();
            for name in State::NAMES {
                let Int(count) = statement.query_row([name], |row| row.get(0))?;
                counts.insert(name, count);
            }
            Ok(counts)
        })
        .await
    }

    /// Submit time of the queued job that has waited longest.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn oldest_queued_ms(&self) -> Result<Option<u64>, StoreError> {
        self.read(|db| {
            let sql = "SELECT created_ms FROM jobs WHERE state = 'queued' ORDER BY n LIMIT 1";
            let found = db.prepare_cached(sql)?.query_row([], |row| row.get(0)).optional()?;
            Ok(found.map(|Int(created_ms)| created_ms))
        })
        .await
    }
}

fn submitted_before(
    db: &Connection,
    uid: u32,
    key: &str,
    hash: &[u8; 32],
) -> Result<Option<JobId>, StoreError> {
    let sql = "SELECT id, idem_hash FROM jobs WHERE uid = ?1 AND idem_key = ?2";
    let found = db
        .prepare_cached(sql)?
        .query_row(params![uid, key], |row| Ok((parsed::<JobId>(row, 0)?, row.get::<_, Vec<u8>>(1)?)));
    match found.optional()? {
        None => Ok(None),
        Some((existing, old_hash)) if old_hash == hash => Ok(Some(existing)),
        Some((existing, _)) => Err(StoreError::IdempotencyConflict { existing }),
    }
}

fn submit(db: &Connection, job: &NewJob) -> Result<Submitted, StoreError> {
    if let Some((key, hash)) = &job.idem
        && let Some(existing) = submitted_before(db, job.identity.uid, key, hash)?
    {
        return Ok(Submitted::Existing(existing));
    }
    let sql = "INSERT INTO jobs (id, uid, gid, groups_json, state, state_json, attempt, priority, spec_json, \
               plan_json, policy, model, labels_json, idem_key, idem_hash, created_ms) \
               VALUES (?1, ?2, ?3, ?4, ?5, ?6, 1, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)";
    db.prepare_cached(sql)?.execute(params![
        job.id.as_str(),
        job.identity.uid,
        job.identity.gid,
        text(&job.identity.groups)?,
        State::Queued.name(),
        text(&State::Queued)?,
        job.priority,
        job.spec_json,
        job.plan_json,
        job.policy,
        job.model,
        text(&job.labels)?,
        job.idem.as_ref().map(|(key, _)| key),
        job.idem.as_ref().map(|(_, hash)| &hash[..]),
        Int(job.created_ms),
    ])?;
    let n = db.last_insert_rowid();
    put_payer(db, job)?;
    let mut label = db.prepare_cached("INSERT INTO labels (key, value, n) VALUES (?1, ?2, ?3)")?;
    for (key, value) in &job.labels {
        label.execute(params![key, value, n])?;
    }
    Ok(Submitted::New(job.id.clone()))
}

fn list(db: &Connection, filter: &Filter) -> Result<Page, StoreError> {
    let mut sql = format!("SELECT {ROW_COLUMNS}, n FROM jobs WHERE 1");
    let mut values: Vec<Box<dyn ToSql>> = Vec::new();
    {
        let mut push = |condition: &str, value: Option<Box<dyn ToSql>>| {
            if let Some(value) = value {
                values.push(value);
                sql.push_str(condition);
            }
        };
        push(" AND uid = ?", filter.uid.map(|v| Box::new(v) as _));
        push(" AND policy = ?", filter.policy.clone().map(|v| Box::new(v) as _));
        push(" AND model = ?", filter.model.clone().map(|v| Box::new(v) as _));
        push(" AND created_ms >= ?", filter.since_ms.map(|v| Box::new(Int(v)) as _));
        push(" AND created_ms < ?", filter.until_ms.map(|v| Box::new(Int(v)) as _));
        push(" AND n < ?", filter.cursor.map(|v| Box::new(Int(v.0)) as _));
        if let Some(states) = &filter.states {
            // As one JSON value: the statement does not grow with the list.
            push(" AND state IN (SELECT value FROM json_each(?))", Some(Box::new(text(states)?)));
        }
        for (key, value) in &filter.labels {
            push(" AND n IN (SELECT n FROM labels WHERE key = ?", Some(Box::new(key.clone())));
            push(" AND value = ?)", Some(Box::new(value.clone())));
        }
    }
    let limit = if filter.limit == 0 { PAGE_ROWS_MAX } else { filter.limit.min(PAGE_ROWS_MAX) };
    sql.push_str(&format!(" ORDER BY n DESC LIMIT {}", limit + 1));
    let mut statement = db.prepare_cached(&sql)?;
    let found = statement
        .query_map(params_from_iter(values), |row| Ok((job_row(row)?, Cursor(int(row, 15)?))))?
        .collect::<Result<Vec<_>, _>>()?;
    let more = found.len() > limit;
    let next_cursor = if more { found.get(limit - 1).map(|(_, cursor)| *cursor) } else { None };
    Ok(Page { rows: found.into_iter().take(limit).map(|(row, _)| row).collect(), next_cursor })
}

pub(super) fn state_of(db: &Connection, job: &JobId) -> Result<State, StoreError> {
    let found = db
        .prepare_cached("SELECT state_json FROM jobs WHERE id = ?1")?
        .query_row([job.as_str()], |row| json(row, 0))
        .optional()?;
    found.ok_or_else(|| StoreError::NoSuchJob { job: job.clone() })
}

fn put_state(
    db: &Connection,
    job: &JobId,
    state: &State,
    seq: Option<u64>,
    input: &Input,
    now_ms: u64,
) -> Result<(), StoreError> {
    let started_ms = matches!(input, Input::Admit).then_some(now_ms);
    let ended_ms = state.is_done().then_some(now_ms);
    // The next cell is another try.
    let tried = u32::from(matches!(input, Input::Requeue | Input::Shelved | Input::Repair));
    let sql = "UPDATE jobs SET state = ?2, state_json = ?3, state_seq = ?4, \
               started_ms = coalesce(started_ms, ?5), ended_ms = ?6, outcome = ?7, attempt = attempt + ?8 \
               WHERE id = ?1";
    db.prepare_cached(sql)?.execute(params![
        job.as_str(),
        state.name(),
        text(state)?,
        seq.map(Int),
        started_ms.map(Int),
        ended_ms.map(Int),
        state.outcome().map(Outcome::label),
        tried,
    ])?;
    Ok(())
}

fn job_row(row: &Row<'_>) -> rusqlite::Result<JobRow> {
    Ok(JobRow {
        id: parsed(row, 0)?,
        identity: Identity { uid: row.get(1)?, gid: row.get(2)?, groups: json(row, 3)? },
        state: json(row, 4)?,
        state_seq: maybe_int(row, 5)?,
        attempt: row.get(6)?,
        priority: row.get(7)?,
        policy: row.get(8)?,
        model: row.get(9)?,
        labels: json(row, 10)?,
        created_ms: int(row, 11)?,
        started_ms: maybe_int(row, 12)?,
        ended_ms: maybe_int(row, 13)?,
        totals: if row.get_ref(14)?.data_type() == Type::Null { None } else { Some(json(row, 14)?) },
    })
}

fn bounded(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(RESULT_BYTES_MAX));
    text
}
