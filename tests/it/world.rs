//! A world for one test: a daemon of its own (the real binary, so that it can be killed), a state directory
//! of its own, and a scripted model in this process that remembers what reached it. [`World::end`] proves
//! that nothing is left: no container, mount, loop device, socket, cell directory or open reservation.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hotcell::model::{Recorder, Script, serve};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub(crate) use crate::place::{base_dir, docker, init_binary, mounts_below};
use crate::place::{docker_at, share};

/// Longest wait for anything that a test waits for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

/// The program under test.
const HOTCELL: &str = env!("CARGO_BIN_EXE_hotcell");

/// The credential that must be found nowhere inside a cell.
pub(crate) const CANARY: &str = "sk-canary-7f3a9c51d2e84b06";

/// What a world is made of.
pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) recorder: Arc<Recorder>,
    runtime: tokio::runtime::Runtime,
    stop: CancellationToken,
    daemon: Option<Child>,
    base_url: String,
    more: String,
    engine: Option<String>,
    /// It is another engine altogether, and not another way to the tests' own.
    own_engine: bool,
    /// More variables of the daemon's environment, from its next start on.
    pub(crate) daemon_env: Vec<(String, String)>,
    /// More flags of `hotcell serve`, from its next start on.
    pub(crate) daemon_args: Vec<String>,
    /// Whom the daemon runs as, from its next start on, where that is not root.
    pub(crate) daemon_uid: Option<u32>,
    /// Most descriptors the daemon may have, from its next start on.
    pub(crate) descriptors_max: Option<u64>,
    /// The socket that it is handed over as systemd does, from its next start on.
    pub(crate) handed_over: Option<std::os::fd::OwnedFd>,
}

/// One answer of the daemon.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("no JSON ({e}): {}", self.body))
    }
}

impl World {
    /// A world whose model follows `script`.
    pub(crate) fn new(script: &str) -> Self {
        Self::with(script, "")
    }

    /// The same with more lines at the top of the daemon's configuration file (tables come after them).
    pub(crate) fn with(script: &str, more: &str) -> Self {
        let mut world = Self::without_daemon(script, more);
        world.start();
        world
    }

    /// A world whose daemon is not started yet.
    pub(crate) fn without_daemon(script: &str, more: &str) -> Self {
        let script = Arc::new(Script::parse(script, "test").expect("the test's script"));
        let dir = tempfile::Builder::new().prefix("hc-").tempdir_in(base_dir()).expect("temporary directory");
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let recorder = Arc::new(Recorder::memory());
        let stop = CancellationToken::new();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("loopback");
        let base_url = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(serve(listener, script, recorder.clone(), stop.clone()));
        let world = Self {
            dir,
            recorder,
            runtime,
            stop,
            daemon: None,
            base_url,
            more: more.to_owned(),
            engine: None,
            own_engine: false,
            daemon_env: Vec::new(),
            daemon_args: Vec::new(),
            daemon_uid: None,
            descriptors_max: None,
            handed_over: None,
        };
        world.write_config();
        share(&world.state_dir());
        world
    }

    fn write_config(&self) {
        let key = self.path("key");
        std::fs::write(&key, CANARY).unwrap();
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
        let config = format!(
            "state_dir = {:?}\nsocket = {:?}\nsocket_mode = \"0666\"\ninit_binary = {:?}\n{}\n\
             [provider.anthropic]\nbase_url = {:?}\napi_key_file = {:?}\n",
            self.state_dir(),
            self.socket(),
            init_binary(),
            self.more,
            self.base_url,
            key
        );
        std::fs::write(self.path("config.toml"), config).unwrap();
    }

    /// Another provider, for the next start of the daemon.
    pub(crate) fn set_provider(&mut self, base_url: &str) {
        base_url.clone_into(&mut self.base_url);
        self.write_config();
    }

    /// Another address of the engine, for the next start of the daemon.
    pub(crate) fn set_engine(&mut self, address: &str) {
        self.engine = Some(address.to_owned());
    }

    /// Another engine, for the next start of the daemon.
    pub(crate) fn set_own_engine(&mut self, address: &str) {
        (self.engine, self.own_engine) = (Some(address.to_owned()), true);
    }

    /// The docker client on this world's engine.
    pub(crate) fn docker(&self, args: &[&str]) -> String {
        docker_at(self.engine.as_deref().filter(|_| self.own_engine), args)
    }

    /// Starts the daemon and waits until it answers.
    pub(crate) fn start(&mut self) {
        self.launch();
        self.wait_for("the daemon answers", |world| {
            if let Some(ended) = world.daemon.as_mut().and_then(|d| d.try_wait().unwrap()) {
                panic!("the daemon ended ({ended}):\n{}", world.log());
            }
            world.try_call("GET", "/healthz", "").is_some_and(|a| a.status == 200)
        });
    }

    /// Starts a daemon that may get SIGKILL at any time: whether it came to answer.
    pub(crate) fn start_or_be_killed(&mut self) -> bool {
        self.launch();
        let mut killed = false;
        self.wait_for("the daemon answers or is dead", |world| {
            killed = world.was_killed();
            killed || world.try_call("GET", "/healthz", "").is_some_and(|a| a.status == 200)
        });
        !killed
    }

    /// Whether the daemon got SIGKILL; any other end of it is a fault.
    pub(crate) fn was_killed(&mut self) -> bool {
        use std::os::unix::process::ExitStatusExt;
        let Some(daemon) = self.daemon.as_mut() else { return true };
        let Some(ended) = daemon.try_wait().unwrap() else { return false };
        assert_eq!(ended.signal(), Some(9), "the daemon ended ({ended}):\n{}", self.log());
        self.daemon = None;
        true
    }

    pub(crate) fn launch(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        let (mut command, stdin) = match &self.handed_over {
            None => (self.hotcell(), Stdio::null()),
            Some(socket) => {
                // Only the process itself knows its id.
                let mut sh = self.program("/bin/sh");
                sh.args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\" 3<&0 </dev/null"]);
                sh.arg(HOTCELL);
                (sh, socket.try_clone().unwrap().into())
            }
        };
        command
            .envs(self.daemon_env.iter().cloned())
            .args(["serve", "--log", "info,hotcell=debug"])
            .args(&self.daemon_args)
            .stdin(stdin)
            .stdout(Stdio::null())
            .stderr(log);
        if let Some(uid) = self.daemon_uid {
            std::os::unix::process::CommandExt::uid(&mut command, uid);
            std::os::unix::process::CommandExt::gid(&mut command, uid);
        }
        if let Some(max) = self.descriptors_max {
            let limit = rustix::process::Rlimit { current: Some(max), maximum: Some(max) };
            let set = move || Ok(rustix::process::setrlimit(rustix::process::Resource::Nofile, limit)?);
            // SAFETY: between fork and exec it makes one system call and touches no memory.
            unsafe { std::os::unix::process::CommandExt::pre_exec(&mut command, set) };
        }
        let child = command.spawn().expect("hotcell serve");
        self.daemon = Some(child);
    }

    /// Starts a daemon that must end by itself with an error: its log.
    pub(crate) fn refuses_to_start(&mut self) -> String {
        self.launch();
        let mut daemon = self.daemon.take().unwrap();
        let until = Instant::now() + PATIENCE;
        while daemon.try_wait().unwrap().is_none() {
            assert!(Instant::now() < until, "the daemon does not end:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(!daemon.wait().unwrap().success(), "{}", self.log());
        self.log()
    }

    /// kill -9 of the daemon.
    pub(crate) fn kill(&mut self) {
        let mut daemon = self.daemon.take().expect("a daemon");
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// The daemon's process.
    pub(crate) fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("a daemon").id()
    }

    /// SIGTERM to the daemon, which goes on for a while.
    pub(crate) fn signal(&self) {
        self.send(rustix::process::Signal::TERM);
    }

    /// A signal to the daemon.
    pub(crate) fn send(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(self.daemon.as_ref().expect("a daemon"));
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// SIGTERM to the daemon; it must end by itself, with code 0.
    pub(crate) fn terminate(&mut self) {
        if self.daemon.is_some() {
            self.signal();
            self.ended();
        }
    }

    /// Waits until the daemon has ended by itself, with code 0.
    pub(crate) fn ended(&mut self) {
        let Some(mut daemon) = self.daemon.take() else { return };
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = daemon.try_wait().unwrap() {
                assert!(status.success(), "the daemon ended with {status}:\n{}", self.log());
                return;
            }
            assert!(Instant::now() < until, "the daemon does not end:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends the world and proves that nothing is left of it.
    pub(crate) fn end(mut self) {
        self.nothing_left();
        self.terminate();
        assert!(!self.socket().exists(), "the socket is left");
        self.stop.cancel();
        let reserved = self.sql("SELECT count(*) FROM ledger WHERE status = 'open'");
        assert_eq!(reserved, "0", "a reservation is left");
    }

    /// No container, mount, loop device or cell directory. Waits a moment for the last clean-up.
    pub(crate) fn nothing_left(&mut self) {
        self.wait_for("no job runs", |world| {
            world.sql("SELECT count(*) FROM jobs WHERE state NOT IN ('done', 'queued')") == "0"
        });
        let instance = self.instance();
        let filter = format!("label=hotcell.instance={instance}");
        let left = self.docker(&["ps", "-aq", "--filter", &filter]);
        assert_eq!(left.trim(), "", "containers are left");
        let state = self.state_dir().canonicalize().unwrap();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mine: Vec<&str> = mounts.lines().filter(|l| l.contains(&*state.to_string_lossy())).collect();
        assert!(mine.is_empty(), "mounts are left: {mine:#?}");
        for entry in std::fs::read_dir("/sys/block").unwrap().flatten() {
            let file = std::fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
            assert!(
                !file.starts_with(&*state.to_string_lossy()),
                "a loop device is left: {file}\n{}",
                self.log()
            );
        }
        let cells: Vec<_> =
            std::fs::read_dir(state.join("cells")).unwrap().flatten().map(|e| e.path()).collect();
        assert!(cells.is_empty(), "cells are left: {cells:?}");
        let kept: Vec<_> = std::fs::read_dir(state.join("kept")).into_iter().flatten().flatten().collect();
        assert!(kept.is_empty(), "kept scratch spaces are left: {kept:?}");
        let read: Vec<_> = std::fs::read_dir(state.join("reading")).into_iter().flatten().flatten().collect();
        assert!(read.is_empty(), "scratch spaces that were read are left: {read:?}");
        self.change_sets_are_whole(&state);
    }

    /// Beside each job that has one: its listing, its change set, its contents, what was decided; nothing half done,
    /// and nothing of jobs that are gone.
    fn change_sets_are_whole(&self, state: &Path) {
        let list = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten().collect::<Vec<_>>();
        for shelf in list(&state.join("changes")) {
            let job = shelf.file_name().to_string_lossy().into_owned();
            assert_eq!(
                self.sql(&format!("SELECT count(*) FROM jobs WHERE id = '{job}'")),
                "1",
                "{job} is gone"
            );
            let contents = list(&shelf.path().join("blobs"));
            for entry in list(&shelf.path()).into_iter().chain(contents) {
                let name = entry.file_name().to_string_lossy().into_owned();
                let known = [
                    "base",
                    "changes.json",
                    "blobs",
                    "origin.json",
                    "applied.json",
                    "discarded.json",
                    "copy.img",
                    "commits.json",
                    "quarantined.json",
                ]
                .contains(&name.as_str())
                    || (name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit()));
                assert!(known, "{} is left", entry.path().display());
            }
        }
    }

    fn remove_containers(&self) {
        let filter = format!("label=hotcell.instance={}", self.instance());
        for id in self.docker(&["ps", "-aq", "--filter", &filter]).split_whitespace() {
            self.docker(&["rm", "-f", id]);
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.path("state")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("s")
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub(crate) fn instance(&self) -> String {
        self.sql("SELECT value FROM meta WHERE key = 'instance'")
    }

    /// One value from the store, read beside the daemon.
    pub(crate) fn sql(&self, query: &str) -> String {
        let file = self.state_dir().join(hotcell::store::FILE_NAME);
        let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
        let db = rusqlite::Connection::open_with_flags(file, flags).expect("the store");
        let value = db.query_row(query, [], |row| row.get::<_, rusqlite::types::Value>(0)).expect(query);
        match value {
            rusqlite::types::Value::Integer(n) => n.to_string(),
            rusqlite::types::Value::Text(text) => text,
            other => format!("{other:?}"),
        }
    }

    /// The `hotcell` binary with this world's configuration and nothing of the caller's environment but the
    /// engine.
    pub(crate) fn hotcell(&self) -> Command {
        self.program(HOTCELL)
    }

    fn program(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let keep = ["PATH", "HOTCELL_ENGINE", "DOCKER_HOST", "SSL_CERT_FILE"];
        command.env_clear().envs(std::env::vars_os().filter(|(k, _)| keep.iter().any(|n| k == n)));
        command.env("HOME", "/root").env("HOTCELL_CONFIG", self.path("config.toml"));
        command.envs(self.engine.iter().map(|address| ("HOTCELL_ENGINE", address)));
        command
    }

    /// Runs a `hotcell` command: exit code, standard output, standard error.
    pub(crate) fn run(&self, args: &[&str]) -> (i32, String, String) {
        let output = self.hotcell().args(args).stdin(Stdio::null()).output().expect("hotcell");
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
    }

    /// One request, with curl: what a user without our client has.
    pub(crate) fn call(&self, method: &str, path: &str, body: &str) -> Answer {
        self.try_call(method, path, body)
            .unwrap_or_else(|| panic!("no answer to {method} {path}:\n{}", self.log()))
    }

    pub(crate) fn try_call(&self, method: &str, path: &str, body: &str) -> Option<Answer> {
        self.curl(method, path, body, &[], None)
    }

    /// The same with more of curl's arguments, and as another user where one is given.
    pub(crate) fn curl(
        &self,
        method: &str,
        path: &str,
        body: &str,
        more: &[&str],
        uid: Option<u32>,
    ) -> Option<Answer> {
        use std::os::unix::process::CommandExt;
        let mut command = Command::new("curl");
        command.args(["-sS", "--unix-socket"]).arg(self.socket()).args([
            "-X",
            method,
            "-w",
            "\n%{http_code}",
        ]);
        command.args(more).arg(format!("http://hotcell{path}"));
        if !body.is_empty() {
            command.args(["--data-binary", "@-", "-H", "content-type: application/json"]);
        }
        if let Some(uid) = uid {
            command.uid(uid).gid(uid);
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("curl");
        let mut stdin = child.stdin.take().unwrap();
        let body = body.to_owned();
        let writer = std::thread::spawn(move || {
            // curl may end without reading all: that is its answer's business.
            let _ = stdin.write_all(body.as_bytes());
        });
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (body, status) = text.rsplit_once('\n')?;
        let status = status.parse().ok().filter(|s| *s != 0)?;
        Some(Answer { status, body: body.to_owned() })
    }

    /// Submits a job and gives its id.
    pub(crate) fn submit(&self, spec: &Value) -> String {
        let answer = self.call("POST", "/v1/jobs", &spec.to_string());
        assert_eq!(answer.status, 201, "{}", answer.body);
        answer.json()["id"].as_str().expect("an id").to_owned()
    }

    /// The job as it is now.
    pub(crate) fn show(&self, job: &str) -> Value {
        self.call("GET", &format!("/v1/jobs/{job}"), "").json()
    }

    /// Follows a job to its end; its events.
    pub(crate) fn follow(&self, job: &str) -> Vec<Value> {
        let answer = self.call("GET", &format!("/v1/jobs/{job}/events?follow=1"), "");
        assert_eq!(answer.status, 200, "{}", answer.body);
        events(&answer.body)
    }

    /// Submits a job and follows it to its end: its events and its view.
    pub(crate) fn job(&self, spec: &Value) -> (Vec<Value>, Value) {
        let id = self.submit(spec);
        let events = self.follow(&id);
        (events, self.show(&id))
    }

    /// Waits for a condition.
    pub(crate) fn wait_for(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(Instant::now() < until, "waited in vain: {what}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A directory for a job, owned by `uid`.
    pub(crate) fn workspace(&self, name: &str, uid: u32) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir(&path).unwrap();
        std::os::unix::fs::chown(&path, Some(uid), Some(uid)).unwrap();
        path
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // A failed test: its processes must not outlive it. What it left on the engine is said by its failure.
        let daemon = self.daemon.take();
        let ever_ran = self.state_dir().join(hotcell::store::FILE_NAME).exists();
        if daemon.is_some() || (std::thread::panicking() && ever_ran) {
            if let Some(mut daemon) = daemon {
                let _ = daemon.kill();
                let _ = daemon.wait();
            }
            if ever_ran && !self.own_engine {
                self.remove_containers();
            }
            // The next daemon's sweep is what takes mounts down; here it is ours.
            let mut command = self.hotcell();
            let cleaner =
                command.args(["serve", "--log", "error"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
            if let Ok(mut cleaner) = cleaner {
                let until = Instant::now() + Duration::from_secs(20);
                while Instant::now() < until && self.try_call("GET", "/healthz", "").is_none() {
                    std::thread::sleep(Duration::from_millis(50));
                }
                let _ = rustix::process::kill_process(
                    rustix::process::Pid::from_child(&cleaner),
                    rustix::process::Signal::TERM,
                );
                let _ = cleaner.wait();
            }
            if self.own_engine {
                // It may be dead: no daemon starts then, and it removes its containers itself.
                for point in mounts_below(self.dir.path()).iter().rev() {
                    let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
                }
            }
        }
        self.stop.cancel();
        let _ = &self.runtime;
    }
}

/// NDJSON → values; numbers must be there without gaps.
pub(crate) fn events(body: &str) -> Vec<Value> {
    let events: Vec<Value> =
        body.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect();
    for pair in events.windows(2) {
        assert_eq!(
            pair[0]["seq"].as_u64().unwrap() + 1,
            pair[1]["seq"].as_u64().unwrap(),
            "a gap in the numbers"
        );
    }
    events
}

/// All text of tool results, in order.
pub(crate) fn tool_results(events: &[Value]) -> String {
    let frames = events.iter().filter(|e| e["type"] == "frame" && e["frame"]["type"] == "user");
    let blocks =
        frames.flat_map(|e| e["frame"]["message"]["content"].as_array().cloned().unwrap_or_default());
    let results = blocks.filter(|b| b["type"] == "tool_result");
    results
        .map(|b| match &b["content"] {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        })
        .collect::<Vec<_>>()
        .join("\n")
}

/// A script whose agent runs one shell command and then says that it is done.
pub(crate) fn one_command(command: &str) -> String {
    let input = json!({ "command": command, "description": "the test's command", "timeout": 60_000 });
    let toml: toml::Value = serde_json::from_value(input).unwrap();
    format!(
        "usage = {{ input = 10, output = 20 }}\n\
         [[reply]]\nwhen = {{ turn = 0, tools = true }}\nblocks = [{{ tool = \"Bash\", input = {toml} }}]\n\
         [default]\ntext = \"done\"\n"
    )
}
