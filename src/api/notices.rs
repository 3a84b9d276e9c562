//! Telling people: what the store's outbox holds is made out to the targets that want it, and sent, each target by a task
//! of its own, so that one that hangs holds up nobody. At least once: what was sent and not noted before a kill is sent
//! again under the same delivery. `GET /v1/notices` shows what waits, `POST /v1/notices/test` sends a word. It must
//! never hold up a job or the daemon's end.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{ConnectInfo, State};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::peer::Peer;
use super::submit::identity;
use super::wire::ErrorCode;
use super::{Api, ApiError, jobs};
use crate::clock;
use crate::job::Identity;
use crate::notice::{Kind, pause_ms};
use crate::notifier::{Message, Notifier};
use crate::store::{Happened, Notice, StoreError};

/// How often it is looked whether something happened.
const LOOK: Duration = Duration::from_secs(1);
/// Longest sleep of a target's task: the wall clock may jump.
const SLEEP_MAX: Duration = Duration::from_secs(30);
/// Made out, or read, at a time.
const BATCH_MAX: u32 = 100;
/// Most notices that one answer tells of.
const SHOWN_MAX: u32 = 1000;

/// What is told of a job: none of it is anybody's words.
const TOLD: [&str; 19] = [
    "id",
    "state",
    "outcome",
    "reason",
    "phase",
    "blame",
    "parked",
    "uid",
    "policy",
    "model",
    "labels",
    "batch",
    "attempt",
    "created_at",
    "started_at",
    "ended_at",
    "cost_usd",
    "cost_limit_usd",
    "from",
];

/// What `GET /v1/notices` answers.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct NoticesView {
    /// The names of all targets.
    pub targets: Vec<String>,
    /// What waits for them, the next ones first; at most 1000.
    pub waiting: Vec<NoticeView>,
}

/// A notice that waits.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct NoticeView {
    /// For whom.
    pub target: String,
    /// What happened.
    pub kind: String,
    /// To which job.
    pub job: String,
    /// When, RFC 3339.
    pub at: String,
    /// Tries so far.
    pub tries: u32,
    /// The next one, RFC 3339.
    pub next_at: String,
    /// Why the last one failed.
    pub error: Option<String>,
}

/// What became of a test notice.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct TestView {
    /// For whom.
    pub target: String,
    /// Why it was not told; it was where this is absent.
    pub error: Option<String>,
}

/// `GET /v1/notices`, for admins.
///
/// # Errors
/// `not_yours`, and what the store says.
pub async fn list(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
) -> Result<Json<NoticesView>, ApiError> {
    admin(&api, &peer)?;
    let waiting = api.parts.store.notices(None, SHOWN_MAX).await?;
    let view = |notice: Notice| NoticeView {
        target: notice.target,
        kind: notice.kind.as_str().to_owned(),
        job: notice.job.to_string(),
        at: clock::rfc3339(notice.at_ms),
        tries: notice.tries,
        next_at: clock::rfc3339(notice.next_ms),
        error: notice.error,
    };
    let targets = api.notifiers.iter().map(|one| one.target().name.clone()).collect();
    Ok(Json(NoticesView { targets, waiting: waiting.into_iter().map(view).collect() }))
}

/// `POST /v1/notices/test`, for admins: tells each target a word, now and once, as the asker.
///
/// # Errors
/// `not_yours`.
pub async fn test(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
) -> Result<Json<Vec<TestView>>, ApiError> {
    let who = admin(&api, &peer)?;
    let mut told = Vec::new();
    for notifier in api.notifiers.iter() {
        let at = clock::wall_ms();
        let (delivery, kind) = (format!("{}-test-{at}", api.parts.store.instance()), Kind::Test.as_str());
        let body = json!({ "delivery": delivery, "kind": kind, "at": clock::rfc3339(at) }).to_string();
        let message = Message { delivery: &delivery, kind, job: "", body: &body, who: &who };
        let error = notifier.send(message).await.err();
        told.push(TestView { target: notifier.target().name.clone(), error });
    }
    Ok(Json(told))
}

fn admin(api: &Api, peer: &Peer) -> Result<Identity, ApiError> {
    let who = identity(peer)?;
    if api.sees_all(&who) {
        return Ok(who);
    }
    Err(ApiError::new(ErrorCode::NotYours, "notices are for admins"))
}

/// Makes out and sends until `close`.
pub async fn run(api: Arc<Api>, close: CancellationToken) {
    if api.notifiers.is_empty() {
        return close.cancelled().await;
    }
    let mut tasks = JoinSet::new();
    let bells: Arc<Vec<Notify>> = Arc::new(api.notifiers.iter().map(|_| Notify::new()).collect());
    for at in 0..api.notifiers.len() {
        let (api, bells) = (api.clone(), bells.clone());
        tasks.spawn(async move {
            loop {
                let pause = match tell_due(&api, &api.notifiers[at]).await {
                    Ok(pause) => pause,
                    Err(error) => {
                        tracing::error!(%error, "the outbox cannot be read");
                        SLEEP_MAX
                    }
                };
                // What rings meanwhile is remembered.
                let _ = tokio::time::timeout(pause, bells[at].notified()).await;
            }
        });
    }
    tasks.spawn(async move {
        loop {
            match make_out(&api).await {
                Ok(0) => tokio::time::sleep(LOOK).await,
                Ok(_) => bells.iter().for_each(Notify::notify_one),
                Err(error) => {
                    tracing::error!(%error, "what happened cannot be made out to anybody");
                    tokio::time::sleep(SLEEP_MAX).await;
                }
            }
        }
    });
    // The end of the set ends its tasks; what they were at is sent again by the next daemon.
    tokio::select! {
        () = close.cancelled() => {}
        Some(ended) = tasks.join_next() => tracing::error!(?ended, "a task that tells people died"),
    }
}

/// What happened becomes notices; how many happenings.
async fn make_out(api: &Api) -> Result<usize, StoreError> {
    let happened = api.parts.store.happened(BATCH_MAX).await?;
    let count = happened.len();
    for what in happened {
        match notices_of(api, &what).await? {
            Some((who, notices)) => api.parts.store.make_out(what, who, notices).await?,
            None => api.parts.store.told(what.id).await?,
        }
    }
    Ok(count)
}

/// Whose job it is, and kind, target and text of each notice.
type MadeOut = (Identity, Vec<(Kind, String, String)>);

async fn notices_of(api: &Api, what: &Happened) -> Result<Option<MadeOut>, StoreError> {
    let Some(job) = api.parts.store.job(&what.job).await? else {
        tracing::warn!(job = %what.job, kind = what.kind.as_str(), "nobody is told: the job was removed before");
        return Ok(None);
    };
    let mut kinds = vec![(what.kind, None)];
    if what.kind == Kind::JobEnd
        && let Some(jobs) = api.parts.store.ended_batch(&what.job).await?
    {
        kinds.push((Kind::BatchEnd, Some(jobs)));
    }
    let (policy, uid) = (job.row.policy.clone(), job.row.identity.uid);
    // What cannot be read of a job is told by its id alone: it must not keep others from being told.
    let view = jobs::view(api, &job).await.ok().and_then(|view| serde_json::to_value(view).ok());
    let mut view = view.unwrap_or_else(|| json!({ "id": what.job, "policy": policy, "uid": uid }));
    // What an agent, a prompt or a command said (a result, a failure's message) goes to nobody but who asks for it.
    if let Some(view) = view.as_object_mut() {
        view.retain(|key, _| TOLD.contains(&key.as_str()));
    }
    let mut notices = Vec::new();
    for (kind, batch_jobs) in kinds {
        let body = json!({
            "kind": kind.as_str(), "at": clock::rfc3339(what.at_ms), "job": view, "batch_jobs": batch_jobs,
            "next": format!("hotcell show {}", what.job),
        });
        let wanted =
            api.notifiers.iter().map(|one| one.target()).filter(|target| target.wants(kind, &policy, uid));
        notices.extend(wanted.map(|target| (kind, target.name.clone(), body.to_string())));
    }
    Ok(Some((job.row.identity, notices)))
}

/// Sends what is due to one target; how long until the next is.
async fn tell_due(api: &Api, notifier: &Notifier) -> Result<Duration, StoreError> {
    let store = &api.parts.store;
    let name = &notifier.target().name;
    loop {
        let waiting = store.notices(Some(name), BATCH_MAX).await?;
        let Some(first) = waiting.first() else { return Ok(SLEEP_MAX) };
        let now = clock::wall_ms();
        if first.next_ms > now {
            return Ok(Duration::from_millis(first.next_ms - now).min(SLEEP_MAX));
        }
        for notice in waiting.into_iter().filter(|notice| notice.next_ms <= now) {
            tell(api, notifier, &notice).await?;
        }
    }
}

async fn tell(api: &Api, notifier: &Notifier, notice: &Notice) -> Result<(), StoreError> {
    let (store, metrics) = (&api.parts.store, &api.parts.metrics);
    let (job, kind, who) = (notice.job.as_str(), notice.kind.as_str(), &notice.who);
    // Not the row's number, which a power loss may give to another one.
    let delivery = format!("{job}-{kind}-{}-{}", notice.at_ms, notice.target);
    let told = notifier.send(Message { delivery: &delivery, kind, job, body: &notice.body, who }).await;
    match (told, pause_ms(notice.tries + 1)) {
        (Ok(()), _) => {
            metrics.notice("sent");
            store.told(notice.id).await
        }
        (Err(error), Some(pause)) => {
            metrics.notice("failed");
            tracing::warn!(target = notice.target, job, kind, %error, "somebody was not told; trying again");
            store.tell_again(notice.id, clock::wall_ms() + pause, error).await
        }
        (Err(error), None) => {
            metrics.notice("given_up");
            tracing::error!(target = notice.target, job, kind, %error, "somebody was not told; given up");
            store.told(notice.id).await
        }
    }
}
