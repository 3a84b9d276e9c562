//! What people get wrong, and what breaks under them: each case has an error that names the key, the field
//! or the path, an exit code that a script can act upon, and nothing left behind.

use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::world::{World, docker, init_binary};

/// The submitter of most of these jobs.
const ANN: u32 = 4242;

const SCRIPT: &str = r#"
usage = { input = 10, output = 20 }
[[reply]]
when = { prompt = "work", turn = 0, tools = true }
blocks = [{ tool = "Bash", input = { command = "while [ ! -e go ]; do sleep 0.1; done", description = "wait" } }]
[default]
text = "done"
"#;

/// A spec, what the error must say, and the API's code for it.
type Case = (Value, Vec<String>, &'static str);

fn says(words: &[&str]) -> Vec<String> {
    words.iter().map(|w| (*w).to_owned()).collect()
}

/// Submits each spec by the API and by `hotcell run --spec`, both as the same user.
fn all_refused(world: &World, cases: &[Case]) {
    use std::os::unix::process::CommandExt;
    let exit = |code: &str| if code == "engine_unavailable" { 4 } else { 2 };
    for (spec, words, code) in cases {
        let answer = world.curl("POST", "/v1/jobs", &spec.to_string(), &[], Some(ANN)).unwrap();
        let error = answer.json()["error"].clone();
        assert_eq!(error["code"], *code, "{spec}: {}", answer.body);
        let said = format!("{} {}", error["message"].as_str().unwrap(), error["hint"].as_str().unwrap_or(""));
        for word in words {
            assert!(said.contains(word.as_str()), "{spec}\n{said:?} does not say {word:?}");
        }
        let mut command = world.hotcell();
        command.args(["run", "--spec", "-"]).uid(ANN).gid(ANN);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("hotcell");
        child.stdin.take().unwrap().write_all(spec.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(exit(code)), "{spec}\n{stderr}");
        for word in words {
            assert!(stderr.contains(word.as_str()), "{spec}\n{stderr:?} does not say {word:?}");
        }
    }
    assert_eq!(world.sql("SELECT count(*) FROM jobs"), "0", "a refused spec made a job");
    let journals = std::fs::read_dir(world.state_dir().join("jobs")).unwrap().count();
    assert_eq!(journals, 0, "a refused spec left a journal");
}

#[test]
fn a_spec_that_cannot_be_accepted_names_its_key() {
    let world = World::new(SCRIPT);
    let case = |more: Value, words: &[&str], code| {
        let mut spec = json!({ "prompt": "x" });
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        (spec, says(words), code)
    };
    all_refused(
        &world,
        &[
            case(json!({ "prompt": "" }), &["prompt", "empty"], "invalid_spec"),
            case(json!({ "promt": "y" }), &["promt", "line 1", "column"], "invalid_spec"),
            case(
                json!({ "workspace": { "path": "/x", "mod": "bind" } }),
                &["`mod`", "column"],
                "invalid_spec",
            ),
            case(json!({ "limits": { "cost": 1 } }), &["`cost`", "cost_usd"], "invalid_spec"),
            case(json!({ "limits": { "wall_s": 0 } }), &["limits.wall_s"], "invalid_spec"),
            case(json!({ "limits": { "cost_usd": -1 } }), &["limits.cost_usd"], "invalid_spec"),
            case(json!({ "env": { "A-B": "1" } }), &["env.A-B"], "invalid_spec"),
            case(json!({ "model": "--model" }), &["model"], "invalid_spec"),
            case(json!({ "permission_mode": "auto" }), &["auto", "bypassPermissions"], "invalid_spec"),
            case(
                json!({ "policy": "nope" }),
                &["policy", "\"nope\"", "default, refactor, review, trusted, untrusted"],
                "unknown_policy",
            ),
            case(
                json!({ "limits": { "cost_usd": 2 } }),
                &["limits.cost_usd", "2", "at most 1", "default"],
                "above_policy",
            ),
            case(
                json!({ "limits": { "max_turns": 101 } }),
                &["limits.max_turns", "101", "100"],
                "above_policy",
            ),
            case(json!({ "model": "gpt-9" }), &["model", "gpt-9", "claude-*"], "above_policy"),
            case(json!({ "image": "debian" }), &["image", "debian", "hotcell/cell*"], "above_policy"),
            case(
                json!({ "policy": "review", "tools": ["Read", "Bash"] }),
                &["tools[1]", "Bash"],
                "above_policy",
            ),
            case(
                json!({ "policy": "trusted", "env": { "LD_PRELOAD": "/x" } }),
                &["env.LD_PRELOAD"],
                "above_policy",
            ),
            case(
                json!({ "model": "claude-next-99" }),
                &["model", "claude-next-99", "price", "prices.toml"],
                "invalid_spec",
            ),
            case(
                json!({ "fallback_model": "claude-next-99" }),
                &["fallback_model", "claude-next-99", "price", "prices.toml"],
                "invalid_spec",
            ),
            case(json!({ "agent": "newest" }), &["agent", "newest"], "invalid_spec"),
        ],
    );
    // Ten megabytes: refused by the command before it sends them, from a file and from a pipe.
    let large = "x".repeat(10 << 20);
    std::fs::write(world.path("large"), &large).unwrap();
    std::fs::write(world.path("large.json"), json!({ "prompt": large }).to_string()).unwrap();
    let shell = format!("{} run - < {}", env!("CARGO_BIN_EXE_hotcell"), world.path("large").display());
    let output =
        Command::new("sh").args(["-c", &shell]).env("HOTCELL_SOCKET", world.socket()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("the prompt has more than 1048576 bytes"), "{said}");
    let (code, _, said) = world.run(&["run", "--spec", world.path("large.json").to_str().unwrap()]);
    assert!(code == 2 && said.contains("the job spec has more than 4194304 bytes"), "{code} {said}");
    // Files that are no spec: the file is named.
    for (name, text, words) in [
        ("a.json", "{\n  \"prompt\": \"x\",\n  \"promt\": 1\n}", ["a.json", "promt", "line 3"]),
        ("b.json", "{\"prompt\": ", ["b.json", "not valid", "EOF"]),
        ("c.json", "[]", ["c.json", "JSON object", ""]),
        ("d.json", "{\"prompt\":\"x\",\"permission_mode\":\"auto\"}", ["d.json", "auto", "dontAsk"]),
    ] {
        std::fs::write(world.path(name), text).unwrap();
        let (code, stdout, stderr) = world.run(&["run", "--spec", world.path(name).to_str().unwrap()]);
        assert!(code == 2 && stdout.is_empty(), "{code} {stdout}");
        assert!(words.iter().all(|w| stderr.contains(w)), "{stderr}");
        let (code, stdout, stderr) =
            world.run(&["run", "--json", "--spec", world.path(name).to_str().unwrap()]);
        let error: Value = serde_json::from_str(&stdout).expect("one line of JSON");
        assert!(code == 2 && stderr.is_empty() && error["error"]["code"] == "usage", "{stdout} {stderr}");
    }
    let (code, _, said) = world.run(&["run", "--spec", "/no/such/spec.json"]);
    assert!(code == 2 && said.contains("/no/such/spec.json"), "{said}");
    assert_eq!(world.sql("SELECT count(*) FROM jobs"), "0");
    world.end();
}

#[test]
fn a_workspace_that_cannot_be_used_names_its_path() {
    let world = World::new(SCRIPT);
    let base = world.dir.path().canonicalize().unwrap();
    let own = world.workspace("own", ANN);
    std::fs::write(base.join("file"), "x").unwrap();
    let _socket = UnixListener::bind(base.join("sock")).unwrap();
    symlink(&own, base.join("link")).unwrap();
    let private = world.workspace("private", 4243);
    std::fs::set_permissions(&private, PermissionsExt::from_mode(0o700)).unwrap();
    let others = world.workspace("others", 4243);
    let with_socket = world.workspace("with-socket", ANN);
    let _held = UnixListener::bind(with_socket.join("agent.sock")).unwrap();
    std::fs::set_permissions(with_socket.join("agent.sock"), PermissionsExt::from_mode(0o777)).unwrap();
    let repository = world.workspace("repository", ANN);
    let bare = world.workspace("bare.git", ANN);
    for (dir, flag) in [(&repository, "-q"), (&bare, "--bare")] {
        let made = std::process::Command::new("git").args(["init", "-q", flag]).arg(dir).status().unwrap();
        assert!(made.success());
    }
    let state = world.state_dir();
    let case = |path: &Path, words: &[&str]| {
        let mut words = says(words);
        words.push(path.display().to_string());
        (
            json!({ "prompt": "x", "policy": "trusted", "workspace": { "path": path, "mode": "bind" } }),
            words,
            "workspace",
        )
    };
    let mut cases = vec![
        case(&base.join("missing"), &["does not exist"]),
        case(&base.join("file"), &["is a file, not a directory"]),
        case(&base.join("sock"), &["is a socket, not a directory"]),
        case(&base.join("link"), &["symlink", own.to_str().unwrap()]),
        case(&base.join("link/sub"), &["symlink"]),
        case(&private, &["uid 4242 may not"]),
        case(&private.join("deeper"), &["4242"]),
        case(&others, &["uid 4242 may not write"]),
        case(&with_socket, &["socket"]),
        case(&repository.join(".git"), &["git directory", "--ref"]),
        case(&bare, &["git directory", "--ref"]),
        case(Path::new("/"), &["system directory"]),
        case(Path::new("/etc"), &["system directory"]),
        case(Path::new("/proc/self"), &["system directory"]),
        case(Path::new("/home"), &["system directory"]),
        case(&state, &["hotcell's own state"]),
        case(&state.join("jobs"), &["hotcell's own state"]),
        case(&base, &["hotcell's own state"]),
    ];
    for (path, word) in [("relative/path", "absolute"), ("/var/tmp/../etc", "'..'")] {
        let spec = json!({ "prompt": "x", "policy": "trusted", "workspace": { "path": path } });
        cases.push((spec, says(&["workspace.path", word]), "invalid_spec"));
    }
    all_refused(&world, &cases);
    // The home of the person who asks (uid 0's is /root, by the user database).
    let answer = world.call(
        "POST",
        "/v1/jobs",
        &json!({ "prompt": "x", "policy": "trusted", "workspace": { "path": "/root" } }).to_string(),
    );
    assert_eq!(
        (answer.status, &answer.json()["error"]["code"]),
        (400, &json!("workspace")),
        "{}",
        answer.body
    );

    // On the command line a path is resolved first; what is wrong with it is said before anything is sent.
    for (path, word) in [("missing", "No such file"), ("file", "not a directory")] {
        let (code, _, said) = world.run(&["run", "x", "-w", base.join(path).to_str().unwrap()]);
        assert!(code == 2 && said.contains(word) && said.contains(path), "{code} {said}");
    }
    assert_eq!(world.sql("SELECT count(*) FROM jobs"), "0");
    world.end();
}

/// An image of a few made-up files, loaded into the engine; its name.
fn load_image(world: &World, name: &str, arch: &str, files: &[(&str, &[u8])]) -> String {
    fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o755);
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, name, *content).unwrap();
        }
        builder.into_inner().unwrap()
    }
    let tag = format!(
        "hotcell-test-{}-{name}:1",
        world.dir.path().file_name().unwrap().to_string_lossy().to_lowercase()
    );
    let layer = tar(files);
    let hex: String = Sha256::digest(&layer).iter().map(|b| format!("{b:02x}")).collect();
    let config = json!({
        "architecture": arch, "os": "linux", "created": "2026-01-01T00:00:00Z", "config": { "Cmd": ["/none"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{hex}")] },
    });
    let manifest = json!([{ "Config": "config.json", "RepoTags": [tag], "Layers": ["layer.tar"] }]);
    let whole = tar(&[
        ("config.json", config.to_string().as_bytes()),
        ("manifest.json", manifest.to_string().as_bytes()),
        ("layer.tar", &layer),
    ]);
    let path = world.path(&format!("{name}.tar"));
    std::fs::write(&path, whole).unwrap();
    docker(&["load", "-q", "-i", path.to_str().unwrap()]);
    tag
}

/// Runs a job with `hotcell run --json`: its exit code and the job at the end.
pub(crate) fn run(world: &World, spec: &Value) -> (i32, Vec<Value>, Value) {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let path = world.path(&format!("spec-{}.json", NUMBER.fetch_add(1, Ordering::Relaxed)));
    std::fs::write(&path, spec.to_string()).unwrap();
    let (code, stdout, stderr) = world.run(&["run", "--json", "--spec", path.to_str().unwrap()]);
    let mut lines: Vec<Value> = stdout
        .lines()
        .map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}\n{stderr}")))
        .collect();
    let job = lines.pop().and_then(|last| last.get("job").cloned());
    (code, lines, job.unwrap_or_else(|| panic!("the last line is not the job:\n{stdout}\n{stderr}")))
}

/// Checks a failed job; gives its message.
#[track_caller]
pub(crate) fn failed(job: &Value, phase: &str, reason: &str, blame: &str) -> String {
    assert_eq!(job["outcome"], "failed", "{job}");
    let found = ["phase", "reason", "blame"].map(|key| job[key].as_str().unwrap_or("").to_owned());
    assert_eq!(found, [phase, reason, blame], "{job}");
    job["message"].as_str().expect("a message").to_owned()
}

#[test]
fn an_image_that_no_agent_can_work_in_is_named() {
    let mut world = World::without_daemon(SCRIPT, "");
    world.set_images();
    world.start();
    let (x64, arm64) = ("amd64", "arm64");
    let program = std::fs::read(init_binary()).unwrap();
    let no_shell = load_image(&world, "no-shell", x64, &[("prog", &program)]);
    let no_libc = load_image(&world, "no-libc", x64, &[("bin/sh", &program)]);
    let musl = load_image(
        &world,
        "musl",
        x64,
        &[("bin/sh", &program), ("lib/ld-musl-x86_64.so.1", &program), ("etc/alpine-release", b"3.20\n")],
    );
    let foreign = load_image(
        &world,
        "foreign",
        arm64,
        &[("bin/sh", &program), ("lib/ld-linux-aarch64.so.1", &program)],
    );
    let unknown = "registry.invalid/no/such:image".to_owned();
    let spec = |image: &str| json!({ "prompt": "x", "policy": "trusted", "image": image });
    for (image, reason, blame, words) in [
        (&no_shell, "image_unsuitable", "job", ["/bin/sh", "sha256:"]),
        (&no_libc, "image_unsuitable", "job", ["neither glibc nor musl", &no_libc]),
        (&musl, "agent_missing", "host", ["x64-musl", "hotcell agent install 2.1.197 --libc musl"]),
        (&foreign, "image_unavailable", "host", ["arm64", "the engine runs"]),
        (&unknown, "image_unavailable", "host", ["registry.invalid/no/such:image", ""]),
    ] {
        let (code, _, job) = run(&world, &spec(image));
        let message = failed(&job, "prepare", reason, blame);
        assert_eq!(code, 1, "{message}");
        assert!(words.iter().all(|w| message.contains(w)), "{message}");
        assert_eq!((&job["cost_usd"], &job["cell"]), (&json!(0.0), &Value::Null), "{job}");
    }
    let (code, _, job) = run(&world, &spec("NOT A NAME"));
    let message = failed(&job, "prepare", "image_unavailable", "host");
    assert!(code == 1 && message.contains("NOT A NAME"), "{message}");
    let (code, _, job) = run(&world, &json!({ "prompt": "x", "agent": "9.9.9" }));
    let message = failed(&job, "prepare", "agent_missing", "host");
    assert!(code == 1 && message.contains("hotcell agent install 9.9.9"), "{message}");
    for image in [no_shell, no_libc, musl, foreign] {
        docker(&["rmi", "-f", &image]);
    }
    world.end();
}

impl World {
    /// Gives this world a record of images of its own; its file.
    fn set_images(&self) -> PathBuf {
        let dir = self.state_dir().join("images");
        let record = std::fs::read(dir.join("cell.json")).unwrap();
        std::fs::remove_file(&dir).unwrap();
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("cell.json"), record).unwrap();
        dir.join("cell.json")
    }

    /// Gives this world agents of its own: the real one, and made-up ones by version. `None`: a bundle
    /// without its program.
    pub(crate) fn set_agents(&self, made_up: &[(&str, Option<&str>)]) {
        let dir = self.state_dir().join("agents");
        let real = dir.canonicalize().unwrap();
        std::fs::remove_file(&dir).unwrap();
        std::fs::create_dir(&dir).unwrap();
        let name = "2.1.197-x64-gnu";
        symlink(real.join(name), dir.join(name)).unwrap();
        let bundle = std::fs::read_to_string(real.join(name).join("bundle.json")).unwrap();
        for (version, program) in made_up {
            let own = dir.join(format!("{version}-x64-gnu"));
            std::fs::create_dir(&own).unwrap();
            std::fs::write(own.join("bundle.json"), bundle.replace("2.1.197", version)).unwrap();
            if let Some(program) = program {
                std::fs::write(own.join("claude"), program).unwrap();
                // Unlike the real one it is a script, which its interpreter must be able to read.
                std::fs::set_permissions(
                    own.join("claude"),
                    PermissionsExt::from_mode(if program.starts_with("#!") { 0o755 } else { 0o644 }),
                )
                .unwrap();
            }
        }
    }
}

/// Answers to the two requests of the daemon, as a shell function.
const ANSWER: &str = r#"#!/bin/sh
answer() { printf '{"type":"control_response","response":{"subtype":"%s","request_id":"%s","error":"I would rather not","response":{}}}\n' "$1" "$2"; }
"#;

#[test]
fn a_cli_that_misbehaves_is_told_from_one_that_fails() {
    let world = World::without_daemon(SCRIPT, "[limits]\nslots = 3\n");
    let ready = format!("{ANSWER}answer success hotcell-initialize; answer success hotcell-settings\n");
    let refusing =
        format!("{ANSWER}answer success hotcell-initialize; answer error hotcell-settings; sleep 100\n");
    let silent_end = format!("{ready}exit 0\n");
    let result = r#"{"type":"result","subtype":"success","is_error":false,"result":"all is well"}"#;
    let bad_end = format!("{ready}echo '{result}'\necho 'a late thought' >&2\nexit 5\n");
    let lines =
        format!("{ready}while :; do echo '{{\"type\":\"system\",\"subtype\":\"noise\"}}'; sleep 0.2; done\n");
    let garbage = "#!/bin/sh\nprintf 'Hello\\n{\"type\":\\n[]\\n\\377\\376\\000\\n{\"type\":5}\\n\\n'\necho oops >&2; exit 3\n";
    let mut world = world;
    world.set_agents(&[
        ("9.0.1", Some("#!/bin/sh\necho 'cannot open the frobnicator' >&2\nexit 7\n")),
        ("9.0.2", Some(garbage)),
        ("9.0.3", Some("#!/bin/sh\necho 'still thinking' >&2\nexec sleep 1000\n")),
        ("9.0.4", Some("#!/bin/sh\nexec tr '\\000' x < /dev/zero\n")),
        ("9.0.5", Some("#!/bin/sh\nexit 0\n")),
        ("9.0.6", Some(&silent_end)),
        ("9.0.7", Some(&refusing)),
        ("9.0.8", None),
        ("9.0.9", Some("#!/bin/sh\nkill -SEGV $$\n")),
        ("9.1.0", Some("this is no program\n")),
        ("9.1.1", Some(&bad_end)),
        ("9.1.2", Some(&lines)),
    ]);
    world.start();
    let job = |version: &str| json!({ "prompt": "x", "agent": version });
    // Version; phase, reason, blame; words of the message.
    let cases = [
        ("9.0.3", ["boot", "agent_start", "job"], &["not get ready within 60 s", "still thinking"][..]),
        ("9.0.1", ["boot", "agent_start", "job"], &["code 7", "cannot open the frobnicator"][..]),
        ("9.0.2", ["boot", "agent_start", "job"], &["code 3", "oops"][..]),
        ("9.0.4", ["boot", "agent_protocol", "job"], &["8388608 bytes"][..]),
        ("9.0.5", ["boot", "agent_start", "job"], &["code 0 before it was ready"][..]),
        ("9.0.6", ["run", "agent_error", "job"], &["code 0 and without a result"][..]),
        ("9.0.7", ["boot", "agent_protocol", "job"], &["hotcell-settings", "I would rather not", "gate"][..]),
        ("9.0.8", ["prepare", "agent_missing", "host"], &["9.0.8", "hotcell agent install 9.0.8"][..]),
        ("9.0.9", ["boot", "agent_start", "job"], &["code 139"][..]),
        ("9.1.0", ["boot", "agent_start", "job"], &["could not be started", "errno 13"][..]),
        ("9.1.1", ["run", "agent_error", "job"], &["code 5", "a late thought"][..]),
    ];
    std::thread::scope(|scope| {
        for (version, [phase, reason, blame], words) in cases {
            let (world, spec) = (&world, job(version));
            scope.spawn(move || {
                let (code, events, job) = run(world, &spec);
                let message = failed(&job, phase, reason, blame);
                assert_eq!(code, 1, "{version}: {message}");
                assert!(words.iter().all(|w| message.contains(w)), "{version}: {message}");
                assert_eq!(job["cost_usd"], 0.0);
                if version == "9.0.2" {
                    let output = events.iter().filter(|e| e["type"] == "output" && e["stream"] == "stdout");
                    let text: Vec<&str> = output.map(|e| e["text"].as_str().unwrap()).collect();
                    assert!(
                        text.contains(&"Hello") && text.contains(&"[]"),
                        "what it printed is kept: {text:?}"
                    );
                }
            });
        }
        let (world, spec) = (&world, json!({ "prompt": "x", "agent": "9.1.2", "limits": { "wall_s": 4 } }));
        scope.spawn(move || {
            let (code, events, job) = run(world, &spec);
            assert_eq!(
                (code, &job["outcome"], &job["reason"]),
                (3, &json!("stopped"), &json!("deadline")),
                "{job}"
            );
            assert!(events.iter().filter(|e| e["type"] == "frame").count() > 5);
        });
    });
    // The same for people: what happened, whose fault, what to do next.
    let (code, stdout, _) = world.run(&["run", "x", "--agent", "9.0.1"]);
    assert_eq!(code, 1);
    for words in ["failed in boot (agent_start)", "cannot open the frobnicator", "fault: the job", "hint:"] {
        assert!(stdout.contains(words), "{stdout}");
    }
    world.end();
}

/// A unix socket in front of the engine's that can be cut and mended.
pub(crate) struct Cable {
    pub(crate) path: PathBuf,
    cut: Arc<AtomicBool>,
    lines: Arc<Mutex<Vec<UnixStream>>>,
}

impl Cable {
    pub(crate) fn lay(path: PathBuf) -> Self {
        let address = hotcell::engine::find_address(None).expect("an engine: run `make engine`");
        let engine = address.strip_prefix("unix://").unwrap().to_owned();
        let listener = UnixListener::bind(&path).unwrap();
        let cable = Self { path, cut: Arc::default(), lines: Arc::default() };
        let (cut, lines) = (cable.cut.clone(), cable.lines.clone());
        std::thread::spawn(move || {
            for here in listener.incoming() {
                let Ok(here) = here else { return };
                if cut.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(there) = UnixStream::connect(&engine) else { continue };
                let mut lines = lines.lock().unwrap();
                for (from, to) in [(&here, &there), (&there, &here)] {
                    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    std::thread::spawn(move || {
                        let mut buffer = [0; 65536];
                        while let Ok(n) = from.read(&mut buffer) {
                            if n == 0 || to.write_all(&buffer[..n]).is_err() {
                                break;
                            }
                        }
                        let _ = to.shutdown(std::net::Shutdown::Write);
                    });
                }
                lines.extend([here, there]);
            }
        });
        cable
    }

    fn set_cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::SeqCst);
        for line in self.lines.lock().unwrap().drain(..).filter(|_| cut) {
            let _ = line.shutdown(std::net::Shutdown::Both);
        }
    }
}

#[test]
fn a_job_outlives_an_engine_that_is_away_and_new_ones_are_told() {
    let mut world = World::without_daemon(SCRIPT, "");
    let cable = Cable::lay(world.path("engine.sock"));
    world.set_engine(&format!("unix://{}", cable.path.display()));
    world.start();
    let dir = world.workspace("work", 0);
    let job = world.submit(&json!({ "prompt": "work", "policy": "trusted", "workspace": { "path": dir } }));
    world.wait_for("its tool runs", |world| world.show(&job)["totals"]["charged_micro_usd"] != 0);
    cable.set_cut(true);

    // Before the daemon has noticed: the job is accepted, and waits. Afterwards it is refused.
    let waiting = world.submit(&json!({ "prompt": "too late", "policy": "trusted" }));
    world.wait_for("the daemon notices", |world| {
        world.call("GET", "/healthz", "").json()["status"] == "degraded"
    });
    let problems = world.call("GET", "/healthz", "").json()["problems"].to_string();
    assert!(problems.contains("engine.sock"), "{problems}");
    assert_eq!(world.run(&["health"]).0, 4);
    let (code, told, _) = world.run(&["doctor"]);
    assert!(code == 4 && told.contains("fails engine") && told.contains("engine.sock"), "{code} {told}");
    assert!(world.call("GET", "/metrics", "").body.contains("\nhotcell_engine_up 0\n"));
    let refused = world.call("POST", "/v1/jobs", &json!({ "prompt": "x" }).to_string());
    assert_eq!(
        (refused.status, &refused.json()["error"]["code"]),
        (503, &json!("engine_unavailable")),
        "{}",
        refused.body
    );
    let (code, _, stderr) = world.run(&["run", "x"]);
    assert!(code == 4 && stderr.contains("engine.sock") && stderr.contains("make engine"), "{code} {stderr}");

    assert_eq!(world.show(&job)["state"], "running", "a silent engine is no dead job: {}", world.show(&job));
    cable.set_cut(false);
    world.wait_for("the engine is back", |world| world.call("GET", "/healthz", "").json()["status"] == "ok");
    std::fs::write(dir.join("go"), "").unwrap();
    for job in [&job, &waiting] {
        world.follow(job);
        assert_eq!(world.show(job)["outcome"], "succeeded", "{}", world.show(job));
    }
    world.end();
}

#[test]
fn a_recorded_image_that_is_gone_says_how_to_make_it_again() {
    let mut world = World::without_daemon(SCRIPT, "");
    let file = world.set_images();
    let mut record: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let gone = format!("sha256:{}", "0".repeat(64));
    record["id"] = json!(gone);
    std::fs::write(&file, record.to_string()).unwrap();
    world.start();
    let (code, _, job) = run(&world, &json!({ "prompt": "x" }));
    let message = failed(&job, "prepare", "image_unavailable", "host");
    assert_eq!(code, 1);
    assert!(message.contains(&gone) && message.contains("hotcell image build"), "{message}");
    world.end();
}

/// `hotcell serve` that is expected to end by itself.
fn serve(world: &World, args: &[&str], more: &[(&str, &str)]) -> (i32, String) {
    let mut command = world.hotcell();
    command.arg("serve").args(args).envs(more.iter().copied()).stdin(Stdio::null());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("hotcell");
    let until = std::time::Instant::now() + crate::world::PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if std::time::Instant::now() > until {
            child.kill().unwrap();
            panic!("a daemon that must not start serves: {args:?} {more:?}");
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let output = child.wait_with_output().unwrap();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn one_state_directory_and_one_socket_have_one_daemon() {
    let world = World::new(SCRIPT);
    let pid = std::fs::read_to_string(world.state_dir().join("lock")).unwrap();
    let (code, said) = serve(&world, &["--socket", world.path("other").to_str().unwrap()], &[]);
    assert!(
        code != 0 && said.contains(pid.trim()) && said.contains(world.state_dir().to_str().unwrap()),
        "{code} {said}"
    );
    assert!(!world.path("other").exists(), "a daemon that did not start leaves a socket");
    let (code, said) = serve(&world, &["--state-dir", world.path("state-2").to_str().unwrap()], &[]);
    assert!(
        code != 0 && said.contains("already serves") && said.contains(world.socket().to_str().unwrap()),
        "{said}"
    );
    std::fs::write(world.path("plain"), "precious").unwrap();
    let (code, said) = serve(
        &world,
        &[
            "--state-dir",
            world.path("state-3").to_str().unwrap(),
            "--socket",
            world.path("plain").to_str().unwrap(),
        ],
        &[],
    );
    assert!(code != 0 && said.contains("not a socket"), "{said}");
    assert_eq!(std::fs::read_to_string(world.path("plain")).unwrap(), "precious");
    let (code, said) = serve(
        &world,
        &[
            "--state-dir",
            world.path("state-4").to_str().unwrap(),
            "--socket",
            world.path("s4").to_str().unwrap(),
            "--engine",
            "unix:///no/engine.sock",
        ],
        &[],
    );
    assert!(code != 0 && said.contains("/no/engine.sock"), "{code} {said}");
    // The first one never noticed.
    assert_eq!(world.call("GET", "/healthz", "").json()["status"], "ok");
    world.end();
}

#[test]
fn a_configuration_error_names_file_line_key_variable_and_flag() {
    let world = World::without_daemon(SCRIPT, "");
    let file = world.path("bad.toml");
    let name = file.to_str().unwrap();
    let with = |text: &str| {
        std::fs::write(&file, text).unwrap();
        serve(&world, &["--config", name], &[])
    };
    for (text, words) in [
        ("state_dir = \"/x\"\n\nsoket = \"/y\"\n", &["bad.toml", "soket", "line 3"][..]),
        ("[limits]\nslots = \"two\"\n", &["bad.toml", "slots", "line 2"]),
        ("state_dir = ", &["bad.toml", "line 1"]),
        (
            "\n[limits]\nslots = 0\n",
            &["limits.slots", "bad.toml, line 3", "HOTCELL_LIMITS_SLOTS", "--limits-slots", "1 to 4096"],
        ),
        (
            "socket_mode = \"0999\"\n",
            &["socket_mode", "line 1", "HOTCELL_SOCKET_MODE", "--socket-mode", "octal"],
        ),
        ("state_dir = \"here\"\n", &["state_dir", "absolute", "HOTCELL_STATE_DIR", "--state-dir"]),
        ("metrics = \"everywhere\"\n", &["metrics", "port", "HOTCELL_METRICS", "--metrics"]),
        (
            "[provider.anthropic]\nbase_url = \"ftp://x\"\n",
            &["provider.anthropic.base_url", "line 2", "https://"],
        ),
    ] {
        let (code, said) = with(text);
        assert_eq!(code, 2, "{text}\n{said}");
        for word in words {
            assert!(said.contains(word), "{text}\n{said}\ndoes not say {word:?}");
        }
    }
    let (code, said) = serve(&world, &["--limits-slots", "many"], &[]);
    assert!(code == 2 && said.contains("limits.slots") && said.contains("from --limits-slots"), "{said}");
    let (code, said) = serve(&world, &[], &[("HOTCELL_LIMITS_SLOTS", "-1")]);
    assert!(code == 2 && said.contains("from HOTCELL_LIMITS_SLOTS"), "{said}");
    let (code, said) = serve(&world, &["--config", "/no/such.toml"], &[]);
    assert!(code == 2 && said.contains("/no/such.toml"), "{said}");
    // A credential that is not there, and one that others can read.
    let (code, said) = serve(&world, &["--provider-anthropic-api-key-file", "/no/key"], &[]);
    assert!(code != 0 && said.contains("/no/key"), "{code} {said}");
    let (code, said) = serve(&world, &["--defaults-policy", "nope"], &[]);
    assert!(code != 0 && said.contains("defaults.policy") && said.contains("nope"), "{code} {said}");
    world.end();
}
