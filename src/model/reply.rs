//! From a scripted reply to bytes: SSE events in the order of the real API, or one JSON message, with the
//! scripted waits and faults. Pure.

use bytes::Bytes;
use serde_json::{Value, json};

use super::ask::Ask;
use super::script::{Block, Fault, Reply, error_json};
use crate::pricing::Usage;

/// What the server does for one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// Nothing, until the client or the server goes.
    Hang,
    /// An answer in steps.
    Answer(Answer),
}

/// One HTTP answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Headers beside the content type.
    pub headers: Vec<(String, String)>,
    /// Content type.
    pub content_type: String,
    /// Wait before the status line, in milliseconds.
    pub latency_ms: u64,
    /// The body, piece by piece.
    pub steps: Vec<Step>,
    /// Whether the connection breaks after the last step.
    pub cut: bool,
}

/// A piece of a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Wait before it, in milliseconds.
    pub wait_ms: u64,
    /// Its bytes.
    pub bytes: Bytes,
}

impl Answer {
    /// An answer of one piece.
    pub fn json(status: u16, body: String) -> Self {
        Self {
            status,
            headers: Vec::new(),
            content_type: "application/json".to_owned(),
            latency_ms: 0,
            steps: vec![Step { wait_ms: 0, bytes: body.into() }],
            cut: false,
        }
    }

    fn error(status: u16, kind: &str, message: &str) -> Self {
        Self::json(status, error_json(kind, message))
    }
}

/// What the real API refuses before it looks further.
pub fn refusal(ask: &Ask) -> Option<Answer> {
    let why = match (ask.output_tokens_max, ask.thinking_budget) {
        _ if ask.model.is_empty() => "model: Field required",
        (None, _) => "max_tokens: Field required",
        (Some(0), _) => "max_tokens: must be greater than 0",
        (Some(max), Some(budget)) if budget >= max => {
            "`max_tokens` must be greater than `thinking.budget_tokens`"
        }
        (_, Some(budget)) if budget < 1024 => "thinking.budget_tokens: must be at least 1024",
        _ => return None,
    };
    Some(Answer::error(400, "invalid_request_error", why))
}

/// The answer of `reply` to `ask`. `serial` makes ids unique.
pub fn plan(reply: &Reply, ask: &Ask, serial: u64) -> Plan {
    if reply.fault == Some(Fault::Hang) {
        return Plan::Hang;
    }
    let mut answer = match &reply.fault {
        Some(Fault::Status { status, headers, body }) => {
            let headers = headers.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
            Answer { headers, ..Answer::json(*status, ask.fill(body)) }
        }
        fault => {
            let message = Message::new(reply, ask, serial);
            if ask.stream { stream(&message, reply, fault.as_ref()) } else { whole(&message, fault.as_ref()) }
        }
    };
    if let Some(content_type) = &reply.content_type {
        answer.content_type.clone_from(content_type);
    }
    answer.latency_ms = reply.latency_ms;
    answer.headers.push(("request-id".to_owned(), format!("req_scripted{serial:016x}")));
    Plan::Answer(answer)
}

/// A reply with everything filled in.
struct Message {
    id: String,
    model: String,
    blocks: Vec<Value>,
    usage: Usage,
    stop_reason: String,
}

impl Message {
    fn new(reply: &Reply, ask: &Ask, serial: u64) -> Self {
        let block = |(index, block): (usize, &Block)| match block {
            Block::Text(text) => json!({ "type": "text", "text": ask.fill(text) }),
            Block::Thinking(text) => {
                json!({ "type": "thinking", "thinking": ask.fill(text), "signature": "c2NyaXB0ZWQ=" })
            }
            Block::Tool { name, input, id } => {
                let id = id.clone().unwrap_or_else(|| format!("toolu_{serial:016x}{index:02}"));
                let input = ask.fill_value(&Value::Object(input.clone()));
                json!({ "type": "tool_use", "id": id, "name": name, "input": input })
            }
        };
        let blocks: Vec<Value> = reply.blocks.iter().enumerate().map(block).collect();
        let calls_tool = blocks.iter().any(|block| block["type"] == "tool_use");
        let usual = if calls_tool { "tool_use" } else { "end_turn" };
        let mut stop_reason = reply.stop_reason.clone().unwrap_or_else(|| usual.to_owned());
        let mut usage = reply.usage.unwrap_or_else(|| {
            let output_bytes: usize = blocks.iter().map(|block| block.to_string().len()).sum();
            Usage { input: ask.body_bytes as u64 / 4, output: output_bytes as u64 / 4, ..Usage::default() }
        });
        let output_max = ask.output_tokens_max.unwrap_or(u64::MAX);
        if usage.output > output_max {
            usage.output = output_max;
            stop_reason = "max_tokens".to_owned();
        }
        Self { id: format!("msg_{serial:016x}"), model: ask.model.clone(), blocks, usage, stop_reason }
    }

    fn usage_json(&self, output: u64) -> Value {
        let usage = &self.usage;
        json!({
            "input_tokens": usage.input,
            "cache_creation_input_tokens": usage.cache_write_5m + usage.cache_write_1h,
            "cache_read_input_tokens": usage.cache_read,
            "cache_creation": {
                "ephemeral_5m_input_tokens": usage.cache_write_5m,
                "ephemeral_1h_input_tokens": usage.cache_write_1h,
            },
            "output_tokens": output,
            "service_tier": "standard",
        })
    }

    fn json(&self, content: &[Value], stop_reason: &Value, output: u64) -> Value {
        json!({
            "id": self.id, "type": "message", "role": "assistant", "model": self.model,
            "content": content, "stop_reason": stop_reason, "stop_sequence": null,
            "usage": self.usage_json(output),
        })
    }
}

fn whole(message: &Message, fault: Option<&Fault>) -> Answer {
    let body = message.json(&message.blocks, &json!(message.stop_reason), message.usage.output).to_string();
    match fault {
        Some(Fault::Error { kind, message, .. }) => Answer::error(500, kind, message),
        Some(Fault::Cut(_)) => {
            let half = body.get(..body.len() / 2).unwrap_or("{").to_owned();
            Answer { cut: true, ..Answer::json(200, half) }
        }
        Some(Fault::Malformed(_)) => Answer::json(200, "{\"type\":\"message\",\u{1}".to_owned()),
        _ => Answer::json(200, body),
    }
}

fn stream(message: &Message, reply: &Reply, fault: Option<&Fault>) -> Answer {
    let mut out = Events { steps: Vec::new(), delay_ms: reply.chunk_delay_ms };
    let start = message.json(&[], &Value::Null, message.usage.output.min(1));
    out.push(0, "message_start", json!({ "type": "message_start", "message": start }));
    for (index, block) in message.blocks.iter().enumerate() {
        out.block(index, block, reply.chunk_chars);
        if index == 0 {
            out.push(0, "ping", json!({ "type": "ping" }));
        }
    }
    let mut usage = message.usage_json(message.usage.output);
    if let Some(map) = usage.as_object_mut() {
        map.remove("cache_creation");
        map.remove("service_tier");
    }
    let delta = json!({ "stop_reason": message.stop_reason, "stop_sequence": null });
    out.push(0, "message_delta", json!({ "type": "message_delta", "delta": delta, "usage": usage }));
    out.push(0, "message_stop", json!({ "type": "message_stop" }));

    let keep = |events: &u64| usize::try_from(*events).unwrap_or(usize::MAX);
    match fault {
        Some(Fault::Cut(after)) => out.steps.truncate(keep(after)),
        Some(Fault::Error { after_events, kind, message }) => {
            out.steps.truncate(keep(after_events));
            let error = json!({ "type": "error", "error": { "type": kind, "message": message } });
            out.push(0, "error", error);
        }
        Some(Fault::Malformed(after)) => {
            out.steps.truncate(keep(after));
            let garbage =
                Bytes::from_static(b"event: content_block_delta\ndata: {\"type\":\"conte\xff\x00\x01\n\n");
            out.steps.push(Step { wait_ms: 0, bytes: garbage });
        }
        _ => {}
    }
    Answer {
        status: 200,
        headers: vec![("cache-control".to_owned(), "no-cache".to_owned())],
        content_type: "text/event-stream; charset=utf-8".to_owned(),
        latency_ms: 0,
        steps: out.steps,
        cut: matches!(fault, Some(Fault::Cut(_))),
    }
}

struct Events {
    steps: Vec<Step>,
    delay_ms: u64,
}

impl Events {
    fn push(&mut self, wait_ms: u64, name: &str, data: Value) {
        self.steps.push(Step { wait_ms, bytes: format!("event: {name}\ndata: {data}\n\n").into() });
    }

    fn delta(&mut self, index: usize, delta: Value) {
        let event = json!({ "type": "content_block_delta", "index": index, "delta": delta });
        self.push(self.delay_ms, "content_block_delta", event);
    }

    fn block(&mut self, index: usize, block: &Value, chunk_chars: usize) {
        let mut start = block.clone();
        let kind = block["type"].as_str().unwrap_or_default();
        match kind {
            "tool_use" => start["input"] = json!({}),
            "thinking" => {
                start["thinking"] = json!("");
                start["signature"] = json!("");
            }
            _ => start["text"] = json!(""),
        }
        let event = json!({ "type": "content_block_start", "index": index, "content_block": start });
        self.push(0, "content_block_start", event);
        let text = |key: &str| block[key].as_str().unwrap_or_default().to_owned();
        match kind {
            "tool_use" => {
                for part in chunks(&block["input"].to_string(), chunk_chars) {
                    self.delta(index, json!({ "type": "input_json_delta", "partial_json": part }));
                }
            }
            "thinking" => {
                for part in chunks(&text("thinking"), chunk_chars) {
                    self.delta(index, json!({ "type": "thinking_delta", "thinking": part }));
                }
                self.delta(index, json!({ "type": "signature_delta", "signature": text("signature") }));
            }
            _ => {
                for part in chunks(&text("text"), chunk_chars) {
                    self.delta(index, json!({ "type": "text_delta", "text": part }));
                }
            }
        }
        self.push(0, "content_block_stop", json!({ "type": "content_block_stop", "index": index }));
    }
}

/// `text` in pieces of `chars` characters, never inside one.
fn chunks(text: &str, chars: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = rest.char_indices().nth(chars).map_or(rest.len(), |(at, _)| at);
        let (piece, tail) = rest.split_at(end);
        rest = tail;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Script;

    fn answer(script: &str, ask: &Ask) -> Answer {
        let script = Script::parse(script, "t").unwrap();
        match plan(&script.choose(ask).reply, ask, 7) {
            Plan::Answer(answer) => answer,
            Plan::Hang => panic!("hangs"),
        }
    }

    fn ask(stream: bool) -> Ask {
        Ask {
            model: "m".into(),
            stream,
            output_tokens_max: Some(1000),
            prompt: "hä".into(),
            ..Ask::default()
        }
    }

    fn names(answer: &Answer) -> Vec<String> {
        let name =
            |step: &Step| String::from_utf8_lossy(&step.bytes)[7..].split('\n').next().unwrap().to_owned();
        answer.steps.iter().map(name).collect()
    }

    #[test]
    fn events_come_in_the_order_of_the_real_api() {
        let script = "[default]\nchunk_chars = 4\nblocks = [{ thinking = \"hm\" }, { text = \"{{prompt}}!\" }, \
                      { tool = \"Bash\", input = { command = \"ls\" } }]";
        let answer = answer(script, &ask(true));
        let expected = "message_start content_block_start content_block_delta content_block_delta \
            content_block_stop ping content_block_start content_block_delta content_block_stop \
            content_block_start content_block_delta content_block_delta content_block_delta \
            content_block_delta content_block_stop message_delta message_stop";
        assert_eq!(names(&answer).join(" "), expected);
        let delta = String::from_utf8_lossy(&answer.steps[15].bytes).into_owned();
        assert!(delta.contains("\"stop_reason\":\"tool_use\""), "{delta}");
    }

    #[test]
    fn faults_end_the_stream_where_the_script_says() {
        let with =
            |fault: &str| answer(&format!("[default]\ntext = \"abc\"\nfault = {{ {fault} }}"), &ask(true));
        let cut = with("cut_after_events = 2");
        assert!(cut.cut && cut.steps.len() == 2);
        let error = with("error_after_events = 1, type = \"overloaded_error\"");
        assert_eq!(names(&error), ["message_start", "error"]);
        assert!(std::str::from_utf8(&with("malformed_after_events = 1").steps[1].bytes).is_err());
        let limited = with("status = 429, headers = { retry-after = \"3\" }");
        assert_eq!((limited.status, limited.headers[0].1.as_str()), (429, "3"));
    }

    #[test]
    fn output_is_clipped_to_max_tokens_as_the_real_api_does() {
        let script = "[default]\ntext = \"a\"\nusage = { input = 5, output = 9000 }";
        let answer = answer(script, &ask(false));
        let body: Value = serde_json::from_slice(&answer.steps[0].bytes).unwrap();
        assert_eq!(
            (body["usage"]["output_tokens"].as_u64(), body["stop_reason"].as_str()),
            (Some(1000), Some("max_tokens"))
        );
        let bad = Ask { thinking_budget: Some(1000), ..ask(true) };
        assert_eq!(refusal(&bad).map(|a| a.status), Some(400));
        assert_eq!(refusal(&ask(true)), None);
    }
}
