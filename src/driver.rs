//! The one loop: news from the API, ends of jobs and the time go into the scheduler, and what it says to start or
//! to take back into the queue is done. It decides nothing itself and owns every job's task: a task that dies is an
//! end like any other.

mod endings;
mod ends;
mod figures;
mod recovery;
mod room;
mod stopping;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{Id, JoinSet};

use crate::cell::record::Record;
use crate::cell::{self, Fate, Parts, Start, StopWish};
use crate::clock;
use crate::job::{Input as Move, JobId, State, StopReason};
use crate::scheduler::{Action, Input, Scheduler, Ticket};
use crate::store::{Paused, StoreError};

use self::endings::Endings;
pub use self::ends::attended;
pub use self::figures::refresh_gauges;
pub use self::recovery::RecoverError;
use self::room::Room;
pub use self::stopping::{How, Shutdown};

/// Messages that wait for the loop.
const INBOX_MAX: usize = 1024;
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
    Engine { up: bool },
    Stop { job: JobId, reason: StopReason, detail: String, done: oneshot::Sender<Result<(), StopError>> },
    Pause { paused: Option<Paused>, done: oneshot::Sender<Result<(), PauseError>> },
    Look { done: oneshot::Sender<Scheduler> },
}

/// Why the daemon cannot be paused or resumed.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// It is going down.
    #[error("the daemon is going down")]
    Draining,
    /// The row cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
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
    room: Room,
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

    /// Whether the engine answers.
    pub async fn engine(&self, up: bool) {
        // A daemon that is going down starts nothing anyway.
        let _ = self.inbox.send(Message::Engine { up }).await;
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

    /// Pauses all starts, or resumes them: stored, so that it outlives the daemon.
    ///
    /// # Errors
    /// [`PauseError`].
    pub async fn pause(&self, paused: Option<Paused>) -> Result<(), PauseError> {
        let (done, answer) = oneshot::channel();
        self.inbox.send(Message::Pause { paused, done }).await.map_err(|_| PauseError::Draining)?;
        answer.await.map_err(|_| PauseError::Draining)?
    }

    /// The queue as it is now, to be read; none while the daemon is going down.
    pub async fn look(&self) -> Option<Scheduler> {
        let (done, answer) = oneshot::channel();
        self.inbox.send(Message::Look { done }).await.ok()?;
        answer.await.ok()
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
        let room = Room::new(&parts.settings);
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
            room,
            drain_max,
        };
        (driver, Handle { inbox: sender })
    }

    /// The same as [`Handle::limit`], before the loop runs: what waits from earlier is bound too.
    pub fn limit(&mut self, uid: u32, slots: Option<usize>) {
        self.step(Input::Limit { uid, slots });
    }

    /// Runs until `shutdown` says how to end, and ends so.
    pub async fn run(mut self, shutdown: Shutdown) {
        let how = loop {
            self.unpark_due().await;
            self.stop_late().await;
            tokio::select! {
                how = shutdown.begun() => break how,
                Some(message) = self.inbox.recv() => self.on_message(message).await,
                Some(ended) = self.tasks.join_next_with_id() => self.on_end(ended),
                back = self.endings.next() => self.give_back(back),
                () = until(self.wake_ms) => self.step(Input::Now { ms: clock::wall_ms() }),
                () = room::again(self.scheduler.waits_for_room()) => self.look_for_room(),
            }
        };
        self.step(Input::Drain);
        self.end(how, &shutdown).await;
    }

    async fn on_message(&mut self, message: Message) {
        match message {
            Message::Limit { uid, slots } => self.limit(uid, slots),
            Message::Submitted { job, ticket } if self.endings.has(&job) => {
                self.endings.submitted(&job, ticket);
            }
            Message::Submitted { job, ticket } => self.step(Input::Submitted { job, ticket }),
            Message::Engine { up } => self.step(Input::Engine { up }),
            Message::Limited { credential, max } => self.step(Input::Limited { credential, max }),
            Message::Unpark { job, done } => {
                let answer = self.unpark(job).await;
                let _ = done.send(answer);
            }
            Message::Pause { paused, done } => {
                let _ = done.send(self.pause(paused).await);
            }
            Message::Look { done } => {
                let _ = done.send(self.scheduler.clone());
            }
            Message::Stop { job, reason, detail, done } => {
                self.stop(job, reason, detail, Some(done)).await;
            }
        }
    }

    /// The row first: what was told to be paused stays so over a kill.
    async fn pause(&mut self, paused: Option<Paused>) -> Result<(), PauseError> {
        self.parts.store.set_paused(paused).await?;
        self.paused(paused.is_some());
        Ok(())
    }

    fn paused(&mut self, paused: bool) {
        self.parts.metrics.paused.set(i64::from(paused));
        self.step(if paused { Input::Pause } else { Input::Resume });
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
                    let ticket = Ticket::bare(0, 0, String::new());
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

    /// What the host has for one more job, where one may want it.
    fn look_for_room(&mut self) {
        if let Some(room) = self.room.look(std::time::Instant::now()) {
            self.act(Input::Room(room));
        }
    }

    fn step(&mut self, input: Input) {
        if self.scheduler.queued() > 0 || matches!(input, Input::Submitted { .. }) {
            self.look_for_room();
        }
        self.act(input);
    }

    fn act(&mut self, input: Input) {
        let timers = matches!(input, Input::Now { .. });
        if timers {
            self.wake_ms = None;
        }
        for action in self.scheduler.step(input) {
            match action {
                Action::Start(job) => {
                    let need =
                        self.scheduler.ticket(&job).map_or_else(Default::default, |ticket| ticket.need);
                    self.room.taken(std::time::Instant::now(), need);
                    self.start(job, Start::Fresh);
                }
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
