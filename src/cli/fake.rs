//! A daemon for tests: speaks the wire types on a unix socket, from a script. It is the outside world of a
//! client, and the only thing here that is not real.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::Context;
use super::render::Out;
use crate::config::Machine;

pub(super) const JOB: &str = "j0dq2v7hk0x3m9ra";

/// What the daemon has and does.
#[derive(Default)]
pub(super) struct Script {
    /// Jobs, newest first; the first one is what a submit answers.
    pub(super) jobs: Vec<Value>,
    /// Events of the first job.
    pub(super) events: Vec<Value>,
    /// Further events, once it was cancelled; until then a following stream stays open.
    pub(super) after_cancel: Vec<Value>,
    /// Break the first connections for events after so many bytes.
    pub(super) cuts: VecDeque<usize>,
    /// Break so many submits before their answer.
    pub(super) lost_submits: usize,
    /// Answers to whole requests, by method and path.
    pub(super) errors: Vec<(&'static str, u16, Value)>,
    /// The report of the first job.
    pub(super) report: Option<String>,
    /// What `GET /healthz` says.
    pub(super) health: Value,
    /// Requests as they came: method, path, idempotency key, body.
    pub(super) requests: Vec<(String, String, String)>,
}

/// A running daemon; it ends with the value.
pub(super) struct Daemon {
    dir: tempfile::TempDir,
    pub(super) script: Arc<Mutex<Script>>,
    heard: watch::Receiver<()>,
    _tasks: JoinSet<()>,
}

type Body = BoxBody<Bytes, std::io::Error>;

impl Daemon {
    pub(super) fn start(script: Script) -> Self {
        let dir = tempfile::tempdir().expect("dir");
        let listener = UnixListener::bind(dir.path().join("s.sock")).expect("bind");
        let script = Arc::new(Mutex::new(script));
        let (cancelled, _) = watch::channel(false);
        let (hear, heard) = watch::channel(());
        let mut tasks = JoinSet::new();
        let shared = script.clone();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (script, cancelled, hear) = (shared.clone(), cancelled.clone(), hear.clone());
                connections.spawn(async move {
                    let service = hyper::service::service_fn(|request| {
                        let answer = answer(&script, &cancelled, request);
                        futures_util::FutureExt::inspect(answer, |_| {
                            hear.send_replace(());
                        })
                    });
                    let io = TokioIo::new(stream);
                    // A connection that is cut on purpose ends with an error.
                    let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
                });
            }
        });
        Self { dir, script, heard, _tasks: tasks }
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.dir.path().join("s.sock")
    }

    /// Waits until a request whose line contains `part` was answered.
    pub(super) async fn heard(&self, part: &str) {
        let mut heard = self.heard.clone();
        while !self.requests().iter().any(|(line, ..)| line.contains(part)) {
            heard.changed().await.expect("daemon");
        }
    }

    pub(super) fn requests(&self) -> Vec<(String, String, String)> {
        self.script.lock().expect("lock").requests.clone()
    }
}

async fn answer(
    script: &Mutex<Script>,
    cancelled: &watch::Sender<bool>,
    request: Request<Incoming>,
) -> Result<Response<Body>, std::io::Error> {
    let line = format!("{} {}", request.method(), request.uri());
    let key = request.headers().get("idempotency-key").and_then(|v| v.to_str().ok()).unwrap_or("").to_owned();
    let body = request.into_body().collect().await.map_err(std::io::Error::other)?.to_bytes();
    let mut script = script.lock().expect("lock");
    script.requests.push((line.clone(), key, String::from_utf8_lossy(&body).into_owned()));
    if let Some((_, status, body)) = script.errors.iter().find(|(prefix, ..)| line.starts_with(prefix)) {
        return Ok(whole(*status, body));
    }
    let (path, query) = line.split_once('?').unwrap_or((&line, ""));
    if path == "POST /v1/jobs" && script.lost_submits > 0 {
        script.lost_submits -= 1;
        return Err(std::io::Error::other("cut before the answer"));
    }
    let known = |script: &Script| {
        script.jobs.iter().find(|j| path.contains(j["id"].as_str().unwrap_or("-"))).cloned()
    };
    Ok(match path {
        "GET /healthz" => whole(200, &script.health),
        "GET /v1/jobs" => page(&script, query),
        "POST /v1/jobs" => whole(201, &script.jobs[0]),
        path if path.ends_with("/events") => events(&mut script, cancelled, query),
        path if path.ends_with("/cancel") => {
            let more = std::mem::take(&mut script.after_cancel);
            script.events.extend(more);
            cancelled.send_replace(true);
            whole(202, &known(&script).unwrap_or_default())
        }
        path if path.ends_with("/report") => match &script.report {
            Some(text) => {
                let full = Full::new(Bytes::from(text.clone())).map_err(|e: Infallible| match e {});
                Response::new(BoxBody::new(full))
            }
            None => whole(404, &error("not_found", "no report")),
        },
        path if path.starts_with("DELETE") => whole(204, &Value::Null),
        _ => match known(&script) {
            Some(job) => whole(200, &job),
            None => whole(404, &error("not_found", "no such job")),
        },
    })
}

/// Pages of two, so that a client must turn them.
fn page(script: &Script, query: &str) -> Response<Body> {
    let from: usize = query.split("cursor=").nth(1).and_then(|c| c.parse().ok()).unwrap_or(0);
    let jobs: Vec<&Value> = script.jobs.iter().skip(from).take(2).collect();
    let next = (from + 2 < script.jobs.len()).then(|| (from + 2).to_string());
    whole(200, &json!({ "jobs": jobs, "next_cursor": next }))
}

fn events(script: &mut Script, cancelled: &watch::Sender<bool>, query: &str) -> Response<Body> {
    let from: u64 = query.split(['=', '&']).nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    let of = |events: &[Value]| -> String {
        let wanted = events.iter().filter(|e| e["seq"].as_u64() >= Some(from));
        wanted.map(|e| format!("{e}\n")).collect()
    };
    let text = of(&script.events);
    if let Some(cut) = script.cuts.pop_front() {
        let part = Bytes::from(text.into_bytes()[..cut].to_vec());
        let broken = std::io::Error::other("cut");
        return Response::new(streamed(stream::iter([Ok(Frame::data(part)), Err(broken)])));
    }
    // Written in pieces of seven bytes: a reader must not count on lines arriving whole.
    let pieces: Vec<Bytes> = text.as_bytes().chunks(7).map(Bytes::copy_from_slice).collect();
    let now = stream::iter(pieces.into_iter().map(|p| Ok(Frame::data(p))));
    if script.after_cancel.is_empty() {
        return Response::new(streamed(now));
    }
    let later = Bytes::from(of(&script.after_cancel));
    let mut cancelled = cancelled.subscribe();
    let rest = stream::once(async move {
        // The daemon ends the stream when its job is done, which here is when it was cancelled.
        let _ = cancelled.wait_for(|c| *c).await;
        Ok(Frame::data(later))
    });
    Response::new(streamed(futures_util::StreamExt::chain(now, rest)))
}

fn streamed(
    frames: impl futures_util::Stream<Item = Result<Frame<Bytes>, std::io::Error>> + Send + Sync + 'static,
) -> Body {
    BoxBody::new(StreamBody::new(frames))
}

fn whole(status: u16, body: &Value) -> Response<Body> {
    let bytes = if body.is_null() { Bytes::new() } else { Bytes::from(body.to_string()) };
    let full = Full::new(bytes).map_err(|e: Infallible| match e {});
    let mut response = Response::new(BoxBody::new(full));
    *response.status_mut() = hyper::StatusCode::from_u16(status).expect("status");
    response
}

pub(super) fn error(code: &str, message: &str) -> Value {
    json!({"error": {"code": code, "blame": "job", "message": message, "hint": "do something else"}})
}

/// A job as JSON; `state` may hold the outcome's keys too.
pub(super) fn job(id: &str, state: Value) -> Value {
    let mut job = json!({
        "id": id, "uid": 1000, "title": "Fix the failing test", "policy": "trusted",
        "model": "claude-sonnet-4-6", "image": "hotcell/cell", "workspace": "/home/ann/app",
        "workspace_mode": "bind", "labels": {"team": "web"}, "priority": 0, "cell": "c7hk0x3m9ra2v",
        "created_at": "2026-01-02T03:04:05.000Z", "started_at": "2026-01-02T03:04:06.000Z",
        "ended_at": "2026-01-02T03:04:48.100Z", "last_seq": 14, "cost_limit_usd": 1.0, "cost_usd": 0.0421,
        "totals": totals(), "result": "Both tests pass now.",
    });
    if let (Value::Object(job), Value::Object(state)) = (&mut job, state) {
        job.extend(state);
    }
    job
}

pub(super) fn totals() -> Value {
    json!({
        "charged_micro_usd": 42_100, "cli_micro_usd": 41_500, "turns": 3,
        "usage": {"input": 980, "output": 1_234, "cache_read": 45_600, "cache_write_5m": 12_345, "cache_write_1h": 0},
        "requests": 4, "tool_calls": 4, "tool_denials": 1, "peak_memory_bytes": 612_000_000, "cpu_us": 7_400_000,
    })
}

/// What a command wrote.
#[derive(Clone, Default)]
pub(super) struct Written(Arc<Mutex<Vec<u8>>>);

impl Written {
    pub(super) fn text(&self) -> String {
        String::from_utf8(self.0.lock().expect("lock").clone()).expect("UTF-8")
    }
}

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("lock").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A context that writes into memory, and the two streams.
pub(super) fn context() -> (Context, Written, Written) {
    let (stdout, stderr) = (Written::default(), Written::default());
    let out = Out::to(Box::new(stdout.clone()), Box::new(stderr.clone()));
    let machine = Machine { cores: 1, ..Machine::default() };
    (Context { out, machine }, stdout, stderr)
}

/// The events of a job as a daemon writes them: states, frames of the CLI, what was judged, what it cost.
/// The frames have the fields that CLI 2.1.197 prints, shortened where nobody reads them.
pub(super) fn events_of_a_job() -> Vec<Value> {
    let assistant = |id: &str, block: Value, parent: Value| {
        json!({"type": "assistant", "message": {"id": id, "type": "message", "role": "assistant",
            "model": "claude-sonnet-4-6", "content": [block], "stop_reason": null,
            "usage": {"input_tokens": 3, "output_tokens": 1}},
            "parent_tool_use_id": parent, "session_id": "5e", "uuid": "u"})
    };
    let tool = |id: &str, name: &str, input: Value| json!({"type": "tool_use", "id": id, "name": name, "input": input});
    let result = |id: &str, content: &str, failed: bool| {
        json!({"type": "user", "message": {"role": "user", "content": [{"type": "tool_result",
            "tool_use_id": id, "content": content, "is_error": failed}]}, "parent_tool_use_id": null})
    };
    let frame = |frame: Value| json!({"type": "frame", "end": 0, "frame": frame});
    let judged = |id: &str, name: &str, decision: &str| json!({"type": "tool", "tool_use_id": id, "tool": name, "decision": decision, "rule": "tools.allow *"});
    let mut denied = judged("toolu_4", "WebFetch", "deny");
    denied["reason"] = json!("the tool WebFetch is not allowed (policy trusted, rule tools.deny WebFetch)");
    numbered(vec![
        json!({"type": "state", "state": "queued"}),
        json!({"type": "state", "state": "preparing"}),
        json!({"type": "note", "text": "files in the workspace are owned by uid 1000"}),
        json!({"type": "state", "state": "running"}),
        json!({"type": "sent", "end": 10, "frame": {"type": "user", "message": {"role": "user", "content": "secret plan"}}}),
        frame(json!({"type": "system", "subtype": "init", "cwd": "/workspace", "session_id": "5e",
            "tools": ["Bash", "Read"], "mcp_servers": [], "model": "claude-sonnet-4-6",
            "permissionMode": "bypassPermissions", "claude_code_version": "2.1.197"})),
        frame(assistant(
            "msg_1",
            json!({"type": "thinking", "thinking": "hm", "signature": "s"}),
            Value::Null,
        )),
        frame(assistant(
            "msg_1",
            json!({"type": "text", "text": "I will run the tests first.\n"}),
            Value::Null,
        )),
        frame(assistant(
            "msg_1",
            tool("toolu_1", "Bash", json!({"command": "cargo test --quiet", "description": "Run tests"})),
            Value::Null,
        )),
        judged("toolu_1", "Bash", "allow"),
        json!({"type": "charge", "model": "claude-sonnet-4-6", "status": 200, "usage": {"input": 1, "output": 2,
            "cache_read": 0, "cache_write_5m": 0, "cache_write_1h": 0}, "charged_micro_usd": 21_000, "duration_ms": 900}),
        frame(result("toolu_1", "Exit code 101\ntest sum ... FAILED\n", true)),
        json!({"type": "output", "stream": "stderr", "end": 20, "text": "warning: \u{1b}[33mslow\u{1b}[0m"}),
        frame(assistant(
            "msg_2",
            tool(
                "toolu_2",
                "Edit",
                json!({"file_path": "/workspace/src/sum.rs", "old_string": "-", "new_string": "+"}),
            ),
            Value::Null,
        )),
        judged("toolu_2", "Edit", "allow"),
        frame(result("toolu_2", "The file has been updated.", false)),
        frame(assistant(
            "msg_2",
            tool("toolu_3", "Agent", json!({"description": "Check the docs", "prompt": "…"})),
            Value::Null,
        )),
        frame(assistant(
            "msg_9",
            tool("toolu_31", "Grep", json!({"pattern": "fn sum", "path": "docs"})),
            json!("toolu_3"),
        )),
        frame(assistant(
            "msg_3",
            tool("toolu_4", "WebFetch", json!({"url": "https://example.com", "prompt": "x"})),
            Value::Null,
        )),
        denied,
        frame(result("toolu_4", "the tool WebFetch is not allowed", true)),
        frame(json!({"type": "system", "subtype": "api_retry", "attempt": 1, "max_retries": 10,
            "retry_delay_ms": 512.18, "error_status": 429, "error": "rate_limit"})),
        frame(assistant("msg_4", tool("toolu_5", "mcp__db__query", json!({"sql": "select 1"})), Value::Null)),
        frame(assistant("msg_5", json!({"type": "text", "text": "Both tests\npass now."}), Value::Null)),
        frame(json!({"type": "result", "subtype": "success", "is_error": false, "num_turns": 3,
            "result": "Both tests\npass now.", "total_cost_usd": 0.0415, "permission_denials": []})),
        json!({"type": "a_kind_of_a_newer_daemon", "x": 1}),
        json!({"type": "state", "state": "collecting", "stopped": null}),
        json!({"type": "state", "state": "done", "outcome": "succeeded"}),
        json!({"type": "summary", "outcome": "succeeded", "totals": totals(), "result": "Both tests\npass now."}),
    ])
}

/// Gives events their numbers, times and origins.
pub(super) fn numbered(events: Vec<Value>) -> Vec<Value> {
    let start = 1_767_323_045_000u64; // 2026-01-02T03:04:05Z
    let number = |(index, mut event): (usize, Value)| {
        event["seq"] = json!(index + 1);
        event["at_ms"] = json!(start + 1500 * index as u64);
        event["origin"] = json!("daemon");
        event
    };
    events.into_iter().enumerate().map(number).collect()
}
