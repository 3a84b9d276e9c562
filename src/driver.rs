//! The one loop: news from the API, ends of jobs and the time go into the scheduler, and what it says to start or
//! to take back into the queue is done. It decides nothing itself and owns every job's task: a task that dies is an
//! end like any other.

mod endings;
mod figures;
mod stopping;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{Id, JoinSet};

use crate::cell::record::Record;
use crate::cell::{self, Fate, Parts, Start, StopWish};
use crate::clock;
use crate::job::{CellId, Input as Move, JobId, JobSpec, ParkReason, State, StopReason};
use crate::money::{self, Budget, Scope};
use crate::scheduler::recover::{self, FoundCell};
use crate::scheduler::{Action, Input, Scheduler, Ticket};
use crate::store::{Payer, StoreError};

use self::endings::Endings;
pub use self::stopping::{How, Shutdown};

/// Messages that wait for the loop.
const INBOX_MAX: usize = 1024;
/// Time for jobs to end after a drain turned into a stop, beside the grace that agents get.
const STOP_SLACK: Duration = Duration::from_secs(30);
/// How long a detach waits for requests for the model that are under way, and for jobs without a cell that are being
/// ended.
const DETACH_MAX: Duration = Duration::from_secs(10);

/// Longest sleep while a job is parked: its moment is on the wall clock, which may jump.
const LOOK_MAX: Duration = Duration::from_secs(60);
/// When a parked job whose record could not be written is tried again.
const UNPARK_AGAIN_MS: u64 = 60_000;

/// What the API asks for.
#[derive(Debug)]
enum Message {
    Limit { uid: u32, slots: Option<usize> },
    Submitted { job: JobId, ticket: Ticket },
    Unpark { job: JobId, done: oneshot::Sender<Result<(), UnparkError>> },
    Limited { credential: String, max: Option<usize> },
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

/// Why a job cannot be taken out of its parking.
#[derive(Debug, thiserror::Error)]
pub enum UnparkError {
    /// It is not parked.
    #[error("the job is {state}, not parked")]
    NotParked {
        /// What it is.
        state: &'static str,
    },
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
    tasks: JoinSet<Fate>,
    names: HashMap<Id, JobId>,
    stops: HashMap<JobId, watch::Sender<StopWish>>,
    /// Jobs without a cell that are being ended.
    endings: Endings,
    /// Jobs whose task died and that are being closed.
    rescued: HashSet<JobId>,
    /// Parked jobs whose time has come.
    due: VecDeque<JobId>,
    /// Jobs that were to be stopped in the moment in which they were parked.
    late_stops: Vec<(JobId, StopReason, String)>,
    /// When the scheduler wants to know the time, in milliseconds since 1970.
    wake_ms: Option<u64>,
    drain_max: Duration,
}

impl Handle {
    /// A job is queued.
    pub async fn submitted(&self, job: JobId, ticket: Ticket) {
        // A closed inbox means that the daemon is going down; the row stays queued for the next one.
        let _ = self.inbox.send(Message::Submitted { job, ticket }).await;
    }

    /// At most `max` jobs of a credential run at once from now on; none: only the slots count.
    pub async fn limited(&self, credential: String, max: Option<usize>) {
        // A daemon that is going down starts nothing anyway.
        let _ = self.inbox.send(Message::Limited { credential, max }).await;
    }

    /// Takes a parked job back into the queue before its time.
    ///
    /// # Errors
    /// [`UnparkError`].
    pub async fn unpark(&self, job: JobId) -> Result<(), UnparkError> {
        let (done, answer) = oneshot::channel();
        self.inbox.send(Message::Unpark { job, done }).await.map_err(|_| UnparkError::Draining)?;
        answer.await.map_err(|_| UnparkError::Draining)?
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
            endings: Endings::default(),
            rescued: HashSet::new(),
            due: VecDeque::new(),
            late_stops: Vec::new(),
            wake_ms: None,
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
            let ticket = Ticket { uid: open.uid, priority: open.priority, credential };
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
        let container = crate::engine::ContainerId::new(container.to_owned());
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

    async fn requeue_record(&self, job: &JobId) -> Result<(), cell::record::RecordError> {
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
        let container = crate::engine::ContainerId::new(container);
        self.start(job, Start::Adopt { cell, container });
    }

    /// Runs until `shutdown` says how to end, and ends so.
    pub async fn run(mut self, shutdown: Shutdown) {
        let mut how = loop {
            self.unpark_due().await;
            self.stop_late().await;
            tokio::select! {
                how = shutdown.begun() => break how,
                Some(message) = self.inbox.recv() => self.on_message(message).await,
                Some(ended) = self.tasks.join_next_with_id() => self.on_end(ended),
                back = self.endings.next() => self.give_back(back),
                () = until(self.wake_ms) => self.step(Input::Now { ms: clock::wall_ms() }),
            }
        };
        self.step(Input::Drain);
        if how == How::Drain {
            how = self.drain(&shutdown).await;
        }
        if how == How::Now {
            how = self.stop_all(&shutdown).await;
        }
        match how {
            How::Drain | How::Now => {}
            How::Detach | How::Leave => self.detach(how, &shutdown).await,
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
        let mut quiet = std::pin::pin!(gateway.close());
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

    async fn on_message(&mut self, message: Message) {
        match message {
            Message::Limit { uid, slots } => self.limit(uid, slots),
            Message::Submitted { job, ticket } if self.endings.has(&job) => {
                self.endings.submitted(&job, ticket);
            }
            Message::Submitted { job, ticket } => self.step(Input::Submitted { job, ticket }),
            Message::Limited { credential, max } => self.step(Input::Limited { credential, max }),
            Message::Unpark { job, done } => {
                let answer = self.unpark(job).await;
                let _ = done.send(answer);
            }
            Message::Stop { job, reason, detail, done } => {
                self.stop(job, reason, detail, Some(done)).await;
            }
        }
    }

    /// `answer` hears of it when a job that waits is over, or one that runs is being stopped.
    async fn stop(
        &mut self,
        job: JobId,
        reason: StopReason,
        detail: String,
        answer: Option<oneshot::Sender<Result<(), StopError>>>,
    ) {
        let told = |answer: Option<oneshot::Sender<_>>, what| answer.map(|answer| answer.send(what));
        if let Some(stop) = self.stops.get(&job) {
            wish(stop, reason, &detail);
            told(answer, Ok(()));
            return;
        }
        let Err(answer) = self.endings.join(&job, answer) else { return };
        // Not running: it waits, or it is over.
        let record = match Record::open(&self.parts, &job).await {
            Ok(record) => record,
            Err(error) => {
                tracing::warn!(%job, %error, "a job cannot be stopped");
                told(answer, Err(StopError::Record(error)));
                return;
            }
        };
        let waits = match record.state() {
            State::Queued | State::Parked { .. } => true,
            State::Preparing
            | State::Running
            | State::Stopping { .. }
            | State::Parking { .. }
            | State::Collecting { .. }
            | State::Verifying
            | State::Done(_) => false,
        };
        if waits || record.state().is_done() {
            self.step(Input::Withdrawn { job });
        }
        if waits {
            self.endings.begin(&self.parts, record, (reason, detail), answer);
            return;
        }
        // Followers would wait for this writer.
        record.finish(&self.parts);
        told(answer, Err(StopError::Over));
    }

    /// A job that could not be ended keeps its place.
    fn give_back(&mut self, back: Option<Input>) {
        if let Some(input) = back {
            self.step(input);
        }
    }

    /// Parked → queued, for those whose time has come.
    async fn unpark_due(&mut self) {
        while let Some(job) = self.due.pop_front() {
            if self.endings.has(&job) {
                continue;
            }
            match self.take_back(&job).await {
                Ok(Ok(ticket)) => self.step(Input::Submitted { job, ticket }),
                // Stopped meanwhile.
                Ok(Err(_)) => {}
                Err(error) => {
                    tracing::error!(%job, %error, "cannot take a parked job back into the queue; trying again");
                    let ticket = Ticket { uid: 0, priority: 0, credential: String::new() };
                    let until_ms = clock::wall_ms() + UNPARK_AGAIN_MS;
                    self.step(Input::Parked { job, ticket, until_ms, limited: false });
                }
            }
        }
    }

    /// What the scheduler has to know of the job, or the name of its state if it is not parked.
    async fn take_back(
        &self,
        job: &JobId,
    ) -> Result<Result<Ticket, &'static str>, cell::record::RecordError> {
        let mut record = Record::open(&self.parts, job).await?;
        let moved = match record.state() {
            State::Parked { .. } => {
                record.step(&self.parts, Move::Unpark).await.map(|()| Ok(record.ticket(&self.parts)))
            }
            other => Ok(Err(other.name())),
        };
        record.finish(&self.parts);
        moved
    }

    async fn unpark(&mut self, job: JobId) -> Result<(), UnparkError> {
        if self.stops.contains_key(&job) {
            // It has a slot: its task is its record's only writer.
            return Err(UnparkError::NotParked { state: "running" });
        }
        if self.endings.has(&job) {
            return Err(UnparkError::NotParked { state: "being cancelled" });
        }
        let ticket = self.take_back(&job).await?.map_err(|state| UnparkError::NotParked { state })?;
        self.parts.pauses.lift(&ticket.credential);
        self.parts.gateway.lift_pause(&ticket.credential);
        self.step(Input::Withdrawn { job: job.clone() });
        self.step(Input::Submitted { job, ticket });
        Ok(())
    }

    /// Stops that a job's task did not see any more, since it was parked by then.
    async fn stop_late(&mut self) {
        for (job, reason, detail) in std::mem::take(&mut self.late_stops) {
            self.stop(job, reason, detail, None).await;
        }
    }

    fn step(&mut self, input: Input) {
        let timers = matches!(input, Input::Now { .. });
        if timers {
            self.wake_ms = None;
        }
        for action in self.scheduler.step(input) {
            match action {
                Action::Start(job) => self.start(job, Start::Fresh),
                Action::Unpark(job) => self.due.push_back(job),
                Action::WakeAt(ms) => self.wake_ms = Some(ms),
            }
        }
        self.parts.metrics.slots_used.set(i64::try_from(self.scheduler.running()).unwrap_or(i64::MAX));
    }

    fn start(&mut self, job: JobId, start: Start) {
        let (stop, wish) = watch::channel(None);
        self.stops.insert(job.clone(), stop);
        let (parts, id) = (self.parts.clone(), job.clone());
        let task = self.tasks.spawn(cell::run(parts, id, start, wish));
        self.names.insert(task.id(), job);
    }

    fn on_end(&mut self, ended: Result<(Id, Fate), tokio::task::JoinError>) {
        let (task, fate) = match ended {
            Ok((task, fate)) => (task, Some(fate)),
            Err(error) => {
                tracing::error!(%error, "the task of a job died");
                (error.id(), None)
            }
        };
        let Some(job) = self.names.remove(&task) else { return };
        if fate.is_none() && self.rescued.insert(job.clone()) {
            // Its cell may be there still: the same road as after a restart, on a slot it already holds. Once: what
            // kills this task too would do so for ever.
            self.start(job, Start::Close);
            return;
        }
        self.rescued.remove(&job);
        let stop = self.stops.remove(&job).and_then(|stop| stop.borrow().clone());
        match fate {
            Some(Fate::Parked { ticket, until_ms, limited }) => {
                if let Some((reason, detail)) = stop.filter(|(reason, _)| *reason != StopReason::Drain) {
                    self.late_stops.push((job.clone(), reason, detail));
                }
                self.step(Input::Parked { job, ticket, until_ms, limited });
            }
            Some(Fate::Over) | None => self.step(Input::Ended { job }),
        }
    }
}

/// Returns at that moment on the wall clock or earlier; never where there is none.
async fn until(wake_ms: Option<u64>) {
    match wake_ms {
        Some(ms) => {
            let left = Duration::from_millis(ms.saturating_sub(clock::wall_ms()));
            tokio::time::sleep(left.min(LOOK_MAX)).await;
        }
        None => std::future::pending().await,
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
    figures::refresh_cache(parts);
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
