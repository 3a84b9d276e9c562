//! What is found of a job after its end. It must never touch a job that is not over: its totals are its record's then.

use rusqlite::params;
use rusqlite::types::Type;

use super::jobs::state_of;
use super::row::{json, text};
use super::writer::Durability;
use super::{Store, StoreError};
use crate::change::Summary;
use crate::event::Totals;
use crate::job::JobId;

impl Store {
    /// Puts the figures of a change set into the totals of a job that is over: it was made later than its end.
    ///
    /// # Errors
    /// [`StoreError::NotDone`], [`StoreError::NoSuchJob`].
    pub async fn found_changes(&self, job: &JobId, summary: Summary) -> Result<(), StoreError> {
        let job = job.clone();
        self.write(Durability::Soon, move |db| {
            let state = state_of(db, &job)?;
            if !state.is_done() {
                return Err(StoreError::NotDone { state: state.name().to_owned() });
            }
            let sql = "SELECT totals_json FROM jobs WHERE id = ?1";
            let totals = db.prepare_cached(sql)?.query_row([job.as_str()], |row| {
                let none = row.get_ref(0)?.data_type() == Type::Null;
                if none { Ok(None) } else { json::<Totals>(row, 0).map(Some) }
            })?;
            let totals = Totals { changes: Some(summary), ..totals.unwrap_or_default() };
            db.prepare_cached("UPDATE jobs SET totals_json = ?2 WHERE id = ?1")?
                .execute(params![job.as_str(), text(&totals)?])?;
            Ok(())
        })
        .await
    }
}
