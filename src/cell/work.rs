//! The workspaces of one cell: opened as the submitter, staged as the policy's modes say, with what the cell must not
//! see left out and what it must not change protected, and put together with the cell's scratch space. All of it
//! blocks. It must never show a cell what the policy hides; what is made here is taken down by the sweep of the cell's
//! directory.

mod aside;
mod former;
mod part;
mod see;

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use former::Former;
use see::Sight;

use super::beside::beside;
use super::prepare::{PrepareError, failed};
use super::rooms::{Tenant, Who};
use super::{Accepted, Settings};
use crate::agent::options;
use crate::changes::Shelf;
use crate::job::spec::{Runtime, WorkspaceMode};
use crate::job::{FailReason, Identity, JobId};
use crate::policy::PlanLimits;
use crate::workspace::{
    self, CellIds, CopyLimits, CopyParts, Covers, Form, Guard, Mask, Mode, Replaced, Scratch, StagedIds,
    StagedPart, WorkspaceError, WorkspaceRecord,
};

pub(super) use aside::{Aside, set_aside};

/// Longest CLAUDE.md that is handed over, in bytes.
const CLAUDE_MD_BYTES_MAX: u64 = 64 * 1024;
/// How long copying a workspace file by file may take.
const COPY_TIME_MAX: Duration = Duration::from_secs(600);
/// Most paths that are covered one by one, where no layer can hide them: each is a mount in the cell.
const COVERS_MAX: usize = 256;
/// What the repository of a worktree is called among a cell's workspaces.
const REPOSITORY: &str = "repository";
/// Where the cell sees it.
pub(super) const REPOSITORY_AT: &str = "/workspace.git";
/// What holds a workspace that is a part of a repository's work tree, in the cell's directory: empty directories.
const TOP: &str = "top";

/// Workspaces that are staged but not yet what the cell sees.
pub(super) struct Staged {
    places: Vec<Placed>,
    pub(super) who: Who,
    pub(super) notes: Vec<String>,
    pub(super) claude_md: Option<String>,
    /// How long it took to list what a change set will be against; none where there is none.
    pub(super) snapshot: Option<Duration>,
    from: Option<Former>,
}

/// One of them.
struct Placed {
    /// None: the primary one.
    name: Option<String>,
    /// Where the cell sees it.
    at: String,
    view: View,
    parts: Vec<StagedPart>,
    over: Vec<Over>,
    /// What is bound before it.
    under: Option<Over>,
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
    Copy {
        lower: PathBuf,
        direct: Option<OwnedFd>,
        mask: Mask,
        /// Only these paths of it can be written.
        writable: Option<Vec<PathBuf>>,
        /// The original's path, for messages.
        original: PathBuf,
    },
}

/// Something that is bound over a workspace.
#[derive(Debug, Clone)]
pub(super) struct Over {
    pub(super) source: PathBuf,
    /// Where, in the cell.
    pub(super) target: String,
    /// The engine has to make it read-only.
    pub(super) read_only: bool,
}

/// What the cell sees.
pub(super) struct Seen {
    pub(super) path: PathBuf,
    pub(super) read_only: bool,
    /// What has to be bound before it.
    pub(super) under: Option<Over>,
    pub(super) parts: Vec<StagedPart>,
    /// In the order in which they are bound.
    pub(super) over: Vec<Over>,
    pub(super) notes: Vec<String>,
}

/// Whose cell it is and where it lies.
struct Site<'a> {
    settings: &'a Settings,
    accepted: &'a Accepted,
    identity: &'a Identity,
    tenant: &'a Tenant,
    dir: &'a Path,
    job: &'a JobId,
    guard: Guard,
    groups: Vec<u32>,
}

/// One workspace to be staged.
struct Wanted<'a> {
    name: Option<String>,
    at: String,
    mode: WorkspaceMode,
    record: &'a WorkspaceRecord,
    /// Files that are to be seen with another content, beside those of the mask.
    replaced: Vec<Replaced>,
    /// What its configuration says besides, where it is a repository's own directory.
    settings: &'static str,
    /// Whether ids are mapped for the cell's other workspaces; unknown for the first one.
    private: Option<bool>,
}

/// Opens the workspaces as their submitter, as they were at submit, and stages them for the cell in `dir`.
pub(super) fn stage(
    settings: &Settings,
    accepted: &Accepted,
    identity: &Identity,
    tenant: &Tenant,
    dir: &Path,
    job: &JobId,
) -> Result<Staged, PrepareError> {
    let record = match (&accepted.workspace, accepted.plan.workspace_mode) {
        (Some(record), WorkspaceMode::Copy | WorkspaceMode::Bind | WorkspaceMode::ReadOnly) => record,
        (_, WorkspaceMode::None) | (None, _) => return Ok(empty(tenant)),
    };
    let guard = Guard::for_user(&settings.state_dir, identity.uid);
    // Private ids of the submitter's groups follow the cell's own.
    let count = identity.groups.len().min(40) as u32;
    let groups: Vec<u32> = (1..=count).map(|n| tenant.uid.wrapping_add(n)).collect();
    let site = Site { settings, accepted, identity, tenant, dir, job, guard, groups };
    site.stage_all(record).map_err(|e| failure(&e))
}

impl Site<'_> {
    fn stage_all(&self, record: &WorkspaceRecord) -> Result<Staged, WorkspaceError> {
        let plan = &self.accepted.plan;
        let fd = workspace::reopen_as(self.identity, record, &self.guard)?;
        let mut notes = Vec::new();
        let linked = match workspace::worktree(self.identity, record, &fd, &self.guard)? {
            Some(Ok(linked)) => Some(linked),
            Some(Err(why)) => {
                notes.push(why);
                None
            }
            None => None,
        };
        let replaced = linked.iter().filter_map(|l| see::link_to(REPOSITORY_AT, &l.name)).collect();
        let (mode, at) = (plan.workspace_mode, plan.workspace_at.clone());
        let (settings, mut snapshot) = ("", None);
        let primary = Wanted { name: None, at: at.clone(), mode, record, replaced, settings, private: None };
        let claude_md = self.claude_md(record, &fd)?;
        let (first, ids) = self.place(primary, fd, &mut notes, &mut snapshot)?;
        let mut places = vec![first];
        let private = Some(matches!(ids, StagedIds::Private { .. }));
        if let Some(linked) = linked {
            let mode = if mode == WorkspaceMode::Copy { mode } else { WorkspaceMode::ReadOnly };
            let replaced = see::link_back(&linked.name, &at).into_iter().collect();
            let name = Some(REPOSITORY.to_owned());
            let at = REPOSITORY_AT.to_owned();
            let wanted = Wanted { name, at, mode, record: &linked.record, replaced, settings, private };
            places.push(self.place(wanted, linked.dir, &mut notes, &mut snapshot)?.0);
        }
        let who = match ids {
            StagedIds::Private { uid, gid, groups } | StagedIds::Submitter { uid, gid, groups } => {
                Who { uid, gid, groups }
            }
        };
        if let Some(above) = &self.accepted.above {
            if let Some(first) = places.first_mut() {
                first.under = Some(part::top(self, above, &who)?);
            }
            places.extend(part::repository(self, above, private, &mut notes)?);
        }
        for other in &self.accepted.others {
            let fd = workspace::reopen_as(self.identity, &other.record, &self.guard)?;
            let (name, at) = (Some(other_name(&other.name)), other.at.clone());
            let (mode, record) = (other.mode, &other.record);
            let wanted = Wanted { name, at, mode, record, replaced: Vec::new(), settings, private };
            places.push(self.place(wanted, fd, &mut notes, &mut snapshot)?.0);
        }
        let from = self.accepted.from.clone().map(|job| Former::new(self.settings, job));
        Ok(Staged { places, who, notes, claude_md, snapshot, from })
    }

    fn place(
        &self,
        wanted: Wanted<'_>,
        fd: OwnedFd,
        notes: &mut Vec<String>,
        snapshot: &mut Option<Duration>,
    ) -> Result<(Placed, StagedIds), WorkspaceError> {
        let Wanted { name, at, mode: asked, record, replaced, settings, private } = wanted;
        let writable = self.accepted.plan.writable.as_deref().filter(|_| name.is_none());
        let mode = match (asked, writable) {
            (WorkspaceMode::Bind, None) => Mode::Bind,
            (WorkspaceMode::Bind, Some(paths)) if !paths.is_empty() => Mode::Partly(paths),
            (
                WorkspaceMode::Copy | WorkspaceMode::Bind | WorkspaceMode::ReadOnly | WorkspaceMode::None,
                _,
            ) => Mode::ReadOnly,
        };
        let is_copy = asked == WorkspaceMode::Copy;
        let shelf = (is_copy && name.is_none() && self.tenant.kept)
            .then(|| Shelf::new(self.settings.state_dir.join("changes")).of(self.job));
        let sight = Sight { hide: &self.accepted.plan.hide, mode, shelf, replaced, settings };
        let (looked, staged, layered) =
            self.looked(name.as_deref(), record, &fd, sight, (is_copy, private))?;
        let see::Looked { mask, guarded, notes: told, snapshot: took, .. } = looked;
        *snapshot = snapshot.or(took);
        notes.extend(told.into_iter().map(|note| match &name {
            Some(name) => format!("{name}: {note}"),
            None => note,
        }));
        if mode != Mode::ReadOnly && name.is_none() {
            aside::remember(self.settings, self.job, &guarded)?;
        }
        let ids = staged.ids().clone();
        if private == Some(true) && !matches!(ids, StagedIds::Private { .. }) {
            let why = "its file system cannot map ids and that of the first one can".to_owned();
            return Err(WorkspaceError::Beside { path: record.path.clone(), why });
        }
        if name.is_none() {
            notes.extend(staged.note().map(str::to_owned));
        }
        let (path, parts) = (staged.path().to_owned(), staged.parts().to_vec());
        let mut over: Vec<Over> = staged.guards().iter().map(|guard| over_of(&at, guard)).collect();
        let view = if is_copy {
            let (writable, original) = (writable.map(<[PathBuf]>::to_vec), record.path.clone());
            View::Copy { lower: path, direct: staged.is_direct().then_some(fd), mask, writable, original }
        } else if layered {
            View::Masked { lower: path, mask }
        } else {
            over.extend(self.covers(name.as_deref(), &at, record, &mask)?);
            View::Staged { path, wants_read_only: staged.wants_read_only() }
        };
        Ok((Placed { name, at, view, parts, over, under: None }, ids))
    }

    /// Looks through a workspace and mounts it; whether a layer that hides has to go over a mount that is read-only. A
    /// copy has its layers anyway.
    fn looked(
        &self,
        name: Option<&str>,
        record: &WorkspaceRecord,
        fd: &OwnedFd,
        sight: Sight<'_>,
        (is_copy, private): (bool, Option<bool>),
    ) -> Result<(see::Looked, workspace::Staged, bool), WorkspaceError> {
        let mode = sight.mode;
        let ids = CellIds {
            submitter: self.identity,
            cell_uid: self.tenant.uid,
            cell_gid: self.tenant.uid,
            cell_groups: &self.groups,
            // gVisor cannot make files on an id-mapped mount; it can read there, and write to an overlay over it.
            runtime_maps_ids: (self.tenant.runtime == Runtime::Runc || mode == Mode::ReadOnly)
                && private != Some(false),
        };
        let mount = |guards: &[(PathBuf, bool)], target: &Path| {
            workspace::stage_guarded(fd, record, &ids, mode, guards, target)
        };
        let look = || sight.look(self.identity, record, fd);
        if is_copy {
            // Nothing is protected in it, so its mount does not wait for what is found.
            let target = workspace::lower_of(self.dir, name)?;
            let both = beside("hotcell-stage", || mount(&[], &target), look);
            let thread =
                |source| WorkspaceError::Io { doing: "look through", path: record.path.clone(), source };
            let (staged, looked) = both.map_err(thread)?;
            return Ok((looked?, staged?, false));
        }
        let looked = look()?;
        // Where a layer can hide something, nothing is covered.
        let can_layer = mode == Mode::ReadOnly && workspace::form_here().0 == Form::Overlay;
        let layered = can_layer && !looked.mask.is_empty();
        let target = match layered {
            true => workspace::lower_of(self.dir, name)?,
            false => workspace::view_of(self.dir, name),
        };
        let staged = mount(&looked.guards, &target)?;
        Ok((looked, staged, layered))
    }

    /// What covers the hidden paths of a workspace that the cell sees as it is.
    fn covers(
        &self,
        name: Option<&str>,
        at: &str,
        record: &WorkspaceRecord,
        mask: &Mask,
    ) -> Result<Vec<Over>, WorkspaceError> {
        if mask.is_empty() {
            return Ok(Vec::new());
        }
        let count = mask.hidden.len() + mask.replaced.len();
        if count > COVERS_MAX {
            let (path, what, max) = (record.path.clone(), "hidden", COVERS_MAX);
            let hint = "use the copy mode, or hide whole directories";
            return Err(WorkspaceError::TooMany { path, count, what, max, hint });
        }
        let layers = workspace::lower_of(self.dir, name)?;
        let layers = layers.parent().unwrap_or(&layers);
        let covers = Covers::make(layers)?;
        let target = |path: &crate::change::TreePath| format!("{at}/{}", path.as_path().display());
        let hidden = mask.hidden.iter().map(|hidden| Over {
            source: covers.of(hidden.is_dir).to_owned(),
            target: target(&hidden.path),
            read_only: true,
        });
        let mut over: Vec<Over> = hidden.collect();
        // Nothing can be bound where nothing is.
        for (number, replaced) in mask.replaced.iter().filter(|r| !r.made).enumerate() {
            let source = Covers::file(layers, number, &replaced.content)?;
            over.push(Over { source, target: target(&replaced.path), read_only: true });
        }
        Ok(over)
    }

    fn claude_md(&self, record: &WorkspaceRecord, fd: &OwnedFd) -> Result<Option<String>, WorkspaceError> {
        let plan = &self.accepted.plan;
        if !plan.hand_over_claude_md || plan.project_settings {
            return Ok(None);
        }
        workspace::read_text(self.identity, record, fd, "CLAUDE.md", CLAUDE_MD_BYTES_MAX)
    }
}

fn over_of(at: &str, guard: &StagedPart) -> Over {
    Over {
        source: guard.path.clone(),
        target: format!("{at}/{}", guard.below.display()),
        read_only: guard.wants_read_only,
    }
}

/// A name that no other part of the cell's directory has.
fn other_name(name: &str) -> String {
    format!("other-{name}")
}

fn empty(tenant: &Tenant) -> Staged {
    let own = rustix::process::geteuid().as_raw();
    let (uid, gid) =
        if own == 0 { (tenant.uid, tenant.uid) } else { (own, rustix::process::getegid().as_raw()) };
    let who = Who { uid, gid, groups: Vec::new() };
    let at = options::WORKSPACE.to_owned();
    let place =
        Placed { name: None, at, view: View::Empty, parts: Vec::new(), over: Vec::new(), under: None };
    Staged { places: vec![place], who, notes: Vec::new(), claude_md: None, snapshot: None, from: None }
}

impl Staged {
    /// Puts them together with the cell's scratch space.
    pub(super) fn finish(
        self,
        dir: &Path,
        scratch: &Scratch,
        limits: &PlanLimits,
        inodes_max: u64,
    ) -> Result<Seen, PrepareError> {
        let limits =
            CopyLimits { bytes_max: limits.disk_bytes, entries_max: inodes_max, time_max: COPY_TIME_MAX };
        let (from, owner) = (self.from, self.who.owner());
        let mut places = self.places.into_iter();
        let mut seen = match places.next() {
            Some(first) => {
                first.finish(dir, scratch, &limits, from.as_ref(), owner).map_err(|e| failure(&e))?
            }
            None => return Err(failed(FailReason::Internal, "a cell without a workspace")),
        };
        for place in places {
            let (name, target) = (place.name.clone(), place.at.clone());
            let other = place.finish(dir, scratch, &limits, None, owner).map_err(|e| failure(&e))?;
            seen.over.push(Over { source: other.path, target, read_only: other.read_only });
            seen.over.extend(other.over);
            let named = |note: String| name.as_ref().map_or(note.clone(), |name| format!("{name}: {note}"));
            seen.notes.extend(other.notes.into_iter().map(named));
        }
        Ok(seen)
    }
}

impl Placed {
    fn finish(
        self,
        dir: &Path,
        scratch: &Scratch,
        limits: &CopyLimits,
        from: Option<&Former>,
        owner: (u32, u32),
    ) -> Result<Seen, WorkspaceError> {
        let Self { name, view, mut parts, over, under, .. } = self;
        let (path, read_only, notes) = match view {
            View::Empty => (scratch.work(), false, Vec::new()),
            View::Staged { path, wants_read_only } => (path, wants_read_only, Vec::new()),
            View::Masked { lower, mask } => {
                (workspace::masked(dir, name.as_deref(), &lower, &mask)?, false, Vec::new())
            }
            View::Copy { lower, direct, mask, writable, original } => {
                let direct = direct.as_ref().map(AsFd::as_fd);
                // Only the primary workspace goes on with what an earlier job changed.
                let from = from.filter(|_| name.is_none());
                let fill = |copy: &CopyParts| from.map_or(Ok(()), |from| from.fill(copy, &lower, owner));
                let copied = workspace::copy_filled(
                    dir,
                    name.as_deref(),
                    scratch,
                    (&lower, direct),
                    &mask,
                    limits,
                    &fill,
                )?;
                if let Some(paths) = &writable {
                    parts = workspace::parts_of_copy(&original, &copied.path, paths)?;
                }
                (copied.path, writable.is_some(), copied.notes)
            }
        };
        Ok(Seen { path, read_only, under, parts, over, notes })
    }
}

/// Where the host has what a cell of this job sees at these paths, for whoever follows links in it.
pub(super) fn rooms(accepted: &Accepted, dir: &Path) -> Vec<(String, PathBuf)> {
    let at = |name: Option<&str>| {
        let whole = workspace::parts_of(dir, name).filter(|parts| parts.form == Form::Whole);
        whole.map_or_else(|| workspace::view_of(dir, name), |parts| parts.dir)
    };
    let others = accepted.others.iter().map(|other| (other.at.clone(), at(Some(&other_name(&other.name)))));
    let all =
        [(accepted.plan.workspace_at.clone(), at(None)), (repository_at(accepted), at(Some(REPOSITORY)))];
    all.into_iter().chain(others).filter(|(_, dir)| dir.is_dir()).collect()
}

/// Whether the cell in `dir` has written to a copy of a repository that lies beside its workspace.
pub(super) fn has_repository_copy(dir: &Path) -> bool {
    let copy = workspace::parts_of(dir, Some(REPOSITORY));
    copy.is_some_and(|copy| std::fs::read_dir(copy.dir).is_ok_and(|mut entries| entries.next().is_some()))
}

/// What a later cell has to be given to see a workspace as that in `dir` did.
pub(super) struct Again {
    /// What is bound before it.
    pub(super) under: Option<Over>,
    /// Its repository, where that is not in it.
    pub(super) repository: Option<Over>,
}

/// The same, of a cell whose workspaces are still mounted.
pub(super) fn again(accepted: &Accepted, dir: &Path) -> Again {
    let at = repository_at(accepted);
    let over = |source: PathBuf, target: String, read_only| {
        source.is_dir().then_some(Over { source, target, read_only })
    };
    let under = accepted.above.as_ref().and_then(|above| {
        over(dir.join(TOP), part::top_at(&accepted.plan.workspace_at, above).to_owned(), true)
    });
    let whole = workspace::parts_of(dir, Some(REPOSITORY)).filter(|parts| parts.form == Form::Whole);
    let source = whole.map_or_else(|| workspace::view_of(dir, Some(REPOSITORY)), |parts| parts.dir);
    Again { under, repository: over(source, at, false) }
}

/// Where the cell sees the repository of its workspace, if that is not in it.
fn repository_at(accepted: &Accepted) -> String {
    accepted.above.as_ref().map_or_else(
        || REPOSITORY_AT.to_owned(),
        |above| format!("{}/.git", part::top_at(&accepted.plan.workspace_at, above)),
    )
}

fn failure(error: &WorkspaceError) -> PrepareError {
    let reason = match error {
        WorkspaceError::Moved { .. } => FailReason::WorkspaceMoved,
        _ => FailReason::WorkspaceSetup,
    };
    failed(reason, error)
}
