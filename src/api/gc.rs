//! Retention: what is old or too much goes, each hour by itself and by `POST /v1/gc`. What goes is
//! [`retention::plan`]'s word; here it is measured and removed, a few at a time, each job as by `DELETE`: its audit is
//! kept first, and what it cost stays. It must never remove a job that is not over.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{ConnectInfo, Query, State};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::events::flag;
use super::peer::Peer;
use super::submit::identity;
use super::wire::ErrorCode;
use super::{Api, ApiError, jobs};
use crate::agent_bundle::{Bundle, BundleError, Version};
use crate::cell::build;
use crate::clock;
use crate::job::JobId;
use crate::metrics::Retired;
use crate::retention::{self, Reason, Removal, Row};
use crate::source::Old;
use crate::store::{Leftover, Needed};

/// From the daemon's start to the first look.
const FIRST: Duration = Duration::from_secs(30);
/// Between two looks.
const EVERY: Duration = Duration::from_secs(3600);
/// Between two looks while there is more to remove.
const AGAIN: Duration = Duration::from_secs(10);
/// Most things that one look removes by itself.
const BATCH_MAX: usize = 200;
/// Most things that one answer tells of, and one request removes.
const ANSWER_MAX: usize = 1000;
/// How deep files of a job lie below its directories.
const DEPTH_MAX: usize = 8;

/// What `POST /v1/gc` answers.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct GcView {
    /// Nothing was removed: this is what would be.
    pub dry_run: bool,
    /// What goes, in its order.
    pub removals: Vec<Gone>,
    /// Bytes of all that goes and could be removed.
    pub bytes: u64,
    /// There is more than one answer holds: ask again.
    pub more: bool,
    /// The wall clock has jumped: until it has gone evenly for a day, nothing goes because it is old.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub clock_jumped: bool,
}

/// One thing that goes.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Gone {
    /// `job`, `mirror`, `image` or `agent`.
    pub kind: String,
    /// The job's id, the mirror's or image's name, the agent's version.
    pub name: String,
    /// Whose it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// `age`, `count` or `bytes`: which limit it is over.
    pub reason: String,
    /// What is gained.
    pub bytes: u64,
    /// Nobody has decided on what the job changed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub undecided: bool,
    /// Why it could not be removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left: Option<String>,
}

/// Which of both is meant.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    dry_run: Option<String>,
}

/// One at a time: two would remove the same things.
static ONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// `POST /v1/gc`
///
/// # Errors
/// Who asks is neither an admin nor the daemon's own user.
pub async fn collect(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    query: Result<Query<Asked>, QueryRejection>,
) -> Result<Json<GcView>, ApiError> {
    let Query(asked) = query.map_err(|e| ApiError::new(ErrorCode::InvalidRequest, e.body_text()))?;
    let who = identity(&peer)?;
    if !api.access.is_admin(who.uid) && who.uid != rustix::process::geteuid().as_raw() {
        return Err(ApiError::new(
            ErrorCode::AboveAccess,
            "only admins and the daemon's own user remove what is old",
        )
        .hint("`hotcell rm` removes jobs of yours"));
    }
    let dry_run = flag("dry_run", asked.dry_run.as_deref())?;
    // A client that goes away does not stop it halfway through a job.
    let task = tokio::spawn(async move { look(&api, dry_run, ANSWER_MAX).await });
    Ok(Json(task.await.map_err(|error| ApiError::new(ErrorCode::Internal, error))??))
}

/// Looks by itself until `shutdown`.
pub async fn run(api: Arc<Api>, shutdown: CancellationToken) {
    let mut pause = FIRST;
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = match look(&api, false, BATCH_MAX).await {
            Ok(view) if view.more && view.bytes > 0 => AGAIN,
            Ok(_) => EVERY,
            Err(ApiError(error)) => {
                tracing::warn!(
                    error = error.message,
                    "what is old could not be looked for; the next look goes on"
                );
                EVERY
            }
        };
    }
}

/// What goes, and with `dry_run` stays for now.
async fn look(api: &Arc<Api>, dry_run: bool, most: usize) -> Result<GcView, ApiError> {
    let _one = ONE.lock().await;
    let needed = api.parts.store.needed().await?;
    let mut found = old_jobs(api, &needed).await?;
    found.extend(old_mirrors(api).await);
    found.extend(old_images(api, &needed).await?);
    found.extend(old_agents(api, &needed).await?);
    let clocks = api.parts.store.clocks().await?;
    let clocks = clock::Clocks::look(clocks, clock::wall_ms(), clock::boot_ms());
    let clock_jumped = !clocks.tell_ages();
    if clock_jumped {
        tracing::warn!(
            "the clock has jumped: nothing is removed because it is old until it has gone evenly for a day"
        );
        found.retain(|(_, gone)| gone.reason != Reason::Age.as_str());
    }
    if !dry_run {
        api.parts.store.set_clocks(clocks).await?;
    }
    let more = found.len() > most;
    found.truncate(most);
    let mut removals = Vec::with_capacity(found.len());
    for (what, mut gone) in found {
        if !dry_run {
            gone.left = remove(api, &what).await.err();
            tell(api, what.kind(), &gone);
        }
        removals.push(gone);
    }
    let bytes = removals.iter().filter(|gone| gone.left.is_none()).map(|gone| gone.bytes).sum();
    Ok(GcView { dry_run, removals, bytes, more, clock_jumped })
}

/// What goes, as it is removed.
enum What {
    Job(JobId),
    Mirror(Old),
    Image(String),
    Agent(Version),
}

impl What {
    fn kind(&self) -> Retired {
        match self {
            Self::Job(_) => Retired::Job,
            Self::Mirror(_) => Retired::Mirror,
            Self::Image(_) => Retired::Image,
            Self::Agent(_) => Retired::Agent,
        }
    }

    fn gone(self, name: String, uid: Option<u32>, reason: Reason, bytes: u64) -> (Self, Gone) {
        let (kind, reason) = (self.kind().as_str().to_owned(), reason.as_str().to_owned());
        (self, Gone { kind, name, uid, reason, bytes, undecided: false, left: None })
    }
}

fn tell(api: &Api, kind: Retired, gone: &Gone) {
    let Gone { kind: word, name, reason, bytes, undecided, left, .. } = gone;
    match left {
        Some(why) => tracing::warn!(kind = word, name, why, "what is old could not be removed"),
        None => {
            api.parts.metrics.retired(kind, *bytes);
            tracing::info!(kind = word, name, reason, bytes, undecided, "removed what was old or too much");
        }
    }
}

async fn remove(api: &Arc<Api>, what: &What) -> Result<(), String> {
    let parts = &api.parts;
    match what {
        What::Job(id) => {
            // Asked again: a job may go on with it since.
            if parts.store.needed().await.map_err(|error| error.to_string())?.jobs.contains(id) {
                return Err("a job that is not over goes on with its changes".to_owned());
            }
            match parts.store.job(id).await.map_err(|error| error.to_string())? {
                Some(job) => jobs::remove(api, job).await.map_err(|ApiError(error)| error.message),
                None => Ok(()),
            }
        }
        What::Mirror(old) => match parts.sources.evict(old).await {
            Ok(true) => Ok(()),
            Ok(false) => Err("it is in use".to_owned()),
            Err(error) => Err(error.to_string()),
        },
        What::Image(name) => {
            parts.engine.remove_image(name).await.map_err(|error| error.to_string())?;
            build::forget(&parts.settings.state_dir, name).map_err(|error| error.to_string())
        }
        What::Agent(version) => {
            let (bundles, version) = (parts.bundles.clone(), version.clone());
            let removed = tokio::task::spawn_blocking(move || bundles.remove(&version)).await;
            removed.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
        }
    }
}

async fn old_jobs(api: &Arc<Api>, needed: &Needed) -> Result<Vec<(What, Gone)>, ApiError> {
    let all = api.parts.store.leftovers().await?;
    let (state_dir, changes) = (api.parts.settings.state_dir.clone(), api.parts.settings.changes_dir());
    let needed = needed.jobs.clone();
    let measured = tokio::task::spawn_blocking(move || {
        let row = |one: &Leftover| measure(one, &state_dir, &changes, &needed);
        let rows: Vec<Row> = all.iter().map(row).collect();
        (all, rows)
    });
    let (all, rows) = measured.await.map_err(|error| ApiError::new(ErrorCode::Internal, error))?;
    let uids: HashMap<&JobId, u32> = all.iter().map(|one| (&one.job, one.uid)).collect();
    let plan = retention::plan(clock::wall_ms(), &rows, &api.retention);
    let listed = plan.into_iter().map(|Removal { job, reason, bytes, undecided }| {
        let (name, uid) = (job.to_string(), uids.get(&job).copied());
        let (what, gone) = What::Job(job).gone(name, uid, reason, bytes);
        (what, Gone { undecided, ..gone })
    });
    Ok(listed.collect())
}

/// Blocks.
fn measure(one: &Leftover, state_dir: &Path, changes: &Path, needed: &BTreeSet<JobId>) -> Row {
    let shelf = changes.join(one.job.as_str());
    let is = |name: &str| shelf.join(name).exists();
    // A copy that no change set could be made of yet is work, too.
    let decided = is("applied.json") || is("discarded.json");
    let undecided = !decided && ((one.changed && is("changes.json")) || is("copy.img"));
    let bytes = match one.ended_ms {
        Some(_) => taken(&state_dir.join("jobs").join(one.job.as_str()), 0) + taken(&shelf, 0),
        None => 0,
    };
    Row { job: one.job.clone(), ended_ms: one.ended_ms, bytes, undecided, needed: needed.contains(&one.job) }
}

/// Bytes of the disk below `dir`, without following links. Blocks.
fn taken(dir: &Path, depth: usize) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let of = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(found) if found.is_dir() && depth < DEPTH_MAX => taken(&entry.path(), depth + 1),
        Ok(found) => std::os::unix::fs::MetadataExt::blocks(&found) * 512,
        Err(_) => 0,
    };
    entries.map(of).sum()
}

async fn old_mirrors(api: &Api) -> Vec<(What, Gone)> {
    let found = api.parts.sources.evictable().await.unwrap_or_else(|error| {
        tracing::warn!(%error, "mirrors of repositories cannot be looked at");
        Vec::new()
    });
    let one = |old: Old| {
        let reason = if old.aged { Reason::Age } else { Reason::Bytes };
        let (name, uid, bytes) = (old.name.clone(), old.who.uid, old.bytes);
        What::Mirror(old).gone(name, Some(uid), reason, bytes)
    };
    found.into_iter().map(one).collect()
}

/// Images of repositories' own Dockerfiles that no job has used for long.
async fn old_images(api: &Api, needed: &Needed) -> Result<Vec<(What, Gone)>, ApiError> {
    let (state_dir, age) = (api.parts.settings.state_dir.clone(), api.retention.image_age);
    let open: Vec<PathBuf> = needed.open.iter().map(|job| api.parts.settings.journal_dir(job)).collect();
    let listed = tokio::task::spawn_blocking(move || {
        let used = build::images_of(&open);
        let old = build::unused(&state_dir, SystemTime::now(), age);
        old.into_iter().filter(|kept| !used.contains(&kept.id)).collect::<Vec<_>>()
    });
    let mut old = Vec::new();
    for kept in listed.await.map_err(|error| ApiError::new(ErrorCode::Internal, error))? {
        let bytes = match api.parts.engine.image(&kept.name).await {
            Ok(info) => info.map_or(0, |info| info.size_bytes),
            // Away: the next look is the next one.
            Err(_) => continue,
        };
        old.push(What::Image(kept.name.clone()).gone(kept.name, Some(kept.uid), Reason::Age, bytes));
    }
    Ok(old)
}

/// Versions of the agent that are not the one in use, and that no policy and no job names.
async fn old_agents(api: &Api, needed: &Needed) -> Result<Vec<(What, Gone)>, ApiError> {
    let bundles = api.parts.bundles.clone();
    let found = tokio::task::spawn_blocking(move || Ok((bundles.active()?, bundles.ls()?))).await;
    let found: Result<_, BundleError> = found.map_err(|error| ApiError::new(ErrorCode::Internal, error))?;
    let (active, all) = match found {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(%error, "versions of the agent cannot be looked at");
            return Ok(Vec::new());
        }
    };
    let policies = api.policies().await?;
    let mut held: BTreeSet<&str> = needed.agents.iter().map(String::as_str).collect();
    held.insert(active.as_str());
    held.extend(api.parts.settings.agent.as_deref());
    for policy in policies.values() {
        held.extend(policy.agents.default.as_deref());
        // "*" names none.
        held.extend(policy.agents.allow.iter().map(String::as_str).filter(|allow| *allow != "*"));
    }
    let now = clock::wall_ms();
    let aged = |bundle: &Bundle| {
        u128::from(now.saturating_sub(bundle.installed_at_ms)) > api.retention.agent_age.as_millis()
    };
    let mut old = Vec::new();
    for version in all.iter().map(|bundle| &bundle.version).collect::<BTreeSet<_>>() {
        let of = || all.iter().filter(|bundle| bundle.version == *version);
        let named = held.iter().any(|held| match held.strip_suffix('*') {
            Some(beginning) => version.as_str().starts_with(beginning),
            None => version.as_str() == *held,
        });
        if !named && of().all(aged) {
            let bytes = of().map(|bundle| bundle.size_bytes).sum();
            old.push(What::Agent(version.clone()).gone(version.to_string(), None, Reason::Age, bytes));
        }
    }
    Ok(old)
}
