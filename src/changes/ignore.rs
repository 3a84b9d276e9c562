//! What git is told to ignore: `.gitignore` files of a tree and `.git/info/exclude`, as git reads them. The files may
//! be an agent's: their number, length and patterns are bounded, and what does not parse ignores nothing.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use ignore::Match;
use ignore::gitignore::{Gitignore, GitignoreBuilder};

use crate::change::TreePath;

/// Longest file of patterns, in bytes.
pub(super) const FILE_BYTES_MAX: u64 = 1 << 20;
/// Most lines of one file.
const LINES_MAX: usize = 10_000;
/// Longest pattern, in bytes, and most stars in it: what compiles to a large automaton is no name.
const LINE_BYTES_MAX: usize = 1024;
const STARS_MAX: usize = 16;
/// Most files of one tree.
const FILES_MAX: usize = 10_000;

/// The rules of one tree, read as they are needed.
pub(super) struct Rules {
    exclude: Gitignore,
    /// Where the tree lies in that of its repository: nothing, or `a/b/`.
    below: Vec<u8>,
    /// The files of directories above the tree, the nearest first, each with where the tree lies below it (`b/`).
    above: Vec<(Vec<u8>, Gitignore)>,
    /// By directory; the top has the empty name.
    files: HashMap<Vec<u8>, Gitignore>,
    /// What was found of directories.
    dirs: HashMap<Vec<u8>, bool>,
}

/// What a repository says of a part of its work tree, from above that.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outer {
    /// Where the part lies: `a/b`.
    pub below: String,
    /// `.git/info/exclude`.
    pub exclude: Option<Vec<u8>>,
    /// The `.gitignore` of the top, of `a`, and so on to the directory that holds the part.
    pub files: Vec<Option<Vec<u8>>>,
}

/// Reads the `.gitignore` of a directory (none: the top).
pub(super) type Load<'a> = &'a mut dyn FnMut(&TreePath) -> Option<Vec<u8>>;

impl Rules {
    /// `exclude` is the content of `.git/info/exclude`.
    pub(super) fn new(exclude: Option<&[u8]>) -> Self {
        let exclude = exclude.map_or_else(Gitignore::empty, parse);
        let (below, above) = (Vec::new(), Vec::new());
        Self { exclude, below, above, files: HashMap::new(), dirs: HashMap::new() }
    }

    /// The rules of a tree that is a part of a repository's.
    pub(super) fn of_part(outer: &Outer) -> Self {
        let mut rules = Self::new(outer.exclude.as_deref());
        rules.below = [outer.below.as_bytes(), b"/"].concat();
        let mut at = 0;
        for text in &outer.files {
            rules.above.insert(
                0,
                (rules.below[at..].to_vec(), text.as_deref().map_or_else(Gitignore::empty, parse)),
            );
            let rest = &rules.below[at..];
            at += rest.iter().position(|byte| *byte == b'/').map_or(rest.len(), |slash| slash + 1);
        }
        rules
    }

    /// The topmost path at or above `path` that is ignored, as its length in bytes: then everything below it is.
    pub(super) fn ignored(&mut self, path: &TreePath, is_dir: bool, load: Load<'_>) -> Option<usize> {
        let bytes = path.as_bytes();
        for (at, _) in bytes.iter().enumerate().filter(|(_, byte)| **byte == b'/') {
            if self.dir(&bytes[..at], load) {
                return Some(at);
            }
        }
        let here = if is_dir { self.dir(bytes, load) } else { self.decide(bytes, false, load) };
        here.then_some(bytes.len())
    }

    fn dir(&mut self, dir: &[u8], load: Load<'_>) -> bool {
        if let Some(known) = self.dirs.get(dir) {
            return *known;
        }
        let ignored = self.decide(dir, true, load);
        self.dirs.insert(dir.to_vec(), ignored);
        ignored
    }

    /// The nearest file that has a word on it decides.
    fn decide(&mut self, path: &[u8], is_dir: bool, load: Load<'_>) -> bool {
        let mut end = path.len();
        loop {
            let dir = path[..end].iter().rposition(|byte| *byte == b'/').unwrap_or(0);
            let below = if dir == 0 { path } else { &path[dir + 1..] };
            match self.file(&path[..dir], load).matched(OsStr::from_bytes(below), is_dir) {
                Match::Ignore(_) => return true,
                Match::Whitelist(_) => return false,
                Match::None if dir == 0 => break,
                Match::None => end = dir,
            }
        }
        for (below, file) in &self.above {
            match file.matched(OsStr::from_bytes(&[below, path].concat()), is_dir) {
                Match::Ignore(_) => return true,
                Match::Whitelist(_) => return false,
                Match::None => {}
            }
        }
        self.exclude.matched(OsStr::from_bytes(&[&self.below, path].concat()), is_dir).is_ignore()
    }

    fn file(&mut self, dir: &[u8], load: Load<'_>) -> &Gitignore {
        if !self.files.contains_key(dir) {
            let name = if dir.is_empty() { b".gitignore".to_vec() } else { [dir, b"/.gitignore"].concat() };
            let text = TreePath::new(name)
                .ok()
                .filter(|_| self.files.len() < FILES_MAX)
                .and_then(|path| load(&path));
            let rules = text.map_or_else(Gitignore::empty, |text| parse(&text));
            self.files.insert(dir.to_vec(), rules);
        }
        // Inserted above.
        self.files.get(dir).unwrap_or(&self.exclude)
    }
}

fn parse(text: &[u8]) -> Gitignore {
    let mut builder = GitignoreBuilder::new("");
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    for line in text.split(|byte| *byte == b'\n').take(LINES_MAX) {
        let Ok(line) = std::str::from_utf8(line) else { continue };
        let line = line.strip_suffix('\r').unwrap_or(line);
        if line.len() <= LINE_BYTES_MAX && line.matches('*').count() <= STARS_MAX {
            // To git braces are letters.
            let line = line.replace('{', "\\{").replace('}', "\\}");
            // A line that does not parse matches nothing, as in git.
            let _ = builder.add_line(None, &line);
        }
    }
    builder.build().unwrap_or_else(|_| Gitignore::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_tree_obeys_what_lies_above_it_the_nearest_first() {
        let text = |text: &str| Some(text.as_bytes().to_vec());
        let outer = Outer {
            below: "a/b".to_owned(),
            exclude: text("*.excluded\n/a/b/own\n"),
            files: vec![text("target/\n*.log\n/a/b/top\n/here\nb/\n"), text("!keep.log\n/b/near\n")],
        };
        let mut load = |at: &TreePath| (at.as_bytes() == b".gitignore").then(|| b"!in.log\n".to_vec());
        let mut rules = Rules::of_part(&outer);
        let mut ignored = |path: &str, is_dir| {
            let path = TreePath::new(path).expect("a path");
            rules.ignored(&path, is_dir, &mut load)
        };
        for (path, is_dir, top) in [
            ("target/debug/x", false, Some(6)),
            ("target", false, None),
            ("x.log", false, Some(5)),
            ("keep.log", false, None),
            ("in.log", false, None),
            ("top", false, Some(3)),
            ("near", false, Some(4)),
            ("here", false, None),
            ("own", false, Some(3)),
            ("deep/x.excluded", false, Some(15)),
            ("plain", false, None),
        ] {
            assert_eq!(ignored(path, is_dir), top, "{path}");
        }
    }

    fn ignored(files: &[(&str, &str)], exclude: &str, path: &str, is_dir: bool) -> Option<usize> {
        let mut load = |at: &TreePath| {
            let file = files.iter().find(|(name, _)| name.as_bytes() == at.as_bytes());
            file.map(|(_, text)| text.as_bytes().to_vec())
        };
        let path = TreePath::new(path).expect("a path");
        Rules::new(Some(exclude.as_bytes())).ignored(&path, is_dir, &mut load)
    }

    #[test]
    fn the_nearest_file_decides_and_nothing_below_an_ignored_directory_comes_back() {
        let files = [
            (".gitignore", "*.log\n/build/\n!keep.log\nq{x}\n"),
            ("a/.gitignore", "!x.log\nown\n!build/in\n"),
        ];
        for (path, is_dir, expected) in [
            ("x.log", false, Some(5)),
            ("keep.log", false, None),
            ("b/x.log", false, Some(7)),
            ("a/x.log", false, None),
            ("a/b/x.log", false, None),
            ("a/own", true, Some(5)),
            ("a/own/deep/file", false, Some(5)),
            ("own", true, None),
            ("build", true, Some(5)),
            ("build", false, None),
            ("build/in/x", false, Some(5)),
            ("a/build", true, None),
            ("q{x}", false, Some(4)),
            ("qx", false, None),
            ("secret", false, Some(6)),
            ("d/secret", false, Some(8)),
        ] {
            assert_eq!(ignored(&files, "secret\n", path, is_dir), expected, "{path}");
        }
    }

    #[test]
    fn hostile_patterns_are_left_out() {
        let bomb = format!("{}\n{}\nfine\n", "*a".repeat(400), "{".repeat(1000));
        assert_eq!(ignored(&[(".gitignore", &bomb)], "", "fine", false), Some(4));
        assert_eq!(ignored(&[(".gitignore", "[z-a]\n\\\nfine\r\n")], "", "fine", false), Some(4));
    }
}
