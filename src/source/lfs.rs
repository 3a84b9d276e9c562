//! Files whose contents a repository keeps in Git LFS: found after the checkout by what they are, brought by the
//! user's own git-lfs where there is one, by explicit command and never as a filter; else refused by name. A server
//! that the repository itself names is not asked.

use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::SourceError;
use super::git::{Config, Run};
use super::room::{as_user, place};
use super::tree::{Listed, POINTER_BYTES_MAX};

/// Files that are named.
const NAMED_MAX: usize = 5;
/// Longest file of attributes that is read, in bytes.
const ATTRIBUTES_BYTES_MAX: u64 = 1 << 20;

/// Brings what is missing; what the submitter should know of it.
pub(super) async fn complete(
    run: &Run<'_>,
    tree: &Path,
    commit: &str,
    listed: &Listed,
) -> Result<Vec<String>, SourceError> {
    let pointers = pointers(run, tree, listed).await?;
    if pointers.is_empty() {
        return Ok(Vec::new());
    }
    let refused = |missing: &str| {
        let files = pointers.iter().take(NAMED_MAX).map(|path| path.display().to_string()).collect();
        SourceError::Lfs { files, count: pointers.len(), missing: missing.to_owned() }
    };
    let git =
        |config, command| run.git(config, command).args([OsString::from("-C"), tree.as_os_str().to_owned()]);
    if git(Config::Users, "lfs").args(["lfs", "version"]).output().await?.code != 0 {
        return Err(refused("install git-lfs on this machine, or clone it yourself and give the directory"));
    }
    if listed.lfs_config {
        return Err(refused(
            "the repository names a server of its own for them (.lfsconfig), which is not asked: clone it yourself and \
             give the directory",
        ));
    }
    for args in [&["lfs", "fetch", "origin", commit][..], &["lfs", "checkout"][..]] {
        git(Config::Users, "lfs").args(args.iter().copied()).text().await?;
    }
    let left = self::pointers(run, tree, listed).await?;
    if !left.is_empty() {
        return Err(refused("git-lfs did not bring all of them"));
    }
    // Git in the cell has no filter for them: it must not take the contents for a change.
    let update =
        git(Config::None, "update-index").args(["update-index", "--assume-unchanged", "-z", "--stdin"]);
    let names: Vec<u8> = pointers
        .iter()
        .flat_map(|path| [std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()), b"\0"].concat())
        .collect();
    update.stdin(names).text().await?;
    Ok(vec![format!("{} files came from Git LFS", pointers.len())])
}

/// The files that are pointers, where the repository uses LFS at all.
async fn pointers(run: &Run<'_>, tree: &Path, listed: &Listed) -> Result<Vec<PathBuf>, SourceError> {
    let (root, attributes, short) = (tree.to_owned(), listed.attributes.clone(), listed.short.clone());
    as_user(run.who, tree, move || {
        let text = |path: &Path, most| read(&root.join(path), most).map_err(place("read", path));
        let mut used = false;
        for path in &attributes {
            used |= text(path, ATTRIBUTES_BYTES_MAX)?.windows(10).any(|part| part == b"filter=lfs");
        }
        let mut found = Vec::new();
        if used {
            for path in short {
                if is_pointer(&text(&path, POINTER_BYTES_MAX)?) {
                    found.push(path);
                }
            }
        }
        Ok(found)
    })
    .await
}

fn read(path: &Path, bytes_max: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(bytes_max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn is_pointer(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let begins = text.starts_with("version https://git-lfs.github.com/spec/v1\n");
    begins && text.lines().any(|line| line.starts_with("oid sha256:"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pointer_is_told_from_a_text_about_pointers() {
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
        assert!(is_pointer(pointer.as_bytes()));
        for text in [
            "",
            "oid sha256:4d7a\n",
            "# version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
            "version https://git-lfs.github.com/spec/v1\n",
        ] {
            assert!(!is_pointer(text.as_bytes()), "{text}");
        }
    }
}
