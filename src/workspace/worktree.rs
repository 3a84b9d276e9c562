//! A git worktree: a directory whose `.git` is a file that names a place in another repository. That repository's own
//! directory can be shown to a cell as well, but only where it names the worktree in return: otherwise anybody who can
//! write a `.git` file could have any directory of the submitter's shown.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::peer::{self, text_of};
use super::{Guard, WorkspaceError, WorkspaceRecord, io_at};
use crate::job::Identity;

/// Longest file that names another, in bytes.
const LINK_BYTES_MAX: u64 = 8 * 1024;

/// The repository of a worktree, opened as the submitter.
#[derive(Debug)]
pub struct Worktree {
    /// Its common directory, usually a `.git`.
    pub dir: OwnedFd,
    /// What it is.
    pub record: WorkspaceRecord,
    /// The worktree's name there: `worktrees/<name>`.
    pub name: String,
}

/// The repository that the directory of `record`, opened as `dir`, is a worktree of. `Ok(Err(why))` where its `.git`
/// file names a place that is not shown. Blocks.
///
/// # Errors
/// [`WorkspaceError`] where file systems do not answer.
pub fn worktree(
    identity: &Identity,
    record: &WorkspaceRecord,
    dir: &OwnedFd,
    guard: &Guard,
) -> Result<Option<Result<Worktree, String>>, WorkspaceError> {
    let text = peer::read_text(identity, record, dir, ".git", LINK_BYTES_MAX)?;
    let Some(link) = text.as_deref().and_then(|text| text.strip_prefix("gitdir:")) else { return Ok(None) };
    let told = |why: &str| Ok(Some(Err(format!("its repository is not shown: {why}"))));
    let Some(place) = absolute(link.trim(), &record.path) else { return told("`.git` names no path") };
    if place.starts_with(&record.path) {
        // Within what the cell sees anyway.
        return Ok(None);
    }
    let Some((common, name)) = parts_of(&place) else {
        return told("`.git` does not name a worktree of a repository");
    };
    let (opened, found) = match peer::open_repository_as(identity, &common, guard) {
        Ok(opened) => opened,
        Err(error @ (WorkspaceError::Unresponsive { .. } | WorkspaceError::TooManyOpening { .. })) => {
            return Err(error);
        }
        Err(error) => return told(&error.to_string()),
    };
    let copy = opened.try_clone().map_err(io_at("open", &common))?;
    let (place, ours) = (place.clone(), record.path.join(".git"));
    let below = name.clone();
    let names_it =
        peer::as_peer(identity, &common, move || Ok(names_worktree(&copy, &below, &place, &ours)))?;
    if !names_it {
        return told(
            "the repository that `.git` names does not know this worktree (`git worktree repair` helps)",
        );
    }
    Ok(Some(Ok(Worktree { dir: opened, record: found, name })))
}

/// Whether the repository in `common` has a worktree `name`, in its directory `place`, whose `.git` file is `ours`. Runs
/// with the submitter's rights.
fn names_worktree(common: &OwnedFd, name: &str, place: &Path, ours: &Path) -> bool {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let open = |below: &str| rustix::fs::openat2(common.as_fd(), below, flags, Mode::empty(), resolve).ok();
    let Some(own) = open(&format!("worktrees/{name}")) else { return false };
    let is_repository = open("objects").is_some() && text_of(common, "HEAD", LINK_BYTES_MAX).is_some();
    let shared = text_of(&own, "commondir", LINK_BYTES_MAX);
    let back = text_of(&own, "gitdir", LINK_BYTES_MAX);
    // A relative one is relative to the worktree's own directory in the repository.
    let known = back.and_then(|text| absolute(text.trim(), place)).is_some_and(|back| back == ours);
    is_repository && known && shared.is_some_and(|text| text.trim() == "../..")
}

fn absolute(link: &str, from: &Path) -> Option<PathBuf> {
    if link.is_empty() || link.contains(['\n', '\0']) {
        return None;
    }
    let mut out = PathBuf::new();
    for component in from.join(link).components() {
        match component {
            Component::ParentDir => {
                out.pop();
            }
            Component::CurDir => {}
            other => out.push(other),
        }
    }
    Some(out)
}

/// `<common>/worktrees/<name>` in its parts.
fn parts_of(place: &Path) -> Option<(PathBuf, String)> {
    let name = place.file_name()?.to_str()?.to_owned();
    let worktrees = place.parent()?;
    let plain = !name.contains(char::is_control) && name.len() <= 255;
    (worktrees.file_name()? == "worktrees" && plain).then_some(())?;
    Some((worktrees.parent()?.to_owned(), name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_read_as_git_does() {
        let at = Path::new("/w/tree");
        assert_eq!(absolute("/r/.git/worktrees/a", at), Some("/r/.git/worktrees/a".into()));
        assert_eq!(absolute("../r/.git/worktrees/a", at), Some("/w/r/.git/worktrees/a".into()));
        assert_eq!(absolute("", at), None);
        assert_eq!(parts_of(Path::new("/r/.git/worktrees/a")), Some(("/r/.git".into(), "a".to_owned())));
        assert_eq!(parts_of(Path::new("/r/.git/modules/a")), None);
        assert_eq!(parts_of(Path::new("/home/ann/.ssh")), None);
        let place = Path::new("/w/r/.git/worktrees/a");
        assert_eq!(absolute("../../../../tree/.git", place), Some("/w/tree/.git".into()));
    }
}
