//! A repository's own Dockerfile or devcontainer: what building it would run, found and told before anything of it
//! happens, and the context that the engine gets.
//!
//! Reads with the rights of the submitter and runs nothing. What is built is the text that was read and listed, written
//! anew line by line: the engine never sees the repository's own file. It must never let a build fetch something by
//! itself (`ADD` of an address, an image that is not there), nor take a build for one that it is not: what the engine's
//! plain builder has no word for is refused by name.

mod devcontainer;
mod expand;
mod find;
mod generate;
mod ignored;
mod pack;
mod parse;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use find::{CANDIDATES, FILE_BYTES_MAX, find_in};
pub use generate::{Authorities, OWN_DIR, generate};
pub use pack::{Context, PackError, PackLimits, Packed, pack};
pub use parse::{Base, Dockerfile, Instruction, Line, Stage};

use crate::job::spec::StepCommand;

/// What is built, and what becomes of a devcontainer's other words. Stored with the job: what was listed is what is built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The file that says so, below the workspace.
    pub source: String,
    /// The Dockerfile, below the workspace; none where a devcontainer names an image.
    pub dockerfile: Option<String>,
    /// Its text.
    pub text: String,
    /// The directory of the context, below the workspace; empty: the workspace.
    pub context: String,
    /// The stage that is built; the last one where absent.
    pub target: Option<String>,
    /// Build arguments.
    pub args: BTreeMap<String, String>,
    /// Variables that the image gets besides.
    pub env: BTreeMap<String, String>,
    /// Commands that become the first of the job's setup.
    pub setup: Vec<StepCommand>,
    /// What else is to be told, one line each.
    pub told: Vec<String>,
}

/// Why nothing is built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DockerfileError {
    /// There is none.
    #[error("there is nothing to build: none of {CANDIDATES_WORDS} is at the top of the workspace")]
    None,
    /// A file that another one names cannot be read as text.
    #[error("{file} is named by {by} and is no text file of the workspace of at most {max} bytes that you may read", max = FILE_BYTES_MAX)]
    Unreadable {
        /// Which.
        file: String,
        /// Where it is named.
        by: String,
    },
    /// A path that leads out of the workspace.
    #[error("{file}: {key}: {path:?} leads out of the workspace")]
    Outside {
        /// The file.
        file: String,
        /// The key in it.
        key: &'static str,
        /// As it stands there.
        path: String,
    },
    /// A devcontainer that cannot be read or followed.
    #[error("{file}: {problem}")]
    Devcontainer {
        /// The file.
        file: String,
        /// What is wrong, or what has no counterpart here.
        problem: String,
    },
    /// A line of a Dockerfile.
    #[error("{file}:{line}: {problem}")]
    Line {
        /// The file.
        file: String,
        /// Counted from 1.
        line: usize,
        /// What is wrong, or what has no counterpart here.
        problem: String,
    },
}

/// The candidates in words.
const CANDIDATES_WORDS: &str =
    ".devcontainer/devcontainer.json, .devcontainer.json, Dockerfile and Containerfile";

impl Recipe {
    /// Its Dockerfile, taken apart.
    ///
    /// # Errors
    /// [`DockerfileError::Line`] for the first line that is not built here.
    pub fn parsed(&self) -> Result<Dockerfile, DockerfileError> {
        let name = self.dockerfile.as_deref().unwrap_or(&self.source);
        Dockerfile::parse(name, &self.text, &self.args, self.target.as_deref())
    }

    /// SHA-256 of the Dockerfile's text, in hexadecimal.
    pub fn text_hash(&self) -> String {
        use sha2::Digest;
        sha2::Sha256::digest(&self.text).iter().map(|b| format!("{b:02x}")).collect()
    }
}

/// Most lines of a list, and most characters of one.
const LIST_LINES_MAX: usize = 200;
const LIST_CHARS_MAX: usize = 300;

/// What building it would do, for people, one thing a line: told before any of it happens.
pub fn list(recipe: &Recipe, parsed: &Dockerfile) -> Vec<String> {
    let name = recipe.dockerfile.as_deref().unwrap_or(&recipe.source);
    let context = if recipe.context.is_empty() { "the workspace" } else { recipe.context.as_str() };
    let hash: String = recipe.text_hash().chars().take(16).collect();
    let mut lines = vec![match &recipe.dockerfile {
        Some(file) if *file != recipe.source => {
            format!(
                "image = \"build\": {} names {file} (sha256 {hash}); its context is {context}",
                recipe.source
            )
        }
        Some(file) => {
            format!("image = \"build\": {file} (sha256 {hash}) is built; its context is {context}")
        }
        None => format!("image = \"build\": {} names an image", recipe.source),
    }];
    for (base, line) in parsed.bases() {
        lines.push(format!("{name}:{line}: FROM {base}"));
    }
    for run in parsed.runs() {
        lines.push(format!("{name}:{}: the engine will run as root: {}", run.number, run.rest));
    }
    if !recipe.env.is_empty() {
        let names = recipe.env.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        lines.push(format!("{}: variables of the image: {names}", recipe.source));
    }
    for command in &recipe.setup {
        lines.push(format!("{}: becomes a setup command in the cell: {}", recipe.source, command.words()));
    }
    lines.extend(recipe.told.iter().cloned());
    let more = lines.len().saturating_sub(LIST_LINES_MAX);
    lines.truncate(LIST_LINES_MAX);
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    lines.iter_mut().for_each(|line| {
        if line.chars().count() > LIST_CHARS_MAX {
            *line = line.chars().take(LIST_CHARS_MAX).chain(['…']).collect();
        }
    });
    lines
}

#[cfg(test)]
mod tests;
