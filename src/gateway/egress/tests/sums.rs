//! The limits of a job's way out, over more than one lease.

use super::*;

const RULES: &str = "[[egress.host]]\nname = \"down.example\"\nports = [80]\nbytes_down_max = 200000\n\
    [[egress.host]]\nname = \"up.example\"\nports = [80]\nbytes_up_max = 60000\n";

impl Cell {
    /// The same job's next lease: after an end in order, or one of a daemon that was killed, of which stays what
    /// was noted until then.
    async fn again(self, killed: bool) -> Self {
        let Self { world, door, ca, dir, tasks, internet, spec } = self;
        let sums = dir.path().join("sums");
        let noted = std::fs::read(&sums).ok();
        door.destroy().await;
        if let Some(noted) = noted.filter(|_| killed) {
            std::fs::write(&sums, noted).unwrap();
        }
        std::fs::remove_file(dir.path().join(SOCKET)).unwrap();
        let listener = UnixListener::bind(dir.path().join(SOCKET)).unwrap();
        let spec = EgressSpec { tally: Arc::new(Tally::open(&sums).unwrap()), ..spec };
        let door = Door::open(listener, spec.clone(), plan(RULES), CellId::new(2));
        Self { world, door, ca, dir, tasks, internet, spec }
    }

    async fn big(&self) -> String {
        self.raw(b"GET http://down.example/big HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await
    }

    async fn post(&self) -> String {
        let (head, body) =
            ("POST http://up.example/ HTTP/1.1\r\nHost: x\r\nConnection: close", "y".repeat(18_000));
        self.raw(format!("{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).as_bytes()).await
    }
}

async fn counted_on(killed: bool) {
    let mut cell = Cell::new(RULES).await;
    cell.http(80).await;
    cell.name("down.example", &[&[PUBLIC]]);
    cell.name("up.example", &[&[PUBLIC]]);
    let (mut down, mut up) = (0, 0);
    // Three leases: what fits into one limit, and no more, comes through all of them together.
    let mut refused = Vec::new();
    for _ in 0..3 {
        for _ in 0..2 {
            refused.extend([cell.big().await, cell.post().await].into_iter().filter(|a| a.contains(" 403 ")));
            for _ in 0..2 {
                let event = cell.event().await;
                match event.host.as_str() {
                    "down.example" => down += event.bytes_down,
                    _ => up += event.bytes_up,
                }
            }
        }
        cell = cell.again(killed).await;
    }
    let words = |key: &str| refused.iter().filter(|answer| answer.contains(key)).count();
    assert!(words("bytes_down_max") >= 1 && words("bytes_up_max") >= 1, "{refused:?}");
    // One read of an answer may go beyond its limit, as it may within one lease.
    assert!((150_000..=264_000).contains(&down), "{down} came of 200000");
    // After a kill, what was noted and not used is lost: a sixteenth of the limit at most, each time.
    let least = if killed { 60_000 - 2 * 60_000 / 16 } else { 60_000 };
    assert!((least..=60_000).contains(&up), "{up} left of 60000");
    cell.end().await;
}

#[tokio::test]
async fn a_limit_counts_on_in_the_next_lease() {
    counted_on(false).await;
}

#[tokio::test]
async fn a_limit_counts_on_after_a_kill_and_never_less_than_was_used() {
    counted_on(true).await;
}

#[tokio::test]
async fn after_an_end_in_order_the_sums_are_exact() {
    let mut cell = Cell::new(RULES).await;
    cell.http(80).await;
    cell.name("down.example", &[&[PUBLIC]]);
    assert!(cell.big().await.ends_with("xxx"));
    let event = cell.event().await;
    let cell = cell.again(false).await;
    let used = cell.spec.tally.used("down.example");
    assert_eq!((used.bytes_up, used.bytes_down), (event.bytes_up, event.bytes_down));
    assert!(used.bytes_down > 64 << 10 && used.bytes_up > 0, "{used:?}");
    cell.end().await;
}

#[tokio::test]
async fn where_nothing_can_be_noted_nothing_passes() {
    let mut cell = Cell::new(RULES).await;
    cell.http(80).await;
    cell.name("down.example", &[&[PUBLIC]]);
    let lost = cell.dir.path().join("lost");
    std::fs::create_dir(&lost).unwrap();
    let tally = Arc::new(Tally::open(&lost.join("sums")).unwrap());
    std::fs::remove_dir(&lost).unwrap();
    std::fs::remove_file(cell.dir.path().join(SOCKET)).unwrap();
    let listener = UnixListener::bind(cell.dir.path().join(SOCKET)).unwrap();
    let spec = EgressSpec { tally, ..cell.spec.clone() };
    let door = Door::open(listener, spec, plan(RULES), CellId::new(2));
    std::mem::replace(&mut cell.door, door).destroy().await;
    let answer = cell.big().await;
    assert!(answer.starts_with("HTTP/1.1 502"), "{answer}");
    assert!(cell.seen().is_empty(), "not a byte left the cell");
    cell.end().await;
}

#[tokio::test]
async fn of_a_connection_that_stays_open_something_is_told_now_and_then() {
    let limits = EgressLimits { told_every: Duration::from_millis(20), ..EgressLimits::default() };
    let mut cell = Cell::with(&rule("a.example", ""), limits, None).await;
    cell.https(443, &["a.example"]).await;
    cell.name("a.example", &[&[PUBLIC]]);
    let mut stream = cell.tls("a.example:443", "a.example", false).await.unwrap();
    let first = cell.event().await;
    assert_eq!((first.allowed, first.reason.as_deref()), (true, Some("still open")), "{first:?}");
    assert!(first.bytes_up > 0 && first.bytes_down > 0, "the handshake: {first:?}");
    stream.write_all(b"GET /big HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    drop(stream);
    let (mut up, mut down) = (first.bytes_up, first.bytes_down);
    loop {
        let event = cell.event().await;
        (up, down) = (up + event.bytes_up, down + event.bytes_down);
        if event.reason.is_none() {
            break;
        }
    }
    let tally = cell.spec.tally.clone();
    cell.end().await;
    assert_eq!(tally.used("a.example"), Used { bytes_up: up, bytes_down: down }, "each byte is told once");
}
