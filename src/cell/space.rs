//! Watches the disk space of live cells: where no file system holds a job's limit, and for the reserve that the host
//! keeps whatever the limits say. Of several jobs the one that has taken the most gives way. It must never hold up a
//! cell's loop, and never end a job for what others took.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::job::JobId;
use crate::workspace::{Scratch, Usage, host_free_bytes};

/// How often a cell's space is measured.
const PERIOD: Duration = Duration::from_secs(1);
/// A file system with less than one part in so many left counts as full.
const FULL_PARTS: u64 = 200;

/// What the jobs that have a cell have taken of the host's disk.
#[derive(Debug, Default)]
pub struct Space(Mutex<BTreeMap<JobId, Taken>>);

#[derive(Debug, Clone)]
struct Taken {
    cell_dir: PathBuf,
    /// As measured last, in bytes.
    bytes: u64,
}

impl Space {
    fn note(&self, job: &JobId, cell_dir: &Path, bytes: u64) {
        let taken = Taken { cell_dir: cell_dir.to_owned(), bytes };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(job.clone(), taken);
    }

    /// Whether nobody has taken more than `job`, as it is at this moment: each of the others is measured too, since
    /// what it took a second ago says nothing. Blocks for some milliseconds.
    fn is_most(&self, job: &JobId, bytes: u64) -> bool {
        let others = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        others.into_iter().filter(|(other, _)| other != job).all(|(other, taken)| {
            // A cell that is just taken down still has what it had.
            let theirs = measure(&taken.cell_dir).map_or(taken.bytes, |now| now.taken_bytes.max(taken.bytes));
            (theirs, &other) <= (bytes, job)
        })
    }

    /// Nothing of the job's cell is left. Not before: its space is on its way back, and nobody else has to give way
    /// for it.
    pub(super) fn forget(&self, job: &JobId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(job);
    }
}

/// What a cell's disk may take.
#[derive(Debug, Clone)]
pub(super) struct Bounds {
    /// The job's limit, in bytes.
    pub(super) bytes_max: u64,
    /// The job's limit of files and directories.
    pub(super) inodes_max: u64,
    /// Free space that the host keeps, in bytes.
    pub(super) reserve_bytes: u64,
}

/// One measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Measured {
    /// What the cell sees as used.
    usage: Usage,
    /// A file system holds the limit.
    enforced: bool,
    /// What it takes of the host's disk, in bytes.
    taken_bytes: u64,
    /// What is free there, in bytes.
    free_bytes: u64,
}

/// The watch over one cell.
#[derive(Debug)]
pub(super) struct Watch {
    space: Arc<Space>,
    job: JobId,
    cell_dir: PathBuf,
    bounds: Bounds,
    due: Instant,
    measuring: Option<JoinHandle<Option<String>>>,
}

impl Watch {
    /// Over the cell in `cell_dir`.
    pub(super) fn new(space: Arc<Space>, job: JobId, cell_dir: PathBuf, bounds: Bounds) -> Self {
        space.note(&job, &cell_dir, 0);
        Self { space, job, cell_dir, bounds, due: Instant::now() + PERIOD, measuring: None }
    }

    /// Returns when the job has to give way: why, in words. Cancel-safe.
    pub(super) async fn next(&mut self) -> String {
        loop {
            if self.measuring.is_none() {
                tokio::time::sleep_until(self.due).await;
                let (space, job) = (self.space.clone(), self.job.clone());
                let (dir, bounds) = (self.cell_dir.clone(), self.bounds.clone());
                self.measuring = Some(tokio::task::spawn_blocking(move || look(&space, &job, &dir, &bounds)));
            }
            let why = match self.measuring.as_mut() {
                Some(measuring) => measuring.await.ok().flatten(),
                None => None,
            };
            (self.measuring, self.due) = (None, Instant::now() + PERIOD);
            if let Some(why) = why {
                return why;
            }
        }
    }

    /// Whether the job's space is used up now. Blocks for microseconds where a file system holds the limit.
    pub(super) fn is_full(&self) -> bool {
        measure(&self.cell_dir).is_some_and(|measured| is_full(&measured, &self.bounds))
    }
}

/// Measures, notes it, and says why the job has to give way, where it has to. Blocks.
fn look(space: &Space, job: &JobId, cell_dir: &Path, bounds: &Bounds) -> Option<String> {
    let measured = measure(cell_dir)?;
    space.note(job, cell_dir, measured.taken_bytes);
    let most = measured.free_bytes < bounds.reserve_bytes && space.is_most(job, measured.taken_bytes);
    must_end(&measured, bounds, most)
}

fn measure(cell_dir: &Path) -> Option<Measured> {
    let scratch = Scratch::adopt(cell_dir).ok()??;
    let usage = scratch.usage().ok()?;
    let taken_bytes = scratch.taken_bytes().unwrap_or(usage.bytes);
    let free_bytes = host_free_bytes(cell_dir).ok()?;
    Some(Measured { usage, enforced: scratch.enforced(), taken_bytes, free_bytes })
}

/// Why the job has to end, in words; `most`: no other live job has taken more.
fn must_end(measured: &Measured, bounds: &Bounds, most: bool) -> Option<String> {
    let Measured { usage, enforced, taken_bytes, free_bytes } = *measured;
    let mib = |bytes: u64| bytes >> 20;
    if !enforced && usage.bytes > bounds.bytes_max {
        return Some(format!(
            "it uses {} MiB of disk, its limit is {} MiB",
            mib(usage.bytes),
            mib(bounds.bytes_max)
        ));
    }
    if !enforced && usage.inodes > bounds.inodes_max {
        return Some(format!("it has {} files, its limit is {}", usage.inodes, bounds.inodes_max));
    }
    if free_bytes < bounds.reserve_bytes && most && taken_bytes > 0 {
        return Some(format!(
            "the host's disk has {} MiB left, less than its reserve of {} MiB, and no job has taken more than this one ({} MiB)",
            mib(free_bytes),
            mib(bounds.reserve_bytes),
            mib(taken_bytes)
        ));
    }
    None
}

fn is_full(measured: &Measured, bounds: &Bounds) -> bool {
    let nearly = |used: u64, max: u64| used >= max - max / FULL_PARTS;
    // A file system keeps a part of its size for itself: what it can hold is less than the limit.
    let holds = if measured.enforced { bounds.bytes_max - bounds.bytes_max / 16 } else { bounds.bytes_max };
    nearly(measured.usage.bytes, holds) || nearly(measured.usage.inodes, bounds.inodes_max)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { bytes_max: 100 << 20, inodes_max: 1000, reserve_bytes: 1 << 30 };

    fn measured(bytes: u64, inodes: u64, enforced: bool, free_bytes: u64) -> Measured {
        let usage = Usage { bytes, inodes, complete: true };
        Measured { usage, enforced, taken_bytes: bytes, free_bytes }
    }

    #[test]
    fn where_nothing_holds_the_limit_passing_it_ends_the_job() {
        let free = 2 << 30;
        assert_eq!(must_end(&measured(100 << 20, 1000, false, free), &BOUNDS, true), None);
        assert!(must_end(&measured((100 << 20) + 1, 1, false, free), &BOUNDS, false).is_some());
        assert!(must_end(&measured(1, 1001, false, free), &BOUNDS, false).is_some());
        assert_eq!(must_end(&measured((100 << 20) + 1, 1001, true, free), &BOUNDS, true), None);
    }

    #[test]
    fn the_hosts_reserve_is_given_back_by_the_job_that_took_the_most() {
        let low = BOUNDS.reserve_bytes - 1;
        let words = must_end(&measured(50 << 20, 1, true, low), &BOUNDS, true).expect("ends");
        assert!(words.contains("1023 MiB") && words.contains("50 MiB"), "{words}");
        assert_eq!(must_end(&measured(50 << 20, 1, true, low), &BOUNDS, false), None);
        assert_eq!(must_end(&measured(0, 0, true, low), &BOUNDS, true), None, "others took it");
    }

    #[test]
    fn exactly_one_of_equals_has_taken_the_most() {
        let (space, a, b) = (Space::default(), JobId::new(1, 1), JobId::new(1, 2));
        let nowhere = Path::new("/nonexistent/cell");
        space.note(&a, nowhere, 5);
        space.note(&b, nowhere, 5);
        assert_eq!(u8::from(space.is_most(&a, 5)) + u8::from(space.is_most(&b, 5)), 1);
        space.note(&b, nowhere, 6);
        assert!(!space.is_most(&a, 5) && space.is_most(&b, 6));
        space.forget(&b);
        assert!(space.is_most(&a, 1));
    }

    #[test]
    fn a_full_disk_is_told_from_one_with_room() {
        assert!(is_full(&measured(95 << 20, 1, true, 0), &BOUNDS));
        assert!(is_full(&measured(1, 999, true, 0), &BOUNDS));
        assert!(!is_full(&measured(80 << 20, 500, true, 0), &BOUNDS));
    }
}
