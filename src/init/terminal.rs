//! The agent's terminal: a pair of ends, of which init keeps one to carry bytes and the agent has the other as
//! its three streams. It must never become init's own controlling terminal, or be handed to a step.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use crate::sys;

/// What a terminal has for its end-of-file character where it does not say (Ctrl-D).
const EOF_USUAL: u8 = 4;

/// See the module.
pub(crate) struct Terminal {
    /// init's end, non-blocking. The agent's end is never kept: while anyone has it open when the agent ends,
    /// the kernel hangs it up and throws away what was on its way out.
    ours: File,
}

impl Terminal {
    /// A new one of this many rows and columns, and the agent's end.
    pub(crate) fn open((rows, cols): (u16, u16)) -> io::Result<(Self, File)> {
        let open = |path: &str, flags| {
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY | flags).open(path)
        };
        let ours = open("/dev/ptmx", libc::O_NONBLOCK)?;
        let number = sys::unlock_terminal(&ours)?;
        let theirs = open(&format!("/dev/pts/{number}"), 0)?;
        let terminal = Self { ours };
        terminal.resize(rows, cols);
        sys::terminal_takes_utf8(&terminal.ours);
        Ok((terminal, theirs))
    }

    /// A descriptor of init's end.
    pub(crate) fn carrier(&self) -> io::Result<File> {
        self.ours.try_clone()
    }

    /// Gives it another size; the group in the foreground is told by SIGWINCH.
    pub(crate) fn resize(&self, rows: u16, cols: u16) {
        sys::set_terminal_size(&self.ours, rows, cols);
    }

    /// The process group in the foreground, where the system says it (gVisor does not).
    pub(crate) fn foreground(&self) -> Option<libc::pid_t> {
        sys::foreground_group(&self.ours).filter(|group| *group > 1)
    }

    /// What is typed to end the input after `last`, the last byte before it. Within a line the character only
    /// hands over what there is of it, and the next one ends.
    pub(crate) fn end_of_input(&self, last: Option<u8>) -> Vec<u8> {
        let end = sys::end_of_file_character(&self.ours).filter(|end| *end != 0).unwrap_or(EOF_USUAL);
        let whole_line = last.is_none_or(|last| last == b'\n' || last == b'\r' || last == end);
        vec![end; if whole_line { 1 } else { 2 }]
    }
}
