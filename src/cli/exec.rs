//! `hotcell exec` and `hotcell shell`: a command of the user's in a cell as an agent would get it, without an agent and
//! without cost. This process is the command's terminal, input and output: when it ends, the command ends.

use std::collections::VecDeque;
use std::io::IsTerminal;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use clap::Args;
use rustix::termios::{self, OptionalActions, Termios};
use serde_json::{Map, Value, json};
use tokio::io::{AsyncWriteExt, WriteHalf};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::client::{Attached, Client};
use super::fail::{CliError, ExitCode};
use super::render::{diff as rendered, words};
use super::run::{self, LimitFlags, Mode};
use super::{Connection, Context, wait};
use crate::api::attach::{Frame, read_frame};
use crate::api::wire::JobView;
use crate::job::{JobSpec, Outcome};

/// How much input is read at a time, in bytes.
const READ_BYTES: usize = 64 << 10;
/// Pieces of input that wait to be sent.
const PIECES_MAX: usize = 4;
/// How long a signal waits behind input that the command does not take.
const SIGNAL_MAX: Duration = Duration::from_secs(2);

/// Run a command in a cell: the same walls, no agent, no cost
#[derive(Debug, Args)]
#[command(after_help = "\
The command gets this command's input and gives its output and its exit code; Ctrl-C and SIGTERM reach it.
What it changed in a copy of a directory is kept: `hotcell diff JOB`, `hotcell apply JOB`.
    hotcell exec -w . -p refactor -- npm test
    hotcell exec --from JOB -- cargo test       on what that job left")]
pub(super) struct ExecArgs {
    /// The command and its arguments, after `--`
    #[arg(value_name = "COMMAND", required = true, last = true)]
    command: Vec<String>,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    #[command(flatten)]
    cell: CellFlags,
}

/// Look around in a cell: a shell behind the same walls, no agent, no cost
#[derive(Debug, Args)]
#[command(after_help = "\
What is changed in a copy of a directory is kept: `hotcell diff JOB`, `hotcell apply JOB`.
    hotcell shell -w . -p refactor
    hotcell shell --from JOB                    on what that job left")]
pub(super) struct ShellArgs {
    #[command(flatten)]
    cell: CellFlags,
}

#[derive(Debug, Args)]
struct CellFlags {
    /// Directory to work on, or a git repository to fetch [default: an empty one that is thrown away]
    #[arg(short, long, value_name = "DIR|URL")]
    workspace: Option<PathBuf>,
    /// Fetch this branch, tag or commit of the repository -w
    #[arg(long = "ref", value_name = "REF", requires = "workspace")]
    name: Option<String>,
    /// How the directory is mounted [default: the policy's first mode]
    #[arg(long, value_enum, value_name = "MODE")]
    mode: Option<Mode>,
    /// Go on with what this job of yours changed, on its workspace
    #[arg(long, value_name = "JOB")]
    from: Option<String>,
    /// Policy that bounds it [default: the daemon's]
    #[arg(short, long, value_name = "NAME")]
    policy: Option<String>,
    /// Image of the cell: a name, auto (by the files there), or build (their own Dockerfile)
    #[arg(long, value_name = "REF")]
    image: Option<String>,
    /// What isolates the cell: runc, or runsc for gVisor; no other one will do then
    #[arg(long, value_name = "NAME", value_parser = ["runc", "runsc"])]
    runtime: Option<String>,
    /// Environment variable; without a value, this command's own
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Command line that runs in the cell before; can be given several times
    #[arg(long, value_name = "COMMAND")]
    setup: Vec<String>,
    /// From -100 to 100; higher goes first among your jobs
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    priority: Option<i8>,
    #[command(flatten)]
    limits: LimitFlags,
    #[command(flatten)]
    connection: Connection,
}

pub(super) fn exec(args: ExecArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    if args.tty && !(std::io::stdin().is_terminal() && std::io::stdout().is_terminal()) {
        return Err(CliError::usage_hint("--tty: there is no terminal here", "leave --tty out"));
    }
    start(args.command, args.tty, &args.cell, context)
}

pub(super) fn shell(args: ShellArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    // Without a terminal it reads its commands from standard input, as shells do.
    let tty = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    start(Vec::new(), tty, &args.cell, context)
}

fn start(
    argv: Vec<String>,
    tty: bool,
    flags: &CellFlags,
    context: &mut Context,
) -> Result<ExitCode, CliError> {
    let client = flags.connection.client(&context.machine)?;
    let spec = spec(argv, tty, flags, context)?;
    wait(async {
        let mut signals = Signals::listen()?;
        let job = run::submit(&client, spec, &run::random_key()?).await?;
        for warning in &job.warnings {
            context.out.notice(&format!("hotcell: warning: {warning}"))?;
        }
        let attached = client.attach(&job.id).await?;
        let code = match take_part(attached, tty, &mut signals).await? {
            End::Code(code) => Some(code),
            End::NoWord => None,
            End::Left(number) => {
                let words = "hotcell: the command takes no input, and the signal waits behind it: left; it ends with us";
                context.out.notice(words)?;
                return Ok(ExitCode::Command(128u8.saturating_add(number)));
            }
        };
        finish(&client, &job, code, context).await
    })
}

fn spec(argv: Vec<String>, tty: bool, flags: &CellFlags, context: &Context) -> Result<Bytes, CliError> {
    let mut spec = Map::new();
    let mut command = json!({ "argv": argv, "attached": true });
    if tty {
        let (rows, cols) = size();
        command["terminal"] = json!({ "rows": rows, "cols": cols });
    }
    run::put(&mut spec, "command", Some(command));
    run::workspace(flags.workspace.as_deref(), flags.name.as_ref(), flags.mode, &mut spec)?;
    run::put(&mut spec, "from", flags.from.as_ref());
    run::put(&mut spec, "policy", flags.policy.as_ref());
    run::put(&mut spec, "image", flags.image.as_ref());
    run::put(&mut spec, "runtime", flags.runtime.as_ref());
    run::put(&mut spec, "priority", flags.priority);
    run::environment(&flags.env, context, &mut spec)?;
    run::limits(&flags.limits, &mut spec);
    if !flags.setup.is_empty() {
        run::put(run::object(&mut spec, "setup"), "commands", Some(&flags.setup));
    }
    let bytes = serde_json::to_vec(&Value::Object(spec)).map_err(|e| CliError::usage(e.to_string()))?;
    JobSpec::parse(&bytes).map_err(run::spec_error)?;
    Ok(bytes.into())
}

/// Rows and columns of our terminal.
fn size() -> (u16, u16) {
    match termios::tcgetwinsize(std::io::stdout()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row, size.ws_col),
        Ok(_) | Err(_) => (24, 80),
    }
}

/// Signals that are meant for the command.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
    resize: Signal,
}

impl Signals {
    fn listen() -> Result<Self, CliError> {
        let listen = |kind| signal(kind).map_err(|e| CliError::Local(e.into()));
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hang_up: listen(SignalKind::hangup())?,
            resize: listen(SignalKind::window_change())?,
        })
    }

    /// What the command is to hear of the next one. Cancel-safe.
    async fn next(&mut self, tty: bool) -> Frame {
        let number = |signal: i32| Frame::Signal(u8::try_from(signal).unwrap_or(15));
        tokio::select! {
            _ = self.interrupt.recv() => number(libc::SIGINT),
            _ = self.terminate.recv() => number(libc::SIGTERM),
            _ = self.hang_up.recv() => number(libc::SIGHUP),
            _ = self.resize.recv(), if tty => {
                let (rows, cols) = size();
                Frame::Resize(rows, cols)
            }
        }
    }
}

/// Our terminal in raw mode: what is typed is the command's. Given back when dropped, since a terminal in raw mode is
/// of no use to anybody.
struct Raw {
    before: Termios,
}

impl Raw {
    fn enter() -> Option<Self> {
        let before = termios::tcgetattr(std::io::stdin()).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(std::io::stdin(), OptionalActions::Drain, &raw).ok()?;
        Some(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(std::io::stdin(), OptionalActions::Drain, &self.before);
    }
}

/// How a command ended for its client.
enum End {
    /// With this exit code.
    Code(i32),
    /// The daemon says no more: its job tells why.
    NoWord,
    /// This signal could not be handed over.
    Left(u8),
}

/// Carries input, output and signals until the command ends. Both directions at once: a command that is given much and
/// says much stands still where its client does one after the other.
async fn take_part(attached: Attached, tty: bool, signals: &mut Signals) -> Result<End, CliError> {
    let raw = tty.then(Raw::enter).flatten();
    let (mut from_cell, to_cell) = tokio::io::split(attached.socket);
    let (pieces, typed) = mpsc::channel::<Frame>(PIECES_MAX);
    // A thread, since reads of standard input cannot be taken back; it ends with the process.
    std::thread::spawn(move || read_input(&pieces));
    let mut buffer = BytesMut::new();
    let hearing = async {
        loop {
            let written = match read_frame(&mut from_cell, &mut buffer).await {
                Ok(Some(Frame::Stdout(bytes))) => write(tokio::io::stdout(), &bytes).await,
                Ok(Some(Frame::Stderr(bytes))) => write(tokio::io::stderr(), &bytes).await,
                Ok(Some(Frame::Exit(code))) => break Ok(End::Code(code)),
                Ok(Some(_)) => {
                    break Err(CliError::Protocol { what: "a client's frame from the daemon".into() });
                }
                Ok(None) => break Ok(End::NoWord),
                Err(error) => break Err(CliError::ConnectionLost { what: error.to_string() }),
            };
            if let Err(error) = written {
                break Err(error);
            }
        }
    };
    let ended = tokio::select! {
        ended = hearing => ended,
        ended = tell(to_cell, typed, signals, tty) => ended,
    };
    drop(raw);
    ended
}

/// Hands over what is typed, and signals; ends only where it cannot. A signal waits behind input that the command does
/// not take, but not for ever: whoever presses Ctrl-C wants to leave.
async fn tell(
    mut to_cell: WriteHalf<Socket>,
    mut typed: mpsc::Receiver<Frame>,
    signals: &mut Signals,
    tty: bool,
) -> Result<End, CliError> {
    let (mut input_open, mut caught) = (true, VecDeque::new());
    loop {
        let frame = match caught.pop_front() {
            Some(frame) => frame,
            None => tokio::select! {
                frame = typed.recv(), if input_open => frame.unwrap_or(Frame::Eof),
                frame = signals.next(tty) => frame,
            },
        };
        input_open &= frame != Frame::Eof;
        let mut sending = std::pin::pin!(send(&mut to_cell, &frame));
        let mut late = None;
        loop {
            tokio::select! {
                sent = &mut sending => break sent?,
                frame = signals.next(tty), if caught.len() < PIECES_MAX => {
                    if let (Frame::Signal(number), None) = (&frame, late) {
                        late = Some((Instant::now() + SIGNAL_MAX, *number));
                    }
                    caught.push_back(frame);
                }
                number = reached(late) => return Ok(End::Left(number)),
            }
        }
    }
}

/// The signal, once its time is over; never where there is none.
async fn reached(late: Option<(Instant, u8)>) -> u8 {
    match late {
        Some((until, number)) => {
            tokio::time::sleep_until(until).await;
            number
        }
        None => std::future::pending().await,
    }
}

type Socket = hyper_util::rt::TokioIo<hyper::upgrade::Upgraded>;

async fn send(socket: &mut WriteHalf<Socket>, frame: &Frame) -> Result<(), CliError> {
    match socket.write_all(&frame.encode()).await {
        // The command has ended: its exit code is on its way.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        sent => sent.map_err(|e| CliError::ConnectionLost { what: e.to_string() }),
    }
}

async fn write(mut to: impl tokio::io::AsyncWrite + Unpin, bytes: &[u8]) -> Result<(), CliError> {
    let written = async {
        to.write_all(bytes).await?;
        to.flush().await
    };
    written.await.map_err(|e| CliError::Local(e.into()))
}

/// Reads standard input to its end, or until nobody wants it any more.
fn read_input(pieces: &mpsc::Sender<Frame>) {
    let stdin = std::io::stdin();
    let fd: BorrowedFd<'_> = stdin.as_fd();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let frame = match rustix::io::read(fd, &mut buffer[..]) {
            Ok(0) | Err(_) => Frame::Eof,
            Ok(count) => Frame::Stdin(Bytes::copy_from_slice(&buffer[..count])),
        };
        let last = frame == Frame::Eof;
        if pieces.blocking_send(frame).is_err() || last {
            return;
        }
    }
}

/// The command's exit code; where it had none, how its job ended. What it changed is told.
async fn finish(
    client: &Client,
    job: &JobView,
    code: Option<i32>,
    context: &mut Context,
) -> Result<ExitCode, CliError> {
    let exit = code.map(|code| ExitCode::Command(u8::try_from(code & 0xff).unwrap_or(1)));
    if let Some(exit) = exit
        && job.workspace.is_none()
    {
        return Ok(exit);
    }
    let mut events = client.events(&job.id, job.last_seq, true).await?;
    let mut lines = Vec::new();
    while events.next(&mut lines).await? {
        lines.clear();
    }
    let job = client.job(&job.id).await?;
    let Some(outcome) = job.outcome() else {
        return Err(CliError::Protocol {
            what: format!("the command ended while its job is {}", job.state.name()),
        });
    };
    if let Some(summary) = job.totals.changes.as_ref().filter(|s| s.entries > 0 || s.commits > 0) {
        let words = rendered::summary(summary);
        context
            .out
            .notice(&format!("hotcell: changed: {words}; `hotcell diff {0}`, `hotcell apply {0}`", job.id))?;
    }
    if let Some(exit) = exit {
        return Ok(exit);
    }
    let why = match outcome {
        Outcome::Failed(failure) => format!("{} ({})", failure.message, failure.reason.as_str()),
        Outcome::Stopped { reason } => words::stop(*reason).to_owned(),
        Outcome::Succeeded | Outcome::Lost => outcome.label().to_owned(),
    };
    context.out.notice(&format!("hotcell: {why}"))?;
    if let Some(hint) = words::next_step(outcome, job.id.as_str()) {
        context.out.notice(&format!("hotcell: {hint}"))?;
    }
    Ok(ExitCode::of(outcome))
}
