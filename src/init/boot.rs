//! The boot message: everything init is told on its stdin before the first frame. Included by the daemon too
//! (`src/link.rs`). It must never allocate by a length that it has not checked, or panic on any input.

use super::hash::DIGEST_BYTES;
use super::wire::{CELL_BYTES_MAX, Reader, STEPS_MAX, VERSION, WireError};

/// Largest boot message.
pub const BOOT_BYTES_MAX: usize = 4 << 20;
const BOOT_MAGIC: &[u8; 4] = b"HCB\x01";
const ENTRIES_MAX: usize = 65_536;
const FORWARDS_MAX: usize = 16;

/// A TCP port in the cell whose connections init carries to a unix socket.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Forward {
    /// Port on 127.0.0.1.
    pub port: u16,
    /// Path of the socket, as the cell sees it.
    pub path: Vec<u8>,
}

/// What init reads from its stdin: everything it will ever be told about its cell besides frames.
#[derive(Clone, PartialEq, Eq)]
pub struct BootMessage {
    /// The cell's id.
    pub cell: Vec<u8>,
    /// The key of this cell's `ctl.sock`.
    pub key: [u8; DIGEST_BYTES],
    /// The agent's command; the first is a path, or a name to find in the agent's PATH.
    pub argv: Vec<Vec<u8>>,
    /// The agent's whole environment.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// The agent's working directory.
    pub cwd: Vec<u8>,
    /// Where `ctl.sock` is.
    pub ctl_path: Vec<u8>,
    /// From the start of the first step, or of the agent where there is none, to SIGTERM; 0 is no limit.
    pub wall_limit_ms: u64,
    /// Time without a daemon after which the agent is ended.
    pub dead_man_ms: u64,
    /// From SIGTERM to SIGKILL.
    pub kill_grace_ms: u64,
    /// Output kept per stream until it is acknowledged.
    pub buffer_bytes_max: u32,
    /// Ports to listen on.
    pub forwards: Vec<Forward>,
    /// Start the agent at once, or wait for a Start frame.
    pub start_now: bool,
    /// Commands that Step frames run before the agent, in its environment and directory.
    pub steps: Vec<Vec<Vec<u8>>>,
    /// The agent's streams are a terminal of this many rows and columns.
    pub terminal: Option<(u16, u16)>,
    /// The agent's streams are pipes, which it can open again by name (`/dev/stdout`), in place of sockets.
    pub pipes: bool,
}

impl BootMessage {
    /// The message with its magic and length in front.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend_from_slice(&VERSION.to_le_bytes());
        put_bytes(&mut body, &self.cell);
        body.extend_from_slice(&self.key);
        put_len(&mut body, self.argv.len());
        self.argv.iter().for_each(|argument| put_bytes(&mut body, argument));
        put_len(&mut body, self.env.len());
        for (name, value) in &self.env {
            put_bytes(&mut body, name);
            put_bytes(&mut body, value);
        }
        put_bytes(&mut body, &self.cwd);
        put_bytes(&mut body, &self.ctl_path);
        for limit in [self.wall_limit_ms, self.dead_man_ms, self.kill_grace_ms] {
            body.extend_from_slice(&limit.to_le_bytes());
        }
        body.extend_from_slice(&self.buffer_bytes_max.to_le_bytes());
        put_len(&mut body, self.forwards.len());
        for forward in &self.forwards {
            body.extend_from_slice(&forward.port.to_le_bytes());
            put_bytes(&mut body, &forward.path);
        }
        body.push(u8::from(self.start_now));
        put_len(&mut body, self.steps.len());
        for step in &self.steps {
            put_len(&mut body, step.len());
            step.iter().for_each(|argument| put_bytes(&mut body, argument));
        }
        body.push(u8::from(self.terminal.is_some()));
        let (rows, cols) = self.terminal.unwrap_or_default();
        body.extend_from_slice(&rows.to_le_bytes());
        body.extend_from_slice(&cols.to_le_bytes());
        body.push(u8::from(self.pipes));
        let mut message = BOOT_MAGIC.to_vec();
        put_bytes(&mut message, &body);
        message
    }

    /// How many bytes follow the first eight.
    pub fn body_bytes(start: &[u8; 8]) -> Result<usize, WireError> {
        let mut reader = Reader::new(start);
        if &reader.array::<4>()? != BOOT_MAGIC {
            return Err(WireError("no boot message"));
        }
        let bytes = reader.u32()? as usize;
        if bytes > BOOT_BYTES_MAX { Err(WireError("boot message over the size limit")) } else { Ok(bytes) }
    }

    /// Parses what follows the first eight bytes.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(body);
        if reader.u16()? != VERSION {
            return Err(WireError("boot message of another protocol version"));
        }
        let boot = Self {
            cell: reader.bytes(CELL_BYTES_MAX)?,
            key: reader.array()?,
            argv: reader.list(ENTRIES_MAX, |r| r.bytes(BOOT_BYTES_MAX))?,
            env: reader.list(ENTRIES_MAX, |r| Ok((r.bytes(BOOT_BYTES_MAX)?, r.bytes(BOOT_BYTES_MAX)?)))?,
            cwd: reader.bytes(4096)?,
            ctl_path: reader.bytes(4096)?,
            wall_limit_ms: reader.u64()?,
            dead_man_ms: reader.u64()?,
            kill_grace_ms: reader.u64()?,
            buffer_bytes_max: reader.u32()?,
            forwards: reader.list(FORWARDS_MAX, |r| Ok(Forward { port: r.u16()?, path: r.bytes(4096)? }))?,
            start_now: reader.flag()?,
            steps: reader.list(STEPS_MAX, |r| r.list(ENTRIES_MAX, |r| r.bytes(BOOT_BYTES_MAX)))?,
            terminal: {
                let (there, size) = (reader.flag()?, (reader.u16()?, reader.u16()?));
                there.then_some(size)
            },
            pipes: reader.flag()?,
        };
        reader.end()?;
        boot.check()?;
        Ok(boot)
    }

    /// Whether init can act on it; the daemon asks before it sends.
    pub fn check(&self) -> Result<(), WireError> {
        let strings = self.argv.iter().chain(self.env.iter().flat_map(|(name, value)| [name, value]));
        let strings = strings.chain(self.steps.iter().flatten());
        if strings.chain([&self.cwd, &self.ctl_path]).any(|bytes| bytes.contains(&0)) {
            return Err(WireError("a NUL byte in argv, env or a path"));
        }
        if self.env.iter().any(|(name, _)| name.is_empty() || name.contains(&b'=')) {
            return Err(WireError("an environment name that is empty or holds '='"));
        }
        if self.argv.first().is_none_or(Vec::is_empty) {
            return Err(WireError("no command"));
        }
        if self.steps.len() > STEPS_MAX {
            return Err(WireError("more than 64 steps"));
        }
        if self.steps.iter().any(|step| step.first().is_none_or(Vec::is_empty)) {
            return Err(WireError("a step without a command"));
        }
        if self.start_now && !self.steps.is_empty() {
            return Err(WireError("steps before an agent that is started at once"));
        }
        if self.terminal.is_some() && self.pipes {
            return Err(WireError("both a terminal and pipes"));
        }
        if self.cell.len() > CELL_BYTES_MAX || self.forwards.len() > FORWARDS_MAX {
            return Err(WireError("cell id or list of forwards over the limit"));
        }
        if !(4096..=1 << 30).contains(&self.buffer_bytes_max) || self.dead_man_ms == 0 {
            return Err(WireError("buffer or dead-man limit out of range"));
        }
        Ok(())
    }
}

fn put_len(out: &mut Vec<u8>, len: usize) {
    out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_len(out, bytes.len());
    out.extend_from_slice(bytes);
}
