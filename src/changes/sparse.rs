//! Entries of a change set as trees of git: a stream for `git fast-import`, contents straight from the shelf. What a
//! tree of git cannot hold (empty directories, modes but the executable bit, devices, contents that were not kept) is
//! named, never made up.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use super::shelf::JobShelf;
use crate::change::{BlobId, Entry, Node, TreePath};
use crate::git::quote;

/// Most paths that a note names.
const NAMED_MAX: usize = 8;

/// What git can hold at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leaf<'a> {
    File { blob: &'a BlobId, executable: bool },
    Link(&'a [u8]),
}

/// One path, as git sees its change.
#[derive(Debug, Clone, Copy)]
pub(super) struct Change<'a> {
    pub(super) path: &'a TreePath,
    pub(super) before: Option<Leaf<'a>>,
    pub(super) after: Option<Leaf<'a>>,
}

/// What of a change set is told to git, and what cannot be.
#[derive(Debug, Default)]
pub(super) struct Sorted<'a> {
    pub(super) changes: Vec<Change<'a>>,
    /// Inside of `.git`: git shows it, but takes it from nobody.
    pub(super) git: Vec<Change<'a>>,
    /// Entries that are not in `changes` or `git`, nor said by them in other ways.
    pub(super) untold: Vec<&'a Entry>,
    /// What is not in `changes`, in sentences.
    pub(super) notes: Vec<String>,
}

/// What of `need`ed sides can be told. `before` is not needed to build a commit.
pub(super) fn sort<'a>(entries: &[&'a Entry], before_needed: bool) -> Sorted<'a> {
    let mut sorted = Sorted::default();
    let (mut dirs, mut modes, mut special, mut unknown) = (vec![], vec![], vec![], vec![]);
    for entry in entries {
        let (before, after) = (side(entry.before.as_ref()), side(entry.after.as_ref()));
        if let Side::Special = after {
            special.push(*entry);
            continue;
        }
        if matches!(after, Side::Unknown) || (before_needed && matches!(before, Side::Unknown)) {
            unknown.push(*entry);
            continue;
        }
        match (&entry.before, &entry.after) {
            (Some(Node::Dir { .. }), Some(Node::Dir { .. })) => modes.push(*entry),
            (before, Some(Node::Dir { .. })) => {
                if !anything_below(entries, &entry.path) {
                    dirs.push(*entry);
                }
                if before.is_none() {
                    continue;
                }
            }
            (Some(Node::File { mode: old, .. }), Some(Node::File { mode, .. }))
                if (old ^ mode) & !0o111 != 0 =>
            {
                modes.push(*entry);
            }
            _ => {}
        }
        let change = Change { path: &entry.path, before: before.leaf(), after: after.leaf() };
        if change.before.is_none() && change.after.is_none() {
            continue;
        }
        let list = if entry.path.parts().any(is_dot_git) { &mut sorted.git } else { &mut sorted.changes };
        list.push(change);
    }
    for (list, what) in [
        (&dirs, "empty directories, which git does not know"),
        (&modes, "permissions beyond the executable bit, which git does not know"),
        (&special, "devices, pipes or sockets"),
        (&unknown, "contents that were not kept, or were changed by somebody else meanwhile"),
    ] {
        if !list.is_empty() {
            sorted.notes.push(note(what, list.iter().map(|e| &e.path)));
        }
    }
    sorted.untold = [dirs, special, unknown].concat();
    sorted
}

/// Whether any of `entries`, which are in the order of their bytes, lies below `dir`.
fn anything_below(entries: &[&Entry], dir: &TreePath) -> bool {
    let begin = [dir.as_bytes(), b"/"].concat();
    let at = entries.partition_point(|entry| entry.path.as_bytes() < &begin[..]);
    entries.get(at).is_some_and(|entry| entry.path.as_bytes().starts_with(&begin))
}

/// `not in it, 2 of …: a, b`.
pub(super) fn note<'a>(what: &str, paths: impl Iterator<Item = &'a TreePath>) -> String {
    let paths: Vec<&TreePath> = paths.collect();
    let named: Vec<String> = paths.iter().take(NAMED_MAX).map(|path| shown(path)).collect();
    let more = if paths.len() > NAMED_MAX { ", …" } else { "" };
    format!("not in it: {what} ({}): {}{more}", paths.len(), named.join(", "))
}

/// A path as git shows it: in quotes where it has odd characters.
pub(super) fn shown(path: &TreePath) -> String {
    let odd = |byte: &u8| !matches!(byte, 0x20..=0x7e) || matches!(byte, b'"' | b'\\');
    if path.as_bytes().iter().any(odd) {
        return String::from_utf8_lossy(&quote(path.as_bytes())).into_owned();
    }
    path.to_string()
}

/// Whether git, on any system, takes a name for `.git`.
pub(super) fn is_dot_git(part: &[u8]) -> bool {
    part.eq_ignore_ascii_case(b".git")
}

enum Side<'a> {
    Nothing,
    Leaf(Leaf<'a>),
    Special,
    Unknown,
}

impl<'a> Side<'a> {
    fn leaf(&self) -> Option<Leaf<'a>> {
        match self {
            Self::Leaf(leaf) => Some(*leaf),
            Self::Nothing | Self::Special | Self::Unknown => None,
        }
    }
}

fn side(node: Option<&Node>) -> Side<'_> {
    match node {
        None | Some(Node::Dir { .. }) => Side::Nothing,
        Some(Node::File { mode, blob: Some(blob), .. }) => {
            Side::Leaf(Leaf::File { blob, executable: mode & 0o100 != 0 })
        }
        Some(Node::File { blob: None, .. }) => Side::Unknown,
        Some(Node::Symlink { target }) => Side::Leaf(Leaf::Link(&target.0)),
        Some(Node::Special { .. }) => Side::Special,
    }
}

/// One commit of the stream.
#[derive(Debug)]
pub(super) struct NewCommit<'a> {
    /// `refs/heads/…`.
    pub(super) name: &'a str,
    /// Its parent; none: it begins with an empty tree.
    pub(super) from: Option<&'a str>,
    /// `Name <address> seconds zone`.
    pub(super) ident: &'a str,
    pub(super) message: &'a str,
    /// Goes before each path: empty, or ends in a slash.
    pub(super) prefix: &'a [u8],
    pub(super) gone: Vec<&'a TreePath>,
    pub(super) there: Vec<(&'a TreePath, Leaf<'a>)>,
}

/// Writes the contents and the commits.
pub(super) fn write(out: &mut dyn Write, shelf: &JobShelf, commits: &[NewCommit<'_>]) -> io::Result<()> {
    let mut marks: BTreeMap<&BlobId, usize> = BTreeMap::new();
    for (_, leaf) in commits.iter().flat_map(|commit| &commit.there) {
        if let Leaf::File { blob, .. } = leaf {
            let next = marks.len() + 1;
            marks.entry(blob).or_insert(next);
        }
    }
    for (blob, mark) in &marks {
        let mut file = shelf.blob(blob).map_err(io::Error::other)?;
        let bytes = file.metadata()?.len();
        writeln!(out, "blob\nmark :{mark}\ndata {bytes}")?;
        // What grows or shrinks meanwhile must not be read as commands.
        let copied = io::copy(&mut Read::by_ref(&mut file).take(bytes), out)?;
        if copied != bytes {
            return Err(io::Error::other(format!("the content {blob} is shorter than it was")));
        }
        writeln!(out)?;
    }
    for commit in commits {
        writeln!(out, "commit {}\nauthor {1}\ncommitter {1}", commit.name, commit.ident)?;
        writeln!(out, "data {}\n{}", commit.message.len(), commit.message)?;
        if let Some(from) = commit.from {
            writeln!(out, "from {from}")?;
        }
        let path = |path: &TreePath| quote(&[commit.prefix, path.as_bytes()].concat());
        for gone in &commit.gone {
            out.write_all(&[&b"D "[..], &path(gone), b"\n"].concat())?;
        }
        for (at, leaf) in &commit.there {
            match leaf {
                Leaf::File { blob, executable } => {
                    let mode = if *executable { "100755" } else { "100644" };
                    write!(out, "M {mode} :{} ", marks.get(blob).copied().unwrap_or_default())?;
                    out.write_all(&[&path(at)[..], b"\n"].concat())?;
                }
                Leaf::Link(target) => {
                    out.write_all(&[&b"M 120000 inline "[..], &path(at), b"\n"].concat())?;
                    writeln!(out, "data {}", target.len())?;
                    out.write_all(&[target, &b"\n"[..]].concat())?;
                }
            }
        }
        writeln!(out)?;
    }
    writeln!(out, "done")
}
