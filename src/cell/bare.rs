//! A cell without an agent: the job's own commands in it, or a command of the submitter's with or without a client that
//! takes part in it. One loop, like that of a live agent: it acknowledges bytes only once they are journaled or with the
//! client, and a client that does not read holds its command and nothing else. It must never start a command before
//! what comes before it has ended well.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::attach::{Attached, FromClient, ToClient};
use super::prepare::Started;
use super::record::{ExitFigures, Record, RecordError};
use super::rooms::inodes_max;
use super::space::{Bounds, Watch};
use super::steps::{Progress, Steps, code_of, missing_tool};
use super::{Ended, Parts, StopWish, agent_exit, wait};
use crate::engine::{ContainerId, EngineError, Exit};
use crate::event::{Body, Stream};
use crate::gateway::{GatewayEvent, Lease};
use crate::job::outcome::Failure;
use crate::job::{FailReason, Input, Phase, State, StopReason};
use crate::link::{ExitReason, ExitReport, Link, LinkEvent, LinkHandle, OutputStream};
use crate::session::AgentExit;

/// Longest wait for the client of a command that runs.
const ATTACH_MAX: Duration = Duration::from_secs(30);
/// Longest wait for a client to take the exit code.
const LAST_WORD_MAX: Duration = Duration::from_secs(5);
/// Wait for the exit report after everything was killed, or after the container ended.
const KILL_GRACE: Duration = Duration::from_secs(5);
/// Input that is on its way to the command; more of it is not read from the client meanwhile, in bytes.
const INPUT_BYTES_MAX: u64 = 4 << 20;
/// What is journaled of the output of a command whose client gets all of it, in bytes of each stream.
const JOURNALED_BYTES_MAX: u64 = 1 << 20;
/// How much of stderr's end is kept for error messages, in bytes.
const TAIL_BYTES: usize = 2048;

/// What runs when the job's own commands have ended.
#[derive(Debug)]
pub(super) enum Main {
    /// Nothing: they are what the cell is for.
    None,
    /// A command.
    Command {
        /// A client takes part.
        attached: bool,
    },
}

/// How far the ending has come.
#[derive(Debug, Clone, Copy)]
enum Ending {
    NotYet,
    /// SIGTERM was sent.
    Terminated {
        until: Instant,
    },
    /// Everything in the cell got SIGKILL, or has ended.
    Killed {
        until: Instant,
    },
}

/// The loop's state.
#[derive(Debug)]
pub(super) struct Bare<'a> {
    parts: &'a Arc<Parts>,
    record: &'a mut Record,
    stop: watch::Receiver<StopWish>,
    link: Link,
    to_cell: LinkHandle,
    lease: Lease,
    container: ContainerId,
    /// What comes first; the front one is under way.
    stages: VecDeque<Steps>,
    main: Main,
    client: Option<mpsc::Sender<ToClient>>,
    input: Option<mpsc::Receiver<FromClient>>,
    /// What the client has not taken yet, and the acknowledgement that waits for that.
    outbox: Option<(ToClient, OutputStream, u64)>,
    /// Bytes of stdin given and taken.
    stdin: (u64, u64),
    journaled: [u64; 2],
    tail: VecDeque<u8>,
    attach_until: Instant,
    wall_until: Instant,
    ending: Ending,
    failure: Option<Failure>,
    watch: Watch,
}

enum Next {
    Wish,
    Timer,
    ContainerEnded(Result<Exit, EngineError>),
    Full(String),
    Gateway(GatewayEvent),
    Client(Attached),
    Input(Option<FromClient>),
    Room,
    Link(LinkEvent),
}

impl<'a> Bare<'a> {
    /// Takes over a started cell.
    pub(super) fn new(
        parts: &'a Arc<Parts>,
        record: &'a mut Record,
        started: Started,
        (stages, main, wall): (VecDeque<Steps>, Main, Duration),
        stop: watch::Receiver<StopWish>,
    ) -> Self {
        let Started { link, lease, cell, container } = started;
        let now = Instant::now();
        let disk = record.accepted.plan.limits.disk_bytes;
        let reserve_bytes = parts.settings.disk_reserve_bytes;
        let bounds = Bounds { bytes_max: disk, inodes_max: inodes_max(disk), reserve_bytes };
        let dir = parts.settings.cells_dir().join(cell.as_str());
        let watch = Watch::new(parts.space.clone(), record.job.clone(), dir, bounds);
        Self {
            parts,
            record,
            stop,
            to_cell: link.handle(),
            link,
            lease,
            container,
            stages,
            main,
            client: None,
            input: None,
            outbox: None,
            stdin: (0, 0),
            journaled: [0; 2],
            tail: VecDeque::new(),
            attach_until: now + ATTACH_MAX,
            wall_until: now + wall,
            ending: Ending::NotYet,
            failure: None,
            watch,
        }
    }

    /// Tells the client this first.
    pub(super) fn greet(mut self, words: Option<&str>) -> Self {
        let line = words.map(|words| ToClient::Stderr(format!("hotcell: {words}\r\n").into()));
        self.outbox = line.map(|line| (line, OutputStream::Stderr, 0));
        self
    }

    /// Lives until the cell's processes are gone.
    ///
    /// # Errors
    /// [`RecordError`] when the record cannot be written; the caller destroys the cell then.
    pub(super) async fn run(mut self) -> Result<Ended, RecordError> {
        let exit = self.live().await;
        self.leave(exit).await
    }

    async fn live(&mut self) -> Result<AgentExit, RecordError> {
        match self.stages.front_mut() {
            Some(stage) => stage.begin(self.record, &self.to_cell)?,
            None => self.begin_main().await?,
        }
        let (parts, container, job) = (self.parts.clone(), self.container.clone(), self.record.job.clone());
        let mut ended = std::pin::pin!(wait(&parts, &container));
        let mut gone = None;
        loop {
            let deadline = self.deadline();
            let (client, input) = (self.client.clone(), &mut self.input);
            let wants_client = matches!(self.main, Main::Command { attached: true }) && client.is_none();
            let wants_input = input.is_some() && self.stdin.0 - self.stdin.1 < INPUT_BYTES_MAX;
            let room = async {
                match &client {
                    // Its end is seen on its other channel.
                    Some(client) => match client.reserve().await {
                        Ok(_) => {}
                        Err(_) => std::future::pending().await,
                    },
                    None => std::future::pending().await,
                }
            };
            let next = tokio::select! {
                biased;
                Ok(()) = self.stop.changed() => Next::Wish,
                () = tokio::time::sleep_until(deadline) => Next::Timer,
                exit = &mut ended, if gone.is_none() => Next::ContainerEnded(exit),
                why = self.watch.next(), if self.failure.is_none() => Next::Full(why),
                event = self.lease.next_event() => Next::Gateway(event),
                attached = parts.attached.take(&job), if wants_client => Next::Client(attached),
                said = receive(input), if wants_input => Next::Input(said),
                () = room, if self.outbox.is_some() => Next::Room,
                event = self.link.next(), if self.outbox.is_none() => Next::Link(event),
            };
            match next {
                Next::Wish => self.on_wish().await?,
                Next::Timer => {
                    if let Some(exit) = self.on_timer(gone.as_ref()).await? {
                        return Ok(exit);
                    }
                }
                Next::ContainerEnded(exit) => {
                    gone = Some(exit.map_err(|e| e.to_string()));
                    // Its last frames may still be on their way to us.
                    self.ending = Ending::Killed { until: Instant::now() + KILL_GRACE };
                }
                Next::Full(why) => self.fail_and_kill(Failure::new(Phase::Run, FailReason::DiskFull, why)),
                Next::Gateway(event) => self.on_gateway(&event)?,
                Next::Client(attached) => {
                    (self.client, self.input) = (Some(attached.to), Some(attached.from))
                }
                Next::Input(said) => self.on_input(said).await?,
                Next::Room => self.hand_over(),
                Next::Link(LinkEvent::Exited(report)) => return self.exited(&report).await,
                Next::Link(LinkEvent::SpawnFailed { errno, message }) => {
                    return self.not_started(errno, &message).await;
                }
                Next::Link(event) => self.on_link(event).await?,
            }
        }
    }

    fn deadline(&self) -> Instant {
        match self.ending {
            Ending::Terminated { until } | Ending::Killed { until } => until,
            Ending::NotYet => {
                let stage = self.stages.front().and_then(Steps::deadline);
                let alone = matches!(self.main, Main::Command { attached: true }) && self.client.is_none();
                let due = stage.map_or(self.wall_until, |stage| stage.min(self.wall_until));
                if alone { due.min(self.attach_until) } else { due }
            }
        }
    }

    async fn on_timer(
        &mut self,
        gone: Option<&Result<Exit, String>>,
    ) -> Result<Option<AgentExit>, RecordError> {
        let now = Instant::now();
        match self.ending {
            Ending::Terminated { .. } => {
                self.kill();
                Ok(None)
            }
            Ending::Killed { .. } => {
                if let Some(exit) = gone {
                    return Ok(Some(self.unseen_exit(exit)));
                }
                if let Err(error) = self.parts.engine.kill(&self.container).await {
                    tracing::warn!(job = %self.record.job, %error, "cannot kill a cell; destroying it");
                }
                Ok(Some(agent_exit(128 + libc::SIGKILL, 0, self.tail())))
            }
            Ending::NotYet if now >= self.wall_until => {
                let detail = "the time limit of the job".to_owned();
                self.end(StopReason::Deadline, detail).await.map(|()| None)
            }
            Ending::NotYet => match self.stages.front() {
                Some(stage) if stage.deadline().is_some_and(|until| now >= until) => {
                    let late = stage.late();
                    self.fail_and_kill(late);
                    Ok(None)
                }
                Some(_) | None => {
                    let detail = format!("no client came within {} s", ATTACH_MAX.as_secs());
                    self.end(StopReason::Cancelled, detail).await.map(|()| None)
                }
            },
        }
    }

    async fn on_wish(&mut self) -> Result<(), RecordError> {
        let wish = self.stop.borrow_and_update().clone();
        match wish {
            Some((reason, detail)) => self.end(reason, detail).await,
            None => Ok(()),
        }
    }

    /// Decides a stop: stored first, then the ways out are closed, then the command is asked to end.
    async fn end(&mut self, reason: StopReason, detail: String) -> Result<(), RecordError> {
        if matches!(self.record.state(), State::Stopping { .. }) || self.failure.is_some() {
            return Ok(());
        }
        self.record.push(&Body::Stop { reason, detail })?;
        self.record.step(self.parts, Input::Stop(reason)).await?;
        self.lease.revoke();
        self.to_cell.signal(libc::SIGTERM);
        if matches!(self.ending, Ending::NotYet) {
            let grace = self.parts.settings.cancel_grace / 2;
            self.ending = Ending::Terminated { until: Instant::now() + grace };
        }
        Ok(())
    }

    fn kill(&mut self) {
        self.to_cell.kill();
        self.ending = Ending::Killed { until: Instant::now() + KILL_GRACE };
    }

    fn fail_and_kill(&mut self, failure: Failure) {
        if self.failure.is_none() && !matches!(self.record.state(), State::Stopping { .. }) {
            self.failure = Some(failure);
        }
        self.lease.revoke();
        self.kill();
    }

    fn on_gateway(&mut self, event: &GatewayEvent) -> Result<(), RecordError> {
        if let Some(stage) = self.stages.front_mut() {
            stage.reached(event);
        }
        self.record.note_gateway(self.parts, event, &mut None)?;
        self.record.commit()
    }

    async fn on_input(&mut self, said: Option<FromClient>) -> Result<(), RecordError> {
        match said {
            Some(FromClient::Stdin(bytes)) => {
                if let Ok(end) = self.to_cell.stdin(bytes) {
                    self.stdin.0 = end;
                }
            }
            Some(FromClient::Eof) => self.to_cell.close_stdin(),
            Some(FromClient::Resize { rows, cols }) => self.to_cell.resize(rows, cols),
            Some(FromClient::Signal(number)) => self.to_cell.signal(number),
            None => {
                self.input = None;
                // Nobody takes it any more.
                self.outbox = None;
                self.end(StopReason::Cancelled, "its client has left".to_owned()).await?;
            }
        }
        Ok(())
    }

    /// Gives the client what waits for it; there is room.
    fn hand_over(&mut self) {
        let Some(client) = &self.client else { return };
        if let Some((what, stream, end)) = self.outbox.take() {
            match client.try_send(what) {
                Ok(()) => self.to_cell.ack(stream, end),
                Err(mpsc::error::TrySendError::Full(what)) => self.outbox = Some((what, stream, end)),
                // Its end is seen on its other channel.
                Err(mpsc::error::TrySendError::Closed(_)) => self.to_cell.ack(stream, end),
            }
        }
    }

    async fn on_link(&mut self, event: LinkEvent) -> Result<(), RecordError> {
        match event {
            LinkEvent::Stdout { end, bytes } => self.on_output(OutputStream::Stdout, end, bytes),
            LinkEvent::Stderr { end, bytes } => {
                match self.stages.front_mut() {
                    Some(stage) => stage.heard(&bytes),
                    None => {
                        self.tail.extend(&bytes);
                        let over = self.tail.len().saturating_sub(TAIL_BYTES);
                        self.tail.drain(..over);
                    }
                }
                self.on_output(OutputStream::Stderr, end, bytes)
            }
            LinkEvent::StdinAcked { offset } => {
                self.stdin.1 = offset;
                Ok(())
            }
            LinkEvent::StepEnded { index, status } => self.step_ended(index, status).await,
            LinkEvent::Hostile { what } => {
                let text = format!("somebody in the cell spoke out of turn: {what}");
                self.record.push(&Body::Note { text })?;
                self.record.commit()
            }
            LinkEvent::Connected { .. } | LinkEvent::Disconnected => Ok(()),
            // Taken by the loop itself.
            LinkEvent::Exited(_) | LinkEvent::SpawnFailed { .. } => Ok(()),
        }
    }

    fn on_output(&mut self, stream: OutputStream, end: u64, bytes: Bytes) -> Result<(), RecordError> {
        let attached = matches!(self.main, Main::Command { attached: true });
        let journaled = &mut self.journaled[stream.index()];
        *journaled = journaled.saturating_add(bytes.len() as u64);
        if !attached || *journaled <= JOURNALED_BYTES_MAX {
            let text = String::from_utf8_lossy(&bytes).trim_end_matches('\n').to_owned();
            let stream = match stream {
                OutputStream::Stdout => Stream::Stdout,
                OutputStream::Stderr => Stream::Stderr,
            };
            self.record.push(&Body::Output { stream, end, text })?;
            self.record.commit()?;
        }
        if !attached || matches!(self.ending, Ending::Killed { .. }) && self.input.is_none() {
            self.to_cell.ack(stream, end);
            return Ok(());
        }
        let what = match stream {
            OutputStream::Stdout => ToClient::Stdout(bytes),
            OutputStream::Stderr => ToClient::Stderr(bytes),
        };
        if self.client.is_some() && self.input.is_none() {
            // It has left.
            self.to_cell.ack(stream, end);
        } else {
            self.outbox = Some((what, stream, end));
        }
        Ok(())
    }

    async fn step_ended(&mut self, index: u32, status: crate::link::ExitStatus) -> Result<(), RecordError> {
        let Some(stage) = self.stages.front_mut() else { return Ok(()) };
        match stage.ended(self.record, (index, status), &self.to_cell)? {
            Progress::Next => Ok(()),
            Progress::Failed(failure) => {
                self.fail_and_kill(failure);
                Ok(())
            }
            Progress::Done => {
                self.parts.metrics.phase(phase_of(stage), stage.elapsed().as_secs_f64());
                self.stages.pop_front();
                match self.stages.front_mut() {
                    Some(stage) => stage.begin(self.record, &self.to_cell),
                    None => self.begin_main().await,
                }
            }
        }
    }

    /// What comes first has ended well.
    async fn begin_main(&mut self) -> Result<(), RecordError> {
        match self.main {
            Main::None => {
                self.kill();
                Ok(())
            }
            Main::Command { .. } => {
                match self.lease.settle_in().await {
                    Ok(last) => last.iter().try_for_each(|event| self.on_gateway(event))?,
                    Err(error) => {
                        let words = format!("cannot open the way out again: {error}");
                        self.fail_and_kill(Failure::new(Phase::Run, FailReason::Internal, words));
                        return Ok(());
                    }
                }
                self.to_cell.start();
                if matches!(self.record.state(), State::Preparing) {
                    self.record.step(self.parts, Input::Booted).await?;
                }
                Ok(())
            }
        }
    }

    async fn exited(&mut self, report: &ExitReport) -> Result<AgentExit, RecordError> {
        let code = code_of(report.status);
        let ours = matches!(self.main, Main::None) && self.failure.is_none() && self.stages.is_empty();
        if report.reason == ExitReason::WallLimit {
            self.end(StopReason::Deadline, "PID 1 of the cell ended it at its time limit".to_owned()).await?;
        }
        let (peak_memory_bytes, cpu_us) = (report.peak_memory_bytes, report.cpu_us);
        if matches!(self.main, Main::Command { .. }) {
            self.record.exit = Some(ExitFigures { peak_memory_bytes, cpu_us });
            self.record.push(&Body::Exit { code, oom_kills: report.oom_kills, peak_memory_bytes, cpu_us })?;
            self.record.commit()?;
        }
        self.to_cell.bye();
        // What never ran has no exit code: the client is told by its job's end.
        let ran = self.stages.is_empty();
        if let Some(client) = self.client.take().filter(|_| ran) {
            // A client that does not take it has left.
            let _ = tokio::time::timeout(LAST_WORD_MAX, client.send(ToClient::Exit(code))).await;
        }
        let interrupted = !self.stages.is_empty() && !matches!(self.record.state(), State::Stopping { .. });
        if interrupted && self.failure.is_none() {
            let words = format!("the cell ended while the job's commands ran, with code {code}");
            self.failure = Some(Failure::new(Phase::Run, FailReason::CellLost, words));
        }
        if code != 0 && self.failure.is_none() && self.watch.is_full() {
            let words = "the command failed while the job's disk space was used up".to_owned();
            self.failure = Some(Failure::new(Phase::Run, FailReason::DiskFull, words));
        }
        Ok(agent_exit(if ours { 0 } else { code }, report.oom_kills, self.tail()))
    }

    async fn not_started(&mut self, errno: i32, message: &str) -> Result<AgentExit, RecordError> {
        self.to_cell.bye();
        let code = if errno == libc::EACCES { 126 } else { 127 };
        let mut words = format!("the command could not be started in the cell: {message} (errno {errno})");
        if let Some(hint) = missing_tool(message) {
            words.push_str(&format!("; {hint}"));
        }
        if let Some(client) = self.client.take() {
            let line = Bytes::from(format!("hotcell: {words}\n"));
            for what in [ToClient::Stderr(line), ToClient::Exit(code)] {
                let _ = tokio::time::timeout(LAST_WORD_MAX, client.send(what)).await;
            }
        }
        self.failure = Some(Failure::new(Phase::Run, FailReason::CommandFailed, words));
        Ok(agent_exit(code, 0, String::new()))
    }

    /// The container ended and PID 1 said nothing of it.
    fn unseen_exit(&mut self, exit: &Result<Exit, String>) -> AgentExit {
        let oom = exit.as_ref().is_ok_and(|exit| exit.oom_killed);
        let words = match exit {
            Ok(exit) => {
                format!("the cell ended without a last word, with code {} {}", exit.code, exit.stderr_tail)
            }
            Err(error) => format!("the cell is gone: {error}"),
        };
        if self.failure.is_none() {
            let reason = if oom { FailReason::Oom } else { FailReason::CellLost };
            self.failure = Some(Failure::new(Phase::Run, reason, words));
        }
        agent_exit(exit.as_ref().map_or(137, |exit| exit.code as i32), u64::from(oom), self.tail())
    }

    fn tail(&self) -> String {
        let bytes: Vec<u8> = self.tail.iter().copied().collect();
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }

    async fn leave(self, exit: Result<AgentExit, RecordError>) -> Result<Ended, RecordError> {
        let Self { parts, record, link, lease, container, failure, stages, .. } = self;
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
            record.note_gateway(parts, &event, &mut None)?;
        }
        record.commit()?;
        let output = stages.front().map(Steps::output).filter(|_| failure.is_some());
        Ok(Ended { output, ..Ended::of_command(exit, failure) })
    }
}

fn phase_of(stage: &Steps) -> Phase {
    match stage.stage() {
        crate::event::Stage::Setup => Phase::Setup,
        crate::event::Stage::Verify => Phase::Verify,
    }
}

async fn receive(input: &mut Option<mpsc::Receiver<FromClient>>) -> Option<FromClient> {
    match input {
        Some(input) => input.recv().await,
        None => std::future::pending().await,
    }
}
