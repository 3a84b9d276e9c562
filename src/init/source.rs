//! Where output comes from: one stream of a process, a socket, a pipe or the terminal, read into a ring. It must
//! never go on for ever after the last process, even where a descriptor of its other end left the cell.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;

use crate::ring::Ring;
use crate::sys;
use crate::wire::OUTPUT_CHUNK_BYTES_MAX;

/// How often a terminal that nobody has open is looked at.
const DESERTED_LOOK_MS: u64 = 200;

/// What kind of stream it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A socket or pipe of the agent.
    Agent,
    /// The agent's terminal.
    Terminal,
    /// A pipe of this step, and of what it started.
    Step(u32),
}

/// See the module.
pub(crate) struct Source {
    file: File,
    kind: Kind,
    /// Bytes in it that have to be read before something is told.
    due: u64,
    /// It ends with the bytes that are due.
    closing: bool,
    /// A terminal that nobody has open now: somebody may open it again, by its name.
    deserted: bool,
}

impl Source {
    /// A stream to read, non-blocking.
    pub(crate) fn new(file: File, kind: Kind) -> Self {
        Self { file, kind, due: 0, closing: false, deserted: false }
    }

    /// What to poll; nothing while there is no room.
    pub(crate) fn interest(&self, room: bool) -> libc::pollfd {
        // A negative descriptor is skipped by poll.
        let fd = if room && !self.deserted { self.file.as_raw_fd() } else { -1 };
        sys::interest(fd, libc::POLLIN)
    }

    /// Reads once; false where it ended.
    pub(crate) fn read(&mut self, ring: &mut Ring) -> bool {
        if ring.free() == 0 {
            return true;
        }
        self.deserted = false;
        let most = if self.closing { self.due } else { u64::MAX };
        match ring.read_from(&self.file, most.min(OUTPUT_CHUNK_BYTES_MAX as u64) as usize) {
            Ok(0) => false,
            Ok(count) => {
                self.due = self.due.saturating_sub(count as u64);
                !self.closing || self.due > 0
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => true,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.due = 0;
                !self.closing
            }
            // What the system says of a terminal without any process at its other end.
            Err(error) if error.raw_os_error() == Some(libc::EIO) && self.kind == Kind::Terminal => {
                self.deserted = true;
                !self.closing
            }
            Err(_) => false,
        }
    }

    /// What this step printed so far has to be read.
    pub(crate) fn owe(&mut self, step: u32) {
        if self.kind == Kind::Step(step) {
            self.due = sys::unread_bytes(&self.file);
        }
    }

    /// Bytes that still have to be read.
    pub(crate) fn due(&self) -> u64 {
        self.due
    }

    /// When it has to be read without being polled, in milliseconds from now: not every system says that the
    /// other end of a terminal is gone, and none says that it came back.
    pub(crate) fn look_in_ms(&self) -> Option<u64> {
        if self.closing { Some(0) } else { self.deserted.then_some(DESERTED_LOOK_MS) }
    }

    /// No process of the cell is left: what is in it now is all there will be. False where that is nothing.
    pub(crate) fn close(&mut self) -> bool {
        // A socket's end comes after its bytes, and nothing can be added any more.
        if self.kind == Kind::Agent && sys::shutdown_read(&self.file) {
            return true;
        }
        self.closing = true;
        // A terminal does not say how much is on its way to its other end; nobody can write to it by now.
        self.due = if self.kind == Kind::Terminal { u64::MAX } else { sys::unread_bytes(&self.file) };
        self.due > 0
    }
}
