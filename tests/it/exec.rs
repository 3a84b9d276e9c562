//! `hotcell exec` and `hotcell shell`: a person's command behind the walls of a cell, with its input, output, terminal,
//! signals and exit code, on fresh workspaces and on what a job left.

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::world::{CANARY, PATIENCE, World, one_command};

const NO_MODEL: &str = "[default]\ntext = \"nobody should ask\"\n";

/// Runs `hotcell exec` with this input: exit code, output, errors.
fn exec(world: &World, args: &[&str], input: &[u8]) -> (i32, Vec<u8>, String) {
    let mut command = world.hotcell();
    command.arg("exec").args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_owned();
    // A command may end without reading all.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    (output.status.code().unwrap_or(-1), output.stdout, String::from_utf8_lossy(&output.stderr).into_owned())
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn input_output_and_exit_code_are_the_commands_own() {
    let world = World::new(NO_MODEL);
    let line = "cat; echo warned >&2; exit 42";
    let (code, out, err) = exec(&world, &["--", "sh", "-c", line], b"what goes in\n");
    assert_eq!((code, text(&out), err.as_str()), (42, "what goes in\n", "warned\n"));
    // Every byte, whatever it is, and more of them than anybody keeps.
    let mut input = Vec::new();
    while input.len() < 12 << 20 {
        input.extend((0..=255u8).cycle().skip(input.len() % 251).take(65_537));
    }
    let (code, out, err) = exec(&world, &["--", "cat"], &input);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out == input, "{} of {} bytes", out.len(), input.len());
    let (code, _, err) = exec(&world, &["--", "no-such-program"], b"");
    assert_eq!(code, 127, "{err}");
    assert!(err.contains("no-such-program"), "{err}");
    let (code, out, _) = exec(&world, &["--", "sh", "-c", "kill -9 $$"], b"");
    assert_eq!((code, text(&out)), (137, ""));
    let (_, out, _) = exec(
        &world,
        &["-e", "GREETING=hello", "-p", "trusted", "--", "sh", "-c", "echo $GREETING; env; ls /.hotcell"],
        b"",
    );
    let out = text(&out);
    assert!(out.starts_with("hello\n"), "{out}");
    for forbidden in ["ANTHROPIC", "api.sock", CANARY] {
        assert!(!out.contains(forbidden), "no model: {out}");
    }
    assert!(world.recorder.requests().is_empty());
    assert_eq!(world.sql("SELECT count(*) FROM ledger"), "0", "no cost");
    world.end();
}

#[test]
fn what_a_command_changes_in_a_copy_is_kept_and_can_be_gone_on_with() {
    let world = World::new(&one_command("echo agent > who.txt"));
    let repo = world.workspace("repo", 0);
    std::fs::write(repo.join("who.txt"), "person\n").unwrap();
    let place = repo.to_str().unwrap();
    let (code, out, err) = exec(
        &world,
        &["-p", "refactor", "-w", place, "--", "sh", "-c", "cat who.txt; echo command >> who.txt"],
        b"",
    );
    assert_eq!((code, text(&out)), (0, "person\n"), "{err}");
    assert!(err.contains("hotcell diff j"), "{err}");
    assert_eq!(std::fs::read_to_string(repo.join("who.txt")).unwrap(), "person\n");
    let job = err.split("hotcell diff ").nth(1).unwrap().split('`').next().unwrap();
    let (code, diff, _) = world.run(&["diff", job]);
    assert!(code == 0 && diff.contains("+command"), "{diff}");
    let spec = json!({ "prompt": "x", "policy": "refactor", "workspace": { "path": repo, "mode": "copy" } });
    let (_, view) = world.job(&spec);
    let agent = view["id"].as_str().unwrap();
    let (code, out, err) = exec(&world, &["-p", "refactor", "--from", agent, "--", "cat", "who.txt"], b"");
    assert_eq!((code, text(&out)), (0, "agent\n"), "{err}");
    let (code, out, _) = exec(
        &world,
        &["-p", "refactor", "-w", place, "--setup", "echo ready > state", "--", "cat", "state"],
        b"",
    );
    assert_eq!((code, text(&out)), (0, "ready\n"));
    let (code, _, err) = exec(
        &world,
        &["-p", "refactor", "-w", place, "--setup", "echo broken >&2; false", "--", "true"],
        b"",
    );
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("broken") && err.contains("setup_failed"), "{err}");
    world.end();
}

#[test]
fn a_command_goes_with_its_client() {
    let mut world = World::new(NO_MODEL);
    let mut child = world.hotcell();
    let line = "trap 'echo ended; exit 5' TERM INT; echo ready; while :; do sleep 0.1; done";
    child.args(["exec", "--", "sh", "-c", line]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = child.spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut ready = [0; 6];
    out.read_exact(&mut ready).unwrap();
    // A signal reaches the command, which decides what becomes of it.
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_eq!((child.wait().unwrap().code(), rest.as_str()), (Some(5), "ended\n"));
    // A client that is killed takes it along.
    let mut killed = world.hotcell();
    killed.args(["exec", "--", "sleep", "1000"]).stdin(Stdio::piped());
    let mut killed = killed.spawn().unwrap();
    // The first client left with its exit code, before its job was over.
    let states = "SELECT group_concat(state, ' ') FROM (SELECT state FROM jobs ORDER BY n)";
    world.wait_for("it runs", |world| world.sql(states) == "done running");
    killed.kill().unwrap();
    killed.wait().unwrap();
    world.wait_for("it is over", |world| world.sql("SELECT count(*) FROM jobs WHERE state = 'done'") == "2");
    let job = world.sql("SELECT id FROM jobs ORDER BY n DESC LIMIT 1");
    assert_eq!(world.show(&job)["reason"], "cancelled", "{}", world.show(&job));
    // So does one whose signal waits behind input that the command does not take.
    let mut flood = world.hotcell();
    flood.args(["exec", "--", "sh", "-c", "trap '' INT; sleep 1000"]);
    let mut flood =
        flood.stdin(std::fs::File::open("/dev/zero").unwrap()).stderr(Stdio::piped()).spawn().unwrap();
    world.wait_for("it runs", |world| world.sql(states) == "done done running");
    let pid = rustix::process::Pid::from_child(&flood);
    // The first ones may come before the flood.
    world.wait_for("its client leaves", |_| {
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        flood.try_wait().unwrap().is_some()
    });
    let left = flood.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&left.stderr);
    assert_eq!((left.status.code(), said.contains("takes no input")), (Some(130), true), "{said}");
    world.wait_for("it is over", |world| world.sql("SELECT count(*) FROM jobs WHERE state = 'done'") == "3");
    world.end();
}

#[test]
fn a_shell_has_a_terminal_of_the_right_size_and_nobody_else_may_join_it() {
    let world = World::new(NO_MODEL);
    let script = world.path("drive.py");
    std::fs::write(&script, DRIVE).unwrap();
    let mut command = std::process::Command::new("python3");
    command.arg(&script).arg(env!("CARGO_BIN_EXE_hotcell")).env("HOTCELL_CONFIG", world.path("config.toml"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let id = {
        let until = Instant::now() + PATIENCE;
        loop {
            let found = world.call("GET", "/v1/jobs?state=running", "").json();
            if let Some(id) = found["jobs"][0]["id"].as_str() {
                break id.to_owned();
            }
            assert!(Instant::now() < until, "no shell: {}", world.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    let upgrade = ["-H", "Connection: upgrade", "-H", "Upgrade: hotcell-attach"];
    let path = format!("/v1/jobs/{id}/attach");
    let second = world.curl("POST", &path, "", &upgrade, None).unwrap();
    assert_eq!(second.status, 409, "{}", second.body);
    let stranger = world.curl("POST", &path, "", &upgrade, Some(4242)).unwrap();
    assert_eq!(stranger.status, 404, "{}", stranger.body);
    std::fs::write(world.path("go"), "").unwrap();
    let output = child.wait_with_output().unwrap();
    let seen = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{seen}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(world.show(&id)["title"], "(shell)");
    world.end();
}

/// A person at a terminal: what is typed, and what must be seen before the next thing is.
const DRIVE: &str = r#"
import fcntl, os, pty, struct, sys, termios, time, select
pid, fd = pty.fork()
if pid == 0:
    os.execv(sys.argv[1], [sys.argv[1], "shell"])
fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 31, 97, 0, 0))
seen = b""
def until(word, seconds=60):
    global seen
    end = time.time() + seconds
    while word not in seen:
        if time.time() > end:
            sys.exit("waited for %r, saw %r" % (word, seen))
        if select.select([fd], [], [], 0.2)[0]:
            try:
                data = os.read(fd, 65536)
            except OSError:
                sys.exit("the end came before %r: %r" % (word, seen))
            seen += data
    seen = seen.split(word, 1)[1]
def type(text):
    os.write(fd, text)
go = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "go")
while not os.path.exists(go):
    time.sleep(0.05)
type(b"tty; stty size; echo mark''one\n")
until(b"/dev/pts/"); until(b"31 97"); until(b"markone")
fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
time.sleep(0.5)
type(b"stty size; echo mark''two\n")
until(b"40 120"); until(b"marktwo")
type(b"sleep 1000\n")
time.sleep(0.5)
type(b"\x03")
type(b"echo after''wards $?\n")
until(b"afterwards 130")
type(b"exit 7\n")
end = time.time() + 60
while True:
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
        break
    if select.select([fd], [], [], 0.1)[0]:
        try:
            os.read(fd, 65536)
        except OSError:
            pass
    if time.time() > end:
        sys.exit("it does not end")
code = os.waitstatus_to_exitcode(status)
sys.exit(0 if code == 7 else "exit code %d" % code)
"#;
