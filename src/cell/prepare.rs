//! From a slot to a started cell: image and agent found, the cell's row written, directory, workspace,
//! scratch space, link and lease made, container created and started. What fails here says whose fault it
//! is; what was made until then is found by the row and destroyed by the caller.

mod prompt;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::committer::commit_environment;
use super::live::CELL_BUFFER_BYTES_MAX;
use super::record::{Record, RecordError};
use super::rooms::{self, Dirs, Kept, Made, Tenant, Who};
use super::steps::{self, Steps};
use super::{Accepted, Parts, StopWish, changes, runtime, way_out};
use crate::agent::{options, surroundings, way_out as agent_way_out};
use crate::agent_bundle::{Bundles, Platform, Version};
use crate::cell_image::{EngineImages, ImageError, Images};
use crate::clock;
use crate::engine::{BindMount, CellLimits, CellSpec, ContainerId, EngineError};
use crate::event::Body;
use crate::gateway::{Lease, LeaseSpec, StoreLedger};
use crate::git::above;
use crate::job::outcome::Failure;
use crate::job::spec::{Runtime, TerminalSize};
use crate::job::{CellId, FailReason, JobId, Phase, StopReason};
use crate::link::{Boot, CtlKey, Link, PortForward, Resume};
use crate::metrics::CopyStep;
use crate::money::Budget;
use crate::policy::Plan;
use crate::session::{Session, Step, Trouble};
use crate::store::CellRow;
use crate::workspace;

/// How long init lets the agent live without a daemon, in milliseconds.
const DEAD_MAN_MS: u64 = 15 * 60 * 1000;
/// What programs are told of a terminal.
const TERMINAL: &str = "xterm-256color";
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

/// What runs in a cell.
pub(super) struct Launch<'a> {
    /// The program and its arguments.
    pub(super) argv: Vec<String>,
    /// Variables beside the plan's.
    pub(super) more: &'a [(String, String)],
    /// Commands that run before it, one at a time, when they are asked for.
    pub(super) steps: Vec<Vec<String>>,
    /// It gets a terminal.
    pub(super) terminal: Option<TerminalSize>,
    /// Longest life, in milliseconds.
    pub(super) wall_limit_ms: u64,
    /// It may ask the model.
    pub(super) model: bool,
    /// What the tools in the cell are told of their way out.
    pub(super) shown: &'a Plan,
}

impl<'a> Launch<'a> {
    /// A program on its own, without a model.
    pub(super) fn of(argv: Vec<String>, wall_limit_ms: u64, record: &'a Record) -> Self {
        let shown = &record.accepted.plan;
        Self { argv, more: &[], steps: Vec::new(), terminal: None, wall_limit_ms, model: false, shown }
    }
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
    let setup = record.spec.setup.as_ref().map(|setup| Steps::setup(setup, begun.image.shell));
    let first = setup.as_ref().map(|_| steps::setup_plan(record));
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

/// What the image gives.
pub(super) struct Image {
    id: String,
    env: Vec<(String, String)>,
    pub(super) claude: PathBuf,
    pub(super) shell: &'static str,
    volumes: Vec<String>,
}

pub(super) async fn find_image(
    parts: &Arc<Parts>,
    record: &Record,
    stop: &mut watch::Receiver<StopWish>,
) -> Result<Image, PrepareError> {
    let reference = &record.accepted.plan.image;
    let port = EngineImages::new(parts.engine.clone(), parts.store.instance().clone());
    let images = Images::new(&port, &parts.settings.state_dir);
    let info = match images.resolve_image(reference).await {
        Err(ImageError::NotPresent { .. }) => {
            let (progress, _) = tokio::sync::mpsc::channel(1);
            // Only the pull may be dropped half-way: the other calls are short, and one of them makes a container.
            let pulled = tokio::select! {
                pulled = parts.engine.pull(reference, &progress) => pulled,
                Some((reason, detail)) = wish(stop) => return Err(PrepareError::Stopped(reason, detail)),
            };
            pulled.map_err(|e| pull_failure(reference, &e))?;
            images.resolve_image(reference).await
        }
        found => found,
    };
    let info = info.map_err(|e| image_failure(&e))?;
    let facts = images.suitability(&info).await.map_err(|e| image_failure(&e))?;
    let details =
        parts.engine.image(&info.id).await.map_err(|e| engine_failure(FailReason::ImageUnavailable, &e))?;
    let details = details
        .ok_or_else(|| failed(FailReason::ImageUnavailable, format!("the image {reference} is gone")))?;
    let Some(libc) = facts.libc else {
        let words = format!("the image {reference} has neither glibc nor musl, so the CLI cannot run in it");
        return Err(failed(FailReason::ImageUnsuitable, words));
    };
    let platform = Platform { arch: facts.arch, libc };
    let wanted = record.accepted.plan.agent.clone().or_else(|| parts.settings.agent.clone());
    let bundles = parts.bundles.clone();
    let claude = tokio::task::spawn_blocking(move || bundle_path(&bundles, wanted.as_deref(), platform))
        .await
        .map_err(|e| failed(FailReason::Internal, e))?
        .map_err(|e| failed(FailReason::AgentMissing, e))?;
    let (env, volumes) = (details.env, details.volumes);
    Ok(Image { id: info.id, env, claude, shell: facts.shell.path(), volumes })
}

fn bundle_path(
    bundles: &Bundles,
    wanted: Option<&str>,
    platform: Platform,
) -> Result<PathBuf, crate::agent_bundle::BundleError> {
    let version: Version = match wanted {
        Some(text) => text.parse()?,
        None => bundles.active()?,
    };
    bundles.path_for(&version, platform)
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

pub(super) fn cell_spec(
    parts: &Parts,
    record: &Record,
    cell: &CellId,
    image: &Image,
    dirs: &Dirs,
    who: &Who,
) -> CellSpec {
    let (limits, workspace) = (&record.accepted.plan.limits, record.accepted.plan.workspace_at.as_str());
    let bind = |source: &Path, target: &str, read_only: bool| BindMount {
        source: source.to_owned(),
        target: target.to_owned(),
        read_only,
    };
    let mut mounts = vec![
        bind(&dirs.run, "/.hotcell", true),
        bind(&parts.settings.init_binary, "/.hotcell-init", true),
        bind(&dirs.claude, options::CLI_PATH, true),
        bind(&dirs.etc.join("passwd"), "/etc/passwd", true),
        bind(&dirs.etc.join("group"), "/etc/group", true),
        // Empty: managed settings of an image would win over ours, and their hooks would run.
        bind(&dirs.etc.join("claude-code"), "/etc/claude-code", true),
        bind(&dirs.etc.join("git-hooks"), options::GIT_HOOKS, true),
        bind(&dirs.home, options::HOME, false),
        bind(&dirs.tmp, "/tmp", false),
    ];
    mounts.extend(dirs.under.iter().map(|under| bind(&under.source, &under.target, under.read_only)));
    mounts.push(
        // A read-only one is staged so; asked to do it, the engine would drop nosuid and nodev on the way.
        bind(&dirs.workspace, workspace, dirs.workspace_read_only),
    );
    for part in &dirs.parts {
        mounts.push(bind(&part.path, &format!("{workspace}/{}", part.below.display()), false));
    }
    for over in &dirs.over {
        // The later one of two on one path hides more.
        mounts.retain(|mount| mount.target != over.target);
        mounts.push(bind(&over.source, &over.target, over.read_only));
    }
    // A volume that the image declares would be writable and without a limit: the scratch space covers it.
    for volume in &image.volumes {
        if !mounts.iter().any(|m| m.target == *volume) {
            mounts.push(bind(&dirs.tmp, volume, false));
        }
    }
    CellSpec {
        instance: parts.store.instance().clone(),
        cell: cell.clone(),
        image_id: image.id.clone(),
        user: who.owner(),
        groups: who.groups.clone(),
        limits: CellLimits {
            memory_bytes: limits.memory_bytes,
            // A policy may name more cores than this machine has; the engine would refuse that.
            cpus_milli: limits.cpus_milli.min(rooms::cores_milli()),
            pids_max: limits.pids_max,
            nofile_max: rooms::nofile_max(),
        },
        mounts,
        runtime: None,
        working_dir: workspace.to_owned(),
        argv: vec!["/.hotcell-init".to_owned()],
        env: Vec::new(),
    }
}

pub(super) fn boot_with(
    parts: &Parts,
    record: &Record,
    names: &Names,
    image: &Image,
    launch: Launch<'_>,
) -> Result<Vec<u8>, PrepareError> {
    let Launch { argv, more, steps, terminal, wall_limit_ms, model, shown } = launch;
    let plan = &record.accepted.plan;
    let words = |argv: Vec<String>| argv.into_iter().map(OsString::from).collect::<Vec<_>>();
    let provider = parts.gateway.view(&plan.provider).map_err(|e| failed(FailReason::Internal, e))?;
    let mut env = options::environment(plan, &image.env, &provider, &names.token);
    if !model {
        // Nobody answers there.
        provider.environment(&names.token).into_iter().for_each(|(name, _)| drop(env.remove(name)));
    }
    if terminal.is_some() {
        env.insert("TERM".to_owned(), TERMINAL.to_owned());
    }
    env.extend(more.iter().cloned());
    surroundings::add_way_out(&mut env, shown, way_out::has_authorities(parts, shown));
    env.extend(record.accepted.above.iter().map(|_| above::across()));
    env.entry("SHELL".to_owned()).or_insert_with(|| image.shell.to_owned());
    let mut boot = Boot::new(names.cell.clone(), names.key.clone(), words(argv));
    boot.env = env.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
    boot.cwd = PathBuf::from(&plan.workspace_at);
    boot.ctl_socket = PathBuf::from("/.hotcell/ctl.sock");
    boot.wall_limit_ms = wall_limit_ms;
    boot.dead_man_ms = DEAD_MAN_MS;
    boot.buffer_bytes_max = CELL_BUFFER_BYTES_MAX;
    boot.start_now = steps.is_empty();
    boot.steps = steps.into_iter().map(words).collect();
    boot.terminal = terminal.map(|size| (size.rows, size.cols));
    // A person's command may open /dev/stdout, which no socket can be.
    boot.pipes = !model && terminal.is_none();
    let forward = |port, name| PortForward { port, socket: PathBuf::from("/.hotcell").join(name) };
    boot.forwards = vec![forward(agent_way_out::EGRESS_PORT, "egress.sock")];
    if model {
        boot.forwards.push(forward(options::MODEL_PORT, "api.sock"));
    }
    boot.encode().map_err(|e| failed(FailReason::Internal, e))
}

pub(super) fn engine_failure(reason: FailReason, error: &EngineError) -> PrepareError {
    let reason = match error {
        EngineError::Unavailable { .. } | EngineError::Timeout { .. } => FailReason::EngineUnavailable,
        _ => reason,
    };
    failed(reason, error)
}

fn pull_failure(reference: &str, error: &EngineError) -> PrepareError {
    match engine_failure(FailReason::ImageUnavailable, error) {
        PrepareError::Failed(failure) if failure.reason == FailReason::ImageUnavailable => failed(
            failure.reason,
            format!("the image {reference:?} is not on this machine and cannot be pulled: {error}"),
        ),
        other => other,
    }
}

fn image_failure(error: &ImageError) -> PrepareError {
    let reason = match error {
        ImageError::NoShell { .. } => FailReason::ImageUnsuitable,
        ImageError::Engine(fault) if fault.away => FailReason::EngineUnavailable,
        _ => FailReason::ImageUnavailable,
    };
    failed(reason, error)
}
