//! The engine as the images need it: a narrow view of [`Engine`], so that building images can be tested
//! against a few lines of a fake. Adds nothing of its own.

use std::path::Path;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::types::{Build, EngineFault, EngineFuture, Extend, ImageEngine, ImageInfo, OnLine};
use crate::engine::{self, BuildContext, BuildSpec, Engine, EngineError, Progress};
use crate::job::InstanceId;

/// Lines of progress that wait to be shown; more are dropped by the engine's side.
const LINES_MAX: usize = 256;

/// An engine, seen by what it does for images.
#[derive(Clone)]
pub struct EngineImages {
    engine: Arc<dyn Engine>,
    instance: InstanceId,
}

impl std::fmt::Debug for EngineImages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineImages").field("instance", &self.instance).finish_non_exhaustive()
    }
}

impl EngineImages {
    /// The view; helpers that it makes carry the label of `instance`.
    pub fn new(engine: Arc<dyn Engine>, instance: InstanceId) -> Self {
        Self { engine, instance }
    }
}

fn fault(operation: &str) -> impl Fn(EngineError) -> EngineFault + '_ {
    move |error| EngineFault {
        operation: operation.to_owned(),
        away: matches!(error, EngineError::Unavailable { .. } | EngineError::Timeout { .. }),
        message: error.to_string(),
    }
}

/// Runs an operation that reports lines, and hands them on while it runs.
async fn with_lines<T>(
    on_line: OnLine<'_>,
    operation: impl AsyncFnOnce(Progress) -> Result<T, EngineError>,
) -> Result<T, EngineError> {
    let (progress, mut lines) = mpsc::channel::<String>(LINES_MAX);
    let mut running = std::pin::pin!(operation(progress));
    loop {
        tokio::select! {
            Some(line) = lines.recv() => on_line(&line),
            done = &mut running => return done,
        }
    }
}

impl ImageEngine for EngineImages {
    fn arch(&self) -> EngineFuture<'_, String> {
        Box::pin(async { self.engine.info().await.map(|info| info.arch).map_err(fault("ask the engine")) })
    }

    fn image<'a>(&'a self, reference: &'a str) -> EngineFuture<'a, Option<ImageInfo>> {
        Box::pin(async move {
            let found = self.engine.image(reference).await.map_err(fault("look for an image"))?;
            Ok(found.map(|info| ImageInfo {
                id: info.id,
                arch: info.arch,
                size_bytes: Some(info.size_bytes),
                labels: info.labels,
            }))
        })
    }

    fn pull<'a>(&'a self, reference: &'a str, on_line: OnLine<'a>) -> EngineFuture<'a, ()> {
        Box::pin(async move {
            let pulled = with_lines(on_line, async |progress| self.engine.pull(reference, &progress).await);
            pulled.await.map(|_| ()).map_err(fault("pull an image"))
        })
    }

    fn build<'a>(&'a self, build: &'a Build, on_line: OnLine<'a>) -> EngineFuture<'a, ()> {
        let owned = |list: &[(&'static str, String)]| {
            list.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect()
        };
        let spec = BuildSpec {
            context: BuildContext::File(build.context.clone()),
            dockerfile: build.dockerfile.to_owned(),
            tag: build.tag.clone(),
            labels: owned(&build.labels),
            build_args: owned(&build.args),
        };
        Box::pin(async move {
            let built = with_lines(on_line, async |progress| self.engine.build(&spec, &progress).await);
            built.await.map(|_| ()).map_err(fault("build an image"))
        })
    }

    fn import<'a>(&'a self, tar: &'a Path, tag: &'a str, changes: &'a [String]) -> EngineFuture<'a, ()> {
        Box::pin(async move {
            let quiet = |_: &str| {};
            let imported =
                with_lines(&quiet, async |progress| self.engine.import(tar, tag, changes, &progress).await);
            imported.await.map(|_| ()).map_err(fault("import an image"))
        })
    }

    fn extend<'a>(&'a self, extend: &'a Extend, on_line: OnLine<'a>) -> EngineFuture<'a, ()> {
        let Extend { image_id, container, dir, command, keep_as, changes } = extend.clone();
        let spec = engine::Extend { image_id, container, dir, command, keep_as, changes };
        Box::pin(async move {
            let made = with_lines(on_line, async |progress| self.engine.extend(&spec, &progress).await);
            made.await.map_err(fault("build an image"))
        })
    }

    fn tag<'a>(&'a self, image_id: &'a str, tag: &'a str) -> EngineFuture<'a, ()> {
        Box::pin(async move { self.engine.tag(image_id, tag).await.map_err(fault("tag an image")) })
    }

    fn probe_paths<'a>(&'a self, image_id: &'a str, paths: &'a [&'a str]) -> EngineFuture<'a, Vec<bool>> {
        Box::pin(async move {
            let probed = self.engine.probe_paths(&self.instance, image_id, paths).await;
            probed.map_err(fault("look into an image"))
        })
    }
}
