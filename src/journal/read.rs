//! Reading a journal from any number on, while it is written or after. A reader holds a position and at most
//! one open file; it must never show a line before its commit is complete, and never make the writer wait.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

use super::segment::{self, Header};
use super::{Feed, JournalError, Published};

/// Bytes per read while a reader looks for its first line.
const SKIP_BYTES: usize = 64 * 1024;
/// Times a reader looks again when segments vanish under its hands. Each is a segment that the writer dropped between
/// two calls of ours: a reader that a busy machine gives no time loses that race again and again, and then wins it.
const RETRIES_MAX: u32 = 4096;

/// A position in a journal.
#[derive(Debug)]
pub struct Reader {
    cursor: Cursor,
    feed: Option<Feed>,
}

/// The position itself: moved on a blocking thread, kept only when the move came back, so that a caller may
/// drop [`Reader::next_chunk`] half-way without losing a line.
#[derive(Debug, Clone)]
struct Cursor {
    dir: PathBuf,
    next_seq: u64,
    open: Option<Open>,
}

#[derive(Debug, Clone)]
struct Open {
    file: Arc<File>,
    number: u64,
    offset: u64,
    /// Number of the first line at `offset`.
    seq: u64,
}

/// What a look for a segment gave.
enum Found {
    /// Its header, and the position after it.
    At(Box<Header>, Open),
    /// None, or one whose header is not written yet.
    Nothing,
    /// It was there in the list but is gone.
    Vanished,
}

/// What one look at the files gave.
enum Step {
    Chunk(Bytes),
    /// Nothing more is published.
    End,
}

impl Reader {
    /// A reader of the events from `from_seq` on (0 and 1 both mean all). With a feed it follows until the
    /// writer closes; without one it ends at the last whole line.
    pub fn open(dir: impl Into<PathBuf>, from_seq: u64, feed: Option<Feed>) -> Self {
        let cursor = Cursor { dir: dir.into(), next_seq: from_seq.max(1), open: None };
        Self { cursor, feed }
    }

    /// Number of the next event this reader will give.
    pub fn next_seq(&self) -> u64 {
        self.cursor.next_seq
    }

    /// The next whole lines, at most `bytes_max` together (one longer line comes alone); none at the end.
    /// Waits for the writer where the reader follows. May be dropped and called again.
    ///
    /// # Errors
    /// [`JournalError::Io`], [`JournalError::Corrupt`].
    pub async fn next_chunk(&mut self, bytes_max: usize) -> Result<Option<Bytes>, JournalError> {
        loop {
            // Taken before the look, so that what is published meanwhile ends the wait.
            let closed = self.feed.as_ref().is_some_and(Feed::closed);
            let published = self.feed.as_mut().map(|feed| *feed.published.borrow_and_update());
            let ahead = published.is_none_or(|published| published.last_seq >= self.cursor.next_seq);
            if ahead {
                let mut cursor = self.cursor.clone();
                let work = move || {
                    let step = cursor.step(bytes_max.max(1), published);
                    (cursor, step)
                };
                let moved = tokio::task::spawn_blocking(work).await;
                let (cursor, step) = moved.map_err(|error| {
                    JournalError::io("read", &self.cursor.dir, std::io::Error::other(error))
                })?;
                self.cursor = cursor;
                if let Step::Chunk(bytes) = step? {
                    return Ok(Some(bytes));
                }
            }
            match &mut self.feed {
                Some(feed) if !closed => {
                    // An error means that the writer is gone: one more look, then the end.
                    let _ = feed.published.changed().await;
                }
                _ => return Ok(None),
            }
        }
    }
}

impl Cursor {
    fn step(&mut self, bytes_max: usize, published: Option<Published>) -> Result<Step, JournalError> {
        for _ in 0..RETRIES_MAX {
            let Some(open) = self.open.clone() else {
                match self.locate()? {
                    Found::At(header, open) => {
                        if let Some(chunk) = self.go_to(&header, open)? {
                            return Ok(Step::Chunk(chunk));
                        }
                    }
                    Found::Nothing => return Ok(Step::End),
                    Found::Vanished => {}
                }
                continue;
            };
            if published.is_some_and(|published| published.segment < open.number) {
                // The writer dropped segments since `published` was read; there is newer news by now.
                return Ok(Step::End);
            }
            let last = published.is_some_and(|published| published.segment == open.number);
            let length = self.io("look at", &open, open.file.metadata())?.len();
            let end = published.filter(|_| last).map_or(length, |published| published.bytes);
            if let Some(chunk) = self.lines(open.clone(), end, bytes_max)? {
                return Ok(Step::Chunk(chunk));
            }
            if last {
                return Ok(Step::End);
            }
            match self.following(open.number)? {
                // Without a feed the file may have grown before the next one was made.
                Found::At(..) if self.io("look at", &open, open.file.metadata())?.len() > length => {}
                Found::At(header, next) => {
                    if let Some(chunk) = self.go_to(&header, next)? {
                        return Ok(Step::Chunk(chunk));
                    }
                }
                Found::Nothing => return Ok(Step::End),
                Found::Vanished => {}
            }
        }
        // Files come and go here that no writer made.
        Err(JournalError::io("follow", &self.dir, ErrorKind::Interrupted.into()))
    }

    /// Stands at the wanted line of a segment, or before its first one after a hole: then it returns the
    /// event that tells of the hole.
    fn go_to(&mut self, header: &Header, mut open: Open) -> Result<Option<Bytes>, JournalError> {
        let wanted = self.next_seq;
        if wanted < header.first_seq {
            let last = header.first_seq - 1;
            let at_ms = header.at_ms;
            self.open = Some(open);
            self.next_seq = header.first_seq;
            let line = format!(
                "{{\"seq\":{last},\"at_ms\":{at_ms},\"origin\":\"daemon\",\"type\":\"truncated\",\
                 \"first\":{wanted},\"last\":{last}}}\n"
            );
            return Ok(Some(line.into()));
        }
        let mut block = vec![0; SKIP_BYTES];
        while open.seq < wanted {
            let count = self.io("read", &open, open.file.read_at(&mut block, open.offset))?;
            let mut passed = 0;
            while open.seq < wanted {
                let Some(line) = block[passed..count].iter().position(|byte| *byte == b'\n') else { break };
                passed += line + 1;
                open.seq += 1;
            }
            if open.seq < wanted {
                if count == 0 {
                    break;
                }
                // The rest of the block is the start of a line: step over it too.
                passed = count;
            }
            open.offset += passed as u64;
        }
        self.open = Some(open);
        Ok(None)
    }

    /// Whole lines from the position up to `end`; none where there is no whole line.
    fn lines(&mut self, mut open: Open, end: u64, bytes_max: usize) -> Result<Option<Bytes>, JournalError> {
        let left = end.saturating_sub(open.offset);
        let mut wanted = left.min(bytes_max as u64) as usize;
        let mut chunk = Vec::new();
        let whole = loop {
            let start = chunk.len();
            chunk.resize(wanted, 0);
            let read = open.file.read_exact_at(&mut chunk[start..], open.offset + start as u64);
            self.io("read", &open, read)?;
            let searched = if start == 0 { &chunk[..] } else { &chunk[start..] };
            // The first line alone may be longer than `bytes_max`: then it ends at the first line feed
            // after that.
            let found = if start == 0 {
                searched.iter().rposition(|byte| *byte == b'\n')
            } else {
                searched.iter().position(|byte| *byte == b'\n')
            };
            if let Some(at) = found {
                break start + at + 1;
            }
            if wanted as u64 == left {
                return Ok(None);
            }
            wanted = left.min((wanted as u64).saturating_mul(2).max(SKIP_BYTES as u64)) as usize;
        };
        chunk.truncate(whole);
        let body = &chunk[..whole - 1];
        let last_line = body.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let Some(last_seq) = segment::seq_of(&chunk[last_line..]) else {
            let path = segment::path(&self.dir, open.number);
            return Err(JournalError::Corrupt { path, detail: "a line is no event" });
        };
        open.offset += whole as u64;
        open.seq = last_seq + 1;
        self.next_seq = open.seq;
        self.open = Some(open);
        Ok(Some(chunk.into()))
    }

    /// The last segment that starts at or before the wanted number, else the first one.
    fn locate(&self) -> Result<Found, JournalError> {
        let numbers = segment::list(&self.dir)?;
        let Some(first) = numbers.first() else { return Ok(Found::Nothing) };
        let mut best = self.look(*first)?;
        let (mut low, mut high) = (1, numbers.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let found = self.look(numbers[middle])?;
            match &found {
                Found::At(header, _) if header.first_seq <= self.next_seq => {
                    best = found;
                    low = middle + 1;
                }
                // One that is being made holds only what comes last.
                Found::At(..) | Found::Nothing => high = middle,
                Found::Vanished => return Ok(Found::Vanished),
            }
        }
        Ok(best)
    }

    /// The segment after `number`.
    fn following(&self, number: u64) -> Result<Found, JournalError> {
        if let found @ (Found::At(..) | Found::Nothing) = self.look(number + 1)? {
            return Ok(found);
        }
        let next = segment::list(&self.dir)?.into_iter().find(|next| *next > number);
        next.map_or(Ok(Found::Nothing), |next| self.look(next))
    }

    fn look(&self, number: u64) -> Result<Found, JournalError> {
        let path = segment::path(&self.dir, number);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::Vanished),
            Err(error) => return Err(JournalError::io("open", &path, error)),
        };
        let Some((header, offset)) = segment::header(&file, &path)? else { return Ok(Found::Nothing) };
        let open = Open { file: Arc::new(file), number, offset, seq: header.first_seq };
        Ok(Found::At(Box::new(header), open))
    }

    fn io<T>(&self, what: &'static str, open: &Open, result: std::io::Result<T>) -> Result<T, JournalError> {
        result.map_err(|error| JournalError::io(what, &segment::path(&self.dir, open.number), error))
    }
}
