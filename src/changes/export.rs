//! A change set for other tools: as a tar archive of what is there now, as a git bundle of a commit on the job's
//! base. (As a patch: `patch`.) It must never read the workspace, nor write a set-user-id file or a device.

use std::io::{self, Read, Write};
use std::path::Path;

use super::branch::{BranchError, Build};
use super::build::{Built, build};
use super::choose::{Include, chosen};
use super::commits::Lender;
use super::only::{BadGlob, Only};
use super::shelf::{JobShelf, ShelfError};
use crate::change::{ChangeSet, Entry, Node};
use crate::git::head::Format;
use crate::git::{Bounds, Git, quote};

/// The member that names what is gone, one path a line, in quotes as git writes them.
pub const DELETED: &str = ".hotcell-deleted";

/// Why there is no export.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// A pattern is none.
    #[error(transparent)]
    Pattern(#[from] BadGlob),
    /// The contents.
    #[error(transparent)]
    Shelf(#[from] ShelfError),
    /// The commits.
    #[error(transparent)]
    Commits(#[from] BranchError),
    /// It is longer than was asked for, or nobody takes it.
    #[error("cannot write the export: {0}")]
    Write(#[from] io::Error),
}

/// Writes what is there now as a tar archive, with full permissions but the set-id bits; what is gone is named in a
/// member of its own ([`DELETED`]). Tells what is not in it. Blocks.
///
/// # Errors
/// [`ExportError`]; what was written is no archive then.
pub fn tar(
    shelf: &JobShelf,
    changes: &ChangeSet,
    include: Include,
    only: &[String],
    now_s: u64,
    out: &mut dyn Write,
) -> Result<Vec<String>, ExportError> {
    let entries = chosen(changes, include, &Only::new(only)?);
    let mut archive = tar::Builder::new(out);
    archive.mode(tar::HeaderMode::Deterministic);
    let mut notes = Vec::new();
    for entry in entries.iter().filter(|entry| entry.after.is_some()) {
        if !append(&mut archive, shelf, entry, now_s)? {
            notes.push(entry);
        }
    }
    let mut gone = Vec::new();
    for entry in entries.iter().filter(|entry| entry.after.is_none()) {
        gone.extend(quote(entry.path.as_bytes()));
        gone.push(b'\n');
    }
    let taken = |name: &str| entries.iter().any(|e| e.path.parts().next() == Some(name.as_bytes()));
    if !gone.is_empty() {
        let numbered = (1..).map(|n| format!("{DELETED}-{n}"));
        let name = std::iter::once(DELETED.to_owned()).chain(numbered).find(|name| !taken(name));
        let mut header = header(tar::EntryType::Regular, 0o644, gone.len() as u64, now_s);
        archive.append_data(&mut header, name.unwrap_or_default(), &gone[..])?;
    }
    archive.into_inner()?.flush()?;
    let what = "devices, pipes, sockets, or contents that were not kept";
    Ok(if notes.is_empty() {
        Vec::new()
    } else {
        vec![super::sparse::note(what, notes.iter().map(|entry| &entry.path))]
    })
}

/// False where it cannot be in an archive.
fn append(
    archive: &mut tar::Builder<&mut dyn Write>,
    shelf: &JobShelf,
    entry: &Entry,
    now_s: u64,
) -> Result<bool, ExportError> {
    let path = entry.path.as_path();
    match &entry.after {
        Some(Node::File { mode, blob: Some(blob), .. }) => {
            let file = shelf.blob(blob)?;
            let bytes = file.metadata()?.len();
            let mut header = header(tar::EntryType::Regular, *mode, bytes, now_s);
            archive.append_data(&mut header, path, file.take(bytes))?;
        }
        Some(Node::Dir { mode }) => {
            let mut header = header(tar::EntryType::Directory, *mode, 0, now_s);
            archive.append_data(&mut header, path, io::empty())?;
        }
        Some(Node::Symlink { target }) => {
            let mut header = header(tar::EntryType::Symlink, 0o777, 0, now_s);
            archive.append_link(&mut header, path, target.as_path())?;
        }
        Some(Node::File { blob: None, .. } | Node::Special { .. }) => return Ok(false),
        None => {}
    }
    Ok(true)
}

fn header(kind: tar::EntryType, mode: u32, bytes: u64, now_s: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode & 0o777);
    header.set_size(bytes);
    header.set_mtime(now_s);
    header.set_uid(0);
    header.set_gid(0);
    header.set_cksum();
    header
}

/// Writes a git bundle: the commits of [`super::branch::create`], below `refs/heads/hotcell/<job>`, for a repository
/// that has the commit which the job began with. Tells what is not in it. Blocks.
///
/// # Errors
/// [`ExportError`]; what was written is no bundle then.
pub fn bundle(wanted: &Build<'_>, out: &mut dyn Write) -> Result<Vec<String>, ExportError> {
    let lender = Lender::find(wanted.path, wanted.identity).map_err(BranchError::from)?;
    let git = lender.git(wanted.temporary, wanted.identity).map_err(BranchError::from)?;
    let made = write_bundle(&git, &lender, wanted, out);
    let destroyed = git.destroy().map_err(BranchError::from);
    let notes = made?;
    destroyed?;
    Ok(notes)
}

fn write_bundle(
    git: &Git,
    lender: &Lender,
    wanted: &Build<'_>,
    out: &mut dyn Write,
) -> Result<Vec<String>, ExportError> {
    let Built { base, tip, notes } = build(git, lender, wanted).map_err(BranchError::from)?;
    let begin = match lender.format {
        Format::Sha1 => "# v2 git bundle\n",
        Format::Sha256 => "# v3 git bundle\n@object-format=sha256\n",
    };
    write!(out, "{begin}-{base} \n{tip} refs/heads/hotcell/{}\n\n", wanted.job)?;
    let mut feed = |to: &mut dyn Write| writeln!(to, "{tip}\n^{base}");
    let args = ["pack-objects", "--revs", "--thin", "--stdout", "--quiet", "--delta-base-offset"];
    let bounds = Bounds { output_bytes_max: u64::MAX, ..Bounds::default() };
    git.run(&args, Some(&mut feed), out, &bounds).map_err(BranchError::from)?;
    Ok(notes)
}

/// Where temporary repositories are made, if nobody says otherwise.
pub fn temporary() -> &'static Path {
    static PLACE: std::sync::OnceLock<std::path::PathBuf> = std::sync::OnceLock::new();
    PLACE.get_or_init(crate::git::temporary)
}

#[cfg(test)]
#[path = "export/tests.rs"]
mod tests;
