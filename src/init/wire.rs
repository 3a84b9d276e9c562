//! The protocol between hotcell-init (PID 1 of a cell) and the daemon on `ctl.sock`: handshake and frames. One
//! definition for both sides: `src/link.rs` includes this file by path. It must never do IO, allocate by a length that it has not checked, or panic on any input.
//!
//! A frame is a header of 16 bytes (kind u8, three zero bytes, body length u32, argument u64, all little
//! endian) and a body. Stream bytes carry their offset in the stream as the argument.
//!
//! ```text
//! init → daemon   Hello     version, init's nonce, cell id
//! daemon → init   Challenge daemon's nonce, HMAC(key, "daemon" ‖ cell ‖ both nonces)
//! init → daemon   Proof     what init holds, HMAC(key, "init" ‖ cell ‖ both nonces ‖ what init holds)
//! daemon → init   Welcome   how much of stdout and stderr the daemon has
//! ```
//! From then on each side sends the bytes from the offset that the other one named. init forgets output only
//! when it is acknowledged; the daemon sends at most [`STDIN_WINDOW_BYTES`] beyond the last acknowledged byte
//! of stdin, so that a frame which kills is never stuck behind input that the agent does not read.
//!
//! Before the agent the daemon may have the steps of the boot message run: each `Step` is answered by one
//! `StepEnded`, after all that the step printed. init sends it again on each new connection until the daemon
//! asks for something else, and again whenever the daemon asks for that step again.

use super::hash::{DIGEST_BYTES, equal_in_constant_time, hmac_sha256};

/// Protocol version; both sides come from one build, so another version is an error.
pub const VERSION: u16 = 2;
/// Bytes in a frame header.
pub const HEADER_BYTES: usize = 16;
/// Largest body of any frame.
pub const BODY_BYTES_MAX: usize = 1 << 20;
/// Largest output chunk that init sends in one frame.
pub const OUTPUT_CHUNK_BYTES_MAX: usize = 256 << 10;
/// Largest stdin chunk that the daemon sends in one frame.
pub const STDIN_CHUNK_BYTES_MAX: usize = 64 << 10;
/// Bytes of stdin that may be on the way or held by init: sent but not yet taken by the agent.
pub const STDIN_WINDOW_BYTES: usize = 1 << 20;
/// Longest text in a [`FromInit::SpawnFailed`].
pub const MESSAGE_BYTES_MAX: usize = 4096;
/// Longest cell id.
pub const CELL_BYTES_MAX: usize = 64;
/// Most steps of one cell.
pub const STEPS_MAX: usize = 64;
/// Largest body before the handshake is over.
pub const HANDSHAKE_BODY_BYTES_MAX: usize = 256;

/// Bytes that are not this protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WireError(
    /// What is wrong with them.
    pub &'static str,
);

/// One of the agent's two output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OutputStream {
    /// The agent's standard output.
    Stdout,
    /// The agent's standard error.
    Stderr,
}

impl OutputStream {
    /// 0 or 1, for tables of both streams.
    pub fn index(self) -> usize {
        match self {
            Self::Stdout => 0,
            Self::Stderr => 1,
        }
    }
}

/// How the agent's process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// It returned this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

impl ExitStatus {
    fn to_wire(self) -> (u8, i32) {
        match self {
            Self::Code(code) => (0, code),
            Self::Signal(signal) => (1, signal),
        }
    }

    fn from_wire(how: u8, value: i32) -> Result<Self, WireError> {
        match how {
            0 => Ok(Self::Code(value)),
            1 => Ok(Self::Signal(value)),
            _ => Err(WireError("unknown exit status")),
        }
    }
}

/// Who or what made the agent end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReason {
    /// The agent itself (or a signal that the daemon sent it).
    Agent,
    /// The wall-clock limit of the boot message.
    WallLimit,
    /// No daemon for the dead-man limit.
    DeadMan,
    /// The daemon's Kill frame.
    Killed,
}

/// The last frame of a cell: how it ended and what it used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitReport {
    /// How the agent's process ended.
    pub status: ExitStatus,
    /// What made it end.
    pub reason: ExitReason,
    /// Processes that the kernel killed for memory in this cell, as its cgroup counts them.
    pub oom_kills: u64,
    /// Most memory the cell used at one time, in bytes; 0 where no counter was readable.
    pub peak_memory_bytes: u64,
    /// CPU time of the whole cell, in microseconds.
    pub cpu_us: u64,
}

/// What init holds when it connects, told in its Proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Held {
    /// Bytes of stdin that init has received.
    pub stdin_received: u64,
    /// Bytes of stdin that the agent has taken.
    pub stdin_taken: u64,
    /// For stdout and stderr: the first byte that init still keeps.
    pub output_base: [u64; 2],
    /// For stdout and stderr: the end of what it has read.
    pub output_end: [u64; 2],
    /// Whether the agent was started (or could not be).
    pub started: bool,
}

/// No stream of a cell gets this long; sums with it cannot overflow.
const OFFSET_MAX: u64 = 1 << 60;
const HELD_BYTES: usize = 6 * 8 + 1;

impl Held {
    fn to_bytes(self) -> [u8; HELD_BYTES] {
        let [out_base, err_base] = self.output_base;
        let [out_end, err_end] = self.output_end;
        let words = [self.stdin_received, self.stdin_taken, out_base, err_base, out_end, err_end];
        let mut bytes = [0; HELD_BYTES];
        for (slot, word) in bytes.chunks_exact_mut(8).zip(words) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        bytes[HELD_BYTES - 1] = u8::from(self.started);
        bytes
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let held = Self {
            stdin_received: reader.u64()?,
            stdin_taken: reader.u64()?,
            output_base: [reader.u64()?, reader.u64()?],
            output_end: [reader.u64()?, reader.u64()?],
            started: reader.flag()?,
        };
        let [out_base, err_base] = held.output_base;
        let [out_end, err_end] = held.output_end;
        let ordered = held.stdin_taken <= held.stdin_received && out_base <= out_end && err_base <= err_end;
        let ordered = ordered && held.stdin_received.max(out_end).max(err_end) <= OFFSET_MAX;
        if ordered { Ok(held) } else { Err(WireError("offsets out of order")) }
    }
}

/// A parsed header; its body length is within the limit it was parsed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    kind: u8,
    /// Bytes that follow.
    pub body_bytes: usize,
    argument: u64,
}

impl Header {
    /// Parses a header; a body over `body_bytes_max` is an error.
    pub fn parse(bytes: &[u8; HEADER_BYTES], body_bytes_max: usize) -> Result<Self, WireError> {
        let mut reader = Reader { rest: bytes };
        let kind = reader.u8()?;
        if reader.array::<3>()? != [0; 3] {
            return Err(WireError("reserved header bytes are not zero"));
        }
        let body_bytes = reader.u32()? as usize;
        if body_bytes > body_bytes_max {
            return Err(WireError("frame over the size limit"));
        }
        Ok(Self { kind, body_bytes, argument: reader.u64()? })
    }

    /// The header's bytes.
    pub fn encode(kind: u8, body_bytes: usize, argument: u64) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = kind;
        bytes[4..8].copy_from_slice(&(body_bytes as u32).to_le_bytes());
        bytes[8..].copy_from_slice(&argument.to_le_bytes());
        bytes
    }

    /// The stream and offset of an output frame, so that its body need not be copied to be understood.
    pub fn output(&self) -> Option<(OutputStream, u64)> {
        match self.kind {
            kind::STDOUT => Some((OutputStream::Stdout, self.argument)),
            kind::STDERR => Some((OutputStream::Stderr, self.argument)),
            _ => None,
        }
    }
}

mod kind {
    pub(super) const HELLO: u8 = 1;
    pub(super) const PROOF: u8 = 2;
    pub(super) const STDOUT: u8 = 3;
    pub(super) const STDERR: u8 = 4;
    pub(super) const STDIN_ACK: u8 = 5;
    pub(super) const SPAWN_FAILED: u8 = 6;
    pub(super) const EXITED: u8 = 7;
    pub(super) const STEP_ENDED: u8 = 8;
    pub(super) const CHALLENGE: u8 = 33;
    pub(super) const WELCOME: u8 = 34;
    pub(super) const STDIN: u8 = 35;
    pub(super) const CLOSE_STDIN: u8 = 36;
    pub(super) const ACK_STDOUT: u8 = 37;
    pub(super) const ACK_STDERR: u8 = 38;
    pub(super) const SIGNAL: u8 = 39;
    pub(super) const KILL: u8 = 40;
    pub(super) const BYE: u8 = 41;
    pub(super) const START: u8 = 42;
    pub(super) const STEP: u8 = 43;
    pub(super) const RESIZE: u8 = 44;
}

/// The header of an output frame.
pub fn output_header(stream: OutputStream, offset: u64, body_bytes: usize) -> [u8; HEADER_BYTES] {
    let kind = match stream {
        OutputStream::Stdout => kind::STDOUT,
        OutputStream::Stderr => kind::STDERR,
    };
    Header::encode(kind, body_bytes, offset)
}

/// The header of a stdin frame.
pub fn stdin_header(offset: u64, body_bytes: usize) -> [u8; HEADER_BYTES] {
    Header::encode(kind::STDIN, body_bytes, offset)
}

/// Frames that init sends. Output frames have their own path: [`output_header`] and [`Header::output`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromInit {
    /// Opens the handshake.
    Hello { version: u16, nonce: [u8; DIGEST_BYTES], cell: Vec<u8> },
    /// Proves that init has the key, and says what init holds.
    Proof { held: Held, mac: [u8; DIGEST_BYTES] },
    /// The agent has taken stdin up to here.
    StdinAck { offset: u64 },
    /// The agent could not be started; no Exited follows.
    SpawnFailed { errno: i32, message: String },
    /// The agent ended, and all its output was sent before this frame.
    Exited(ExitReport),
    /// The main process of a step ended, and all it printed until then was sent before this frame.
    StepEnded { index: u32, status: ExitStatus },
}

impl FromInit {
    /// The whole frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let (kind, argument) = match self {
            Self::Hello { version, nonce, cell } => {
                body.extend_from_slice(&version.to_le_bytes());
                body.extend_from_slice(nonce);
                body.extend_from_slice(cell);
                (kind::HELLO, 0)
            }
            Self::Proof { held, mac } => {
                body.extend_from_slice(&held.to_bytes());
                body.extend_from_slice(mac);
                (kind::PROOF, 0)
            }
            Self::StdinAck { offset } => (kind::STDIN_ACK, *offset),
            Self::SpawnFailed { errno, message } => {
                let bytes = message.as_bytes();
                body.extend_from_slice(&bytes[..bytes.len().min(MESSAGE_BYTES_MAX)]);
                (kind::SPAWN_FAILED, u64::from(errno.unsigned_abs()))
            }
            Self::Exited(report) => {
                let (how, value) = report.status.to_wire();
                let reason = match report.reason {
                    ExitReason::Agent => 0u8,
                    ExitReason::WallLimit => 1,
                    ExitReason::DeadMan => 2,
                    ExitReason::Killed => 3,
                };
                body.extend_from_slice(&[how, reason]);
                body.extend_from_slice(&value.to_le_bytes());
                body.extend_from_slice(&report.oom_kills.to_le_bytes());
                body.extend_from_slice(&report.peak_memory_bytes.to_le_bytes());
                body.extend_from_slice(&report.cpu_us.to_le_bytes());
                (kind::EXITED, 0)
            }
            Self::StepEnded { index, status } => {
                let (how, value) = status.to_wire();
                body.push(how);
                body.extend_from_slice(&value.to_le_bytes());
                (kind::STEP_ENDED, u64::from(*index))
            }
        };
        frame(kind, argument, &body)
    }

    /// Parses a frame that is no output frame; `body` has the length that the header names.
    pub fn decode(header: &Header, body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader { rest: body };
        let frame = match header.kind {
            kind::HELLO => {
                let (version, nonce) = (reader.u16()?, reader.array()?);
                let cell = reader.take(reader.rest.len().min(CELL_BYTES_MAX))?.to_vec();
                Self::Hello { version, nonce, cell }
            }
            kind::PROOF => Self::Proof { held: Held::read(&mut reader)?, mac: reader.array()? },
            kind::STDIN_ACK => Self::StdinAck { offset: header.argument },
            kind::SPAWN_FAILED => {
                let errno = i32::try_from(header.argument).map_err(|_| WireError("errno out of range"))?;
                let text = reader.take(reader.rest.len().min(MESSAGE_BYTES_MAX))?;
                Self::SpawnFailed { errno, message: String::from_utf8_lossy(text).into_owned() }
            }
            kind::EXITED => Self::Exited(read_report(&mut reader)?),
            kind::STEP_ENDED => {
                let (index, how, value) = (step_index(header)?, reader.u8()?, reader.u32()? as i32);
                Self::StepEnded { index, status: ExitStatus::from_wire(how, value)? }
            }
            _ => return Err(WireError("unknown frame kind")),
        };
        reader.end()?;
        Ok(frame)
    }
}

fn read_report(reader: &mut Reader<'_>) -> Result<ExitReport, WireError> {
    let (how, reason, value) = (reader.u8()?, reader.u8()?, reader.u32()? as i32);
    Ok(ExitReport {
        status: ExitStatus::from_wire(how, value)?,
        reason: match reason {
            0 => ExitReason::Agent,
            1 => ExitReason::WallLimit,
            2 => ExitReason::DeadMan,
            3 => ExitReason::Killed,
            _ => return Err(WireError("unknown exit reason")),
        },
        oom_kills: reader.u64()?,
        peak_memory_bytes: reader.u64()?,
        cpu_us: reader.u64()?,
    })
}

/// Frames that the daemon sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToInit<'a> {
    /// Answers Hello and proves that the daemon has the key.
    Challenge { nonce: [u8; DIGEST_BYTES], mac: [u8; DIGEST_BYTES] },
    /// Ends the handshake: what the daemon has of stdout and stderr.
    Welcome { received: [u64; 2] },
    /// Bytes for the agent's stdin.
    Stdin { offset: u64, bytes: &'a [u8] },
    /// Close the agent's stdin when it has taken everything up to this offset.
    CloseStdin { offset: u64 },
    /// init may forget the stream's bytes before this offset.
    Ack { stream: OutputStream, offset: u64 },
    /// Send this signal to the process group of the running step or the agent; of a terminal, to the group in
    /// its foreground.
    Signal { number: i32 },
    /// Kill every process of the cell but init.
    Kill,
    /// Exited or SpawnFailed was processed; init may end.
    Bye,
    /// Start the agent of a cell that was booted without `start_now`.
    Start,
    /// Run this step of the boot message.
    Step { index: u32 },
    /// The terminal has this size now.
    Resize { rows: u16, cols: u16 },
}

impl<'a> ToInit<'a> {
    /// The whole frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut pair = [0; 2 * DIGEST_BYTES];
        let mut words = [0; 16];
        let (kind, argument, body): (u8, u64, &[u8]) = match self {
            Self::Challenge { nonce, mac } => {
                pair[..DIGEST_BYTES].copy_from_slice(nonce);
                pair[DIGEST_BYTES..].copy_from_slice(mac);
                (kind::CHALLENGE, 0, &pair)
            }
            Self::Welcome { received } => {
                words[..8].copy_from_slice(&received[0].to_le_bytes());
                words[8..].copy_from_slice(&received[1].to_le_bytes());
                (kind::WELCOME, 0, &words)
            }
            Self::Stdin { offset, bytes } => (kind::STDIN, *offset, bytes),
            Self::CloseStdin { offset } => (kind::CLOSE_STDIN, *offset, &[]),
            Self::Ack { stream: OutputStream::Stdout, offset } => (kind::ACK_STDOUT, *offset, &[]),
            Self::Ack { stream: OutputStream::Stderr, offset } => (kind::ACK_STDERR, *offset, &[]),
            Self::Signal { number } => (kind::SIGNAL, u64::from(number.unsigned_abs()), &[]),
            Self::Kill => (kind::KILL, 0, &[]),
            Self::Bye => (kind::BYE, 0, &[]),
            Self::Start => (kind::START, 0, &[]),
            Self::Step { index } => (kind::STEP, u64::from(*index), &[]),
            Self::Resize { rows, cols } => (kind::RESIZE, u64::from(*rows) << 16 | u64::from(*cols), &[]),
        };
        frame(kind, argument, body)
    }

    /// Parses a frame; `body` has the length that the header names.
    pub fn decode(header: &Header, body: &'a [u8]) -> Result<Self, WireError> {
        let mut reader = Reader { rest: body };
        let argument = header.argument;
        let frame = match header.kind {
            kind::CHALLENGE => Self::Challenge { nonce: reader.array()?, mac: reader.array()? },
            kind::WELCOME => Self::Welcome { received: [reader.u64()?, reader.u64()?] },
            kind::STDIN => Self::Stdin { offset: argument, bytes: reader.take(body.len())? },
            kind::CLOSE_STDIN => Self::CloseStdin { offset: argument },
            kind::ACK_STDOUT => Self::Ack { stream: OutputStream::Stdout, offset: argument },
            kind::ACK_STDERR => Self::Ack { stream: OutputStream::Stderr, offset: argument },
            kind::SIGNAL if (1..=64).contains(&argument) => Self::Signal { number: argument as i32 },
            kind::SIGNAL => return Err(WireError("signal number out of range")),
            kind::KILL => Self::Kill,
            kind::BYE => Self::Bye,
            kind::START => Self::Start,
            kind::STEP => Self::Step { index: step_index(header)? },
            kind::RESIZE if argument <= u64::from(u32::MAX) => {
                Self::Resize { rows: (argument >> 16) as u16, cols: argument as u16 }
            }
            kind::RESIZE => return Err(WireError("terminal size out of range")),
            _ => return Err(WireError("unknown frame kind")),
        };
        reader.end()?;
        Ok(frame)
    }
}

/// The step that a frame is about.
fn step_index(header: &Header) -> Result<u32, WireError> {
    match u32::try_from(header.argument) {
        Ok(index) if (index as usize) < STEPS_MAX => Ok(index),
        _ => Err(WireError("a step over the limit")),
    }
}

fn frame(kind: u8, argument: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    bytes.extend_from_slice(&Header::encode(kind, body.len(), argument));
    bytes.extend_from_slice(body);
    bytes
}

/// The nonces, cell and key of one handshake.
pub struct Handshake<'a> {
    /// The cell's key.
    pub key: &'a [u8; DIGEST_BYTES],
    /// The cell's id.
    pub cell: &'a [u8],
    /// init's nonce, from Hello.
    pub init_nonce: &'a [u8; DIGEST_BYTES],
    /// The daemon's nonce, from Challenge.
    pub daemon_nonce: &'a [u8; DIGEST_BYTES],
}

impl Handshake<'_> {
    /// The daemon's proof that it has the key.
    pub fn daemon_mac(&self) -> [u8; DIGEST_BYTES] {
        self.mac(b"hotcell ctl 1 daemon", &[])
    }

    /// init's proof that it has the key, over what it holds.
    pub fn init_mac(&self, held: &Held) -> [u8; DIGEST_BYTES] {
        self.mac(b"hotcell ctl 1 init", &held.to_bytes())
    }

    /// Whether this is the daemon's proof.
    pub fn daemon_is(&self, mac: &[u8; DIGEST_BYTES]) -> bool {
        equal_in_constant_time(&self.daemon_mac(), mac)
    }

    /// Whether this is init's proof.
    pub fn init_is(&self, held: &Held, mac: &[u8; DIGEST_BYTES]) -> bool {
        equal_in_constant_time(&self.init_mac(held), mac)
    }

    /// Role and cell carry their lengths, so that no two handshakes give the same bytes to the MAC.
    fn mac(&self, role: &[u8], held: &[u8]) -> [u8; DIGEST_BYTES] {
        let lengths = [role.len() as u8, self.cell.len() as u8];
        hmac_sha256(self.key, &[&lengths, role, self.cell, self.init_nonce, self.daemon_nonce, held])
    }
}

/// Takes fields off the front of a slice; too few bytes are an error.
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(WireError("too short"))?;
        self.rest = rest;
        Ok(taken)
    }
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(WireError("too short"))?;
        self.rest = rest;
        Ok(*taken)
    }
    pub fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.array::<1>()?[0])
    }
    pub fn u16(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    pub fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    pub fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    pub fn flag(&mut self) -> Result<bool, WireError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(WireError("neither yes nor no")),
        }
    }
    pub fn bytes(&mut self, bytes_max: usize) -> Result<Vec<u8>, WireError> {
        let count = self.u32()? as usize;
        if count > bytes_max {
            return Err(WireError("a field over its limit"));
        }
        Ok(self.take(count)?.to_vec())
    }
    pub fn list<T>(
        &mut self,
        entries_max: usize,
        mut entry: impl FnMut(&mut Self) -> Result<T, WireError>,
    ) -> Result<Vec<T>, WireError> {
        let count = self.u32()? as usize;
        if count > entries_max {
            return Err(WireError("a list over its limit"));
        }
        // Not reserved by `count`: the bytes for the entries may not be there.
        let mut entries = Vec::new();
        for _ in 0..count {
            entries.push(entry(self)?);
        }
        Ok(entries)
    }
    pub fn end(&self) -> Result<(), WireError> {
        if self.rest.is_empty() { Ok(()) } else { Err(WireError("bytes after the end")) }
    }
}
