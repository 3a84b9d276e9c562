//! Contents that a workspace had before its job and has no more, where git still has them: a file that was, when it
//! was listed, just as the index says that git saw it (length, times, inode), has the content that the index names. It
//! is read from the repository's objects by a git of ours, as the submitter. It must never give a content for a file
//! that the index does not vouch for: written in the same moment as the index, changed since, or of another length.
//! (A filter that keeps the length, such as a letter's swap, would deceive it.)

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use super::super::commits::Lender;
use super::super::listing::Seen;
use crate::change::TreePath;
use crate::git::index::{Tracked, tracked};
use crate::git::{Bounds, Git};
use crate::job::Identity;

/// Most contents that are looked for, and the longest of them, in bytes: what is merged is text.
const CONTENTS_MAX: usize = 1000;
const CONTENT_BYTES_MAX: u64 = 16 << 20;
const EXECUTABLE: u32 = 0o100;
const KIND: u32 = 0o170_000;
const REGULAR: u32 = 0o100_000;
/// Longest time for one content.
const READ_TIME_MAX: Duration = Duration::from_secs(30);

/// Where they can be had.
#[derive(Debug, Clone, Copy)]
pub struct Bases<'a> {
    /// Git's index of the workspace, read before it was listed.
    pub index: &'a [u8],
    /// When that was written, in nanoseconds since 1970.
    pub written_ns: i64,
    /// The workspace: in a work tree of the repository.
    pub path: &'a Path,
    /// Where the temporary repository is made.
    pub temporary: &'a Path,
}

/// What git knows; looked at when the first content is wanted.
pub(super) struct Known<'a> {
    from: Option<&'a Bases<'a>>,
    identity: &'a Identity,
    opened: Option<Opened>,
    left: usize,
}

struct Opened {
    git: Git,
    prefix: Vec<u8>,
    tracked: HashMap<Vec<u8>, Tracked>,
}

impl<'a> Known<'a> {
    pub(super) fn new(from: Option<&'a Bases<'a>>, identity: &'a Identity) -> Self {
        Self { from, identity, opened: None, left: CONTENTS_MAX }
    }

    /// The content of the file at `path`, which was `was`.
    pub(super) fn content(&mut self, path: &TreePath, was: &Seen) -> Option<Vec<u8>> {
        let from = self.from?;
        self.left = self.left.checked_sub(1)?;
        if self.opened.is_none() {
            self.opened = open(from, self.identity)
                .inspect_err(|why| {
                    tracing::info!(path = %from.path.display(), why, "git cannot be asked what files were");
                })
                .ok();
            if self.opened.is_none() {
                // Not asked again.
                self.from = None;
            }
        }
        let opened = self.opened.as_ref()?;
        let file = opened.tracked.get(&[&opened.prefix[..], path.as_bytes()].concat())?;
        if was.bytes > CONTENT_BYTES_MAX || !vouches(file, was, from.written_ns) {
            return None;
        }
        let bounds = Bounds { wall: READ_TIME_MAX, output_bytes_max: CONTENT_BYTES_MAX, ..Bounds::default() };
        let content = opened.git.text(&["cat-file", "blob", &file.id], None, &bounds);
        let content = content.inspect_err(|error| tracing::info!(%path, %error, "git does not have it"));
        content.ok().filter(|content| content.len() as u64 == was.bytes)
    }

    /// Removes what was made.
    pub(super) fn close(self) {
        if let Some(Err(error)) = self.opened.map(|opened| opened.git.destroy()) {
            tracing::warn!(%error, "a temporary repository is left until the daemon starts next");
        }
    }
}

fn open(from: &Bases<'_>, identity: &Identity) -> Result<Opened, String> {
    let lender = Lender::find(from.path, identity).map_err(|error| error.to_string())?;
    let tracked = tracked(from.index, lender.format)?;
    let git = lender.git(from.temporary, identity).map_err(|error| error.to_string())?;
    let prefix = match lender.repository.prefix.as_slice() {
        b"" => Vec::new(),
        prefix => [prefix, b"/"].concat(),
    };
    Ok(Opened { git, prefix, tracked })
}

/// Whether the file that was `was` has the content that the index names. What was written in the moment in which the
/// index was, may have been written after it.
fn vouches(file: &Tracked, was: &Seen, index_written_ns: i64) -> bool {
    file.mode & KIND == REGULAR
        && (file.mode & EXECUTABLE == 0) == (was.mode & EXECUTABLE == 0)
        && u64::from(file.bytes) == was.bytes
        && (file.mtime_ns, file.ctime_ns) == (was.mtime_ns, was.ctime_ns)
        && file.ino == was.ino as u32
        && was.mtime_ns < index_written_ns
}

#[cfg(test)]
mod tests {
    use super::super::super::listing::What;
    use super::*;

    #[test]
    fn the_index_vouches_only_for_what_it_saw_itself_and_not_in_the_same_moment() {
        let was =
            Seen { what: What::File, mode: 0o644, bytes: 3, mtime_ns: 50, ctime_ns: 60, ino: (1 << 32) + 7 };
        let file =
            Tracked { id: String::new(), mode: 0o100_644, bytes: 3, mtime_ns: 50, ctime_ns: 60, ino: 7 };
        assert!(vouches(&file, &was, 51));
        assert!(!vouches(&file, &was, 50), "perhaps written after the index");
        for other in [
            Tracked { mode: 0o100_755, ..file.clone() },
            Tracked { mode: 0o120_000, ..file.clone() },
            Tracked { bytes: 0, ..file.clone() },
            Tracked { mtime_ns: 49, ..file.clone() },
            Tracked { ctime_ns: 61, ..file.clone() },
            Tracked { ino: 8, ..file.clone() },
        ] {
            assert!(!vouches(&other, &was, 51), "{other:?}");
        }
    }
}
