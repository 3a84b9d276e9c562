//! `POST /v1/jobs`: raw JSON → spec → plan → workspace opened as the peer → row. What is refused leaves
//! nothing behind; what is accepted is on the disk before its id is told.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use super::jobs::view;
use super::peer::Peer;
use super::wire::ErrorCode;
use super::{Api, ApiError};
use super::{auto, build, sources};
use crate::agent_bundle::{PINNED_VERSION, Version};
use crate::cell::{Accepted, OtherWorkspace, changes};
use crate::change::hide::HideRules;
use crate::clock;
use crate::event::Body;
use crate::gateway::GatewayError;
use crate::git::above::{self, Above};
use crate::job::spec::{
    AUTO_IMAGE, BUILD_IMAGE, MountAt, SPEC_BYTES_MAX, SpecError, WorkspaceMode, taken_at,
};
use crate::job::{Identity, JobId, JobSpec, State as JobState};
use crate::journal::Journal;
use crate::money::MicroUsd;
use crate::policy::{Grant, Narrowing, Plan, Policy, StepKind, check_step_egress, narrow};
use crate::scheduler::Ticket;
use crate::source::Fetched;
use crate::store::{Batch, NewJob, StoreError, Submitted};
use crate::workspace::{self, Access, Guard, LookLimits, WorkspaceError, WorkspaceRecord};

/// Longest idempotency key, in bytes.
const KEY_BYTES_MAX: usize = 255;
/// How far a workspace is looked at for what looks like a secret.
const SECRETS_LOOK: LookLimits = LookLimits { entries_max: 50_000, time_max: Duration::from_millis(250) };

/// Submits a job.
pub async fn submit(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    headers: HeaderMap,
    body: Result<Bytes, axum::extract::rejection::BytesRejection>,
) -> Result<Response, ApiError> {
    let identity = identity(&peer)?;
    if api.shutdown.has_begun() {
        return Err(ApiError::new(ErrorCode::Draining, "the daemon is going down and takes no new jobs"));
    }
    let body = body.map_err(|rejection| {
        let code = if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
            ErrorCode::TooLarge
        } else {
            ErrorCode::InvalidRequest
        };
        let words = format!(
            "the body cannot be read: {}; a spec may have at most {SPEC_BYTES_MAX} bytes",
            rejection.body_text()
        );
        ApiError::new(code, words)
    })?;
    let idem = idempotency(&headers, &body)?;
    // Before everything that may have changed since: a full queue must not hide the job that fills it.
    if let Some((key, hash)) = &idem
        && let Some(id) =
            api.parts.store.submitted_before(identity.uid, key.clone(), *hash).await.map_err(stored)?
        && let Some(job) = api.parts.store.job(&id).await?
    {
        return Ok((StatusCode::OK, axum::Json(view(&api, &job).await?)).into_response());
    }
    let mut spec = JobSpec::parse(&body).map_err(|error| {
        let code = match &error {
            SpecError::Field { key, .. } if key == "(whole spec)" => ErrorCode::TooLarge,
            SpecError::Field { .. } | SpecError::Syntax(_) => ErrorCode::InvalidSpec,
        };
        ApiError::new(code, error).hint("`hotcell schema` prints the JSON Schema of a job spec")
    })?;
    let from = from_job(&api, &peer, &mut spec).await?;
    if let Some(workspace) = spec.workspace.as_mut().filter(|workspace| workspace.git.is_some()) {
        workspace.mode.get_or_insert(WorkspaceMode::Copy);
    }
    let granted = api.granted(&identity)?;
    let policies = api.policies().await?;
    let plan = plan(&api, &policies, &spec, &granted, &identity)?;
    if api.parts.metrics.engine_up.get() == 0 {
        let words = format!("the container engine at {} does not answer", api.engine_address);
        return Err(ApiError::new(ErrorCode::EngineUnavailable, words)
            .hint("start it (`make engine`) and submit again"));
    }
    room(&api).await?;
    let id = new_id()?;
    let source = sources::fetch(&api, &identity, &mut spec, &plan, &id).await?;
    let rules = (&*policies, &granted);
    let wish =
        Wish { spec: &spec, body: &body, identity: &identity, plan, from, day_usd: granted.day_usd, rules };
    let accepting = accept(&api, wish, source.as_ref().map(|kept| &kept.fetched), id.clone(), idem).await;
    if source.is_some() && !accepting.as_ref().is_ok_and(|accepted| accepted.fresh) {
        sources::forget(&api, &identity, &id).await;
    }
    let Stored { id, fresh, accepted, warnings } = accepting?;
    drop(source);
    let job = api
        .parts
        .store
        .job(&id)
        .await?
        .ok_or_else(|| ApiError::new(ErrorCode::Internal, "the new job has no row"))?;
    if fresh {
        if !api.access.rules.is_empty() {
            api.driver.limit(identity.uid, granted.slots.and_then(|n| usize::try_from(n).ok())).await;
        }
        let credential = match spec.command {
            // It asks nobody.
            Some(_) => String::new(),
            None => api.parts.gateway.limited_with(&accepted.plan.provider, &accepted.plan.model),
        };
        let plan = &accepted.plan;
        let ticket = Ticket::new(identity.uid, spec.priority, credential, &plan.policy, &plan.limits);
        api.driver.submitted(id, ticket).await;
    }
    let status = if fresh { StatusCode::CREATED } else { StatusCode::OK };
    let mut view = view(&api, &job).await?;
    view.warnings = warnings;
    view.warnings.extend(api.paused().await?.map(|paused| format!("the daemon is {}", paused.words())));
    Ok((status, axum::Json(view)).into_response())
}

/// What is to be a job.
struct Wish<'a> {
    spec: &'a JobSpec,
    body: &'a [u8],
    identity: &'a Identity,
    plan: Plan,
    from: Option<JobId>,
    day_usd: Option<MicroUsd>,
    /// What an image that is picked for it is held against.
    rules: (&'a BTreeMap<String, Policy>, &'a Grant),
}

/// What became one.
struct Stored {
    id: JobId,
    /// False: it was one before.
    fresh: bool,
    accepted: Accepted,
    warnings: Vec<String>,
}

/// Opens the workspaces and writes the row.
async fn accept(
    api: &Api,
    wish: Wish<'_>,
    source: Option<&Fetched>,
    id: JobId,
    idem: Option<(String, [u8; 32])>,
) -> Result<Stored, ApiError> {
    let Wish { spec, body, identity, mut plan, from, day_usd, rules } = wish;
    let Opened { workspace, above, others, warnings: mut more } =
        open_workspaces(api, identity, spec, &plan).await?;
    if plan.image == AUTO_IMAGE {
        let pick = auto::picked(api, identity, workspace.as_ref()).await?;
        let named = JobSpec { image: Some(pick.image.clone()), ..spec.clone() };
        let again = self::plan(api, rules.0, &named, rules.1, identity);
        plan = again.map_err(|error| auto::refused(error, &pick))?;
        more.push(pick.why);
    }
    let mut to_build = None;
    if plan.image == BUILD_IMAGE {
        let again = |spec: &JobSpec| self::plan(api, rules.0, spec, rules.1, identity).map(drop);
        let (found, list) = build::planned(api, identity, (spec, &plan), workspace.as_ref(), &again).await?;
        to_build = Some(found);
        more.extend(list);
    }
    let usual = spec.workspace.as_ref().is_some_and(|workspace| workspace.mount == MountAt::Workspace);
    if let Some(above) = above.as_ref().filter(|_| usual) {
        // As deep as it lies below the top of its repository; seen at its own path it does so anyway.
        plan.workspace_at = format!("{}/{}", plan.workspace_at, above.below);
    }
    let warnings =
        source.into_iter().flat_map(|fetched| fetched.notes.clone()).chain(more).collect::<Vec<_>>();
    let keep_ignored = spec.workspace.as_ref().is_some_and(|workspace| workspace.keep_ignored);
    let source = source.map(|fetched| fetched.checkout.clone());
    let (build, user_day_micro_usd) = (to_build, day_usd);
    let accepted =
        Accepted { plan, workspace, keep_ignored, from, source, above, others, build, user_day_micro_usd };
    same_workspace(api, &accepted).await?;
    let (id, fresh) = store(api, id, identity, spec, &accepted, (body, &warnings), idem).await?;
    Ok(Stored { id, fresh, accepted, warnings })
}

fn new_id() -> Result<JobId, ApiError> {
    let mut random = [0u8; 8];
    getrandom::fill(&mut random).map_err(|e| ApiError::new(ErrorCode::Internal, e))?;
    Ok(JobId::new(clock::wall_ms(), u64::from_le_bytes(random)))
}

/// Who asks.
///
/// # Errors
/// When the kernel would not tell.
pub fn identity(peer: &Peer) -> Result<Identity, ApiError> {
    peer.0.clone().ok_or_else(|| ApiError::new(ErrorCode::Internal, "the kernel does not tell who you are"))
}

fn idempotency(headers: &HeaderMap, body: &[u8]) -> Result<Option<(String, [u8; 32])>, ApiError> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    let key = value.to_str().ok().filter(|k| !k.is_empty() && k.len() <= KEY_BYTES_MAX);
    let key = key.ok_or_else(|| {
        let words = format!("Idempotency-Key must be 1 to {KEY_BYTES_MAX} visible ASCII characters");
        ApiError::new(ErrorCode::InvalidRequest, words)
    })?;
    Ok(Some((key.to_owned(), Sha256::digest(body).into())))
}

fn plan(
    api: &Api,
    policies: &BTreeMap<String, Policy>,
    spec: &JobSpec,
    granted: &Grant,
    who: &Identity,
) -> Result<Plan, ApiError> {
    let name = spec.policy.as_deref().or(granted.default_policy.as_deref()).unwrap_or(&api.default_policy);
    granted.policy(name)?;
    let policy = policies.get(name).ok_or_else(|| {
        let mine = policies.keys().map(String::as_str).filter(|name| granted.has_policy(name));
        let known = mine.collect::<Vec<_>>().join(", ");
        ApiError::new(
            ErrorCode::UnknownPolicy,
            format!("policy: there is no policy {name:?} (there are: {known})"),
        )
        .hint("`hotcell policy ls` lists them")
    })?;
    let sets = api.policies.sets();
    let own = spec.narrow.as_deref().map(|text| Narrowing::parse_with("narrow", text, &sets)).transpose();
    let own = own.map_err(|error| {
        ApiError::new(ErrorCode::InvalidSpec, error)
            .hint("`hotcell policy check --narrow FILE` checks a policy of your own")
    })?;
    let plan = narrow(spec, policy, own.as_ref(), &api.defaults).map_err(|error| {
        ApiError::new(ErrorCode::AbovePolicy, error)
            .hint(format!("`hotcell policy show {name}` shows its limits"))
    })?;
    if ![AUTO_IMAGE, BUILD_IMAGE].contains(&plan.image.as_str()) {
        granted.image(&plan.image)?;
    }
    check_steps(&plan, spec)?;
    if spec.command.is_some() {
        // No model is asked.
        return Ok(plan);
    }
    granted.provider(&plan.provider)?;
    usable(api, &plan.provider, who)?;
    let provider = &plan.provider;
    for (key, model) in [("model", Some(&plan.model)), ("fallback_model", plan.fallback_model.as_ref())] {
        let gateway = &api.parts.gateway;
        if let Some(model) = model.filter(|model| !gateway.serves(provider, model)) {
            let words = format!("{key}: the provider {provider} has no id for {model:?}");
            return Err(ApiError::new(ErrorCode::InvalidSpec, words)
                .hint("add it to `models` of that [[provider]] in the daemon's configuration"));
        }
        let plain = model.map(|model| gateway.plain_model(provider, model));
        if let Some(model) = plain.filter(|model| !gateway.knows_model(provider, model, &plan)) {
            let words = format!("{key}: {model:?} has no price, so its cost could not be bounded");
            return Err(ApiError::new(ErrorCode::InvalidSpec, words)
                .hint("name a model of prices.toml, add it there, or name [models] unpriced in the policy"));
        }
    }
    if let Some(agent) = plan.agent.as_ref().filter(|text| text.parse::<Version>().is_err()) {
        let words = format!("agent: {agent:?} is not a version such as {PINNED_VERSION}");
        return Err(
            ApiError::new(ErrorCode::InvalidSpec, words).hint("`hotcell agent ls` shows those that are here")
        );
    }
    Ok(plan)
}

/// What setup and verification are to reach must be open to them.
fn check_steps(plan: &Plan, spec: &JobSpec) -> Result<(), ApiError> {
    let setup = spec.setup.as_ref().and_then(|setup| setup.egress.as_deref());
    let verify = spec.verify.as_ref().and_then(|verify| verify.egress.as_deref());
    for (step, names) in [(StepKind::Setup, setup), (StepKind::Verify, verify)] {
        check_step_egress(plan, step, names.unwrap_or_default()).map_err(|error| {
            ApiError::new(ErrorCode::AbovePolicy, error)
                .hint(format!("`hotcell policy show {}` shows what it opens", plan.policy))
        })?;
    }
    Ok(())
}

/// Whether a provider is there and the user is one who may use its credential.
fn usable(api: &Api, name: &str, who: &Identity) -> Result<(), ApiError> {
    let gateway = &api.parts.gateway;
    match gateway.may_use(name, who) {
        Ok(()) => Ok(()),
        Err(GatewayError::UnknownProvider(_)) => {
            let known = gateway.providers().collect::<Vec<_>>().join(", ");
            let words = format!("provider: there is no provider {name:?} (there are: {known})");
            Err(ApiError::new(ErrorCode::InvalidSpec, words).hint("leave it out for the default one"))
        }
        Err(error) => Err(ApiError::new(ErrorCode::AbovePolicy, format!("provider: {name}: {error}"))
            .hint("name a provider whose credential you may use, or ask the daemon's administrator")),
    }
}

async fn room(api: &Api) -> Result<(), ApiError> {
    let counts = api.parts.store.counts_by_state().await?;
    // Those that wait for a slot, and those that wait for a moment.
    let queued: u64 = ["queued", "parked"].iter().filter_map(|name| counts.get(name)).sum();
    if queued < api.queued_jobs_max {
        return Ok(());
    }
    let words = format!("{queued} jobs are queued, which is the limit");
    Err(ApiError::new(ErrorCode::QueueFull, words).hint("submit again later, with the same Idempotency-Key"))
}

/// The workspaces of a job, as they are now.
#[derive(Default)]
struct Opened {
    workspace: Option<WorkspaceRecord>,
    /// The repository that it is a part of.
    above: Option<Above>,
    others: Vec<OtherWorkspace>,
    /// What its submitter should know.
    warnings: Vec<String>,
}

async fn open_workspaces(
    api: &Api,
    identity: &Identity,
    spec: &JobSpec,
    plan: &Plan,
) -> Result<Opened, ApiError> {
    let need = match plan.workspace_mode {
        WorkspaceMode::Bind => Access::Write,
        WorkspaceMode::Copy | WorkspaceMode::ReadOnly => Access::Read,
        WorkspaceMode::None => return Ok(Opened::default()),
    };
    let Some(workspace) = spec.workspace.clone() else { return Ok(Opened::default()) };
    // Of what was fetched, it is the checkout.
    let Some(path) = workspace.path else { return Ok(Opened::default()) };
    let (identity, hide) = (identity.clone(), plan.hide.clone());
    let state_dir = api.parts.settings.state_dir.clone();
    let opened = tokio::task::spawn_blocking(move || {
        let guard = Guard::for_user(&state_dir, identity.uid);
        let at =
            |key: String| move |e: WorkspaceError| ApiError::new(ErrorCode::Workspace, format!("{key}: {e}"));
        let (dir, record) =
            workspace::open_as(&identity, &path, need, &guard).map_err(at("workspace.path".to_owned()))?;
        let mut warnings = secrets(&identity, &path, dir, &hide);
        let above = above::above(&identity, &record, &guard).map_err(at("workspace.path".to_owned()))?;
        let above = above.map(|found| found.and_then(|above| fits(above, workspace.mount)));
        let above = above.and_then(|found| found.map_err(|why| warnings.push(why)).ok());
        let mut others = Vec::new();
        for (index, other) in workspace.others.into_iter().enumerate() {
            let opened = workspace::open_as(&identity, &other.path, Access::Read, &guard);
            let (_, record) = opened.map_err(at(format!("workspace.others[{index}].path")))?;
            let at = other.seen_at();
            others.push(OtherWorkspace { name: other.name, mode: other.mode.as_mode(), at, record });
        }
        Ok(Opened { workspace: Some(record), above, others, warnings })
    });
    opened.await.map_err(|e| ApiError::new(ErrorCode::Internal, e))?
}

/// Whether the cell can see the top of its work tree where the mount wants it.
fn fits(above: Above, mount: MountAt) -> Result<Above, String> {
    match (mount, taken_at(&above.root)) {
        (MountAt::Workspace, _) | (MountAt::SamePath, None) => Ok(above),
        (MountAt::SamePath, Some(taken)) => Err(format!(
            "its git repository is not shown: a cell needs {taken} for itself, which {:?} would cover",
            above.root
        )),
    }
}

/// What looks like a secret and is not hidden. A quick look: its limits, and whatever goes wrong, end it silently.
fn secrets(identity: &Identity, path: &std::path::Path, dir: OwnedFd, hide: &[String]) -> Vec<String> {
    let Ok(rules) = HideRules::new(hide) else { return Vec::new() };
    // Installed packages have keys for tests, and thousands of files.
    let enter =
        |path: &crate::change::TreePath| !matches!(path.name(), b".git" | b"node_modules" | b"target");
    let look = move || Ok::<_, WorkspaceError>(workspace::look(dir.as_fd(), &SECRETS_LOOK, &enter));
    let looked = workspace::as_submitter(identity, path, Duration::from_secs(2), look);
    looked.map(|looked| workspace::secret_warnings(&looked, &rules)).unwrap_or_default()
}

/// The job whose changes this one goes on with; its workspace is this one's too where none is named.
async fn from_job(api: &Api, peer: &Peer, spec: &mut JobSpec) -> Result<Option<JobId>, ApiError> {
    let Some(from) = &spec.from else { return Ok(None) };
    let bad = |e: &dyn std::fmt::Display| ApiError::new(ErrorCode::InvalidSpec, format!("from: {e}"));
    let job = api.own_job(peer, from).await?;
    if job.row.identity.uid != identity(peer)?.uid {
        return Err(bad(&"it is not a job of yours"));
    }
    let kept = changes::read(&api.parts, &job).await.map_err(|e| bad(&e))?;
    if kept.set.entries.iter().any(|entry| entry.after.as_ref().is_some_and(|node| node.is_lost())) {
        return Err(bad(&"not all of what it changed was kept"));
    }
    if spec.workspace.is_none() {
        let former: JobSpec =
            serde_json::from_str(&job.spec_json).map_err(|e| ApiError::new(ErrorCode::Internal, e))?;
        spec.workspace = former.workspace;
        let accepted: Accepted =
            serde_json::from_str(&job.plan_json).map_err(|e| ApiError::new(ErrorCode::Internal, e))?;
        let git = spec.workspace.as_mut().and_then(|workspace| workspace.git.as_mut());
        if let (Some(git), Some(source)) = (git, accepted.source) {
            // The very commit: its branch may have moved on.
            git.name = Some(source.commit);
        }
    }
    if let Some(workspace) = &mut spec.workspace {
        workspace.mode.get_or_insert(WorkspaceMode::Copy);
    }
    Ok(Some(job.row.id))
}

/// Changes go on where they were made.
async fn same_workspace(api: &Api, accepted: &Accepted) -> Result<(), ApiError> {
    let Some(from) = &accepted.from else { return Ok(()) };
    let bad = |words: &str| Err(ApiError::new(ErrorCode::InvalidSpec, format!("from: {words}")));
    if accepted.plan.workspace_mode != WorkspaceMode::Copy {
        return bad("only a copy can go on with a job's changes (workspace.mode = \"copy\")");
    }
    let job = api.parts.store.job(from).await?;
    let former: Option<Accepted> = job.and_then(|job| serde_json::from_str(&job.plan_json).ok());
    if let (Some(now), Some(then)) =
        (&accepted.source, former.as_ref().and_then(|former| former.source.as_ref()))
    {
        let same = (&now.url, &now.commit) == (&then.url, &then.commit);
        return if same { Ok(()) } else { bad("it worked on another commit, or on another repository") };
    }
    let place = |record: &WorkspaceRecord| (record.dev, record.ino);
    let there = former.and_then(|former| former.workspace).as_ref().map(place);
    if there.is_some() && there == accepted.workspace.as_ref().map(place) {
        return Ok(());
    }
    bad("it worked on another directory")
}

async fn store(
    api: &Api,
    id: JobId,
    identity: &Identity,
    spec: &JobSpec,
    accepted: &Accepted,
    (body, warnings): (&[u8], &[String]),
    idem: Option<(String, [u8; 32])>,
) -> Result<(JobId, bool), ApiError> {
    let internal = |e: &dyn std::fmt::Display| ApiError::new(ErrorCode::Internal, e);
    let now = clock::wall_ms();
    let job = NewJob {
        id: id.clone(),
        identity: identity.clone(),
        priority: spec.priority,
        spec_json: String::from_utf8_lossy(body).into_owned(),
        plan_json: serde_json::to_string(accepted).map_err(|e| internal(&e))?,
        policy: accepted.plan.policy.clone(),
        model: accepted.plan.model.clone(),
        labels: spec.labels.clone(),
        batch: batch(spec),
        idem,
        created_ms: now,
    };
    // The journal's first event is written when somebody opens the record, here or after a crash.
    match api.parts.store.submit(job).await {
        Ok(Submitted::New(id)) => {
            begin_journal(api, &id, warnings)?;
            Ok((id, true))
        }
        Ok(Submitted::Existing(id)) => Ok((id, false)),
        Err(error) => Err(stored(error)),
    }
}

fn stored(error: StoreError) -> ApiError {
    match error {
        StoreError::IdempotencyConflict { existing } => {
            let words = format!("this Idempotency-Key was used for {existing} with another spec");
            ApiError::new(ErrorCode::IdempotencyConflict, words).hint("use a new key for a new spec")
        }
        error @ StoreError::BatchBudget { .. } => {
            ApiError::new(ErrorCode::InvalidSpec, format!("batch.cost_usd: {error}"))
        }
        error => error.into(),
    }
}

/// The batch of a job; its figure was checked with the spec.
fn batch(spec: &JobSpec) -> Option<Batch> {
    let batch = spec.batch.as_ref()?;
    let limit = batch.cost_usd.and_then(|usd| MicroUsd::from_usd(usd).ok());
    Some(Batch { name: batch.name.clone(), limit })
}

fn begin_journal(api: &Api, id: &JobId, warnings: &[String]) -> Result<(), ApiError> {
    let begun = Journal::create(api.parts.settings.journal_dir(id), api.parts.settings.journal).and_then(
        |mut journal| {
            journal.push(&Body::State { state: JobState::Queued }, clock::wall_ms())?;
            for text in warnings {
                journal.push(&Body::Note { text: text.clone() }, clock::wall_ms())?;
            }
            journal.commit()
        },
    );
    if let Err(error) = begun {
        // The row stands; the event is written when the job gets its slot.
        tracing::warn!(job = %id, %error, "cannot begin the journal of a new job");
    }
    Ok(())
}
