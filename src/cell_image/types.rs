//! Words of this module: what an engine must do for images, what is asked of a build, what comes of it, what fails.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;

use serde::{Deserialize, Serialize};

use crate::agent_bundle::BundleError;
use crate::npm::NpmError;

/// A future of the engine.
pub type EngineFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, EngineFault>> + Send + 'a>>;
/// Gets the engine's lines of a pull or a build.
pub type OnLine<'a> = &'a (dyn Fn(&str) + Send + Sync);
/// Gets the progress of a build.
pub type OnProgress<'a> = &'a (dyn Fn(Progress<'_>) + Send + Sync);

/// What the engine has to do for images.
pub trait ImageEngine: Send + Sync {
    /// The engine's processor, in any of the usual words (`amd64`, `x86_64`, `x64`, …).
    fn arch(&self) -> EngineFuture<'_, String>;
    /// The image behind a name, id or digest; `None` where the engine has none.
    fn image<'a>(&'a self, reference: &'a str) -> EngineFuture<'a, Option<ImageInfo>>;
    /// Fetches an image from its registry.
    fn pull<'a>(&'a self, reference: &'a str, on_line: OnLine<'a>) -> EngineFuture<'a, ()>;
    /// Builds an image from a context.
    fn build<'a>(&'a self, build: &'a Build, on_line: OnLine<'a>) -> EngineFuture<'a, ()>;
    /// Makes an image of one layer from a root file system. `changes` are lines of a Dockerfile (`LABEL …`).
    fn import<'a>(&'a self, tar: &'a Path, tag: &'a str, changes: &'a [String]) -> EngineFuture<'a, ()>;
    /// Runs a program of ours as root in a container of an image, without a network, and keeps what it changed.
    fn extend<'a>(&'a self, extend: &'a Extend, on_line: OnLine<'a>) -> EngineFuture<'a, ()>;
    /// Gives an image another name.
    fn tag<'a>(&'a self, image_id: &'a str, tag: &'a str) -> EngineFuture<'a, ()>;
    /// Whether each path exists in the image, links followed; nothing of the image is run.
    fn probe_paths<'a>(&'a self, image_id: &'a str, paths: &'a [&'a str]) -> EngineFuture<'a, Vec<bool>>;
}

/// One build by the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Build {
    /// The context, an uncompressed tar file.
    pub context: PathBuf,
    /// The Dockerfile's path within the context.
    pub dockerfile: &'static str,
    /// Name of the result.
    pub tag: String,
    /// Build arguments.
    pub args: Vec<(&'static str, String)>,
    /// Labels of the result.
    pub labels: Vec<(&'static str, String)>,
}

/// One image made from another by a program that runs in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extend {
    /// The image, by id.
    pub image_id: String,
    /// Name of the container meanwhile.
    pub container: String,
    /// Seen at `/mnt`, and writable.
    pub dir: PathBuf,
    /// The program with its arguments.
    pub command: Vec<String>,
    /// Name of the result; without one nothing is kept.
    pub keep_as: Option<String>,
    /// Lines of a Dockerfile (`LABEL …`).
    pub changes: Vec<String>,
}

/// An image as the engine describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// `sha256:…`.
    pub id: String,
    /// The image's processor, in any of the usual words (`amd64`, `x64`, `aarch64`, …).
    pub arch: String,
    /// Size of all layers, where the engine says so.
    pub size_bytes: Option<u64>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

/// An operation that the engine refused or did not finish.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{operation}: {message}")]
pub struct EngineFault {
    /// What was asked, with what.
    pub operation: String,
    /// The engine's words.
    pub message: String,
    /// The engine does not answer at all.
    pub away: bool,
}

/// One piece of news of a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress<'a> {
    /// A new step began.
    Step(&'a str),
    /// A line of the program or engine at work; may be shown or dropped.
    Line(&'a str),
    /// Why another way is taken.
    Note(&'a str),
    /// A download.
    Bytes {
        /// Package.
        what: &'a str,
        /// Bytes so far.
        done: u64,
        /// Bytes in all, where known.
        total: Option<u64>,
    },
}

/// Where the base comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BaseSource {
    /// The registry where it answers, else Debian packages.
    #[default]
    Auto,
    /// `node:22-bookworm-slim` only.
    Registry,
    /// Debian packages only.
    Debian,
}

/// What to build.
#[derive(Debug, Clone, Default)]
pub struct BuildRequest {
    /// Version of the CLI, or a tag of the registry; `None`: the active one.
    pub agent: Option<String>,
    /// Build again even where it exists (takes in newer packages): the default image with its base, a toolchain's
    /// image on the base that is there.
    pub force: bool,
    /// Where the base comes from.
    pub base: BaseSource,
}

/// The image that was built or found. Also the content of `<state>/images/<name>.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Built {
    /// `cell`, or the toolchain.
    #[serde(default = "cell_name")]
    pub name: String,
    /// `sha256:…`.
    pub id: String,
    /// The exact name, `<prefix>/cell:<agent>-<recipe>`.
    pub tag: String,
    /// Size of all layers, where the engine says so.
    pub size_bytes: Option<u64>,
    /// What the base was made from.
    pub base: String,
    /// Version of the CLI in it; a toolchain's image has none, each cell is given it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    /// Versions of what a toolchain's image is for, by Debian package.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub versions: BTreeMap<String, String>,
    /// Hash of the recipe.
    pub recipe: String,
    /// Whether it was there already.
    pub reused: bool,
    /// How long it took.
    pub duration_ms: u64,
    /// When, in milliseconds since 1970.
    pub built_at_ms: u64,
}

fn cell_name() -> String {
    "cell".to_owned()
}

/// An image that hotcell can build, as it is in the engine now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// `cell`, or the toolchain.
    pub name: String,
    /// What a job calls it.
    pub image: String,
    /// How it stands.
    pub state: Standing,
    /// What was built, where something was.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub built: Option<Found>,
}

/// What of an image of ours there is in the engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Found {
    /// `sha256:…`.
    pub id: String,
    /// Size of all layers, where the engine says so.
    pub size_bytes: Option<u64>,
    /// When, in milliseconds since 1970.
    pub built_at_ms: u64,
    /// Versions of what it is for, by Debian package; `claude` is the CLI.
    pub versions: BTreeMap<String, String>,
}

/// How an image that hotcell can build stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// It is there, as this version of hotcell makes it.
    Built,
    /// It is there, from another recipe than this version's.
    Outdated,
    /// It was never built here.
    NotBuilt,
    /// It was built, and is no longer in the engine.
    Gone,
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// mmdebstrap is needed and missing.
    #[error(
        "no container registry answers and mmdebstrap is missing; run `apt-get install mmdebstrap`, then try again"
    )]
    MmdebstrapMissing,
    /// mmdebstrap needs root.
    #[error("unpacking Debian packages needs root; run `sudo hotcell image build`")]
    NotRoot,
    /// A program of this machine failed.
    #[error("{program} failed ({why}); its last lines:\n{last}")]
    Program {
        /// `mmdebstrap`, `apt-get`.
        program: &'static str,
        /// Exit status.
        why: String,
        /// Last lines.
        last: String,
    },
    /// apt is needed and missing.
    #[error(
        "the base is made from Debian packages, and this machine has no apt-get to fetch more of them; \
             build on a Debian machine, or where a container registry answers (`hotcell image build --force`)"
    )]
    AptMissing,
    /// The base could not be had from the registry, and nothing else was allowed.
    #[error("cannot make the base from a registry: {0}; use `--base debian` where no registry is reachable")]
    Registry(String),
    /// Wrong processor.
    #[error("{what} is for {found}, but the engine runs {engine}; use one for {engine}")]
    Architecture {
        /// Image or machine.
        what: String,
        /// Its processor.
        found: String,
        /// The engine's.
        engine: String,
    },
    /// A pinned package changed at the registry.
    #[error("the npm registry has another {package}@{version} than hotcell was released with; refused")]
    PinnedDigest {
        /// Package.
        package: &'static str,
        /// Version.
        version: &'static str,
    },
    /// The default image was never built.
    #[error("there is no cell image yet; run `hotcell image build`")]
    NotBuilt,
    /// A toolchain's image was never built.
    #[error("there is no image hotcell/{name} yet; run `hotcell image build {name}`")]
    ToolchainNotBuilt {
        /// The toolchain.
        name: &'static str,
    },
    /// The recorded image is gone from the engine.
    #[error("the {name} image {id} is no longer in the engine; run `hotcell image build {name}`")]
    Gone {
        /// `cell`, or the toolchain.
        name: &'static str,
        /// Recorded id.
        id: String,
    },
    /// The engine has no such image.
    #[error("the engine has no image {reference:?}; fetch it with `docker pull`, or check the name")]
    NotPresent {
        /// Name asked for.
        reference: String,
    },
    /// No shell in the image.
    #[error("image {image} has no /bin/bash, /usr/bin/bash or /bin/sh; an agent cannot work in it")]
    NoShell {
        /// Image.
        image: String,
    },
    /// Not an id.
    #[error("{id:?} is not an image id")]
    BadId {
        /// What the engine gave.
        id: String,
    },
    /// The engine.
    #[error("the engine failed: {0}")]
    Engine(#[from] EngineFault),
    /// The agent's bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The npm registry.
    #[error(transparent)]
    Npm(#[from] NpmError),
    /// Local file error.
    #[error("cannot {doing} {path}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// Where.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl ImageError {
    pub(super) fn io(doing: &'static str, path: &Path) -> impl Fn(io::Error) -> Self + Clone + use<> {
        let path = path.to_owned();
        move |source| ImageError::Io { doing, path: path.clone(), source }
    }
}
