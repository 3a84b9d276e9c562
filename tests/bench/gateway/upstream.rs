//! The scripted upstream of the gateway's measurements, in a process of its own so that its work is nobody
//! else's: event streams with usage like the real API's, as fast as hyper is. It answers only requests that
//! carry the provider's key, so every proxy has to put it in; it must never be what limits a measurement.

use std::convert::Infallible;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use memchr::memmem;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Says to this program that it is the upstream.
const ROLE: &str = "BENCH_GATEWAY_UPSTREAM";
/// The key that it asks for.
const KEY: &str = "BENCH_GATEWAY_KEY";
/// In a request's text; the four characters after it say which answer is wanted.
const MARKER: &str = "bench-answer-";
/// The prompt whose request is recorded.
pub(crate) const PROMPT: &str = "bench-answer-shrt";
/// Size of the pieces in which a long answer is sent.
const PIECE_BYTES: usize = 16 << 10;
/// Between two events of an answer that is held.
const HOLD_TICK: Duration = Duration::from_secs(2);

/// Which answer a request wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// A few events.
    Short,
    /// So many megabytes of events, at once.
    Long(u16),
    /// Some events now, then one every two seconds until [`Upstream::release`].
    Hold,
}

impl Wanted {
    fn word(self) -> String {
        match self {
            Self::Short => "shrt".to_owned(),
            Self::Long(megabytes) => format!("l{megabytes:03}"),
            Self::Hold => "hold".to_owned(),
        }
    }

    fn of(body: &[u8]) -> Option<Self> {
        let at = memmem::find(body, MARKER.as_bytes())? + MARKER.len();
        match body.get(at..at + 4)? {
            b"shrt" => Some(Self::Short),
            b"hold" => Some(Self::Hold),
            [b'l', digits @ ..] => std::str::from_utf8(digits).ok()?.parse().ok().map(Self::Long),
            _ => None,
        }
    }

    /// A recorded body, changed to want this; its length stays.
    pub(crate) fn put_into(self, body: &[u8]) -> Vec<u8> {
        let mut body = body.to_vec();
        let places: Vec<usize> = memmem::find_iter(&body, MARKER).map(|at| at + MARKER.len()).collect();
        for at in places {
            body[at..at + 4].copy_from_slice(self.word().as_bytes());
        }
        body
    }
}

/// The running upstream, as the measurements see it.
pub(crate) struct Upstream {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl Upstream {
    pub(crate) fn start(key: &str) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.env(ROLE, "1").env(KEY, key).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("start the upstream")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("no standard output")?).read_line(&mut line)?;
        let address = line.trim().parse().context("the upstream's address")?;
        Ok(Self { child, address })
    }

    /// Ends all answers that are held.
    pub(crate) fn release(&self) -> Result<()> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.write_all(
            b"POST /release HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "release: {answer}");
        Ok(())
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether this program was started as the upstream.
pub(crate) fn told() -> bool {
    std::env::var_os(ROLE).is_some()
}

/// Is the upstream until standard input ends.
pub(crate) fn run() {
    let key = std::env::var(KEY).expect("the key");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        println!("{}", listener.local_addr().expect("an address"));
        // It ends with whoever started it.
        let (gone, over) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let _ = std::io::stdin().lock().read_to_end(&mut Vec::new());
            let _ = gone.send(());
        });
        tokio::select! {
            () = accept(listener, &key) => {}
            _ = over => {}
        }
    });
}

async fn accept(listener: TcpListener, key: &str) {
    let script: &'static Script = Box::leak(Box::new(Script::new(key)));
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _ = stream.set_nodelay(true);
        let service = service_fn(move |request| script.answer(request));
        let mut server = hyper::server::conn::http1::Builder::new();
        server.half_close(false);
        tokio::spawn(server.serve_connection(TokioIo::new(stream), service));
    }
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// The parts of its answers.
struct Script {
    key: HeaderValue,
    first: Bytes,
    delta: Bytes,
    few: Bytes,
    piece: Bytes,
    last: Bytes,
    releases: watch::Sender<u64>,
}

impl Script {
    fn new(key: &str) -> Self {
        let event =
            |name: &str, data: &str| format!("event: {name}\ndata: {{\"type\":\"{name}\",{data}}}\n\n");
        let usage = r#""usage":{"input_tokens":3,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":1,"service_tier":"standard"}"#;
        let message = format!(
            r#""message":{{"id":"msg_01BenchBenchBenchBench","type":"message","role":"assistant","model":"claude-sonnet-4-6","content":[],"stop_reason":null,"stop_sequence":null,{usage}}}"#
        );
        let first = event("message_start", &message)
            + &event("content_block_start", r#""index":0,"content_block":{"type":"text","text":""}"#)
            + &event("ping", r#""for":"nobody""#);
        let text = "a few words of an answer as they come from a model, some dozens at a time";
        let delta = event(
            "content_block_delta",
            &format!(r#""index":0,"delta":{{"type":"text_delta","text":"{text}"}}"#),
        );
        let last = event("content_block_stop", r#""index":0"#)
            + &event(
                "message_delta",
                r#""delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":{"output_tokens":1}"#,
            )
            + "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";
        Self {
            key: HeaderValue::from_str(key).expect("a key"),
            first: first.into(),
            few: delta.repeat(8).into(),
            piece: delta.repeat(PIECE_BYTES / delta.len()).into(),
            delta: delta.into(),
            last: last.into(),
            releases: watch::Sender::new(0),
        }
    }

    async fn answer(&'static self, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        let (head, body) = request.into_parts();
        let Ok(body) = body.collect().await else { return Ok(whole(StatusCode::BAD_REQUEST, "")) };
        let body = body.to_bytes();
        if head.uri.path() == "/release" {
            self.releases.send_modify(|count| *count += 1);
            return Ok(whole(StatusCode::OK, ""));
        }
        if head.method != Method::POST {
            return Ok(whole(StatusCode::OK, ""));
        }
        if head.headers.get("x-api-key") != Some(&self.key) {
            return Ok(whole(
                StatusCode::UNAUTHORIZED,
                r#"{"type":"error","error":{"type":"authentication_error","message":"not the key"}}"#,
            ));
        }
        if head.uri.path() == "/v1/messages/count_tokens" {
            return Ok(whole(StatusCode::OK, r#"{"input_tokens":30000}"#));
        }
        let Some(wanted) = Wanted::of(&body) else {
            return Ok(whole(
                StatusCode::BAD_REQUEST,
                r#"{"type":"error","error":{"type":"invalid_request_error","message":"no marker"}}"#,
            ));
        };
        let body = match wanted {
            Wanted::Short => {
                streamed(stream::iter([self.first.clone(), self.few.clone(), self.last.clone()]))
            }
            Wanted::Long(megabytes) => {
                let pieces = usize::from(megabytes) * 1_000_000 / self.piece.len();
                let middle = std::iter::repeat_n(self.piece.clone(), pieces);
                let all = std::iter::once(self.first.clone()).chain(middle).chain([self.last.clone()]);
                streamed(stream::iter(all))
            }
            Wanted::Hold => streamed(stream::iter([self.first.clone()]).chain(self.held())),
        };
        let mut response = Response::new(body);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
        headers.insert("cache-control", HeaderValue::from_static("no-cache"));
        headers.insert("request-id", HeaderValue::from_static("req_011BenchBenchBenchBenchBe"));
        Ok(response)
    }

    fn held(&'static self) -> impl Stream<Item = Bytes> {
        let released = self.releases.subscribe();
        stream::unfold(Some(released), |released| async {
            let mut released = released?;
            tokio::select! {
                _ = released.changed() => Some((self.last.clone(), None)),
                () = tokio::time::sleep(HOLD_TICK) => Some((self.delta.clone(), Some(released))),
            }
        })
    }
}

fn whole(status: StatusCode, text: &'static str) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn streamed(pieces: impl Stream<Item = Bytes> + Send + 'static) -> Body {
    StreamBody::new(pieces.map(|piece| Ok(Frame::data(piece)))).boxed_unsync()
}
