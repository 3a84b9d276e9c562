//! A private copy of a workspace for one cell. Where the kernel can, nothing is copied: an overlay shows the original
//! and keeps what is written in the cell's scratch space; else every file is copied there. It must never write to the
//! original, and never take more space than the scratch space has.
//!
//! In the cell's directory: `layers/lower` (the staged original), `layers/mask` (what hides parts of it), the scratch
//! space's `copy/upper` and `copy/work` or, with every file copied, `copy/tree`; and `ws`, which the cell sees.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::mask::Mask;
use super::overlay::{self, Layers};
use super::whole::{self, CopyLimits};
use super::{Scratch, WorkspaceError, io_at, stage};

const LAYERS: &str = "layers";
const LOWER: &str = "lower";
const MASK: &str = "mask";
/// Where the cell's view of a workspace is mounted.
const VIEW: &str = "ws";

/// How a copy is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// What was written lies in an upper directory; the rest is the original's.
    Overlay,
    /// Every file was copied.
    Whole,
}

/// Where what a job wrote lies on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyParts {
    /// How the copy was made.
    pub form: Form,
    /// The upper directory, or the whole tree.
    pub dir: PathBuf,
}

/// A copy that is ready to be bound into a cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copied {
    /// What to bind as the workspace.
    pub path: PathBuf,
    /// Where what is written goes.
    pub parts: CopyParts,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// How copies are made here, and why not in the better way.
pub fn form_here() -> (Form, Option<String>) {
    form_of(overlay::supported())
}

/// The same, of what the kernel said to the question. Pure.
fn form_of(supported: Result<(), String>) -> (Form, Option<String>) {
    match supported {
        Ok(()) => (Form::Overlay, None),
        Err(why) => (Form::Whole, Some(format!("workspaces are copied file by file: {why}"))),
    }
}

/// What a cell's job wrote so far into its copy of the workspace `name` (none: the primary one), as it can be found
/// again by whoever comes later. None where there is no such copy, or its scratch space is not mounted.
pub fn parts_of(cell_dir: &Path, name: Option<&str>) -> Option<CopyParts> {
    let copy = copy_dir(&cell_dir.join(super::scratch::MOUNT_POINT), name);
    let of = |form, below: &str| {
        let dir = copy.join(below);
        dir.is_dir().then_some(CopyParts { form, dir })
    };
    of(Form::Overlay, "upper").or_else(|| of(Form::Whole, "tree"))
}

fn copy_dir(scratch: &Path, name: Option<&str>) -> PathBuf {
    match name {
        None => scratch.join("copy"),
        Some(name) => scratch.join("copies").join(name),
    }
}

/// Where the original of a workspace of the cell in `cell_dir` is to be staged, to be copied or masked. Its parent is
/// made, and nobody but the daemon can enter it.
///
/// # Errors
/// [`WorkspaceError::Io`].
pub fn lower_of(cell_dir: &Path, name: Option<&str>) -> Result<PathBuf, WorkspaceError> {
    let layers = layers_of(cell_dir, name);
    private_dir(&layers)?;
    Ok(layers.join(LOWER))
}

/// What the cell sees as the workspace `name` (none: the primary one) is mounted here.
pub fn view_of(cell_dir: &Path, name: Option<&str>) -> PathBuf {
    cell_dir.join(name.map_or_else(|| VIEW.to_owned(), |name| format!("{VIEW}.{name}")))
}

fn layers_of(cell_dir: &Path, name: Option<&str>) -> PathBuf {
    cell_dir.join(name.map_or_else(|| LAYERS.to_owned(), |name| format!("{LAYERS}.{name}")))
}

/// A copy of the workspace that is staged at `lower` (or, where nothing could be mounted, of the directory that was
/// opened, `direct`), for the cell in `cell_dir` with its scratch space. What an
/// earlier attempt wrote, and the scratch space still holds, is in it. Blocks: 1 ms with an overlay, else as long as
/// copying takes.
///
/// # Errors
/// [`WorkspaceError::Copy`] where it does not fit or takes too long, [`WorkspaceError::Io`]. What was mounted is left
/// to the sweep of the cell.
pub fn copy(
    cell_dir: &Path,
    name: Option<&str>,
    scratch: &Scratch,
    source: (&Path, Option<BorrowedFd<'_>>),
    mask: &Mask,
    limits: &CopyLimits,
) -> Result<Copied, WorkspaceError> {
    copy_filled(cell_dir, name, scratch, source, mask, limits, &|_| Ok(()))
}

/// The same, with something written into it before anybody sees it: `fill` gets where, once, unless an earlier
/// attempt has had it.
///
/// # Errors
/// As [`copy`], and those of `fill`.
pub fn copy_filled(
    cell_dir: &Path,
    name: Option<&str>,
    scratch: &Scratch,
    (lower, direct): (&Path, Option<BorrowedFd<'_>>),
    mask: &Mask,
    limits: &CopyLimits,
    fill: &dyn Fn(&CopyParts) -> Result<(), WorkspaceError>,
) -> Result<Copied, WorkspaceError> {
    let dir = copy_dir(&scratch.root(), name);
    private_dir(dir.parent().filter(|_| name.is_some()).unwrap_or(&dir))?;
    private_dir(&dir)?;
    if dir.join("tree").is_dir() {
        let (path, notes) = (dir.join("tree"), Vec::new());
        return Ok(Copied { parts: CopyParts { form: Form::Whole, dir: path.clone() }, path, notes });
    }
    let again = dir.join("upper").is_dir();
    let why = match form_here() {
        (Form::Overlay, _) => match over(cell_dir, name, &dir, lower, mask, fill) {
            Ok(copied) => return Ok(copied),
            // What was written before cannot be seen without the overlay: no other copy stands in for it.
            Err(error) if again => return Err(error),
            Err(error @ WorkspaceError::CarryOver { .. }) => return Err(error),
            Err(error) => {
                forget_upper(&dir)?;
                format!("workspaces are copied file by file: {error}")
            }
        },
        (Form::Whole, why) => why.unwrap_or_default(),
    };
    let tree = dir.join("tree");
    let staged = match direct {
        Some(_) => None,
        None => Some(overlay::open_dir(lower).map_err(io_at("open", lower))?),
    };
    let source = staged.as_ref().map(AsFd::as_fd).or(direct);
    let source = source.ok_or_else(|| io_at("open", lower)(io::Error::from(io::ErrorKind::NotFound)))?;
    let done = whole::copy_tree(source, lower, &tree, mask, limits)?;
    fill(&CopyParts { form: Form::Whole, dir: tree.clone() })?;
    let mut notes = vec![why];
    notes.extend(done.notes());
    Ok(Copied { parts: CopyParts { form: Form::Whole, dir: tree.clone() }, path: tree, notes })
}

/// A view of the workspace that is staged at `lower` in which nothing can be written, with `mask` over it. Blocks.
///
/// # Errors
/// [`WorkspaceError::Overlay`] where this host cannot make one.
pub fn masked(
    cell_dir: &Path,
    name: Option<&str>,
    lower: &Path,
    mask: &Mask,
) -> Result<PathBuf, WorkspaceError> {
    let layers = Layers { lower: laid(cell_dir, name, lower, mask)?, upper: None };
    attached(cell_dir, name, &layers)
}

/// Takes off what the cell in `cell_dir`, whose processes are gone, saw as its copies; what was written stays. The sweep
/// of the cell does it too, but where the cell looked at many files it takes its time, and this can be done beside
/// other work. Blocks.
///
/// # Errors
/// The kernel's word; the sweep tries again.
pub fn unmount_views(cell_dir: &Path) -> io::Result<()> {
    super::mounts::unmount_overlays(cell_dir)
}

fn over(
    cell_dir: &Path,
    name: Option<&str>,
    dir: &Path,
    lower: &Path,
    mask: &Mask,
    fill: &dyn Fn(&CopyParts) -> Result<(), WorkspaceError>,
) -> Result<Copied, WorkspaceError> {
    let (upper, work) = (dir.join("upper"), dir.join("work"));
    let layers = laid(cell_dir, name, lower, mask)?;
    if !upper.is_dir() {
        make_upper(&upper, lower)?;
        fill(&CopyParts { form: Form::Overlay, dir: upper.clone() })?;
    }
    // Anew each time: what is left of an earlier one means nothing, and forbids to mount it again.
    whole::remove_below(dir, "work")?;
    rustix::fs::mkdir(&work, Mode::RWXU).map_err(io_at("make", &work))?;
    let path = attached(cell_dir, name, &Layers { lower: layers, upper: Some((upper.clone(), work)) })?;
    Ok(Copied { path, parts: CopyParts { form: Form::Overlay, dir: upper }, notes: Vec::new() })
}

/// The upper directory's root is what is seen as the workspace itself.
fn make_upper(upper: &Path, lower: &Path) -> Result<(), WorkspaceError> {
    rustix::fs::mkdir(upper, Mode::RWXU).map_err(io_at("make", upper))?;
    let seen = overlay::open_dir(lower).and_then(|fd| Ok(rustix::fs::fstat(fd)?));
    let seen = seen.map_err(io_at("look at", lower))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let own = rustix::fs::openat2(CWD, upper, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)
        .map_err(io_at("open", upper))?;
    overlay::look_like(own.as_fd(), &seen).map_err(io_at("give owner and mode to", upper))
}

/// Nothing was written into it yet.
fn forget_upper(dir: &Path) -> Result<(), WorkspaceError> {
    whole::remove_below(dir, "work")?;
    whole::remove_below(dir, "upper")
}

/// The layers that are only read.
fn laid(
    cell_dir: &Path,
    name: Option<&str>,
    lower: &Path,
    mask: &Mask,
) -> Result<Vec<PathBuf>, WorkspaceError> {
    if mask.is_empty() {
        return Ok(vec![lower.to_owned()]);
    }
    let at = layers_of(cell_dir, name).join(MASK);
    mask.lay(lower, &at)?;
    Ok(vec![at, lower.to_owned()])
}

fn attached(cell_dir: &Path, name: Option<&str>, layers: &Layers) -> Result<PathBuf, WorkspaceError> {
    let target = view_of(cell_dir, name);
    let tree = overlay::mount(layers).map_err(|e| WorkspaceError::Overlay(e.to_string()))?;
    stage::attach(tree.as_fd(), &target, true)?;
    Ok(target)
}

fn private_dir(dir: &Path) -> Result<(), WorkspaceError> {
    match rustix::fs::mkdir(dir, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(io_at("make", dir)(io::Error::from(errno))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_for_copying_every_file_is_told() {
        assert_eq!(form_of(Ok(())), (Form::Overlay, None));
        let (form, why) = form_of(Err("the daemon is not root".to_owned()));
        assert_eq!(form, Form::Whole);
        assert_eq!(why.as_deref(), Some("workspaces are copied file by file: the daemon is not root"));
    }
}
