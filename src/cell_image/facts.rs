//! What an image offers an agent: a shell, a C library. Asked of the engine once per image, then kept on disk.
//!
//! Never runs anything from the image; looks only whether paths exist in it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{ImageEngine, ImageError, ImageInfo};
use crate::agent_bundle::files::write_whole;
use crate::agent_bundle::{Arch, Libc};

/// What is known about one image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageFacts {
    /// The image's id (`sha256:…`).
    pub id: String,
    /// Processor.
    pub arch: Arch,
    /// Shell to run commands with; bash where there is one.
    pub shell: Shell,
    /// C library, which decides the CLI that fits. `None`: neither glibc nor musl was found; the CLI cannot run.
    pub libc: Option<Libc>,
    /// Whether git is there (at its usual places).
    pub git: bool,
    /// Whether the image is one of ours, with mount points of a cell and a CLI of this version in it.
    pub agent: Option<String>,
}

/// A shell by its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Shell {
    /// bash at `/bin/bash`.
    #[serde(rename = "/bin/bash")]
    BinBash,
    /// bash at `/usr/bin/bash` only.
    #[serde(rename = "/usr/bin/bash")]
    UsrBinBash,
    /// A POSIX shell at `/bin/sh`.
    #[serde(rename = "/bin/sh")]
    BinSh,
}

impl Shell {
    /// Its path in the image.
    pub fn path(self) -> &'static str {
        match self {
            Shell::BinBash => "/bin/bash",
            Shell::UsrBinBash => "/usr/bin/bash",
            Shell::BinSh => "/bin/sh",
        }
    }
}

const BASH: &str = "/bin/bash";
const USR_BASH: &str = "/usr/bin/bash";
const SH: &str = "/bin/sh";
const ALPINE: &str = "/etc/alpine-release";
const GITS: [&str; 2] = ["/usr/bin/git", "/usr/local/bin/git"];

fn loaders(arch: Arch) -> ([&'static str; 2], &'static str) {
    match arch {
        Arch::X64 => {
            (["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-x86-64.so.2"], "/lib/ld-musl-x86_64.so.1")
        }
        Arch::Arm64 => {
            (["/lib/ld-linux-aarch64.so.1", "/lib64/ld-linux-aarch64.so.1"], "/lib/ld-musl-aarch64.so.1")
        }
    }
}

/// What `image` offers. The answer is kept in `<images_dir>/facts/<digest>.json`, since an image never changes.
/// An image without a shell is [`ImageError::NoShell`].
pub(super) async fn suitability(
    engine: &dyn ImageEngine,
    image: &ImageInfo,
    images_dir: &Path,
) -> Result<ImageFacts, ImageError> {
    let cache = cache_path(images_dir, &image.id)?;
    if let Some(facts) = read(&cache).filter(|facts| facts.id == image.id) {
        return Ok(facts);
    }
    let arch: Arch = image.arch.parse()?;
    let engine_arch = engine.arch().await?;
    if engine_arch.parse::<Arch>()? != arch {
        let what = format!("the image {}", image.id);
        return Err(ImageError::Architecture { what, found: image.arch.clone(), engine: engine_arch });
    }
    let (gnu, musl) = loaders(arch);
    let paths = [BASH, USR_BASH, SH, ALPINE, gnu[0], gnu[1], musl, GITS[0], GITS[1]];
    let found = engine.probe_paths(&image.id, &paths).await?;
    let has = |path: &str| paths.iter().zip(&found).any(|(probed, there)| *probed == path && *there);
    let shell = match () {
        () if has(BASH) => Shell::BinBash,
        () if has(USR_BASH) => Shell::UsrBinBash,
        () if has(SH) => Shell::BinSh,
        () => return Err(ImageError::NoShell { image: image.id.clone() }),
    };
    let is_gnu = gnu.iter().any(|path| has(path));
    // Alpine may hold glibc's loader name as a shim, and Debian may hold musl's loader as a package.
    let libc = match (is_gnu, has(musl), has(ALPINE)) {
        (_, true, true) | (false, true, _) => Some(Libc::Musl),
        (true, _, _) => Some(Libc::Gnu),
        (false, false, _) => None,
    };
    let git = GITS.iter().any(|path| has(path));
    let agent = super::is_cell(image).then(|| image.labels.get("hotcell.agent").cloned()).flatten();
    let facts = ImageFacts { id: image.id.clone(), arch, shell, libc, git, agent };
    keep(&cache, &facts);
    Ok(facts)
}

fn cache_path(images_dir: &Path, id: &str) -> Result<PathBuf, ImageError> {
    let hex = id.strip_prefix("sha256:").unwrap_or(id);
    if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(ImageError::BadId { id: id.chars().take(100).collect() });
    }
    Ok(images_dir.join("facts").join(format!("{hex}.json")))
}

fn read(path: &Path) -> Option<ImageFacts> {
    // Absent or damaged: ask the engine again.
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// Only a cache: a failure to write costs the next job a probe, no more.
fn keep(path: &Path, facts: &ImageFacts) {
    let write = || -> std::io::Result<()> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        write_whole(path, &serde_json::to_vec_pretty(facts)?)
    };
    if let Err(error) = write() {
        tracing::warn!(%error, "cannot keep what was found out about an image");
    }
}
