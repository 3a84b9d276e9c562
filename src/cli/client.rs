//! The daemon's API as a client sees it: HTTP/1.1 on a unix socket, one connection per request. Every wait
//! and every body has a limit, but for following events, which waits as long as the job runs. Never retries
//! by itself and never prints.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio_util::task::AbortOnDropHandle;

use super::fail::{ApiError, CliError};
use crate::api::cache::{CacheRemoved, CacheView};
use crate::api::changes::ChangesView;
use crate::api::cost::CostReport;
use crate::api::daemon::{EndingView, PauseView};
use crate::api::doctor::attack::ATTACK_MAX;
use crate::api::gc::GcView;
use crate::api::notices::{NoticesView, TestView};
use crate::api::queue::QueueView;
use crate::api::wire::{AttackRequest, Doctor, Health, JobList, JobView, WhoAmI};
use crate::change::decision::{
    ApplyAnswer, ApplyRequest, CheckoutAnswer, CheckoutRequest, ExportFormat, Form,
};
use crate::job::JobId;

/// How long connecting may take.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// How long the daemon may take to answer a request.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// The same for a submit, for which a repository may have to be fetched.
const SUBMIT_MAX: Duration = Duration::from_secs(20 * 60);
/// The same for a support pack, which may have to wait for another one.
const SUPPORT_MAX: Duration = Duration::from_secs(5 * 60);
/// Largest answer that is no stream of events, in bytes.
const BODY_BYTES_MAX: usize = 64 << 20;
/// Longest event, in bytes.
const LINE_BYTES_MAX: usize = 64 << 20;

/// A client of one daemon.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    socket: PathBuf,
}

/// Which jobs to list.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filter {
    /// Only jobs in this state.
    pub(crate) state: Option<String>,
    /// Only jobs with all of these labels, each `key=value`.
    pub(crate) labels: Vec<String>,
    /// Only jobs under this policy.
    pub(crate) policy: Option<String>,
    /// Jobs of all users (for admins).
    pub(crate) all_users: bool,
}

/// A connection that carries frames.
pub(crate) struct Attached {
    /// The frames' bytes.
    pub(crate) socket: TokioIo<hyper::upgrade::Upgraded>,
    _connection: AbortOnDropHandle<()>,
}

/// An answer whose connection lives as long as it does.
struct Answer {
    response: Response<Incoming>,
    connection: AbortOnDropHandle<()>,
}

impl Client {
    /// A client of the daemon behind `socket`; connects to nothing yet.
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Submits a job. The same key with the same spec is the same job, however often it is sent.
    pub(crate) async fn submit(&self, spec: Bytes, idempotency_key: &str) -> Result<JobView, CliError> {
        let request = Request::post("/v1/jobs")
            .header("content-type", "application/json")
            .header("idempotency-key", idempotency_key);
        let answer = self.send_for(request.body(Full::new(spec)), SUBMIT_MAX).await?;
        let bytes = self.whole(answer).await?;
        serde_json::from_slice(&bytes).map_err(|e| CliError::Protocol { what: e.to_string() })
    }

    /// One page of jobs, newest first.
    async fn page(&self, filter: &Filter, limit: usize, cursor: Option<&str>) -> Result<JobList, CliError> {
        let mut path = format!("/v1/jobs?limit={limit}");
        let mut add = |key: &str, value: &str| path += &format!("&{key}={}", encode(value));
        filter.state.iter().for_each(|state| add("state", state));
        filter.labels.iter().for_each(|label| add("label", label));
        filter.policy.iter().for_each(|policy| add("policy", policy));
        cursor.iter().for_each(|cursor| add("cursor", cursor));
        if filter.all_users {
            add("all", "1");
        }
        self.get(&path).await
    }

    /// At most `limit` jobs, newest first, and whether there are more.
    pub(crate) async fn list(&self, filter: &Filter, limit: usize) -> Result<(Vec<JobView>, bool), CliError> {
        let mut jobs: Vec<JobView> = Vec::new();
        let mut cursor: Option<String> = None;
        loop {
            let wanted = (limit - jobs.len()).min(100);
            let page = self.page(filter, wanted, cursor.as_deref()).await?;
            let empty = page.jobs.is_empty();
            jobs.extend(page.jobs);
            let more = page.next_cursor.is_some() || jobs.len() > limit;
            jobs.truncate(limit);
            // A page without jobs that promises more would make this loop endless.
            if !more || empty || jobs.len() == limit {
                return Ok((jobs, more));
            }
            cursor = page.next_cursor;
        }
    }

    /// One job.
    pub(crate) async fn job(&self, id: &JobId) -> Result<JobView, CliError> {
        self.get(&format!("/v1/jobs/{id}")).await
    }

    /// Asks for a stop.
    pub(crate) async fn cancel(&self, id: &JobId) -> Result<JobView, CliError> {
        let request = Request::post(format!("/v1/jobs/{id}/cancel"));
        self.read(request.body(Full::default())).await
    }

    /// Takes part in a job's command: the connection, for frames.
    pub(crate) async fn attach(&self, id: &JobId) -> Result<Attached, CliError> {
        let request = Request::post(format!("/v1/jobs/{id}/attach"))
            .header("connection", "upgrade")
            .header("upgrade", crate::api::attach::PROTOCOL);
        let answer = self.send(request.body(Full::default())).await?;
        if answer.response.status() != hyper::StatusCode::SWITCHING_PROTOCOLS {
            self.whole(answer).await?;
            return Err(CliError::Protocol { what: "neither a connection nor an error".into() });
        }
        let upgraded = hyper::upgrade::on(answer.response).await;
        let socket = upgraded.map_err(|e| CliError::ConnectionLost { what: e.to_string() })?;
        Ok(Attached { socket: TokioIo::new(socket), _connection: answer.connection })
    }

    /// Lets a parked job go on.
    pub(crate) async fn unpark(&self, id: &JobId) -> Result<JobView, CliError> {
        let request = Request::post(format!("/v1/jobs/{id}/unpark"));
        self.read(request.body(Full::default())).await
    }

    /// Submits the task of a job that is over once more: the new job.
    pub(crate) async fn retry(&self, id: &JobId) -> Result<JobView, CliError> {
        let request = Request::post(format!("/v1/jobs/{id}/retry"));
        self.read(request.body(Full::default())).await
    }

    /// What waits.
    pub(crate) async fn queue(&self) -> Result<QueueView, CliError> {
        self.get("/v1/queue").await
    }

    /// Ends the daemon: `drain` or `detach`.
    pub(crate) async fn end(&self, how: &str) -> Result<EndingView, CliError> {
        self.read(Request::post(format!("/v1/daemon/{how}")).body(Full::default())).await
    }

    /// Holds all starts or lets them go: `pause` or `resume`.
    pub(crate) async fn hold(&self, what: &str) -> Result<PauseView, CliError> {
        self.read(Request::post(format!("/v1/daemon/{what}")).body(Full::default())).await
    }

    /// Deletes a job that is done, with its events.
    pub(crate) async fn remove(&self, id: &JobId) -> Result<(), CliError> {
        let request = Request::delete(format!("/v1/jobs/{id}"));
        let answer = self.send(request.body(Full::default())).await?;
        self.whole(answer).await.map(|_| ())
    }

    /// What was spent; `query` is passed on.
    pub(crate) async fn cost<'a>(
        &self,
        query: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Result<CostReport, CliError> {
        let query: Vec<String> = query.map(|(key, value)| format!("{key}={}", encode(value))).collect();
        self.get(&format!("/v1/cost?{}", query.join("&"))).await
    }

    /// What is kept of package hosts; `query` is passed on.
    pub(crate) async fn cache(&self, query: &[(&str, &str)]) -> Result<CacheView, CliError> {
        self.get(&cache_path(query)).await
    }

    /// Removes what is kept of package hosts.
    pub(crate) async fn remove_cache(&self, query: &[(&str, &str)]) -> Result<CacheRemoved, CliError> {
        self.read(Request::delete(cache_path(query)).body(Full::default())).await
    }

    /// Removes what is old or too much, or only says so.
    pub(crate) async fn gc(&self, dry_run: bool) -> Result<GcView, CliError> {
        let request = Request::post(format!("/v1/gc?dry_run={}", u8::from(dry_run)));
        self.read(request.body(Full::default())).await
    }

    /// Who is told of what happens to jobs, and what waits.
    pub(crate) async fn notices(&self) -> Result<NoticesView, CliError> {
        self.read(Request::get("/v1/notices").body(Full::default())).await
    }

    /// Tells each of them a word.
    pub(crate) async fn test_notices(&self) -> Result<Vec<TestView>, CliError> {
        self.read(Request::post("/v1/notices/test").body(Full::default())).await
    }

    /// The report that a job left.
    pub(crate) async fn report(&self, id: &JobId) -> Result<Bytes, CliError> {
        let request = Request::get(format!("/v1/jobs/{id}/report"));
        let answer = self.send(request.body(Full::default())).await?;
        self.whole(answer).await
    }

    /// What helps to find out what went wrong with a job: an archive.
    pub(crate) async fn support(&self, id: &JobId, prompt: bool, contents: bool) -> Result<Bytes, CliError> {
        let (prompt, contents) = (u8::from(prompt), u8::from(contents));
        let path = format!("/v1/jobs/{id}/support?with_prompt={prompt}&with_contents={contents}");
        let agent = concat!("hotcell/", env!("CARGO_PKG_VERSION"));
        let request = Request::get(path).header("user-agent", agent);
        let answer = self.send_for(request.body(Full::default()), SUPPORT_MAX).await?;
        self.whole(answer).await
    }

    /// What a job changed.
    pub(crate) async fn changes(&self, id: &JobId) -> Result<ChangesView, CliError> {
        self.get(&format!("/v1/jobs/{id}/changes")).await
    }

    /// The same as text.
    pub(crate) async fn diff(&self, id: &JobId, form: Form, only: &[String]) -> Result<Bytes, CliError> {
        let mut path = format!("/v1/jobs/{id}/diff?form={}", form.as_str());
        only.iter().for_each(|glob| path += &format!("&only={}", encode(glob)));
        let request = Request::get(path);
        let answer = self.send(request.body(Full::default())).await?;
        self.whole(answer).await
    }

    /// The same for other tools.
    pub(crate) async fn export(&self, id: &JobId, format: ExportFormat) -> Result<Bytes, CliError> {
        let request = Request::get(format!("/v1/jobs/{id}/export?format={}", format.as_str()));
        let answer = self.send(request.body(Full::default())).await?;
        self.whole(answer).await
    }

    /// Applies what a job changed.
    pub(crate) async fn apply(&self, id: &JobId, request: &ApplyRequest) -> Result<ApplyAnswer, CliError> {
        self.post(&format!("/v1/jobs/{id}/apply"), request).await
    }

    /// Writes the workspace as the job left it.
    pub(crate) async fn checkout(
        &self,
        id: &JobId,
        request: &CheckoutRequest,
    ) -> Result<CheckoutAnswer, CliError> {
        self.post(&format!("/v1/jobs/{id}/checkout"), request).await
    }

    /// Throws away what a job changed.
    pub(crate) async fn discard(&self, id: &JobId) -> Result<JobView, CliError> {
        let request = Request::post(format!("/v1/jobs/{id}/discard"));
        self.read(request.body(Full::default())).await
    }

    async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl serde::Serialize,
    ) -> Result<T, CliError> {
        let body = serde_json::to_vec(body).map_err(|e| CliError::usage(e.to_string()))?;
        let request = Request::post(path).header("content-type", "application/json");
        self.read(request.body(Full::new(body.into()))).await
    }

    /// How the daemon is.
    pub(crate) async fn health(&self) -> Result<Health, CliError> {
        self.get("/healthz").await
    }

    /// All that jobs need of the daemon's machine.
    pub(crate) async fn doctor(&self) -> Result<Doctor, CliError> {
        self.get("/v1/doctor").await
    }

    /// The same, and whether a real cell keeps its promises.
    pub(crate) async fn attack(&self, request: &AttackRequest) -> Result<Doctor, CliError> {
        let body = serde_json::to_vec(request).map_err(|e| CliError::usage(e.to_string()))?;
        let request = Request::post("/v1/doctor").header("content-type", "application/json");
        let answer = self.send_for(request.body(Full::new(body.into())), ATTACK_MAX + ANSWER_MAX).await?;
        let bytes = self.whole(answer).await?;
        serde_json::from_slice(&bytes).map_err(|e| CliError::Protocol { what: e.to_string() })
    }

    /// Events from number `from` on; with `follow` until the job is done.
    pub(crate) async fn events(&self, id: &JobId, from: u64, follow: bool) -> Result<Events, CliError> {
        let follow = u8::from(follow);
        self.stream(&format!("/v1/jobs/{id}/events?from={from}&follow={follow}")).await
    }

    /// Who the daemon says we are, and what we may do.
    pub(crate) async fn whoami(&self) -> Result<WhoAmI, CliError> {
        self.get("/v1/whoami").await
    }

    /// Records of one job, or of all that we may see; `query` is `key=value` pairs.
    pub(crate) async fn audit(
        &self,
        id: Option<&JobId>,
        query: &[(&str, String)],
    ) -> Result<Events, CliError> {
        let mut path = id.map_or("/v1/audit".to_owned(), |id| format!("/v1/jobs/{id}/audit"));
        for (n, (key, value)) in query.iter().enumerate() {
            path += &format!("{}{key}={}", if n == 0 { '?' } else { '&' }, encode(value));
        }
        self.stream(&path).await
    }

    async fn stream(&self, path: &str) -> Result<Events, CliError> {
        let request = Request::get(path).header("accept", "application/x-ndjson");
        let answer = self.send(request.body(Full::default())).await?;
        if !answer.response.status().is_success() {
            self.whole(answer).await?;
            return Err(CliError::Protocol { what: "neither events nor an error".into() });
        }
        let body = answer.response.into_body();
        Ok(Events { body, buffer: BytesMut::new(), searched: 0, _connection: answer.connection })
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CliError> {
        let request = Request::builder().method(Method::GET).uri(path);
        self.read(request.body(Full::default())).await
    }

    async fn read<T: DeserializeOwned>(
        &self,
        request: hyper::http::Result<Request<Full<Bytes>>>,
    ) -> Result<T, CliError> {
        let answer = self.send(request).await?;
        let bytes = self.whole(answer).await?;
        serde_json::from_slice(&bytes).map_err(|e| CliError::Protocol { what: e.to_string() })
    }

    async fn send(&self, request: hyper::http::Result<Request<Full<Bytes>>>) -> Result<Answer, CliError> {
        self.send_for(request, ANSWER_MAX).await
    }

    async fn send_for(
        &self,
        request: hyper::http::Result<Request<Full<Bytes>>>,
        wait_max: Duration,
    ) -> Result<Answer, CliError> {
        // The parts that come from outside are encoded: what is left cannot be wrong in a header or path.
        let mut request = request.map_err(|e| CliError::usage(format!("cannot be sent: {e}")))?;
        request.headers_mut().insert("host", hyper::header::HeaderValue::from_static("hotcell"));
        let stream = connect(&self.socket).await?;
        let lost = |e: hyper::Error| CliError::ConnectionLost { what: e.to_string() };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(lost)?;
        let connection = AbortOnDropHandle::new(tokio::spawn(async move {
            // The error of a connection reaches whoever waits for its answer or body.
            let _ = connection.with_upgrades().await;
        }));
        match tokio::time::timeout(wait_max, sender.send_request(request)).await {
            Ok(Ok(response)) => Ok(Answer { response, connection }),
            Ok(Err(e)) => Err(lost(e)),
            Err(_) => {
                Err(CliError::ConnectionLost { what: format!("no answer within {} s", wait_max.as_secs()) })
            }
        }
    }

    /// The whole body of an answer; an error where the status is one.
    async fn whole(&self, answer: Answer) -> Result<Bytes, CliError> {
        let status = answer.response.status();
        let body = Limited::new(answer.response.into_body(), BODY_BYTES_MAX);
        let bytes = match tokio::time::timeout(ANSWER_MAX, body.collect()).await {
            Ok(Ok(bytes)) => bytes.to_bytes(),
            Ok(Err(e)) => return Err(CliError::ConnectionLost { what: e.to_string() }),
            Err(_) => return Err(CliError::ConnectionLost { what: "its answer did not end".into() }),
        };
        if status.is_success() {
            return Ok(bytes);
        }
        Err(CliError::Api(Box::new(ApiError::read(status.as_u16(), &bytes))))
    }
}

fn cache_path(query: &[(&str, &str)]) -> String {
    let query: Vec<String> = query.iter().map(|(key, value)| format!("{key}={}", encode(value))).collect();
    format!("/v1/cache?{}", query.join("&"))
}

async fn connect(socket: &Path) -> Result<tokio::net::UnixStream, CliError> {
    let fail = |source| CliError::NoDaemon { socket: socket.to_owned(), source };
    match tokio::time::timeout(CONNECT_MAX, tokio::net::UnixStream::connect(socket)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(e)) => Err(fail(e)),
        Err(_) => Err(fail(std::io::ErrorKind::TimedOut.into())),
    }
}

/// A stream of events.
pub(crate) struct Events {
    body: Incoming,
    buffer: BytesMut,
    /// Bytes of `buffer` known to hold no line feed.
    searched: usize,
    _connection: AbortOnDropHandle<()>,
}

impl Events {
    /// Waits for data and adds the complete lines in it to `lines`; false at the end of the stream.
    /// Can be dropped while waiting without losing anything.
    pub(crate) async fn next(&mut self, lines: &mut Vec<Bytes>) -> Result<bool, CliError> {
        match self.body.frame().await {
            // A last line without its line feed is torn: it comes again after reconnecting.
            None => return Ok(false),
            Some(Err(e)) => return Err(CliError::ConnectionLost { what: e.to_string() }),
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    self.buffer.extend_from_slice(&data);
                }
            }
        }
        while let Some(at) = self.buffer[self.searched..].iter().position(|b| *b == b'\n') {
            let mut line = self.buffer.split_to(self.searched + at + 1).freeze();
            self.searched = 0;
            line.truncate(line.len() - 1);
            // Empty lines keep a quiet connection alive.
            if !line.is_empty() {
                lines.push(line);
            }
        }
        self.searched = self.buffer.len();
        if self.searched > LINE_BYTES_MAX {
            return Err(CliError::Protocol {
                what: format!("an event has more than {LINE_BYTES_MAX} bytes"),
            });
        }
        Ok(true)
    }
}

/// Percent-encodes a query value.
fn encode(text: &str) -> String {
    let mut out = String::new();
    for b in text.bytes() {
        match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(b)),
            _ => out.push_str(&format!("%{b:02X}")),
        }
    }
    out
}
