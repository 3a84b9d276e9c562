//! How a command ends: the one table of exit codes, and the errors that lead to them. Texts never decide an
//! exit code; kinds do.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::api::wire::ErrorCode;
use crate::config::{ConfigError, PolicyFileError};
use crate::job::{Blame, FailReason, Outcome, StopReason};

/// The exit codes of all commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitCode {
    /// 0: the command, and the job it waited for, succeeded.
    Succeeded,
    /// 1: the job failed, or some of several did.
    Failed,
    /// 2: the command line, the spec or what it asks for is not acceptable.
    Usage,
    /// 3: a limit or the budget ended the job.
    Stopped,
    /// 4: the daemon or the engine is unavailable; trying again later may help.
    Unavailable,
    /// 5: a batch stopped at a gate.
    Gate,
    /// 130: the user cancelled the job, or left with Ctrl-C.
    Cancelled,
    /// That of the command which ran in a cell.
    Command(u8),
}

/// The table as `--help` shows it.
pub(crate) const EXIT_CODES_HELP: &str = "\
Exit codes of all commands:
    0  succeeded
    1  failed, or some of several did
    2  not acceptable: command line, job spec, policy, workspace
    3  stopped by a limit or the budget
    4  the daemon, the engine or the required runtime is unavailable
    5  stopped at a gate
  130  cancelled by the user
hotcell exec and hotcell shell: the code of what ran in the cell, once it ran; 126 and 127 where it could not be started.

Errors are three lines on standard error: what happened, whose fault it is, what to do next.
With --json they are one line of JSON on standard output instead:
{\"error\":{\"code\",\"blame\",\"message\",\"hint\"}}.";

impl ExitCode {
    /// The code for a job's end.
    pub(crate) fn of(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::Succeeded => Self::Succeeded,
            Outcome::Failed(failure) => match failure.reason {
                FailReason::EngineUnavailable | FailReason::RuntimeUnavailable => Self::Unavailable,
                _ => Self::Failed,
            },
            Outcome::Lost => Self::Failed,
            Outcome::Stopped { reason } => match reason {
                StopReason::Cancelled => Self::Cancelled,
                StopReason::Deadline | StopReason::Silent | StopReason::Budget | StopReason::Turns => {
                    Self::Stopped
                }
                StopReason::Drain => Self::Unavailable,
            },
        }
    }

    fn of_api(code: ErrorCode) -> Self {
        match code {
            ErrorCode::InvalidSpec
            | ErrorCode::InvalidRequest
            | ErrorCode::TooLarge
            | ErrorCode::UnknownPolicy
            | ErrorCode::AbovePolicy
            | ErrorCode::NotListed
            | ErrorCode::AboveAccess
            | ErrorCode::Workspace
            | ErrorCode::NotFound
            | ErrorCode::NoRoute
            | ErrorCode::MethodNotAllowed
            | ErrorCode::IdempotencyConflict
            | ErrorCode::NotDone
            | ErrorCode::NotParked
            | ErrorCode::NotYours => Self::Usage,
            ErrorCode::QueueFull
            | ErrorCode::EngineUnavailable
            | ErrorCode::ImageUnavailable
            | ErrorCode::Draining => Self::Unavailable,
            ErrorCode::Conflict | ErrorCode::DiskFull | ErrorCode::Internal => Self::Failed,
        }
    }

    /// The number.
    pub(crate) fn value(self) -> u8 {
        match self {
            Self::Succeeded => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Stopped => 3,
            Self::Unavailable => 4,
            Self::Gate => 5,
            Self::Cancelled => 130,
            Self::Command(code) => code,
        }
    }

    /// The code for several things done one after the other.
    pub(crate) fn of_all(codes: &[Self]) -> Self {
        match codes {
            [] => Self::Succeeded,
            [first, rest @ ..] if rest.iter().all(|code| code == first) => *first,
            _ => Self::Failed,
        }
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code.value())
    }
}

/// An error answer of the daemon, read leniently: a newer daemon may know more codes.
#[derive(Debug, Clone)]
pub(crate) struct ApiError {
    /// HTTP status.
    pub(crate) status: u16,
    /// The code, where this version knows it.
    pub(crate) code: Option<ErrorCode>,
    /// The answer as it came.
    pub(crate) body: Value,
}

impl ApiError {
    pub(crate) fn read(status: u16, body: &[u8]) -> Self {
        let body: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
        let code = serde_json::from_value(body["error"]["code"].clone()).ok();
        let body = if body["error"]["message"].is_string() {
            body
        } else {
            let message = format!("the daemon answered {status} without saying why");
            json!({"error": {"code": "unknown", "blame": "host", "message": message}})
        };
        Self { status, code, body }
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.body["error"][key].as_str()
    }
}

/// What ends a command before its time.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// The daemon said no.
    #[error("{}", .0.text("message").unwrap_or("the daemon gave no message"))]
    Api(Box<ApiError>),
    /// Nothing answers on the socket.
    #[error("no daemon answers on {}: {source}", socket.display())]
    NoDaemon {
        /// The socket.
        socket: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// The connection broke before the answer was whole.
    #[error("the connection to the daemon was lost: {what}")]
    ConnectionLost {
        /// What was going on.
        what: String,
    },
    /// The answer is not what this version understands.
    #[error("the daemon's answer is not understood: {what}")]
    Protocol {
        /// What is wrong with it.
        what: String,
    },
    /// Something given on the command line is not acceptable.
    #[error("{what}")]
    Usage {
        /// What.
        what: String,
        /// What to do instead.
        hint: Option<String>,
    },
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A policy file.
    #[error(transparent)]
    Policy(#[from] PolicyFileError),
    /// A part of hotcell that runs in this process (the daemon itself, image build, scripted model) failed.
    #[error("{}", chain(.0))]
    Local(anyhow::Error),
    /// The same, because the engine or the network is away.
    #[error("{}", chain(.0))]
    Away(anyhow::Error),
    /// Output could not be written.
    #[error("cannot write the output: {0}")]
    Output(std::io::Error),
}

/// An error with its causes, each said once: many messages name their cause themselves.
fn chain(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |mut text, cause| {
        let cause = cause.to_string();
        if text.is_empty() {
            return cause;
        }
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        text
    })
}

impl CliError {
    pub(crate) fn usage(what: impl Into<String>) -> Self {
        Self::Usage { what: what.into(), hint: None }
    }

    pub(crate) fn usage_hint(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Usage { what: what.into(), hint: Some(hint.into()) }
    }

    pub(crate) fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Output(e) if e.kind() == std::io::ErrorKind::BrokenPipe)
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Api(error) => match error.code {
                Some(code) => ExitCode::of_api(code),
                None if (400..500).contains(&error.status) => ExitCode::Usage,
                None => ExitCode::Unavailable,
            },
            Self::NoDaemon { .. } | Self::ConnectionLost { .. } | Self::Away(_) => ExitCode::Unavailable,
            Self::Protocol { .. } | Self::Local(_) => ExitCode::Failed,
            Self::Usage { .. } | Self::Config(_) | Self::Policy(_) => ExitCode::Usage,
            // A reader that has seen enough is no failure.
            Self::Output(_) if self.is_broken_pipe() => ExitCode::Succeeded,
            Self::Output(_) => ExitCode::Failed,
        }
    }

    pub(crate) fn blame(&self) -> Option<Blame> {
        match self {
            Self::Api(error) => serde_json::from_value(error.body["error"]["blame"].clone()).ok(),
            Self::NoDaemon { .. } | Self::ConnectionLost { .. } | Self::Away(_) => Some(Blame::Host),
            Self::Protocol { .. }
            | Self::Local(_)
            | Self::Usage { .. }
            | Self::Config(_)
            | Self::Policy(_)
            | Self::Output(_) => None,
        }
    }

    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Api(error) => error.text("hint").map(str::to_owned),
            Self::NoDaemon { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
                Some("whoever runs the daemon can admit you: by socket_group and socket_mode".into())
            }
            Self::NoDaemon { .. } => Some(
                "start one with `hotcell serve`, or name its socket with --socket or HOTCELL_SOCKET".into(),
            ),
            Self::ConnectionLost { .. } => {
                Some("jobs go on without a client; `hotcell ls` shows them".into())
            }
            Self::Protocol { .. } => {
                Some("`hotcell health` shows the daemon's version, `hotcell version` this one".into())
            }
            Self::Usage { hint, .. } => hint.clone(),
            Self::Config(_) | Self::Policy(_) | Self::Local(_) | Self::Away(_) | Self::Output(_) => None,
        }
    }

    /// The shape of the API's errors, for `--json`; errors of this side have codes of their own.
    pub(crate) fn body(&self) -> Value {
        let code = match self {
            Self::Api(error) => return error.body.clone(),
            Self::NoDaemon { .. } => "daemon_unavailable",
            Self::ConnectionLost { .. } => "connection_lost",
            Self::Protocol { .. } => "protocol",
            Self::Usage { .. } => "usage",
            Self::Config(_) => "config",
            Self::Policy(_) => "policy_file",
            Self::Local(_) => "failed",
            Self::Away(_) => "unavailable",
            Self::Output(_) => "output",
        };
        let blame = self.blame().unwrap_or(match self.exit_code() {
            ExitCode::Usage => Blame::Job,
            _ => Blame::Host,
        });
        let mut body = json!({"error": {"code": code, "blame": blame, "message": self.to_string()}});
        if let Some(hint) = self.hint() {
            body["error"]["hint"] = hint.into();
        }
        body
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{Phase, outcome::Failure};

    #[test]
    fn each_end_of_a_job_has_its_exit_code() {
        let failed = |reason| ExitCode::of(&Outcome::Failed(Failure::new(Phase::Run, reason, "x"))).value();
        let stopped = |reason| ExitCode::of(&Outcome::Stopped { reason }).value();
        assert_eq!(ExitCode::of(&Outcome::Succeeded).value(), 0);
        assert_eq!(ExitCode::of(&Outcome::Lost).value(), 1);
        assert_eq!(failed(FailReason::Oom), 1);
        assert_eq!(failed(FailReason::EngineUnavailable), 4);
        assert_eq!(failed(FailReason::RuntimeUnavailable), 4);
        assert_eq!(StopReason::ALL.map(stopped), [130, 3, 3, 3, 3, 4]);
    }

    #[test]
    fn of_several_ends_the_common_one_counts_and_else_failed() {
        use ExitCode::{Failed, Succeeded, Usage};
        assert_eq!(ExitCode::of_all(&[]), Succeeded);
        assert_eq!(ExitCode::of_all(&[Usage, Usage]), Usage);
        assert_eq!(ExitCode::of_all(&[Succeeded, Usage]), Failed);
    }

    #[test]
    fn an_answer_of_a_newer_daemon_is_still_read() {
        let body = br#"{"error":{"code":"brand_new","blame":"host","message":"no","hint":"wait"}}"#;
        let error = CliError::Api(Box::new(ApiError::read(429, body)));
        assert_eq!((error.to_string().as_str(), error.hint().as_deref()), ("no", Some("wait")));
        assert_eq!(error.exit_code(), ExitCode::Usage);
        let error = CliError::Api(Box::new(ApiError::read(502, b"<html>")));
        assert_eq!(error.exit_code(), ExitCode::Unavailable);
    }
}
