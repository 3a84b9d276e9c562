//! The package cache in real cells: a mirror on loopback that counts what it is asked, and jobs whose curl fetches
//! through the gateway. Nothing else is ever dialled.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::world::{World, one_command, tool_results};

/// Length of what is fetched, in bytes: as long as the large packages of the registries.
const TARBALL_BYTES: usize = 50 << 20;

/// A mirror of `registry.example`.
struct Mirror {
    port: u16,
    tarball: Arc<Vec<u8>>,
    asked: Arc<Mutex<Vec<String>>>,
    sent: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Mirror {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let tarball = Arc::new((0..TARBALL_BYTES).map(|n| (n ^ (n >> 9)) as u8).collect::<Vec<u8>>());
        let (asked, sent, stop) = (Arc::default(), Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let mirror = Self { port, tarball, asked, sent, stop, thread: None };
        let (tarball, asked) = (mirror.tarball.clone(), mirror.asked.clone());
        let (sent, stop) = (mirror.sent.clone(), mirror.stop.clone());
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().take_while(|_| !stop.load(Ordering::SeqCst)) {
                if let Ok(stream) = stream {
                    let _ = serve(stream, &tarball, &asked, &sent);
                }
            }
        });
        Self { thread: Some(thread), ..mirror }
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }

    fn end(mut self) {
        self.stop.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(("127.0.0.1", self.port)));
        self.thread.take().unwrap().join().unwrap();
    }
}

fn serve(
    mut stream: TcpStream,
    tarball: &[u8],
    asked: &Mutex<Vec<String>>,
    sent: &AtomicU64,
) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut line = String::new();
    let mut reader = BufReader::new(stream.try_clone()?);
    reader.read_line(&mut line)?;
    let first = line.trim_end().to_owned();
    while line.trim_end() != "" {
        line.clear();
        reader.read_line(&mut line)?;
    }
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    asked.lock().unwrap().push(path.clone());
    let (status, lasting, body) = match path.as_str() {
        "/npm/big/-/big-1.0.0.tgz" => ("200 OK", "no-cache", tarball),
        "/npm/big" => ("200 OK", "max-age=600", &br#"{"name":"big"}"#[..]),
        _ => ("404 Not Found", "no-store", &b"none"[..]),
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\ncache-control: {lasting}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    )?;
    stream.write_all(body)?;
    sent.fetch_add(body.len() as u64, Ordering::SeqCst);
    Ok(())
}

const RULES: &str = "[[egress.host]]\nname = \"registry.example\"\ninspect = true\nmethods = [\"GET\", \"HEAD\"]\n\
    cache = true\nimmutable = [\"/*/-/*.tgz\"]\n";

/// A world whose policies `one` and `two` reach the registry, which is the mirror.
fn world(mirror: &Mirror, dir: &std::path::Path, script: &str) -> World {
    for name in ["one", "two"] {
        let text = include_str!("../../policies/trusted.toml").replace("\"WebFetch\", ", "");
        std::fs::write(dir.join(format!("{name}.toml")), format!("{text}\n{RULES}")).unwrap();
    }
    let more = format!(
        "policy_dirs = [{dir:?}]\n[network.mirrors]\n\"registry.example\" = \"http://127.0.0.1:{}/npm\"\n\
         [cache]\nbytes_max = 1000000000\nfree_bytes_min = 0\n",
        mirror.port
    );
    World::with(script, &more)
}

fn egress(job: &Value) -> (u64, u64, u64) {
    let of = |key: &str| job["totals"]["egress"][key].as_u64().unwrap_or_else(|| panic!("no {key}: {job}"));
    (of("bytes_up"), of("bytes_down"), of("cached_bytes"))
}

#[test]
fn the_second_job_fetches_nothing_over_the_network_and_no_job_changes_what_it_gets() {
    let (mirror, policies) = (Mirror::start(), tempfile::tempdir().unwrap());
    // What a job may try to do to the next one stands beside what it fetches.
    let command = r#"
        get() { curl -sS --fail "$@"; }
        get -H 'X-Forwarded-Host: evil.example' -A evil -H 'X-Original-URL: /evil' https://registry.example/big; echo
        get -o /tmp/big.tgz -w 'speed: %{speed_download} %{http_code}\n' https://registry.example/big/-/big-1.0.0.tgz
        echo "sum: $(sha256sum </tmp/big.tgz)"
        echo "part: $(get -r 1-3 https://registry.example/big/-/big-1.0.0.tgz | od -An -tx1)"
        echo "none: $(curl -sS -o /dev/null -w '%{http_code}' https://registry.example/none)"
    "#;
    let mut world = world(&mirror, policies.path(), &one_command(command));
    let sum = format!("{:x}", Sha256::digest(mirror.tarball.as_slice()));
    let run = |world: &World, policy: &str| {
        let (events, job) = world.job(&json!({ "prompt": "fetch", "policy": policy }));
        assert_eq!(job["outcome"], "succeeded", "{job}\n{}", world.log());
        let results = tool_results(&events);
        for line in ["{\"name\":\"big\"}", &format!("sum: {sum}"), "part:  01 02 03", "none: 404"] {
            assert!(results.contains(line), "{line} is missing:\n{results}");
        }
        let speed =
            results.split("speed: ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok());
        let reached: Vec<Value> = events.into_iter().filter(|event| event["type"] == "egress").collect();
        (job, reached, speed.unwrap_or_default() / 1e6)
    };
    let (job, _, cold) = run(&world, "one");
    let (up, down, _) = egress(&job);
    assert!(up > 0 && down > TARBALL_BYTES as u64, "{job}");
    assert_eq!(
        mirror.asked(),
        ["/npm/big", "/npm/big/-/big-1.0.0.tgz", "/npm/none"],
        "the part is of what is kept"
    );

    let (job, reached, warm) = run(&world, "one");
    let (up, down, cached) = egress(&job);
    assert_eq!(mirror.asked(), ["/npm/none"], "only what is not there is asked for");
    assert!(
        up < 2_000 && down < 2_000 && cached >= TARBALL_BYTES as u64,
        "{up} up, {down} down, {cached} cached"
    );
    println!("50 MiB into a cell: {cold:.0} MB/s from the mirror, {warm:.0} MB/s from the cache");
    let tarball = reached.iter().find(|e| e["path"] == "/big/-/big-1.0.0.tgz" && e["status"] == 200).unwrap();
    assert_eq!((&tarball["cached_bytes"], &tarball["bytes_down"]), (&json!(TARBALL_BYTES), &json!(0)));
    let shown = world.run(&["show", job["id"].as_str().unwrap()]).1;
    assert!(shown.contains("from the package cache"), "{shown}");

    // Another policy has nothing of it; after a kill what is kept is still there.
    run(&world, "two");
    assert_eq!(mirror.asked().len(), 3);
    world.kill();
    world.start();
    run(&world, "two");
    assert_eq!(mirror.asked(), ["/npm/none"]);

    let listed = world.run(&["cache", "ls"]).1;
    assert!(
        listed.contains("https://registry.example/big/-/big-1.0.0.tgz") && listed.contains("two"),
        "{listed}"
    );
    let view: Value =
        serde_json::from_str(&world.run(&["cache", "ls", "--policy", "one", "--json"]).1).unwrap();
    assert_eq!(
        (view["entries"].as_array().unwrap().len(), &view["policies"][0]["policy"]),
        (2, &json!("one"))
    );
    assert!(view["whole"]["bytes"].as_u64() < Some(60 << 20), "the body stands once: {view}");
    let (code, said, _) = world.run(&["cache", "rm", "--policy", "one"]);
    assert!(code == 0 && said.starts_with("2 files removed"), "{said}");
    let (code, said, _) = world.run(&["cache", "rm", "https://registry.example/big/-/"]);
    assert!(code == 0 && said.starts_with("1 file removed"), "{said}");
    assert!(world.run(&["cache", "rm"]).0 != 0, "what is to be removed is named");
    let metrics = world.call("GET", "/metrics", "").body;
    assert!(metrics.contains("hotcell_cache_entries 1"), "{metrics}");
    let packages = world.state_dir().join("packages");
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(packages).unwrap().permissions()) & 0o777,
        0o700
    );
    world.nothing_left();
    world.end();
    mirror.end();
}
