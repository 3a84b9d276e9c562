//! The package cache behind the way out: what a second job gets, and what no job can do to the next one. The hosts are
//! servers of this process that count what they are asked.

use std::collections::BTreeMap;

use super::*;
use crate::gateway::packages::{CacheLimits, Choice, PackageCache};
use proptest::prelude::*;

/// What a host does with a path.
#[derive(Debug, Clone)]
struct Page {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Sent in chunks, without a length.
    chunked: bool,
    /// Breaks off after so many bytes.
    cut: Option<usize>,
}

impl Page {
    fn of(body: impl Into<Vec<u8>>, headers: &[(&'static str, &str)]) -> Self {
        let headers = headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        Self { status: 200, headers, body: body.into(), chunked: false, cut: None }
    }
}

/// A request as it came to the host.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Came {
    line: String,
    headers: Vec<(String, String)>,
}

#[derive(Debug, Default)]
struct Host {
    pages: Mutex<BTreeMap<String, Page>>,
    came: Mutex<Vec<Came>>,
}

impl Host {
    fn put(&self, path: &str, page: Page) {
        self.pages.lock().unwrap().insert(path.to_owned(), page);
    }

    fn came(&self) -> Vec<Came> {
        std::mem::take(&mut *self.came.lock().unwrap())
    }
}

/// A host that speaks HTTP by hand, so that it can break off where it likes.
async fn serve_pages(host: Arc<Host>, mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await?);
        }
        let text = String::from_utf8_lossy(&head).into_owned();
        let mut lines = text.lines();
        let line = lines.next().unwrap_or_default().trim_end_matches(" HTTP/1.1").to_owned();
        let headers: Vec<(String, String)> = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        let has = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone());
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut page = host
            .pages
            .lock()
            .unwrap()
            .get(&path)
            .cloned()
            .unwrap_or_else(|| Page { status: 404, ..Page::of("none", &[]) });
        host.came.lock().unwrap().push(Came { line: line.clone(), headers: headers.clone() });
        let etag = page.headers.iter().find(|(name, _)| *name == "etag").map(|(_, value)| value.clone());
        if etag.is_some() && has("if-none-match") == etag {
            page = Page { status: 304, body: Vec::new(), cut: None, chunked: false, ..page };
        }
        let mut answer = format!("HTTP/1.1 {} x\r\n", page.status);
        for (name, value) in &page.headers {
            answer += &format!("{name}: {value}\r\n");
        }
        let mut bytes = if page.status == 304 {
            format!("{answer}\r\n").into_bytes()
        } else if page.chunked {
            let mut bytes = format!("{answer}transfer-encoding: chunked\r\n\r\n").into_bytes();
            for piece in page.body.chunks(1000) {
                bytes.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
                bytes.extend_from_slice(piece);
                bytes.extend_from_slice(b"\r\n");
            }
            bytes.extend_from_slice(b"0\r\n\r\n");
            bytes
        } else {
            let head = format!("{answer}content-length: {}\r\n\r\n", page.body.len());
            let body = if line.starts_with("HEAD") { &[][..] } else { &page.body };
            [head.as_bytes(), body].concat()
        };
        if let Some(cut) = page.cut {
            let head = bytes.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
            bytes.truncate(head + cut);
            stream.write_all(&bytes).await?;
            return stream.shutdown().await;
        }
        stream.write_all(&bytes).await?;
    }
}

const RULES: &str = "inspect = true\ncache = true\nimmutable = [\"/files/**\"]\npaths = [\"/**\"]";
const FRESH: [(&str, &str); 1] = [("cache-control", "max-age=3600")];
const STALE: [(&str, &str); 2] = [("cache-control", "max-age=0"), ("etag", "\"one\"")];

/// Jobs, one after the other, that share a cache and a host.
struct Jobs {
    cache: Arc<PackageCache>,
    host: Arc<Host>,
    dir: tempfile::TempDir,
}

fn limits(bytes_max: u64) -> CacheLimits {
    CacheLimits { bytes_max, entry_bytes_max: bytes_max, free_bytes_min: 0 }
}

impl Jobs {
    fn new() -> Self {
        Self::with(limits(1 << 30))
    }

    fn with(limits: CacheLimits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cache = PackageCache::open(&dir.path().join("packages"), limits).unwrap();
        Self { cache, host: Arc::default(), dir }
    }

    async fn job(&self, rules: &str) -> Cell {
        self.job_of("test", rules, Mirrors::new()).await
    }

    /// A job under a policy, with the host on ports 80 and 443 of `a.example`.
    async fn job_of(&self, policy: &str, rules: &str, mirrors: Mirrors) -> Cell {
        let cache = self.cache.clone();
        let keep = move |egress: Egress| egress.with_packages(cache);
        let mut cell = Cell::made("", EgressLimits::default(), None, mirrors, keep).await;
        // The same door again, under the policy that is wanted.
        let listener = UnixListener::bind(cell.dir.path().join("again.sock")).unwrap();
        let mut plan = Plan::clone(&super::plan(rules));
        plan.policy = policy.to_owned();
        let door = Door::open(listener, cell.spec.clone(), Arc::new(plan), CellId::new(2));
        std::mem::replace(&mut cell.door, door).destroy().await;
        std::fs::rename(cell.dir.path().join("again.sock"), cell.dir.path().join(SOCKET)).unwrap();
        cell.name("a.example", &[&[PUBLIC]]);
        let (plain, secure) = (cell.listener(80).await, cell.listener(443).await);
        let acceptor = cell.acceptor(&["a.example", "mirror.example"]);
        let hosts = [self.host.clone(), self.host.clone()];
        let [one, two] = hosts;
        cell.tasks.spawn(async move {
            while let Ok((stream, _)) = plain.accept().await {
                tokio::spawn(serve_pages(one.clone(), stream));
            }
        });
        cell.tasks.spawn(async move {
            while let Ok((stream, _)) = secure.accept().await {
                let (host, acceptor) = (two.clone(), acceptor.clone());
                tokio::spawn(async move { serve_pages(host, acceptor.accept(stream).await?).await });
            }
        });
        cell
    }

    async fn one(&self, request: &str) -> Answer {
        let mut cell = self.job(&rule("a.example", RULES)).await;
        let answer = get(&mut cell, request).await;
        cell.end().await;
        answer
    }
}

/// What a cell got, and what was told of it.
#[derive(Debug)]
struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
    event: EgressRecord,
}

/// A request through TLS: its first line and further headers.
async fn get(cell: &mut Cell, request: &str) -> Answer {
    let (line, more) = request.split_once('\n').unwrap_or((request, ""));
    let more: String = more.lines().map(|line| format!("{line}\r\n")).collect();
    let text = format!("{line} HTTP/1.1\r\nHost: a.example\r\n{more}Connection: close\r\n\r\n");
    let mut stream = cell.tls("a.example:443", "a.example", true).await.expect("TLS");
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut bytes));
    let _ = read.await.expect("the connection ends");
    parsed(cell, &bytes).await
}

async fn parsed(cell: &mut Cell, bytes: &[u8]) -> Answer {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").expect("a head") + 4;
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let headers: BTreeMap<String, String> = head
        .lines()
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let mut body = bytes[end..].to_vec();
    if headers.get("transfer-encoding").is_some_and(|value| value == "chunked") {
        body = dechunked(&body);
    }
    Answer { status: head[9..12].parse().unwrap(), headers, body, event: cell.event().await }
}

fn dechunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(at) = bytes.windows(2).position(|w| w == b"\r\n") {
        let Ok(length) = usize::from_str_radix(&String::from_utf8_lossy(&bytes[..at]), 16) else { break };
        let Some(piece) = bytes.get(at + 2..at + 2 + length) else { break };
        body.extend_from_slice(piece);
        bytes = bytes.get(at + 4 + length..).unwrap_or_default();
    }
    body
}

#[tokio::test]
async fn what_one_job_fetched_the_next_one_gets_without_a_word_to_the_host() {
    let jobs = Jobs::new();
    let body: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
    jobs.host.put("/thing", Page::of(body.clone(), &FRESH));
    let first = jobs.one("GET /thing").await;
    assert_eq!((first.status, &first.body), (200, &body));
    assert_eq!((first.event.status, first.event.cached_bytes), (Some(200), 0));
    assert!(first.event.bytes_down > 300_000, "{:?}", first.event);
    assert_eq!(jobs.host.came().len(), 1);
    let second = jobs.one("GET /thing").await;
    assert_eq!((second.status, &second.body), (200, &body));
    let event = &second.event;
    assert_eq!((event.cached_bytes, event.bytes_up, event.bytes_down), (300_000, 0, 0), "{event:?}");
    assert!(event.allowed && event.status == Some(200) && event.reason.is_none(), "{event:?}");
    assert_eq!(jobs.host.came(), [], "nothing went over the network");
    assert!(second.headers.contains_key("age"), "{:?}", second.headers);
    assert_eq!(jobs.cache.policies()[0].1.bytes, 300_000);
}

#[tokio::test]
async fn a_stale_answer_is_asked_for_again_and_only_a_new_one_is_fetched() {
    let jobs = Jobs::new();
    jobs.host.put("/index", Page::of(vec![b'a'; 50_000], &STALE));
    jobs.one("GET /index").await;
    let same = jobs.one("GET /index").await;
    assert_eq!((same.status, same.body.len(), same.event.cached_bytes), (200, 50_000, 50_000));
    assert!(same.event.bytes_down < 5_000 && same.event.bytes_up > 0, "{:?}", same.event);
    jobs.host.put("/index", Page::of("new", &[("cache-control", "max-age=0"), ("etag", "\"two\"")]));
    let new = jobs.one("GET /index").await;
    assert_eq!((new.body.as_slice(), new.event.cached_bytes), (&b"new"[..], 0));
    assert_eq!(jobs.one("GET /index").await.event.cached_bytes, 3, "the new one is kept in its place");
    // What the host has no more is forgotten; a fault of the host's is not taken for that.
    jobs.host.put("/index", Page { status: 500, ..Page::of("oh", &[]) });
    assert_eq!(jobs.one("GET /index").await.status, 500);
    assert_eq!(jobs.cache.size().1, 1);
    jobs.host.put("/index", Page { status: 404, ..Page::of("gone", &[]) });
    assert_eq!(jobs.one("GET /index").await.status, 404);
    assert_eq!(jobs.cache.size(), (0, 0));
}

#[tokio::test]
async fn paths_that_never_change_are_never_asked_for_again() {
    let jobs = Jobs::new();
    jobs.host.put("/files/x.tgz", Page::of("one", &[("cache-control", "private, max-age=0")]));
    jobs.host.put("/other/x.tgz", Page::of("one", &[("cache-control", "private, max-age=0")]));
    for path in ["/files/x.tgz", "/other/x.tgz"] {
        jobs.one(&format!("GET {path}")).await;
        jobs.host.put(path, Page::of("two", &[]));
    }
    jobs.host.came();
    let again = jobs.one("GET /files/x.tgz\nCache-Control: no-cache").await;
    assert_eq!((again.body.as_slice(), jobs.host.came().len()), (&b"one"[..], 0));
    assert_eq!(jobs.one("GET /other/x.tgz").await.body, b"two", "its host said that nobody keeps it");
}

#[tokio::test]
async fn a_cell_may_want_what_is_newest() {
    let jobs = Jobs::new();
    jobs.host.put("/index", Page::of("x", &[("cache-control", "max-age=3600"), ("etag", "\"one\"")]));
    jobs.one("GET /index").await;
    jobs.host.came();
    assert_eq!(jobs.one("GET /index\nCache-Control: max-age=0").await.event.cached_bytes, 1);
    let came = jobs.host.came();
    assert!(came[0].headers.contains(&("if-none-match".into(), "\"one\"".into())), "{came:?}");
}

#[tokio::test]
async fn accept_and_compression_make_entries_of_their_own() {
    let jobs = Jobs::new();
    jobs.host.put(
        "/thing",
        Page::of("x", &[("cache-control", "max-age=3600"), ("vary", "accept, accept-encoding")]),
    );
    let asks = [
        "GET /thing",
        "GET /thing\nAccept: application/json",
        "GET /thing\nAccept: application/json\nAccept-Encoding: gzip, br",
        "GET /thing\nAccept-Encoding: deflate",
    ];
    for ask in asks {
        jobs.one(ask).await;
    }
    let seen = |came: &Came, name: &str| {
        came.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone()).unwrap_or_default()
    };
    let came: Vec<(String, String)> =
        jobs.host.came().iter().map(|c| (seen(c, "accept"), seen(c, "accept-encoding"))).collect();
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    let expected =
        [pair("", "identity"), pair("application/json", "identity"), pair("application/json", "gzip")];
    assert_eq!(came, expected, "the last one is what the first one got");
    for ask in asks {
        assert_eq!(jobs.one(ask).await.event.cached_bytes, 1, "{ask}");
    }
    // An encoding that nobody asked for is not kept.
    let odd = Page::of("x", &[("cache-control", "max-age=3600"), ("content-encoding", "br")]);
    jobs.host.put("/odd", odd);
    jobs.one("GET /odd").await;
    assert_eq!(jobs.one("GET /odd").await.event.cached_bytes, 0);
}

#[tokio::test]
async fn who_says_who_they_are_is_neither_answered_from_it_nor_kept() {
    let jobs = Jobs::new();
    jobs.host.put("/thing", Page::of("x", &FRESH));
    for own in ["Authorization: Bearer mine", "Cookie: me=1", "PRIVATE-TOKEN: mine"] {
        jobs.one(&format!("GET /thing\n{own}")).await;
        let came = jobs.host.came();
        let (name, value) = own.split_once(": ").unwrap();
        assert!(came[0].headers.contains(&(name.to_ascii_lowercase(), value.into())), "{came:?}");
        assert_eq!(jobs.cache.size(), (0, 0), "{own}");
    }
    jobs.one("GET /thing").await;
    jobs.host.came();
    jobs.one("GET /thing\nAuthorization: Bearer mine").await;
    assert_eq!(jobs.host.came().len(), 1, "it passes on although an answer is kept");
}

#[tokio::test]
async fn parts_and_heads_are_answered_from_what_is_whole() {
    let jobs = Jobs::new();
    jobs.host.put("/thing", Page::of("0123456789", &[("cache-control", "max-age=3600"), ("etag", "\"e\"")]));
    let part = jobs.one("GET /thing\nRange: bytes=2-4").await;
    assert_eq!((part.status, jobs.cache.size().1), (200, 0), "passed on as it is, and not kept");
    jobs.one("HEAD /thing").await;
    assert_eq!(jobs.cache.size().1, 0);
    jobs.one("GET /thing").await;
    jobs.host.came();
    let part = jobs.one("GET /thing\nRange: bytes=2-4").await;
    assert_eq!((part.status, part.body.as_slice()), (206, &b"234"[..]));
    assert_eq!(part.headers["content-range"], "bytes 2-4/10");
    let beyond = jobs.one("GET /thing\nRange: bytes=10-").await;
    assert_eq!((beyond.status, beyond.headers["content-range"].as_str()), (416, "bytes */10"));
    let head = jobs.one("HEAD /thing").await;
    assert_eq!((head.status, head.body.len(), head.headers["content-length"].as_str()), (200, 0, "10"));
    let same = jobs.one("GET /thing\nIf-None-Match: \"e\"").await;
    assert_eq!((same.status, same.body.len(), same.headers["etag"].as_str()), (304, 0, "\"e\""));
    assert_eq!(jobs.host.came(), []);
}

#[tokio::test]
async fn a_body_that_breaks_off_is_never_kept() {
    let jobs = Jobs::new();
    for chunked in [false, true] {
        let page = Page { chunked, ..Page::of(vec![b'x'; 600_000], &FRESH) };
        for cut in [0, 10, 300_000, 599_999] {
            jobs.host.put("/thing", Page { cut: Some(cut), ..page.clone() });
            let broken = jobs.one("GET /thing").await;
            assert!(broken.event.reason.is_some(), "{cut}: {:?}", broken.event);
            assert_eq!(jobs.cache.size(), (0, 0), "chunked {chunked}, cut at {cut}");
        }
        jobs.host.put("/thing", page);
        assert_eq!(jobs.one("GET /thing").await.body.len(), 600_000);
        assert_eq!(jobs.one("GET /thing").await.event.cached_bytes, 600_000, "chunked: {chunked}");
        jobs.cache.remove_chosen(&Choice::default());
    }
    // An answer that ends with its connection: nobody can tell whether it is whole.
    let ended = Page { cut: Some(5), chunked: false, ..Page::of("whole", &[]) };
    jobs.host.put("/thing", ended);
    jobs.one("GET /thing").await;
    assert_eq!(left_in(&jobs, "tmp"), 0, "nothing is left of what was begun");
}

fn left_in(jobs: &Jobs, dir: &str) -> usize {
    std::fs::read_dir(jobs.dir.path().join("packages").join(dir)).unwrap().count()
}

#[tokio::test]
async fn a_cell_that_leaves_half_way_leaves_nothing_behind() {
    let jobs = Jobs::new();
    jobs.host.put("/thing", Page::of(vec![b'x'; 30 << 20], &FRESH));
    let mut cell = jobs.job(&rule("a.example", RULES)).await;
    let mut stream = cell.tls("a.example:443", "a.example", true).await.unwrap();
    stream.write_all(b"GET /thing HTTP/1.1\r\nHost: a.example\r\n\r\n").await.unwrap();
    let mut some = vec![0; 1 << 20];
    stream.read_exact(&mut some).await.unwrap();
    drop(stream);
    let event = cell.event().await;
    assert_eq!(event.reason.as_deref(), Some("the cell left"), "{event:?}");
    assert_eq!((jobs.cache.size(), left_in(&jobs, "tmp")), ((0, 0), 0));
    cell.end().await;
    assert_eq!(jobs.one("GET /thing").await.body.len(), 30 << 20);
    assert_eq!(jobs.one("GET /thing").await.event.cached_bytes, 30 << 20);
}

#[tokio::test]
async fn two_policies_never_see_each_others_entries_and_a_body_stands_once() {
    let jobs = Jobs::new();
    jobs.host.put("/thing", Page::of(vec![b'x'; 100_000], &FRESH));
    for policy in ["one", "two"] {
        let mut cell = jobs.job_of(policy, &rule("a.example", RULES), Mirrors::new()).await;
        assert_eq!(get(&mut cell, "GET /thing").await.event.cached_bytes, 0, "{policy}");
        assert_eq!(get(&mut cell, "GET /thing").await.event.cached_bytes, 100_000, "{policy}");
        cell.end().await;
    }
    let (bytes, entries) = jobs.cache.size();
    assert!(entries == 2 && bytes < 150_000, "{bytes} bytes for {entries} entries");
    let gone = jobs.cache.remove_chosen(&Choice { policy: Some("one".into()), prefix: None });
    assert_eq!((gone.entries, jobs.cache.size().1), (1, 1));
    let mut cell = jobs.job_of("two", &rule("a.example", RULES), Mirrors::new()).await;
    assert_eq!(get(&mut cell, "GET /thing").await.event.cached_bytes, 100_000, "its body is still there");
    cell.end().await;
}

#[tokio::test]
async fn nothing_that_a_job_sends_changes_what_the_next_one_gets() {
    let jobs = Jobs::new();
    let evil = [
        "X-Forwarded-Host: evil.example",
        "X-Forwarded-Proto: gopher",
        "X-Forwarded-Port: 1",
        "X-Forwarded-Scheme: http",
        "X-Host: evil.example",
        "X-Original-URL: /evil",
        "X-Rewrite-URL: /evil",
        "X-HTTP-Method-Override: POST",
        "X-HTTP-Method: DELETE",
        "Forwarded: host=evil.example",
        "Origin: https://evil.example",
        "Referer: https://evil.example/",
        "User-Agent: evil",
        "Accept-Language: evil",
        "If-Match: \"evil\"",
        "If-None-Match: \"evil\"",
        "If-Modified-Since: Mon, 05 Jan 1970 00:00:00 GMT",
        "Cache-Control: no-store, only-if-cached",
        "Via: evil",
        "CF-Connecting-IP: 127.0.0.1",
        "True-Client-IP: 127.0.0.1",
        "X-Evil: 1",
        "Connection: host",
        "Npm-Scope: evil",
    ];
    // A host that repeats all that it is asked with, as a careless one would.
    let clean = {
        jobs.host.put("/thing", Page::of("good", &FRESH));
        jobs.one("GET /thing\nAccept: */*").await;
        jobs.host.came()
    };
    jobs.cache.remove_chosen(&Choice::default());
    let asks: Vec<String> = evil
        .iter()
        .map(|header| format!("GET /thing\nAccept: */*\n{header}"))
        .chain([
            format!("GET /thing\nAccept: */*\n{}", evil.join("\n")),
            "GET /%74hing\nAccept: */*".to_owned(),
            "GET /%74%68ing\nAccept: */*".to_owned(),
        ])
        .collect();
    for ask in asks {
        jobs.one(&ask).await;
        let came = jobs.host.came();
        assert_eq!(came, clean, "the host sees the same request: {ask}");
        assert_eq!(jobs.one("GET /thing\nAccept: */*").await.body, b"good", "{ask}");
        assert_eq!(jobs.host.came(), [], "{ask}");
        jobs.cache.remove_chosen(&Choice::default());
    }
    // Another query, another path, another spelling of the host: another entry, or none.
    for ask in ["GET /thing?x=1", "GET /thing?", "GET /thing/", "GET /thing;x", "GET /thing%2F", "GET /Thing"]
    {
        jobs.one(&format!("{ask}\nAccept: */*")).await;
        jobs.host.came();
        assert_eq!(jobs.one("GET /thing\nAccept: */*").await.body, b"good", "{ask}");
        assert_eq!(jobs.host.came().len(), 1, "{ask} is another entry");
        jobs.cache.remove_chosen(&Choice::default());
    }
    // A URL in place of a path, and a Host header with something else in it, are no requests at all.
    let cell = jobs.job(&rule("a.example", RULES)).await;
    for request in [
        "GET https://evil.example/thing HTTP/1.1\r\nHost: a.example\r\n\r\n",
        "GET https://a.example/thing HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        "GET /thing HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        "GET /thing HTTP/1.1\r\nHost: a.example\r\nHost: evil.example\r\n\r\n",
        "GET /thing HTTP/1.1\r\nHost: a.example:444\r\n\r\n",
        "GET /thing HTTP/1.1\r\nHost: a.example, evil.example\r\n\r\n",
        "GET /x/../thing HTTP/1.1\r\nHost: a.example\r\n\r\n",
    ] {
        let answer = cell.inspected("a.example", request).await;
        assert!(answer.starts_with("HTTP/1.1 4"), "{request}: {answer}");
    }
    assert_eq!((jobs.host.came(), jobs.cache.size()), (Vec::new(), (0, 0)));
    cell.end().await;
    // A body with a GET: the request passes on, and what comes back is nobody else's.
    jobs.one("GET /thing\nAccept: */*\nContent-Length: 0").await;
    jobs.cache.remove_chosen(&Choice::default());
    let mut cell = jobs.job(&rule("a.example", RULES)).await;
    let answer = cell
        .inspected(
            "a.example",
            "GET /thing HTTP/1.1\r\nHost: a.example\r\nContent-Length: 4\r\nConnection: close\r\n\r\nevil",
        )
        .await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    cell.event().await;
    assert_eq!(jobs.cache.size(), (0, 0));
    cell.end().await;
}

#[tokio::test]
async fn cookies_and_other_methods_stay_out_of_it() {
    let jobs = Jobs::new();
    let page = Page::of("x", &[("cache-control", "public, max-age=3600"), ("set-cookie", "you=1")]);
    jobs.host.put("/thing", page);
    assert!(jobs.one("GET /thing").await.headers.contains_key("set-cookie"));
    let kept = jobs.one("GET /thing").await;
    assert!(kept.event.cached_bytes == 1 && !kept.headers.contains_key("set-cookie"), "{kept:?}");
    jobs.cache.remove_chosen(&Choice::default());
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "PROPFIND"] {
        jobs.one(&format!("{method} /thing")).await;
        assert_eq!(jobs.cache.size().1, 0, "{method}");
    }
    for status in [201, 203, 206, 300, 301, 302, 307, 400, 401, 403, 404, 410, 500, 503] {
        jobs.host.put("/files/x", Page { status, ..Page::of("x", &FRESH) });
        assert_eq!(jobs.one("GET /files/x").await.status, status);
        assert_eq!(jobs.cache.size().1, 0, "{status}");
    }
}

#[tokio::test]
async fn one_job_fills_half_and_the_least_recently_used_goes_first() {
    let jobs = Jobs::with(limits(1 << 20));
    for name in ["a", "b", "c", "d", "e"] {
        jobs.host.put(&format!("/{name}"), Page::of(name.repeat(100 << 10), &FRESH));
    }
    jobs.host.put("/huge", Page::of(vec![b'x'; 600 << 10], &FRESH));
    jobs.host.put("/huge-chunked", Page { chunked: true, ..Page::of(vec![b'x'; 600 << 10], &FRESH) });
    let mut cell = jobs.job(&rule("a.example", RULES)).await;
    for (name, kept) in [("a", 1), ("b", 2), ("c", 3), ("d", 4), ("e", 4), ("huge", 4), ("huge-chunked", 4)] {
        let answer = get(&mut cell, &format!("GET /{name}")).await;
        assert!(answer.status == 200 && answer.event.reason.is_none(), "{answer:?}");
        assert_eq!(jobs.cache.size().1, kept, "{name}: half of it is four of them");
    }
    cell.end().await;
    // Others fill the rest, and what was used last stays.
    jobs.one("GET /a").await;
    let fresh = || tempfile::tempdir().unwrap();
    for n in 0..7 {
        let (dir, other) = (fresh(), format!("/other{n}"));
        jobs.host.put(&other, Page::of(format!("{n}").repeat(100 << 10), &FRESH));
        let mut cell = jobs.job(&rule("a.example", RULES)).await;
        cell.job(JobId::new(2, n)).await;
        get(&mut cell, &format!("GET {other}")).await;
        cell.end().await;
        drop(dir);
    }
    assert!(jobs.cache.size().0 <= 1 << 20);
    let there: Vec<String> = jobs
        .cache
        .list(&Choice::default())
        .0
        .iter()
        .map(|l| l.key.url.rsplit('/').next().unwrap().to_owned())
        .collect();
    assert!(there.contains(&"a".to_owned()) && !there.contains(&"b".to_owned()), "{there:?}");
    assert!(jobs.cache.counters.evicted.load(Ordering::Relaxed) > 0);
}

#[tokio::test]
async fn a_full_or_failing_disk_fails_no_job() {
    let jobs = Jobs::with(CacheLimits { free_bytes_min: u64::MAX, ..limits(1 << 30) });
    jobs.host.put("/thing", Page::of(vec![b'x'; 700_000], &FRESH));
    for _ in 0..2 {
        let answer = jobs.one("GET /thing").await;
        assert!(answer.body.len() == 700_000 && answer.event.reason.is_none(), "{:?}", answer.event);
    }
    assert_eq!((jobs.cache.size(), jobs.cache.counters.failed.load(Ordering::Relaxed)), ((0, 0), 2));
    for at in [0, 300_000] {
        let jobs = Jobs::new();
        jobs.host.put("/thing", Page::of(vec![b'x'; 700_000], &FRESH));
        jobs.cache.fail_after(at);
        let answer = jobs.one("GET /thing").await;
        assert!(answer.body.len() == 700_000 && answer.event.reason.is_none(), "{:?}", answer.event);
        assert_eq!((jobs.cache.size(), left_in(&jobs, "tmp")), ((0, 0), 0));
        assert_eq!(jobs.cache.counters.failed.load(Ordering::Relaxed), 1);
        jobs.cache.fail_after(u64::MAX);
        jobs.one("GET /thing").await;
        assert_eq!(jobs.one("GET /thing").await.event.cached_bytes, 700_000, "it is well again");
    }
    // No directory any more: nothing is kept, and nothing fails.
    let jobs = Jobs::new();
    jobs.host.put("/thing", Page::of("x", &FRESH));
    std::fs::remove_dir_all(jobs.dir.path().join("packages")).unwrap();
    assert_eq!(jobs.one("GET /thing").await.body, b"x");
}

#[tokio::test]
async fn a_body_that_was_changed_on_the_disk_is_fetched_anew() {
    let jobs = Jobs::new();
    jobs.host.put("/thing", Page::of(vec![b'x'; 10_000], &FRESH));
    jobs.one("GET /thing").await;
    let jobs = jobs.reopened();
    assert_eq!(jobs.one("GET /thing").await.event.cached_bytes, 10_000, "as it is, it is good");
    for change in ["turned", "short", "gone"] {
        let jobs = jobs.reopened();
        jobs.one("GET /thing").await;
        let body = jobs.only_file("bodies");
        match change {
            "turned" => std::fs::write(&body, [vec![b'x'; 9_999], vec![b'y']].concat()).unwrap(),
            "short" => std::fs::write(&body, "x").unwrap(),
            _ => std::fs::remove_file(&body).unwrap(),
        }
        // By a daemon that has not read it yet.
        let jobs = jobs.reopened();
        let answer = jobs.one("GET /thing").await;
        assert_eq!((answer.body.len(), answer.event.cached_bytes), (10_000, 0), "{change}");
        assert!(!answer.body.contains(&b'y'));
        assert_eq!(jobs.one("GET /thing").await.event.cached_bytes, 10_000, "{change}: kept again");
    }
    let entry = jobs.only_file("entries");
    let text = std::fs::read_to_string(&entry).unwrap().replace("max-age=3600", "max-age=9999");
    std::fs::write(&entry, text).unwrap();
    assert_eq!(
        jobs.reopened().one("GET /thing").await.event.cached_bytes,
        0,
        "a changed head is noticed, too"
    );
}

impl Jobs {
    /// The same after the daemon was killed.
    fn reopened(&self) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("packages");
        copy_tree(&self.dir.path().join("packages"), &root);
        let cache = PackageCache::open(&root, self.cache.limits()).unwrap();
        Self { cache, host: self.host.clone(), dir }
    }

    fn only_file(&self, kind: &str) -> std::path::PathBuf {
        let files = files_below(&self.dir.path().join("packages").join(kind));
        assert_eq!(files.len(), 1, "{files:?}");
        files[0].clone()
    }
}

fn files_below(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    files
}

fn copy_tree(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (from, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if from.is_dir() { copy_tree(&from, &to) } else { std::fs::copy(&from, &to).map(|_| ()).unwrap() }
    }
}

#[tokio::test]
async fn whatever_a_killed_daemon_leaves_the_next_one_has_a_cache() {
    let jobs = Jobs::new();
    for name in ["a", "b", "c"] {
        jobs.host.put(&format!("/{name}"), Page::of(name.repeat(10_000), &FRESH));
        jobs.one(&format!("GET /{name}")).await;
    }
    let root = jobs.dir.path().join("packages");
    std::fs::write(root.join("tmp/.tmpXYZ"), "half").unwrap();
    let (entries, bodies) = (files_below(&root.join("entries")), files_below(&root.join("bodies")));
    // An entry without its body, a body without its entry, an entry that was not written to its end, and strangers.
    std::fs::remove_file(&bodies[0]).unwrap();
    std::fs::write(bodies[0].with_file_name("stranger"), "x").unwrap();
    let text = std::fs::read(&entries[2]).unwrap();
    std::fs::write(&entries[2], &text[..text.len() / 2]).unwrap();
    std::fs::write(root.join("entries/stray"), "x").unwrap();
    std::fs::create_dir(root.join("bodies/zz")).unwrap();
    std::fs::write(root.join("bodies/zz").join("0".repeat(64)), "x").unwrap();
    let again = PackageCache::open(&root, limits(1 << 30)).unwrap();
    let jobs = Jobs { cache: again, host: jobs.host, dir: jobs.dir };
    let (_, left) = jobs.cache.size();
    assert!(left <= 2, "{left}");
    assert_eq!(files_below(&root.join("entries")).len() as u64, left);
    assert_eq!((files_below(&root.join("bodies")).len() as u64, left_in(&jobs, "tmp")), (left, 0));
    for name in ["a", "b", "c"] {
        assert_eq!(jobs.one(&format!("GET /{name}")).await.body, name.repeat(10_000).as_bytes());
    }
    assert_eq!(jobs.cache.size().1, 3);
}

fn mirrors(url: &str) -> Mirrors {
    [("a.example".to_owned(), Mirror::parse(url).unwrap())].into()
}

#[tokio::test]
async fn a_mirror_stands_in_for_a_host_and_its_address_is_the_administrators_word() {
    let jobs = Jobs::new();
    jobs.host.put("/npm/thing?x=1", Page::of("from the mirror", &FRESH));
    jobs.host.put("/npm/redirect", Page { status: 302, ..Page::of("", &[("location", "http://10.0.0.1/")]) });
    // In plain text on this machine, or through TLS anywhere.
    for url in ["http://127.0.0.1:80/npm/", "https://mirror.example/npm"] {
        let mut cell = jobs.job_of("test", &rule("a.example", RULES), mirrors(url)).await;
        cell.name("mirror.example", &[&["10.1.2.3"]]);
        // The host itself is never looked up.
        cell.name("a.example", &[&["10.9.9.9"]]);
        jobs.cache.remove_chosen(&Choice::default());
        let answer = get(&mut cell, "GET /thing?x=1").await;
        assert_eq!((answer.status, answer.body.as_slice()), (200, &b"from the mirror"[..]), "{url}");
        assert_eq!((answer.event.host.as_str(), answer.event.port), ("a.example", 443));
        assert_eq!(answer.event.path.as_deref(), Some("/thing"), "what the policy judged");
        let came = jobs.host.came();
        assert_eq!(came[0].line, "GET /npm/thing?x=1");
        let host = if url.starts_with("https") { "mirror.example" } else { "127.0.0.1" };
        assert!(came[0].headers.contains(&("host".into(), host.into())), "{came:?}");
        assert_eq!(get(&mut cell, "GET /thing?x=1").await.event.cached_bytes, 15);
        let redirect = get(&mut cell, "GET /redirect").await;
        assert_eq!((redirect.status, redirect.headers["location"].as_str()), (302, "http://10.0.0.1/"));
        let dialled: Vec<String> =
            cell.world.dialled.lock().unwrap().iter().map(ToString::to_string).collect();
        let expected = if url.starts_with("https") { "10.1.2.3:443" } else { "127.0.0.1:80" };
        assert!(dialled.iter().all(|to| to == expected), "{dialled:?}");
        // The policy judges as ever.
        assert_eq!(cell.connect("b.example:443").await.0, 403);
        cell.end().await;
        jobs.host.came();
    }
}

#[tokio::test]
async fn a_private_address_is_reached_only_where_it_is_named() {
    let jobs = Jobs::new();
    jobs.host.put("/thing", Page::of("private", &FRESH));
    let rules = format!("{}{}", rule("a.example", RULES), rule("b.example", RULES));
    // A registry that stands in for itself.
    let mut cell = jobs.job_of("test", &rules, mirrors("https://a.example")).await;
    for name in ["a.example", "b.example"] {
        cell.name(name, &[&["10.1.2.3"]]);
    }
    assert_eq!(get(&mut cell, "GET /thing").await.body, b"private");
    let (status, head, _) = cell.connect("b.example:443").await;
    assert_eq!(status, 403, "{head}");
    cell.end().await;
}

#[tokio::test]
async fn tls_cannot_be_passed_through_to_a_mirror() {
    let jobs = Jobs::new();
    let mut cell = jobs.job_of("test", &rule("a.example", ""), mirrors("http://127.0.0.1")).await;
    let (status, head, _) = cell.connect("a.example:443").await;
    assert!(status == 403 && head.contains("needs inspect = true"), "{head}");
    let event = cell.event().await;
    assert_eq!((event.rule.as_str(), event.allowed), ("network.mirrors", false));
    cell.end().await;
}

#[tokio::test]
async fn plain_http_has_mirrors_and_a_cache_too() {
    let jobs = Jobs::new();
    let rules = rule("a.example", "ports = [80]\ncache = true");
    jobs.host.put("/debian/x.deb", Page::of("deb", &FRESH));
    for cached in [0, 3] {
        let mut cell = jobs.job_of("test", &rules, mirrors("http://127.0.0.1/debian")).await;
        let ask = b"GET http://a.example/x.deb HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n";
        let bytes = cell.raw(ask).await.into_bytes();
        let answer = parsed(&mut cell, &bytes).await;
        assert_eq!((answer.body.as_slice(), answer.event.cached_bytes), (&b"deb"[..], cached));
        cell.end().await;
    }
}

#[tokio::test]
async fn a_credential_goes_where_its_rule_says_and_is_kept_nowhere() {
    let jobs = Jobs::new();
    let with = rule("a.example", &format!("{RULES}\ncredential = \"known\""));
    let page = Page::of(format!("you are {TOKEN}"), &[("cache-control", "max-age=60"), ("x-echo", TOKEN)]);
    jobs.host.put("/thing", page);
    let mut cell = jobs.job_of("test", &with, mirrors("http://127.0.0.1")).await;
    let first = get(&mut cell, "GET /thing\nAccept-Encoding: gzip\nAuthorization: Bearer placeholder").await;
    let came = jobs.host.came();
    assert!(came[0].headers.contains(&("authorization".into(), format!("Bearer {TOKEN}"))), "{came:?}");
    assert!(came[0].headers.contains(&("accept-encoding".into(), "identity".into())), "{came:?}");
    assert_eq!(first.body, format!("you are {}", "*".repeat(TOKEN.len())).as_bytes());
    let second = get(&mut cell, "GET /thing\nAccept-Encoding: gzip").await;
    assert!(
        second.event.cached_bytes > 0 && second.body == first.body && !second.headers.contains_key("x-echo")
    );
    assert_eq!(second.event.credential.as_deref(), Some("known"));
    for file in files_below(jobs.dir.path()) {
        let text = String::from_utf8_lossy(&std::fs::read(&file).unwrap()).into_owned();
        assert!(!text.contains(TOKEN), "{}", file.display());
    }
    cell.end().await;
    // Who has no credential has another entry; and no mirror without TLS gets one from here.
    let mut cell = jobs.job_of("test", &rule("a.example", RULES), mirrors("http://127.0.0.1")).await;
    assert_eq!(get(&mut cell, "GET /thing").await.event.cached_bytes, 0);
    let came = jobs.host.came();
    assert!(came[0].headers.iter().all(|(name, _)| name != "authorization"), "{came:?}");
    cell.end().await;
    let mut cell = jobs.job_of("test", &with, mirrors("http://mirror.example")).await;
    cell.name("mirror.example", &[&["10.1.2.3"]]);
    let refused = get(&mut cell, "GET /else").await;
    assert_eq!((refused.status, refused.event.rule.as_str()), (403, "network.mirrors"), "{refused:?}");
    assert_eq!((jobs.host.came(), cell.dialled()), (Vec::new(), 0));
    cell.end().await;
}

#[tokio::test]
async fn a_host_that_wants_to_know_who_asks_is_told_of_with_the_rule_to_change() {
    let jobs = Jobs::new();
    jobs.host.put("/thing", Page { status: 401, ..Page::of("who?", &[]) });
    let answer = jobs.one("GET /thing").await;
    let reason = answer.event.reason.unwrap();
    assert!(answer.event.allowed && answer.event.status == Some(401));
    assert!(
        reason.contains("egress.host[0] a.example") && reason.contains("credential = \"NAME\""),
        "{reason}"
    );
    let mut cell = jobs.job(&rule("a.example", &format!("{RULES}\ncredential = \"known\""))).await;
    let reason = get(&mut cell, "GET /thing").await.event.reason.unwrap();
    assert!(reason.contains("adds the credential known"), "{reason}");
    cell.end().await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    /// Whatever hosts say and cells ask, what comes from the cache is what the host would have answered.
    #[test]
    fn what_is_served_is_what_the_host_would_have_answered(
        body in prop::collection::vec(any::<u8>(), 0..3000),
        control in prop::sample::select(vec!["max-age=60", "max-age=0", "no-cache", "public", "private", "no-store", ""]),
        etag in any::<bool>(),
        chunked in any::<bool>(),
        changes in prop::collection::vec(any::<bool>(), 1..4),
        ask in prop::sample::select(vec!["", "\nRange: bytes=1-9", "\nAccept: x/y", "\nCache-Control: no-cache", "\nAccept-Encoding: gzip"]),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (jobs, mut body, mut version) = (Jobs::new(), body, 0);
            let page = |body: &[u8], version: u32| {
                let mut page = Page { chunked, ..Page::of(body, &[("content-type", "x/y")]) };
                if !control.is_empty() {
                    page.headers.push(("cache-control", control.to_owned()));
                }
                if etag {
                    page.headers.push(("etag", format!("\"{version}\"")));
                }
                page
            };
            let lasting = control == "max-age=60" && ask != "\nCache-Control: no-cache" ;
            for change in changes {
                // A host that says how long an answer is right keeps to it.
                if change && !lasting {
                    version += 1;
                    body.push(b'+');
                }
                jobs.host.put("/thing", page(&body, version));
                let answer = jobs.one(&format!("GET /thing{ask}")).await;
                let ranged = answer.status == 206;
                let expected: &[u8] = if ranged { &body[1..body.len().min(10)] } else { &body };
                prop_assert_eq!(&answer.body, expected);
                prop_assert_eq!(answer.headers.get("content-type").map(String::as_str), Some("x/y"));
                prop_assert_eq!(answer.headers.contains_key("etag"), etag);
                if control == "no-store" || control == "private" {
                    prop_assert_eq!(jobs.cache.size().1, 0);
                }
            }
            Ok(())
        })?;
    }
}

#[tokio::test]
async fn a_plain_request_that_the_policy_upgrades_leaves_over_tls_and_shares_what_is_kept() {
    async fn plain(cell: &mut Cell, path: &str) -> Answer {
        let ask =
            format!("GET http://a.example{path} HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n");
        let bytes = cell.raw(ask.as_bytes()).await.into_bytes();
        parsed(cell, &bytes).await
    }
    let jobs = Jobs::new();
    jobs.host.put("/files/x.jar", Page::of("x", &FRESH));
    let mut cell = jobs.job(&rule("a.example", &format!("{RULES}\nupgrade = true"))).await;
    let first = plain(&mut cell, "/files/x.jar").await;
    assert_eq!((first.status, first.body.as_slice(), first.event.port), (200, &b"x"[..], 443));
    assert_eq!(jobs.host.came().len(), 1);
    let again = plain(&mut cell, "/files/x.jar").await;
    assert_eq!((again.event.cached_bytes, again.event.bytes_up), (1, 0));
    cell.end().await;
    assert_eq!(jobs.one("GET /files/x.jar").await.event.cached_bytes, 1, "the same as over TLS");
    // Without the word of the policy plain text is what it was.
    let mut cell = jobs.job(&rule("a.example", RULES)).await;
    let refused = plain(&mut cell, "/files/x.jar").await;
    assert_eq!((refused.status, refused.event.allowed), (403, false));
    cell.end().await;
    assert_eq!(jobs.host.came(), []);
}
