//! What lies beside the database: the instance id in a file of its own, copies from before migrations, and where a
//! damaged store is moved. It must never change or remove a store: what is set aside stays whole.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rusqlite::Connection;

use super::super::{FILE_NAME, INSTANCE_NAME, StoreError};
use crate::job::InstanceId;

/// Copies from before migrations that stay.
const COPIES_MAX: usize = 2;

/// The instance id of this state directory, where a store was made here before.
pub(super) fn instance(state_dir: &Path) -> Option<InstanceId> {
    std::fs::read_to_string(state_dir.join(INSTANCE_NAME)).ok()?.trim().parse().ok()
}

/// Writes the instance id, where it is not there yet. Only after the store that has it is on its way to the disk: the
/// file says that there was one.
pub(super) fn put_instance(state_dir: &Path, id: &InstanceId) -> Result<(), StoreError> {
    if instance(state_dir).as_ref() == Some(id) {
        return Ok(());
    }
    let path = state_dir.join(INSTANCE_NAME);
    let fresh = state_dir.join(format!(".{INSTANCE_NAME}.new"));
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        writeln!(file, "{id}")?;
        file.sync_all()?;
        std::fs::rename(&fresh, &path)
    };
    write().map_err(|error| StoreError::io("write", &path, &error))
}

/// Copies the store, synced, before its schema goes on from `found`; the oldest copies go.
pub(super) fn copy(connection: &Connection, file: &Path, found: u32) -> Result<(), StoreError> {
    let name = |n: u32| file.with_file_name(format!("{FILE_NAME}.schema-{n}"));
    let fresh = file.with_file_name(format!(".{FILE_NAME}.schema.new"));
    // Made by us, empty, since SQLite would let others read it.
    let made = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh);
    made.map_err(|error| StoreError::io("make", &fresh, &error))?;
    let copied = connection.execute("VACUUM INTO ?1", [fresh.to_string_lossy()]).map_err(StoreError::from);
    let synced = copied.and_then(|_| {
        let keep = File::open(&fresh).and_then(|copy| copy.sync_all()).and_then(|()| {
            std::fs::rename(&fresh, name(found))?;
            File::open(file.parent().unwrap_or(Path::new(".")))?.sync_all()
        });
        keep.map_err(|error| StoreError::io("write", &name(found), &error))
    });
    if let Err(error) = synced {
        let _ = std::fs::remove_file(&fresh);
        return Err(error);
    }
    let mut copies: Vec<u32> = (0..=found).filter(|n| name(*n).exists()).collect();
    copies.truncate(copies.len().saturating_sub(COPIES_MAX));
    for old in copies {
        std::fs::remove_file(name(old)).map_err(|error| StoreError::io("remove", &name(old), &error))?;
    }
    tracing::info!(copy = %name(found).display(), "the store is copied before its schema is changed");
    Ok(())
}

/// See [`super::super::Store::set_aside`].
pub(in crate::store) fn set_aside(
    state_dir: &Path,
    now_ms: u64,
    with: &[PathBuf],
) -> Result<PathBuf, StoreError> {
    let _lock = super::lock(state_dir)?;
    let file = state_dir.join(FILE_NAME);
    // A store from before there was such a file.
    if instance(state_dir).is_none() {
        match super::instance_of_damaged(&file) {
            Some(id) => put_instance(state_dir, &id)?,
            None => tracing::warn!(
                "the store's instance id cannot be read: its containers have to be removed by hand (docker ps -a \
                 --filter label=hotcell.instance shows them)"
            ),
        }
    }
    let aside = state_dir.join(format!("set-aside-{now_ms}"));
    let made = DirBuilder::new().mode(0o700).create(&aside);
    made.map_err(|error| StoreError::io("make", &aside, &error))?;
    let there = |from: &Path, done: std::io::Result<()>, what| match done {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(StoreError::io(what, from, &error)),
        Ok(()) | Err(_) => Ok(()),
    };
    for from in with {
        there(from, std::fs::rename(from, aside.join(from.file_name().unwrap_or_default())), "rename")?;
    }
    // The database last, and its log a second name before: whatever dies in between, what is found is a damaged store
    // with its log, or none.
    let logs = ["-wal", "-shm"].map(|suffix| format!("{FILE_NAME}{suffix}"));
    for log in &logs {
        there(&state_dir.join(log), std::fs::hard_link(state_dir.join(log), aside.join(log)), "link")?;
    }
    there(&file, std::fs::rename(&file, aside.join(FILE_NAME)), "rename")?;
    for log in &logs {
        there(&state_dir.join(log), std::fs::remove_file(state_dir.join(log)), "remove")?;
    }
    super::open_seen(&file, 0)?;
    for dir in [aside.as_path(), state_dir] {
        let synced = File::open(dir).and_then(|dir| dir.sync_all());
        synced.map_err(|error| StoreError::io("sync", dir, &error))?;
    }
    Ok(aside)
}
