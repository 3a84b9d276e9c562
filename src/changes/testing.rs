//! Change sets for tests: from two directories, the way an extraction would make them.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::shelf::{JobShelf, Shelf};
use crate::change::{Base, ChangeSet, Entry, Ignored, Node, Raw, Special, TreePath, VERSION, Verdict};
use crate::job::JobId;

/// A shelf, and the directory it lies in.
pub(crate) fn shelf() -> (tempfile::TempDir, JobShelf) {
    let dir = tempfile::tempdir().expect("tempdir");
    let shelf = Shelf::new(dir.path().join("changes")).of(&JobId::new(1, 1));
    shelf.create().expect("made");
    (dir, shelf)
}

/// A file with this content.
pub(crate) fn file(shelf: &JobShelf, content: &[u8], mode: u32) -> Node {
    let (blob, bytes, _) = shelf.put_blob(&mut &content[..], u64::MAX, 0).expect("kept").expect("short");
    Node::File { mode, bytes, blob: Some(blob) }
}

/// An entry that is plain.
pub(crate) fn entry(path: impl AsRef<[u8]>, before: Option<Node>, after: Option<Node>) -> Entry {
    let path = TreePath::new(path.as_ref()).expect("a path");
    Entry { path, before, after, base_changed: false, flags: Vec::new(), verdict: Verdict::Plain }
}

/// A change set of these, against `commit`.
pub(crate) fn set(mut entries: Vec<Entry>, commit: Option<&str>) -> ChangeSet {
    entries.sort_by(|a, b| a.path.as_bytes().cmp(b.path.as_bytes()));
    let base = Base { commit: commit.map(str::to_owned), ..Base::default() };
    let (git_state, ignored, commits, notes) = (Vec::new(), Ignored::default(), None, Vec::new());
    ChangeSet { version: VERSION, base, entries, git_state, ignored, commits, notes }
}

/// What is different between two directories; `.git` at their tops is left out.
pub(crate) fn between(shelf: &JobShelf, before: &Path, after: &Path) -> Vec<Entry> {
    let (before, after) = (tree(shelf, before), tree(shelf, after));
    let paths: std::collections::BTreeSet<&Vec<u8>> = before.keys().chain(after.keys()).collect();
    let get = |tree: &BTreeMap<Vec<u8>, Node>, path: &Vec<u8>| tree.get(path).cloned();
    let entries = paths.into_iter().map(|path| entry(path, get(&before, path), get(&after, path)));
    entries.filter(|entry| entry.before != entry.after).collect()
}

/// All that is in a directory.
pub(crate) fn tree(shelf: &JobShelf, top: &Path) -> BTreeMap<Vec<u8>, Node> {
    let mut all = BTreeMap::new();
    let mut todo = vec![top.to_owned()];
    while let Some(dir) = todo.pop() {
        for found in std::fs::read_dir(&dir).expect("listed") {
            let path = found.expect("entry").path();
            let name = path.strip_prefix(top).expect("below").as_os_str().as_bytes().to_vec();
            if name == b".git" {
                continue;
            }
            let meta = path.symlink_metadata().expect("looked at");
            let mode = meta.permissions().mode() & 0o7777;
            let node = if meta.is_dir() {
                todo.push(path);
                Node::Dir { mode }
            } else if meta.is_symlink() {
                Node::Symlink {
                    target: Raw(std::fs::read_link(&path).expect("link").as_os_str().as_bytes().into()),
                }
            } else if meta.is_file() {
                let mut content = Vec::new();
                std::fs::File::open(&path).and_then(|mut f| f.read_to_end(&mut content)).expect("read");
                file(shelf, &content, mode)
            } else {
                Node::Special { what: Special::Fifo }
            };
            all.insert(name, node);
        }
    }
    all
}
