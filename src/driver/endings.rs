//! Jobs that are ended while they have no cell, each by a task of its own: what one changed is taken out of its kept
//! copy, which can take long, and no other job waits for that. While it is ended a job is not the scheduler's; what
//! could not be ended is given back to it.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::task::{Id, JoinSet};

use super::StopError;
use crate::cell::record::{Record, RecordError};
use crate::cell::{Parts, park};
use crate::job::{JobId, State, StopReason};
use crate::scheduler::{Input, Ticket};

type Answer = oneshot::Sender<Result<(), StopError>>;

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Endings {
    tasks: JoinSet<Over>,
    jobs: HashMap<Id, Ending>,
}

#[derive(Debug)]
struct Ending {
    job: JobId,
    /// Where the scheduler had it.
    back: Input,
    answers: Vec<Answer>,
}

#[derive(Debug)]
struct Over {
    done: bool,
    result: Result<(), RecordError>,
}

impl Endings {
    /// Whether `job` is being ended: its record has a writer.
    pub(super) fn has(&self, job: &JobId) -> bool {
        self.jobs.values().any(|ending| ending.job == *job)
    }

    /// Nothing is being ended.
    pub(super) fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Lets go of all of them; those that wait for one see that nobody answers.
    pub(super) async fn abandon(&mut self) {
        self.tasks.shutdown().await;
        self.jobs.clear();
    }

    /// Tells `answer` too when `job` is over. Gives it back where it is not being ended.
    pub(super) fn join(&mut self, job: &JobId, answer: Option<Answer>) -> Result<(), Option<Answer>> {
        match self.jobs.values_mut().find(|ending| ending.job == *job) {
            Some(ending) => {
                ending.answers.extend(answer);
                Ok(())
            }
            None => Err(answer),
        }
    }

    /// The news of a job's submit came when it was being cancelled already.
    pub(super) fn submitted(&mut self, job: &JobId, ticket: Ticket) {
        if let Some(ending) = self.jobs.values_mut().find(|ending| ending.job == *job) {
            ending.back = Input::Submitted { job: job.clone(), ticket };
        }
    }

    /// Begins to end the job of `record`, which is queued or parked and not the scheduler's any more.
    pub(super) fn begin(
        &mut self,
        parts: &Arc<Parts>,
        mut record: Record,
        (reason, detail): (StopReason, String),
        answer: Option<Answer>,
    ) {
        let (job, ticket) = (record.job.clone(), record.ticket(parts));
        let back = match record.state() {
            State::Parked { parked } => {
                Input::Parked { job: job.clone(), ticket, until_ms: parked.until_ms, limited: false }
            }
            State::Queued
            | State::Preparing
            | State::Running
            | State::Stopping { .. }
            | State::Parking { .. }
            | State::Collecting { .. }
            | State::Verifying
            | State::Done(_) => Input::Submitted { job: job.clone(), ticket },
        };
        let parts = parts.clone();
        let task = self.tasks.spawn(async move {
            let result = park::end_waiting(&parts, &mut record, reason, detail).await;
            let done = record.state().is_done();
            // Whatever happened: followers would wait for this writer.
            record.finish(&parts);
            Over { done, result }
        });
        self.jobs.insert(task.id(), Ending { job, back, answers: answer.into_iter().collect() });
    }

    /// The next end: what the scheduler has to be told, if the job did not come to it. Cancel-safe. Does not return
    /// while there is none.
    pub(super) async fn next(&mut self) -> Option<Input> {
        let (id, over) = match self.tasks.join_next_with_id().await {
            Some(Ok((id, over))) => (id, over),
            Some(Err(error)) => {
                tracing::error!(%error, "the task that ends a job died");
                // Those that wait for it see that nobody answers.
                return self.jobs.remove(&error.id()).map(|ending| ending.back);
            }
            None => std::future::pending().await,
        };
        let ending = self.jobs.remove(&id)?;
        let mut result = Some(over.result);
        for answer in ending.answers {
            let told = match result.take() {
                Some(Err(error)) => Err(StopError::Record(error)),
                Some(Ok(())) => Ok(()),
                None if over.done => Ok(()),
                // The first one was told why.
                None => continue,
            };
            let _ = answer.send(told);
        }
        (!over.done).then_some(ending.back)
    }
}
