//! What a cell does not see of a workspace, or sees differently: a layer of its own over it, with holes for what is
//! hidden and files of ours in place of others. It must never write into the workspace, never show less of a path's
//! protection than the workspace itself (owners and modes of what lies above are the same), and never follow a link.

use std::collections::HashSet;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::{WorkspaceError, io_at, overlay};
use crate::change::TreePath;
use crate::change::hide::HideRules;

/// Most paths that are hidden one by one; what lies below a hidden directory does not count.
pub const HIDDEN_MAX: usize = 20_000;

/// Mode of a file that the workspace itself has not.
pub(super) const MADE_MODE: u32 = 0o644;

/// One path that is not to be seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hidden {
    /// Where, below the workspace.
    pub path: TreePath,
    /// Whether it is a directory, with everything below it.
    pub is_dir: bool,
}

/// One file that is to be seen with another content.
#[derive(Clone, PartialEq, Eq)]
pub struct Replaced {
    /// Where, below the workspace.
    pub path: TreePath,
    /// What stands in it.
    pub content: Vec<u8>,
    /// It is to be seen where the workspace has no such file too, as long as it has its directory.
    pub made: bool,
}

impl std::fmt::Debug for Replaced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replaced").field("path", &self.path).finish_non_exhaustive()
    }
}

/// All of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mask {
    /// Not to be seen.
    pub hidden: Vec<Hidden>,
    /// To be seen differently.
    pub replaced: Vec<Replaced>,
}

impl Mask {
    /// Everything is to be seen as it is.
    pub fn is_empty(&self) -> bool {
        self.hidden.is_empty() && self.replaced.is_empty()
    }

    /// Which of `entries` (paths, and whether each is a directory; a directory before what is below it) `rules` hide:
    /// the topmost ones only. Pure.
    ///
    /// # Errors
    /// The number of paths, where it is above [`HIDDEN_MAX`].
    pub fn hidden_of<'a>(
        entries: impl Iterator<Item = (&'a TreePath, bool)>,
        rules: &HideRules,
    ) -> Result<Vec<Hidden>, usize> {
        let mut hidden: Vec<Hidden> = Vec::new();
        if rules.is_empty() {
            return Ok(hidden);
        }
        let mut directories: HashSet<&[u8]> = HashSet::new();
        for (path, is_dir) in entries {
            if !rules.hides_here(path, is_dir) || is_below(path, &directories) {
                continue;
            }
            if is_dir {
                directories.insert(path.as_bytes());
            }
            hidden.push(Hidden { path: path.clone(), is_dir });
        }
        if hidden.len() > HIDDEN_MAX { Err(hidden.len()) } else { Ok(hidden) }
    }

    /// Makes the layer in `at`, which is made too, for a workspace that is to be seen as `lower`. Blocks.
    pub(super) fn lay(&self, lower: &Path, at: &Path) -> Result<(), WorkspaceError> {
        rustix::fs::mkdir(at, Mode::RWXU).map_err(io_at("make", at))?;
        let mut layer = Layer {
            lower: overlay::open_dir(lower).map_err(io_at("open", lower))?,
            own: overlay::open_dir(at).map_err(io_at("open", at))?,
            made: HashSet::new(),
            looks: Vec::new(),
            at: at.to_owned(),
        };
        layer.directory(Path::new("."))?;
        for hidden in &self.hidden {
            layer.hole(hidden.path.as_path())?;
        }
        for replaced in &self.replaced {
            layer.file(replaced)?;
        }
        layer.finish()
    }
}

fn is_below(path: &TreePath, directories: &HashSet<&[u8]>) -> bool {
    let bytes = path.as_bytes();
    let slashes = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'/');
    !directories.is_empty() && slashes.into_iter().any(|(at, _)| directories.contains(&bytes[..at]))
}

/// A layer in the making.
struct Layer {
    lower: OwnedFd,
    own: OwnedFd,
    made: HashSet<PathBuf>,
    /// Directories and what they have to look like: given at the end, since what is made in them changes their times.
    looks: Vec<(OwnedFd, rustix::fs::Stat)>,
    at: PathBuf,
}

impl Layer {
    /// Makes the directory `below` with all above it; false where the workspace has no such directory (any more).
    fn directory(&mut self, below: &Path) -> Result<bool, WorkspaceError> {
        if self.made.contains(below) {
            return Ok(true);
        }
        if let Some(parent) = below.parent().filter(|p| !p.as_os_str().is_empty())
            && !self.directory(parent)?
        {
            return Ok(false);
        }
        let Some(stat) = self.seen(below)? else { return Ok(false) };
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Ok(false);
        }
        if below != Path::new(".") {
            match rustix::fs::mkdirat(&self.own, below, Mode::RWXU) {
                Ok(()) => {}
                // A hole is there, or a file of ours: what is above is not to be seen at all.
                Err(Errno::EXIST | Errno::NOTDIR) => return Ok(false),
                Err(errno) => return Err(io_at("make", &self.at.join(below))(errno)),
            }
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat2(&self.own, below, flags, Mode::empty(), resolve())
            .map_err(io_at("open", &self.at.join(below)))?;
        self.looks.push((fd, stat));
        self.made.insert(below.to_owned());
        Ok(true)
    }

    /// What the workspace has at `below`; none where there is nothing, or no way there without a link.
    fn seen(&self, below: &Path) -> Result<Option<rustix::fs::Stat>, WorkspaceError> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let found = rustix::fs::openat2(&self.lower, below, flags, Mode::empty(), resolve());
        match found.and_then(rustix::fs::fstat) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => Ok(None),
            Err(errno) => Err(io_at("look at", &self.at.join(below))(errno)),
        }
    }

    fn hole(&mut self, below: &Path) -> Result<(), WorkspaceError> {
        if !self.directory(below.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))? {
            return Ok(());
        }
        match rustix::fs::mknodat(&self.own, below, FileType::CharacterDevice, Mode::empty(), 0) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(io_at("hide", &self.at.join(below))(errno)),
        }
    }

    fn file(&mut self, replaced: &Replaced) -> Result<(), WorkspaceError> {
        let below = replaced.path.as_path();
        if !self.directory(below.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))? {
            return Ok(());
        }
        let stat = match self.seen(below)? {
            Some(stat) => stat,
            None if replaced.made => {
                // The directory's owner, and a file's mode.
                let up = below.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
                let Some(mut stat) = self.seen(up)? else { return Ok(()) };
                stat.st_mode = FileType::RegularFile.as_raw_mode() | MADE_MODE;
                stat
            }
            None => return Ok(()),
        };
        let at = self.at.join(below);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&self.own, below, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => file,
            // It is hidden.
            Err(Errno::EXIST) => return Ok(()),
            Err(errno) => return Err(io_at("write", &at)(errno)),
        };
        let mut file = std::fs::File::from(file);
        file.write_all(&replaced.content).map_err(io_at("write", &at))?;
        overlay::look_like(file.as_fd(), &stat).map_err(io_at("write", &at))
    }

    fn finish(self) -> Result<(), WorkspaceError> {
        // The deepest first: nothing changes the times of what is above any more then.
        for (fd, stat) in self.looks.iter().rev() {
            overlay::look_like(fd.as_fd(), stat).map_err(io_at("give owner and mode to", &self.at))?;
        }
        Ok(())
    }
}

fn resolve() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV
}

/// An empty directory and an empty file that nobody can read or write: what covers a path where no layer can.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Covers {
    /// The directory.
    pub dir: PathBuf,
    /// The file.
    pub file: PathBuf,
}

impl Covers {
    /// Makes them in `at`, a directory of the daemon's own. Blocks.
    ///
    /// # Errors
    /// [`WorkspaceError::Io`].
    pub fn make(at: &Path) -> Result<Self, WorkspaceError> {
        let (dir, file) = (at.join("nothing.d"), at.join("nothing"));
        match rustix::fs::mkdir(&dir, Mode::empty()) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(io_at("make", &dir)(errno)),
        }
        let flags = OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(CWD, &file, flags, Mode::empty()).map_err(io_at("make", &file))?;
        Ok(Self { dir, file })
    }

    /// A file with `content`, number `number`, that everybody can read, in the same directory.
    ///
    /// # Errors
    /// [`WorkspaceError::Io`].
    pub fn file(at: &Path, number: usize, content: &[u8]) -> Result<PathBuf, WorkspaceError> {
        let path = at.join(format!("instead-{number}"));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(CWD, &path, flags, Mode::RUSR).map_err(io_at("make", &path))?;
        // Whatever the umask is.
        rustix::fs::fchmod(&file, Mode::RUSR | Mode::RGRP | Mode::ROTH).map_err(io_at("make", &path))?;
        std::fs::File::from(file).write_all(content).map_err(io_at("write", &path))?;
        Ok(path)
    }

    /// Which of them covers a path.
    pub fn of(&self, is_dir: bool) -> &Path {
        if is_dir { &self.dir } else { &self.file }
    }
}
