//! What one job has used of each rule of its way out, over its whole life: the daemon may be killed, the job may
//! wait for hours without a cell, and the limits count on. What stands in the file is never less than what was
//! used: room is noted before it is used, in small steps, so that a daemon that is killed leaves a little too much
//! in it, and one that ends in order the exact sum. It must never let a byte pass that could not be noted.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

/// Largest file that is read, in bytes: some 256 rules with long names.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// A step is this part of the limit,
const STEPS_OF_LIMIT: u64 = 16;
/// and at least so many bytes,
const STEP_BYTES_MIN: u64 = 1 << 10;
/// and at most so many.
const STEP_BYTES_MAX: u64 = 2 << 20;

/// Bytes through one rule.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Used {
    /// Left the cell.
    pub bytes_up: u64,
    /// Came to it.
    pub bytes_down: u64,
}

/// A job's sums, and the file that keeps them.
#[derive(Debug)]
pub struct Tally {
    path: PathBuf,
    noted: Mutex<BTreeMap<String, Used>>,
}

impl Tally {
    /// Reads what a job has used so far; nothing where there is no file. Blocks.
    ///
    /// # Errors
    /// What the system says; `InvalidData` where the file is none of ours. Then nothing may be let out: what was
    /// used is not known.
    pub fn open(path: &Path) -> io::Result<Self> {
        let text = match std::fs::metadata(path) {
            Ok(file) if file.len() > FILE_BYTES_MAX => {
                return Err(io::Error::new(ErrorKind::InvalidData, "the sums of the way out are too long"));
            }
            Ok(_) => std::fs::read(path)?,
            Err(error) if error.kind() == ErrorKind::NotFound => b"{}".to_vec(),
            Err(error) => return Err(error),
        };
        let noted = serde_json::from_slice(&text)
            .map_err(|e| io::Error::new(ErrorKind::InvalidData, format!("{}: {e}", path.display())))?;
        Ok(Self { path: path.to_owned(), noted: Mutex::new(noted) })
    }

    /// What was used of a rule.
    pub(super) fn used(&self, account: &str) -> Used {
        let noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        noted.get(account).copied().unwrap_or_default()
    }

    /// Changes a rule's sums and writes the file. A write of a few hundred bytes, without waiting for the disk:
    /// what a power loss takes, it takes from the cell, too.
    pub(super) fn note(&self, account: &str, change: impl FnOnce(&mut Used)) -> io::Result<()> {
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = noted.get(account).copied().unwrap_or_default();
        change(&mut changed);
        let before = noted.insert(account.to_owned(), changed);
        let written = self.write(&noted, false);
        if let Err(error) = &written {
            tracing::error!(%error, path = %self.path.display(), "cannot note what a job uses: it goes no further");
            match before {
                Some(before) => noted.insert(account.to_owned(), before),
                None => noted.remove(account),
            };
        }
        written
    }

    /// Sets the exact sums of some rules, and waits until they are on the disk: a job that waits without a cell
    /// outlives a power loss. Blocks.
    pub(super) fn settle(&self, sums: impl IntoIterator<Item = (String, Used)>) -> io::Result<()> {
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        noted.extend(sums);
        if noted.is_empty() { Ok(()) } else { self.write(&noted, true) }
    }

    /// Whole or not at all.
    fn write(&self, noted: &BTreeMap<String, Used>, sync: bool) -> io::Result<()> {
        let text = serde_json::to_vec(noted).map_err(io::Error::other)?;
        let new = self.path.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(&text)?;
        if sync {
            file.sync_data()?;
        }
        std::fs::rename(&new, &self.path)
    }
}

/// How far to note ahead of `used` bytes under a limit.
pub(super) fn ahead(used: u64, limit: u64) -> u64 {
    let step = (limit / STEPS_OF_LIMIT).clamp(STEP_BYTES_MIN, STEP_BYTES_MAX);
    used.max(used.saturating_add(step).min(limit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_sums_are_there_again_and_a_file_of_somebody_elses_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sums");
        let tally = Tally::open(&path).unwrap();
        assert_eq!(tally.used("a.example"), Used::default());
        tally.note("a.example", |used| used.bytes_up = 7).unwrap();
        tally.note(".b.example", |used| used.bytes_down = 9).unwrap();
        let again = Tally::open(&path).unwrap();
        assert_eq!(again.used("a.example"), Used { bytes_up: 7, bytes_down: 0 });
        assert_eq!(again.used(".b.example"), Used { bytes_up: 0, bytes_down: 9 });
        for text in ["", "[]", "{\"a\": 1}", "{\"a\": {\"bytes_up\": -1, \"bytes_down\": 0}}"] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(Tally::open(&path).unwrap_err().kind(), ErrorKind::InvalidData, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_written_is_an_error_and_not_noted() {
        let dir = tempfile::tempdir().unwrap();
        let tally = Tally::open(&dir.path().join("gone").join("sums")).unwrap();
        assert!(tally.note("a.example", |used| used.bytes_up = 7).is_err());
        assert_eq!(tally.used("a.example"), Used::default());
    }

    proptest! {
        #[test]
        fn what_is_noted_is_never_less_than_used_nor_more_than_the_limit(used in 0u64..1 << 40, limit in 0u64..1 << 40) {
            let noted = ahead(used, limit);
            prop_assert!(noted >= used && noted <= used.max(limit));
            prop_assert!(noted - used <= STEP_BYTES_MAX);
            prop_assert!(used >= limit || noted > used, "a write for each byte");
        }
    }
}
