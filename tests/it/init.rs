//! hotcell-init as an ordinary process, against a real [`Link`]: streams that survive lost links byte for
//! byte, back-pressure, authentication, deadlines, forwards, and what is left of the agent's children. Steps and
//! terminals in modules below.
//!
//! Only what needs a pid namespace of its own (deafness to signals, kill of everything) is tested in a cell.

mod cell;
mod steps;
mod terminal;

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hotcell::job::CellId;
use hotcell::link::{
    Boot, CtlKey, ExitReason, ExitReport, ExitStatus, Link, LinkEvent, OutputStream, PortForward, Resume,
};

/// Longest any step of a test may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A run directory, a key, and an init process that is killed with its agent when the test ends.
struct Cell {
    run_dir: tempfile::TempDir,
    id: CellId,
    key: CtlKey,
    init: Option<Child>,
}

impl Cell {
    fn new() -> Self {
        let run_dir = tempfile::tempdir().expect("a directory for the sockets");
        Self { run_dir, id: CellId::new(7), key: CtlKey::generate().expect("randomness"), init: None }
    }

    fn boot(&self, script: &str) -> Boot {
        let argv = ["/bin/sh", "-c", script].map(OsString::from).to_vec();
        let mut boot = Boot::new(self.id.clone(), self.key.clone(), argv);
        boot.env = vec![("PATH".into(), "/usr/bin:/bin".into())];
        boot.cwd = self.run_dir.path().into();
        boot.ctl_socket = self.run_dir.path().join("ctl.sock");
        boot.kill_grace_ms = 300;
        boot.dead_man_ms = 30_000;
        boot
    }

    fn start(&mut self, boot: &Boot) {
        let mut init = Command::new(env!("CARGO_BIN_EXE_hotcell-init"))
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("hotcell-init starts");
        let message = boot.encode().expect("a valid boot message");
        init.stdin.take().expect("a pipe").write_all(&message).expect("init reads its boot message");
        self.init = Some(init);
    }

    async fn link(&self, resume: Resume) -> Link {
        self.link_with(self.key.clone(), resume).await
    }

    async fn link_with(&self, key: CtlKey, resume: Resume) -> Link {
        let own = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        Link::bind(self.run_dir.path(), &self.id, key, resume, own).await.expect("a link")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.run_dir.path().join(name)
    }

    /// The exit code of init, once it left by itself.
    fn exit_code(&mut self) -> i32 {
        let mut init = self.init.take().expect("init was started");
        let since = Instant::now();
        loop {
            if let Some(status) = init.try_wait().expect("init can be waited for") {
                return status.code().expect("init ends by itself");
            }
            assert!(since.elapsed() < PATIENCE, "init does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        let Some(init) = &mut self.init else { return };
        // init is the subreaper of what it started: end the whole family, then init.
        for pid in family(init.id()) {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
        let _ = init.wait();
    }
}

/// A process and its descendants.
fn family(root: u32) -> Vec<u32> {
    let mut all = vec![root];
    let mut next = 0;
    while next < all.len() {
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", all[next]));
        all.extend(children.unwrap_or_default().split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        next += 1;
    }
    all
}

async fn next(link: &mut Link) -> LinkEvent {
    tokio::time::timeout(PATIENCE, link.next()).await.expect("an event in time")
}

async fn connected(link: &mut Link) -> u64 {
    loop {
        if let LinkEvent::Connected { stdin_received } = next(link).await {
            return stdin_received;
        }
    }
}

/// Reads and acknowledges until the cell ends; returns its output.
async fn finish(link: &mut Link) -> (Vec<u8>, Vec<u8>, ExitReport) {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match next(link).await {
            LinkEvent::Stdout { end, bytes } => {
                stdout.extend_from_slice(&bytes);
                link.handle().ack(OutputStream::Stdout, end);
            }
            LinkEvent::Stderr { end, bytes } => {
                stderr.extend_from_slice(&bytes);
                link.handle().ack(OutputStream::Stderr, end);
            }
            LinkEvent::Exited(report) => {
                link.handle().bye();
                return (stdout, stderr, report);
            }
            event @ LinkEvent::StepEnded { .. } => panic!("{event:?}"),
            LinkEvent::SpawnFailed { message, .. } => panic!("the agent did not start: {message}"),
            _ => {}
        }
    }
}

/// `seq` from 0 on, as one string.
fn numbers(count: usize) -> Vec<u8> {
    (0..count).flat_map(|n| format!("{n:063}\n").into_bytes()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_runs_and_its_end_is_reported_after_its_output() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    cell.start(&cell.boot("echo out; echo err >&2; tr a-z A-Z; exit 3"));
    link.handle().stdin(Bytes::from_static(b"hello ")).expect("room for stdin");
    link.handle().stdin(Bytes::from_static(b"there")).expect("room for stdin");
    link.handle().close_stdin();
    let (stdout, stderr, report) = finish(&mut link).await;
    assert_eq!(String::from_utf8_lossy(&stdout), "out\nHELLO THERE");
    assert_eq!(String::from_utf8_lossy(&stderr), "err\n");
    assert_eq!((report.status, report.reason), (ExitStatus::Code(3), ExitReason::Agent));
    assert_eq!(cell.exit_code(), 3);
    let socket = cell.path("ctl.sock");
    link.destroy().await.expect("the link ends");
    assert!(!socket.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn fifteen_lost_links_lose_and_double_no_byte() {
    let mut cell = Cell::new();
    let count = 400_000; // 25 MB
    let mut boot =
        cell.boot(&format!("awk 'BEGIN {{ for (i = 0; i < {count}; i++) printf \"%063d\\n\", i }}'"));
    boot.buffer_bytes_max = 1 << 20;
    cell.start(&boot);
    let expected = numbers(count);
    // What a journal would hold: bytes are added first, acknowledged later, and sometimes not at all.
    let (mut journal, mut chunks) = (Vec::new(), 0);
    for round in 1..=15 {
        let mut link = cell.link(Resume { stdout: journal.len() as u64, stderr: 0 }).await;
        let until = expected.len() * round / 16;
        while journal.len() < until {
            if let LinkEvent::Stdout { end, bytes } = next(&mut link).await {
                journal.extend_from_slice(&bytes);
                assert_eq!(end, journal.len() as u64);
                chunks += 1;
                if round % 3 != 0 || chunks % 2 == 0 {
                    link.handle().ack(OutputStream::Stdout, end);
                }
            }
        }
        link.destroy().await.expect("the link ends");
    }
    let mut link = cell.link(Resume { stdout: journal.len() as u64, stderr: 0 }).await;
    let (rest, _, report) = finish(&mut link).await;
    journal.extend_from_slice(&rest);
    assert_eq!(report.status, ExitStatus::Code(0));
    assert!(journal == expected, "{} bytes came, {} were printed", journal.len(), expected.len());
    assert_eq!(cell.exit_code(), 0);
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn stdin_goes_on_where_it_stopped_and_stays_open_while_the_daemon_is_away() {
    let mut cell = Cell::new();
    cell.start(&cell.boot("cat"));
    let input = numbers(60_000); // 3.8 MB, more than the window
    let mut echoed = Vec::new();
    let mut last_received = 0;
    for round in 1..=6 {
        let mut link = cell.link(Resume { stdout: echoed.len() as u64, stderr: 0 }).await;
        let received = connected(&mut link).await;
        assert!(received >= last_received);
        last_received = received;
        // The whole journal again, from the start: what init has is skipped.
        for (index, piece) in input.chunks(100_000).enumerate() {
            let offset = index as u64 * 100_000;
            link.handle().stdin_at(offset, Bytes::copy_from_slice(piece)).expect("room for stdin");
        }
        if round == 6 {
            link.handle().close_stdin();
            let (rest, _, report) = finish(&mut link).await;
            echoed.extend_from_slice(&rest);
            assert_eq!(report.status, ExitStatus::Code(0));
        } else {
            while echoed.len() < input.len() * round / 8 {
                if let LinkEvent::Stdout { end, bytes } = next(&mut link).await {
                    echoed.extend_from_slice(&bytes);
                    link.handle().ack(OutputStream::Stdout, end);
                }
            }
        }
        link.destroy().await.expect("the link ends");
    }
    assert!(echoed == input, "{} bytes came back of {}", echoed.len(), input.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn output_that_nobody_acknowledges_holds_the_agent() {
    let mut cell = Cell::new();
    let progress = cell.path("progress");
    let script = format!(
        "i=0; while [ $i -lt 64 ]; do head -c 65536 /dev/zero; i=$((i+1)); echo $i >{}; done",
        progress.display()
    );
    let mut boot = cell.boot(&script);
    boot.buffer_bytes_max = 256 << 10;
    cell.start(&boot);
    let mut link = cell.link(Resume::default()).await;
    let mut got = 0;
    // What init may hold arrives, and then nothing more.
    loop {
        match tokio::time::timeout(Duration::from_millis(700), link.next()).await {
            Ok(LinkEvent::Stdout { end, .. }) => got = end,
            Ok(_) => {}
            Err(_) => break,
        }
    }
    assert_eq!(got, 256 << 10);
    let held: u64 = std::fs::read_to_string(&progress).expect("progress").trim().parse().expect("a number");
    assert!(held < 16, "the agent went on to block {held} of 64");
    link.handle().ack(OutputStream::Stdout, got);
    let (rest, _, _) = finish(&mut link).await;
    assert_eq!(got + rest.len() as u64, 64 * 65536);
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_key_is_refused_and_the_right_one_comes_through_afterwards() {
    let mut cell = Cell::new();
    cell.start(&cell.boot("echo secret"));
    let other = CtlKey::generate().expect("randomness");
    let mut wrong = cell.link_with(other, Resume::default()).await;
    // init drops a daemon without its key: it sends nothing but its greeting, and no output.
    for _ in 0..2 {
        match next(&mut wrong).await {
            LinkEvent::Hostile { .. } => {}
            event => panic!("{event:?}"),
        }
    }
    wrong.destroy().await.expect("the link ends");
    let mut link = cell.link(Resume::default()).await;
    let (stdout, _, _) = finish(&mut link).await;
    assert_eq!(stdout, b"secret\n");
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_speaks_on_the_socket_gets_nothing_and_disturbs_nothing() {
    let mut cell = Cell::new();
    let expected = numbers(100_000);
    cell.start(&cell.boot("awk 'BEGIN { for (i = 0; i < 100000; i++) printf \"%063d\\n\", i }'"));
    let socket = cell.path("ctl.sock");
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flood: Vec<_> = (0..3)
        .map(|kind| {
            let (socket, stop) = (socket.clone(), stop.clone());
            std::thread::spawn(move || flood(&socket, kind, &stop))
        })
        .collect();
    let mut journal = Vec::new();
    for round in 1..=5 {
        let mut link = cell.link(Resume { stdout: journal.len() as u64, stderr: 0 }).await;
        while journal.len() < expected.len() * round / 6 {
            if let LinkEvent::Stdout { end, bytes } = next(&mut link).await {
                journal.extend_from_slice(&bytes);
                link.handle().ack(OutputStream::Stdout, end);
            }
        }
        link.destroy().await.expect("the link ends");
    }
    let mut link = cell.link(Resume { stdout: journal.len() as u64, stderr: 0 }).await;
    journal.extend_from_slice(&finish(&mut link).await.0);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for thread in flood {
        assert_eq!(
            thread.join().expect("the impostor ends"),
            0,
            "an impostor was answered as if it were init"
        );
    }
    assert!(journal == expected);
    link.destroy().await.expect("the link ends");
}

/// Connects again and again: silent, with garbage, or with a greeting. Returns how many bytes came back
/// beyond the daemon's challenge.
fn flood(socket: &Path, kind: usize, stop: &std::sync::atomic::AtomicBool) -> usize {
    let mut beyond = 0;
    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
        let Ok(mut stream) = UnixStream::connect(socket) else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        let _ = stream.set_read_timeout(Some(Duration::from_millis(50)));
        match kind {
            0 => {}
            1 => drop(stream.write_all(&[0xa5; 4096])),
            _ => {
                // Hello of this version for the right cell, and then a proof made up.
                let cell = CellId::new(7);
                let mut hello = vec![1, 0, 0, 0, 34 + cell.as_str().len() as u8];
                hello.resize(16, 0);
                hello.extend_from_slice(&[2, 0]);
                hello.extend_from_slice(&[9; 32]);
                hello.extend_from_slice(cell.as_str().as_bytes());
                let mut proof = vec![2, 0, 0, 0, 81];
                proof.resize(16 + 81, 0);
                let _ = stream.write_all(&hello).and_then(|()| stream.write_all(&proof));
            }
        }
        let mut answer = [0; 4096];
        let mut got = 0;
        while let Ok(count) = stream.read(&mut answer) {
            if count == 0 {
                break;
            }
            got += count;
        }
        let challenge = if kind == 2 { 16 + 64 } else { 0 };
        beyond += got.saturating_sub(challenge);
    }
    beyond
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wall_limit_terminates_then_kills() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let mut boot = cell.boot("trap 'echo asked' TERM; while :; do sleep 0.05; done");
    boot.wall_limit_ms = 200;
    cell.start(&boot);
    let since = Instant::now();
    let (stdout, _, report) = finish(&mut link).await;
    assert!(since.elapsed() >= Duration::from_millis(450), "{:?}", since.elapsed());
    assert_eq!(stdout, b"asked\n");
    assert_eq!((report.status, report.reason), (ExitStatus::Signal(9), ExitReason::WallLimit));
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_daemon_the_agent_is_ended_and_a_late_daemon_learns_why() {
    let mut cell = Cell::new();
    let mut boot = cell.boot("sleep 1000");
    boot.dead_man_ms = 400;
    cell.start(&boot);
    let init = cell.init.as_ref().expect("init was started").id();
    let since = Instant::now();
    while !family(init)[1..].is_empty() || since.elapsed() < Duration::from_millis(300) {
        assert!(since.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut link = cell.link(Resume::default()).await;
    let (_, _, report) = finish(&mut link).await;
    assert_eq!((report.status, report.reason), (ExitStatus::Signal(15), ExitReason::DeadMan));
    link.destroy().await.expect("the link ends");
}

#[test]
fn without_any_daemon_init_leaves_after_the_dead_man_limit() {
    let mut cell = Cell::new();
    let mut boot = cell.boot("exit 5");
    boot.dead_man_ms = 200;
    cell.start(&boot);
    assert_eq!(cell.exit_code(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_reaches_a_cell_that_neither_reads_nor_is_read() {
    let mut cell = Cell::new();
    let mut boot = cell.boot("sh -c 'sleep 1000' & yes");
    boot.buffer_bytes_max = 64 << 10;
    cell.start(&boot);
    let mut link = cell.link(Resume::default()).await;
    link.handle().stdin(Bytes::from(vec![b'x'; 8 << 20])).expect("room for stdin");
    connected(&mut link).await;
    link.handle().kill();
    let (_, _, report) = finish(&mut link).await;
    assert_eq!((report.status, report.reason), (ExitStatus::Signal(9), ExitReason::Killed));
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_reaches_the_agent() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    // Also where whoever started us ignores it, as a shell does for what it starts in the background.
    cell.start(&cell.boot("echo ready; exec sleep 1000"));
    while !matches!(next(&mut link).await, LinkEvent::Stdout { .. }) {}
    link.handle().signal(libc::SIGINT);
    let (stdout, _, report) = finish(&mut link).await;
    assert_eq!((stdout.as_slice(), report.status), (b"".as_slice(), ExitStatus::Signal(libc::SIGINT)));
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn children_that_left_the_session_are_killed_and_their_output_is_kept() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let pids = cell.path("pids");
    let script = format!(
        "setsid sh -c 'echo $$ >>{0}; echo orphan; sleep 1000' & (setsid sh -c 'echo $$ >>{0}; sleep 1000' &); \
         while [ $(wc -l <{0} 2>/dev/null || echo 0) -lt 2 ]; do sleep 0.01; done; exit 0",
        pids.display()
    );
    cell.start(&cell.boot(&script));
    let (stdout, _, report) = finish(&mut link).await;
    assert_eq!((stdout.as_slice(), report.status), (b"orphan\n".as_slice(), ExitStatus::Code(0)));
    for pid in std::fs::read_to_string(&pids).expect("the pids").lines() {
        assert!(!Path::new("/proc").join(pid).exists(), "process {pid} is left");
    }
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_cannot_start_is_named() {
    for (program, cwd, errno) in
        [("/nonexistent/agent", "/", 2), ("/etc/passwd", "/", 13), ("true", "/no", 2)]
    {
        let mut cell = Cell::new();
        let mut link = cell.link(Resume::default()).await;
        let mut boot = cell.boot("");
        (boot.argv, boot.cwd) = (vec![program.into()], cwd.into());
        cell.start(&boot);
        let event = loop {
            match next(&mut link).await {
                LinkEvent::Connected { .. } => {}
                event => break event,
            }
        };
        let LinkEvent::SpawnFailed { errno: got, message } = event else { panic!("{event:?}") };
        assert_eq!(got, errno, "{message}");
        assert!(message.contains(if cwd == "/" { program } else { cwd }), "{message}");
        link.handle().bye();
        assert_eq!(cell.exit_code(), 127);
        link.destroy().await.expect("the link ends");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_sees_its_own_environment_and_descriptors_only() {
    let mut cell = Cell::new();
    let mut link = cell.link(Resume::default()).await;
    let mut boot = cell.boot("env; for f in /proc/$$/fd/*; do readlink $f; done");
    boot.env.push(("ONLY".into(), "this".into()));
    cell.start(&boot);
    let (stdout, _, _) = finish(&mut link).await;
    let text = String::from_utf8_lossy(&stdout);
    assert!(text.contains("ONLY=this\n") && !text.contains("CARGO"), "{text}");
    assert_eq!(text.matches("socket:[").count(), 3, "{text}");
    assert!(!text.contains(&cell.key.to_hex()));
    link.destroy().await.expect("the link ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cell_can_wait_for_its_start() {
    let mut cell = Cell::new();
    let mut boot = cell.boot("echo started; cat");
    boot.start_now = false;
    cell.start(&boot);
    let mut link = cell.link(Resume::default()).await;
    link.handle().stdin(Bytes::from_static(b"early")).expect("room for stdin");
    link.handle().close_stdin();
    connected(&mut link).await;
    link.destroy().await.expect("the link ends");
    let mut link = cell.link(Resume::default()).await;
    connected(&mut link).await;
    link.handle().stdin_at(0, Bytes::from_static(b"early")).expect("room for stdin");
    link.handle().close_stdin();
    link.handle().start();
    assert_eq!(finish(&mut link).await.0, b"started\nearly");
    link.destroy().await.expect("the link ends");
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port()
}

fn connect(port: u16) -> TcpStream {
    let since = Instant::now();
    loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE)).expect("a socket option");
                return stream;
            }
            Err(error) => assert!(since.elapsed() < PATIENCE, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_forward_holds_connections_until_the_socket_is_there() {
    let mut cell = Cell::new();
    let (port, socket) = (free_port(), cell.path("api.sock"));
    let mut boot = cell.boot("sleep 1000");
    boot.forwards = vec![PortForward { port, socket: socket.clone() }];
    cell.start(&boot);
    for _ in 0..2 {
        let mut clients: Vec<_> = (0..10).map(|_| connect(port)).collect();
        for (n, client) in clients.iter_mut().enumerate() {
            client.write_all(format!("request {n}\n").as_bytes()).expect("the request is taken");
        }
        std::thread::sleep(Duration::from_millis(150));
        let server = UnixListener::bind(&socket).expect("the daemon's socket");
        for _ in &clients {
            let (mut stream, _) = server.accept().expect("a held connection");
            std::thread::spawn(move || {
                let mut request = Vec::new();
                stream.read_to_end(&mut request).expect("the request, to its half-close");
                stream.write_all(b"answer to ").and_then(|()| stream.write_all(&request)).expect("an answer");
            });
        }
        for (n, client) in clients.iter_mut().enumerate() {
            client.shutdown(Shutdown::Write).expect("a half-close");
            let mut answer = String::new();
            client.read_to_string(&mut answer).expect("the answer, to its end");
            assert_eq!(answer, format!("answer to request {n}\n"));
        }
        // The daemon goes away: the next connections wait again.
        drop(server);
        std::fs::remove_file(&socket).expect("the socket goes");
    }
}

#[test]
fn a_forward_carries_large_bodies_both_ways_with_a_slow_reader() {
    let mut cell = Cell::new();
    let (port, socket) = (free_port(), cell.path("api.sock"));
    let server = UnixListener::bind(&socket).expect("the daemon's socket");
    let mut boot = cell.boot("sleep 1000");
    boot.forwards = vec![PortForward { port, socket }];
    cell.start(&boot);
    let body: Vec<u8> = (0..8_000_000u32).flat_map(u32::to_le_bytes).collect();
    let echo = std::thread::spawn(move || {
        let (mut stream, _) = server.accept().expect("a connection");
        let mut copy = stream.try_clone().expect("a second handle");
        std::io::copy(&mut stream, &mut copy).expect("an echo");
        copy.shutdown(Shutdown::Write).expect("a half-close");
    });
    let mut client = connect(port);
    let mut writer = client.try_clone().expect("a second handle");
    let sent = body.clone();
    let write = std::thread::spawn(move || {
        writer.write_all(&sent).expect("the body");
        writer.shutdown(Shutdown::Write).expect("a half-close");
    });
    std::thread::sleep(Duration::from_millis(200));
    let mut back = Vec::new();
    client.read_to_end(&mut back).expect("the body comes back");
    write.join().expect("the writer");
    echo.join().expect("the echo");
    assert!(back == body);
}

#[test]
fn a_broken_connection_is_closed_and_the_number_of_connections_is_bounded() {
    let mut cell = Cell::new();
    let (port, socket) = (free_port(), cell.path("api.sock"));
    let server = UnixListener::bind(&socket).expect("the daemon's socket");
    let mut boot = cell.boot("sleep 1000");
    boot.forwards = vec![PortForward { port, socket }];
    cell.start(&boot);
    let mut first = connect(port);
    first.write_all(b"x").expect("a byte");
    let (stream, _) = server.accept().expect("a connection");
    drop(stream); // with a byte unread: a reset
    assert!(matches!(first.read(&mut [0; 8]), Ok(0) | Err(_)));
    drop(first);
    let clients: Vec<_> = (0..300).map(|_| connect(port)).collect();
    server.set_nonblocking(true).expect("a socket option");
    let mut accepted = Vec::new();
    let mut quiet_since = Instant::now();
    while quiet_since.elapsed() < Duration::from_millis(300) {
        match server.accept() {
            Ok((stream, _)) => {
                accepted.push(stream);
                quiet_since = Instant::now();
            }
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    assert_eq!(accepted.len(), 256);
    // Those that end make room for those that wait.
    accepted.clear();
    drop(clients);
    let mut late = connect(port);
    late.write_all(b"y").expect("a byte");
    let since = Instant::now();
    let mut got = [0; 1];
    while got != *b"y" {
        assert!(since.elapsed() < PATIENCE);
        match server.accept() {
            Ok((mut stream, _)) => {
                stream.set_nonblocking(false).expect("a socket option");
                let _ = stream.read(&mut got);
            }
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

#[test]
fn a_wrong_boot_message_ends_init_with_a_code() {
    for message in [
        b"".as_slice(),
        b"HCB\x01",
        b"garbage and more of it",
        b"HCB\x01\xff\xff\xff\xff",
        b"HCB\x01\x02\0\0\0\x01\0",
    ] {
        let mut init = Command::new(env!("CARGO_BIN_EXE_hotcell-init"))
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("hotcell-init starts");
        let _ = init.stdin.take().expect("a pipe").write_all(message);
        assert_eq!(init.wait().expect("init ends").code(), Some(64), "{message:?}");
    }
}
