//! Where what is fetched lies: `<dir>/<uid>/mirrors/<sha256 of the address>.git` and `<dir>/<uid>/trees/<job>/tree`.
//! Below `<dir>/<uid>` a user may have put anything: nothing there is opened, listed or removed but with their rights.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

use super::{Limits, SourceError};
use crate::job::{Identity, JobId};
use crate::workspace::as_submitter;

/// Written when a mirror is used; its time says when that was.
pub(super) const USED: &str = "hotcell-used";
/// Longest piece of work in a user's directory.
const WORK_MAX: Duration = Duration::from_secs(300);
/// Most entries of a directory that are looked at.
const ENTRIES_MAX: usize = 100_000;

/// The places of one fetch.
#[derive(Debug)]
pub(super) struct Room {
    pub(super) mirrors: PathBuf,
    pub(super) tree: PathBuf,
}

pub(super) fn place(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SourceError + use<> {
    let path = path.to_owned();
    move |source| SourceError::Place { doing, path, source }
}

/// The name of an address' mirror.
pub(super) fn mirror_name(url: &str) -> String {
    let digest = Sha256::digest(url.as_bytes());
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{hex}.git")
}

/// Does something in a user's directory, with their rights and theirs alone.
pub(super) async fn as_user<T: Send + 'static>(
    who: &Identity,
    path: &Path,
    work: impl FnOnce() -> Result<T, SourceError> + Send + 'static,
) -> Result<T, SourceError> {
    let (who, at) = (who.clone(), path.to_owned());
    let done = tokio::task::spawn_blocking(move || as_submitter(&who, &at, WORK_MAX, work)).await;
    done.unwrap_or_else(|e| Err(place("work in", Path::new("."))(io::Error::other(e))))
}

/// Makes the directories for a job.
pub(super) async fn make(dir: &Path, who: &Identity, job: &JobId) -> Result<Room, SourceError> {
    let own = dir.join(who.uid.to_string());
    let (top, mine, ids) = (dir.to_owned(), own.clone(), who.clone());
    let made = tokio::task::spawn_blocking(move || make_tops(&top, &mine, &ids)).await;
    made.unwrap_or_else(|e| Err(place("make", dir)(io::Error::other(e))))?;
    let room = Room { mirrors: own.join("mirrors"), tree: own.join("trees").join(job.as_str()).join("tree") };
    let (mirrors, of_job) = (room.mirrors.clone(), own.join("trees").join(job.as_str()));
    as_user(who, &own, move || {
        for path in [&mirrors, &of_job] {
            DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(place("make", path))?;
        }
        Ok(())
    })
    .await?;
    Ok(room)
}

fn make_tops(dir: &Path, own: &Path, who: &Identity) -> Result<(), SourceError> {
    let daemon = rustix::process::geteuid();
    made(dir, daemon.as_raw(), 0o711, None)?;
    let given = daemon.is_root().then_some((who.uid, who.gid));
    made(own, who.uid, 0o700, given)
}

/// Makes a directory that is nobody else's, in one that nobody else writes.
fn made(path: &Path, owner: u32, mode: u32, given: Option<(u32, u32)>) -> Result<(), SourceError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {
            // Whatever the umask is.
            let mode = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(path, mode).map_err(place("make", path))?;
            if let Some((uid, gid)) = given {
                chown(path, Some(uid), Some(gid)).map_err(place("give away", path))?;
            }
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(place("make", path)(error)),
    }
    let found = std::fs::symlink_metadata(path).map_err(place("look at", path))?;
    if found.is_dir() && found.uid() == owner {
        return Ok(());
    }
    Err(place("use", path)(io::Error::other(format!("it is no directory of uid {owner}: remove it"))))
}

/// Removes what was fetched for a job.
pub(super) async fn remove(dir: &Path, who: &Identity, job: &JobId) -> Result<(), SourceError> {
    removed(who, dir.join(who.uid.to_string()).join("trees").join(job.as_str())).await
}

/// Removes a mirror.
pub(super) async fn remove_mirror(dir: &Path, who: &Identity, name: &str) -> Result<(), SourceError> {
    removed(who, dir.join(who.uid.to_string()).join("mirrors").join(name)).await
}

async fn removed(who: &Identity, path: PathBuf) -> Result<(), SourceError> {
    if !path.parent().is_some_and(Path::exists) {
        return Ok(());
    }
    let at = path.clone();
    as_user(who, &at, move || match std::fs::remove_dir_all(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(place("remove", &path)(error)),
        _ => Ok(()),
    })
    .await
}

/// The users who have something here.
pub(super) async fn users(dir: &Path) -> Result<Vec<Identity>, SourceError> {
    let dir = dir.to_owned();
    let listed = tokio::task::spawn_blocking(move || {
        let entries = match std::fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(place("list", &dir))?,
        };
        let mut users = Vec::new();
        for entry in entries.flatten().take(ENTRIES_MAX) {
            let uid = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
            let Ok(found) = entry.metadata() else { continue };
            users.extend(uid.filter(|uid| found.is_dir() && found.uid() == *uid).map(|uid| Identity {
                uid,
                gid: found.gid(),
                groups: Vec::new(),
            }));
        }
        Ok(users)
    });
    listed.await.unwrap_or_else(|e| Err(place("list", Path::new("."))(io::Error::other(e))))
}

/// The jobs that have something here.
pub(super) async fn jobs(dir: &Path) -> Result<Vec<(Identity, JobId)>, SourceError> {
    let mut found = Vec::new();
    for who in users(dir).await? {
        let trees = dir.join(who.uid.to_string()).join("trees");
        let names = as_user(&who, &trees.clone(), move || names(&trees)).await?;
        found.extend(names.into_iter().filter_map(|name| Some((who.clone(), name.parse::<JobId>().ok()?))));
    }
    Ok(found)
}

fn names(dir: &Path) -> Result<Vec<String>, SourceError> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(place("list", dir))?,
    };
    Ok(entries.flatten().take(ENTRIES_MAX).filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

/// The mirrors of a user that have to go.
pub(super) async fn too_many(
    dir: &Path,
    who: &Identity,
    limits: &Limits,
) -> Result<Vec<(String, u64, bool)>, SourceError> {
    let (mirrors, limits) = (dir.join(who.uid.to_string()).join("mirrors"), *limits);
    as_user(who, &mirrors.clone(), move || {
        let mut found = Vec::new();
        for name in names(&mirrors)?.into_iter().filter(|name| name.ends_with(".git")) {
            let mirror = mirrors.join(&name);
            let used =
                std::fs::symlink_metadata(mirror.join(USED)).or_else(|_| std::fs::symlink_metadata(&mirror));
            let Ok(used) = used.and_then(|found| found.modified()) else { continue };
            found.push((used, name, packs_bytes(&mirror)));
        }
        Ok(excess(found, SystemTime::now(), &limits))
    })
    .await
}

/// Which of them go: the old ones, then the ones unused longest until the rest fits. With their bytes; true: for their
/// age.
fn excess(
    mut found: Vec<(SystemTime, String, u64)>,
    now: SystemTime,
    limits: &Limits,
) -> Vec<(String, u64, bool)> {
    found.sort();
    let mut bytes: u64 = found.iter().map(|(_, _, bytes)| bytes).sum();
    let mut gone = Vec::new();
    for (used, name, size) in found {
        let aged = now.duration_since(used).unwrap_or_default() > limits.mirror_age_max;
        if aged || bytes > limits.mirrors_bytes_max {
            bytes -= size;
            gone.push((name, size, aged));
        }
    }
    gone
}

/// Bytes of a repository's packs: loose objects are not made here.
pub(super) fn packs_bytes(mirror: &Path) -> u64 {
    let entries = std::fs::read_dir(mirror.join("objects/pack")).into_iter().flatten().flatten();
    entries.take(ENTRIES_MAX).filter_map(|entry| entry.metadata().ok()).map(|found| found.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_mirrors_go_and_then_the_ones_unused_longest() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let at = |ago: u64, name: &str, bytes| (now - Duration::from_secs(ago), name.to_owned(), bytes);
        let limits =
            Limits { mirror_age_max: Duration::from_secs(1000), mirrors_bytes_max: 100, ..Limits::default() };
        let found = vec![at(10, "new", 60), at(500, "middle", 50), at(2000, "old", 500), at(20, "other", 30)];
        let expected = [("old".to_owned(), 500, true), ("middle".to_owned(), 50, false)];
        assert_eq!(excess(found, now, &limits), expected);
        assert_eq!(excess(vec![at(10, "new", 100)], now, &limits), []);
    }
}
