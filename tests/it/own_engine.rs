//! An engine for one test: a dockerd of its own with its own containerd, network namespace, images and directory, so
//! that it can be killed, stopped for a while and started again. It ends with its value, and nothing of it is left.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::world::{World, base_dir, docker, mounts_below};

/// Longest wait for it to answer or to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// A dockerd.
pub(crate) struct OwnEngine {
    dir: tempfile::TempDir,
    child: Option<Child>,
}

impl OwnEngine {
    /// One that answers and has the image of cells. `live_restore`: containers go on while it is away.
    pub(crate) fn start(live_restore: bool) -> Self {
        let dir = tempfile::Builder::new().prefix("hc-engine-").tempdir_in(base_dir()).unwrap();
        // A file of its own: the machine's may contradict the options.
        fs::write(dir.path().join("config.json"), "{}").unwrap();
        let mut engine = Self { dir, child: None };
        engine.launch(live_restore);
        engine.load();
        engine
    }

    /// Its address.
    pub(crate) fn address(&self) -> String {
        format!("unix://{}", self.path("s").display())
    }

    /// The docker client on it.
    pub(crate) fn docker(&self, args: &[&str]) -> String {
        let output = Command::new("docker").args(["-H", &self.address()]).args(args).output().unwrap();
        assert!(output.status.success(), "docker {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// SIGKILL. Its containerd goes with it; shims and containers stay.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().expect("a dockerd");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Starts it after a kill, and waits until it answers.
    pub(crate) fn launch(&mut self, live_restore: bool) {
        let log = fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        let mut command = Command::new("unshare");
        // Without a network namespace of its own it would take away or share the machine's docker0.
        command.args(["--net", "dockerd", "--bridge=none", "--iptables=false", "--config-file"]);
        command.arg(self.path("config.json")).args(["--host", &self.address()]);
        for (option, name) in [("--data-root", "data"), ("--exec-root", "exec"), ("--pidfile", "pid")] {
            command.arg(option).arg(self.path(name));
        }
        if live_restore {
            command.arg("--live-restore");
        }
        // What a dead one left: it does not start over it where the process id is another's by now.
        let _ = fs::remove_file(self.path("pid"));
        let paths = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
        command.env("PATH", paths).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(command.spawn().expect("unshare"));
        let until = Instant::now() + PATIENCE;
        while !self.answers() {
            if let Some(ended) = self.child.as_mut().unwrap().try_wait().unwrap() {
                panic!("dockerd ended ({ended}):\n{}", self.log());
            }
            assert!(Instant::now() < until, "dockerd does not answer:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn answers(&self) -> bool {
        let Ok(mut socket) = UnixStream::connect(self.path("s")) else { return false };
        let mut answer = [0; 12];
        let _ = socket.set_read_timeout(Some(Duration::from_secs(5)));
        socket.write_all(b"GET /_ping HTTP/1.0\r\nHost: engine\r\n\r\n").is_ok()
            && socket.read_exact(&mut answer).is_ok()
            && answer.ends_with(b"200")
    }

    /// The cells' image, from the tests' engine.
    fn load(&self) {
        let names = docker(&["images", "--format", "{{.Repository}}:{{.Tag}}", "hotcell/cell"]);
        let shared = hotcell::engine::find_address(None).expect("an engine: run `make engine`");
        let mut save = Command::new("docker");
        save.args(["-H", &shared, "save"]).args(names.split_whitespace()).stdout(Stdio::piped());
        let mut save = save.spawn().expect("docker");
        let tar = save.stdout.take().unwrap();
        let load = Command::new("docker").args(["-H", &self.address(), "load", "-q"]).stdin(tar).output();
        let load = load.expect("docker");
        assert!(load.status.success(), "docker load: {}", String::from_utf8_lossy(&load.stderr));
        assert!(save.wait().unwrap().success(), "docker save {names:?}");
    }

    /// What it has logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().expect("a dockerd").id()
    }

    /// The process of its containerd; dockerd starts a new one some seconds after its end.
    pub(crate) fn containerd(&self) -> Option<u32> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().flatten();
        let children = tasks.map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default());
        let children: Vec<u32> = children.flat_map(|list| pids(&list)).collect();
        let name = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        children.into_iter().find(|pid| name(pid).trim() == "containerd")
    }

    /// The process of the shim that holds a container.
    pub(crate) fn shim(&self, container: &str) -> Option<u32> {
        let of = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = line.split(|byte| *byte == 0);
            words.next().is_some_and(|program| program.ends_with(b"containerd-shim-runc-v2"))
                && words.any(|word| word == container.as_bytes())
        };
        all_pids().into_iter().find(of)
    }

    /// How many processes there are of it beside itself and its containerd.
    pub(crate) fn shims(&self) -> usize {
        let dir = self.dir.path().as_os_str().as_encoded_bytes().to_vec();
        let own = [Some(self.pid()), self.containerd()];
        let names_it = |pid: &u32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.windows(dir.len()).any(|part| part == dir)
        };
        all_pids().into_iter().filter(|pid| !own.contains(&Some(*pid))).filter(names_it).count()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Removes all containers and ends dockerd; a dead one is started for it, since only it knows what is left.
    fn take_down(&mut self) {
        if self.child.as_mut().is_none_or(|child| child.try_wait().is_ok_and(|ended| ended.is_some())) {
            self.launch(false);
        }
        signal(self.pid(), Signal::CONT);
        let ids = self.docker(&["ps", "-aq"]);
        for id in ids.split_whitespace() {
            self.docker(&["rm", "-f", id]);
        }
        signal(self.pid(), Signal::TERM);
        let mut child = self.child.take().unwrap();
        let until = Instant::now() + PATIENCE;
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > until {
                child.kill().unwrap();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for OwnEngine {
    fn drop(&mut self) {
        let down = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.take_down()));
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let mounts = mounts_below(self.dir.path());
        for point in mounts.iter().rev() {
            let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
        }
        if down.is_err() && !std::thread::panicking() {
            panic!("the test's engine does not end:\n{}", self.log());
        }
    }
}

/// A world whose daemon uses the engine; not started yet.
pub(crate) fn world_on(engine: &OwnEngine, script: &str, more: &str) -> World {
    let mut world = World::without_daemon(script, more);
    world.set_own_engine(&engine.address());
    world
}

/// A signal to a process.
pub(crate) fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
}

/// All processes of this machine.
pub(crate) fn all_pids() -> Vec<u32> {
    let names = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.to_str()?.parse().ok()).collect()
}

fn pids(list: &str) -> Vec<u32> {
    list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}
