//! The workspace as a job left it, in a new directory of the submitter's: a copy of the original as it is now, and over
//! it what the job changed. Made with the submitter's rights, beside its place, and put there whole; nothing is left
//! where that fails. It must never write into a directory that holds something.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, RenameFlags, Timespec, Timestamps};
use rustix::io::Errno;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::carry::{Carrier, Kind};
use super::look::{Now, Root, What, now};
use super::select::select;
use super::stage::fresh_name;
use super::unfinished::{Line, Making, closed_in, move_up, note_name, remove, told};
use super::{APPLY_TIME_MAX, ApplyError, LeftOut, Step, Wish, at};
use crate::change::{ChangeSet, Entry, TreePath};
use crate::changes::JobShelf;
use crate::changes::note::Note;
use crate::job::Identity;
use crate::workspace::as_submitter;

/// What is checked out whereto.
#[derive(Debug)]
pub struct Checkout<'a> {
    /// Where the contents are.
    pub shelf: &'a JobShelf,
    /// What the job changed.
    pub changes: &'a ChangeSet,
    /// The original, opened by the submitter; none where the job began with nothing.
    pub original: Option<OwnedFd>,
    /// Its path, for messages.
    pub original_path: &'a Path,
    /// Whereto: absolute; must not be there, or be an empty directory.
    pub dir: &'a Path,
    /// The submitter.
    pub identity: &'a Identity,
}

/// What was checked out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CheckedOut {
    /// Paths that were copied.
    pub copied: u64,
    /// Paths that the job changed.
    pub changed: u64,
    /// Paths that are not as the job left them, and why.
    pub left_out: Vec<LeftOut>,
}

/// Makes the directory. What the policy flags is in it, what it refuses is not. Blocks, for half an hour at most.
///
/// # Errors
/// [`ApplyError::Occupied`]; [`ApplyError`]: nothing is there then that was not there before.
pub fn checkout(checkout: &Checkout<'_>) -> Result<CheckedOut, ApplyError> {
    stepwise(checkout, Arc::new(|| Ok(())))
}

pub(super) fn stepwise(checkout: &Checkout<'_>, step: Step) -> Result<CheckedOut, ApplyError> {
    let wish = Wish { include_flagged: true, ..Wish::default() };
    let selection = match select(checkout.changes, &wish) {
        Ok(selection) => selection,
        Err(ApplyError::Nothing { .. }) => super::select::Selection::default(),
        Err(error) => return Err(error),
    };
    let blobs = checkout.shelf.blobs_dir()?;
    let original = checkout.original.as_ref().map(OwnedFd::try_clone).transpose();
    let original = original.map_err(at("open", checkout.original_path))?;
    let original = original.map(|fd| Root { fd, path: checkout.original_path.to_owned() });
    let dir = checkout.dir.to_owned();
    let name = fresh_name().map_err(at("name a directory beside", checkout.dir))?;
    let making = Making { identity: checkout.identity.clone(), dir: dir.clone(), name: name.clone() };
    let line = Line::Making(making.clone());
    let mut note = Note::begin(checkout.shelf, &note_name(&name), &line).map_err(told)?;
    let work = Work {
        blobs,
        original,
        entries: selection.chosen,
        closed: selection.closed.into_keys().collect(),
        step,
    };
    let made = as_submitter::<_, ApplyError>(checkout.identity, checkout.dir, APPLY_TIME_MAX, move || {
        let done = work.into_place(&dir, &making.name, &mut note);
        Ok((note, done))
    });
    let mut done = match made {
        Ok((note, done)) => {
            note.end().map_err(told)?;
            done?
        }
        Err(error) => {
            Note::end_if_free(checkout.shelf, &note_name(&name)).map_err(told)?;
            return Err(error);
        }
    };
    done.left_out.extend(selection.left_out);
    done.left_out.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(done)
}

struct Work {
    blobs: OwnedFd,
    original: Option<Root>,
    entries: BTreeMap<TreePath, Entry>,
    closed: Vec<TreePath>,
    step: Step,
}

impl Work {
    /// Fills a directory beside `dir` and renames it. Where the submitter can make none there, and `dir` is an empty
    /// directory of theirs, one in it, whose entries move up.
    fn into_place(self, dir: &Path, name: &str, note: &mut Note) -> Result<CheckedOut, ApplyError> {
        let (Some(above), Some(last)) = (dir.parent(), dir.file_name()) else {
            return Err(ApplyError::Occupied { path: dir.to_owned() });
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let above_fd = rustix::fs::openat(CWD, above, flags, Mode::empty()).map_err(at("open", above))?;
        let above = Root { fd: above_fd, path: above.to_owned() };
        let there = existing(&above, last, dir)?;
        self.step(dir)?;
        match rustix::fs::mkdirat(&above.fd, name, Mode::RWXU) {
            Ok(()) => self.filled(&above, name, dir, |made, mode| {
                let mode = there.as_ref().map_or(mode, |there| there.mode);
                super::look::chmod(made, mode).map_err(at("set the mode of", dir))?;
                self.step(dir)?;
                let placed = match there {
                    Some(_) => rustix::fs::renameat(&above.fd, name, &above.fd, last),
                    None => {
                        let flags = RenameFlags::NOREPLACE;
                        rustix::fs::renameat_with(&above.fd, name, &above.fd, last, flags)
                    }
                };
                placed.map_err(|errno| match errno {
                    Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR => {
                        ApplyError::Occupied { path: dir.to_owned() }
                    }
                    errno => at("make", dir)(errno),
                })
            }),
            Err(Errno::ACCESS | Errno::PERM) if there.is_some() => {
                let flags = OFlags::PATH | OFlags::DIRECTORY;
                let fd = above.open(Path::new(last), flags).map_err(at("open", dir))?;
                let here = Root { fd, path: dir.to_owned() };
                rustix::fs::mkdirat(&here.fd, name, Mode::RWXU).map_err(at("make a directory in", dir))?;
                self.filled(&here, name, dir, |made, _| {
                    self.step(dir)?;
                    let closed = closed_in(made).map_err(at("look at", dir))?;
                    note.add(&Line::Whole(closed.clone())).map_err(at("note what is made of", dir))?;
                    move_up(&here, made, name, &closed, &self.step)
                })
            }
            Err(errno) => Err(at("make a directory beside", dir)(errno)),
        }
    }

    fn step(&self, dir: &Path) -> Result<(), ApplyError> {
        (self.step)().map_err(at("write in", dir))
    }

    /// Fills the directory `name` and has it placed, with the mode that the original has; or removes it.
    fn filled(
        &self,
        holder: &Root,
        name: &str,
        dir: &Path,
        place: impl FnOnce(&OwnedFd, u32) -> Result<(), ApplyError>,
    ) -> Result<CheckedOut, ApplyError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let fd = holder.open(Path::new(name), flags).map_err(at("open", dir))?;
        let root = Root { fd, path: dir.to_owned() };
        let placed = self.fill(&root).and_then(|(done, mode)| place(&root.fd, mode).map(|()| done));
        if placed.is_err()
            && let Err(error) = remove(holder, &root.fd, name)
        {
            tracing::warn!(dir = %holder.path.join(name).display(), %error, "a failed checkout is left");
        }
        placed
    }

    fn fill(&self, root: &Root) -> Result<(CheckedOut, u32), ApplyError> {
        let mut carrier = Carrier::new(root, &self.blobs, Kind::Tree);
        carrier.closed.extend(self.closed.iter().cloned());
        let mut done = CheckedOut { changed: self.entries.len() as u64, ..CheckedOut::default() };
        let mut mode = 0o755;
        if let Some(original) = &self.original {
            let own = now(&root.fd).map_err(at("look at", &root.path))?.print.ino;
            mode = now(&original.fd).map_err(at("look at", &original.path))?.mode;
            done.copied = copy_tree(original, root, own, &mut carrier, &self.step)?;
        }
        let carried = carrier.carry(&self.entries).and_then(|()| carrier.finish());
        carried.map_err(|(path, error)| at("write", &path)(error))?;
        done.left_out = carrier.left_out;
        Ok((done, mode))
    }
}

/// The directory that is there; it must be empty.
fn existing(holder: &Root, name: &OsStr, dir: &Path) -> Result<Option<Now>, ApplyError> {
    let occupied = || ApplyError::Occupied { path: dir.to_owned() };
    let fd = match holder.open(Path::new(name), OFlags::PATH) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(at("look at", dir)(errno)),
    };
    let there = now(&fd).map_err(at("look at", dir))?;
    if there.what != What::Dir {
        return Err(occupied());
    }
    let names = holder.list(Path::new(name)).map_err(at("list", dir))?;
    if names.is_empty() { Ok(Some(there)) } else { Err(occupied()) }
}

/// Copies everything in `from` but `not` (an inode: the copy itself). Gives how many paths.
fn copy_tree(
    from: &Root,
    to: &Root,
    not: u64,
    carrier: &mut Carrier<'_>,
    step: &Step,
) -> Result<u64, ApplyError> {
    let (mut todo, mut copied) = (vec![None::<TreePath>], 0);
    while let Some(below) = todo.pop() {
        let dir = below.as_ref().map_or(Path::new("."), TreePath::as_path);
        let names = match from.list(dir) {
            Ok(names) => names,
            Err(error) => match &below {
                Some(path) if error.raw_os_error() == Some(libc::EACCES) => {
                    carrier
                        .left_out
                        .push(LeftOut { path: path.clone(), why: "you may not list it".to_owned() });
                    continue;
                }
                _ => return Err(at("list", &from.path.join(dir))(error)),
            },
        };
        for name in names {
            let path = match &below {
                Some(dir) => dir.join(name.to_bytes()),
                None => TreePath::new(name.to_bytes()),
            };
            let long = |error| at("copy", &from.path.join(dir))(io::Error::other(error));
            let path = path.map_err(long)?;
            step().map_err(at("copy", &from.path.join(path.as_path())))?;
            match copy_one(from, to, &path, not, carrier) {
                Ok(None) => {}
                Ok(Some(is_dir)) => {
                    copied += 1;
                    if is_dir {
                        todo.push(Some(path));
                    }
                }
                Err(error) => match error.raw_os_error() {
                    // Gone meanwhile, or not the submitter's to read.
                    Some(libc::ENOENT) => {}
                    Some(libc::EACCES | libc::EPERM) => {
                        carrier.left_out.push(LeftOut { path, why: "you may not read it".to_owned() });
                    }
                    Some(libc::EXDEV) => {
                        carrier.left_out.push(LeftOut { path, why: "another mount is there".to_owned() });
                    }
                    _ => return Err(at("copy", &from.path.join(path.as_path()))(error)),
                },
            }
        }
    }
    Ok(copied)
}

/// Whether it was copied, and is a directory to go into.
fn copy_one(
    from: &Root,
    to: &Root,
    path: &TreePath,
    not: u64,
    carrier: &mut Carrier<'_>,
) -> io::Result<Option<bool>> {
    let found = from.open(path.as_path(), OFlags::PATH)?;
    let there = now(&found)?;
    let (dir, name): (OwnedFd, CString) = to.parent(path)?;
    match &there.what {
        What::Dir if there.print.ino == not => return Ok(None),
        What::Dir => {
            rustix::fs::mkdirat(&dir, &name, Mode::RWXU)?;
            carrier.modes.insert(path.clone(), there.mode);
            return Ok(Some(true));
        }
        What::Link(target) => rustix::fs::symlinkat(target.as_path(), &dir, &name)?,
        What::File => {
            let mut source = from.read(path, &there.print)?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut file =
                std::fs::File::from(rustix::fs::openat(&dir, &name, flags, Mode::RUSR | Mode::WUSR)?);
            if rustix::fs::ioctl_ficlone(&file, &source).is_err() {
                io::copy(&mut source, &mut file)?;
            }
            rustix::fs::fchmod(&file, Mode::from_raw_mode(there.mode & 0o777))?;
            let time = |ns: i128| Timespec {
                tv_sec: ns.div_euclid(1_000_000_000) as i64,
                tv_nsec: ns.rem_euclid(1_000_000_000) as i64,
            };
            let last_modification = time(there.print.mtime_ns);
            let times = Timestamps { last_access: last_modification, last_modification };
            rustix::fs::futimens(&file, &times)?;
        }
        What::Special(_) => {
            let why = "a device, FIFO or socket is not copied".to_owned();
            carrier.left_out.push(LeftOut { path: path.clone(), why });
            return Ok(None);
        }
    }
    Ok(Some(false))
}
