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
use crate::link::{ExitReport, ExitStatus, Link, LinkEvent, LinkHandle, OutputStream};
use crate::session::{AgentExit, Session, Step};

/// Longest line of the CLI, in bytes. Longer than any seen (a 2 MB paste echoed), shorter than the cell's
/// buffer, so that a line always fits into what may stay unacknowledged.
pub const LINE_BYTES_MAX: usize = 8 * 1024 * 1024;
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
    /// The last provider status that was a failure.
    pub provider_status: Option<u16>,
}

/// How far the ending of a cell has come.
#[derive(Debug, Clone, Copy)]
enum Ending {
    NotYet,
    /// The CLI was asked to end, or has told that it will.
    Asked { until: Instant },
    /// It got SIGTERM.
    Terminated { until: Instant },
    /// Everything in the cell got SIGKILL.
    Killed { until: Instant },
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
    lines: Lines,
    stderr: VecDeque<u8>,
    stdin_end: u64,
    resend: Vec<(u64, Vec<u8>)>,
    pending: Vec<Step>,
    begun: Instant,
    booted: Option<Instant>,
    activity: Instant,
    ending: Ending,
    over: bool,
    failure: Option<Failure>,
    provider_status: Option<u16>,
}

enum Next {
    Link(LinkEvent),
    Gateway(GatewayEvent),
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
        let Prepared { session, link, lease, container, pending, sent, booted } = prepared;
        Self {
            parts,
            stop,
            session,
            to_cell: link.handle(),
            link,
            lease,
            container,
            lines: Lines::new(record.recovered.stdout_end),
            stderr: VecDeque::new(),
            stdin_end: record.recovered.stdin_end,
            resend: sent,
            pending,
            record,
            begun: now,
            booted: booted.then_some(now),
            activity: now,
            ending: Ending::NotYet,
            over: false,
            failure: None,
            provider_status: None,
        }
    }

    /// Lives until the cell's processes are gone.
    ///
    /// # Errors
    /// [`RecordError`] when the record cannot be written; the caller destroys the cell then.
    pub async fn run(mut self) -> Result<Ended, RecordError> {
        let steps = std::mem::take(&mut self.pending);
        self.steps(steps).await?;
        let parts = self.parts.clone();
        let container = self.container.clone();
        let mut ended = std::pin::pin!(wait(&parts, &container));
        let mut container_gone = None;
        let exit = loop {
            let deadline = self.deadline(container_gone.as_ref().map(|(_, until)| *until));
            let next = tokio::select! {
                biased;
                event = self.link.next() => Next::Link(event),
                event = self.lease.next_event() => Next::Gateway(event),
                Ok(()) = self.stop.changed() => Next::Wish,
                exit = &mut ended, if container_gone.is_none() => Next::ContainerEnded(exit),
                () = tokio::time::sleep_until(deadline) => Next::Timer,
            };
            match next {
                Next::Link(LinkEvent::Exited(report)) => break self.exited(&report)?,
                Next::Link(LinkEvent::SpawnFailed { errno, message }) => {
                    let words = format!("the CLI could not be started in the cell: {message} (errno {errno})");
                    self.fail(Phase::Boot, FailReason::AgentStart, words);
                    break agent_exit(127, 0, String::new());
                }
                Next::Link(event) => self.on_link(event).await?,
                Next::Gateway(event) => self.on_gateway(event).await?,
                Next::Wish => self.on_wish().await?,
                Next::ContainerEnded(exit) => {
                    // Its last frames may still be on their way to us.
                    let exit = exit.map_err(|e| e.to_string());
                    container_gone = Some((exit, Instant::now() + LAST_WORDS));
                }
                Next::Timer => match &container_gone {
                    Some((exit, until)) if Instant::now() >= *until => break self.unseen_exit(exit),
                    _ => {
                        if let Some(exit) = self.on_timer().await? {
                            break exit;
                        }
                    }
                },
            }
        };
        self.leave(exit).await
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
            let words = format!("the CLI did not get ready within {seconds} s; its last words: {}", self.tail());
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
        self.ending = Ending::Asked { until: Instant::now() + self.parts.settings.cancel_grace / 2 };
        Ok(())
    }

    async fn on_link(&mut self, event: LinkEvent) -> Result<(), RecordError> {
        match event {
            LinkEvent::Connected { stdin_received } => {
                // Only a restarted daemon has something to send again; later the link does it by itself.
                for (end, bytes) in std::mem::take(&mut self.resend) {
                    if end > stdin_received {
                        self.input(end - bytes.len() as u64, bytes);
                    }
                }
                Ok(())
            }
            LinkEvent::Stdout { end, bytes } => self.on_stdout(end, &bytes).await,
            LinkEvent::Stderr { end, bytes } => self.on_stderr(end, &bytes),
            LinkEvent::Hostile { what } => {
                self.record.push(&Body::Note { text: format!("somebody in the cell spoke out of turn: {what}") })?;
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
            if line.is_empty() {
                return Ok(());
            }
            match frames::parse(line) {
                Some(incoming) => {
                    record.journal.push_frame(line, line_end, now_ms);
                    steps.extend(session.on_frame(incoming));
                }
                None => {
                    let text = String::from_utf8_lossy(line).into_owned();
                    record.journal.push(&Body::Output { stream: Stream::Stdout, end: line_end, text }, now_ms)?;
                }
            }
            Ok::<(), RecordError>(())
        })?;
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
            let length = frame.len() as u64;
            self.input(at, frame);
            at += length;
        }
        Ok(())
    }

    async fn on_gateway(&mut self, event: GatewayEvent) -> Result<(), RecordError> {
        self.activity = Instant::now();
        self.note_gateway(&event)?;
        self.record.commit()?;
        match event {
            GatewayEvent::BudgetExhausted { spent, limit } => {
                let detail = format!("{spent} USD of {limit} USD are spent, and the next request needs more than is left");
                self.end(StopReason::Budget, detail).await
            }
            GatewayEvent::Requested { .. }
            | GatewayEvent::Charged { .. }
            | GatewayEvent::Refused { .. }
            | GatewayEvent::ProviderFault { .. } => Ok(()),
        }
    }

    fn note_gateway(&mut self, event: &GatewayEvent) -> Result<(), RecordError> {
        note_gateway(self.parts, self.record, event, &mut self.provider_status)
    }

    fn exited(&mut self, report: &ExitReport) -> Result<AgentExit, RecordError> {
        let code = match report.status {
            ExitStatus::Code(code) => code,
            ExitStatus::Signal(signal) => 128 + signal,
        };
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

    /// The container ended and PID 1 said nothing of it.
    fn unseen_exit(&mut self, exit: &Result<Exit, String>) -> AgentExit {
        let words = match exit {
            Ok(exit) => {
                let why = exit.error.clone().unwrap_or_default();
                format!("the cell ended without a last word, with code {}{why} {}", exit.code, exit.stderr_tail)
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

    /// Closes the way to the model and the link; requests still under way are followed to their end.
    async fn leave(self, exit: AgentExit) -> Result<Ended, RecordError> {
        let Self { parts, record, session, link, lease, begun, failure, mut provider_status, .. } = self;
        parts.metrics.phase(Phase::Run, begun.elapsed().as_secs_f64());
        for event in lease.destroy().await {
            note_gateway(parts, record, &event, &mut provider_status)?;
        }
        record.commit()?;
        if let Err(error) = link.destroy().await {
            tracing::warn!(job = %record.job, %error, "the socket of a cell is left to the sweep");
        }
        Ok(Ended { session: Some(session), exit: Some(exit), failure, provider_status })
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

fn note_gateway(
    parts: &Parts,
    record: &mut Record,
    event: &GatewayEvent,
    provider_status: &mut Option<u16>,
) -> Result<(), RecordError> {
    let body = match event {
        GatewayEvent::Requested { model, reserved } => {
            Body::Request { model: model.clone(), reserved_micro_usd: *reserved }
        }
        GatewayEvent::Charged { model, usage, charged, status, duration_ms, .. } => {
            parts.metrics.charged(model, usage, *charged);
            *provider_status = (*status == 0 || *status >= 400).then_some(*status);
            Body::Charge {
                model: model.clone(),
                status: *status,
                usage: *usage,
                charged_micro_usd: *charged,
                duration_ms: *duration_ms,
            }
        }
        GatewayEvent::Refused { status, why } => {
            parts.metrics.refused();
            Body::Refused { status: *status, why: why.as_str().to_owned() }
        }
        GatewayEvent::ProviderFault { status, .. } => {
            *provider_status = Some(status.unwrap_or(0));
            return Ok(());
        }
        GatewayEvent::BudgetExhausted { .. } => return Ok(()),
    };
    record.push(&body)?;
    Ok(())
}

/// Cuts a byte stream into lines and keeps the last, unfinished one.
#[derive(Debug)]
pub(crate) struct Lines {
    /// Offset after the last whole line.
    end: u64,
    part: Vec<u8>,
    skipping: bool,
}

/// What a feed has done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Whole {
    /// Offset after the last whole line: what may be acknowledged.
    pub end: u64,
    /// A line was over the limit and was dropped.
    pub too_long: bool,
}

impl Lines {
    pub(crate) fn new(end: u64) -> Self {
        Self { end, part: Vec::new(), skipping: false }
    }

    /// Takes the bytes that end at offset `end` of the stream.
    pub(crate) fn feed<E>(
        &mut self,
        end: u64,
        bytes: &[u8],
        mut line: impl FnMut(&[u8], u64) -> Result<(), E>,
    ) -> Result<Whole, E> {
        let start = end - bytes.len() as u64;
        let mut rest = bytes;
        let mut too_long = false;
        while let Some(at) = memchr::memchr(b'\n', rest) {
            let (head, tail) = (&rest[..at], &rest[at + 1..]);
            self.end = start + (bytes.len() - tail.len()) as u64;
            if std::mem::take(&mut self.skipping) {
                self.part.clear();
            } else if self.part.is_empty() {
                line(head, self.end)?;
            } else {
                self.part.extend_from_slice(head);
                let whole = std::mem::take(&mut self.part);
                line(&whole, self.end)?;
            }
            rest = tail;
        }
        if self.part.len() + rest.len() > LINE_BYTES_MAX {
            too_long = !self.skipping;
            self.skipping = true;
            self.part = Vec::new();
        } else if !self.skipping {
            self.part.extend_from_slice(rest);
        }
        let ack = if self.skipping { end } else { self.end };
        Ok(Whole { end: ack, too_long })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_cut_gives_the_same_lines(text in "[a-c\n]{0,60}", cuts in proptest::collection::vec(1usize..9, 0..40)) {
            let bytes = text.as_bytes();
            let mut lines = Lines::new(100);
            let mut seen = Vec::new();
            let mut at = 0;
            let mut cuts = cuts.into_iter();
            while at < bytes.len() {
                let next = (at + cuts.next().unwrap_or(bytes.len())).min(bytes.len());
                let whole = lines.feed(100 + next as u64, &bytes[at..next], |line, end| {
                    seen.push((String::from_utf8_lossy(line).into_owned(), end));
                    Ok::<(), ()>(())
                });
                let done = bytes[..next].iter().rposition(|b| *b == b'\n').map_or(0, |p| p + 1);
                prop_assert_eq!(whole, Ok(Whole { end: 100 + done as u64, too_long: false }));
                at = next;
            }
            let mut expected = Vec::new();
            let mut end = 100;
            for part in text.split_inclusive('\n').filter(|p| p.ends_with('\n')) {
                end += part.len() as u64;
                expected.push((part.trim_end_matches('\n').to_owned(), end));
            }
            prop_assert_eq!(seen, expected);
        }
    }

    #[test]
    fn an_endless_line_is_dropped_and_acknowledged() {
        let mut lines = Lines::new(0);
        let chunk = vec![b'x'; LINE_BYTES_MAX];
        let mut none = |_: &[u8], _: u64| Ok::<(), ()>(());
        let length = chunk.len() as u64;
        assert_eq!(lines.feed(length, &chunk, &mut none), Ok(Whole { end: 0, too_long: false }));
        assert_eq!(lines.feed(length + 1, b"x", &mut none), Ok(Whole { end: length + 1, too_long: true }));
        assert_eq!(lines.feed(length + 2, b"x", &mut none), Ok(Whole { end: length + 2, too_long: false }));
        let mut seen = Vec::new();
        let after = lines.feed(length + 6, b"x\nab\n"[1..].as_ref(), |l, _| {
            seen.push(l.to_vec());
            Ok::<(), ()>(())
        });
        assert_eq!(after, Ok(Whole { end: length + 6, too_long: false }));
        assert_eq!(seen, [b"ab".to_vec()]);
    }
}
