//! A change set: what a job changed in its workspace, entry by entry, each with what it was, what it is now, what
//! kind of change it is, and whether it is applied without a further word. Pure types; the contents lie beside it,
//! named by their hash ([`BlobId`]). It must never name a path that leads out of the workspace.
//!
//! A path or a link's target that is no UTF-8 stands in JSON as `{"hex": "…"}`, any other as a string.

pub mod classify;
pub mod decision;
pub mod hide;
mod path;

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use hide::{HideError, HideRules};
pub use path::{PathError, Raw, TreePath};

/// Version of the JSON form.
pub const VERSION: u32 = 1;

/// The name of a content: its SHA-256, in lower-case hex.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct BlobId(String);

/// Text that is no name of a content.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a SHA-256 in lower-case hex")]
pub struct NoBlobId(String);

impl BlobId {
    /// The name of a content with this digest.
    pub fn of_digest(digest: [u8; 32]) -> Self {
        Self(digest.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// 64 characters.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for BlobId {
    type Error = NoBlobId;
    fn try_from(text: String) -> Result<Self, NoBlobId> {
        let hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if text.len() == 64 && text.bytes().all(hex) { Ok(Self(text)) } else { Err(NoBlobId(text)) }
    }
}

impl From<BlobId> for String {
    fn from(id: BlobId) -> Self {
        id.0
    }
}

impl fmt::Display for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is at a path. Modes are the twelve permission bits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Node {
    /// A regular file.
    File {
        /// Permission bits.
        mode: u32,
        /// Length in bytes.
        bytes: u64,
        /// Its content; none where it was not kept (an ignored file, a hidden one, or the original changed meanwhile).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        blob: Option<BlobId>,
    },
    /// A symbolic link.
    Symlink {
        /// Where it points, as it stands in it.
        target: Raw,
    },
    /// A directory.
    Dir {
        /// Permission bits.
        mode: u32,
    },
    /// A device, FIFO or socket: named, never applied.
    Special {
        /// What it is.
        what: Special,
    },
}

impl Node {
    /// A file whose content was not kept.
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::File { blob: None, .. })
    }
}

/// What is neither file nor directory nor link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Special {
    /// A character or block device.
    Device,
    /// A named pipe.
    Fifo,
    /// A unix socket.
    Socket,
}

/// A kind of change that a policy has a word about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Flag {
    /// A file became executable, or a new one is.
    Executable,
    /// A new or changed symbolic link whose target lies in the workspace.
    SymlinkInside,
    /// A new or changed symbolic link whose target is absolute or leads out of the workspace.
    SymlinkOutside,
    /// A submodule, or what tells git where contents come from and what filters them: a nested repository's
    /// directory, `.gitmodules`, `.gitattributes`, `.lfsconfig`.
    Submodule,
    /// Definitions of continuous integration.
    Ci,
    /// Hooks, configuration or attributes inside a `.git` directory, a `.git` that was not there or became another
    /// kind, names that other systems take for `.git`, and what makes any other directory a repository that git finds
    /// from inside of it (`HEAD` beside `objects` and `refs`). Never applied, whatever a policy says.
    Git,
    /// What coding agents obey: `.claude/`, `.mcp.json`, CLAUDE.md and their like.
    AgentSettings,
    /// What editors run: tasks, launch files, workspace settings.
    Editor,
    /// What shells run: direnv, profiles, mise and their like.
    Shell,
    /// Package scripts, build files and lock files.
    Package,
    /// A setuid, setgid or sticky file, a device, a FIFO, a socket. Never applied, whatever a policy says.
    Special,
    /// It looks as if a secret stands in it.
    Secret,
    /// A large file that is no text.
    LargeBinary,
    /// A name that the policy hides from the cell.
    Hidden,
    /// The same path but for the case of its letters exists already.
    CaseClash,
}

impl Flag {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::Executable,
        Self::SymlinkInside,
        Self::SymlinkOutside,
        Self::Submodule,
        Self::Ci,
        Self::Git,
        Self::AgentSettings,
        Self::Editor,
        Self::Shell,
        Self::Package,
        Self::Special,
        Self::Secret,
        Self::LargeBinary,
        Self::Hidden,
        Self::CaseClash,
    ];

    /// Its name in policies and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Executable => "executable",
            Self::SymlinkInside => "symlink-inside",
            Self::SymlinkOutside => "symlink-outside",
            Self::Submodule => "submodule",
            Self::Ci => "ci",
            Self::Git => "git",
            Self::AgentSettings => "agent-settings",
            Self::Editor => "editor",
            Self::Shell => "shell",
            Self::Package => "package",
            Self::Special => "special",
            Self::Secret => "secret",
            Self::LargeBinary => "large-binary",
            Self::Hidden => "hidden",
            Self::CaseClash => "case-clash",
        }
    }
}

/// Whether an entry is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Yes.
    Plain,
    /// Only when somebody says so (`--include-flagged`).
    Flagged,
    /// Never.
    Refused,
}

/// One path that changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Entry {
    /// Where, below the workspace.
    pub path: TreePath,
    /// What was there when the job began; none: nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Node>,
    /// What is there now; none: nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Node>,
    /// The original was changed by somebody else while the job ran: a file's content in `before` is known only where
    /// git's objects still have it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub base_changed: bool,
    /// What there is to say about it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flags: Vec<Flag>,
    /// Whether it is applied.
    pub verdict: Verdict,
}

/// What the workspace was when the job began.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Base {
    /// SHA-256 over the listing of the whole tree (paths, kinds, modes, sizes, times), in hex.
    pub snapshot: String,
    /// Entries in that listing.
    pub entries: u64,
    /// The commit that was checked out, where it is a git repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// The branch that was checked out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
}

/// What git is told to ignore: listed; kept only where the job asked for it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Ignored {
    /// How many paths changed that are ignored, directories with all below them counted by their files.
    pub count: u64,
    /// Bytes in those that are there.
    pub bytes: u64,
    /// Their topmost paths, as many as are listed.
    pub paths: Vec<TreePath>,
    /// Whether their contents were kept: then they are entries too.
    pub kept: bool,
}

/// What a job changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ChangeSet {
    /// Form of this document: [`VERSION`].
    pub version: u32,
    /// What it is against.
    pub base: Base,
    /// Changes in the work tree, by path (bytes).
    pub entries: Vec<Entry>,
    /// Changes inside `.git` directories, by path: carried to a job that goes on, never applied.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub git_state: Vec<Entry>,
    /// What git ignores.
    #[serde(default)]
    pub ignored: Ignored,
    /// The agent's commits, where it made some: what `refs/heads/…` of the bundle beside it names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commits: Option<Commits>,
    /// What a person should know, in sentences.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// Commits that the agent made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Commits {
    /// The newest one.
    pub tip: String,
    /// How many there are beyond the base.
    pub count: u64,
    /// The bundle that holds them.
    pub bundle: BlobId,
}

/// A path that an agent made in a directory of a person's own, and that git or coding agents would obey there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Quarantined {
    /// Where it appeared.
    pub path: TreePath,
    /// What it is called now; none: it could not be set aside, and is still there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moved_to: Option<TreePath>,
    /// Why it could not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// The figures of a change set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Summary {
    /// Entries in all.
    pub entries: u64,
    /// Paths that are new.
    pub added: u64,
    /// Paths that have other contents, modes or kinds.
    pub modified: u64,
    /// Paths that are gone.
    pub deleted: u64,
    /// Entries that are applied only when somebody says so.
    pub flagged: u64,
    /// Entries that are never applied.
    pub refused: u64,
    /// Changes to what git ignores.
    pub ignored: u64,
    /// Commits of the agent's.
    pub commits: u64,
    /// SHA-256 of the change set's JSON, in hex.
    pub hash: String,
    /// SHA-256 over the listing of the workspace as it was when the job began, in hex.
    #[serde(default)]
    pub base: String,
    /// The commit that was checked out then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_commit: Option<String>,
}

impl ChangeSet {
    /// Its figures; `hash` is that of its stored form.
    pub fn summary(&self, hash: String) -> Summary {
        let count = |wanted: fn(&Entry) -> bool| self.entries.iter().filter(|e| wanted(e)).count() as u64;
        Summary {
            entries: self.entries.len() as u64,
            added: count(|e| e.before.is_none()),
            modified: count(|e| e.before.is_some() && e.after.is_some()),
            deleted: count(|e| e.after.is_none()),
            flagged: count(|e| e.verdict == Verdict::Flagged),
            refused: count(|e| e.verdict == Verdict::Refused),
            ignored: self.ignored.count,
            commits: self.commits.as_ref().map_or(0, |commits| commits.count),
            hash,
            base: self.base.snapshot.clone(),
            base_commit: self.base.commit.clone(),
        }
    }

    /// Nothing to apply, to flag or to fetch.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.commits.is_none()
    }
}
