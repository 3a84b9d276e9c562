//! The outbox: what happened to jobs and is still to be told, written in the transaction in which it happened. First it
//! says only what happened (`target` is null); then it is made out to each target, with its text; then it is sent. It
//! must never hold up or fail the transition that it tells of.

use rusqlite::{Connection, params};

use super::row::{Int, int, json, parsed, text};
use super::writer::Durability;
use super::{Store, StoreError};
use crate::job::{Identity, JobId, State};
use crate::notice::{Kind, WAITING_MAX};

/// The table.
pub(super) const OUTBOX: &str = "
CREATE TABLE outbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    job TEXT NOT NULL,
    at_ms INTEGER NOT NULL,
    target TEXT,
    body TEXT,
    who TEXT,
    tries INTEGER NOT NULL DEFAULT 0,
    next_ms INTEGER NOT NULL,
    error TEXT
);
CREATE INDEX outbox_due ON outbox (target, next_ms);
CREATE INDEX payers_by_batch ON payers (uid, batch) WHERE batch IS NOT NULL;
";

/// Something that happened and is not made out to anybody yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Happened {
    /// Its number.
    pub id: u64,
    /// What.
    pub kind: Kind,
    /// To which job.
    pub job: JobId,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
}

/// A notice for one target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// Its number: the same at each try.
    pub id: u64,
    /// What.
    pub kind: Kind,
    /// Of which job.
    pub job: JobId,
    /// When it happened, in milliseconds since 1970.
    pub at_ms: u64,
    /// For whom.
    pub target: String,
    /// JSON.
    pub body: String,
    /// Whose job it is: it may be removed by now.
    pub who: Identity,
    /// Tries so far.
    pub tries: u32,
    /// The next one, in milliseconds since 1970.
    pub next_ms: u64,
    /// Why the last one failed.
    pub error: Option<String>,
}

/// What is to be told of a job's new state, where anybody wants to be told anything.
pub(super) fn note(db: &Connection, job: &JobId, state: &State, now_ms: u64) -> Result<(), StoreError> {
    let kind = match state {
        State::Done(_) => Kind::JobEnd,
        State::Parked { .. } => Kind::Parked,
        State::Queued
        | State::Preparing
        | State::Running
        | State::Stopping { .. }
        | State::Parking { .. }
        | State::Collecting { .. }
        | State::Verifying => return Ok(()),
    };
    let sql = "INSERT INTO outbox (kind, job, at_ms, next_ms) SELECT ?1, ?2, ?3, ?3 \
               WHERE EXISTS (SELECT 1 FROM meta WHERE key = 'notify') \
               AND (SELECT count(*) FROM outbox) < ?4";
    let values = params![kind.as_str(), job.as_str(), Int(now_ms), WAITING_MAX];
    if db.prepare_cached(sql)?.execute(values)? == 0 {
        let wanted = "SELECT EXISTS (SELECT 1 FROM meta WHERE key = 'notify')";
        if db.prepare_cached(wanted)?.query_row([], |row| row.get::<_, bool>(0))? {
            tracing::error!(%job, kind = kind.as_str(), "nobody is told: {WAITING_MAX} notices wait already");
        }
    }
    Ok(())
}

impl Store {
    /// Who is to be told from now on. What waits for targets that are no more is dropped; how much that was.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn set_notifies(&self, targets: Vec<String>) -> Result<usize, StoreError> {
        self.write(Durability::Now, move |db| {
            let known = text(&targets)?;
            let sql = "DELETE FROM outbox WHERE target IS NOT NULL \
                       AND target NOT IN (SELECT value FROM json_each(?1))";
            let dropped = db.prepare_cached(sql)?.execute([known])?;
            let sql = match !targets.is_empty() {
                true => "INSERT INTO meta (key, value) VALUES ('notify', '1') ON CONFLICT DO NOTHING",
                false => "DELETE FROM meta WHERE key = 'notify'",
            };
            db.prepare_cached(sql)?.execute([])?;
            Ok(dropped)
        })
        .await
    }

    /// What is not made out to anybody yet, oldest first.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn happened(&self, most: u32) -> Result<Vec<Happened>, StoreError> {
        self.read(move |db| {
            let sql = "SELECT id, kind, job, at_ms FROM outbox WHERE target IS NULL ORDER BY id LIMIT ?1";
            let mut statement = db.prepare_cached(sql)?;
            let rows = statement.query_map([most], |row| {
                let kind = kind(row, 1)?;
                Ok(Happened { id: int(row, 0)?, kind, job: parsed(row, 2)?, at_ms: int(row, 3)? })
            })?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// Makes out what happened: one notice for each (kind, target, text), in place of the row that says it.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn make_out(
        &self,
        what: Happened,
        who: Identity,
        notices: Vec<(Kind, String, String)>,
    ) -> Result<(), StoreError> {
        self.write(Durability::Soon, move |db| {
            let gone = db.prepare_cached("DELETE FROM outbox WHERE id = ?1")?.execute([Int(what.id)])?;
            if gone == 0 {
                return Ok(());
            }
            let who = text(&who)?;
            let sql = "INSERT INTO outbox (kind, job, at_ms, target, body, who, next_ms) \
                       VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?3)";
            for (kind, target, body) in &notices {
                let values = params![kind.as_str(), what.job.as_str(), Int(what.at_ms), target, body, who];
                db.prepare_cached(sql)?.execute(values)?;
            }
            Ok(())
        })
        .await
    }

    /// Notices that wait, for one target or for all, the ones due first.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn notices(&self, target: Option<&str>, most: u32) -> Result<Vec<Notice>, StoreError> {
        let target = target.map(str::to_owned);
        self.read(move |db| {
            let sql = "SELECT id, kind, job, at_ms, target, body, tries, next_ms, error, who FROM outbox \
                       WHERE target IS NOT NULL AND (?1 IS NULL OR target = ?1) ORDER BY next_ms, id LIMIT ?2";
            let mut statement = db.prepare_cached(sql)?;
            let rows = statement.query_map(params![target, most], |row| {
                Ok(Notice {
                    id: int(row, 0)?,
                    kind: kind(row, 1)?,
                    job: parsed(row, 2)?,
                    at_ms: int(row, 3)?,
                    target: row.get(4)?,
                    body: row.get(5)?,
                    who: json(row, 9)?,
                    tries: row.get(6)?,
                    next_ms: int(row, 7)?,
                    error: row.get(8)?,
                })
            })?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// A notice was delivered, or is given up.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn told(&self, id: u64) -> Result<(), StoreError> {
        self.write(Durability::Soon, move |db| {
            db.prepare_cached("DELETE FROM outbox WHERE id = ?1")?.execute([Int(id)])?;
            Ok(())
        })
        .await
    }

    /// A try failed; the next one is at `next_ms`.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn tell_again(&self, id: u64, next_ms: u64, error: String) -> Result<(), StoreError> {
        self.write(Durability::Soon, move |db| {
            let sql = "UPDATE outbox SET tries = tries + 1, next_ms = ?2, error = ?3 WHERE id = ?1";
            db.prepare_cached(sql)?.execute(params![Int(id), Int(next_ms), error])?;
            Ok(())
        })
        .await
    }

    /// Whether this job ended its batch: it has one, all of whose jobs are over, and this one last. How many there are.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn ended_batch(&self, job: &JobId) -> Result<Option<u64>, StoreError> {
        let job = job.clone();
        self.read(move |db| {
            let sql = "SELECT count(*), coalesce(sum(jobs.ended_ms IS NULL), 0), \
                       (SELECT last.id FROM payers p JOIN jobs last ON last.id = p.job \
                        WHERE p.uid = own.uid AND p.batch = own.batch ORDER BY last.ended_ms DESC, last.n DESC LIMIT 1) \
                       FROM payers own JOIN payers all_of ON all_of.uid = own.uid AND all_of.batch = own.batch \
                       JOIN jobs ON jobs.id = all_of.job WHERE own.job = ?1";
            let (count, open, last) = db.prepare_cached(sql)?.query_row([job.as_str()], |row| {
                Ok((int(row, 0)?, int(row, 1)?, row.get::<_, Option<String>>(2)?))
            })?;
            Ok((count > 0 && open == 0 && last.as_deref() == Some(job.as_str())).then_some(count))
        })
        .await
    }
}

fn kind(row: &rusqlite::Row<'_>, at: usize) -> rusqlite::Result<Kind> {
    let text: String = row.get(at)?;
    text.parse().map_err(|()| {
        rusqlite::Error::FromSqlConversionFailure(
            at,
            rusqlite::types::Type::Text,
            format!("{text:?} is no kind").into(),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::NewJob;
    use super::super::tests::{new_job, open};
    use super::*;
    use crate::job::{Input, StopReason};
    use tempfile::TempDir;

    #[tokio::test]
    async fn what_happens_is_noted_with_it_while_somebody_is_to_be_told_and_for_those_alone() {
        let dir = TempDir::new().unwrap();
        let store = open(&dir).await;
        let end = async |n| {
            let id = JobId::new(n, 0);
            let stop = Input::Stop(StopReason::Cancelled);
            store.transition(&id, &State::Queued, &stop, None, 5).await.unwrap();
            id
        };
        for n in [1, 2, 3] {
            let batch = Some(super::super::Batch { name: "b".to_owned(), limit: None });
            store.submit(NewJob { batch, ..new_job(n, 1000) }).await.unwrap();
        }
        end(1).await;
        assert_eq!(store.happened(9).await.unwrap(), [], "nobody is to be told");
        assert_eq!(store.set_notifies(vec!["a".to_owned(), "b".to_owned()]).await.unwrap(), 0);
        let second = end(2).await;
        let happened = store.happened(9).await.unwrap();
        assert_eq!((happened.len(), happened[0].kind, &happened[0].job), (1, Kind::JobEnd, &second));
        assert_eq!(store.ended_batch(&second).await.unwrap(), None, "one of them is not over");
        let who = Identity { uid: 1000, gid: 7, groups: vec![8] };
        let both = ["a", "b"].map(|target| (Kind::JobEnd, target.to_owned(), "{}".to_owned())).to_vec();
        store.make_out(happened[0].clone(), who.clone(), both.clone()).await.unwrap();
        store.make_out(happened[0].clone(), who.clone(), both).await.unwrap();
        let waiting = store.notices(None, 9).await.unwrap();
        assert_eq!(
            waiting.iter().map(|n| n.target.as_str()).collect::<Vec<_>>(),
            ["a", "b"],
            "made out once"
        );
        store.delete(&second).await.unwrap();
        store.tell_again(waiting[0].id, 99, "why".to_owned()).await.unwrap();
        let again = store.notices(Some("a"), 9).await.unwrap();
        assert_eq!(
            (again[0].tries, again[0].next_ms, &again[0].who),
            (1, 99, &who),
            "whose it was outlives the job"
        );
        assert_eq!(store.set_notifies(vec!["a".to_owned()]).await.unwrap(), 1, "b is told nothing any more");
        store.told(again[0].id).await.unwrap();
        assert_eq!(store.notices(None, 9).await.unwrap(), []);
        let third = end(3).await;
        assert_eq!(store.ended_batch(&third).await.unwrap(), Some(2), "the last of those that are there");
        store.close().await.unwrap();
    }
}
