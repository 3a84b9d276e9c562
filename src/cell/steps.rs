//! The commands of `setup` and `verify`, one after another in a cell: which is next, how long they may take, and what is
//! said when one fails. It must never ask for the next one before the last one's end is journaled, and never hold what a
//! command prints.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::record::{Record, RecordError};
use crate::cell_image;
use crate::event::{Body, Stage, StepEnd};
use crate::gateway::GatewayEvent;
use crate::job::outcome::Failure;
use crate::job::spec::{SetupSpec, StepCommand, VerifySpec};
use crate::job::{FailReason, Phase};
use crate::link::{ExitStatus, LinkHandle};
use crate::policy::Plan;

/// How much of the end of what a command prints is kept, in bytes.
const TAIL_BYTES: usize = 16 * 1024;
/// How much of that stands in the message of a failure, in bytes.
const TAIL_SHOWN_BYTES: usize = 1500;
/// Most hosts that were refused and are named in the message of a failure.
const REFUSED_MAX: usize = 3;

/// What a program meets that goes its own way.
const NO_NAMES: &str = "names do not resolve in a cell: what leads out is the proxy of HTTP_PROXY and HTTPS_PROXY, \
                        which this program does not use";

/// The commands of one stage.
#[derive(Debug)]
pub(super) struct Steps {
    stage: Stage,
    /// In one line each.
    words: Vec<String>,
    argvs: Vec<Vec<String>>,
    /// The place of the first of them among all commands of the cell.
    offset: u32,
    /// How many have ended.
    ended: u32,
    wall: Duration,
    began: Option<Instant>,
    step_began: Instant,
    tail: VecDeque<u8>,
    refused: Vec<String>,
    /// Why nothing can be reached, where nothing can.
    closed: Option<String>,
}

/// What is next.
#[derive(Debug)]
pub(super) enum Progress {
    /// Another command runs.
    Next,
    /// All of them ended well.
    Done,
    /// One did not.
    Failed(Failure),
}

impl Steps {
    fn new(stage: Stage, commands: &[StepCommand], wall_ms: u64, shell: &str, plan: &Plan) -> Self {
        Self {
            stage,
            words: commands.iter().map(StepCommand::words).collect(),
            argvs: commands.iter().map(|command| command.argv(shell)).collect(),
            offset: 0,
            ended: 0,
            wall: Duration::from_millis(wall_ms),
            began: None,
            step_began: Instant::now(),
            tail: VecDeque::new(),
            refused: Vec::new(),
            closed: plan.nothing_is_open(),
        }
    }

    /// What comes before an agent, under this plan.
    pub(super) fn setup(setup: &SetupSpec, shell: &str, plan: &Plan) -> Self {
        Self::new(Stage::Setup, &setup.commands, setup.timeout_ms(), shell, plan)
    }

    /// What judges its work; `before`: so many commands of the cell come first.
    pub(super) fn verify(verify: &VerifySpec, shell: &str, before: usize, plan: &Plan) -> Self {
        let offset = u32::try_from(before).unwrap_or(u32::MAX);
        Self { offset, ..Self::new(Stage::Verify, &verify.commands, verify.timeout_ms(), shell, plan) }
    }

    /// The programs and their arguments, in order.
    pub(super) fn argvs(&self) -> &[Vec<String>] {
        &self.argvs
    }

    /// What they are for.
    pub(super) fn stage(&self) -> Stage {
        self.stage
    }

    /// When they have to be over; none before they began.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.began.map(|began| began + self.wall)
    }

    /// How long they have run.
    pub(super) fn elapsed(&self) -> Duration {
        self.began.map_or(Duration::ZERO, |began| began.elapsed())
    }

    /// Asks for the first one.
    ///
    /// # Errors
    /// [`RecordError`] when that cannot be journaled.
    pub(super) fn begin(&mut self, record: &mut Record, to_cell: &LinkHandle) -> Result<(), RecordError> {
        self.began = Some(Instant::now());
        self.next(record, to_cell)
    }

    fn next(&mut self, record: &mut Record, to_cell: &LinkHandle) -> Result<(), RecordError> {
        self.step_began = Instant::now();
        self.tail.clear();
        self.refused.clear();
        record.push(&self.event(None))?;
        record.commit()?;
        to_cell.step(self.offset + self.ended);
        Ok(())
    }

    fn event(&self, ended: Option<StepEnd>) -> Body {
        let command = self.current().to_owned();
        Body::Step { stage: self.stage, index: self.ended, command, ended }
    }

    fn current(&self) -> &str {
        self.words.get(self.ended as usize).map_or("", String::as_str)
    }

    /// Keeps the end of what a command prints.
    pub(super) fn heard(&mut self, bytes: &[u8]) {
        self.tail.extend(bytes);
        let over = self.tail.len().saturating_sub(TAIL_BYTES);
        self.tail.drain(..over);
    }

    /// Keeps why a command did not reach a host, or got nothing from it.
    pub(super) fn reached(&mut self, event: &GatewayEvent) {
        let Some(reason) = nothing_got(event) else { return };
        if self.refused.len() < REFUSED_MAX && !self.refused.iter().any(|told| told == reason) {
            self.refused.push(reason.to_owned());
        }
    }

    /// A command has ended: journals that and asks for the next one. An index that is not awaited changes nothing.
    ///
    /// # Errors
    /// [`RecordError`] when it cannot be journaled.
    pub(super) fn ended(
        &mut self,
        record: &mut Record,
        (index, status): (u32, ExitStatus),
        to_cell: &LinkHandle,
    ) -> Result<Progress, RecordError> {
        if index != self.offset + self.ended {
            return Ok(Progress::Next);
        }
        let code = code_of(status);
        let duration_ms = u64::try_from(self.step_began.elapsed().as_millis()).unwrap_or(u64::MAX);
        record.push(&self.event(Some(StepEnd { code, duration_ms })))?;
        record.commit()?;
        if code != 0 {
            return Ok(Progress::Failed(self.failure(&format!("ended with code {code}"), false)));
        }
        self.ended += 1;
        if self.ended as usize >= self.argvs.len() {
            return Ok(Progress::Done);
        }
        self.next(record, to_cell)?;
        Ok(Progress::Next)
    }

    /// They took too long.
    pub(super) fn late(&self) -> Failure {
        let seconds = self.wall.as_secs();
        let words = format!("was still running when the {seconds} s of {} were over", self.stage.as_str());
        self.failure(&words, true)
    }

    /// The end of what the present command has printed.
    pub(super) fn output(&self) -> String {
        let bytes: Vec<u8> = self.tail.iter().copied().collect();
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }

    fn failure(&self, what: &str, late: bool) -> Failure {
        let (phase, reason) = match (self.stage, late) {
            (Stage::Setup, false) => (Phase::Setup, FailReason::SetupFailed),
            (Stage::Setup, true) => (Phase::Setup, FailReason::SetupDeadline),
            (Stage::Verify, false) => (Phase::Verify, FailReason::VerifyFailed),
            (Stage::Verify, true) => (Phase::Verify, FailReason::VerifyDeadline),
        };
        let (stage, number, command) = (self.stage.as_str(), self.ended + 1, self.current());
        let mut words = format!("command {number} of {stage}, `{}`, {what}", shortened(command));
        let output = self.output();
        if !output.is_empty() {
            words.push_str(&format!("; its last words: {}", last_bytes(&output, TAIL_SHOWN_BYTES)));
        }
        // Last, where it is seen: what a package manager makes of a refusal seldom says whose it is.
        for reason in &self.refused {
            words.push_str(&format!("\nhotcell: {reason}"));
        }
        if self.refused.is_empty() && is_unresolved(&output) {
            words.push_str(&format!("\nhotcell: {}", self.closed.as_deref().unwrap_or(NO_NAMES)));
        }
        if !late && let Some(hint) = missing_tool(&output) {
            words.push_str(&format!("\nhotcell: {hint}"));
        }
        Failure::new(phase, reason, words)
    }
}

/// A status as shells tell it.
pub(super) fn code_of(status: ExitStatus) -> i32 {
    match status {
        ExitStatus::Code(code) => code,
        ExitStatus::Signal(signal) => 128 + signal,
    }
}

/// Why a host was not reached, or gave nothing.
pub(super) fn nothing_got(event: &GatewayEvent) -> Option<&str> {
    let GatewayEvent::Egress(reached) = event else { return None };
    let got_some = reached.status.map_or(reached.bytes_down > 0, |status| status < 400);
    reached.reason.as_deref().filter(|_| !reached.allowed || !got_some)
}

/// Whether somebody looked for the address of a name: there are none in a cell, so that nobody was asked outside.
fn is_unresolved(output: &str) -> bool {
    const SIGNS: [&str; 6] = [
        "EAI_AGAIN",
        "ENOTFOUND",
        "name resolution",
        "Name or service not known",
        "ould not resolve",
        "failed to lookup address",
    ];
    SIGNS.iter().any(|sign| output.contains(sign))
}

/// Which image has the program that a shell or PID 1 did not find, by its last words.
pub(super) fn missing_tool(output: &str) -> Option<String> {
    let line = output.lines().rev().find(|line| !line.trim().is_empty())?;
    let (before, _) = ["command not found", "not found", "No such file or directory"]
        .iter()
        .find_map(|words| line.split_once(&format!(": {words}")))?;
    let tool = before.rsplit([' ', '/', ':']).next()?;
    let image = cell_image::image_with(tool)?;
    Some(format!(
        "`{tool}` is in the image {image}: take it, or `image = \"auto\"`, which looks at the repository's files"
    ))
}

/// What `setup` may reach.
pub(super) fn setup_plan(record: &Record) -> Plan {
    let names = record.spec.setup.as_ref().and_then(|setup| setup.egress.as_deref());
    record.accepted.plan.for_setup(names)
}

/// What `verify` may reach.
pub(super) fn verify_plan(record: &Record) -> Plan {
    let names = record.spec.verify.as_ref().and_then(|verify| verify.egress.as_deref());
    record.accepted.plan.for_verify(names)
}

fn shortened(command: &str) -> String {
    let mut words: String = command.chars().take(200).collect();
    if words.len() < command.len() {
        words.push('…');
    }
    words
}

fn last_bytes(text: &str, bytes_max: usize) -> &str {
    let mut at = text.len().saturating_sub(bytes_max);
    while !text.is_char_boundary(at) {
        at += 1;
    }
    &text[at..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_was_looked_up_inside_is_told_from_other_failures() {
        for output in [
            "npm error code EAI_AGAIN",
            "curl: (6) Could not resolve host: x.example",
            "fatal: unable to access 'https://x.example/': Could not resolve host: x.example",
            "failed to lookup address information: Temporary failure in name resolution",
            "<urlopen error [Errno -2] Name or service not known>",
        ] {
            assert!(is_unresolved(output), "{output}");
        }
        assert!(!is_unresolved("error: the names resolve to nothing") && !is_unresolved(""));
    }

    #[test]
    fn a_program_that_is_not_there_is_named_with_the_image_that_has_it() {
        for (output, image) in [
            ("sh: 1: cargo: not found", "hotcell/rust"),
            ("something\nbash: line 1: go: command not found\n", "hotcell/go"),
            ("/bin/sh: 3: mvn: not found\n\n", "hotcell/java"),
            ("hotcell: cannot start cmake: No such file or directory", "hotcell/cc"),
        ] {
            let hint = missing_tool(output).expect(output);
            assert!(hint.contains(&format!("the image {image}:")), "{hint}");
        }
        for output in
            ["", "sh: 1: frobnicate: not found", "cargo: error", "not found", "error: cargo not found here"]
        {
            assert_eq!(missing_tool(output), None, "{output}");
        }
    }
}
