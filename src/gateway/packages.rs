//! The package cache: what hosts of packages answered, kept for later jobs under the same policy. Filled and read by the
//! gateway alone ([`super::egress`]); a cell never sees a file of it. Bodies stand once under their SHA-256, entries
//! under the hash of all that an answer can depend on ([`Key`]), which a job's own headers are no part of.
//!
//! It must never give out what it was not given whole, nor what is not what its hash says; never be the reason that a
//! request fails; and never let one job take more than half of it.

mod disk;
mod fill;
mod fresh;
mod index;
mod key;

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use tempfile::NamedTempFile;

use disk::{Disk, Stored, ms};
pub use fill::Fill;
pub use fresh::Head;
pub use index::Sum;
use index::{Index, Room, Slot};
pub use key::{Hash, Key, Used};

/// What is read of a kept body at a time, in bytes.
const PIECE_BYTES: usize = 512 << 10;
/// Most entries that are listed.
const LISTED_MAX: usize = 10_000;

/// How large the cache may become, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheLimits {
    /// All of it, in whole blocks of the disk. 0: nothing is kept.
    pub bytes_max: u64,
    /// One body.
    pub entry_bytes_max: u64,
    /// What must stay free of the file system.
    pub free_bytes_min: u64,
}

impl Default for CacheLimits {
    fn default() -> Self {
        Self { bytes_max: 20 << 30, entry_bytes_max: 2 << 30, free_bytes_min: 2 << 30 }
    }
}

/// What happened since the daemon began.
#[derive(Debug, Default)]
pub struct Counters {
    /// Answers that came from the cache without a word to their host.
    pub hits: AtomicU64,
    /// Answers that came from it after their host said that they are still right.
    pub revalidated: AtomicU64,
    /// Answers that could have been in it and were not.
    pub misses: AtomicU64,
    /// Entries that had to go for others, or for the disk.
    pub evicted: AtomicU64,
    /// Files that were not what they should be.
    pub damaged: AtomicU64,
    /// Answers that could not be kept because the disk is full or failed.
    pub failed: AtomicU64,
}

/// See the module.
#[derive(Debug)]
pub struct PackageCache {
    disk: Disk,
    limits: CacheLimits,
    index: Mutex<Index>,
    /// What happened.
    pub counters: Counters,
    /// The disk's failure was told.
    told: AtomicBool,
    /// Tests let the disk fail after so many bytes of a body.
    #[cfg(test)]
    fails_after: AtomicU64,
}

/// An entry that was found.
#[derive(Debug, Clone)]
pub struct Found {
    name: Hash,
    /// The answer's head.
    pub head: Head,
    body: Hash,
    /// Length of its body.
    pub body_bytes: u64,
}

/// A body that is read from the cache.
#[derive(Debug)]
pub struct Kept {
    file: Option<File>,
    left: u64,
}

/// Which entries are meant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choice {
    /// Those of this policy; of all where absent.
    pub policy: Option<String>,
    /// Those whose URL begins so.
    pub prefix: Option<String>,
}

/// An entry as it is listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// What names it.
    pub key: Key,
    /// Length of its body.
    pub bytes: u64,
    /// When its host last answered for it, in milliseconds since 1970.
    pub at_ms: u64,
    /// When it was used last.
    pub used_ms: u64,
}

impl PackageCache {
    /// Opens the cache in a directory of its own: reads which entries there are and removes what is not whole. Blocks.
    ///
    /// # Errors
    /// What the system says.
    pub fn open(dir: &Path, limits: CacheLimits) -> io::Result<Arc<Self>> {
        let disk = Disk::open(dir)?;
        let mut index = Index::default();
        for (name, slot) in disk.load()? {
            index.put(name, slot);
        }
        let cache = Self {
            disk,
            limits,
            index: Mutex::new(index),
            counters: Counters::default(),
            told: AtomicBool::new(false),
            #[cfg(test)]
            fails_after: AtomicU64::new(u64::MAX),
        };
        cache.tend();
        Ok(Arc::new(cache))
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The entry of a key.
    pub async fn find(self: &Arc<Self>, key: &Key) -> Option<Found> {
        let (cache, name, now) = (Arc::clone(self), key.hash(), SystemTime::now());
        self.index().get(name)?;
        blocking(move || {
            let found = cache.disk.entry(name).and_then(|stored| {
                let slot = stored.slot(0)?;
                Some(Found { name, head: stored.head()?, body: slot.body, body_bytes: slot.body_bytes })
            });
            match found {
                Some(found) => {
                    cache.index().touch(name, ms(now));
                    cache.disk.used(name, now);
                    Some(found)
                }
                None => {
                    cache.damaged(name);
                    None
                }
            }
        })
        .await?
    }

    /// The body of an entry, whole and compared with its hash once by this daemon; none where it is not.
    pub async fn open_body(self: &Arc<Self>, found: &Found) -> Option<Kept> {
        let (cache, found) = (Arc::clone(self), found.clone());
        blocking(move || {
            let opened = cache.checked_body(&found);
            if opened.is_none() {
                cache.damaged(found.name);
            }
            opened.map(|file| Kept { file: Some(file), left: found.body_bytes })
        })
        .await?
    }

    fn checked_body(&self, found: &Found) -> Option<File> {
        let mut file = File::open(self.disk.body_path(found.body)).ok()?;
        if file.metadata().ok()?.len() != found.body_bytes {
            self.disk.remove_body(found.body);
            return None;
        }
        let checked = self.index().body(found.body).is_some_and(|(_, checked)| checked);
        if !checked {
            if disk::hash_of(&mut file).ok()? != found.body {
                self.disk.remove_body(found.body);
                return None;
            }
            self.index().checked(found.body);
        }
        Some(file)
    }

    /// Takes out an entry that cannot be used.
    fn damaged(&self, name: Hash) {
        let mut index = self.index();
        // It may have gone in good order meanwhile.
        if index.get(name).is_none() {
            return;
        }
        self.counters.damaged.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(entry = %name, "an entry of the package cache is damaged: it is fetched anew");
        self.remove(&mut index, name);
    }

    /// Begins to take in a body of this length, where that is known; none where there is no room for it.
    pub async fn begin(self: &Arc<Self>, job: &str, length: Option<u64>) -> Option<Fill> {
        let (cache, job) = (Arc::clone(self), Arc::from(job));
        blocking(move || Fill::begin(&cache, &job, length)).await?
    }

    /// Writes down that the host said of an entry that it is still right. Where that fails, it is asked again next time.
    pub async fn renew(self: &Arc<Self>, key: Key, found: &Found, head: Head) {
        let (cache, found) = (Arc::clone(self), found.clone());
        blocking(move || {
            let index = cache.index();
            let Some(slot) = index.get(found.name).filter(|slot| slot.body == found.body).cloned() else {
                return;
            };
            // With the index held: nobody else changes the entry's file meanwhile.
            let put = cache.disk.put_entry(found.name, &Stored::new(key, &head, &slot));
            drop(index);
            if let Err(error) = put {
                cache.trouble(&error);
            }
        })
        .await;
    }

    /// Forgets an entry: its host has it no more.
    pub async fn forget(self: &Arc<Self>, found: &Found) {
        let (cache, name) = (Arc::clone(self), found.name);
        blocking(move || cache.remove(&mut cache.index(), name)).await;
    }

    /// Removes entries; how many, and the bytes of their bodies. Blocks.
    pub fn remove_chosen(&self, choice: &Choice) -> Sum {
        let mut removed = Sum::default();
        let names = self.index().names();
        for name in names {
            if choice.prefix.is_some() && !self.disk.entry(name).is_some_and(|stored| choice.has(&stored.key))
            {
                continue;
            }
            let mut index = self.index();
            let Some(slot) = index.get(name) else { continue };
            if choice.policy.as_deref().is_none_or(|policy| *slot.policy == *policy) {
                (removed.entries, removed.bytes) = (removed.entries + 1, removed.bytes + slot.body_bytes);
                self.remove(&mut index, name);
            }
        }
        removed
    }

    /// Entries, those first that were used last, and whether there are more than are listed. Blocks.
    pub fn list(&self, choice: &Choice) -> (Vec<Listed>, bool) {
        let mut listed = Vec::new();
        let names = self.index().names();
        for name in names {
            let Some(slot) = self.index().get(name).cloned() else { continue };
            if choice.policy.as_deref().is_some_and(|policy| *slot.policy != *policy) {
                continue;
            }
            let Some(stored) = self.disk.entry(name).filter(|stored| choice.has(&stored.key)) else {
                continue;
            };
            if listed.len() == LISTED_MAX {
                return (listed, true);
            }
            let Stored { key, at_ms, body_bytes: bytes, .. } = stored;
            listed.push(Listed { key, bytes, at_ms, used_ms: slot.used_ms });
        }
        (listed, false)
    }

    /// What there is of each policy.
    pub fn policies(&self) -> Vec<(String, Sum)> {
        self.index().policies().map(|(name, sum)| (name.as_ref().to_owned(), sum)).collect()
    }

    /// What it takes of the disk, and how many entries it has.
    pub fn size(&self) -> (u64, u64) {
        let index = self.index();
        (index.bytes(), index.len() as u64)
    }

    /// How large it may become.
    pub fn limits(&self) -> CacheLimits {
        self.limits
    }

    /// Lets the least recently used go until it is within its limits. Blocks; to be called every few minutes.
    pub fn tend(&self) {
        loop {
            let over = self.index().bytes() > self.limits.bytes_max;
            let short = || self.disk.free_bytes().is_ok_and(|free| free < self.limits.free_bytes_min);
            if !(over || short()) || !self.evict() {
                return;
            }
        }
    }

    /// Promises room, for which others may have to go. Blocks.
    fn promise(&self, job: &Arc<str>, more: u64) -> bool {
        loop {
            let room = self.index().promise(job, more, self.limits.bytes_max);
            match room {
                Room::Given => return true,
                Room::TooMuch => return false,
                Room::Full if self.evict() => {}
                Room::Full => return false,
            }
        }
    }

    fn evict(&self) -> bool {
        let mut index = self.index();
        let Some(name) = index.oldest() else { return false };
        self.remove(&mut index, name);
        self.counters.evicted.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Files go with the index held, so that none of them is put there anew meanwhile.
    fn remove(&self, index: &mut Index, name: Hash) {
        let body = index.remove(name);
        self.disk.remove_entry(name);
        body.iter().for_each(|body| self.disk.remove_body(*body));
    }

    fn put(
        &self,
        key: Key,
        head: &Head,
        body: Hash,
        body_bytes: u64,
        job: &Arc<str>,
        file: NamedTempFile,
    ) -> io::Result<()> {
        let mut index = self.index();
        let (name, charged) = (key.hash(), index.charge(body, body_bytes));
        let policy = key.policy.as_str().into();
        let used_ms = ms(SystemTime::now());
        let slot = Slot { policy, body, body_bytes, job: Arc::clone(job), charged, used_ms };
        // In place of one that is there already: that may be damaged.
        self.disk.put_body(file, body)?;
        if let Err(error) = self.disk.put_entry(name, &Stored::new(key, head, &slot)) {
            if index.body(body).is_none() {
                self.disk.remove_body(body);
            }
            return Err(error);
        }
        if let Some(gone) = index.put(name, slot) {
            self.disk.remove_body(gone);
        }
        index.checked(body);
        Ok(())
    }

    fn has_free_disk(&self, more: u64) -> io::Result<()> {
        let free = self.disk.free_bytes()?;
        if free.saturating_sub(more) < self.limits.free_bytes_min {
            let words = "the file system has less free space than cache.free_bytes_min";
            return Err(io::Error::new(io::ErrorKind::StorageFull, words));
        }
        Ok(())
    }

    /// The disk failed: the answer goes on, and this is told once until it is well again.
    fn trouble(&self, error: &io::Error) {
        self.counters.failed.fetch_add(1, Ordering::Relaxed);
        if !self.told.swap(true, Ordering::Relaxed) {
            tracing::warn!(%error, "the package cache cannot keep anything: jobs go on without it");
        }
    }

    fn well(&self) {
        self.told.store(false, Ordering::Relaxed);
    }

    /// Lets the disk fail after so many bytes of a body.
    #[cfg(test)]
    pub(in crate::gateway) fn fail_after(&self, bytes: u64) {
        self.fails_after.store(bytes, Ordering::Relaxed);
    }

    #[cfg(test)]
    fn fault(&self, bytes: u64) -> Option<io::Error> {
        (bytes > self.fails_after.load(Ordering::Relaxed)).then(|| io::ErrorKind::StorageFull.into())
    }
}

impl Found {
    /// The same entry with another head.
    #[must_use]
    pub fn with(&self, head: Head) -> Self {
        Self { head, ..self.clone() }
    }
}

impl Choice {
    fn has(&self, key: &Key) -> bool {
        self.policy.as_ref().is_none_or(|policy| *policy == key.policy)
            && self.prefix.as_ref().is_none_or(|prefix| key.url.starts_with(prefix.as_str()))
    }
}

impl Kept {
    /// Leaves only so many bytes from this one on.
    ///
    /// # Errors
    /// What the system says.
    pub async fn cut(&mut self, from: u64, length: u64) -> io::Result<()> {
        use std::io::Seek;
        let Some(mut file) = self.file.take() else { return Ok(()) };
        let moved = blocking(move || file.seek(io::SeekFrom::Start(from)).map(|_| file)).await;
        self.file = Some(moved.unwrap_or_else(|| Err(io::ErrorKind::Interrupted.into()))?);
        self.left = length;
        Ok(())
    }

    /// Whether nothing is left of it.
    pub fn is_over(&self) -> bool {
        self.left == 0
    }

    /// The next piece; none at the end.
    ///
    /// # Errors
    /// What the system says; a file that became shorter is an error, too.
    pub async fn next(&mut self) -> io::Result<Option<Bytes>> {
        let Some(mut file) = self.file.take().filter(|_| self.left > 0) else { return Ok(None) };
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(PIECE_BYTES);
        let read = blocking(move || {
            use std::io::Read;
            let mut piece = vec![0; wanted];
            file.read_exact(&mut piece).map(|()| (piece, file))
        });
        let (piece, file) = read.await.unwrap_or_else(|| Err(io::ErrorKind::Interrupted.into()))?;
        self.left -= piece.len() as u64;
        self.file = Some(file);
        Ok(Some(piece.into()))
    }
}

/// None where the work died, which is told.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Some(done),
        Err(error) => {
            tracing::error!(%error, "a task of the package cache died");
            None
        }
    }
}
