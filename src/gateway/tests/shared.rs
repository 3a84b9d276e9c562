//! What leases share, the provider's limits and its counts: what one cell does with them must not hold up another.

use std::time::Instant;

use super::requests::{large, post_to};
use super::*;

const OTHER_MODEL: &str = "claude-haiku-4-5";

fn of_model(model: &str, prompt: &str) -> Value {
    let mut body = ask(prompt, true);
    body["model"] = json!(model);
    body
}

#[tokio::test]
async fn a_limited_model_pauses_nobody_who_asks_for_another() {
    let script = format!(
        "{SCRIPT}\n[[reply]]\nwhen = {{ model = \"{OTHER_MODEL}\" }}\n\
         fault = {{ status = 429, headers = {{ retry-after = \"90\" }} }}"
    );
    let limits = Limits { pace_wait: Duration::from_millis(200), ..Limits::default() };
    let world = World::with(&script, Setup { limits, ..Setup::default() }).await;
    let dir = tempfile::tempdir().unwrap();
    let other = world.another(&dir, plan(vec!["*".into()]), None).await;
    assert_eq!(post_to(&dir, &[], &of_model(OTHER_MODEL, "x")).await.status, 429);
    let gateway = &world.lease.shared.gateway;
    assert!(gateway.paused("test", OTHER_MODEL) > Duration::from_secs(80));
    assert!(gateway.paused("test", &format!("{OTHER_MODEL}-20251001")) > Duration::from_secs(80));
    assert_eq!(gateway.paused("test", MODEL), Duration::ZERO);
    assert_eq!(world.post(ask("x", true)).await.status, 200, "at once");
    assert_eq!(world.post(of_model(OTHER_MODEL, "y")).await.status, 429, "the model is the same for all");
    assert_eq!(world.recorder.total(), 2, "and is not asked in the pause");
    gateway.lift_pause(&gateway.limited_with("test", OTHER_MODEL));
    assert_eq!(gateway.paused("test", OTHER_MODEL), Duration::ZERO);
    other.destroy().await;
    world.end().await;
}

#[tokio::test]
async fn a_job_whose_requests_are_always_limited_stops_pausing_the_others_of_its_model() {
    let script = format!(
        "{SCRIPT}\n[[reply]]\nwhen = {{ prompt = \"too much\" }}\n\
         fault = {{ status = 429, headers = {{ retry-after-ms = \"400\" }} }}"
    );
    let limits = Limits { pace_wait: Duration::from_millis(600), ..Limits::default() };
    let world = World::with(&script, Setup { limits, ..Setup::default() }).await;
    let dir = tempfile::tempdir().unwrap();
    let other = world.another(&dir, plan(vec!["*".into()]), None).await;
    let paused = || world.lease.shared.gateway.paused("test", MODEL);
    for round in 0..3 {
        assert_eq!(world.post(ask("x", true)).await.status, 200);
        let (over, mut shared) = (std::cell::Cell::new(false), false);
        let limited = async {
            let answer = post_to(&dir, &[], &ask("too much", true)).await;
            over.set(true);
            answer.status
        };
        let served = async {
            while !over.get() {
                shared |= !paused().is_zero();
                assert_eq!(world.post(ask("y", true)).await.status, 200);
            }
        };
        assert_eq!(tokio::join!(limited, served).0, 429);
        assert_eq!(shared, round == 0, "round {round}: the first limit is believed, no other one");
    }
    other.destroy().await;
    world.end().await;
}

#[tokio::test]
async fn a_cell_that_counts_without_end_is_told_to_wait_and_others_count_on() {
    let world = World::new(SCRIPT).await;
    let dir = tempfile::tempdir().unwrap();
    let other = world.another(&dir, plan(vec!["*".into()]), None).await;
    let body = json!({ "model": MODEL, "messages": [{ "role": "user", "content": "x" }] }).to_string();
    let count = async |socket: &std::path::Path| {
        let stream = UnixStream::connect(socket.join("api.sock")).await.unwrap();
        let path = "/v1/messages/count_tokens?beta=true";
        read(send(stream, path, &[("x-api-key", TOKEN)], body.clone()).await).await
    };
    let mut counted = 0;
    let refused = loop {
        let answer = count(world.dir.path()).await;
        if answer.status != 200 {
            break answer;
        }
        counted += 1;
        assert!(counted < 100, "no end");
    };
    assert!(counted >= 32, "{counted}");
    assert_eq!((refused.status, refused.headers["retry-after"].to_str().unwrap().len()), (429, 1));
    assert!(refused.body.contains("counted too often"), "{}", refused.body);
    assert_eq!(count(dir.path()).await.status, 200, "another cell's are its own");
    // The request itself goes out, bounded by its bytes.
    let before = world.recorder.total();
    assert_eq!(world.post(large("one")).await.status, 200);
    assert_eq!(world.recorder.total() - before, 1, "no count before it");
    other.destroy().await;
    assert_eq!(world.end().await.1, SCRIPT_COST);
}

/// A provider whose counts of requests that hold `slow` never come back.
async fn slow_counts() -> (String, Arc<std::sync::atomic::AtomicUsize>, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let counts = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let seen = Arc::clone(&counts);
    let task = tokio::spawn(async move {
        let mut requests = tokio::task::JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let counts = Arc::clone(&seen);
            requests.spawn(async move {
                let (mut bytes, mut piece) = (Vec::new(), vec![0; 65536]);
                let text = loop {
                    let read = stream.read(&mut piece).await.unwrap_or(0);
                    bytes.extend_from_slice(&piece[..read]);
                    let text = String::from_utf8_lossy(&bytes).into_owned();
                    let whole = text.split_once("\r\n\r\n").is_some_and(|(head, body)| {
                        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
                        body.len() >= length.unwrap_or("0").parse::<usize>().unwrap()
                    });
                    if whole || read == 0 {
                        break text;
                    }
                };
                let counting = text.starts_with("POST /v1/messages/count_tokens");
                if counting {
                    counts.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                }
                if counting && text.contains("slow") {
                    std::future::pending::<()>().await;
                }
                let usage = json!({ "input_tokens": 20_000, "output_tokens": 1 });
                let reply = match counting {
                    true => json!({ "input_tokens": 20_000 }),
                    false => json!({ "type": "message", "stop_reason": "end_turn", "usage": usage }),
                };
                let reply = reply.to_string();
                let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close";
                let answer = format!("{head}\r\ncontent-length: {}\r\n\r\n{reply}", reply.len());
                let _ = stream.write_all(answer.as_bytes()).await;
            });
        }
    });
    (url, counts, task)
}

#[tokio::test]
async fn a_count_that_does_not_come_back_holds_up_no_other_cell() {
    let (url, counts, task) = slow_counts().await;
    let (dir, job) = (tempfile::tempdir().unwrap(), JobId::new(1, 5));
    let ledger = Arc::new(MemoryLedger::default());
    let slow = lease(&url, &dir, &job, &ledger, Setup::default()).await;
    let other_dir = tempfile::tempdir().unwrap();
    let spec = LeaseSpec {
        job: JobId::new(1, 6),
        cell: CellId::new(9),
        token: TOKEN.into(),
        identity: me(),
        plan: plan(vec!["*".into()]),
        budgets: Vec::new(),
        egress: None,
        model: true,
        first: None,
        output_tokens_max: None,
        run_dir: other_dir.path().to_owned(),
        socket_owner: None,
    };
    let gateway = Arc::clone(&slow.shared.gateway);
    let other = gateway.lease(spec, Arc::clone(&ledger) as Arc<dyn Ledger>).await.unwrap();
    // Its long text is the cell's own: what others have in common with it is not what is counted.
    let mut body = large("x");
    body["messages"][0]["content"] = json!("slow ".repeat(10_000));
    let stream = UnixStream::connect(dir.path().join("api.sock")).await.unwrap();
    let text = body.to_string();
    let waiting =
        tokio::spawn(async move { send(stream, "/v1/messages", &[("x-api-key", TOKEN)], text).await });
    while counts.load(std::sync::atomic::Ordering::SeqCst) == 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let begun = Instant::now();
    assert_eq!(post_to(&other_dir, &[], &large("y")).await.status, 200);
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert_eq!(counts.load(std::sync::atomic::Ordering::SeqCst), 2, "it was counted meanwhile");
    let events = other.destroy().await;
    let GatewayEvent::Requested { reserved, .. } = &events[0] else { panic!("{events:?}") };
    assert!(reserved.0 < 240_000, "{reserved}");
    waiting.abort();
    let _ = waiting.await;
    slow.destroy().await;
    assert_eq!(ledger.standing(&job), (MicroUsd::ZERO, MicroUsd::ZERO), "it never went out");
    task.abort();
}
