//! A cell's life as PID 1 sees it, in one loop on one thread: run the steps that are asked for, start the agent,
//! carry the streams, hold the deadlines, and when the agent ends, kill what is left, drain what was printed,
//! report, and stay until the daemon has the report. It must never report an end before the output, and never
//! wait for anything but `poll`.
//!
//! ```text
//!    ┌──step ended──┐
//!    ▼              │
//! Waiting ──Step─▶ Stepping
//!    │              │ by a limit or Kill
//!    └──Start──▶ Running ──agent ended──▶ Ending ──no process left──▶ Over ──Bye──▶ exit
//!    └──────────────┴── could not be started ─┘
//! ```
//! What a step leaves running lives on, until the cell ends.

use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::boot::BootMessage;
use crate::carry::Carry;
use crate::child::{self, Agent, OomScore, SpawnError};
use crate::ctl::{Ctl, Order, Work};
use crate::steps::Steps;
use crate::sys;
use crate::usage::Usage;
use crate::wire::{ExitReason, ExitReport, ExitStatus, FromInit};

const KILL_AGAIN_MS: u64 = 20;
/// How long processes that do not die (in the kernel) may hold the report.
const ENDING_MS_MAX: u64 = 5_000;
/// Exit code of init when the agent could not be started, and what a step that could not be ends with.
const EXIT_SPAWN_FAILED: u8 = 127;

enum Phase {
    Waiting,
    Stepping { index: u32, main: Agent },
    Running(Agent),
    Ending { end: End, kill_at_ms: u64, give_up_at_ms: u64 },
    Over { last_frame: FromInit, since_ms: u64 },
}

/// What the cell's end will be told as.
#[derive(Clone)]
enum End {
    Exited(ExitStatus),
    Unstarted { errno: i32, message: String },
}

/// The agent or a step is being ended, and why; the first reason stays.
struct Stop {
    reason: ExitReason,
    kill_at_ms: u64,
}

/// Everything init is.
pub(crate) struct Life {
    boot: BootMessage,
    ctl: Ctl,
    carry: Carry,
    oom: OomScore,
    child_signal: std::fs::File,
    usage: Usage,
    phase: Phase,
    steps: Steps,
    /// Asked for while a step runs: what comes after it.
    wish: Option<Order>,
    stop: Option<Stop>,
    wall_at_ms: Option<u64>,
    look_again: bool,
    bye: bool,
}

impl Life {
    /// A cell whose agent is not started yet.
    pub(crate) fn new(boot: BootMessage, oom: OomScore, child_signal: OwnedFd) -> Self {
        Self {
            ctl: Ctl::new(&boot),
            carry: Carry::new(boot.buffer_bytes_max as usize),
            oom,
            child_signal: child_signal.into(),
            usage: Usage::now(),
            phase: Phase::Waiting,
            steps: Steps::new(),
            wish: None,
            stop: None,
            wall_at_ms: None,
            look_again: false,
            bye: false,
            boot,
        }
    }

    /// Ends the cell because its set-up failed or the agent could not be started.
    pub(crate) fn fail(&mut self, error: SpawnError) {
        self.end(End::Unstarted { errno: error.errno, message: error.what });
    }

    /// Lives until the daemon has the report; returns the exit code.
    pub(crate) fn run(&mut self) -> u8 {
        if self.boot.start_now {
            self.obey(Order::Start);
        }
        loop {
            let now_ms = sys::now_ms();
            self.ctl.tick(now_ms);
            self.tick(now_ms);
            if let Some(code) = self.finished(now_ms) {
                return code;
            }
            self.turn(now_ms);
        }
    }

    fn start(&mut self) {
        self.steps.forget();
        self.begin_wall();
        match child::spawn(&self.boot, &mut self.oom) {
            Ok((agent, streams)) => {
                self.carry.attach(streams);
                self.phase = Phase::Running(agent);
            }
            Err(error) => self.fail(error),
        }
    }

    /// Runs a step, unless it ran already.
    fn step(&mut self, index: u32) {
        match self.phase {
            Phase::Ending { .. } | Phase::Over { .. } => {}
            Phase::Stepping { index: running, .. } if running == index => {}
            _ if self.steps.again(index) => {}
            Phase::Stepping { .. } => self.wish = Some(Order::Step(index)),
            Phase::Waiting => self.begin_step(index),
            Phase::Running(_) => self.refuse_step(index, "the command was started before it"),
        }
    }

    fn begin_step(&mut self, index: u32) {
        self.steps.forget();
        self.begin_wall();
        match child::spawn_step(&self.boot, index, &mut self.oom) {
            Ok((output, main)) => {
                self.carry.attach_step(index, output);
                match main {
                    Some(main) => self.phase = Phase::Stepping { index, main },
                    None => self.step_ended(index, ExitStatus::Code(EXIT_SPAWN_FAILED.into())),
                }
            }
            Err(error) => self.refuse_step(index, &error.to_string()),
        }
    }

    fn refuse_step(&mut self, index: u32, why: &str) {
        // Where there is no room for the words, the code has to do.
        self.carry.say(&format!("hotcell-init: step {index}: {why}\n"));
        self.step_ended(index, ExitStatus::Code(EXIT_SPAWN_FAILED.into()));
    }

    fn step_ended(&mut self, index: u32, status: ExitStatus) {
        self.carry.owe(index);
        self.steps.end(index, status);
        if let Phase::Stepping { .. } = self.phase {
            self.phase = Phase::Waiting;
        }
        if let Some(wish) = self.wish.take() {
            self.obey(wish);
        }
    }

    /// The wall-clock limit runs from the first thing that is started.
    fn begin_wall(&mut self) {
        let limit_ms = self.boot.wall_limit_ms;
        if limit_ms > 0 && self.wall_at_ms.is_none() {
            self.wall_at_ms = Some(sys::now_ms().saturating_add(limit_ms));
        }
    }

    /// When the dead-man limit passes, if no daemon comes.
    fn dead_man_at_ms(&self) -> u64 {
        self.ctl.last_contact_ms().saturating_add(self.boot.dead_man_ms)
    }

    /// The limit that has passed.
    fn limit(&self, now_ms: u64) -> Option<ExitReason> {
        if self.wall_at_ms.is_some_and(|at_ms| now_ms >= at_ms) {
            return Some(ExitReason::WallLimit);
        }
        (now_ms >= self.dead_man_at_ms()).then_some(ExitReason::DeadMan)
    }

    /// Acts on what is due.
    fn tick(&mut self, now_ms: u64) {
        let limit = self.limit(now_ms);
        match self.phase {
            Phase::Waiting => {
                if let Some(reason) = limit {
                    self.end_unstarted(reason);
                }
            }
            Phase::Running(main) | Phase::Stepping { main, .. } => match (&mut self.stop, limit) {
                (Some(stop), _) if now_ms >= stop.kill_at_ms => {
                    child::kill_all();
                    stop.kill_at_ms = now_ms + KILL_AGAIN_MS;
                }
                (None, Some(reason)) => {
                    main.terminate(self.carry.terminal());
                    let kill_at_ms = now_ms.saturating_add(self.boot.kill_grace_ms);
                    self.stop = Some(Stop { reason, kill_at_ms });
                }
                _ => {}
            },
            Phase::Ending { ref mut kill_at_ms, give_up_at_ms, .. } => {
                if now_ms >= *kill_at_ms {
                    child::kill_all();
                    *kill_at_ms = now_ms + KILL_AGAIN_MS;
                    self.look_again = true;
                }
                if now_ms >= give_up_at_ms {
                    self.over();
                }
            }
            Phase::Over { .. } => {}
        }
    }

    /// The exit code, once there is nothing left to stay for.
    fn finished(&self, now_ms: u64) -> Option<u8> {
        let Phase::Over { last_frame, since_ms } = &self.phase else { return None };
        if !self.bye && now_ms < self.leave_at_ms(*since_ms) {
            return None;
        }
        Some(match last_frame {
            FromInit::Exited(ExitReport { status: ExitStatus::Code(code), .. }) => *code as u8,
            FromInit::Exited(ExitReport { status: ExitStatus::Signal(signal), .. }) => 128 + *signal as u8,
            _ => EXIT_SPAWN_FAILED,
        })
    }

    /// A report that nobody fetches is kept for one more dead-man limit.
    fn leave_at_ms(&self, since_ms: u64) -> u64 {
        self.ctl.last_contact_ms().max(since_ms).saturating_add(self.boot.dead_man_ms)
    }

    fn timeout_ms(&self, now_ms: u64) -> u64 {
        if self.look_again {
            return 0;
        }
        let limit_at_ms = || self.dead_man_at_ms().min(self.wall_at_ms.unwrap_or(u64::MAX));
        let phase_at_ms = match &self.phase {
            Phase::Waiting => limit_at_ms(),
            Phase::Running(_) | Phase::Stepping { .. } => match &self.stop {
                Some(stop) => stop.kill_at_ms,
                None => limit_at_ms(),
            },
            Phase::Ending { kill_at_ms, .. } => *kill_at_ms,
            Phase::Over { since_ms, .. } => self.leave_at_ms(*since_ms),
        };
        let at_ms = phase_at_ms.min(self.ctl.deadline_ms().unwrap_or(u64::MAX));
        at_ms.saturating_sub(now_ms).min(self.carry.look_in_ms().unwrap_or(u64::MAX))
    }

    /// Waits for something to happen, once, and handles it.
    fn turn(&mut self, now_ms: u64) {
        // A negative descriptor is skipped by poll.
        let none = sys::interest(-1, 0);
        let mut fds = vec![
            sys::interest(self.child_signal.as_raw_fd(), libc::POLLIN),
            self.ctl.interest().unwrap_or(none),
        ];
        self.carry.interests(&mut fds);
        sys::poll(&mut fds, self.timeout_ms(now_ms));
        let (own, streams) = fds.split_at(2);
        self.carry.work(streams);
        if own[0].revents != 0 || self.look_again {
            let mut signals = [0; 1024];
            let _ = self.child_signal.read(&mut signals);
            self.reap();
        }
        if own[1].revents != 0 {
            let mut orders = Vec::new();
            self.with_ctl(|ctl, work| ctl.receive(work, &mut orders));
            orders.into_iter().for_each(|order| self.obey(order));
        }
        self.steps.settle(&self.carry);
        self.with_ctl(Ctl::send);
    }

    fn with_ctl(&mut self, work: impl FnOnce(&mut Ctl, &mut Work<'_>)) {
        let started = !matches!(self.phase, Phase::Waiting | Phase::Stepping { .. });
        let (news, last_frame) = match &self.phase {
            Phase::Waiting | Phase::Stepping { .. } | Phase::Running(_) => (self.steps.news(), None),
            Phase::Ending { .. } => (None, None),
            Phase::Over { last_frame, .. } => (None, Some(last_frame)),
        };
        work(&mut self.ctl, &mut Work { carry: &mut self.carry, started, news, last_frame });
    }

    fn obey(&mut self, order: Order) {
        match (order, &self.phase) {
            (Order::Start, Phase::Waiting) => self.start(),
            (Order::Start, Phase::Stepping { .. }) => self.wish = Some(Order::Start),
            (Order::Step(index), _) => self.step(index),
            (Order::Signal(number), Phase::Running(main) | Phase::Stepping { main, .. }) => {
                main.signal(number, self.carry.terminal());
            }
            (Order::Kill, Phase::Running(_) | Phase::Stepping { .. }) => {
                let kill_at_ms = sys::now_ms() + KILL_AGAIN_MS;
                self.stop.get_or_insert(Stop { reason: ExitReason::Killed, kill_at_ms }).kill_at_ms =
                    kill_at_ms;
                child::kill_all();
            }
            (Order::Kill, Phase::Waiting) => self.end_unstarted(ExitReason::Killed),
            (Order::Resize(rows, cols), _) => self.resize(rows, cols),
            (Order::Bye, Phase::Over { .. }) => self.bye = true,
            _ => {}
        }
    }

    /// Before the agent's start, the size that its terminal will have.
    fn resize(&mut self, rows: u16, cols: u16) {
        self.boot.terminal = self.boot.terminal.map(|_| (rows, cols));
        if let Some(terminal) = self.carry.terminal() {
            terminal.resize(rows, cols);
        }
    }

    fn reap(&mut self) {
        let main = match self.phase {
            Phase::Running(main) | Phase::Stepping { main, .. } => Some(main),
            _ => None,
        };
        let ended = child::reap(main);
        self.look_again = ended.more;
        match (ended.agent, &self.phase) {
            (Some(status), Phase::Stepping { index, .. }) if self.stop.is_none() => {
                let index = *index;
                self.step_ended(index, status);
            }
            (Some(status), _) => self.end(End::Exited(status)),
            (None, Phase::Ending { .. }) if ended.none_left => self.over(),
            (None, _) => {}
        }
    }

    /// Nothing of the agent's can happen any more: what is left is killed.
    fn end(&mut self, end: End) {
        child::kill_all();
        let now_ms = sys::now_ms();
        let (kill_at_ms, give_up_at_ms) = (now_ms + KILL_AGAIN_MS, now_ms + ENDING_MS_MAX);
        self.phase = Phase::Ending { end, kill_at_ms, give_up_at_ms };
        self.look_again = true;
    }

    fn end_unstarted(&mut self, reason: ExitReason) {
        self.stop.get_or_insert(Stop { reason, kill_at_ms: sys::now_ms() });
        self.end(End::Exited(ExitStatus::Signal(libc::SIGKILL)));
    }

    /// No process is left: what is in the streams is all there will be.
    fn over(&mut self) {
        let Phase::Ending { end, .. } = &self.phase else { return };
        let last_frame = match end.clone() {
            End::Exited(status) => FromInit::Exited(self.report(status)),
            End::Unstarted { errno, message } => FromInit::SpawnFailed { errno, message },
        };
        self.phase = Phase::Over { last_frame, since_ms: sys::now_ms() };
        self.carry.shut();
    }

    fn report(&self, status: ExitStatus) -> ExitReport {
        let used = self.usage.since();
        ExitReport {
            status,
            reason: self.stop.as_ref().map_or(ExitReason::Agent, |stop| stop.reason),
            oom_kills: used.oom_kills,
            peak_memory_bytes: used.peak_memory_bytes,
            cpu_us: used.cpu_us,
        }
    }
}
