//! What requests may hold, what they may cost, and how they wait: headers, parts, bounds, cuts, limits.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::*;
use crate::pricing::CacheWrite;

const WEB_SEARCH: &str = "web_search_20250305";

impl World {
    /// Another lease on the same credential, with a plan of its own.
    pub(super) async fn another(
        &self,
        dir: &tempfile::TempDir,
        plan: Arc<Plan>,
        limit: Option<u64>,
    ) -> Lease {
        let spec = LeaseSpec {
            job: JobId::new(1, 9),
            cell: CellId::new(9),
            token: TOKEN.into(),
            identity: me(),
            plan,
            budgets: crate::money::Caps::default().of_job(limit.map(MicroUsd), None, None),
            egress: None,
            model: true,
            first: None,
            output_tokens_max: None,
            run_dir: dir.path().to_owned(),
            socket_owner: None,
        };
        let ledger = Arc::clone(&self.ledger) as Arc<dyn Ledger>;
        Arc::clone(&self.lease.shared.gateway).lease(spec, ledger).await.unwrap()
    }

    async fn reserved(&mut self) -> u64 {
        loop {
            if let GatewayEvent::Requested { reserved, .. } = self.lease.next_event().await {
                return reserved.0;
            }
        }
    }
}

/// A plan whose policy has these `[requests]`.
fn with_requests(section: &str) -> Arc<Plan> {
    let policy = Policy::parse("test", &format!("{DEFAULT}\n[requests]\n{section}\n")).unwrap();
    let mut plan = plan(vec!["*".into()]).as_ref().clone();
    plan.layers[0].requests = policy.requests;
    Arc::new(plan)
}

const DEFAULT: &str = include_str!("../../../policies/default.toml");

pub(super) async fn post_to(dir: &tempfile::TempDir, headers: &[(&str, &str)], body: &Value) -> Answer {
    let stream = UnixStream::connect(dir.path().join("api.sock")).await.unwrap();
    let mut all = vec![("x-api-key", TOKEN)];
    all.extend_from_slice(headers);
    read(send(stream, "/v1/messages?beta=true", &all, body.to_string()).await).await
}

#[tokio::test]
async fn headers_that_mean_something_to_the_provider_are_refused_unless_known() {
    let world = World::new(SCRIPT).await;
    let cases: &[(&[(&str, &str)], &str)] = &[
        (&[("anthropic-beta", "fast-mode-2026-02-01")], "fast-mode-2026-02-01"),
        (&[("anthropic-beta", "effort-2025-11-24,files-api-2025-04-14")], "files-api-2025-04-14"),
        (
            &[("anthropic-beta", "effort-2025-11-24"), ("anthropic-beta", "mcp-client-2025-11-20")],
            "mcp-client",
        ),
        (&[("Anthropic-Beta", "code-execution-2025-08-25")], "code-execution"),
        (&[("anthropic-beta", "effort-2025-11-24 fast-mode-2026-02-01")], "fast-mode"),
        (&[("anthropic-beta", "Effort-2025-11-24")], "Effort"),
        (&[("anthropic-version", "2024-01-01")], "anthropic-version"),
        (&[("anthropic-version", "2023-06-01"), ("anthropic-version", "2023-06-01")], "twice"),
        (&[("anthropic-workspace-id", "w")], "anthropic-workspace-id"),
        (&[("anthropic-fast", "1")], "anthropic-fast"),
    ];
    for (headers, named) in cases {
        let answer = post_to(&world.dir, headers, &ask("x", true)).await;
        assert_eq!(answer.status, 403, "{headers:?}: {}", answer.body);
        assert!(
            answer.body.contains(named) && answer.body.contains("hotcell: "),
            "{headers:?}: {}",
            answer.body
        );
    }
    assert_eq!(world.recorder.total(), 0);
    let betas = crate::policy::requests::BETAS.join(",");
    let good = [("anthropic-beta", betas.as_str()), ("anthropic-version", "2023-06-01")];
    assert_eq!(post_to(&world.dir, &good, &ask("x", true)).await.status, 200);
    world.end().await;
}

#[tokio::test]
async fn parts_that_make_the_provider_reach_out_pass_only_where_the_policy_names_them() {
    let world = World::new(SCRIPT).await;
    let open = "server_tools=['web_search']\nmcp_servers=['https://mcp.example.com/*']\n\
                url_sources=['https://img.example.com/*']\nfile_ids=['file_1']";
    let dir = tempfile::tempdir().unwrap();
    let other = world.another(&dir, with_requests(open), None).await;
    let with = |field: &str, value: Value| {
        let mut body = ask("x", true);
        body[field] = value;
        body
    };
    let image = |source: Value| {
        let block = json!([{ "type": "image", "source": source }]);
        with(
            "messages",
            json!([{ "role": "user", "content": [{ "type": "tool_result", "content": block }] }]),
        )
    };
    let mcp = |url: &str| with("mcp_servers", json!([{ "type": "url", "url": url, "name": "m" }]));
    for (body, also_open) in [
        (with("tools", json!([{ "type": WEB_SEARCH, "name": "web_search" }])), true),
        (with("tools", json!([{ "type": "web_search_20260209", "name": "web_search" }])), false),
        (with("tools", json!([{ "type": "web_fetch_20250910", "name": "web_fetch" }])), false),
        (with("tools", json!([{ "type": "code_execution_20250825", "name": "c" }])), false),
        (mcp("https://mcp.example.com/sse"), true),
        (mcp("https://evil.example.com/"), false),
        (image(json!({ "type": "url", "url": "https://img.example.com/a.png" })), true),
        (image(json!({ "type": "url", "url": "https://evil.example.com/?secret" })), false),
        (image(json!({ "type": "file", "file_id": "file_1" })), true),
        (image(json!({ "type": "file", "file_id": "file_2" })), false),
        (with("container", json!("c")), false),
        (with("speed", json!("fast")), false),
        (with("service_tier", json!("priority")), false),
        (with("inference_geo", json!("us")), false),
    ] {
        let refused = world.post(body.clone()).await;
        assert_eq!(refused.status, 403, "{body}: {}", refused.body);
        let before =
            world.recorder.requests().iter().filter(|r| r.target.ends_with("messages?beta=true")).count();
        let answer = post_to(&dir, &[], &body).await;
        assert_eq!(answer.status, if also_open { 200 } else { 403 }, "{body}: {}", answer.body);
        let after =
            world.recorder.requests().iter().filter(|r| r.target.ends_with("messages?beta=true")).count();
        assert_eq!(after - before, usize::from(also_open), "{body}");
    }
    other.destroy().await;
    assert_eq!(world.end().await.1, 0, "nothing that was refused cost anything");
}

/// A provider that answers every message with `reply`, cut after so many bytes, and does not count tokens.
struct Raw {
    url: String,
    cut: Arc<AtomicUsize>,
    bodies: Arc<std::sync::Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl Raw {
    async fn serve(content_type: &'static str, reply: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let cut = Arc::new(AtomicUsize::new(usize::MAX));
        let bodies: Arc<std::sync::Mutex<Vec<String>>> = Arc::default();
        let (at, seen) = (Arc::clone(&cut), Arc::clone(&bodies));
        let task = tokio::spawn(async move {
            loop {
                let Ok((mut stream, _)) = listener.accept().await else { return };
                let mut request = Vec::new();
                let (head, length) = loop {
                    let mut piece = [0; 8192];
                    let read = stream.read(&mut piece).await.unwrap_or(0);
                    request.extend_from_slice(&piece[..read]);
                    let text = String::from_utf8_lossy(&request).into_owned();
                    if let Some((head, body)) = text.split_once("\r\n\r\n") {
                        let length = head.lines().find_map(|l| l.strip_prefix("content-length: "));
                        let length: usize = length.unwrap_or("0").parse().unwrap();
                        if body.len() >= length {
                            seen.lock().unwrap().push(body.to_owned());
                            break (head.to_owned(), reply.len());
                        }
                    }
                    if read == 0 {
                        break (String::new(), 0);
                    }
                };
                let answer = if head.contains("count_tokens") {
                    "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".to_owned()
                } else {
                    let part = &reply[..length.min(at.load(Ordering::Relaxed))];
                    format!(
                        "HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\nconnection: close\r\n\
                         content-length: {length}\r\n\r\n{part}"
                    )
                };
                let _ = stream.write_all(answer.as_bytes()).await;
                let _ = stream.shutdown().await;
            }
        });
        Self { url, cut, bodies, task }
    }
}

fn sse(events: &[Value]) -> String {
    events.iter().map(|e| format!("event: {}\ndata: {e}\n\n", e["type"].as_str().unwrap())).collect()
}

#[tokio::test]
async fn an_answer_that_is_cut_at_any_byte_costs_its_usage_or_no_less_than_was_seen() {
    let usage = json!({ "input_tokens": 200, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 0, "output_tokens": 1 });
    let delta = |text: &str| json!({ "type": "content_block_delta", "index": 0, "delta": { "type": "text_delta", "text": text } });
    let mut events = vec![
        json!({ "type": "message_start", "message": { "usage": usage } }),
        json!({ "type": "content_block_start", "index": 0, "content_block": { "type": "text", "text": "" } }),
    ];
    events.extend("abcdef".chars().map(|c| delta(&c.to_string())));
    events.push(json!({ "type": "message_delta", "delta": { "stop_reason": "end_turn" }, "usage": { "output_tokens": 6 } }));
    let final_at = sse(&events).len();
    events.push(json!({ "type": "message_stop" }));
    let reply = sse(&events);
    let raw = Raw::serve("text/event-stream", reply.clone()).await;
    let (dir, job, ledger) =
        (tempfile::tempdir().unwrap(), JobId::new(1, 5), Arc::new(MemoryLedger::default()));
    let mut lease = lease(&raw.url, &dir, &job, &ledger, Setup::default()).await;
    let price = *Prices::built_in().unwrap().of(MODEL).unwrap();
    let cost = |output| price.cost(&Usage { input: 200, cache_read: 100, output, ..Usage::default() }).0;
    for cut in 0..=reply.len() {
        raw.cut.store(cut, Ordering::Relaxed);
        let answer = post_to(&dir, &[], &ask("x", true)).await;
        assert_eq!(answer.whole, cut == reply.len(), "{cut}");
        let mut reserved = 0;
        let charged = loop {
            match lease.next_event().await {
                GatewayEvent::Requested { reserved: amount, .. } => reserved = amount.0,
                GatewayEvent::Charged { charged, .. } => break charged.0,
                _ => {}
            }
        };
        let seen = reply[..cut].matches("text_delta").count() as u64;
        match () {
            // One line feed short, the event is whole all the same.
            () if cut + 1 >= final_at => assert_eq!(charged, cost(6), "{cut}"),
            () if reply[..cut].contains("}}}\n") => assert!(charged >= cost(seen), "{cut}: {charged}"),
            () => assert!(charged == reserved || charged >= cost(seen), "{cut}: {charged} of {reserved}"),
        }
        assert!(charged <= reserved, "{cut}: {charged} above {reserved}");
    }
    lease.destroy().await;
    assert_eq!(ledger.standing(&job).1, MicroUsd::ZERO);
    raw.task.abort();
}

#[tokio::test]
async fn web_searches_are_lowered_reserved_and_charged_by_use() {
    let usage =
        json!({ "input_tokens": 9000, "output_tokens": 10, "server_tool_use": { "web_search_requests": 2 } });
    let reply = json!({ "type": "message", "stop_reason": "end_turn", "usage": usage }).to_string();
    let raw = Raw::serve("application/json", reply).await;
    let (dir, job, ledger) =
        (tempfile::tempdir().unwrap(), JobId::new(1, 6), Arc::new(MemoryLedger::default()));
    let first = lease(&raw.url, &dir, &job, &ledger, Setup::default()).await;
    let spec = LeaseSpec {
        job: job.clone(),
        cell: CellId::new(3),
        token: TOKEN.into(),
        identity: me(),
        plan: with_requests("server_tools=['web_search']\nweb_search_uses_max=3"),
        budgets: Vec::new(),
        egress: None,
        model: true,
        first: None,
        output_tokens_max: None,
        run_dir: dir.path().to_owned(),
        socket_owner: None,
    };
    let gateway = Arc::clone(&first.shared.gateway);
    first.destroy().await;
    let lease = gateway.lease(spec, Arc::clone(&ledger) as Arc<dyn Ledger>).await.unwrap();
    let mut body = ask("find", false);
    body["tools"] = json!([{ "type": WEB_SEARCH, "name": "web_search", "max_uses": 8 }]);
    let plain = {
        let bound = body::BodyFacts::read(body.to_string().as_bytes()).unwrap().shape.bound(&[]).tokens;
        Prices::built_in().unwrap().of(MODEL).unwrap().worst_case(bound, 8000, CacheWrite::FiveMinutes).0
    };
    assert_eq!(post_to(&dir, &[], &body).await.status, 200);
    let events = lease.destroy().await;
    let sent: Value = serde_json::from_str(raw.bodies.lock().unwrap().last().unwrap()).unwrap();
    assert_eq!(sent["tools"][0]["max_uses"], 3);
    let GatewayEvent::Requested { reserved, .. } = &events[0] else { panic!("{events:?}") };
    assert!(reserved.0 >= plain + 30_000, "three searches are set aside: {reserved}");
    let (spent, open) = ledger.standing(&job);
    assert_eq!((spent.0, open.0), (9000 * 3 + 10 * 15 + 20_000, 0), "two were made");
    raw.task.abort();
}

#[tokio::test]
async fn a_search_that_broke_off_is_charged_with_all_that_was_set_aside_for_it() {
    let usage = json!({ "input_tokens": 900, "output_tokens": 1 });
    let start = json!({ "type": "message_start", "message": { "usage": usage } });
    let raw = Raw::serve("text/event-stream", format!("event: message_start\ndata: {start}\n\n")).await;
    let (dir, job, ledger) =
        (tempfile::tempdir().unwrap(), JobId::new(1, 7), Arc::new(MemoryLedger::default()));
    let first = lease(&raw.url, &dir, &job, &ledger, Setup::default()).await;
    let spec = LeaseSpec {
        job: job.clone(),
        cell: CellId::new(3),
        token: TOKEN.into(),
        identity: me(),
        plan: with_requests("server_tools=['web_search']\nweb_search_uses_max=3"),
        budgets: Vec::new(),
        egress: None,
        model: true,
        first: None,
        output_tokens_max: None,
        run_dir: dir.path().to_owned(),
        socket_owner: None,
    };
    let gateway = Arc::clone(&first.shared.gateway);
    first.destroy().await;
    let lease = gateway.lease(spec, Arc::clone(&ledger) as Arc<dyn Ledger>).await.unwrap();
    let mut body = ask("find", true);
    body["tools"] = json!([{ "type": WEB_SEARCH, "name": "web_search", "max_uses": 3 }]);
    post_to(&dir, &[], &body).await;
    let events = lease.destroy().await;
    let GatewayEvent::Requested { reserved, .. } = &events[0] else { panic!("{events:?}") };
    assert_eq!(ledger.standing(&job), (*reserved, MicroUsd(0)));
    raw.task.abort();
}

pub(super) fn large(prompt: &str) -> Value {
    let mut body = ask(prompt, true);
    body["tools"] = json!([{ "name": "Bash", "description": "d".repeat(80_000), "input_schema": {} }]);
    body["system"] = json!([{ "type": "text", "text": format!("for {prompt}") }, { "type": "text", "text": "s".repeat(30_000) }]);
    body
}

#[tokio::test]
async fn a_large_first_request_is_counted_once_for_all_jobs_and_reserves_little() {
    let mut world = World::new("[default]\ntext=\"x\"\nusage={ input=20000, output=10 }").await;
    let counts = |world: &World| {
        let seen = world.recorder.requests();
        seen.iter().filter(|r| r.target.contains("count_tokens")).map(|r| r.json()).collect::<Vec<_>>()
    };
    assert_eq!(world.post(large("one")).await.status, 200);
    let counted = counts(&world);
    assert_eq!(counted.len(), 1);
    assert_eq!(counted[0].get("max_tokens"), None, "only what a count takes");
    assert_eq!(counted[0]["tools"], large("one")["tools"]);
    // A quarter of 110 KB at 3.75 USD per million, and 8000 tokens of output: bytes alone would make it 0.53.
    let first = world.reserved().await;
    assert!((210_000..240_000).contains(&first), "{first}");
    let dir = tempfile::tempdir().unwrap();
    let other = world.another(&dir, plan(vec!["*".into()]), None).await;
    assert_eq!(post_to(&dir, &[], &large("two")).await.status, 200);
    let events = other.destroy().await;
    let GatewayEvent::Requested { reserved, .. } = &events[0] else { panic!("{events:?}") };
    assert!(reserved.0 < 240_000, "{reserved}");
    assert_eq!(counts(&world).len(), 1, "the second job does not ask again");

    // The conversation goes on: what was billed is known, only what is new counts.
    let mut next = large("one");
    next["messages"] = json!([
        { "role": "user", "content": "one" },
        { "role": "assistant", "content": [{ "type": "text", "text": "x" }] },
        { "role": "user", "content": [{ "type": "text", "text": "more", "cache_control": { "type": "ephemeral" } }] },
    ]);
    assert_eq!(world.post(next).await.status, 200);
    let third = world.reserved().await;
    assert!((195_000..200_000).contains(&third), "20000 billed: {third}");
    assert_eq!(counts(&world).len(), 1);
    world.end().await;
}

#[tokio::test]
async fn a_provider_that_does_not_count_leaves_bytes_as_the_bound() {
    let reply =
        json!({ "type": "message", "usage": { "input_tokens": 28_000, "output_tokens": 1 } }).to_string();
    let raw = Raw::serve("application/json", reply).await;
    let (dir, job, ledger) =
        (tempfile::tempdir().unwrap(), JobId::new(1, 7), Arc::new(MemoryLedger::default()));
    let mut lease = lease(&raw.url, &dir, &job, &ledger, Setup::default()).await;
    let mut reserved = Vec::new();
    for prompt in ["one", "two"] {
        assert_eq!(post_to(&dir, &[], &large(prompt)).await.status, 200);
        reserved.push(loop {
            if let GatewayEvent::Requested { reserved, .. } = lease.next_event().await {
                break reserved.0;
            }
        });
    }
    assert!(reserved[0] > 500_000, "{reserved:?}");
    assert!(reserved[1] < 240_000, "what the first was billed for bounds the second: {reserved:?}");
    assert_eq!(raw.bodies.lock().unwrap().len(), 3, "one count in vain, then no more");
    lease.destroy().await;
    raw.task.abort();
}

#[tokio::test]
async fn a_limited_provider_is_waited_for_by_all_and_the_client_sees_a_slow_answer() {
    let script = format!(
        "{SCRIPT}\n[[reply]]\ntimes = 1\nfault = {{ status = 429, headers = {{ retry-after-ms = \"300\" }} }}"
    );
    let world = World::new(&script).await;
    let dir = tempfile::tempdir().unwrap();
    let other = world.another(&dir, plan(vec!["*".into()]), None).await;
    let begun = Instant::now();
    let second = async {
        world.recorder.wait_for(1).await;
        // The limit is known when the gateway has read the answer.
        while world.lease.shared.gateway.pace().paused.is_zero() {
            tokio::task::yield_now().await;
        }
        post_to(&dir, &[], &ask("y", true)).await
    };
    let (first, second) = tokio::join!(world.post(ask("x", true)), second);
    assert_eq!((first.status, second.status), (200, 200), "{} {}", first.body, second.body);
    assert!(begun.elapsed() >= Duration::from_millis(300), "both waited");
    assert_eq!(world.recorder.total(), 3);
    assert_eq!(world.lease.shared.gateway.pace().limit, 2, "one at a time, then more");
    let both = other.destroy().await;
    assert!(!both.iter().any(|e| matches!(e, GatewayEvent::ProviderPaused { .. })), "{both:?}");
    let (events, spent) = world.end().await;
    assert_eq!(spent, SCRIPT_COST, "a limit costs nothing");
    let reserved = events.iter().filter(|e| matches!(e, GatewayEvent::Requested { .. })).count();
    assert_eq!(reserved, 1, "the repetition has the same reservation: {events:?}");
}

#[tokio::test]
async fn a_pause_longer_than_requests_are_held_is_told_at_once_and_ends_in_a_429() {
    let script = "[default]\nfault = { status = 529, headers = { retry-after = \"90\" } }";
    let limits = Limits { pace_wait: Duration::from_millis(400), ..Limits::default() };
    let mut world = World::with(script, Setup { limits, ..Setup::default() }).await;
    let before = crate::clock::wall_ms();
    let first = world.post(ask("x", true)).await;
    assert_eq!((first.status, first.headers["retry-after"].to_str().unwrap()), (529, "90"));
    let until = loop {
        if let GatewayEvent::ProviderPaused { until_ms } = world.lease.next_event().await {
            break until_ms;
        }
    };
    assert!((before + 85_000..before + 95_000).contains(&until), "{until} {before}");
    let held = world.post(ask("y", true)).await;
    assert_eq!(held.status, 429);
    let retry_after: u64 = held.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((80..=90).contains(&retry_after), "{retry_after}");
    assert!(held.body.contains("limits this credential"), "{}", held.body);
    assert_eq!(world.recorder.total(), 1, "nothing goes out in a pause");
    let (events, spent) = world.end().await;
    assert!(events.contains(&GatewayEvent::Refused { status: 429, why: Refusal::Paused }), "{events:?}");
    assert!(
        !events.iter().any(|e| matches!(e, GatewayEvent::ProviderPaused { .. })),
        "told once: {events:?}"
    );
    assert_eq!(spent, 0);
}

#[tokio::test]
async fn a_limit_that_waiting_does_not_lift_is_nobody_elses() {
    let script = format!(
        "{SCRIPT}\n[[reply]]\nwhen={{prompt=\"x\"}}\nfault={{status=429,headers={{x-should-retry=\"false\",retry-after=\"60\"}}}}"
    );
    let world = World::new(&script).await;
    assert_eq!(world.post(ask("x", true)).await.status, 429);
    assert_eq!(world.post(ask("y", true)).await.status, 200, "at once");
    world.end().await;
}
