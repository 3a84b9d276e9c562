//! Where a client that takes part in a command meets the cell in which it runs. Each side may come first, and each may
//! leave: the other one sees that its channel is closed. It must never let two clients into one command.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::{Notify, mpsc};
use tokio_util::task::TaskTracker;

use crate::job::JobId;

/// Messages that wait in each direction; of output and input each holds at most what the link or the socket gave.
const MESSAGES_MAX: usize = 8;

/// What a cell says to the client of its command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToClient {
    /// Bytes of its standard output, or of its terminal.
    Stdout(Bytes),
    /// Bytes of its standard error.
    Stderr(Bytes),
    /// It ended: its exit code, 128 + n for signal n.
    Exit(i32),
}

/// What a client says to its command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromClient {
    /// Bytes for its standard input.
    Stdin(Bytes),
    /// There is no more input.
    Eof,
    /// Its terminal has another size.
    Resize {
        /// Lines.
        rows: u16,
        /// Characters of a line.
        cols: u16,
    },
    /// A signal for it.
    Signal(i32),
}

/// The cell's end.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) to: mpsc::Sender<ToClient>,
    pub(super) from: mpsc::Receiver<FromClient>,
}

/// The client's end.
#[derive(Debug)]
pub struct Client {
    /// What the cell says; closed when it says no more.
    pub from: mpsc::Receiver<ToClient>,
    /// What the client says; closing it means that the client has left.
    pub to: mpsc::Sender<FromClient>,
}

/// Clients and the commands that they wait for.
#[derive(Debug, Default)]
pub struct Attachments {
    /// None: a client was there.
    jobs: Mutex<HashMap<JobId, Option<Attached>>>,
    came: Notify,
    /// Those that carry what both sides say.
    pub tasks: TaskTracker,
}

impl Attachments {
    /// Takes part in the command of a job; `None` where somebody does or did.
    pub fn offer(&self, job: &JobId) -> Option<Client> {
        let (to, from_cell) = mpsc::channel(MESSAGES_MAX);
        let (to_cell, from) = mpsc::channel(MESSAGES_MAX);
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if jobs.contains_key(job) {
            return None;
        }
        jobs.insert(job.clone(), Some(Attached { to, from }));
        drop(jobs);
        self.came.notify_waiters();
        Some(Client { from: from_cell, to: to_cell })
    }

    /// The client of a job's command, once there is one. Cancel-safe.
    pub(super) async fn take(&self, job: &JobId) -> Attached {
        loop {
            let mut came = std::pin::pin!(self.came.notified());
            came.as_mut().enable();
            let waiting =
                self.jobs.lock().unwrap_or_else(PoisonError::into_inner).get_mut(job).map(Option::take);
            if let Some(Some(attached)) = waiting {
                return attached;
            }
            came.await;
        }
    }

    /// The job is over: a client that nobody took hears of it.
    pub fn close(&self, job: &JobId) {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).remove(job);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_comes_first_waits_and_nobody_comes_second() {
        let (attachments, job) = (Attachments::default(), JobId::new(1, 1));
        let (mut attached, client) = tokio::join!(attachments.take(&job), async {
            tokio::task::yield_now().await;
            attachments.offer(&job)
        });
        let client = client.expect("the first one");
        assert!(attachments.offer(&job).is_none(), "one client");
        client.to.send(FromClient::Eof).await.unwrap();
        assert_eq!(attached.from.recv().await, Some(FromClient::Eof));
        drop(client);
        assert_eq!(attached.from.recv().await, None, "it has left");
        attachments.close(&job);
        let mut waiting = attachments.offer(&job).expect("another job's life");
        attachments.close(&job);
        assert_eq!(waiting.from.recv().await, None, "nobody will come");
    }
}
