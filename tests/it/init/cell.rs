//! The static init in a real cell of the engine: steps and a terminal with a read-only root, as a foreign uid,
//! under the usual runtime and under gVisor. Where gVisor is not there, its cell is refused.

use hotcell::engine::docker::Docker;
use hotcell::engine::{BindMount, CellLimits, CellSpec, Engine, find_address};
use hotcell::job::InstanceId;

use super::*;
use crate::world::init_binary;

/// The cell's uid and gid; nobody else's.
const USER: u32 = 0x6000_0456;

/// Everything that was printed, with what is still to be looked at.
struct Screen {
    link: Link,
    seen: usize,
    text: String,
}

impl Screen {
    /// Reads until `words` were printed after what was looked at before; what was printed up to them.
    async fn until(&mut self, words: &str) -> String {
        loop {
            if let Some(at) = self.text[self.seen..].find(words) {
                let end = self.seen + at + words.len();
                let found = self.text[self.seen..end].to_owned();
                self.seen = end;
                return found;
            }
            let got = tokio::time::timeout(PATIENCE, self.link.next()).await;
            let got = got.unwrap_or_else(|_| panic!("no {words:?} in {:?}", self.text));
            match got {
                LinkEvent::Stdout { end, bytes } => {
                    self.text.push_str(&String::from_utf8_lossy(&bytes));
                    self.link.handle().ack(OutputStream::Stdout, end);
                }
                LinkEvent::Exited(_) | LinkEvent::SpawnFailed { .. } => {
                    panic!("no {words:?} in {:?}", self.text)
                }
                _ => {}
            }
        }
    }

    fn type_in(&self, text: &str) {
        self.link.handle().stdin(Bytes::copy_from_slice(text.as_bytes())).expect("room for stdin");
    }
}

async fn spec(engine: &Docker, instance: &InstanceId, cell: &Cell, runtime: Option<&str>) -> CellSpec {
    let image = engine.image("hotcell/cell:latest").await.expect("an answer");
    let image = image.expect("the cell image: run `make image`");
    let mount = |source: PathBuf, target: &str| BindMount { source, target: target.into(), read_only: true };
    CellSpec {
        instance: instance.clone(),
        cell: cell.id.clone(),
        image_id: image.id,
        user: (USER, USER),
        groups: Vec::new(),
        limits: CellLimits { memory_bytes: 1 << 30, cpus_milli: 1000, pids_max: 512, nofile_max: 1024 },
        mounts: vec![
            mount(init_binary(), "/.hotcell-init"),
            mount(cell.run_dir.path().to_owned(), "/.hotcell"),
        ],
        runtime: runtime.map(str::to_owned),
        working_dir: "/".to_owned(),
        argv: vec!["/.hotcell-init".to_owned()],
        env: Vec::new(),
    }
}

/// What a person does in a shell of a cell.
async fn session(cell: &Cell, link: Link, gvisor: bool) -> Link {
    let mut screen = Screen { link, seen: 0, text: String::new() };
    let handle = screen.link.handle();
    handle.step(0);
    let mut printed = String::new();
    loop {
        match next(&mut screen.link).await {
            LinkEvent::Stderr { bytes, .. } => printed.push_str(&String::from_utf8_lossy(&bytes)),
            LinkEvent::StepEnded { index, status } => {
                assert_eq!((index, status), (0, ExitStatus::Code(3)));
                break;
            }
            LinkEvent::Connected { .. } => {}
            event => panic!("{event:?}"),
        }
    }
    let lines = String::from_utf8(numbers(3000)).expect("digits");
    assert!(
        printed.starts_with(&lines) && printed[lines.len()..].starts_with("stepped\n"),
        "{}",
        printed.len()
    );
    handle.start();
    screen.until("$ ").await;
    screen.type_in("tty; stty size; id -u; touch /x; echo ready$?\n");
    let text = screen.until("ready1\r\n").await;
    for part in ["\n/dev/pts/", "\n31 97\r\n", &format!("\n{USER}\r\n"), "cannot touch '/x'"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    handle.resize(40, 120);
    screen.type_in("stty size\n");
    screen.until("\n40 120\r\n").await;
    // A link that is lost and made anew in the middle of it goes on where it was.
    let received = screen.text.len() as u64;
    let Screen { link, seen, text } = screen;
    link.destroy().await.expect("the link ends");
    let resume = Resume { stdout: received, stderr: printed.len() as u64 };
    let link = Link::bind(cell.run_dir.path(), &cell.id, cell.key.clone(), resume, (USER, USER)).await;
    let mut screen = Screen { link: link.expect("a link"), seen, text };
    connected(&mut screen.link).await;
    // gVisor's terminals know no control characters before 2023-03, and never name the group in the foreground.
    if !gvisor {
        interrupt(&mut screen).await;
    }
    screen.type_in(
        "i=0; while [ $i -lt 3000 ]; do printf '%063d\\n' $i; i=$((i+1)); done; read last; exit 6\n",
    );
    screen.until(&lines.replace('\n', "\r\n")).await;
    screen.type_in("\n");
    let (_, _, report) = finish(&mut screen.link).await;
    assert_eq!((report.status, report.reason), (ExitStatus::Code(6), ExitReason::Agent));
    screen.link
}

/// Ctrl-C, a signal and the end of the input, each for what runs in the foreground of the shell.
async fn interrupt(screen: &mut Screen) {
    // The group has the foreground before it says a word.
    screen.type_in("(echo slee''ping; exec sleep 1000)\n");
    screen.until("\nsleeping\r\n").await;
    screen.type_in("\x03");
    screen.until("^C").await;
    screen.type_in("echo sti''ll here $?\n");
    screen.until("\nstill here 130\r\n").await;
    screen.type_in("(echo slee''ping; exec sleep 1000); echo wo''ken $?\n");
    screen.until("\nsleeping\r\n").await;
    screen.link.handle().signal(libc::SIGTERM);
    screen.until("woken 143\r\n").await;
    screen.type_in("echo rea''ding; cat; echo en''ded\n");
    screen.until("reading\r\n").await;
    screen.type_in("\x04");
    screen.until("ended\r\n").await;
}

/// Boots a cell under a runtime, has a session in it, and leaves nothing.
async fn in_a_cell(runtime: Option<&'static str>) {
    use std::os::unix::fs::PermissionsExt;
    let address = find_address(None).unwrap_or_else(|e| panic!("these tests need a container engine: {e}"));
    let engine = Docker::connect(&address).await.unwrap_or_else(|e| panic!("{e}"));
    let instance = InstanceId::new(getrandom::u64().expect("random bytes"));
    let there = engine.info().await.expect("an answer").runtimes;
    let mut cell = Cell::new();
    cell.id = CellId::new(getrandom::u64().expect("random bytes"));
    std::fs::set_permissions(cell.run_dir.path(), PermissionsExt::from_mode(0o755)).expect("a mode");
    let container = engine.create(&spec(&engine, &instance, &cell, runtime).await).await;
    if runtime.is_some_and(|name| !there.contains_key(name)) {
        container.expect_err("a runtime that is not there");
        return;
    }
    let container = container.expect("a container");
    let step = "i=0; while [ $i -lt 3000 ]; do printf '%063d\\n' $i; i=$((i+1)); done; echo stepped; \
                (while :; do sleep 1; done) & exit 3";
    let argv = ["/bin/bash", "--norc", "--noprofile", "-i"].map(OsString::from).to_vec();
    let mut boot = Boot::new(cell.id.clone(), cell.key.clone(), argv);
    boot.env = [("PATH", "/usr/bin:/bin"), ("TERM", "dumb"), ("PS1", "$ ")]
        .map(|(n, v)| (n.into(), v.into()))
        .into();
    boot.cwd = "/".into();
    boot.start_now = false;
    boot.steps = vec![["/bin/sh", "-c", step].map(OsString::from).to_vec()];
    boot.terminal = Some((31, 97));
    let link =
        Link::bind(cell.run_dir.path(), &cell.id, cell.key.clone(), Resume::default(), (USER, USER)).await;
    let link = link.expect("a link");
    let started = engine.start(&container, &boot.encode().expect("a valid message")).await;
    let outcome = tokio::spawn(async move {
        started.expect("started");
        session(&cell, link, runtime.is_some()).await
    })
    .await;
    let exit = tokio::time::timeout(PATIENCE, engine.wait(&container)).await;
    engine.remove(&container).await.expect("removed");
    match outcome {
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        Ok(link) => link.destroy().await.expect("the link ends"),
    }
    assert_eq!(exit.expect("an end in time").expect("an exit").code, 6);
    assert_eq!(engine.list(&instance).await.expect("a list"), vec![]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_works_with_a_read_only_root_as_a_foreign_uid() {
    in_a_cell(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_works_under_gvisor() {
    in_a_cell(Some("runsc")).await;
}
