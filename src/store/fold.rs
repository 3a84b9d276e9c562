//! Folds the write-ahead log into the database, on a thread and a connection of its own: what is long about it, the
//! disk, must hold up no request. The log begins anew only when a writer finds all of it folded, so where writes
//! never pause the writer's thread folds the last few pages itself; and where the disk cannot follow, requests wait for
//! it: the log has a limit. It must never lose a commit: SQLite syncs the log before it folds.

use std::cell::Cell;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rusqlite::Connection;

use super::{StoreError, schema};

/// Pages of the log from one folding to the next.
const PAGES: u32 = 1_000;
/// From here on the writer folds what is left, where the thread has done its part.
const PAGES_LONG: u32 = 4_000;
/// From here on nothing is written before the thread has done its part and the writer the rest: 24 MiB.
const PAGES_MAX: u32 = 6_000;

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
    /// Who has it folds: SQLite lets only one, and the other would do nothing.
    turn: Arc<Mutex<()>>,
    due: Due,
    /// How long the log was when the writer last waited. A reader may have kept it from beginning anew.
    pages_waited: u32,
}

/// Whether the writer's thread is to fold.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Due {
    No,
    /// Where the folding thread is not at it.
    Soon,
    /// Before anything else is written.
    Now,
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
        let turn = Arc::new(Mutex::new(()));
        let own_turn = Arc::clone(&turn);
        let body = move || {
            while inbox.recv().is_ok() {
                let _turn = own_turn.lock().unwrap_or_else(PoisonError::into_inner);
                fold(&own);
                done.store(true, Ordering::Release);
            }
        };
        let thread = std::thread::Builder::new().name("hotcell-fold".to_owned()).spawn(body);
        let thread = thread.map_err(|error| StoreError::io("start the folder of", file, &error))?;
        let (asks, thread) = (Some(asks), Some(thread));
        Ok(Self { asks, thread, pages_asked: 0, folded, turn, due: Due::No, pages_waited: 0 })
    }

    /// To be called after each commit, on the thread that made it.
    pub(super) fn after_commit(&mut self) {
        let pages = LOG_PAGES.get();
        if pages < self.pages_asked {
            // The log has begun anew.
            (self.pages_asked, self.pages_waited) = (0, 0);
        }
        if pages >= PAGES_MAX.max(self.pages_waited + PAGES) {
            self.pages_waited = pages;
            self.due = Due::Now;
        } else if self.due == Due::No && pages >= PAGES_LONG && self.folded.swap(false, Ordering::Acquire) {
            self.due = Due::Soon;
        }
        if pages >= self.pages_asked + PAGES {
            self.pages_asked = pages;
            // Where one waits already this one is not needed.
            let _ = self.asks.as_ref().map(|asks| asks.try_send(()));
        }
    }

    /// Whether the writer's thread is to fold.
    pub(super) fn is_due(&self) -> bool {
        self.due != Due::No
    }

    /// Whether it is to fold before anything else is written.
    pub(super) fn is_overdue(&self) -> bool {
        self.due == Due::Now
    }

    /// Folds what is left, where that is the writer's turn: on its thread, since it waits for the disk.
    pub(super) fn fold_if_due(&mut self, connection: &Connection) {
        let _turn = match std::mem::replace(&mut self.due, Due::No) {
            Due::No => return,
            Due::Soon => match self.turn.try_lock() {
                Ok(turn) => turn,
                Err(_) => return,
            },
            Due::Now => self.turn.lock().unwrap_or_else(PoisonError::into_inner),
        };
        fold(connection);
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
