//! The writer: requests in order, those that wait together in one transaction (each in its own savepoint), and only
//! then the replies. Who hands in a request that need not be on the disk does the work for all that wait, where nobody
//! else is at it: two switches of threads cost more than the transaction. What must be on the disk, what is late and
//! what the disk makes long wakes the writer's own thread; `fdatasync` is on another, which replies to those that asked
//! for it. Nobody else waits for the disk, unless it is still at one sync when the next is due. What nobody waits for is
//! put where the next request takes it along.
//!
//! It must never reply before the commit, never to who asked for a sync before the sync, never keep a caller's thread
//! for longer than two batches, and never let one request's failure take another's work along.

use std::collections::VecDeque;
use std::fs::File;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::fold::Folder;
use super::{SYNC_DELAY_MS, StoreError, lock};
use crate::failpoint;

/// Requests per transaction.
const BATCH_MAX: usize = 64;
/// Batches that a caller does for others, one after another.
const CALLERS_BATCHES: u32 = 2;
/// A caller whose batch took longer than this met a slow disk: for [`SLOW_REST`] all is left to the thread.
const SLOW: Duration = Duration::from_millis(5);
const SLOW_REST: Duration = Duration::from_secs(1);

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
type Batch = Vec<(Durability, Work)>;

/// Requests that wait, in the order in which they came. Its lock is never held while one is done.
#[derive(Default)]
struct Queue {
    requests: VecDeque<(Durability, Work)>,
    /// At least one of them is not for the next one to take along.
    urgent: bool,
    /// The thread is to look.
    rung: bool,
    /// Commits are to be synced then.
    sync_at: Option<Instant>,
    slow_until: Option<Instant>,
    closing: bool,
    /// Nobody takes requests any more.
    gone: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    bell: Condvar,
    /// None once it is closed. Taken before the queue, where both are.
    books: Mutex<Option<Books>>,
}

/// The writer, seen from outside.
pub(super) struct Writer {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<Result<(), StoreError>>>>,
}

impl Writer {
    /// Starts the thread; `file_lock` is held until the connection is closed.
    pub(super) fn start(connection: Connection, file: &Path, file_lock: File) -> Result<Self, StoreError> {
        // SQLite keeps its own locks on the database and the shared memory, not on the log: a second
        // descriptor of the log may be opened and closed without dropping them.
        let wal_path = file.with_file_name(format!("{}-wal", super::FILE_NAME));
        let wal = File::open(&wal_path).map_err(|error| StoreError::io("open", &wal_path, &error))?;
        let syncer =
            Syncer::start(wal).map_err(|error| StoreError::io("start the syncer of", file, &error))?;
        let folder = Folder::start(&connection, file)?;
        let books = Books { connection, syncer, folder, unsynced: false };
        let (queue, bell) = (Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { queue, bell, books: Mutex::new(Some(books)) });
        let threads = Arc::clone(&shared);
        let body = move || {
            let result = threads.serve();
            // No reply may be owed any more when the lock is let go.
            drop(file_lock);
            result
        };
        let thread = std::thread::Builder::new().name("hotcell-store".to_owned()).spawn(body);
        let thread = thread.map_err(|error| StoreError::io("start the writer of", file, &error))?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Hands in a request that must be on the disk; `reply` is called once, after commit and sync, on a thread that
    /// must not be held up.
    pub(super) fn send<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
        reply: impl FnOnce(Result<T, StoreError>) + Send + 'static,
    ) -> Result<(), StoreError> {
        lock(&self.shared.queue).push(Durability::Now, boxed(work, reply))?;
        self.shared.ring();
        Ok(())
    }

    /// Puts a request where the next one takes it along, without waking the thread. Durability: [`Durability::Soon`];
    /// `reply` as above, maybe on the thread of [`Put::here`].
    pub(super) fn put<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
        reply: impl FnOnce(Result<T, StoreError>) + Send + 'static,
    ) -> Result<Put<'_>, StoreError> {
        lock(&self.shared.queue).push(Durability::Soon, boxed(work, reply))?;
        Ok(Put { writer: self, waits: true })
    }

    /// Ends the thread after the requests handed in so far. Blocks.
    pub(super) fn close(&self) -> Result<(), StoreError> {
        lock(&self.shared.queue).closing = true;
        self.shared.ring();
        let thread = lock(&self.thread).take();
        thread.map_or(Ok(()), |thread| thread.join().unwrap_or(Err(StoreError::Closed)))
    }
}

/// A request that waits for the next one. Dropped before it was done it wakes the thread, so that nothing is left
/// behind by who goes away or panics.
pub(super) struct Put<'a> {
    writer: &'a Writer,
    waits: bool,
}

impl Put<'_> {
    /// Has it done by the thread.
    pub(super) fn nudge(self) {
        drop(self);
    }

    /// Does it, and all that waits besides, on this thread where that is as well.
    pub(super) fn here(mut self) {
        self.waits = !self.writer.shared.work_here();
    }

    /// It was answered.
    pub(super) fn done(mut self) {
        self.waits = false;
    }
}

impl Drop for Put<'_> {
    fn drop(&mut self) {
        if self.waits {
            self.writer.shared.ring();
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

impl Queue {
    fn push(&mut self, durability: Durability, work: Work) -> Result<(), StoreError> {
        if self.gone {
            return Err(StoreError::Closed);
        }
        self.requests.push_back((durability, work));
        Ok(())
    }

    fn take(&mut self) -> Batch {
        let count = self.requests.len().min(BATCH_MAX);
        let batch = self.requests.drain(..count).collect();
        self.urgent &= !self.requests.is_empty();
        batch
    }
}

impl Shared {
    /// Has the thread look at all that waits.
    fn ring(&self) {
        lock(&self.queue).rung = true;
        self.bell.notify_one();
    }

    /// Does what waits, on the caller's thread; false where it must be left to the writer's.
    fn work_here(&self) -> bool {
        {
            let mut queue = lock(&self.queue);
            if queue.slow_until.is_some_and(|until| Instant::now() < until) {
                return false;
            }
            queue.urgent |= !queue.requests.is_empty();
        }
        for _ in 0..CALLERS_BATCHES {
            let mut books = match self.books.try_lock() {
                Ok(books) => books,
                // Who has it looks again at what waits when they are done.
                Err(TryLockError::WouldBlock) => return true,
                // A panic in the middle of a transaction: nothing may be written after it.
                Err(TryLockError::Poisoned(_)) => return false,
            };
            let Some(open) = books.as_mut() else { return false };
            if open.folder.is_overdue() {
                return false;
            }
            let batch = lock(&self.queue).take();
            let begun = Instant::now();
            let first = open.execute(batch);
            let fold = open.folder.is_due();
            drop(books);
            let slow = begun.elapsed() > SLOW;
            let mut queue = lock(&self.queue);
            self.sync_soon(&mut queue, first);
            if slow {
                queue.slow_until = Some(Instant::now() + SLOW_REST);
            }
            if slow || fold {
                return false;
            }
            if !queue.urgent {
                return true;
            }
        }
        false
    }

    /// `first`: a commit since the last sync, where none was before.
    fn sync_soon(&self, queue: &mut Queue, first: bool) {
        if first {
            queue.sync_at = Some(Instant::now() + Duration::from_millis(SYNC_DELAY_MS));
            // Its wait has an end now.
            self.bell.notify_one();
        }
    }

    /// The thread.
    fn serve(&self) -> Result<(), StoreError> {
        loop {
            let (closing, sync) = self.wait();
            let mut books = match self.books.lock() {
                Ok(books) => books,
                // See `work_here`. The transaction is rolled back with its connection.
                Err(poisoned) => {
                    self.refuse_all();
                    let broken = poisoned.into_inner().take();
                    drop(broken);
                    return Err(StoreError::Closed);
                }
            };
            let Some(open) = books.as_mut() else { return Ok(()) };
            open.folder.fold_if_due(&open.connection);
            loop {
                let batch = lock(&self.queue).take();
                if batch.is_empty() {
                    break;
                }
                let first = open.execute(batch);
                open.folder.fold_if_due(&open.connection);
                self.sync_soon(&mut lock(&self.queue), first);
            }
            if sync {
                open.sync_later();
            }
            if closing {
                self.refuse_all();
                let mut open = books.take();
                return open.as_mut().map_or(Ok(()), Books::close);
            }
        }
    }

    /// Waits for something to do: whether that is to close, and whether commits are to be synced.
    fn wait(&self) -> (bool, bool) {
        let mut queue = lock(&self.queue);
        loop {
            let now = Instant::now();
            let due = queue.sync_at.is_some_and(|at| at <= now);
            if queue.rung || queue.urgent || queue.closing || due {
                queue.rung = false;
                if due {
                    queue.sync_at = None;
                }
                return (queue.closing, due);
            }
            queue = match queue.sync_at {
                None => self.bell.wait(queue).unwrap_or_else(PoisonError::into_inner),
                Some(at) => {
                    let waited = self.bell.wait_timeout(queue, at - now);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// What nobody takes any more is answered by being dropped; what comes later is refused.
    fn refuse_all(&self) {
        let left = {
            let mut queue = lock(&self.queue);
            queue.gone = true;
            std::mem::take(&mut queue.requests)
        };
        drop(left);
    }
}

/// The connection, and what its commits need.
struct Books {
    connection: Connection,
    syncer: Syncer,
    folder: Folder,
    /// A commit is on nobody's way to the disk.
    unsynced: bool,
}

impl Books {
    /// Does a batch; true where nothing was to be synced before, and now is.
    fn execute(&mut self, batch: Batch) -> bool {
        if batch.is_empty() {
            return false;
        }
        failpoint::pass("store: before a transaction");
        let mut replies = Vec::with_capacity(batch.len());
        let committed = self.transaction(batch, &mut replies);
        failpoint::pass("store: after a transaction");
        let first = committed.is_ok() && !self.unsynced;
        self.unsynced |= committed.is_ok();
        let mut now = Vec::new();
        for (durability, reply) in replies {
            match (durability, &committed) {
                (Durability::Now, Ok(())) => now.push(reply),
                (Durability::Now, Err(_)) | (Durability::Soon, _) => reply(committed.clone()),
            }
        }
        let all_now = !now.is_empty();
        if all_now {
            // All that was committed before goes to the disk with it.
            self.unsynced = false;
            self.syncer.ask(SyncAsk::Now(now));
        }
        self.folder.after_commit();
        first && !all_now
    }

    fn transaction(&self, batch: Batch, replies: &mut Vec<(Durability, Reply)>) -> Result<(), StoreError> {
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
        if std::mem::take(&mut self.unsynced) {
            self.syncer.wait_for_later();
            let (done, under_way) = sync_channel(1);
            self.syncer.under_way = Some(under_way);
            self.syncer.ask(SyncAsk::Later(done));
        }
    }

    /// The last sync, and the end of the other threads.
    fn close(&mut self) -> Result<(), StoreError> {
        self.last_sync().and(self.syncer.finish()).and(self.folder.finish())
    }

    fn last_sync(&mut self) -> Result<(), StoreError> {
        self.syncer.wait_for_later();
        if !std::mem::take(&mut self.unsynced) {
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

#[cfg(test)]
mod tests {
    use super::super::Store;
    use super::*;

    const NOTE: &str = "INSERT INTO meta (key, value) VALUES ('note', '1')";

    async fn noted(store: &Store) -> bool {
        let sql = "SELECT count(*) FROM meta WHERE key = 'note'";
        let count = store.read(|db| Ok(db.query_row(sql, [], |row| row.get::<_, u32>(0))?)).await;
        count.unwrap() == 1
    }

    #[tokio::test]
    async fn who_asks_and_leaves_before_it_is_done_is_served_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).await.unwrap();
        let mut asking = Box::pin(store.write(Durability::Soon, |db| Ok(db.execute(NOTE, [])?)));
        assert!(futures_util::poll!(&mut asking).is_pending(), "others may ask first");
        assert!(!noted(&store).await);
        drop(asking);
        let give_up = Instant::now() + Duration::from_secs(20);
        while !noted(&store).await {
            assert!(Instant::now() < give_up, "nobody does it");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        store.close().await.unwrap();
    }

    #[tokio::test]
    async fn who_waits_for_a_transaction_that_panics_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).await.unwrap();
        let (reply, answer) = tokio::sync::oneshot::channel::<Result<usize, StoreError>>();
        let (asking, waiting) = (store.clone(), store.clone());
        let asked = tokio::spawn(async move {
            let work = move |_: &Connection| -> Result<(), StoreError> {
                let later = |db: &Connection| Ok(db.execute(NOTE, [])?);
                let put = waiting.inner.writer.put(later, move |result| drop(reply.send(result)))?;
                // It is left to who is at it: to this transaction.
                put.here();
                panic!("in a transaction");
            };
            asking.write(Durability::Soon, work).await
        });
        assert!(asked.await.unwrap_err().is_panic());
        let answer = tokio::time::timeout(Duration::from_secs(20), answer).await;
        assert!(answer.expect("nobody refuses it").is_err(), "dropped, which means closed");
        assert_eq!(store.close().await, Err(StoreError::Closed));
    }

    #[tokio::test]
    async fn after_a_panic_in_a_transaction_nothing_is_written_and_all_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).await.unwrap();
        let asking = store.clone();
        let asked = tokio::spawn(async move {
            let work = |db: &Connection| -> Result<(), StoreError> {
                db.execute(NOTE, [])?;
                panic!("in a transaction");
            };
            asking.write(Durability::Soon, work).await
        });
        assert!(asked.await.unwrap_err().is_panic());
        for durability in [Durability::Soon, Durability::Now] {
            let refused = store.write(durability, |db| Ok(db.execute(NOTE, [])?)).await;
            assert_eq!(refused, Err(StoreError::Closed));
        }
        assert_eq!(store.close().await, Err(StoreError::Closed), "its end is not silent");
        let store = Store::open(dir.path()).await.unwrap();
        assert!(!noted(&store).await, "half a transaction is none");
        store.close().await.unwrap();
    }
}
