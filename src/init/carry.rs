//! The agent's three streams and the bytes of them that init holds: output until the daemon acknowledged it,
//! stdin until the agent took it. It must never drop a byte, read when there is no room, or close the
//! agent's stdin by itself.

use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use crate::child::Streams;
use crate::ring::Ring;
use crate::sys;
use crate::wire::{Held, OUTPUT_CHUNK_BYTES_MAX, STDIN_WINDOW_BYTES, WireError};

/// One output stream.
pub(crate) struct Output {
    /// What is held of it.
    pub(crate) ring: Ring,
    /// End of what was written to the present connection.
    pub(crate) sent: u64,
    source: Option<UnixStream>,
}

/// The agent's stdin.
pub(crate) struct Stdin {
    ring: Ring,
    sink: Sink,
    close_at: Option<u64>,
    /// The daemon does not yet know how much was taken.
    pub(crate) ack_due: bool,
}

/// Where stdin goes.
enum Sink {
    /// There is no agent yet: bytes are kept.
    Coming,
    /// To the agent.
    Open(UnixStream),
    /// The agent closed it, ended, or it was closed on demand: bytes are dropped.
    Gone,
}

/// All three.
pub(crate) struct Carry {
    /// stdout, stderr.
    pub(crate) output: [Output; 2],
    /// stdin.
    pub(crate) stdin: Stdin,
}

impl Carry {
    /// Streams without an agent yet: stdin is gathered, output is open.
    pub(crate) fn new(buffer_bytes_max: usize) -> Self {
        let output = || Output { ring: Ring::new(buffer_bytes_max), sent: 0, source: None };
        let stdin =
            Stdin { ring: Ring::new(STDIN_WINDOW_BYTES), sink: Sink::Coming, close_at: None, ack_due: false };
        Self { output: [output(), output()], stdin }
    }

    /// Connects the agent's ends.
    pub(crate) fn attach(&mut self, streams: Streams) {
        self.stdin.sink = Sink::Open(streams.stdin);
        for (output, source) in self.output.iter_mut().zip(streams.output) {
            output.source = Some(source);
        }
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
        self.output.iter().all(|output| output.source.is_none() && output.sent == output.ring.end())
    }

    /// Ends the streams after the last process: what is in them can still be read, then they end.
    pub(crate) fn shut(&mut self) {
        for source in self.output.iter().filter_map(|output| output.source.as_ref()) {
            // Even where a descriptor was passed out of the cell, nothing can be added after this.
            let _ = source.shutdown(Shutdown::Read);
        }
        self.stdin.give_up();
    }
}

impl Output {
    /// What to poll: nothing while there is no room, which holds the agent.
    pub(crate) fn interest(&self) -> Option<libc::pollfd> {
        let source = self.source.as_ref().filter(|_| self.ring.free() > 0)?;
        Some(sys::interest(source.as_raw_fd(), libc::POLLIN))
    }

    /// Reads once.
    pub(crate) fn read(&mut self) {
        let Some(source) = self.source.as_ref().filter(|_| self.ring.free() > 0) else { return };
        match self.ring.read_from(source, OUTPUT_CHUNK_BYTES_MAX) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Ok(count) if count > 0 => {}
            _ => self.source = None,
        }
    }

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
    /// Takes a chunk from the daemon.
    pub(crate) fn receive(&mut self, offset: u64, bytes: &[u8]) -> Result<(), WireError> {
        if offset != self.ring.end() || self.close_at.is_some() {
            return Err(WireError("stdin out of order"));
        }
        if !self.ring.push(bytes) {
            return Err(WireError("stdin beyond the window"));
        }
        self.write();
        Ok(())
    }

    /// Takes the daemon's wish to close; asked again after a reconnect.
    pub(crate) fn close(&mut self, offset: u64) -> Result<(), WireError> {
        if offset != self.ring.end() {
            return Err(WireError("stdin closed out of order"));
        }
        self.close_at = Some(offset);
        self.write();
        Ok(())
    }

    /// What to poll.
    pub(crate) fn interest(&self) -> Option<libc::pollfd> {
        match &self.sink {
            Sink::Open(sink) if self.ring.base() < self.ring.end() => {
                Some(sys::interest(sink.as_raw_fd(), libc::POLLOUT))
            }
            _ => None,
        }
    }

    /// End of what the agent took.
    pub(crate) fn taken(&self) -> u64 {
        self.ring.base()
    }

    /// Writes what the agent takes.
    pub(crate) fn write(&mut self) {
        while let Sink::Open(sink) = &self.sink {
            let mut sink = sink;
            let [piece, _] = self.ring.slices(self.ring.base(), self.ring.end());
            if piece.is_empty() {
                if self.close_at.is_some() {
                    self.sink = Sink::Gone;
                }
                return;
            }
            match sink.write(piece) {
                Ok(count) => {
                    self.ring.release(self.ring.base() + count as u64);
                    self.ack_due = true;
                }
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

    fn give_up(&mut self) {
        self.sink = Sink::Gone;
        self.write();
    }
}
