//! Stages a checked workspace for one cell: a private, non-recursive clone of the mount at exactly the
//! opened directory, nosuid and nodev, with the submitter's ids shown as the cell's, on a directory that
//! only the daemon can reach. Must never mount by path, and never show nested mounts.
//!
//! The order is clone, attributes, (later: protection of `.git` on the still detached tree), attach:
//! nothing half-made is ever visible under the target.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode as FileMode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

use super::mounts::{self, Unmounted};
use super::{WorkspaceError, WorkspaceRecord, idmap, io_at, peer};
use crate::job::Identity;

/// Whether the job may change the workspace in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Reads and writes go to the user's own files.
    Bind,
    /// Nothing can be changed.
    ReadOnly,
}

/// Who the cell is, and whom its files belong to outside.
#[derive(Debug, Clone)]
pub struct CellIds<'a> {
    /// Host ids of the person.
    pub submitter: &'a Identity,
    /// The cell's private uid, from [`super::CELL_IDS`].
    pub cell_uid: u32,
    /// The cell's private gid, from [`super::CELL_IDS`].
    pub cell_gid: u32,
    /// Private gids for the submitter's supplementary groups, in their order. Where there are fewer,
    /// the rest of the groups is not usable in the cell. At most 40.
    pub cell_groups: &'a [u32],
    /// False where the cell's runtime cannot create files on an idmapped mount (gVisor).
    pub runtime_maps_ids: bool,
}

/// Which host-visible ids the cell's processes must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StagedIds {
    /// The cell's private ids; its files belong to the submitter outside.
    Private {
        /// Uid to run as.
        uid: u32,
        /// Gid to run as.
        gid: u32,
        /// Supplementary gids to run with.
        groups: Vec<u32>,
    },
    /// No id map: the cell must run with the submitter's own ids.
    Submitter {
        /// Uid to run as.
        uid: u32,
        /// Gid to run as.
        gid: u32,
        /// Supplementary gids to run with.
        groups: Vec<u32>,
    },
}

/// A workspace ready to be bound into a cell. Must be ended with [`Staged::destroy`], or by [`super::sweep`]
/// with the whole cell.
#[derive(Debug)]
pub struct Staged {
    path: PathBuf,
    ids: StagedIds,
    note: Option<String>,
    mounted: bool,
}

const GROUPS_MAX: usize = 40;

/// Stages `dir` (from `reopen_as`, with its `record`) on `target_dir`, a directory below one that only
/// the daemon can enter; it is made if it is missing. Where the daemon is not root nothing is mounted:
/// the result is the user's own path. Blocks; about 0.5 ms.
///
/// # Errors
/// [`WorkspaceError::Moved`] if `dir` is not the recorded directory, [`WorkspaceError::RootUnmapped`],
/// [`WorkspaceError::Ids`], [`WorkspaceError::TargetBusy`], [`WorkspaceError::Io`]. Nothing stays mounted.
pub fn stage(
    dir: &OwnedFd,
    record: &WorkspaceRecord,
    ids: &CellIds<'_>,
    mode: Mode,
    target_dir: &Path,
) -> Result<Staged, WorkspaceError> {
    peer::same_directory(dir.as_fd(), record)?;
    if !rustix::process::geteuid().is_root() {
        return direct(record, ids.submitter);
    }
    let (uid_map, gid_map, groups) = maps(ids)?;
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let tree =
        rustix::mount::open_tree(dir, c"", flags).map_err(io_at("clone the mount of", &record.path))?;
    set_attributes(tree.as_fd(), mode).map_err(io_at("restrict the mount of", &record.path))?;
    let unmapped = if ids.runtime_maps_ids {
        idmap::user_namespace(&uid_map, &gid_map)
            .map_err(|e| format!("no user namespace: {e}"))
            .and_then(|ns| map_ids(tree.as_fd(), &ns).map_err(|e| format!("no id-mapped mount: {e}")))
            .err()
    } else {
        Some("the cell's runtime cannot use id-mapped mounts".to_owned())
    };
    let (ids, note) = match unmapped {
        None => (StagedIds::Private { uid: ids.cell_uid, gid: ids.cell_gid, groups: groups.0 }, groups.1),
        Some(why) => unmapped_ids(record, ids.submitter, why)?,
    };
    attach(tree.as_fd(), target_dir)?;
    let staged = Staged { path: target_dir.to_owned(), ids, note, mounted: true };
    if let Err(error) = proven(record, target_dir) {
        staged.destroy()?;
        return Err(error);
    }
    Ok(staged)
}

/// Takes down what `stage` put on `target_dir`, e.g. by an earlier daemon; fine if nothing is there.
/// Blocks, up to 200 ms where the mount is busy.
///
/// # Errors
/// [`WorkspaceError::StillMounted`], or [`WorkspaceError::Io`] if the empty directory cannot be removed.
pub fn unstage(target_dir: &Path) -> Result<(), WorkspaceError> {
    let ended = mounts::unmount(target_dir)
        .map_err(|_| WorkspaceError::StillMounted { path: target_dir.to_owned() })?;
    if ended == Unmounted::Detached {
        tracing::warn!(path = %target_dir.display(), "workspace was busy; detached, gone when its last user is");
    }
    // rmdir only: if anything is in there, it is not ours.
    match rustix::fs::rmdir(target_dir) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(io_at("remove", target_dir)(errno)),
    }
}

impl Staged {
    /// What to bind into the cell as its workspace.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whom the cell must run as.
    pub fn ids(&self) -> &StagedIds {
        &self.ids
    }

    /// What the user should know, in one sentence.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// Whether this is the user's own path, with no mount in between (the daemon is not root).
    pub fn is_direct(&self) -> bool {
        !self.mounted
    }

    /// Unmounts and proves it. The user's files are not touched.
    ///
    /// # Errors
    /// As [`unstage`].
    pub fn destroy(self) -> Result<(), WorkspaceError> {
        if self.mounted { unstage(&self.path) } else { Ok(()) }
    }
}

fn direct(record: &WorkspaceRecord, submitter: &Identity) -> Result<Staged, WorkspaceError> {
    let own_uid = rustix::process::geteuid().as_raw();
    if submitter.uid != own_uid {
        return Err(WorkspaceError::CannotSwitch { uid: submitter.uid, own_uid });
    }
    let why = "the daemon is not root".to_owned();
    let (ids, note) = unmapped_ids(record, submitter, why)?;
    Ok(Staged { path: record.path.clone(), ids, note, mounted: false })
}

fn unmapped_ids(
    record: &WorkspaceRecord,
    submitter: &Identity,
    why: String,
) -> Result<(StagedIds, Option<String>), WorkspaceError> {
    if submitter.uid == 0 {
        return Err(WorkspaceError::RootUnmapped { path: record.path.clone(), why });
    }
    let note = format!("the cell runs as your own uid {}: {why}", submitter.uid);
    let Identity { uid, gid, groups } = submitter.clone();
    Ok((StagedIds::Submitter { uid, gid, groups }, Some(note)))
}

type GroupsAndNote = (Vec<u32>, Option<String>);

/// The text of both maps, the supplementary groups that the cell gets, and a note about those it lacks.
fn maps(ids: &CellIds<'_>) -> Result<(String, String, GroupsAndNote), WorkspaceError> {
    let Identity { uid, gid, groups } = ids.submitter;
    let mut wanted: Vec<u32> = Vec::with_capacity(groups.len());
    for group in groups {
        if group != gid && !wanted.contains(group) {
            wanted.push(*group);
        }
    }
    let pairs: Vec<(u32, u32)> =
        wanted.iter().copied().zip(ids.cell_groups.iter().copied()).take(GROUPS_MAX).collect();
    let note = (pairs.len() < wanted.len()).then(|| {
        format!("{} of your {} groups are not usable in the cell", wanted.len() - pairs.len(), wanted.len())
    });
    let cell_groups = pairs.iter().map(|p| p.1).collect();
    let gid_pairs: Vec<(u32, u32)> = std::iter::once((*gid, ids.cell_gid)).chain(pairs).collect();
    let uid_map = idmap::map_text(&[(*uid, ids.cell_uid)])?;
    Ok((uid_map, idmap::map_text(&gid_pairs)?, (cell_groups, note)))
}

fn set_attributes(tree: BorrowedFd<'_>, mode: Mode) -> io::Result<()> {
    let read_only = if mode == Mode::ReadOnly { libc::MOUNT_ATTR_RDONLY } else { 0 };
    mount_setattr(
        tree,
        &libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | read_only,
            attr_clr: 0,
            // The clone of a shared mount is shared: without this the user's later mounts would come in.
            propagation: libc::MS_PRIVATE,
            userns_fd: 0,
        },
    )
}

fn map_ids(tree: BorrowedFd<'_>, namespace: &OwnedFd) -> io::Result<()> {
    mount_setattr(
        tree,
        &libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP,
            attr_clr: 0,
            propagation: 0,
            userns_fd: namespace.as_raw_fd() as u64,
        },
    )
}

fn mount_setattr(tree: BorrowedFd<'_>, attr: &libc::mount_attr) -> io::Result<()> {
    // SAFETY: the descriptor is open, the name is an empty C string, and `attr` is a live mount_attr
    // whose size is passed with it.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            std::ptr::from_ref(attr),
            size_of::<libc::mount_attr>(),
        )
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Puts the detached tree onto the target, which must be a plain directory with nothing mounted on it.
fn attach(tree: BorrowedFd<'_>, target_dir: &Path) -> Result<(), WorkspaceError> {
    match rustix::fs::mkdir(target_dir, FileMode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(io_at("make", target_dir)(errno)),
    }
    let target = open_target(target_dir)?;
    let up = rustix::fs::openat(&target, c"..", OFlags::PATH | OFlags::CLOEXEC, FileMode::empty())
        .map_err(io_at("look above", target_dir))?;
    if mount_of(target.as_fd(), target_dir)?.0 != mount_of(up.as_fd(), target_dir)?.0 {
        return Err(WorkspaceError::TargetBusy { target: target_dir.to_owned() });
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(tree, c"", &target, c"", flags)
        .map_err(io_at("mount the workspace on", target_dir))
}

fn open_target(target_dir: &Path) -> Result<OwnedFd, WorkspaceError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat2(CWD, target_dir, flags, FileMode::empty(), ResolveFlags::NO_SYMLINKS)
        .map_err(io_at("open", target_dir))
}

/// Mount id, device and inode.
fn mount_of(fd: BorrowedFd<'_>, path: &Path) -> Result<(u64, (u32, u32), u64), WorkspaceError> {
    let want = StatxFlags::INO | StatxFlags::MNT_ID;
    let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, want).map_err(io_at("look at", path))?;
    Ok((stat.stx_mnt_id, (stat.stx_dev_major, stat.stx_dev_minor), stat.stx_ino))
}

/// Looks again: what is mounted on the target is the recorded directory.
fn proven(record: &WorkspaceRecord, target_dir: &Path) -> Result<(), WorkspaceError> {
    let target = open_target(target_dir)?;
    let (_, dev, ino) = mount_of(target.as_fd(), target_dir)?;
    if (dev, ino) == (record.dev, record.ino) {
        return Ok(());
    }
    Err(WorkspaceError::Moved { path: record.path.clone(), what: "mounted inode" })
}
