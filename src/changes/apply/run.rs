//! The order of an application: look, journal, stage, move, clean up; and the way back. Nothing moves before the
//! journal tells it, and nothing old is removed before the journal says that all is done.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::accept::accept;
use super::journal::{Journal, Pending, Steps, Told, read};
use super::judge::Judge;
use super::look::Root;
use super::moves::{NoMove, Op};
use super::plan::{Plan, plan};
use super::select::{Selection, select};
use super::stage::{NotStaged, Staging, fresh_name};
use super::{APPLY_TIME_MAX, Accepted, Applied, Apply, ApplyError, Conflict, Step, at};
use crate::change::TreePath;
use crate::changes::JobShelf;
use crate::changes::durable::flush_all;
use crate::clock;
use crate::workspace::as_submitter;

/// Most directories that are open and wait for the disk together.
const BATCH_MAX: usize = 256;

/// What became of an application that a dead process left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recovered {
    /// There was none.
    Nothing,
    /// It was taken back: the directory is as it was before.
    RolledBack,
    /// All had been done: it is recorded now.
    Finished(Box<Accepted>),
}

/// Applies a change set and records it. Blocks, for half an hour at most.
///
/// # Errors
/// [`ApplyError`]: nothing was changed then, but for [`ApplyError::Stuck`], and a file system that does not answer
/// ([`ApplyError::Workspace`]): what was begun there is put right by [`recover`].
pub fn apply(apply: &Apply<'_>) -> Result<Applied, ApplyError> {
    stepwise(apply, Arc::new(|| Ok(())))
}

pub(super) fn stepwise(apply: &Apply<'_>, step: Step) -> Result<Applied, ApplyError> {
    // What a dead process left half done must not be looked at as if somebody had wanted it.
    Journal::none(apply.shelf)?;
    let selection = select(apply.changes, apply.wish)?;
    let (dev, ino) = identity_of(&apply.target, apply.path)?;
    let plan = looked(apply, selection)?;
    if apply.wish.check || plan.ops.is_empty() {
        return Ok(plan.outline);
    }
    let staging = fresh_name().map_err(at("name a directory in", apply.path))?;
    let (identity, path) = (apply.identity.clone(), apply.path.to_owned());
    let pending = Pending { identity, path, dev, ino, staging };
    let mut journal = Journal::begin(apply.shelf, &pending)?;
    let accepted = Accepted {
        at_ms: clock::wall_ms(),
        uid: apply.identity.uid,
        path: apply.path.to_owned(),
        branch: None,
        result: plan.outline.clone(),
    };
    let (root, blobs) =
        match root(&apply.target, apply.path).and_then(|root| Ok((root, apply.shelf.blobs_dir()?))) {
            Ok(both) => both,
            Err(error) => {
                journal.end(apply.shelf)?;
                return Err(error);
            }
        };
    let told = accepted.clone();
    let work = move || {
        let done = carry_out(&root, &blobs, plan, &mut journal, (&pending.staging, told), &step);
        Ok((journal, done))
    };
    match as_submitter(apply.identity, apply.path, APPLY_TIME_MAX, work) {
        Ok((journal, Ok(applied))) => {
            // It is done; where this cannot be written, the journal stays, and it is recorded from that.
            match accept(apply.shelf, &accepted) {
                Ok(()) => journal.end(apply.shelf)?,
                Err(error) => tracing::warn!(%error, "an applied change set is not recorded yet"),
            }
            Ok(applied)
        }
        Ok((journal, Err(error))) => {
            journal.end(apply.shelf)?;
            Err(error)
        }
        Err(error) => {
            // The thread did not begin, or it hangs: then it still holds the lock.
            let never = |told: &Told| told.steps.is_none();
            if let Ok(Some(journal)) = Journal::reopen(apply.shelf)
                && read(apply.shelf)?.as_ref().is_none_or(never)
            {
                journal.end(apply.shelf)?;
            }
            Err(error)
        }
    }
}

fn identity_of(target: &OwnedFd, path: &Path) -> Result<(u64, u64), ApplyError> {
    rustix::fs::fstat(target).map(|stat| (stat.st_dev, stat.st_ino)).map_err(at("look at", path))
}

fn root(target: &OwnedFd, path: &Path) -> Result<Root, ApplyError> {
    Ok(Root { fd: target.try_clone().map_err(at("open", path))?, path: path.to_owned() })
}

/// Looks at everything, as the submitter.
fn looked(apply: &Apply<'_>, selection: Selection) -> Result<Plan, ApplyError> {
    let (root, blobs) = (root(&apply.target, apply.path)?, apply.shelf.blobs_dir()?);
    let (uid, three_way) = (apply.identity.uid, apply.wish.three_way);
    as_submitter(apply.identity, apply.path, APPLY_TIME_MAX, move || {
        let judge = Judge { root: &root, blobs: &blobs, three_way };
        plan(&judge, uid, &selection).map_err(ApplyError::Conflicts)
    })
}

/// All that changes the directory; runs as the submitter.
fn carry_out(
    root: &Root,
    blobs: &OwnedFd,
    mut plan: Plan,
    journal: &mut Journal,
    (name, accepted): (&str, Accepted),
    step: &Step,
) -> Result<Applied, ApplyError> {
    step().map_err(at("write in", &root.path))?;
    let staging = Staging::make(root, name).map_err(|error| not_staged(root, name, error))?;
    let staged = staging.fill(&plan.fresh, &mut plan.ops, blobs, step);
    let staged = staged.map_err(|error| not_staged(root, name, error)).and_then(|staged_until_ns| {
        step().map_err(at("write in", &root.path))?;
        let steps = Steps { ops: plan.ops.clone(), staged_until_ns, accepted };
        journal.steps(steps).map_err(at("write the journal of", &root.path))?;
        Ok(staged_until_ns)
    });
    let staged_until_ns = match staged {
        Ok(until) => until,
        Err(error) => {
            let removed = staging.remove(root, None);
            return Err(removed.err().map_or(error, |left| stuck(root, name, vec![left.to_string()])));
        }
    };
    let moved = all_moves(root, &staging, &plan.ops, step).and_then(|()| {
        flush(root, &staging.fd, &plan.ops).map_err(at("flush", &root.path))?;
        journal.done().map_err(at("write the journal of", &root.path))
    });
    if let Err(error) = moved {
        return Err(match back(root, staging, &plan.ops, staged_until_ns, step) {
            Ok(()) => error,
            Err(what) => stuck_after(root, name, &error, what),
        });
    }
    let mut applied = plan.outline;
    // From here on nothing can be taken back.
    if step().is_err() || staging.remove(root, None).is_err() {
        applied.left_behind = Some(root.path.join(name));
    }
    Ok(applied)
}

fn not_staged(root: &Root, name: &str, error: NotStaged) -> ApplyError {
    let path = error.below.map_or_else(|| root.path.clone(), |below| root.path.join(name).join(below));
    at(error.doing, &path)(error.source)
}

fn stuck(root: &Root, name: &str, what: Vec<String>) -> ApplyError {
    ApplyError::Stuck { cause: "nothing was changed".to_owned(), staging: root.path.join(name), what }
}

fn stuck_after(root: &Root, name: &str, cause: &ApplyError, what: Vec<String>) -> ApplyError {
    ApplyError::Stuck { cause: cause.to_string(), staging: root.path.join(name), what }
}

fn all_moves(root: &Root, staging: &Staging, ops: &[Op], step: &Step) -> Result<(), ApplyError> {
    for op in ops {
        let path = root.path.join(op.path().as_path());
        step().map_err(at("change", &path))?;
        op.take(root, &staging.fd).map_err(|no| match no {
            NoMove::Raced(why) => {
                ApplyError::Conflicts(vec![Conflict { path: op.path().clone(), why: why.to_owned() }])
            }
            NoMove::Io(doing, source) => at(doing, &path)(source),
        })?;
    }
    step().map_err(at("change", &root.path))
}

/// Makes sure that all steps are on the disk. Not by flushing the whole file system: others' files are on it too.
fn flush(root: &Root, staging: &OwnedFd, ops: &[Op]) -> std::io::Result<()> {
    let dirs: BTreeSet<Option<TreePath>> = ops.iter().map(|op| op.path().parent()).collect();
    let modes = ops.iter().filter(|op| matches!(op, Op::Chmod { .. })).map(|op| op.path().as_path());
    let dirs = dirs.iter().map(|dir| dir.as_ref().map_or(Path::new("."), TreePath::as_path));
    let mut open = vec![staging.try_clone()?];
    for path in dirs.chain(modes) {
        match root.open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY) {
            Ok(changed) => open.push(changed),
            // It moved or was removed by a step of its own, or one above it: what holds that is flushed.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
            // Its owner cannot read it.
            Err(_) => return Ok(rustix::fs::syncfs(staging)?),
        }
        if open.len() >= BATCH_MAX {
            flush_all(&open)?;
            open.clear();
        }
    }
    flush_all(&open)
}

/// Takes back all steps that were taken, and removes what was staged. In words, what could not be.
fn back(
    root: &Root,
    staging: Staging,
    ops: &[Op],
    staged_until_ns: i128,
    step: &Step,
) -> Result<(), Vec<String>> {
    let mut stuck = Vec::new();
    for op in ops.iter().rev() {
        // The way back does not stop for it.
        let _ = step();
        if let Err(why) = op.undo(root, &staging.fd) {
            stuck.push(format!("{}: {why}", op.path()));
        }
    }
    if flush(root, &staging.fd, ops).is_err() {
        stuck.push("the file system cannot be flushed".to_owned());
    }
    if !stuck.is_empty() {
        return Err(stuck);
    }
    match staging.remove(root, Some(staged_until_ns)) {
        Ok(spared) if spared.is_empty() => Ok(()),
        Ok(spared) => {
            let kept =
                |path: &std::path::PathBuf| format!("{}: written by somebody else meanwhile", path.display());
            Err(spared.iter().map(kept).collect())
        }
        Err(error) => Err(vec![format!("it cannot be removed: {error}")]),
    }
}

/// An application that was begun and not ended: who may open its directory again, and where it is.
///
/// # Errors
/// [`ApplyError::Busy`] while it goes on; what is kept cannot be read.
pub fn pending(shelf: &JobShelf) -> Result<Option<Pending>, ApplyError> {
    let Some(_journal) = Journal::reopen(shelf)? else { return Ok(None) };
    Ok(read(shelf)?.map(|told| told.pending))
}

/// Puts right what a dead process left: `target` is the directory of [`pending`], opened as its submitter. Does
/// nothing where nothing was left. Blocks.
///
/// # Errors
/// [`ApplyError::TargetMoved`]: another directory is there; [`ApplyError::Stuck`]: done as far as it can be, and not
/// pending any more; others: it can be tried again.
pub fn recover(shelf: &JobShelf, target: &OwnedFd) -> Result<Recovered, ApplyError> {
    recover_stepwise(shelf, target, Arc::new(|| Ok(())))
}

pub(super) fn recover_stepwise(
    shelf: &JobShelf,
    target: &OwnedFd,
    step: Step,
) -> Result<Recovered, ApplyError> {
    let Some(journal) = Journal::reopen(shelf)? else { return Ok(Recovered::Nothing) };
    let Some(Told { pending, steps, done }) = read(shelf)? else {
        journal.end(shelf)?;
        return Ok(Recovered::Nothing);
    };
    if identity_of(target, &pending.path)? != (pending.dev, pending.ino) {
        return Err(ApplyError::TargetMoved { path: pending.path });
    }
    let root = root(target, &pending.path)?;
    let (name, accepted) = (pending.staging, steps.as_ref().map(|steps| steps.accepted.clone()));
    let work = move || put_right(&root, &name, steps, done, &step);
    let right = as_submitter::<(), ApplyError>(&pending.identity, &pending.path, APPLY_TIME_MAX, work);
    match (right, accepted.filter(|_| done)) {
        (Ok(()), Some(accepted)) => {
            accept(shelf, &accepted)?;
            journal.end(shelf)?;
            Ok(Recovered::Finished(Box::new(accepted)))
        }
        (Ok(()), None) => journal.end(shelf).map(|()| Recovered::RolledBack),
        (Err(error @ ApplyError::Stuck { .. }), _) => {
            journal.end(shelf)?;
            Err(error)
        }
        (Err(error), _) => Err(error),
    }
}

/// Runs as the submitter.
fn put_right(
    root: &Root,
    name: &str,
    steps: Option<Steps>,
    done: bool,
    step: &Step,
) -> Result<(), ApplyError> {
    let staging = match Staging::open(root, name) {
        Ok(staging) => staging,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(at("open", &root.path.join(name))(error)),
    };
    match steps {
        Some(steps) if !done => {
            let cause = ApplyError::Interrupted { path: root.path.clone() };
            back(root, staging, &steps.ops, steps.staged_until_ns, step)
                .map_err(|what| stuck_after(root, name, &cause, what))
        }
        Some(_) | None => staging.remove(root, None).map(|_| ()).map_err(at("remove", &root.path.join(name))),
    }
}

/// Forgets an interrupted application whose directory will not come back.
///
/// # Errors
/// [`ApplyError::Busy`] while it goes on.
pub fn give_up(shelf: &JobShelf) -> Result<(), ApplyError> {
    Journal::reopen(shelf)?.map_or(Ok(()), |journal| journal.end(shelf))
}
