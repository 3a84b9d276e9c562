//! What an earlier job changed, to be put into a copy before its agent sees it. Everything is carried over, what is
//! flagged or refused too: none of it leaves the cell by that.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};

use super::super::Settings;
use crate::changes::apply::{materialise, materialise_plain};
use crate::changes::{Shelf, ShelfError};
use crate::job::JobId;
use crate::workspace::{CopyParts, Form, WorkspaceError};

/// The job that is gone on with.
pub(super) struct Former {
    job: JobId,
    changes_dir: PathBuf,
}

impl Former {
    pub(super) fn new(settings: &Settings, job: JobId) -> Self {
        Self { job, changes_dir: settings.changes_dir() }
    }

    /// Puts its changes into `copy`, whose original is staged at `lower`, as files of `owner`.
    pub(super) fn fill(
        &self,
        copy: &CopyParts,
        lower: &Path,
        owner: (u32, u32),
    ) -> Result<(), WorkspaceError> {
        let lost = |why: String| WorkspaceError::CarryOver { job: self.job.to_string(), why };
        let failed = |error: ShelfError| lost(error.to_string());
        let shelf = Shelf::new(self.changes_dir.clone()).of(&self.job);
        let Some((changes, _)) = shelf.changes().map_err(failed)? else {
            return Err(lost("its change set was removed meanwhile".to_owned()));
        };
        match copy.form {
            Form::Overlay => {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let lower = rustix::fs::openat(CWD, lower, flags, Mode::empty());
                let lower = lower.map_err(|e| lost(std::io::Error::from(e).to_string()))?;
                materialise(&shelf, &changes, &copy.dir, Some(lower.as_fd()), owner).map_err(failed)?;
            }
            Form::Whole => {
                materialise_plain(&shelf, &changes, &copy.dir, owner).map_err(failed)?;
            }
        }
        Ok(())
    }
}
