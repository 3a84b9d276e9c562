//! The writer's thread: takes requests in order, runs those that wait together in one transaction (each in
//! its own savepoint), commits, and only then replies. What nobody waits for is put where the next request takes it
//! along, for one transaction and one waking less. `fdatasync` is on a thread of its own, which replies to
//! those that asked for it: nobody else waits for the disk. It must never reply before the commit, never to who
//! asked for a sync before the sync, and never let one request's failure take another's work along.

use std::fs::File;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::fold::Folder;
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
    /// Nothing but a look at the late ones.
    Nudge,
    Close,
}

/// Requests that wait for the next one to be committed with it. Each has a [`Put`] that sends a nudge in time.
type Late = Arc<Mutex<Vec<Work>>>;

/// The writer's thread, seen from outside.
pub(super) struct Writer {
    messages: Sender<Message>,
    late: Late,
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
        let syncer =
            Syncer::start(wal).map_err(|error| StoreError::io("start the syncer of", file, &error))?;
        let folder = Folder::start(&connection, file)?;
        let late = Late::default();
        let also_late = Arc::clone(&late);
        let body = move || {
            let mut state = Loop { connection, syncer, folder, late: also_late, unsynced_since: None };
            let result = state.run(&inbox);
            // What nobody takes any more is answered by being dropped; what comes later finds no receiver.
            drop(inbox);
            lock(&state.late).clear();
            // No reply may be owed any more when the lock is let go.
            let result = result.and(state.syncer.finish()).and(state.folder.finish());
            drop(state.connection);
            drop(file_lock);
            result
        };
        let thread = std::thread::Builder::new().name("hotcell-store".to_owned()).spawn(body);
        let thread = thread.map_err(|error| StoreError::io("start the writer of", file, &error))?;
        Ok(Self { messages, late, thread: Mutex::new(Some(thread)) })
    }

    /// Hands in a request; `reply` is called once, after the commit (and the sync, where it is asked
    /// for), on a thread that must not be held up.
    pub(super) fn send<T: Send + 'static>(
        &self,
        durability: Durability,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
        reply: impl FnOnce(Result<T, StoreError>) + Send + 'static,
    ) -> Result<(), StoreError> {
        let message = Message::Request(durability, boxed(work, reply));
        self.messages.send(message).map_err(|_| StoreError::Closed)
    }

    /// Puts a request where the next one takes it along, without waking the thread. Durability: [`Durability::Soon`].
    pub(super) fn put<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
        reply: impl FnOnce(Result<T, StoreError>) + Send + 'static,
    ) -> Put<'_> {
        lock(&self.late).push(boxed(work, reply));
        Put { writer: self, waits: true }
    }

    /// Ends the thread after the requests handed in so far. Blocks.
    pub(super) fn close(&self) -> Result<(), StoreError> {
        // A failure means that the thread is gone already.
        let _ = self.messages.send(Message::Close);
        let thread = lock(&self.thread).take();
        thread.map_or(Ok(()), |thread| thread.join().unwrap_or(Err(StoreError::Closed)))
    }
}

/// A request that waits for the next one. Dropped before it was done it wakes the thread, so that nothing is left
/// behind by who goes away.
pub(super) struct Put<'a> {
    writer: &'a Writer,
    waits: bool,
}

impl Put<'_> {
    /// Has it done now.
    pub(super) fn nudge(mut self) -> Result<(), StoreError> {
        self.waits = false;
        self.writer.messages.send(Message::Nudge).map_err(|_| StoreError::Closed)
    }

    /// It was answered.
    pub(super) fn done(mut self) {
        self.waits = false;
    }
}

impl Drop for Put<'_> {
    fn drop(&mut self) {
        if self.waits {
            // A failure means that the thread is gone, and with it the store.
            let _ = self.writer.messages.send(Message::Nudge);
        }
    }
}

fn boxed<T: Send + 'static>(
    work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    reply: impl FnOnce(Result<T, StoreError>) + Send + 'static,
) -> Work {
    Box::new(move |connection| match connection.and_then(work) {
        Ok(value) => {
            (Ok(()), Box::new(move |committed: Result<(), StoreError>| reply(committed.map(|()| value))))
        }
        Err(error) => (Err(error.clone()), Box::new(move |_| reply(Err(error)))),
    })
}

struct Loop {
    connection: Connection,
    syncer: Syncer,
    folder: Folder,
    late: Late,
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
                Ok(Message::Nudge) => {}
                Ok(Message::Close) | Err(RecvTimeoutError::Disconnected) => closing = true,
                Err(RecvTimeoutError::Timeout) => {
                    self.sync_later();
                    continue;
                }
            }
            while batch.len() < BATCH_MAX && !closing {
                match inbox.try_recv() {
                    Ok(Message::Request(durability, work)) => batch.push((durability, work)),
                    Ok(Message::Nudge) => {}
                    Ok(Message::Close) => {
                        closing = true;
                        break;
                    }
                    Err(_) => break,
                }
            }
            self.execute_with_late(batch);
            if closing {
                return self.last_sync();
            }
            // A steady stream of requests must not put the sync off for ever.
            if self.until_sync() == Some(Duration::ZERO) {
                self.sync_later();
            }
        }
    }

    /// Time left until commits must be synced; none when all are.
    fn until_sync(&self) -> Option<Duration> {
        let since = self.unsynced_since?;
        Some(Duration::from_millis(SYNC_DELAY_MS).saturating_sub(since.elapsed()))
    }

    /// The late ones go first: they were there before, and what they settle makes room.
    fn execute_with_late(&mut self, batch: Vec<(Durability, Work)>) {
        let late = std::mem::take(&mut *lock(&self.late));
        let late = late.into_iter().map(|work| (Durability::Soon, work));
        let mut all: Vec<_> = late.chain(batch).collect();
        while !all.is_empty() {
            let rest = all.split_off(all.len().min(BATCH_MAX));
            self.execute(all);
            all = rest;
        }
    }

    fn execute(&mut self, batch: Vec<(Durability, Work)>) {
        let mut replies = Vec::with_capacity(batch.len());
        let committed = self.transaction(batch, &mut replies);
        if committed.is_ok() {
            self.unsynced_since.get_or_insert_with(Instant::now);
        }
        let mut now = Vec::new();
        for (durability, reply) in replies {
            match (durability, &committed) {
                (Durability::Now, Ok(())) => now.push(reply),
                (Durability::Now, Err(_)) | (Durability::Soon, _) => reply(committed.clone()),
            }
        }
        if !now.is_empty() {
            // All that was committed before goes to the disk with it.
            self.unsynced_since = None;
            self.syncer.ask(SyncAsk::Now(now));
        }
        self.folder.after_commit(&self.connection);
    }

    fn transaction(
        &self,
        batch: Vec<(Durability, Work)>,
        replies: &mut Vec<(Durability, Reply)>,
    ) -> Result<(), StoreError> {
        let mut failed = self.statement("BEGIN IMMEDIATE").err();
        // A request that is alone is undone with its transaction.
        let alone = batch.len() == 1;
        for (durability, work) in batch {
            if failed.is_none() && !alone {
                failed = self.statement("SAVEPOINT request").err();
            }
            let (result, reply) = work(failed.clone().map_or(Ok(&self.connection), Err));
            replies.push((durability, reply));
            if failed.is_some() {
                continue;
            }
            let ended = if self.connection.is_autocommit() {
                // SQLite rolled the whole transaction back (no space, I/O error).
                Err(result.err().unwrap_or(StoreError::Full))
            } else if alone {
                result
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

    /// Has all commits so far synced, without waiting; but where the disk has not finished the sync before, this
    /// waits for it, so that what a power loss takes stays bounded.
    fn sync_later(&mut self) {
        if self.unsynced_since.take().is_some() {
            self.syncer.wait_for_later();
            let (done, under_way) = sync_channel(1);
            self.syncer.under_way = Some(under_way);
            self.syncer.ask(SyncAsk::Later(done));
        }
    }

    /// The same, and waits for it.
    fn last_sync(&mut self) -> Result<(), StoreError> {
        self.syncer.wait_for_later();
        if self.unsynced_since.take().is_none() {
            return Ok(());
        }
        let (done, answer) = sync_channel(1);
        self.syncer.ask(SyncAsk::Now(vec![Box::new(move |synced| {
            let _ = done.send(synced);
        })]));
        answer.recv().unwrap_or(Err(StoreError::Closed))
    }
}

/// What the syncer is to do.
enum SyncAsk {
    /// Sync, then reply. No more of them wait than requests may.
    Now(Vec<Reply>),
    /// Sync, then let the writer know.
    Later(SyncSender<()>),
}

/// The thread that waits for the disk. A sync covers all that was committed before it was asked for.
struct Syncer {
    asks: Option<Sender<SyncAsk>>,
    thread: Option<JoinHandle<()>>,
    /// The last [`SyncAsk::Later`]: disconnected once it is done.
    under_way: Option<Receiver<()>>,
}

impl Syncer {
    fn start(wal: File) -> std::io::Result<Self> {
        let (asks, inbox) = channel::<SyncAsk>();
        let body = move || {
            while let Ok(first) = inbox.recv() {
                // One sync for all that wait.
                let waiting: Vec<SyncAsk> = std::iter::once(first).chain(inbox.try_iter()).collect();
                let path = Path::new("the log of the store");
                let synced = wal.sync_data().map_err(|error| StoreError::io("sync", path, &error));
                if let Err(error) = &synced {
                    tracing::error!(%error, "committed rows may not survive a power loss");
                }
                for ask in waiting {
                    match ask {
                        SyncAsk::Now(replies) => replies.into_iter().for_each(|reply| reply(synced.clone())),
                        SyncAsk::Later(done) => drop(done),
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("hotcell-sync".to_owned()).spawn(body)?;
        Ok(Self { asks: Some(asks), thread: Some(thread), under_way: None })
    }

    fn ask(&self, sync: SyncAsk) {
        let refused = match &self.asks {
            Some(asks) => asks.send(sync).err().map(|refused| refused.0),
            None => Some(sync),
        };
        // The thread is gone, which it never is while there is a writer.
        if let Some(SyncAsk::Now(replies)) = refused {
            replies.into_iter().for_each(|reply| reply(Err(StoreError::Closed)));
        }
    }

    fn wait_for_later(&mut self) {
        if let Some(under_way) = self.under_way.take() {
            // Nothing is ever sent: it ends with the sync.
            let _ = under_way.recv();
        }
    }

    /// Ends the thread after all that it was asked for.
    fn finish(&mut self) -> Result<(), StoreError> {
        self.asks = None;
        self.thread.take().map_or(Ok(()), |thread| thread.join().map_err(|_| StoreError::Closed))
    }
}
