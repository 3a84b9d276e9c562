//! The way out against a fake internet: a resolver and a dialer that lead every public address to servers on
//! loopback and remember what was asked of them. Nothing else is ever dialled.

mod git;
mod packages;
mod smuggling;
mod sums;

use hyper::header::HeaderValue;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::route::{Later, Stream};
use super::*;
use crate::gateway::secret::{Secret, Secrets};
use crate::job::{CellId, JobId, JobSpec};
use crate::policy::{Defaults, Plan, Policy, narrow};

type Mirrors = std::collections::BTreeMap<String, Mirror>;

const PUBLIC: &str = "93.184.215.14";
const TOKEN: &str = "canary-token-91c1";

/// What a server on loopback saw.
#[derive(Debug, Clone)]
struct Seen {
    head: String,
    host: String,
    authorization: Vec<String>,
    names: Vec<String>,
    body: Vec<u8>,
}

#[derive(Default)]
struct World {
    names: Mutex<HashMap<String, Vec<Vec<IpAddr>>>>,
    lookups: AtomicUsize,
    dialled: Mutex<Vec<SocketAddr>>,
    /// Port → where it really is.
    servers: Mutex<HashMap<u16, SocketAddr>>,
    seen: Mutex<Vec<Seen>>,
    /// A bare repository, served as files to whoever has the token.
    repository: Mutex<Option<std::path::PathBuf>>,
}

struct Fake(Arc<World>);

impl Resolve for Fake {
    fn resolve<'a>(&'a self, name: &'a str) -> Later<'a, io::Result<Vec<IpAddr>>> {
        Box::pin(async move {
            self.0.lookups.fetch_add(1, Ordering::SeqCst);
            let mut names = self.0.names.lock().unwrap();
            let answers = names.get_mut(name).ok_or(io::ErrorKind::NotFound)?;
            Ok(if answers.len() > 1 { answers.remove(0) } else { answers[0].clone() })
        })
    }
}

impl Dial for Fake {
    fn dial(&self, to: SocketAddr) -> Later<'_, io::Result<Box<dyn Stream>>> {
        Box::pin(async move {
            self.0.dialled.lock().unwrap().push(to);
            let at = self.0.servers.lock().unwrap().get(&to.port()).copied();
            let stream = TcpStream::connect(at.ok_or(io::ErrorKind::ConnectionRefused)?).await?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }
}

struct OneCredential;

impl Credentials for OneCredential {
    fn header<'a>(&'a self, name: &'a str, _: &'a Permit) -> Later<'a, Result<Injected, String>> {
        Box::pin(async move {
            let text = match name {
                "known" => format!("Bearer {TOKEN}"),
                "git" => git::BASIC.to_owned(),
                _ => return Err("is not defined".to_owned()),
            };
            let value = HeaderValue::try_from(text).unwrap();
            let name = hyper::header::AUTHORIZATION;
            Ok(Injected { name, value, secrets: Secrets::of([&Secret::new(TOKEN.to_owned())]) })
        })
    }

    fn whose(&self, _: &str) -> Option<u32> {
        None
    }
}

/// A cell's way out, with the internet that it leads to.
struct Cell {
    world: Arc<World>,
    door: Door,
    ca: Arc<CellCa>,
    dir: tempfile::TempDir,
    tasks: JoinSet<()>,
    internet: Arc<rcgen::CertifiedIssuer<'static, rcgen::KeyPair>>,
    spec: EgressSpec,
}

impl Cell {
    async fn new(egress: &str) -> Self {
        Self::with(egress, EgressLimits::default(), None).await
    }

    async fn with(rules: &str, limits: EgressLimits, proxy: Option<CorporateProxy>) -> Self {
        Self::made(rules, limits, proxy, Mirrors::new(), |egress| egress).await
    }

    async fn made(
        rules: &str,
        limits: EgressLimits,
        proxy: Option<CorporateProxy>,
        mirrors: Mirrors,
        finish: impl FnOnce(Egress) -> Egress,
    ) -> Self {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let internet = Arc::new(rcgen::CertifiedIssuer::self_signed(params, key).unwrap());
        let world = Arc::new(World::default());
        let network = Network {
            resolver: Arc::new(Fake(world.clone())),
            dialer: Arc::new(Fake(world.clone())),
            proxy,
            mirrors,
        };
        let egress = finish(Egress::new(network, limits, Some(&internet.pem())).unwrap());
        let ca = Arc::new(CellCa::generate().unwrap());
        let dir = tempfile::tempdir().unwrap();
        let spec = EgressSpec {
            egress: Arc::new(egress),
            job: JobId::new(1, 1),
            ca: Some(ca.clone()),
            credentials: Arc::new(OneCredential),
            tally: Arc::new(Tally::open(&dir.path().join("sums")).unwrap()),
        };
        let listener = UnixListener::bind(dir.path().join(SOCKET)).unwrap();
        let door = Door::open(listener, spec.clone(), plan(rules), CellId::new(1));
        Self { world, door, ca, dir, tasks: JoinSet::new(), internet, spec }
    }

    fn name(&self, name: &str, answers: &[&[&str]]) {
        let answers = answers.iter().map(|a| a.iter().map(|ip| ip.parse().unwrap()).collect()).collect();
        self.world.names.lock().unwrap().insert(name.to_owned(), answers);
    }

    /// A server of plain HTTP behind a port.
    async fn http(&mut self, port: u16) {
        let (listener, world) = (self.listener(port).await, self.world.clone());
        self.tasks.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(world.clone(), stream));
            }
        });
    }

    /// A server of HTTPS behind a port, with a certificate for these names.
    async fn https(&mut self, port: u16, names: &[&str]) {
        let acceptor = self.acceptor(names);
        let (listener, world) = (self.listener(port).await, self.world.clone());
        self.tasks.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (world, acceptor) = (world.clone(), acceptor.clone());
                tokio::spawn(async move {
                    if let Ok(stream) = acceptor.accept(stream).await {
                        serve(world, stream).await;
                    }
                });
            }
        });
    }

    /// TLS as one of the internet's hosts, with a certificate for these names.
    fn acceptor(&self, names: &[&str]) -> TlsAcceptor {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(names).unwrap();
        let certificate = params.signed_by(&key, &*self.internet).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }

    /// The same cell as another job.
    async fn job(&mut self, job: JobId) {
        let path = self.dir.path().join("other.sock");
        let (listener, plan) = (UnixListener::bind(&path).unwrap(), self.door.plan());
        let spec = EgressSpec { job, ..self.spec.clone() };
        let door = Door::open(listener, spec, plan, CellId::new(3));
        std::mem::replace(&mut self.door, door).destroy().await;
        std::fs::rename(path, self.dir.path().join(SOCKET)).unwrap();
    }

    async fn listener(&self, port: u16) -> TcpListener {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.world.servers.lock().unwrap().insert(port, listener.local_addr().unwrap());
        listener
    }

    async fn dial(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join(SOCKET)).await.unwrap()
    }

    /// Writes, and reads all that comes back until the connection ends.
    async fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.dial().await;
        stream.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        let _ = tokio::time::timeout(Duration::from_secs(10), read).await.expect("the connection ends");
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// CONNECT; the status, and the stream where it is 200.
    async fn connect(&self, target: &str) -> (u16, String, UnixStream) {
        let mut stream = self.dial().await;
        let ask = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n");
        stream.write_all(ask.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.expect("an answer to CONNECT"));
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        (head[9..12].parse().unwrap(), head, stream)
    }

    /// TLS through CONNECT: to the cell's own authority where that is trusted, else to the internet's.
    async fn tls(&self, target: &str, name: &str, own: bool) -> io::Result<impl Stream + use<>> {
        let (status, head, stream) = self.connect(target).await;
        assert_eq!(status, 200, "{head}");
        let pem = if own { self.ca.certificate_pem().to_owned() } else { self.internet.pem() };
        let mut roots = rustls::RootCertStore::empty();
        roots.add(further_roots(&pem).unwrap().remove(0)).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        TlsConnector::from(Arc::new(config))
            .connect(ServerName::try_from(name.to_owned()).unwrap(), stream)
            .await
    }

    /// One request through an inspected connection; the answer as it came.
    async fn inspected(&self, host: &str, request: &str) -> String {
        let mut stream =
            self.tls(&format!("{host}:443"), host, true).await.expect("TLS with the cell's authority");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        let _ = tokio::time::timeout(Duration::from_secs(10), read).await.expect("the connection ends");
        String::from_utf8_lossy(&answer).into_owned()
    }

    fn seen(&self) -> Vec<Seen> {
        self.world.seen.lock().unwrap().clone()
    }

    fn dialled(&self) -> usize {
        self.world.dialled.lock().unwrap().len()
    }

    async fn event(&mut self) -> EgressRecord {
        tokio::time::timeout(Duration::from_secs(10), self.door.next_event()).await.expect("an event")
    }

    async fn end(self) {
        self.door.destroy().await;
    }
}

fn plan(rules: &str) -> Arc<Plan> {
    let text = format!("{}\n{rules}", include_str!("../../../policies/default.toml"));
    let policy = Policy::parse("test", &text).unwrap();
    let spec = JobSpec::parse(br#"{"prompt":"x"}"#).unwrap();
    let defaults = Defaults {
        model: "claude-sonnet-4-6".into(),
        image: "hotcell/cell".into(),
        provider: "anthropic".into(),
    };
    Arc::new(narrow(&spec, &policy, None, &defaults).unwrap())
}

async fn serve(world: Arc<World>, stream: impl AsyncRead + AsyncWrite + Unpin) {
    let service = service_fn(|request: Request<Incoming>| {
        let world = world.clone();
        async move { Ok::<_, hyper::Error>(server(&world, request).await) }
    });
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

async fn server(world: &World, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let texts = |name: &str| -> Vec<String> {
        let all = request.headers().get_all(name).iter();
        all.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).collect()
    };
    let mut seen = Seen {
        head: format!("{} {}", request.method(), request.uri()),
        host: texts("host").join("+"),
        authorization: texts("authorization"),
        names: request.headers().keys().map(ToString::to_string).collect(),
        body: Vec::new(),
    };
    let path = request.uri().path().to_owned();
    let authorization = seen.authorization.join(",");
    seen.body = request.into_body().collect().await.map(|body| body.to_bytes().to_vec()).unwrap_or_default();
    world.seen.lock().unwrap().push(seen);
    let build = Response::builder();
    if let Some(file) = path.strip_prefix("/repo.git/") {
        return git::file(world, file, &authorization);
    }
    match path.as_str() {
        "/redirect" => build.status(302).header("location", "http://169.254.169.254/").body(Full::default()),
        "/echo" => build
            .header("x-echo", &authorization)
            .header("x-fine", "yes")
            .header("connection", "x-hop")
            .header("x-hop", "1")
            .body(Full::from(format!("you sent {authorization}!"))),
        "/big" => build.body(Full::from(vec![b'x'; 64 << 10])),
        _ => build.body(Full::from("hello")),
    }
    .unwrap()
}

fn rule(name: &str, more: &str) -> String {
    format!("[[egress.host]]\nname = {name:?}\n{more}\n")
}

#[tokio::test]
async fn what_no_rule_names_is_refused_and_nobody_is_asked_about_it() {
    let mut cell = Cell::new(&rule("ok.example", "ports = [80, 443]")).await;
    cell.name("other.example", &[&[PUBLIC]]);
    let (status, head, _) = cell.connect("other.example:443").await;
    assert_eq!(status, 403);
    assert!(head.contains("x-hotcell-reason: other.example:443 is not among"), "{head}");
    assert!(
        cell.raw(b"GET http://other.example/ HTTP/1.1\r\nHost: other.example\r\n\r\n").await.contains("403")
    );
    let (status, _, _) = cell.connect("ok.example:22").await;
    assert_eq!(status, 403);
    assert_eq!((cell.world.lookups.load(Ordering::SeqCst), cell.dialled()), (0, 0));
    let event = cell.event().await;
    assert_eq!((event.host.as_str(), event.port, event.allowed), ("other.example", 443, false));
    assert_eq!(event.rule, "egress");
    let event = cell.event().await;
    assert_eq!((event.method.as_deref(), event.path.as_deref()), (Some("GET"), Some("/")));
    cell.end().await;
}

#[tokio::test]
async fn every_class_of_inner_address_is_refused_in_every_form() {
    let rules = rule("trap.example", "ports = [80, 443]");
    let literals = address::tests::REFUSED;
    let shown = |text: &&str| if text.contains(':') { format!("[{text}]") } else { (*text).to_owned() };
    let listed: String = literals.iter().map(|t| rule(&shown(t), "ports = [80, 443]")).collect();
    let mut cell = Cell::new(&format!("{rules}{listed}")).await;
    for text in literals {
        cell.name("trap.example", &[&[text]]);
        for host in ["trap.example".to_owned(), shown(&text)] {
            let (status, head, _) = cell.connect(&format!("{host}:443")).await;
            assert_eq!(status, 403, "{text}: {head}");
            let answer = cell.raw(format!("GET http://{host}/ HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await;
            assert!(answer.starts_with("HTTP/1.1 403"), "{text}: {answer}");
            for _ in 0..2 {
                let event = cell.event().await;
                assert_eq!((event.rule.as_str(), event.allowed), ("egress.addresses", false), "{event:?}");
            }
        }
    }
    // One bad address among good ones, and an address of this very host.
    cell.name("trap.example", &[&[PUBLIC, "10.0.0.1"]]);
    assert_eq!(cell.connect("trap.example:443").await.0, 403);
    assert_eq!(cell.dialled(), 0, "nothing was dialled");
    cell.end().await;
}

#[tokio::test]
async fn odd_spellings_of_addresses_are_no_hosts() {
    let cell = Cell::new(&format!(
        "{}{}",
        "[egress]\neverything = \"yes, any host\"\n",
        rule("*", "ports = [80, 443]")
    ))
    .await;
    for host in [
        "127.1",
        "0x7f.0.0.1",
        "0x7f000001",
        "2130706433",
        "0177.0.0.1",
        "127.0.0.1.",
        "[::ffff:127.0.0.1]",
        "[::1%25lo]",
    ] {
        let answer =
            cell.raw(format!("CONNECT {host}:443 HTTP/1.1\r\nHost: {host}:443\r\n\r\n").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 40"), "{host}: {answer}");
        let answer =
            cell.raw(format!("GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 40"), "{host}: {answer}");
    }
    for target in [
        "a.example\0:443",
        "u@a.example:443",
        "a.example",
        "a.example:0",
        "a.example:https",
        "a.example:443/x",
        "/",
    ] {
        let answer = cell.raw(format!("CONNECT {target} HTTP/1.1\r\n\r\n").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{target:?}: {answer}");
    }
    assert_eq!(cell.world.lookups.load(Ordering::SeqCst) + cell.dialled(), 0);
    cell.end().await;
}

#[tokio::test]
async fn a_name_is_looked_up_once_and_the_checked_address_is_dialled() {
    let mut cell =
        Cell::new(&format!("{}{}", rule("flip.example", ""), rule("seen.example", "inspect = true"))).await;
    cell.https(443, &["flip.example", "seen.example"]).await;
    for name in ["flip.example", "seen.example"] {
        cell.name(name, &[&[PUBLIC], &["127.0.0.1"]]);
    }
    cell.tls("flip.example:443", "flip.example", false).await.expect("TLS passes through");
    assert_eq!(cell.world.lookups.load(Ordering::SeqCst), 1);
    let request = "GET / HTTP/1.1\r\nHost: seen.example\r\n\r\n";
    let twice = format!("{request}{}", request.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n"));
    assert_eq!(cell.inspected("seen.example", &twice).await.matches("hello").count(), 2);
    assert_eq!(cell.world.lookups.load(Ordering::SeqCst), 2, "one look-up for both requests");
    let expected: SocketAddr = format!("{PUBLIC}:443").parse().unwrap();
    assert_eq!(*cell.world.dialled.lock().unwrap(), [expected, expected]);
    assert_eq!(cell.connect("flip.example:443").await.0, 403, "the next look-up gives an inner address");
    cell.end().await;
}

#[tokio::test]
async fn the_name_in_tls_must_be_the_one_of_connect() {
    let names = ["a.example", "b.example", "c.example"];
    let rules: String =
        names.iter().map(|n| rule(n, if *n == "c.example" { "inspect = true" } else { "" })).collect();
    let mut cell = Cell::new(&rules).await;
    cell.https(443, &names).await;
    for asked in names {
        cell.name(asked, &[&[PUBLIC]]);
        for named in names {
            let own = asked == "c.example";
            let done = cell.tls(&format!("{asked}:443"), named, own).await;
            assert_eq!(done.is_ok(), asked == named, "CONNECT {asked}, ClientHello {named}");
            drop(done);
            if asked != named {
                let event = loop {
                    let event = cell.event().await;
                    if !event.allowed {
                        break event;
                    }
                };
                assert_eq!(
                    (event.rule.as_str(), event.host.as_str(), event.bytes_up),
                    ("egress.tls", asked, 0)
                );
            }
        }
    }
    // Not TLS at all, and TLS without a name.
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"SSH-2.0-OpenSSH\r\n", &hello::tests::real("9.9.9.9")] {
        let (status, _, mut stream) = cell.connect("a.example:443").await;
        assert_eq!(status, 200);
        stream.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, [21, 3, 3, 0, 2, 2, 112], "an alert, and nothing of the host");
    }
    assert_eq!(cell.seen().len(), 0);
    cell.end().await;
}

#[tokio::test]
async fn an_inspected_request_is_judged_by_method_and_path_and_gets_the_credential() {
    let rules = rule(
        "api.example",
        "inspect = true\nmethods = [\"GET\"]\npaths = [\"/echo\", \"/pub/**\"]\ncredential = \"known\"",
    );
    let mut cell = Cell::new(&rules).await;
    cell.https(443, &["api.example"]).await;
    cell.name("api.example", &[&[PUBLIC]]);
    let request = "GET /echo?q=1 HTTP/1.1\r\nHost: api.example\r\nAuthorization: Bearer forged\r\n\
         authorization: Basic forged\r\nAccept-Encoding: gzip\r\nProxy-Authorization: x\r\nConnection: close, x-mine\r\nX-Mine: 1\r\nX-Kept: 1\r\n\r\n";
    let answer = cell.inspected("api.example", request).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(!answer.contains(TOKEN), "the credential never comes back: {answer}");
    assert!(answer.contains("you sent Bearer *****"), "{answer}");
    assert!(!answer.contains("x-echo") && answer.contains("x-fine") && !answer.contains("x-hop"), "{answer}");
    let seen = cell.seen();
    assert_eq!(seen.len(), 1);
    assert_eq!((seen[0].head.as_str(), seen[0].host.as_str()), ("GET /echo?q=1", "api.example"));
    assert_eq!(seen[0].authorization, [format!("Bearer {TOKEN}")], "last and once");
    assert!(seen[0].names.contains(&"x-kept".to_owned()), "{:?}", seen[0].names);
    for gone in ["x-mine", "proxy-authorization", "connection", "accept-encoding"] {
        assert!(!seen[0].names.contains(&gone.to_owned()), "{gone}");
    }
    let event = cell.event().await;
    assert_eq!(
        (event.host.as_str(), event.path.as_deref(), event.allowed),
        ("api.example", Some("/echo"), true)
    );
    assert_eq!(
        (event.credential.as_deref(), event.rule.as_str()),
        (Some("known"), "egress.host[0] api.example")
    );
    assert!(event.bytes_up > 100 && event.bytes_down > 100, "{event:?}");
    for (method, path, status) in [
        ("POST", "/echo", 403),
        ("get", "/echo", 403),
        ("GET", "/secret", 403),
        ("GET", "/pub/../secret", 400),
        ("GET", "/pub/..;/secret", 400),
        ("GET", "/pub/%2e%2e/secret", 400),
        ("GET", "/pub/%2e%2e%2fsecret", 400),
        ("GET", "/pub//secret", 400),
        ("GET", "/pub/..%5csecret", 400),
        ("GET", "https://evil.example/echo", 400),
    ] {
        let request = format!("{method} {path} HTTP/1.1\r\nHost: api.example\r\n\r\n");
        let answer = cell.inspected("api.example", &request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{method} {path}: {answer}");
    }
    for host in ["evil.example", "api.example:8443", "api.example\r\nHost: evil.example"] {
        let answer =
            cell.inspected("api.example", &format!("GET /echo HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 4"), "{host}: {answer}");
    }
    assert_eq!(cell.seen().len(), 1, "nothing of these reached the host");
    cell.end().await;
}

#[tokio::test]
async fn what_comes_back_is_passed_on_and_nothing_is_followed() {
    let rules = format!(
        "{}{}",
        rule("plain.example", "ports = [80]"),
        rule("x.example", "inspect = true\ncredential = \"unknown\"")
    );
    let mut cell = Cell::new(&rules).await;
    cell.http(80).await;
    cell.name("plain.example", &[&[PUBLIC]]);
    cell.name("x.example", &[&[PUBLIC]]);
    let ask = |path: &str, more: &str| {
        format!("GET http://plain.example{path} HTTP/1.1\r\nHost: other\r\n{more}Connection: close\r\n\r\n")
    };
    let answer = cell.raw(ask("/redirect", "").as_bytes()).await;
    assert!(
        answer.starts_with("HTTP/1.1 302") && answer.contains("location: http://169.254.169.254/"),
        "{answer}"
    );
    assert_eq!(cell.dialled(), 1, "the redirect was not followed");
    assert_eq!(cell.seen()[0].host, "plain.example", "the Host header is the URL's");
    let answer = cell.raw(ask("/", "Upgrade: websocket\r\n").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    let answer = cell.inspected("x.example", "GET / HTTP/1.1\r\nHost: x.example\r\n\r\n").await;
    assert!(
        answer.starts_with("HTTP/1.1 502") && answer.contains("credential unknown: is not defined"),
        "{answer}"
    );
    for other in
        ["GET https://plain.example/ HTTP/1.1", "GET / HTTP/1.1", "GET ftp://plain.example/ HTTP/1.1"]
    {
        assert!(
            cell.raw(format!("{other}\r\nHost: plain.example\r\n\r\n").as_bytes())
                .await
                .starts_with("HTTP/1.1 400")
        );
    }
    assert_eq!(cell.seen().len(), 1);
    cell.end().await;
}

#[tokio::test]
async fn bytes_and_connections_have_limits() {
    let rules = format!(
        "{}{}{}",
        rule("down.example", "ports = [80]\nbytes_down_max = 20000"),
        rule("up.example", "ports = [80]\nbytes_up_max = 20000"),
        rule("few.example", "connections_max = 1")
    );
    let mut cell = Cell::new(&rules).await;
    cell.http(80).await;
    cell.https(443, &["few.example"]).await;
    for name in ["down.example", "up.example", "few.example"] {
        cell.name(name, &[&[PUBLIC]]);
    }
    let answer =
        cell.raw(b"GET http://down.example/big HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
    assert!(answer.len() < 100_000 && !answer.ends_with(&"x".repeat(60_000)), "{}", answer.len());
    let event = cell.event().await;
    assert_eq!(event.reason.as_deref(), Some("bytes_down_max is reached"));
    let answer = cell.raw(b"GET http://down.example/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("bytes_down_max"), "{answer}");
    assert!(!cell.event().await.allowed);

    let body = "y".repeat(40_000);
    let request =
        format!("POST http://up.example/ HTTP/1.1\r\nHost: x\r\nContent-Length: 40000\r\n\r\n{body}");
    let answer = cell.raw(request.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("bytes_up_max"), "{answer}");
    let event = cell.event().await;
    assert!(event.rule.ends_with("bytes_up_max"), "{event:?}");
    assert!(cell.seen().iter().all(|seen| seen.body.len() <= 20_000), "no more than allowed left the cell");

    let held = cell.tls("few.example:443", "few.example", false).await.unwrap();
    assert_eq!(cell.connect("few.example:443").await.0, 429);
    assert!(!cell.event().await.allowed);
    drop(held);
    let event = cell.event().await;
    assert!(event.allowed && event.bytes_up > 0 && event.bytes_down > 0, "{event:?}");
    cell.tls("few.example:443", "few.example", false).await.expect("the place is free again");
    cell.end().await;
}

#[tokio::test]
async fn silence_ends_a_tunnel_and_a_stop_ends_all() {
    let limits = EgressLimits {
        idle: Duration::from_millis(100),
        head_wait: Duration::from_millis(200),
        ..EgressLimits::default()
    };
    let mut cell = Cell::with(&rule("a.example", ""), limits, None).await;
    cell.https(443, &["a.example"]).await;
    cell.name("a.example", &[&[PUBLIC]]);
    let mut stream = cell.tls("a.example:443", "a.example", false).await.unwrap();
    assert!(stream.read_u8().await.is_err(), "the tunnel ends");
    assert!(cell.event().await.reason.is_some_and(|reason| reason.contains("nothing moved")));
    let (_, _, mut silent) = cell.connect("a.example:443").await;
    let mut rest = Vec::new();
    silent.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest.len(), 7, "an alert after no ClientHello came");
    assert_eq!(cell.event().await.rule, "egress.tls");
    assert_eq!(cell.raw(b"GET http://a").await, "", "half a head is not waited for");
    cell.end().await;

    let mut cell = Cell::new(&rule("a.example", "")).await;
    cell.https(443, &["a.example"]).await;
    cell.name("a.example", &[&[PUBLIC]]);
    let mut stream = cell.tls("a.example:443", "a.example", false).await.unwrap();
    cell.door.revoke();
    assert!(stream.read_u8().await.is_err());
    let socket = cell.dir.path().join(SOCKET);
    let events = cell.door.destroy().await;
    assert!(UnixStream::connect(socket).await.is_err(), "nobody listens");
    assert_eq!(events.len(), 1, "{events:?}");
}

#[tokio::test]
async fn a_host_that_is_not_who_it_says_is_not_talked_to() {
    let mut cell = Cell::new(&rule("a.example", "inspect = true\ncredential = \"known\"")).await;
    cell.https(443, &["evil.example"]).await;
    cell.name("a.example", &[&[PUBLIC]]);
    let answer = cell.inspected("a.example", "GET / HTTP/1.1\r\nHost: a.example\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 502") && answer.contains("TLS with the host"), "{answer}");
    assert_eq!(cell.seen().len(), 0);
    let event = cell.event().await;
    assert!(event.allowed && event.reason.is_some(), "{event:?}");
    cell.end().await;
}

#[tokio::test]
async fn a_flood_of_refusals_is_bounded() {
    let cell = Cell::new("").await;
    for _ in 0..400 {
        assert_eq!(cell.connect("a.example:443").await.0, 403);
    }
    let events = cell.door.destroy().await;
    assert!(events.len() <= 256 && events.len() >= 100, "{}", events.len());
}

#[tokio::test]
async fn behind_a_corporate_proxy_names_go_to_it_and_refusals_stay_here() {
    let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = proxy.local_addr().unwrap().port();
    let corporate = CorporateProxy { host: "127.0.0.1".into(), port, except: vec!["in.example".into()] };
    let rules: String = ["a.example", "no.example", "in.example", "10.1.1.1"]
        .iter()
        .map(|name| rule(name, "inspect = true"))
        .collect();
    let mut cell = Cell::with(&rules, EgressLimits::default(), Some(corporate)).await;
    cell.https(443, &["a.example"]).await;
    cell.name("in.example", &[&["10.0.0.1"]]);
    let behind = cell.world.servers.lock().unwrap()[&443];
    let asked = Arc::new(Mutex::new(Vec::new()));
    let remember = asked.clone();
    cell.tasks.spawn(async move {
        while let Ok((mut stream, _)) = proxy.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            let line = String::from_utf8_lossy(&head).lines().next().unwrap().to_owned();
            remember.lock().unwrap().push(line.clone());
            if line.contains("no.example") {
                stream.write_all(b"HTTP/1.1 407 No\r\n\r\n").await.unwrap();
                continue;
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\nX: y\r\n\r\n").await.unwrap();
            let mut host = TcpStream::connect(behind).await.unwrap();
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut stream, &mut host).await });
        }
    });
    let get = |host: &str| format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    assert!(cell.inspected("a.example", &get("a.example")).await.contains("hello"));
    let answer = cell.inspected("no.example", &get("no.example")).await;
    assert!(answer.starts_with("HTTP/1.1 502") && answer.contains("407"), "{answer}");
    assert_eq!(cell.connect("other.example:443").await.0, 403, "no rule, no question to the proxy");
    assert_eq!(cell.connect("in.example:443").await.0, 403, "an exception is checked here");
    assert_eq!(cell.connect("10.1.1.1:443").await.0, 403, "an address is checked here even so");
    assert_eq!(*asked.lock().unwrap(), ["CONNECT a.example:443 HTTP/1.1", "CONNECT no.example:443 HTTP/1.1"]);
    cell.end().await;
}

#[tokio::test]
async fn further_roots_name_what_is_wrong_with_a_file() {
    assert!(further_roots("").unwrap_err().to_string().contains("no certificate"));
    assert!(further_roots("-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n").is_err());
    assert_eq!(further_roots(CellCa::generate().unwrap().certificate_pem()).unwrap().len(), 1);
}
