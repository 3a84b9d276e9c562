//! What a person asks of a change set and decides about it, as it goes over the socket. Pure types.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::TreePath;

/// Whether somebody has decided about a change set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// Nobody has.
    #[default]
    Open,
    /// It was applied, or a part of it, or made into a branch.
    Applied,
    /// It is not wanted.
    Discarded,
}

/// How a change set is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// A patch that `git apply` takes.
    Patch,
    /// Files and how much of them changed.
    Stat,
    /// Paths.
    NameOnly,
}

impl Form {
    /// Its name in a query.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Patch => "patch",
            Self::Stat => "stat",
            Self::NameOnly => "name-only",
        }
    }
}

/// What a change set is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ExportFormat {
    /// What `git apply` takes.
    Patch,
    /// The files as they are now, and the names of those that are gone.
    Tar,
    /// A commit on the job's base, for `git fetch`.
    Bundle,
}

impl ExportFormat {
    /// Its name in a query.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Patch => "patch",
            Self::Tar => "tar",
            Self::Bundle => "bundle",
        }
    }
}

/// How a change set is to be applied.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ApplyRequest {
    /// Another directory than the job's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<PathBuf>,
    /// Only paths that match one of these patterns.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub only: Vec<String>,
    /// What needs a person's word, too.
    pub include_flagged: bool,
    /// Merge with what was changed meanwhile.
    pub three_way: bool,
    /// Only say whether it can be applied.
    pub check: bool,
    /// Make a branch of this name in the repository, and leave the files as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
}

/// Where the workspace is to be written as the job left it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckoutRequest {
    /// A directory that is not there yet, or is empty; absolute, without symbolic links.
    pub dir: PathBuf,
}

/// An entry that was not applied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LeftOut {
    /// Which.
    pub path: TreePath,
    /// Why.
    pub why: String,
}

/// A branch that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BranchMade {
    /// Its name.
    pub name: String,
    /// The commit it is at.
    pub commit: String,
    /// What is not in it, in sentences.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// What was applied.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ApplyAnswer {
    /// Nothing was written: it was only asked whether it can be.
    pub checked: bool,
    /// What was written.
    pub applied: Vec<TreePath>,
    /// What was there already.
    pub already: Vec<TreePath>,
    /// Those of `applied` where the changes of both sides came together.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub merged: Vec<TreePath>,
    /// What was not.
    pub left_out: Vec<LeftOut>,
    /// Directories that stay because something is in them that the job never saw.
    pub kept_dirs: Vec<TreePath>,
    /// A directory that could not be removed; nothing of it is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_behind: Option<PathBuf>,
    /// The branch, where one was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<BranchMade>,
    /// What else a person should know, in sentences.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// What was written by a checkout.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CheckoutAnswer {
    /// Paths that were copied from the original.
    pub copied: u64,
    /// Paths that the job changed.
    pub changed: u64,
    /// What is not as the job left it.
    pub left_out: Vec<LeftOut>,
}
