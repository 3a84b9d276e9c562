//! The user's directory, read while a change set is made, with the user's rights: a thread of theirs looks and reads,
//! and answers over a bounded channel, so that a file system that hangs holds nobody up for longer than agreed. It
//! must never give a content as the base that was not proven to be it.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use super::super::listing::{RESOLVE, Seen, What, look};
use crate::change::TreePath;
use crate::job::Identity;
use crate::workspace::{WorkspaceError, as_submitter};

const CHUNK_BYTES: usize = 128 << 10;
const CHUNKS_WAITING_MAX: usize = 4;
/// Longest wait for one answer: a file system that takes longer for one chunk hangs.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);

enum Ask {
    Stat(Vec<TreePath>),
    Read { path: TreePath, bytes_max: u64 },
}

enum Answer {
    Stats(Vec<Option<Seen>>),
    Opened(Option<Seen>),
    Chunk(Vec<u8>),
    End(Option<Seen>),
}

/// The directory; none where there is none, or where it stopped answering.
pub(super) struct Original {
    link: Option<(SyncSender<Ask>, Receiver<Answer>)>,
    until: Instant,
    /// It stopped answering.
    pub(super) silent: bool,
}

/// A content on its way.
pub(super) struct Stream<'a> {
    original: &'a mut Original,
    chunk: Vec<u8>,
    at: usize,
    /// What the file was before its first and after its last byte.
    opened: Option<Seen>,
    closed: Option<Option<Seen>>,
}

impl Original {
    pub(super) fn start(
        dir: Option<BorrowedFd<'_>>,
        identity: &Identity,
        until: Instant,
    ) -> io::Result<Self> {
        let Some(dir) = dir else { return Ok(Self { link: None, until, silent: false }) };
        let dir = dir.try_clone_to_owned()?;
        let (ask, asked) = sync_channel::<Ask>(1);
        let (answer, answers) = sync_channel::<Answer>(CHUNKS_WAITING_MAX);
        let who = identity.clone();
        let wait_max = until.saturating_duration_since(Instant::now()) + ANSWER_TIME_MAX;
        let body = move || {
            let work = move || -> Result<(), WorkspaceError> {
                serve(&dir, &asked, &answer);
                Ok(())
            };
            // Whoever asks sees the closed channel, and takes the base for unknown.
            if let Err(error) = as_submitter(&who, Path::new("the workspace"), wait_max, work) {
                tracing::warn!(%error, "the original of a workspace is not read");
            }
        };
        std::thread::Builder::new().name("hotcell-original".to_owned()).spawn(body)?;
        Ok(Self { link: Some((ask, answers)), until, silent: false })
    }

    /// What is at each path now.
    pub(super) fn stat(&mut self, paths: Vec<TreePath>) -> Vec<Option<Seen>> {
        let count = paths.len();
        self.ask(Ask::Stat(paths));
        match self.answer() {
            Some(Answer::Stats(stats)) if stats.len() == count => stats,
            Some(Answer::Stats(_) | Answer::Opened(_) | Answer::Chunk(_) | Answer::End(_)) | None => {
                vec![None; count]
            }
        }
    }

    /// Whether anything can be asked.
    pub(super) fn is_there(&self) -> bool {
        self.link.is_some()
    }

    /// The content of a file.
    pub(super) fn open(&mut self, path: &TreePath, bytes_max: u64) -> Stream<'_> {
        self.ask(Ask::Read { path: path.clone(), bytes_max });
        let opened = match self.answer() {
            Some(Answer::Opened(seen)) => seen,
            Some(Answer::Stats(_) | Answer::Chunk(_) | Answer::End(_)) | None => None,
        };
        Stream { original: self, chunk: Vec::new(), at: 0, closed: opened.is_none().then_some(None), opened }
    }

    /// A short content, whatever it was before; none where it is longer, or no file.
    pub(super) fn read_now(&mut self, path: &TreePath, bytes_max: u64) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut stream = self.open(path, bytes_max + 1);
        stream.opened.as_ref()?;
        let read = stream.read_to_end(&mut bytes);
        (read.is_ok() && bytes.len() as u64 <= bytes_max).then_some(bytes)
    }

    fn ask(&mut self, ask: Ask) {
        if let Some((asks, _)) = &self.link
            && asks.send(ask).is_err()
        {
            self.lost();
        }
    }

    fn answer(&mut self) -> Option<Answer> {
        let (_, answers) = self.link.as_ref()?;
        let left = self.until.saturating_duration_since(Instant::now()).min(ANSWER_TIME_MAX);
        match answers.recv_timeout(left) {
            Ok(answer) => Some(answer),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                self.lost();
                None
            }
        }
    }

    /// Late answers must not be taken for others.
    fn lost(&mut self) {
        self.link = None;
        self.silent = true;
    }
}

impl Stream<'_> {
    /// Reads what is left, and says whether all that was read is the content that `want` had.
    pub(super) fn proves(mut self, want: &Seen) -> bool {
        let drained = io::copy(&mut self, &mut io::sink()).is_ok();
        let same = |seen: Option<&Seen>| seen.is_some_and(|seen| want.still(seen));
        drained && same(self.opened.as_ref()) && same(self.closed.as_ref().and_then(Option::as_ref))
    }
}

impl Drop for Stream<'_> {
    /// The next answer must be the next question's.
    fn drop(&mut self) {
        while self.closed.is_none() {
            match self.original.answer() {
                Some(Answer::End(seen)) => self.closed = Some(seen),
                Some(Answer::Chunk(_) | Answer::Stats(_) | Answer::Opened(_)) => {}
                None => self.closed = Some(None),
            }
        }
    }
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.chunk.len() {
            if self.closed.is_some() {
                return Ok(0);
            }
            match self.original.answer() {
                Some(Answer::Chunk(chunk)) => (self.chunk, self.at) = (chunk, 0),
                Some(Answer::End(seen)) => self.closed = Some(seen),
                Some(Answer::Stats(_) | Answer::Opened(_)) | None => self.closed = Some(None),
            }
        }
        let length = buffer.len().min(self.chunk.len() - self.at);
        buffer[..length].copy_from_slice(&self.chunk[self.at..self.at + length]);
        self.at += length;
        Ok(length)
    }
}

/// Runs with the user's rights, until nobody asks any more.
fn serve(dir: &OwnedFd, asked: &Receiver<Ask>, answer: &SyncSender<Answer>) {
    while let Ok(ask) = asked.recv() {
        let sent = match ask {
            Ask::Stat(paths) => {
                answer.send(Answer::Stats(paths.iter().map(|path| stat(dir, path)).collect()))
            }
            Ask::Read { path, bytes_max } => match open(dir, &path) {
                None => answer.send(Answer::Opened(None)),
                Some((file, seen)) => {
                    let opened = answer.send(Answer::Opened(Some(seen)));
                    opened.and_then(|()| send(file, bytes_max, answer))
                }
            },
        };
        if sent.is_err() {
            return;
        }
    }
}

fn send(
    file: std::fs::File,
    bytes_max: u64,
    answer: &SyncSender<Answer>,
) -> Result<(), std::sync::mpsc::SendError<Answer>> {
    let mut left = bytes_max;
    let mut failed = false;
    while left > 0 && !failed {
        let mut chunk = Vec::new();
        failed = (&file).take(left.min(CHUNK_BYTES as u64)).read_to_end(&mut chunk).is_err();
        if chunk.is_empty() {
            break;
        }
        left -= chunk.len() as u64;
        answer.send(Answer::Chunk(chunk))?;
    }
    let now = look(file.as_fd(), c"").ok().flatten().map(|(seen, _)| seen);
    answer.send(Answer::End(now.filter(|_| !failed)))
}

fn stat(dir: &OwnedFd, path: &TreePath) -> Option<Seen> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = rustix::fs::openat2(dir, path.as_bytes(), flags, Mode::empty(), RESOLVE).ok()?;
    look(found.as_fd(), c"").ok().flatten().map(|(seen, _)| seen)
}

/// Only what is a regular file is opened: a FIFO would let its writer go on.
fn open(dir: &OwnedFd, path: &TreePath) -> Option<(std::fs::File, Seen)> {
    stat(dir, path).filter(|seen| seen.what == What::File)?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat2(dir, path.as_bytes(), flags, Mode::empty(), RESOLVE).ok()?;
    let (seen, _) = look(file.as_fd(), c"").ok().flatten()?;
    (seen.what == What::File).then(|| (file.into(), seen))
}
