//! `GET /v1/jobs/{id}/support`: all that helps to find out what went wrong with a job, as one archive, redacted. To its
//! submitter and to admins; who is no admin gets nothing of anybody else's jobs, and no line of the daemon's own. What
//! cannot be read is named in the manifest: a pack is for when things are broken. Bounded, and packed one at a time.

mod pack;
mod redact;
mod trim;
mod views;

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{ConnectInfo, Query, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::audit::Projected;
use super::doctor::doctor;
use super::events::flag;
use super::jobs::{JobPath, path_text, view};
use super::peer::Peer;
use super::submit::identity;
use super::wire::ErrorCode;
use super::{Api, ApiError, health_now};
use crate::audit::Filter;
use crate::cell::changes;
use crate::change::decision::Form as ChangeForm;
use crate::gateway::secret::Secret;
use crate::job::JobId;
use crate::journal::Reader;
use crate::store::Job;
use crate::{clock, daemon_log};
use pack::{Form, Lines, Missing, Raw};
pub use pack::{MANIFEST, Manifest};
use redact::Redactor;
use trim::{Trimmer, Wish};

/// Bytes of a journal that are read at a time.
const CHUNK_BYTES_MAX: usize = 256 * 1024;
/// Most paths of each list of a change set.
const PATHS_MAX: usize = 20_000;
/// Longest patch, in bytes.
const PATCH_BYTES_MAX: usize = 16 << 20;
/// Most of the daemon's own log, in bytes: its end.
const LOG_TAIL_BYTES_MAX: usize = 4 << 20;
/// Longest name of a client, in bytes.
const CLIENT_BYTES_MAX: usize = 128;

/// One pack at a time: each holds up to some ten MiB in memory.
static PACKING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

const README: &str = "\
What this archive holds: see MANIFEST.json, which names each file, what is not here and why, and how many secrets were
taken out of each, by kind. In the place of a secret stands [redacted: KIND]; in the place of a text that nobody asked
for, [left out: N bytes].

versions.json          hotcell, the agent's CLI, engine, runtimes, kernel
health.json            what the daemon said of itself when this was packed
doctor.json            what it said of its machine
job.json, spec.json    the job, and what was asked for
plan.json              what its policy allowed, as it was when it was submitted
events.ndjson          what happened, one event a line
audit.ndjson           what was decided
changes.json           names of what it changed
cost.json              what it cost
log.ndjson             lines of the daemon's log that are about the job
daemon.log.ndjson      for admins: the end of the daemon's log
changes.patch          with --with-contents: what it changed

Read it before you give it to somebody: what looks like a credential is taken out, names of files and hosts are not.
";

/// Answers with the archive.
///
/// # Errors
/// `not_found` for somebody else's job, `invalid_request`.
pub async fn support(
    State(api): State<Arc<Api>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    id: JobPath,
    query: Result<Query<Vec<(String, String)>>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let wish = wish(query)?;
    let who = identity(&peer)?;
    let job = api.own_job(&peer, path_text(&id)).await?;
    let client = headers.get(header::USER_AGENT).and_then(|value| value.to_str().ok()).unwrap_or("");
    let client: String = client.chars().take(CLIENT_BYTES_MAX).collect();
    let one_at_a_time = PACKING.lock().await;
    let admin = api.sees_all(&who);
    let mut gathered =
        Gathered { api: &api, job: &job, trimmer: Trimmer::new(wish), raw: Vec::new(), missing: Vec::new() };
    gathered.facts(&client).await;
    gathered.events().await;
    gathered.audit().await;
    gathered.changes(wish).await;
    gathered.log(admin).await;
    let Gathered { trimmer, raw, missing, .. } = gathered;
    let texts = [
        ("prompt: --with-prompt shows them", trimmer.left_out.prompt),
        ("contents: --with-contents shows them", trimmer.left_out.contents),
        ("never shown: environment, pieces of a stream", trimmer.left_out.never),
    ];
    let manifest = Manifest {
        format: 1,
        job: job.row.id.to_string(),
        made_at: clock::rfc3339(clock::wall_ms()),
        made_for_uid: who.uid,
        admin,
        with_prompt: wish.prompt,
        with_contents: wish.contents,
        entries: Vec::new(),
        left_out: missing,
        texts_left_out: texts.into_iter().map(|(why, n)| (why.to_owned(), n)).collect(),
    };
    let redactor = Redactor::new(&secrets(&api, &job.row.id).await?);
    let dir = format!("hotcell-support-{}", job.row.id);
    let packed = tokio::task::spawn_blocking(move || pack::pack(&dir, raw, manifest, &redactor)).await;
    drop(one_at_a_time);
    let internal =
        |error: String| ApiError::new(ErrorCode::Internal, format!("the pack was not made: {error}"));
    let bytes =
        packed.map_err(|error| internal(error.to_string()))?.map_err(|error| internal(error.to_string()))?;
    let kind = [(header::CONTENT_TYPE, "application/gzip"), (header::CACHE_CONTROL, "no-store")];
    Ok((kind, bytes).into_response())
}

fn wish(query: Result<Query<Vec<(String, String)>>, QueryRejection>) -> Result<Wish, ApiError> {
    let bad = |words: String| ApiError::new(ErrorCode::InvalidRequest, words);
    let Query(query) = query.map_err(|error| bad(error.body_text()))?;
    let mut wish = Wish::default();
    for (key, value) in &query {
        match key.as_str() {
            "with_prompt" => wish.prompt = flag(key, Some(value))?,
            "with_contents" => wish.contents = flag(key, Some(value))?,
            key => return Err(bad(format!("{key}: is no parameter of this path"))),
        }
    }
    Ok(wish)
}

/// What must be in no pack: the daemon's credentials, and the token with which the job's cell asks for the model.
async fn secrets(api: &Api, job: &JobId) -> Result<Vec<Secret>, ApiError> {
    let mut secrets = api.parts.gateway.credentials().held().await;
    let cells = [api.parts.store.cell_of(job).await?, api.parts.store.agent_cell_of(job).await?];
    secrets.extend(cells.into_iter().flatten().map(|cell| Secret::new(cell.token)));
    Ok(secrets)
}

/// What is known of a job, as it comes together.
struct Gathered<'a> {
    api: &'a Arc<Api>,
    job: &'a Job,
    trimmer: Trimmer,
    raw: Vec<Raw>,
    missing: Vec<Missing>,
}

impl Gathered<'_> {
    fn value(&mut self, name: &str, value: &Value) {
        match serde_json::to_string_pretty(value) {
            Ok(text) => {
                self.raw.push(Raw { name: name.to_owned(), form: Form::Json, text: text + "\n", cut: None })
            }
            Err(error) => self.miss(name, &error),
        }
    }

    fn miss(&mut self, what: &str, why: &impl ToString) {
        self.missing.push(Missing { what: what.to_owned(), why: why.to_string() });
    }

    /// What is asked for, or why there is none.
    fn told<T: serde::Serialize>(&mut self, name: &str, value: Result<T, ApiError>) -> Value {
        match value.map(|value| serde_json::to_value(value).unwrap_or_default()) {
            Ok(value) => value,
            Err(error) => {
                self.miss(name, &error.0.message);
                Value::Null
            }
        }
    }

    async fn facts(&mut self, client: &str) {
        self.raw.push(Raw { name: "README".into(), form: Form::Text, text: README.into(), cut: None });
        let versions = versions(self.api, client).await;
        self.value("versions.json", &versions);
        let health = json!(health_now(self.api).await);
        self.value("health.json", &health);
        let said = doctor(State(self.api.clone())).await.map(|Json(doctor)| doctor);
        let said = self.told("doctor.json", said);
        if !said.is_null() {
            self.value("doctor.json", &said);
        }
        let seen = view(self.api, self.job).await;
        let mut seen = self.told("job.json", seen);
        if !seen.is_null() {
            let totals = &seen["totals"];
            let cost = json!({ "cost_usd": seen["cost_usd"], "cost_limit_usd": seen["cost_limit_usd"], "totals": totals });
            self.trimmer.view(&mut seen);
            self.value("job.json", &seen);
            self.value("cost.json", &cost);
        }
        let mut spec: Value = serde_json::from_str(&self.job.spec_json).unwrap_or_default();
        self.trimmer.spec(&mut spec);
        self.value("spec.json", &spec);
        let mut plan: Value = serde_json::from_str(&self.job.plan_json).unwrap_or_default();
        self.trimmer.accepted(&mut plan);
        self.value("plan.json", &plan);
    }

    async fn events(&mut self) {
        let dir = self.api.parts.settings.journal_dir(&self.job.row.id);
        let (mut reader, mut lines) = (Reader::open(dir, 1, None), Lines::default());
        loop {
            let chunk = match reader.next_chunk(CHUNK_BYTES_MAX).await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => break,
                Err(error) => {
                    self.miss("the rest of events.ndjson", &error);
                    break;
                }
            };
            let mut trimmer = std::mem::take(&mut self.trimmer);
            let trimmed = tokio::task::spawn_blocking(move || {
                let text = String::from_utf8_lossy(&chunk);
                let trimmed: Vec<String> = text.lines().map(|line| trimmer.event(line)).collect();
                (trimmer, trimmed)
            });
            match trimmed.await {
                Ok((trimmer, trimmed)) => {
                    self.trimmer = trimmer;
                    trimmed.into_iter().for_each(|line| lines.push(line));
                }
                Err(error) => {
                    self.miss("the rest of events.ndjson", &error);
                    break;
                }
            }
        }
        self.raw.push(lines.entry("events.ndjson"));
    }

    async fn audit(&mut self) {
        let row = &self.job.row;
        let mut records =
            Projected::new(self.api, row.id.clone(), row.identity.uid, 0, Filter::default(), false);
        let mut lines = Lines::default();
        loop {
            match records.try_next().await {
                Ok(Some(chunk)) => {
                    String::from_utf8_lossy(&chunk).lines().for_each(|line| lines.push(line.to_owned()));
                }
                Ok(None) => break,
                Err(error) => {
                    self.miss("the rest of audit.ndjson", &error);
                    break;
                }
            }
        }
        self.raw.push(lines.entry("audit.ndjson"));
    }

    async fn changes(&mut self, wish: Wish) {
        let parts = &self.api.parts;
        let kept = match changes::read(parts, self.job).await {
            Ok(kept) => kept,
            Err(error) => return self.miss("changes.json", &error),
        };
        let mut set = serde_json::to_value(&kept.set).unwrap_or_default();
        for list in ["entries", "git_state"] {
            if let Some(list) =
                set.get_mut(list).and_then(Value::as_array_mut).filter(|l| l.len() > PATHS_MAX)
            {
                let more = list.len() - PATHS_MAX;
                list.truncate(PATHS_MAX);
                self.missing
                    .push(Missing { what: format!("{more} paths of changes.json"), why: "too many".into() });
            }
        }
        let summary = kept.set.summary(kept.hash);
        self.value(
            "changes.json",
            &json!({ "standing": kept.standing, "branches": kept.branches, "summary": summary, "set": set }),
        );
        if !wish.contents {
            return self.miss("changes.patch", &"contents of files are in it with --with-contents only");
        }
        match changes::render(parts, self.job, ChangeForm::Patch, Vec::new()).await {
            Ok(patch) => {
                let cut = patch.len().checked_sub(PATCH_BYTES_MAX).filter(|more| *more > 0);
                let text = String::from_utf8_lossy(&patch[..patch.len().min(PATCH_BYTES_MAX)]);
                let (text, cut) =
                    (trim::text_only(&text), cut.map(|more| format!("its last {more} bytes are left out")));
                self.raw.push(Raw { name: "changes.patch".into(), form: Form::Text, text, cut });
            }
            Err(error) => self.miss("changes.patch", &error),
        }
    }

    async fn log(&mut self, admin: bool) {
        let dir = daemon_log::dir(&self.api.parts.settings.state_dir);
        let read = tokio::task::spawn_blocking(move || daemon_log::read(&dir)).await;
        let log = match read.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
            Ok(log) => String::from_utf8_lossy(&log).into_owned(),
            Err(error) => return self.miss("log.ndjson", &error),
        };
        let mut lines = Lines::default();
        about(&log, &self.job.row.id, admin).for_each(|line| lines.push(line));
        self.raw.push(lines.entry("log.ndjson"));
        if !admin {
            return self.miss("daemon.log.ndjson", &"the daemon's own log is for admins");
        }
        let mut from = log.len().saturating_sub(LOG_TAIL_BYTES_MAX);
        while !log.is_char_boundary(from) {
            from += 1;
        }
        // From the first whole line on.
        let from = if from == 0 { 0 } else { log[from..].find('\n').map_or(log.len(), |at| from + at + 1) };
        let cut = (from > 0).then(|| format!("{from} bytes before it are left out"));
        let text = log[from..].to_owned();
        self.raw.push(Raw { name: "daemon.log.ndjson".into(), form: Form::Json, text, cut });
    }
}

/// The lines of a log that are about a job. Who is no admin reads no other job's id in them.
fn about(log: &str, job: &JobId, admin: bool) -> impl Iterator<Item = String> {
    log.lines().filter(|line| line.contains(job.as_str())).filter_map(move |line| {
        let parsed: Value = serde_json::from_str(line).ok()?;
        (parsed["fields"]["job"] == job.as_str())
            .then(|| if admin { line.to_owned() } else { without_others(line, job.as_str()) })
    })
}

/// A line without the ids of other jobs.
fn without_others(line: &str, own: &str) -> String {
    let word = |c: char| c.is_ascii_alphanumeric();
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(start) = rest.find(word) {
        let end = rest[start..].find(|c| !word(c)).map_or(rest.len(), |length| start + length);
        out.push_str(&rest[..start]);
        let found = &rest[start..end];
        let other = found != own && found.starts_with('j') && found.parse::<JobId>().is_ok();
        out.push_str(if other { "another-job" } else { found });
        rest = &rest[end..];
    }
    out + rest
}

async fn versions(api: &Api, client: &str) -> Value {
    let uname = rustix::system::uname();
    let text = |words: &std::ffi::CStr| words.to_string_lossy().into_owned();
    let wait = std::time::Duration::from_secs(5);
    let engine = match tokio::time::timeout(wait, api.parts.engine.info()).await {
        Ok(Ok(info)) => json!({
            "address": api.engine_address, "version": info.version, "api_version": info.api_version,
            "arch": info.arch, "os": info.os, "cgroup_version": info.cgroup_version,
            "default_runtime": info.default_runtime,
            "runtimes": info.runtimes.iter().map(|(name, runtime)| (name.clone(), json!({ "path": runtime.path, "args": runtime.args }))).collect::<serde_json::Map<_, _>>(),
        }),
        Ok(Err(error)) => json!({ "address": api.engine_address, "error": error.to_string() }),
        Err(_) => json!({ "address": api.engine_address, "error": "no answer" }),
    };
    let parts = api.parts.clone();
    let bundles = tokio::task::spawn_blocking(move || {
        let active =
            parts.bundles.active().map_or_else(|error| error.to_string(), |version| version.to_string());
        let installed: Vec<String> =
            parts.bundles.ls().unwrap_or_default().iter().map(|bundle| bundle.version.to_string()).collect();
        json!({ "configured": parts.settings.agent, "active": active, "installed": installed })
    });
    json!({
        "hotcell": { "daemon": env!("CARGO_PKG_VERSION"), "client": client },
        "agent": bundles.await.unwrap_or_default(),
        "engine": engine,
        "kernel": { "name": text(uname.sysname()), "release": text(uname.release()), "version": text(uname.version()), "machine": text(uname.machine()) },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_log_are_told_apart_by_their_field() {
        let (own, other): (JobId, &str) = ("j0dq2v7hk0x3m9ra".parse().expect("id"), "j0dq2v7hzzzzzzzz");
        let log = format!(
            "{{\"fields\":{{\"message\":\"a\",\"job\":\"{own}\",\"after\":\"{other}\"}}}}\n\
             {{\"fields\":{{\"message\":\"of {own}\",\"job\":\"{other}\"}}}}\n\
             {{\"fields\":{{\"message\":\"about {own}\"}}}}\nhalf a line of {own}\n"
        );
        let lines: Vec<String> = about(&log, &own, false).collect();
        assert_eq!(
            lines,
            [format!("{{\"fields\":{{\"message\":\"a\",\"job\":\"{own}\",\"after\":\"another-job\"}}}}")]
        );
        assert!(about(&log, &own, true).all(|line| line.contains(other)));
    }
}
