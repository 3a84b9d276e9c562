//! The streams of the agent and the steps, and the bytes of them that init holds: output until the daemon
//! acknowledged it, stdin until the agent took it. It must never drop a byte, read when there is no room, or
//! close the agent's stdin by itself.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::AsRawFd;

use crate::child::Streams;
use crate::ring::Ring;
use crate::source::{Kind, Source};
use crate::sys;
use crate::terminal::Terminal;
use crate::wire::{Held, STDIN_WINDOW_BYTES, WireError};

/// One output stream.
pub(crate) struct Output {
    /// What is held of it.
    pub(crate) ring: Ring,
    /// End of what was written to the present connection.
    pub(crate) sent: u64,
    /// Whose it is; of stderr there may be many, the agent's and those of the steps.
    sources: Vec<Source>,
}

/// The agent's stdin.
pub(crate) struct Stdin {
    ring: Ring,
    sink: Sink,
    close_at: Option<u64>,
    /// The last byte taken, for the end of a terminal's input.
    last: Option<u8>,
    /// The daemon does not yet know how much was taken.
    pub(crate) ack_due: bool,
}

/// Where stdin goes.
enum Sink {
    /// There is no agent yet: bytes are kept.
    Coming,
    /// To the agent.
    Open(File),
    /// To a terminal: all but these last bytes, which end its input, has been written.
    Ending(File, Vec<u8>),
    /// The agent closed it, ended, or it was closed on demand: bytes are dropped.
    Gone,
}

/// All of them.
pub(crate) struct Carry {
    /// stdout, stderr.
    pub(crate) output: [Output; 2],
    /// stdin.
    pub(crate) stdin: Stdin,
    terminal: Option<Terminal>,
}

impl Carry {
    /// Streams without an agent yet: stdin is gathered, output is open.
    pub(crate) fn new(buffer_bytes_max: usize) -> Self {
        let output = || Output { ring: Ring::new(buffer_bytes_max), sent: 0, sources: Vec::new() };
        let ring = Ring::new(STDIN_WINDOW_BYTES);
        let stdin = Stdin { ring, sink: Sink::Coming, close_at: None, last: None, ack_due: false };
        Self { output: [output(), output()], stdin, terminal: None }
    }

    /// Connects the agent's ends.
    pub(crate) fn attach(&mut self, streams: Streams) {
        self.stdin.sink = Sink::Open(streams.stdin);
        let kind = if streams.terminal.is_some() { Kind::Terminal } else { Kind::Agent };
        for (output, file) in self.output.iter_mut().zip(streams.output) {
            output.sources.extend(file.map(|file| Source::new(file, kind)));
        }
        self.terminal = streams.terminal;
        self.stdin.write(self.terminal.as_ref());
    }

    /// Connects what a step and its children print: it goes to stderr, since stdout is the agent's.
    pub(crate) fn attach_step(&mut self, index: u32, file: File) {
        self.stderr().sources.push(Source::new(file, Kind::Step(index)));
    }

    /// The main process of a step ended: what it printed is not told as ended before it was read.
    pub(crate) fn owe(&mut self, index: u32) {
        self.stderr().sources.iter_mut().for_each(|source| source.owe(index));
    }

    /// The end of stderr, once everything that is due was read.
    pub(crate) fn printed(&self) -> Option<u64> {
        let [_, stderr] = &self.output;
        stderr.sources.iter().all(|source| source.due() == 0).then(|| stderr.ring.end())
    }

    /// Words of init's own in stderr; false where there is no room for them.
    pub(crate) fn say(&mut self, words: &str) -> bool {
        self.stderr().ring.push(words.as_bytes())
    }

    fn stderr(&mut self) -> &mut Output {
        let [_, stderr] = &mut self.output;
        stderr
    }

    /// The agent's terminal, if that is what it has.
    pub(crate) fn terminal(&self) -> Option<&Terminal> {
        self.terminal.as_ref()
    }

    /// Adds what to poll: one entry for stdin and one for each source.
    pub(crate) fn interests(&self, fds: &mut Vec<libc::pollfd>) {
        fds.push(self.stdin.interest());
        for output in &self.output {
            let room = output.ring.free() > 0;
            fds.extend(output.sources.iter().map(|source| source.interest(room)));
        }
    }

    /// Moves what [`Carry::interests`] found to be ready, in its order.
    pub(crate) fn work(&mut self, fds: &[libc::pollfd]) {
        let mut ready = fds.iter().map(|fd| fd.revents != 0);
        if ready.next() == Some(true) {
            self.write_stdin();
        }
        for Output { ring, sources, .. } in &mut self.output {
            sources.retain_mut(|source| {
                let ready = ready.next().unwrap_or(false);
                !(ready || source.look_in_ms().is_some()) || source.read(ring)
            });
        }
    }

    /// When something is to be read without being polled, in milliseconds from now.
    pub(crate) fn look_in_ms(&self) -> Option<u64> {
        let roomy = self.output.iter().filter(|output| output.ring.free() > 0);
        roomy.flat_map(|output| output.sources.iter().filter_map(Source::look_in_ms)).min()
    }

    /// Writes what the agent takes.
    pub(crate) fn write_stdin(&mut self) {
        self.stdin.write(self.terminal.as_ref());
    }

    /// What init holds, for its Proof.
    pub(crate) fn held(&self, started: bool) -> Held {
        let [stdout, stderr] = &self.output;
        Held {
            stdin_received: self.stdin.ring.end(),
            stdin_taken: self.stdin.ring.base(),
            output_base: [stdout.ring.base(), stderr.ring.base()],
            output_end: [stdout.ring.end(), stderr.ring.end()],
            started,
        }
    }

    /// Starts to send again at what the daemon has.
    pub(crate) fn resume(&mut self, received: [u64; 2]) -> Result<(), WireError> {
        for (output, received) in self.output.iter_mut().zip(received) {
            if !(output.ring.base()..=output.ring.end()).contains(&received) {
                return Err(WireError("the daemon names output that is not held"));
            }
            output.sent = received;
        }
        Ok(())
    }

    /// Whether everything the agent printed was read and sent.
    pub(crate) fn drained(&self) -> bool {
        self.output.iter().all(|output| output.sources.is_empty() && output.sent == output.ring.end())
    }

    /// Ends the streams after the last process: what is in them can still be read, then they end.
    pub(crate) fn shut(&mut self) {
        for output in &mut self.output {
            output.sources.retain_mut(Source::close);
        }
        self.stdin.give_up();
    }
}

impl Output {
    /// Forgets what the daemon has for good.
    pub(crate) fn acknowledged(&mut self, offset: u64) -> Result<(), WireError> {
        if offset > self.sent {
            return Err(WireError("acknowledged more than was sent"));
        }
        self.ring.release(offset);
        Ok(())
    }
}

impl Stdin {
    /// Takes a chunk from the daemon; [`Carry::write_stdin`] hands it on.
    pub(crate) fn receive(&mut self, offset: u64, bytes: &[u8]) -> Result<(), WireError> {
        if offset != self.ring.end() || self.close_at.is_some() {
            return Err(WireError("stdin out of order"));
        }
        if !self.ring.push(bytes) {
            return Err(WireError("stdin beyond the window"));
        }
        Ok(())
    }

    /// Takes the daemon's wish to close; asked again after a reconnect.
    pub(crate) fn close(&mut self, offset: u64) -> Result<(), WireError> {
        if offset != self.ring.end() {
            return Err(WireError("stdin closed out of order"));
        }
        self.close_at = Some(offset);
        Ok(())
    }

    fn interest(&self) -> libc::pollfd {
        match &self.sink {
            Sink::Open(sink) if self.ring.base() < self.ring.end() => {
                sys::interest(sink.as_raw_fd(), libc::POLLOUT)
            }
            Sink::Ending(sink, _) => sys::interest(sink.as_raw_fd(), libc::POLLOUT),
            // A negative descriptor is skipped by poll.
            _ => sys::interest(-1, 0),
        }
    }

    /// End of what the agent took.
    pub(crate) fn taken(&self) -> u64 {
        self.ring.base()
    }

    fn write(&mut self, terminal: Option<&Terminal>) {
        loop {
            let [piece, _] = self.ring.slices(self.ring.base(), self.ring.end());
            let (sink, piece) = match &self.sink {
                Sink::Open(sink) if !piece.is_empty() => (sink, piece),
                Sink::Open(_) if self.close_at.is_some() => {
                    self.end(terminal);
                    continue;
                }
                Sink::Ending(sink, rest) => (sink, rest.as_slice()),
                _ => break,
            };
            let mut sink = sink;
            match sink.write(piece) {
                Ok(count) => self.written(count),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.sink = Sink::Gone,
            }
        }
        if matches!(self.sink, Sink::Gone) && self.ring.base() < self.ring.end() {
            self.ring.release(self.ring.end());
            self.ack_due = true;
        }
    }

    fn written(&mut self, count: usize) {
        if let Sink::Ending(_, rest) = &mut self.sink {
            rest.drain(..count);
            if rest.is_empty() {
                self.sink = Sink::Gone;
            }
            return;
        }
        let to = self.ring.base() + count as u64;
        if let Some(before) = to.checked_sub(1).filter(|before| *before >= self.ring.base()) {
            let [piece, _] = self.ring.slices(before, to);
            self.last = piece.first().copied();
        }
        self.ring.release(to);
        self.ack_due = true;
    }

    /// Everything was written: a stream is closed, a terminal is told.
    fn end(&mut self, terminal: Option<&Terminal>) {
        self.sink = match (std::mem::replace(&mut self.sink, Sink::Gone), terminal) {
            (Sink::Open(sink), Some(terminal)) => Sink::Ending(sink, terminal.end_of_input(self.last)),
            _ => Sink::Gone,
        };
    }

    fn give_up(&mut self) {
        self.sink = Sink::Gone;
        self.write(None);
    }
}
