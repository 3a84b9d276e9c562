//! From a slot to a started cell: image and agent found, the cell's row written, directory, workspace,
//! scratch space, link and lease made, container created and started. What fails here says whose fault it
//! is; what was made until then is found by the row and destroyed by the caller.

mod image;
mod launch;
mod prompt;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

pub(super) use self::image::{Image, find_image, image_of};
pub(super) use self::launch::{Launch, boot_with, cell_spec};

use super::committer::commit_environment;
use super::record::{Record, RecordError};
use super::rooms::{self, Dirs, Kept, Made, Tenant, Who};
use super::steps::{self, Steps};
use super::{Accepted, Parts, StopWish, changes, runtime, way_out};
use crate::agent::options;
use crate::clock;
use crate::engine::{CellSpec, ContainerId, EngineError};
use crate::event::Body;
use crate::gateway::{Lease, LeaseSpec, StoreLedger};
use crate::job::outcome::Failure;
use crate::job::spec::Runtime;
use crate::job::{CellId, FailReason, JobId, Phase, StopReason};
use crate::link::{CtlKey, Link, Resume};
use crate::metrics::CopyStep;
use crate::money::Budget;
use crate::policy::Plan;
use crate::session::{Session, Step, Trouble};
use crate::store::CellRow;
use crate::workspace;

/// What init adds to the wall limit, so that the daemon's own deadline comes first, in milliseconds.
pub(super) const WALL_SLACK_MS: u64 = 10_000;

/// A started cell.
#[derive(Debug)]
pub struct Prepared {
    /// The conversation.
    pub session: Session,
    /// The way to PID 1.
    pub link: Link,
    /// The way to the model.
    pub lease: Lease,
    /// The cell.
    pub cell: CellId,
    /// The engine's id.
    pub container: ContainerId,
    /// The job's own commands, which come first.
    pub(super) setup: Option<Steps>,
    /// Steps that are due at once.
    pub pending: Vec<Step>,
    /// Frames that an earlier daemon journaled as sent.
    pub sent: Vec<(u64, Vec<u8>)>,
    /// True when the task was sent before.
    pub booted: bool,
    /// Time since the cell was begun.
    pub age: Duration,
    /// What last went wrong on the way to the model, while an earlier daemon watched.
    pub trouble: Option<Trouble>,
}

/// Why there is no cell.
#[derive(Debug)]
pub enum PrepareError {
    /// The job failed.
    Failed(Failure),
    /// A stop was asked for meanwhile.
    Stopped(StopReason, String),
    /// The record cannot be written.
    Record(RecordError),
}

impl From<RecordError> for PrepareError {
    fn from(error: RecordError) -> Self {
        Self::Record(error)
    }
}

impl From<crate::store::StoreError> for PrepareError {
    fn from(error: crate::store::StoreError) -> Self {
        Self::Record(error.into())
    }
}

pub(super) fn failed(reason: FailReason, message: impl ToString) -> PrepareError {
    PrepareError::Failed(Failure::new(Phase::Prepare, reason, message.to_string()))
}

pub(super) fn engine_failure(reason: FailReason, error: &EngineError) -> PrepareError {
    let reason = match error {
        EngineError::Unavailable { .. } | EngineError::Timeout { .. } => FailReason::EngineUnavailable,
        _ => reason,
    };
    failed(reason, error)
}

/// A cell that was started, whatever runs in it.
#[derive(Debug)]
pub(super) struct Started {
    /// The way to PID 1.
    pub(super) link: Link,
    /// The way out.
    pub(super) lease: Lease,
    /// The cell.
    pub(super) cell: CellId,
    /// The engine's id.
    pub(super) container: ContainerId,
}

/// A cell whose row is written, and nothing else.
pub(super) struct Begun {
    pub(super) image: Image,
    pub(super) names: Names,
    pub(super) tenant: Tenant,
    engine_name: Option<String>,
}

/// Makes and starts a cell for a job's agent.
///
/// # Errors
/// [`PrepareError`]; the caller destroys by the row what was made.
pub async fn prepare(
    parts: &Arc<Parts>,
    record: &mut Record,
    stop: &mut watch::Receiver<StopWish>,
) -> Result<Prepared, PrepareError> {
    let begun = begin(parts, record, true, stop).await?;
    let commits = commit_environment(record);
    let (made, commits) = tokio::join!(make_directories(parts, record, &begun), commits);
    let (dirs, session, who, resumed) = made?;
    let mut plan = record.accepted.plan.clone();
    // The limit holds for all attempts together.
    let turns = u32::try_from(record.carry.turns).unwrap_or(u32::MAX);
    plan.limits.max_turns = plan.limits.max_turns.saturating_sub(turns).max(1);
    let first = record.spec.setup.as_ref().map(|_| steps::setup_plan(record));
    let setup = record.spec.setup.as_ref().zip(first.as_ref());
    let setup = setup.map(|(setup, plan)| Steps::setup(setup, begun.image.shell, plan));
    let launch = Launch {
        argv: options::argv(&plan, &begun.names.session_id, resumed),
        more: &commits,
        steps: setup.as_ref().map(|setup| setup.argvs().to_vec()).unwrap_or_default(),
        terminal: None,
        wall_limit_ms: record.wall_left_ms() + WALL_SLACK_MS,
        model: true,
        shown: &plan,
    };
    let first = first.map(Arc::new);
    let Started { link, lease, cell, container } =
        finish(parts, record, &begun, (&dirs, &who), launch, first, stop).await?;
    let pending = session.start();
    let (sent, booted, age, trouble) = (Vec::new(), false, Duration::ZERO, None);
    Ok(Prepared { session, link, lease, cell, container, setup, pending, sent, booted, age, trouble })
}

/// Finds what a cell is made of and writes its row. `agent`: it is the one that the job's agent or command runs in.
pub(super) async fn begin(
    parts: &Arc<Parts>,
    record: &mut Record,
    agent: bool,
    stop: &mut watch::Receiver<StopWish>,
) -> Result<Begun, PrepareError> {
    let image = find_image(parts, record, stop).await?;
    let chosen = runtime::choose(parts, record, &image, stop).await?;
    let former = parts.store.cell_of(&record.job).await?;
    let names = Names::new(former.as_ref(), &record.job)?;
    parts.store.put_cell(names.row(record, Some(chosen.runtime).filter(|_| agent))).await?;
    let (cell, runtime, instead) = (names.cell.clone(), chosen.runtime, chosen.instead.clone());
    let version =
        image.claude.parent().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    record.push(&Body::Cell { cell, runtime, instead, image: Some(image.id.clone()), agent: version })?;
    let tenant = Tenant { uid: names.uid, runtime, claude: image.claude.clone(), kept: agent };
    Ok(Begun { image, names, tenant, engine_name: chosen.engine_name })
}

/// The same of a cell beside the one of the agent, which nothing runs in, under the engine's usual runtime.
pub(super) async fn begin_beside(
    parts: &Arc<Parts>,
    record: &Record,
    image: Image,
) -> Result<Begun, PrepareError> {
    let former = parts.store.cell_of(&record.job).await?;
    let names = Names::new(former.as_ref(), &record.job)?;
    parts.store.put_cell(names.row(record, None)).await?;
    let tenant = Tenant { uid: names.uid, runtime: Runtime::Runc, claude: image.claude.clone(), kept: false };
    Ok(Begun { image, names, tenant, engine_name: None })
}

/// Makes the ways into and out of a cell whose rooms are there, and starts it. `first`: what its commands before the
/// main process may reach.
pub(super) async fn finish(
    parts: &Arc<Parts>,
    record: &mut Record,
    begun: &Begun,
    (dirs, who): (&Dirs, &Who),
    launch: Launch<'_>,
    first: Option<Arc<Plan>>,
    stop: &watch::Receiver<StopWish>,
) -> Result<Started, PrepareError> {
    let names = &begun.names;
    let link = Link::bind(&dirs.run, &names.cell, names.key.clone(), Resume::default(), who.owner())
        .await
        .map_err(|e| failed(FailReason::Internal, e))?;
    let (token, model, shown) = (&names.token, launch.model, launch.shown);
    let door = Door { token, run: &dirs.run, owner: who.owner(), model, shown, first };
    let lease = match open_lease(parts, record, &names.cell, door).await {
        Ok(lease) => lease,
        Err(error) => {
            leave_link(record, link).await;
            return Err(error);
        }
    };
    let mut spec = cell_spec(parts, record, &names.cell, &begun.image, dirs, who);
    spec.runtime.clone_from(&begun.engine_name);
    let started = match boot_with(parts, record, names, &begun.image, launch) {
        Ok(boot) => start(parts, &names.cell, &spec, &boot, stop).await,
        Err(error) => Err(error),
    };
    match started {
        Ok(container) => Ok(Started { link, lease, cell: names.cell.clone(), container }),
        Err(error) => {
            lease.destroy().await;
            leave_link(record, link).await;
            Err(error)
        }
    }
}

pub(super) async fn start(
    parts: &Arc<Parts>,
    cell: &CellId,
    spec: &CellSpec,
    boot: &[u8],
    stop: &watch::Receiver<StopWish>,
) -> Result<ContainerId, PrepareError> {
    let go_on = || match stop.borrow().clone() {
        Some((reason, detail)) => Err(PrepareError::Stopped(reason, detail)),
        None => Ok(()),
    };
    go_on()?;
    let created = parts.engine.create(spec).await;
    let container = created.map_err(|e| engine_failure(FailReason::ContainerCreate, &e))?;
    parts.store.set_container(cell, container.as_str()).await?;
    go_on()?;
    let started = parts.engine.start(&container, boot).await;
    started.map_err(|e| engine_failure(FailReason::ContainerStart, &e))?;
    Ok(container)
}

pub(super) async fn leave_link(record: &Record, link: Link) {
    if let Err(error) = link.destroy().await {
        tracing::warn!(job = %record.job, %error, "the socket of a cell is left to the sweep");
    }
}

/// Takes over a cell that outlived an earlier daemon. `None` when its conversation cannot be rebuilt.
///
/// # Errors
/// [`RecordError`].
pub async fn adopt(
    parts: &Arc<Parts>,
    record: &mut Record,
    cell: CellId,
    container: ContainerId,
) -> Result<Option<Prepared>, RecordError> {
    let replay = match record.replay().await {
        Ok(replay) => replay,
        Err(RecordError::Cut) => return Ok(None),
        Err(error) => return Err(error),
    };
    if replay.exit.is_some() {
        return Ok(None);
    }
    let Some(row) = parts.store.agent_cell_of(&record.job).await?.filter(|row| row.cell == cell) else {
        return Ok(None);
    };
    let Ok(key) = <[u8; 32]>::try_from(row.ctl_key.as_slice()).map(CtlKey::from_bytes) else {
        return Ok(None);
    };
    // Nobody follows the dead daemon's requests any more: what they may cost is charged, and what they set aside
    // must not keep the cell's next request waiting.
    let left_open = parts.store.release_open(&record.job, clock::wall_ms()).await?;
    parts.metrics.reaped(crate::metrics::Orphan::Reservation, left_open);
    record.push(&Body::Note { text: "the daemon was restarted and took the cell over".to_owned() })?;
    record.commit()?;
    let run = parts.settings.cells_dir().join(cell.as_str()).join("run");
    let owner = rooms::owner_of(&parts.settings.cells_dir().join(cell.as_str()))
        .unwrap_or((row.cell_uid, row.cell_uid));
    let resume = Resume { stdout: record.recovered.stdout_end, stderr: record.recovered.stderr_end };
    let link = match Link::bind(&run, &cell, key, resume, owner).await {
        Ok(link) => link,
        Err(error) => {
            tracing::warn!(job = %record.job, %error, "cannot take the cell over");
            return Ok(None);
        }
    };
    let plan = record.accepted.plan.clone();
    let door = Door { token: &row.token, run: &run, owner, model: true, shown: &plan, first: None };
    let lease = match open_lease(parts, record, &cell, door).await {
        Ok(lease) => lease,
        Err(error) => {
            leave_link(record, link).await;
            return match error {
                PrepareError::Record(error) => Err(error),
                PrepareError::Failed(_) | PrepareError::Stopped(..) => Ok(None),
            };
        }
    };
    let (session, pending, sent, trouble) = (replay.session, replay.pending, replay.sent, replay.trouble);
    let age = Duration::from_millis(clock::boot_ms().saturating_sub(row.created_boot_ms));
    let (setup, booted) = (None, true);
    let prepared =
        Prepared { session, link, lease, cell, container, setup, pending, sent, booted, age, trouble };
    Ok(Some(prepared))
}

pub(super) async fn wish(stop: &mut watch::Receiver<StopWish>) -> StopWish {
    let wish = stop.wait_for(Option::is_some).await.map(|wish| wish.clone());
    match wish {
        Ok(wish) => wish,
        // Nobody can wish any more.
        Err(_) => std::future::pending().await,
    }
}

/// What a cell is called and how its ends know each other.
pub(super) struct Names {
    pub(super) cell: CellId,
    pub(super) key: CtlKey,
    token: String,
    pub(super) uid: u32,
    session_id: String,
}

impl Names {
    pub(super) fn new(former: Option<&CellRow>, job: &JobId) -> Result<Self, PrepareError> {
        let mut bytes = [0u8; 48];
        getrandom::fill(&mut bytes).map_err(|e| failed(FailReason::Internal, e))?;
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default());
        let ids = u64::from(workspace::CELL_IDS.end - workspace::CELL_IDS.start);
        Ok(Self {
            cell: CellId::new(word(0)),
            key: CtlKey::generate().map_err(|e| failed(FailReason::Internal, e))?,
            token: format!("hotcell-{}", hex(&bytes[16..])),
            // The same for all of a job's cells: files of an earlier attempt are theirs.
            uid: former.map_or(workspace::CELL_IDS.start + (word(8) % ids) as u32, |cell| cell.cell_uid),
            session_id: session_id(job),
        })
    }

    pub(super) fn row(&self, record: &Record, runtime: Option<Runtime>) -> CellRow {
        CellRow {
            cell: self.cell.clone(),
            job: record.job.clone(),
            attempt: record.attempt,
            container: None,
            ctl_key: self.key.to_bytes().to_vec(),
            token: self.token.clone(),
            cell_uid: self.uid,
            runtime,
            created_boot_ms: clock::boot_ms(),
            gone_ms: None,
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The conversation's id, the same in each attempt: a UUID of the random kind, made from the job's id.
fn session_id(job: &JobId) -> String {
    use sha2::Digest;
    let digest = sha2::Sha256::digest(format!("hotcell session of {job}"));
    let h = hex(&digest[..16]);
    let variant = char::from(b"89ab"[usize::from(digest[8] & 3)]);
    format!("{}-{}-4{}-{variant}{}-{}", &h[..8], &h[8..12], &h[13..16], &h[17..20], &h[20..32])
}

async fn make_directories(
    parts: &Arc<Parts>,
    record: &mut Record,
    Begun { names, tenant, .. }: &Begun,
) -> Result<(Dirs, Session, Who, bool), PrepareError> {
    let before = record.carry.parked_ms;
    let kept = before.map(|_| Kept {
        image: parts.settings.kept(&record.job),
        session: options::session_file(&names.session_id, &record.accepted.plan.workspace_at),
    });
    if record.carry.repair.is_some() {
        // What did not pass is not what this attempt will have made.
        changes::forget(parts, &record.job).await;
    }
    let mut made = make_rooms(parts, record, names, tenant.clone(), record.accepted.clone(), kept).await?;
    if let (Some(snapshot), set_up) = made.took {
        parts.metrics.copy_step(CopyStep::Snapshot, snapshot);
        parts.metrics.copy_step(CopyStep::SetUp, set_up);
    }
    let opening = record.opening(made.resumed, clock::wall_ms());
    record.begin_attempt(&names.cell, &opening)?;
    if before.is_some() && !made.resumed {
        let text = "there is no conversation of an earlier attempt to go on with: the task is given again";
        made.notes.push(text.to_owned());
    }
    for text in made.notes {
        record.push(&Body::Note { text })?;
    }
    record.commit()?;
    let append = prompt::append(record, made.claude_md.as_deref(), &made.dirs.parts);
    let session = record.session(&opening, append);
    Ok((made.dirs, session, made.who, made.resumed))
}

pub(super) async fn make_rooms(
    parts: &Arc<Parts>,
    record: &Record,
    names: &Names,
    tenant: Tenant,
    accepted: Accepted,
    kept: Option<Kept>,
) -> Result<Made, PrepareError> {
    let (settings, identity) = (parts.settings.clone(), record.identity.clone());
    let (dir, job) = (settings.cells_dir().join(names.cell.as_str()), record.job.clone());
    let make = move || rooms::make(&settings, &accepted, &identity, &tenant, (&dir, &job), kept.as_ref());
    tokio::task::spawn_blocking(make).await.map_err(|e| failed(FailReason::Internal, e))?
}

/// What a cell's lease is opened with.
struct Door<'a> {
    token: &'a str,
    run: &'a Path,
    owner: (u32, u32),
    model: bool,
    /// What the tools in it are told.
    shown: &'a Plan,
    /// What its first commands may reach.
    first: Option<Arc<Plan>>,
}

async fn open_lease(
    parts: &Arc<Parts>,
    record: &Record,
    cell: &CellId,
    Door { token, run, owner, model, shown, first }: Door<'_>,
) -> Result<Lease, PrepareError> {
    let budgets = budgets(parts, record).await?;
    let dir = run.parent().unwrap_or(run);
    let plan = Arc::new(record.accepted.plan.clone());
    let egress = way_out::make(parts, shown, &record.identity, dir, &record.job).await?;
    let spec = LeaseSpec {
        job: record.job.clone(),
        cell: cell.clone(),
        token: token.to_owned(),
        identity: record.identity.clone(),
        plan,
        budgets,
        output_tokens_max: None,
        run_dir: run.to_owned(),
        socket_owner: Some(owner),
        model,
        egress: Some(egress),
        first,
    };
    let calendar = parts.settings.calendar.clone();
    let ledger = Arc::new(StoreLedger { store: parts.store.clone(), cell: cell.clone(), calendar });
    parts.gateway.lease(spec, ledger).await.map_err(|e| failed(FailReason::Internal, e))
}

/// The budgets that a job's requests must fit under, the innermost first.
async fn budgets(parts: &Arc<Parts>, record: &Record) -> Result<Vec<Budget>, PrepareError> {
    let batch = parts.store.batch_of(&record.job).await.map_err(RecordError::Store)?;
    let job = Some(record.accepted.plan.limits.cost_micro_usd);
    let user_day = record.accepted.user_day_micro_usd;
    Ok(parts.settings.caps.of_job(job, batch.and_then(|batch| batch.limit), user_day))
}
