//! A bounded buffer that knows which bytes of a stream it holds. Output is read from the agent straight into
//! it and written to the daemon straight out of it, and leaves it only when acknowledged. It must never
//! forget a byte that was not released, and never grow.

use std::io::{self, IoSliceMut, Read};

/// Bytes `base..end` of a stream, in a buffer of fixed size.
pub(crate) struct Ring {
    buffer: Vec<u8>,
    head: usize,
    len: usize,
    base: u64,
}

impl Ring {
    /// An empty buffer; its pages cost memory only once they are used.
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { buffer: vec![0; bytes_max], head: 0, len: 0, base: 0 }
    }

    /// Offset of the first byte held.
    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    /// Offset after the last byte held.
    pub(crate) fn end(&self) -> u64 {
        self.base + self.len as u64
    }

    /// Room left, in bytes.
    pub(crate) fn free(&self) -> usize {
        self.buffer.len() - self.len
    }

    /// Reads once, at most `bytes_max`; 0 means the end of the source. Not to be called without room.
    pub(crate) fn read_from(&mut self, mut source: impl Read, bytes_max: usize) -> io::Result<usize> {
        let room = self.free().min(bytes_max);
        let tail = (self.head + self.len) % self.buffer.len();
        let first = room.min(self.buffer.len() - tail);
        let (before, after) = self.buffer.split_at_mut(tail);
        let mut parts = [IoSliceMut::new(&mut after[..first]), IoSliceMut::new(&mut before[..room - first])];
        let count = source.read_vectored(&mut parts)?;
        self.len += count;
        Ok(count)
    }

    /// Appends all of `bytes`, or nothing where there is no room for them.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> bool {
        if bytes.len() > self.free() {
            return false;
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.read_from(&mut rest, usize::MAX) {
                Ok(count) if count > 0 => {}
                _ => return false,
            }
        }
        true
    }

    /// The bytes `from..to`, which must be held, in at most two pieces.
    pub(crate) fn slices(&self, from: u64, to: u64) -> [&[u8]; 2] {
        let skip = (from - self.base) as usize;
        let count = (to - from) as usize;
        let start = (self.head + skip) % self.buffer.len();
        let first = count.min(self.buffer.len() - start);
        [&self.buffer[start..start + first], &self.buffer[..count - first]]
    }

    /// Forgets the bytes before `offset`, which must not be beyond the end.
    pub(crate) fn release(&mut self, offset: u64) {
        let count = offset.saturating_sub(self.base).min(self.len as u64) as usize;
        self.base += count as u64;
        self.len -= count;
        // An empty buffer starts at its front again, so that light traffic touches few pages.
        self.head = if self.len == 0 { 0 } else { (self.head + count) % self.buffer.len() };
    }
}
