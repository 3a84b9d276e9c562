//! The sockets of the scripted model: hyper http1 on TCP or a unix socket. It must answer any request with
//! something and stop at once when it is told to.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, Limited, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::ask::Ask;
use super::cloud::{self, Cloud};
use super::record::{Received, Recorder};
use super::reply::{Answer, Plan, Step, plan, refusal};
use super::script::{Script, error_json};

/// Largest request body, in bytes.
const BODY_BYTES_MAX: usize = 64 << 20;
/// Most connections at a time; more wait in the listen queue.
const CONNECTIONS_MAX: usize = 4096;
/// How long `hang` lasts.
const HANG: Duration = Duration::from_secs(3600);

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Where the model listens.
#[derive(Debug)]
pub enum Listener {
    /// TCP; the caller sees to it that it is a loopback address.
    Tcp(TcpListener),
    /// A unix socket; the caller removes its file.
    Unix(UnixListener),
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self::Tcp(listener)
    }
}

impl From<UnixListener> for Listener {
    fn from(listener: UnixListener) -> Self {
        Self::Unix(listener)
    }
}

/// What happened while the model served.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ModelReport {
    /// Requests of any kind.
    pub requests: u64,
    /// `count_tokens` requests among them.
    pub count_tokens: u64,
    /// Answers by rule, in script order, the default last.
    pub rules: Vec<RuleHits>,
}

/// How often one rule answered.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct RuleHits {
    /// Name of the rule.
    pub name: String,
    /// Its answers.
    pub hits: u64,
}

/// Serves `script` until `shutdown`, then drops all connections and reports.
pub async fn serve(
    listener: impl Into<Listener>,
    script: Arc<Script>,
    recorder: Arc<Recorder>,
    shutdown: CancellationToken,
) -> ModelReport {
    let listener = listener.into();
    // Ids differ between runs, so that a resumed conversation never holds the same id twice.
    let first_serial = crate::clock::wall_ms() << 20;
    let model = Arc::new(Model {
        script,
        recorder,
        serial: AtomicU64::new(first_serial),
        count_tokens: AtomicU64::new(0),
    });
    let mut connections = JoinSet::new();
    loop {
        let full = connections.len() >= CONNECTIONS_MAX;
        tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = accept(&listener), if !full => match accepted {
                Ok(stream) => { connections.spawn(Arc::clone(&model).connection(stream)); }
                Err(error) => {
                    tracing::warn!(%error, "the scripted model cannot accept a connection");
                    // Out of descriptors, most likely: give others the time to close some.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
        }
    }
    connections.shutdown().await;
    model.report()
}

/// A connection of either kind.
enum Stream {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

async fn accept(listener: &Listener) -> io::Result<Stream> {
    match listener {
        Listener::Tcp(tcp) => {
            let (stream, _) = tcp.accept().await?;
            stream.set_nodelay(true)?;
            Ok(Stream::Tcp(stream))
        }
        Listener::Unix(unix) => Ok(Stream::Unix(unix.accept().await?.0)),
    }
}

struct Model {
    script: Arc<Script>,
    recorder: Arc<Recorder>,
    serial: AtomicU64,
    count_tokens: AtomicU64,
}

impl Model {
    fn report(&self) -> ModelReport {
        let hits = |rule: &super::script::Rule| RuleHits { name: rule.name.clone(), hits: rule.hits() };
        ModelReport {
            requests: self.recorder.total(),
            count_tokens: self.count_tokens.load(Ordering::Relaxed),
            rules: self.script.rules().map(hits).collect(),
        }
    }

    async fn connection(self: Arc<Self>, stream: Stream) {
        let service = service_fn(|request| {
            let model = Arc::clone(&self);
            async move { Ok::<_, Infallible>(model.answer(request).await) }
        });
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new());
        let served = match stream {
            Stream::Tcp(tcp) => http.serve_connection(TokioIo::new(tcp), service).await,
            Stream::Unix(unix) => http.serve_connection(TokioIo::new(unix), service).await,
        };
        if let Err(error) = served {
            tracing::debug!(%error, "a connection of the scripted model ended");
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let (head, body) = request.into_parts();
        let headers: Vec<(String, String)> = head
            .headers
            .iter()
            .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
            .collect();
        let body = match Limited::new(body, BODY_BYTES_MAX).collect().await {
            Ok(body) => body.to_bytes(),
            Err(_) => return response(Answer::json(413, error_json("request_too_large", "body too large"))),
        };
        let path = head.uri.path();
        let mut received = Received {
            method: head.method.to_string(),
            target: head.uri.path_and_query().map_or_else(String::new, ToString::to_string),
            headers: headers.clone(),
            body: body.clone(),
            rule: None,
        };
        // Suffixes, since a base URL may have a path.
        let plan = match &head.method {
            m if m == Method::POST && cloud::of_path(path).is_some() => {
                self.in_the_cloud(path, &body, headers, &mut received.rule)
            }
            m if m == Method::GET && path.ends_with("/inference-profiles") => {
                Plan::Answer(Answer::json(200, "{\"inferenceProfileSummaries\":[]}".to_owned()))
            }
            m if m == Method::POST && path.ends_with("/v1/messages/count_tokens") => {
                Plan::Answer(self.count(&body))
            }
            m if m == Method::POST && path.ends_with("/v1/messages") => {
                self.message(&body, headers, &mut received.rule)
            }
            m if m == Method::HEAD => {
                Plan::Answer(Answer { steps: Vec::new(), ..Answer::json(200, String::new()) })
            }
            m if m == Method::GET && path.ends_with("/healthz") => {
                Plan::Answer(Answer::json(200, "{\"ok\":true}".to_owned()))
            }
            _ => Plan::Answer(Answer::json(404, error_json("not_found_error", "no such path here"))),
        };
        self.recorder.take(received);
        match plan {
            Plan::Answer(answer) => {
                wait(answer.latency_ms).await;
                response(answer)
            }
            Plan::Hang => {
                tokio::time::sleep(HANG).await;
                response(Answer::json(504, error_json("timeout_error", "the script hangs")))
            }
        }
    }

    fn count(&self, body: &Bytes) -> Answer {
        self.count_tokens.fetch_add(1, Ordering::Relaxed);
        Answer::json(200, format!("{{\"input_tokens\":{}}}", body.len() / 4))
    }

    fn in_the_cloud(
        &self,
        path: &str,
        body: &Bytes,
        headers: Vec<(String, String)>,
        rule: &mut Option<String>,
    ) -> Plan {
        let Some((place, id)) = cloud::of_path(path) else { return Plan::Hang };
        if let Some(refused) = cloud::unauthorised(place, &headers) {
            return Plan::Answer(refused);
        }
        if place == Cloud::VertexCount {
            return Plan::Answer(self.count(body));
        }
        let Ok(json) = serde_json::from_slice(body) else { return not_json() };
        match cloud::request(place, id, json) {
            Err(refused) => Plan::Answer(refused),
            Ok(json) => match self.reply(&json, body.len(), headers, rule) {
                Plan::Hang => Plan::Hang,
                Plan::Answer(answer) => Plan::Answer(cloud::answer(place, answer)),
            },
        }
    }

    fn message(&self, body: &Bytes, headers: Vec<(String, String)>, rule: &mut Option<String>) -> Plan {
        match serde_json::from_slice(body) {
            Ok(json) => self.reply(&json, body.len(), headers, rule),
            Err(_) => not_json(),
        }
    }

    fn reply(
        &self,
        json: &serde_json::Value,
        body_bytes: usize,
        headers: Vec<(String, String)>,
        rule: &mut Option<String>,
    ) -> Plan {
        let ask = Ask::read(json, body_bytes, headers);
        if let Some(refused) = refusal(&ask) {
            return Plan::Answer(refused);
        }
        let chosen = self.script.choose(&ask);
        *rule = Some(chosen.name.clone());
        plan(&chosen.reply, &ask, self.serial.fetch_add(1, Ordering::Relaxed))
    }
}

fn not_json() -> Plan {
    Plan::Answer(Answer::json(400, error_json("invalid_request_error", "body is not JSON")))
}

async fn wait(ms: u64) {
    if ms > 0 {
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
}

fn response(answer: Answer) -> Response<Body> {
    let end = answer.cut.then(|| Err(io::Error::other("the script cuts here")));
    let pieces = stream::unfold((answer.steps.into_iter(), end), |(mut steps, mut end)| async move {
        if let Some(Step { wait_ms, bytes }) = steps.next() {
            wait(wait_ms).await;
            return Some((Ok(Frame::data(bytes)), (steps, end)));
        }
        // Pending once, so that hyper writes out what it holds before it drops the connection.
        tokio::task::yield_now().await;
        end.take().map(|end| (end, (steps, None)))
    });
    let mut response = Response::new(BodyExt::boxed_unsync(StreamBody::new(pieces)));
    *response.status_mut() = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&answer.content_type) {
        headers.insert(CONTENT_TYPE, value);
    }
    for (name, value) in answer.headers {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::from_str(&value)) {
            headers.append(name, value);
        }
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    async fn exchange(address: std::net::SocketAddr, head: &str, body: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request =
            format!("{head}\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut out = Vec::new();
        stream.read_to_end(&mut out).await.unwrap();
        String::from_utf8_lossy(&out).into_owned()
    }

    #[tokio::test]
    async fn it_answers_records_counts_and_stops() {
        let script = Script::parse(
            "[[reply]]\nname=\"cut\"\ntimes=1\nwhen={prompt=\"hi\"}\ntext=\"hello\"\nfault={cut_after_events=2}\n\
             [default]\ntext=\"again {{prompt}}\"\n",
            "t",
        )
        .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, recorder) = (CancellationToken::new(), Arc::new(Recorder::memory()));
        let task = tokio::spawn(serve(listener, Arc::new(script), Arc::clone(&recorder), stop.clone()));

        let body =
            r#"{"model":"m","max_tokens":9,"stream":true,"messages":[{"role":"user","content":"hi"}]}"#;
        let cut = exchange(address, "POST /p/v1/messages?beta=true HTTP/1.1\r\nx-api-key: k", body).await;
        assert!(cut.contains("content_block_start") && !cut.contains("message_stop"), "{cut}");
        assert!(!cut.ends_with("0\r\n\r\n"), "a cut stream has no last chunk: {cut}");
        let retry = exchange(address, "POST /v1/messages HTTP/1.1", &body.replace("true", "false")).await;
        assert!(retry.contains("again hi"), "{retry}");
        assert!(
            exchange(address, "POST /v1/messages/count_tokens HTTP/1.1", "{}").await.contains("input_tokens")
        );
        assert!(exchange(address, "HEAD / HTTP/1.1", "").await.starts_with("HTTP/1.1 200"));
        assert!(exchange(address, "GET /v1/models HTTP/1.1", "").await.starts_with("HTTP/1.1 404"));

        recorder.wait_for(5).await;
        assert_eq!(recorder.requests()[0].header("x-api-key"), Some("k"));
        assert_eq!(recorder.requests()[0].rule.as_deref(), Some("cut"));
        stop.cancel();
        let report = task.await.unwrap();
        assert_eq!(
            (report.requests, report.count_tokens, report.rules[0].hits, report.rules[1].hits),
            (5, 1, 1, 1)
        );
    }
}
