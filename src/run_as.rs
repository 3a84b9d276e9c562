//! Runs a program of a user's as that user: a policy's hook, a credential's command. It gets the user's ids and
//! groups, a small environment of its own and nothing of the daemon's: no descriptors, no variables, no rights.
//! It must never run anything as the daemon for somebody else.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Gid, Uid};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use crate::job::Identity;

/// Bounds of one run.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Longest run; what is left of the program is killed then.
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
    /// Its files are for itself alone to write, and for others to read where their directories let them: 022.
    pub usual_umask: bool,
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
}

/// Runs `argv` (no shell) as `who`, with `stdin` on its standard input.
///
/// # Errors
/// [`RunError`]; the program and its process group are gone then.
pub async fn run(argv: &[PathBuf], who: &Identity, stdin: &[u8], bounds: Bounds) -> Result<Output, RunError> {
    run_in(argv, who, &Surroundings::default(), stdin, bounds).await
}

/// The same with more than every program gets. It has no terminal, whatever the daemon has: it cannot ask anybody.
///
/// # Errors
/// As [`run`].
pub async fn run_in(
    argv: &[PathBuf],
    who: &Identity,
    surroundings: &Surroundings,
    stdin: &[u8],
    bounds: Bounds,
) -> Result<Output, RunError> {
    let program = argv.first().cloned().unwrap_or_default();
    let failed = |source| RunError::Start { program: program.clone(), source };
    let mut command = command(argv, who, surroundings)?;
    let mut child = command.spawn().map_err(failed)?;
    let group = Group(child.id().and_then(|id| rustix::process::Pid::from_raw(id as i32)));
    let (mut input, output, errors) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let most = bounds.output_bytes_max;
    let talk = async {
        let feed = async {
            if let Some(pipe) = &mut input {
                // A program that reads none of it is no fault.
                let _ = pipe.write_all(stdin).await;
            }
            drop(input.take());
        };
        let ((), stdout, stderr) = tokio::join!(feed, read(output, most), read(errors, most));
        (stdout, stderr, child.wait().await)
    };
    let talked = tokio::time::timeout(bounds.wall, talk).await;
    // Whatever it started and left behind goes with it.
    drop(group);
    let Ok((stdout, stderr, status)) = talked else {
        let _ = child.kill().await;
        return Err(RunError::Late { program, seconds: bounds.wall.as_secs() });
    };
    let (Some(stdout), Some(stderr)) = (stdout, stderr) else {
        return Err(RunError::TooMuch { program, bytes_max: most });
    };
    let status = status.map_err(failed)?;
    let code = status
        .code()
        .unwrap_or_else(|| 128 + std::os::unix::process::ExitStatusExt::signal(&status).unwrap_or(0));
    Ok(Output { code, stdout, stderr })
}

/// A program and all it started: killed when nobody waits for it any more, also where the wait is dropped.
struct Group(Option<rustix::process::Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
    }
}

fn command(argv: &[PathBuf], who: &Identity, surroundings: &Surroundings) -> Result<Command, RunError> {
    let own = rustix::process::geteuid();
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
        .kill_on_drop(true);
    if let Some((name, home)) = home_of(who.uid) {
        command.env("USER", name).env("HOME", home);
    }
    command.envs(surroundings.env.iter().map(|(name, value)| (name, value)));
    let (file_bytes_max, usual_umask) = (surroundings.file_bytes_max, surroundings.usual_umask);
    let become_user = own.is_root();
    if !become_user && own.as_raw() != who.uid {
        return Err(RunError::NotRoot { uid: who.uid, own: own.as_raw() });
    }
    let (uid, gid) = (Uid::from_raw(who.uid), Gid::from_raw(who.gid));
    let groups: Vec<Gid> = who.groups.iter().map(|g| Gid::from_raw(*g)).collect();
    // SAFETY: between fork and exec only system calls are made, on values that were made before.
    unsafe {
        command.pre_exec(move || {
            // A group of its own, so that all of it can be killed, and no terminal to ask at.
            rustix::process::setsid()?;
            if usual_umask {
                rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
            }
            if let Some(bytes) = file_bytes_max {
                let most = rustix::process::Rlimit { current: Some(bytes), maximum: Some(bytes) };
                rustix::process::setrlimit(rustix::process::Resource::Fsize, most)?;
            }
            // For this one thread, which is all there is after the fork. Groups first: they need the right that
            // the uid's change takes away.
            if become_user {
                rustix::thread::set_thread_groups(&groups)?;
                rustix::thread::set_thread_res_gid(gid, gid, gid)?;
                rustix::thread::set_thread_res_uid(uid, uid, uid)?;
            }
            // A descriptor that somebody forgot to mark must not reach a user's program.
            libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
            rustix::thread::set_no_new_privs(true)?;
            Ok(())
        });
    }
    Ok(command)
}

/// All of a pipe; `None` when it is more than `bytes_max`.
async fn read(pipe: Option<impl AsyncReadExt + Unpin>, bytes_max: usize) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let pipe = pipe?;
    pipe.take(bytes_max as u64 + 1).read_to_end(&mut bytes).await.ok()?;
    (bytes.len() <= bytes_max).then_some(bytes)
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
    use super::*;

    const BOUNDS: Bounds = Bounds { wall: Duration::from_secs(5), output_bytes_max: 4096 };

    fn sh(script: &str) -> Vec<PathBuf> {
        ["/bin/sh", "-c", script].map(PathBuf::from).into()
    }

    fn somebody() -> Identity {
        if rustix::process::geteuid().is_root() {
            Identity { uid: 12_345, gid: 12_346, groups: vec![12_347] }
        } else {
            let uid = rustix::process::geteuid().as_raw();
            Identity { uid, gid: rustix::process::getegid().as_raw(), groups: Vec::new() }
        }
    }

    #[tokio::test]
    async fn it_runs_with_the_users_ids_and_nothing_of_the_daemons() {
        let who = somebody();
        let script = sh("id -u; id -g; ls /proc/self/fd | wc -l; env | grep -c CARGO; cat");
        let output = run(&script, &who, b"hello", BOUNDS).await.expect("runs");
        let text = String::from_utf8(output.stdout).expect("text");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], who.uid.to_string());
        assert_eq!(lines[1], who.gid.to_string());
        // 0, 1, 2 and the directory itself.
        assert_eq!(lines[2], "4");
        assert_eq!(lines[3], "0");
        assert_eq!(lines[4], "hello");
    }

    #[tokio::test]
    async fn a_program_that_hangs_is_killed_with_all_it_started() {
        let bounds = Bounds { wall: Duration::from_millis(300), ..BOUNDS };
        let mark = format!("{}.5", 7_000_000 + std::process::id());
        let error = run(&sh(&format!("sleep {mark} & sleep {mark}")), &somebody(), b"", bounds).await;
        assert!(matches!(error, Err(RunError::Late { .. })), "{error:?}");
        let until = std::time::Instant::now() + Duration::from_secs(5);
        while left(&mark) {
            assert!(std::time::Instant::now() < until, "a child outlived its program");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    #[tokio::test]
    async fn a_flood_is_an_error() {
        let error = run(&sh("yes"), &somebody(), b"", BOUNDS).await;
        assert!(matches!(error, Err(RunError::TooMuch { .. })), "{error:?}");
    }

    fn left(mark: &str) -> bool {
        std::fs::read_dir("/proc").expect("proc").flatten().any(|entry| {
            std::fs::read(entry.path().join("cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(&format!("sleep\0{mark}")))
        })
    }
}
