//! Which paths a repository's index names: what git tracks it never ignores. The index is the user's own, but it is
//! read like a stranger's: bounded, and anything odd means that nothing is known.

use std::collections::HashSet;

use crate::git::index::strip_length;

/// Longest index that is read, in bytes.
pub(super) const INDEX_BYTES_MAX: u64 = 64 << 20;
/// Times, device, inode, mode, owner, size and SHA-1, before the flags.
const FIXED_BYTES: usize = 60;
const EXTENDED: u16 = 0x4000;

/// The paths in an index of version 2, 3 or 4 with SHA-1 names; none where it is something else.
pub(super) fn paths(index: &[u8]) -> Option<HashSet<Vec<u8>>> {
    let word = |at: usize| index.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes);
    let (version, count) = (word(4)?, word(8)? as usize);
    if index.get(..4)? != b"DIRC" || !(2..=4).contains(&version) || count > index.len() / FIXED_BYTES {
        return None;
    }
    let mut paths = HashSet::with_capacity(count);
    let (mut at, mut last) = (12, Vec::new());
    for _ in 0..count {
        let flags = u16::from_be_bytes(index.get(at + FIXED_BYTES..at + FIXED_BYTES + 2)?.try_into().ok()?);
        let mut name = at + FIXED_BYTES + 2 + if flags & EXTENDED == 0 { 0 } else { 2 };
        if version == 4 {
            let cut = strip_length(index, &mut name)?;
            last.truncate(last.len().checked_sub(cut)?);
        } else {
            last.clear();
        }
        let rest = index.get(name..)?;
        let length = memchr::memchr(0, rest)?;
        last.extend_from_slice(&rest[..length]);
        let end = name + length;
        // At least one NUL; the older forms fill up to a multiple of eight.
        at = if version == 4 { end + 1 } else { at + ((end - at) / 8 + 1) * 8 };
        paths.insert(last.clone());
    }
    Some(paths)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_index_that_git_wrote_is_read_in_each_version() {
        let dir = tempfile::tempdir().expect("tempdir");
        let git = |args: &[&str]| {
            let mut git = Command::new("git");
            git.args(["-c", "core.hooksPath=/dev/null"]).args(args).current_dir(dir.path());
            git.env("GIT_CONFIG_NOSYSTEM", "1").env("GIT_CONFIG_GLOBAL", "/dev/null").env("HOME", dir.path());
            assert!(git.output().expect("git").status.success(), "{args:?}");
        };
        let names = ["a", "a-b", "dir/deep/file", "dir/deep/file2", "exactly-eight-x", "\u{fc}\n"];
        git(&["init", "-q"]);
        for name in names {
            let at = dir.path().join(name);
            std::fs::create_dir_all(at.parent().expect("parent")).expect("mkdir");
            std::fs::write(at, "x").expect("write");
        }
        git(&["add", "-A"]);
        let expected: HashSet<Vec<u8>> = names.iter().map(|name| name.as_bytes().to_vec()).collect();
        for version in ["2", "4"] {
            git(&["update-index", "--index-version", version]);
            let index = std::fs::read(dir.path().join(".git/index")).expect("index");
            assert_eq!(paths(&index).expect("read"), expected, "version {version}");
        }
        // The third is the second with more flags.
        git(&["update-index", "--index-version", "2"]);
        std::fs::write(dir.path().join("later"), "x").expect("write");
        git(&["add", "-N", "later"]);
        let index = std::fs::read(dir.path().join(".git/index")).expect("index");
        assert!(index[7] == 3 && paths(&index).expect("read").contains(&b"later"[..]));
    }

    proptest! {
        #[test]
        fn garbage_does_not_panic(version in 0u8..6, count in 0u8..4, garbage in prop::collection::vec(any::<u8>(), 0..300)) {
            let head = [&b"DIRC\0\0\0"[..], &[version, 0, 0, 0, count], &garbage].concat();
            let _ = paths(&head);
        }
    }
}
