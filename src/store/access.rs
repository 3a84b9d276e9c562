//! What access and audit ask of the rows: how many open jobs a user has, and which jobs have something to
//! audit. Reads only.

use rusqlite::params;

use super::row::{Int, int, maybe_int, parsed};
use super::{Store, StoreError};
use crate::job::JobId;

/// Most rows of one page.
const PAGE_ROWS_MAX: u64 = 500;

/// A job as the audit needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditJob {
    /// Its number: in the order of submits, for the next page.
    pub n: u64,
    /// Its id.
    pub id: JobId,
    /// Whose it is.
    pub uid: u32,
    /// When it was over, wall clock in milliseconds.
    pub ended_ms: Option<u64>,
}

/// Which jobs to audit.
#[derive(Debug, Clone, Copy, Default)]
pub struct AuditFilter {
    /// Only this user's.
    pub uid: Option<u32>,
    /// Only those that ended at this time or later, or not yet; wall clock in milliseconds.
    pub since_ms: u64,
    /// Without those that are not over.
    pub over: bool,
}

fn audit_job(row: &rusqlite::Row<'_>) -> rusqlite::Result<AuditJob> {
    Ok(AuditJob { n: int(row, 0)?, id: parsed(row, 1)?, uid: row.get(2)?, ended_ms: maybe_int(row, 3)? })
}

impl Store {
    /// A user's jobs that are not over, by state.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn open_counts(&self, uid: u32) -> Result<Vec<(String, u64)>, StoreError> {
        self.read(move |db| {
            let sql = "SELECT state, count(*) FROM jobs WHERE uid = ?1 AND state <> 'done' GROUP BY state";
            let mut statement = db.prepare_cached(sql)?;
            let rows = statement.query_map([uid], |row| Ok((row.get(0)?, int(row, 1)?)))?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// A page of jobs after the one with number `after`, in the order of their submits; empty at the end.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn audit_page(&self, filter: AuditFilter, after: u64) -> Result<Vec<AuditJob>, StoreError> {
        self.read(move |db| {
            let sql = "SELECT n, id, uid, ended_ms FROM jobs WHERE n > ?1 AND (?2 IS NULL OR uid = ?2) \
                       AND (ended_ms >= ?3 OR (ended_ms IS NULL AND NOT ?4)) ORDER BY n LIMIT ?5";
            let mut statement = db.prepare_cached(sql)?;
            let AuditFilter { uid, since_ms, over } = filter;
            let bound = params![Int(after), uid, Int(since_ms), over, Int(PAGE_ROWS_MAX)];
            let rows = statement.query_map(bound, audit_job)?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// Jobs that are being worked on, and those numbered from `floor` on that ended at `since_ms` or later;
    /// with them the floor for the next look: the number of the oldest job that is not over.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn audit_news(
        &self,
        uid: Option<u32>,
        floor: u64,
        since_ms: u64,
    ) -> Result<(Vec<AuditJob>, u64), StoreError> {
        self.read(move |db| {
            let sql = "SELECT coalesce((SELECT min(n) FROM jobs WHERE state <> 'done'), \
                       (SELECT coalesce(max(n), 0) + 1 FROM jobs))";
            let next = db.prepare_cached(sql)?.query_row([], |row| int(row, 0))?;
            // The plus keeps SQLite from walking all jobs that are over.
            let sql = "SELECT n, id, uid, ended_ms FROM jobs WHERE n >= ?1 AND (?2 IS NULL OR uid = ?2) \
                       AND ((+state = 'done' AND ended_ms >= ?3) OR +state NOT IN ('done', 'queued')) ORDER BY n";
            let mut statement = db.prepare_cached(sql)?;
            let rows = statement.query_map(params![Int(floor), uid, Int(since_ms)], audit_job)?;
            Ok((rows.collect::<Result<_, _>>()?, next))
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{Identity, Input, Outcome, State, StopReason};
    use crate::store::NewJob;

    async fn submit(store: &Store, n: u64, uid: u32) -> JobId {
        let id = JobId::new(n, 0);
        let job = NewJob {
            id: id.clone(),
            identity: Identity { uid, gid: uid, groups: Vec::new() },
            priority: 0,
            spec_json: "{}".into(),
            plan_json: "{}".into(),
            policy: "default".into(),
            model: "m".into(),
            labels: Default::default(),
            batch: None,
            idem: None,
            created_ms: n,
        };
        store.submit(job).await.expect("submit");
        id
    }

    async fn end(store: &Store, job: &JobId, now_ms: u64) {
        let stopped = Outcome::Stopped { reason: StopReason::Cancelled };
        store
            .finish(job, &State::Queued, stopped, Default::default(), None, None, now_ms)
            .await
            .expect("end");
    }

    fn ids(jobs: &[AuditJob]) -> Vec<&str> {
        jobs.iter().map(|job| job.id.as_str()).collect()
    }

    #[tokio::test]
    async fn a_look_for_news_finds_what_began_or_ended_and_the_next_one_begins_at_the_oldest_open_job() {
        let dir = tempfile::tempdir().expect("dir");
        let store = Store::open(dir.path()).await.expect("store");
        assert_eq!(store.audit_news(None, 0, 0).await.expect("news"), (Vec::new(), 1), "an empty store");
        let mut jobs = Vec::new();
        for (n, uid) in [(1, 7), (2, 8), (3, 7), (4, 7)] {
            jobs.push(submit(&store, n, uid).await);
        }
        end(&store, &jobs[0], 100).await;
        end(&store, &jobs[2], 200).await;
        store.transition(&jobs[3], &State::Queued, &Input::Admit, None, 150).await.expect("admit");
        let (found, floor) = store.audit_news(None, 0, 0).await.expect("news");
        assert_eq!(
            ids(&found),
            [jobs[0].as_str(), jobs[2].as_str(), jobs[3].as_str()],
            "not what only waits"
        );
        assert_eq!((floor, found[1].uid, found[1].ended_ms), (2, 7, Some(200)));
        let (found, _) = store.audit_news(None, floor, 0).await.expect("news");
        assert_eq!(ids(&found), [jobs[2].as_str(), jobs[3].as_str()]);
        let (found, _) = store.audit_news(Some(8), 0, 0).await.expect("news");
        assert_eq!(ids(&found), [""; 0]);
        let (found, _) = store.audit_news(None, 0, 201).await.expect("news");
        assert_eq!(ids(&found), [jobs[3].as_str()]);

        let page = |filter, after| store.audit_page(filter, after);
        let all = page(AuditFilter::default(), 0).await.expect("page");
        assert_eq!(ids(&all), jobs.iter().map(JobId::as_str).collect::<Vec<_>>());
        assert_eq!(page(AuditFilter::default(), all[1].n).await.expect("page"), all[2..]);
        let over = AuditFilter { uid: Some(7), since_ms: 150, over: true };
        assert_eq!(ids(&page(over, 0).await.expect("page")), [jobs[2].as_str()]);
        let mut counts = store.open_counts(7).await.expect("counts");
        counts.sort();
        assert_eq!(counts, [("preparing".to_owned(), 1)]);
        store.close().await.expect("close");
    }
}
