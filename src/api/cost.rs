//! `GET /v1/cost`: what was spent, on what. `GET /v1/budgets`: how the budgets of users and daemon stand. Who is
//! no admin sees their own spending only.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{ConnectInfo, Query, State};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::peer::Peer;
use super::submit::identity;
use super::wire::ErrorCode;
use super::{Api, ApiError};
use crate::clock;
use crate::config::Names;
use crate::job::Identity;
use crate::money::{Budget, MicroUsd, Scope, Standing};
use crate::policy::Grant;
use crate::pricing::Usage;
use crate::store::ledger::report::{By, CostQuery, Costs};
use crate::store::{Payer, Spend};

/// Longest name of a label in a query, in bytes.
const LABEL_BYTES_MAX: usize = 256;

/// What a report can add up by.
pub const BY: [&str; 9] = ["job", "user", "model", "policy", "label", "batch", "credential", "day", "month"];

/// What `GET /v1/cost` answers.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct CostReport {
    /// What the rows add up by.
    pub by: String,
    /// The label whose values the rows are, where one was named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// From when on, RFC 3339; absent: from the beginning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// Until when, RFC 3339; absent: until now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
    /// The time zone whose days are meant.
    pub time_zone: String,
    /// The dearest first; days and months in their order.
    pub rows: Vec<CostRow>,
    /// All requests once, also where rows overlap (labels) or were cut off.
    pub total: CostRow,
    /// True where only the dearest rows are here.
    pub truncated: bool,
}

/// One line of a report.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct CostRow {
    /// What it adds up; null for what has none (a job without a batch), and for the total.
    pub key: Option<String>,
    /// With by=user: the user's id, which is the key too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// With by=user: their name on the daemon's machine, where they have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Charged, in USD.
    pub cost_usd: f64,
    /// The same in micro-USD, exact.
    pub cost_micro_usd: u64,
    /// Part of the total, from 0 to 1.
    pub share: f64,
    /// Requests for a model.
    pub requests: u64,
    /// Tokens as billed.
    pub usage: Usage,
}

/// What `GET /v1/budgets` answers.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct BudgetList {
    /// The time zone whose midnight ends a day.
    pub time_zone: String,
    /// The budgets that bound the asker's jobs, beside those of single jobs and batches.
    pub budgets: Vec<BudgetView>,
}

/// How one budget stands.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct BudgetView {
    /// Whose it is.
    pub scope: Scope,
    /// How much there is in all, in USD.
    pub limit_usd: f64,
    /// Charged, in USD.
    pub spent_usd: f64,
    /// Set aside for requests under way, in USD.
    pub reserved_usd: f64,
    /// When it is empty again, RFC 3339.
    pub resets_at: Option<String>,
}

/// `GET /v1/cost`
pub async fn cost(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    query: Result<Query<Vec<(String, String)>>, QueryRejection>,
) -> Result<Json<CostReport>, ApiError> {
    let Query(query) = query.map_err(|e| ApiError::new(ErrorCode::InvalidRequest, e.body_text()))?;
    let who = identity(&peer)?;
    let asked = Asked::parse(&api, &who, query)?;
    let label = match &asked.query.by {
        By::Label(label) => label.clone(),
        _ => None,
    };
    let (since, until) = (asked.query.since_ms, asked.query.until_ms);
    let by_user = asked.query.by == By::User;
    let costs = api.parts.store.costs(asked.query).await?;
    let mut report = report(
        costs,
        CostReport {
            by: asked.by,
            label,
            since: since.map(clock::rfc3339),
            until: until.map(clock::rfc3339),
            time_zone: api.parts.settings.calendar.zone_name(),
            rows: Vec::new(),
            total: row(None, &Spend::default(), MicroUsd::ZERO),
            truncated: false,
        },
    );
    if by_user {
        // Read now, as for `whoami`: people come and go while the daemon runs.
        let names = tokio::task::spawn_blocking(Names::of_machine).await;
        name_users(&mut report.rows, &names.map_err(|e| ApiError::new(ErrorCode::Internal, e))?);
    }
    Ok(Json(report))
}

fn name_users(rows: &mut [CostRow], names: &Names) {
    for row in rows {
        row.uid = row.key.as_deref().and_then(|key| key.parse().ok());
        row.user = row.uid.and_then(|uid| names.user(uid)).map(str::to_owned);
    }
}

/// `GET /v1/budgets`
pub async fn budgets(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
) -> Result<Json<BudgetList>, ApiError> {
    let who = identity(&peer)?;
    let grant = api.granted(&who)?;
    let budgets = own_budgets(&api, &who, &grant).await?;
    Ok(Json(BudgetList { time_zone: api.parts.settings.calendar.zone_name(), budgets }))
}

/// How a user's budgets and the daemon's stand.
///
/// # Errors
/// When the store fails.
pub async fn own_budgets(api: &Api, who: &Identity, grant: &Grant) -> Result<Vec<BudgetView>, ApiError> {
    let budgets = api.parts.settings.caps.of_job(None, None, grant.day_usd);
    Ok(standing(api, who, budgets).await?.iter().map(BudgetView::from).collect())
}

/// How these budgets stand for a user now.
///
/// # Errors
/// When the store fails.
pub async fn standing(api: &Api, who: &Identity, budgets: Vec<Budget>) -> Result<Vec<Standing>, ApiError> {
    let payer = Payer { uid: who.uid, job: None, batch: None };
    let calendar = api.parts.settings.calendar.clone();
    Ok(api.parts.store.budget_standing(payer, budgets, calendar, clock::wall_ms()).await?)
}

impl From<&Standing> for BudgetView {
    fn from(standing: &Standing) -> Self {
        Self {
            scope: standing.scope,
            limit_usd: standing.limit.as_usd(),
            spent_usd: standing.charged.as_usd(),
            reserved_usd: standing.reserved.as_usd(),
            resets_at: standing.resets_at_ms.map(clock::rfc3339),
        }
    }
}

struct Asked {
    by: String,
    query: CostQuery,
}

impl Asked {
    fn parse(api: &Api, who: &Identity, query: Vec<(String, String)>) -> Result<Self, ApiError> {
        let bad = |key: &str, problem: String| {
            ApiError::new(ErrorCode::InvalidRequest, format!("{key}: {problem}"))
        };
        let calendar = &api.parts.settings.calendar;
        let (mut by, mut label) = ("model".to_owned(), None);
        let (mut since_ms, mut until_ms) = (None, None);
        for (key, value) in query {
            let moment = |end| calendar.moment_ms(&value, end).map_err(|e| bad(&key, e.to_string()));
            match key.as_str() {
                "since" => since_ms = Some(moment(false)?),
                "until" => until_ms = Some(moment(true)?),
                "by" => by = value,
                "label" if value.is_empty() || value.len() > LABEL_BYTES_MAX => {
                    return Err(bad(&key, format!("must have from 1 to {LABEL_BYTES_MAX} bytes")));
                }
                "label" => label = Some(value),
                _ => return Err(bad(&key, "is no parameter of this path".into())),
            }
        }
        if label.is_some() && by != "label" {
            return Err(bad("label", "names the label of by=label".into()));
        }
        if let (Some(since), Some(until)) = (since_ms, until_ms)
            && since >= until
        {
            return Err(bad("until", "is not after since".into()));
        }
        let uid = (!api.sees_all(who)).then_some(who.uid);
        let grouping = match by.as_str() {
            "job" => By::Job,
            "user" => By::User,
            "model" => By::Model,
            "policy" => By::Policy,
            "label" => By::Label(label),
            "batch" => By::Batch,
            "credential" => By::Credential,
            "day" => By::Day,
            "month" => By::Month,
            _ => return Err(bad("by", format!("is none of {}", BY.join(", ")))),
        };
        Ok(Self { by, query: CostQuery { uid, since_ms, until_ms, by: grouping } })
    }
}

fn report(costs: Costs, head: CostReport) -> CostReport {
    let total = costs.total.charged;
    CostReport {
        rows: costs.rows.into_iter().map(|(key, spend)| row(key, &spend, total)).collect(),
        total: row(None, &costs.total, total),
        truncated: costs.truncated,
        ..head
    }
}

fn row(key: Option<String>, spend: &Spend, total: MicroUsd) -> CostRow {
    CostRow {
        key,
        uid: None,
        user: None,
        cost_usd: spend.charged.as_usd(),
        cost_micro_usd: spend.charged.0,
        share: if total == MicroUsd::ZERO { 0.0 } else { spend.charged.0 as f64 / total.0 as f64 },
        requests: spend.requests,
        usage: spend.usage,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_users_have_their_id_and_the_name_that_the_machine_knows() {
        let names = Names::parse("ann:x:1001:1001::/:/bin/sh\n", "");
        let mut rows = ["1001", "4242"].map(|key| row(Some(key.into()), &Spend::default(), MicroUsd::ZERO));
        name_users(&mut rows, &names);
        assert_eq!((rows[0].uid, rows[0].user.as_deref()), (Some(1001), Some("ann")));
        assert_eq!((rows[1].uid, rows[1].user.as_deref()), (Some(4242), None));
        assert_eq!(rows[1].key.as_deref(), Some("4242"));
    }
}
