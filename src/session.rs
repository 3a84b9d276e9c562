//! The conversation with one CLI as a pure machine: a line in, steps out. It sends the task only after the
//! gate is proven to stand, judges every tool call by the plan, and knows when the task is over.
//!
//! *Invariant*: what it sends is a function of the lines it was given, in order, and of nothing else. A
//! restarted daemon therefore feeds the journal's lines to a new session and has the same bytes to send
//! again, from whatever offset the cell asks for. No clock, no chance, no IO in here.
//!
//! *Invariant*: a question of the CLI gets an answer; one that cannot be judged is denied.

mod gate;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use crate::agent::frames::{self, Answer, Incoming, TurnResult};
use crate::agent::options;
use crate::event::Body;
use crate::job::outcome::Failure;
use crate::job::{FailReason, Outcome, Phase, StopReason};
use crate::money::MicroUsd;
use crate::policy::Plan;

use gate::Pending;
pub use gate::{Errand, Finding, What};

/// Most background tasks that are kept track of.
const TASKS_MAX: usize = 1024;

/// What the caller has to do, in order.
#[derive(Debug)]
pub enum Step {
    /// Write this line to the CLI (journal it first).
    Send(Vec<u8>),
    /// Journal this.
    Event(Body),
    /// Find this out and tell [`Session::on_found`]; a tool call waits for it.
    Find(Errand),
    /// The gate stands and the task is being sent.
    Booted,
    /// The model said something: its number of messages so far.
    Turn(u64),
    /// The task is over; the CLI was told to end.
    Over,
    /// The CLI broke the protocol in a way that cannot be gone on from: end the cell.
    Broken(String),
}

/// How a cell's main process ended, as PID 1 reported it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AgentExit {
    /// Exit code; 128 + n for signal n.
    pub code: i32,
    /// Processes that the kernel killed for memory.
    pub oom_kills: u64,
    /// The end of what it wrote to stderr.
    pub stderr_tail: String,
}

/// What last went wrong between the cell and the model, as the gateway saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// The gateway refused the request: the job asked for what it may not have.
    Refused,
    /// The provider answered with this status; 0 for no answer at all, or one that broke off.
    Provider(u16),
}

#[derive(Debug)]
enum Stage {
    /// Waiting for the answers to `initialize` and `apply_flag_settings`.
    Booting {
        unanswered: BTreeSet<&'static str>,
    },
    Talking,
    /// The turn is over and the end was asked for.
    Over,
}

/// One conversation.
#[derive(Debug)]
pub struct Session {
    plan: Plan,
    prompt: String,
    system_prompt: Option<String>,
    append: String,
    stage: Stage,
    last_message: String,
    turns: u64,
    tool_calls: u64,
    tool_denials: u64,
    background: BTreeSet<String>,
    /// Questions of the CLI that wait for something to be found out, by their ids.
    pending: BTreeMap<String, Pending>,
    /// Errands so far.
    errands: u64,
    result: Option<TurnResult>,
}

/// Request id of an interrupt, which is sent beside what the session gives.
pub const INTERRUPT: &str = "hotcell-interrupt";
const INITIALIZE: &str = "hotcell-initialize";
const SETTINGS: &str = "hotcell-settings";

impl Session {
    /// A conversation for one task. `append` is what is added to the system prompt.
    pub fn new(plan: Plan, prompt: String, system_prompt: Option<String>, append: String) -> Self {
        Self {
            plan,
            prompt,
            system_prompt,
            append,
            stage: Stage::Booting { unanswered: BTreeSet::from([INITIALIZE, SETTINGS]) },
            last_message: String::new(),
            turns: 0,
            tool_calls: 0,
            tool_denials: 0,
            background: BTreeSet::new(),
            pending: BTreeMap::new(),
            errands: 0,
            result: None,
        }
    }

    /// The first frames: who we are, and the gate.
    pub fn start(&self) -> Vec<Step> {
        let initialize = options::initialize(&self.plan, self.system_prompt.as_deref(), &self.append);
        vec![
            Step::Send(frames::control_request(INITIALIZE, &initialize)),
            Step::Send(frames::control_request(SETTINGS, &options::flag_settings(&self.plan))),
        ]
    }

    /// Takes one frame of the CLI's stdout. An empty answer allocates nothing.
    pub fn on_frame(&mut self, frame: Incoming<'_>) -> Vec<Step> {
        match frame {
            Incoming::Other => Vec::new(),
            Incoming::Answer(answer) => self.on_answer(&answer),
            Incoming::CanUseTool(ask) => self.on_tool(ask),
            Incoming::Hook(call) => self.on_hook(call),
            Incoming::Cancelled { request_id } => self.withdrawn(&request_id),
            Incoming::Foreign { request_id, subtype } => {
                vec![Step::Send(frames::answer_error(
                    &request_id,
                    &format!("{subtype} is not served in a cell"),
                ))]
            }
            Incoming::Assistant { message_id, nested } => self.on_message(&message_id, nested),
            Incoming::Result(result) => self.on_result(*result),
            Incoming::TaskStarted { task_id, task_type } => {
                if matches!(task_type.as_str(), "local_agent" | "local_workflow")
                    && self.background.len() < TASKS_MAX
                {
                    self.background.insert(task_id);
                }
                Vec::new()
            }
            Incoming::TaskEnded { task_id } => {
                self.background.remove(&task_id);
                Vec::new()
            }
        }
    }

    /// Asks the CLI to end the running turn.
    pub fn interrupt() -> Vec<u8> {
        frames::control_request(INTERRUPT, &json!({ "subtype": "interrupt" }))
    }

    /// Messages of the model so far, subagents not counted.
    pub fn turns(&self) -> u64 {
        self.turns
    }

    /// Tool calls judged so far, and how many of them were denied.
    pub fn tool_counts(&self) -> (u64, u64) {
        (self.tool_calls, self.tool_denials)
    }

    /// The agent's final answer.
    pub fn answer(&self) -> Option<&str> {
        self.result.as_ref().and_then(|r| r.result.as_deref())
    }

    /// The CLI's own cost figure.
    pub fn cli_cost(&self) -> Option<MicroUsd> {
        let usd = self.result.as_ref().and_then(|r| r.total_cost_usd)?;
        MicroUsd::from_usd(usd).ok()
    }

    /// How the job ended, when no stop was decided: from the exit status first and from what the CLI said
    /// second. `trouble` is what the gateway saw last, where that was no success.
    pub fn outcome(&self, exit: &AgentExit, trouble: Option<Trouble>) -> Outcome {
        let fail = |phase, reason, message: String| Outcome::Failed(Failure::new(phase, reason, message));
        let tail = |text: String| {
            if exit.stderr_tail.is_empty() {
                text
            } else {
                format!("{text}; its last words on stderr: {}", exit.stderr_tail)
            }
        };
        let booting = matches!(self.stage, Stage::Booting { .. });
        let Some(result) = &self.result else {
            let (phase, reason) = match (booting, exit.oom_kills > 0) {
                (_, true) => (Phase::Run, FailReason::Oom),
                (true, false) => (Phase::Boot, FailReason::AgentStart),
                (false, false) => (Phase::Run, FailReason::AgentError),
            };
            let what = match reason {
                FailReason::Oom => "the kernel killed processes of the cell for memory".to_owned(),
                _ if booting => tail(format!("the CLI ended with code {} before it was ready", exit.code)),
                _ => tail(format!("the CLI ended with code {} and without a result", exit.code)),
            };
            return fail(phase, reason, what);
        };
        if result.subtype == "error_max_turns" {
            return Outcome::Stopped { reason: StopReason::Turns };
        }
        if result.is_error {
            let status = match trouble {
                Some(Trouble::Provider(status)) => result.api_error_status.or(Some(status)),
                Some(Trouble::Refused) | None => result.api_error_status,
            };
            let words = result.result.clone().unwrap_or_else(|| result.errors.join("; "));
            let reason = match status {
                Some(_) if trouble == Some(Trouble::Refused) => FailReason::GatewayRefused,
                Some(401 | 403) => FailReason::ProviderAuth,
                Some(429 | 529) => FailReason::ProviderLimit,
                Some(0 | 408 | 500..=599) => FailReason::ProviderError,
                Some(400..=499) => FailReason::ProviderRejected,
                Some(_) | None => FailReason::AgentError,
            };
            let words = if words.is_empty() { result.subtype.clone() } else { words };
            return fail(Phase::Run, reason, words);
        }
        if exit.code != 0 {
            let what = tail(format!("the CLI reported success but ended with code {}", exit.code));
            let reason = if exit.oom_kills > 0 { FailReason::Oom } else { FailReason::AgentError };
            return fail(Phase::Run, reason, what);
        }
        Outcome::Succeeded
    }

    fn on_answer(&mut self, answer: &Answer<'_>) -> Vec<Step> {
        let Stage::Booting { unanswered } = &mut self.stage else { return Vec::new() };
        if let Some(error) = &answer.error {
            let id = answer.request_id.as_ref();
            if unanswered.contains(id) {
                return vec![Step::Broken(format!(
                    "the CLI refused {id}: {error}; the gate would not stand"
                ))];
            }
            return Vec::new();
        }
        if !unanswered.remove(answer.request_id.as_ref()) || !unanswered.is_empty() {
            return Vec::new();
        }
        self.stage = Stage::Talking;
        vec![Step::Booted, Step::Send(frames::user(&self.prompt))]
    }

    fn on_message(&mut self, message_id: &str, nested: bool) -> Vec<Step> {
        if nested || message_id == self.last_message {
            return Vec::new();
        }
        message_id.clone_into(&mut self.last_message);
        self.turns += 1;
        vec![Step::Turn(self.turns)]
    }

    fn on_result(&mut self, result: TurnResult) -> Vec<Step> {
        let failed = result.is_error;
        self.result = Some(result);
        // A background agent still at work brings a further turn and result.
        if !failed && !self.background.is_empty() {
            return Vec::new();
        }
        match self.stage {
            Stage::Over => Vec::new(),
            Stage::Booting { .. } | Stage::Talking => {
                self.stage = Stage::Over;
                // Not by closing stdin: pending hook callbacks would then let their tools run.
                let end = json!({ "subtype": "end_session", "reason": "the task is over" });
                vec![Step::Send(frames::control_request("hotcell-end", &end)), Step::Over]
            }
        }
    }
}

#[cfg(test)]
mod tests;
