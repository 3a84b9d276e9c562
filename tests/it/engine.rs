//! The engine for real: cells made by `Docker` on whatever engine `make engine` (or HOTCELL_ENGINE) offers. The
//! image is empty but for a few paths; PID 1 is `engine/probe.rs`, compiled here. Without an engine these
//! tests fail and say so. Each test ends by proving that no container and no image of its own is left.

#![allow(clippy::unwrap_used)] // a failed step fails its test

use std::collections::BTreeMap;
use std::future::Future;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use hotcell::engine::docker::Docker;
use hotcell::engine::{
    BOOT_BYTES_MAX, BindMount, BuildContext, BuildSpec, CellLimits, CellSpec, ContainerId, Engine,
    EngineError, ImageInfo, Progress, container_name, find_address,
};
use hotcell::job::{CellId, InstanceId};

/// Bounds every wait for something that should happen at once.
const PATIENCE: Duration = Duration::from_secs(60);

struct Bench {
    engine: Docker,
    address: String,
    instance: InstanceId,
    tag: String,
    image: ImageInfo,
    dir: tempfile::TempDir,
}

fn random() -> u64 {
    getrandom::u64().expect("random bytes")
}

/// The probe, compiled once per run of the tests.
fn probe() -> &'static Path {
    static PROBE: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = PROBE.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("probe");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/engine/probe.rs");
        let status = Command::new("rustc")
            .args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-o"])
            .arg(&path)
            .arg(source)
            .status()
            .expect("rustc runs");
        assert!(status.success(), "the probe does not compile");
        (dir, path)
    });
    path
}

fn rootfs_tar(path: &Path) {
    let mut tar = tar::Builder::new(std::fs::File::create(path).expect("a file"));
    let mut add = |name: &str, kind: tar::EntryType, link: &str| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o755);
        header.set_size(0);
        match kind {
            tar::EntryType::Symlink => tar.append_link(&mut header, name, link).expect("a link"),
            _ => tar.append_data(&mut header, name, std::io::empty()).expect("an entry"),
        }
    };
    add("etc/", tar::EntryType::Directory, "");
    add("lib/", tar::EntryType::Directory, "");
    add("lib/real", tar::EntryType::Regular, "");
    add("lib/link", tar::EntryType::Symlink, "real");
    add("lib64", tar::EntryType::Symlink, "lib");
    add("dangling", tar::EntryType::Symlink, "/nowhere");
    add("loop", tar::EntryType::Symlink, "loop");
    tar.finish().expect("a tar");
}

fn silent() -> Progress {
    tokio::sync::mpsc::channel(1).0
}

async fn bench() -> Bench {
    let address = find_address(None).unwrap_or_else(|e| panic!("these tests need a container engine: {e}"));
    let engine = Docker::connect(&address).await.unwrap_or_else(|e| panic!("{e}"));
    let instance = InstanceId::new(random());
    let dir = tempfile::tempdir().expect("a directory");
    let tar = dir.path().join("rootfs.tar");
    rootfs_tar(&tar);
    let tag = format!("hotcell-test:{instance}");
    let changes = ["ENV PATH=/here/bin".to_owned(), format!("LABEL test={instance}")];
    let image = engine.import(&tar, &tag, &changes, &silent()).await.expect("an image");
    let out = dir.path().join("out");
    std::fs::create_dir(&out).expect("a directory");
    std::fs::set_permissions(&out, PermissionsExt::from_mode(0o777)).expect("a mode");
    Bench { engine, address, instance, tag, image, dir }
}

/// Runs a test; then, whether it passed or not, removes what it left, and fails if that was anything.
async fn test<F: Future<Output = ()> + Send + 'static>(body: impl FnOnce(Arc<Bench>) -> F) {
    let bench = Arc::new(bench().await);
    let outcome = tokio::spawn(body(Arc::clone(&bench))).await;
    let left = bench.engine.list(&bench.instance).await.expect("a list");
    for found in &left {
        bench.engine.remove(&found.container).await.expect("removed");
    }
    bench.engine.remove_image(&bench.tag).await.expect("image removed");
    assert_eq!(bench.engine.image(&bench.tag).await.expect("an answer"), None);
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic.into_panic());
    }
    assert!(left.is_empty(), "containers left: {left:?}");
}

impl Bench {
    fn spec(&self, what: &str) -> CellSpec {
        let mount = |source: PathBuf, target: &str, read_only| BindMount {
            source,
            target: target.to_owned(),
            read_only,
        };
        CellSpec {
            instance: self.instance.clone(),
            cell: CellId::new(random()),
            image_id: self.image.id.clone(),
            user: (0x6000_0123, 0x6000_0124),
            groups: vec![0x6000_0125],
            limits: CellLimits { memory_bytes: 64 << 20, cpus_milli: 1000, pids_max: 32, nofile_max: 256 },
            mounts: vec![mount(probe().into(), "/.probe", true), mount(self.out(), "/out", false)],
            runtime: None,
            working_dir: "/out".to_owned(),
            argv: vec!["/.probe".to_owned(), what.to_owned()],
            env: vec![("HOME".to_owned(), "/out".to_owned())],
        }
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    async fn run(&self, what: &str, boot: &[u8]) -> ContainerId {
        let id = self.engine.create(&self.spec(what)).await.expect("created");
        self.engine.start(&id, boot).await.expect("started");
        id
    }

    /// The probe's report, once it is there.
    async fn report(&self) -> BTreeMap<String, String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Ok(text) = std::fs::read_to_string(self.out().join("report")) {
                let pairs = text.lines().filter_map(|line| line.split_once('='));
                return pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
            }
            assert!(Instant::now() < deadline, "the probe wrote no report");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// A request to the engine around our client; status line of the answer.
    fn raw(&self, method: &str, path: &str, body: &str) -> String {
        let socket = self.address.strip_prefix("unix://").expect("a unix address");
        let mut stream = UnixStream::connect(socket).expect("connected");
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.0\r\nHost: e\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answered");
        answer.lines().next().unwrap_or("").to_owned()
    }
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("this should have happened at once")
}

#[tokio::test]
async fn a_cell_is_locked_down_by_every_means_at_once() {
    test(|b| async move {
        let id = b.run("probe", b"").await;
        let exit = soon(b.engine.wait(&id)).await.unwrap();
        assert_eq!((exit.code, exit.error), (0, None), "{}", exit.stderr_tail);
        let report = b.report().await;
        b.engine.remove(&id).await.unwrap();
        let uids = ["1610613027"; 4].join(",");
        let gids = ["1610613028"; 4].join(",");
        let (eperm, enosys) = ("-1", "-38");
        let same = [
            ("pid", "1"),
            ("Seccomp", "2"),
            ("NoNewPrivs", "1"),
            ("CapEff", "0000000000000000"),
            ("CapBnd", "0000000000000000"),
            ("CapPrm", "0000000000000000"),
            ("Uid", uids.as_str()),
            ("Gid", gids.as_str()),
            ("net_devices", "lo"),
            ("resolv_conf", "nameserver 127.0.0.1"),
            ("proc_cmdline", ""),
            ("hostname", "cell"),
            ("oom_score_adj", "500"),
            ("write_root", "30"),
            ("write_sys", "30"),
            ("limit_core", "0/0"),
            ("limit_nofile", "256/256"),
            ("limit_memlock", "8388608/8388608"),
            ("unix", "0"),
            ("inet", "0"),
            ("inet6_udp", "0"),
            ("netlink_route", "0"),
            ("unshare_files", "0"),
            ("personality_query", "0"),
            ("chmod_plain", "0"),
            ("open_garbage_mode", "0"),
            ("mknod_fifo", "0"),
            ("ioctl_tcgets", "-25"),
            ("ioctl_fionbio", "-9"),
            ("clone3", enosys),
            ("openat2", enosys),
            ("io_uring_setup", enosys),
            ("memfd_secret", enosys),
            ("userfaultfd", enosys),
            ("no_such_call", enosys),
        ];
        for (name, expected) in same {
            assert_eq!(report.get(name).map(String::as_str), Some(expected), "{name}");
        }
        let denied = [
            "netlink_audit",
            "inet_icmp",
            "packet",
            "af_alg",
            "vsock",
            "vsock_high_bits",
            "ptrace",
            "process_vm_readv",
            "pidfd_getfd",
            "unshare_user",
            "setns",
            "clone_newuser",
            "bpf",
            "keyctl",
            "perf_event_open",
            "mount",
            "vmsplice",
            "personality_read_implies_exec",
            "ioctl_tiocsti",
            "ioctl_tiocsti_high_bits",
            "ioctl_tioclinux",
            "ioctl_tiocsetd",
            "chmod_setuid",
            "chmod_setgid",
            "open_setuid",
            "mknod_setuid",
            "mknod_whiteout",
        ];
        for name in denied {
            assert_eq!(report.get(name).map(String::as_str), Some(eperm), "{name}");
        }
        let groups: Vec<&str> = report["Groups"].split(',').collect();
        assert!(groups.contains(&"1610613029") && !groups.contains(&"0"), "{groups:?}");
        // Known to the runtime's libseccomp it is EPERM, unknown ENOSYS: refused either way.
        assert!(
            [eperm, enosys].contains(&report["fchmodat2_setuid"].as_str()),
            "{}",
            report["fchmodat2_setuid"]
        );
        assert_ne!(report["write_etc_hosts"], "0");
        if cfg!(target_arch = "x86_64") {
            let sigsys = "signal 31";
            assert_eq!((report["int80"].as_str(), report["x32"].as_str()), (sigsys, sigsys));
        }
    })
    .await;
}

#[tokio::test]
async fn boot_bytes_arrive_whole_and_the_exit_is_told() {
    test(|b| async move {
        let boot = vec![b'k'; BOOT_BYTES_MAX];
        let id = b.run("exit", &boot).await;
        let exit = soon(b.engine.wait(&id)).await.unwrap();
        assert_eq!((exit.code, exit.oom_killed, exit.error), (7, false, None));
        assert_eq!(exit.stderr_tail, "last words\n");
        let report = b.report().await;
        assert_eq!(
            (report["boot_bytes"].as_str(), report["pid"].as_str()),
            (BOOT_BYTES_MAX.to_string().as_str(), "1")
        );
        assert_eq!(soon(b.engine.wait(&id)).await.unwrap().code, 7, "a second wait answers at once");
        b.engine.remove(&id).await.unwrap();
        let refused = b.engine.start(&id, &vec![0; BOOT_BYTES_MAX + 1]).await;
        assert!(matches!(refused, Err(EngineError::BadSpec { .. })), "{refused:?}");
    })
    .await;
}

#[tokio::test]
async fn creating_a_cell_again_finds_it_and_never_takes_a_strangers() {
    test(|b| async move {
        let spec = b.spec("exit");
        let first = b.engine.create(&spec).await.unwrap();
        assert_eq!(b.engine.create(&spec).await.unwrap(), first);
        let named = container_name(&spec.instance, &spec.cell);
        assert_eq!(b.engine.state_pid(&named).await.unwrap(), None, "created, not started");
        b.engine.remove(&named).await.unwrap();

        let image = &b.image.id;
        let body = format!(
            r#"{{"Image":"{image}","Cmd":["/x"],"Labels":{{"hotcell.instance":"{}","hotcell.cell":"c00000000000z"}}}}"#,
            b.instance
        );
        let status = b.raw("POST", &format!("/containers/create?name={named}"), &body);
        assert!(status.contains("201"), "{status}");
        let taken = b.engine.create(&spec).await;
        assert!(matches!(taken, Err(EngineError::Conflict { .. })), "{taken:?}");
        b.engine.remove(&named).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_program_that_cannot_run_is_named() {
    test(|b| async move {
        let mut spec = b.spec("exit");
        spec.argv = vec!["/not-there".to_owned()];
        let id = b.engine.create(&spec).await.unwrap();
        let missing = b.engine.start(&id, b"").await.unwrap_err();
        assert!(
            matches!(&missing, EngineError::StartFailed { message } if message.contains("/not-there")),
            "{missing}"
        );
        b.engine.remove(&id).await.unwrap();

        let garbage = b.dir.path().join("garbage");
        std::fs::write(&garbage, "\x7fELF but not really").unwrap();
        std::fs::set_permissions(&garbage, PermissionsExt::from_mode(0o755)).unwrap();
        let mut spec = b.spec("exit");
        spec.mounts[0].source = garbage;
        let id = b.engine.create(&spec).await.unwrap();
        // runc finds this out only when the container runs already; others may at the start.
        let said = match b.engine.start(&id, &[b'x'; BOOT_BYTES_MAX]).await {
            Err(EngineError::StartFailed { message }) => message,
            Ok(()) => soon(b.engine.wait(&id)).await.unwrap().error.unwrap_or_default(),
            Err(other) => panic!("{other}"),
        };
        assert!(said.contains("exec format error"), "{said:?}");
        b.engine.remove(&id).await.unwrap();

        let gone = b.engine.start(&id, b"").await;
        assert!(matches!(gone, Err(EngineError::NotFound { .. })), "{gone:?}");
    })
    .await;
}

#[tokio::test]
async fn waiting_ends_when_the_cell_is_killed_or_removed_by_someone_else() {
    test(|b| async move {
        let id = b.run("sleep", b"").await;
        b.report().await;
        let (exit, killed) = tokio::join!(soon(b.engine.wait(&id)), b.engine.kill(&id));
        killed.unwrap();
        assert_eq!(exit.unwrap().code, 137);
        b.engine.kill(&id).await.expect("killing what has ended");
        b.engine.remove(&id).await.unwrap();
        b.engine.remove(&id).await.expect("removing what is gone");
        b.engine.kill(&id).await.expect("killing what is gone");
        assert!(matches!(b.engine.wait(&id).await, Err(EngineError::NotFound { .. })));

        let id = b.run("sleep", b"").await;
        let waiting = async { soon(b.engine.wait(&id)).await };
        let removing = async { b.raw("DELETE", &format!("/containers/{id}?force=true"), "") };
        let (waited, status) = tokio::join!(waiting, removing);
        assert!(status.contains("204"), "{status}");
        assert!(matches!(waited, Err(EngineError::NotFound { .. }) | Ok(_)), "{waited:?}");
        assert!(matches!(b.engine.wait(&id).await, Err(EngineError::NotFound { .. })));
    })
    .await;
}

#[tokio::test]
async fn a_cell_is_listed_in_every_state_with_the_pid_of_its_first_process() {
    test(|b| async move {
        let spec = b.spec("sleep");
        let id = b.engine.create(&spec).await.unwrap();
        let list = b.engine.list(&b.instance).await.unwrap();
        assert_eq!(list.len(), 1);
        assert_eq!(
            (&list[0].container, &list[0].cell, list[0].running),
            (&id, &Some(spec.cell.clone()), false)
        );
        b.engine.start(&id, b"").await.unwrap();
        let list = b.engine.list(&b.instance).await.unwrap();
        assert_eq!((list[0].running, list[0].state.as_str()), (true, "running"));
        let pid = b.engine.state_pid(&id).await.unwrap().expect("a pid");
        // The runtime's own helper has this pid until it becomes the program.
        let argv = || std::fs::read(format!("/proc/{pid}/cmdline")).unwrap();
        let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while argv() != b"/.probe\0sleep\0" {
            assert!(std::time::Instant::now() < until, "{:?}", String::from_utf8_lossy(&argv()));
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        let other = b.engine.list(&InstanceId::new(random())).await.unwrap();
        assert_eq!(other, vec![], "another instance sees nothing of ours");
        b.engine.remove(&id).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn more_memory_than_allowed_ends_the_cell() {
    test(|b| async move {
        let id = b.run("eat", b"").await;
        let exit = soon(b.engine.wait(&id)).await.unwrap();
        assert_eq!(exit.code, 137, "{exit:?}");
        b.engine.remove(&id).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn paths_of_an_image_are_looked_up_through_symlinks() {
    test(|b| async move {
        let paths = ["/lib/real", "/lib/link", "/lib64/real", "/dangling", "/lib/none", "/lib64"];
        let found = b.engine.probe_paths(&b.instance, &b.image.id, &paths).await.unwrap();
        assert_eq!(found, [true, true, true, false, false, true]);
        let endless = b.engine.probe_paths(&b.instance, &b.image.id, &["/loop"]).await;
        assert!(matches!(endless, Err(EngineError::Refused { .. }) | Ok(_)), "{endless:?}");
        assert_eq!(b.engine.list(&b.instance).await.unwrap(), vec![], "helpers are gone");
        let absent = format!("sha256:{}", "0".repeat(64));
        let missing = b.engine.probe_paths(&b.instance, &absent, &paths).await;
        assert!(matches!(missing, Err(EngineError::ImageMissing { .. })), "{missing:?}");
    })
    .await;
}

#[tokio::test]
async fn an_image_is_known_by_its_id_and_all_its_names() {
    test(|b| async move {
        let info = b.engine.info().await.unwrap();
        assert_eq!((info.os.as_str(), &info.arch), ("linux", &b.image.arch));
        assert!(info.runtimes.contains_key(&info.default_runtime), "{info:?}");
        assert!(b.image.env.contains(&("PATH".to_owned(), "/here/bin".to_owned())), "{:?}", b.image.env);
        assert_eq!(b.image.labels["test"], b.instance.as_str());
        assert_eq!(b.engine.image(&b.image.id).await.unwrap().as_ref(), Some(&b.image));
        let second = format!("hotcell-test:second-{}", b.instance);
        b.engine.tag(&b.tag, &second).await.unwrap();
        assert_eq!(b.engine.image(&second).await.unwrap().unwrap().id, b.image.id);
        b.engine.remove_image(&second).await.unwrap();
        b.engine.remove_image(&second).await.expect("removing what is gone");
        assert!(b.engine.image(&b.image.id).await.unwrap().is_some(), "the first name is left");
        let mut spec = b.spec("exit");
        spec.image_id = format!("sha256:{}", "0".repeat(64));
        let missing = b.engine.create(&spec).await;
        assert!(matches!(missing, Err(EngineError::ImageMissing { .. })), "{missing:?}");
        let odd = b.engine.image("../info").await;
        assert!(matches!(odd, Err(EngineError::BadSpec { .. })), "{odd:?}");
    })
    .await;
}

fn context(dockerfile: &str) -> BuildContext {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, text) in [("Dockerfile", dockerfile), ("hello", "hello\n")] {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(text.len() as u64);
        tar.append_data(&mut header, name, text.as_bytes()).expect("an entry");
    }
    BuildContext::Bytes(tar.into_inner().expect("a tar").into())
}

#[tokio::test]
async fn a_build_tells_its_progress_and_its_failure() {
    test(|b| async move {
        let mut spec = BuildSpec {
            context: context("FROM scratch\nARG WHO\nLABEL who=$WHO\nCOPY hello /hello\nVOLUME /data\n"),
            dockerfile: "Dockerfile".to_owned(),
            tag: format!("hotcell-test:built-{}", b.instance),
            labels: BTreeMap::from([("kind".to_owned(), "test".to_owned())]),
            build_args: BTreeMap::from([("WHO".to_owned(), b.instance.to_string())]),
        };
        let (progress, mut lines) = tokio::sync::mpsc::channel(100);
        let image = b.engine.build(&spec, &progress).await.unwrap();
        assert_eq!(
            (image.labels["kind"].as_str(), image.labels["who"].as_str()),
            ("test", b.instance.as_str())
        );
        assert_eq!(image.volumes, ["/data"]);
        drop(progress);
        let mut text = String::new();
        while let Some(line) = lines.recv().await {
            text.push_str(&line);
        }
        assert!(text.contains("COPY hello"), "{text}");
        b.engine.remove_image(&spec.tag).await.unwrap();

        spec.context = context("FROM scratch\nCOPY absent /absent\n");
        let failed = b.engine.build(&spec, &silent()).await.unwrap_err();
        assert!(
            matches!(&failed, EngineError::ImageFailed { message, .. } if message.contains("absent")),
            "{failed}"
        );
    })
    .await;
}

#[tokio::test]
async fn a_pull_that_fails_says_what_of() {
    test(|b| async move {
        let failed = b.engine.pull("127.0.0.1:9/none/such", &silent()).await.unwrap_err();
        assert!(failed.to_string().contains("127.0.0.1:9"), "{failed}");
        assert!(
            matches!(failed, EngineError::ImageFailed { .. } | EngineError::Refused { .. }),
            "{failed:?}"
        );
    })
    .await;
}

#[tokio::test]
async fn many_cells_at_once_all_come_and_go() {
    test(|b| async move {
        let mut cells = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let b = Arc::clone(&b);
            cells.spawn(async move {
                let id = b.run("exit", b"x").await;
                let exit = soon(b.engine.wait(&id)).await.unwrap();
                b.engine.remove(&id).await.unwrap();
                exit.code
            });
        }
        assert_eq!(cells.join_all().await, [7; 8]);
    })
    .await;
}

#[tokio::test]
async fn an_engine_that_is_not_there_is_unavailable() {
    let dir = tempfile::tempdir().unwrap();
    let absent = format!("unix://{}", dir.path().join("none.sock").display());
    let error = Docker::connect(&absent).await.err().expect("no engine there");
    assert!(
        matches!(&error, EngineError::Unavailable { .. }) && error.to_string().contains("make engine"),
        "{error}"
    );
    let dead = dir.path().join("dead.sock");
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    let error = Docker::connect(&format!("unix://{}", dead.display())).await.err().expect("nobody listens");
    assert!(matches!(&error, EngineError::Unavailable { .. }), "{error:?}");
}
