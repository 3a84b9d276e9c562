//! What has to be done to one path, given what the change set says and what is there now. Reads with the submitter's
//! rights and writes nothing. It must never let pass what is neither the state before nor the state after.

use std::cell::OnceCell;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::look::{Now, Root, What, openat2};
use super::merge::{MERGE_BYTES_MAX, merge};
use crate::change::{BlobId, Entry, Node, Raw, TreePath};

const EXECUTABLE: u32 = 0o100;
const MOVED: &str = "the original was changed while the job ran: look at both (--3way merges texts)";
const UNKNOWN: &str = "the original was changed while the job ran, and what it was before is not known (git did not track it as it was): nothing can be merged; look at both";

/// A new content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Content {
    Blob { id: BlobId, bytes: u64 },
    Text(Vec<u8>),
}

/// A node to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum New {
    File { content: Content, mode: u32 },
    Link(Raw),
    Dir { mode: u32 },
}

/// What has to be done to a path.
#[derive(Debug, Clone)]
pub(super) enum Act {
    /// Nothing: it is as it shall be.
    Keep,
    /// Nothing: a directory that shall go holds other things.
    Stay,
    /// Nothing: left out, or a conflict; told already.
    Closed,
    /// It goes.
    Gone(Now),
    /// Something new comes, in the place of what is there.
    Put { new: New, now: Option<Now>, merged: bool },
    /// It gets another mode.
    Mode { now: Now, to: u32 },
}

/// Looks and judges.
pub(super) struct Judge<'a> {
    pub(super) root: &'a Root,
    pub(super) blobs: &'a OwnedFd,
    pub(super) three_way: bool,
}

impl Judge<'_> {
    /// What has to be done for `entry`; in words, why nothing can be. `nothing`: nothing can be there, since what is
    /// above it is no directory.
    pub(super) fn act(&self, entry: &Entry, nothing: bool) -> Result<Act, String> {
        let now = if nothing { None } else { self.root.look(&entry.path).map_err(unreachable)? };
        let seen = Seen { judge: self, path: &entry.path, now: now.as_ref(), content: OnceCell::new() };
        match (&entry.after, &now) {
            (None, None) => Ok(Act::Keep),
            (None, Some(there)) => {
                self.unchanged(entry, &seen)?;
                Ok(Act::Gone(there.clone()))
            }
            (Some(after), Some(there)) if seen.is(after)? => self.modes(entry, after, there),
            (Some(after), _) => self.put(entry, after, &seen),
        }
    }

    fn put(&self, entry: &Entry, after: &Node, seen: &Seen<'_>) -> Result<Act, String> {
        let now = seen.now.cloned();
        let refused = self.unchanged(entry, seen).err();
        let merged = match &refused {
            Some(why) if self.three_way => match self.merged(entry, after, seen, why)? {
                Some(text) => Some(text),
                None => return Ok(Act::Keep),
            },
            Some(why) => return Err(why.clone()),
            None => None,
        };
        let new = match after {
            Node::File { mode, bytes, blob: Some(id) } => {
                let there = now.as_ref().filter(|now| now.what == What::File).map(|now| now.mode);
                let mode = carried(mode_of(entry.before.as_ref()), *mode, there.unwrap_or(*mode)) & 0o777;
                let blob = Content::Blob { id: id.clone(), bytes: *bytes };
                New::File { content: merged.clone().map_or(blob, Content::Text), mode }
            }
            Node::File { blob: None, .. } | Node::Special { .. } => {
                return Err("its content was not kept".to_owned());
            }
            Node::Symlink { target } => New::Link(target.clone()),
            Node::Dir { mode } => New::Dir { mode: *mode },
        };
        Ok(Act::Put { new, now, merged: merged.is_some() })
    }

    /// Whether what is there is what the job began with.
    fn unchanged(&self, entry: &Entry, seen: &Seen<'_>) -> Result<(), String> {
        if entry.base_changed {
            let lost = entry.before.as_ref().is_some_and(Node::is_lost);
            return Err(if lost { UNKNOWN } else { MOVED }.to_owned());
        }
        match (&entry.before, seen.now) {
            (None, None) => Ok(()),
            (None, Some(now)) => Err(format!("{} is there already, and is something else", kind(&now.what))),
            (Some(_), None) => Err("it was deleted since the job began".to_owned()),
            (Some(before), Some(now)) => {
                if !seen.is(before)? {
                    return Err(format!("{} there was changed since the job began", kind(&now.what)));
                }
                let executable = |mode: u32| mode & EXECUTABLE != 0;
                match before {
                    Node::File { mode, .. } if executable(*mode) != executable(now.mode) => {
                        Err("its executable bit was changed since the job began".to_owned())
                    }
                    _ => Ok(()),
                }
            }
        }
    }

    /// The content is there already: what is left is its mode.
    fn modes(&self, entry: &Entry, after: &Node, now: &Now) -> Result<Act, String> {
        let executable = |mode: u32| mode & EXECUTABLE != 0;
        let to = match (entry.before.as_ref(), after) {
            (Some(Node::File { mode: before, .. }), Node::File { mode: after, .. }) => {
                let to = carried(Some(*before), *after, now.mode);
                if executable(to) != executable(*after) && !self.three_way {
                    return Err("its executable bit was changed since the job began".to_owned());
                }
                to & 0o777
            }
            (_, Node::File { mode: after, .. }) => {
                if executable(*after) != executable(now.mode) {
                    return Err("the same file is there already, with another executable bit".to_owned());
                }
                now.mode
            }
            (Some(Node::Dir { mode: before }), Node::Dir { mode: after }) => {
                carried(Some(*before), *after, now.mode)
            }
            _ => now.mode,
        };
        if to == now.mode {
            return Ok(Act::Keep);
        }
        match after {
            // Its other names, perhaps outside, keep what they have.
            Node::File { bytes, blob: Some(id), .. } if now.shared => {
                let content = Content::Blob { id: id.clone(), bytes: *bytes };
                Ok(Act::Put { new: New::File { content, mode: to }, now: Some(now.clone()), merged: false })
            }
            _ => Ok(Act::Mode { now: now.clone(), to }),
        }
    }

    /// Both sides' changes in one text; none where that is there already.
    fn merged(
        &self,
        entry: &Entry,
        after: &Node,
        seen: &Seen<'_>,
        why: &str,
    ) -> Result<Option<Vec<u8>>, String> {
        let (Some(Node::File { blob: Some(before), .. }), Node::File { blob: Some(after), .. }, Some(now)) =
            (&entry.before, after, seen.now)
        else {
            return Err(why.to_owned());
        };
        if now.what != What::File || now.print.bytes > MERGE_BYTES_MAX {
            return Err(why.to_owned());
        }
        let ours = self.root.read(&entry.path, &now.print).and_then(all);
        let ours = ours.map_err(|error| format!("it cannot be read: {error}"))?;
        let blob = |id: &BlobId| open_blob(self.blobs, id).map_err(std::io::Error::from).and_then(all);
        let texts = blob(before).and_then(|before| blob(after).map(|after| (before, after)));
        let (before, after) = texts.map_err(|error| format!("a kept content cannot be read: {error}"))?;
        let text =
            merge(&before, &ours, &after).map_err(|error| format!("{why}, and cannot be merged: {error}"))?;
        Ok((text != ours).then_some(text))
    }
}

/// What is at a path, and its content where somebody asks for it.
struct Seen<'a> {
    judge: &'a Judge<'a>,
    path: &'a TreePath,
    now: Option<&'a Now>,
    content: OnceCell<BlobId>,
}

impl Seen<'_> {
    /// Whether `node` is there, its mode aside.
    fn is(&self, node: &Node) -> Result<bool, String> {
        let Some(now) = self.now else { return Ok(false) };
        Ok(match (node, &now.what) {
            (Node::File { bytes, .. }, What::File) if *bytes != now.print.bytes => false,
            (Node::File { blob: Some(id), .. }, What::File) => self.content(now)? == id,
            (Node::File { blob: None, .. }, What::File) => {
                return Err("what it was is not known: its content was not kept".to_owned());
            }
            (Node::Symlink { target }, What::Link(there)) => target == there,
            (Node::Dir { .. }, What::Dir) => true,
            (Node::Special { what }, What::Special(there)) => what == there,
            (Node::File { .. } | Node::Symlink { .. } | Node::Dir { .. } | Node::Special { .. }, _) => false,
        })
    }

    fn content(&self, now: &Now) -> Result<&BlobId, String> {
        if self.content.get().is_none() {
            let id = self.judge.root.content(self.path, &now.print);
            let id = id.map_err(|error| format!("it cannot be read: {error}"))?;
            return Ok(self.content.get_or_init(|| id));
        }
        self.content.get().ok_or_else(|| "it cannot be read".to_owned())
    }
}

/// The mode that is there with the bits that the change set changed; all of them where nothing was before.
fn carried(before: Option<u32>, after: u32, there: u32) -> u32 {
    let changed = before.map_or(0o7777, |before| before ^ after);
    (there & !changed) | (after & changed)
}

fn mode_of(node: Option<&Node>) -> Option<u32> {
    match node {
        Some(Node::File { mode, .. }) => Some(*mode),
        Some(Node::Symlink { .. } | Node::Dir { .. } | Node::Special { .. }) | None => None,
    }
}

pub(super) fn open_blob(blobs: &OwnedFd, id: &BlobId) -> rustix::io::Result<std::fs::File> {
    openat2(blobs, Path::new(id.as_str()), OFlags::RDONLY).map(std::fs::File::from)
}

fn all(file: std::fs::File) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(MERGE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MERGE_BYTES_MAX {
        return Err(std::io::Error::other(format!("longer than {MERGE_BYTES_MAX} bytes: too long to merge")));
    }
    Ok(bytes)
}

fn kind(what: &What) -> &'static str {
    match what {
        What::File => "the file",
        What::Link(_) => "the symbolic link",
        What::Dir => "the directory",
        What::Special(_) => "the special file",
    }
}

/// Why a path cannot be looked at, in words.
pub(super) fn unreachable(errno: Errno) -> String {
    match errno {
        Errno::LOOP => "the way there leads through a symbolic link".to_owned(),
        Errno::XDEV => "it lies on another mount, or the way there leads out".to_owned(),
        Errno::ACCESS | Errno::PERM => "you may not look there: change the permissions".to_owned(),
        other => format!("it cannot be looked at: {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_with_another_umask_gets_what_was_changed_and_nothing_else() {
        assert_eq!(carried(Some(0o644), 0o755, 0o664), 0o775);
        assert_eq!(carried(Some(0o644), 0o644, 0o600), 0o600);
        assert_eq!(carried(Some(0o644), 0o600, 0o644), 0o600);
        assert_eq!(carried(None, 0o640, 0o777), 0o640);
    }
}
