//! Frames of the CLI's stream-json protocol, one JSON value a line. Reading takes only the fields that the
//! daemon leans on and lets every other pass; writing builds complete frames. A frame from the CLI is
//! untrusted: nothing here panics on one, whatever it holds.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::{Value, json};

/// What a line from the CLI is, as far as the daemon cares.
#[derive(Debug)]
pub enum Incoming<'a> {
    /// An answer to one of our control requests.
    Answer(Answer<'a>),
    /// The CLI asks whether a tool may run.
    CanUseTool(ToolAsk),
    /// A hook callback that we registered.
    Hook(HookCall),
    /// The CLI waits no longer for the answer to one of its questions.
    Cancelled {
        /// Which question.
        request_id: Cow<'a, str>,
    },
    /// A control request that we do not serve.
    Foreign {
        /// Its id, to answer it.
        request_id: String,
        /// Its subtype.
        subtype: String,
    },
    /// A message of the model.
    Assistant {
        /// The provider's id of the message: one message comes as several frames.
        message_id: Cow<'a, str>,
        /// True inside a subagent.
        nested: bool,
    },
    /// The end of a turn.
    Result(Box<TurnResult>),
    /// A background agent or workflow started.
    TaskStarted {
        /// Its id.
        task_id: String,
        /// What it is; agents and workflows are waited for.
        task_type: String,
    },
    /// A background task ended.
    TaskEnded {
        /// Its id.
        task_id: String,
    },
    /// Anything else.
    Other,
}

/// The answer to one of our control requests.
#[derive(Debug)]
pub struct Answer<'a> {
    /// Which request.
    pub request_id: Cow<'a, str>,
    /// What went wrong, where it did.
    pub error: Option<Cow<'a, str>>,
}

/// A `can_use_tool` request.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolAsk {
    /// The id to answer.
    pub request_id: String,
    /// The tool.
    pub tool_name: String,
    /// The call.
    pub tool_use_id: String,
    /// Its input.
    pub input: Value,
}

/// A `hook_callback` request.
#[derive(Debug, Clone, PartialEq)]
pub struct HookCall {
    /// The id to answer.
    pub request_id: String,
    /// The callback we registered.
    pub callback_id: String,
    /// The tool, for tool events.
    pub tool_name: String,
    /// The call, for tool events.
    pub tool_use_id: String,
    /// Its input.
    pub input: Value,
    /// What the tool gave, for events after the call.
    pub response: Option<Value>,
}

/// A `result` frame.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct TurnResult {
    /// `success`, `error_during_execution`, `error_max_turns`, …
    #[serde(default)]
    pub subtype: String,
    /// The one field that tells success from failure.
    #[serde(default)]
    pub is_error: bool,
    /// The API's status, where it was the API that failed.
    #[serde(default)]
    pub api_error_status: Option<u16>,
    /// The final answer.
    #[serde(default)]
    pub result: Option<String>,
    /// What went wrong.
    #[serde(default)]
    pub errors: Vec<String>,
    /// The CLI's own cost figure, cumulative for the process.
    #[serde(default)]
    pub total_cost_usd: Option<f64>,
    /// Why the turn ended.
    #[serde(default)]
    pub terminal_reason: Option<String>,
}

#[derive(Deserialize)]
struct Head<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(borrow, default)]
    subtype: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Response<'a> {
    #[serde(borrow)]
    response: ResponseBody<'a>,
}

#[derive(Deserialize)]
struct ResponseBody<'a> {
    #[serde(borrow)]
    subtype: Cow<'a, str>,
    #[serde(borrow)]
    request_id: Cow<'a, str>,
    #[serde(borrow, default)]
    error: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Request {
    request_id: String,
    /// Read leniently: a question that is odd in one field still has to be answered.
    #[serde(default)]
    request: Value,
}

#[derive(Deserialize)]
struct Cancel<'a> {
    #[serde(borrow)]
    request_id: Cow<'a, str>,
}

#[derive(Deserialize)]
struct AssistantFrame<'a> {
    #[serde(borrow)]
    message: MessageHead<'a>,
    #[serde(borrow, default)]
    parent_tool_use_id: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct MessageHead<'a> {
    #[serde(borrow, default)]
    id: Cow<'a, str>,
}

#[derive(Deserialize)]
struct TaskFrame {
    #[serde(default)]
    task_id: String,
    #[serde(default)]
    task_type: String,
}

/// Reads one line, without its line feed. `None` when it is no JSON object with a `type`, or lacks what its type must have.
pub fn parse(line: &[u8]) -> Option<Incoming<'_>> {
    // The whole line must be UTF-8: it is embedded in an event as it is.
    let line = std::str::from_utf8(line).ok()?;
    let head: Head = serde_json::from_str(line).ok()?;
    let subtype = head.subtype.as_deref().unwrap_or("");
    match head.kind.as_ref() {
        "control_request" => {
            let Request { request_id, request } = serde_json::from_str(line).ok()?;
            Some(incoming_request(request_id, request))
        }
        "control_response" => {
            let Response { response } = serde_json::from_str(line).ok()?;
            let error = match response.subtype.as_ref() {
                "success" => None,
                _ => Some(response.error.unwrap_or(Cow::Borrowed("refused without a reason"))),
            };
            Some(Incoming::Answer(Answer { request_id: response.request_id, error }))
        }
        "control_cancel_request" => {
            let Cancel { request_id } = serde_json::from_str(line).ok()?;
            Some(Incoming::Cancelled { request_id })
        }
        "assistant" => {
            let frame: AssistantFrame = serde_json::from_str(line).ok()?;
            let nested = frame.parent_tool_use_id.is_some();
            Some(Incoming::Assistant { message_id: frame.message.id, nested })
        }
        "result" => Some(Incoming::Result(serde_json::from_str(line).ok()?)),
        "system" if matches!(subtype, "task_started" | "task_notification") => {
            let task: TaskFrame = serde_json::from_str(line).ok()?;
            Some(if subtype == "task_started" {
                Incoming::TaskStarted { task_id: task.task_id, task_type: task.task_type }
            } else {
                Incoming::TaskEnded { task_id: task.task_id }
            })
        }
        _ => Some(Incoming::Other),
    }
}

fn incoming_request(request_id: String, mut request: Value) -> Incoming<'static> {
    let text = |value: &Value| value.as_str().unwrap_or("").to_owned();
    let subtype = text(&request["subtype"]);
    let mut input = request.get_mut("input").map(Value::take).unwrap_or_default();
    match subtype.as_str() {
        "can_use_tool" => Incoming::CanUseTool(ToolAsk {
            request_id,
            tool_name: text(&request["tool_name"]),
            tool_use_id: text(&request["tool_use_id"]),
            input,
        }),
        "hook_callback" => Incoming::Hook(HookCall {
            request_id,
            callback_id: text(&request["callback_id"]),
            tool_name: text(&input["tool_name"]),
            tool_use_id: text(&input["tool_use_id"]),
            response: input.get_mut("tool_response").map(Value::take),
            input: input.get_mut("tool_input").map(Value::take).unwrap_or_default(),
        }),
        _ => Incoming::Foreign { request_id, subtype },
    }
}

/// A control request of ours, as one line.
pub fn control_request(request_id: &str, request: &Value) -> Vec<u8> {
    line(&json!({ "type": "control_request", "request_id": request_id, "request": request }))
}

/// The answer to a control request of the CLI, as one line.
pub fn answer(request_id: &str, response: &Value) -> Vec<u8> {
    line(&json!({
        "type": "control_response",
        "response": { "subtype": "success", "request_id": request_id, "response": response },
    }))
}

/// An error answer. Never for a hook callback: the CLI would run the tool.
pub fn answer_error(request_id: &str, error: &str) -> Vec<u8> {
    line(&json!({
        "type": "control_response",
        "response": { "subtype": "error", "request_id": request_id, "error": error },
    }))
}

/// A user message, as one line.
pub fn user(text: &str) -> Vec<u8> {
    line(&json!({ "type": "user", "message": { "role": "user", "content": text } }))
}

fn line(value: &Value) -> Vec<u8> {
    let mut bytes = value.to_string().into_bytes();
    bytes.push(b'\n');
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_line_panics(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&line);
        }

        #[test]
        fn no_json_panics(kind in "(control_request|control_response|assistant|result|system)", key in "[a-z_]{1,12}", text in ".{0,20}") {
            let line = json!({ "type": kind, key.clone(): text, "request": { key: 1 } }).to_string();
            let _ = parse(line.as_bytes());
        }
    }

    #[test]
    fn a_tool_ask_keeps_its_ids() {
        let line = br#"{"type":"control_request","request_id":"r9","request":{"subtype":"can_use_tool","tool_name":"Bash","input":{"command":"ls"},"tool_use_id":"t1"}}"#;
        let Some(Incoming::CanUseTool(ask)) = parse(line) else { panic!("not a tool ask") };
        assert_eq!(
            (ask.request_id.as_str(), ask.tool_name.as_str(), ask.tool_use_id.as_str()),
            ("r9", "Bash", "t1")
        );
    }

    #[test]
    fn a_hook_call_reads_the_tool_from_its_input() {
        let line = br#"{"type":"control_request","request_id":"r","request":{"subtype":"hook_callback","callback_id":"gate","input":{"tool_name":"Write","tool_use_id":"t2","tool_input":{}}}}"#;
        let Some(Incoming::Hook(call)) = parse(line) else { panic!("not a hook") };
        assert_eq!((call.tool_name.as_str(), call.tool_use_id.as_str()), ("Write", "t2"));
    }

    #[test]
    fn a_question_that_is_odd_in_a_field_is_still_a_question() {
        let line = br#"{"type":"control_request","request_id":"r","request":{"subtype":"hook_callback","callback_id":7,"tool_use_id":null,"input":["x"]}}"#;
        let Some(Incoming::Hook(call)) = parse(line) else { panic!("not a hook") };
        assert_eq!((call.request_id.as_str(), call.tool_name.as_str()), ("r", ""));
    }

    #[test]
    fn an_answer_without_success_is_an_error() {
        let line =
            br#"{"type":"control_response","response":{"subtype":"error","request_id":"h1","error":"no"}}"#;
        let Some(Incoming::Answer(answer)) = parse(line) else { panic!("not an answer") };
        assert_eq!(answer.error.as_deref(), Some("no"));
    }
}
