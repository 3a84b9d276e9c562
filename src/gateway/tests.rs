//! The gateway on real sockets against the scripted model, in one process.

mod cuts;
mod requests;
mod shared;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::agent::provider::ProviderKind;
use crate::job::JobSpec;
use crate::job::{CellId, JobId};
use crate::model::{ModelReport, Recorder, Script, serve};
use crate::money::{Budget, Scope};
use crate::policy::{Defaults, Plan, Policy, narrow};

pub(super) const KEY: &str = "canary-key-0123456789";
pub(super) const TOKEN: &str = "job-token";
pub(super) const MODEL: &str = "claude-sonnet-4-6";

pub(super) struct World {
    pub(super) recorder: Arc<Recorder>,
    stop: CancellationToken,
    model: JoinHandle<ModelReport>,
    ledger: Arc<MemoryLedger>,
    pub(super) lease: Lease,
    dir: tempfile::TempDir,
    job: JobId,
}

pub(super) struct Setup {
    pub(super) limit: Option<u64>,
    pub(super) limits: Limits,
    pub(super) models: Vec<String>,
    /// A provider and its credential's kind; the base URL is what follows the model's.
    pub(super) provider: Option<(ProviderSpec, CredentialKind)>,
    /// What the credential's file holds.
    pub(super) key: String,
    /// Where the credential comes from instead.
    pub(super) source: Option<CredentialSource>,
}

impl Default for Setup {
    fn default() -> Self {
        let limits = Limits { drain: Duration::from_secs(5), ..Limits::default() };
        Self { limit: None, limits, models: vec!["*".into()], provider: None, key: KEY.into(), source: None }
    }
}

/// A plan that allows these models.
pub(super) fn plan(models: Vec<String>) -> Arc<Plan> {
    let policy = Policy::parse("test", include_str!("../../policies/default.toml")).unwrap();
    let defaults = Defaults { model: MODEL.into(), image: "x".into(), provider: "test".into() };
    let spec = JobSpec::parse(br#"{"prompt":"x"}"#).unwrap();
    let mut plan = narrow(&spec, &policy, None, &defaults).unwrap();
    plan.layers[0].models_allow = models;
    Arc::new(plan)
}

/// Nothing is held while the provider is limited.
fn unheld() -> Limits {
    Limits { pace_wait: Duration::ZERO, ..Limits::default() }
}

pub(super) struct Answer {
    pub(super) status: u16,
    headers: hyper::HeaderMap,
    pub(super) body: String,
    pub(super) whole: bool,
}

impl World {
    pub(super) async fn new(script: &str) -> Self {
        Self::with(script, Setup::default()).await
    }

    pub(super) async fn with(script: &str, setup: Setup) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base_url = format!("http://{}/some/prefix", listener.local_addr().unwrap());
        let (stop, recorder) = (CancellationToken::new(), Arc::new(Recorder::memory()));
        let script = Arc::new(Script::parse(script, "test").unwrap());
        let model = tokio::spawn(serve(listener, script, Arc::clone(&recorder), stop.clone()));
        let (dir, job, ledger) =
            (tempfile::tempdir().unwrap(), JobId::new(1, 1), Arc::new(MemoryLedger::default()));
        let lease = lease(&base_url, &dir, &job, &ledger, setup).await;
        Self { recorder, stop, model, ledger, lease, dir, job }
    }

    pub(super) async fn connect(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("api.sock")).await.unwrap()
    }

    pub(super) async fn send(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        body: String,
    ) -> Response<Incoming> {
        send(self.connect().await, path, headers, body).await
    }

    pub(super) async fn post(&self, body: Value) -> Answer {
        read(self.send("/v1/messages?beta=true", &[("x-api-key", TOKEN)], body.to_string()).await).await
    }

    pub(super) async fn charged(&mut self) -> (Usage, u64) {
        loop {
            if let GatewayEvent::Charged { usage, charged, .. } = self.lease.next_event().await {
                return (usage, charged.0);
            }
        }
    }

    /// Ends everything; nothing may be left reserved.
    pub(super) async fn end(self) -> (Vec<GatewayEvent>, u64) {
        let events = self.lease.destroy().await;
        assert!(!self.dir.path().join("api.sock").exists());
        self.stop.cancel();
        self.model.await.unwrap();
        let (spent, reserved) = self.ledger.standing(&self.job);
        assert_eq!(reserved, MicroUsd::ZERO, "a reservation is left");
        (events, spent.0)
    }
}

/// The user that the tests run as.
pub(super) fn me() -> Identity {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    Identity { uid, gid, groups: Vec::new() }
}

pub(super) fn config(base_url: &str, source: CredentialSource) -> GatewayConfig {
    GatewayConfig {
        providers: vec![ProviderSpec {
            name: "test".into(),
            kind: ProviderKind::Anthropic,
            base_url: base_url.into(),
            credential: "key".into(),
            region: None,
            project: None,
            models: BTreeMap::new(),
        }],
        default_provider: "test".into(),
        credentials: vec![CredentialSpec {
            name: "key".into(),
            kind: CredentialKind::ApiKey,
            source,
            refresh: credentials::REFRESH,
            users: Vec::new(),
            groups: Vec::new(),
            required: true,
        }],
    }
}

async fn lease(
    base_url: &str,
    dir: &tempfile::TempDir,
    job: &JobId,
    ledger: &Arc<MemoryLedger>,
    setup: Setup,
) -> Lease {
    let key_file = dir.path().join("key");
    std::fs::write(&key_file, &setup.key).unwrap();
    let prices = Arc::new(Prices::built_in().unwrap());
    let mut config = config(base_url, setup.source.unwrap_or(CredentialSource::File(key_file)));
    if let Some((spec, kind)) = setup.provider {
        config.credentials[0].kind = kind;
        let base_url = format!("{base_url}{}", spec.base_url);
        config.providers[0] = ProviderSpec { base_url, ..spec };
    }
    let gateway = Gateway::open(config, prices, setup.limits, &super::Reach::default()).await.unwrap();
    let spec = LeaseSpec {
        job: job.clone(),
        cell: CellId::new(1),
        token: TOKEN.into(),
        identity: me(),
        plan: plan(setup.models),
        budgets: setup
            .limit
            .map(|limit| Budget { scope: Scope::Job, limit: MicroUsd(limit) })
            .into_iter()
            .collect(),
        output_tokens_max: None,
        run_dir: dir.path().to_owned(),
        socket_owner: None,
        egress: None,
        model: true,
        first: None,
    };
    gateway.lease(spec, Arc::clone(ledger) as Arc<dyn Ledger>).await.unwrap()
}

async fn send(stream: UnixStream, path: &str, headers: &[(&str, &str)], body: String) -> Response<Incoming> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    // Ends with the sender, or with the body of the answer.
    tokio::spawn(connection);
    let mut request = Request::post(path).header("host", "model");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    sender.send_request(request.body(Full::new(Bytes::from(body))).unwrap()).await.unwrap()
}

pub(super) async fn read(response: Response<Incoming>) -> Answer {
    let (parts, mut body) = response.into_parts();
    let (mut bytes, mut whole) = (Vec::new(), true);
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => bytes.extend_from_slice(frame.data_ref().unwrap()),
            Err(_) => whole = false,
        }
    }
    let body = String::from_utf8_lossy(&bytes).into_owned();
    Answer { status: parts.status.as_u16(), headers: parts.headers, body, whole }
}

pub(super) fn ask(prompt: &str, stream: bool) -> Value {
    json!({ "model": MODEL, "max_tokens": 8000, "stream": stream,
            "messages": [{ "role": "user", "content": prompt }] })
}

pub(super) const SCRIPT: &str = r#"
    [default]
    text = "hello {{prompt}}, a rather long answer for many deltas"
    chunk_chars = 4
    usage = { input = 100, output = 200, cache_read = 300, cache_write_5m = 400, cache_write_1h = 500 }
"#;
/// 100 × 3 + 200 × 15 + 300 × 0.3 + 400 × 3.75 + 500 × 6, in micro-USD.
pub(super) const SCRIPT_COST: u64 = 300 + 3000 + 90 + 1500 + 3000;

#[tokio::test]
async fn the_key_is_injected_and_nothing_of_it_comes_back() {
    let script = format!(
        "{SCRIPT}\n[[reply]]\nwhen={{prompt=\"limit\"}}\nfault={{status=429,\
        headers={{retry-after=\"7\",set-cookie=\"a=b\",x-echo=\"{KEY}\",anthropic-organization-id=\"o\"}}}}"
    );
    let world = World::with(&script, Setup { limits: unheld(), ..Setup::default() }).await;
    let headers = [
        ("x-api-key", TOKEN),
        ("anthropic-version", "2023-06-01"),
        ("cookie", "c"),
        ("accept-encoding", "gzip"),
        ("x-forwarded-for", "1"),
        ("anthropic-beta", "context-management-2025-06-27, effort-2025-11-24"),
    ];
    let answer = read(world.send("/v1/messages?beta=true", &headers, ask("x", true).to_string()).await).await;
    assert!(
        answer.whole && answer.status == 200 && answer.body.ends_with("{\"type\":\"message_stop\"}\n\n"),
        "{}",
        answer.body
    );
    assert!(!format!("{:?}{}", answer.headers, answer.body).contains(KEY));
    let limited = world.post(ask("limit", true)).await;
    assert_eq!((limited.status, limited.headers["retry-after"].to_str().unwrap()), (429, "7"));
    for name in ["set-cookie", "x-echo", "anthropic-organization-id"] {
        assert!(!limited.headers.contains_key(name), "{name}");
    }

    let seen = world.recorder.requests();
    assert_eq!(seen[0].target, "/some/prefix/v1/messages?beta=true");
    assert_eq!(seen[0].header("x-api-key"), Some(KEY));
    assert_eq!(seen[0].header("anthropic-beta"), Some("context-management-2025-06-27, effort-2025-11-24"));
    assert_eq!(seen[0].body, ask("x", true).to_string(), "the body goes on as it came");
    for name in ["cookie", "accept-encoding", "x-forwarded-for", "authorization"] {
        assert_eq!(seen[0].header(name), None, "{name}");
    }
    assert!(!format!("{:?}", seen[0].headers).contains(TOKEN));
    let (events, _) = world.end().await;
    assert!(
        events.contains(&GatewayEvent::ProviderFault { status: Some(429), retry_after_s: Some(7) }),
        "{events:?}"
    );
}

#[tokio::test]
async fn foreign_and_doubled_credentials_reach_nothing() {
    let mut world = World::new(SCRIPT).await;
    let bearer = format!("Bearer {TOKEN}");
    let cases: &[&[(&str, &str)]] = &[
        &[],
        &[("x-api-key", "sk-foreign")],
        &[("x-api-key", "")],
        &[("authorization", "Bearer sk-foreign")],
        &[("authorization", TOKEN)],
        &[("x-api-key", TOKEN), ("authorization", "Bearer sk-foreign")],
        &[("x-api-key", TOKEN), ("authorization", &bearer)],
        &[("x-api-key", TOKEN), ("x-api-key", TOKEN)],
        &[("x-api-key", "sk-foreign"), ("x-api-key", TOKEN)],
    ];
    for headers in cases {
        let answer = read(world.send("/v1/messages", headers, ask("x", true).to_string()).await).await;
        assert_eq!(answer.status, 403, "{headers:?}");
        let refused = GatewayEvent::Refused { status: 403, why: Refusal::Credential };
        assert_eq!(world.lease.next_event().await, refused);
    }
    assert_eq!(world.recorder.total(), 0);
    let answer =
        read(world.send("/v1/messages", &[("authorization", &bearer)], ask("x", true).to_string()).await)
            .await;
    assert_eq!(answer.status, 200, "the token as bearer is good");
    world.end().await;
}

#[tokio::test]
async fn only_two_paths_pass_and_the_warm_up_is_answered_here() {
    let world = World::new(SCRIPT).await;
    for path in [
        "/v1/messages/batches",
        "/v1/files",
        "/v1/messages/",
        "//v1/messages",
        "/v1/messages?beta=false",
        "/",
        "/v1/messages?beta=true&x=1",
        "/v1/%6dessages",
        "/v1/./messages",
        "/v1/messages;x",
        "/v1/complete",
        "/some/prefix/v1/messages",
    ] {
        let answer = read(world.send(path, &[("x-api-key", TOKEN)], ask("x", true).to_string()).await).await;
        assert_eq!(answer.status, 403, "{path}");
    }
    let raw = |head: &'static str| {
        let stream = world.connect();
        async move {
            let (mut stream, mut out) = (stream.await, Vec::new());
            stream
                .write_all(format!("{head}\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes())
                .await
                .unwrap();
            stream.read_to_end(&mut out).await.unwrap();
            String::from_utf8_lossy(&out).into_owned()
        }
    };
    assert!(raw("HEAD / HTTP/1.1").await.starts_with("HTTP/1.1 200"));
    for head in [
        "GET /v1/models HTTP/1.1\r\nx-api-key: job-token",
        "DELETE /v1/messages HTTP/1.1\r\nx-api-key: job-token",
        "POST http://api.example.com/v1/messages HTTP/1.1\r\nx-api-key: job-token",
        "CONNECT api.example.com:443 HTTP/1.1\r\nx-api-key: job-token",
        "GET /v1/messages HTTP/1.1\r\nx-api-key: job-token\r\nupgrade: websocket",
    ] {
        let answer = raw(head).await;
        assert!(answer.starts_with("HTTP/1.1 403"), "{head}: {answer}");
    }
    assert_eq!(world.recorder.total(), 0);
    let counted = read(
        world
            .send(
                "/v1/messages/count_tokens?beta=true",
                &[("x-api-key", TOKEN)],
                json!({ "model": MODEL, "messages": [] }).to_string(),
            )
            .await,
    )
    .await;
    assert!(counted.body.contains("input_tokens"), "{}", counted.body);
    assert_eq!(world.end().await.1, 0, "counting is free");
}

#[tokio::test]
async fn framing_tricks_give_upstream_one_request_at_most() {
    let world = World::new(SCRIPT).await;
    let body = ask("x", false).to_string();
    let smuggled = format!(
        "POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: {TOKEN}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    for framing in [
        "content-length: 5\r\ncontent-length: 6",
        "content-length: +5",
        "content-length: 5\r\ntransfer-encoding: chunked",
        "transfer-encoding: chunked, identity",
        "transfer-encoding: xchunked",
        "content-length: 0\r\n folded: x",
        "content-encoding: gzip\r\ncontent-length: 5",
    ] {
        let before = world.recorder.total();
        let mut stream = world.connect().await;
        let head = format!(
            "POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: {TOKEN}\r\n{framing}\r\n\r\n0\r\n\r\n{smuggled}"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut out = Vec::new();
        // A reset after the refusal is as good as an end.
        let _ = stream.read_to_end(&mut out).await;
        assert!(world.recorder.total() - before <= 1, "{framing}");
    }
    world.end().await;
}

#[tokio::test]
async fn bodies_that_are_not_allowed_are_refused_with_the_reason() {
    let setup = Setup { models: vec!["claude-haiku-4-5*".into(), "x-*".into()], ..Setup::default() };
    let mut world = World::with(SCRIPT, setup).await;
    let haiku = |more: &str| format!("{{\"model\":\"claude-haiku-4-5-20251001\"{more},\"messages\":[]}}");
    for (body, status, why) in [
        ("no json".to_owned(), 400, Refusal::Malformed),
        (haiku(""), 400, Refusal::Malformed),
        (haiku(",\"max_tokens\":0"), 400, Refusal::Malformed),
        (haiku(",\"max_tokens\":5,\"max_tokens\":6"), 400, Refusal::Malformed),
        (haiku(",\"max_tokens\":5,\"mcp_servers\":[{\"url\":\"https://m/\"}]"), 403, Refusal::Content),
        (haiku(",\"max_tokens\":5,\"tools\":[{\"type\":\"web_search_20250305\"}]"), 403, Refusal::Content),
        (ask("x", true).to_string(), 403, Refusal::Model),
        (ask("x", true).to_string().replace(MODEL, "x-unknown"), 403, Refusal::Price),
        (" ".repeat(33 << 20), 413, Refusal::Transport),
    ] {
        let answer = read(world.send("/v1/messages", &[("x-api-key", TOKEN)], body).await).await;
        assert_eq!(answer.status, status, "{why:?}: {}", answer.body);
        let error: Value = serde_json::from_str(&answer.body).unwrap();
        assert!(error["error"]["message"].as_str().unwrap().starts_with("hotcell: "), "{error}");
        assert_eq!(world.lease.next_event().await, GatewayEvent::Refused { status, why });
    }
    assert_eq!(world.recorder.total(), 0);
    assert_eq!(world.post(serde_json::from_str(&haiku(",\"max_tokens\":5")).unwrap()).await.status, 200);
    world.end().await;
}

#[tokio::test]
async fn usage_and_cost_are_exact_streaming_or_not() {
    let mut world = World::new(SCRIPT).await;
    for stream in [true, false] {
        let answer = world.post(ask("x", stream)).await;
        assert!(answer.whole && answer.body.contains("message"), "{}", answer.body);
        let usage = Usage {
            input: 100,
            output: 200,
            cache_read: 300,
            cache_write_5m: 400,
            cache_write_1h: 500,
            web_searches: 0,
        };
        assert_eq!(world.charged().await, (usage, SCRIPT_COST));
    }
    assert_eq!(world.end().await.1, 2 * SCRIPT_COST);
}

#[tokio::test]
async fn a_client_that_leaves_after_any_event_is_charged_in_full() {
    let mut world = World::new(&format!("{SCRIPT}\nchunk_delay_ms = 2")).await;
    for frames in 0..16 {
        let response = world.send("/v1/messages", &[("x-api-key", TOKEN)], ask("x", true).to_string()).await;
        let mut body = response.into_body();
        for _ in 0..frames {
            body.frame().await;
        }
        drop(body);
        assert_eq!(world.charged().await.1, SCRIPT_COST, "left after {frames} frames");
    }
    world.end().await;
}

#[tokio::test]
async fn a_client_that_leaves_before_the_answer_is_charged_in_full() {
    let mut world = World::new(&format!("{SCRIPT}\nlatency_ms = 100")).await;
    let mut stream = world.connect().await;
    let body = ask("x", true).to_string();
    let request = format!(
        "POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: {TOKEN}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    world.recorder.wait_for(1).await;
    drop(stream);
    assert_eq!(world.charged().await.1, SCRIPT_COST);
    world.end().await;
}

#[tokio::test]
async fn a_provider_that_never_answers_costs_the_reservation() {
    let limits = Limits { drain: Duration::from_millis(50), ..Limits::default() };
    let world = World::with("[default]\nfault = { hang = true }", Setup { limits, ..Setup::default() }).await;
    let stream = world.connect().await;
    let waiting = tokio::spawn(async move {
        send(stream, "/v1/messages", &[("x-api-key", TOKEN)], ask("x", true).to_string()).await
    });
    world.recorder.wait_for(1).await;
    waiting.abort();
    let _ = waiting.await;
    let (events, spent) = world.end().await;
    let GatewayEvent::Requested { reserved, .. } = &events[0] else { panic!("{events:?}") };
    assert!(spent > 0 && spent == reserved.0, "{events:?}");
}

#[tokio::test]
async fn broken_answers_break_for_the_client_too_and_cost_no_less_than_was_seen() {
    let input_cost = SCRIPT_COST - 3000;
    for events in 0..14 {
        for fault in ["cut_after_events", "malformed_after_events", "error_after_events"] {
            let mut world = World::new(&format!("{SCRIPT}\nfault = {{ {fault} = {events} }}")).await;
            // As long as the usage that the script says it has.
            let answer = world.post(ask(&"x".repeat(600), true)).await;
            assert_eq!(answer.whole, fault != "cut_after_events", "{fault} {events}");
            let reserved = match world.lease.next_event().await {
                GatewayEvent::Requested { reserved, .. } => reserved.0,
                other => panic!("{other:?}"),
            };
            let (_, charged) = world.charged().await;
            match (events, fault) {
                (0, "error_after_events") => assert_eq!(charged, 0, "it did not begin"),
                (0, _) => assert_eq!(charged, reserved, "{fault}: no usage was seen"),
                _ => assert!(charged > input_cost && charged <= reserved, "{fault} {events}: {charged}"),
            }
            world.end().await;
        }
    }
}

#[tokio::test]
async fn errors_of_the_provider_pass_and_cost_nothing() {
    for status in [400, 401, 403, 404, 429, 500, 529, 307] {
        let script = format!(
            "[default]\nfault = {{ status = {status}, message = \"no\", headers = {{ location = \"http://x\" }} }}"
        );
        let mut world = World::with(&script, Setup { limits: unheld(), ..Setup::default() }).await;
        let answer = world.post(ask("x", true)).await;
        assert_eq!(answer.status, status);
        let hopeless = answer.headers.get("x-should-retry").is_some_and(|value| value == "false");
        assert_eq!(
            hopeless,
            status == 401,
            "the CLI must not try for minutes with a key that is not its own"
        );
        assert!(
            answer.body.contains("\"no\"") && !answer.headers.contains_key("location"),
            "{}",
            answer.body
        );
        assert_eq!(world.charged().await.1, 0);
        assert_eq!(world.recorder.total(), 1, "no redirect is followed");
        world.end().await;
    }
}

#[tokio::test]
async fn an_unreachable_provider_is_a_502_and_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (job, ledger) = (JobId::new(1, 2), Arc::new(MemoryLedger::default()));
    let lease = lease(&format!("http://{free}"), &dir, &job, &ledger, Setup::default()).await;
    let stream = UnixStream::connect(dir.path().join("api.sock")).await.unwrap();
    let answer =
        read(send(stream, "/v1/messages", &[("x-api-key", TOKEN)], ask("x", true).to_string()).await).await;
    assert_eq!(answer.status, 502);
    assert!(answer.body.contains("cannot be reached"), "{}", answer.body);
    let events = lease.destroy().await;
    assert!(
        events.contains(&GatewayEvent::ProviderFault { status: None, retry_after_s: None }),
        "{events:?}"
    );
    assert_eq!(ledger.standing(&job), (MicroUsd::ZERO, MicroUsd::ZERO));
}

#[tokio::test]
async fn spend_never_passes_the_limit_and_then_nothing_goes_upstream() {
    let limit = 300_000;
    let script = "[default]\ntext = \"x\"\nusage = { input = 500, output = 5000 }";
    let world = World::with(script, Setup { limit: Some(limit), ..Setup::default() }).await;
    let mut forwarded = 0;
    let refused = loop {
        let answer = world.post(ask("x", true)).await;
        if answer.status != 200 {
            break answer;
        }
        forwarded += 1;
    };
    assert_eq!(refused.status, 403);
    assert!(refused.body.contains("hotcell: cost limit of 0.30 USD reached"), "{}", refused.body);
    assert!(forwarded >= 3);
    assert_eq!(world.recorder.total(), forwarded);
    let (events, spent) = world.end().await;
    assert!(spent <= limit, "{spent}");
    let exhausted = GatewayEvent::BudgetExhausted {
        scope: Scope::Job,
        spent: MicroUsd(spent),
        limit: MicroUsd(limit),
        resets_at_ms: None,
    };
    assert!(events.contains(&exhausted), "{events:?}");
}

#[tokio::test]
async fn a_request_is_lowered_to_what_is_left_and_its_thinking_with_it() {
    let script = "[default]\ntext = \"x\"\nusage = { input = 500, output = 900000 }";
    let world = World::with(script, Setup { limit: Some(100_000), ..Setup::default() }).await;
    let mut body = ask("x", true);
    body["max_tokens"] = json!(32000);
    body["thinking"] = json!({ "type": "enabled", "budget_tokens": 31999 });
    let answer = world.post(body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let sent = world.recorder.requests()[0].json();
    let max_tokens = sent["max_tokens"].as_u64().unwrap();
    assert!((4096..7000).contains(&max_tokens), "{max_tokens}");
    assert!(sent["thinking"]["budget_tokens"].as_u64().unwrap() < max_tokens);
    let (events, spent) = world.end().await;
    assert!(spent <= 100_000, "{spent}");
    let told = events.iter().any(|event| matches!(event, GatewayEvent::BudgetExhausted { .. }));
    assert!(told, "a lowered answer that ends in max_tokens is the end of the budget: {events:?}");
}

#[tokio::test]
async fn of_many_at_once_with_budget_for_one_only_one_goes_upstream() {
    let price = *Prices::built_in().unwrap().of(MODEL).unwrap();
    let body = ask("x", true);
    let input = body::BodyFacts::read(body.to_string().as_bytes()).unwrap().shape.bound(&[]).tokens;
    let cache = crate::pricing::CacheWrite::FiveMinutes;
    // As dear as its worst case, so that there is room for exactly one.
    let script = format!(
        "[default]\ntext = \"x\"\nlatency_ms = 20\nusage = {{ cache_write_5m = {input}, output = 8000 }}"
    );
    let limit = price.worst_case(input, 8000, cache).0;
    let limits = Limits { requests_max: 300, connections_max: 300, ..Limits::default() };
    let world = World::with(&script, Setup { limit: Some(limit), limits, ..Setup::default() }).await;
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..200 {
        let stream = world.connect().await;
        let body = body.to_string();
        calls.spawn(async move {
            read(send(stream, "/v1/messages", &[("x-api-key", TOKEN)], body).await).await.status
        });
    }
    let statuses = calls.join_all().await;
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 1);
    assert_eq!(statuses.iter().filter(|status| **status == 403).count(), 199);
    assert_eq!(world.recorder.total(), 1);
    assert_eq!(world.end().await.1, limit);
}

#[tokio::test]
async fn a_request_waits_for_reservations_that_are_in_its_way() {
    let script = "[default]\ntext = \"x\"\nlatency_ms = 30\nusage = { input = 10, output = 10 }";
    // Room for one worst case (0.13) at a time, and for many real costs.
    let world = World::with(script, Setup { limit: Some(150_000), ..Setup::default() }).await;
    let (first, second) = tokio::join!(world.post(ask("x", true)), world.post(ask("y", true)));
    assert_eq!((first.status, second.status), (200, 200));
    let lowered = world.recorder.requests().iter().any(|request| request.json()["max_tokens"] != 8000);
    assert!(!lowered);
    world.end().await;
}

#[tokio::test]
async fn revoking_closes_connections_and_still_settles() {
    let world = World::new(&format!("{SCRIPT}\nchunk_delay_ms = 5")).await;
    let idle = world.connect().await;
    let response = world.send("/v1/messages", &[("x-api-key", TOKEN)], ask("x", true).to_string()).await;
    world.lease.revoke();
    let answer = read(response).await;
    assert!(!answer.whole, "{}", answer.body);
    let mut idle = idle;
    assert_eq!(idle.read(&mut [0; 8]).await.unwrap_or(0), 0);
    let refused = UnixStream::connect(world.dir.path().join("api.sock")).await;
    if let Ok(mut stream) = refused {
        assert_eq!(stream.read(&mut [0; 8]).await.unwrap_or(0), 0);
    }
    assert_eq!(world.end().await.1, SCRIPT_COST);
}

#[tokio::test]
async fn the_socket_replaces_a_stale_one_and_lets_its_owner_in_only() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::Builder::new().prefix(&"long-".repeat(40)).tempdir().unwrap();
    std::fs::write(dir.path().join("api.sock"), "stale").unwrap();
    let (job, ledger) = (JobId::new(1, 3), Arc::new(MemoryLedger::default()));
    let lease = lease("http://127.0.0.1:9", &dir, &job, &ledger, Setup::default()).await;
    let metadata = std::fs::metadata(dir.path().join("api.sock")).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    lease.destroy().await;
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "only the key file is left");
}

#[tokio::test]
async fn more_requests_than_allowed_are_told_to_come_again() {
    let limits = Limits { requests_max: 1, drain: Duration::from_millis(20), ..Limits::default() };
    let world = World::with("[default]\nfault = { hang = true }", Setup { limits, ..Setup::default() }).await;
    let stream = world.connect().await;
    let waiting = tokio::spawn(async move {
        send(stream, "/v1/messages", &[("x-api-key", TOKEN)], ask("x", true).to_string()).await
    });
    world.recorder.wait_for(1).await;
    let answer = world.post(ask("y", true)).await;
    assert_eq!((answer.status, answer.headers["retry-after"].to_str().unwrap()), (429, "1"));
    waiting.abort();
    let _ = waiting.await;
    world.end().await;
}

/// A store that fails the first calls.
struct Flaky {
    books: MemoryLedger,
    reserve_failures: std::sync::atomic::AtomicU32,
    settle_failures: std::sync::atomic::AtomicU32,
}

impl Flaky {
    fn fails(left: &std::sync::atomic::AtomicU32) -> Result<(), LedgerError> {
        use std::sync::atomic::Ordering::Relaxed;
        match left.fetch_update(Relaxed, Relaxed, |n| n.checked_sub(1)) {
            Ok(_) => Err(LedgerError::Store("disk I/O error".into())),
            Err(_) => Ok(()),
        }
    }
}

impl Ledger for Flaky {
    fn reserve(&self, ask: Ask) -> futures_util::future::BoxFuture<'_, Result<Grant, LedgerError>> {
        match Self::fails(&self.reserve_failures) {
            Ok(()) => self.books.reserve(ask),
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }

    fn settle(
        &self,
        id: ReservationId,
        usage: Usage,
        charged: MicroUsd,
    ) -> futures_util::future::BoxFuture<'_, Result<MicroUsd, LedgerError>> {
        match Self::fails(&self.settle_failures) {
            Ok(()) => self.books.settle(id, usage, charged),
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }
}

#[tokio::test]
async fn a_ledger_that_fails_stops_requests_and_settlements_are_tried_again() {
    let mut world = World::new(SCRIPT).await;
    let ledger = Arc::new(Flaky {
        books: MemoryLedger::default(),
        reserve_failures: 1.into(),
        settle_failures: 2.into(),
    });
    let other = tempfile::tempdir().unwrap();
    let gateway = Arc::clone(&world.lease.shared.gateway);
    let spec = LeaseSpec {
        job: world.job.clone(),
        cell: CellId::new(2),
        token: TOKEN.into(),
        identity: me(),
        plan: plan(vec!["*".into()]),
        budgets: Vec::new(),
        output_tokens_max: None,
        run_dir: other.path().to_owned(),
        socket_owner: None,
        egress: None,
        model: true,
        first: None,
    };
    let flaky = gateway.lease(spec, Arc::clone(&ledger) as Arc<dyn Ledger>).await.unwrap();
    std::mem::replace(&mut world.lease, flaky).destroy().await;
    let dir = std::mem::replace(&mut world.dir, other);

    assert_eq!(world.post(ask("x", true)).await.status, 503);
    assert_eq!(world.recorder.total(), 0);
    assert_eq!(world.post(ask("x", true)).await.status, 200);
    assert_eq!(world.charged().await.1, SCRIPT_COST);
    assert_eq!(ledger.books.standing(&world.job), (MicroUsd(SCRIPT_COST), MicroUsd::ZERO));
    world.end().await;
    drop(dir);
}
