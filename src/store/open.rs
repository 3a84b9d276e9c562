//! The jobs that are not over, as a start reads them: what recovery and the queue have to know of each, and no more,
//! since there may be a hundred thousand. It must never leave one out because something of it cannot be read.

use super::row::{json, parsed};
use super::{Store, StoreError};
use crate::job::{JobId, State};
use crate::policy::PlanLimits;

/// A job that is not over, as the scheduler needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenJob {
    /// Its id.
    pub id: JobId,
    /// Whose it is.
    pub uid: u32,
    /// Higher goes first.
    pub priority: i8,
    /// Where it stands.
    pub state: State,
    /// The provider that its plan names; none for the daemon's default.
    pub provider: Option<String>,
    /// The model that its plan names.
    pub model: String,
    /// The policy that its plan names.
    pub policy: String,
    /// What it may use up; none where its plan cannot be read.
    pub limits: Option<PlanLimits>,
}

impl Store {
    /// All jobs that are not over, oldest first.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn open_jobs(&self) -> Result<Vec<OpenJob>, StoreError> {
        self.read(|db| {
            let sql = "SELECT id, uid, priority, state_json, \
                       CASE WHEN json_valid(plan_json) THEN plan_json ->> '$.plan.provider' END, model, policy, \
                       CASE WHEN json_valid(plan_json) THEN plan_json ->> '$.plan.limits' END \
                       FROM jobs WHERE state IN ('queued', 'preparing', 'running', 'stopping', 'parking', \
                       'parked', 'collecting', 'verifying') ORDER BY n";
            let mut statement = db.prepare_cached(sql)?;
            let rows = statement.query_map([], |row| {
                let (uid, priority) = (row.get(1)?, row.get(2)?);
                let (state, provider, model) = (json(row, 3)?, row.get(4)?, row.get(5)?);
                let (policy, limits): (_, Option<String>) = (row.get(6)?, row.get(7)?);
                let limits = limits.and_then(|text| serde_json::from_str(&text).ok());
                Ok(OpenJob { id: parsed(row, 0)?, uid, priority, state, provider, model, policy, limits })
            })?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }
}
