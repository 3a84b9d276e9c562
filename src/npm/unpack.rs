//! Unpacks chosen files of an npm archive into an empty directory.
//!
//! Never writes outside that directory, never makes a link, a device or a set-id file, never more bytes or files
//! than allowed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use super::NpmError;

/// What one unpacking may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnpackLimits {
    /// Bytes of all chosen files together.
    pub bytes_max: u64,
    /// Entries in the archive, chosen or not.
    pub entries_max: u64,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unpacked {
    /// Files written.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

const PATH_BYTES_MAX: usize = 512;
const DEPTH_MAX: usize = 32;

/// Unpacks `tarball` into `dest`, which must exist and be empty. The archive's first path component (`package`) is
/// dropped; `select` is asked with the rest of each file's path. Executable files get mode 0755, others 0644.
/// Blocking. On error, the caller removes `dest`.
pub fn unpack(
    tarball: &Path,
    dest: &Path,
    select: &dyn Fn(&str) -> bool,
    limits: UnpackLimits,
) -> Result<Unpacked, NpmError> {
    let file = File::open(tarball).map_err(NpmError::io("open the archive"))?;
    // Twice the payload bounds the decompressor as well: headers, padding and unchosen files.
    let stream_max = limits.bytes_max.saturating_mul(2).saturating_add(limits.entries_max * 2048);
    let stream = flate2::read::GzDecoder::new(io::BufReader::new(file)).take(stream_max);
    let mut archive = tar::Archive::new(stream);
    let mut done = Unpacked { files: 0, bytes: 0 };
    let entries = archive.entries().map_err(NpmError::io("read the archive"))?;
    for (index, entry) in entries.enumerate() {
        let mut entry = entry.map_err(NpmError::io("read the archive"))?;
        let shown = entry.path().map(|path| path.to_string_lossy().chars().take(200).collect::<String>());
        let shown = shown.unwrap_or_default();
        let refuse = |why| NpmError::Archive { path: shown.clone(), why };
        if index as u64 >= limits.entries_max {
            return Err(refuse("is one entry too many"));
        }
        let kind = entry.header().entry_type();
        if kind.is_dir() || kind.is_pax_global_extensions() {
            continue;
        }
        let inside = inside(&entry.path().map_err(NpmError::io("read the archive"))?).map_err(refuse)?;
        let Some(name) = inside.to_str().filter(|name| select(name)) else {
            continue;
        };
        if !kind.is_file() {
            return Err(refuse("is not a plain file"));
        }
        let bytes = entry.size();
        if done.bytes.saturating_add(bytes) > limits.bytes_max {
            return Err(NpmError::TooLarge { what: "the archive".to_owned(), bytes_max: limits.bytes_max });
        }
        let executable = entry.header().mode().is_ok_and(|mode| mode & 0o111 != 0);
        let target = dest.join(name);
        write_file(&mut entry, &target, bytes, executable).map_err(NpmError::io("unpack the archive"))?;
        done.files += 1;
        done.bytes += bytes;
    }
    Ok(done)
}

/// The path below the archive's first component, if it stays below.
fn inside(path: &Path) -> Result<PathBuf, &'static str> {
    if path.as_os_str().len() > PATH_BYTES_MAX {
        return Err("has too long a name");
    }
    let mut parts = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => parts.push(part),
            Component::CurDir => {}
            _ => return Err("leads out of the archive"),
        }
    }
    match parts.len() {
        0 | 1 => Err("is not below a directory"),
        depth if depth > DEPTH_MAX => Err("lies too deep"),
        _ => Ok(parts.iter().skip(1).collect()),
    }
}

fn write_file(from: &mut impl Read, target: &Path, bytes: u64, executable: bool) -> io::Result<()> {
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    let mode = if executable { 0o755 } else { 0o644 };
    // create_new: an archive that names a file twice is refused, and no link is followed at the last component.
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(target)?;
    let written = io::copy(&mut from.take(bytes), &mut file)?;
    if written != bytes {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the archive ends early"));
    }
    file.set_permissions(fs::Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: UnpackLimits = UnpackLimits { bytes_max: 1000, entries_max: 10 };

    fn archive(entries: &[(&str, tar::EntryType, &[u8], u32)]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let gzip = flate2::write::GzEncoder::new(file.reopen().unwrap(), flate2::Compression::fast());
        let mut builder = tar::Builder::new(gzip);
        for (name, kind, content, mode) in entries {
            let mut header = tar::Header::new_ustar();
            // set_path refuses "..", so write the name as an attacker would.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(*kind);
            header.set_size(content.len() as u64);
            header.set_mode(*mode);
            if kind.is_symlink() {
                header.set_link_name("/etc").unwrap();
            }
            header.set_cksum();
            builder.append(&header, *content).unwrap();
        }
        builder.into_inner().unwrap().finish().unwrap();
        file
    }

    #[test]
    fn chosen_files_are_written_with_plain_modes() {
        let tarball = archive(&[
            ("package/claude", tar::EntryType::Regular, b"binary", 0o4777),
            ("package/a/README.md", tar::EntryType::Regular, b"text", 0o600),
            ("package/other", tar::EntryType::Regular, b"no", 0o600),
        ]);
        let dest = tempfile::tempdir().unwrap();
        let done = unpack(tarball.path(), dest.path(), &|name| name != "other", LIMITS).unwrap();
        assert_eq!(done, Unpacked { files: 2, bytes: 10 });
        let mode = |name: &str| fs::metadata(dest.path().join(name)).unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode("claude"), mode("a/README.md")), (0o755, 0o644));
        assert!(!dest.path().join("other").exists());
    }

    #[test]
    fn nothing_is_written_outside_the_directory() {
        let parent = tempfile::tempdir().unwrap();
        let dest = parent.path().join("dest");
        fs::create_dir(&dest).unwrap();
        let file = tar::EntryType::Regular;
        for name in ["package/../../escape", "/package/escape", "package/x/../../escape", "escape"] {
            let tarball = archive(&[(name, file, b"x", 0o644)]);
            let error = unpack(tarball.path(), &dest, &|_| true, LIMITS).unwrap_err();
            assert!(matches!(error, NpmError::Archive { .. }), "{name}: {error}");
        }
        let link = archive(&[
            ("package/d", tar::EntryType::Symlink, b"", 0o777),
            ("package/d/escape", file, b"x", 0o644),
        ]);
        assert!(matches!(unpack(link.path(), &dest, &|_| true, LIMITS), Err(NpmError::Archive { .. })));
        let twice = archive(&[("package/d", file, b"x", 0o644), ("package/d", file, b"y", 0o644)]);
        assert!(unpack(twice.path(), &dest, &|_| true, LIMITS).is_err());
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
    }

    #[test]
    fn limits_hold() {
        let dest = tempfile::tempdir().unwrap();
        let file = tar::EntryType::Regular;
        let large = archive(&[("package/a", file, &[0; 600], 0o644), ("package/b", file, &[0; 600], 0o644)]);
        let error = unpack(large.path(), dest.path(), &|_| true, LIMITS).unwrap_err();
        assert!(matches!(error, NpmError::TooLarge { bytes_max: 1000, .. }));
        let names: Vec<String> = (0..11).map(|index| format!("package/{index}")).collect();
        let many: Vec<_> = names.iter().map(|name| (name.as_str(), file, &b""[..], 0o644)).collect();
        let dest = tempfile::tempdir().unwrap();
        assert!(unpack(archive(&many).path(), dest.path(), &|_| true, LIMITS).is_err());
    }
}
