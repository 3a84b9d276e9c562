//! The workspace of one cell: staged as the policy's mode says, with what the cell must not see left out, and put
//! together with the cell's scratch space. All of it blocks. It must never show a cell what the policy hides, and
//! what is made here is taken down by the sweep of the cell's directory.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::prepare::{PrepareError, failed};
use super::rooms::{Tenant, Who};
use super::{Accepted, Settings};
use crate::job::spec::{Runtime, WorkspaceMode};
use crate::job::{FailReason, Identity};
use crate::policy::PlanLimits;
use crate::workspace::{
    self, CellIds, CopyLimits, Guard, Mask, Mode, Scratch, StagedIds, StagedPart, WorkspaceError, WorkspaceRecord,
};

/// Longest CLAUDE.md that is handed over, in bytes.
const CLAUDE_MD_BYTES_MAX: u64 = 64 * 1024;
/// How long copying a workspace file by file may take.
const COPY_TIME_MAX: Duration = Duration::from_secs(600);

/// A workspace that is staged but not yet what the cell sees.
pub(super) struct Staged {
    view: View,
    parts: Vec<StagedPart>,
    pub(super) who: Who,
    pub(super) notes: Vec<String>,
    pub(super) claude_md: Option<String>,
}

/// How the cell comes to see it.
enum View {
    /// An empty directory of its scratch space.
    Empty,
    /// As it is staged.
    Staged {
        path: PathBuf,
        /// The engine has to make it read-only: no mount of ours does.
        wants_read_only: bool,
    },
    /// Read-only, with something over it.
    Masked { lower: PathBuf, mask: Mask },
    /// A copy of what is staged, or of `direct` where nothing is.
    Copy { lower: PathBuf, direct: Option<OwnedFd>, mask: Mask },
}

/// What the cell sees.
pub(super) struct Seen {
    pub(super) path: PathBuf,
    pub(super) read_only: bool,
    pub(super) parts: Vec<StagedPart>,
    pub(super) notes: Vec<String>,
}

/// Opens the workspace as its submitter, as it was at submit, and stages it for the cell in `dir`.
pub(super) fn stage(
    settings: &Settings,
    accepted: &Accepted,
    identity: &Identity,
    tenant: &Tenant,
    dir: &Path,
) -> Result<Staged, PrepareError> {
    let plan = &accepted.plan;
    let record = match (&accepted.workspace, plan.workspace_mode) {
        (Some(record), WorkspaceMode::Copy | WorkspaceMode::Bind | WorkspaceMode::ReadOnly) => record,
        (_, WorkspaceMode::None) | (None, _) => return Ok(empty(tenant)),
    };
    let guard = Guard::for_user(&settings.state_dir, identity.uid);
    let fd = workspace::reopen_as(identity, record, &guard).map_err(|e| failure(&e))?;
    // Private ids of the submitter's groups follow the cell's own.
    let count = identity.groups.len().min(40) as u32;
    let groups: Vec<u32> = (1..=count).map(|n| tenant.uid.wrapping_add(n)).collect();
    let mode = match (plan.workspace_mode, &plan.writable) {
        (WorkspaceMode::Bind, None) => Mode::Bind,
        (WorkspaceMode::Bind, Some(paths)) if !paths.is_empty() => Mode::Partly(paths),
        (WorkspaceMode::Copy | WorkspaceMode::Bind | WorkspaceMode::ReadOnly | WorkspaceMode::None, _) => {
            Mode::ReadOnly
        }
    };
    let ids = CellIds {
        submitter: identity,
        cell_uid: tenant.uid,
        cell_gid: tenant.uid,
        cell_groups: &groups,
        // gVisor cannot make files on an id-mapped mount; it can read there, and write to an overlay over it.
        runtime_maps_ids: tenant.runtime == Runtime::Runc || mode == Mode::ReadOnly,
    };
    let mask = Mask::default();
    let over = plan.workspace_mode == WorkspaceMode::Copy || (mode == Mode::ReadOnly && !mask.is_empty());
    let target = match over {
        true => workspace::lower_of(dir, None).map_err(|e| failure(&e))?,
        false => workspace::view_of(dir, None),
    };
    let staged = workspace::stage(&fd, record, &ids, mode, &target).map_err(|e| failure(&e))?;
    let who = match staged.ids().clone() {
        StagedIds::Private { uid, gid, groups } | StagedIds::Submitter { uid, gid, groups } => {
            Who { uid, gid, groups }
        }
    };
    let notes = staged.note().map(str::to_owned).into_iter().collect();
    let claude_md = claude_md(accepted, identity, record, &fd)?;
    // Taken down by the sweep of the cell's directory, like everything else in it.
    let (path, parts) = (staged.path().to_owned(), staged.parts().to_vec());
    let view = match (plan.workspace_mode, over) {
        (WorkspaceMode::Copy, _) => {
            View::Copy { lower: path, direct: staged.is_direct().then_some(fd), mask }
        }
        (WorkspaceMode::ReadOnly | WorkspaceMode::Bind, true) => View::Masked { lower: path, mask },
        (WorkspaceMode::ReadOnly | WorkspaceMode::Bind | WorkspaceMode::None, _) => {
            View::Staged { path, wants_read_only: staged.wants_read_only() }
        }
    };
    Ok(Staged { view, parts, who, notes, claude_md })
}

fn empty(tenant: &Tenant) -> Staged {
    let own = rustix::process::geteuid().as_raw();
    let (uid, gid) =
        if own == 0 { (tenant.uid, tenant.uid) } else { (own, rustix::process::getegid().as_raw()) };
    let who = Who { uid, gid, groups: Vec::new() };
    Staged { view: View::Empty, parts: Vec::new(), who, notes: Vec::new(), claude_md: None }
}

fn claude_md(
    accepted: &Accepted,
    identity: &Identity,
    record: &WorkspaceRecord,
    fd: &OwnedFd,
) -> Result<Option<String>, PrepareError> {
    let plan = &accepted.plan;
    if !plan.hand_over_claude_md || plan.project_settings {
        return Ok(None);
    }
    workspace::read_text(identity, record, fd, "CLAUDE.md", CLAUDE_MD_BYTES_MAX).map_err(|e| failure(&e))
}

impl Staged {
    /// Puts it together with the cell's scratch space.
    pub(super) fn finish(
        self,
        dir: &Path,
        scratch: &Scratch,
        limits: &PlanLimits,
        inodes_max: u64,
    ) -> Result<Seen, PrepareError> {
        let Self { view, parts, notes, .. } = self;
        let (path, read_only, more) = match view {
            View::Empty => (scratch.work(), false, Vec::new()),
            View::Staged { path, wants_read_only } => (path, wants_read_only, Vec::new()),
            View::Masked { lower, mask } => {
                let path = workspace::masked(dir, None, &lower, &mask).map_err(|e| failure(&e))?;
                (path, false, Vec::new())
            }
            View::Copy { lower, direct, mask } => {
                let limits = CopyLimits {
                    bytes_max: limits.disk_bytes,
                    entries_max: inodes_max,
                    time_max: COPY_TIME_MAX,
                };
                let direct = direct.as_ref().map(AsFd::as_fd);
                let copied = workspace::copy(dir, None, scratch, (&lower, direct), &mask, &limits);
                let copied = copied.map_err(|e| failure(&e))?;
                (copied.path, false, copied.notes)
            }
        };
        let notes = notes.into_iter().chain(more).collect();
        Ok(Seen { path, read_only, parts, notes })
    }
}

fn failure(error: &WorkspaceError) -> PrepareError {
    let reason = match error {
        WorkspaceError::Moved { .. } => FailReason::WorkspaceMoved,
        _ => FailReason::WorkspaceSetup,
    };
    failed(reason, error)
}
