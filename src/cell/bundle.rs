//! The agent's own commits: taken out of a copy by running git where the agent ran it, in a second cell with the same
//! copy and nothing else, and checked on the host before they are kept. Nothing in the copy is ever given to git on
//! the host. A job without commits of its agent's costs no cell.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use tokio::sync::watch;

use super::prepare::{self, Launch, Names, PrepareError, failed};
use super::record::Record;
use super::rooms::{Kept, Tenant};
use super::work::{self, Again};
use super::{Parts, runtime};
use crate::change::Commits;
use crate::changes::JobShelf;
use crate::changes::commits::{BundleLimits, bundle_command, import_bundle};
use crate::changes::export::temporary;
use crate::git::head::{Head, Repository, head_of};
use crate::job::FailReason;
use crate::job::spec::WorkspaceMode;
use crate::link::{Link, Resume};
use crate::workspace::{self, Scratch};

/// Longest run of the second cell.
const WALL_MS: u64 = 120_000;
/// Longest wait for it.
const WAIT_MAX: Duration = Duration::from_secs(150);
/// Its disk: twice the longest bundle, in bytes.
const DISK_BYTES: u64 = 1 << 30;
/// Longest bundle, in bytes.
const BUNDLE_BYTES_MAX: u64 = 512 << 20;
/// Longest `.git` file, in bytes.
const LINK_BYTES_MAX: u64 = 8 * 1024;
/// What it is called in the cell's /tmp.
const FILE: &str = "hotcell.bundle";

/// The commits beyond `base` that are checked out in the copy which the cell in `dir` saw as `seen`; none where
/// there are none. What goes wrong is told in words: the files are not lost by it.
pub(super) async fn commits(
    parts: &Arc<Parts>,
    record: &mut Record,
    shelf: &JobShelf,
    (dir, seen): (&Path, &Path),
    base: Option<&str>,
) -> Result<Option<Commits>, String> {
    let again = work::again(&record.accepted, dir);
    if !moved(seen, again.repository.as_ref().map(|repository| repository.source.as_path()), base) {
        return Ok(None);
    }
    let made = second_cell(parts, record, Source::Seen(seen, again), base).await;
    taken_in(record, shelf, base, made).await
}

/// The same of a job that has no cell: what is kept of its last one is `image`. Its cell is left to be destroyed.
pub(super) async fn commits_kept(
    parts: &Arc<Parts>,
    record: &mut Record,
    shelf: &JobShelf,
    image: &Path,
    base: Option<&str>,
) -> Result<Option<Commits>, String> {
    let made = second_cell(parts, record, Source::Kept(image), base).await;
    taken_in(record, shelf, base, made).await
}

async fn taken_in(
    record: &Record,
    shelf: &JobShelf,
    base: Option<&str>,
    made: Result<Option<std::fs::File>, PrepareError>,
) -> Result<Option<Commits>, String> {
    let bundle = match made {
        Ok(bundle) => bundle,
        Err(PrepareError::Failed(failure)) => return Err(failure.message),
        Err(PrepareError::Stopped(_, detail)) => return Err(detail),
        Err(PrepareError::Record(error)) => return Err(error.to_string()),
    };
    let Some(mut file) = bundle else { return Ok(None) };
    let path = record.accepted.workspace.as_ref().map(|workspace| workspace.path.clone());
    let path = path.ok_or("the job had no workspace")?;
    let (shelf, identity, base) = (shelf.clone(), record.identity.clone(), base.map(str::to_owned));
    let limits = BundleLimits { bytes_max: BUNDLE_BYTES_MAX, ..BundleLimits::default() };
    let import =
        move || import_bundle(&mut file, &shelf, &path, &identity, base.as_deref(), temporary(), &limits);
    let taken = tokio::task::spawn_blocking(import).await.map_err(|e| e.to_string())?;
    taken.map_err(|e| e.to_string())
}

/// Whether something else is checked out than when the job began; `repository`: where that of the workspace lies,
/// where it is not in it. Looked at without git.
fn moved(seen: &Path, repository: Option<&Path>, base: Option<&str>) -> bool {
    let head = match repository {
        Some(repository) => head_beside(seen, repository),
        None => opened_dir(seen).and_then(|dir| head_of(dir.as_fd())),
    };
    head.and_then(|head| head.commit).is_some_and(|commit| Some(commit.as_str()) != base)
}

/// What is checked out in a workspace whose repository lies in `repository`: as one of its worktrees, where the
/// workspace says so, else as its own.
fn head_beside(seen: &Path, repository: &Path) -> Option<Head> {
    let dir = opened_dir(repository)?;
    let link = workspace::take_file(seen, Path::new(".git"), LINK_BYTES_MAX).ok();
    let own = match link.as_ref().and_then(|link| worktree_name(&link.bytes)) {
        Some(name) => {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
            let below = format!("worktrees/{name}");
            rustix::fs::openat2(&dir, below, flags, Mode::empty(), resolve).ok()?
        }
        None => dir,
    };
    Repository::of(own).ok()?.head().ok()
}

/// The name of the worktree that a `.git` file names.
fn worktree_name(link: &[u8]) -> Option<&str> {
    let place = std::str::from_utf8(link).ok()?.strip_prefix("gitdir: ")?.trim_end();
    let name = place.strip_prefix(work::REPOSITORY_AT)?.strip_prefix("/worktrees/")?;
    (!name.is_empty() && !name.contains('/')).then_some(name)
}

fn opened_dir(dir: &Path) -> Option<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, dir, flags, Mode::empty()).ok()
}

/// What the second cell is to see.
enum Source<'a> {
    /// What an earlier cell that is still mounted saw.
    Seen(&'a Path, Again),
    /// What is kept of one that is gone, over the workspace as it was.
    Kept(&'a Path),
}

/// Runs git in a cell of its own, and gives what it wrote.
async fn second_cell(
    parts: &Arc<Parts>,
    record: &mut Record,
    source: Source<'_>,
    base: Option<&str>,
) -> Result<Option<std::fs::File>, PrepareError> {
    let (_nobody, mut not_stopped) = watch::channel(None);
    let former = parts.store.cell_of(&record.job).await?;
    let image = prepare::find_image(parts, record, &mut not_stopped).await?;
    let chosen = runtime::choose(parts, record, &image, &mut not_stopped).await?;
    let names = Names::new(former.as_ref(), &record.job)?;
    parts.store.put_cell(names.row(record, None)).await?;
    let mut accepted = record.accepted.clone();
    accepted.from = None;
    accepted.others.clear();
    let kept = match &source {
        Source::Seen(..) => {
            (accepted.workspace, accepted.above) = (None, None);
            accepted.plan.workspace_mode = WorkspaceMode::None;
            accepted.plan.limits.disk_bytes = DISK_BYTES;
            None
        }
        Source::Kept(image) => Some(Kept { image: image.to_path_buf(), session: PathBuf::new() }),
    };
    let claude = image.claude.clone();
    let tenant = Tenant { uid: names.uid, runtime: chosen.runtime, claude, kept: true };
    let made = prepare::make_rooms(parts, record, &names, tenant, accepted, kept).await?;
    let (mut dirs, who) = (made.dirs, made.who);
    let dir = parts.settings.cells_dir().join(names.cell.as_str());
    match source {
        Source::Seen(seen, again) => {
            dirs.workspace = seen.to_owned();
            dirs.under = again.under;
            dirs.over.extend(again.repository);
        }
        // It sees all of it already.
        Source::Kept(_) => {
            let repository = work::again(&record.accepted, &dir).repository;
            if !moved(&dirs.workspace, repository.as_ref().map(|r| r.source.as_path()), base) {
                return Ok(None);
            }
        }
    }
    let mut spec = prepare::cell_spec(parts, record, &names.cell, &image, &dirs, &who);
    spec.runtime = chosen.engine_name;
    let at = record.accepted.plan.workspace_at.clone();
    let argv = bundle_command(&at, base, &format!("/tmp/{FILE}"), BUNDLE_BYTES_MAX);
    let settings = safe_directory();
    let launch = Launch { more: &settings, ..Launch::of(argv, WALL_MS, record) };
    let boot = prepare::boot_with(parts, record, &names, &image, launch)?;
    let mut link = Link::bind(&dirs.run, &names.cell, names.key.clone(), Resume::default(), who.owner())
        .await
        .map_err(|e| failed(FailReason::Internal, e))?;
    let started = prepare::start(parts, &names.cell, &spec, &boot, &not_stopped).await;
    let ended = match started {
        Ok(container) => {
            let ended = parts.engine.wait(&container);
            let listened = tokio::time::timeout(WAIT_MAX, runtime::listen(&mut link, ended)).await;
            // Whatever it does by now: what it wrote is read when it cannot write any more.
            let killed = parts.engine.remove(&container).await;
            killed.map_err(|e| prepare::engine_failure(FailReason::Internal, &e))?;
            listened.unwrap_or_else(|_| Err(format!("git did not end within {} s", WAIT_MAX.as_secs())))
        }
        Err(error) => {
            prepare::leave_link(record, link).await;
            return Err(error);
        }
    };
    prepare::leave_link(record, link).await;
    match (opened(&dir), ended) {
        (Ok(Some(file)), _) => Ok(Some(file)),
        // Git has nothing to pack where HEAD is none of its commits' children.
        (Ok(None), Ok(())) => Ok(None),
        (Ok(None), Err(why)) => {
            Err(failed(FailReason::Internal, format!("the agent's commits were not packed: {why}")))
        }
        (Err(why), _) => Err(failed(FailReason::Internal, why)),
    }
}

/// The bundle that the cell in `dir` left; none where git had nothing to pack.
fn opened(dir: &Path) -> Result<Option<std::fs::File>, String> {
    let scratch = Scratch::adopt(dir).map_err(|e| e.to_string())?.ok_or("its scratch space is gone")?;
    match workspace::open_file(&scratch.tmp(), &PathBuf::from(FILE)) {
        Ok(file) => Ok(Some(file)),
        Err(workspace::TakeError::Missing) => Ok(None),
        Err(error) => Err(format!("the agent's commits cannot be read: {error}")),
    }
}

/// The workspace may belong to another id than the one git runs as.
fn safe_directory() -> Vec<(String, String)> {
    [("GIT_CONFIG_COUNT", "1"), ("GIT_CONFIG_KEY_0", "safe.directory"), ("GIT_CONFIG_VALUE_0", "*")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
}
