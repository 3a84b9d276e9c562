//! The image of a job that is built from its workspace's own Dockerfile, before its cell: the context is packed as the
//! submitter, the engine's plain builder gets the text that was listed at submit, and its commands have the network of a
//! cell of ours, whose one way out is the gateway. *Invariant*: nothing of a build runs before what it would run stands
//! in the job's journal, and nothing of it but its image is left when this returns.

mod shelf;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::watch::Receiver;

pub use self::shelf::{Kept, forget, images_of, kept, unused};

use self::watch::{Asked, Way, follow};
use super::prepare::{self, Image, Launch, PrepareError, Started, WALL_SLACK_MS, failed};
use super::record::{Record, RecordError};
use super::steps;
use super::{Accepted, Parts, StopWish, way_out};
use crate::agent::{surroundings, way_out as agent_way_out};
use crate::cell_image::DEFAULT_IMAGE;
use crate::dockerfile::{self, Authorities, Context, OWN_DIR, PackLimits, Packed, Recipe};
use crate::engine::{EngineError, LABEL_BUILD, LABEL_INSTANCE, LABEL_OWNER, SealedBuild};
use crate::event::Body;
use crate::job::spec::{SetupSpec, WorkspaceMode};
use crate::job::{FailReason, JobSpec};
use crate::policy::Plan;
use crate::workspace::{self, Guard, WorkspaceError};

/// Longest build.
const BUILD_WALL_MAX: Duration = Duration::from_secs(45 * 60);
/// Longest time that packing a context may take.
const PACK_TIME_MAX: Duration = Duration::from_secs(300);
/// How large a context may be.
const PACK: PackLimits =
    PackLimits { bytes_max: 1 << 30, entries_max: 200_000, time_max: Duration::from_secs(60) };
/// Label of what a finished image was built from.
const LABEL_RECIPE: &str = "hotcell.recipe";
/// What the Dockerfile is called among our files in the context.
const DOCKERFILE: &str = "Dockerfile";
/// Arguments that a builder passes on without an `ARG`, and without a word of them in the image's history.
const TAKEN_BY_ITSELF: [&str; 5] = ["HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY"];
/// apt looks at no variable for its authorities, but for one with a file of settings.
const APT: (&str, &str, &str) = ("APT_CONFIG", "apt.conf", "Acquire::https::CAInfo \"/.hotcell/ca.pem\";\n");

/// What was accepted to be built.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ToBuild {
    /// What is built.
    pub recipe: Recipe,
    /// Each image that it is built on, by digest.
    pub bases: BTreeMap<String, String>,
}

impl ToBuild {
    /// Puts the commands of its devcontainer before the job's own.
    pub fn set_up(&self, spec: &mut JobSpec) {
        if self.recipe.setup.is_empty() {
            return;
        }
        let setup =
            spec.setup.get_or_insert(SetupSpec { commands: Vec::new(), timeout_s: None, egress: None });
        setup.commands.splice(0..0, self.recipe.setup.iter().cloned());
    }
}

/// The id of the job's image: built now, found as an earlier job's, or what it was before.
///
/// # Errors
/// [`PrepareError`]: `image_build_failed` with the step and its last words.
pub(super) async fn built(
    parts: &Arc<Parts>,
    record: &mut Record,
    stop: &mut Receiver<StopWish>,
) -> Result<String, PrepareError> {
    if let Some(id) = shelf::image_of_job(parts, record).await? {
        return Ok(id);
    }
    let Some(wanted) = record.accepted.build.clone() else {
        return Err(failed(FailReason::Internal, "nothing was accepted to be built"));
    };
    let packed = tokio::select! {
        packed = packed(parts, record, &wanted.recipe) => packed?,
        // It goes on for a while by itself, and what it wrote goes with it.
        Some((reason, detail)) = prepare::wish(stop) => return Err(PrepareError::Stopped(reason, detail)),
    };
    let what = format!("{} files, {} KiB", packed.files, packed.bytes.div_ceil(1024));
    let hidden = match packed.hidden {
        0 => String::new(),
        count => format!("; {count} paths are hidden from it by the policy"),
    };
    note(record, format!("build: the context has {what} and nothing of git's{hidden}"))?;
    let key = key(parts, record, &wanted, &packed.hash);
    let name = format!("hotcell/build:{}", &key[..24]);
    if let Some(id) = shelf::known(parts, record, &name, &key).await? {
        note(record, format!("build: {name} was built from the same before"))?;
        shelf::keep(parts, record, &name, &id).await?;
        return Ok(id);
    }
    let begun = std::time::Instant::now();
    let made = build(parts, record, &wanted, packed, (&name, &key), stop).await;
    shelf::sweep_up(parts, &record.job, made.is_err()).await;
    super::destroy(parts, &record.job).await;
    let id = made?;
    note(record, format!("build: {name} was built in {:.1} s", begun.elapsed().as_secs_f64()))?;
    shelf::keep(parts, record, &name, &id).await?;
    Ok(id)
}

fn note(record: &mut Record, text: String) -> Result<(), RecordError> {
    record.push(&Body::Note { text })?;
    record.commit()
}

fn build_failed(message: impl ToString) -> PrepareError {
    failed(FailReason::ImageBuildFailed, message)
}

/// What makes an image the same: what it is made of, and for whom.
fn key(parts: &Parts, record: &Record, wanted: &ToBuild, context: &str) -> String {
    let Recipe { text, args, env, target, source, .. } = &wanted.recipe;
    let (who, policy) = (record.identity.uid, &record.accepted.plan.policy);
    let instance = parts.store.instance().as_str();
    let all =
        serde_json::json!([instance, who, policy, source, text, args, env, target, wanted.bases, context]);
    Sha256::digest(all.to_string()).iter().map(|b| format!("{b:02x}")).collect()
}

async fn packed(parts: &Arc<Parts>, record: &Record, recipe: &Recipe) -> Result<Packed, PrepareError> {
    let Some(workspace) = record.accepted.workspace.clone() else {
        return Err(build_failed("there is no workspace, so there is nothing to build"));
    };
    let (identity, state_dir) = (record.identity.clone(), parts.settings.state_dir.clone());
    let mut limits = PACK;
    limits.bytes_max = limits.bytes_max.min(record.accepted.plan.limits.disk_bytes);
    let context = Context { dir: recipe.context.clone(), hide: record.accepted.plan.hide.clone(), limits };
    let pack = move || {
        let guard = Guard::for_user(&state_dir, identity.uid);
        let dir = workspace::reopen_as(&identity, &workspace, &guard)?;
        // Without a name: it goes with us, however we go.
        let file = tempfile::tempfile_in(&state_dir)?;
        workspace::as_submitter(&identity, &workspace.path, PACK_TIME_MAX, move || {
            use std::os::fd::AsFd;
            dockerfile::pack(dir.as_fd(), &context, file)
        })
    };
    let packed = tokio::task::spawn_blocking(pack).await.map_err(|e| failed(FailReason::Internal, e))?;
    packed.map_err(|error| match error {
        dockerfile::PackError::Workspace(WorkspaceError::Moved { .. }) => {
            failed(FailReason::WorkspaceMoved, error)
        }
        error => build_failed(error),
    })
}

/// The engine's part, with the way out that its commands have.
async fn build(
    parts: &Arc<Parts>,
    record: &mut Record,
    wanted: &ToBuild,
    packed: Packed,
    (name, key): (&str, &str),
    stop: &mut Receiver<StopWish>,
) -> Result<String, PrepareError> {
    let wall = BUILD_WALL_MAX.min(Duration::from_millis(record.wall_left_ms()));
    let plan = steps::setup_plan(record);
    let way = if plan.cell_has_egress() { Some(way(parts, record, &plan, wall, stop).await?) } else { None };
    let (run, own) = match &way {
        Some((way, run)) => (Some(way), Some(run.clone())),
        None => (None, None),
    };
    let network = run.map(|way| way.container.clone());
    let made = sealed(parts, record, wanted, (&plan, own.as_deref()), packed, (name, key)).await;
    let mut way = way.map(|(way, _)| way);
    let made = match made {
        Ok((build, ours)) => {
            let build = SealedBuild { network, ..build };
            let asked = Asked { build, ours, wall };
            follow(parts, record, asked, way.as_mut().map(Way::of), stop).await
        }
        Err(error) => Err(error),
    };
    if let Some(Started { link, lease, .. }) = way {
        for event in lease.destroy().await {
            record.note_gateway(parts, &event, &mut None)?;
        }
        record.commit()?;
        prepare::leave_link(record, link).await;
    }
    made
}

/// A cell that runs nothing: its loopback is the build's, and leads to the gateway.
async fn way(
    parts: &Arc<Parts>,
    record: &mut Record,
    plan: &Plan,
    wall: Duration,
    stop: &mut Receiver<StopWish>,
) -> Result<(Started, std::path::PathBuf), PrepareError> {
    let image: Image = prepare::image_of(parts, record, DEFAULT_IMAGE, stop).await?;
    let begun = prepare::begin_beside(parts, record, image).await?;
    let mut accepted: Accepted = record.accepted.clone();
    (accepted.workspace, accepted.from, accepted.above, accepted.plan.writable) = (None, None, None, None);
    accepted.others.clear();
    accepted.plan.workspace_mode = WorkspaceMode::None;
    let made = prepare::make_rooms(parts, record, &begun.names, begun.tenant.clone(), accepted, None).await?;
    let shell = begun.image.shell.to_owned();
    let launch = Launch {
        argv: vec![shell.clone()],
        more: &[],
        // Never asked for: it keeps the program from being started.
        steps: vec![vec![shell]],
        terminal: None,
        wall_limit_ms: u64::try_from(wall.as_millis()).unwrap_or(u64::MAX).saturating_add(WALL_SLACK_MS),
        model: false,
        shown: plan,
    };
    let first = Some(Arc::new(plan.clone()));
    let started =
        prepare::finish(parts, record, &begun, (&made.dirs, &made.who), launch, first, stop).await?;
    Ok((started, made.dirs.run))
}

/// What the engine is asked for, and the names of the arguments that are ours. `run`: the directory with the files of
/// authorities.
async fn sealed(
    parts: &Arc<Parts>,
    record: &Record,
    wanted: &ToBuild,
    (plan, run): (&Plan, Option<&Path>),
    packed: Packed,
    (name, key): (&str, &str),
) -> Result<(SealedBuild, BTreeSet<String>), PrepareError> {
    let internal = |e: std::io::Error| failed(FailReason::Internal, format!("cannot write the context: {e}"));
    let parsed = wanted.recipe.parsed().map_err(build_failed)?;
    let (instance, job) = (parts.store.instance().to_string(), record.job.to_string());
    let labels: BTreeMap<String, String> =
        [(LABEL_INSTANCE, instance), (LABEL_BUILD, job)].map(|(key, value)| (key.to_owned(), value)).into();
    let mut env = BTreeMap::new();
    let mut own = Vec::new();
    if let Some(run) = run {
        let trusts = way_out::has_authorities(parts, plan);
        surroundings::add_way_out(&mut env, plan, trusts);
        if trusts {
            own = authorities(run.to_owned()).await.map_err(internal)?;
            env.insert(APT.0.to_owned(), format!("/.hotcell/{}", APT.1));
        }
    }
    let authorities = Authorities { names: own.iter().map(|(name, _)| *name).collect() };
    let known = |name: &str| TAKEN_BY_ITSELF.contains(&name.to_ascii_uppercase().as_str());
    let arguments: BTreeSet<String> = env.keys().filter(|name| !known(name)).cloned().collect();
    let text =
        dockerfile::generate(&parsed, &wanted.bases, &labels, &arguments, &wanted.recipe.env, &authorities);
    let mut files: Vec<(String, Vec<u8>)> = vec![(DOCKERFILE.to_owned(), text.into_bytes())];
    for (name, content) in own {
        files.push((format!("empty-{name}"), Vec::new()));
        files.push((name.to_owned(), content));
    }
    let finish = tokio::task::spawn_blocking(move || packed.finish(&files));
    let context = finish.await.map_err(|e| failed(FailReason::Internal, e))?.map_err(internal)?;
    let mut args = wanted.recipe.args.clone();
    args.extend(env);
    let limits = &record.accepted.plan.limits;
    let owner = record.identity.uid.to_string();
    let labels = [(LABEL_OWNER, owner), (LABEL_RECIPE, key.to_owned()), (LABEL_BUILD, String::new())];
    let build = SealedBuild {
        context,
        dockerfile: format!("{OWN_DIR}/{DOCKERFILE}"),
        tag: name.to_owned(),
        labels: labels.map(|(key, value)| (key.to_owned(), value)).into(),
        args,
        network: None,
        memory_bytes: limits.memory_bytes,
        cpus_milli: limits.cpus_milli.min(super::rooms::cores_milli()),
    };
    Ok((build, arguments))
}

/// The files by which the commands of a build trust the gateway.
async fn authorities(run: std::path::PathBuf) -> std::io::Result<Vec<(&'static str, Vec<u8>)>> {
    let read = move || {
        let names = [
            agent_way_out::ALL_AUTHORITIES,
            agent_way_out::MORE_AUTHORITIES,
            agent_way_out::JAVA_AUTHORITIES,
        ];
        let mut files = Vec::new();
        for name in names {
            files.push((name, std::fs::read(run.join(name))?));
        }
        files.push((APT.1, APT.2.as_bytes().to_vec()));
        Ok(files)
    };
    tokio::task::spawn_blocking(read).await.map_err(std::io::Error::other)?
}

/// What the engine's refusal of a build is to the job.
fn engine_says(error: &EngineError) -> PrepareError {
    match error {
        EngineError::Unavailable { .. } | EngineError::Timeout { .. } => {
            failed(FailReason::EngineUnavailable, error)
        }
        error => build_failed(error),
    }
}
