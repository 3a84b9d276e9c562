//! An event: an append-only, numbered fact about one job. Events are what clients follow, what the
//! journal keeps and what an audit reads. The daemon sets number, time and origin of each; nothing that an
//! agent prints can forge one, since an agent's frame is only ever the value of `frame` in an event whose
//! origin is `agent`.

mod totals;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

pub use totals::{EgressBytes, Ran, Totals, Verified};

use crate::change::Summary;
use crate::job::spec::Runtime;
use crate::job::{CellId, Outcome, Pause, State, StopReason};
use crate::money::MicroUsd;
use crate::pricing::Usage;

/// Who stands behind what an event says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// The daemon: states, decisions, limits.
    Daemon,
    /// The gateway: requests and charges, measured at the wire.
    Gateway,
    /// The cell: what the CLI or its children printed. Advice, never proof.
    Agent,
}

/// What was decided about a tool call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Decision {
    /// The call runs.
    Allow,
    /// The call does not run; the agent reads the reason.
    Deny,
    /// The call runs with another input.
    Rewrite,
}

/// Why the gateway itself refused a request. A closed list: metric labels and decisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// No credential, another one than the lease's, or more than one.
    Credential,
    /// A method, path or query that is not on the list.
    Path,
    /// Body too large or compressed, or it did not arrive in time.
    Transport,
    /// Body is not a valid request.
    Malformed,
    /// A field, tool or content source that is not allowed.
    Content,
    /// A model that the lease does not allow.
    Model,
    /// A model without a price.
    Price,
    /// Too many requests under way.
    Busy,
    /// The provider limits the credential, for longer than a request is held.
    Paused,
    /// The cost limit leaves no room.
    Budget,
    /// The ledger does not answer.
    Ledger,
    /// The credential cannot be read.
    Provider,
}

impl Refusal {
    /// All refusals; metrics are seeded from it.
    pub const ALL: [Self; 12] = [
        Self::Credential,
        Self::Path,
        Self::Transport,
        Self::Malformed,
        Self::Content,
        Self::Model,
        Self::Price,
        Self::Busy,
        Self::Paused,
        Self::Budget,
        Self::Ledger,
        Self::Provider,
    ];

    /// The name used in metrics and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Credential => "credential",
            Self::Path => "path",
            Self::Transport => "transport",
            Self::Malformed => "malformed",
            Self::Content => "content",
            Self::Model => "model",
            Self::Price => "price",
            Self::Busy => "busy",
            Self::Paused => "paused",
            Self::Budget => "budget",
            Self::Ledger => "ledger",
            Self::Provider => "provider",
        }
    }
}

/// What happened. In JSON the fields stand beside `seq`, `at_ms` and `origin`, with `type` as the tag.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Body {
    /// The job's state changed; the row says the same.
    State {
        /// The new state.
        #[serde(flatten)]
        state: State,
    },
    /// A cell of its own begins for the job: offsets in streams count from its beginning from here on.
    Attempt {
        /// Which try this is, from 1.
        attempt: u32,
        /// The cell.
        cell: CellId,
        /// Set where the conversation of an earlier attempt is gone on with after a pause.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        paused: Option<Pause>,
        /// Set where an earlier attempt's change set did not pass: what its agent is told.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        repair: Option<String>,
    },
    /// One frame that the CLI printed on stdout.
    Frame {
        /// Offset in the cell's stdout after the frame's line feed.
        end: u64,
        /// The frame, unchanged.
        frame: Box<RawValue>,
    },
    /// A line on stdout that is no JSON, or a piece of stderr: text, with invalid UTF-8 replaced.
    Output {
        /// `stdout` or `stderr`.
        stream: Stream,
        /// Offset in that stream after this piece.
        end: u64,
        /// The text without its line feed.
        text: String,
    },
    /// One frame that the daemon sent to the CLI: what a restarted daemon sends again from the byte the
    /// cell asks for.
    Sent {
        /// Offset in the cell's stdin after the frame's line feed.
        end: u64,
        /// The frame.
        frame: Box<RawValue>,
    },
    /// A tool call was judged.
    Tool {
        /// The CLI's id of the call.
        tool_use_id: String,
        /// The tool's name, `mcp__server__tool` for MCP.
        tool: String,
        /// Allowed or not.
        decision: Decision,
        /// The rule that decided, named as in the policy file.
        rule: String,
        /// What the agent reads when it was denied.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
        /// The CLI's question that this answers; two questions can be about one call.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        request_id: String,
        /// The input that it runs with, where it was rewritten.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        input: Option<Box<RawValue>>,
    },
    /// Something in the cell wanted to reach a host.
    Egress {
        /// The host as decided, in lower case.
        host: String,
        /// The port.
        port: u16,
        /// The method, where the request was looked into.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        method: Option<String>,
        /// The path without its query, where the request was looked into.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path: Option<String>,
        /// Allowed or not.
        decision: Decision,
        /// The rule that decided.
        rule: String,
        /// Why not, where it was denied or failed.
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
    /// A budget has no room for the next request.
    Budget {
        /// Which one: `job`, `batch`, `user_day`, `day`, `month`.
        scope: String,
        /// Settled spend, in micro-USD.
        spent_micro_usd: MicroUsd,
        /// The limit, in micro-USD.
        limit_micro_usd: MicroUsd,
        /// When it is empty again, in milliseconds since 1970.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        resets_at_ms: Option<u64>,
    },
    /// A request for the model passed the gateway's checks and its worst cost was set aside.
    Request {
        /// The model asked for.
        model: String,
        /// What was set aside, in micro-USD.
        reserved_micro_usd: MicroUsd,
        /// The credential that it goes out with, by name.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        credential: String,
    },
    /// A request for the model ended.
    Charge {
        /// The model asked for.
        model: String,
        /// The provider's HTTP status; 0 when there was no answer.
        status: u16,
        /// Tokens as the provider billed them.
        usage: Usage,
        /// What it cost, in micro-USD.
        charged_micro_usd: MicroUsd,
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
    /// A cell is made for the job.
    Cell {
        /// Its id.
        cell: CellId,
        /// What isolates it.
        runtime: Runtime,
        /// Why it is none that the policy names before this one, in words.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        instead: Option<String>,
        /// The image's digest, as the engine names it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        image: Option<String>,
        /// The version of the agent's CLI.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        agent: Option<String>,
    },
    /// The cell's main process ended, as PID 1 reported it.
    Exit {
        /// Exit code; 128 + n for signal n.
        code: i32,
        /// Processes that the kernel killed for memory.
        oom_kills: u64,
        /// Most memory the cell used, in bytes.
        peak_memory_bytes: u64,
        /// CPU time of the cell, in microseconds.
        cpu_us: u64,
    },
    /// A command of the job's `setup` or `verify` begins or has ended; what it printed stands between the two.
    Step {
        /// Which of them.
        stage: Stage,
        /// Its place, from 0.
        index: u32,
        /// The command in one line.
        command: String,
        /// How it ended; absent when it begins.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ended: Option<StepEnd>,
    },
    /// A limit was reached, or a stop was asked for.
    Stop {
        /// Which one.
        reason: StopReason,
        /// The limit or the asker, in words.
        detail: String,
    },
    /// What the job changed in its workspace was written down.
    Changes {
        /// Its figures.
        #[serde(flatten)]
        summary: Box<Summary>,
    },
    /// Something a person should know (ids not mapped, an image picked, a cell lost and found).
    Note {
        /// The words.
        text: String,
    },
    /// Events from `first` to `last` were dropped from the journal to keep it under its limit.
    Truncated {
        /// First number that is gone.
        first: u64,
        /// Last number that is gone.
        last: u64,
    },
    /// Totals beside the outcome; after it comes only the state `done`.
    Summary {
        /// How it ended.
        #[serde(flatten)]
        outcome: Outcome,
        /// Totals as the daemon measured them.
        totals: Box<Totals>,
        /// The agent's final answer, where it gave one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        result: Option<String>,
    },
}

/// What commands of a job's own are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Before the agent, in its cell.
    Setup,
    /// After it, in a fresh one.
    Verify,
}

impl Stage {
    /// Its name in specs, events and words.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Verify => "verify",
        }
    }
}

/// How a command of the job's own ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct StepEnd {
    /// Exit code; 128 + n for signal n.
    pub code: i32,
    /// How long it ran, in milliseconds.
    pub duration_ms: u64,
}

/// A byte stream of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Frames.
    Stdout,
    /// Diagnostics.
    Stderr,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// One event as clients read it. Written only: [`Line`] reads back what the daemon needs, since serde cannot
/// take a raw frame out of a flattened enum.
#[derive(Debug, Clone, Serialize)]
pub struct Event {
    /// Number within the job: from 1, without gaps.
    pub seq: u64,
    /// Wall clock, milliseconds since 1970.
    pub at_ms: u64,
    /// Who stands behind it.
    pub origin: Origin,
    /// What happened.
    #[serde(flatten)]
    pub body: Body,
}

/// What a restarted daemon reads back from a line of the journal.
#[derive(Debug, Deserialize)]
pub struct Line<'a> {
    /// Number within the job.
    pub seq: u64,
    /// Wall clock, milliseconds since 1970.
    #[serde(default)]
    pub at_ms: u64,
    /// The event's type, as in [`Body`].
    #[serde(rename = "type")]
    pub kind: &'a str,
    /// Offset in its stream, for frames and output.
    #[serde(default)]
    pub end: u64,
    /// The frame, unchanged.
    #[serde(borrow, default)]
    pub frame: Option<&'a RawValue>,
    /// The CLI's question, for `tool`.
    #[serde(default)]
    pub request_id: std::borrow::Cow<'a, str>,
    /// The decision, for `tool`.
    #[serde(default)]
    pub decision: Option<Decision>,
    /// The rule, for `tool`.
    #[serde(default)]
    pub rule: std::borrow::Cow<'a, str>,
    /// The reason of a denial, for `tool`.
    #[serde(default)]
    pub reason: Option<std::borrow::Cow<'a, str>>,
    /// The rewritten input, for `tool`.
    #[serde(borrow, default)]
    pub input: Option<&'a RawValue>,
    /// Exit code, for `exit`.
    #[serde(default)]
    pub code: i32,
    /// Processes killed for memory, for `exit`.
    #[serde(default)]
    pub oom_kills: u64,
    /// Most memory used, for `exit`.
    #[serde(default)]
    pub peak_memory_bytes: u64,
    /// CPU time, for `exit`.
    #[serde(default)]
    pub cpu_us: u64,
    /// The provider's status, for `charge`.
    #[serde(default)]
    pub status: u16,
    /// The pause before it, for `attempt`.
    #[serde(default)]
    pub paused: Option<Pause>,
    /// What the agent is told of what did not pass, for `attempt`.
    #[serde(default)]
    pub repair: Option<std::borrow::Cow<'a, str>>,
    /// The state's name, for `state`.
    #[serde(default)]
    pub state: Option<std::borrow::Cow<'a, str>>,
    /// The image, for `cell`.
    #[serde(default)]
    pub image: Option<std::borrow::Cow<'a, str>>,
    /// The agent's version, for `cell`.
    #[serde(default)]
    pub agent: Option<std::borrow::Cow<'a, str>>,
    /// Bytes that left, for `egress`.
    #[serde(default)]
    pub bytes_up: u64,
    /// Bytes that came, for `egress`.
    #[serde(default)]
    pub bytes_down: u64,
    /// Bytes from the package cache, for `egress`.
    #[serde(default)]
    pub cached_bytes: u64,
}

impl Body {
    /// Who stands behind a body of this kind.
    pub fn origin(&self) -> Origin {
        match self {
            Self::Frame { .. } | Self::Output { .. } => Origin::Agent,
            Self::Request { .. }
            | Self::Charge { .. }
            | Self::Refused { .. }
            | Self::Egress { .. }
            | Self::Budget { .. } => Origin::Gateway,
            Self::State { .. }
            | Self::Attempt { .. }
            | Self::Sent { .. }
            | Self::Tool { .. }
            | Self::Cell { .. }
            | Self::Exit { .. }
            | Self::Step { .. }
            | Self::Stop { .. }
            | Self::Changes { .. }
            | Self::Note { .. }
            | Self::Truncated { .. }
            | Self::Summary { .. } => Origin::Daemon,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let frame = RawValue::from_string(r#"{"type":"assistant","x":[1, 2]}"#.to_owned()).expect("json");
        let body = Body::Frame { end: 9, frame };
        let event = Event { seq: 3, at_ms: 4, origin: body.origin(), body };
        let text = serde_json::to_string(&event).expect("json");
        let line: Line = serde_json::from_str(&text).expect("line");
        assert_eq!((line.seq, line.kind, line.end), (3, "frame", 9));
        assert_eq!(line.frame.map(RawValue::get), Some(r#"{"type":"assistant","x":[1, 2]}"#));
        let body = Body::Exit { code: 7, oom_kills: 1, peak_memory_bytes: 2, cpu_us: 3 };
        let text =
            serde_json::to_string(&Event { seq: 1, at_ms: 1, origin: body.origin(), body }).expect("json");
        let line: Line = serde_json::from_str(&text).expect("line");
        assert_eq!((line.kind, line.code, line.oom_kills, line.cpu_us), ("exit", 7, 1, 3));
    }
}
