//! Buffers for request bodies, used again and again: memory of this size, taken and given back with each request, leaves
//! holes in the heap that stay. It must never give a buffer to two at a time, nor keep many that nobody uses.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

/// Buffers that are kept. With [`KEPT_BYTES_MAX`] that bounds what is in memory for nothing.
const KEPT_MAX: usize = 6;
/// Larger ones go back to the heap.
const KEPT_BYTES_MAX: usize = 256 << 10;
/// A buffer is made for the bodies that come after it, too.
const ROUND_BYTES: usize = 64 << 10;

/// The buffers that nobody uses at the moment.
#[derive(Debug, Clone, Default)]
pub(super) struct Buffers(Arc<Mutex<Vec<Vec<u8>>>>);

impl Buffers {
    /// An empty buffer with room for `bytes`.
    pub(super) fn take(&self, bytes: usize) -> Buffer {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fit = kept.iter().rposition(|buffer| buffer.capacity() >= bytes);
        let buffer = fit.map(|at| kept.swap_remove(at));
        drop(kept);
        let rounded = if bytes < KEPT_BYTES_MAX { bytes.next_multiple_of(ROUND_BYTES) } else { bytes };
        Buffer { bytes: buffer.unwrap_or_else(|| Vec::with_capacity(rounded)), home: self.clone() }
    }
}

/// A buffer in use; it goes back when it is dropped.
pub(super) struct Buffer {
    bytes: Vec<u8>,
    home: Buffers,
}

impl Buffer {
    pub(super) fn extend(&mut self, more: &[u8]) {
        self.bytes.extend_from_slice(more);
    }

    /// Its content; the buffer goes back when the last part of that is dropped.
    pub(super) fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.bytes);
        if bytes.capacity() == 0 || bytes.capacity() > KEPT_BYTES_MAX {
            return;
        }
        bytes.clear();
        let mut kept = self.home.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT_MAX {
            kept.push(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_when_the_last_of_its_content_is_gone_and_empty() {
        let buffers = Buffers::default();
        let mut buffer = buffers.take(10);
        buffer.extend(b"secret of another");
        let place = buffer.as_ref().as_ptr();
        let content = buffer.freeze();
        let part = content.slice(3..6);
        drop(content);
        assert_ne!(buffers.take(10).as_ref().as_ptr(), place, "a part of it is in use");
        assert_eq!(&part[..], b"ret");
        buffers.0.lock().unwrap().clear();
        drop(part);
        let again = buffers.take(60_000);
        assert_eq!((again.as_ref().as_ptr(), again.as_ref().len()), (place, 0));
    }

    #[test]
    fn few_are_kept_and_none_that_is_large() {
        let buffers = Buffers::default();
        let many: Vec<_> = (0..50).map(|_| buffers.take(1_000)).collect();
        drop(many);
        drop(buffers.take(KEPT_BYTES_MAX + 1));
        let kept = buffers.0.lock().unwrap();
        assert_eq!(kept.len(), KEPT_MAX);
        assert!(kept.iter().all(|buffer| buffer.capacity() <= KEPT_BYTES_MAX));
    }
}
