//! Telling people: webhooks and commands hear of the ends of real jobs, at least once and under one delivery, whatever
//! dies or hangs in between.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hmac::{Hmac, Mac};
use serde_json::{Value, json};
use sha2::Sha256;

use crate::fake_agent::{done, spec, world};
use crate::world::World;

const KEY: &str = "the key of the test";

/// One POST that came.
#[derive(Debug, Clone)]
struct Post {
    headers: Vec<(String, String)>,
    body: String,
}

impl Post {
    fn header(&self, name: &str) -> &str {
        let found = self.headers.iter().find(|(key, _)| key == name);
        found.map_or("", |(_, value)| value)
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    fn is_signed(&self) -> bool {
        let mut mac = Hmac::<Sha256>::new_from_slice(KEY.as_bytes()).unwrap();
        mac.update(format!("{}.{}", self.header("x-hotcell-timestamp"), self.body).as_bytes());
        let hex: String = mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        self.header("x-hotcell-signature") == format!("sha256={hex}")
    }
}

/// A receiver on loopback: answers with the statuses it was given, then with 204; 0 is no answer at all.
struct Receiver {
    port: u16,
    posts: Arc<Mutex<Vec<Post>>>,
}

impl Receiver {
    fn new(statuses: Vec<u16>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let posts = Arc::new(Mutex::new(Vec::new()));
        let (seen, mut statuses) = (posts.clone(), statuses.into_iter());
        // Ends with the test's process.
        std::thread::spawn(move || {
            let mut held = Vec::new();
            for stream in listener.incoming().flatten() {
                let status = statuses.next().unwrap_or(204);
                let Some((post, mut stream)) = read(stream) else { continue };
                seen.lock().unwrap().push(post);
                match status {
                    0 => held.push(stream),
                    status => {
                        let answer =
                            format!("HTTP/1.1 {status} x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                        let _ = stream.write_all(answer.as_bytes());
                    }
                }
            }
        });
        Self { port, posts }
    }

    fn posts(&self) -> Vec<Post> {
        self.posts.lock().unwrap().clone()
    }
}

fn read(stream: TcpStream) -> Option<(Post, TcpStream)> {
    let mut reader = BufReader::new(stream);
    let (mut headers, mut line) = (Vec::new(), String::new());
    reader.read_line(&mut line).ok()?;
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        match line.trim_end().split_once(": ") {
            Some((key, value)) => headers.push((key.to_ascii_lowercase(), value.to_owned())),
            None => break,
        }
    }
    let length = headers.iter().find(|(key, _)| key == "content-length")?.1.parse().ok()?;
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let body = String::from_utf8(body).ok()?;
    Some((Post { headers, body }, reader.into_inner()))
}

fn key() -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "{KEY}").unwrap();
    file
}

fn webhook(name: &str, port: u16, more: &str) -> String {
    format!("[[notify]]\nname = {name:?}\nurl = \"http://127.0.0.1:{port}/hook?x=1\"\n{more}\n")
}

fn outbox(world: &World) -> String {
    world.sql("SELECT count(*) FROM outbox")
}

#[test]
fn a_webhook_hears_of_each_end_once_signed_and_without_a_word_of_the_agents() {
    let (receiver, key) = (Receiver::new(vec![]), key());
    let only = Receiver::new(vec![]);
    let more = webhook("chat", receiver.port, &format!("secret_file = {:?}", key.path()))
        + &webhook("ends", only.port, "on = [\"batch_end\"]\npolicies = [\"tru*\"]");
    let mut world = world(&more);
    let in_batch = |task: &str| {
        let mut spec = spec(task);
        (spec["batch"], spec["labels"]) = (json!({ "name": "nightly" }), json!({ "team": "blue" }));
        spec
    };
    let jobs = [world.submit(&in_batch("print 1 1")), world.submit(&in_batch("stderr my secret; exit 3"))];
    for (job, outcome) in jobs.iter().zip(["succeeded", "failed"]) {
        let job = done(&mut world, job).1;
        assert_eq!(job["outcome"], outcome);
        assert_eq!(job.to_string().contains("my secret"), outcome == "failed", "{job}");
    }
    world.wait_for("all was told", |world| receiver.posts().len() >= 3 && outbox(world) == "0");
    let posts = receiver.posts();
    let kinds: Vec<String> =
        posts.iter().map(|post| post.json()["kind"].as_str().unwrap().to_owned()).collect();
    assert_eq!(kinds, ["job_end", "job_end", "batch_end"]);
    for post in &posts {
        assert!(post.is_signed(), "{post:?}");
        let job = &post.json()["job"];
        assert_eq!(
            (&job["state"], &job["labels"]["team"], &job["title"]),
            (&json!("done"), &json!("blue"), &Value::Null)
        );
        assert!(!post.body.contains("my secret") && !post.body.contains("print 1 1"), "{}", post.body);
    }
    assert_eq!(posts[2].json()["batch_jobs"], 2);
    let ends: Vec<String> = only.posts().iter().map(|post| post.json()["kind"].to_string()).collect();
    assert_eq!(ends, ["\"batch_end\""], "who asked for less hears less");
    let mut deliveries: Vec<&str> = posts.iter().map(|post| post.header("x-hotcell-delivery")).collect();
    deliveries.dedup();
    assert_eq!(deliveries.len(), 3);
    let metrics = world.call("GET", "/metrics", "").body;
    assert!(metrics.contains("hotcell_notices_total{result=\"sent\"} 4"), "{metrics}");
    world.end();
}

#[test]
fn who_answers_wrongly_or_not_at_all_is_told_again_under_the_same_delivery_and_holds_up_nobody() {
    let (broken, hanging) = (Receiver::new(vec![500, 302]), Receiver::new(vec![0; 9]));
    let more = webhook("broken", broken.port, "") + &webhook("hanging", hanging.port, "");
    let mut world = world(&more);
    let job = world.submit(&spec("print 1 1"));
    assert_eq!(done(&mut world, &job).1["outcome"], "succeeded");
    world.wait_for("the third try", |_| broken.posts().len() >= 3);
    let posts = broken.posts();
    assert!(
        posts.iter().all(|post| post.header("x-hotcell-delivery") == posts[0].header("x-hotcell-delivery"))
    );
    let (code, stdout, _) = world.run(&["notify", "ls", "--json"]);
    let view: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, &view["targets"]), (0, &json!(["broken", "hanging"])));
    let waiting = view["waiting"].as_array().unwrap();
    assert!(waiting.iter().all(|notice| notice["target"] == "hanging" && notice["job"] == job), "{view}");
    // A drain does not wait for it either; the rest stays for the next daemon.
    let begun = Instant::now();
    world.terminate();
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    assert_eq!(outbox(&world), "1");
    world.start();
    world.end();
}

#[test]
fn what_was_not_told_before_a_kill_is_told_after_it() {
    let receiver = Receiver::new(vec![]);
    let mut world = world(&webhook("chat", receiver.port, "on = [\"job_end\"]"));
    let (first, second) = (world.submit(&spec("sleep 0.1")), world.submit(&spec("sleep 0.3")));
    world.wait_for("the first is over", |world| {
        world.sql("SELECT count(*) FROM jobs WHERE state = 'done'") != "0"
    });
    world.kill();
    world.start();
    for job in [&first, &second] {
        done(&mut world, job);
    }
    world.wait_for("both were told", |world| receiver.posts().len() >= 2 && outbox(world) == "0");
    let mut told: Vec<String> =
        receiver.posts().iter().map(|post| post.json()["job"]["id"].as_str().unwrap().to_owned()).collect();
    told.sort();
    told.dedup();
    let mut jobs = vec![first, second];
    jobs.sort();
    assert_eq!(told, jobs);
    world.end();
}

#[test]
fn a_command_runs_as_the_user_whose_job_it_is_and_a_test_says_what_is_wrong() {
    const UID: u32 = 5003;
    let dir = tempfile::Builder::new().prefix("hc-").tempdir_in("/var/tmp").unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let script = dir.path().join("tell");
    let told = dir.path().join("told");
    let text = format!(
        "#!/bin/sh\n(id -u; echo \"$HOTCELL_NOTICE $HOTCELL_JOB\"; cat) > {0}.new && mv {0}.new {0}\n",
        told.display()
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let more = format!(
        "[[notify]]\nname = \"bell\"\ncommand = [{script:?}]\nusers = [{UID}]\n{}",
        webhook("nobody", 9, &format!("secret_file = {script:?}\non = [\"parked\"]"))
    );
    let mut world = world(&more);
    let mine = world.submit(&spec("print 1 1"));
    done(&mut world, &mine);
    let answer = world.curl("POST", "/v1/jobs", &spec("print 1 1").to_string(), &[], Some(UID)).unwrap();
    let job = answer.json()["id"].as_str().unwrap().to_owned();
    done(&mut world, &job);
    world.wait_for("it was told", |_| told.exists());
    let text = std::fs::read_to_string(&told).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..2], [UID.to_string(), format!("job_end {job}")]);
    assert_eq!(serde_json::from_str::<Value>(lines[2]).unwrap()["job"]["id"], job);
    world.wait_for("nothing waits", |world| outbox(world) == "0");
    let (code, stdout, _) = world.run(&["notify", "test"]);
    assert_eq!(code, 1, "{stdout}");
    assert!(stdout.contains("bell  told") && stdout.contains("chmod 600"), "{stdout}");
    let refused = world.curl("GET", "/v1/notices", "", &[], Some(UID)).unwrap();
    assert_eq!(refused.json()["error"]["code"], "not_yours", "{}", refused.body);
    world.end();
}
