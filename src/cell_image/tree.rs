//! The directory that mmdebstrap unpacks into, outside the state directory: apt's unprivileged download user must
//! reach it.
//!
//! Never removes a directory while something is mounted below it, or one that is not ours.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Where trees are made: on disk, and open to all users' passage.
pub(super) const PLACE: &str = "/var/tmp";
const PREFIX: &str = "hotcell-image-";
const STALE_S: u64 = 3600;

/// Trees of this process in which a build is at work.
static AT_WORK: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn at_work() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    AT_WORK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One tree. Removed by [`Tree::remove`]; what a killed build left is removed by a later one.
pub(super) struct Tree(PathBuf);

impl Tree {
    pub(super) fn create() -> io::Result<Self> {
        sweep(Path::new(PLACE))?;
        // The process id lets a later build see that nobody works in it any more.
        let prefix = format!("{PREFIX}{}-", std::process::id());
        let path = tempfile::Builder::new().prefix(&prefix).tempdir_in(PLACE)?.keep();
        at_work().insert(path.clone());
        let tree = Self(path);
        fs::set_permissions(tree.path(), fs::Permissions::from_mode(0o711))?;
        Ok(tree)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    pub(super) fn remove(self) -> io::Result<()> {
        remove_unmounted(&self.0)
    }
}

impl Drop for Tree {
    /// Notes that the build is over; a tree that was not removed is then a later build's to remove.
    fn drop(&mut self) {
        at_work().remove(&self.0);
    }
}

fn sweep(place: &Path) -> io::Result<()> {
    for entry in fs::read_dir(place)?.take(100_000).flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(rest) = name.strip_prefix(PREFIX) else { continue };
        let maker = rest.split('-').next().unwrap_or_default();
        // Gone since, or not to be looked at: not ours to remove.
        let Ok(meta) = entry.metadata() else { continue };
        let ours = meta.is_dir() && meta.uid() == rustix::process::geteuid().as_raw();
        let old = meta.modified()?.elapsed().is_ok_and(|age| age.as_secs() > STALE_S);
        let orphan = maker.parse::<u32>().is_ok_and(|pid| match pid == std::process::id() {
            true => !at_work().contains(&entry.path()),
            false => !Path::new(&format!("/proc/{pid}")).exists(),
        });
        if ours && (old || orphan) {
            tracing::info!(path = %entry.path().display(), "removing what a broken-off image build left");
            remove_unmounted(&entry.path())?;
        }
    }
    Ok(())
}

fn remove_unmounted(path: &Path) -> io::Result<()> {
    // Removing would go through a mount (proc, dev) into the machine.
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    if mounted_below(&mounts, path) {
        return Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "something is still mounted in it; unmount that first",
        ));
    }
    fs::remove_dir_all(path)
}

fn mounted_below(mountinfo: &str, path: &Path) -> bool {
    let places = mountinfo.lines().filter_map(|line| line.split(' ').nth(4));
    places.into_iter().any(|place| Path::new(place).starts_with(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_below_is_seen_and_a_neighbour_is_not() {
        let info = "22 1 8:1 / / rw - ext4 /dev/x rw\n40 22 0:5 / /var/tmp/hotcell-image-a/root/proc rw - proc p rw\n";
        assert!(mounted_below(info, Path::new("/var/tmp/hotcell-image-a")));
        assert!(!mounted_below(info, Path::new("/var/tmp/hotcell-image-ab")));
        assert!(!mounted_below(info, Path::new("/var/tmp/hotcell-image-a/other")));
    }

    #[test]
    fn a_tree_is_passable_for_others_and_removed_whole() {
        let tree = Tree::create().unwrap();
        let path = tree.path().to_owned();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o711);
        fs::create_dir_all(path.join("a/b")).unwrap();
        tree.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn what_a_dead_build_left_is_removed_and_a_working_one_is_left_alone() {
        let place = tempfile::tempdir().unwrap();
        let dir = |pid: u32, name: &str| place.path().join(format!("{PREFIX}{pid}-{name}"));
        let mut dead = std::process::Command::new("true").spawn().unwrap();
        dead.wait().unwrap();
        let (dead, given_up) = (dir(dead.id(), "x"), dir(std::process::id(), "x"));
        let working = dir(std::process::id(), "y");
        for path in [&dead, &given_up, &working] {
            fs::create_dir_all(path.join("a")).unwrap();
        }
        at_work().insert(working.clone());
        sweep(place.path()).unwrap();
        assert!(!dead.exists() && !given_up.exists() && working.exists());
        at_work().remove(&working);
    }
}
