//! The store: what must be true after the daemon dies, in one SQLite file. Rows of jobs, cells and money;
//! events are in the journal. It never decides: a move of a job is [`State::next`], stored by a
//! compare-and-set in one immediate transaction.
//!
//! **One writer.** There is one writing connection and a bounded queue of requests for it. Requests that wait together
//! share a transaction, each inside its own savepoint, so one `fdatasync` serves many submits; what is short is done
//! on the thread that asks (`writer`). Readers are up to [`READERS_MAX`] connections of their own and never wait for
//! the writer. The write-ahead log is folded into the database on a thread of its own (`fold`).
//!
//! **What survives what.** A reply means that the transaction is committed to the write-ahead log: it
//! survives `kill -9` always. A power loss is another matter: submits, stops, cells and outcomes are synced
//! before the reply; for all else (other transitions, reservations, settlements) the sync begins within
//! [`SYNC_DELAY_MS`] after the commit, or when the sync before has ended, where that takes longer; meanwhile no
//! more is committed than in that time. What a power loss takes is a suffix of the last commits, never a part
//! of one.
//!
//! *Invariant*: one daemon per state directory, by `flock` on `<state>/lock`, held until the last connection
//! is closed.

pub mod access;
pub mod cells;
mod fold;
mod found;
pub mod jobs;
pub mod ledger;
mod open;
mod pause;
pub mod retain;
mod row;
mod schema;
mod writer;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rusqlite::Connection;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use crate::job::state::IllegalMove;
use crate::job::{InstanceId, JobId, State};
use crate::money::{MicroUsd, Standing};

pub use access::{AuditFilter, AuditJob};
pub use cells::CellRow;
pub use jobs::{Filter, Job, JobRow, NewJob, Page, Submitted};
pub use ledger::{Batch, ModelCost, NewReservation, Payer, ReservationId, Reserved, Spend};
pub use open::OpenJob;
pub use pause::Paused;
pub use retain::{Leftover, Needed};
use writer::{Durability, Writer};

/// Name of the database in the state directory.
pub const FILE_NAME: &str = "store.sqlite";
/// Name of the file in the state directory that has its instance id, whatever becomes of the database.
pub const INSTANCE_NAME: &str = "instance";
/// Name of the lock file in the state directory; it holds the pid of the daemon.
pub const LOCK_NAME: &str = "lock";
/// Time from a commit to the start of its `fdatasync`, in milliseconds, where the reply does not wait for it; longer only
/// while the sync before is still under way.
pub const SYNC_DELAY_MS: u64 = 50;
/// Longest wait of a request that may wait for the next one, to be committed with it, in milliseconds.
const LATE_MS: u64 = 2;
/// Requests that may wait for the writer; a caller above it waits to hand in its own.
pub const QUEUE_MAX: usize = 1024;
/// Reading connections.
pub const READERS_MAX: usize = 4;

/// Why the store refused or failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Another daemon has this state directory.
    #[error(
        "{path} is in use by {}; stop it first or choose another state directory", 
        .pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
    )]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// The holder, where it wrote its pid.
        pid: Option<u32>,
    },
    /// The file is damaged. [`Store::set_aside`] moves it out of the way.
    #[error(
        "the store {path} is damaged ({detail}); put a copy of it back, or start once with `hotcell serve \
         --set-store-aside`, which keeps it beside and begins anew"
    )]
    Corrupt {
        /// The damaged file.
        path: PathBuf,
        /// What the check said.
        detail: String,
    },
    /// A file of some other program.
    #[error(
        "{path} is not a hotcell store and is not touched; choose another state directory, or move it away"
    )]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// Written by a later version of hotcell.
    #[error("the store {path} has schema {found}, this hotcell knows up to {known}; use a newer hotcell")]
    TooNew {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: u32,
        /// The latest schema this program knows.
        known: u32,
    },
    /// No space left for a write; nothing of the request was stored.
    #[error("no space left for the store; free some on the file system of the state directory")]
    Full,
    /// A row does not hold what was written.
    #[error("a row of the store cannot be read: {detail}")]
    Unreadable {
        /// What is wrong with it.
        detail: String,
    },
    /// Any other failure of SQLite; nothing of the request was stored.
    #[error("the store failed: {detail}")]
    Sqlite {
        /// SQLite's words.
        detail: String,
    },
    /// A file operation failed.
    #[error("cannot {what} {path}: {detail}")]
    Io {
        /// The verb.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's words.
        detail: String,
    },
    /// The store was closed.
    #[error("the store is closed: the daemon is stopping")]
    Closed,
    /// No such job.
    #[error("no job {job}")]
    NoSuchJob {
        /// The id asked for.
        job: JobId,
    },
    /// The job was not in the state that the caller thought.
    #[error("the job is {} by now", .actual.name())]
    Conflict {
        /// The state it is in.
        actual: Box<State>,
    },
    /// The state machine has no such move.
    #[error(transparent)]
    Illegal(#[from] IllegalMove),
    /// The same user gave the same idempotency key with another body.
    #[error("this idempotency key was used for job {existing} with another body; use a new key")]
    IdempotencyConflict {
        /// The job that has the key.
        existing: JobId,
    },
    /// Only a job that is over can be deleted.
    #[error("the job is {state}; stop it and wait for its end before deleting it")]
    NotDone {
        /// The state's name.
        state: String,
    },
    /// A cell of the job is not proven gone: its row must stay until it is.
    #[error("a cell of the job is not gone yet; try again when it is")]
    CellsLeft,
    /// What is charged leaves no room under this budget, whatever becomes of open reservations.
    #[error("{}", .0.words())]
    OverBudget(Standing),
    /// There will be room under this budget when other reservations are settled.
    #[error("{} USD of the {} are set aside for other requests", .0.reserved, .0.scope.words())]
    BudgetBusy(Standing),
    /// The first job of the batch named another budget.
    #[error("the batch {name:?} has {}; leave the figure out, or choose another name", batch_words(.first))]
    BatchBudget {
        /// Its name.
        name: String,
        /// What the first job said; none: no budget of its own.
        first: Option<MicroUsd>,
    },
    /// The reservation does not exist or was settled before.
    #[error("reservation {0} is not open")]
    NotReserved(ReservationId),
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::ErrorCode;
        let detail = error.to_string();
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                Self::Corrupt { path: PathBuf::from(FILE_NAME), detail }
            }
            Some(ErrorCode::DiskFull) => Self::Full,
            // A row that is not what was written: no check of SQLite's own finds that.
            _ if matches!(error, rusqlite::Error::FromSqlConversionFailure(..)) => {
                Self::Unreadable { detail }
            }
            _ => Self::Sqlite { detail },
        }
    }
}

impl StoreError {
    fn io(what: &'static str, path: &Path, error: &std::io::Error) -> Self {
        Self::Io { what, path: path.to_owned(), detail: error.to_string() }
    }

    /// The same error with the file's whole path.
    fn at(self, file: &Path) -> Self {
        match self {
            Self::Corrupt { detail, .. } => Self::Corrupt { path: file.to_owned(), detail },
            other => other,
        }
    }
}

fn batch_words(first: &Option<MicroUsd>) -> String {
    first.map_or_else(|| "no budget".to_owned(), |limit| format!("a budget of {limit} USD"))
}

/// A handle on the store; clones share it.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    file: PathBuf,
    instance: InstanceId,
    // Before `writer`: its thread holds the lock and must be the last to go.
    idle_readers: Mutex<Vec<Connection>>,
    reader_permits: Arc<Semaphore>,
    queue_permits: Arc<Semaphore>,
    writer: Writer,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("file", &self.inner.file).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens `<state_dir>/store.sqlite`, made where missing, migrated where older, checked for damage.
    ///
    /// The whole file is checked up to 256 MiB, and at any size when the last daemon did not close it.
    ///
    /// # Errors
    /// [`StoreError::Locked`], [`StoreError::Corrupt`], [`StoreError::Foreign`], [`StoreError::TooNew`],
    /// [`StoreError::Io`], [`StoreError::Sqlite`].
    pub async fn open(state_dir: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let state_dir = state_dir.into();
        blocking(move || Self::open_blocking(&state_dir)).await
    }

    fn open_blocking(state_dir: &Path) -> Result<Self, StoreError> {
        schema::make_state_dir(state_dir)?;
        let lock = schema::lock(state_dir)?;
        let file = state_dir.join(FILE_NAME);
        let (connection, instance) = schema::open(&file).map_err(|error| error.at(&file))?;
        let writer = Writer::start(connection, &file, lock)?;
        Ok(Self {
            inner: Arc::new(Inner {
                file,
                instance,
                idle_readers: Mutex::new(Vec::new()),
                reader_permits: Arc::new(Semaphore::new(READERS_MAX)),
                queue_permits: Arc::new(Semaphore::new(QUEUE_MAX)),
                writer,
            }),
        })
    }

    /// Moves a damaged store with its log, and the entries of `with`, into a directory of their own; returns that. The
    /// next [`Store::open`] starts with an empty store and the same instance id.
    ///
    /// # Errors
    /// [`StoreError::Locked`] where a daemon has it, [`StoreError::Io`].
    pub async fn set_aside(
        state_dir: impl Into<PathBuf>,
        now_ms: u64,
        with: Vec<PathBuf>,
    ) -> Result<PathBuf, StoreError> {
        let state_dir = state_dir.into();
        blocking(move || schema::beside::set_aside(&state_dir, now_ms, &with)).await
    }

    /// The id of this state directory, made once.
    pub fn instance(&self) -> &InstanceId {
        &self.inner.instance
    }

    /// Syncs, closes the file and lets go of the lock; requests of other clones get [`StoreError::Closed`].
    ///
    /// # Errors
    /// [`StoreError::Io`] when the last sync failed.
    pub async fn close(self) -> Result<(), StoreError> {
        // No reader may be left when the lock is let go. An error means that another clone closed it before.
        let readers = self.inner.reader_permits.acquire_many(READERS_MAX as u32).await;
        self.inner.reader_permits.close();
        drop(readers);
        lock(&self.inner.idle_readers).clear();
        let inner = Arc::clone(&self.inner);
        blocking(move || inner.writer.close()).await
    }

    /// Runs `work` in a transaction of the writer.
    async fn write<T: Send + 'static>(
        &self,
        durability: Durability,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let permit = Arc::clone(&self.inner.queue_permits).acquire_owned().await;
        let permit = permit.map_err(|_| StoreError::Closed)?;
        let (reply, answer) = oneshot::channel();
        let reply = move |result| {
            // A caller that went away does not undo what it asked for.
            let _ = reply.send(result);
            drop(permit);
        };
        match durability {
            Durability::Now => self.inner.writer.send(work, reply)?,
            Durability::Soon => {
                let put = self.inner.writer.put(work, reply)?;
                // Others that are about to ask share the transaction; one of them may have done it by then.
                tokio::task::yield_now().await;
                if answer.is_empty() { put.here() } else { put.done() }
            }
        }
        answer.await.map_err(|_| StoreError::Closed)?.map_err(|error| error.at(&self.inner.file))
    }

    /// The same for work that nobody is held up by: it waits [`LATE_MS`] for the next request and shares its
    /// transaction.
    async fn write_late<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let permit = Arc::clone(&self.inner.queue_permits).acquire_owned().await;
        let permit = permit.map_err(|_| StoreError::Closed)?;
        let (reply, mut answer) = oneshot::channel();
        let put = self.inner.writer.put(work, move |result| {
            let _ = reply.send(result);
            drop(permit);
        })?;
        let answered = match timeout(Duration::from_millis(LATE_MS), &mut answer).await {
            Ok(answered) => {
                put.done();
                answered
            }
            Err(_) => {
                put.nudge();
                answer.await
            }
        };
        answered.map_err(|_| StoreError::Closed)?.map_err(|error| error.at(&self.inner.file))
    }

    /// Runs `work` on a reading connection; it sees all that was committed before.
    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let permit = Arc::clone(&self.inner.reader_permits).acquire_owned().await;
        let permit = permit.map_err(|_| StoreError::Closed)?;
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            let idle = lock(&inner.idle_readers).pop();
            let connection = match idle {
                Some(connection) => connection,
                None => schema::open_reader(&inner.file)?,
            };
            let result = work(&connection).map_err(|error| error.at(&inner.file));
            if !inner.reader_permits.is_closed() {
                lock(&inner.idle_readers).push(connection);
            }
            drop(permit);
            result
        })
        .await
    }
}

/// A poisoned lock here guards a list of idle connections: any of its states is a good one.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(StoreError::Closed))
}
