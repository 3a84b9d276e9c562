//! Hand on the file system: opens a workspace as the person who submitted the job, stages it for one
//! cell, gives the cell a size-limited scratch file system, and removes what is left of dead cells.
//!
//! It must never: change the credentials of any thread but its own helper threads; mount by path what
//! was checked by descriptor; follow a symlink or cross a mount while removing; remove anything below
//! a directory where something is still mounted (that something may be the user's own work).
//!
//! **Every function here blocks** (system calls, at most seconds): call it inside `spawn_blocking`.

mod copy;
mod follow;
mod idmap;
mod image;
mod look;
mod loopdev;
mod mask;
mod mounts;
mod overlay;
mod peer;
mod protect;
mod remove;
mod rules;
mod scratch;
mod secrets;
mod stage;
mod sweep;
mod take;
mod whole;
mod worktree;
mod writable;

use std::io;
use std::path::{Path, PathBuf};

pub use copy::{
    Copied, CopyParts, Form, copy, copy_filled, form_here, lower_of, masked, parts_of, unmount_views, view_of,
};
pub use follow::View;
pub use idmap::{CELL_IDS, MapError};
pub use look::{Found, Kind, LookLimits, Looked, look};
pub use mask::{Covers, HIDDEN_MAX, Hidden, Mask, Replaced};
pub use peer::{
    WorkspaceRecord, as_submitter, may_write, open_as, open_repository_as, read_text, read_texts, reopen_as,
    reopen_repository_as,
};
pub use protect::{GUARDS_MAX, Guarded, Protection, guard_of, set_aside};
pub use rules::Guard;
pub use scratch::{Scratch, ScratchError, ScratchPlan, Usage, host_free_bytes, remove_kept};
pub use secrets::warnings as secret_warnings;
pub use stage::{CellIds, Mode, Staged, StagedIds, stage, stage_guarded, stage_program, unstage};
pub use sweep::{Left, SweepReport, sweep};
pub use take::{TakeError, Taken, open_file, take_file};
pub use whole::CopyLimits;
pub use worktree::{Worktree, worktree};
pub use writable::{PARTS_MAX, StagedPart, parts_of_copy};

/// What the job will do with the workspace, so what the submitter must be allowed to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// List and read.
    Read,
    /// List, read and create.
    Write,
}

impl Access {
    fn verb(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// Why a workspace was not opened or not staged. Each message says what to do next.
#[derive(Debug, thiserror::Error)]
pub enum WorkspaceError {
    /// A relative path, or one that is not UTF-8 or too long.
    #[error("workspace {path:?} is not an absolute UTF-8 path of at most 4095 bytes: pass the full path")]
    NotAbsolute {
        /// As given.
        path: PathBuf,
    },
    /// The path has a `..` in it.
    #[error("workspace {path:?} contains `..`: pass the path that `realpath` prints")]
    NotCanonical {
        /// As given.
        path: PathBuf,
    },
    /// Nothing there.
    #[error("workspace {path:?} does not exist (as far as uid {uid} can see): create it or check the path")]
    Missing {
        /// As given.
        path: PathBuf,
        /// Who asked.
        uid: u32,
    },
    /// Something other than a directory is there.
    #[error("workspace {path:?} is a {kind}, not a directory: pass the directory that holds the work")]
    NotADirectory {
        /// The component that is not a directory.
        path: PathBuf,
        /// What it is, e.g. `socket`.
        kind: &'static str,
    },
    /// A component is a symlink.
    #[error("workspace {path:?} goes through the symlink {component:?}: pass {} instead", shown(canonical))]
    Symlink {
        /// As given.
        path: PathBuf,
        /// The first component that is a symlink.
        component: PathBuf,
        /// Where the path leads now, if the submitter can tell.
        canonical: Option<PathBuf>,
    },
    /// `/`, a system tree, or a directory that holds other people's things.
    #[error(
        "workspace {path:?} is (in) the system directory {tree}: copy the work to a directory of its own"
    )]
    System {
        /// As given.
        path: PathBuf,
        /// The rule it met.
        tree: &'static str,
    },
    /// The inside of a repository: what git itself reads and runs, not the files that it keeps.
    #[error(
        "workspace {path:?} is (in) a git directory, which holds what git runs: pass the work tree, or this \
         repository with a ref (--ref) to work on a checkout of it"
    )]
    GitDir {
        /// As given.
        path: PathBuf,
    },
    /// A file system made by the kernel.
    #[error("workspace {path:?} is on the kernel's {fs} file system: use a directory on a disk")]
    PseudoFs {
        /// As given.
        path: PathBuf,
        /// Its name.
        fs: &'static str,
    },
    /// The submitter's home, or a parent of it.
    #[error(
        "workspace {path:?} holds the home directory {home:?}, with keys and settings in it: use a directory below"
    )]
    Home {
        /// As given.
        path: PathBuf,
        /// The submitter's home.
        home: PathBuf,
    },
    /// The daemon's own files.
    #[error("workspace {path:?} holds, or lies in, hotcell's own state {state_dir:?}: use another directory")]
    StateDir {
        /// As given.
        path: PathBuf,
        /// The daemon's state directory.
        state_dir: PathBuf,
    },
    /// The submitter may not do what the job needs.
    #[error("uid {uid} may not {need} {path:?}: change its permissions, or ask for {other}")]
    Denied {
        /// As given.
        path: PathBuf,
        /// Who asked.
        uid: u32,
        /// What was needed.
        need: &'static str,
        /// What may help.
        other: &'static str,
    },
    /// Write wanted on a read-only file system.
    #[error("workspace {path:?} is on a read-only file system: use the read-only mode or another directory")]
    ReadOnlyFs {
        /// As given.
        path: PathBuf,
    },
    /// The daemon is not root and the submitter is somebody else.
    #[error(
        "this daemon runs as uid {own_uid} and cannot act as uid {uid}: run the daemon as root, or your own"
    )]
    CannotSwitch {
        /// Who asked.
        uid: u32,
        /// Whom the daemon runs as.
        own_uid: u32,
    },
    /// A socket in the top two levels: a way out of the cell.
    #[error(
        "workspace holds the socket {socket:?}, a way out of the cell: remove it or use another directory"
    )]
    SocketInside {
        /// The first one found.
        socket: PathBuf,
    },
    /// The directory is not the one that was recorded at submit.
    #[error(
        "workspace {path:?} is not the directory that was submitted ({what} differs): submit the job again"
    )]
    Moved {
        /// As recorded.
        path: PathBuf,
        /// What differs, e.g. `inode`.
        what: &'static str,
    },
    /// A path that the policy lists as writable cannot be made so.
    #[error("{path:?}, which the policy makes writable in the workspace {workspace:?}, {why}")]
    Writable {
        /// The workspace.
        workspace: PathBuf,
        /// As the policy names it, below the workspace.
        path: PathBuf,
        /// What is wrong with it, and what helps.
        why: &'static str,
    },
    /// Too much of it is hidden or protected path by path.
    #[error(
        "{count} paths of the workspace {path:?} would have to be {what} one by one, at most {max} can be: {hint}"
    )]
    TooMany {
        /// The workspace.
        path: PathBuf,
        /// How many.
        count: usize,
        /// `hidden` or `protected`.
        what: &'static str,
        /// How many there may be.
        max: usize,
        /// What may help.
        hint: &'static str,
    },
    /// It is too large to be looked through.
    #[error(
        "the workspace {path:?} cannot be looked through for what is to be hidden ({limit}): use a directory below"
    )]
    TooLarge {
        /// The workspace.
        path: PathBuf,
        /// The limit that was met.
        limit: String,
    },
    /// One of several workspaces of a cell has other ids than the first one.
    #[error("the workspace {path:?} cannot be shown beside the first one: {why}")]
    Beside {
        /// The workspace.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// A copy that does not fit, or takes too long.
    #[error("the workspace {path:?} {why}: exclude what is large, or use another mode")]
    Copy {
        /// What was to be copied.
        path: PathBuf,
        /// Which limit it met.
        why: String,
    },
    /// What an earlier job changed cannot be put into the copy.
    #[error("what {job} changed cannot be put into the copy: {why}")]
    CarryOver {
        /// The earlier job.
        job: String,
        /// Why not.
        why: String,
    },
    /// The host makes no overlay.
    #[error("parts of the workspace cannot be hidden in this mode here ({0}): use the copy mode")]
    Overlay(String),
    /// Too many openings hang at the same time.
    #[error("{limit} workspaces are being opened already and do not answer: try again later")]
    TooManyOpening {
        /// The limit.
        limit: usize,
    },
    /// The file system below the path does not answer.
    #[error("the file system of {path:?} did not answer within {waited_ms} ms: check its server")]
    Unresponsive {
        /// As given.
        path: PathBuf,
        /// Time waited, milliseconds.
        waited_ms: u64,
    },
    /// Submitter root on a file system where ids cannot be mapped.
    #[error(
        "{path:?} cannot be mapped to a private user id ({why}) and belongs to root: submit as another user"
    )]
    RootUnmapped {
        /// As recorded.
        path: PathBuf,
        /// Why there is no id map.
        why: String,
    },
    /// The cell's ids are unusable.
    #[error("cannot map ids: {0}")]
    Ids(#[from] MapError),
    /// Something is mounted on the target already.
    #[error("{target:?} is a mount point already: sweep the cell first")]
    TargetBusy {
        /// The directory the caller named.
        target: PathBuf,
    },
    /// An unmount that cannot be proven.
    #[error("{path:?} is still mounted: see /proc/self/mountinfo, and unmount it by hand")]
    StillMounted {
        /// The mount point.
        path: PathBuf,
    },
    /// The kernel said no to something that normally works.
    #[error("cannot {doing} {path:?}: {source}")]
    Io {
        /// The step.
        doing: &'static str,
        /// What on.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
}

fn shown(path: &Option<PathBuf>) -> String {
    path.as_ref().map_or_else(|| "the path it leads to".to_owned(), |p| format!("{p:?}"))
}

/// Shorthand for `WorkspaceError::Io` in `map_err`.
fn io_at<E: Into<io::Error>>(doing: &'static str, path: &Path) -> impl FnOnce(E) -> WorkspaceError {
    let path = path.to_owned();
    move |source| WorkspaceError::Io { doing, path, source: source.into() }
}
