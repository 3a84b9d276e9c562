//! The audit: what of a journal's lines is a decision, as one record each. A pure projection and no stream of
//! its own: a record says nothing that its event does not, and has the event's number. Only lines whose origin
//! the daemon set to itself or to its gateway are looked into; whatever an agent printed is the value of a
//! line whose origin is `agent`, and never becomes a record.
//!
//! *Invariant*: whether a line is an agent's is read from the bytes in front, which the daemon writes before
//! anything that comes from a cell.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use crate::event::{Decision, Origin, Totals};
use crate::job::{JobId, Outcome, StopReason};
use crate::money::MicroUsd;
use crate::pricing::Usage;

/// One line of an audit.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Record {
    /// Wall clock, milliseconds since 1970.
    pub at_ms: u64,
    /// The job.
    pub job: JobId,
    /// Host user id of its submitter.
    pub uid: u32,
    /// Number of the event within the job.
    pub seq: u64,
    /// Who stands behind it: `daemon` or `gateway`.
    pub origin: Origin,
    /// What was decided.
    #[serde(flatten)]
    pub what: What,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// What was decided; `kind` in JSON.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum What {
    /// A tool call was judged.
    Tool {
        /// The CLI's id of the call.
        tool_use_id: String,
        /// The tool's name.
        tool: String,
        /// Allowed, denied or rewritten.
        decision: Decision,
        /// The rule that decided, named as in the policy file.
        rule: String,
        /// What the agent read when it was denied.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
        /// SHA-256 of the input that it runs with, in hex, where it was rewritten; the event has the input.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        input_sha256: Option<String>,
    },
    /// Something in the cell wanted to reach a host.
    Egress {
        /// The host.
        host: String,
        /// The port.
        port: u16,
        /// The method, where the request was looked into.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        method: Option<String>,
        /// The path without its query, likewise.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path: Option<String>,
        /// Allowed or denied.
        decision: Decision,
        /// The rule that decided.
        rule: String,
        /// Why not.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
        /// The credential that was added, by name.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        credential: Option<String>,
        /// The status of the host's answer, where the request was looked into.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        status: Option<u16>,
        /// Bytes that left the cell, over the network.
        bytes_up: u64,
        /// Bytes that came to it, over the network.
        bytes_down: u64,
        /// Bytes that came to it from the package cache.
        #[serde(default, skip_serializing_if = "is_zero")]
        cached_bytes: u64,
        /// How long it took, in milliseconds.
        duration_ms: u64,
    },
    /// A request for the model was let through and its worst cost set aside.
    Request {
        /// The model asked for.
        model: String,
        /// What was set aside, in micro-USD.
        #[schemars(with = "u64")]
        reserved_micro_usd: MicroUsd,
        /// The credential that it went out with, by name.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        credential: String,
    },
    /// A request for the model ended.
    Charge {
        /// The model asked for.
        model: String,
        /// The provider's HTTP status; 0 when there was no answer.
        status: u16,
        /// What it cost, in micro-USD.
        #[schemars(with = "u64")]
        charged_micro_usd: MicroUsd,
        /// Tokens as the provider billed them.
        usage: Usage,
        /// From the first byte in to the last byte out, in milliseconds.
        duration_ms: u64,
    },
    /// The gateway turned a request away.
    Refused {
        /// The status the CLI got.
        status: u16,
        /// Why.
        why: String,
    },
    /// A budget had no room for the next request.
    Budget {
        /// Which one.
        scope: String,
        /// Settled spend, in micro-USD.
        #[schemars(with = "u64")]
        spent_micro_usd: MicroUsd,
        /// The limit, in micro-USD.
        #[schemars(with = "u64")]
        limit_micro_usd: MicroUsd,
        /// When it is empty again, in milliseconds since 1970.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        resets_at_ms: Option<u64>,
    },
    /// A limit was reached, or somebody asked for a stop.
    Stop {
        /// Which one.
        reason: StopReason,
        /// The limit or the asker, in words.
        detail: String,
    },
    /// The kernel enforced a limit of the cell.
    Limit {
        /// Which one: `memory`.
        limit: String,
        /// How often.
        count: u64,
    },
    /// The job is over.
    End {
        /// How.
        #[serde(flatten)]
        outcome: Outcome,
        /// What the ledger charged, in micro-USD.
        #[schemars(with = "u64")]
        charged_micro_usd: MicroUsd,
        /// Tool calls judged.
        tool_calls: u64,
        /// Tool calls denied.
        tool_denials: u64,
    },
    /// Events were dropped from the journal to keep it under its limit: what they told is not known any more.
    Gap {
        /// First number that is gone.
        first: u64,
        /// Last number that is gone.
        last: u64,
    },
}

/// Kinds to choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Tool calls.
    Tool,
    /// Hosts.
    Egress,
    /// Requests for the model.
    Request,
    /// What they cost.
    Charge,
    /// Requests turned away.
    Refused,
    /// Budgets without room.
    Budget,
    /// Stops.
    Stop,
    /// Limits that the kernel enforced.
    Limit,
    /// Ends of jobs.
    End,
    /// Whatever used a credential, by its name.
    Credential,
}

impl Kind {
    /// All, in the order of the help.
    pub const ALL: [Self; 10] = [
        Self::Tool,
        Self::Egress,
        Self::Request,
        Self::Charge,
        Self::Refused,
        Self::Budget,
        Self::Stop,
        Self::Limit,
        Self::End,
        Self::Credential,
    ];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tool => "tool",
            Self::Egress => "egress",
            Self::Request => "request",
            Self::Charge => "charge",
            Self::Refused => "refused",
            Self::Budget => "budget",
            Self::Stop => "stop",
            Self::Limit => "limit",
            Self::End => "end",
            Self::Credential => "credential",
        }
    }
}

/// A word that is no kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is none of tool, egress, request, charge, refused, budget, stop, limit, end, credential")]
pub struct UnknownKind(pub String);

impl FromStr for Kind {
    type Err = UnknownKind;
    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        let shown = || UnknownKind(text.chars().take(64).collect());
        Self::ALL.into_iter().find(|kind| kind.as_str() == text).ok_or_else(shown)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl What {
    /// Its kind; none for a gap, which every choice shows.
    pub fn kind(&self) -> Option<Kind> {
        match self {
            Self::Tool { .. } => Some(Kind::Tool),
            Self::Egress { .. } => Some(Kind::Egress),
            Self::Request { .. } => Some(Kind::Request),
            Self::Charge { .. } => Some(Kind::Charge),
            Self::Refused { .. } => Some(Kind::Refused),
            Self::Budget { .. } => Some(Kind::Budget),
            Self::Stop { .. } => Some(Kind::Stop),
            Self::Limit { .. } => Some(Kind::Limit),
            Self::End { .. } => Some(Kind::End),
            Self::Gap { .. } => None,
        }
    }

    /// The credential that was used, by name.
    pub fn credential(&self) -> Option<&str> {
        match self {
            Self::Request { credential, .. } => Some(credential.as_str()).filter(|name| !name.is_empty()),
            Self::Egress { credential, .. } => credential.as_deref(),
            Self::Tool { .. }
            | Self::Charge { .. }
            | Self::Refused { .. }
            | Self::Budget { .. }
            | Self::Stop { .. }
            | Self::Limit { .. }
            | Self::End { .. }
            | Self::Gap { .. } => None,
        }
    }

    /// True for what somebody wanted and did not get.
    pub fn is_denial(&self) -> bool {
        match self {
            Self::Tool { decision, .. } | Self::Egress { decision, .. } => *decision == Decision::Deny,
            Self::Refused { .. } | Self::Budget { .. } => true,
            Self::Request { .. }
            | Self::Charge { .. }
            | Self::Stop { .. }
            | Self::Limit { .. }
            | Self::End { .. }
            | Self::Gap { .. } => false,
        }
    }
}

/// Which records are wanted; all conditions hold together. A gap is always told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Of one of these kinds; all where empty.
    pub kinds: Vec<Kind>,
    /// Only what was denied or refused.
    pub denied: bool,
    /// At this time or later, in milliseconds since 1970.
    pub since_ms: u64,
}

impl Filter {
    /// True for a record that is wanted.
    pub fn keeps(&self, record: &Record) -> bool {
        if record.at_ms < self.since_ms {
            return false;
        }
        let Some(kind) = record.what.kind() else { return true };
        let named = |wanted: &Kind| match wanted {
            Kind::Credential => record.what.credential().is_some(),
            other => *other == kind,
        };
        (self.kinds.is_empty() || self.kinds.iter().any(named)) && (!self.denied || record.what.is_denial())
    }
}

/// The front of each line.
#[derive(Debug, Deserialize)]
struct Head<'a> {
    seq: u64,
    at_ms: u64,
    origin: Origin,
    #[serde(rename = "type", borrow)]
    kind: &'a str,
}

#[derive(Deserialize)]
struct Tool<'a> {
    tool_use_id: String,
    tool: String,
    decision: Decision,
    rule: String,
    #[serde(default)]
    reason: Option<String>,
    #[serde(borrow, default)]
    input: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Exit {
    #[serde(default)]
    oom_kills: u64,
}

#[derive(Deserialize)]
struct Summary {
    #[serde(flatten)]
    outcome: Outcome,
    totals: Totals,
}

/// The record of a journal's line, for the job `job` of user `uid`; none where it tells of no decision.
///
/// # Errors
/// For a line that no journal of ours has.
pub fn project(job: &JobId, uid: u32, line: &[u8]) -> Result<Option<Record>, serde_json::Error> {
    // Almost all lines of a journal, and the long ones.
    if is_agents(line) {
        return Ok(None);
    }
    let head: Head<'_> = serde_json::from_slice(line)?;
    let what = match (head.origin, head.kind) {
        (Origin::Agent, _) => return Ok(None),
        (_, "tool") => {
            let event: Tool<'_> = serde_json::from_slice(line)?;
            let input_sha256 = event.input.map(|input| digest(input.get()));
            let Tool { tool_use_id, tool, decision, rule, reason, .. } = event;
            What::Tool { tool_use_id, tool, decision, rule, reason, input_sha256 }
        }
        (_, "exit") => match serde_json::from_slice::<Exit>(line)?.oom_kills {
            0 => return Ok(None),
            count => What::Limit { limit: "memory".to_owned(), count },
        },
        (_, "summary") => {
            let Summary { outcome, totals } = serde_json::from_slice(line)?;
            What::End {
                outcome,
                charged_micro_usd: totals.charged_micro_usd,
                tool_calls: totals.tool_calls,
                tool_denials: totals.tool_denials,
            }
        }
        // The same fields, with `kind` in place of `type`.
        (_, "egress") => renamed(line, "egress")?,
        (_, "request") => renamed(line, "request")?,
        (_, "charge") => renamed(line, "charge")?,
        (_, "refused") => renamed(line, "refused")?,
        (_, "budget") => renamed(line, "budget")?,
        (_, "stop") => renamed(line, "stop")?,
        (_, "truncated") => renamed(line, "gap")?,
        _ => return Ok(None),
    };
    let Head { seq, at_ms, origin, .. } = head;
    Ok(Some(Record { at_ms, job: job.clone(), uid, seq, origin, what }))
}

fn renamed(line: &[u8], kind: &'static str) -> Result<What, serde_json::Error> {
    let mut fields: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(line)?;
    fields.insert("kind".to_owned(), kind.into());
    serde_json::from_value(fields.into())
}

fn digest(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().map(|b| format!("{b:02x}")).collect()
}

/// True for a line whose front, in the very form the journal writes, names the agent as its origin.
fn is_agents(line: &[u8]) -> bool {
    let digits = |rest: &[u8]| rest.iter().take_while(|b| b.is_ascii_digit()).count();
    let number = |rest: &[u8]| -> Option<usize> { Some(digits(rest)).filter(|n| *n > 0) };
    let after = || {
        let rest = line.strip_prefix(b"{\"seq\":")?;
        let rest = rest[number(rest)?..].strip_prefix(b",\"at_ms\":")?;
        rest[number(rest)?..].strip_prefix(b",\"origin\":\"agent\",")
    };
    after().is_some()
}

#[cfg(test)]
mod tests;
