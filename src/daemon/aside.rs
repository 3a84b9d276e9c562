//! The store at start, and what is done about a damaged one. By default nothing: the daemon says so and ends. Where
//! the operator said so, the store is moved out of the way with all that only its rows give a meaning to, and nothing
//! of that is ever deleted here; what is left of the cells is the start's own sweep's, by the same instance id.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use crate::cell::Settings;
use crate::clock;
use crate::store::{FILE_NAME, Store, StoreError};
use crate::sweeper;

/// Jobs that are named in the message; of all of them there are journals.
const NAMED_MAX: usize = 20;

/// Opens the store; `allowed` says that a damaged one may be set aside.
pub(super) async fn open_store(settings: &Settings, allowed: bool) -> anyhow::Result<Store> {
    let damage = match whole(settings).await {
        Err(error @ StoreError::Corrupt { .. }) if allowed => error,
        Err(error) => return Err(error.into()),
        Ok(store) => return Ok(store),
    };
    // Nobody has the store, or it would have been told. What is half applied is put right before its notes move.
    sweeper::put_right(settings).await?;
    let dir = settings.state_dir.join("jobs");
    let of_jobs = dir.clone();
    let journals = tokio::task::spawn_blocking(move || names(&of_jobs)).await?;
    let now = clock::wall_ms();
    let sources = set_sources_aside(settings, now)?;
    // What only rows give a meaning to: without them the sweep would take it for left over.
    let with = vec![dir.clone(), settings.changes_dir(), settings.kept_dir()];
    let aside = Store::set_aside(&settings.state_dir, now, with).await?;
    std::fs::DirBuilder::new().mode(0o700).create(&dir)?;
    let store = Store::open(&settings.state_dir).await?;
    let named: Vec<&str> = journals.iter().take(NAMED_MAX).map(String::as_str).collect();
    tracing::error!(
        "{damage}. It was set aside: {aside} has it, and beside it jobs/ with the journals of {count} jobs ({named}{more}), \
         changes/ with their change sets and kept/ with the work of those that were parked{sources}. No job is known \
         any more; what is left of their cells (instance {instance}) is removed now. The charges of this day and \
         month begin at zero: what was spent before counts for no budget.",
        aside = aside.display(),
        count = journals.len(),
        named = named.join(", "),
        more = if journals.len() > NAMED_MAX { ", …" } else { "" },
        instance = store.instance(),
    );
    Ok(store)
}

/// The store, where the rows that a start needs can be read.
async fn whole(settings: &Settings) -> Result<Store, StoreError> {
    let store = Store::open(&settings.state_dir).await?;
    let read = match store.open_jobs().await {
        Ok(_) => store.live_cells().await.map(drop),
        Err(error) => Err(error),
    };
    match read {
        Ok(()) => Ok(store),
        Err(error) => {
            store.close().await?;
            Err(match error {
                StoreError::Unreadable { detail } => {
                    StoreError::Corrupt { path: settings.state_dir.join(FILE_NAME), detail }
                }
                other => other,
            })
        }
    }
}

/// Checkouts of git sources, which jobs may have worked in: beside the state directory, perhaps on another disk. Gives
/// what is to be said of it.
fn set_sources_aside(settings: &Settings, now_ms: u64) -> io::Result<String> {
    let from = settings.sources_dir();
    let mut name = from.file_name().unwrap_or_default().to_owned();
    name.push(format!(".set-aside-{now_ms}"));
    let to = from.with_file_name(name);
    match std::fs::rename(&from, &to) {
        Ok(()) => Ok(format!("; {} has what was fetched for them", to.display())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error),
    }
}

/// What a directory holds, in order; nothing where it cannot be read.
fn names(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
