//! The agent's process, those of the steps, and everything they leave behind: start, signal the group, reap,
//! kill all. It must never wait, and never signal a process that is not of this cell.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::io::{Seek, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::boot::BootMessage;
use crate::sys;
use crate::terminal::Terminal;
use crate::wire::ExitStatus;

/// Ends taken per look, so that a flood of short children cannot hold the loop.
const REAP_MAX: usize = 4096;
/// How much sooner than init the kernel takes the agent's processes when memory is short (of 1000).
const OOM_SCORE_MORE: i32 = 200;

/// init's ends of the agent's streams, non-blocking.
pub(crate) struct Streams {
    /// Written by init.
    pub(crate) stdin: File,
    /// Read by init: stdout, stderr. A terminal has only the first.
    pub(crate) output: [Option<File>; 2],
    /// The terminal that they are.
    pub(crate) terminal: Option<Terminal>,
}

/// A process's own ends of its streams.
struct Ends {
    stdin: Stdio,
    stdout: Stdio,
    stderr: Stdio,
    terminal: bool,
}

/// The process group of the agent or of a step.
#[derive(Clone, Copy)]
pub(crate) struct Agent {
    pid: libc::pid_t,
}

/// Why a program could not be started.
pub(crate) struct SpawnError {
    /// The system's number for it; 0 where there is none.
    pub(crate) errno: i32,
    /// What was tried.
    pub(crate) what: String,
}

impl SpawnError {
    /// An error of the system at one step.
    pub(crate) fn new(what: &str, error: &io::Error) -> Self {
        Self { errno: error.raw_os_error().unwrap_or(0), what: format!("{what}: {error}") }
    }
}

/// A stream between init and the agent that carries bytes in one direction only: init's end, the agent's.
fn one_way(init_writes: bool, pipe: bool) -> Result<(File, Stdio), SpawnError> {
    let made = if pipe { new_pipe(init_writes) } else { new_socket(init_writes) };
    made.map_err(|error| SpawnError::new(if pipe { "pipe" } else { "socketpair" }, &error))
}

fn new_socket(init_writes: bool) -> io::Result<(File, Stdio)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    ours.shutdown(if init_writes { Shutdown::Read } else { Shutdown::Write })?;
    Ok((OwnedFd::from(ours).into(), OwnedFd::from(theirs).into()))
}

fn new_pipe(init_writes: bool) -> io::Result<(File, Stdio)> {
    let (reader, writer) = io::pipe()?;
    let (reader, writer) = (OwnedFd::from(reader), OwnedFd::from(writer));
    let (ours, theirs) = if init_writes { (writer, reader) } else { (reader, writer) };
    sys::set_nonblocking(&ours)?;
    Ok((ours.into(), theirs.into()))
}

/// Starts the agent in its own session, with the boot message's environment and nothing else.
pub(crate) fn spawn(boot: &BootMessage, oom: &mut OomScore) -> Result<(Agent, Streams), SpawnError> {
    let (ends, streams) = match boot.terminal {
        Some(size) => terminal(size).map_err(|error| SpawnError::new("open a terminal", &error))?,
        None => {
            let (stdin, agent_stdin) = one_way(true, boot.pipes)?;
            let (stdout, agent_stdout) = one_way(false, boot.pipes)?;
            let (stderr, agent_stderr) = one_way(false, boot.pipes)?;
            let ends =
                Ends { stdin: agent_stdin, stdout: agent_stdout, stderr: agent_stderr, terminal: false };
            (ends, Streams { stdin, output: [Some(stdout), Some(stderr)], terminal: None })
        }
    };
    Ok((launch(boot, &boot.argv, ends, oom)?, streams))
}

fn terminal(size: (u16, u16)) -> io::Result<(Ends, Streams)> {
    let (terminal, end) = Terminal::open(size)?;
    let (stdin, stdout, stderr) = (end.try_clone()?.into(), end.try_clone()?.into(), end.into());
    let ends = Ends { stdin, stdout, stderr, terminal: true };
    let (stdin, output) = (terminal.carrier()?, [Some(terminal.carrier()?), None]);
    Ok((ends, Streams { stdin, output, terminal: Some(terminal) }))
}

/// Starts a step: what it prints, on both streams, comes out of the pipe. Where it cannot be started, why is all
/// there is in it.
pub(crate) fn spawn_step(
    boot: &BootMessage,
    index: u32,
    oom: &mut OomScore,
) -> io::Result<(File, Option<Agent>)> {
    let (ours, theirs) = io::pipe()?;
    let ours = OwnedFd::from(ours);
    sys::set_nonblocking(&ours)?;
    let (stdout, stderr) = (theirs.try_clone()?.into(), theirs.try_clone()?.into());
    let ends = Ends { stdin: Stdio::null(), stdout, stderr, terminal: false };
    let started = match boot.steps.get(index as usize) {
        Some(argv) => launch(boot, argv, ends, oom),
        None => Err(SpawnError { errno: 0, what: "there is no such step".to_owned() }),
    };
    let agent = match started {
        Ok(agent) => Some(agent),
        Err(error) => {
            let mut theirs = theirs;
            // An empty pipe takes a line without waiting.
            writeln!(theirs, "hotcell-init: step {index}: {}", error.what)?;
            None
        }
    };
    Ok((ours.into(), agent))
}

fn launch(boot: &BootMessage, argv: &[Vec<u8>], ends: Ends, oom: &mut OomScore) -> Result<Agent, SpawnError> {
    let text = |bytes: &'_ [u8]| String::from_utf8_lossy(bytes).chars().take(1024).collect::<String>();
    let (program, arguments) =
        argv.split_first().ok_or(SpawnError { errno: 0, what: "no command".to_owned() })?;
    let cwd = Path::new(OsStr::from_bytes(&boot.cwd));
    // Asked first, because the error of the spawn does not say whether the directory or the program is missing.
    std::fs::metadata(cwd)
        .map_err(|error| SpawnError::new(&format!("working directory {}", text(&boot.cwd)), &error))?;
    let mut command = Command::new(OsStr::from_bytes(program));
    command
        .args(arguments.iter().map(|argument| OsStr::from_bytes(argument)))
        .env_clear()
        .envs(boot.env.iter().map(|(name, value)| (OsStr::from_bytes(name), OsStr::from_bytes(value))))
        .current_dir(cwd)
        .stdin(ends.stdin)
        .stdout(ends.stdout)
        .stderr(ends.stderr);
    let terminal = ends.terminal;
    // SAFETY: the hook makes async-signal-safe system calls only.
    unsafe {
        command.pre_exec(move || {
            sys::default_signals();
            sys::new_session()?;
            if terminal { sys::control_stdin() } else { Ok(()) }
        });
    }
    oom.raise();
    let spawned = command.spawn();
    oom.restore();
    let child = spawned.map_err(|error| SpawnError::new(&format!("start {}", text(program)), &error))?;
    Ok(Agent { pid: child.id() as libc::pid_t })
}

/// init's own place in the kernel's choice of a victim. The file is opened before init becomes unreadable,
/// since after that it belongs to root; a child inherits the score of the moment it is forked.
pub(crate) struct OomScore {
    file: Option<std::fs::File>,
    own: i32,
}

impl OomScore {
    /// To be called before [`sys::harden`].
    pub(crate) fn open() -> Self {
        let path = "/proc/self/oom_score_adj";
        let own = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok());
        let file = std::fs::OpenOptions::new().write(true).open(path).ok();
        Self { file: file.filter(|_| own.is_some()), own: own.unwrap_or(0) }
    }

    fn raise(&mut self) {
        self.set((self.own + OOM_SCORE_MORE).min(1000));
    }

    fn restore(&mut self) {
        self.set(self.own);
    }

    /// Best effort: without it init is still the smallest process of its cell.
    fn set(&mut self, score: i32) {
        if let Some(file) = &mut self.file {
            let _ = file.rewind().and_then(|()| file.write_all(score.to_string().as_bytes()));
        }
    }
}

impl Agent {
    /// Signals its process group; where it has a terminal, the group in the foreground.
    pub(crate) fn signal(self, signal: i32, terminal: Option<&Terminal>) {
        sys::kill(-terminal.and_then(Terminal::foreground).unwrap_or(self.pid), signal);
    }

    /// Asks it to end. At a terminal as if that were closed, too: an interactive shell does not end by SIGTERM.
    pub(crate) fn terminate(self, terminal: Option<&Terminal>) {
        self.signal(libc::SIGTERM, terminal);
        if terminal.is_some() {
            sys::kill(-self.pid, libc::SIGHUP);
        }
    }
}

/// What one look for ended children found.
pub(crate) struct Ended {
    /// The agent's own end.
    pub(crate) agent: Option<ExitStatus>,
    /// No child is left.
    pub(crate) none_left: bool,
    /// The look was cut short and must be repeated.
    pub(crate) more: bool,
}

/// Takes the ended children, orphans included.
pub(crate) fn reap(agent: Option<Agent>) -> Ended {
    let mut ended = Ended { agent: None, none_left: false, more: false };
    for _ in 0..REAP_MAX {
        match sys::reap() {
            sys::Reaped::Running => return ended,
            sys::Reaped::None => {
                ended.none_left = true;
                return ended;
            }
            sys::Reaped::Child(pid, status) => {
                if agent.is_some_and(|agent| agent.pid == pid) {
                    ended.agent = Some(if libc::WIFSIGNALED(status) {
                        ExitStatus::Signal(libc::WTERMSIG(status))
                    } else {
                        ExitStatus::Code(libc::WEXITSTATUS(status))
                    });
                }
            }
        }
    }
    ended.more = true;
    ended
}

/// Kills every process of the cell but init. Outside of a pid namespace of its own (tests), these are the
/// descendants of this process.
pub(crate) fn kill_all() {
    if sys::kill_cell() {
        return;
    }
    let own = std::process::id() as libc::pid_t;
    let table = process_table();
    let mut family = vec![own];
    let mut next = 0;
    while next < family.len() {
        let parent = family[next];
        family.extend(table.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    family.iter().skip(1).for_each(|pid| sys::kill(*pid, libc::SIGKILL));
}

/// (process, its parent) of every process that /proc shows.
fn process_table() -> Vec<(libc::pid_t, libc::pid_t)> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| {
            let pid = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // "pid (name) state parent …": the name may hold anything, so the last ')' ends it.
            let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
            Some((pid, parent))
        })
        .collect()
}
