//! Random trees and edits for property tests, on the disk and as values, and the plainest difference between two.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use crate::change::{Base, ChangeSet, Entry, Ignored, Node, Raw, TreePath, VERSION, Verdict};
use crate::changes::{JobShelf, Shelf};
use crate::job::{Identity, JobId};

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Thing {
    File { mode: u32, content: Vec<u8> },
    Link(Vec<u8>),
    Dir { mode: u32 },
}

/// A tree, by path.
pub(crate) type Tree = BTreeMap<TreePath, Thing>;

const NAMES: [&[u8]; 12] = [
    b"a",
    b"b",
    b"A",
    b"dir",
    "\u{fc}n\u{ef}".as_bytes(),
    b"line\nfeed",
    b"\xff\xfe",
    b"-rf",
    b" sp",
    b".hidden",
    b"a-b",
    b"a.rs",
];
const FILE_MODES: [u32; 6] = [0o644, 0o755, 0o600, 0o664, 0o444, 0o500];
const DIR_MODES: [u32; 4] = [0o755, 0o700, 0o775, 0o555];
const DEPTH_MAX: usize = 5;

/// One edit, to be understood against the tree that it meets: every value is some edit of every tree.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Edit {
    kind: u8,
    at: u16,
    name: u8,
    value: u8,
}

/// Random edits; also, from nothing, random trees.
pub(crate) fn edits(most: usize) -> impl Strategy<Value = Vec<Edit>> {
    let one = (0..10u8, any::<u16>(), 0..NAMES.len() as u8, any::<u8>());
    prop::collection::vec(one.prop_map(|(kind, at, name, value)| Edit { kind, at, name, value }), 0..most)
}

/// The tree after `edits`.
pub(crate) fn edited(mut tree: Tree, edits: &[Edit]) -> Tree {
    for edit in edits {
        one(&mut tree, *edit);
    }
    tree
}

fn content(value: u8) -> Vec<u8> {
    match value % 4 {
        0 => Vec::new(),
        1 => format!("line {value}\nand another\n").into_bytes(),
        2 => vec![0, value, 0xff, b'\n', value],
        _ => vec![value; 5000 + usize::from(value)],
    }
}

fn one(tree: &mut Tree, edit: Edit) {
    let pick = |wanted: fn(&Thing) -> bool, tree: &Tree| {
        let all: Vec<TreePath> = tree.iter().filter(|(_, t)| wanted(t)).map(|(p, _)| p.clone()).collect();
        (!all.is_empty()).then(|| all[usize::from(edit.at) % all.len()].clone())
    };
    let is_dir = |thing: &Thing| matches!(thing, Thing::Dir { .. });
    let name = NAMES[usize::from(edit.name)];
    // Somewhere for something new: the top, or a directory.
    let holder = if edit.at.is_multiple_of(3) { None } else { pick(is_dir, tree) };
    let new = holder.map_or_else(|| TreePath::new(name).ok(), |dir| dir.join(name).ok());
    let new = new.filter(|path| path.parts().count() <= DEPTH_MAX);
    let file = || Thing::File { mode: FILE_MODES[usize::from(edit.value) % 6], content: content(edit.value) };
    let dir = || Thing::Dir { mode: DIR_MODES[usize::from(edit.value) % 4] };
    let free = |tree: &Tree| new.clone().filter(|path| !tree.contains_key(path));
    match edit.kind {
        0 | 1 => drop(free(tree).map(|path| tree.insert(path, file()))),
        2 => drop(free(tree).map(|path| tree.insert(path, dir()))),
        3 => {
            let target =
                if edit.value.is_multiple_of(2) { b"a/../b\xff".to_vec() } else { b"/etc/shadow".to_vec() };
            drop(free(tree).map(|path| tree.insert(path, Thing::Link(target))));
        }
        4 => drop(pick(|_| true, tree).map(|path| cut(tree, &path))),
        5 => {
            if let (Some(from), Some(to)) = (pick(|_| true, tree), free(tree))
                && !to.is_at_or_below(&from)
            {
                for (path, thing) in cut(tree, &from) {
                    let rest = &path.as_bytes()[from.as_bytes().len()..];
                    let moved = TreePath::new([to.as_bytes(), rest].concat()).expect("a path");
                    tree.insert(moved, thing);
                }
            }
        }
        6 => {
            match pick(|thing| !matches!(thing, Thing::Link(_)), tree).and_then(|path| tree.get_mut(&path)) {
                Some(Thing::File { mode, .. }) => *mode = FILE_MODES[usize::from(edit.value) % 6],
                Some(Thing::Dir { mode }) => *mode = DIR_MODES[usize::from(edit.value) % 4],
                Some(Thing::Link(_)) | None => {}
            }
        }
        7 => {
            let found = pick(|thing| matches!(thing, Thing::File { .. }), tree);
            if let Some(Thing::File { content: text, .. }) = found.and_then(|path| tree.get_mut(&path)) {
                *text = content(edit.value);
            }
        }
        // A directory becomes a file or a link; a file or a link becomes a directory with something in it.
        8 => {
            if let Some(path) = pick(is_dir, tree) {
                cut(tree, &path);
                tree.insert(
                    path,
                    if edit.value.is_multiple_of(2) { file() } else { Thing::Link(b"x".to_vec()) },
                );
            }
        }
        _ => {
            let found = pick(|thing| !matches!(thing, Thing::Dir { .. }), tree);
            if let Some(path) = found.filter(|path| path.parts().count() < DEPTH_MAX) {
                tree.insert(path.join(name).expect("a path"), file());
                tree.insert(path, dir());
            }
        }
    }
}

fn cut(tree: &mut Tree, path: &TreePath) -> Tree {
    let below: Vec<TreePath> = tree.keys().filter(|p| p.is_at_or_below(path)).cloned().collect();
    below.into_iter().filter_map(|path| tree.remove_entry(&path)).collect()
}

/// Somebody who is not root, where the tests run as root.
pub(crate) fn somebody() -> Identity {
    if rustix::process::geteuid().is_root() {
        Identity { uid: 4242, gid: 4343, groups: vec![4444] }
    } else {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Identity { uid, gid, groups: Vec::new() }
    }
}

/// A directory for a test, that everybody may enter; in memory where there is one: nothing is flushed to a disk.
pub(crate) fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    let dir = dir.expect("a directory");
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).expect("open for all");
    dir
}

/// A place for a change set.
pub(crate) fn shelf_in(dir: &Path) -> JobShelf {
    let shelf = Shelf::new(dir.join("changes")).of(&JobId::new(1, 1));
    shelf.create().expect("made");
    shelf
}

/// Makes `dir` with `tree` in it, all of it `who`'s.
pub(crate) fn write(tree: &Tree, dir: &Path, who: &Identity) {
    std::fs::create_dir(dir).expect("made");
    let own = |path: &Path| lchown(path, Some(who.uid), Some(who.gid)).expect("given away");
    own(dir);
    for (path, thing) in tree {
        let path = dir.join(path.as_path());
        match thing {
            Thing::File { content, .. } => std::fs::write(&path, content).expect("written"),
            Thing::Link(target) => symlink(OsStr::from_bytes(target), &path).expect("linked"),
            Thing::Dir { .. } => std::fs::create_dir(&path).expect("made"),
        }
        own(&path);
    }
    for (path, thing) in tree.iter().rev() {
        if let Thing::File { mode, .. } | Thing::Dir { mode } = thing {
            let mode = std::fs::Permissions::from_mode(*mode);
            std::fs::set_permissions(dir.join(path.as_path()), mode).expect("mode set");
        }
    }
}

/// What is in `dir`, specials left out. Panics where anything is not `who`'s.
pub(crate) fn read(dir: &Path, who: &Identity) -> Tree {
    let (mut tree, mut todo) = (Tree::new(), vec![PathBuf::new()]);
    while let Some(below) = todo.pop() {
        for entry in std::fs::read_dir(dir.join(&below)).expect("listed") {
            let entry = entry.expect("listed");
            let path = below.join(entry.file_name());
            let meta = entry.metadata().expect("looked at");
            assert_eq!(meta.uid(), who.uid, "{path:?} is another's");
            let mode = meta.mode() & 0o7777;
            let thing = if meta.is_dir() {
                todo.push(path.clone());
                Thing::Dir { mode }
            } else if meta.is_symlink() {
                let target = std::fs::read_link(entry.path()).expect("read");
                Thing::Link(target.into_os_string().as_bytes().to_vec())
            } else if meta.is_file() {
                Thing::File { mode, content: std::fs::read(entry.path()).expect("read") }
            } else {
                continue;
            };
            tree.insert(TreePath::new(path.as_os_str().as_bytes()).expect("a path"), thing);
        }
    }
    tree
}

/// The change set between two trees, with its contents on `shelf`.
pub(crate) fn difference(before: &Tree, after: &Tree, shelf: &JobShelf) -> ChangeSet {
    let node = |thing: &Thing| match thing {
        Thing::File { mode, content } => {
            let kept = shelf.put_blob(&mut &content[..], u64::MAX, 0).expect("kept").expect("short enough");
            Node::File { mode: *mode, bytes: kept.1, blob: Some(kept.0) }
        }
        Thing::Link(target) => Node::Symlink { target: Raw(target.clone()) },
        Thing::Dir { mode } => Node::Dir { mode: *mode },
    };
    let mut paths: Vec<&TreePath> = before.keys().chain(after.keys()).collect();
    paths.sort();
    paths.dedup();
    let changed = paths.into_iter().filter(|path| before.get(path) != after.get(path));
    let entries = changed.map(|path| Entry {
        path: path.clone(),
        before: before.get(path).map(node),
        after: after.get(path).map(node),
        base_changed: false,
        flags: Vec::new(),
        verdict: Verdict::Plain,
    });
    let (base, ignored) = (Base::default(), Ignored::default());
    let (git_state, notes) = (Vec::new(), Vec::new());
    ChangeSet { version: VERSION, base, entries: entries.collect(), git_state, ignored, commits: None, notes }
}
