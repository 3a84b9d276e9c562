//! One segment file: its name, its header, its lines. Nothing here knows which events matter.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{JournalError, Tally};

/// Longest header; ours are a few hundred bytes, or some KiB where the last state tells a story.
const HEADER_BYTES_MAX: u64 = 64 * 1024;

/// A segment as the writer keeps it in mind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) number: u64,
    /// Committed bytes, header included.
    pub(super) bytes: u64,
    pub(super) header_bytes: u64,
}

impl Segment {
    pub(super) fn has_events(&self) -> bool {
        self.bytes > self.header_bytes
    }

    pub(super) fn path(&self, dir: &Path) -> PathBuf {
        path(dir, self.number)
    }
}

/// First line of a segment.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Header {
    pub(super) segment: u64,
    pub(super) first_seq: u64,
    /// Time of the last event before the segment.
    pub(super) at_ms: u64,
    #[serde(flatten)]
    pub(super) tally: Tally,
}

pub(super) fn path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:06}.ndjson"))
}

pub(super) fn make_dir(dir: &Path) -> Result<(), JournalError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|error| JournalError::io("make", dir, error))
}

/// Numbers of the segments in a directory, in order; none where there is no directory.
pub(super) fn list(dir: &Path) -> Result<Vec<u64>, JournalError> {
    let fail = |error| JournalError::io("list", dir, error);
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(fail(error)),
    };
    let mut numbers = Vec::new();
    for entry in entries {
        let name = entry.map_err(fail)?.file_name();
        let number: Option<u64> = name.to_str().and_then(|name| name.strip_suffix(".ndjson")?.parse().ok());
        numbers.extend(number);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Makes a segment with its header. What a failed attempt left under the name is replaced: a segment
/// without events holds nothing.
pub(super) fn create(
    dir: &Path,
    number: u64,
    first_seq: u64,
    at_ms: u64,
    tally: &Tally,
) -> Result<(File, Segment), JournalError> {
    let path = path(dir, number);
    let header = Header { segment: number, first_seq, at_ms, tally: tally.clone() };
    let mut line = serde_json::to_vec(&header)?;
    line.push(b'\n');
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true).mode(0o600);
    let file = options.open(&path).map_err(|error| JournalError::io("make", &path, error))?;
    if let Err(error) = file.write_all_at(&line, 0) {
        // Recovery removes a segment without a whole header, should this fail.
        let _ = std::fs::remove_file(&path);
        return Err(JournalError::io("write", &path, error));
    }
    let bytes = line.len() as u64;
    Ok((file, Segment { number, bytes, header_bytes: bytes }))
}

/// Reads a segment's header and its length with the line feed; none where it was never written whole.
pub(super) fn header(file: &File, path: &Path) -> Result<Option<(Header, u64)>, JournalError> {
    let mut line = Vec::new();
    let mut start = BufReader::new(At { file, offset: 0 }.take(HEADER_BYTES_MAX));
    start.read_until(b'\n', &mut line).map_err(|error| JournalError::io("read", path, error))?;
    if line.last() != Some(&b'\n') {
        let whole = line.len() as u64 == HEADER_BYTES_MAX;
        let corrupt = JournalError::Corrupt { path: path.to_owned(), detail: "its first line does not end" };
        return if whole && line.iter().any(|byte| *byte != 0) { Err(corrupt) } else { Ok(None) };
    }
    let parsed = serde_json::from_slice(&line).map_err(|_| JournalError::Corrupt {
        path: path.to_owned(),
        detail: "its first line is no header",
    })?;
    Ok(Some((parsed, line.len() as u64)))
}

/// Number of segments at the front that are never dropped: the first one, and what follows it without a
/// hole within `bytes_max`.
pub(super) fn head_count(segments: &[Segment], bytes_max: u64) -> usize {
    let mut count = 0;
    let mut total = 0;
    for (index, segment) in segments.iter().enumerate() {
        total += segment.bytes;
        let follows = index == 0 || segment.number == segments[index - 1].number + 1;
        if index > 0 && (!follows || total > bytes_max) {
            break;
        }
        count += 1;
    }
    count
}

pub(super) fn delete(dir: &Path, number: u64) -> Result<(), JournalError> {
    let path = path(dir, number);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(JournalError::io("delete", &path, error)),
        _ => Ok(()),
    }
}

/// Syncs the current file, the closed ones that still exist, and the directory's names.
pub(super) fn sync(dir: &Path, file: &File, closed: &[u64], dir_too: bool) -> Result<(), JournalError> {
    for number in closed {
        let path = path(dir, *number);
        match File::open(&path).and_then(|file| file.sync_data()) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(JournalError::io("sync", &path, error));
            }
            _ => {}
        }
    }
    file.sync_data().map_err(|error| JournalError::io("sync", dir, error))?;
    if dir_too {
        let synced = File::open(dir).and_then(|dir| dir.sync_all());
        synced.map_err(|error| JournalError::io("sync", dir, error))?;
    }
    Ok(())
}

/// The number of an event line; none where it is no line of ours.
pub(super) fn seq_of(line: &[u8]) -> Option<u64> {
    number_after(line, b"{\"seq\":").map(|(seq, _)| seq)
}

/// Parses a number behind `prefix`; returns it and what follows.
pub(super) fn number_after<'a>(text: &'a [u8], prefix: &[u8]) -> Option<(u64, &'a [u8])> {
    let text = text.strip_prefix(prefix)?;
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let number = std::str::from_utf8(&text[..digits]).ok()?.parse().ok()?;
    Some((number, &text[digits..]))
}

/// Reads a shared file from an offset of its own.
pub(super) struct At<'a> {
    pub(super) file: &'a File,
    pub(super) offset: u64,
}

impl Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.file.read_at(buffer, self.offset)?;
        self.offset += count as u64;
        Ok(count)
    }
}
