//! The context of a build: a tar file of what the submitter may read and the policy does not hide. It runs with the
//! rights of whoever calls it, follows no link, enters no other mount and stops at its limits. Owners are left out.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use super::generate::OWN_DIR;
use super::ignored::Ignored;
use crate::change::TreePath;
use crate::change::hide::HideRules;
use crate::workspace::{self, Kind, LookLimits, WorkspaceError};

/// The list of what is left out.
const IGNORE_FILE: &str = ".dockerignore";
/// Longest one, in bytes.
const IGNORE_BYTES_MAX: u64 = 64 * 1024;

/// How large a context may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackLimits {
    /// Contents, in bytes.
    pub bytes_max: u64,
    /// Paths that are looked at.
    pub entries_max: usize,
    /// How long the look may take.
    pub time_max: Duration,
}

/// Why there is no context.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// Opening as the submitter.
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
    /// Its directory.
    #[error("the context {0:?} is no directory that you may read")]
    Directory(String),
    /// Too much.
    #[error("the context has more than {0}; name what is not needed in .dockerignore")]
    TooLarge(String),
    /// `.dockerignore` or the policy's `hide`.
    #[error("{0}")]
    Pattern(String),
    /// Reading or writing.
    #[error("the context cannot be packed: {0}")]
    Io(#[from] io::Error),
}

/// What is packed.
#[derive(Debug, Clone)]
pub struct Context {
    /// Its directory, below the workspace; empty: all of it.
    pub dir: String,
    /// The policy's `hide`.
    pub hide: Vec<String>,
    /// How large it may be.
    pub limits: PackLimits,
}

/// A context that is not finished yet: our own files come last.
pub struct Packed {
    builder: Builder<BufWriter<File>>,
    /// SHA-256 of paths, modes and contents, in hexadecimal.
    pub hash: String,
    /// Files in it.
    pub files: usize,
    /// Bytes of them.
    pub bytes: u64,
    /// Paths that the policy hides from it.
    pub hidden: usize,
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packed").field("hash", &self.hash).field("files", &self.files).finish_non_exhaustive()
    }
}

impl Packed {
    /// Adds files of ours and closes it. Blocks.
    ///
    /// # Errors
    /// Of the file that it is written to.
    pub fn finish(mut self, own: &[(String, Vec<u8>)]) -> io::Result<File> {
        for (name, content) in own {
            let mut header = header(EntryType::Regular, 0o644, content.len() as u64, 0);
            self.builder.append_data(&mut header, format!("{OWN_DIR}/{name}"), content.as_slice())?;
        }
        let mut writer = self.builder.into_inner()?;
        writer.flush()?;
        let mut file = writer.into_inner().map_err(io::IntoInnerError::into_error)?;
        io::Seek::rewind(&mut file)?;
        Ok(file)
    }
}

/// Packs the context below `workspace` into `file`. Blocks.
///
/// # Errors
/// [`PackError`].
pub fn pack(workspace: BorrowedFd<'_>, context: &Context, file: File) -> Result<Packed, PackError> {
    let no_directory = |_| PackError::Directory(context.dir.clone());
    let path = if context.dir.is_empty() { "." } else { context.dir.as_str() };
    let top = open(workspace, path, OFlags::DIRECTORY).map_err(no_directory)?;
    let hide = HideRules::new(&context.hide).map_err(|e| PackError::Pattern(format!("`hide`: {e}")))?;
    let ignored = match read_text(top.as_fd(), IGNORE_FILE, IGNORE_BYTES_MAX) {
        Some(text) => Ignored::parse(&text).map_err(PackError::Pattern)?,
        None => Ignored::default(),
    };
    let base = (!context.dir.is_empty()).then(|| TreePath::new(context.dir.as_bytes())).transpose();
    let base = base.map_err(|_| PackError::Directory(context.dir.clone()))?;
    let limits = &context.limits;
    let look = LookLimits { entries_max: limits.entries_max, time_max: limits.time_max };
    let enter = |path: &TreePath| {
        let text = path.as_path().to_str();
        let ignored = ignored.is_final() && text.is_some_and(|path| ignored.leaves_out(path));
        !ignored && !is_left_out(path)
    };
    let mut looked = workspace::look(top.as_fd(), &look, &enter);
    if !looked.complete {
        let most = format!(
            "{} paths, or takes more than {} s to look through",
            limits.entries_max,
            limits.time_max.as_secs()
        );
        return Err(PackError::TooLarge(most));
    }
    looked.found.sort_by(|a, b| a.path.cmp(&b.path));
    let builder = Builder::new(BufWriter::with_capacity(1 << 20, file));
    let packed = Packed { builder, hash: String::new(), files: 0, bytes: 0, hidden: 0 };
    let mut packer = Packer { packed, sum: Sha256::new(), bytes_max: limits.bytes_max };
    for found in &looked.found {
        let Some(name) = found.path.as_path().to_str().filter(|_| !is_left_out(&found.path)) else {
            continue;
        };
        // Hidden is hidden from the top of the workspace on.
        let whole = match &base {
            Some(base) => TreePath::new([base.as_bytes(), b"/", found.path.as_bytes()].concat()).ok(),
            None => Some(found.path.clone()),
        };
        if whole.is_none_or(|whole| hide.hides(&whole, found.kind == Kind::Dir)) {
            packer.packed.hidden += 1;
        } else if !ignored.leaves_out(name) {
            packer.entry(top.as_fd(), name, found.kind)?;
        }
    }
    let Packer { mut packed, sum, .. } = packer;
    packed.hash = sum.finalize().iter().map(|b| format!("{b:02x}")).collect();
    Ok(packed)
}

/// Our own directory, and what is git's: its configuration may hold credentials, which a cell is not shown either.
fn is_left_out(path: &TreePath) -> bool {
    path.parts().next() == Some(OWN_DIR.as_bytes()) || path.parts().any(|part| part == b".git")
}

struct Packer {
    packed: Packed,
    sum: Sha256,
    bytes_max: u64,
}

impl Packer {
    /// What cannot be read is left out, like in a cell.
    fn entry(&mut self, top: BorrowedFd<'_>, name: &str, kind: Kind) -> Result<(), PackError> {
        match kind {
            Kind::Dir => {
                let Ok(dir) = open(top, name, OFlags::DIRECTORY) else { return Ok(()) };
                let stat = rustix::fs::fstat(&dir).map_err(io::Error::from)?;
                self.count(name, b'd', stat.st_mode, b"");
                let mut header = header(EntryType::Directory, mode(stat.st_mode), 0, stat.st_mtime);
                self.packed.builder.append_data(&mut header, name, io::empty())?;
            }
            Kind::Link => {
                let Some(target) = link_target(top, name) else { return Ok(()) };
                self.count(name, b'l', 0, target.as_bytes());
                let mut header = header(EntryType::Symlink, 0o777, 0, 0);
                self.packed.builder.append_link(&mut header, name, &target)?;
            }
            Kind::File => self.file(top, name)?,
            Kind::Special => {}
        }
        Ok(())
    }

    fn file(&mut self, top: BorrowedFd<'_>, name: &str) -> Result<(), PackError> {
        let Ok(file) = open(top, name, OFlags::empty()) else { return Ok(()) };
        let stat = rustix::fs::fstat(&file).map_err(io::Error::from)?;
        if !FileType::from_raw_mode(stat.st_mode).is_file() {
            return Ok(());
        }
        let bytes = u64::try_from(stat.st_size).unwrap_or(0);
        self.packed.bytes = self.packed.bytes.saturating_add(bytes);
        if self.packed.bytes > self.bytes_max {
            return Err(PackError::TooLarge(format!("{} MiB", self.bytes_max >> 20)));
        }
        self.packed.files += 1;
        self.count(name, b'f', stat.st_mode, &bytes.to_le_bytes());
        let mut header = header(EntryType::Regular, mode(stat.st_mode), bytes, stat.st_mtime);
        // A file that shrinks meanwhile is filled up: what was promised has to come.
        let content = File::from(file).take(bytes).chain(io::repeat(0)).take(bytes);
        let content = Summed { inner: content, sum: &mut self.sum };
        self.packed.builder.append_data(&mut header, name, content)?;
        Ok(())
    }

    fn count(&mut self, name: &str, kind: u8, raw_mode: u32, more: &[u8]) {
        self.sum.update((name.len() as u64).to_le_bytes());
        self.sum.update(name);
        self.sum.update([kind]);
        self.sum.update(mode(raw_mode).to_le_bytes());
        self.sum.update((more.len() as u64).to_le_bytes());
        self.sum.update(more);
    }
}

/// Sums up what is read.
struct Summed<'a, R> {
    inner: R,
    sum: &'a mut Sha256,
}

impl<R: Read> Read for Summed<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.sum.update(&buffer[..count]);
        Ok(count)
    }
}

fn mode(raw: u32) -> u32 {
    raw & 0o777
}

fn open(dir: BorrowedFd<'_>, path: &str, more: OFlags) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    // NONBLOCK: a FIFO of that name must not hold the thread.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | more;
    rustix::fs::openat2(dir, path, flags, Mode::empty(), resolve)
}

/// The text of a regular file; none where there is none, or it is too long.
pub(super) fn read_text(dir: BorrowedFd<'_>, name: &str, bytes_max: u64) -> Option<String> {
    let file = open(dir, name, OFlags::empty()).ok()?;
    let stat = rustix::fs::fstat(&file).ok()?;
    if !FileType::from_raw_mode(stat.st_mode).is_file() || u64::try_from(stat.st_size).ok()? > bytes_max {
        return None;
    }
    let mut text = String::new();
    File::from(file).take(bytes_max).read_to_string(&mut text).ok()?;
    Some(text)
}

fn link_target(top: BorrowedFd<'_>, name: &str) -> Option<String> {
    let (folder, last) = name.rsplit_once('/').unwrap_or((".", name));
    let folder = open(top, folder, OFlags::DIRECTORY).ok()?;
    rustix::fs::statat(&folder, last, AtFlags::SYMLINK_NOFOLLOW).ok()?;
    rustix::fs::readlinkat(&folder, last, Vec::new()).ok()?.into_string().ok()
}

fn header(kind: EntryType, mode: u32, bytes: u64, mtime: i64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(u64::try_from(mtime).unwrap_or(0));
    header.set_size(bytes);
    header
}
