//! The live part of a cell: one loop that carries the CLI's lines into the journal and the session, the
//! session's frames back, the gateway's news beside them, and the limits over all. It acknowledges bytes
//! to the cell only after they are in the journal, and sends nothing that is not journaled before.

mod ending;
mod setup;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::value::RawValue;
use tokio::sync::watch;
use tokio::time::Instant;

use super::errands::{Errands, Found, Place};
use super::lines::{LINE_BYTES_MAX, Lines};
use super::park::{self, Seen};
use super::prepare::Prepared;
use super::record::{ExitFigures, Record, RecordError};
use super::rooms::inodes_max;
use super::space::{Bounds, Watch};
use super::steps::Steps;
use super::work;
use super::{Ended, Parts, StopWish, agent_exit, wait};
use crate::agent::frames;
use crate::clock;
use crate::engine::{ContainerId, EngineError, Exit};
use crate::event::{Body, Stream};
use crate::gateway::{GatewayEvent, Lease};
use crate::job::outcome::Failure;
use crate::job::{FailReason, Input, Parked, Phase, State, StopReason};
use crate::link::{ExitReason, ExitReport, ExitStatus, Link, LinkEvent, LinkHandle, OutputStream};
use crate::money::{MicroUsd, Scope};
use crate::session::{AgentExit, Session, Step, Trouble, What};

/// What the cell keeps of each stream until it is acknowledged, in bytes.
pub const CELL_BUFFER_BYTES_MAX: u32 = 16 * 1024 * 1024;
/// Events of the gateway that are journaled in one commit.
const GATEWAY_EVENTS_MAX: usize = 32;
/// How much of stderr's end is kept for error messages, in bytes.
const STDERR_TAIL_BYTES: usize = 2048;
/// Wait for the CLI to end after the task is over, before it is ended.
const OVER_GRACE: Duration = Duration::from_secs(10);
/// Wait for what is still on its way when the container ended without a last word.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Wait for the exit report after everything was killed.
const KILL_GRACE: Duration = Duration::from_secs(5);

/// How far the ending of a cell has come.
#[derive(Debug, Clone, Copy)]
enum Ending {
    NotYet,
    /// The CLI was asked to end, or has told that it will.
    Asked {
        until: Instant,
    },
    /// It got SIGTERM.
    Terminated {
        until: Instant,
    },
    /// Everything in the cell got SIGKILL.
    Killed {
        until: Instant,
    },
}

/// The loop's state.
#[derive(Debug)]
pub struct Live<'a> {
    parts: &'a Arc<Parts>,
    record: &'a mut Record,
    stop: watch::Receiver<StopWish>,
    session: Session,
    link: Link,
    to_cell: LinkHandle,
    lease: Lease,
    container: ContainerId,
    dir: std::path::PathBuf,
    errands: Errands,
    lines: Lines,
    stderr: VecDeque<u8>,
    stdin_end: u64,
    /// Frames by their end offset, until the cell says which of them it has: none once it was there.
    unsent: Option<Vec<(u64, Vec<u8>)>>,
    pending: Vec<Step>,
    begun: Instant,
    /// The job's own commands, until the last one has ended.
    setup: Option<Steps>,
    /// When the CLI was started.
    started: Instant,
    booted: Option<Instant>,
    activity: Instant,
    ending: Ending,
    over: bool,
    failure: Option<Failure>,
    trouble: Option<Trouble>,
    seen: Seen,
    /// What is left of the wall limit for this attempt, from `begun`.
    wall: Duration,
    watch: Watch,
}

enum Next {
    Full(String),
    Link(LinkEvent),
    Gateway(GatewayEvent),
    Found(Found),
    Wish,
    Timer,
    ContainerEnded(Result<Exit, EngineError>),
}

impl<'a> Live<'a> {
    /// Takes over a prepared cell.
    pub fn new(
        parts: &'a Arc<Parts>,
        record: &'a mut Record,
        prepared: Prepared,
        stop: watch::Receiver<StopWish>,
    ) -> Self {
        let now = Instant::now();
        let wall = Duration::from_millis(record.wall_left_ms());
        let cell_dir = parts.settings.cells_dir().join(prepared.cell.as_str());
        let disk = record.accepted.plan.limits.disk_bytes;
        let bounds = Bounds {
            bytes_max: disk,
            inodes_max: inodes_max(disk),
            reserve_bytes: parts.settings.disk_reserve_bytes,
        };
        let watch = Watch::new(parts.space.clone(), record.job.clone(), cell_dir, bounds);
        let Prepared { session, link, lease, cell, container, setup, pending, sent, booted, age, trouble } =
            prepared;
        let begun = now.checked_sub(age).unwrap_or(now);
        Self {
            parts,
            stop,
            session,
            to_cell: link.handle(),
            link,
            lease,
            container,
            dir: parts.settings.cells_dir().join(cell.as_str()),
            errands: Errands::default(),
            lines: Lines::new(record.recovered.stdout_end),
            stderr: VecDeque::new(),
            stdin_end: record.recovered.stdin_end,
            unsent: Some(sent),
            pending,
            record,
            // A cell's wall limit goes on through a restart of the daemon.
            begun,
            setup,
            started: begun,
            booted: booted.then_some(now),
            activity: now,
            ending: Ending::NotYet,
            over: false,
            failure: None,
            trouble,
            seen: Seen::default(),
            wall,
            watch,
        }
    }

    /// Lives until the cell's processes are gone.
    ///
    /// # Errors
    /// [`RecordError`] when the record cannot be written; the caller destroys the cell then.
    pub async fn run(mut self) -> Result<Ended, RecordError> {
        let exit = self.live().await;
        self.leave(exit).await
    }

    async fn live(&mut self) -> Result<AgentExit, RecordError> {
        let steps = std::mem::take(&mut self.pending);
        self.steps(steps).await?;
        self.begin_setup()?;
        let parts = self.parts.clone();
        let container = self.container.clone();
        let mut ended = std::pin::pin!(wait(&parts, &container));
        let mut container_gone = None;
        loop {
            let deadline = self.deadline(container_gone.as_ref().map(|(_, until)| *until));
            // What comes seldom goes first: a cell that never stops printing must not keep its own end away.
            let next = tokio::select! {
                biased;
                Ok(()) = self.stop.changed() => Next::Wish,
                () = tokio::time::sleep_until(deadline) => Next::Timer,
                exit = &mut ended, if container_gone.is_none() => Next::ContainerEnded(exit),
                why = self.watch.next(), if self.failure.is_none() => Next::Full(why),
                event = self.lease.next_event() => Next::Gateway(event),
                found = self.errands.next() => Next::Found(found),
                event = self.link.next() => Next::Link(event),
            };
            match next {
                Next::Link(LinkEvent::Exited(report)) => return self.exited(&report).await,
                Next::Link(LinkEvent::SpawnFailed { errno, message }) => {
                    let words =
                        format!("the CLI could not be started in the cell: {message} (errno {errno})");
                    self.fail(Phase::Boot, FailReason::AgentStart, words);
                    return Ok(agent_exit(127, 0, String::new()));
                }
                Next::Link(event) => self.on_link(event).await?,
                Next::Gateway(event) => self.on_gateway(event).await?,
                Next::Found((request_id, number, finding)) => {
                    let steps = self.session.on_found(&request_id, number, finding);
                    self.steps(steps).await?;
                }
                Next::Wish => self.on_wish().await?,
                Next::Full(why) => self.disk_full(why),
                Next::ContainerEnded(exit) => {
                    // Its last frames may still be on their way to us.
                    let exit = exit.map_err(|e| e.to_string());
                    container_gone = Some((exit, Instant::now() + LAST_WORDS));
                }
                Next::Timer => match &container_gone {
                    Some((exit, until)) if Instant::now() >= *until => return Ok(self.unseen_exit(exit)),
                    _ => {
                        if let Some(exit) = self.on_timer().await? {
                            return Ok(exit);
                        }
                    }
                },
            }
        }
    }

    /// The next moment at which something is due without anything happening.
    fn deadline(&self, last_words: Option<Instant>) -> Instant {
        let limits = &self.record.accepted.plan.limits;
        let due = match self.ending {
            Ending::Asked { until } | Ending::Terminated { until } | Ending::Killed { until } => until,
            Ending::NotYet => {
                let silent = self.activity + Duration::from_millis(limits.silence_ms);
                let wall = self.begun + self.wall;
                match (self.setup.as_ref().and_then(Steps::deadline), self.booted) {
                    (Some(until), _) => until.min(wall),
                    (None, Some(_)) => silent.min(wall),
                    (None, None) => (self.started + self.parts.settings.boot_max).min(wall),
                }
            }
        };
        last_words.map_or(due, |until| due.min(until))
    }

    async fn on_timer(&mut self) -> Result<Option<AgentExit>, RecordError> {
        let now = Instant::now();
        if now < self.deadline(None) {
            return Ok(None);
        }
        let grace = self.parts.settings.cancel_grace / 2;
        match self.ending {
            Ending::NotYet => self.limit_reached(now).await?,
            Ending::Asked { .. } => {
                self.to_cell.signal(libc::SIGTERM);
                self.ending = Ending::Terminated { until: now + grace };
            }
            Ending::Terminated { .. } => {
                self.to_cell.kill();
                self.ending = Ending::Killed { until: now + KILL_GRACE };
            }
            Ending::Killed { .. } => {
                if let Err(error) = self.parts.engine.kill(&self.container).await {
                    tracing::warn!(job = %self.record.job, %error, "cannot kill the cell; destroying it");
                }
                return Ok(Some(agent_exit(128 + libc::SIGKILL, 0, self.tail())));
            }
        }
        Ok(None)
    }

    async fn limit_reached(&mut self, now: Instant) -> Result<(), RecordError> {
        let limits = &self.record.accepted.plan.limits;
        if now >= self.begun + self.wall {
            let detail = format!("{} s from the start of the cell", limits.wall_ms / 1000);
            return self.end(StopReason::Deadline, detail).await;
        }
        if let Some(setup) = &self.setup {
            let late = setup.late();
            self.setup_failed(late);
            return Ok(());
        }
        if self.booted.is_none() {
            let seconds = self.parts.settings.boot_max.as_secs();
            let words =
                format!("the CLI did not get ready within {seconds} s; its last words: {}", self.tail());
            self.fail(Phase::Boot, FailReason::AgentStart, words);
            self.to_cell.kill();
            self.ending = Ending::Killed { until: now + KILL_GRACE };
            return Ok(());
        }
        let detail = format!("no output for {} s", limits.silence_ms / 1000);
        self.end(StopReason::Silent, detail).await
    }

    /// Nothing more can be written: what the agent still does would fail for a reason that it cannot see.
    fn disk_full(&mut self, why: String) {
        self.fail(Phase::Run, FailReason::DiskFull, why);
        self.lease.revoke();
        self.to_cell.kill();
        self.ending = Ending::Killed { until: Instant::now() + KILL_GRACE };
    }

    async fn on_wish(&mut self) -> Result<(), RecordError> {
        let wish = self.stop.borrow_and_update().clone();
        match wish {
            Some((reason, detail)) => self.end(reason, detail).await,
            None => Ok(()),
        }
    }

    /// Decides a stop: stored first, then the way to the model is closed, then the CLI is asked.
    async fn end(&mut self, reason: StopReason, detail: String) -> Result<(), RecordError> {
        let parking = matches!(self.record.state(), State::Parking { .. });
        if matches!(self.record.state(), State::Stopping { .. }) || self.failure.is_some() {
            return Ok(());
        }
        if parking && reason == StopReason::Drain {
            // It gives up its cell anyway, and waits for the next daemon as well.
            return Ok(());
        }
        self.record.push(&Body::Stop { reason, detail })?;
        self.record.step(self.parts, Input::Stop(reason)).await?;
        if parking {
            return Ok(());
        }
        self.interrupt().await
    }

    /// Decides to park: like a stop, except that the job goes on later. Not where its end is known already.
    async fn park(&mut self, parked: Parked) -> Result<(), RecordError> {
        let goes_on = matches!(self.record.state(), State::Preparing | State::Running);
        if !goes_on || self.over || self.failure.is_some() {
            return Ok(());
        }
        self.record.step(self.parts, Input::Park(parked)).await?;
        self.interrupt().await
    }

    async fn interrupt(&mut self) -> Result<(), RecordError> {
        self.lease.revoke();
        let interrupt = Session::interrupt();
        self.send(interrupt)?;
        self.flush().await?;
        if matches!(self.ending, Ending::NotYet | Ending::Asked { .. }) {
            self.ending = Ending::Asked { until: Instant::now() + self.parts.settings.cancel_grace / 2 };
        }
        Ok(())
    }

    async fn on_link(&mut self, event: LinkEvent) -> Result<(), RecordError> {
        match event {
            LinkEvent::Connected { stdin_received } => {
                // The first time; later the link sends again by itself. In order, from the first byte that the
                // cell lacks: what is new comes after what an earlier daemon journaled and did not get across.
                for (end, bytes) in self.unsent.take().unwrap_or_default() {
                    if end > stdin_received {
                        self.input(end - bytes.len() as u64, bytes);
                    }
                }
                Ok(())
            }
            LinkEvent::Stdout { end, bytes } => self.on_stdout(end, &bytes).await,
            LinkEvent::Stderr { end, bytes } => self.on_stderr(end, &bytes),
            LinkEvent::Hostile { what } => {
                self.record
                    .push(&Body::Note { text: format!("somebody in the cell spoke out of turn: {what}") })?;
                self.record.commit()
            }
            LinkEvent::StepEnded { index, status } => self.on_step(index, status).await,
            LinkEvent::Disconnected | LinkEvent::StdinAcked { .. } => Ok(()),
            // Taken by the loop itself.
            LinkEvent::Exited(_) | LinkEvent::SpawnFailed { .. } => Ok(()),
        }
    }

    async fn on_stdout(&mut self, end: u64, bytes: &[u8]) -> Result<(), RecordError> {
        self.activity = Instant::now();
        let now_ms = clock::wall_ms();
        let mut steps = Vec::new();
        let Self { lines, record, session, .. } = self;
        let whole = lines.feed(end, bytes, |line, line_end| {
            // Every line leaves an event with its offset, an empty one too: after a restart the stream is taken
            // up where the journal ends, and the cell has forgotten what was acknowledged.
            match frames::parse(line) {
                Some(incoming) => {
                    record.journal.push_frame(line, line_end, now_ms);
                    steps.extend(session.on_frame(incoming));
                }
                None => {
                    let text = String::from_utf8_lossy(line).into_owned();
                    record
                        .journal
                        .push(&Body::Output { stream: Stream::Stdout, end: line_end, text }, now_ms)?;
                }
            }
            Ok::<(), RecordError>(())
        })?;
        if whole.too_long {
            let text = format!("[hotcell dropped a line of more than {LINE_BYTES_MAX} bytes]");
            self.record.push(&Body::Output { stream: Stream::Stdout, end: whole.end, text })?;
        }
        self.record.commit()?;
        if !steps.is_empty() {
            self.steps(steps).await?;
        }
        if whole.too_long && self.failure.is_none() {
            let words = format!("a line of the CLI has more than {LINE_BYTES_MAX} bytes");
            self.broken(words);
        }
        self.to_cell.ack(OutputStream::Stdout, whole.end);
        Ok(())
    }

    fn on_stderr(&mut self, end: u64, bytes: &[u8]) -> Result<(), RecordError> {
        self.activity = Instant::now();
        if let Some(setup) = &mut self.setup {
            setup.heard(bytes);
        }
        self.stderr.extend(bytes);
        let over = self.stderr.len().saturating_sub(STDERR_TAIL_BYTES);
        self.stderr.drain(..over);
        let text = String::from_utf8_lossy(bytes).trim_end_matches('\n').to_owned();
        self.record.push(&Body::Output { stream: Stream::Stderr, end, text })?;
        self.record.commit()?;
        self.to_cell.ack(OutputStream::Stderr, end);
        Ok(())
    }

    async fn steps(&mut self, steps: Vec<Step>) -> Result<(), RecordError> {
        for step in steps {
            match step {
                Step::Send(frame) => self.send(frame)?,
                Step::Event(body) => {
                    if let Body::Tool { decision, .. } = &body {
                        self.parts.metrics.tool(*decision);
                    }
                    self.record.push(&body)?;
                }
                Step::Find(errand) => {
                    let pid = match &errand.what {
                        What::Paths(_) => self.parts.engine.state_pid(&self.container).await.ok().flatten(),
                        What::Hook { .. } => None,
                    };
                    let who = self.record.identity.clone();
                    let workspaces = work::rooms(&self.record.accepted, &self.dir);
                    self.errands.add(errand, Place { who, dir: self.dir.clone(), workspaces, pid });
                }
                Step::Booted => {
                    if self.booted.is_none() {
                        self.booted = Some(Instant::now());
                        self.parts.metrics.phase(Phase::Boot, self.started.elapsed().as_secs_f64());
                        if matches!(self.record.state(), State::Preparing) {
                            self.record.step(self.parts, Input::Booted).await?;
                        }
                    }
                }
                Step::Turn(turns) => {
                    self.parts.metrics.turn();
                    let most = u64::from(self.record.accepted.plan.limits.max_turns);
                    if self.record.carry.turns + turns > most {
                        self.end(StopReason::Turns, format!("{most} turns")).await?;
                    }
                }
                Step::Over => {
                    self.over = true;
                    if matches!(self.ending, Ending::NotYet) {
                        self.ending = Ending::Asked { until: Instant::now() + OVER_GRACE };
                    }
                }
                Step::Broken(words) => self.broken(words),
            }
        }
        self.flush().await
    }

    fn broken(&mut self, words: String) {
        let phase = if self.booted.is_some() { Phase::Run } else { Phase::Boot };
        self.fail(phase, FailReason::AgentProtocol, words);
        self.to_cell.kill();
        self.ending = Ending::Killed { until: Instant::now() + KILL_GRACE };
    }

    /// Journals a frame and keeps it for the next flush.
    fn send(&mut self, frame: Vec<u8>) -> Result<(), RecordError> {
        let text = String::from_utf8_lossy(&frame).trim_end().to_owned();
        let raw = RawValue::from_string(text)
            .map_err(|e| RecordError::Corrupt { what: "frame to the CLI", detail: e.to_string() })?;
        self.stdin_end += frame.len() as u64;
        self.record.push(&Body::Sent { end: self.stdin_end, frame: raw })?;
        self.pending.push(Step::Send(frame));
        Ok(())
    }

    /// Gives bytes to the cell; a CLI that takes none of its input any more cannot be gone on with.
    fn input(&mut self, at: u64, bytes: Vec<u8>) {
        if let Err(error) = self.to_cell.stdin_at(at, Bytes::from(bytes)) {
            self.broken(error.to_string());
        }
    }

    async fn flush(&mut self) -> Result<(), RecordError> {
        self.record.commit()?;
        let mut at = self.stdin_end;
        let frames: Vec<Vec<u8>> = std::mem::take(&mut self.pending)
            .into_iter()
            .filter_map(|step| if let Step::Send(frame) = step { Some(frame) } else { None })
            .collect();
        at -= frames.iter().map(|f| f.len() as u64).sum::<u64>();
        for frame in frames {
            let start = at;
            at += frame.len() as u64;
            match &mut self.unsent {
                Some(unsent) => unsent.push((at, frame)),
                None => self.input(start, frame),
            }
        }
        Ok(())
    }

    /// Journals an event and those that wait behind it in one commit, then acts on each.
    async fn on_gateway(&mut self, first: GatewayEvent) -> Result<(), RecordError> {
        self.activity = Instant::now();
        let more = std::iter::from_fn(|| self.lease.waiting_event()).take(GATEWAY_EVENTS_MAX - 1);
        let events: Vec<GatewayEvent> = std::iter::once(first).chain(more).collect();
        for event in &events {
            if let Some(setup) = &mut self.setup {
                setup.reached(event);
            }
            self.record.note_gateway(self.parts, event, &mut self.trouble)?;
        }
        self.record.commit()?;
        for event in events {
            self.act_on(event).await?;
        }
        Ok(())
    }

    async fn act_on(&mut self, event: GatewayEvent) -> Result<(), RecordError> {
        self.seen.note(&event);
        if let Some(parked) = park::parking(&event) {
            return self.park(parked).await;
        }
        match event {
            GatewayEvent::BudgetExhausted { scope, spent, limit, .. } => {
                self.end(StopReason::Budget, exhausted(scope, spent, limit)).await
            }
            GatewayEvent::Requested { .. }
            | GatewayEvent::Charged { .. }
            | GatewayEvent::Refused { .. }
            | GatewayEvent::ProviderFault { .. }
            | GatewayEvent::ProviderPaused { .. }
            | GatewayEvent::Egress(_) => Ok(()),
        }
    }
}

/// Which budget ended a job, in words.
fn exhausted(scope: Scope, spent: MicroUsd, limit: MicroUsd) -> String {
    let scope = scope.words();
    format!("{scope}: {spent} USD of {limit} USD are spent, and the next request needs more than is left")
}
