//! Whether the daemon is paused: a row that outlives it. What it means for the queue is the scheduler's.

use rusqlite::{OptionalExtension, params};
use serde::{Deserialize, Serialize};

use super::writer::Durability;
use super::{Store, StoreError};

/// Since when nothing starts, and who said so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Paused {
    /// Milliseconds since 1970.
    pub since_ms: u64,
    /// Host user id.
    pub uid: u32,
}

impl Store {
    /// The pause, where there is one.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn paused(&self) -> Result<Option<Paused>, StoreError> {
        self.read(|db| {
            let sql = "SELECT value FROM meta WHERE key = 'paused'";
            let text: Option<String> = db.prepare_cached(sql)?.query_row([], |row| row.get(0)).optional()?;
            let parsed = text.map(|text| serde_json::from_str(&text)).transpose();
            parsed.map_err(|error| StoreError::Sqlite { detail: format!("the row of the pause: {error}") })
        })
        .await
    }

    /// Pauses or resumes; on the disk before this returns. A pause that is there stays as it is.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn set_paused(&self, paused: Option<Paused>) -> Result<(), StoreError> {
        self.write(Durability::Now, move |db| {
            match paused {
                Some(paused) => {
                    let text = super::row::text(&paused)?;
                    db.prepare_cached(
                        "INSERT INTO meta (key, value) VALUES ('paused', ?1) ON CONFLICT DO NOTHING",
                    )?
                    .execute(params![text])?
                }
                None => db.prepare_cached("DELETE FROM meta WHERE key = 'paused'")?.execute([])?,
            };
            Ok(())
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_pause_stays_until_it_is_over_also_over_a_restart() {
        let dir = tempfile::tempdir().expect("dir");
        let store = Store::open(dir.path()).await.expect("store");
        assert_eq!(store.paused().await.expect("read"), None);
        let first = Paused { since_ms: 5, uid: 0 };
        store.set_paused(Some(first)).await.expect("pause");
        store.set_paused(Some(Paused { since_ms: 9, uid: 7 })).await.expect("pause");
        store.close().await.expect("close");
        let store = Store::open(dir.path()).await.expect("store");
        assert_eq!(store.paused().await.expect("read"), Some(first));
        store.set_paused(None).await.expect("resume");
        store.set_paused(None).await.expect("resume");
        assert_eq!(store.paused().await.expect("read"), None);
        store.close().await.expect("close");
    }
}
