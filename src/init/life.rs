//! A cell's life as PID 1 sees it, in one loop on one thread: start the agent, carry its streams, hold its
//! deadlines, and when it ends, kill what it left, drain what it printed, report, and stay until the daemon
//! has the report. It must never report an end before the output, and never wait for anything but `poll`.
//!
//! ```text
//! Waiting ──Start──▶ Running ──agent ended──▶ Ending ──no process left──▶ Over ──Bye──▶ exit
//!    └──────────────────┴── could not be started ─────────────────────────▲
//! ```

use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::boot::BootMessage;
use crate::carry::Carry;
use crate::child::{self, Agent, OomScore, SpawnError};
use crate::ctl::{Ctl, Order, Work};
use crate::sys;
use crate::usage::Usage;
use crate::wire::{ExitReason, ExitReport, ExitStatus, FromInit};

const KILL_AGAIN_MS: u64 = 20;
/// How long processes that do not die (in the kernel) may hold the report.
const ENDING_MS_MAX: u64 = 5_000;
/// Exit code of init when the agent could not be started.
const EXIT_SPAWN_FAILED: u8 = 127;

enum Phase {
    Waiting,
    Running(Agent),
    Ending { status: ExitStatus, kill_at_ms: u64, give_up_at_ms: u64 },
    Over { last_frame: FromInit, since_ms: u64 },
}

/// The agent is being ended, and why; the first reason stays.
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
            stop: None,
            wall_at_ms: None,
            look_again: false,
            bye: false,
            boot,
        }
    }

    /// Reports that the cell's own set-up failed, in place of starting the agent.
    pub(crate) fn fail(&mut self, error: SpawnError) {
        let last_frame = FromInit::SpawnFailed { errno: error.errno, message: error.what };
        self.phase = Phase::Over { last_frame, since_ms: sys::now_ms() };
        self.carry.shut();
    }

    /// Lives until the daemon has the report; returns the exit code.
    pub(crate) fn run(&mut self) -> u8 {
        if self.boot.start_now {
            self.start();
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
        if !matches!(self.phase, Phase::Waiting) {
            return;
        }
        match child::spawn(&self.boot, &mut self.oom) {
            Ok((agent, streams)) => {
                self.carry.attach(streams);
                self.phase = Phase::Running(agent);
                let limit_ms = Some(self.boot.wall_limit_ms).filter(|limit_ms| *limit_ms > 0);
                self.wall_at_ms = limit_ms.map(|limit_ms| sys::now_ms().saturating_add(limit_ms));
            }
            Err(error) => self.fail(error),
        }
    }

    /// When the dead-man limit passes, if no daemon comes.
    fn dead_man_at_ms(&self) -> u64 {
        self.ctl.last_contact_ms().saturating_add(self.boot.dead_man_ms)
    }

    /// Acts on what is due.
    fn tick(&mut self, now_ms: u64) {
        match self.phase {
            Phase::Waiting if now_ms >= self.dead_man_at_ms() => self.over_unstarted(ExitReason::DeadMan),
            Phase::Running(agent) => {
                let reason = if self.wall_at_ms.is_some_and(|at_ms| now_ms >= at_ms) {
                    Some(ExitReason::WallLimit)
                } else {
                    (now_ms >= self.dead_man_at_ms()).then_some(ExitReason::DeadMan)
                };
                match (&mut self.stop, reason) {
                    (Some(stop), _) if now_ms >= stop.kill_at_ms => {
                        child::kill_all();
                        stop.kill_at_ms = now_ms + KILL_AGAIN_MS;
                    }
                    (None, Some(reason)) => {
                        agent.signal(libc::SIGTERM);
                        let kill_at_ms = now_ms.saturating_add(self.boot.kill_grace_ms);
                        self.stop = Some(Stop { reason, kill_at_ms });
                    }
                    _ => {}
                }
            }
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
            Phase::Waiting | Phase::Over { .. } => {}
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
        let phase_at_ms = match &self.phase {
            Phase::Waiting => self.dead_man_at_ms(),
            Phase::Running(_) => match &self.stop {
                Some(stop) => stop.kill_at_ms,
                None => self.dead_man_at_ms().min(self.wall_at_ms.unwrap_or(u64::MAX)),
            },
            Phase::Ending { kill_at_ms, .. } => *kill_at_ms,
            Phase::Over { since_ms, .. } => self.leave_at_ms(*since_ms),
        };
        phase_at_ms.min(self.ctl.deadline_ms().unwrap_or(u64::MAX)).saturating_sub(now_ms)
    }

    /// Waits for something to happen, once, and handles it.
    fn turn(&mut self, now_ms: u64) {
        // A negative descriptor is skipped by poll.
        let none = sys::interest(-1, 0);
        let mut fds = [
            sys::interest(self.child_signal.as_raw_fd(), libc::POLLIN),
            self.ctl.interest().unwrap_or(none),
            self.carry.stdin.interest().unwrap_or(none),
            self.carry.output[0].interest().unwrap_or(none),
            self.carry.output[1].interest().unwrap_or(none),
        ];
        sys::poll(&mut fds, self.timeout_ms(now_ms));
        let [children, ctl, stdin, stdout, stderr] = fds.map(|fd| fd.revents != 0);
        if stdout {
            self.carry.output[0].read();
        }
        if stderr {
            self.carry.output[1].read();
        }
        if stdin {
            self.carry.stdin.write();
        }
        if children || self.look_again {
            let mut signals = [0; 1024];
            let _ = self.child_signal.read(&mut signals);
            self.reap();
        }
        let mut orders = Vec::new();
        let started = !matches!(self.phase, Phase::Waiting);
        let last_frame = match &self.phase {
            Phase::Over { last_frame, .. } => Some(last_frame),
            _ => None,
        };
        let mut work = Work { carry: &mut self.carry, started, last_frame };
        if ctl {
            self.ctl.receive(&mut work, &mut orders);
        }
        self.ctl.send(&mut work);
        orders.into_iter().for_each(|order| self.obey(order));
    }

    fn obey(&mut self, order: Order) {
        match (order, &self.phase) {
            (Order::Start, _) => self.start(),
            (Order::Signal(number), Phase::Running(agent)) => agent.signal(number),
            (Order::Kill, Phase::Running(_)) => {
                let kill_at_ms = sys::now_ms() + KILL_AGAIN_MS;
                self.stop.get_or_insert(Stop { reason: ExitReason::Killed, kill_at_ms }).kill_at_ms =
                    kill_at_ms;
                child::kill_all();
            }
            (Order::Kill, Phase::Waiting) => self.over_unstarted(ExitReason::Killed),
            (Order::Bye, Phase::Over { .. }) => self.bye = true,
            _ => {}
        }
    }

    fn reap(&mut self) {
        let agent = match self.phase {
            Phase::Running(agent) => Some(agent),
            _ => None,
        };
        let ended = child::reap(agent);
        self.look_again = ended.more;
        if let Some(status) = ended.agent {
            child::kill_all();
            let now_ms = sys::now_ms();
            let (kill_at_ms, give_up_at_ms) = (now_ms + KILL_AGAIN_MS, now_ms + ENDING_MS_MAX);
            self.phase = Phase::Ending { status, kill_at_ms, give_up_at_ms };
        }
        if ended.none_left && matches!(self.phase, Phase::Ending { .. }) {
            self.over();
        }
    }

    /// No process is left: what is in the streams is all there will be.
    fn over(&mut self) {
        let Phase::Ending { status, .. } = self.phase else { return };
        let reason = self.stop.as_ref().map_or(ExitReason::Agent, |stop| stop.reason);
        self.report(status, reason);
    }

    fn over_unstarted(&mut self, reason: ExitReason) {
        self.report(ExitStatus::Signal(libc::SIGKILL), reason);
    }

    fn report(&mut self, status: ExitStatus, reason: ExitReason) {
        let used = self.usage.since();
        let report = ExitReport {
            status,
            reason,
            oom_kills: used.oom_kills,
            peak_memory_bytes: used.peak_memory_bytes,
            cpu_us: used.cpu_us,
        };
        self.phase = Phase::Over { last_frame: FromInit::Exited(report), since_ms: sys::now_ms() };
        self.carry.shut();
    }
}
