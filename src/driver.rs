//! The one loop: news from the API and ends of jobs go into the scheduler, and what it says to start is
//! started. It decides nothing itself and owns every job's task: a task that dies is an end like any other.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{Id, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::cell::record::Record;
use crate::cell::{self, Parts, Start, StopWish};
use crate::clock;
use crate::event::{Body, Totals};
use crate::job::{CellId, Input as Move, JobId, Outcome, State, StopReason};
use crate::money::{self, Budget, Scope};
use crate::scheduler::recover::{self, FoundCell};
use crate::scheduler::{Action, Input, Scheduler};
use crate::store::{Payer, StoreError};

/// Messages that wait for the loop.
const INBOX_MAX: usize = 1024;
/// Time for jobs to end after a drain turned into a stop, beside the grace that agents get.
const STOP_SLACK: Duration = Duration::from_secs(30);

/// What the API asks for.
#[derive(Debug)]
enum Message {
    Limit { uid: u32, slots: Option<usize> },
    Submitted { job: JobId, uid: u32, priority: i8 },
    Stop { job: JobId, reason: StopReason, detail: String, done: oneshot::Sender<Result<(), StopError>> },
}

/// Why a job cannot be stopped.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// It is over.
    #[error("the job is over")]
    Over,
    /// The daemon is going down.
    #[error("the daemon is going down")]
    Draining,
    /// The record cannot be written.
    #[error(transparent)]
    Record(#[from] cell::record::RecordError),
}

/// Talks to the loop.
#[derive(Debug, Clone)]
pub struct Handle {
    inbox: mpsc::Sender<Message>,
}

/// The loop before it runs.
#[derive(Debug)]
pub struct Driver {
    parts: Arc<Parts>,
    scheduler: Scheduler,
    inbox: mpsc::Receiver<Message>,
    tasks: JoinSet<JobId>,
    names: HashMap<Id, JobId>,
    stops: HashMap<JobId, watch::Sender<StopWish>>,
    /// Jobs whose task died and that are being closed.
    rescued: HashSet<JobId>,
    drain_max: Duration,
}

impl Handle {
    /// A job is queued.
    pub async fn submitted(&self, job: JobId, uid: u32, priority: i8) {
        // A closed inbox means that the daemon is going down; the row stays queued for the next one.
        let _ = self.inbox.send(Message::Submitted { job, uid, priority }).await;
    }

    /// From now on a user has at most so many running jobs; all slots where absent.
    pub async fn limit(&self, uid: u32, slots: Option<usize>) {
        let _ = self.inbox.send(Message::Limit { uid, slots }).await;
    }

    /// Stops a job: one that waits is over when this returns; one that runs is being stopped.
    ///
    /// # Errors
    /// [`StopError`].
    pub async fn stop(&self, job: JobId, reason: StopReason, detail: String) -> Result<(), StopError> {
        let (done, answer) = oneshot::channel();
        let sent = self.inbox.send(Message::Stop { job, reason, detail, done }).await;
        sent.map_err(|_| StopError::Draining)?;
        answer.await.map_err(|_| StopError::Draining)?
    }
}

impl Driver {
    /// A loop with this many slots; a drain waits at most `drain_max` for running jobs.
    pub fn new(parts: Arc<Parts>, slots: usize, drain_max: Duration) -> (Self, Handle) {
        let (sender, inbox) = mpsc::channel(INBOX_MAX);
        parts.metrics.slots.set(i64::try_from(slots).unwrap_or(i64::MAX));
        let driver = Self {
            parts,
            scheduler: Scheduler::new(slots),
            inbox,
            tasks: JoinSet::new(),
            names: HashMap::new(),
            stops: HashMap::new(),
            rescued: HashSet::new(),
            drain_max,
        };
        (driver, Handle { inbox: sender })
    }

    /// The same as [`Handle::limit`], before the loop runs: what waits from earlier is bound too.
    pub fn limit(&mut self, uid: u32, slots: Option<usize>) {
        self.step(Input::Limit { uid, slots });
    }

    /// Takes up what an earlier daemon left, by the plan of [`recover::plan`].
    ///
    /// # Errors
    /// When the store cannot be read, or the engine does not answer: then nothing was done.
    pub async fn recover(&mut self) -> Result<(), RecoverError> {
        let mut rows = Vec::new();
        for open in self.parts.store.open_jobs().await? {
            let cell = match open.state {
                State::Queued => None,
                _ => self
                    .parts
                    .store
                    .cell_of(&open.id)
                    .await?
                    .filter(|row| row.gone_ms.is_none())
                    .map(|row| row.cell),
            };
            rows.push(recover::Row {
                job: open.id,
                uid: open.uid,
                priority: open.priority,
                state: open.state,
                cell,
            });
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
            match action {
                recover::Action::Requeue { job, uid, priority } => self.requeue(job, uid, priority).await,
                recover::Action::Adopt { job, uid, cell, container } => {
                    self.adopt(job, uid, cell, &container)
                }
                recover::Action::Close { job } => {
                    let uid = rows.iter().find(|row| row.job == job).map_or(0, |row| row.uid);
                    self.close(job, uid);
                }
                recover::Action::Reap { container } => {
                    let container = crate::engine::ContainerId::new(container);
                    if let Err(error) = self.parts.engine.remove(&container).await {
                        tracing::warn!(%container, %error, "a container that no job owns is left; the sweeper goes on");
                        continue;
                    }
                    self.parts.metrics.reaped(crate::metrics::Orphan::Container, 1);
                    tracing::info!(%container, "removed a container that no job owns");
                }
            }
        }
        Ok(())
    }

    /// One job whose record is damaged must not keep the daemon from starting: it goes the way of a lost one.
    async fn requeue(&mut self, job: JobId, uid: u32, priority: i8) {
        // One try: what is left has its row, and is tried again at the job's end.
        if let Err(left) = cell::destroy_once(&self.parts, &job).await {
            tracing::warn!(%job, %left, "something of a cell is left");
        }
        if let Err(error) = self.requeue_record(&job).await {
            tracing::error!(%job, %error, "cannot queue a job again; closing it");
            self.close(job, uid);
            return;
        }
        self.step(Input::Submitted { job, uid, priority });
    }

    async fn requeue_record(&self, job: &JobId) -> Result<(), cell::record::RecordError> {
        let mut record = Record::open(&self.parts, job).await?;
        let moved = match record.state() {
            State::Preparing => record.step(&self.parts, Move::Requeue).await,
            _ => Ok(()),
        };
        record.finish(&self.parts);
        moved
    }

    fn close(&mut self, job: JobId, uid: u32) {
        self.step(Input::Adopted { job: job.clone(), uid });
        self.start(job, Start::Close);
    }

    fn adopt(&mut self, job: JobId, uid: u32, cell: CellId, container: &str) {
        self.step(Input::Adopted { job: job.clone(), uid });
        let container = crate::engine::ContainerId::new(container);
        self.start(job, Start::Adopt { cell, container });
    }

    /// Runs until `shutdown`, then drains: nothing new starts, running jobs may end within the drain limit
    /// and are stopped then, or at once when `hurry` fires.
    pub async fn run(mut self, shutdown: CancellationToken, hurry: CancellationToken) {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                Some(message) = self.inbox.recv() => self.on_message(message).await,
                Some(ended) = self.tasks.join_next_with_id() => self.on_end(ended),
            }
        }
        self.step(Input::Drain);
        tracing::info!(running = self.tasks.len(), "draining");
        let deadline = tokio::time::Instant::now() + self.drain_max;
        while !self.tasks.is_empty() {
            tokio::select! {
                Some(ended) = self.tasks.join_next_with_id() => self.on_end(ended),
                Some(message) = self.inbox.recv() => self.on_message(message).await,
                () = tokio::time::sleep_until(deadline) => break,
                () = hurry.cancelled() => break,
            }
        }
        for stop in self.stops.values() {
            wish(stop, StopReason::Drain, "the daemon is going down");
        }
        let slack = self.parts.settings.cancel_grace + STOP_SLACK;
        let deadline = tokio::time::Instant::now() + slack;
        while !self.tasks.is_empty() {
            tokio::select! {
                Some(ended) = self.tasks.join_next_with_id() => self.on_end(ended),
                () = tokio::time::sleep_until(deadline) => {
                    tracing::error!(left = self.tasks.len(), "jobs did not end in time; the next daemon takes them up");
                    return;
                }
            }
        }
    }

    async fn on_message(&mut self, message: Message) {
        match message {
            Message::Limit { uid, slots } => self.limit(uid, slots),
            Message::Submitted { job, uid, priority } => self.step(Input::Submitted { job, uid, priority }),
            Message::Stop { job, reason, detail, done } => {
                let answer = self.stop(job, reason, detail).await;
                let _ = done.send(answer);
            }
        }
    }

    async fn stop(&mut self, job: JobId, reason: StopReason, detail: String) -> Result<(), StopError> {
        if let Some(stop) = self.stops.get(&job) {
            wish(stop, reason, &detail);
            return Ok(());
        }
        // Not running: it waits, or it is over.
        let mut record = Record::open(&self.parts, &job).await?;
        let answer = match record.state() {
            State::Queued => self.end_queued(&mut record, reason, detail).await,
            State::Preparing
            | State::Running
            | State::Stopping { .. }
            | State::Collecting { .. }
            | State::Done(_) => Err(StopError::Over),
        };
        if record.state().is_done() {
            // Not before: a job that could not be ended keeps its place in the queue.
            self.step(Input::Withdrawn { job });
        }
        // Whatever happened: followers would wait for this writer.
        record.finish(&self.parts);
        answer
    }

    async fn end_queued(
        &self,
        record: &mut Record,
        reason: StopReason,
        detail: String,
    ) -> Result<(), StopError> {
        record.push(&Body::Stop { reason, detail })?;
        let outcome = Outcome::Stopped { reason };
        record.done(&self.parts, outcome.clone(), Totals::default(), None).await?;
        self.parts.metrics.ended(&outcome, None, crate::money::MicroUsd::ZERO, None);
        Ok(())
    }

    fn step(&mut self, input: Input) {
        for Action::Start(job) in self.scheduler.step(input) {
            self.start(job, Start::Fresh);
        }
        self.parts.metrics.slots_used.set(i64::try_from(self.scheduler.running()).unwrap_or(i64::MAX));
    }

    fn start(&mut self, job: JobId, start: Start) {
        let (stop, wish) = watch::channel(None);
        self.stops.insert(job.clone(), stop);
        let (parts, id) = (self.parts.clone(), job.clone());
        let task = self.tasks.spawn(async move {
            cell::run(parts, id.clone(), start, wish).await;
            id
        });
        self.names.insert(task.id(), job);
    }

    fn on_end(&mut self, ended: Result<(Id, JobId), tokio::task::JoinError>) {
        let (task, died) = match ended {
            Ok((task, _)) => (task, false),
            Err(error) => {
                tracing::error!(%error, "the task of a job died");
                (error.id(), true)
            }
        };
        let Some(job) = self.names.remove(&task) else { return };
        if died && self.rescued.insert(job.clone()) {
            // Its cell may be there still: the same road as after a restart, on a slot it already holds. Once: what
            // kills this task too would do so for ever.
            self.start(job, Start::Close);
            return;
        }
        self.rescued.remove(&job);
        self.stops.remove(&job);
        self.step(Input::Ended { job });
    }
}

/// The first wish counts.
fn wish(stop: &watch::Sender<StopWish>, reason: StopReason, detail: &str) {
    stop.send_if_modified(|wish| {
        let first = wish.is_none();
        if first {
            *wish = Some((reason, detail.to_owned()));
        }
        first
    });
}

/// Why a restart could not be planned.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] crate::engine::EngineError),
}

/// Keeps the gauges of the queue true: called when somebody reads the metrics.
///
/// # Errors
/// [`StoreError`].
pub async fn refresh_gauges(parts: &Parts) -> Result<(), StoreError> {
    let pace = parts.gateway.pace();
    parts.metrics.provider_concurrency.set(i64::from(pace.limit));
    parts.metrics.provider_paused_s.set(pace.paused.as_secs_f64());
    let counts: Vec<(String, u64)> =
        parts.store.counts_by_state().await?.into_iter().map(|(name, n)| (name.to_owned(), n)).collect();
    parts.metrics.set_jobs(&counts);
    let oldest = parts.store.oldest_queued_ms().await?;
    let age = oldest.map_or(0.0, |ms| clock::wall_ms().saturating_sub(ms) as f64 / 1000.0);
    parts.metrics.queue_age_s.set(age);
    refresh_money(parts).await
}

/// Sums of cost, and how the budgets of the daemon stand.
async fn refresh_money(parts: &Parts) -> Result<(), StoreError> {
    let totals = parts.store.cost_totals().await?;
    let costs: Vec<_> = totals.into_iter().map(|cost| (cost.model, cost.usage, cost.charged)).collect();
    parts.metrics.set_costs(&costs);
    let (caps, calendar, now) = (parts.settings.caps, &parts.settings.calendar, clock::wall_ms());
    let (spent, reserved) = parts.store.dearest_user_day(calendar.clone(), now).await?;
    parts.metrics.set_budget(Scope::UserDay, caps.user_day, spent, reserved);
    let limits = [(Scope::Day, caps.day), (Scope::Month, caps.month)];
    let budgets = limits.map(|(scope, limit)| Budget { scope, limit: limit.unwrap_or(money::MAX) }).to_vec();
    let payer = Payer { uid: 0, job: None, batch: None };
    let standings = parts.store.budget_standing(payer, budgets, calendar.clone(), now).await?;
    for ((scope, limit), standing) in limits.into_iter().zip(standings) {
        parts.metrics.set_budget(scope, limit, standing.charged, standing.reserved);
    }
    Ok(())
}
