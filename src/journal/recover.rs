//! What a journal adds up to, read back from its last segment. It cuts what was never committed as a whole
//! and must never cut a line that was.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::path::Path;

use super::segment::{self, At, Segment, number_after};
use super::{JournalError, Tally};
use crate::job::State;

/// Where a journal stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Recovered {
    /// Number that the next event gets.
    pub next_seq: u64,
    /// Offset in the cell's stdout after the last piece in the journal, in bytes.
    pub stdout_end: u64,
    /// The same of stderr.
    pub stderr_end: u64,
    /// Offset in the cell's stdin after the last frame sent.
    pub stdin_end: u64,
    /// The state that the last state event told of.
    pub last_state: Option<State>,
    /// Bytes of a torn tail that were cut.
    pub cut_bytes: u64,
}

impl Default for Recovered {
    fn default() -> Self {
        let (stdout_end, stderr_end, stdin_end) = (0, 0, 0);
        Self { next_seq: 1, stdout_end, stderr_end, stdin_end, last_state: None, cut_bytes: 0 }
    }
}

/// What the writer goes on with.
pub(super) struct Found {
    pub(super) segments: Vec<Segment>,
    pub(super) file: File,
    pub(super) next_seq: u64,
    pub(super) tally: Tally,
    pub(super) cut_bytes: u64,
}

/// Reads the journal in `dir`; none where there is none.
pub(super) fn recover(dir: &Path) -> Result<Option<Found>, JournalError> {
    let mut numbers = segment::list(dir)?;
    let mut removed_bytes = 0;
    while let Some(number) = numbers.pop() {
        let path = segment::path(dir, number);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).open(&path);
        let file = file.map_err(|error| JournalError::io("open", &path, error))?;
        let bytes = length(&file, &path)?;
        let Some((header, header_bytes)) = segment::header(&file, &path)? else {
            // The daemon died while it made this segment: no event was in it.
            removed_bytes += bytes;
            segment::delete(dir, number)?;
            continue;
        };
        let mut scan = Scan { next_seq: header.first_seq, tally: header.tally, bytes: header_bytes };
        scan.run(&file).map_err(|error| JournalError::io("read", &path, error))?;
        if scan.bytes < bytes {
            file.set_len(scan.bytes).map_err(|error| JournalError::io("cut", &path, error))?;
        }
        let mut segments = Vec::with_capacity(numbers.len() + 1);
        for number in numbers {
            let path = segment::path(dir, number);
            let metadata = path.metadata().map_err(|error| JournalError::io("look at", &path, error))?;
            segments.push(Segment { number, bytes: metadata.len(), header_bytes: 0 });
        }
        segments.push(Segment { number, bytes: scan.bytes, header_bytes });
        let cut_bytes = removed_bytes + (bytes - scan.bytes);
        return Ok(Some(Found { segments, file, next_seq: scan.next_seq, tally: scan.tally, cut_bytes }));
    }
    Ok(None)
}

fn length(file: &File, path: &Path) -> Result<u64, JournalError> {
    Ok(file.metadata().map_err(|error| JournalError::io("look at", path, error))?.len())
}

/// Walks the lines of a segment as far as they are whole and in order.
struct Scan {
    next_seq: u64,
    tally: Tally,
    bytes: u64,
}

impl Scan {
    fn run(&mut self, file: &File) -> std::io::Result<()> {
        let mut reader = BufReader::with_capacity(256 * 1024, At { file, offset: self.bytes });
        let mut line = Vec::new();
        loop {
            line.clear();
            // Bounded by the file, which the writer bounds.
            let count = reader.read_until(b'\n', &mut line)?;
            let Some(event) = line.strip_suffix(b"}\n") else { return Ok(()) };
            // After a power loss a page may read as zeros; JSON never holds one.
            if event.contains(&0) || self.take(&line).is_none() {
                return Ok(());
            }
            self.bytes += count as u64;
        }
    }

    /// Adds one line; none where it is not the one that must stand here.
    fn take(&mut self, line: &[u8]) -> Option<()> {
        let (seq, rest) = number_after(line, b"{\"seq\":")?;
        if seq != self.next_seq {
            return None;
        }
        let (_, rest) = number_after(rest, b",\"at_ms\":")?;
        let rest = rest.strip_prefix(b",\"origin\":\"")?;
        let quote = rest.iter().position(|byte| *byte == b'"')?;
        let rest = rest[quote..].strip_prefix(b"\",\"type\":\"")?;
        if let Some(rest) = rest.strip_prefix(b"frame\"") {
            self.tally.stdout_end = number_after(rest, b",\"end\":")?.0;
        } else if let Some(rest) = rest.strip_prefix(b"output\",\"stream\":\"stdout\"") {
            self.tally.stdout_end = number_after(rest, b",\"end\":")?.0;
        } else if let Some(rest) = rest.strip_prefix(b"output\",\"stream\":\"stderr\"") {
            self.tally.stderr_end = number_after(rest, b",\"end\":")?.0;
        } else if let Some(rest) = rest.strip_prefix(b"sent\"") {
            self.tally.stdin_end = number_after(rest, b",\"end\":")?.0;
        } else if rest.starts_with(b"attempt\"") {
            self.tally.begin_attempt();
        } else if rest.starts_with(b"state\"") {
            self.tally.last_state = Some(serde_json::from_slice(line).ok()?);
        }
        self.next_seq += 1;
        Some(())
    }
}
