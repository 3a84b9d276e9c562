//! `POST /v1/doctor`: the quick look, and then real attacks from inside a real cell under a chosen policy. The cell is
//! that of an ordinary job of the asker's, whose command is `hotcell-init attack`: who may use the policy may try its
//! walls, and nobody else. It must never give a cell anything that other cells of the policy have not, nor believe what
//! comes out of it (`judge` decides).

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, State};
use axum::http::HeaderMap;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::judge::{self, Expected, Limits, Seen};
use super::{check, quick, status};
use crate::api::events::Follower;
use crate::api::peer::Peer;
use crate::api::submit::{identity, submit};
use crate::api::wire::{AttackRequest, Attacked, CheckVerdict, Doctor, ErrorCode, JobView};
use crate::api::{Api, ApiError};
use crate::cell::Accepted;
use crate::job::spec::Runtime;
use crate::job::{JobId, Outcome, StopReason};
use crate::policy::file;
use crate::policy::{Act, EgressAsk, Host, Plan, decide_egress};
use crate::store::Job;

/// Longest wait for the attack's end, its turn in the queue included. Clients wait a little longer.
pub const ATTACK_MAX: Duration = Duration::from_secs(240);
/// Limits of the attack's cell, or the policy's where those are lower: floods are short.
const WALL_S: u32 = 150;
const PIDS: u32 = 128;
const MEMORY_MIB: u32 = 384;
const DISK_MIB: u32 = 128;
/// Most of what an attack prints that is read, in bytes.
const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// Largest answer to our own submit, in bytes.
const VIEW_BYTES_MAX: usize = 4 << 20;
/// The program, as the cell sees it.
const PROGRAM: &str = "/.hotcell-init";
/// A name that cannot exist (RFC 6761): the attack asks the proxy for it.
const NOBODY: &str = "doctor.invalid";

/// Looks at everything once, and attacks a cell.
///
/// # Errors
/// What keeps the attack's job from being submitted, and when a look died.
pub async fn attack(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    body: Result<Bytes, axum::extract::rejection::BytesRejection>,
) -> Result<Json<Doctor>, ApiError> {
    let body = body.map_err(|e| ApiError::new(ErrorCode::InvalidRequest, e.body_text()))?;
    let request = if body.is_empty() {
        AttackRequest::default()
    } else {
        serde_json::from_slice(&body).map_err(|e| ApiError::new(ErrorCode::InvalidRequest, e))?
    };
    let deadline = Instant::now() + ATTACK_MAX;
    // Refused before anything is looked at.
    let wish = wish(&api, &peer, request).await?;
    let mut begun = begin(&api, &peer, &wish, wish.cells[0]).await?;
    let (mut checks, kernel) = quick(&api).await?;
    let mut jobs = Vec::new();
    let mut seen = Seen::default();
    let mut trouble = None;
    let mut last = None;
    for next in wish.cells.iter().skip(1).map(Some).chain([None]) {
        jobs.push(begun.job.clone());
        let ended = follow(&api, &begun.job, deadline).await;
        if !ended.as_ref().is_ok_and(|ended| ended.job.row.state.is_done()) {
            stop(&api, &begun.job).await;
        }
        let ended = ended?;
        match ended.job.row.state.outcome() {
            Some(outcome) => {
                let here = judge::read(&ended.output, &begun.nonce, outcome);
                if here.is_empty() && !matches!(outcome, Outcome::Succeeded) {
                    trouble = Some(format!("the attack could not be run: {}", words(outcome)));
                }
                seen.add(here);
            }
            None => trouble = Some(format!("the attack did not end within {} s", ATTACK_MAX.as_secs())),
        }
        last = Some(ended);
        match next.filter(|_| trouble.is_none()) {
            Some(parts) => begun = begin(&api, &peer, &wish, parts).await?,
            None => break,
        }
    }
    let Some(Ended { job, accepted, .. }) = last else {
        return Err(ApiError::new(ErrorCode::Internal, "no cell was attacked"));
    };
    let runtime = api.parts.store.agent_cell_of(&job.row.id).await?.and_then(|cell| cell.runtime);
    match trouble {
        Some(words) => checks.push(not_attacked(&words)),
        None => {
            let expected = expected(&accepted.plan, runtime.unwrap_or_default(), kernel);
            checks.extend(judge::judge(&expected, &seen));
        }
    }
    let (policy, image) = (job.row.policy, accepted.plan.image);
    let attack = Some(Attacked { jobs, policy, runtime, image });
    Ok(Json(Doctor { status: status(&checks), checks, attack }))
}

fn not_attacked(words: &str) -> crate::api::wire::Check {
    check("attack", CheckVerdict::Fail, words)
        .hint("`hotcell ls` shows the job, `hotcell queue` what it waits for")
}

/// How the attack's job ended, in words.
fn words(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Succeeded => "it ended without a word".to_owned(),
        Outcome::Failed(failure) => failure.message.clone(),
        Outcome::Stopped { reason } => format!("it was stopped: {}", reason.as_str()),
        Outcome::Lost => "the daemon lost it".to_owned(),
    }
}

/// An attack that is under way.
struct Begun {
    job: JobId,
    nonce: String,
}

/// The limits of the attack's cell under a policy.
fn limits(policy: &file::Limits) -> (Limits, u32) {
    let limits = Limits {
        pids: PIDS.min(policy.pids),
        memory_mib: MEMORY_MIB.min(policy.memory_mib),
        disk_mib: DISK_MIB.min(policy.disk_mib),
    };
    (limits, WALL_S.min(policy.wall_s))
}

/// What is to be attacked.
struct Wish {
    policy: String,
    limits: Option<(Limits, u32)>,
    /// What is tried in each cell, one after the other.
    cells: &'static [&'static str],
}

async fn wish(api: &Api, peer: &Peer, request: AttackRequest) -> Result<Wish, ApiError> {
    let granted = api.granted(&identity(peer)?)?;
    let name = request.policy.or(granted.default_policy).unwrap_or_else(|| api.default_policy.clone());
    let policies = api.policies().await?;
    // One that is not there is refused by the submit, in its words.
    let policy = policies.get(&name);
    let cells: &[&str] = match policy.map(|policy| policy.runtime).unwrap_or_default() {
        // The disk comes last: a daemon that is not root ends a cell that takes too much.
        Runtime::Runc => &["look,processes,memory,disk"],
        // Too many processes, or too much memory, end a whole sandbox.
        Runtime::Runsc => &["look,disk", "processes", "memory"],
    };
    Ok(Wish { limits: policy.map(|policy| limits(&policy.limits)), policy: name, cells })
}

/// Submits one cell's part of the attack as a job of the peer's.
async fn begin(api: &Arc<Api>, peer: &Peer, wish: &Wish, parts: &str) -> Result<Begun, ApiError> {
    let nonce = getrandom::u64().map_err(|e| ApiError::new(ErrorCode::Internal, e))?;
    let nonce = format!("{nonce:016x}");
    let (limits, wall_s) = wish.limits.unwrap_or_default();
    let (disk, memory) = (limits.disk_mib.to_string(), limits.memory_mib.to_string());
    let mut spec = json!({
        "command": { "argv": [PROGRAM, "attack", nonce, disk, memory, parts] },
        "policy": wish.policy,
        "labels": { "hotcell": "doctor" },
    });
    if wish.limits.is_some() {
        spec["limits"] = json!({
            "wall_s": wall_s, "pids": limits.pids, "memory_mib": limits.memory_mib, "disk_mib": limits.disk_mib,
        });
    }
    let body = Bytes::from(spec.to_string());
    let state = State(Arc::clone(api));
    let answer = submit(state, ConnectInfo(peer.clone()), HeaderMap::new(), Ok(body)).await?;
    let view: JobView = read(answer).await?;
    Ok(Begun { job: view.id, nonce })
}

async fn read<T: serde::de::DeserializeOwned>(answer: Response<Body>) -> Result<T, ApiError> {
    let internal = |words: String| ApiError::new(ErrorCode::Internal, words);
    let bytes = axum::body::to_bytes(answer.into_body(), VIEW_BYTES_MAX).await;
    let bytes = bytes.map_err(|error| internal(error.to_string()))?;
    serde_json::from_slice(&bytes).map_err(|error| internal(error.to_string()))
}

async fn stop(api: &Api, job: &JobId) {
    let detail = "the doctor waits no longer".to_owned();
    if let Err(error) = api.driver.stop(job.clone(), StopReason::Cancelled, detail).await {
        tracing::warn!(%job, %error, "an attack of the doctor is left to its time limit");
    }
}

/// A job with what it printed.
struct Ended {
    job: Job,
    accepted: Accepted,
    output: String,
}

/// Waits for the job's end, and gives what it printed; after the deadline what there is.
async fn follow(api: &Arc<Api>, id: &JobId, deadline: Instant) -> Result<Ended, ApiError> {
    let mut follower = Follower::new(Arc::clone(api), id.clone(), 1, true);
    let mut output = Output::default();
    let reading = async {
        while let Some(chunk) = follower.next().await? {
            chunk.split(|b| *b == b'\n').filter(|line| !line.is_empty()).for_each(|line| output.event(line));
        }
        Ok::<_, crate::journal::JournalError>(())
    };
    if let Ok(Err(error)) = tokio::time::timeout_at(deadline, reading).await {
        return Err(ApiError::new(ErrorCode::Internal, error));
    }
    let job = api.parts.store.job(id).await?;
    let job = job.ok_or_else(|| ApiError::new(ErrorCode::Internal, "the attack's job is gone"))?;
    let accepted = serde_json::from_str(&job.plan_json).map_err(|e| ApiError::new(ErrorCode::Internal, e))?;
    Ok(Ended { job, accepted, output: output.text })
}

/// A job's standard output, put together from its events.
#[derive(Debug, Default)]
struct Output {
    text: String,
    end: u64,
}

impl Output {
    /// A piece comes without the line feeds at its end: the offset tells how many there were.
    fn event(&mut self, line: &[u8]) {
        #[derive(Deserialize)]
        struct Piece {
            end: u64,
            text: String,
        }
        let Ok(event) = serde_json::from_slice::<Value>(line) else { return };
        if event["type"] != "output" || event["stream"] != "stdout" {
            return;
        }
        let Ok(piece) = serde_json::from_value::<Piece>(event) else { return };
        let bytes = piece.end.saturating_sub(self.end);
        let feeds = usize::try_from(bytes).unwrap_or(usize::MAX).saturating_sub(piece.text.len());
        self.end = piece.end;
        if self.text.len() + piece.text.len() <= OUTPUT_BYTES_MAX {
            self.text.push_str(&piece.text);
            self.text.push_str(&"\n".repeat(feeds.min(OUTPUT_BYTES_MAX)));
        }
    }
}

/// What the plan says that the judgement goes by.
fn expected(plan: &Plan, runtime: Runtime, kernel: String) -> Expected {
    const MIB: u64 = 1 << 20;
    let mib = |bytes: u64| u32::try_from(bytes / MIB).unwrap_or(u32::MAX);
    let limits = Limits {
        pids: plan.limits.pids_max,
        memory_mib: mib(plan.limits.memory_bytes),
        disk_mib: mib(plan.limits.disk_bytes),
    };
    let opens_any = Host::parse(NOBODY).is_ok_and(|host| {
        decide_egress(&plan.layers, &EgressAsk { host: &host, port: 443, act: Act::Connect }).is_ok()
    });
    let hosts = plan.layers.first().map(|layer| layer.egress.hosts.as_slice()).unwrap_or_default();
    let opens = hosts.iter().map(|rule| rule.name.clone()).collect();
    Expected { runtime, kernel, limits, opens_any, opens }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_put_together_as_it_was_printed() {
        let mut output = Output::default();
        let whole = "{\"a\":1}\n{\"b\":2}\n{\"c\":3}\n";
        let mut from = 0;
        for to in [3, 8, 16, 20, whole.len()] {
            let text = whole[from..to].trim_end_matches('\n');
            let event = json!({ "seq": 1, "type": "output", "stream": "stdout", "end": to, "text": text });
            output.event(event.to_string().as_bytes());
            from = to;
        }
        let other = json!({ "seq": 1, "type": "output", "stream": "stderr", "end": 5, "text": "words" });
        output.event(other.to_string().as_bytes());
        assert_eq!(output.text, whole);
    }

    #[test]
    fn the_cell_is_no_larger_than_its_policy_allows() {
        let policy = |pids, memory_mib, disk_mib, wall_s| file::Limits {
            cost_usd: 1.0,
            max_turns: 1,
            wall_s,
            silence_s: 1,
            cpus: 1.0,
            memory_mib,
            pids,
            disk_mib,
            slots: None,
        };
        let (large, wall_s) = limits(&policy(1024, 4096, 4096, 3600));
        assert_eq!(
            (large.pids, large.memory_mib, large.disk_mib, wall_s),
            (PIDS, MEMORY_MIB, DISK_MIB, WALL_S)
        );
        let (small, wall_s) = limits(&policy(32, 256, 16, 10));
        assert_eq!((small.pids, small.memory_mib, small.disk_mib, wall_s), (32, 256, 16, 10));
    }
}
