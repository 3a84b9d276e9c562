//! The images that cells run in: builds the default one and those of toolchains, finds any one by digest, says what
//! an image offers and which one fits a repository.
//!
//! Works through the engine only (and `mmdebstrap` and `apt-get` where there is no registry). Never puts a credential, a mirror or
//! a certificate of this machine into an image, never runs anything from one, never trusts a name where a digest is
//! known.

mod apt;
mod base;
mod context;
mod debian;
mod facts;
mod fetch;
mod layer;
mod pick;
mod program;
mod recipe;
mod through;
mod toolchain;
mod tree;
mod types;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

pub use facts::{ImageFacts, Shell};
pub use layer::Workshop;
pub use pick::{Pick, image_with, pick};
pub use through::EngineImages;
pub use toolchain::{TOOLCHAINS, Toolchain, toolchain};
pub use types::{
    BaseSource, Build, BuildRequest, Built, EngineFault, EngineFuture, Extend, Found, ImageEngine,
    ImageError, ImageInfo, Listed, OnLine, OnProgress, Progress, Standing,
};

use crate::agent_bundle::files::write_whole;
use crate::agent_bundle::{Arch, Bundle, Bundles, Libc, Platform, Version};
use crate::npm::Npm;
use base::{BUILD_SILENCE, Ear};
use context::TarWriter;

/// Name of the default image.
pub const DEFAULT_IMAGE: &str = "hotcell/cell:latest";

/// The images of one state directory, by one engine.
pub struct Images<'a> {
    engine: &'a dyn ImageEngine,
    bundles: Bundles,
    dir: PathBuf,
    prefix: String,
}

impl std::fmt::Debug for Images<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Images").field("dir", &self.dir).field("prefix", &self.prefix).finish()
    }
}

impl<'a> Images<'a> {
    /// Images recorded below `state_dir`. Touches nothing.
    pub fn new(engine: &'a dyn ImageEngine, state_dir: &Path) -> Self {
        let (bundles, dir) = (Bundles::new(state_dir), state_dir.join("images"));
        Self { engine, bundles, dir, prefix: "hotcell".to_owned() }
    }

    /// The same with another first part of all names than `hotcell`, for tests beside a working installation.
    #[must_use]
    pub fn with_prefix(mut self, prefix: &str) -> Self {
        prefix.clone_into(&mut self.prefix);
        self
    }

    /// Builds the default image, or finds that it is there already. Records its digest as the default.
    pub async fn build(
        &self,
        npm: &Npm,
        request: &BuildRequest,
        on_progress: OnProgress<'_>,
    ) -> Result<Built, ImageError> {
        let started = Instant::now();
        let arch: Arch = self.engine.arch().await?.parse()?;
        let bundle = self.bundle(npm, request, arch, on_progress).await?;
        let recipe = recipe::cell_hash(&bundle.version, arch);
        let tag = format!("{}/cell:{}-{recipe}", self.prefix, bundle.version);
        let (info, reused) = match self.present(&tag, &recipe, request, arch).await? {
            Some(info) => (info, true),
            None => (self.build_cell(npm, request, &bundle, &recipe, &tag, on_progress).await?, false),
        };
        self.engine.tag(&info.id, &self.latest()).await?;
        let built = Built {
            name: "cell".to_owned(),
            versions: BTreeMap::new(),
            base: info.labels.get("hotcell.base").cloned().unwrap_or_default(),
            id: info.id,
            tag,
            size_bytes: info.size_bytes,
            agent: Some(bundle.version.to_string()),
            recipe,
            reused,
            duration_ms: started.elapsed().as_millis() as u64,
            built_at_ms: crate::clock::wall_ms(),
        };
        self.record(&built)?;
        Ok(built)
    }

    /// The image behind `reference`. A name of ours means the recorded digest, whatever it points to now.
    pub async fn resolve_image(&self, reference: &str) -> Result<ImageInfo, ImageError> {
        if let Some(name) = self.own_name(reference) {
            let toolchain = toolchain(name);
            if let Some(built) = self.recorded(name) {
                let info = self.engine.image(&built.id).await?;
                return info.ok_or(ImageError::Gone { name, id: built.id });
            }
            // Built by another state directory of this engine, or loaded from a file.
            let info = self.engine.image(&format!("{}/{name}:latest", self.prefix)).await?;
            return match toolchain {
                None => info.filter(is_cell).ok_or(ImageError::NotBuilt),
                Some(toolchain) => {
                    let info = info.filter(|info| layer::is_toolchain(info, toolchain));
                    info.ok_or(ImageError::ToolchainNotBuilt { name })
                }
            };
        }
        let info = self.engine.image(reference).await?;
        info.ok_or_else(|| ImageError::NotPresent { reference: reference.chars().take(300).collect() })
    }

    /// All images that can be built, and how they stand in the engine.
    pub async fn list(&self, agent: &Version) -> Result<Vec<Listed>, ImageError> {
        let arch: Arch = self.engine.arch().await?.parse()?;
        let mut all = Vec::new();
        for name in ["cell"].into_iter().chain(TOOLCHAINS.iter().map(|toolchain| toolchain.name)) {
            let recipe = match toolchain(name) {
                Some(toolchain) => toolchain.hash(arch),
                None => recipe::cell_hash(agent, arch),
            };
            let image = format!("{}/{name}", self.prefix);
            let info = self.resolve_image(&image).await;
            let (state, built) = match info {
                Ok(info) => {
                    let same = info.labels.get("hotcell.recipe") == Some(&recipe);
                    let built_at_ms = self.recorded(name).map_or(0, |built| built.built_at_ms);
                    let mut versions = layer::versions_of(&info);
                    versions
                        .extend(info.labels.get("hotcell.agent").map(|v| ("claude".to_owned(), v.clone())));
                    let found = Found { id: info.id, size_bytes: info.size_bytes, built_at_ms, versions };
                    (if same { Standing::Built } else { Standing::Outdated }, Some(found))
                }
                Err(ImageError::Gone { .. }) => (Standing::Gone, None),
                Err(ImageError::NotBuilt | ImageError::ToolchainNotBuilt { .. }) => {
                    (Standing::NotBuilt, None)
                }
                Err(error) => return Err(error),
            };
            all.push(Listed { name: name.to_owned(), image, state, built });
        }
        Ok(all)
    }

    /// What an image (from [`Images::resolve_image`]) offers an agent. Cached by digest. An image for another
    /// processor than the engine's, and one without a shell, are named errors.
    pub async fn suitability(&self, image: &ImageInfo) -> Result<ImageFacts, ImageError> {
        facts::suitability(self.engine, image, &self.dir).await
    }

    /// The recorded image `name` (`cell` or a toolchain), if one was built here. A damaged record counts as none.
    /// Blocking.
    pub fn recorded(&self, name: &str) -> Option<Built> {
        let text = std::fs::read(self.dir.join(format!("{name}.json"))).ok()?;
        serde_json::from_slice(&text)
            .inspect_err(
                |error| tracing::warn!(name, %error, "the record of an image is damaged; taken as absent"),
            )
            .ok()
    }

    /// `cell` or a toolchain, where the reference is a name of ours.
    fn own_name(&self, reference: &str) -> Option<&'static str> {
        let name = reference.strip_prefix(self.prefix.as_str())?.strip_prefix('/')?;
        let name = name.strip_suffix(":latest").unwrap_or(name);
        if name == "cell" { Some("cell") } else { toolchain(name).map(|toolchain| toolchain.name) }
    }

    fn latest(&self) -> String {
        format!("{}/cell:latest", self.prefix)
    }

    async fn bundle(
        &self,
        npm: &Npm,
        request: &BuildRequest,
        arch: Arch,
        on_progress: OnProgress<'_>,
    ) -> Result<Bundle, ImageError> {
        let version = match &request.agent {
            Some(version) => version.clone(),
            None => self.bundles.active()?.to_string(),
        };
        on_progress(Progress::Step("fetching the agent"));
        let platform = Platform { arch, libc: Libc::Gnu };
        let on_bytes = |done, total| on_progress(Progress::Bytes { what: platform.package(), done, total });
        Ok(self.bundles.install(npm, &version, platform, &on_bytes).await?)
    }

    async fn present(
        &self,
        tag: &str,
        recipe: &str,
        request: &BuildRequest,
        arch: Arch,
    ) -> Result<Option<ImageInfo>, ImageError> {
        if request.force {
            return Ok(None);
        }
        let same = |info: &ImageInfo| {
            is_cell(info)
                && info.labels.get("hotcell.recipe").is_some_and(|label| label == recipe)
                && info.arch.parse::<Arch>().is_ok_and(|found| found == arch)
        };
        Ok(self.engine.image(tag).await?.filter(same))
    }

    async fn build_cell(
        &self,
        npm: &Npm,
        request: &BuildRequest,
        bundle: &Bundle,
        recipe: &str,
        tag: &str,
        on_progress: OnProgress<'_>,
    ) -> Result<ImageInfo, ImageError> {
        let arch = bundle.platform.arch;
        let work = work_dir(&self.dir)?;
        let base = self.base(npm, request, arch, work.path(), on_progress).await?;
        on_progress(Progress::Step("building the cell image"));
        let context = work.path().join("cell.tar");
        let agent = self.bundles.path_for(&bundle.version, bundle.platform)?;
        let write = {
            let context = context.clone();
            move || write_context(&context, &agent)
        };
        let written = tokio::task::spawn_blocking(write).await.map_err(std::io::Error::other);
        written.and_then(|result| result).map_err(ImageError::io("write", &context))?;
        let build = Build {
            context,
            dockerfile: "Dockerfile",
            tag: tag.to_owned(),
            args: vec![("BASE", base.tag)],
            labels: vec![
                ("hotcell.image", "cell".to_owned()),
                ("hotcell.agent", bundle.version.to_string()),
                ("hotcell.recipe", recipe.to_owned()),
                ("hotcell.base", base.source),
            ],
        };
        let ear = Ear::new(on_progress);
        let on_line = |line: &str| ear.line(line);
        ear.watch(BUILD_SILENCE, self.engine.build(&build, &on_line)).await?;
        let path = work.path().to_owned();
        work.close().map_err(ImageError::io("remove", &path))?;
        let info = self.engine.image(tag).await?;
        info.ok_or_else(|| ImageError::NotPresent { reference: tag.to_owned() })
    }

    fn record(&self, built: &Built) -> Result<(), ImageError> {
        let path = self.dir.join(format!("{}.json", built.name));
        let io = ImageError::io("write", &path);
        std::fs::create_dir_all(&self.dir).map_err(io.clone())?;
        let text = serde_json::to_vec_pretty(built).map_err(|error| io(error.into()))?;
        write_whole(&path, &text).map_err(io)
    }
}

/// Whether the image says that it is a cell image of ours.
fn is_cell(info: &ImageInfo) -> bool {
    info.labels.get("hotcell.image").is_some_and(|kind| kind == "cell")
}

/// A private directory for one build; what an earlier, killed build left is removed once it is an hour old.
fn work_dir(images_dir: &Path) -> Result<tempfile::TempDir, ImageError> {
    const PREFIX: &str = ".work-";
    let io = |doing| ImageError::io(doing, images_dir);
    std::fs::create_dir_all(images_dir).map_err(io("create"))?;
    for entry in std::fs::read_dir(images_dir).map_err(io("read"))?.take(10_000).flatten() {
        let ours = entry.file_name().to_string_lossy().starts_with(PREFIX);
        let modified = entry.metadata().and_then(|meta| meta.modified());
        let age = modified.ok().and_then(|time| time.elapsed().ok());
        if ours && age.is_some_and(|age| age.as_secs() > 3600) {
            std::fs::remove_dir_all(entry.path()).map_err(io("clean"))?;
        }
    }
    tempfile::Builder::new().prefix(PREFIX).tempdir_in(images_dir).map_err(io("create a directory in"))
}

/// The context of `images/cell/Dockerfile`.
fn write_context(path: &Path, agent: &Path) -> std::io::Result<()> {
    let mut tar = TarWriter::create(path)?;
    tar.text("Dockerfile", recipe::CELL_DOCKERFILE, 0o644)?;
    for dir in ["", "/usr", "/usr/local", "/usr/local/bin", "/home", "/home/agent", "/workspace"] {
        tar.dir(&format!("rootfs{dir}"))?;
    }
    tar.dir("rootfs/.hotcell")?;
    tar.dir("rootfs/.hotcell-agent")?;
    tar.text("rootfs/.hotcell-init", "", 0o755)?;
    tar.file("rootfs/usr/local/bin/claude", agent, 0o711)?;
    tar.finish()
}

/// The version of the CLI in a cell image of ours.
pub fn agent_version(info: &ImageInfo) -> Option<Version> {
    is_cell(info).then(|| info.labels.get("hotcell.agent")?.parse().ok()).flatten()
}
