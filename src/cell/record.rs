//! The record of one job: its row and its journal, moved together. Each transition is stored with the
//! number of the event that tells of it; an event missing after a crash is written again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::{Accepted, Parts, park};
use crate::agent::frames;
use crate::clock;
use crate::event::{Body, Decision, Line, Ran, Totals};
use crate::gateway::GatewayEvent;
use crate::job::outcome::Failure;
use crate::job::{Carry, CellId, FailReason, Identity, Input, JobId, JobSpec, Outcome, Pause, Phase, State};
use crate::journal::{Feed, Journal, JournalError, Reader, Recovered};
use crate::scheduler::Ticket;
use crate::session::{AgentExit, Session, Step, Trouble};
use crate::store::{Store, StoreError};

/// How much of a journal is read at a time, in bytes.
const REPLAY_CHUNK_BYTES: usize = 1024 * 1024;
/// Longest pause before a row that could not be closed is tried again.
const CLOSE_PAUSE_MAX: Duration = Duration::from_secs(10);

/// The record cannot be read or written: a fault of the host.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The row.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// There is no such job.
    #[error("there is no job {0}")]
    Missing(JobId),
    /// A stored text does not parse: another version wrote it, or the disk lies.
    #[error("the stored {what} of the job does not parse: {detail}")]
    Corrupt {
        /// Which text.
        what: &'static str,
        /// The parser's words.
        detail: String,
    },
    /// The journal was cut to its limit in the middle, so the conversation cannot be rebuilt.
    #[error("the journal was cut to its limit; the conversation cannot be taken up again")]
    Cut,
}

/// What PID 1 reported.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExitFigures {
    /// Most memory the cell used, in bytes.
    pub peak_memory_bytes: u64,
    /// CPU time of the cell, in microseconds.
    pub cpu_us: u64,
}

/// The record of a job that has a slot.
#[derive(Debug)]
pub struct Record {
    /// Which job.
    pub job: JobId,
    /// Whose it is.
    pub identity: Identity,
    /// What was asked.
    pub spec: JobSpec,
    /// What was accepted.
    pub accepted: Accepted,
    /// When it was submitted.
    pub created_ms: u64,
    /// Which try this is.
    pub attempt: u32,
    /// Higher goes first.
    pub priority: i8,
    /// What earlier attempts left it.
    pub carry: Carry,
    /// What PID 1 reported, once it has.
    pub exit: Option<ExitFigures>,
    /// Totals, once it is done.
    pub totals: Totals,
    /// Where the streams were left, as the journal knows it.
    pub recovered: Recovered,
    /// The journal.
    pub journal: Journal,
    state: State,
    dir: std::path::PathBuf,
}

/// How the conversation of an attempt begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opening {
    /// With the task.
    Task,
    /// With the word that a pause is over.
    Pause(Pause),
    /// With what is to be repaired.
    Words(String),
}

/// A conversation rebuilt from the journal.
#[derive(Debug)]
pub struct Replay {
    /// The session, as it was after the last journaled line.
    pub session: Session,
    /// Frames that were journaled as sent: their end offset in stdin, and the bytes with the line feed.
    pub sent: Vec<(u64, Vec<u8>)>,
    /// Steps that the session gave and that no event tells of.
    pub pending: Vec<Step>,
    /// How the CLI ended, where that was journaled.
    pub exit: Option<AgentExit>,
    /// What PID 1 reported beside it.
    pub figures: Option<ExitFigures>,
    /// What last went wrong on the way to the model.
    pub trouble: Option<Trouble>,
}

impl Record {
    /// Opens the record of a job, and writes the state's event again where a crash lost it.
    ///
    /// # Errors
    /// [`RecordError`].
    pub async fn open(parts: &Parts, job: &JobId) -> Result<Self, RecordError> {
        let row = parts.store.job(job).await?.ok_or_else(|| RecordError::Missing(job.clone()))?;
        let corrupt = |what| move |e: serde_json::Error| RecordError::Corrupt { what, detail: e.to_string() };
        let mut spec: JobSpec = serde_json::from_str(&row.spec_json).map_err(corrupt("spec"))?;
        let accepted: Accepted = serde_json::from_str(&row.plan_json).map_err(corrupt("plan"))?;
        if let Some(build) = &accepted.build {
            build.set_up(&mut spec);
        }
        let dir = parts.settings.journal_dir(job);
        let (journal, recovered) = Journal::open(&dir, parts.settings.journal)?;
        parts.feeds.publish(job, journal.feed());
        let mut record = Self {
            job: job.clone(),
            identity: row.row.identity,
            spec,
            accepted,
            created_ms: row.row.created_ms,
            attempt: row.row.attempt,
            priority: row.row.priority,
            carry: row.carry,
            exit: None,
            totals: row.row.totals.unwrap_or_default(),
            state: row.row.state,
            recovered,
            journal,
            dir,
        };
        if record.recovered.last_state.as_ref() != Some(&record.state) {
            record.push(&Body::State { state: record.state.clone() })?;
            record.commit()?;
        }
        Ok(record)
    }

    /// What the scheduler has to know of it.
    pub fn ticket(&self, parts: &Parts) -> Ticket {
        let credential = park::credential(parts, self);
        let plan = &self.accepted.plan;
        Ticket::new(self.identity.uid, self.priority, credential, &plan.policy, &plan.limits)
    }

    /// What earlier attempts left of the wall limit, in milliseconds; at least a second.
    pub fn wall_left_ms(&self) -> u64 {
        self.accepted.plan.limits.wall_ms.saturating_sub(self.carry.ran_ms).max(1000)
    }

    /// Where the job stands.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Adds an event to the buffer.
    ///
    /// # Errors
    /// [`RecordError::Journal`].
    pub fn push(&mut self, body: &Body) -> Result<u64, RecordError> {
        Ok(self.journal.push(body, clock::wall_ms())?)
    }

    /// Writes the buffer out and shows it to followers.
    ///
    /// # Errors
    /// [`RecordError::Journal`].
    pub fn commit(&mut self) -> Result<(), RecordError> {
        self.journal.commit()?;
        Ok(())
    }

    /// Moves the job: the row first, then its event.
    ///
    /// # Errors
    /// [`RecordError`]; a conflict would mean that somebody else moved a job that has a slot.
    pub async fn step(&mut self, parts: &Parts, input: Input) -> Result<(), RecordError> {
        self.commit()?;
        let seq = self.journal.next_seq();
        let now = clock::wall_ms();
        self.state = parts.store.transition(&self.job, &self.state, &input, Some(seq), now).await?;
        self.journal.push(&Body::State { state: self.state.clone() }, now)?;
        self.commit()
    }

    /// Tells that a cell of its own begins for the job; its streams are counted from their beginning.
    ///
    /// # Errors
    /// [`RecordError::Journal`].
    pub fn begin_attempt(&mut self, cell: &CellId, opening: &Opening) -> Result<(), RecordError> {
        let (paused, repair) = match opening {
            Opening::Task => (None, None),
            Opening::Pause(pause) => (Some(*pause), None),
            Opening::Words(words) => (None, Some(words.clone())),
        };
        self.push(&Body::Attempt { attempt: self.attempt, cell: cell.clone(), paused, repair })?;
        (self.recovered.stdout_end, self.recovered.stderr_end, self.recovered.stdin_end) = (0, 0, 0);
        self.commit()
    }

    /// How the conversation of the next attempt begins. `resumed`: that of an earlier one is there.
    pub fn opening(&self, resumed: bool, now_ms: u64) -> Opening {
        match (&self.carry.repair, self.carry.parked_ms) {
            (Some(words), _) if resumed => Opening::Words(words.clone()),
            (Some(words), _) => Opening::Words(format!("{}\n\n{words}", self.spec.prompt)),
            (None, Some(from_ms)) if resumed => Opening::Pause(Pause { from_ms, to_ms: now_ms }),
            (None, Some(_) | None) => Opening::Task,
        }
    }

    /// A conversation for one attempt.
    pub fn session(&self, opening: &Opening, append: String) -> Session {
        let prompt = match opening {
            Opening::Task => self.spec.prompt.clone(),
            Opening::Pause(pause) => park::continuation(pause),
            Opening::Words(words) => words.clone(),
        };
        Session::new(self.accepted.plan.clone(), prompt, self.spec.system_prompt.clone(), append)
    }

    /// Whether a stop was decided.
    pub fn is_stopped(&self) -> bool {
        matches!(self.state, State::Collecting { stopped: Some(_) } | State::Stopping { .. })
    }

    /// Gives the agent another try: `words` is what it is told.
    ///
    /// # Errors
    /// [`RecordError`].
    pub async fn repair(&mut self, parts: &Parts, carry: Carry, words: String) -> Result<(), RecordError> {
        let repairs = carry.repairs + 1;
        let parked_ms = Some(clock::wall_ms());
        let carry = Carry { repairs, repair: Some(words), parked_ms, ..carry };
        self.attempt += 1;
        self.carry_over(parts, Input::Repair, carry).await
    }

    /// Parks the job: its cell is gone and its work is put away.
    ///
    /// # Errors
    /// [`RecordError`].
    pub async fn shelve(&mut self, parts: &Parts, carry: Carry) -> Result<(), RecordError> {
        self.carry_over(parts, Input::Shelved, carry).await
    }

    /// Takes the job, of whose cell nothing is left, back into the queue before its agent had its task.
    ///
    /// # Errors
    /// [`RecordError`].
    pub async fn requeue(&mut self, parts: &Parts, carry: Carry) -> Result<(), RecordError> {
        self.carry_over(parts, Input::Requeue, carry).await
    }

    async fn carry_over(&mut self, parts: &Parts, input: Input, carry: Carry) -> Result<(), RecordError> {
        self.commit()?;
        self.journal.sync().await?;
        let (seq, now) = (self.journal.next_seq(), clock::wall_ms());
        self.state =
            parts.store.carry_over(&self.job, &self.state, &input, carry.clone(), (seq, now)).await?;
        self.carry = carry;
        self.journal.push(&Body::State { state: self.state.clone() }, now)?;
        self.commit()
    }

    /// The last move, with totals and answer.
    ///
    /// # Errors
    /// [`RecordError`].
    pub async fn done(
        &mut self,
        parts: &Parts,
        outcome: Outcome,
        totals: Totals,
        answer: Option<String>,
    ) -> Result<(), RecordError> {
        self.totals = totals.clone();
        let summary = Body::Summary {
            outcome: outcome.clone(),
            totals: Box::new(totals.clone()),
            result: answer.clone(),
        };
        self.push(&summary)?;
        self.commit()?;
        self.journal.sync().await?;
        let seq = Some(self.journal.next_seq());
        let now = clock::wall_ms();
        let done = parts.store.finish(&self.job, &self.state, outcome, totals, answer, seq, now);
        self.state = done.await?;
        self.journal.push(&Body::State { state: self.state.clone() }, now)?;
        self.commit()
    }

    /// Ends a job whose record could not be written on the way: cleans up, closes the row, and writes the last
    /// events where the journal can be written again by then (the cell's disk space is free now).
    pub async fn close_after_fault(&mut self, parts: &Arc<Parts>, error: &RecordError) {
        self.journal.discard();
        let was_done = self.state.is_done();
        let Some((state, totals)) = close_row(parts, &self.job, error).await else { return };
        let (was, now) = (std::mem::replace(&mut self.state, state), clock::wall_ms());
        self.totals = totals.clone();
        let mut last = Vec::new();
        if let (State::Done(outcome), false) = (&self.state, was_done) {
            last.push(Body::Summary { outcome: outcome.clone(), totals: Box::new(totals), result: None });
        }
        last.push(Body::State { state: self.state.clone() });
        let pushed = last.iter().try_for_each(|body| self.journal.push(body, now).map(|_| ()));
        if let Err(error) = pushed.and_then(|()| self.journal.commit().map(|_| ())) {
            tracing::warn!(job = %self.job, %error, from = was.name(), "the end of a job is in its row, not in its journal");
            self.journal.discard();
        }
    }

    /// Tells followers that nothing more comes.
    pub fn finish(self, parts: &Parts) {
        let job = self.job.clone();
        drop(self);
        parts.feeds.close(&job);
    }

    /// Journals what the gateway tells, counts it, and keeps what last went wrong.
    ///
    /// # Errors
    /// [`RecordError::Journal`].
    pub fn note_gateway(
        &mut self,
        parts: &Parts,
        event: &GatewayEvent,
        trouble: &mut Option<Trouble>,
    ) -> Result<(), RecordError> {
        let body = match event {
            GatewayEvent::Requested { model, reserved, credential } => Body::Request {
                model: model.clone(),
                reserved_micro_usd: *reserved,
                credential: credential.clone(),
            },
            GatewayEvent::Charged { model, usage, charged, status, duration_ms, .. } => {
                *trouble = self::trouble(*status);
                Body::Charge {
                    model: model.clone(),
                    status: *status,
                    usage: *usage,
                    charged_micro_usd: *charged,
                    duration_ms: *duration_ms,
                }
            }
            GatewayEvent::Refused { status, why } => {
                parts.metrics.refused(*why);
                *trouble = Some(Trouble::Refused);
                Body::Refused { status: *status, why: why.as_str().to_owned() }
            }
            GatewayEvent::ProviderFault { status, .. } => {
                *trouble = Some(Trouble::Provider(status.unwrap_or(0)));
                return Ok(());
            }
            GatewayEvent::BudgetExhausted { scope, spent, limit, resets_at_ms } => Body::Budget {
                scope: scope.as_str().to_owned(),
                spent_micro_usd: *spent,
                limit_micro_usd: *limit,
                resets_at_ms: *resets_at_ms,
            },
            GatewayEvent::ProviderPaused { .. } => return Ok(()),
            GatewayEvent::Egress(reached) => {
                let decision = if reached.allowed { Decision::Allow } else { Decision::Deny };
                parts.metrics.egress(decision, reached.bytes_up, reached.bytes_down);
                parts.metrics.cache_served(reached.cached_bytes);
                Body::Egress {
                    host: reached.host.clone(),
                    port: reached.port,
                    method: reached.method.clone(),
                    path: reached.path.clone(),
                    decision,
                    rule: reached.rule.clone(),
                    reason: reached.reason.clone(),
                    credential: reached.credential.clone(),
                    status: reached.status,
                    bytes_up: reached.bytes_up,
                    bytes_down: reached.bytes_down,
                    cached_bytes: reached.cached_bytes,
                    duration_ms: reached.duration_ms,
                }
            }
        };
        self.push(&body)?;
        Ok(())
    }

    /// What the job ran on and how long each part took, from the journal; what a journal cut to its limit lost is
    /// not in it.
    ///
    /// # Errors
    /// [`RecordError`].
    pub async fn ran(&self) -> Result<Ran, RecordError> {
        let (mut ran, mut last) = (Ran::default(), None);
        let mut reader = Reader::open(&self.dir, 1, None);
        while let Some(chunk) = reader.next_chunk(REPLAY_CHUNK_BYTES).await? {
            for line in chunk.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
                let line: Line = serde_json::from_slice(line)
                    .map_err(|e| RecordError::Corrupt { what: "journal", detail: e.to_string() })?;
                ran.take(&line, &mut last);
            }
        }
        if let Some((name, since_ms)) = last {
            *ran.phases_ms.entry(name).or_default() += clock::wall_ms().saturating_sub(since_ms);
        }
        Ok(ran)
    }

    /// Rebuilds the conversation of the current attempt from the journal.
    ///
    /// # Errors
    /// [`RecordError::Cut`] where the journal lost its middle, and a part of this attempt with it.
    pub async fn replay(&self) -> Result<Replay, RecordError> {
        let mut replay = Replay::new(self.session(&Opening::Task, String::new()));
        let mut cut = false;
        let mut reader = Reader::open(&self.dir, 1, None);
        while let Some(chunk) = reader.next_chunk(REPLAY_CHUNK_BYTES).await? {
            for line in chunk.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
                let line: Line = serde_json::from_slice(line)
                    .map_err(|e| RecordError::Corrupt { what: "journal", detail: e.to_string() })?;
                match line.kind {
                    // What was before is another cell's.
                    "attempt" => {
                        cut = false;
                        let words = line.repair.map(|words| Opening::Words(words.into_owned()));
                        let opening = words.or(line.paused.map(Opening::Pause)).unwrap_or(Opening::Task);
                        replay = Replay::new(self.session(&opening, String::new()));
                    }
                    "truncated" => cut = true,
                    _ => replay.take(&line),
                }
            }
        }
        if cut { Err(RecordError::Cut) } else { Ok(replay) }
    }
}

impl Replay {
    fn new(session: Session) -> Self {
        let pending = session.start();
        Self { pending, session, sent: Vec::new(), exit: None, figures: None, trouble: None }
    }

    fn take(&mut self, line: &Line<'_>) {
        match (line.kind, line.frame) {
            ("frame", Some(frame)) => {
                if let Some(incoming) = frames::parse(frame.get().as_bytes()) {
                    self.pending.extend(self.session.on_frame(incoming));
                }
            }
            ("sent", Some(frame)) => {
                let mut bytes = frame.get().as_bytes().to_vec();
                bytes.push(b'\n');
                self.sent.push((line.end, bytes));
                // The journaled frame is what the session gave, in the same order; an interrupt is sent beside it.
                // Compared as a whole: a task may well speak of an interrupt.
                if self.sent.last().is_none_or(|(_, bytes)| *bytes != Session::interrupt()) {
                    self.done(|step| matches!(step, Step::Send(_)));
                }
            }
            ("tool", _) => {
                // A call that waited then: its decision is in the journal, and nothing has to be found out again.
                let steps = self.session.on_journaled(line);
                if !steps.is_empty() {
                    self.done(
                        |step| matches!(step, Step::Find(errand) if errand.request_id == line.request_id),
                    );
                    self.pending.extend(steps);
                }
                self.done(|step| matches!(step, Step::Event(Body::Tool { .. })));
            }
            ("charge", _) => self.trouble = trouble(line.status),
            ("refused", _) => self.trouble = Some(Trouble::Refused),
            ("exit", _) => {
                let (code, oom_kills) = (line.code, line.oom_kills);
                self.figures =
                    Some(ExitFigures { peak_memory_bytes: line.peak_memory_bytes, cpu_us: line.cpu_us });
                self.exit = Some(AgentExit { code, oom_kills, stderr_tail: String::new() });
            }
            _ => {}
        }
    }

    /// Takes the first step of a kind off the list: an event tells that it was done.
    fn done(&mut self, kind: impl Fn(&Step) -> bool) {
        if let Some(at) = self.pending.iter().position(kind) {
            self.pending.remove(at);
        }
    }
}

/// What a request that ended with this status means for the job.
fn trouble(status: u16) -> Option<Trouble> {
    (status == 0 || status >= 400).then_some(Trouble::Provider(status))
}

/// Cleans up after a job whose record cannot be opened or written, and walks its row to `Done`: tries until the
/// store takes it, since a job that nobody moves any more would never end. None where there is no such job.
pub async fn close_row(parts: &Arc<Parts>, job: &JobId, error: &RecordError) -> Option<(State, Totals)> {
    super::destroy(parts, job).await;
    park::forget_work(parts, job).await;
    let failure = Failure::new(Phase::Collect, FailReason::Internal, error.to_string());
    let mut pause = Duration::from_millis(250);
    loop {
        match force_done(&parts.store, job, &failure).await {
            Ok(closed) => return Some(closed),
            Err(error @ (StoreError::NoSuchJob { .. } | StoreError::Closed)) => {
                tracing::error!(%job, %error, "the row of a failed job cannot be closed");
                return None;
            }
            Err(error) => {
                tracing::error!(%job, %error, "the row of a failed job cannot be closed; trying again")
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(CLOSE_PAUSE_MAX);
    }
}

/// Walks a row to `Done` from wherever it stands.
async fn force_done(store: &Store, job: &JobId, failure: &Failure) -> Result<(State, Totals), StoreError> {
    let now = clock::wall_ms();
    let row = store.job(job).await?.ok_or_else(|| StoreError::NoSuchJob { job: job.clone() })?.row;
    if row.state.is_done() {
        return Ok((row.state, row.totals.unwrap_or_default()));
    }
    store.release_open(job, now).await?;
    let spend = store.spend(job).await?;
    let mut state = row.state;
    if matches!(state, State::Preparing | State::Running | State::Stopping { .. } | State::Parking { .. }) {
        state = store.transition(job, &state, &Input::CellEnded, None, now).await?;
    }
    let totals = Totals {
        charged_micro_usd: spend.charged,
        usage: spend.usage,
        requests: spend.requests,
        ..Totals::default()
    };
    let outcome = Outcome::Failed(failure.clone());
    Ok((store.finish(job, &state, outcome, totals.clone(), None, None, now).await?, totals))
}

/// Where followers find the live end of a job's journal. An entry lives while somebody writes or follows.
#[derive(Debug, Clone, Default)]
pub struct Feeds {
    jobs: Arc<Mutex<HashMap<JobId, watch::Sender<Option<Feed>>>>>,
}

impl Feeds {
    /// The feed of a job, now and whenever it changes: none while nobody writes.
    pub fn follow(&self, job: &JobId) -> watch::Receiver<Option<Feed>> {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        // Entries that nobody follows any more and nobody writes to are not worth keeping.
        jobs.retain(|_, sender| sender.receiver_count() > 0 || sender.borrow().is_some());
        jobs.entry(job.clone()).or_insert_with(|| watch::Sender::new(None)).subscribe()
    }

    /// Number of the last event that a job's writer has published; none while nobody writes.
    pub fn last_seq(&self, job: &JobId) -> Option<u64> {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.get(job).and_then(|sender| sender.borrow().as_ref().map(Feed::last_seq))
    }

    /// A writer has begun.
    pub fn publish(&self, job: &JobId, feed: Feed) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.entry(job.clone()).or_insert_with(|| watch::Sender::new(None)).send_replace(Some(feed));
    }

    /// The writer has ended; followers look at the row again.
    pub fn close(&self, job: &JobId) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = jobs.remove(job) {
            sender.send_replace(None);
        }
    }
}
