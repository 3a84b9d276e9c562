//! Rows of cells: written before anything of a cell exists, marked when all of it is proven gone. A row
//! must never be deleted while its cell may be alive: a restarted daemon finds its cells here.

use std::fmt;

use rusqlite::types::Type;
use rusqlite::{OptionalExtension, Row, params};

use super::row::{Int, int, maybe_int, parsed};
use super::writer::Durability;
use super::{Store, StoreError};
use crate::job::spec::Runtime;
use crate::job::{CellId, JobId};

/// A cell and whose it is.
#[derive(Clone, PartialEq, Eq)]
pub struct CellRow {
    /// Its id.
    pub cell: CellId,
    /// The job it serves.
    pub job: JobId,
    /// The job's attempt.
    pub attempt: u32,
    /// The engine's id of the container, once it has one.
    pub container: Option<String>,
    /// Secret shared with PID 1 of the cell, for `ctl.sock`.
    pub ctl_key: Vec<u8>,
    /// The token with which the cell asks for the model; worth nothing outside.
    pub token: String,
    /// The private host uid of the cell's processes.
    pub cell_uid: u32,
    /// What isolates the agent; none where no agent is in it (it tries a runtime out, or packs commits).
    pub runtime: Option<Runtime>,
    /// When it was made, on the clock that never jumps: milliseconds since boot.
    pub created_boot_ms: u64,
    /// When all of it was proven gone.
    pub gone_ms: Option<u64>,
}

impl fmt::Debug for CellRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CellRow")
            .field("cell", &self.cell)
            .field("job", &self.job)
            .field("attempt", &self.attempt)
            .field("container", &self.container)
            .field("cell_uid", &self.cell_uid)
            .field("runtime", &self.runtime)
            .field("created_boot_ms", &self.created_boot_ms)
            .field("gone_ms", &self.gone_ms)
            .finish_non_exhaustive()
    }
}

const COLUMNS: &str =
    "cell, job, attempt, container, ctl_key, token, cell_uid, created_boot_ms, gone_ms, runtime";

impl Store {
    /// Stores a cell that is about to be made; on the disk before it returns.
    ///
    /// # Errors
    /// [`StoreError::Sqlite`] where the id was used before or there is no such job, [`StoreError::Full`].
    pub async fn put_cell(&self, cell: CellRow) -> Result<(), StoreError> {
        self.write(Durability::Now, move |db| {
            let sql =
                format!("INSERT INTO cells ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)");
            db.prepare_cached(&sql)?.execute(params![
                cell.cell.as_str(),
                cell.job.as_str(),
                cell.attempt,
                cell.container,
                cell.ctl_key,
                cell.token,
                cell.cell_uid,
                Int(cell.created_boot_ms),
                cell.gone_ms.map(Int),
                cell.runtime.map(Runtime::as_str),
            ])?;
            Ok(())
        })
        .await
    }

    /// Notes the engine's id of a cell's container. The container can be found without it, by its name.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn set_container(&self, cell: &CellId, container: &str) -> Result<(), StoreError> {
        let (cell, container) = (cell.clone(), container.to_owned());
        self.write(Durability::Soon, move |db| {
            db.prepare_cached("UPDATE cells SET container = ?2 WHERE cell = ?1")?
                .execute(params![cell.as_str(), container])?;
            Ok(())
        })
        .await
    }

    /// Notes that nothing of a cell is left. The first time stays.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn cell_gone(&self, cell: &CellId, now_ms: u64) -> Result<(), StoreError> {
        let cell = cell.clone();
        self.write(Durability::Soon, move |db| {
            db.prepare_cached("UPDATE cells SET gone_ms = ?2 WHERE cell = ?1 AND gone_ms IS NULL")?
                .execute(params![cell.as_str(), Int(now_ms)])?;
            Ok(())
        })
        .await
    }

    /// All cells that are not proven gone, oldest first.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn live_cells(&self) -> Result<Vec<CellRow>, StoreError> {
        self.read(|db| {
            let sql =
                format!("SELECT {COLUMNS} FROM cells WHERE gone_ms IS NULL ORDER BY created_boot_ms, cell");
            let mut statement = db.prepare_cached(&sql)?;
            let rows = statement.query_map([], cell_row)?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// How many cells of jobs that are over are not proven gone.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn cells_left(&self) -> Result<u64, StoreError> {
        self.read(|db| {
            let sql = "SELECT count(*) FROM cells LEFT JOIN jobs ON jobs.id = cells.job \
                       WHERE cells.gone_ms IS NULL AND coalesce(jobs.state, 'done') = 'done'";
            Ok(db.prepare_cached(sql)?.query_row([], |row| int(row, 0))?)
        })
        .await
    }

    /// The latest cell of a job, gone or not.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn cell_of(&self, job: &JobId) -> Result<Option<CellRow>, StoreError> {
        let job = job.clone();
        self.read(move |db| {
            let sql = format!("SELECT {COLUMNS} FROM cells WHERE job = ?1 ORDER BY rowid DESC LIMIT 1");
            Ok(db.prepare_cached(&sql)?.query_row([job.as_str()], cell_row).optional()?)
        })
        .await
    }

    /// The latest cell of a job that its agent was in, gone or not.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn agent_cell_of(&self, job: &JobId) -> Result<Option<CellRow>, StoreError> {
        let job = job.clone();
        self.read(move |db| {
            let sql = format!(
                "SELECT {COLUMNS} FROM cells WHERE job = ?1 AND runtime IS NOT NULL ORDER BY rowid DESC LIMIT 1"
            );
            Ok(db.prepare_cached(&sql)?.query_row([job.as_str()], cell_row).optional()?)
        })
        .await
    }
}

fn cell_row(row: &Row<'_>) -> rusqlite::Result<CellRow> {
    Ok(CellRow {
        cell: parsed(row, 0)?,
        job: parsed(row, 1)?,
        attempt: row.get(2)?,
        container: row.get(3)?,
        ctl_key: row.get(4)?,
        token: row.get(5)?,
        cell_uid: row.get(6)?,
        created_boot_ms: int(row, 7)?,
        gone_ms: maybe_int(row, 8)?,
        runtime: match row.get_ref(9)?.data_type() {
            Type::Null => None,
            _ => Some(parsed(row, 9)?),
        },
    })
}
