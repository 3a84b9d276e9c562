//! Runs a program of a user's as that user: a policy's hook, a credential's command. It gets the user's ids and
//! groups, a small environment of its own and nothing of the daemon's: no descriptors, no variables, no rights, no
//! terminal. It must never run anything as the daemon for somebody else, nor come back while anything that the
//! program started is still there (`keeper`).

mod keeper;

use std::ffi::OsString;
use std::io::{PipeWriter, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Gid, Uid};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout, timeout_at};

use self::keeper::{Keeper, User};
use crate::job::Identity;

/// Longest wait for the end of what was killed; longer than the keeper tries.
const GONE_WAIT: Duration = Duration::from_secs(30);

/// Bounds of one run.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Longest run; all that is left of the program is killed then.
    pub wall: Duration,
    /// Most bytes of its standard output, and as many of its standard error.
    pub output_bytes_max: usize,
}

/// What a program gets beside its arguments.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    /// Variables, over those that every program gets.
    pub env: Vec<(String, OsString)>,
    /// Longest file that it and what it starts may write.
    pub file_bytes_max: Option<u64>,
}

/// What a program gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Exit code; 128 + n for signal n.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

/// Why there is no output.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The daemon is not root and the program is another user's.
    #[error("cannot run a program as user {uid}: the daemon runs as {own} and not as root")]
    NotRoot {
        /// The user.
        uid: u32,
        /// The daemon's.
        own: u32,
    },
    /// It cannot be started.
    #[error("cannot run {program:?}: {source}")]
    Start {
        /// The program.
        program: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// It took too long and was killed.
    #[error("{program:?} did not end within {seconds} s")]
    Late {
        /// The program.
        program: PathBuf,
        /// The limit.
        seconds: u64,
    },
    /// It printed too much and was killed.
    #[error("{program:?} printed more than {bytes_max} bytes")]
    TooMuch {
        /// The program.
        program: PathBuf,
        /// The limit.
        bytes_max: usize,
    },
    /// It was killed, or somebody killed its keeper, and nothing proves that all of it is gone.
    #[error("{program:?} was killed, and what it started may still run: look for it on the host")]
    Left {
        /// The program.
        program: PathBuf,
    },
}

/// Runs `argv` (no shell) as `who`, with `stdin` on its standard input. What it leaves behind when it ends is
/// killed, however far it went from it. When this future is dropped, the killing goes on by itself.
///
/// # Errors
/// [`RunError`]; but for [`RunError::Left`], the program and all that came of it are gone then.
pub async fn run(argv: &[PathBuf], who: &Identity, stdin: &[u8], bounds: Bounds) -> Result<Output, RunError> {
    run_in(argv, who, stdin, bounds, rustix::process::geteuid().is_root()).await
}

/// The same with more than every program gets.
///
/// # Errors
/// As [`run`].
pub async fn run_with(
    argv: &[PathBuf],
    who: &Identity,
    surroundings: &Surroundings,
    stdin: &[u8],
    bounds: Bounds,
) -> Result<Output, RunError> {
    run_kept(argv, who, surroundings, stdin, bounds, rustix::process::geteuid().is_root()).await
}

/// The same; `namespace`: in a pid namespace of its own, where one can be made.
async fn run_in(
    argv: &[PathBuf],
    who: &Identity,
    stdin: &[u8],
    bounds: Bounds,
    namespace: bool,
) -> Result<Output, RunError> {
    run_kept(argv, who, &Surroundings::default(), stdin, bounds, namespace).await
}

async fn run_kept(
    argv: &[PathBuf],
    who: &Identity,
    surroundings: &Surroundings,
    stdin: &[u8],
    bounds: Bounds,
    namespace: bool,
) -> Result<Output, RunError> {
    let program = argv.first().cloned().unwrap_or_default();
    let failed = |source| RunError::Start { program: program.clone(), source };
    let deadline = Instant::now() + bounds.wall;
    let late = || RunError::Late { program: program.clone(), seconds: bounds.wall.as_secs() };
    let (hears, lifeline) = std::io::pipe().map_err(failed)?;
    let mut command = command(argv, who, surroundings, [hears.as_raw_fd(), lifeline.as_raw_fd()], namespace)?;
    // The start waits for the file system that the program is on, which may be the user's own: on a thread that
    // nobody else needs. The keeper is there by then, and kills what does not come out of its start.
    let mut starting = tokio::task::spawn_blocking(move || {
        let child = command.spawn();
        drop(hears);
        child
    });
    let Ok(started) = timeout_at(deadline, &mut starting).await else {
        let_go(lifeline);
        return match timeout(GONE_WAIT, starting).await {
            Ok(Ok(Ok(mut child))) => Err(gone(&mut child, &program).await.err().unwrap_or_else(late)),
            Ok(Ok(Err(_))) => Err(late()),
            Ok(Err(_)) | Err(_) => Err(RunError::Left { program }),
        };
    };
    let mut child = started.map_err(std::io::Error::other).flatten().map_err(failed)?;
    let (mut input, output, errors) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let most = bounds.output_bytes_max;
    let talk = async {
        let feed = async {
            if let Some(pipe) = &mut input {
                // A program that reads none of it is no fault.
                let _ = pipe.write_all(stdin).await;
            }
            drop(input.take());
            Ok(())
        };
        // The keeper ends last, when nothing holds the pipes any more.
        let kept = async { Ok(child.wait().await) };
        tokio::try_join!(feed, read(output, most), read(errors, most), kept)
    };
    let talked = timeout_at(deadline, talk).await;
    let_go(lifeline);
    let (stdout, stderr, ended) = match talked {
        Ok(Ok(((), stdout, stderr, ended))) => (stdout, stderr, ended),
        Ok(Err(Flood)) => {
            gone(&mut child, &program).await?;
            return Err(RunError::TooMuch { program, bytes_max: most });
        }
        Err(_) => {
            gone(&mut child, &program).await?;
            return Err(late());
        }
    };
    match ended.map_err(failed)?.code() {
        Some(code) => Ok(Output { code, stdout, stderr }),
        None => Err(RunError::Left { program }),
    }
}

/// The keeper hears this, kills whatever is left, and ends with it. A word, and not the mere end of the pipe: other
/// programs that hang in their start may have a copy of it.
fn let_go(mut lifeline: PipeWriter) {
    if let Err(error) = lifeline.write_all(b".") {
        // It has ended already.
        tracing::trace!(%error, "a keeper hears nothing");
    }
}

/// Waits for the keeper's end, which says that all is gone.
async fn gone(child: &mut Child, program: &Path) -> Result<(), RunError> {
    let left = || RunError::Left { program: program.to_owned() };
    match timeout(GONE_WAIT, child.wait()).await {
        Ok(Ok(status)) if status.code().is_some() => Ok(()),
        Ok(Ok(_) | Err(_)) | Err(_) => {
            tracing::error!(program = %program.display(), "what a user's program started may still run");
            Err(left())
        }
    }
}

fn command(
    argv: &[PathBuf],
    who: &Identity,
    surroundings: &Surroundings,
    [hears, speaks]: [RawFd; 2],
    namespace: bool,
) -> Result<Command, RunError> {
    let own = rustix::process::geteuid();
    if !own.is_root() && own.as_raw() != who.uid {
        return Err(RunError::NotRoot { uid: who.uid, own: own.as_raw() });
    }
    let mut command = Command::new(argv.first().cloned().unwrap_or_default());
    command
        .args(argv.get(1..).unwrap_or_default())
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LANG", "C.UTF-8")
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // The keeper's: a signal for the daemon's group is none for it.
        .process_group(0);
    if let Some((name, home)) = home_of(who.uid) {
        command.env("USER", name).env("HOME", home);
    }
    command.envs(surroundings.env.iter().map(|(name, value)| (name, value)));
    let user = own.is_root().then(|| User {
        uid: Uid::from_raw(who.uid),
        gid: Gid::from_raw(who.gid),
        groups: who.groups.iter().map(|group| Gid::from_raw(*group)).collect(),
    });
    let file_bytes_max = surroundings.file_bytes_max;
    let keeper = Keeper { hears, speaks, user, namespace, file_bytes_max };
    // SAFETY: between fork and exec, with system calls only, on values that were made before.
    unsafe { command.pre_exec(move || keeper.enter()) };
    Ok(command)
}

/// More than was allowed.
struct Flood;

/// All of a pipe, if it is no more than `bytes_max`.
async fn read(pipe: Option<impl AsyncReadExt + Unpin>, bytes_max: usize) -> Result<Vec<u8>, Flood> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        pipe.take(bytes_max as u64 + 1).read_to_end(&mut bytes).await.map_err(|_| Flood)?;
    }
    if bytes.len() <= bytes_max { Ok(bytes) } else { Err(Flood) }
}

/// Name and home directory of a user, from the machine's user file.
fn home_of(uid: u32) -> Option<(String, PathBuf)> {
    let text = std::fs::read_to_string("/etc/passwd").ok()?;
    text.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let (name, number, home) = (fields.first()?, fields.get(2)?, fields.get(5)?);
        (number.parse() == Ok(uid)).then(|| ((*name).to_owned(), PathBuf::from(home)))
    })
}

#[cfg(test)]
mod tests {
    use super::keeper::DESCRIPTORS_MAX;
    use super::*;

    const BOUNDS: Bounds = Bounds { wall: Duration::from_secs(20), output_bytes_max: 4096 };
    /// Leaves its parent, its group and its session, ignores what can be ignored, closes its pipes, and sleeps.
    const ESCAPE: &str = "trap '' TERM HUP INT; setsid sh -c 'setsid sleep MARK <&- >&- 2>&- & \
        (setsid sleep MARK <&- >&- 2>&- &) & exit' & sleep MARK <&- >&- 2>&- &";

    fn sh(script: &str) -> Vec<PathBuf> {
        ["/bin/sh", "-c", script].map(PathBuf::from).into()
    }

    fn somebody() -> Identity {
        if rustix::process::geteuid().is_root() {
            Identity { uid: 12_345, gid: 12_346, groups: vec![12_347, 12_348] }
        } else {
            let uid = rustix::process::geteuid().as_raw();
            Identity { uid, gid: rustix::process::getegid().as_raw(), groups: Vec::new() }
        }
    }

    /// A time to sleep that stands in no other command line.
    fn mark() -> String {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        format!("{}.{}", 7_000_000 + std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// Sleepers of this mark that are no zombies.
    fn sleepers(mark: &str) -> usize {
        let entries = std::fs::read_dir("/proc").expect("proc").flatten();
        let sleeps = |path: PathBuf| {
            std::fs::read(path.join("cmdline"))
                .is_ok_and(|line| line == format!("sleep\0{mark}\0").as_bytes())
        };
        entries.filter(|entry| sleeps(entry.path())).count()
    }

    /// In a namespace where this may be, and by the sweep alone.
    fn both_ways() -> Vec<bool> {
        if rustix::process::geteuid().is_root() { vec![true, false] } else { vec![false] }
    }

    /// Values of `/proc/self/status` and the like, as the program sees them.
    async fn seen(script: &str, namespace: bool) -> Vec<String> {
        let output = run_in(&sh(script), &somebody(), b"", BOUNDS, namespace).await.expect("runs");
        let text = String::from_utf8(output.stdout).expect("text");
        text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    }

    #[tokio::test]
    async fn it_runs_with_the_users_ids_and_nothing_of_the_daemons() {
        let who = somebody();
        for namespace in both_ways() {
            let script = sh("id -u; id -g; ls /proc/self/fd | wc -l; env | cut -d= -f1 | sort | xargs; cat");
            let output = run_in(&script, &who, b"hello", BOUNDS, namespace).await.expect("runs");
            let text = String::from_utf8(output.stdout).expect("text");
            let lines: Vec<&str> = text.lines().collect();
            assert_eq!(lines[0], who.uid.to_string());
            assert_eq!(lines[1], who.gid.to_string());
            // 0, 1, 2 and the directory itself.
            assert_eq!(lines[2], "4");
            let names = lines[3].replace("HOME ", "").replace(" USER", "");
            assert_eq!(names, "LANG PATH PWD", "of which PWD is the shell's");
            assert_eq!(lines[4], "hello");
        }
    }

    #[tokio::test]
    async fn it_has_no_terminal_no_rights_to_gain_and_limits_of_its_own() {
        let own_groups = std::fs::read_to_string("/proc/self/status").expect("status");
        let own_groups = own_groups.lines().find(|line| line.starts_with("Groups:")).expect("groups");
        let root = rustix::process::geteuid().is_root();
        for namespace in both_ways() {
            let lines = seen(
                "grep -E '^(Groups|NoNewPrivs|SigBlk|CapEff|CapPrm):' /proc/self/status; pwd; umask; \
                 ulimit -c; ulimit -n; cut -d' ' -f7 /proc/self/stat; cat /proc/self/oom_score_adj; \
                 test \"$(cut -d' ' -f4 /proc/self/stat)\" = \"$(cut -d' ' -f6 /proc/self/stat)\" && echo leader; readlink /proc/self/ns/pid",
                namespace,
            )
            .await;
            let value = |key: &str| {
                let found = lines.iter().find_map(|line| line.strip_prefix(key));
                found.unwrap_or_else(|| panic!("{key} is missing: {lines:?}")).trim().to_owned()
            };
            if root {
                assert_eq!(value("Groups:"), "12347 12348");
                assert_eq!(value("CapEff:").trim_start_matches('0'), "");
                assert_eq!(value("CapPrm:").trim_start_matches('0'), "");
            } else {
                assert_eq!(value("Groups:"), own_groups["Groups:".len()..].trim());
            }
            assert_eq!(value("NoNewPrivs:"), "1");
            assert_eq!(value("SigBlk:").trim_start_matches('0'), "");
            let rest = &lines[5..];
            assert_eq!(rest[..3], ["/", "0022", "0"]);
            assert!(rest[3].parse::<u64>().is_ok_and(|most| most <= DESCRIPTORS_MAX), "{rest:?}");
            // No terminal; killed before the daemon is; the first of a session.
            assert_eq!(rest[4..7], ["0", "500", "leader"]);
            let own = std::fs::read_link("/proc/self/ns/pid").expect("own namespace");
            assert_eq!(rest[7] != own.display().to_string(), namespace, "{rest:?}");
        }
    }

    #[tokio::test]
    async fn its_exit_code_comes_through() {
        for namespace in both_ways() {
            for (script, code) in [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143)]
            {
                let output = run_in(&sh(script), &somebody(), b"", BOUNDS, namespace).await.expect("runs");
                assert_eq!(output.code, code, "{script}");
            }
            let missing = [PathBuf::from("/no/such/program")];
            let error = run_in(&missing, &somebody(), b"", BOUNDS, namespace).await;
            assert!(matches!(error, Err(RunError::Start { .. })), "{error:?}");
        }
    }

    #[tokio::test]
    async fn of_a_program_that_hangs_nothing_is_left_wherever_it_went() {
        for namespace in both_ways() {
            let bounds = Bounds { wall: Duration::from_secs(2), ..BOUNDS };
            let mark = mark();
            let script = format!("{ESCAPE} sleep MARK").replace("MARK", &mark);
            let (script, who) = (sh(&script), somebody());
            let running = run_in(&script, &who, b"", bounds, namespace);
            let (error, before) = tokio::join!(running, appeared(&mark, 4));
            assert!(matches!(error, Err(RunError::Late { .. })), "{error:?}");
            assert!(before, "the test itself: no sleepers were seen");
            assert_eq!(sleepers(&mark), 0, "namespace: {namespace}");
        }
    }

    #[tokio::test]
    async fn of_a_program_that_ends_nothing_is_left_either() {
        for namespace in both_ways() {
            let mark = mark();
            // It ends once the others are there.
            let script = format!("{ESCAPE} read line; echo done").replace("MARK", &mark);
            let output = run_in(&sh(&script), &somebody(), b"go\n", BOUNDS, namespace).await.expect("runs");
            assert_eq!((output.code, output.stdout.as_slice()), (0, b"done\n".as_slice()));
            assert_eq!(sleepers(&mark), 0, "namespace: {namespace}");
        }
    }

    /// As when the daemon dies: the kernel closes its end of the lifeline.
    #[tokio::test]
    async fn what_nobody_waits_for_any_more_ends_by_itself() {
        for namespace in both_ways() {
            let mark = mark();
            let script = sh(&format!("{ESCAPE} sleep MARK").replace("MARK", &mark));
            let running =
                tokio::spawn(async move { run_in(&script, &somebody(), b"", BOUNDS, namespace).await });
            assert!(appeared(&mark, 4).await, "the test itself: no sleepers were seen");
            running.abort();
            assert!(running.await.is_err_and(|error| error.is_cancelled()));
            let until = std::time::Instant::now() + Duration::from_secs(10);
            while sleepers(&mark) > 0 {
                assert!(std::time::Instant::now() < until, "namespace: {namespace}: it outlived its call");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }

    /// The start of a program waits for whoever holds a lease on its file, as it does for a file system that hangs.
    #[tokio::test]
    async fn a_program_that_does_not_come_out_of_its_start_holds_nobody_up() {
        use std::os::unix::fs::PermissionsExt;
        const F_SETSIG: libc::c_int = 10; // libc has no name for it
        let dir = tempfile::tempdir().expect("directory");
        let program = dir.path().join("program");
        std::fs::write(&program, "#!/bin/sh\nexit 0\n").expect("program");
        for path in [dir.path(), &program] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("mode");
        }
        for namespace in both_ways() {
            let file = std::fs::File::open(&program).expect("opens");
            // SAFETY: two system calls on a descriptor that lives here. The signal's default is to be ignored.
            let leased = unsafe {
                libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG);
                libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK)
            };
            assert_eq!(leased, 0, "the file system of temporary files has leases");
            let bounds = Bounds { wall: Duration::from_secs(1), ..BOUNDS };
            let (began, argv, who) = (Instant::now(), [program.clone()], somebody());
            let running = run_in(&argv, &who, b"", bounds, namespace);
            let beside = async {
                tokio::time::sleep(Duration::from_millis(50)).await;
                began.elapsed()
            };
            let (error, beside) = tokio::join!(running, beside);
            assert!(matches!(error, Err(RunError::Late { .. })), "{error:?}");
            assert!(beside < bounds.wall, "it held up what runs beside it: {beside:?}");
            assert!(began.elapsed() < BOUNDS.wall, "it was not killed: {:?}", began.elapsed());
            drop(file);
            let output = run_in(&argv, &who, b"", BOUNDS, namespace).await.expect("runs");
            assert_eq!(output.code, 0, "without the lease it starts");
        }
    }

    #[tokio::test]
    async fn a_flood_is_an_error_whatever_it_does_with_its_signals() {
        for namespace in both_ways() {
            let began = std::time::Instant::now();
            for script in ["yes", "yes >&2", "trap '' PIPE; while :; do echo more; done; sleep 100"] {
                let error = run_in(&sh(script), &somebody(), b"", BOUNDS, namespace).await;
                assert!(matches!(error, Err(RunError::TooMuch { .. })), "{script}: {error:?}");
            }
            assert!(began.elapsed() < BOUNDS.wall, "it is not waited for");
        }
    }

    async fn appeared(mark: &str, count: usize) -> bool {
        let until = std::time::Instant::now() + Duration::from_secs(10);
        while sleepers(mark) < count && std::time::Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        sleepers(mark) >= count
    }
}
