//! What becomes of a job's changes: taken out of its copy when its cell has ended, kept until its submitter decides,
//! and applied with the submitter's rights alone. It must never let a job be called done before its change set is on
//! the disk or its loss is told, and never touch a person's files without being asked to.

mod collect;
mod kept;

use std::time::{Duration, Instant};

use super::committer::committer;
use super::{Accepted, Parts, Settings};
use crate::change::ChangeSet;
use crate::change::decision::{
    ApplyAnswer, ApplyRequest, BranchMade, CheckoutAnswer, ExportFormat, Form, LeftOut, Standing,
};
use crate::changes::apply::{self, Applied, Apply, ApplyError, Checkout, Wish};
use crate::changes::branch::{self, BranchError, Build};
use crate::changes::export::{self, ExportError};
use crate::changes::patch::{self, Render, RenderError};
use crate::changes::{ExtractError, Include, JobShelf, Shelf, ShelfError};
use crate::clock;
use crate::git::identity::GitIdentity;
use crate::job::spec::WorkspaceMode;
use crate::job::{Identity, JobId};
use crate::store::Job;
use crate::workspace::{self, Access, Guard, WorkspaceError, WorkspaceRecord};

pub(super) use self::collect::collect;
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

/// Forgets the change set of a job whose agent goes on with its work: there will be another one.
pub(super) async fn forget(parts: &Parts, job: &JobId) {
    let shelf = shelf(parts, job);
    if let Err(error) = blocking(move || Ok(shelf.forget_changes()?)).await {
        tracing::warn!(%job, %error, "a change set that is to be made again is left");
    }
}

/// Puts right what a dead daemon left half applied. What cannot be put right now stays noted and is tried again when
/// the daemon starts next.
pub async fn recover(settings: &Settings, job: &JobId) {
    let shelf = Shelf::new(settings.changes_dir()).of(job);
    let (state_dir, id) = (settings.state_dir.clone(), job.clone());
    let put_right = blocking(move || {
        let checkouts = let_go(|| apply::recover_checkouts(&shelf), |e| matches!(e, ApplyError::Busy))?;
        let branches = let_go(|| branch::recover(&shelf), |e| matches!(e, BranchError::Busy))?;
        if checkouts + branches > 0 {
            tracing::warn!(job = %id, checkouts, branches, "what was interrupted was put right");
        }
        let pending = let_go(|| apply::pending(&shelf), |e| matches!(e, ApplyError::Busy))?;
        shelf.forget_unwritten()?;
        let Some(pending) = pending else {
            return Ok(());
        };
        let guard = Guard::for_user(&state_dir, pending.identity.uid);
        let (target, _) = workspace::open_as(&pending.identity, &pending.path, Access::Write, &guard)?;
        let became = apply::recover(&shelf, &target)?;
        tracing::warn!(job = %id, path = %pending.path.display(), ?became, "an interrupted application was put right");
        Ok(())
    });
    if let Err(error) = put_right.await {
        tracing::error!(%job, %error, "what was interrupted of a change set's application, checkout or branch cannot be put right now");
    }
}

/// Asks until the dead daemon has let go: a thread of its may still be in the kernel.
fn let_go<T, E>(mut ask: impl FnMut() -> Result<T, E>, busy: impl Fn(&E) -> bool) -> Result<T, E> {
    let until = Instant::now() + LET_GO_MAX;
    loop {
        match ask() {
            Err(error) if busy(&error) && Instant::now() < until => std::thread::sleep(LET_GO_POLL),
            known => return known,
        }
    }
}
