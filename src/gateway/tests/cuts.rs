//! Answers that are cut, by anybody, at any place: the provider bills them in full, and that is charged.

use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;

/// Text deltas of a whole answer.
const DELTAS: usize = 6;
/// How long the upstream takes for each event.
const EVENT_PAUSE: Duration = Duration::from_millis(3);

/// What the upstream does at one place of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Nothing: the answer is whole.
    Never,
    /// It breaks off.
    Drop(usize),
    /// It falls silent and stays.
    Hang(usize),
    /// It says that it failed.
    Fail(usize),
    /// It ends properly, without its end.
    Short(usize),
}

/// One request: what the upstream does, and after how many pieces of the answer the client leaves.
#[derive(Debug, Clone, Copy)]
struct Ride {
    at: At,
    leaves: Option<usize>,
}

fn ride() -> impl Strategy<Value = Ride> {
    // The place 0 is before the head.
    let place = 0..DELTAS + 3;
    let at = prop_oneof![
        2 => Just(At::Never),
        2 => place.clone().prop_map(At::Drop),
        2 => place.clone().prop_map(At::Hang),
        1 => place.clone().prop_map(At::Fail),
        1 => place.prop_map(At::Short),
    ];
    (at, prop::option::of(0usize..6)).prop_map(|(at, leaves)| Ride { at, leaves })
}

/// A provider with books of its own. What it was asked for it bills, whether anybody reads it or not: all output that
/// the request allows, but where it said itself that it failed.
struct Biller {
    url: String,
    billed: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Biller {
    async fn serve(rides: Vec<Ride>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let billed = Arc::new(AtomicU64::new(0));
        let (books, rides) = (Arc::clone(&billed), Arc::new(rides));
        let task = tokio::spawn(async move {
            let mut requests = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                requests.spawn(bill(stream, Arc::clone(&rides), Arc::clone(&books)));
            }
        });
        Self { url, billed, task }
    }
}

/// Reads a request; gives its body, or nothing where it did not come whole.
async fn request(stream: &mut tokio::net::TcpStream) -> Option<Value> {
    let (mut bytes, mut piece) = (Vec::new(), [0; 8192]);
    loop {
        let read = stream.read(&mut piece).await.ok().filter(|read| *read > 0)?;
        bytes.extend_from_slice(&piece[..read]);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "))?;
        if body.len() >= length.parse::<usize>().ok()? {
            return serde_json::from_str(body).ok();
        }
    }
}

async fn bill(mut stream: tokio::net::TcpStream, rides: Arc<Vec<Ride>>, books: Arc<AtomicU64>) {
    let Some(body) = request(&mut stream).await else { return };
    let ride = rides[body["messages"][0]["content"].as_str().unwrap().parse::<usize>().unwrap()];
    let price = *Prices::built_in().unwrap().of(MODEL).unwrap();
    let most = body["max_tokens"].as_u64().unwrap();
    let cost = |output| price.cost(&Usage { input: 30, output, ..Usage::default() }).0;
    let delta =
        json!({ "type": "content_block_delta", "index": 0, "delta": { "type": "text_delta", "text": "ab" } });
    let mut events = vec![
        None,
        Some(
            json!({ "type": "message_start", "message": { "usage": { "input_tokens": 30, "output_tokens": 1 } } }),
        ),
        Some(
            json!({ "type": "content_block_start", "index": 0, "content_block": { "type": "text", "text": "" } }),
        ),
    ];
    events.extend(std::iter::repeat_n(Some(delta), DELTAS));
    let usage = json!({ "output_tokens": most });
    events.push(Some(
        json!({ "type": "message_delta", "delta": { "stop_reason": "end_turn" }, "usage": usage }),
    ));
    let failed = json!({ "type": "error", "error": { "type": "api_error" } });
    // One token a delta is what it made until it failed; without a first event it made nothing.
    let made = |place: usize| if place < 2 { 0 } else { cost(1 + place.saturating_sub(3) as u64) };
    let billed = if let At::Fail(place) = ride.at { made(place) } else { cost(most) };
    books.fetch_add(billed, Ordering::SeqCst);
    for (place, event) in events.into_iter().enumerate() {
        match ride.at {
            At::Drop(at) if at == place => return,
            At::Hang(at) if at == place => std::future::pending().await,
            At::Fail(at) if at == place && place > 0 => {
                let _ = stream.write_all(chunk(&failed).as_bytes()).await;
                break;
            }
            At::Fail(0) => {
                let head =
                    "HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
                let _ = stream.write_all(head.as_bytes()).await;
                return;
            }
            At::Short(at) if at == place && place > 0 => break,
            _ => {}
        }
        let piece = event.as_ref().map_or_else(
            || "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n".to_owned(),
            chunk,
        );
        if stream.write_all(piece.as_bytes()).await.is_err() {
            return;
        }
        tokio::time::sleep(EVENT_PAUSE).await;
    }
    let _ = stream.write_all(b"0\r\n\r\n").await;
    let _ = stream.shutdown().await;
}

fn chunk(event: &Value) -> String {
    let text = format!("event: {}\ndata: {event}\n\n", event["type"].as_str().unwrap());
    format!("{:x}\r\n{text}\r\n", text.len())
}

/// The client of one request: reads on, or leaves after so many pieces.
async fn client(stream: UnixStream, n: usize, leaves: Option<usize>) {
    let body = ask(&n.to_string(), true).to_string();
    let sending = send(stream, "/v1/messages", &[("x-api-key", TOKEN)], body);
    let response = match leaves {
        // Before the head, most likely.
        Some(0) => match tokio::time::timeout(EVENT_PAUSE, sending).await {
            Ok(response) => response,
            Err(_) => return,
        },
        _ => sending.await,
    };
    let (mut body, mut pieces) = (response.into_body(), 0);
    while leaves.is_none_or(|leaves| pieces < leaves) {
        let Some(Ok(_)) = body.frame().await else { return };
        pieces += 1;
    }
}

async fn run(rides: Vec<Ride>, limit: u64, cut_at_once: bool) {
    let biller = Biller::serve(rides.clone()).await;
    let (dir, job) = (tempfile::tempdir().unwrap(), JobId::new(1, 8));
    let ledger = Arc::new(MemoryLedger::default());
    let limits = Limits {
        drain: Duration::from_millis(if cut_at_once { 1 } else { 15 }),
        idle: Duration::from_millis(40),
        first_byte_wait: Duration::from_millis(40),
        ..Limits::default()
    };
    let setup = Setup { limit: Some(limit), limits, ..Setup::default() };
    let lease = lease(&biller.url, &dir, &job, &ledger, setup).await;
    let mut clients = tokio::task::JoinSet::new();
    for (n, ride) in rides.iter().enumerate() {
        let stream = UnixStream::connect(dir.path().join("api.sock")).await.unwrap();
        clients.spawn(client(stream, n, ride.leaves));
    }
    if cut_at_once {
        // The lease ends in the middle of some of them.
        clients.join_next().await;
    } else {
        while clients.join_next().await.is_some() {}
    }
    let events = lease.destroy().await;
    let (charged, reserved) = ledger.standing(&job);
    let billed = biller.billed.load(Ordering::SeqCst);
    assert_eq!(reserved, MicroUsd::ZERO, "a reservation is left: {events:?}");
    assert!(billed <= charged.0, "billed {billed}, charged {charged}: {events:?}");
    assert!(charged.0 <= limit, "charged {charged} of {limit}");
    let sum = |of: fn(&GatewayEvent) -> u64| events.iter().map(of).sum::<u64>();
    let set_aside = sum(|event| match event {
        GatewayEvent::Requested { reserved, .. } => reserved.0,
        _ => 0,
    });
    assert!(charged.0 <= set_aside, "charged {charged} of {set_aside} that were set aside");
    biller.task.abort();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.div_ceil(8), ..ProptestConfig::default() })]

    #[test]
    fn whoever_cuts_an_answer_what_is_billed_for_it_is_charged(
        rides in prop::collection::vec(ride(), 1..8), limit in 60_000u64..1_500_000, cut_at_once in any::<bool>()
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(run(rides, limit, cut_at_once));
    }
}

#[tokio::test]
async fn an_answer_that_a_dying_lease_cuts_is_charged_all_the_output_it_may_still_have() {
    let biller = Biller::serve(vec![Ride { at: At::Hang(4), leaves: None }]).await;
    let (dir, job) = (tempfile::tempdir().unwrap(), JobId::new(1, 8));
    let ledger = Arc::new(MemoryLedger::default());
    let limits = Limits { drain: Duration::from_millis(20), ..Limits::default() };
    let lease = lease(&biller.url, &dir, &job, &ledger, Setup { limits, ..Setup::default() }).await;
    let stream = UnixStream::connect(dir.path().join("api.sock")).await.unwrap();
    let body = ask("0", true).to_string();
    let response = send(stream, "/v1/messages", &[("x-api-key", TOKEN)], body).await;
    let mut body = response.into_body();
    body.frame().await;
    drop(body);
    let events = lease.destroy().await;
    let charged = events.iter().find_map(|event| match event {
        GatewayEvent::Charged { usage, charged, .. } => Some((*usage, charged.0)),
        _ => None,
    });
    // 30 tokens in and 8000 out, at 3 and 15 USD for a million.
    let usage = Usage { input: 30, output: 8000, ..Usage::default() };
    assert_eq!(charged, Some((usage, 90 + 120_000)), "{events:?}");
    assert_eq!(biller.billed.load(Ordering::SeqCst), 90 + 120_000);
    biller.task.abort();
}
