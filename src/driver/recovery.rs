//! What the loop does before it runs: the plan of [`recover::plan`] over what an earlier daemon left. It must never
//! start a job that a pause holds.

use std::collections::HashMap;

use super::Driver;
use crate::cell::record::{Record, RecordError};
use crate::cell::{self, Start};
use crate::engine::{ContainerId, EngineError};
use crate::job::{CellId, Input as Move, JobId, ParkReason, State};
use crate::scheduler::recover::{self, FoundCell};
use crate::scheduler::{Input, Ticket};
use crate::store::StoreError;

/// Why a restart could not be planned.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl Driver {
    /// Takes up what an earlier daemon left, by the plan of [`recover::plan`].
    ///
    /// # Errors
    /// When the store cannot be read, or the engine does not answer: then nothing was done.
    pub async fn recover(&mut self) -> Result<(), RecoverError> {
        self.paused(self.parts.store.paused().await?.is_some());
        let (mut rows, mut tickets) = (Vec::new(), HashMap::new());
        for open in self.parts.store.open_jobs().await? {
            let cell = match open.state {
                State::Queued => None,
                // No arm for each: whatever state a row is in, it may have a cell that is not gone.
                _ => self
                    .parts
                    .store
                    .cell_of(&open.id)
                    .await?
                    .filter(|row| row.gone_ms.is_none())
                    .map(|row| row.cell),
            };
            let provider = open.provider.unwrap_or_else(|| self.parts.gateway.default_provider().to_owned());
            let credential = self.parts.gateway.limited_with(&provider, &open.model);
            let ticket = match &open.limits {
                Some(limits) => Ticket::new(open.uid, open.priority, credential, &open.policy, limits),
                // A plan that cannot be read: the job's start says so.
                None => Ticket::bare(open.uid, open.priority, credential),
            };
            if let State::Parked { parked } = &open.state
                && parked.why == ParkReason::ProviderLimit
            {
                self.parts.pauses.note(&ticket.credential, parked.until_ms);
            }
            tickets.insert(open.id.clone(), ticket);
            rows.push(recover::Row { job: open.id, state: open.state, cell });
        }
        let found = self.parts.engine.list(self.parts.store.instance()).await?;
        let found: Vec<FoundCell> = found
            .into_iter()
            .map(|f| FoundCell {
                cell: f.cell,
                container: f.container.as_str().to_owned(),
                running: f.running,
            })
            .collect();
        for action in recover::plan(&rows, &found) {
            let job = match action {
                recover::Action::Reap { container } => {
                    self.reap(&container).await;
                    continue;
                }
                recover::Action::Requeue { ref job }
                | recover::Action::Adopt { ref job, .. }
                | recover::Action::Park { ref job, .. }
                | recover::Action::Close { ref job } => job.clone(),
            };
            let Some(ticket) = tickets.remove(&job) else { continue };
            match action {
                recover::Action::Requeue { .. } => self.requeue(job, ticket).await,
                recover::Action::Adopt { cell, container, .. } => self.adopt(job, ticket, cell, &container),
                recover::Action::Park { until_ms, .. } => self.park(job, ticket, until_ms).await,
                recover::Action::Close { .. } => self.close(job, ticket),
                recover::Action::Reap { .. } => {}
            }
        }
        Ok(())
    }

    async fn reap(&self, container: &str) {
        let container = ContainerId::new(container.to_owned());
        if let Err(error) = self.parts.engine.remove(&container).await {
            tracing::warn!(%container, %error, "a container that no job owns is left; the sweeper goes on");
            return;
        }
        self.parts.metrics.reaped(crate::metrics::Orphan::Container, 1);
        tracing::info!(%container, "removed a container that no job owns");
    }

    /// One job whose record is damaged must not keep the daemon from starting: it goes the way of a lost one.
    async fn requeue(&mut self, job: JobId, ticket: Ticket) {
        self.remove_cells(&job).await;
        if let Err(error) = self.requeue_record(&job).await {
            tracing::error!(%job, %error, "cannot queue a job again; closing it");
            self.close(job, ticket);
            return;
        }
        self.step(Input::Submitted { job, ticket });
    }

    /// One try: what is left has its row, and is tried again at the job's end.
    async fn remove_cells(&self, job: &JobId) {
        if let Err(left) = cell::destroy_once(&self.parts, job).await {
            tracing::warn!(%job, %left, "something of a cell is left");
        }
    }

    async fn requeue_record(&self, job: &JobId) -> Result<(), RecordError> {
        let mut record = Record::open(&self.parts, job).await?;
        let moved = match record.state() {
            State::Preparing => record.step(&self.parts, Move::Requeue).await,
            _ => Ok(()),
        };
        record.finish(&self.parts);
        moved
    }

    async fn park(&mut self, job: JobId, ticket: Ticket, until_ms: u64) {
        self.remove_cells(&job).await;
        self.step(Input::Parked { job, ticket, until_ms, limited: false });
    }

    fn close(&mut self, job: JobId, ticket: Ticket) {
        self.step(Input::Adopted { job: job.clone(), ticket });
        self.start(job, Start::Close);
    }

    fn adopt(&mut self, job: JobId, ticket: Ticket, cell: CellId, container: &str) {
        self.step(Input::Adopted { job: job.clone(), ticket });
        let container = ContainerId::new(container);
        self.start(job, Start::Adopt { cell, container });
    }
}
