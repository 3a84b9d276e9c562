//! Package registries and git servers on loopback: files of `target/packages/mirror` as their hosts serve them, with
//! the headers that those hosts send, a record of each request, and a switch for each way in which a host can misbehave.
//! Listens on 127.0.0.1 alone, and writes nothing.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, IF_MODIFIED_SINCE, IF_NONE_MATCH};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};

/// When all files were changed last.
const MODIFIED: &str = "Sat, 01 Jun 2024 00:00:00 GMT";

/// What a host does to requests whose path starts with a prefix.
#[derive(Clone, Debug)]
pub(crate) enum Behaviour {
    /// Answers 401 to who does not send exactly this `Authorization`.
    Wants(String),
    /// This status, and no file.
    Status(u16),
    /// Other bytes than those of the file.
    Instead(Vec<u8>),
    /// Waits this long before each answer.
    Slow(Duration),
    /// Other bytes for who sends a header or a query that a careless host heeds.
    Swayed(Vec<u8>),
    /// Never answers.
    Hang,
}

/// One request as it came in.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) host: String,
    /// With its query.
    pub(crate) path: String,
    pub(crate) status: u16,
    /// Of the body of the answer.
    pub(crate) bytes: usize,
    pub(crate) authorization: Option<String>,
}

/// How a host gets its answers.
#[derive(Clone, Debug)]
enum Source {
    /// From the files of these hosts of the mirror; its own name stands in what they say about themselves.
    Files(Vec<String>),
    /// From `git http-backend`, over the bare repositories in this directory.
    Git(PathBuf),
}

#[derive(Default)]
struct Shared {
    root: PathBuf,
    hosts: Mutex<HashMap<String, Source>>,
    rules: Mutex<Vec<(String, String, Behaviour)>>,
    seen: Mutex<Vec<Seen>>,
}

/// The server; it ends with this value.
pub(crate) struct Registries {
    port: u16,
    shared: Arc<Shared>,
    _runtime: tokio::runtime::Runtime,
}

impl Registries {
    /// Serves every host of `root`, the directory `mirror` that `.ci/packages` makes.
    pub(crate) fn new(root: &Path) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let shared = Arc::new(Shared { root: root.to_owned(), ..Shared::default() });
        for host in
            std::fs::read_dir(root).unwrap_or_else(|e| panic!("{}: {e}: run `make packages`", root.display()))
        {
            let host = host.unwrap().file_name().into_string().unwrap();
            shared.hosts.lock().unwrap().insert(host.clone(), Source::Files(vec![host]));
        }
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let port = listener.local_addr().unwrap().port();
        let of_task = shared.clone();
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(connection(of_task.clone(), stream));
            }
        });
        Self { port, shared, _runtime: runtime }
    }

    /// Where `host` is served.
    pub(crate) fn url(&self, host: &str) -> String {
        format!("http://127.0.0.1:{}/{host}", self.port)
    }

    /// `[network.mirrors]` of a daemon: each host is here.
    pub(crate) fn mirrors(&self) -> String {
        let mut hosts: Vec<String> = self.shared.hosts.lock().unwrap().keys().cloned().collect();
        hosts.sort();
        let lines = hosts.iter().map(|host| format!("{host:?} = {:?}\n", self.url(host)));
        format!("[network.mirrors]\n{}", lines.collect::<String>())
    }

    /// Another host with the files of `hosts`: a private registry.
    pub(crate) fn add_files(&self, host: &str, hosts: &[&str]) {
        let source = Source::Files(hosts.iter().map(|&h| h.to_owned()).collect());
        self.shared.hosts.lock().unwrap().insert(host.to_owned(), source);
    }

    /// A host with the bare git repositories in `dir`, to be cloned over smart HTTP.
    pub(crate) fn add_git(&self, host: &str, dir: &Path) {
        self.shared.hosts.lock().unwrap().insert(host.to_owned(), Source::Git(dir.to_owned()));
    }

    /// From now on; the last word about a path holds, but `Wants` and `Slow` hold beside others.
    pub(crate) fn set(&self, host: &str, prefix: &str, behaviour: Behaviour) {
        self.shared.rules.lock().unwrap().push((host.to_owned(), prefix.to_owned(), behaviour));
    }

    /// All hosts behave.
    pub(crate) fn behave(&self) {
        self.shared.rules.lock().unwrap().clear();
    }

    /// The requests since the last call, in the order of their answers.
    pub(crate) fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.shared.seen.lock().unwrap())
    }
}

async fn connection(shared: Arc<Shared>, stream: TcpStream) {
    let service = service_fn(|request: Request<Incoming>| {
        let shared = shared.clone();
        async move { Ok::<_, std::convert::Infallible>(answer(&shared, request).await) }
    });
    // What a client breaks off is the client's business.
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

fn header(request: &Request<Incoming>, name: &hyper::header::HeaderName) -> Option<String> {
    request.headers().get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
}

async fn answer(shared: &Shared, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let whole = request.uri().path_and_query().map(|p| p.as_str().to_owned()).unwrap_or_default();
    let (host, path) = whole[1..].split_once('/').unwrap_or((&whole[1..], ""));
    let path = format!("/{path}");
    let (method, authorization) = (request.method().to_string(), header(&request, &AUTHORIZATION));
    let response = decide(shared, host, &path, request).await;
    let bytes = hyper::body::Body::size_hint(response.body()).exact().unwrap_or_default();
    shared.seen.lock().unwrap().push(Seen {
        method,
        host: host.to_owned(),
        path,
        status: response.status().as_u16(),
        bytes: usize::try_from(bytes).unwrap(),
        authorization,
    });
    response
}

async fn decide(
    shared: &Shared,
    host: &str,
    path: &str,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    let rules: Vec<Behaviour> = {
        let rules = shared.rules.lock().unwrap();
        let apply = rules.iter().filter(|(of, prefix, _)| of == host && path.starts_with(prefix.as_str()));
        apply.map(|(_, _, behaviour)| behaviour.clone()).collect()
    };
    let mut last = None;
    for rule in rules {
        match rule {
            Behaviour::Wants(token) => {
                if header(&request, &AUTHORIZATION).as_ref() != Some(&token) {
                    let build = Response::builder().status(401);
                    return build
                        .header("www-authenticate", "Basic realm=\"private\"")
                        .body(Full::default())
                        .unwrap();
                }
            }
            Behaviour::Slow(time) => tokio::time::sleep(time).await,
            Behaviour::Hang => std::future::pending().await,
            Behaviour::Swayed(_) if !is_swayed(&request) => {}
            other => last = Some(other),
        }
    }
    match last {
        Some(Behaviour::Status(status)) => {
            return Response::builder().status(status).body(Full::default()).unwrap();
        }
        Some(Behaviour::Instead(bytes) | Behaviour::Swayed(bytes)) => {
            return file(host, path, &request, "application/octet-stream", bytes);
        }
        _ => {}
    }
    let source = shared.hosts.lock().unwrap().get(host).cloned();
    match source {
        Some(Source::Files(hosts)) => {
            for of in &hosts {
                if let Some((kind, bytes)) = read(&shared.root.join(of), of, host, path) {
                    return file(host, path, &request, kind, bytes);
                }
            }
            Response::builder().status(404).body(Full::default()).unwrap()
        }
        Some(Source::Git(dir)) => git(&dir, path, request).await,
        None => Response::builder().status(421).body(Full::default()).unwrap(),
    }
}

/// Whether a request has what no package manager sends to a public registry.
fn is_swayed(request: &Request<Incoming>) -> bool {
    let headers = request.headers();
    let odd = ["authorization", "cookie", "forwarded", "range", "x-forwarded-host", "x-original-url"];
    let accept = headers.get("accept").is_some_and(|value| value.as_bytes().ends_with(b"evil"));
    let query = request.uri().query().is_some_and(|query| query.contains("evil"));
    let named = headers.get("host").is_some_and(|host| !host.as_bytes().starts_with(b"127.0.0.1:"));
    accept
        || query
        || named
        || odd.iter().chain(&["x-http-method-override"]).any(|name| headers.contains_key(*name))
}

/// The bytes at a path of a host's files, and what kind they are.
fn read(root: &Path, of: &str, host: &str, path: &str) -> Option<(&'static str, Vec<u8>)> {
    let path = path.split('?').next().unwrap_or_default();
    // The one escape that package managers use: npm's for names with a scope.
    let path = path.replace("%2f", "/").replace("%2F", "/").replace("%40", "@");
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    if parts.iter().any(|part| part.starts_with('.')) {
        return None;
    }
    let at = parts.iter().fold(root.to_owned(), |at, part| at.join(part));
    if let Ok(bytes) = std::fs::read(&at) {
        return Some(("application/octet-stream", bytes));
    }
    [(".index.json", "application/json"), (".index.html", "text/html")].into_iter().find_map(
        |(name, kind)| {
            let text = std::fs::read_to_string(at.join(name)).ok()?;
            // A private registry names itself, and has the files beside the index.
            let text = if of == host {
                text
            } else {
                ["registry.npmjs.org", "files.pythonhosted.org"].iter().fold(text, |text, public| {
                    text.replace(&format!("https://{public}/"), &format!("https://{host}/"))
                })
            };
            Some((kind, text.into_bytes()))
        },
    )
}

/// What the public hosts say about how long an answer holds; Maven's says nothing.
fn cache_control(host: &str, path: &str) -> Option<&'static str> {
    let (day, minutes) = ("public, immutable, max-age=31557600", "public, max-age=300");
    let never_changes = match host {
        "registry.npmjs.org" => path.contains("/-/"),
        "pypi.org" | "index.crates.io" => false,
        "files.pythonhosted.org" | "static.crates.io" => true,
        "proxy.golang.org" => !path.ends_with("/list") && !path.ends_with("/@latest"),
        "deb.debian.org" => path.contains("/pool/"),
        _ => return None,
    };
    Some(if never_changes { day } else { minutes })
}

fn file(
    host: &str,
    path: &str,
    request: &Request<Incoming>,
    kind: &str,
    bytes: Vec<u8>,
) -> Response<Full<Bytes>> {
    let digest = Sha256::digest(&bytes);
    let tag = format!("\"{}\"", digest.iter().take(16).map(|b| format!("{b:02x}")).collect::<String>());
    let mut build = Response::builder().header("etag", &tag).header("last-modified", MODIFIED);
    if let Some(holds) = cache_control(host, path) {
        build = build.header("cache-control", holds);
    }
    let same = match header(request, &IF_NONE_MATCH) {
        Some(tags) => tags.contains(&tag),
        None => header(request, &IF_MODIFIED_SINCE).is_some_and(|since| since == MODIFIED),
    };
    if same {
        return build.status(304).body(Full::default()).unwrap();
    }
    build.header("content-type", kind).body(Full::from(bytes)).unwrap()
}

/// One request by git's own CGI program.
async fn git(dir: &Path, path: &str, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let (path, query) = path.split_once('?').unwrap_or((path, ""));
    let mut command = tokio::process::Command::new("git");
    command
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", dir)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        // The test's repositories may belong to another user.
        .envs([
            ("GIT_CONFIG_COUNT", "1"),
            ("GIT_CONFIG_KEY_0", "safe.directory"),
            ("GIT_CONFIG_VALUE_0", "*"),
        ])
        .envs([("PATH_INFO", path), ("QUERY_STRING", query), ("REQUEST_METHOD", request.method().as_str())])
        .env("CONTENT_TYPE", header(&request, &CONTENT_TYPE).unwrap_or_default())
        .env("HTTP_CONTENT_ENCODING", header(&request, &CONTENT_ENCODING).unwrap_or_default());
    let version =
        request.headers().get("git-protocol").map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
    command.env("GIT_PROTOCOL", version.unwrap_or_default());
    let body =
        request.into_body().collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("git");
    let mut stdin = child.stdin.take().unwrap();
    let feed = tokio::spawn(async move {
        // It may answer without reading all.
        let _ = stdin.write_all(&body).await;
    });
    let output = child.wait_with_output().await.unwrap().stdout;
    feed.await.unwrap();
    let end = output.windows(4).position(|w| w == b"\r\n\r\n").expect("the head of an answer");
    let mut build = Response::builder();
    for line in String::from_utf8_lossy(&output[..end]).lines() {
        let (name, value) = line.split_once(": ").expect("a header");
        build = if name.eq_ignore_ascii_case("status") {
            build.status(value[..3].parse::<u16>().unwrap())
        } else {
            build.header(name, value)
        };
    }
    build.body(Full::from(output[end + 4..].to_vec())).unwrap()
}
