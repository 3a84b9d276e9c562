//! The gate of a session: every question of the CLI about a tool call is judged by the plan and answered here. A
//! question that needs something found out (where a path leads, what a hook says) waits, and is denied where that
//! fails. *Invariant*: no answer leaves before its decision is an event, and no question is answered "yes" by
//! anything but a judgement.

use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::{Session, Step};
use crate::agent::frames::{self, HookCall, ToolAsk};
use crate::agent::options;
use crate::event::{Body, Decision, Line};
use crate::job::spec::PermissionMode;
use crate::policy::judge::{
    self, Call, Findings, HookAnswer, HookId, Judgement, Need, hook_input, judge, judge_after,
};

/// Most questions that wait at a time; further ones are denied.
const PENDING_MAX: usize = 1024;

/// What a question that the CLI withdrew is journaled with: no answer was sent to it.
const WITHDRAWN: (&str, &str) = ("withdrawn", "the CLI did not wait for the decision");

/// Something to be found out for a tool call that waits.
#[derive(Debug, Clone, PartialEq)]
pub struct Errand {
    /// Its own number: what is found out serves the question that it was sent for and no other one with its id.
    pub number: u64,
    /// The question that waits.
    pub request_id: String,
    /// What is to be found out.
    pub what: What,
}

/// What is to be found out.
#[derive(Debug, Clone, PartialEq)]
pub enum What {
    /// Where these paths of the cell lead.
    Paths(Vec<String>),
    /// What a program of the user's says.
    Hook {
        /// Which one.
        id: HookId,
        /// Program and arguments.
        run: Vec<std::path::PathBuf>,
        /// Longest run, in seconds.
        timeout_s: u32,
        /// What it reads.
        stdin: Vec<u8>,
    },
}

/// What was found out.
#[derive(Debug, Clone, PartialEq)]
pub enum Finding {
    /// Where paths lead; `None` for one that cannot be followed.
    Paths(Vec<(String, Option<String>)>),
    /// What a hook said.
    Hook(HookId, HookAnswer),
}

/// What the CLI wants to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Question {
    /// `can_use_tool`.
    Ask,
    /// The callback before a call, in the modes that keep the CLI's own decisions.
    Gate,
    /// The callback after a call.
    After,
}

/// A question that waits.
#[derive(Debug)]
pub(super) struct Pending {
    question: Question,
    tool: String,
    tool_use_id: String,
    input: Value,
    response: Option<Value>,
    found: Findings,
    /// The errand that it waits for.
    errand: u64,
}

impl Pending {
    /// A call whose tool or input is not said: no rule can speak of it.
    fn cannot_be_judged(&self) -> bool {
        self.tool.is_empty() || !self.input.is_object()
    }
}

fn unreadable() -> Verdict {
    Verdict::deny(
        "unreadable",
        "the question about this call names no tool or no input, so it cannot be judged",
    )
}

/// A decision with its words.
struct Verdict {
    decision: Decision,
    rule: String,
    reason: Option<String>,
    input: Option<Value>,
}

impl Verdict {
    fn deny(rule: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { decision: Decision::Deny, rule: rule.into(), reason: Some(reason.into()), input: None }
    }
}

impl Session {
    /// In `bypassPermissions` this is the gate; in the other modes it is the CLI asking a person, and in a
    /// one-shot job there is none.
    pub(super) fn on_tool(&mut self, ask: ToolAsk) -> Vec<Step> {
        let ToolAsk { request_id, tool_name, tool_use_id, input } = ask;
        let mode = self.plan.permission_mode;
        let found = self.nothing_found();
        let pending = Pending {
            question: Question::Ask,
            tool: tool_name,
            tool_use_id,
            input,
            response: None,
            found,
            errand: 0,
        };
        if let Some(steps) = self.twice(&request_id, &pending) {
            return steps;
        }
        if mode == PermissionMode::BypassPermissions {
            if pending.cannot_be_judged() {
                return self.conclude(&request_id, &pending, unreadable());
            }
            return self.weigh(request_id, pending);
        }
        let reason = format!(
            "permission mode {} would ask a person here, and nobody can be asked in this job; go on without {}",
            mode.as_str(),
            pending.tool
        );
        let verdict = Verdict::deny(format!("permission_mode {}", mode.as_str()), reason);
        self.conclude(&request_id, &pending, verdict)
    }

    /// A callback of ours: the gate in the modes that keep the CLI's own decisions, or the one after calls.
    pub(super) fn on_hook(&mut self, call: HookCall) -> Vec<Step> {
        let HookCall { request_id, callback_id, tool_name, tool_use_id, input, response } = call;
        let question = if callback_id == options::AFTER_CALLBACK { Question::After } else { Question::Gate };
        let found = self.nothing_found();
        let pending = Pending { question, tool: tool_name, tool_use_id, input, response, found, errand: 0 };
        if let Some(steps) = self.twice(&request_id, &pending) {
            return steps;
        }
        if question == Question::Gate && callback_id != options::GATE_CALLBACK {
            let verdict = Verdict::deny("unknown callback", "not a callback of this daemon");
            return self.conclude(&request_id, &pending, verdict);
        }
        if question == Question::Gate && pending.cannot_be_judged() {
            return self.conclude(&request_id, &pending, unreadable());
        }
        self.weigh(request_id, pending)
    }

    /// Two questions under one id cannot be told apart by whoever reads the answer: where one of this id waits, both
    /// are denied.
    fn twice(&mut self, request_id: &str, pending: &Pending) -> Option<Vec<Step>> {
        let other = self.pending.remove(request_id)?;
        let verdict = || Verdict::deny("request id", "two questions about tool calls have the same id");
        let mut steps = self.conclude(request_id, &other, verdict());
        steps.extend(self.conclude(request_id, pending, verdict()));
        Some(steps)
    }

    /// Takes what an errand found out for a question. One that waits no longer, or not for this, needs no answer.
    pub fn on_found(&mut self, request_id: &str, number: u64, finding: Finding) -> Vec<Step> {
        if self.pending.get(request_id).is_none_or(|pending| pending.errand != number) {
            return Vec::new();
        }
        let Some(mut pending) = self.pending.remove(request_id) else { return Vec::new() };
        match finding {
            Finding::Paths(paths) => pending.found.paths.extend(paths),
            Finding::Hook(id, answer) => {
                pending.found.hooks.insert(id, answer);
            }
        }
        self.weigh(request_id.to_owned(), pending)
    }

    /// The CLI waits no longer, and has denied the call by itself.
    pub(super) fn withdrawn(&mut self, request_id: &str) -> Vec<Step> {
        let Some(pending) = self.pending.remove(request_id) else { return Vec::new() };
        let (rule, reason) = WITHDRAWN;
        let verdict = Verdict::deny(rule, reason);
        vec![Step::Event(self.judged(request_id, &pending, verdict))]
    }

    /// Takes the decision of an earlier daemon from its journal, for a question that waited then.
    pub fn on_journaled(&mut self, line: &Line<'_>) -> Vec<Step> {
        let Some(pending) = self.pending.remove(line.request_id.as_ref()) else { return Vec::new() };
        let verdict = Verdict {
            // Without a decision there was none: deny.
            decision: line.decision.unwrap_or(Decision::Deny),
            rule: line.rule.clone().into_owned(),
            reason: line.reason.as_ref().map(|text| text.clone().into_owned()),
            input: line.input.and_then(|raw| serde_json::from_str(raw.get()).ok()),
        };
        // By its words too: a rule of a policy may have this name, and its answer was sent. The reasons of rules end
        // in their policy's name.
        let (rule, reason) = WITHDRAWN;
        if verdict.rule.split(" (").next() == Some(rule) && verdict.reason.as_deref() == Some(reason) {
            return vec![Step::Event(self.judged(&line.request_id, &pending, verdict))];
        }
        self.conclude(&line.request_id, &pending, verdict)
    }

    /// Judges a question with what is known; asks for more, or answers.
    fn weigh(&mut self, request_id: String, mut pending: Pending) -> Vec<Step> {
        let call = Call { tool: &pending.tool, input: &pending.input };
        let judgement = match pending.question {
            Question::Ask | Question::Gate => judge(&self.plan, call, &pending.found),
            Question::After => judge_after(&self.plan, call, &pending.found),
        };
        let verdict = match judgement {
            Judgement::Allow { permit, input } => Verdict {
                decision: if input.is_some() { Decision::Rewrite } else { Decision::Allow },
                rule: permit.rule().to_owned(),
                reason: None,
                input,
            },
            Judgement::Deny(denial) => Verdict::deny(denial.rule, denial.reason),
            Judgement::Need(_) if self.pending.len() >= PENDING_MAX => {
                Verdict::deny("pending", format!("more than {PENDING_MAX} calls wait for a decision"))
            }
            Judgement::Need(need) => {
                let what = self.errand(&pending, need);
                self.errands += 1;
                pending.errand = self.errands;
                self.pending.insert(request_id.clone(), pending);
                return vec![Step::Find(Errand { number: self.errands, request_id, what })];
            }
        };
        self.conclude(&request_id, &pending, verdict)
    }

    fn nothing_found(&self) -> Findings {
        Findings { workspace: Some(self.plan.workspace_at.clone()), ..Findings::default() }
    }

    fn errand(&self, pending: &Pending, need: Need) -> What {
        match need {
            Need::Paths(paths) => What::Paths(paths),
            Need::Hook(judge::Hook { id, run, timeout_s, input, .. }) => {
                let event = match pending.question {
                    Question::Ask | Question::Gate => "PreToolUse",
                    Question::After => "PostToolUse",
                };
                let call = Call { tool: &pending.tool, input: &input };
                let seen = (self.plan.permission_mode.as_str(), self.plan.workspace_at.as_str());
                let text = hook_input(event, call, &pending.tool_use_id, seen, pending.response.as_ref());
                What::Hook { id, run, timeout_s, stdin: text.to_string().into_bytes() }
            }
        }
    }

    /// The event and the answer.
    fn conclude(&mut self, request_id: &str, pending: &Pending, verdict: Verdict) -> Vec<Step> {
        let response = match (pending.question, &verdict.reason) {
            (Question::Ask, None) => {
                json!({ "behavior": "allow", "updatedInput": verdict.input.clone().unwrap_or(json!({})) })
            }
            (Question::Ask, Some(reason)) => json!({ "behavior": "deny", "message": reason }),
            // Never an error answer: the CLI would run the tool.
            (Question::Gate, None) => match &verdict.input {
                None => json!({}),
                Some(input) => {
                    json!({ "hookSpecificOutput": { "hookEventName": "PreToolUse", "updatedInput": input } })
                }
            },
            (Question::Gate, Some(reason)) => json!({ "hookSpecificOutput": {
                "hookEventName": "PreToolUse", "permissionDecision": "deny", "permissionDecisionReason": reason,
            } }),
            (Question::After, None) => json!({}),
            (Question::After, Some(reason)) => json!({ "decision": "block", "reason": reason }),
        };
        let event = self.judged(request_id, pending, verdict);
        vec![Step::Event(event), Step::Send(frames::answer(request_id, &response))]
    }

    fn judged(&mut self, request_id: &str, pending: &Pending, verdict: Verdict) -> Body {
        let Verdict { decision, mut rule, reason, input } = verdict;
        if pending.question == Question::After {
            rule = format!("{rule} (after the call)");
        } else {
            self.tool_calls += 1;
            if decision == Decision::Deny {
                self.tool_denials += 1;
            }
        }
        Body::Tool {
            tool_use_id: pending.tool_use_id.clone(),
            tool: pending.tool.clone(),
            decision,
            rule,
            reason,
            request_id: request_id.to_owned(),
            input: input.and_then(|value| RawValue::from_string(value.to_string()).ok()),
        }
    }
}
