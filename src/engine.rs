//! The container engine, as the rest of hotcell sees it: images, and the containers that cells run in.
//! `docker` is the one implementation and the only file that names the client library; tests script their own.
//! Nothing here decides anything: a `CellSpec` says what a cell may have, `config` turns it into the one
//! locked-down container configuration there is, and no caller can loosen it.
//!
//! A container's name and labels are known before it exists (`container_name`, `LABEL_*`), so that a caller
//! can write its intent first and a sweeper finds whatever a crash left behind.

pub mod address;
mod config;
pub mod docker;
mod processes;
mod tail;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;

use bytes::Bytes;

pub use self::address::find_address;
pub use self::config::{SECCOMP_PROFILE, container_config, host_config};
use crate::job::{CellId, InstanceId, JobId};

/// Label that holds the instance: the only thing by which a daemon recognises its own containers.
pub const LABEL_INSTANCE: &str = "hotcell.instance";
/// Label that holds the cell; a container of ours without it is a short-lived helper (`probe_paths`).
pub const LABEL_CELL: &str = "hotcell.cell";
/// Label of what a build leaves on its way: the job whose build it is. Empty in a finished image.
pub const LABEL_BUILD: &str = "hotcell.build";
/// Label of an image that was built for a user: their uid. Nobody else's job gets it.
pub const LABEL_OWNER: &str = "hotcell.owner";
/// Most bytes that `start` hands to a cell's PID 1 on its standard input (less than a pipe holds, so
/// that a PID 1 which never reads cannot hold `start` up).
pub const BOOT_BYTES_MAX: usize = 32 * 1024;

/// A boxed future that can move between threads.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
/// What every engine call returns.
pub type Reply<'a, T> = BoxFuture<'a, Result<T, EngineError>>;
/// Where lines about a long image operation go. Lines are dropped while the reader is behind: progress
/// never holds an operation up.
pub type Progress = tokio::sync::mpsc::Sender<String>;

/// A Docker-compatible engine. Every call has a time limit of its own, except `wait`.
pub trait Engine: Send + Sync + 'static {
    /// What the engine is and can do.
    fn info(&self) -> Reply<'_, EngineInfo>;

    /// An image by tag, id or digest; `None` where the engine does not have it.
    fn image<'a>(&'a self, reference: &'a str) -> Reply<'a, Option<ImageInfo>>;
    /// Fetches an image from its registry. Without a tag, `latest` is meant.
    fn pull<'a>(&'a self, reference: &'a str, progress: &'a Progress) -> Reply<'a, ImageInfo>;
    /// Builds an image. The recipe runs on the engine with the network: only for recipes that are trusted.
    fn build<'a>(&'a self, spec: &'a BuildSpec, progress: &'a Progress) -> Reply<'a, ImageInfo>;
    /// Builds an image from a recipe that nobody trusts: its commands run as root in the engine's own containers, on no
    /// network but the one that is named. Nothing is pulled. Dropping the call ends the build.
    fn build_sealed<'a>(&'a self, build: SealedBuild, progress: &'a Progress) -> Reply<'a, ImageInfo>;
    /// Images without a name that builds of this instance have left, and the job that each was built for.
    fn loose_images<'a>(&'a self, instance: &'a InstanceId) -> Reply<'a, Vec<(String, Option<JobId>)>>;
    /// Makes an image of a root file system in a tar file, which is streamed. `changes` are Dockerfile
    /// instructions such as `ENV PATH=/bin`.
    fn import<'a>(
        &'a self,
        rootfs_tar: &'a Path,
        tag: &'a str,
        changes: &'a [String],
        progress: &'a Progress,
    ) -> Reply<'a, ImageInfo>;
    /// Runs a program of ours as root in a container of an image, without a network, and keeps what it changed.
    fn extend<'a>(&'a self, spec: &'a Extend, progress: &'a Progress) -> Reply<'a, ()>;
    /// Gives an image another name.
    fn tag<'a>(&'a self, image: &'a str, reference: &'a str) -> Reply<'a, ()>;
    /// Removes an image or a name of it; one that is not there is success, one in use is `Conflict`.
    fn remove_image<'a>(&'a self, reference: &'a str) -> Reply<'a, ()>;
    /// Which of the absolute `paths` exist in an image, symlinks followed, without running anything of it.
    fn probe_paths<'a>(
        &'a self,
        instance: &'a InstanceId,
        image_id: &'a str,
        paths: &'a [&'a str],
    ) -> Reply<'a, Vec<bool>>;

    /// Creates a cell's container, not started. Asked again for the same cell it returns the container
    /// that is there; one with that name and other labels is `Conflict`.
    fn create<'a>(&'a self, spec: &'a CellSpec) -> Reply<'a, ContainerId>;
    /// Starts a container and gives `boot` to its PID 1 as the whole of its standard input.
    fn start<'a>(&'a self, container: &'a ContainerId, boot: &'a [u8]) -> Reply<'a, ()>;
    /// Waits until a started container has ended; at once if it has, and though the engine does not know it, where the
    /// kernel shows its end. No limit of its own: the caller has the deadline. A container that was removed meanwhile
    /// is `NotFound`.
    fn wait<'a>(&'a self, container: &'a ContainerId) -> Reply<'a, Exit>;
    /// SIGKILL to all of a container, past the engine where that does not do it; one that has ended or is gone is
    /// success. True when the kernel shows that nothing of it runs; false where only the engine says so.
    fn kill<'a>(&'a self, container: &'a ContainerId) -> Reply<'a, bool>;
    /// Removes a container, running or not, with its anonymous volumes. `Ok` only when the engine has
    /// confirmed afterwards that it does not know the container.
    fn remove<'a>(&'a self, container: &'a ContainerId) -> Reply<'a, ()>;
    /// Every container of an instance, in any state, helpers included.
    fn list<'a>(&'a self, instance: &'a InstanceId) -> Reply<'a, Vec<Found>>;
    /// The host's process id of a container's PID 1, as the engine knows it; `None` when it does not run.
    fn state_pid<'a>(&'a self, container: &'a ContainerId) -> Reply<'a, Option<u32>>;
}

/// What an engine is and can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineInfo {
    /// The engine's own version, e.g. `20.10.24`.
    pub version: String,
    /// API version it offers, e.g. `1.41`.
    pub api_version: String,
    /// `x64`, `arm64`, or the engine's own word for anything else.
    pub arch: String,
    /// `linux`.
    pub os: String,
    /// The runtimes it has, by name, e.g. `runc`, `runsc`.
    pub runtimes: BTreeMap<String, RuntimeInfo>,
    /// Runtime of a cell that names none.
    pub default_runtime: String,
    /// `1` or `2`; empty where the engine does not say.
    pub cgroup_version: String,
    /// Where the engine keeps images and containers on the host.
    pub root_dir: PathBuf,
    /// Versions of what it is made of, by name, as it tells them: `Engine`, `containerd`, `runc`.
    pub components: BTreeMap<String, String>,
    /// What holds its containers, as it tells it: `name=seccomp,profile=default`, `name=userns`.
    pub security: Vec<String>,
    /// Release of the kernel that its containers run on.
    pub kernel: String,
}

/// How an engine calls a runtime.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeInfo {
    /// Its program: a path, or a name that the engine finds in its own PATH.
    pub path: PathBuf,
    /// Arguments that the engine adds.
    pub args: Vec<String>,
}

/// An image that the engine has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// `sha256:` and 64 hex digits: what cells are created from.
    pub id: String,
    /// `x64`, `arm64`, or the image's own word for anything else.
    pub arch: String,
    /// `linux`.
    pub os: String,
    /// The image's labels.
    pub labels: BTreeMap<String, String>,
    /// Size of all layers, in bytes.
    pub size_bytes: u64,
    /// The image's environment, in its order; what has no `=` is left out.
    pub env: Vec<(String, String)>,
    /// Paths the image declares as volumes. The engine puts a writable directory of its own at each, which
    /// no read-only root covers: mount something over them or refuse the image.
    pub volumes: Vec<String>,
    /// It has instructions that a build on it would run by itself.
    pub on_build: bool,
}

/// A tar stream with a Dockerfile in it.
#[derive(Debug, Clone)]
pub enum BuildContext {
    /// In memory.
    Bytes(Bytes),
    /// In a file, which is streamed.
    File(PathBuf),
}

/// An image to build.
#[derive(Debug, Clone)]
pub struct BuildSpec {
    /// The files, the Dockerfile among them.
    pub context: BuildContext,
    /// Path of the Dockerfile in the context.
    pub dockerfile: String,
    /// Name of the result.
    pub tag: String,
    /// Labels of the result.
    pub labels: BTreeMap<String, String>,
    /// Values of the recipe's `ARG`s. They stay in the image's history: never a secret.
    pub build_args: BTreeMap<String, String>,
}

/// An image to build from a recipe that nobody trusts.
#[derive(Debug)]
pub struct SealedBuild {
    /// The context, an uncompressed tar file that is read from where it stands.
    pub context: std::fs::File,
    /// Path of the Dockerfile in the context.
    pub dockerfile: String,
    /// Name of the result.
    pub tag: String,
    /// Labels of the result.
    pub labels: BTreeMap<String, String>,
    /// Values of its `ARG`s. They stay in the image's history: never a secret.
    pub args: BTreeMap<String, String>,
    /// The container whose network its commands share; none: they have no network.
    pub network: Option<ContainerId>,
    /// Memory of each of its commands, in bytes. The client library takes no more than 2 GiB.
    pub memory_bytes: u64,
    /// CPU time of each of its commands, in thousandths of a core.
    pub cpus_milli: u32,
}

/// An image to make from another one by running something in it.
#[derive(Debug, Clone)]
pub struct Extend {
    /// Image by id (`sha256:…`); one without an entry point and a user.
    pub image_id: String,
    /// Name of the container while this runs. One that ended and still has it is removed first.
    pub container: String,
    /// Seen at `/mnt`, and writable.
    pub dir: PathBuf,
    /// The program with its arguments.
    pub command: Vec<String>,
    /// Name of the result; without one nothing is kept.
    pub keep_as: Option<String>,
    /// Dockerfile instructions such as `ENV PATH=/bin`.
    pub changes: Vec<String>,
}

/// A container's id, as the engine gave it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ContainerId(String);

impl ContainerId {
    /// An id or name that the engine gave, or that was stored.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of a cell's container, known before it is created. The engine takes it wherever it takes an id.
pub fn container_name(instance: &InstanceId, cell: &CellId) -> ContainerId {
    ContainerId(format!("hotcell-{instance}-{cell}"))
}

/// What a cell may use. None of it can be left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CellLimits {
    /// Memory in bytes; swap is not added to it.
    pub memory_bytes: u64,
    /// CPU time in thousandths of a core.
    pub cpus_milli: u32,
    /// Processes and threads.
    pub pids_max: u32,
    /// Open files per process.
    pub nofile_max: u32,
}

/// A host path that is seen in a cell. What is mounted below it comes along, and stays writable under a
/// read-only mount on older engines: the caller stages mounts that are safe by themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindMount {
    /// Absolute path in the engine's mount namespace; must exist.
    pub source: PathBuf,
    /// Absolute path in the cell.
    pub target: String,
    /// Mounted read-only.
    pub read_only: bool,
}

/// All that differs between cells. What is the same for all is in `config`.
#[derive(Clone, PartialEq, Eq)]
pub struct CellSpec {
    /// Whose cell.
    pub instance: InstanceId,
    /// Which cell.
    pub cell: CellId,
    /// Image by id (`sha256:…`), never by name.
    pub image_id: String,
    /// User and group id in the cell; never 0.
    pub user: (u32, u32),
    /// Supplementary group ids in the cell; never 0.
    pub groups: Vec<u32>,
    /// What it may use.
    pub limits: CellLimits,
    /// What it sees of the host. /tmp and HOME are among them: there is no tmpfs.
    pub mounts: Vec<BindMount>,
    /// OCI runtime by the engine's name for it; the engine's default where `None`. One that is named is what the
    /// container gets, or it is not created.
    pub runtime: Option<String>,
    /// Absolute path in the cell.
    pub working_dir: String,
    /// PID 1 and its arguments; replaces the image's entry point.
    pub argv: Vec<String>,
    /// Environment, over the image's own.
    pub env: Vec<(String, String)>,
}

// Values of the environment may be tokens: only names are shown.
impl fmt::Debug for CellSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.env.iter().map(|(name, _)| name.as_str()).collect();
        f.debug_struct("CellSpec")
            .field("instance", &self.instance)
            .field("cell", &self.cell)
            .field("image_id", &self.image_id)
            .field("user", &self.user)
            .field("groups", &self.groups)
            .field("limits", &self.limits)
            .field("mounts", &self.mounts)
            .field("runtime", &self.runtime)
            .field("working_dir", &self.working_dir)
            .field("argv", &self.argv)
            .field("env_names", &names)
            .finish()
    }
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Exit code of PID 1; 137 is any SIGKILL.
    pub code: i64,
    /// The engine's own flag, which misses some kills: prefer the cell's counters.
    pub oom_killed: bool,
    /// What the engine, or a runtime that could not execute PID 1, said.
    pub error: Option<String>,
    /// The end of what PID 1 wrote to its standard error, at most `tail::BYTES_MAX` bytes. Not to be
    /// trusted, and empty when another daemon process had started the container.
    pub stderr_tail: String,
}

/// A container of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its id.
    pub container: ContainerId,
    /// Its cell; `None` for a helper.
    pub cell: Option<CellId>,
    /// The job whose build it belongs to, where it is no cell.
    pub build: Option<JobId>,
    /// PID 1 is alive (paused counts).
    pub running: bool,
    /// The engine's word: `created`, `running`, `exited`, `dead`, …
    pub state: String,
}

/// Why the engine did not do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// Nothing answers.
    #[error(
        "no container engine answers at {address} ({detail}); run `make engine`, or name one with --engine"
    )]
    Unavailable {
        /// Where it was looked for.
        address: String,
        /// What went wrong there.
        detail: String,
    },
    /// Only unix sockets are spoken to: a cell's mounts are paths of the engine's own machine.
    #[error("engine address {address:?} is not unix:///path; name a socket on this machine with --engine")]
    UnsupportedAddress {
        /// As given.
        address: String,
    },
    /// The container, or the image named in `what`, is not there.
    #[error("{what} is not there: {message}")]
    NotFound {
        /// The call.
        what: &'static str,
        /// The engine's words.
        message: String,
    },
    /// The engine does not have the image.
    #[error("the engine has no image {image}; run `hotcell image build`, or pull it")]
    ImageMissing {
        /// As asked for.
        image: String,
    },
    /// The name is taken by something that is not the same, or the image is in use.
    #[error("{what} conflicts with what is there: {message}")]
    Conflict {
        /// The call.
        what: &'static str,
        /// The engine's words.
        message: String,
    },
    /// The engine said no.
    #[error("the engine refused to {what} (status {status}): {message}")]
    Refused {
        /// The call.
        what: &'static str,
        /// HTTP status.
        status: u16,
        /// The engine's words.
        message: String,
    },
    /// The engine took an option and then dropped it; the container was removed again.
    #[error(
        "the engine does not apply {option} (asked {asked}, has {got}); cells are not run without it: use another engine or host"
    )]
    OptionIgnored {
        /// The option by its API name.
        option: &'static str,
        /// JSON of what was asked.
        asked: String,
        /// JSON of what the engine says it has.
        got: String,
    },
    /// A specification that no cell may have.
    #[error("cell specification refused: {reason}")]
    BadSpec {
        /// Which rule it breaks.
        reason: String,
    },
    /// The call took too long. What it was to do may still happen.
    #[error("the engine did not {what} within {after_ms} ms; see its log, then retry")]
    Timeout {
        /// The call.
        what: &'static str,
        /// The limit, in milliseconds.
        after_ms: u64,
    },
    /// The container was created but its PID 1 does not run.
    #[error("the container did not start: {message}")]
    StartFailed {
        /// The engine's or the runtime's words.
        message: String,
    },
    /// A removal that does not come to an end.
    #[error("container {container} is still there after {after_ms} ms: {message}")]
    StillThere {
        /// Which.
        container: String,
        /// How long it was tried, in milliseconds.
        after_ms: u64,
        /// The engine's last words.
        message: String,
    },
    /// A pull, build or import failed on the engine's side.
    #[error("could not {what}: {message}")]
    ImageFailed {
        /// `pull`, `build` or `import`, and the image.
        what: String,
        /// The engine's words.
        message: String,
    },
    /// A file of ours could not be read.
    #[error("cannot read {path}: {detail}", path = path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        detail: String,
    },
    /// An answer that is not what the API promises.
    #[error("the engine's answer to {what} makes no sense: {detail}")]
    Protocol {
        /// The call.
        what: &'static str,
        /// What was wrong with it.
        detail: String,
    },
}

/// Our word for a processor architecture: `x64`, `arm64`, or what was given.
pub fn normalise_arch(engine_word: &str) -> String {
    match engine_word {
        "x86_64" | "amd64" => "x64".to_owned(),
        "aarch64" | "arm64" => "arm64".to_owned(),
        other => other.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_specification_shows_no_value_of_its_environment() {
        let spec = config::tests::spec();
        let shown = format!("{spec:?}");
        assert!(shown.contains("ANTHROPIC_API_KEY"));
        assert!(!shown.contains("token-of-this-job"));
    }

    #[test]
    fn architectures_have_one_name_each() {
        assert_eq!(normalise_arch("x86_64"), normalise_arch("amd64"));
        assert_eq!(normalise_arch("aarch64"), "arm64");
        assert_eq!(normalise_arch("riscv64"), "riscv64");
    }

    #[test]
    fn the_trait_is_object_safe() {
        fn takes(_: Option<&dyn Engine>) {}
        takes(None);
    }
}
