//! The writer's thread: takes requests in order, runs those that wait together in one transaction (each in
//! its own savepoint), commits, syncs where one of them asks for it, and only then replies. It must never
//! reply before the commit, and never let one request's failure take another's work along.

use std::fs::File;
use std::path::Path;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::{SYNC_DELAY_MS, StoreError, lock};

/// Requests per transaction.
const BATCH_MAX: usize = 64;

/// When a committed request must be on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Durability {
    /// Before the reply.
    Now,
    /// Within [`SYNC_DELAY_MS`].
    Soon,
}

/// What is left of a request once its work is done: telling the caller.
type Reply = Box<dyn FnOnce(Result<(), StoreError>) + Send>;
/// A request's work: whether it is to be kept, and the reply for after the commit. Where the transaction
/// failed before its turn it gets the failure instead of a connection, and passes it on.
type Work = Box<dyn FnOnce(Result<&Connection, StoreError>) -> (Result<(), StoreError>, Reply) + Send>;

enum Message {
    Request(Durability, Work),
    Close,
}

/// The writer's thread, seen from outside.
pub(super) struct Writer {
    messages: Sender<Message>,
    thread: Mutex<Option<JoinHandle<Result<(), StoreError>>>>,
}

impl Writer {
    /// Starts the thread; `file_lock` is held until the connection is closed.
    pub(super) fn start(connection: Connection, file: &Path, file_lock: File) -> Result<Self, StoreError> {
        // SQLite keeps its own locks on the database and the shared memory, not on the log: a second
        // descriptor of the log may be opened and closed without dropping them.
        let wal_path = file.with_file_name(format!("{}-wal", super::FILE_NAME));
        let wal = File::open(&wal_path).map_err(|error| StoreError::io("open", &wal_path, &error))?;
        let (messages, inbox) = channel();
        let body = move || {
            let mut state = Loop { connection, wal, unsynced_since: None };
            let result = state.run(&inbox);
            drop(state.connection);
            drop(file_lock);
            result
        };
        let thread = std::thread::Builder::new().name("hotcell-store".to_owned()).spawn(body);
        let thread = thread.map_err(|error| StoreError::io("start the writer of", file, &error))?;
        Ok(Self { messages, thread: Mutex::new(Some(thread)) })
    }

    /// Hands in a request; `reply` is called once, on the writer's thread, after the commit.
    pub(super) fn send<T: Send + 'static>(
        &self,
        durability: Durability,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
        reply: impl FnOnce(Result<T, StoreError>) + Send + 'static,
    ) -> Result<(), StoreError> {
        let work: Work = Box::new(move |connection| match connection.and_then(work) {
            Ok(value) => {
                (Ok(()), Box::new(move |committed: Result<(), StoreError>| reply(committed.map(|()| value))))
            }
            Err(error) => (Err(error.clone()), Box::new(move |_| reply(Err(error)))),
        });
        self.messages.send(Message::Request(durability, work)).map_err(|_| StoreError::Closed)
    }

    /// Ends the thread after the requests handed in so far. Blocks.
    pub(super) fn close(&self) -> Result<(), StoreError> {
        // A failure means that the thread is gone already.
        let _ = self.messages.send(Message::Close);
        let thread = lock(&self.thread).take();
        thread.map_or(Ok(()), |thread| thread.join().unwrap_or(Err(StoreError::Closed)))
    }
}

struct Loop {
    connection: Connection,
    wal: File,
    unsynced_since: Option<Instant>,
}

impl Loop {
    fn run(&mut self, inbox: &Receiver<Message>) -> Result<(), StoreError> {
        loop {
            let first = match self.until_sync() {
                None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(wait) => inbox.recv_timeout(wait),
            };
            let mut closing = false;
            let mut batch = Vec::new();
            match first {
                Ok(Message::Request(durability, work)) => batch.push((durability, work)),
                Ok(Message::Close) | Err(RecvTimeoutError::Disconnected) => return self.sync(),
                Err(RecvTimeoutError::Timeout) => {
                    self.sync_logged();
                    continue;
                }
            }
            while batch.len() < BATCH_MAX {
                match inbox.try_recv() {
                    Ok(Message::Request(durability, work)) => batch.push((durability, work)),
                    Ok(Message::Close) => {
                        closing = true;
                        break;
                    }
                    Err(_) => break,
                }
            }
            self.execute(batch);
            if closing {
                return self.sync();
            }
            // A steady stream of requests must not put the sync off for ever.
            if self.until_sync() == Some(Duration::ZERO) {
                self.sync_logged();
            }
        }
    }

    /// Time left until commits must be synced; none when all are.
    fn until_sync(&self) -> Option<Duration> {
        let since = self.unsynced_since?;
        Some(Duration::from_millis(SYNC_DELAY_MS).saturating_sub(since.elapsed()))
    }

    fn execute(&mut self, batch: Vec<(Durability, Work)>) {
        let now = batch.iter().any(|(durability, _)| *durability == Durability::Now);
        let mut replies = Vec::with_capacity(batch.len());
        let mut committed = self.transaction(batch, &mut replies);
        if committed.is_ok() {
            self.unsynced_since.get_or_insert_with(Instant::now);
            if now {
                committed = self.sync();
            }
        }
        for reply in replies {
            reply(committed.clone());
        }
    }

    fn transaction(
        &self,
        batch: Vec<(Durability, Work)>,
        replies: &mut Vec<Reply>,
    ) -> Result<(), StoreError> {
        let mut failed = self.statement("BEGIN IMMEDIATE").err();
        for (_, work) in batch {
            if failed.is_none() {
                failed = self.statement("SAVEPOINT request").err();
            }
            let (result, reply) = work(failed.clone().map_or(Ok(&self.connection), Err));
            replies.push(reply);
            if failed.is_some() {
                continue;
            }
            let ended = if self.connection.is_autocommit() {
                // SQLite rolled the whole transaction back (no space, I/O error).
                Err(result.err().unwrap_or(StoreError::Full))
            } else if result.is_ok() {
                self.statement("RELEASE request")
            } else {
                self.statement("ROLLBACK TO request").and_then(|()| self.statement("RELEASE request"))
            };
            failed = ended.err();
        }
        let result = match failed {
            None => self.statement("COMMIT"),
            Some(error) => Err(error),
        };
        if result.is_err() && !self.connection.is_autocommit() {
            // Fails only where SQLite rolled back by itself in between.
            let _ = self.statement("ROLLBACK");
        }
        result
    }

    fn statement(&self, sql: &str) -> Result<(), StoreError> {
        self.connection.prepare_cached(sql)?.execute([])?;
        Ok(())
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        if self.unsynced_since.take().is_some() {
            let path = Path::new("the log of the store");
            self.wal.sync_data().map_err(|error| StoreError::io("sync", path, &error))?;
        }
        Ok(())
    }

    fn sync_logged(&mut self) {
        if let Err(error) = self.sync() {
            tracing::error!(%error, "committed rows may not survive a power loss");
        }
    }
}
