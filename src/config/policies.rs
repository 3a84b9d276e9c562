//! Which policies there are: the built-in ones and the files in `policy_dirs`. Finds and reads them, again when they
//! changed; what they mean is `crate::policy`'s. A file that can no longer be used never takes a policy away that was
//! there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::policy::{Policy, PolicyError, Sets};

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
pub fn policy_sources(
    dirs: &[PathBuf],
    sets: &Sets,
) -> Result<BTreeMap<String, PolicySource>, PolicyFileError> {
    let listing = PolicyListing::read(dirs, sets);
    match listing.broken.into_iter().next() {
        Some(broken) => Err(broken.error),
        None => Ok(listing.all),
    }
}

/// What there is at one look.
#[derive(Debug, Default)]
pub struct PolicyListing {
    /// Those that can be used, by name.
    pub all: BTreeMap<String, PolicySource>,
    /// What cannot be used, in the order of its directories.
    pub broken: Vec<BrokenPolicy>,
    /// What was read from each file.
    read: BTreeMap<PathBuf, (Stamp, PolicySource)>,
    /// Every file that was seen, as it was.
    seen: Vec<(PathBuf, Option<Stamp>)>,
    /// The sets of hosts that they may name.
    sets: Sets,
}

/// A file, or a directory of them, that cannot be used.
#[derive(Debug)]
pub struct BrokenPolicy {
    /// Where it is.
    pub path: PathBuf,
    /// Whether its last good version, or what stood there before, is used instead.
    pub stands_in: bool,
    /// What is wrong.
    pub error: PolicyFileError,
}

/// How a file looks from outside: it is read again when that changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    bytes: u64,
    modified_ns: (i64, i64),
    changed_ns: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        use std::os::unix::fs::MetadataExt;
        let meta = std::fs::metadata(path).ok()?;
        Some(Self {
            inode: meta.ino(),
            bytes: meta.len(),
            modified_ns: (meta.mtime(), meta.mtime_nsec()),
            changed_ns: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

impl PolicyListing {
    /// Reads all of them. `sets` are the sets of hosts that they may name.
    pub fn read(dirs: &[PathBuf], sets: &Sets) -> Self {
        Self::after(dirs, &Self { sets: sets.clone(), ..Self::default() })
    }

    /// Reads what is new since `last`; what cannot be used any more stays as it was there.
    fn after(dirs: &[PathBuf], last: &Self) -> Self {
        let mut new = Self { sets: last.sets.clone(), ..Self::default() };
        for (name, text) in BUILT_IN {
            match Policy::parse_with(name, text, &last.sets) {
                Ok(policy) => {
                    let source =
                        PolicySource { policy, text: text.to_owned(), origin: PolicyOrigin::BuiltIn };
                    new.all.insert(name.to_owned(), source);
                }
                Err(error) => new.broken(PathBuf::from(name), false, PolicyFileError::Parse(error)),
            }
        }
        for dir in dirs {
            match toml_files(dir) {
                Ok(files) => files.into_iter().for_each(|path| new.take(path, last)),
                Err(error) => {
                    let old: Vec<_> = last.read.iter().filter(|(path, _)| path.starts_with(dir)).collect();
                    new.broken(dir.clone(), !old.is_empty(), error);
                    old.into_iter()
                        .for_each(|(path, (stamp, source))| new.put(path.clone(), *stamp, source.clone()));
                }
            }
            if new.all.len() > POLICIES_MAX {
                new.broken(dir.clone(), false, PolicyFileError::TooMany { path: dir.clone() });
            }
        }
        new
    }

    fn take(&mut self, path: PathBuf, last: &Self) {
        // Before it is read: what changes meanwhile is seen at the next look.
        let stamp = Stamp::of(&path);
        self.seen.push((path.clone(), stamp));
        let old = last.read.get(&path);
        if let Some((stamp, source)) = old.filter(|(old, _)| Some(*old) == stamp) {
            return self.put(path, *stamp, source.clone());
        }
        match (read_source(&path, &last.sets), stamp) {
            (Ok(source), Some(stamp)) => self.put(path, stamp, source),
            (Ok(_), None) => {}
            (Err(error), _) => {
                self.broken(path.clone(), old.is_some(), error);
                if let Some((stamp, source)) = old {
                    self.put(path, *stamp, source.clone());
                }
            }
        }
    }

    fn put(&mut self, path: PathBuf, stamp: Stamp, source: PolicySource) {
        self.all.insert(source.policy.name.clone(), source.clone());
        self.read.insert(path, (stamp, source));
    }

    fn broken(&mut self, path: PathBuf, stands_in: bool, error: PolicyFileError) {
        self.broken.push(BrokenPolicy { path, stands_in, error });
    }

    /// True where every file still looks as it did.
    fn is_fresh(&self, dirs: &[PathBuf]) -> bool {
        // A directory that cannot be read has no files here and had none there.
        let files = dirs.iter().flat_map(|dir| toml_files(dir).unwrap_or_default());
        let now = files.map(|path| (Stamp::of(&path), path)).map(|(stamp, path)| (path, stamp));
        now.eq(self.seen.iter().cloned())
    }
}

/// The policies of a running daemon: read again when a file changed, and kept as they were where a file cannot be used
/// any more.
#[derive(Debug)]
pub struct PolicyShelf {
    dirs: Vec<PathBuf>,
    state: Mutex<(PolicyListing, Arc<BTreeMap<String, Policy>>)>,
}

impl PolicyShelf {
    /// Reads them for the first time.
    ///
    /// # Errors
    /// As [`policy_sources`].
    pub fn open(dirs: &[PathBuf], sets: &Sets) -> Result<Self, PolicyFileError> {
        let mut listing = PolicyListing::read(dirs, sets);
        if !listing.broken.is_empty() {
            return Err(listing.broken.swap_remove(0).error);
        }
        let policies = Arc::new(by_name(&listing));
        Ok(Self { dirs: dirs.to_owned(), state: Mutex::new((listing, policies)) })
    }

    /// The policies as they are now. Looks at the directories, so it blocks.
    pub fn now(&self) -> Arc<BTreeMap<String, Policy>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.0.is_fresh(&self.dirs) {
            let new = PolicyListing::after(&self.dirs, &state.0);
            for broken in &new.broken {
                tracing::warn!(error = %broken.error, "a policy cannot be used; what stood there before stays");
            }
            if new.broken.is_empty() {
                tracing::info!("the policies were read again");
            }
            *state = (new, Arc::default());
            state.1 = Arc::new(by_name(&state.0));
        }
        state.1.clone()
    }

    /// The sets of hosts that policies, and users' own files, may name.
    pub fn sets(&self) -> Sets {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0.sets.clone()
    }

    /// What could not be used at the last look, in words.
    pub fn problems(&self) -> Vec<String> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state
            .0
            .broken
            .iter()
            .map(|b| format!("policy not read, the last good one stays: {}", b.error))
            .collect()
    }
}

fn by_name(listing: &PolicyListing) -> BTreeMap<String, Policy> {
    listing.all.iter().map(|(name, source)| (name.clone(), source.policy.clone())).collect()
}

fn read_source(path: &Path, sets: &Sets) -> Result<PolicySource, PolicyFileError> {
    let name = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
    let text = super::raw::read_bounded(path).map_err(|e| read_error(path, e))?;
    let policy = Policy::parse_with(name, &text, sets)
        .map_err(|error| PolicyFileError::Parse(error.in_file(path.display())))?;
    Ok(PolicySource { policy, text, origin: PolicyOrigin::File(path.to_owned()) })
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
        // A price list and sets of hosts may lie beside the policies, as in the source tree.
        let others = path.file_name().is_some_and(|name| name == "prices.toml" || name == "sets.toml");
        let named = path.file_stem().is_some_and(|stem| stem.to_str().is_some());
        if path.extension().is_some_and(|ext| ext == "toml") && named && !others {
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
        let all = policy_sources(&[dir.path().to_owned(), dir.path().join("absent")], &Sets::built_in())
            .expect("policies");
        assert_eq!(all.keys().collect::<Vec<_>>(), ["default", "refactor", "review", "trusted", "untrusted"]);
        assert_eq!(all["default"].policy.limits.cost_usd, 3.0);
        assert_eq!(all["trusted"].origin, PolicyOrigin::BuiltIn);
    }

    #[test]
    fn a_broken_file_is_named() {
        let dir = tempfile::tempdir().expect("dir");
        std::fs::write(dir.path().join("mine.toml"), "descripton = 1").expect("write");
        let error =
            policy_sources(&[dir.path().to_owned()], &Sets::built_in()).expect_err("broken").to_string();
        assert!(error.contains("mine.toml") && error.contains("descripton"), "{error}");
    }

    #[test]
    fn files_are_read_again_when_they_change_and_a_broken_one_changes_nothing() {
        let dir = tempfile::tempdir().expect("dir");
        let (mine, other) = (dir.path().join("mine.toml"), dir.path().join("other.toml"));
        let text = |usd: &str| BUILT_IN[0].1.replace("cost_usd = 1.0", &format!("cost_usd = {usd}"));
        std::fs::write(&mine, text("3.0")).expect("write");
        let shelf = PolicyShelf::open(&[dir.path().to_owned()], &Sets::built_in()).expect("policies");
        let first = shelf.now();
        assert!(Arc::ptr_eq(&first, &shelf.now()), "nothing changed, nothing is read");
        std::fs::write(&mine, text("4.25")).expect("write");
        std::fs::write(&other, text("5.0")).expect("write");
        let usd = |name: &str| shelf.now().get(name).map(|policy| policy.limits.cost_usd);
        assert_eq!((usd("mine"), usd("other"), usd("default")), (Some(4.25), Some(5.0), Some(1.0)));
        assert_eq!(first["mine"].limits.cost_usd, 3.0, "who holds one keeps it");

        std::fs::write(&mine, "descripton = 1").expect("write");
        assert_eq!((usd("mine"), usd("other")), (Some(4.25), Some(5.0)));
        let problems = shelf.problems();
        assert!(problems.len() == 1 && problems[0].contains("mine.toml:1: descripton: "), "{problems:?}");
        // A file that was never good does not hide what stands under its name.
        std::fs::write(dir.path().join("default.toml"), "x").expect("write");
        assert_eq!((usd("default"), shelf.problems().len()), (Some(1.0), 2));

        std::fs::write(&mine, text("6.5")).expect("write");
        std::fs::remove_file(&other).expect("remove");
        std::fs::remove_file(dir.path().join("default.toml")).expect("remove");
        assert_eq!((usd("mine"), usd("other"), usd("default")), (Some(6.5), None, Some(1.0)));
        assert!(shelf.problems().is_empty());
    }
}
