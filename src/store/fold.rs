//! Folds the write-ahead log into the database, on a thread and a connection of its own: what is long about it, the
//! disk, must hold up no request. The log begins anew only when a writer finds all of it folded, so where writes
//! never pause the writer's thread folds the last few pages itself. It must never lose a commit: SQLite syncs the log
//! before it folds.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use rusqlite::Connection;

use super::{StoreError, schema};

/// Pages of the log from one folding to the next.
const PAGES: u32 = 1_000;
/// From here on the writer folds what is left.
const PAGES_MAX: u32 = 4_000;

thread_local! {
    /// Pages in the log after the last commit of this thread.
    static LOG_PAGES: Cell<u32> = const { Cell::new(0) };
}

/// The folding thread, as the writer sees it.
pub(super) struct Folder {
    asks: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
    /// How long the log was when the thread was asked.
    pages_asked: u32,
    /// The thread came to its end since the writer looked: little is left to fold.
    folded: Arc<AtomicBool>,
    /// The writer is to fold what is left.
    due: bool,
}

impl Folder {
    /// Starts the thread. `connection` is the writer's: it does not fold by itself any more.
    pub(super) fn start(connection: &Connection, file: &Path) -> Result<Self, StoreError> {
        connection.wal_hook(Some(|_, pages| {
            LOG_PAGES.set(u32::try_from(pages).unwrap_or(0));
            Ok(())
        }));
        let own = schema::open_folder(file)?;
        let folded = Arc::new(AtomicBool::new(false));
        let (asks, inbox) = sync_channel(1);
        let done = Arc::clone(&folded);
        let body = move || {
            while inbox.recv().is_ok() {
                fold(&own);
                done.store(true, Ordering::Release);
            }
        };
        let thread = std::thread::Builder::new().name("hotcell-fold".to_owned()).spawn(body);
        let thread = thread.map_err(|error| StoreError::io("start the folder of", file, &error))?;
        Ok(Self { asks: Some(asks), thread: Some(thread), pages_asked: 0, folded, due: false })
    }

    /// To be called after each commit, on the thread that made it.
    pub(super) fn after_commit(&mut self) {
        let pages = LOG_PAGES.get();
        if pages < self.pages_asked {
            // The log has begun anew.
            self.pages_asked = 0;
        }
        self.due |= pages >= PAGES_MAX && self.folded.swap(false, Ordering::Acquire);
        if pages >= self.pages_asked + PAGES {
            self.pages_asked = pages;
            // Where one waits already this one is not needed.
            let _ = self.asks.as_ref().map(|asks| asks.try_send(()));
        }
    }

    /// Whether the writer's thread is to fold.
    pub(super) fn is_due(&self) -> bool {
        self.due
    }

    /// Folds what is left, where that is the writer's turn: on its thread, since it waits for the disk.
    pub(super) fn fold_if_due(&mut self, connection: &Connection) {
        if std::mem::take(&mut self.due) {
            fold(connection);
        }
    }

    /// Ends the thread; its connection is closed then.
    pub(super) fn finish(&mut self) -> Result<(), StoreError> {
        self.asks = None;
        self.thread.take().map_or(Ok(()), |thread| thread.join().map_err(|_| StoreError::Closed))
    }
}

/// Folds as much as can be without waiting for anybody; where another connection folds, nothing.
fn fold(connection: &Connection) {
    let folded = connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
    if let Err(error) = folded {
        tracing::warn!(%error, "the log of the store cannot be folded into it: it grows");
    }
}
