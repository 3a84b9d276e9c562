//! Stages a checked workspace for one cell: a private, non-recursive clone of the mount at exactly the
//! opened directory, nosuid and nodev, with the submitter's ids shown as the cell's, on a directory that
//! only the daemon can reach. Must never mount by path, and never show nested mounts.
//!
//! The order is clone, attributes, attach: nothing half-made is ever visible under the target. Writable parts
//! of a workspace that is read-only otherwise are mounts beside it, on names of the daemon's own; the engine
//! puts them together in the cell. On the host nobody meets a mount point in a directory of theirs.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode as FileMode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

use super::mounts::{self, Unmounted};
use super::protect::GUARDS_MAX;
use super::writable::{self, PARTS_MAX, Part, StagedPart};
use super::{WorkspaceError, WorkspaceRecord, idmap, io_at, peer};
use crate::job::Identity;

/// Whether the job may change the workspace in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode<'a> {
    /// Reads and writes go to the user's own files.
    Bind,
    /// The same for these paths below the workspace; the rest cannot be changed.
    Partly(&'a [PathBuf]),
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
    read_only: bool,
    parts: Vec<StagedPart>,
    guards: Vec<StagedPart>,
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
    mode: Mode<'_>,
    target_dir: &Path,
) -> Result<Staged, WorkspaceError> {
    stage_guarded(dir, record, ids, mode, &[], target_dir)
}

/// The same with `guards`: paths below the workspace that are to be mounts of their own, each read-only or not. They
/// are in [`Staged::guards`], to be bound over the workspace.
///
/// # Errors
/// As [`stage`].
pub fn stage_guarded(
    dir: &OwnedFd,
    record: &WorkspaceRecord,
    ids: &CellIds<'_>,
    mode: Mode<'_>,
    guards: &[(PathBuf, bool)],
    target_dir: &Path,
) -> Result<Staged, WorkspaceError> {
    peer::same_directory(dir.as_fd(), record)?;
    let guards = writable::open_guards(ids.submitter, record, dir, guards)?;
    let parts = match mode {
        Mode::Partly(paths) => writable::open_all(ids.submitter, record, dir, paths)?,
        Mode::Bind | Mode::ReadOnly => Vec::new(),
    };
    let read_only = mode != Mode::Bind;
    if !rustix::process::geteuid().is_root() {
        return direct(record, ids.submitter, read_only, parts, guards);
    }
    let (uid_map, gid_map, groups) = maps(ids)?;
    let tree = clone_of(dir.as_fd(), &record.path, read_only)?;
    let mapped = if ids.runtime_maps_ids {
        idmap::user_namespace(&uid_map, &gid_map).map_err(|e| format!("no user namespace: {e}")).and_then(
            |ns| match map_ids(tree.as_fd(), &ns) {
                Ok(()) => Ok(ns),
                Err(e) => Err(format!("no id-mapped mount: {e}")),
            },
        )
    } else {
        Err("the cell's runtime cannot use id-mapped mounts".to_owned())
    };
    let (namespace, (ids, note)) = match mapped {
        Ok(ns) => {
            let ids = StagedIds::Private { uid: ids.cell_uid, gid: ids.cell_gid, groups: groups.0 };
            (Some(ns), (ids, groups.1))
        }
        Err(why) => (None, unmapped_ids(record, ids.submitter, why)?),
    };
    attach(tree.as_fd(), target_dir, true)?;
    let path = target_dir.to_owned();
    let (parts_open, guards_open) = (parts, guards);
    let (parts, guards) = (Vec::new(), Vec::new());
    let mut staged = Staged { path, ids, note, mounted: true, read_only, parts, guards };
    let rest = proven((record.dev, record.ino), &record.path, target_dir, true)
        .and_then(|()| staged.attach_parts(parts_open, guards_open, namespace.as_ref()));
    match rest {
        Ok(()) => Ok(staged),
        Err(error) => {
            staged.destroy()?;
            Err(error)
        }
    }
}

/// Shows the file `source`, which is root's, on `target` as one of `owner`, read-only: so a runtime that has to
/// read a program to execute it can do so, and nobody else on the host gains anything. Blocks.
///
/// # Errors
/// [`WorkspaceError::Io`] where the file system of `source` cannot map ids. Nothing stays mounted.
pub fn stage_program(source: &Path, owner: (u32, u32), target: &Path) -> Result<(), WorkspaceError> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::openat(CWD, source, flags, FileMode::empty()).map_err(io_at("open", source))?;
    let tree = clone_of(file.as_fd(), source, true)?;
    let (uid_map, gid_map) = (format!("0 {} 1\n", owner.0), format!("0 {} 1\n", owner.1));
    let namespace = idmap::user_namespace(&uid_map, &gid_map).map_err(io_at("make an id map for", source))?;
    map_ids(tree.as_fd(), &namespace).map_err(io_at("map the ids of", source))?;
    attach(tree.as_fd(), target, false)
}

/// A detached clone of the mount at exactly `fd`.
fn clone_of(fd: BorrowedFd<'_>, path: &Path, read_only: bool) -> Result<OwnedFd, WorkspaceError> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = rustix::mount::open_tree(fd, c"", flags).map_err(io_at("clone the mount of", path))?;
    set_attributes(tree.as_fd(), read_only).map_err(io_at("restrict the mount of", path))?;
    Ok(tree)
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
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(io_at("remove", target_dir)(errno)),
    }
    for number in 0..PARTS_MAX + GUARDS_MAX {
        let target = part_target(target_dir, number);
        let Ok(meta) = std::fs::symlink_metadata(&target) else { return Ok(()) };
        mounts::unmount(&target).map_err(|_| WorkspaceError::StillMounted { path: target.clone() })?;
        // What is under the mount is an empty directory or an empty file.
        let removed = if meta.is_dir() { rustix::fs::rmdir(&target) } else { rustix::fs::unlink(&target) };
        removed.map_err(io_at("remove", &target))?;
    }
    Ok(())
}

/// Where part `number` is mounted: beside the workspace.
fn part_target(target_dir: &Path, number: usize) -> PathBuf {
    let mut name = target_dir.file_name().unwrap_or_default().to_owned();
    name.push(format!("-{number}"));
    target_dir.with_file_name(name)
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

    /// What can be written of a workspace that is read-only otherwise: to be bound over it.
    pub fn parts(&self) -> &[StagedPart] {
        &self.parts
    }

    /// What is protected of a workspace that can be written otherwise: to be bound over it.
    pub fn guards(&self) -> &[StagedPart] {
        &self.guards
    }

    /// Whether the engine has to make it read-only: it is to be, and there is no mount of ours that is.
    pub fn wants_read_only(&self) -> bool {
        self.read_only && !self.mounted
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

    fn attach_parts(
        &mut self,
        parts: Vec<Part>,
        guards: Vec<Part>,
        map: Option<&OwnedFd>,
    ) -> Result<(), WorkspaceError> {
        for part in parts {
            let staged = self.attach_part(part, map)?;
            self.parts.push(staged);
        }
        for guard in guards {
            let staged = self.attach_part(guard, map)?;
            self.guards.push(staged);
        }
        Ok(())
    }

    fn attach_part(&self, part: Part, map: Option<&OwnedFd>) -> Result<StagedPart, WorkspaceError> {
        let tree = clone_of(part.fd.as_fd(), &part.below, part.read_only)?;
        if let Some(map) = map {
            map_ids(tree.as_fd(), map).map_err(io_at("map the ids of", &part.below))?;
        }
        let (_, dev, ino) = mount_of(part.fd.as_fd(), &part.below)?;
        let path = part_target(&self.path, self.parts.len() + self.guards.len());
        attach(tree.as_fd(), &path, part.is_dir)?;
        proven((dev, ino), &part.below, &path, part.is_dir)?;
        Ok(StagedPart { path, below: part.below, is_dir: part.is_dir, wants_read_only: false })
    }
}

fn direct(
    record: &WorkspaceRecord,
    submitter: &Identity,
    read_only: bool,
    parts: Vec<Part>,
    guards: Vec<Part>,
) -> Result<Staged, WorkspaceError> {
    let own_uid = rustix::process::geteuid().as_raw();
    if submitter.uid != own_uid {
        return Err(WorkspaceError::CannotSwitch { uid: submitter.uid, own_uid });
    }
    let why = "the daemon is not root".to_owned();
    let (ids, note) = unmapped_ids(record, submitter, why)?;
    let staged = |part: Part| StagedPart {
        path: record.path.join(&part.below),
        below: part.below,
        is_dir: part.is_dir,
        wants_read_only: part.read_only,
    };
    let parts = parts.into_iter().map(staged).collect();
    let guards = guards.into_iter().map(staged).collect();
    Ok(Staged { path: record.path.clone(), ids, note, mounted: false, read_only, parts, guards })
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

fn set_attributes(tree: BorrowedFd<'_>, read_only: bool) -> io::Result<()> {
    let read_only = if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
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

/// Puts the detached tree onto the target, which is made where it is missing and must have nothing mounted on it.
pub(super) fn attach(tree: BorrowedFd<'_>, target: &Path, is_dir: bool) -> Result<(), WorkspaceError> {
    let made = if is_dir {
        rustix::fs::mkdir(target, FileMode::RWXU)
    } else {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        rustix::fs::openat(CWD, target, flags, FileMode::RUSR | FileMode::WUSR).map(drop)
    };
    match made {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(io_at("make", target)(errno)),
    }
    let point = open_target(target, is_dir)?;
    // The directory that holds it: `target` lies in one that only the daemon can enter.
    let up = open_target(target.parent().unwrap_or(target), true)?;
    if mount_of(point.as_fd(), target)?.0 != mount_of(up.as_fd(), target)?.0 {
        return Err(WorkspaceError::TargetBusy { target: target.to_owned() });
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(tree, c"", &point, c"", flags).map_err(io_at("mount the workspace on", target))
}

fn open_target(target: &Path, is_dir: bool) -> Result<OwnedFd, WorkspaceError> {
    let kind = if is_dir { OFlags::DIRECTORY } else { OFlags::empty() };
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC | kind;
    rustix::fs::openat2(CWD, target, flags, FileMode::empty(), ResolveFlags::NO_SYMLINKS)
        .map_err(io_at("open", target))
}

/// Mount id, device and inode.
fn mount_of(fd: BorrowedFd<'_>, path: &Path) -> Result<(u64, (u32, u32), u64), WorkspaceError> {
    let want = StatxFlags::INO | StatxFlags::MNT_ID;
    let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, want).map_err(io_at("look at", path))?;
    Ok((stat.stx_mnt_id, (stat.stx_dev_major, stat.stx_dev_minor), stat.stx_ino))
}

/// Looks again: what is mounted on the target is what was opened.
fn proven(opened: ((u32, u32), u64), path: &Path, target: &Path, is_dir: bool) -> Result<(), WorkspaceError> {
    let point = open_target(target, is_dir)?;
    let (_, dev, ino) = mount_of(point.as_fd(), target)?;
    if (dev, ino) == opened {
        return Ok(());
    }
    Err(WorkspaceError::Moved { path: path.to_owned(), what: "mounted inode" })
}
