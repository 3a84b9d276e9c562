//! Writes tar files for the engine: entries owned by root, with fixed times and the modes we say. Blocking.
//!
//! Never reads an owner, a mode or a link from the machine's files: what goes in is what the caller names.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use tar::{Builder, EntryType, Header};

pub(super) struct TarWriter {
    builder: Builder<BufWriter<File>>,
}

impl TarWriter {
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        Ok(Self { builder: Builder::new(BufWriter::with_capacity(1 << 20, File::create_new(path)?)) })
    }

    pub(super) fn dir(&mut self, name: &str) -> io::Result<()> {
        let mut header = header(EntryType::Directory, 0o755, 0);
        self.builder.append_data(&mut header, name, io::empty())
    }

    pub(super) fn text(&mut self, name: &str, content: &str, mode: u32) -> io::Result<()> {
        let mut header = header(EntryType::Regular, mode, content.len() as u64);
        self.builder.append_data(&mut header, name, content.as_bytes())
    }

    pub(super) fn file(&mut self, name: &str, from: &Path, mode: u32) -> io::Result<()> {
        let file = File::open(from)?;
        let mut header = header(EntryType::Regular, mode, file.metadata()?.len());
        self.builder.append_data(&mut header, name, file)
    }

    pub(super) fn link(&mut self, name: &str, target: &str) -> io::Result<()> {
        let mut header = header(EntryType::Symlink, 0o777, 0);
        self.builder.append_link(&mut header, name, target)
    }

    /// All plain files below `from`, under `name`; executable ones stay so. In sorted order.
    pub(super) fn tree(&mut self, name: &str, from: &Path) -> io::Result<()> {
        use std::os::unix::fs::PermissionsExt;
        self.dir(name)?;
        let mut entries = std::fs::read_dir(from)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let below = format!("{name}/{}", entry.file_name().to_string_lossy());
            let kind = entry.file_type()?;
            if kind.is_dir() {
                self.tree(&below, &entry.path())?;
            } else if kind.is_file() {
                let executable = entry.metadata()?.permissions().mode() & 0o111 != 0;
                self.file(&below, &entry.path(), if executable { 0o755 } else { 0o644 })?;
            }
        }
        Ok(())
    }

    pub(super) fn finish(self) -> io::Result<()> {
        self.builder.into_inner()?.flush()
    }
}

fn header(kind: EntryType, mode: u32, bytes: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header.set_size(bytes);
    header
}
