//! A body on its way into the package cache, beside its way to the cell: written to a temporary file and hashed, put in
//! its place only whole. Whatever fails here is the cache's matter alone and never an answer's.

use std::io::{self, Write};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::PackageCache;
use super::fresh::Head;
use super::index::on_disk;
use super::key::{Hash, Key};

/// What is collected before it is written, in bytes.
const PIECE_BYTES: usize = 256 << 10;
/// Steps in which room is asked for where the length is not known, in bytes.
const STEP_BYTES: u64 = 8 << 20;

/// See the module. Dropped before [`Fill::keep`], nothing is left of it.
#[derive(Debug)]
pub struct Fill {
    /// None once it was given up.
    filling: Option<Box<Filling>>,
    buffer: BytesMut,
}

#[derive(Debug)]
struct Filling {
    cache: Arc<PackageCache>,
    job: Arc<str>,
    /// There until it is kept.
    file: Option<NamedTempFile>,
    hasher: Sha256,
    bytes: u64,
    promised: u64,
}

impl Drop for Filling {
    fn drop(&mut self) {
        self.cache.index().release(&self.job, self.promised);
    }
}

impl Fill {
    /// Begins, where there is room: `length` is the body's, if that is known. Blocks.
    pub(super) fn begin(cache: &Arc<PackageCache>, job: &Arc<str>, length: Option<u64>) -> Option<Self> {
        let first = length.map_or(STEP_BYTES, on_disk);
        if length.is_some_and(|length| length > cache.limits.entry_bytes_max) || !cache.promise(job, first) {
            return None;
        }
        let made = cache.has_free_disk(first).and_then(|()| cache.disk.temporary());
        let (cache, job) = (Arc::clone(cache), Arc::clone(job));
        match made {
            Ok(file) => {
                let filling = Filling {
                    cache,
                    job,
                    file: Some(file),
                    hasher: Sha256::new(),
                    bytes: 0,
                    promised: first,
                };
                Some(Self { filling: Some(Box::new(filling)), buffer: BytesMut::new() })
            }
            Err(error) => {
                cache.index().release(&job, first);
                cache.trouble(&error);
                None
            }
        }
    }

    /// Takes the next piece.
    pub async fn write(&mut self, data: &Bytes) {
        if self.filling.is_some() {
            self.buffer.extend_from_slice(data);
            if self.buffer.len() >= PIECE_BYTES {
                self.flush().await;
            }
        }
    }

    async fn flush(&mut self) {
        let Some(mut filling) = self.filling.take() else { return };
        let piece = self.buffer.split();
        let written = tokio::task::spawn_blocking(move || filling.write(&piece).map(|room| (room, filling)));
        self.filling = match written.await {
            Ok(Some((Ok(()), filling))) => Some(filling),
            Ok(Some((Err(error), filling))) => {
                filling.cache.trouble(&error);
                None
            }
            Ok(None) => None,
            Err(error) => {
                tracing::error!(%error, "a piece for the package cache was not written");
                None
            }
        };
    }

    /// Puts the whole body in its place, and its entry. True where it is kept.
    pub async fn keep(mut self, key: Key, head: Head) -> bool {
        self.flush().await;
        let Some(filling) = self.filling.take() else { return false };
        let kept = tokio::task::spawn_blocking(move || filling.keep(key, &head)).await;
        kept.unwrap_or_else(|error| {
            tracing::error!(%error, "an entry of the package cache was not written");
            false
        })
    }
}

impl Filling {
    /// None where there is no more room for it; an error where the disk fails.
    fn write(&mut self, piece: &[u8]) -> Option<io::Result<()>> {
        self.bytes += piece.len() as u64;
        if self.bytes > self.cache.limits.entry_bytes_max {
            return None;
        }
        if on_disk(self.bytes) > self.promised {
            let more = (on_disk(self.bytes) - self.promised).max(STEP_BYTES);
            if !self.cache.promise(&self.job, more) {
                return None;
            }
            self.promised += more;
            if let Err(error) = self.cache.has_free_disk(more) {
                return Some(Err(error));
            }
        }
        self.hasher.update(piece);
        #[cfg(test)]
        if let Some(error) = self.cache.fault(self.bytes) {
            return Some(Err(error));
        }
        self.file.as_mut().map(|file| file.write_all(piece))
    }

    fn keep(mut self, key: Key, head: &Head) -> bool {
        let (cache, job, bytes) = (Arc::clone(&self.cache), Arc::clone(&self.job), self.bytes);
        let body = Hash(std::mem::take(&mut self.hasher).finalize().into());
        // What it was promised is its own now: it must not count twice.
        cache.index().release(&job, self.promised);
        self.promised = 0;
        let Some(file) = self.file.take() else { return false };
        match cache.put(key, head, body, bytes, &job, file) {
            Ok(()) => cache.well(),
            Err(error) => {
                cache.trouble(&error);
                return false;
            }
        }
        true
    }
}
