//! The checkout of one job: a repository of its own whose packs are links to the mirror's, with one commit checked out.
//! Nothing that the commit holds is run or obeyed on the way: no hook, no filter, no submodule, no encoding.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::git::{Config, Run};
use super::mirror::in_dir;
use super::refs::Wanted;
use super::room::{as_user, place};
use super::{Limits, SourceError};

/// Longest list of a commit's files, in bytes.
const LIST_BYTES_MAX: usize = 512 << 20;
/// Longest pointer of Git LFS, in bytes.
pub(super) const POINTER_BYTES_MAX: u64 = 1024;
/// Wins over every attribute in the tree, and stays for git in the cell, so that both agree.
const ATTRIBUTES: &[u8] = b"* -filter -working-tree-encoding\n";

/// What a commit holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) files: u64,
    pub(super) bytes: u64,
    pub(super) submodules: u64,
    /// Files of attributes.
    pub(super) attributes: Vec<PathBuf>,
    /// Files that are short enough for a pointer of Git LFS.
    pub(super) short: Vec<PathBuf>,
    /// The repository says where its LFS server is.
    pub(super) lfs_config: bool,
}

/// Looks at a commit before anything of it is on the disk.
pub(super) async fn listed(
    run: &Run<'_>,
    mirror: &Path,
    commit: &str,
    limits: &Limits,
) -> Result<Listed, SourceError> {
    let git = run.git(Config::None, "ls-tree").args([in_dir(mirror)]);
    let git = git.args(["ls-tree", "-r", "-l", "-z", "--full-tree", commit]);
    let text = git.output_bytes_max(LIST_BYTES_MAX).text().await?;
    let listed = Listed::parse(&text);
    if listed.files > limits.tree_files_max {
        let what = format!("the checkout has {} files", listed.files);
        return Err(SourceError::TooLarge { what, max: limits.tree_files_max.to_string() });
    }
    let (at, free) = (mirror.to_owned(), mirror.to_owned());
    let free = as_user(run.who, &at, move || {
        let disk = rustix::fs::statvfs(&free).map_err(|e| place("look at", &free)(e.into()))?;
        Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
    });
    let most = free.await?.saturating_sub(limits.reserve_bytes).min(limits.tree_bytes_max);
    if listed.bytes > most {
        let what = format!("the checkout has {} bytes", listed.bytes);
        return Err(SourceError::TooLarge { what, max: format!("{most} bytes") });
    }
    Ok(listed)
}

impl Listed {
    /// Reads `mode type id size\tpath`, each ended by a NUL.
    fn parse(text: &[u8]) -> Self {
        let mut listed = Self::default();
        for line in text.split(|byte| *byte == 0) {
            let Some(tab) = line.iter().position(|byte| *byte == b'\t') else { continue };
            let (facts, path) = (String::from_utf8_lossy(&line[..tab]), &line[tab + 1..]);
            let facts: Vec<&str> = facts.split_whitespace().collect();
            let [mode, _kind, _id, size] = facts[..] else { continue };
            let size: u64 = size.parse().unwrap_or(0);
            if mode == "160000" {
                listed.submodules += 1;
                continue;
            }
            (listed.files, listed.bytes) = (listed.files + 1, listed.bytes.saturating_add(size));
            let path = Path::new(OsStr::from_bytes(path));
            if !mode.starts_with("100") {
                continue;
            }
            if path.file_name() == Some(OsStr::new(".gitattributes")) {
                listed.attributes.push(path.to_owned());
            }
            listed.lfs_config |= path == Path::new(".lfsconfig");
            if size <= POINTER_BYTES_MAX {
                listed.short.push(path.to_owned());
            }
        }
        listed
    }
}

/// Makes the checkout.
pub(super) async fn make(
    run: &Run<'_>,
    mirror: &Path,
    tree: &Path,
    wanted: &Wanted,
    commit: &str,
) -> Result<(), SourceError> {
    let clone = run.git(Config::None, "clone");
    let clone = clone.args(["clone", "--quiet", "--local", "--no-checkout", "--template=", "--"]);
    clone.args([mirror.as_os_str(), tree.as_os_str()]).text().await?;
    let info = tree.join(".git/info");
    as_user(run.who, tree, move || {
        std::fs::create_dir_all(&info).map_err(place("make", &info))?;
        let attributes = info.join("attributes");
        std::fs::write(&attributes, ATTRIBUTES).map_err(place("write", &attributes))
    })
    .await?;
    let git =
        |command| run.git(Config::None, command).args([OsString::from("-C"), tree.as_os_str().to_owned()]);
    git("config").args(["config", "remote.origin.url", run.url]).text().await?;
    let checkout = git("checkout").args(["checkout", "--quiet", "--force"]);
    let Some(branch) = &wanted.branch else {
        return checkout.args(["--detach", commit]).text().await.map(|_| ());
    };
    checkout.args(["--no-track", "-B", branch.as_str(), commit]).text().await?;
    for (key, value) in [("remote", "origin".to_owned()), ("merge", format!("refs/heads/{branch}"))] {
        git("config").args(["config", &format!("branch.{branch}.{key}"), &value]).text().await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_tells_sizes_submodules_and_what_may_be_a_pointer() {
        let lines = [
            "100644 blob aa     120\ta",
            "100755 blob bb 2000\tdir/b\n",
            "120000 blob cc 5\tlink",
            "160000 commit dd       -\tsub",
            "100644 blob ee 30\tdir/.gitattributes",
            "120000 blob ff 3\t.gitattributes",
            "100644 blob gg 9\t.lfsconfig",
        ];
        let text = lines.join("\0");
        let listed = Listed::parse(text.as_bytes());
        assert_eq!((listed.files, listed.bytes, listed.submodules), (6, 2167, 1));
        assert_eq!(listed.attributes, [Path::new("dir/.gitattributes")]);
        assert_eq!(listed.short.len(), 3);
        assert!(listed.lfs_config);
    }
}
