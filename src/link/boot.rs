//! The key of a cell's `ctl.sock` and the boot message that hands it to PID 1. It must never print the key
//! or the agent's environment.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::job::CellId;

use super::LinkError;
use super::message::{BOOT_BYTES_MAX, BootMessage, Forward};
use super::wire::WireError;

/// The secret that PID 1 of one cell and the daemon share. Kept in the cell's row, so that a restarted
/// daemon can speak to cells that are still alive.
#[derive(Clone, PartialEq, Eq)]
pub struct CtlKey(pub(super) [u8; 32]);

impl CtlKey {
    /// A new random key. Fails where the system has no randomness.
    pub fn generate() -> Result<Self, LinkError> {
        Ok(Self(random()?))
    }

    /// The key as 64 hexadecimal digits, for the row.
    /// The key's bytes, for the cell's row.
    pub fn to_bytes(&self) -> [u8; 32] {
        self.0
    }

    /// A key from the cell's row.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The key as hexadecimal digits, for tests and people who debug.
    pub fn to_hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Reads what [`CtlKey::to_hex`] wrote.
    pub fn from_hex(text: &str) -> Result<Self, LinkError> {
        let mut key = [0; 32];
        if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(LinkError::Key);
        }
        for (byte, at) in key.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&text[at..at + 2], 16).map_err(|_| LinkError::Key)?;
        }
        Ok(Self(key))
    }
}

impl fmt::Debug for CtlKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CtlKey(…)")
    }
}

pub(super) fn random() -> Result<[u8; 32], LinkError> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|_| LinkError::Random)?;
    Ok(bytes)
}

/// A local TCP port in the cell that init carries to one of the daemon's sockets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortForward {
    /// Port on 127.0.0.1 in the cell.
    pub port: u16,
    /// The socket as the cell sees it, e.g. `/.hotcell/api.sock`.
    pub socket: PathBuf,
}

/// Everything init is told at boot. The daemon writes [`Boot::encode`] to the container's stdin and closes it.
#[derive(Clone)]
pub struct Boot {
    /// The cell.
    pub cell: CellId,
    /// Its key.
    pub key: CtlKey,
    /// The agent's command, a path or a name in the agent's PATH first.
    pub argv: Vec<OsString>,
    /// The agent's whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// The agent's working directory in the cell.
    pub cwd: PathBuf,
    /// `ctl.sock` as the cell sees it.
    pub ctl_socket: PathBuf,
    /// From the start of the first step, or of the agent where there is none, to SIGTERM, in milliseconds; 0 is
    /// no limit. It goes on between steps and is not begun again by the agent's start.
    pub wall_limit_ms: u64,
    /// Time without a daemon after which init ends the agent, in milliseconds.
    pub dead_man_ms: u64,
    /// From SIGTERM to SIGKILL, in milliseconds.
    pub kill_grace_ms: u64,
    /// Output that init keeps per stream until it is acknowledged, in bytes; then it holds the agent.
    pub buffer_bytes_max: u32,
    /// Ports that init listens on.
    pub forwards: Vec<PortForward>,
    /// Start the agent at once; else [`super::LinkHandle::start`] does. Must be false where there are steps.
    pub start_now: bool,
    /// Commands that [`super::LinkHandle::step`] runs before the agent, in its environment and directory, at
    /// most [`super::STEPS_MAX`].
    pub steps: Vec<Vec<OsString>>,
    /// Rows and columns where the agent's three streams are a terminal: its output is the link's stdout, and
    /// the link's stdin is what is typed. TERM is the environment's. gVisor's terminals know Ctrl-C and Ctrl-D
    /// only since 2023: before, an agent under it ends by its own words, by Kill or by a limit.
    pub terminal: Option<(u16, u16)>,
    /// The agent's streams are pipes in place of sockets, for programs that open `/dev/stdin`, `/dev/stdout` or
    /// `/dev/stderr`. Not together with a terminal.
    pub pipes: bool,
}

impl Boot {
    /// A boot message with the cell's usual places and limits: `/workspace`, `/.hotcell/ctl.sock`, no wall
    /// limit, 15 minutes without a daemon, 5 seconds of grace, 4 MiB of unacknowledged output per stream.
    pub fn new(cell: CellId, key: CtlKey, argv: Vec<OsString>) -> Self {
        Self {
            cell,
            key,
            argv,
            env: Vec::new(),
            cwd: PathBuf::from("/workspace"),
            ctl_socket: PathBuf::from("/.hotcell/ctl.sock"),
            wall_limit_ms: 0,
            dead_man_ms: 15 * 60 * 1000,
            kill_grace_ms: 5_000,
            buffer_bytes_max: 4 << 20,
            forwards: Vec::new(),
            start_now: true,
            steps: Vec::new(),
            terminal: None,
            pipes: false,
        }
    }

    /// The bytes for init's stdin. Fails where init would refuse them ([`LinkError::Boot`]).
    pub fn encode(&self) -> Result<Vec<u8>, LinkError> {
        let bytes = |text: &OsString| text.clone().into_vec();
        let path = |path: &PathBuf| path.clone().into_os_string().into_vec();
        let message = BootMessage {
            cell: self.cell.as_str().as_bytes().to_vec(),
            key: self.key.0,
            argv: self.argv.iter().map(bytes).collect(),
            env: self.env.iter().map(|(name, value)| (bytes(name), bytes(value))).collect(),
            cwd: path(&self.cwd),
            ctl_path: path(&self.ctl_socket),
            wall_limit_ms: self.wall_limit_ms,
            dead_man_ms: self.dead_man_ms,
            kill_grace_ms: self.kill_grace_ms,
            buffer_bytes_max: self.buffer_bytes_max,
            forwards: self
                .forwards
                .iter()
                .map(|forward| Forward { port: forward.port, path: path(&forward.socket) })
                .collect(),
            start_now: self.start_now,
            steps: self.steps.iter().map(|step| step.iter().map(bytes).collect()).collect(),
            terminal: self.terminal,
            pipes: self.pipes,
        };
        message.check().map_err(|WireError(what)| LinkError::Boot { what })?;
        let encoded = message.encode();
        if encoded.len() > BOOT_BYTES_MAX {
            return Err(LinkError::Boot { what: "command, steps and environment are over 4 MiB" });
        }
        Ok(encoded)
    }
}

impl fmt::Debug for Boot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Boot").field("cell", &self.cell).field("argv", &self.argv).finish_non_exhaustive()
    }
}
