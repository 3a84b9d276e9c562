//! The rooms of a cell on the host: its directory, its staged workspace, its scratch space, and the user
//! database it sees. All of it blocks. What is made here is taken down by the sweep of the cell's directory,
//! whoever of us is still alive then.

use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::beside::beside;
use super::prepare::{PrepareError, failed};
use super::work::{self, Over, Seen, Staged};
use super::{Accepted, Settings};
use crate::agent::{options, surroundings};
use crate::git::commit_hook;
use crate::job::spec::Runtime;
use crate::job::{FailReason, Identity, JobId};
use crate::policy::{Plan, PlanLimits};
use crate::workspace::{self, Scratch, ScratchError, ScratchPlan, StagedPart};

/// Files and directories that a scratch space can hold, per MiB of its size.
const INODES_PER_MIB: u64 = 128;
/// What shells and git read at their start, below HOME.
const START_FILES: [&str; 11] = [
    ".profile",
    ".bash_profile",
    ".bash_login",
    ".bash_logout",
    ".bashrc",
    ".zshenv",
    ".zprofile",
    ".zshrc",
    ".zlogin",
    ".gitconfig",
    ".config/git/config",
];

/// Most open files of a process in a cell.
const NOFILE_MAX: u32 = 65_536;

/// Where the cell's parts lie on the host.
pub(super) struct Dirs {
    pub(super) run: PathBuf,
    pub(super) etc: PathBuf,
    pub(super) home: PathBuf,
    pub(super) tmp: PathBuf,
    pub(super) workspace: PathBuf,
    /// The engine has to make the workspace read-only: no mount of ours does.
    pub(super) workspace_read_only: bool,
    /// What is bound before the workspace.
    pub(super) under: Option<Over>,
    /// What is bound over the workspace, to be written.
    pub(super) parts: Vec<StagedPart>,
    /// What else is bound, over the workspace or beside it.
    pub(super) over: Vec<Over>,
    /// The CLI's program.
    pub(super) claude: PathBuf,
}

/// Whose rooms they are to be.
#[derive(Debug, Clone)]
pub(super) struct Tenant {
    /// The cell's private uid.
    pub(super) uid: u32,
    /// What will isolate it.
    pub(super) runtime: Runtime,
    /// The CLI's program, root's and execute-only.
    pub(super) claude: PathBuf,
    /// What it writes to a copy is kept; else it is thrown away.
    pub(super) kept: bool,
}

/// Whom the cell runs as.
#[derive(Debug, Clone)]
pub(super) struct Who {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
}

impl Who {
    pub(super) fn owner(&self) -> (u32, u32) {
        (self.uid, self.gid)
    }
}

/// An engine cannot give more than it has itself, and on one machine it mostly has what we have.
pub(super) fn nofile_max() -> u32 {
    let own = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    own.and_then(|n| u32::try_from(n).ok()).map_or(NOFILE_MAX, |n| n.min(NOFILE_MAX))
}

/// What this machine has, in thousandths of a core.
pub(super) fn cores_milli() -> u32 {
    std::thread::available_parallelism().map_or(1000, |n| u32::try_from(n.get() * 1000).unwrap_or(u32::MAX))
}

/// How many files and directories a scratch space of `bytes` can hold.
pub(super) fn inodes_max(bytes: u64) -> u64 {
    bytes / (1024 * 1024) * INODES_PER_MIB
}

/// What the blocking part of the preparation gives back.
pub(super) struct Made {
    pub(super) dirs: Dirs,
    pub(super) who: Who,
    pub(super) notes: Vec<String>,
    pub(super) claude_md: Option<String>,
    /// The conversation of an earlier attempt is there.
    pub(super) resumed: bool,
    /// How long the listing of the workspace took, where one is kept, and everything else.
    pub(super) took: (Option<Duration>, Duration),
}

/// What an earlier attempt of the job may have left.
pub(super) struct Kept {
    /// Its scratch space.
    pub(super) image: PathBuf,
    /// The CLI's record of the conversation, below HOME.
    pub(super) session: PathBuf,
}

/// Whom the cell in `dir` runs as: not always its private uid, since some file systems cannot map ids.
pub(super) fn owner_of(dir: &Path) -> Option<(u32, u32)> {
    use std::os::unix::fs::MetadataExt;
    let home = Scratch::adopt(dir).ok()??.home();
    std::fs::symlink_metadata(home).ok().map(|meta| (meta.uid(), meta.gid()))
}

/// Makes all rooms of one cell of `job` in `dir`. Blocks. What does not depend on the workspace is made while that is
/// looked through.
pub(super) fn make(
    settings: &Settings,
    accepted: &Accepted,
    identity: &Identity,
    tenant: &Tenant,
    (dir, job): (&Path, &JobId),
    kept: Option<&Kept>,
) -> Result<Made, PrepareError> {
    let begun = Instant::now();
    make_dir(&settings.cells_dir(), 0o711)?;
    make_dir(dir, 0o711)?;
    let limits = &accepted.plan.limits;
    let bare = || Bare::make(settings, limits, (dir, job), kept);
    let stage = || work::stage(settings, accepted, identity, tenant, dir, job);
    let (bare, staged) = beside("hotcell-rooms", bare, stage).map_err(|e| failed(FailReason::Internal, e))?;
    // What is wrong with the workspace is its submitter's to know first.
    let staged = staged?;
    let snapshot = staged.snapshot;
    let mut made = finish_directories(&accepted.plan, tenant, dir, staged, bare?)?;
    made.took = (snapshot, begun.elapsed().saturating_sub(snapshot.unwrap_or_default()));
    Ok(made)
}

/// The rooms as far as they are the same for every workspace.
struct Bare {
    scratch: Scratch,
    plan: ScratchPlan,
    /// The scratch space is an earlier attempt's; none: a new one, still empty.
    resumed: Option<bool>,
    run: PathBuf,
    etc: PathBuf,
    notes: Vec<String>,
}

impl Bare {
    fn make(
        settings: &Settings,
        limits: &PlanLimits,
        (dir, job): (&Path, &JobId),
        kept: Option<&Kept>,
    ) -> Result<Self, PrepareError> {
        let plan = ScratchPlan {
            bytes_max: limits.disk_bytes,
            inodes_max: inodes_max(limits.disk_bytes),
            host_reserve_bytes: settings.disk_reserve_bytes,
            template_dir: settings.state_dir.join("scratch-templates"),
        };
        make_dir(&plan.template_dir, 0o700)?;
        let mut notes = Vec::new();
        let restored = kept.and_then(|kept| restore(dir, kept, &plan, &mut notes));
        let (scratch, resumed) = match restored {
            Some((scratch, resumed)) => (scratch, Some(resumed)),
            None => (Scratch::begin(dir, &plan).map_err(|e| scratch_failure(&e))?, None),
        };
        if let Some(why) = scratch.fallback_reason() {
            notes.push(format!("the disk limit is not enforced by the kernel here: {why}"));
        }
        let (run, etc) = (dir.join("run"), dir.join("etc"));
        make_dir(&run, 0o711)?;
        make_dir(&etc, 0o711)?;
        make_dir(&etc.join("claude-code"), 0o755)?;
        write_hooks(&etc.join("git-hooks"), job)?;
        Ok(Self { scratch, plan, resumed, run, etc, notes })
    }
}

/// What git runs at a commit in the cell: it names the job, then calls the repository's own hooks.
fn write_hooks(dir: &Path, job: &JobId) -> Result<(), PrepareError> {
    make_dir(dir, 0o755)?;
    for (name, mode, text) in commit_hook::hook_files(job) {
        let path = dir.join(name);
        let written = std::fs::write(&path, text)
            .and_then(|()| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)));
        written.map_err(|e| io_failure(&path, &e))?;
    }
    Ok(())
}

fn finish_directories(
    cell_plan: &Plan,
    tenant: &Tenant,
    dir: &Path,
    mut staged: Staged,
    bare: Bare,
) -> Result<Made, PrepareError> {
    let who = staged.who.clone();
    let (mut notes, claude_md) = (std::mem::take(&mut staged.notes), staged.claude_md.take());
    let Bare { scratch, plan, resumed, run, etc, notes: more } = bare;
    notes.extend(more);
    if resumed.is_none() {
        scratch.furnish(who.uid, who.gid).map_err(|e| scratch_failure(&e))?;
        write_home(&scratch.home(), &who, cell_plan)?;
    }
    write_users(&etc, &who)?;
    let Seen { path: workspace, read_only: workspace_read_only, under, parts, over, notes: more } =
        staged.finish(dir, &scratch, &cell_plan.limits, plan.inodes_max)?;
    notes.extend(more);
    let claude = readable_program(tenant, &who, dir)?;
    let (home, tmp) = (scratch.home(), scratch.tmp());
    let dirs = Dirs { run, etc, home, tmp, workspace, workspace_read_only, under, parts, over, claude };
    let resumed = resumed.unwrap_or_default();
    Ok(Made { dirs, who, notes, claude_md, resumed, took: Default::default() })
}

/// The scratch space of an earlier attempt, and whether its conversation is in it. What cannot be had again is no
/// reason to fail: the task is given again then.
fn restore(dir: &Path, kept: &Kept, plan: &ScratchPlan, notes: &mut Vec<String>) -> Option<(Scratch, bool)> {
    match Scratch::restore(dir, &kept.image, plan) {
        Ok(Some(scratch)) => {
            forget_start_files(&scratch.home());
            let resumed = is_file_below(&scratch.home(), &kept.session);
            Some((scratch, resumed))
        }
        Ok(None) => None,
        Err(error) => {
            notes.push(format!("what an earlier attempt left cannot be used: {error}"));
            None
        }
    }
}

/// Files that shells and git run or obey by themselves. The CLI starts both before any tool call of the new attempt
/// is judged, so what the agent wrote there in the last one is taken away. Nothing of it is followed.
fn forget_start_files(home: &Path) {
    use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags};
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::DIRECTORY;
    let Ok(home) = rustix::fs::openat(CWD, home, flags, Mode::empty()) else { return };
    for name in START_FILES {
        let (dir, file) = name.rsplit_once('/').unwrap_or((".", name));
        let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        if let Ok(dir) = rustix::fs::openat2(&home, dir, flags, Mode::empty(), how) {
            // Absent, or a directory, which nobody runs.
            let _ = rustix::fs::unlinkat(&dir, file, AtFlags::empty());
        }
    }
}

/// Looks without following a symlink: the agent could have made any.
fn is_file_below(dir: &Path, path: &Path) -> bool {
    use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let Ok(dir) = rustix::fs::openat(CWD, dir, flags | OFlags::DIRECTORY, Mode::empty()) else {
        return false;
    };
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(&dir, path, flags, Mode::empty(), how)
        .and_then(|file| rustix::fs::fstat(&file))
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
}

/// gVisor reads a program to execute it, so there the cell's user is shown as its owner. What execute-only is
/// for elsewhere, its kernel does by itself: no process attaches to its parent or opens its memory (seen with
/// the release of December 2022).
fn readable_program(tenant: &Tenant, who: &Who, dir: &Path) -> Result<PathBuf, PrepareError> {
    if tenant.runtime == Runtime::Runc || !rustix::process::geteuid().is_root() {
        return Ok(tenant.claude.clone());
    }
    let target = dir.join("claude");
    workspace::stage_program(&tenant.claude, who.owner(), &target)
        .map_err(|e| failed(FailReason::RuntimeUnavailable, e))?;
    Ok(target)
}

/// What tools find below a HOME that nobody has had yet. It is the cell's, like all else there.
fn write_home(home: &Path, who: &Who, plan: &Plan) -> Result<(), PrepareError> {
    use rustix::fs::{Gid, Uid};
    let owned = rustix::process::geteuid().is_root();
    let give = |path: &Path| match owned {
        true => rustix::fs::chown(path, Some(Uid::from_raw(who.uid)), Some(Gid::from_raw(who.gid))),
        false => Ok(()),
    };
    for (below, text) in surroundings::home_files(plan) {
        let path = home.join(below);
        let folders: Vec<&Path> = path.ancestors().skip(1).take_while(|folder| *folder != home).collect();
        for folder in folders.into_iter().rev() {
            make_dir(folder, 0o755)?;
            give(folder).map_err(|e| io_failure(folder, &e.into()))?;
        }
        std::fs::write(&path, text).map_err(|e| io_failure(&path, &e))?;
        give(&path).map_err(|e| io_failure(&path, &e.into()))?;
    }
    Ok(())
}

/// A user database for the cell: programs ask for the name of the user they run as.
fn write_users(etc: &Path, who: &Who) -> Result<(), PrepareError> {
    let home = options::HOME;
    let passwd = format!(
        "root:x:0:0:root:/root:/usr/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\nagent:x:{}:{}:agent:{home}:/bin/sh\n",
        who.uid, who.gid
    );
    let mut group = format!("root:x:0:\nnogroup:x:65534:\nagent:x:{}:\n", who.gid);
    for (index, gid) in who.groups.iter().enumerate() {
        group.push_str(&format!("group{}:x:{gid}:agent\n", index + 1));
    }
    for (name, text) in [("passwd", passwd), ("group", group)] {
        let path = etc.join(name);
        let written = std::fs::write(&path, text)
            .and_then(|()| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)));
        written.map_err(|e| io_failure(&path, &e))?;
    }
    Ok(())
}

fn make_dir(path: &Path, mode: u32) -> Result<(), PrepareError> {
    match std::fs::DirBuilder::new().mode(mode).create(path) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => return Ok(()),
        Err(e) => return Err(io_failure(path, &e)),
    }
    // The umask may have taken bits away.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(|e| io_failure(path, &e))
}

fn scratch_failure(error: &ScratchError) -> PrepareError {
    failed(FailReason::WorkspaceSetup, error)
}

fn io_failure(path: &Path, error: &std::io::Error) -> PrepareError {
    failed(FailReason::Internal, format!("cannot write {}: {error}", path.display()))
}
