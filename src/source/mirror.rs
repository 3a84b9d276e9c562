//! The mirror of one repository: bare, the user's, with the branches and tags as they are now, every object checked as
//! if it came from a stranger. It must never take on a configuration, a hook or an alternate of the repository's.

use std::path::Path;

use super::git::{Config, Run};
use super::refs::{Heads, Wanted, ssh_command};
use super::room::{USED, as_user, place};
use super::{Limits, SourceError};

/// Longest list of a mirror's own refs, in bytes.
const LIST_BYTES_MAX: usize = 64 << 20;
/// How deep names of branches go when leftovers are looked for.
const DEPTH_MAX: usize = 64;

/// Brings the mirror up to date, under its lock. True where it was already.
pub(super) async fn update(
    run: &Run<'_>,
    mirror: &Path,
    heads: &Heads,
    wanted: &Wanted,
    limits: &Limits,
) -> Result<bool, SourceError> {
    let free = tidy(run, mirror).await?;
    let mut init = run.git(Config::None, "init").args(["init", "--quiet", "--bare", "--template="]);
    if heads.is_sha256() {
        init = init.args(["--object-format=sha256"]);
    }
    init.args([mirror.as_os_str()]).text().await?;
    let had = same(run, mirror, heads).await? && has(run, mirror, &wanted.id).await?;
    if !had {
        let bytes = free.saturating_sub(limits.reserve_bytes).min(limits.pack_bytes_max);
        let mut specs = vec!["+refs/heads/*:refs/heads/*".to_owned(), "+refs/tags/*:refs/tags/*".to_owned()];
        specs.extend(further(wanted));
        fetch(run, mirror, &specs, bytes).await?;
        // A commit that no branch and no tag leads to: the server may still give it.
        if wanted.full.is_none() && !has(run, mirror, &wanted.id).await? {
            let spec = vec![format!("+{id}:refs/hotcell/{id}", id = wanted.id)];
            fetch(run, mirror, &spec, bytes).await.map_err(|error| match error {
                SourceError::Git { .. } | SourceError::NotThere { .. } => SourceError::UnknownRef {
                    url: run.url.to_owned(),
                    name: wanted.name.clone(),
                    near: Vec::new(),
                },
                other => other,
            })?;
        }
    }
    if let Some(default) = &heads.default {
        let head = run.git(Config::None, "symbolic-ref").args([in_dir(mirror)]);
        head.args(["symbolic-ref", "HEAD", default.as_str()]).text().await?;
    }
    let used = mirror.join(USED);
    as_user(run.who, mirror, move || std::fs::write(&used, b"").map_err(place("write", &used))).await?;
    Ok(had)
}

/// The commit that is wanted, in full.
pub(super) async fn commit(run: &Run<'_>, mirror: &Path, wanted: &Wanted) -> Result<String, SourceError> {
    let git = run.git(Config::None, "rev-parse").args([in_dir(mirror)]);
    let object = format!("{}^{{commit}}", wanted.id);
    let output =
        git.args(["rev-parse", "--verify", "--quiet", "--end-of-options", object.as_str()]).output().await?;
    let commit = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if output.code == 0 && crate::job::source::is_commit_id(&commit) {
        return Ok(commit);
    }
    Err(SourceError::NotACommit { name: wanted.name.clone() })
}

pub(super) fn in_dir(mirror: &Path) -> std::ffi::OsString {
    let mut arg = std::ffi::OsString::from("--git-dir=");
    arg.push(mirror);
    arg
}

/// What is neither a branch nor a tag is kept under a name of ours.
fn further(wanted: &Wanted) -> Option<String> {
    let full = wanted.full.as_ref()?;
    let mirrored = full.starts_with("refs/heads/") || full.starts_with("refs/tags/");
    (!mirrored).then(|| format!("+{full}:refs/hotcell/{}", wanted.id))
}

async fn fetch(run: &Run<'_>, mirror: &Path, specs: &[String], bytes: u64) -> Result<(), SourceError> {
    let git = run.git(Config::Users, "fetch").args([in_dir(mirror)]);
    let git = git.args(["-c", "http.lowSpeedLimit=1", "-c", "http.lowSpeedTime=120"]);
    let git = git.args([
        "fetch",
        "--quiet",
        "--force",
        "--prune",
        "--no-tags",
        "--no-write-fetch-head",
        "--no-auto-maintenance",
        "--no-recurse-submodules",
        "--",
        run.url,
    ]);
    let git = git.args(specs).env("GIT_SSH_COMMAND", ssh_command(run).await?);
    git.file_bytes_max(bytes).text().await.map(|_| ())
}

/// Whether the mirror has the same branches and tags.
async fn same(run: &Run<'_>, mirror: &Path, heads: &Heads) -> Result<bool, SourceError> {
    let git = run.git(Config::None, "for-each-ref").args([in_dir(mirror)]);
    let git = git.args(["for-each-ref", "--format=%(objectname)\t%(refname)", "refs/heads", "refs/tags"]);
    let text = git.output_bytes_max(LIST_BYTES_MAX).text().await?;
    let text = String::from_utf8_lossy(&text);
    let own = text.lines().filter_map(|line| line.split_once('\t')).map(|(id, name)| (name, id));
    Ok(own.eq(heads.mirrored()))
}

async fn has(run: &Run<'_>, mirror: &Path, id: &str) -> Result<bool, SourceError> {
    let git = run.git(Config::None, "cat-file").args([in_dir(mirror)]);
    Ok(git.args(["cat-file", "-e", id]).output().await?.code == 0)
}

/// Removes what a fetch that was killed left: nobody else fetches here now. Gives the free space of its disk, in bytes.
async fn tidy(run: &Run<'_>, mirror: &Path) -> Result<u64, SourceError> {
    let mirror = mirror.to_owned();
    let at = mirror.clone();
    as_user(run.who, &at, move || {
        let parent = mirror.parent().unwrap_or(&mirror);
        let disk = rustix::fs::statvfs(parent).map_err(|e| place("look at", parent)(e.into()))?;
        leftovers(&mirror.join("objects/pack"), 0, &|name| name.starts_with("tmp_"));
        leftovers(&mirror.join("refs"), DEPTH_MAX, &|name| name.ends_with(".lock"));
        leftovers(&mirror, 0, &|name| name.ends_with(".lock"));
        Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
    })
    .await
}

fn leftovers(dir: &Path, depth: usize, is: &dyn Fn(&str) -> bool) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() && depth > 0 {
            leftovers(&entry.path(), depth - 1, is);
        } else if kind.is_file() && entry.file_name().to_str().is_some_and(is) {
            // What stays makes git say so.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}
