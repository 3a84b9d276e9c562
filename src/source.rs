//! Fetches the repositories that jobs name, as the person who submits them: their keys, credential helpers and git
//! configuration are theirs to use; the repository's own configuration, hooks and filters are nobody's. What was
//! fetched stays as a mirror per user and address, and each job gets a checkout of its own beside it. It must never
//! ask anybody anything, never do with the daemon's rights what a user can bend, and leave nothing of what failed.
//!
//! `<dir>` is 0711 and the daemon's, `<dir>/<uid>` 0700 and the user's: in there everything is made, read and removed
//! with the user's rights, so that whatever they put in the way hits themselves alone.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::job::source::{GitCheckout, GitSource};
use crate::job::{Identity, JobId};
use crate::workspace::WorkspaceError;

mod git;
mod lfs;
mod mirror;
mod refs;
mod room;
mod tree;
mod words;

use git::Run;

/// Bounds of what is fetched.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Longest fetch with its checkout.
    pub wall: Duration,
    /// Most bytes that one fetch may bring, as git packs them.
    pub pack_bytes_max: u64,
    /// Most bytes of a checkout.
    pub tree_bytes_max: u64,
    /// Most files of a checkout.
    pub tree_files_max: u64,
    /// Fetches of one user at the same time; more are refused.
    pub per_user_max: usize,
    /// Fetches of all users at the same time; more are refused.
    pub all_max: usize,
    /// Most bytes of one user's mirrors: the ones unused longest go first.
    pub mirrors_bytes_max: u64,
    /// A mirror unused for so long goes.
    pub mirror_age_max: Duration,
    /// Disk space that is left free.
    pub reserve_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            wall: Duration::from_secs(15 * 60),
            pack_bytes_max: 8 << 30,
            tree_bytes_max: 16 << 30,
            tree_files_max: 1_000_000,
            per_user_max: 4,
            all_max: 32,
            mirrors_bytes_max: 32 << 30,
            mirror_age_max: Duration::from_secs(30 * 86_400),
            reserve_bytes: 1 << 30,
        }
    }
}

/// Why nothing was fetched. Nothing is left of it then, but what the mirror had got before.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// There is no git.
    #[error("git is not installed on this machine: install it, or give a directory")]
    NoGit,
    /// Too many at once.
    #[error("{count} fetches are under way, which is the limit: submit again when one of them is over")]
    Busy {
        /// How many.
        count: usize,
    },
    /// It took too long.
    #[error("{url} was not fetched within {seconds} s: clone it yourself and give the directory")]
    Late {
        /// The address.
        url: String,
        /// The limit.
        seconds: u64,
    },
    /// The host's name is not known.
    #[error("{url}: its host is not known here ({words})")]
    NoHost {
        /// The address.
        url: String,
        /// Git's.
        words: String,
    },
    /// The host does not answer.
    #[error("{url} cannot be reached ({words})")]
    Unreachable {
        /// The address.
        url: String,
        /// Git's.
        words: String,
    },
    /// Nobody can be asked for a password or key.
    #[error("{url} wants to know who you are, and nobody can be asked here: {missing}")]
    Credentials {
        /// The address.
        url: String,
        /// What to set up.
        missing: String,
    },
    /// The host's key is not known, or another one.
    #[error(
        "{url}: its host's key is not in your known_hosts, or is another one: connect once with ssh by hand"
    )]
    HostKey {
        /// The address.
        url: String,
    },
    /// There is something else, or nothing.
    #[error("{url} is no git repository that you can read ({words})")]
    NotThere {
        /// The address.
        url: String,
        /// Git's.
        words: String,
    },
    /// Git trusts only what belongs to its user.
    #[error(
        "{url} belongs to another user: `git config --global --add safe.directory {url}` says that you trust it"
    )]
    Owner {
        /// The address.
        url: String,
    },
    /// It has no commit.
    #[error("{url} has no commit yet")]
    Empty {
        /// The address.
        url: String,
    },
    /// No such branch, tag or commit.
    #[error("{url} has no {name:?}{}", near_words(near))]
    UnknownRef {
        /// The address.
        url: String,
        /// What was asked for.
        name: String,
        /// Names that are much like it.
        near: Vec<String>,
    },
    /// A branch and a tag of one name.
    #[error("{name:?} is a branch and a tag: say refs/heads/{name} or refs/tags/{name}")]
    Ambiguous {
        /// What was asked for.
        name: String,
    },
    /// It is there and no commit.
    #[error("{name:?} is no commit: name a branch, a tag of a commit, or a full commit id")]
    NotACommit {
        /// What was asked for.
        name: String,
    },
    /// More than there may be.
    #[error("{what}, and at most {max} are allowed: clone it yourself and give the directory")]
    TooLarge {
        /// How much of what.
        what: String,
        /// The limit, with its unit.
        max: String,
    },
    /// What came fails git's own checks.
    #[error("{url} holds objects that fail git's checks ({words})")]
    Damaged {
        /// The address.
        url: String,
        /// Git's.
        words: String,
    },
    /// Contents that are kept elsewhere.
    #[error("{}: {missing}", lfs_words(files, *count))]
    Lfs {
        /// Some of them.
        files: Vec<String>,
        /// How many there are.
        count: usize,
        /// What to do.
        missing: String,
    },
    /// Git said something else.
    #[error("`git {command}` failed for {url}: {words}")]
    Git {
        /// Its command.
        command: &'static str,
        /// The address.
        url: String,
        /// Git's.
        words: String,
    },
    /// The place of what is fetched.
    #[error("cannot {doing} {path:?}: {source}")]
    Place {
        /// What was tried.
        doing: &'static str,
        /// Where.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// Nothing can be run or opened as this user.
    #[error(transparent)]
    Run(#[from] crate::run_as::RunError),
    /// As above.
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
}

impl SourceError {
    /// The key of the spec that it is about, below `workspace.git`.
    pub fn key(&self) -> &'static str {
        match self {
            Self::UnknownRef { .. } | Self::Ambiguous { .. } | Self::NotACommit { .. } => "ref",
            Self::NoGit
            | Self::Busy { .. }
            | Self::Late { .. }
            | Self::NoHost { .. }
            | Self::Unreachable { .. } => "url",
            Self::Credentials { .. } | Self::HostKey { .. } | Self::NotThere { .. } | Self::Owner { .. } => {
                "url"
            }
            Self::Empty { .. } | Self::TooLarge { .. } | Self::Damaged { .. } | Self::Lfs { .. } => "url",
            Self::Git { .. } | Self::Place { .. } | Self::Run(_) | Self::Workspace(_) => "url",
        }
    }
}

fn near_words(near: &[String]) -> String {
    if near.is_empty() { String::new() } else { format!(": did you mean {}?", near.join(" or ")) }
}

fn lfs_words(files: &[String], count: usize) -> String {
    let (verb, more) =
        (if count == 1 { "file is" } else { "files are" }, if count > files.len() { ", …" } else { "" });
    format!("{count} {verb} in Git LFS ({}{more})", files.join(", "))
}

/// What was fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// The checkout: a repository of its own, whose objects nobody else writes.
    pub tree: PathBuf,
    /// What it is of.
    pub checkout: GitCheckout,
    /// What its submitter should know, in sentences.
    pub notes: Vec<String>,
}

/// The mirrors and checkouts of all users.
#[derive(Debug)]
pub struct Sources {
    dir: PathBuf,
    limits: Limits,
    /// What git and all that it starts get beside what a user's programs get.
    env: Vec<(String, OsString)>,
    under_way: Mutex<UnderWay>,
}

/// A mirror that is too old or too much.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Old {
    /// Whose it is.
    pub who: Identity,
    /// Its directory's name.
    pub name: String,
    /// Bytes of its packs.
    pub bytes: u64,
    /// It is too old; else its user has too much.
    pub aged: bool,
}

/// A user and the name of one of their mirrors.
type MirrorId = (u32, String);

#[derive(Debug, Default)]
struct UnderWay {
    jobs: HashSet<JobId>,
    users: HashMap<u32, usize>,
    mirrors: HashMap<MirrorId, Arc<tokio::sync::Mutex<()>>>,
}

/// One fetch: counted, and its job's directory not taken for a leftover, until this is dropped.
struct Place<'a> {
    sources: &'a Sources,
    uid: u32,
    job: JobId,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut under_way = self.sources.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        under_way.jobs.remove(&self.job);
        if let Some(count) = under_way.users.get_mut(&self.uid) {
            *count -= 1;
        }
        under_way.users.retain(|_, count| *count > 0);
        under_way.mirrors.retain(|_, lock| Arc::strong_count(lock) > 1);
    }
}

impl Sources {
    /// What is fetched is below `dir`, which is made when it is needed first.
    pub fn new(dir: PathBuf, limits: Limits) -> Self {
        Self { dir, limits, env: Vec::new(), under_way: Mutex::default() }
    }

    /// The same with more variables for git and all that it starts.
    #[must_use]
    pub fn with_env(mut self, env: Vec<(String, OsString)>) -> Self {
        self.env = env;
        self
    }

    /// Fetches `source` as `who` and checks it out for `job`. `keep` makes what is there stay: until it is dropped, the
    /// checkout of a job that has no row yet is not swept.
    ///
    /// # Errors
    /// [`SourceError`].
    pub async fn fetch(
        &self,
        who: &Identity,
        source: &GitSource,
        job: &JobId,
    ) -> Result<Kept<'_>, SourceError> {
        let place = self.place(who.uid, job)?;
        let room = room::make(&self.dir, who, job).await?;
        let run = Run {
            who,
            url: &source.url,
            env: &self.env,
            until: Instant::now() + self.limits.wall,
            wall: self.limits.wall,
        };
        let fetched = tokio::time::timeout(self.limits.wall, self.fetch_into(&run, source, &room)).await;
        let fetched = fetched.unwrap_or_else(|_| Err(run.late()));
        match fetched {
            Ok(fetched) => Ok(Kept { fetched, _place: place }),
            Err(error) => {
                if let Err(left) = room::remove(&self.dir, who, job).await {
                    tracing::warn!(%job, %left, "what was fetched for a refused job is left; the sweeper goes on");
                }
                Err(error)
            }
        }
    }

    async fn fetch_into(
        &self,
        run: &Run<'_>,
        source: &GitSource,
        room: &room::Room,
    ) -> Result<Fetched, SourceError> {
        let begun = Instant::now();
        let heads = refs::ask(run).await?;
        let wanted = heads.resolve(&source.url, source.name.as_deref())?;
        let name = room::mirror_name(&source.url);
        let lock = self.lock_of(run.who.uid, &name);
        let _one_at_a_time = lock.lock().await;
        let mirror = room.mirrors.join(&name);
        let had = mirror::update(run, &mirror, &heads, &wanted, &self.limits).await?;
        let commit = mirror::commit(run, &mirror, &wanted).await?;
        let listed = tree::listed(run, &mirror, &commit, &self.limits).await?;
        tree::make(run, &mirror, &room.tree, &wanted, &commit).await?;
        let mut notes = lfs::complete(run, &room.tree, &commit, &listed).await?;
        if listed.submodules > 0 {
            notes.push(format!(
                "{} submodules are not fetched: their directories are empty",
                listed.submodules
            ));
        }
        let at = wanted.branch.as_ref().map_or(String::new(), |branch| format!(", branch {branch}"));
        let (seconds, how) = (begun.elapsed().as_secs_f64(), if had { "was up to date" } else { "fetched" });
        notes.insert(0, format!("{}: {how} in {seconds:.1} s, commit {commit}{at}", source.url));
        let checkout =
            GitCheckout { url: source.url.clone(), name: source.name.clone(), commit, branch: wanted.branch };
        Ok(Fetched { tree: room.tree.clone(), checkout, notes })
    }

    /// Removes what was fetched for a job; nothing there is fine.
    ///
    /// # Errors
    /// [`SourceError::Place`]; the sweeper tries again.
    pub async fn remove(&self, who: &Identity, job: &JobId) -> Result<(), SourceError> {
        room::remove(&self.dir, who, job).await
    }

    /// The jobs that something was fetched for, with their users, but for those that are fetched now.
    ///
    /// # Errors
    /// [`SourceError::Place`].
    pub async fn jobs(&self) -> Result<Vec<(Identity, JobId)>, SourceError> {
        let mut found = room::jobs(&self.dir).await?;
        let under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        found.retain(|(_, job)| !under_way.jobs.contains(job));
        Ok(found)
    }

    /// Mirrors that are too old or too much; those unused longest first.
    ///
    /// # Errors
    /// [`SourceError::Place`].
    pub async fn evictable(&self) -> Result<Vec<Old>, SourceError> {
        let mut old = Vec::new();
        for who in room::users(&self.dir).await? {
            let found = room::too_many(&self.dir, &who, &self.limits).await?;
            let of = |(name, bytes, aged)| Old { who: who.clone(), name, bytes, aged };
            old.extend(found.into_iter().map(of));
        }
        Ok(old)
    }

    /// Removes one of these; false where it is in use.
    ///
    /// # Errors
    /// [`SourceError::Place`].
    pub async fn evict(&self, old: &Old) -> Result<bool, SourceError> {
        let lock = self.lock_of(old.who.uid, &old.name);
        let Ok(_unused) = lock.try_lock() else { return Ok(false) };
        room::remove_mirror(&self.dir, &old.who, &old.name).await?;
        Ok(true)
    }

    /// Where what is fetched is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn place(&self, uid: u32, job: &JobId) -> Result<Place<'_>, SourceError> {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        let (mine, all) = (under_way.users.get(&uid).copied().unwrap_or(0), under_way.jobs.len());
        if mine >= self.limits.per_user_max || all >= self.limits.all_max {
            return Err(SourceError::Busy {
                count: if mine >= self.limits.per_user_max { mine } else { all },
            });
        }
        *under_way.users.entry(uid).or_default() += 1;
        under_way.jobs.insert(job.clone());
        Ok(Place { sources: self, uid, job: job.clone() })
    }

    fn lock_of(&self, uid: u32, name: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        under_way.mirrors.entry((uid, name.to_owned())).or_default().clone()
    }
}

/// What was fetched, and the promise that it is not swept while this is held.
pub struct Kept<'a> {
    /// It.
    pub fetched: Fetched,
    _place: Place<'a>,
}

#[cfg(test)]
mod tests;
