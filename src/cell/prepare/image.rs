//! The image of a cell: found or fetched, with what it offers an agent. It must never run anything of an image.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::watch;

use super::super::record::Record;
use super::super::{Parts, StopWish, build};
use super::{PrepareError, engine_failure, failed, wish};
use crate::agent_bundle::{Bundles, Platform, Version};
use crate::cell_image::{EngineImages, ImageError, Images};
use crate::engine::{EngineError, LABEL_OWNER};
use crate::job::FailReason;
use crate::job::spec::BUILD_IMAGE;

/// What the image gives.
pub(in crate::cell) struct Image {
    pub(in crate::cell) id: String,
    pub(in crate::cell) env: Vec<(String, String)>,
    pub(in crate::cell) claude: PathBuf,
    pub(in crate::cell) shell: &'static str,
    pub(in crate::cell) volumes: Vec<String>,
}

/// The image of the job's cell.
pub(in crate::cell) async fn find_image(
    parts: &Arc<Parts>,
    record: &mut Record,
    stop: &mut watch::Receiver<StopWish>,
) -> Result<Image, PrepareError> {
    let reference = match record.accepted.plan.image.as_str() {
        BUILD_IMAGE => build::built(parts, record, stop).await?,
        image => image.to_owned(),
    };
    image_of(parts, record, &reference, stop).await
}

/// The image behind a reference, for a cell of this job.
pub(in crate::cell) async fn image_of(
    parts: &Arc<Parts>,
    record: &Record,
    reference: &str,
    stop: &mut watch::Receiver<StopWish>,
) -> Result<Image, PrepareError> {
    let port = EngineImages::new(parts.engine.clone(), parts.store.instance().clone());
    let images = Images::new(&port, &parts.settings.state_dir);
    let info = match images.resolve_image(reference).await {
        // What was built here is nowhere else.
        Err(ImageError::NotPresent { .. }) if !reference.starts_with("sha256:") => {
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
    if let Some(owner) =
        details.labels.get(LABEL_OWNER).filter(|uid| **uid != record.identity.uid.to_string())
    {
        let words = format!("the image {reference} was built for another user (uid {owner})");
        return Err(failed(FailReason::ImageUnavailable, words));
    }
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
