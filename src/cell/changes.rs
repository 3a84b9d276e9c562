//! What becomes of a job's changes: taken out of its copy when its cell has ended, kept until its submitter decides,
//! and applied with the submitter's rights alone. It must never let a job be called done before its change set is on
//! the disk or its loss is told, and never touch a person's files without being asked to.

mod kept;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::committer::committer;
use super::record::{Record, RecordError};
use super::{Accepted, Parts, bundle, park};
use crate::change::decision::{
    ApplyAnswer, ApplyRequest, BranchMade, CheckoutAnswer, ExportFormat, Form, LeftOut, Standing,
};
use crate::change::{ChangeSet, Commits, HideRules, Summary};
use crate::changes::apply::{self, Applied, Apply, ApplyError, Checkout, Pending, Wish};
use crate::changes::branch::{self, BranchError, Build};
use crate::changes::export::{self, ExportError};
use crate::changes::patch::{self, Render, RenderError};
use crate::changes::{
    self, Bases, ExtractError, ExtractLimits, Extraction, Include, JobShelf, Listing, Outer, Shelf,
    ShelfError, Tree,
};
use crate::clock;
use crate::event::Body;
use crate::git::above::{self, Above};
use crate::git::head::Head;
use crate::git::identity::GitIdentity;
use crate::job::spec::WorkspaceMode;
use crate::job::{Identity, JobId};
use crate::store::Job;
use crate::workspace::{self, Access, CopyParts, Guard, WorkspaceError, WorkspaceRecord};

pub(super) use self::kept::collect_kept;

/// A copy that could not be read, beside the change set that there is none of.
const IMAGE: &str = "copy.img";
/// Columns of the figures per file.
const STAT_COLUMNS: u16 = 100;
/// Longest change set as text, in bytes.
const TEXT_BYTES_MAX: u64 = 256 << 20;

/// Longest wait for a dead daemon to let go of an application, and between two looks.
const LET_GO_MAX: Duration = Duration::from_secs(10);
const LET_GO_POLL: Duration = Duration::from_millis(50);
/// Files above so many bytes that are no text are told apart.
const LARGE_BYTES: u64 = 1 << 20;

/// A change set as it is kept.
#[derive(Debug, Clone)]
pub struct Kept {
    /// It.
    pub set: ChangeSet,
    /// SHA-256 of its stored form, in hex.
    pub hash: String,
    /// What was decided about it.
    pub standing: Standing,
    /// The branches that were made of it.
    pub branches: Vec<String>,
}

/// Why nothing can be shown, or nothing was done.
#[derive(Debug, thiserror::Error)]
pub enum ChangesError {
    /// The job goes on.
    #[error("the job is not done: what it changed is known at its end")]
    NotDone,
    /// There is no change set.
    #[error("there is no change set: {0}")]
    None(&'static str),
    /// Nobody's files are where the job worked.
    #[error(
        "the job worked on what was fetched for it, where no files of yours are: say which clone of yours it is for"
    )]
    NoPlace,
    /// It was thrown away.
    #[error("the change set was discarded")]
    Discarded,
    /// It could not be made when the job ended, and cannot be made now.
    #[error("what the job changed is still in its copy, which is kept, and cannot be taken out of it: {why}")]
    InCopy {
        /// Why not.
        why: String,
        /// What the copy takes of the disk.
        mib: u64,
    },
    /// The job's row does not parse.
    #[error("the stored job does not parse: {0}")]
    Corrupt(String),
    /// The directory cannot be used.
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
    /// It cannot be applied.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// It cannot be shown.
    #[error(transparent)]
    Render(#[from] RenderError),
    /// It cannot be made into a branch.
    #[error(transparent)]
    Branch(#[from] BranchError),
    /// It cannot be exported.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// It cannot be taken out of the copy.
    #[error(transparent)]
    Extract(#[from] ExtractError),
    /// What is kept cannot be read.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
    /// What was kept of a parked job cannot be mounted.
    #[error("what is kept of the job cannot be read: {0}")]
    Kept(String),
    /// The work died.
    #[error("the work on the change set ended early: {0}")]
    Died(String),
}

/// Where what is kept of a job lies.
pub fn shelf(parts: &Parts, job: &JobId) -> JobShelf {
    Shelf::new(parts.settings.changes_dir()).of(job)
}

/// The change set of a job that is done.
///
/// # Errors
/// [`ChangesError`].
pub async fn read(parts: &Parts, job: &Job) -> Result<Kept, ChangesError> {
    let shelf = shelf(parts, &job.row.id);
    let done = job.row.state.is_done();
    let look = |shelf: JobShelf| blocking(move || Ok((shelf.changes()?, apply::decision(&shelf)?)));
    let mut found = look(shelf.clone()).await?;
    if done && found.0.is_none() && kept::retry(parts, job, accepted(job)?).await? {
        found = look(shelf).await?;
    }
    let (Some((set, hash)), decision) = found else {
        return Err(if done { ChangesError::None(why_none(&accepted(job)?)) } else { ChangesError::NotDone });
    };
    let standing = match (&decision.discarded, decision.applied.is_empty()) {
        (Some(_), _) => Standing::Discarded,
        (None, false) => Standing::Applied,
        (None, true) => Standing::Open,
    };
    let branches = decision.branches();
    if done { Ok(Kept { set, hash, standing, branches }) } else { Err(ChangesError::NotDone) }
}

fn why_none(accepted: &Accepted) -> &'static str {
    match (accepted.plan.workspace_mode, &accepted.workspace) {
        (WorkspaceMode::Copy, Some(_)) => {
            "the job ended before it had a copy, or what it wrote could not be read"
        }
        (WorkspaceMode::Bind, Some(_)) => "the job worked on the directory itself",
        (WorkspaceMode::ReadOnly, Some(_)) => "the job could not write to its workspace",
        (WorkspaceMode::None, _) | (_, None) => "the job had no workspace",
    }
}

fn accepted(job: &Job) -> Result<Accepted, ChangesError> {
    serde_json::from_str(&job.plan_json).map_err(|e| ChangesError::Corrupt(e.to_string()))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ChangesError> + Send + 'static,
) -> Result<T, ChangesError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(ChangesError::Died(e.to_string())))
}

/// The change set as text.
///
/// # Errors
/// [`ChangesError`].
pub async fn render(
    parts: &Parts,
    job: &Job,
    form: Form,
    only: Vec<String>,
) -> Result<Vec<u8>, ChangesError> {
    rendered(parts, job, form, only, Include::All).await
}

async fn rendered(
    parts: &Parts,
    job: &Job,
    form: Form,
    only: Vec<String>,
    include: Include,
) -> Result<Vec<u8>, ChangesError> {
    let kept = read(parts, job).await?;
    let shelf = shelf(parts, &job.row.id);
    let form = match form {
        Form::Patch => patch::Form::Patch,
        Form::Stat => patch::Form::Stat,
        Form::NameOnly => patch::Form::NameOnly,
    };
    blocking(move || {
        let render = Render {
            form,
            only: &only,
            include,
            colour: false,
            width: STAT_COLUMNS,
            bytes_max: TEXT_BYTES_MAX,
            temporary: export::temporary(),
        };
        Ok(patch::render(&shelf, &kept.set, &render)?.bytes)
    })
    .await
}

/// The change set for other tools; what is refused is not in it.
///
/// # Errors
/// [`ChangesError`].
pub async fn export(parts: &Parts, job: &Job, format: ExportFormat) -> Result<Vec<u8>, ChangesError> {
    if format == ExportFormat::Patch {
        return rendered(parts, job, Form::Patch, Vec::new(), Include::Flagged).await;
    }
    let kept = read(parts, job).await?;
    let work = Commit::of(parts, job, &kept, Vec::new(), Include::Flagged).await?;
    blocking(move || {
        let mut out = Vec::new();
        let now_s = clock::wall_ms() / 1000;
        match format {
            ExportFormat::Tar => {
                export::tar(&work.shelf, &kept.set, Include::Flagged, &[], now_s, &mut out)?;
            }
            ExportFormat::Bundle | ExportFormat::Patch => {
                export::bundle(&work.build(&kept.set)?, &mut out)?;
            }
        }
        Ok(out)
    })
    .await
}

/// What commits are made of, owned.
struct Commit {
    shelf: JobShelf,
    job: JobId,
    path: Option<std::path::PathBuf>,
    identity: Identity,
    author: GitIdentity,
    include: Include,
    only: Vec<String>,
}

impl Commit {
    async fn of(
        parts: &Parts,
        job: &Job,
        kept: &Kept,
        only: Vec<String>,
        include: Include,
    ) -> Result<Self, ChangesError> {
        let identity = job.row.identity.clone();
        let path = accepted(job)?.workspace.map(|record| record.path);
        // Asked for only where there can be commits: it runs git as the submitter.
        let author = match kept.set.base.commit {
            Some(_) => committer(&identity, path.as_deref()).await,
            None => GitIdentity::new("", "", "hotcell", "localhost"),
        };
        let (shelf, job) = (shelf(parts, &job.row.id), job.row.id.clone());
        Ok(Self { shelf, job, path, identity, author, include, only })
    }

    fn build<'a>(&'a self, changes: &'a ChangeSet) -> Result<Build<'a>, ChangesError> {
        Ok(Build {
            shelf: &self.shelf,
            changes,
            job: &self.job,
            path: self.path.as_deref().ok_or(ChangesError::None("the job had no workspace"))?,
            identity: &self.identity,
            author: &self.author,
            message: None,
            include: self.include,
            only: &self.only,
            now_s: i64::try_from(clock::wall_ms() / 1000).unwrap_or(0),
            temporary: export::temporary(),
        })
    }
}

/// Makes a branch of it in the submitter's repository; their files stay as they are.
async fn make_branch(
    parts: &Parts,
    job: &Job,
    request: ApplyRequest,
    name: String,
) -> Result<ApplyAnswer, ChangesError> {
    let kept = wanted(parts, job).await?;
    let include = if request.include_flagged { Include::Flagged } else { Include::Plain };
    let mut work = Commit::of(parts, job, &kept, request.only, include).await?;
    if let Some(to) = request.to {
        let guard = Guard::for_user(&parts.settings.state_dir, work.identity.uid);
        let (identity, at) = (work.identity.clone(), to.clone());
        blocking(move || Ok(workspace::open_as(&identity, &at, Access::Write, &guard).map(|_| ())?)).await?;
        work.path = Some(to);
    }
    blocking(move || {
        let made = branch::create(&name, &work.build(&kept.set)?)?;
        let mut notes = Vec::new();
        let at = work.path.clone().unwrap_or_default();
        // It is made: that it cannot be noted is no reason to say that it is not.
        if let Err(error) = apply::branched(&work.shelf, work.identity.uid, at, made.branch.clone()) {
            notes.push(format!("it is not noted that there is a branch now: {error}"));
        }
        let branch = Some(BranchMade { name: made.branch, commit: made.commit, notes: made.notes });
        Ok(ApplyAnswer { branch, notes, ..ApplyAnswer::default() })
    })
    .await
}

/// Applies it, as its submitter and to their files.
///
/// # Errors
/// [`ChangesError`]; nothing was written then, as far as the error does not say otherwise.
pub async fn apply(parts: &Parts, job: &Job, mut request: ApplyRequest) -> Result<ApplyAnswer, ChangesError> {
    if request.to.is_none() && accepted(job)?.source.is_some() {
        return Err(ChangesError::NoPlace);
    }
    if let Some(name) = request.branch.take() {
        return make_branch(parts, job, request, name).await;
    }
    let kept = wanted(parts, job).await?;
    let (shelf, accepted, identity) = (shelf(parts, &job.row.id), accepted(job)?, job.row.identity.clone());
    let guard = Guard::for_user(&parts.settings.state_dir, identity.uid);
    blocking(move || {
        let ApplyRequest { to, only, include_flagged, three_way, check, branch: _ } = request;
        let (target, path) = match (to, &accepted.workspace) {
            (Some(to), _) => (workspace::open_as(&identity, &to, Access::Write, &guard)?.0, to),
            (None, Some(record)) => {
                let record = WorkspaceRecord { need: Access::Write, ..record.clone() };
                (workspace::reopen_as(&identity, &record, &guard)?, record.path)
            }
            (None, None) => return Err(ChangesError::None("the job had no workspace")),
        };
        let wish = Wish { only, include_flagged, three_way, check };
        let (shelf, changes) = (&shelf, &kept.set);
        let request = Apply { shelf, changes, target, path: &path, identity: &identity, wish: &wish };
        let mut answer = answer(apply::apply(&request)?, check);
        let on = kept.branches.iter().map(|name| format!("the branch {name} was made of it before"));
        answer.notes.extend(on);
        Ok(answer)
    })
    .await
}

/// A change set that was not thrown away.
async fn wanted(parts: &Parts, job: &Job) -> Result<Kept, ChangesError> {
    let kept = read(parts, job).await?;
    if kept.standing == Standing::Discarded { Err(ChangesError::Discarded) } else { Ok(kept) }
}

fn answer(applied: Applied, checked: bool) -> ApplyAnswer {
    let Applied { applied, already, merged, left_out, kept_dirs, left_behind } = applied;
    let left_out = left_out.into_iter().map(|left| LeftOut { path: left.path, why: left.why }).collect();
    let (branch, notes) = (None, Vec::new());
    ApplyAnswer { checked, applied, already, merged, left_out, kept_dirs, left_behind, branch, notes }
}

/// Writes the workspace as the job left it to a new directory, as its submitter.
///
/// # Errors
/// [`ChangesError`]; nothing is there then that was not there before.
pub async fn checkout(
    parts: &Parts,
    job: &Job,
    dir: std::path::PathBuf,
) -> Result<CheckoutAnswer, ChangesError> {
    let kept = read(parts, job).await?;
    let (shelf, accepted, identity) = (shelf(parts, &job.row.id), accepted(job)?, job.row.identity.clone());
    let guard = Guard::for_user(&parts.settings.state_dir, identity.uid);
    blocking(move || {
        let record = accepted.workspace.as_ref().ok_or(ChangesError::None("the job had no workspace"))?;
        let original = Some(workspace::reopen_as(&identity, record, &guard)?);
        let (shelf, changes, original_path) = (&shelf, &kept.set, record.path.as_path());
        let (dir, identity) = (dir.as_path(), &identity);
        let made = apply::checkout(&Checkout { shelf, changes, original, original_path, dir, identity })?;
        let left_out = made.left_out.into_iter().map(|left| LeftOut { path: left.path, why: left.why });
        Ok(CheckoutAnswer { copied: made.copied, changed: made.changed, left_out: left_out.collect() })
    })
    .await
}

/// Notes that nobody wants it. What was stored goes with the job.
///
/// # Errors
/// [`ChangesError`].
pub async fn discard(parts: &Parts, job: &Job) -> Result<(), ChangesError> {
    read(parts, job).await?;
    let (shelf, uid) = (shelf(parts, &job.row.id), job.row.identity.uid);
    blocking(move || Ok(apply::discard(&shelf, uid)?)).await
}

/// Puts right what a dead daemon left half applied. What cannot be put right now stays noted and is tried again when
/// the daemon starts next.
pub async fn recover(parts: &Parts, job: &JobId) {
    let (shelf, state_dir, id) = (shelf(parts, job), parts.settings.state_dir.clone(), job.clone());
    let put_right = blocking(move || {
        let Some(pending) = pending_at_last(&shelf)? else { return Ok(()) };
        let guard = Guard::for_user(&state_dir, pending.identity.uid);
        let (target, _) = workspace::open_as(&pending.identity, &pending.path, Access::Write, &guard)?;
        let became = apply::recover(&shelf, &target)?;
        tracing::warn!(job = %id, path = %pending.path.display(), ?became, "an interrupted application was put right");
        Ok(())
    });
    if let Err(error) = put_right.await {
        tracing::error!(%job, %error, "an interrupted application cannot be put right now");
    }
}

/// What is pending, once the dead daemon has let go of it: a thread of its may still be in the kernel.
fn pending_at_last(shelf: &JobShelf) -> Result<Option<Pending>, ApplyError> {
    let until = Instant::now() + LET_GO_MAX;
    loop {
        match apply::pending(shelf) {
            Err(ApplyError::Busy) if Instant::now() < until => std::thread::sleep(LET_GO_POLL),
            known => return known,
        }
    }
}

/// Takes out what a job changed in its copy, whose cell has ended and is not destroyed yet: its figures, or none where
/// there is no copy. What goes wrong is told in a note; the copy is kept then, so that nothing is lost. `again`: an
/// earlier daemon was at it already; what it has finished is not done anew, since its copy may be half removed.
///
/// # Errors
/// [`RecordError`] where the event about it cannot be journaled.
pub(super) async fn collect(
    parts: &Arc<Parts>,
    record: &mut Record,
    again: bool,
) -> Result<Option<Summary>, RecordError> {
    if !has_copy(record) {
        return Ok(None);
    }
    let shelf = shelf(parts, &record.job);
    let cells = parts.store.live_cells().await?;
    let cell = cells.into_iter().find(|row| row.job == record.job && row.runtime.is_some());
    if let Some(row) = &cell {
        // Nobody writes while it is read.
        park::container_gone(parts, row).await;
    }
    let dir = cell.map(|row| parts.settings.cells_dir().join(row.cell.as_str()));
    let copy = dir.as_ref().and_then(|dir| Some((dir, workspace::parts_of(dir, None)?)));
    let before = match again {
        true => taken_before(&shelf).await,
        false => Ok(None),
    };
    let mut known = Ok(None);
    let taken = match (before, copy) {
        (Ok(Some(summary)), _) => Ok(Some(summary)),
        (Err(error), _) => Err(error),
        (Ok(None), Some((dir, copy))) => {
            let seen = match copy.form {
                workspace::Form::Overlay => workspace::view_of(dir, None),
                workspace::Form::Whole => copy.dir.clone(),
            };
            let base = origin(&shelf);
            let commits = bundle::commits(parts, record, &shelf, (dir, &seen), base.commit.as_deref()).await;
            let (accepted, identity) = (record.accepted.clone(), record.identity.clone());
            let state_dir = parts.settings.state_dir.clone();
            known = commits.clone();
            let (found, shelf) = (Found { copy, base, commits }, shelf.clone());
            blocking(move || take(&accepted, &identity, found, &shelf, &state_dir)).await.map(Some)
        }
        // No cell ever had one.
        (Ok(None), None) => Ok(None),
    };
    match taken {
        Ok(summary) => {
            shelf.forget_index();
            summary.map(|summary| tell(record, summary)).transpose()
        }
        Err(why) => {
            tracing::error!(job = %record.job, %why, "what a job changed cannot be taken out of its copy");
            let kept = put_away(parts, record, known).await;
            let text = format!("what the job changed cannot be taken out of its copy: {why}; {kept}");
            record.push(&Body::Note { text })?;
            Ok(None)
        }
    }
}

async fn taken_before(shelf: &JobShelf) -> Result<Option<Summary>, ChangesError> {
    let shelf = shelf.clone();
    blocking(move || Ok(shelf.changes()?.map(|(set, hash)| set.summary(hash)))).await
}

/// Keeps the copy itself: what became of it, in words.
async fn put_away(parts: &Arc<Parts>, record: &Record, commits: Result<Option<Commits>, String>) -> String {
    match park::keep_work(parts, record).await {
        Ok(true) => {
            let (from, shelf) = (parts.settings.kept(&record.job), shelf(parts, &record.job));
            kept::put_image_away(from, shelf, commits).await
        }
        Ok(false) => "its copy is lost with its cell".to_owned(),
        Err(error) => format!("its copy cannot be kept either: {error}"),
    }
}

/// Whether what the job changes is taken out of a copy.
fn has_copy(record: &Record) -> bool {
    record.accepted.plan.workspace_mode == WorkspaceMode::Copy && record.accepted.workspace.is_some()
}

fn tell(record: &mut Record, summary: Summary) -> Result<Summary, RecordError> {
    record.push(&Body::Changes { summary: Box::new(summary.clone()) })?;
    Ok(summary)
}

/// What is known of a copy before it is taken.
struct Found {
    copy: CopyParts,
    base: Head,
    commits: Result<Option<Commits>, String>,
}

/// What was checked out when the job began.
fn origin(shelf: &JobShelf) -> Head {
    shelf.origin().unwrap_or_else(|error| {
        tracing::warn!(%error, "what was checked out when a job began cannot be read");
        Head::default()
    })
}

/// What the repository above a workspace says of it now.
fn outer_of(identity: &Identity, above: &Above) -> Result<Outer, WorkspaceError> {
    let (exclude, files) = above::ignores(identity, above)?;
    Ok(Outer { below: above.below.clone(), exclude, files })
}

/// Takes it. Blocks.
fn take(
    accepted: &Accepted,
    identity: &Identity,
    Found { copy, base, commits }: Found,
    shelf: &JobShelf,
    state_dir: &std::path::Path,
) -> Result<Summary, ChangesError> {
    let record = accepted.workspace.as_ref().ok_or(ChangesError::None("the job had no workspace"))?;
    let listing =
        shelf.base()?.ok_or(ChangesError::None("there is no listing of the workspace before the job"))?;
    let listing = Listing::decode(&listing).map_err(|e| ChangesError::Corrupt(e.to_string()))?;
    shelf.tidy()?;
    let guard = Guard::for_user(state_dir, identity.uid);
    // Moved or gone meanwhile: what it was is not known any more, what the job made of it is.
    let original = workspace::reopen_as(identity, record, &guard).ok();
    let hide = HideRules::new(&accepted.plan.hide).map_err(|e| ChangesError::Corrupt(e.to_string()))?;
    let limits = ExtractLimits { large_bytes: LARGE_BYTES, ..ExtractLimits::default() };
    let tree = match copy.form {
        workspace::Form::Overlay => Tree::Upper { upper: &copy.dir },
        workspace::Form::Whole => Tree::Whole { tree: &copy.dir },
    };
    let index = shelf.index()?;
    let temporary = export::temporary();
    let bases = index.as_ref().map(|(index, written_ns)| Bases {
        index,
        written_ns: *written_ns,
        path: &record.path,
        temporary,
    });
    let outer = accepted.above.as_ref().map(|above| outer_of(identity, above)).transpose()?;
    let mut set = changes::extract(&Extraction {
        tree,
        original: original.as_ref().map(AsFd::as_fd),
        listing: &listing,
        shelf,
        hide: &hide,
        changes: &accepted.plan.changes,
        keep_ignored: accepted.keep_ignored,
        bases: bases.as_ref(),
        outer: outer.as_ref(),
        identity,
        limits: &limits,
    })?;
    (set.base.commit, set.base.branch) = (base.commit, base.branch);
    match commits {
        Ok(commits) => set.commits = commits,
        Err(why) => set.notes.push(why),
    }
    let hash = shelf.put_changes(&set)?;
    Ok(set.summary(hash))
}
