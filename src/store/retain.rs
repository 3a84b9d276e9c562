//! What retention has to know of all jobs: small rows, read on their own, and nothing of a job's texts.

use std::collections::BTreeSet;

use rusqlite::OptionalExtension;

use super::row::{maybe_int, parsed};
use super::writer::Durability;
use super::{Store, StoreError};
use crate::clock::Clocks;
use crate::job::JobId;

/// A job as retention sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// Its id.
    pub job: JobId,
    /// Whose it is.
    pub uid: u32,
    /// When it ended; none where it is not over.
    pub ended_ms: Option<u64>,
    /// Its change set has entries.
    pub changed: bool,
}

/// What jobs that are not over need of others and of this machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needed {
    /// They themselves.
    pub open: BTreeSet<JobId>,
    /// Jobs that they go on with.
    pub jobs: BTreeSet<JobId>,
    /// Versions of the agent that they name.
    pub agents: BTreeSet<String>,
}

impl Store {
    /// The clocks as retention saw them last.
    ///
    /// # Errors
    /// Those of SQLite; a row that cannot be read is none.
    pub async fn clocks(&self) -> Result<Option<Clocks>, StoreError> {
        self.read(|db| {
            let sql = "SELECT value FROM meta WHERE key = 'clocks'";
            let text: Option<String> = db.prepare_cached(sql)?.query_row([], |row| row.get(0)).optional()?;
            Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
        })
        .await
    }

    /// Keeps them.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn set_clocks(&self, clocks: Clocks) -> Result<(), StoreError> {
        self.write(Durability::Soon, move |db| {
            let sql = "INSERT INTO meta (key, value) VALUES ('clocks', ?1) \
                       ON CONFLICT (key) DO UPDATE SET value = excluded.value";
            db.prepare_cached(sql)?.execute([super::row::text(&clocks)?])?;
            Ok(())
        })
        .await
    }

    /// All jobs, the oldest submit first.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn leftovers(&self) -> Result<Vec<Leftover>, StoreError> {
        self.read(|db| {
            let sql = "SELECT id, uid, iif(state = 'done', ended_ms, NULL), \
                       coalesce(totals_json ->> '$.changes.entries', 0) > 0 FROM jobs ORDER BY n";
            let mut statement = db.prepare_cached(sql)?;
            let rows = statement.query_map([], |row| {
                let (uid, changed) = (row.get(1)?, row.get(3)?);
                Ok(Leftover { job: parsed(row, 0)?, uid, ended_ms: maybe_int(row, 2)?, changed })
            })?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// What jobs that are not over need.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn needed(&self) -> Result<Needed, StoreError> {
        self.read(|db| {
            let sql = "SELECT id, plan_json ->> '$.from', plan_json ->> '$.plan.agent' FROM jobs \
                       WHERE state <> 'done'";
            let mut statement = db.prepare_cached(sql)?;
            let rows = statement.query_map([], |row| {
                Ok((
                    parsed::<JobId>(row, 0)?,
                    row.get::<_, Option<String>>(1)?,
                    row.get::<_, Option<String>>(2)?,
                ))
            })?;
            let mut needed = Needed::default();
            for row in rows {
                let (job, from, agent) = row?;
                needed.open.insert(job);
                needed.jobs.extend(from.and_then(|from| from.parse().ok()));
                needed.agents.extend(agent);
            }
            Ok(needed)
        })
        .await
    }
}
