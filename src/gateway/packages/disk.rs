//! The package cache's files: `bodies/` by the SHA-256 of what they hold, `entries/` by the hash of their key, `tmp/`
//! for what is not whole yet. Blocks. Each file appears whole, by a rename; what is found broken is removed. It must
//! never follow a name that is not one of its own.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::fresh::Head;
use super::index::Slot;
use super::key::{Hash, Key};

/// Longest file of an entry, in bytes.
const ENTRY_BYTES_MAX: u64 = 256 << 10;
/// How old the time of the last use in a file may become.
const USED_EVERY: Duration = Duration::from_secs(60);

/// An entry as it is written down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Stored {
    pub(super) key: Key,
    /// Milliseconds since 1970, as in [`Head::at`].
    pub(super) at_ms: u64,
    pub(super) headers: Vec<(String, String)>,
    /// SHA-256 of the body.
    pub(super) body: String,
    pub(super) body_bytes: u64,
    pub(super) job: String,
    pub(super) charged: u64,
}

pub(super) fn ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Stored {
    pub(super) fn new(key: Key, head: &Head, slot: &Slot) -> Self {
        let text = |(name, value): (&HeaderName, &HeaderValue)| {
            Some((name.to_string(), value.to_str().ok()?.into()))
        };
        Self {
            key,
            at_ms: ms(head.at),
            headers: head.headers.iter().filter_map(text).collect(),
            body: slot.body.to_string(),
            body_bytes: slot.body_bytes,
            job: slot.job.as_ref().to_owned(),
            charged: slot.charged,
        }
    }

    pub(super) fn head(&self) -> Option<Head> {
        let mut headers = HeaderMap::new();
        for (name, value) in &self.headers {
            headers.append(HeaderName::try_from(name).ok()?, HeaderValue::from_str(value).ok()?);
        }
        Some(Head { headers, at: UNIX_EPOCH + Duration::from_millis(self.at_ms) })
    }

    pub(super) fn slot(&self, used_ms: u64) -> Option<Slot> {
        Some(Slot {
            policy: self.key.policy.as_str().into(),
            body: Hash::parse(&self.body)?,
            body_bytes: self.body_bytes,
            job: self.job.as_str().into(),
            charged: self.charged,
            used_ms,
        })
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Disk {
    root: PathBuf,
}

impl Disk {
    /// Makes the directories, and removes what a dead daemon left half done.
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        let disk = Self { root: root.to_owned() };
        for dir in [root.to_owned(), disk.tmp(), root.join("bodies"), root.join("entries")] {
            match fs::DirBuilder::new().mode(0o700).create(&dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        fs::set_permissions(root, fs::Permissions::from_mode(0o700))?;
        for left in fs::read_dir(disk.tmp())? {
            remove(&left?.path());
        }
        Ok(disk)
    }

    fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    fn path(&self, kind: &str, name: Hash) -> PathBuf {
        let name = name.to_string();
        self.root.join(kind).join(&name[..2]).join(&name)
    }

    pub(super) fn body_path(&self, body: Hash) -> PathBuf {
        self.path("bodies", body)
    }

    pub(super) fn entry_path(&self, name: Hash) -> PathBuf {
        self.path("entries", name)
    }

    /// All entries whose body is there; everything else is removed.
    pub(super) fn load(&self) -> io::Result<Vec<(Hash, Slot)>> {
        let mut bodies = std::collections::HashMap::new();
        for (name, path) in self.names("bodies")? {
            let length =
                fs::symlink_metadata(&path).ok().filter(fs::Metadata::is_file).map(|meta| meta.len());
            match length {
                Some(length) => _ = bodies.insert(name, (length, false)),
                None => remove(&path),
            }
        }
        let mut found = Vec::new();
        for (name, path) in self.names("entries")? {
            let used_ms = fs::metadata(&path).and_then(|meta| meta.modified()).map_or(0, ms);
            let slot = self.entry(name).and_then(|stored| stored.slot(used_ms));
            let whole = slot.filter(|slot| match bodies.get_mut(&slot.body) {
                Some((length, wanted)) if *length == slot.body_bytes => {
                    *wanted = true;
                    true
                }
                Some(_) | None => false,
            });
            match whole {
                Some(slot) => found.push((name, slot)),
                None => remove(&path),
            }
        }
        for (name, _) in bodies.into_iter().filter(|(_, (_, wanted))| !wanted) {
            self.remove_body(name);
        }
        Ok(found)
    }

    /// The files of one kind; what has another name than ours is removed.
    fn names(&self, kind: &str) -> io::Result<Vec<(Hash, PathBuf)>> {
        let mut found = Vec::new();
        for dir in fs::read_dir(self.root.join(kind))? {
            let dir = dir?;
            if !dir.file_type()?.is_dir() {
                remove(&dir.path());
                continue;
            }
            for file in fs::read_dir(dir.path())? {
                let path = file?.path();
                let name = path.file_name().and_then(|name| Hash::parse(name.to_str()?));
                match name.filter(|name| self.path(kind, *name) == path) {
                    Some(name) => found.push((name, path)),
                    None => remove(&path),
                }
            }
        }
        Ok(found)
    }

    /// An entry; none where its file is not what was written.
    pub(super) fn entry(&self, name: Hash) -> Option<Stored> {
        let mut text = Vec::new();
        let file = File::open(self.entry_path(name)).ok()?;
        file.take(ENTRY_BYTES_MAX + 1).read_to_end(&mut text).ok()?;
        let (sum, json) = (text.get(..64)?, text.get(65..)?);
        if Hash::parse(std::str::from_utf8(sum).ok()?)? != Hash::of(json) {
            return None;
        }
        let stored: Stored = serde_json::from_slice(json).ok()?;
        (stored.key.hash() == name).then_some(stored)
    }

    pub(super) fn put_entry(&self, name: Hash, stored: &Stored) -> io::Result<()> {
        let json = serde_json::to_vec(stored).map_err(io::Error::other)?;
        if json.len() as u64 + 65 > ENTRY_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "the head of an answer is too long"));
        }
        let mut file = self.temporary()?;
        file.write_all(format!("{}\n", Hash::of(&json)).as_bytes())?;
        file.write_all(&json)?;
        persist(file, &self.entry_path(name))
    }

    /// A file that goes away unless it is put somewhere.
    pub(super) fn temporary(&self) -> io::Result<NamedTempFile> {
        NamedTempFile::new_in(self.tmp())
    }

    /// Puts a whole body in its place.
    pub(super) fn put_body(&self, file: NamedTempFile, body: Hash) -> io::Result<()> {
        persist(file, &self.body_path(body))
    }

    pub(super) fn remove_entry(&self, name: Hash) {
        remove(&self.entry_path(name));
    }

    pub(super) fn remove_body(&self, body: Hash) {
        remove(&self.body_path(body));
    }

    /// Notes a use in the file, where the last one was long ago.
    pub(super) fn used(&self, name: Hash, now: SystemTime) {
        let noted = File::open(self.entry_path(name)).and_then(|file| {
            let old = file.metadata()?.modified()?;
            let due = now.duration_since(old).is_ok_and(|since| since > USED_EVERY);
            if due { file.set_modified(now) } else { Ok(()) }
        });
        if let Err(error) = noted {
            tracing::debug!(%error, "a use of the package cache is not noted");
        }
    }

    /// Bytes of the file system that are free for us.
    pub(super) fn free_bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&self.root)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

/// The SHA-256 of a file from where it stands, which is its beginning again afterwards.
pub(super) fn hash_of(file: &mut File) -> io::Result<Hash> {
    use std::io::Seek;
    let (mut hasher, mut piece) = (Sha256::new(), vec![0; 256 << 10]);
    loop {
        match file.read(&mut piece)? {
            0 => break,
            count => hasher.update(&piece[..count]),
        }
    }
    file.rewind()?;
    Ok(Hash(hasher.finalize().into()))
}

fn persist(file: NamedTempFile, path: &Path) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    file.persist(path).map(drop).map_err(|error| error.error)
}

fn remove(path: &Path) {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, path = %path.display(), "a file of the package cache cannot be removed");
        }
        Ok(()) | Err(_) => {}
    }
}
