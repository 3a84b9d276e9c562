//! What a link wants to tell init, and what it already has from init. Connections come and go; this stays.
//! Pure bookkeeping under one short lock. It must never grow without limit or do IO.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;

use super::wire::{Held, OutputStream, STDIN_CHUNK_BYTES_MAX, STDIN_WINDOW_BYTES, ToInit, stdin_header};
use super::{LinkError, Resume, STDIN_BYTES_MAX};

const SIGNALS_MAX: usize = 16;
/// Small pieces of stdin are joined up to this size, so that a million of them cost no more than their bytes.
const JOIN_BYTES_MAX: usize = 4096;
/// Stdin handed to the socket at once.
const BATCH_BYTES_MAX: usize = 256 << 10;

/// The state with the signal that it changed.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Notify,
}

impl Shared {
    pub(super) fn new(resume: Resume) -> Self {
        // What is in the journal is safe: a daemon that died before its last ack makes up for it here.
        let received = [resume.stdout, resume.stderr];
        let state = State { received, acked: received, ..State::default() };
        Self { state: Mutex::new(state), changed: Notify::new() }
    }

    /// Looks at the state, or changes what the writer need not know.
    pub(super) fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the state and wakes the writer.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = self.with(change);
        self.changed.notify_one();
        result
    }

    /// Waits for a change since the last wait.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct State {
    /// Output handed out, per stream.
    pub(super) received: [u64; 2],
    /// The last event was handed out.
    pub(super) ended: bool,
    /// Kill was asked for.
    pub(super) kill: bool,
    /// The report is stored.
    pub(super) bye: bool,
    /// Start was asked for.
    pub(super) start: bool,
    /// The step that was asked for last.
    pub(super) step: Option<u32>,
    /// The terminal's size.
    pub(super) size: Option<(u16, u16)>,
    /// Steps whose end was handed out, as bits.
    steps_ended: u64,
    acked: [u64; 2],
    pieces: VecDeque<Bytes>,
    stdin_base: u64,
    stdin_end: u64,
    stdin_closed: bool,
    taken: u64,
    init_has: u64,
    signals: VecDeque<i32>,
}

/// What one connection was already told.
#[derive(Debug, Default)]
pub(super) struct Told {
    stdin: u64,
    stdin_closed: bool,
    acked: [u64; 2],
    kill: bool,
    bye: bool,
    start: bool,
    step: Option<u32>,
    size: Option<(u16, u16)>,
}

impl State {
    pub(super) fn ack(&mut self, stream: OutputStream, offset: u64) {
        let index = stream.index();
        // More than was received cannot be safe anywhere, and init would drop the connection for it.
        self.acked[index] = self.acked[index].max(offset.min(self.received[index]));
    }

    pub(super) fn signal(&mut self, number: i32) {
        if self.signals.len() < SIGNALS_MAX && (1..=64).contains(&number) {
            self.signals.push_back(number);
        }
    }

    pub(super) fn stdin(&mut self, bytes: Bytes) -> Result<u64, LinkError> {
        let offset = self.stdin_end;
        if self.stdin_closed {
            return Err(LinkError::StdinOrder { offset, end: self.stdin_end });
        }
        if (self.stdin_end - self.stdin_base) as usize + bytes.len() > STDIN_BYTES_MAX {
            return Err(LinkError::StdinFull);
        }
        self.stdin_end += bytes.len() as u64;
        match self.pieces.back_mut() {
            Some(last) if last.len() + bytes.len() <= JOIN_BYTES_MAX => {
                *last = [last.as_ref(), bytes.as_ref()].concat().into();
            }
            _ if bytes.is_empty() => {}
            _ => self.pieces.push_back(bytes),
        }
        Ok(self.stdin_end)
    }

    pub(super) fn stdin_at(&mut self, offset: u64, mut bytes: Bytes) -> Result<u64, LinkError> {
        let known = self.init_has.saturating_sub(offset).min(bytes.len() as u64);
        let (offset, mut fresh) = (offset + known, bytes.split_off(known as usize));
        if fresh.is_empty() {
            return Ok(self.stdin_end);
        }
        let end = self.stdin_end;
        if offset < self.stdin_base || (end == 0 && self.pieces.is_empty()) {
            self.pieces.clear();
            (self.stdin_base, self.stdin_end) = (offset, offset);
        } else if offset > end {
            return Err(LinkError::StdinOrder { offset, end });
        } else {
            fresh = fresh.split_off((end - offset).min(fresh.len() as u64) as usize);
        }
        if fresh.is_empty() { Ok(self.stdin_end) } else { self.stdin(fresh) }
    }

    pub(super) fn close_stdin(&mut self) {
        self.stdin_closed = true;
    }

    /// The end of a step arrived; whether it is news.
    pub(super) fn step_ended(&mut self, index: u32) -> bool {
        // The wire lets no step over 63 through.
        let bit = 1u64.checked_shl(index).unwrap_or(0);
        let news = self.steps_ended & bit == 0;
        self.steps_ended |= bit;
        news
    }

    /// A connection begins: what it need not be told.
    pub(super) fn connected(&mut self, held: &Held) -> Told {
        (self.taken, self.init_has) = (held.stdin_taken, held.stdin_received);
        self.release_stdin(held.stdin_received);
        if self.stdin_end < held.stdin_received {
            self.pieces.clear();
            (self.stdin_base, self.stdin_end) = (held.stdin_received, held.stdin_received);
        }
        Told { stdin: held.stdin_received, acked: held.output_base, start: held.started, ..Told::default() }
    }

    /// The agent took stdin up to here; false where that was never sent.
    pub(super) fn stdin_taken(&mut self, offset: u64) -> bool {
        if offset < self.taken || offset > self.stdin_end {
            return false;
        }
        self.taken = offset;
        self.release_stdin(offset);
        true
    }

    fn release_stdin(&mut self, offset: u64) {
        while let Some(piece) = self.pieces.front_mut() {
            let count = offset.saturating_sub(self.stdin_base).min(piece.len() as u64);
            if count == 0 {
                return;
            }
            self.stdin_base += count;
            if count == piece.len() as u64 {
                self.pieces.pop_front();
            } else {
                *piece = piece.split_off(count as usize);
            }
        }
    }

    /// The next bytes for the socket; none where init knows everything. Orders come before stdin.
    pub(super) fn frames(&mut self, told: &mut Told) -> Vec<Bytes> {
        let mut frames = Vec::new();
        let mut push = |frame: ToInit<'_>| frames.push(Bytes::from(frame.encode()));
        // A step is not asked for any more once the agent is wanted.
        if let Some(index) = self.step.filter(|_| !self.start)
            && told.step != self.step
        {
            told.step = self.step;
            push(ToInit::Step { index });
        }
        if let Some((rows, cols)) = self.size
            && told.size != self.size
        {
            told.size = self.size;
            push(ToInit::Resize { rows, cols });
        }
        for (flag, known, frame) in [
            (self.start, &mut told.start, ToInit::Start),
            (self.kill, &mut told.kill, ToInit::Kill),
            (self.bye, &mut told.bye, ToInit::Bye),
        ] {
            if flag && !*known {
                *known = true;
                push(frame);
            }
        }
        self.signals.drain(..).for_each(|number| push(ToInit::Signal { number }));
        for stream in [OutputStream::Stdout, OutputStream::Stderr] {
            let index = stream.index();
            if self.acked[index] > told.acked[index] {
                told.acked[index] = self.acked[index];
                push(ToInit::Ack { stream, offset: self.acked[index] });
            }
        }
        self.stdin_frames(told, &mut frames);
        if self.stdin_closed && !told.stdin_closed && told.stdin == self.stdin_end {
            told.stdin_closed = true;
            frames.push(ToInit::CloseStdin { offset: self.stdin_end }.encode().into());
        }
        frames
    }

    fn stdin_frames(&self, told: &mut Told, frames: &mut Vec<Bytes>) {
        let end = self.stdin_end.min(self.taken + STDIN_WINDOW_BYTES as u64);
        let end = end.min(told.stdin + BATCH_BYTES_MAX as u64);
        let mut piece_start = self.stdin_base;
        for piece in &self.pieces {
            if piece_start >= end {
                return;
            }
            let piece_end = piece_start + piece.len() as u64;
            // Nothing is sent before the bytes that come first are here: they may have to be replayed.
            while told.stdin >= piece_start && told.stdin < piece_end.min(end) {
                let to = piece_end.min(end).min(told.stdin + STDIN_CHUNK_BYTES_MAX as u64);
                let body = piece.slice((told.stdin - piece_start) as usize..(to - piece_start) as usize);
                frames.push(Bytes::copy_from_slice(&stdin_header(told.stdin, body.len())));
                frames.push(body);
                told.stdin = to;
            }
            piece_start = piece_end;
        }
    }
}
