//! The way out of real cells: the tools people use there, WebFetch of the real CLI, and a restart of the daemon. The
//! internet is a corporate proxy in this process (`[network] proxy`) that leads every name to servers on loopback, so
//! that nothing else is ever dialled.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::world::{World, one_command, tool_results};

const HOSTS: [&str; 4] = ["inspected.example", "tunnel.example", "second.example", "plain.example"];

/// What the servers behind the proxy know.
#[derive(Default)]
pub(crate) struct Shared {
    /// Lines of CONNECT that the proxy got.
    pub(crate) asked: Mutex<Vec<String>>,
    /// Requests that servers got: method, host, path.
    seen: Mutex<Vec<String>>,
    /// Of each of them, all headers that name a credential.
    pub(crate) authorized: Mutex<Vec<Vec<String>>>,
    /// `/go` answers 503 until this is set.
    go: AtomicBool,
    /// A bare repository, served as files.
    repository: Mutex<Option<PathBuf>>,
}

pub(crate) struct Internet {
    pub(crate) shared: Arc<Shared>,
    pub(crate) dir: tempfile::TempDir,
    port: u16,
    _runtime: tokio::runtime::Runtime,
}

impl Internet {
    pub(crate) fn new() -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        // One's own name as the issuer's is a certificate that signed itself, for OpenSSL.
        params.distinguished_name.push(rcgen::DnType::CommonName, "the corporate authority");
        let issuer =
            rcgen::CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("corporate.pem"), issuer.pem()).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(HOSTS.map(str::to_owned)).unwrap();
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &issuer).unwrap().der().clone();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        let shared = Arc::new(Shared::default());
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let port = listener.local_addr().unwrap().port();
        runtime.spawn(proxy(listener, shared.clone(), TlsAcceptor::from(Arc::new(config))));
        Self { shared, dir, port, _runtime: runtime }
    }

    /// A world whose policy `reach` has these rules.
    fn world(&self, script: &str, rules: &str) -> World {
        let world = self.without_daemon(script, rules, "", "");
        started(world)
    }

    /// The same before its daemon runs, with more tables of the configuration and more lines of `[network]`.
    pub(crate) fn without_daemon(&self, script: &str, rules: &str, tables: &str, network: &str) -> World {
        let policies = self.dir.path().join("policies");
        std::fs::create_dir(&policies).unwrap();
        let text = include_str!("../../policies/trusted.toml").replace("\"WebFetch\", ", "");
        std::fs::write(policies.join("reach.toml"), format!("{text}\n{rules}")).unwrap();
        let more = format!(
            "policy_dirs = [{policies:?}]\n{tables}\n[network]\nproxy = \"http://127.0.0.1:{}\"\nca_file = {:?}\n{network}\n",
            self.port,
            self.dir.path().join("corporate.pem")
        );
        World::without_daemon(script, &more)
    }

    pub(crate) fn seen(&self) -> Vec<String> {
        self.shared.seen.lock().unwrap().clone()
    }
}

fn started(mut world: World) -> World {
    world.start();
    world
}

/// A proxy that knows CONNECT, in front of a server that is every host.
async fn proxy(listener: TcpListener, shared: Arc<Shared>, tls: TlsAcceptor) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let (shared, tls) = (shared.clone(), tls.clone());
        tokio::spawn(async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let Ok(byte) = stream.read_u8().await else { return };
                head.push(byte);
            }
            let line = String::from_utf8_lossy(&head).lines().next().unwrap_or_default().to_owned();
            shared.asked.lock().unwrap().push(line.clone());
            if stream.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.is_err() {
                return;
            }
            if line.contains(":443 ") {
                if let Ok(stream) = tls.accept(stream).await {
                    serve(shared, stream).await;
                }
            } else {
                serve::<TcpStream>(shared, stream).await;
            }
        });
    }
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin>(shared: Arc<Shared>, stream: S) {
    let service = service_fn(|request: Request<Incoming>| {
        let answer = answer(&shared, &request);
        async move {
            // All of it, as hosts do: one that answers and closes before it has read resets what is still under way.
            let _ = request.into_body().collect().await;
            Ok::<_, std::convert::Infallible>(answer)
        }
    });
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

fn answer(shared: &Shared, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let host = request.headers().get("host").and_then(|h| h.to_str().ok()).unwrap_or_default();
    let path = request.uri().path();
    shared.seen.lock().unwrap().push(format!("{} {host} {path}", request.method()));
    let authorized = request.headers().get_all("authorization").iter();
    let authorized: Vec<String> =
        authorized.map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned()).collect();
    shared.authorized.lock().unwrap().push(authorized.clone());
    let build = Response::builder();
    if let (Some(file), Some(repository)) =
        (path.strip_prefix("/repo.git/"), shared.repository.lock().unwrap().as_ref())
    {
        return match std::fs::read(repository.join(file)) {
            Ok(bytes) => build.body(Full::from(bytes)).unwrap(),
            Err(_) => build.status(404).body(Full::default()).unwrap(),
        };
    }
    match path {
        "/pub/echo" => build.body(Full::from(format!("you sent {}\n", authorized.join(", ")))).unwrap(),
        "/redirect" => {
            build.status(302).header("location", "http://169.254.169.254/").body(Full::default()).unwrap()
        }
        "/npm/thing" => {
            let version = json!({ "name": "thing", "version": "1.2.3", "dist": { "tarball": "https://none.example/" } });
            let package = json!({ "name": "thing", "dist-tags": { "latest": "1.2.3" }, "versions": { "1.2.3": version } });
            build.header("content-type", "application/json").body(Full::from(package.to_string())).unwrap()
        }
        "/go" if !shared.go.load(Ordering::SeqCst) => build.status(503).body(Full::default()).unwrap(),
        _ => build
            .header("content-type", "text/plain")
            .body(Full::from(format!("hello from {host}\n")))
            .unwrap(),
    }
}

/// A bare repository with one file, ready to be served as files.
fn repository(dir: &Path) -> PathBuf {
    let git = |at: &Path, args: &[&str]| {
        let output =
            Command::new("git").arg("-C").arg(at).args(args).env("GIT_CONFIG_GLOBAL", "/dev/null").output();
        let output = output.expect("git");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let (work, bare) = (dir.join("work"), dir.join("repo.git"));
    std::fs::create_dir(&work).unwrap();
    git(&work, &["init", "-q", "-b", "main"]);
    std::fs::write(work.join("README"), "cloned through the gateway\n").unwrap();
    git(&work, &["add", "README"]);
    git(&work, &["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "one"]);
    git(dir, &["clone", "-q", "--bare", "work", "repo.git"]);
    git(&bare, &["update-server-info"]);
    bare
}

fn of_type<'a>(events: &'a [Value], kind: &str) -> Vec<&'a Value> {
    events.iter().filter(|event| event["type"] == kind).collect()
}

const RULES: &str = "[[egress.host]]\nname = \"inspected.example\"\ninspect = true\nmethods = [\"GET\"]\n\
    [[egress.host]]\nname = \"tunnel.example\"\n[[egress.host]]\nname = \"plain.example\"\nports = [80]\n";

#[test]
fn the_usual_tools_reach_what_the_policy_names_and_nothing_else() {
    let internet = Internet::new();
    *internet.shared.repository.lock().unwrap() = Some(repository(internet.dir.path()));
    let command = r#"
        echo "curl: $(curl -sS https://inspected.example/hello)"
        echo "tunnel: $(curl -sS https://tunnel.example/hello)"
        echo "plain: $(curl -sS http://plain.example/hello)"
        echo "post: $(curl -sS -o /dev/null -w '%{http_code}' -X POST https://inspected.example/hello)"
        echo "other: $(curl -sS -o /dev/null -w '%{http_connect}' https://other.example/ 2>/dev/null)"
        echo "metadata: $(curl -sS -o /dev/null -w '%{http_code}' http://169.254.169.254/latest/)"
        curl -sS -m 5 --noproxy '*' https://inspected.example/ 2>/dev/null; echo "direct: $?"
        node -e 'fetch("https://inspected.example/hello").then(r => r.text()).then(t => console.log("node: " + t))'
        python3 -c 'import urllib.request; print("python: " + urllib.request.urlopen("https://inspected.example/hello").read().decode())'
        git clone -q https://inspected.example/repo.git /tmp/clone && echo "git: $(cat /tmp/clone/README)"
        echo "npm: $(npm view --registry https://inspected.example/npm/ thing version)"
        echo "openssl: $(openssl s_client -proxy 127.0.0.1:3128 -connect inspected.example:443 -servername inspected.example \
            -verify_return_error -brief </dev/null 2>&1 | grep Verification)"
        # What tools that the image lacks would read, as strictly as Python's newest releases do.
        python3 -c '
import os, ssl, urllib.request
for name in "REQUESTS_CA_BUNDLE", "PIP_CERT", "CARGO_HTTP_CAINFO", "AWS_CA_BUNDLE":
    context = ssl.create_default_context(cafile=os.environ[name])
    context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    answer = urllib.request.urlopen("https://inspected.example/hello", context=context)
    print(f"bundle of {name}: {answer.read().decode()}")'
        echo "keys: $(cat /.hotcell/ca.pem /.hotcell/ca-more.pem | grep -c 'PRIVATE KEY') $(cat /.hotcell/ca.key | wc -c)"
    "#;
    let mut world = internet.world(&one_command(command), RULES);
    let (events, job) = world.job(&json!({ "prompt": "reach out", "policy": "reach" }));
    assert_eq!(job["outcome"], "succeeded", "{job}\n{}", world.log());
    let results = tool_results(&events);
    for line in [
        "curl: hello from inspected.example",
        "tunnel: hello from tunnel.example",
        "plain: hello from plain.example",
        "post: 403",
        "other: 403",
        "metadata: 403",
        "direct: 6",
        "node: hello from inspected.example",
        "python: hello from inspected.example",
        "git: cloned through the gateway",
        "npm: 1.2.3",
        "openssl: Verification: OK",
        "bundle of REQUESTS_CA_BUNDLE: hello from inspected.example",
        "bundle of PIP_CERT: hello from inspected.example",
        "bundle of CARGO_HTTP_CAINFO: hello from inspected.example",
        "bundle of AWS_CA_BUNDLE: hello from inspected.example",
        "keys: 0 0",
    ] {
        assert!(results.contains(line), "{line} is missing:\n{results}");
    }
    let asked = internet.shared.asked.lock().unwrap().join("\n");
    assert!(
        !asked.contains("other.example") && !asked.contains("169.254"),
        "names are decided here: {asked}"
    );
    assert!(internet.seen().iter().all(|line| !line.starts_with("POST")), "{:?}", internet.seen());

    // What it reached is in the journal, measured by the gateway.
    let reached = of_type(&events, "egress");
    let find = |host: &str, decision: &str| {
        let found = reached.iter().find(|e| e["host"] == host && e["decision"] == decision);
        *found.unwrap_or_else(|| panic!("no {decision} of {host}: {reached:#?}"))
    };
    let inspected = find("inspected.example", "allow");
    assert_eq!(
        (&inspected["origin"], &inspected["method"], &inspected["path"]),
        (&json!("gateway"), &json!("GET"), &json!("/hello"))
    );
    assert_eq!(inspected["rule"], "egress.host[0] inspected.example");
    assert!(
        inspected["bytes_up"].as_u64() > Some(0) && inspected["bytes_down"].as_u64() > Some(0),
        "{inspected}"
    );
    let tunnel = find("tunnel.example", "allow");
    assert!(tunnel["method"].is_null() && tunnel["bytes_down"].as_u64() > Some(500), "{tunnel}");
    assert_eq!(find("inspected.example", "deny")["method"], "POST");
    assert_eq!(find("other.example", "deny")["rule"], "egress");
    let metrics = world.call("GET", "/metrics", "").body;
    assert!(metrics.contains("hotcell_egress_total{decision=\"deny\"} 3"), "{metrics}");
    assert!(world.log().contains("which addresses they have is looked up"), "the delegation is declared");
    world.nothing_left();
    world.end();
}

#[test]
fn webfetch_reaches_the_hosts_of_egress_and_no_other() {
    let script = "usage = { input = 10, output = 20 }\n\
        [[reply]]\nwhen = { turn = 0, tools = true }\nblocks = [\n\
          { tool = \"WebFetch\", input = { url = \"https://inspected.example/page\", prompt = \"what does it say\" } },\n\
          { tool = \"WebFetch\", input = { url = \"https://other.example/page\", prompt = \"what does it say\" } },\n]\n\
        [default]\ntext = \"the page says hello\"\n";
    let internet = Internet::new();
    let world = internet.world(script, RULES);
    let (events, job) = world.job(&json!({ "prompt": "fetch", "policy": "reach" }));
    assert_eq!(job["outcome"], "succeeded", "{job}\n{}", world.log());
    let results = tool_results(&events);
    assert!(results.contains("the page says hello"), "{results}");
    assert_eq!(internet.seen(), ["GET inspected.example /page"]);
    let reached = of_type(&events, "egress");
    assert!(reached.iter().any(|e| e["host"] == "other.example" && e["decision"] == "deny"), "{reached:#?}");
    let hosts: Vec<&str> = reached.iter().filter_map(|e| e["host"].as_str()).collect();
    assert!(hosts.iter().all(|host| host.ends_with(".example")), "the CLI asks nobody else: {hosts:?}");
    world.end();

    // Where egress allows nothing, the tool is not there, and neither is the proxy.
    let world = World::new(&one_command("env | grep -ci proxy=http; ls /.hotcell; true"));
    let (events, job) = world.job(&json!({ "prompt": "fetch", "policy": "trusted" }));
    assert_eq!(job["outcome"], "succeeded", "{job}");
    let init = events.iter().find(|e| e["frame"]["subtype"] == "init").expect("init");
    assert!(!init["frame"]["tools"].to_string().contains("WebFetch"), "{init}");
    let results = tool_results(&events);
    assert!(
        results.starts_with('0') && !results.contains("egress.sock") && !results.contains("ca.pem"),
        "{results}"
    );
    world.end();
}

#[test]
fn what_a_job_used_of_a_limit_is_counted_over_a_kill_of_the_daemon() {
    let internet = Internet::new();
    // As much as the limit before the kill and as much after it would pass, if the count began anew.
    let command = "n=0; while [ $n -lt 60 ]; do curl -sS http://plain.example/before >/dev/null; n=$((n+1)); done; \
        until curl -sSf http://second.example/go 2>/dev/null; do sleep 0.1; done; \
        n=0; while [ $n -lt 200 ]; do curl -sSf http://plain.example/after >/dev/null 2>&1 || break; n=$((n+1)); done; \
        echo \"then $(curl -sS http://plain.example/after)\"";
    let rules = "[[egress.host]]\nname = \"plain.example\"\nports = [80]\nbytes_down_max = 12000\n\
        [[egress.host]]\nname = \"second.example\"\nports = [80]\n";
    let mut world = internet.world(&one_command(command), rules);
    let id = world.submit(&json!({ "prompt": "reach out", "policy": "reach" }));
    world.wait_for("all requests before", |_| internet.seen().iter().any(|line| line.ends_with("/go")));
    world.kill();
    world.start();
    internet.shared.go.store(true, Ordering::SeqCst);
    let events = world.follow(&id);
    assert_eq!(world.show(&id)["outcome"], "succeeded", "{}", world.log());
    assert!(tool_results(&events).contains("bytes_down_max is reached"), "{}", tool_results(&events));
    let reached = of_type(&events, "egress");
    let down: u64 = reached
        .iter()
        .filter(|e| e["host"] == "plain.example")
        .filter_map(|e| e["bytes_down"].as_u64())
        .sum();
    let before = internet.seen().iter().filter(|line| line.ends_with("/before")).count();
    assert!(before >= 30, "the test itself: {before} requests came before the kill");
    assert!((4_000..=12_500).contains(&down), "{down} bytes came of 12000");
    world.end();
}

#[test]
fn after_a_restart_of_the_daemon_the_cell_still_trusts_its_way_out() {
    let internet = Internet::new();
    let command = "curl -sSf https://inspected.example/first; \
        until curl -sSf https://inspected.example/go 2>/dev/null; do sleep 0.1; done; echo adopted";
    let mut world = internet.world(&one_command(command), RULES);
    let id = world.submit(&json!({ "prompt": "reach out", "policy": "reach" }));
    world.wait_for("the first request", |_| internet.seen().iter().any(|line| line.ends_with("/first")));
    let key = world.state_dir().join("cells");
    let cell = std::fs::read_dir(&key).unwrap().next().unwrap().unwrap().path();
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(cell.join("ca.key")).unwrap());
    assert_eq!(mode & 0o777, 0o600, "only the daemon reads the key");
    world.kill();
    let before = internet.seen().len();
    world.start();
    world.wait_for("a request after the restart", |_| internet.seen().len() > before);
    internet.shared.go.store(true, Ordering::SeqCst);
    let events = world.follow(&id);
    assert!(tool_results(&events).contains("adopted"), "{}", tool_results(&events));
    assert_eq!(world.show(&id)["outcome"], "succeeded");
    world.end();
}
