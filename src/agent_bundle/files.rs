//! Files that appear whole or not at all. Never leaves a temporary file of its own behind.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::BundleError;

/// Starts the name of everything unfinished in the bundles' directory.
pub(super) const TEMP_PREFIX: &str = ".incoming-";

const JSON_BYTES_MAX: u64 = 1 << 20;

pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, BundleError> {
    let io = |source| BundleError::Io { doing: "read", path: path.to_owned(), source };
    let damaged = |why: String| BundleError::Damaged { path: path.to_owned(), why };
    if fs::metadata(path).map_err(io)?.len() > JSON_BYTES_MAX {
        return Err(damaged("too large".to_owned()));
    }
    serde_json::from_slice(&fs::read(path).map_err(io)?).map_err(|error| damaged(error.to_string()))
}

pub(super) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), BundleError> {
    let text = serde_json::to_vec_pretty(value)
        .map_err(|error| BundleError::Damaged { path: path.to_owned(), why: error.to_string() })?;
    write_whole(path, &text).map_err(|source| BundleError::Io {
        doing: "write",
        path: path.to_owned(),
        source,
    })
}

/// Writes a new file beside `path`, syncs it and renames it over `path`.
pub(crate) fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(TEMP_PREFIX).tempfile_in(dir)?;
    file.write_all(content)?;
    file.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    sync_dir(dir)
}

pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Removes what an installation that was killed left behind, once it is an hour old.
pub(super) fn sweep(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut swept = Vec::new();
    for entry in fs::read_dir(dir)?.take(10_000) {
        let entry = entry?;
        let ours = entry.file_name().to_string_lossy().starts_with(TEMP_PREFIX);
        let old = entry.metadata()?.modified()?.elapsed().is_ok_and(|age| age.as_secs() > 3600);
        if !ours || !old {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
        swept.push(entry.path());
    }
    Ok(swept)
}
