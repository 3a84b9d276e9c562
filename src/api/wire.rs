//! What travels over the socket as JSON: the views of a job and the one shape of an error. Clients in any
//! language depend on these names; fields are added, never renamed.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::event::Totals;
use crate::job::source::GitCheckout;
use crate::job::spec::Runtime;
use crate::job::{Blame, JobId, Outcome, State};

/// A job as its owner sees it.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct JobView {
    /// Its id.
    pub id: JobId,
    /// Where it stands; with `outcome` and its data when done, with `reason` when stopping, with `parked` (`until_ms`,
    /// `why`) when parking or parked.
    #[serde(flatten)]
    pub state: State,
    /// Host user id of the submitter.
    pub uid: u32,
    /// First line of the prompt, shortened.
    pub title: String,
    /// The policy it runs under.
    pub policy: String,
    /// The model.
    pub model: String,
    /// The image's reference.
    pub image: String,
    /// The workspace on the host, where it has one.
    pub workspace: Option<String>,
    /// `copy`, `bind`, `read-only` or `none`.
    pub workspace_mode: crate::job::spec::WorkspaceMode,
    /// The submitter's labels.
    pub labels: BTreeMap<String, String>,
    /// The batch it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<String>,
    /// Its priority.
    pub priority: i8,
    /// What isolates or isolated its cell, once it has one.
    #[serde(default)]
    pub runtime: Option<Runtime>,
    /// Which try this is, from 1: one more after each parking.
    #[serde(default)]
    pub attempt: u32,
    /// The cell that runs or ran it.
    pub cell: Option<String>,
    /// RFC 3339, UTC.
    pub created_at: String,
    /// When it got its slot.
    pub started_at: Option<String>,
    /// When it was done.
    pub ended_at: Option<String>,
    /// Number of its last event.
    pub last_seq: u64,
    /// What it may spend, in USD.
    pub cost_limit_usd: f64,
    /// What it has cost so far, in USD: the ledger's figure.
    pub cost_usd: f64,
    /// Totals as the daemon measured them.
    pub totals: Totals,
    /// The agent's final answer, where it gave one.
    pub result: Option<String>,
    /// Length of its report in bytes, where one was kept: `GET /v1/jobs/{id}/report` gives it.
    #[serde(default)]
    pub report_bytes: Option<u64>,
    /// SHA-256 of its prompt, in hex.
    #[serde(default)]
    pub prompt_sha256: String,
    /// SHA-256 of what it was allowed, as its policy and the submitter's own narrowing made it, in hex.
    #[serde(default)]
    pub policy_sha256: String,
    /// The job whose changes it goes on with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// What was fetched for it: its workspace is a checkout of that, and goes with the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<GitCheckout>,
    /// In the answer to a submit only: what its submitter should know, such as files that look like secrets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

impl JobView {
    /// How it ended, when it has.
    pub fn outcome(&self) -> Option<&Outcome> {
        self.state.outcome()
    }
}

/// A page of jobs, newest first.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct JobList {
    /// The jobs.
    pub jobs: Vec<JobView>,
    /// Give it as `cursor` to get the next page; absent on the last one.
    pub next_cursor: Option<String>,
}

/// What `GET /v1/whoami` answers: who asks, and what they may do.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct WhoAmI {
    /// Host user id, as the kernel tells it.
    pub uid: u32,
    /// The user's name, where the machine's user file has one.
    pub user: Option<String>,
    /// Host groups, the primary one first.
    pub groups: Vec<GroupView>,
    /// Sees and cancels everybody's jobs, and may use everything.
    pub admin: bool,
    /// False: the daemon's `[[access]]` does not name this user, and every other request is refused.
    pub listed: bool,
    /// Policies a job may name.
    pub policies: Vec<PolicyView>,
    /// The policy of a job that names none; absent where it must name one.
    pub default_policy: Option<String>,
    /// Providers a job may name, or beginnings of names with a final `*`.
    pub providers: Vec<String>,
    /// Images a job may name, or beginnings of references with a final `*`.
    pub images: Vec<String>,
    /// Jobs at the same time.
    pub slots: SlotsView,
    /// Budgets beyond the single job's: the user's own, and the daemon's.
    pub budgets: Vec<super::cost::BudgetView>,
    /// The `[[access]]` entries that matched. Empty: there are none, or this is an admin.
    pub access: Vec<String>,
}

/// A host group.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct GroupView {
    /// Its id.
    pub gid: u32,
    /// Its name, where the machine's group file has one.
    pub name: Option<String>,
}

/// A policy that may be named.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct PolicyView {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub description: String,
    /// What one job may spend under it, in USD.
    pub cost_usd: f64,
}

/// Jobs at the same time.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct SlotsView {
    /// Jobs that have a slot now.
    pub used: u64,
    /// Jobs that wait for one.
    pub queued: u64,
    /// Most of this user's jobs at the same time.
    pub max: u32,
}

/// What `GET /healthz` answers.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Health {
    /// `ok`, or `degraded` with the reason in `problems`.
    pub status: String,
    /// The daemon's version.
    pub version: String,
    /// Label of this daemon's containers.
    pub instance: String,
    /// The engine's address.
    pub engine: String,
    /// What does not work at the moment, in words.
    pub problems: Vec<String>,
    /// What works, but not in the better way, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// What `GET /v1/doctor` and `POST /v1/doctor` answer.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Doctor {
    /// `ok`, `degraded` where a check of the machine failed, or `broken` where a cell did not keep a promise.
    pub status: String,
    /// What was looked at.
    pub checks: Vec<Check>,
    /// The cell that was attacked, where one was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attack: Option<Attacked>,
}

/// What `POST /v1/doctor` takes; an empty body is one without keys.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AttackRequest {
    /// The policy whose walls are tried; the one of a job that names none where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
}

/// The cell that was attacked.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Attacked {
    /// The jobs that did it: what ends a whole cell by its limit gets one of its own.
    pub jobs: Vec<JobId>,
    /// The policy.
    pub policy: String,
    /// What isolated the cell; absent where none came to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<Runtime>,
    /// Its image.
    pub image: String,
}

/// One thing that jobs need.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Check {
    /// What it is: `daemon`, `engine`, `versions`, `kernel`, `runtimes`, `image`, `agent`, `workspaces`, `disk`, `clock`,
    /// `keys`, `policies`, and `files` where some could not be read again; of an attacked cell the promise's name.
    pub name: String,
    /// How it stands.
    pub verdict: CheckVerdict,
    /// What was found.
    pub words: String,
    /// What to do next, where there is something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Of an attacked cell: what every cell promises.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promise: Option<String>,
}

/// How one thing stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CheckVerdict {
    /// As it should be.
    Pass,
    /// Jobs run, but not in the best way.
    Note,
    /// Jobs cannot run, or will soon be unable to; of a promise: it is broken, or not proven.
    Fail,
}

/// Every error answer.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorInfo,
}

/// One error.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ErrorInfo {
    /// Which one, for programs.
    pub code: ErrorCode,
    /// Whose fault it is.
    pub blame: Blame,
    /// What happened, for people.
    pub message: String,
    /// What to do next, where there is something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Which error it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The spec is no valid JSON, has an unknown key or a value outside its limit. 400
    InvalidSpec,
    /// A query parameter or header is not valid. 400
    InvalidRequest,
    /// The body is larger than any spec may be. 413
    TooLarge,
    /// No such policy. 400
    UnknownPolicy,
    /// The job asks for more than its policy allows. 403
    AbovePolicy,
    /// The daemon's `[[access]]` does not name the user or a group of theirs. 403
    NotListed,
    /// The job asks for a policy, a provider or an image that its submitter may not use. 403
    AboveAccess,
    /// The workspace cannot be used. 400
    Workspace,
    /// No such job, or not yours. 404
    NotFound,
    /// No such path. 404
    NoRoute,
    /// The path has no such method. 405
    MethodNotAllowed,
    /// The idempotency key was used with another spec. 409
    IdempotencyConflict,
    /// The job is not done yet. 409
    NotDone,
    /// The job is not parked. 409
    NotParked,
    /// A change set cannot be applied: what it is against is not there any more. 409
    Conflict,
    /// Somebody else's job: they alone decide about it. 403
    NotYours,
    /// There is no space left where something is to be written. 507
    DiskFull,
    /// Too many jobs are queued. 429
    QueueFull,
    /// The engine does not answer. 503
    EngineUnavailable,
    /// No image, or no agent bundle. 503
    ImageUnavailable,
    /// The daemon is shutting down. 503
    Draining,
    /// A fault of the daemon. 500
    Internal,
}

impl ErrorCode {
    /// The HTTP status.
    pub fn status(self) -> u16 {
        match self {
            Self::InvalidSpec | Self::InvalidRequest | Self::UnknownPolicy | Self::Workspace => 400,
            Self::AbovePolicy | Self::NotListed | Self::AboveAccess | Self::NotYours => 403,
            Self::NotFound | Self::NoRoute => 404,
            Self::MethodNotAllowed => 405,
            Self::IdempotencyConflict | Self::NotDone | Self::NotParked | Self::Conflict => 409,
            Self::TooLarge => 413,
            Self::QueueFull => 429,
            Self::EngineUnavailable | Self::ImageUnavailable | Self::Draining => 503,
            Self::Internal => 500,
            Self::DiskFull => 507,
        }
    }

    /// Whose fault it is.
    pub fn blame(self) -> Blame {
        match self {
            Self::InvalidSpec
            | Self::InvalidRequest
            | Self::TooLarge
            | Self::UnknownPolicy
            | Self::AbovePolicy
            | Self::NotListed
            | Self::AboveAccess
            | Self::Workspace
            | Self::NotFound
            | Self::NoRoute
            | Self::MethodNotAllowed
            | Self::IdempotencyConflict
            | Self::NotDone
            | Self::NotParked
            | Self::Conflict
            | Self::NotYours => Blame::Job,
            Self::QueueFull
            | Self::EngineUnavailable
            | Self::ImageUnavailable
            | Self::Draining
            | Self::DiskFull
            | Self::Internal => Blame::Host,
        }
    }
}
