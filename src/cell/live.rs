//! The live part of a cell: one loop that carries the CLI's lines into the journal and the session, the
//! session's frames back, the gateway's news beside them, and the limits over all. It acknowledges bytes
//! to the cell only after they are in the journal, and sends nothing that is not journaled before.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::value::RawValue;
use tokio::sync::watch;
use tokio::time::Instant;

use super::errands::{Errands, Found, Place};
use super::lines::{LINE_BYTES_MAX, Lines};
use super::prepare::Prepared;
use super::record::{ExitFigures, Record, RecordError};
use super::{Parts, StopWish, agent_exit};
use crate::agent::frames;
use crate::clock;
use crate::engine::{ContainerId, EngineError, Exit};
use crate::event::{Body, Stream};
use crate::gateway::{GatewayEvent, Lease};
use crate::job::outcome::Failure;
use crate::job::{FailReason, Input, Phase, State, StopReason};
use crate::link::{ExitReason, ExitReport, ExitStatus, Link, LinkEvent, LinkHandle, OutputStream};
use crate::money::{MicroUsd, Scope};
use crate::session::{AgentExit, Session, Step, Trouble, What};

/// What the cell keeps of each stream until it is acknowledged, in bytes.
pub const CELL_BUFFER_BYTES_MAX: u32 = 16 * 1024 * 1024;
/// How much of stderr's end is kept for error messages, in bytes.
const STDERR_TAIL_BYTES: usize = 2048;
/// Wait for the CLI to end after the task is over, before it is ended.
const OVER_GRACE: Duration = Duration::from_secs(10);
/// Wait for what is still on its way when the container ended without a last word.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Pause before an engine that is away is asked again.
const ENGINE_PAUSE: Duration = Duration::from_secs(1);
/// Wait for the exit report after everything was killed.
const KILL_GRACE: Duration = Duration::from_secs(5);

/// What is known when a cell's processes are gone.
#[derive(Debug)]
pub struct Ended {
    /// The conversation.
    pub session: Option<Session>,
    /// How the CLI ended.
    pub exit: Option<AgentExit>,
    /// What went wrong, where it was not the CLI that says so.
    pub failure: Option<Failure>,
    /// What last went wrong on the way to the model.
    pub trouble: Option<Trouble>,
}

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
    booted: Option<Instant>,
    activity: Instant,
    ending: Ending,
    over: bool,
    failure: Option<Failure>,
    trouble: Option<Trouble>,
}

enum Next {
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
        let Prepared { session, link, lease, cell, container, pending, sent, booted, age } = prepared;
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
            begun: now.checked_sub(age).unwrap_or(now),
            booted: booted.then_some(now),
            activity: now,
            ending: Ending::NotYet,
            over: false,
            failure: None,
            trouble: None,
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
                Next::Found((request_id, finding)) => {
                    let steps = self.session.on_found(&request_id, finding);
                    self.steps(steps).await?;
                }
                Next::Wish => self.on_wish().await?,
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
                let wall = self.begun + Duration::from_millis(limits.wall_ms);
                match self.booted {
                    Some(_) => silent.min(wall),
                    None => (self.begun + self.parts.settings.boot_max).min(wall),
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
        if now >= self.begun + Duration::from_millis(limits.wall_ms) {
            let detail = format!("{} s from the start of the cell", limits.wall_ms / 1000);
            return self.end(StopReason::Deadline, detail).await;
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

    async fn on_wish(&mut self) -> Result<(), RecordError> {
        let wish = self.stop.borrow_and_update().clone();
        match wish {
            Some((reason, detail)) => self.end(reason, detail).await,
            None => Ok(()),
        }
    }

    /// Decides a stop: stored first, then the way to the model is closed, then the CLI is asked.
    async fn end(&mut self, reason: StopReason, detail: String) -> Result<(), RecordError> {
        if matches!(self.record.state(), State::Stopping { .. }) || self.failure.is_some() {
            return Ok(());
        }
        self.record.push(&Body::Stop { reason, detail })?;
        self.record.step(self.parts, Input::Stop(reason)).await?;
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
                    self.errands.add(errand, Place { who, dir: self.dir.clone(), pid });
                }
                Step::Booted => {
                    if self.booted.is_none() {
                        self.booted = Some(Instant::now());
                        self.parts.metrics.phase(Phase::Boot, self.begun.elapsed().as_secs_f64());
                        if matches!(self.record.state(), State::Preparing) {
                            self.record.step(self.parts, Input::Booted).await?;
                        }
                    }
                }
                Step::Turn(turns) => {
                    self.parts.metrics.turn();
                    let most = u64::from(self.record.accepted.plan.limits.max_turns);
                    if turns > most {
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

    async fn on_gateway(&mut self, event: GatewayEvent) -> Result<(), RecordError> {
        self.activity = Instant::now();
        self.record.note_gateway(self.parts, &event, &mut self.trouble)?;
        self.record.commit()?;
        match event {
            GatewayEvent::BudgetExhausted { scope, spent, limit, resets_at_ms: None } => {
                self.end(StopReason::Budget, exhausted(scope, spent, limit)).await
            }
            // There will be room at that time: the place to park the job until then.
            GatewayEvent::BudgetExhausted { scope, spent, limit, resets_at_ms: Some(_) } => {
                self.end(StopReason::Budget, exhausted(scope, spent, limit)).await
            }
            GatewayEvent::Requested { .. }
            | GatewayEvent::Charged { .. }
            | GatewayEvent::Refused { .. }
            | GatewayEvent::ProviderFault { .. }
            | GatewayEvent::ProviderPaused { .. } => Ok(()),
        }
    }

    async fn exited(&mut self, report: &ExitReport) -> Result<AgentExit, RecordError> {
        let code = match report.status {
            ExitStatus::Code(code) => code,
            ExitStatus::Signal(signal) => 128 + signal,
        };
        self.last_words()?;
        self.ended_by_init(report.reason).await?;
        self.record.exit =
            Some(ExitFigures { peak_memory_bytes: report.peak_memory_bytes, cpu_us: report.cpu_us });
        // Killed by us after it had said its last word: the word counts.
        let code = if self.over && code > 128 && self.failure.is_none() { 0 } else { code };
        self.record.push(&Body::Exit {
            code,
            oom_kills: report.oom_kills,
            peak_memory_bytes: report.peak_memory_bytes,
            cpu_us: report.cpu_us,
        })?;
        self.record.commit()?;
        self.to_cell.bye();
        Ok(agent_exit(code, report.oom_kills, self.tail()))
    }

    /// A last line without its line feed.
    fn last_words(&mut self) -> Result<(), RecordError> {
        let (end, part) = self.lines.rest();
        if part.is_empty() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&part).into_owned();
        self.record.push(&Body::Output { stream: Stream::Stdout, end, text })?;
        Ok(())
    }

    /// PID 1 holds limits of its own for the time without a daemon: what it did about them is a stop or a loss,
    /// not an error of the CLI.
    async fn ended_by_init(&mut self, reason: ExitReason) -> Result<(), RecordError> {
        let decided =
            self.over || self.failure.is_some() || matches!(self.record.state(), State::Stopping { .. });
        match reason {
            ExitReason::WallLimit if !decided => {
                let detail =
                    "PID 1 of the cell ended it at its wall limit, while the daemon was away".to_owned();
                self.record.push(&Body::Stop { reason: StopReason::Deadline, detail })?;
                self.record.step(self.parts, Input::Stop(StopReason::Deadline)).await
            }
            ExitReason::DeadMan if !decided => {
                let words = "PID 1 of the cell ended it, since no daemon was there for too long";
                self.fail(Phase::Run, FailReason::CellLost, words.to_owned());
                Ok(())
            }
            ExitReason::WallLimit | ExitReason::DeadMan | ExitReason::Agent | ExitReason::Killed => Ok(()),
        }
    }

    /// The container ended and PID 1 said nothing of it.
    fn unseen_exit(&mut self, exit: &Result<Exit, String>) -> AgentExit {
        let words = match exit {
            Ok(exit) => {
                let why = exit.error.clone().unwrap_or_default();
                format!(
                    "the cell ended without a last word, with code {}{why} {}",
                    exit.code, exit.stderr_tail
                )
            }
            Err(error) => format!("the cell is gone: {error}"),
        };
        let oom = exit.as_ref().is_ok_and(|e| e.oom_killed);
        let reason = if oom { FailReason::Oom } else { FailReason::CellLost };
        self.fail(Phase::Run, reason, words);
        agent_exit(exit.as_ref().map_or(137, |e| e.code as i32), u64::from(oom), self.tail())
    }

    fn fail(&mut self, phase: Phase, reason: FailReason, words: String) {
        if self.failure.is_none() {
            self.failure = Some(Failure::new(phase, reason, words));
        }
    }

    fn tail(&self) -> String {
        let bytes: Vec<u8> = self.stderr.iter().copied().collect();
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }

    /// Closes the way to the model and the link, whether the record can still be written or not; requests still
    /// under way are followed to their end.
    async fn leave(self, exit: Result<AgentExit, RecordError>) -> Result<Ended, RecordError> {
        let Self { parts, record, session, link, lease, container, booted, failure, mut trouble, .. } = self;
        if let Some(booted) = booted {
            parts.metrics.phase(Phase::Run, booted.elapsed().as_secs_f64());
        }
        if exit.is_err()
            && let Err(error) = parts.engine.kill(&container).await
        {
            tracing::warn!(job = %record.job, %error, "cannot kill a cell whose record cannot be written; destroying it");
        }
        let last = lease.destroy().await;
        if let Err(error) = link.destroy().await {
            tracing::warn!(job = %record.job, %error, "the socket of a cell is left to the sweep");
        }
        let exit = exit?;
        for event in last {
            record.note_gateway(parts, &event, &mut trouble)?;
        }
        record.commit()?;
        Ok(Ended { session: Some(session), exit: Some(exit), failure, trouble })
    }
}

/// Waits for the container's end. An engine that is away says nothing of it: the cell may well be alive, and
/// what it says itself comes over the link.
async fn wait(parts: &Parts, container: &ContainerId) -> Result<Exit, EngineError> {
    loop {
        match parts.engine.wait(container).await {
            Err(error @ (EngineError::Unavailable { .. } | EngineError::Timeout { .. })) => {
                tracing::warn!(%container, %error, "cannot watch a cell; asking again");
                tokio::time::sleep(ENGINE_PAUSE).await;
            }
            other => return other,
        }
    }
}

/// Which budget ended a job, in words.
fn exhausted(scope: Scope, spent: MicroUsd, limit: MicroUsd) -> String {
    let scope = scope.words();
    format!("{scope}: {spent} USD of {limit} USD are spent, and the next request needs more than is left")
}
