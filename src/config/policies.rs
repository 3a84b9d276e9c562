//! Which policies there are: the built-in ones and the files in `policy_dirs`. Finds and reads them; what
//! they mean is `crate::policy`'s.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::policy::{Policy, PolicyError};

/// Most policies of one daemon.
const POLICIES_MAX: usize = 1000;

/// Where a policy comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyOrigin {
    /// It is part of this program.
    BuiltIn,
    /// A file in one of `policy_dirs`.
    File(PathBuf),
}

/// A policy by name, parsed.
#[derive(Debug, Clone)]
pub struct PolicySource {
    /// The policy.
    pub policy: Policy,
    /// Its TOML.
    pub text: String,
    /// Where it comes from.
    pub origin: PolicyOrigin,
}

/// A policy that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyFileError {
    /// The file or its directory cannot be read.
    #[error("cannot read the policy {}: {source}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// The text is no policy.
    #[error("{0}")]
    Parse(PolicyError),
    /// There are more than any daemon needs.
    #[error("{}: more than {POLICIES_MAX} policy files; remove some", path.display())]
    TooMany {
        /// The directory.
        path: PathBuf,
    },
}

const BUILT_IN: [(&str, &str); 5] = [
    ("default", include_str!("../../policies/default.toml")),
    ("refactor", include_str!("../../policies/refactor.toml")),
    ("review", include_str!("../../policies/review.toml")),
    ("trusted", include_str!("../../policies/trusted.toml")),
    ("untrusted", include_str!("../../policies/untrusted.toml")),
];

/// All policies by name. A file wins over a built-in one of its name, and a later directory over an earlier
/// one; a directory that does not exist holds none.
///
/// # Errors
/// [`PolicyFileError`] for the first file that cannot be read or parsed: a daemon must not start with half
/// of its policies.
pub fn policy_sources(dirs: &[PathBuf]) -> Result<BTreeMap<String, PolicySource>, PolicyFileError> {
    let mut all = BTreeMap::new();
    for (name, text) in BUILT_IN {
        let policy = Policy::parse(name, text).map_err(PolicyFileError::Parse)?;
        let source = PolicySource { policy, text: text.to_owned(), origin: PolicyOrigin::BuiltIn };
        all.insert(name.to_owned(), source);
    }
    for dir in dirs {
        for path in toml_files(dir)? {
            let Some(name) = path.file_stem().and_then(|s| s.to_str()).map(str::to_owned) else { continue };
            let text = super::raw::read_bounded(&path).map_err(|e| read_error(&path, e))?;
            let policy = Policy::parse(&name, &text)
                .map_err(|error| PolicyFileError::Parse(error.in_file(path.display())))?;
            all.insert(name, PolicySource { policy, text, origin: PolicyOrigin::File(path) });
        }
        if all.len() > POLICIES_MAX {
            return Err(PolicyFileError::TooMany { path: dir.clone() });
        }
    }
    Ok(all)
}

/// The text of one policy file.
///
/// # Errors
/// [`PolicyFileError::Read`].
pub fn read_policy_text(path: &Path) -> Result<String, PolicyFileError> {
    super::raw::read_bounded(path).map_err(|e| read_error(path, e))
}

fn toml_files(dir: &Path) -> Result<Vec<PathBuf>, PolicyFileError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(read_error(dir, e)),
    };
    let mut files = Vec::new();
    for entry in entries.take(POLICIES_MAX * 10) {
        let path = entry.map_err(|e| read_error(dir, e))?.path();
        // A price list may lie beside the policies, as in the source tree.
        let prices = path.file_name().is_some_and(|name| name == "prices.toml");
        if path.extension().is_some_and(|ext| ext == "toml") && !prices {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn read_error(path: &Path, source: std::io::Error) -> PolicyFileError {
    PolicyFileError::Read { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_wins_over_the_built_in_policy_of_its_name() {
        let dir = tempfile::tempdir().expect("dir");
        let text = BUILT_IN[0].1.replace("cost_usd = 1.0", "cost_usd = 3.0");
        std::fs::write(dir.path().join("default.toml"), text).expect("write");
        std::fs::write(dir.path().join("notes.txt"), "no policy").expect("write");
        let all = policy_sources(&[dir.path().to_owned(), dir.path().join("absent")]).expect("policies");
        assert_eq!(all.keys().collect::<Vec<_>>(), ["default", "refactor", "review", "trusted", "untrusted"]);
        assert_eq!(all["default"].policy.limits.cost_usd, 3.0);
        assert_eq!(all["trusted"].origin, PolicyOrigin::BuiltIn);
    }

    #[test]
    fn a_broken_file_is_named() {
        let dir = tempfile::tempdir().expect("dir");
        std::fs::write(dir.path().join("mine.toml"), "descripton = 1").expect("write");
        let error = policy_sources(&[dir.path().to_owned()]).expect_err("broken").to_string();
        assert!(error.contains("mine.toml") && error.contains("descripton"), "{error}");
    }
}
