//! What was spent, on what: sums over all charges, jobs that were removed included. Reads only.

use rusqlite::types::ToSql;
use rusqlite::{Row, params_from_iter};

use super::Spend;
use super::books::sums;
use crate::store::row::Int;
use crate::store::{Store, StoreError};

/// Most rows of a report; the dearest are kept, and the total counts all.
pub const REPORT_ROWS_MAX: usize = 10_000;

/// What a report adds up by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum By {
    /// The job's id.
    Job,
    /// The user's id.
    User,
    /// The model.
    Model,
    /// The job's policy.
    Policy,
    /// One label's value; every label of the job where none is named, so that rows may overlap.
    Label(Option<String>),
    /// The batch's name; a name that several users gave counts as one.
    Batch,
    /// The credential's name.
    Credential,
    /// The day on which the money was set aside.
    Day,
    /// Its month.
    Month,
}

/// Which charges to add up; all conditions hold together.
#[derive(Debug, Clone)]
pub struct CostQuery {
    /// Only this user's.
    pub uid: Option<u32>,
    /// Only set aside at this time or later, in milliseconds since 1970.
    pub since_ms: Option<u64>,
    /// Only set aside before this time.
    pub until_ms: Option<u64>,
    /// What to add up by.
    pub by: By,
}

/// Sums by key. The dearest first; days and months in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Costs {
    /// Key and sums; no key for what has none (a job without a batch).
    pub rows: Vec<(Option<String>, Spend)>,
    /// All that the conditions let through, rows that were cut off included.
    pub total: Spend,
    /// Whether rows were cut off at [`REPORT_ROWS_MAX`].
    pub truncated: bool,
}

const SUMS: &str = "sum(charged_micro) AS cost, count(*), sum(input), sum(output), sum(cache_read), \
     sum(cache_write_5m), sum(cache_write_1h), sum(web_searches)";

impl Store {
    /// What was spent.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn costs(&self, query: CostQuery) -> Result<Costs, StoreError> {
        self.read(move |db| {
            let mut values: Vec<Box<dyn ToSql>> = Vec::new();
            let mut conditions = String::from(" WHERE 1");
            let mut push = |sql: &str, value: Option<Box<dyn ToSql>>| {
                if let Some(value) = value {
                    values.push(value);
                    conditions.push_str(sql);
                }
            };
            push(" AND payers.uid = ?", query.uid.map(|uid| Box::new(uid) as _));
            push(" AND at_ms >= ?", query.since_ms.map(|ms| Box::new(Int(ms)) as _));
            push(" AND at_ms < ?", query.until_ms.map(|ms| Box::new(Int(ms)) as _));
            let from = "FROM charges JOIN payers ON payers.n = charges.payer";
            // One snapshot: rows and total are of the same moment.
            let both = db.unchecked_transaction()?;
            let total = both.prepare_cached(&format!("SELECT {SUMS} {from}{conditions}"))?.query_row(
                params_from_iter(values.iter()),
                |row| if row.get::<_, Option<i64>>(0)?.is_some() { sums(row) } else { Ok(Spend::default()) },
            )?;
            let Grouping { key, join, label, order } = Grouping::of(query.by);
            let sql = format!(
                "SELECT {SUMS}, {key} AS row_key {from}{join}{conditions} GROUP BY row_key ORDER BY {order} LIMIT {}",
                REPORT_ROWS_MAX + 1
            );
            let mut all: Vec<Box<dyn ToSql>> = label.into_iter().map(|label| Box::new(label) as _).collect();
            all.extend(values);
            let mut statement = both.prepare_cached(&sql)?;
            let rows = statement.query_map(params_from_iter(all), |row| Ok((key_of(row)?, sums(row)?)))?;
            let mut rows = rows.collect::<Result<Vec<_>, _>>()?;
            let truncated = rows.len() > REPORT_ROWS_MAX;
            rows.truncate(REPORT_ROWS_MAX);
            Ok(Costs { rows, total, truncated })
        })
        .await
    }
}

fn key_of(row: &Row<'_>) -> rusqlite::Result<Option<String>> {
    row.get(8)
}

struct Grouping {
    key: &'static str,
    join: &'static str,
    /// The first parameter, where `key` or `join` has one.
    label: Option<String>,
    order: &'static str,
}

impl Grouping {
    fn of(by: By) -> Self {
        let plain = |key| Self { key, join: "", label: None, order: "cost DESC, row_key" };
        match by {
            By::Job => plain("payers.job"),
            By::User => plain("CAST(payers.uid AS TEXT)"),
            By::Model => plain("model"),
            By::Policy => plain("payers.policy"),
            By::Batch => plain("payers.batch"),
            By::Credential => plain("nullif(credential, '')"),
            By::Day => Self { order: "row_key", ..plain("day") },
            By::Month => Self { order: "row_key", ..plain("substr(day, 1, 7)") },
            By::Label(Some(name)) => Self {
                join: " LEFT JOIN json_each(payers.labels_json) AS label ON label.key = ?",
                label: Some(name),
                ..plain("label.value")
            },
            By::Label(None) => Self {
                join: " LEFT JOIN json_each(payers.labels_json) AS label",
                ..plain("label.key || '=' || label.value")
            },
        }
    }
}
