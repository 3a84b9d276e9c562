//! Contents of changed paths: compared with the base where it can be proven, put on the shelf, judged. What does not
//! fit the limits is named without its content, and refused.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::time::Instant;

use super::super::listing::{Seen, What};
use super::super::shelf::Batch;
use super::bases::Known;
use super::original::Original;
use super::sorting::same_times;
use super::walk::{open_file, still};
use super::{Candidate, ExtractError, Extraction, STAT_BATCH, some_of};
use crate::change::classify::{Facts, GitPlace, HEAD_BYTES_MAX, flags, git_place};
use crate::change::{BlobId, Entry, TreePath, Verdict};
use crate::git::config;

const COMPARE_BYTES: usize = 128 << 10;

/// Reads, compares, keeps.
pub(super) struct Contents<'a> {
    from: &'a Extraction<'a>,
    root: &'a OwnedFd,
    overlay: bool,
    pub(super) original: Original,
    batch: Batch<'a>,
    until: Instant,
    known: Known<'a>,
    bytes_left: u64,
    /// Not kept, because they are too long or too many.
    left_out: Vec<String>,
    /// Old contents that were not kept.
    old_left_out: u64,
}

/// A content on the shelf: its name, and its first bytes.
type Kept = (BlobId, Vec<u8>);

impl<'a> Contents<'a> {
    pub(super) fn new(
        from: &'a Extraction<'a>,
        root: &'a OwnedFd,
        overlay: bool,
        original: Original,
        until: Instant,
    ) -> Self {
        let bytes_left = from.limits.blobs_bytes_max;
        let (batch, known) = (from.shelf.batch(), Known::new(from.bases, from.identity));
        Self {
            from,
            root,
            overlay,
            original,
            batch,
            until,
            known,
            bytes_left,
            left_out: Vec::new(),
            old_left_out: 0,
        }
    }

    /// A file that the cell left.
    pub(super) fn open(&self, path: &TreePath, seen: &Seen) -> Result<File, ExtractError> {
        open_file(self.root, path, seen, self.overlay)
    }

    /// The entries of those that did change.
    pub(super) fn entries(&mut self, candidates: &[Candidate]) -> Result<Vec<Entry>, ExtractError> {
        let mut entries = Vec::new();
        for batch in candidates.chunks(STAT_BATCH) {
            let now = self.original.stat(batch.iter().map(|c| c.path.clone()).collect());
            for (candidate, now) in batch.iter().zip(now) {
                if Instant::now() > self.until {
                    return Err(ExtractError::TooSlow);
                }
                entries.extend(self.entry(candidate, now.as_ref())?);
            }
        }
        Ok(entries)
    }

    fn entry(&mut self, candidate: &Candidate, now: Option<&Seen>) -> Result<Option<Entry>, ExtractError> {
        let (before, after) = (candidate.before.as_ref(), candidate.after.as_ref());
        let mut base_changed = match (before, now) {
            (Some(was), Some(is)) => !was.still(is),
            (None, None) => false,
            (Some(_), None) | (None, Some(_)) => true,
        };
        let files = |seen: Option<&'_ Seen>| seen.is_some_and(|seen| seen.what == What::File);
        let both = before.filter(|_| files(before)).zip(after.filter(|_| files(after)));
        let same = match both {
            Some((was, is)) if !base_changed && self.is_only_masked(&candidate.path, was, is)? => {
                return Ok(None);
            }
            // The agent touched it at most: what it would have to be compared with is gone.
            Some((was, is)) if base_changed => same_times(was, is),
            Some((was, is)) => was.bytes == is.bytes && self.same_content(&candidate.path, was, is)?,
            None => false,
        };
        if same && before.map(|seen| seen.mode) == after.map(|seen| seen.mode) {
            return Ok(None);
        }
        let (new, mut verdict) = self.keep_new(&candidate.path, after)?;
        let in_git = !matches!(git_place(&candidate.path), GitPlace::Outside | GitPlace::Disguised);
        let old = match before.filter(|_| files(before)) {
            _ if same => new.clone(),
            // What stands in a `.git` is never rendered, and may hold what the cell was not shown.
            Some(_) if in_git => None,
            Some(seen) => {
                let old = match base_changed {
                    true => None,
                    false => self.keep_old(&candidate.path, seen, &mut base_changed)?,
                };
                if old.is_none() && base_changed { self.keep_known(&candidate.path, seen)? } else { old }
            }
            None => None,
        };
        let name = |kept: &Option<Kept>| kept.as_ref().map(|(id, _)| id.clone());
        let (before, after) = (before.map(|s| s.node(name(&old))), after.map(|s| s.node(name(&new))));
        let head = |kept: &'_ Option<Kept>| kept.as_ref().map_or_else(Vec::new, |(_, head)| head.clone());
        let flags = flags(&Facts {
            path: &candidate.path,
            before: before.as_ref(),
            after: after.as_ref(),
            before_head: &head(&old),
            head: &head(&new),
            large_bytes: self.from.limits.large_bytes,
        });
        verdict = verdict.max(self.from.changes.verdict(&flags));
        Ok(Some(Entry { path: candidate.path.clone(), before, after, base_changed, flags, verdict }))
    }

    /// Compares without keeping anything. A base that cannot be proven is not the same.
    fn same_content(&mut self, path: &TreePath, was: &Seen, is: &Seen) -> Result<bool, ExtractError> {
        let mut new = self.open(path, is)?;
        let mut old = self.original.open(path, was.bytes);
        let (mut one, mut other) = (vec![0; COMPARE_BYTES], vec![0; COMPARE_BYTES]);
        loop {
            if Instant::now() > self.until {
                return Err(ExtractError::TooSlow);
            }
            let got = fill(&mut new, &mut one).map_err(|source| read_error(path, source))?;
            let old_got = fill(&mut old, &mut other).unwrap_or(0);
            if one[..got] != other[..old_got] {
                return Ok(false);
            }
            if got == 0 {
                return Ok(old.proves(was));
            }
        }
    }

    /// Whether it is a repository's configuration as the cell was shown it, without its credentials.
    fn is_only_masked(&mut self, path: &TreePath, was: &Seen, is: &Seen) -> Result<bool, ExtractError> {
        let shown = path.name() == b"config" && git_place(path) == GitPlace::Runs;
        if !shown || was.bytes.max(is.bytes) > config::CONFIG_BYTES_MAX {
            return Ok(false);
        }
        let Some(old) = self.original.read_now(path, config::CONFIG_BYTES_MAX) else { return Ok(false) };
        let Ok(old) = String::from_utf8(old) else { return Ok(false) };
        let mut new = Vec::new();
        let read = self.open(path, is)?.take(config::CONFIG_BYTES_MAX).read_to_end(&mut new);
        read.map_err(|source| read_error(path, source))?;
        Ok(config::masked(&old).text.as_bytes() == new)
    }

    /// The new content; a file that is too long, or one too many, is refused.
    fn keep_new(
        &mut self,
        path: &TreePath,
        after: Option<&Seen>,
    ) -> Result<(Option<Kept>, Verdict), ExtractError> {
        let Some(seen) = after.filter(|seen| seen.what == What::File) else {
            return Ok((None, Verdict::Plain));
        };
        let bytes_max = self.bytes_left.min(self.from.limits.blob_bytes_max);
        if seen.bytes > bytes_max {
            self.left_out.push(path.to_string());
            return Ok((None, Verdict::Refused));
        }
        let mut file = self.open(path, seen)?;
        let kept = self.batch.put(&mut file, seen.bytes, HEAD_BYTES_MAX)?;
        still(&file, path, seen)?;
        match kept {
            Some((id, bytes, head)) if bytes == seen.bytes => {
                self.bytes_left -= bytes;
                Ok((Some((id, head)), Verdict::Plain))
            }
            Some(_) | None => {
                let what = "its length is another one than it says";
                Err(ExtractError::Corrupt { path: path.to_string(), what })
            }
        }
    }

    /// The old content, where it still is what the listing saw.
    fn keep_old(
        &mut self,
        path: &TreePath,
        seen: &Seen,
        base_changed: &mut bool,
    ) -> Result<Option<Kept>, ExtractError> {
        if !self.original.is_there() {
            *base_changed = true;
            return Ok(None);
        }
        if seen.bytes > self.bytes_left.min(self.from.limits.blob_bytes_max) {
            self.old_left_out += 1;
            return Ok(None);
        }
        let mut stream = self.original.open(path, seen.bytes);
        let kept = self.batch.put(&mut stream, seen.bytes, HEAD_BYTES_MAX)?;
        let proven = stream.proves(seen);
        match kept {
            Some((id, bytes, head)) if proven && bytes == seen.bytes => {
                self.bytes_left -= bytes;
                Ok(Some((id, head)))
            }
            Some(_) | None => {
                *base_changed = true;
                Ok(None)
            }
        }
    }

    /// Puts all contents on the shelf for good.
    pub(super) fn keep(&mut self) -> Result<(), ExtractError> {
        Ok(self.batch.keep()?)
    }

    /// The old content where the original has it no more: from the repository's objects.
    fn keep_known(&mut self, path: &TreePath, seen: &Seen) -> Result<Option<Kept>, ExtractError> {
        if seen.bytes > self.bytes_left.min(self.from.limits.blob_bytes_max) {
            return Ok(None);
        }
        let Some(content) = self.known.content(path, seen) else { return Ok(None) };
        let kept = self.batch.put(&mut &content[..], seen.bytes, HEAD_BYTES_MAX)?;
        Ok(kept.map(|(id, bytes, head)| {
            self.bytes_left -= bytes;
            (id, head)
        }))
    }

    /// Nothing more is read.
    pub(super) fn close(self) {
        self.known.close();
    }

    /// What was left out, in sentences.
    pub(super) fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if !self.left_out.is_empty() {
            let names = some_of(&self.left_out);
            notes.push(format!("these are too long to be kept, and refused: {names}"));
        }
        if self.old_left_out > 0 {
            notes.push(format!("{} old contents are too long to be kept", self.old_left_out));
        }
        if self.original.silent {
            notes.push(
                "the original did not answer, or could not be read: what it was is not known".to_owned(),
            );
        }
        notes
    }
}

fn fill(from: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match from.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(got) => filled += got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn read_error(path: &TreePath, source: io::Error) -> ExtractError {
    ExtractError::Io { doing: "read", path: path.to_string(), source }
}
