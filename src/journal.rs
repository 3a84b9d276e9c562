//! The journal: the events of one job, in numbered segment files of one directory. One writer appends, any
//! number of readers follow at their own pace.
//!
//! ```text
//! <state>/jobs/<id>/000001.ndjson   {"segment":1,"first_seq":1,…}      header: not an event, never shown
//!                                   {"seq":1,"at_ms":…,"origin":"daemon","type":"state",…}
//!                                   {"seq":2,…}
//!                   000007.ndjson   {"segment":7,"first_seq":90211,…}  2 to 6 were dropped to stay in bounds
//! ```
//!
//! A header carries what all events before the segment add up to (ends of the streams, last state), so
//! recovery reads the last segment only. When the whole grows over its limit the oldest segments after the
//! head are deleted; a reader that comes to such a hole gets one `truncated` event instead, whose `seq` is
//! the last number that is gone.
//!
//! *Invariants*: numbers have no gaps in what is written; a line is published to readers only when its
//! `write(2)` is complete; a failed write leaves the file as it was at the last commit; no byte of a frame
//! can end its line. A commit survives `kill -9`; it survives a power loss only after [`Journal::sync`].

mod read;
mod recover;
mod segment;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::event::{Body, Origin, Stream};
use crate::failpoint;
use crate::job::State;

pub use read::Reader;
pub use recover::Recovered;
use segment::Segment;

/// Events to be committed at the latest when this many bytes wait (see [`Journal::pending_bytes`]).
pub const COMMIT_BYTES: usize = 256 * 1024;

/// Why the journal refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// No space left. What was committed before is whole; the events in the buffer are not in the file.
    #[error("no space left for {path}; free some and commit again")]
    Full {
        /// The segment.
        path: PathBuf,
    },
    /// The directory has a journal already.
    #[error("{path} has a journal already; open it instead")]
    Exists {
        /// The directory.
        path: PathBuf,
    },
    /// A segment does not hold what this program writes.
    #[error("{path} is damaged: {detail}; move it away to keep the rest")]
    Corrupt {
        /// The segment.
        path: PathBuf,
        /// What is wrong.
        detail: &'static str,
    },
    /// An event that cannot be written as JSON.
    #[error("an event is not JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// A file operation failed.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// The verb.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
}

impl JournalError {
    fn io(what: &'static str, path: &Path, source: std::io::Error) -> Self {
        use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        match source.kind() {
            StorageFull | QuotaExceeded | FileTooLarge => Self::Full { path: path.to_owned() },
            _ => Self::Io { what, path: path.to_owned(), source },
        }
    }
}

/// How large a journal may get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// All segments together, in bytes. Kept as long as no commit is larger than a segment; at least four
    /// segments.
    pub journal_bytes_max: u64,
    /// One segment, in bytes, unless one commit alone is larger.
    pub segment_bytes_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { journal_bytes_max: 256 * 1024 * 1024, segment_bytes_max: 8 * 1024 * 1024 }
    }
}

/// What all events so far add up to; the header of a segment holds that of the segments before it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Tally {
    stdout_end: u64,
    stderr_end: u64,
    stdin_end: u64,
    last_state: Option<State>,
}

impl Tally {
    /// A new cell has streams of its own.
    fn begin_attempt(&mut self) {
        (self.stdout_end, self.stderr_end, self.stdin_end) = (0, 0, 0);
    }
}

/// What readers may see: all segments before `segment`, and that one up to `bytes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Published {
    segment: u64,
    bytes: u64,
    last_seq: u64,
}

/// News of a journal for its followers: clones are cheap.
#[derive(Debug, Clone)]
pub struct Feed {
    published: watch::Receiver<Published>,
}

impl Feed {
    /// Number of the last event that readers may see; zero before the first.
    pub fn last_seq(&self) -> u64 {
        self.published.borrow().last_seq
    }

    /// True when the writer is gone: nothing follows.
    pub fn closed(&self) -> bool {
        self.published.has_changed().is_err()
    }
}

/// The one writer of a job's journal.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    limits: Limits,
    segments: Vec<Segment>,
    file: Arc<File>,
    /// Segments closed since the last sync, by number.
    unsynced: Vec<u64>,
    dir_unsynced: bool,
    /// The current segment may hold a part of a failed write.
    torn: bool,
    buffer: Vec<u8>,
    next_seq: u64,
    last_ms: u64,
    committed: Tally,
    pending: Tally,
    published: watch::Sender<Published>,
}

/// An event to be written; the order of its fields is what recovery and readers parse.
#[derive(Serialize)]
struct Line<'a> {
    seq: u64,
    at_ms: u64,
    origin: Origin,
    #[serde(flatten)]
    body: &'a Body,
}

impl Journal {
    /// Starts a journal in a directory that is made where missing.
    ///
    /// # Errors
    /// [`JournalError::Exists`], [`JournalError::Full`], [`JournalError::Io`].
    pub fn create(dir: impl Into<PathBuf>, limits: Limits) -> Result<Self, JournalError> {
        let dir = dir.into();
        segment::make_dir(&dir)?;
        if !segment::list(&dir)?.is_empty() {
            return Err(JournalError::Exists { path: dir });
        }
        let tally = Tally::default();
        let (file, segment) = segment::create(&dir, 1, 1, 0, &tally)?;
        Ok(Self::assemble(dir, limits, vec![segment], file, 1, tally))
    }

    /// Opens a journal to go on with it: cuts a torn tail and says where everything stands. A directory
    /// without a journal gets a new one. Reads one segment; blocks.
    ///
    /// # Errors
    /// [`JournalError::Corrupt`], [`JournalError::Io`], [`JournalError::Full`].
    pub fn open(dir: impl Into<PathBuf>, limits: Limits) -> Result<(Self, Recovered), JournalError> {
        let dir = dir.into();
        let Some(found) = recover::recover(&dir)? else {
            return Ok((Self::create(dir, limits)?, Recovered::default()));
        };
        let tally = found.tally.clone();
        let recovered = Recovered {
            next_seq: found.next_seq,
            stdout_end: tally.stdout_end,
            stderr_end: tally.stderr_end,
            stdin_end: tally.stdin_end,
            last_state: tally.last_state.clone(),
            cut_bytes: found.cut_bytes,
        };
        Ok((Self::assemble(dir, limits, found.segments, found.file, found.next_seq, tally), recovered))
    }

    fn assemble(
        dir: PathBuf,
        limits: Limits,
        segments: Vec<Segment>,
        file: File,
        next_seq: u64,
        tally: Tally,
    ) -> Self {
        let current = segments.last().map_or((1, 0), |last| (last.number, last.bytes));
        let published = Published { segment: current.0, bytes: current.1, last_seq: next_seq - 1 };
        let segment_bytes_max = limits.segment_bytes_max.max(1);
        let journal_bytes_max = limits.journal_bytes_max.max(segment_bytes_max.saturating_mul(4));
        Self {
            dir,
            limits: Limits { journal_bytes_max, segment_bytes_max },
            segments,
            file: Arc::new(file),
            unsynced: Vec::new(),
            dir_unsynced: true,
            torn: false,
            // Most jobs never have much in it at a time, and there are many.
            buffer: Vec::new(),
            next_seq,
            last_ms: 0,
            pending: tally.clone(),
            committed: tally,
            published: watch::Sender::new(published),
        }
    }

    /// Puts an event into the buffer; returns its number. The caller bounds the size of `body` and commits
    /// when [`Journal::pending_bytes`] passes [`COMMIT_BYTES`].
    ///
    /// # Errors
    /// [`JournalError::Json`]; the buffer is as it was then.
    pub fn push(&mut self, body: &Body, at_ms: u64) -> Result<u64, JournalError> {
        let seq = self.next_seq;
        let start = self.buffer.len();
        let line = Line { seq, at_ms, origin: body.origin(), body };
        if let Err(error) = serde_json::to_writer(&mut self.buffer, &line) {
            self.buffer.truncate(start);
            return Err(error.into());
        }
        one_line(&mut self.buffer[start..]);
        self.buffer.push(b'\n');
        match body {
            Body::Frame { end, .. } | Body::Output { stream: Stream::Stdout, end, .. } => {
                self.pending.stdout_end = *end;
            }
            Body::Output { stream: Stream::Stderr, end, .. } => self.pending.stderr_end = *end,
            Body::Sent { end, .. } => self.pending.stdin_end = *end,
            Body::Attempt { .. } => self.pending.begin_attempt(),
            Body::State { state } => self.pending.last_state = Some(state.clone()),
            _ => {}
        }
        self.next_seq += 1;
        self.last_ms = at_ms;
        Ok(seq)
    }

    /// Puts an agent's frame into the buffer without parsing it; returns its number. `raw_line` must be one
    /// JSON value, without its line feed; `end` is the offset in the cell's stdout after that line feed.
    pub fn push_frame(&mut self, raw_line: &[u8], end: u64, at_ms: u64) -> u64 {
        let seq = self.next_seq;
        self.buffer.extend_from_slice(b"{\"seq\":");
        put_decimal(&mut self.buffer, seq);
        self.buffer.extend_from_slice(b",\"at_ms\":");
        put_decimal(&mut self.buffer, at_ms);
        self.buffer.extend_from_slice(b",\"origin\":\"agent\",\"type\":\"frame\",\"end\":");
        put_decimal(&mut self.buffer, end);
        self.buffer.extend_from_slice(b",\"frame\":");
        let start = self.buffer.len();
        self.buffer.extend_from_slice(raw_line);
        // A line feed in here would let an agent write events of its own.
        one_line(&mut self.buffer[start..]);
        self.buffer.extend_from_slice(b"}\n");
        self.pending.stdout_end = end;
        self.next_seq += 1;
        self.last_ms = at_ms;
        seq
    }

    /// Bytes that wait for a commit.
    pub fn pending_bytes(&self) -> usize {
        self.buffer.len()
    }

    /// Number that the next event will get.
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// Writes the buffer with one `write(2)` and publishes it; returns the last number written (of this or
    /// an earlier commit). Blocks for as long as a write to the page cache does.
    ///
    /// # Errors
    /// [`JournalError::Full`], [`JournalError::Io`]. The file is then as it was, the buffer keeps its
    /// events: commit again, or [`Journal::discard`] them.
    pub fn commit(&mut self) -> Result<u64, JournalError> {
        if self.buffer.is_empty() {
            return Ok(self.next_seq - 1);
        }
        if self.torn {
            let path = self.current().path(&self.dir);
            let cut = self.file.set_len(self.current().bytes);
            cut.map_err(|error| JournalError::io("cut", &path, error))?;
            self.torn = false;
        }
        let grow = self.buffer.len() as u64;
        if self.current().has_events() && self.current().bytes + grow > self.limits.segment_bytes_max {
            self.rotate()?;
        }
        self.make_room(grow)?;
        let path = self.current().path(&self.dir);
        let at = self.current().bytes;
        failpoint::pass("journal: before a write");
        let written = self.file.write_all_at(&self.buffer, at);
        failpoint::pass("journal: after a write");
        if let Err(error) = written {
            // Where cutting fails too the next commit tries again, and recovery cuts at the latest.
            self.torn = self.file.set_len(at).is_err();
            return Err(JournalError::io("write", &path, error));
        }
        self.committed.clone_from(&self.pending);
        self.buffer.clear();
        // One huge event must not keep its memory for the rest of the job.
        self.buffer.shrink_to(2 * COMMIT_BYTES);
        let last_seq = self.next_seq - 1;
        if let Some(current) = self.segments.last_mut() {
            current.bytes += grow;
            let published = Published { segment: current.number, bytes: current.bytes, last_seq };
            self.published.send_replace(published);
        }
        Ok(last_seq)
    }

    /// Drops the events that wait for a commit; their numbers are given again.
    pub fn discard(&mut self) {
        self.buffer.clear();
        self.next_seq = self.published.borrow().last_seq + 1;
        self.pending.clone_from(&self.committed);
    }

    /// Makes all commits survive a power loss (`fdatasync`, on a blocking thread).
    ///
    /// # Errors
    /// [`JournalError::Io`], [`JournalError::Full`].
    pub async fn sync(&mut self) -> Result<(), JournalError> {
        let (dir, file, closed) = (self.dir.clone(), Arc::clone(&self.file), self.unsynced.clone());
        let dir_too = self.dir_unsynced;
        let work = move || segment::sync(&dir, &file, &closed, dir_too);
        let done = tokio::task::spawn_blocking(work).await;
        done.unwrap_or_else(|error| Err(JournalError::io("sync", &self.dir, std::io::Error::other(error))))?;
        self.unsynced.clear();
        self.dir_unsynced = false;
        Ok(())
    }

    /// News for followers. They end when this journal is dropped.
    pub fn feed(&self) -> Feed {
        Feed { published: self.published.subscribe() }
    }

    fn current(&self) -> Segment {
        // There is always one; a zero segment would only make the write fail.
        self.segments.last().copied().unwrap_or_default()
    }

    fn rotate(&mut self) -> Result<(), JournalError> {
        let closed = self.current().number;
        let first_seq = self.published.borrow().last_seq + 1;
        let (file, segment) =
            segment::create(&self.dir, closed + 1, first_seq, self.last_ms, &self.committed)?;
        self.unsynced.push(closed);
        self.dir_unsynced = true;
        self.file = Arc::new(file);
        self.segments.push(segment);
        Ok(())
    }

    /// Deletes the oldest segments after the head until `grow` more bytes fit.
    fn make_room(&mut self, grow: u64) -> Result<(), JournalError> {
        let mut total: u64 = self.segments.iter().map(|segment| segment.bytes).sum();
        let head = segment::head_count(&self.segments, self.limits.journal_bytes_max / 4);
        while total + grow > self.limits.journal_bytes_max && head + 1 < self.segments.len() {
            let dropped = self.segments[head];
            segment::delete(&self.dir, dropped.number)?;
            self.segments.remove(head);
            self.unsynced.retain(|number| *number != dropped.number);
            total -= dropped.bytes;
        }
        Ok(())
    }
}

/// Replaces line feeds: in JSON they can only stand between tokens.
fn one_line(json: &mut [u8]) {
    if json.contains(&b'\n') {
        for byte in json.iter_mut().filter(|byte| **byte == b'\n') {
            *byte = b' ';
        }
    }
}

fn put_decimal(buffer: &mut Vec<u8>, mut value: u64) {
    let mut digits = [0; 20];
    let mut start = digits.len();
    loop {
        start -= 1;
        digits[start] = b'0' + (value % 10) as u8;
        value /= 10;
        if value == 0 {
            break;
        }
    }
    buffer.extend_from_slice(&digits[start..]);
}
