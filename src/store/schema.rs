//! The file itself: its lock, its schema and migrations, its check at open. A migration must never be
//! edited once released: a change is a new step at the end of [`MIGRATIONS`].

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};

use super::{FILE_NAME, LOCK_NAME, StoreError};
use crate::job::InstanceId;

/// `hotc` in ASCII: tells our files from other SQLite files.
const APPLICATION_ID: i32 = 0x686f_7463;
/// Longest wait for another process that holds the file (a person's `sqlite3` shell), in milliseconds.
const BUSY_TIMEOUT_MS: u64 = 5_000;
/// Above this size a file that was closed well is not checked as a whole.
const CHECK_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// Step `n` takes a file from schema `n` to `n + 1`.
const MIGRATIONS: [&str; 4] = [JOBS, include_str!("schema/money.sql"), RUNTIME, PARKING];

/// What isolated the cell; none of a cell in which a runtime was only tried out.
const RUNTIME: &str = "ALTER TABLE cells ADD COLUMN runtime TEXT;";

const JOBS: &str = "
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE jobs (
    n INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    uid INTEGER NOT NULL,
    gid INTEGER NOT NULL,
    groups_json TEXT NOT NULL,
    state TEXT NOT NULL,
    state_json TEXT NOT NULL,
    state_seq INTEGER,
    attempt INTEGER NOT NULL,
    priority INTEGER NOT NULL,
    spec_json TEXT NOT NULL,
    plan_json TEXT NOT NULL,
    policy TEXT NOT NULL,
    model TEXT NOT NULL,
    labels_json TEXT NOT NULL,
    idem_key TEXT,
    idem_hash BLOB,
    created_ms INTEGER NOT NULL,
    started_ms INTEGER,
    ended_ms INTEGER,
    outcome TEXT,
    totals_json TEXT,
    result_text TEXT
);
CREATE UNIQUE INDEX jobs_by_key ON jobs (uid, idem_key) WHERE idem_key IS NOT NULL;
CREATE INDEX jobs_by_uid ON jobs (uid);
CREATE INDEX jobs_by_state ON jobs (state);
CREATE INDEX jobs_by_created ON jobs (created_ms);
CREATE TABLE labels (
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    n INTEGER NOT NULL REFERENCES jobs (n) ON DELETE CASCADE,
    PRIMARY KEY (key, value, n)
) WITHOUT ROWID;
CREATE INDEX labels_by_job ON labels (n);
CREATE TABLE cells (
    cell TEXT PRIMARY KEY,
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    attempt INTEGER NOT NULL,
    container TEXT,
    ctl_key BLOB NOT NULL,
    token TEXT NOT NULL,
    cell_uid INTEGER NOT NULL,
    created_boot_ms INTEGER NOT NULL,
    gone_ms INTEGER
);
CREATE INDEX cells_by_job ON cells (job);
CREATE INDEX cells_alive ON cells (created_boot_ms) WHERE gone_ms IS NULL;
CREATE TABLE ledger (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    cell TEXT NOT NULL,
    model TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('open', 'settled')),
    reserved_micro INTEGER NOT NULL CHECK (reserved_micro >= 0),
    charged_micro INTEGER CHECK (charged_micro >= 0),
    usage_json TEXT,
    created_ms INTEGER NOT NULL,
    settled_ms INTEGER
);
CREATE INDEX ledger_open ON ledger (job) WHERE status = 'open';
CREATE INDEX ledger_by_job ON ledger (job);
-- Running sums, written with each settlement: the ledger's rows go with their jobs, these stay.
CREATE TABLE job_costs (
    job TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    charged_micro INTEGER NOT NULL, requests INTEGER NOT NULL,
    input INTEGER NOT NULL, output INTEGER NOT NULL, cache_read INTEGER NOT NULL,
    cache_write_5m INTEGER NOT NULL, cache_write_1h INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE model_costs (
    model TEXT PRIMARY KEY,
    charged_micro INTEGER NOT NULL, requests INTEGER NOT NULL,
    input INTEGER NOT NULL, output INTEGER NOT NULL, cache_read INTEGER NOT NULL,
    cache_write_5m INTEGER NOT NULL, cache_write_1h INTEGER NOT NULL
) WITHOUT ROWID;
";

/// What a parked job carries over to its next attempt.
const PARKING: &str = "ALTER TABLE jobs ADD COLUMN carry_json TEXT;";

/// Makes the state directory, for its owner only.
pub(super) fn make_state_dir(state_dir: &Path) -> Result<(), StoreError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(state_dir);
    made.map_err(|error| StoreError::io("make", state_dir, &error))
}

/// Longest wait for the lock.
const LOCK_WAIT: Duration = Duration::from_millis(500);

/// Takes the lock of the state directory, or says who has it. Closing the file lets go of it.
pub(super) fn lock(state_dir: &Path) -> Result<File, StoreError> {
    use rustix::fs::{FlockOperation, flock};
    let path = state_dir.join(LOCK_NAME);
    let mut options = OpenOptions::new();
    // Not truncated at open: until the lock is ours the file holds the other's pid.
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let mut file = options.open(&path).map_err(|error| StoreError::io("open", &path, &error))?;
    // A child that is between fork and exec still holds what its parent has let go of: ask again for a while.
    let until = Instant::now() + LOCK_WAIT;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                let _ = (&file).take(32).read_to_string(&mut text);
                return Err(StoreError::Locked { path, pid: text.trim().parse().ok() });
            }
            Err(error) => return Err(StoreError::io("lock", &path, &error.into())),
        }
    }
    let written = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    written.map_err(|error| StoreError::io("write", &path, &error))?;
    Ok(file)
}

/// Opens the writing connection: checked, migrated, with its instance id.
pub(super) fn open(file: &Path) -> Result<(Connection, InstanceId), StoreError> {
    // A log that is left means that the last daemon was killed.
    let killed =
        std::fs::metadata(file.with_file_name(format!("{FILE_NAME}-wal"))).is_ok_and(|m| m.len() > 0);
    let bytes = std::fs::metadata(file).map_or(0, |m| m.len());
    let connection = connect(file, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE)?;
    let known = MIGRATIONS.len() as u32;
    let found: u32 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let application: i32 = connection.pragma_query_value(None, "application_id", |row| row.get(0))?;
    let tables: u32 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    if application != APPLICATION_ID && (application != 0 || tables > 0) {
        return Err(StoreError::Foreign { path: file.to_owned() });
    }
    if found > known {
        return Err(StoreError::TooNew { path: file.to_owned(), found, known });
    }
    let mode: String = connection.pragma_update_and_check(None, "journal_mode", "wal", |row| row.get(0))?;
    if mode != "wal" {
        let detail = format!("no write-ahead log here (journal mode {mode}): use a local file system");
        return Err(StoreError::Sqlite { detail });
    }
    connection.pragma_update(None, "synchronous", "normal")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    if bytes > 0 && (killed || bytes <= CHECK_BYTES_MAX) {
        let answer: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if answer != "ok" {
            return Err(StoreError::Corrupt { path: file.to_owned(), detail: answer });
        }
    }
    let instance = migrate(&connection, found)?;
    // The names of the file and of its log must last as well as what is in them.
    let dir = file.parent().unwrap_or(Path::new("."));
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(|error| StoreError::io("sync", dir, &error))?;
    Ok((connection, instance))
}

/// Opens the connection that folds the log into the file.
pub(super) fn open_folder(file: &Path) -> Result<Connection, StoreError> {
    connect(file, OpenFlags::SQLITE_OPEN_READ_WRITE)
}

/// Opens a connection that cannot write.
pub(super) fn open_reader(file: &Path) -> Result<Connection, StoreError> {
    let connection = connect(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    connection.pragma_update(None, "query_only", true)?;
    Ok(connection)
}

fn connect(file: &Path, flags: OpenFlags) -> Result<Connection, StoreError> {
    let connection = Connection::open_with_flags(file, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    connection.busy_timeout(Duration::from_millis(BUSY_TIMEOUT_MS))?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

fn migrate(connection: &Connection, found: u32) -> Result<InstanceId, StoreError> {
    connection.execute_batch("BEGIN IMMEDIATE")?;
    for step in &MIGRATIONS[found as usize..] {
        connection.execute_batch(step)?;
    }
    connection.pragma_update(None, "application_id", APPLICATION_ID)?;
    connection.pragma_update(None, "user_version", MIGRATIONS.len() as u32)?;
    let random = getrandom::u64().map_err(|error| StoreError::Sqlite { detail: error.to_string() })?;
    connection.execute(
        "INSERT INTO meta (key, value) VALUES ('instance', ?1) ON CONFLICT DO NOTHING",
        [InstanceId::new(random).as_str()],
    )?;
    let text: String =
        connection.query_row("SELECT value FROM meta WHERE key = 'instance'", [], |row| row.get(0))?;
    connection.execute_batch("COMMIT")?;
    text.parse().map_err(|_| StoreError::Corrupt {
        path: FILE_NAME.into(),
        detail: format!("its instance id is {text:?}"),
    })
}

/// See [`super::Store::set_aside`].
pub(super) fn set_aside(state_dir: &Path, now_ms: u64) -> Result<PathBuf, StoreError> {
    let _lock = lock(state_dir)?;
    let aside = state_dir.join(format!("{FILE_NAME}.damaged-{now_ms}"));
    for suffix in ["-wal", "-shm", ""] {
        let from = state_dir.join(format!("{FILE_NAME}{suffix}"));
        let to = state_dir.join(format!("{FILE_NAME}.damaged-{now_ms}{suffix}"));
        match std::fs::rename(&from, &to) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(StoreError::io("rename", &from, &error));
            }
            _ => {}
        }
    }
    Ok(aside)
}
