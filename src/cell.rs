//! One cell's life: a job that has a slot is prepared, lived and collected here, and whatever happens on
//! the way, what there was of its cell is destroyed before the job is done.
//!
//! *Invariant*: the row of a cell is written before anything of the cell exists and is closed only when
//! container, mounts, sockets and directory are proven gone. *Invariant*: only the task in here moves a
//! job that has a slot; everybody else asks it to stop.
//!
//! Read in this order: [`prepare`], [`live`], `collect`, [`park`] (instead of an end), [`record`] (journal
//! and row together).

pub mod attach;
mod bare;
mod beside;
pub mod build;
mod bundle;
pub mod changes;
mod collect;
mod command;
mod committer;
mod errands;
mod lines;
pub mod live;
pub mod park;
pub mod prepare;
pub mod record;
pub mod report;
mod rooms;
pub mod runtime;
mod space;
mod steps;
mod verify;
mod way_out;
mod work;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::agent_bundle::Bundles;
use crate::clock;
use crate::engine::{ContainerId, Engine, EngineError, Exit, container_name};
use crate::event::Body;
use crate::gateway::{Egress, Gateway};
use crate::git::above::Above;
use crate::job::outcome::Failure;
use crate::job::source::GitCheckout;
use crate::job::spec::WorkspaceMode;
use crate::job::{CellId, FailReason, Input, JobId, Outcome, Phase, State, StopReason};
use crate::journal;
use crate::metrics::{CopyStep, Metrics};
use crate::money::{Calendar, Caps, MicroUsd};
use crate::policy::Plan;
use crate::scheduler::Ticket;
use crate::session::{AgentExit, Session, Trouble};
use crate::source::Sources;
use crate::store::Store;
use crate::workspace::{self, WorkspaceRecord};

use self::bare::{Bare, Main};
use self::collect::{Collected, collect, totals};
use self::live::Live;
use self::park::{Admission, Pauses, Seen};
use self::record::{Feeds, Record, RecordError};
pub use self::space::Space;

/// Pause before an engine that is away is asked again.
const ENGINE_PAUSE: Duration = Duration::from_secs(1);

/// What stays the same for all cells of a daemon.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The daemon's state directory, canonical, 0700.
    pub state_dir: PathBuf,
    /// The static `hotcell-init`.
    pub init_binary: PathBuf,
    /// Longest wait for the answer to `initialize`.
    pub boot_max: Duration,
    /// From a stop to the kill.
    pub cancel_grace: Duration,
    /// Bounds of a job's journal.
    pub journal: journal::Limits,
    /// Free space that the host keeps, in bytes.
    pub disk_reserve_bytes: u64,
    /// Free memory beside which no further job starts, in bytes.
    pub memory_reserve_bytes: u64,
    /// The version of the CLI for jobs that name none; the active bundle where absent.
    pub agent: Option<String>,
    /// The budgets of users and of the daemon.
    pub caps: Caps,
    /// When they begin anew.
    pub calendar: Calendar,
}

impl Settings {
    /// Where the cells' directories are.
    pub fn cells_dir(&self) -> PathBuf {
        self.state_dir.join("cells")
    }

    /// Where the jobs' journals are.
    pub fn journal_dir(&self, job: &JobId) -> PathBuf {
        self.state_dir.join("jobs").join(job.as_str())
    }

    /// Where what is fetched for users is: beside the state directory, which nobody but the daemon may enter.
    pub fn sources_dir(&self) -> PathBuf {
        let mut name = self.state_dir.file_name().unwrap_or_default().to_owned();
        name.push("-sources");
        self.state_dir.with_file_name(name)
    }

    /// Where the jobs' change sets are.
    pub fn changes_dir(&self) -> PathBuf {
        self.state_dir.join("changes")
    }

    /// Where what is kept of parked jobs is mounted to be read.
    pub fn reading_dir(&self) -> PathBuf {
        self.state_dir.join("reading")
    }

    /// Where the scratch spaces of parked jobs are; on the file system of the cells' directories.
    pub fn kept_dir(&self) -> PathBuf {
        self.state_dir.join("kept")
    }

    /// What is kept of a job while it is parked.
    pub fn kept(&self, job: &JobId) -> PathBuf {
        self.kept_dir().join(format!("{job}.img"))
    }
}

/// The hands that a cell's life needs.
pub struct Parts {
    /// What stays the same.
    pub settings: Settings,
    /// Rows and money.
    pub store: Store,
    /// Containers.
    pub engine: Arc<dyn Engine>,
    /// The way to the model.
    pub gateway: Arc<Gateway>,
    /// The way to everything else.
    pub egress: Arc<Egress>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// The CLI's binaries.
    pub bundles: Bundles,
    /// Who follows which job.
    pub feeds: Feeds,
    /// Clients that take part in commands.
    pub attached: attach::Attachments,
    /// What live cells take of the disk.
    pub space: Arc<Space>,
    /// Runtimes that were tried.
    pub runtimes: runtime::Tried,
    /// Repositories that are fetched for jobs.
    pub sources: Arc<Sources>,
    /// Who may keep a queued job from starting; asked in this order.
    pub admission: Vec<Arc<dyn Admission>>,
    /// The one of them that knows which credentials the provider limits.
    pub pauses: Arc<Pauses>,
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// What was accepted at submit beside the spec: stored with the job.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Accepted {
    /// What it may do and spend.
    pub plan: Plan,
    /// The directory it works on, as it was at submit.
    pub workspace: Option<WorkspaceRecord>,
    /// Contents of what git ignores are kept in its change set too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_ignored: bool,
    /// The job whose changes it goes on with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<JobId>,
    /// What was fetched for it: its workspace is a checkout of that then, and goes with the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<GitCheckout>,
    /// The repository that the directory is a part of, where it is not its top.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub above: Option<Above>,
    /// Further directories that its cell sees.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<OtherWorkspace>,
    /// What its image is built from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub build: Option<build::ToBuild>,
    /// The submitter's own budget per day, in micro-USD, where their access entries give one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_day_micro_usd: Option<MicroUsd>,
}

/// A further directory of a job, as it was at submit.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OtherWorkspace {
    /// What it is called.
    pub name: String,
    /// How it is mounted: read-only, or as a copy that is thrown away.
    pub mode: WorkspaceMode,
    /// Where the cell sees it.
    pub at: String,
    /// What was opened.
    pub record: WorkspaceRecord,
}

/// A wish to stop, with words for the journal.
pub type StopWish = Option<(StopReason, String)>;

/// How a job comes to its slot.
#[derive(Debug, Clone)]
pub enum Start {
    /// From the queue.
    Fresh,
    /// Its cell outlived an earlier daemon.
    Adopt {
        /// The cell.
        cell: CellId,
        /// The engine's id.
        container: ContainerId,
    },
    /// Its cell did not: clean up and close the job.
    Close,
}

/// What became of a job that had a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It is done.
    Over,
    /// It waits for a moment.
    Parked {
        /// What the scheduler has to know of it.
        ticket: Ticket,
        /// The moment, in milliseconds since 1970.
        until_ms: u64,
        /// True when a limit of the provider's ended its cell that others share.
        limited: bool,
    },
}

/// Runs a job that has a slot until it is done or parked. Returns when nothing of its cell is left, or when the
/// sweeper has to see to what is.
pub async fn run(parts: Arc<Parts>, job: JobId, start: Start, stop: watch::Receiver<StopWish>) -> Fate {
    let mut record = match Record::open(&parts, &job).await {
        Ok(record) => record,
        Err(error) => {
            tracing::error!(%job, %error, "cannot open the record of a job; closing it as a fault of the host");
            if let Some((State::Done(outcome), totals)) = record::close_row(&parts, &job, &error).await {
                parts.metrics.ended(&outcome, None, totals.charged_micro_usd, None);
            }
            parts.feeds.close(&job);
            return Fate::Over;
        }
    };
    if record.state().is_done() {
        // Cancelled between its submit and the news of it, or closed before its task died.
        destroy(&parts, &job).await;
        record.finish(&parts);
        return Fate::Over;
    }
    let begun = Instant::now();
    let had_cell = match walk(&parts, &mut record, start, stop).await {
        Ok(had_cell) => had_cell,
        Err(error) => {
            tracing::error!(%job, %error, "a job's record cannot be written; closing it as a fault of the host");
            record.close_after_fault(&parts, &error).await;
            true
        }
    };
    parts.space.forget(&job);
    if let State::Done(outcome) = record.state() {
        let cli = record.totals.cli_micro_usd;
        let seconds = begun.elapsed().as_secs_f64();
        parts.metrics.ended(outcome, Some(seconds), record.totals.charged_micro_usd, cli);
        tracing::info!(%job, outcome = outcome.label(), seconds, "job done");
    }
    let fate = match record.state() {
        State::Parked { parked } => {
            parts.metrics.parked(parked.why);
            let until = clock::rfc3339(parked.until_ms);
            tracing::info!(%job, why = parked.why.as_str(), until, "job parked");
            Fate::Parked {
                ticket: record.ticket(&parts),
                until_ms: parked.until_ms,
                limited: had_cell && park::shared_until_ms(&parts, &record, parked).is_some(),
            }
        }
        State::Queued
        | State::Preparing
        | State::Running
        | State::Stopping { .. }
        | State::Parking { .. }
        | State::Collecting { .. }
        | State::Verifying
        | State::Done(_) => Fate::Over,
    };
    parts.attached.close(&job);
    record.finish(&parts);
    fate
}

/// False where the job was parked before it had a cell.
async fn walk(
    parts: &Arc<Parts>,
    record: &mut Record,
    start: Start,
    mut stop: watch::Receiver<StopWish>,
) -> Result<bool, RecordError> {
    let at_end = stop.clone();
    let mut ended = match start {
        Start::Fresh => {
            if let Some(parked) = park::turned_away(parts, record).await {
                record.step(parts, Input::Park(parked)).await?;
                return Ok(false);
            }
            record.step(parts, Input::Admit).await?;
            tracing::info!(job = %record.job, attempt = record.attempt, "job starts");
            if record.attempt == 1 {
                let waited = clock::wall_ms().saturating_sub(record.created_ms);
                parts.metrics.started(waited as f64 / 1000.0);
            }
            attempt(parts, record, &mut stop).await?
        }
        Start::Adopt { .. } if record.spec.command.is_some() => {
            let words = "the daemon was restarted while the command ran".to_owned();
            Ended::failed(Failure::new(Phase::Run, FailReason::CellLost, words))
        }
        Start::Adopt { cell, container } => match prepare::adopt(parts, record, cell, container).await? {
            Some(prepared) => Live::new(parts, record, prepared, stop.clone()).run().await?,
            None => replayed(record).await?,
        },
        Start::Close => replayed(record).await?,
    };
    if park::try_again(parts, record, &ended, &at_end).await? {
        return Ok(true);
    }
    loop {
        if let Some(parked) = park::instead_of_done(record, &ended, clock::wall_ms())
            && park::shelve(parts, record, &ended, parked, &at_end).await?
        {
            return Ok(true);
        }
        match collect(parts, record, ended, &mut stop).await? {
            Collected::Done => return Ok(true),
            Collected::Repair => ended = attempt(parts, record, &mut stop).await?,
        }
    }
}

/// One cell of the job, from nothing to the end of its processes.
async fn attempt(
    parts: &Arc<Parts>,
    record: &mut Record,
    stop: &mut watch::Receiver<StopWish>,
) -> Result<Ended, RecordError> {
    let begun = Instant::now();
    let prepared = |parts: &Parts| parts.metrics.phase(Phase::Prepare, begun.elapsed().as_secs_f64());
    let failed = match record.spec.command.clone() {
        None => match prepare::prepare(parts, record, stop).await {
            Ok(cell) => {
                prepared(parts);
                return Live::new(parts, record, cell, stop.clone()).run().await;
            }
            Err(error) => error,
        },
        Some(command) => match command::prepare_command(parts, record, &command, stop).await {
            Ok((started, stages, runtime)) => {
                prepared(parts);
                let main = Main::Command { attached: command.attached };
                let wall = Duration::from_millis(record.wall_left_ms());
                let greeting = command::greeting(&command, runtime);
                let bare = Bare::new(parts, record, started, (stages, main, wall), stop.clone());
                return bare.greet(greeting).run().await;
            }
            Err(error) => error,
        },
    };
    match failed {
        prepare::PrepareError::Failed(failure) => Ok(Ended::failed(failure)),
        prepare::PrepareError::Stopped(reason, detail) => {
            record.push(&Body::Stop { reason, detail })?;
            record.step(parts, Input::Stop(reason)).await?;
            Ok(Ended::failed(Failure::new(Phase::Prepare, FailReason::Internal, "stopped")))
        }
        prepare::PrepareError::Record(error) => Err(error),
    }
}

/// What the journal alone says of how a job ended, when no daemon saw its end.
async fn replayed(record: &mut Record) -> Result<Ended, RecordError> {
    let replay = match record.replay().await {
        Ok(replay) => replay,
        Err(RecordError::Cut) => {
            return Ok(Ended::default());
        }
        Err(error) => return Err(error),
    };
    record.exit = replay.figures;
    let (session, seen) = (Some(replay.session), Seen::default());
    let (exit, trouble) = (replay.exit, replay.trouble);
    Ok(Ended { session, exit, trouble, seen, ..Ended::default() })
}

/// Removes all there is of a job's cells and closes their rows: container first, since it holds the mounts.
/// A container is never given up while something in it may be alive: the job is not over and its slot is not free. What
/// else is left after about a minute, a dead container too, is the sweeper's; its row stays open.
pub async fn destroy(parts: &Arc<Parts>, job: &JobId) {
    const TRIES: u32 = 8;
    const PAUSE_MAX: Duration = Duration::from_secs(10);
    for attempt in 0u32.. {
        let left = match destroy_once(parts, job).await {
            Ok(()) => return,
            Err(left) => left,
        };
        let may_live = matches!(left, LeftOver::Container { ended: false, .. });
        if attempt + 1 >= TRIES && !may_live {
            tracing::error!(%job, %left, "something of a cell is left; the sweeper goes on");
            return;
        }
        tracing::warn!(%job, %left, attempt, "something of a cell is left; trying again");
        tokio::time::sleep(Duration::from_millis(250 << attempt.min(6)).min(PAUSE_MAX)).await;
    }
}

/// Why a cell is not gone yet.
#[derive(Debug, thiserror::Error)]
pub enum LeftOver {
    /// Its container.
    #[error("{error}")]
    Container {
        /// Why.
        error: EngineError,
        /// The kernel shows that nothing of it runs.
        ended: bool,
    },
    /// Its mounts or its directory.
    #[error("{path:?} is left: {why}")]
    Directory {
        /// What.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// The cells' directory cannot be read.
    #[error("the directory of cells cannot be swept: {0}")]
    Sweep(std::io::Error),
    /// Its row.
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
}

/// One try of [`destroy`]: every cell of the job, those of earlier attempts too.
///
/// # Errors
/// [`LeftOver`]; what was removed until then stays removed.
pub async fn destroy_once(parts: &Arc<Parts>, job: &JobId) -> Result<(), LeftOver> {
    for row in parts.store.live_cells().await?.into_iter().filter(|row| row.job == *job) {
        let container = match &row.container {
            Some(id) => ContainerId::new(id.clone()),
            None => container_name(parts.store.instance(), &row.cell),
        };
        if let Err(error) = parts.engine.remove(&container).await {
            let ended = parts.engine.kill(&container).await.unwrap_or(false);
            return Err(LeftOver::Container { error, ended });
        }
        let begun = Instant::now();
        sweep_one(parts, &row.cell).await?;
        parts.metrics.copy_step(CopyStep::Removal, begun.elapsed());
        parts.store.cell_gone(&row.cell, clock::wall_ms()).await?;
    }
    Ok(())
}

async fn sweep_one(parts: &Arc<Parts>, cell: &CellId) -> Result<(), LeftOver> {
    let (dir, gone) = (parts.settings.cells_dir(), cell.clone());
    let swept = tokio::task::spawn_blocking(move || workspace::sweep(&dir, &|cell| *cell != gone)).await;
    let report = swept.unwrap_or_else(|e| Err(std::io::Error::other(e))).map_err(LeftOver::Sweep)?;
    let mine = parts.settings.cells_dir().join(cell.as_str());
    match report.left.into_iter().find(|left| left.path.starts_with(&mine)) {
        Some(left) => Err(LeftOver::Directory { path: left.path, why: left.why }),
        None => Ok(()),
    }
}

/// What is known when a cell's processes are gone.
#[derive(Debug, Default)]
pub struct Ended {
    /// The conversation.
    pub session: Option<Session>,
    /// How the CLI ended.
    pub exit: Option<AgentExit>,
    /// What went wrong, where it was not the CLI that says so.
    pub failure: Option<Failure>,
    /// What last went wrong on the way to the model.
    pub trouble: Option<Trouble>,
    /// What parking depends on.
    pub seen: Seen,
    /// The end of what the job's own command printed that failed.
    pub output: Option<String>,
}

impl Ended {
    /// Ended before its CLI had anything to say.
    pub fn failed(failure: Failure) -> Self {
        Self { failure: Some(failure), ..Self::default() }
    }

    /// The end of a cell in which no agent was.
    fn of_command(exit: AgentExit, failure: Option<Failure>) -> Self {
        Self { exit: Some(exit), failure, ..Self::default() }
    }

    /// How the job ended, when no stop was decided.
    fn outcome(&self) -> Outcome {
        match (&self.failure, &self.session, &self.exit) {
            (Some(failure), _, _) => Outcome::Failed(failure.clone()),
            (None, Some(session), Some(exit)) => session.outcome(exit, self.trouble),
            (None, None, Some(exit)) => command_outcome(exit),
            (None, _, None) => Outcome::Lost,
        }
    }
}

/// How a command ended that ran in place of an agent.
fn command_outcome(exit: &AgentExit) -> Outcome {
    let (reason, mut words) = match (exit.code, exit.oom_kills) {
        (0, _) => return Outcome::Succeeded,
        (_, 0) => (FailReason::CommandFailed, format!("the command ended with code {}", exit.code)),
        (_, _) => (FailReason::Oom, "the kernel killed processes of the cell for memory".to_owned()),
    };
    if !exit.stderr_tail.is_empty() {
        words.push_str(&format!("; its last words on stderr: {}", exit.stderr_tail));
    }
    Outcome::Failed(Failure::new(Phase::Run, reason, words))
}

/// The exit as the session wants it.
pub(crate) fn agent_exit(code: i32, oom_kills: u64, stderr_tail: String) -> AgentExit {
    AgentExit { code, oom_kills, stderr_tail }
}

/// Waits for the container's end. An engine that is away says nothing of it: the cell may well be alive, and
/// what it says itself comes over the link.
async fn wait(parts: &Parts, container: &ContainerId) -> Result<Exit, EngineError> {
    loop {
        match parts.engine.wait(container).await {
            Err(error @ (EngineError::Unavailable { .. } | EngineError::Timeout { .. })) => {
                tracing::warn!(%container, %error, "cannot watch a cell; asking again");
                tokio::time::sleep(ENGINE_PAUSE).await;
            }
            other => return other,
        }
    }
}
