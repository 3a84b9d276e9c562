//! The file itself: its lock, its schema and migrations, its check at open. A migration must never be
//! edited once released: a change is a new step at the end of [`MIGRATIONS`].

pub(super) mod beside;

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
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
pub(super) const MIGRATIONS: [&str; 5] =
    [JOBS, include_str!("schema/money.sql"), RUNTIME, PARKING, super::outbox::OUTBOX];

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
    let there = look(file, file.parent().unwrap_or(Path::new(".")))?;
    open_seen(file, there)
}

/// The same for a file of `there` bytes that was looked at.
fn open_seen(file: &Path, there: u64) -> Result<(Connection, InstanceId), StoreError> {
    let dir = file.parent().unwrap_or(Path::new("."));
    // A log that is left means that the last daemon was killed.
    let killed =
        std::fs::metadata(file.with_file_name(format!("{FILE_NAME}-wal"))).is_ok_and(|m| m.len() > 0);
    let connection = connect(file, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE)?;
    let found = schema_of(&connection, file)?;
    let mode: String = connection.pragma_update_and_check(None, "journal_mode", "wal", |row| row.get(0))?;
    if mode != "wal" {
        let detail = format!("no write-ahead log here (journal mode {mode}): use a local file system");
        return Err(StoreError::Sqlite { detail });
    }
    connection.pragma_update(None, "synchronous", "normal")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    if there > 0 && (killed || there <= CHECK_BYTES_MAX) {
        let answer: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if answer != "ok" {
            return Err(corrupt(file, answer));
        }
    }
    if (1..MIGRATIONS.len() as u32).contains(&found) {
        beside::copy(&connection, file, found)?;
    }
    let instance = migrate(&connection, found, beside::instance(dir))?;
    beside::put_instance(dir, &instance)?;
    // The names of the file and of its log must last as well as what is in them.
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(|error| StoreError::io("sync", dir, &error))?;
    Ok((connection, instance))
}

fn corrupt(file: &Path, detail: impl Into<String>) -> StoreError {
    StoreError::Corrupt { path: file.to_owned(), detail: detail.into() }
}

/// SQLite's pages, as our files have them.
const PAGE_BYTES: u64 = 4096;
/// What every file of SQLite's begins with.
const MAGIC: &[u8; 16] = b"SQLite format 3\0";

/// Looks at the file before SQLite does, which would make an empty store of one that is gone or cut to nothing. Gives
/// its bytes.
fn look(file: &Path, dir: &Path) -> Result<u64, StoreError> {
    let ours = beside::instance(dir).is_some();
    let mut head = Vec::new();
    let read = File::open(file).and_then(|open| {
        open.take(MAGIC.len() as u64).read_to_end(&mut head)?;
        Ok(std::fs::metadata(file)?.len())
    });
    let bytes = match read {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && ours => {
            return Err(corrupt(file, "it is gone, and there was one here before"));
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(StoreError::io("read", file, &error)),
    };
    // SQLite takes the rest of a page that was cut off for zeros, which no check of its own finds.
    let log = std::fs::metadata(file.with_file_name(format!("{FILE_NAME}-wal"))).is_ok_and(|m| m.len() > 0);
    if head.as_slice() == MAGIC && !log && bytes % PAGE_BYTES != 0 {
        return Err(corrupt(file, format!("its last page is cut off: it has {bytes} bytes")));
    }
    match (head.as_slice() == MAGIC, ours) {
        (true, _) => Ok(bytes),
        (false, true) if bytes == 0 => Err(corrupt(file, "it is empty, and was not before")),
        (false, false) if bytes == 0 => Ok(0),
        (false, true) => Err(corrupt(file, "its first page is not a database's")),
        (false, false) if head.iter().all(|byte| *byte == 0) => {
            Err(corrupt(file, "its first page is nothing but zeros"))
        }
        (false, false) => Err(StoreError::Foreign { path: file.to_owned() }),
    }
}

/// The schema of a file that is ours, or none yet; 0 of a new one.
fn schema_of(connection: &Connection, file: &Path) -> Result<u32, StoreError> {
    let known = MIGRATIONS.len() as u32;
    let found: u32 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let application: i32 = connection.pragma_query_value(None, "application_id", |row| row.get(0))?;
    let count = |sql| connection.query_row(sql, [], |row| row.get::<_, u32>(0));
    let tables = count("SELECT count(*) FROM sqlite_schema")?;
    if application != APPLICATION_ID && (application != 0 || tables > 0) {
        let ours = "SELECT count(*) FROM sqlite_schema WHERE name IN ('meta', 'jobs', 'cells', 'ledger')";
        return Err(match count(ours)? {
            4 => corrupt(file, "its mark as hotcell's is gone, its tables are there"),
            _ => StoreError::Foreign { path: file.to_owned() },
        });
    }
    if found > known {
        return Err(StoreError::TooNew { path: file.to_owned(), found, known });
    }
    Ok(found)
}

/// The instance id in a damaged store, where it can still be read.
fn instance_of_damaged(file: &Path) -> Option<InstanceId> {
    let connection = connect(file, OpenFlags::SQLITE_OPEN_READ_ONLY).ok()?;
    let sql = "SELECT value FROM meta WHERE key = 'instance'";
    connection.query_row(sql, [], |row| row.get::<_, String>(0)).ok()?.parse().ok()
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

fn migrate(
    connection: &Connection,
    found: u32,
    before: Option<InstanceId>,
) -> Result<InstanceId, StoreError> {
    connection.execute_batch("BEGIN IMMEDIATE")?;
    for step in &MIGRATIONS[found as usize..] {
        connection.execute_batch(step).map_err(|error| match StoreError::from(error) {
            StoreError::Sqlite { detail } => {
                corrupt(Path::new(FILE_NAME), format!("it is not what its schema {found} says: {detail}"))
            }
            other => other,
        })?;
    }
    connection.pragma_update(None, "application_id", APPLICATION_ID)?;
    connection.pragma_update(None, "user_version", MIGRATIONS.len() as u32)?;
    let random = getrandom::u64().map_err(|error| StoreError::Sqlite { detail: error.to_string() })?;
    // A new store in a directory that had one: its cells are this store's to remove.
    let fresh = before.unwrap_or_else(|| InstanceId::new(random));
    connection.execute(
        "INSERT INTO meta (key, value) VALUES ('instance', ?1) ON CONFLICT DO NOTHING",
        [fresh.as_str()],
    )?;
    let text: String =
        connection.query_row("SELECT value FROM meta WHERE key = 'instance'", [], |row| row.get(0))?;
    connection.execute_batch("COMMIT")?;
    text.parse().map_err(|_| corrupt(Path::new(FILE_NAME), format!("its instance id is {text:?}")))
}
