//! How the loop ends: it drains, stops what runs, or lets go of it. A detach must never stop, revoke or collect
//! anything: what it leaves is what a kill leaves, but for requests for the model, which may end.

use std::time::Duration;

use super::{Driver, How, Shutdown, wish};
use crate::cell::Parts;
use crate::job::{JobId, JobSpec, State, StopReason};
use crate::store::StoreError;

/// Time for jobs to end after a drain turned into a stop, beside the grace that agents get.
const STOP_SLACK: Duration = Duration::from_secs(30);
/// How long a detach waits for requests for the model that are under way, and for jobs without a cell that are being
/// ended.
const DETACH_MAX: Duration = Duration::from_secs(10);

impl Driver {
    /// Ends as `shutdown` says, from `how` on.
    pub(super) async fn end(&mut self, mut how: How, shutdown: &Shutdown) {
        if how == How::Drain {
            how = self.drain(shutdown).await;
        }
        if how == How::Now {
            how = self.stop_all(shutdown).await;
        }
        match how {
            How::Drain | How::Now => {}
            How::Detach | How::Leave => self.detach(how, shutdown).await,
        }
    }

    fn is_idle(&self) -> bool {
        self.tasks.is_empty() && self.endings.is_empty()
    }

    /// Running jobs may end. Gives what is to be done about those that did not.
    async fn drain(&mut self, shutdown: &Shutdown) -> How {
        tracing::info!(running = self.tasks.len(), "draining");
        let deadline = tokio::time::Instant::now() + self.drain_max;
        while !self.is_idle() {
            tokio::select! {
                Some(ended) = self.tasks.join_next_with_id() => self.on_end(ended),
                back = self.endings.next() => self.give_back(back),
                Some(message) = self.inbox.recv() => self.on_message(message).await,
                () = tokio::time::sleep_until(deadline) => return How::Now,
                how = shutdown.beyond(How::Drain) => return how,
            }
        }
        How::Drain
    }

    /// Running jobs are stopped. Gives the more urgent word that may come meanwhile.
    async fn stop_all(&mut self, shutdown: &Shutdown) -> How {
        for stop in self.stops.values() {
            wish(stop, StopReason::Drain, "the daemon is going down");
        }
        let slack = self.parts.settings.cancel_grace + STOP_SLACK;
        let deadline = tokio::time::Instant::now() + slack;
        while !self.is_idle() {
            tokio::select! {
                Some(ended) = self.tasks.join_next_with_id() => self.on_end(ended),
                back = self.endings.next() => self.give_back(back),
                how = shutdown.beyond(How::Now) => return how,
                () = tokio::time::sleep_until(deadline) => {
                    tracing::error!(left = self.tasks.len(), "jobs did not end in time; the next daemon takes them up");
                    self.tasks.shutdown().await;
                    self.endings.abandon().await;
                }
            }
        }
        How::Now
    }

    /// Lets go of the jobs: nothing of them is stopped, revoked or collected, and the next daemon takes them up as
    /// after a kill. Before, no request for the model goes out any more, and those under way may end, for
    /// [`DETACH_MAX`].
    async fn detach(&mut self, how: How, shutdown: &Shutdown) {
        tracing::info!(running = self.tasks.len(), "detaching: cells go on, the next daemon takes them up");
        match attended(&self.parts).await {
            Ok(lost) if lost.is_empty() => {}
            Ok(lost) => {
                tracing::warn!(jobs = ?lost, "the commands of these jobs end: their clients lose the connection");
            }
            Err(error) => tracing::warn!(%error, "cannot tell which commands end with their clients"),
        }
        let gateway = self.parts.gateway.clone();
        gateway.close();
        let mut quiet = std::pin::pin!(gateway.settled());
        let mut answered = false;
        let deadline = tokio::time::Instant::now() + DETACH_MAX;
        while how == How::Detach && !(answered && self.endings.is_empty()) {
            tokio::select! {
                () = &mut quiet, if !answered => answered = true,
                Some(ended) = self.tasks.join_next_with_id() => self.on_end(ended),
                back = self.endings.next() => self.give_back(back),
                Some(message) = self.inbox.recv() => self.on_message(message).await,
                () = tokio::time::sleep_until(deadline) => {
                    tracing::warn!("requests under way are charged in full by the next daemon");
                    break;
                }
                _ = shutdown.beyond(How::Detach) => break,
            }
        }
        // What they had begun is whole or is put right at the next start, as after a kill.
        self.tasks.shutdown().await;
        self.endings.abandon().await;
    }
}

/// Jobs that a restart of the daemon ends: their commands run for a client, whose connection goes with the daemon.
///
/// # Errors
/// [`StoreError`].
pub async fn attended(parts: &Parts) -> Result<Vec<JobId>, StoreError> {
    let mut found = Vec::new();
    for open in parts.store.open_jobs().await? {
        // Before `Running` it is only begun anew.
        if open.state != State::Running {
            continue;
        }
        let job = parts.store.job(&open.id).await?;
        let spec = job.and_then(|job| serde_json::from_str::<JobSpec>(&job.spec_json).ok());
        if spec.is_some_and(|spec| spec.command.is_some()) {
            found.push(open.id);
        }
    }
    Ok(found)
}
