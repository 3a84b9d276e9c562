//! The connection to the daemon: dial, authenticate both ways, resume, carry frames, dial again. It must
//! never send a byte of output before the daemon proved that it has the key, and never give up.

use std::ffi::OsStr;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use crate::boot::BootMessage;
use crate::carry::Carry;
use crate::steps::News;
use crate::sys;
use crate::wire::{
    FromInit, HEADER_BYTES, Handshake, Header, OUTPUT_CHUNK_BYTES_MAX, OutputStream, STDIN_CHUNK_BYTES_MAX,
    ToInit, VERSION, WireError, output_header,
};

const BACKOFF_MS_MIN: u64 = 1;
const BACKOFF_MS_MAX: u64 = 100;
const HANDSHAKE_MS_MAX: u64 = 5_000;
/// How long a full listener queue (a flood from inside the cell) may hold one attempt.
const CONNECT_MS_MAX: u32 = 50;
const INPUT_BYTES: usize = 2 * (HEADER_BYTES + STDIN_CHUNK_BYTES_MAX);
/// Reads per wake-up, so that one side cannot starve the rest of the loop.
const READS_MAX: usize = 8;

/// What the daemon wants, besides the streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Signal the agent's group.
    Signal(i32),
    /// Kill everything.
    Kill,
    /// Start the agent.
    Start,
    /// Run a step.
    Step(u32),
    /// The terminal's new rows and columns.
    Resize(u16, u16),
    /// Nothing more to report.
    Bye,
}

/// Why a connection is dropped.
enum Fault {
    Io,
    Wire(WireError),
}

impl From<io::Error> for Fault {
    fn from(_: io::Error) -> Self {
        Self::Io
    }
}

impl From<WireError> for Fault {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

/// The daemon's side of the cell, connected or not.
pub(crate) struct Ctl {
    path: PathBuf,
    cell: Vec<u8>,
    key: [u8; 32],
    connection: Option<Connection>,
    retry_at_ms: u64,
    backoff_ms: u64,
    last_contact_ms: u64,
    complaints: u32,
}

struct Connection {
    stream: UnixStream,
    stage: Stage,
    input: Vec<u8>,
    filled: usize,
    control: Vec<u8>,
    control_written: usize,
    data: Option<Data>,
    last_stream: OutputStream,
    news_sent: u64,
    last_frame_sent: bool,
    blocked: bool,
}

#[derive(Clone, Copy)]
enum Stage {
    Challenge { nonce: [u8; 32], deadline_ms: u64 },
    Welcome { deadline_ms: u64 },
    Live,
}

/// An output frame on its way, straight out of the ring.
struct Data {
    header: [u8; HEADER_BYTES],
    stream: OutputStream,
    from: u64,
    to: u64,
    written: usize,
}

/// What a connection needs from the rest of init while it works.
pub(crate) struct Work<'a> {
    /// The streams.
    pub(crate) carry: &'a mut Carry,
    /// Whether the agent was started.
    pub(crate) started: bool,
    /// How the last step ended, while the daemon is to be told.
    pub(crate) news: Option<&'a News>,
    /// Exited or SpawnFailed, once it is known.
    pub(crate) last_frame: Option<&'a FromInit>,
}

impl Ctl {
    /// Not connected yet; the first attempt is due at once.
    pub(crate) fn new(boot: &BootMessage) -> Self {
        Self {
            path: PathBuf::from(OsStr::from_bytes(&boot.ctl_path)),
            cell: boot.cell.clone(),
            key: boot.key,
            connection: None,
            retry_at_ms: 0,
            backoff_ms: BACKOFF_MS_MIN,
            last_contact_ms: sys::now_ms(),
            complaints: 0,
        }
    }

    /// When a daemon was last there.
    pub(crate) fn last_contact_ms(&self) -> u64 {
        self.last_contact_ms
    }

    /// When [`Ctl::tick`] is due.
    pub(crate) fn deadline_ms(&self) -> Option<u64> {
        match self.connection.as_ref().map(|connection| connection.stage) {
            None => Some(self.retry_at_ms),
            Some(Stage::Challenge { deadline_ms, .. } | Stage::Welcome { deadline_ms }) => Some(deadline_ms),
            Some(Stage::Live) => None,
        }
    }

    /// What to poll.
    pub(crate) fn interest(&self) -> Option<libc::pollfd> {
        let connection = self.connection.as_ref()?;
        let out = if connection.blocked { libc::POLLOUT } else { 0 };
        Some(sys::interest(connection.fd(), libc::POLLIN | out))
    }

    /// Dials when it is time, and drops a handshake that takes too long.
    pub(crate) fn tick(&mut self, now_ms: u64) {
        match self.connection.as_ref().map(|connection| connection.stage) {
            Some(Stage::Live) => self.last_contact_ms = now_ms,
            Some(Stage::Challenge { deadline_ms, .. } | Stage::Welcome { deadline_ms })
                if now_ms >= deadline_ms =>
            {
                self.drop_connection(Fault::Wire(WireError("the handshake took too long")));
            }
            None if now_ms >= self.retry_at_ms => match self.dial(now_ms) {
                Ok(connection) => self.connection = Some(connection),
                Err(_) => self.drop_connection(Fault::Io),
            },
            _ => {}
        }
    }

    fn dial(&self, now_ms: u64) -> io::Result<Connection> {
        let stream = UnixStream::from(sys::connect_unix(&self.path, CONNECT_MS_MAX)?);
        let nonce = sys::random()?;
        let hello = FromInit::Hello { version: VERSION, nonce, cell: self.cell.clone() };
        Ok(Connection {
            stream,
            stage: Stage::Challenge { nonce, deadline_ms: now_ms + HANDSHAKE_MS_MAX },
            input: vec![0; INPUT_BYTES],
            filled: 0,
            control: hello.encode(),
            control_written: 0,
            data: None,
            last_stream: OutputStream::Stderr,
            news_sent: 0,
            last_frame_sent: false,
            // The greeting waits to be written.
            blocked: true,
        })
    }

    fn drop_connection(&mut self, why: Fault) {
        if let Fault::Wire(WireError(what)) = why
            && self.complaints < 16
        {
            self.complaints += 1;
            sys::complain(&format!("ctl connection dropped: {what}"));
        }
        let now_ms = sys::now_ms();
        if self.connection.take().is_some_and(|connection| matches!(connection.stage, Stage::Live)) {
            self.last_contact_ms = now_ms;
        }
        self.retry_at_ms = now_ms + self.backoff_ms;
        self.backoff_ms = (self.backoff_ms * 2).min(BACKOFF_MS_MAX);
    }

    /// Reads frames; the orders among them are added to `orders`.
    pub(crate) fn receive(&mut self, work: &mut Work<'_>, orders: &mut Vec<Order>) {
        let Some(connection) = self.connection.as_mut() else { return };
        let was_live = matches!(connection.stage, Stage::Live);
        let identity = (self.cell.as_slice(), &self.key);
        if let Err(why) = connection.receive(identity, work, orders) {
            self.drop_connection(why);
        } else if !was_live && matches!(connection.stage, Stage::Live) {
            self.backoff_ms = BACKOFF_MS_MIN;
            self.last_contact_ms = sys::now_ms();
        }
    }

    /// Writes what there is to write, as far as the socket takes it.
    pub(crate) fn send(&mut self, work: &mut Work<'_>) {
        if let Some(connection) = self.connection.as_mut()
            && let Err(why) = connection.send(work)
        {
            self.drop_connection(why.into());
        }
    }
}

impl Connection {
    fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    fn receive(
        &mut self,
        identity: (&[u8], &[u8; 32]),
        work: &mut Work<'_>,
        orders: &mut Vec<Order>,
    ) -> Result<(), Fault> {
        for _ in 0..READS_MAX {
            let count = match self.stream.read(&mut self.input[self.filled..]) {
                Ok(0) => return Err(Fault::Io),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            self.filled += count;
            let input = std::mem::take(&mut self.input);
            let parsed = self.parse(&input[..self.filled], identity, work, orders);
            self.input = input;
            let used = parsed?;
            self.input.copy_within(used..self.filled, 0);
            self.filled -= used;
            if self.filled + count < INPUT_BYTES / 2 {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Handles the whole frames in `input` and returns how many bytes they were.
    fn parse(
        &mut self,
        input: &[u8],
        identity: (&[u8], &[u8; 32]),
        work: &mut Work<'_>,
        orders: &mut Vec<Order>,
    ) -> Result<usize, Fault> {
        let mut used = 0;
        while let Some((head, rest)) = input[used..].split_first_chunk::<HEADER_BYTES>() {
            let header = Header::parse(head, STDIN_CHUNK_BYTES_MAX)?;
            let Some(body) = rest.get(..header.body_bytes) else { break };
            used += HEADER_BYTES + header.body_bytes;
            let frame = ToInit::decode(&header, body)?;
            match self.stage {
                Stage::Live => live(frame, work, orders)?,
                _ => self.handshake(frame, identity, work)?,
            }
        }
        Ok(used)
    }

    fn handshake(
        &mut self,
        frame: ToInit<'_>,
        (cell, key): (&[u8], &[u8; 32]),
        work: &mut Work<'_>,
    ) -> Result<(), Fault> {
        match (self.stage, frame) {
            (Stage::Challenge { nonce, deadline_ms }, ToInit::Challenge { nonce: theirs, mac }) => {
                let handshake = Handshake { key, cell, init_nonce: &nonce, daemon_nonce: &theirs };
                if !handshake.daemon_is(&mac) {
                    return Err(WireError("the other side does not have the key").into());
                }
                let held = work.carry.held(work.started);
                let proof = FromInit::Proof { held, mac: handshake.init_mac(&held) };
                self.control.extend_from_slice(&proof.encode());
                self.stage = Stage::Welcome { deadline_ms };
            }
            (Stage::Welcome { .. }, ToInit::Welcome { received }) => {
                work.carry.resume(received)?;
                self.stage = Stage::Live;
            }
            _ => return Err(WireError("a frame before the handshake was over").into()),
        }
        Ok(())
    }

    fn send(&mut self, work: &mut Work<'_>) -> io::Result<()> {
        self.blocked = false;
        loop {
            let done = if self.data.is_some() {
                self.write_data(work.carry)?
            } else if self.control_written < self.control.len() {
                self.write_control()?
            } else if matches!(self.stage, Stage::Live) && self.next(work) {
                true
            } else {
                return Ok(());
            };
            if !done {
                self.blocked = true;
                return Ok(());
            }
        }
    }

    /// Chooses the next frame; false where there is none.
    fn next(&mut self, work: &mut Work<'_>) -> bool {
        if work.carry.stdin.ack_due {
            work.carry.stdin.ack_due = false;
            self.control = FromInit::StdinAck { offset: work.carry.stdin.taken() }.encode();
            self.control_written = 0;
            return true;
        }
        // Before more output: a service may print for ever.
        let stderr_sent = work.carry.output[OutputStream::Stderr.index()].sent;
        if let Some(news) = work.news.filter(|news| news.number > self.news_sent && news.ready(stderr_sent)) {
            self.news_sent = news.number;
            self.control = news.frame().encode();
            self.control_written = 0;
            return true;
        }
        let turns = match self.last_stream {
            OutputStream::Stdout => [OutputStream::Stderr, OutputStream::Stdout],
            OutputStream::Stderr => [OutputStream::Stdout, OutputStream::Stderr],
        };
        for stream in turns {
            let output = &work.carry.output[stream.index()];
            let (from, end) = (output.sent, output.ring.end());
            if from < end {
                let to = end.min(from + OUTPUT_CHUNK_BYTES_MAX as u64);
                let header = output_header(stream, from, (to - from) as usize);
                self.data = Some(Data { header, stream, from, to, written: 0 });
                self.last_stream = stream;
                return true;
            }
        }
        match work.last_frame {
            Some(frame) if !self.last_frame_sent && work.carry.drained() => {
                self.last_frame_sent = true;
                self.control = frame.encode();
                self.control_written = 0;
                true
            }
            _ => false,
        }
    }

    /// Writes control bytes; false where the socket is full.
    fn write_control(&mut self) -> io::Result<bool> {
        match self.stream.write(&self.control[self.control_written..]) {
            Ok(count) => {
                self.control_written += count;
                Ok(true)
            }
            Err(error) => again(error),
        }
    }

    /// Writes the output frame on its way; false where the socket is full.
    fn write_data(&mut self, carry: &mut Carry) -> io::Result<bool> {
        let Some(data) = &mut self.data else { return Ok(true) };
        let output = &mut carry.output[data.stream.index()];
        let header = data.header.get(data.written..).unwrap_or(&[]);
        let body_written = data.written.saturating_sub(HEADER_BYTES) as u64;
        let [first, second] = output.ring.slices(data.from + body_written, data.to);
        let parts = [IoSlice::new(header), IoSlice::new(first), IoSlice::new(second)];
        match self.stream.write_vectored(&parts) {
            Ok(count) => {
                data.written += count;
                if data.written == HEADER_BYTES + (data.to - data.from) as usize {
                    output.sent = data.to;
                    self.data = None;
                }
                Ok(true)
            }
            Err(error) => again(error),
        }
    }
}

fn again(error: io::Error) -> io::Result<bool> {
    match error.kind() {
        ErrorKind::WouldBlock => Ok(false),
        ErrorKind::Interrupted => Ok(true),
        _ => Err(error),
    }
}

fn live(frame: ToInit<'_>, work: &mut Work<'_>, orders: &mut Vec<Order>) -> Result<(), Fault> {
    match frame {
        ToInit::Stdin { offset, bytes } => {
            work.carry.stdin.receive(offset, bytes)?;
            work.carry.write_stdin();
        }
        ToInit::CloseStdin { offset } => {
            work.carry.stdin.close(offset)?;
            work.carry.write_stdin();
        }
        ToInit::Ack { stream, offset } => work.carry.output[stream.index()].acknowledged(offset)?,
        ToInit::Signal { number } => orders.push(Order::Signal(number)),
        ToInit::Kill => orders.push(Order::Kill),
        ToInit::Bye => orders.push(Order::Bye),
        ToInit::Start => orders.push(Order::Start),
        ToInit::Step { index } => orders.push(Order::Step(index)),
        ToInit::Resize { rows, cols } => {
            // At once: what is typed after it must find it done. A terminal that is still to come gets it by the order.
            if let Some(terminal) = work.carry.terminal() {
                terminal.resize(rows, cols);
            }
            orders.push(Order::Resize(rows, cols));
        }
        ToInit::Challenge { .. } | ToInit::Welcome { .. } => {
            return Err(WireError("a handshake frame after the handshake").into());
        }
    }
    Ok(())
}
