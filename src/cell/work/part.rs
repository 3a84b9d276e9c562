//! A workspace that is a part of a repository's work tree: in the cell it lies as deep below a directory of ours as it
//! does below the top, with the repository's own directory there as `.git`. Nothing else of the work tree is in it, and
//! nothing can be written beside it.

use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Component, Path};

use super::super::rooms::Who;
use super::{Over, Placed, REPOSITORY, Site, TOP, Wanted, repository_at};
use crate::git::above::{self, Above, SPARSE};
use crate::job::spec::WorkspaceMode;
use crate::workspace::{self, WorkspaceError};

/// Where the cell sees the top of the work tree, of a workspace that it sees at `at`.
pub(super) fn top_at<'a>(at: &'a str, above: &Above) -> &'a str {
    at.strip_suffix(&above.below).map_or(at, |top| top.trim_end_matches('/'))
}

/// Makes the directories that hold the workspace, its repository, and others that lie beside it.
pub(super) fn top(site: &Site<'_>, above: &Above, who: &Who) -> Result<Over, WorkspaceError> {
    let (dir, at) = (site.dir.join(TOP), top_at(&site.accepted.plan.workspace_at, above));
    make(&dir, who)?;
    let others = site.accepted.others.iter().filter_map(|other| Path::new(&other.at).strip_prefix(at).ok());
    for below in [Path::new(&above.below), Path::new(".git")].into_iter().chain(others) {
        let mut here = dir.clone();
        for part in below.components() {
            if let Component::Normal(part) = part {
                here.push(part);
                make(&here, who)?;
            }
        }
    }
    Ok(Over { source: dir, target: at.to_owned(), read_only: true })
}

fn make(dir: &Path, who: &Who) -> Result<(), WorkspaceError> {
    let made = match std::fs::DirBuilder::new().mode(0o755).create(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
        // Git asks whose it is.
        Ok(()) if rustix::process::geteuid().is_root() => chown(dir, Some(who.uid), Some(who.gid)),
        Ok(()) => Ok(()),
    };
    made.map_err(|source| WorkspaceError::Io { doing: "make", path: dir.to_owned(), source })
}

/// Stages the repository: as a copy where the workspace is one, else to be read only. None, with a note, where it
/// became one that is not shown.
pub(super) fn repository(
    site: &Site<'_>,
    above: &Above,
    private: Option<bool>,
    notes: &mut Vec<String>,
) -> Result<Option<Placed>, WorkspaceError> {
    let asked = site.accepted.plan.workspace_mode;
    let mode = if asked == WorkspaceMode::Copy { asked } else { WorkspaceMode::ReadOnly };
    let dir = workspace::reopen_repository_as(site.identity, &above.record, &site.guard)?;
    let own = dir.try_clone().map_err(|source| WorkspaceError::Io {
        doing: "open",
        path: above.record.path.clone(),
        source,
    })?;
    let replaced = match above::parts(site.identity, above, own)? {
        Ok(replaced) => replaced,
        Err(why) => {
            notes.push(format!("its git repository is not shown: {why}"));
            return Ok(None);
        }
    };
    let wanted = Wanted {
        name: Some(REPOSITORY.to_owned()),
        at: repository_at(site.accepted),
        mode,
        record: &above.record,
        replaced,
        settings: SPARSE,
        private,
    };
    site.place(wanted, dir, notes, &mut None).map(|(placed, _)| Some(placed))
}
