//! What a person decided about a change set: `applied.json` (each time it was applied, whereto and what of it) and
//! `discarded.json`. Must be on the disk before anybody is told.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Applied;
use crate::changes::{JobShelf, ShelfError};
use crate::clock;

const APPLIED: &str = "applied.json";
const DISCARDED: &str = "discarded.json";
/// Most acceptances that are remembered; the oldest goes.
const ACCEPTED_MAX: usize = 64;

/// One time that a change set was applied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Accepted {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// Who did it.
    pub uid: u32,
    /// Into which directory.
    pub path: PathBuf,
    /// The branch that was made of it there; none: it was applied to the files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// What was done to the files.
    pub result: Applied,
}

/// That somebody does not want a change set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Discarded {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// Who said so.
    pub uid: u32,
}

/// What was decided about a change set so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Decision {
    /// Each time it was applied, the oldest first.
    pub applied: Vec<Accepted>,
    /// It is not wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discarded: Option<Discarded>,
}

impl Decision {
    /// The branches that were made of it, the oldest first.
    pub fn branches(&self) -> Vec<String> {
        self.applied.iter().filter_map(|accepted| accepted.branch.clone()).collect()
    }
}

/// What was decided about the change set of `shelf`.
///
/// # Errors
/// [`ShelfError`].
pub fn decision(shelf: &JobShelf) -> Result<Decision, ShelfError> {
    Ok(Decision { applied: read(shelf, APPLIED)?.unwrap_or_default(), discarded: read(shelf, DISCARDED)? })
}

/// Keeps that the user `uid` does not want it. Its contents stay until the job is removed.
///
/// # Errors
/// [`ShelfError`].
pub fn discard(shelf: &JobShelf, uid: u32) -> Result<(), ShelfError> {
    write(shelf, DISCARDED, &Discarded { at_ms: clock::wall_ms(), uid })
}

/// Keeps that the user `uid` made a branch of it, in the repository of `path`.
///
/// # Errors
/// [`ShelfError`].
pub fn branched(shelf: &JobShelf, uid: u32, path: PathBuf, branch: String) -> Result<(), ShelfError> {
    let (at_ms, result) = (clock::wall_ms(), Applied::default());
    accept(shelf, &Accepted { at_ms, uid, path, branch: Some(branch), result })
}

/// Keeps that it was applied; saying the same twice is once.
pub(super) fn accept(shelf: &JobShelf, accepted: &Accepted) -> Result<(), ShelfError> {
    let mut all: Vec<Accepted> = read(shelf, APPLIED)?.unwrap_or_default();
    if all.contains(accepted) {
        return Ok(());
    }
    all.push(accepted.clone());
    let from = all.len().saturating_sub(ACCEPTED_MAX);
    write(shelf, APPLIED, &all[from..])
}

fn read<T: serde::de::DeserializeOwned>(shelf: &JobShelf, name: &str) -> Result<Option<T>, ShelfError> {
    let Some(json) = shelf.get(name)? else { return Ok(None) };
    let corrupt = |error: serde_json::Error| ShelfError::Corrupt {
        path: shelf.dir().join(name),
        detail: error.to_string(),
    };
    serde_json::from_slice(&json).map(Some).map_err(corrupt)
}

fn write<T: Serialize + ?Sized>(shelf: &JobShelf, name: &str, value: &T) -> Result<(), ShelfError> {
    let failed = |error| ShelfError::Io {
        doing: "write",
        path: shelf.dir().join(name),
        source: std::io::Error::other(error),
    };
    shelf.put(name, &serde_json::to_vec(value).map_err(failed)?)
}
