//! The agent's CLI on this machine: which versions are installed, which one new cells use.
//!
//! Each version lies in `<state>/agents/<version>-<arch>-<libc>/` as `claude` (mode 0711: a cell may run it, not read
//! it) and `bundle.json`. Never runs the CLI, never changes an installed one, never lets a version be used that has
//! not passed its self-test, never leaves a half-installed one under a final name.

pub(crate) mod files;
mod install;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::npm::NpmError;
use files::{read_json, write_whole};

/// The version that hotcell was written and measured against; used until another one is chosen.
pub const PINNED_VERSION: &str = "2.1.197";

/// Processor of a bundle, in npm's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    /// x86-64 (`amd64` in the engine's words).
    X64,
    /// 64-bit ARM (`arm64`, `aarch64`).
    Arm64,
}

/// C library of a bundle and of the image it runs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Libc {
    /// glibc.
    Gnu,
    /// musl.
    Musl,
}

/// What a bundle runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Platform {
    /// Processor.
    pub arch: Arch,
    /// C library.
    pub libc: Libc,
}

/// An exact version, `major.minor.patch` with an optional suffix; safe as a file name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Version(String);

/// What is known about one installed bundle: the content of `bundle.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bundle {
    /// Version of the CLI.
    pub version: Version,
    /// What it runs on.
    pub platform: Platform,
    /// SHA-256 of the file `claude`, in hex.
    pub sha256: String,
    /// Size of the file `claude`.
    pub size_bytes: u64,
    /// npm package it came from.
    pub package: String,
    /// `sha512-…` of the archive it came from.
    pub integrity: String,
    /// When it was installed, in milliseconds since 1970.
    pub installed_at_ms: u64,
    /// How far it is trusted.
    pub state: Qualification,
}

/// How far an installed version is trusted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase", deny_unknown_fields)]
pub enum Qualification {
    /// Present, not tested.
    Installed,
    /// Passed the protocol self-test.
    Qualified {
        /// What was tested.
        report: Report,
    },
    /// Failed it.
    Failed {
        /// Why, in one line.
        why: String,
        /// When, in milliseconds since 1970.
        at_ms: u64,
    },
}

/// Result of a protocol self-test.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// When it ran, in milliseconds since 1970.
    pub at_ms: u64,
    /// How long it took.
    pub duration_ms: u64,
    /// Names of the checks that passed.
    pub checks: Vec<String>,
}

/// Why a bundle could not be installed or used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// Not a version.
    #[error("{text:?} is not a version of the agent; give one such as {PINNED_VERSION}, or `latest`")]
    Version {
        /// What was given, shortened.
        text: String,
    },
    /// Not a processor we have a CLI for.
    #[error("there is no agent for the processor {0:?}; x64 and arm64 are supported")]
    Arch(String),
    /// Not installed.
    #[error("agent {version} for {platform} is not installed; run `hotcell agent install {version}{}`", options(*platform))]
    NotInstalled {
        /// Version asked for.
        version: Version,
        /// Platform asked for.
        platform: Platform,
    },
    /// Installed under no platform.
    #[error("agent {0} is not installed; run `hotcell agent install {0}`")]
    Unknown(Version),
    /// Not tested, or failed its test.
    #[error("agent {version} cannot be used: {why}; run `hotcell agent test {version}`")]
    NotQualified {
        /// Version asked for.
        version: Version,
        /// Its state.
        why: String,
    },
    /// In use.
    #[error("agent {0} is the one in use; run `hotcell agent use <another version>` first")]
    Active(Version),
    /// The package holds something else than a CLI for its platform.
    #[error("{package}@{version} does not hold the agent: {why}")]
    Content {
        /// npm package.
        package: String,
        /// Its version.
        version: String,
        /// What is wrong.
        why: &'static str,
    },
    /// The registry.
    #[error(transparent)]
    Npm(#[from] NpmError),
    /// A file of ours that we cannot read.
    #[error("{path} is damaged ({why}); remove its directory and install again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Parser's message.
        why: String,
    },
    /// Local file error.
    #[error("cannot {doing} {path}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// With which file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

/// What `hotcell agent install` must be told for another platform than the usual one.
fn options(platform: Platform) -> String {
    let libc = if platform.libc == Libc::Musl { " --libc musl" } else { "" };
    let own = if cfg!(target_arch = "aarch64") { Arch::Arm64 } else { Arch::X64 };
    let arch =
        if platform.arch == own { String::new() } else { format!(" --arch {}", platform.arch.as_str()) };
    format!("{libc}{arch}")
}

/// The bundles of one state directory.
#[derive(Debug, Clone)]
pub struct Bundles {
    dir: PathBuf,
}

impl Bundles {
    /// The bundles below `state_dir`. Touches nothing.
    pub fn new(state_dir: &std::path::Path) -> Self {
        Self { dir: state_dir.join("agents") }
    }

    /// All installed bundles, by version and platform. A damaged one is logged and left out. Blocking.
    pub fn ls(&self) -> Result<Vec<Bundle>, BundleError> {
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(self.io("read", source)),
        };
        let mut bundles = Vec::new();
        for entry in entries.take(10_000) {
            let path = entry.map_err(|source| self.io("read", source))?.path();
            let hidden = path.file_name().is_none_or(|name| name.to_string_lossy().starts_with('.'));
            if hidden || !path.join("bundle.json").is_file() {
                continue;
            }
            match read_json::<Bundle>(&path.join("bundle.json")) {
                Ok(bundle) => bundles.push(bundle),
                Err(error) => tracing::warn!(%error, "left out a damaged agent bundle"),
            }
        }
        bundles.sort_by_key(|bundle| (bundle.version.order(), bundle.platform));
        Ok(bundles)
    }

    /// What is recorded about one bundle. Blocking.
    pub fn get(&self, version: &Version, platform: Platform) -> Result<Bundle, BundleError> {
        let path = self.bundle_dir(version, platform).join("bundle.json");
        if !path.is_file() {
            return Err(BundleError::NotInstalled { version: version.clone(), platform });
        }
        read_json(&path)
    }

    /// The CLI's binary, to be bound read-only into a cell. Blocking.
    pub fn path_for(&self, version: &Version, platform: Platform) -> Result<PathBuf, BundleError> {
        self.get(version, platform)?;
        let program = self.bundle_dir(version, platform).join("claude");
        if !program.is_file() {
            return Err(BundleError::NotInstalled { version: version.clone(), platform });
        }
        Ok(program)
    }

    /// Removes every platform of `version`. Refused for the one in use. Blocking.
    pub fn remove(&self, version: &Version) -> Result<(), BundleError> {
        if *version == self.active()? {
            return Err(BundleError::Active(version.clone()));
        }
        for bundle in self.of_version(version)? {
            let path = self.bundle_dir(version, bundle.platform);
            let io = |source| BundleError::Io { doing: "remove", path: path.clone(), source };
            // First out of sight in one step, so that a crash leaves no half bundle under its name.
            let gone =
                tempfile::Builder::new().prefix(files::TEMP_PREFIX).tempdir_in(&self.dir).map_err(io)?;
            std::fs::rename(&path, gone.path().join("old")).map_err(io)?;
            gone.close().map_err(io)?;
        }
        Ok(())
    }

    /// The version that new cells use: the chosen one, else [`PINNED_VERSION`]. Blocking.
    pub fn active(&self) -> Result<Version, BundleError> {
        let path = self.dir.join("active");
        match std::fs::read_to_string(&path) {
            Ok(text) => text.trim().parse(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => PINNED_VERSION.parse(),
            Err(source) => Err(BundleError::Io { doing: "read", path, source }),
        }
    }

    /// Makes `version` the one that new cells use. It must have passed its self-test on a platform, and failed it on
    /// none. Blocking.
    pub fn set_active(&self, version: &Version) -> Result<(), BundleError> {
        let refuse = |why: String| Err(BundleError::NotQualified { version: version.clone(), why });
        let bundles = self.of_version(version)?;
        for bundle in &bundles {
            if let Qualification::Failed { why, .. } = &bundle.state {
                return refuse(format!("its self-test failed on {}: {why}", bundle.platform));
            }
        }
        if !bundles.iter().any(|bundle| matches!(bundle.state, Qualification::Qualified { .. })) {
            return refuse("it has not passed its self-test yet".to_owned());
        }
        let path = self.dir.join("active");
        write_whole(&path, format!("{version}\n").as_bytes()).map_err(|source| BundleError::Io {
            doing: "write",
            path,
            source,
        })
    }

    /// Records the outcome of a self-test of one bundle. Blocking.
    pub fn record_qualification(
        &self,
        version: &Version,
        platform: Platform,
        outcome: Result<Report, String>,
    ) -> Result<Bundle, BundleError> {
        let mut bundle = self.get(version, platform)?;
        bundle.state = match outcome {
            Ok(report) => Qualification::Qualified { report },
            Err(why) => {
                Qualification::Failed { why: why.chars().take(500).collect(), at_ms: crate::clock::wall_ms() }
            }
        };
        files::write_json(&self.bundle_dir(version, platform).join("bundle.json"), &bundle)?;
        Ok(bundle)
    }

    fn of_version(&self, version: &Version) -> Result<Vec<Bundle>, BundleError> {
        let bundles: Vec<_> = self.ls()?.into_iter().filter(|bundle| bundle.version == *version).collect();
        if bundles.is_empty() {
            return Err(BundleError::Unknown(version.clone()));
        }
        Ok(bundles)
    }

    fn bundle_dir(&self, version: &Version, platform: Platform) -> PathBuf {
        self.dir.join(format!("{version}-{platform}"))
    }

    fn io(&self, doing: &'static str, source: io::Error) -> BundleError {
        BundleError::Io { doing, path: self.dir.clone(), source }
    }
}

impl Platform {
    /// This machine's processor, with glibc.
    pub fn of_host() -> Result<Self, BundleError> {
        Ok(Self { arch: std::env::consts::ARCH.parse()?, libc: Libc::Gnu })
    }

    /// The npm package that holds the CLI for this platform.
    pub fn package(self) -> &'static str {
        match (self.arch, self.libc) {
            (Arch::X64, Libc::Gnu) => "@anthropic-ai/claude-code-linux-x64",
            (Arch::X64, Libc::Musl) => "@anthropic-ai/claude-code-linux-x64-musl",
            (Arch::Arm64, Libc::Gnu) => "@anthropic-ai/claude-code-linux-arm64",
            (Arch::Arm64, Libc::Musl) => "@anthropic-ai/claude-code-linux-arm64-musl",
        }
    }
}

impl Arch {
    /// In npm's words.
    pub fn as_str(self) -> &'static str {
        match self {
            Arch::X64 => "x64",
            Arch::Arm64 => "arm64",
        }
    }

    /// In the engine's and Debian's words.
    pub fn engine_name(self) -> &'static str {
        match self {
            Arch::X64 => "amd64",
            Arch::Arm64 => "arm64",
        }
    }
}

impl FromStr for Arch {
    type Err = BundleError;
    /// Reads npm's, Rust's, uname's and the engine's words.
    fn from_str(text: &str) -> Result<Self, BundleError> {
        match text {
            "x64" | "amd64" | "x86_64" => Ok(Arch::X64),
            "arm64" | "aarch64" => Ok(Arch::Arm64),
            other => Err(BundleError::Arch(other.chars().take(32).collect())),
        }
    }
}

impl Libc {
    /// As in directory names.
    pub fn as_str(self) -> &'static str {
        match self {
            Libc::Gnu => "gnu",
            Libc::Musl => "musl",
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.arch.as_str(), self.libc.as_str())
    }
}

impl Version {
    /// The version as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn order(&self) -> (Vec<u64>, String) {
        let (numbers, rest) = self.0.split_once('-').unwrap_or((&self.0, "~"));
        (numbers.split('.').filter_map(|part| part.parse().ok()).collect(), rest.to_owned())
    }
}

impl FromStr for Version {
    type Err = BundleError;
    fn from_str(text: &str) -> Result<Self, BundleError> {
        let (numbers, suffix) = text.split_once('-').unwrap_or((text, "x"));
        let number =
            |part: &str| !part.is_empty() && part.len() <= 9 && part.bytes().all(|b| b.is_ascii_digit());
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '-';
        let good = text.len() <= 64
            && numbers.split('.').count() == 3
            && numbers.split('.').all(number)
            && !suffix.is_empty()
            && suffix.chars().all(plain);
        if good {
            return Ok(Self(text.to_owned()));
        }
        Err(BundleError::Version { text: text.chars().take(64).collect() })
    }
}

impl TryFrom<String> for Version {
    type Error = BundleError;
    fn try_from(text: String) -> Result<Self, BundleError> {
        text.parse()
    }
}

impl From<Version> for String {
    fn from(version: Version) -> String {
        version.0
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests;
