//! What access and audit ask of the rows: how many open jobs a user has, and which jobs have something to
//! audit. Reads only.

use rusqlite::params;

use super::row::{Int, int, maybe_int, parsed};
use super::{Store, StoreError};
use crate::job::JobId;

/// Most rows of one page.
const PAGE_ROWS_MAX: u64 = 500;

/// A job as the audit needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditJob {
    /// Its number: in the order of submits, for the next page.
    pub n: u64,
    /// Its id.
    pub id: JobId,
    /// Whose it is.
    pub uid: u32,
    /// When it was over, wall clock in milliseconds.
    pub ended_ms: Option<u64>,
}

/// Which jobs to audit.
#[derive(Debug, Clone, Copy, Default)]
pub struct AuditFilter {
    /// Only this user's.
    pub uid: Option<u32>,
    /// Only those that ended at this time or later, or not yet; wall clock in milliseconds.
    pub since_ms: u64,
    /// Without those that are not over.
    pub over: bool,
}

fn audit_job(row: &rusqlite::Row<'_>) -> rusqlite::Result<AuditJob> {
    Ok(AuditJob { n: int(row, 0)?, id: parsed(row, 1)?, uid: row.get(2)?, ended_ms: maybe_int(row, 3)? })
}

impl Store {
    /// A user's jobs that are not over, by state.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn open_counts(&self, uid: u32) -> Result<Vec<(String, u64)>, StoreError> {
        self.read(move |db| {
            let sql = "SELECT state, count(*) FROM jobs WHERE uid = ?1 AND state <> 'done' GROUP BY state";
            let mut statement = db.prepare_cached(sql)?;
            let rows = statement.query_map([uid], |row| Ok((row.get(0)?, int(row, 1)?)))?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// A page of jobs after the one with number `after`, in the order of their submits; empty at the end.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn audit_page(&self, filter: AuditFilter, after: u64) -> Result<Vec<AuditJob>, StoreError> {
        self.read(move |db| {
            let sql = "SELECT n, id, uid, ended_ms FROM jobs WHERE n > ?1 AND (?2 IS NULL OR uid = ?2) \
                       AND (ended_ms >= ?3 OR (ended_ms IS NULL AND NOT ?4)) ORDER BY n LIMIT ?5";
            let mut statement = db.prepare_cached(sql)?;
            let AuditFilter { uid, since_ms, over } = filter;
            let bound = params![Int(after), uid, Int(since_ms), over, Int(PAGE_ROWS_MAX)];
            let rows = statement.query_map(bound, audit_job)?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// Jobs that are being worked on, and those numbered from `floor` on that ended at `since_ms` or later;
    /// with them the floor for the next look: the number of the oldest job that is not over.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn audit_news(
        &self,
        uid: Option<u32>,
        floor: u64,
        since_ms: u64,
    ) -> Result<(Vec<AuditJob>, u64), StoreError> {
        self.read(move |db| {
            let sql = "SELECT coalesce((SELECT min(n) FROM jobs WHERE state <> 'done'), \
                       (SELECT coalesce(max(n), 0) + 1 FROM jobs))";
            let next = db.prepare_cached(sql)?.query_row([], |row| int(row, 0))?;
            // The plus keeps SQLite from walking all jobs that are over.
            let sql = "SELECT n, id, uid, ended_ms FROM jobs WHERE n >= ?1 AND (?2 IS NULL OR uid = ?2) \
                       AND ((+state = 'done' AND ended_ms >= ?3) OR +state NOT IN ('done', 'queued')) ORDER BY n";
            let mut statement = db.prepare_cached(sql)?;
            let rows = statement.query_map(params![Int(floor), uid, Int(since_ms)], audit_job)?;
            Ok((rows.collect::<Result<_, _>>()?, next))
        })
        .await
    }
}
