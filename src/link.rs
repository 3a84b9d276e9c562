//! The daemon's end of a cell: `ctl.sock`, on which hotcell-init brings the agent's output and takes its
//! input. One [`Link`] owns one cell's socket. Every byte that arrives is hostile until proven otherwise: the
//! agent in the cell can reach the socket too, so a connection counts only after a mutual HMAC over both
//! nonces, and any frame out of order ends the connection, never the daemon.
//!
//! Offsets make the streams exact. A [`Link`] hands out each byte of stdout and stderr once, beginning at
//! [`Resume`]; init keeps every byte until the caller acknowledges it ([`LinkHandle::ack`], after it is in the
//! journal), so a daemon that dies between the two gets it again. Stdin works the other way round.
//!
//! It must never hand out a byte twice or out of order, acknowledge by itself, or let an unauthenticated
//! connection disturb a live one. Which of two authenticated connections counts: the second replaces the
//! first only when the first was hung up by its peer (init closes before it dials again); otherwise the
//! second is dropped and reported.

mod boot;
// Shared with hotcell-init, which uses the other half. One definition for both.
#[allow(dead_code, unreachable_pub)]
#[path = "init/hash.rs"]
mod hash;
#[allow(dead_code, unreachable_pub)]
#[path = "init/boot.rs"]
mod message;
mod serve;
mod state;
mod stream;
#[cfg(test)]
mod tests;

#[allow(dead_code, unreachable_pub)]
#[path = "init/wire.rs"]
mod wire;

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::job::CellId;

pub use boot::{Boot, CtlKey, PortForward};
pub use wire::{ExitReason, ExitReport, ExitStatus, OutputStream, STEPS_MAX};

use serve::Server;
use state::Shared;

/// Name of the socket in the cell's run directory.
pub const SOCKET_NAME: &str = "ctl.sock";
/// Most bytes of stdin kept until init has them.
pub const STDIN_BYTES_MAX: usize = 64 << 20;
/// Events that wait for [`Link::next`]; each holds at most 1 MiB, usually 256 KiB or less.
const EVENTS_MAX: usize = 8;
/// Longest path of a unix socket, the closing zero not counted.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Why a link cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The socket cannot be made.
    #[error("cannot make {path}: {source}; check the state directory's space and permissions")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// init would refuse the boot message.
    #[error("the cell's boot message is not valid: {what}")]
    Boot {
        /// What is wrong with it.
        what: &'static str,
    },
    /// Not 64 hexadecimal digits.
    #[error("not a key of a cell (expected 64 hexadecimal digits)")]
    Key,
    /// The system has no randomness.
    #[error("the system gives no random bytes")]
    Random,
    /// More stdin than [`STDIN_BYTES_MAX`] is waiting for the agent; wait for [`LinkEvent::StdinAcked`].
    #[error("the agent does not read its input: {STDIN_BYTES_MAX} bytes are waiting")]
    StdinFull,
    /// Stdin that does not follow what was given before, or follows its end.
    #[error("input at byte {offset} does not follow byte {end}, or the input was closed")]
    StdinOrder {
        /// Offset of the bytes.
        offset: u64,
        /// End of what was given.
        end: u64,
    },
}

/// Where the journal ends: the link's first byte of each stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Resume {
    /// Bytes of stdout already in the journal.
    pub stdout: u64,
    /// Bytes of stderr already in the journal.
    pub stderr: u64,
}

/// What happens on a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkEvent {
    /// init is there and authenticated.
    Connected {
        /// Bytes of stdin that init has; a restarted daemon replays from here.
        stdin_received: u64,
    },
    /// The connection ended; init dials again by itself.
    Disconnected,
    /// The next bytes of the agent's stdout.
    Stdout {
        /// Offset after the last of them.
        end: u64,
        /// The bytes, at least one.
        bytes: Bytes,
    },
    /// The next bytes of the agent's stderr.
    Stderr {
        /// Offset after the last of them.
        end: u64,
        /// The bytes, at least one.
        bytes: Bytes,
    },
    /// The agent took its stdin up to here.
    StdinAcked {
        /// Offset after the last byte taken.
        offset: u64,
    },
    /// The main process of a step ended, and all it printed until then was handed out as [`LinkEvent::Stderr`].
    /// Services that it started live on. Once per link and step: a link made anew, after a restart, tells the
    /// end of the last step again.
    StepEnded {
        /// Which step of [`Boot::steps`].
        index: u32,
        /// How it ended; code 127 and a line in stderr where it could not be started.
        status: ExitStatus,
    },
    /// The agent could not be started. The last event of a cell; answer with [`LinkHandle::bye`].
    SpawnFailed {
        /// The system's error number, 0 where there is none.
        errno: i32,
        /// What was tried and what the system said.
        message: String,
    },
    /// The agent ended and all its output was handed out. The last event of a cell; answer with
    /// [`LinkHandle::bye`] once it is stored.
    Exited(ExitReport),
    /// Something on the socket was not init, or not as init behaves. At most one a second is reported.
    Hostile {
        /// What it did.
        what: &'static str,
    },
}

/// One cell's `ctl.sock`.
#[derive(Debug)]
pub struct Link {
    events: mpsc::Receiver<LinkEvent>,
    shared: Arc<Shared>,
    stop: CancellationToken,
    server: JoinHandle<()>,
    path: PathBuf,
}

/// Sends to the cell; everything it takes survives a reconnect of the same [`Link`].
#[derive(Debug, Clone)]
pub struct LinkHandle {
    shared: Arc<Shared>,
}

impl Link {
    /// Makes `ctl.sock` in `run_dir` (which only the daemon can write) for the cell's uid and gid, in place of
    /// one that an earlier daemon left, and waits for init on it.
    pub async fn bind(
        run_dir: &Path,
        cell: &CellId,
        key: CtlKey,
        resume: Resume,
        socket_owner: (u32, u32),
    ) -> Result<Self, LinkError> {
        let path = run_dir.join(SOCKET_NAME);
        let listener = listen(run_dir, socket_owner)
            .map_err(|source| LinkError::Socket { path: path.clone(), source })?;
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared::new(resume));
        let server = Server::new(listener, cell, key, shared.clone(), sender, stop.clone());
        let server = tokio::spawn(server.run());
        Ok(Self { events, shared, stop, server, path })
    }

    /// The next event. Cancel-safe. Never ends before [`Link::destroy`] (it waits forever if the server died).
    pub async fn next(&mut self) -> LinkEvent {
        match self.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }

    /// A handle to send with.
    pub fn handle(&self) -> LinkHandle {
        LinkHandle { shared: self.shared.clone() }
    }

    /// Ends the connection and the tasks, and removes the socket. The cell is left as it is: for init the
    /// daemon is away.
    pub async fn destroy(self) -> Result<(), LinkError> {
        self.stop.cancel();
        drop(self.events);
        if self.server.await.is_err_and(|error| error.is_panic()) {
            tracing::error!("the server of a cell's ctl.sock panicked");
        }
        match tokio::fs::remove_file(&self.path).await {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(LinkError::Socket { path: self.path, source })
            }
            _ => Ok(()),
        }
    }
}

impl LinkHandle {
    /// The bytes of `stream` before `offset` are safe; init may forget them. Offsets only grow.
    pub fn ack(&self, stream: OutputStream, offset: u64) {
        self.shared.change(|state| state.ack(stream, offset));
    }

    /// Appends to the agent's stdin; returns the offset after the bytes.
    pub fn stdin(&self, bytes: Bytes) -> Result<u64, LinkError> {
        self.shared.change(|state| state.stdin(bytes))
    }

    /// Gives stdin again from a journal, at its place in the stream. Bytes that init or this link already has
    /// are skipped; an offset before what this link keeps replaces what it keeps.
    pub fn stdin_at(&self, offset: u64, bytes: Bytes) -> Result<u64, LinkError> {
        self.shared.change(|state| state.stdin_at(offset, bytes))
    }

    /// Closes the agent's stdin once it has taken everything given so far. A terminal is sent its end-of-file
    /// character (twice after an unfinished line, which the first one only hands over), and stays open.
    pub fn close_stdin(&self) {
        self.shared.change(|state| state.close_stdin());
    }

    /// Signals the process group of the running step or the agent; of a terminal, the group in its foreground
    /// (under gVisor always the agent's). While init is away up to 16 signals are kept; one that was on its
    /// way when the connection broke may be lost.
    pub fn signal(&self, number: i32) {
        self.shared.change(|state| state.signal(number));
    }

    /// Kills every process of the cell but init, now or as soon as init is there.
    pub fn kill(&self) {
        self.shared.change(|state| state.kill = true);
    }

    /// Lets init end: its report is stored.
    pub fn bye(&self) {
        self.shared.change(|state| state.bye = true);
    }

    /// Starts the agent of a cell that was booted with `start_now: false`. While a step runs it is kept until
    /// that has ended, and takes the place of its [`LinkEvent::StepEnded`].
    pub fn start(&self) {
        self.shared.change(|state| state.start = true);
    }

    /// Runs a step of [`Boot::steps`]; [`LinkEvent::StepEnded`] follows. Nothing is run a second time: for one
    /// that runs already its end is waited for, for one that ended the end is told (to a link that did not
    /// hand it out). One that was asked for while another runs waits, and the other one's end is not told.
    pub fn step(&self, index: u32) {
        self.shared.change(|state| state.step = Some(index));
    }

    /// Tells the cell's terminal its size; told again on each new connection.
    pub fn resize(&self, rows: u16, cols: u16) {
        self.shared.change(|state| state.size = Some((rows, cols)));
    }
}

/// Listens under a name of its own first, so that the socket appears with its owner and mode, in one step,
/// over whatever was there.
fn listen(run_dir: &Path, (uid, gid): (u32, u32)) -> io::Result<UnixListener> {
    let fresh = run_dir.join("ctl.sock.new");
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = if fresh.as_os_str().len() <= SOCKET_PATH_BYTES_MAX {
        std::os::unix::net::UnixListener::bind(&fresh)?
    } else {
        // A socket's address is short, a state directory may be deep: reach it by descriptor.
        let directory = std::fs::File::open(run_dir)?;
        let short = format!("/proc/self/fd/{}/ctl.sock.new", directory.as_raw_fd());
        std::os::unix::net::UnixListener::bind(short)?
    };
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
    std::os::unix::fs::chown(&fresh, Some(uid), Some(gid))?;
    std::fs::rename(&fresh, run_dir.join(SOCKET_NAME))?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}
