//! The base of the cell image: the one that is there, one from a registry, or one from Debian packages, in this order.
//!
//! Never waits on a registry that does not answer for longer than its limits.

use std::path::Path;
use std::time::Duration;

use super::context::TarWriter;
use super::{
    BaseSource, Build, BuildRequest, EngineFault, EngineFuture, ImageError, ImageInfo, Images, OnProgress,
    Progress, debian, recipe,
};
use crate::agent_bundle::Arch;
use crate::npm::Npm;

/// A registry that says nothing for so long is taken as absent.
const PULL_SILENCE: Duration = Duration::from_secs(20);
/// apt in a build may work silently for a while.
pub(super) const BUILD_SILENCE: Duration = Duration::from_secs(180);
const DEADLINE: Duration = Duration::from_secs(20 * 60);

/// A base in the engine.
pub(super) struct Base {
    /// Its name.
    pub(super) tag: String,
    /// What it was made from, for people.
    pub(super) source: String,
}

impl Images<'_> {
    pub(super) async fn base(
        &self,
        npm: &Npm,
        request: &BuildRequest,
        arch: Arch,
        work: &Path,
        on_progress: OnProgress<'_>,
    ) -> Result<Base, ImageError> {
        let hash = recipe::base_hash(arch);
        let tag = format!("{}/base:{hash}", self.prefix);
        if !request.force
            && let Some(source) = self.usable_base(&tag, &hash, request.base).await?
        {
            return Ok(Base { tag, source });
        }
        if request.base != BaseSource::Debian {
            match self.registry_base(&tag, &hash, arch, work, on_progress).await {
                Ok(()) => return Ok(Base { tag, source: recipe::REGISTRY_BASE.to_owned() }),
                Err(error @ ImageError::Architecture { .. }) => return Err(error),
                Err(error) if request.base == BaseSource::Registry => {
                    return Err(ImageError::Registry(error.to_string()));
                }
                Err(error) => {
                    let why = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
                    let note = format!("no base from a registry ({why}); making one from Debian packages");
                    on_progress(Progress::Note(&note));
                }
            }
        }
        let tar = debian::make_base(npm, arch, work, on_progress).await?;
        on_progress(Progress::Step("importing the base"));
        let source = format!("debian {} + node {}", recipe::DEBIAN_SUITE, recipe::node(arch).version);
        let changes: Vec<String> = [("image", "base"), ("recipe", &hash), ("base", &source)]
            .iter()
            .map(|(name, value)| format!("LABEL hotcell.{name}=\"{value}\""))
            .collect();
        self.engine.import(&tar, &tag, &changes).await?;
        self.same_arch(&tag, arch).await?;
        Ok(Base { tag, source })
    }

    /// What the base under `tag` was made from, if it is this recipe's and from where it may come.
    async fn usable_base(
        &self,
        tag: &str,
        hash: &str,
        from: BaseSource,
    ) -> Result<Option<String>, ImageError> {
        let Some(info) = self.engine.image(tag).await? else { return Ok(None) };
        let label = |name: &str| info.labels.get(name).cloned().unwrap_or_default();
        let source = label("hotcell.base");
        let wanted = match from {
            BaseSource::Auto => true,
            BaseSource::Registry => source == recipe::REGISTRY_BASE,
            BaseSource::Debian => source != recipe::REGISTRY_BASE,
        };
        Ok((label("hotcell.recipe") == hash && wanted).then_some(source))
    }

    async fn registry_base(
        &self,
        tag: &str,
        hash: &str,
        arch: Arch,
        work: &Path,
        on_progress: OnProgress<'_>,
    ) -> Result<(), ImageError> {
        let reference = recipe::REGISTRY_BASE;
        if self.engine.image(reference).await?.is_none() {
            on_progress(Progress::Step("pulling node:22-bookworm-slim"));
            let ear = Ear::new(on_progress);
            let on_line = |line: &str| ear.line(line);
            ear.watch(PULL_SILENCE, self.engine.pull(reference, &on_line)).await?;
        }
        self.same_arch(reference, arch).await?;
        on_progress(Progress::Step("installing tools on node:22-bookworm-slim"));
        let context = work.join("base-context.tar");
        let write = || {
            let mut tar = TarWriter::create(&context)?;
            tar.text("Dockerfile", recipe::BASE_DOCKERFILE, 0o644)?;
            tar.text("dpkg.cfg", recipe::DPKG_CFG, 0o644)?;
            tar.finish()
        };
        write().map_err(ImageError::io("write", &context))?;
        let build = Build {
            context,
            dockerfile: "Dockerfile",
            tag: tag.to_owned(),
            args: vec![("BASE", reference.to_owned()), ("PACKAGES", recipe::packages().join(" "))],
            labels: vec![
                ("hotcell.image", "base".to_owned()),
                ("hotcell.recipe", hash.to_owned()),
                ("hotcell.base", reference.to_owned()),
            ],
        };
        let ear = Ear::new(on_progress);
        let on_line = |line: &str| ear.line(line);
        ear.watch(BUILD_SILENCE, self.engine.build(&build, &on_line)).await?;
        Ok(())
    }

    async fn same_arch(&self, reference: &str, arch: Arch) -> Result<ImageInfo, ImageError> {
        let info = self.engine.image(reference).await?;
        let info = info.ok_or_else(|| ImageError::NotPresent { reference: reference.to_owned() })?;
        if info.arch.parse::<Arch>().ok() == Some(arch) {
            return Ok(info);
        }
        Err(ImageError::Architecture {
            what: format!("image {reference}"),
            found: info.arch,
            engine: arch.engine_name().to_owned(),
        })
    }
}

/// Hears the lines of an operation, so that its silence can be noticed.
pub(super) struct Ear<'a> {
    heard: tokio::sync::Notify,
    on_progress: OnProgress<'a>,
}

impl<'a> Ear<'a> {
    pub(super) fn new(on_progress: OnProgress<'a>) -> Self {
        Self { heard: tokio::sync::Notify::new(), on_progress }
    }

    pub(super) fn line(&self, line: &str) {
        self.heard.notify_one();
        (self.on_progress)(Progress::Line(line));
    }

    /// Runs `operation` until it is done, silent for too long, or past its deadline.
    pub(super) async fn watch<T>(
        &self,
        silence: Duration,
        mut operation: EngineFuture<'_, T>,
    ) -> Result<T, EngineFault> {
        let until = tokio::time::Instant::now() + DEADLINE;
        let fault = |message: String| EngineFault {
            operation: "wait for the engine".to_owned(),
            message,
            away: true,
        };
        loop {
            let next = until.min(tokio::time::Instant::now() + silence);
            tokio::select! {
                result = &mut operation => return result,
                () = self.heard.notified() => {}
                () = tokio::time::sleep_until(next) => {
                    return Err(fault(format!("nothing heard for {} s", silence.as_secs())));
                }
            }
            if tokio::time::Instant::now() >= until {
                return Err(fault(format!("not done after {} minutes", DEADLINE.as_secs() / 60)));
            }
        }
    }
}
